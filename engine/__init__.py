"""One way to run a model: sequences, token function, scheduler, step loop, and the clients of it.

``from engine import LocalEngine, RemoteEngine, SamplingParams`` is the public interface; names are
loaded on first use, so that commands which need no torch do not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.chat_template import ChatMessage
    from engine.completion import Completion, Delta, Finished, Started
    from engine.local import AsyncLocalEngine, LocalEngine
    from engine.remote import AsyncRemoteEngine, RemoteEngine
    from engine.sampling_params import SamplingParams

_HOMES = {
    "AsyncLocalEngine": "engine.local",
    "AsyncRemoteEngine": "engine.remote",
    "ChatMessage": "engine.chat_template",
    "Completion": "engine.completion",
    "Delta": "engine.completion",
    "Finished": "engine.completion",
    "LocalEngine": "engine.local",
    "RemoteEngine": "engine.remote",
    "SamplingParams": "engine.sampling_params",
    "Started": "engine.completion",
}

__all__ = [
    "AsyncLocalEngine",
    "AsyncRemoteEngine",
    "ChatMessage",
    "Completion",
    "Delta",
    "Finished",
    "LocalEngine",
    "RemoteEngine",
    "SamplingParams",
    "Started",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
