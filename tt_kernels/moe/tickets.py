"""Tickets by which the last program of a launch learns that it is: counters on the device, 0 between launches.

Each program adds 1 to its counter; who brings it to the number of programs is the last, and sets it back to 0. So
nothing needs to clear counters between launches, nor between replays of a CUDA graph.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock

import torch
from torch import Tensor

from ..runtime.launch import is_recording

SLOT = 64  # counters of one launch
STREAMS = 256  # slots for streams: their launches follow each other
CAPTURED = 4096  # slots for launches in CUDA graphs, which keep theirs


class _Pool:
    """The counters of one device. Launches that run at the same time have different slots: they are on different
    streams, or in a CUDA graph, where each has a slot of its own, whatever runs beside the graph."""

    def __init__(self, device: torch.device):
        self.slots = torch.zeros(STREAMS + CAPTURED, SLOT, dtype=torch.int32, device=device)
        self.streams, self.captured = count(), count(STREAMS)
        self.of_stream: dict[int, Tensor | None] = {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: other streams must find zeros too

    def on(self, stream: int) -> Tensor | None:
        """The slot of a stream, None where there are more of them than slots."""
        if stream not in self.of_stream:
            slot = next(self.streams)
            self.of_stream.setdefault(stream, self.slots[slot] if slot < STREAMS else None)
        return self.of_stream[stream]


_pools: dict[torch.device, _Pool] = {}
_making = Lock()


def _pool(device: torch.device) -> _Pool:
    with _making:
        if device not in _pools:
            # In a thread of its own: there no memory pool of a graph is active, whose memory would not stay ours, and
            # no dispatch mode that would see the tensor.
            with ThreadPoolExecutor(1) as thread:
                _pools[device] = thread.submit(_Pool, device).result()
    return _pools[device]


def _capturing(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()


def tickets(x: Tensor) -> Tensor:
    """SLOT zeros on the device of x, for one launch whose programs set them back."""
    if is_recording():
        return x.new_empty(SLOT, dtype=torch.int32)
    slot = None
    if not _capturing(x):
        slot = _pool(x.device).on(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    elif x.device in _pools and (free := next(_pools[x.device].captured)) < STREAMS + CAPTURED:
        slot = _pools[x.device].slots[free]
    # None is left, or a graph is captured before any launch, when nothing may be allocated to stay: cleared each time.
    return x.new_zeros(SLOT, dtype=torch.int32) if slot is None else slot
