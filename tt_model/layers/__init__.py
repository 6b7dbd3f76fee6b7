"""The four mixers of the hybrid backbone, one a layer: M Mamba-2, * attention, E experts, - dense MLP."""

from torch import nn

from ..config import TwoTowerConfig
from .attention import Attention
from .mamba2 import Mamba2
from .moe import MLP, MoE


def make_mixer(kind: str, config: TwoTowerConfig) -> nn.Module:
    """The mixer that a letter of the pattern stands for."""
    if kind == "-":
        return MLP(config.hidden_size, config.intermediate_size, config.mlp_hidden_act, bias=config.mlp_bias)
    return {"M": Mamba2, "*": Attention, "E": MoE}[kind](config)


__all__ = ["MLP", "Attention", "Mamba2", "MoE", "make_mixer"]
