"""The experts: every token through its own few, weighted and summed."""

import torch
from torch import Tensor

from .. import reference
from ..reference.moe import ExpertWeights, index_lists
from ..runtime.checks import check, looks_at, refuse
from ..runtime.registry import define, takes_kernel
from .experts_backward import experts_bwd
from .experts_launch import experts_fwd


def _experts_fwd_fake(x, ids, weights, up, down, gate, shared_up, shared_down, shared_gate, order, ends, activation):
    return x.new_empty(x.shape)


def _experts_bwd_fake(dy, x, ids, weights, up, down, gate, shared_up, shared_down, shared_gate, *rest):
    *_, needed = rest
    matrices = zip((up, down, gate, shared_up, shared_down, shared_gate), needed, strict=True)
    grads = (x.new_empty(0) if t is None or not wanted else t.new_empty(t.shape) for t, wanted in matrices)
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *grads


_MATRICES = ("up", "down", "gate", "shared_up", "shared_down", "shared_gate")

_ARGUMENTS = (
    "Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? gate, Tensor? shared_up, "
    "Tensor? shared_down, Tensor? shared_gate, Tensor order, Tensor ends, str activation"
)

_fwd = define(f"experts_fwd({_ARGUMENTS}) -> Tensor", experts_fwd, _experts_fwd_fake)

_bwd = define(
    f"experts_bwd(Tensor dy, {_ARGUMENTS}, bool[] needed) -> ({', '.join(['Tensor'] * 8)})",
    experts_bwd,
    _experts_bwd_fake,
)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weights, up, down, gate, shared_up, shared_down, shared_gate, order, ends, activation):
        given = (x, ids, weights, up, down, gate, shared_up, shared_down, shared_gate, order, ends)
        ctx.save_for_backward(*given)
        ctx.activation = activation
        return _fwd(*given, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        given = ctx.saved_tensors
        for_x, _, *needed = ctx.needs_input_grad[:9]
        grads = _bwd(dy, *given, ctx.activation, needed[1:])
        dx, *rest = (d if wanted else None for wanted, d in zip((for_x, *needed), grads, strict=True))
        return dx, None, *rest, None, None, None


def _check_lists(ids: Tensor, order: Tensor, ends: Tensor, E: int) -> None:
    """Refuse lists that are not of these ids."""
    pairs = len(order)
    outside = order[(order < 0) | (order >= pairs)]
    if len(outside):
        refuse("experts", "order", outside[0].item(), f"pairs 0 to T*K-1={pairs - 1}")
    twice = (torch.bincount(order, minlength=pairs) > 1).nonzero()
    if len(twice):
        raise ValueError(f"experts: order has {twice[0].item()} twice, expected every pair once")
    expert = torch.where((ids >= 0) & (ids < E), ids, E).flatten()
    right = torch.bincount(expert, minlength=E + 1).cumsum(0)
    wrong = (ends != right[:E]).nonzero()
    if len(wrong):
        e = wrong[0].item()
        refuse("experts", f"ends[{e}]", ends[e].item(), f"{right[e].item()}: so many ids are 0 to {e}")
    listed = expert[order.long()]
    wrong = (listed[1:] < listed[:-1]).nonzero()
    if len(wrong):
        first, second = order[wrong[0].item() :][:2].tolist()
        expected = "pairs sorted by expert, those without one last"
        raise ValueError(f"experts: order has {first} before {second}, expected {expected}")


def _matrices(name: str, weights: ExpertWeights) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(weights, ExpertWeights):
        refuse("experts", name, weights, "ExpertWeights")
    return weights.up, weights.down, weights.gate


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    expert_weights: ExpertWeights,
    *,
    order: Tensor | None = None,
    ends: Tensor | None = None,
    shared: ExpertWeights | None = None,
    activation: str = "relu2",
) -> Tensor:
    """Send each token through its K experts: y_t = sum_k weights[t, k] down_e(act(up_e(x_t))), e = ids[t, k].

    With gate weights the expert is down(act(gate(x)) * up(x)). A shared expert sees every token, with weight 1.

    Pairs whose id is not 0 to E - 1 contribute nothing to y nor to any gradient, and their weight's gradient is 0,
    whatever x and weights hold. So experts can be spread over devices: each calls with its own E experts and with
    ids - (its first expert), the shared expert in one of the calls, and what they return is summed.

    Args:
        x:              [T, D] float.
        ids:            [T, K] int; 0 to E - 1, or of an expert that is elsewhere.
        weights:        [T, K] float, fp32 in a 16-bit model.
        expert_weights: up [E, N, D], down [E, D, N], gate [E, N, D] or None, all of the dtype of x.
        order, ends:    as `route` returns them for these ids, which saves sorting again; both or neither. Pairs of
                        experts that are elsewhere come last in order, behind ends[-1].
        shared:         up [M, D], down [D, M], gate [M, D] or None, or None: the expert that every token goes through.
        activation:     "relu2" (relu(h)^2) or "silu".
    Returns:
        y: [T, D] dtype of x.

    Matrix products in the dtype of x with fp32 sums, the sum over experts in the dtype of weights, in the order of ids.
    Gradients for x, weights, up, down and gate. Deterministic. Raises ValueError for sizes or dtypes that disagree, an
    unknown activation and, on a CPU, order and ends that are not of these ids. Cost: 4 T K D N flops (6 with a gate),
    2 D N itemsize bytes for each expert that is hit (3 with a gate): bound by reading weights until a few hundred
    tokens.
    Source: DeepSeek-V3 (2412.19437) routing as in Nemotron-3-Nano; sorted segments as in MegaBlocks (2211.15841).
    """
    up, down, gate = _matrices("expert_weights", expert_weights)
    shared_up, shared_down, shared_gate = (None,) * 3 if shared is None else _matrices("shared", shared)
    check(
        "experts",
        5,
        x=(x, "T D"),
        ids=(ids, "T K", int),
        weights=(weights, "T K"),
        up=(up, "E N D"),
        down=(down, "E D N"),
        gate=(gate, "E N D"),
        order=(order, "T*K", int),
        ends=(ends, "E", int),
        shared_up=(shared_up, "M D"),
        shared_down=(shared_down, "D M"),
        shared_gate=(shared_gate, "M D"),
    )
    if (order is None) != (ends is None):
        refuse("experts", "order" if order is None else "ends", None, "order and ends, or neither")
    if activation not in ("relu2", "silu"):
        refuse("experts", "activation", activation, "'relu2' or 'silu'")
    if shared is not None and (shared_up is None or shared_down is None):
        refuse("experts", "shared_up" if shared_up is None else "shared_down", None, "a tensor")
    if shared is not None and (gate is None) != (shared_gate is None):
        refuse("experts", "shared_gate", shared_gate, "None, as gate is" if gate is None else "a gate, as experts have")
    matrices = (up, down, gate, shared_up, shared_down, shared_gate)
    for name, tensor in zip(_MATRICES, matrices, strict=True):
        if tensor is not None and tensor.dtype != x.dtype:
            refuse("experts", name, tensor.dtype, f"the dtype of x, {x.dtype}")
    if not torch.compiler.is_compiling() and ids.numel() >= 2**31:
        refuse("experts", "ids", list(ids.shape), "fewer than 2^31 pairs")
    if order is not None and ends is not None and looks_at(order):
        _check_lists(ids, order, ends, len(up))
    # Without numbers there is nothing to launch.
    if not takes_kernel("experts", x, weights, *matrices) or not x.numel():
        return reference.experts(
            x, ids, weights, expert_weights, order=order, ends=ends, shared=shared, activation=activation
        )
    if order is None or ends is None:
        order, ends = index_lists(ids, len(up))
    return _Experts.apply(x, ids, weights, *matrices, order, ends, activation)
