"""``quire``: argument parsing and dispatch. Subcommands import what they need themselves."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from engine.errors import QuireError

_COMMANDS = {
    "up": "start Redis, a prefill and a decode service on this machine",
    "generate": "complete a prompt",
    "chat": "talk to the model",
    "pages": "list the pages of all workers: who holds what, since when, why",
    "check": "say what this machine and installation can do",
    "trace": "print the trace of the last request as a tree",
    "replay": "run a recording of a scheduler again and compare every plan",
    "draft": "train a small head that drafts for a model",
    "demo": "up, one answer, its trace, down",
}
_PROGRAMS = {
    "prefill": ("prefill_svc", "run a prefill service"),
    "decode": ("decode_svc", "run a decode service"),
    "bench": ("bench", "measure"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _PROGRAMS:
        module, _ = _PROGRAMS[arguments[0]]
        # Becomes the program, so that signals sent to this process reach it.
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments[1:]])
    parser = argparse.ArgumentParser(prog="quire", description="Disaggregated LLM serving.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_text, description=help_text)
        if arguments[:1] == [name]:
            importlib.import_module(f"engine.cli.{name}").add_arguments(subparser)
    for name, (_, help_text) in _PROGRAMS.items():
        subparsers.add_parser(name, help=help_text)
    options = parser.parse_args(arguments)
    try:
        command = importlib.import_module(f"engine.cli.{options.command}")
        return int(command.run(options))
    except QuireError as error:
        print(f"quire {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
