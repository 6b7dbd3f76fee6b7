"""The unmasking step's tiles and grids; what no card shows: NaN and infinities, ties across tiles, mixed dtypes, tiny
temperatures, thresholds a rounding away, bits that do not depend on the batch, whole graphs."""

import importlib
import math
from typing import Any

import pytest
import torch
import triton
from parity import DEVICE, KERNELS, make
from torch import Tensor

import tt_kernels
from cards import OPS
from cards.sampling import CANDIDATES
from tt_kernels import Sampling, commit, head_sample, sample, unmask
from tt_kernels.runtime.launch import INTERPRET, recording
from tt_kernels.sampling.commit import commit_launch
from tt_kernels.sampling.gumbel_noise import gumbel_noise_launch
from tt_kernels.sampling.head_sample_launch import SUB, head_launch, head_pieces
from tt_kernels.sampling.records import combine_launch
from tt_kernels.sampling.sample import SampleLaunch, sample_launch
from tt_kernels.sampling.unmask import finish_launch, masked_rows_launch

V, D = 131072, 2688
ROWS = (1, 16, 17, 32, 64, 65, 128, 512, 4096)
NO_KERNELS = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")


def runs_kernels(test: Any) -> Any:
    return pytest.mark.kernels(NO_KERNELS(test))


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
@pytest.mark.parametrize("multiprocessors", (4, 14, 28, 108, 132, 148))  # 14 and 28: slices of a GPU
def test_head_pieces_cover_the_vocabulary_once(rows: int, vocabulary: int, multiprocessors: int) -> None:
    launch = head_launch(rows, vocabulary, D, 2, 90)
    pieces, tiles, depth = head_pieces(launch, vocabulary, multiprocessors)
    assert (pieces - 1) * tiles * launch.BLOCK_V < vocabulary <= pieces * tiles * launch.BLOCK_V
    assert (tiles if launch.BLOCK_T > SUB else depth) == 1
    combined = combine_launch(triton.cdiv(pieces, depth), depth)
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


def test_small_problems_take_small_tiles() -> None:
    launch = head_launch(4, 11, 6, 4, 90)
    assert (launch.BLOCK_V, launch.BLOCK_T, launch.BLOCK_K) == (16, 16, 16)
    assert sample_launch(3).BLOCK_V == 4 and gumbel_noise_launch(3).BLOCK_Q == 32
    assert commit_launch(0).BLOCK_L == finish_launch(0, 1).BLOCK_L == masked_rows_launch(0).BLOCK == 1


def test_one_program_finishes_a_block_of_the_published_model() -> None:
    launch = finish_launch(16, 256)
    assert (launch.BLOCK_L, launch.BLOCK_S) == (16, 256)
    assert finish_launch(16, 1024) is None and finish_launch(512, 1) is None and finish_launch(16, 256, 4) is None
    assert combine_launch(1024).BLOCK_R == 1 and combine_launch(5).BLOCK_S == 8
    assert combine_launch(256, 4).BLOCK_R == 1 and combine_launch(256).BLOCK_R == 4


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
def test_a_step_is_three_launches_and_reads_nothing() -> None:
    with torch.device("meta"):
        kwargs = OPS["unmask"].inputs(torch.bfloat16, B=1, L=16, D=D, V=V)
    with recording(90) as seen:
        unmask(**kwargs)
    names = [kernel.__name__ for kernel, *_ in seen]
    assert names == ["_masked_rows_kernel", "_head_kernel", "_finish_kernel"]
    assert [grid for _, grid, *_ in seen] == [(1,), (256,), (1,)]
    vectors = {t.dtype for t in (kwargs["sampling"].temperature, kwargs["threshold"])}
    assert vectors == {torch.float64}  # as models pass them: what is compiled is what runs


# What the records must keep


def settings(*temperatures: float, dtype: torch.dtype = torch.float32, **limits: Any) -> Sampling:
    temperature = torch.tensor(temperatures, device=DEVICE, dtype=dtype)
    seed = torch.arange(len(temperatures), device=DEVICE)
    return Sampling.of(len(seed), temperature=temperature, seed=seed, position=seed + 3, **limits, device=DEVICE)


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
        same("sample", logits=logits, sampling=settings(*[temperature] * 6), suppress=suppress)
    wide = torch.full((6, 9000), -inf, device=DEVICE)  # in three parts of the vocabulary
    wide[:, 4095:8191:1024] = logits
    same("sample", logits=wide, sampling=settings(*[temperature] * 6), suppress=5119)


@runs_kernels
def test_the_first_of_equals_wins_across_tiles_and_parts() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[1, 17] = logits[1, 2100] = logits[1, 8999] = 1
    logits[2, 4200] = logits[2, 8999] = 1
    assert sample(logits, settings(0, 0, 0))[0].tolist() == [0, 17, 4200]
    hidden, weight = torch.ones(2, 16, device=DEVICE), torch.zeros(700, 16, device=DEVICE)
    assert head_sample(hidden, weight, settings(0, 0))[0].tolist() == [0, 0]
    weight[130] = weight[200] = weight[600] = 1
    assert head_sample(hidden, weight, settings(0, 0))[0].tolist() == [130, 130]


@runs_kernels
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_head_of_another_dtype_is_not_rounded(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 24).to(DEVICE, dtypes[0]), torch.randn(50, 24).to(DEVICE, dtypes[1])
    same("head_sample", hidden=hidden, weight=weight, sampling=settings(0, 0.5, 1))


@runs_kernels
@pytest.mark.parametrize("case", (0, 2))
def test_rows_beyond_a_grid_take_more_launches(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["sample"]
    kwargs = make(op, op.cases[case], torch.float32)
    whole = sample(**kwargs)
    few = SampleLaunch(BLOCK_V=64, BLOCK_T=2, TILES=2)
    module = importlib.import_module("tt_kernels.sampling.sample")  # the package's name is the function's
    monkeypatch.setattr(module, "sample_launch", lambda V: few)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    for got, want in zip(sample(**kwargs), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # tiles of another size: a few roundings of fp32


@runs_kernels
def test_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(12, 24).to(DEVICE), torch.randn(700, 24).to(DEVICE)
    sampling = settings(0, 0.5, 1, 0, 2, 0, 0, 0.5, 1, 0, 2, 0)
    whole = head_sample(hidden, weight, sampling)
    for r in (0, 4, 11):
        alone = head_sample(hidden[r : r + 1], weight, sampling.select(slice(r, r + 1)))
        assert all(torch.equal(a[0], b[r]) for a, b in zip(alone, whole, strict=True))


@runs_kernels
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    """Up to 16 rows merge a part's tiles as they go, more leave that to the kernel that combines; tiles of fp16 grow at
    17, 33 and 65. Eighths, so that products are exact in any order and scores often equal."""
    torch.manual_seed(1)
    hidden, weight = (torch.randint(-9, 10, shape).to(DEVICE, dtype) / 8 for shape in ((70, 24), (1100, 24)))
    sampling = settings(*[0, 0.5, 1, 0, 0.1, 2, 0] * 10, dtype=torch.float64)
    whole = head_sample(hidden, weight, sampling, suppress=3)
    for rows, first in ((1, 0), (1, 36), (16, 5), (17, 33), (40, 30)):
        some = slice(first, first + rows)
        got = head_sample(hidden[some], weight, sampling.select(some), suppress=3)
        assert all(torch.equal(a, b[some]) for a, b in zip(got, whole, strict=True)), (rows, first)


@runs_kernels
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_bits_of_a_block_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    hidden, weight = (torch.randint(-9, 10, shape).to(DEVICE, dtype) / 8 for shape in ((9, 8, 24), (1100, 24)))
    sampling = settings(*[0, 0.5, 1] * 3, dtype=torch.float64)
    rule = dict(steps_left=torch.full((9,), 4, device=DEVICE), threshold=torch.full((9,), 0.1, device=DEVICE))
    block = torch.randint(3, (9, 8), device=DEVICE)  # 0 is the mask
    whole = unmask(hidden, weight, block, sampling, **rule, mask_token_id=0)
    for some in (slice(4, 5), slice(2, 7)):
        mine = {name: t[some] for name, t in rule.items()}
        got = unmask(hidden[some], weight, block[some], sampling.select(some), **mine, mask_token_id=0)
        assert all(torch.equal(a, b[some]) for a, b in zip(got, whole, strict=True)), some


TINY = [
    (torch.float64, (1e-300, 1e-46, 5e-46, 1e-45, 1e-40, 0.0)),  # three are 0 in fp32 and yet above 0
    (torch.float32, (1e-45, 1e-40, 1e-38, 0.0, 1e-30, 1.0)),
    (torch.float16, (6e-8, 1e-5, 0.0, 0.1, 1.0, 2.0)),
]


@runs_kernels
@pytest.mark.parametrize("dtype,temperatures", TINY, ids=[str(dtype) for dtype, _ in TINY])
@pytest.mark.parametrize("narrow", ({}, dict(top_k=2), dict(top_p=0.5)), ids=str)
def test_tiny_temperatures(dtype: torch.dtype, temperatures: tuple[float, ...], narrow: dict[str, Any]) -> None:
    """A quotient would be infinite, or 0 / 0."""
    options = dict(sampling=settings(*temperatures, dtype=dtype, **narrow))
    for logits in (
        [1.0, 3.0, 2.0, -1.0],
        [-1.0, 3.0, 2.0, 3.0],
        [-1.0, -3.0, -0.5, -2.0],
        [-1.0, 0.0, 2.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [-1.0, -math.inf, -3.0, -0.25],
    ):
        for suppress in (None, 0, 1):
            rows = torch.tensor([logits] * 6, device=DEVICE)
            same("sample", logits=rows, **options, suppress=suppress)
            hidden = torch.eye(4, device=DEVICE)[:1].expand(6, 4)
            weight = torch.zeros(4, 4, device=DEVICE)
            weight[:, 0] = rows[0].clamp(min=-9)
            same("head_sample", hidden=hidden, weight=weight, **options, suppress=suppress)


@runs_kernels
def test_a_temperature_that_fp32_rounds_to_0_takes_the_best() -> None:
    options = Sampling.of(3, temperature=torch.tensor([1e-300, 0, 1e-300]).double().to(DEVICE), device=DEVICE)
    logits = torch.tensor([[-1.0, 2.0, 3.0], [-1.0, 2.0, 3.0], [-3.0, -1.0, -2.0]], device=DEVICE)
    token, confidence = sample(logits, options)
    assert token.tolist() == [2, 2, 1]
    want = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(confidence, want, rtol=3e-6, atol=0)
    tall = torch.zeros(3, 5003, device=DEVICE) - 1  # many tiles and parts
    tall[1, 4999] = tall[0, 4998:] = 1
    assert sample(tall, options)[0].tolist() == [4998, 4999, 0]


@runs_kernels
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_thresholds_are_compared_in_the_dtype_of_the_confidence(dtype: torch.dtype) -> None:
    """0.8 is 1.2e-8 less than its fp32 neighbour: a confidence of that is above 0.8 in fp64 and not in fp32."""
    sure = torch.tensor([[0.8, 0.8, 0.8000001, 0.8]], device=DEVICE)
    block = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    options = dict(threshold=torch.tensor([0.8], dtype=dtype), steps_left=torch.tensor([16]), mask_token_id=0)
    options = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in options.items()}
    same("commit", block=block, token=block + 1, confidence=sure, **options)
    assert commit(block, block + 1, sure, **options)[1].tolist() == [[False, False, True, False]]

    kwargs = make(OPS["unmask"], dict(B=4, L=5, D=16, V=37), torch.float32)
    kwargs["steps_left"] = torch.full((4,), 16, device=DEVICE)
    confidence = unmask(**kwargs)[2]
    second = confidence.topk(2).values[:, 1].double()
    for less, count in ((1e-10, 1), (1e-3, 2)):  # below the confidence by less than its rounding, and by more
        kwargs["threshold"] = (second * (1 - less)).to(dtype)
        assert unmask(**kwargs)[1].sum(-1).tolist() == [min(count, n) for n in (confidence > 0).sum(-1).tolist()]


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
def test_narrowed_sampling_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    op = OPS[name]
    kwargs = make(op, next(dims for dims in op.cases if dims.get("narrow")), torch.float32)
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
