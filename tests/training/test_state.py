"""tt_model/training/state.py: what is stored is finite, 16-bit weights have fp32 masters, a run is extended."""

import dataclasses
import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from test_train import fresh, text

from tt_model import TwoTower
from tt_model.checkpoint import parameter_dtype
from tt_model.stops import Stopped, handling
from tt_model.training import loop as train
from tt_model.training.loop import trainable
from tt_model.training.schedule import Stretch, TrainSettings, learning_rate
from tt_model.training.state import STATE, read_state


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_losses", lambda history, path: path.touch())


def run(model: TwoTower, s: TrainSettings, out: Path, **more) -> list[dict]:
    return train.train(model, text(), s, out, progress=False, **more)


def cast(model: TwoTower, dtype: torch.dtype) -> TwoTower:
    for name, p in model.named_parameters():
        p.data = p.data.to(parameter_dtype(name, dtype))
    return model


# ---- what is stored is finite ----


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_not_finite_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    s = TrainSettings("ar", steps=9, batch_size=2)
    run(fresh("ar"), s, tmp_path, stop_after=2)
    before = (tmp_path / STATE).read_bytes()
    update = train._Balance.update

    class Broken(torch.optim.AdamW):
        def step(self, *args) -> None:
            super().step(*args)
            p = self.param_groups[0]["params"][0]
            (p.data if what == "weight" else self.state[p]["exp_avg_sq"]).view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim, "AdamW", Broken)
    monkeypatch.setattr(train._Balance, "update", update)
    name = r"context_tower\.\S+" if what == "weight" else r"optimizer\.0\.exp_avg_sq"
    message = rf"step 2: 1 tensors hold NaN or Inf \({name}\); .*training\.pt stays as it was after step 2; lower the"
    with pytest.raises(ValueError, match=message):
        run(fresh("ar"), s, tmp_path, stop_after=1)
    assert (tmp_path / STATE).read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(train, "plot_losses", lambda history, path: path.touch())
    assert len(run(fresh("ar"), s, tmp_path, stop_after=1)) == 3  # and the run goes on


def test_a_held_out_loss_that_is_not_finite_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "held_out_loss", lambda *_: math.nan)
    with pytest.raises(ValueError, match="step 1: the held-out loss is nan; nothing is stored; lower"):
        run(fresh("ar"), TrainSettings("ar", steps=2, batch_size=2), tmp_path, held_out=text(4))
    assert list(tmp_path.iterdir()) == []


def test_a_stored_nan_is_refused(tmp_path: Path) -> None:
    s = TrainSettings("ar", steps=4, batch_size=2)
    run(fresh("ar"), s, tmp_path, stop_after=1)
    state = read_state(tmp_path)
    name = next(iter(state["weights"]))
    state["weights"][name].view(-1)[0] = math.nan
    torch.save(state, tmp_path / STATE)
    with pytest.raises(ValueError, match=rf"training\.pt: NaN or Inf in {name}"):
        run(fresh("ar"), s, tmp_path)


# ---- 16 bits ----


def test_fp16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is float16, .* expected bfloat16 or float32"):
        run(cast(fresh("ar"), torch.float16), TrainSettings("ar", steps=2, batch_size=2), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["ar", "denoiser"])
def test_bf16_learns_as_fp32_does_at_a_low_rate(stage: str, tmp_path: Path) -> None:
    """At 2e-5 a step changes nearly no bf16 weight by itself; over steps the masters move as fp32 weights do."""
    rates = dict(learning_rate=2e-5, final_learning_rate=2e-5, warmup=0, decay=0.0, weight_decay=0.0)
    s = TrainSettings(stage, steps=6, batch_size=2, **rates)
    moved, models = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = cast(fresh(stage), torch.bfloat16)  # the same start, in either
        start = {n: p.detach().float().clone() for n, p in trainable(model, stage).items()}
        models[dtype] = cast(model, dtype)
        out = tmp_path / str(dtype)
        run(models[dtype], s, out)
        weights = read_state(out)["weights"]
        assert all(weights[n].dtype == torch.float32 for n in start)
        moved[dtype] = {n: weights[n] - start[n] for n in start}
    for name, fp32 in moved[torch.float32].items():
        bf16 = moved[torch.bfloat16][name]
        # Gradients are rounded to 8 bits and Adam divides by their size: most moves are alike, few are not.
        assert bf16.norm().item() == pytest.approx(fp32.norm().item(), rel=0.15), name
        assert ((bf16 != 0) >= (fp32 != 0)).float().mean() > 0.95, name
    for name, p in trainable(models[torch.bfloat16], stage).items():
        master = read_state(tmp_path / "torch.bfloat16")["weights"][name]
        assert torch.equal(p, master.to(p.dtype)), name  # the model is the masters, rounded


def test_bf16_resumes_to_the_same_weights(tmp_path: Path) -> None:
    s = TrainSettings("ar", steps=6, batch_size=2, learning_rate=1e-4, warmup=1)
    straight = run(cast(fresh("ar"), torch.bfloat16), s, tmp_path / "a")
    run(cast(fresh("ar"), torch.bfloat16), s, tmp_path / "b", stop_after=3)
    resumed = run(cast(fresh("ar"), torch.bfloat16), s, tmp_path / "b")
    assert [h["loss"] for h in resumed] == [h["loss"] for h in straight]
    one, other = (read_state(tmp_path / name)["weights"] for name in "ab")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---- an extended run ----


def test_a_run_is_extended(tmp_path: Path) -> None:
    s = TrainSettings("ar", steps=4, batch_size=2, learning_rate=1e-3, final_learning_rate=1e-5, warmup=2, decay=0.5)
    first = run(fresh("ar"), s, tmp_path)
    assert first[-1]["learning_rate"] == 1e-5
    more = dataclasses.replace(s, steps=10, learning_rate=5e-4, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"steps was 4, now 10; .*use a new folder, or go on .* \(--accept settings\)"):
        run(fresh("ar"), more, tmp_path)
    optimizers = []
    original = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (optimizers.append(self), original(self))[1])
        run(fresh("ar"), more, tmp_path, extend=True, stop_after=2, note={"data": ["a", "b"]})
    assert {group["weight_decay"] for group in optimizers[0].param_groups} == {0.0}
    history = run(fresh("ar"), more, tmp_path)  # its settings are the run's now
    assert history[:4] == first and len(history) == 10
    stretch = Stretch(4, 1e-5)
    assert [h["learning_rate"] for h in history[4:]] == [learning_rate(i, more, stretch) for i in range(4, 10)]
    assert 1e-5 < history[4]["learning_rate"] < 5e-4 and history[-1]["learning_rate"] == 1e-5
    said = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    changed = {"data": ["a", "b"], "steps": [4, 10], "learning_rate": [1e-3, 5e-4], "weight_decay": [0.1, 0.0]}
    assert [entry.get("changed") for entry in said] == [None] * 4 + [changed] + [None] * 5
    with pytest.raises(ValueError, match=r"batch_size was 2, now 3\); use a new folder$"):
        run(fresh("ar"), dataclasses.replace(more, batch_size=3), tmp_path, extend=True)
    with pytest.raises(ValueError, match="steps is 9, but 10 are made"):
        run(fresh("ar"), dataclasses.replace(more, steps=9), tmp_path, extend=True)


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_keep_every_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before, loss, calls = signal.getsignal(number), train._loss, []

    def signalled(*args) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            for again in (number, signal.SIGTERM):  # a terminal that closes sends more than one
                os.kill(os.getpid(), again)
        return loss(*args)

    monkeypatch.setattr(train, "_loss", signalled)
    with pytest.raises(Stopped) as stop:
        run(fresh("ar"), TrainSettings("ar", steps=6, batch_size=2), tmp_path)
    assert stop.value.number == number and len(calls) == 3 and len(read_state(tmp_path)["history"]) == 3
    assert signal.getsignal(number) == before


def test_a_signal_during_the_last_save_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_losses", lambda history, path: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(fresh("ar"), TrainSettings("ar", steps=2, batch_size=2), tmp_path)
    assert len(read_state(tmp_path)["history"]) == 2


def test_an_ignored_signal_stays_ignored() -> None:
    seen, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(seen.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_a_thread(tmp_path: Path) -> None:
    """Signals are the main thread's; two runs of one process do not share a folder either."""
    done = []
    s = TrainSettings("ar", steps=2, batch_size=2)
    thread = threading.Thread(target=lambda: done.append(len(run(fresh("ar"), s, tmp_path))))
    thread.start()
    thread.join()
    assert done == [2]
