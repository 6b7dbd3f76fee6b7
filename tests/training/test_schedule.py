"""tt_model/training/schedule.py: the rate never jumps and ends where it should; settings that cannot be are refused."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tt_model.training.schedule import FIXED, Stretch, TrainSettings, learning_rate

rates = st.floats(1e-9, 1.0)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    decay=st.floats(0, 1),
    peak=rates,
    share=st.floats(0, 1),
    since=st.integers(0, 200),
    before=st.just(0.0) | rates,
)
@example(steps=10, warmup=8, decay=0.5, peak=1.0, share=0.0, since=0, before=0.0)  # they overlap
@example(steps=10, warmup=100, decay=0.2, peak=1.0, share=0.01, since=0, before=0.0)  # fewer steps than the warm-up
@example(steps=10, warmup=3, decay=1.0, peak=1.0, share=0.0, since=0, before=0.0)
@example(steps=10, warmup=0, decay=0.0, peak=1.0, share=0.5, since=0, before=0.0)
@example(steps=1, warmup=1, decay=0.2, peak=1.0, share=0.5, since=0, before=0.0)
@example(steps=50, warmup=10, decay=0.2, peak=1e-3, share=0.0, since=30, before=1.0)  # a lower rate, later
def test_no_rate_jumps_and_the_last_is_the_final_one(steps, warmup, decay, peak, share, since, before) -> None:
    final = peak * share
    whole = since + steps
    s = TrainSettings("ar", steps=whole, learning_rate=peak, final_learning_rate=final, warmup=warmup, decay=decay)
    got = [learning_rate(i, s, Stretch(since, before)) for i in range(since, whole)]
    assert got[-1] == final
    highest = max(peak, before)
    assert all(0 <= rate <= highest for rate in got)
    falling = max(1, round(steps * decay))
    ramp = highest / max(1, warmup) + highest / falling  # the steepest that the two together can be
    path = [before, *got] if warmup else got
    assert all(abs(b - a) <= ramp * (1 + 1e-9) for a, b in pairwise(path))


@given(st.integers(40, 300), st.integers(0, 10), st.floats(0, 0.5))
def test_between_the_two_it_is_the_largest(steps, warmup, decay) -> None:
    s = TrainSettings("ar", steps=steps, learning_rate=0.5, final_learning_rate=0.1, warmup=warmup, decay=decay)
    falling = max(1, round(steps * decay))
    assert {learning_rate(i, s) for i in range(max(0, warmup - 1), steps - falling)} == {0.5}
    if falling > 1:
        assert learning_rate(steps - falling, s) == pytest.approx(0.5 - 0.4 / falling)


WORDS = ("stage", "skip_first_lines", "context_tower", "no_time")
NAMES = [f.name for f in dataclasses.fields(TrainSettings) if f.name not in WORDS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, -0.5, "1", None, True])
def test_settings_are_numbers_that_can_be(name: str, bad: object) -> None:
    value = (0.9, bad) if name == "betas" else bad
    with pytest.raises(ValueError, match=f"{name} is "):
        TrainSettings("ar", **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(final_learning_rate=1e-3, learning_rate=1e-4), "final_learning_rate is 0.001, above learning_rate"),
        (dict(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (dict(betas=(0.9,)), "betas is"),
        (dict(steps=2.0), "steps is 2.0, expected an integer"),
        (dict(seed=2**40), "seed is"),
        (dict(clip=0.0), "clip is 0.0"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings("ar", **change)


def test_what_may_be_adjusted_is_a_setting() -> None:
    assert set(FIXED) < {*NAMES, *WORDS}
