"""Which way a prompt's pages come here soonest: computed here, handed over, or read from a cache.

Every way is predicted in seconds from running estimates; the least wins. The way taken last stays
unless another one is clearly better, so that noise does not make it swing. A way that was not
measured for long is tried now and then, if that cannot cost much, so that an estimate that has
become wrong does not stay wrong. Knows no clock of its own. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from decode_svc.estimates import PeerCosts, Rate

LOCAL_TOKENS_PER_S = 1_000.0  # before anything was measured

KEEP_MARGIN = 1.2  # the way taken last may be predicted this much slower than the best
PROBE_AGE_S = 60.0  # a way not measured for so long may be tried,
PROBE_EVERY = 16  # at one of so many decisions at most,
PROBE_MARGIN = 4.0  # if it is predicted to take at most so many times as long as the best,
PROBE_COST_S = 0.25  # or at most so long
MAX_PULL_S = 4.0  # leases are for seconds: what takes longer is computed
MIN_CHUNK_TOKENS = 16  # a step with fewer prompt rows tells about decoding, not about prompts


class Way(StrEnum):
    LOCAL = "local"  # computed here
    REMOTE = "remote"  # handed over by a prefill worker
    PULL = "pull"  # read from a cache, the rest computed here
    PULL_REMOTE = "pull_remote"  # read from a cache, the rest handed over

    @property
    def pulls(self) -> bool:
        return self in (Way.PULL, Way.PULL_REMOTE)

    @property
    def hands_over(self) -> bool:
        return self in (Way.REMOTE, Way.PULL_REMOTE)


@dataclass(frozen=True, slots=True)
class Situation:
    """A prompt and what there is to help with it. Counts are of tokens.

    ``missing`` are not here; the first ``held`` of them lie in one other worker's cache, and the
    first ``hit`` in the cache of the prefill worker (negative: it lacks some that are here), which
    has ``queued`` others to compute first; ``queued`` is None without a prefill worker.
    ``num_running`` sequences are decoded here. ``holder`` and ``worker`` are the boot identities of
    the cache's owner and of the prefill worker.
    """

    missing: int
    held: int = 0
    hit: int = 0
    queued: int | None = None
    num_running: int = 0
    holder: str = ""
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """``why`` is "only", "least", "kept", "probe" or "forced"; ``predicted_s`` is by way."""

    way: Way
    why: str
    predicted_s: Mapping[Way, float]


_FORCED: Mapping[str, tuple[Way, ...]] = {
    "remote": (Way.REMOTE,),
    "pull": (Way.PULL_REMOTE, Way.PULL, Way.REMOTE),
}
PREFERENCES = ("auto", *_FORCED)


class Decider:
    """Predicts, decides, learns. ``preference`` is one of PREFERENCES; all but "auto" force a way
    wherever it is possible. One event loop uses it."""

    def __init__(
        self, preference: str, min_remote_tokens: int, token_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._preference = preference
        self._min_remote_tokens = min_remote_tokens
        self._token_bytes = token_bytes
        self._clock = clock
        self._began = clock()
        self._local = Rate(LOCAL_TOKENS_PER_S)
        self.peers = PeerCosts()
        self._last = Way.REMOTE
        self._num_since_probe = 0

    def decide(self, situation: Situation) -> Decision:
        predicted = self.predict(situation)
        if self._preference != "auto":
            ways = (*_FORCED[self._preference], Way.LOCAL)
            forced = next(way for way in ways if way in predicted)
            return Decision(forced, "forced", predicted)
        if len(predicted) == 1:
            return Decision(Way.LOCAL, "only", predicted)
        best = min(predicted, key=lambda way: predicted[way])
        self._num_since_probe += 1
        probe = self._to_probe(situation, predicted, best)
        if probe is not None:
            self._num_since_probe = 0
            return Decision(probe, "probe", predicted)
        if self._last in predicted and predicted[self._last] <= predicted[best] * KEEP_MARGIN:
            return Decision(self._last, "least" if self._last is best else "kept", predicted)
        self._last = best
        return Decision(best, "least", predicted)

    def predict(self, situation: Situation) -> dict[Way, float]:
        """Seconds until the missing tokens are here, by every way there is."""
        missing, rest = situation.missing, situation.missing - situation.held
        ways = {Way.LOCAL: self._local_s(missing, situation.num_running)}
        if situation.queued is not None:
            ways[Way.REMOTE] = self._remote_s(
                situation.worker, missing, situation.hit, situation.queued
            )
        pull_s = self._pull_s(situation.holder, situation.held)
        if not situation.held or pull_s > MAX_PULL_S:
            return ways
        ways[Way.PULL] = pull_s + self._local_s(rest, situation.num_running)
        if situation.queued is not None and rest >= self._min_remote_tokens:
            hit = situation.hit - situation.held
            ways[Way.PULL_REMOTE] = pull_s + self._remote_s(
                situation.worker, rest, hit, situation.queued
            )
        return ways

    def saw_chunk(self, num_tokens: int, seconds: float) -> None:
        """A step here had so many rows of a prompt."""
        if num_tokens >= MIN_CHUNK_TOKENS:
            self._local.observe(num_tokens, seconds, self._clock())

    def saw_handover(
        self,
        worker: str,
        queued: int,
        delay_s: float,
        seconds: float,
        num_computed: int,
        num_bytes: int,
    ) -> None:
        """A prefill worker with so many tokens queued took up a prompt after ``delay_s``, and
        needed so many seconds from then on to compute ``num_computed`` and send so many bytes."""
        now = self._clock()
        own_delay_s = delay_s - queued / self.peers.of(worker).computing.value
        for costs in self.peers.to_learn(worker):
            costs.handover_delay.observe(own_delay_s)
            if num_computed > 0:
                costs.computing.observe(num_computed, seconds, now)
            else:
                costs.moving.observe(num_bytes, seconds, now)

    def saw_pull(self, holder: str, delay_s: float, seconds: float, num_bytes: int) -> None:
        """A lease was granted after ``delay_s``, and its bytes read in so many seconds."""
        for costs in self.peers.to_learn(holder):
            costs.pull_delay.observe(delay_s)
            costs.pulling.observe(num_bytes, seconds, self._clock())

    def _local_s(self, num_tokens: int, num_running: int) -> float:
        """Whoever is decoded here waits for these rows too: their seconds count as much."""
        return num_tokens / self._local.value * (1 + num_running)

    def _remote_s(self, worker: str, num_tokens: int, hit: int, queued: int) -> float:
        """Pages leave while the next are computed: the slower of the two decides."""
        costs = self.peers.of(worker)
        compute_s = (queued + max(num_tokens - hit, 0)) / costs.computing.value
        move_s = num_tokens * self._token_bytes / costs.moving.value
        return costs.handover_delay.value + max(compute_s, move_s)

    def _pull_s(self, holder: str, num_tokens: int) -> float:
        costs = self.peers.of(holder)
        return costs.pull_delay.value + num_tokens * self._token_bytes / costs.pulling.value

    def _to_probe(
        self, situation: Situation, predicted: Mapping[Way, float], best: Way
    ) -> Way | None:
        """The way that was not measured for longest, if it is time to try one."""
        if self._num_since_probe < PROBE_EVERY:
            return None
        measured = {
            Way.LOCAL: self._local.measured_at,
            Way.REMOTE: self.peers.of(situation.worker).handed_over_at,
            Way.PULL: self.peers.of(situation.holder).pulling.measured_at,
        }
        bearable = max(predicted[best] * PROBE_MARGIN, PROBE_COST_S)
        ages = {
            way: self._clock() - (self._began if at is None else at)
            for way, at in measured.items()
            if way in predicted and predicted[way] <= bearable
        }
        oldest = max(ages, key=lambda way: ages[way], default=None)
        return oldest if oldest is not None and ages[oldest] >= PROBE_AGE_S else None
