"""The references against tests/literal in fp64: norms, experts, attention, loss. Scan and convolution: test_scan.py.

A causal block is its tokens one by one, packed sequences are separate ones, padding does not show. 2 s on one core.
"""

import math
from itertools import pairwise
from typing import Any

import literal
import pytest
import torch
from fp64 import close, fp64  # noqa: F401 (a fixture)
from torch import Tensor

from tt_kernels import (
    ExpertWeights,
    Routing,
    block_diffusion_attention,
    causal_attention,
    context_attention,
    experts,
    gated_group_norm,
    linear_cross_entropy,
    modulated_rms_norm,
    rms_norm,
    route,
)

NAN = math.nan


# Norms


def test_norms() -> None:
    x, z, branch = torch.randn(3, 2, 3, 12)
    weight, (shift, scale, gate) = torch.randn(12), torch.randn(3, 2, 12)
    close(rms_norm(x, weight, eps=0.1)[1, 2], literal.rms_norm(x[1, 2], weight, 0.1))
    y = gated_group_norm(x, z, weight, groups=3, eps=0.1)[1, 2]
    gated = x[1, 2] * literal.silu(z[1, 2])
    parts = [literal.rms_norm(gated[i : i + 4], weight[i : i + 4], 0.1) for i in (0, 4, 8)]
    close(y, torch.cat(parts))
    for order in ("modulate_norm", "norm_modulate"):
        y, residual = modulated_rms_norm(x, weight, shift, scale, branch=branch, gate=gate, order=order, eps=0.1)
        for b, t in ((0, 0), (1, 2)):
            r = x[b, t] + gate[b] * branch[b, t]
            if order == "modulate_norm":
                want = literal.rms_norm(literal.modulate(r, shift[b], scale[b]), weight, 0.1)
            else:
                want = literal.modulate(literal.rms_norm(r, weight, 0.1), shift[b], scale[b])
            close(residual[b, t], r)
            close(y[b, t], want)


def test_modulated_norm_with_less() -> None:
    x, branch, weight = torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(8)
    zero, one = torch.zeros(1, 8), torch.ones(1, 8)
    y, residual = modulated_rms_norm(x, weight)
    assert residual is x
    close(y, rms_norm(x, weight))
    for order in ("modulate_norm", "norm_modulate"):
        close(modulated_rms_norm(x, weight, zero, zero, order=order)[0], y)
    for a, b in zip(
        modulated_rms_norm(x, weight, branch=branch),
        modulated_rms_norm(x, weight, zero, zero, branch=branch, gate=one),
        strict=True,
    ):
        close(a, b)


def test_norm_dtypes() -> None:
    """The residual keeps the dtype of the stream, the normed one takes the weight's."""
    x, branch = torch.randn(2, 1, 3, 8)
    y, residual = modulated_rms_norm(x.float(), torch.ones(8, dtype=torch.bfloat16), branch=branch.bfloat16())
    assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


# Experts


def moe_model(E: int, D: int, N: int, K: int, **config: Any) -> tuple[literal.Model, ExpertWeights]:
    up, down = torch.randn(E, N, D), torch.randn(E, D, N)
    weights = {"m.gate.weight": torch.randn(E, D), "m.gate.e_score_correction_bias": torch.rand(E)}
    for e in range(E):
        weights |= {f"m.experts.{e}.up_proj.weight": up[e], f"m.experts.{e}.down_proj.weight": down[e]}
    config = dict(num_experts_per_tok=K, norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=0) | config
    return literal.Model(config, weights, torch.float64), ExpertWeights(up, down)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("E,groups,kept,K", [(8, 1, 1, 3), (12, 4, 2, 3), (12, 4, 1, 5), (6, 3, 3, 6), (4, 1, 1, 1)])
def test_router_and_experts(E: int, groups: int, kept: int, K: int, norm: bool) -> None:
    model, stacked = moe_model(E, 6, 7, K, norm_topk_prob=norm, n_group=groups, topk_group=kept)
    weight, bias = model.weights["m.gate.weight"], model.weights["m.gate.e_score_correction_bias"]
    x = torch.randn(20, 6)
    routing = route(x, weight, bias, top_k=K, n_group=groups, topk_group=kept, norm_topk_prob=norm, scale=2.5)
    ids, weights, *_ = routing
    y = experts(x, routing, stacked)
    for t in range(20):
        want = literal.route(model, "m", x[t])
        assert ids[t].tolist() == [e for e, _ in want]
        close(weights[t], torch.tensor([w for _, w in want]))
        close(y[t], literal.experts(model, "m", x[t]))


def test_router_ties_go_to_the_lower_expert() -> None:
    """All scores equal; with one group kept of four, five experts must come from three that count as 0 too."""
    x, weight, bias = torch.ones(2, 3), torch.zeros(8, 3), torch.zeros(8)
    assert route(x, weight, bias, top_k=4)[0].tolist() == [[0, 1, 2, 3]] * 2
    bias[6] = 0.25
    ids, weights, *_ = route(x, weight, bias, top_k=4, n_group=4, topk_group=1)
    assert ids.tolist() == [[6, 7, 0, 1]] * 2
    close(weights, torch.full((2, 4), 0.25))  # the bias chooses and does not weigh


def test_router_choice_is_not_rounded() -> None:
    """Two experts that differ by less than bf16 or fp32 can tell."""
    x, weight = torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-23]]).float()
    ids, weights, *_ = route(x, weight, torch.zeros(2).float(), top_k=1)
    assert ids.item() == 1 and weights.dtype == torch.float32


GELU = {
    "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda h: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
}


@pytest.mark.parametrize("activation", GELU)
def test_experts_with_gelu(activation: str) -> None:
    x, up, gate, down = 3 * torch.randn(5, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 4), torch.randn(2, 4, 7)
    routing = Routing(torch.tensor([[0], [1], [1], [0], [1]]), torch.ones(5, 1))
    for one in (None, gate):
        y = experts(x, routing, ExpertWeights(up, down, one), activation=activation)
        for t, e in enumerate(routing.topk_ids.flatten().tolist()):
            h = up[e] @ x[t]
            h = GELU[activation](h) if one is None else GELU[activation](gate[e] @ x[t]) * h
            close(y[t], down[e] @ h)


def test_experts_with_gate_and_repeated_ids() -> None:
    x, up, gate, down = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4, 5)
    ids, weights = torch.tensor([[1, 1], [0, 1], [1, 0]]), torch.rand(3, 2)
    y = experts(x, Routing(ids, weights), ExpertWeights(up, down, gate), activation="silu")
    for t in range(3):
        each = [down[e] @ (literal.silu(gate[e] @ x[t]) * (up[e] @ x[t])) for e in ids[t].tolist()]
        close(y[t], weights[t, 0] * each[0] + weights[t, 1] * each[1])


# Attention


def heads(*shape: int, Hq: int = 4, Hkv: int = 2, P: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*shape, Hq, P), torch.randn(*shape, Hkv, P), torch.randn(*shape, Hkv, P)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """One query [Hq, P] over keys and values [tokens, Hkv, P], by a loop over heads."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    rows = []
    for h in range(len(q)):
        g = h // (len(q) // k.shape[1])
        rows.append(literal.softmax(scale * k[:, g] @ q[h]) @ v[:, g])
    return torch.stack(rows)


def paged(k: Tensor, v: Tensor, lengths: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K/V [B, T, Hkv, P] in shuffled pages: NaN past a row's length and in pages of nobody, nonsense past its table."""
    B, T = k.shape[:2]
    row = -(-T // page_size)
    table = torch.randperm(B * row + 2)[: B * row].view(B, row)
    pages = torch.full((2, B * row + 2, page_size, *k.shape[2:]), NAN)
    for b, length in enumerate(lengths):
        for s in range(length):
            pages[0, table[b, s // page_size], s % page_size] = k[b, s]
            pages[1, table[b, s // page_size], s % page_size] = v[b, s]
        table[b, -(-length // page_size) :] = 10**6
    return pages[0], pages[1], table.int(), torch.tensor(lengths).int()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[9, 4, 0], [9, 9, 9], [0, 0, 0], [1, 8, 9]])
@pytest.mark.parametrize("L", [1, 5])
def test_context_attention(L: int, lengths: list[int], causal: bool) -> None:
    (q, k, v), (_, k_past, v_past) = heads(3, L), heads(3, 9)
    cache = paged(k_past, v_past, lengths, 4)
    o = context_attention(q, k, v, *cache, causal=causal, scale=0.7)
    for b, n in enumerate(lengths):
        for t in range(L):
            own = t + 1 if causal else L
            keys, values = torch.cat([k_past[b, :n], k[b, :own]]), torch.cat([v_past[b, :n], v[b, :own]])
            close(o[b, t], attend(q[b, t], keys, values, 0.7))


def test_context_attention_in_order_is_the_trivial_table() -> None:
    """A contiguous cache, pages in order from the second on, dirty behind the rows."""
    (q, k, v), (_, k_past, v_past) = heads(2, 3), heads(2, 8)
    pages = torch.full((2, 6, 4, 2, 3), NAN)
    pages[0, 1:5], pages[1, 1:5] = k_past.reshape(4, 4, 2, 3), v_past.reshape(4, 4, 2, 3)
    pages[:, 2, 3], pages[:, 4, 3] = NAN, NAN
    table, lengths = torch.tensor([[1, 2], [3, 4]]), torch.tensor([7, 7])
    o = context_attention(q, k, v, pages[0], pages[1], table, lengths)
    for b in range(2):
        close(o[b, 1], attend(q[b, 1], torch.cat([k_past[b, :7], k[b]]), torch.cat([v_past[b, :7], v[b]])))


def test_causal_block_is_its_tokens_one_by_one() -> None:
    (q, k, v), (_, k_past, v_past) = heads(1, 6), heads(1, 11)
    k_all, v_all = torch.cat([k_past, k], 1), torch.cat([v_past, v], 1)
    whole = context_attention(q, k, v, *paged(k_past, v_past, [11], 4), causal=True)
    for t in range(6):
        one = slice(t, t + 1)
        cache = paged(k_all, v_all, [11 + t], 4)
        close(context_attention(q[:, one], k[:, one], v[:, one], *cache), whole[:, one])
    nothing = paged(k_past, v_past, [0], 4)
    close(context_attention(q, k, v, *nothing, causal=True), causal_attention(q, k, v))


def test_causal_attention_alone_and_packed() -> None:
    q, k, v = heads(2, 10)
    o = causal_attention(q, k, v)
    for t in range(10):
        close(o[1, t], attend(q[1, t], k[1, : t + 1], v[1, : t + 1]))
    for ends in ([0, 3, 4, 10], [0, 10], [0, 7]):  # the last: tokens behind the sequences are on their own
        o = causal_attention(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor(ends))
        for a, b in pairwise(ends):
            close(o[:, a:b], causal_attention(q[:1, a:b], k[:1, a:b], v[:1, a:b]))
    o = causal_attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 10]))  # as many sequences as one row has, over two
    close(o[:1, 4:], causal_attention(q[:1, 4:], k[:1, 4:], v[:1, 4:]))
    close(o[1:], causal_attention(q[1:], k[1:], v[1:]))


def test_noisy_blocks_see_clean_blocks_before_them() -> None:
    (q, k, v), (_, k_clean, v_clean) = heads(2, 10), heads(2, 10)
    o = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=4)
    for t in range(10):
        start = t // 4 * 4
        keys = torch.cat([k_clean[1, :start], k[1, start : start + 4]])
        values = torch.cat([v_clean[1, :start], v[1, start : start + 4]])
        close(o[1, t], attend(q[1, t], keys, values))
    q, k, v, k_clean, v_clean = (t[:1, :8].repeat(1, 2, 1, 1) for t in (q, k, v, k_clean, v_clean))
    packed = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=4, cu_seqlens=torch.tensor([0, 8, 16]))
    close(packed[:, :8], o[:1, :8])
    close(packed[:, 8:], o[:1, :8])


# Loss


def test_loss_is_the_mean_over_masked_tokens() -> None:
    hidden, weight, targets = torch.randn(2, 4, 5), torch.randn(7, 5), torch.randint(7, (2, 4))
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    hidden[~mask], targets[~mask] = NAN, -1  # not read
    terms = [-literal.softmax(weight @ hidden[b, t])[targets[b, t]].log() for b, t in mask.nonzero().tolist()]
    close(linear_cross_entropy(hidden, weight, targets, mask), sum(terms) / 3)
    close(linear_cross_entropy(hidden[mask], weight, targets[mask]), sum(terms) / 3)
    assert linear_cross_entropy(hidden, weight, targets, torch.zeros_like(mask)) == 0


def test_loss_of_a_16_bit_model_has_fp32_logits() -> None:
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    targets = torch.randint(5, (6,))
    loss = linear_cross_entropy(hidden, weight, targets)
    wide = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wide, rtol=1e-6, atol=0)  # a few eps of fp32; bf16 logits: 1e-2
