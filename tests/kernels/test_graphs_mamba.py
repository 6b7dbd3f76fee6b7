"""Convolution and scan in graphs: compiled and exported with batch and length as symbols, and nothing of them kept.

Both ways of export, with and without states, lengths and packed sequences, on references and on interpreted kernels.
"""

import gc
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, OPS, leaves, make, outputs, results, values_and_gradients, with_leaves
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, export

import tt_kernels
from tt_kernels import reference

pytestmark = pytest.mark.kernels
SCAN = dict(H=2, P=3, G=1, N=4)
CASES = [
    ("causal_conv1d", dict(B=2, L=5, C=3, K=4)),
    ("causal_conv1d", dict(B=2, L=6, C=3, K=4, seeded=0, packed=1)),
    ("conv_advance", dict(B=2, L=5, C=3, K=4)),
    ("conv_advance", dict(B=2, L=5, C=3, K=4, ragged=0)),
    ("conv_advance", dict(B=2, L=5, C=3, K=4, placed=1)),
    ("conv_block_states", dict(B=2, N=6, C=3, K=4, S=4)),
    ("conv_block_states", dict(B=2, N=6, C=3, K=4, S=4, packed=1)),
    ("ssd_step", dict(b=2, **SCAN)),
    ("ssd_block", dict(b=2, L=5, **SCAN)),
    ("ssd_block", dict(b=2, L=5, seeded=0, **SCAN)),
    ("ssd_advance", dict(b=2, L=5, **SCAN)),
    ("ssd_chunk", dict(b=2, L=6, Q=4, ragged=1, **SCAN)),
    ("ssd_chunk", dict(b=2, L=6, Q=0, seeded=0, packed=1, **SCAN)),
    ("mamba_block", dict(b=2, L=5, K=4, **SCAN)),
    ("mamba_advance", dict(b=2, L=5, K=4, **SCAN)),
    ("mamba_step", dict(b=2, K=4, **SCAN)),
    ("mamba_step", dict(b=2, K=4, placed=1, **SCAN)),
    ("mamba_advance", dict(b=2, L=5, K=4, placed=1, **SCAN)),
    ("mamba_extend", dict(b=2, L=5, K=4, placed=1, **SCAN)),
    ("mamba_extend", dict(b=2, L=5, K=4, **SCAN)),
    ("ssd_chunk", dict(b=2, L=6, Q=0, placed=1, **SCAN)),
]
FIRST = dict(reversed(CASES))
# References that those of mamba_extend call: their graphs are parts of its graph.
INSIDE = ("ssd_block", "ssd_advance", "mamba_block", "mamba_advance")


def cases(slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Each op's first case; the others, and ops that are slow, only in `make test-full`."""
    quick = lambda name, dims: dims is FIRST[name] and name not in slow
    return pytest.mark.parametrize(
        "name,dims",
        [
            pytest.param(
                n, d, id=f"{n}-{'-'.join(map(str, d.values()))}", marks=() if quick(n, d) else pytest.mark.slow
            )
            for n, d in CASES
        ],
    )


def larger(name: str, dims: dict[str, int]) -> dict[str, int]:
    """Another batch and another length, which is no whole number of chunks."""
    length = "N" if name == "conv_block_states" else "L"
    return {k: v + 1 if k in "Bb" else v + 3 if k == length else v for k, v in dims.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """By argument the dimensions whose size is not the same in both: symbols, which an export must not make numbers."""
    found = {}
    for name, t in leaves(one).items():
        sizes = enumerate(zip(t.shape, leaves(other)[name].shape, strict=True))
        found[name] = {d: Dim.DYNAMIC for d, (a, b) in sizes if a != b}
    return found


def assert_same(op: Any, fn: Any, kwargs: dict[str, Any]) -> None:
    got, want = results(op, fn, kwargs), results(op, op.fn, kwargs)
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@cases(() if KERNELS else INSIDE)
def test_one_graph_for_every_length(name: str, dims: dict[str, int]) -> None:
    """Compiled twice at most: once for the sizes first seen, once with what has changed as symbols."""
    torch._dynamo.reset()
    op = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.fn, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_same(op, compiled, make(op, dims, torch.float32))
        dims = larger(name, dims)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, pytest.param(True, id="strict", marks=pytest.mark.slow)])
@cases()
def test_exports_with_any_batch_and_length(name: str, dims: dict[str, int], strict: bool) -> None:
    torch._dynamo.reset()
    op = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return op.fn(**with_leaves(kwargs, tensors))

    kwargs, other = make(op, dims, torch.float32), make(op, larger(name, dims), torch.float32)
    dynamic = differing(kwargs, other)
    program = export(Module(), (leaves(kwargs),), dynamic_shapes=(dynamic,), strict=strict)
    for now in (kwargs, other):
        assert_same(op, lambda **given: program.module()(leaves(given)), now)


@pytest.mark.parametrize("name", FIRST)
def test_nothing_of_a_trace_is_kept(name: str) -> None:
    """Eager results are tensors after an export and after a fake mode, of sizes that were first seen there."""
    op, dims = OPS[name], FIRST[name]
    kwargs = make(op, dims, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return op.fn(**with_leaves(kwargs, tensors))

    export(Module(), (leaves(kwargs),))
    mode = FakeTensorMode()
    with mode:
        op.fn(**with_leaves(kwargs, {k: mode.from_tensor(t) for k, t in leaves(kwargs).items()}))
    with torch.inference_mode():
        op.fn(**kwargs)
    found = values_and_gradients(op, op.reference, kwargs, torch.float32) | outputs(op, op.fn(**kwargs))
    assert not any(isinstance(t, FakeTensor) or t.is_inference() for t in found.values())


def held() -> int:
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(storages.values())


def test_lengths_leave_no_memory_behind() -> None:
    op = OPS["ssd_block"]
    before = held()
    with tt_kernels.use("reference"), torch.inference_mode():
        for L in range(1, 301, 5):
            kwargs = make(op, dict(b=1, L=L, H=1, P=1, G=1, N=1), torch.float32)
            op.fn(**kwargs)
            reference.ssd_chunk(**kwargs, chunk_size=16)
    del kwargs
    assert held() - before < 2_000


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("packed", [0, 1])
def test_a_compiled_chunked_scan_has_the_gradients_of_the_loop(chunk_size: int | None, packed: int) -> None:
    """In a graph it is one node with a backward of its own; also where only y is used, as in training."""
    torch._dynamo.reset()
    op = OPS["ssd_chunk"]
    kwargs = make(op, dict(b=2, L=10, Q=chunk_size or 0, seeded=1 - packed, packed=packed, **SCAN), torch.float64)
    if DEVICE == "cuda":
        kwargs = with_leaves(kwargs, {k: t.float() for k, t in leaves(kwargs).items() if t.is_floating_point()})
    free = [k for k, t in leaves(kwargs).items() if t.is_floating_point()]
    for used in (1, 3):
        gradients = []
        for fn in (op.fn, torch.compile(op.fn, fullgraph=True, backend="aot_eager")):
            now = {k: leaves(kwargs)[k].detach().clone().requires_grad_() for k in free}
            written = {k: now[k].clone() for k in free if k in op.writes}
            result = outputs(op, fn(**with_leaves(kwargs, now | written)))
            sum(t.square().sum() for t in list(result.values())[:used]).backward()
            gradients.append([now[k].grad for k in free])
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("example,served,refused", [(3, (2, 4), 6), (7, (9, 12), 3)], ids=["one", "several"])
@pytest.mark.parametrize(
    "name,length,dims",
    [
        ("ssd_chunk", "L", dict(b=1, Q=4, seeded=0, **SCAN)),
        ("conv_block_states", "N", dict(B=1, C=3, K=4, S=4)),
    ],
)
def test_an_export_holds_for_one_chunk_or_for_several(
    name: str, length: str, dims: dict[str, int], example: int, served: tuple[int, ...], refused: int
) -> None:
    """The number of chunks is a size of the result: the graph says which lengths it is for."""
    op = OPS[name]
    at = lambda size: make(op, dims | {length: size}, torch.float32)
    kwargs = at(example)

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return op.fn(**with_leaves(kwargs, tensors))

    program = export(Module(), (leaves(kwargs),), dynamic_shapes=(differing(kwargs, at(served[0])),)).module()
    for size in served:
        assert_same(op, lambda **given: program(leaves(given)), at(size))
    with pytest.raises(AssertionError, match="Guard failed"):
        program(leaves(at(refused)))
