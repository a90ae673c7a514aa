"""The tensors of one module, each given with the dtype and shape it must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine.errors import ModelError
from engine.model.hf_folder import FolderTensor

FLOATS = ("F32", "F16", "BF16")


class Parts:
    """Tensors by the last part of their names."""

    def __init__(self, module: str, tensors: Mapping[str, FolderTensor]) -> None:
        self.module = module
        self._tensors = tensors

    def __iter__(self) -> Iterator[FolderTensor]:
        return iter(self._tensors.values())

    def has(self, suffix: str, *dtypes: str) -> bool:
        """Whether it is there, of one of the dtypes if any are given."""
        tensor = self._tensors.get(suffix)
        return tensor is not None and (not dtypes or tensor.dtype in dtypes)

    def tensor(
        self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> FolderTensor:
        """None in ``shape`` stands for any size but 0. Raises ModelError naming the tensor."""
        name = f"{self.module}.{suffix}"
        tensor = self._tensors.get(suffix)
        if tensor is None:
            raise ModelError(f"tensor {name} is missing")
        if tensor.dtype not in dtypes:
            raise ModelError(
                f"tensor {name} has dtype {tensor.dtype}; supported are {', '.join(dtypes)}"
            )
        if not _fits(tensor.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ModelError(f"tensor {name} has shape {tensor.shape}, not ({wanted})")
        return tensor

    def refuse(self, suffix: str, kind: str) -> None:
        """Raises ModelError if the tensor is there, in a module of a ``kind`` that has none."""
        if suffix in self._tensors:
            raise ModelError(f"tensor {self.module}.{suffix} does not belong: the module is {kind}")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size > 0 if want is None else size == want for size, want in zip(shape, wanted, strict=True)
    )
