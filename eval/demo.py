"""`python -m eval.demo`: one program from its specification, several tokens a pass and token by token, side by side.

The first side is `speculative` (the denoiser drafts, the context tower verifies: AR's text) or, with --mode, diffusion
alone, which writes what the denoiser is sure of.

Both ways are in one model and take turns, pass by pass: whichever has used less time goes next, so that a terminal
shows how far each is after the same time of its own. Drawing counts for neither. The program is then executed and used
as its specification says (eval/exercise.py).
"""

from __future__ import annotations

import argparse
import io
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tt_model.cli.common import number
from tt_model.cli.waiting import set_waiting
from tt_model.cli.watch import Watch, visible
from tt_model.files import write_text
from tt_model.training.boilerplate import SPLITS, parse, specification, split_of

if TYPE_CHECKING:
    from rich.console import Console

    from tt_model import TwoTower
    from tt_model.engine.settings import Result, Step

SPECIFICATION = "# class Invoice by total: number int, total float, customer str?, paid bool = False"
MODES = ("speculative", "mask_diffusion")
PICTURES_A_SECOND = 15
NEW_TOKENS = 768
WIDTH = 96  # of a picture, in characters
SPLIT = {
    "train": "a line that may have been in training",
    "headers": "a line that training did not have",
    "words": "a line that training did not have, with a word that it never had",
    "pairs": "a line that training did not have, nor a name of these two words",
    "orders": "a line that training did not have, nor its types in this order",
}


class Side:
    """One way to write: an engine of its own, what it has written, and the seconds of its passes."""

    def __init__(self, model: TwoTower, title: str, prompt: str, *, watched: bool, **settings: Any):
        from tt_model import Engine

        length = len(model.tokenizer.encode(prompt))
        self.title, self.seconds, self._drawing = title, 0.0, 0.0
        self.view = Watch(None, prompt, length, model.tokenizer)
        self._engine = Engine(model, max_rows=1, max_tokens=length + NEW_TOKENS + 64, max_prefixes=0)
        self._engine.submit(prompt, max_new_tokens=32, **settings).result()  # first calls cost more
        see = self._see if watched else None
        self._request = self._engine.submit(prompt, max_new_tokens=NEW_TOKENS, on_step=see, **settings)

    @property
    def is_open(self) -> bool:
        return self._request.is_open

    @property
    def forwards(self) -> int:
        """Passes of both towers so far."""
        return self._request.forwards

    def step(self) -> None:
        """One pass."""
        began, self._drawing = time.perf_counter(), 0.0
        self._engine.step()
        self.seconds += time.perf_counter() - began - self._drawing

    def _see(self, step: Step) -> None:
        began = time.perf_counter()
        self.view.step(step)
        self._drawing += time.perf_counter() - began

    def result(self) -> Result:
        return self._request.result()

    def speed(self) -> float:
        """New tokens a second, the reading of the prompt included."""
        return len(self.result().tokens) / self.seconds

    def figures(self) -> str:
        found = self.result()
        passes = f"{found.forwards} passes, {len(found.tokens) / max(1, found.forwards):.2f} tokens a pass"
        return f"{len(found.tokens)} tokens in {self.seconds:.2f} s: {self.speed():.0f} tokens/s, {passes}"


def race(sides: Sequence[Side], console: Console, first: Callable[[], object] = lambda: None) -> None:
    """Run all of them to their ends, and show it where there is a terminal. first: called when one has ended."""
    from rich.live import Live

    def advance() -> bool:
        left = [side for side in sides if side.is_open]
        if left:
            (side := min(left, key=lambda side: side.seconds)).step()
            if len(left) == len(sides) and not side.is_open:
                first()
        return bool(left)

    if not console.is_terminal or console.is_dumb_terminal:
        while advance():
            pass
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        drawn = 0.0
        while advance():
            if (now := time.perf_counter()) - drawn >= 1 / PICTURES_A_SECOND:
                live.update(columns(sides, console), refresh=True)
                drawn = now
    console.print(columns(sides, console, whole=True))


def columns(sides: Sequence[Side], console: Console, *, whole: bool = False) -> Any:
    """All texts side by side; but for `whole` ones, the last lines of each that fit."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(expand=True, padding=(0, 1))
    texts = []
    for side in sides:
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        lines = side.view.coloured().split("\n")[1:]  # the first is the prompt
        texts.append(Text("\n").join(lines if whole else lines[-max(1, console.height - 4) :]))
    heads = [Text(f"{side.title}  {side.seconds:.2f} s, {side.forwards} passes", style="bold") for side in sides]
    grid.add_row(*heads)
    grid.add_row(*texts)
    return grid


def picture(file: Path, sides: Sequence[Side], title: str) -> None:
    """What a terminal shows now, as SVG."""
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, color_system="truecolor")
    console.print(columns(sides, console, whole=True))
    drawing = console.export_svg(title=title)
    write_text(file, re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL))  # it asks a server for its font


def drawn(seed: int) -> str:
    """A specification that training did not have."""
    rng = random.Random(f"demo {seed}")
    return specification(rng, rng.choice([split for split in SPLITS if split != "train"]))


def make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m eval.demo", description=__doc__, formatter_class=form)
    p.add_argument("specification", nargs="?", help=f'a comment line (default: "{SPECIFICATION}")')
    p.add_argument("--random", type=int, metavar="SEED", help="draw one that training did not have")
    p.add_argument("--model", metavar="DIR", help="folder of a model (default: the bundled one)")
    p.add_argument("--mode", choices=MODES, default=MODES[0], help="of the first side (default: %(default)s)")
    p.add_argument("--threshold", type=float, default=None, help="of mask_diffusion (default: the model's)")
    p.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of the moment when the first has ended")
    p.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="default: what torch takes")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = make_parser()
    o = p.parse_args(arguments)
    if o.specification is not None and o.random is not None:
        p.error("--random: a specification is given, too")
    if o.threshold is not None and o.mode != "mask_diffusion":
        p.error(f"--threshold: is of --mode mask_diffusion, and the mode is {o.mode}")
    header = drawn(o.random) if o.random is not None else o.specification or SPECIFICATION
    try:
        parse(header)
    except ValueError as error:
        p.error(f"{error}\nkinds and their items: docs/training.md")
    set_waiting()
    import torch
    from rich.console import Console

    from tt_model import TwoTower

    from .execute import run

    if o.threads is not None:
        torch.set_num_threads(o.threads)
    console = Console(highlight=False, soft_wrap=False)
    try:
        model = TwoTower.from_pretrained(o.model)
        more = {} if o.threshold is None else {"confidence_threshold": o.threshold}
        common = {"prompt": f"{header}\n", "watched": console.is_terminal or o.svg is not None}
        fast = Side(model, o.mode, mode=o.mode, **common, **more)
        ar = Side(model, "AR", mode="ar", **common)
        print(visible(header), flush=True)
        sides = fast, ar
        race(sides, console, lambda: None if o.svg is None else picture(o.svg, sides, header))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    code = fast.result().text or ""
    if not console.is_terminal:
        print(visible(code), end="")
    wrong = run(header, code)
    same = "the same text" if code == ar.result().text else "another text"
    verdict = f"it does not do what the line says: {wrong}" if wrong else "it runs, and does what the line says"
    print(f"\n{SPLIT[split_of(header)]}: {verdict}")
    width = len(o.mode) + 1
    print(f"{o.mode}: {fast.figures()}")
    print(f"{'AR:':{width}} {ar.figures()}; {same}")
    print(f"{o.mode} writes {fast.speed() / ar.speed():.2f} times as many tokens a second")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
