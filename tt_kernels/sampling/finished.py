"""Records of logits in memory that a bias and a soft cap are still to be applied to."""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, run
from .head_sample_launch import WRITTEN
from .lang import Store, finish, source_of
from .limits_launch import narrows
from .records import Rows
from .sample import record_logits


@triton.jit(do_not_specialize=["R", "first"])
def _finished_kernel(
    logits_ptr,  # [rows, V]
    stride_logits,
    settings,  # Settings of the rows
    listed,  # Listed: record n is of row index[n]
    out_ptr,  # [R, V]: of records first to first + R
    R,
    first,
    V,
    bias_ptr,  # [V], or None
    softcap: tl.constexpr,  # or None
    SHIFT: tl.constexpr,  # each row's are those of the row before
    BLOCK_V: tl.constexpr,
):
    programmatic_launch()
    record = tl.program_id(1)
    if record < min(R, tl.load(listed.count) - first):
        source = source_of(tl.load(listed.index + first + record), settings, SHIFT)
        ids = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + source.to(tl.int64) * stride_logits + ids, mask=ids < V, other=0.0)
        x = finish(x.to(out_ptr.dtype.element_ty)[:, None], ids, V, bias_ptr, softcap)
        tl.store(out_ptr + record.to(tl.int64) * V + ids[:, None], x, mask=ids[:, None] < V)


def finished_launch(V: int) -> Launch:
    """Eight numbers a thread."""
    return Launch(BLOCK_V=min(1024, triton.next_power_of_2(V)))


def finished_records(
    logits: Tensor, rows: Rows, records: Store, suppress: int, bias: Tensor | None, softcap: float | None
) -> None:
    """Write the records of all listed rows from logits [rows, V]. Where rows are narrowed, which takes finished logits
    several times, these lie in memory, of WRITTEN records at a time, as a head's do."""
    if (bias is None and softcap is None) or not narrows(rows.sampling):
        record_logits(logits, rows, records, suppress, bias=bias, softcap=softcap)
        return
    V = logits.shape[1]
    finished = logits.new_empty(min(WRITTEN, rows.N), V, dtype=records.stats.dtype)
    launch = finished_launch(V)
    for first in range(0, rows.N, WRITTEN):
        some = finished[: rows.N - first]
        run(
            _finished_kernel,
            (triton.cdiv(V, launch.BLOCK_V), len(some)),
            *(logits, logits.stride(0), rows.settings, rows.listed, some, len(some), first, V, bias, softcap),
            SHIFT=rows.shift,
            launch=launch,
        )
        record_logits(some, replace(rows, by_row=False), records, suppress, first)
