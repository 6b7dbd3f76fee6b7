"""FSDP2 around an op: two processes that share its parameters get the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from parity import FIRST, differentiated, leaves, make, outputs, with_leaves
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from cards import OPS, Op

NAMES = [p.values[0].fn.__name__ for p in FIRST if p.values[0].grads]


class Layer(nn.Module):
    """An op whose differentiable arguments are its parameters."""

    def __init__(self, op: Op, kwargs: dict[str, Any]):
        super().__init__()
        self.op, self.kwargs, self.names = op, kwargs, list(differentiated(op, kwargs))
        self.free = nn.ParameterList(leaves(kwargs)[name].contiguous() for name in self.names)  # as FSDP asks

    def forward(self) -> Tensor:
        given = with_leaves(self.kwargs, dict(zip(self.names, self.free, strict=True)))
        given = with_leaves(given, {n: t.clone() for n, t in leaves(given).items() if n in self.op.writes})
        return sum(t.square().sum() for t in outputs(self.op, self.op.fn(**given)).values() if t.requires_grad)


def gradients(layer: Layer) -> list[Tensor]:
    layer.zero_grad()
    layer().backward()
    return [p.grad for p in layer.free]


def work(rank: int, store: str) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in NAMES:
        layer = Layer(OPS[name], make(OPS[name], OPS[name].cases[0], torch.float64))
        alone = [grad.clone() for grad in gradients(layer)]
        fully_shard(layer)
        for argument, grad, want, p in zip(layer.names, gradients(layer), alone, layer.free, strict=True):
            assert p.to_local().numel() < p.numel() or len(p) == 1, f"{name}: {argument} is whole"
            assert torch.equal(grad.full_tensor(), want) and want.any(), f"{name}: {argument}"
        print(name, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and then end the interpreter with an abort


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """Both work on the same numbers: a mean of two equal gradients is that gradient, bit for bit."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", f"import test_fsdp_ops; test_fsdp_ops.work({rank}, {str(tmp_path / 'store')!r})"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for process in [start(0), start(1)]:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
        assert [line for line in out.splitlines() if line in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_counts(name: str) -> None:
    """What the processes compare is not nothing: no gradient of these arguments is 0 everywhere."""
    layer = Layer(OPS[name], make(OPS[name], OPS[name].cases[0], torch.float64))
    assert layer.names and all(grad.any() for grad in gradients(layer))
