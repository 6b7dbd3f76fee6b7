"""`python -m profiling.host`: what the host does for an engine's passes: launches, PyTorch operators, its own time.

Runs them on meta tensors, which hold nothing: all that is left is the host's work, so this needs neither weights nor a
GPU. Launches are counted where the launchers make them. The time is Python's and PyTorch's on meta tensors, whose shape
rules are slower than a CUDA operator's dispatch, without Triton's own work for a launch (about 10 us each). It serves
to compare commits (`python -m bench.compare REF -- profiling.host`) and predicts no GPU.

Then, with `--engine`, an engine runs the same passes where it is: on a GPU as replays of CUDA graphs, whose device time
stands beside the time between two of them; elsewhere beside the time of the model's forward passes inside.
"""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.generate import config_of, load
from bench.measure import in_a_line, parser, percentile, percentiles, positive, table, wall, where
from tt_kernels.runtime.launch import recording
from tt_model import Engine, TwoTower, TwoTowerConfig
from tt_model.engine import passes as made
from tt_model.engine.board import Board
from tt_model.engine.passes import Pass, Passes
from tt_model.modeling.state import PAGE_SIZE, View
from tt_model.modeling.tower import Tower
from tt_model.modeling.two_tower import TwoTowerModel

KINDS = ("denoise", "commit", "ar", "mock_ar", "verify")
MODES = {"denoise": "mask_diffusion", "ar": "ar", "mock_ar": "mock_ar", "verify": "speculative"}


class Operators(TorchDispatchMode):
    """Counts PyTorch operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def meta_pass(config: TwoTowerConfig, kind: Any, batch: int, context: int) -> Callable[[], Any]:
    """A pass of an engine, its head and what it decides included, on the meta device in bf16."""
    config = replace(config, dtype=torch.bfloat16)
    length = 1 if kind in ("ar", "mock_ar") else config.block_size
    with torch.device("meta"):
        model = TwoTower(config).to(torch.bfloat16).requires_grad_(False)
    pages = -(-(context + length) // PAGE_SIZE)
    with torch.inference_mode():
        board = Board(model, rows=batch, pages=pages, slots=batch)
    passes, rows = Passes(model, board), torch.zeros(batch, dtype=torch.int64, device="meta")
    return lambda: passes(Pass(kind, length, pages), rows)


def run(o: Any) -> int:
    print(in_a_line(where()) + "\n")
    for kind in o.kinds:
        call = meta_pass(config_of(o.model), kind, o.batch, o.context)
        with recording(90) as launches:
            call()
            first = len(launches)
            with Operators() as operators:
                call()
            kernels = collections.Counter(kernel.__name__ for kernel, *_ in launches[first:])
            samples = [wall([call]) for _ in range(o.rounds)]
        from tt_model.modeling.two_tower import _frequencies

        _frequencies.cache_clear()  # made on the meta device here
        p20, p50, p80 = (1e3 * seconds for seconds in percentiles(samples).values())
        print(f"{o.model}, batch {o.batch}, {o.context} tokens before: a pass of kind {kind!r}, on meta tensors\n")
        print(f"kernels of ours launched  {sum(kernels.values())}")
        print(f"PyTorch operators         {sum(operators.seen.values())}")
        print(f"the host's own time       {p50:.2f} ms ({p20:.2f}-{p80:.2f}), {o.rounds} passes\n")
        counts = [*kernels.most_common(), *operators.seen.most_common(o.rows)]
        print(table(("launched, called", "times a pass"), counts) + "\n")
    if o.engine:
        subject = load(o.model, "cuda" if torch.cuda.is_available() else "cpu")
        kinds = [kind for kind in o.kinds if kind in MODES]
        lines = [(kind, *engine_pass(subject.model, kind, o)) for kind in kinds]
        inside = "replay ms" if torch.cuda.is_available() else "forward ms"
        print(table(("engine", "pass ms", inside, "beside it ms", "share"), lines))
    return 0


def engine_pass(model: TwoTower, kind: str, o: Any) -> tuple[str, str, str, str]:
    """Milliseconds of an engine's passes of a kind by the wall, inside of them, and what that leaves to the engine."""
    engine = Engine(model, max_rows=o.batch, max_tokens=o.batch * (o.context + 1024), max_prefixes=0)
    prompts = torch.randint(
        4, model.config.vocab_size, (o.batch, o.context), generator=torch.Generator().manual_seed(0)
    )
    # Above a threshold of 1 a pass commits one position: the block stays in passes of one kind.
    options = dict(
        mode=MODES[kind], max_new_tokens=900, eos_token_id=None, confidence_threshold=1.0, confidence="probability"
    )
    for row in prompts.tolist():
        engine.submit(row, **options)
    samples: list[tuple[float, float]] = []
    with clocked(engine, model) as inside:
        for i in range(12 * o.rounds):
            inside.clear()
            begin = time.perf_counter()
            engine.step()
            taken = time.perf_counter() - begin
            if i >= 2 * o.rounds and kind in inside:  # prompts have been read and graphs captured
                samples.append((taken, inside["seconds"]))
    whole, own = (1e3 * percentile([s[i] for s in samples], 0.5) for i in (0, 1))
    beside = 1e3 * percentile([taken - seconds for taken, seconds in samples], 0.5)
    return f"{whole:.2f}", f"{own:.2f}", f"{beside:.3f}", f"{100 * beside / own:.1f} %"


@contextmanager
def clocked(engine: Engine, model: TwoTower) -> Iterator[dict[str, float]]:
    """The kind of each pass, and the "seconds" inside: of its replay on the device, or of towers, head and commit
    rule."""
    found: dict[str, float] = {}
    runner = engine._batches.runner

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            out = function(*args, **more)
            found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - begin
            return out

        return call

    def run_pass(what: Pass, rows: Sequence[int]) -> Any:
        found[what.kind] = 1.0
        if not runner.graphs:
            return plain(what, rows)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = plain(what, rows)
        end.record()
        end.synchronize()
        found["seconds"] = start.elapsed_time(end) / 1e3
        return out

    plain = runner.__call__
    engine._batches.runner = run_pass  # type: ignore[assignment]
    places: list[tuple[Any, str]] = [(Tower, "forward"), (TwoTowerModel, "_modulation"), (View, "let_in")]
    places += [(made, "head_sample"), (made, "unmask")]
    before = [getattr(place, name) for place, name in places]
    try:
        if not runner.graphs:
            for place, name in places:
                setattr(place, name, timed(getattr(place, name)))
        yield found
    finally:
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, function)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("profiling.host", __doc__)
    p.add_argument("--model", choices=("published", "bundled"), default="published", help="default: %(default)s")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=["denoise"], help="of passes (default: denoise)")
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument("--context", type=positive, default=2048)
    p.add_argument("--rounds", type=positive, default=10, help="default: %(default)s")
    p.add_argument("--rows", type=positive, default=10, help="PyTorch operators listed (default: %(default)s)")
    p.add_argument("--engine", action="store_true", help="then time an engine with such a model, on this device")
    return run(p.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
