"""What a training run depends on besides its model and data, and the learning rate of each of its steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass

# These decide which batches and which noise a step sees, what learns and what is stored; the others may change in a
# run that goes on.
FIXED = ("stage", "batch_size", "seed", "context_tower", "no_time", "optimizer")
OPTIMIZERS = ("adamw", "muon")
CONTEXT_TOWERS = ("frozen", "trained", "tied")


@dataclass(frozen=True)
class TrainSettings:
    """What a run depends on besides its model and data. A run resumes under the settings that it began with; those
    that are not in `FIXED` may be changed where that is asked for."""

    stage: str  # "ar" or "denoiser"
    _: KW_ONLY
    steps: int = 1000
    batch_size: int = 8  # rows a step
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup: int = 100  # steps up to learning_rate
    decay: float = 0.2  # share of the steps, at the end, that fall linearly to final_learning_rate
    optimizer: str = "adamw"  # "muon": of the matrices inside the towers' mixers; AdamW of all others
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    average: float = 0.0  # decay of a running average of the weights, which is then what is stored; 0: none
    skip_first_lines: bool = False  # a document's first line is a prompt: read, not learned to be written
    # Of the denoiser.
    draws: int = 1  # of noise, over one pass of the context tower
    split_blocks: int = 1  # steps in turn learn blocks that are split into 1, 2, 4 ... so many
    full_blocks: float = 0.0  # share of blocks that are masked as a whole, as generation begins
    tail_blocks: float = 0.0  # share of blocks that are masked from one of their tokens on
    own_blocks: float = 0.0  # share of blocks that hold the denoiser's own predictions, as generation goes on
    near: float = 0.0  # masked tokens of a block by which the share of those whose loss counts halves; 0: all count
    distil: float = 0.0  # weight of the context tower's distributions beside the tokens themselves
    context_tower: str = "frozen"  # "trained": learns too, of both losses; "tied": it and the denoiser are one
    no_time: bool = False  # the time modules stay as they begin, where what they say does not depend on t

    def __post_init__(self) -> None:
        if self.stage not in ("ar", "denoiser"):
            raise ValueError(f'stage is {self.stage!r}, expected "ar" or "denoiser"')
        for name, least, most in (
            ("steps", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("warmup", 0, math.inf),
            ("draws", 1, math.inf),
            ("split_blocks", 1, math.inf),
            ("seed", 0, 2**40 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                what = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"{name} is {value!r}, expected an integer, {what}")
        if self.split_blocks & (self.split_blocks - 1):
            raise ValueError(f"split_blocks is {self.split_blocks}, expected a power of 2")
        for name in ("learning_rate", "clip"):
            if not 0 < _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and finite")
        for name in ("final_learning_rate", "weight_decay", "near"):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 and finite")
        if self.final_learning_rate > self.learning_rate:
            what = f"above learning_rate, which is {self.learning_rate}"
            raise ValueError(f"final_learning_rate is {self.final_learning_rate}, {what}: expected no more than that")
        for name in ("decay", "full_blocks", "tail_blocks", "own_blocks", "distil"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        if not 0 <= _number("average", self.average) < 1:
            raise ValueError(f"average is {self.average}, expected at least 0 and below 1")
        for name in ("skip_first_lines", "no_time"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}, expected True or False")
        if self.context_tower not in CONTEXT_TOWERS:
            raise ValueError(f"context_tower is {self.context_tower!r}, expected one of {', '.join(CONTEXT_TOWERS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
        if len(self.betas) != 2 or not all(0 <= _number("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas is {self.betas}, expected two numbers, each at least 0 and below 1")

    def block_size(self, step: int, whole: int) -> int:
        """Tokens of the blocks that a step learns from, of a model whose blocks have `whole`."""
        return whole >> step % self.split_blocks.bit_length()


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return value


@dataclass(frozen=True)
class Stretch:
    """Steps under one schedule: since which step (0-based), and the rate before it. A run has one, and one more each
    time that its settings are changed."""

    since: int = 0
    start: float = 0.0


def learning_rate(step: int, s: TrainSettings, stretch: Stretch = Stretch()) -> float:
    """Warm-up, stable, linear decay: the rate of a step, 0-based.

    The rate climbs (or falls) from that before the stretch to `learning_rate` within `warmup` steps, and over the last
    `decay` of the stretch, its last step at least, approaches `final_learning_rate`, which the last step has. Where the
    two overlap, the decay takes its share of what the warm-up has reached: no step jumps.
    """
    done = step - stretch.since
    whole = s.steps - stretch.since
    climbed = min(1.0, (done + 1) / s.warmup) if s.warmup else 1.0
    rate = stretch.start + (s.learning_rate - stretch.start) * climbed if climbed < 1 else s.learning_rate
    left = min(1.0, (whole - 1 - done) / max(1, round(whole * s.decay)))
    return s.final_learning_rate + (rate - s.final_learning_rate) * left if left < 1 else rate


def changed_settings(was: dict, now: TrainSettings) -> dict[str, tuple]:
    """(old, new) of every setting that differs from a run's stored ones."""
    known = {
        f.name: f.default for f in dataclasses.fields(TrainSettings)
    } | was  # a run from before a setting was there
    return {k: (known[k], v) for k, v in dataclasses.asdict(now).items() if known[k] != v}
