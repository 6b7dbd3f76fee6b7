"""Tensors whose elements lie further apart than 2^31 in memory of which next to nothing is touched."""

import mmap

import torch
from parity import DEVICE
from torch import Tensor

FAR = 2**30 + 2**20  # elements from one index to the next: the third is past 2^31, and four are below 2^32


class Memory:
    """Room for 2^32 + 2^31 numbers of 16 bits; on a CPU pages of it are there once they are written."""

    def __init__(self) -> None:
        elements = 2**32 + 2**31 + 2**22
        if DEVICE == "cuda":
            self.numbers = torch.zeros(elements, dtype=torch.float16, device=DEVICE)
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
            self.numbers = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)
        # Where a 32-bit product would have turned negative there is memory too: zeros, not a crash.
        self.used = 2**31

    def spread(self, t: Tensor, dim: int) -> Tensor:
        """A copy of t, 4 indices of `dim` FAR apart, the other dimensions densely."""
        assert t.shape[dim] <= 4
        small = [1 if i == dim else n for i, n in enumerate(t.shape)]
        strides = list(torch.empty(small).stride())
        strides[dim] = FAR
        view = self.numbers.as_strided(t.shape, strides, self.used)
        self.used += t.numel() + 64
        assert self.used < 2**31 + 2**20
        return view.copy_(t)
