"""Options and the closing table of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .clock import no_commit
from .ops import Row
from .peers import names
from .rows import report

# After .ops, which brings tests/ onto the path.
from sticky import pytest_runtest_makereport  # noqa: F401  isort:skip

ROWS = pytest.StashKey[list[Row]]()
HEADING = pytest.StashKey[dict]()
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
    group = parser.getgroup("measurements")
    group.addoption("--record", action="store_true", help="append a JSON line for each row to bench/results/")
    group.addoption(
        "--missing",
        action="store_true",
        help="skip rows that bench/results/ has already, of this machine, commit and tuned launches, with these peers",
    )
    group.addoption(
        "--also",
        action="append",
        default=[],
        metavar="OP:b=4,L=32",
        help="a forward row with other sizes than the card's first, recorded and not in SPEED.md; more than once",
    )
    group.addoption(
        "--peers",
        default="all",
        help=f"whom rows are compared with: names of {', '.join(names())}; compiling takes seconds a row "
        "(default: %(default)s that are installed; empty: nobody)",
    )


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
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's, known without it")
    if hasattr(config.option, "benchmark_quiet") and not config.option.benchmark_compare:
        config.option.benchmark_quiet = True  # one table answers, ours; -v prints pytest-benchmark's too
    config.stash[ROWS], config.stash[HEADING] = [], {}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("ops", sep="=")
        terminalreporter.write_line(config.stash[HEADING]["where"] + "\n")
        if (skipped := config.stash[HEADING].get("skipped")) is not None:
            terminalreporter.write_line(
                f"CPU: references at small shapes, no claim about kernels. Not run here: {skipped}\n"
            )
        for text in report(rows, config.stash[HEADING]["roofs"]):
            terminalreporter.write_line(text)
