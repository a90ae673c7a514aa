"""Leases on pages as protobuf messages and back. A malformed message is a ``WireError``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from kvstore.page import PageFrame, PageIdentity
from kvstore.transports.grpc_wire import (
    WireError,
    id_from_wire,
    reference_from_wire,
    reference_to_wire,
)
from quire.v1 import page_service_pb2 as pb


def granted_to_wire(frames: Iterable[PageFrame]) -> Iterator[pb.GrantedPage]:
    """Pages from the announcements of their layer groups, in order."""
    for identity, page in groupby(frames, key=lambda frame: frame.identity):
        yield pb.GrantedPage(
            reference=reference_to_wire(identity.reference),
            group_digests=[frame.digest for frame in page],
        )


def granted_from_wire(
    messages: Sequence[pb.GrantedPage], first_page: int, page_size: int
) -> Iterator[PageFrame]:
    """The announcements of full pages, the first of them at index ``first_page`` of its prompt."""
    for index, message in enumerate(messages, first_page):
        identity = PageIdentity(reference_from_wire(message.reference), index, page_size)
        count = len(message.group_digests)
        for group, digest in enumerate(message.group_digests):
            yield PageFrame(identity, group, count, None, id_from_wire("group_digests", digest))


def lease_s_from_wire(message: pb.LeasePagesResponse) -> float:
    if not math.isfinite(message.lease_s) or message.lease_s <= 0:
        raise WireError("lease_s is no positive number of seconds")
    return message.lease_s
