"""Hyperparameters from a Hugging Face config.json, as each family's own code reads it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError
from engine.model.config import MAX_LAYERS, LlamaConfig, Windows
from engine.model.fields import check_count, count, flag, number
from engine.model.fields import refuse_unless as _refuse
from engine.model.rope_config import rope_fields, rope_from_hf

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """From a parsed config.json. Raises ModelError naming what is missing or not supported."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ModelError(f"model_type {reprlib.repr(family)} is not supported; {supported} are")
    _refuse(raw, "architectures", [_ARCHITECTURES[family]])
    _refuse(raw, "hidden_act", "silu")
    rope = rope_fields(raw)
    for fields in (raw, rope):
        _refuse(fields, "partial_rotary_factor", 1.0)
    scaling, max_context = rope_from_hf(raw, rope, count(raw, "max_position_embeddings"))
    hidden, heads = count(raw, "hidden_size"), count(raw, "num_attention_heads")
    num_layers = count(raw, "num_hidden_layers", maximum=MAX_LAYERS)
    attention_bias, output_bias = _attention_biases(raw, family)
    return LlamaConfig(
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=count(raw, "intermediate_size"),
        num_heads=heads,
        # Families disagree on what an absent value means.
        num_kv_heads=count(raw, "num_key_value_heads", heads if family == "llama" else None),
        head_dim=count(raw, "head_dim", None if family == "qwen3" else hidden // heads),
        vocab_size=count(raw, "vocab_size"),
        max_context=max_context,
        rope_theta=number({**raw, **rope}, "rope_theta", 10000.0),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tied_head=flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=_mlp_bias(raw, family),
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, num_layers),
        rope=scaling,
    )


def _attention_biases(raw: Mapping[str, Any], family: str) -> tuple[bool, bool]:
    """Of q, k, v; of the projection after attention."""
    if family == "mistral":
        _refuse(raw, "attention_bias", False)
        return False, False
    if family == "qwen2":
        _refuse(raw, "attention_bias", True)
        return True, False
    has_bias = flag(raw, "attention_bias")
    return has_bias, has_bias


def _mlp_bias(raw: Mapping[str, Any], family: str) -> bool:
    if family == "llama":
        return flag(raw, "mlp_bias")
    _refuse(raw, "mlp_bias", False)
    return False


def _windows(raw: Mapping[str, Any], family: str, num_layers: int) -> Windows:
    """Mistral's window is for every layer, Qwen's for those named by ``layer_types``, or else for
    those from ``max_window_layers`` on."""
    if family == "llama":
        _refuse(raw, "sliding_window", None)
        window, first = None, num_layers
    elif family == "mistral":
        window, first = _window(raw), 0
    else:
        window = _window(raw) if flag(raw, "use_sliding_window") else None
        first = _first_window_layer(raw)
    windows = tuple(window if layer >= first else None for layer in range(num_layers))
    types = raw.get("layer_types")
    if types is None:
        return windows
    named = _windows_of_types(types, num_layers, window)
    if family in ("llama", "mistral") and named != windows:
        raise ModelError(f"model config: layer_types {reprlib.repr(types)} are not supported here")
    return named


def _window(raw: Mapping[str, Any]) -> int | None:
    """4096 where the field is absent, none where it is null: the families' own rule."""
    window = raw.get("sliding_window", 4096)
    return None if window is None else check_count("sliding_window", window)


def _first_window_layer(raw: Mapping[str, Any]) -> int:
    first = raw.get("max_window_layers", 28)
    return 0 if first == 0 and first is not False else check_count("max_window_layers", first)


def _windows_of_types(types: object, num_layers: int, window: int | None) -> Windows:
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelError(f"model config: layer_types is not a list of {num_layers} types")
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise ModelError(f"model config: layer_types {reprlib.repr(kind)} is not supported")
    return tuple(known[kind] for kind in types)
