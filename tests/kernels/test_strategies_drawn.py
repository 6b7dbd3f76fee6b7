"""Orders of positions that are drawn, as Dream's alg_temp draws them: how often, of what, and by the kernels."""

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS
from torch import Tensor

import tt_kernels
from tt_kernels import Sampling, Strategy, reference, unmask_logits
from tt_kernels.reference.unmasking import CONFIDENCES, DRAW, RANDOM, gumbel, word_at

MASK, BEST = 6, (0.9, 0.6, 0.5, 0.2)  # the mask's id; the probabilities of each position's best token
# Chi-square's thousandth largest: seeds are fixed, and a wrong weight of a tenth is far beyond it.
CRITICAL = {1: 16.27, 2: 20.52, 3: 16.27}  # by positions that are taken, of 4: 3, 5 and 3 degrees of freedom


def alike(rows: int, **options: Any) -> tuple[Tensor, Tensor, Sampling]:
    """Rows that differ in their seeds alone: six tokens a position, the best of the probability that is said."""
    p = torch.tensor([[c, *[(1 - c) / 5] * 5, 1.0] for c in BEST]).double()
    block = torch.full((rows, len(BEST)), MASK)
    return p.log().expand(rows, -1, -1), block, Sampling.of(rows, seed=torch.arange(rows), **options)


def chance(chosen: tuple[int, ...], weights: list[float]) -> float:
    """That these are drawn first, in any order, without replacement."""
    total = 0.0
    for order in permutations(chosen):
        left, p = math.fsum(weights), 1.0
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        total += p
    return total


@pytest.mark.parametrize("number", (1, 2, 3))
@pytest.mark.parametrize("kind", ("probability", "entropy"))
def test_positions_are_drawn_in_proportion(kind: str, number: int) -> None:
    """To the softmax of confidence / alg_temp: what torch.multinomial without replacement draws in Dream's program."""
    rows, t = 20_000, 0.25 if kind == "probability" else 0.8
    logits, block, sampling = alike(rows, position=11, step=3)
    strategy = Strategy.of(rows, confidence=kind, number=number, alg_temp=t)
    got = reference.unmask_logits(logits, block, sampling, mask_token_id=MASK, strategy=strategy)
    p = logits[0, :, :MASK].exp()
    score = p[:, 0] if kind == "probability" else (p * p.log()).sum(-1)
    weights = (score / t).exp().tolist()
    found = (got.committed * 2 ** torch.arange(len(BEST))).sum(-1).bincount(minlength=16).tolist()
    statistic = 0.0
    for chosen in combinations(range(len(BEST)), number):
        expected = rows * chance(chosen, weights)
        statistic += (found[sum(2**i for i in chosen)] - expected) ** 2 / expected
    assert statistic < CRITICAL[number]


def test_a_draw_is_of_seed_position_and_step_alone() -> None:
    rows = 300
    logits, block, sampling = alike(rows, position=11, step=3)

    def taken(chosen: Tensor, **changed: Tensor) -> Tensor:
        strategy = Strategy.of(len(chosen), number=2, alg_temp=torch.full((len(chosen),), 0.5))
        mine = sampling._replace(**changed).select(chosen)
        rule = dict(mask_token_id=MASK, strategy=strategy)
        return reference.unmask_logits(logits[chosen], block[chosen], mine, **rule).committed

    whole, some = taken(torch.arange(rows)), torch.tensor([250, 3, 77])
    assert torch.equal(taken(some), whole[some])
    for name in ("seed", "position", "step"):
        other = taken(torch.arange(rows), **{name: getattr(sampling, name) + 1000})
        assert 0.2 < (other == whole).all(-1).double().mean() < 0.8, name


def test_noise_of_a_draw_is_gumbels_and_apart_from_other_noise() -> None:
    n, zeros = 20_000, torch.zeros(20_000)
    place = torch.arange(n)
    noise = gumbel(zeros, place, zeros, DRAW)
    below = (-(-noise.sort().values).exp()).exp()
    # Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) once in a thousand seeds.
    assert (below - (place + 1) / n).abs().max() < 1.95 / math.sqrt(n)
    tokens = reference.gumbel_noise(zeros, place, zeros, vocab_size=1)[:, 0]
    others = torch.stack([noise, tokens, word_at(zeros, place, zeros, RANDOM).double()])
    assert (torch.corrcoef(others) - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize("t", (0.0, -1.0, math.nan))
def test_rows_without_a_temperature_draw_nothing(t: float) -> None:
    logits, block, sampling = alike(6)
    rule: dict[str, Any] = dict(mask_token_id=MASK, steps_left=torch.full((6,), 2))
    for kind in CONFIDENCES:
        plain = unmask_logits(logits, block, sampling, strategy=Strategy.of(6, confidence=kind), **rule)
        same = Strategy.of(6, confidence=kind, alg_temp=t)
        for a, b in zip(unmask_logits(logits, block, sampling, strategy=same, **rule), plain, strict=True):
            assert torch.equal(a, b)


def test_an_infinite_temperature_draws_evenly_and_what_is_no_number_last() -> None:
    rows = 4000
    logits, block, sampling = alike(rows)
    logits = logits.clone()
    logits[:, 1] = math.nan
    strategy = Strategy.of(rows, number=1, alg_temp=math.inf)
    rule: dict[str, Any] = dict(mask_token_id=MASK)
    found = reference.unmask_logits(logits, block, sampling, strategy=strategy, **rule).committed.double().mean(0)
    assert found[1] == 0
    # Four standard deviations of a third.
    assert (found[[0, 2, 3]] - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / rows)


def test_thresholds_see_confidences_and_not_what_is_drawn() -> None:
    """The beginning of the drawn order whose confidences are above; sequential stays in its order."""
    rows = 400
    logits, block, sampling = alike(rows)
    rule: dict[str, Any] = dict(mask_token_id=MASK, threshold=torch.full((rows,), 0.55).double())
    drawn = Strategy.of(rows, alg_temp=5.0)
    got = reference.unmask_logits(logits, block, sampling, strategy=drawn, **rule).committed
    above = got & torch.tensor([True, True, False, False])
    assert (got.sum(-1) >= 1).all() and set((got & ~above).sum(-1).tolist()) == {0, 1}  # one where none would
    assert (above.sum(-1)[(got & ~above).any(-1)] == 0).all() and set(above.sum(-1).tolist()) == {0, 1, 2}
    left = Strategy.of(rows, confidence="sequential", number=2, alg_temp=5.0)
    got = reference.unmask_logits(logits, block, sampling, strategy=left, mask_token_id=MASK).committed
    assert torch.equal(got, torch.tensor([True, True, False, False]).expand(rows, -1))


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_kernels_draw_as_the_reference(dtype: torch.dtype) -> None:
    """Temperatures and confidences of every kind beside each other."""
    torch.manual_seed(6)
    temperatures = torch.tensor([0.0, -1.0, 0.05, 1.0, math.inf, math.nan, 1e300, 1e-300, 0.3, 30.0]).double()
    rows, L, V = len(temperatures), 7, 23
    logits, block = 2 * torch.randn(rows, L, V, dtype=dtype), torch.full((rows, L), V - 1)
    block[:, 3] = 0
    sampling = Sampling.of(rows, seed=torch.arange(rows) - 3, position=torch.arange(rows) * 5, step=2)
    for kinds in ("probability", [CONFIDENCES[(row + 1) % 5] for row in range(rows)]):
        strategy = Strategy.of(rows, confidence=kinds, factor=0.8, alg_temp=temperatures)
        strategy = strategy._replace(number=torch.where(torch.arange(rows) % 2 == 0, 3, -1))
        tensors: dict[str, Any] = dict(logits=logits.to(DEVICE), block=block.to(DEVICE))
        for name, given in (("sampling", sampling), ("strategy", strategy)):
            tensors[name] = type(given)(*(None if t is None else t.to(DEVICE) for t in given))
        got = unmask_logits(**tensors, mask_token_id=V - 1)
        with tt_kernels.use("reference"):
            want = unmask_logits(**tensors, mask_token_id=V - 1)
        for a, b in zip(got, want, strict=True):
            # exp of differences of logits up to 10: a few eps of fp32
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
