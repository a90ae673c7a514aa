"""Block formats against the gguf package's own conversion, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from engine.model.dequantize import TYPES, dequantize, stored_bytes

SHAPE = (5, 96)
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
BLOCKS = [kind for kind in TYPES.values() if kind not in ("F32", "F16", "BF16")]


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_type_is_read_as_the_reference_reads_it(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    reference = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = dequantize(data.reshape(-1), kind, SHAPE)
    assert np.abs(found - values).max() < 0.5
    assert found.tobytes() == reference.tobytes()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_any_bytes_are_read_as_the_reference_reads_them(kind: str) -> None:
    """Scales and minimums too: those that are infinite or NaN are compared as such."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(2).integers(0, 256, (3000, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        reference = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = dequantize(data.reshape(-1), kind, (3000, 3 * weights))
    assert np.isfinite(reference).mean() > 0.8
    assert np.array_equal(np.isnan(found), np.isnan(reference))
    numbers = ~np.isnan(reference)
    assert found[numbers].tobytes() == reference[numbers].tobytes()


@pytest.mark.parametrize("number", TYPES)
def test_type_numbers_and_sizes_are_those_of_the_format(number: int) -> None:
    kind = gguf.GGMLQuantizationType(number)
    assert kind.name == TYPES[number]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    assert stored_bytes(kind.name, (5, 768)) == 5 * 768 // weights * size


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_that_are_not_whole_blocks_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="33"):
        stored_bytes(kind, (256, 33))
