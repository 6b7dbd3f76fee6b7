"""`python -m profiling.predict OP`, `--pass denoise`, `--all`: what time every launch takes by a static model, and why.

Nothing runs on a GPU. Kernels are compiled for the target from the launches that meta tensors make; one warp is walked
through the machine code with ptxas's stall counts and scoreboards; loops get their trip counts from the launch's sizes.
Pipes times warps, the dependent chain times waves, and bytes each give a time, and the largest is the prediction.

  kernel    the launch, and how many of it there are; PyTorch's operations are in lower case without an underscore
  grid      programs
  per SM    programs that fit on a multiprocessor at once, and what stops more
  waves     programs over places for them: below 1, multiprocessors stay empty
  trips     iterations of the kernel's loops, a program
  main loop instructions of an iteration of its largest loop, by pipe: tensor cores by shape, fma, alu (integer, logic),
            imad, fp64, special (functions, conversions), lsu (memory), uniform
  MB        bytes from and to memory, and MB L2 those to and from multiprocessors
  KB fly    bytes that a multiprocessor can have asked for at once; the memory's rate times its latency is 23 for each
  waits     dependent waits of the slowest program, one after the other: 0.7 us each for memory, 0.17 for L2
  us        predicted, of one launch; by: what binds it: DRAM, L2, a pipe, or latency (the dependent chain)
  limit     bytes over the memory's rate or useful products over the tensor cores', the larger; of an op the card's
  lost      (us - limit) x launches: the list is sorted by it

What the model assumes stands in profiling/predict/rates.py (rates) and assume.py (what lies in memory);
docs/measurements.md says what it cannot see. "?" after trips marks loops or branches whose mapping is not sure: --json
has the reasons. `--fit` compares with recorded results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

from bench.measure import RESULTS, label, parser, positive, recorded, sizes
from bench.models import PUBLISHED
from cards import OPS
from tools.aot import on_meta
from tt_kernels.runtime.launch import INTERPRET, recording

from . import passes
from .model import Prediction, predict
from .rates import RATES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The table of whole passes: (pass, batch, tokens of whole sequences).
TABLE = (("denoise", 1, 0), ("denoise", 32, 0), ("commit", 1, 0), ("commit", 32, 0), ("ar", 1, 0), ("ar", 32, 0),
         ("prefill", 1, 2048), ("prefill", 1, 8192), ("clean", 1, 8192), ("noisy", 1, 8192))  # fmt: skip

# What --record keeps of ops: where they are furthest from their limits, and where their tiles change.
RECORDED: tuple[tuple[str, dict[str, int]], ...] = (
    *(("experts", dict(T=T)) for T in (16, 64, 256, 383, 512, 850, 1024, 2048, 4096, 8192)),
    *(("route", dict(T=T)) for T in (16, 512, 2048)),
    *(("head_sample", dict(R=R, hot=hot)) for R in (16, 64, 512) for hot in (1, 0)),
    *(("context_attention", dict(B=1, L=16, S=S)) for S in (2048, 32768, 131072)),
    *((name, dict(B=1, N=8192)) for name in ("causal_attention", "block_diffusion_attention")),
    ("ssd_chunk", dict(L=8192, Q=0)),
    ("ssd_chunk", dict(L=8192, Q=16)),
    ("unmask", dict(B=1, L=16)),
    ("unmask", dict(B=1, L=16, rules=1)),  # strategies beside the default rule
)
PREDICTED = RESULTS / "predicted.json"


class Row:
    """Launches that are alike: one line."""

    def __init__(self, name: str, seconds: float, limit: float, prediction: Prediction | None = None) -> None:
        self.name, self.seconds, self.limit, self.prediction, self.count = name, seconds, limit, prediction, 0

    @property
    def lost(self) -> float:
        return self.count * (self.seconds - self.limit)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(
            name=self.name, count=self.count, seconds=self.seconds, limit=self.limit, lost=self.lost
        )
        if (p := self.prediction) is not None:
            options = {k: v for k, v in p.options.items() if isinstance(v, bool | int | str)}
            found |= dict(
                grid=p.grid, options=options, registers=p.binary.registers, shared=p.binary.shared,
                warps=p.binary.warps, resident=p.resident, limited=p.limited, waves=p.waves, active=p.active,
                trips=p.iterations, main=p.main, read=p.read, written=p.written, traffic=p.traffic,
                in_flight=p.in_flight, waits=p.rounds, bounds=p.bounds, binds=p.binds, flops=p.flops,
                unsure=sorted(p.unsure),
            )  # fmt: skip
        return found


Near = Callable[[torch.Tensor], bool]


def _key(kernel: Any, grid: Sequence[int], args: Sequence[Any], options: Mapping[str, Any], near: Near) -> Any:
    def known(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype, near(value)
        if hasattr(value, "base"):  # a descriptor
            return known(value.base), tuple(value.block_shape)
        return tuple(map(known, value)) if isinstance(value, tuple) else value

    return kernel.__name__, tuple(grid), tuple(map(known, args)), tuple(sorted(options.items(), key=str))


class Predictor:
    """Predicts launches, each form once."""

    def __init__(self, target: int, context: int | None = None, hot: bool = True, near: Near = lambda t: False) -> None:
        self.target, self.context, self.hot, self.near = target, context, hot, near
        self.known: dict[Any, Prediction] = {}

    def __call__(self, kernel: Any, grid: Sequence[int], args: Sequence[Any], options: Mapping[str, Any]) -> Prediction:
        key = _key(kernel, grid, args, options, self.near)
        if key not in self.known:
            given, more = (kernel, grid, args, options), (self.context, self.hot, self.near)
            self.known[key] = predict(*given, self.target, *more)
        return self.known[key]

    def rows(self, seen: Sequence[Any]) -> list[Row]:
        found: dict[int, Row] = {}
        for launch in seen:
            p = self(*launch)
            row = found.setdefault(id(p), Row(p.kernel, p.seconds, p.limit, p))
            row.count += 1
        return list(found.values())


def record(name: str, dims: Mapping[str, int], target: int, dtype: torch.dtype, backward: bool = False) -> list[Any]:
    """The launches of an op's forward or backward at a shape, as its launchers make them on meta tensors."""
    op = OPS[name]
    with torch.device("meta"):
        inputs = op.inputs(dtype, **dims)
    grads = op.grads if backward else ()
    kwargs = {name: on_meta(value, grads, name) for name, value in inputs.items()}
    with torch.set_grad_enabled(backward), recording(target) as seen:
        result = op.fn(**kwargs)
        if backward:
            del seen[:]
            results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])
    return list(seen)


def of_op(name: str, dims: Mapping[str, int], target: int, dtype: torch.dtype, backward: bool = False) -> list[Row]:
    """The launches of one call, forward or backward."""
    return Predictor(target, hot=bool(dims.get("hot", 1))).rows(record(name, dims, target, dtype, backward))


def of_pass(
    kind: str, target: int, batch: int, context: int, length: int, hot: bool = True
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a pass of the published model, and its totals."""
    r = RATES[target]
    found = passes.record(PUBLISHED, kind, batch=batch, context=context, length=length, target=target)
    rows = Predictor(target, context, hot, found.near).rows(found.launches)
    others: dict[Any, Row] = {}
    for o in found.operations:
        row = others.setdefault((o.name, o.shape, o.bytes), Row(f"{o.name} {list(o.shape)}", o.seconds(r), o.limit(r)))
        row.count += 1
    rows += others.values()
    kernels = sum(row.count * row.seconds for row in rows)
    nodes = len(found.launches) + len(found.operations)
    totals = dict(
        kind=kind, batch=batch, context=context, length=length, target=target, kernels=kernels,
        limit=sum(row.count * row.limit for row in rows), graph=kernels + nodes * r.node,
        floor=passes.least(PUBLISHED, kind, r, batch=batch, context=context),
        triton=len(found.launches), aten=len(found.operations),
    )  # fmt: skip
    return rows, totals


def summed(
    name: str, dims: Mapping[str, int], rows: Sequence[Row], target: int, dtype: torch.dtype, backward: bool = False
) -> dict[str, Any]:
    """An op's time beside its card's limit."""
    flops, moved = OPS[name].cost(dtype.itemsize, **dims)
    limit = max(moved / RATES[target].dram, flops / RATES[target].products) * (1 if not backward else 2)
    return dict(op=name, dims=dict(dims), seconds=sum(row.count * row.seconds for row in rows), limit=limit)


def of_shape(name: str, wanted: Mapping[str, int], target: int) -> dict[str, Any]:
    dims = nearest(name, wanted)
    return summed(name, dims, of_op(name, dims, target, torch.bfloat16), target, torch.bfloat16)


def keep(found: Sequence[dict[str, Any]]) -> None:
    """Puts an op's predictions behind the recorded ones, but those of the same shapes."""
    known = json.loads(PREDICTED.read_text())
    if known["triton"] != triton.__version__:
        raise SystemExit(f"recorded with Triton {known['triton']}, here is {triton.__version__}: use --all --record")
    shapes = [(new["op"], new["dims"]) for new in found]
    known["ops"] = [x for x in known["ops"] if (x["op"], x["dims"]) not in shapes] + list(found)
    PREDICTED.write_text(json.dumps(known, indent=1) + "\n")


# ---- what is printed ----


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def print_rows(console: Console, rows: Sequence[Row], title: str) -> None:
    columns = ("kernel", "grid", "per SM", "waves", "trips", "main loop", "MB", "MB L2", "KB fly", "waits", "us", "by",
               "limit", "lost")  # fmt: skip
    table = Table(title=title, title_justify="left")
    for column in columns:
        text = column in ("kernel", "per SM", "trips", "main loop", "by")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: -row.lost):
        p, name = row.prediction, row.name + (f" x{row.count}" if row.count > 1 else "")
        times = (_number(1e6 * row.limit), _number(1e6 * row.lost))
        if p is None:
            table.add_row(name, *[""] * 9, _number(1e6 * row.seconds), "", *times)
            continue
        loops = " ".join(_number(n) for _, n in sorted(p.iterations.items())) + "?" * bool(p.unsure)
        table.add_row(
            name, "x".join(map(str, p.grid)), f"{p.resident} {p.limited}", f"{p.waves:.2f}", loops,
            " ".join(f"{what} {n:.0f}" for what, n in p.main.items() if what != "issue"), _number(p.bytes / 1e6),
            _number(p.traffic / 1e6), _number(p.in_flight / 1024), _number(p.rounds), _number(1e6 * row.seconds),
            p.binds, *times,
        )  # fmt: skip
    console.print(table)


def print_totals(console: Console, totals: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Whole passes, ms: predictions, not measurements", title_justify="left")
    for column in ("pass", "batch", "kernels", "limit", "in a graph", "floor", "over it", "Triton + ATen"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for t in totals:
        ms = ["" if t[name] is None else f"{1e3 * t[name]:.2f}" for name in ("kernels", "limit", "graph", "floor")]
        kind = f"{t['kind']} {t['length'] or ''}".strip()
        table.add_row(
            kind, str(t["batch"]), *ms, f"{t['graph'] / (t['floor'] or t['limit']):.2f}", f"{t['triton']} + {t['aten']}"
        )
    console.print(table)


# ---- against measurements ----


def fit(lines: Sequence[Mapping[str, Any]], tell: Callable[[str], None], target: int = 90) -> float | None:
    """Compares predictions with recorded rows of ops on a GPU; the mean error, in parts of the measured time."""
    errors = []
    for line in lines:
        if (
            line.get("op") not in OPS
            or not line.get("kernel")
            or not line.get("p50")
            or line.get("dtype") not in DTYPES
        ):
            continue
        backward = line.get("which") == "backward"
        try:
            rows = of_op(line["op"], line["dims"], target, DTYPES[line["dtype"]], backward)
        except Exception as error:  # a row of another commit: its shape may not exist any more
            tell(f"{line['op']} {label(line['dims'])}: no prediction ({error})")
            continue
        # The chain ends when the slowest launch ends; launches of an op follow each other, each with its node's time.
        predicted = sum(row.count * (row.seconds + RATES[target].node) for row in rows)
        off = predicted / line["p50"] - 1
        errors.append(off)
        what = f"{line['op']} {label(line['dims'])} {line['dtype']} {line.get('which', 'forward')}"
        tell(f"{what}: predicted {1e6 * predicted:.1f} us, measured {1e6 * line['p50']:.1f} ({off:+.0%})")
    if not errors:
        tell("nothing to compare: no rows of ops on a GPU, and none is here")
        return None
    mean = sum(map(abs, errors)) / len(errors)
    tell(f"{len(errors)} rows, mean error {mean:.0%}, mean bias {sum(errors) / len(errors):+.0%}")
    return mean


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("profiling.predict", __doc__)
    p.add_argument("op", nargs="?", metavar="OP", help="an op by its card's name")
    p.add_argument("--shape", type=sizes, metavar="T=16,..", help="sizes; others as in the card's nearest shape")
    p.add_argument(
        "--beside", type=sizes, metavar="rules=1,..", help="of the op: the same with these sizes, and a ratio"
    )
    p.add_argument("--backward", action="store_true", help="of the op: its backward")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    p.add_argument("--pass", dest="kind", choices=passes.PASSES, help="a whole pass of the published model")
    p.add_argument("--all", action="store_true", help="totals of all passes")
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument("--context", type=positive, default=2048, help="tokens in the cache (default: %(default)s)")
    p.add_argument("--length", type=positive, help="tokens of prefill, clean and noisy (default: 2048, 8192, 8192)")
    p.add_argument("--greedy", action="store_true", help="of a pass: temperature 0 (an op's shape says it: hot=0)")
    p.add_argument("--target", type=lambda text: int(text.removeprefix("sm_")), default=90, help="sm_80, sm_90, sm_100")
    p.add_argument("--json", type=Path, metavar="FILE", help="all of it, with what is not sure")
    record = "with --all: totals and some ops for SPEED.md (make report); with OP: it beside what is there"
    p.add_argument("--record", action="store_true", help=record)
    p.add_argument("--fit", nargs="?", const="", metavar="FILE", help="compare with results (default: bench/results)")
    o = p.parse_args(arguments)
    if INTERPRET:
        p.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    if o.beside and not o.op:
        p.error("--beside needs an OP")
    if o.target not in RATES:
        p.error(f"--target is sm_{o.target}, there are {', '.join(f'sm_{sm}' for sm in RATES)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    out: list[Any] = []
    if o.fit is not None:
        files = [Path(o.fit)] if o.fit else sorted(RESULTS.glob("*.jsonl"))
        lines = [line for file in files for line in recorded(file)]
        fit([x for x in lines if not o.op or x.get("op") == o.op], console.print, o.target)
    elif o.all or o.kind:
        chosen = TABLE if o.all else ((o.kind, o.batch, 0),)
        totals = []
        for kind, batch, length in chosen:
            whole = kind in ("prefill", "clean", "noisy")
            length = (o.length or length or (2048 if kind == "prefill" else 8192)) if whole else 0
            rows, total = of_pass(kind, o.target, batch, o.context, length, not o.greedy)
            totals.append(total)
            out.append(total | dict(rows=[row.record() for row in rows]))
            if not o.all:
                print_rows(console, rows, f"{kind}, batch {batch}, {o.context} tokens before, sm_{o.target}: predicted")
        print_totals(console, totals)
        if o.record and o.all:
            ops = [of_shape(name, dims, o.target) for name, dims in RECORDED]
            PREDICTED.write_text(json.dumps(dict(triton=triton.__version__, passes=totals, ops=ops), indent=1) + "\n")
    elif o.op:
        if o.op not in OPS or not OPS[o.op].kernels:
            p.error(f"OP is {o.op}, expected one of {', '.join(name for name, op in OPS.items() if op.kernels)}")
        base = nearest(o.op, o.shape or {})
        for dims in (base, base | o.beside) if o.beside else (base,):
            rows = of_op(o.op, dims, o.target, DTYPES[o.dtype], o.backward)
            print_rows(console, rows, f"{o.op} {label(dims)} {o.dtype}, sm_{o.target}: predicted, us")
            found = summed(o.op, dims, rows, o.target, DTYPES[o.dtype], o.backward)
            console.print(
                f"{_number(1e6 * found['seconds'])} us, the card's limit is {_number(1e6 * found['limit'])} us"
            )
            out.append(found | dict(rows=[row.record() for row in rows]))
        if o.record:
            keep([{name: found[name] for name in ("op", "dims", "seconds", "limit")} for found in out])
        if o.beside:
            first, second = (found["seconds"] for found in out)
            console.print(f"with {label(o.beside)} {second / first:.2f} times {label(base)}'s")
    else:
        p.error("name an OP, or --pass, or --all")
    if o.json:
        o.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0


def nearest(name: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """The card's shape that shares most of the sizes wanted, with the others changed to them."""
    best = max(OPS[name].shapes, key=lambda dims: sum(dims.get(k) == v for k, v in wanted.items()))
    return {**best, **wanted}


if __name__ == "__main__":
    sys.exit(main())
