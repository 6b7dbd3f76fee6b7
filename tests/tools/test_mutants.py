"""The lists of planted faults: each still applies, and every op with kernels has its share."""

from collections import Counter

import pytest
from _pytest.mark.expression import Expression

from cards import OPS
from tools.mutants import all_mutants
from tools.mutants.__main__ import ROOT, mutated

MUTANTS = [mutant for listed in all_mutants().values() for mutant in listed]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.op}-{mutant.fault}")
def test_it_applies(mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert mutated(source, mutant) != source


def test_all_differ() -> None:
    assert max(Counter((m.file, m.old, m.new) for m in MUTANTS).values()) == 1


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kernels])
def test_every_op_has_five(name: str) -> None:
    chosen = [m for m in MUTANTS if Expression.compile(m.op).evaluate(lambda word: word in name)]
    assert len(chosen) >= 5, [m.fault for m in chosen]
