"""One gRPC server from NOT_SERVING to exit, the same for every service.

    bind, NOT_SERVING -> warm -> SERVING -> [signal or drain request]
        -> NOT_SERVING -> drain: running calls finish, up to drain_s -> what still runs is handed
        back: its callers are told to go on elsewhere -> stop -> release -> exit 0

A second signal ends the process at once. Health under the empty name tells that the process lives
and stays SERVING all the while, so that an orchestrator does not kill what drains; readiness is
told under the names of the services.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.errors import QuireError
from engine.serving.calls import RunningCalls
from engine.serving.options import SERVER_OPTIONS
from engine.telemetry.interceptors import TracingServerInterceptor
from engine.telemetry.logs import fields

_CLEAN_UP_S = 2.0
_HAND_BACK_S = 1.0
_READY = "ready"

log = logging.getLogger(__name__)


class CannotListen(OSError):
    """The address is in use, or not one of this machine."""


class Role(Protocol):
    """What a service brings; ``serve`` does the rest."""

    @property
    def name(self) -> str:
        """``prefill`` or ``decode``."""
        ...

    @property
    def service_names(self) -> tuple[str, ...]:
        """Full names, such as ``quire.v1.InferenceService``, for readiness and reflection."""
        ...

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicers, before the server starts."""
        ...

    async def warm(self, endpoint: str) -> None:
        """Gets ready to serve at ``endpoint``; what it raises ends the service."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuses new work from its first line on, and waits for what outlives a call. Calls in
        progress are waited for by ``serve``; both share ``timeout_s``."""
        ...

    def hand_back(self) -> None:
        """The drain's time is over: ends every call in progress with a status that sends its
        caller elsewhere."""
        ...

    async def release(self) -> None:
        """Gives up what ``warm`` took; also called after a failed or interrupted ``warm``."""
        ...


@dataclass(frozen=True, slots=True)
class Listen:
    """Where and how a service listens.

    Port 0 takes a free one. ``advertise_host`` and ``advertise_port`` are how others reach this
    one, if not by ``host`` (empty) and the port listened on (0).
    Beyond ``max_concurrent_calls`` gRPC refuses calls with RESOURCE_EXHAUSTED, health checks
    included: keep it well above the service's own limits, which refuse with a hint.
    """

    host: str
    port: int
    advertise_host: str = ""
    advertise_port: int = 0
    max_concurrent_calls: int = 4096
    drain_s: float = 30.0


async def serve(role: Role, listen: Listen, stop: asyncio.Event) -> None:
    """Runs one service until ``stop`` is set and everything has ended.

    Prints the ready line once it serves. Raises CannotListen, and what ``role.warm`` raises.
    """
    calls = RunningCalls()
    checks = health.aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=[TracingServerInterceptor(), calls],
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=listen.max_concurrent_calls,
    )
    role.register(server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (*role.service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    endpoint = _bind(server, listen)
    await _tell_readiness(checks, role, ready=False)
    await server.start()
    try:
        if await _finished_before(stop, role.warm(endpoint)):
            await _tell_readiness(checks, role, ready=True)
            print(ready_line(role.name, endpoint), flush=True)
            log.info("serving", extra=fields(role=role.name, endpoint=endpoint))
            await stop.wait()
            await _tell_readiness(checks, role, ready=False)
            await _drain(role, calls, listen.drain_s)
    finally:
        await _stop(server, calls)
        await role.release()
    log.info("stopped", extra=fields(role=role.name))


def run_service(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> int:
    """Runs ``main(stop)`` as this process's one event loop; returns the process's exit code.

    A stop signal sets ``stop``; from then on a second one ends the process at once. An error of
    the world (QuireError, OSError) is one log line and code 1.
    """

    async def stoppable() -> None:
        stop = asyncio.Event()
        with _stopped_by_signals(stop, stop_signals):
            await main(stop)

    try:
        uvloop.run(stoppable())
    except (QuireError, OSError) as error:
        log.error("cannot run", extra=fields(error=type(error).__name__, reason=error))
        return 1
    return 0


def ready_line(role: str, endpoint: str) -> str:
    """What a service prints on standard output once it serves."""
    return f"{_READY} role={role} endpoint={endpoint}"


def parse_ready_line(line: str) -> tuple[str, str] | None:
    """(role, endpoint) of a ready line; None for any other line."""
    words = line.split()
    if len(words) != 3 or words[0] != _READY:
        return None
    return words[1].removeprefix("role="), words[2].removeprefix("endpoint=")


def _bind(server: grpc.aio.Server, listen: Listen) -> str:
    """Binds the server's port; returns the endpoint that others use."""
    try:
        port = server.add_insecure_port(_address(listen.host, listen.port))
    except RuntimeError:
        raise CannotListen(
            f"cannot listen on {_address(listen.host, listen.port)}:"
            " in use, or not an address of this machine"
        ) from None
    return _address(listen.advertise_host or listen.host, listen.advertise_port or port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _tell_readiness(checks: Any, role: Role, *, ready: bool) -> None:
    states = health_pb2.HealthCheckResponse
    for name in role.service_names:
        await checks.set(name, states.SERVING if ready else states.NOT_SERVING)


async def _finished_before(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Runs ``work``, but cancels it if ``stop`` comes first; whether it finished."""
    running = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        return running.done()
    finally:
        for task in (running, stopped):
            task.cancel()
        await asyncio.gather(running, stopped, return_exceptions=True)


async def _drain(role: Role, calls: RunningCalls, drain_s: float) -> None:
    log.info("draining", extra=fields(role=role.name, running=calls.num_running))
    try:
        async with asyncio.timeout(drain_s):
            await role.drain(drain_s)
            await calls.wait_idle()
    except TimeoutError:
        log.warning("drain ran out of time", extra=fields(running=calls.num_running))
        await _hand_back(role, calls)
    except Exception:
        log.exception("drain failed")


async def _hand_back(role: Role, calls: RunningCalls) -> None:
    role.hand_back()
    with suppress(TimeoutError):
        async with asyncio.timeout(_HAND_BACK_S):
            await calls.wait_idle()


async def _stop(server: grpc.aio.Server, calls: RunningCalls) -> None:
    """Ends what still runs, and lets cancelled handlers clean up before their ground is released.

    No grace: the drain is over, and a watched health check would use up any grace there is.
    """
    await server.stop(None)
    try:
        async with asyncio.timeout(_CLEAN_UP_S):
            await calls.wait_idle()
    except TimeoutError:
        log.warning("handlers did not clean up", extra=fields(running=calls.num_running))


@contextmanager
def _stopped_by_signals(
    stop: asyncio.Event, stop_signals: Sequence[signal.Signals]
) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def restore() -> None:
        for number in stop_signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def first() -> None:
        restore()  # the next signal is the kernel's business, even if this loop hangs
        stop.set()

    for number in stop_signals:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        restore()
