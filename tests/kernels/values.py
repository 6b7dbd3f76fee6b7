"""The ops that write states, as functions of values, for tests of what they compute: states in, states out."""

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tt_kernels
from tt_kernels import MambaState, MambaWeights

NO_LIMIT = (0.0, math.inf)


def of(ops: ModuleType) -> SimpleNamespace:
    """Those of `tt_kernels` or of its `reference`."""

    def conv_state(x: Tensor, counts: Tensor | None, state: Tensor | None, *, kernel_size: int) -> Tensor:
        state = x.new_zeros(len(x), x.shape[2], kernel_size) if state is None else state.clone()
        ops.conv_advance(x, state, counts)
        return state

    def start(x: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(len(x), *x.shape[2:], B.shape[-1], dtype=wide) if state is None else state.clone()

    def ssd_block(x, dt, A, B, C, D, dt_bias, state=None, *, dt_limit=NO_LIMIT) -> Tensor:
        return ops.ssd_block(x, dt, A, B, C, D, dt_bias, state, dt_limit=dt_limit)

    def ssd_advance(x, dt, A, B, dt_bias, state=None, counts=None, *, dt_limit=NO_LIMIT) -> Tensor:
        state = start(x, B, state)
        ops.ssd_advance(x, dt, A, B, dt_bias, state, counts, dt_limit=dt_limit)
        return state

    def ssd_step(x, dt, A, B, C, D, dt_bias, state, *, dt_limit=NO_LIMIT) -> tuple[Tensor, Tensor]:
        state = state.clone()
        return ops.ssd_step(x, dt, A, B, C, D, dt_bias, state, dt_limit=dt_limit), state

    def ssd_chunk(x, dt, A, B, C, D, dt_bias, state=None, counts=None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        state = None if state is None else state.clone()
        y, final, before = ops.ssd_chunk(x, dt, A, B, C, D, dt_bias, state, counts=counts, **options)
        assert (final is None) == (state is not None)
        return y, final if state is None else state, before

    def mamba_block(xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, *, dt_limit=NO_LIMIT) -> Tensor:
        weights = MambaWeights(weight, bias, A, D, dt_bias)
        return ops.mamba_block(xBC, dt, weights, MambaState(conv_state, state), dt_limit=dt_limit)

    def mamba_advance(
        xBC, dt, weight, bias, A, dt_bias, conv_state, state, counts=None, *, dt_limit=NO_LIMIT
    ) -> tuple[Tensor, Tensor]:
        states = conv_state.clone(), state.clone()
        weights = MambaWeights(weight, bias, A, None, dt_bias)
        ops.mamba_advance(xBC, dt, weights, MambaState(*states), counts, dt_limit=dt_limit)
        return states

    def mamba_extend(
        xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, counts=None, *, dt_limit=NO_LIMIT
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, weights = (conv_state.clone(), state.clone()), MambaWeights(weight, bias, A, D, dt_bias)
        return ops.mamba_extend(xBC, dt, weights, MambaState(*states), counts, dt_limit=dt_limit), *states

    def mamba_step(
        xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, *, dt_limit=NO_LIMIT
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = conv_state.clone(), state.clone()
        weights = MambaWeights(weight, bias, A, D, dt_bias)
        return ops.mamba_step(xBC, dt, weights, MambaState(*states), dt_limit=dt_limit), *states

    causal_conv1d, conv_block_states = ops.causal_conv1d, ops.conv_block_states
    return SimpleNamespace(**{name: value for name, value in locals().items() if name not in ("ops", "start")})


kernels, reference = of(tt_kernels), of(tt_kernels.reference)
