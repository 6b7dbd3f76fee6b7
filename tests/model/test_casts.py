"""Casting a model: the parameters that set decays and the choice of experts stay in fp32, whatever is cast and how."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, loaded, model_of, same, tensors_of
from torch import nn

from tt_model import TwoTower
from tt_model.checkpoint import FP32_PARAMETERS, convert, parameter_dtype, save
from tt_model.config import TwoTowerConfig
from tt_model.modeling.wide import Wide

HALVES = [torch.bfloat16, torch.float16]
CASTS: dict[str, Callable[[nn.Module, torch.dtype], nn.Module]] = {
    "to(dtype)": lambda m, t: m.to(t),
    "to(device, dtype)": lambda m, t: m.to("cpu", t),
    "to(tensor)": lambda m, t: m.to(torch.zeros(1, dtype=t)),
    "type": lambda m, t: m.type(t),
    "half or bfloat16": lambda m, t: m.half() if t is torch.float16 else m.bfloat16(),
    "each module by itself, innermost first": lambda m, t: [part.to(t) for part in reversed(list(m.modules()))][-1],
    "compiled": lambda m, t: torch.compile(m, backend="eager").to(t)._orig_mod,
    "there and back": lambda m, t: m.to(t).float().to(t),
    "a copy": lambda m, t: copy.deepcopy(m).to(t),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", CASTS)
def test_a_cast_model_is_what_loading_makes(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    save(model_of(), tmp_path / "model")
    want = TwoTower.from_pretrained(tmp_path / "model", dtype=dtype, device="cpu")
    same(CASTS[how](model_of(), dtype), want)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_types_are_those_of_the_list_by_name(dtype: torch.dtype) -> None:
    for model in (model_of().to(dtype), model_of(replace(CONFIG, dtype=torch.float64)).to(dtype)):
        for name, p in model.named_parameters():
            assert p.dtype == parameter_dtype(name, dtype), name
    wide = {name for name, p in model_of().bfloat16().named_parameters() if p.dtype == torch.float32}
    assert {name.split(".mixer.")[1] for name in wide} == set(FP32_PARAMETERS)


def test_the_default_type_makes_none_of_them_narrow() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = TwoTower(CONFIG)
    finally:
        torch.set_default_dtype(before)
    for name, p in model.named_parameters():
        assert p.dtype == parameter_dtype(name, torch.bfloat16), name


def test_gradients_and_device_follow() -> None:
    class Gate(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.weight = self.parameter(3)
            self.inner = nn.Linear(2, 2)

    gate = Gate()
    gate.weight.grad, gate.inner.weight.grad = torch.ones(3), torch.ones(2, 2)
    gate.to(torch.bfloat16)
    assert (gate.weight.dtype, gate.weight.grad.dtype) == (torch.float32, torch.float32)
    assert (gate.inner.weight.dtype, gate.inner.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    values = gate.weight.detach().clone()
    assert torch.equal(gate.to(torch.float16).weight, values)
    gate.to("meta", torch.bfloat16)
    assert gate.weight.is_meta and gate.weight.dtype == torch.float32 and gate.inner.weight.is_meta
    assert gate.to_empty(device="cpu").weight.dtype == torch.float32
    assert gate.double().weight.dtype == torch.float64


def test_a_cast_model_writes_the_tokens_of_a_loaded_one(golden_model: Path) -> None:
    want = TwoTower.from_pretrained(golden_model, dtype=torch.bfloat16, device="cpu")
    model = TwoTower.from_pretrained(golden_model, device="cpu").to(torch.bfloat16)
    prompts = [[5, 6, 7, 8], [9] * 30]
    options = dict(max_new_tokens=16, steps_per_block=4, eos_token_id=None)
    for mode in ("mask_diffusion", "ar"):
        assert model.generate(prompts, mode=mode, **options) == want.generate(prompts, mode=mode, **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_they_are_stored_in_fp32(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Those of a model that someone narrowed by force, too."""
    narrowed = model_of()
    for p in narrowed.parameters():
        p.data = p.data.bfloat16()
    for i, model in enumerate((model_of().bfloat16(), narrowed)):
        save(model, tmp_path / str(i), dtype=dtype)
        stored = tensors_of(tmp_path / str(i))
        for key, value in stored.items():
            assert value.dtype == parameter_dtype(key, dtype or torch.bfloat16), key
        config = TwoTowerConfig.from_file(tmp_path / str(i))
        assert config.dtype == torch.bfloat16
        loaded(tmp_path / str(i), config, dtype=torch.bfloat16)
    save(model_of(towers="context"), tmp_path / "context")
    convert(tmp_path / "context", tmp_path / "two", dtype=torch.bfloat16)
    for key, value in tensors_of(tmp_path / "two").items():
        assert value.dtype == parameter_dtype(key, torch.bfloat16), key
