"""Benchmarks: their flags, their arithmetic on numbers made by hand, and one run in small."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import __main__ as cli
from bench import decode, machine, prefill, speculate
from bench.decode import Steady, steady
from bench.handover import exposed_s, handover_bytes
from bench.limits import Phase, Workload, arithmetic_of, limit_ratio, limit_ratios, workload_of
from bench.load import PAGE_SIZE, Load
from bench.machine import Machine, measure_machine
from bench.options import loads, modes
from bench.table import render_table
from bench.timed_model import Call, TimedModel, longest_decode
from engine.completion import Completion, Timings, Usage
from engine.errors import InvalidRequest
from engine.finish import FinishReason
from engine.model.hash_model import HashModel
from engine.model.load import load_model
from engine.model.weights import Matrices
from engine.telemetry.trace_tree import SpanRecord
from kernels.layout import KV_DTYPES
from kernels.peaks import Peaks
from kernels.ragged import RaggedBatch
from kvstore.memory import PageMemory
from tests.tiny_models import write_folder

PEAKS = Peaks(2, 10.0, 400.0, 200.0, 100.0, int8_by="x", fp32_by="y")
MACHINE = Machine("portable", PEAKS)
# 4 GB of weights in the layers, 1 GB in the head, 1 MB of KV per token.
WORKLOAD = Workload(
    layers=Matrices(10**9, 4 * 10**9),
    head=Matrices(25 * 10**7, 10**9),
    arithmetic="fp32",
    kv_token_bytes=10**6,
    attention_ops=4 * 10**6,
    kv_arithmetic="fp32",
)


def options_of(flags: str) -> Namespace:
    return cli.parser().parse_args(flags.split())


def test_the_defaults_are_those_of_the_design() -> None:
    decode_load, prefill_load, handover_load, serve_load = (
        loads(options_of(kind)) for kind in ("decode", "prefill", "handover", "serve")
    )
    assert decode_load == [Load(batch=1, prompt=128, tokens=64, repeat=7)]
    assert prefill_load == [Load(batch=1, prompt=512, tokens=1, repeat=3)]
    assert handover_load == [Load(batch=1, prompt=1000, tokens=1, repeat=3)]
    assert serve_load == [Load(batch=32, prompt=128, tokens=64, repeat=3)]
    assert options_of("decode").model == "smollm2"
    assert modes(options_of("decode")) == [("int8", None)]


def test_each_batch_size_and_context_is_a_load_of_its_own() -> None:
    options = options_of("decode --batch 1,8 --context 128,2048 --tokens 5 --repeat 2")
    assert loads(options) == [
        Load(1, 128, 5, 2),
        Load(1, 2048, 5, 2),
        Load(8, 128, 5, 2),
        Load(8, 2048, 5, 2),
    ]


def test_each_weight_mode_goes_with_each_kv_dtype() -> None:
    options = options_of("decode --weights int8,int4 --kv int8,auto")
    assert modes(options) == [("int8", "int8"), ("int8", None), ("int4", "int8"), ("int4", None)]


@pytest.mark.parametrize(
    "flags", ["--batch 0", "--context -1", "--repeat x", "--tokens 0", "--cores 0"]
)
def test_numbers_below_one_are_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options_of(f"decode {flags}")
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "601"])
def test_a_part_of_no_or_endless_time_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options_of(f"steal --seconds {seconds}")
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--weights fp31", "--kv fp31"])
def test_a_mode_nobody_knows_is_one_line_and_code_1(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: MACHINE)
    assert cli.main(["decode", "--model", "hash", *flags.split()]) == 1
    assert "fp31" in capsys.readouterr().err.splitlines()[-1]


def test_the_cores_asked_for_are_the_first_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(cli.os, "sched_getaffinity", lambda _: {7, 2, 5})
    monkeypatch.setattr(cli.os, "sched_setaffinity", lambda _, cores: pinned.append(cores))
    cli.pin(2)
    assert pinned == [[2, 5]]


def test_a_model_that_does_not_exist_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: MACHINE)
    assert cli.main(["decode", "--model", "no-such-model"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "no-such-model" in output.err.splitlines()[-1]


def test_a_phase_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    assert Phase(2e10, 1e11, "fp32").allowed_s(PEAKS) == pytest.approx(2.0)
    assert Phase(1e10, 3e11, "fp32").allowed_s(PEAKS) == pytest.approx(3.0)
    assert Phase(1e10, 12e11, "int8").allowed_s(PEAKS) == pytest.approx(3.0)
    assert Phase(1e10, 6e11, "bf16").allowed_s(PEAKS) == pytest.approx(3.0)


def test_the_limit_of_a_decode_step_is_that_of_its_phases_in_turn() -> None:
    alone = WORKLOAD.decode_step(batch=1, context=100)
    # layers 4 GB: 0.4 s; keys and values 0.1 GB: 0.01 s; head 1 GB: 0.1 s
    assert limit_ratio(alone, PEAKS, took_s=1.02) == pytest.approx(0.5)
    together = WORKLOAD.decode_step(batch=50, context=100)
    # layers 100 GFLOP: 1 s; keys and values 5 GB: 0.5 s; head 25 GFLOP: 0.25 s
    assert limit_ratio(together, PEAKS, took_s=3.5) == pytest.approx(0.5)


def test_a_cpu_with_matrix_tiles_is_held_to_their_peak_and_shown_beside_its_vectors() -> None:
    with_tiles = replace(PEAKS, int8_tiles_gops=4000.0)
    phases = [Phase(1e9, 12e11, "int8")]
    assert limit_ratios(phases, PEAKS, took_s=6.0) == {"limit_ratio": pytest.approx(0.5)}
    assert limit_ratios(phases, with_tiles, took_s=6.0) == {
        "limit_ratio": pytest.approx(0.05),
        "of_vectors": pytest.approx(0.5),
    }


def test_the_limit_of_the_targets_example_is_about_2300_tokens_per_second() -> None:
    """32 sequences, int8 weights, 128 to 192 tokens of bf16 KV, 31 GB/s, 874 GOPS."""
    peaks = Peaks(2, 31.0, 874.0, 460.0, 230.0, "x", "y")
    workload = Workload(
        layers=Matrices(106_168_320, 106_168_320),
        head=Matrices(28_311_552, 28_311_552),
        arithmetic="int8",
        kv_token_bytes=23_040,
        attention_ops=4 * 30 * 9 * 64,
        kv_arithmetic="bf16",
    )
    phases = workload.decode_step(batch=32, context=160)
    assert 32 / limit_ratio(phases, peaks, took_s=1.0) == pytest.approx(2300, rel=0.03)


def test_decode_figures_are_medians_beside_what_the_machine_allows() -> None:
    samples = [
        Steady(step_s, 100.0, outside, PEAKS.read_gbps * faster)
        for step_s, outside, faster in ((1.02, 0.2, 1), (0.6, 0.1, 2), (9.0, 0.9, 1))
    ]
    row = decode.figures(samples, 1, WORKLOAD, PEAKS)
    assert row["tokens_per_s"] == pytest.approx(1 / 1.02)
    assert row["bytes_per_step"] == 5 * 10**9 + 100 * 10**6
    # 0.51 s are allowed of 1.02 and of 9 s, half of them where twice as much was read, of 0.6 s.
    assert row["limit_ratio"] == pytest.approx(0.51 / 2 / 0.6)
    assert row["read_gbps"] == PEAKS.read_gbps
    assert row["outside_step"] == 0.2


def test_prefill_figures_count_linear_layers_and_attention_without_the_head() -> None:
    load = Load(batch=2, prompt=99, tokens=1, repeat=3)
    row = prefill.figures([9.9, 1.0, 20.0], load, WORKLOAD, PEAKS)
    assert row["tokens_per_s"] == pytest.approx(2 * 99 / 9.9)
    assert row["ops_per_token"] == 2 * 10**9 + 4 * 10**6 * 50
    assert row["limit_ratio"] == pytest.approx(20 * 2.2e9 / 100e9)


def call(began: float, ended: float, positions: list[int], num_logits: int) -> Call:
    return Call(
        began,
        ended,
        RaggedBatch(
            token_ids=np.zeros(len(positions), dtype=np.int64),
            positions=np.array(positions),
            query_starts=np.array([0, len(positions)]),
            page_tables=np.zeros((1, 1), dtype=np.int32),
            logit_rows=np.arange(num_logits),
        ),
    )


def test_only_steps_that_decode_the_whole_batch_in_a_row_are_timed() -> None:
    prompts = call(0.0, 0.5, [0, 1, 2, 3], 2)
    first, second, third = (call(n, n + 0.8, [9 + n, 19 + n], 2) for n in (1, 2, 3))
    alone = call(4.0, 4.1, [13], 1)
    calls = [first, prompts, first, second, third, alone, first]
    assert longest_decode(calls, 2) == [first, second, third]
    assert longest_decode([prompts, alone], 2) == []


def test_a_step_lasts_from_its_beginning_to_that_of_the_next() -> None:
    steps = [call(1.0, 1.8, [9, 19], 2), call(2.0, 2.7, [10, 20], 2), call(3.0, 9.0, [11, 21], 2)]
    found = steady(steps, batch=2, read_gbps=30.0)
    assert found.step_s == pytest.approx(1.0)
    assert found.context == (10 + 20 + 11 + 21) / 4
    assert found.outside == pytest.approx(1 - 1.5 / 2)


def test_a_batch_that_never_decodes_together_is_no_result() -> None:
    with pytest.raises(InvalidRequest, match="--tokens"):
        steady([call(0.0, 1.0, [4], 1)], batch=1, read_gbps=30.0)


def test_a_timed_model_is_the_model_in_everything_else() -> None:
    model = HashModel("fp32")
    timed = TimedModel(model)
    memory = PageMemory(model.spec.page_layout(PAGE_SIZE), 1)
    batch = call(0.0, 0.0, [0, 1, 2], 3).batch
    logits = timed.forward(batch, memory.kv, memory.layout)
    assert torch.equal(logits, model.forward(batch, memory.kv, memory.layout))
    assert timed.spec is model.spec
    (timing,) = timed.calls
    assert timing.began < timing.ended
    assert timing.num_keys == 1 + 2 + 3


def scale_bytes(*matrices: tuple[int, int], group: int, each: int) -> int:
    return sum(outputs * -(-inputs // group) * each for outputs, inputs in matrices)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "int8", "int4"])
def test_a_models_workload_counts_its_matrices_once_and_no_padding(
    mode: str, tmp_path: Path
) -> None:
    kv = mode if mode in KV_DTYPES else "int8"
    loaded = load_model(str(write_folder(tmp_path / "tiny")), weights=mode, kv=kv)
    vocabulary, kv_size = loaded.model.spec.vocab_size, {"fp32": 4, "bf16": 2, "int8": 1}[kv]
    # (outputs, inputs) of a layer: queries, keys and values, output, gate and up, down
    layer = ((4 + 2 + 2) * 32, 64), (64, 4 * 32), (2 * 96, 64), (64, 96)
    in_layers = 2 * sum(outputs * inputs for outputs, inputs in layer)
    head = (vocabulary, 64)
    layer_bytes, head_bytes = {
        "fp32": (4 * in_layers, 4 * 64 * vocabulary),
        "bf16": (2 * in_layers, 2 * 64 * vocabulary),
        "int8": (
            in_layers + 2 * scale_bytes(*layer, group=64, each=2),
            64 * vocabulary + scale_bytes(head, group=64, each=2),
        ),
        "int4": (
            in_layers // 2 + 2 * scale_bytes(*layer, group=32, each=4),
            64 * vocabulary + scale_bytes(head, group=64, each=2),
        ),
    }[mode]
    found = workload_of(loaded.model, PAGE_SIZE)
    assert found == Workload(
        layers=Matrices(in_layers, layer_bytes),
        head=Matrices(vocabulary * 64, head_bytes),
        arithmetic="int8" if mode == "int4" else mode,
        kv_token_bytes=2 * 2 * 2 * (32 * kv_size + (4 if kv == "int8" else 0)),
        attention_ops=2 * 4 * 32 * 4,
        kv_arithmetic=kv,
    )
    norms = (2 * 2 + 1) * 64 * 4
    assert loaded.model.spec.weight_bytes == layer_bytes + head_bytes + norms


def test_integer_modes_are_held_to_the_integer_peak() -> None:
    found = [arithmetic_of(mode) for mode in ("fp32", "bf16", "int8", "int4")]
    assert found == ["fp32", "bf16", "int8", "int8"]


def span(name: str, service: str, start_ns: int, end_ns: int, **attributes: Any) -> SpanRecord:
    return SpanRecord("t", "s", None, name, service, start_ns, end_ns, attributes=attributes)


def test_exposed_is_what_is_left_of_a_handover_after_the_prefills_last_chunk() -> None:
    trace = [
        span("prefill_chunk", "quire-prefill", 100, 1_000_000),
        span("prefill_chunk", "quire-prefill", 1_000_000, 7_000_000),
        span("handover", "quire-decode", 50, 8_000_000, **{"quire.bytes": 4096}),
        span("exposed", "quire-decode", 7_100_000, 9_000_000),
        span("prefill_chunk", "quire-decode", 9_000_000, 20_000_000),  # the last prompt token
    ]
    assert exposed_s(trace) == pytest.approx(0.002)
    assert handover_bytes(trace) == 4096


def test_no_two_prompts_of_a_benchmark_share_a_page() -> None:
    load = Load(batch=4, prompt=64, tokens=1, repeat=3)
    prompts = [tuple(each[:16]) for repeat in range(4) for each in load.prompts(1000, repeat)]
    assert len(set(prompts)) == len(prompts) == 16
    assert load.prompts(1000, 2) == load.prompts(1000, 2)


def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: measure_machine(1 << 22, seconds=0.05))


def test_decode_prints_one_json_object_and_keeps_progress_out_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_machine(monkeypatch)
    flags = "decode --model hash --context 40 --tokens 64 --batch 1,3 --repeat 2 --json"
    assert cli.main(flags.split()) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result.keys() == {"machine", "rows"}
    for name in ("cores", "read_gbps", "int8_gops", "fp32_gflops"):
        assert result["machine"][name] > 0
    assert "bf16_gflops" in result["machine"]
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert (row["model"], row["weights"], row["kv"]) == ("hash", "fp32", "bf16")
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["bytes_per_step"] > row["batch"] * 40 * 2 * 2 * 16 * 2
        assert 0 < row["limit_ratio"] < 1
        assert 0 < row["outside_step"] < 1
    assert "decode batch 3 context 40: 2/2" in output.err


def test_speculation_is_measured_in_pairs_of_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_machine(monkeypatch)
    what = "speculate --model hash --texts story --proposers lookup --batch 1,3"
    flags = f"{what} --tokens 8 --repeat 2 --json"
    assert cli.main(flags.split()) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["proposer"], row["text"], row["batch"]) for row in rows] == [
        ("lookup", "story", 1),
        ("lookup", "story", 3),
    ]
    for row in rows:
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["accepted_per_pass"] >= 1
        assert row["drafted"] >= row["accepted"]


def test_a_speedup_has_the_interval_of_its_pairs() -> None:
    usage = Usage(prompt_tokens=3, output_tokens=12, drafted_tokens=10, accepted_tokens=4)
    completion = Completion(
        token_ids=(1,) * 12,
        text="",
        logprobs=None,
        finish_reason=FinishReason.LENGTH,
        seed=0,
        usage=usage,
        timings=Timings(0.0, 0.0, 0.0, 0.0),
        prompt_ids=(1, 2, 3),
        choice_index=0,
        matched_stop=None,
        prefilled="local",
    )
    found = speculate.drafts_of([completion] * 2)
    row = speculate.figures([speculate.Pair(2.0, 1.0), speculate.Pair(8.0, 4.0)], found)
    assert row["accepted_per_pass"] == pytest.approx(24 / 16)
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == pytest.approx(2.0)
    assert row["tokens_per_s"] == pytest.approx(24 / 2.5)
    spread = speculate.figures([speculate.Pair(1.0, 1.0), speculate.Pair(2.0, 1.0)], found)
    assert spread["speedup"] == pytest.approx(2**0.5)
    assert spread["speedup_low"] < 0.1 < 10 < spread["speedup_high"]


def test_a_text_nobody_knows_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_machine(monkeypatch)
    assert cli.main(["speculate", "--model", "hash", "--texts", "poem", "--tokens", "2"]) == 1
    assert "--texts: no kind of text is named 'poem'" in capsys.readouterr().err


def test_a_tiny_model_has_a_share_of_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small_machine(monkeypatch)
    model = write_folder(tmp_path / "tiny")
    flags = f"prefill --model {model} --weights fp32,bf16 --prompt 20,40 --repeat 1 --json"
    assert cli.main(flags.split()) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["weights"], row["kv"], row["prompt"]) for row in rows] == [
        ("fp32", "fp32", 20),
        ("fp32", "fp32", 40),
        ("bf16", "bf16", 20),
        ("bf16", "bf16", 40),
    ]
    assert all(0 < row["limit_ratio"] < 1 for row in rows)


def test_prefill_prints_a_table_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_machine(monkeypatch)
    assert cli.main(["prefill", "--model", "hash", "--prompt", "40", "--repeat", "1"]) == 0
    facts, names, values = capsys.readouterr().out.splitlines()
    assert "read_gbps" in facts
    row = dict(zip(names.split(), values.split(), strict=True))
    assert row["prompt"] == "40"
    assert float(row["tokens_per_s"]) > 0


def test_the_machine_is_shown_for_each_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Machine("portable", replace(PEAKS, threads=2))
    monkeypatch.setattr(cli, "measure_machine", lambda: small)
    monkeypatch.setattr(
        machine, "measure_peaks", lambda threads, seconds: replace(PEAKS, threads=threads)
    )
    assert cli.main(["machine", "--json"]) == 0
    assert [row["cores"] for row in json.loads(capsys.readouterr().out)["rows"]] == [1, 2]


def test_what_would_be_too_wide_for_a_terminal_is_laid_on_its_side() -> None:
    row = {f"a rather long name {number}": number for number in range(12)}
    lines = render_table({"cores": 2}, [row, row]).splitlines()
    assert len(lines) == 13
    assert lines[3].split() == ["a", "rather", "long", "name", "2", "2", "2"]


def test_a_table_shows_what_was_not_measured_as_a_dash() -> None:
    lines = render_table({"int8_gops": None}, [{"batch": 12, "share": 0.123456}]).splitlines()
    assert lines == ["int8_gops -", "batch   share", "   12  0.1235"]
