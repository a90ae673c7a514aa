import pytest
import torch

from kernels import _native
from kernels.layout import PageLayout, key_view, kv_view, value_view
from kernels.ragged import RaggedBatch, row_slots
from tests.kernels.bits import EPS, same_bits

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
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
        counts = torch.tensor([0] + [end - start for _, start, end in spans])
        return RaggedBatch(
            token_ids=torch.zeros_like(positions),
            positions=positions,
            query_starts=counts.cumsum(0),
            page_tables=self.tables[[sequence for sequence, _, _ in spans]],
            logit_rows=torch.empty(0, dtype=torch.int64),
        )

    def rows(self, tensors, spans) -> torch.Tensor:
        return torch.cat([tensors[sequence][start:end] for sequence, start, end in spans])

    def write(self, ops, spans) -> None:
        slots = row_slots(self.batch(spans), self.layout.page_size)
        k, v = self.rows(self.k, spans), self.rows(self.v, spans)
        ops.kv_write(k, v, self.kv, LAYER, *slots, self.layout)

    def attend(self, ops, spans) -> torch.Tensor:
        q, batch = self.rows(self.q, spans), self.batch(spans)
        return ops.paged_attention(q, self.kv, LAYER, batch, self.layout, self.scale)

    def whole(self):
        return [(sequence, 0, length) for sequence, length in enumerate(self.lengths)]


def exact_attention(sequences, sequence):
    """fp64 over the rounded keys and values: [length, Hq, D], and a bound on an fp32 result."""
    q = sequences.q[sequence].double()
    group, length, head_dim = q.shape[1] // KV_HEADS, q.shape[0], q.shape[2]
    k, v = (
        tensor[sequence].to(sequences.layout.dtype).double().repeat_interleave(group, dim=1)
        for tensor in (sequences.k, sequences.v)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) * sequences.scale
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", weights, v)

    magnitude = torch.einsum("qhd,khd->hqk", q.abs(), k.abs()) * sequences.scale
    score_error = (head_dim + 2) * EPS * magnitude.amax(-1).T[..., None]  # [length, Hq, 1]
    spread = torch.einsum("hqk,khd->qhd", weights, v.abs())
    return exact, (2 * score_error + (2 * length + 64) * EPS) * spread


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
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


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(ops, everywhere, kv_dtype):
    sequences = Sequences([150, 17, 129], kv_dtype=kv_dtype)
    sequences.write(ops, sequences.whole())
    assert not everywhere(lambda: sequences.attend(ops, sequences.whole())).isnan().any()


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops):
    sequences = Sequences([140, 17, 1])
    sequences.write(ops, sequences.whole())
    together = sequences.attend(ops, sequences.whole())
    reordered = sequences.attend(ops, [(2, 0, 1), (0, 0, 140), (1, 3, 17)])
    assert same_bits(reordered[1:141], together[:140])
    for at, (sequence, row) in enumerate([(0, row) for row in range(140)] + [(1, 0)]):
        assert same_bits(sequences.attend(ops, [(sequence, row, row + 1)])[0], together[at])


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_a_prompt_written_and_attended_in_chunks_equals_the_whole(ops, chunk, kv_dtype):
    whole = Sequences([260], kv_dtype=kv_dtype)
    whole.write(ops, whole.whole())
    expected = whole.attend(ops, whole.whole())

    whole.kv.fill_(torch.nan)
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


def test_tokens_after_the_row_have_no_part_in_it(ops):
    sequences = Sequences([150])
    sequences.write(ops, [(0, 0, 100)])  # what follows in the page is NaN
    expected = sequences.attend(ops, [(0, 0, 100)])
    assert not expected.isnan().any()
    sequences.k[0][100:] = torch.inf
    sequences.write(ops, [(0, 100, 150)])
    assert same_bits(sequences.attend(ops, [(0, 0, 100)]), expected)


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_shows_in_the_rows_that_see_it_and_in_no_other(ops, place):
    sequences = Sequences([200])
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
    assert key_view(sequences.kv, 0, sequences.layout).isnan().all()
    assert value_view(sequences.kv, 0, sequences.layout).isnan().all()
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
    batch.query_starts.copy_(torch.tensor(starts))
    q = sequences.rows(sequences.q, sequences.whole())
    with pytest.raises(ValueError, match=r"^query_starts must ascend from 0 to 4"):
        ops.paged_attention(q, sequences.kv, 0, batch, sequences.layout, 1.0)


def test_a_layer_outside_the_pool_is_refused(ops):
    sequences = Sequences([2])
    batch = sequences.batch(sequences.whole())
    with pytest.raises(ValueError, match=r"^layer must be in 0\.\.1"):
        ops.paged_attention(sequences.q[0], sequences.kv, 2, batch, sequences.layout, 1.0)


@pytest.mark.parametrize("head_dim", [8, 24, 272])
def test_native_attention_refuses_head_dims_it_cannot_cut_into_lanes(head_dim):
    sequences = Sequences([2], head_dim=head_dim)
    batch = sequences.batch(sequences.whole())
    q = sequences.q[0]
    with pytest.raises(ValueError, match=r"^q must have a head_dim"):
        _native.paged_attention(
            q, sequences.kv, 0, batch.positions, batch.query_starts, batch.page_tables, 32, 1.0, q
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
        32,
        1.0,
        out,
    )
    assert not out.isnan().any()
