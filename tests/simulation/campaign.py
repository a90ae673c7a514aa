"""Many seeds, one after the other, and what came of them; several processes share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import xxhash

from tests.simulation.draw import draw
from tests.simulation.scenario import Scenario
from tests.simulation.shrink import shrunk
from tests.simulation.world import simulate

ROOT = Path(__file__).parents[2]
MAX_FAILURES = 3  # shrinking more would take long and tell little


@dataclass
class Report:
    """``failures`` are shrunk histories in words; ``reached`` counts the seeds of each state."""

    num_seeds: int = 0
    failures: list[str] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)
    digest: str = ""

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found = json.loads(text)
        return cls(
            found["num_seeds"], found["failures"], Counter(found["reached"]), found["digest"]
        )


def explore(seeds: Iterable[int]) -> Report:
    """Simulates every seed in this process; stops after a few failures."""
    report = Report()
    digest = xxhash.xxh3_128()
    for seed in seeds:
        scenario = draw(seed)
        result = simulate(scenario)
        report.num_seeds += 1
        report.reached.update(result.reached)
        digest.update(result.digest.encode())
        if result.problems:
            report.failures.append(explained(scenario))
            if len(report.failures) == MAX_FAILURES:
                break
    report.digest = digest.hexdigest()
    return report


def explore_in_processes(num_seeds: int, first: int = 0) -> Report:
    """The same with all cores that this process may use."""
    num_processes = len(os.sched_getaffinity(0))
    bounds = [first + num_seeds * n // num_processes for n in range(num_processes + 1)]
    running = [begin(f"{bounds[n]}:{bounds[n + 1]}") for n in range(num_processes)]
    reports = [Report.from_json(process.communicate()[0]) for process in running]
    return Report(
        num_seeds=sum(report.num_seeds for report in reports),
        failures=[failure for report in reports for failure in report.failures],
        reached=sum((report.reached for report in reports), Counter()),
        digest=" ".join(report.digest for report in reports),
    )


def begin(seeds: str, **environment: str) -> subprocess.Popen[str]:
    """A process that explores some seeds and prints its report."""
    command = [sys.executable, "-m", "tests.simulation", "--json", "--seeds", seeds]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def explained(scenario: Scenario) -> str:
    """The smallest history found that still fails, what fails in it, and how to see it again."""
    smallest = shrunk(scenario, lambda each: bool(simulate(each).problems))
    result = simulate(smallest, keep_lines=True)
    return "\n".join(
        [
            f"seed {scenario.seed}, shrunk to {len(smallest.asks)} requests and "
            f"{len(smallest.faults)} faults:",
            *(f"  {problem}" for problem in result.problems),
            *(f"  {ask}" for ask in smallest.asks),
            *(f"  {fault}" for fault in smallest.faults),
            f"replay: python -m tests.simulation --history '{smallest.to_json()}'",
        ]
    )
