"""Adapters of peers: equal results wherever their package runs here, a reason in a line wherever it does not."""

from typing import Any

import pytest
import torch
from parity import assert_as_good, double, leaves, make, results

from bench import peers
from bench.ops import Case, bind_peer, disagreement, named
from bench.peers import base
from cards import OPS
from tt_kernels.runtime.launch import ON_CPU as AS_KERNELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.skipif(AS_KERNELS or torch.cuda.is_available(), reason="what a CPU says"),
]

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


@pytest.mark.parametrize(("op", "name", "dims"), CASES)
def test_equal_results(op: str, name: str, dims: dict[str, int]) -> None:
    """Held to the bound of our own kernels: the same mathematics in the same dtype."""
    card, kwargs, want = OPS[op], make(OPS[op], dims, torch.float32), make(OPS[op], dims, torch.float32)
    high, low = results(card, card.reference, double(want)), results(card, card.reference, want)
    card.reference(**want)
    peer = peers.REGISTRY[op][name]
    try:
        with torch.no_grad():
            found = peers.results(peer, card.outputs, peer.adapter(**kwargs)())
    except peers.Unavailable as why:
        pytest.skip(str(why))
    if name == "apart":
        found |= {written: leaves(kwargs)[written] for written in card.writes}
    for output, got in found.items():
        assert_as_good(output, got.to(low[output].dtype), low[output], high[output], 0.0, card.rms)
    if op == "append_attention":  # all of its peers enter the keys and values
        assert all(torch.equal(kwargs[written], want[written]) for written in card.writes)


GRADIENTS = ("rms_norm-F", "experts-grouped_mm-1", "causal_attention-flash-0", "linear_cross_entropy-F")


@pytest.mark.parametrize(("op", "name", "dims"), [c for c in CASES if str(c.id).startswith(GRADIENTS)])
def test_equal_gradients(op: str, name: str, dims: dict[str, int]) -> None:
    if name == "F.linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    kwargs, case = make(OPS[op], dims, torch.float32), Case(OPS[op], dims, torch.float32, True)
    eager, peer = peers.peers_of(OPS[op], ["eager", name])
    want, got = (named(case, who, kwargs, bind_peer(case, who, [kwargs])[0]()) for who in (eager, peer))
    assert got.keys() == want.keys() and disagreement(want, got) == ""
    assert max(base.difference(got[k], want[k]) for k in want) < 1e-5


@pytest.mark.parametrize("op", list(peers.REGISTRY))
def test_who_is_missing_says_so_in_a_line(op: str) -> None:
    """Every peer takes the arguments of the op's cases: a result or a reason, never a traceback."""
    for peer in (peer for peer in peers.REGISTRY[op].values() if peer.name != "flex"):
        assert set(peer.outputs or ()) <= set(OPS[op].outputs)
        for dims in OPS[op].cases[:3]:
            try:
                peer.adapter(**make(OPS[op], dims, torch.float32))
            except peers.Unavailable as why:
                assert 5 < len(str(why)) < 170 and "\n" not in str(why)


def test_a_package_that_does_not_load_is_a_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpeer.py").write_text("raise OSError('libcuda.so.1: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(peers.Unavailable, match=r"broken: brokenpeer does not load here: OSError: libcuda.so.1"):
        base.needs("brokenpeer", "broken")
    for look in (base.needs, base.bare_package):
        with pytest.raises(peers.Unavailable, match=r"no-such is not installed \(bench/peers/README.md\)"):
            look("no_such")


def test_differences() -> None:
    x = torch.randn(100)
    assert base.difference(x, x) == 0 and base.difference(1.01 * x, x) == pytest.approx(0.01, rel=1e-3)
    assert base.difference(x[:5], x) == float("inf")
    assert base.difference(torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([1, 2, 3, 5])) == 0.25
    assert disagreement({"y": x}, {"y": 1.1 * x}).startswith("other results: y is 1.0e-01")
    assert disagreement({"y": x}, {"y": x, "z": x}) == "returns z, which we do not"
    assert "y is nan" in disagreement({"y": x}, {"y": x * float("nan")})
