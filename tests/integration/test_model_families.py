"""Each family's tiny random model, made by transformers, computes here what it computes there.

Sequences are longer than the sliding windows, and than the context that scaled rotations were
trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.model.load import load_model
from tests.logits_oracle import assert_same_greedy_tokens, assert_same_logits, sequences
from tests.tiny_models import (
    TOKENS,
    gguf_metadata,
    gguf_name,
    llama_gguf_weights,
    plain_gguf_weights,
    tiny_tokenizer,
    write_gguf,
)

LENGTHS = (1, 50, 33, 200)
# transformers computes angles in fp32: at position 200 they are off by up to 2e-5.
TOLERANCE = 1e-4
ORIGINAL_CONTEXT, WINDOW = 64, 24
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0} | fields


def llama3() -> dict[str, Any]:
    return rope(
        "llama3",
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
    )


def yarn(**fields: Any) -> dict[str, Any]:
    return rope("yarn", original_max_position_embeddings=ORIGINAL_CONTEXT, **fields)


LINEAR = {"max_position_embeddings": ORIGINAL_CONTEXT, "rope_parameters": rope("linear")}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, linear scaling": ("llama", LINEAR),
    "llama, llama3 scaling": ("llama", {"rope_parameters": llama3()}),
    "llama, yarn": ("llama", {"rope_parameters": yarn()}),
    "yarn with its own amplitude": ("llama", {"rope_parameters": yarn(attention_factor=0.7)}),
    "yarn with mscale": ("llama", {"rope_parameters": yarn(mscale=0.7, mscale_all_dim=1.3)}),
    "yarn with other borders": (
        "llama",
        {"rope_parameters": yarn(beta_fast=8.0, beta_slow=2.0, truncate=False)},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn, tied": ("qwen2", {"rope_parameters": yarn(), "tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with alternating windows": ("qwen3", WINDOWED | {"layer_types": ALTERNATING}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": yarn()}),
}


def random_model(family: str, changes: Mapping[str, Any]) -> Any:
    """Weights are spread so that a wrong one shows in the logits; none is what it started as."""
    torch.manual_seed(13)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(weight, mean, 0.2)
    return model


def saved(model: Any, folder: Path, shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_each_family_computes_what_transformers_computes(
    tmp_path: Path, name: str
) -> None:
    oracle = random_model(*MODELS[name])
    model = load_model(str(saved(oracle, tmp_path / "tiny"))).model
    assert model.spec.max_context >= max(LENGTHS)
    assert_same_logits(model, oracle, LENGTHS, TOLERANCE)
    assert_same_greedy_tokens(model, oracle, sequences(100)[0], num_tokens=30)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_shards_are_the_same_model_as_one_file(tmp_path: Path, family: str) -> None:
    oracle = random_model(family, {"attention_bias": True} if family == "llama" else {})
    one = load_model(str(saved(oracle, tmp_path / "one"))).model
    shards = saved(oracle, tmp_path / "shards", shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    several = load_model(str(shards)).model
    assert one.spec.digest == several.spec.digest
    assert_same_logits(several, oracle, (40,), TOLERANCE)


def in_gguf(model: Any, path: Path, architecture: str, **changes: Any) -> Path:
    """The model as llama.cpp's converter would write it; ``changes`` are to the metadata."""
    weights, config = model.state_dict(), model.config
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if architecture == "llama":
        heads = (config.num_attention_heads, config.num_key_value_heads)
        tensors = llama_gguf_weights(weights, *heads)
    else:
        tensors = plain_gguf_weights(weights)
    tensors |= changes.pop("tensors", {})
    changes = {f"llama__{name}": value for name, value in changes.items()}
    metadata = gguf_metadata(
        llama__block_count=config.num_hidden_layers,
        llama__context_length=config.max_position_embeddings,
        llama__rope__freq_base=config.rope_parameters["rope_theta"],
        llama__attention__layer_norm_rms_epsilon=config.rms_norm_eps,
        **changes,
    )
    named = {name.replace("llama.", f"{architecture}.", 1): each for name, each in metadata.items()}
    return write_gguf(path, named, tensors, architecture=architecture)


YARN_FIELDS = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": ORIGINAL_CONTEXT,
}
FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, linear scaling": (
        "llama",
        LINEAR,
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "llama, linear scaling as old files have it": (
        "llama",
        LINEAR,
        {"rope__scale_linear": 4.0},
    ),
    "llama, yarn": ("llama", {"rope_parameters": yarn()}, YARN_FIELDS),
    "mistral": ("mistral", {"sliding_window": WINDOW}, {"attention__sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": yarn()}, YARN_FIELDS),
    "qwen3": ("qwen3", {}, {}),
    "qwen3, yarn with other borders": (
        "qwen3",
        {"rope_parameters": yarn(beta_fast=8.0, beta_slow=2.0)},
        YARN_FIELDS | {"rope__scaling__yarn_beta_fast": 8.0, "rope__scaling__yarn_beta_slow": 2.0},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_gguf_file_of_each_family_computes_what_transformers_computes(
    tmp_path: Path, name: str
) -> None:
    family, changes, fields = FILES[name]
    oracle = random_model(family, changes)
    architecture = "llama" if family == "mistral" else family
    model = load_model(str(in_gguf(oracle, tmp_path / "x.gguf", architecture, **fields))).model
    assert model.spec.max_context >= max(LENGTHS)
    assert_same_logits(model, oracle, LENGTHS, TOLERANCE)
    assert_same_greedy_tokens(model, oracle, sequences(100)[0], num_tokens=30)


def test_frequency_factors_of_a_gguf_file_are_llama3_scaling(tmp_path: Path) -> None:
    oracle = random_model("llama", {"rope_parameters": llama3()})
    plain = random_model("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}})
    factors = plain.model.rotary_emb.inv_freq / oracle.model.rotary_emb.inv_freq
    assert factors.min() == 1
    assert factors.max() == 4
    file = in_gguf(
        oracle, tmp_path / "x.gguf", "llama", tensors={"rope_freqs.weight": factors.numpy()}
    )
    assert_same_logits(load_model(str(file)).model, oracle, LENGTHS, TOLERANCE)


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Any bytes but for the fp16 scales, which are small. Returns [rows, bytes per row]."""
    num_weights, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = shape
    chance = np.random.default_rng(17)
    blocks = chance.integers(0, 256, (rows * columns // num_weights, num_bytes), dtype=np.uint8)
    for start in SCALES_AT[kind.name]:
        scales = chance.uniform(0.5, 1.5, len(blocks)) * SCALE[kind.name]
        blocks[:, start : start + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


SCALES_AT = {"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
SCALE = {"Q3_K": 2e-3, "Q4_K": 3e-4, "Q5_K": 2e-4, "Q6_K": 4e-5, "IQ4_XS": 1e-4}


@pytest.mark.parametrize("kind", SCALES_AT)
def test_a_gguf_file_of_large_blocks_computes_what_transformers_computes(
    tmp_path: Path, kind: str
) -> None:
    """Values and down projections are stored as Q6_K, as the usual mixes have it."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    oracle = random_model("qwen2", sizes)
    state, stored = oracle.state_dict(), {}
    for name, weight in state.items():
        if name.endswith("proj.weight"):
            mixed = "v_proj" in name or "down_proj" in name
            which = gguf.GGMLQuantizationType["Q6_K" if mixed else kind]
            stored[gguf_name(name)] = (random_blocks(which, tuple(weight.shape)), which)
            state[name] = torch.from_numpy(gguf.quants.dequantize(*stored[gguf_name(name)]))
    oracle.load_state_dict(state)
    file = in_gguf(
        oracle,
        tmp_path / "x.gguf",
        "qwen2",
        embedding_length=256,
        feed_forward_length=256,
        attention__key_length=64,
        attention__value_length=64,
        rope__dimension_count=64,
        tensors=stored,
    )
    assert_same_logits(load_model(str(file)).model, oracle, (60,), TOLERANCE)
