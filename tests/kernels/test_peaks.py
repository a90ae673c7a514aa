import sys

import pytest

from kernels import _native, peaks
from kernels.dispatch import KernelUnavailable
from kernels.peaks import Peaks, default_read_bytes, measure_peaks

KNOWN = Peaks(2, 30.0, 800.0, 400.0, 200.0, "x", "y")


def test_every_limit_of_this_machine_is_measured():
    found = measure_peaks(1, read_bytes=1 << 22, seconds=0.0)
    assert found.threads == 1
    for value in (found.read_gbps, found.int8_gops, found.fp32_gflops):
        assert value > 0.1
    assert found.bf16_gflops is None or found.bf16_gflops > 0.1
    assert found.int8_by
    assert found.fp32_by


@pytest.mark.parametrize("arithmetic", ["int8", "fp32"])
def test_two_threads_can_be_asked_for(arithmetic):
    rate, _ = _native.peak_ops(arithmetic, 2, 0.0)
    assert rate > 0


def test_an_arithmetic_this_cpu_has_no_loop_for_has_no_peak():
    assert _native.peak_ops("fp7", 1, 0.0) is None


def test_the_read_array_is_larger_than_every_cache(monkeypatch):
    monkeypatch.setattr(peaks, "_largest_cache", lambda: 1 << 29)
    assert default_read_bytes() == 1 << 31
    monkeypatch.setattr(peaks, "_largest_cache", lambda: 0)
    assert default_read_bytes() == 1 << 29


def test_matrix_tiles_have_a_peak_where_the_kernels_may_use_them():
    found = measure_peaks(1, read_bytes=1 << 22, seconds=0.0)
    assert (found.int8_tiles_gops is not None) == ("amx_int8" in _native.supported_isas())
    if found.int8_tiles_gops is not None:
        assert found.gops("int8") == max(found.int8_tiles_gops, found.int8_gops)


def test_the_limits_of_vectors_leave_matrix_tiles_out():
    with_tiles = Peaks(2, 30.0, 800.0, 400.0, 200.0, "x", "y", int8_tiles_gops=4000.0)
    assert with_tiles.gops("int8") == 4000.0
    assert with_tiles.of_vectors == KNOWN
    assert KNOWN.of_vectors.gops("int8") == 800.0


def test_bf16_has_the_peak_of_fp32_where_the_cpu_has_no_bf16_products():
    without = Peaks(2, 30.0, 800.0, None, 200.0, "x", "y")
    assert [KNOWN.gops(each) for each in ("int8", "bf16", "fp32")] == [800.0, 400.0, 200.0]
    assert [without.gops(each) for each in ("int8", "bf16", "fp32")] == [800.0, 200.0, 200.0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1 << 22, 0, 0.0), "threads"),
        ((1 << 22, 257, 0.0), "threads"),
        ((100, 1, 0.0), "num_bytes"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        _native.peak_read(*arguments)
    if name == "threads":
        with pytest.raises(ValueError, match=r"^threads must"):
            _native.peak_ops("int8", arguments[1], 0.0)


@pytest.mark.parametrize("seconds", [-1.0, 61.0, float("nan")])
def test_a_try_of_no_or_too_long_time_is_refused(seconds):
    with pytest.raises(ValueError, match=r"^seconds must"):
        _native.peak_ops("int8", 1, seconds)


def test_without_the_native_module_the_peaks_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels._native", None)
    with pytest.raises(KernelUnavailable, match="native module"):
        measure_peaks(1)
