"""The chunked scan: how its kernels are launched."""

from dataclasses import dataclass, replace
from typing import Any

import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..reference.slots import read_slots
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.slots import Slots
from ..runtime.varlen import resets
from .launch import TileLaunch, arithmetic, dense, lined_up
from .ssd_chunk_kernels import _chunk_scan_kernel, _chunk_states_kernel, _chunk_steps_kernel


@dataclass(frozen=True, kw_only=True)
class ChunkStatesLaunch(TileLaunch):
    STAGES: int = 1


@dataclass(frozen=True, kw_only=True)
class ChunkScanLaunch(TileLaunch):
    BLOCK_U: int  # tokens that a tile sees at a time
    STAGES: int = 1


def ssd_chunk_launch(chunk_size: int, P: int, N: int, itemsize: int, architecture: int) -> ChunkScanLaunch:
    """64 tokens a tile, what wgmma takes, and a head whole, so that products of B and C are made once. Tokens are seen
    32 at a time: registers hold no more; on sm_100 results lie elsewhere and eight warps take all. Chunks below 32
    tokens are bound by writing the states before them: 16 tokens a tile. sm_80 and fp32 take half a head: with a whole
    one they spill, as kernels do that read a state and write the last one.

    Two stages fetch a tile while the one before it is worked on, three of the small tiles two."""
    wide = itemsize > 2
    short = wide or chunk_size < 32
    block_t = 16 if short else 64 if architecture >= 90 else 32
    block_p = min(max(16, triton.next_power_of_2(P)), 32 if wide or architecture < 90 else 64)
    large = block_t == 64 and architecture >= 100
    return ChunkScanLaunch(
        BLOCK_T=block_t,
        BLOCK_U=block_t if large else min(block_t, 32),
        BLOCK_P=block_p,
        BLOCK_N=max(16, triton.next_power_of_2(N)),
        num_warps=8 if large else 4,
        STAGES=3 if short and not wide else 2 if block_t == 64 and chunk_size > 64 else 1,
    )


def chunk_states_launch(scan: ChunkScanLaunch, P: int, itemsize: int, architecture: int) -> ChunkStatesLaunch:
    """The scan's tiles, of whole heads where registers hold them: B is then read once. Eight warps share the work on a
    tile of 64 tokens, so that its programs' waits are shorter. Three stages keep the loads of two tiles in flight
    (`async_wait 4`); sm_80's registers do not hold the addresses."""
    tiles = {name: value for name, value in scan.options.items() if name != "BLOCK_U"}
    if itemsize == 2 and architecture >= 90:
        block_p = min(max(16, triton.next_power_of_2(P)), 64)
        tiles |= dict(BLOCK_P=block_p, num_warps=8 if scan.BLOCK_T * block_p == 64 * 64 else 4)
    return ChunkStatesLaunch(**tiles | dict(STAGES=3 if architecture >= 90 else 1))


def span_tiles(rows: int, tiles: int) -> int:
    """Tiles that one program walks, for `rows` programs side by side. Some 512 programs keep an H200's 132
    multiprocessors even. The last of n spans reads what n - 1 add, so there are at most 16; and four tiles are walked
    as soon as a second kernel is launched."""
    if tiles <= 4 or rows >= 256:
        return tiles
    return max(2, triton.cdiv(tiles, min(16, 512 // max(rows, 1))))


def contiguous_slots(pool: Tensor) -> Tensor:
    """The buffer with states that are contiguous, each by itself: a copy where they are not."""
    P, N = pool.shape[2:]
    return pool if pool.stride()[1:] == (P * N, N, 1) else pool.contiguous()


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial: Slots,
    final: Slots,
    *,
    counts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """y and the states before the chunks; the last ones go to `final`, where they are wanted."""
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    y, states = x.new_empty(x.shape), _chunk_states(x, A, N, chunk_size)
    wanted, asked = chunk_size is not None, chunk_size or 0
    chunk_size = chunk_size or max(L, 1)  # no chunks: the whole row is one
    x, B, C = (lined_up(t, 1) for t in (x, B, C))
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    itemsize, arch, near = x.element_size(), architecture(x), triton.next_power_of_2(L)
    default = ssd_chunk_launch(min(chunk_size, L), P, N, itemsize, arch)
    launch = tuned("_chunk_scan_kernel", default, arch, L=near, chunk_size=asked, P=P, N=N, itemsize=itemsize)
    slices = triton.cdiv(P, launch.BLOCK_P)
    chunk_tiles = max(1, triton.cdiv(min(chunk_size, L), launch.BLOCK_T))
    tiles = max(1, triton.cdiv(L, chunk_size)) * chunk_tiles
    span = span_tiles(b * H * slices, tiles)
    spans = triton.cdiv(tiles, span)
    if spans == 1:  # a program that writes the last state too has no registers for a second stage
        launch = replace(launch, STAGES=1)
    if launch.BLOCK_T == 16 and (spans == 1 or initial.ptr is not None):
        launch = replace(launch, BLOCK_P=min(launch.BLOCK_P, 32))
        slices = triton.cdiv(P, launch.BLOCK_P)
    starts = resets(cu_seqlens, b, L)
    shape = (L, H, H // G, chunk_size, chunk_tiles, tiles)
    constants = dict(P=P, N=N, **arithmetic(x, A, B, C, dt_limit=dt_limit))
    steps, high_sums, low_sums, seen, kept = states.new_empty(5, b, H, tiles, launch.BLOCK_T)
    whole = states.new_empty(b, H, tiles)
    block_h = min(triton.next_power_of_2(H), 16)
    run(
        _chunk_steps_kernel,
        (b * tiles, triton.cdiv(H, block_h)),
        *(dt, A, dt_bias, *dense(counts), starts, steps, high_sums, low_sums, seen, kept, whole),
        *(*dt.stride(), L, H, chunk_size, chunk_tiles, tiles),
        **{name: constants.pop(name) for name in ("LOW", "HIGH")},
        launch=Launch(BLOCK_T=launch.BLOCK_T, BLOCK_H=block_h),
    )
    added = passed = None
    if spans > 1:
        added = states.new_empty(b, spans - 1, H, P, N)
        passed = states.new_empty(b, spans - 1, H)
        if initial.ptr is not None and final.ptr is not None:  # every span reads what the last one writes
            initial = Slots.of(read_slots(initial.ptr, initial.indices, b, own=True))
        summing = chunk_states_launch(launch, P, itemsize, arch)
        run(
            _chunk_states_kernel,
            (b * (spans - 1) * H, triton.cdiv(P, summing.BLOCK_P)),
            *(x, B, kept, whole, *dense(counts), added, passed),
            *(*x.stride()[:3], *B.stride()[:3], *shape, spans - 1, span),
            **constants,
            launch=summing,
        )
    run(
        _chunk_scan_kernel,
        (b * spans * H, slices),
        *(x, B, C, D, steps, high_sums, low_sums, seen, kept, whole, initial, added, passed),
        *(*dense(counts), starts, y, states if wanted else None, final),
        *(*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *shape, spans, span),
        **constants,
        launch=launch,
    )
    return y, states


def _ssd_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None,
    counts: Tensor | None,
    state_indices: Tensor | None,
    out_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0] if ssm_state is None else 0
    new = x.new_empty((rows, *x.shape[2:], B.shape[3]), dtype=compute_dtype(x.dtype, A.dtype))
    options: Any = dict(counts=counts, cu_seqlens=cu_seqlens, chunk_size=chunk_size, dt_limit=(low, high))
    if ssm_state is None:
        y, states = chunked(x, dt, A, B, C, D, dt_bias, Slots.of(None), Slots.of(new), **options)
        return y, new, states
    used = contiguous_slots(ssm_state)
    initial = Slots.of(used, state_indices)
    final = initial if out_indices is None else Slots.of(used, out_indices)
    y, states = chunked(x, dt, A, B, C, D, dt_bias, initial, final, **options)
    if used is not ssm_state:
        ssm_state.copy_(used)
    return y, new, states


def _chunk_states(x: Tensor, A: Tensor, N: int, chunk_size: int | None) -> Tensor:
    b, L, H, P = x.shape
    chunks = 0 if chunk_size is None else max(1, -(-L // chunk_size))
    return x.new_empty((b, chunks, H, P, N), dtype=compute_dtype(x.dtype, A.dtype))


def _ssd_chunk_fake(x, dt, A, B, C, D, dt_bias, ssm_state, counts, read, out, cu_seqlens, chunk_size, *_):
    states = _chunk_states(x, A, B.shape[3], chunk_size)
    rows = x.shape[0] if ssm_state is None else 0
    return x.new_empty(x.shape), states.new_empty(rows, *states.shape[2:]), states
