"""The compiled kernels. Arguments are those of the ops' contracts; ``out`` is written in place.

``ValueError`` names an argument of the wrong shape, dtype or range.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.sample.rule import Rule

ISAS: list[str]

Array = Tensor | NDArray[Any]

class Matrix:
    """A packed matrix; keeps the memory it stands in."""

    @property
    def outputs(self) -> int: ...

class Decoder:
    """Runs steps; ``weights`` has the fields of ``kernels.decoder.DecoderWeights``."""

    def __init__(self, weights: object) -> None: ...
    def forward(
        self,
        token_ids: Sequence[int],
        states: Array | None,
        positions: Sequence[int],
        query_starts: Sequence[int],
        page_tables: Sequence[Sequence[int]],
        kv: Array,
        kv_dtype: str,
        page_size: int,
        logit_rows: Sequence[int],
        logits: Array | None,
        hidden: Array | None = None,
        layers_done: Array | None = None,
        mark_every: int = 1,
        progress_event: int = -1,
    ) -> list[int]:
        """Returns the best ids of ``logit_rows``."""

    def draft(
        self,
        token_ids: Sequence[int],
        states: Sequence[Array],
        positions: Sequence[int],
        page_tables: Sequence[Sequence[int]],
        kv: Array,
        kv_dtype: str,
        page_size: int,
        lengths: Sequence[int],
    ) -> list[list[int]]: ...

def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...
def make_matrix(
    format: str,
    reads: str,
    offsets: str,
    bf16_scales: bool,
    rotated: bool,
    outputs: int,
    width: int,
    inputs: int,
    group: int,
    data: Tensor,
) -> Matrix: ...
def linear(x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor) -> None: ...
def embedding(token_ids: Tensor, table: Matrix, out: Tensor) -> None: ...
def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> None: ...
def kv_write(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int,
    pages: Tensor,
    offsets: Tensor,
    kv_dtype: str,
    page_size: int,
) -> None: ...
def paged_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    positions: Array,
    query_starts: Array,
    page_tables: Array,
    kv_dtype: str,
    page_size: int,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None: ...
def sample(
    logits: Sequence[NDArray[np.float32]],
    rules: Sequence[Rule],
    output_ids: Sequence[array[int]],
    token_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float32],
) -> None: ...

class SuffixReader:
    def read(self, tokens: Sequence[int]) -> None: ...
    @property
    def match(self) -> tuple[int, int]: ...

class SuffixAutomaton:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def append(self, tokens: Sequence[int]) -> None: ...
    def tokens(self, start: int, end: int) -> list[int]: ...
    @property
    def repeat(self) -> tuple[int, int]: ...
    def reader(self) -> SuffixReader: ...

def isa() -> str: ...
def select_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def set_num_threads(count: int) -> None: ...
def num_threads() -> int: ...

class Ahead:
    bytes: int
    to_second: bool
    def __init__(self, bytes: int, to_second: bool) -> None: ...

def fetch_ahead() -> list[Ahead]: ...
def set_fetch_ahead(ahead: Sequence[Ahead]) -> None: ...
def peak_ops(arithmetic: str, threads: int, seconds: float) -> tuple[float, str] | None: ...
def peak_read(num_bytes: int, threads: int, seconds: float) -> float: ...
