"""Experts by name: experts_implementation="tt_kernels", with gradients, sentinels, and refusals."""

from typing import Any

import pytest
import torch
from tiny import Wide, error, logits, tiny
from torch import Tensor

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers import experts as ours

BOUND = 1e-12  # fp64, as in test_apply.py; one layer
TYPES = ["nemotron_h", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoehybrid"]


def layer(model_type: str, **options: Any) -> Any:
    tt.register()
    model = tiny(model_type, **options)
    module = next(m for m in model.modules() if hasattr(m, "_apply_gate"))
    module.config._experts_implementation = tt.NAME
    return module


def inputs(module: Any, ids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    top_k_index = torch.tensor(ids)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), module.down_proj.shape[1], dtype=torch.float64, generator=g)
    return x, top_k_index, torch.rand(top_k_index.shape, dtype=torch.float64, generator=g)


def forward_and_gradients(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    x, ids, weights = given[0].clone().requires_grad_(), given[1], given[2].clone().requires_grad_()
    module.zero_grad()
    here = ids < module.num_experts
    eager = module.config._experts_implementation == "eager"  # not all types' can do with experts that are elsewhere
    with Wide():
        y = module(x, ids.where(here, 0), weights * here) if eager else module(x, ids, weights)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in (x, weights, *module.parameters()))]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_values_and_gradients(model_type: str, elsewhere: bool) -> None:
    """Ids of num_experts are of experts on other devices; one token's are all elsewhere, one expert is not hit."""
    module = layer(model_type)
    E = module.num_experts
    given = inputs(module, [[0, 1], [E, 3], [E, E], [2, E], [3, 0]] if elsewhere else [[0, 1], [3, 2], [0, 5]])
    module._is_expert_parallel = elsewhere
    found = forward_and_gradients(module, given)
    module.config._experts_implementation = "eager"
    for got, expected in zip(found, forward_and_gradients(module, given), strict=True):
        assert error(got, expected) < BOUND


GELU = ["gelu", "gelu_pytorch_tanh", torch.nn.GELU(), torch.nn.GELU(approximate="tanh")]


@pytest.mark.parametrize("act", GELU, ids=str)
def test_gelu(act: Any) -> None:
    module = layer("mixtral", **(dict(hidden_act=act) if isinstance(act, str) else {}))
    if not isinstance(act, str):
        module.act_fn = act
    given = inputs(module, [[0, 1], [3, 2], [0, 5]])
    found = forward_and_gradients(module, given)
    module.config._experts_implementation = "eager"
    for got, expected in zip(found, forward_and_gradients(module, given), strict=True):
        assert error(got, expected) < BOUND


def test_weights_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("mixtral")
    seen = []
    monkeypatch.setattr(ours, "experts", lambda x, routing, weights, **_: seen.append(weights) or x)
    module(*inputs(module, [[0, 1]]))
    whole = module.gate_up_proj
    half = whole.shape[1] // 2 * whole.shape[2] * whole.element_size()
    assert seen[0].gate.data_ptr() == whole.data_ptr() and seen[0].up.data_ptr() == whole.data_ptr() + half
    assert seen[0].down.data_ptr() == module.down_proj.data_ptr()


@pytest.mark.parametrize("model_type", TYPES)
def test_by_name(model_type: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    tt.register()
    model = tiny(model_type)
    before = logits(model)
    model.set_experts_implementation(tt.NAME)
    assert error(logits(model), before) < BOUND
    model.save_pretrained(tmp_path)
    names = dict(experts_implementation=tt.NAME, attn_implementation=tt.NAME)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **names).eval()
    assert loaded.config._experts_implementation == loaded.config._attn_implementation == tt.NAME
    # Loading makes an A_log or a router that is kept in fp32 so: 1e-7, with which scores near a tie may be told apart.
    assert error(logits(loaded), before) < 1e-5


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("has_bias", True, "has_bias is True .biases., served is False"),
        ("is_transposed", True, "is_transposed is True"),
        ("is_concatenated", False, "is_concatenated is False .gate and up interleaved."),
        ("has_post_expert_norm", True, "has_post_expert_norm is True"),
        (
            "down_proj",
            torch.nn.Parameter(torch.zeros(6, 32, 24, dtype=torch.int8), requires_grad=False),
            r"down_proj is torch\.int8, served are torch\.bfloat16",
        ),
        ("act_fn", torch.nn.Tanh(), r"act_fn is Tanh.*, served are SiLU, relu2 and GELU"),
    ],
)
def test_refusals(attribute: str, value: Any, reason: str) -> None:
    module = layer("mixtral")
    setattr(module, attribute, value)
    with pytest.raises(NotImplementedError, match=reason):
        module(*inputs(module, [[0, 1]]))


def test_a_gate_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("mixtral")
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, gate_up: gate_up)
    with pytest.raises(NotImplementedError, match="_apply_gate is its own"):
        module(*inputs(module, [[0, 1]]))
