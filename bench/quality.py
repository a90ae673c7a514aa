"""Quality: how far each mode's next-token distributions are from those of fp32 weights and KV.

Every position of every text counts once: the Kullback-Leibler divergence of the mode's distribution
from the reference's, in nats, and whether both give the same token the most probability. Texts are
cut into windows that the model reads from their start.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

import numpy as np
import torch

from bench.load import PAGE_SIZE, Report, Row
from bench.machine import Machine
from bench.options import count, modes, names
from engine.errors import InvalidRequest
from engine.model import Model
from engine.model.load import LoadedModel, load_model
from engine.modes import WEIGHT_MODES
from engine.progress import default_progress
from engine.tokenizer import Tokenizer
from kernels.layout import KV_DTYPES
from kernels.ragged import RaggedBatch
from kvstore.memory import PageMemory

TEXTS = Path(__file__).parent / "texts"
REFERENCE = ("fp32", "fp32")
CHUNK_ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name or path (default %(default)s)")
    parser.add_argument("--weights", type=names, default=tuple(WEIGHT_MODES), help="default all")
    parser.add_argument("--kv", type=names, default=tuple(KV_DTYPES), help="default all")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="a folder of .txt files")
    parser.add_argument("--window", type=count, default=1024, help="tokens read at once, at most")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    compared = [(weights, kv or weights) for weights, kv in modes(options)]
    compared = [mode for mode in compared if mode != REFERENCE]
    if not compared:
        raise InvalidRequest("--weights", "fp32 with fp32 KV is the reference", "other modes too")
    reference = _load(options.model, *REFERENCE)
    others = [_load(options.model, *mode) for mode in compared]
    window = min(options.window, reference.model.spec.max_context)
    texts = read_texts(options.texts, reference.tokenizer)
    found: list[dict[str, Divergence]] = [{} for _ in others]
    for name, ids in texts.items():
        report(f"quality: {name}, {len(ids)} tokens")
        for table, divergence in zip(found, _compare(reference, others, ids, window), strict=True):
            table[name] = divergence
    return [
        _row(options.model, mode, window, table)
        for mode, table in zip(compared, found, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over positions: nats of divergence, and how often the most probable token agreed."""

    positions: int = 0
    nats: float = 0.0
    agreements: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(
            self.positions + other.positions,
            fsum((self.nats, other.nats)),
            self.agreements + other.agreements,
        )

    @property
    def mean_kl(self) -> float:
        return self.nats / self.positions

    @property
    def top1(self) -> float:
        return self.agreements / self.positions


def divergence_of(expected: torch.Tensor, found: torch.Tensor) -> Divergence:
    """KL(expected || found) of two sets of logits ``[T, vocab_size]``, in fp64, some rows at a time
    (both distributions of a whole window would take gigabytes)."""
    total = Divergence()
    for start in range(0, len(expected), CHUNK_ROWS):
        p_logits = expected[start : start + CHUNK_ROWS]
        q_logits = found[start : start + CHUNK_ROWS]
        log_p = p_logits.double().log_softmax(-1)
        log_q = q_logits.double().log_softmax(-1)
        nats = (log_p.exp() * (log_p - log_q)).sum()
        agreements = (p_logits.argmax(-1) == q_logits.argmax(-1)).sum()
        total += Divergence(len(p_logits), float(nats), int(agreements))
    return total


def all_logits(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """Logits ``[len(ids), vocab_size]`` of every position of one sequence."""
    layout = model.spec.page_layout(PAGE_SIZE)
    num_pages = -(-len(ids) // PAGE_SIZE)
    rows = np.arange(len(ids))
    batch = RaggedBatch(
        token_ids=np.array(ids),
        positions=rows,
        query_starts=np.array([0, len(ids)]),
        page_tables=np.arange(num_pages, dtype=np.int32)[None],
        logit_rows=rows,
    )
    logits = model.forward(batch, PageMemory(layout, num_pages).kv, layout)
    assert isinstance(logits, torch.Tensor)
    return logits


def windows(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def read_texts(folder: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Token ids of each text file by its name. Raises InvalidRequest if there is none."""
    texts = {
        path.stem: tokenizer.encode(path.read_text(encoding="utf-8"), parse_special=False)
        for path in sorted(folder.glob("*.txt"))
    }
    if not any(texts.values()):
        raise InvalidRequest("--texts", f"{folder} has no text", "a folder of .txt files")
    return texts


def _compare(
    reference: LoadedModel, others: Sequence[LoadedModel], ids: Sequence[int], window: int
) -> list[Divergence]:
    totals = [Divergence() for _ in others]
    for part in windows(ids, window):
        expected = all_logits(reference.model, part)
        for index, other in enumerate(others):
            totals[index] += divergence_of(expected, all_logits(other.model, part))
    return totals


def _row(model: str, mode: tuple[str, str], window: int, table: dict[str, Divergence]) -> Row:
    whole = sum(table.values(), Divergence())
    row: Row = {"model": model, "weights": mode[0], "kv": mode[1], "window": window}
    row |= {"tokens": whole.positions, "mean_kl": whole.mean_kl, "top1": whole.top1}
    return row | {f"kl_{name}": divergence.mean_kl for name, divergence in table.items()}


def _load(model: str, weights: str, kv: str) -> LoadedModel:
    return load_model(model, weights=weights, kv=kv, progress=default_progress())
