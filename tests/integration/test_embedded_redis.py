"""The embedded server as a child process: where it listens, and when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvstore import embedded
from kvstore.embedded import EmbeddedRedis, EmbeddedRedisError

PATIENCE_S = 20.0

# Prints the server's pid and URL, then waits for Ctrl-C, and shows what is left of the server then.
SUPERVISOR = """
import signal, sys
from pathlib import Path
import redis
from kvstore.embedded import EmbeddedRedis

with EmbeddedRedis(Path(sys.argv[1])) as server:
    try:
        print(server.pid, server.url, flush=True)
        signal.pause()
    except KeyboardInterrupt:
        with redis.Redis.from_url(server.url, protocol=2) as client:
            print("drained" if client.ping() and server.alive else "lost", flush=True)
print("stopped", flush=True)
"""


def eventually(condition: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


def answers(url: str) -> bool:
    with redis.Redis.from_url(url, protocol=2, socket_timeout=1.0, retry=None) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with an embedded server, both in a process group of their own as in a shell."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def test_server_answers_on_loopback_only_and_keeps_nothing(tmp_path):
    with EmbeddedRedis(tmp_path) as server:
        with redis.Redis.from_url(server.url, protocol=2) as client:
            assert server.url.startswith("redis://127.0.0.1:")
            assert client.config_get("bind")["bind"] == "127.0.0.1"
            assert client.config_get("save")["save"] == ""
            assert client.config_get("appendonly")["appendonly"] == "no"
            assert client.info("server")["process_id"] == server.pid
            client.set("left", "behind", ex=60)
        first_url = server.url
        server.stop()
        assert not answers(first_url)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["valkey.log"]

        server.start()
        assert server.url == first_url
        with redis.Redis.from_url(server.url, protocol=2) as client:
            assert client.dbsize() == 0


def test_given_port_is_used_and_a_taken_one_is_refused_with_the_log(tmp_path):
    with EmbeddedRedis(tmp_path / "one") as one:
        port = int(one.url.removesuffix("/0").rsplit(":", 1)[1])
        other = EmbeddedRedis(tmp_path / "other", port)
        with pytest.raises(EmbeddedRedisError, match="in use"):
            other.start()
        assert not other.alive
        one.stop()
        with other:
            assert other.url == f"redis://127.0.0.1:{port}/0"


def test_port_taken_by_another_server_in_the_meantime_is_not_mistaken_for_ours(
    tmp_path, monkeypatch
):
    with EmbeddedRedis(tmp_path / "rival") as rival:
        taken = int(rival.url.removesuffix("/0").rsplit(":", 1)[1])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        ports = iter([taken, taken, free])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        with EmbeddedRedis(tmp_path / "ours") as ours:
            assert ours.url == f"redis://127.0.0.1:{free}/0"
            assert ours.pid != rival.pid


def test_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(EmbeddedRedisError, match="no-such-option"):
        EmbeddedRedis(tmp_path, options={"no-such-option": "1"}).start()


def test_stopped_process_is_ended_by_force(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.1)
    server = EmbeddedRedis(tmp_path)
    server.start()
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not answers(server.url)
    server.stop()


def test_ctrl_c_reaches_the_parent_and_leaves_the_server_until_it_has_drained(supervisor):
    server_pid, url = supervisor.stdout.readline().split()
    assert answers(url)
    assert os.getpgid(int(server_pid)) != os.getpgid(supervisor.pid)
    os.killpg(supervisor.pid, signal.SIGINT)
    assert supervisor.stdout.readline() == "drained\n"
    assert supervisor.stdout.readline() == "stopped\n"
    assert supervisor.wait(PATIENCE_S) == 0
    assert not answers(url)


def test_server_does_not_outlive_a_killed_parent(supervisor):
    _, url = supervisor.stdout.readline().split()
    assert answers(url)
    supervisor.kill()
    assert eventually(lambda: not answers(url))


def test_program_whose_parent_ended_before_it_was_tied_to_it_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    tether = Path(embedded.__file__).with_name("tether.py")
    never_a_parent = "0"
    done = subprocess.run(
        [sys.executable, "-I", "-S", tether, never_a_parent, "touch", marker],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "parent ended first" in done.stderr
    assert not marker.exists()
