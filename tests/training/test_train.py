"""Training: schedule, resumption to the same losses, what learns and what stays, that it learns at all."""

import dataclasses
import os
import signal
from itertools import pairwise

import pytest
import torch
from models import CONFIG, random_model

from tt_model import TwoTower
from tt_model.checkpoint import start_denoiser
from tt_model.modeling.moe import MoE
from tt_model.training.data import Rows
from tt_model.training.loop import init_weights, train, trainable
from tt_model.training.schedule import TrainSettings, learning_rate

CONFIG32 = dataclasses.replace(CONFIG, dtype=torch.float32)


def text(rows: int = 12, length: int = 32) -> Rows:
    """Counting, with a fixed stride per document: something a small model can learn."""
    starts, ids = [], []
    for d in range(rows):
        starts.append(len(ids))
        ids += [4 + (d + (1 + d % 2) * i) % 40 for i in range(length)]
    return Rows(torch.tensor(ids, dtype=torch.int32), torch.tensor([*starts, len(ids)]), length, newlines=[20])


def fresh(stage: str) -> TwoTower:
    model = TwoTower(CONFIG32, towers="context" if stage == "ar" else "both")
    init_weights(model, 3)
    if stage == "denoiser":
        start_denoiser(model, seed=3)
    return model


def test_schedule():
    s = TrainSettings("ar", steps=100, learning_rate=1e-3, final_learning_rate=1e-5, warmup=10, decay=0.3)
    rates = [learning_rate(i, s) for i in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[69] == pytest.approx(1e-3)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[70:]))
    assert rates[70] == pytest.approx(1e-5 + (1e-3 - 1e-5) * 29 / 30) and rates[-1] == 1e-5


@pytest.mark.parametrize("stage", ["ar", "denoiser"])
def test_resumes_to_the_same_losses(stage, tmp_path):
    s = TrainSettings(stage, steps=8, batch_size=2, learning_rate=3e-3, warmup=2, seed=5)
    straight = train(fresh(stage), text(), s, tmp_path / "a", held_out=text(4), save_every=3, progress=False)
    train(fresh(stage), text(), s, tmp_path / "b", held_out=text(4), save_every=3, stop_after=5, progress=False)
    again = fresh(stage)
    with torch.no_grad():
        trained = trainable(again, stage)
        for p in trained.values():
            p.zero_()  # what is resumed comes from the file alone
    stopped = train(again, text(), s, tmp_path / "b", held_out=text(4), save_every=3, progress=False)
    assert [h["loss"] for h in stopped] == [h["loss"] for h in straight]
    assert stopped[-1]["held_out"] == straight[-1]["held_out"]
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"training.pt", "log.jsonl", "loss.png"}
    assert (tmp_path / "b" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("stage", ["ar", "denoiser"])
def test_a_compiled_model_trains_as_it_would_otherwise(stage, tmp_path):
    """The same losses, the same names in what is stored: either goes on from the other's state."""
    compiled = lambda module: torch.compile(module, backend="eager")

    def parts() -> TwoTower:
        model = fresh(stage)
        model.context_lm_head, model.context_tower.norm_f = map(
            compiled, (model.context_lm_head, model.context_tower.norm_f)
        )
        return model

    s = TrainSettings(stage, steps=4, batch_size=2, learning_rate=3e-3, warmup=2)
    straight = train(fresh(stage), text(), s, tmp_path / "straight", progress=False)
    for way, make in {"whole": lambda: compiled(fresh(stage)), "parts": parts}.items():
        train(make(), text(), s, tmp_path / way, stop_after=2, progress=False)
        states = [torch.load(tmp_path / run / "training.pt") for run in ("straight", way)]
        assert list(states[0]["weights"]) == list(states[1]["weights"])
        for model in (make(), fresh(stage)):
            resumed = train(model, text(), s, tmp_path / way, progress=False)
            assert [h["loss"] for h in resumed] == [h["loss"] for h in straight]
    model = parts()
    init_weights(model, 3)
    assert all(map(torch.equal, trainable(model, "ar").values(), trainable(fresh("ar"), "ar").values()))


def test_the_state_of_another_model_is_refused(tmp_path):
    s = TrainSettings("ar", steps=4, batch_size=2)
    train(fresh("ar"), text(), s, tmp_path, stop_after=1, progress=False)
    wide = TwoTower(dataclasses.replace(CONFIG32, vocab_size=2 * CONFIG32.vocab_size), towers="context")
    init_weights(wide, 3)
    with pytest.raises(ValueError, match=r"training.pt: this run is of another model: .*context_lm_head.weight"):
        train(wide, text(), s, tmp_path, progress=False)


def test_other_settings_do_not_resume(tmp_path):
    s = TrainSettings("ar", steps=4, batch_size=2)
    train(fresh("ar"), text(), s, tmp_path, stop_after=1, progress=False)
    with pytest.raises(ValueError, match="batch_size was 2, now 3"):
        train(fresh("ar"), text(), dataclasses.replace(s, batch_size=3), tmp_path, progress=False)


def test_only_the_denoiser_learns(tmp_path):
    model = random_model(CONFIG32).float()
    before = {n: p.clone() for n, p in model.named_parameters()}
    s = TrainSettings("denoiser", steps=3, batch_size=2, learning_rate=1e-2, warmup=0)
    train(model, text(), s, tmp_path, progress=False)
    for name, p in model.named_parameters():
        frozen = name.startswith("context_") or ".mixer.gate." in name
        unused = "e_score" in name
        assert torch.equal(p, before[name]) == (frozen or unused), name


@pytest.mark.parametrize("stage", ["ar", "denoiser"])
def test_learns(stage, tmp_path):
    s = TrainSettings(stage, steps=60, batch_size=4, learning_rate=1e-2, warmup=5)
    losses = [h["loss"] for h in train(fresh(stage), text(), s, tmp_path, save_every=1000, progress=False)]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_balance_moves_the_router_bias(tmp_path):
    model = fresh("ar")
    train(model, text(), TrainSettings("ar", steps=2, batch_size=2), tmp_path, progress=False)
    biases = [m.e_score_correction_bias for m in model.context_tower.modules() if hasattr(m, "e_score_correction_bias")]
    assert biases and all(b.abs().max() > 0 for b in biases)


def test_a_failed_run_leaves_the_model_as_it_was(tmp_path):
    model = fresh("ar")
    model.context_lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="step 0: the loss is nan"):
        train(model, text(), TrainSettings("ar", steps=2, batch_size=2), tmp_path, progress=False)
    assert all(m.load is None for m in model.modules() if isinstance(m, MoE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stage="both"), "stage is 'both'"),
        (dict(steps=0), "steps is 0"),
        (dict(learning_rate=0.0), "learning_rate is 0.0"),
        (dict(decay=2.0), "decay is 2.0"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"stage": "ar", **change})


def test_denoiser_needs_a_denoiser(tmp_path):
    with pytest.raises(ValueError, match="there is no denoiser"):
        train(TwoTower(CONFIG32, towers="context"), text(), TrainSettings("denoiser"), tmp_path, progress=False)


def test_ctrl_c_keeps_every_whole_step(tmp_path, monkeypatch):
    s = TrainSettings("ar", steps=6, batch_size=2)
    straight = train(fresh("ar"), text(), s, tmp_path / "a", progress=False)
    rows, calls = text(), []

    def batch(step, *args, **kwargs):
        calls.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the fourth step
        return Rows.batch(rows, step, *args, **kwargs)

    monkeypatch.setattr(rows, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        train(fresh("ar"), rows, s, tmp_path / "b", progress=False)
    assert calls == [0, 1, 2, 3]
    resumed = train(fresh("ar"), text(), s, tmp_path / "b", progress=False)
    assert [h["loss"] for h in resumed] == [h["loss"] for h in straight]


def test_a_corrupt_state_is_named(tmp_path):
    (tmp_path / "training.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"training.pt: not readable .*delete it to begin anew"):
        train(fresh("ar"), text(), TrainSettings("ar"), tmp_path, progress=False)
