"""What other packages call what our ops compute, for docs/kernels.md. Read in their sources; what differs is said.

mamba_ssm, causal-conv1d: their repositories. FLA: fla-core 0.6.0, Liger: liger-kernel 0.8.5, where tests look names up.
vLLM, SGLang: stored copies of 2026. An empty string: nothing that we found.
"""

PACKAGES = ("mamba_ssm", "causal-conv1d", "vLLM", "SGLang", "FLA", "Liger")
# Where in a package the names stand that tests look up: a name of a table, then its module.
MODULES = {
    "FLA": {
        "rms_norm": "fla.modules.norm.layernorm",
        "rmsnorm_fn": "fla.modules.norm.layernorm_gated",
        "causal_conv1d": "fla.modules.causal_conv1d.ops",
        "causal_conv1d_update": "fla.modules.causal_conv1d.ops",
        "causal_conv1d_update_states": "fla.modules.causal_conv1d.ops",
        "chunk_simple_gla": "fla.ops.simple_gla.chunk",
        "fused_recurrent_simple_gla": "fla.ops.simple_gla.fused_recurrent",
        "parallel_attn": "fla.ops.attn.parallel",
        "fused_linear_cross_entropy_loss": "fla.modules.fused_linear_cross_entropy.ops",
    },
    "Liger": {
        "LigerRMSNorm": "liger_kernel.transformers.rms_norm",
        "LigerFusedAddRMSNorm": "liger_kernel.transformers.fused_add_rms_norm",
        "LigerModulatedRMSNorm": "liger_kernel.transformers.modulated_rms_norm",
        "LigerExperts": "liger_kernel.transformers.swiglu",
        "LigerFusedLinearCrossEntropyLoss": "liger_kernel.transformers.fused_linear_cross_entropy",
    },
}

_SCAN = {
    "mamba_ssm": "`mamba_chunk_scan_combined`",
    "vLLM": "`mamba_chunk_scan_combined_varlen`",
    "SGLang": "`mamba_chunk_scan_combined`",
    "FLA": "`chunk_simple_gla`, of C, B, dt x and dt A",
}
_TOKEN = {
    "mamba_ssm": "`selective_state_update`",
    "vLLM": "`selective_state_update`",
    "SGLang": "`selective_state_update`",
    "FLA": "`fused_recurrent_simple_gla`",
}
_CONV = dict.fromkeys(("causal-conv1d", "vLLM", "SGLang"), "`causal_conv1d_fn`") | {"FLA": "`causal_conv1d`"}
_UPDATE = dict.fromkeys(("causal-conv1d", "vLLM", "SGLang", "FLA"), "`causal_conv1d_update`")

ELSEWHERE: dict[str, dict[str, str]] = {
    "rms_norm": {
        "mamba_ssm": "`rms_norm_fn`",
        "vLLM": "`rms_norm`",
        "SGLang": "`RMSNorm`",
        "FLA": "`rms_norm`",
        "Liger": "`LigerRMSNorm`",
    },
    "modulated_rms_norm": {
        "mamba_ssm": "`rms_norm_fn` adds a residual, does not modulate",
        "vLLM": "`fused_add_rms_norm`: likewise",
        "SGLang": "`RMSNorm` with a residual: likewise",
        "FLA": "`rms_norm`: likewise",
        "Liger": "`LigerModulatedRMSNorm` modulates behind the norm, adds nothing; `LigerFusedAddRMSNorm` adds",
    },
    "gated_group_norm": {
        "mamba_ssm": "`rmsnorm_fn`, norm_before_gate=False",
        "vLLM": "`rms_norm_gated`, norm_before_gate=False",
        "SGLang": "`rms_norm_gated`, norm_before_gate=False",
        "FLA": "`rmsnorm_fn`, norm_before_gate=False",
    },
    "causal_conv1d": _CONV,
    "conv_advance": _UPDATE
    | {
        "causal-conv1d": "`causal_conv1d_update`, with outputs; `causal_conv1d_varlen_states`",
        "FLA": "`causal_conv1d_update_states`",
    },
    "conv_block_states": {},
    "ssd_step": _TOKEN,
    "ssd_block": _SCAN,
    "ssd_advance": {"mamba_ssm": "`mamba_chunk_scan_combined`, return_final_states: with outputs"},
    "ssd_chunk": _SCAN,
    "mamba_block": {"mamba_ssm": "`mamba_split_conv1d_scan_combined`, from an SSM state, without a conv state"},
    "mamba_advance": {},
    "mamba_step": {
        package: f"{_UPDATE.get(package, '`causal_conv1d_update` of causal-conv1d')}, then {_TOKEN[package]}"
        for package in ("mamba_ssm", "vLLM", "SGLang", "FLA")
    },
    "mamba_extend": {"vLLM": "`MambaMixer2`, a layer"},
    "experts": {
        "vLLM": "`fused_experts`",
        "SGLang": "its `fused_moe_triton_kernels`",
        "Liger": "`LigerExperts`: SwiGLU only",
    },
    "experts_norm": {},
    "route": {
        "vLLM": "`fused_topk_bias`, behind a product; in groups `grouped_topk`",
        "SGLang": "`moe_fused_gate`, behind a product",
    },
    "context_attention": {
        "vLLM": "`unified_attention`: causal",
        "SGLang": "`extend_attention_fwd`",
    },
    "append_attention": {"vLLM": "`reshape_and_cache_flash`, then `unified_attention`"},
    "causal_attention": {"FLA": "`parallel_attn`"},
    "block_diffusion_attention": {},
    "gumbel_noise": {},
    "sample": {"vLLM": "`TopKTopPSampler`: no confidence", "SGLang": "`Sampler`: no confidence"},
    "head_sample": {},
    "commit": {"SGLang": "`LowConfidence`, by threshold"},
    "unmask": {},
    "unmask_logits": {
        "SGLang": "`LowConfidence`, `JointThreshold` and other rules of its `dllm/algorithm`, a file each; the "
        "threshold of one block fused, `dllm_post_process`"
    },
    "remask": {"SGLang": "`JointThreshold` edits"},
    "linear_cross_entropy": {
        "FLA": "`fused_linear_cross_entropy_loss`",
        "Liger": "`LigerFusedLinearCrossEntropyLoss`",
    },
}
