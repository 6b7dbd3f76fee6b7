"""Attention of tensors whose heads, tokens, rows, slots or pages lie 2^31 numbers and more apart, as in a pool that is
stored heads first and in [B, H, N, P] transposed: as of the same numbers close together."""

import pytest
import torch
from far import Memory
from parity import DEVICE
from torch import Tensor

from tt_kernels import append_attention, block_diffusion_attention, causal_attention, context_attention

pytestmark = pytest.mark.kernels
DIMS = pytest.mark.parametrize("dim", [0, 1, 2], ids=["row or page", "token or slot", "head"])


def heads(B: int, N: int, H: int) -> Tensor:
    return torch.randn(B, N, H, 8).half().to(DEVICE)


def close(got: Tensor, want: Tensor) -> None:
    """The same products, which PyTorch may sum in another order: an eps of 16 bits."""
    torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(got.dtype).eps)


@DIMS
@pytest.mark.parametrize("op", ["causal", "packed", "blocks"])
def test_training(op: str, dim: int) -> None:
    torch.manual_seed(2)
    q, (k, v, k_clean, v_clean) = heads(4, 4, 4), (heads(4, 4, 4) for _ in range(4))
    cu_seqlens = torch.tensor([0, 3, 16], device=DEVICE) if op == "packed" else None

    def run(*tensors: Tensor) -> Tensor:
        if op == "blocks":
            return block_diffusion_attention(*tensors, block_size=2)
        return causal_attention(*tensors[:3], cu_seqlens=cu_seqlens)

    want, memory = run(q, k, v, k_clean, v_clean), Memory()
    close(run(*(memory.spread(t, dim) for t in (q, k, v, k_clean, v_clean))), want)


@DIMS
@pytest.mark.parametrize("append", [False, True], ids=["context", "append"])
def test_pages(append: bool, dim: int) -> None:
    torch.manual_seed(2)
    q, k, v = heads(2, 3, 4), heads(2, 3, 4), heads(2, 3, 4)
    pages = heads(4, 4, 4), heads(4, 4, 4)
    table, lengths = torch.tensor([[3, 1], [0, 2]], device=DEVICE), torch.tensor([5, 2], device=DEVICE)
    memory = Memory()
    far = [memory.spread(t, dim) for t in pages]
    op = append_attention if append else context_attention
    close(op(q, k, v, *far, table, lengths), op(q, k, v, *pages, table, lengths))
    assert all(torch.equal(*pair) for pair in zip(far, pages, strict=True))


@DIMS
@pytest.mark.parametrize("append", [False, True], ids=["context", "append"])
def test_the_block(append: bool, dim: int) -> None:
    torch.manual_seed(2)
    q, k, v = heads(4, 4, 4), heads(4, 4, 4), heads(4, 4, 4)
    pages = heads(4, 8, 4), heads(4, 8, 4)
    table, lengths = torch.arange(4, device=DEVICE).view(4, 1), torch.tensor([4, 1, 0, 3], device=DEVICE)
    memory = Memory()
    far = [memory.spread(t, dim) for t in (q, k, v)]
    op = append_attention if append else context_attention
    want_pages = [t.clone() for t in pages]
    want = op(q, k, v, *want_pages, table, lengths)
    close(op(*far, *pages, table, lengths), want)
    assert all(torch.equal(*pair) for pair in zip(pages, want_pages, strict=True))
