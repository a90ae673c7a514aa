"""The simulation by hand: seeds by the thousand, or one history told line by line."""

from __future__ import annotations

import argparse
import gc
import sys

import torch

from tests.simulation.campaign import explore
from tests.simulation.draw import draw
from tests.simulation.scenario import Scenario
from tests.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0:200", help="first and end, as 0:200")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--seed", type=int, help="one seed, told line by line")
    parser.add_argument("--history", help="a history in JSON, as a failure prints it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    if options.history or options.seed is not None:
        found = Scenario.from_json(options.history) if options.history else draw(options.seed)
        return tell(found)
    first, _, end = options.seeds.partition(":")
    report = explore(range(int(first), int(end)))
    if options.json:
        print(report.to_json())
        return 0
    print(*report.failures, sep="\n\n")
    for state, count in sorted(report.reached.items()):
        print(f"{count:6} {state}")
    print(f"{len(report.failures)} of {report.num_seeds} seeds failed; digest {report.digest}")
    return bool(report.failures)


def tell(scenario: Scenario) -> int:
    print(scenario.setup, *scenario.asks, *scenario.faults, sep="\n")
    result = simulate(scenario, keep_lines=True)
    print(*result.lines, *result.problems, f"digest {result.digest}", sep="\n")
    return bool(result.problems)


if __name__ == "__main__":
    sys.exit(main())
