"""Launch heuristics of attention: pure functions of shapes and architecture."""

import pytest
import triton

from tt_kernels.attention.block_diffusion_kernels import block_attention_launch
from tt_kernels.attention.context_kernels import context_attention_launch, context_splits

MULTIPROCESSORS = 132  # of an H200
SHAPES = [(L, heads, R) for L in (1, 2, 16, 32, 64, 100, 2048) for heads, R in ((1, 1), (2, 16), (8, 4), (32, 1))]


def size_of_a_split(length: int, most: int, least: int) -> int:
    """As the kernel has it."""
    return max(triton.cdiv(triton.cdiv(length, most), 64) * 64, least)


@pytest.mark.parametrize("L,heads,R", SHAPES)
def test_splits_cover_every_length_in_any_room(L: int, heads: int, R: int) -> None:
    most, least = context_splits(L * R, heads)
    assert 1 <= most <= 64 and least % 64 == 0  # 64: what one program combines; tiles lie in one page
    for length in (0, 1, 63, 64, 65, 4095, 4096, 8192, 33_000, 131_072, 1_000_000):
        size = size_of_a_split(length, most, least)
        for room in (length, length + 1, 2 * length + 64):
            assert min(most, -(-room // least)) * size >= length


@pytest.mark.parametrize(
    "length", [8192, 8193, 12_000, 16_384, 20_000, 32_768, 32_896, 65_536, 100_000, 131_072, 131_200]
)
def test_a_block_against_a_long_context_keeps_the_gpu_busy(length: int) -> None:
    """One wave of programs, two of half the size at 8K: the rounding to 64 and the last split cost a quarter of the
    time there, a tenth from 32K on."""
    most, least = context_splits(256, 2)
    launch = context_attention_launch(256, length, 128, 2, 90)
    size, tiles = size_of_a_split(length, most, least), 256 // launch.BLOCK_M
    together = MULTIPROCESSORS * 128 // launch.BLOCK_M
    assert 2 * tiles * -(-length // size) <= together
    assert 2 * tiles * length / (together * size) >= (0.9 if length >= 32_768 else 0.75)


@pytest.mark.parametrize("L,heads,R", SHAPES)
def test_partial_results_are_bounded_whatever_the_context(L: int, heads: int, R: int) -> None:
    most, least = context_splits(L * R, heads)
    assert most == 1 or most * L * R * heads <= 128 * 128  # rows of fp32 results
    assert least >= L * R  # as many bytes as K and V in 16 bits at most
    if L * R * heads >= 128 * 128:
        assert most == 1


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("rows", [1, 2, 16, 100, 256, 32768])
@pytest.mark.parametrize("room", [64, 8192, 32768, 131072])
def test_context_launch(rows: int, room: int, architecture: int) -> None:
    launch = context_attention_launch(rows, room, 128, 2, architecture)
    assert launch.BLOCK_P == 128 and 64 % launch.BLOCK_N == 0  # a tile lies in one page
    assert 16 <= launch.BLOCK_M <= 128 and min(rows, 64) <= launch.BLOCK_M
    shared = 2 * launch.BLOCK_P * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= (163 if architecture == 80 else 227) * 1024


def test_single_tokens_take_the_smallest_tile() -> None:
    assert context_attention_launch(16, 4096, 128, 2, 90).BLOCK_M == 16
    assert context_attention_launch(256, 131072, 128, 2, 90).BLOCK_M == 128
    assert context_attention_launch(32768, 4096, 128, 2, 90).BLOCK_M == 128
    assert context_attention_launch(256, 4096, 5, 4, 90).BLOCK_P == 16


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_block_launch(architecture: int, packed: bool) -> None:
    launch = block_attention_launch(128, 2, architecture, packed)
    shared = 2 * 128 * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= (163 if architecture == 80 else 227) * 1024
    assert block_attention_launch(128, 4, architecture, packed).BLOCK_M == 32
