"""What is trained: one small context tower, and denoisers that differ from the published recipe in one thing each."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_model import TwoTowerConfig
from tt_model.cli import make_parser

BLOCKS = ("threshold", "block", "towers", "experts", "options")  # parts of the page
DEFAULT = 0.8  # threshold

CONFIG = TwoTowerConfig(
    vocab_size=2048, hidden_size=128, pattern="M*EM*E", num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, n_groups=1, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=96, moe_shared_expert_intermediate_size=192,
)  # fmt: skip
RATES = {"final-learning-rate": 1e-5, "decay": 0.5, "batch-size": 8, "row-length": 512}
AR = {"steps": 1500, "learning-rate": 3e-3, "save-every": 500} | RATES
DENOISER = {"steps": 800, "learning-rate": 2e-3, "save-every": 400, "block-size": 16} | RATES


@dataclass(frozen=True)
class Run:
    """A training run, and in which parts of the page it stands."""

    name: str
    about: str
    blocks: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of `twotower train denoiser`, beside the baseline's
    start: str = "ar"  # the run whose model it goes on from


@dataclass(frozen=True)
class Pilot:
    """Sizes of everything, so that a test can have smaller ones."""

    config: TwoTowerConfig = CONFIG
    documents: int = 20000
    ar: dict[str, Any] = field(default_factory=lambda: AR)  # options of `twotower train`
    denoiser: dict[str, Any] = field(default_factory=lambda: DENOISER)
    thresholds: tuple[float, ...] = (DEFAULT, 0.95)
    specifications: int = 96
    new_tokens: int = 448
    of_model: str = "--steps 1 2 4 8 16"  # how eval.quality measures the model of "threshold"
    sampled: tuple[int, ...] = (8, 16, 32, 64)  # block sizes that every model of "block" writes with

    def runs(self) -> list[Run]:
        """In the order in which they are made: what the others are compared with first."""
        steps, rate = self.denoiser["steps"], self.denoiser["learning-rate"]
        towers, options = ("towers",), ("options",)
        half = {"steps": steps // 2}
        return [
            Run("base", "the published recipe, block 16", ("block", "towers", "options")),
            Run("seed", "the same, another seed", ("towers", "options"), {"seed": 1}),
            Run("block-8", "block 8", ("block",), {"block-size": 8}),
            Run("block-32", "block 32", ("block",), {"block-size": 32}),
            Run("no-time", "without time conditioning", towers, {"no-time": True}),
            Run("trained", "context tower trained, too", towers, {"context-tower": "trained"}),
            Run("tied", "towers tied", towers, {"context-tower": "tied"}),
            Run("draws", "2 draws of noise a step", options, {"draws": 2}),
            Run("full-blocks", "a quarter of the blocks masked as a whole", options, {"full-blocks": 0.25}),
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
        """`twotower` ... that trains a run, "ar" or a denoiser, in a folder of that name."""
        given = {"data": work / "corpus", "out": work / name, "whole-documents": True, "quiet": True}
        if name == "ar":
            start = {"config": work / "config.json", "tokenizer": work / "tokenizer"}
            options = {**start, **given, **self.ar}
        else:
            run = self.run(name)
            options = {"model": work / run.start / "model", **given, **self.denoiser, **run.options}
        words = [w for k, v in options.items() for w in (f"--{k}", *(() if v is True else (str(v),)))]
        return ["train", "ar" if name == "ar" else "denoiser", *words]

    def parsed(self, name: str) -> argparse.Namespace:
        return make_parser().parse_args(self.command(name, Path()))

    def chain(self, name: str) -> list[str]:
        """The runs before it and itself."""
        return ["ar"] if name == "ar" else [*self.chain(self.run(name).start), name]

    def digest(self, name: str) -> str:
        """Of all that a run depends on, but for the code."""
        commands = [self.command(before, Path()) for before in self.chain(name)]
        what = [self.config.to_dict(), self.documents, commands]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
