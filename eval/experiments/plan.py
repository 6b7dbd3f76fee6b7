"""What is trained: denoisers of one context tower that differ from a baseline in one thing each."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_model.cli import make_parser

BLOCKS = ("threshold", "block", "towers", "experts", "options")  # parts of the page
DEFAULT = 0.8  # threshold

# The published recipe, but for what makes the most of minutes: orthogonal updates, and no loss for what nothing tells.
DENOISER = {
    "steps": 500, "batch-size": 4, "row-length": 512, "block-size": 16, "learning-rate": 3e-3,
    "final-learning-rate": 1e-5, "warmup": 50, "decay": 0.5, "optimizer": "muon", "skip-first-lines": True,
    "save-every": 250, "held-out": 0.005,
}  # fmt: skip
START = "ar"  # the run that all others begin with: the context tower of the model that is given


@dataclass(frozen=True)
class Run:
    """A training run, and in which parts of the page it stands."""

    name: str
    about: str
    blocks: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of `twotower train denoiser`, beside the baseline's
    start: str = START  # the run whose model it goes on from


@dataclass(frozen=True)
class Pilot:
    """Sizes of everything, so that a test can have smaller ones."""

    documents: int = 20000
    denoiser: dict[str, Any] = field(default_factory=lambda: DENOISER)  # options of `twotower train denoiser`
    thresholds: tuple[float, ...] = (DEFAULT, 0.95)
    specifications: int = 96
    new_tokens: int = 448
    # How eval.quality measures the model of "threshold".
    of_model: str = "--rules static=1 static=2 static=4 static=8 static=16"
    sampled: tuple[int, ...] = (8, 16, 32, 64)  # block sizes that every model of "block" writes with

    def runs(self) -> list[Run]:
        """In the order in which they are made: what the others are compared with first."""
        steps, rate = self.denoiser["steps"], self.denoiser["learning-rate"]
        towers, options = ("towers",), ("options",)
        half = {"steps": steps // 2}
        return [
            Run("base", "the baseline, block 16", ("block", "towers", "options")),
            Run("seed", "the same, another seed", ("towers", "options"), {"seed": 1}),
            Run("block-8", "block 8", ("block",), {"block-size": 8}),
            Run("block-32", "block 32", ("block",), {"block-size": 32}),
            Run("no-time", "without time conditioning", towers, {"no-time": True}),
            Run("trained", "context tower trained, too", towers, {"context-tower": "trained"}),
            Run("tied", "towers tied", towers, {"context-tower": "tied"}),
            Run("draws", "2 draws of noise a step", options, {"draws": 2}),
            Run("split-blocks", "blocks split into 1, 2, 4 and 8 in turn", options, {"split-blocks": 8}),
            Run("full-blocks", "a quarter of the blocks masked as a whole", options, {"full-blocks": 0.25}),
            Run("tail-blocks", "half of the blocks masked from a token on", options, {"tail-blocks": 0.5}),
            Run("near", "near masks learned more often", options, {"near": 3.0}),
            Run("own-blocks", "half of the blocks with own predictions", options, {"own-blocks": 0.5}),
            Run("distil", "half of the loss from the context tower", options, {"distil": 0.5}),
            Run("average", "average of the weights", options, {"average": 0.99}),
            Run("longer", "twice the steps", options, {"steps": 2 * steps}),
            Run("first-32", "the first half of the curriculum", (), {"block-size": 32, **half}),
            Run("curriculum", "half of the steps at block 32, half at 16", options, half, "first-32"),
            Run("slow", "a quarter of the learning rate", options, {"learning-rate": rate / 4}),
            Run("fast", "twice the learning rate", options, {"learning-rate": 2 * rate}),
            Run("no-decay", "no weight decay", options, {"weight-decay": 0.0}),
        ]

    def run(self, name: str) -> Run:
        return next(run for run in self.runs() if run.name == name)

    def command(self, name: str, work: Path) -> list[str]:
        """`twotower` ... that trains a run in a folder of its name."""
        run = self.run(name)
        given = {"data": work / "corpus", "out": work / name, "whole-documents": True, "quiet": True}
        options = {"model": work / run.start / "model", **given, **self.denoiser, **run.options}
        words = [w for k, v in options.items() for w in (f"--{k}", *(() if v is True else (str(v),)))]
        return ["train", "denoiser", *words]

    def parsed(self, name: str) -> argparse.Namespace:
        return make_parser().parse_args(self.command(name, Path()))

    def chain(self, name: str) -> list[str]:
        """The runs before it and itself."""
        return [] if name == START else [*self.chain(self.run(name).start), name]

    def digest(self, name: str) -> str:
        """Of all that a run depends on, but for the code and the context tower."""
        commands = [self.command(before, Path()) for before in self.chain(name)]
        return hashlib.sha256(json.dumps([self.documents, commands]).encode()).hexdigest()[:12]
