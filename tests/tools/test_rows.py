"""Rows of bench/: the oracle judges first, then what is timed, with whom, and how it reads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import clock, ops, oracle, report
from bench.peers import Peer, Unavailable, peers_of
from cards import OPS, Op

DIMS = dict(T=6, D=4)


def card(fn: Any = None, *, reference: Any = None, **fields: Any) -> Op:
    """An op that doubles: what it returns and what it should are up to the test."""

    def double(x: Tensor) -> Tensor:
        return 2 * x

    class Card(Op):
        reference = property(lambda _: twin)

    twin = reference or double
    given = dict(
        fn=fn or double,
        inputs=lambda dtype, T, D: dict(x=torch.randn(T, D, dtype=dtype)),
        cases=(DIMS,),
        shapes=(DIMS,),
        outputs=("y",),
        grads=("x",),
        cost=lambda itemsize, T, D: (T * D, 2 * T * D * itemsize),
    )
    return Card(**given | fields)


def a_case(op: Op, *, backward: bool = False, dtype: torch.dtype = torch.float32) -> ops.Case:
    return ops.Case(op, DIMS, dtype, backward)


class FakeClock(clock.HostClock):
    """Calls everything once and answers with the seconds it was given."""

    def __init__(self, seconds: dict[str, float], errors: dict[str, str] | None = None, how: str = "graph"):
        self.seconds, self.errors, self.how, self.device = seconds, errors or {}, how, "cpu"

    def samplers(self, calls: Any) -> Any:
        for c in calls.values():
            c[0]()
        timed = [name for name in calls if name not in self.errors]
        return {n: lambda n=n: self.seconds[n] for n in timed}, dict.fromkeys(timed, self.how), self.errors


def test_right_results_pass_with_their_errors() -> None:
    checked = ops.Checked(clock.HostClock())
    op = OPS["rms_norm"]
    for backward, names in ((False, {"y"}), (True, {"dx", "dweight"})):
        note, judgement = checked(ops.Case(op, op.cases[0], torch.float32, backward))
        assert note == "fp64" and judgement.faults == {} and set(judgement.errors) == names
        assert all(0 < ours < 1e-6 and 0 < theirs < 1e-6 for ours, theirs in judgement.errors.values())
    assert len(checked.known) == 1, "one run of the op showed both"


def test_wrong_results_are_red_in_their_pass() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2.001 * dy

    checked = ops.Checked(clock.HostClock())
    assert "y: error" in checked(a_case(card(lambda x: 2.001 * x)))[1].faults["y"]

    def wrong(x: Tensor) -> Tensor:
        return Wrong.apply(x)  # which takes no keywords under torch 2.11

    op = card(wrong)
    assert checked(a_case(op))[1].faults == {} and set(checked(a_case(op, backward=True))[1].faults) == {"dx"}
    nothing = ops.Checked(clock.HostClock())(a_case(card(lambda x: 2 * x.detach()), backward=True))[1]
    assert nothing.faults == {"dx": "there on one side only"}


def test_oracles_shrink_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "FEW", 2)
    limit = 0

    def reference(x: Tensor) -> Tensor:
        if x.nbytes > limit:
            raise torch.OutOfMemoryError
        return 2 * x

    notes = []
    for limit in (8 * 24, 8 * 8, 4 * 8):  # noqa: B007
        checked = ops.Checked(clock.HostClock())
        note, judgement = checked(a_case(card(reference=reference), dtype=torch.float16))
        notes.append(note)
        assert not judgement.faults
    assert notes == ["fp64", "fp64 T=2", "fp32 T=2"]
    limit = 0
    with pytest.raises(MemoryError, match="no oracle fits"):
        ops.Checked(clock.HostClock())(a_case(card(reference=reference)))


@pytest.mark.parametrize("backward", [False, True])
def test_a_row_has_times_shares_and_ratios(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("compiled", lambda a: lambda: 2 * a.x, backward=True)
    monkeypatch.setattr(ops, "peers_of", lambda op, wanted: [*peers_of(op, ["eager"]), peer])
    fake = FakeClock({"ours": 2e-6, "eager": 5e-6}, errors={"compiled": "does not compile"})
    roofs = {"bandwidth": 96e6, "compute": 1e12, "read": 96e6, "copy": 90e6}
    case = a_case(card(kernels=("_k_kernel",)), backward=backward, dtype=torch.bfloat16)
    row = ops.measure(case, fake, ops.Checked(fake), roofs, peers=("eager", "compiled"), seconds=0.0)
    assert (row.p20, row.p50, row.p80, row.rounds, row.sets) == (2e-6, 2e-6, 2e-6, 10, 1)
    assert row.roof == pytest.approx((1.5 if backward else 1) * 1e-6) and row.share == pytest.approx(row.roof / 2e-6)
    assert row.peers["eager"] == {"seconds": 5e-6, "ratio": pytest.approx(2.5), "clock": "graph"}
    assert row.peers["compiled"] == {"why": "does not compile"}
    text = " ".join("\n".join(report.row_table([row.record()])).split())
    assert f"| {75 if backward else 50} % |" in text and "| 2.50 |" in text
    assert f"no time of `compiled` (double {case.which}): does not compile" in text


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_with_other_results_is_not_timed(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(a: Any) -> Any:
        raise Unavailable("not installed")

    def square(x: Tensor) -> Tensor:  # right in the first row only
        return torch.cat([2 * x[:1], 2.2 * x[1:]])

    found = [
        Peer("wrong", lambda a: lambda: square(a.x), backward=True),
        Peer("absent", absent, backward=True),
        Peer("breaks", lambda a: lambda: a.x.view(-1, 5), backward=True),
        Peer("forward", lambda a: lambda: 2 * a.x),
        Peer("right", lambda a: lambda: a.x + a.x, backward=True),
    ]
    monkeypatch.setattr(ops, "peers_of", lambda op, wanted: found)
    fake = FakeClock({"ours": 1.0, "right": 1.5, "forward": 3.0})
    row = ops.measure(a_case(card(), backward=backward), fake, ops.Checked(fake), seconds=0.0)
    why = {name: peer["why"] for name, peer in row.peers.items() if "why" in peer}
    assert (
        why["wrong"].startswith(f"other results: {'dx' if backward else 'y'} is ") and why["absent"] == "not installed"
    )
    assert why["breaks"].startswith("RuntimeError: ") and row.peers["right"]["ratio"] == 1.5
    assert why.get("forward") == ("forward: forward only" if backward else None)


def test_peers_of_what_writes_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def append(x: Tensor, pages: Tensor, wrong: float = 0.0) -> Tensor:
        pages[2:4] = x[:2]
        result = pages[:4] + 1
        pages[2:4] += wrong
        return result

    def inputs(dtype: torch.dtype, T: int, D: int) -> dict[str, Tensor]:
        pages = torch.randn(2000, D, dtype=dtype)
        pages[1000:] = float("nan")  # never written
        return dict(x=torch.randn(T, D, dtype=dtype), pages=pages)

    found = [
        Peer("writes", lambda a: lambda: append(a.x, a.pages)),
        Peer("elsewhere", lambda a: lambda: append(a.x, a.pages.clone())),  # in memory of its own
        Peer("leaves", lambda a: lambda: append(a.x, a.pages, wrong=1.0)),
        Peer("half", lambda a: lambda: (a.pages[2:3].copy_(a.x[:1]), torch.cat([a.pages[:3], a.x[1:2]]) + 1)[1]),
    ]
    op = card(append, reference=append, inputs=inputs, grads=(), writes=("pages",))
    monkeypatch.setattr(ops, "peers_of", lambda op, wanted: found)
    fake = FakeClock(dict.fromkeys(("ours", "writes", "elsewhere"), 1.0))
    row = ops.measure(a_case(op), fake, lambda case: ("fp64", oracle.Judgement()), seconds=0.0)
    why = {name: peer["why"] for name, peer in row.peers.items() if "why" in peer}
    assert set(why) == {"leaves", "half"}, "few rows of many, and still seen"
    assert all(said.startswith("other results: pages, which it writes, is ") for said in why.values())


def test_wrong_rows_are_not_timed() -> None:
    fake = FakeClock({})  # would fail if asked
    row = ops.measure(a_case(card(lambda x: 3 * x)), fake, ops.Checked(fake))
    assert row.fault and not row.p50
    text = "\n".join(report.row_table([row.record()]))
    assert " RED | " in text and f"RED {row.op} T=6 D=4 forward: y: error" in text


def test_a_kernel_that_waits_for_the_host_is_red() -> None:
    fake = FakeClock({"ours": 1.0, "eager": 1.0}, how="events")
    assert not ops.measure(a_case(card()), fake, ops.Checked(fake)).fault  # a reference may
    on_device = FakeClock({"ours": 1.0, "eager": 1.0}, how="events")
    checked = ops.Checked(clock.HostClock())
    case = a_case(card(kernels=("_k_kernel",)))
    checked(case)
    on_device.device = "meta"
    row = ops.measure(case, on_device, checked, {"bandwidth": 1e12, "compute": 1e12})
    assert row.fault == "waits for the host: not fit for a CUDA graph"
    assert " RED | " in "\n".join(report.row_table([row.record()]))
