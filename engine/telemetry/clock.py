"""One clock for spans and durations: wall-clock nanoseconds that never jump.

The wall clock is read once per process; from then on the monotonic clock counts. A correction of
the wall clock while a request runs moves no duration.
"""

from __future__ import annotations

import time

_START_NS = time.time_ns() - time.monotonic_ns()


def now_ns() -> int:
    """Nanoseconds since the epoch, as of this process's start, going on steadily."""
    return _START_NS + time.monotonic_ns()
