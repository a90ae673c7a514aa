"""The real model's pages over every transport: handed over, and pulled out of a cache."""

from __future__ import annotations

import pytest

from engine.completion import Completion
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel, load_model
from engine.sampling_params import SamplingParams
from kvstore.transports.choice import problem_of
from tests.integration.cluster import Node, eventually, running
from tests.integration.prompts import PROMPTS
from tests.integration.reuse import counted

pytestmark = pytest.mark.slow

PAGE = 32
TEXT = " ".join(PROMPTS)
PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=16, logprobs=2)
KV = ("bf16", "int8")


def essence(found: Completion) -> tuple[object, ...]:
    return found.token_ids, found.text, found.logprobs, found.finish_reason


async def answer(node: Node) -> Completion:
    async with node.client() as client:
        (found,) = await client.generate([TEXT], PARAMS)
        return found


async def all_published(node: Node, names: list[bytes]) -> None:
    async def told() -> bool:
        fingerprint = node.core.fingerprint.digest.hex()
        return len(await node.worker.index.lookup(fingerprint, names)) == len(names)

    await eventually(told)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("transport", ["grpc", "shm", "nixl"])
async def test_pages_handed_over_and_pulled_give_the_tokens_of_one_engine(
    redis_url: str, transport: str, kv: str
) -> None:
    problem = problem_of(transport)
    if problem is not None:
        pytest.skip(str(problem))
    loaded: LoadedModel = load_model("smollm2", kv=kv)
    async with AsyncLocalEngine(loaded) as engine:
        (expected,) = await engine.generate([TEXT], PARAMS)
    options = {"page_size": PAGE, "transports": (transport,), "decode": {"prefill": "pull"}}
    async with running(redis_url, num_decode=2, loaded=loaded, **options) as cluster:
        (prefill,), (first, second) = cluster.prefill, cluster.decode
        handed_over = await answer(first)
        num_pages = (len(handed_over.prompt_ids) - 1) // PAGE
        assert num_pages > 4
        names = prefill.core._hasher("").full_pages(handed_over.prompt_ids[:-1])
        await all_published(prefill, names)
        second_workers = second.worker._workers  # type: ignore[attr-defined]
        await second_workers.refresh()
        pulled = await answer(second)
        assert counted(first, "handovers") == {"landed": 1}
        assert counted(first, "handover_bytes").keys() == {transport}
        assert counted(second, "pulled_pages") == {"": num_pages}
        assert handed_over.prefilled == pulled.prefilled == "remote"
        assert essence(handed_over) == essence(pulled) == essence(expected)
