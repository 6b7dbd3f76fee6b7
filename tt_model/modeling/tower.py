"""One tower: embedding, pre-norm residual layers with one mixer each, final norm. B batch, L tokens, D hidden."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tt_kernels import modulated_rms_norm, skip_checks

from ..config import TwoTowerConfig
from . import compiled
from .attention import Attention
from .mamba2 import Mamba2
from .moe import MLP, MoE
from .norm import Norm
from .state import ForwardContext


def make_mixer(config: TwoTowerConfig, layer: int) -> nn.Module:
    """The mixer of a layer: M Mamba-2, * attention, E experts, - dense MLP."""
    kind = config.pattern[layer]
    if kind == "-":
        return MLP(config.hidden_size, config.intermediate_size, config.mlp_hidden_act, bias=config.mlp_bias)
    return MoE(config) if kind == "E" else (Mamba2 if kind == "M" else Attention)(config, layer)


class Layer(nn.Module):
    def __init__(self, config: TwoTowerConfig, layer: int):
        super().__init__()
        self.is_stateful = config.pattern[layer] in "M*"  # its mixer sees more than the tokens of the pass
        self.order = "modulate_norm" if self.is_stateful else "norm_modulate"
        self.norm = Norm(config.hidden_size)
        self.mixer = make_mixer(config, layer)


class Tower(nn.Module):
    """A copy of the backbone. Its parameters bear the published names."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.pattern)))
        self.norm_f = Norm(config.hidden_size)
        self.compiled = False  # whether passes that are made again and again are

    def forward(self, ids_BL: Tensor, ctx: ForwardContext, modulation: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] after the final norm. modulation: [layers, 3, B, D] (shift, scale, gate) or None."""
        if self.compiled and compiled.is_repeated(ids_BL, ctx, self.config.block_size) and not self._counts():
            return compiled.run(self, ids_BL, ctx, modulation)
        return self.layered(ids_BL, ctx, modulation)

    def layered(self, ids_BL: Tensor, ctx: ForwardContext, modulation: Tensor | None) -> Tensor:
        """`forward`, not compiled."""
        with skip_checks():
            x = self.embeddings(ids_BL)
            if self.config.residual_in_fp32:
                x = x.to(torch.promote_types(x.dtype, torch.float32))
            first, *openings = self._openings(modulation)
            h, x = modulated_rms_norm(x, **first)
            for layer, following in zip(self._layers(), openings, strict=True):
                # A layer's branch is added to the stream x where the norm of the next one reads it.
                if isinstance(layer.mixer, MoE):
                    h, x = layer.mixer(h, x, **following)
                else:
                    branch = layer.mixer(h, ctx) if layer.is_stateful else layer.mixer(h)
                    h, x = modulated_rms_norm(x, branch=branch, **following)
            return h

    def _layers(self) -> Iterable[Layer]:
        return cast(Iterable[Layer], self.layers)

    def _counts(self) -> bool:
        """Whether somebody counts what experts get, which a graph would know nothing of."""
        return any(isinstance(layer.mixer, MoE) and layer.mixer.load is not None for layer in self._layers())

    def _openings(self, modulation: Tensor | None) -> list[dict[str, Any]]:
        """What each layer's norm takes beside stream and branch, then the final one. The gate is that of the branch."""
        found: list[dict[str, Any]] = []
        gate, eps = None, self.config.layer_norm_epsilon
        for i, layer in enumerate(self._layers()):
            shift, scale, own = (None, None, None) if modulation is None else modulation[i].unbind(0)
            opening = dict(weight=layer.norm.weight, shift=shift, scale=scale, gate=gate, order=layer.order, eps=eps)
            found.append(opening)
            gate = own
        return [*found, dict(weight=self.norm_f.weight, gate=gate, eps=eps)]
