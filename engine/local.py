"""``LocalEngine``: the whole engine in one process, without network; the oracle of all else."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import TypedDict, Unpack

from engine.admission import Capacity
from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import StreamItem, Waiting
from engine.core import CoreSettings, EngineCore
from engine.mailbox import AsyncEngine
from engine.model.load import LoadedModel, load_model
from engine.modes import DEFAULT_DRAFT_WEIGHTS, DEFAULT_WEIGHTS
from engine.progress import ProgressSink
from engine.prompts import Prompt, encode_prompt
from engine.request import Request
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.speculation import Drafter, load_drafter

DEFAULT_POOL_TOKENS = 16384
BOOT_ID_BYTES = 16


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of both engines.

    ``weights`` and ``kv`` are named as in ``engine.modes``, which has the defaults.
    ``pool_tokens`` is the KV pool's size in tokens, ``page_size`` tokens per page. ``speculate`` is
    one of ``engine.modes.SPECULATION_MODES``: it changes no token. With "model" the model ``draft``
    proposes, or the same model; its weights in the mode ``draft_weights``. With "head" the head in
    the file ``draft`` does.
    """

    weights: str
    kv: str | None
    progress: ProgressSink | None
    pool_tokens: int
    page_size: int
    limits: SchedulerLimits
    check_pages: bool
    speculate: str
    draft: str
    draft_weights: str


class AsyncLocalEngine(AsyncClient):
    """Runs requests in this process. Made inside a running event loop, which it belongs to."""

    def __init__(
        self, model: str | LoadedModel = "smollm2", **options: Unpack[EngineOptions]
    ) -> None:
        loaded = _loaded(model, options)
        page_size = options.get("page_size", 32)
        settings = CoreSettings(
            num_pages=-(-options.get("pool_tokens", DEFAULT_POOL_TOKENS) // page_size),
            page_size=page_size,
            limits=options.get("limits", SchedulerLimits()),
            check_pages=options.get("check_pages", False),
            speculate=options.get("speculate", "off"),
        )
        boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self.tokenizer = loaded.tokenizer
        self.capacity = Capacity.of(loaded.model.spec, settings.num_pages, page_size)
        core = EngineCore(
            loaded.model,
            loaded.tokenizer.token_bytes,
            settings,
            boot_id,
            draft=_drafter(loaded, options),
        )
        self.engine = AsyncEngine(core)
        self.engine.start()

    async def items(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar] = ()
    ) -> AsyncGenerator[StreamItem, None]:
        prompt_ids = encode_prompt(prompt, self.tokenizer)
        request = Request(prompt_ids, params, self.capacity, resume=tuple(resume))
        items = request.stream(self.engine)
        try:
            async for item in items:
                if not isinstance(item, Waiting):
                    yield item
        finally:
            await items.aclose()

    async def close(self) -> None:
        await self.engine.stop()


class LocalEngine(BlockingClient):
    """The blocking twin of ``AsyncLocalEngine``; same arguments."""

    def __init__(
        self, model: str | LoadedModel = "smollm2", **options: Unpack[EngineOptions]
    ) -> None:
        loaded = _loaded(model, options)

        async def start() -> AsyncLocalEngine:
            return AsyncLocalEngine(loaded, **options)

        loop = LoopThread("local-engine")
        self.local = loop.run(start())
        super().__init__(loop, self.local)


def _drafter(loaded: LoadedModel, options: EngineOptions) -> Drafter | None:
    return load_drafter(
        options.get("speculate", "off"),
        loaded,
        options.get("draft", ""),
        options.get("draft_weights", DEFAULT_DRAFT_WEIGHTS),
        options.get("progress"),
    )


def _loaded(model: str | LoadedModel, options: EngineOptions) -> LoadedModel:
    if not isinstance(model, str):
        return model
    return load_model(
        model,
        weights=options.get("weights", DEFAULT_WEIGHTS),
        kv=options.get("kv"),
        progress=options.get("progress"),
    )
