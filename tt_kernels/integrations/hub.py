"""Layers for Hugging Face's `kernels`, by the names that transformers' models give theirs: what their forwards become.

    from transformers import KernelConfig

    layers = ("RMSNorm", "causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined")
    layers += ("selective_state_update",)
    config = KernelConfig({name: f"/path/of/the/folder:{name}" for name in layers}, use_local_kernel=True)
    model = AutoModelForCausalLM.from_pretrained(..., use_kernels=True, kernel_config=config)

`make hub` puts this file as `layers` into the folder that the Hub wants. A layer has a forward and two flags, nothing
else: `kernels` puts the forward into modules of other classes, whose forward has these parameters. What is not served
raises NotImplementedError with the reason.
"""

from typing import Any

from torch import Tensor, nn

from .transformers import mamba, norms


class RMSNorm(nn.Module):
    """Of a module with `weight` and `variance_epsilon`: hidden_states [*, D] -> [*, D], by `rms_norm`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return norms.FORWARD["RMSNorm"](self, hidden_states)


class causal_conv1d_fn(nn.Module):
    """hidden_states [B, C, L] -> [B, C, L], by `causal_conv1d`."""

    can_torch_compile = True
    has_backward = False  # on a GPU: in training theirs runs

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **given: Any,
    ) -> Tensor:
        return mamba.causal_conv1d_fn(hidden_states, weight, bias, activation, **given)


class causal_conv1d_update(nn.Module):
    """hidden_states [B, C, L] -> [B, C, L]; conv_state [B, C, K] moves on in place, by `conv_advance`."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        return mamba.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


class mamba_chunk_scan_combined(nn.Module):
    """hidden_states [B, L, H, P] -> [B, L, H, P], with return_final_states also [B, H, P, N], by `ssd_chunk`."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **given: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        given |= dict(dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states)
        return mamba.mamba2_chunk_scan(hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, **given)


class selective_state_update(nn.Module):
    """hidden_states, dt [B, H, P] -> [B, H, P]; state [B, H, P, N] moves on in place, by `ssd_step`."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        given |= dict(dt_softplus=dt_softplus, z=z)
        return mamba.mamba2_selective_state_update(state, hidden_states, dt, A, B, C, D, dt_bias, **given)
