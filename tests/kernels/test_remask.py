"""Remasking against its rules in Python's numbers: LLaDA2.1's edits, WINO's verification, ReMDM's schedules."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import DEVICE, make
from torch import Tensor

from cards import OPS
from tt_kernels import Remasking, Sampling, remask
from tt_kernels.reference.unmasking import uniform

pytestmark = pytest.mark.kernels
MASK = 0


def on(t: Tensor) -> Tensor:
    return t.to(DEVICE)


def plain(row: dict[str, Any], rule: dict[str, Any]) -> list[int]:
    """One row, position by position."""
    block, doubted = list(row["block"]), []
    own = row["own"]
    total = math.fsum(math.exp(-p) for p, t in zip(own, row["block"], strict=True) if t != MASK)
    for i, t in enumerate(row["block"]):
        if t == MASK or not row["may"][i]:
            continue
        if rule["edit"] is not None and row["token"][i] != t and row["confidence"][i] > rule["edit"]:
            block[i] = row["token"][i]
            continue
        if rule["verify"] is not None and own[i] < rule["verify"]:
            doubted.append(i)
        if rule["sigma"] is not None:
            sigma = rule["sigma"] * (math.exp(-own[i]) / total if rule["shared"] else 1)
            if row["chance"][i] < sigma:
                block[i] = MASK
    most = len(doubted) if rule["most"] is None or rule["most"] < 0 else rule["most"]
    for i in sorted(doubted, key=lambda i: (own[i], i))[:most]:
        block[i] = MASK
    return block


def hold(known: dict[str, Tensor], rules: dict[str, list | None]) -> None:
    """The op's rows to `plain`'s."""
    B, L = known["block"].shape
    sampling = Sampling.of(B, seed=torch.arange(B), position=torch.arange(B) * 3, step=torch.full((B,), 4))
    made = {name: None if values is None else on(torch.tensor(values)) for name, values in rules.items()}
    there = {name: on(t) for name, t in known.items()}
    got = remask(
        *(there["block"], Remasking(**made)),
        mask_token_id=MASK,
        may_change=there["may"],
        token=there["token"],
        confidence=there["confidence"],
        own=there["own"],
        sampling=Sampling(*(None if t is None else on(t) for t in sampling)),
    )
    places = torch.arange(L)
    for b in range(B):
        mine: dict[str, Any] = {name: t[b].tolist() for name, t in known.items()}
        mine["chance"] = uniform(torch.full((L,), b), 3 * b + places, torch.full((L,), 4), -2).tolist()
        want = plain(mine, {name: None if values is None else values[b] for name, values in rules.items()})
        assert got.block[b].tolist() == want
        assert got.changed[b].tolist() == [x != y for x, y in zip(want, mine["block"], strict=True)]
        assert got.masked[b] == want.count(MASK)


@given(data=st.data())
def test_every_rule_is_its_formula(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))

    def numbers(values: list) -> Tensor:
        drawn = data.draw(st.lists(st.sampled_from(values), min_size=B * L, max_size=B * L))
        return torch.tensor(drawn, dtype=torch.float32 if isinstance(values[0], float) else None).view(B, L)

    def rows(values: list) -> list | None:
        return data.draw(st.none() | st.lists(st.sampled_from(values), min_size=B, max_size=B))

    block, token, may = numbers([MASK, 1, 2, 3]), numbers([1, 2, 3]), numbers([True, True, False])
    confidence, own = (numbers([0.0, 0.25, 0.5, 0.75, 1.0, math.nan]) for _ in range(2))
    rules = dict(
        edit=rows([0.25, 0.5, 1.0]),
        verify=rows([0.0, 0.5, 0.75]),
        most=rows([-1, 0, 1, 2]),
        sigma=rows([0.0, 0.4, 1.0]),
    )
    rules["shared"] = rows([True, False]) if rules["sigma"] is not None else None
    known = dict(block=block, token=token, may=may, confidence=confidence, own=own)
    hold(known, rules)


def rows_of_many(block: list[int]) -> dict[str, Tensor]:
    """24 rows of 14 positions, equals among them, of which some may not change."""
    generator = torch.Generator().manual_seed(2)

    def drawn(values: list) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (24, 14), generator=generator)]

    known = dict(block=drawn(block), token=drawn([1, 2, 2, 3]), may=drawn([True, True, True, False]))
    return known | dict(confidence=drawn([0.25, 0.75]), own=drawn([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))


def test_the_least_probable_are_masked_first_and_no_more_than_the_limit() -> None:
    """Of many doubted positions; what is edited is none of them."""
    rules = dict(
        edit=[0.5, 2.0] * 12, verify=[0.75, 0.75, 1.5] * 8, most=[0, 1, 2, 4, 6, -1] * 4, sigma=None, shared=None
    )
    hold(rows_of_many([MASK, 1, 2, 2, 2]), rules)


def test_shares_are_of_what_is_not_masked() -> None:
    """Half of the positions are: a share is about twice what it would be among all."""
    rules = dict(edit=None, verify=None, most=None, sigma=[1.0] * 24, shared=[True] * 23 + [False])
    hold(rows_of_many([MASK, 1]), rules)


def test_remdm_schedules() -> None:
    """sigma by the share of tokens that are not masked: at most (1 - alpha_s) / alpha_t, so that the share is kept."""
    before, after = torch.tensor([0.0, 0.5, 0.9]).double(), torch.tensor([0.1, 0.6, 0.95]).double()
    largest = torch.tensor([1.0, 0.8, 0.05 / 0.9]).double()
    cap = Remasking.remdm(before, after, 0.1, kind="cap")
    torch.testing.assert_close(cap.sigma, largest.clamp(max=0.1))
    torch.testing.assert_close(Remasking.remdm(before, after, 0.1, kind="rescale").sigma, 0.1 * largest)
    conf = Remasking.remdm(before, after, kind="conf")
    torch.testing.assert_close(conf.sigma, largest)
    assert cap.shared is None and conf.shared.tolist() == [True] * 3
    torch.testing.assert_close(Remasking.remdm(before, after, 0.5, kind="conf").sigma, 0.5 * largest)
    with pytest.raises(ValueError, match="kind is 'loop', expected cap, rescale or conf"):
        Remasking.remdm(before, after, kind="loop")
    for name, wrong in (("eta", (before, after, 5)), ("eta", (before, after, -1)), ("alpha_s", (before, after + 1))):
        with pytest.raises(ValueError, match=f"{name} is .*, expected numbers from 0 to 1"):
            Remasking.remdm(*wrong)
    for wrong, message in (
        ((0.5, 0.6), "alpha_t is 0.5, expected a tensor [B]"),
        ((before[0], after), "alpha_t is [], expected a tensor [B]"),
        ((before, 0.6), "alpha_s is 0.6, expected a tensor of alpha_t's [B=3]"),
        ((before, after[:2]), "alpha_s is [2], expected a tensor of alpha_t's [B=3]"),
        ((before, after, torch.ones(2)), "eta is [2], expected a tensor of alpha_t's [B=3]"),
        ((before, after, "all"), "eta is 'all', expected a number, or a tensor of one for each row"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"Remasking: {message}")):
            Remasking.remdm(*wrong)
    eta = torch.tensor([0.1, 0.2, 1.0])
    torch.testing.assert_close(Remasking.remdm(before, after, eta).sigma, torch.minimum(eta.double(), largest))


def test_a_share_of_nan_masks_nothing() -> None:
    """Whatever position it is of; the other rows are as they are."""
    known = rows_of_many([1, 2])
    known["own"][::2, 5] = math.nan
    hold(known, dict(edit=None, verify=None, most=None, sigma=[1.0] * 24, shared=[True] * 24))


def test_positions_are_masked_as_often_as_sigma_says() -> None:
    n = 4096
    block = torch.ones(2, n, dtype=torch.int64)
    sampling = Sampling.of(2, seed=torch.arange(2), step=7)
    sigma = torch.tensor([0.1, 0.7])
    if DEVICE == "cuda":
        sampling = Sampling(*(None if t is None else on(t) for t in sampling))
    left = remask(on(block), Remasking(sigma=on(sigma)), mask_token_id=MASK, sampling=sampling).masked.cpu()
    assert ((left / n - sigma).abs() < 4 * (sigma * (1 - sigma) / n).sqrt()).all()  # four deviations


@pytest.mark.parametrize("rule,needed", [("edit", "token"), ("verify", "own"), ("sigma", "sampling")])
def test_what_a_rule_needs_is_asked_for(rule: str, needed: str) -> None:
    block = on(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"remask: {needed} is None, expected what {rule} is decided by"):
        remask(block, Remasking(**{rule: on(torch.ones(2))}), mask_token_id=MASK)


def test_nothing_changes_without_rules() -> None:
    kwargs = make(OPS["remask"], dict(B=4, L=7, V=11), torch.float32)
    got = remask(**kwargs | dict(remasking=Remasking()))
    assert torch.equal(got.block, kwargs["block"]) and not got.changed.any()
