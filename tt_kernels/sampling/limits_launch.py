"""How the limits of top_k and top_p are found."""

import torch
import triton
from torch import Tensor

from ..reference import Sampling
from ..runtime.launch import Launch, architecture, multiprocessors, run
from .lang import Limits
from .limits_kernels import Narrowing, _limits_kernel
from .records import Rows


def limits_launch(V: int, architecture: int) -> Launch:
    """A program a row. Sixteen warps hide each other's sums, and a thread has two neighbours at a time, as with four it
    would spill; on sm_80 eight warps and four neighbours, 16 bytes of fp32. A quarter of a row may be listed, for the
    second pass to be short, and 2048 numbers halved. A second program would make no row faster, so one may have all
    registers."""
    block = triton.next_power_of_2(V)
    each = min(2 if architecture >= 90 else 4, block)
    lanes = min(512 if architecture >= 90 else 256, block // each)
    room = min(block, max(2048, block // 4))
    warps = max(1, lanes // 32)
    tiles = dict(ROOM=room, LISTED=min(2048, room), LANES=lanes, EACH=each)
    return Launch(**tiles, num_warps=warps, maxnreg=min(255, 2048 // warps))


def narrows(sampling: Sampling) -> bool:
    """Whether any row may have a limit: the host does not look at the rows' own."""
    return sampling.top_k is not None or sampling.top_p is not None


def limits_of(
    logits: Tensor, rows: Rows, dtype: torch.dtype, suppress: int | None, first: int = 0, count: int | None = None
) -> Limits:
    """What top_k and top_p leave of logits [R, V], of records first to first + R; where rows.by_row, of so many."""
    V, R = logits.shape[1], len(logits) if count is None else count
    launch, sampling = limits_launch(V, architecture(logits)), rows.sampling
    limits = Limits(logits.new_empty(R, dtype=dtype), logits.new_empty(R, dtype=torch.int32))
    programs = min(R, 2 * multiprocessors(logits))  # each has a list: they walk the rows
    run(
        _limits_kernel,
        (programs,),
        *(logits, logits.stride(0)),
        Narrowing(sampling.temperature, sampling.top_k, sampling.top_p),
        *(rows.listed, limits, logits.new_empty(programs, launch.ROOM)),
        *(R, first, rows.L, V, -1 if suppress is None else suppress),
        BY_ROW=rows.by_row,
        SHIFT=rows.shift,
        launch=launch,
    )
    return limits
