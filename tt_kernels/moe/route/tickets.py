"""Tickets by which the last program of a launch learns that it is: counters on the device, 0 between launches.

Each program adds 1 to its counter; who brings it to the number of programs is the last, and sets it back to 0. So
nothing needs to clear counters between launches, nor between replays of a CUDA graph.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor

from ...launch import is_recording

SLOT = 64  # counters of one launch
TURNS = 256  # launches take turns through so many slots
CAPTURED = 4096  # slots for launches in CUDA graphs, which keep theirs


class _Pool:
    """The counters of one device. Launches that run at the same time have different slots as long as fewer than TURNS
    of them do; one in a CUDA graph has a slot of its own, whatever runs beside the graph."""

    def __init__(self, device: torch.device):
        self.slots = torch.zeros(TURNS + CAPTURED, SLOT, dtype=torch.int32, device=device)
        self.turns, self.captured = count(), count(TURNS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: other streams must find zeros too


_pools: dict[torch.device, _Pool] = {}


def _pool(device: torch.device) -> _Pool:
    if device not in _pools:
        # In a thread of its own: there no memory pool of a graph is active, whose memory would not stay ours, and no
        # dispatch mode that would see the tensor.
        with ThreadPoolExecutor(1) as thread:
            _pools[device] = thread.submit(_Pool, device).result()
    return _pools[device]


def tickets(x: Tensor) -> Tensor:
    """SLOT zeros on the device of x, for one launch whose programs set them back."""
    if is_recording():
        return x.new_empty(SLOT, dtype=torch.int32)
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        pool = _pool(x.device)
        return pool.slots[next(pool.turns) % TURNS]
    if x.device in _pools and (slot := next(_pools[x.device].captured)) < TURNS + CAPTURED:
        return _pools[x.device].slots[slot]
    # Captured before any launch, when nothing may be allocated to stay, or with all slots gone: the graph clears them.
    return x.new_zeros(SLOT, dtype=torch.int32)
