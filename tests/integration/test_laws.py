"""The nine laws of the design, each by a test of its name; other files test what follows."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from engine.completion import Completion
from engine.errors import EngineFault
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel, load_model
from engine.plan import PlannedRows
from engine.ragged_rows import ragged_batch
from engine.recording import replay
from engine.sampling_params import SamplingParams
from kernels.ragged import RaggedBatch
from kernels.threads import configured_threads, set_num_threads
from kvstore.memory import PageMemory
from quire.v1 import prefill_pb2
from tests.integration.cluster import running

PROMPT = list(range(1, 200))
PAGES = 8


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


MODES = ["fp32/fp32", "bf16/bf16", "int8/bf16", "int8/int8", "int4/bf16", "int4/int8"]


@pytest.fixture(scope="module", params=MODES)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """The real model in every weight mode and every KV mode."""
    weights, kv = request.param.split("/")
    return load_model("smollm2", weights=weights, kv=kv)


class Bench:
    """A model over fresh pages; every row's logits are asked for."""

    def __init__(self, loaded: LoadedModel, num_sequences: int = 1, pages: int = PAGES) -> None:
        self.model = loaded.model
        self.layout = loaded.model.spec.page_layout(32)
        self.memory = PageMemory(self.layout, pages * num_sequences)
        self.pages = pages

    def run(self, *parts: tuple[int, int, Sequence[int]]) -> list[torch.Tensor]:
        """One step of (sequence, start, tokens) each; the logits ``[rows, vocab]`` of each."""
        rows = [
            PlannedRows(
                name=str(sequence),
                start=start,
                tokens=tuple(tokens),
                pages=tuple(range(sequence * self.pages, (sequence + 1) * self.pages)),
                wants_logits=True,
            )
            for sequence, start, tokens in parts
        ]
        batch = ragged_batch(rows)
        everything = RaggedBatch(
            batch.token_ids,
            batch.positions,
            batch.query_starts,
            batch.page_tables,
            np.arange(batch.num_rows),
        )
        logits = self.model.forward(everything, self.memory.kv, self.layout)
        return list(logits.split([len(tokens) for _, _, tokens in parts]))


LONG = [(7 * number * number + 11 * number) % 49_000 for number in range(650)]


def test_law_1_a_row_has_the_same_bits_however_it_was_reached(model: LoadedModel) -> None:
    """By prefill in one, in chunks, by decode, and as the third of five verification rows."""
    (whole,) = Bench(model, pages=21).run((0, 0, LONG))
    chunked = Bench(model, pages=21)
    for start, end in ((0, 1), (1, 17), (17, 117), (117, 629)):
        (part,) = chunked.run((0, start, LONG[start:end]))
        assert torch.equal(part, whole[start:end])
    for position in range(629, 632):
        (row,) = chunked.run((0, position, LONG[position : position + 1]))
        assert torch.equal(row[0], whole[position])
    (verified,) = chunked.run((0, 632, LONG[632:637]))
    assert torch.equal(verified[2], whole[634])


@pytest.mark.parametrize(("others", "place"), [(1, 0), (6, 3), (64, 64)])
def test_law_1_a_row_has_the_same_bits_in_any_company(
    model: LoadedModel, others: int, place: int
) -> None:
    tokens = PROMPT[:40]
    (alone,) = Bench(model, pages=2).run((0, 0, tokens))
    bench = Bench(model, others + 1, pages=2)
    parts = [(number, 0, LONG[number : number + 1 + number % 40]) for number in range(others + 1)]
    parts[place] = (place, 0, tokens)
    assert torch.equal(bench.run(*parts)[place], alone)


def test_law_1_a_row_has_the_same_bits_under_any_number_of_threads(model: LoadedModel) -> None:
    results = []
    try:
        for threads in (1, 2, 3, 2):
            set_num_threads(threads)
            results.append(Bench(model).run((0, 0, PROMPT[:150]))[0])
    finally:
        set_num_threads(configured_threads())
    assert all(torch.equal(result, results[0]) for result in results)


def test_law_1_a_row_has_the_same_bits_while_a_core_is_kept_busy(model: LoadedModel) -> None:
    (quiet,) = Bench(model).run((0, 0, PROMPT[:150]))
    core = max(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            (disturbed,) = Bench(model).run((0, 0, PROMPT[:150]))
        finally:
            busy.kill()
    assert torch.equal(disturbed, quiet)


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [each.token_ids for each in completions]


async def test_law_2_a_token_depends_on_its_own_request_only() -> None:
    """64 requests in one batch, in two orders, and one by one."""
    params = [SamplingParams(seed=seed, max_tokens=6) for seed in range(64)]
    prompts = [PROMPT[: 1 + seed % 50] for seed in range(64)]
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        together = tokens_of(await engine.generate(prompts, params))
        backwards = tokens_of(await engine.generate(prompts[::-1], params[::-1]))
        single = [
            tokens_of(await engine.generate([prompt], each))[0]
            for prompt, each in zip(prompts, params, strict=True)
        ]
    assert together == backwards[::-1] == single


async def test_law_2_a_request_without_a_seed_is_told_the_one_it_got() -> None:
    async with AsyncLocalEngine("hash") as engine:
        (first,) = await engine.generate(["x"], SamplingParams(max_tokens=20))
        again = SamplingParams(max_tokens=20, seed=first.seed)
        assert tokens_of(await engine.generate(["x"], again)) == [first.token_ids]
        (other,) = await engine.generate(["x"], SamplingParams(max_tokens=20))
    assert other.seed != first.seed


async def test_law_3_prefill_builds_pages_and_makes_no_token(redis_url: str) -> None:
    fields = set(prefill_pb2.PrefillRequest.DESCRIPTOR.fields_by_name)
    assert not fields & {"sampling", "temperature", "seed", "max_tokens"}
    async with running(redis_url) as cluster, cluster.client() as client:
        wanted: list[int] = []
        model = cluster.prefill[0].model._model
        forward = model.forward

        def watched(batch: RaggedBatch, kv: torch.Tensor, layout: object) -> torch.Tensor:
            wanted.append(len(batch.logit_rows))
            return forward(batch, kv, layout)  # type: ignore[arg-type]

        model.forward = watched  # type: ignore[method-assign]
        await client.generate([PROMPT], SamplingParams(temperature=0, max_tokens=2))
        assert wanted
        assert set(wanted) == {0}


async def test_law_4_a_slot_given_to_another_has_another_generation_and_name() -> None:
    async with AsyncLocalEngine("hash", page_size=16, pool_tokens=48) as engine:
        core = engine.engine.core
        seen = set()
        for start in (0, 50):
            await engine.generate(
                [PROMPT[start : start + 40]], SamplingParams(temperature=0, max_tokens=2)
            )
            record = core.pool.ledger[0]
            seen.add((record.generation, record.prefix_hash))
            core.pool.clear_cache()
    assert len({generation for generation, _ in seen}) == 2
    assert len({name for _, name in seen}) == 2


async def test_law_5_pages_add_up_after_every_step_whatever_happens() -> None:
    """``check_pages`` checks the ledger after each step of a run full of cancellations."""
    async with AsyncLocalEngine("hash", page_size=16, pool_tokens=512, check_pages=True) as engine:

        async def some(number: int) -> None:
            params = SamplingParams(seed=number, max_tokens=200, ignore_eos=True)
            stream = engine.stream(PROMPT[: 20 + number], params)
            for _ in range(3 + 7 * number % 40):
                await anext(stream)
            await stream.aclose()

        await asyncio.gather(*[some(number) for number in range(24)])
        pool = engine.engine.core.pool

        async def empty() -> bool:
            return await engine.engine.call(lambda core: core.scheduler.num_sequences == 0)

        async with asyncio.timeout(20):
            while not await empty():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert pool.ledger.num_free + pool.num_idle == pool.num_pages


async def test_law_6_redis_is_never_on_the_path_of_a_token(redis_url: str) -> None:
    """However many tokens a request makes, it costs Redis the same, and no value is a page."""

    def calls(client: redis.Redis) -> int:
        stats = client.info("commandstats")
        names = re.compile(r"cmdstat_(eval|evalsha|fcall|hset|hget|set|get|del|expire).*")
        return sum(value["calls"] for name, value in stats.items() if names.match(name))  # type: ignore[union-attr]

    async with running(redis_url) as cluster, cluster.client() as client:
        await client.generate([PROMPT[25:]], SamplingParams(max_tokens=1))  # sends the scripts
        await cluster.decode[0].worker._desk.close()  # type: ignore[attr-defined]
        for node in cluster.nodes:
            for task in node.worker._tasks:
                task.cancel()  # no heartbeats, no refreshing: what is left is the request's own
            await asyncio.gather(*node.worker._tasks, return_exceptions=True)
        with redis.Redis.from_url(redis_url) as probe:
            costs = []
            for max_tokens in (1, 400):
                params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                before = calls(probe)
                await client.generate([PROMPT[max_tokens // 8 :]], params)
                await cluster.decode[0].worker._desk.close()  # type: ignore[attr-defined]
                costs.append(calls(probe) - before)
            assert costs[0] == costs[1]
            assert 0 < costs[0] <= 8
            page_bytes = cluster.decode[0].core.layout.page_bytes
            for key in probe.scan_iter("*"):
                assert probe.memory_usage(key) < page_bytes  # type: ignore[operator]
                assert probe.ttl(key) > 0  # type: ignore[operator]


async def test_law_7_one_request_fails_and_the_service_does_not(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        cluster.decode[0].model.fail_on = 255
        params = SamplingParams(temperature=0, max_tokens=3)
        fate = await asyncio.gather(
            client.generate([[1, 2, 255]], params),
            client.generate([[1, 2, 3]], params),
            return_exceptions=True,
        )
        assert isinstance(fate[0], EngineFault)
        assert isinstance(fate[1], list)


async def test_law_8_a_step_knows_the_bytes_it_moves(smollm2: LoadedModel) -> None:
    async with AsyncLocalEngine(smollm2) as engine:
        core = engine.engine.core
        await engine.generate([PROMPT[:100]], SamplingParams(temperature=0, max_tokens=3))
        spec = smollm2.model.spec
        weights = 134_515_008 * 4  # the model's parameters in fp32, the tied head counted once
        assert abs(spec.weight_bytes - weights) < 1_000_000
        per_token = 30 * 2 * 3 * 64 * 4
        assert core.last_step.step_bytes == spec.weight_bytes + 102 * per_token
        assert core.totals.steps == 3
        assert core.totals.step_rows == 102


async def test_law_9_a_recorded_run_replays_to_the_same_plans(
    redis_url: str, tmp_path: Path
) -> None:
    """Both services, with preemptions, a handover that fails and clients that leave."""
    files = tmp_path / "prefill.jsonl", tmp_path / "decode.jsonl"
    async with (
        running(
            redis_url, prefill={"record": files[0]}, decode={"record": files[1], "pool_tokens": 512}
        ) as cluster,
        cluster.client() as client,
    ):
        params = [SamplingParams(seed=n, n=1 + n % 2, max_tokens=30) for n in range(12)]
        await client.generate([PROMPT[: 5 + 7 * n] for n in range(12)], params)
        stream = client.stream(PROMPT, SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await cluster.balanced()
    # Prompts that come together share a step of the prefill service; every token has one of decode.
    for file, fewest in zip(files, (1, 30), strict=True):
        answers = list(replay(file))
        assert not any(answers)
        assert len(answers) >= fewest
    assert '"Landed"' in files[1].read_text()
    assert '"ReadsEnded"' in files[0].read_text()
