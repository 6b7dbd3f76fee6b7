"""Autocast changes no op: references and kernels compute in the dtypes that their docstrings say, and a model gives one
answer in training and in inference. References without TRITON_INTERPRET, kernels with it or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import CASES, DEVICE, DTYPES, FIRST, differentiated, leaves, make, outputs, with_leaves
from torch import Tensor

from cards import Op
from tt_model import TwoTower

# On a CPU autocast also knows fp16, which the interpreter computes rightly.
NARROW = [torch.bfloat16, torch.float16]


def everything(
    op: Op, fn: Callable[..., Any], kwargs: dict[str, Any], autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Outputs, arguments that are written, and gradients. Autocast is on for the op only, as in a training step."""
    kwargs = with_leaves(kwargs, {name: t.clone() for name, t in leaves(kwargs).items() if name in op.writes})
    free = differentiated(op, kwargs)
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        result = outputs(op, fn(**with_leaves(kwargs, free)))
    grown = [t for t in result.values() if t.requires_grad]
    if grown:
        torch.autograd.backward(grown, [torch.ones_like(t) for t in grown])
    written = {name: t for name, t in leaves(kwargs).items() if name in op.writes}
    gradients = {f"d{name}": t.grad for name, t in free.items() if t.grad is not None}
    return {name: t.detach() for name, t in (result | written | gradients).items()}


def same(op: Op, fn: Callable[..., Any], kwargs: dict[str, Any], autocast: torch.dtype) -> None:
    got, want = everything(op, fn, kwargs, autocast), everything(op, fn, kwargs, None)
    assert set(got) == set(want)
    for name, t in want.items():
        assert got[name].dtype == t.dtype, f"{name} is {got[name].dtype}, not {t.dtype}"
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", NARROW, ids=str)
@pytest.mark.parametrize("op,dims", CASES)
def test_references(op: Op, dims: dict[str, int], autocast: torch.dtype, dtype: torch.dtype) -> None:
    same(op, op.reference, make(op, dims, dtype), autocast)


@pytest.mark.kernels
@pytest.mark.parametrize("autocast", NARROW, ids=str)
@pytest.mark.parametrize("op,dims", FIRST)
def test_public_ops(op: Op, dims: dict[str, int], autocast: torch.dtype) -> None:
    same(op, op.fn, make(op, dims, DTYPES[0]), autocast)


def logits(model: TwoTower, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Of the noisy blocks but the first, as in training and as in inference."""
    generator, c = torch.Generator().manual_seed(0), model.config
    S, blocks = c.block_size, 4
    clean = torch.randint(5, c.vocab_size, (2, blocks * S), generator=generator)
    masked = torch.rand(clean.shape, generator=generator) < 0.5
    noisy, t = clean.masked_fill(masked, c.mask_token_id), torch.rand(2, blocks, generator=generator)
    clean, noisy, t = (x.to(model.device) for x in (clean, noisy, t))
    with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None), torch.no_grad():
        trained = model.denoise_all(model.encode_clean(clean, S), noisy, t)[:, S:]
        inferred, cache = [], model.prefill(clean[:, :S])
        for j in range(1, blocks):
            block = slice(j * S, (j + 1) * S)
            inferred.append(model.denoise(noisy[:, block], t[:, j], cache))
            if j % 2:
                model.commit(clean[:, block], cache)
            else:  # the other way into the cache
                _, pending = model.verify(clean[:, block], cache)
                cache.advance(pending, torch.full((2,), S, device=model.device))
    return trained, torch.cat(inferred, 1)


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return TwoTower.from_pretrained(device=DEVICE)


def test_training_and_inference_give_the_same_logits(model: TwoTower) -> None:
    """Without autocast to a few roundings of fp32; with it to less than it costs: where sums in another order differ in
    the last bit, a narrow projection may round the other way."""
    trained, inferred = logits(model, None)
    assert (trained - inferred).abs().max() <= 1e-5 * trained.abs().max()
    for autocast in NARROW:
        narrow, also = (t.float() for t in logits(model, autocast))
        cost = (narrow - trained).square().mean().sqrt()
        assert 0 < cost < 0.02 * trained.square().mean().sqrt()
        assert (narrow - also).square().mean().sqrt() <= 0.8 * cost


def test_a_model_generates_under_autocast(model: TwoTower) -> None:
    prompt = [[5, 6, 7, 8]]
    for mode in ("mask_diffusion", "ar", "mock_ar"):
        with torch.autocast(model.device.type, torch.bfloat16):
            tokens = model.generate(prompt, mode=mode, max_new_tokens=8, eos_token_id=None).tokens[0]
        assert len(tokens) == 8
