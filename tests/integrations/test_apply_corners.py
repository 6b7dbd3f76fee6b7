"""`apply` in models of several parts, of other kinds, in copies, and in classes of which not every model is served."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_two_tower import loaded
from tiny import IDS, PADDED, Wide, error, tiny

pytest.importorskip("transformers", minversion="5.20")

import transformers

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers.experts import unserved

BOUND = 1e-11  # fp64 on both sides, as in test_apply.py
SMALL = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)


def made(config: Any, kind: str = "AutoModelForCausalLM") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind).from_config(config).double().eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    with Wide():
        return model(IDS, attention_mask=PADDED, **options).logits


def test_parts_get_their_own_attention_back() -> None:
    text = transformers.LlamaConfig(vocab_size=61, **SMALL)
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **SMALL)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    model = made(config, "AutoModelForImageTextToText")
    said = {"text_config": "eager", "vision_config": "sdpa"}
    model.set_attn_implementation(said)
    changes = tt.apply(model)
    assert {line.split()[2] for line in changes.replaced if "attention" in line} == {
        "LlamaAttention,",
        "CLIPAttention,",
    }
    changes.undo()
    assert {name: getattr(model.config, name)._attn_implementation for name in said} == said


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2), "attention: GPT2Attention", "by name"),
        (
            transformers.OPTConfig(vocab_size=61, ffn_dim=24, word_embed_proj_dim=32, **SMALL),
            "attention: OPTAttention",
            "by name",
        ),
        (transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1), "mamba", "Mamba-1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_of_another_kind_is_listed(config: Any, name: str, reason: str) -> None:
    changes = tt.apply(made(config))
    assert reason in changes.left[name] and "plain logits" in changes.left["loss"]
    assert not changes.replaced


def test_an_unserved_model_of_a_served_class_is_as_it_was() -> None:
    model = tiny("mixtral", hidden_act="quick_gelu")
    before = logits(model)
    changes = tt.apply_tt_kernels_to_mixtral()
    try:
        assert error(logits(model), before) < BOUND
    finally:
        changes.undo()


def test_experts_without_an_activation_of_their_own_are_named() -> None:
    module: Any = SimpleNamespace(down_proj=torch.zeros(2, 3, 4), has_gate=True)
    assert "act_fn is not there" in str(unserved(module))


@torch.no_grad()
def test_sliding_layers_alone_write_past_their_window() -> None:
    """Such a model makes a mask of full attention, too, which no layer reads."""
    options = dict(layer_types=["sliding_attention"] * 2, sliding_window=4, num_key_value_heads=2, head_dim=8)
    model = made(transformers.Gemma2Config(vocab_size=61, **SMALL, **options))
    model.set_attn_implementation("eager")
    asked: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with Wide():
        before = model.generate(IDS, attention_mask=PADDED, **asked)
        tt.apply(model)
        assert torch.equal(model.generate(IDS, attention_mask=PADDED, **asked), before)


@torch.no_grad()
def test_a_copy_of_two_towers_has_its_own_experts(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined once in each, however they are called in turn."""
    model = loaded(golden_dir / "small")
    tt.apply(model)
    ids = torch.randint(4, 60, (1, 7))

    def run(each: Any) -> torch.Tensor:
        with Wide():
            return each.extend_context(ids, each.empty_cache(1))

    before = run(model)
    other = copy.deepcopy(model)
    assert error(run(other), before) < BOUND
    stacked = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda *args, **more: (stacked.append(1), stack(*args, **more))[1])
    assert error(run(model), before) < BOUND and error(run(other), before) < BOUND and not stacked
    for p in other.parameters():
        p.mul_(1.5)
    assert error(run(model), before) < BOUND and error(run(other), before) > 1e-3


@torch.no_grad()
def test_a_model_that_works_on_its_mask_is_refused_by_name() -> None:
    model = made(transformers.DogeConfig(vocab_size=61, num_key_value_heads=2, head_dim=8, **SMALL))
    tt.register()
    model.set_attn_implementation(tt.NAME)
    with pytest.raises(NotImplementedError, match="type doge add to their mask"):
        logits(model)
