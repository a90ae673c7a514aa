"""Trains a draft head for a model, on text that the model itself writes.

The model writes users' messages too: given only the chat template's beginning of one, it makes one
up (Magpie: Xu et al., 2024, arXiv:2406.08464). Its answers are run through it once more for their
hidden rows and for what it would have said at every position, and the head learns to say the same
from each hidden row, ``DEPTH`` tokens far, fed with the tokens that stand there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from engine.chat_template import ChatMessage
from engine.errors import ModelError
from engine.local import AsyncLocalEngine
from engine.model.llama import LlamaModel
from engine.model.load import LoadedModel
from engine.progress import ProgressSink
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.speculation.draft_head import FORMAT, NAMES, HeadWeights
from engine.tokenizer import Tokenizer
from kernels.embedding import embedding
from kernels.ragged import RaggedBatch
from kvstore.memory import PageMemory

DEPTH = 4
FADE = 0.8  # what a position weighs beside the one before it
MESSAGE_TOKENS, ANSWER_TOKENS = 128, 256
TEMPERATURES = (0.0, 0.7, 1.0)
STREAMS = 64
PAGE_SIZE = 32
BATCH_ROWS = 1024
_HELD_OUT = 50  # one text of so many is kept for measuring


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """``num_tokens`` of answers to learn from, for at most ``seconds`` of learning; the head's
    ``hidden`` width and how many tokens it drafts."""

    num_tokens: int = 300_000
    seconds: float = 1500.0
    hidden: int = 1024
    vocabulary: int = 8192
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """``tokens [T]`` are an answer's, after the prompt's last one; ``hidden [T, H]`` bf16 what the
    last layer made of each, ``best [T]`` what the model says after it."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True, slots=True)
class Report:
    """How often a head says what the model says, by position in a draft where all before it were
    right."""

    accepted: tuple[float, ...]
    num_positions: int


async def train(
    loaded: LoadedModel, settings: TrainingSettings, progress: ProgressSink
) -> tuple[HeadWeights, Report]:
    """A head for ``loaded``, and how well it does on text it has not seen. Raises ModelError if the
    model's answers are too short to learn from."""
    model = loaded.model
    assert isinstance(model, LlamaModel)
    torch.manual_seed(settings.seed)
    answers = await write_answers(loaded, settings, progress)
    texts = features(model, answers, progress)
    if len(texts) < 2:
        raise ModelError(f"{model.spec.name} answers with hardly more than {DEPTH} tokens")
    held_out, seen = texts[::_HELD_OUT], [t for i, t in enumerate(texts) if i % _HELD_OUT]
    vocabulary = most_frequent([text.best for text in seen], settings.vocabulary)
    net = HeadNet(model, vocabulary, settings.hidden)
    learn(net, Positions.of(seen), settings, progress)
    return net.weights(), measure(net, Positions.of(held_out))


# -- text


async def write_answers(
    loaded: LoadedModel, settings: TrainingSettings, progress: ProgressSink
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and answers, both the model's own."""
    before, after = user_turn(loaded.tokenizer)
    limits = SchedulerLimits(max_sequences=STREAMS)
    pool_tokens = STREAMS * (len(before) + MESSAGE_TOKENS + ANSWER_TOKENS + 2 * PAGE_SIZE)
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    num_done = 0
    async with AsyncLocalEngine(
        loaded, pool_tokens=pool_tokens, page_size=PAGE_SIZE, limits=limits
    ) as engine:
        with progress.begin("writing text", settings.num_tokens):
            for first in count(settings.seed * 1_000_003 + 1, STREAMS):
                if num_done >= settings.num_tokens:
                    break
                seeds = range(first, first + STREAMS)
                messages = await engine.generate([before] * STREAMS, list(map(_message, seeds)))
                prompts = [(*before, *_without_end(m.token_ids, loaded), *after) for m in messages]
                answers = await engine.generate(prompts, list(map(_answer, seeds)))
                for prompt, answer in zip(prompts, answers, strict=True):
                    found.append((prompt, tuple(answer.token_ids)))
                    num_done += len(answer.token_ids)
                    progress.advance(len(answer.token_ids))
    return found


def _message(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=MESSAGE_TOKENS, temperature=1.0, top_p=0.95, seed=seed)


def _answer(seed: int) -> SamplingParams:
    temperature = TEMPERATURES[seed % len(TEMPERATURES)]
    return SamplingParams(max_tokens=ANSWER_TOKENS, temperature=temperature, seed=seed)


def _without_end(tokens: Sequence[int], loaded: LoadedModel) -> Sequence[int]:
    ends = loaded.model.spec.eos_token_ids
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def user_turn(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the chat template puts before a user's first message, and after it."""
    one, other = (
        tokenizer.encode_chat([ChatMessage("user", content)]) for content in ("one", "Two")
    )
    start = _num_common(one, other)
    end = _num_common(one[::-1], other[::-1])
    return tuple(one[:start]), tuple(one[len(one) - end :])


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next(
        (n for n, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other))
    )


def features(
    model: LlamaModel,
    answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    progress: ProgressSink,
) -> list[Text]:
    """Of answers of more than ``DEPTH`` tokens."""
    longest = max(len(prompt) + len(answer) for prompt, answer in answers)
    layout = model.spec.page_layout(PAGE_SIZE)
    num_pages = -(-longest // PAGE_SIZE)
    memory = PageMemory(layout, num_pages)
    found = []
    with progress.begin("reading it", len(answers)):
        for prompt, answer in answers:
            progress.advance()
            if len(answer) <= DEPTH + 1:
                continue
            tokens = torch.tensor([*prompt, *answer])
            wanted = torch.arange(len(prompt) - 1, len(tokens))
            hidden = torch.empty(len(wanted), model.weights.width)
            batch = RaggedBatch(
                token_ids=tokens,
                positions=torch.arange(len(tokens)),
                query_starts=torch.tensor([0, len(tokens)]),
                page_tables=torch.arange(num_pages, dtype=torch.int32).unsqueeze(0),
                logit_rows=wanted,
                best_only=True,
                hidden=hidden,
            )
            best = model.forward(batch, memory.kv, layout)
            found.append(Text(tokens[len(prompt) - 1 :], hidden.to(torch.bfloat16), best.long()))
    return found


def most_frequent(ids: Sequence[torch.Tensor], most: int) -> torch.Tensor:
    """The ``most`` most frequent ids, ascending; all there are if they are fewer."""
    found, counts = np.unique(torch.cat(list(ids)).numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return torch.from_numpy(np.sort(found[order]))


# -- learning


@dataclass(frozen=True, slots=True)
class Positions:
    """Texts behind each other. ``starts`` are the rows from which ``DEPTH`` drafts can be told."""

    tokens: torch.Tensor  # [N]
    hidden: torch.Tensor  # [N, H] bf16
    best: torch.Tensor  # [N]
    starts: torch.Tensor

    @staticmethod
    def of(texts: Sequence[Text]) -> Positions:
        offsets = np.cumsum([0, *(len(text.tokens) for text in texts)])
        starts = [
            torch.arange(offset, offset + len(text.tokens) - DEPTH)
            for offset, text in zip(offsets, texts, strict=False)
        ]
        return Positions(
            torch.cat([text.tokens for text in texts]),
            torch.cat([text.hidden for text in texts]),
            torch.cat([text.best for text in texts]),
            torch.cat(starts),
        )


class HeadNet(torch.nn.Module):
    """The head as it learns; ``engine.speculation.draft_head`` runs the same arithmetic."""

    def __init__(self, model: LlamaModel, vocabulary: torch.Tensor, hidden: int) -> None:
        super().__init__()
        width = model.weights.width
        self.eps = model.weights.norm_eps
        self.hidden = hidden
        self.vocabulary = vocabulary
        self.head = embedding(vocabulary, model.weights.head)  # [V, H], stays as it is
        self.embedding = model.weights.embedding
        # Of ids that the head does not draft, -100: they teach nothing.
        self.label_of = torch.full((model.spec.vocab_size,), -100)
        self.label_of[vocabulary] = torch.arange(len(vocabulary))
        self.state_norm = torch.nn.Parameter(torch.ones(width))
        self.token_norm = torch.nn.Parameter(torch.ones(width))
        self.out_norm = torch.nn.Parameter(model.weights.norm.clone())
        inner = torch.randn(2 * hidden + width, 2 * width) * (2 * width) ** -0.5
        inner[2 * hidden :] = 0
        self.inner = torch.nn.Parameter(inner)
        self.outer = torch.nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)

    def forward(
        self, states: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and embedding rows of the tokens after them, ``[B, H]``; next states, logits."""
        states, rows = self._norm(states, self.state_norm), self._norm(rows, self.token_norm)
        inner = F.linear(torch.cat((states, rows), dim=1), self.inner)
        gate, up = inner[:, : self.hidden], inner[:, self.hidden : 2 * self.hidden]
        skip = inner[:, 2 * self.hidden :]
        states = (skip + F.linear(F.silu(gate) * up, self.outer)).float()
        return states, F.linear(self._norm(states, self.out_norm), self.head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + self.eps) * weight

    def weights(self) -> HeadWeights:
        named = {name: getattr(self, name).detach() for name in NAMES if name != "vocabulary"}
        return HeadWeights(**named, vocabulary=self.vocabulary)


def _steps(net: HeadNet, data: Positions, at: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Logits and labels of each position of the drafts that begin at rows ``at``."""
    states = data.hidden[at].float()
    for depth in range(1, DEPTH + 1):
        tokens = data.tokens[at + depth]
        states, logits = net(states, embedding(tokens, net.embedding))
        yield logits, data.best[at + depth]


def learn(
    net: HeadNet,
    data: Positions,
    settings: TrainingSettings,
    progress: ProgressSink,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Teaches the head for as long as the settings say."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    began = clock()
    order = torch.Generator().manual_seed(settings.seed)
    with progress.begin("learning (seconds)", round(settings.seconds)):
        shown = 0.0
        while (took := clock() - began) < settings.seconds:
            progress.advance(round(took) - round(shown))
            shown = took
            share = took / settings.seconds
            for group in optimizer.param_groups:  # a short rise, then down to a fiftieth
                group["lr"] = settings.learning_rate * min(share / 0.02, 1.02 - share, 1.0)
            at = data.starts[torch.randint(len(data.starts), (BATCH_ROWS,), generator=order)]
            loss = torch.zeros(())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for depth, (logits, best) in enumerate(_steps(net, data, at)):
                    labels = net.label_of[best]
                    loss = loss + FADE**depth * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def measure(net: HeadNet, data: Positions) -> Report:
    """How often the head says what the model says, each draft fed with the text's own tokens."""
    right = torch.zeros(DEPTH, dtype=torch.int64)
    tried = torch.zeros(DEPTH, dtype=torch.int64)
    for first in range(0, len(data.starts), BATCH_ROWS):
        at = data.starts[first : first + BATCH_ROWS]
        alive = torch.ones(len(at), dtype=torch.bool)
        for depth, (logits, best) in enumerate(_steps(net, data, at)):
            tried[depth] += alive.sum()
            alive &= net.vocabulary[logits.argmax(dim=1)] == best
            right[depth] += alive.sum()
    shares = (right / tried.clamp(min=1)).tolist()
    return Report(tuple(shares), len(data.starts))


def save_head(weights: HeadWeights, path: Path, model: str) -> None:
    """Matrices in bf16."""
    tensors: Mapping[str, torch.Tensor] = {
        name: tensor.to(torch.bfloat16) if tensor.dim() == 2 else tensor
        for name in NAMES
        for tensor in (getattr(weights, name),)
    }
    vocabulary = weights.vocabulary.to(torch.int32)
    save_file({**tensors, "vocabulary": vocabulary}, path, {"format": FORMAT, "model": model})
