"""Damaged and lying model files end in ModelError or load, soon and within little memory."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.load import load_model
from tests.tiny_models import gguf_metadata, gguf_weights, write_folder, write_gguf

MEMORY = 512 << 20  # bytes of address space beyond what the process has
HEADER = 10_000  # bytes that hold a tiny GGUF file's metadata and tensor infos
BORDERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """An allocation beyond the limit fails, with an error that is no ModelError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Quantized, with biases, so that all readers have a part."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    weights = gguf_weights(attention_bias=True)
    kind = gguf.GGMLQuantizationType.Q5_1
    metadata = gguf_metadata(llama__rope__scale_linear=2.0)
    return write_gguf(path, metadata, weights, kind).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "tiny")


def test_an_allocation_beyond_the_limit_fails() -> None:
    with pytest.raises(MemoryError):
        np.zeros(2 * MEMORY, np.uint8)


def outcomes(path: Path, damaged: Iterator[bytes], model: Path) -> tuple[int, int]:
    """How many of the damaged versions of a file were refused, and how many loaded."""
    refused = loaded = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            load_model(str(model))
            loaded += 1
        except ModelError:
            refused += 1
    return refused, loaded


def flipped(content: bytes, reach: int, times: int, seed: int) -> Iterator[bytes]:
    """One to four bytes within ``reach`` changed, ``times`` times."""
    chance = random.Random(seed)
    for _ in range(times):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(reach)] = chance.randrange(256)
        yield bytes(damaged)


def with_borders(content: bytes, reach: int, times: int, seed: int) -> Iterator[bytes]:
    """A number at the border of a range in the place of any 4 or 8 bytes."""
    chance = random.Random(seed)
    for _ in range(times):
        form = struct.Struct(chance.choice(("<I", "<Q")))
        damaged = bytearray(content)
        value = chance.choice(BORDERS) % 256**form.size
        form.pack_into(damaged, chance.randrange(reach), value)
        yield bytes(damaged)


def spliced(content: bytes, reach: int, times: int, seed: int) -> Iterator[bytes]:
    """A run of the header moved somewhere else in it, or cut out."""
    chance = random.Random(seed)
    for _ in range(times):
        start, to = chance.randrange(reach), chance.randrange(reach)
        run = content[start : start + chance.choice((1, 4, 8, 24, 64))]
        end = to + chance.choice((0, len(run)))
        yield content[:to] + run + content[end:]


Damage = Callable[[bytes, int, int, int], Iterator[bytes]]


@pytest.mark.parametrize("damage", [flipped, with_borders, spliced])
def test_a_gguf_file_damaged_anywhere_in_its_header_is_refused_or_loads(
    tmp_path: Path, gguf_bytes: bytes, damage: Damage
) -> None:
    path = tmp_path / "x.gguf"
    refused, loaded = outcomes(path, damage(gguf_bytes, HEADER, 150, 1), path)
    assert refused > 50
    assert refused + loaded == 150


def test_a_gguf_file_damaged_in_its_first_and_last_fields_is_refused_or_loads(
    tmp_path: Path, gguf_bytes: bytes
) -> None:
    """The first kilobyte has the counts and hyperparameters; the tensor infos end the header."""
    path = tmp_path / "x.gguf"
    refused, _ = outcomes(path, with_borders(gguf_bytes, 1000, 150, 2), path)
    infos = gguf_bytes.index(b"token_embd.weight")
    tail = (gguf_bytes[:infos] + each for each in with_borders(gguf_bytes[infos:], 1500, 150, 3))
    refused_too, _ = outcomes(path, tail, path)
    assert min(refused, refused_too) > 50


def field(name: bytes, type_id: int, content: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", type_id) + content


def container(*fields: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)


NUMBERS = struct.pack("<IQ", 0, 1 << 23) + bytes(1 << 23)
TEXTS = struct.pack("<IQ", 8, 1 << 20) + struct.pack("<Q", 0) * (1 << 20)
LARGE = {
    "an array of more numbers than any vocabulary": container(field(b"a", 9, NUMBERS)),
    "several arrays that are too large together": container(
        *(field(b"%d" % each, 9, TEXTS) for each in range(5))
    ),
    "a text of megabytes": container(
        field(b"a", 8, struct.pack("<Q", 1 << 25) + bytes(1 << 25)),
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_gguf_header_that_is_too_large_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(LARGE[what])
    with pytest.raises(ModelError, match=r"x\.gguf is not a readable GGUF file.* more than"):
        load_model(str(path))


def test_blocks_of_any_bytes_load_or_are_refused_for_their_nan(tmp_path: Path) -> None:
    metadata, weights = gguf_metadata(), gguf_weights()
    path = write_gguf(tmp_path / "x.gguf", metadata, weights, gguf.GGMLQuantizationType.Q4_1)
    content = path.read_bytes()
    noise = np.random.default_rng(4).integers(0, 256, len(content) - HEADER, dtype=np.uint8)
    path.write_bytes(content[:HEADER] + noise.tobytes())
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        load_model(str(path))


@pytest.mark.parametrize("damage", [flipped, with_borders, spliced])
def test_safetensors_damaged_anywhere_in_their_header_are_refused_or_load(
    tmp_path: Path, folder: Path, damage: Damage
) -> None:
    copy = copied(folder, tmp_path / "x")
    content = (folder / "model.safetensors").read_bytes()
    reach = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = damage(content, reach, 150, 5)
    refused, loaded = outcomes(copy / "model.safetensors", damaged, copy)
    assert refused > 50
    assert refused + loaded == 150


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


NORM = "model.norm.weight"
Header = dict[str, Any]


def changed(**values: Any) -> Callable[[Header], Header]:
    return lambda header: header | {NORM: header[NORM] | values}


def moved(by: int) -> Callable[[Header], Header]:
    def change(header: Header) -> Header:
        start, end = header[NORM]["data_offsets"]
        return header | {NORM: header[NORM] | {"data_offsets": [start + by, end + by]}}

    return change


LIES: dict[str, Callable[[Header], Header]] = {
    "offsets beyond the file": changed(data_offsets=[2**40, 2**40 + 256]),
    "offsets that wrap around": changed(data_offsets=[2**64 - 256, 2**64 - 1]),
    "offsets beyond 64 bits": changed(data_offsets=[0, 2**65]),
    "offsets below 0": changed(data_offsets=[-256, 0]),
    "offsets that go backwards": changed(data_offsets=[256, 0]),
    "a tensor over another": moved(-128),
    "a tensor at another's place": changed(data_offsets=[0, 256]),
    "a shape that wraps around": changed(shape=[2**32, 2**32]),
    "a shape of nothing": changed(shape=[0]),
    "a shape below 0": changed(shape=[-64]),
    "a shape larger than its bytes": changed(shape=[65]),
    "a shape of a million dimensions": changed(shape=[1] * 10**6 + [64]),
    "a dtype that is not known": changed(dtype="F33"),
    "a dtype of half the size": changed(dtype="F16"),
    "a dtype that is no text": changed(dtype=["F32"]),
    "a tensor that is no object": lambda header: header | {NORM: [1]},
    "a hundred thousand tensors of nothing": lambda header: (
        header
        | {
            str(each): changed(shape=[0], data_offsets=[0, 0])(header)[NORM]
            for each in range(10**5)
        }
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path, folder: Path, lie: str) -> None:
    copy = copied(folder, tmp_path / "x")
    content = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(LIES[lie](json.loads(content[8 : 8 + size]))).encode()
    raw = struct.pack("<Q", len(header)) + header + content[8 + size :]
    (copy / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError):
        load_model(str(copy))


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_another_size_is_refused(
    tmp_path: Path, folder: Path, size: int
) -> None:
    copy = copied(folder, tmp_path / "x")
    content = (folder / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", size) + content[8:])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable"):
        load_model(str(copy))


@pytest.mark.parametrize("damage", [flipped, spliced])
def test_a_damaged_config_is_refused_or_loads(tmp_path: Path, folder: Path, damage: Damage) -> None:
    copy = copied(folder, tmp_path / "x")
    content = (folder / "config.json").read_bytes()
    refused, loaded = outcomes(copy / "config.json", damage(content, len(content), 150, 6), copy)
    assert refused > 50
    assert refused + loaded == 150


VALUES = (None, True, 0, -1, 1.5, float("nan"), 10**30, 1e300, "", "x", [], [1], {}, {"a": 1})


def test_a_config_with_any_field_of_any_kind_is_refused_or_loads(
    tmp_path: Path, folder: Path
) -> None:
    copy = copied(folder, tmp_path / "x")
    raw = json.loads((folder / "config.json").read_text())
    more = (
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "layer_types",
        "attention_bias",
        "num_key_value_heads",
        "partial_rotary_factor",
        "generation",
        "quantization_config",
    )
    damaged = (
        json.dumps(raw | {name: value}).encode() for name in (*raw, *more) for value in VALUES
    )
    refused, _ = outcomes(copy / "config.json", damaged, copy)
    assert refused > 100
