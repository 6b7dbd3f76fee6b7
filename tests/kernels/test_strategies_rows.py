"""Rows of a batch apart from each other, logits that a bias and a soft cap come after, and logits that are no numbers.
60 s on one core."""

import math
from functools import partial
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
from tt_kernels import Sampling, Strategy, reference, unmask_logits
from tt_kernels.reference.unmasking import judge, uniform
from tt_kernels.sampling import strategies

runs_kernels = pytest.mark.skipif(not KERNELS, reason="kernels: TRITON_INTERPRET=1 or a GPU")
ANY = [-4.0, -1.0, 0.0, 0.5, 2.0, 3.0, -math.inf, math.inf, math.nan]


# ---- bias and soft cap of logits in memory ----


def finished(logits: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """As the docstring has it: the bias first, then the cap, and -inf where the bias is."""
    logits = logits if bias is None else logits + bias
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits if bias is None else torch.where(bias == -math.inf, -math.inf, logits)


@pytest.mark.kernels
@pytest.mark.parametrize("narrow", (0, 1))
@pytest.mark.parametrize("given_", (("bias",), ("softcap",), ("bias", "softcap")), ids="-".join)
def test_logits_with_bias_and_soft_cap_are_what_the_formula_makes_of_them(given_: tuple[str, ...], narrow: int) -> None:
    kwargs = make(OPS["unmask_logits"], dict(B=6, L=5, V=29, rules=1, ending=1, narrow=narrow), torch.float64)
    bias, cap, logits = kwargs.pop("bias"), kwargs.pop("softcap"), kwargs.pop("logits")
    ending: dict[str, Any] = {name: dict(bias=bias, softcap=cap)[name] for name in given_}
    got = unmask_logits(logits, **kwargs, **ending)
    want = reference.unmask_logits(finished(logits, ending.get("bias"), ending.get("softcap")), **kwargs)
    plain = reference.unmask_logits(logits, **kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert not torch.allclose(got.confidence, plain.confidence, rtol=1e-3)
    if "bias" in ending:
        never = (bias == -math.inf).nonzero().flatten().tolist()
        assert len(never) == 2 and not set(got.block[got.committed].tolist()) & {*never, kwargs["mask_token_id"]}


@pytest.mark.kernels
@runs_kernels
@pytest.mark.parametrize("narrow", (0, 1, 2, 3))
@pytest.mark.parametrize("L,V", ((5, 40), (1, 4300)))
def test_kernels_finish_logits_as_the_reference(L: int, V: int, narrow: int) -> None:
    """In one part of the vocabulary and in two, without limits and with each; not all of memory's rows side by side."""
    kwargs = make(OPS["unmask_logits"], dict(B=6, L=L, V=V, rules=1, ending=1, narrow=narrow), torch.float32)
    wide = torch.full((6, L, V + 3), math.nan, device=DEVICE)
    wide[..., :V] = kwargs["logits"]
    kwargs |= dict(logits=wide[..., :V], bias=torch.stack([kwargs["bias"], kwargs["bias"]], 1)[:, 0])
    got = unmask_logits(**kwargs)
    with tt_kernels.use("reference"):
        want = unmask_logits(**kwargs)
    for a, b in zip(got, want, strict=True):
        # exp of differences of logits up to 16, below a cap of 8: 20 eps of fp32
        torch.testing.assert_close(a, b, rtol=3e-6, atol=0)


@pytest.mark.kernels
@runs_kernels
@pytest.mark.parametrize(
    "dtype,rtol", ((torch.float32, 3e-6), (torch.float64, 1e-14))
)  # exp of logits up to 16: 20 eps
@pytest.mark.parametrize("cap", (1e-30, 0.3, 30.1, 1e4, 1e9, 1e30))
@pytest.mark.parametrize("name", ("unmask", "unmask_logits"))
def test_caps_of_any_size(name: str, cap: float, dtype: torch.dtype, rtol: float) -> None:
    """A large cap leaves logits as they are, however small they are beside it."""
    dims = dict(B=2, L=5, V=29) | (dict(D=8) if name == "unmask" else {})
    kwargs, op = make(OPS[name], dims, dtype), getattr(tt_kernels, name)
    if name == "unmask":  # sixteenths: products are exact in any order
        kwargs |= {n: (kwargs[n] * 16).round() / 16 for n in ("hidden", "weight")}
    got = op(**kwargs, softcap=cap)
    with tt_kernels.use("reference"):
        want, uncapped = op(**kwargs, softcap=cap), op(**kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)
    if cap > 1e8:
        torch.testing.assert_close(got.confidence, uncapped.confidence, rtol=rtol, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ("unmask", "unmask_logits"))
def test_blocks_of_one_position_have_no_place_before(name: str) -> None:
    dims = dict(B=3, L=1, V=29, rules=1, narrow=1) | (dict(D=8) if name == "unmask" else {})
    kwargs = make(OPS[name], dims, torch.float32)
    kwargs |= dict(block=torch.full_like(kwargs["block"], kwargs["mask_token_id"]))
    for sampling in (kwargs["sampling"], kwargs["sampling"]._replace(top_k=None, top_p=None)):
        op = partial(getattr(tt_kernels, name), **kwargs | dict(sampling=sampling))
        assert all(torch.equal(a, b) for a, b in zip(op(shift=True), op(shift=False), strict=True))


# ---- rows apart ----


@pytest.mark.kernels
@runs_kernels
@pytest.mark.parametrize("ending", (0, 1))
@pytest.mark.parametrize("narrow", (0, 1))
@pytest.mark.parametrize("name", ("unmask", "unmask_logits"))
def test_kernels_give_rows_of_mixed_given_ruleswhat_each_gets_alone(name: str, narrow: int, ending: int) -> None:
    """Bit for bit, also where the head writes its logits in memory for all rows together and not for one of them."""
    dims = dict(B=6, L=5 if narrow or name == "unmask_logits" else 11, V=300, rules=1, narrow=narrow, ending=ending) | (
        dict(D=8) if name == "unmask" else {}
    )
    kwargs, op = make(OPS[name], dims, torch.float32), getattr(tt_kernels, name)
    if name == "unmask":  # sixteenths: products are exact in any order
        kwargs |= {n: (kwargs[n] * 16).round() / 16 for n in ("hidden", "weight")}
    whole, apart = op(**kwargs), ("block", "threshold", "steps_left", "hidden", "logits")
    assert whole.committed.any(-1).all() and whole.masked.sum() > 0
    for b in range(6):
        some = slice(b, b + 1)
        mine = {n: t[some] if n in apart else t for n, t in kwargs.items()}
        mine |= dict(sampling=kwargs["sampling"].select(some), strategy=kwargs["strategy"].select(some))
        for got, want in zip(op(**mine), whole, strict=True):
            assert torch.equal(got[0], want[b]), b


@pytest.mark.kernels
@pytest.mark.parametrize("name", ("unmask", "unmask_logits"))
def test_rows_without_a_rule_that_others_have(name: str) -> None:
    """As docs/decoding.md and the docstrings have it: what leaves a rule out in one row of a batch."""
    kwargs = make(OPS[name], dict(B=5, L=9, V=29) | (dict(D=8) if name == "unmask" else {}), torch.float32)
    op = partial(getattr(tt_kernels, name), **kwargs | dict(block=torch.full_like(kwargs["block"], 28)))
    none = dict(threshold=[math.inf] * 5, steps_left=[9] * 5, alg_temp=[0.0] * 5)
    none |= {rule: [-1.0] * 5 for rule in ("factor", "entropy_bound")} | dict(number=[-1] * 5)
    own = dict(threshold=0.2, steps_left=3, factor=3.0, entropy_bound=6.0, number=4)
    given_rules = {rule: torch.tensor(values, device=DEVICE) for rule, values in none.items()}
    for row, (rule, value) in enumerate(own.items()):
        given_rules[rule][row] = value
    mixed = {rule: given_rules.pop(rule) for rule in ("threshold", "steps_left")}
    whole = op(**mixed, strategy=Strategy(**given_rules))
    for row, (rule, value) in enumerate(own.items()):
        given: dict[str, Any] = dict(threshold=None, steps_left=None)
        tensor = torch.tensor([value] * 5, device=DEVICE)
        given |= {rule: tensor} if rule in given else dict(strategy=Strategy(**{rule: tensor}))
        alone = op(**given)
        assert torch.equal(whole.block[row], alone.block[row]) and whole.committed[row].sum() > 1, rule


# ---- what is no number ----


def over(a: float, b: float) -> float:
    """A quotient as IEEE 754 has it, of numbers that are not negative."""
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.inf
    return a / b


def probabilities(logits: list[float]) -> list[float]:
    """exp(x) / sum(exp(x)): 0 / 0 where all are -inf, inf / inf at infinities, NaN beside NaN."""
    terms = [math.exp(x) for x in logits]
    return [over(t, math.fsum(terms)) for t in terms]


def looked_at(p: list[float], token: int, kind: int, chance: float) -> tuple[float, float, float]:
    """Confidence, score and entropy of a row."""
    none = any(map(math.isnan, p))
    entropy = math.nan if none else rules.entropy(p)
    margin = math.nan if none else rules.margin(p)
    return p[token], (p[token], margin, -entropy, chance, p[token])[kind], entropy


def equal(got: Tensor, want: float, eps: float) -> bool:
    return math.isclose(got.item(), want, rel_tol=eps, abs_tol=eps) or (math.isnan(got.item()) and math.isnan(want))


@given(data=st.data())
def test_what_is_looked_at_of_any_logits_is_its_formula(data: st.DataObject) -> None:
    """NaN, infinities of both signs, rows of -inf."""
    V, t = data.draw(st.integers(2, 7)), data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    row = data.draw(st.lists(st.sampled_from(ANY), min_size=V, max_size=V) | st.just([-math.inf] * V))
    kind, token, tempered = data.draw(st.integers(0, 4)), data.draw(st.integers(0, V - 1)), data.draw(st.booleans())
    sampling = Sampling.of(1, temperature=t, seed=3, position=5, step=2)
    strategy = Strategy(confidence=torch.tensor([kind]), tempered=torch.tensor([tempered]))
    got = judge(torch.tensor([row]).double(), torch.tensor([token]), sampling, strategy)
    p = probabilities([x / t for x in row] if tempered and t else row)
    chance = uniform(*(torch.tensor(n) for n in (3, 5, 2)), -1).item()
    for found, want in zip((got.confidence, got.score, got.entropy), looked_at(p, token, kind, chance), strict=True):
        assert equal(found, want, 1e-12)


@pytest.mark.kernels
@runs_kernels
@given(data=st.data())
@settings(max_examples=25)
def test_kernels_look_at_any_logits_by_the_formula(data: st.DataObject) -> None:
    """Of the token that they choose: the first NaN, else the first infinity; of rows of -inf none but the mask."""
    V, t, L = 7, data.draw(st.sampled_from([0.0, 0.5, 2.0])), 3
    number = st.lists(st.sampled_from(ANY), min_size=V, max_size=V) | st.just([-math.inf] * V)
    logits = [data.draw(number) for _ in range(L)]
    kind, tempered = data.draw(st.integers(0, 4)), data.draw(st.booleans())
    bias = [0.0] * V
    if data.draw(st.booleans()):
        bias[2], bias[3] = -math.inf, 0.5
    strategy = Strategy(*(None if n is None else torch.tensor([n], device=DEVICE) for n in (kind, None, 0.5)))
    strategy = strategy._replace(tempered=torch.tensor([tempered], device=DEVICE))
    known: list[strategies.Judged] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "decide", lambda block, judged, *rest: known.append(judged))
        unmask_logits(
            torch.tensor([logits], device=DEVICE),
            torch.zeros(1, L, dtype=torch.int64, device=DEVICE),
            Sampling.of(1, temperature=t, seed=3, position=5, step=2, device=DEVICE),
            mask_token_id=0,
            strategy=strategy,
            bias=torch.tensor(bias, device=DEVICE),
        )
    for i, row in enumerate(logits):
        # of NaN and inf the sum with -inf is NaN
        row = [-math.inf, *(x + b for x, b in zip(row[1:], bias[1:], strict=True))]
        token = int(known[0].token[0, i])
        odd = [j for j, x in enumerate(row) if math.isnan(x)] or [j for j, x in enumerate(row) if x == math.inf]
        assert token in (odd[:1] or [1] if not any(x > -math.inf for x in row) else odd[:1] or range(1, V))
        p = probabilities([x / t for x in row] if tempered and t else row)
        chance = uniform(*(torch.tensor(n) for n in (3, 5 + i, 2)), -1).item()
        found = (known[0].confidence[0, i], known[0].score[0, i], known[0].entropy[0, i])
        for got, want in zip(found, looked_at(p, token, kind, chance), strict=True):
            assert equal(got, want, 2e-6)
