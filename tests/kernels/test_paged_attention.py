import numpy as np
import pytest
import torch

from kernels import _native
from kernels.layout import PageLayout, key_view, kv_view, read_tokens, value_view
from kernels.ragged import RaggedBatch, row_slots
from tests.kernels.bits import EPS, same_bits
from tests.kernels.conftest import all_ops

KV_DTYPES = ["fp32", "bf16", "int8"]
KV_HEADS, LAYER = 3, 1


class Sequences:
    """Random keys and values of several sequences in a pool that holds NaN everywhere else."""

    def __init__(self, lengths, group=3, head_dim=64, kv_dtype="fp32", page_size=32):
        self.layout = PageLayout(2, KV_HEADS, head_dim, page_size, kv_dtype)
        self.lengths, self.scale = lengths, head_dim**-0.5
        max_pages = -(-max(lengths) // page_size)
        num_pages = len(lengths) * max_pages
        self.tables = torch.full((len(lengths), max_pages), -1, dtype=torch.int32)
        slots = iter(torch.randperm(num_pages).tolist())
        for table, length in zip(self.tables, lengths, strict=True):
            for page in range(-(-length // page_size)):
                table[page] = next(slots)
        memory = torch.full((num_pages, self.layout.page_bytes), 0xFF, dtype=torch.uint8)
        self.kv = kv_view(memory, self.layout)
        self.q = [torch.randn(length, KV_HEADS * group, head_dim) for length in lengths]
        self.k = [torch.randn(length, KV_HEADS, head_dim) for length in lengths]
        self.v = [torch.randn(length, KV_HEADS, head_dim) for length in lengths]

    def batch(self, spans) -> RaggedBatch:
        """Rows ``spans = [(sequence, start, end), ...]`` as a ragged batch."""
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        counts = [0] + [end - start for _, start, end in spans]
        return RaggedBatch(
            token_ids=np.zeros_like(positions),
            positions=positions,
            query_starts=np.cumsum(counts),
            page_tables=self.tables[[sequence for sequence, _, _ in spans]].numpy(),
            logit_rows=np.empty(0, dtype=np.int64),
        )

    def rows(self, tensors, spans) -> torch.Tensor:
        return torch.cat([tensors[sequence][start:end] for sequence, start, end in spans])

    def write(self, ops, spans) -> None:
        slots = row_slots(self.batch(spans), self.layout.page_size)
        k, v = self.rows(self.k, spans), self.rows(self.v, spans)
        ops.kv_write(k, v, self.kv, LAYER, *slots, self.layout)

    def attend(self, ops, spans, window=None) -> torch.Tensor:
        q, batch = self.rows(self.q, spans), self.batch(spans)
        return ops.paged_attention(q, self.kv, LAYER, batch, self.layout, self.scale, window)

    def stored(self, sequence):
        """Keys and values [length, Hkv, D] as the pages hold them."""
        table = self.tables[sequence]
        heads = self.kv[table[table >= 0].long(), LAYER]
        return [
            each.transpose(1, 2).flatten(0, 1)[: self.lengths[sequence]]
            for each in read_tokens(heads, self.layout)
        ]

    def whole(self):
        return [(sequence, 0, length) for sequence, length in enumerate(self.lengths)]


def exact_attention(sequences, sequence, window=None):
    """fp64 over the stored keys and values: [length, Hq, D], and a bound on an fp32 result.

    A score has a rounding for each of head_dim products, q times scale, and under int8 the key's
    scale, here and there.
    """
    q = sequences.q[sequence].double()
    group, length, head_dim = q.shape[1] // KV_HEADS, q.shape[0], q.shape[2]
    k, v = (
        tensor.double().repeat_interleave(group, dim=1) for tensor in sequences.stored(sequence)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) * sequences.scale
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", weights, v)

    magnitude = torch.einsum("qhd,khd->hqk", q.abs(), k.abs()) * sequences.scale
    score_error = (head_dim + 4) * EPS * magnitude.amax(-1).T[..., None]  # [length, Hq, 1]
    spread = torch.einsum("hqk,khd->qhd", weights, v.abs())
    return exact, (2 * score_error + (2 * length + 64) * EPS) * spread


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim", "page_size"), [(1, 64, 16), (3, 64, 32), (4, 128, 64), (6, 80, 32)]
)
def test_attention_is_within_the_rounding_bound_of_fp64_for_contexts_1_to_300(
    ops, group, head_dim, page_size, kv_dtype
):
    sequences = Sequences([300], group, head_dim, kv_dtype, page_size)
    sequences.write(ops, sequences.whole())
    out = sequences.attend(ops, sequences.whole())
    exact, bound = exact_attention(sequences, 0)
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 299, 300])
def test_a_row_sees_no_further_back_than_its_window(ops, window):
    sequences = Sequences([300])
    sequences.write(ops, sequences.whole())
    out = sequences.attend(ops, sequences.whole(), window)
    exact, bound = exact_attention(sequences, 0, window)
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("window", [300, 10**9])
def test_a_window_over_the_whole_context_changes_no_bit(ops, window):
    sequences = Sequences([300])
    sequences.write(ops, sequences.whole())
    windowed = sequences.attend(ops, sequences.whole(), window)
    assert same_bits(windowed, sequences.attend(ops, sequences.whole()))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_lies_before_the_window_has_no_part_in_a_row(ops, kv_dtype):
    sequences = Sequences([300], kv_dtype=kv_dtype)
    sequences.write(ops, sequences.whole())
    expected = sequences.attend(ops, [(0, 250, 300)], window=100)
    sequences.kv.fill_(0xFF)
    sequences.write(ops, [(0, 151, 300)])
    sequences.tables[0, : 151 // 32] = -1
    assert not expected.isnan().any()
    assert same_bits(sequences.attend(ops, [(0, 250, 300)], window=100), expected)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_in_which_nothing_can_be_seen_is_refused(ops, window):
    sequences = Sequences([2])
    with pytest.raises(ValueError, match=f"^window must be at least 1, not {window}"):
        sequences.attend(ops, sequences.whole(), window)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(ops, everywhere, kv_dtype):
    sequences = Sequences([150, 17, 129], kv_dtype=kv_dtype)
    sequences.write(ops, sequences.whole())
    spans = [(0, 125, 150), (1, 0, 17), (2, 127, 129)]
    assert not everywhere(lambda: sequences.attend(ops, spans)).isnan().any()


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_however_many_units_share_a_long_context_the_bits_are_the_same(
    everywhere, kv_dtype, window
):
    """One thread takes all chunks of a block at once; several cut them into ranges."""
    native = all_ops("cpu")
    sequences = Sequences([900, 1, 140], kv_dtype=kv_dtype)
    sequences.write(native, sequences.whole())
    spans = [(0, 880, 900), (1, 0, 1), (2, 130, 133)]
    together = everywhere(lambda: sequences.attend(native, spans, window))
    alone = everywhere(lambda: sequences.attend(native, [(0, 890, 891)], window))
    assert same_bits(alone[0], together[10])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (7, 80), (48, 16)])
def test_1_to_70_rows_of_decode_verification_and_prefill_have_their_bits(
    group, head_dim, kv_dtype, window
):
    native = all_ops("cpu")
    sequences = Sequences([300, 140, 200], group, head_dim, kv_dtype)
    sequences.write(native, sequences.whole())
    expected = [
        sequences.attend(native, [(sequence, 0, length)], window)
        for sequence, length in enumerate(sequences.lengths)
    ]
    for sequence in range(3):
        exact, bound = exact_attention(sequences, sequence, window)
        assert ((expected[sequence].double() - exact).abs() <= bound).all()
    for count in range(1, 71):
        verified = min(count - 1, 1 + count % 5)
        prefilled = count - 1 - verified
        spans = [(0, 299, 300), (1, 125, 125 + verified), (2, 128 - prefilled, 128)]
        out = sequences.attend(native, spans, window)
        assert same_bits(out, sequences.rows(expected, spans))


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops):
    sequences = Sequences([140, 17, 1])
    sequences.write(ops, sequences.whole())
    together = sequences.attend(ops, sequences.whole())
    reordered = sequences.attend(ops, [(2, 0, 1), (0, 0, 140), (1, 3, 17)])
    assert same_bits(reordered[1:141], together[:140])
    for at, (sequence, row) in enumerate([(0, row) for row in range(140)] + [(1, 0)]):
        assert same_bits(sequences.attend(ops, [(sequence, row, row + 1)])[0], together[at])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_a_prompt_written_and_attended_in_chunks_equals_the_whole(ops, chunk, kv_dtype):
    whole = Sequences([260], kv_dtype=kv_dtype)
    whole.write(ops, whole.whole())
    expected = whole.attend(ops, whole.whole())

    whole.kv.fill_(0xFF)
    pieces = []
    for start in range(0, 260, chunk):
        span = [(0, start, min(start + chunk, 260))]
        whole.write(ops, span)
        pieces.append(whole.attend(ops, span))
    assert same_bits(torch.cat(pieces), expected)


def test_which_pages_hold_the_tokens_does_not_matter(ops):
    sequences = Sequences([200])
    sequences.write(ops, sequences.whole())
    expected = sequences.attend(ops, sequences.whole())
    sequences.kv = sequences.kv.flip(0).contiguous()
    sequences.tables = sequences.kv.shape[0] - 1 - sequences.tables
    assert same_bits(sequences.attend(ops, sequences.whole()), expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_tokens_after_the_row_have_no_part_in_it(ops, kv_dtype):
    sequences = Sequences([150], kv_dtype=kv_dtype)
    sequences.write(ops, [(0, 0, 100)])  # what follows in the page is NaN
    expected = sequences.attend(ops, [(0, 0, 100)])
    assert not expected.isnan().any()
    sequences.k[0][100:] = torch.inf
    sequences.write(ops, [(0, 100, 150)])
    assert same_bits(sequences.attend(ops, [(0, 0, 100)]), expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_shows_in_the_rows_that_see_it_and_in_no_other(ops, place, kv_dtype):
    sequences = Sequences([200], kv_dtype=kv_dtype)
    getattr(sequences, place)[0][140, 0, 5] = torch.nan
    sequences.write(ops, sequences.whole())
    rows_with_nan = sequences.attend(ops, sequences.whole()).isnan().flatten(1).any(1).nonzero()
    assert rows_with_nan.flatten().tolist() == ([140] if place == "q" else list(range(140, 200)))


def test_pages_are_read_after_rounding(ops):
    """With one key the result is its value, as the page holds it."""
    sequences = Sequences([1], kv_dtype="bf16")
    sequences.write(ops, sequences.whole())
    rounded = sequences.v[0].to(torch.bfloat16).float().repeat_interleave(3, dim=1)
    assert same_bits(sequences.attend(ops, sequences.whole()), rounded)


def test_only_the_named_layer_is_read(ops):
    sequences = Sequences([40])
    sequences.write(ops, sequences.whole())
    assert key_view(sequences.kv[:, 0], sequences.layout).isnan().all()
    assert value_view(sequences.kv[:, 0], sequences.layout).isnan().all()
    assert not sequences.attend(ops, sequences.whole()).isnan().any()


@pytest.mark.parametrize("slot", [-1, 10])
def test_a_page_outside_the_pool_is_refused_if_a_row_needs_it(ops, slot):
    sequences = Sequences([300])
    sequences.write(ops, sequences.whole())
    sequences.tables[0, 4] = slot
    assert sequences.attend(ops, [(0, 0, 128)]).shape[0] == 128
    with pytest.raises(ValueError, match=r"^page_tables must be in 0\.\.9"):
        sequences.attend(ops, [(0, 0, 129)])


@pytest.mark.parametrize("position", [-1, 320])
def test_a_position_outside_the_page_table_is_refused(ops, position):
    sequences = Sequences([300])
    batch = sequences.batch([(0, 0, 1)])
    batch.positions[0] = position
    with pytest.raises(ValueError, match=r"^positions must be in 0\.\.319"):
        ops.paged_attention(sequences.q[0][:1], sequences.kv, 0, batch, sequences.layout, 1.0)


@pytest.mark.parametrize("starts", [[1, 2, 4], [0, 2, 3], [0, 5, 4], [0, -1, 4]])
def test_row_ranges_that_do_not_ascend_to_the_rows_are_refused(ops, starts):
    sequences = Sequences([2, 2])
    batch = sequences.batch(sequences.whole())
    batch.query_starts[:] = starts
    q = sequences.rows(sequences.q, sequences.whole())
    with pytest.raises(ValueError, match=r"^query_starts must ascend from 0 to 4"):
        ops.paged_attention(q, sequences.kv, 0, batch, sequences.layout, 1.0)


def test_a_layer_outside_the_pool_is_refused(ops):
    sequences = Sequences([2])
    batch = sequences.batch(sequences.whole())
    with pytest.raises(ValueError, match=r"^layer must be in 0\.\.1"):
        ops.paged_attention(sequences.q[0], sequences.kv, 2, batch, sequences.layout, 1.0)


def test_native_attention_refuses_more_query_heads_than_a_block_has_lines():
    sequences = Sequences([2], group=49)
    sequences.kv.zero_()
    with pytest.raises(ValueError, match=r"^q must have 1 to 48 times as many heads as kv"):
        sequences.attend(all_ops("cpu"), sequences.whole())


def test_positions_need_not_follow_each_other(ops):
    sequences = Sequences([200])
    sequences.write(ops, sequences.whole())
    expected = sequences.attend(ops, sequences.whole())
    order = [150, 151, 3, 4, 199, 4]
    batch = sequences.batch([(0, 0, len(order))])
    batch.positions[:] = order
    q = sequences.q[0][order]
    out = ops.paged_attention(q, sequences.kv, LAYER, batch, sequences.layout, sequences.scale)
    assert same_bits(out, expected[order])


@pytest.mark.parametrize("head_dim", [8, 24, 272])
def test_native_attention_refuses_head_dims_it_cannot_cut_into_lanes(head_dim):
    sequences = Sequences([2], head_dim=head_dim)
    batch = sequences.batch(sequences.whole())
    q = sequences.q[0]
    with pytest.raises(ValueError, match=r"^q must have a head_dim"):
        _native.paged_attention(
            q,
            sequences.kv,
            0,
            batch.positions,
            batch.query_starts,
            batch.page_tables,
            "fp32",
            32,
            1.0,
            None,
            q,
        )


def test_native_attention_writes_every_output():
    sequences = Sequences([17])
    sequences.kv.zero_()
    batch = sequences.batch(sequences.whole())
    out = torch.full_like(sequences.q[0], torch.nan)
    _native.paged_attention(
        sequences.q[0],
        sequences.kv,
        LAYER,
        batch.positions,
        batch.query_starts,
        batch.page_tables,
        "fp32",
        32,
        1.0,
        None,
        out,
    )
    assert not out.isnan().any()
