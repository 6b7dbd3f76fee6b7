"""Launch heuristics of attention: pure functions of shapes and architecture."""

import pytest
import torch
import triton

from cards import OPS
from tools.aot import SHARED, TARGETS, launches
from tt_kernels.attention.block_attention_launch import BlockAttentionLaunch, block_attention_launch
from tt_kernels.attention.context_attention_launch import (
    ContextAttentionLaunch,
    Splits,
    context_attention_launch,
    context_splits,
)

MULTIPROCESSORS = 132  # of an H200
HEAD_SIZES = (5, 64, 80, 96, 128, 256)
SHAPES = [(L, heads, R) for L in (1, 2, 16, 32, 64, 100, 2048) for heads, R in ((1, 1), (2, 16), (8, 4), (32, 1))]
BATCHES = (1, 2, 3, 8, 64, 300)
LENGTHS = (0, 1, 63, 64, 65, 1000, 4095, 4096, 8192, 33_000, 131_072, 1_000_000)


def size_of_a_split(length: int, splits: Splits) -> int:
    """As the kernel has it."""
    fill, max_splits, min_tokens = splits
    n = min(max(fill, triton.cdiv(length, 16 * min_tokens)), max_splits)
    return max(triton.cdiv(triton.cdiv(length, n), 64) * 64, min_tokens)


@pytest.mark.parametrize("L,heads,R", SHAPES)
def test_splits_cover_every_length_in_any_room(L: int, heads: int, R: int) -> None:
    for batch in BATCHES:
        splits = context_splits(batch, L * R, heads)
        assert (
            1 <= splits.fill <= splits.max_splits <= 64 and splits.min_tokens % 64 == 0
        )  # 64: what one program combines; tiles lie in one page
        for length in LENGTHS:
            size = size_of_a_split(length, splits)
            for room in (length, length + 1, 2 * length + 64):
                assert splits.of(room) * size >= length


@pytest.mark.parametrize("L,heads,R", SHAPES)
def test_the_batch_shortens_no_split_and_does_not_matter_to_the_longest(L: int, heads: int, R: int) -> None:
    alone = context_splits(1, L * R, heads)
    for length in LENGTHS:
        sizes = [size_of_a_split(length, context_splits(batch, L * R, heads)) for batch in BATCHES]
        assert sizes == sorted(sizes)
        if length >= 16 * alone.min_tokens * alone.max_splits:
            assert len(set(sizes)) == 1
    assert alone.fill == alone.max_splits


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("S", [1024, 8192, 32_768, 131_072])
def test_what_splits_leave_behind_is_bounded(batch: int, S: int) -> None:
    """The published block: 8.5 MB of fp32 in all, or an eighth of K and V, or less."""
    splits = context_splits(batch, 256, 2).of(S)
    partial, cached = batch * splits * 512 * 130 * 4, 2 * batch * S * 2 * 128 * 2
    assert splits == 1 or partial <= 8.6e6 or 2 * partial <= 0.13 * cached
    if (batch, S) == (64, 8192):
        assert splits == 2


@pytest.mark.parametrize(
    "length", [8192, 8193, 12_000, 16_384, 20_000, 32_768, 32_896, 65_536, 100_000, 131_072, 131_200]
)
def test_a_block_against_a_long_context_keeps_the_gpu_busy(length: int) -> None:
    """One wave of programs, two of half the size at 8K: the rounding to 64 and the last split cost a quarter of the
    time there, a tenth from 32K on."""
    launch = context_attention_launch(1, 256, length, 128, 2, 90)
    size, tiles = size_of_a_split(length, context_splits(1, 256, 2)), 256 // launch.BLOCK_M
    together = MULTIPROCESSORS * 128 // launch.BLOCK_M
    assert 2 * tiles * -(-length // size) <= together
    assert 2 * tiles * length / (together * size) >= (0.9 if length >= 32_768 else 0.75)


@pytest.mark.parametrize("L,heads,R", SHAPES)
def test_partial_results_are_bounded_whatever_the_context(L: int, heads: int, R: int) -> None:
    for batch in BATCHES:
        fill, max_splits, min_tokens = context_splits(batch, L * R, heads)
        assert fill == 1 or batch * fill * L * R * heads <= 128 * 128  # rows of fp32 results
        assert max_splits == 1 or max_splits * L * R * heads <= 128 * 128
        assert min_tokens >= L * R  # written, as many bytes as K and V in 16 bits at most
    if L * R * heads >= 128 * 128:
        assert max_splits == 1


def assert_fits(
    launch: ContextAttentionLaunch | BlockAttentionLaunch, P: int, itemsize: int, architecture: int
) -> None:
    """Queries, and the keys and values of every stage, are in shared memory together, in 16 bits three stages: a tile
    is on its way while others are used. No warp computes rows of another: they lie along the rows of a product, 16
    each, from 64 rows on."""
    assert max(16, triton.next_power_of_2(P)) == launch.BLOCK_P
    shared = itemsize * launch.BLOCK_P * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= SHARED[architecture] * 1024
    assert itemsize > 2 or P > 256 or launch.num_stages >= 3
    assert (
        launch.BLOCK_M < 64 or 16 * launch.num_warps <= launch.BLOCK_M or architecture >= 100
    )  # tcgen05: once for all


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("P", HEAD_SIZES)
def test_context_launch(P: int, itemsize: int, architecture: int) -> None:
    for batch, room in ((1, 64), (1, 8192), (64, 8192), (1, 131_072)):
        for rows in (1, 16, 40, 100, 256, 32_768):
            launch = context_attention_launch(batch, rows, room, P, itemsize, architecture)
            assert_fits(launch, P, itemsize, architecture)
            assert 64 % launch.BLOCK_N == 0  # a tile lies in one page
            if itemsize == 2 and P <= 256 and architecture >= 90:
                assert launch.BLOCK_M >= 64  # of wgmma


def test_many_products_read_keys_for_more_rows() -> None:
    """With 64 rows a tile the four of a published block read each key from L2: few programs take that, not many."""
    small, batch, long = (
        context_attention_launch(B, 256, S, 128, 2, 90) for B, S in ((1, 8192), (64, 8192), (1, 2**17))
    )
    assert min(batch.BLOCK_M, long.BLOCK_M) > small.BLOCK_M


def test_fp32_holds_few_rows_of_wide_heads() -> None:
    """Its operands are registers: 16 rows of 64 numbers are what does not spill."""
    rows = [context_attention_launch(1, 256, 4096, P, 4, 90).BLOCK_M for P in (16, 32, 64, 128)]
    assert rows == sorted(rows, reverse=True) and rows[2] == 16


@pytest.mark.parametrize("name", ["context_attention", "append_attention"])
def test_small_cases_take_tma_as_the_published_shapes_do(name: str) -> None:
    """So that parity, memory and race checks see its tails, with and without splits, and appends beside it."""
    options = [
        [options for kernel, _, options, _ in launches(OPS[name], torch.float16, 90, dims) if "TMA" in options]
        for dims in (*OPS[name].cases[-3:], *OPS[name].shapes)
    ]
    assert all(launch["TMA"] for (launch,) in options)
    assert {launch["SPLIT"] for (launch,) in options[:3]} == {True, False}
    assert {launch["P"] for (launch,) in options[:3]} == {16, 128}


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("P", HEAD_SIZES)
def test_block_launch(P: int, itemsize: int, architecture: int) -> None:
    assert_fits(block_attention_launch(P, itemsize, architecture), P, itemsize, architecture)
