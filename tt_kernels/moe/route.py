"""The router: which experts each token goes to, and with what weight."""

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, refuse


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
    groups the biased scores count as 0 (not -inf). Of equal scores the lower index wins.

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
    check("route", x=(x, "T D"), weight=(weight, "E D"), bias=(bias, "E"))
    E = weight.shape[0]
    if not 1 <= top_k <= E:
        refuse("route", "top_k", top_k, f"1 to E={E}")
    if n_group < 1 or E % n_group or (n_group > 1 and 2 * n_group > E):
        refuse("route", "n_group", n_group, f"a divisor of E={E} that leaves groups of at least 2")
    if not 1 <= topk_group <= n_group:
        refuse("route", "topk_group", topk_group, f"1 to n_group={n_group}")
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


OPS = (
    Op(
        fn=route,
        reference=reference.route,
        inputs=_inputs,
        cases=(
            dict(T=5, D=29, E=8, K=3),
            dict(T=4, D=16, E=12, K=3, groups=4, kept=2),
            dict(T=1, D=8, E=4, K=4),
            dict(T=0, D=8, E=4, K=2),
        ),
        shapes=(dict(T=16, D=2688, E=128, K=6), dict(T=4096, D=2688, E=128, K=6)),
        outputs=("ids", "weights", "order", "ends"),
        grads=("x", "weight"),
        cost=_cost,
    ),
)
