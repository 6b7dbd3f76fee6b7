"""What is owed from a GPU: commands with what they are expected to show, in order of worth. `make gpu` runs them.

Expected times are those of `bench/targets.py`. Rows measure their own roofs: compare shares.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import ops
from bench.measure import RESULTS, label
from bench.peers import REGISTRY
from bench.targets import expected
from cards import OPS

ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable, "-m")
PYTEST = (*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0")
FEW_ROWS = 16  # of a family whose ops share a task: a process takes some ten seconds to start
SMALL = 64e6  # bytes: what a published shape moves in the smoke test
TUNED_AT_ONCE = 2  # shapes, each with some thirty launches that compile first
# What is measured first; then the others.
WORTH = ("experts", "head_sample", "unmask", "context_attention", "mamba_block", "route", "append_attention", "moe")
FIRST = {"experts": ("T16-", "T64-", "T128-", "T512-"), "head_sample": ("",), "unmask": ("",)}
FIRST |= {"context_attention": ("",), "mamba_block": ("",)}
# Where two launches of mamba_block may overtake one: around 4 rows of 16 tokens, 2 of 32; above 32 it takes two.
CROSSING = ((4, 16), (5, 16), (8, 16), (2, 32), (3, 32), (1, 33), (4, 64))
# The same of mamba_extend, between 2 and 3 rows of 64 heads: three launches, or one of two waves.
EXTENDED = (1, 2, 3, 4, 6)
# Head sizes of other models: 80 and 96 fill no power of two, 256 no tile of 64 keys.
HEAD_SIZES = (64, 80, 96, 256)
# Around the sizes at which tiles change: rows that a card's own shapes step over.
CLIFFS: dict[str, tuple[dict[str, int], ...]] = {
    "experts": tuple(dict(T=T) for T in (256, 383, 512, 850, 2048)),
    "head_sample": tuple(dict(R=R, hot=hot) for R in (64, 128, 512) for hot in (1, 0)),
    "context_attention": tuple(dict(B=1, L=16, S=S) for S in (2048, 4096, 6144, 8192)),
}
# Tests of what no card shows: neighbours, ties, NaN, tickets over streams and graphs, all lengths, masks of training.
DEVICE_TESTS = ("attention_*", "autocast", "experts_*", "graphs_*", "launches_*", "packed", "route_*", "sampling*")
DEVICE_TESTS += ("remask", "scan*", "states", "strategies*", "strides_*")


class Task(NamedTuple):
    name: str
    command: tuple[str, ...]
    expected: str
    env: Mapping[str, str] = {}
    lacks: str = ""  # why it cannot run here


def by_worth(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: WORTH.index(name) if name in WORTH else len(WORTH))


def family(name: str) -> str:
    return OPS[name].fn.__module__.split(".")[1]


def parts() -> dict[str, list[str]]:
    """Ops by the task that they are in: each its own, but a family together that has few rows."""
    rows = lambda name: len(OPS[name].shapes) * (2 if OPS[name].grads else 1)
    found: dict[str, list[str]] = {}
    for part in dict.fromkeys(map(family, OPS)):
        mine = [name for name in OPS if family(name) == part]
        found |= {part: mine} if sum(map(rows, mine)) <= FEW_ROWS else {name: [name] for name in mine}
    return {name: found[name] for name in by_worth(list(found))}


def named(names: Sequence[str]) -> str:
    """For pytest's -k. In brackets it is a whole parameter: "rms_norm-" is also the end of "modulated_rms_norm-"."""
    return " or ".join(f"[{name}{end}" for name in names for end in "-]")


def rows(words: str, peers: str, *more: str) -> tuple[str, ...]:
    """Rows whose id holds one of these words, recorded, those that are not there yet."""
    options = ("--record", "--missing", "--peers", peers, *more)
    return (*PYTEST, "bench/bench_ops.py", *options, "-k", f"test_row and ({words})")


def predictions() -> dict[str, list[Any]]:
    """By op, the shapes that the static model was recorded at (`python -m profiling.predict --all --record`)."""
    file = RESULTS / "predicted.json"
    found: dict[str, list[Any]] = {}
    for line in json.loads(file.read_text())["ops"] if file.is_file() else ():
        found.setdefault(line["op"], []).append(line)
    return found


def smoke() -> Iterator[str]:
    """Tests of a minute or two: whether each kernel runs at all, and right."""
    for name, op in OPS.items():
        if op.kernels:
            dims = "-".join(f"{k}{v}" for k, v in op.cases[0].items())
            yield f"tests/kernels/test_kernels.py::test_matches_reference[{name}-{dims}-torch.bfloat16]"
            least = min(
                (c for c in ops.cases("cuda", {name: op}) if not c.backward), key=lambda case: ops.cost(case)[1]
            )
            if ops.cost(least)[1] <= SMALL:
                yield f"bench/bench_ops.py::test_parity[{least.id}]"


def tasks() -> Iterator[Task]:
    kernels = [name for name, op in OPS.items() if op.kernels]
    golden = Path(os.environ.get("TWOTOWER_GOLDEN", ROOT.parent / "shared/golden"))
    no_golden = "" if golden.is_dir() else "no golden files: set TWOTOWER_GOLDEN to their folder"
    checkpoint = os.environ.get("TWOTOWER_CHECKPOINT", "")
    no_checkpoint = "" if checkpoint else "no checkpoint: set TWOTOWER_CHECKPOINT to its folder"
    right = "all pass"

    yield Task("smoke", (*PYTEST, *smoke()), right)
    for name, words in FIRST.items():
        chosen = " or ".join(f"[{name}-{word}" for word in words)
        yield Task(f"first-{name}", rows(f"forward and ({chosen})", "eager"), expected(name))
    generate = (*PYTHON, "bench.generate", "--record", "--batch")
    # Each kernel starts while the one before it ends; what is wrong with that shows under both.
    plain = {"TT_KERNELS_PDL": "0"}
    apart = "beside first-passes: how much programmatic launches win, most at AR and batch 1"
    yield Task("first-passes", (*generate, "1", "--no-decoding"), "beside its floor, and the experts that tokens hit")
    unrecorded = (*PYTHON, "bench.generate", "--batch", "1", "--no-decoding")
    yield Task("first-passes-plain", unrecorded, apart, plain)

    all_ops = (*PYTEST, "tests/kernels/test_kernels.py", "tests/kernels/test_ops.py", "-k")
    for part in by_worth(list(dict.fromkeys(map(family, OPS)))):
        mine = [name for name in OPS if family(name) == part]
        yield Task(f"parity-{part}", (*all_ops, named(mine)), "all pass in fp32, fp16 and bf16")
    for pattern in DEVICE_TESTS:
        files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"tests/kernels/test_{pattern}.py"))
        yield Task(f"device-{pattern.strip('_*')}", (*PYTEST, *files), right)
    marked = (*PYTEST, "tests", "-m", "gpu", "--ignore", "tests/model/test_golden.py")
    yield Task(
        "gpu-marked", marked, "all pass: a cold L2 and a warm one, tickets over streams, mamba_ssm where installed"
    )
    command = (*PYTEST, "tests/model/test_golden.py", "-m", "gpu")
    at = {"TWOTOWER_GOLDEN": str(golden)}
    yield Task("golden-fp32", command, "logits within 1e-5, tokens exact", at, no_golden)
    small = "finite; kernels' median error 0.9 to 1.0 times the references' 1 % to 3 %"
    yield Task("golden-bf16", (*PYTHON, "eval.golden", str(golden)), small, {}, no_golden)

    for part, names in parts().items():
        targets = "; ".join(f"{name}: {text}" for name in names if (text := expected(name)))
        yield Task(f"rows-{part}", rows(named(names), "eager,compiled"), targets or "none is red; oracle fp64")
    sizes = [word for b, L in CROSSING for word in ("--also", f"mamba_block:b={b},L={L}")]
    words = " or ".join(f"[mamba_block-b{b}-L{L}-" for b, L in CROSSING)
    level = "one launch no slower than two (apart) at 4 sequences; if ahead by much, the bound in_one_launch may rise"
    yield Task("crossing-mamba_block", rows(f"forward and ({words})", "apart", *sizes), level)

    sizes = [word for b in EXTENDED for word in ("--also", f"mamba_extend:b={b},L=16")]
    words = " or ".join(f"[mamba_extend-b{b}-L16-" for b in EXTENDED)
    level = "3 rows take no less than 2; if 2 take more than 3, the bound of in_one_wave is too high"
    yield Task("crossing-mamba_extend", rows(f"forward and ({words})", "eager", *sizes), level)
    for name, shapes in CLIFFS.items():
        sizes = [w for dims in shapes for w in ("--also", f"{name}:{','.join(f'{k}={v}' for k, v in dims.items())}")]
        ids = ("-".join(f"{k}{v}" for k, v in {**OPS[name].shapes[0], **dims}.items()) for dims in shapes)
        words = " or ".join(f"[{name}-{each}-" for each in ids)
        level = "times grow evenly; where one is a third above its neighbours a tile is too small or too large"
        yield Task(f"cliffs-{name}", rows(f"forward and ({words})", "eager", *sizes), level)
    heads = {"context_attention": "B=8,L=16,S=8192", "block_diffusion_attention": "N=8192,S=16"}
    for name, dims in heads.items():
        sizes = [word for P in HEAD_SIZES for word in ("--also", f"{name}:{dims},P={P}")]
        words = " or ".join(f"-P{P}-" for P in HEAD_SIZES)
        level = "shares of the roof beside those of 128: by pointers (80, 96) at most a third less"
        yield Task(f"heads-{name}", rows(f"[{name}- and forward and ({words})", "eager,compiled", *sizes), level)

    for batch in (1, 16, 64, 4, 32, 128):
        yield Task(
            f"model-{batch}", (*generate, str(batch)), "tokens/s grow with the batch until experts are compute-bound"
        )
    # So many tokens that the prefill before them is not most of the time.
    context = (*generate, "1", "--context", "8192", "32768", "--new", "256")
    yield Task("model-context", context, "tokens/s little below those at 2048")
    yield Task("model-long", (*generate, "8", "--context", "32768", "--no-decoding"), "little above the pass at 2048")
    write = (*PYTHON, "tt_model.cli", "generate", "The capital of France is", "--model", checkpoint, "--device", "cuda")
    yield Task("checkpoint-diffusion", write, "fluent text; both towers take 126 GB", {}, no_checkpoint)
    yield Task("checkpoint-ar", (*write, "--mode", "ar"), "fluent text in 63 GB", {}, no_checkpoint)

    for name, found in predictions().items():
        ids = (f"[{name}-{'-'.join(f'{k}{v}' for k, v in x['dims'].items())}-" for x in found)
        new = [x["dims"] for x in found if x["dims"] not in OPS[name].shapes]
        sizes = [w for dims in new for w in ("--also", f"{name}:{','.join(f'{k}={v}' for k, v in dims.items())}")]
        shown = "; ".join(f"{label(x['dims'])}: {1e6 * x['seconds']:.3g} us" for x in found)
        wanted = rows(f"forward and ({' or '.join(ids)})", "eager", *sizes)
        yield Task(f"predicted-{name}", wanted, f"predicted, not measured: {shown}")
    fit = (*PYTHON, "profiling.predict", "--fit")
    yield Task("predicted-error", fit, "the mean error of the static model; correct profiling/predict/rates.py by it")

    for name in by_worth([name for name, op in OPS.items() if op.candidates]):
        shapes = [",".join(f"{k}={v}" for k, v in dims.items()) for dims in OPS[name].shapes]
        for i in range(0, len(shapes), TUNED_AT_ONCE):
            wanted = [word for shape in shapes[i : i + TUNED_AT_ONCE] for word in ("--shape", shape)]
            command = (*PYTHON, "tools.tune", name, "--missing", *wanted)
            yield Task(f"tune-{name}-{1 + i // TUNED_AT_ONCE}", command, "rows in tt_kernels/tuned where 3 % is won")
        yield Task(f"again-{name}", rows(named([name]), "eager,compiled"), "as rows, no slower")
    ahead = "ahead of all that are installed (bench/peers/README.md says how to get them)"
    for name in by_worth(list(REGISTRY)):
        yield Task(f"peers-{name}", rows(named([name]), "all"), expected(name) or ahead)

    trace = (*PYTHON, "profiling.timeline", "--passes", "3", "--out", "profiles/denoiser_pass.json.gz")
    yield Task("timeline", trace, "experts most of it; what lies between the ops is launches")
    engine = (*PYTHON, "profiling.host", "--engine", "--kinds", "denoise", "ar", "verify", "--rounds", "20", "--batch")
    beside = "beside a replay, which `first-passes` gives the floor of: 0.1 ms of denoise and verify, a twentieth of ar"
    for batch in (1, 32):
        yield Task(f"host-{batch}", (*engine, str(batch)), beside)
    no_ncu = "" if shutil.which("ncu") else "ncu is not on the PATH: it comes with the CUDA toolkit (nsight-compute)"
    for name, shape, share in (("experts", "T=16", 80), ("context_attention", "L=16,S=131072", 60)):
        command = (*PYTHON, "profiling.ncu", name, "--shape", shape, "--out", f"profiles/{name}")
        above = f"memory above {share} % of its peak; if not, what warps wait for"
        yield Task(f"ncu-{name}", command, above, {}, no_ncu)
    sanitizer = shutil.which("compute-sanitizer")
    lacks = "" if sanitizer else "compute-sanitizer is not on the PATH"
    for tool, nothing in (("memcheck", "no error"), ("racecheck", "no hazard")):
        for part, names in parts().items():
            chosen = named([name for name in names if name in kernels])
            small = ("tests/kernels/test_kernels.py", "-k", f"test_matches_reference and bfloat16 and ({chosen})")
            command = (str(sanitizer), "--tool", tool, "--error-exitcode", "9", *PYTEST, *small)
            # Each tensor in memory of its own, so that a read past its end is one past an allocation.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            if chosen:
                yield Task(f"{tool}-{part}", command, nothing, alone, lacks)
