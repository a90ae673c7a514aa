"""Scenarios from seeds: mostly harmless, each with a few faults, sometimes with tiny limits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from tests.simulation.scenario import MAX_OUTPUT, PATIENCE_S, PROMPTS, Ask, Fault, Scenario, Setup

LENGTHS = (1, 2, 15, 16, 17, 18, 31, 32, 33, 40, 48, 49, 64, 65, 80, 97)
MOST_PAGES = 1 + (max(LENGTHS) + MAX_OUTPUT) // 16


def draw(seed: int) -> Scenario:
    rng = random.Random(seed)
    setup = _setup(rng)
    crowded = rng.random() < 0.1
    if crowded:
        setup, asks = _crowd(rng, setup)
    else:
        asks = tuple(_ask(rng, setup) for _ in range(rng.choice((1, 2, 2, 3, 4))))
    faults = tuple(_fault(rng, setup) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))))
    if crowded and rng.random() < 0.4:
        faults += (_bad_swap(rng),)
    return _with_more(Scenario(seed, setup, asks, faults), crowded)


def _with_more(scenario: Scenario, crowded: bool) -> Scenario:
    """Caches that are read by others, drains, and clocks that differ; chance of its own, so that it
    leaves what was drawn before as it was."""
    rng = random.Random(f"more {scenario.seed}")
    if not crowded and rng.random() < 0.35:
        scenario = _with_pulls(rng, scenario)
    setup, faults = scenario.setup, scenario.faults
    if rng.random() < 0.15:
        seconds = rng.choice((0.001, 0.5))
        faults += (Fault("drain", _service(rng, setup), at=_moment(rng), seconds=seconds),)
        setup = replace(setup, drain_s=rng.choice((0.02, 0.5, 30.0)))
    if rng.random() < 0.25:
        setup = replace(setup, clocks_differ=True)
        jump_s = rng.choice((3600.0, -3600.0, -1.7e9))
        at = rng.choice((0.05, 0.2, 0.6)) * rng.random() + 1e-6
        faults += (Fault("set_clock", _service(rng, setup), at=at, seconds=jump_s),)
        if rng.random() < 0.5:  # then a lease must run out by itself
            faults += (Fault("cut", rng.choice(("release", "unlease")), call=rng.randrange(2)),)
    return replace(scenario, setup=setup, faults=faults)


def _with_pulls(rng: random.Random, scenario: Scenario) -> Scenario:
    """Two decode services that prefer each other's caches: what one has answered is asked of the
    other when it may have heard of it."""
    setup = replace(
        scenario.setup,
        num_decode=2,
        prefer="pull",
        page_lease_s=rng.choice((0.05, 0.3, 10.0)),
    )
    first = replace(_ask(rng, setup), num_prompt=rng.choice((49, 64, 80, 97)), leaves_s=None)
    first = replace(first, at=0.0, timeout_s=PATIENCE_S)
    later = tuple(
        replace(
            _ask(rng, setup),
            at=rng.choice((0.3, 1.2, 2.6)) + 0.1 * rng.random(),
            text=first.text,
            num_prompt=rng.choice((49, 65, 80, 97)),
            decode=1 - first.decode,
        )
        for _ in range(rng.choice((1, 1, 2, 6)))
    )
    if rng.random() < 0.4:  # the holder must make room while it is asked
        setup = replace(setup, decode_pages=MOST_PAGES)
        other = replace(
            _ask(rng, setup),
            at=later[0].at - 0.05 * rng.random(),
            text=(first.text + 1) % len(PROMPTS),
            num_prompt=97,
            max_tokens=MAX_OUTPUT,
            decode=first.decode,
        )
        later += (other,)
    faults = tuple(_pull_fault(rng) for _ in range(rng.choice((0, 1, 1, 2))))
    if rng.random() < 0.3:
        at = later[0].at + rng.choice((0.001, 0.02)) * rng.random()
        kind = rng.choice(("crash", "freeze", "drain"))
        node = f"decode{rng.randrange(2)}"
        faults += (Fault(kind, node, at=at, seconds=rng.choice((0.01, 0.5, 2.0))),)
    return replace(scenario, setup=setup, asks=(first, *later), faults=scenario.faults[:1] + faults)


def _pull_fault(rng: random.Random) -> Fault:
    kind = rng.choice(("cut", "late", "flip", "twice", "swap", "again"))
    route = rng.choices(("read", "lease", "unlease", "identify"), (6, 3, 1, 1))[0]
    if kind == "again":
        route = rng.choice(("lease", "unlease"))
        seconds, bit = rng.choice((0.0001, 0.02, 0.3)) * rng.random(), rng.choice((0, 0, 1))
        return Fault(kind, route, call=rng.randrange(2), seconds=seconds, bit=bit)
    if route != "read" and kind in ("twice", "swap"):
        kind = "cut"
    first = 1 if kind in ("twice", "swap", "flip") else 0
    return Fault(
        kind,
        route,
        call=rng.randrange(2),
        message=rng.randint(first, 8 if route == "read" else 1),
        seconds=rng.choice((0.01, 0.3, 6.0)) if kind == "late" else 0.0,
        bit=rng.randrange(4096) if kind == "flip" else 0,
    )


def _setup(rng: random.Random) -> Setup:
    slow = rng.random() < 0.2
    return Setup(
        num_prefill=rng.choice((0, 1, 1, 1, 2)),
        num_decode=rng.choice((1, 1, 1, 2)),
        prefill_pages=rng.choice((MOST_PAGES, MOST_PAGES + 2, 16, 32)),
        decode_pages=rng.choice((MOST_PAGES, MOST_PAGES + 1, MOST_PAGES + 3, 16, 32)),
        max_sequences=rng.choice((1, 2, 4, 8)),
        chunk_tokens=rng.choice((5, 16, 24, 64)),
        min_remote_tokens=rng.choice((1, 16, 16, 32)),
        lease_s=rng.choice((0.05, 0.3, 1.0)),
        handover_idle_s=rng.choice((0.7, 1.5)),
        swap_pages=rng.choice((0, 3, 20)),
        max_prompts=rng.choice((1, 64, 64)),
        max_latency_s=0.05 if slow else rng.choice((0.0005, 0.005)),
        max_step_s=rng.choice((0.0005, 0.003, 0.02)),
        num_layer_groups=rng.choice((1, 2)),
    )


def _crowd(rng: random.Random, setup: Setup) -> tuple[Setup, tuple[Ask, ...]]:
    """Long answers at once in a small pool: pages run out under way."""
    setup = replace(setup, decode_pages=MOST_PAGES, max_sequences=8)
    lengths = rng.sample(LENGTHS, 5)
    asks = (
        Ask(0.003 * rng.random(), rng.randrange(len(PROMPTS)), length, MAX_OUTPUT)
        for length in lengths
    )
    return setup, tuple(asks)


def _ask(rng: random.Random, setup: Setup) -> Ask:
    timeout_s = PATIENCE_S
    leaves_s = None
    if rng.random() < 0.15:
        timeout_s = rng.choice((0.001, 0.02, 0.2))
    elif rng.random() < 0.2:
        leaves_s = rng.choice((0.0, 0.005, 0.02, 0.1)) * rng.random()
    return Ask(
        at=rng.choice((0.0, 0.01, 0.1)) * rng.random(),
        text=rng.randrange(len(PROMPTS)),
        num_prompt=rng.choice(LENGTHS),
        max_tokens=rng.choice((1, 2, 5, 10, MAX_OUTPUT)),
        choices=2 if rng.random() < 0.15 and setup.max_sequences > 1 else 1,
        temperature=0.8 if rng.random() < 0.1 else 0.0,
        timeout_s=timeout_s,
        leaves_s=leaves_s,
        decode=rng.randrange(setup.num_decode),
    )


def _fault(rng: random.Random, setup: Setup) -> Fault:
    makers: list[tuple[int, Callable[[], Fault]]] = [
        (3, lambda: _crash(rng, setup)),
        (2, lambda: _freeze(rng, setup)),
        (1, lambda: _index_fault(rng)),
        (10, lambda: _wire_fault(rng)),
    ]
    weights = [weight for weight, _ in makers]
    return rng.choices([make for _, make in makers], weights)[0]()


def _crash(rng: random.Random, setup: Setup) -> Fault:
    return Fault("crash", _service(rng, setup), at=_moment(rng), seconds=rng.choice((0.001, 0.5)))


def _freeze(rng: random.Random, setup: Setup) -> Fault:
    seconds = rng.choice((0.01, 0.5, 2.0))
    return Fault("freeze", _service(rng, setup), at=_moment(rng), seconds=seconds)


def _index_fault(rng: random.Random) -> Fault:
    kind = rng.choice(("no_index", "unheard", "empty_index"))
    return Fault(kind, at=_moment(rng), seconds=rng.choice((0.05, 1.0, 4.0)))


def _bad_swap(rng: random.Random) -> Fault:
    return Fault("bad_swap", call=rng.randrange(3), bit=rng.randrange(4096))


def _wire_fault(rng: random.Random) -> Fault:
    kind = rng.choice(("cut", "late", "twice", "swap", "flip", "flip", "again"))
    route = rng.choices(("prefill", "release", "generate"), (8, 2, 1))[0]
    if route == "generate":
        kind = rng.choice(("cut", "late"))
    if kind == "again" or (route == "release" and kind in ("twice", "swap", "flip")):
        again = Fault("again", rng.choice(("prefill", "release")), call=rng.randrange(3))
        return Fault(
            again.kind,
            again.node,
            call=again.call,
            seconds=rng.choice((0.0001, 0.02, 0.3)) * rng.random(),
            bit=rng.choice((0, 0, 1)),
        )
    first = 1 if kind in ("twice", "swap", "flip") else 0
    return Fault(
        kind,
        route,
        call=rng.randrange(3),
        message=rng.randint(first, 1 if route == "release" else 9),
        seconds=rng.choice((0.01, 0.3, 6.0)) if kind == "late" else 0.0,
        bit=rng.randrange(4096) if kind == "flip" else 0,
    )


def _service(rng: random.Random, setup: Setup) -> str:
    names = [f"prefill{number}" for number in range(setup.num_prefill)] * 2
    names += [f"decode{number}" for number in range(setup.num_decode)]
    return rng.choice(names)


def _moment(rng: random.Random) -> float:
    """Mostly while something is going on."""
    return rng.choice((0.005, 0.05, 0.2)) * rng.random() + 1e-6
