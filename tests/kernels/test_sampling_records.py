"""What records of tiles must keep that no card shows: NaN and infinities, ties across tiles, mixed dtypes, tiny
temperatures, thresholds a rounding away, bits that do not depend on the batch, whole graphs."""

import importlib
import math
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, make
from torch import Tensor

import tt_kernels
from cards import OPS
from tt_kernels import Sampling, commit, head_sample, sample, unmask
from tt_kernels.sampling.sample import SampleLaunch

NO_KERNELS = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")


def runs_kernels(test: Any) -> Any:
    return pytest.mark.kernels(NO_KERNELS(test))


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
def test_tiles_that_cannot_win_are_left_out_exactly() -> None:
    """The best of some rows comes first and of others last; NaN and infinity win wherever they are."""
    torch.manual_seed(3)
    temperatures = (0.05, 0.3, 1.0, 2.0, 0.05, 0.1, 0.1, 0.0)
    logits = 4 * torch.randn(8, 9000)
    logits[0] = logits[0].sort(descending=True).values
    logits[1] = logits[1].sort().values - 100  # scores below 0
    logits[2] = logits[2].sort().values
    logits[4:7, 3] = 1e4
    logits[5, 8000], logits[6, 8000] = math.nan, math.inf
    same("sample", logits=logits.to(DEVICE), sampling=settings(*temperatures))
    # Eighths: products are exact in any order. 70 rows: their logits are written.
    hidden, weight = (torch.randint(-9, 10, shape).half() / 8 for shape in ((70, 24), (1100, 24)))
    order = (weight.double() @ hidden[0].double()).argsort(descending=True)
    kwargs = dict(hidden=hidden.to(DEVICE), weight=weight[order].to(DEVICE))
    same("head_sample", **kwargs, sampling=settings(*[0, 0.05, 0.1, 0.5, 1.0, 0.05, 3.0] * 10))


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
    rows = [
        [1.0, 3.0, 2.0, -1.0],
        [-1.0, 3.0, 2.0, 3.0],
        [-1.0, -math.inf, -3.0, -0.25],
        [0.0, 0.0, 0.0, 0.0],
        [-1.0, -3.0, -0.5, -2.0],
        [-1.0, 0.0, 2.0, 0.0],
    ]
    for logits in rows[:3] if narrow else rows:  # limits are found for each row by itself, at each temperature
        for suppress in (None, 1) if narrow else (None, 0, 1):
            six = torch.tensor([logits] * 6, device=DEVICE)
            same("sample", logits=six, **options, suppress=suppress)
            hidden = torch.eye(4, device=DEVICE)[:1].expand(6, 4)
            weight = torch.zeros(4, 4, device=DEVICE)
            weight[:, 0] = six[0].clamp(min=-9)
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
