"""Benchmarks: their flags, their arithmetic on numbers made by hand, and one run in small."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from bench import __main__ as cli
from bench import decode, machine, prefill
from bench.decode import Steady, steady
from bench.handover import exposed_s, handover_bytes
from bench.limits import Phase, Workload, allowed_s, workload_of
from bench.load import PAGE_SIZE, Load
from bench.machine import Machine, measure_machine
from bench.table import render_table
from engine.errors import InvalidRequest
from engine.model import ModelSpec
from engine.model.config import LlamaConfig
from engine.model.llama import LlamaModel
from engine.telemetry.trace_tree import SpanRecord

MACHINE = Machine(cores=2, isa="portable", read_gbps=10.0, fp32_gflops=100.0)
# 4 GB of weights in the layers, 1 GB in the head, 1 MB of KV per token.
WORKLOAD = Workload(
    layer_weights=10**9,
    head_weights=25 * 10**7,
    weight_size=4,
    kv_token_bytes=10**6,
    attention_ops=4 * 10**6,
)


def test_the_defaults_are_those_of_the_design() -> None:
    decode_load, prefill_load, handover_load = (
        cli.loads(cli.parser().parse_args([kind])) for kind in ("decode", "prefill", "handover")
    )
    assert decode_load == [Load(batch=1, prompt=128, tokens=64, repeat=3)]
    assert prefill_load == [Load(batch=1, prompt=512, tokens=1, repeat=3)]
    assert handover_load == [Load(batch=1, prompt=1000, tokens=1, repeat=3)]
    assert cli.parser().parse_args(["decode"]).model == "smollm2"


def test_each_batch_size_is_a_load_of_its_own() -> None:
    options = cli.parser().parse_args(["decode", "--batch", "1,8", "--tokens", "5", "--repeat=2"])
    assert cli.loads(options) == [Load(1, 128, 5, 2), Load(8, 128, 5, 2)]


@pytest.mark.parametrize(
    "flags", [["--batch", "0"], ["--prompt", "-1"], ["--repeat", "x"], ["--weights", "int8"]]
)
def test_numbers_below_one_and_unknown_modes_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parser().parse_args(["decode", *flags])
    assert stopped.value.code == 2
    assert flags[0].lstrip("-") in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: MACHINE)
    assert cli.main(["decode", "--model", "no-such-model"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "no-such-model" in output.err.splitlines()[-1]


def test_a_phase_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    assert Phase(num_bytes=2e10, num_ops=1e11).allowed_s(MACHINE) == pytest.approx(2.0)
    assert Phase(num_bytes=1e10, num_ops=3e11).allowed_s(MACHINE) == pytest.approx(3.0)


def test_the_allowed_time_of_a_decode_step_is_that_of_its_phases_in_turn() -> None:
    alone = WORKLOAD.decode_step(batch=1, context=100)
    # layers 4 GB: 0.4 s; keys and values 0.1 GB: 0.01 s; head 1 GB: 0.1 s
    assert allowed_s(alone, MACHINE) == pytest.approx(0.51)
    together = WORKLOAD.decode_step(batch=50, context=100)
    # layers 100 GFLOP: 1 s; keys and values 5 GB: 0.5 s; head 25 GFLOP: 0.25 s
    assert allowed_s(together, MACHINE) == pytest.approx(1.75)


def test_decode_figures_are_medians_beside_what_the_machine_allows() -> None:
    samples = [Steady(step_s, context=100.0) for step_s in (1.02, 0.6, 9.0)]
    row = decode.figures(samples, 1, WORKLOAD, MACHINE)
    assert row["tokens_per_s"] == pytest.approx(1 / 1.02)
    assert row["bytes_per_step"] == 5 * 10**9 + 100 * 10**6
    assert row["limit_ratio"] == pytest.approx(0.5)


def test_prefill_figures_count_linear_layers_and_attention_without_the_head() -> None:
    load = Load(batch=2, prompt=99, tokens=1, repeat=3)
    row = prefill.figures([9.9, 1.0, 20.0], load, WORKLOAD, MACHINE)
    assert row["tokens_per_s"] == pytest.approx(2 * 99 / 9.9)
    assert row["ops_per_token"] == 2 * 10**9 + 4 * 10**6 * 50
    assert row["limit_ratio"] == pytest.approx(20 * 2.2e9 / 100e9)


def test_steps_are_timed_while_the_whole_batch_decodes() -> None:
    first = [0.0, 1.0, 2.0, 3.0, 4.0]
    late = [2.1, 3.1, 4.1, 5.0, 5.5]  # began last; from 4.1 on it is alone
    assert steady([first, late], prompt=10) == Steady(step_s=pytest.approx(1.0), context=11.5)


def test_a_batch_that_never_decodes_together_is_no_result() -> None:
    with pytest.raises(InvalidRequest, match="--tokens"):
        steady([[0.0, 1.0], [5.0, 6.0]], prompt=10)


@pytest.mark.parametrize(("mode", "size"), [("fp32", 4), ("bf16", 2)])
def test_a_models_workload_counts_its_matrices_once(mode: str, size: int) -> None:
    config = LlamaConfig(
        num_layers=3,
        hidden_size=32,
        intermediate_size=80,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=100,
        max_context=64,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=True,
    )
    spec = ModelSpec(
        name="tiny",
        digest="00" * 16,
        numerics="tiny",
        vocab_size=100,
        max_context=64,
        eos_token_ids=frozenset(),
        num_layers=3,
        num_kv_heads=1,
        head_dim=16,
        weight_mode=mode,
        kv_dtype=mode,
        weight_bytes=1,
    )
    model = LlamaModel(config, cast(Any, None), spec)
    assert workload_of(model, PAGE_SIZE) == Workload(
        layer_weights=3 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 80),
        head_weights=100 * 32,
        weight_size=size,
        kv_token_bytes=3 * 2 * 16 * size,
        attention_ops=3 * 2 * 16 * 4,
    )


def span(name: str, service: str, start_ns: int, end_ns: int, **attributes: Any) -> SpanRecord:
    return SpanRecord("t", "s", None, name, service, start_ns, end_ns, attributes=attributes)


def test_exposed_is_what_is_left_of_a_handover_after_the_prefills_last_chunk() -> None:
    trace = [
        span("prefill_chunk", "quire-prefill", 100, 1_000_000),
        span("prefill_chunk", "quire-prefill", 1_000_000, 7_000_000),
        span("handover", "quire-decode", 50, 9_000_000, **{"quire.bytes": 4096}),
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
    monkeypatch.setattr(machine, "TRY_FOR_S", 0.0)
    monkeypatch.setattr(cli, "measure_machine", lambda: measure_machine(read_bytes=1 << 22))


def test_decode_prints_one_json_object_and_keeps_progress_out_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_machine(monkeypatch)
    flags = "decode --model hash --prompt 40 --tokens 12 --batch 1,3 --repeat 2 --json"
    assert cli.main(flags.split()) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result.keys() == {"machine", "rows"}
    assert result["machine"]["read_gbps"] > 0
    assert result["machine"]["fp32_gflops"] > 0
    assert result["machine"]["int8_gops"] is None
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert (row["model"], row["weights"], row["kv"]) == ("hash", "fp32", "fp32")
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["bytes_per_step"] > row["batch"] * 40 * 2 * 2 * 16 * 4
        assert 0 < row["limit_ratio"] < 1
    assert "decode batch 3: 2/2" in output.err


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


def test_a_table_shows_what_was_not_measured_as_a_dash() -> None:
    lines = render_table({"int8_gops": None}, [{"batch": 12, "share": 0.123456}]).splitlines()
    assert lines == ["int8_gops -", "batch   share", "   12  0.1235"]
