"""Tiny llama models of random weights, written as Hugging Face folders and as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.model.config import LlamaConfig
from engine.model.hf_config import config_from_hf

SPECIALS = ("<|end|>", "<|user|>")
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
)
Blocks = tuple[np.ndarray, gguf.GGMLQuantizationType]  # uint8 [rows, bytes per row]
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"))
TOKENS = (*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell")
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
}
GGUF_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf_config(**changes: Any) -> dict[str, Any]:
    """A config.json; None removes a key."""
    return {name: value for name, value in (HF_CONFIG | changes).items() if value is not None}


def random_weights(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """fp32 tensors under Hugging Face names, spread so that a wrong one shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in config.shapes().items()
    }
    for name, weight in weights.items():
        if weight.ndim == 1:
            weights[name] = 1 + weight
    return weights


def tiny_tokenizer() -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def write_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Hugging Face folder of one safetensors file; ``changes`` are made to its config.json."""
    folder.mkdir()
    raw = hf_config(**changes)
    weights = random_weights(config_from_hf(raw))
    write_json(folder / "config.json", raw)
    write_json(
        folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    )
    save_file(
        {name: weight.to(dtype) for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of the tiny model; ``llama__block_count=3`` changes a key, None removes one."""
    metadata = {
        "llama.block_count": HF_CONFIG["num_hidden_layers"],
        "llama.context_length": HF_CONFIG["max_position_embeddings"],
        "llama.embedding_length": HF_CONFIG["hidden_size"],
        "llama.feed_forward_length": HF_CONFIG["intermediate_size"],
        "llama.attention.head_count": HF_CONFIG["num_attention_heads"],
        "llama.attention.head_count_kv": HF_CONFIG["num_key_value_heads"],
        "llama.attention.key_length": HF_CONFIG["head_dim"],
        "llama.attention.value_length": HF_CONFIG["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": HF_CONFIG["rms_norm_eps"],
        "llama.rope.freq_base": HF_CONFIG["rope_theta"],
        "llama.rope.dimension_count": HF_CONFIG["head_dim"],
        "llama.vocab_size": HF_CONFIG["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in metadata.items() if value is not None}


def gguf_weights(**changes: Any) -> dict[str, np.ndarray]:
    """The weights of ``write_folder`` with the same changes, under GGUF names, in GGUF's order."""
    config = config_from_hf(hf_config(**changes))
    return llama_gguf_weights(random_weights(config), config.num_heads, config.num_kv_heads)


def llama_gguf_weights(
    weights: Mapping[str, torch.Tensor], num_heads: int, num_kv_heads: int
) -> dict[str, np.ndarray]:
    """Weights under Hugging Face names as a GGUF file of the llama architecture has them."""
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    found = plain_gguf_weights(weights)
    for name, rows in found.items():
        part = name.split(".")[-2]
        if part in heads:
            found[name] = pairs_from_halves(rows, heads[part])
    return found


def plain_gguf_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Weights under Hugging Face names as a GGUF file of the qwen architectures has them."""
    return {gguf_name(name): weight.numpy() for name, weight in weights.items()}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_PARTS[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def pairs_from_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts row i of a head's second half behind row i of its first, as GGUF stores q and k."""
    half = rows.shape[0] // num_heads // 2
    order = [part * half + pair for pair in range(half) for part in (0, 1)]
    heads = rows.reshape(num_heads, 2 * half, -1)[:, order]
    return np.ascontiguousarray(heads.reshape(rows.shape))


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    weights: Mapping[str, np.ndarray | Blocks],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
) -> Path:
    """A GGUF file by the reference writer; matrices are stored as ``kind`` unless they are blocks
    already, norms in F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        _add_field(writer, name, value)
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            writer.add_tensor(name, weight[0], raw_dtype=weight[1])
        elif weight.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
