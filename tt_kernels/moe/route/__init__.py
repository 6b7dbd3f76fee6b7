"""The router: which experts each token goes to, and with what weight."""

import torch
import triton
from torch import Tensor

from ... import reference
from ...core import Op, check, define, is_real, is_whole, refuse, takes_kernel
from ...launch import Launch, by_row
from ...reference.common import compute_dtype
from .backward import route_bwd
from .few import is_few, route_few
from .many import route_many


def _route_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, K: int, groups: int, kept: int, norm: bool, scale: float
) -> tuple[Tensor, ...]:
    outputs = _route_fwd_fake(x, weight, bias, K, groups, kept, norm, scale)
    T, E = len(x), len(weight)
    if not T:
        outputs[3].zero_()
        return outputs
    columns = triton.next_power_of_2(E // groups) * triton.next_power_of_2(groups)
    launcher = route_few if is_few(T, K, columns) else route_many
    launcher(by_row(x), by_row(weight), bias.contiguous(), K, groups, kept, norm, scale, outputs)
    return outputs


def _route_fwd_fake(x, weight, bias, K, groups, kept, norm, scale):
    T, E = x.shape[0], weight.shape[0]
    return (
        x.new_empty(T, K, dtype=torch.int64),
        x.new_empty(T, K, dtype=compute_dtype(x.dtype)),
        x.new_empty(T * K, dtype=torch.int64),
        x.new_empty(E, dtype=torch.int32),
        x.new_empty(T, K, dtype=torch.float64),  # the chosen experts' scores
    )


def _route_bwd_fake(dweights, x, weight, ids, chosen, norm, scale, for_x, for_weight):
    return x.new_empty(x.shape if for_x else 0), weight.new_empty(weight.shape if for_weight else 0)


_fwd = define(
    "route_fwd(Tensor x, Tensor weight, Tensor bias, SymInt K, int groups, int kept, bool norm, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_fwd,
    _route_fwd_fake,
)
_bwd = define(
    "route_bwd(Tensor dweights, Tensor x, Tensor weight, Tensor ids, Tensor chosen, bool norm, float scale,"
    " bool for_x, bool for_weight) -> (Tensor, Tensor)",
    route_bwd,
    _route_bwd_fake,
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, K, groups, kept, norm, scale):
        ids, weights, order, ends, chosen = _fwd(x, weight, bias, K, groups, kept, norm, scale)
        ctx.save_for_backward(x, weight, ids, chosen)
        ctx.options = norm, scale
        ctx.mark_non_differentiable(ids, order, ends)
        return ids, weights, order, ends

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _ids, dweights, _order, _ends):
        for_x, for_weight = ctx.needs_input_grad[:2]
        dx, dweight = _bwd(dweights, *ctx.saved_tensors, *ctx.options, for_x, for_weight)
        return dx if for_x else None, dweight if for_weight else None, *(None,) * 6


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose each token's experts by s + bias, s = sigmoid(x weight^T), and weigh them by s.

    With more than one group: a group's score is the sum of its two best biased scores; outside the topk_group best
    groups the biased scores count as 0, but for an expert's that is switched off: whose bias is -inf is chosen last. Of
    equal scores the lower index wins, and NaN is above all.

    Args:
        x:              [T, D] float.
        weight:         [E, D] float, fp32 in a 16-bit model.
        bias:           [E] float: shifts the choice and nothing else.
        top_k:          K, experts of a token, 1 to E.
        n_group:        divides E, each group of at least 2 experts; 1: no groups.
        topk_group:     groups that stay, 1 to n_group.
        norm_topk_prob: divide the weights by their sum + 1e-20.
        scale:          multiplies the weights.
    Returns:
        ids:     [T, K] int64, best first.
        weights: [T, K] fp32 (fp64 where x is fp64).
        order:   [T * K] int64: the pairs t * K + k sorted by expert, in each expert by token: what `experts` walks.
        ends:    [E] int32: where each expert's pairs end in order; the differences are the tokens of each expert.

    Computes in fp64, so that no rounding decides a choice. Gradients for x and weight through the weights, none for
    bias. Deterministic. Raises ValueError for sizes that disagree and options out of their range. Cost: 2 T E D
    flops, T D itemsize + 4 E D + 20 T K bytes: bound by reading x and weight.
    Source: DeepSeek-V3 (2412.19437), section 2.1.2.
    """
    check("route", 3, x=(x, "T D"), weight=(weight, "E D"), bias=(bias, "E"))
    E = weight.shape[0]
    if not (is_whole(top_k) and 1 <= top_k <= E):
        refuse("route", "top_k", top_k, f"1 to E={E}")
    if not is_whole(n_group) or n_group < 1 or E % n_group or (n_group > 1 and 2 * n_group > E):
        refuse("route", "n_group", n_group, f"a divisor of E={E} that leaves groups of at least 2")
    if not (is_whole(topk_group) and 1 <= topk_group <= n_group):
        refuse("route", "topk_group", topk_group, f"1 to n_group={n_group}")
    if not isinstance(norm_topk_prob, bool):
        refuse("route", "norm_topk_prob", norm_topk_prob, "True or False")
    if not is_real(scale):
        refuse("route", "scale", scale, "a finite number")
    if not torch.compiler.is_compiling() and x.shape[0] * top_k >= 2**31:
        refuse("route", "x", list(x.shape), "fewer than 2^31 pairs of a token and an expert")
    if not takes_kernel("route", x, weight, bias):
        return reference.route(
            x,
            weight,
            bias,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            scale=scale,
        )
    return _Route.apply(x, weight, bias, int(top_k), int(n_group), int(topk_group), norm_topk_prob, float(scale))


# ---- card ----


def _inputs(dtype: torch.dtype, T: int, D: int, E: int, K: int, groups: int = 1, kept: int = 1) -> dict[str, object]:
    wide = torch.promote_types(dtype, torch.float32)
    return dict(
        x=torch.randn(T, D, dtype=dtype),
        weight=torch.randn(E, D, dtype=wide) * D**-0.5,
        bias=torch.rand(E, dtype=wide) / 4,
        top_k=K,
        n_group=groups,
        topk_group=kept,
        scale=2.5,
    )


def _cost(itemsize: int, T: int, D: int, E: int, K: int, groups: int = 1, kept: int = 1) -> tuple[int, int]:
    return 2 * T * E * D, T * D * itemsize + 4 * E * D + 20 * T * K + 4 * E


def _few(splits: int, block_e: int, rows: int = 16) -> Launch:
    return Launch(BLOCK_T=rows, BLOCK_E=block_e, BLOCK_D=32, SLICES=8, SPLITS=splits, num_warps=8, num_stages=3)


def _scores(block_t: int, block_e: int, block_d: int, warps: int) -> Launch:
    return Launch(BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=block_d, num_warps=warps, num_stages=3)


OPS = (
    Op(
        fn=route,
        reference=reference.route,
        inputs=_inputs,
        cases=(
            dict(T=3, D=5, E=8, K=3),
            dict(T=21, D=29, E=12, K=3, groups=4, kept=2),
            dict(T=1, D=8, E=4, K=4),
            dict(T=0, D=8, E=4, K=2),
            dict(T=37, D=300, E=13, K=3),  # three tiles, the last one ragged, and two parts of D
            dict(T=19, D=31, E=30, K=14, groups=5, kept=2),  # two choices among zeros
            dict(T=530, D=8, E=6, K=2),  # many
        ),
        shapes=(
            *(dict(T=T, D=2688, E=128, K=6) for T in (1, 16, 64, 256, 512, 1024, 4096)),
            *(dict(T=T, D=7168, E=256, K=8, groups=8, kept=4) for T in (16, 4096)),  # in groups: DeepSeek-V3's
        ),
        grows=dict(T=16384),
        outputs=("ids", "weights", "order", "ends"),
        grads=("x", "weight"),
        kernels=(
            *("_route_few_kernel", "_route_scores_kernel", "_route_choose_kernel", "_route_scan_kernel"),
            *("_route_scatter_kernel", "_route_bwd_kernel"),
        ),
        candidates={
            "_route_few_kernel": (
                *(_few(splits, 16) for splits in (1, 2, 4, 8)),
                _few(1, 32),
                _few(2, 32),
                _few(4, 16, 8),
            ),
            "_route_scores_kernel": (
                *(_scores(32, 32, 32, 4), _scores(64, 32, 32, 4), _scores(64, 64, 32, 8)),
                *(_scores(32, 64, 32, 8), _scores(64, 64, 64, 8)),
            ),
        },
        cost=_cost,
    ),
)
