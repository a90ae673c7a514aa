"""Which implementation runs an op: chosen once per process, here and nowhere else.

``QUIRE_KERNELS`` names the back end (``reference``: torch; ``cpu``: the native module); without it,
``cpu`` where the native module was built, else ``reference``. ``QUIRE_ISA`` names the instruction
set of the native kernels (``amx_int8``, ``avx512_bf16``, ``avx512_vnni``, ``avx2_vnni``, ``avx2``
or ``portable``); without it, the best this CPU has.
A choice that is not available raises; nothing falls back in silence.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

BACKENDS = ("reference", "cpu")

# The module of each op's folder that runs under each back end. Under `cpu`, rope by itself
# stays in torch: single IEEE operations have the same bits however they are vectorised.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "decoder": {"reference": "reference", "cpu": "cpu_kernel"},
    "embedding": {"reference": "reference", "cpu": "cpu_kernel"},
    "kv_write": {"reference": "reference", "cpu": "cpu_kernel"},
    "linear": {"reference": "reference", "cpu": "cpu_kernel"},
    "paged_attention": {"reference": "reference", "cpu": "cpu_kernel"},
    "rms_norm": {"reference": "reference", "cpu": "cpu_kernel"},
    "rope": {"reference": "reference", "cpu": "reference"},
    "sample": {"reference": "reference", "cpu": "cpu_kernel"},
    "silu_mul": {"reference": "reference", "cpu": "cpu_kernel"},
    "suffix_automaton": {"reference": "reference", "cpu": "cpu_kernel"},
}

# Instruction sets whose products of bf16 take subnormal numbers for 0.
PAIRS_OF_BF16 = ("amx_int8", "avx512_bf16")

# Raised whenever a kernel's bits change, so that workers of different releases do not share pages.
_REVISION = 3


class KernelUnavailable(RuntimeError):
    """The back end or instruction set asked for cannot run in this process."""


@cache
def backend() -> str:
    """Name of the back end of this process. Raises ``ValueError`` or ``KernelUnavailable``."""
    chosen = os.environ.get("QUIRE_KERNELS")
    if chosen is None:
        return "cpu" if _native_problem() is None else "reference"
    if chosen not in BACKENDS:
        raise ValueError(f"QUIRE_KERNELS must be one of {', '.join(BACKENDS)}, not {chosen!r}")
    if chosen == "cpu" and (problem := _native_problem()) is not None:
        raise KernelUnavailable(f"QUIRE_KERNELS=cpu: {problem}")
    return chosen


@cache
def isa() -> str:
    """Instruction set of the native kernels. Raises ``ValueError`` or ``KernelUnavailable``."""
    chosen = os.environ.get("QUIRE_ISA")
    problem = _native_problem()
    if problem is not None:
        if chosen is not None:
            raise KernelUnavailable(f"QUIRE_ISA={chosen}: {problem}")
        return "portable"
    native = import_module("kernels._native")
    if chosen is not None:
        if chosen not in native.ISAS:
            raise ValueError(f"QUIRE_ISA must be one of {', '.join(native.ISAS)}, not {chosen!r}")
        if chosen not in native.supported_isas():
            raise KernelUnavailable(f"QUIRE_ISA={chosen}: this CPU does not have it")
        native.select_isa(chosen)
    return str(native.isa())


@cache
def implementation(op: str) -> ModuleType:
    """The module that runs ``op``; it has a function of that name with the contract's signature."""
    module = IMPLEMENTATIONS[op][backend()]
    if module == "cpu_kernel":
        _start_native()
    return import_module(f"kernels.{op}.{module}")


def numerics_tag(weights: str) -> str:
    """The kernels' part of the numerics version: equal tags promise equal bits.

    The native kernels fix the order and the rounding of every operation, so their bits are those
    of any instruction set, which is not named; but where the CPU multiplies pairs of bf16, it takes
    subnormal numbers for 0, so this is. torch is named with its vector class under either back end:
    it still computes the rotation tables.
    """
    import torch

    torch_class = f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    pairs = backend() == "cpu" and weights == "bf16" and isa() in PAIRS_OF_BF16
    return f"{backend()}-{_REVISION}{'-vdpbf16ps' if pairs else ''}/{torch_class}"


@cache
def _native_problem() -> str | None:
    """Why the native module cannot be used, or None."""
    try:
        import_module("kernels._native")
    except ImportError as error:
        return f"the native module cannot be loaded ({error})"
    return None


@cache
def _start_native() -> None:
    """Sizes the one pool of threads; torch, whose own would spin on the same cores, keeps one."""
    import torch

    from kernels import threads

    isa()
    threads.set_num_threads(threads.configured_threads())
    torch.set_num_threads(1)
