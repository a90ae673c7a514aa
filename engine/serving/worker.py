"""What both services share: a loaded model, its engine, the page index, a way in and out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

import grpc

from engine.admission import Capacity
from engine.core import EngineCore
from engine.errors import InvalidRequest, ShuttingDown
from engine.mailbox import AsyncEngine
from engine.model.load import LoadedModel, load_model
from engine.progress import default_progress
from engine.registration import Registration
from engine.serving.admin import AdminServicer
from engine.serving.late_handlers import LateHandlers
from engine.serving.leases import Leases
from engine.serving.pages import PageServicer, lent_name
from engine.serving.settings import WorkerSettings
from engine.speculation import Drafter
from engine.telemetry.logs import fields
from engine.telemetry.metrics import Load, Metrics, MetricsServer
from engine.telemetry.tracing import setup_tracing
from kvstore.index import PageIndex, WorkerLoad, WorkerRecord, WorkerRole
from kvstore.index.memory import MemoryPageIndex
from kvstore.ledger import PageState
from kvstore.transports import TransportUnavailable
from kvstore.transports.choice import Transports, open_memory
from quire.v1 import admin_pb2_grpc, page_service_pb2_grpc

BOOT_ID_BYTES = 16
ADMIN_SERVICE = "quire.v1.AdminService"
PAGE_SERVICE = "quire.v1.PageService"
log = logging.getLogger(__name__)


class Worker(ABC):
    """One worker process; a ``Role`` for ``engine.serving.server.serve``.

    ``request_stop`` ends the service as a signal would.
    """

    name: WorkerRole
    main_service: str

    def __init__(self, settings: WorkerSettings, request_stop: Callable[[], None]) -> None:
        self.settings = settings
        self.boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self.metrics = Metrics()
        self.state = "starting"
        self.broken = False
        self.engine: AsyncEngine
        self._transports: Transports | None = None
        self.index: PageIndex = _open_index(settings.redis)
        self.page_leases = Leases(settings.page_lease_s, time.monotonic)
        self._request_stop = request_stop
        self._handlers = LateHandlers(self.service_names)
        self._tasks: list[asyncio.Task[None]] = []
        self._registration: Registration | None = None
        self._metrics_server: MetricsServer | None = None
        self._end_tracing = setup_tracing(
            f"quire-{self.name}",
            boot_id=self.boot_id.hex(),
            otlp_endpoint=settings.otlp_endpoint or None,
            trace_file=settings.trace_file,
        )

    @property
    def service_names(self) -> tuple[str, ...]:
        return (self.main_service, PAGE_SERVICE, ADMIN_SERVICE)

    @property
    def transports(self) -> Transports:
        """How pages come and go; once the model is loaded."""
        assert self._transports is not None
        return self._transports

    @abstractmethod
    def install(self, loaded: LoadedModel, capacity: Capacity, handlers: LateHandlers) -> None:
        """Adds the role's own servicers; ``self.engine`` runs."""

    def drafter(self, loaded: LoadedModel) -> Drafter | None:
        """What drafts for the loaded model, if the role drafts. Raises ModelError."""
        return None

    @abstractmethod
    def queued_tokens(self) -> int:
        """Prompt tokens waiting or in progress here."""

    def callers(self) -> set[str]:
        """Names under which pages are held that a request or lease here still answers for."""
        return self.engine.callers | set(map(lent_name, self.page_leases.names))

    @abstractmethod
    async def close(self) -> None:
        """Ends what ``install`` began."""

    def register(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((self._handlers,))

    async def warm(self, endpoint: str) -> None:
        settings = self.settings
        loaded = await asyncio.to_thread(
            load_model,
            settings.model,
            weights=settings.weights,
            kv=None if settings.kv == "auto" else settings.kv,
            progress=default_progress(),
        )
        core = await self._core(loaded, await asyncio.to_thread(self.drafter, loaded))
        self.engine = AsyncEngine(core, self._engine_broke)
        self.engine.start()
        capacity = Capacity.of(loaded.model.spec, settings.core.num_pages, settings.page_size)
        self._registration = Registration(self.index, self.engine, lambda: self._record(endpoint))
        admin = AdminServicer(
            self.engine,
            self.name,
            state=lambda: self.state,
            drain=self._request_stop,
            callers=self.callers,
            index_reachable=lambda: self._registration is not None and self._registration.reachable,
        )
        self._watch()
        self.install(loaded, capacity, self._handlers)
        self._lend_pages()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._handlers)  # type: ignore[arg-type]
        self.state = "serving"
        await self._registration.beat(all_pages=True)
        self.spawn(self._registration.run())
        self.spawn(self._registration.tell_news())
        log.info(
            "loaded",
            extra=fields(
                model=loaded.model.spec.name,
                fingerprint=core.fingerprint.digest.hex(),
                pages=settings.core.num_pages,
                tokens=settings.core.num_pages * settings.page_size,
            ),
        )

    async def _core(self, loaded: LoadedModel, draft: Drafter | None) -> EngineCore:
        """The engine over memory that the transports asked for can use, and these transports."""
        wanted, size = self.settings.transports, self.settings.core
        layout = loaded.model.spec.page_layout(size.page_size)
        try:
            memory = open_memory(layout, size.num_pages, wanted)
            self._transports = await Transports.start(wanted, memory, self.boot_id)
        except TransportUnavailable as error:
            raise InvalidRequest("transports", str(error), "auto, or what can be had") from None
        log.info("transports", extra=fields(offered=",".join(self.transports.names)))
        token_bytes = loaded.tokenizer.token_bytes
        return EngineCore(loaded.model, token_bytes, size, self.boot_id, memory=memory, draft=draft)

    async def drain(self, timeout_s: float) -> None:
        self.state = "draining"
        if self._registration is not None and not self.broken:  # a broken engine answers nobody
            await self._registration.beat()
            await self.page_leases.wait_ended()

    def hand_back(self) -> None:
        self.engine.end_all(ShuttingDown("the service ends; another one may go on"))

    async def release(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._registration is not None:
            await self.close()
            await self._registration.leave()
            await self.engine.stop()
        if self._transports is not None:
            await self._transports.close()
        await self.index.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        await asyncio.to_thread(self._end_tracing)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` until the worker is released; if it fails, so does the worker."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    async def _record(self, endpoint: str) -> WorkerRecord:
        core = self.engine.core
        scheduler = core.scheduler
        return WorkerRecord(
            boot_id=self.boot_id.hex(),
            role=self.name,
            endpoint=endpoint,
            fingerprint=core.fingerprint.digest.hex(),
            model=core.model.spec.name,
            load=WorkerLoad(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                queued_tokens=self.queued_tokens(),
                free_pages=core.pool.num_available,
                total_pages=core.pool.num_pages,
            ),
            state="draining" if self.state == "draining" else "serving",
            layout=core.fingerprint,
        )

    def _lend_pages(self) -> None:
        servicer = PageServicer(
            self.engine,
            self.name,
            self.page_leases,
            self.transports,
            self.metrics,
            draining=lambda: self.state != "serving",
        )
        page_service_pb2_grpc.add_PageServiceServicer_to_server(servicer, self._handlers)  # type: ignore[arg-type]
        self.spawn(self.page_leases.reap())

    def _watch(self) -> None:
        core = self.engine.core

        def load() -> Load:
            pages = {str(state): core.pool.ledger.count(state) for state in PageState}
            pages["swapped"] = core.scheduler.swap.num_held
            return Load(
                num_running=core.scheduler.num_running,
                num_waiting=core.scheduler.num_waiting,
                pages=pages,
                totals=asdict(core.totals),
                drafts=() if core.speculator is None else core.speculator.all_stats,
            )

        self.metrics.watch(load)
        if self.settings.metrics_port >= 0:
            self._metrics_server = MetricsServer(
                self.metrics, self.settings.host, self.settings.metrics_port
            )
            log.info("metrics", extra=fields(port=self._metrics_server.port))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """Without its heartbeats or reaper a worker would live on half dead, and nobody know."""
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed", exc_info=task.exception())
            self._engine_broke()

    def _engine_broke(self) -> None:
        """The engine's state is unknown: let a supervisor start another process."""
        self.broken = True
        self._request_stop()


def _open_index(url: str) -> PageIndex:
    if not url:
        return MemoryPageIndex()
    from kvstore.index.redis import RedisPageIndex

    return RedisPageIndex(url)
