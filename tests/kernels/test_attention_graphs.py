"""Attention in graphs: torch.compile and torch.export, strict and not, with dynamic batch, block, pages and tokens: one
graph, which serves other sizes. References without TRITON_INTERPRET, kernels with it or on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as symbols
from parity import DEVICE, KERNELS
from torch import Tensor, nn
from torch.export import Dim, export

from tt_kernels import append_attention, block_diffusion_attention, causal_attention, context_attention
from tt_kernels.runtime.launch import ON_CPU

pytestmark = pytest.mark.kernels


class Module(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.fn(*tensors)


def paged(B: int, L: int, row_pages: int, pages: int) -> list[Tensor]:
    """q, k, v, pages, table, lengths: rows that have room for L more."""
    table = torch.randperm(pages)[: B * row_pages].view(B, row_pages).int()
    lengths = torch.randint(0, 4 * row_pages - L + 1, (B,)).int()
    return [torch.randn(B, L, 4, 8), *torch.randn(2, B, L, 2, 8), *torch.randn(2, pages, 4, 2, 8), table, lengths]


def clean(B: int, N: int) -> list[Tensor]:
    """q, k, v, k_clean, v_clean, cu_seqlens."""
    starts = torch.tensor(sorted({0, N // 2, min(N + 1, B * N), B * N}))
    return [torch.randn(B, N, 4, 8), *torch.randn(4, B, N, 2, 8), starts]


B, L, R, G, N, Q = (Dim(name) for name in ("B", "L", "R", "G", "N", "Q"))
PAGED = ({0: B, 1: L},) * 3 + ({0: G},) * 2 + ({0: B, 1: R}, {0: B})
CLEAN = ({0: B, 1: N},) * 5 + ({0: Q},)
PAGED_SIZES = [(3, 2, 4, 20), (2, 5, 3, 9), (4, 9, 6, 31), (1, 1, 2, 7)]
CLEAN_SIZES = [(3, 8), (2, 15), (5, 30), (1, 9)]
FORMS: dict[str, tuple[Callable[..., Tensor], Any, Callable[..., list[Tensor]], list[tuple[int, ...]]]] = {
    "context": (context_attention, PAGED, paged, PAGED_SIZES),
    "context causal": (lambda *t: context_attention(*t, causal=True, scale=0.5), PAGED, paged, PAGED_SIZES),
    "append": (append_attention, PAGED, paged, PAGED_SIZES),
    "append counted": (lambda *t: append_attention(*t, t[-1] - 2), PAGED, paged, PAGED_SIZES),
    "causal": (lambda q, k, v, *_: causal_attention(q, k, v), CLEAN, clean, CLEAN_SIZES),
    "packed": (lambda q, k, v, *t: causal_attention(q, k, v, cu_seqlens=t[-1]), CLEAN, clean, CLEAN_SIZES),
    "blocks": (lambda *t: block_diffusion_attention(*t[:5], block_size=3), CLEAN, clean, CLEAN_SIZES),
    "packed blocks": (
        lambda *t: block_diffusion_attention(*t[:5], block_size=3, cu_seqlens=t[5]),
        CLEAN,
        clean,
        CLEAN_SIZES,
    ),
}


def forms(*quick: str, references: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """All forms, the slow ones among them only in `make test-full`. A reference's graph is hundreds of operations, with
    a symbol for each size, and takes ten times as long as a kernel's, which is one: fewer of these."""
    quick = quick if KERNELS else references or quick
    return pytest.mark.parametrize(
        "form", [pytest.param(form, marks=() if form in quick else pytest.mark.slow) for form in FORMS]
    )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Sizes that happen to be equal (the tokens and the heads) are no reason for another graph."""
    torch.manual_seed(2)
    torch._dynamo.reset()
    with symbols.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


def agree(graph: Callable[..., Tensor], fn: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Results, and what is written."""
    ours, theirs = ([t.to(DEVICE).clone() for t in tensors] for _ in range(2))
    torch.testing.assert_close(graph(*ours), fn(*theirs))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@forms("context causal", "append counted", "packed", "blocks", references=("append counted", "packed"))
def test_one_graph_for_many_sizes(form: str) -> None:
    fn, _, make, sizes = FORMS[form]
    graph = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    agree(graph, fn, make(*sizes[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in sizes[1:-1]:
            agree(graph, fn, make(*size))
    if KERNELS:  # a size of 1 is a constant in every graph: a second one, of a reference in ten seconds
        agree(graph, fn, make(*sizes[-1]))


@pytest.mark.parametrize("strict", [pytest.param(True, id="strict", marks=pytest.mark.slow), False])
@forms("context", "append counted", "packed", "packed blocks", references=("context", "packed blocks"))
def test_export(form: str, strict: bool) -> None:
    fn, dims, make, sizes = FORMS[form]
    example = tuple(t.to(DEVICE) for t in make(*sizes[0]))
    graph = export(Module(fn), example, dynamic_shapes=(dims,), strict=strict).module()
    for size in sizes[:-1]:  # torch.export takes sizes of 1 for constants
        agree(graph, fn, make(*size))


@pytest.mark.skipif(ON_CPU, reason="the same as without kernels")
@forms("packed")
def test_gradients_of_a_graph(form: str) -> None:
    """Those of training, which run as the reference everywhere."""
    fn, _, make, sizes = FORMS[form]
    graph = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in sizes[:2]:
        tensors = [t.to(DEVICE) for t in make(*size)]
        found = []
        for call in (graph, fn):
            free = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
            call(*free).square().sum().backward()
            found.append([t.grad for t in free if t.grad is not None])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_graph_hides_no_nan() -> None:
    """It cannot look at values, and is right for any."""
    q, k, v = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 1, 4), torch.randn(1, 9, 1, 4)
    graph = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    q[0, 3, 0], k[0, 7] = torch.nan, torch.nan
    o = graph(*(t.to(DEVICE) for t in (q, k, v))).isnan().any(-1).cpu()
    assert torch.equal(o[0, :, 1], torch.arange(9) >= 7) and o[0, 3, 0] and int(o[0, :7].sum()) == 1
