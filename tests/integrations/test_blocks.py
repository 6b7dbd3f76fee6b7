"""Router and experts of a block in one: what comes out is theirs, and theirs run where their router is listened to."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import IDS, LABELS, PADDED, Wide, error, gradients, logits, tiny

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers import blocks

BOUND = 1e-11  # fp64, as in test_apply.py
MODELS = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", dict(norm_topk_prob=False)),
    "qwen2_moe, divided by the sum": ("qwen2_moe", dict(norm_topk_prob=True)),
    "qwen3_moe": ("qwen3_moe", dict(norm_topk_prob=True)),
    "qwen3_moe, weights as they are": ("qwen3_moe", dict(norm_topk_prob=False)),
    "olmoe": ("olmoe", {}),
    "olmoe, divided by the sum": ("olmoe", dict(norm_topk_prob=True)),
    "granitemoehybrid": ("granitemoehybrid", {}),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of our router's calls."""
    seen: list[dict[str, Any]] = []
    route = blocks.route

    def listening(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        seen.append(options)
        return route(x, weight, **options)

    monkeypatch.setattr(blocks, "route", listening)
    yield seen


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name: str, calls: list) -> None:
    model_type, options = MODELS[name]
    model = tiny(model_type, **options)
    before, slopes = logits(model), gradients(model)
    assert not calls
    changes = tt.apply(model, attention=False, mamba=False, norm=False, loss=False)
    layers = sum(type(m).__name__ in blocks.BLOCKS for m in model.modules())
    assert error(logits(model), before) < BOUND and len(calls) == layers
    assert {c["norm_topk_prob"] for c in calls} == {options.get("norm_topk_prob", model_type != "olmoe")}
    found = gradients(model)
    assert found.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        assert error(found[parameter], slope) < BOUND, parameter
    assert any(line.startswith(f"router: {layers} ") for line in changes.replaced)
    changes.undo()
    del calls[:]
    assert torch.equal(logits(model), before) and not calls


def with_router_logits(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Its output, and the gradients of a loss that the router logits are part of."""
    model.train().zero_grad()
    with Wide():
        out = model(IDS, attention_mask=PADDED, labels=LABELS, use_cache=False, output_router_logits=True)
        out.loss.backward()
    model.eval()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoehybrid"])
def test_router_logits_are_theirs(name: str, calls: list) -> None:
    model = tiny(name)
    expected, slopes = with_router_logits(model)
    before = logits(model)
    tt.apply(model)
    out, found = with_router_logits(model)
    assert not calls and len(out.router_logits) == len(expected.router_logits) > 0
    tokens = PADDED.flatten().bool()  # of padding nothing has a meaning
    for got, want in zip(out.router_logits, expected.router_logits, strict=True):
        assert got.shape == want.shape and error(got[tokens], want[tokens]) < BOUND
    assert error(out.aux_loss, expected.aux_loss) < BOUND and error(out.loss, expected.loss) < BOUND
    for parameter, slope in slopes.items():
        assert error(found[parameter], slope) < BOUND, parameter
    assert error(logits(model), before) < BOUND and calls  # their hooks stay, and nobody listens
    tt.revert(model)


def test_who_listens_to_a_router_hears_theirs(calls: list) -> None:
    model = tiny("qwen3_moe")
    changes = tt.apply(model)
    seen = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    logits(model)
    assert len(seen) == 1 and seen[0][0].shape == (IDS.numel(), 6) and len(calls) == 1  # of two layers
    handle.remove()
    logits(model)
    assert len(seen) == 1 and len(calls) == 3
    changes.undo()


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_gradients_are_heard_too(part: str, calls: list) -> None:
    model = tiny("qwen3_moe")
    tt.apply(model)
    heard = []
    module = getattr(model.model.layers[0].mlp, part)
    handle = module.register_full_backward_hook(lambda module, of_inputs, of_outputs: heard.append(of_outputs))
    gradients(model)
    assert len(heard) == 1 and len(calls) == 1  # of two layers
    handle.remove()
    gradients(model)
    assert len(heard) == 1 and len(calls) == 3
    tt.revert(model)


def test_what_a_block_does_besides_stays_theirs(calls: list) -> None:
    """Noise on the router's input in training; experts of another implementation, chosen later; a router of another
    class."""
    model = tiny("mixtral", router_jitter_noise=0.1)
    tt.apply(model)
    model.train()
    logits(model)
    assert not calls
    model.eval()
    logits(model)
    assert len(calls) == 2
    model.set_experts_implementation("eager")
    logits(model)
    assert len(calls) == 2
    tt.revert(model)

    class Other(torch.nn.Module):
        pass

    block = model.model.layers[0].mlp
    block.gate = Other()
    changes = tt.apply(model)
    assert changes.left["router: MixtralSparseMoeBlock"] == "gate is a Other, served is MixtralTopKRouter"
    tt.revert(model)


def test_the_shared_expert_goes_with_the_block(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one op with the routed ones, by its own weights; its modules are not called, but its gate is."""
    given = []
    routed = blocks.routed
    monkeypatch.setattr(blocks, "routed", lambda *args, **more: given.append(more) or routed(*args, **more))
    model = tiny("qwen2_moe")
    block = model.model.layers[1].mlp
    before, gates = logits(model), []
    tt.apply(model)
    handle = block.shared_expert_gate.register_forward_hook(lambda module, args, output: gates.append(output))
    assert error(logits(model), before) < BOUND
    handle.remove()
    assert len(given) == len(calls) == 2 and len(gates) == 1
    assert given[1]["shared"].up is block.shared_expert.up_proj.weight
    assert torch.equal(given[1]["shared_weight"], gates[0].sigmoid()[:, 0])
    with torch.no_grad():
        block.shared_expert_gate.weight.neg_()
    assert error(logits(model), before) > 1e-3
    tt.revert(model)


def _hooked(shared: Any) -> None:
    shared.down_proj.register_forward_hook(lambda module, args, output: 2 * output)


def _listened_to(shared: Any) -> None:
    shared.register_full_backward_hook(lambda module, of_inputs, of_outputs: None)


def _biased(shared: Any) -> None:
    shared.up_proj = torch.nn.Linear(32, 20, dtype=torch.float64)
    torch.nn.init.ones_(shared.up_proj.weight)
    torch.nn.init.ones_(shared.up_proj.bias)


def _gelu(shared: Any) -> None:
    shared.act_fn = torch.nn.GELU()


def _narrow(shared: Any) -> None:
    shared.down_proj.float()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "the forward of shared_expert is another's already, or listened to"),
        (_listened_to, "the forward of shared_expert is another's already, or listened to"),
        (_biased, "shared_expert.up_proj is Linear(in_features=32, out_features=20, bias=True), served is a Linear"),
        (_gelu, "shared_expert.act_fn is GELU(approximate='none'), served is the experts'"),
        (_narrow, "shared_expert.down_proj is torch.float32, served is torch.float64, as the experts"),
    ],
)
def test_a_shared_expert_that_is_not_served_keeps_its_block(change: Any, reason: str, calls: list) -> None:
    """When ours are put in, and where it is changed later."""
    for late in (False, True):
        model, want = tiny("qwen2_moe"), tiny("qwen2_moe")
        for m in (want,) if late else (want, model):
            change(m.model.layers[0].mlp.shared_expert)
        changes = tt.apply(model)
        if late:
            change(model.model.layers[0].mlp.shared_expert)
        else:
            assert reason in changes.left["router: Qwen2MoeSparseMoeBlock"]
        if change is not _narrow:  # whose dtypes theirs cannot mix
            del calls[:]
            assert error(logits(model), logits(want)) < BOUND and len(calls) == late  # of two layers
        tt.revert(model)


def test_routers_can_be_left(calls: list) -> None:
    model = tiny("olmoe")
    changes = tt.apply(model, router=False)
    logits(model)
    assert not calls and "routers, shared experts" in changes.left
    tt.revert(model)
    changes = tt.apply(model, experts=False)
    logits(model)
    assert not calls and not any("router" in line for line in changes.replaced)
    tt.revert(model)


def test_of_all_models_of_a_type(calls: list) -> None:
    model = tiny("mixtral")
    before = logits(model)
    changes = tt.apply_tt_kernels_to_mixtral()
    try:
        assert "router: MixtralSparseMoeBlock" in changes.replaced
        assert error(logits(model), before) < BOUND and len(calls) == 2
    finally:
        changes.undo()
    assert torch.equal(logits(model), before) and len(calls) == 2
    changes = tt.apply_tt_kernels_to_mixtral(router=False)
    try:
        assert error(logits(model), before) < BOUND and len(calls) == 2
    finally:
        changes.undo()
