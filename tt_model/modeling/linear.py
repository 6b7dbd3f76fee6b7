"""A linear layer whose weight is read the faster way on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import Constant


def turned(weight: Tensor) -> Tensor:
    """[N, K], in memory [K, N]."""
    return weight.T.contiguous().T


class Linear(nn.Linear):
    """nn.Linear for layers that widen. A token or two are bound by reading the weight, and a CPU's libraries read one
    with few long rows in up to half the time of one with many short rows: where no gradients are wanted a copy in
    fp32 is kept so. From four tokens on it makes no difference."""

    def __init__(self, K: int, N: int, *, bias: bool):
        super().__init__(K, N, bias=bias)
        self.turned = Constant(turned)

    @property
    def matrix(self) -> Tensor:
        """The weight as it is best read."""
        weight = self.weight
        if not weight.is_cpu or weight.dtype != torch.float32 or torch._C._is_any_autocast_enabled():
            return weight
        kept = self.turned.kept(weight)
        return weight if kept is None else kept

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)
