"""Router, experts and norms in graphs: torch.compile and torch.export, with sizes that change from call to call."""

from typing import Any

import pytest
import torch
from parity import DTYPES, differentiated, leaves, make, outputs, with_leaves
from torch import Tensor, nn

from cards import OPS, Op

pytestmark = pytest.mark.kernels
# The sizes that differ between a graph's calls.
GROWS = {
    "route": ("T",),
    "experts": ("T",),
    "rms_norm": ("T",),
    "modulated_rms_norm": ("B", "L"),
    "gated_group_norm": ("T",),
}
# Rows that torch's grouped_mm takes, where the op is its reference.
CASES = [(name, OPS[name].cases[0]) for name in GROWS] + [("experts", dict(T=20, D=16, N=32, E=6, K=3, gated=1))]
# Experts in all dtypes: torch's grouped_mm can be traced in some only.
EACH = pytest.mark.parametrize(
    "name,dims,dtype",
    [
        pytest.param(name, dims, dtype, id=f"{name}-{i}-{dtype}", marks=() if dtype == DTYPES[0] else pytest.mark.slow)
        for i, (name, dims) in enumerate(CASES)
        for dtype in (DTYPES if name == "experts" else DTYPES[:1])
    ],
)


def grown(name: str, dims: dict[str, int], more: int, dtype: torch.dtype) -> dict[str, Any]:
    """A case in a larger size, with weights and options of the original."""
    first = make(OPS[name], dims, dtype)
    later = make(OPS[name], dims | {size: dims[size] + more for size in GROWS[name]}, dtype)
    return with_leaves(first, {k: t for k, t in leaves(later).items() if t.shape != leaves(first)[k].shape})


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=lambda m, key=key: f"{key}: {m}")


def results(op: Op, fn: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    free = differentiated(op, kwargs)
    found = outputs(op, fn(**with_leaves(kwargs, free)))
    sum(t.float().sum() for t in found.values() if t.requires_grad).backward()
    return found | {f"d{key}": t.grad for key, t in free.items()}


@EACH
def test_one_graph_for_all_sizes(name: str, dims: dict[str, int], dtype: torch.dtype) -> None:
    """Forward and backward; the frontend's compiler alone, which is where a graph breaks."""
    op, graphs, after = OPS[name], [], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=True, backend=backend)
    for more in (0, 3, 10):
        kwargs = grown(name, dims, more, dtype)
        assert_same(results(op, compiled, kwargs), results(op, op.fn, kwargs))
        after.append(len(graphs))
    assert len(set(after)) == 1, after  # the first size may take two: a float that is a symbol is made a number again


class Layer(nn.Module):
    def __init__(self, op: Op, kwargs: dict[str, Any]):
        super().__init__()
        self.op, self.kwargs = op, kwargs

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return self.op.fn(**with_leaves(self.kwargs, tensors))


@pytest.mark.parametrize("strict", [pytest.param(True, id="strict", marks=pytest.mark.slow), False])
@EACH
def test_exports_with_sizes_left_open(name: str, dims: dict[str, int], dtype: torch.dtype, strict: bool) -> None:
    torch._dynamo.reset()
    first, later = grown(name, dims, 0, dtype), grown(name, dims, 5, dtype)
    tensors, others = leaves(first), leaves(later)
    auto = torch.export.Dim.AUTO
    open_sizes = {
        key: {i: auto for i, size in enumerate(t.shape) if size != others[key].shape[i]} for key, t in tensors.items()
    }
    layer = Layer(OPS[name], first)
    exported = torch.export.export(layer, (tensors,), dynamic_shapes=(open_sizes,), strict=strict).module()
    for given in (tensors, others):
        assert_same(outputs(OPS[name], exported(given)), outputs(OPS[name], layer(given)))
    # What was traced has left nothing behind.
    assert not isinstance(next(iter(outputs(OPS[name], layer(tensors)).values())), torch._subclasses.FakeTensor)
