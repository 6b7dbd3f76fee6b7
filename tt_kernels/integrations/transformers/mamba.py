"""What transformers' Mamba-2 mixers call, by ours. They look these functions up in their module, under these names."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import causal_conv1d, conv_advance, ssd_chunk, ssd_step
from ...runtime.registry import wants_gradients

_CARRIED = "a state that is carried on has no gradients here: decode under torch.no_grad(), or train without a cache"


def _refuse(name: str, reason: str) -> NoReturn:
    raise NotImplementedError(f"tt_kernels: {name}: {reason}")


def _unpacked(name: str, given: dict[str, Any]) -> None:
    for option in ("seq_idx", "cu_seqlens"):
        if given.get(option) is not None:
            _refuse(name, f"{option} is given, served are rows of one sequence each")


def _activation(name: str, activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        _refuse(name, f"activation is {activation!r}, served are 'silu' and None")
    return activation and "silu"


def _of_heads(name: str, what: str, t: Tensor, dims: int) -> Tensor:
    """One number a head, of a tensor that repeats it along its last `dims` dimensions."""
    if any(size > 1 and stride for size, stride in zip(t.shape[-dims:], t.stride()[-dims:], strict=True)):
        _refuse(name, f"{what} differs within a head, served is one number for each")
    for _ in range(dims):
        t = t[..., 0]
    return t


def _gated(y: Tensor, z: Tensor | None) -> Tensor:
    """y times silu(z), which theirs have in the scan: y is rounded once more here."""
    return y if z is None else (y.float() * F.silu(z.float())).to(y.dtype)


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **given: Any
) -> Tensor:
    """hidden_states [B, C, L] -> [B, C, L]."""
    _unpacked("causal_conv1d_fn", given)
    chosen = _activation("causal_conv1d_fn", activation)
    return causal_conv1d(hidden_states.mT, weight, bias, activation=chosen).mT


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """hidden_states [B, C, L] -> [B, C, L]; conv_state [B, C, K] moves on in place."""
    if wants_gradients(hidden_states, weight):
        _refuse("causal_conv1d_update", _CARRIED)
    chosen = _activation("causal_conv1d_update", activation)
    y = causal_conv1d(hidden_states.mT, weight, bias, conv_state, activation=chosen)
    conv_advance(hidden_states.mT, conv_state)
    return y.mT


def mamba2_chunk_scan(
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
    z: Tensor | None = None,
    **given: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """hidden_states, z [B, L, H, P] -> [B, L, H, P], with return_final_states also [B, H, P, N]."""
    name = "mamba2_chunk_scan"
    _unpacked(name, given)
    if not dt_softplus:
        _refuse(name, "dt_softplus is False, served is True")
    state = None
    if initial_states is not None:
        if return_final_states and wants_gradients(hidden_states, dt, A, B, C, initial_states):
            _refuse(name, _CARRIED)
        state = initial_states.clone()  # written in place; theirs stays the cache's
    D = A.new_zeros(A.shape) if D is None else D
    dt_bias = A.new_zeros(A.shape) if dt_bias is None else dt_bias
    low, high = dt_limit  # a config may hold a list
    # Only y and the last state are wanted: the size of chunks is ours.
    out = ssd_chunk(hidden_states, dt, A, B, C, D, dt_bias, state, chunk_size=None, dt_limit=(low, high))
    final = out.final_state if state is None else state
    assert final is not None
    y = _gated(out.y.contiguous(), z)  # as a kernel's is; Falcon-H1 takes views of it
    return (y, final) if return_final_states else y


def mamba2_selective_state_update(
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
    """hidden_states, z, dt [B, H, P], A [H, P, N], D, dt_bias [H, P] -> [B, H, P]; state [B, H, P, N] moves on here."""
    name = "mamba2_selective_state_update"
    if not dt_softplus:
        _refuse(name, "dt_softplus is False, served is True")
    if wants_gradients(state, hidden_states, dt, A, B, C):
        _refuse(name, _CARRIED)
    dt, A = _of_heads(name, "dt", dt, 1), _of_heads(name, "A", A, 2)
    D = A.new_zeros(A.shape) if D is None else _of_heads(name, "D", D, 1)
    dt_bias = A.new_zeros(A.shape) if dt_bias is None else _of_heads(name, "dt_bias", dt_bias, 1)
    y = ssd_step(hidden_states, dt, A, B, C, D, dt_bias, state)
    return _gated(y, z)


def mamba2_split_conv1d_scan_combined(*_: Any, **__: Any) -> None:
    """Nothing: the mixer then convolves and scans by the functions above."""


FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        causal_conv1d_fn,
        causal_conv1d_update,
        mamba2_chunk_scan,
        mamba2_selective_state_update,
        mamba2_split_conv1d_scan_combined,
    )
}


def unless_training_on_gpu(ours: Callable, theirs: Callable) -> Callable:
    """Ours, but theirs where gradients are wanted on a GPU: convolution and scan have no backward kernels."""

    @functools.wraps(ours)
    def function(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        training = torch.is_grad_enabled() and any(t.is_cuda for t in tensors) and wants_gradients(*tensors)
        return (theirs if training else ours)(*args, **kwargs)

    return function
