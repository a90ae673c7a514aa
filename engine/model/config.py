"""Hyperparameters of a llama-family decoder, from GGUF metadata or a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

MAX_COUNT = 1 << 24
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
            value = getattr(self, field)
            if not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
                raise ModelError(f"model config: {field} is {value!r}, not 1 to {MAX_COUNT}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: {self.num_heads} heads are no multiple of {self.num_kv_heads}"
            )
        if self.head_dim % _KV_MULTIPLE or self.head_dim > 256:
            raise ModelError(
                f"model config: head_dim {self.head_dim} is no multiple of {_KV_MULTIPLE} up to 256"
            )
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ModelError(f"model config: {field} is {value!r}, not above 0")

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

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
    _refuse(raw, "quantization_config", None)
    _refuse(raw, "attention_bias", False)
    _refuse(raw, "mlp_bias", False)
    _refuse(raw, "hidden_act", "silu")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ModelError(f"rope scaling {kind!r} is not supported; none is")
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
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
    )


def config_from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaConfig:
    """From GGUF metadata and tensor names. Raises ModelError."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; llama is")
    for name in ("llama.rope.scaling.type", "llama.expert_count"):
        if fields.get(name) not in (None, "none", 0):
            raise ModelError(f"{name} {fields[name]!r} is not supported")
    if "rope_freqs.weight" in tensors:
        raise ModelError("rope scaling by rope_freqs.weight is not supported")
    hidden, heads = (
        _count(fields, "llama.embedding_length"),
        _count(fields, "llama.attention.head_count"),
    )
    head_dim = fields.get("llama.attention.key_length") or hidden // heads
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ModelError("llama.rope.dimension_count other than the head's size is not supported")
    vocabulary = fields.get("llama.vocab_size") or len(fields.get("tokenizer.ggml.tokens", ()))
    return LlamaConfig(
        num_layers=_count(fields, "llama.block_count"),
        hidden_size=hidden,
        intermediate_size=_count(fields, "llama.feed_forward_length"),
        num_heads=heads,
        num_kv_heads=fields.get("llama.attention.head_count_kv") or heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_context=_count(fields, "llama.context_length"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(fields.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        tied_head="output.weight" not in tensors,
    )


def _count(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise ModelError(f"model config: {name} is {value!r}, not 1 to {MAX_COUNT}")
    return value


def _refuse(raw: Mapping[str, Any], name: str, only: object) -> None:
    if raw.get(name, only) not in (only, None):
        raise ModelError(f"model config: {name} {raw[name]!r} is not supported; {only!r} is")
