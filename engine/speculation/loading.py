"""What drafts, by the mode that was asked for: another model, or a head trained for the target."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError
from engine.model import Model
from engine.model.load import LoadedModel, load_draft
from engine.modes import DEFAULT_DRAFT_WEIGHTS
from engine.progress import ProgressSink
from engine.speculation.draft_head import HeadWeights, read_head

Drafter = Model | HeadWeights


def load_drafter(
    mode: str,
    target: LoadedModel,
    draft: str = "",
    weights: str = DEFAULT_DRAFT_WEIGHTS,
    progress: ProgressSink | None = None,
) -> Drafter | None:
    """None where the mode drafts without. ``draft`` is the name or path of a model ("model";
    without one it is the target itself in other ``weights``) or the path of a head ("head").
    Raises ModelError."""
    if mode == "model":
        return load_draft(target, draft, weights, progress)
    if mode != "head":
        return None
    if not draft:
        raise ModelError("no draft head is named; `quire draft train` makes one for --draft")
    return read_head(Path(draft))
