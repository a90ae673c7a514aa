"""Scaling of rotary positions, as config.json and GGUF metadata ask for it.

Each reader gives the scaling and the context it is made for: what the model's context becomes where
metadata gives the length before scaling.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.model.fields import count, flag, number
from kernels.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)

Scaled = tuple[RopeScaling | None, int]  # the context is in tokens

_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_HF_FIELDS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",  # says only how the model was made
        }
    ),
}


def rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a config.json, or ``rope_scaling`` as older exports call it."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise ModelError(f"model config: {name} is {reprlib.repr(rope)}, not an object")
        if rope:
            found.append(rope)
    if len(found) > 1 and found[0] != found[1]:
        raise ModelError("model config: rope_parameters and rope_scaling differ")
    return {name: value for name, value in found[0].items() if value is not None} if found else {}


def rope_from_hf(raw: Mapping[str, Any], rope: Mapping[str, Any], max_context: int) -> Scaled:
    """From a config.json and its ``rope_fields``. Raises ModelError."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _HF_FIELDS:
        supported = ", ".join(_HF_FIELDS)
        raise ModelError(f"rope scaling {reprlib.repr(kind)} is not supported; {supported} are")
    unknown = rope.keys() - _HF_FIELDS[kind] - _ALWAYS
    if unknown:
        raise ModelError(f"model config: {min(unknown)} of rope scaling {kind!r} is not supported")
    if kind == "default":
        return None, max_context
    if kind == "linear":
        return _linear(number(rope, "factor"), max_context)
    name = "original_max_position_embeddings"
    original = count({name: raw.get(name) or rope.get(name)}, name, max_context)
    if kind == "llama3":
        return _llama3(rope, original), max_context
    return _yarn_from_hf(rope, original, max_context)


def rope_from_gguf(
    fields: Mapping[str, Any], architecture: str, factors: np.ndarray | None, max_context: int
) -> Scaled:
    """From GGUF metadata and the values of ``rope_freqs.weight``. Raises ModelError."""
    scaling = {
        name.removeprefix(f"{architecture}.rope.scaling."): value for name, value in fields.items()
    }
    factor = scaling.get("factor") or fields.get(f"{architecture}.rope.scale_linear")
    kind = scaling.get("type", "linear" if factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{architecture}.rope.scaling.type {reprlib.repr(kind)} is not supported; "
            "none, linear, yarn are"
        )
    if factors is not None:
        if kind != "none":
            raise ModelError(f"rope_freqs.weight beside rope scaling {kind!r} is not supported")
        return _factors(factors), max_context
    if kind == "none":
        return None, max_context
    factor = number({"rope.scaling.factor": factor}, "rope.scaling.factor")
    if kind == "linear":
        return _linear(factor, max_context)
    return _yarn_from_gguf(scaling, factor, max_context)


def _linear(factor: float, max_context: int) -> Scaled:
    return LinearScaling(factor), max(max_context, int(max_context * factor))


def _llama3(rope: Mapping[str, Any], original: int) -> Llama3Scaling:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low >= high:
        raise ModelError(
            f"model config: low_freq_factor {low} is not below high_freq_factor {high}"
        )
    return Llama3Scaling(number(rope, "factor"), low, high, original)


def _yarn_from_hf(rope: Mapping[str, Any], original: int, max_context: int) -> Scaled:
    factor = number(rope, "factor", max_context / original)
    by_rule = _yarn_amplitude(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        by_rule = _yarn_amplitude(factor, number(rope, "mscale"))
        by_rule /= _yarn_amplitude(factor, number(rope, "mscale_all_dim"))
    scaling = YarnScaling(
        factor=factor,
        original_context=original,
        amplitude=number(rope, "attention_factor", by_rule),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=flag(rope, "truncate", True),
    )
    return _checked(scaling), max(max_context, int(original * factor))


def _yarn_from_gguf(scaling: Mapping[str, Any], factor: float, max_context: int) -> Scaled:
    """The rule's amplitude times ``attn_factor``, as llama.cpp reads it."""
    original = count(scaling, "original_context_length", max_context)
    yarn = YarnScaling(
        factor=factor,
        original_context=original,
        amplitude=number(scaling, "attn_factor", 1.0) * _yarn_amplitude(factor),
        beta_fast=number(scaling, "yarn_beta_fast", 32.0),
        beta_slow=number(scaling, "yarn_beta_slow", 1.0),
    )
    return _checked(yarn), max(max_context, int(original * factor))


def _yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    """Section 3.4 of the paper; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _checked(yarn: YarnScaling) -> YarnScaling:
    if yarn.beta_fast < yarn.beta_slow:
        raise ModelError(
            f"model config: beta_fast {yarn.beta_fast} is below beta_slow {yarn.beta_slow}"
        )
    return yarn


def _factors(values: np.ndarray) -> FrequencyFactors:
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelError("rope_freqs.weight holds a factor that is not above 0")
    return FrequencyFactors(tuple(values.astype(np.float64).tolist()))
