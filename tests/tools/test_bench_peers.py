"""Adapters of peers: equal results wherever their package runs here, a reason in a line wherever it does not."""

from typing import Any

import pytest
import torch
from parity import assert_as_good, double, leaves, make, results

from bench import peers
from bench.ops import Case, bind, disagreement, named
from bench.peers import base
from cards import OPS
from tt_kernels import Strategy
from tt_kernels.runtime.launch import ON_CPU as AS_KERNELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.skipif(AS_KERNELS or torch.cuda.is_available(), reason="what a CPU says"),
]

# What runs on a CPU with nothing but torch; of how many of the card's cases each has a form.
ON_CPU = {
    "rms_norm": ("F.rms_norm",),
    "experts": ("grouped_mm",),
    "experts_norm": ("apart",),
    "context_attention": ("flash", "flex"),
    "append_attention": ("sdpa", "flex"),
    "causal_attention": ("flash", "flex"),
    "block_diffusion_attention": ("flex",),
    "sample": ("logits",),
    "head_sample": ("logits",),
    "mamba_block": ("apart",),
    "mamba_advance": ("apart",),
    "mamba_step": ("apart",),
    "linear_cross_entropy": ("F.linear_cross_entropy",),
    "unmask_logits": ("published loops", "LLaDA", "Fast-dLLM", "Dream", "entropy bound"),
    "remask": ("LLaDA2.1", "WINO", "ReMDM"),
}
# Forms that a program has and no small case of the card.
MORE = {
    "unmask_logits": [dict(B=6, L=7, V=37, rules=2, hot=0), *(dict(B=6, L=9, V=37, rules=r) for r in (3, 4, 5, 6))],
    "remask": [dict(B=6, L=9, V=11, rules=rules, may=may) for rules in (1, 2, 4) for may in (0, 1)],
}
PAIRS = [(op, name) for op, names in ON_CPU.items() for name in names]


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_equal_results(op: str, name: str) -> None:
    """Held to the bound of our own kernels: the same mathematics in the same dtype."""
    if name == "F.linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    card, peer, right = OPS[op], peers.REGISTRY[op][name], 0
    for dims in (*card.cases, *MORE.get(op, ())):
        kwargs, want = make(card, dims, torch.float32), make(card, dims, torch.float32)
        high, low = results(card, card.reference, double(want)), results(card, card.reference, want)
        card.reference(**want)
        try:
            with torch.no_grad():
                found = peer.results(card, peer.call(card, kwargs)())
        except peers.Unavailable:
            continue
        if name == "apart":
            found |= {written: leaves(kwargs)[written] for written in card.writes}
        for output, got in found.items():
            assert_as_good(output, got.to(low[output].dtype), low[output], high[output], 0.0, card.rms)
        if op == "append_attention":  # all of its peers enter the keys and values
            assert all(torch.equal(kwargs[written], want[written]) for written in card.writes)
        right += 1
        if right == 3:
            break
    assert right, "no case of the card has a form of it"


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("causal_attention", dict(B=2, N=40, Hq=2, Hkv=1, P=8, packed=1, window=7, softcap=2)),
        ("context_attention", dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70, causal=1, window=20, softcap=2)),
        ("context_attention", dict(B=2, L=5, Hq=4, Hkv=1, P=8, S=30, window=3)),
    ],
)
def test_windows_and_soft_caps(op: str, dims: dict[str, int]) -> None:
    """flex_attention has both; the others say that they do not."""
    card = OPS[op]
    kwargs = make(card, dims, torch.float32)
    got = peers.REGISTRY[op]["flex"].call(card, kwargs)()
    assert base.difference(got, card.reference(**kwargs)) < 1e-5
    with pytest.raises(peers.Unavailable, match="neither windows nor soft caps"):
        peers.REGISTRY[op]["flash"].call(card, kwargs)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("Fast-dLLM", dict(strategy=Strategy.of(6, factor=0.9))),
        ("Fast-dLLM", dict(threshold=torch.linspace(0, 1, 6))),
        ("LLaDA", dict(steps_left=torch.arange(6))),
        ("Dream", dict(strategy=Strategy.of(6, confidence="margin", number=2, tempered=True))),
        ("Dream", dict(strategy=Strategy.of(6, confidence=["entropy"] * 6, number=torch.arange(6)))),
        ("entropy bound", dict(strategy=Strategy.of(6, confidence="entropy", entropy_bound=torch.linspace(0, 9, 6)))),
    ],
)
@pytest.mark.parametrize("shift", (False, True))
def test_published_rules_take_what_ours_take(name: str, rules: dict[str, Any], shift: bool) -> None:
    """Rows of none to all masked, a number a row: the same blocks, to the last position."""
    card, peer = OPS["unmask_logits"], peers.REGISTRY["unmask_logits"][name]
    for seed in range(3):
        kwargs = make(card, dict(B=6, L=12, V=41, rules=3), torch.float32, seed)
        kwargs["block"][:2] = torch.tensor([[7], [40]])
        if shift:  # the first two places have the same logits, and topk of equals takes any
            kwargs["block"][:, 0] = 7
        kwargs |= dict(threshold=None, steps_left=None, strategy=None, shift=shift) | rules
        want, got = card.fn(**kwargs), peer.results(card, peer.call(card, kwargs)())
        assert {"block", "committed"} <= set(got)
        for output, found in got.items():  # a softmax in fp64 beside one in fp32
            torch.testing.assert_close(found, getattr(want, output), rtol=1e-5, atol=0)
        assert want.committed[1:].any(-1).sum() > 2


@pytest.mark.parametrize(
    ("op", "name", "dims"),
    [
        ("rms_norm", "F.rms_norm", dict(T=5, D=37)),
        ("experts", "grouped_mm", dict(T=245, D=16, N=16, E=2, K=1, M=32)),
        ("causal_attention", "flash", dict(B=2, N=5, Hq=4, Hkv=2, P=3)),
    ],
)
def test_equal_gradients(op: str, name: str, dims: dict[str, int]) -> None:
    kwargs, case = make(OPS[op], dims, torch.float32), Case(OPS[op], dims, torch.float32, True)
    eager, peer = peers.peers_of(OPS[op], ["eager", name])
    want, got = (named(case, who, kwargs, bind(case, who, [kwargs])[0]()) for who in (eager, peer))
    assert got.keys() == want.keys() and disagreement(want, got) == ""
    assert max(base.difference(got[k], want[k]) for k in want) < 1e-5


@pytest.mark.parametrize("op", list(peers.REGISTRY))
def test_who_is_missing_says_so_in_a_line(op: str) -> None:
    """Every peer takes the arguments of the op's cases: a result or a reason, never a traceback."""
    for peer in (peer for peer in peers.REGISTRY[op].values() if peer.name != "flex"):
        assert set(peer.outputs or ()) <= set(OPS[op].outputs)
        for dims in OPS[op].cases[:3]:
            try:
                peer.call(OPS[op], make(OPS[op], dims, torch.float32))
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
