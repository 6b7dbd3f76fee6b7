"""Sampling and committing at the ends of what their arguments may hold: temperatures, infinities, NaN, keys, sizes. The
values are plain Python's, on the reference and on the kernels alike."""

import math
import random
import re
from typing import Any

import pytest
import torch
from parity import DEVICE, leaves, make
from test_sampling import WORD, plain_words, words
from torch import Tensor

from cards import OPS
from tt_kernels import Sampling, Strategy, commit, gumbel_noise, head_sample, sample, unmask

pytestmark = pytest.mark.kernels
INF, NAN = math.inf, math.nan
NARROW = ({}, dict(top_k=2), dict(top_p=0.4), dict(top_k=3, top_p=0.4))


def on(values: object, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def settings(R: int, temperature: float, dtype: torch.dtype = torch.float64, **limits: float) -> Sampling:
    rows = torch.arange(R, device=DEVICE)
    hot = torch.full((R,), temperature, dtype=dtype, device=DEVICE)
    return Sampling.of(R, temperature=hot, seed=rows, position=rows + 5, step=rows % 3, **limits, device=DEVICE)


def noise_of(sampling: Sampling, V: int) -> Tensor:
    return gumbel_noise(sampling.seed, sampling.position, sampling.step, vocab_size=V)


# Temperatures

LARGE = [
    (INF, torch.float64),
    (INF, torch.float32),
    (INF, torch.float16),
    (1e39, torch.float64),
    (1e300, torch.float64),
]
TINY = [(1e-38, torch.float64), (1e-38, torch.float32), (1e-45, torch.float32), (1e-300, torch.float64)]
TINY += [(5e-324, torch.float64), (1e-30, torch.float64), (1e-10, torch.float32), (6e-8, torch.float16)]
LOGITS = [5.0, -INF, 10.0, 20.0, -3.0, 19.0, 12.0]


@pytest.mark.parametrize(
    "temperature,dtype,narrow",
    [
        *((*each, {}) for each in LARGE),
        *((*LARGE[0], narrow) for narrow in NARROW[1:]),
        (*LARGE[2], NARROW[2]),
        (*LARGE[3], NARROW[2]),
    ],
    ids=str,
)
def test_infinite_temperatures_draw_evenly_from_what_may_be_drawn(
    temperature: float, dtype: torch.dtype, narrow: dict
) -> None:
    R = 24
    options = settings(R, temperature, dtype, **narrow)
    token, confidence = sample(on(LOGITS).expand(R, 7), options, suppress=3)
    # 5 tokens are left, 12 and 19 the best of them. Evenly 0.4 is exceeded by three of five and by two of three.
    allowed = {2: {5, 6}, 3: {5, 6}}.get(narrow.get("top_k"), {2, 5, 6} if narrow else {0, 2, 4, 5, 6})
    assert set(token.tolist()) == allowed
    others = [v for v in range(7) if v not in allowed]
    noise = noise_of(options, 7)
    noise[:, others] = -INF
    assert torch.equal(token, noise.argmax(-1))
    weights = on(LOGITS, torch.float64).index_fill(0, on([3]), -INF).softmax(-1)
    torch.testing.assert_close(confidence.double(), weights[token], rtol=3e-6, atol=0)


@pytest.mark.parametrize("temperature,dtype", TINY, ids=str)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_tiny_temperatures_take_the_best(temperature: float, dtype: torch.dtype, narrow: dict) -> None:
    rows = [[5.0, 10.0, 20.0], [-5.0, -10.0, -20.0], [-INF, -20.0, -INF], [3e38, -3e38, 3.1e38], [0.0, -1.0, 1.0]]
    size = 1e-9 if temperature < 1e-20 else 1.0  # beside the noise of any of these temperatures
    rows.append([1 * size, 3 * size, 2 * size])
    options = settings(6, temperature, dtype, **narrow)
    assert sample(on(rows), options)[0].tolist() == [2, 0, 1, 2, 2, 1]
    assert sample(on(rows), options, suppress=2)[0].tolist() == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("temperature", (1e-38, 1e-3, 1.0, 1e3, 1e38, INF))
def test_logits_of_any_size_at_any_temperature(temperature: float) -> None:
    """Quotients beyond fp32 keep their order, and those beside which noise counts get it."""
    R = 40
    options = settings(R, temperature)
    token, _ = sample(on([1e30, 2e30, -3e38, 0.0]).expand(R, 4), options)
    noise = noise_of(options, 4)
    exact = on([1e30, 2e30, -3e38, 0.0], torch.float64) / temperature + noise  # fp64 has the range
    assert torch.equal(token, exact.argmax(-1))
    assert len(set(token.tolist())) == (4 if temperature >= 1e38 else 1)
    equal = sample(torch.zeros(R, 5, device=DEVICE), options)[0]
    assert torch.equal(equal, noise_of(options, 5).argmax(-1))  # zeros: the noise decides


def test_the_unit_changes_no_bit() -> None:
    """Powers of 2 apart, scores at a temperature are those of logits and temperature divided by it."""
    torch.manual_seed(0)
    logits = torch.randn(64, 33, device=DEVICE) * 4
    for temperature in (0.9, 0.1, 1e-3):
        options = settings(64, temperature)
        score = logits / on(temperature) + noise_of(options, 33).float()
        assert torch.equal(sample(logits, options)[0], score.argmax(-1))


# Rows


@pytest.mark.parametrize("temperature", (0.0, 0.7, 1e-38, INF))
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_rows_of_infinities_and_nan(temperature: float, narrow: dict) -> None:
    rows = [
        ([-INF, -INF, 2.0, -INF], 2, 1.0, None),
        ([-INF, -INF, -INF, -INF], 0, NAN, None),
        ([-INF, -INF, -INF, -INF], 1, NAN, 0),
        ([3.0, -INF, -INF, -INF], 1, NAN, 0),
        ([1.0, INF, 2.0, INF], 1, NAN, None),
        ([1.0, NAN, 2.0, NAN], 1, NAN, None),
        ([INF, 0.0, NAN, 3.0], 2, NAN, None),
        ([NAN, -INF, 2.0, -INF], 2, 1.0, 0),
        ([INF, 2.0, -INF, -INF], 1, 1.0, 0),
        ([1.0, 2.0, 3.4028234663852886e38, 0.0], 2, 1.0, None),  # the largest number is not infinite
    ]
    if temperature == INF:
        rows.pop()
    for logits, want, sure, suppress in rows:
        token, confidence = sample(on([logits]), settings(1, temperature, **narrow), suppress=suppress)
        assert token.tolist() == [want], logits
        torch.testing.assert_close(confidence, on([sure]), equal_nan=True)


@pytest.mark.parametrize("temperature", (0.0, 0.7, INF))
def test_nothing_to_draw_in_a_vocabulary_of_many_tiles(temperature: float) -> None:
    empty = torch.full((2, 9000), -INF, device=DEVICE)
    assert sample(empty, settings(2, temperature), suppress=0)[0].tolist() == [1, 1]
    assert sample(empty, settings(2, temperature), suppress=4096)[0].tolist() == [0, 0]
    nothing = torch.full((20, 4), NAN, device=DEVICE)  # more than 16 rows are combined in another way
    token, confidence = head_sample(nothing, torch.ones(700, 4, device=DEVICE), settings(20, temperature), suppress=0)
    assert token.tolist() == [1] * 20 and confidence.isnan().all()


@pytest.mark.parametrize("temperature", (0.0, 0.7, INF))
@pytest.mark.parametrize("L", (5, 70))  # in one program and in two kernels
def test_a_spoiled_position_is_committed_last_and_not_as_a_mask(L: int, temperature: float) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(1, L, 4, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    hidden[0, 1] = NAN
    block = torch.zeros(1, L, dtype=torch.int64, device=DEVICE)
    block[0, 3] = 5
    sampling, rule = settings(1, temperature), dict(threshold=on([0.0]), steps_left=on([9]), mask_token_id=0)
    new, committed, confidence, left = unmask(hidden, weight, block, sampling, **rule)
    want = [i not in (1, 3) for i in range(L)]  # all above 0; NaN is above nothing
    assert committed[0].tolist() == want and left.tolist() == [1]
    assert new[0, 1] == 0 and new[0, 3] == 5 and confidence[0, 1].isnan() and confidence[0, 3] == 0
    new, committed, _, left = unmask(hidden, weight, new, sampling, **rule)
    assert new[0, 1] == 1 and committed[0].nonzero().tolist() == [[1]] and left.tolist() == [0]


# Keys and sizes

ENDS = (0, 2**31 - 1, 2**31, WORD, 2**32, 2**63 - 1, -1, -(2**31), -(2**63))


def test_noise_takes_any_integers() -> None:
    """64 bits of the seed, 32 of position and step, from tensors of either dtype."""
    for dtype in (torch.int64, torch.int32):
        keys = [(a, b, ENDS[(i + j) % 9]) for i, a in enumerate(ENDS) for j, b in enumerate(ENDS)]
        if dtype == torch.int32:
            keys = [each for each in keys if all(-(2**31) <= n < 2**31 for n in each)]
        noise = gumbel_noise(*on(keys, dtype).unbind(-1), vocab_size=5)
        for row, (s, p, t) in zip(noise, keys, strict=True):
            assert words(row) == plain_words(range(5), p, t, s), (s, p, t)


def test_positions_run_past_32_bits() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 5, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    rule = dict(threshold=on([0.0, 0.0]), steps_left=on([1, 1]), mask_token_id=8)
    rest = Sampling.of(2, temperature=on([3.0, 3.0]), seed=on([1, 2]), step=on([0, 1]), device=DEVICE)
    block = torch.full((2, 5), 8, device=DEVICE)
    for dtype, ends in ((torch.int32, (2**31 - 2, -2)), (torch.int64, (2**32 - 2, 2**63 - 2))):
        tokens = unmask(hidden, weight, block, rest._replace(position=on(ends, dtype)), **rule).block
        for b in range(2):
            row = rest.select(on(b))
            for i in range(5):
                here = row._replace(position=on((ends[b] + i) % 2**32))
                assert tokens[b, i] == head_sample(hidden[b, i], weight, here, suppress=8).token


@pytest.mark.parametrize("size", [30.0, 3e4, 1e30])
def test_probabilities_of_large_logits(size: float) -> None:
    """Two of one size share the whole: a logarithm of the sum would not know of the other."""
    logits = torch.randn(3, 40).to(DEVICE)
    logits[:, 7:9] = size
    suppressed = logits.index_fill(1, torch.arange(9, 40, device=DEVICE), -math.inf)
    settings = Sampling(*(None if t is None else t.to(DEVICE) for t in Sampling.of(3)))
    p = sample(suppressed, settings).confidence
    torch.testing.assert_close(p, torch.full_like(p, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("of", "option", "value"),
    [
        *((Sampling, "temperature", value) for value in ("hot", None, True)),
        *((Sampling, "seed", value) for value in (1.5, "x")),
        *((Strategy, "number", value) for value in (1.7, [1], True)),
        *((Strategy, "factor", value) for value in ("x", [1.0])),
        *((Strategy, "tempered", value) for value in (1, "yes", [True])),
        *((Strategy, "confidence", value) for value in (None, "sure", 1)),
    ],
    ids=str,
)
def test_numbers_of_rows_are_numbers(of: Any, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{of.__name__}: {option} is {value!r}, expected")):
        of.of(3, **{option: value})


def test_options_that_narrow_nothing() -> None:
    kwargs = make(OPS["sample"], OPS["sample"].cases[0], torch.float32)
    plain = sample(**kwargs)
    for limits in (dict(top_k=11), dict(top_k=2**63 - 1), dict(top_k=0), dict(top_p=1.0), dict(top_k=12, top_p=1)):
        limits = Sampling.of(len(kwargs["logits"]), **limits, device=DEVICE)
        sampling = kwargs["sampling"]._replace(top_k=limits.top_k, top_p=limits.top_p)
        assert all(torch.equal(a, b) for a, b in zip(sample(**kwargs | dict(sampling=sampling)), plain, strict=True))


@pytest.mark.parametrize("limits", [dict(top_k=3), dict(top_p=0.6), dict(top_k=6, top_p=0.6)], ids=str)
def test_limits_of_one_row_are_no_others(limits: dict[str, float]) -> None:
    """A mixed batch: each row gets, bit for bit, what a batch of its own settings gets."""
    torch.manual_seed(3)
    R, V = 12, 40
    logits, row = torch.randn(R, V, device=DEVICE) * 2, torch.arange(R, device=DEVICE)
    hidden, weight = torch.randn(R, 8, device=DEVICE), torch.randn(V, 8, device=DEVICE)
    none = Sampling.of(R, top_k=V + 1, top_p=1.0, device=DEVICE)
    own = settings(R, 0.9, **limits)
    limited, free = sample(logits, own), sample(logits, settings(R, 0.9))
    assert not torch.equal(limited.token, free.token), "the limits say nothing"
    for kind in range(3):  # which third of the rows is limited; others have no limit, said in one of two ways
        mixed = own._replace(
            top_k=own.top_k if own.top_k is None else torch.where(row % 3 == kind, own.top_k, none.top_k * (row % 2)),
            top_p=own.top_p if own.top_p is None else torch.where(row % 3 == kind, own.top_p, none.top_p),
        )
        got = sample(logits, mixed)
        for name in got._fields:
            want = torch.where(row % 3 == kind, getattr(limited, name), getattr(free, name))
            assert torch.equal(getattr(got, name), want)
        whole = head_sample(hidden, weight, mixed)
        for r in (0, 5):
            alone = head_sample(hidden[r], weight, mixed.select(on(r)))
            assert alone.token == whole.token[r]


@pytest.mark.parametrize("temperature", (0.0, 1.0, INF))
def test_one_token_no_rows_and_no_channels(temperature: float) -> None:
    for limits in NARROW:
        token, confidence = sample(torch.randn(3, 1, device=DEVICE), settings(3, temperature, **limits))
        assert token.tolist() == [0, 0, 0] and confidence.tolist() == [1, 1, 1]
        nobody = Sampling(*(None if t is None else t.expand(2, 0) for t in settings(0, 0.0, **limits)))
        none = sample(torch.ones(2, 0, 4, device=DEVICE), nobody)
        assert none.token.shape == none.confidence.shape == (2, 0)
        one = settings(1, 1e-9, **limits).select(on(0))
        assert sample(on([0.0, 9.0, -9.0]), one).token.shape == ()
        hidden, weight = torch.ones(2, 0, device=DEVICE), torch.ones(4, 0, device=DEVICE)
        token, confidence = head_sample(hidden, weight, settings(2, temperature, **limits))
        assert token.max() < 4 and confidence.tolist() == [0.25, 0.25]


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 kernels exist only in the interpreter")
def test_confidence_is_as_wide_as_the_wider_of_hidden_and_head() -> None:
    kwargs = make(OPS["unmask"], dict(B=2, L=3, D=16, V=37), torch.float32)
    wide = unmask(**kwargs | dict(weight=kwargs["weight"].double()))
    assert wide[2].dtype == torch.float64
    torch.testing.assert_close(wide[2].float(), unmask(**kwargs)[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ("sample", "head_sample", "unmask", "commit"))
def test_results_want_no_gradients(name: str) -> None:
    kwargs = make(OPS[name], OPS[name].cases[0], torch.float32)
    free = {k: t.requires_grad_() for k, t in leaves(kwargs).items() if t.is_floating_point()}
    assert free and torch.is_grad_enabled()
    assert not any(t.requires_grad or t.grad_fn for t in OPS[name].fn(**kwargs))


# The commit rule

POOL = (-INF, INF, NAN, NAN, 0.0, -0.0, 0.5, 1.0, -1.0, 65504.0, 6e-8)
STEPS = (-(2**63), -1, 0, 1, 2, 3, 2**63 - 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("L", (1, 6, 40))
def test_commit_orders_any_floats(L: int, dtype: torch.dtype) -> None:
    """Masked positions only: the most confident first, NaN last, of equals the lower position."""
    draw = random.Random(L)
    B = 60
    block = [[draw.choice((0, 0, 7)) for _ in range(L)] for _ in range(B)]
    sure = [[draw.choice(POOL) for _ in range(L)] for _ in range(B)]
    threshold = [draw.choice((NAN, -INF, INF, 0.5, 0.0)) for _ in range(B)]
    steps_left = [draw.choice(STEPS) for _ in range(B)]
    token = torch.arange(10, 10 + B * L, device=DEVICE).view(B, L)
    new, committed, left = commit(
        on(block), token, on(sure, dtype), mask_token_id=0, threshold=on(threshold), steps_left=on(steps_left)
    )
    sure = on(sure, dtype).tolist()
    for b in range(B):
        masked = [i for i in range(L) if block[b][i] == 0]
        m, above = len(masked), sum(sure[b][i] > threshold[b] for i in masked)
        count = min(m, max(1, above, -(-m // max(1, steps_left[b]))))
        order = sorted(masked, key=lambda i: (math.isnan(sure[b][i]), 0 if math.isnan(sure[b][i]) else -sure[b][i], i))
        chosen = sorted(order[:count])
        assert committed[b].nonzero().flatten().tolist() == chosen
        assert new[b].tolist() == [int(token[b, i]) if i in chosen else block[b][i] for i in range(L)]
        assert left[b] == m - count == (new[b] == 0).sum()


def test_commit_beside_positions_that_are_not_masked() -> None:
    """Nothing there counts as a confidence, not even as -inf."""
    block, token = on([[5, 0, 5, 0, 0]]), on([[1, 2, 3, 4, 6]])
    for sure in ([1.0, -INF, 1.0, -INF, -INF], [NAN, NAN, INF, NAN, NAN], [-INF, -INF, -INF, NAN, NAN]):
        new, committed, left = commit(
            block, token, on([sure]), mask_token_id=0, threshold=on([0.9]), steps_left=on([16], torch.int32)
        )
        assert new.tolist() == [[5, 2, 5, 0, 0]] and committed.sum() == 1 and left.tolist() == [2]
