"""`python -m eval.experiments`: the small-scale paper: trains, measures, records, and renders docs/experiments.md.

What is recorded in eval/results/ is not made again. --minutes stops cleanly, in the middle of a training run or of a
measurement, and the same command goes on from there; Ctrl-C does so, too. --only takes parts of the page:

- threshold: quality of the bundled model (or --model) over the threshold and over steps. experts: those that its
  blocks use.
- block: denoisers trained at blocks of 8, 16 and 32, each written with at 8 to 64.
- towers: without time conditioning; context tower trained; towers tied. options: one of training at a time.

The last three are of denoisers that are trained here, a row of a table each, all for the context tower of that model.
--dry-run times two steps of each run that is missing, and says what all of it would take.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.figures import Figure, draw
from bench.measure import ROOT, no_commit, parser, positive
from tt_model.files import hold, write_text
from tt_model.stops import Raise, Stopped, handling

from .page import Page
from .plan import BLOCKS, Pilot
from .work import Clock, Experiments, OutOfTime


def make_parser() -> argparse.ArgumentParser:
    p = parser("eval.experiments", __doc__)
    p.add_argument("--only", nargs="+", choices=BLOCKS, default=BLOCKS, metavar="PART", help=", ".join(BLOCKS))
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after so many (default: when all is there)")
    p.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    p.add_argument("--work", type=Path, default=ROOT / "runs/experiments", help="folder of training runs")
    p.add_argument(
        "--results", type=Path, default=ROOT / "eval/results", help="folder of .jsonl (default: %(default)s)"
    )
    p.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of experiments.md (default: %(default)s)")
    p.add_argument("--threads", type=positive, help="default: what torch takes")
    p.add_argument("--device", help="of what is measured (default: a CUDA device if there is one)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what is missing, and what training it would take")
    what.add_argument("--render", action="store_true", help="only write the page, of what is recorded")
    what.add_argument("--check", action="store_true", help="exit with 1 if the page is not what is recorded")
    return p


def forecast(experiments: Experiments, only: Sequence[str]) -> None:
    """Print what is missing, and what its training takes at the speed of now."""
    minutes = 0.0
    for name, state, left, each in experiments.forecast(only):
        minutes += left * each / 60
        took = f"{left} steps left of {1e3 * each:.0f} ms: {left * each / 60:.1f} minutes"
        print(f"{name}: {took if left else state}{f', {state}' if left and state else ''}", flush=True)
    measured = [job.label for job in experiments.missing(only) if job.kind != "training"]
    print(f"training: {minutes:.0f} minutes; {len(measured)} measurements: {', '.join(measured) or 'none'}")


def render(experiments: Experiments, out: Path, check: bool) -> int:
    """Write the page and its figures; with check, only whether they are what is recorded."""
    parts = list(filter(None, Page(experiments).parts()))
    figures = [part for part in parts if isinstance(part, Figure)]
    shown = (f"![{part.about}]({part.file})" if isinstance(part, Figure) else part for part in parts)
    target, text = out / "experiments.md", "\n\n".join(shown) + "\n"
    if check:
        stale = [] if target.is_file() and target.read_text(encoding="utf-8") == text else [target.name]
        stale += [figure.file for figure in figures if not figure.is_in(out)]
        if stale:
            print(f"not what is recorded: {', '.join(stale)}: python -m eval.experiments --render", file=sys.stderr)
        return int(bool(stale))
    draw(figures, out)
    write_text(target, text)
    print(f"{target}, {len(figures)} figures")
    return 0


def main(arguments: Sequence[str] | None = None, pilot: Pilot | None = None) -> int:
    p = make_parser()
    o = p.parse_args(arguments)
    working = not (o.dry_run or o.render or o.check)
    if working and (why := no_commit()):
        p.error(why)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    experiments = Experiments(pilot or Pilot(), o.work, o.results, o.model, o.device)
    try:
        if o.dry_run:
            forecast(experiments, o.only)
            return 0
        if working:
            o.work.mkdir(parents=True, exist_ok=True)
            with hold(o.work), handling(Raise()):
                experiments.run(o.only, Clock(o.minutes), lambda label: print(label, file=sys.stderr, flush=True))
    except OutOfTime:
        left = len(experiments.missing(o.only))
        print(f"time is over: {left} lines are missing, the same command goes on", file=sys.stderr)
    except Stopped as stop:
        print(f"{p.prog}: {stop}; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    return render(experiments, o.out, o.check)


if __name__ == "__main__":
    sys.exit(main())
