"""`python -m eval.experiments`: a page from nothing at a tiny size, stopped and gone on with; what it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import measure
from eval.experiments import __main__ as command
from eval.experiments import overlap, page, work
from eval.experiments.plan import BLOCKS, Pilot
from eval.intervals import Estimate
from eval.models import random_model
from tt_model import TwoTowerConfig, checkpoint
from tt_model.training import loop
from tt_model.training.boilerplate import corpus
from tt_model.training.data import train_tokenizer

CONFIG = TwoTowerConfig(
    vocab_size=300, hidden_size=16, pattern="M*E", num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8, n_groups=1, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, moe_shared_expert_intermediate_size=8, block_size=8,
)  # fmt: skip


class Tiny(Pilot):
    """The smallest pilot that has every part."""

    def __init__(self) -> None:
        given = {"batch-size": 2, "row-length": 64, "warmup": 1, "learning-rate": 1e-3}
        denoiser = {"steps": 4, "block-size": 8} | given
        model = "--rules static=4 --thresholds 0.8 --specifications 2 --new-tokens 8"
        super().__init__(40, denoiser, (0.8,), 2, 8, model, (8, 16))

    def runs(self):
        return [run for run in super().runs() if run.name in ("base", "seed", "first-32", "curriculum")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([corpus.document(i) for i in range(40)], 300).save(str(folder / "tokenizer.json"))
    checkpoint.save(random_model(CONFIG), folder / "both", tokenizer=folder, progress=False)
    return folder / "both"


@pytest.fixture
def call(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(loop, "plot_losses", lambda history, path: path.touch())
    monkeypatch.setenv("TT_COMMIT", "0123456789ab")
    places = {name: str(tmp_path / name) for name in ("work", "results", "out")}
    words = [w for name, place in places.items() for w in (f"--{name}", place)]
    return lambda *more: command.main([*words, "--model", str(model), *more], Tiny())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for file in (folder / "results").glob("*.jsonl") for line in file.read_text().splitlines()]


def test_a_page_from_nothing(call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--dry-run") == 0
    out = capsys.readouterr().out
    assert "base: 4 steps left of " in out and "curriculum: 2 steps left of " in out and "quality base, block 16" in out
    assert call("--only", "threshold", "experts") == 0
    written = (tmp_path / "out" / "experiments.md").read_text()
    assert "| static 4 " in written and "Independent even draws" in written and written.count("Not measured yet") == 3
    assert call("--minutes", "0") == 0, "there is no time for anything"
    assert "time is over: 7 lines are missing" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 2
    assert call() == 0
    found = lines(tmp_path)
    assert len(found) == 9 and len({(x["kind"], x["run"], x.get("sampled")) for x in found}) == 9
    assert call() == 0 and len(lines(tmp_path)) == 9, "nothing is made twice"
    assert "training: 0 minutes; 0 measurements: none" in (call("--dry-run"), capsys.readouterr().out)[1]
    written = (tmp_path / "out" / "experiments.md").read_text()
    assert "Not measured yet" not in written and "Another seed changes the held-out loss by " in written
    assert len(list((tmp_path / "out").glob("*.svg"))) == len(BLOCKS)
    assert call("--check") == 0
    (tmp_path / "results" / "notes.md").write_text("## block\n\nIt collapses.\n\n## towers\n\nNothing.\n")
    assert call("--check") == 1 and call("--render") == 0 and call("--check") == 0
    assert "It collapses.\n\n## Time conditioning" in (tmp_path / "out" / "experiments.md").read_text()
    (tmp_path / "work" / "start.json").write_text("{}")
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    assert call("--only", "towers") == 2 and "is of another start" in capsys.readouterr().err


def test_a_training_run_is_stopped_in_the_middle(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When time is over the step is ended and saved; the next call goes on with it."""
    clock, loss = work.Clock(60), loop._loss
    monkeypatch.setattr(command, "Clock", lambda minutes: clock)

    def late(model, batch, s, step):
        if s.stage == "denoiser" and step == 2:
            clock.end = 0.0
            clock.timer.function(*clock.timer.args)  # what the timer would do
        return loss(model, batch, s, step)

    monkeypatch.setattr(loop, "_loss", late)
    assert call("--only", "towers") == 0
    log = tmp_path / "work" / "base" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 3 and lines(tmp_path) == []
    clock.end = math.inf
    monkeypatch.setattr(work.Experiments, "missing", lambda self, only: [j for j in self.jobs() if j.run == "base"][:1])
    assert call("--only", "towers") == 0
    assert len(log.read_text().splitlines()) == 4 and [x["steps"] for x in lines(tmp_path)] == [4]


@pytest.mark.skipif(not (measure.ROOT / "docs/experiments.md").is_file(), reason="nothing is rendered yet")
def test_the_page_is_what_is_recorded() -> None:
    assert command.main(["--check"]) == 0


def test_different_experts() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [2, 3], [0, 3]])
    assert overlap.distinct(ids, 2, 4).tolist() == [2, 3] and overlap.distinct(ids, 4, 4).tolist() == [4]
    assert overlap.expected(torch.full((128,), 6 / 128), 16) == pytest.approx(68.6, abs=0.05)

    def simulated(share: Tensor) -> float:
        g = torch.Generator().manual_seed(0)
        return float((torch.rand(20000, 4, 2, generator=g) < share[:, None]).any(-1).sum(-1).float().mean())

    share = torch.tensor([0.9, 0.5, 0.1, 0.5])
    assert overlap.expected(share, 2) == pytest.approx(simulated(share), abs=0.02)


def test_what_is_said_follows_from_the_figures() -> None:
    low, high, wide = Estimate(0.1, 0.05, 0.2), Estimate(0.8, 0.7, 0.9), Estimate(0.5, 0.1, 0.95)
    assert [page.falls(high, low), page.falls(low, high), page.falls(low, wide), page.falls(None, low)] == [
        *("yes", "no: higher", "open", "-"),
    ]
    assert [page.beside(e, 0.6) for e in (high, low, wide, None)] == ["yes", "no: lower", "open", "-"]
    losses = {"base": 1.0, "seed": 1.1, "a": 0.95, "b": 0.8, "c": 1.2}
    said = page.beyond_noise(losses, {name: name.upper() for name in losses})
    assert said.endswith("by 0.100. By more than that lower: B; higher: C.")


def test_each_run_changes_what_it_says() -> None:
    pilot = Pilot()
    assert len({pilot.digest(run.name) for run in pilot.runs()}) == len(pilot.runs())
    parsed = lambda name: {k: v for k, v in vars(pilot.parsed(name)).items() if k not in ("out", "parser")}
    base = parsed("base")
    for run in pilot.runs()[1:]:
        changed = {name for name, value in parsed(run.name).items() if base[name] != value}
        assert changed == {*(name.replace("-", "_") for name in run.options), *["model"] * (run.start != "ar")}, (
            run.name
        )
    assert pilot.chain("curriculum") == ["first-32", "curriculum"]
    half = [pilot.parsed(name) for name in ("first-32", "curriculum")]
    assert sum(o.steps for o in half) == base["steps"] and [o.block_size for o in half] == [32, 16]
    assert math.isinf(command.make_parser().parse_args([]).minutes)
