"""The ops of a two-tower Mamba-2, attention and mixture-of-experts model. They know nothing of the model.

Every op has a twin of the same name and signature in `tt_kernels.reference`: plain PyTorch, the specification, and what
runs on a CPU. On a GPU Triton kernels run. Where Triton is not installed, `tt_kernels.reference` is all there is.
"""

try:
    import triton as _triton  # noqa: F401  asked for once, here
except ImportError as _error:
    _missing = str(_error)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"tt_kernels.{name} needs Triton ({_missing}); tt_kernels.reference does without")
        raise AttributeError(f"module 'tt_kernels' has no attribute {name!r}")

else:
    from .attention import (
        AttentionWithLSE,
        append_attention,
        block_diffusion_attention,
        causal_attention,
        context_attention,
    )
    from .conv1d import causal_conv1d, conv_advance, conv_block_states
    from .loss import linear_cross_entropy
    from .moe import ExpertWeights, Matrix, Routing, experts, experts_norm, route
    from .norm import Modulated, gated_group_norm, modulated_rms_norm, rms_norm
    from .runtime.checks import skip_checks, trusted
    from .runtime.registry import use
    from .sampling import (
        Committed,
        Remasked,
        Remasking,
        Sampled,
        Sampling,
        Strategy,
        Unmasked,
        commit,
        gumbel_noise,
        head_sample,
        remask,
        sample,
        unmask,
        unmask_logits,
    )
    from .ssm import (
        MambaState,
        MambaWeights,
        SSDChunk,
        mamba_advance,
        mamba_block,
        mamba_extend,
        mamba_step,
        ssd_advance,
        ssd_block,
        ssd_chunk,
        ssd_step,
    )

__all__ = [
    "AttentionWithLSE",
    "Committed",
    "ExpertWeights",
    "MambaState",
    "MambaWeights",
    "Matrix",
    "Modulated",
    "Remasked",
    "Remasking",
    "Routing",
    "SSDChunk",
    "Sampled",
    "Sampling",
    "Strategy",
    "Unmasked",
    "append_attention",
    "block_diffusion_attention",
    "causal_attention",
    "causal_conv1d",
    "commit",
    "context_attention",
    "conv_advance",
    "conv_block_states",
    "experts",
    "experts_norm",
    "gated_group_norm",
    "gumbel_noise",
    "head_sample",
    "linear_cross_entropy",
    "mamba_advance",
    "mamba_block",
    "mamba_extend",
    "mamba_step",
    "modulated_rms_norm",
    "remask",
    "rms_norm",
    "route",
    "sample",
    "skip_checks",
    "ssd_advance",
    "ssd_block",
    "ssd_chunk",
    "ssd_step",
    "trusted",
    "unmask",
    "unmask_logits",
    "use",
]
