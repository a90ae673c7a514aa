"""Text out of token bytes as it becomes certain: whole characters, up to a stop string.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """``text[start:end]`` is ``stop``."""

    start: int
    end: int
    stop: str


class TextStream:
    """Decodes UTF-8 piece by piece and watches for stop strings.

    ``push`` and ``flush`` return text that nothing later can take back; put together it is the
    whole text. Held back are the bytes of an unfinished character and any end of the text that is
    the beginning of a stop string. Bytes that are no UTF-8 become U+FFFD, as ``bytes.decode`` with
    ``errors="replace"`` makes them of the whole.

    A stop string is found with the piece that completes it. If one piece completes several, the one
    that begins first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_character = False
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: bytes, *, may_stop: bool = True) -> str:
        """Takes the bytes of one token; once ``matched`` is set the text is whole.

        Without ``may_stop`` a stop string that this piece completes is ordinary text for good.
        """
        assert self.matched is None, "the text has ended"
        if not self._stops:
            return self._decode(piece)
        num_held = len(self._held)
        self._held += self._decode(piece)
        match = self._find_stop(num_held) if may_stop else None
        if match is None:
            return self._release(len(self._held) - self._num_waiting())
        self.matched = match.stop
        return self._release(match.end if self._include_stop else match.start)

    def flush(self) -> str:
        """The rest of a text that ends without a stop string; it is not searched for one."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(len(self._held))

    def _decode(self, piece: bytes) -> str:
        if not self._in_character and piece.isascii():
            return piece.decode()
        text = self._decoder.decode(piece)
        self._in_character = bool(self._decoder.getstate()[0])
        return text

    def _release(self, num_characters: int) -> str:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        return text

    def _find_stop(self, num_old: int) -> StopMatch | None:
        """The match to end at, among those that end after the first ``num_old`` characters."""
        matches = []
        for stop in self._stops:
            start = self._held.find(stop, max(num_old + 1 - len(stop), 0))
            if start >= 0:
                matches.append(StopMatch(start, start + len(stop), stop))
        return min(matches, key=lambda match: (match.start, -match.end), default=None)

    def _num_waiting(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
