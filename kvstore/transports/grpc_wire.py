"""Pages as protobuf messages and back. A malformed message is a ``WireError``, never a crash."""

from __future__ import annotations

from kvstore.fingerprint import LayoutFingerprint
from kvstore.page import Commit, PageFrame, PageIdentity, PageReference
from kvstore.transports import DEFAULT, TransportAddress
from quire.v1 import pages_pb2

_ID_BYTES = 16


class WireError(Exception):
    """A message lacks a field or has one of impossible size."""


def fingerprint_to_wire(fingerprint: LayoutFingerprint) -> pages_pb2.LayoutFingerprint:
    return pages_pb2.LayoutFingerprint(
        digest=fingerprint.digest,
        model_digest=fingerprint.model_digest,
        numerics=fingerprint.numerics,
        num_layers=fingerprint.num_layers,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        page_size=fingerprint.page_size,
        kv_dtype=fingerprint.kv_dtype,
        layout_id=fingerprint.layout_id,
    )


def fingerprint_from_wire(message: pages_pb2.LayoutFingerprint) -> LayoutFingerprint:
    fingerprint = LayoutFingerprint(
        model_digest=message.model_digest,
        numerics=message.numerics,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        page_size=message.page_size,
        kv_dtype=message.kv_dtype,
        layout_id=message.layout_id,
    )
    if fingerprint.digest != message.digest:
        raise WireError("fingerprint.digest does not belong to the fingerprint's fields")
    return fingerprint


def reference_to_wire(reference: PageReference) -> pages_pb2.PageReference:
    return pages_pb2.PageReference(
        boot_id=reference.boot_id,
        slot=reference.slot,
        generation=reference.generation,
        prefix_hash=reference.prefix_hash,
        fingerprint=reference.fingerprint,
        kv_group=reference.kv_group,
    )


def reference_from_wire(message: pages_pb2.PageReference) -> PageReference:
    return PageReference(
        boot_id=id_from_wire("reference.boot_id", message.boot_id),
        slot=message.slot,
        generation=message.generation,
        prefix_hash=id_from_wire("reference.prefix_hash", message.prefix_hash),
        fingerprint=id_from_wire("reference.fingerprint", message.fingerprint),
        kv_group=message.kv_group,
    )


def frame_to_wire(frame: PageFrame) -> pages_pb2.PageFrame:
    identity = frame.identity
    return pages_pb2.PageFrame(
        reference=reference_to_wire(identity.reference),
        page_index=identity.page_index,
        num_tokens=identity.num_tokens,
        layer_group=frame.layer_group,
        num_layer_groups=frame.num_layer_groups,
        payload=b"" if frame.payload is None else bytes(frame.payload),
        digest=frame.digest,
    )


def frame_from_wire(message: pages_pb2.PageFrame) -> PageFrame:
    identity = PageIdentity(
        reference=reference_from_wire(message.reference),
        page_index=message.page_index,
        num_tokens=message.num_tokens,
    )
    return PageFrame(
        identity=identity,
        layer_group=message.layer_group,
        num_layer_groups=message.num_layer_groups,
        payload=message.payload,
        digest=id_from_wire("digest", message.digest),
    )


def frames_from_wire(message: pages_pb2.PageFrames) -> list[PageFrame]:
    frames = [frame_from_wire(frame) for frame in message.frames]
    if not frames:
        raise WireError("frames is empty")
    return frames


def commit_to_wire(commit: Commit) -> pages_pb2.Commit:
    return pages_pb2.Commit(
        num_pages=commit.num_pages,
        num_tokens=commit.num_tokens,
        pages_digest=commit.pages_digest,
        prompt_hash=commit.prompt_hash,
        since_computed_s=commit.since_computed_s,
    )


def commit_from_wire(message: pages_pb2.Commit) -> Commit:
    if not 0 <= message.since_computed_s < float("inf"):
        raise WireError("commit.since_computed_s is not a duration")
    return Commit(
        num_pages=message.num_pages,
        num_tokens=message.num_tokens,
        pages_digest=id_from_wire("commit.pages_digest", message.pages_digest),
        prompt_hash=id_from_wire("commit.prompt_hash", message.prompt_hash),
        since_computed_s=message.since_computed_s,
    )


def transport_to_wire(transport: TransportAddress) -> pages_pb2.TransportDescriptor:
    return pages_pb2.TransportDescriptor(name=transport.name, address=transport.address)


def transport_from_wire(message: pages_pb2.TransportDescriptor) -> TransportAddress:
    return TransportAddress(message.name or DEFAULT, message.address)


def id_from_wire(field: str, value: bytes) -> bytes:
    """Raises WireError unless the value can be an identity or a digest."""
    if len(value) != _ID_BYTES:
        raise WireError(f"{field} has {len(value)} bytes, not {_ID_BYTES}")
    return value
