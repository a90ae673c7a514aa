"""The README's commands, run as they stand there, against the real model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Up, wait_until

README = (Path(__file__).parents[2] / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def console_commands(first_words: str) -> list[str]:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith(first_words)]


GENERATE = console_commands("quire generate")
LOOK = [
    command for word in ("pages", "trace", "check") for command in console_commands(f"quire {word}")
]


def test_the_same_tokens_come_out_of_services_and_of_one_process(smollm2_up: Up) -> None:
    assert len(GENERATE) == 3
    found = []
    for command in GENERATE[:2]:
        result = smollm2_up.quire(*shlex.split(command)[1:])
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
    assert found[0]["token_ids"] == found[1]["token_ids"]
    assert "Paris" in found[0]["text"]


@pytest.mark.parametrize("command", [GENERATE[2], *LOOK])
def test_every_other_command_runs(smollm2_up: Up, command: str) -> None:
    result = smollm2_up.quire(*shlex.split(command)[1:])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_grpc_call_answers(smollm2_up: Up) -> None:
    (call,) = [block for block in blocks("sh") if "buf curl" in block]
    endpoint = next(
        each["endpoint"] for each in smollm2_up.state["services"] if each["role"] == "decode"
    )
    script = call.replace("127.0.0.1:PORT", endpoint).replace("buf curl", f"{BIN / 'buf'} curl")
    result = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "FINISH_REASON_LENGTH" in result.stdout


def test_the_python_example_runs(smollm2_up: Up) -> None:
    (example,) = blocks("python")
    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("length") + result.stdout.count("stop") >= 2


def test_with_the_prefill_process_killed_the_same_tokens_come_out(smollm2_up: Up) -> None:
    prompt = "A long prompt about the history of Paris, worth handing over to a service. " * 8
    flags = ["--prompt", prompt, "--max-tokens", "8"]
    before = smollm2_up.generate(*flags)
    assert before["prefilled"] == "remote", smollm2_up.log_of("decode")
    with smollm2_up.unsupervised():
        os.kill(smollm2_up.pid_of("prefill"), signal.SIGKILL)
        again = smollm2_up.generate("--prompt", prompt, "--max-tokens", "8")
        other = smollm2_up.generate("--prompt", "Now: " + prompt, "--max-tokens", "8")
    local = smollm2_up.generate("--prompt", "Now: " + prompt, "--max-tokens", "8", "--local")
    assert again["token_ids"] == before["token_ids"]
    assert other["token_ids"] == local["token_ids"]
    assert other["prefilled"] == "local"
    wait_until(smollm2_up.hands_over)


def test_every_path_the_readme_names_exists() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_.]*)`", README))
    assert len(named) > 15
    for path in named:
        assert (root / path).exists(), path


def test_a_program_that_closes_nothing_still_ends_well() -> None:
    script = """
from engine import LocalEngine, SamplingParams
engine = LocalEngine("smollm2")
stream = engine.stream("Hi there", SamplingParams(temperature=0, ignore_eos=True))
print([next(stream) for _ in range(3)])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
