"""GGUF's blocks as quantized matrices: the file's own integers, and its weights bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.errors import ModelError
from engine.model.config import LlamaConfig
from engine.model.dequantize import dequantize
from engine.model.gguf_blocks import KINDS, quantized_matrix
from engine.model.gguf_file import open_gguf, stored_tensors
from engine.model.weights import StoredTensor
from tests.tiny_models import HF_CONFIG, TOKENS, gguf_metadata, gguf_weights, write_gguf

SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
SHAPE = (6, 96)
CONFIG = LlamaConfig(
    num_layers=HF_CONFIG["num_hidden_layers"],
    hidden_size=HF_CONFIG["hidden_size"],
    intermediate_size=HF_CONFIG["intermediate_size"],
    num_heads=HF_CONFIG["num_attention_heads"],
    num_kv_heads=HF_CONFIG["num_key_value_heads"],
    head_dim=HF_CONFIG["head_dim"],
    vocab_size=len(TOKENS),
    max_context=256,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tied_head=False,
)


def random_blocks(kind: str, seed: int = 0) -> np.ndarray:
    """uint8 [N, G, bytes] of any bits, but finite scales and minimums."""
    size = (SHAPE[0], SHAPE[1] // 32, SIZES[kind])
    blocks = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    blocks[..., [1, 3]] &= 0xBF  # an exponent below that of infinity
    return blocks


def unchanged(rows: torch.Tensor) -> torch.Tensor:
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_any_bytes_are_the_weights_that_they_dequantize_to(kind: str, seed: int) -> None:
    blocks = random_blocks(kind, seed)
    found = quantized_matrix(blocks.reshape(-1), kind, SHAPE, unchanged)
    weights = found.dequantize().numpy()
    assert weights.tobytes() == dequantize(blocks.reshape(-1), kind, SHAPE).tobytes()
    rows = blocks.reshape(SHAPE[0], -1)
    theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert weights.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_and_scales_are_those_of_the_file(kind: str) -> None:
    blocks = random_blocks(kind)
    found = quantized_matrix(blocks.reshape(-1), kind, SHAPE, unchanged)
    assert (found.bits, found.group) == ({"Q8_0": 8}.get(kind, 4), 32)
    for row in range(SHAPE[0]):
        for group in range(SHAPE[1] // 32):
            block = blocks[row, group]
            scale = block[:2].view("<f2")[0]
            assert found.scales[row, group].item() == np.float32(scale)
            values = found.values[row, group * 32 : group * 32 + 32].tolist()
            if kind == "Q8_0":
                assert values == [int(each) + 128 for each in block[2:].view(np.int8)]
            else:
                packed = block[-16:].tolist()
                assert values == [each % 16 for each in packed] + [each // 16 for each in packed]
    if kind == "Q4_1":
        minimums = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
        assert found.zeros is None
        assert found.minimums is not None
        assert np.array_equal(found.minimums.numpy(), minimums.astype(np.float32))
    else:
        assert found.minimums is None
        assert found.zeros is not None
        assert found.zeros.unique().tolist() == [{"Q8_0": 128.0}.get(kind, 8.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_file_is_quantized_in_the_order_that_it_is_read_in(
    tmp_path: Path, kind: str
) -> None:
    """q and k too, whose rows are stored in another order."""
    stored = stored_of(tmp_path / "x.gguf", kind)
    assert sum(tensor.quantized is None for tensor in stored.values()) == 5  # the norms
    for name, tensor in stored.items():
        if tensor.quantized is None:
            assert len(tensor.shape) == 1, name
            continue
        found = tensor.quantized()
        assert found.shape == tensor.shape
        assert found.dequantize().numpy().tobytes() == tensor.read().numpy().tobytes(), name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_matrices_of_floats_have_no_integers(tmp_path: Path, kind: str) -> None:
    stored = stored_of(tmp_path / "x.gguf", kind)
    assert all(tensor.quantized is None for tensor in stored.values())


def stored_of(path: Path, kind: str) -> dict[str, StoredTensor]:
    write_gguf(path, gguf_metadata(), gguf_weights(), gguf.GGMLQuantizationType[kind])
    return stored_tensors(open_gguf(path), CONFIG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E00])
def test_a_scale_or_minimum_that_is_no_number_is_refused(kind: str, half: int) -> None:
    for start in (0, 2) if kind == "Q4_1" else (0,):
        blocks = random_blocks(kind)
        blocks[3, 1, start : start + 2] = list(half.to_bytes(2, "little"))
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantized_matrix(blocks.reshape(-1), kind, SHAPE, unchanged)


def test_a_scale_that_is_no_number_names_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    stored_of(path, "Q8_0")
    file, name = open_gguf(path), "blk.1.ffn_down.weight"
    data = file.tensors[name].data.copy()
    data[:2] = list((0x7C00).to_bytes(2, "little"))  # the first block's scale
    damaged = replace(file, tensors={name: replace(file.tensors[name], data=data)})
    (stored,) = stored_tensors(damaged, CONFIG).values()
    assert stored.quantized is not None
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight: .* NaN or infinity"):
        stored.quantized()
