"""What a specification says, and the one comment line that says it, as `# class Invoice: number int, paid bool`.

    # KIND NAME [MODIFIER]: ITEM, ITEM, ...

- class, dataclass, tests, table, csv, command: an item is a field, `NAME TYPE`, TYPE being int, float, str, bool or
  list (of str); then `?` where it may be missing, or, of a dataclass, a rule (`> 0`; of a str, `<= 20` letters), and a
  default (`= 3`). One must be given; where fields become parameters (class, dataclass, tests) such fields stand first.
- enum: an item is a member, `DARK_RED`. The modifier `int` numbers them, `flag` gives each a bit.
- machine: an item is `EVENT STATE -> STATE`.
- The modifier `by FIELD` (class, table, csv) sorts, finds or indexes by a field; a dataclass may be `frozen`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

TYPES = ("int", "float", "str", "bool", "list")
TYPED = ("class", "dataclass", "tests", "table", "csv", "command")  # kinds whose items are fields
KINDS = (*TYPED, "enum", "machine")
# Of a kind: its types, and those that may be optional (`?`) or have a default.
MAY: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "class": (TYPES, TYPES, TYPES[:-1]),
    "dataclass": (TYPES, TYPES[:-1], TYPES),
    "tests": (TYPES, TYPES, TYPES[:-1]),
    "table": (TYPES[:-1], TYPES[:-1], TYPES[:-1]),
    "csv": (TYPES, ("str",), ("int", "float", "str")),
    "command": (TYPES, ("int", "float", "str", "list"), ("int", "float", "str")),
}
MODIFIERS = {"enum": ("int", "flag"), "dataclass": ("frozen",)}
CAMEL = ("class", "dataclass", "tests", "enum", "machine")  # kinds whose names are classes

_HEADER = re.compile(r"# (\w+) (\w+)(?: (int|flag|frozen)| by (\w+))?: (.+)")
_FIELD = re.compile(
    r'([a-z_]+) (int|float|str|bool|list)(\?)?(?: (>|>=|<=) (\d+))?(?: = (\d+|\d+\.\d|True|False|"[a-z_]+"|\[\]))?'
)
_MOVE = re.compile(r"([a-z_]+) ([a-z_]+) -> ([a-z_]+)")
_MEMBER = re.compile(r"([A-Z_]+)")


@dataclass(frozen=True)
class Field:
    """A field of a specification."""

    name: str
    type: str
    optional: bool = False
    rule: tuple[str, int] | None = None  # ("<=", 20)
    default: str | None = None  # as Python writes it

    @property
    def required(self) -> bool:
        return not self.optional and self.default is None

    @property
    def value(self) -> Any:
        """What it has where nothing is given: None for an optional one."""
        return None if self.default is None else ast.literal_eval(self.default)

    def __str__(self) -> str:
        rule = "" if self.rule is None else f" {self.rule[0]} {self.rule[1]}"
        default = "" if self.default is None else f" = {self.default}"
        return f"{self.name} {self.type}{'?' * self.optional}{rule}{default}"


@dataclass(frozen=True)
class Specification:
    """What a header says; `str()` of it is the header."""

    kind: str
    name: str
    modifier: str = ""  # "int" or "flag" of an enum, "frozen" of a dataclass
    by: str = ""
    fields: tuple[Field, ...] = ()
    choices: tuple[str, ...] = ()  # of an enum
    moves: tuple[tuple[str, str, str], ...] = ()  # of a machine: event, from, to

    def __str__(self) -> str:
        items = [*map(str, self.fields), *self.choices, *(f"{event} {a} -> {b}" for event, a, b in self.moves)]
        modifier = f" {self.modifier}" if self.modifier else f" by {self.by}" if self.by else ""
        return f"# {self.kind} {self.name}{modifier}: {', '.join(items)}"

    @property
    def required(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.required)

    @property
    def tail(self) -> tuple[Field, ...]:
        """The fields that need not be given."""
        return tuple(field for field in self.fields if not field.required)


def parse(header: str) -> Specification:
    """What a header says. ValueError for any other text."""
    match = _HEADER.fullmatch(header)
    if match is None or match[1] not in KINDS:
        raise ValueError(f"{header!r:.80} is no specification: expected `# KIND NAME: ITEM, ITEM`, KIND one of {KINDS}")
    kind, name, modifier, by, rest = match.groups()
    items = rest.split(", ")
    try:
        if kind in TYPED:
            found = Specification(kind, name, modifier or "", by or "", fields=tuple(map(_field, items)))
        elif kind == "enum":
            found = Specification(kind, name, modifier or "", choices=tuple(_whole(_MEMBER, item)[1] for item in items))
        else:
            moves = tuple((m[1], m[2], m[3]) for m in (_whole(_MOVE, item) for item in items))
            found = Specification(kind, name, moves=moves)
    except ValueError as error:
        raise ValueError(f"{header!r:.80} is no specification: {error}") from None
    if str(found) != header:  # something is there that this kind has no place for
        raise ValueError(f"{header!r:.80} is no specification: it would be {str(found)!r}")
    if wrong := _wrong(found):
        raise ValueError(f"{header!r:.80} is no specification: {wrong}")
    return found


def _wrong(spec: Specification) -> str:
    """What a kind cannot have, or nothing."""
    names = [field.name for field in spec.fields] or spec.choices or [event for event, _, _ in spec.moves]
    if len(set(names)) < len(names):
        return "a name comes twice"
    if (spec.kind in CAMEL) != spec.name[0].isupper() or (spec.kind in CAMEL and "_" in spec.name):
        return f"{spec.name} should be {'a CamelCase' if spec.kind in CAMEL else 'a snake_case'} name"
    if spec.modifier and spec.modifier not in MODIFIERS.get(spec.kind, ()):
        return f"no {spec.kind} is {spec.modifier}"
    if spec.by and spec.by not in sortable(spec.kind, spec.fields):
        return f"{spec.by} is not a field to sort or find by"
    if not spec.fields:
        return ""
    types, optional, default = MAY[spec.kind]
    for field in spec.fields:
        literal = {"int": int, "float": float, "str": str, "bool": bool, "list": list}[field.type]
        if field.type not in types or (field.optional and field.type not in optional):
            return f"a {spec.kind} cannot have `{field}`"
        if field.default is not None and (field.optional or field.type not in default):
            return f"a {spec.kind} cannot have `{field}`"
        if field.default is not None and type(field.value) is not literal:
            return f"the default of `{field}` is no {field.type}"
        if field.rule and (spec.kind != "dataclass" or field.optional or not keeps(field, field.value)):
            return f"`{field}` has no place for its rule"
        if field.rule and (field.type in ("bool", "list") or (field.type == "str" and field.rule[0] != "<=")):
            return f"`{field}` has no place for its rule"
    order = [field.required for field in spec.fields]
    if not any(order) or (spec.kind in CAMEL and order != sorted(order, reverse=True)):
        return "what must be given stands first"
    return ""


def sortable(kind: str, fields: tuple[Field, ...]) -> list[str]:
    """The fields that `by` may name."""
    if kind not in ("class", "table", "csv"):
        return []
    return [field.name for field in fields if field.required and field.type in ("int", "float", "str")]


def keeps(field: Field, value: Any) -> bool:
    """Whether a value keeps the field's rule; None is no value."""
    if field.rule is None or value is None:
        return True
    sign, limit = field.rule
    number = len(value) if isinstance(value, str | list) else value
    return {">": number > limit, ">=": number >= limit, "<=": number <= limit}[sign]


def _whole(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    if (match := pattern.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is no item")
    return match


def _field(item: str) -> Field:
    name, kind, optional, sign, limit, default = _whole(_FIELD, item).groups()
    return Field(name, kind, optional is not None, (sign, int(limit)) if sign else None, default)
