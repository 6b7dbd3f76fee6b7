"""Whole decoding loops of published programs beside loops on `unmask_logits`, token for token; tests/published.py says
where their files are from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published import MASK, PROMPT, B, Dice, Model, each, masked, settings, step, theirs

from tt_kernels import Strategy, unmask_logits

SEEDS = pytest.mark.parametrize("seed", range(4))


@SEEDS
@pytest.mark.parametrize("temperature", (0.0, 0.8))
@pytest.mark.parametrize("confidence", ("low_confidence", "random"))
def test_llada(seed: int, temperature: float, confidence: str) -> None:
    """Two blocks of 12 in 5 steps each: 3, 3, 2, 2, 2."""
    model = Model(seed)
    names = ("generate", "add_gumbel_noise", "get_num_transfer_tokens")
    llada = theirs("ML-GSAI/LLaDA", "generate.py", *names, torch=Dice(model))
    how = dict(temperature=temperature, remasking=confidence, mask_id=MASK)
    want = llada.generate(model, model.prompt, steps=10, gen_length=24, block_length=12, **how)
    x, strategy = (
        masked(model.prompt, 24),
        Strategy.of(B, confidence=confidence.replace("low_confidence", "probability")),
    )
    for a in (PROMPT, PROMPT + 12):
        for left in range(5, 0, -1):
            x = step(model, x, a, a + 12, dict(temperature=temperature), strategy=strategy, steps_left=each(left))
    assert torch.equal(x, want)


@SEEDS
@pytest.mark.parametrize("temperature", (0.0, 0.8))
@pytest.mark.parametrize("threshold", (None, 0.3, 0.7, 0.95))
def test_fast_dllm(seed: int, temperature: float, threshold: float | None) -> None:
    """Its loop takes one sequence, ours all three together."""
    names, wants = ("generate", "add_gumbel_noise", "get_num_transfer_tokens", "get_transfer_index"), []
    for b in range(B):
        model = Model(seed, b)
        fast = theirs("NVlabs/Fast-dLLM", "llada/generate.py", *names, torch=Dice(model))
        how = dict(temperature=temperature, mask_id=MASK, threshold=threshold)
        wants.append(fast.generate(model, model.prompt[b : b + 1], steps=10, gen_length=24, block_length=12, **how)[0])
    x = masked(model.prompt, 24)
    for a in (PROMPT, PROMPT + 12):
        for left in range(12 if threshold else 5, 0, -1):
            rule = dict(steps_left=each(left)) if threshold is None else dict(threshold=each(threshold))
            x = step(model, x, a, a + 12, dict(temperature=temperature), **rule)
    assert torch.equal(x, torch.cat(wants))


@SEEDS
@pytest.mark.parametrize("factor", (0.3, 1.0, 2.0))
def test_fast_dllms_factor(seed: int, factor: float) -> None:
    """One difference, the program's: where all but the last pass, it takes the last as well."""
    path, names = "python/dinfer/decoding/parallel_strategy.py", ("get_transfer_index_dynamic",)
    noiseless = dict(add_gumbel_noise=lambda logits, temperature: logits)
    dynamic = theirs("inclusionAI/dInfer", path, *names, **noiseless).get_transfer_index_dynamic
    model, seen = Model(seed), set()
    for m in range(1, 13):
        x = masked(model.prompt, m)
        logits, strategy = model.logits(x), Strategy.of(B, factor=factor)
        token, want = dynamic(logits, 0.0, "low_confidence", x == MASK, x, None, factor)
        got = unmask_logits(logits, x, settings(x), mask_token_id=MASK, strategy=strategy)
        short = got.masked == 1 if m > 1 else got.masked < 0
        seen |= set(short.tolist())
        assert torch.equal(want, torch.where(short.unsqueeze(1), x == MASK, got.committed))
        assert torch.equal(got.block[got.committed], token[got.committed])
    assert seen == {True, False}


@SEEDS
@pytest.mark.parametrize(
    ("alg", "drawn", "alg_temp"),
    [
        *((alg, {}, None) for alg in ("maskgit_plus", "topk_margin", "entropy", "origin")),
        ("maskgit_plus", dict(temperature=1.4, top_p=0.8), None),
        ("topk_margin", dict(temperature=0.7), 0.4),
        ("entropy", dict(temperature=0.9, top_k=4), None),
        ("entropy", dict(temperature=0.9), 0.2),
    ],
)
def test_dream(seed: int, alg: str, drawn: dict[str, Any], alg_temp: float | None) -> None:
    """Its seven passes over the whole sequence, whose logits are one place late."""
    model = Model(seed)
    dice, names = Dice(model), ("sample_tokens", "top_p_logits", "top_k_logits", "DreamGenerationMixin._sample")
    path = "dllm/pipelines/dream/models/generation_utils.py"
    dream = theirs("ZHZisZZ/dllm", path, *names, torch=dice, dists=dice).DreamGenerationMixin
    model.__class__ = type("Dreaming", (Model, dream), {})
    steps, T, x = 7, PROMPT + 16, masked(model.prompt, 16)
    config = SimpleNamespace(output_history=False, return_dict=False, max_length=T, mask_token_id=MASK, steps=steps)
    config.__dict__.update(
        eps=1e-3, alg=alg, alg_temp=alg_temp, **dict(temperature=0.0, top_p=None, top_k=None) | drawn
    )
    hooks = (lambda step, x, logits: x, lambda step, x, logits: logits)
    want = model._sample(model.prompt, None, config, *hooks)
    times, kind = (
        torch.linspace(1, 1e-3, steps + 1),
        dict(maskgit_plus="probability", topk_margin="margin", origin="random"),
    )
    for i in range(steps):
        stays, last = times[i + 1] / times[i], i == steps - 1
        numbers, rule = (x == MASK).sum() / B, dict(confidence=kind.get(alg, alg), tempered=True, alg_temp=alg_temp)
        if alg != "origin":
            rule["number"] = int(numbers) if last else int(numbers * (1 - stays))
        threshold = each(0.0 if last else stays) if alg == "origin" else None
        x = step(model, x, 0, T, drawn, strategy=Strategy.of(B, **rule), threshold=threshold, shift=True)
    assert torch.equal(x, want)


@SEEDS
@pytest.mark.parametrize("rule", ("low_confidence_static", "low_confidence_dynamic", "sequential"))
@pytest.mark.parametrize("drawn", (dict(temperature=0.7, top_k=6), dict(temperature=1.3, top_p=0.99)))
def test_sdar(seed: int, rule: str, drawn: dict[str, Any]) -> None:
    """One sequence at a time, whose blocks see themselves alone; probabilities are of what is drawn from. Its dynamic
    rule takes at least a step's share of the whole block, ours of what is left: equal where that is one position."""
    names = ("block_diffusion_generate", "sample_with_temperature_topk_topp", "get_num_transfer_tokens")
    names, wants = (*names, "top_k_logits", "top_p_logits"), []
    steps = 8 if rule.endswith("dynamic") else 3
    how = dict(remasking_strategy=rule, confidence_threshold=0.4, gen_length=16, block_length=8, denoising_steps=steps)
    for b in range(B):
        model = Model(seed, b)
        sdar = theirs("JetAstra/SDAR", "generate.py", *names, torch=Dice(model), DynamicCache=list)
        prompt = dict(input_ids=model.prompt[b : b + 1])
        wants.append(sdar.block_diffusion_generate(model, prompt, MASK, **how, **drawn))
    x, confidence = masked(model.prompt, 16), rule if rule == "sequential" else "probability"
    strategy, threshold = Strategy.of(B, confidence=confidence, tempered=True), each(0.4) if steps == 8 else None
    for a in (PROMPT, PROMPT + 8):
        for left in range(steps, 0, -1):
            rules = dict(strategy=strategy, steps_left=each(left), threshold=threshold)
            x = step(Model(seed), x, a, a + 8, drawn, alone=True, **rules)
    assert torch.equal(x, torch.cat(wants))


@SEEDS
def test_lmdeploy(seed: int) -> None:
    """One pass of each: static and sequential take block // steps positions, dynamic has no share of a step."""
    path, names = "lmdeploy/pytorch/strategies/dllm/unmasking.py", ("low_confidence_static", "low_confidence_dynamic")
    names = tuple(f"UnmaskingProcessor.{name}" for name in (*names, "sequential", "_get_scores", "_get_denoise_num"))
    rules = theirs("InternLM/lmdeploy", path, *names, DLLM_MASKED=0, DLLM_UNMASKED=1).UnmaskingProcessor()
    rules.dllm_config = SimpleNamespace(block_length=12, denoising_steps=5, confidence_threshold=0.4)
    model = Model(seed)
    for given in (0, 1, 7, 11):
        x = masked(model.prompt[:, :1].expand(B, given), 12 - given)
        logits, known = model.logits(x), (x != MASK).flatten().int()
        scored = (logits.flatten(0, 1), logits.argmax(-1).flatten(), known)
        wants = rules.low_confidence_static(*scored), rules.sequential(known), rules.low_confidence_dynamic(*scored)
        ours = dict(number=2), dict(number=2, confidence="sequential"), {}
        for want, rule in zip(wants, ours, strict=True):
            threshold = None if rule else each(0.4)
            strategy = Strategy.of(B, **rule)
            got = unmask_logits(logits, x, settings(x), mask_token_id=MASK, strategy=strategy, threshold=threshold)
            assert torch.equal(got.block != MASK, want.view(B, 12) == 1)


@SEEDS
@pytest.mark.parametrize("bound", (0.1, 1.0, 5.0))
def test_transformers_entropy_bound(seed: int, bound: float) -> None:
    """Its canvas has no masks, so all of ours are."""
    theirs = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    sampler = theirs.EntropyBoundSampler(theirs.EntropyBoundSamplerConfig(bound), 16, MASK, 8)
    x = torch.full((B, 16), MASK)
    logits, strategy = Model(seed).logits(x), Strategy.of(B, confidence="entropy", entropy_bound=bound)
    want = sampler.accept_canvas(x, logits.argmax(-1), logits, 0)
    got = unmask_logits(logits, x, settings(x), mask_token_id=MASK, strategy=strategy)
    assert torch.equal(got.committed, sampler.accepted_token_mask) and torch.equal(got.block, want)
