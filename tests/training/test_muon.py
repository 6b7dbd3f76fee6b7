"""tt_model/training/muon.py: orthogonal updates as large as AdamW's, of the matrices inside the towers alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_train import fresh, text

from tt_model.training import loop as train
from tt_model.training.loop import trainable
from tt_model.training.muon import Muon, orthogonal
from tt_model.training.schedule import TrainSettings
from tt_model.training.state import STATE, Masters, is_inner, read_state

S = TrainSettings("ar", steps=6, batch_size=2, learning_rate=1e-3, warmup=1, optimizer="muon")


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_losses", lambda history, path: path.touch())


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 16, 16), (2, 5, 40)])
def test_singular_values_near_one_in_the_same_directions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(x)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ found @ vh.mT  # diagonal where the singular vectors are the same
    assert torch.allclose(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)), atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_an_update_is_as_large_as_adamws() -> None:
    """0.2 a weight, at a rate of 1: what AdamW's comes to in training (arXiv 2502.16982); weights decay as its do."""
    p = torch.nn.Parameter(torch.ones(48, 96))
    optimizer = Muon([p], lr=0.01, weight_decay=0.5)
    p.grad = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    update = (p.detach() - (1 - 0.01 * 0.5)) / 0.01
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)
    before, p.grad = p.detach().clone(), None
    optimizer.step()
    assert torch.equal(p, before)  # what has no gradient stays


def test_a_stack_is_its_matrices() -> None:
    g = torch.Generator().manual_seed(2)
    stack, gradients = torch.randn(3, 8, 12, generator=g), [torch.randn(3, 8, 12, generator=g) for _ in range(3)]
    whole, parts = stack.clone().requires_grad_(), [m.clone().requires_grad_() for m in stack]
    one, many = Muon([whole], 0.1, 0.1), Muon(parts, 0.1, 0.1)
    for gradient in gradients:
        whole.grad = gradient
        for part, own in zip(parts, gradient, strict=True):
            part.grad = own
        one.step()
        many.step()
    assert torch.allclose(whole, torch.stack(list(parts)), atol=1e-5)


def test_what_it_learns() -> None:
    """The mixers' matrices; embeddings, head, router, convolution, time modules and vectors are AdamW's."""
    model = fresh("denoiser")
    learned = trainable(model, "denoiser", "trained")
    masters = Masters(learned, dataclasses.replace(S, stage="denoiser", context_tower="trained"))
    inner = {id(p) for group in masters.optimizers["muon"].param_groups for p in group["params"]}
    others = {id(p) for group in masters.optimizers["optimizer"].param_groups for p in group["params"]}
    assert inner.isdisjoint(others) and len(inner) + len(others) == len(learned)
    names = {name.split(".mixer.")[-1] for name, p in learned.items() if id(p) in inner}
    assert {"in_proj.weight", "out_proj.weight", "q_proj.weight", "experts.up_proj", "experts.down_proj"} <= names
    assert not [name for name in names if any(part in name for part in ("gate", "conv1d", "bias", "norm", "A_log"))]
    assert all(is_inner(name, p) == (id(p) in inner) for name, p in learned.items())
    assert "muon" not in Masters(learned, dataclasses.replace(S, stage="denoiser", optimizer="adamw")).optimizers


def test_it_learns_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    run = lambda name, s=S, **more: train.train(fresh("ar"), text(), s, tmp_path / name, progress=False, **more)
    straight = run("a")
    run("b", stop_after=3)
    resumed = run("b")
    assert [h["loss"] for h in resumed] == [h["loss"] for h in straight]
    assert straight[-1]["loss"] < straight[0]["loss"]
    one, other = (read_state(tmp_path / name)["weights"] for name in "ab")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(ValueError, match=r"optimizer was muon, now adamw\); use a new folder$"):
        run("b", dataclasses.replace(S, optimizer="adamw"), extend=True)
    state = read_state(tmp_path / "b")
    next(iter(state["muon"]["state"].values()))["momentum"].view(-1)[0] = torch.nan
    torch.save(state, tmp_path / "b" / STATE)
    with pytest.raises(ValueError, match=r"NaN or Inf in muon\.0\.momentum"):
        run("b")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer is 'sgd', expected one of adamw, muon"):
        TrainSettings("ar", optimizer="sgd")
