"""transformers' RMS norms, plain and gated, by ours."""

from typing import Any

from torch import Tensor

from ... import gated_group_norm, rms_norm


def _plain(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _gated(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    if gate is None:
        raise NotImplementedError(f"tt_kernels: {type(self).__name__}: gate is None, served is a gated norm")
    if getattr(self, "norm_before_gate", False):
        raise NotImplementedError(f"tt_kernels: {type(self).__name__}.norm_before_gate is True, served is False")
    D = hidden_states.shape[-1]
    groups = D // self.group_size if hasattr(self, "group_size") else getattr(self, "n_groups", 1)
    return gated_group_norm(hidden_states, gate, self.weight, groups=groups, eps=self.variance_epsilon)


FORWARD = {"RMSNorm": _plain, "RMSNormGated": _gated}  # by the end of the class's name


def unserved(module: Any) -> str | None:
    if getattr(module, "norm_before_gate", False):
        return "norm_before_gate is True, served is False"
    return None if hasattr(module, "variance_epsilon") else "it has no variance_epsilon"
