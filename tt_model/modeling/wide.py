"""Modules whose own parameters stay in at least fp32 when the model they belong to is cast to 16 bits."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Wide(nn.Module):
    """Its own parameters, not those of its submodules, are in at least fp32: they are made so, and no cast (`to`,
    `half`, `bfloat16`, `type`, of it or of a model around it) takes them below. They still follow it to a device."""

    @staticmethod
    def parameter(*shape: int) -> nn.Parameter:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return nn.Parameter(torch.empty(shape, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every cast and move of torch.nn goes through, each parameter and its gradient by itself."""
        if recurse:
            for child in self.children():
                child._apply(fn)

        def kept(old: Tensor) -> Tensor:
            new = fn(old)
            if new.dtype == old.dtype:
                return new
            return old.to(new.device, torch.promote_types(new.dtype, torch.float32))

        return super()._apply(kept, recurse=False)
