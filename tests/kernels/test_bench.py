import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kernels import bench, bench_cases
from kernels.bench import Difference, bench_op, check, figures
from kernels.bench_cases import CASES, Case, reference
from kernels.dispatch import IMPLEMENTATIONS, KernelUnavailable
from kernels.peaks import Peaks
from kernels.sample import Tokens

PEAKS = Peaks(2, 10.0, 400.0, 200.0, 100.0, int8_by="x", fp32_by="y")


@pytest.fixture(autouse=True)
def _in_small(monkeypatch):
    monkeypatch.setattr(bench, "TRY_FOR_S", 0.0)
    monkeypatch.setattr(bench, "MOST_COPIES", 1)
    monkeypatch.setattr(bench_cases, "VOCABULARY", 128)
    monkeypatch.setattr(bench_cases, "CONTEXT", 200)
    monkeypatch.setattr(bench, "measure_peaks", lambda threads: PEAKS)


@pytest.mark.parametrize("op", sorted(CASES))
def test_every_op_with_a_kernel_is_compared_and_timed(op, capsys):
    assert bench.main([op, "--rows", "1", "70", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["case"].split()[0] for row in rows} == {"1", "70"}
    assert all(row["us"] > 0 and row["limit_ratio"] > 0 for row in rows)


def test_there_are_cases_for_every_op_that_has_a_kernel():
    native = {op for op, modules in IMPLEMENTATIONS.items() if modules["cpu"] == "cpu_kernel"}
    assert CASES.keys() == native


def spoiled(op: str, spoil: Callable[[Any], object]) -> Callable[..., Any]:
    """The reference with one element of its result changed."""

    def kernel(*arguments: Any) -> Any:
        made = reference(op)(*arguments)
        spoil(arguments[2] if made is None else made)
        return made

    def decoder(weights: Any) -> Any:
        return SimpleNamespace(forward=lambda *step: forward(weights, *step))

    def forward(weights: Any, *step: Any) -> torch.Tensor:
        logits = reference(op)(weights).forward(*step)
        spoil(logits)
        return logits

    return decoder if op == "decoder" else kernel


def assert_refused(op: str, spoil: Callable[[Any], object]) -> None:
    for case in CASES[op](3):
        check(case, reference(op), reference(op))
        with pytest.raises(Difference, match="off its reference"):
            check(case, spoiled(op, spoil), reference(op))


FLOATS = sorted(CASES.keys() - {"kv_write", "sample", "suffix_automaton"})


@pytest.mark.parametrize("op", FLOATS)
@pytest.mark.parametrize("value", ["wrong", float("nan")])
def test_a_kernel_that_differs_in_one_element_is_refused(op, value):
    # Rounding between products may move a decoder's logits a little: see BORDER.
    wrong = 0.3 if op == "decoder" else 1e-2

    def spoil(out: torch.Tensor) -> None:
        out.view(-1)[5] += wrong if value == "wrong" else value

    assert_refused(op, spoil)


def test_a_page_that_differs_in_one_bit_is_refused():
    def spoil(kv: torch.Tensor) -> None:
        kv.view(-1)[16] ^= 1

    assert_refused("kv_write", spoil)


@pytest.mark.parametrize("name", ["ids", "logprobs", "top_ids", "top_logprobs"])
def test_a_choice_that_differs_at_all_is_refused(name):
    def spoil(tokens: Tokens) -> None:
        values = getattr(tokens, name).reshape(-1)
        values[:] = np.nextafter(values, np.inf) if values.dtype == np.float32 else values + 1

    for case in CASES["sample"](3):
        if name == "ids" or case.name.endswith("logprobs"):
            with pytest.raises(Difference, match="off its reference"):
                check(case, spoiled("sample", spoil), reference("sample"))


def test_an_automaton_that_misses_a_repetition_is_refused():
    def forgetful() -> object:
        automaton = reference("suffix_automaton")()
        return SimpleNamespace(append=automaton.append, repeat=(0, 0))

    (case, _) = CASES["suffix_automaton"](9)
    check(case, reference("suffix_automaton"), reference("suffix_automaton"))
    with pytest.raises(Difference, match="off its reference"):
        check(case, forgetful, reference("suffix_automaton"))


def test_a_difference_ends_the_run_without_times(monkeypatch, capsys):
    wrong = spoiled("silu_mul", lambda out: out.view(-1)[0].add_(1))
    monkeypatch.setattr(bench, "implementation", lambda op: type("Module", (), {op: wrong}))
    assert bench.main(["silu_mul", "--rows", "2"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "off its reference" in output.err


def test_a_reference_is_not_timed_in_place_of_a_kernel(monkeypatch):
    module = type("Module", (), {"rms_norm": staticmethod(reference("rms_norm"))})
    monkeypatch.setattr(bench, "implementation", lambda op: module)
    with pytest.raises(KernelUnavailable, match="rms_norm"):
        bench_op("rms_norm", [1], PEAKS)


def test_the_slower_of_reading_and_computing_is_the_limit():
    reading = figures(Case("reads", (), num_bytes=10**7, num_ops=10**6), 2e-3, PEAKS)
    assert reading["bound"] == "memory"
    assert reading["limit_ratio"] == pytest.approx(0.5)
    assert reading["gb_per_s"] == pytest.approx(5.0)
    computing = figures(Case("computes", (), 10**6, 4 * 10**8, "int8"), 2e-3, PEAKS)
    assert computing["bound"] == "int8"
    assert computing["limit_ratio"] == pytest.approx(0.5)
    assert computing["gop_per_s"] == pytest.approx(200.0)
