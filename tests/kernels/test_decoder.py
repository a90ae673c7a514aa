"""The decoder as one program against the composition of the reference ops, and against itself."""

import os
import select
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import _native, threads
from kernels.decoder import (
    DecoderLayer,
    DecoderWeights,
    DraftRows,
    StateInputs,
    decoder,
    gate_up_rows,
    qkv_rows,
)
from kernels.decoder.cpu_kernel import decoder as native_decoder
from kernels.decoder.reference import decoder as reference_decoder
from kernels.decoder.reference import draft_by_steps
from kernels.layout import PageLayout
from kernels.linear import linear
from kernels.packed_matrix import (
    PackedMatrix,
    pack_floats,
    pack_quantized,
    pack_rotated_int8,
    quantize_int4,
)
from kernels.progress import LayerProgress
from kernels.quantized import QuantizedMatrix
from kernels.ragged import RaggedBatch, best_ids
from kernels.rms_norm import rms_norm
from kernels.rope import rope_tables
from tests.kernels.bits import same_bits
from tests.paged_run import PagedRun, Rows, ragged

VOCABULARY = 90
TOKENS = [(7 * i * i + 3 * i) % VOCABULARY for i in range(300)]


def _int4(weight: torch.Tensor) -> PackedMatrix:
    inputs = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -inputs % 32))
    return pack_quantized(quantize_int4(padded), inputs)


def _int4_of_128(weight: torch.Tensor) -> PackedMatrix:
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128)).unflatten(1, (-1, 128))
    scales = (groups.abs().amax(dim=2) / 7).half().float()
    safe = torch.where(scales == 0, 1.0, scales).unsqueeze(2)
    values = ((groups / safe).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    matrix = QuantizedMatrix(4, 128, values, scales, zeros=torch.full_like(scales, 8))
    return pack_quantized(matrix, weight.shape[1])


PACKERS = {
    "fp32": lambda weight: pack_floats(weight, torch.float32),
    "bf16": lambda weight: pack_floats(weight, torch.bfloat16),
    "int8": pack_rotated_int8,
    "int4": _int4,
    "int4-128": _int4_of_128,
}


def make(mode: str, *, width=72, heads=4, kv_heads=2, head_dim=48, inner=200, **options):
    """A random decoder of 3 layers in which no size is a whole block of anything."""
    pack, generator = PACKERS[mode], torch.Generator().manual_seed(3)

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    def ordered(weight, order):
        return torch.cat((weight, weight.new_zeros(1, *weight.shape[1:])))[order]

    all_heads = heads + 2 * kv_heads
    layers = []
    for index in range(3):
        vectors = {}
        if options.get("bias"):
            vectors |= {
                "qkv_bias": random(all_heads * head_dim),
                "out_bias": random(width),
                "gate_up_bias": ordered(random(2 * inner), gate_up_rows(inner)),
                "down_bias": random(width),
            }
        if options.get("qk_norm"):
            vectors |= {"q_norm": random(head_dim), "k_norm": random(head_dim)}
        qkv = random(all_heads * head_dim, width, scale=width**-0.5)
        gate_up = random(2 * inner, width, scale=width**-0.5)
        layers.append(
            DecoderLayer(
                attention_norm=1 + random(width, scale=0.1),
                qkv=pack(ordered(qkv, qkv_rows(all_heads, head_dim))),
                out=pack(random(width, heads * head_dim, scale=(heads * head_dim) ** -0.5)),
                mlp_norm=1 + random(width, scale=0.1),
                gate_up=pack(ordered(gate_up, gate_up_rows(inner))),
                down=pack(random(width, inner, scale=inner**-0.5)),
                window=(None, 20, 150)[index] if options.get("windows") else None,
                **vectors,
            )
        )
    table = pack(random(VOCABULARY, width))
    cos, sin = rope_tables(512, head_dim, 10000.0)
    return DecoderWeights(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        attention_scale=head_dim**-0.5,
        embedding=table,
        layers=tuple(layers),
        norm=1 + random(width, scale=0.1),
        head=table,
        cos=cos,
        sin=sin,
    )


class Runnable:
    """A decoder with what ``PagedRun`` asks of a model."""

    def __init__(self, made, weights: DecoderWeights, kv: str) -> None:
        self.forward = made(weights).forward
        self.spec = SimpleNamespace(
            page_layout=lambda page_size: PageLayout(
                len(weights.layers), weights.num_kv_heads, weights.head_dim, page_size, kv
            )
        )


def all_logits(model, tokens, *chunks):
    run = PagedRun(model, 1, len(tokens), 32)
    parts, start = [], 0
    for size in (*chunks, len(tokens) - sum(chunks)):
        parts.append(run.step({0: tokens[start : start + size]}, range(size)))
        start += size
    return torch.cat(parts)


FEATURES = [{}, {"bias": True, "qk_norm": True}, {"windows": True}, {"head_dim": 16, "heads": 6}]


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("options", FEATURES, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("mode", PACKERS)
def test_the_program_computes_what_the_ops_compute(mode, options, kv):
    weights = make(mode, **options)
    ours = all_logits(Runnable(native_decoder, weights, kv), TOKENS[:170], 100, 1)
    theirs = all_logits(Runnable(reference_decoder, weights, kv), TOKENS[:170], 100, 1)
    # An input that falls on the other side of a rounding border moves a logit by about a step.
    exact = mode == "fp32" and kv == "fp32"
    spread = theirs.std()
    error = (ours - theirs).abs()
    assert error.amax() <= spread * (1e-4 if exact else 0.25)
    assert error.mean() <= spread * (1e-5 if exact else 0.02)


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("mode", PACKERS)
def test_a_row_has_the_same_bits_however_it_is_reached(mode, kv):
    model = Runnable(native_decoder, make(mode, windows=True), kv)
    whole = all_logits(model, TOKENS)
    assert whole.isfinite().all()
    assert same_bits(all_logits(model, TOKENS, 1, 16, 100), whole)
    assert same_bits(all_logits(model, TOKENS[:220], *[1] * 10, *[5] * 40), whole[:220])


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("mode", PACKERS)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(everywhere, mode, kv):
    weights = make(mode, bias=True, qk_norm=True)
    everywhere(lambda: all_logits(Runnable(native_decoder, weights, kv), TOKENS[:150], 140))


@pytest.mark.parametrize("mode", PACKERS)
def test_a_row_has_the_same_bits_in_any_company(mode):
    threads.set_num_threads(2)
    model = Runnable(native_decoder, make(mode), "bf16")
    alone = all_logits(model, TOKENS[:40])[-1]
    for company, place in ((1, 0), (7, 3), (33, 32), (64, 11)):
        run = PagedRun(model, company + 1, 64)
        parts = {number: TOKENS[number : number + 1 + number % 50] for number in range(company + 1)}
        parts[place] = TOKENS[:40]
        last = sum(len(parts[number]) for number in range(place + 1)) - 1
        assert same_bits(run.step(parts, [last])[0], alone)


def test_only_the_rows_wanted_get_logits():
    model = Runnable(native_decoder, make("int8"), "fp32")
    whole = all_logits(model, TOKENS[:30])
    run = PagedRun(model, 1, 30)
    assert same_bits(run.step({0: TOKENS[:30]}, [3, 29]), whole[[3, 29]])


@pytest.mark.parametrize("mode", PACKERS)
def test_nan_in_a_norm_shows_in_every_logit(mode):
    weights = make(mode)
    norm = weights.norm.clone()
    norm[5] = torch.nan
    logits = all_logits(Runnable(native_decoder, replace(weights, norm=norm), "fp32"), TOKENS[:4])
    assert logits.isnan().all()


def step_arguments(weights, **changes):
    """One row of a valid step, changed."""
    layout = PageLayout(len(weights.layers), weights.num_kv_heads, weights.head_dim, 16, "fp32")
    batch = ragged([Rows(TOKENS[:3], 0, [1])], [2])
    kv = torch.zeros(
        2, layout.num_layers, layout.num_kv_heads, layout.head_bytes, dtype=torch.uint8
    )
    return replace(batch, **changes), kv, layout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", np.array([1, 2, VOCABULARY])),
        ("positions", np.array([0, 1, 16])),
        ("positions", np.array([-1, 0, 1])),
        ("query_starts", np.array([0, 2])),
        ("page_tables", np.array([[2]], dtype=np.int32)),
        ("page_tables", np.array([[-1]], dtype=np.int32)),
        ("page_tables", [[1 << 40]]),
        ("logit_rows", np.array([3])),
        ("positions", np.array([0, 1])),
        ("query_starts", np.array([0, 1, 3])),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name_and_writes_nothing(name, value):
    weights = make("int8")
    batch, kv, layout = step_arguments(weights, **{name: value})
    with pytest.raises(ValueError, match=f"^{name} must"):
        decoder(weights).forward(batch, kv, layout)
    assert not kv.any()


def test_positions_beyond_the_rotation_tables_are_refused():
    weights = make("fp32")
    short = replace(weights, cos=weights.cos[:2].clone(), sin=weights.sin[:2].clone())
    batch, kv, layout = step_arguments(short)
    with pytest.raises(ValueError, match=r"^positions must be in 0\.\.1, not 2"):
        decoder(short).forward(batch, kv, layout)


def test_a_matrix_of_another_shape_is_refused_by_name():
    weights, other = make("fp32"), make("fp32", inner=300)
    layers = (replace(weights.layers[0], down=other.layers[0].down), *weights.layers[1:])
    with pytest.raises(ValueError, match=r"^down must"):
        native_decoder(replace(weights, layers=layers))


def test_the_pool_that_runs_a_step_may_have_any_size():
    model = Runnable(native_decoder, make("int8"), "bf16")
    whole = all_logits(model, TOKENS[:100])
    for count in (1, 2, 4, 3):
        threads.set_num_threads(count)
        assert _native.num_threads() == count
        assert same_bits(all_logits(model, TOKENS[:100], 64), whole)


@pytest.mark.parametrize("made", [native_decoder, reference_decoder])
def test_the_best_ids_are_those_of_the_logits(made):
    weights = make("int8")
    batch, kv, layout = step_arguments(weights, logit_rows=np.array([0, 1, 2]))
    logits = made(weights).forward(batch, kv, layout)
    ids = made(weights).forward(replace(batch, best_only=True), kv, layout)
    assert ids == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("made", [native_decoder, reference_decoder])
def test_numbers_may_be_given_as_sequences_of_any_length(made):
    weights = make("int8")
    tables = [(0,), (1, 2)]
    run = PagedRun(Runnable(made, weights, "bf16"), 1, 48)
    layout = run.layout
    shape = (3, layout.num_layers, layout.num_kv_heads, layout.head_bytes)
    given = RaggedBatch(
        token_ids=TOKENS[:20],
        positions=[*range(3), *range(17)],
        query_starts=[0, 3, 20],
        page_tables=tables,
        logit_rows=[2, 19],
    )
    kv = torch.zeros(shape, dtype=torch.uint8)
    found = made(weights).forward(given, kv, layout)
    arrays = RaggedBatch(
        token_ids=np.array(TOKENS[:20]),
        positions=np.array([*range(3), *range(17)]),
        query_starts=np.array([0, 3, 20]),
        page_tables=np.array([[0, -1], [1, 2]], dtype=np.int32),
        logit_rows=np.array([2, 19]),
    )
    assert same_bits(made(weights).forward(arrays, torch.zeros_like(kv), layout), found)
    assert given.page_tables.tolist() == [[0, -1], [1, 2]]
    assert (given.num_rows, given.num_sequences, given.num_logits) == (20, 2, 2)


@pytest.mark.parametrize("made", [native_decoder, reference_decoder])
def test_hidden_rows_are_those_the_head_is_given(made):
    weights = make("int8")
    batch, kv, layout = step_arguments(weights, logit_rows=np.array([0, 2]))
    plain = made(weights).forward(batch, kv, layout)
    hidden = torch.full((2, weights.width), torch.nan)
    logits = made(weights).forward(replace(batch, hidden=hidden.numpy()), kv, layout)
    assert same_bits(logits, plain)
    again = linear(rms_norm(hidden, weights.norm, weights.norm_eps), weights.head)
    torch.testing.assert_close(again, logits)


def going_on(mode, weights):
    """A decoder of one layer that goes on from the hidden rows of ``weights``, in its last layer's
    place."""
    width, generator = weights.width, torch.Generator().manual_seed(4)
    square = [torch.randn(width, width, generator=generator) * width**-0.5 for _ in range(2)]
    states = StateInputs(
        state_norm=weights.layers[0].mlp_norm,
        token_norm=weights.layers[0].attention_norm,
        from_state=PACKERS[mode](square[0]),
        from_token=PACKERS[mode](square[1]),
        ids=torch.randperm(VOCABULARY, generator=generator),
        first_layer=len(weights.layers) - 1,
    )
    return replace(weights, layers=weights.layers[:1], states=states)


def goes_on(made, mode, kv, names):
    """Logits and hidden rows of those of three sequences that ``names`` says, one row after the
    keys of the whole decoder and the one after it; and the pages at the end."""
    weights = make(mode)
    first, second = Runnable(made, weights, kv), made(going_on(mode, weights))
    run = PagedRun(first, 3, 48)
    run.step({number: TOKENS[: 20 + 5 * number] for number in range(3)}, [0])
    kv_pages = run.memory.view(
        len(run.memory), run.layout.num_layers, run.layout.num_kv_heads, run.layout.head_bytes
    )
    states = torch.randn(3, weights.width, generator=torch.Generator().manual_seed(6))[names]
    found = []
    for _ in range(2):
        rows = [
            Rows([TOKENS[50 + number]], run.lengths[number], run.pages[number]) for number in names
        ]
        hidden = torch.empty(len(names), weights.width)
        batch = replace(
            ragged(rows, range(len(names))), states=states.numpy(), hidden=hidden.numpy()
        )
        found += [second.forward(batch, kv_pages, run.layout), hidden]
        states = hidden
        for number in names:
            run.lengths[number] += 1
    return found, run.memory


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("mode", ["fp32", "int8"])
def test_a_decoder_that_goes_on_from_hidden_rows_computes_what_the_ops_compute(mode, kv):
    (ours, _), (theirs, _) = (
        goes_on(made, mode, kv, [0, 1, 2]) for made in (native_decoder, reference_decoder)
    )
    for each, wanted in zip(ours, theirs, strict=True):
        exact = mode == kv == "fp32"
        assert (each - wanted).abs().mean() <= wanted.std() * (1e-5 if exact else 0.02)


@pytest.mark.parametrize("mode", ["fp32", "int8"])
def test_a_row_that_goes_on_has_the_same_bits_in_any_company(mode):
    together, _ = goes_on(native_decoder, mode, "bf16", [0, 1, 2])
    for number in range(3):
        alone, _ = goes_on(native_decoder, mode, "bf16", [number])
        assert all(map(same_bits, alone, [each[[number]] for each in together]))


def test_a_decoder_that_goes_on_writes_behind_the_keys_of_its_layer_only():
    weights = make("int8")
    _, pages = goes_on(native_decoder, "int8", "bf16", [0])
    run = PagedRun(Runnable(native_decoder, weights, "bf16"), 3, 48)
    run.step({number: TOKENS[: 20 + 5 * number] for number in range(3)}, [0])
    layout = run.layout
    shape = (layout.num_layers, layout.num_kv_heads, layout.head_bytes)
    changed = (pages.view(-1, *shape) != run.memory.view(-1, *shape)).any(dim=3).any(dim=2)
    page = run.pages[0][20 // layout.page_size]
    assert changed.nonzero().tolist() == [[page, layout.num_layers - 1]]


def drafting(mode="int8", lengths=(4, 2, 2)):
    """Three sequences of which one decoder has computed the pages; the arguments with which another
    drafts after them, but for its weights, which come first."""
    weights = make(mode)
    run = PagedRun(Runnable(native_decoder, weights, "bf16"), 3, 48)
    run.step({number: TOKENS[: 20 + 5 * number] for number in range(3)}, [0])
    kv = run.memory.view(
        len(run.memory), run.layout.num_layers, run.layout.num_kv_heads, run.layout.head_bytes
    )
    generator = torch.Generator().manual_seed(6)
    rows = DraftRows(
        tokens=TOKENS[50:53],
        states=list(torch.randn(3, weights.width, generator=generator).numpy()),
        positions=[run.lengths[number] for number in range(3)],
        tables=[run.pages[number] for number in range(3)],
    )
    return going_on(mode, weights), rows, list(lengths), kv, run.layout


def test_drafts_of_one_call_are_those_of_a_forward_each():
    weights, rows, lengths, *rest = drafting()
    decoder = native_decoder(weights)
    expected = draft_by_steps(decoder, rows, lengths, weights.states.ids, *rest)
    found = decoder.draft(rows, lengths, *rest)
    assert len(set(map(tuple, expected))) == 3
    assert [*map(len, found)] == lengths
    assert found == expected
    assert decoder.draft(rows.first(1), lengths[:1], *rest) == found[:1]


def test_drafts_stop_where_logits_are_no_numbers():
    weights, *rest = drafting()
    norm = weights.norm.clone()
    norm[5] = torch.nan
    for made in (native_decoder, reference_decoder):
        found = made(replace(weights, norm=norm)).draft(*rest)
        assert found[0] == [-1] * 4


@pytest.mark.parametrize(
    ("name", "lengths", "change"),
    [
        ("lengths", (1, 2, 2), {}),
        ("lengths", (1, 1, -1), {}),
        ("positions", (1, 1, 1), {"positions": [20, 25, 1 << 40]}),
        ("token_ids", (1, 1, 1), {"tokens": [1, 2, VOCABULARY]}),
        ("page_tables", (1, 1, 1), {"tables": [[0, 0], [1, 1], [1 << 20, 0]]}),
        ("page_tables", (1, 1, 1), {"tables": [[0, 0], [1, 1], [1 << 40, 0]]}),
        ("token_ids", (1, 1, 1), {"tables": [[0], [1]]}),
        ("token_ids", (1, 1), {}),
        ("states", (1, 1, 1), {"states": [np.zeros(2, dtype=np.float32)] * 3}),
    ],
)
def test_draft_rows_that_do_not_fit_are_refused_by_name(name, lengths, change):
    weights, rows, lengths, *rest = drafting(lengths=lengths)
    with pytest.raises(ValueError, match=f"^{name} must"):
        native_decoder(weights).draft(replace(rows, **change), lengths, *rest)


def test_drafted_ids_that_are_no_tokens_are_refused_by_name():
    weights = going_on("int8", make("int8"))
    for ids in (weights.states.ids + 1, weights.states.ids[:-1]):
        states = replace(weights.states, ids=ids)
        with pytest.raises(ValueError, match=r"^ids must"):
            native_decoder(replace(weights, states=states))


@pytest.mark.parametrize("made", [native_decoder, reference_decoder])
def test_states_are_given_to_decoders_that_go_on_and_to_no_others(made):
    weights = make("int8")
    batch, kv, layout = step_arguments(weights)
    with pytest.raises(ValueError, match=r"^states must"):
        made(going_on("int8", weights)).forward(batch, kv, layout)
    states = torch.zeros(batch.num_rows, weights.width)
    with pytest.raises(ValueError, match=r"^states must"):
        made(weights).forward(replace(batch, states=states), kv, layout)


def test_states_of_another_shape_are_refused_by_name():
    weights = make("int8")
    batch, kv, layout = step_arguments(
        weights, states=np.zeros((2, weights.width), dtype=np.float32)
    )
    with pytest.raises(ValueError, match=r"^states must have shape"):
        native_decoder(going_on("int8", weights)).forward(batch, kv, layout)


@pytest.mark.parametrize("made", [native_decoder, reference_decoder])
def test_the_best_id_of_a_row_that_is_not_numbers_is_none(made):
    weights = make("fp32")
    norm = weights.norm.clone()
    norm[5] = torch.inf
    batch, kv, layout = step_arguments(weights, best_only=True)
    assert made(replace(weights, norm=norm)).forward(batch, kv, layout) == [-1]


def test_the_first_of_equal_logits_is_the_best():
    logits = torch.tensor([[1.0, 3, 3], [2, 2, -torch.inf], [-1, -1, -1], [torch.nan, 0, 0]])
    assert best_ids(logits) == [1, -1, 0, -1]


class Watched(LayerProgress):
    """Remembers what was told, by steps that run in Python."""

    def __init__(self, mark_every: int) -> None:
        super().__init__(mark_every)
        self.told: list[int] = []

    def tell(self, num_done: int) -> None:
        self.told.append(num_done)
        super().tell(num_done)


def test_progress_counts_layers_over_steps_and_changes_no_bit():
    weights = make("int8")
    for made in (native_decoder, reference_decoder):
        progress = LayerProgress(mark_every=2)
        for step in (1, 2):
            batch, kv, layout = step_arguments(weights)
            plain = made(weights).forward(batch, kv, layout)
            pages = kv.clone()
            told = made(weights).forward(replace(batch, progress=progress), kv, layout)
            assert same_bits(plain, told)
            assert same_bits(pages, kv)
            assert progress.num_done == 3 * step
            assert os.eventfd_read(progress.event) == 2


@pytest.mark.parametrize(("every", "expected"), [(1, [8, 9, 10]), (2, [9, 10]), (5, [10])])
def test_layers_are_told_in_order_every_so_many_and_after_the_last(every, expected):
    progress = Watched(every)
    progress.tell(7)
    batch, kv, layout = step_arguments(make("fp32"), progress=progress)
    reference_decoder(make("fp32")).forward(batch, kv, layout)
    assert progress.told == [7, *expected]


def test_a_step_that_is_refused_tells_nothing():
    progress = LayerProgress(1)
    weights = make("int8")
    batch, kv, layout = step_arguments(weights, logit_rows=np.array([3]), progress=progress)
    with pytest.raises(ValueError, match="logit_rows"):
        native_decoder(weights).forward(batch, kv, layout)
    assert progress.num_done == 0


def test_progress_is_seen_while_the_native_step_runs():
    """A thread that waits for the first layer finds its keys and values written."""
    weights = make("fp32", width=640, inner=2000)
    progress = LayerProgress(1)
    tokens = np.array(TOKENS[:256])
    layout = PageLayout(3, 2, 48, 256)
    kv = torch.zeros(1, 3, 2, layout.head_bytes, dtype=torch.uint8)
    batch = RaggedBatch(
        token_ids=tokens,
        positions=np.arange(256),
        query_starts=np.array([0, 256]),
        page_tables=np.array([[0]], dtype=np.int32),
        logit_rows=np.array([], dtype=np.int64),
        progress=progress,
    )
    seen: list[bool] = []

    def watch() -> None:
        select.select([progress.event], [], [], 60)
        seen.append(bool(kv[0, 0].any()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    native_decoder(weights).forward(batch, kv, layout)
    watcher.join()
    assert seen == [True]
    assert progress.num_done == 3
