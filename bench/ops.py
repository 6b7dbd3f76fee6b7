"""One measured row per op, shape, dtype and pass, made from the op cards: right first, then how fast, and of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cards import OPS, Op
from tt_kernels.testing import copies_of_written, leaves, with_leaves

from .clock import Call, interleave, reason
from .measure import percentile, percentiles, ratio
from .oracle import DTYPES, Clock, Judgement, make, oracle
from .peers import TOLERANCE, Peer, Unavailable, difference, peers_of


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    op: Op
    dims: Mapping[str, int]
    dtype: torch.dtype
    backward: bool

    @property
    def name(self) -> str:
        return self.op.fn.__name__

    @property
    def which(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def id(self) -> str:
        dims = [f"{k}{v}" for k, v in self.dims.items()]
        return "-".join([self.name, *dims, DTYPES[self.dtype], self.which])


def cases(device: str, ops: Mapping[str, Op] = OPS) -> list[Case]:
    """On a GPU every shape of every card in bf16; on a CPU each card's largest small case in fp32. Forward, and
    backward where the card has gradients."""
    found = []
    for op in ops.values():
        shapes = op.shapes if device == "cuda" else (max(op.cases, key=lambda dims: sum(op.cost(4, **dims))),)
        dtype = low_dtype(op) if device == "cuda" else torch.float32
        for dims in shapes:
            found += [Case(op, dims, dtype, backward) for backward in ((False, True) if op.grads else (False,))]
    return found


def low_dtype(op: Op) -> torch.dtype:
    """bf16, or fp32 for an op whose inputs stay wide when bf16 is asked for."""
    kinds = {t.dtype for t in leaves(op.inputs(torch.bfloat16, **op.cases[0])).values()}
    return torch.bfloat16 if torch.bfloat16 in kinds else torch.float32


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes) that a pass cannot do without. A forward's stand on the card. A backward reads the same inputs,
    cotangents in place of outputs, and writes every gradient once; each product has two derivatives."""
    flops, moved = case.op.cost(case.dtype.itemsize, **case.dims)
    if not case.backward:
        return flops, moved
    with torch.device("meta"):
        inputs = leaves(case.op.inputs(case.dtype, **case.dims))
    gradients = sum(t.numel() * t.element_size() for name, t in inputs.items() if name in case.op.grads)
    return 2 * flops, moved + gradients


class Checked:
    """Judgements by op, shape and dtype, made once for both passes where one run of the op shows both."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.known: dict[tuple[Any, ...], tuple[str, Judgement]] = {}

    def __call__(self, case: Case) -> tuple[str, Judgement]:
        # Where gradients are wanted, an op whose kernels have no backward does not run as these.
        grads = case.backward or bool(case.op.grads and not case.op.forward_only)
        key = (case.name, tuple(case.dims.items()), case.dtype, grads)
        if key not in self.known:
            found, judgement = oracle(case.op, case.dims, case.dtype, self.clock, grads)
            self.known[key] = (found.note, judgement)
            del found
            self.clock.release()
        note, judgement = self.known[key]
        return note, judgement.of(case.op, case.backward)


@dataclass
class Row:
    """One line of the table, and of results/*.jsonl. Times in seconds a call."""

    op: str
    dims: dict[str, int]
    dtype: str
    which: str  # "forward" or "backward"
    kernel: bool  # False: the op has no kernel yet, its reference ran
    flops: int
    bytes: int
    oracle: str = ""
    error: float = 0.0
    eager_error: float = 0.0
    fault: str = ""  # why there is no time
    clock: str = ""  # "graph": device time by graph replay; "events": with the host's share; "wall"
    sets: int = 0
    rounds: int = 0
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    roof: float = 0.0  # seconds that the measured bandwidth and products would take; 0: not measured
    memory: float = 0.0  # bytes that a call needs besides its arguments, at its peak; 0: not measured
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)  # seconds, ratio to ours, clock; or why not

    @property
    def share(self) -> float:
        return self.roof / self.p50 if self.p50 else 0.0

    def record(self) -> dict[str, Any]:
        return vars(self) | {"share": self.share}


def ours(op: Op) -> Peer:
    return Peer("ours", lambda a: partial(op.fn, **vars(a)), backward=True)


def bind(case: Case, peer: Peer, sets: Sequence[dict[str, Any]]) -> list[Call]:
    """The measured call for every set of operands, whose result `named` reads; a backward's forward runs here."""
    if not case.backward:
        with torch.no_grad():
            return [torch.no_grad()(peer.call(case.op, kwargs)) for kwargs in sets]

    if not peer.backward:
        raise Unavailable(f"{peer.name}: forward only")
    if peer.outputs is not None and peer.outputs != case.op.outputs:
        raise Unavailable(f"{peer.name}: does not return all that we take gradients through")

    def backward(kwargs: dict[str, Any]) -> Call:
        free = _free(case, kwargs)
        found = peer.results(case.op, peer.call(case.op, with_leaves(kwargs, free))())
        grown = {name: t for name, t in found.items() if t.requires_grad}
        cotangents = [_cotangent(case.op.outputs.index(name), t) for name, t in grown.items()]
        wanted, outputs = list(free.values()), list(grown.values())
        return lambda: torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True)

    return [backward(kwargs) for kwargs in sets]


def _free(case: Case, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in leaves(kwargs).items() if name in case.op.grads}


def _cotangent(seed: int, t: Tensor) -> Tensor:
    """The same for everybody who computes this output."""
    return torch.randn(t.shape, device=t.device, generator=torch.Generator(t.device).manual_seed(seed)).to(t.dtype)


def named(case: Case, peer: Peer, kwargs: dict[str, Any], result: Any) -> dict[str, Tensor]:
    """What a bound call returned, by output, or by the argument whose gradient it is."""
    if not case.backward:
        return peer.results(case.op, result)
    return {f"d{name}": d for name, d in zip(_free(case, kwargs), result, strict=True) if d is not None}


def disagreement(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Why a peer's results are not ours, or nothing: then its adapter computes the same."""
    if extra := got.keys() - want.keys():
        return f"returns {', '.join(sorted(extra))}, which we do not"
    far = {name: difference(got[name], want[name]) for name in got}
    worst = next((name for name in far if not far[name] <= TOLERANCE), None)  # NaN too
    if worst is None:
        return ""
    return f"other results: {worst} is {far[worst]:.1e} from ours, above {TOLERANCE}"


def _apart(case: Case, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, copies of those that the op writes."""
    return with_leaves(kwargs, copies_of_written(case.op, kwargs))


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where; a NaN is itself."""
    return (a != b) & ~(a.isnan() & b.isnan())


def misplaced(case: Case, before: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Why a peer left other written arguments than we did, or nothing. Only what somebody changed is compared, in pages
    that are mostly left alone; a peer may write into memory of its own instead."""
    was, mine, found = (leaves(kwargs) for kwargs in (before, ours, theirs))
    for name in (name for name in found if name in case.op.writes):
        changed = _differs(found[name], was[name])
        if changed.any():
            changed |= _differs(mine[name], was[name])
            far = difference(found[name][changed], mine[name][changed])
            if not far <= TOLERANCE:
                return f"other results: {name}, which it writes, is {far:.1e} from ours, above {TOLERANCE}"
    return ""


def operands(case: Case, clock: Clock) -> list[dict[str, Any]]:
    """Sets of arguments in memory of their own, random each: as many as the clock wants and memory holds."""
    build = lambda seed: make(case.op, case.dims, case.dtype, clock.device, seed)
    room = clock.peak(lambda: [(kwargs := build(0)), bind(case, ours(case.op), [kwargs])[0]()])
    return [build(seed) for seed in range(clock.sets(cost(case)[1], room))]


def agreeing(
    case: Case, clock: Clock, kwargs: dict[str, Any], wanted: Sequence[str] | None
) -> tuple[dict[Peer, float], dict[str, str]]:
    """The peers that return what we do, and the bytes that each needs for a set of operands; why the others do not."""
    # All run on copies of what is written: each is to find it as the first did.
    before, written, own = _apart(case, kwargs), _apart(case, kwargs), ours(case.op)
    want = named(case, own, written, bind(case, own, [written])[0]())
    rooms: dict[Peer, float] = {}
    absent: dict[str, str] = {}
    for peer in peers_of(case.op, wanted):
        try:
            mine = _apart(case, before)
            found = named(case, peer, mine, bind(case, peer, [mine])[0]())
            eager = peer.name == "eager"  # which is the oracle itself
            if not eager and (why := disagreement(want, found) or misplaced(case, before, written, mine)):
                absent[peer.name] = why
                continue
            del found, mine
            # Of a later call: the first may compile and tune, in memory that no other needs.
            rooms[peer] = clock.peak(lambda peer=peer: bind(case, peer, [kwargs])[0]())
        except Unavailable as error:
            absent[peer.name] = str(error)
        except Exception as error:
            absent[peer.name] = reason(error)
    return rooms, absent


def measure(
    case: Case,
    clock: Clock,
    checked: Callable[[Case], tuple[str, Judgement]],
    roofs: Mapping[str, float] | None = None,
    peers: Sequence[str] | None = ("eager",),
    seconds: float = 1.0,
) -> Row:
    """The row of a case, with the peers named (None: all). One whose results are wrong is not timed, nor a kernel that
    waits for the host, nor a peer whose results are not ours."""
    flops, moved = cost(case)
    kernel = bool(case.op.kernels) and clock.device != "cpu" and not (case.backward and case.op.forward_only)
    row = Row(case.name, dict(case.dims), DTYPES[case.dtype], case.which, kernel, flops, moved)
    row.oracle, judgement = checked(case)
    row.error, row.eager_error = judgement.worst
    if judgement.faults:
        row.fault = "; ".join(judgement.faults.values())
        return row
    if roofs is not None:
        row.roof = max(moved / roofs["bandwidth"], flops / roofs["compute"])
    with clock.scope():
        sets = operands(case, clock)
        row.memory = clock.peak(bind(case, ours(case.op), sets[:1])[0])
        rooms, absent = agreeing(case, clock, sets[0], peers)
        row.peers |= {name: {"why": why} for name, why in absent.items()}
        # One number of sets for everybody, as the start of a graph is shared out over its calls; and for all of them
        # together, as what was bound stays in memory.
        del sets[clock.sets(moved, row.memory + sum(rooms.values())) :]
        calls = {"ours": bind(case, ours(case.op), sets)}
        for peer in rooms:
            try:
                calls[peer.name] = bind(case, peer, sets)
            except Exception as error:
                row.peers[peer.name] = {"why": reason(error)}
        samplers, how, errors = clock.samplers(calls)
        row.peers |= {name: {"why": why} for name, why in errors.items() if name != "ours"}
        if "ours" in errors or (kernel and how["ours"] == "events"):
            row.fault = errors.get("ours", "waits for the host: not fit for a CUDA graph")
            return row
        times = interleave(samplers, seconds)
    row.clock, row.sets, row.rounds = how["ours"], len(sets), len(times["ours"])
    vars(row).update(percentiles(times["ours"]))
    for name in times.keys() - {"ours"}:
        taken = percentile(times[name], 0.5)
        row.peers[name] = {"seconds": taken, "ratio": ratio(times, name, "ours"), "clock": how[name]}
    return row
