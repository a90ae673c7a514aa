"""`quire check`: what it says of this machine, and how it comes to the speed it expects."""

from __future__ import annotations

import json

import pytest

from engine.cli import check, main
from kvstore.transports import choice


def checked(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, dict[str, object]]:
    assert main.main(["check", "--model", "hash", *flags, "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    return {finding["what"]: finding for finding in findings}


@pytest.fixture(autouse=True)
def _bandwidth_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_read_gbps", lambda: 27.0)


def test_the_expected_speed_is_bandwidth_over_weights_and_says_so() -> None:
    text = check.expected_speed(weight_bytes=135_000_000, read_gbps=27.0)
    assert "about 200 tokens/s at batch 1" in text
    assert "27.0 GB/s / 135 MB" in text


def test_a_check_names_cores_instruction_set_bandwidth_and_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.threads.cgroup_quota", lambda *_: 1.5)
    findings = checked(capsys)
    assert "a CPU quota of 1.5" in str(findings["cores"]["detail"])
    assert "instruction set" in str(findings["kernels"]["detail"])
    assert "27.0 GB/s" in str(findings["memory bandwidth"]["detail"])
    assert "tokens/s" in str(findings["expected speed"]["detail"])


def test_the_mode_asked_for_is_the_one_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert "bf16 KV" in str(checked(capsys, "--kv", "bf16")["model"]["detail"])


def test_a_mode_that_does_not_exist_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "--model", "hash", "--weights", "fp31"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert len(lines) == 2
    assert all("fp31" in line for line in lines)


def test_without_the_native_module_the_bandwidth_is_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_read_gbps", lambda: None)
    findings = checked(capsys)
    for what in ("memory bandwidth", "expected speed"):
        assert findings[what]["ok"]
        assert "not measured" in str(findings[what]["detail"])


def test_every_transport_is_available_or_says_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "problem_of", {"nixl": "no such library"}.get)
    assert set(check.TRANSPORTS) == set(choice.NAMES)
    findings = checked(capsys)
    assert findings["transport grpc"]["detail"] == "available"
    assert findings["transport shm"]["detail"] == "available"
    assert findings["transport nixl"]["detail"] == ("refused if asked for by name: no such library")
