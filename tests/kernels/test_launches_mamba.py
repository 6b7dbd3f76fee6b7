"""Launch parameters of convolution and scan, fp32 numbers in bf16 parts, what must not be read. 10 s interpreted."""

from typing import Any

import pytest
import torch
from parity import DEVICE, HALF, KERNELS, OPS, assert_op_as_good, leaves, make, results, with_leaves
from torch import Tensor

from tt_kernels.conv1d.causal_conv1d import causal_conv1d_launch
from tt_kernels.runtime.launch import INTERPRET, ON_CPU, overriding, recording
from tt_kernels.ssm import launch as shared
from tt_kernels.ssm.launch import step_launch
from tt_kernels.ssm.mamba_block_launch import in_one_launch, in_one_wave, mamba_advance_launch, mamba_block_launch
from tt_kernels.ssm.ssd_block_launch import longest_block, ssd_advance_launch, ssd_block_launch
from tt_kernels.ssm.ssd_chunk_launch import span_tiles, ssd_chunk_launch

ceil = lambda a, b: -(-a // b)


@pytest.mark.parametrize("L", [1, 5, 16, 17, 32, 64])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_blocks_fit_a_tile_and_fill_the_gpu(L: int, rows: int) -> None:
    launch = ssd_block_launch(rows, L, 64, 128, 2)
    assert max(L, 16) <= launch.BLOCK_T and launch.BLOCK_N == 128
    assert rows * ceil(64, launch.BLOCK_P) >= min(256, 4 * rows) or L > 16
    assert ssd_block_launch(rows, L, 64, 128, 4).BLOCK_P <= 32
    launch = ssd_advance_launch(rows, L, 64, 128, 2)
    assert launch.BLOCK_T <= 32 and rows * ceil(64, launch.BLOCK_P) >= min(256, 4 * rows)


def test_odd_sizes_take_whole_tiles() -> None:
    for launch in (ssd_block_launch(1, 3, 29, 5, 2), ssd_chunk_launch(3, 29, 5, 2, 90)):
        assert launch.BLOCK_N == 16 and launch.BLOCK_P in (16, 32)
    assert step_launch(1, 29, 5, numbers=16).BLOCK_N == 8


def test_long_blocks_are_chunked() -> None:
    assert [longest_block(architecture, 2) for architecture in (80, 90, 100)] == [32, 64, 64]
    assert longest_block(90, 4) == 32


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_chunks_take_the_tensor_cores_rows(architecture: int) -> None:
    long, short = (ssd_chunk_launch(Q, 64, 128, 2, architecture) for Q in (64, 16))
    assert (32 if architecture == 80 else 64) == long.BLOCK_T and long.BLOCK_T % long.BLOCK_U == 0
    assert short.BLOCK_T == 16 == ssd_chunk_launch(64, 64, 128, 4, architecture).BLOCK_T


@pytest.mark.parametrize("rows", [0, 1, 4, 64, 255, 256, 4096])
@pytest.mark.parametrize("tiles", [1, 4, 5, 64, 128, 1000])
def test_spans_cover_all_tiles(rows: int, tiles: int) -> None:
    spans = ceil(tiles, span_tiles(rows, tiles))
    assert 1 <= spans <= 16
    assert spans == 1 or (tiles > 4 and rows < 256)


def test_steps_and_convolutions_fill_the_gpu() -> None:
    assert 64 * ceil(64, step_launch(64, 64, 128, numbers=16).BLOCK_P) == 256
    few, many = causal_conv1d_launch(1, 16, 6144, 2), causal_conv1d_launch(1, 8192, 6144, 2)
    assert ceil(6144, few.BLOCK_C) >= 96 and many.BLOCK_L * many.BLOCK_C == 4096


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


@pytest.mark.parametrize(
    "rows,L,one", [(64, 16, True), (256, 16, True), (64, 32, True), (256, 32, False), (64, 33, False)]
)
def test_convolution_joins_the_scan_for_few_rows(rows: int, L: int, one: bool) -> None:
    assert in_one_launch(rows, L) is one
    if one:
        launch = mamba_block_launch(rows, L, 64, 128)
        assert max(L, 16) <= launch.BLOCK_T and launch.num_warps == 8
        assert rows * ceil(64, launch.BLOCK_P) >= 128 or L > 16
    assert mamba_advance_launch(64, 128).BLOCK_P == 32 and mamba_block_launch(1, 3, 29, 5).BLOCK_P == 32


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
    assert (
        sum("conv" in name or "mamba" in name for name in names) == 1
    )  # xBC is convolved, and its states written, once


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
    same = torch.equal if not 16 < L <= 32 else lambda a, b: torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)
    assert torch.equal(got["state.conv"], want["state.conv"])
    assert same(got["y"], want["y"]) and same(got["state.ssm"], want["state.ssm"])


def test_steps_of_few_rows_take_small_slices() -> None:
    assert [step_launch(rows, 64, 128, numbers=32).BLOCK_P for rows in (64, 4096)] == [16, 32]


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
