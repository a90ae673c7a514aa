"""Every Redis key of the page index. All of them have a time to live.

::

    <prefix>:{workers}                     hash   boot id -> "<deadline> <endpoint> <JSON>"
    <prefix>:{pages:<fingerprint>}:<hash>  zset   boot id of a holder, scored by its deadline
    <prefix>:{handover:<request id>}       hash   the present attempt, see scripts/handover_offer

Deadlines are milliseconds of the server's own clock, set and compared only in scripts. The part in
braces chooses the slot of a Redis cluster: all pages of a fingerprint share one, so that a single
script can walk a prompt's prefix.
"""

from __future__ import annotations

import re

_PAGE = re.compile(rb":\{pages:([0-9a-f]{32})\}:([0-9a-f]{32})")


class Keys:
    """Names under one ``prefix``, so that several installations may share a server."""

    def __init__(self, prefix: str) -> None:
        if not prefix or "{" in prefix or "}" in prefix:
            raise ValueError("prefix must be text without braces")
        self._prefix = prefix

    @property
    def workers(self) -> str:
        return f"{self._prefix}:{{workers}}"

    def page(self, fingerprint: str, prefix_hash: bytes) -> str:
        return f"{self._prefix}:{{pages:{fingerprint}}}:{prefix_hash.hex()}"

    @property
    def all_pages(self) -> str:
        """A pattern of every ``page``, as SCAN takes it."""
        return re.sub(r"([][*?\\])", r"\\\1", self._prefix) + ":{pages:*}:*"

    def parse_page(self, key: bytes) -> tuple[str, bytes] | None:
        """Fingerprint and prefix hash of a ``page``; None for any other key."""
        found = _PAGE.fullmatch(key[len(self._prefix.encode()) :])
        return (found[1].decode(), bytes.fromhex(found[2].decode())) if found else None

    def handover(self, request_id: str) -> str:
        return f"{self._prefix}:{{handover:{request_id}}}"
