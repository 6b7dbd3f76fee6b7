"""A small random model for tests of the model and of what runs it."""

import torch

from tt_model import TwoTower, TwoTowerConfig
from tt_model.checkpoint import start_denoiser
from tt_model.training.loop import init_weights

CONFIG = TwoTowerConfig(
    vocab_size=50,
    hidden_size=24,
    pattern="M*E-ME*",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    intermediate_size=32,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    n_group=2,
    topk_group=1,
    max_position_embeddings=512,
    block_size=8,
    dtype=torch.float64,
)


def random_model(config: TwoTowerConfig = CONFIG, seed: int = 0) -> TwoTower:
    """Random weights, large enough that tokens, experts and confidences vary; fp64 so that ties do not happen."""
    model = TwoTower(config)
    init_weights(model, seed)
    start_denoiser(model, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model.to(config.dtype).requires_grad_(False)


def prompts_of(lengths: list[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(4, CONFIG.vocab_size, (n,), generator=g).tolist() for n in lengths]
