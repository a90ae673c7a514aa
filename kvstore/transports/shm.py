"""``shm``: on one host, a receiver copies pages out of the owner's pool, which it has mapped.

The owner listens on a Unix socket of a random name and hands the pool's file to processes of its
own user only. The connection stays open: its end tells either side that the other one is gone.

The receiver copies first and looks at the slot's generation afterwards: the owner raises that
before anybody writes to a slot again, so an unchanged one means that the copy is of the content
that was announced. (It is also digested, like all that arrives.)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakSet

from kernels.layout import PageLayout
from kvstore.landing import LandingError
from kvstore.memory import LayerGroups, PageMemory
from kvstore.page import PageFrame
from kvstore.shared_pool import PAGE_ALIGNMENT, SharedMemoryUnavailable, SharedPool
from kvstore.transports import TransportUnavailable

CONNECT_TIMEOUT_S = 2.0
MAX_TOUCHED_BYTES = 1 << 30
_HELLO = struct.Struct("<8s16sQQ")  # magic, boot identity, number of pages, bytes of a page
_MAGIC = b"quireshm"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BACKLOG = 64
_ACCEPT_AGAIN_S = 1.0


class SharedMemoryTransport:
    """Both ends of one worker; made and closed in its event loop."""

    name = "shm"
    carries_payload = False

    def __init__(self, memory: PageMemory, boot_id: bytes) -> None:
        """``memory`` is in shared memory. Raises TransportUnavailable."""
        assert memory.shared is not None
        self._pool = memory.shared
        self._hello = _HELLO.pack(_MAGIC, boot_id, self._pool.num_pages, self._pool.page_bytes)
        self.reach = host_identity()
        self.address = b"\0quire-" + secrets.token_hex(16).encode()
        self._loop = asyncio.get_running_loop()
        self._receivers: set[socket.socket] = set()
        self._sources: WeakSet[MappedPool] = WeakSet()
        self._listener = _listener(self.address)
        self._listen()

    def reached_from(self, reach: bytes) -> bool:
        return reach == self.reach

    async def connect(self, address: bytes, owner: bytes, layout: PageLayout) -> MappedPool:
        attaching = asyncio.ensure_future(asyncio.to_thread(_attach, address, owner, layout))
        try:
            peer, pool = await asyncio.shield(attaching)
        except (OSError, SharedMemoryUnavailable) as error:
            raise TransportUnavailable(f"shm: no way to the pool: {error}") from None
        except asyncio.CancelledError:
            attaching.add_done_callback(_drop_attached)
            raise
        source = MappedPool(pool, LayerGroups(layout), peer)
        self._sources.add(source)
        self._loop.run_in_executor(None, _touch, pool)
        return source

    async def close(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for receiver in list(self._receivers):
            self._drop(receiver)
        for source in list(self._sources):
            source.close()
        self._pool.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            receiver, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no file descriptor is left: whoever waits goes on waiting
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(_ACCEPT_AGAIN_S, self._listen)
            return
        receiver.setblocking(False)
        try:
            _check_user(receiver)
            socket.send_fds(receiver, [self._hello], [self._pool.file])
        except OSError:  # another user's process, or one that has gone again
            receiver.close()
            return
        self._receivers.add(receiver)
        self._loop.add_reader(receiver.fileno(), self._drop, receiver)

    def _drop(self, receiver: socket.socket) -> None:
        """Receivers say nothing: what comes from one is its end."""
        self._loop.remove_reader(receiver.fileno())
        self._receivers.discard(receiver)
        receiver.close()


class MappedPool:
    """An owner's pool, mapped here; a ``PageSource``."""

    def __init__(self, pool: SharedPool, groups: LayerGroups, owner: socket.socket) -> None:
        self._pool: SharedPool | None = pool
        self._groups = groups
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(owner.fileno(), self.close)

    @property
    def lost(self) -> bool:
        return self._pool is None

    async def read(self, frames: Sequence[PageFrame], targets: Sequence[memoryview]) -> None:
        pool = self._pool
        if pool is None:
            raise LandingError("transport", "the owner's pool is gone")
        for frame, target in zip(frames, targets, strict=True):
            slot = frame.identity.reference.slot
            if slot >= pool.num_pages:
                raise LandingError("slot", f"slot {slot} of a pool of {pool.num_pages}")
            copy_group(pool, slot, self._groups.span(frame.layer_group), target)
            check_generation(pool, frame)

    def close(self) -> None:
        """Idempotent. The mapping goes, and with its last reader the owner's memory."""
        if self._pool is None:
            return
        self._pool = None
        self._loop.remove_reader(self._owner.fileno())
        self._owner.close()


def check_generation(pool: SharedPool, frame: PageFrame) -> None:
    """After the copy, for what was copied may have been on its way out. Raises LandingError."""
    reference = frame.identity.reference
    if pool.generations[reference.slot] != reference.generation:
        raise LandingError("generation", "the page moved on while it was read")


def copy_group(pool: SharedPool, slot: int, span: slice, target: memoryview) -> None:
    """Copies part of a page. Raises LandingError if it is not as long as its target."""
    source = pool.pages[slot, span].data
    if len(source) != len(target):
        raise LandingError("size", f"{len(source)} bytes of a page, not {len(target)}")
    target[:] = source


def host_identity() -> bytes:
    """Equal for processes that can reach each other's sockets and are of one user; 16 bytes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    network = os.stat("/proc/self/ns/net")
    place = f"{boot} {network.st_dev}:{network.st_ino} {os.geteuid()}"
    return hashlib.blake2b(place.encode(), digest_size=16).digest()


def _listener(address: bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise TransportUnavailable(f"shm: no socket: {error}") from None
    return listener


def _attach(address: bytes, owner: bytes, layout: PageLayout) -> tuple[socket.socket, SharedPool]:
    """Asks the owner for its pool. Raises OSError or SharedMemoryUnavailable."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.settimeout(CONNECT_TIMEOUT_S)
        peer.connect(address)
        _check_user(peer)
        hello, files, _, _ = socket.recv_fds(peer, _HELLO.size, 1)
        try:
            pool = _mapped(hello, files, owner, layout)
        finally:
            for file in files:
                os.close(file)
        peer.setblocking(False)
    except BaseException:
        peer.close()
        raise
    return peer, pool


def _touch(pool: SharedPool) -> None:
    """Fills in this process's page tables, so that no handover has to: a fault costs far more than
    the copy it is for. Numpy lets other threads run meanwhile."""
    pool.pages.reshape(-1)[:MAX_TOUCHED_BYTES:PAGE_ALIGNMENT].max()


def _drop_attached(attaching: asyncio.Future[tuple[socket.socket, SharedPool]]) -> None:
    """Nobody waits for it any more."""
    if not attaching.cancelled() and attaching.exception() is None:
        peer, _ = attaching.result()
        peer.close()


def _mapped(hello: bytes, files: Sequence[int], owner: bytes, layout: PageLayout) -> SharedPool:
    if len(hello) != _HELLO.size or len(files) != 1:
        raise SharedMemoryUnavailable("the owner refused")
    magic, boot_id, num_pages, page_bytes = _HELLO.unpack(hello)
    if magic != _MAGIC or boot_id != owner:
        raise SharedMemoryUnavailable("another process answered")
    if page_bytes != layout.page_bytes:
        raise SharedMemoryUnavailable(f"pages of {page_bytes} bytes, not {layout.page_bytes}")
    return SharedPool.attach(files[0], num_pages, page_bytes)


def _check_user(peer: socket.socket) -> None:
    """Raises PermissionError unless the other end is a process of this user."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise PermissionError("the other end belongs to another user")
