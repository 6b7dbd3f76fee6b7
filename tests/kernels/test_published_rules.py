"""What LLaDA's, Dream's, SDAR's, Fast-dLLM's and the EB-Sampler's published rules take, on the same logits."""

import math

import pytest
import torch
from literal import rules
from torch import Tensor

from tt_kernels import Sampling, Strategy, unmask_logits


@pytest.mark.parametrize("steps", (1, 3, 8, 16, 40))
def test_steps_left_is_lladas_schedule(steps: int) -> None:
    """ceil(masked / steps left), step after step, is the equal share and one more in each of the first steps."""
    for masked in range(1, 41):
        left, numbers = masked, []
        for step in range(steps):
            numbers.append(min(left, -(-left // (steps - step))))
            left -= numbers[-1]
        assert numbers == rules.llada_numbers(masked, steps)


def plain(logits: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """What each program begins with: the best token and the softmax, the mask apart."""
    logits = logits.double().index_fill(-1, torch.tensor([mask]), -math.inf)
    return logits.argmax(-1), logits.softmax(-1)


def case(seed: int, B: int = 4, L: int = 12, V: int = 30) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(B, L, V, generator=generator).double()
    block = torch.randint(0, 2, (B, L), generator=generator) * (V - 1)
    return logits, block, V - 1


def take(block: Tensor, token: Tensor, b: int, places: list[int]) -> list[int]:
    return [int(token[b, i]) if i in places else t for i, t in enumerate(block[b].tolist())]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alg", ("maskgit_plus", "topk_margin", "entropy"))
def test_dreams_rules(seed: int, alg: str) -> None:
    """Its logits are one place late, and as many commit as its times say."""
    logits, block, mask = case(seed)
    B = len(block)
    late = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    token, p = plain(late, mask)
    best = p.topk(2, -1).values
    score = dict(maskgit_plus=best[..., 0], topk_margin=best[..., 0] - best[..., 1])
    score["entropy"] = (p * (p + 1e-10).log()).sum(-1)
    for step, steps in ((0, 4), (2, 7), (6, 7), (0, 16)):
        numbers = [rules.dream_number(int((row == mask).sum()), step, steps) for row in block]
        kind = dict(maskgit_plus="probability", topk_margin="margin").get(alg, alg)
        strategy = Strategy.of(B, confidence=kind, number=torch.tensor(numbers), tempered=True)
        got = unmask_logits(logits, block, Sampling.of(B), mask_token_id=mask, strategy=strategy, shift=True)
        for b in range(B):
            sure = torch.where(block[b] == mask, score[alg][b], -math.inf)
            best = sure.sort(descending=True, stable=True).indices  # the first two places have the same logits
            assert got.block[b].tolist() == take(block, token, b, best[: numbers[b]].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_dreams_tempered_probability(seed: int) -> None:
    """Of the token that was drawn, after temperature and top-p."""
    logits, block, mask = case(seed, B=3)
    sampling = Sampling.of(3, temperature=0.7, top_p=0.8, seed=torch.arange(3))
    strategy = Strategy.of(3, tempered=True)
    got = unmask_logits(logits, block, sampling, mask_token_id=mask, strategy=strategy, steps_left=torch.ones(3).long())
    scaled = logits.index_fill(-1, torch.tensor([mask]), -math.inf) / 0.7
    ordered, ids = scaled.sort(-1, descending=True)
    late = ordered.softmax(-1).cumsum(-1).roll(1, -1) > 0.8  # the first that exceeds it stays
    late[..., 0] = False
    p = scaled.masked_fill(torch.zeros_like(late).scatter(-1, ids, late), -math.inf).softmax(-1)
    own = p.gather(-1, got.block.unsqueeze(-1)).squeeze(-1)
    where = block == mask
    torch.testing.assert_close(got.confidence[where], own[where], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_fast_dllms_and_sdars_rules(seed: int) -> None:
    logits, block, mask = case(seed)
    B = len(block)
    token, p = plain(logits, mask)
    sure = torch.where(block == mask, p.max(-1).values, -math.inf)
    for number in (0.3, 0.6, 1.0, 2.5):
        threshold = torch.full((B,), min(number, 0.95)).double()
        common = dict(mask_token_id=mask)
        by_threshold = unmask_logits(logits, block, Sampling.of(B), threshold=threshold, **common)
        strategy = Strategy.of(B, factor=number)
        by_factor = unmask_logits(logits, block, Sampling.of(B), strategy=strategy, **common)
        dynamic = unmask_logits(
            *(logits, block, Sampling.of(B)), threshold=threshold, steps_left=torch.full((B,), 5), **common
        )
        for b in range(B):
            masked = int((block[b] == mask).sum())
            best = sure[b].sort(descending=True, stable=True)
            places, values = best.indices.tolist()[:masked], best.values.tolist()[:masked]
            # Fast-dLLM drops what is below the threshold, but for the best; we ask for more than the threshold.
            kept = [i for n, i in enumerate(places) if n == 0 or values[n] >= threshold[b]]
            assert by_threshold.block[b].tolist() == take(block, token, b, kept)
            # Its factor; where only the last one fails its program takes that as well.
            bounds = [-1.0, *(1 - number / (n + 1) for n in range(2, masked + 1))]
            kept = places[: next((n for n in range(masked) if values[n] < bounds[n]), masked)]
            assert by_factor.block[b].tolist() == take(block, token, b, kept)
            # SDAR: what is above, or the step's share where that is more.
            above = [i for i, v in zip(places, values, strict=True) if v > threshold[b]]
            share = -(-masked // 5)
            assert dynamic.block[b].tolist() == take(block, token, b, above if len(above) >= share else places[:share])


@pytest.mark.parametrize("seed", range(4))
def test_entropy_bound_of_ascending_entropies(seed: int) -> None:
    """transformers' and vLLM's form: what comes before in the ascending order sums to at most the bound."""
    logits, block, mask = case(seed)
    B = len(block)
    token, p = plain(logits, mask)
    entropy = torch.distributions.Categorical(probs=p).entropy()
    for bound in (0.1, 1.0, 4.0):
        strategy = Strategy.of(B, confidence="entropy", entropy_bound=bound)
        got = unmask_logits(logits, block, Sampling.of(B), mask_token_id=mask, strategy=strategy)
        for b in range(B):
            order = torch.where(block[b] == mask, entropy[b], math.inf).sort().indices[: int((block[b] == mask).sum())]
            ascending = entropy[b][order]
            kept = order[ascending.cumsum(0) - ascending <= bound].tolist()
            assert got.block[b].tolist() == take(block, token, b, kept)
