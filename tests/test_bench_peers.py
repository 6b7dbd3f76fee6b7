"""Adapters of peers: equal results wherever their package runs here, a reason in a line wherever it does not.

With TRITON_INTERPRET=1 the Triton peers that are installed run in the interpreter, those that it can run.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity import assert_as_good, double, outputs

from bench import peers
from bench.ops import Case, bind_peer, disagreement, named
from bench.peers import base
from tt_kernels import OPS
from tt_kernels.launch import INTERPRET

# What runs on a CPU with nothing but torch, and cases for each that it has a form of.
ON_CPU = {
    "rms_norm": {"F.rms_norm": (dict(T=5, D=37), dict(T=0, D=8))},
    "experts": {
        "grouped_mm": (dict(T=9, D=16, N=24, E=6, K=3, gated=1, M=16), dict(T=245, D=16, N=16, E=2, K=1, M=32))
    },
    "context_attention": {
        "flash": (dict(B=1, L=2, Hq=2, Hkv=1, P=8, S=65, shuffled=0), dict(B=2, L=4, Hq=2, Hkv=1, P=8, S=0, causal=1)),
        "flex": (
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4),
            dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70, causal=1),
        ),
    },
    "causal_attention": {
        "flash": (dict(B=2, N=5, Hq=4, Hkv=2, P=3),),
        "flex": (dict(B=2, N=5, Hq=4, Hkv=2, P=3), dict(B=2, N=12, Hq=2, Hkv=2, P=8, packed=1)),
    },
    "block_diffusion_attention": {
        "flex": (
            dict(B=2, N=6, Hq=4, Hkv=2, P=3, S=2),
            dict(B=1, N=7, Hq=2, Hkv=1, P=8, S=4),
            dict(B=1, N=96, Hq=2, Hkv=2, P=29, S=12, packed=1),
        )
    },
    "sample": {"logits": (dict(R=6, V=11), dict(R=4, V=64, hot=0))},
    "head_sample": {"logits": (dict(R=6, D=16, V=37), dict(R=4, D=6, V=11, hot=0))},
    "mamba_block": {"apart": (dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4), dict(b=1, L=37, H=2, P=4, G=1, N=8, K=4))},
    "mamba_advance": {
        "apart": (dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4), dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4, ragged=0))
    },
    "mamba_step": {"apart": (dict(b=2, H=4, P=3, G=2, N=5, K=4),)},
    "linear_cross_entropy": {
        "F.linear_cross_entropy": (dict(B=2, N=5, D=6, V=11), dict(B=1, N=7, D=16, V=37, masked=100))
    },
}
CASES = [
    pytest.param(op, peer, dims, id=f"{op}-{peer}-{i}")
    for op, found in ON_CPU.items()
    for peer, cases in found.items()
    for i, dims in enumerate(cases)
]


def inputs(op: str, dims: dict[str, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    return OPS[op].inputs(torch.float32, **dims)


def call(op: str, name: str, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a peer returns; skips with its reason where it takes no part."""
    peer = peers.REGISTRY[op][name]
    try:
        with torch.no_grad():
            return peers.results(peer, OPS[op].outputs, peer.adapter(**kwargs)())
    except peers.Unavailable as why:
        pytest.skip(str(why))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.skipif(INTERPRET, reason="nothing of Triton")
@pytest.mark.parametrize(("op", "name", "dims"), CASES)
def test_equal_results(op: str, name: str, dims: dict[str, int]) -> None:
    """Held to the bound of our own kernels: the same mathematics in the same dtype."""
    kwargs, card = inputs(op, dims), OPS[op]
    high = outputs(card, card.reference(**double(kwargs)))
    low = outputs(card, card.reference(**kwargs))
    for output, got in call(op, name, kwargs).items():
        assert_as_good(output, got.to(low[output].dtype), low[output], high[output], 0.0, card.rms)


GRADIENTS = (
    "rms_norm-F.rms_norm-0",
    "experts-grouped_mm-1",
    "causal_attention-flash-0",
    "linear_cross_entropy-F.linear",
)


@pytest.mark.skipif(INTERPRET, reason="nothing of Triton")
@pytest.mark.parametrize(("op", "name", "dims"), [c for c in CASES if str(c.id).startswith(GRADIENTS)])
def test_equal_gradients(op: str, name: str, dims: dict[str, int]) -> None:
    kwargs, case = inputs(op, dims), Case(OPS[op], dims, torch.float32, True)
    if name == "F.linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    eager, peer = peers.peers_of(OPS[op], ["eager", name])
    want, got = (named(case, who, kwargs, bind_peer(case, who, [kwargs])[0]()) for who in (eager, peer))
    assert got.keys() == want.keys() and disagreement(want, got) == ""
    assert max(base.difference(got[k], want[k]) for k in want) < 1e-5


# ---- those in Triton, where installed, in the interpreter ----


INTERPRETED = {
    "ssd_block": {"mamba_ssm": dict(b=2, L=16, H=4, P=16, G=2, N=16)},
    "ssd_chunk": {"mamba_ssm": dict(b=1, L=64, H=2, P=16, G=1, N=16, Q=8, seeded=0, packed=1)},
    "ssd_step": {"mamba_ssm": dict(b=2, H=4, P=3, G=2, N=5)},
    "mamba_block": {"fla+mamba_ssm": dict(b=2, L=16, H=4, P=16, G=2, N=16, K=4)},
    "mamba_advance": {"fla+mamba_ssm": dict(b=1, L=32, H=2, P=16, G=1, N=16, K=4, ragged=0)},
    "mamba_step": {"fla+mamba_ssm": dict(b=2, H=4, P=3, G=2, N=5, K=4)},
    "linear_cross_entropy": {"liger": dict(B=1, N=7, D=16, V=37, masked=100)},
    "causal_conv1d": {"fla": dict(B=2, L=40, C=70, K=3)},
    "gated_group_norm": {"fla": dict(T=5, D=21, groups=3)},
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of a GPU as those packages ask for before they launch; autotuners take their first configuration."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner, driver

    begin = autotuner.Autotuner.__init__
    first = lambda self, fn, names, configs, *a, **k: begin(self, fn, names, (configs or [])[:1], *a, **k)
    monkeypatch.setattr(autotuner.Autotuner, "__init__", first)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda *a: torch.no_grad())
    for module in ("fla.modules.causal_conv1d", "fla.modules.norm.layernorm_gated"):  # it looks for a GPU on import
        with contextlib.suppress(peers.Unavailable):
            base.needs(module)
    stub = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        get_device_interface=lambda: torch.cuda,
        get_benchmarker=lambda: lambda *a, **k: 0.0,
    )
    driver.set_active(stub)
    yield
    driver._active = None


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not INTERPRET, reason="in the interpreter")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, found in INTERPRETED.items() for name in found])
def test_equal_results_interpreted(op: str, name: str, stand_in: None) -> None:
    kwargs = inputs(op, INTERPRETED[op][name])
    want = outputs(OPS[op], OPS[op].reference(**kwargs))
    for output, got in call(op, name, kwargs).items():
        assert base.difference(got, want[output]) < 1e-5, output


# ---- the registry ----


def test_registry_names_ops_and_outputs() -> None:
    for op, found in peers.REGISTRY.items():
        for name, peer in found.items():
            assert name == peer.name and set(peer.outputs or ()) <= set(OPS[op].outputs)
    assert {
        "flash",
        "cudnn",
        "flex",
        "fa3",
        "vllm",
        "grouped_mm",
        "triton_kernels",
        "sglang",
        "mamba_ssm",
        "fla",
    } < set(peers.names())
    assert {"liger", "causal_conv1d", "cut_cross_entropy", "F.rms_norm", "logits"} < set(peers.names())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")
def test_who_is_missing_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer on every op's first case: a result or a reason, never a traceback."""
    for op, found in peers.REGISTRY.items():
        for peer in found.values():
            if peer.name in ("flex", "compiled") or INTERPRET:
                continue
            try:
                peer.adapter(**inputs(op, OPS[op].cases[0]))
            except peers.Unavailable as why:
                assert 5 < len(str(why)) < 170 and "\n" not in str(why)


def test_a_package_that_does_not_load_is_a_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpeer.py").write_text("raise OSError('libcuda.so.1: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        peers.Unavailable, match=r"broken: brokenpeer does not load here: OSError: libcuda.so.1: cannot open$"
    ):
        base.needs("brokenpeer", "broken")
    with pytest.raises(peers.Unavailable, match=r"no-such is not installed \(bench/peers/README.md\)"):
        base.needs("no_such.part")
    with pytest.raises(peers.Unavailable, match="no-such is not installed"):
        base.bare_package("no_such")


def test_a_bare_package_runs_no_init(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavypeer").mkdir()
    (tmp_path / "heavypeer/__init__.py").write_text("raise ImportError('a CUDA extension')")
    (tmp_path / "heavypeer/light.py").write_text("value = 7")
    monkeypatch.syspath_prepend(str(tmp_path))
    base.bare_package("heavypeer")
    assert base.needs("heavypeer.light").value == 7
    for name in ("heavypeer", "heavypeer.light"):
        sys.modules.pop(name)


def test_differences() -> None:
    x = torch.randn(100)
    assert base.difference(x, x) == 0 and base.difference(1.01 * x, x) == pytest.approx(0.01, rel=1e-3)
    assert base.difference(x[:5], x) == float("inf")
    assert base.difference(torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([1, 2, 3, 5])) == 0.25
    assert base.difference(torch.ones(0), torch.ones(0)) == 0
    assert disagreement({"y": x}, {"y": 1.1 * x}).startswith("other results: y is 1.0e-01")
    assert disagreement({"y": x}, {"y": x, "z": x}) == "returns z, which we do not"


def test_a_row_compiles_once_and_the_next_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: made.append(options) or fn)
    monkeypatch.setattr(base, "_kept", {})
    for row in (1, 2):
        (peer,) = peers.peers_of(OPS["rms_norm"], ["compiled"])
        for _ in range(3):  # sets of operands
            peer.adapter(**inputs("rms_norm", dict(T=3, D=4)))()
        assert made == [dict(dynamic=False, fullgraph=True)] * row


def test_a_mask_serves_all_sets_of_a_row() -> None:
    base.fresh()
    dims = dict(B=1, N=16, Hq=2, Hkv=1, P=8, S=4, packed=1)
    flex = peers.REGISTRY["block_diffusion_attention"]["flex"]
    for size in (4, 4, 8):
        flex.adapter(**inputs("block_diffusion_attention", dims | dict(S=size)))
    assert len(base._kept) == 2
    peers.peers_of(OPS["rms_norm"])
    assert not base._kept
