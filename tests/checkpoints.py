"""Small models, and folders that hold them, for the tests of tt_model.checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tt_model.checkpoint import load, parameter_dtype
from tt_model.config import TwoTowerConfig
from tt_model.two_tower import TwoTower

CONFIG = TwoTowerConfig(
    vocab_size=29,
    hidden_size=12,
    pattern="ME*-E",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    mamba_num_heads=4,
    mamba_head_dim=5,
    ssm_state_size=7,
    n_groups=2,
    intermediate_size=9,
    n_routed_experts=11,
    num_experts_per_tok=3,
    moe_intermediate_size=5,
    moe_shared_expert_intermediate_size=8,
    routed_scaling_factor=2.5,
)
SHARD = 8_000  # bytes: several files, and a layer's experts in more than one


def model_of(config: TwoTowerConfig = CONFIG, towers: str = "both", seed: int = 0) -> TwoTower:
    """A model with random weights on the CPU, in the types that a model of `config.dtype` has."""
    with torch.device("meta"):
        model = TwoTower(config, towers=towers)
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.randn(p.shape, generator=generator).to(parameter_dtype(name, config.dtype))
        model.get_submodule(path).register_parameter(leaf, torch.nn.Parameter(value))
    return model


def meta_model(config: TwoTowerConfig = CONFIG, towers: str = "both") -> TwoTower:
    with torch.device("meta"):
        return TwoTower(config, towers=towers)


def loaded(folder: Path, config: TwoTowerConfig = CONFIG, towers: str = "both", dtype=torch.float32) -> TwoTower:
    model = meta_model(config, towers)
    load(model, folder, device="cpu", dtype=dtype, towers=towers)
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(ours) == list(theirs)
    for name, p in ours.items():
        assert p.dtype == theirs[name].dtype, name
        assert torch.equal(p, theirs[name]), name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder's weights in one file after `change`."""
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def plain(
    folder: Path, config: TwoTowerConfig = CONFIG, *, prefix: str = "backbone.", stacked: bool = False
) -> TwoTower:
    """Write a context tower as a plain Nemotron-H; returns it."""
    model = model_of(config, "context")
    tensors = {}
    for name, p in model.named_parameters():
        key = name.replace("context_tower.", prefix).replace("context_lm_head.", "lm_head.")
        if ".experts." in key and not stacked:
            head, _, kind = key.rpartition(".")
            tensors |= {f"{head}.{j}.{kind}.weight": part.detach().clone() for j, part in enumerate(p)}
        else:
            tensors[key] = p.detach()
    tensors["mtp.layers.0.norm.weight"] = torch.ones(3)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    values = {k: v for k, v in config.to_dict().items() if k not in ("mask_token_id", "block_size")}
    (folder / "config.json").write_text(json.dumps(values))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
