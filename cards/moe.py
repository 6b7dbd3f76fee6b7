"""The experts: every token through its own few, weighted and summed."""

import torch

from tt_kernels.moe.experts import experts
from tt_kernels.moe.experts_launch import HiddenLaunch, ProductLaunch, UpLaunch, WeightsLaunch
from tt_kernels.moe.experts_norm import experts_norm
from tt_kernels.moe.route import route
from tt_kernels.moe.route_launch import FewLaunch, HalvesLaunch, ScoresLaunch
from tt_kernels.reference.moe import ACTIVATIONS, ExpertWeights, Routing

from .norm import modulated_inputs
from .op import Op


def _experts_inputs(dtype, T, D, N, E, K, gated=0, M=0, act=None, weighted=0):
    """act: index of the activation in ACTIVATIONS; None: silu with a gate, relu2 without."""
    up, gate = torch.randn(2, E, N, D, dtype=dtype) * D**-0.5
    down = torch.randn(E, D, N, dtype=dtype) * N**-0.5
    shared = None
    if M:
        up_gate, shared_down = torch.randn(2, M, D, dtype=dtype) * D**-0.5, torch.randn(D, M, dtype=dtype) * M**-0.5
        shared = ExpertWeights(up_gate[0], shared_down, up_gate[1] if gated else None)
    x = torch.randn(T, D, dtype=dtype)
    ids = torch.rand(T, E).argsort(1)[:, :K].contiguous()  # of each token K different ones
    wide = torch.promote_types(dtype, torch.float32)
    return dict(
        x=x,
        routing=Routing(ids, torch.rand(T, K, dtype=wide)),
        weights=ExpertWeights(up, down, gate if gated else None),
        shared=shared,
        shared_weight=torch.rand(T, dtype=dtype) if weighted else None,
        activation=list(ACTIVATIONS)[gated if act is None else act],
    )


def _experts_cost(itemsize, T, D, N, E, K, gated=0, M=0, **_):
    hit = round(E * (1 - (1 - K / E) ** T))  # expected, with even choices
    matrices = 2 + gated
    return 2 * matrices * T * D * (K * N + M), (matrices * D * (hit * N + M) + 2 * T * D) * itemsize


def _norm_inputs(dtype, B, L, D, N, E, K, gated=0, M=0, plain=0, norm_first=0, weighted=0):
    moe = _experts_inputs(dtype, B * L, D, N, E, K, gated, M, weighted=weighted)
    dims = dict(B=B, L=L, D=D)
    norm = modulated_inputs(dtype, **dims, plain=plain, norm_first=norm_first)
    norm |= dict(residual=norm.pop("x"), norm_weight=norm.pop("weight"))
    return moe | {name: value for name, value in norm.items() if name != "branch"}


def _norm_cost(itemsize, B, L, D, **dims):
    (flops, moved), T = _experts_cost(itemsize, B * L, D, **dims), B * L
    return flops + 9 * T * D, moved + 2 * T * D * itemsize


_OPTIONS = ("BLOCK_T", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "SWAP", "PERSISTENT", "SORTED")
_PRODUCTS = (  # worth measuring
    *((16, 64, k, 4, stages, 1, 0, 0) for k, stages in ((128, 5), (128, 4), (128, 3), (64, 10), (64, 7), (256, 3))),
    *((16, 128, k, 4, stages, 1, 0, 0) for k, stages in ((128, 5), (64, 6), (64, 5))),
    *((16, 64, 128, 4, 5, 1, 2, 0), (16, 128, 64, 4, 5, 1, 2, 0), (16, 128, 128, 4, 5, 1, 1, 0)),
    *((32, 64, 128, 4, 4, 1, 0, 0), (32, 128, 64, 4, 5, 1, 0, 0), (32, 128, 64, 4, 4, 1, 0, 0)),
    *((32, 128, 128, 8, 5, 1, 0, 0), (32, 128, 64, 4, 5, 1, 2, 0), (64, 64, 128, 4, 3, 1, 0, 0)),
    *((64, 128, 64, 4, 4, 1, 0, 0), (64, 128, 64, 4, 3, 1, 0, 0), (64, 256, 64, 8, 5, 1, 0, 0)),
    *((64, 128, 64, 4, 4, 1, 2, 1), (64, 256, 64, 8, 4, 0, 1, 1), (64, 256, 64, 8, 5, 1, 1, 1)),
    *((128, 128, 64, 8, 4, 0, 1, 1), (128, 256, 64, 8, 3, 0, 1, 1), (128, 128, 64, 8, 3, 0, 0, 1)),
    *((128, 128, 64, 8, 4, 0, 1, 0), (128, 256, 64, 8, 3, 0, 0, 0), (128, 128, 64, 8, 3, 0, 0, 0)),
    (256, 128, 64, 8, 3, 0, 0, 0),  # for 150 to 230 rows an expert
    *((192, 256, 64, 8, stages, 0, 0, 0) for stages in (3, 4)),  # tall: without a gate
)


def _down(up: UpLaunch) -> ProductLaunch:
    """The same without SORTED: rows of the down product are."""
    return ProductLaunch(**{name: value for name, value in up.options.items() if name != "SORTED"})


UP = tuple(UpLaunch(**dict(zip(_OPTIONS, row, strict=True))) for row in _PRODUCTS)
CANDIDATES = {
    "_experts_up_kernel": UP,
    "_experts_down_kernel": tuple(dict.fromkeys(map(_down, UP))),
    "_experts_bwd_hidden_kernel": tuple(
        HiddenLaunch(
            **dict(BLOCK_T=t, BLOCK_N=n, BLOCK_K=64, SORTED=1),
            **dict(num_warps=t // 16 if n == 128 else 8, num_stages=stages),
        )
        for t, n, stages in ((64, 128, 3), (64, 128, 4), (64, 256, 3), (128, 128, 3), (128, 128, 4))
    ),
    "_experts_bwd_weights_kernel": tuple(
        WeightsLaunch(BLOCK_P=p, BLOCK_Q=q, BLOCK_R=r, num_warps=8, num_stages=stages)
        for p, q, r, stages in ((128, 128, 64, 3), (128, 128, 64, 4), (128, 128, 32, 4), (128, 256, 64, 3))
    ),
}


def _route_inputs(dtype, T, D, E, K, groups=1, kept=1, softmax=0, norm=1):
    wide = torch.promote_types(dtype, torch.float32)
    if softmax:  # whose models keep the weight in their dtype
        x, weight = torch.randn(T, D, dtype=dtype), torch.randn(E, D, dtype=dtype) * D**-0.5
        return dict(x=x, weight=weight, top_k=K, scores="softmax", norm_topk_prob=bool(norm))
    return dict(
        x=torch.randn(T, D, dtype=dtype),
        weight=torch.randn(E, D, dtype=wide) * D**-0.5,
        bias=torch.rand(E, dtype=wide) / 4,
        top_k=K,
        n_group=groups,
        topk_group=kept,
        scale=2.5,
    )


def _few(splits: int, block_e: int, rows: int = 16) -> FewLaunch:
    return FewLaunch(BLOCK_T=rows, BLOCK_E=block_e, SPLITS=splits)


def _scores(block_t: int, block_e: int, block_d: int, warps: int) -> ScoresLaunch:
    return ScoresLaunch(BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=block_d, num_warps=warps, num_stages=3)


def _halves(block_t: int, block_e: int, splits: int, block_d: int = 32, stages: int = 4) -> HalvesLaunch:
    options = dict(BLOCK_D=block_d, num_warps=block_e // 16, num_stages=stages)
    return HalvesLaunch(BLOCK_T=block_t, BLOCK_E=block_e, SPLITS=splits, **options)


OPS = (
    Op(
        fn=experts,
        when="Any mixture of experts, from one token to a prefill, with a choice of experts from anywhere.",
        inputs=_experts_inputs,
        cases=(
            dict(T=5, D=6, N=11, E=4, K=2, M=9, weighted=1),
            dict(T=9, D=16, N=24, E=6, K=3, gated=1, M=16),
            dict(T=9, D=29, N=23, E=6, K=3),
            dict(T=1, D=8, N=64, E=4, K=3),
            dict(T=6, D=136, N=140, E=3, K=2, M=136),  # more than one tile of every dimension
            dict(T=45, D=20, N=36, E=3, K=2, M=12),  # and of an expert's rows
            dict(T=245, D=16, N=16, E=2, K=1, M=32),  # enough rows for the form for many tokens
            dict(T=140, D=16, N=40, E=1, K=1, gated=1, M=8),
            dict(T=0, D=8, N=16, E=4, K=2),
            *(dict(T=7, D=16, N=24, E=3, K=2, act=act) for act in range(2, len(ACTIVATIONS))),
            *(dict(T=7, D=16, N=24, E=3, K=2, gated=1, act=act) for act in (2, 3)),
            dict(T=7, D=16, N=24, E=3, K=2, gated=1, M=140, weighted=1),  # two tiles of the shared expert's width
        ),
        shapes=(
            *(dict(T=T, D=2688, N=1856, E=128, K=6, M=3712) for T in (1, 16, 64, 128, 512, 1024, 4096)),
            # The gated form, few tokens and many: DeepSeek-V2-Lite's.
            *(dict(T=T, D=2048, N=1408, E=64, K=6, gated=1, M=2816) for T in (16, 4096)),
            # The same with gated GELU, whose erf and exponentials are the most that an activation takes.
            *(dict(T=T, D=2048, N=1408, E=64, K=6, gated=1, act=act) for T in (16, 4096) for act in (2, 3)),
            # A shared expert with a weight for each token: Qwen1.5-MoE-A2.7B's.
            *(dict(T=T, D=2048, N=1408, E=60, K=4, gated=1, M=5632, weighted=1) for T in (16, 4096)),
        ),
        grows=dict(T=16384),
        outputs=("y",),
        grads=(
            *("x", "routing.topk_weights", "weights.up", "weights.down", "weights.gate"),
            *("shared.up", "shared.down", "shared.gate", "shared_weight"),
        ),
        kernels=(
            *("_experts_schedule_kernel", "_experts_up_kernel", "_experts_down_kernel", "_experts_combine_kernel"),
            *("_experts_bwd_hidden_kernel", "_experts_bwd_weights_kernel"),
        ),
        tensor_cores={
            "_experts_up_kernel": "BLOCK_N",  # where it is not the products' M, 128 tokens are
            "_experts_down_kernel": "BLOCK_N",
            "_experts_bwd_hidden_kernel": "BLOCK_T",
            "_experts_bwd_weights_kernel": "BLOCK_P",
        },
        candidates=CANDIDATES,
        cost=_experts_cost,
    ),
    Op(
        fn=experts_norm,
        when="Where a norm follows the experts, as in every pre-norm tower: a launch and a pass less.",
        inputs=_norm_inputs,
        cases=(
            dict(B=2, L=3, D=29, N=11, E=4, K=2, M=9, weighted=1),
            dict(B=2, L=3, D=29, N=11, E=4, K=2, M=9, norm_first=1),
            dict(B=3, L=1, D=64, N=24, E=6, K=3, gated=1, plain=1),
            dict(B=1, L=245, D=16, N=16, E=2, K=1, M=32),  # enough rows for the form for many tokens
            dict(B=1, L=0, D=8, N=16, E=4, K=2),
        ),
        shapes=(
            *(dict(B=B, L=16, D=2688, N=1856, E=128, K=6, M=3712) for B in (1, 32)),
            dict(B=1, L=1, D=2688, N=1856, E=128, K=6, M=3712, plain=1),
            dict(B=1, L=16, D=2048, N=1408, E=60, K=4, gated=1, M=5632, plain=1, weighted=1),  # Qwen1.5-MoE-A2.7B's
            dict(B=1, L=4096, D=2688, N=1856, E=128, K=6, M=3712, plain=1),
        ),
        outputs=("y", "residual"),
        grads=(),  # for all floats, those of the two ops, which run where they are wanted: test_experts_norm.py
        kernels=(
            *("_experts_schedule_kernel", "_experts_up_kernel", "_experts_down_kernel"),
            "_modulated_rms_norm_fwd_kernel",
        ),
        tensor_cores={"_experts_up_kernel": "BLOCK_N", "_experts_down_kernel": "BLOCK_N"},
        cost=_norm_cost,
    ),
    Op(
        fn=route,
        when="Routers by sigmoids with a bias (DeepSeek-V3, Nemotron 3) or by a softmax (Mixtral, Qwen3-MoE, OLMoE). "
        "For others give `experts` your own Routing.",
        inputs=_route_inputs,
        cases=(
            dict(T=3, D=5, E=8, K=3),
            dict(T=21, D=29, E=12, K=3, groups=4, kept=2),
            dict(T=1, D=8, E=4, K=4),
            dict(T=0, D=8, E=4, K=2),
            dict(T=37, D=520, E=13, K=3),  # three tiles, the last one ragged, and two parts of D
            dict(T=19, D=31, E=30, K=14, groups=5, kept=2),  # two choices among zeros
            dict(T=530, D=8, E=6, K=2),  # many
            dict(T=21, D=29, E=12, K=3, softmax=1),
            dict(T=37, D=520, E=13, K=3, softmax=1, norm=0),  # three tiles, two parts of D
            dict(T=530, D=8, E=6, K=2, softmax=1, norm=0),
        ),
        shapes=(
            *(dict(T=T, D=2688, E=128, K=6) for T in (1, 16, 64, 256, 512, 1024, 4096)),
            *(dict(T=T, D=7168, E=256, K=8, groups=8, kept=4) for T in (16, 4096)),  # in groups: DeepSeek-V3's
            *(dict(T=T, D=2048, E=128, K=8, softmax=1) for T in (16, 4096)),  # Qwen3-30B-A3B's
            *(dict(T=T, D=2048, E=64, K=8, softmax=1, norm=0) for T in (16, 4096)),  # OLMoE's
        ),
        grows=dict(T=16384),
        outputs=Routing._fields,
        grads=("x", "weight"),
        kernels=(
            *("_route_few_kernel", "_route_halves_kernel", "_route_scores_kernel", "_route_choose_kernel"),
            *("_route_scan_kernel", "_route_scatter_kernel", "_route_bwd_kernel"),
        ),
        candidates={
            "_route_few_kernel": (
                *(_few(splits, 16) for splits in (3, 4, 6, 8)),
                *(_few(splits, 16, 8) for splits in (3, 4, 6, 8)),
            ),
            "_route_halves_kernel": (
                *(_halves(16, 32, splits) for splits in (8, 14)),
                *(_halves(16, 64, 8), _halves(32, 64, 8), _halves(64, 64, 4), _halves(64, 64, 3), _halves(64, 64, 2)),
                *(_halves(64, 64, 2, 64, 3), _halves(128, 128, 4), _halves(128, 128, 2)),
            ),
            "_route_scores_kernel": (
                *(_scores(32, 32, 32, 4), _scores(64, 32, 32, 4), _scores(64, 64, 32, 8)),
                *(_scores(32, 64, 32, 8), _scores(64, 64, 64, 8), _scores(32, 64, 64, 8), _scores(32, 32, 64, 4)),
            ),
        },
        cost=lambda itemsize, T, D, E, K, **_: (2 * T * E * D, T * D * itemsize + 4 * E * D + 20 * T * K + 4 * E),
    ),
)
