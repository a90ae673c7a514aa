"""What drafts, by the mode that was asked for: another model, or a head trained for the target."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError
from engine.model import Model
from engine.model.load import LoadedModel, load_draft
from engine.progress import ProgressSink
from engine.speculation.draft_head import HeadWeights, read_head

HEADS = Path(__file__).with_name("heads")
"""Heads that come with the package, by the name of their model."""

Drafter = Model | HeadWeights


def load_drafter(
    mode: str,
    target: LoadedModel,
    draft: str = "",
    weights: str = "int4",
    progress: ProgressSink | None = None,
) -> Drafter | None:
    """None where the mode drafts without. ``draft`` is the name or path of a model ("model") or the
    path of a head ("head"); without one it is the target itself in other ``weights``, or the head
    that comes with the package. Raises ModelError."""
    if mode == "model":
        return load_draft(target, draft, weights, progress)
    if mode == "head":
        return _load_head(target, draft)
    return None


def _load_head(target: LoadedModel, draft: str) -> HeadWeights:
    path = Path(draft) if draft else HEADS / f"{target.name}.safetensors"
    if not draft and not path.is_file():
        raise ModelError(
            f"no draft head comes with {target.name}; `quire draft train` makes one for --draft"
        )
    return read_head(path)
