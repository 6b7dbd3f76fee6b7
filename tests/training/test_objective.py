"""The training losses beyond the published recipe: what each option changes, and that none of them is on."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import CONFIG, prompts_of, random_model
from test_train import fresh, text

from tt_model import TwoTower
from tt_model.training import loop
from tt_model.training.data import Rows, load_rows, train_tokenizer
from tt_model.training.loop import _loss, held_out_loss, train, trainable
from tt_model.training.objective import (
    Noisy,
    ar_loss,
    denoiser_loss,
    distil_loss,
    encode_and_learn,
    mask_blocks,
    near_masks,
    own_predictions,
)
from tt_model.training.schedule import TrainSettings
from tt_model.training.state import read_state

MASK, S = CONFIG.mask_token_id, 8
PUBLISHED = TrainSettings("denoiser", batch_size=2)


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


def clean(rows: int = 2, blocks: int = 6) -> torch.Tensor:
    return torch.tensor(prompts_of([rows * blocks * S])).view(rows, -1)


def noise(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_published_recipe_is_the_default(model: TwoTower) -> None:
    """Whoever adds an option leaves the loss of a run without it as it was."""
    batch = text().batch(0, 2, seed=0)
    ids, cu = batch.ids, batch.cu_seqlens
    noisy = mask_blocks(ids, S, MASK, torch.Generator().manual_seed(3))
    assert _loss(model, batch, PUBLISHED, step=3) == denoiser_loss(model, ids, noisy, cu)
    assert _loss(model, batch, TrainSettings("ar", batch_size=2), step=3) == ar_loss(model, ids, cu)


def test_full_blocks_are_masked_as_a_whole() -> None:
    ids = torch.full((4, 800), 9)
    plain, some, all_of_them = (mask_blocks(ids, S, MASK, noise(), full=share) for share in (0.0, 0.5, 1.0))
    assert 0 < (plain.t == 1).float().mean() < 0.05 or not (plain.t == 1).any()
    assert 0.4 < (some.t == 1).float().mean() < 0.6
    whole = some.t == 1
    assert some.masked.view(4, -1, S)[whole].all() and not some.masked.view(4, -1, S)[~whole].all()
    assert all_of_them.masked.all() and (all_of_them.ids == MASK).all()


def test_tail_blocks_are_masked_to_their_end() -> None:
    ids = torch.full((4, 800), 9)
    some, all_of_them = (mask_blocks(ids, S, MASK, noise(), full=0.3, tail=share) for share in (0.5, 1.0))
    for noisy in (some, all_of_them):
        blocks = noisy.masked.view(4, -1, S)
        tail = (noisy.t == blocks.float().mean(-1)) & (blocks.int().diff(dim=-1) >= 0).all(-1)
        assert torch.equal(noisy.ids == MASK, noisy.masked)
        assert tail.all() if noisy is all_of_them else 0.5 < tail.float().mean() < 0.9
    counts = all_of_them.masked.view(-1, S).sum(-1).bincount(minlength=S + 1)
    assert counts[0] == 0 and counts[1:].min() > 0, "the last token is masked always, the first sometimes"


def test_near_masks_are_learned_more_often_than_those_behind() -> None:
    masked = mask_blocks(torch.full((8, 1600), 9), S, MASK, noise(), tail=0.5).masked
    near = near_masks(masked, S, 2.0, noise())
    assert not (near & ~masked).any()
    before = (masked.view(-1, S).cumsum(-1) - 1).view_as(masked)
    for n in range(4):
        assert near[masked & (before == n)].float().mean().item() == pytest.approx(2 ** (-n / 2), abs=0.08)
    counted = torch.arange(1600) % 3 > 0
    assert torch.equal(near_masks(masked, S, 2.0, noise(), counted.expand(8, -1)), near & counted)


def test_blocks_are_split_in_turn(model: TwoTower) -> None:
    batch, s = text().batch(0, 2, seed=0), dataclasses.replace(PUBLISHED, split_blocks=4)
    for step, parts in enumerate((1, 2, 4, 1)):
        with mock.patch.object(loop, "mask_blocks", wraps=mask_blocks) as masked:
            assert _loss(model, batch, s, step).isfinite()
        assert masked.call_args.args[1] == S // parts
    noisy = mask_blocks(batch.ids, S // 2, MASK, torch.Generator().manual_seed(s.seed * 1_000_003 + 1))
    context = model.encode_clean(batch.ids, S // 2, batch.cu_seqlens)
    want = denoiser_loss(model, batch.ids, noisy, batch.cu_seqlens, context=context)
    assert torch.equal(_loss(model, batch, s, 1), want)
    assert held_out_loss(model, text(4), s) == held_out_loss(model, text(4), PUBLISHED)


def test_blocks_that_cannot_be_split(tmp_path: Path) -> None:
    s = TrainSettings("denoiser", steps=1, batch_size=2, split_blocks=2 * S)
    with pytest.raises(ValueError, match=f"split_blocks is {2 * S}, expected a divisor of the block size, {S}"):
        train(fresh("denoiser"), text(), s, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_only_near_masks_reach_the_loss(model: TwoTower) -> None:
    batch = text().batch(0, 2, seed=0)
    got = _loss(model, batch, dataclasses.replace(PUBLISHED, near=1e-3), step=2)  # the first mask of each block alone
    noisy = mask_blocks(batch.ids, S, MASK, torch.Generator().manual_seed(2))
    first = noisy.masked & (noisy.masked.view(-1, S).cumsum(-1) == 1).view_as(noisy.masked)
    want = denoiser_loss(model, batch.ids, noisy._replace(masked=first), batch.cu_seqlens)
    torch.testing.assert_close(got, want)


def test_draws_are_averaged_over_one_reading(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, read = text().batch(0, 2, seed=0), []
    encode = TwoTower.encode_clean
    monkeypatch.setattr(TwoTower, "encode_clean", lambda *a, **k: (read.append(1), encode(*a, **k))[1])
    got = _loss(model, batch, dataclasses.replace(PUBLISHED, draws=3), step=2)
    assert len(read) == 1
    generator = torch.Generator().manual_seed(2)
    each = [
        denoiser_loss(model, batch.ids, mask_blocks(batch.ids, S, MASK, generator), batch.cu_seqlens) for _ in range(3)
    ]
    torch.testing.assert_close(got, torch.stack(each).mean())
    assert len({float(loss) for loss in each}) == 3


def test_first_lines_are_read_and_not_learned(model: TwoTower) -> None:
    """From the token on that ends the line; in a row that begins inside a document, as the document has it."""
    ids = [1, 9, 9, 7, 9, 7, 9, 2, 1, 9, 9, 9, 7, 9, 9, 2]
    rows = Rows(torch.tensor(ids), torch.tensor([0, 8, 16]), 4, newlines=[7])
    batch = rows.batch(0, 4, seed=0)
    order = [int(i) for row in batch.ids for i in [row[0]]]
    assert sorted(order) == [1, 1, 7, 9] or len(order) == 4
    counted = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool).view(4, 4)
    assert torch.equal(rows._counted, counted)
    ids2, some = clean(1), torch.zeros(1, 48, dtype=torch.bool)
    some[0, 20:] = True
    logits = model.context_logits(ids2)[0].log_softmax(-1)
    want = -logits[19:47].gather(-1, ids2[0, 20:].unsqueeze(-1)).mean()
    torch.testing.assert_close(ar_loss(model, ids2, None, some), want)
    noisy = mask_blocks(ids2, S, MASK, noise())
    kept = noisy._replace(masked=noisy.masked & some)
    torch.testing.assert_close(denoiser_loss(model, ids2, noisy, None, some), denoiser_loss(model, ids2, kept))


def test_lines_end_where_the_tokenizer_says(tmp_path: Path) -> None:
    texts = [f"# enum Color{i}: red, blue\nclass Color{i}:\n    red = 1\n" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": {t!r}}}\n'.replace("'", '"') for t in texts))
    tokenizer = train_tokenizer(texts, 300)
    rows = load_rows(tmp_path, tokenizer, row_length=16, block_size=8, held_out=0.0)
    batch = rows.batch(0, len(rows), seed=0)
    text_of = lambda kept: tokenizer.decode(batch.ids[kept].tolist())
    assert "enum" not in text_of(batch.counted) and "red = 1" in text_of(batch.counted)
    assert "class" not in text_of(~batch.counted) and "# enum Color" in text_of(~batch.counted)


def test_own_predictions_are_the_surest_and_leave_something_masked(model: TwoTower) -> None:
    ids = clean(4, 20)
    context = model.encode_clean(ids, S)
    noisy = mask_blocks(ids, S, MASK, noise())
    same = own_predictions(model, context, noisy, 0.0, noise(2))
    assert all(torch.equal(a, b) for a, b in zip(same, noisy, strict=True))
    own = own_predictions(model, context, noisy, 1.0, noise(2))
    filled = noisy.masked & ~own.masked
    assert filled.any() and not (own.masked & ~noisy.masked).any()
    assert torch.equal(own.ids == MASK, own.masked) and torch.equal(own.ids[~noisy.masked], ids[~noisy.masked])
    blocks = noisy.masked.view(-1, S).any(-1)
    assert own.masked.view(-1, S).any(-1)[blocks].all(), "a block has nothing left to be learned"
    logits = model.denoise_all(context, noisy.ids, noisy.t)
    logits[..., MASK] = -torch.inf
    assert torch.equal(own.ids[filled], logits.argmax(-1)[filled])
    # of the block's masked positions, those that are filled are surer than those that are not
    masked, filled = noisy.masked.view(-1, S), filled.view(-1, S)
    sure = logits.softmax(-1).amax(-1).view(-1, S)
    least, most = sure.masked_fill(~filled, 2).amin(-1), sure.masked_fill(filled | ~masked, -1).amax(-1)
    assert (least >= most).all()
    changed = filled.any(-1)
    torch.testing.assert_close(own.t.flatten()[changed], own.masked.view(-1, S)[changed].float().mean(-1))
    assert torch.equal(own.t.flatten()[~changed], noisy.t.flatten()[~changed])


def test_distillation_by_hand(model: TwoTower) -> None:
    """From what the context tower says of a position to what the denoiser does, over masked tokens with one before."""
    ids, bounds = clean(2, 3), torch.tensor([0, 16, 24, 48], dtype=torch.int32)
    context, noisy = model.encode_clean(ids, S, bounds), mask_blocks(ids, S, MASK, noise(), full=0.5)
    hidden = model.denoise_all(context, noisy.ids, noisy.t, output="hidden").flatten(0, 1)
    got = distil_loss(model, context, hidden, noisy.masked.flatten())
    parts = [ids.flatten()[a:b] for a, b in pairwise(bounds)]
    wanted = torch.cat([model.context_logits(part.unsqueeze(0))[0].roll(1, 0) for part in parts])
    wanted[:, MASK] = -torch.inf
    places = noisy.masked.flatten().clone()
    assert places[bounds[:-1].long()].any()
    places[bounds[:-1].long()] = False
    found = model.lm_head(hidden).log_softmax(-1)
    apart = F.kl_div(found[places], wanted[places].softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(got.double(), apart, rtol=1e-5, atol=1e-6)  # in fp32, the model in fp64
    whole = denoiser_loss(model, ids, noisy, bounds, distil=0.25)
    plain = denoiser_loss(model, ids, noisy, bounds)
    torch.testing.assert_close(whole, 0.75 * plain + 0.25 * got.to(plain), rtol=1e-5, atol=1e-6)


def test_a_context_tower_that_learns_is_reached_by_both_losses() -> None:
    """Of what the denoiser's loss gives it, the gradient is held to a difference quotient."""
    model = random_model()
    batch = text().batch(0, 2, seed=0)
    s = dataclasses.replace(PUBLISHED, context_tower="trained")
    noisy = mask_blocks(batch.ids, S, MASK, torch.Generator().manual_seed(3))
    plain = denoiser_loss(model, batch.ids, noisy, batch.cu_seqlens)
    torch.testing.assert_close(_loss(model, batch, s, 3), plain + ar_loss(model, batch.ids, batch.cu_seqlens))
    held = held_out_loss(model, text(4), s)
    assert held == held_out_loss(model, text(4), PUBLISHED), "it is the published one"

    learned = [p for n, p in trainable(model, "denoiser", "trained").items() if n.startswith("context_tower.")]
    for p in learned:
        p.requires_grad_(True)
    loss = lambda context: denoiser_loss(model, batch.ids, noisy, batch.cu_seqlens, context=context)
    context = encode_and_learn(model, batch.ids, S, batch.cu_seqlens)
    gradients = torch.autograd.grad(loss(context), learned, allow_unused=True)
    along = [torch.zeros_like(p) if g is None else g for p, g in zip(learned, gradients, strict=True)]
    slope, losses = sum(float(g.square().sum()) for g in along), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, g in zip(learned, along, strict=True):
                p.add_(g, alpha=step)
            losses.append(float(loss(model.encode_clean(batch.ids, S, batch.cu_seqlens))))
            for p, g in zip(learned, along, strict=True):
                p.sub_(g, alpha=step)
    assert slope > 0 and (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("context_tower", ["frozen", "trained", "tied"])
def test_what_learns(context_tower: str, tmp_path: Path) -> None:
    model = fresh("denoiser")
    before = {name: p.clone() for name, p in model.named_parameters()}
    s = TrainSettings("denoiser", steps=3, batch_size=2, learning_rate=1e-2, warmup=0, context_tower=context_tower)
    train(model, text(), s, tmp_path, progress=False)
    kept = {name for name, p in model.named_parameters(remove_duplicate=False) if torch.equal(p, before[name])}
    stays = lambda name: ".mixer.gate." in name or (context_tower == "frozen" and name.startswith("context_"))
    assert kept == {name for name in before if stays(name)}
    assert (model.denoiser_tower is model.context_tower) == (context_tower == "tied")


def test_without_time_nothing_depends_on_it(tmp_path: Path) -> None:
    model = fresh("denoiser")
    s = TrainSettings("denoiser", steps=3, batch_size=2, learning_rate=1e-2, warmup=0, no_time=True)
    train(model, text(), s, tmp_path / "a", progress=False)
    assert any(table.grad is None and not torch.equal(table[2], torch.ones(24)) for table in model.scale_shift_tables)
    ids = torch.full((1, S), MASK)
    context = model.encode_clean(ids, S)
    early, late = (model.denoise_all(context, ids, torch.tensor([[t]])) for t in (1.0, 0.1))
    assert torch.equal(early, late)
    timed = fresh("denoiser")
    train(timed, text(), dataclasses.replace(s, no_time=False), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="no_time: the model's time modules have learned already"):
        train(timed, text(), s, tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match='context_tower is "tied", but the towers differ'):
        train(
            timed, text(), dataclasses.replace(s, no_time=False, context_tower="tied"), tmp_path / "d", progress=False
        )


@pytest.mark.parametrize(
    "more",
    [
        dict(average=0.9, skip_first_lines=True),
        dict(
            average=0.9, draws=2, full_blocks=0.2, tail_blocks=0.3, own_blocks=0.5, near=2.0, distil=0.2, split_blocks=4
        ),
        dict(average=0.9, context_tower="tied", no_time=True),
        dict(context_tower="trained", distil=0.2, skip_first_lines=True),
    ],
    ids=str,
)
def test_options_resume_to_the_same_losses(more: dict, tmp_path: Path) -> None:
    s = TrainSettings("denoiser", steps=6, batch_size=2, learning_rate=3e-3, warmup=2, **more)
    ended = fresh("denoiser")
    straight = train(ended, text(), s, tmp_path / "a", held_out=text(4), save_every=2, progress=False)
    train(fresh("denoiser"), text(), s, tmp_path / "b", held_out=text(4), save_every=2, stop_after=3, progress=False)
    again = fresh("denoiser")
    stopped = train(again, text(), s, tmp_path / "b", held_out=text(4), save_every=2, progress=False)
    assert [h["loss"] for h in stopped] == [h["loss"] for h in straight]
    assert stopped[-1]["held_out"] == straight[-1]["held_out"]
    assert all(torch.equal(a, b) for a, b in zip(ended.parameters(), again.parameters(), strict=True))


def test_what_is_averaged_is_what_is_kept(tmp_path: Path) -> None:
    s = TrainSettings("ar", steps=5, batch_size=2, learning_rate=3e-3, warmup=1)
    plain, averaged = fresh("ar"), fresh("ar")
    train(plain, text(), s, tmp_path / "plain", progress=False)
    train(averaged, text(), dataclasses.replace(s, average=0.9), tmp_path / "average", progress=False)
    state = read_state(tmp_path / "average")
    name = "context_lm_head.weight"
    assert torch.equal(state["weights"][name], plain.context_lm_head.weight), "training goes on from the last weights"
    assert torch.equal(state["averages"][name], averaged.context_lm_head.weight)
    assert not torch.equal(plain.context_lm_head.weight, averaged.context_lm_head.weight)
    train(
        averaged, text(), dataclasses.replace(s, average=0.9), tmp_path / "average", progress=False
    )  # nothing is left
    assert torch.equal(state["averages"][name], averaged.context_lm_head.weight)


def test_a_run_from_before_a_setting_was_there_goes_on(tmp_path: Path) -> None:
    s = TrainSettings("ar", steps=4, batch_size=2)
    train(fresh("ar"), text(), s, tmp_path, stop_after=2, progress=False)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    for name in ("draws", "average", "distil", "tail_blocks", "near", "split_blocks"):
        del state["settings"][name]
    del state["averages"]
    torch.save(state, tmp_path / "training.pt")
    assert len(train(fresh("ar"), text(), s, tmp_path, progress=False)) == 4


@pytest.mark.parametrize(
    "bad",
    [
        *(
            dict(draws=0),
            dict(draws=1.5),
            dict(split_blocks=6),
            dict(split_blocks=0),
            dict(full_blocks=1.1),
            dict(tail_blocks=2),
            dict(own_blocks=-0.1),
            dict(near=-1),
            dict(distil=True),
        ),
        *(dict(average=1.0), dict(average="0.9"), dict(skip_first_lines=1)),
        *(dict(context_tower="thawed"), dict(no_time=0)),
    ],
    ids=str,
)
def test_bad_options_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainSettings("denoiser", **bad)


def test_noisy_is_a_triple() -> None:
    assert Noisy._fields == ("ids", "masked", "t")
