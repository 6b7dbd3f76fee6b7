"""The experts: every token through its own few, weighted and summed."""

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, refuse
from ..reference import ExpertWeights


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights, *, activation: str = "relu2"
) -> Tensor:
    """Send each token through its K experts: y_t = sum_k weights[t, k] down_e(act(up_e(x_t))), e = ids[t, k].

    With gate weights the expert is down(act(gate(x)) * up(x)).

    Args:
        x:              [T, D] float.
        ids:            [T, K] int, 0 to E - 1.
        weights:        [T, K] float, fp32 in a 16-bit model.
        expert_weights: up [E, N, D], down [E, D, N], gate [E, N, D] or None, all of the dtype of x.
        activation:     "relu2" (relu(h)^2) or "silu".
    Returns:
        y: [T, D] dtype of x.

    Matrix products in the dtype of x with fp32 sums, the sum over experts in the dtype of weights, in the order of ids.
    Gradients for x, weights, up, down and gate. Deterministic. Raises ValueError for sizes or dtypes that disagree and
    an unknown activation. Cost: 4 T K D N flops (6 with a gate), 2 D N itemsize bytes for each expert that is hit (3
    with a gate): bound by reading weights until a few hundred tokens.
    Source: DeepSeek-V3 (2412.19437) routing as in Nemotron-3-Nano; sorted segments as in MegaBlocks (2211.15841).
    """
    w = expert_weights
    check(
        "experts",
        x=(x, "T D"),
        ids=(ids, "T K", int),
        weights=(weights, "T K"),
        up=(w.up, "E N D"),
        down=(w.down, "E D N"),
        gate=(w.gate, "E N D"),
    )
    if activation not in ("relu2", "silu"):
        refuse("experts", "activation", activation, "'relu2' or 'silu'")
    for name, tensor in (("up", w.up), ("down", w.down), ("gate", w.gate)):
        if tensor is not None and tensor.dtype != x.dtype:
            refuse("experts", name, tensor.dtype, f"the dtype of x, {x.dtype}")
    return reference.experts(x, ids, weights, expert_weights, activation=activation)


def _inputs(dtype: torch.dtype, T: int, D: int, N: int, E: int, K: int, gated: int = 0) -> dict[str, object]:
    up, gate = torch.randn(2, E, N, D, dtype=dtype) * D**-0.5
    down = torch.randn(E, D, N, dtype=dtype) * N**-0.5
    return dict(
        x=torch.randn(T, D, dtype=dtype),
        ids=torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.empty(0, K, dtype=torch.long),
        weights=torch.rand(T, K, dtype=torch.promote_types(dtype, torch.float32)),
        expert_weights=ExpertWeights(up, down, gate if gated else None),
        activation="silu" if gated else "relu2",
    )


def _cost(itemsize: int, T: int, D: int, N: int, E: int, K: int, gated: int = 0) -> tuple[int, int]:
    hit = round(E * (1 - (1 - K / E) ** T))  # expected, with even choices
    return (4 + 2 * gated) * T * K * D * N, ((2 + gated) * hit * D * N + 2 * T * D) * itemsize


OPS = (
    Op(
        fn=experts,
        reference=reference.experts,
        inputs=_inputs,
        cases=(
            dict(T=5, D=6, N=7, E=4, K=2),
            dict(T=9, D=16, N=24, E=6, K=3, gated=1),
            dict(T=1, D=8, N=16, E=4, K=3),
            dict(T=0, D=8, N=16, E=4, K=2),
        ),
        shapes=(dict(T=16, D=2688, N=1856, E=128, K=6), dict(T=4096, D=2688, N=1856, E=128, K=6)),
        outputs=("y",),
        grads=("x", "weights", "expert_weights.up", "expert_weights.down", "expert_weights.gate"),
        cost=_cost,
        compiles=False,  # the segments' sizes are read on the host
    ),
)
