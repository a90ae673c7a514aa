"""The GGUF container (versions 2 and 3, little-endian), parsed without trusting a byte of it.

Layout, after the GGUF specification: magic, version, tensor count, metadata count; the metadata
(key, type, value); the tensor infos (name, dimensions, type, offset); padding to the alignment; the
tensors' bytes. Every length is checked against what is left of the file before anything is made of
it, and the elements of all arrays together are limited, so a lying file costs little memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_FIELDS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMS = 4
MAX_TEXT_BYTES = 1 << 24
MAX_ELEMENTS = 1 << 22  # of all arrays; a vocabulary of 2^18 tokens has a fourth of that

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class GgufError(ValueError):
    """The bytes are not a GGUF container this parser takes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """``shape`` is slowest dimension first; ``offset`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class Container:
    fields: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def parse(data: memoryview) -> Container:
    """Metadata and tensor infos of a whole file. Raises GgufError."""
    cursor = _Cursor(data)
    if cursor.take(4) != MAGIC:
        raise GgufError("it does not begin with GGUF")
    version = cursor.number(_U32)
    if version not in VERSIONS:
        raise GgufError(f"version {version} is not supported; 2 and 3 are")
    num_tensors = cursor.count(MAX_TENSORS, "tensors")
    num_fields = cursor.count(MAX_FIELDS, "metadata fields")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.string()
        if key in fields:
            raise GgufError(f"metadata field {key!r} is there twice")
        fields[key] = cursor.value(cursor.number(_U32))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    return Container(fields, _placed(infos, cursor.position, _alignment(fields)))


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    num_dims = cursor.number(_U32)
    if not 1 <= num_dims <= MAX_DIMS:
        raise GgufError(f"tensor {name!r} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
    fastest_first = [cursor.number(_U64) for _ in range(num_dims)]
    if 0 in fastest_first:
        raise GgufError(f"tensor {name!r} has a dimension of 0")
    type_id = cursor.number(_U32)
    return TensorInfo(name, tuple(reversed(fastest_first)), type_id, cursor.number(_U64))


def _alignment(fields: dict[str, Any]) -> int:
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise GgufError(f"alignment {alignment!r} is no multiple of 8")
    return alignment


def _placed(infos: list[TensorInfo], end: int, alignment: int) -> tuple[TensorInfo, ...]:
    """The infos with offsets from the start of the file, names unique and offsets aligned."""
    start = -(-end // alignment) * alignment
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise GgufError(f"tensor {info.name!r} is there twice")
        if info.offset % alignment:
            raise GgufError(f"tensor {info.name!r} is not aligned to {alignment} bytes")
        names.add(info.name)
    return tuple(
        TensorInfo(info.name, info.shape, info.type_id, start + info.offset) for info in infos
    )


class _Cursor:
    """Reads forward through the file, never past its end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._elements_left = MAX_ELEMENTS
        self.position = 0

    def take(self, size: int) -> bytes:
        self._need(size)
        start = self.position
        self.position += size
        return bytes(self._data[start : self.position])

    def number(self, form: struct.Struct) -> Any:
        self._need(form.size)
        (value,) = form.unpack_from(self._data, self.position)
        self.position += form.size
        return value

    def count(self, maximum: int, what: str) -> int:
        count = int(self.number(_U64))
        if count > maximum:
            raise GgufError(f"{count} {what}, more than {maximum}")
        return count

    def string(self) -> str:
        size = int(self.number(_U64))
        if size > MAX_TEXT_BYTES:
            raise GgufError(f"a text of {size} bytes, more than {MAX_TEXT_BYTES}")
        raw = self.take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise GgufError(f"text at byte {self.position - len(raw)} is not UTF-8") from None

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.number(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array()
        raise GgufError(f"metadata type {type_id} is unknown")

    def _array(self) -> list[Any]:
        """Of numbers or texts; arrays of arrays are in no model's metadata."""
        type_id, count = self.number(_U32), self.number(_U64)
        self._elements_left -= count
        if self._elements_left < 0:
            raise GgufError(f"arrays of more than {MAX_ELEMENTS} elements")
        if type_id in _SCALARS:
            form = _SCALARS[type_id]
            raw = self.take(count * form.size)
            return [value for (value,) in form.iter_unpack(raw)]
        if type_id != _STRING:
            raise GgufError(f"metadata arrays of type {type_id} are not supported")
        self._need(count * _U64.size)  # every text begins with its length
        return [self.string() for _ in range(count)]

    def _need(self, size: int) -> None:
        if size > len(self._data) - self.position:
            raise GgufError(f"it ends at byte {len(self._data)}, in the middle of its header")
