"""Gumbel noise, a pure function of seed, position, step and token id."""

import torch
from torch import Tensor

from tt_kernels import Remasking, Sampling, Strategy
from tt_kernels.sampling.commit import commit
from tt_kernels.sampling.gumbel_noise import gumbel_noise
from tt_kernels.sampling.head_sample import head_sample
from tt_kernels.sampling.head_sample_launch import HeadLaunch
from tt_kernels.sampling.remask import remask
from tt_kernels.sampling.sample import SampleLaunch, sample
from tt_kernels.sampling.unmask import unmask
from tt_kernels.sampling.unmask_logits import unmask_logits

from .op import Op


def keys(R: int) -> dict[str, Tensor]:
    """What the noise of R rows depends on."""
    return dict(seed=torch.randint(-(2**63), 2**63 - 1, (R,)), position=torch.arange(R) * 7, step=torch.arange(R) % 3)


def sampling(R: int, V: int, hot: int = 1, narrow: int = 0) -> Sampling:
    """Every other row at temperature 0, the rest at 0.1 to 1; hot=0: all at 0. In fp64, as a model holds them.
    narrow: 1 top_k and top_p, 2 top_k, 3 top_p; of each row its own, and of every fourth and fifth row no limit."""
    row = torch.arange(R)
    top_k, top_p = (row % 4 < 3) * (1 + V // (2 + row % 3)), torch.where(row % 5 < 4, 0.5 + 0.1 * (row % 5), 1.0)
    return Sampling(
        hot * torch.linspace(0.1, 1, R, dtype=torch.float64) * (row % 2),
        **keys(R),
        top_k=top_k if narrow in (1, 2) else None,
        top_p=top_p if narrow in (1, 3) else None,
    )


def _sample_inputs(dtype, R, V, **rest):
    return dict(logits=3 * torch.randn(R, V, dtype=dtype), sampling=sampling(R, V, **rest), suppress=V // 2)


def head_inputs(dtype, R, D, V, **rest):
    weight = 3 * D**-0.5 * torch.randn(V, D, dtype=dtype)
    hidden = torch.randn(R, D, dtype=dtype)
    return dict(hidden=hidden, weight=weight, sampling=sampling(R, V, **rest), suppress=V // 2)


CANDIDATES = tuple(  # all of one BLOCK_V: it orders a row's sums, whichever launch its number of rows is given
    HeadLaunch(BLOCK_V=128, BLOCK_T=t, BLOCK_K=k, num_warps=warps, num_stages=stages)
    for t, k, warps, stages in (
        *((16, 128, 4, 4), (16, 64, 4, 6), (32, 128, 4, 4), (64, 64, 4, 5)),
        *((64, 64, 8, 5), (64, 128, 8, 4), (128, 64, 8, 4), (128, 64, 8, 6)),
    )
)


def commit_inputs(B: int, L: int, V: int) -> dict[str, object]:
    block = torch.randint(V, (B, L)).masked_fill(torch.rand(B, L) < 0.6, V - 1)
    return dict(
        block=block,
        mask_token_id=V - 1,
        threshold=torch.full((B,), 0.3, dtype=torch.float64),
        steps_left=torch.arange(B) % 4 + 1,
    )


def _commit_inputs(dtype, B, L, V):
    confidence = torch.rand(B, L, dtype=torch.promote_types(dtype, torch.float32))
    return dict(**commit_inputs(B, L, V), token=torch.randint(V - 1, (B, L)), confidence=confidence)


def strategies(B: int, rules: int) -> Strategy | None:
    """rules: 0 none; 1 every confidence, a factor, a bound of the entropy, a number, the tempered distribution and a
    drawn order, of every row another; 2 a factor alone; 3, LLaDA's, and 4, Fast-dLLM's threshold, none; 5 Dream's
    confidences with numbers; 6 a bound of entropies in ascending order."""
    if rules == 5:
        return Strategy(confidence=torch.arange(B) % 3, number=torch.arange(B) % 4 + 1)
    if rules == 6:
        return Strategy(confidence=torch.full((B,), 2), entropy_bound=torch.full((B,), 2.5).double())
    if rules != 1:
        return Strategy.of(B, factor=0.7) if rules == 2 else None
    row = torch.arange(B)
    return Strategy(
        confidence=(row + 4) % 5,
        factor=torch.where(row % 2 == 1, 0.7, -1.0).double(),
        entropy_bound=torch.where(row % 3 == 0, 2.5, -1.0).double(),
        number=torch.where(row % 6 == 4, 2, -1),
        tempered=row % 4 == 3,
        alg_temp=torch.where(row % 3 == 1, 0.3, 0.0).double(),
    )


def warmer(sampling: Sampling) -> Sampling:
    """Tempered logits are then no larger than the others, and so are the errors of their exponentials."""
    return sampling._replace(temperature=2 * sampling.temperature)


def ending_of(dtype, V: int) -> dict[str, object]:
    """What comes after a head's product, and Dream's place of the logits."""
    bias = torch.randn(V).index_fill(0, torch.tensor([0, V // 2]), -torch.inf)
    return dict(bias=bias.to(dtype), softcap=8.0, shift=True)


def _unmask_inputs(dtype, B, L, D, V, rules=0, ending=0, **rest):
    inputs = head_inputs(dtype, B, D, V, **rest)
    del inputs["suppress"]
    more = dict(strategy=strategies(B, rules), sampling=warmer(inputs["sampling"])) if rules else {}
    if ending:
        more |= ending_of(dtype, V)
    return inputs | dict(hidden=torch.randn(B, L, D, dtype=dtype), **commit_inputs(B, L, V)) | more


def _unmask_logits_inputs(dtype, B, L, V, rules=0, shift=0, ending=0, **rest):
    """rules: as `strategies`; from 3 on those of a program, of rows of temperature 0."""
    logits = 3 * torch.randn(B, L, V, dtype=dtype)
    rule = commit_inputs(B, L, V) | dict(strategy=strategies(B, rules), shift=bool(shift))
    if rules >= 3:
        rest["hot"] = 0
        rule["threshold"] = rule["threshold"] if rules == 4 else None
        rule["steps_left"] = rule["steps_left"] if rules == 3 else None
    if ending:
        rule |= ending_of(dtype, V)
    return dict(logits=logits, sampling=warmer(sampling(B, V, **rest)), **rule)


def _remask_inputs(dtype, B, L, V, rules=7, may=1):
    """rules: 1 edit, 2 verify with a limit, 4 sigma, shared in every other row."""
    block, row = torch.randint(V, (B, L)).masked_fill(torch.rand(B, L) < 0.3, V - 1), torch.arange(B)
    wide = torch.promote_types(dtype, torch.float32)
    remasking = Remasking(
        edit=torch.full((B,), 0.8).double() if rules & 1 else None,
        verify=torch.full((B,), 0.5).double() if rules & 2 else None,
        most=row % 4 - 1 if rules & 2 else None,
        sigma=torch.full((B,), 0.6).double() if rules & 4 else None,
        shared=row % 2 == 1 if rules & 4 else None,
    )
    return dict(
        block=block,
        remasking=remasking,
        mask_token_id=V - 1,
        may_change=torch.rand(B, L) < 0.8 if may else None,
        token=torch.where(torch.rand(B, L) < 0.5, block, torch.randint(V - 1, (B, L))),
        confidence=torch.rand(B, L, dtype=wide),
        own=torch.rand(B, L, dtype=wide),
        sampling=sampling(B, V),
    )


_HEAD = dict(D=2688, V=131072)
_STRATEGY_KERNELS = ("_judge_kernel", "_decide_kernel")
_HEAD_KERNELS = ("_head_kernel", "_limits_kernel", "_sample_kernel", "_combine_kernel")

OPS = (
    Op(
        fn=gumbel_noise,
        when="To see, or to do elsewhere, the draws that `sample` and its kin make.",
        inputs=lambda dtype, R, V: dict(**keys(R), vocab_size=V),
        cases=(dict(R=3, V=11), dict(R=1, V=64), dict(R=2, V=1101), dict(R=0, V=4)),
        shapes=(dict(R=16, V=131072),),
        outputs=("noise",),
        kernels=("_gumbel_noise_kernel",),
        cost=lambda itemsize, R, V: (40 * R * V, 8 * R * V),
    ),
    Op(
        fn=sample,
        when="Next tokens from logits in memory, each row with settings of its own.",
        inputs=_sample_inputs,
        cases=(
            dict(R=6, V=11),
            dict(R=4, V=64, hot=0),
            dict(R=6, V=37, narrow=1),
            dict(R=20, V=70, narrow=2),
            dict(R=2, V=70, narrow=3),
            dict(R=3, V=5003),
            dict(R=3, V=5003, narrow=1),
            dict(R=1, V=3),
            dict(R=0, V=5),
        ),
        shapes=(dict(R=1, V=131072, hot=0), dict(R=16, V=131072), dict(R=16, V=131072, narrow=1)),
        outputs=("token", "confidence"),
        kernels=("_limits_kernel", "_sample_kernel", "_combine_kernel"),
        candidates=dict(
            _sample_kernel=tuple(
                SampleLaunch(BLOCK_V=block, BLOCK_T=1, TILES=tiles, num_warps=warps)
                for block, tiles, warps in ((1024, 4, 4), (2048, 1, 4), (2048, 2, 4), (2048, 4, 8), (4096, 1, 8))
            )
        ),
        cost=lambda itemsize, R, V, **_: (40 * R * V, R * V * itemsize),
    ),
    Op(
        fn=head_sample,
        when="Next tokens from hidden states: the head's product and the draw, without logits in memory.",
        inputs=head_inputs,
        cases=(
            dict(R=6, D=16, V=37),
            dict(R=4, D=6, V=11, hot=0),
            dict(R=6, D=8, V=29, narrow=1),
            dict(R=2, D=40, V=1100),
            dict(R=20, D=3, V=1100),
            dict(R=130, D=3, V=5),
            dict(R=66, D=4, V=9, narrow=2),
            dict(R=0, D=4, V=5),
        ),
        shapes=(
            dict(R=1, **_HEAD, hot=0),
            *(dict(R=R, **_HEAD) for R in (16, 32, 64, 128, 512)),
            *(dict(R=R, **_HEAD, narrow=1) for R in (16, 512)),
        ),
        grows=dict(R=512),
        outputs=("token", "confidence"),
        kernels=_HEAD_KERNELS,
        tensor_cores={"_head_kernel": "BLOCK_V"},
        candidates=dict(_head_kernel=CANDIDATES),
        cost=lambda itemsize, R, D, V, **_: (2 * R * V * D, (V * D + R * D) * itemsize),
    ),
    Op(
        fn=commit,
        when="The published rule by itself, for predictions that came from elsewhere.",
        inputs=_commit_inputs,
        cases=(
            dict(B=4, L=7, V=11),
            dict(B=1, L=16, V=5),
            dict(B=2, L=1, V=5),
            dict(B=3, L=77, V=5),
            dict(B=0, L=4, V=5),
            dict(B=2, L=0, V=5),
        ),
        shapes=(dict(B=1, L=16, V=131072), dict(B=64, L=16, V=131072), dict(B=64, L=512, V=131072)),
        grows=dict(B=64, L=256),
        outputs=("block", "committed", "masked"),
        kernels=("_commit_kernel",),
        cost=lambda itemsize, B, L, V: (0, B * L * (4 * 8 + itemsize)),
    ),
    Op(
        fn=unmask,
        when="A denoising step of masked diffusion from hidden states: head, draw, and which positions commit.",
        inputs=_unmask_inputs,
        cases=(
            dict(B=4, L=5, D=16, V=37),
            dict(B=2, L=16, D=6, V=11, hot=0),
            dict(B=3, L=4, D=8, V=29, narrow=1),
            dict(B=2, L=100, D=8, V=300),
            dict(B=2, L=16, D=3, V=1100),
            dict(B=2, L=40, D=4, V=11, narrow=3),
            dict(B=2, L=520, D=2, V=5),
            dict(B=6, L=7, D=8, V=29, rules=1),
            dict(B=3, L=5, D=8, V=29, rules=2, ending=1),
            dict(B=6, L=4, D=24, V=300, rules=1, ending=1, narrow=1),
            dict(B=6, L=12, D=24, V=300, rules=1),
            dict(B=0, L=4, D=4, V=5),
            dict(B=2, L=0, D=4, V=5),
        ),
        shapes=(
            *(dict(B=B, L=L, **_HEAD) for B, L in ((1, 16), (4, 16), (8, 16), (64, 16), (1, 128))),
            dict(B=4, L=16, **_HEAD, narrow=1),
            *(dict(B=B, L=16, **_HEAD, rules=1) for B in (1, 4)),
            dict(B=4, L=16, **_HEAD, rules=1, ending=1),
        ),
        grows=dict(B=64, L=64),
        outputs=("block", "committed", "confidence", "masked"),
        kernels=("_masked_rows_kernel", *_HEAD_KERNELS, "_finish_kernel", "_commit_kernel", *_STRATEGY_KERNELS),
        tensor_cores={"_head_kernel": "BLOCK_V"},
        candidates=dict(_head_kernel=CANDIDATES),
        cost=lambda itemsize, B, L, D, V, **_: (2 * B * L * V * D, (V * D + B * L * D) * itemsize),
    ),
    Op(
        fn=unmask_logits,
        when="The same for models whose head is not ours.",
        inputs=_unmask_logits_inputs,
        cases=(
            dict(B=4, L=5, V=37, rules=2),
            dict(B=6, L=7, V=29, rules=1, shift=1),
            dict(B=6, L=5, V=300, rules=1, narrow=1, shift=1),
            dict(B=6, L=5, V=29, rules=1, ending=1),
            dict(B=6, L=4, V=300, rules=1, ending=1, narrow=1),
            dict(B=2, L=16, V=11, hot=0),
            dict(B=5, L=3, V=5003, rules=1),
            dict(B=2, L=520, V=5, rules=1),
            dict(B=0, L=4, V=5, rules=1),
            dict(B=2, L=0, V=5, rules=1),
        ),
        shapes=(  # as LLaDA's
            dict(B=4, L=32, V=126464, rules=2, hot=0),
            *(dict(B=4, L=32, V=126464, rules=rules) for rules in (1, 3, 4, 5, 6)),
            dict(B=4, L=32, V=126464, rules=1, ending=1),
            dict(B=4, L=32, V=126464, rules=1, shift=1, narrow=1),
            dict(B=4, L=32, V=126464, rules=1, ending=1, narrow=1),
        ),
        grows=dict(B=64, L=64),
        outputs=("block", "committed", "confidence", "masked"),
        kernels=("_masked_rows_kernel", "_finished_kernel", "_limits_kernel", "_sample_kernel", *_STRATEGY_KERNELS),
        cost=lambda itemsize, B, L, V, **_: (40 * B * L * V, B * L * V * itemsize),
    ),
    Op(
        fn=remask,
        when="Samplers that take tokens back or replace them.",
        inputs=_remask_inputs,
        cases=(
            dict(B=4, L=7, V=11),
            dict(B=3, L=16, V=11, rules=1, may=0),
            dict(B=4, L=16, V=11, rules=2, may=0),
            dict(B=4, L=77, V=5, rules=3),
            dict(B=4, L=9, V=5, rules=4, may=0),
            dict(B=0, L=4, V=5),
            dict(B=2, L=0, V=5),
        ),
        shapes=(
            dict(B=1, L=32, V=131072),
            dict(B=64, L=32, V=131072),
            *(dict(B=64, L=32, V=131072, rules=rules) for rules in (1, 2, 4)),
        ),
        grows=dict(B=64, L=256),
        outputs=("block", "changed", "masked"),
        kernels=("_remask_kernel",),
        cost=lambda itemsize, B, L, V, **_: (0, B * L * (5 * 8 + 2 * itemsize)),
    ),
)
