"""Training: a context tower on next tokens, or a denoiser on masked tokens from a frozen context tower.

One loop for both. Batches and noise are functions of (seed, step) alone, so a run that is stopped and started again
goes through the same losses.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .data import Batch, Rows
from .layers import MoE
from .objective import ar_loss, denoiser_loss, mask_blocks
from .two_tower import TwoTower

STATE = "training.pt"  # parameters, optimizer and history of a run that can be resumed
BIAS_RATE = 1e-3  # of the router's load balance: DeepSeek-V3's (arXiv 2412.19437)


@dataclass(frozen=True)
class TrainSettings:
    """What a run depends on besides its model and data. A run resumes only under the settings that it began with."""

    stage: str  # "ar" or "denoiser"
    steps: int = 1000
    batch_size: int = 8  # rows a step
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup: int = 100  # steps from 0 to learning_rate
    decay: float = 0.2  # share of the steps, at the end, that fall linearly to final_learning_rate
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in ("ar", "denoiser"):
            raise ValueError(f'stage is {self.stage!r}, expected "ar" or "denoiser"')
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^40 - 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}, expected a share from 0 to 1")


def learning_rate(step: int, s: TrainSettings) -> float:
    """Warm-up, stable, linear decay: the rate of a step, 0-based."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    falling = max(1, round(s.steps * s.decay))
    left = min(1.0, (s.steps - step) / falling)
    return s.final_learning_rate + (s.learning_rate - s.final_learning_rate) * left


def init_weights(model: TwoTower, seed: int = 0) -> None:
    """Random weights for a context tower to be trained from scratch: normal(0.02), the projections that write the
    residual stream scaled by 1 / sqrt(layers); Mamba's A in [1, 16] and time steps in [1e-3, 1e-1] (Mamba-2)."""
    g = torch.Generator().manual_seed(seed)
    layers = model.config.num_hidden_layers
    for name, p in [*model.context_tower.named_parameters(), *model.context_lm_head.named_parameters()]:
        with torch.no_grad():
            if name.endswith("A_log"):
                p.copy_(torch.rand(p.shape, generator=g).mul(15).add(1).log())
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.rand(p.shape, generator=g) * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            elif name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
                p.fill_(1)
            elif name.endswith("bias"):
                p.zero_()
            elif name.endswith("conv1d.weight"):
                p.copy_((torch.rand(p.shape, generator=g) * 2 - 1) / math.sqrt(p.shape[-1]))
            else:
                out = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight"))
                p.copy_(torch.randn(p.shape, generator=g) * 0.02 / (math.sqrt(layers) if out else 1))


def trainable(model: TwoTower, stage: str) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains, by name. The denoiser's router stays as it is."""
    if stage == "ar":
        return {n: p for n, p in model.named_parameters() if n.startswith("context_") and "e_score" not in n}
    named = {n: p for n, p in model.named_parameters() if not n.startswith("context_")}
    return {n: p for n, p in named.items() if ".mixer.gate." not in n}


def _loss(model: TwoTower, batch: Batch, s: TrainSettings, step: int) -> Tensor:
    ids, cu_seqlens = batch.ids.to(model.device), batch.cu_seqlens.to(model.device)
    if s.stage == "ar":
        return ar_loss(model, ids, cu_seqlens)
    c = model.config
    noise = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    noisy, masked, t = mask_blocks(ids, c.block_size, c.mask_token_id, noise)
    return denoiser_loss(model, ids, noisy, masked, t, cu_seqlens)


@torch.no_grad()
def held_out_loss(model: TwoTower, rows: Rows, s: TrainSettings, batches: int = 8) -> float:
    """Mean loss over fixed batches with fixed noise, in nats per token."""
    count = min(batches, -(-len(rows) // s.batch_size))
    losses = [_loss(model, rows.batch(i, s.batch_size, seed=0), s, step=-1 - i).item() for i in range(count)]
    return sum(losses) / len(losses)


class _Balance:
    """Keeps experts equally busy without an auxiliary loss: the correction bias of an expert that gets less than its
    share rises, of one that gets more falls (arXiv 2408.15664)."""

    def __init__(self, model: TwoTower, on: bool):
        self.layers = [m for m in model.context_tower.modules() if isinstance(m, MoE)] if on else []
        self.device = model.device

    def __enter__(self) -> Self:
        for moe in self.layers:
            moe.load = torch.zeros(moe.config.n_routed_experts, device=self.device)
        return self

    def __exit__(self, *_: object) -> None:
        for moe in self.layers:
            moe.load = None

    def reset(self) -> None:
        for moe in self.layers:
            moe.load.zero_()

    @torch.no_grad()
    def update(self) -> None:
        for moe in self.layers:
            moe.gate.e_score_correction_bias += BIAS_RATE * torch.sign(moe.load.mean() - moe.load)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_state(out: Path, model: TwoTower, optimizer: torch.optim.Optimizer, s: TrainSettings, history: list) -> None:
    prefix = "context_" if s.stage == "ar" else ""
    weights = {n: p.detach() for n, p in model.named_parameters() if n.startswith("context_") == bool(prefix)}
    state = {"settings": asdict(s), "weights": weights, "optimizer": optimizer.state_dict(), "history": history}
    write_atomically(out / STATE, lambda path: torch.save(state, path))


def _load_state(out: Path, model: TwoTower, optimizer: torch.optim.Optimizer, s: TrainSettings) -> list[dict]:
    """Put a stopped run back; its history, or [] when there is none."""
    if not (out / STATE).is_file():
        return []
    try:
        state = torch.load(out / STATE, map_location=model.device, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        why = f"{type(error).__name__}; delete it to begin anew"
        raise ValueError(f"{out / STATE}: not readable ({why})") from error
    was, now = state["settings"], asdict(s)
    changed = [f"{k} was {was.get(k)}, now {now[k]}" for k in now if was.get(k) != now[k]]
    if changed:
        raise ValueError(f"{out / STATE}: this run began with other settings ({'; '.join(changed)}); use a new folder")
    model.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def plot_losses(history: list[dict], path: Path) -> None:
    """Draw the loss of every step, a running mean, and the held-out losses (PNG or SVG by the file's ending)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    steps, losses = [h["step"] for h in history], [h["loss"] for h in history]
    mean, means = 0.0, []
    for n, loss in enumerate(losses, 1):
        mean += 0.02 * (loss - mean)
        means.append(mean / (1 - 0.98**n))  # without the pull of its beginning at 0
    held = [(h["step"], h["held_out"]) for h in history if "held_out" in h]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.7, label="each step")
    axes.plot(steps, means, color="tab:blue", label="running mean")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format(ScalarFormatter())  # 4.5 rather than 4.5 x 10^0
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))
    plt.close(figure)


@contextmanager
def _whole_steps() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until a step is whole; yields a function that says whether it was pressed. A second one, or one
    outside the main thread, acts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    model: TwoTower,
    rows: Rows,
    settings: TrainSettings,
    out: str | Path,
    *,
    held_out: Rows | None = None,
    save_every: int = 200,
    stop_after: int | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train a tower, writing what a stopped run needs into `out` every `save_every` steps.

    Args:
        model: for stage "ar" its context tower learns; for "denoiser" everything but the context tower and the router.
        rows:  training rows (`data.load_rows`), a multiple of the block size long.
        out:   folder; a run found there with the same settings is resumed. Gets training.pt, log.jsonl and loss.png.
        held_out: rows whose loss is measured at every save.
        stop_after: end this call after so many steps, as if interrupted (the run can be resumed).
        progress: show a bar on stderr.
    Returns:
        one dict a step: step, loss, learning_rate, tokens_per_s, and held_out where measured.
    Raises:
        ValueError: no denoiser to train, a loss that is not finite, a run in `out` under other settings.
        KeyboardInterrupt: Ctrl-C, after the step that it fell into is whole and saved.
    """
    s, out = settings, Path(out)
    if s.stage == "denoiser" and model.denoiser_tower is None:
        raise ValueError('stage is "denoiser", but the model was loaded with towers="context": there is no denoiser')
    out.mkdir(parents=True, exist_ok=True)
    model.requires_grad_(False)
    learned = trainable(model, s.stage)
    for p in learned.values():
        p.requires_grad_(True)
    matrices = [p for p in learned.values() if p.dim() >= 2]
    vectors = [p for p in learned.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas)
    history = _load_state(out, model, optimizer, s)
    last = s.steps if stop_after is None else min(s.steps, len(history) + stop_after)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        _Balance(model, on=s.stage == "ar") as balance,
        _whole_steps() as interrupted,
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
    ):
        task = bar.add_task(f"train {s.stage}", total=s.steps, completed=len(history))
        for step in range(len(history), last):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            batch = rows.batch(step, s.batch_size, seed=s.seed)
            balance.reset()
            loss = _loss(model, batch, s, step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learned.values(), s.clip).item()
            entry = {"step": step, "loss": loss.item(), "learning_rate": learning_rate(step, s)}
            if not (math.isfinite(entry["loss"]) and math.isfinite(norm)):  # before the step: no NaN is ever saved
                found = f"the loss is {entry['loss']}, the norm of its gradient {norm}"
                raise ValueError(f"step {step}: {found}; lower the learning rate ({s.learning_rate})")
            optimizer.step()
            optimizer.zero_grad()
            balance.update()
            entry["tokens_per_s"] = round(batch.ids.numel() / (time.perf_counter() - began), 1)
            history.append(entry)
            stop = interrupted()
            if (step + 1) % save_every == 0 or step + 1 == last or stop:
                if held_out is not None and not stop:
                    entry["held_out"] = held_out_loss(model, held_out, s)
                _save_state(out, model, optimizer, s, history)
                log = "".join(json.dumps(h) + "\n" for h in history)
                write_atomically(out / "log.jsonl", lambda path, log=log: path.write_text(log))
                plot_losses(history, out / "loss.png")
            if stop:
                raise KeyboardInterrupt
            speed = f"loss {entry['loss']:.3f}  {entry['tokens_per_s']:.0f} tokens/s"
            bar.update(task, advance=1, description=f"train {s.stage}  {speed}")
    return history
