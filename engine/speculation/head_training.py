"""Trains a draft head for a model, on text that the model itself writes.

The model writes users' messages too: given the chat template's beginning of one, and mostly a few
words that messages begin with (``openings.txt``), it makes one up (Magpie: Xu et al., 2024,
arXiv:2406.08464). Its answers, as far as they do not go round in circles, are run through it once
more for their
hidden rows, the last layer's keys and values, and what it would have said at every position, and
the head learns to say the same from each hidden row, ``DEPTH`` tokens far, fed with the tokens that
stand there and with its own states ("training-time test", EAGLE-3: Li et al., 2025,
arXiv:2503.01840). It starts as the target's last layer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import sqrt
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
from kernels.decoder import DecoderWeights, gate_up_rows, qkv_rows
from kernels.embedding import embedding
from kernels.layout import read_tokens
from kernels.linear import linear
from kernels.packed_matrix import PackedMatrix, split
from kernels.ragged import RaggedBatch
from kernels.threads import configured_threads, torch_threads
from kvstore.memory import PageMemory

DEPTH = 3
FIRST_ALONE = 0.4  # the share of the time in which only the first position is taught
FADE = 0.8  # what a position weighs beside the one before it
MESSAGE_TOKENS, ANSWER_TOKENS = 128, 256
TEMPERATURES = (0.0, 0.7)
OPENINGS = Path(__file__).with_name("openings.txt")
WITHOUT_OPENING = 4  # one message of so many
CIRCLE = 16  # tokens that an answer may not say twice
STREAMS = 64
PAGE_SIZE = 32
BATCH_ROWS = 1024
_HELD_OUT = 50  # one text of so many is kept for measuring


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """``num_tokens`` of answers to learn from, for at most ``seconds`` of learning; the head's
    ``hidden`` width, 0 for the target's own, and how many tokens it drafts."""

    num_tokens: int = 400_000
    seconds: float = 2100.0
    hidden: int = 0
    vocabulary: int = 8192
    learning_rate: float = 1.5e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """``tokens [T]`` are an answer's, after the prompt's last one; ``hidden [T, H]`` bf16 what the
    last layer made of each, ``best [T]`` what the model says after it. ``keys`` and ``values
    [P + T, Hkv, head_dim]`` bf16 are the last layer's, of the ``P`` tokens before them too."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    best: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def first(self) -> int:
        """Where ``tokens`` begin."""
        return len(self.keys) - len(self.tokens)

    @property
    def num_starts(self) -> int:
        """Positions from which ``DEPTH`` drafts can be told: the first so many."""
        return len(self.tokens) - DEPTH


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
    net = HeadNet(model.weights, vocabulary, settings.hidden, scale_of(seen))
    with torch_threads(configured_threads()):
        learn(net, seen, settings, progress)
        return net.weights(), measure(net, held_out)


# -- text


Answers = list[tuple[tuple[int, ...], tuple[int, ...]]]


async def write_answers(
    loaded: LoadedModel, settings: TrainingSettings, progress: ProgressSink
) -> Answers:
    """Prompts and answers, both the model's own."""
    before, after = user_turn(loaded.tokenizer)
    openings = [
        tuple(loaded.tokenizer.encode(line, parse_special=False))
        for line in OPENINGS.read_text().splitlines()
    ]
    longest = max(map(len, openings)) + len(before) + MESSAGE_TOKENS + len(after) + ANSWER_TOKENS
    found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    seeds = count(settings.seed * 1_000_003 + 1)
    num_done = 0

    async def write(engine: AsyncLocalEngine) -> None:
        """One text after the other: while some end and others begin, steps stay full."""
        nonlocal num_done
        while num_done < settings.num_tokens:
            seed = next(seeds)
            start = (*before, *_opening(openings, seed))
            (message,) = await engine.generate([start], _message(seed))
            prompt = (*start, *_without_end(message.token_ids, loaded), *after)
            (answer,) = await engine.generate([prompt], _answer(seed))
            found[seed] = prompt, up_to_circle(answer.token_ids)
            num_done += len(found[seed][1])
            progress.advance(len(found[seed][1]))

    async with AsyncLocalEngine(
        loaded,
        pool_tokens=STREAMS * (longest + 2 * PAGE_SIZE),
        page_size=PAGE_SIZE,
        limits=SchedulerLimits(max_sequences=STREAMS),
    ) as engine:
        with progress.begin("writing text", settings.num_tokens):
            async with asyncio.TaskGroup() as group:
                for _ in range(STREAMS):
                    group.create_task(write(engine))
    return [found[seed] for seed in sorted(found)]


def _opening(openings: Sequence[tuple[int, ...]], seed: int) -> tuple[int, ...]:
    return openings[seed % len(openings)] if seed % WITHOUT_OPENING else ()


def up_to_circle(tokens: Sequence[int]) -> tuple[int, ...]:
    """Without what follows once ``CIRCLE`` tokens were said a second time: it teaches little and is
    easily right."""
    seen = set()
    for end in range(CIRCLE, len(tokens) + 1):
        last = tuple(tokens[end - CIRCLE : end])
        if last in seen:
            return tuple(tokens[:end])
        seen.add(last)
    return tuple(tokens)


def _message(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=MESSAGE_TOKENS, temperature=0.8, top_p=0.95, seed=seed)


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
    answers: Answers,
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
            if len(answer) <= DEPTH:
                continue
            tokens = torch.tensor([*prompt, *answer])
            wanted = torch.arange(len(prompt) - 1, len(tokens))
            hidden = torch.empty(len(wanted), model.weights.width)
            batch = RaggedBatch(
                token_ids=tokens.numpy(),
                positions=np.arange(len(tokens)),
                query_starts=np.array([0, len(tokens)]),
                page_tables=np.arange(num_pages, dtype=np.int32)[None],
                logit_rows=wanted.numpy(),
                best_only=True,
                hidden=hidden.numpy(),
            )
            best = model.forward(batch, memory.kv, layout)
            keys, values = (
                part.transpose(1, 2).flatten(0, 1)[: len(tokens)].to(torch.bfloat16)
                for part in read_tokens(memory.kv[:, -1], layout)
            )
            found.append(
                Text(
                    tokens=tokens[len(prompt) - 1 :],
                    hidden=hidden.to(torch.bfloat16),
                    best=torch.tensor(best),
                    keys=keys,
                    values=values,
                )
            )
    return found


def most_frequent(ids: Sequence[torch.Tensor], most: int) -> torch.Tensor:
    """The ``most`` most frequent ids, ascending; all there are if they are fewer."""
    found, counts = np.unique(torch.cat(list(ids)).numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return torch.from_numpy(np.sort(found[order]))


def scale_of(texts: Sequence[Text]) -> float:
    """The root mean square of their hidden rows."""
    squares = sum(float(text.hidden.float().square().sum()) for text in texts)
    return sqrt(squares / sum(text.hidden.numel() for text in texts))


# -- learning


@dataclass(frozen=True, slots=True)
class Batch:
    """``N`` texts side by side, padded to ``S`` starts and ``L`` keys."""

    tokens: torch.Tensor  # [N, S + DEPTH]
    hidden: torch.Tensor  # [N, S + DEPTH, H] bf16
    best: torch.Tensor  # [N, S + DEPTH]
    keys: torch.Tensor  # [N, L, Hkv, head_dim] bf16
    values: torch.Tensor
    positions: torch.Tensor  # [N, S], of the starts
    real: torch.Tensor  # [N, S] bool, which starts are not padding

    @staticmethod
    def of(texts: Sequence[Text]) -> Batch:
        num_starts = max(text.num_starts for text in texts)
        starts = torch.arange(num_starts)
        return Batch(
            tokens=_padded([text.tokens for text in texts]),
            hidden=_padded([text.hidden for text in texts]),
            best=_padded([text.best for text in texts]),
            keys=_padded([text.keys for text in texts]),
            values=_padded([text.values for text in texts]),
            positions=torch.tensor([[text.first] for text in texts]) + starts,
            real=starts < torch.tensor([[text.num_starts] for text in texts]),
        )


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def batches(texts: Sequence[Text], order: Sequence[int]) -> Iterator[Batch]:
    """All texts in this order, about ``BATCH_ROWS`` starts at a time."""
    taken: list[Text] = []
    for index in order:
        taken.append(texts[index])
        if sum(text.num_starts for text in taken) >= BATCH_ROWS:
            yield Batch.of(taken)
            taken = []
    if taken:
        yield Batch.of(taken)


class HeadNet(torch.nn.Module):
    """The head as it learns; ``engine.speculation.draft_head`` runs the same arithmetic.

    ``scale`` is that of the target's hidden rows, at which its last layer works.
    """

    state_norm: torch.nn.Parameter
    token_norm: torch.nn.Parameter
    from_state: torch.nn.Parameter
    from_token: torch.nn.Parameter
    attention_norm: torch.nn.Parameter
    qkv: torch.nn.Parameter
    out: torch.nn.Parameter
    mlp_norm: torch.nn.Parameter
    gate_up: torch.nn.Parameter
    down: torch.nn.Parameter
    out_norm: torch.nn.Parameter

    def __init__(
        self, target: DecoderWeights, vocabulary: torch.Tensor, hidden: int, scale: float
    ) -> None:
        super().__init__()
        self.target = target
        self.scale = scale
        self.vocabulary = vocabulary
        self.head = embedding(vocabulary, target.head)  # stays as it is
        # Of ids that the head does not draft, -100: they teach nothing.
        self.label_of = torch.full((target.head.outputs,), -100)
        self.label_of[vocabulary] = torch.arange(len(vocabulary))
        width, last = target.width, target.layers[-1]
        num_heads = target.num_heads + 2 * target.num_kv_heads
        own = last.down.inputs
        gate_up = _dense(last.gate_up, gate_up_rows(own))
        down = _dense(last.down)
        if hidden not in (0, own):
            gate_up = torch.randn(2 * hidden, width) * width**-0.5
            down = torch.randn(width, hidden) * hidden**-0.5
        starts = {
            "state_norm": torch.ones(width),
            "token_norm": torch.ones(width),
            "from_state": torch.eye(width),
            "from_token": torch.randn(width, width) * 0.1 * width**-0.5,
            "attention_norm": last.attention_norm,
            "qkv": _dense(last.qkv, qkv_rows(num_heads, target.head_dim)),
            "out": _dense(last.out),
            "mlp_norm": last.mlp_norm,
            "gate_up": gate_up,
            "down": down,
            "out_norm": target.norm,
        }
        for name, start in starts.items():
            self.register_parameter(name, torch.nn.Parameter(start.clone()))

    def steps(self, batch: Batch, depths: int = DEPTH) -> Iterator[tuple[int, torch.Tensor]]:
        """The logits ``[N, S, V]`` at each position of the drafts from all starts of a batch."""
        num_starts = batch.positions.shape[1]
        states, seen = batch.hidden[:, :num_starts].float(), Seen(batch)
        for depth in range(1, depths + 1):
            tokens = batch.tokens[:, depth : depth + num_starts]
            states, logits = self(states, tokens, depth, seen)
            yield depth, logits

    def forward(
        self, states: torch.Tensor, tokens: torch.Tensor, depth: int, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[N, S, H]`` and the tokens ``[N, S]`` after them, ``depth`` behind the starts;
        next states, and logits ``[N, S, V]``."""
        rows = embedding(tokens.flatten(), self.target.embedding).view_as(states)
        x = F.linear(self._norm(states, self.state_norm), self.from_state)
        x = x + F.linear(self._norm(rows, self.token_norm), self.from_token)
        x = self.scale * x.float()
        x = x + self._attention(x, depth, seen)
        gate, up = F.linear(self._norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, self.down)
        return x.float(), F.linear(self._norm(x.float(), self.out_norm), self.head).float()

    def _attention(self, x: torch.Tensor, depth: int, seen: Seen) -> torch.Tensor:
        target = self.target
        queries, keys, dim = target.num_heads, target.num_kv_heads, target.head_dim
        heads = F.linear(self._norm(x, self.attention_norm), self.qkv)
        heads = split(heads, 2, -1, dim)
        q, k, v = torch.split(heads, [queries, keys, keys], dim=2)
        at = (seen.positions + depth).clamp(max=len(target.cos) - 1)  # only padding is beyond
        q, k = (self._rotated(part, at) for part in (q, k))
        q = split(q, 2, keys, -1) * target.attention_scale  # [N, S, Hkv, G, head_dim]
        seen.own.append((k.unsqueeze(3), v.unsqueeze(3)))
        scores = torch.einsum("nskgd,nlkd->nskgl", q, seen.keys).float()
        scores = scores.masked_fill(seen.hides, -torch.inf)
        own = [(q * each).sum(dim=-1, keepdim=True).float() for each, _ in seen.own]
        weights = torch.cat((scores, *own), dim=-1).softmax(dim=-1)
        length = scores.shape[-1]
        out = torch.einsum("nskgl,nlkd->nskgd", weights[..., :length], seen.values)
        for number, (_, value) in enumerate(seen.own):
            out = out + weights[..., length + number, None] * value
        return F.linear(out.flatten(2), self.out)

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[positions].unsqueeze(2) for table in (self.target.cos, self.target.sin))
        first, second = heads.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        eps = self.target.norm_eps
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight

    def teacher(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the target says after these hidden rows, ``[..., V]`` logits."""
        return F.linear(self._norm(hidden.float(), self.target.norm), self.head).float()

    def weights(self) -> HeadWeights:
        named = {name: getattr(self, name).detach() for name in NAMES if name != "vocabulary"}
        for name in ("from_state", "from_token"):
            named[name] = named[name] * self.scale
        return HeadWeights(**named, vocabulary=self.vocabulary)


def _dense(matrix: PackedMatrix, order: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of a packed matrix; with the ``order`` of its rows taken back."""
    dense = linear(torch.eye(matrix.inputs), matrix).T.contiguous()
    if order is None:
        return dense
    found = dense.new_empty(int(order.max()) + 1, matrix.inputs)
    found[order[order >= 0]] = dense[order >= 0]
    return found


class Seen:
    """What the drafts of a batch attend to: the target's keys up to their start, and their own."""

    def __init__(self, batch: Batch) -> None:
        self.positions = batch.positions
        self.keys, self.values = batch.keys.float(), batch.values.float()
        later = torch.arange(self.keys.shape[1]) > batch.positions.unsqueeze(2)
        self.hides = later[:, :, None, None, :]  # [N, S, 1, 1, L]
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []


def loss_of(net: HeadNet, batch: Batch, depths: int = DEPTH) -> torch.Tensor:
    """What the head says against what the target says: half its likelihoods, half its choice."""
    num_starts = batch.positions.shape[1]
    with torch.no_grad():
        likely = net.teacher(batch.hidden).softmax(dim=-1)
    total = torch.zeros(())
    for depth, logits in net.steps(batch, depths):
        told = logits[batch.real].log_softmax(dim=-1)
        wanted = likely[:, depth : depth + num_starts][batch.real]
        labels = net.label_of[batch.best[:, depth : depth + num_starts][batch.real]]
        soft = -(wanted * told).sum(dim=-1).mean()
        hard = F.nll_loss(told, labels, ignore_index=-100)
        total = total + FADE ** (depth - 1) * (soft + hard) / 2
    return total


def learn(
    net: HeadNet,
    texts: Sequence[Text],
    settings: TrainingSettings,
    progress: ProgressSink,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Teaches the head for as long as the settings say."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    order = torch.Generator().manual_seed(settings.seed)
    endless = (
        batch
        for _ in count()
        for batch in batches(texts, torch.randperm(len(texts), generator=order).tolist())
    )
    began = clock()
    with progress.begin("learning (seconds)", round(settings.seconds)):
        shown = 0.0
        for batch in endless:
            if (took := clock() - began) >= settings.seconds:
                break
            progress.advance(round(took) - round(shown))
            shown = took
            share = took / settings.seconds
            for group in optimizer.param_groups:  # a short rise, then down to a fiftieth
                group["lr"] = settings.learning_rate * min(share / 0.02, 1.02 - share, 1.0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(net, batch, 1 if share < FIRST_ALONE else DEPTH)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def measure(net: HeadNet, texts: Sequence[Text]) -> Report:
    """How often the head says what the model says, each draft fed with the text's own tokens."""
    right, tried = [0] * DEPTH, [0] * DEPTH
    num_positions = 0
    for batch in batches(texts, range(len(texts))):
        num_starts = batch.positions.shape[1]
        alive = batch.real.clone()
        num_positions += int(alive.sum())
        for depth, logits in net.steps(batch):
            best = batch.best[:, depth : depth + num_starts]
            tried[depth - 1] += int(alive.sum())
            alive &= net.vocabulary[logits.argmax(dim=-1)] == best
            right[depth - 1] += int(alive.sum())
    shares = (r / max(t, 1) for r, t in zip(right, tried, strict=True))
    return Report(tuple(shares), num_positions)


def save_head(weights: HeadWeights, path: Path, model_digest: str) -> None:
    """Matrices in bf16."""
    tensors: Mapping[str, torch.Tensor] = {
        name: tensor.to(torch.bfloat16) if tensor.dim() == 2 else tensor
        for name in NAMES
        for tensor in (getattr(weights, name),)
    }
    vocabulary = weights.vocabulary.to(torch.int32)
    save_file(
        {**tensors, "vocabulary": vocabulary}, path, {"format": FORMAT, "model": model_digest}
    )
