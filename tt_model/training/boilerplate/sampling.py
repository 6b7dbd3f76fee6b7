"""Specifications by chance, and the sides that keep what training sees apart from what a model is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from .grammar import CAMEL, KINDS, MAY, TYPED, Field, Specification, keeps, parse, sortable
from .words import MADE_UP, Names, camel, has_unseen, is_held, share, snake

# "train": what training sees. Its words, its pairs of words and its orders of types occur in "headers" too, whose
# headers it does not see; the others have what training never has, and a header that has several goes to the first of
# "words" (names with a word that no training header has), "pairs" (names of two words that it never has together) and
# "orders" (fields whose types, three or more, never stand in that order).
SPLITS = ("train", "headers", "words", "pairs", "orders")


def split_of(header: str) -> str:
    """The one side that a header is on, which depends on nothing else: sides share none. ValueError as `parse`."""
    spec = parse(header)
    names = names_of(spec)
    if any(map(has_unseen, names)):
        return "words"
    if any(map(is_held, names)):
        return "pairs"
    types = [field.type for field in spec.fields]
    if len(types) > 2 and share(f"order {' '.join(types)}") < 0.12:
        return "orders"
    return "headers" if share(f"header {header}") < 0.05 else "train"


def names_of(spec: Specification) -> list[str]:
    """All names of a specification, and its texts, in lower case."""
    names = [snake(spec.name), *map(str.lower, spec.choices), *(name for move in spec.moves for name in move)]
    names += [field.name for field in spec.fields]
    return names + [field.value for field in spec.fields if field.type == "str" and field.default is not None]


def specification(
    rng: random.Random, split: str = "train", kind: str | None = None, *, made_up: float = MADE_UP
) -> str:
    """A header of that side, and of that kind (None: any, all as often), by chance. ValueError for an unknown one.

    made_up: the share of words that are (0 to 1).
    """
    if split not in SPLITS or kind not in (None, *KINDS):
        raise ValueError(f"split is {split!r}, kind is {kind!r}: expected one of {SPLITS} and one of {KINDS} or None")
    if split == "orders" and kind is not None and kind not in TYPED:
        raise ValueError(f"kind is {kind!r}, which has no types: the split 'orders' has none")
    kind = kind or rng.choice(TYPED if split == "orders" else KINDS)
    while True:
        header = str(_draw(rng, kind, Names(rng, split, made_up)))
        if split_of(header) == split:
            return header


def _draw(rng: random.Random, kind: str, names: Names) -> Specification:
    name = names.action() if kind == "command" else names.noun()
    name = camel(name) if kind in CAMEL else name
    if kind == "enum":
        choices = tuple(names.quality().upper() for _ in range(rng.randint(2, 6)))
        return Specification(kind, name, rng.choice(("", "", "int", "flag")), choices=choices)
    if kind == "machine":
        return Specification(kind, name, moves=_moves(rng, names))
    fields = _fields(rng, kind, names)
    modifier = "frozen" if kind == "dataclass" and rng.random() < 0.3 else ""
    may = sortable(kind, fields)
    by = rng.choice(may) if may and rng.random() < 0.5 else ""
    return Specification(kind, name, modifier, by, fields)


def _moves(rng: random.Random, names: Names) -> tuple[tuple[str, str, str], ...]:
    """Two to four events, each of which leads from one state to another; every state but the first is led to."""
    states = [names.quality() for _ in range(rng.randint(2, 4))]
    moves = [(names.verb(), a, b) for a, b in pairwise(states)]
    while len(moves) < 2 or (len(moves) < 4 and rng.random() < 0.4):
        a, b = rng.sample(states, 2)
        moves.append((names.verb(), a, b))
    return tuple(moves)


def _fields(rng: random.Random, kind: str, names: Names) -> tuple[Field, ...]:
    """Fields, at least one of which must be given."""
    types, optional, default = MAY[kind]
    count = rng.randint(2, 4 if kind in ("table", "tests") else 5)
    less = rng.sample(range(1, count), min(rng.choice((0, 0, 1, 1, 2)), count - 1))
    fields = []
    for i in range(count):
        field = Field(names.noun(), rng.choice(types))
        if kind == "dataclass" and field.type in ("int", "float", "str") and rng.random() < 0.4:
            field = _with_rule(rng, field)
        if i in less:
            field = _not_required(rng, field, optional, default, names)
        fields.append(field)
    return tuple(sorted(fields, key=lambda field: kind in CAMEL and not field.required))


def _with_rule(rng: random.Random, field: Field) -> Field:
    if field.type == "str":
        return Field(field.name, field.type, rule=("<=", 4 * rng.randint(4, 10)))
    return Field(field.name, field.type, rule=(rng.choice((">", ">=", "<=")), rng.randint(0, 9)))


def _not_required(
    rng: random.Random, field: Field, optional: tuple[str, ...], default: tuple[str, ...], names: Names
) -> Field:
    """The same, optional or with a default, if its type may be that; one with a rule gets a default that keeps it."""
    may = [field.type in optional and field.rule is None, field.type in default]
    if not any(may):
        return field
    if may[0] and (not may[1] or rng.random() < 0.5):
        return Field(field.name, field.type, optional=True)
    make: dict[str, Callable[[], str]] = {
        "int": lambda: str(rng.randint(0, 99)),
        "float": lambda: f"{rng.randint(0, 9)}.{rng.randint(0, 9)}",
        "str": lambda: f'"{names.quality()}"',
        "bool": lambda: rng.choice(("True", "False")),
        "list": lambda: "[]",
    }
    while True:
        found = Field(field.name, field.type, rule=field.rule, default=make[field.type]())
        if keeps(found, found.value):
            return found
