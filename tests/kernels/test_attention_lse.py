"""The log-sum-exp of attention to a cache: its value, and two parts of a context joined by it."""

import pytest
import torch
from parity import DEVICE, DTYPES

from cards import OPS
from tt_kernels import append_attention, context_attention, reference

pytestmark = [pytest.mark.kernels, pytest.mark.sanitize]

CASES = (
    dict(B=2, L=3, Hq=4, Hkv=2, P=16, S=70, causal=1),
    dict(B=2, L=2, Hq=4, Hkv=1, P=16, S=400),  # in splits
    dict(B=1, L=70, Hq=2, Hkv=1, P=8, S=30, causal=1),
    dict(B=1, L=2, Hq=2, Hkv=1, P=8, S=0),
    dict(B=2, L=3, Hq=4, Hkv=2, P=16, S=400, window=150, softcap=2),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", CASES, ids=str)
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_is_the_logarithm_of_the_sum(dims: dict[str, int], scale: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = OPS["context_attention"].inputs(dtype, **dims)
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    more = {name: option for name, option in given.items() if name not in tensors} | dict(scale=scale)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    want = reference.context_attention(**exact, **more, return_lse=True)
    there = {name: t.to(DEVICE) for name, t in tensors.items()}
    o, lse = context_attention(**there, **more, return_lse=True)
    assert lse.dtype == torch.float32
    assert torch.equal(o, context_attention(**there, **more))
    # Products of what is given, up to 20 in size, are summed in fp32, and exponents by an approximate exp2.
    torch.testing.assert_close(lse.cpu().double(), want.lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("append", [False, True])
def test_two_parts_are_the_whole(append: bool, dtype: torch.dtype) -> None:
    """The first part is a page, its last 8 tokens taken for the block's own, as rows that share a prefix would have it;
    the second is the rest of the context and the block itself."""
    torch.manual_seed(0)
    given = OPS["context_attention"].inputs(dtype, B=1, L=8, Hq=4, Hkv=2, P=16, S=192, shuffled=0)
    given = {name: t.to(DEVICE) for name, t in given.items() if isinstance(t, torch.Tensor)}
    given["cache_lengths"] = given["cache_lengths"] - 64  # room for those that enter
    op = append_attention if append else context_attention
    late = dict(page_table=given["page_table"][:, 1:], cache_lengths=given["cache_lengths"] - 64)
    own = {name: given[f"{name}_pages"][:1, 56:] for name in "kv"}
    first = context_attention(
        **given | own | dict(cache_lengths=torch.full_like(given["cache_lengths"], 56)), return_lse=True
    )
    second = op(**given | late, return_lse=True)
    whole = op(**given, return_lse=True)
    parts = torch.stack([first.lse, second.lse]).double()
    lse = parts.logsumexp(0)
    o = (torch.stack([first.o, second.o]).double() * (parts - lse).exp()[..., None]).sum(0)
    torch.testing.assert_close(lse, whole.lse.double(), rtol=0, atol=2e-5)
    # Three results are rounded to the dtype, of averages that are 2 at most; sums in fp32.
    atol = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(o, whole.o.double(), rtol=0, atol=atol)
