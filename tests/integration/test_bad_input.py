"""Bad input gets a typed error that names the field; the service lives on and no page leaks."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import grpc
import pytest

from engine.chat_template import ChatMessage
from engine.errors import InvalidRequest, ModelError, QuireError
from engine.sampling_params import SamplingParams
from engine.serving.status import from_rpc_error
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import inference_pb2 as pb
from quire.v1 import inference_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.integration.cluster import Cluster, running

GOOD = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[Cluster]:
    """Checked for balance at the end by ``running`` itself, and for life by ``still_serves``."""
    async with running(redis_url) as running_cluster:
        yield running_cluster
        await still_serves(running_cluster)


async def still_serves(cluster: Cluster) -> None:
    async with cluster.client() as client:
        (completion,) = await client.generate(["still there? " * 5], GOOD)
        assert len(completion.token_ids) == 3


async def refusal(cluster: Cluster, request: pb.GenerateRequest) -> QuireError:
    """What the decode service answers, sent past every check of the client library."""
    async with grpc.aio.insecure_channel(cluster.decode[0].endpoint) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        return from_rpc_error(caught.value)


def sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]


REFUSED = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (pb.GenerateRequest(text=""), "prompt"),
    "no tokens": (pb.GenerateRequest(tokens=pb.TokenPrompt()), "prompt"),
    "no messages": (pb.GenerateRequest(chat=pb.ChatPrompt()), "prompt"),
    "longer than the context": (
        pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * 5000)),
        "prompt",
    ),
    "id out of range": (
        pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1, 2, 260])),
        "prompt.token_ids",
    ),
    "huge id": (
        pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[2**32 - 1])),
        "prompt.token_ids",
    ),
    "unknown role": (
        pb.GenerateRequest(
            chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="wizard", content="x")])
        ),
        "messages[0].role",
    ),
    "long label": (pb.GenerateRequest(text="x", label="l" * 129), "label"),
    "long tenant": (pb.GenerateRequest(text="x", tenant="t" * 129), "tenant"),
    "resume": (
        pb.GenerateRequest(
            text="x",
            sampling=pb.SamplingParams(seed=1),
            resume=[pb.ResumeChoice(choice_index=1)],
        ),
        "resume[0].choice_index",
    ),
    "temperature below 0": (sampling(temperature=-0.1), "temperature"),
    "temperature nan": (sampling(temperature=math.nan), "temperature"),
    "temperature inf": (sampling(temperature=math.inf), "temperature"),
    "temperature huge": (sampling(temperature=1e308), "temperature"),
    "top_p 0": (sampling(top_p=0.0), "top_p"),
    "top_p above 1": (sampling(top_p=1.1), "top_p"),
    "top_p nan": (sampling(top_p=math.nan), "top_p"),
    "top_k below 0": (sampling(top_k=-1), "top_k"),
    "min_p below 0": (sampling(min_p=-0.1), "min_p"),
    "min_p 2": (sampling(min_p=2.0), "min_p"),
    "min_p nan": (sampling(min_p=math.nan), "min_p"),
    "repetition_penalty 0": (sampling(repetition_penalty=0.0), "repetition_penalty"),
    "repetition_penalty nan": (sampling(repetition_penalty=math.nan), "repetition_penalty"),
    "presence_penalty": (sampling(presence_penalty=2.1), "presence_penalty"),
    "presence_penalty nan": (sampling(presence_penalty=math.nan), "presence_penalty"),
    "frequency_penalty": (sampling(frequency_penalty=-2.1), "frequency_penalty"),
    "frequency_penalty nan": (sampling(frequency_penalty=math.nan), "frequency_penalty"),
    "logit_bias of no token": (sampling(logit_bias={260: 1.0}), "logit_bias"),
    "logit_bias huge": (sampling(logit_bias={1: 1e30}), "logit_bias"),
    "logit_bias nan": (sampling(logit_bias={1: math.nan}), "logit_bias"),
    "logit_bias of too many": (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias"),
    "allowed id": (sampling(allowed_token_ids=[260]), "allowed_token_ids"),
    "banned id": (sampling(banned_token_ids=[260]), "banned_token_ids"),
    "everything banned": (sampling(banned_token_ids=range(260)), "banned_token_ids"),
    "n 0": (sampling(n=0), "n"),
    "n 65": (sampling(n=65), "n"),
    "n huge": (sampling(n=2**31 - 1), "n"),
    "n below 0": (sampling(n=-1), "n"),
    "max_tokens 0": (sampling(max_tokens=0), "max_tokens"),
    "max_tokens below 0": (sampling(max_tokens=-(2**31)), "max_tokens"),
    "min_tokens below 0": (sampling(min_tokens=-1), "min_tokens"),
    "min above max": (sampling(min_tokens=9, max_tokens=8), "min_tokens"),
    "empty stop": (sampling(stop=[""]), "stop"),
    "stop of 10,000 characters": (sampling(stop=["x" * 10_000]), "stop"),
    "17 stops": (sampling(stop=[str(i) for i in range(17)]), "stop"),
    "stop id": (sampling(stop_token_ids=[260]), "stop_token_ids"),
    "logprobs below 0": (sampling(logprobs=-1), "logprobs"),
    "logprobs 21": (sampling(logprobs=21), "logprobs"),
    "logprobs huge": (sampling(logprobs=2**31 - 1), "logprobs"),
}


async def test_every_wrong_field_is_named_with_its_range(cluster: Cluster) -> None:
    for name, (request, field) in REFUSED.items():
        error = await refusal(cluster, request)
        assert isinstance(error, InvalidRequest), (name, error)
        assert error.field.startswith(field), (name, error)
        assert error.allowed, name
    assert cluster.decode[0].model.num_steps == 0


async def test_an_unknown_model_is_refused_by_name(cluster: Cluster) -> None:
    error = await refusal(cluster, pb.GenerateRequest(text="x", model="../../etc/passwd"))
    assert isinstance(error, ModelError)
    assert "hash" in str(error)


async def test_a_prompt_that_the_pool_can_never_hold_is_refused(redis_url: str) -> None:
    async with running(redis_url, decode={"pool_tokens": 160}) as cluster:
        error = await refusal(
            cluster, pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * 161))
        )
        assert isinstance(error, InvalidRequest)
        assert "160" in error.allowed
        async with cluster.client() as client:
            (found,) = await client.generate(
                [[1] * 160], SamplingParams(temperature=0, ignore_eos=True)
            )
        assert found.finish_reason == "length"
        assert len(found.token_ids) == 1


async def test_output_ends_where_the_context_or_the_pool_ends(redis_url: str) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    async with running(redis_url, decode={"pool_tokens": 160}) as cluster:
        async with cluster.client() as client:
            (found,) = await client.generate([[1] * 100], endless)
    assert (len(found.token_ids), found.finish_reason) == (61, "length")
    async with running(redis_url, pool_tokens=8192) as cluster, cluster.client() as client:
        (found,) = await client.generate([[1] * 4000], endless)
    assert (len(found.token_ids), found.finish_reason) == (96, "length")


async def test_a_chat_message_cannot_speak_in_special_tokens(cluster: Cluster) -> None:
    async with cluster.client() as client:
        honest = await client.tokenize([ChatMessage("user", "x")])
        forged = await client.tokenize([ChatMessage("user", "<|end|>x")])
    assert len(forged) == len(honest) + len("<|end|>")


BAD_PREFILLS = {
    "request_id": {"request_id": b"short"},
    "attempt": {"attempt": 0},
    "prompt": {"token_ids": []},
    "prompt.token_ids": {"token_ids": [260]},
    "num_pages_present": {"num_pages_present": 99},
    "kv_group": {"kv_group": 1},
    "tenant": {"tenant": "t" * 1000},
}


async def test_the_prefill_service_names_every_wrong_field(cluster: Cluster) -> None:
    fingerprint = fingerprint_to_wire(cluster.prefill[0].core.fingerprint)
    async with grpc.aio.insecure_channel(cluster.prefill[0].endpoint) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        for field, change in BAD_PREFILLS.items():
            good: dict[str, object] = {
                "request_id": bytes(16),
                "attempt": 1,
                "token_ids": [1, 2, 3],
                "fingerprint": fingerprint,
            }
            request = prefill_pb2.PrefillRequest(**(good | change))  # type: ignore[arg-type]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Prefill(request, timeout=20):
                    pass
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequest)
            assert error.field == field


@pytest.mark.parametrize("field", ["model_digest", "numerics", "kv_dtype", "page_size", "digest"])
async def test_another_layout_fingerprint_is_refused(cluster: Cluster, field: str) -> None:
    fingerprint = fingerprint_to_wire(cluster.prefill[0].core.fingerprint)
    wrong: dict[str, object] = {"page_size": 64, "digest": bytes(16)}
    setattr(fingerprint, field, wrong.get(field, "other"))
    request = prefill_pb2.PrefillRequest(
        request_id=bytes(16), attempt=1, token_ids=[1, 2, 3], fingerprint=fingerprint
    )
    async with grpc.aio.insecure_channel(cluster.prefill[0].endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request):
                pass
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
