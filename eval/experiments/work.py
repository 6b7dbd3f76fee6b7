"""Training and measuring what is not recorded yet, one after the other, until time is over."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from bench.measure import append, machine_name, recorded, where
from tt_model import TwoTower, TwoTowerConfig, checkpoint
from tt_model.cli import main as twotower
from tt_model.cli.facts import steps_logged, weights_digest
from tt_model.cli.train import settings_of
from tt_model.files import write_text
from tt_model.stops import Raise, Stopped, handling
from tt_model.training.boilerplate import corpus
from tt_model.training.data import Rows
from tt_model.training.loop import init_weights, train
from tt_model.two_tower import ASSETS

from .. import quality
from . import overlap
from .plan import START, Pilot

Line = dict[str, Any]
MODEL = "model"  # the name of the model that is not trained here


class OutOfTime(Exception):
    """The rest is for the next call."""


class Clock:
    """A time to stop at."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def check(self) -> None:
        if time.monotonic() >= self.end:
            raise OutOfTime

    def run(self, arguments: Sequence[str]) -> None:
        """`twotower` with these arguments; when time is over it is asked to stop, as Ctrl-C would, and saves."""
        self.check()
        left = min(self.end - time.monotonic(), threading.TIMEOUT_MAX)
        self.timer = timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        try:
            with handling(Raise()):
                timer.start()
                try:
                    code = twotower(arguments)
                finally:
                    timer.cancel()
        except Stopped as stop:
            code = 128 + stop.number
        if code >= 128:
            self.check()
            raise Stopped(code - 128)
        if code:
            raise RuntimeError(f"twotower {' '.join(arguments)}: exit code {code}")


class Job(NamedTuple):
    """One line to be recorded."""

    kind: str  # "training", "quality" or "experts"
    run: str
    digest: str  # of what the run depends on, or of the model's weights
    block_size: int | None  # that is written with; None: the model's own
    blocks: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.kind} {self.run}" + (f", block {self.block_size}" if self.block_size else "")

    def is_of(self, line: Line) -> bool:
        return all(line.get(name) == getattr(self, name) for name in ("kind", "run", "digest")) and (
            line.get("sampled") == self.block_size
        )


@dataclass
class Experiments:
    """What is to be made, and where."""

    pilot: Pilot
    work: Path
    results: Path
    model: Path | None = None
    device: str | None = None

    def jobs(self) -> list[Job]:
        digest, start = weights_digest(self.model or ASSETS), self.start_digest()
        found = [
            Job("quality", MODEL, digest, None, ("threshold",)),
            Job("experts", MODEL, digest, None, ("experts",)),
        ]
        for run in self.pilot.runs():
            if not run.blocks:
                continue
            digest, own = f"{self.pilot.digest(run.name)}-{start}", self.pilot.parsed(run.name).block_size
            found += [Job(kind, run.name, digest, None, run.blocks) for kind in ("training", "quality")]
            if "block" in run.blocks:
                found += [
                    Job("quality", run.name, digest, size, ("block",)) for size in self.pilot.sampled if size != own
                ]
        return found

    def lines(self) -> list[Line]:
        return [line for file in sorted(self.results.glob("*.jsonl")) for line in recorded(file)]

    def of(self, job: Job, lines: Sequence[Line]) -> Line | None:
        """The newest line of a job."""
        return next((line for line in reversed(lines) if job.is_of(line)), None)

    def missing(self, only: Sequence[str]) -> list[Job]:
        lines = self.lines()
        return [job for job in self.jobs() if set(job.blocks) & set(only) and self.of(job, lines) is None]

    # ---- what makes a line ----

    def make(self, job: Job, clock: Clock) -> Line:
        """Train what must be trained for it, and measure."""
        begun = where(threads=torch.get_num_threads())
        folder = self.model if job.run == MODEL else self.trained(job.run, clock)
        if job.kind == "training":
            found = self.training(job.run)
        elif job.kind == "experts":
            model = TwoTower.from_pretrained(folder, device=self.device)
            found = {"model": "bundled" if folder is None else folder.name, **overlap.measure(model)}
        else:
            found = self.quality(job, folder, clock)
        return {"machine": begun, **found, "kind": job.kind, "run": job.run, "digest": job.digest} | (
            {"sampled": job.block_size} if job.block_size else {}
        )

    def trained(self, name: str, clock: Clock) -> Path:
        """The folder of a run's model, after all that it needs."""
        self.prepare()
        for each in self.pilot.chain(name):
            if not (self.work / each / "model" / "config.json").is_file():
                clock.run(self.pilot.command(each, self.work))
        return self.work / name / "model"

    def start(self) -> TwoTower:
        """The context tower that every run begins with."""
        return TwoTower.from_pretrained(self.model, towers="context", device="cpu", dtype=torch.float32, progress=False)

    def start_digest(self) -> str:
        found = hashlib.sha256()
        for name, p in sorted(self.start().named_parameters()):
            found.update(name.encode())
            found.update(p.detach().numpy().tobytes())
        return found.hexdigest()[:12]

    def prepare(self) -> None:
        """The corpus, and the context tower by itself."""
        folder, kept = self.work / START / "model", self.work / "start.json"
        text = json.dumps({"context_tower": self.start_digest(), "documents": self.pilot.documents}) + "\n"
        if kept.is_file() and kept.read_text(encoding="utf-8") != text:
            raise ValueError(f"{kept} is of another start: remove {self.work}, or name another --work")
        write_text(kept, text)
        if not (folder / "config.json").is_file():
            checkpoint.save(self.start(), folder, tokenizer=self.model or ASSETS, progress=False)
        options = ["--documents", str(self.pilot.documents), "--seed", "7", "--python", "0", "--quiet"]
        assert corpus.main(["--out", str(self.work / "corpus"), *options]) == 0

    def training(self, name: str) -> Line:
        log = [json.loads(line) for line in (self.work / name / "log.jsonl").read_text().splitlines()]
        return {
            "steps": len(log),
            "loss": log[-1]["loss"],
            "held_out": log[-1]["held_out"],
            "tokens_per_s": median(entry["tokens_per_s"] for entry in log),
            "command": " ".join(["twotower", *self.pilot.command(name, Path("WORK"))]),
        }

    def quality(self, job: Job, folder: Path | None, clock: Clock) -> Line:
        """`eval.quality`, which keeps its batches in a file until they are all there."""
        kept = self.work / "parts" / f"{job.run}-{job.block_size or 'own'}-{job.digest[:12]}.json"
        words = ["--resume", str(kept)] + ([] if folder is None else ["--model", str(folder)])
        words += ["--device", self.device] if self.device else []
        if job.run == MODEL:
            words += self.pilot.of_model.split()
        else:
            words += ["--thresholds", *map(str, self.pilot.thresholds)]
            words += ["--specifications", str(self.pilot.specifications), "--new-tokens", str(self.pilot.new_tokens)]
        if job.block_size:
            words += ["--block-size", str(job.block_size)]
        found = quality.measure(quality.make_parser().parse_args(words), clock.check)
        return {k: v for k, v in found.items() if k not in ("texts", "kinds", "splits")}

    def run(self, only: Sequence[str], clock: Clock, say: Callable[[str], None]) -> None:
        """Record what is missing. OutOfTime when there is no more time for it; RuntimeError of what failed, as a run
        that diverges, after all others."""
        failed = []
        for job in self.missing(only):
            clock.check()
            say(job.label)
            try:
                line = self.make(job, clock)
            except RuntimeError as error:
                failed.append(f"{job.label}: {error}")
                continue
            append(self.results / f"{machine_name(line['machine'])}.jsonl", line)
        if failed:
            raise RuntimeError("; ".join(failed))

    # ---- beforehand ----

    def forecast(self, only: Sequence[str]) -> Iterator[tuple[str, str, int, float]]:
        """Of every run that is to be trained: its name, state, missing steps, and seconds of a step here and now."""
        names = dict.fromkeys(n for job in self.missing(only) if job.run != MODEL for n in self.pilot.chain(job.run))
        for name in names:
            steps, there = self.pilot.parsed(name).steps, steps_logged(self.work / name)
            state = "trained" if (self.work / name / "model").is_dir() else f"{there} of {steps} steps" if there else ""
            left = 0 if state == "trained" else steps - there
            yield name, state, left, self.seconds_a_step(name) if left else 0.0

    def seconds_a_step(self, name: str) -> float:
        """Of the second step of a run over random tokens."""
        o = self.pilot.parsed(name)
        config = replace(TwoTowerConfig.from_file(self.model or ASSETS), block_size=o.block_size, dtype=torch.float32)
        model = TwoTower(config)
        init_weights(model)
        checkpoint.start_denoiser(model)
        count = 4 * o.batch_size * o.row_length
        ids = torch.randint(4, config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
        rows = Rows(ids.int(), torch.arange(0, count + 1, min(128, o.row_length)), o.row_length)
        with TemporaryDirectory() as folder:
            history = train(model, rows, settings_of(o), folder, stop_after=2, progress=False)
        return o.batch_size * o.row_length / history[-1]["tokens_per_s"]
