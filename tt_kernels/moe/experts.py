"""The experts: every token through its own few, weighted and summed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference.moe import ACTIVATIONS, FORMATS, ExpertWeights, Matrix, Routing, sort_pairs
from ..runtime.checks import check, looks_at, refuse
from ..runtime.registry import define, takes_kernel, unasked
from .experts_backward import _experts_bwd
from .experts_forward import _experts_fwd

KERNEL_FORMATS = {None}  # of FORMATS, those that kernels read


def _experts_bwd_fake(dy, x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, matrices, _, needed):
    dshared_weight = x.new_empty(0) if shared_weight is None else shared_weight.new_empty(shared_weight.shape)
    grads = [
        x.new_empty(t.shape if t is not None and wanted else 0) for t, wanted in zip(matrices, needed, strict=True)
    ]
    return x.new_empty(x.shape), topk_weights.new_empty(topk_weights.shape), dshared_weight, grads


_fwd = define(_experts_fwd, lambda x, *_: x.new_empty(x.shape))

_bwd = define(_experts_bwd, _experts_bwd_fake)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, *matrices):
        ctx.save_for_backward(x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, *matrices)
        ctx.activation = activation
        return _fwd(x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, matrices, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, *matrices = ctx.saved_tensors
        _, *wanted, _, _, _ = ctx.needs_input_grad[: -len(matrices)]
        needed = ctx.needs_input_grad[-len(matrices) :]
        *first, grads = _bwd(
            dy, x, topk_weights, shared_weight, topk_ids, sorted_pairs, offsets, matrices, ctx.activation, needed
        )
        first, grads = (
            [d if want else None for d, want in zip(found, wants, strict=True)]
            for found, wants in ((first, wanted), (grads, needed))
        )
        return None, *first, None, None, None, *grads


def _check_pairs(op: str, topk_ids: Tensor, sorted_pairs: Tensor, offsets: Tensor, E: int) -> None:
    """Refuse lists that are not of these ids."""
    pairs = len(sorted_pairs)
    outside = sorted_pairs[(sorted_pairs < 0) | (sorted_pairs >= pairs)]
    if len(outside):
        refuse(op, "sorted_pairs", outside[0].item(), f"pairs 0 to T*K-1={pairs - 1}")
    twice = (torch.bincount(sorted_pairs, minlength=pairs) > 1).nonzero()
    if len(twice):
        raise ValueError(f"{op}: sorted_pairs has {twice[0].item()} twice, expected every pair once")
    expert = torch.where((topk_ids >= 0) & (topk_ids < E), topk_ids, E).flatten()
    right = torch.bincount(expert, minlength=E + 1).cumsum(0)
    wrong = (offsets != right[:E]).nonzero().flatten().tolist()
    if wrong:
        e = wrong[0]
        refuse(op, f"offsets[{e}]", offsets[e].item(), f"{right[e].item()}: so many ids are 0 to {e}")
    listed = expert[sorted_pairs.long()]
    wrong = (listed[1:] < listed[:-1]).nonzero().flatten().tolist()
    if wrong:
        first, second = sorted_pairs[wrong[0] :][:2].tolist()
        expected = "pairs sorted by expert, those without one last"
        raise ValueError(f"{op}: sorted_pairs has {first} before {second}, expected {expected}")


_NAMES = ("up", "down", "gate", "shared_up", "shared_down", "shared_gate")


def _check_format(op: str, x: Tensor, name: str, matrix: Matrix) -> None:
    """Refuse data and scale that are not as the matrix's format has them."""
    data, scale, stored = matrix
    if stored not in FORMATS:
        refuse(op, f"{name}.format", stored, " or ".join(map(repr, FORMATS)))
    form = FORMATS[stored]
    if data.dtype != (form.dtype or x.dtype):
        refuse(op, name, data.dtype, str(form.dtype) if form.dtype else f"the dtype of x, {x.dtype}")
    wanted = None if form.scale_shape is None else torch.Size(form.scale_shape(data.shape))
    if (None if scale is None else scale.shape) != wanted:
        refuse(op, f"{name}.scale", scale, "None" if wanted is None else f"a tensor {list(wanted)}")


def checked(
    op: str,
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: ExpertWeights | None,
    shared_weight: Tensor | None,
    activation: str,
) -> tuple[bool, Sequence[Tensor | None]]:
    """Whether `op` runs as kernels, and the tensors of all weights."""
    if not isinstance(routing, Routing):
        refuse(op, "routing", routing, "Routing")
    topk_ids, topk_weights, sorted_pairs, offsets = routing
    if not isinstance(weights, ExpertWeights):
        refuse(op, "weights", weights, "ExpertWeights")
    if not (shared is None or isinstance(shared, ExpertWeights)):
        refuse(op, "shared", shared, "ExpertWeights")
    given = (*weights, *(shared or (None, None, None)))
    stored: dict[str, Matrix] = {}
    if Matrix in map(type, given):  # a plain tensor stands for a Matrix, unwrapped to save time
        stored = {name: m for name, m in zip(_NAMES, given, strict=True) if isinstance(m, Matrix)}
    data = [m.data if isinstance(m, Matrix) else m for m in given] if stored else given
    up, down, gate, shared_up, shared_down, shared_gate = data
    check(
        op,
        5,
        x=(x, "T D"),
        topk_ids=(topk_ids, "T K", int),
        topk_weights=(topk_weights, "T K"),
        up=(up, "E N D", object),
        down=(down, "E D N", object),
        gate=(gate, "E N D", object),
        sorted_pairs=(sorted_pairs, "T*K", int),
        offsets=(offsets, "E", int),
        shared_up=(shared_up, "M D", object),
        shared_down=(shared_down, "D M", object),
        shared_gate=(shared_gate, "M D", object),
        shared_weight=(shared_weight, "T"),
    )
    assert up is not None
    if (sorted_pairs is None) != (offsets is None):
        name = "sorted_pairs" if sorted_pairs is None else "offsets"
        refuse(op, name, None, "sorted_pairs and offsets, or neither")
    if activation not in ACTIVATIONS:
        refuse(op, "activation", activation, " or ".join(map(repr, ACTIVATIONS)))
    if shared is not None and (shared_up is None or shared_down is None):
        refuse(op, "shared_up" if shared_up is None else "shared_down", None, "a tensor")
    if shared is None and shared_weight is not None:
        refuse(op, "shared_weight", shared_weight, "None, as shared is")
    if shared is not None and (gate is None) != (shared_gate is None):
        refuse(op, "shared_gate", shared_gate, "None, as gate is" if gate is None else "a gate, as experts have")
    for name, matrix in stored.items():
        _check_format(op, x, name, matrix)
    for name, tensor in zip(_NAMES, data, strict=True):
        if tensor is not None and tensor.dtype != x.dtype and name not in stored:
            refuse(op, name, tensor.dtype, f"the dtype of x, {x.dtype}")
    if not torch.compiler.is_compiling() and topk_ids.numel() >= 2**31:
        refuse(op, "topk_ids", list(topk_ids.shape), "fewer than 2^31 pairs")
    if sorted_pairs is not None and offsets is not None and looks_at(sorted_pairs):
        _check_pairs(op, topk_ids, sorted_pairs, offsets, len(up))
    kernel = takes_kernel(op, x, topk_weights, shared_weight, *data)
    unread = stored and [m.format for m in stored.values() if m.format not in KERNEL_FORMATS]
    if kernel and unread:
        what = f"no kernel reads weights in the format {unread[0]!r}"
        raise NotImplementedError(f'{op}: {what}; use it in `with tt_kernels.use("reference")`')
    return kernel and x.numel() > 0, data  # without numbers there is nothing to launch


def sorted_by_expert(routing: Routing, weights: ExpertWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """topk_weights, topk_ids, sorted_pairs and offsets, the last two made where they are not there."""
    topk_ids, topk_weights, sorted_pairs, offsets = routing
    if sorted_pairs is None or offsets is None:
        up = weights.up.data if isinstance(weights.up, Matrix) else weights.up
        sorted_pairs, offsets = sort_pairs(topk_ids, len(up))
    return topk_weights, topk_ids, sorted_pairs, offsets


@unasked(reference.experts)
def experts(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    shared: ExpertWeights | None = None,
    shared_weight: Tensor | None = None,
    activation: str = "relu2",
) -> Tensor:
    """Send each token through its K experts: y_t = sum_k topk_weights[t, k] down_e(act(up_e(x_t))), e = topk_ids[t, k].

    Takes what `route` returns, or a Routing of your own choice of experts. With gate weights an expert is
    down(act(gate(x)) * up(x)). A shared expert sees every token, with weight 1 or with one of each token's own: the
    gate of Qwen2-MoE's is shared_weight = sigmoid(x w).

    Pairs whose id is not 0 to E - 1 contribute nothing to y nor to any gradient, and the gradient of their weight is 0,
    whatever x and topk_weights hold. So experts can be spread over devices: each calls with its own E experts and with
    topk_ids - (its first expert), one of them with the shared expert, and their results are summed.

    Args:
        x:          [T, D] float.
        routing:    topk_ids [T, K] int, 0 to E - 1, or of an expert that is elsewhere; topk_weights [T, K] float, fp32
                    in a 16-bit model; sorted_pairs [T * K] int and offsets [E] int as `route` returns them for these
                    ids, or None both: then the pairs are sorted here. Pairs of experts that are elsewhere come last in
                    sorted_pairs, behind offsets[-1].
        weights:    up [E, N, D], down [E, D, N], gate [E, N, D] or None: each a tensor of the dtype of x, or a Matrix.
                    Halves of one [E, 2 N, D] are read in place; what has other strides is copied at each call.
        shared:     up [M, D], down [D, M], gate [M, D] or None, or None: the expert that every token goes through.
        shared_weight: [T] float, or None for 1: what each token's result of the shared expert is multiplied by.
        activation: "relu2" (relu(h)^2), "silu", "gelu" (by erf) or "gelu_pytorch_tanh" (its approximation).
    Returns:
        y: [T, D] dtype of x.

    Numerics: products in the dtype of x with fp32 sums; the sum over experts in the dtype of topk_weights, in the order
    of topk_ids, and the shared one in fp32, fp64 where shared_weight is. Deterministic.
    Gradients: for x, topk_weights, shared_weight, up, down and gate.
    Raises: ValueError for sizes or dtypes that disagree, shared_weight without shared, an unknown activation or format,
    and on a CPU for sorted_pairs and offsets that are not of these ids. NotImplementedError for a format without a
    kernel on a GPU.
    Cost: 4 T K D N flops (6 with a gate) and 2 D N itemsize bytes for each expert that is hit (3 with a gate): bound by
    reading weights until a few hundred tokens.
    Source: DeepSeek-V3 (2412.19437) routing as in Nemotron-3-Nano; sorted segments as in MegaBlocks (2211.15841).

    Example:
        >>> x, up, down = torch.randn(16, 64), torch.randn(8, 32, 64), torch.randn(8, 64, 32)
        >>> routing = route(x, torch.randn(8, 64), torch.zeros(8), top_k=2)
        >>> y = experts(x, routing, ExpertWeights(up, down))
    """
    kernel, data = checked("experts", x, routing, weights, shared, shared_weight, activation)
    if not kernel:
        return reference.experts(x, routing, weights, shared=shared, shared_weight=shared_weight, activation=activation)
    topk_weights, *listed = sorted_by_expert(routing, weights)
    return _Experts.apply(activation, x, topk_weights, shared_weight, *listed, *data)
