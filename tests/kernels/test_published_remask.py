"""Whole decoding loops of published programs whose committed tokens change again, beside loops on `unmask_logits` and
`remask`, token for token; tests/published.py says where their files are from."""

from types import SimpleNamespace

import pytest
import torch
from published import MASK, PROMPT, B, Model, each, masked, settings, theirs
from torch import Tensor

from tt_kernels import Remasking, Sampling, Strategy, remask, sample, unmask_logits
from tt_kernels.reference.unmasking import RANDOM, REMASK, uniform

SEEDS = pytest.mark.parametrize("seed", range(4))


@SEEDS
@pytest.mark.parametrize(("threshold", "edit"), ((0.7, 0.5), (0.5, 0.9), (0.95, 0.3)))
def test_llada21(seed: int, threshold: float, edit: float) -> None:
    """Blocks of 6, of which a prompt of 8 holds one and a third: what it holds is never edited."""
    path, methods = "dllm/pipelines/llada21/models/modeling_llada21_moe.py", ("generate",)
    methods = (*methods, "_sample_with_temperature_topk_topp", "_top_k_logits", "_top_p_logits")
    model = Model(seed)
    llada = theirs("ZHZisZZ/dllm", path, *(f"LLaDA2MoeModelLM.{method}" for method in methods)).LLaDA2MoeModelLM
    model.__class__ = type("Edited", (Model, llada), {})
    how = dict(block_length=6, gen_length=16, threshold=threshold, editing_threshold=edit, eos_id=-1, mask_id=MASK)
    want = torch.cat([model.generate(prompt.unsqueeze(0), **how) for prompt in model.prompt])
    x, edits = masked(model.prompt, 16), 0
    for a in (6, 12, 18):
        asks, after = torch.ones(B, dtype=torch.bool), torch.zeros(B)
        while asks.any():
            old, logits = x[:, a : a + 6], model.logits(x[:, : a + 6])[:, a:]
            full = (old != MASK).all(1)
            after += full
            asks &= after <= 16
            token, confidence = sample(logits.flatten(0, 1), Sampling.of(6 * B), suppress=MASK)
            known = dict(token=token.view(B, 6), confidence=confidence.view(B, 6))
            may = (old != MASK) & (torch.arange(a, a + 6) >= PROMPT) & asks.unsqueeze(1)
            out = unmask_logits(logits, old, settings(old), mask_token_id=MASK, threshold=each(threshold))
            edited = remask(out.block, Remasking(edit=each(edit)), mask_token_id=MASK, may_change=may, **known)
            x = torch.cat([x[:, :a], edited.block, x[:, a + 6 :]], 1)
            asks &= ~full | edited.changed.any(1)
            edits += int(edited.changed.sum())
    assert torch.equal(x[:, PROMPT:], want) and edits


@SEEDS
@pytest.mark.parametrize(("draft", "back"), ((0.2, 0.5), (0.3, 0.9)))
def test_wino(seed: int, draft: float, back: float) -> None:
    """It commits at most 7 tenths of what is masked (5 to 20): a number that its caller counts. Its shadow block stands
    behind the sequence."""
    wants, names, n = [], ("decoding_wino", "add_gumbel_noise"), 12
    wino = theirs("Feng-Hong/WINO-DLLM", "LLaDA/decoding.py", *names).decoding_wino
    model, again, capped = Model(seed), 0, 0
    for prompt in model.prompt:
        how = dict(gen_length=2 * n, block_length=n, mask_id=MASK, threshold=draft, threshold_back=back)
        wants.append(wino(model, prompt.unsqueeze(0), **how)[0])
    x, T = masked(model.prompt, 2 * n), PROMPT + 2 * n
    for a in (PROMPT, PROMPT + n):
        last, places = each(30), torch.cat([torch.arange(T), torch.arange(a, a + n)])
        for _ in range(8 * n):  # it ends long before
            logits, old = model.logits(masked(x, n), places), x[:, a : a + n]
            if not (old == MASK).any():
                break
            most = ((old == MASK).sum(1) * 0.7).int().clamp(5, 20)
            rule = dict(mask_token_id=MASK, threshold=each(draft))
            drafted = unmask_logits(logits[:, a : a + n], old, settings(x), **rule).committed.sum(1)
            strategy = Strategy.of(B, number=torch.where(drafted > most, most, -1))
            out = unmask_logits(logits[:, a : a + n], old, settings(x), strategy=strategy, **rule)
            own = logits[:, T:].softmax(-1).gather(2, old.unsqueeze(2)).squeeze(2)
            count = out.committed.sum(1)
            rules = Remasking(verify=each(back), most=torch.where(count > 1, last - 1, 0))
            doubted = remask(out.block, rules, mask_token_id=MASK, may_change=old != MASK, own=own)
            x, last = torch.cat([x[:, :a], doubted.block, x[:, a + n :]], 1), count
            again, capped = again + int(doubted.changed.sum()), capped + int((drafted > most).sum())
    assert torch.equal(x, torch.cat(wants)) and again and capped


@SEEDS
@pytest.mark.parametrize("kind", ("cap", "rescale", "conf"))
def test_remdm(seed: int, kind: str) -> None:
    """Its passes, each from where it stands; where it commits none, ours commits one. Its own loop keeps what conf
    knows in bf16; it takes fp64 as well."""
    model = Model(seed)

    def pick(q: Tensor) -> Tensor:
        masked, chance = q[..., MASK], uniform(*model.key(), RANDOM)
        stays = torch.where(model.x == MASK, chance <= masked, uniform(*model.key(), REMASK) < masked)
        return torch.where(stays, MASK, q[..., :MASK].argmax(-1))

    names = ("Diffusion._ddpm_caching_update", "Diffusion._subs_parameterization")
    diffusion = theirs("kuleshov-group/remdm", "diffusion.py", *names, _sample_categorical=pick).Diffusion()
    sampling = SimpleNamespace(sampler=f"remdm-{kind}", eta=0.3, nucleus_p=1)
    diffusion.config = SimpleNamespace(noise=SimpleNamespace(type="loglinear"), sampling=sampling)
    diffusion.noise, diffusion.mask_index = lambda t: (t, t), MASK
    diffusion.neg_infinity, diffusion.time_conditioning = -1e6, True
    diffusion.forward = lambda x, sigma: diffusion._subs_parameterization(model(x).logits, x)
    steps, x = 8, torch.full((B, 24), MASK)
    conf, again, alone = torch.full((B, 24), -torch.inf).double(), 0, 0
    for i in range(steps):
        t, s = (torch.full((B,), 1 - j / steps).double() for j in (i, i + 1))
        known = dict(mask_token_id=MASK, sampling=settings(x), own=-conf.clone())
        logits = model.logits(x)
        _, want, conf = diffusion._ddpm_caching_update(x, t.unsqueeze(1), 1 / steps, conf=conf)
        rules = Remasking.remdm(1 - t, 1 - s, 0.3 if kind != "conf" else 1.0, kind=kind)
        sigma = rules.sigma if kind != "conf" else 0.0
        q = (1 - s - (1 - sigma) * (1 - t)) / t
        strategy = Strategy.of(B, confidence="random")
        out = unmask_logits(logits, x, settings(x), mask_token_id=MASK, threshold=1 - q, strategy=strategy)
        back = remask(x, rules, **known)
        ours, none = torch.where(x == MASK, out.block, back.block), ((x == MASK) & (want != MASK)).sum(1) == 0
        assert torch.equal(ours[~none], want[~none]) and bool((out.committed[none].sum(1) <= 1).all())
        again, alone, x = again + int(back.changed.sum()), alone + int((~none).sum()), want
    assert again and alone > 2 * B
