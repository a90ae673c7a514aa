"""The forms weights and keys and values can be kept in, and which is the default."""

WEIGHT_MODES = ("fp32", "bf16", "int8", "int4")
KV_MODES = ("fp32", "bf16", "int8")
DEFAULT_WEIGHTS = "int8"
"""Near the quality of bf16 at more than twice its speed: ``quire bench quality`` and ``decode``."""


def default_kv(weights: str) -> str:
    return "fp32" if weights == "fp32" else "bf16"


DEFAULT_DRAFT_WEIGHTS = "int4"
SPECULATION_MODES = ("off", "auto", "lookup", "history", "model", "head")
"""Who drafts; "auto" is lookup, and a head for what it finds nothing for, where there is one."""
