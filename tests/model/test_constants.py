"""What passes without gradients keep of the weights: made once, anew when a weight changes, never in training."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CONFIG, random_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tt_model import TwoTower
from tt_model.checkpoint import load, save
from tt_model.modeling.attention import Attention
from tt_model.modeling.constants import Constant
from tt_model.modeling.mamba2 import Mamba2

IDS = torch.arange(4, 12).view(1, 8)


class Counted(TorchFunctionMode):
    """Calls of torch's functions by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def counts(model: TwoTower, *names: str) -> list[int]:
    with Counted() as mode:
        model.context_logits(IDS)
    return [mode.calls.count(name) for name in names]


def part(model: TwoTower, kind: type[nn.Module]) -> nn.Module:
    return next(m for m in model.context_tower.modules() if isinstance(m, kind))


def untouched(model: TwoTower) -> Tensor:
    """Logits of a model with the same weights that has kept nothing."""
    fresh = TwoTower(model.config).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh.context_logits(IDS).detach()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # fp64: one product or three may add in another order


def test_a_second_pass_makes_none_again() -> None:
    model = random_model()
    first = counts(model, "exp", "linear")
    second = counts(model, "exp", "linear")
    mambas, attentions = (CONFIG.pattern.count(kind) for kind in "M*")
    assert first[0] - second[0] == mambas and first[1] == second[1]
    model.requires_grad_(True)
    assert counts(model, "exp", "linear") == [first[0], first[1] + 2 * attentions]


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.mul_(1.5),
    "through a view": lambda p: p.view(-1)[:3].add_(1.0),
    "detached": lambda p: p.detach().mul_(1.5),
    "other values": lambda p: setattr(p, "data", p.data * 1.5),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["A_log", "q_proj", "k_proj", "v_proj"])
def test_a_changed_parameter_is_seen(name: str, how: str) -> None:
    model = random_model()
    before = model.context_logits(IDS)
    mixer = part(model, Mamba2 if name == "A_log" else Attention)
    with torch.no_grad():
        CHANGES[how](mixer.A_log if name == "A_log" else getattr(mixer, name).weight)
    after = model.context_logits(IDS)
    assert (after - before).abs().max() > 1e-6
    close(after, untouched(model))


@pytest.mark.parametrize("way", ["load_state_dict", "assign", "load", "replaced", "optimiser"])
def test_other_weights_are_seen(way: str, tmp_path: Path) -> None:
    model, other = random_model(), random_model(seed=1)
    model.context_logits(IDS)
    if way == "load":
        save(other, tmp_path / "other")
        load(model, tmp_path / "other", device="cpu", dtype=torch.float64)
    elif way == "replaced":
        for module, theirs in zip(model.modules(), other.modules(), strict=True):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(dict(theirs.named_parameters())[name].clone(), p.requires_grad))
    elif way == "optimiser":
        model.requires_grad_(True)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        with torch.no_grad():
            model.context_logits(IDS)
        model.context_logits(IDS).square().sum().backward()
        optimiser.step()
        model.requires_grad_(False)
        close(model.context_logits(IDS), untouched(model))
        return
    else:
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=way == "assign")
    close(model.context_logits(IDS), other.context_logits(IDS))


def test_training_sees_the_parameters_themselves() -> None:
    model = random_model()
    model.context_logits(IDS)
    model.requires_grad_(True)
    model.context_logits(IDS).square().sum().backward()
    mamba, attention = part(model, Mamba2), part(model, Attention)
    for p in (mamba.A_log, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        assert p.grad is not None and p.grad.abs().max() > 0
    assert not mamba.A.of and not attention.qkv_weight.of  # whatever an optimiser does to a parameter, it is made anew


def test_a_frozen_tower_is_used_in_training_after_inference() -> None:
    model = random_model()
    with torch.inference_mode():
        model.context_logits(IDS)
    assert model.denoiser_tower is not None
    model.denoiser_tower.requires_grad_(True)
    clean = model.encode_clean(IDS, 8)
    model.denoise_all(clean, IDS, torch.ones(1, 1)).sum().backward()


def test_state_dict_and_copies() -> None:
    model = random_model()
    names = set(model.state_dict())
    logits = model.context_logits(IDS)
    assert set(model.state_dict()) == names == set(TwoTower(CONFIG).state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin.context_logits(IDS), logits)
        with torch.no_grad():
            part(twin, Mamba2).A_log.add_(1.0)
            part(twin, Attention).k_proj.weight.mul_(2.0)
        assert (twin.context_logits(IDS) - logits).abs().max() > 1e-6
    close(model.context_logits(IDS), logits)


def test_whatever_stands_in_for_a_projection_is_called() -> None:
    model = random_model()
    attention = part(model, Attention)
    handle = attention.k_proj.register_forward_hook(lambda module, args, out: out * 2)
    hooked = model.context_logits(IDS)
    handle.remove()
    attention.k_proj = nn.Sequential(attention.k_proj, Doubled())
    close(model.context_logits(IDS), hooked)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_the_memory_of_a_constant_stays() -> None:
    """A CUDA graph that read it goes on reading the newest."""
    p = nn.Parameter(torch.randn(5), requires_grad=False)
    constant = Constant(torch.exp)
    first = constant(p)
    assert constant(p) is first
    p.mul_(2)
    assert constant(p) is first and torch.equal(first, p.exp())


def test_biases_are_joined_too() -> None:
    model = random_model(replace(CONFIG, attention_bias=True))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part(model, Attention), name).bias.normal_()
    before = counts(model, "linear")
    got = model.context_logits(IDS)
    model.requires_grad_(True)
    assert counts(model, "linear") == [before[0] + 2 * CONFIG.pattern.count("*")]
    close(got, model.context_logits(IDS).detach())
