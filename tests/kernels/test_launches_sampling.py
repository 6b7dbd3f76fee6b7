"""Tiles and grids of sampling, pure functions of sizes and architecture."""

import pytest
import torch
import triton

from cards import OPS
from cards.sampling import CANDIDATES
from tt_kernels import unmask
from tt_kernels.runtime.launch import INTERPRET, recording
from tt_kernels.sampling.commit import commit_launch
from tt_kernels.sampling.gumbel_noise import gumbel_noise_launch
from tt_kernels.sampling.head_sample_launch import SUB, head_launch, head_pieces
from tt_kernels.sampling.records import combine_launch
from tt_kernels.sampling.sample import sample_launch
from tt_kernels.sampling.unmask import finish_launch, masked_rows_launch

V, D = 131072, 2688
ROWS = (1, 16, 17, 32, 64, 65, 128, 512, 4096)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may take
REGISTERS = 64 * 1024  # of a multiprocessor


def stage(rows: int, architecture: int, itemsize: int = 2) -> int:
    launch = head_launch(rows, V, D, itemsize, architecture)
    return (launch.BLOCK_V + launch.BLOCK_T) * launch.BLOCK_K * itemsize


def taken(rows: int, architecture: int, itemsize: int = 2) -> int:
    return head_launch(rows, V, D, itemsize, architecture).num_stages * stage(rows, architecture, itemsize)


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("rows", ROWS)
def test_head_fits_a_multiprocessor(rows: int, architecture: int) -> None:
    for itemsize in (2, 4):
        launch = head_launch(rows, V, D, itemsize, architecture)
        assert taken(rows, architecture, itemsize) <= SHARED[architecture]
        sums = launch.BLOCK_V * launch.BLOCK_T
        assert sums <= REGISTERS // 2 and sums <= 128 * 32 * launch.num_warps  # half of what a thread can name


@pytest.mark.parametrize("architecture", (90, 100))
@pytest.mark.parametrize("rows", (1, 16, 32, 64))
def test_two_heads_share_a_multiprocessor_up_to_64_rows(rows: int, architecture: int) -> None:
    """One loads while the other samples: 64 KB on their way outlast a round trip to memory twice (an H200 reads 36 KB a
    multiprocessor in a microsecond)."""
    assert 2 * (taken(rows, architecture) + 1024) <= 228 * 1024  # 1024 of each are the system's
    assert 2 * (taken(rows, architecture) - stage(rows, architecture)) >= 64 * 1024
    launch = head_launch(rows, V, D, 2, architecture)
    assert 2 * launch.BLOCK_V * launch.BLOCK_T <= REGISTERS // 2 and 2 * 32 * launch.num_warps <= 512


@pytest.mark.parametrize("architecture", SHARED)
def test_head_tile_grows_with_rows(architecture: int) -> None:
    """Up to 64 rows the head is read once; few rows are padded to what tensor cores take, more to less than twice, or
    to 64 where one program has a multiprocessor anyhow; of more, from the cache, no program reads again for fewer."""
    tiles = []
    for rows in ROWS:
        launch = head_launch(rows, V, D, 2, architecture)
        tiles.append(launch.BLOCK_T)
        assert launch.BLOCK_T % SUB == 0 and launch.BLOCK_V >= 64
        assert min(rows, 64) <= launch.BLOCK_T
        least = SUB if rows <= SUB or architecture >= 90 else 64
        assert max(least, triton.next_power_of_2(rows)) >= launch.BLOCK_T
    assert tiles == sorted(tiles)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("vocabulary", (1, 5, 128, 1100, V))
@pytest.mark.parametrize("multiprocessors", (4, 14, 28, 108, 132, 148))  # 14 and 28: slices of a GPU
def test_head_pieces_cover_the_vocabulary_once(rows: int, vocabulary: int, multiprocessors: int) -> None:
    launch = head_launch(rows, vocabulary, D, 2, 90)
    pieces, tiles, depth = head_pieces(launch, vocabulary, multiprocessors)
    assert (pieces - 1) * tiles * launch.BLOCK_V < vocabulary <= pieces * tiles * launch.BLOCK_V
    assert (tiles if launch.BLOCK_T > SUB else depth) == 1
    parts = triton.cdiv(pieces, depth)
    assert vocabulary < V or parts >= 1.6 * multiprocessors, "two programs a multiprocessor, or nearly"
    combined = combine_launch(parts, depth)
    assert all(n & (n - 1) == 0 for n in (combined.BLOCK_R, combined.BLOCK_S))


@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("vocabulary", (1, 5, 128, 1100, V))
@pytest.mark.parametrize("multiprocessors", (4, 108, 132, 148))
def test_parts_do_not_depend_on_the_rows(
    vocabulary: int, multiprocessors: int, itemsize: int, architecture: int
) -> None:
    parts = set()
    for rows in ROWS:
        launch = head_launch(rows, vocabulary, D, itemsize, architecture)
        pieces, tiles, depth = head_pieces(launch, vocabulary, multiprocessors)
        parts.add((-(-pieces // depth), launch.BLOCK_V * tiles * depth))
    assert len(parts) == 1 and parts.pop()[0] <= 2 * multiprocessors


def test_what_is_tuned_keeps_the_order_of_sums() -> None:
    assert {launch.BLOCK_V for launch in CANDIDATES} == {head_launch(rows, V, D, 2, 90).BLOCK_V for rows in ROWS}


MANY = 70_000  # more than a grid's second axis takes
LARGE = [
    ("gumbel_noise", dict(R=MANY, V=131072)),
    ("sample", dict(R=MANY, V=131072)),
    ("sample", dict(R=MANY, V=11)),
    ("commit", dict(B=MANY, L=16, V=V)),
    ("head_sample", dict(R=MANY, D=64, V=V)),
    ("unmask", dict(B=MANY, L=16, D=64, V=V)),
    ("unmask", dict(B=MANY, L=100, D=64, V=V)),
    ("head_sample", dict(R=MANY, D=64, V=5003, narrow=1)),
]


@pytest.mark.parametrize("name,dims", LARGE, ids=[f"{n}-{'-'.join(map(str, d.values()))}" for n, d in LARGE])
def test_grids_hold_many_rows(name: str, dims: dict[str, int]) -> None:
    """Axes 1 and 2 of a grid end at 65535, axis 0 at 2^31 - 1."""
    with torch.device("meta"):
        kwargs = OPS[name].inputs(torch.float16, **dims)
    with recording(90) as seen:
        OPS[name].fn(**kwargs)
    assert seen
    for kernel, grid, *_ in seen:
        assert 0 < grid[0] < 2**31 and all(n <= 65535 for n in grid[1:]), (kernel.__name__, grid)


def covers(block: int, n: int, least: int = 1) -> bool:
    """A power of two that holds n and less than twice as many, or the least there is."""
    return block & (block - 1) == 0 and max(n, least) <= block and (block < 2 * n or block == least)


@pytest.mark.parametrize("n", (0, 1, 3, 11, 16, 29, 60))
def test_small_problems_take_small_tiles(n: int) -> None:
    for itemsize in (2, 4):
        assert covers(head_launch(4, n, D, itemsize, 90).BLOCK_V, n, 16)
        assert covers(head_launch(4, V, min(n, 32), itemsize, 90).BLOCK_K, min(n, 32), 16)
    assert covers(sample_launch(n).BLOCK_V, n, 4)
    assert gumbel_noise_launch(max(n, 1)).BLOCK_Q == 32  # counters are of 128 tokens
    assert covers(commit_launch(n).BLOCK_L, n) and covers(masked_rows_launch(n).BLOCK, n)
    assert covers(finish_launch(n, 1).BLOCK_L, n) and covers(finish_launch(1, n).BLOCK_S, n)
    assert covers(combine_launch(n).BLOCK_S, n)


@pytest.mark.parametrize("vocabulary", (1, 5, 600, 1100, 5003, V))
def test_programs_that_sample_are_many_and_busy(vocabulary: int) -> None:
    launch = sample_launch(vocabulary)
    held = launch.BLOCK_V * launch.BLOCK_T
    assert held <= 16 * 32 * launch.num_warps, "numbers of a thread, each with its noise"
    assert held >= 256 or launch.BLOCK_T >= 64, "narrow rows share a program"
    if vocabulary == V:  # 16 rows give each of 132 multiprocessors two programs
        assert 16 * triton.cdiv(V, launch.BLOCK_V * launch.TILES) >= 2 * 132
    noise = gumbel_noise_launch(vocabulary)
    assert 4 * 32 * noise.num_warps >= noise.BLOCK_Q and (vocabulary < V or V // (4 * noise.BLOCK_Q) >= 100)


@pytest.mark.parametrize("depth", (1, 3, 4))
@pytest.mark.parametrize("parts", (1, 5, 205, 256, 1024))
@pytest.mark.parametrize("L", (1, 16, 33, 64, 100, 512))
def test_what_finishes_a_block_fits_registers(L: int, parts: int, depth: int) -> None:
    launch = finish_launch(L, parts, depth)
    if launch is not None:
        assert covers(launch.BLOCK_L, L) and covers(launch.BLOCK_S, parts)
        assert depth * launch.BLOCK_L * launch.BLOCK_S <= 16 * 32 * launch.num_warps <= 16 * 512
        assert depth == 1, "records of several depths: 200 registers"
    assert launch is not None or (L, depth) != (16, 1) or parts > 256, "the published block is one program's work"
    combined = combine_launch(parts, depth)
    records = combined.BLOCK_R * combined.BLOCK_S * triton.next_power_of_2(depth)
    assert covers(combined.BLOCK_S, parts) and (records <= 8 * 32 * combined.num_warps or combined.BLOCK_R == 1)
    assert records >= 32 * combined.num_warps, "a record a thread at least"
    ranks = commit_launch(L)
    assert 32 * 32 * ranks.num_warps >= ranks.BLOCK_L * ranks.BLOCK_J and ranks.BLOCK_J <= ranks.BLOCK_L


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
def test_a_step_is_three_launches_and_reads_nothing() -> None:
    with torch.device("meta"):
        kwargs = OPS["unmask"].inputs(torch.bfloat16, B=1, L=16, D=D, V=V)
    with recording(90) as seen:
        unmask(**kwargs)
    names = [kernel.__name__ for kernel, *_ in seen]
    assert names == ["_masked_rows_kernel", "_head_kernel", "_finish_kernel"]
    before, (programs,), after = (grid for _, grid, *_ in seen)
    assert before == after == (1,) and 0.9 * 264 <= programs <= 264  # two for each of 132 multiprocessors
    vectors = {t.dtype for t in (kwargs["sampling"].temperature, kwargs["threshold"])}
    assert vectors == {torch.float64}  # as models pass them: what is compiled is what runs
