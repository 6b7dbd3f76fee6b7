"""Launch heuristics of the norms, pure functions of sizes, and numbers that their card does not come to."""

import pytest
import torch
from parity import DEVICE

from tt_kernels import gated_group_norm, modulated_rms_norm, rms_norm
from tt_kernels.norm.gated_group_norm import gated_group_norm_launch
from tt_kernels.norm.modulated_rms_norm_launch import bwd_launch, bwd_rows, fwd_launch


@pytest.mark.parametrize("D", [1, 29, 64, 2688, 4096, 16384])
def test_a_row_is_one_program(D: int) -> None:
    for elements, launch in ((8, fwd_launch(16, D, 132)), (16, fwd_launch(4096, D, 132)), (8, bwd_launch(D))):
        assert D <= launch.BLOCK_D < 2 * D or D == launch.BLOCK_D == 1
        assert launch.num_warps in (1, 2, 4, 8, 16)
        assert 32 * elements * launch.num_warps >= launch.BLOCK_D or launch.num_warps == 16
        assert 32 * elements * launch.num_warps <= launch.BLOCK_D or launch.num_warps == 1, "fewer bytes a load"


@pytest.mark.parametrize("multiprocessors", [4, 108, 132, 148])
@pytest.mark.parametrize("B,L", [(1, 1), (1, 16), (3, 13), (256, 16), (2, 8192)])
def test_partial_sums_of_the_backward_are_bounded(B: int, L: int, multiprocessors: int) -> None:
    rows = bwd_rows(B, L, multiprocessors)
    assert 1 <= rows <= L, "a program sees one sequence"
    assert B * -(-L // rows) <= 2 * multiprocessors + B, "a last program for each sequence that rows do not divide"


@pytest.mark.parametrize("T", [1, 16, 511, 512, 4096])
@pytest.mark.parametrize("groups,N", [(8, 512), (1, 4096), (3, 5), (64, 64), (64, 512), (1, 16384)])
def test_groups_go_together_where_tokens_are_many(T: int, groups: int, N: int) -> None:
    for per_warp in (512, 256):  # 16 numbers a thread forward, 8 backward
        launch = gated_group_norm_launch(T, groups, N, per_warp=per_warp)
        held = launch.BLOCK_G * launch.BLOCK_N
        assert N <= launch.BLOCK_N < 2 * N and launch.num_warps in (1, 2, 4, 8, 16)
        assert launch.BLOCK_G == 1 or (2 * groups > launch.BLOCK_G and held <= 4096)
        assert held <= per_warp * launch.num_warps or launch.num_warps == 16
        assert held >= per_warp * launch.num_warps or launch.num_warps == 1
        programs = T * -(-groups // launch.BLOCK_G)
        assert programs >= min(2 * 148, T * groups), "two for each multiprocessor, where there are groups for them"
        assert T < 4096 or held >= min(2048, groups * N), "bytes in flight, where programs are more than enough"


@pytest.mark.kernels
def test_a_gate_that_is_shut_is_shut_for_large_numbers_too() -> None:
    """x z alone is beyond fp32 where x silu(z) is 0; likewise on the way back."""
    x = torch.tensor([[1e25, 1.0, -1e30, 2.0]], device=DEVICE, requires_grad=True)
    z = torch.tensor([[-1e25, 0.5, -1e20, 0.25]], device=DEVICE, requires_grad=True)
    y = gated_group_norm(x, z, torch.ones(4, device=DEVICE))
    y.sum().backward()
    gated = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64)  # x z
    gated *= torch.tensor([0.0, 0.5, 0.0, 0.25], dtype=torch.float64).sigmoid()
    want = gated / (gated.square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(y.detach().cpu().double()[0], want, rtol=1e-5, atol=1e-7)
    assert x.grad.isfinite().all() and z.grad.isfinite().all()


@pytest.mark.kernels
def test_rows_without_columns() -> None:
    x, empty = torch.ones(2, 3, 0, device=DEVICE), torch.ones(0, device=DEVICE)
    assert rms_norm(x, empty).shape == gated_group_norm(x, x, empty).shape == (2, 3, 0)
    y, residual = modulated_rms_norm(x, empty, x[:, 0], x[:, 0], branch=x, gate=x[:, 0])
    assert y.shape == residual.shape == (2, 3, 0)
