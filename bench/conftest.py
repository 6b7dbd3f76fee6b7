"""Options and the closing table of `pytest bench/`."""

from __future__ import annotations

import pytest

from .ops import Row, report

ROWS = pytest.StashKey[list[Row]]()
HEADING = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("measurements")
    group.addoption("--record", action="store_true", help="append a JSON line for each row to bench/results/")
    group.addoption(
        "--peers",
        default="eager,compiled",
        help="what rows of a GPU are compared with, of eager and compiled; compiling takes seconds a row "
        "(default: %(default)s; empty: nothing)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("measurements disturb each other: run bench/ without -n")
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's, known without it")
    config.stash[ROWS], config.stash[HEADING] = [], {}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("ops", sep="=")
        terminalreporter.write_line(config.stash[HEADING]["where"] + "\n")
        for text in report(rows, config.stash[HEADING]["roofs"]):
            terminalreporter.write_line(text)
