"""The state of a training run: fp32 masters of 16-bit weights, and the file that a stopped run goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from ..checkpoint.folder import finite, some
from ..checkpoint.keys import CONTEXT, named_parameters
from ..files import write_atomically
from ..modeling.two_tower import TwoTowerModel
from .muon import Muon
from .schedule import FIXED, Stretch, TrainSettings, changed_settings

OPTIMIZERS = {"optimizer", "muon"}  # keys of their states in STATE
STATE = "training.pt"  # parameters, optimizer and history of a run that can be resumed


def is_inner(name: str, p: Tensor) -> bool:
    """Whether a parameter is one of the matrices inside a tower's mixers, which Muon is for: no embedding, head,
    router, convolution or time module."""
    left_out = ("embeddings.", "lm_head.", ".gate.", ".conv1d.", "t_embedder.", "t_block.")
    return p.dim() >= 2 and ".mixer." in name and not any(part in name for part in left_out)


class Masters:
    """What is learned, and its optimizer: fp32 copies of 16-bit parameters, all others themselves.

    bf16 has 8 bits of mantissa: a step of less than 1/256 of a weight would be rounded away, as nearly all are at the
    learning rates that large models take.
    """

    def __init__(self, learned: Mapping[str, nn.Parameter], settings: TrainSettings):
        self.values: dict[str, Tensor] = {}  # by the parameter's name
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for name, p in learned.items():
            self.values[name] = p
            if p.dtype.itemsize == 2:
                master = p.detach().float().requires_grad_()
                self.values[name] = master
                self._pairs.append((p, master))
        inner = {name for name in self.values if settings.optimizer == "muon" and is_inner(name, self.values[name])}
        others = [p for name, p in self.values.items() if name not in inner]
        groups = [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
        self.optimizers: dict[str, torch.optim.Optimizer] = {"optimizer": adamw}  # by its key in training.pt
        if inner:
            matrices = [self.values[name] for name in self.values if name in inner]
            self.optimizers["muon"] = Muon(matrices, settings.learning_rate, settings.weight_decay)
        self.decay = settings.average
        self.averages = {name: p.detach().clone() for name, p in self.values.items()} if self.decay else {}
        self._parameters = learned

    def clip_gradients(self, most: float) -> float:
        """Move the gradients of 16-bit parameters to their masters, and scale all to a norm of at most `most`; their
        norm before."""
        for p, master in self._pairs:
            master.grad, p.grad = (None if p.grad is None else p.grad.float()), None
        return nn.utils.clip_grad_norm_(self.values.values(), most).item()

    @torch.no_grad()
    def step(self, rate: float, number: int) -> None:
        """A step, 0-based, at a learning rate; then the masters are rounded into the model."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        for p, master in self._pairs:
            p.copy_(master)
        decay = min(self.decay, (number + 1) / (number + 10))  # the first steps are soon forgotten
        for name, average in self.averages.items():
            average.lerp_(self.values[name].detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averages of its weights inside the `with` block, where there are any."""
        own = {name: self._parameters[name].detach().clone() for name in self.averages}
        try:
            self.put(self.averages)
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model's parameters."""
        for name, value in weights.items():
            self._parameters[name].copy_(value)


def bad_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors with NaN or Inf."""
    flags = [(name, finite(t.detach())) for name, t in tensors if t.numel() and t.is_floating_point()]
    if not flags or bool(torch.stack([flag.cpu() for _, flag in flags]).all()):
        return []
    return [name for name, flag in flags if not flag]


def _tensors(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    yield from state["weights"].items()
    yield from state.get("averages", {}).items()
    for key in OPTIMIZERS & state.keys():
        for i, values in state[key]["state"].items():
            yield from ((f"{key}.{i}.{name}", v) for name, v in values.items() if isinstance(v, Tensor))


def stage_parameters(model: TwoTowerModel, stage: str, context_tower: str = "frozen") -> dict[str, nn.Parameter]:
    """What a run of a stage stores: the parameters of its tower, its head and, for the denoiser, the time modules; all
    of a model whose context tower learns with the denoiser."""
    named = named_parameters(model, once=True)
    if stage == "denoiser" and context_tower != "frozen":
        return named
    return {n: p for n, p in named.items() if n.startswith(CONTEXT) == (stage == "ar")}


def tie(model: TwoTowerModel) -> None:
    """Let a model's context tower and head be its denoiser's, too. ValueError where they are not equal."""
    named = named_parameters(model)
    for name, p in named.items():
        if name.startswith(CONTEXT):
            twin = named[name.replace("context_tower.", "denoiser_tower.").replace("context_lm_head.", "lm_head.")]
            if not twin.is_meta and not torch.equal(p, twin):
                raise ValueError(f'context_tower is "tied", but the towers differ ({name}): begin with a context tower')
    model.denoiser_tower, model.lm_head = model.context_tower, model.context_lm_head


def save_state(
    out: Path, model: TwoTowerModel, masters: Masters, settings: TrainSettings, stretch: Stretch, history: list[dict]
) -> None:
    """Write training.pt. ValueError, and the file stays as it was, when a weight or a moment is NaN or Inf."""
    stored = stage_parameters(model, settings.stage, settings.context_tower) | masters.values
    weights = {name: value.detach() for name, value in stored.items()}
    state = {
        "settings": asdict(settings),
        "stretch": asdict(stretch),
        "weights": weights,
        "averages": masters.averages,
        "history": history,
    }
    state |= {key: optimizer.state_dict() for key, optimizer in masters.optimizers.items()}
    if bad := bad_names(_tensors(state)):
        raise ValueError(f"{len(bad)} tensors hold NaN or Inf ({', '.join(bad[:3])}{', ...' * (len(bad) > 3)})")

    write_atomically(out / STATE, lambda path: _write(state, path))


class _Telling:
    """A file for torch.save, which answers a full disk with a RuntimeError of its own: keeps the system's error."""

    def __init__(self, file: BinaryIO):
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def _write(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        telling = _Telling(file)
        try:
            torch.save(state, cast(BinaryIO, telling))  # which only writes and flushes
        except RuntimeError:
            if telling.error is not None:
                raise telling.error from None
            raise


def read_state(out: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What training.pt holds; None when there is none. ValueError for one that is damaged or holds NaN or Inf."""
    file = out / STATE
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        bad = bad_names(_tensors(state))
        state["settings"]["stage"], state["history"][-1]["step"]
    except Exception as error:  # a damaged file can fail anywhere in the reader
        why = f"{type(error).__name__}; delete it to begin anew"
        raise ValueError(f"{file}: not readable ({why})") from error
    if bad:
        raise ValueError(f"{file}: NaN or Inf in {', '.join(bad[:3])}: nothing can go on from it; delete it")
    return state


def load_state(
    out: Path,
    model: TwoTowerModel,
    masters: Masters,
    settings: TrainSettings,
    *,
    extend: bool = False,
) -> tuple[list[dict], Stretch, dict[str, tuple]]:
    """Put a stopped run back.

    Returns its history ([] when there is none), its schedule's last stretch, and the settings that are new: a change
    begins a stretch of its own.
    Raises ValueError when the run began under other settings and `extend` does not allow it.
    """
    state = read_state(out, model.device)
    if state is None:
        return [], Stretch(), {}
    history, stretch = state["history"], Stretch(**state.get("stretch", {}))
    changed = changed_settings(state["settings"], settings)
    if changed:
        fixed = any(k in FIXED for k in changed)
        if fixed or not extend:
            what = "; ".join(f"{k} was {was}, now {now}" for k, (was, now) in changed.items())
            how = "use a new folder" + ("" if fixed else ", or go on from its state (--accept settings)")
            raise ValueError(f"{out / STATE}: this run began with other settings ({what}); {how}")
        if settings.steps < len(history):
            raise ValueError(f"steps is {settings.steps}, but {len(history)} are made: expected at least as many")
        stretch = Stretch(len(history), history[-1]["learning_rate"])
    weights, parameters = state["weights"], stage_parameters(model, settings.stage, settings.context_tower)
    if strange := [name for name, p in parameters.items() if name not in weights or weights[name].shape != p.shape]:
        raise ValueError(f"{out / STATE}: this run is of another model: {some(strange)}; use a new folder")
    with torch.no_grad():
        for name, value in (*parameters.items(), *masters.values.items()):
            value.copy_(weights[name])
        averages = state.get("averages", {})
        for name, value in masters.averages.items():  # from the weights on, where none were kept before
            value.copy_(averages.get(name, masters.values[name]))
    for key, optimizer in masters.optimizers.items():
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state[key])
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group.update(ours)  # betas and weight decay are the settings', which may have changed
    return history, stretch, changed
