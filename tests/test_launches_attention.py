"""Launch heuristics of attention: pure functions of shapes and architecture."""

import pytest

from tt_kernels.attention.block_diffusion_kernels import block_attention_launch
from tt_kernels.attention.context_kernels import context_attention_launch, split_size


def test_splits_depend_on_the_room_alone() -> None:
    assert [split_size(room) for room in (64, 8192, 8256, 32768, 131072)] == [512, 512, 1024, 1024, 2048]
    assert all(split_size(room) % 64 == 0 for room in range(64, 140_000, 64))


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
    assert context_attention_launch(256, 4096, 5, 4, 90).BLOCK_P == 16


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_block_launch(architecture: int, packed: bool) -> None:
    launch = block_attention_launch(128, 2, architecture, packed)
    shared = 2 * 128 * (launch.BLOCK_M + 2 * launch.BLOCK_N * launch.num_stages)
    assert shared <= (163 if architecture == 80 else 227) * 1024
    assert block_attention_launch(128, 4, architecture, packed).BLOCK_M == 32
