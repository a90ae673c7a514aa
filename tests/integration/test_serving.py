"""The life of a service: health, errors on the wire, draining, signals, and peers that freeze."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.errors import (
    EngineFault,
    InvalidRequest,
    ModelError,
    PeerUnavailable,
    ResourceExhausted,
    ShuttingDown,
)
from engine.serving.channels import open_channel
from engine.serving.server import CannotListen, Listen, parse_ready_line, ready_line, serve
from engine.serving.status import from_rpc_error
from tests.integration.echo_service import SERVICE, EchoRole

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LOCAL = Listen("127.0.0.1", 0)
PATIENCE_S = 20.0  # for what happens in a moment, except on a machine with other things to do


class Running:
    """A service in this process, and a client's view of it."""

    def __init__(self, role: EchoRole, listen: Listen) -> None:
        self.role = role
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(serve(role, listen, self.stop))

    async def reached(self, event: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while event not in self.role.events:
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, PATIENCE_S)

    def channel(self, purpose: Any = "control") -> grpc.aio.Channel:
        return open_channel(self.role.endpoint, purpose)


@asynccontextmanager
async def running(listen: Listen = LOCAL) -> AsyncIterator[Running]:
    service = Running(EchoRole(), listen)
    try:
        await service.reached("warm")
        async with service.channel() as channel:
            await until_health(channel, SERVICE, SERVING)
        yield service
    finally:
        service.stop.set()
        service.role.may_finish.set()
        await asyncio.wait((service.task,), timeout=PATIENCE_S)


async def health_of(channel: grpc.aio.Channel, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
    status: int = reply.status
    return status


async def until_health(channel: grpc.aio.Channel, name: str, wanted: int) -> None:
    """Watches the health of ``name`` until it is ``wanted``."""
    request = health_pb2.HealthCheckRequest(service=name)
    call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE_S)
    try:
        async for reply in call:
            if reply.status == wanted:
                return
    finally:
        call.cancel()


def unary(channel: grpc.aio.Channel, method: str, request: bytes = b"", **options: Any) -> Any:
    return channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=PATIENCE_S, **options)


def tick(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(f"/{SERVICE}/Tick")(b"")


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


async def test_service_is_not_ready_until_warm_but_alive() -> None:
    role = EchoRole()
    role.may_warm.clear()
    service = Running(role, LOCAL)
    await service.reached("warm")
    async with service.channel() as channel:
        assert await health_of(channel, SERVICE) == NOT_SERVING
        assert await health_of(channel, "") == SERVING
        role.may_warm.set()
        await until_health(channel, SERVICE, SERVING)
        service.stop.set()
    await service.ended()
    assert role.events == ["warm", "drain", "release"]


async def test_draining_service_is_not_ready_but_alive_and_refuses_new_work() -> None:
    async with running() as service, service.channel() as channel:
        call = tick(channel)
        assert await call.read() == b"first"
        service.stop.set()
        await until_health(channel, SERVICE, NOT_SERVING)
        await service.reached("drain")
        assert await health_of(channel, "") == SERVING
        refusal = from_rpc_error(await error_of(unary(channel, "Echo")))
        assert type(refusal) is ShuttingDown
        call.cancel()


async def test_running_stream_finishes_before_the_service_is_released() -> None:
    async with running() as service, service.channel() as channel:
        call = tick(channel)
        assert await call.read() == b"first"
        service.stop.set()
        await service.reached("drain")
        service.role.may_finish.set()
        assert await call.read() == b"last"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        await service.ended()
        assert service.role.events == ["warm", "tick", "drain", "tock", "release"]


async def test_stream_that_outlasts_the_drain_is_cancelled_and_cleaned_up_before_release() -> None:
    async with running(Listen("127.0.0.1", 0, drain_s=0.05)) as service:
        async with service.channel() as channel:
            call = tick(channel)
            assert await call.read() == b"first"
            service.stop.set()
            error = from_rpc_error(await error_of(call.read()))
            assert type(error) is PeerUnavailable
        await service.ended()
        events = ["warm", "tick", "drain", "hand_back", "cancelled", "tock", "release"]
        assert service.role.events == events


async def test_watched_health_check_does_not_hold_up_the_stop() -> None:
    async with running() as service, service.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        service.stop.set()
        await asyncio.wait_for(service.task, 2)
        watch.cancel()


async def test_failed_warm_up_ends_the_service_and_releases() -> None:
    role = EchoRole()
    role.warm_error = ModelError("unknown model 'x'")
    with pytest.raises(ModelError, match="unknown model"):
        await asyncio.wait_for(serve(role, LOCAL, asyncio.Event()), PATIENCE_S)
    assert role.events == ["warm", "release"]


async def test_stop_during_warm_up_interrupts_it_and_releases() -> None:
    role = EchoRole()
    role.may_warm.clear()
    service = Running(role, LOCAL)
    await service.reached("warm")
    service.stop.set()
    await service.ended()
    assert role.events == ["warm", "release"]


async def test_failing_drain_does_not_keep_the_service_from_ending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as service:
        service.role.drain_error = RuntimeError("no")
        service.stop.set()
        await service.ended()
    assert service.role.events == ["warm", "drain", "release"]
    assert "drain failed" in caplog.text


async def test_second_server_on_a_port_is_refused() -> None:
    async with running() as service:
        port = int(service.role.endpoint.rpartition(":")[2])
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port}: in use"):
            await serve(EchoRole(), Listen("127.0.0.1", port), asyncio.Event())


async def test_endpoint_told_to_others_has_the_advertised_host_and_the_real_port() -> None:
    role = EchoRole()
    service = Running(role, Listen("127.0.0.1", 0, advertise_host="localhost"))
    await service.reached("warm")
    assert role.endpoint.startswith("localhost:")
    async with service.channel() as channel:
        assert await unary(channel, "Echo", b"x") == b"x"
    service.stop.set()
    await service.ended()


async def test_endpoint_told_to_others_has_the_advertised_port_of_a_proxy() -> None:
    role = EchoRole()
    service = Running(role, Listen("127.0.0.1", 0, advertise_host="proxy", advertise_port=7))
    await service.reached("warm")
    assert role.endpoint == "proxy:7"
    service.stop.set()
    await service.ended()


async def test_ready_line_tells_role_and_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as service:
        (line,) = capsys.readouterr().out.splitlines()
        assert parse_ready_line(line) == ("echo", service.role.endpoint)
        assert line == ready_line("echo", service.role.endpoint)


@pytest.mark.parametrize("line", ["", "ready", "loading weights now", "ready set go now"])
def test_any_other_line_is_no_ready_line(line: str) -> None:
    assert parse_ready_line(line) is None


async def test_reflection_lists_the_services() -> None:
    async with running() as service, service.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
        names = {each.name async for reply in call for each in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_error_of_a_request_crosses_the_wire_however_long_its_text() -> None:
    async with running() as service, service.channel() as channel:
        failure = await error_of(unary(channel, "Refuse"))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = from_rpc_error(failure)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.allowed) == ("stop", "1 to 256 characters")
    assert error.problem.startswith("one is ßß")


@pytest.mark.parametrize("method", ["Break", "BreakStream", "StrayCancel"])
async def test_bug_becomes_an_incident_number_and_a_traceback_in_the_log(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as service, service.channel() as channel:
        if method == "BreakStream":
            call = channel.unary_stream(f"/{SERVICE}/{method}")(b"", timeout=PATIENCE_S)
            assert await call.read() == b"first"
            failure = await error_of(call.read())
        else:
            failure = await error_of(unary(channel, method))
        assert await unary(channel, "Echo", b"alive") == b"alive"
    error = from_rpc_error(failure)
    assert type(error) is EngineFault
    message, _, incident = str(error).rpartition(" ")
    assert message == "internal error, incident"
    ours = [each for each in caplog.records if each.name.startswith("engine.")]
    (record,) = [each for each in ours if each.levelname == "ERROR"]
    assert vars(record)["fields"] == {"incident": incident, "where": f"EchoRole.{method}"}
    assert record.exc_info


async def test_deadline_of_the_caller_bounds_what_remains() -> None:
    async with running() as service, service.channel() as channel:
        remaining = float(await unary(channel, "Remaining"))
        assert 0 < remaining < PATIENCE_S + 0.5  # gRPC rounds it up
        without = channel.unary_unary(f"/{SERVICE}/Remaining")
        assert float(await without(b"")) == 100.0


@pytest.mark.parametrize(("purpose", "fits"), [("control", False), ("pages", True)])
async def test_only_a_channel_for_pages_takes_large_messages(purpose: str, fits: bool) -> None:
    async with running() as service, service.channel(purpose) as channel:
        assert len(await unary(channel, "Large", b"4000000")) == 4_000_000
        call = unary(channel, "Large", b"8000000")
        if fits:
            assert len(await call) == 8_000_000
        else:
            assert (await error_of(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_compressed_request_is_refused() -> None:
    async with running() as service, service.channel() as channel:
        call = unary(channel, "Echo", b"a" * 10_000, compression=grpc.Compression.Gzip)
        assert (await error_of(call)).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_calls_beyond_the_limit_are_refused_at_once() -> None:
    async with (
        running(Listen("127.0.0.1", 0, max_concurrent_calls=1)) as service,
        service.channel() as channel,
    ):
        call = await admitted_tick(channel)
        error = from_rpc_error(await error_of(unary(channel, "Echo")))
        assert type(error) is ResourceExhausted
        call.cancel()


async def admitted_tick(channel: grpc.aio.Channel) -> Any:
    """The first call that is let in: the cancelled watch of ``running`` may count for a while."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            call = tick(channel)
            with suppress(grpc.aio.AioRpcError):
                assert await call.read() == b"first"
                return call


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """The echo service as a process, and its endpoint."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.echo_service",
        *arguments,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        ready = parse_ready_line(line.decode())
        yield process, ready[1] if ready else ""
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_finishes_the_running_stream_and_exits_0(number: signal.Signals) -> None:
    async with program("0") as (process, endpoint), open_channel(endpoint, "control") as channel:
        call = tick(channel)
        assert await call.read() == b"first"
        process.send_signal(number)
        assert await call.read() == b"last"
        assert await call.read() is grpc.aio.EOF
        output, log = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode == 0, log
        assert output.decode().strip() == "warm,tick,drain,tock,release"
        assert "Traceback" not in log.decode()


async def test_second_signal_exits_at_once() -> None:
    async with (
        program("0", "stubborn") as (process, endpoint),
        open_channel(endpoint, "control") as channel,
    ):
        call = tick(channel)
        assert await call.read() == b"first"
        process.send_signal(signal.SIGTERM)
        await until_health(channel, SERVICE, NOT_SERVING)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 2) == -signal.SIGTERM
        call.cancel()


async def test_busy_port_is_one_clear_line_and_exit_1() -> None:
    async with running() as service:
        port = service.role.endpoint.rpartition(":")[2]
        async with program(port) as (process, _):
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 1
            _, log = await process.communicate()
    (line,) = [each for each in log.decode().splitlines() if " ERROR echo " in each]
    assert f"cannot listen on 127.0.0.1:{port}: in use" in line
    assert "Traceback" not in log.decode()


async def test_killed_peer_is_noticed_at_once() -> None:
    async with program("0") as (process, endpoint), open_channel(endpoint, "control") as channel:
        call = tick(channel)
        assert await call.read() == b"first"
        process.kill()
        error = from_rpc_error(await asyncio.wait_for(error_of(call.read()), 2))
        assert type(error) is PeerUnavailable


async def test_frozen_peer_is_noticed_within_five_seconds() -> None:
    async with program("0") as (process, endpoint), open_channel(endpoint, "control") as channel:
        call = tick(channel)
        assert await call.read() == b"first"
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        error = from_rpc_error(await asyncio.wait_for(error_of(call.read()), 10))
        assert type(error) is PeerUnavailable
        assert time.monotonic() - began < 5
