"""Peers of unmasking and remasking: the published rules, each written plainly in PyTorch as its program goes.

Whole logits, a softmax in fp64, and where the program has them a loop over rows and looks from the host. All leave the
mask's logit out, as the op does, and return what it returns; none of them draws, so that results can be equal. LLaDA's
step and Fast-dLLM's threshold are that program's own function where its file is there (sources.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tt_kernels import Strategy
from tt_kernels.reference.unmasking import REMASK, uniform

from .base import Arguments, Call, Peer, Unavailable, bare_package, kernels_run, needs, only, prepared
from .sources import published


def _logits(a: Arguments) -> Tensor:
    """Those of each position in fp64, as LLaDA and Fast-dLLM take their softmax; with a shift each is copied."""
    logits = torch.cat([a.logits[:, :1], a.logits[:, :-1]], 1) if a.shift else a.logits
    return logits.double().index_fill(2, torch.tensor([a.mask_token_id], device=logits.device), -math.inf)


def _has(a: Arguments, *names: str) -> bool:
    """Whether these rules are asked for, and no others, of rows of temperature 0."""
    rules = a.strategy or Strategy()
    given = {name for name in ("threshold", "steps_left") if getattr(a, name) is not None}
    given |= {name for name in rules._fields if getattr(rules, name) is not None}
    return given == set(names) and _is_plain(a)


def _is_plain(a: Arguments) -> bool:
    """Whether logits are taken as they are, and nothing is drawn."""
    return a.bias is None and a.softcap is None and not bool((a.sampling.temperature > 0).any())


def _taken(a: Arguments, token: Tensor, probability: Tensor, committed: Tensor) -> tuple[Tensor, ...]:
    """The op's results, once it is known what commits."""
    masked = a.block == a.mask_token_id
    confidence = probability.masked_fill(~masked, 0).to(torch.promote_types(a.logits.dtype, torch.float32))
    block = torch.where(committed, token.to(a.block), a.block)
    return block, committed, confidence, (block == a.mask_token_id).sum(-1)


def _by_row(a: Arguments, how_many: Callable[[int, Tensor], int]) -> tuple[Tensor, ...]:
    """The most probable masked positions of each row; how_many is told the row and its probabilities, largest first."""
    probability, token = _logits(a).softmax(-1).max(-1)
    masked = a.block == a.mask_token_id
    sure = torch.where(masked, probability, -math.inf)
    committed = torch.zeros_like(masked)
    for b in range(len(masked)):
        best = sure[b].topk(int(masked[b].sum()))
        committed[b, best.indices[: how_many(b, best.values)]] = True
    return _taken(a, token, probability, committed)


def published_loops(a: Arguments) -> Call:
    """Threshold, schedule and factor together, which no program has, by the loops of those that have one."""
    rules = a.strategy or Strategy()
    only(
        all(getattr(rules, name) is None for name in rules._fields if name != "factor") and _is_plain(a),
        "published loops: greedy, by threshold, schedule and factor",
    )

    def how_many(b: int, sure: Tensor) -> int:
        m, values = len(sure), sure.tolist()
        counts = [min(m, 1)]
        if a.threshold is not None:
            counts.append(sum(v > float(a.threshold[b]) for v in values))
        if a.steps_left is not None:
            counts.append(-(-m // max(1, int(a.steps_left[b]))))
        if rules.factor is not None:
            counts.append(_factor(values, float(rules.factor[b])))
        return max(counts)

    return lambda: _by_row(a, how_many)


def _factor(sure: list[float], f: float) -> int:
    """Fast-dLLM's factor: while the n-th has 1 - f / (n + 1), the first always. Its program takes the last position as
    well where that alone fails; the paper's formula does not."""
    passes = [n == 1 or c >= 1 - f / (n + 1) for n, c in enumerate(sure, 1)]
    return passes.index(False) if False in passes else len(passes)


def _program(a: Arguments, numbers: Tensor | None) -> Call | None:
    """Fast-dLLM's own get_transfer_index, which is LLaDA's step as a function, where $TT_PEER_SOURCES has its file: all
    rows in a call, or a call a row where thresholds differ, which it takes one of. The mask's logit is -inf before the
    clock. It tells no confidence."""
    try:
        names = ("get_transfer_index", "add_gumbel_noise")
        transfer = published("NVlabs/Fast-dLLM", "llada/generate.py", *names).get_transfer_index
    except Unavailable:
        return None
    if a.shift:
        return None
    logits = a.logits.index_fill(2, torch.tensor([a.mask_token_id], device=a.logits.device), -math.inf)
    thresholds = [None] if a.threshold is None else a.threshold.tolist()
    apart = len(set(thresholds)) > 1
    parts = [slice(b, b + 1) for b in range(len(logits))] if apart else [slice(None)]

    def step() -> tuple[Tensor, ...]:
        block, committed = a.block.clone(), torch.zeros_like(a.block, dtype=torch.bool)
        for part, threshold in zip(parts, thresholds if apart else thresholds[:1], strict=True):
            x = block[part]
            how = (None if numbers is None else numbers[part], threshold)
            token, chosen = transfer(logits[part], 0.0, "low_confidence", x == a.mask_token_id, x, *how)
            x[chosen], committed[part] = token[chosen].to(x), chosen
        return block, committed

    return step


def llada(a: Arguments) -> Call:
    """LLaDA (2502.09992, generate.py of ML-GSAI/LLaDA), low_confidence: an equal share of the masked positions in each
    step, known before the first. The loop asks for as many as the host says, row after row."""
    only(_has(a, "steps_left"), "LLaDA: greedy, by its schedule alone")
    masked = (a.block == a.mask_token_id).sum(-1)
    numbers = -(-masked // a.steps_left.clamp(min=1))
    counts = numbers.tolist()
    return _program(a, numbers) or (lambda: _by_row(a, lambda b, sure: counts[b])[:2])


def fast_dllm(a: Arguments) -> Call:
    """Fast-dLLM (2505.22618, llada/generate.py of NVlabs/Fast-dLLM): by threshold, of each row one look from the host
    for every masked position, or by factor. Its threshold lets p = tau pass, ours does not."""
    by_threshold = _has(a, "threshold")
    only(by_threshold or _has(a, "factor"), "Fast-dLLM: greedy, by threshold alone or factor alone")

    def above(b: int, sure: Tensor) -> int:
        return min(len(sure), 1) + sum(float(v) >= float(a.threshold[b]) for v in sure[1:])

    def best(b: int, sure: Tensor) -> int:
        return _factor(sure.tolist(), float(a.strategy.factor[b]))

    own = _program(a, None) if by_threshold else None  # its factor takes the last position where ours does not
    return own or (lambda: _by_row(a, above if by_threshold else best)[:2])


def dream(a: Arguments) -> Call:
    """Dream (2508.15487, generation_utils.py of Dream-org): maskgit_plus, topk_margin or entropy, each row's own number
    of positions. The margin sorts the vocabulary; the logarithm is of p + 1e-10."""
    names = {"confidence", "number"} | ({"tempered"} if a.strategy and a.strategy.tempered is not None else set())
    only(_has(a, *names), "Dream: greedy, a confidence and a number of positions")
    kinds = a.strategy.confidence.tolist()
    only(set(kinds) <= {0, 1, 2}, "Dream: by probability, margin or entropy")
    numbers = a.strategy.number.tolist()

    def step() -> tuple[Tensor, ...]:
        p = _logits(a).softmax(-1)
        probability, token = p.max(-1)
        masked, scores = a.block == a.mask_token_id, [probability]
        if 1 in kinds:
            ordered = p.sort(-1, descending=True).values
            scores.append(ordered[..., 0] - ordered[..., 1])
        else:
            scores.append(probability)
        scores.append((p * (p + 1e-10).log()).sum(-1) if 2 in kinds else probability)
        committed = torch.zeros_like(masked)
        for b, (kind, number) in enumerate(zip(kinds, numbers, strict=True)):
            sure = torch.where(masked[b], scores[kind][b], -math.inf)
            committed[b, sure.topk(min(number, int(masked[b].sum()))).indices] = True
        return _taken(a, token, probability, committed)

    return step


def _bounded(logits: Tensor, masked: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    ordered, index = torch.where(masked, entropy, math.inf).sort(-1)
    passes = (ordered.cumsum(-1) - ordered.cummax(-1).values) <= bound.unsqueeze(-1)  # inf - inf does not
    committed = torch.zeros_like(masked).scatter(-1, index, passes & (ordered < math.inf))
    probability, token = p.max(-1)
    return token, probability, committed


def entropy_bound(a: Arguments) -> Call:
    """EB-Sampler (2505.24857) as transformers and vLLM write it for DiffusionGemma: entropies in ascending order, as
    long as those before sum to at most the bound; no look from the host, and compiled on a GPU, as vLLM's is. Theirs
    does it of a whole canvas; here masked positions come first."""
    only(
        _has(a, "confidence", "entropy_bound") and bool((a.strategy.confidence == 2).all()),
        "entropy bound: greedy, of entropies in ascending order",
    )
    bounded = prepared(_bounded, a.logits)

    def step() -> tuple[Tensor, ...]:
        return _taken(a, *bounded(_logits(a), a.block == a.mask_token_id, a.strategy.entropy_bound))

    return step


def sglang(a: Arguments) -> Call:
    """SGLang's dllm_post_process (sglang.srt.dllm.kernels): softmax, best token and threshold of a block in a Triton
    launch, the fallback to one position in a second; one block a call, which it changes in place. Its softmax has the
    mask's logit, so that is -inf before the clock."""
    only(_has(a, "threshold") and not a.shift, "SGLang's dllm_post_process: greedy, by threshold alone")
    kernels_run(a.logits, "SGLang's dllm_post_process")
    for name in ("sglang", "sglang.srt", "sglang.srt.dllm"):
        bare_package(name)
    process = needs("sglang.srt.dllm.kernels.post_process", "sglang").dllm_post_process_fused
    mask = torch.tensor([a.mask_token_id], device=a.logits.device)
    logits, thresholds = a.logits.index_fill(2, mask, -math.inf), a.threshold.tolist()

    def step() -> Tensor:
        block = a.block.clone()
        for row, ids, threshold in zip(logits, block, thresholds, strict=True):
            process(row, ids, a.mask_token_id, threshold, autotune=ids.is_cuda)
        return block

    return step


# ---- remasking ----


def _free(a: Arguments) -> Tensor:
    free = a.block != a.mask_token_id
    return free if a.may_change is None else free & a.may_change


def _rewritten(a: Arguments, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return block, block != a.block, (block == a.mask_token_id).sum(-1)


def _remasks(a: Arguments, *names: str) -> bool:
    return {name for name in a.remasking._fields if getattr(a.remasking, name) is not None} == set(names)


def llada_edit(a: Arguments) -> Call:
    """LLaDA2.1's joint threshold (2602.08676): a committed token becomes another one that is predicted with more than
    tau_e."""
    only(_remasks(a, "edit"), "LLaDA2.1: edits alone")

    def step() -> tuple[Tensor, ...]:
        better = (a.token != a.block) & (a.confidence > a.remasking.edit.unsqueeze(-1).to(a.confidence))
        return _rewritten(a, torch.where(_free(a) & better, a.token, a.block))

    return step


def wino(a: Arguments) -> Call:
    """WINO (2507.18578): what its shadow block finds less probable than tau_2 is masked again, of too many the least
    probable; row after row, with looks from the host."""
    only(_remasks(a, "verify", "most"), "WINO: verification with a limit")

    def step() -> tuple[Tensor, ...]:
        doubted = _free(a) & (a.own < a.remasking.verify.unsqueeze(-1).to(a.own))
        for b in range(len(doubted)):
            found, most = int(doubted[b].sum()), int(a.remasking.most[b])
            if 0 <= most < found:
                worst = torch.where(doubted[b], a.own[b], math.inf).topk(most, largest=False).indices
                doubted[b] = torch.zeros_like(doubted[b]).index_fill(0, worst, True)
        return _rewritten(a, a.block.masked_fill(doubted, a.mask_token_id))

    return step


def remdm(a: Arguments) -> Call:
    """ReMDM (2503.00307): every position is masked again with probability sigma, or with its share of sigma by the
    softmax of -p. The noise is ours, made before the clock, which favours it."""
    only(_remasks(a, "sigma") or _remasks(a, "sigma", "shared"), "ReMDM: sigma alone")
    place = torch.arange(a.block.shape[1], device=a.block.device)
    seed, step = (t.unsqueeze(-1).expand(a.block.shape) for t in (a.sampling.seed, a.sampling.step))
    chance = uniform(seed, a.sampling.position.unsqueeze(-1) + place, step, REMASK)

    def again() -> tuple[Tensor, ...]:
        sigma = a.remasking.sigma.double().unsqueeze(-1)
        if a.remasking.shared is not None:
            share = (-a.own.double()).masked_fill(a.block == a.mask_token_id, -math.inf).softmax(-1)
            sigma = torch.where(a.remasking.shared.unsqueeze(-1), sigma * share, sigma)
        return _rewritten(a, a.block.masked_fill(_free(a) & (chance < sigma), a.mask_token_id))

    return again


PEERS = {
    "unmask_logits": (
        Peer("published loops", published_loops),
        Peer("LLaDA", llada, outputs=("block", "committed")),
        Peer("Fast-dLLM", fast_dllm, outputs=("block", "committed")),
        Peer("Dream", dream),
        Peer("entropy bound", entropy_bound),
        Peer("sglang", sglang, outputs=("block",)),
    ),
    "remask": (Peer("LLaDA2.1", llada_edit), Peer("WINO", wino), Peer("ReMDM", remdm)),
}
