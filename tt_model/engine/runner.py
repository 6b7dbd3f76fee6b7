"""Makes passes: as replays of CUDA graphs on a GPU, as calls elsewhere.

A graph is captured where its pass is first wanted, and for batches and rooms of a few sizes only: idle rows fill up a
batch, pages are counted up to a power of two. So contexts grow, and rows come and go, without capturing anew.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modeling.moe import MoE
from .passes import Outcome, Pass, Passes

MOST = 256  # graphs that are kept, the ones used last; all work in the same memory
LEAST_FREE = 1 << 30  # bytes of a device below which passes are no longer captured
_log = logging.getLogger(__name__)


def batch_for(rows: int) -> int:
    """The size of a batch that has a graph: 1 to 4, then by 2 to 16, by 4 to 32, by 8 to 64, by 16 from there on."""
    step = next((step for most, step in ((4, 1), (16, 2), (32, 4), (64, 8)) if rows <= most), 16)
    return -(-rows // step) * step


def idle_rows(rows: int) -> int:
    """Rows that are idle at most in a batch of up to so many."""
    return max(1, *(batch_for(n) - n for n in range(1, min(rows, 129) + 1)))  # from there on as from 113 to 128


class Captured(NamedTuple):
    """A graph, the rows that it reads, and what it writes."""

    graph: Any
    rows: Tensor  # [B] int64
    outcome: Outcome


class Runner:
    """Makes the passes of a board.

    Args:
        graphs: whether passes are captured; None: on a GPU.
        fill: whether rows and pages are filled up to the sizes of graphs; None: where there are graphs.
    """

    def __init__(self, passes: Passes, *, graphs: bool | None = None, fill: bool | None = None):
        self.passes = passes
        self.graphs = passes.board.device.type == "cuda" if graphs is None else graphs
        self.fill = self.graphs if fill is None else fill
        self.captured: OrderedDict[tuple[Pass, int], Captured] = OrderedDict()
        self.refused: set[tuple[Pass, int]] = set()  # that could not be captured, and are called
        self._memory: dict[torch.device, Any] = {}  # that all graphs of a device share
        self._experts = [module for module in passes.model.modules() if isinstance(module, MoE)]

    def __call__(self, what: Pass, rows: Sequence[int]) -> Outcome:
        """Make a pass over rows of the board. What it tells is overwritten by the next pass that is like it."""
        board, listed = self.passes.board, list(rows)
        # Whoever counts what experts get sets a counter for a while, which graphs would know nothing of.
        counted = any(moe.load is not None for moe in self._experts)
        graphs = self.graphs and not counted and not self._is_across(what)
        if self.fill and graphs == self.graphs:
            what = self._filled(what)
            listed += board.idle[: batch_for(len(listed)) - len(listed)]
        index, device = torch.tensor(listed), self.passes.device(what)
        found = self._find(what, len(listed)) if graphs else None
        if found is None:
            return self.passes(what, index.to(device))
        found.rows.copy_(index.pin_memory() if device.type == "cuda" else index, non_blocking=True)
        found.graph.replay()
        return found.outcome

    def _is_across(self, what: Pass) -> bool:
        """Whether it needs two devices: a graph is of one."""
        return what.kind == "mock_ar" and self.passes.is_apart

    def prepare(self, what: Pass, most: int, *, progress: bool = True) -> None:
        """Capture a pass for all batches of up to so many rows, so that nobody waits for it later. Where passes are not
        captured it does nothing."""
        if not self.graphs or self._is_across(what):
            return
        from rich.console import Console
        from rich.progress import track

        sizes = sorted({batch_for(n) for n in range(1, most + 1)})
        for size in track(sizes, f"capturing {what.kind}", console=Console(stderr=True), disable=not progress):
            self._find(self._filled(what), size)

    def _filled(self, what: Pass) -> Pass:
        """With as many pages as graphs have."""
        return what._replace(pages=min(1 << (what.pages - 1).bit_length(), self.passes.board.page_table.shape[1]))

    def _find(self, what: Pass, size: int) -> Captured | None:
        key = what, size
        if key in self.captured:
            self.captured.move_to_end(key)
            return self.captured[key]
        if key in self.refused:
            return None
        named = f"a pass of kind {what.kind} for {size} rows of {what.pages} pages"
        if self._free(self.passes.device(what)) < LEAST_FREE:
            _log.warning("little memory is left: %s is not captured, and takes longer", named)
            self.refused.add(key)
            return None
        _log.info("capturing %s", named)
        while len(self.captured) >= MOST:
            self.captured.popitem(last=False)
        try:
            found = self.captured[key] = self._capture(what, size)
        except RuntimeError as error:
            _log.warning("%s could not be captured, and takes longer: %s", named, error)
            self.refused.add(key)
            return None
        return found

    def _free(self, device: torch.device) -> int:
        """Bytes of a device, those that torch has and does not use included."""
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    def _capture(self, what: Pass, size: int) -> Captured:
        """Two passes over idle rows, which compile kernels and change nothing else, then the one that is kept."""
        idle, device = self.passes.board.idle, self.passes.device(what)
        rows = torch.tensor([idle[i % len(idle)] for i in range(size)], device=device)
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self.passes(what, rows)
            here.wait_stream(aside)
            if device not in self._memory:
                self._memory[device] = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory[device], stream=aside, capture_error_mode="thread_local"):
                outcome = self.passes(what, rows)
        return Captured(graph, rows, outcome)
