"""How the head and the sampling from its logits are launched."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, by_row, by_tma, multiprocessors, run, tuned
from .head_sample_kernels import _head_kernel
from .lang import Store
from .limits_launch import narrows
from .records import Rows, combine_records, new_records
from .sample import SampleLaunch, record_logits, sample_parts

MERGED = 64  # rows up to which the products are sampled as they come; wider ones are on tensor cores only
WRITTEN = 512  # rows whose logits lie in memory at a time: 268 MB in fp32 of the published vocabulary
SUB = 16  # the fewest rows that tensor cores take; more would not fit registers beside the products
LOOKED = 8  # at a time where a record has more numbers: of 16 rows they would spill 8 to 40 bytes


@dataclass(frozen=True, kw_only=True)
class HeadLaunch(Launch):
    BLOCK_V: int
    BLOCK_T: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


def _tiles(BLOCK_T: int, BLOCK_K: int, num_warps: int, num_stages: int) -> HeadLaunch:
    return HeadLaunch(BLOCK_V=128, BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, num_warps=num_warps, num_stages=num_stages)


# For 16-bit products, by architecture: launches for up to so many rows, the last for all that are more.
HEAD = {
    80: (
        (16, _tiles(16, 64, 4, 6)),  # little shared memory: deep stages of few channels
        (0, _tiles(64, 64, 8, 4)),  # the products take more registers than four warps have
    ),
    90: (
        (16, _tiles(16, 128, 4, 3)),  # up to 64 rows two programs share a multiprocessor, 100 KB of stages each:
        (32, _tiles(32, 64, 4, 5)),  # one loads while the other samples
        (64, _tiles(64, 64, 4, 4)),
        (128, _tiles(128, 64, 8, 5)),
        (0, _tiles(256, 64, 8, 3)),  # the head goes from the cache to a multiprocessor once for more rows
    ),
    100: (  # as 90; a tile takes more registers, which eight warps have
        (16, _tiles(16, 128, 8, 3)),
        (32, _tiles(32, 64, 8, 5)),
        (64, _tiles(64, 64, 8, 4)),
        (0, _tiles(128, 64, 8, 5)),
    ),
}
# 32-bit products run on no tensor core: small tiles, whose operands fit registers.
FP32 = HeadLaunch(BLOCK_V=64, BLOCK_T=16, BLOCK_K=32)


def head_launch(R: int, V: int, D: int, itemsize: int, architecture: int) -> HeadLaunch:
    """Up to some 180 rows reading the head takes the time. More rows take wider tiles, whose logits are written."""
    table = HEAD[max(known for known in HEAD if known <= architecture)]
    launch = FP32 if itemsize > 2 else next(launch for most, launch in table if not most or most >= R)
    block_v, block_k = (max(16, triton.next_power_of_2(n)) for n in (V, D))
    return replace(launch, BLOCK_V=min(launch.BLOCK_V, block_v), BLOCK_K=min(launch.BLOCK_K, block_k))


def _launch(R: int, hidden: Tensor, weight: Tensor) -> HeadLaunch:
    V, D = weight.shape
    itemsize = max(hidden.itemsize, weight.itemsize)
    rows = next((most for most in (16, 32, 64, 128) if most >= R), 256)
    default = head_launch(R, V, D, itemsize, architecture(hidden))
    return tuned("_head_kernel", default, architecture(hidden), R=rows, V=V, D=D, itemsize=itemsize)


class Pieces(NamedTuple):
    """How the vocabulary is divided."""

    number: int
    tiles: int  # of BLOCK_V tokens a piece
    depth: int  # pieces a part


def head_pieces(launch: HeadLaunch, V: int, multiprocessors: int, look: bool = False) -> Pieces:
    """Parts are two a multiprocessor at most and the same however many rows there are, so that a row's sums have one
    order: up to 16 rows a piece is a part, whose tiles a program merges; of more rows a piece is a tile, and the kernel
    that combines the records merges a part's first; so it does for records that strategies look at."""
    count = triton.cdiv(V, launch.BLOCK_V)
    tiles = max(1, triton.cdiv(count, 2 * multiprocessors))
    return (
        Pieces(triton.cdiv(count, tiles), tiles, 1) if launch.BLOCK_T == SUB and not look else Pieces(count, 1, tiles)
    )


def _run_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    launch: HeadLaunch,
    suppress: int | None,
    bias: Tensor | None,
    softcap: float | None,
    *,
    records: Store | None = None,
    logits: Tensor | None = None,
    first: int = 0,
) -> None:
    """Write all records, or the logits [R, V] of records first to first + R."""
    V, D = weight.shape
    programs = 2 * multiprocessors(hidden)
    pieces = head_pieces(launch, V, multiprocessors(hidden), rows.look is not None)
    R = rows.N if logits is None else len(logits)
    tma = by_tma(weight, architecture(weight))
    run(
        _head_kernel,
        (min(triton.cdiv(R, launch.BLOCK_T) * pieces.number, programs),),
        hidden,
        TensorDescriptor.from_tensor(weight, [launch.BLOCK_V, launch.BLOCK_K]) if tma else weight,
        *(hidden.stride(0), weight.stride(0), rows.settings, rows.listed, records, logits),
        *(R, first, V, D, pieces.tiles, pieces.number, -1 if suppress is None else suppress),
        *(rows.look, bias, softcap),
        SHIFT=rows.shift,
        TMA=tma,
        SUB=SUB if rows.look is None else LOOKED,
        SKIP=architecture(weight) < 100 and rows.look is None,  # there it spills 8 to 48 bytes
        launch=launch,
        # With more numbers a record ptxas would spill some to fit another program; not on sm_90.
        **(dict(maxnreg=255) if rows.look is not None and architecture(weight) != 90 else {}),
    )


def head_records(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    suppress: int | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Store:
    """Records of all rows of hidden [N, D], or of those listed.

    Above 64 rows their logits lie in memory: a tile of products that keeps the tensor cores busy leaves no room for a
    second program, which would multiply while this one samples, and by the compiled code sampling takes twice as long
    as the products; to write and read logits takes a quarter. So it is for top_k and top_p, whose cut needs whole rows.
    WRITTEN rows at a time, of all N, for how many are listed only the device knows.
    """
    weight = by_row(weight)
    V, dtype = len(weight), compute_dtype(hidden.dtype, weight.dtype)
    launch, narrowed = _launch(rows.N, hidden, weight), narrows(rows.sampling)
    pieces = head_pieces(launch, V, multiprocessors(hidden), rows.look is not None)
    if not narrowed and (rows.N <= MERGED or launch.BLOCK_T == SUB):
        records = new_records(rows, pieces.number, hidden, dtype, pieces.depth)
        _run_head(hidden, weight, rows, launch, suppress, bias, softcap, records=records)
        return records
    logits = hidden.new_empty(min(WRITTEN, rows.N), V, dtype=dtype)
    few = 4 if architecture(weight) < 100 else 8  # rows that win together are left out; Triton 3.6 spills 4 on sm_100
    # Where nothing is narrowed, pieces and sums as of fewer rows: a row's bits do not depend on its neighbours.
    sampler = SampleLaunch(BLOCK_V=launch.BLOCK_V, BLOCK_T=few, TILES=pieces.depth, PAIRS=1)
    parts = sample_parts(logits) if narrowed else triton.cdiv(pieces.number, pieces.depth)
    records = new_records(rows, parts, hidden, dtype)
    for first in range(0, rows.N, WRITTEN):
        some = logits[: rows.N - first]
        _run_head(hidden, weight, rows, launch, suppress, bias, softcap, logits=some, first=first)
        record_logits(some, rows, records, suppress, first, None if narrowed else sampler)
    return records


def _head_sample(
    hidden: Tensor, weight: Tensor, suppress: int | None, *settings: Tensor | None
) -> tuple[Tensor, Tensor]:
    token, confidence = _head_sample_fake(hidden, weight)
    rows = Rows.of(settings)
    if rows.N:
        combine_records(head_records(by_row(hidden), weight, rows, suppress), rows, token, confidence)
    return token, confidence


def _head_sample_fake(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape, dtype = hidden.shape[:-1], compute_dtype(hidden.dtype, weight.dtype)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=dtype)
