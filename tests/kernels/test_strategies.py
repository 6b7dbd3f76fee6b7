"""Strategies of unmasking against their formulas in Python's numbers, and their kernels. 15 s on one core."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import rules
from parity import DEVICE, KERNELS, make
from torch import Tensor

import tt_kernels
from cards import OPS
from tt_kernels import Sampling, Strategy, reference, unmask, unmask_logits
from tt_kernels.reference.unmasking import CONFIDENCES, Judged, decide, judge, uniform
from tt_kernels.sampling import strategies
from tt_kernels.sampling.commit import new_committed

runs_kernels = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")]
MASK = 0
SCORES = [0.0, 0.1, 0.5, 0.625, 0.75, 0.8, 1.0, -0.3, -2.0, math.nan, -math.inf]
ENTROPIES = [0.0, 0.125, 0.25, 0.5, 2.0, 11.0]


def longest(
    masked: list[int],
    score: dict[int, float],
    entropy: dict[int, float],
    key: dict[int, float],
    sequential: bool,
    **rule: Any,
) -> list[int]:
    """The positions that commit by all rules of a row."""
    order = rules.order(key, sequential)
    counts = [1]
    if rule["threshold"] is not None:
        counts.append(rules.while_([score[i] > rule["threshold"] for i in order]))
    if rule["steps_left"] is not None:
        counts.append(math.ceil(len(masked) / max(1, rule["steps_left"])))
    if rule["factor"] is not None and rule["factor"] >= 0:
        counts.append(rules.factor([score[i] for i in order], rule["factor"]))
    if rule["entropy_bound"] is not None and rule["entropy_bound"] >= 0:
        counts.append(rules.entropy_bound([entropy[i] for i in order], rule["entropy_bound"]))
    if rule["number"] is not None and rule["number"] >= 0:
        counts = [rule["number"]]
    return sorted(order[: max(counts)])


def drawn(data: st.DataObject) -> tuple[Tensor, Judged, dict[str, list | None]]:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))

    def numbers(values: list) -> list:
        return data.draw(st.lists(st.sampled_from(values), min_size=B * L, max_size=B * L))

    def rows(values: list) -> list | None:
        return data.draw(st.none() | st.lists(st.sampled_from(values), min_size=B, max_size=B))

    block = torch.tensor(numbers([MASK, MASK, 1, 2])).view(B, L)
    score, entropy, key = (torch.tensor(numbers(v)).view(B, L).double() for v in (SCORES, ENTROPIES, SCORES))
    token = torch.arange(10, 10 + block.numel()).view(B, L)
    known = Judged(token, score, score, entropy, key if data.draw(st.booleans()) else None)
    rule = dict(
        threshold=rows([0.5, 0.1, 2.0, -0.5]),
        steps_left=rows([0, 1, 2, 3, 2**40]),
        confidence=rows([0, 1, 4]),
        factor=rows([-1.0, 0.0, 0.5, 0.75, 1.0, 5.0]),
        entropy_bound=rows([-1.0, 0.0, 0.125, 0.4, 1e9]),
        number=rows([-1, 0, 1, 3, 99]),
    )
    return block, known, rule


def tensors(rule: dict[str, list | None]) -> tuple[Tensor | None, Tensor | None, Strategy]:
    def tensor(value: list) -> Tensor:
        return torch.tensor(value, dtype=torch.float64 if isinstance(value[0], float) else torch.int64, device=DEVICE)

    made = {name: None if value is None else tensor(value) for name, value in rule.items()}
    return made["threshold"], made["steps_left"], Strategy(*(made[name] for name in Strategy._fields[:4]))


def hold(block: Tensor, judged: Judged, rule: dict[str, list | None], got: Any) -> None:
    key = judged.score if judged.key is None else judged.key
    for b, row in enumerate(block.tolist()):
        masked = [i for i, t in enumerate(row) if t == MASK]
        mine = {name: None if value is None else value[b] for name, value in rule.items()}
        sequential = mine.pop("confidence") == 4
        known = ({i: t[b, i].item() for i in masked} for t in (judged.score, judged.entropy, key))
        chosen = longest(masked, *known, sequential, **mine) if masked else []
        assert got.committed[b].nonzero().flatten().tolist() == chosen
        assert got.block[b].tolist() == [int(judged.token[b, i]) if i in chosen else t for i, t in enumerate(row)]
        assert got.masked[b] == len(masked) - len(chosen)


@given(data=st.data())
def test_every_rule_is_its_formula(data: st.DataObject) -> None:
    """In fp64, where each score and bound is what Python has."""
    block, known, rule = drawn(data)
    dirt = data.draw(st.sampled_from([0.0, 2.0, math.nan]))
    score, key = (None if t is None else t.masked_fill(block != MASK, dirt) for t in (known.score, known.key))
    threshold, steps_left, strategy = (None if t is None else t for t in tensors(rule))
    strategy = Strategy(*(None if t is None else t.cpu() for t in strategy))
    threshold, steps_left = (None if t is None else t.cpu() for t in (threshold, steps_left))
    dirty = known._replace(confidence=score, score=score, key=key)
    hold(block, known, rule, decide(block, dirty, strategy, MASK, threshold, steps_left))


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@given(data=st.data())
@settings(max_examples=40)
def test_the_kernel_decides_by_the_formulas(data: st.DataObject) -> None:
    block, wide, rule = drawn(data)
    narrow = wide._replace(**{f: None if (t := getattr(wide, f)) is None else t.float() for f in wide._fields[1:]})
    wide = wide._replace(score=narrow.score.double(), key=None if wide.key is None else narrow.key.double())
    threshold, steps_left, strategy = tensors(rule)
    known = strategies.Judged(*(None if t is None else t.to(DEVICE) for t in narrow))
    if strategy.entropy_bound is None:
        known = known._replace(entropy=None)
    out = new_committed(block.to(DEVICE))
    strategies.decide(block.to(DEVICE), known, strategies.Rules(threshold, steps_left, *strategy[:4]), MASK, out)
    if rule["threshold"] is None and rule["factor"] is None:  # which fp32 rounds
        hold(block, wide, rule, type(out)(*(t.cpu() for t in out)))
    want = decide(
        block,
        narrow,
        Strategy(*(None if t is None else t.cpu() for t in strategy)),
        MASK,
        *(None if t is None else t.cpu() for t in (threshold, steps_left)),
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, want, strict=True))


@given(data=st.data())
def test_what_is_looked_at_is_its_formula(data: st.DataObject) -> None:
    R, V = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    numbers = st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 3.0, -math.inf])
    logits = torch.tensor(data.draw(st.lists(numbers, min_size=R * V, max_size=R * V))).view(R, V).double()
    logits[:, 0] = 1.0  # a row of -inf has no probabilities
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=R, max_size=R))
    hot = data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=R, max_size=R))
    tempered = data.draw(st.lists(st.booleans(), min_size=R, max_size=R))
    token = torch.zeros(R, dtype=torch.int64)
    sampling = Sampling.of(R, temperature=torch.tensor(hot).double(), seed=torch.arange(R), position=5, step=2)
    strategy = Strategy(confidence=torch.tensor(kinds), tempered=torch.tensor(tempered))
    got = judge(logits, token, sampling, strategy)
    for r in range(R):
        t = hot[r] if tempered[r] and hot[r] else 1.0
        p = rules.softmax([x / t for x in logits[r].tolist()])
        chance = uniform(*(torch.tensor(n) for n in (r, 5, 2)), -1).item()
        score = (p[0], rules.margin(p), -rules.entropy(p), chance, p[0])[kinds[r]]
        assert math.isclose(got.confidence[r], p[0], rel_tol=1e-12)
        assert math.isclose(got.score[r], score, rel_tol=1e-12, abs_tol=1e-13)
        assert math.isclose(got.entropy[r], rules.entropy(p), rel_tol=1e-12, abs_tol=1e-13)


def test_random_scores_are_uniform_and_apart_from_the_noise() -> None:
    n = 20_000
    place = torch.arange(n)
    u = uniform(torch.full((n,), 7), place, torch.zeros(n), -1)
    assert u.min() > 0 and u.max() < 1 and torch.equal(u, u.float().double())
    # Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) once in a thousand seeds.
    assert (u.sort().values - (place + 1) / n).abs().max() < 1.95 / math.sqrt(n)
    assert torch.corrcoef(torch.stack([u, uniform(torch.full((n,), 7), place, torch.zeros(n), -2)]))[0, 1].abs() < 0.03


# Rows, heads, kernels


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize(
    "rule",
    [
        dict(factor=[0.25, 0.5, 1.0, 2.0]),
        dict(entropy_bound=[-0.5, 0.0, 0.5, 1.5]),
        dict(steps_left=[0, 2, 3, 7]),
        dict(confidence=[0, 1, 4, 4], number=[1, 2, 3, 9]),
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_the_kernel_decides_as_the_reference(rule: dict[str, list]) -> None:
    """Rows of many masked positions, in two tiles; some scores and bounds are equal."""
    generator = torch.Generator().manual_seed(4)
    block = (torch.rand(16, 40, generator=generator) < 0.2).long()
    score = torch.randint(40, 65, (16, 40), generator=generator) / 64
    entropy = torch.randint(0, 9, (16, 40), generator=generator) / 16
    rows = {name: torch.tensor(values)[torch.arange(16) % 4] for name, values in rule.items()}
    steps_left, strategy = rows.pop("steps_left", None), Strategy(**rows)
    judged = Judged(torch.arange(10, 10 + block.numel()).view(block.shape), score, score, entropy)
    want = decide(block, judged, strategy, MASK, None, steps_left)
    out = new_committed(block.to(DEVICE))
    known = strategies.Judged(*(None if t is None else t.to(DEVICE) for t in judged))
    there = (None if t is None else t.to(DEVICE) for t in (steps_left, *strategy[:4]))
    strategies.decide(block.to(DEVICE), known, strategies.Rules(None, *there), MASK, out)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, want, strict=True))


def test_rows_of_mixed_rules_get_what_each_gets_alone() -> None:
    kwargs = make(OPS["unmask_logits"], dict(B=6, L=7, V=29, rules=1, shift=1), torch.float64)
    whole = reference.unmask_logits(**kwargs)
    for b in range(6):
        some = slice(b, b + 1)
        mine = {name: t[some] if isinstance(t, Tensor) else t for name, t in kwargs.items()}
        mine |= dict(sampling=kwargs["sampling"].select(some), strategy=kwargs["strategy"].select(some))
        alone = reference.unmask_logits(**mine)
        for got, want in zip(alone, whole, strict=True):
            torch.testing.assert_close(got[0], want[b], rtol=1e-12, atol=0)  # sums of rows in another order


def test_a_head_with_bias_and_soft_cap_is_its_logits() -> None:
    kwargs = make(OPS["unmask"], dict(B=6, L=5, D=8, V=29, rules=1, ending=1), torch.float64)
    hidden, weight = kwargs.pop("hidden"), kwargs.pop("weight")
    bias, cap = kwargs.pop("bias"), kwargs.pop("softcap")
    logits = cap * torch.tanh((hidden @ weight.T + bias) / cap)
    logits[..., bias == -math.inf] = -math.inf
    got = unmask(hidden, weight, **kwargs, bias=bias, softcap=cap)
    want = unmask_logits(logits, **kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    never = (bias == -math.inf).nonzero().flatten().tolist()
    assert not set(got.block[got.committed].tolist()) & {*never, kwargs["mask_token_id"]}


def test_the_default_is_a_strategy_without_rules() -> None:
    kwargs = make(OPS["unmask"], dict(B=4, L=5, D=16, V=37), torch.float32)
    for a, b in zip(unmask(**kwargs), reference.unmask(**kwargs, strategy=Strategy()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence is 'certain', expected one of probability"):
        Strategy.of(2, confidence="certain")
    with pytest.raises(ValueError, match="confidence has 1 names, expected one for each of 2 rows"):
        Strategy.of(2, confidence=["margin"])
    kwargs = make(OPS["unmask_logits"], dict(B=4, L=5, V=37, rules=2), torch.float32)
    with pytest.raises(ValueError, match="confidence is 7, expected 0 to 4"):
        unmask_logits(**kwargs | dict(strategy=Strategy(confidence=torch.full((4,), 7))))
    with pytest.raises(ValueError, match="strategy is 'factor', expected a Strategy"):
        unmask_logits(**kwargs | dict(strategy="factor"))
    kwargs = make(OPS["unmask"], dict(B=4, L=5, D=16, V=37), torch.float32)
    with pytest.raises(ValueError, match="softcap is 0, expected a finite number above 0"):
        unmask(**kwargs, softcap=0)
    assert Strategy.of(3, confidence=CONFIDENCES[:3]).confidence.tolist() == [0, 1, 2]
    assert Strategy.of(2) == Strategy()


def same(name: str, kwargs: dict[str, Any]) -> None:
    got = getattr(tt_kernels, name)(**kwargs)
    with tt_kernels.use("reference"):
        want = getattr(tt_kernels, name)(**kwargs)
    for a, b in zip(got, want, strict=True):
        # exp of differences of logits up to 20: 20 eps of fp32
        torch.testing.assert_close(a, b, rtol=3e-6, atol=0, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("kind", CONFIDENCES)
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_rows_of_infinities_nan_and_ties(kind: str, temperature: float) -> None:
    """In three parts of the vocabulary; what equals another within a tile, across tiles and across parts."""
    nan, inf = math.nan, math.inf
    rows = [
        [-inf, -inf, 2.0, -inf],
        [-inf, -inf, -inf, -inf],
        [1.0, inf, 2.0, 0.0],
        [1.0, nan, 2.0, nan],
        [2.0, 2.0, -inf, 1.0],
        [2.0, 1.0, 2.0, -inf],
    ]
    wide = torch.full((1, 6, 9000), -inf)
    wide[0, :, [5, 4095, 8190, 8191]] = torch.tensor(rows)
    wide[0, 0, :200] = 0.25 * torch.arange(200).remainder(5)
    block = torch.full((1, 6), 8999)
    sampling = Sampling.of(1, temperature=temperature, seed=3)
    for tempered in (False, True):
        strategy = Strategy.of(1, confidence=kind, entropy_bound=0.9, tempered=tempered)
        kwargs = dict(logits=wide, block=block, sampling=sampling, mask_token_id=8999, strategy=strategy)
        same("unmask_logits", {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in kwargs.items()})


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize(
    "name,V,equals",
    [  # logits in two parts of two tiles of 2048; a head's in six parts of three tiles of 64, of two tiles of rows
        ("unmask_logits", 4300, ((5, 7), (5, 2100), (5, 4200), (4200, 2), (2300, 4205))),
        ("unmask", 1100, ((5, 7), (5, 100), (5, 700), (800, 2), (900, 905))),
    ],
)
def test_second_best_and_entropy_from_tiles_and_parts(
    name: str, V: int, equals: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rules are given, of logits in memory and of heads; equals within a tile, across tiles and parts."""
    torch.manual_seed(5)
    known: list[strategies.Judged] = []
    monkeypatch.setattr(strategies, "decide", lambda block, judged, *rest: known.append(judged))
    L, rows = 5, 20  # of each kind and temper five, which are those of `equals`
    hidden, weight = torch.zeros(rows, 32), torch.randn(V, 32)
    hidden[torch.arange(rows), torch.arange(rows)] = torch.linspace(0.1, 2, rows)  # row r's logits are column r
    for r in range(rows):
        weight[list(equals[r % L]), r] = 7.0
    weight[V - 100, :rows:L] = weight[20, 1:rows:L] = 7.5
    logits, block = hidden @ weight.T, torch.full((rows // L, L), V - 1)
    strategy = Strategy.of(4, confidence=["margin", "margin", "entropy", "entropy"], entropy_bound=0.5)
    strategy = strategy._replace(tempered=torch.tensor([False, True, False, True]))
    sampling = Sampling.of(4, temperature=0.5, seed=3)
    given = (hidden.view(4, L, -1), weight, block) if name == "unmask" else (logits.view(4, L, V), block)
    here = (type(t)(*(None if x is None else x.to(DEVICE) for x in t)) for t in (sampling, strategy))
    options = dict(zip(("sampling", "strategy"), here, strict=True), mask_token_id=V - 1)
    getattr(tt_kernels, name)(*(t.to(DEVICE) for t in given), **options)
    (judged,) = known
    each = torch.arange(4).repeat_interleave(L)
    plain = logits.double().index_fill(1, torch.tensor([V - 1]), -math.inf)
    want = judge(plain, judged.token.flatten().cpu(), sampling.select(each), strategy.select(each))
    for field in ("score", "entropy", "confidence"):
        got = getattr(judged, field).flatten().cpu().double()
        # logits up to 30: a few eps of fp32 of them, in p as in sum p log p
        torch.testing.assert_close(got, getattr(want, field), rtol=3e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("seed", (1, 2))
def test_heads_places_and_limits_of_mixed_rows(seed: int) -> None:
    """Every confidence and rule, with a bias, a soft cap, logits of the place before, top_k and top_p."""
    for name, dims in (("unmask", dict(D=8, ending=1)), ("unmask_logits", dict(shift=1))):
        for narrow in (0, 1):
            kwargs = make(OPS[name], dict(B=6, L=5, V=40, rules=1, narrow=narrow, **dims), torch.float32, seed)
            same(name, kwargs)
            everything = Strategy.of(6, confidence=["random", "random", "margin", "entropy", "entropy", "margin"])
            everything = everything._replace(tempered=torch.ones(6, dtype=torch.bool), number=torch.arange(6) % 4)
            same(name, kwargs | dict(strategy=Strategy(*(None if t is None else t.to(DEVICE) for t in everything))))
