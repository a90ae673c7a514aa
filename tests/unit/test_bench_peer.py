"""The comparison with llama.cpp: its arithmetic, and what a folder without its programs ends in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.llama_cpp import LlamaCpp, Lookup, model_file, speed_of
from bench.load import Load
from bench.peer import Case, row_of
from engine.errors import InvalidRequest

DECODE = Case("decode", Load(batch=8, prompt=128, tokens=64, repeat=1))
PREFILL = Case("prefill", Load(batch=1, prompt=512, tokens=1, repeat=1))
RESULT = json.dumps({"pp": 128, "tg": 64, "pl": 8, "speed_pp": 400.0, "speed_tg": 150.0})


def test_ours_is_compared_with_medians_of_the_same_case() -> None:
    theirs = {
        ("Q8_0", DECODE): [100.0, 1.0, 120.0],
        ("BF16", DECODE): [50.0, 60.0, 40.0],
        ("Q8_0", PREFILL): [9000.0],
    }
    row = row_of("int8/bf16", DECODE, [400.0, 100.0, 200.0], theirs)
    assert (row["weights"], row["kv"], row["batch"], row["tokens_per_s"]) == (
        "int8",
        "bf16",
        8,
        200,
    )
    assert (row["llama_cpp_Q8_0"], row["to_Q8_0"]) == (100, 2)
    assert (row["llama_cpp_BF16"], row["to_BF16"]) == (50, 4)
    assert row["to_best"] == 2


def test_the_speed_is_that_of_the_phase_asked_for() -> None:
    printed = f"loading\n{RESULT}\n"
    assert speed_of(printed, "decode") == 150
    assert speed_of(printed, "prefill") == 400


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_case_is_run_with_its_batch_prompt_and_tokens(tmp_path: Path) -> None:
    program(tmp_path, "llama-batched-bench", f"echo \"$@\" > {tmp_path}/asked; echo '{RESULT}'")
    assert LlamaCpp(tmp_path).tokens_per_s(Path("m.gguf"), DECODE.load, "decode") == 150
    asked = (tmp_path / "asked").read_text()
    assert "-m m.gguf -c 1536 " in asked
    assert "-npp 128 -ntg 64 -npl 8 " in asked


LOOKUP = """0.01.362 I decoded   66 tokens in    0.968 seconds, speed:   68.165 t/s
0.01.362 I n_draft      = 8
0.01.362 I n_predict    = 66
0.01.362 I n_drafted    = 48
0.01.362 I n_accept     = 14
"""


def test_a_text_is_looked_up_with_the_prompt_and_drafts_asked_for(tmp_path: Path) -> None:
    (tmp_path / "said").write_text(LOOKUP)
    script = f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/said >&2'
    program(tmp_path, "llama-lookup", script)
    found = LlamaCpp(tmp_path).lookup(Path("m.gguf"), "<|im_start|>user", 64, 8)
    assert found == Lookup(num_tokens=66, seconds=0.968, drafted=48, accepted=14)
    asked = (tmp_path / "asked").read_text()
    assert "--temp 0 -p <|im_start|>user -n 64 --ignore-eos --spec-draft-n-max 8" in asked


def test_a_lookup_that_tells_no_speed_is_refused(tmp_path: Path) -> None:
    program(tmp_path, "llama-lookup", "echo done")
    with pytest.raises(InvalidRequest, match="llama-lookup did not tell its speed"):
        LlamaCpp(tmp_path).lookup(Path("m.gguf"), "a", 4, 8)


def test_a_folder_without_the_programs_is_refused_by_its_flag(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"--llama-cpp: .*llama-quantize: No such file"):
        LlamaCpp(tmp_path).convert(Path("m.gguf"), "Q8_0", tmp_path)


def test_what_a_failing_program_said_last_is_told(tmp_path: Path) -> None:
    program(tmp_path, "llama-quantize", "echo first >&2; echo no such type >&2; exit 3")
    with pytest.raises(InvalidRequest, match="llama-quantize ended with 3: no such type"):
        LlamaCpp(tmp_path).convert(Path("m.gguf"), "Q9", tmp_path)


def test_only_a_gguf_file_can_be_given_to_both(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"--model: .* is not a file"):
        model_file(str(tmp_path))
