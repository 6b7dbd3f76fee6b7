"""Linear layers, for a token at a time on a CPU too."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import Constant

# Numbers of a weight from which on it is worth a second thread's start: half a megabyte, 40 us of one thread.
LARGE = 2**17


def turned(weight: Tensor) -> Tensor:
    """[N, K], in memory [K, N]."""
    return weight.T.contiguous().T


def _threads() -> int:
    return torch.get_num_threads()


# What torch.compiler.assume_constant_result does, but that it imports the compiler: a graph keeps the number that it
# was made with.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. Of a single row in fp32 on a CPU, where PyTorch has one thread read the weight, in a part a thread."""
    N, K = weight.shape
    if x.numel() != K or N * K < LARGE or weight.dtype != torch.float32 or not x.is_cpu:
        return F.linear(x, weight, bias)
    parts = math.gcd(N, _threads())
    if parts == 1 or x.dtype != torch.float32 or torch._C._is_any_autocast_enabled():
        return F.linear(x, weight, bias)
    y = torch.bmm(x.reshape(1, 1, K).expand(parts, 1, K), weight.view(parts, N // parts, K).mT)
    y = y.view(*x.shape[:-1], N)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear by `product`. One that widens much keeps a copy of its fp32 weight turned where no gradients are wanted
    on a CPU: a token or two are bound by reading it, and few long rows are read in half the time of many short ones.
    From four tokens on it makes no difference."""

    def __init__(self, K: int, N: int, *, bias: bool):
        super().__init__(K, N, bias=bias)
        self.turned = Constant(turned) if N >= 3 * K else None

    @property
    def matrix(self) -> Tensor:
        """The weight as it is best read."""
        weight = self.weight
        if self.turned is None or not weight.is_cpu or weight.dtype != torch.float32:
            return weight
        kept = None if torch._C._is_any_autocast_enabled() else self.turned.kept(weight)
        return weight if kept is None else kept

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.matrix, self.bias)
