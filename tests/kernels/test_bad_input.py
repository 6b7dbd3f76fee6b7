"""What callers do wrong is named by every public op: the argument, what it is and what was expected."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from parity import KERNELS, leaves, make, with_leaves
from torch import Tensor

from cards import OPS
from tt_kernels import ExpertWeights, Matrix, Routing, Sampling, Strategy

pytestmark = pytest.mark.kernels


def args(name: str, **changes: Any) -> dict[str, Any]:
    return with_leaves(make(OPS[name], OPS[name].cases[0], torch.float32), changes)


def sampled(**changes: Any) -> dict[str, Sampling]:
    return dict(sampling=Sampling.of(6)._replace(**changes))


NAN, INF, ROWS = float("nan"), float("inf"), torch.arange(6)
ROUTING = Routing(torch.zeros(5, 2).long(), torch.ones(5, 2))  # of the first case of experts
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
    *(
        (name, {option: value}, f"{name}: {option} is {repr(value)[:60]}")
        for name, option in (
            *(("rms_norm", "eps"), ("modulated_rms_norm", "eps"), ("gated_group_norm", "eps")),
            *(("route", "scale"), ("context_attention", "scale"), ("causal_attention", "scale")),
        )
        for value in (2**70, 10**400, Fraction(10**400))
    ),
    ("modulated_rms_norm", dict(order="norm"), "order is 'norm', expected 'modulate_norm' or 'norm_modulate'"),
    ("modulated_rms_norm", dict(scale=None), "scale is None, expected shift and scale, or neither"),
    ("modulated_rms_norm", dict(branch=None), "branch is None, expected a branch beside the gate"),
    ("modulated_rms_norm", dict(shift=torch.ones(3, 29)), "shift has *=[3], but x has *=[2]"),
    ("modulated_rms_norm", dict(weight=None), "modulated_rms_norm: weight is None, expected a tensor"),
    ("modulated_rms_norm", dict(eps=float("nan")), "modulated_rms_norm: eps is nan, expected a number, 0 or more"),
    *(
        ("gated_group_norm", dict(groups=groups), f"gated_group_norm: groups is {groups!r}, expected a divisor of D=24")
        for groups in (5, "4", 4.0, True)
    ),
    ("gated_group_norm", dict(groups=torch.ones(2, 2)), "groups is a tensor [2, 2], expected a divisor of D=24"),
    ("gated_group_norm", dict(z=None), "gated_group_norm: z is None, expected a tensor"),
    ("gated_group_norm", dict(eps=None), "gated_group_norm: eps is None, expected a number, 0 or more"),
    ("causal_conv1d", dict(bias=torch.ones(5)), "causal_conv1d: bias has C=5, but x has C=6"),
    ("causal_conv1d", dict(activation="gelu"), "activation is 'gelu', expected 'silu' or None"),
    ("causal_conv1d", dict(conv_state=torch.ones(2, 6, 2)), "conv_state is [2, 6, 2], expected at least K-1=3 columns"),
    ("causal_conv1d", dict(cu_seqlens=torch.tensor([0, 10])), "conv_state is [2, 6, 4], expected None beside"),
    ("conv_advance", dict(conv_state=torch.ones(2, 6, 4)), "conv_state is [2, 6, 4], expected a slot for each of 3"),
    ("conv_advance", dict(state_indices=torch.tensor([0, 3, 1])), "conv_advance: state_indices is 3, expected 0 to 2"),
    ("conv_advance", dict(out_indices=torch.tensor([-1, 0, 1])), "conv_advance: out_indices is -1, expected 0 to 2"),
    ("conv_advance", dict(state_indices=torch.ones(3)), "state_indices is torch.float32, expected a tensor of ints"),
    ("conv_advance", dict(counts=torch.ones(3)), "counts is torch.float32, expected a tensor of ints"),
    ("conv_advance", dict(counts=torch.tensor([5, -1, 0])), "conv_advance: counts is -1, expected 0 to L=5"),
    ("conv_advance", dict(counts=torch.tensor([5, 6, 0])), "conv_advance: counts is 6, expected 0 to L=5"),
    ("causal_conv1d", dict(x=None), "causal_conv1d: x is None, expected a tensor"),
    ("causal_conv1d", dict(weight=torch.ones(6, 4, device="meta")), "causal_conv1d: weight is on meta, but x is on"),
    ("causal_conv1d", dict(weight=torch.ones(6, 0)), "causal_conv1d: weight has K=0, expected 1 or more"),
    ("conv_advance", dict(conv_state=None), "conv_advance: conv_state is None, expected a tensor"),
    ("conv_advance", dict(x=None), "conv_advance: x is None, expected a tensor"),
    *(
        (name, dict(counts=torch.tensor([count, 5])), f"{name}: counts is {count}, expected 0 to L={L}")
        for name, count, L in (
            ("ssd_advance", -1, 5),
            ("ssd_chunk", 8, 7),
            ("mamba_advance", -1, 5),
            ("mamba_extend", 6, 5),
        )
    ),
    ("mamba_extend", {"weights.D": None}, "mamba_extend: D is None, expected a tensor"),
    *(
        (name, {f"state.{which}": torch.tensor([0, 99])}, f"{name}: {which} is 99, expected 0 to ")
        for name in ("mamba_block", "mamba_advance", "mamba_step", "mamba_extend")
        for which in ("conv_indices", "ssm_indices", "conv_out_indices", "ssm_out_indices")
    ),
    *(
        ("conv_block_states", {size: value}, f"conv_block_states: {size} is {value}, expected 1 or more")
        for size, value in (("block_size", 0), ("block_size", 2.5), ("block_size", True), ("kernel_size", None))
    ),
    *(
        ("ssd_block", dict(dt_limit=limit), f"ssd_block: dt_limit is {limit!r}, expected (low, high) with 0 <= low <= ")
        for limit in (None, 1.0, "ab", (0.0,), (0, 1, 2), (-1.0, 1.0), (True, 2.0), (0.0, NAN), (INF, INF), ("0", "1"))
    ),
    ("ssd_block", dict(D=None), "ssd_block: D is None, expected a tensor"),
    ("ssd_block", dict(ssm_state=torch.ones(2, 4, 3, 5, device="meta")), "ssm_state is on meta, but x is on"),
    ("ssd_step", dict(ssm_state=None), "ssd_step: ssm_state is None, expected a tensor"),
    ("ssd_advance", dict(dt_bias=None), "ssd_advance: dt_bias is None, expected a tensor"),
    *(
        ("ssd_chunk", dict(chunk_size=size), f"ssd_chunk: chunk_size is {size!r}, expected 1 or more, or None")
        for size in (2.5, "64", True)
    ),
    ("mamba_block", {"state.ssm": torch.ones(2, 4, 3, 0)}, "C is 32, expected H*P + 2*G*N with H=4, P=3, N=0 of the"),
    ("mamba_block", {"weights.D": None}, "mamba_block: D is None, expected a tensor"),
    ("mamba_advance", dict(dt_limit=[1, 0]), "mamba_advance: dt_limit is [1, 0], expected (low, high)"),
    ("mamba_step", {"state.conv": None}, "mamba_step: conv is None, expected a tensor"),
    ("mamba_step", {"weights.conv_bias": torch.ones(32).int()}, "conv_bias is torch.int32, expected a tensor of"),
    ("ssd_block", dict(A=torch.ones(3)), "ssd_block: A has H=3, but x has H=4"),
    ("ssd_block", dict(ssm_state=torch.ones(4, 3, 5)), "ssd_block: ssm_state is [4, 3, 5], expected [slots, H, P, N]"),
    ("ssd_block", dict(dt_limit=(1.0, 0.5)), "dt_limit is (1.0, 0.5), expected (low, high) with 0 <= low <= high"),
    ("ssd_step", dict(B=torch.ones(2, 3, 5), C=torch.ones(2, 3, 5)), "B has G=3 groups, expected a divisor of H=4"),
    ("ssd_advance", dict(B=torch.ones(2, 5, 3, 5)), "B has G=3 groups, expected a divisor of H=4, the heads of x"),
    ("ssd_advance", dict(counts=torch.tensor([1])), "ssd_advance: counts has b=1, but x has b=2"),
    ("ssd_chunk", dict(chunk_size=0), "ssd_chunk: chunk_size is 0, expected 1 or more"),
    ("ssd_chunk", dict(cu_seqlens=torch.tensor([0, 14])), "ssm_state is [2, 4, 3, 5], expected None beside cu_seqlens"),
    ("mamba_block", {"weights.conv_weight": torch.ones(31, 4)}, "mamba_block: conv_weight has C=31, but xBC has C=32"),
    ("mamba_block", {"state.ssm": torch.ones(2, 4, 3, 6)}, "C is 32, expected H*P + 2*G*N with H=4, P=3, N=6 of the"),
    ("mamba_block", dict(dt_limit=(1.0, 0.5)), "dt_limit is (1.0, 0.5), expected (low, high) with 0 <= low <= high"),
    ("mamba_advance", {"state.conv": torch.ones(2, 32, 3)}, "mamba_advance: conv has K=3, but conv_weight has K=4"),
    ("mamba_advance", dict(counts=torch.ones(2)), "counts is torch.float32, expected a tensor of ints"),
    ("mamba_step", dict(dt=torch.ones(2, 5)), "mamba_step: A has H=4, but dt has H=5"),
    ("route", dict(top_k=9), "route: top_k is 9, expected 1 to E=8"),
    ("route", dict(scores="softmax_topk"), "scores is 'softmax_topk', expected 'sigmoid' or 'softmax'"),
    ("route", dict(scores=None), "route: scores is None, expected 'sigmoid' or 'softmax'"),
    ("route", dict(scores="softmax"), "route: bias is a tensor [8], expected None beside scores='softmax'"),
    ("route", dict(scores="softmax", bias=None, n_group=2), "route: n_group is 2, expected 1 beside scores='softmax'"),
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
    ("experts", dict(activation="tanh"), "experts: activation is 'tanh', expected 'relu2' or 'silu'"),
    ("experts", dict(x=torch.ones(5, 6).half()), "up is torch.float32, expected the dtype of x, torch.float16"),
    ("experts", dict(routing=ROUTING._replace(offsets=torch.ones(4).int())), "sorted_pairs is None, expected"),
    ("experts", dict(routing=ROUTING._replace(topk_ids=torch.zeros(5, 3).long())), "topk_weights has K=2, but"),
    ("experts", dict(routing=ROUTING._replace(topk_ids=None)), "experts: topk_ids is None, expected a tensor"),
    ("experts", dict(routing=torch.ones(5, 2)), "experts: routing is a tensor [5, 2], expected Routing"),
    ("experts", dict(routing=ROUTING._replace(topk_ids=torch.zeros(5, 2))), "topk_ids is torch.float32, expected a"),
    (
        "experts",
        dict(routing=ROUTING._replace(topk_ids=torch.zeros(5, 2, device="meta").long())),
        "topk_ids is on meta, but x is on",
    ),
    ("experts", dict(weights=None), "experts: weights is None, expected ExpertWeights"),
    ("experts_norm", dict(weights=None), "experts_norm: weights is None, expected ExpertWeights"),
    ("experts_norm", dict(residual=torch.ones(2, 4, 29)), "residual is [2, 4, 29], expected T=6 tokens of D=29"),
    ("experts_norm", dict(order="norm"), "order is 'norm', expected 'modulate_norm' or 'norm_modulate'"),
    ("experts_norm", dict(scale=None), "experts_norm: scale is None, expected shift and scale, or neither"),
    ("experts_norm", dict(norm_weight=torch.ones(28)), "norm_weight has D=28, but residual has D=29"),
    ("experts_norm", dict(eps=-1.0), "experts_norm: eps is -1.0, expected a number, 0 or more"),
    (
        "experts",
        dict(weights=ExpertWeights(Matrix(torch.ones(4, 11, 6), None, "fp3"), torch.ones(4, 6, 11))),
        "experts: up.format is 'fp3', expected None",
    ),
    (
        "experts",
        dict(weights=ExpertWeights(Matrix(torch.ones(4, 11, 6), torch.ones(4)), torch.ones(4, 6, 11))),
        "experts: up.scale is a tensor [4], expected None",
    ),
    ("experts", dict(shared=torch.ones(2)), "experts: shared is a tensor [2], expected ExpertWeights"),
    ("experts", dict(weights=ExpertWeights(torch.ones(4, 11, 6), None)), "experts: down is None, expected a tensor"),
    ("experts", dict(shared=ExpertWeights(torch.ones(9, 6), None)), "experts: shared_down is None, expected a tensor"),
    (
        "experts",
        dict(shared=ExpertWeights(torch.ones(9, 6), torch.ones(6, 9), torch.ones(9, 6))),
        "experts: shared_gate is a tensor [9, 6], expected None, as gate is",
    ),
    ("experts", dict(shared=None), "experts: shared_weight is a tensor [5], expected None, as shared is"),
    ("experts", dict(shared_weight=torch.ones(5, 1)), "experts: shared_weight is [5, 1], expected [T]"),
    ("experts", dict(shared_weight=torch.ones(4)), "experts: shared_weight has T=4, but x has T=5"),
    ("experts", dict(shared_weight=torch.ones(5).long()), "shared_weight is torch.int64, expected a tensor of floats"),
    ("experts", dict(shared_weight=0.5), "experts: shared_weight is 0.5, expected a tensor"),
    ("experts_norm", dict(shared=None), "experts_norm: shared_weight is a tensor [6], expected None, as shared is"),
    ("context_attention", dict(q=torch.ones(2, 3, 3, 5)), "k has Hkv=2 heads, expected a divisor of Hq=3"),
    ("context_attention", dict(cache_lengths=torch.tensor([13, 1])), "cache_lengths goes up to 13, but the page"),
    ("append_attention", dict(cache_lengths=torch.tensor([1, 10])), "cache_lengths is 10 and 3 tokens enter, but"),
    ("context_attention", dict(cache_lengths=torch.tensor([-1, 1])), "cache_lengths goes down to -1, expected 0 or"),
    ("context_attention", dict(cache_lengths=3), "context_attention: cache_lengths is 3, expected a tensor"),
    ("context_attention", dict(cache_lengths=None), "context_attention: cache_lengths is None, expected a tensor"),
    ("context_attention", dict(page_table=torch.zeros(2, 3)), "page_table is torch.float32, expected a tensor of ints"),
    ("context_attention", dict(page_table=torch.zeros(2, 3).short()), "page_table is torch.int16, expected a tensor"),
    ("context_attention", dict(page_table=torch.zeros(6).int()), "page_table is [6], expected [B, row_pages]"),
    ("context_attention", dict(cache_lengths=torch.zeros(2, device="meta").int()), "cache_lengths is on meta, but q"),
    ("context_attention", dict(v_pages=torch.zeros(6, 5, 2, 5)), "v_pages has page_size=5, but k_pages has"),
    ("context_attention", dict(k_pages=torch.zeros(6, 0, 2, 5)), "k_pages has page_size=0, expected 1 or more"),
    ("context_attention", dict(k=torch.zeros(2, 3, 2, 5).half()), "k is torch.float16, expected torch.float32"),
    ("context_attention", dict(q=torch.zeros(2, 3, 4, 0)), "q has P=0, expected 1 or more"),
    ("context_attention", dict(causal="yes"), "context_attention: causal is 'yes', expected True or False"),
    ("context_attention", dict(return_lse=1), "context_attention: return_lse is 1, expected True or False"),
    ("append_attention", dict(return_lse=None), "append_attention: return_lse is None, expected True or False"),
    *(
        ("context_attention", dict(scale=scale), f"scale is {scale!r}, expected a finite number, or None")
        for scale in ("1", True, float("nan"), float("inf"), 1j)
    ),
    *(
        (name, dict(window=window), f"{name}: window is {window!r}, expected a whole number, 1 or more, or None")
        for name in ("context_attention", "causal_attention")
        for window in (0, -1, 2.0, True, 2**63)
    ),
    *(
        (name, dict(softcap=cap), f"{name}: softcap is {cap!r}, expected a finite number above 0, of 1e-30 to 1e30")
        for name in ("context_attention", "causal_attention", "unmask", "unmask_logits")
        for cap in (0, -1.0, NAN, INF, 1e-31, "30", True)
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
    ("gumbel_noise", dict(vocab_size=4.0), "gumbel_noise: vocab_size is 4.0, expected 1 or more"),
    ("gumbel_noise", dict(seed=torch.ones(3)), "gumbel_noise: seed is torch.float32, expected a tensor of ints"),
    ("gumbel_noise", dict(step=5), "gumbel_noise: step is 5, expected a tensor"),
    ("sample", dict(sampling=None), "sample: sampling is None, expected a Sampling"),
    ("sample", dict(sampling=dict(temperature=1)), "sample: sampling is {'temperature': 1}, expected a Sampling"),
    ("sample", sampled(top_k=-ROWS), "sample: top_k is -5, expected 0 or more"),
    ("sample", sampled(top_k=ROWS[:5]), "sample: top_k has *=[5], but logits has *=[6]"),
    ("sample", sampled(top_k=3), "sample: top_k is 3, expected a tensor"),
    ("sample", sampled(top_k=torch.ones(6)), "sample: top_k is torch.float32, expected a tensor of ints"),
    ("sample", sampled(top_p=ROWS / 5), "sample: top_p is 0.0, expected above 0 and up to 1"),
    ("sample", sampled(top_p=torch.full((6,), 1.5)), "sample: top_p is 1.5, expected above 0 and up to 1"),
    ("sample", sampled(top_p=torch.full((6,), math.nan)), "sample: top_p is nan, expected above 0 and up to 1"),
    ("sample", sampled(top_p=0.9), "sample: top_p is 0.9, expected a tensor"),
    ("sample", sampled(top_p=ROWS), "sample: top_p is torch.int64, expected a tensor of floats"),
    ("sample", sampled(temperature=torch.ones(5)), "sample: temperature has *=[5], but logits has *=[6]"),
    ("sample", sampled(temperature=1.0), "sample: temperature is 1.0, expected a tensor"),
    ("sample", sampled(temperature=ROWS), "temperature is torch.int64, expected a tensor of floats"),
    ("sample", sampled(temperature=-torch.ones(6)), "sample: temperature is -1.0, expected 0 or more"),
    ("sample", dict(suppress=11), "sample: suppress is 11, expected a token id below V=11"),
    ("sample", dict(suppress=-1), "sample: suppress is -1, expected a token id below V=11"),
    ("sample", dict(suppress=False), "sample: suppress is False, expected a token id below V=11"),
    ("sample", dict(suppress=1.0), "sample: suppress is 1.0, expected a token id below V=11"),
    ("sample", dict(logits=torch.ones(6, 1), suppress=0), "suppress is 0, expected tokens beside it, but V is 1"),
    ("sample", dict(logits=torch.ones(6, 0)), "sample: logits has V=0, expected 1 or more"),
    ("head_sample", sampled(temperature=torch.tensor([0, 1, 1, math.nan, 1, 1])), "temperature is nan, expected 0"),
    ("head_sample", dict(weight=torch.ones(0, 16)), "head_sample: weight has V=0, expected 1 or more"),
    ("head_sample", sampled(top_p=torch.full((6,), 2.0)), "head_sample: top_p is 2.0, expected above 0 and up to 1"),
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
        dict(sampling=Sampling.of(4, temperature=torch.tensor([0.0, 1.0, -0.5, 1.0]))),
        "unmask: temperature is -0.5, expected 0 or more",
    ),
    ("unmask", dict(block=torch.ones(4, 5)), "unmask: block is torch.float32, expected a tensor of ints"),
    ("unmask", dict(sampling=Sampling.of(4, position=torch.ones(4, 5).long())), "position is [4, 5], expected [B]"),
    ("unmask", dict(mask_token_id=None), "unmask: mask_token_id is None, expected a token id below V=37"),
    ("unmask", dict(mask_token_id=37), "unmask: mask_token_id is 37, expected a token id below V=37"),
    ("unmask", dict(shift="no"), "unmask: shift is 'no', expected True or False"),
    ("unmask_logits", dict(shift=1), "unmask_logits: shift is 1, expected True or False"),
    ("unmask", dict(strategy=Strategy(confidence="margin")), "strategy.confidence is 'margin', expected a tensor"),
    ("remask", dict(sampling="x"), "remask: sampling is 'x', expected a Sampling or None"),
    ("unmask", dict(bias=torch.ones(36)), "unmask: bias has V=36, but weight has V=37"),
    ("unmask", dict(strategy="margin"), "unmask: strategy is 'margin', expected a Strategy or None"),
    (
        "unmask",
        dict(strategy=Strategy.of(3, factor=1.0)),
        "unmask: strategy.factor has B=3, but hidden has B=4",
    ),
    (
        "unmask_logits",
        dict(strategy=Strategy(confidence=torch.full((4,), 5))),
        "unmask_logits: confidence is 5, expected 0 to 4",
    ),
    ("unmask_logits", dict(bias=torch.ones(36)), "unmask_logits: bias has V=36, but logits has V=37"),
    ("unmask_logits", dict(bias=torch.ones(37).long()), "bias is torch.int64, expected a tensor of floats"),
    ("unmask_logits", dict(bias=torch.ones(37, device="meta")), "unmask_logits: bias is on meta, but logits is on"),
    ("unmask_logits", dict(logits=torch.ones(4, 5)), "unmask_logits: logits is [4, 5], expected [B, L, V]"),
    (
        "unmask_logits",
        dict(strategy=Strategy(number=torch.ones(4))),
        "unmask_logits: strategy.number is torch.float32, expected a tensor of ints",
    ),
    (
        "unmask_logits",
        dict(strategy=Strategy(alg_temp=torch.ones(3))),
        "unmask_logits: strategy.alg_temp has B=3, but logits has B=4",
    ),
    ("remask", dict(remasking=None), "remask: remasking is None, expected a Remasking"),
    ("remask", dict(own=None), "remask: own is None, expected what shared is decided by"),
    ("remask", dict(token=torch.ones(4, 7).int()), "remask: token is torch.int32, expected the dtype of block"),
    ("remask", dict(mask_token_id=1.0), "remask: mask_token_id is 1.0, expected an id of the block's torch.int64"),
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
    looked_at = [t for argument, t in changes.items() if argument.endswith(("lengths", "counts", "indices"))]
    values = any(isinstance(t, Tensor) and t.numel() > 1 and not t.is_meta for t in looked_at)
    if KERNELS and OPS[name].kernels and values:
        pytest.skip("kernels do not read lengths on the host")
    given = args(name, **changes)
    before = {argument: t.clone() for argument, t in leaves(given).items()}
    with pytest.raises(ValueError) as error:
        OPS[name].fn(**given)
    for argument, t in leaves(given).items():  # refused before anything is written
        assert t.is_meta or torch.allclose(t.double(), before[argument].double(), 0, 0, equal_nan=True)
    assert message in str(error.value) and str(error.value).startswith(f"{name}: ")


OPTIONAL = {("linear_cross_entropy", "mask"), ("unmask", "threshold"), ("unmask", "steps_left")}
NEEDED = [
    (name, argument)
    for name in ("gumbel_noise", "sample", "head_sample", "commit", "unmask", "linear_cross_entropy")
    for argument in leaves(args(name))
]


@pytest.mark.parametrize("name,argument", NEEDED, ids=[f"{n}-{a}" for n, a in NEEDED])
def test_missing_and_distant_tensors_are_named(name: str, argument: str) -> None:
    """The unmasking ops and the loss: every tensor, also those of integers and temperatures."""
    shown = argument.removeprefix("sampling.")
    if (name, argument) not in OPTIONAL:
        with pytest.raises(ValueError, match=f"^{name}: {shown} is None, expected a tensor$"):
            OPS[name].fn(**with_leaves(args(name), {argument: None}))
    distant = with_leaves(args(name), {argument: torch.empty_like(leaves(args(name))[argument], device="meta")})
    with pytest.raises(ValueError, match=rf"^{name}: \w+ is on \w+, but \w+ is on \w+$") as error:
        OPS[name].fn(**distant)
    assert f" {shown} is on" in str(error.value)


def test_messages_are_one_line() -> None:
    """Whatever the value: of an array its beginning, and of a number more than 64 bits."""
    array = torch.rand(40, 37).numpy()
    with pytest.raises(ValueError, match=r"^rms_norm: x is array\(.{1,80}\.\.\., expected a tensor$") as error:
        OPS["rms_norm"].fn(**args("rms_norm", x=array))
    assert "\n" not in str(error.value)
    for name, option in (("conv_block_states", "block_size"), ("conv_block_states", "kernel_size")):
        with pytest.raises(ValueError, match=f"^{name}: {option} is {2**70}, expected"):
            OPS[name].fn(**args(name, **{option: 2**70}))


def test_every_op_refuses_something() -> None:
    assert {name for name, *_ in BAD} == set(OPS)


@pytest.mark.parametrize("name", ["rms_norm", "gated_group_norm"])
def test_whole_numbers_are_numbers(name: str) -> None:
    for eps in (2**62, 1, Fraction(1, 2)):
        assert OPS[name].fn(**args(name, eps=eps)).isfinite().all()
