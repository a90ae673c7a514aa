"""Prefill and decode with pages of different size, order or KV dtype."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.completion import Completion, Delta, Finished, Started
from engine.errors import CannotResume, HandoverRejected
from engine.local import AsyncLocalEngine
from engine.model import ModelSpec, hash_model
from engine.model.hash_model import HashModel
from engine.model.load import LoadedModel, load_model
from engine.remote import AsyncRemoteEngine
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams
from engine.serving.status import from_rpc_error
from engine.telemetry.trace_tree import SpanRecord, read_spans
from kernels.kv_write.reference import kv_write
from kernels.layout import CANONICAL_LAYOUT_ID, PageLayout
from kvstore.fingerprint import LayoutFingerprint
from kvstore.prefix_hash import PrefixHasher
from kvstore.transports.grpc_wire import fingerprint_to_wire
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import prefill_pb2, prefill_pb2_grpc
from tests.faults.link import Link
from tests.integration.cluster import Cluster, Node, running, settings_for, start, until
from tests.integration.prompts import PROMPTS
from tests.integration.test_faults import failures
from tests.tiny_models import write_folder

PROMPT = [(7 * number * number + 3 * number) % 256 for number in range(333)]
PARAMS = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=20, logprobs=1)


def essence(completions: list[Completion]) -> list[tuple[object, ...]]:
    return [(each.token_ids, each.text, each.logprobs, each.finish_reason) for each in completions]


async def alone(*prompts: list[int], model: Any = "hash") -> list[tuple[object, ...]]:
    async with AsyncLocalEngine(model) as engine:
        return essence(await engine.generate(list(prompts), PARAMS))


def ends(prefill: int, decode: int) -> dict[str, Any]:
    return {"prefill": {"page_size": prefill}, "decode": {"page_size": decode}}


@pytest.mark.parametrize(("prefill", "decode"), [(16, 32), (32, 16), (64, 32), (48, 64)])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
async def test_other_page_sizes_give_the_same_tokens_as_one_engine(
    redis_url: str, prefill: int, decode: int, kv: str
) -> None:
    """Also where the receiver's cache ends in the middle of a page of the sender, and back."""
    sizes = ends(prefill, decode)
    async with running(redis_url, kv=kv, **sizes) as cluster, cluster.client() as client:
        for prompt in (PROMPT[:50], PROMPT[:180], PROMPT, [1, 2, *PROMPT]):
            completions = await client.generate([prompt], PARAMS)
            assert completions[0].prefilled == "remote"
            assert essence(completions) == await alone(prompt)
        assert failures(cluster) == {"landed": 4}


async def test_many_prompts_at_once_through_ends_of_other_page_size(redis_url: str) -> None:
    prompts = [PROMPT[: 40 + 17 * number] for number in range(16)]
    async with running(redis_url, **ends(64, 16)) as cluster, cluster.client() as client:
        each = await asyncio.gather(*[client.generate([prompt], PARAMS) for prompt in prompts])
    assert [found for completions in each for found in essence(completions)] == await alone(
        *prompts
    )


class CanonicalSpec(ModelSpec):
    """A model that keeps its pages in the other order of bytes."""

    def page_layout(self, page_size: int) -> PageLayout:
        return replace(ModelSpec.page_layout(self, page_size), layout_id=CANONICAL_LAYOUT_ID)


def canonical_model() -> LoadedModel:
    loaded = load_model("hash")
    model = HashModel("fp32")
    values = {field.name: getattr(model.spec, field.name) for field in fields(ModelSpec)}
    model.spec = CanonicalSpec(**values)
    return replace(loaded, model=model)


async def test_another_order_of_bytes_gives_the_same_tokens_as_one_engine(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_model, "kv_write", kv_write)  # the one that knows both orders
    fp32 = {"kv": "fp32"}
    async with running(redis_url, num_prefill=0, **fp32) as cluster, cluster.client() as client:
        settings = PrefillSettings(**settings_for(redis_url, page_size=48))
        cluster.prefill.append(await start(PrefillWorker, settings, canonical_model()))
        await known(cluster)
        completions = await client.generate([PROMPT], PARAMS)
        assert cluster.prefill[0].core.fingerprint.layout_id == CANONICAL_LAYOUT_ID
        assert completions[0].prefilled == "remote"
        assert essence(completions) == await alone(PROMPT)


async def known(cluster: Cluster) -> None:
    """Waits until the decode service has heard of the prefill worker, whatever it is."""
    workers = cluster.decode[0].worker._workers  # type: ignore[attr-defined]
    await until(lambda: bool(workers._known))


@pytest.mark.parametrize("kv", ["bf16", "int8"])
async def test_the_kernels_read_converted_pages_as_their_own(
    redis_url: str, tmp_path: Path, kv: str
) -> None:
    loaded = load_model(str(write_folder(tmp_path / "model")), kv=kv)
    await compare(redis_url, loaded, PROMPT[:150])


@pytest.mark.slow
async def test_the_real_model_gives_the_same_tokens_through_ends_of_other_page_size(
    redis_url: str,
) -> None:
    await compare(redis_url, load_model("smollm2"), " ".join(PROMPTS[:6]))


async def compare(redis_url: str, loaded: LoadedModel, prompt: str | list[int]) -> None:
    """Two services of other page size with one engine."""
    async with running(redis_url, loaded=loaded, **ends(64, 32)) as cluster:
        async with cluster.client() as client:
            found = await client.generate([prompt], PARAMS)
    assert found[0].prefilled == "remote"
    async with AsyncLocalEngine(loaded) as engine:
        assert essence(found) == essence(await engine.generate([prompt], PARAMS))


async def test_pages_of_another_kv_dtype_are_not_taken(redis_url: str) -> None:
    kinds = {"prefill": {"kv": "bf16"}, "decode": {"kv": "fp32"}}
    async with running(redis_url, num_prefill=0, **kinds) as cluster, cluster.client() as client:
        settings = PrefillSettings(**settings_for(redis_url, kv="bf16"))
        cluster.prefill.append(await start(PrefillWorker, settings))
        await known(cluster)
        (found,) = await client.generate([PROMPT], replace(PARAMS, n=1))
        workers = cluster.decode[0].worker._workers  # type: ignore[attr-defined]
        assert found.prefilled == "local"
        assert failures(cluster) == {"no_worker": 1}
        assert workers.standing() == f"{cluster.prefill[0].endpoint} foreign fingerprint"


async def answer_to(node: Node, **given: Any) -> HandoverRejected:
    """What a prefill worker says to a receiver it refuses."""
    request = prefill_pb2.PrefillRequest(request_id=bytes(16), attempt=1, token_ids=PROMPT, **given)
    async with grpc.aio.insecure_channel(node.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request):
                pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, HandoverRejected)
    return error


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"kv_dtype": "bf16", "numerics": "hash/bf16/1"}, False),
        ({"numerics": "hash/fp32/2"}, False),
        ({"model_digest": "11" * 16}, True),
        ({"head_dim": 64}, True),
    ],
)
async def test_a_receiver_of_other_pages_is_refused_with_both_fingerprints(
    redis_url: str, change: dict[str, Any], allowed: bool
) -> None:
    async with running(redis_url, num_decode=0, kv="fp32") as cluster:
        ours: LayoutFingerprint = cluster.prefill[0].core.fingerprint
        theirs = replace(ours, **change)
        error = await answer_to(
            cluster.prefill[0],
            fingerprint=fingerprint_to_wire(theirs),
            source_fingerprint=ours.digest,
            allow_foreign_kv=allowed,
        )
        for told in (ours.digest.hex(), theirs.digest.hex(), *change):
            assert told in str(error)


async def test_a_receiver_that_takes_the_pages_for_others_is_refused(redis_url: str) -> None:
    """The worker was restarted with another page size since the receiver heard of it."""
    async with running(redis_url, num_decode=0) as cluster:
        ours = cluster.prefill[0].core.fingerprint
        theirs = replace(ours, page_size=64)
        for expected in (b"", theirs.digest, replace(ours, page_size=32).digest):
            error = await answer_to(
                cluster.prefill[0],
                fingerprint=fingerprint_to_wire(theirs),
                source_fingerprint=expected,
            )
            assert "expected" in str(error)


def handover_spans(trace: Path) -> list[SpanRecord]:
    return [span for span in read_spans(trace) if span.name == "handover"]


async def test_foreign_numbers_are_taken_where_allowed_under_names_of_their_own(
    redis_url: str, tmp_path: Path
) -> None:
    """The hash model's integers are exact in every dtype: the text tells that all arrived."""
    trace = tmp_path / "trace.jsonl"
    options = {"kv": "int8", "allow_foreign_kv": True, "trace_file": trace}
    kinds = {"prefill": {"kv": "bf16", "page_size": 32}, "decode": options}
    async with running(redis_url, **kinds) as cluster, cluster.client() as client:
        for _ in range(2):
            completions = await client.generate([PROMPT], PARAMS)
            assert completions[0].prefilled == "remote"  # not "cached": pure pages were looked for
            assert essence(completions) == await alone(PROMPT)
        core = cluster.decode[0].core
        held = core.fingerprint.holding(cluster.prefill[0].core.fingerprint)
        names = set(core.pool.cached_names())
        assert names >= set(PrefixHasher("", held.digest, 16).full_pages(PROMPT[:-1]))
        assert not names & set(PrefixHasher("", core.fingerprint.digest, 16).full_pages(PROMPT))
    for span in handover_spans(trace):
        assert span.attributes["quire.source_page_size"] == 32
        assert span.attributes["quire.kv_error_max"] == 0
        assert span.attributes["quire.kv_error_mean"] == 0


async def test_the_rounding_of_foreign_numbers_is_in_the_trace(
    redis_url: str, tmp_path: Path
) -> None:
    folder = str(write_folder(tmp_path / "model"))
    bf16, int8 = (load_model(folder, kv=kv) for kv in ("bf16", "int8"))
    trace = tmp_path / "trace.jsonl"
    decode = {"allow_foreign_kv": True, "trace_file": trace}
    both = {"loaded": int8, "num_prefill": 0, "decode": decode}
    async with running(redis_url, **both) as cluster, cluster.client() as client:
        settings = PrefillSettings(**settings_for(redis_url, page_size=32))
        cluster.prefill.append(await start(PrefillWorker, settings, bf16))
        await known(cluster)
        (found,) = await client.generate([PROMPT[:100]], replace(PARAMS, n=1))
        assert found.prefilled == "remote"
        assert len(found.token_ids) == PARAMS.max_tokens
    (span,) = handover_spans(trace)
    largest, mean = (float(span.attributes[f"quire.kv_error_{kind}"]) for kind in ("max", "mean"))
    assert 0 < mean < largest


ONE_LONG = replace(PARAMS, n=1, max_tokens=60, ignore_eos=True)


async def test_a_stream_over_foreign_kv_is_not_continued_by_another_worker(redis_url: str) -> None:
    """It would go on with other tokens, and its caller could not tell."""
    kinds = {"prefill": {"kv": "bf16"}, "decode": {"kv": "int8", "allow_foreign_kv": True}}
    async with running(redis_url, num_decode=2, **kinds) as cluster:
        first, second = cluster.decode
        held = first.core.fingerprint.holding(cluster.prefill[0].core.fingerprint)
        async with Link(int(first.endpoint.rpartition(":")[2])) as link:
            async with AsyncRemoteEngine([link.endpoint, second.endpoint]) as client:
                items = client.items(PROMPT, ONE_LONG)
                assert isinstance(await anext(items), Started)
                delta = await anext(items)
                assert isinstance(delta, Delta)
                assert delta.foreign_kv == held.digest
                await link.refuse()
                with pytest.raises(CannotResume, match=held.digest.hex()):
                    async for _ in items:
                        pass
        assert second.model.num_steps == 0


async def test_a_resumed_stream_takes_no_foreign_kv(redis_url: str) -> None:
    kinds = {"prefill": {"kv": "bf16"}, "decode": {"kv": "int8", "allow_foreign_kv": True}}
    async with running(redis_url, **kinds) as cluster, cluster.client() as client:
        (whole,) = await alone_with(ONE_LONG)
        resume = [ChoiceSoFar(0, whole.token_ids[:20])]
        items = [item async for item in client.items(PROMPT, ONE_LONG, resume)]
        finished = items[-1]
        assert isinstance(finished, Finished)
        assert finished.prefilled == "local"
        found = [each for item in items if isinstance(item, Delta) for each in item.token_ids]
        assert tuple(found) == whole.token_ids[20:]
        assert not any(item.foreign_kv for item in items if isinstance(item, Delta))


async def alone_with(params: SamplingParams) -> list[Completion]:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        return await engine.generate([PROMPT], params)
