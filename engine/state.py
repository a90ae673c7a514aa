"""The state folder: where ``quire up`` tells other commands what is running."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One running service; ``endpoint`` is host:port."""

    role: str
    pid: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class UpState:
    """What ``up.json`` says."""

    redis: str
    services: tuple[ServiceEntry, ...]

    def endpoints(self, role: str) -> list[str]:
        return [service.endpoint for service in self.services if service.role == role]


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``$QUIRE_STATE_DIR``, or ``quire`` in the XDG state folder."""
    if environ.get("QUIRE_STATE_DIR"):
        return Path(environ["QUIRE_STATE_DIR"])
    home = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "quire"


def write_up_state(state: UpState, folder: Path) -> None:
    """Replaces ``up.json`` in one move, so that no reader sees half of it."""
    draft = folder / "up.json.new"
    draft.write_text(json.dumps(asdict(state), indent=2) + "\n")
    draft.replace(folder / "up.json")


def read_up_state(folder: Path) -> UpState | None:
    """What is running according to ``up.json``; None if there is no readable one."""
    try:
        found = json.loads((folder / "up.json").read_text())
        services = tuple(ServiceEntry(**entry) for entry in found["services"])
        return UpState(found["redis"], services)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_up_state(folder: Path) -> None:
    (folder / "up.json").unlink(missing_ok=True)
