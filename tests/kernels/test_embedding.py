import pytest
import torch

from kernels.embedding import embedding
from kernels.packed_matrix import pack_floats
from kernels.rotation import rotate
from tests.kernels.matrices import KINDS

IDS = torch.tensor([3, 3, 0, 39, 32])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_table(ops, everywhere, kind):
    table = KINDS[kind](40, 128)
    out = everywhere(lambda: ops.embedding(IDS, table))
    rows = table.unpacked[IDS]
    assert out.dtype == torch.float32
    assert torch.equal(out, (rotate(rows) if table.rotated else rows)[:, :128])


def test_a_width_that_is_no_whole_block_is_cut(ops):
    weight = torch.randn(40, 100)
    out = ops.embedding(IDS, pack_floats(weight, torch.float32))
    assert torch.equal(out, weight[IDS])


@pytest.mark.parametrize("token_id", [-1, 10])
def test_a_token_id_outside_the_table_is_refused(ops, token_id):
    with pytest.raises(ValueError, match=rf"^token_ids must be in 0\.\.9, not {token_id}"):
        ops.embedding(torch.tensor([5, token_id]), KINDS["f32"](10, 6))
    assert embedding(torch.tensor([5]), KINDS["f32"](10, 6)).shape == (1, 6)


def test_no_tokens_give_no_rows(ops):
    out = ops.embedding(torch.empty(0, dtype=torch.int64), KINDS["f32"](10, 6))
    assert out.shape == (0, 6)
