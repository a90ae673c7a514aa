"""A matrix in groups with a scale and a zero point each, whatever the format that stores it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash

from engine.errors import ModelError
from engine.model.hf_folder import FolderTensor
from engine.model.weights import StoredTensor
from kernels.quantized import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """``N`` outputs of ``K`` inputs in ``G = K / group`` groups, not read yet.

    ``layout`` says what the parts' bytes mean: the same bytes in another layout are other weights.
    ``zeros`` are integers in 0 .. 2^bits. ``columns`` has the group of every column where that is
    not ``k // group``.
    """

    layout: str
    parts: tuple[FolderTensor, ...]
    bits: int
    group: int
    shape: tuple[int, int]
    values: Callable[[], torch.Tensor]  # [N, K] uint8
    scales: Callable[[], torch.Tensor]  # [N, G] fp32, finite
    zeros: Callable[[], torch.Tensor]  # [N, G]
    columns: torch.Tensor | None = None  # [K] int64

    def stored_tensor(self) -> StoredTensor:
        scattered = self.columns is not None
        return StoredTensor(
            shape=self.shape,
            read=self._read_scattered if scattered else self._read,
            stored=self._stored,
            quantized=None if scattered else self._quantized,
        )

    def _quantized(self) -> QuantizedMatrix:
        scales, zeros = self.scales(), self.zeros().to(torch.float32)
        return QuantizedMatrix(
            bits=self.bits,
            group=self.group,
            values=self.values().contiguous(),
            scales=scales.contiguous(),
            zeros=zeros.contiguous(),
        )

    def _read(self) -> torch.Tensor:
        return self._quantized().dequantize()

    def _read_scattered(self) -> torch.Tensor:
        scales, zeros = self.scales(), self.zeros().to(torch.float32)
        weights = self.values().to(torch.float32)
        return weights.sub_(zeros[:, self.columns]).mul_(scales[:, self.columns])

    def _stored(self) -> memoryview:
        digests = [xxhash.xxh3_128_digest(part.stored()) for part in self.parts]
        return memoryview(b"".join((self.layout.encode(), *digests)))


def group_of(module: str, group: int | None, num_columns: int) -> int:
    """The group's size, all columns for None. Raises ModelError unless it divides them."""
    size = num_columns if group is None else group
    if num_columns % size:
        raise ModelError(
            f"module {module}: group_size {size} does not divide {num_columns} columns"
        )
    return size


def finite(tensor: FolderTensor) -> torch.Tensor:
    """Scales as fp32. Raises ModelError for NaN and infinity."""
    scales = tensor.load().to(torch.float32)
    if not scales.isfinite().all():
        raise ModelError(f"tensor {tensor.name} holds NaN or infinity")
    return scales


def scattered_columns(tensor: FolderTensor, group: int) -> torch.Tensor | None:
    """``tensor`` has the group of every column, [K]; None if that is ``k // group`` everywhere.

    Raises ModelError for a group that is none.
    """
    columns = tensor.load().to(torch.int64)
    num_groups = len(columns) // group
    if not ((columns >= 0) & (columns < num_groups)).all():
        raise ModelError(f"tensor {tensor.name} holds groups other than 0 to {num_groups - 1}")
    trivial = torch.arange(len(columns)) // group
    return None if torch.equal(columns, trivial) else columns
