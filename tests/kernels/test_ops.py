"""Every public op by its card: twin, docstring, values, dtypes, gradients, graphs, layout, bad input.

What the results mean is the business of test_reference.py and test_sampling.py. 20 s on one core.
"""

import doctest
import inspect
import re
from typing import Any

import pytest
import torch
from parity import (
    CASES,
    DEVICE,
    DTYPES,
    FIRST,
    KERNELS,
    differentiated,
    double,
    leaves,
    make,
    outputs,
    results,
    values_and_gradients,
    with_leaves,
)
from torch import Tensor

import tt_kernels
from cards import OPS, Op
from tt_kernels import reference
from tt_kernels.runtime import registry
from tt_kernels.runtime.launch import INTERPRET

DIFFERENTIABLE = [p for p in CASES if p.values[0].grads]
NAMES = list(OPS)
FROM_ROUNDED = (tt_kernels.mamba_advance, tt_kernels.mamba_extend, tt_kernels.mamba_step)
pytestmark = pytest.mark.kernels
NEEDS_FP64 = pytest.mark.skipif(DEVICE == "cuda", reason="fp64 kernels exist only in the interpreter")


def gained(op: Op, kwargs: dict[str, Any]) -> Tensor:
    """Of what advances states: the sum over tokens of |w x B^T|, what a state gains if nothing cancels.
    In the slots that are written."""
    weights, state = kwargs["weights"], kwargs["state"]
    (H, P, N), one = state.ssm.shape[1:], kwargs["xBC"].dim() == 2
    xBC, dt = (kwargs[k].unsqueeze(1) if one else kwargs[k] for k in ("xBC", "dt"))
    convolution = weights.conv_weight, weights.conv_bias, state.conv
    columns = reference.causal_conv1d(xBC, *convolution, state_indices=state.conv_indices).abs()
    x, B = columns[..., : H * P].unflatten(-1, (H, P)), columns[..., H * P :].unflatten(-1, (2, -1, N))[..., 0, :, :]
    gain = torch.zeros_like(state.ssm)
    places = dict(state_indices=state.ssm_indices, out_indices=state.ssm_out_indices)
    reference.ssd_advance(x, dt, weights.A, B, weights.dt_bias, gain, kwargs.get("counts"), **places)
    return gain


# The op and its papers


def test_every_op_has_a_card_and_a_twin() -> None:
    functions = [
        {name for name in module.__all__ if not inspect.isclass(getattr(module, name))}
        for module in (tt_kernels, reference)
    ]
    assert functions == [{*OPS, "skip_checks", "trusted", "use"}, {*OPS}]


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_one_name_and_signature(name: str) -> None:
    op = OPS[name]
    assert op.fn is getattr(tt_kernels, name) and op.reference is getattr(reference, name)
    assert op.fn.__name__ == op.reference.__name__ == name
    assert inspect.signature(op.fn) == inspect.signature(op.reference)
    kinds = [p.kind for p in inspect.signature(op.fn).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_whole(name: str) -> None:
    op, doc = OPS[name], inspect.getdoc(OPS[name].fn)
    effect, _, rest = doc.partition("Args:")
    arguments, _, results = rest.partition("Returns:")
    assert effect.strip() and results
    listed = {word for line in arguments.splitlines() for word in line.partition(":")[0].replace(",", " ").split()}
    assert set(inspect.signature(op.fn).parameters) <= listed
    assert all(f"{output}:" in results for output in op.outputs)
    labels = re.findall(r"^([A-Z]\w+):", results, re.M)
    assert labels == ["Numerics", "Gradients", "Raises", "Cost", "Source", "Example"]


@pytest.mark.skipif(KERNELS, reason="its tensors are for the reference")
@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name: str) -> None:
    example = inspect.getdoc(OPS[name].fn).partition("Example:")[2]
    parsed = doctest.DocTestParser().get_examples(example)
    assert 1 <= len(parsed) <= 4
    known = {"torch": torch, **{public: getattr(tt_kernels, public) for public in tt_kernels.__all__}}
    for line in parsed:
        exec(line.source, known)


@pytest.mark.parametrize("op,dims", CASES)
def test_card_counts(op: Op, dims: dict[str, int]) -> None:
    for shape in (dims, *op.shapes):
        flops, moved = op.cost(2, **shape)
        assert type(flops) is type(moved) is int and flops >= 0 and moved >= 0
    assert set(op.grads) <= set(leaves(make(op, op.cases[0], torch.float32))) | {"weights.gate", "shared.gate"}


def test_use_names_an_implementation() -> None:
    kwargs = make(OPS["rms_norm"], OPS["rms_norm"].cases[0], torch.float32)
    with tt_kernels.use("reference"):
        assert not registry.takes_kernel("rms_norm", kwargs["x"])
        got = tt_kernels.rms_norm(**kwargs)
    assert torch.equal(got, reference.rms_norm(**kwargs))
    assert registry.takes_kernel("rms_norm", kwargs["x"]) == KERNELS
    with pytest.raises(ValueError, match="use: implementation is 'triton', expected 'reference'"):
        tt_kernels.use("triton").__enter__()


# Values, dtypes, layout


@NEEDS_FP64
@pytest.mark.skipif(KERNELS, reason="test_any_strides holds kernels to the reference")
@pytest.mark.parametrize("op,dims", CASES)
def test_public_op_equals_reference(op: Op, dims: dict[str, int]) -> None:
    kwargs = make(op, dims, torch.float64)
    got, want = results(op, op.fn, kwargs), results(op, op.reference, kwargs)
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.mark.skipif(INTERPRET, reason="test_kernels holds kernels to the reference in these dtypes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,dims", CASES)
def test_low_precision_is_as_good_as_its_roundings(op: Op, dims: dict[str, int], dtype: torch.dtype) -> None:
    """error(dtype) <= roundings * eps(dtype of the output) * its largest value."""
    kwargs = make(op, dims, dtype)
    low, high = results(op, op.fn, kwargs), results(op, op.reference, double(kwargs))
    for name in high:
        got, want = low[name], high[name]
        assert got.shape == want.shape, name
        if not got.is_floating_point():  # ids, tokens: no decision of these inputs is within rounding of a tie
            assert torch.equal(got, want), name
        elif got.numel():
            # fp32: sums of up to 75 terms, exp of logits up to 20: 8. 16 bits: statistics and sums are fp32, so half an
            # eps for the output and half for a residual that was rounded before; experts also round up, its square and
            # down, and squaring doubles an error: 3 in all, and 4 with a norm behind.
            wide = got.dtype in (torch.float32, torch.float64)
            roundings = 8 if wide else {tt_kernels.experts: 3, tt_kernels.experts_norm: 4}.get(op.fn, 1)
            error, largest = (got.double() - want).abs(), want.abs().max()
            bound = roundings * torch.finfo(got.dtype).eps * largest
            if op.fn in FROM_ROUNDED and name == "state.ssm":
                # It is wide, but the x and B that it gains from were rounded: half an eps of 16 bits of each.
                bound = bound + torch.finfo(dtype).eps * gained(op, double(kwargs))
            assert (error <= bound).all(), f"{name}: {error.max():.2e} of {largest:.2e}"


@pytest.mark.parametrize("op,dims", CASES)
def test_any_strides(op: Op, dims: dict[str, int]) -> None:
    """Inputs spread in memory, every second number a NaN that is not theirs, and the last two dimensions swapped: the
    results are those of the reference with inputs that lie densely, and inputs stay as they are."""
    # Kernels of the BLAS and of ours for other strides sum in another order: 4500 eps of fp64, 80 of the fp32 of a GPU,
    # there against the kernel itself. A wrong element shows at 1e-3.
    dtype, tolerance = (torch.float32, 1e-5) if DEVICE == "cuda" else (torch.float64, 1e-12)
    kwargs = make(op, dims, dtype)
    spread = {}
    for name, tensor in leaves(kwargs).items():
        nan = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 1)
        swapped = (lambda t: t.mT) if tensor.dim() > 1 else (lambda t: t)
        spread[name] = swapped(torch.stack([swapped(tensor), swapped(nan)], -1)[..., 0])
        assert torch.equal(spread[name], tensor) and (tensor.numel() < 2 or not spread[name].is_contiguous())
    got = results(op, op.fn, with_leaves(kwargs, spread))
    want = results(op, op.fn if DEVICE == "cuda" else op.reference, kwargs)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert all(torch.equal(spread[name], t) for name, t in leaves(kwargs).items() if name not in op.writes)


# Gradients and graphs


@NEEDS_FP64
@pytest.mark.parametrize("op,dims", DIFFERENTIABLE)
def test_gradients(op: Op, dims: dict[str, int]) -> None:
    kwargs = make(op, dims, torch.float64)
    free = differentiated(op, kwargs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = with_leaves(kwargs, dict(zip(free, tensors, strict=True)))
        written = {name: t.clone() for name, t in leaves(given).items() if name in op.writes}
        result = outputs(op, op.fn(**with_leaves(given, written)))
        return tuple(t for t in result.values() if t.requires_grad)

    if all(t.numel() for t in free.values()):
        size = sum(t.numel() for t in free.values()) * sum(t.numel() for t in call(*free.values()))
        # The whole Jacobian where it is small, else a random projection of it: at 3e5 numbers 50 times as fast. An
        # interpreted call takes a thousand times as long: there the reference's gradients, which are checked so without
        # the interpreter, say what is right. Both are fp64: 1e-10 leaves room for sums of a thousand terms.
        interpreted = op.kernels and KERNELS and not op.forward_only
        if interpreted and size > 200 and dims != op.cases[0]:
            got, want = (values_and_gradients(op, fn, kwargs) for fn in (op.fn, op.reference))
            assert set(got) == set(want)
            for name, t in want.items():
                bound = 1e-10 * max([1.0, *t.abs().flatten().tolist()])
                torch.testing.assert_close(got[name], t, rtol=0, atol=bound)
            return
        assert torch.autograd.gradcheck(call, tuple(free.values()), fast_mode=size > (200 if interpreted else 20_000))
    else:  # nothing to differentiate, but a training step must pass through it
        sum(t.sum() for t in call(*free.values())).backward()
        assert all(t.grad is None or t.grad.isfinite().all() for t in free.values())


@pytest.mark.parametrize("op,dims", FIRST)
def test_compiles_into_one_graph(op: Op, dims: dict[str, int]) -> None:
    """Traced forward and backward without generated code: whether the graph is whole shows there, and takes a tenth of
    the time. Sizes are static, as in training."""
    torch._dynamo.reset()
    kwargs = make(op, dims, torch.float32)
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=False, backend="aot_eager")
    found = []
    for fn in (op.fn, compiled):
        free = {name: t for name, t in differentiated(op, kwargs).items() if name not in op.writes}
        result = results(op, fn, with_leaves(kwargs, free))
        if grown := [t.sum() for t in result.values() if t.requires_grad]:
            sum(grown).backward()
        found.append((*result.values(), *(t.grad for t in free.values())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)  # the same operations, possibly fused: the default for fp32
