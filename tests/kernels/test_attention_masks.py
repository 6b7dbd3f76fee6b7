"""The masks of training: causal, block-causal and block diffusion, packed and not, blocks of 4 to 128; NaN; and the
log-sum-exp that is kept for a backward. References without TRITON_INTERPRET, kernels with it or on a GPU."""

import math

import pytest
import torch
from parity import DEVICE, KERNELS
from torch import Tensor

from tt_kernels import block_diffusion_attention, causal_attention
from tt_kernels.attention.block_attention import _block

pytestmark = pytest.mark.kernels
DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64  # a GPU has no fp64 kernels


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def close(got: Tensor, want: Tensor) -> None:
    """fp64: 4500 eps. fp32: 80, for products summed in another order over 200 terms. A wrong token shows at 1e-2."""
    bound = 1e-12 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want.to(got), rtol=bound, atol=bound)


def heads(B: int, N: int, Hq: int = 2, P: int = 4) -> list[Tensor]:
    """q, k, v, k_clean, v_clean: one KV head."""
    return [t.to(DEVICE, DTYPE) for t in (torch.randn(B, N, Hq, P), *torch.randn(4, B, N, 1, P))]


def want(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, N, Hq, P] and log-sum-exp [B, N, Hq] over the keys [B, S, 1, P] that are seen [B, N, S], in fp64."""
    q, k, v, seen = (t.to(DEVICE, torch.bool if t.dtype == torch.bool else torch.float64) for t in (q, k, v, seen))
    scores = torch.einsum("bnhp,bsp->bhns", q, k[:, :, 0]) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen.unsqueeze(1), -math.inf)
    o = torch.einsum("bhns,bsp->bnhp", scores.softmax(-1), v[:, :, 0])
    return o, scores.logsumexp(-1).transpose(1, 2)


def same_sequence(B: int, N: int, ends: list[int] | None) -> Tensor:
    """[B, N, N]: whether two tokens of a row belong together."""
    token = torch.arange(B * N).view(B, N)
    sequence = torch.zeros(B, N) if ends is None else sum((token >= end).int() for end in ends)
    return sequence.unsqueeze(2) == sequence.unsqueeze(1)


@pytest.mark.parametrize("N", [1, 15, 31, 32, 33, 64, 100])
def test_causal(N: int) -> None:
    q, k, v, *_ = heads(2, N)
    o, lse = want(q, k, v, torch.ones(2, N, N).tril().bool())
    close(causal_attention(q, k, v), o)
    if KERNELS:
        close(_block(q, k, v, None, 0.5)[1], lse)


@pytest.mark.parametrize("ends", [[0, 40], [0, 1, 2, 35, 80], [0, 32, 48, 64], [0, 40, 41, 80]])
def test_causal_packed(ends: list[int]) -> None:
    """Over two rows of 40: a row begins anew, and so does what follows the last sequence."""
    q, k, v, *_ = heads(2, 40)
    o, lse = want(q, k, v, same_sequence(2, 40, ends) & torch.ones(40, 40).tril().bool())
    cu_seqlens = torch.tensor(ends, device=DEVICE)
    rows = slice(0, 2) if ends[-1] == 80 else slice(0, 1)  # tokens of no sequence are whatever they are
    close(causal_attention(q, k, v, cu_seqlens=cu_seqlens)[rows][:, : ends[-1]], o[rows][:, : ends[-1]])
    if KERNELS:
        got = _block(q, k, v, cu_seqlens, 0.5)[1]
        close(got[rows][:, : ends[-1]], lse[rows][:, : ends[-1]])


def noisy(B: int, N: int, S: int, ends: list[int] | None) -> Tensor:
    """[B, N, 2 N]: the clean tokens of the blocks before, and the noisy ones of the own block."""
    block = torch.arange(N) // S
    before, own = block.unsqueeze(1) > block, block.unsqueeze(1) == block
    together = same_sequence(B, N, ends)
    return torch.cat([together & before, together & own], -1)


@pytest.mark.parametrize(
    "S,N,ends",
    [
        (4, 45, None),
        (5, 33, None),
        (7, 70, [0, 7, 63, 70]),
        (8, 64, [0, 8, 40, 64]),
        (16, 70, None),
        (16, 80, [0, 16, 80]),
        (16, 80, [0, 10, 37, 80]),  # blocks of two sequences
        (24, 72, None),
        (32, 65, None),
        (48, 96, [0, 48, 96]),
        (64, 130, None),
        (64, 128, [0, 64, 128]),
        (100, 130, None),
        (127, 254, [0, 127, 254]),
        (128, 129, None),
        (128, 160, [0, 128, 160]),
    ],
)
def test_block_diffusion(S: int, N: int, ends: list[int] | None) -> None:
    q, k, v, k_clean, v_clean = heads(1, N)
    o, lse = want(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), noisy(1, N, S, ends))
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    close(block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=S, cu_seqlens=cu_seqlens), o)
    if KERNELS:
        close(_block(q, k_clean, v_clean, cu_seqlens, 0.5, S, k, v)[1], lse)


def test_block_diffusion_of_packed_rows() -> None:
    """Over two rows of 48 in blocks of 12: sequences of one, two and more blocks."""
    q, k, v, k_clean, v_clean = heads(2, 48)
    ends = [0, 12, 48, 72, 96]
    o, _ = want(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), noisy(2, 48, 12, ends))
    cu_seqlens = torch.tensor(ends, device=DEVICE)
    close(block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=12, cu_seqlens=cu_seqlens), o)


@pytest.mark.parametrize("S,N,ends", [(4, 30, None), (12, 72, [0, 24, 36, 72]), (32, 70, None)])
def test_clean_blocks_among_themselves(S: int, N: int, ends: list[int] | None) -> None:
    """Block-causal: where the noisy tokens are the clean ones."""
    q, k, v, *_ = heads(1, N)
    block = torch.arange(N) // S
    o, _ = want(q, k, v, same_sequence(1, N, ends) & (block.unsqueeze(1) >= block))
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    close(block_diffusion_attention(q, k, v, k, v, block_size=S, cu_seqlens=cu_seqlens), o)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["q", "k", "v", "k_clean", "v_clean"])
@pytest.mark.parametrize("S", [16, 24])
def test_nan_reaches_who_sees_it(S: int, where: str) -> None:
    """One NaN at token 45 of row 0, in q of head 1. Who does not see it stays as it was, but for values, which a weight
    of 0 lets through."""
    N, at = 4 * S, 45
    tensors = dict(zip(("q", "k", "v", "k_clean", "v_clean"), heads(2, N), strict=True))
    clean = block_diffusion_attention(**tensors, block_size=S)
    tensors[where][0, at, -1, 3] = math.nan
    got = block_diffusion_attention(**tensors, block_size=S)
    seen = torch.zeros_like(got, dtype=torch.bool)
    if where == "q":
        seen[0, at, 1] = True
    else:
        rows = slice(at // S * S, at // S * S + S) if where in ("k", "v") else slice(at // S * S + S, N)
        seen[0, rows, :, 3 if where.startswith("v") else slice(None)] = True
    assert got[seen].isnan().all()
    others = ~seen
    if where.startswith("v"):
        others[0] = False
    close(got[others], clean[others])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_causal(where: str) -> None:
    """The same at token 45 of 80."""
    tensors = dict(zip("qkv", heads(2, 80), strict=False))
    clean = causal_attention(**tensors)
    tensors[where][0, 45, -1, 3] = math.nan
    got = causal_attention(**tensors)
    seen = torch.zeros_like(got, dtype=torch.bool)
    if where == "q":
        seen[0, 45, 1] = True
    else:
        seen[0, 45:, :, 3 if where == "v" else slice(None)] = True
    assert got[seen].isnan().all()
    others = ~seen
    if where == "v":
        others[0] = False
    close(got[others], clean[others])


@pytest.mark.parametrize("S", [16, 24])
def test_what_is_not_seen_may_be_anything(S: int) -> None:
    """A block's own clean tokens and all behind it, and noisy tokens of other blocks, do not reach it."""
    q, k, v, k_clean, v_clean = heads(1, 2 * S)
    o = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=S)
    for t in (k_clean, v_clean):
        t[:, S:] = 1e30
    for t in (k, v):
        t[:, :S] = 1e30
    again = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=S)
    close(again[:, S:], o[:, S:])
