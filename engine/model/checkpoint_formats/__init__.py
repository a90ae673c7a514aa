"""Quantized checkpoints in Hugging Face folders: their integers as they are, nothing rounded again.

config.json's ``quantization_config`` names the format; each has a file here that tells its layout.
What they give as ``QuantizedMatrix`` (bits 4 or 8; group 32, 64, 128, or K for one scale per row):

==================  =======================  ========  ======================================
format              group                    bits      zeros
==================  =======================  ========  ======================================
compressed-tensors  32, 64, 128, per row     4, 8      2^(bits-1), or the packed zero points
GPTQ v1, v2         32, 64, 128, per row     4, 8      as stored (v1: plus 1)
AWQ gemm            32, 64, 128, per row     4         as stored
GGUF                32                       4, 8      8, 128, or minimums (``gguf_blocks``)
==================  =======================  ========  ======================================

Matrices whose groups are scattered over the columns (GPTQ's desc_act, compressed-tensors' actorder)
can only be read dequantized, in their own order of columns.

A weight is ``scale * (value - zero)`` in fp32, which is exact for scales of 16 bits; the formats'
own programs round it once more, to the 16 bits that they compute with.

Which modules are quantized is read off the tensors. The config's lists say it a second time, as
patterns to run against names (``targets``, ``ignore``, ``modules_to_not_convert``); they are not
run. Activations are quantized by the weight mode, so a config may ask for weights only or for
activations quantized on the fly alike; scales fixed in advance are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from engine.errors import ModelError
from engine.model.checkpoint_formats.awq import awq
from engine.model.checkpoint_formats.compressed_tensors import compressed_tensors
from engine.model.checkpoint_formats.dense import dense
from engine.model.checkpoint_formats.gptq import gptq
from engine.model.checkpoint_formats.grouped import GroupedMatrix
from engine.model.checkpoint_formats.parts import FLOATS, Parts
from engine.model.checkpoint_formats.settings import Settings
from engine.model.hf_folder import FolderTensor
from engine.model.weights import StoredTensor

Format = Callable[[Parts], GroupedMatrix | None]
"""A module's matrix put together from its tensors; None if the module is not quantized."""

_FORMATS: dict[str, Callable[[Settings], Format]] = {
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
}


def checkpoint_tensors(
    config: Mapping[str, object], tensors: Mapping[str, FolderTensor], wanted: Container[str]
) -> dict[str, StoredTensor]:
    """A folder's tensors under the names of the model's, matrices put together from their parts.

    ``config`` is the parsed config.json, ``wanted`` the names of the model's tensors. Names, shapes
    and dtypes are checked here; scales and zero points when a matrix is read, before its values
    are. Raises ModelError naming the setting or the tensor.
    """
    read = _format(config.get("quantization_config"))
    stored: dict[str, StoredTensor] = {}
    for parts in _modules(tensors):
        matrix = read(parts)
        taken = () if matrix is None else matrix.parts
        if matrix is not None:
            stored[f"{parts.module}.weight"] = matrix.stored_tensor()
        for tensor in parts:
            if tensor in taken or (matrix is not None and _is_no_bias(tensor, matrix, wanted)):
                continue
            if tensor.name in stored:
                raise ModelError(f"tensor {tensor.name} is there twice, quantized and not")
            stored[tensor.name] = dense(tensor)
    return stored


def _format(raw: object) -> Format:
    if raw is None:
        return lambda parts: None
    settings = Settings(raw, "quantization_config")
    return _FORMATS[settings.one_of("quant_method", tuple(_FORMATS))](settings)


def _modules(tensors: Mapping[str, FolderTensor]) -> list[Parts]:
    modules: dict[str, dict[str, FolderTensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tensor
    return [Parts(module, parts) for module, parts in modules.items()]


def _is_no_bias(tensor: FolderTensor, matrix: GroupedMatrix, wanted: Container[str]) -> bool:
    """Old GPTQ writers give every quantized layer a bias, of zeros where the model has none."""
    if tensor.name in wanted or not tensor.name.endswith(".bias"):
        return False
    fits = tensor.dtype in FLOATS and tensor.shape == matrix.shape[:1]
    return fits and not tensor.load().count_nonzero()
