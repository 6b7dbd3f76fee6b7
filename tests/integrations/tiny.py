"""Tiny random models of transformers, of every type that ours are put into, computing in fp64."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

COMMON = dict(vocab_size=61, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts_per_tok=2, num_hidden_layers=2, **HEADS)
# Bamba's names, which Falcon-H1 and Granite share.
MIXER = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=4)
LAYERS = ["mamba", "attention", "mamba"]
# Of each type, by name: the config, with sizes that are unequal where they may be.
TINY: dict[str, dict[str, Any]] = {
    "nemotron_h": dict(
        hybrid_override_pattern="ME*-M",
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=12,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=4,
        intermediate_size=40,
        n_routed_experts=6,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=24,
        **HEADS,
    ),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2, chunk_size=4),
    "bamba": dict(intermediate_size=40, num_hidden_layers=3, attn_layer_indices=[1], **MIXER, **HEADS),
    "falcon_h1": dict(intermediate_size=40, num_hidden_layers=2, mamba_d_ssm=64, **MIXER, **HEADS),
    "zamba2": dict(
        intermediate_size=40,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        num_mem_blocks=1,
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=4,
        chunk_size=4,
        num_attention_heads=4,
    ),
    "granitemoehybrid": dict(
        intermediate_size=24,
        shared_intermediate_size=20,
        num_hidden_layers=3,
        layer_types=LAYERS,
        num_local_experts=6,
        num_experts_per_tok=2,
        **MIXER,
        **HEADS,
    ),
    "mixtral": dict(intermediate_size=24, num_local_experts=6, **EXPERTS),
    "qwen2_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        num_experts=6,
        **EXPERTS,
    ),
    "qwen3_moe": dict(moe_intermediate_size=24, num_experts=6, head_dim=8, norm_topk_prob=True, **EXPERTS),
    "olmoe": dict(intermediate_size=24, num_experts=6, **EXPERTS),
}
# Models whose attention alone is held against ours: windows shorter than the text, in all layers or every second one,
# and soft caps low enough to bend scores.
LIMITED: dict[str, dict[str, Any]] = {
    "mistral": dict(intermediate_size=40, num_hidden_layers=2, sliding_window=4, **HEADS),
    "gemma2": dict(
        intermediate_size=40,
        num_hidden_layers=3,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=5.0,
        **HEADS,
    ),
    "gemma3_text": dict(
        intermediate_size=40,
        num_hidden_layers=3,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **HEADS,
    ),
}
# Rows of 3 and 7 tokens, behind their padding.
IDS = torch.tensor([[0, 0, 0, 0, 5, 17, 9], [3, 44, 21, 8, 30, 12, 50]])
PADDED = (IDS != 0).long()
# What is to be predicted: not a row's first token, which padding would predict, whose outputs have no meaning.
LABELS = IDS.masked_fill(PADDED.cumsum(1) <= 1, -100)


class Wide(TorchFunctionMode):
    """fp32 means fp64. transformers' norms, routers and scans compute in fp32 whatever a model's dtype; so they do not,
    and two forms of one model differ by roundings of fp64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        wide = lambda value: torch.float64 if value is torch.float32 else value
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def tiny(model_type: str, **options: Any) -> Any:
    """A model whose every part matters, in fp64, on theirs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = (TINY | LIMITED)[model_type]
    config = AutoConfig.for_model(model_type, **(COMMON | sizes | options))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.normal_().mul_(p.shape[-1] ** -0.5)
                elif not name.endswith(("A_log", "dt_bias")):
                    p.add_(0.2 * torch.randn_like(p))
    if any(hasattr(m, "_apply_gate") for m in model.modules()):
        model.set_experts_implementation("eager")
    if model_type in LIMITED:  # the one implementation of theirs that has soft caps
        model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, attention_mask: Tensor | None = PADDED) -> Tensor:
    """Of the tokens that are none of padding: [tokens, V]."""
    with Wide():
        found = model(ids, attention_mask=attention_mask, use_cache=False).logits
    return found if attention_mask is None else found[attention_mask.bool()]


@torch.no_grad()
def greedy(model: Any, tokens: int = 5) -> tuple[Tensor, Tensor]:
    """So many tokens for each padded row, through the model's cache, and their logits [tokens, B, V]."""
    with Wide():
        out = model.generate(
            IDS,
            attention_mask=PADDED,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences, torch.stack(out.logits)


def gradients(model: Any, *, wide: bool = True) -> dict[str, Tensor]:
    """Of the loss of the tokens, by parameter. wide=False: fp32 stays, as a mode does not reach into a checkpoint."""
    model.train().zero_grad()
    with Wide() if wide else nullcontext():
        model(IDS, attention_mask=PADDED, labels=LABELS, use_cache=False).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative to the largest."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
