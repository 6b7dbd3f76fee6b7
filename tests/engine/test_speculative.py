"""Speculative generation: AR's tokens, whatever the denoiser drafts."""

from unittest import mock

import pytest
import torch
from models import CONFIG, prompts_of, random_model

from tt_model import Engine, Step, TwoTower
from tt_model.engine.board import Board

MASK = CONFIG.mask_token_id
LENGTHS = [1, 2, 15, 16, 17, 40]


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


def pair(model: TwoTower, prompts: list[list[int]], *, draft: dict | None = None, **options):
    """AR's result and the speculative one."""
    return model.generate(prompts, mode="ar", **options), model.generate(
        prompts, mode="speculative", **options, **draft or {}
    )


DRAFTS = [dict(block_size=8), dict(block_size=3, draft_steps=3), dict(block_size=1)]


@pytest.mark.parametrize(
    "draft,temperature,narrow",
    [
        *((draft, temperature, dict()) for draft in DRAFTS for temperature in (0.0, 0.7)),
        (DRAFTS[0], 0.7, dict(top_k=5)),
        (DRAFTS[1], 0.7, dict(top_p=0.7)),
        (DRAFTS[1], 0.0, dict(top_k=5)),
    ],
    ids=str,
)
def test_equals_ar(model: TwoTower, draft: dict, temperature: float, narrow: dict) -> None:
    """Rows of unequal prompts end at different times, by an end token and by length."""
    options = dict(max_new_tokens=20, temperature=temperature, seed=4, **narrow)
    prompts = prompts_of(LENGTHS)
    end = model.generate(prompts, mode="ar", eos_token_id=None, **options).tokens[-1][7]
    ar, fast = pair(model, prompts, draft=draft, eos_token_id=[end], **options)
    assert fast.tokens == ar.tokens
    assert len({len(tokens) for tokens in ar.tokens}) > 1, "no row ended early: less was tested"
    assert all(0 < c <= len(t) for c, t in zip(fast.cycles, fast.tokens, strict=True)) and ar.cycles == []
    per_cycle = 0 if draft["block_size"] == 1 else draft.get("draft_steps", 1)
    assert all(n <= c * per_cycle for n, c in zip(fast.nfe, fast.cycles, strict=True))


def test_the_mask_token_is_written_where_ar_writes_it(model: TwoTower) -> None:
    ar, fast = pair(model, prompts_of(LENGTHS), max_new_tokens=24, eos_token_id=None)
    assert fast.tokens == ar.tokens and any(MASK in tokens for tokens in ar.tokens)


def test_a_row_gets_what_it_gets_alone(model: TwoTower) -> None:
    prompts = prompts_of(LENGTHS)
    options = dict(mode="speculative", max_new_tokens=12, temperature=0.5, eos_token_id=None)
    together = model.generate(prompts, seed=list(range(len(prompts))), **options)
    for b, prompt in enumerate(prompts):
        alone = model.generate([prompt], seed=[b], **options)
        assert (alone.tokens[0], alone.nfe[0], alone.cycles[0]) == (
            together.tokens[b],
            together.nfe[b],
            together.cycles[b],
        )


@pytest.mark.parametrize("draft_steps", [1, 2, 3])
def test_drafts_are_whole(model: TwoTower, draft_steps: int) -> None:
    """A draft's last pass takes whatever is left, however sure it is: no context pass reads a masked position."""
    read: list[torch.Tensor] = []

    def note(tower: torch.nn.Module, args: tuple) -> None:
        if args[1].kind == "verify":
            read.append(args[0].clone())

    options = dict(mode="speculative", draft_steps=draft_steps, max_new_tokens=24, eos_token_id=None)
    hook = model.context_tower.register_forward_pre_hook(note)
    try:
        sure = [model.generate(prompts_of([5, 9]), confidence_threshold=c, **options) for c in (0.0, 1.0)]
    finally:
        hook.remove()
    masked = sum(int((block == MASK).sum()) for block in read)
    written = sum(tokens.count(MASK) for out in sure for tokens in out.tokens)  # AR may write it
    assert read and masked <= written
    if draft_steps == 1:
        assert sure[0].cycles == sure[1].cycles


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_bundled_model_on_fifty_prompts(temperature: float) -> None:
    """Equal to AR, in clearly fewer cycles than tokens: the denoiser was trained for this."""
    bundled = TwoTower.from_pretrained()
    V, generator = bundled.config.vocab_size, torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, V, (4 + b % 9,), generator=generator).tolist() for b in range(50)]
    options = dict(max_new_tokens=18, temperature=temperature, seed=9, eos_token_id=None)
    ar, fast = pair(bundled, prompts, draft=dict(block_size=6), **options)
    assert fast.tokens == ar.tokens
    assert sum(map(len, fast.tokens)) > 1.3 * sum(fast.cycles)


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(block_size=9, draft_steps=3)], ids=str)
def test_the_bundled_model_on_what_it_was_trained_for(options: dict) -> None:
    bundled = TwoTower.from_pretrained()
    lines = [f"# enum {name}: red, green, dark_blue\n" for name in ("Colour", "ParentVebhul")]
    lines += ["# class Invoice: number int, customer str?\n", "# table orders: id int, total float\n"]
    prompts = [bundled.tokenizer.encode(line) for line in lines]
    ar, fast = pair(bundled, prompts, draft=options, max_new_tokens=60, seed=2)
    assert fast.tokens == ar.tokens and sum(map(len, fast.tokens)) > 2 * sum(fast.cycles)


@pytest.mark.parametrize("mode", ["speculative", "mask_diffusion"])
def test_a_draft_is_drawn_with_the_noise_of_ar(model: TwoTower, mode: str) -> None:
    """Which is that of step 0 at each position, whatever pass of the draft takes it: alike logits give alike tokens."""
    seen = set[int]()
    whole = Board.sampling

    def note(board: Board, rows: torch.Tensor, position: torch.Tensor, step: torch.Tensor, **more: bool):
        seen.update(step.flatten().tolist())
        return whole(board, rows, position, step, **more)

    with mock.patch.object(Board, "sampling", note):
        model.generate([[4, 5]], mode=mode, draft_steps=3, max_new_tokens=16, temperature=0.8, eos_token_id=None)
    assert (seen == {0}) == (mode == "speculative")


def test_steps_tell_what_has_entered(model: TwoTower) -> None:
    steps: list[Step] = []
    prompts = prompts_of([5, 30])
    out = model.generate(
        prompts, mode="speculative", max_new_tokens=20, eos_token_id=None, on_step=steps.append, block_size=8
    )
    written: list[dict[int, int]] = [{}, {}]
    for step in steps:
        for r, row in enumerate(step.rows):
            entered = step.committed[r]
            assert entered[0] and (step.tokens[r][~entered] == MASK).all() and (step.confidence[r][~entered] == 0).all()
            assert (step.confidence[r][entered] > 0).all()
            for i in entered.nonzero().flatten().tolist():
                written[row][step.start[r] - len(prompts[row]) + i] = int(step.tokens[r, i])
    for row, tokens in enumerate(out.tokens):
        assert [written[row][i] for i in range(len(tokens))] == tokens


def test_bad_draft_steps_are_named(model: TwoTower) -> None:
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="draft_steps"):
            model.generate([[4]], mode="speculative", draft_steps=bad)
    for call in (lambda **o: model.generate([[4]], **o), lambda **o: Engine(model).submit([4], **o).result()):
        with pytest.warns(UserWarning, match="block_size 9 is above") as found:
            call(mode="speculative", block_size=9, max_new_tokens=2)
        assert {warning.filename for warning in found} == {__file__}  # where the call is that can be mended
