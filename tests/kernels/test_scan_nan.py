"""What a NaN reaches in convolution and scan: all that hangs on it, of its own row, heads, channels, chunk, no more.

A matrix product takes 0 times NaN for NaN: so earlier tokens of the same block or chunk are lost too, and neighbours in
it where sequences are packed. Other rows, heads, groups, channels and earlier chunks are not.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import values
from parity import DEVICE, OPS, leaves, make
from torch import Tensor

pytestmark = pytest.mark.kernels
NAN = float("nan")
b, L, H, P, G, N, K = 2, 7, 4, 3, 2, 5, 4
ROW, TOKEN, HEAD, GROUP = 1, 5, 2, 1  # head 2 is of group 1
C = H * P + 2 * G * N
NAMES = {
    "weights.conv_weight": "weight",
    "weights.conv_bias": "bias",
    "weights.A": "A",
    "weights.D": "D",
    "weights.dt_bias": "dt_bias",
    "state.conv": "conv_state",
    "state.ssm": "state",
    "ssm_state": "state",
}  # of the leaves of arguments, as `values` takes them
PER_TOKEN = ("x", "xBC", "dt", "B", "C")


def inputs(op: str, argument: str, place: tuple[int, ...], **dims: int) -> dict[str, Any]:
    """An op's inputs on the CPU with one NaN in them."""
    kwargs = make(OPS[op], dict(b=b, L=L, H=H, P=P, G=G, N=N) | dims, torch.float32)
    tensors = {NAMES.get(name, name): t.cpu() for name, t in leaves(kwargs).items()}
    kwargs = {k: v for k, v in kwargs.items() if k == "chunk_size"} | tensors
    kwargs[argument] = kwargs[argument].clone()
    kwargs[argument][place] = NAN
    return kwargs


def lost(op: Callable[..., Any], kwargs: dict[str, Any], *names: str) -> tuple[Tensor, ...]:
    """Where results are NaN; of the arguments, those named are left out."""
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in kwargs.items() if k not in names}
    result = op(**there)
    return tuple(t.isnan().cpu() for t in (result if isinstance(result, tuple) else (result,)))


def one_by_one(step: Callable[..., tuple[Tensor, ...]], kwargs: dict[str, Any], *states: str) -> list[Tensor]:
    """Where y [b, L, H, P] and the states are NaN if tokens are taken one after the other: what hangs on it."""
    ys, now = [], {name: kwargs[name] for name in states}
    for t in range(kwargs["dt"].shape[1]):
        y, *after = step(**kwargs | {k: kwargs[k][:, t] for k in PER_TOKEN if k in kwargs} | now)
        ys.append(y)
        now = dict(zip(states, after, strict=True))
    return [torch.stack(ys, 1).isnan(), *(t.isnan() for t in now.values())]


def with_earlier(y: Tensor, size: int) -> Tensor:
    """And of each chunk the tokens before one that is lost."""
    return torch.cat([part.flip(1).cummax(1).values.flip(1) for part in y.split(size, 1)], 1)


def between(least: Tensor, got: Tensor, most: Tensor) -> None:
    assert least.any() and not most.all()
    assert torch.equal(got | least, got), "something that hangs on it is not NaN"
    assert torch.equal(got | most, most), "something is NaN that does not hang on it"


SCAN = [
    ("x", (ROW, TOKEN, HEAD, 1)),
    ("dt", (ROW, TOKEN, HEAD)),
    ("B", (ROW, TOKEN, GROUP, 2)),
    ("C", (ROW, TOKEN, GROUP, 2)),
    ("state", (ROW, HEAD, 1, 2)),
    ("A", (HEAD,)),
    ("D", (HEAD,)),
]


@pytest.mark.parametrize("argument,place", SCAN)
def test_scan(argument: str, place: tuple[int, ...]) -> None:
    # A limit is no way for a NaN to become a number.
    kwargs = inputs("ssd_block", argument, place) | (dict(dt_limit=(0.01, 0.1)) if argument == "dt" else {})
    y, state = one_by_one(values.reference.ssd_step, kwargs, "state")
    rows, tokens, heads, _ = (set(column.tolist()) for column in y.nonzero().T)
    assert rows == ({ROW} if argument not in "AD" else {0, 1})
    assert heads == ({2, 3} if argument in "BC" else {HEAD})
    assert tokens == ({TOKEN} if argument == "C" else {5, 6} if argument in ("x", "dt", "B") else set(range(L)))
    between(y, lost(values.kernels.ssd_block, kwargs)[0], with_earlier(y, L))
    assert torch.equal(lost(values.kernels.ssd_advance, kwargs, "C", "D")[0], state)
    for Q in (2, None):
        got, last, before = lost(values.kernels.ssd_chunk, kwargs | dict(chunk_size=Q))
        between(y, got, with_earlier(y, Q or L))
        assert torch.equal(last, state)
        if Q and argument in ("x", "dt", "B"):  # in the third chunk, so that the fourth starts with it
            assert not before[:, :3].any() and torch.equal(before[:, 3], state)
    token = kwargs | {k: kwargs[k][:, TOKEN] for k in PER_TOKEN if k in kwargs}
    for got, want in zip(lost(values.kernels.ssd_step, token), lost(values.reference.ssd_step, token), strict=True):
        assert torch.equal(got, want)


BOTH = [
    ("xBC", (ROW, TOKEN - 1, HEAD * P + 1)),  # of x
    ("xBC", (ROW, TOKEN - 1, H * P + GROUP * N + 2)),  # of B
    ("xBC", (ROW, TOKEN - 1, H * P + (G + GROUP) * N + 2)),  # of C
    ("dt", (ROW, TOKEN, HEAD)),
    ("conv_state", (ROW, HEAD * P + 1, 2)),
    ("state", (ROW, HEAD, 1, 2)),
]


@pytest.mark.parametrize("argument,place", BOTH)
def test_convolution_and_scan(argument: str, place: tuple[int, ...]) -> None:
    kwargs = inputs("mamba_block", argument, place, K=K)
    y, *states = one_by_one(values.reference.mamba_step, kwargs, "conv_state", "state")
    rows, _, heads, _ = (set(column.tolist()) for column in y.nonzero().T)
    assert rows == {ROW} and heads <= {2, 3}
    between(y, lost(values.kernels.mamba_block, kwargs)[0], with_earlier(y, L))
    for got, want in zip(lost(values.kernels.mamba_advance, kwargs, "D"), states, strict=True):
        assert torch.equal(got, want)
    seen, *after = lost(values.kernels.mamba_extend, kwargs)
    between(y, seen, with_earlier(y, L))
    for got, want in zip(after, states, strict=True):
        assert torch.equal(got, want)
    token = kwargs | {k: kwargs[k][:, TOKEN] for k in ("xBC", "dt")}
    for got, want in zip(lost(values.kernels.mamba_step, token), lost(values.reference.mamba_step, token), strict=True):
        assert torch.equal(got, want)


def test_convolution_alone() -> None:
    """No products of tiles: exactly the K tokens that see the column, and none of another sequence."""
    x, weight = torch.randn(2, 9, 6), torch.randn(6, K)
    x[ROW, 3, 4] = NAN
    want = torch.zeros(2, 9, 6, dtype=torch.bool)
    want[ROW, 3 : 3 + K, 4] = True
    assert torch.equal(lost(values.kernels.causal_conv1d, dict(x=x, weight=weight))[0], want)
    want[ROW, 5:] = False  # another sequence begins at token 5 of this row
    packed = dict(x=x, weight=weight, cu_seqlens=torch.tensor([0, 9, 14, 18]))
    assert torch.equal(lost(values.kernels.causal_conv1d, packed)[0], want)


@pytest.mark.parametrize("argument,place", SCAN[:4])
def test_packed_sequences(argument: str, place: tuple[int, ...]) -> None:
    """Chunks before it are whole. What follows is not promised: a state that starts anew is 0 times the one before."""
    kwargs = inputs("ssd_chunk", argument, place, Q=2, seeded=0) | dict(cu_seqlens=torch.tensor([0, L, L + 4, 2 * L]))
    got = lost(values.kernels.ssd_chunk, kwargs)[0]
    start = TOKEN // 2 * 2
    assert got[ROW, TOKEN].any() and not got[0].any() and not got[ROW, :start].any()
    assert set(got.nonzero()[:, 2].tolist()) <= ({2, 3} if argument in "BC" else {HEAD})
