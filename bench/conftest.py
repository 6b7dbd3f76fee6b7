"""Options and the closing table of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tools.sticky import pytest_runtest_makereport  # noqa: F401  a hook

from .measure import in_a_line, no_commit
from .peers import names
from .report import roofs_of, row_table

LINES = pytest.StashKey[list[dict[str, Any]]]()  # of the rows so far, as they are recorded
GPU_ONLY = ("compiled", "flex")  # they would run: compiled for half a minute a row, flex_attention unfused


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On a CPU: two threads wait for each other wherever another process has one's core, and seconds become minutes."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("measurements").addoption
    missing = "skip rows that bench/results/ has already, of this machine, commit and tuned launches, with these peers"
    also = "a forward row with other sizes than the card's first, recorded and not in SPEED.md; more than once"
    peers = f"whom rows are compared with: names of {', '.join(names())}; compiling takes seconds a row "
    peers += "(default: %(default)s that are installed; empty: nobody)"
    option("--record", action="store_true", help="append a JSON line for each row to bench/results/")
    option("--missing", action="store_true", help=missing)
    option("--also", action="append", default=[], metavar="OP:b=4,L=32", help=also)
    option("--peers", default="all", help=peers)


def chosen(option: str, device: str) -> list[str]:
    """The peers that --peers names. On a CPU without those that mean nothing there."""
    known = names()
    wanted = known if option == "all" else [name for name in option.split(",") if name]
    if unknown := [name for name in wanted if name not in known]:
        raise pytest.UsageError(f"--peers: nobody is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in wanted if device == "cuda" or name not in GPU_ONLY]


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("measurements disturb each other: run bench/ without -n")
    chosen(getattr(config.option, "peers", ""), "cuda")  # refuses at once whom nobody knows
    if getattr(config.option, "record", False) and (why := no_commit()):
        raise pytest.UsageError(f"--record: {why}")
    config.stash[LINES] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if lines := config.stash[LINES]:
        first = roofs_of(lines) or "CPU: references at small shapes, no claim about kernels."
        terminalreporter.section("ops", sep="=")
        for text in (in_a_line(lines[0]["machine"]), first, *row_table(lines)):
            terminalreporter.write_line(f"{text}\n")
