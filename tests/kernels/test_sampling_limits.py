"""Where top_k and top_p cut rows: the kernel leaves exactly what the reference does, whichever way it finds the cut."""

import math

import pytest
import torch
from parity import DEVICE, KERNELS
from torch import Tensor

from cards.sampling import keys
from tt_kernels import Sampling, head_sample, sample
from tt_kernels.reference.sampling import bounds, halvings, weights
from tt_kernels.runtime.launch import Launch, recording
from tt_kernels.sampling import limits_launch
from tt_kernels.sampling.lang import Listed
from tt_kernels.sampling.limits_launch import limits_of
from tt_kernels.sampling.records import Rows

INF, NAN = math.inf, math.nan


# The reference's weights


def test_weights_are_powers_of_two_and_fall() -> None:
    below = torch.arange(2**20, dtype=torch.float64) * 2.0**-20
    exact = 2.0 ** (40 - below)
    assert ((weights(below) - exact).abs() <= 1.4e-7 * exact).all()
    steps = torch.cat([below, below + 1, below + 20])
    assert (weights(steps).diff() <= 0).all()
    assert (weights(0.5 + torch.arange(4096, dtype=torch.float64) * 2.0**-24).diff() < 0).all(), "no step is lost"
    whole = torch.arange(41.0)
    assert torch.equal(weights(whole), 2 ** (40 - whole.long()))
    assert weights(torch.tensor([41.0, 1e30, INF, NAN])).tolist() == [0, 0, 0, 0]


def test_sums_of_weights_have_no_order() -> None:
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(5003, generator=generator)
    shuffled = row[torch.randperm(5003, generator=generator)]
    temperature, top_p = torch.tensor(0.8), torch.rand(200, generator=generator).double()
    for p in top_p:
        assert bounds(row, temperature, None, p)[0] == bounds(shuffled, temperature, None, p)[0]


def test_halvings_at_the_ends() -> None:
    t = torch.tensor([INF, 1e39, 1.0, 0.0, 1e-300]).double()
    got = halvings(t, torch.float32)
    assert got[:2].tolist() == [0, 0] and got[2] == torch.tensor(1 / math.log(2)) and got[3:].isfinite().all()


# The kernel's cut

NO_KERNELS = pytest.mark.skipif(not KERNELS, reason="kernels run in the interpreter, in ttsem or on a GPU")
TILES = {
    "whole": None,
    "listed": Launch(LANES=32, EACH=4, LISTED=64, ROOM=256, num_warps=1),  # some rows fit the list at once
    "short": Launch(LANES=32, EACH=4, LISTED=4, ROOM=32, num_warps=1),  # a pass over the list too
    "never": Launch(LANES=64, EACH=4, LISTED=2, ROOM=2, num_warps=1),  # passes until a number is found
}


def kept(x: Tensor, least: Tensor, last: Tensor) -> Tensor:
    ids = torch.arange(x.shape[-1], device=x.device)
    least, last = least[:, None], last[:, None]
    return ~((x < least) | ((x == least) & (ids > last)))


def rows_of(kind: str, V: int) -> Tensor:
    x = 3 * torch.randn(6, V)
    if kind == "ties":
        x = x.round()
    if kind == "equal":
        x[:3], x[3:] = 1.5, torch.tensor([-0.0, 0.0]).repeat(V)[:V]
    if kind == "holes":
        x[:, torch.rand(V) < 0.5] = -INF
    if kind == "far":
        x[:, 0], x[:, 1], x[3:, 2] = 3e38, -3e38, -1e30
    return x


@pytest.mark.kernels
@NO_KERNELS
@pytest.mark.sanitize
@pytest.mark.parametrize(
    "kind,tiles",
    [
        *((kind, "short") for kind in ("plain", "ties", "equal", "holes", "far")),
        *((kind, "listed") for kind in ("ties", "equal", "holes")),
        *((kind, "never") for kind in ("ties", "equal")),
        *((kind, "whole") for kind in ("plain", "ties", "far")),
    ],
)
def test_the_cut_is_the_references(kind: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(len(kind))
    if (launch := TILES[tiles]) is not None:
        monkeypatch.setattr(limits_launch, "limits_launch", lambda *_: launch)
    for V, dtype in ((70, torch.float16), (300, torch.float32)):
        x = rows_of(kind, V).clamp(-6e4, 6e4).to(DEVICE, dtype)
        temperature = torch.tensor([0.1, 1.0, 30.0, 0.7, INF, 1e-38], dtype=torch.float64, device=DEVICE)
        top_k = torch.tensor([3, 0, V // 2, V - 1, 5, V + 1], device=DEVICE)
        top_p = torch.tensor([0.9, 0.95, 0.5, 1.0, 0.3, 0.999], dtype=torch.float64, device=DEVICE)
        for k, p in ((top_k, top_p),) if V == 70 else ((top_k, None), (None, top_p)):
            suppress = None if k is None else 1
            sampling = Sampling.of(6, temperature=temperature, top_k=k, top_p=p, device=DEVICE)
            got = limits_of(x, Rows.of(sampling), torch.float32, suppress)
            wide = x.float()
            if suppress is not None:
                wide[:, suppress] = -INF
            want = bounds(wide, temperature, k, p)
            assert torch.equal(kept(wide, *got), kept(wide, *want)), (V, k, p)


@pytest.mark.kernels
@NO_KERNELS
@pytest.mark.sanitize
def test_rows_that_are_listed_and_rows_that_walk() -> None:
    """More rows than programs, of sequences of two, from a place in the list on; those past the count are left."""
    torch.manual_seed(5)
    logits, index = torch.randn(11, 40, device=DEVICE), torch.randperm(20, device=DEVICE).int()
    rest = keys(10)
    sampling = Sampling(
        torch.linspace(0.0, 1.5, 10, dtype=torch.float64, device=DEVICE),
        **{name: t.to(DEVICE) for name, t in rest.items()},
        top_k=torch.arange(10, device=DEVICE) * 3,
        top_p=torch.linspace(0.2, 1.0, 10, dtype=torch.float64, device=DEVICE),
    )
    listed = Listed(index, torch.tensor([13], dtype=torch.int32, device=DEVICE))
    got = limits_of(logits, Rows.of(sampling, 2, listed), torch.float32, None, 3)
    b = index[3:13].long() // 2
    want = bounds(logits[:10], sampling.temperature[b], sampling.top_k[b], sampling.top_p[b])
    hot = sampling.temperature[b] > 0
    assert torch.equal(kept(logits[:10], *(t[:10] for t in got))[hot], kept(logits[:10], *want)[hot])
    assert kept(logits[:10], *(t[:10] for t in got))[~hot].all(), "a row of temperature 0 has no limit"


# At this temperature a logit of one less has half the weight.
HALVING = 1 / math.log(2)
# Numbers above the cut, numbers that equal it, how many of these are left: by shares that are exact in fp64.
EQUALS = ((0, 4, 2), (0, 32, 17), (1, 6, 4), (1, 30, 1), (1, 6, 6))


@pytest.mark.kernels
@NO_KERNELS
@pytest.mark.sanitize
def test_of_equals_those_before_p_and_the_one_that_exceeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left but for the last come to exactly p. A top_k that cuts among equals leaves all of them, and
    what it leaves out has no share. At temperature 0 nothing is cut."""
    launch = Launch(LANES=32, EACH=2, LISTED=16, ROOM=64, num_warps=1)  # two rows' equals are too many for registers
    monkeypatch.setattr(limits_launch, "limits_launch", lambda *_: launch)
    V, generator = 40, torch.Generator().manual_seed(2)
    rows = [(*row, HALVING, (2 * row[0] + row[2] - 1) / (2 * row[0] + row[1])) for row in EQUALS]
    rows += [(1, 6, 6, HALVING, 1.0), (1, 6, V, 0.0, 0.5)]
    logits, want = torch.full((len(rows), V), -1.0), torch.zeros(len(rows), V, dtype=torch.bool)
    for row, keep, (better, equal, left, *_) in zip(logits, want, rows, strict=True):
        order = torch.randperm(V, generator=generator)
        best, cut = order[:better], order[better : better + equal].sort().values
        row[best], row[cut] = 1.0, 0.0
        keep[best] = keep[cut[:left]] = True
    want[-1] = True
    better, _, _, temperature, p = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    limits = temperature, better.long() + 1, p
    named = zip(("temperature", "top_k", "top_p"), limits, strict=True)
    sampling = Sampling.of(len(rows), **{name: t.to(DEVICE) for name, t in named}, device=DEVICE)
    got = limits_of(logits.to(DEVICE), Rows.of(sampling), torch.float32, None)
    assert torch.equal(kept(logits, *(t.cpu() for t in got)), want)
    assert torch.equal(kept(logits, *bounds(logits, *limits))[:-1], want[:-1])


@pytest.mark.kernels
@pytest.mark.parametrize("limits", (dict(top_k=2), dict(top_p=0.3), dict(top_k=2, top_p=0.3)), ids=str)
def test_at_temperature_0_limits_change_nothing(limits: dict[str, float]) -> None:
    """The best token, of equals the first, and its probability in the whole row at temperature 1."""
    torch.manual_seed(4)
    logits = torch.randn(4, 50).round()
    logits[2:, 7], logits[3, 40] = 9.0, 9.0
    temperature = torch.tensor([0.0, -0.0, 0.0, 0.0], dtype=torch.float64)
    plain, narrow = (Sampling.of(4, temperature=temperature.to(DEVICE), **each, device=DEVICE) for each in ({}, limits))
    for suppress in (None, 7):
        row = logits.clone()
        if suppress is not None:
            row[:, suppress] = -INF
        token, confidence = sample(logits.to(DEVICE), narrow, suppress=suppress)
        want = [r.index(max(r)) for r in row.tolist()]
        assert token.tolist() == want
        sure = row.double().softmax(-1)[range(4), want]
        torch.testing.assert_close(confidence.double().cpu(), sure, rtol=3e-6, atol=0)  # exp of logits up to 9 in fp32
        eye = torch.eye(4, device=DEVICE), logits.T.contiguous().to(DEVICE)
        limited, free = (head_sample(*eye, each, suppress=suppress) for each in (narrow, plain))
        assert torch.equal(limited.token, free.token)
        torch.testing.assert_close(limited.confidence, free.confidence, rtol=3e-6, atol=0)


@pytest.mark.kernels
@NO_KERNELS
def test_tiles_that_are_left_out_have_no_noise_and_others_do() -> None:
    """Of three tiles two are left out, and in the last only the one number that is as large as the least stays."""
    logits = torch.randn(3, 5003, device=DEVICE)
    logits[:, 4500] = 9.0
    logits[1, 2048:4096] = 20.0
    tokens = sample(logits, Sampling.of(3, temperature=5.0, top_k=1, device=DEVICE)).token.tolist()
    assert tokens[0] == tokens[2] == 4500 and 2048 <= tokens[1] < 4096


@pytest.mark.kernels
@NO_KERNELS
def test_nan_is_never_left_out() -> None:
    for number in (NAN, -NAN, INF):
        logits = torch.tensor([[1.0, 2.0, number, 3.0, 4.0, number, 0.0, -1.0]], device=DEVICE)
        for limits in (dict(top_k=1), dict(top_k=4), dict(top_p=0.1), dict(top_k=3, top_p=0.9)):
            sampling = Sampling.of(1, temperature=0.7, seed=3, **limits, device=DEVICE)
            assert sample(logits, sampling).token.tolist() == [2]


@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("V", (1, 2, 3, 11, 37, 600, 5003, 131072))
def test_a_program_has_room_for_its_row(V: int, architecture: int) -> None:
    launch = limits_launch.limits_launch(V, architecture)
    tile, threads = launch.LANES * launch.EACH, 32 * launch.num_warps
    assert all(n & (n - 1) == 0 for n in (launch.LANES, launch.EACH, launch.LISTED, launch.ROOM))
    assert launch.LISTED <= launch.ROOM and (V > 4096 or min(V, 2048) <= launch.ROOM)
    assert tile <= 4 * threads or threads == 32, "numbers of a thread: it has seven sums of 64 bits too"
    assert 8 * threads >= launch.LISTED or threads == 32
    assert threads * launch.maxnreg <= 64 * 1024, "registers of a multiprocessor"
    assert V < 131072 or 4 * tile >= 4096, "bytes of fp32 that a program asks for at once"


def test_memory_of_lists_does_not_grow_with_rows() -> None:
    sizes = set()
    for R in (1000, 70_000):
        with torch.device("meta"):
            sampling = Sampling.of(R, temperature=1.0, top_k=5)
            logits = torch.empty(R, 131072, dtype=torch.bfloat16)
        with recording(90) as seen:
            limits_of(logits, Rows.of(sampling), torch.float32, None)
        ((_, (programs,), args, _),) = seen
        sizes.add(args[5].numel())
        assert args[5].shape[0] == programs and args[5].numel() <= 2**24
    assert len(sizes) == 1
