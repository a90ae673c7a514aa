"""``python -m decode_svc``: runs a decode service."""

from __future__ import annotations

import sys
import time

from decode_svc.admission import Admission
from decode_svc.config import DecodeSettings
from decode_svc.decider import Decider
from decode_svc.intake import IntakeDesk
from decode_svc.reader import Reader
from decode_svc.servicer import InferenceServicer
from decode_svc.workers import KnownWorkers
from engine.admission import Capacity
from engine.config import settings_from_command_line
from engine.model.load import LoadedModel
from engine.progress import default_progress
from engine.serving.late_handlers import LateHandlers
from engine.serving.process import run_worker
from engine.serving.worker import Worker
from engine.speculation import Drafter, load_drafter
from quire.v1 import inference_pb2_grpc


class DecodeWorker(Worker):
    """The decode role."""

    name = "decode"
    main_service = "quire.v1.InferenceService"
    settings: DecodeSettings
    _admission: Admission
    _desk: IntakeDesk
    _workers: KnownWorkers

    def drafter(self, loaded: LoadedModel) -> Drafter | None:
        settings = self.settings
        return load_drafter(
            settings.speculate,
            loaded,
            settings.draft,
            settings.draft_weights,
            default_progress(),
        )

    def install(self, loaded: LoadedModel, capacity: Capacity, handlers: LateHandlers) -> None:
        settings = self.settings
        self._admission = Admission(settings.max_requests, settings.max_queued_tokens)
        reader = Reader(self.engine.core.fingerprint, settings.allow_foreign_kv)
        decider = Decider(
            settings.prefill,
            settings.min_remote_tokens,
            self.engine.core.layout.token_bytes,
            time.monotonic,
        )

        def gone(boot_id: bytes) -> None:
            self.transports.forget(boot_id)
            decider.peers.forget(boot_id.hex())

        self._workers = KnownWorkers(self.index, reader, on_gone=gone)
        self._desk = IntakeDesk(
            self.engine,
            self._workers,
            self.transports,
            self.index,
            decider,
            self.metrics,
            settings.handover_idle_s,
        )
        servicer = InferenceServicer(
            self.engine,
            loaded.tokenizer,
            capacity,
            settings,
            self._admission,
            self._desk,
            decider,
            self.index,
            self.metrics,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, handlers)  # type: ignore[arg-type]
        self.spawn(self._workers.keep_fresh())

    def queued_tokens(self) -> int:
        return self._admission.queued_tokens

    async def drain(self, timeout_s: float) -> None:
        self._admission.draining = True
        await super().drain(timeout_s)

    async def close(self) -> None:
        await self._desk.close()
        await self._workers.close()


if __name__ == "__main__":
    settings = settings_from_command_line(DecodeSettings, "quire decode")
    sys.exit(run_worker(DecodeWorker, settings))
