"""The Mamba references against mamba-ssm and causal-conv1d, where they are installed (extra `cuda`, on a GPU)."""

import pytest
import torch

from tt_kernels import causal_conv1d, conv_state, ssd_advance, ssd_chunk

pytestmark = pytest.mark.gpu
# Their kernels multiply in TF32 or 16 bits at places; a wrong mask, decay or state shows at 1e-1.
TOLERANCE = dict(rtol=2e-2, atol=2e-2)


def test_scan_is_mamba_ssm() -> None:
    combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="mamba-ssm is not installed")
    torch.manual_seed(0)
    b, L, H, P, G, N, Q = 2, 256, 8, 64, 2, 128, 64  # whole chunks: theirs is reported wrong below one with a state
    options = dict(device="cuda")
    x, dt = torch.randn(b, L, H, P, **options), torch.randn(b, L, H, **options)
    B, C = torch.randn(2, b, L, G, N, **options)
    A, D, dt_bias = -torch.linspace(1, 16, H, **options), torch.randn(H, **options), torch.full((H,), -4.0, **options)
    state = torch.randn(b, H, P, N, **options)
    want, final = combined.mamba_chunk_scan_combined(
        x, dt, A, B, C, Q, D=D, dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    got, last, _ = ssd_chunk(x, dt, A, B, C, D, dt_bias, state, chunk_size=Q)
    torch.testing.assert_close(got, want, **TOLERANCE)
    torch.testing.assert_close(last, final, **TOLERANCE)
    torch.testing.assert_close(ssd_advance(x, dt, A, B, dt_bias, state), final, **TOLERANCE)


def test_convolution_is_causal_conv1d() -> None:
    package = pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    torch.manual_seed(0)
    B, L, C, K = 2, 37, 64, 4
    x, weight, bias = torch.randn(B, L, C).cuda(), torch.randn(C, K).cuda(), torch.randn(C).cuda()
    state = torch.randn(B, C, K).cuda()
    seed = state[..., 1:].transpose(1, 2).contiguous().transpose(1, 2)  # [B, C, K - 1], channels last, as it asks
    want, final = package.causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, initial_states=seed, return_final_states=True, activation="silu"
    )
    torch.testing.assert_close(causal_conv1d(x, weight, bias, state), want.transpose(1, 2), **TOLERANCE)
    torch.testing.assert_close(conv_state(x, None, state, kernel_size=K)[..., 1:], final, **TOLERANCE)
