"""Launch heuristics of attention: pure functions of shapes and architecture."""

import pytest
import torch
import triton

from cards import OPS
from tools.aot import launches
from tt_kernels.attention.block_attention_launch import block_attention_launch
from tt_kernels.attention.context_attention_launch import Splits, context_attention_launch, context_splits

MULTIPROCESSORS = 132  # of an H200
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
    launch = context_attention_launch(256, 128, 2, 90)
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


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("rows", [1, 2, 16, 100, 256, 32768])
def test_context_launch(rows: int, architecture: int) -> None:
    launch = context_attention_launch(rows, 128, 2, architecture)
    assert launch.BLOCK_P == 128 and 64 % launch.BLOCK_N == 0  # a tile lies in one page
    assert 16 <= launch.BLOCK_M <= 128 and min(rows, 64) <= launch.BLOCK_M
    shared = 2 * launch.BLOCK_P * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= (163 if architecture == 80 else 227) * 1024


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("rows", [1, 16, 40, 256, 32768])
def test_no_warp_computes_rows_of_another(rows: int, architecture: int) -> None:
    """Warps of a product lie along its rows, 16 each, from 64 rows on."""
    launch = context_attention_launch(rows, 128, 2, architecture)
    assert launch.BLOCK_M < 64 or 16 * launch.num_warps <= launch.BLOCK_M


def test_tiles_of_rows() -> None:
    assert context_attention_launch(16, 128, 2, 80).BLOCK_M == 16
    assert context_attention_launch(16, 128, 2, 90).BLOCK_M == 64  # wgmma
    assert context_attention_launch(256, 5, 4, 90).BLOCK_P == 16


def test_fp32_holds_few_rows_of_wide_heads() -> None:
    """Its operands are registers: 16 rows of 64 numbers are what does not spill."""
    assert [context_attention_launch(256, P, 4, 90).BLOCK_M for P in (16, 32, 64, 128)] == [64, 32, 16, 16]


@pytest.mark.parametrize("name", ["context_attention", "append_attention"])
def test_small_cases_take_tma_as_the_published_shapes_do(name: str) -> None:
    """So that parity, memory and race checks see its tails, with and without splits, and appends beside it."""
    options = [
        [options for kernel, _, options in launches(OPS[name], torch.float16, 90, dims) if "TMA" in options]
        for dims in (*OPS[name].cases[-3:], *OPS[name].shapes)
    ]
    assert all(launch["TMA"] for (launch,) in options)
    assert {launch["SPLIT"] for (launch,) in options[:3]} == {True, False}
    assert {launch["P"] for (launch,) in options[:3]} == {16, 128}


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_block_launch(architecture: int) -> None:
    launch = block_attention_launch(128, 2, architecture)
    shared = 2 * 128 * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= (163 if architecture == 80 else 227) * 1024
    assert block_attention_launch(128, 4, architecture).BLOCK_M == 32
