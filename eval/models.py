"""Models to compare: random ones, and transformers' form of a context tower.

transformers' NemotronHForCausalLM is an independent implementation. It differs in three places. Time steps: it ignores
`time_step_limit` and clamps at `time_step_min`, in the chunked scan only; the limits of the config are set here, and
must be (0, infinity) for cached decoding to agree. Grouped routing: experts outside the chosen groups score -inf, here
0, so agreement needs biased scores above 0 (`raise_biases`). Biases in attention and a mixture of experts without a
shared one do not exist there.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from tt_model import TwoTower, TwoTowerConfig
from tt_model.modeling.moe import MoE

if TYPE_CHECKING:
    from transformers import NemotronHForCausalLM

# What its config knows under the same name.
_SAME = (
    *("vocab_size", "hidden_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("layer_norm_epsilon", "mlp_hidden_act", "mlp_bias", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias", "use_bias"),
    *("chunk_size", "time_step_limit"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)

# The mid-size model of eval/cpu.py: every layer kind; the published widths over 5.25, as its hidden size is, with the
# same head and state sizes; 2 of 16 experts a token (published: 6 of 128).
MIDDLE = TwoTowerConfig(
    vocab_size=8192,
    hidden_size=512,
    pattern="MEMEM*-MEMEM*E",
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=12,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=4,
    intermediate_size=704,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=352,
    moe_shared_expert_intermediate_size=704,
    routed_scaling_factor=2.5,
)


@torch.no_grad()
def random_model(config: TwoTowerConfig, *, towers: str = "both", seed: int = 0) -> TwoTower:
    """A model whose every part matters: activations of order 1 all the way, decays from short to long, uneven experts.

    The same config and seed give the same weights, on the CPU, in fp32.
    """
    model = TwoTower(config, towers=towers)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if name.endswith("A_log"):
            p.copy_(torch.rand(p.shape, generator=g).mul(15).add(1).log())
        elif name.endswith("dt_bias"):
            p.copy_(noise - 3)
        elif name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            p.copy_(1 + 0.2 * noise)
        elif name.endswith("embeddings.weight"):
            p.copy_(noise)
        elif "scale_shift_tables" in name:
            p.copy_(torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1) + 0.1 * noise)
        elif p.dim() == 1:  # biases
            p.copy_(0.1 * noise)
        else:
            p.copy_(noise * p.shape[-1] ** -0.5)
    return model.requires_grad_(False)


@torch.no_grad()
def raise_biases(model: TwoTower) -> None:
    """Lift each layer's correction biases until none is negative, which leaves the choice in kept groups as it was."""
    for module in model.modules():
        if isinstance(module, MoE):
            bias = module.gate.e_score_correction_bias
            bias += (-bias.min()).clamp(min=0)


def as_nemotron_h(model: TwoTower, *, experts: str | None = None) -> NemotronHForCausalLM:
    """The context tower of a model as transformers' NemotronHForCausalLM, on the same memory.

    Args:
        model: with or without a denoiser.
        experts: one of `experts_implementations()`; None: what transformers takes by itself.
    Raises:
        ImportError: without transformers. ValueError: what it has no form of, by name.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    c = model.config
    if "*" in c.pattern and c.attention_bias:
        raise ValueError("attention_bias is True: transformers' Nemotron-H has none")
    if "E" in c.pattern and not c.moe_shared_expert_intermediate_size:
        raise ValueError("moe_shared_expert_intermediate_size is 0: transformers always has a shared expert")
    if c.residual_in_fp32 and model.dtype.itemsize < 4:
        raise ValueError("residual_in_fp32 is True: transformers' Nemotron-H ignores it")
    given = {name: getattr(c, name) for name in _SAME}
    # Sizes of layers that the pattern lacks are 0 here; it divides by some of them.
    given = {name: value for name, value in given.items() if value != 0 or isinstance(value, bool) or "_id" in name}
    config = NemotronHConfig(hybrid_override_pattern=c.pattern, tie_word_embeddings=False, **given)
    with torch.device("meta"):
        peer = NemotronHForCausalLM(config)
    names = {"context_tower.": "model.", "context_lm_head.": "lm_head."}
    weights = {
        new + name.removeprefix(old): parameter.detach()
        for name, parameter in model.named_parameters()
        for old, new in names.items()
        if name.startswith(old)
    }
    peer.load_state_dict(weights, strict=True, assign=True)
    for module in peer.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = c.time_step_limit
    if experts is not None:
        peer.set_experts_implementation(experts)
    return peer.eval().requires_grad_(False)


def experts_implementations() -> list[str]:
    """What transformers can be told to run experts with; some need a GPU or a package."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]


@torch.no_grad()
def greedy_nemotron_h(peer: NemotronHForCausalLM, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Cached greedy decoding [B, new_tokens], without transformers' `generate` around it, which takes its own time."""
    # transformers 5.24 calls it `cache`; the name before that goes in 5.40.
    cache = "cache" if "cache" in inspect.signature(peer.forward).parameters else "past_key_values"
    out = peer(ids, use_cache=True, logits_to_keep=1)
    tokens = []
    for i in range(new_tokens):
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        if i + 1 < new_tokens:
            out = peer(tokens[-1], use_cache=True, logits_to_keep=1, **{cache: out[cache]})
    return torch.cat(tokens, 1)
