"""``LocalEngine``: the whole engine in one process, without network; the oracle of all else."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator

from engine.admission import Capacity
from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import StreamItem
from engine.core import CoreSettings, EngineCore
from engine.mailbox import AsyncEngine
from engine.model.load import LoadedModel, load_model
from engine.progress import ProgressSink
from engine.prompts import Prompt, encode_prompt
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits

DEFAULT_POOL_TOKENS = 16384
BOOT_ID_BYTES = 16


class AsyncLocalEngine(AsyncClient):
    """Runs requests in this process. Made inside a running event loop, which it belongs to.

    ``pool_tokens`` is the KV pool's size in tokens; ``kv`` is "fp32" or "bf16" and defaults to what
    suits ``weights``.
    """

    def __init__(
        self,
        model: str | LoadedModel = "smollm2",
        *,
        weights: str = "fp32",
        kv: str | None = None,
        pool_tokens: int = DEFAULT_POOL_TOKENS,
        page_size: int = 32,
        limits: SchedulerLimits | None = None,
        check_pages: bool = False,
        progress: ProgressSink | None = None,
    ) -> None:
        if isinstance(model, str):
            model = load_model(model, weights=weights, kv=kv, progress=progress)
        num_pages = -(-pool_tokens // page_size)
        settings = CoreSettings(num_pages, page_size, limits or SchedulerLimits(), check_pages)
        boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self.tokenizer = model.tokenizer
        self.capacity = Capacity.of(model.model.spec, num_pages, page_size)
        core = EngineCore(model.model, model.tokenizer.token_bytes, settings, boot_id)
        self.engine = AsyncEngine(core)
        self.engine.start()

    async def stream(
        self, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[StreamItem, None]:
        request = Request(encode_prompt(prompt, self.tokenizer), params, self.capacity)
        items = request.stream(self.engine)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def close(self) -> None:
        await self.engine.stop()


class LocalEngine(BlockingClient):
    """The blocking twin of ``AsyncLocalEngine``; same arguments."""

    def __init__(
        self,
        model: str | LoadedModel = "smollm2",
        *,
        weights: str = "fp32",
        kv: str | None = None,
        pool_tokens: int = DEFAULT_POOL_TOKENS,
        page_size: int = 32,
        limits: SchedulerLimits | None = None,
        check_pages: bool = False,
        progress: ProgressSink | None = None,
    ) -> None:
        if isinstance(model, str):
            model = load_model(model, weights=weights, kv=kv, progress=progress)
        loaded = model

        async def start() -> AsyncLocalEngine:
            return AsyncLocalEngine(
                loaded,
                pool_tokens=pool_tokens,
                page_size=page_size,
                limits=limits,
                check_pages=check_pages,
            )

        loop = LoopThread("local-engine")
        self.local = loop.run(start())
        super().__init__(loop, self.local)
