"""`python -m profiling.timeline`: one denoiser pass on a time axis, and who took how much of it.

Writes a trace for ui.perfetto.dev (or chrome://tracing) and prints two tables: time by op beside its floor (the cost on
the op's card at the roofs measured here), and the longest kernels (on a CPU PyTorch operators). The pass is the one
that generation runs: the tower, then the unmasking step. Times in a trace are a little long, for the profiler takes its
own: for how long a pass takes use python -m bench.generate, for where it goes this.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import clock, whole
from bench.generate import denoiser_pass, load
from bench.measure import in_a_line, interleaved, parser, percentile, positive, table, where
from cards import OPS
from tt_model import TwoTowerConfig

RANGE = "op "  # what the name of a range in a profile begins with


@contextmanager
def labelled() -> Iterator[None]:
    """Every op that the model calls, and every linear layer, as a named range in whatever profiles meanwhile."""
    names = {op.fn: name for name, op in OPS.items()}
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, attribute: str, label: str) -> None:
        fn = getattr(owner, attribute)

        @functools.wraps(fn)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(RANGE + label):
                return fn(*args, **kwargs)

        undo.append((owner, attribute, fn))
        setattr(owner, attribute, ranged)

    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "tt_model"]:
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in names:
                put(module, attribute, names[value])
    put(torch.nn.Linear, "forward", "linear")
    try:
        yield
    finally:
        for owner, attribute, fn in reversed(undo):
            setattr(owner, attribute, fn)


def dims_of_pass(c: TwoTowerConfig, batch: int, context: int) -> dict[str, dict[str, int]]:
    """The sizes at which a denoiser pass over half-masked blocks calls each op, by the names that its card uses."""
    L = c.block_size
    width = c.mamba_num_heads * c.mamba_head_dim
    choice = dict(D=c.hidden_size, E=c.n_routed_experts, K=c.num_experts_per_tok)
    moe = dict(N=c.moe_intermediate_size, M=c.moe_shared_expert_intermediate_size, **choice)
    scan = dict(H=c.mamba_num_heads, P=c.mamba_head_dim, G=c.n_groups, N=c.ssm_state_size)
    heads = dict(Hq=c.num_attention_heads, Hkv=c.num_key_value_heads, P=c.head_dim)
    return {
        "rms_norm": dict(T=batch * L, D=c.hidden_size),
        "modulated_rms_norm": dict(B=batch, L=L, D=c.hidden_size),
        "gated_group_norm": dict(T=batch * L, D=width, groups=c.n_groups),
        "mamba_block": dict(b=batch, L=L, K=c.conv_kernel, **scan),
        "route": dict(T=batch * L, **choice),
        "experts": dict(T=batch * L, **moe),
        "experts_norm": dict(B=batch, L=L, **moe),
        "context_attention": dict(B=batch, L=L, S=context, **heads),
        "unmask": dict(B=batch, L=L // 2, D=c.hidden_size, V=c.vocab_size),  # of the rest nobody needs the logits
    }


def floors(calls: Mapping[str, float], paper: whole.Pass, roofs: Mapping[str, float]) -> dict[str, float]:
    """Seconds a pass below which the calls of each op cannot be. Of linear layers, which have no card, what the whole
    pass's are on paper."""
    least = lambda flops, moved: max(moved / roofs["bandwidth"], flops / roofs["compute"])
    dims = dims_of_pass(paper.config, paper.batch, paper.context)
    width = paper.format.other // 8
    found = {name: calls[name] * least(*OPS[name].cost(width, **dims[name])) for name in dims.keys() & calls.keys()}
    moved, flops = paper.parts()["projections"]
    return found | {"linear": least(flops, moved)}


def cpu_roofs() -> dict[str, float]:
    """What this CPU reads from memory and computes in fp32, on the threads that torch has: medians of five."""
    x, a = torch.ones(1 << 26), torch.randn(768, 768)
    times = interleaved({"read": x.sum, "product": lambda: a @ a}, rounds=5)
    return {
        "bandwidth": x.nbytes / percentile(times["read"], 0.5),
        "compute": 2.0 * 768**3 / percentile(times["product"], 0.5),
    }


def by_op(events: Sequence[Any], passes: int, gpu: bool) -> dict[str, tuple[float, float]]:
    """Calls and seconds of each named range, a pass, the longest first."""
    found: dict[str, tuple[float, float]] = {}
    # A range stands twice in a GPU's profile: on the host's track with the kernels it launched, and as an annotation
    # on the device's, from the first of them to the last. The second serves where the first holds no kernels.
    for event in sorted(events, key=lambda e: "CPU" not in str(e.device_type)):
        name = event.key.removeprefix(RANGE)
        if event.key.startswith(RANGE) and not found.get(name, (0, 0))[1]:
            total = event.device_time_total if gpu else event.cpu_time_total
            found[name] = (event.count / passes, total / 1e6 / passes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def op_table(found: Mapping[str, tuple[float, float]], seconds: float, least: Mapping[str, float]) -> str:
    """Time by op, the largest first, beside its floor."""
    rows = []
    for name, (calls, took) in found.items():
        floor = least.get(name, 0.0)
        beside = (f"{1e6 * floor:.1f}", f"{100 * floor / took:.0f} %") if floor and took else ("-", "-")
        rows.append((name, f"{calls:g}", f"{1e6 * took:.1f}", f"{100 * took / seconds:.1f} %", *beside))
    rest = seconds - sum(took for _, took in found.values())
    rows.append(("between them", "", f"{1e6 * rest:.1f}", f"{100 * rest / seconds:.1f} %", "-", "-"))
    return table(("op", "calls", "us", "of the pass", "floor us", "floor / time"), rows)


def kernel_table(
    mine: Sequence[Any], took: Callable[[Any], float], passes: int, most: int, ops: Collection[str]
) -> str:
    """The longest kernels, each with the ops of this pass whose cards name it."""
    total, rows = sum(map(took, mine)) or 1.0, []
    for event in sorted(mine, key=took, reverse=True)[:most]:
        owners = ", ".join(name for name in ops if name in OPS and event.key in OPS[name].kernels)
        shown = (f"{event.count / passes:g}", f"{1e6 * took(event):.1f}", f"{100 * took(event) / total:.1f} %")
        rows.append((event.key[:60], owners or "-", *shown))
    return table(("kernel or operator", "op", "calls", "us", "of all"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("profiling.timeline", __doc__)
    p.add_argument("--model", default="published" if gpu else "bundled", help="published, bundled or a folder")
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument(
        "--context", type=positive, default=2048 if gpu else 128, help="tokens before (default: %(default)s)"
    )
    p.add_argument("--passes", type=positive, default=5, help="recorded passes (default: %(default)s)")
    p.add_argument("--rows", type=positive, default=15, help="kernels listed (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("denoiser_pass.json"), help="the trace (default: %(default)s)")
    o = p.parse_args(arguments)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    subject = load(o.model, "cuda" if gpu else "cpu")
    roofs = clock.roofs(clock.DeviceClock()) if gpu else cpu_roofs()
    call = denoiser_pass(subject, subject.model.prefill(subject.prompts(o.batch, o.context)), o.batch)
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    with labelled():
        for _ in range(3):
            call()
        synchronize()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as prof:
            begin = time.perf_counter()
            for _ in range(o.passes):
                call()
            synchronize()
            wall = (time.perf_counter() - begin) / o.passes
    prof.export_chrome_trace(str(o.out))
    events, kind = prof.key_averages(), "CUDA" if gpu else "CPU"
    mine = [e for e in events if kind in str(e.device_type) and not e.key.startswith(RANGE)]
    took = lambda e: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 / o.passes
    found, busy = by_op(events, o.passes, gpu), sum(map(took, mine)) if gpu else wall
    paper = subject.paper(whole.DENOISER, o.batch, o.context)
    least = floors({name: calls for name, (calls, _) in found.items()}, paper, roofs)
    print(in_a_line(where()) + "\n")
    print(f"{subject.name}; batch {o.batch}, {o.context} tokens before, {o.passes} passes")
    print(f"roofs here: {roofs['bandwidth'] / 1e9:.1f} GB/s, {roofs['compute'] / 1e9:.0f} GFLOP/s")
    print(f"a pass under the profiler: {1e3 * wall:.2f} ms by the wall, {1e3 * busy:.2f} ms busy")
    print(f"floor of the whole pass: {1e3 * paper.floor(roofs):.3g} ms\n")
    print(op_table(found, busy, least))
    print(f"\n{kernel_table(mine, took, o.passes, o.rows, found)}")
    print(f"\n{o.out}: open it in ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    sys.exit(main())
