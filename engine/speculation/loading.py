"""What drafts, by the mode that was asked for: another model, or a head trained for the target."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from engine.errors import ModelError
from engine.model import Model
from engine.model.load import LoadedModel, load_draft
from engine.modes import DEFAULT_DRAFT_WEIGHTS
from engine.progress import ProgressSink
from engine.speculation.draft_head import HeadWeights, read_head

Drafter = Model | HeadWeights

HEADS = Path(__file__).with_name("heads")
"""The heads that come with the package; each says of which model it was made."""


def load_drafter(
    mode: str,
    target: LoadedModel,
    draft: str = "",
    weights: str = DEFAULT_DRAFT_WEIGHTS,
    progress: ProgressSink | None = None,
) -> Drafter | None:
    """None where the mode drafts without. ``draft`` is the name or path of a model ("model";
    without one it is the target itself in other ``weights``) or the path of a head ("head" and
    "auto"; without one it is what comes with the package for the target, if any does). Raises
    ModelError."""
    if mode == "model":
        return load_draft(target, draft, weights, progress)
    if mode not in ("head", "auto"):
        return None
    path = Path(draft) if draft else packaged_head(target.model.spec.digest)
    if path is None and mode == "auto":
        return None
    if path is None:
        raise ModelError(
            f"no draft head comes with {target.name}; `quire draft train` makes one for --draft"
        )
    return read_head(path)


def packaged_head(model_digest: str) -> Path | None:
    """The head that was made of the model with this digest."""
    for path in sorted(HEADS.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("model") == model_digest:
                return path
    return None
