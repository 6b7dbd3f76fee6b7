"""Passes by torch.compile: what is written, which passes are compiled, and what is refused."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import CONFIG, prompts_of, random_model
from torch._dynamo.utils import counters

from tt_kernels import ExpertWeights, Routing
from tt_kernels.reference import common, moe
from tt_model import TwoTower
from tt_model.engine.trace import Trace
from tt_model.modeling import compiled, linear

SMALL = dataclasses.replace(CONFIG, pattern="M*E", n_group=1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


OPTIONS = dict(max_new_tokens=24, eos_token_id=None, temperature=0.5, seed=3)


def test_what_is_written_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tt_model.modeling.compiled")
    model = random_model(SMALL)
    wanted = model.generate(prompts_of([5]), mode="ar", **OPTIONS).tokens
    before = graphs()
    model.compile_passes()
    assert model.generate(prompts_of([5]), mode="ar", **OPTIONS).tokens == wanted
    assert graphs() - before == 2  # what was tried, and the token
    assert "compiling a pass of kind extend over 1 tokens" in caplog.text


@pytest.fixture
def captured() -> Iterator[None]:
    """Graphs are captured, and run as they were: making code for each would take minutes."""
    compile, before = torch.compile, compiled._compiled
    with mock.patch.object(torch, "compile", lambda function, **more: compile(function, backend="eager", **more)):
        compiled._compiled = functools.cache(before.__wrapped__)
        yield
        compiled._compiled = before


def test_a_graph_serves_every_size_of_a_cache(captured: None) -> None:
    """And two models of different configs, ten graphs together, have all of theirs: torch.compile stops at 8 of one."""
    cases = [(mode, prompts_of([P])) for mode in ("ar", "mask_diffusion", "speculative", "mock_ar") for P in (5, 70)]
    for config in (SMALL, dataclasses.replace(SMALL, pattern="EM*")):
        model = random_model(config)
        wanted = [model.generate(prompts, mode=mode, **OPTIONS).tokens for mode, prompts in cases]
        model.compile_passes()
        before = graphs()
        for (mode, prompts), tokens in zip(cases, wanted, strict=True):
            assert model.generate(prompts, mode=mode, **OPTIONS).tokens == tokens, mode
        assert graphs() - before == 5  # a token and a block that enter, both denoised, a block that is verified


def test_which_passes_are_compiled() -> None:
    model, options = random_model(SMALL), OPTIONS
    model.compile_passes()
    with mock.patch.object(compiled, "run", side_effect=AssertionError("compiled")):
        model.generate(prompts_of([5, 9]), mode="ar", **options)  # several rows
        model.generate(prompts_of([5]), mode="mask_diffusion", block_size=4, **options)  # another size
        model.prefill(prompts_of([5]))
        twin = copy.deepcopy(model)
        with pytest.raises(AssertionError, match="compiled"):
            twin.generate(prompts_of([5]), mode="ar", **options)  # a copy is compiled, too
    # What the denoiser's experts get is counted, which a graph would not know of.
    with mock.patch.object(compiled, "run", lambda tower, *rest: towers.append(tower) or tower.layered(*rest)):
        for trace in (Trace(), Trace(model)):
            towers: list[object] = []
            with trace:
                model.generate(prompts_of([5]), mode="mask_diffusion", on_step=trace, **options)
            assert (model.denoiser_tower in towers) == (not trace.layers) and model.context_tower in towers


def test_without_a_compiler_it_says_so_and_generation_goes_on() -> None:
    model = random_model(SMALL)
    said = pytest.raises(ValueError, match=r"torch.compile fails here \(no g\+\+ found\).*C\+\+ compiler")
    with mock.patch.object(torch, "compile", side_effect=RuntimeError("no g++ found")), said:
        model.compile_passes()
    assert not model.context_tower.compiled
    model.generate(prompts_of([5]), mode="ar", max_new_tokens=2)


def test_only_a_cpu_has_passes_to_compile() -> None:
    with torch.device("meta"):
        model = TwoTower(SMALL)
    with pytest.raises(ValueError, match=r"compile_passes: the model is on meta.*expected a CPU"):
        model.compile_passes()


@pytest.mark.parametrize("product", [common.product, linear.product], ids=["kernels", "model"])
def test_a_compiled_product_of_one_row_is_split_between_threads(product) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1024, 512, generator=g), torch.randn(1, 512, generator=g)
    with (
        mock.patch.object(torch, "get_num_threads", lambda: 2),
        mock.patch.object(torch, "bmm", wraps=torch.bmm) as bmm,
    ):
        eager = product(x, weight)
    assert bmm.call_count == 1
    y = torch.compile(product, fullgraph=True)(x, weight)
    bound = 512 * 2**-24 * (x.abs() @ weight.abs().T)  # rounding of 512 products and sums
    for got in (y, eager):
        assert ((got - F.linear(x, weight)).abs() <= 2 * bound).all()


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_experts_of_a_token(gated: bool) -> None:
    g = torch.Generator().manual_seed(0)
    E, D, N, K = 6, 16, 8, 3
    up, gate, down = (torch.randn(E, *s, generator=g, dtype=torch.float64) for s in ((N, D), (N, D), (D, N)))
    weights = ExpertWeights(up, down, gate if gated else None)
    x = torch.randn(1, D, generator=g, dtype=torch.float64)
    for ids in ([4, 0, 5], [2, E, -1]):  # no expert: pairs that count nothing
        routing = Routing(torch.tensor([ids]), torch.rand(1, K, generator=g, dtype=torch.float64), None, None)
        wanted = moe.experts(x, routing, weights, activation="silu")
        got = torch.compile(moe.experts, fullgraph=True)(x, routing, weights, activation="silu")
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
