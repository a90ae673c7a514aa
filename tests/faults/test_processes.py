"""Processes that die, freeze, stall, or start at the wrong time.

After each: the tokens of one undisturbed engine or a clear error, and every page back on every
worker that lives (the fixture looks).
"""

from __future__ import annotations

import asyncio
import re
import signal
import time

import grpc
import pytest

from engine.completion import Completion, Delta, Finished, StreamItem
from engine.errors import EngineFault
from engine.sampling_params import SamplingParams
from engine.wire import prompt_to_wire
from quire.v1 import inference_pb2_grpc
from tests.faults.fleet import LEASE_S, Fleet, WorkerProcess, eventually, fresh_prompt
from tests.faults.history import OK, Record, observe, violations
from tests.faults.truth import Truth
from tests.integration.streams import KINDS, PROMPT, collected, deltas_of, essence

# The first of them starts all processes; that alone may take a minute where others work too.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=20)
LONG = SamplingParams(temperature=1.0, seed=2, max_tokens=150, ignore_eos=True)


async def generated(fleet: Fleet, prompt: tuple[int, ...], params: SamplingParams) -> Completion:
    async with fleet.client() as client:
        (found,) = await client.generate([prompt], params)
        return found


async def busy(worker: WorkerProcess, num_running: int = 1) -> None:
    """Waits until the worker has that many sequences in its batch."""

    async def has_some() -> bool:
        return (await worker.state()).num_running >= num_running

    await eventually(has_some, f"{worker.name} is busy")


# -- a prefill worker dies or freezes


@pytest.mark.parametrize("place", ["submit", "forward", "chunk", "frame", "committed"])
async def test_a_prefill_worker_killed_anywhere_in_a_handover_changes_no_token(
    fleet: Fleet, truth: Truth, place: str
) -> None:
    """Queued, computing, between two chunks, between two pages, committed and not acknowledged."""
    prompt = fresh_prompt(600)
    for worker in fleet.prefill:
        worker.arm(place, "kill")
    found = await generated(fleet, prompt, PARAMS)
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    assert sum(not worker.alive for worker in fleet.prefill) == 1


@pytest.mark.parametrize("leases", [0.5, 1.5, 5.0])
async def test_a_prefill_worker_frozen_in_a_transfer_changes_no_token(
    fleet: Fleet, truth: Truth, leases: float
) -> None:
    """Short of the lease or beyond it; when it wakes, what it still sends has no effect."""
    prompt = fresh_prompt(600)
    for worker in fleet.prefill:
        worker.arm("frame", "stop")
    work = asyncio.create_task(generated(fleet, prompt, PARAMS))
    (frozen,) = await eventually_frozen(fleet.prefill)
    await asyncio.sleep(leases * LEASE_S)  # the time itself is tested
    frozen.thaw()
    found = await work
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    again = await generated(fleet, prompt, PARAMS)
    assert again.token_ids == found.token_ids


async def test_a_prefill_worker_that_stays_frozen_costs_seconds_not_a_minute(
    fleet: Fleet, truth: Truth
) -> None:
    prompt = fresh_prompt(600)
    for worker in fleet.prefill:
        worker.arm("frame", "stop")
    began = time.monotonic()
    found = await generated(fleet, prompt, PARAMS)
    assert time.monotonic() - began < 15
    assert found.prefilled == "local"
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    (frozen,) = await eventually_frozen(fleet.prefill)
    frozen.thaw()


async def eventually_frozen(workers: list[WorkerProcess]) -> list[WorkerProcess]:
    """The workers that the kernel says are stopped, as soon as there are any."""
    stopped: list[WorkerProcess] = []

    async def look() -> bool:
        stopped[:] = [worker for worker in workers if worker.frozen]
        return bool(stopped)

    await eventually(look, "a worker is frozen")
    return stopped


# -- a decode worker dies, stalls, or leaves


async def test_a_decode_worker_killed_in_the_middle_costs_no_stream_a_token(
    fleet: Fleet, truth: Truth
) -> None:
    dying, living = fleet.decode
    requests = [(fresh_prompt(), LONG) for _ in range(3)]
    for worker in fleet.decode:
        worker.pace(0.005)
    broken: list[Record] = []
    whole: list[Record] = []
    async with fleet.client([dying]) as doomed, fleet.client([living]) as safe:
        async with asyncio.TaskGroup() as group:
            for prompt, params in requests:
                group.create_task(observe(doomed, prompt, params, 60.0, broken))
                group.create_task(observe(safe, prompt, params, 60.0, whole))
            await tokens_came(broken, 3)
            dying.kill()
    reference = await truth.of(requests)
    assert violations(broken + whole, reference) == []
    assert {record.outcome for record in whole} == {OK}
    assert {record.outcome for record in broken} == {OK}


async def broken_after(
    fleet: Fleet, worker: WorkerProcess, params: SamplingParams, num_deltas: int
) -> tuple[list[StreamItem], int]:
    """A stream that began at ``worker``, killed when its caller had so many deltas; and how many
    tokens it was resumed with."""
    others = [each for each in fleet.decode if each is not worker]
    items: list[StreamItem] = []
    async with fleet.client([worker, *others]) as client:
        async for item in client.items(PROMPT, params):
            items.append(item)
            if len(items) == num_deltas + 1:  # the first one is Started
                worker.kill()
    assert isinstance(items[-1], Finished)
    return items, items[-1].usage.resumed_tokens


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["greedy", "penalties", "three choices", "logprobs"])
async def test_killed_at_every_token_index_a_stream_goes_on_as_unbroken(
    fleet: Fleet, truth: Truth, kind: str
) -> None:
    params = KINDS[kind]
    expected = await truth.items(PROMPT, params)
    num_deltas = sum(isinstance(item, Delta) for item in expected)
    for index in range(num_deltas):
        await fleet.whole()
        worker = fleet.decode[index % len(fleet.decode)]
        worker.pace(0.1)  # time to kill it before it says more
        found, resumed = await broken_after(fleet, worker, params, index)
        for choice in range(params.n):
            assert deltas_of(found, choice) == deltas_of(expected, choice), index
        whole, other = (collected(items, params).completions() for items in (found, expected))
        assert essence(whole) == essence(other), index
        assert index <= resumed < num_deltas, (index, resumed)


async def test_a_decode_worker_killed_before_a_stream_has_begun_costs_it_nothing(
    fleet: Fleet, truth: Truth
) -> None:
    dying, living = fleet.decode
    dying.arm("submit", "kill")
    async with fleet.client([dying, living]) as client:
        found = [item async for item in client.items(PROMPT, KINDS["sampled"])]
    assert not dying.alive
    whole, other = (
        collected(items, KINDS["sampled"]).completions()
        for items in (found, await truth.items(PROMPT, KINDS["sampled"]))
    )
    assert essence(whole) == essence(other)
    assert whole[0].usage.resumed_tokens == 0


async def tokens_came(records: list[Record], num_records: int) -> None:
    async def look() -> bool:
        return sum(len(record.deltas) > 2 for record in records) >= num_records

    await eventually(look, "streams have tokens")


async def test_a_decode_worker_killed_in_a_handover_leaves_no_page_behind(
    fleet: Fleet, truth: Truth
) -> None:
    dying = fleet.decode[0]
    dying.arm("landing", "kill")
    request = (fresh_prompt(600), PARAMS)
    history: list[Record] = []
    async with fleet.client([dying]) as client:
        await observe(client, *request, 60.0, history)
    assert not dying.alive
    assert violations(history, await truth.of([request])) == []
    assert history[0].outcome == OK
    await fleet.balanced()


async def test_a_stall_of_three_seconds_under_the_interpreters_lock_holds_up_nobody_else(
    fleet: Fleet, truth: Truth
) -> None:
    stalled, other = fleet.decode
    requests = [(fresh_prompt(), PARAMS) for _ in range(2)]
    stalled.arm("forward", "stall 3")
    held: list[Record] = []
    free: list[Record] = []
    async with fleet.client([stalled]) as first, fleet.client([other]) as second:
        work = asyncio.create_task(observe(first, *requests[0], 60.0, held))
        await eventually_disarmed(stalled, "forward")
        await observe(second, *requests[1], 60.0, free)
        await work
    assert violations(held + free, await truth.of(requests)) == []
    assert [held[0].outcome, free[0].outcome] == [OK, OK]
    assert free[0].ended < held[0].ended


async def eventually_disarmed(worker: WorkerProcess, place: str) -> None:
    async def look() -> bool:
        return not worker.armed(place)

    await eventually(look, f"{worker.name} was at {place}")


async def test_sigterm_under_load_fails_no_request(fleet: Fleet, truth: Truth) -> None:
    leaving = fleet.decode[0]
    leaving.pace(0.005)
    requests = [(fresh_prompt(), LONG) for _ in range(8)]
    history: list[Record] = []
    async with fleet.client([leaving]) as client:
        async with asyncio.TaskGroup() as group:
            for prompt, params in requests:
                group.create_task(observe(client, prompt, params, 60.0, history))
            await tokens_came(history, 8)
            leaving.send(signal.SIGTERM)
            await eventually_refused(leaving)
    assert violations(history, await truth.of(requests)) == []
    assert {record.outcome for record in history} == {OK}
    assert await leaving.ended() == 0


async def eventually_refused(leaving: WorkerProcess) -> None:
    """The worker drains, and takes nothing new."""

    async def said_so() -> bool:
        return "draining" in leaving.log.rpartition("serving")[2]

    await eventually(said_so, f"{leaving.name} drains")
    async with leaving.channel() as channel:
        request = prompt_to_wire(fresh_prompt())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request).read()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_second_sigterm_ends_a_worker_at_once(fleet: Fleet, truth: Truth) -> None:
    leaving = fleet.decode[0]
    leaving.pace(0.05)
    history: list[Record] = []
    request = (fresh_prompt(), LONG)
    async with fleet.client([leaving]) as client:
        work = asyncio.create_task(observe(client, *request, 60.0, history))
        await tokens_came(history, 1)
        leaving.send(signal.SIGTERM)
        await eventually_refused(leaving)
        leaving.send(signal.SIGTERM)
        assert await leaving.ended(5.0) == -signal.SIGTERM
        await work
    assert violations(history, await truth.of([request])) == []
    assert history[0].outcome == OK


async def test_sigterm_during_aborts_is_obeyed(fleet: Fleet) -> None:
    leaving = fleet.decode[0]
    leaving.pace(0.005)
    history: list[Record] = []
    async with fleet.client([leaving]) as client:
        tasks = [
            asyncio.create_task(observe(client, fresh_prompt(), LONG, 60.0, history))
            for _ in range(16)
        ]
        await tokens_came(history, 16)
        for task in tasks:
            task.cancel()
        leaving.send(signal.SIGTERM)
        assert await leaving.ended() == 0
        await asyncio.gather(*tasks, return_exceptions=True)


# -- errors inside, and starting


async def test_an_exception_inside_a_step_ends_one_request_and_no_process(
    fleet: Fleet, truth: Truth
) -> None:
    worker = fleet.decode[0]
    prompt = fresh_prompt()
    worker.arm("forward", "raise planted")
    async with fleet.client([worker]) as client:
        with pytest.raises(EngineFault):
            await client.generate([fresh_prompt()], PARAMS)
        (found,) = await client.generate([prompt], PARAMS)
    assert worker.alive
    assert found.token_ids == await truth.tokens(prompt, PARAMS)


async def test_a_second_worker_on_a_port_is_refused_in_clear_words(fleet: Fleet) -> None:
    first = fleet.decode[0]
    second = await fleet.add("decode")
    second.link.target = first.port
    second.start()
    assert await second.ended() == 1
    assert re.search(rf"cannot listen on 127\.0\.0\.1:{first.port}: in use", second.log)
    assert "Traceback" not in second.log
    await fleet.remove(second)


async def test_workers_that_start_before_redis_serve_at_once_and_find_each_other_later(
    fleet: Fleet, truth: Truth
) -> None:
    worker = fleet.decode[0]
    prompt = fresh_prompt()
    worker.kill()
    await worker.redis.refuse()
    worker.start()
    await worker.ready()
    async with fleet.client([worker]) as client:
        (found,) = await client.generate([prompt], PARAMS)
    assert found.prefilled == "local"
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    await worker.redis.heal()
    await fleet.hands_over(worker)
