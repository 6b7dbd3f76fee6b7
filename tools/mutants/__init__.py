"""One-line faults in kernels that the suite must catch: `python -m tools.mutants`, or `make mutants`.

Each file has MUTANTS: whose tests must fail and the file under tt_kernels/ -> (fault, what the file has once, what the
fault makes of it). A third part of the key is the test that must fail, where it is not made from the op's card."""

import importlib
import pkgutil
from typing import NamedTuple


class Mutant(NamedTuple):
    op: str  # words of pytest's -k
    file: str
    fault: str
    old: str
    new: str
    test: str  # under tests/kernels/; empty: those of the op
    sanitize: bool  # only ttsem sees it for certain: run as `make sanitize` does


def of_area(area: str) -> list[Mutant]:
    listed = importlib.import_module(f"{__name__}.{area}").MUTANTS
    return [
        Mutant(op, f"tt_kernels/{file}", *change, "".join(test), area == "sanitize")
        for (op, file, *test), changes in listed.items()
        for change in changes
    ]


def all_mutants() -> dict[str, list[Mutant]]:
    """By area: the file of this folder that lists them."""
    return {m.name: of_area(m.name) for m in pkgutil.iter_modules(__path__) if m.name != "__main__"}
