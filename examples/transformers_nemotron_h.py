"""transformers' NemotronH on these kernels: experts, attention, Mamba-2 and norms, in a model that is there already.

    python -m examples.transformers_nemotron_h

`tt.apply` replaces what is served and says what it left; `undo` sets everything back. The weights are not copied. By
name, for any model with experts: `tt.register()`, then from_pretrained(..., attn_implementation="tt_kernels",
experts_implementation="tt_kernels").
"""

import torch
from torch import Tensor

from tt_kernels.integrations import transformers as tt

from .comparison import DEVICE, compare

# A tiny model of every kind of layer: Mamba-2 (M), experts (E), attention (*), MLP (-).
SIZES = dict(
    hybrid_override_pattern="MEM*-M",
    vocab_size=500,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=32,
    intermediate_size=96,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    moe_shared_expert_intermediate_size=64,
)


def random_model() -> torch.nn.Module:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = NemotronHForCausalLM(NemotronHConfig(**SIZES)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_().mul_(p.shape[-1] ** -0.5)  # every layer matters
    return model.to(DEVICE)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = random_model()
    prompts = torch.randint(3, SIZES["vocab_size"], (2, 40), device=DEVICE)
    mask = torch.ones_like(prompts)
    mask[0, :9] = 0  # a shorter prompt, padded on the left

    def logits() -> Tensor:
        return model(prompts, attention_mask=mask).logits[mask.bool()]

    def greedy() -> Tensor:
        return model.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)

    def ours(function) -> Tensor:  # theirs is what stands there before and after
        changes = tt.apply(model)
        try:
            return function()
        finally:
            changes.undo()

    print(changes := tt.apply(model))
    changes.undo()
    assert torch.equal(ours(greedy), greedy())
    compare("71 tokens of two padded prompts", lambda: ours(logits), logits)


if __name__ == "__main__":
    main()
