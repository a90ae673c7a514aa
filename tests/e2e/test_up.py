"""`quire up` and what the command line does with it, as separate processes of the hash model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import redis

from kvstore.index.keys import Keys
from tests.e2e.conftest import Up, start_up, wait_until

PROMPT = "a prompt that is long enough to be worth handing over. " * 8


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_up_tells_where_everything_is(hash_up: Up) -> None:
    roles = [service["role"] for service in hash_up.state["services"]]
    assert roles == ["prefill", "decode"]
    assert all(alive(service["pid"]) for service in hash_up.state["services"])
    with redis.Redis.from_url(hash_up.state["redis"]) as client:
        assert client.ping()


def test_generate_goes_through_both_services_and_equals_local(hash_up: Up) -> None:
    prompt = "computed in the one service, continued in the other. " * 8
    flags = ["--prompt", prompt, "--max-tokens", "24", "--temperature", "0.8", "--seed", "5"]
    remote = hash_up.generate(*flags)
    local = hash_up.generate(*flags, "--local", "--model", "hash")
    assert remote["prefilled"] == "remote", hash_up.log_of("decode")
    for key in ("prompt_ids", "token_ids", "text", "finish_reason", "seed"):
        assert remote[key] == local[key]
    assert set(remote["timings"]) == {"queue_s", "prefill_s", "first_token_s", "total_s"}


def test_generate_takes_ids_and_chat_and_names_what_is_wrong(hash_up: Up) -> None:
    ids = hash_up.generate("--prompt-ids", "1,2,3", "--max-tokens", "2")
    assert ids["prompt_ids"] == [1, 2, 3]
    chat = hash_up.generate("--prompt", "hi", "--chat", "--max-tokens", "2")
    assert len(chat["prompt_ids"]) > len("hi")
    for flags, word in (
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1,x"], "--prompt-ids"),
        (["--prompt-ids", "9999"], "prompt.token_ids"),
        (["--prompt", "x", "--model", "nobody"], "nobody"),
        (["--prompt", "x", "--endpoint", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--prompt", "x", "--draft", "hash"], "--draft"),
    ):
        result = hash_up.quire("generate", *flags, "--json")
        assert result.returncode == 1, (flags, result.stdout)
        assert word in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_choices_and_logprobs_are_in_the_json(hash_up: Up) -> None:
    flags = ["--prompt", "x", "--n", "3", "--temperature", "1", "--logprobs", "2"]
    found = hash_up.generate(*flags, "--max-tokens", "4")
    assert len(found["choices"]) == 3
    assert all(len(each["logprobs"]) == len(each["token_ids"]) for each in found["choices"])
    assert all(len(each["top"]) == 2 for each in found["choices"][0]["logprobs"])


def test_pages_lists_who_holds_what(hash_up: Up) -> None:
    hash_up.generate("--prompt", PROMPT, "--max-tokens", "4")
    wait_until(hash_up.holds_nothing)
    result = hash_up.quire("pages", "--check", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["orphans"], found["index_error"]) == ([], "")
    workers = found["workers"]
    assert [worker["role"] for worker in workers] == ["prefill", "decode"]
    for worker in workers:
        counts = worker["counts"]
        states = ("free", "filling", "sealed", "quarantined")
        assert sum(counts[state] for state in states) == counts["total"]
        assert worker["pages"]
        assert worker["problems"] == []
        for page in worker["pages"]:
            assert page["reason"] == "kept by the prefix cache"
            assert len(page["prefix_hash"]) == 32
    assert "kept by the prefix cache" in hash_up.quire("pages").stdout


def test_the_trace_goes_through_both_services(hash_up: Up) -> None:
    unseen = "another prompt, which no cache has seen yet, worth handing over. " * 5
    hash_up.generate("--prompt", unseen, "--max-tokens", "4")
    stages = ["admit", "queue", "choose", "prefill_queue", "prefill_chunk", "handover"]
    stages += ["verify", "join", "decode", "finish"]

    def complete() -> bool:
        tree = hash_up.quire("trace").stdout
        return all(stage in tree for stage in stages)

    wait_until(complete)


def test_chat_finds_its_turns_in_the_prefix_cache(hash_up: Up) -> None:
    turns = "first message, long enough for some pages of its own\nsecond message\n"
    result = subprocess.run(
        ["env", *_quire(), "chat", "--max-tokens", "20", "--seed", "1"],
        env=hash_up.environment,
        input=turns,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    first, second = (line for line in result.stderr.splitlines() if "prefix cache" in line)
    assert " 0 from the prefix cache" in first
    assert int(second.split(" from the prefix cache")[0].split()[-1]) >= 48


def _quire() -> list[str]:
    from tests.e2e.conftest import QUIRE

    return QUIRE


def test_an_interrupted_answer_frees_its_pages(hash_up: Up) -> None:
    process = subprocess.Popen(
        [*_quire(), "generate", "--prompt", PROMPT, "--ignore-eos", "--temperature", "1"],
        env=hash_up.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()
    wait_until(hash_up.holds_nothing)


def test_ctrl_c_in_a_chat_cancels_the_answer_and_keeps_the_conversation(hash_up: Up) -> None:
    process = subprocess.Popen(
        [*_quire(), "chat", "--ignore-eos", "--max-tokens", "2000", "--seed", "2"],
        env=hash_up.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"talk for ever, please, and do not end\n")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    wait_until(hash_up.holds_nothing)
    assert process.poll() is None
    _, errors = process.communicate(b"again\n", timeout=60)
    assert process.returncode == 0
    assert errors.count(b"[cancelled]") == 1
    assert errors.count(b"from the prefix cache, 2000 out]") == 1


def test_a_second_up_in_the_same_folder_is_refused(hash_up: Up) -> None:
    result = hash_up.quire("up", "--model", "hash")
    assert result.returncode == 1
    assert "another `quire up`" in result.stderr
    assert hash_up.process.poll() is None


def test_a_killed_prefill_service_costs_nothing_and_comes_back(hash_up: Up) -> None:
    flags = ["--prompt", "the prompt of the killed one. " * 20, "--max-tokens", "16"]
    before = hash_up.generate(*flags, "--local", "--model", "hash")
    killed = hash_up.pid_of("prefill")
    os.kill(killed, signal.SIGKILL)
    found = hash_up.generate(*flags)
    assert found["token_ids"] == before["token_ids"]
    wait_until(lambda: hash_up.pid_of("prefill") != killed)
    wait_until(hash_up.hands_over)


def test_a_prefill_service_killed_in_the_middle_of_a_handover_changes_no_token(
    tmp_path: Path,
) -> None:
    """One token a step, so that the handover takes seconds; killed when the first pages are out."""
    prompt = "the middle of a handover. " * 100
    flags = ["--prompt", prompt, "--max-tokens", "12", "--temperature", "1", "--seed", "3"]
    up = start_up(tmp_path / "state", "--model", "hash", QUIRE_CHUNK_TOKENS="1")
    request = subprocess.Popen(
        [*_quire(), "generate", *flags, "--json"],
        env=up.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: up.pages_of("prefill").counts.sealed > 5)
    os.kill(up.pid_of("prefill"), signal.SIGKILL)
    output, _ = request.communicate(timeout=60)
    found = json.loads(output)
    assert found["prefilled"] == "local", up.log_of("decode")
    assert found["token_ids"] == up.generate(*flags, "--local", "--model", "hash")["token_ids"]
    wait_until(lambda: not up.runs_something())
    assert up.stop() == 0


def test_without_redis_new_requests_are_served_and_workers_come_back(hash_up: Up) -> None:
    with redis.Redis.from_url(hash_up.state["redis"], retry=None) as client:
        with hash_up.unsupervised():
            os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)  # type: ignore[index]
            found = hash_up.generate("--prompt", "without redis " * 20, "--max-tokens", "4")
            assert found["prefilled"] == "remote", hash_up.log_of("decode")
            with pytest.raises(redis.ConnectionError):
                client.ping()

        def both_registered() -> bool:
            try:
                return client.hlen(Keys("quire").workers) == 2
            except redis.RedisError:
                return False

        wait_until(both_registered)
    wait_until(hash_up.hands_over)


def test_the_first_request_finds_the_prefill_service(tmp_path: Path) -> None:
    up = start_up(tmp_path / "state", "--model", "hash")
    found = up.generate("--prompt", "the first request " * 20, "--max-tokens", "4")
    assert found["prefilled"] == "remote", up.log_of("decode")
    assert up.stop() == 0


def test_up_stops_everything_on_sigterm_and_leaves_nothing(tmp_path: Path) -> None:
    up = start_up(tmp_path / "state", "--model", "hash")
    pids = [service["pid"] for service in up.state["services"]]
    assert up.stop(signal.SIGTERM) == 0
    assert not any(alive(pid) for pid in pids)
    assert not (up.folder / "up.json").exists()


def test_ctrl_c_in_the_terminal_lets_a_running_stream_finish(tmp_path: Path) -> None:
    up = start_up(tmp_path / "state", "--model", "hash")
    process = subprocess.Popen(
        [*_quire(), "generate", "--prompt", "x", "--ignore-eos", "--max-tokens", "1500", "--json"],
        env=up.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(up.runs_something)
    os.killpg(up.process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert up.process.wait(60) == 0
    assert len(json.loads(output)["token_ids"]) == 1500


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    environment = os.environ | {"QUIRE_STATE_DIR": str(tmp_path / "state")}
    result = subprocess.run(
        [*_quire(), "up", "--model", "/no/such/model"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "/no/such/model" in result.stderr
    assert not (tmp_path / "state" / "up.json").exists()
