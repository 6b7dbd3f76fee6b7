"""The program of a specification: a function of its header alone. Formatted as Ruff and Black leave it.

What is long is always written an item a line, never by its width: a line's form depends on its own item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .grammar import Field, Specification, parse
from .words import plural

HINTS = {"int": "int", "float": "float", "str": "str", "bool": "bool", "list": "list[str]"}
SQL = {"int": "INTEGER", "float": "REAL", "str": "TEXT", "bool": "BOOLEAN"}


def program(header: str) -> str:
    """The whole program that a header specifies, without it; ends with a line end. ValueError for another text."""
    spec = parse(header)
    return _PROGRAMS[spec.kind](spec).strip("\n") + "\n"


def sample(field: Field) -> str:
    """A value for a field, in tests."""
    return {"int": "1", "float": "1.5", "str": f'"{field.name}"', "bool": "True", "list": f'["{field.name}"]'}[
        field.type
    ]


def _lines(lines: Iterable[str], indent: int) -> str:
    """Lines for a place in a template: one a line, the first one's indentation being the template's."""
    return ("\n" + " " * indent).join(lines)


def _hint(field: Field) -> str:
    return HINTS[field.type] + " | None" * field.optional


def _default(field: Field) -> str:
    return "" if field.required else f" = {'None' if field.optional else field.default}"


def _class(spec: Specification) -> str:
    name, first = spec.name, spec.fields[0].name
    text = f'''
class {name}:
    def __init__(
        self,
        {_lines((f"{f.name}: {_hint(f)}{_default(f)}," for f in spec.fields), 8)}
    ) -> None:
        {_lines((f"self.{f.name} = {f.name}" for f in spec.fields), 8)}

    def __repr__(self) -> str:
        return f"{name}({first}={{self.{first}!r}})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, {name}):
            return NotImplemented
        return self.to_dict() == other.to_dict()
'''
    if spec.by:
        text += f'''
    def __lt__(self, other: "{name}") -> bool:
        return self.{spec.by} < other.{spec.by}
'''
    return f'''{text}
    def to_dict(self) -> dict:
        return {{
            {_lines((f'"{f.name}": self.{f.name},' for f in spec.fields), 12)}
        }}

    @classmethod
    def from_dict(cls, data: dict) -> "{name}":
        return cls(
            {_lines((f"{f.name}={_from_dict(f)}," for f in spec.fields), 12)}
        )
'''


def _from_dict(field: Field) -> str:
    if field.optional:
        return f'data.get("{field.name}")'
    found = f'data["{field.name}"]' if field.required else f'data.get("{field.name}", {field.default})'
    return f"{field.type}({found})"


def _dataclass(spec: Specification) -> str:
    lists = any(field.default == "[]" for field in spec.fields)
    text = f"""
from dataclasses import dataclass{", field" * lists}


@dataclass{"(frozen=True)" * bool(spec.modifier)}
class {spec.name}:
    {_lines(map(_attribute, spec.fields), 4)}
"""
    rules = [f for f in spec.fields if f.rule is not None]
    if rules:
        text += f"""
    def __post_init__(self) -> None:
        {_lines((line for f in rules for line in _check(f)), 8)}
"""
    return text


def _attribute(field: Field) -> str:
    default = " = field(default_factory=list)" if field.default == "[]" else _default(field)
    return f"{field.name}: {_hint(field)}{default}"


def _check(field: Field) -> tuple[str, str]:
    assert field.rule is not None
    sign, limit = field.rule
    broken = {">": "<=", ">=": "<", "<=": ">"}[sign]
    if field.type == "str":
        condition, message = f"len(self.{field.name}) {broken} {limit}", f"{field.name} is longer than {limit}"
    else:
        condition, message = f"self.{field.name} {broken} {limit}", f"{field.name} must be {sign} {limit}"
    return f"if {condition}:", f'    raise ValueError("{message}")'


def _tests(spec: Specification) -> str:
    name = spec.name
    text = f"""
from models import {name}


def make() -> {name}:
    return {name}(
        {_lines((f"{f.name}={sample(f)}," for f in spec.required), 8)}
    )


def test_fields() -> None:
    made = make()
    {_lines((f"assert made.{f.name} {_equals(f, sample(f))}" for f in spec.required), 4)}
"""
    if spec.tail:
        text += f"""

def test_defaults() -> None:
    made = make()
    {_lines((f"assert made.{f.name} {_equals(f, f.default or 'None')}" for f in spec.tail), 4)}
"""
    return f"""{text}

def test_round_trip() -> None:
    made = make()
    assert {name}.from_dict(made.to_dict()) == made
"""


def _equals(field: Field, value: str) -> str:
    return f"{'is' if field.type == 'bool' or field.optional else '=='} {value}"


def _table(spec: Specification) -> str:
    table = plural(spec.name)
    names = [f.name for f in spec.fields]
    text = f'''
import sqlite3

CREATE = """
CREATE TABLE {table} (
    id INTEGER PRIMARY KEY,
    {_lines([f"{column}," for column in map(_column, spec.fields[:-1])] + [_column(spec.fields[-1])], 4)}
)
"""

INSERT = """
INSERT INTO {table} ({", ".join(names)})
VALUES ({", ".join(f":{name}" for name in names)})
"""


def create_{table}(db: sqlite3.Connection) -> None:
    db.execute(CREATE)


def insert_{spec.name}(db: sqlite3.Connection, row: dict) -> int:
    return db.execute(INSERT, row).lastrowid
'''
    if spec.by:
        (field,) = (f for f in spec.fields if f.name == spec.by)
        return f"""{text}

def find_{table}(db: sqlite3.Connection, {field.name}: {HINTS[field.type]}) -> list:
    query = "SELECT * FROM {table} WHERE {field.name} = ?"
    return db.execute(query, ({field.name},)).fetchall()
"""
    return f"""{text}

def all_{table}(db: sqlite3.Connection) -> list:
    return db.execute("SELECT * FROM {table}").fetchall()
"""


def _column(field: Field) -> str:
    text = f"{field.name} {SQL[field.type]}{'' if field.optional else ' NOT NULL'}"
    if field.default is None:
        return text
    value = field.default.upper() if field.type == "bool" else field.default.replace('"', "'")
    return f"{text} DEFAULT {value}"


def _csv(spec: Specification) -> str:
    name, many = spec.name, plural(spec.name)
    text = f"""
import csv


def parse_{name}(row: dict[str, str]) -> dict:
    return {{
        {_lines((f'"{f.name}": {_from_text(f)},' for f in spec.fields), 8)}
    }}


def read_{many}(path: str) -> list[dict]:
    with open(path, newline="") as file:
        return [parse_{name}(row) for row in csv.DictReader(file)]
"""
    if spec.by:
        text += f"""

def index_{many}(rows: list[dict]) -> dict:
    return {{row["{spec.by}"]: row for row in rows}}
"""
    return text


def _from_text(field: Field) -> str:
    cell = f'row["{field.name}"]'
    filled = cell if field.required else f"{cell} or {'None' if field.optional else field.default}"
    if field.type in ("int", "float"):
        return f"{field.type}({filled})"
    return {"str": filled, "bool": f'{cell} == "yes"', "list": f"{cell}.split()"}[field.type]


def _command(spec: Specification) -> str:
    return f"""
import argparse


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="{spec.name}")
    {_lines((f"parser.add_argument({_argument(f)})" for f in spec.fields), 4)}
    args = parser.parse_args(argv)
    {_lines((f'print("{f.name}:", args.{f.name})' for f in spec.fields), 4)}


if __name__ == "__main__":
    main()
"""


def _argument(field: Field) -> str:
    option = f'"--{field.name.replace("_", "-")}"'
    if field.type == "bool":
        return f'{option}, action="store_true"'
    if field.type == "list":
        return f'{option}, nargs="*"' if field.optional else f'{option}, nargs="+", required=True'
    kind = "" if field.type == "str" else f", type={field.type}"
    if field.required:
        return f'"{field.name}"{kind}'
    return f"{option}{kind}" + ("" if field.optional else f", default={field.default}")


def _enum(spec: Specification) -> str:
    name = spec.name
    base = {"": "StrEnum", "int": "IntEnum", "flag": "Flag"}[spec.modifier]
    values = {"": lambda i: "auto()", "int": lambda i: str(i + 1), "flag": lambda i: str(2**i)}
    members = (f"{choice} = {values[spec.modifier](i)}" for i, choice in enumerate(spec.choices))
    return f"""
from enum import {base}{"" if spec.modifier else ", auto"}


class {name}({base}):
    {_lines(members, 4)}

    @classmethod
    def parse(cls, text: str) -> "{name}":
{_PARSE[spec.modifier]}
"""


_PARSE = {
    "": """\
        return cls(text.strip().lower())

    def label(self) -> str:
        return self.value.replace("_", " ")""",
    "int": """\
        return cls[text.strip().upper()]

    def label(self) -> str:
        return self.name.lower().replace("_", " ")""",
    "flag": """\
        value = cls(0)
        for name in text.split("|"):
            value |= cls[name.strip().upper()]
        return value""",
}


def _machine(spec: Specification) -> str:
    methods = "".join(
        f'''
    def {event}(self) -> str:
        return self.fire("{event}")
'''
        for event, _, _ in spec.moves
    )
    return f'''
class {spec.name}:
    TRANSITIONS = {{
        {_lines((f'("{a}", "{event}"): "{b}",' for event, a, b in spec.moves), 8)}
    }}

    def __init__(self) -> None:
        self.state = "{spec.moves[0][1]}"

    def fire(self, event: str) -> str:
        if (self.state, event) not in self.TRANSITIONS:
            raise ValueError(f"no {{event}} when {{self.state}}")
        self.state = self.TRANSITIONS[self.state, event]
        return self.state
{methods}'''


_PROGRAMS: dict[str, Callable[[Specification], str]] = {
    "class": _class,
    "dataclass": _dataclass,
    "tests": _tests,
    "table": _table,
    "csv": _csv,
    "command": _command,
    "enum": _enum,
    "machine": _machine,
}
