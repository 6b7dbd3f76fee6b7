"""`apply` in the remote code of the published TwoTower: in a stand-in of it, which is held to the golden files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from remote import MLP, ReLUSquaredActivation, TwoTowerStandIn
from safetensors.torch import load_file, save_file
from tiny import Wide, error
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt

BOUND = 1e-11  # fp64 on both sides, as in test_apply.py


def loaded(folder: Path) -> TwoTowerStandIn:
    """A golden checkpoint, computing in fp64."""
    model = TwoTowerStandIn(json.loads((folder / "config.json").read_text()))
    state = {name: t for file in folder.glob("model-*.safetensors") for name, t in load_file(file).items()}
    experts = {name: t for name, t in state.items() if name in model.state_dict()}
    assert experts.keys() == state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    return model.double().eval()


@pytest.fixture(scope="module")
def small(golden_dir: Path) -> Path:
    return golden_dir / "small"


@torch.no_grad()
def passes(model: TwoTowerStandIn, forward: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """What a golden file has of a prompt: logits of the prompt and of its blocks, and the caches."""

    def kept(prefix: str, cache: list[Any]) -> dict[str, Tensor]:
        names = dict(mamba=("conv_state", "ssm_state"), attention=("key", "value"))
        kinds = [block.block_type for block in model.context_tower.layers]
        pairs = [
            (j, name, t) for j, held in enumerate(cache) if held for name, t in zip(names[kinds[j]], held, strict=True)
        ]
        return {f"{prefix}.layer{j}.{name}": t[0] for j, name, t in pairs}

    with Wide():
        cache = model.empty_cache(1)
        found = {"context_logits": model.extend_context(forward[f"forward{i}.prompt"], cache)[0]}
        found |= kept("cache", cache)
        for j in range(4):
            tokens, t = (forward[f"forward{i}.block{j}.{name}"] for name in ("tokens", "t"))
            found[f"block{j}.denoiser_logits"] = model.denoise(tokens, t.double(), cache)[0]
        model.extend_context(forward[f"forward{i}.commit.tokens"], cache)
        return found | kept("commit.cache", cache)


@pytest.mark.parametrize("i", [1, 3])  # prompts of 3 and 33 tokens
def test_the_stand_in_is_the_published_model(golden_model: Path, i: int) -> None:
    forward = load_file(golden_model / "forward.safetensors")
    for name, got in passes(loaded(golden_model), forward, i).items():
        want = forward[f"forward{i}.{name}"]
        assert got.shape == want.shape and error(got, want.double()) < 1e-5, name  # as in test_golden.py


@pytest.mark.parametrize("i", [1, 3])
def test_it_is_the_same_model(golden_model: Path, i: int) -> None:
    model, forward = loaded(golden_model), load_file(golden_model / "forward.safetensors")
    before, state = passes(model, forward, i), {name: t.clone() for name, t in model.state_dict().items()}
    parameters = list(model.parameters())
    changes = tt.apply(model)
    found = {line.partition(":")[0] for line in changes.replaced}
    assert found == {"experts", "attention", "mamba", "norm"} and "routers, shared experts" in changes.left
    for name, got in passes(model, forward, i).items():
        assert error(got, before[name]) < BOUND, name
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {name: torch.equal(t, state[name]) for name, t in model.state_dict().items()} == dict.fromkeys(state, True)
    changes.undo()
    assert not any(name in vars(m) for m in model.modules() for name in ("moe", "forward", "_denoiser_block_mamba"))
    for name, got in passes(model, forward, i).items():
        assert torch.equal(got, before[name]), name


@pytest.mark.kernels
def test_a_block_behind_a_context(small: Path) -> None:
    """Five tokens behind three, and one more on the cache."""
    model, forward = loaded(small), load_file(small / "forward.safetensors")
    tokens, t = forward["forward1.block1.tokens"], torch.tensor([0.4]).double()

    @torch.no_grad()
    def run() -> list[Tensor]:
        with Wide():
            cache = model.empty_cache(1)
            model.extend_context(forward["forward1.prompt"], cache)
            found = model.denoise(tokens, t, cache)
            return [found, model.extend_context(tokens[:, :1], cache)]

    before = run()
    tt.apply(model)
    assert all(error(got, want) < BOUND for got, want in zip(run(), before, strict=True))


def slopes(model: TwoTowerStandIn, tokens: Tensor) -> dict[str, Tensor]:
    """Of the denoiser's loss, behind a context that has none."""
    model.zero_grad()
    with Wide():
        with torch.no_grad():
            cache = model.empty_cache(2)
            model.extend_context(tokens[:, :9], cache)
        logits = model.denoise(tokens[:, 9:], torch.tensor([0.3, 0.8]).double(), cache)
        logits.log_softmax(-1)[..., 7].mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_theirs(small: Path) -> None:
    model, tokens = loaded(small), torch.randint(4, 160, (2, 17), generator=torch.Generator().manual_seed(0))
    before = slopes(model, tokens)
    tt.apply(model)
    found = slopes(model, tokens)
    # theirs gives every expert a gradient, ours of zeros too where no token came by
    assert found.keys() == before.keys() and any("experts" in name for name in found)
    for name, slope in before.items():
        assert error(found[name], slope) < BOUND, name


def test_experts_are_joined_without_a_copy(small: Path, tmp_path: Path) -> None:
    """Parameters are rows of one tensor: what is written to them is seen, what moves them is followed."""
    model, forward = loaded(small), load_file(small / "forward.safetensors")
    moe = next(b.mixer for b in model.denoiser_tower.layers if b.block_type == "moe")
    run = lambda: passes(model, forward, 1)["block2.denoiser_logits"]
    tt.apply(model, attention=False, mamba=False, norm=False)
    first = run()
    rows = [expert.up_proj.weight for expert in moe.experts]
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1
    assert [row.storage_offset() for row in rows] == [i * rows[0].numel() for i in range(len(rows))]
    with torch.no_grad():
        for row in rows:
            row.mul_(1.5)
    changed = run()
    assert error(changed, first) > 1e-3
    model.float().double()
    assert error(run(), changed) < 1e-5  # moved, and rounded to fp32 once
    with torch.no_grad():
        rows[0].data = rows[0].detach().clone()  # one of them put elsewhere
        rows[0].mul_(2)
    assert error(run(), changed) > 1e-6 and rows[0].storage_offset() == 0
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())


class Odd(ReLUSquaredActivation):
    """Of another name, as another activation has."""


def spoil_activation(model: TwoTowerStandIn) -> None:
    for module in model.modules():
        if isinstance(module, MLP):
            module.act_fn = Odd()


def spoil_bias(model: TwoTowerStandIn) -> None:
    moe = next(b.mixer for b in model.context_tower.layers if b.block_type == "moe")
    moe.experts[2].down_proj.bias = nn.Parameter(torch.zeros(64).double())


def spoil_mamba(model: TwoTowerStandIn) -> None:
    model.denoiser_tower.layers[0].mixer.activation = "gelu"


@pytest.mark.parametrize(
    "spoil, part, reason",
    [
        (spoil_activation, "experts", "act_fn is Odd"),
        (spoil_bias, "experts", "have biases"),
        (spoil_mamba, "mamba", "activation is 'gelu'"),
    ],
)
def test_what_is_not_served_is_left(small: Path, spoil: Any, part: str, reason: str) -> None:
    model = loaded(small)
    spoil(model)
    changes = tt.apply(model)
    assert reason in changes.left[part] and not any(line.startswith(part) for line in changes.replaced)
    assert len(changes.replaced) > 2


def test_a_part_that_is_not_asked_for_is_left(small: Path) -> None:
    changes = tt.apply(loaded(small), experts=False, norm=False)
    assert {line.partition(":")[0] for line in changes.replaced} == {"attention", "mamba"}


def test_a_state_that_moves_on_has_no_gradients(small: Path) -> None:
    model = loaded(small)
    tt.apply(model)
    with Wide(), pytest.raises(NotImplementedError, match="mamba=False"):
        model.extend_context(torch.tensor([[5, 6]]), model.empty_cache(1))
