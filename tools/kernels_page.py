"""`python -m tools.kernels_page`: docs/kernels.md from cards, docstrings and recorded results, nothing by hand.

--check says whether the page is what they give, and writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import tt_kernels
from bench.measure import label, table
from bench.report import machines, row_table
from bench.targets import H200
from cards import OPS, Op
from cards.elsewhere import ELSEWHERE, PACKAGES
from tt_kernels.runtime.registry import SERVED
from tt_model.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/kernels.md", ROOT / "bench/results"
LABELS = ("Numerics", "Gradients", "Raises", "Cost", "Source", "Example")  # of a docstring, behind its results
FAMILIES = {
    "norm": "Norms",
    "conv1d": "Convolution",
    "ssm": "Mamba-2",
    "moe": "Mixture of experts",
    "attention": "Attention",
    "sampling": "Sampling and masked diffusion",
    "loss": "Loss",
}
HEAD = """# The ops

Made by `python -m tools.kernels_page` from the docstrings, the cards and `bench/results/`: do not edit it. All are
imported from `tt_kernels`; `tt_kernels.reference` has a twin of each in plain PyTorch, which runs on a CPU and says
what is right. Every example runs as it stands, on a CPU too.

- Kernels are made for GPUs of compute capability {served}, for bf16, fp16 and fp32. A GPU, dtype or
  format without a kernel raises NotImplementedError: nothing falls back silently. On a CPU every float dtype runs.
- A bad argument raises ValueError, which names it, before anything is computed.
- All ops run under autocast and in `torch.compile(fullgraph=True)`.
- Work and bytes in the tables are counted, for 2 bytes a number. An H200's limit is the larger of the bytes at
  {bandwidth:g} TB/s and the flops at {compute:g} TFLOP/s: arithmetic. Times are recorded ones."""
NO_GPU = "**No op has been measured on a GPU yet.** [SPEED.md](../SPEED.md) has what a CPU gave: the references."
UNMEASURED = "Comparison: not measured on a GPU."
TABLE = """## The same elsewhere

The nearest that other packages have; layouts and arguments differ. An empty cell: nothing that we found. Read in their
sources: fla-core 0.6.0, liger-kernel 0.8.5, the others' repositories of 2026."""


def parts(op: Op) -> dict[str, str]:
    """A docstring in its parts: effect, Args, Returns, and those of LABELS."""
    doc = inspect.getdoc(op.fn) or ""
    found = re.split(rf"^({'|'.join(('Args', 'Returns', *LABELS))}):", doc, flags=re.MULTILINE)
    return {"effect": found[0].strip()} | dict(zip(found[1::2], found[2::2], strict=True))


def signature(op: Op) -> str:
    """As it is written, without the names of modules and where it returns; over several lines where it is long."""
    text = re.sub(r"\b(?:torch|tt_kernels(?:\.\w+)+)\.(?=[A-Z])", "", str(inspect.signature(op.fn)))
    arguments, _, result = text.rpartition(" -> ")
    line = f"{op.fn.__name__}{arguments} -> {result}"
    if len(line) <= 112:
        return line
    pieces = re.split(r", (?![^\[(]*[\])])", arguments[1:-1])
    return "\n".join([f"{op.fn.__name__}(", *(f"    {piece}," for piece in pieces), f") -> {result}"])


def listed(text: str) -> Iterator[str]:
    """ "name: what it is", continued by indented lines, as items of a list."""
    block = textwrap.dedent(text.strip("\n"))
    entries = re.findall(r"^(\S.*?)$((?:\n[ \t]+.*$|\n(?=\n?[ \t]))*)", block, re.MULTILINE)
    for first, rest in entries:
        name, colon, what = " ".join((first + rest).split()).partition(":")
        names = ", ".join(f"`{each.strip()}`" for each in name.split(","))
        yield wrapped(f"- {names}:{what}" if what else f"- {name}{colon}", "  ")


def wrapped(text: str, indent: str = "") -> str:
    """One paragraph or item, stars outside of code as stars."""
    pieces = " ".join(text.split()).split("`")
    pieces[::2] = [piece if "**When" in piece else piece.replace("*", r"\*") for piece in pieces[::2]]
    options = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return textwrap.fill("`".join(pieces), 120, **options)


def prose(text: str) -> str:
    """Paragraphs, and tables as they stand."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(p if p.startswith("|") else wrapped(p) for p in paragraphs)


def example(text: str) -> str:
    """The docstring's example as a program: what it needs is imported, what a line shows stands behind it."""
    lines = doctest.DocTestParser().get_examples(text)
    used = {n.id for line in lines for n in ast.walk(ast.parse(line.source)) if isinstance(n, ast.Name)}
    public = sorted(used & set(tt_kernels.__all__), key=lambda name: (name.islower(), name))
    shown = (line.source.rstrip() + (f"  # {line.want.strip()}" if line.want else "") for line in lines)
    return "\n".join(["import torch", "", f"from tt_kernels import {', '.join(public)}", "", *shown])


def costs(op: Op) -> str:
    """Of the published shapes: work, bytes, and how long an H200 needs for them at the least."""
    rows = []
    for dims in op.shapes:
        flops, moved = op.cost(2, **dims)
        limit = max(moved / H200["bandwidth"], flops / H200["compute"])
        rows.append((label(dims), f"{flops / 1e9:.3g}", f"{moved / 1e6:.3g}", f"{1e6 * limit:.3g}"))
    return table(("shape", "GFLOP", "MB", "H200's limit, us"), rows)


def section(op: Op, measured: Sequence[str]) -> Iterator[str]:
    found = parts(op)
    yield f"### {op.fn.__name__}"
    yield wrapped(f"**When:** {op.when}")
    yield prose(found["effect"])
    yield f"```\n{signature(op)}\n```"
    yield "\n".join(["Takes", "", *listed(found["Args"])])
    yield (
        "Returns None."
        if found["Returns"].strip() == "None."
        else "\n".join(["Returns", "", *listed(found["Returns"])])
    )
    yield f"```python\n{example(found['Example'])}\n```"
    limits = [f"- {name}: {' '.join(found[name].split())}" for name in ("Numerics", "Gradients", "Raises", "Source")]
    if op.forward_only and op.grads:
        limits.append("- There is no backward kernel: where gradients are wanted PyTorch's operations run.")
    yield "\n".join(wrapped(line, "  ") for line in limits)
    yield wrapped(f"Cost:{found['Cost']}")
    yield costs(op)
    yield from measured or [UNMEASURED]


def page(results: Path = RESULTS) -> str:
    gpus = [machine for machine in machines(results) if machine.gpu]
    served = ", ".join(str(capability / 10) for capability in SERVED)
    text = [HEAD.format(served=served, **{name: rate / 1e12 for name, rate in H200.items()})]
    text += [] if gpus else [NO_GPU]
    family = ""
    for op in OPS.values():
        part = op.fn.__module__.split(".")[1]
        if part != family:
            text.append(f"## {FAMILIES[part]}")
            family = part
        measured = []
        for machine in gpus:
            if rows := [row for row in machine.lines["row"] if row["op"] == op.fn.__name__]:
                measured += [f"Recorded on {machine.gpu}; peers: their time over ours.", *row_table(rows)]
        text += section(op, measured)
    rows = [(f"`{name}`", *(ELSEWHERE[name].get(p, "") for p in PACKAGES)) for name in OPS]
    lines = [f"| {' | '.join(row)} |" for row in (("op", *PACKAGES), ("---",) * (1 + len(PACKAGES)), *rows)]
    return "\n\n".join([*text, TABLE, "\n".join(lines)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.kernels_page", description=__doc__, formatter_class=form)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what they give")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/kernels.md)")
    options = parser.parse_args(arguments)
    text = page()
    if options.check:
        fresh = options.out.is_file() and options.out.read_text(encoding="utf-8") == text
        if not fresh:
            print(f"{options.out} is stale: python -m tools.kernels_page", file=sys.stderr)
        return int(not fresh)
    write_text(options.out, text)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
