"""Hyperparameters of a llama-family decoder, from GGUF metadata or a Hugging Face config.json."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

MAX_COUNT = 1 << 24
MAX_NUMBER = 1e12
MAX_LAYERS = 1 << 12
MAX_CONTEXT = 1 << 20  # the rotation tables of so many positions are made at load
_KV_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shapes and constants. Raises ModelError naming the field unless they fit each other."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float
    norm_eps: float
    tied_head: bool

    def __post_init__(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_context",
        ):
            _check_count(field, getattr(self, field), _MAXIMA.get(field, MAX_COUNT))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: {self.num_heads} heads are no multiple of {self.num_kv_heads}"
            )
        if self.head_dim % _KV_MULTIPLE or self.head_dim > 256:
            raise ModelError(
                f"model config: head_dim {self.head_dim} is no multiple of {_KV_MULTIPLE} up to 256"
            )
        for field in ("rope_theta", "norm_eps"):
            _check_number(field, getattr(self, field))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under its Hugging Face name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        per_layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            for name, shape in per_layer.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
        return shapes


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """From a parsed config.json. Raises ModelError naming what is missing or not supported."""
    if raw.get("model_type") != "llama":
        raise ModelError(f"model_type {raw.get('model_type')!r} is not supported; llama is")
    _refuse(raw, "architectures", ["LlamaForCausalLM"])
    _refuse(raw, "quantization_config", None)
    _refuse(raw, "sliding_window", None)
    _refuse(raw, "partial_rotary_factor", 1.0)
    _refuse(raw, "attention_bias", False)
    _refuse(raw, "mlp_bias", False)
    _refuse(raw, "hidden_act", "silu")
    rope = _rope_parameters(raw)
    hidden, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
    return LlamaConfig(
        num_layers=_count(raw, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_count(raw, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        vocab_size=_count(raw, "vocab_size"),
        max_context=_count(raw, "max_position_embeddings"),
        rope_theta=_number({**rope, **raw}, "rope_theta", 10000.0),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tied_head=_flag(raw, "tie_word_embeddings"),
    )


def config_from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaConfig:
    """From GGUF metadata and tensor names. Raises ModelError."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; llama is")
    for name in _NOT_SUPPORTED:
        if fields.get(name) not in (None, "none", 0):
            raise ModelError(f"{name} {fields[name]!r} is not supported")
    if "rope_freqs.weight" in tensors:
        raise ModelError("rope scaling by rope_freqs.weight is not supported")
    hidden, heads = (
        _count(fields, "llama.embedding_length"),
        _count(fields, "llama.attention.head_count"),
    )
    head_dim = hidden // heads
    if "llama.attention.key_length" in fields:
        head_dim = _count(fields, "llama.attention.key_length")
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise ModelError(f"{name} {fields[name]!r} is not supported; the head's {head_dim} is")
    return LlamaConfig(
        num_layers=_count(fields, "llama.block_count"),
        hidden_size=hidden,
        intermediate_size=_count(fields, "llama.feed_forward_length"),
        num_heads=heads,
        num_kv_heads=fields.get("llama.attention.head_count_kv") or heads,
        head_dim=head_dim,
        vocab_size=_gguf_vocab_size(fields),
        max_context=_count(fields, "llama.context_length"),
        rope_theta=_number(fields, "llama.rope.freq_base", 10000.0),
        norm_eps=_number(fields, "llama.attention.layer_norm_rms_epsilon", 1e-5),
        tied_head="output.weight" not in tensors,
    )


_NOT_SUPPORTED = (
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scale_linear",
    "llama.attention.sliding_window",
    "llama.expert_count",
)
_MAXIMA = {"num_layers": MAX_LAYERS, "max_context": MAX_CONTEXT}


def _gguf_vocab_size(fields: Mapping[str, Any]) -> int:
    if "llama.vocab_size" in fields:
        return _count(fields, "llama.vocab_size")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ModelError("GGUF names neither llama.vocab_size nor tokenizer.ggml.tokens")
    return len(tokens)


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of newer exports; refuses scaling in either of its spellings."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise ModelError(f"model config: {name} is {reprlib.repr(rope)}, not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelError(f"rope scaling {kind!r} is not supported; none is")
    return dict(raw.get("rope_parameters") or {})


def _count(raw: Mapping[str, Any], name: str) -> int:
    return _check_count(name, raw.get(name), MAX_COUNT)


def _check_count(name: str, value: object, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise ModelError(f"model config: {name} is {reprlib.repr(value)}, not 1 to {maximum}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    return default if raw.get(name) is None else _check_number(name, raw[name])


def _check_number(name: str, value: object) -> float:
    """Refuses NaN too."""
    if isinstance(value, int | float) and 0 < value <= MAX_NUMBER:
        return float(value)
    raise ModelError(f"model config: {name} is {reprlib.repr(value)}, not above 0")


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ModelError(f"model config: {name} is {value!r}, not true or false")
    return value


def _refuse(raw: Mapping[str, Any], name: str, only: object) -> None:
    if raw.get(name, only) not in (only, None):
        raise ModelError(f"model config: {name} {raw[name]!r} is not supported; {only!r} is")
