"""Boilerplate from a specification: a comment line, as `# class Invoice: number int, paid bool`, and its Python.

`specification` draws a header, `program` is the one right answer to it: a task that a small model can do and that can
be checked, by comparing and by running. `python -m tt_model.training.boilerplate --out DIR` writes a corpus.
"""

from .grammar import KINDS, Field, Specification, parse
from .programs import program
from .sampling import SPLITS, specification, split_of

__all__ = ["KINDS", "SPLITS", "Field", "Specification", "parse", "program", "specification", "split_of"]
