"""`python -m profiling.host`: what the host does for a denoiser pass: launches, PyTorch operators, Python's own time.

Runs the pass on meta tensors, which hold nothing: all that is left is the host's work, so this needs neither weights
nor a GPU. Launches are counted where the launchers make them. The time is Python's and PyTorch's on meta tensors, whose
shape rules are slower than a CUDA operator's dispatch, without Triton's own work for a launch (about 10 us each). It
serves to compare commits (`python -m bench.compare REF -- profiling.host`) and predicts no GPU. On a GPU the pass, its
head included, is then timed by the wall, on the device, and replayed from a CUDA graph, where none of this is left.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.clock import DeviceClock
from bench.generate import config_of, denoiser_pass, load, timed
from bench.measure import in_a_line, parser, percentile, percentiles, positive, table, wall, where
from tt_kernels.runtime.launch import recording
from tt_model import TwoTower, TwoTowerConfig
from tt_model.modeling.state import Cache


class Operators(TorchDispatchMode):
    """Counts PyTorch operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def meta_pass(config: TwoTowerConfig, batch: int, context: int) -> Any:
    """A denoiser pass over a block, on the meta device, in bf16."""
    config = replace(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = TwoTower(config).to(torch.bfloat16)
        room = context + config.block_size
        cache = Cache.empty(config, batch, device=torch.device("meta"), dtype=torch.bfloat16, reserve=room)
        block, t = torch.zeros(batch, config.block_size, dtype=torch.int64), torch.zeros(batch)

    def call() -> Any:
        with torch.device("meta"), torch.inference_mode():
            return model.denoise(block, t, cache, output="hidden")

    return call


def run(o: Any) -> int:
    call = meta_pass(config_of(o.model), o.batch, o.context)
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
    print(in_a_line(where()) + "\n")
    print(f"{o.model}, batch {o.batch}, {o.context} tokens before: a denoiser pass without its head, on meta tensors\n")
    print(f"kernels of ours launched  {sum(kernels.values())}")
    print(f"PyTorch operators         {sum(operators.seen.values())}")
    print(f"the host's own time       {p50:.2f} ms ({p20:.2f}-{p80:.2f}), {o.rounds} passes\n")
    counts = [*kernels.most_common(), *operators.seen.most_common(o.rows)]
    print(table(("launched, called", "times a pass"), counts))
    if torch.cuda.is_available():
        on_device(o)
    return 0


def on_device(o: Any) -> None:
    """Wall time, device time, and the time of a graph's replay."""
    subject = load(o.model, "cuda")
    call = denoiser_pass(subject, subject.model.prefill(subject.prompts(o.batch, o.context)), o.batch)
    devices, walls, _ = timed(subject, lambda: call, o.rounds)
    device, waited = percentile(devices, 0.5), percentile(walls, 0.5)
    times = f"by the wall {1e3 * waited:.2f} ms, the device alone {1e3 * device:.2f} ms"
    print(f"\n{times}: {1e3 * (waited - device):.2f} ms of the host show")
    watch = DeviceClock()
    with watch.scope():
        samplers, how, errors = watch.samplers({"pass": [call]})
        if errors or how.get("pass") != "graph":
            print(f"no CUDA graph of it: {errors.get('pass', 'it waits for the host')}")
            return
        samplers["pass"]()
        replay = percentile([samplers["pass"]() for _ in range(o.rounds)], 0.5)
    print(f"replayed from a CUDA graph {1e3 * replay:.2f} ms")


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("profiling.host", __doc__)
    p.add_argument("--model", choices=("published", "bundled"), default="published", help="default: %(default)s")
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument("--context", type=positive, default=2048)
    p.add_argument("--rounds", type=positive, default=10, help="default: %(default)s")
    p.add_argument("--rows", type=positive, default=10, help="PyTorch operators listed (default: %(default)s)")
    return run(p.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
