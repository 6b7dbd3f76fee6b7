"""One-line faults in kernels that the suite must catch: `python -m mutants` from tests/, or `make mutants`."""

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
