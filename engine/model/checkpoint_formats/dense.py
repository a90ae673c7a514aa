"""Tensors that are not quantized: fp32, or 16 bits read as fp32 exactly."""

from __future__ import annotations

from functools import partial

import torch

from engine.errors import ModelError
from engine.model.checkpoint_formats.parts import FLOATS
from engine.model.hf_folder import FolderTensor
from engine.model.weights import StoredTensor


def dense(tensor: FolderTensor) -> StoredTensor:
    """Raises ModelError for any other dtype."""
    if tensor.dtype not in FLOATS:
        raise ModelError(
            f"tensor {tensor.name} has dtype {tensor.dtype}; supported are {', '.join(FLOATS)}"
        )
    return StoredTensor(shape=tensor.shape, read=partial(_read, tensor), stored=tensor.stored)


def _read(tensor: FolderTensor) -> torch.Tensor:
    return tensor.load().to(torch.float32)
