"""What callers do wrong is named by every public op: the argument, what it is and what was expected."""

import math
from typing import Any

import pytest
import torch
from parity import KERNELS, make
from torch import Tensor

import tt_kernels
from tt_kernels import OPS, ExpertWeights, core

pytestmark = pytest.mark.kernels


def args(name: str, **changes: Any) -> dict[str, Any]:
    return make(OPS[name], OPS[name].cases[0], torch.float32) | changes


NAN, INF = float("nan"), float("inf")
BAD = [
    ("rms_norm", dict(eps=2**70), "rms_norm: eps is 1180591620717411303424, expected a number"),
    ("route", dict(scale=2**70), "route: scale is 1180591620717411303424, expected a finite number"),
    ("rms_norm", dict(x=torch.ones(2, 4), weight=torch.ones(8)), "rms_norm: weight has D=8, but x has D=4"),
    ("rms_norm", dict(x=torch.tensor(1.0)), "rms_norm: x is [], expected [*, D]"),
    ("rms_norm", dict(x=torch.ones(2, 37).long()), "rms_norm: x is torch.int64, expected a tensor of floats"),
    ("rms_norm", dict(x=[1.0]), "rms_norm: x is [1.0], expected a tensor"),
    ("rms_norm", dict(x=None), "rms_norm: x is None, expected a tensor"),
    ("rms_norm", dict(weight=torch.ones(37, device="meta")), "rms_norm: weight is on meta, but x is on"),
    ("rms_norm", dict(x=torch.ones(2, 37).to(torch.float8_e4m3fn)), "x is torch.float8_e4m3fn, expected a tensor of"),
    ("rms_norm", dict(eps=-1e-5), "rms_norm: eps is -1e-05, expected a number, 0 or more"),
    ("rms_norm", dict(eps="1e-5"), "rms_norm: eps is '1e-5', expected a number, 0 or more"),
    ("modulated_rms_norm", dict(order="norm"), "order is 'norm', expected 'modulate_norm' or 'norm_modulate'"),
    ("modulated_rms_norm", dict(scale=None), "scale is None, expected shift and scale, or neither"),
    ("modulated_rms_norm", dict(branch=None), "branch is None, expected a branch beside the gate"),
    ("modulated_rms_norm", dict(shift=torch.ones(3, 29)), "shift has *=[3], but x has *=[2]"),
    ("modulated_rms_norm", dict(weight=None), "modulated_rms_norm: weight is None, expected a tensor"),
    ("modulated_rms_norm", dict(eps=float("nan")), "modulated_rms_norm: eps is nan, expected a number, 0 or more"),
    ("gated_group_norm", dict(groups=5), "gated_group_norm: groups is 5, expected a divisor of D=24"),
    ("gated_group_norm", dict(groups="4"), "gated_group_norm: groups is '4', expected a divisor of D=24"),
    ("gated_group_norm", dict(groups=4.0), "gated_group_norm: groups is 4.0, expected a divisor of D=24"),
    ("gated_group_norm", dict(groups=True), "gated_group_norm: groups is True, expected a divisor of D=24"),
    ("gated_group_norm", dict(groups=torch.ones(2, 2)), "groups is a tensor [2, 2], expected a divisor of D=24"),
    ("gated_group_norm", dict(z=None), "gated_group_norm: z is None, expected a tensor"),
    ("gated_group_norm", dict(eps=None), "gated_group_norm: eps is None, expected a number, 0 or more"),
    ("causal_conv1d", dict(bias=torch.ones(5)), "causal_conv1d: bias has C=5, but x has C=6"),
    ("causal_conv1d", dict(activation="gelu"), "activation is 'gelu', expected 'silu' or None"),
    ("causal_conv1d", dict(state=torch.ones(2, 6, 2)), "state is [2, 6, 2], expected at least K-1=3 columns"),
    ("causal_conv1d", dict(cu_seqlens=torch.tensor([0, 10])), "state is [2, 6, 4], expected None beside cu_seqlens"),
    ("conv_state", dict(kernel_size=3), "conv_state: kernel_size is 3, expected K=4"),
    ("conv_state", dict(lengths=torch.ones(3)), "lengths is torch.float32, expected a tensor of ints"),
    ("conv_state", dict(lengths=torch.tensor([5, -1, 0])), "conv_state: lengths is -1, expected 0 to L=5"),
    ("conv_state", dict(lengths=torch.tensor([5, 6, 0])), "conv_state: lengths is 6, expected 0 to L=5"),
    ("causal_conv1d", dict(x=None), "causal_conv1d: x is None, expected a tensor"),
    ("causal_conv1d", dict(weight=torch.ones(6, 4, device="meta")), "causal_conv1d: weight is on meta, but x is on"),
    ("causal_conv1d", dict(weight=torch.ones(6, 0)), "causal_conv1d: weight has K=0, expected 1 or more"),
    ("conv_state", dict(kernel_size=4.0), "conv_state: kernel_size is 4.0, expected K=4"),
    ("conv_state", dict(kernel_size="4"), "conv_state: kernel_size is '4', expected K=4"),
    ("conv_state", dict(x=None), "conv_state: x is None, expected a tensor"),
    ("ssd_advance", dict(lengths=torch.tensor([-1, 6])), "ssd_advance: lengths is -1, expected 0 to L=5"),
    ("ssd_chunk", dict(lengths=torch.tensor([7, 8])), "ssd_chunk: lengths is 8, expected 0 to L=7"),
    ("mamba_advance", dict(lengths=torch.tensor([-1, 5])), "mamba_advance: lengths is -1, expected 0 to L=5"),
    ("conv_block_states", dict(block_size=0), "conv_block_states: block_size is 0, expected 1 or more"),
    ("conv_block_states", dict(block_size=2.5), "conv_block_states: block_size is 2.5, expected 1 or more"),
    ("conv_block_states", dict(block_size=True), "conv_block_states: block_size is True, expected 1 or more"),
    ("conv_block_states", dict(kernel_size=None), "conv_block_states: kernel_size is None, expected 1 or more"),
    *(
        ("ssd_block", dict(dt_limit=limit), f"ssd_block: dt_limit is {limit!r}, expected (low, high) with 0 <= low <= ")
        for limit in (None, 1.0, "ab", (0.0,), (0, 1, 2), (-1.0, 1.0), (True, 2.0), (0.0, NAN), (INF, INF), ("0", "1"))
    ),
    ("ssd_block", dict(D=None), "ssd_block: D is None, expected a tensor"),
    ("ssd_block", dict(state=torch.ones(2, 4, 3, 5, device="meta")), "ssd_block: state is on meta, but x is on"),
    ("ssd_step", dict(state=None), "ssd_step: state is None, expected a tensor"),
    ("ssd_advance", dict(dt_bias=None), "ssd_advance: dt_bias is None, expected a tensor"),
    ("ssd_chunk", dict(chunk_size=2.5), "ssd_chunk: chunk_size is 2.5, expected 1 or more, or None"),
    ("ssd_chunk", dict(chunk_size="64"), "ssd_chunk: chunk_size is '64', expected 1 or more, or None"),
    ("ssd_chunk", dict(chunk_size=True), "ssd_chunk: chunk_size is True, expected 1 or more, or None"),
    (
        "mamba_block",
        dict(state=torch.ones(2, 4, 3, 0)),
        "C is 32, expected H*P + 2*G*N with H=4, P=3, N=0 of the state",
    ),
    ("mamba_block", dict(D=None), "mamba_block: D is None, expected a tensor"),
    ("mamba_advance", dict(dt_limit=[1, 0]), "mamba_advance: dt_limit is [1, 0], expected (low, high)"),
    ("mamba_step", dict(conv_state=None), "mamba_step: conv_state is None, expected a tensor"),
    ("mamba_step", dict(bias=torch.ones(32).int()), "mamba_step: bias is torch.int32, expected a tensor of floats"),
    ("ssd_block", dict(A=torch.ones(3)), "ssd_block: A has H=3, but x has H=4"),
    ("ssd_block", dict(state=torch.ones(4, 3, 5)), "ssd_block: state is [4, 3, 5], expected [b, H, P, N]"),
    ("ssd_block", dict(dt_limit=(1.0, 0.5)), "dt_limit is (1.0, 0.5), expected (low, high) with 0 <= low <= high"),
    (
        "ssd_step",
        dict(B=torch.ones(2, 3, 5), C=torch.ones(2, 3, 5)),
        "G is 3, expected groups of B that divide",
    ),
    ("ssd_advance", dict(B=torch.ones(2, 5, 3, 5)), "B has G=3 groups, expected a divisor of H=4, the heads of x"),
    ("ssd_advance", dict(lengths=torch.tensor([1])), "ssd_advance: lengths has b=1, but x has b=2"),
    ("ssd_chunk", dict(chunk_size=0), "ssd_chunk: chunk_size is 0, expected 1 or more"),
    ("ssd_chunk", dict(cu_seqlens=torch.tensor([0, 14])), "state is [2, 4, 3, 5], expected None beside cu_seqlens"),
    ("mamba_block", dict(weight=torch.ones(31, 4)), "mamba_block: weight has C=31, but xBC has C=32"),
    (
        "mamba_block",
        dict(state=torch.ones(2, 4, 3, 6)),
        "C is 32, expected H*P + 2*G*N with H=4, P=3, N=6 of the state",
    ),
    ("mamba_block", dict(dt_limit=(1.0, 0.5)), "dt_limit is (1.0, 0.5), expected (low, high) with 0 <= low <= high"),
    ("mamba_advance", dict(conv_state=torch.ones(2, 32, 3)), "mamba_advance: conv_state has K=3, but weight has K=4"),
    ("mamba_advance", dict(lengths=torch.ones(2)), "lengths is torch.float32, expected a tensor of ints"),
    ("mamba_step", dict(dt=torch.ones(2, 5)), "mamba_step: A has H=4, but dt has H=5"),
    ("route", dict(top_k=9), "route: top_k is 9, expected 1 to E=8"),
    ("route", dict(n_group=3), "n_group is 3, expected a divisor of E=8 that leaves groups of at least 2"),
    ("route", dict(n_group=2, topk_group=3), "route: topk_group is 3, expected 1 to n_group=2"),
    ("route", dict(bias=None), "route: bias is None, expected a tensor"),
    ("route", dict(weight=torch.ones(0, 5), bias=torch.ones(0)), "route: weight has E=0, expected 1 or more"),
    ("route", dict(weight=torch.ones(8, 5, device="meta")), "route: weight is on meta, but x is on"),
    ("route", dict(top_k="3"), "route: top_k is '3', expected 1 to E=8"),
    ("route", dict(top_k=2.5), "route: top_k is 2.5, expected 1 to E=8"),
    ("route", dict(top_k=True), "route: top_k is True, expected 1 to E=8"),
    ("route", dict(n_group=1.0), "n_group is 1.0, expected a divisor of E=8 that leaves groups of at least 2"),
    ("route", dict(topk_group=None), "route: topk_group is None, expected 1 to n_group=1"),
    ("route", dict(norm_topk_prob="no"), "route: norm_topk_prob is 'no', expected True or False"),
    ("route", dict(scale=float("inf")), "route: scale is inf, expected a finite number"),
    ("route", dict(scale=None), "route: scale is None, expected a finite number"),
    ("experts", dict(activation="gelu"), "experts: activation is 'gelu', expected 'relu2' or 'silu'"),
    ("experts", dict(x=torch.ones(5, 6).half()), "up is torch.float32, expected the dtype of x, torch.float16"),
    ("experts", dict(ends=torch.ones(4).int()), "experts: order is None, expected order and ends, or neither"),
    ("experts", dict(ids=torch.zeros(5, 3).long()), "experts: weights has K=2, but ids has K=3"),
    ("experts", dict(ids=None), "experts: ids is None, expected a tensor"),
    ("experts", dict(ids=torch.zeros(5, 2)), "experts: ids is torch.float32, expected a tensor of ints"),
    ("experts", dict(ids=torch.zeros(5, 2, device="meta").long()), "experts: ids is on meta, but x is on"),
    ("experts", dict(expert_weights=None), "experts: expert_weights is None, expected ExpertWeights"),
    ("experts", dict(shared=torch.ones(2)), "experts: shared is a tensor [2], expected ExpertWeights"),
    (
        "experts",
        dict(expert_weights=ExpertWeights(torch.ones(4, 11, 6), None)),
        "experts: down is None, expected a tensor",
    ),
    (
        "experts",
        dict(shared=ExpertWeights(torch.ones(9, 6), None)),
        "experts: shared_down is None, expected a tensor",
    ),
    (
        "experts",
        dict(shared=ExpertWeights(torch.ones(9, 6), torch.ones(6, 9), torch.ones(9, 6))),
        "experts: shared_gate is a tensor [9, 6], expected None, as gate is",
    ),
    ("context_attention", dict(q=torch.ones(2, 3, 3, 5)), "k has Hkv=2 heads, expected a divisor of Hq=3"),
    (
        "context_attention",
        dict(lengths=torch.tensor([13, 1])),
        "lengths goes up to 13, but the page table has room for 12",
    ),
    (
        "append_attention",
        dict(lengths=torch.tensor([1, 10])),
        "lengths is 10 and 3 tokens enter, but the page table has room for 12",
    ),
    ("context_attention", dict(lengths=torch.tensor([-1, 1])), "lengths goes down to -1, expected 0 or more"),
    ("context_attention", dict(lengths=3), "context_attention: lengths is 3, expected a tensor"),
    ("context_attention", dict(lengths=None), "context_attention: lengths is None, expected a tensor"),
    ("context_attention", dict(page_table=torch.zeros(2, 3)), "page_table is torch.float32, expected a tensor of ints"),
    (
        "context_attention",
        dict(page_table=torch.zeros(2, 3).short()),
        "page_table is torch.int16, expected a tensor of",
    ),
    ("context_attention", dict(page_table=torch.zeros(6).int()), "page_table is [6], expected [B, row_pages]"),
    ("context_attention", dict(lengths=torch.zeros(2, device="meta").int()), "lengths is on meta, but q is on cpu"),
    (
        "context_attention",
        dict(v_pages=torch.zeros(6, 5, 2, 5)),
        "v_pages has page_size=5, but k_pages has page_size=4",
    ),
    ("context_attention", dict(k_pages=torch.zeros(6, 0, 2, 5)), "k_pages has page_size=0, expected 1 or more"),
    ("context_attention", dict(k=torch.zeros(2, 3, 2, 5).half()), "k is torch.float16, expected torch.float32"),
    ("context_attention", dict(q=torch.zeros(2, 3, 4, 0)), "q has P=0, expected 1 or more"),
    ("context_attention", dict(causal="yes"), "context_attention: causal is 'yes', expected True or False"),
    *(
        ("context_attention", dict(scale=scale), f"scale is {scale!r}, expected a finite number, or None")
        for scale in ("1", True, float("nan"), float("inf"), 1j)
    ),
    ("append_attention", dict(counts=torch.ones(3).int()), "append_attention: counts has B=3, but q has B=2"),
    ("append_attention", dict(counts=1), "append_attention: counts is 1, expected a tensor"),
    ("append_attention", dict(counts=torch.ones(2)), "counts is torch.float32, expected a tensor of ints"),
    ("append_attention", dict(k_pages=None), "append_attention: k_pages is None, expected a tensor"),
    ("append_attention", dict(scale=torch.ones(1)), "scale is a tensor [1], expected a finite number, or None"),
    ("causal_attention", dict(k=torch.ones(2, 4, 2, 3)), "causal_attention: k has N=4, but q has N=5"),
    ("causal_attention", dict(q=torch.ones(2, 5, 4)), "causal_attention: q is [2, 5, 4], expected [B, N, Hq, P]"),
    ("causal_attention", dict(v=None), "causal_attention: v is None, expected a tensor"),
    ("causal_attention", dict(v=torch.ones(2, 5, 2, 3).long()), "v is torch.int64, expected a tensor of floats"),
    ("causal_attention", dict(cu_seqlens=[0, 10]), "causal_attention: cu_seqlens is [0, 10], expected a tensor"),
    ("causal_attention", dict(cu_seqlens=torch.tensor(3)), "cu_seqlens is [], expected [sequences+1]"),
    ("causal_attention", dict(cu_seqlens=torch.zeros(0).int()), "cu_seqlens is [0], expected [sequences+1]"),
    ("causal_attention", dict(cu_seqlens=torch.ones(2)), "cu_seqlens is torch.float32, expected a tensor of ints"),
    ("causal_attention", dict(scale="1"), "scale is '1', expected a finite number, or None"),
    *(
        ("block_diffusion_attention", dict(block_size=size), f"block_size is {size!r}, expected 1 or more")
        for size in (0, -4, 2.5, True, "4", None)
    ),
    ("block_diffusion_attention", dict(k_clean=torch.ones(2, 5, 2, 3)), "k_clean has N=5, but q has N=6"),
    ("block_diffusion_attention", dict(v_clean=torch.ones(2, 6, 2, 3).double()), "v_clean is torch.float64, expected"),
    ("block_diffusion_attention", dict(scale=True), "scale is True, expected a finite number, or None"),
    ("gumbel_noise", dict(vocab_size=0), "gumbel_noise: vocab_size is 0, expected 1 or more"),
    ("sample", dict(top_k=0), "sample: top_k is 0, expected 1 or more, or None"),
    ("sample", dict(top_p=0.0), "sample: top_p is 0.0, expected above 0 and up to 1, or None"),
    ("sample", dict(suppress=11), "sample: suppress is 11, expected a token id below V=11"),
    ("gumbel_noise", dict(vocab_size=4.0), "gumbel_noise: vocab_size is 4.0, expected 1 or more"),
    ("gumbel_noise", dict(seed=torch.ones(3)), "gumbel_noise: seed is torch.float32, expected a tensor of ints"),
    ("gumbel_noise", dict(step=5), "gumbel_noise: step is 5, expected a tensor"),
    ("sample", dict(top_k="3"), "sample: top_k is '3', expected 1 or more, or None"),
    ("sample", dict(top_k=2.0), "sample: top_k is 2.0, expected 1 or more, or None"),
    ("sample", dict(top_k=True), "sample: top_k is True, expected 1 or more, or None"),
    ("sample", dict(top_k=2**63), f"sample: top_k is {2**63}, expected 1 or more, or None"),
    ("sample", dict(top_p=math.nan), "sample: top_p is nan, expected above 0 and up to 1, or None"),
    ("sample", dict(top_p="0.9"), "sample: top_p is '0.9', expected above 0 and up to 1, or None"),
    ("sample", dict(top_p=True), "sample: top_p is True, expected above 0 and up to 1, or None"),
    ("sample", dict(suppress=-1), "sample: suppress is -1, expected a token id below V=11"),
    ("sample", dict(suppress=False), "sample: suppress is False, expected a token id below V=11"),
    ("sample", dict(suppress=1.0), "sample: suppress is 1.0, expected a token id below V=11"),
    (
        "sample",
        dict(logits=torch.ones(6, 1), suppress=0),
        "sample: suppress is 0, expected tokens beside it, but V is 1",
    ),
    ("sample", dict(logits=torch.ones(6, 0)), "sample: logits has V=0, expected 1 or more"),
    ("sample", dict(temperature=torch.ones(5)), "sample: temperature has *=[5], but logits has *=[6]"),
    ("sample", dict(temperature=1.0), "sample: temperature is 1.0, expected a tensor"),
    ("sample", dict(temperature=torch.ones(6).long()), "temperature is torch.int64, expected a tensor of floats"),
    ("sample", dict(temperature=-torch.ones(6)), "sample: temperature is -1.0, expected 0 or more"),
    (
        "head_sample",
        dict(temperature=torch.tensor([0, 1, 1, math.nan, 1, 1])),
        "temperature is nan, expected 0 or more",
    ),
    ("head_sample", dict(weight=torch.ones(0, 16)), "head_sample: weight has V=0, expected 1 or more"),
    ("head_sample", dict(top_p=2), "head_sample: top_p is 2, expected above 0 and up to 1, or None"),
    ("head_sample", dict(weight=torch.ones(37, 15)), "head_sample: weight has D=15, but hidden has D=16"),
    ("commit", dict(threshold=torch.ones(3)), "commit: threshold has B=3, but block has B=4"),
    ("commit", dict(token=torch.ones(4, 7).int()), "token is torch.int32, expected the dtype of block, torch.int64"),
    ("commit", dict(mask_token_id=None), "commit: mask_token_id is None, expected an id of the block's torch.int64"),
    (
        "commit",
        dict(mask_token_id=2**63),
        f"commit: mask_token_id is {2**63}, expected an id of the block's torch.int64",
    ),
    (
        "commit",
        dict(block=torch.ones(4, 7).int(), token=torch.ones(4, 7).int(), mask_token_id=2**31),
        f"commit: mask_token_id is {2**31}, expected an id of the block's torch.int32",
    ),
    ("commit", dict(steps_left=torch.ones(4)), "commit: steps_left is torch.float32, expected a tensor of ints"),
    ("unmask", dict(mask_token_id=True), "unmask: mask_token_id is True, expected a token id below V=37"),
    (
        "unmask",
        dict(temperature=torch.tensor([0.0, 1.0, -0.5, 1.0])),
        "unmask: temperature is -0.5, expected 0 or more",
    ),
    ("unmask", dict(block=torch.ones(4, 5)), "unmask: block is torch.float32, expected a tensor of ints"),
    ("unmask", dict(position=torch.ones(4, 5).long()), "unmask: position is [4, 5], expected [B]"),
    ("unmask", dict(mask_token_id=None), "unmask: mask_token_id is None, expected a token id below V=37"),
    ("unmask", dict(mask_token_id=37), "unmask: mask_token_id is 37, expected a token id below V=37"),
    ("linear_cross_entropy", dict(targets=torch.ones(2, 5)), "targets is torch.float32, expected a tensor of ints"),
    ("linear_cross_entropy", dict(targets=torch.full((2, 5), 11)), "targets has 11, expected token ids below V=11"),
    ("linear_cross_entropy", dict(targets=torch.full((2, 5), -100)), "targets has -100, expected token ids below V=11"),
    ("linear_cross_entropy", dict(weight=torch.ones(0, 6)), "linear_cross_entropy: weight has V=0, expected 1 or more"),
    ("linear_cross_entropy", dict(hidden=torch.tensor(1.0)), "linear_cross_entropy: hidden is [], expected [*, D]"),
    ("linear_cross_entropy", dict(mask=torch.ones(2, 5)), "mask is torch.float32, expected a tensor of bools"),
    ("linear_cross_entropy", dict(targets=torch.ones(2, 4).long()), "targets has *=[2, 4], but hidden has *=[2, 5]"),
]


@pytest.mark.parametrize("name,changes,message", BAD, ids=[f"{n}-{'-'.join(c)}-{i}" for i, (n, c, _) in enumerate(BAD)])
def test_bad_input_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    lengths = changes.get("lengths")
    if KERNELS and OPS[name].kernels and isinstance(lengths, Tensor) and lengths.numel() > 1 and not lengths.is_meta:
        pytest.skip("kernels do not read lengths on the host")
    with pytest.raises(ValueError) as error:
        OPS[name].fn(**args(name, **changes))
    assert message in str(error.value) and str(error.value).startswith(f"{name}: ")


NEEDED = [
    (name, argument)
    for name in ("gumbel_noise", "sample", "head_sample", "commit", "unmask", "linear_cross_entropy")
    for argument, value in args(name).items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize("name,argument", NEEDED, ids=[f"{n}-{a}" for n, a in NEEDED])
def test_missing_and_distant_tensors_are_named(name: str, argument: str) -> None:
    """The unmasking ops and the loss: every tensor, also those of integers and temperatures."""
    if argument != "mask":
        with pytest.raises(ValueError, match=f"^{name}: {argument} is None, expected a tensor$"):
            OPS[name].fn(**args(name, **{argument: None}))
    distant = torch.empty_like(args(name)[argument], device="meta")
    with pytest.raises(ValueError, match=rf"^{name}: \w+ is on \w+, but \w+ is on \w+$") as error:
        OPS[name].fn(**args(name, **{argument: distant}))
    assert f" {argument} is on" in str(error.value)


def test_messages_are_one_line() -> None:
    """Whatever the value: of an array its beginning, and of a number more than 64 bits."""
    array = torch.rand(40, 37).numpy()
    with pytest.raises(ValueError, match=r"^rms_norm: x is array\(.{1,80}\.\.\., expected a tensor$") as error:
        OPS["rms_norm"].fn(**args("rms_norm", x=array))
    assert "\n" not in str(error.value)
    for name, option in (("conv_block_states", "block_size"), ("conv_state", "kernel_size")):
        with pytest.raises(ValueError, match=f"^{name}: {option} is {2**70}, expected"):
            OPS[name].fn(**args(name, **{option: 2**70}))


def test_every_op_refuses_something() -> None:
    assert {name for name, *_ in BAD} == set(OPS)


def test_trusted_callers_are_not_checked() -> None:
    with tt_kernels.trusted(), tt_kernels.trusted():
        core.check("t", a=(torch.ones(2), "A B"))
    with pytest.raises(ValueError, match="t: a is"):
        core.check("t", a=(torch.ones(2), "A B"))


def test_check_remembers_what_passed_and_nothing_else() -> None:
    good, bad = torch.ones(2, 3), torch.ones(3, 3)
    for _ in range(2):
        core.check("t", a=(good, "A B"), b=(good, "A B"), c=(None, "A"))
        with pytest.raises(ValueError, match=r"t: b has A=3, but a has A=2"):
            core.check("t", a=(good, "A B"), b=(bad, "A B"), c=(None, "A"))
    core.check("t", a=(torch.ones(2, 1, 3), "* B"), b=(torch.ones(2, 1), "*"), c=(torch.ones(2, 1, 5, 3), "* A B"))


def test_products_are_compared() -> None:
    """A size named by an expression is no label: T*K of what other arguments bind, and sequences+1 binds sequences."""
    x, ids = torch.ones(5, 3), torch.ones(5, 2).long()
    for good in (torch.ones(10), None):
        core.check("t", x=(x, "T D"), ids=(ids, "T K", int), order=(good, "T*K"))
    for size in (6, 20):
        with pytest.raises(ValueError, match=rf"^t: order has {size} elements, expected T\*K=10 \(T=5, K=2\)$"):
            core.check("t", order=(torch.ones(size), "T*K"), x=(x, "T D"), ids=(ids, "T K", int))
    core.check("t", a=(torch.ones(4), "S+1"), b=(torch.ones(3), "S"))
    with pytest.raises(ValueError, match=r"^t: b has S=4, but a has S=3$"):
        core.check("t", a=(torch.ones(4), "S+1"), b=(torch.ones(4), "S"))
    with pytest.raises(ValueError, match=r"^t: a is \[0\], expected \[S\+1\]$"):
        core.check("t", a=(torch.ones(0), "S+1"))
