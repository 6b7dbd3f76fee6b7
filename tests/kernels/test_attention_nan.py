"""What a NaN or an infinity, a scale that is not above 0, and scores beyond the largest number do to attention: they
reach who sees them, and nobody else. References without TRITON_INTERPRET, kernels with it or on a GPU."""

import math
from collections.abc import Callable

import pytest
import torch
from parity import DEVICE
from torch import Tensor

from tt_kernels import append_attention, block_diffusion_attention, causal_attention, context_attention

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]
DTYPES = [torch.float16, torch.float32] + [torch.float64] * (DEVICE == "cpu")
PAGE = 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def heads(N: int, dtype: torch.dtype, B: int = 1) -> list[Tensor]:
    """q, k, v, k_clean, v_clean: two query heads to one KV head."""
    tensors = torch.randn(B, N, 2, 4), *torch.randn(4, B, N, 1, 4)
    return [t.to(DEVICE, dtype) for t in tensors]


def cached(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row of n tokens in pages, and room for 48."""
    pages = torch.randn(2, 12, PAGE, 1, 4).to(DEVICE, dtype)
    table = torch.arange(len(pages[0]), device=DEVICE).flip(0).unsqueeze(0)
    return *pages, table, torch.tensor([n], device=DEVICE)


def close(got: Tensor, want: Tensor) -> None:
    """Two orders of summation over up to 60 terms; 16 bits round weights and results by half an eps each."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=(5 if got.dtype.itemsize == 2 else 100) * eps)


Attention = Callable[[list[Tensor]], Tensor]
FORMS: dict[str, Attention] = {
    "causal": lambda t: causal_attention(*t[:3]),
    "packed": lambda t: causal_attention(
        *t[:3], cu_seqlens=torch.tensor([0, t[0].shape[1] // 3, t[0].shape[1]], device=DEVICE)
    ),
    "blocks": lambda t: block_diffusion_attention(*t, block_size=3),
    "context": lambda t: context_attention(*t[:3], *cached(5, t[0].dtype)),
    "context causal": lambda t: context_attention(*t[:3], *cached(5, t[0].dtype), causal=True),
    "append": lambda t: append_attention(*t[:3], *cached(5, t[0].dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2, 7, 15, 16, 33])
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_query_gives_nan(form: str, N: int, dtype: torch.dtype) -> None:
    tensors = heads(N, dtype)
    torch.manual_seed(3)
    clean = FORMS[form](tensors)
    tensors[0][0, N // 2, 1, 2] = math.nan
    torch.manual_seed(3)
    got = FORMS[form](tensors)
    spoilt = torch.zeros_like(got, dtype=torch.bool)
    spoilt[0, N // 2, 1] = True
    assert got[spoilt].isnan().all()
    close(got[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_keys_reach_who_sees_them(bad: float, dtype: torch.dtype) -> None:
    """A key of the third sequence, of a later token, of a later block; in 16 bits some numbers are as good as infinite
    only in products."""
    tensors = heads(12, dtype)
    cu_seqlens = torch.tensor([0, 5, 8, 12], device=DEVICE)
    forms: dict[str, tuple[Attention, int, range]] = {
        "causal": (lambda t: causal_attention(*t[:3]), 1, range(6, 12)),
        "packed": (lambda t: causal_attention(*t[:3], cu_seqlens=cu_seqlens), 1, range(6, 8)),
        "clean": (lambda t: block_diffusion_attention(*t, block_size=4), 3, range(8, 12)),
        "noisy": (lambda t: block_diffusion_attention(*t, block_size=4), 1, range(4, 8)),
        "packed clean": (
            lambda t: block_diffusion_attention(*t, block_size=2, cu_seqlens=cu_seqlens),
            3,
            range(0),  # block 3 is the last of its sequence
        ),
    }
    for name, (attend, which, who) in forms.items():
        spoilt = [t.clone() for t in tensors]
        spoilt[which][0, 6, 0, 1] = bad
        got, clean = attend(spoilt), attend(tensors)
        seen = torch.tensor([i in who for i in range(12)], device=DEVICE)
        if math.isnan(bad):
            assert got[:, seen].isnan().all(), name
        close(got[:, ~seen], clean[:, ~seen])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [3, 4], ids=["k_clean", "v_clean"])
@pytest.mark.parametrize("S,N", [(4, 12), (5, 33), (16, 144), (24, 70)])
def test_what_no_block_sees_reaches_none(S: int, N: int, where: int, bad: float) -> None:
    """The clean tokens of the last block; nor do gradients know them."""
    tensors = heads(N, torch.float32)
    clean = block_diffusion_attention(*tensors, block_size=S)
    tensors[where][:, (N - 1) // S * S :] = bad
    close(block_diffusion_attention(*tensors, block_size=S), clean)
    free = [t.cpu().clone().requires_grad_() for t in tensors]
    block_diffusion_attention(*free, block_size=S).sum().backward()
    assert all(t.grad.isfinite().all() for t in free)


def test_values_that_no_token_of_the_row_sees() -> None:
    """Past a row's length, beside a longer one."""
    tensors = heads(3, torch.float32, B=2)
    pages = torch.randn(2, 4, PAGE, 1, 4, device=DEVICE)
    table, lengths = torch.tensor([[0, 1], [2, 3]], device=DEVICE), torch.tensor([8, 3], device=DEVICE)
    clean = context_attention(*tensors[:3], *pages, table, lengths, causal=True)
    pages[:, 2, 3], pages[:, 3] = math.nan, math.inf
    close(context_attention(*tensors[:3], *pages, table, lengths, causal=True), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5, 0, -1, 0.3, 1e-50])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    q, k, v, k_clean, v_clean = heads(9, dtype)
    token = torch.arange(9, device=DEVICE)
    before, block = token.unsqueeze(1) >= token, token // 4
    noisy = torch.cat([block.unsqueeze(1) > block, block.unsqueeze(1) == block], 1)
    together = (token >= 4).unsqueeze(1) == (token >= 4)
    whole = torch.cat([torch.ones(9, 5, dtype=torch.bool, device=DEVICE), before], 1)
    k_pages, v_pages, table, lengths = cached(5, dtype)
    past = [t[table[0]].flatten(0, 1)[None, :5] for t in (k_pages, v_pages)]
    all_k, all_v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    cu_seqlens = torch.tensor([0, 4, 9], device=DEVICE)
    for got, keys, values, seen in (
        (causal_attention(q, k, v, scale=scale), k, v, before),
        (causal_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale), k, v, before & together),
        (
            block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=4, scale=scale),
            torch.cat([k_clean, k], 1),
            torch.cat([v_clean, v], 1),
            noisy,
        ),
        (context_attention(q, k, v, k_pages, v_pages, table, lengths, causal=True, scale=scale), all_k, all_v, whole),
        (
            append_attention(q[:, :7], k[:, :7], v[:, :7], k_pages, v_pages, table, lengths, scale=scale),
            all_k[:, :12],
            all_v[:, :12],
            whole[:7, :12],
        ),
    ):
        scores = torch.einsum("blhp,bsp->bhls", q[:, : len(seen)].double(), keys[:, :, 0].double()) * scale
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        close(got, torch.einsum("bhls,bsp->blhp", weights, values[:, :, 0].double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_beyond_the_largest_number_stay_with_who_sees_them(dtype: torch.dtype) -> None:
    """Finite keys whose scores are not."""
    tensors = heads(6, dtype)
    large = torch.finfo(dtype).max / 2
    clean = causal_attention(*tensors[:3], scale=1e35)
    assert clean.isfinite().all()
    tensors[1][0, 5] = large
    close(causal_attention(*tensors[:3], scale=1e35)[:, :5], clean[:, :5])
