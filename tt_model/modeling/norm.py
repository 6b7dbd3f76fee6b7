"""The weight of an RMS norm."""

import torch
from torch import nn


class Norm(nn.Module):
    """[D]. The op that uses it does more than norm: add the previous branch, gate, modulate."""

    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
