"""Adapters of peers: equal results wherever their package runs here, a reason in a line wherever it does not.

With TRITON_INTERPRET=1 the Triton peers that are installed run in the interpreter, those that it can run.
"""

import contextlib
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from parity import assert_as_good, double, leaves, results

from bench import peers
from bench.ops import Case, bind_peer, disagreement, named
from bench.peers import base, paged
from cards import OPS
from tt_kernels.runtime.launch import INTERPRET

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
    "append_attention": {
        "sdpa": (
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4),
            dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70, counted=1),
            dict(B=2, L=4, Hq=2, Hkv=1, P=8, S=0, counted=1),
        ),
        "flex": (
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4),
            dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70),
            dict(B=1, L=1, Hq=2, Hkv=2, P=29, S=63, shuffled=0),
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
    high = results(card, card.reference, double(kwargs))
    low = results(card, card.reference, kwargs)
    found = call(op, name, kwargs)
    if name == "apart":
        found |= {written: leaves(kwargs)[written] for written in card.writes}
    for output, got in found.items():
        assert_as_good(output, got.to(low[output].dtype), low[output], high[output], 0.0, card.rms)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.skipif(INTERPRET, reason="nothing of Triton")
@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_what_is_appended(name: str) -> None:
    op, dims = OPS["append_attention"], dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70)
    kwargs, want = inputs("append_attention", dims), inputs("append_attention", dims)
    call("append_attention", name, kwargs)
    op.reference(**want)
    assert all(torch.equal(kwargs[pages], want[pages]) for pages in op.writes)


@pytest.mark.skipif(INTERPRET, reason="nothing of Triton")
@pytest.mark.parametrize("name", ["context_attention", "append_attention"])
def test_fa3_is_asked_for_the_splits_that_are_fastest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its library: reads the block from the cache, and takes the least time with 8 splits."""
    asked: list[int] = []

    def forward(*args: Any) -> None:
        q, keys, values, out, starts, lengths, table = *args[:3], args[6], args[7], args[11], args[14]
        L, causal, splits = args[12], args[24], args[30]
        asked.append(splits)
        before, B = lengths - L, len(table)
        own = [_in_rows(pages, table, before, L) for pages in (keys, values)]
        assert torch.equal(starts, torch.arange(0, B * L + 1, L)) and args[13] == lengths.max()
        q = q.unflatten(0, (B, L))
        o = OPS["context_attention"].reference(q, *own, keys, values, table, before, causal=causal, scale=args[23])
        out.copy_(o.flatten(0, 1))

    monkeypatch.setattr(paged, "on_gpu", lambda *a: None)
    monkeypatch.setattr(paged, "_forward", lambda: forward)
    monkeypatch.setattr(paged, "_seconds", lambda call: (call(), abs(asked[-1] - 8))[1])
    base.fresh()
    causal = dict(causal=1) if name == "context_attention" else {}
    kwargs = inputs(name, dict(B=2, L=3, Hq=4, Hkv=2, P=8, S=70, shuffled=2) | causal)
    want = OPS[name].reference(**kwargs)
    got = call(name, "fa3", kwargs)["o"]
    assert asked == [*paged.SPLITS, 8]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    call(name, "fa3", kwargs)
    assert asked == [*paged.SPLITS, 8, 8], "tried once a row"


def _in_rows(pages: torch.Tensor, table: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens first, first + 1, ... of each row: [B, count, H, P]."""
    position = first.long().view(-1, 1) + torch.arange(count)
    size = pages.shape[1]
    return pages[table.long().gather(1, position // size), position % size]


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


@pytest.mark.skipif(INTERPRET, reason="nothing of Triton")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor wants a C++ compiler")
def test_compiled_pytorch_computes_the_same() -> None:
    op, dims = OPS["gated_group_norm"], dict(T=5, D=21, groups=3)
    kwargs = inputs("gated_group_norm", dims)
    for backward in (False, True):
        case = Case(op, dims, torch.float32, backward)
        eager, compiled = peers.peers_of(op, ["eager", "compiled"])
        want, got = (named(case, who, kwargs, bind_peer(case, who, [kwargs])[0]()) for who in (eager, compiled))
        assert got.keys() == want.keys() and max(base.difference(got[k], want[k]) for k in want) < 1e-5


# Cases for which a package's own kernels run in the interpreter.
INTERPRETED = {
    "rms_norm": {"liger": dict(T=5, D=37)},
    "modulated_rms_norm": {"liger": dict(B=2, L=3, D=29, norm_first=1)},
    "mamba_block": {"fla+mamba_ssm": dict(b=2, L=16, H=4, P=16, G=2, N=16, K=4)},
    "mamba_advance": {"fla+mamba_ssm": dict(b=1, L=32, H=2, P=16, G=1, N=16, K=4, ragged=0)},
    "mamba_step": {"fla+mamba_ssm": dict(b=2, H=4, P=3, G=2, N=5, K=4)},
    "gated_group_norm": {"fla": dict(T=5, D=21, groups=3)},
    "causal_conv1d": {"fla": dict(B=2, L=40, C=70, K=3)},
    "ssd_block": {
        "mamba_ssm": dict(b=2, L=16, H=4, P=16, G=2, N=16),
        "fla": dict(b=2, L=16, H=4, P=16, G=2, N=16),
    },
    "ssd_chunk": {
        "mamba_ssm": dict(b=1, L=64, H=2, P=16, G=1, N=16, Q=8, seeded=0, packed=1),
        "fla": dict(b=1, L=64, H=2, P=16, G=1, N=16, Q=16, seeded=1),
    },
    "ssd_step": {"mamba_ssm": dict(b=2, H=4, P=3, G=2, N=5)},
    "route": {"sglang": dict(T=21, D=29, E=12, K=3, groups=4, kept=2)},
    "linear_cross_entropy": {
        "liger": dict(B=1, N=7, D=16, V=37, masked=100),
        "cut_cross_entropy": dict(B=1, N=20, D=64, V=200, masked=100),
    },
}
HALF = ("cut_cross_entropy",)  # 16-bit inputs only: held to a rounding of fp16
IN_THE_INTERPRETER = pytest.mark.skipif(
    not INTERPRET or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="in the interpreter, Triton 3.9's or later: older ones fail in these packages' loops",
)
PAIRS = [(op, name) for op, found in INTERPRETED.items() for name in found]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of a GPU as those packages ask for before they launch, and of a compiler as the interpreter lacks:
    libdevice, scalars and loop counters that are tensors. Autotuners take their first configuration."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner, driver, interpreter

    begin, convert = autotuner.Autotuner.__init__, interpreter._implicit_cvt
    first = lambda self, fn, names, configs, *a, **k: begin(self, fn, names, (configs or [])[:1], *a, **k)
    scalar = lambda x: interpreter.TensorHandle(interpreter.np.array([x], interpreter.np.float32), tl.float32)
    monkeypatch.setattr(autotuner.Autotuner, "__init__", first)
    monkeypatch.setattr(
        interpreter,
        "_implicit_cvt",
        lambda x: tl.tensor(scalar(x), tl.float32) if isinstance(x, float) else convert(x),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: types.SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(torch.cuda, "device", lambda *a: torch.no_grad())
    lacking = {
        "liger_kernel.ops.rms_norm": dict(rsqrt=lambda x: 1 / tl.sqrt(x)),
        "liger_kernel.ops.modulated_rms_norm": dict(rsqrt=lambda x: 1 / tl.sqrt(x)),
        "cut_cross_entropy.tl_utils": dict(tl_libdevice=types.SimpleNamespace(log1p=lambda x: tl.log(1 + x))),
        "fla.ops.common.chunk_h": dict(range=lambda *a: (tl.full((), i, tl.int32) for i in range(*map(int, a)))),
        # These look for a GPU on import: before there seems to be one.
        "fla.modules.causal_conv1d": {},
        "fla.modules.norm.layernorm_gated": {},
        "fla.ops.simple_gla": {},
    }
    for name, attributes in lacking.items():
        with contextlib.suppress(peers.Unavailable):
            module = base.needs(name)
            for attribute, value in attributes.items():
                monkeypatch.setattr(module, attribute, value, raising=False)
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


def interpreted(op: str, name: str, **dims: int) -> tuple[dict[str, Any], float]:
    """Inputs, and the difference that they allow: fp32's, or a rounding to 16 bits."""
    torch.manual_seed(0)
    half = name in HALF
    kwargs = OPS[op].inputs(torch.float16 if half else torch.float32, **INTERPRETED[op][name] | dims)
    return kwargs, 1e-3 if half else 1e-5


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
@IN_THE_INTERPRETER
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_equal_results_interpreted(op: str, name: str, stand_in: None) -> None:
    kwargs, bound = interpreted(op, name)
    want = results(OPS[op], OPS[op].reference, kwargs)
    for output, got in call(op, name, kwargs).items():
        assert base.difference(got, want[output]) < bound, output


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
@IN_THE_INTERPRETER
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, name in PAIRS if peers.REGISTRY[op][name].backward and not peers.REGISTRY[op][name].outputs],
)
def test_equal_gradients_interpreted(op: str, name: str, stand_in: None) -> None:
    # Of a state's gradient fla's convolution loads with a mask that the interpreter does not take.
    kwargs, bound = interpreted(op, name, **dict(seeded=0) if op == "causal_conv1d" else {})
    call(op, name, kwargs)  # or skip
    case = Case(OPS[op], INTERPRETED[op][name], torch.float32, True)
    eager, peer = peers.peers_of(OPS[op], ["eager", name])
    want, got = (named(case, who, kwargs, bind_peer(case, who, [kwargs])[0]()) for who in (eager, peer))
    assert got.keys() == want.keys()
    for output in got:
        assert base.difference(got[output], want[output]) < bound, output


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
