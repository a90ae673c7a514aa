"""``quire trace``: a request's spans as a tree with durations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.state import state_dir
from engine.telemetry.trace_tree import one_trace, read_spans, render_tree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace_id", nargs="?", help="32 hex digits (default: the latest trace)")
    parser.add_argument("--file", type=Path, help="a trace file (default: that of `quire up`)")


def run(options: argparse.Namespace) -> int:
    path = options.file or trace_file()
    spans = one_trace(read_spans(path), options.trace_id) if path.exists() else []
    if not spans:
        print(f"quire trace: no such trace in {path}", file=sys.stderr)
        return 1
    print(render_tree(spans))
    return 0


def trace_file() -> Path:
    """Where ``quire up`` lets its services write their spans."""
    return state_dir() / "trace.jsonl"
