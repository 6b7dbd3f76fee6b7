"""Convolution and scan against mamba-ssm, causal-conv1d and fla, where they are installed (extras `cuda`, `peers`; on a
GPU): their own calls written out, then every small case of our tests that they take, by the adapters of bench/."""

import parity
import pytest
import torch
import values
from parity import OPS, make
from torch import Tensor

from bench.peers import REGISTRY
from bench.peers.base import Unavailable, difference

pytestmark = pytest.mark.gpu
# Their kernels multiply in TF32 or 16 bits at places; a wrong mask, decay or state shows at 1e-1.
TOLERANCE = dict(rtol=2e-2, atol=2e-2)
H, P, G, N, K = 8, 64, 2, 128, 4
C = H * P + 2 * G * N


# Beside our own small cases, which mostly are no whole chunks of theirs: seeded, packed, of every chunk they have.
WHOLE = dict(H=8, P=64, G=2, N=128)
SCANS = dict(
    causal_conv1d=[dict(B=2, L=L, C=256, K=4) for L in (1, 3, 64)],
    ssd_step=[dict(b=3, **WHOLE)],
    ssd_block=[dict(b=2, L=L, seeded=seeded, **WHOLE) for L in (16, 32, 64, 128) for seeded in (0, 1)],
    ssd_chunk=[
        *(dict(b=2, L=256, Q=Q, **WHOLE) for Q in (0, 16, 64, 128)),
        *(dict(b=1, L=256, Q=Q, seeded=0, packed=1, **WHOLE) for Q in (0, 32)),
    ],
    mamba_block=[dict(b=2, L=L, K=4, **WHOLE) for L in (16, 32, 64)],
    mamba_advance=[dict(b=2, L=L, K=4, ragged=0, **WHOLE) for L in (16, 32, 64)],
    mamba_step=[dict(b=3, K=4, **WHOLE)],
)
OURS = ("eager", "compiled", "apart")
CASES = [
    pytest.param(op, name, dims, id=f"{op}-{name}-{'-'.join(f'{k}{v}' for k, v in dims.items())}")
    for op, more in SCANS.items()
    for name in REGISTRY[op]
    if name not in OURS
    for dims in (*OPS[op].cases, *more)
]


@pytest.mark.parametrize(("op", "name", "dims"), CASES)
def test_cases_of_our_tests(op: str, name: str, dims: dict[str, int]) -> None:
    kwargs, peer = make(OPS[op], dims, torch.float32), REGISTRY[op][name]
    ours = parity.results(OPS[op], OPS[op].fn, kwargs)  # before a peer writes the states
    try:
        theirs = peer.results(OPS[op], peer.call(OPS[op], kwargs)())
    except Unavailable as why:
        pytest.skip(str(why))
    for output, want in theirs.items():
        assert difference(ours[output], want) < TOLERANCE["rtol"], output


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE)


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    """A, D, dt_bias."""
    options = dict(device="cuda")
    return -torch.linspace(1, 16, H, **options), torch.randn(H, **options), torch.full((H,), -4.0, **options)


def last_columns(state: Tensor) -> Tensor:
    """[B, C, K] -> [B, C, K - 1], channels last, as causal-conv1d asks."""
    return state[..., 1:].transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("L,seeded", [(256, True), (64, True), (256, False)])
def test_scan_is_mamba_ssm(L: int, seeded: bool) -> None:
    combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="mamba-ssm is not installed")
    torch.manual_seed(0)
    b, Q = 2, 64  # whole chunks: theirs is reported wrong below one with a state
    options = dict(device="cuda")
    x, dt = torch.randn(b, L, H, P, **options), torch.randn(b, L, H, **options)
    B, C = torch.randn(2, b, L, G, N, **options)
    A, D, dt_bias = parameters()
    state = torch.randn(b, H, P, N, **options) if seeded else None
    want, final = combined.mamba_chunk_scan_combined(
        x, dt, A, B, C, Q, D=D, dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    for chunk_size in (Q, None):
        got, last, _ = values.kernels.ssd_chunk(x, dt, A, B, C, D, dt_bias, state, chunk_size=chunk_size)
        same(got, want)
        same(last, final)
    same(values.kernels.ssd_advance(x, dt, A, B, dt_bias, state), final)
    same(values.kernels.ssd_block(x, dt, A, B, C, D, dt_bias, state), want)


def test_step_is_mamba_ssm() -> None:
    update = pytest.importorskip("mamba_ssm.ops.triton.selective_state_update", reason="mamba-ssm is not installed")
    torch.manual_seed(0)
    b, options = 3, dict(device="cuda")
    x, dt, state = torch.randn(b, H, P, **options), torch.randn(b, H, **options), torch.randn(b, H, P, N, **options)
    B, C = torch.randn(2, b, G, N, **options)
    A, D, dt_bias = parameters()
    theirs = state.clone()  # written in place
    want = update.selective_state_update(
        theirs,
        x,
        dt[..., None].expand(b, H, P),
        A[:, None, None].expand(H, P, N),
        B,
        C,
        D[:, None].expand(H, P),
        dt_bias=dt_bias[:, None].expand(H, P),
        dt_softplus=True,
    )
    got, new = values.kernels.ssd_step(x, dt, A, B, C, D, dt_bias, state)
    same(got, want)
    same(new, theirs)


@pytest.mark.parametrize("L", [1, 2, 37])
def test_convolution_is_causal_conv1d(L: int) -> None:
    package = pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, L, C).cuda(), torch.randn(C, K).cuda(), torch.randn(C).cuda()
    state = torch.randn(2, C, K).cuda()
    want, final = package.causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        bias,
        initial_states=last_columns(state),
        return_final_states=True,
        activation="silu",
    )
    same(values.kernels.causal_conv1d(x, weight, bias, state), want.transpose(1, 2))
    same(values.kernels.conv_state(x, None, state, kernel_size=K)[..., 1:], final)


def test_block_and_step_are_both_packages() -> None:
    """Convolution and scan together, from both states: 64 tokens, which is one of their chunks."""
    package = pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="mamba-ssm is not installed")
    torch.manual_seed(0)
    b, L, options = 2, 64, dict(device="cuda")
    xBC, dt = torch.randn(b, L, C, **options), torch.randn(b, L, H, **options)
    weight, bias = torch.randn(C, K, **options) / 2, torch.randn(C, **options)
    column, state = torch.randn(b, C, K, **options), torch.randn(b, H, P, N, **options)
    A, D, dt_bias = parameters()
    columns = package.causal_conv1d_fn(
        xBC.transpose(1, 2), weight, bias, initial_states=last_columns(column), activation="silu"
    ).transpose(1, 2)
    x, B, Cs = columns.split([H * P, G * N, G * N], -1)
    x, B, Cs = x.reshape(b, L, H, P), B.reshape(b, L, G, N), Cs.reshape(b, L, G, N)
    want, final = combined.mamba_chunk_scan_combined(
        x, dt, A, B, Cs, L, D=D, dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    same(values.kernels.mamba_block(xBC, dt, weight, bias, A, D, dt_bias, column, state), want)
    same(values.kernels.mamba_block(xBC[:, :16], dt[:, :16], weight, bias, A, D, dt_bias, column, state), want[:, :16])
    same(values.kernels.mamba_advance(xBC, dt, weight, bias, A, dt_bias, column, state)[1], final)
    for t in range(4):
        y, column, state = values.kernels.mamba_step(xBC[:, t], dt[:, t], weight, bias, A, D, dt_bias, column, state)
        same(y, want[:, t])
