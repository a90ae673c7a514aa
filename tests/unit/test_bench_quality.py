"""The quality report: its arithmetic by hand, the texts, and a tiny model against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import quality
from bench.machine import Machine
from bench.quality import Divergence, all_logits, divergence_of, read_texts, windows
from engine.errors import InvalidRequest
from engine.gguf_tokenizer import GgufVocabulary, tokenizer_from_gguf
from engine.model.gguf_file import open_gguf
from engine.model.hash_model import HashTokenizer
from engine.model.load import load_model, packaged_file
from kernels.peaks import Peaks
from tests.tiny_models import write_folder

MACHINE = Machine("portable", Peaks(2, 10.0, 400.0, 200.0, 100.0, int8_by="x", fp32_by="y"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_text("hello hell " * 30)
    (folder / "two.txt").write_text("def hello(): ..." * 9)
    (folder / "README.md").write_text("not a text to read")
    return folder


def test_divergence_is_the_expected_log_ratio_in_nats() -> None:
    expected = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    found = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    result = divergence_of(expected, found)
    assert result.positions == 2
    assert result.nats == pytest.approx(0.5 * torch.tensor([2.0, 2 / 3]).log().sum().item())
    assert result.agreements == 1 + (expected[0].argmax() == found[0].argmax())


def test_logits_that_differ_by_a_constant_do_not_diverge() -> None:
    logits = torch.randn(70, 11, generator=torch.Generator().manual_seed(1))
    result = divergence_of(logits, logits + 3)
    assert result.mean_kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1


def test_the_result_does_not_depend_on_how_many_rows_are_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(2)
    expected, found = (torch.randn(150, 23, generator=generator) for _ in range(2))
    whole = divergence_of(expected, found)
    monkeypatch.setattr(quality, "CHUNK_ROWS", 7)
    parts = divergence_of(expected, found)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-12)
    assert (parts.positions, parts.agreements) == (whole.positions, whole.agreements)
    assert whole.positions == 150
    assert whole.nats > 1


def test_texts_weigh_by_their_positions() -> None:
    total = Divergence(10, 1.0, 9) + Divergence(30, 5.0, 15)
    assert total.mean_kl == pytest.approx(6 / 40)
    assert total.top1 == pytest.approx(24 / 40)


def test_windows_cover_a_text_once() -> None:
    assert list(windows(list(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_only_text_files_are_read(texts: Path) -> None:
    assert read_texts(texts, HashTokenizer()).keys() == {"one", "two"}


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--texts"):
        read_texts(tmp_path, HashTokenizer())


def test_the_repositorys_texts_have_ten_thousand_tokens_of_several_kinds() -> None:
    file = open_gguf(packaged_file("smollm2"))
    tokenizer = tokenizer_from_gguf(GgufVocabulary.of(file.fields))
    counts = {name: len(ids) for name, ids in read_texts(quality.TEXTS, tokenizer).items()}
    assert counts.keys() == {"prose", "dialogue", "technical", "code", "german"}
    assert min(counts.values()) >= 2000
    assert sum(counts.values()) >= 10_000


def test_every_position_has_logits_of_its_own(tmp_path: Path) -> None:
    model = load_model(str(write_folder(tmp_path / "tiny"))).model
    ids = [5, 9, 7, 5, 9] * 8
    whole = all_logits(model, ids)
    assert whole.shape == (40, model.spec.vocab_size)
    assert torch.equal(all_logits(model, ids[:13]), whole[:13])


def test_the_report_has_a_row_for_each_mode_but_the_reference(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: MACHINE)
    model = write_folder(tmp_path / "tiny")
    flags = f"quality --model {model} --texts {texts} --weights fp32,bf16 --kv fp32,bf16"
    assert cli.main([*flags.split(), "--window", "100", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    modes = [(row["weights"], row["kv"]) for row in rows]
    assert modes == [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")]
    for row in rows:
        assert row["tokens"] > 200
        assert 0 < row["mean_kl"] < 0.1
        assert 0.8 < row["top1"] <= 1
        assert {"kl_one", "kl_two"} <= row.keys()


def test_the_reference_alone_is_nothing_to_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure_machine", lambda: MACHINE)
    assert cli.main(["quality", "--model", "hash", "--weights", "fp32", "--kv", "fp32"]) == 1
    assert "--weights" in capsys.readouterr().err
