"""The published model's size with random weights, made where it runs."""

from __future__ import annotations

import torch

from tt_model import TwoTower, TwoTowerConfig
from tt_model.checkpoint.keys import parameter_dtype

# The sizes of nvidia/Nemotron-Labs-TwoTower-30B-A3B.
PUBLISHED = TwoTowerConfig(
    vocab_size=131072,
    hidden_size=2688,
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
    max_position_embeddings=262144,
    dtype=torch.bfloat16,
)


@torch.no_grad()
def random_on_device(config: TwoTowerConfig, device: str, dtype: torch.dtype) -> TwoTower:
    """A random model of any size, made where it runs. Both towers lie on the same memory, so that the published one
    takes 63 GB: a pass streams one tower, and its time does not depend on what the other holds."""
    with torch.device("meta"):
        model = TwoTower(config)
    torch.manual_seed(0)
    made: dict[str, torch.nn.Parameter] = {}
    for name, p in list(model.named_parameters()):
        shared = name.replace("denoiser_tower.", "context_tower.").removeprefix("context_")
        if shared not in made:
            made[shared] = torch.nn.Parameter(_drawn(name, p.shape, device, parameter_dtype(name, dtype)), False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[shared])
    return model


def _drawn(name: str, shape: torch.Size, device: str, dtype: torch.dtype) -> torch.Tensor:
    if name.endswith("A_log"):
        return torch.rand(shape, device=device).mul(15).add(1).log().to(dtype)
    if name.endswith("dt_bias"):
        return (torch.randn(shape, device=device) - 3).to(dtype)
    if len(shape) == 1:
        centre = 1.0 if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")) else 0.0
        return (centre + 0.1 * torch.randn(shape, device=device)).to(dtype)
    return torch.empty(shape, device=device, dtype=dtype).normal_(std=shape[-1] ** -0.5)
