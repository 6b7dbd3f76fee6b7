"""Head and loss in one: theirs in value and gradient, and logits wherever somebody wants them."""

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny import IDS, LABELS, PADDED, TINY, Wide, error, gradients, tiny
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers.loss import SERVED

BOUND = 1e-11  # fp64 on both sides, as in test_apply.py
ALONE = dict(experts=False, attention=False, mamba=False, norm=False)


def called(model: Any, **options: Any) -> Any:
    with Wide():
        return model(IDS, attention_mask=PADDED, labels=LABELS, use_cache=False, **options)


@pytest.mark.parametrize("model_type", TINY)
def test_gradients_are_theirs(model_type: str) -> None:
    model = tiny(model_type)
    before = gradients(model)
    changes = tt.apply(model, **ALONE)
    if model_type not in SERVED:
        assert "plain logits" in changes.left["loss"] and not changes.replaced
        return
    assert changes.replaced == [f"loss: {type(model).__name__}.lm_head, with labels in training"]
    found = gradients(model)
    assert found.keys() == before.keys()
    for name, slope in before.items():
        assert error(found[name], slope) < BOUND, name
    changes.undo()
    assert all("forward" not in vars(m) for m in model.modules()) and not hasattr(model, "_loss_function")


def test_logits_are_there_where_they_are_wanted() -> None:
    model = tiny("mixtral")
    plain = called(model)
    tt.apply(model, **ALONE)
    for training, options, logits in (
        (False, {}, True),
        (False, dict(skip_logits=True), False),
        (True, {}, False),
        (True, dict(skip_logits=False), True),
    ):
        out = called(model.train(training), **options)
        assert (out.logits is not None) == logits == ("logits" in out)
        assert error(out.loss, plain.loss) < BOUND
        if logits:
            assert error(out.logits, plain.logits) < BOUND
    without = model(IDS, attention_mask=PADDED)
    assert without.loss is None and without.logits.shape == (*IDS.shape, 61)
    loss, logits, *_ = called(model, return_dict=False)
    assert error(loss, plain.loss) < BOUND and error(logits, plain.logits) < BOUND


@pytest.mark.parametrize("items", [3, torch.tensor(11)])
def test_it_is_divided_by_the_items_of_a_larger_batch(items: int | Tensor) -> None:
    model = tiny("nemotron_h").train()
    plain = called(model, num_items_in_batch=items).loss
    tt.apply(model, **ALONE)
    assert error(called(model, num_items_in_batch=items).loss, plain) < BOUND


def test_what_a_model_adds_to_its_loss_stays() -> None:
    model = tiny("qwen3_moe", router_aux_loss_coef=0.5, output_router_logits=True).train()
    plain = called(model)
    tt.apply(model, **ALONE)
    out = called(model)
    assert error(out.loss, plain.loss) < BOUND and error(out.aux_loss, plain.aux_loss) < BOUND and out.aux_loss > 0
    assert out.logits is None


def test_labels_that_are_shifted_already_are_for_theirs() -> None:
    model = tiny("olmoe").train()
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()
    plain = called(model)
    tt.apply(model, **ALONE)
    out = called(model, shift_labels=shifted)
    assert out.logits is not None and error(out.loss, plain.loss) < BOUND


def test_its_forward_is_known_by_its_parameters() -> None:
    """Trainers choose columns by them, and `generate` arguments."""
    model = tiny("mamba2")
    before = inspect.signature(model.forward)
    tt.apply(model, **ALONE)
    assert inspect.signature(model.forward) == before and "labels" in before.parameters


def spoil_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 61).double()


def spoil_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, *args, **given: logits.sum()


def spoil_forward(model: Any) -> None:
    model.forward = lambda *args, **given: None


def spoil_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)


def spoil_z(model: Any) -> None:
    model.z_loss_coefficient = 0.1


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_head, "Linear with a bias"),
        (spoil_loss, "loss_function is another's"),
        (spoil_forward, "forward is another's"),
        (spoil_hook, "a hook listens to its lm_head"),
        (spoil_z, "z_loss_coefficient is 0.1"),
    ],
)
def test_what_is_not_served_is_left(spoil: Any, reason: str) -> None:
    model = tiny("bamba")
    spoil(model)
    changes = tt.apply(model, **ALONE)
    assert reason in changes.left["loss"] and not changes.replaced


def other_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 61, bias=False).double()


def larger_vocabulary(model: Any) -> None:
    model.resize_token_embeddings(70)


class Wrapped(nn.Module):
    """As an adapter's, which adds to what the head gives."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 2


def wrapped_head(model: Any) -> None:
    model.lm_head = Wrapped(model.lm_head)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_hook, other_head, larger_vocabulary, wrapped_head])
def test_what_becomes_another_after_it_is_theirs_again(spoil: Any) -> None:
    model, ours = tiny("mixtral").train(), tiny("mixtral").train()
    tt.apply(ours, **ALONE)
    for each in (model, ours):
        torch.manual_seed(0)
        spoil(each)
    plain, out = called(model), called(ours)
    assert error(out.loss, plain.loss) < BOUND and out.loss.dim() == plain.loss.dim() == 0
    assert error(called(ours, skip_logits=False).logits, plain.logits) < BOUND


@pytest.mark.parametrize("model_type", SERVED)
def test_a_copy_is_served_by_itself(model_type: str) -> None:
    """As an average of the weights, or a model to refer to: its own weights, its own gradients, its own undo."""
    model = tiny(model_type).train()
    tt.apply(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    plain = tiny(model_type).train()
    plain.load_state_dict(other.state_dict())
    want, found = gradients(plain), gradients(other)
    assert all(p.grad is None for p in model.parameters())
    for name, slope in want.items():
        assert error(found[name], slope) < BOUND, name
    tt.revert(model)
    found = gradients(other)
    tt.revert(other)
    for last in (found, gradients(other)):
        assert all(error(last[name], slope) < BOUND for name, slope in want.items())
    assert all("forward" not in vars(m) for each in (model, other) for m in each.modules())
    assert not hasattr(other, "_loss_function")


def test_a_copy_of_the_head_gives_logits_of_its_own() -> None:
    model = tiny("mixtral").train()
    tt.apply(model, **ALONE)
    head = copy.deepcopy(model.lm_head)
    nn.init.zeros_(head.weight)
    assert not head(torch.randn(2, 32).double()).any()


def test_a_failing_pass_leaves_nothing_behind() -> None:
    model = tiny("olmoe").train()
    plain = called(model).loss
    tt.apply(model, **ALONE)
    with pytest.raises(ValueError, match="targets"):
        model(IDS, labels=LABELS.clamp_max(60) + 1)
    assert model.eval()(IDS).logits.shape[-1] == 61 and error(called(model.train()).loss, plain) < BOUND
