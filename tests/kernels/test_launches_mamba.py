"""Launch parameters of convolution and scan, fp32 numbers in bf16 parts, what must not be read. 10 s interpreted."""

from typing import Any

import pytest
import torch
from parity import DEVICE, HALF, KERNELS, OPS, assert_op_as_good, leaves, make, results, with_leaves
from torch import Tensor

from tt_kernels.conv1d.causal_conv1d import causal_conv1d_launch
from tt_kernels.runtime.launch import INTERPRET, ON_CPU, overriding, recording
from tt_kernels.ssm import launch as shared
from tt_kernels.ssm.launch import TileLaunch, step_launch
from tt_kernels.ssm.mamba_block_launch import in_one_launch, in_one_wave, mamba_advance_launch, mamba_block_launch
from tt_kernels.ssm.ssd_block_launch import longest_block, ssd_advance_launch, ssd_block_launch
from tt_kernels.ssm.ssd_chunk_launch import span_tiles, ssd_chunk_launch

ceil = lambda a, b: -(-a // b)


ARCHITECTURES = (80, 90, 100)


def covers(block: int, n: int, least: int = 16) -> bool:
    """A power of two that holds n and less than twice as many, or the least that tensor cores take."""
    return block & (block - 1) == 0 and n <= block and (block < 2 * n or block == least)


def fits_registers(launch: TileLaunch, itemsize: int) -> bool:
    """Of the 255 that a thread has: its part of a state, operands of 32 bits beside it, and of the pairs of tokens."""
    threads = 32 * launch.num_warps
    state = launch.BLOCK_P * launch.BLOCK_N * max(itemsize, 2) // 2 // threads
    return state <= 64 and launch.BLOCK_T**2 // threads <= 32


@pytest.mark.parametrize("L", [1, 5, 16, 17, 32, 64])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_blocks_fit_a_tile_and_fill_the_gpu(L: int, rows: int) -> None:
    """At least 16 numbers of P a program: of few rows four programs a head are all there are."""
    for architecture in ARCHITECTURES:
        for itemsize in (2, 4):
            block = ssd_block_launch(rows, L, 64, 128, itemsize, architecture)
            advance = ssd_advance_launch(rows, L, 64, 128, itemsize)
            if longest_block(architecture, itemsize) >= L:
                assert covers(block.BLOCK_T, L) and covers(block.BLOCK_N, 128) and fits_registers(block, itemsize)
                assert rows * ceil(64, block.BLOCK_P) >= min(256, 4 * rows) or L > 16
                assert L <= 16 or itemsize > 2 or block.BLOCK_P >= 32, "every slice repeats the products of B and C"
            assert covers(advance.BLOCK_T, min(L, advance.BLOCK_T)) and covers(advance.BLOCK_N, 128)
            assert fits_registers(advance, itemsize) and rows * ceil(64, advance.BLOCK_P) >= min(256, 4 * rows)


@pytest.mark.parametrize("P,N", [(29, 5), (1, 1), (17, 33), (64, 128)])
def test_odd_sizes_take_whole_tiles(P: int, N: int) -> None:
    for itemsize in (2, 4):
        launches = [ssd_block_launch(1, 3, P, N, itemsize), ssd_advance_launch(1, 3, P, N, itemsize)]
        launches += [ssd_chunk_launch(3, P, N, itemsize, 90), mamba_block_launch(1, 3, P, N)]
        for launch in (*launches, mamba_advance_launch(P, N)):
            assert covers(launch.BLOCK_N, N) and launch.BLOCK_P >= 16 and covers(launch.BLOCK_P, min(P, launch.BLOCK_P))
            assert covers(launch.BLOCK_T, 3)
    launch = step_launch(1, P, N, numbers=16)
    assert covers(launch.BLOCK_N, N, 1) and launch.BLOCK_P < 2 * P


def test_long_blocks_are_chunked() -> None:
    """A block of 32 tokens is one program's everywhere; what is longer only where its pairs fit registers."""
    for itemsize in (2, 4):
        most = [longest_block(architecture, itemsize) for architecture in ARCHITECTURES]
        assert most == sorted(most) and most[0] >= 32
        for architecture, L in zip(ARCHITECTURES, most, strict=True):
            assert fits_registers(ssd_block_launch(64, L, 64, 128, itemsize, architecture), itemsize)
            assert longest_block(architecture, 4) <= longest_block(architecture, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_take_the_tensor_cores_rows(itemsize: int, architecture: int) -> None:
    tiles = []
    for Q in (1, 16, 20, 32, 64, 256):
        launch = ssd_chunk_launch(Q, 64, 128, itemsize, architecture)
        tiles.append(launch.BLOCK_T)
        assert launch.BLOCK_T % 16 == 0 == launch.BLOCK_T % launch.BLOCK_U and launch.BLOCK_U >= 16
        threads = 32 * launch.num_warps
        assert launch.BLOCK_T * launch.BLOCK_U // threads <= 16 and launch.BLOCK_P * launch.BLOCK_N // threads <= 64
        assert max(16, 2 * Q) >= launch.BLOCK_T, "of a short chunk less than half is padding"
        if launch.BLOCK_T >= 64:
            assert launch.BLOCK_P == 64, "a head whole: products of B and C once"
    assert tiles == sorted(tiles)
    if itemsize == 2 and architecture >= 90:
        assert tiles[-2] % 64 == 0, "rows of wgmma and tcgen05"
    assert tiles[-1] <= ssd_chunk_launch(256, 64, 128, 2, architecture).BLOCK_T, "32 bits have room for less"


@pytest.mark.parametrize("rows", [0, 1, 4, 64, 255, 256, 4096])
@pytest.mark.parametrize("tiles", [1, 4, 5, 64, 128, 1000])
def test_spans_cover_all_tiles(rows: int, tiles: int) -> None:
    spans = ceil(tiles, span_tiles(rows, tiles))
    assert 1 <= spans <= 16
    assert spans == 1 or (tiles > 4 and rows < 256)


@pytest.mark.parametrize("numbers", [16, 32])
def test_steps_fill_the_gpu(numbers: int) -> None:
    """Few rows take small slices; of many a thread holds as many numbers as it may."""
    slices = []
    for rows in (1, 64, 256, 4096):
        launch = step_launch(rows, 64, 128, numbers=numbers)
        slices.append(launch.BLOCK_P)
        assert rows * ceil(64, launch.BLOCK_P) >= min(256, 64 * rows)
        assert numbers * 32 * launch.num_warps >= launch.BLOCK_P * launch.BLOCK_N
    assert slices == sorted(slices) and slices[-1] * 128 == numbers * 128


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("B,L", [(1, 16), (64, 1), (256, 16), (1, 8192), (8, 1000)])
def test_convolutions_fill_the_gpu(B: int, L: int, itemsize: int) -> None:
    launch = causal_conv1d_launch(B, L, 6144, itemsize)
    tiles, slices = ceil(L, launch.BLOCK_L), ceil(6144, launch.BLOCK_C)
    assert covers(launch.BLOCK_L, min(L, launch.BLOCK_L), 1) and launch.BLOCK_C * itemsize >= 64
    assert B * tiles * slices >= 96
    assert 32 * 32 * launch.num_warps >= launch.BLOCK_L * launch.BLOCK_C, "numbers of a thread"
    assert (tiles - 1) * 3 <= 0.1 * L, "rows read twice"
    assert causal_conv1d_launch(B, L, 5, itemsize).BLOCK_C == 8


kernels = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
PARTS = [
    ("ssd_block", dict(b=1, L=9, H=2, P=5, G=1, N=24)),
    ("ssd_advance", dict(b=1, L=40, H=2, P=5, G=1, N=24)),
    ("mamba_block", dict(b=1, L=9, H=2, P=5, G=1, N=24, K=4)),
    ("mamba_advance", dict(b=1, L=20, H=2, P=5, G=1, N=24, K=4)),
    ("mamba_extend", dict(b=1, L=9, H=2, P=5, G=1, N=24, K=4)),
    ("ssd_chunk", dict(b=1, L=100, H=2, P=5, G=1, N=24, Q=64)),
    ("ssd_chunk", dict(b=1, L=70, H=2, P=5, G=1, N=24, Q=8, seeded=0, packed=1)),
    ("ssd_chunk", dict(b=1, L=110, H=1, P=5, G=1, N=24, Q=40)),  # less than a tile of 64, more, no power of two
    ("ssd_chunk", dict(b=1, L=50, H=1, P=5, G=1, N=24, Q=24)),
    ("ssd_chunk", dict(b=1, L=150, H=1, P=5, G=1, N=24, Q=70, ragged=1)),
]


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.skipif(not ON_CPU, reason="on a GPU bf16 takes this way anyhow")
@pytest.mark.parametrize("name,dims", PARTS)
def test_products_in_parts_are_as_good(name: str, dims: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no bf16: fp16 stands in there, three parts of which hold as much."""
    monkeypatch.setattr(shared, "splits", lambda *tensors: True)
    assert_op_as_good(OPS[name], dims, HALF)


def dirty(t: Tensor, counts: Tensor) -> Tensor:
    past = torch.arange(t.shape[1], device=t.device) >= counts.to(t.device)[:, None]
    return t.masked_fill(past.view(*past.shape, *[1] * (t.dim() - 2)), float("nan"))


@pytest.mark.kernels
@kernels
@pytest.mark.parametrize(
    "name,dims",
    [
        ("ssd_advance", dict(b=3, L=40, H=2, P=4, G=1, N=8)),
        ("ssd_chunk", dict(b=3, L=100, H=2, P=4, G=1, N=8, Q=20)),
        ("conv_advance", dict(B=3, L=9, C=5, K=4)),
        ("mamba_advance", dict(b=3, L=20, H=2, P=4, G=1, N=8, K=4)),
        ("mamba_extend", dict(b=3, L=15, H=2, P=4, G=1, N=8, K=4)),
        ("mamba_extend", dict(b=3, L=40, H=2, P=4, G=1, N=8, K=4)),
        ("mamba_extend", dict(b=3, L=70, H=2, P=4, G=1, N=8, K=4)),
    ],
)
def test_what_lies_past_a_row_does_not_show(name: str, dims: dict[str, Any]) -> None:
    op = OPS[name]
    kwargs = make(op, dims, torch.float32)
    kwargs["counts"] = torch.tensor([dims["L"] // 2, 0, 1]).to(DEVICE)
    soiled = {k: dirty(kwargs[k], kwargs["counts"]) for k in ("x", "xBC", "dt", "B", "C") if k in kwargs}
    got, want = (results(op, op.fn, kw) for kw in (kwargs | soiled, kwargs))
    for name in op.writes:
        assert torch.equal(got[name], want[name]) and torch.equal(got[name][1], leaves(kwargs)[name][1])
    if "y" in got and dims["L"] > 64:  # a block's y is one product, in which 0 times NaN is NaN
        assert all(torch.equal(got["y"][b, :n], want["y"][b, :n]) for b, n in enumerate(kwargs["counts"].tolist()))


def test_convolution_joins_the_scan_for_few_rows() -> None:
    lengths, many = (1, 16, 17, 32, 33, 64), (1, 64, 256, 257, 1024, 4096)
    joined = [[in_one_launch(rows, L) for L in lengths] for rows in many]
    for line in (*joined, *zip(*joined, strict=True)):
        assert list(line) == sorted(line, reverse=True), "where it pays it pays for fewer rows and tokens"
    assert in_one_launch(64, 16) and in_one_launch(64, 32) and not in_one_launch(4096, 1) and not in_one_launch(1, 33)


@pytest.mark.parametrize("rows,L", [(1, 1), (64, 16), (256, 16), (64, 17), (64, 32)])
def test_the_joined_launch_gives_every_multiprocessor_a_program(rows: int, L: int) -> None:
    launch = mamba_block_launch(rows, L, 64, 128)
    assert covers(launch.BLOCK_T, L) and covers(launch.BLOCK_N, 128)
    slices = ceil(64, launch.BLOCK_P)
    assert rows * slices >= min(128, 2 * rows) or L > 16
    assert slices == 1 or rows * slices <= 132, "every slice repeats the convolution of B and C"
    for one in (launch, mamba_advance_launch(64, 128)):
        threads = 32 * one.num_warps  # a state and the columns of x, B and C, all in registers
        assert one.BLOCK_P * one.BLOCK_N // threads <= 32
        assert one.BLOCK_T * (one.BLOCK_P + 2 * one.BLOCK_N) // threads <= 40
    assert ceil(64, mamba_advance_launch(64, 128).BLOCK_P) * 64 >= 128


@pytest.mark.parametrize("rows", [1, 64, 128, 129, 256, 4096])
@pytest.mark.parametrize("L", [1, 16, 17, 32, 33])
def test_states_are_written_beside_y_by_one_wave(rows: int, L: int) -> None:
    """Of programs that are alone on their multiprocessors; H200s have 132."""
    if in_one_wave(rows, L):
        assert in_one_launch(rows, L) and rows * ceil(64, mamba_block_launch(rows, L, 64, 128).BLOCK_P) <= 132
    assert in_one_wave(64, 16) and in_one_wave(128, 2)
    assert in_one_wave(4096, 0) and in_one_wave(1, 0, tf32=True)  # the only one that copies states without tokens


EXTENDED = [
    (1, 2, 1),
    (1, 16, 1),
    (2, 16, 1),
    (1, 32, 3),
    (32, 16, 3),
    (1, 33, 3),
    (32, 64, 3),
    (1, 100, 3),
    (1, 2048, 4),
]


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
@pytest.mark.parametrize("b,L,most", EXTENDED)
def test_what_enters_takes_few_launches(b: int, L: int, most: int) -> None:
    op = OPS["mamba_extend"]
    with torch.device("meta"):
        kwargs = op.inputs(torch.bfloat16, b=b, L=L, H=64, P=64, G=8, N=128, K=4, placed=1)
    kwargs = with_leaves(kwargs, {name: t.to("meta") for name, t in leaves(kwargs).items()})
    with recording(90) as launches:
        op.fn(**kwargs)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert len(names) <= most and set(names) <= set(op.kernels)
    assert sum("conv" in name or "mamba" in name for name in names) == 1, "xBC is convolved, its states written, once"


@pytest.mark.kernels
@pytest.mark.sanitize
@kernels
@pytest.mark.parametrize("b,L", [(2, 3), (3, 16), (2, 29), (2, 40)])
def test_extending_is_a_block_and_an_advance(b: int, L: int) -> None:
    """Bit for bit: y of `mamba_block`, the states of `mamba_advance`; to rounding where these take one launch and
    `mamba_extend` several: 17 to 32 tokens of few rows."""
    dims = dict(b=b, L=L, H=4, P=5, G=2, N=8, K=4, placed=1)
    extend, block, advance = (OPS[f"mamba_{name}"] for name in ("extend", "block", "advance"))
    kwargs = make(extend, dims, torch.float32 if INTERPRET else HALF)  # fp16 takes several launches
    got = results(extend, extend.fn, kwargs)
    want = results(advance, advance.fn, kwargs)
    want |= results(block, block.fn, {k: v for k, v in kwargs.items() if k != "counts"})
    off = 1e-5 if INTERPRET else 0.02  # two and a half roundings of bf16
    same = torch.equal if not 16 < L <= 32 else lambda a, b: torch.allclose(a.float(), b.float(), rtol=off, atol=off)
    assert torch.equal(got["state.conv"], want["state.conv"])
    assert same(got["y"], want["y"]) and same(got["state.ssm"], want["state.ssm"])


def on_meta(**dims: int) -> dict[str, Any]:
    """Arguments of `ssd_chunk` at the published sizes, for launches that are recorded."""
    with torch.device("meta"):
        kwargs = OPS["ssd_chunk"].inputs(torch.bfloat16, b=1, H=64, P=64, G=8, N=128, **dims)
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in kwargs.items()}


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
def test_what_was_measured_holds_for_every_prompt_of_about_that_length() -> None:
    """Without chunks a row is one chunk, of its own length: that is not what a measured launch is kept for."""
    with recording(90), overriding("_chunk_scan_kernel", None) as keys:
        for L in (1025, 1500, 2048):
            OPS["ssd_chunk"].fn(**on_meta(L=L, Q=0))
    assert keys == ["L=2048 chunk_size=0 P=64 N=128 itemsize=2"] * 3


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
def test_a_row_of_any_length_keeps_few_states_on_the_way() -> None:
    """Without a chunk size no memory grows with the states of a row: recorded launches are given 15 at most."""
    for L in (2048, 65536):
        with recording(90) as launches:
            before = OPS["ssd_chunk"].fn(**on_meta(L=L, Q=0)).chunk_states
        held = {id(a): a for _, _, args, _ in launches for a in args if isinstance(a, Tensor) and a.dim() == 5}
        assert before.numel() == 0
        assert max(t.shape[1] for t in held.values() if t.shape[2:] == (64, 64, 128)) <= 15


@pytest.mark.kernels
@pytest.mark.sanitize
@kernels
@pytest.mark.parametrize("L,seeded", [(100, 0), (100, 1), (20, 0)])
def test_short_chunks_of_wide_heads(L: int, seeded: int) -> None:
    """A whole head a program, or half of one where a state is read or one span holds the row."""
    assert_op_as_good(OPS["ssd_chunk"], dict(b=1, L=L, H=1, P=40, G=1, N=8, Q=8, seeded=seeded), HALF)


@pytest.mark.skipif(INTERPRET, reason="the interpreter refuses bf16")
@pytest.mark.parametrize("L,seeded,wanted", [(8192, 0, 64), (8192, 1, 32), (64, 0, 32)])
def test_heads_of_short_chunks_fit_registers(L: int, seeded: int, wanted: int) -> None:
    """A whole head where it fits: a program that reads a state and writes the last one spills with it."""
    with recording(90) as launches:
        OPS["ssd_chunk"].fn(**on_meta(L=L, Q=16, seeded=seeded))
    (grid, options), *_ = [(g, o) for kernel, g, _, o in launches if kernel.__name__ == "_chunk_scan_kernel"]
    assert options["BLOCK_P"] == wanted and grid[1] * options["BLOCK_P"] == 64
