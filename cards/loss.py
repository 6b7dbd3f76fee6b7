"""The card of the loss."""

import torch

from tt_kernels.loss.linear_cross_entropy import linear_cross_entropy

from .op import Op


def _inputs(dtype, B, N, D, V, masked=50):
    return dict(
        hidden=torch.randn(B, N, D, dtype=dtype),
        weight=torch.randn(V, D, dtype=dtype) * D**-0.5,
        targets=torch.randint(V, (B, N)),
        mask=torch.rand(B, N) < masked / 100,
    )


def _cost(itemsize, B, N, D, V, masked=50):
    rows = B * N * masked // 100
    return 2 * rows * V * D, (V + rows) * D * itemsize


OPS = (
    Op(
        fn=linear_cross_entropy,
        when="Training with a large vocabulary: loss and gradients without all logits in memory.",
        inputs=_inputs,
        cases=(
            dict(B=2, N=5, D=6, V=11),
            dict(B=1, N=7, D=16, V=37, masked=100),
            dict(B=2, N=3, D=6, V=11, masked=0),
            dict(B=1, N=0, D=6, V=11),
        ),
        shapes=(dict(B=1, N=4096, D=2688, V=131072),),
        outputs=("loss",),
        grads=("hidden", "weight"),
        cost=_cost,
    ),
)
