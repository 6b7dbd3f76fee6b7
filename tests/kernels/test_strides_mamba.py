"""Convolution and scan on views that reach over 2^31 elements: row, token, head, channel and tap may lie anywhere.

Memory that nobody writes costs nothing: a view's storage is gigabytes of addresses, a few pages of memory.
"""

import functools
from typing import Any

import pytest
import torch
from parity import KERNELS, OPS, leaves, make, results, with_leaves
from torch import Tensor

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU"),
]
# Three of everything: the last index times a stride that 32 bits hold is what they do not.
STEP = dict(b=3, H=3, P=3, G=3, N=3)
BLOCK = STEP | dict(L=3)
CASES = {
    "causal_conv1d": dict(B=3, L=3, C=3, K=3),
    "conv_advance": dict(B=3, L=3, C=3, K=3),
    "conv_block_states": dict(B=3, N=6, C=3, K=2, S=2),
    "ssd_step": STEP,
    "ssd_block": BLOCK,
    "ssd_advance": BLOCK,
    "ssd_chunk": BLOCK | dict(Q=2),
    "mamba_block": BLOCK | dict(K=3),
    "mamba_advance": BLOCK | dict(K=3),
    "mamba_step": STEP | dict(K=3),
    "mamba_extend": BLOCK | dict(K=3),
}


def far_apart(t: Tensor, dim: int) -> Tensor:
    """t with its last slice of `dim` 2^31 elements behind the first."""
    stride = -(-(2**31) // (t.shape[dim] - 1))
    strides = list(t.stride())
    strides[dim] = stride
    last = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    return t.new_empty(last + 1).as_strided(t.shape, strides).copy_(t)


def views() -> list[Any]:
    """By op the dimension of each argument that is spread: every dimension of every argument in one of them."""
    found = []
    for name, dims in CASES.items():
        tensors = {k: t for k, t in leaves(make(OPS[name], dims, torch.float16)).items() if t.dim() > 1}
        wide = {
            k: [dim for dim in range(t.dim()) if t.shape[dim] > 1]
            for k, t in tensors.items()
            if k not in ("weight", "weights.conv_weight")
        }
        for i in range(max(map(len, wide.values()))):
            spread = {k: dims[(i + at) % len(dims)] for at, (k, dims) in enumerate(wide.items())}
            found.append(pytest.param(name, spread, id=f"{name}-{i}"))
    return found


@functools.cache
def dense(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A case's arguments and its results."""
    op = OPS[name]
    kwargs = make(op, CASES[name], torch.float16)
    # A case in fp32 would take twice the addresses.
    kwargs = with_leaves(kwargs, {k: t.half() for k, t in leaves(kwargs).items() if t.is_floating_point()})
    return kwargs, results(op, op.fn, kwargs)


@pytest.mark.parametrize("name,spread", views())
def test_any_dimension_may_be_far_apart(name: str, spread: dict[str, int]) -> None:
    op, (kwargs, want) = OPS[name], dense(name)
    far = {argument: far_apart(leaves(kwargs)[argument], dim) for argument, dim in spread.items()}
    got = results(op, op.fn, with_leaves(kwargs, far))
    for key in want:
        assert torch.equal(got[key], want[key]), key
