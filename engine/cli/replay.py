"""``quire replay``: a recorded run once more, on the scheduler of this version."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.recording import RecordingError, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what a service wrote with --record")


def run(options: argparse.Namespace) -> int:
    num_answers = 0
    try:
        for difference in replay(options.file):
            if difference is not None:
                print(
                    f"quire replay: {options.file}:{difference.line} differs\n"
                    f"recorded: {difference.recorded}\nnow:      {difference.given}",
                    file=sys.stderr,
                )
                return 1
            num_answers += 1
    except (RecordingError, OSError) as error:
        print(f"quire replay: {error}", file=sys.stderr)
        return 1
    print(f"{num_answers} answers of the scheduler, all the same again")
    return 0
