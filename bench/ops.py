"""One measured row per op, shape, dtype and pass, made from the op cards: right first, then how fast, and of what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from tt_kernels import OPS, Op

from .clock import Call, interleave, percentile, reason
from .measure import ratio, table
from .oracle import DTYPES, Clock, Judgement, differentiable, leaves, make, oracle


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
    def shape(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.dims.items())

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
            whole = found.wide == torch.float64 and found.dims == case.dims
            self.known[key] = ("fp64" if whole else found.note, judgement)
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
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)  # seconds, ratio to ours, clock; or why not
    samples: list[float] = field(default_factory=list, repr=False)

    def record(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"} | {"share": self.share}

    @property
    def share(self) -> float:
        return self.roof / self.p50 if self.p50 else 0.0


def bind(case: Case, fn: Callable[..., Any], sets: Sequence[dict[str, Any]]) -> list[Call]:
    """The measured call for every set of operands; a backward's forward runs here."""
    if not case.backward:

        def forward(kwargs: dict[str, Any]) -> Any:
            with torch.no_grad():
                return fn(**kwargs)

        return [lambda kwargs=kwargs: forward(kwargs) for kwargs in sets]

    def backward(kwargs: dict[str, Any]) -> Call:
        free, grown, _ = differentiable(case.op, fn, kwargs)
        cotangents = [torch.randn_like(t) for t in grown]
        wanted = list(free.values())
        return lambda: torch.autograd.grad(grown, wanted, cotangents, retain_graph=True, allow_unused=True)

    return [backward(kwargs) for kwargs in sets]


def operands(case: Case, clock: Clock) -> list[dict[str, Any]]:
    """Sets of arguments in memory of their own, random each: as many as the clock wants and memory holds."""
    build = lambda seed: make(case.op, case.dims, case.dtype, clock.device, seed)
    room = clock.peak(lambda: [(kwargs := build(0)), [call() for call in bind(case, case.op.fn, [kwargs])]])
    return [build(seed) for seed in range(clock.sets(cost(case)[1], room))]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    from torch._functorch import config

    config.donated_buffer = False  # a backward that runs more than once must not give its saved tensors away
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False, fullgraph=True)


PEERS: dict[str, Callable[[Op], Callable[..., Any]]] = {
    "eager": lambda op: op.reference,
    "compiled": lambda op: compiled(op.reference),
}


def measure(
    case: Case,
    clock: Clock,
    checked: Callable[[Case], tuple[str, Judgement]],
    roofs: Mapping[str, float] | None = None,
    peers: Sequence[str] = ("eager",),
    seconds: float = 1.0,
) -> Row:
    """The row of a case. One whose results are wrong is not timed, nor a kernel that waits for the host."""
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
        calls = {"ours": bind(case, case.op.fn, sets)}
        for name in peers:
            if name == "compiled" and not case.op.compiles:
                continue
            try:
                fn = PEERS[name](case.op)
                room = clock.peak(lambda fn=fn: [call() for call in bind(case, fn, sets[:1])])
                # 32 calls of a peer, of ten kernels and more each, are long enough to time.
                calls[name] = bind(case, fn, sets[: min(32, clock.sets(moved, room))])
            except Exception as error:
                row.peers[name] = {"why": reason(error)}
        samplers, how, errors = clock.samplers(calls)
        row.peers |= {name: {"why": why} for name, why in errors.items() if name != "ours"}
        if "ours" in errors or (kernel and how["ours"] == "events"):
            row.fault = errors.get("ours", "waits for the host: not fit for a CUDA graph")
            return row
        times = interleave(samplers, seconds)
    row.samples, row.clock, row.sets, row.rounds = times["ours"], how["ours"], len(sets), len(times["ours"])
    row.p20, row.p50, row.p80 = (percentile(row.samples, share) for share in (0.2, 0.5, 0.8))
    for name in times.keys() - {"ours"}:
        row.peers[name] = {
            "seconds": percentile(times[name], 0.5),
            "ratio": ratio(times, name, "ours"),
            "clock": how[name],
        }
    return row


# ---- how it reads ----


def report(rows: Sequence[Row], roofs: Mapping[str, float] | None) -> Iterator[str]:
    """The table of a run, and what is wrong below it."""
    if roofs:
        yield (
            f"Measured roofs: read {roofs['read'] / 1e12:.2f} TB/s, copy {roofs['copy'] / 1e12:.2f} TB/s, "
            f"cuBLAS bf16 {roofs['compute'] / 1e12:.0f} TFLOP/s; a row's: the larger of its times by them\n"
        )
    header = ["op", "shape", "pass", "p50 us", "p20-p80", *(("TB/s", "TFLOP/s", "of roof") if roofs else ())]
    header += ["error", "eager's", "eager/ours", *(["compiled/ours"] if roofs else []), "notes"]
    lines = []
    for row in rows:
        cells = [row.op, " ".join(f"{k}={v}" for k, v in row.dims.items()), row.which]
        if row.fault:
            cells += ["RED"] + [""] * (len(header) - 5) + ["see below"]
        else:
            cells += [f"{1e6 * row.p50:.1f}", f"{1e6 * row.p20:.1f}-{1e6 * row.p80:.1f}"]
            if roofs:
                rates = (row.bytes / row.p50 / 1e12, row.flops / row.p50 / 1e12)
                cells += [f"{rates[0]:.2f}", f"{rates[1]:.1f}", f"{100 * row.share:.0f} %"]
            cells += [f"{row.error:.1e}", f"{row.eager_error:.1e}", _times(row, "eager")]
            cells += [*([_times(row, "compiled")] if roofs else []), notes(row)]
        lines.append(cells)
    yield table(header, lines)
    yield from (f"RED {row.op} {row.dims} {row.dtype} {row.which}: {row.fault}" for row in rows if row.fault)
    untimed = [(f"{row.op} {row.which}, {n}", p["why"]) for row in rows for n, p in row.peers.items() if "why" in p]
    yield from (f"{what}: no time: {why}" for what, why in dict.fromkeys(untimed))


def _times(row: Row, peer: str) -> str:
    found = row.peers.get(peer, {})
    return f"{found['ratio']:.2f}" + ("*" if found["clock"] == "events" else "") if "ratio" in found else "-"


def notes(row: Row) -> str:
    """What makes a row other than the rule: kernel, bf16, graph, four sets, an fp64 oracle of the whole shape."""
    found = [] if row.kernel else ["CPU, reference" if row.clock == "wall" else "reference"]
    found += [row.dtype] if row.dtype != "bf16" and row.clock != "wall" else []
    found += ["host's share in it"] if row.clock == "events" else []
    found += [f"{row.sets} sets"] if row.sets < 4 and row.clock != "wall" else []
    found += [f"oracle {row.oracle}"] if row.oracle != "fp64" else []
    found += ["ABOVE THE ROOF: its inputs hold less work than its cost counts, or its clock is wrong"] * (row.share > 1)
    return ", ".join(found)
