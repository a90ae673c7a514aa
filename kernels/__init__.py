"""Arithmetic on tensors. Knows no request and no network; imports nothing of the other packages.

One folder per op: the contract in ``__init__.py``, the definition in ``reference.py``, the compiled
form in ``cpu_kernel.py`` (and ``triton_kernel.py``). ``dispatch`` chooses. Tensor arguments are
C-contiguous. This module stays cheap to import: transformers probes a package of this name.
"""
