"""Runs one program under limits and uses it as its specification says: `python -I exercise.py`, a task on its input.

Standard library only, so that it starts in milliseconds and needs nothing of ours. `eval/execute.py` starts it. The
limits are for programs that a model got wrong, not for an attacker.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import enum
import io
import json
import os
import resource
import sqlite3
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from types import SimpleNamespace as Task
from typing import Any

# What a program of ours never does, by the names of Python's audit events.
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
)


def exercise(task: Task, code: str) -> None:
    """Execute the code, and use what it defines. Raises whatever is not as the specification says.

    task: kind, name, modifier, by, fields (each name, type, optional, rule, required, value), choices, moves; and of
    tests, `support`: the source of the class that they test.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if task.kind == "tests":
            execute(task.support, stack.enter_context(_module("models")))
        names = stack.enter_context(_module("program"))
        execute(code, names)
        _DRIVERS[task.kind](task, names)


def execute(code: str, names: dict[str, Any]) -> None:
    """The code as a module of its own: without this file's __future__."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "<program>", "exec", dont_inherit=True), names)


@contextlib.contextmanager
def _module(name: str) -> Iterator[dict[str, Any]]:
    """The names of a new module, which can be imported meanwhile."""
    before, sys.modules[name] = sys.modules.get(name), (module := types.ModuleType(name))
    try:
        yield module.__dict__
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def check(condition: bool, what: str) -> None:
    """An assertion that `python -O` keeps, with words."""
    if not condition:
        raise AssertionError(what)


def refused(error: type[BaseException], call: Any, what: str) -> None:
    """The call raises that error."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"{what}: no {error.__name__}")


# ---- values ----


def value(field: Task, number: int = 0) -> Any:
    """A value that a field may have; with another number another one, greater."""
    if field.rule is not None:
        sign, limit = field.rule
        if field.type == "str":
            return "ab"[number] * limit
        found = limit + {">": 1, ">=": 0, "<=": -1}[sign] + number
        return found + 0.0 if field.type == "float" else found
    return {
        "int": 17 + number,
        "float": 2.25 + number,
        "str": f"text {number}",
        "bool": bool(number),
        "list": [f"item{number}", "more"],
    }[field.type]


def values(task: Task, *, required: bool = False, number: int = 0) -> dict[str, Any]:
    return {f.name: value(f, number) for f in task.fields if f.required or not required}


def defaults(task: Task) -> dict[str, Any]:
    """What there is when only what is required was given."""
    return {f.name: value(f) if f.required else f.value for f in task.fields}


def has(thing: Any, wanted: dict[str, Any], what: str) -> None:
    """The attributes are these, and of these types."""
    for name, expected in wanted.items():
        found = getattr(thing, name)
        check(found == expected and type(found) is type(expected), f"{what}: {name} is {found!r}, not {expected!r}")


# ---- a driver for each kind ----


def _class(task: Task, names: dict[str, Any]) -> None:
    made = names[task.name]
    full, one = values(task), made(**values(task))
    has(one, full, "attributes")
    has(made(*full.values()), full, "in order")
    has(made(**values(task, required=True)), defaults(task), "defaults")
    check(one == made(**full) and one != made(**values(task, number=1)), "equality")
    check((one == 1) is False and one.__eq__(1) is NotImplemented, "equality with something else")
    first = task.fields[0].name
    check(repr(one) == f"{task.name}({first}={full[first]!r})", f"repr: {one!r}")
    check(one.to_dict() == full and list(one.to_dict()) == list(full), "to_dict")
    check(made.from_dict(full) == one, "from_dict")
    has(made.from_dict(values(task, required=True)), defaults(task), "from_dict with defaults")
    texts = {f.name: str(full[f.name]) for f in task.fields if f.type in ("int", "float") and not f.optional}
    has(made.from_dict({**full, **texts}), full, "from_dict of texts")
    refused(KeyError, lambda: made.from_dict({}), "from_dict of nothing")
    if task.by:
        (field,) = (f for f in task.fields if f.name == task.by)
        more = made(**{**full, task.by: value(field, 1)})
        check(one < more and not more < one and not one < made(**full), "order")
    else:
        check("__lt__" not in vars(made), "no order was asked for")


def _dataclass(task: Task, names: dict[str, Any]) -> None:
    made = names[task.name]
    check(dataclasses.is_dataclass(made), "a dataclass")
    check([f.name for f in dataclasses.fields(made)] == [f.name for f in task.fields], "its fields")
    full = values(task)
    for given in (full, values(task, number=1)):
        has(made(**given), given, "attributes")
    one = made(**values(task, required=True))
    has(one, defaults(task), "defaults")
    for field in task.fields:
        if field.value == [] and not field.required:
            check(getattr(one, field.name) is not getattr(made(**values(task, required=True)), field.name), "own lists")
        if field.rule is not None:
            sign, limit = field.rule
            bad: Any = "a" * (limit + 1) if field.type == "str" else limit + {">": 0, ">=": -1, "<=": 1}[sign]
            refused(ValueError, lambda name=field.name, bad=bad: made(**{**full, name: bad}), f"rule of {field.name}")
    name = task.fields[0].name
    if task.modifier == "frozen":
        refused(dataclasses.FrozenInstanceError, lambda: setattr(one, name, 0), "frozen")
    else:
        setattr(one, name, 0)


def _tests(task: Task, names: dict[str, Any]) -> None:
    tests = {name: test for name, test in names.items() if name.startswith("test_")}
    tail = any(not f.required for f in task.fields)
    check(set(tests) == {"test_fields", "test_round_trip", *(["test_defaults"] if tail else [])}, "which tests")

    for test in tests.values():
        test()
    tested = names[task.name]
    original, read = tested.__init__, tested.from_dict
    for field in task.fields:  # a class that gets this one wrong is caught

        def wrong(self: Any, *args: Any, name: str = field.name, **more: Any) -> None:
            original(self, *args, **more)
            setattr(self, name, object())

        tested.__init__ = wrong
        test = tests["test_fields" if field.required else "test_defaults"]
        refused(AssertionError, test, f"a wrong {field.name}")
        tested.__init__ = original
    tested.from_dict = classmethod(lambda cls, data: None)
    refused(AssertionError, tests["test_round_trip"], "a wrong from_dict")
    tested.from_dict = read


def _table(task: Task, names: dict[str, Any]) -> None:
    many = plural(task.name)
    db = sqlite3.connect(":memory:")
    names[f"create_{many}"](db)
    kinds = {"int": "INTEGER", "float": "REAL", "str": "TEXT", "bool": "BOOLEAN"}
    wanted = [("id", "INTEGER", 0)]
    wanted += [(f.name, kinds[f.type], int(not f.optional)) for f in task.fields]
    check([row[1:4] for row in db.execute(f"PRAGMA table_info({many})")] == wanted, "columns")
    given = values(task, required=True)
    columns, holes = ", ".join(given), ", ".join(f":{name}" for name in given)
    db.execute(f"INSERT INTO {many} ({columns}) VALUES ({holes})", given)
    check(db.execute(f"SELECT * FROM {many}").fetchall() == [(1, *defaults(task).values())], "defaults")
    db.execute(f"DELETE FROM {many}")
    rows = [values(task), values(task, number=1), values(task)]
    ids = [names[f"insert_{task.name}"](db, row) for row in rows]
    check(ids == [1, 2, 3], "ids")
    stored = [(i, *row.values()) for i, row in zip(ids, rows, strict=True)]
    if task.by:
        found = [names[f"find_{many}"](db, row[task.by]) for row in rows]
        check(found == [[stored[0], stored[2]], [stored[1]], [stored[0], stored[2]]], "what is found")
    else:
        check(names[f"all_{many}"](db) == stored, "what is stored")


def plural(name: str) -> str:
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _csv(task: Task, names: dict[str, Any]) -> None:
    many = plural(task.name)
    rows = [values(task), values(task, number=1)]
    cells = [{f.name: _cell(row[f.name]) for f in task.fields} for row in rows]
    cells.append({f.name: cells[0][f.name] if f.required else "" for f in task.fields})
    rows.append(defaults(task))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.csv")
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(cells)
        found = names[f"read_{many}"](path)
    check(found == rows and [list(row) for row in found] == [list(row) for row in rows], "rows")
    for row, wanted in zip(found, rows, strict=True):
        check([type(cell) for cell in row.values()] == [type(cell) for cell in wanted.values()], "types")
    if task.by:
        expected = {row[task.by]: row for row in rows}
        check(names[f"index_{many}"](rows) == expected, "index")


def _cell(cell: Any) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return " ".join(cell) if isinstance(cell, list) else str(cell)


def _command(task: Task, names: dict[str, Any]) -> None:
    main = names["main"]
    check(_printed(main, _arguments(task, values(task, number=1))) == _shown(values(task, number=1)), "all given")
    few = {f.name: False if f.type == "bool" else value(f) if f.required else f.value for f in task.fields}
    check(_printed(main, _arguments(task, values(task, required=True))) == _shown(few), "only what is required")
    full = values(task)
    for field in task.fields:
        if field.required and field.type != "bool":
            less = {name: found for name, found in full.items() if name != field.name}
            refused(SystemExit, lambda less=less: _printed(main, _arguments(task, less)), f"without {field.name}")
        if field.type in ("int", "float"):
            bad = {**full, field.name: "no number"}
            refused(SystemExit, lambda bad=bad: _printed(main, _arguments(task, bad)), f"{field.name} a text")


def _arguments(task: Task, given: dict[str, Any]) -> list[str]:
    """A command line; options with many values stand last, behind what has a place."""
    places, options = [], []
    for field in (f for f in task.fields if f.name in given):
        option, found = f"--{field.name.replace('_', '-')}", given[field.name]
        if field.type == "bool":
            options += [option] * found
        elif field.type == "list":
            options += [option, *found]
        elif field.required:
            places.append(str(found))
        else:
            options += [option, str(found)]
    return [*places, *options]


def _printed(main: Any, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue()


def _shown(given: dict[str, Any]) -> str:
    return "".join(f"{name}: {found}\n" for name, found in given.items())


def _enum(task: Task, names: dict[str, Any]) -> None:
    made = names[task.name]
    base = {"": enum.StrEnum, "int": enum.IntEnum, "flag": enum.Flag}[task.modifier]
    check(issubclass(made, base) and issubclass(made, enum.IntEnum) == (task.modifier == "int"), "its base")
    members = {
        name: {"": name.lower(), "int": i + 1, "flag": 2**i}[task.modifier] for i, name in enumerate(task.choices)
    }
    check({m.name: m.value for m in made} == members and len(made) == len(members), "members")
    for name in task.choices:
        member = made[name]
        check(made.parse(f" {name.lower()}\n") is member and made.parse(name) is member, "parse")
        if task.modifier != "flag":
            check(member.label() == name.lower().replace("_", " "), "label")
    if task.modifier == "flag":
        both = made.parse(" | ".join(task.choices[:2]))
        check(both.value == 3, "parse of two")
    refused((KeyError, ValueError), lambda: made.parse("no such"), "parse of something else")  # type: ignore[arg-type]


def _machine(task: Task, names: dict[str, Any]) -> None:
    made = names[task.name]
    check(made().state == task.moves[0][1], "the first state")
    moves = {(a, event): b for event, a, b in task.moves}
    states, events = {s for _, a, b in task.moves for s in (a, b)}, {event for event, _, _ in task.moves}
    for state in states:
        for event in events:
            for call in (lambda it, event=event: it.fire(event), lambda it, event=event: getattr(it, event)()):
                one = made()
                one.state = state
                if (state, event) in moves:
                    check(call(one) == moves[state, event] == one.state, f"{event} from {state}")
                else:
                    refused(ValueError, lambda call=call, one=one: call(one), f"{event} from {state}")
    refused(ValueError, lambda: made().fire("no such"), "another event")


_DRIVERS = {
    "class": _class,
    "dataclass": _dataclass,
    "tests": _tests,
    "table": _table,
    "csv": _csv,
    "command": _command,
    "enum": _enum,
    "machine": _machine,
}


# ---- as a process ----


def limit(seconds: int, megabytes: int, folder: str) -> None:
    """No more time, memory and disk than this; no other process, no network, nothing written outside the folder."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems have no limit of memory
            resource.setrlimit(kind, (most, most))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused")
        if event == "open" and isinstance(args[2], int) and args[2] & writing and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path != os.devnull and not path.startswith(folder + os.sep):
                raise PermissionError(f"{path} is outside the folder")

    sys.addaudithook(hook)


def main() -> None:
    """Read a task, write one line: its secret, and what went wrong or nothing."""
    given = json.load(sys.stdin)
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.environ["TMPDIR"] = tempfile.tempdir = folder = os.path.realpath(os.getcwd())
    limit(given["seconds"], given["megabytes"], folder)
    wrong = ""
    try:
        exercise(json.loads(json.dumps(given["task"]), object_hook=lambda found: Task(**found)), given["code"])
    except BaseException as error:  # SystemExit, MemoryError and RecursionError too: all are the program's
        wrong = f"{type(error).__name__}: {error}"[:300]
    os.write(answer, f"{given['secret']}{wrong}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
