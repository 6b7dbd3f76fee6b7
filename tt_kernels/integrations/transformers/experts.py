"""The experts of transformers' mixtures, as its `ExpertsInterface` calls them."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import ExpertWeights, Routing, experts

# Their activation, by its class or function, and ours. PyTorch's GELU says which one it is.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
}
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Their flag, the value of it that is served, and the name for what the other value means.
_SERVED = (
    ("has_bias", False, "biases"),
    ("is_transposed", False, "transposed weights"),
    ("is_concatenated", True, "gate and up interleaved"),
    ("has_post_expert_norm", False, "a norm after each expert"),
)


def unserved(module: Any) -> str | None:
    """Why an experts module is not served, or None."""
    name = type(module).__name__
    for flag, value, what in _SERVED:
        if getattr(module, flag, value) != value:
            return f"{name}.{flag} is {not value} ({what}), served is {value}"
    if module.down_proj.dtype not in _DTYPES:
        return f"{name}.down_proj is {module.down_proj.dtype}, served are {', '.join(map(str, _DTYPES))}"
    if activation_of(module) is None:
        return f"{name}.act_fn is {getattr(module, 'act_fn', 'not there')}, served are SiLU, relu2 and GELU"
    if module.has_gate and type(module)._apply_gate.__name__ != "_default_apply_gate":
        return f"{name}._apply_gate is its own, served is act(gate) * up"
    return None


def activation_of(module: Any) -> str | None:
    """Ours, of a module's act_fn; None: there is none."""
    act = getattr(module, "act_fn", None)
    if type(act) is nn.GELU:
        return _APPROXIMATE.get(act.approximate)
    return _ACTIVATIONS.get(type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", ""))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K] -> [T, D]. An id of num_experts or more is of an
    expert on another device, and adds nothing. gate_up_proj is read in place, by halves."""
    return routed(self, hidden_states, Routing(top_k_index, top_k_weights, None, None))


def routed(self: Any, hidden_states: Tensor, routing: Routing, **shared: Any) -> Tensor:
    """`experts_forward` with any Routing; shared: of `experts`, a shared expert with its weight."""
    reason = unserved(self)
    if reason:
        raise NotImplementedError(f"tt_kernels: {reason}; choose another experts_implementation")
    gate, up = self.gate_up_proj.chunk(2, 1) if self.has_gate else (None, self.up_proj)
    weights = ExpertWeights(up, self.down_proj, gate)
    activation = activation_of(self)
    assert activation is not None  # else unserved
    return experts(hidden_states, routing, weights, activation=activation, **shared)
