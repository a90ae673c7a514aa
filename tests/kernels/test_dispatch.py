import inspect
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import kernels
from kernels import _native, dispatch


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    """Each test decides anew, as a new process would."""
    monkeypatch.delenv("QUIRE_KERNELS", raising=False)
    monkeypatch.delenv("QUIRE_ISA", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    for choice in vars(dispatch).values():
        if hasattr(choice, "cache_clear"):
            choice.cache_clear()


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels._native", None)


def test_the_native_back_end_is_the_default_where_it_was_built():
    assert dispatch.backend() == "cpu"


@pytest.mark.usefixtures("without_native")
def test_the_reference_is_the_default_where_there_is_nothing_else():
    assert dispatch.backend() == "reference"
    assert dispatch.isa() == "portable"


@pytest.mark.usefixtures("without_native")
def test_a_back_end_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.setenv("QUIRE_KERNELS", "cpu")
    with pytest.raises(dispatch.KernelUnavailable, match="the native module cannot be loaded"):
        dispatch.implementation("rope")


@pytest.mark.usefixtures("without_native")
def test_an_instruction_set_asked_for_needs_the_native_module(monkeypatch):
    monkeypatch.setenv("QUIRE_ISA", "portable")
    with pytest.raises(dispatch.KernelUnavailable, match="QUIRE_ISA=portable"):
        dispatch.isa()


def test_an_instruction_set_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "supported_isas", lambda: ["portable"])
    monkeypatch.setenv("QUIRE_ISA", _native.ISAS[0])
    if _native.ISAS[0] == "portable":
        assert dispatch.isa() == "portable"
    else:
        with pytest.raises(dispatch.KernelUnavailable, match="this CPU does not have it"):
            dispatch.isa()


@pytest.mark.parametrize("variable", ["QUIRE_KERNELS", "QUIRE_ISA"])
def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, variable):
    monkeypatch.setenv(variable, "abacus")
    with pytest.raises(ValueError, match=rf"{variable} must be one of .*, not 'abacus'"):
        dispatch.backend(), dispatch.isa()


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_instruction_set_asked_for_is_used(monkeypatch, isa):
    monkeypatch.setenv("QUIRE_ISA", isa)
    assert dispatch.isa() == isa
    assert _native.isa() == isa


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_an_op_runs_the_module_declared_for_the_back_end(monkeypatch, backend):
    monkeypatch.setenv("QUIRE_KERNELS", backend)
    for op, declared in dispatch.IMPLEMENTATIONS.items():
        assert dispatch.implementation(op).__name__ == f"kernels.{op}.{declared[backend]}"


def test_native_kernels_start_with_the_configured_threads_and_leave_torch_one(monkeypatch):
    monkeypatch.setenv("QUIRE_KERNELS", "cpu")
    monkeypatch.setenv("QUIRE_THREADS", "3")
    torch.set_num_threads(2)
    dispatch.implementation("linear")
    assert (_native.num_threads(), torch.get_num_threads()) == (3, 1)


def test_every_op_folder_is_in_the_table():
    folders = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py")}
    assert folders == set(dispatch.IMPLEMENTATIONS)


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_every_implementation_has_the_contract_s_signature(op):
    contract = inspect.signature(getattr(import_module(f"kernels.{op}"), op))
    for module in dispatch.IMPLEMENTATIONS[op].values():
        implementation = getattr(import_module(f"kernels.{op}.{module}"), op)
        assert inspect.signature(implementation) == contract


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_the_numerics_tag_names_back_end_and_torch(monkeypatch, backend):
    monkeypatch.setenv("QUIRE_KERNELS", backend)
    tag = dispatch.numerics_tag("int8")
    assert tag.startswith(f"{backend}-")
    assert torch.__version__ in tag
    assert torch.backends.cpu.get_cpu_capability() in tag


def test_the_numerics_tag_names_the_instruction_only_where_its_bits_differ(monkeypatch):
    monkeypatch.setattr(dispatch, "isa", lambda: "avx512_bf16")
    paired = dispatch.numerics_tag("bf16")
    assert "vdpbf16ps" in paired
    assert "vdpbf16ps" not in dispatch.numerics_tag("int8")
    monkeypatch.setattr(dispatch, "isa", lambda: "avx2")
    assert dispatch.numerics_tag("bf16") == paired.replace("-vdpbf16ps", "")
