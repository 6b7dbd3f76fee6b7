"""Training: a context tower on next tokens, or a denoiser on masked tokens from a frozen context tower.

One loop for both. Batches and noise are functions of (seed, step) alone, so a run that is stopped and started again
goes through the same losses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..checkpoint.keys import CONTEXT, named_parameters, unwrapped
from ..files import hold, write_atomically, write_text
from ..modeling.moe import MoE
from ..modeling.two_tower import TwoTowerModel
from ..stops import Later, Stopped, handling
from .data import Batch, Rows
from .objective import (
    ar_loss,
    denoiser_loss,
    encode_and_learn,
    mask_blocks,
    near_masks,
    next_token_loss,
    own_predictions,
)
from .schedule import TrainSettings, learning_rate
from .state import STATE, Masters, load_state, save_state, stage_parameters, tie

TIME = ("t_embedder.", "t_block.")
BIAS_RATE = 1e-3  # of the router's load balance: DeepSeek-V3's (arXiv 2412.19437)


def init_weights(model: TwoTowerModel, seed: int = 0) -> None:
    """Random weights for a context tower to be trained from scratch: normal(0.02), the projections that write the
    residual stream scaled by 1 / sqrt(layers); Mamba's A in [1, 16] and time steps in [1e-3, 1e-1] (Mamba-2)."""
    g = torch.Generator().manual_seed(seed)
    layers = model.config.num_hidden_layers
    for name, p in named_parameters(model, once=True).items():
        if not name.startswith(CONTEXT):
            continue
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


def trainable(
    model: TwoTowerModel, stage: str, context_tower: str = "frozen", no_time: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains, by name. Beside a denoiser that learns, routers stay as they are."""
    left_out = "e_score" if stage == "ar" else ".mixer.gate."
    named = stage_parameters(model, stage, context_tower)
    return {n: p for n, p in named.items() if left_out not in n and not (no_time and n.startswith(TIME))}


def _loss(model: TwoTowerModel, batch: Batch, s: TrainSettings, step: int) -> Tensor:
    ids, cu_seqlens = batch.ids.to(model.device), batch.cu_seqlens.to(model.device)
    counted = batch.counted.to(model.device) if s.skip_first_lines else None
    if s.stage == "ar":
        return ar_loss(model, ids, cu_seqlens, counted)
    c = model.config
    noise = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    frozen = s.context_tower == "frozen"
    S = s.block_size(step, c.block_size)
    context = (model.encode_clean if frozen else partial(encode_and_learn, model))(ids, S, cu_seqlens)
    losses = []
    for _ in range(s.draws):
        noisy = mask_blocks(ids, S, c.mask_token_id, noise, full=s.full_blocks, tail=s.tail_blocks)
        if s.own_blocks:
            noisy = own_predictions(model, context, noisy, s.own_blocks, noise)
        learned = near_masks(noisy.masked, S, s.near, noise, counted) if s.near else counted
        losses.append(denoiser_loss(model, ids, noisy, cu_seqlens, learned, context=context, distil=s.distil))
    loss = torch.stack(losses).mean()
    if frozen:
        return loss
    assert context.hidden is not None
    return loss + next_token_loss(model, context.hidden, ids, cu_seqlens, counted)


@torch.no_grad()
def held_out_loss(model: TwoTowerModel, rows: Rows, s: TrainSettings, batches: int = 8) -> float:
    """Mean loss over fixed batches with fixed noise, in nats per token: the published one, whatever is trained."""
    published: dict[str, Any] = dict(full_blocks=0.0, tail_blocks=0.0, own_blocks=0.0, near=0.0, distil=0.0)
    s = dataclasses.replace(s, draws=1, split_blocks=1, context_tower="frozen", **published)
    count = min(batches, -(-len(rows) // s.batch_size))
    losses = [_loss(model, rows.batch(i, s.batch_size, seed=0), s, step=-1 - i).item() for i in range(count)]
    return sum(losses) / len(losses)


class _Balance:
    """Keeps experts equally busy without an auxiliary loss: the correction bias of an expert that gets less than its
    share rises, of one that gets more falls (arXiv 2408.15664)."""

    def __init__(self, model: TwoTowerModel, on: bool):
        self.layers = [m for m in model.context_tower.modules() if isinstance(m, MoE)] if on else []
        self.device = model.device

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for moe in self.layers:
            moe.load = None

    def reset(self) -> None:
        for moe in self.layers:
            moe.load = torch.zeros(moe.config.n_routed_experts, device=self.device)

    @torch.no_grad()
    def update(self) -> None:
        for moe in self.layers:
            assert moe.load is not None  # since `reset`
            moe.gate.e_score_correction_bias.add_(torch.sign(moe.load.mean() - moe.load), alpha=BIAS_RATE)


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
    write_atomically(path, lambda p: figure.savefig(p, dpi=120, format=path.suffix.removeprefix(".")))
    plt.close(figure)


def train(
    model: TwoTowerModel,
    rows: Rows,
    settings: TrainSettings,
    out: str | Path,
    *,
    held_out: Rows | None = None,
    save_every: int = 200,
    stop_after: int | None = None,
    extend: bool = False,
    note: dict | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train a tower, writing what a stopped run needs into `out` every `save_every` steps.

    Args:
        model: for stage "ar" its context tower learns; for "denoiser" everything but the context tower and the router,
            or what `context_tower` and `no_time` say.
            16-bit weights are learned in fp32 and rounded into the model; fp16 is refused. torch.compile around the
            model or a part of it leaves no trace in what is stored.
        rows:  training rows (`data.load_rows`), a multiple of the block size long.
        out:   folder; a run found there with the same settings is resumed. Gets training.pt, log.jsonl and loss.png.
            It is held against other processes meanwhile.
        held_out: rows whose loss is measured at every save.
        stop_after: end this call after so many steps, as if interrupted (the run can be resumed).
        extend: resume a run also under other settings than it began with, but for those in `schedule.FIXED`: as more
            steps or another learning rate. The rate warms up from where it was.
        note:  what else is worth a line in the log, under "changed" of this call's first step.
        progress: show a bar on stderr.
    With `average` the model ends with the running average of its weights; held-out losses are of that, too.

    Returns:
        one dict a step: step, loss, learning_rate, tokens_per_s, held_out where measured, and "changed", name to
        [old, new], at the first step under other settings.
    Raises:
        ValueError: no denoiser to train, a model in fp16, a loss, gradient or weight that is not finite (the last state
            that was stored stays), a run in `out` under other settings.
        BlockingIOError: another process trains in `out`.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the step that it fell into is whole and saved; it is
            `stops.Stopped` and has the signal's number.
    """
    s, out, model = settings, Path(out), unwrapped(model)
    if s.stage == "denoiser" and model.denoiser_tower is None:
        raise ValueError('stage is "denoiser", but the model was loaded with towers="context": there is no denoiser')
    if s.stage == "denoiser" and s.no_time and bool(cast(nn.Linear, model.t_block[1]).weight.any()):
        raise ValueError("no_time: the model's time modules have learned already: begin with a context tower")
    if model.config.block_size % s.split_blocks:
        expected = f"a divisor of the block size, {model.config.block_size}"
        raise ValueError(f"split_blocks is {s.split_blocks}, expected {expected}")
    what = s.stage, s.context_tower, s.no_time
    if any(p.dtype == torch.float16 for p in trainable(model, *what).values()):
        raise ValueError("dtype is float16, in which small gradients are 0: expected bfloat16 or float32 to train in")
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        model.requires_grad_(False)
        if s.stage == "denoiser" and s.context_tower == "tied":
            tie(model)
        learned = trainable(model, *what)
        for p in learned.values():
            p.requires_grad_(True)
        masters = Masters(learned, s)
        history, stretch, changed = load_state(out, model, masters, s, extend=extend)
        changed = (note or {}) | changed
        saved, last = len(history), s.steps if stop_after is None else min(s.steps, len(history) + stop_after)

        def diverged(found: str, step: int) -> ValueError:
            """Nothing that is not finite is ever stored."""
            kept = f"{out / STATE} stays as it was after step {saved}" if saved else "nothing is stored"
            advice = f"lower the learning rate ({s.learning_rate}), or compute in another type ({model.dtype})"
            return ValueError(f"step {step}: {found}; {kept}; {advice}")

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        stop = Later()
        with (
            _Balance(model, on=s.stage == "ar") as balance,
            Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
            handling(stop),
        ):
            task = bar.add_task(f"train {s.stage}", total=s.steps, completed=len(history))
            for step in range(len(history), last):
                began = time.perf_counter()
                rate = learning_rate(step, s, stretch)
                batch = rows.batch(step, s.batch_size, seed=s.seed)
                balance.reset()
                loss = _loss(model, batch, s, step)
                loss.backward()
                norm = masters.clip_gradients(s.clip)
                entry: dict[str, Any] = {"step": step, "loss": loss.item(), "learning_rate": rate}
                if not (math.isfinite(entry["loss"]) and math.isfinite(norm)):
                    raise diverged(f"the loss is {entry['loss']}, the norm of its gradient {norm}", step)
                masters.step(rate, step)
                balance.update()
                entry["tokens_per_s"] = round(batch.ids.numel() / (time.perf_counter() - began), 1)
                if changed:
                    entry["changed"], changed = changed, {}
                history.append(entry)
                stopped = stop.number is not None
                if (step + 1) % save_every == 0 or step + 1 == last or stopped:
                    if held_out is not None and not stopped:
                        with masters.averaged():
                            entry["held_out"] = held_out_loss(model, held_out, s)
                        if not math.isfinite(entry["held_out"]):
                            raise diverged(f"the held-out loss is {entry['held_out']}", step)
                    try:
                        save_state(out, model, masters, s, stretch, history)
                    except ValueError as error:
                        raise diverged(str(error), step) from error
                    saved = len(history)
                    write_text(out / "log.jsonl", "".join(json.dumps(h, allow_nan=False) + "\n" for h in history))
                    plot_losses(history, out / "loss.png")
                if stopped:
                    break
                speed = f"loss {entry['loss']:.3f}  {entry['tokens_per_s']:.0f} tokens/s"
                bar.update(task, advance=1, description=f"train {s.stage}  {speed}")
        if stop.number is not None:
            raise Stopped(stop.number)
        masters.put(masters.averages)
        return history
