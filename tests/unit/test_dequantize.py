"""Block formats against the gguf package's own conversion, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from engine.model.dequantize import TYPES, dequantize, stored_bytes

SHAPE = (5, 96)


def stored(kind: str, values: np.ndarray) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)


@pytest.mark.parametrize("kind", TYPES.values())
def test_every_type_is_read_as_the_reference_reads_it(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    data = stored(kind, values)
    reference = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = dequantize(data.reshape(-1), kind, SHAPE)
    assert np.abs(found - values).max() < 0.5
    assert found.tobytes() == reference.tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_any_bytes_are_read_as_the_reference_reads_them(kind: str) -> None:
    size = stored_bytes(kind, (64, 32))
    data = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)
    data.reshape(64, -1)[:, [1, 3]] &= 0x7B  # no infinity or NaN as scale or minimum
    reference = gguf.quants.dequantize(data.reshape(64, -1), gguf.GGMLQuantizationType[kind])
    assert dequantize(data, kind, (64, 32)).tobytes() == reference.tobytes()


@pytest.mark.parametrize("number", TYPES)
def test_type_numbers_and_sizes_are_those_of_the_format(number: int) -> None:
    kind = gguf.GGMLQuantizationType(number)
    assert kind.name == TYPES[number]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert stored_bytes(kind.name, SHAPE) == SHAPE[0] * SHAPE[1] // block * size


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_rows_that_are_not_whole_blocks_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="33"):
        stored_bytes(kind, (32, 33))
