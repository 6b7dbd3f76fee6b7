"""Sampling, committing and the loss as whole graphs: one for every batch, length and vocabulary."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, leaves, make
from torch import Tensor
from torch.export import Dim

from cards import OPS
from tt_kernels import Sampling, head_sample

pytestmark = pytest.mark.kernels


def sampling(rows: str) -> dict[str, str]:
    return {f"sampling.{name}": rows for name in Sampling._fields}


# Of each op: sizes to trace and others to run, and which dimension of each argument goes by which name.
GRAPHS = {
    "gumbel_noise": (dict(R=3, V=11), dict(R=5, V=11), dict(seed="R", position="R", step="R")),
    "sample": (
        dict(R=6, V=37, narrow=1),
        dict(R=4, V=50, narrow=1),
        {"logits": "RV"} | sampling("R"),
    ),
    "head_sample": (
        dict(R=6, D=16, V=37, narrow=1),
        dict(R=20, D=16, V=12, narrow=1),
        {"hidden": "R.", "weight": "V."} | sampling("R"),
    ),
    "commit": (
        dict(B=4, L=7, V=11),
        dict(B=3, L=9, V=11),
        dict(block="BL", token="BL", confidence="BL", threshold="B", steps_left="B"),
    ),
    "unmask": (
        dict(B=4, L=5, D=16, V=37, narrow=1),
        dict(B=3, L=6, D=16, V=40, narrow=1),
        {"hidden": "BL.", "weight": "V.", "block": "BL", "threshold": "B", "steps_left": "B"} | sampling("B"),
    ),
    "linear_cross_entropy": (
        dict(B=2, N=5, D=6, V=11),
        dict(B=3, N=4, D=6, V=13),
        dict(hidden="BN.", weight="V.", targets="BN", mask="BN"),
    ),
}
# References that the one of unmask calls: their graphs are parts of its graph.
INSIDE = () if KERNELS else ("sample", "head_sample")
DIMS = {"R": "rows", "V": "vocabulary", "B": "batch", "L": "length", "N": "length"}


def graphs() -> pytest.MarkDecorator:
    """All of them, those that are parts of others only in `make test-full`."""
    slow = dict.fromkeys(INSIDE, pytest.mark.slow)
    return pytest.mark.parametrize("name", [pytest.param(name, marks=slow.get(name, ())) for name in GRAPHS])


class Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any], names: list[str], options: dict[str, Any]):
        super().__init__()
        self.fn, self.names, self.options = fn, names, options

    def forward(self, *tensors: Tensor) -> Any:
        given = dict(zip(self.names, tensors, strict=True))
        parts = {name.partition(".")[2]: given.pop(name) for name in self.names if name.startswith("sampling.")}
        structure = dict(sampling=Sampling(**parts)) if parts else {}
        return self.fn(**given, **structure, **self.options)


def traced(name: str) -> tuple[Module, list[Tensor], list[Tensor]]:
    first, other, dims = GRAPHS[name]
    op = OPS[name]
    kwargs, others = (make(op, sizes, torch.float32) for sizes in (first, other))
    options = {k: v for k, v in kwargs.items() if k not in dims and k != "sampling"}
    if "mask_token_id" in options:
        options["mask_token_id"] = 0
    if "suppress" in options:
        options["suppress"] = 0
    return Module(op.fn, list(dims), options), *([leaves(args)[k] for k in dims] for args in (kwargs, others))


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want)  # the same operations, possibly of more rows: the default for fp32


@graphs()
def test_one_graph_of_any_size(name: str) -> None:
    torch._dynamo.reset()
    module, *runs = traced(name)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for tensors in runs:
        results = []
        for fn in (module, compiled):
            free = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
            for t, names in zip(free, GRAPHS[name][2].values(), strict=True):
                torch._dynamo.mark_dynamic(t, [i for i, n in enumerate(names) if n != "."])  # refuses to make it static
            result = fn(*free)
            if name == "linear_cross_entropy":
                result.backward()
                result = (result, *(t.grad for t in free if t.grad is not None))
            results.append(result)
        assert_same(*reversed(results))
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [pytest.param(True, id="strict", marks=pytest.mark.slow), False])
@graphs()
def test_exports_with_dynamic_sizes(name: str, strict: bool) -> None:
    torch._dynamo.reset()
    module, *runs = traced(name)
    dims = {letter: Dim(size, min=2) for letter, size in DIMS.items()}
    shapes = tuple({i: dims[n] for i, n in enumerate(names) if n != "."} for names in GRAPHS[name][2].values())
    program = torch.export.export(module, tuple(runs[0]), dynamic_shapes=(shapes,), strict=strict).module()
    for tensors in runs:
        assert_same(program(*tensors), module(*tensors))


def test_a_graph_takes_temperatures_that_it_does_not_look_at() -> None:
    """Below 0 and NaN: as 0."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    hidden, weight, rows = torch.randn(4, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE), torch.arange(4)
    rows = rows.to(DEVICE)
    compiled = torch.compile(head_sample, fullgraph=True, backend="aot_eager")
    for values in ((-1.0, math.nan, -math.inf, -0.0), (0.0, 1.0, math.inf, 1e-45)):
        temperature = torch.tensor(values, device=DEVICE)
        wild = Sampling(temperature, rows, rows, rows)
        known = wild._replace(temperature=temperature.clamp(min=0).nan_to_num(0, posinf=math.inf))
        got, want = compiled(hidden, weight, wild, suppress=3), head_sample(hidden, weight, known, suppress=3)
        assert torch.equal(got[0], want[0])
        assert_same(got[1], want[1])
