"""Noise, prediction and the commit rule: against known answers, tests/literal and plain Python. 10 s on one core."""

import math
from typing import Any

import literal
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tt_kernels import Sampling, commit, gumbel_noise, head_sample, sample, unmask
from tt_kernels.reference.sampling import _philox, bounds

WORD = 2**32 - 1


def long(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# Noise


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from the paper, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


# Random123's kat_vectors: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter,key,answer", KNOWN)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    assert [int(t) for t in _philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])] == answer
    assert plain_philox(counter, key) == answer


def words(noise: Tensor) -> list[int]:
    """The 32-bit words behind the noise: fp64 has 20 bits more than they need."""
    return [round(u * 2**32 - 0.5) for u in (-torch.expm1(-torch.exp(-noise))).tolist()]


def plain_words(tokens: range, position: int, step: int, seed: int) -> list[int]:
    """The word of each token, bit by bit as `gumbel_noise` specifies."""
    found = []
    for v in tokens:
        bits = f"{v:040b}"[::-1]
        counter = int("".join(bit for i, bit in enumerate(bits) if i not in (3, 6))[::-1], 2)
        four = plain_philox([counter, position & WORD, step & WORD, 0], [seed & WORD, seed >> 32 & WORD])
        found.append(four[int(bits[6] + bits[3], 2)])
    return found


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, WORD),
    step=st.integers(0, WORD),
    V=st.integers(1, 300),
)
@settings(max_examples=20)
def test_noise_is_keyed_on_seed_position_step_and_token(seed: int, position: int, step: int, V: int) -> None:
    noise = gumbel_noise(long(seed), long(position), long(step), vocab_size=V)[0]
    assert noise.dtype == torch.float64 and words(noise) == plain_words(range(V), position, step, seed)


def test_noise_does_not_depend_on_slot_batch_or_vocabulary() -> None:
    seed, position, step = torch.randint(100, (3, 12))
    whole = gumbel_noise(seed, position, step, vocab_size=50)
    order = torch.randperm(12)
    assert torch.equal(gumbel_noise(seed[order], position[order], step[order], vocab_size=50), whole[order])
    assert torch.equal(gumbel_noise(seed[5:6], position[5:6], step[5:6], vocab_size=50), whole[5:6])
    assert torch.equal(gumbel_noise(seed, position, step, vocab_size=7), whole[:, :7])
    grid = gumbel_noise(seed.view(3, 4).int(), position.view(3, 4).int(), step.view(3, 4).int(), vocab_size=50)
    assert torch.equal(grid, whole.view(3, 4, 50))


def test_noise_has_the_gumbel_distribution() -> None:
    n = 100_000
    noise = gumbel_noise(long(1), long(2), long(3), vocab_size=n)[0].sort().values
    assert -math.log(33 * math.log(2)) <= noise[0] and noise[-1] <= 33 * math.log(2)  # words 2^32 - 1 and 0
    cdf = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, n + 1) / n
    # Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) once in a thousand seeds, and this is one seed.
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(n)
    others = [gumbel_noise(long(s), long(p), long(t), vocab_size=n)[0] for s, p, t in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    first = gumbel_noise(long(1), long(2), long(3), vocab_size=n)[0]
    for other in (*others, first.roll(1), first.roll(4)):
        # Correlation of independent numbers: standard deviation 1 / sqrt(n); 4 of them.
        assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 4 / math.sqrt(n)


# Prediction


def settings(R: int, temperature: float | list[float] = 0.0, **limits: Any) -> Sampling:
    hot = temperature if isinstance(temperature, float) else torch.tensor(temperature, dtype=torch.float64)
    rows = torch.arange(R)
    return Sampling.of(R, temperature=hot, seed=rows, position=rows + 5, step=rows % 3, **limits)


def test_sample_frequencies() -> None:
    n, logits = 20_000, torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (1.0, 0.5):
        token, _ = sample(logits.expand(n, 4), settings(n, temperature))
        p = (logits / temperature).softmax(-1)
        frequency = torch.bincount(token, minlength=4) / n
        assert ((frequency - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()  # 4 standard deviations


@given(data=st.data())
def test_sample_against_literal(data: st.DataObject) -> None:
    """Top-k, top-p, suppression and temperature in a mixed batch; whole logits, so that ties are common."""
    R, V = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    logits = torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=R * V, max_size=R * V))).view(R, V).double()
    temperatures = data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=R, max_size=R))
    top_k = data.draw(st.none() | st.lists(st.integers(0, V + 1), min_size=R, max_size=R))
    # No sum of e^(whole numbers / T) over another is one of these, so rounding decides nothing.
    shares = st.sampled_from([1e-9, 0.3137, 0.7071, 0.99017, 1.0])
    top_p = data.draw(st.none() | st.lists(shares, min_size=R, max_size=R))
    suppress = data.draw(st.none() | st.integers(0, V - 1))
    sampling = settings(
        *(R, temperatures),
        top_k=None if top_k is None else torch.tensor(top_k),
        top_p=None if top_p is None else torch.tensor(top_p, dtype=torch.float64),
    )._replace(seed=torch.tensor(data.draw(st.lists(st.integers(0, 99), min_size=R, max_size=R))))
    token, confidence = sample(logits, sampling, suppress=suppress)
    noise = gumbel_noise(sampling.seed, sampling.position, sampling.step, vocab_size=V)
    for r in range(R):
        row = logits[r].clone()
        if suppress is not None:
            row[suppress] = -math.inf
        mine = (top_k and top_k[r]) or None, top_p and top_p[r]
        want = literal.sample(row, noise[r], temperatures[r], *mine)
        assert token[r] == want
        # A softmax of 9 numbers in two orders of operations: a few eps of fp64.
        assert math.isclose(confidence[r], literal.softmax(row)[want], rel_tol=1e-13)


def test_top_k_keeps_what_equals_the_kth_and_top_p_what_crosses() -> None:
    n = 400
    ties = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).expand(n, 5)
    assert set(sample(ties, settings(n, 3.0, top_k=2))[0].tolist()) == {0, 1, 2, 3}
    p = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(n, 4)
    assert set(sample(p, settings(n, 1.0, top_p=0.4))[0].tolist()) == {0}
    assert set(sample(p, settings(n, 1.0, top_p=0.6))[0].tolist()) == {0, 1}
    # Two of four equals sum to exactly 0.5; it is the third that exceeds it.
    assert set(sample(torch.zeros(n, 4), settings(n, 1.0, top_p=0.5))[0].tolist()) == {0, 1, 2}
    # Confidence stays the probability under the whole softmax at temperature 1.
    assert sample(p, settings(n, 0.3, top_p=0.4)).confidence.allclose(torch.tensor(0.5))


def test_a_top_p_of_1_is_no_limit() -> None:
    """Also where the rounded probabilities add up to more than 1 before the last token."""
    scaled = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    least, last = bounds(scaled, torch.ones(200), None, torch.ones(200))
    assert (least == -math.inf).all() and (last == 50).all()


def test_argmax_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 17] = logits[1, 4000] = 1
    logits[2, 4999] = 1
    assert sample(logits, settings(3))[0].tolist() == [0, 17, 4999]


def test_head_sample_is_sample_of_the_head_in_fp32() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    sampling = settings(5, [0.0, 1.0, 0.5, 0.0, 2.0])
    token, confidence = head_sample(hidden, weight, sampling, suppress=3)
    want_token, want_confidence = sample(hidden.double() @ weight.double().T, sampling, suppress=3)
    assert torch.equal(token, want_token) and confidence.dtype == torch.float32
    # Logits up to 8, so exp is off by at most 8 eps of fp32; logits rounded to bf16 would be off by 1e-2.
    torch.testing.assert_close(confidence.double(), want_confidence, rtol=1e-6, atol=0)


def test_batch_gets_what_each_gets_alone() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 8).double(), torch.randn(11, 8).double()
    sampling = settings(6, [0.0, 1.0, 0.5, 0.0, 2.0, 0.1])
    token, confidence = head_sample(hidden, weight, sampling)
    for r in range(6):
        alone = head_sample(hidden[r : r + 1], weight, sampling.select(torch.tensor([r])))
        assert alone[0] == token[r]
        assert math.isclose(alone[1], confidence[r], rel_tol=1e-12)  # a matrix product may sum a row in another order


# The commit rule

confidences = st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 0.8, 1.0])  # few, so that ties and the threshold itself occur


@given(data=st.data())
def test_commit_against_literal(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    many = B * L
    block = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=many, max_size=many))).view(B, L)  # 0: the mask
    confidence = torch.tensor(data.draw(st.lists(confidences, min_size=many, max_size=many))).view(B, L).double()
    threshold = torch.tensor(data.draw(st.lists(confidences, min_size=B, max_size=B))).double()
    steps_left = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=B, max_size=B)))
    token = torch.arange(10, 10 + many).view(B, L)
    dirty = confidence.masked_fill(block != 0, data.draw(st.sampled_from([0.0, 2.0, math.inf, math.nan])))
    new, committed, left = commit(block, token, dirty, mask_token_id=0, threshold=threshold, steps_left=steps_left)
    for b in range(B):
        masked = [i for i in range(L) if block[b, i] == 0]
        sure = [confidence[b, i].item() for i in masked]
        chosen = literal.commit_rule(masked, sure, threshold[b].item(), int(steps_left[b])) if masked else []
        assert committed[b].nonzero().flatten().tolist() == chosen
        assert new[b].tolist() == [int(token[b, i]) if i in chosen else int(block[b, i]) for i in range(L)]
        assert left[b] == len(masked) - len(chosen)


def test_commit_takes_at_least_one_and_the_share() -> None:
    block, token = torch.zeros(1, 5, dtype=torch.long), torch.arange(1, 6)[None]
    sure = torch.tensor([[0.2, 0.4, 0.4, 0.1, 0.3]])
    for steps_left, want in ((16, [1]), (3, [1, 2]), (2, [1, 2, 4]), (1, [0, 1, 2, 3, 4]), (0, [0, 1, 2, 3, 4])):
        _, committed, left = commit(
            block, token, sure, mask_token_id=0, threshold=torch.tensor([0.4]), steps_left=long(steps_left)
        )
        assert committed[0].nonzero().flatten().tolist() == want and left == 5 - len(want)


@given(data=st.data())
def test_unmask_against_literal(data: st.DataObject) -> None:
    B, L, D, V, mask = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), 4, 7, 6
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hidden = torch.randn(B, L, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    block = torch.tensor(data.draw(st.lists(st.sampled_from([0, 1, mask, mask]), min_size=B * L, max_size=B * L))).view(
        B, L
    )
    temperature = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=B, max_size=B))).double()
    threshold = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.9]), min_size=B, max_size=B))).double()
    steps_left, step = torch.randint(1, 5, (2, B), generator=generator)
    seed, position = torch.randint(0, 1000, (2, B), generator=generator)
    top_k = data.draw(st.none() | st.lists(st.integers(0, V), min_size=B, max_size=B))
    sampling = Sampling(temperature, seed, position, step, None if top_k is None else torch.tensor(top_k))
    new, committed, confidence, left = unmask(
        hidden, weight, block, sampling, mask_token_id=mask, threshold=threshold, steps_left=steps_left
    )
    for b in range(B):
        masked, token, sure = [i for i in range(L) if block[b, i] == mask], {}, []
        for i in masked:
            row = weight @ hidden[b, i]
            row[mask] = -math.inf
            noise = gumbel_noise(seed[b : b + 1], position[b : b + 1] + i, step[b : b + 1], vocab_size=V)[0]
            token[i] = literal.sample(row, noise, temperature[b].item(), (top_k and top_k[b]) or None)
            sure.append(literal.softmax(row)[token[i]].item())
        chosen = literal.commit_rule(masked, sure, threshold[b].item(), int(steps_left[b])) if masked else []
        assert committed[b].nonzero().flatten().tolist() == chosen
        assert new[b].tolist() == [token[i] if i in chosen else int(block[b, i]) for i in range(L)]
        assert left[b] == len(masked) - len(chosen)
        want = torch.zeros(L, dtype=torch.float64)
        want[masked] = torch.tensor(sure, dtype=torch.float64)
        torch.testing.assert_close(confidence[b], want, rtol=1e-12, atol=0)  # sums of 4 and 7 terms in another order
