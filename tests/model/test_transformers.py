"""The context tower against transformers' NemotronHForCausalLM, an independent implementation, on the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.models import as_nemotron_h, greedy_nemotron_h, raise_biases, random_model
from tt_model import TwoTower, TwoTowerConfig

pytest.importorskip("transformers")

# Relative to the largest logit: two fp32 implementations that sum in different orders differ by about 1e-6.
BOUND = 1e-5

SMALL = TwoTowerConfig(
    vocab_size=199,
    hidden_size=64,
    pattern="MEM*-E*M",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    mamba_num_heads=6,
    mamba_head_dim=20,
    ssm_state_size=16,
    n_groups=3,
    chunk_size=16,
    intermediate_size=88,
    n_routed_experts=12,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    moe_shared_expert_intermediate_size=56,
    routed_scaling_factor=1.7,
)
CONFIGS = {
    "one group of experts": SMALL,
    "grouped routing": replace(SMALL, n_group=4, topk_group=2),
    "weights of experts not normed": replace(SMALL, norm_topk_prob=False),
    "time steps clamped on both sides": replace(SMALL, time_step_limit=(0.03, 0.3)),
    "biases, SiLU, no bias in the convolution": replace(
        SMALL, pattern="M-M*-*M", use_bias=True, mlp_bias=True, use_conv_bias=False, mlp_hidden_act="silu"
    ),
    "one kernel tap more, another eps": replace(SMALL, conv_kernel=5, layer_norm_epsilon=1e-3),
}


def tower(config: TwoTowerConfig) -> TwoTower:
    model = random_model(config, towers="context", seed=1)
    raise_biases(model)
    return model


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_agree(name: str) -> None:
    model = tower(CONFIGS[name])
    peer = as_nemotron_h(model)
    ids = torch.randint(model.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(2))
    lengths = range(1, 71) if name == "grouped routing" else (1, 2, 15, 16, 17, 33, 70)
    for length in lengths:
        expected = peer(ids[:, :length], use_cache=False).logits
        assert expected.abs().max() > 1  # the weights are not so small that nothing would show
        assert error(model.context_logits(ids[:, :length]), expected) < BOUND, length
        # The rows as a ragged batch, through the cache.
        rows = [row[: max(1, length - 5 * b)] for b, row in enumerate(ids)]
        last = torch.stack([expected[b, len(row) - 1] for b, row in enumerate(rows)])
        assert error(model.prefill(rows).last_logits, last) < BOUND, length


@torch.no_grad()
def test_golden_models_agree(golden_model: Path) -> None:
    model = TwoTower.from_pretrained(golden_model, device="cpu", towers="context", progress=False)
    if model.config.n_group > 1:
        raise_biases(model)
    experts = "eager" if model.config.moe_intermediate_size % 4 else None  # its grouped products want aligned rows
    peer = as_nemotron_h(model, experts=experts)
    ids = torch.randint(model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(3))
    for length in (1, 2, 3, 7, 33, 64, 65, 70):
        expected = peer(ids[:, :length], use_cache=False).logits
        assert error(model.context_logits(ids[:, :length]), expected) < BOUND, length


@pytest.mark.filterwarnings("error::FutureWarning:bench", "error::FutureWarning:transformers")
def test_greedy_decoding_agrees() -> None:
    """32 tokens from the cache, against transformers' own cache; equal tokens also mean equal inputs to the end."""
    model = tower(CONFIGS["grouped routing"])
    peer = as_nemotron_h(model)
    ids = torch.randint(model.config.vocab_size, (70,), generator=torch.Generator().manual_seed(4))
    prompts = [ids[:length] for length in (1, 2, 3, 7, 33, 70)]
    ours = model.generate([p.tolist() for p in prompts], mode="ar", max_new_tokens=32, eos_token_id=None)
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        assert greedy_nemotron_h(peer, prompt[None], 32)[0].tolist() == tokens, len(prompt)
    generated = peer.generate(prompts[-1][None], max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert generated[0, len(prompts[-1]) :].tolist() == ours.tokens[-1]


def test_what_transformers_lacks_is_refused() -> None:
    for change in ({"attention_bias": True}, {"moe_shared_expert_intermediate_size": 0}):
        model = TwoTower(replace(SMALL, **change), towers="context")
        with pytest.raises(ValueError, match=next(iter(change))):
            as_nemotron_h(model)
