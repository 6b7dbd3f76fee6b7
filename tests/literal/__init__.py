"""The model written out token by token in fp64: the independent check of the fast reference implementation.

Naive on purpose. One sequence, no batch; loops over tokens, heads and experts; nothing of tt_kernels or tt_model. It
follows the paper and the published implementation step by step, so that they can be compared by reading.

All arithmetic is fp64, but for the roundings of the time embedding, which are part of the model (`time_embedding`).
`residual_in_fp32` changes nothing here, since fp64 is wider. `chunk_size`, `expand`, `time_step_min`, `time_step_max`,
`time_step_floor`, `rope_theta`, `partial_rotary_factor` and `max_position_embeddings` are no part of the mathematics.
A bias (`use_bias`, `mlp_bias`, `attention_bias`, `use_conv_bias`) is added where the configuration asks for it.
Its operations are tiny: run it on one thread.

A cache is a list with one entry a layer, never changed in place:
  M  {"conv_state": [C, conv_kernel] oldest column first, "ssm_state": [heads, mamba_head_dim, state]}
  *  {"key": [kv heads, tokens, head_dim], "value": the same}
  E and -  {}
"""

from .generation import (
    Generated,
    Noise,
    commit_rule,
    cut,
    generate_ar,
    generate_mask_diffusion,
    generate_mock_ar,
    mock_ar_logits,
    sample,
)
from .layers import (
    Cache,
    Model,
    append_key_value,
    attention,
    conv_step,
    experts,
    key_value,
    linear,
    load,
    mamba_step,
    mlp,
    modulate,
    relu2,
    rms_norm,
    route,
    silu,
    softmax,
    softplus,
    ssd_step,
    top,
)
from .towers import context_forward, denoise, empty_cache, time_conditioning, time_embedding

__all__ = [
    "Cache",
    "Generated",
    "Model",
    "Noise",
    "append_key_value",
    "attention",
    "commit_rule",
    "context_forward",
    "conv_step",
    "cut",
    "denoise",
    "empty_cache",
    "experts",
    "generate_ar",
    "generate_mask_diffusion",
    "generate_mock_ar",
    "key_value",
    "linear",
    "load",
    "mamba_step",
    "mlp",
    "mock_ar_logits",
    "modulate",
    "relu2",
    "rms_norm",
    "route",
    "sample",
    "silu",
    "softmax",
    "softplus",
    "ssd_step",
    "time_conditioning",
    "time_embedding",
    "top",
]
