"""``python -m prefill_svc``: runs a prefill service."""

from __future__ import annotations

import sys
import time

from engine.admission import Capacity
from engine.config import settings_from_command_line
from engine.model.load import LoadedModel
from engine.serving.late_handlers import LateHandlers
from engine.serving.leases import Leases
from engine.serving.process import run_worker
from engine.serving.worker import Worker
from prefill_svc.config import PrefillSettings
from prefill_svc.servicer import PrefillServicer
from quire.v1 import prefill_pb2_grpc


class PrefillWorker(Worker):
    """The prefill role."""

    name = "prefill"
    main_service = "quire.v1.PrefillService"
    settings: PrefillSettings
    _servicer: PrefillServicer
    _handovers: Leases

    def install(self, loaded: LoadedModel, capacity: Capacity, handlers: LateHandlers) -> None:
        self._handovers = handovers = Leases(self.settings.lease_s, time.monotonic)
        self._servicer = PrefillServicer(
            self.engine,
            capacity,
            self.settings,
            handovers,
            self.callers,
            self.transports,
            self.metrics,
        )
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self._servicer, handlers)  # type: ignore[arg-type]
        self.spawn(handovers.reap())

    def queued_tokens(self) -> int:
        return self._servicer.queued_tokens

    def callers(self) -> set[str]:
        return super().callers() | self._handovers.names

    async def drain(self, timeout_s: float) -> None:
        """Pages that were granted stay until their receiver has them, or their lease is over."""
        self._servicer.draining = True
        await super().drain(timeout_s)
        if not self.broken:
            await self._handovers.wait_ended()

    async def close(self) -> None:
        """Leases that outlive the drain end with the process."""


if __name__ == "__main__":
    settings = settings_from_command_line(PrefillSettings, "quire prefill")
    sys.exit(run_worker(PrefillWorker, settings))
