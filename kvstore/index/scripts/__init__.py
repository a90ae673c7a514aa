"""The Lua scripts of the page index, one file each, run by the server as one step."""

from __future__ import annotations

from importlib.resources import files


def source(name: str) -> str:
    """The text of ``<name>.lua``."""
    return files(__name__).joinpath(f"{name}.lua").read_text()
