"""What cu_seqlens means, the same for every op that takes it: each entry begins a sequence, and so do rows and what
lies behind the last entry. A reference on a CPU refuses what is not from 0, ascending, up to the tokens; kernels stay
in bounds. References without TRITON_INTERPRET, kernels with it or on a GPU."""

from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS
from torch import Tensor

from cards import OPS
from tt_kernels import causal_attention
from tt_kernels.reference import attention
from tt_kernels.reference.common import sequence_index
from tt_kernels.runtime.varlen import begins, resets

pytestmark = pytest.mark.kernels
PACKED = ["causal_attention", "block_diffusion_attention", "causal_conv1d", "conv_block_states", "ssd_chunk"]
DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64
WILD = [[3, 6], [-5, 4], [0, 2**31 + 4], [4, 2, 0], [0, 99], [-(2**40)], [6, 6, 6], [2**40, 1]]


def close(got: Tensor, want: Tensor) -> None:
    bound = 1e-5 if DEVICE == "cuda" else 1e-12
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def rows(B: int, N: int, *shape: int) -> Tensor:
    return torch.randn(B, N, *shape).to(DEVICE, DTYPE)


def call(name: str, B: int, N: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What lies token by token, and what else there is."""
    torch.manual_seed(2)
    weight = torch.randn(3, 4).to(DEVICE, DTYPE)
    if name == "causal_attention":
        return dict(q=rows(B, N, 2, 4), k=rows(B, N, 1, 4), v=rows(B, N, 1, 4)), {}
    if name == "block_diffusion_attention":
        kv = {key: rows(B, N, 1, 4) for key in ("k", "v", "k_clean", "v_clean")}
        return dict(q=rows(B, N, 2, 4), **kv), dict(block_size=1)
    if name == "causal_conv1d":
        return dict(x=rows(B, N, 3)), dict(weight=weight)
    if name == "conv_block_states":
        return dict(x=rows(B, N, 3)), dict(block_size=1, kernel_size=3)
    parameters = [torch.randn(2).to(DEVICE, DTYPE) for _ in range(3)]
    tokens = dict(x=rows(B, N, 2, 3), dt=rows(B, N, 2), B=rows(B, N, 1, 5), C=rows(B, N, 1, 5))
    return tokens, dict(A=-parameters[0].exp(), D=parameters[1], dt_bias=parameters[2], chunk_size=4)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def test_these_are_the_ops() -> None:
    assert {name for name, op in OPS.items() if "cu_seqlens" in op.fn.__annotations__} == set(PACKED)


@pytest.mark.parametrize(
    "B,N,entries",
    [
        (1, 6, [0, 4]),
        (1, 6, [0]),
        (1, 6, [0, 0, 2, 2, 6, 6]),
        (2, 6, [0, 4]),
        (2, 6, [0, 4, 9]),
        (2, 6, [0, 12]),
        (1, 40, [0, 33]),
        (2, 0, [0]),
    ],
)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("ints", [torch.int32, torch.int64], ids=str)
def test_sequences_are_as_if_alone(name: str, B: int, N: int, entries: list[int], ints: torch.dtype) -> None:
    tokens, others = call(name, B, N)
    fn = OPS[name].fn
    got = first(fn(**tokens, **others, cu_seqlens=torch.tensor(entries, dtype=ints, device=DEVICE)))
    for b in range(B):
        starts = sorted({0, *(e - b * N for e in entries if 0 < e - b * N < N)})
        for start, end in zip(starts, [*starts[1:], N], strict=True):
            alone = {key: t[b : b + 1, start:end].contiguous() for key, t in tokens.items()}
            close(got[b : b + 1, start:end], first(fn(**alone, **others)))


@pytest.mark.parametrize("entries", WILD)
@pytest.mark.parametrize("name", PACKED)
def test_what_cannot_be_meant(name: str, entries: list[int]) -> None:
    """Refused on a CPU; kernels take entries that are tokens for starts, whatever their order, and no other."""
    tokens, others = call(name, 1, 6)
    cu_seqlens = torch.tensor(entries, device=DEVICE)
    if not KERNELS:
        with pytest.raises(
            ValueError, match=rf"^{name}: cu_seqlens is \[.*\], expected 0 first, ascending, up to the 6"
        ):
            OPS[name].fn(**tokens, **others, cu_seqlens=cu_seqlens)
        return
    got = first(OPS[name].fn(**tokens, **others, cu_seqlens=cu_seqlens))
    meant = torch.tensor(sorted({0, *(e for e in entries if 0 <= e <= 6)}), device=DEVICE)
    close(got, first(OPS[name].fn(**tokens, **others, cu_seqlens=meant)))


@pytest.mark.parametrize("entries", [*WILD, [0, 4], [0], [0, 6, 12], [0, 7, 9]])
def test_helpers_agree_and_stay_in_bounds(entries: list[int]) -> None:
    cu_seqlens, token = torch.tensor(entries), torch.arange(12)
    starts = torch.tensor([t in entries or t % 6 == 0 for t in range(12)])
    want = torch.where(starts, token, 0).cummax(0).values.view(2, 6) - torch.tensor([[0], [6]])
    got = begins(cu_seqlens, 2, 6)
    assert got.dtype == torch.int32 and torch.equal(got.long(), want)
    marks = resets(cu_seqlens, 2, 6)
    assert marks.shape == (13,) and marks.dtype == torch.int8
    index = sequence_index(cu_seqlens, 2, 6)
    assert torch.equal(index.diff(dim=1) != 0, marks[:-1].view(2, 6)[:, 1:] != 0)
    assert resets(None, 2, 6) is None


def test_a_tail_of_one_row_does_not_see_the_sequence() -> None:
    q, k, v = rows(1, 6, 2, 4), rows(1, 6, 1, 4), rows(1, 6, 1, 4)
    got = causal_attention(q, k, v, cu_seqlens=torch.tensor([0, 4], device=DEVICE))
    close(got[:, 4:], causal_attention(q[:, 4:], k[:, 4:], v[:, 4:]))


@pytest.mark.skipif(KERNELS, reason="a choice of the references")
@pytest.mark.parametrize("entries", [[0, 40, 41, 100, 160], [0, 160], [0, 80, 160], [0, 7], [0, 50, 50, 130]], ids=str)
@pytest.mark.parametrize("name", PACKED[:2])
def test_attention_goes_one_by_one_as_it_goes_at_once(
    name: str, entries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences are taken one by one: values and gradients of the masked form. Blocks are those of the row."""
    tokens, options = call(name, 2, 80)
    options |= dict(cu_seqlens=torch.tensor(entries)) | (dict(block_size=16) if options else {})
    found = []
    for short in (1, 10**9):
        monkeypatch.setattr(attention, "SHORT", short)
        leaves = {key: t.clone().requires_grad_() for key, t in tokens.items()}
        out = getattr(attention, name)(**leaves, **options)
        slopes = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves.values())
        found.append((out, *slopes))
    for one_by_one, at_once in zip(*found, strict=True):
        close(one_by_one, at_once)
