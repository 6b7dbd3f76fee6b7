"""Launch heuristics of the norms: pure functions of sizes."""

import pytest

from tt_kernels.norm.gated_group import gated_group_norm_launch
from tt_kernels.norm.modulated import bwd_rows, modulated_rms_norm_bwd_launch, modulated_rms_norm_fwd_launch


@pytest.mark.parametrize("D", [1, 29, 64, 2688, 4096, 16384])
def test_a_row_is_one_program(D: int) -> None:
    for launch, elements in ((modulated_rms_norm_fwd_launch(D), 16), (modulated_rms_norm_bwd_launch(D), 8)):
        assert D <= launch.BLOCK_D < 2 * D or D == launch.BLOCK_D == 1
        assert launch.num_warps in (1, 2, 4, 8, 16)
        assert 32 * elements * launch.num_warps >= launch.BLOCK_D or launch.num_warps == 16


@pytest.mark.parametrize("multiprocessors", [4, 108, 132, 148])
@pytest.mark.parametrize("B,L", [(1, 1), (1, 16), (3, 13), (256, 16), (2, 8192)])
def test_partial_sums_of_the_backward_are_bounded(B: int, L: int, multiprocessors: int) -> None:
    rows = bwd_rows(B, L, multiprocessors)
    assert 1 <= rows <= L, "a program sees one sequence"
    assert B * -(-L // rows) <= 2 * multiprocessors + B, "a last program for each sequence that rows do not divide"


@pytest.mark.parametrize("T", [1, 16, 511, 512, 4096])
@pytest.mark.parametrize("groups,N", [(8, 512), (1, 4096), (3, 5), (64, 64)])
def test_groups_go_together_where_tokens_are_many(T: int, groups: int, N: int) -> None:
    launch = gated_group_norm_launch(T, groups, N)
    assert N <= launch.BLOCK_N < 2 * N and launch.num_warps in (1, 2, 4, 8, 16)
    if T < 512:
        assert launch.BLOCK_G == 1
    else:
        assert max(4096, launch.BLOCK_N) >= launch.BLOCK_G * launch.BLOCK_N and 2 * groups > launch.BLOCK_G
