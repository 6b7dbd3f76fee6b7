"""The unmasking step's tiles; what no card shows: NaN and infinities, ties across tiles, mixed dtypes, whole graphs."""

import math
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, make
from torch import Tensor

import tt_kernels
from tt_kernels import OPS, commit, head_sample, sample, unmask
from tt_kernels.launch import INTERPRET, recording
from tt_kernels.unmask.commit import commit_launch
from tt_kernels.unmask.head import SUB, head_launch, head_parts
from tt_kernels.unmask.noise import gumbel_noise_launch
from tt_kernels.unmask.records import combine_launch
from tt_kernels.unmask.sample import sample_launch
from tt_kernels.unmask.step import finish_launch, masked_rows_launch

V, D = 131072, 2688
ROWS = (1, 16, 17, 32, 64, 65, 128, 512, 4096)
runs_kernels = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")


def taken(rows: int, architecture: int, itemsize: int = 2) -> int:
    launch = head_launch(rows, V, D, itemsize, architecture)
    return launch.num_stages * (launch.BLOCK_V + launch.BLOCK_T) * launch.BLOCK_K * itemsize


@pytest.mark.parametrize("architecture,limit", [(80, 163), (90, 227), (100, 227)])
@pytest.mark.parametrize("rows", ROWS)
def test_head_fits_shared_memory(rows: int, architecture: int, limit: int) -> None:
    assert taken(rows, architecture) <= limit * 1024 and taken(rows, architecture, 4) <= limit * 1024


@pytest.mark.parametrize("rows", (1, 16, 32, 64))
def test_two_heads_share_a_multiprocessor_up_to_64_rows(rows: int) -> None:
    assert 64 * 1024 <= taken(rows, 90) <= 113 * 1024
    assert head_launch(rows, V, D, 2, 90).num_warps == 4


@pytest.mark.parametrize("rows,block", [(1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (512, 128)])
def test_head_tile_grows_with_rows(rows: int, block: int) -> None:
    launch = head_launch(rows, V, D, 2, 90)
    assert block == launch.BLOCK_T and launch.BLOCK_T % SUB == 0 and launch.BLOCK_V >= 64


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("vocabulary", (1, 5, 128, 1100, V))
@pytest.mark.parametrize("multiprocessors", (4, 108, 132, 148))
def test_head_parts_cover_the_vocabulary_once(rows: int, vocabulary: int, multiprocessors: int) -> None:
    launch = head_launch(rows, vocabulary, D, 2, 90)
    parts, tiles = head_parts(launch, vocabulary, multiprocessors)
    assert (parts - 1) * tiles * launch.BLOCK_V < vocabulary <= parts * tiles * launch.BLOCK_V
    assert tiles == 1 if launch.BLOCK_T > SUB else parts <= 2 * multiprocessors


def test_small_problems_take_small_tiles() -> None:
    launch = head_launch(4, 11, 6, 4, 90)
    assert (launch.BLOCK_V, launch.BLOCK_T, launch.BLOCK_K) == (16, 16, 16)
    assert sample_launch(3).BLOCK_V == 4 and gumbel_noise_launch(3).BLOCK_Q == 1
    assert commit_launch(0).BLOCK_L == finish_launch(0, 1).BLOCK_L == masked_rows_launch(0).BLOCK == 1


def test_one_program_finishes_a_block_of_the_published_model() -> None:
    launch = finish_launch(16, 256)
    assert (launch.BLOCK_L, launch.BLOCK_S) == (16, 256)
    assert finish_launch(16, 1024) is None and finish_launch(512, 1) is None
    assert combine_launch(1024).BLOCK_R == 1 and combine_launch(5).BLOCK_S == 8


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
def test_a_step_is_three_launches_and_reads_nothing() -> None:
    with torch.device("meta"):
        kwargs = OPS["unmask"].inputs(torch.bfloat16, B=1, L=16, D=D, V=V)
    with recording(90) as seen:
        unmask(**kwargs)
    names = [kernel.__name__ for kernel, *_ in seen]
    assert names == ["_masked_rows_kernel", "_head_kernel", "_finish_kernel"]
    assert [grid for _, grid, *_ in seen] == [(1,), (256,), (1,)]


# What the records must keep


def settings(*temperatures: float) -> dict[str, Tensor]:
    R = len(temperatures)
    seed, step = torch.arange(R, device=DEVICE), torch.zeros(R, dtype=torch.int64, device=DEVICE)
    return dict(
        temperature=torch.tensor(temperatures, device=DEVICE, dtype=torch.float32),
        seed=seed,
        position=seed + 3,
        step=step,
    )


def same(name: str, **kwargs: Any) -> None:
    got = getattr(tt_kernels, name)(**kwargs)
    with tt_kernels.use("reference"):
        want = getattr(tt_kernels, name)(**kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=0, equal_nan=True)  # exp of logits up to 20: 20 eps of fp32


@runs_kernels
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_sample_of_infinities_and_nan(temperature: float) -> None:
    nan, inf = math.nan, math.inf
    rows = [
        [-inf, -inf, 2.0, -inf],
        [-inf, -inf, -inf, -inf],
        [1.0, inf, 2.0, inf],
        [1.0, nan, 2.0, nan],
        [inf, 0.0, nan, 3.0],
        [-inf, 5.0, -inf, -inf],
    ]
    logits = torch.tensor(rows, device=DEVICE)
    for suppress in (None, 1):
        same("sample", logits=logits, **settings(*[temperature] * 6), suppress=suppress)
    wide = torch.full((6, 9000), -inf, device=DEVICE)  # in three parts of the vocabulary
    wide[:, 4095:8191:1024] = logits
    same("sample", logits=wide, **settings(*[temperature] * 6), suppress=5119)


@runs_kernels
def test_the_first_of_equals_wins_across_tiles_and_parts() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[1, 17] = logits[1, 2100] = logits[1, 8999] = 1
    logits[2, 4200] = logits[2, 8999] = 1
    assert sample(logits, **settings(0, 0, 0))[0].tolist() == [0, 17, 4200]
    hidden, weight = torch.ones(2, 16, device=DEVICE), torch.zeros(700, 16, device=DEVICE)
    assert head_sample(hidden, weight, **settings(0, 0))[0].tolist() == [0, 0]
    weight[130] = weight[200] = weight[600] = 1
    assert head_sample(hidden, weight, **settings(0, 0))[0].tolist() == [130, 130]


@runs_kernels
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_head_of_another_dtype_is_not_rounded(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 24).to(DEVICE, dtypes[0]), torch.randn(50, 24).to(DEVICE, dtypes[1])
    same("head_sample", hidden=hidden, weight=weight, **settings(0, 0.5, 1))


@runs_kernels
def test_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(12, 24).to(DEVICE), torch.randn(700, 24).to(DEVICE)
    options = settings(0, 0.5, 1, 0, 2, 0, 0, 0.5, 1, 0, 2, 0)
    whole = head_sample(hidden, weight, **options)
    for r in (0, 4, 11):
        alone = head_sample(hidden[r : r + 1], weight, **{name: t[r : r + 1] for name, t in options.items()})
        assert all(torch.equal(a[0], b[r]) for a, b in zip(alone, whole, strict=True))


@runs_kernels
def test_commit_breaks_ties_as_the_reference() -> None:
    sure = torch.tensor([[0.5, 0.5, 0.7, 0.5, math.nan, 0.5], [0.2] * 6, [math.nan] * 6]).to(DEVICE)
    block = torch.zeros(3, 6, dtype=torch.int64, device=DEVICE)
    block[0, 0] = block[1, 2] = 1
    token = torch.arange(10, 28, device=DEVICE).view(3, 6)
    for threshold, left in ((0.5, 3), (0.2, 4), (0.0, 1), (0.9, 2**62), (0.9, -1)):
        options = dict(threshold=torch.full((3,), threshold), steps_left=torch.full((3,), left))
        options = {name: t.to(DEVICE) for name, t in options.items()}
        same("commit", block=block, token=token, confidence=sure, mask_token_id=0, **options)


@runs_kernels
@pytest.mark.parametrize("token", (7, 36))
def test_blocks_with_nothing_or_all_masked(token: int) -> None:
    kwargs = make(OPS["unmask"], dict(B=3, L=5, D=16, V=37), torch.float32)
    kwargs["block"] = torch.full((3, 5), token, device=DEVICE)
    same("unmask", **kwargs)


@runs_kernels
@pytest.mark.parametrize("name", ("sample", "head_sample", "unmask"))
@pytest.mark.parametrize("case", (0, 2))
def test_kernels_compile_into_one_graph(name: str, case: int) -> None:
    """Their references do not: they read on the host what only the device knows."""
    torch._dynamo.reset()
    op = OPS[name]
    kwargs = make(op, op.cases[case], torch.float32)
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(compiled(**kwargs), op.fn(**kwargs), strict=True):
        assert torch.equal(got, want)


@runs_kernels
def test_commit_leaves_its_arguments_and_takes_32_bits() -> None:
    kwargs = make(OPS["commit"], dict(B=4, L=7, V=11), torch.float32)
    same("commit", **kwargs | dict(block=kwargs["block"].int(), token=kwargs["token"].int()))
    block, committed, left = commit(**kwargs)
    assert (
        block.data_ptr() != kwargs["block"].data_ptr() and committed.dtype == torch.bool and left.dtype == torch.int64
    )
