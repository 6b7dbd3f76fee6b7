"""What PyTorch does around an op: export, activation checkpointing, and vmap, which is refused by name. Compiled graphs
and gradients are in test_ops.py, autocast in test_autocast.py."""

from typing import Any

import pytest
import torch
from parity import FIRST, differentiated, leaves, make, outputs, results, with_leaves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cards import Op

DIFFERENTIABLE = [p for p in FIRST if p.values[0].grads]


class Called(nn.Module):
    """An op as a module: its tensors come in, what else it takes is fixed."""

    def __init__(self, op: Op, kwargs: dict[str, Any]):
        super().__init__()
        self.op, self.kwargs = op, kwargs

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return outputs(self.op, self.op.fn(**with_leaves(self.kwargs, tensors)))


def copies(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in leaves(kwargs).items()}


@pytest.mark.parametrize("op,dims", FIRST)
def test_exports(op: Op, dims: dict[str, int]) -> None:
    """The exported program computes and writes what the op does, of other values, too."""
    kwargs = make(op, dims, torch.float32)
    program = torch.export.export(Called(op, kwargs), (copies(kwargs),)).module()
    for scale in (1.0, 0.5):
        given = {n: t * scale if t.is_floating_point() else t for n, t in copies(kwargs).items()}
        written = {n: t.clone() for n, t in given.items()}
        found = program(written)
        want = results(op, op.fn, with_leaves(kwargs, {n: t.clone() for n, t in given.items()}))
        found |= {n: t for n, t in written.items() if n in op.writes}
        assert set(found) == set(want)
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("op,dims", DIFFERENTIABLE)
def test_activation_checkpointing_changes_no_gradient(op: Op, dims: dict[str, int]) -> None:
    kwargs = make(op, dims, torch.float64)
    found = []
    for again in (False, True):
        free = {n: t for n, t in differentiated(op, kwargs).items() if n not in op.writes}
        given = with_leaves(kwargs, free)
        fixed = {n: t.clone() for n, t in leaves(given).items() if n in op.writes}

        def call(op: Op = op, given: dict[str, Any] = given, fixed: dict[str, Tensor] = fixed) -> tuple[Tensor, ...]:
            own = {n: t.clone() for n, t in fixed.items()}  # a state may be written: once each time
            result = outputs(op, op.fn(**with_leaves(given, own)))
            return tuple(t for t in result.values() if t.requires_grad)

        grown = checkpoint(call, use_reentrant=False) if again else call()
        sum((t * t).sum() for t in grown).backward()
        found.append({n: t.grad for n, t in free.items() if t.grad is not None})
    plain, saved = found
    assert plain and set(plain) == set(saved)
    assert all(torch.equal(saved[name], t) for name, t in plain.items())


@pytest.mark.parametrize("op,dims", FIRST)
def test_vmap_is_refused_by_name(op: Op, dims: dict[str, int]) -> None:
    kwargs = make(op, dims, torch.float32)
    given = copies(kwargs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = outputs(op, op.fn(**with_leaves(kwargs, dict(zip(given, tensors, strict=True)))))
        return tuple(found.values())

    with pytest.raises(NotImplementedError, match=rf"{op.fn.__name__}: \w+ is batched by torch\.func\.vmap; expected"):
        torch.func.vmap(call)(*(torch.stack([t, t]) for t in given.values()))
