"""One-line faults in kernels that the suite must catch: `python -m tools.mutants`, or `make mutants`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    op: str  # whose tests must fail
    file: str
    old: str  # occurs once in the file
    new: str
    fault: str  # in words
    test: str = ""  # the one that must fail, where it is not made from the op's card: FILE::NAME
    sanitize: bool = False  # only ttsem sees it for certain: run as `make sanitize` does


def faults(op: str, file: str, *listed: tuple[str, str, str], sanitize: bool = False, test: str = "") -> list[Mutant]:
    """Mutants of one file for one op's tests: (fault, old, new) each."""
    return [Mutant(op, file, old, new, fault, test, sanitize) for fault, old, new in listed]
