"""What the tests of every op share: back ends side by side, instruction sets side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from kernels import _native, dispatch, threads
from tests.kernels.bits import same_bits


def all_ops(backend: str) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            op: getattr(import_module(f"kernels.{op}.{module[backend]}"), op)
            for op, module in dispatch.IMPLEMENTATIONS.items()
        }
    )


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    torch.manual_seed(0)
    isa, native_threads, torch_threads = (
        _native.isa(),
        _native.num_threads(),
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    yield
    _native.select_isa(isa)
    threads.set_num_threads(native_threads)
    torch.set_num_threads(torch_threads)


@pytest.fixture(params=dispatch.BACKENDS)
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The ops of one back end, as attributes; the test runs once per back end."""
    return all_ops(request.param)


@pytest.fixture
def everywhere(
    request: pytest.FixtureRequest,
) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    """Runs a computation on every instruction set and thread count; the bits must not differ.

    With the reference's ``ops``, on more than one of torch's threads.
    """
    varied = getattr(request.node, "callspec", None)
    backend = varied.params.get("ops", "cpu") if varied is not None else "cpu"

    def places() -> Iterator[None]:
        if backend == "reference":
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                yield
            return
        for isa in _native.supported_isas():
            _native.select_isa(isa)
            for count in (1, 2, 3):
                threads.set_num_threads(count)
                yield

    def run(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        results = [compute() for _ in places()]
        assert all(same_bits(result, results[0]) for result in results)
        return results[0]

    return run
