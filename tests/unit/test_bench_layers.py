"""Early exit's benchmark, on a tiny model: all of it agrees with itself, a part reads less."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import __main__ as cli
from bench import layers
from bench.load import Row
from engine.errors import InvalidRequest
from engine.model.load import load_model
from tests.tiny_models import write_folder


def rows_of(model: str, *flags: str) -> list[Row]:
    options = cli.parser().parse_args(["layers", "--texts", "chat", "--tokens", "8", *flags])
    return layers.bench_layers(load_model(model), options, lambda _: None)


def test_all_layers_say_what_the_model_says_and_fewer_read_less(tmp_path: Path) -> None:
    model = str(write_folder(tmp_path / "tiny"))
    first, whole = rows_of(model, "--layers", "1,2")
    assert (whole["share_of_step"], whole["agreement"]) == (1.0, 1.0)
    assert 0 < first["share_of_step"] < 1
    assert 0 <= first["agreement"] < 1


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    model = str(write_folder(tmp_path / "tiny"))
    with pytest.raises(InvalidRequest, match=r"--layers.*1 to 2"):
        rows_of(model, "--layers", "3")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--model"):
        rows_of("hash", "--layers", "1")
