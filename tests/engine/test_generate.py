"""Generation: passes that a row's end makes needless, any temperature, what seeds and on_step may be."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import CONFIG, prompts_of, random_model

from tt_kernels import use
from tt_kernels.reference.unmasking import CONFIDENCES
from tt_model import Engine, Step, TwoTower
from tt_model.cli import generate as command
from tt_model.engine import settings
from tt_model.engine.settings import Generation

MASK = CONFIG.mask_token_id


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


def traced(model: TwoTower, prompt: list[int], **options) -> tuple[Generation, list[list[int]]]:
    """A row by itself: what generate returns, and its block after every pass."""
    blocks: list[list[int]] = []
    out = model.generate([prompt], on_step=lambda s: blocks.append(s.tokens[0].tolist()), **options)
    return out, blocks


def needed(blocks: list[list[int]], end: int) -> int:
    """Passes until `end` is committed with all before it and nothing, or more than one position, is left behind it."""
    for passes, block in enumerate(blocks, 1):
        masked = block.count(MASK)
        settled = end in block and MASK not in block[: block.index(end)]
        if masked == 0 or (settled and masked > 1):
            return passes
    raise AssertionError("the block was never finished")


# ---- an end of sequence ----


@pytest.mark.kernels
def test_an_end_at_the_first_position_ends_the_row_at_once(model: TwoTower) -> None:
    masks = torch.full((1, 8), MASK)
    for length in range(2, 60):
        prompt = prompts_of([length])[0]
        with use("reference"):
            logits = model.denoise(masks, torch.ones(1), model.prefill([prompt]))[0]
        logits[:, MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        if int(confidence.argmax()) == 0:  # committed in the first pass, and no other position with it
            end = int(tokens[0])
            out = model.generate([prompt], eos_token_id=end, confidence_threshold=1.0, steps_per_block=8)
            assert out == Generation([[end]], [1])
            return
    raise AssertionError("no prompt's first token is the surest: nothing was tested")


def test_positions_behind_an_end_are_not_resolved(model: TwoTower) -> None:
    """Whatever token of a block is the end: the kept tokens of a run to the block's end, in no more passes than they
    need, alone and in a batch."""
    options = dict(max_new_tokens=8, steps_per_block=8, confidence_threshold=0.3)
    prompts = prompts_of([3, 5, 9, 17, 30, 33])
    saved = 0
    for prompt in prompts:
        whole, blocks = traced(model, prompt, eos_token_id=None, **options)
        (tokens,) = whole.tokens
        for end in set(tokens):
            want = Generation([tokens[: tokens.index(end) + 1]], [needed(blocks, end)])
            got, passes = traced(model, prompt, eos_token_id=end, **options)
            assert got == want and passes == blocks[: want.nfe[0]]
            saved += whole.nfe[0] - got.nfe[0]
            batch = model.generate(prompts, eos_token_id=end, **options)
            at = prompts.index(prompt)
            assert (batch.tokens[at], batch.nfe[at]) == (want.tokens[0], want.nfe[0])
    assert saved > 20, "no end came early: nothing was tested"


def test_any_of_several_ends(model: TwoTower) -> None:
    options = dict(max_new_tokens=8, steps_per_block=8, confidence_threshold=1.0)
    (prompt,) = prompts_of([9])
    (tokens,) = model.generate([prompt], eos_token_id=None, **options).tokens
    alone = {end: model.generate([prompt], eos_token_id=end, **options) for end in set(tokens)}
    first, *_ = tokens
    both = model.generate([prompt], eos_token_id=[tokens[-1], first], **options)
    assert both.tokens == alone[first].tokens == [[first]] and both.nfe[0] <= alone[first].nfe[0]


# ---- temperature ----


@pytest.mark.parametrize("temperature", [1e20, 1e30, 1e39, 1e300])
@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_temperature_draws_every_token_alike(temperature: float, mode: str, dtype: torch.dtype) -> None:
    model = random_model(seed=1).to(dtype)
    options = dict(mode=mode, max_new_tokens=16, eos_token_id=None, confidence_threshold=0.0)
    rows = model.generate(prompts_of([5] * 20), temperature=temperature, seed=0, **options).tokens
    drawn = [t for row in rows for t in row]
    assert len(drawn) == 20 * 16
    if mode == "mask_diffusion":
        assert MASK not in drawn
    counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
    assert counts.max() < 25, "320 draws of 50 tokens: 6.4 each, and seven deviations"
    assert len(set(drawn)) >= 45
    same = model.generate(prompts_of([5] * 20), temperature=1e30, seed=0, **options).tokens
    assert temperature < 1e30 or rows == same


@pytest.mark.kernels
def test_kernels_draw_as_references_do_at_a_huge_temperature(model: TwoTower) -> None:
    options = dict(max_new_tokens=8, steps_per_block=1, temperature=1e39, seed=5, eos_token_id=None)
    out = model.generate(prompts_of([4]) * 4, **options)
    with use("reference"):
        assert out == model.generate(prompts_of([4]) * 4, **options)
    assert MASK not in {t for row in out.tokens for t in row}


# ---- seeds and NumPy's integers ----


def drawn(model: TwoTower, rows: int, seed: object) -> list[list[int]]:
    options = dict(mode="ar", max_new_tokens=6, temperature=1.0, eos_token_id=None)
    return model.generate(prompts_of([5]) * rows, seed=seed, **options).tokens


def test_seeds_count_modulo_2_to_the_64(model: TwoTower) -> None:
    for seed in (0, 7, 2**63 - 1, 2**64 - 1, -1, -(2**63)):
        rows = drawn(model, 3, seed)
        assert len({tuple(row) for row in rows}) == 3
        for other in (seed + 2**64, seed - 2**64, seed + 5 * 2**64):
            assert drawn(model, 3, other) == rows
        assert drawn(model, 3, [seed, seed + 1, seed + 2]) == rows
    assert drawn(model, 2, [0, 2**63]) == [*drawn(model, 1, 0), *drawn(model, 1, 2**63)]
    assert drawn(model, 2, 2**63) == drawn(model, 2, [-(2**63), -(2**63) + 1])


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint64, np.uint8])
def test_numpy_integers_are_integers(model: TwoTower, kind: type) -> None:
    assert drawn(model, 2, kind(7)) == drawn(model, 2, 7)
    assert drawn(model, 2, [kind(7), kind(3)]) == drawn(model, 2, np.array([7, 3], kind)) == drawn(model, 2, [7, 3])
    assert drawn(model, 2, torch.tensor([7, 3])) == drawn(model, 2, [7, 3])
    plain = dict(max_new_tokens=8, block_size=4, steps_per_block=4, top_k=5, eos_token_id=5)
    want = model.generate([[4, 9, 6]], seed=0, temperature=0.5, top_p=0.5, **plain)
    numpy = {name: kind(value) for name, value in plain.items()}
    for prompts in ([[kind(4), kind(9), kind(6)]], np.array([[4, 9, 6]], kind), [np.array([4, 9, 6], kind)]):
        got = model.generate(prompts, seed=0, temperature=np.float32(0.5), top_p=np.float64(0.5), **numpy)
        assert got == want
    several = model.generate([[4, 9, 6]], eos_token_id=np.array([5, 7], kind), max_new_tokens=8)
    assert several == model.generate([[4, 9, 6]], eos_token_id={5, 7}, max_new_tokens=8)


def test_more_steps_and_candidates_than_there_are_change_nothing(model: TwoTower) -> None:
    options = dict(max_new_tokens=16, temperature=0.8, seed=1, eos_token_id=None)
    want = model.generate([[4, 5]], steps_per_block=8, top_k=None, **options)
    assert model.generate([[4, 5]], steps_per_block=2**70, top_k=2**70, **options) == want


# ---- on_step ----


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_on_step_may_write_into_what_it_is_given(model: TwoTower, mode: str) -> None:
    def scribble(step: Step) -> None:
        for tensor in (step.tokens, step.confidence, step.committed):
            tensor.fill_(1)
        for numbers in (step.rows, step.start):
            numbers[:] = [99] * len(numbers)

    options = dict(mode=mode, max_new_tokens=16, confidence_threshold=0.15, eos_token_id=11)
    prompts = prompts_of([3, 12, 30])
    assert model.generate(prompts, on_step=scribble, **options) == model.generate(prompts, **options)


# ---- the mask token in clean text ----


def test_the_mask_token_in_clean_text_is_a_token_like_any_other(model: TwoTower) -> None:
    """As in the published implementation, whose autoregressive modes write it. generate says so of a prompt."""
    ids = torch.tensor([[4, MASK, 6, MASK, MASK, 9, 4, 5]])
    whole = model.context_logits(ids)
    cache = model.prefill(ids[:, :4])
    logits, _ = model.verify(ids[:, 4:], cache)
    torch.testing.assert_close(logits, whole[:, 4:])
    model.commit(ids[:, 4:], cache)
    torch.testing.assert_close(cache.last_logits, whole[:, -1])
    context = model.encode_clean(ids, 8)
    for layer, (keys, _) in context.kv.items():
        pages = cache.kv(layer)[0][cache.page_table[0].long()].flatten(0, 1)[:8]
        torch.testing.assert_close(pages, keys[0])
    for mode in ("mask_diffusion", "ar", "mock_ar"):
        options = dict(mode=mode, max_new_tokens=8, eos_token_id=None)
        with pytest.warns(UserWarning, match="prompt 1 holds the mask token .3., which is read like any other"):
            together = model.generate([[4, 5], ids[0].tolist()], **options)
        assert together.tokens[0] == model.generate([[4, 5]], **options).tokens[0]
        if mode == "mask_diffusion":
            assert MASK not in together.tokens[1]


# ---- strategies ----


def commits(model: TwoTower, **options: Any) -> list[list[int]]:
    """How many positions of each block each of its passes commits."""
    numbers: list[list[int]] = []

    def on_step(step: Step) -> None:
        if step.step == 0:
            numbers.append([])
        numbers[-1].append(int(step.committed.sum()))

    model.generate(prompts_of([9]), max_new_tokens=16, block_size=8, eos_token_id=None, on_step=on_step, **options)
    return numbers


def test_strategies_commit_as_they_say(model: TwoTower) -> None:
    assert commits(model, strategy="static", steps_per_block=3) == [[3, 3, 2]] * 2
    assert commits(model, strategy="threshold", confidence_threshold=1.0) == [[1] * 8] * 2  # steps_per_block is 16
    assert commits(model, strategy="threshold", confidence_threshold=1.0, steps_per_block=2) == [[1] * 8] * 2
    assert commits(model, strategy="threshold", confidence_threshold=0.0) == [[8]] * 2
    assert commits(model, strategy="factor", factor=1e9) == [[8]] * 2
    assert commits(model, strategy="factor", factor=0.0) == [[1] * 8] * 2
    assert commits(model, strategy="entropy_bound", entropy_bound=1e9) == [[8]] * 2
    assert commits(model, strategy="entropy_bound", entropy_bound=0.0) == [[1] * 8] * 2
    some = commits(model, strategy="entropy_bound", confidence="entropy", entropy_bound=8.0)
    assert all(sum(block) == 8 and 1 < len(block) < 8 for block in some)


def test_a_sequential_strategy_commits_from_the_left(model: TwoTower) -> None:
    taken: list[list[int]] = []
    options = dict(max_new_tokens=8, block_size=8, steps_per_block=4, eos_token_id=None, strategy="static")
    model.generate(
        prompts_of([9]),
        confidence="sequential",
        on_step=lambda step: taken.append(step.committed[0].nonzero().flatten().tolist()),
        **options,
    )
    assert taken == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_default_strategy_is_the_schedule_of_probabilities(model: TwoTower) -> None:
    options = dict(max_new_tokens=16, confidence_threshold=0.15, temperature=0.7, seed=3)
    want = model.generate(prompts_of([5, 9]), **options)
    assert model.generate(prompts_of([5, 9]), strategy="schedule", confidence="probability", **options) == want


def test_tempered_confidences_are_of_what_is_drawn_from(model: TwoTower) -> None:
    """At a low temperature the best token is nearly certain, so that all commit at once."""
    options = dict(strategy="threshold", confidence_threshold=0.9, temperature=1e-4, seed=5)
    assert len(commits(model, **options)[0]) > 1
    assert commits(model, tempered=True, **options) == [[8]] * 2
    cold = options | dict(temperature=0.0)
    assert commits(model, tempered=True, **cold) == commits(model, **cold)
    sure = model.generate(prompts_of([9]), max_new_tokens=8, logprobs=True, tempered=True, **options).logprobs[0]
    assert all(-0.1 < log <= 0 for log in sure)
    narrow = model.generate(prompts_of([9]), max_new_tokens=8, top_k=1, temperature=2.0, logprobs=True, tempered=True)
    assert max(map(abs, narrow.logprobs[0])) < 1e-12  # the one token that may be drawn is certain


def test_tempered_rows_beside_others_get_what_each_gets_alone(model: TwoTower) -> None:
    engine, prompts = Engine(model, max_rows=7), prompts_of([9] * 7)
    common = dict(max_new_tokens=16, confidence_threshold=0.5, temperature=0.6, seed=2)
    rows = [
        dict(tempered=True),
        {},
        dict(tempered=True, top_p=0.7, strategy="factor"),
        dict(tempered=True, temperature=0.0),
        dict(tempered=True, confidence="margin", top_k=3),
        dict(tempered=True, mode="speculative", draft_steps=2),
        dict(tempered=True, alg_temp=0.3, strategy="static", steps_per_block=4),
    ]
    requests = [engine.submit(p, **common | row) for p, row in zip(prompts, rows, strict=True)]
    found = [request.result() for request in requests]
    for prompt, row, result in zip(prompts, rows, found, strict=True):
        own = model.generate([prompt], **common | row)
        assert (result.tokens, result.nfe) == (own.tokens[0], own.nfe[0])
        plain = model.generate([prompt], **common | row | dict(tempered=False, alg_temp=0.0))
        followed = "tempered" in row and row.get("temperature") != 0
        if row.get("mode") != "speculative":  # whose tokens no draft changes
            assert ((own.tokens, own.nfe) != (plain.tokens, plain.nfe)) == followed, row


def test_alg_temp_draws_the_order(model: TwoTower) -> None:
    """So many commit as without it, others, and by the seed alone."""
    options = dict(max_new_tokens=8, block_size=8, steps_per_block=4, eos_token_id=None, strategy="static")

    def taken(seed: int, **more: Any) -> list[list[int]]:
        found: list[list[int]] = []
        on_step = lambda step: found.append(step.committed[0].nonzero().flatten().tolist())
        model.generate(prompts_of([9]), seed=seed, on_step=on_step, **options, **more)
        return found

    plain = taken(0)
    drawn = [taken(seed, alg_temp=0.5) for seed in range(6)]
    assert all([len(places) for places in one] == [2, 2, 2, 2] for one in drawn)
    assert len({str(one) for one in drawn}) > 3 and taken(2, alg_temp=0.5) == drawn[2]
    assert taken(0, alg_temp=1e-12) == plain == taken(5)


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(strategy="greedy"), "strategy is 'greedy', expected one of schedule, threshold"),
        (dict(confidence="entropies"), "confidence is 'entropies', expected one of probability"),
        (dict(factor=-1.0), "factor is -1.0, expected 0 or more"),
        (dict(entropy_bound=float("nan")), "entropy_bound is nan, expected 0 or more"),
        (dict(factor="1"), "factor is '1', expected a number"),
        (dict(tempered=1), "tempered is 1, expected True or False"),
        (dict(alg_temp=-0.5), "alg_temp is -0.5, expected 0 or more"),
    ],
)
def test_bad_strategies_are_named(model: TwoTower, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate([[4]], **bad)


def test_a_model_has_its_own_defaults(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its config says holds where nothing else is asked for."""
    own: dict[str, Any] = dict(confidence_threshold=0.0, confidence="sequential")
    prompts, options = prompts_of([5, 9]), dict(max_new_tokens=16, eos_token_id=None, strategy="threshold")
    plain, asked = model.generate(prompts, **options), model.generate(prompts, **options, **own)
    assert plain.nfe != asked.nfe
    monkeypatch.setattr(model, "config", replace(model.config, **own))
    assert model.generate(prompts, **options) == asked
    usual: dict[str, Any] = dict(confidence_threshold=0.8, confidence="probability")
    assert model.generate(prompts, **options, **usual) == plain
    engine = Engine(model, max_rows=2, max_tokens=64)
    assert [engine.submit(p, **options).result().nfe for p in prompts] == asked.nfe


def test_names_of_confidences_are_those_of_the_op() -> None:
    """The board hands their places on, and the command line names them without loading torch."""
    assert CONFIDENCES == settings.CONFIDENCES == command.CONFIDENCES
    assert (settings.MODES, settings.STRATEGIES) == (command.MODES, command.STRATEGIES)
