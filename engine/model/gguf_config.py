"""Hyperparameters from GGUF metadata, as llama.cpp writes and reads it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelError
from engine.model.config import MAX_LAYERS, LlamaConfig
from engine.model.fields import check_count, count, number
from engine.model.fields import refuse_unless as _refuse
from engine.model.rope_config import rope_from_gguf

if TYPE_CHECKING:
    from engine.model.gguf_file import GgufTensor

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FIELDS = frozenset(
    {
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",  # says only how the model was made
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",  # says how the writer ordered rows; the architecture says it too
        "vocab_size",
    }
)


def config_from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> LlamaConfig:
    """From GGUF metadata and tensors. Raises ModelError naming what is missing or not supported."""
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"GGUF architecture {reprlib.repr(architecture)} is not supported; {supported} are"
        )
    _refuse_other_fields(fields, architecture)
    prefix = f"{architecture}."
    hidden = count(fields, prefix + "embedding_length")
    heads = count(fields, prefix + "attention.head_count")
    head_dim = count(fields, prefix + "attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(prefix + name, head_dim) != head_dim:
            shown = reprlib.repr(fields[prefix + name])
            raise ModelError(f"{prefix}{name} {shown} is not supported; the head's {head_dim} is")
    num_layers = count(fields, prefix + "block_count", maximum=MAX_LAYERS)
    factors = _frequency_factors(tensors, head_dim)
    scaling, max_context = rope_from_gguf(
        fields, architecture, factors, count(fields, prefix + "context_length")
    )
    return LlamaConfig(
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=count(fields, prefix + "feed_forward_length"),
        num_heads=heads,
        num_kv_heads=count(fields, prefix + "attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(fields, prefix),
        max_context=max_context,
        rope_theta=number(fields, prefix + "rope.freq_base", 10000.0),
        norm_eps=number(fields, prefix + "attention.layer_norm_rms_epsilon", 1e-5),
        tied_head="output.weight" not in tensors,
        attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=architecture == "qwen3",
        windows=(_window(fields, architecture),) * num_layers,
        rope=scaling,
    )


def _refuse_other_fields(fields: Mapping[str, Any], architecture: str) -> None:
    """Whatever else the architecture's metadata sets asks for something that is not done here."""
    prefix = f"{architecture}."
    for name, value in fields.items():
        if not name.startswith(prefix) or name.removeprefix(prefix) in _FIELDS:
            continue
        if value not in (None, "none", 0):
            raise ModelError(f"{name} {reprlib.repr(value)} is not supported")
    _refuse(fields, prefix + "attention.causal", True)


def _window(fields: Mapping[str, Any], architecture: str) -> int | None:
    """Every layer's; Qwen's files do not say which layers have one."""
    name = f"{architecture}.attention.sliding_window"
    if fields.get(name) in (None, 0):
        return None
    if architecture != "llama":
        raise ModelError(f"{name} {reprlib.repr(fields[name])} is not supported")
    return check_count(name, fields[name])


def _frequency_factors(tensors: Mapping[str, GgufTensor], head_dim: int) -> np.ndarray | None:
    name = "rope_freqs.weight"
    if name not in tensors:
        return None
    if tensors[name].shape != (head_dim // 2,):
        raise ModelError(f"tensor {name} has shape {tensors[name].shape}, not ({head_dim // 2},)")
    return tensors[name].values()


def _vocab_size(fields: Mapping[str, Any], prefix: str) -> int:
    if prefix + "vocab_size" in fields:
        return count(fields, prefix + "vocab_size")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ModelError(f"GGUF names neither {prefix}vocab_size nor tokenizer.ggml.tokens")
    return len(tokens)
