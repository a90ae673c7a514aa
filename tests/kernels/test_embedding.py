import pytest
import torch

from kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_copied_exactly(ops, dtype):
    table = torch.randn(10, 6).to(dtype)
    out = ops.embedding(torch.tensor([3, 3, 0, 9]), table)
    assert out.dtype == torch.float32
    assert torch.equal(out, table.float()[[3, 3, 0, 9]])


@pytest.mark.parametrize("token_id", [-1, 10])
def test_a_token_id_outside_the_table_is_refused(token_id):
    with pytest.raises(ValueError, match=rf"^token_ids must be in 0\.\.9, not {token_id}"):
        embedding(torch.tensor([5, token_id]), torch.randn(10, 6))


def test_no_tokens_give_no_rows(ops):
    assert ops.embedding(torch.empty(0, dtype=torch.int64), torch.randn(10, 6)).shape == (0, 6)
