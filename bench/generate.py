"""`python -m bench.generate`: the whole model: what passes cannot do without, what they take, tokens a second.

First the static card, from the config alone. Then each pass (denoiser, commit, one AR step) at every batch and context,
with the experts that its tokens really hit; then decoding in every mode. --record appends the lines to bench/results/.

--model bundled (the small one in the package; default on a CPU), published (random weights of the published size, both
towers on the same 63 GB; default on a GPU) or a folder. Random weights route evenly and commit nothing sensible: their
passes are right to time, their tokens a pass are not to be believed; give a folder for those.

--dtype runs the model in bf16, fp16 or fp32. fp8 and fp4 experts are on the static card only: no kernel reads them yet.
Several --batch give tokens/s over batch, several --context over context.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tt_kernels import Sampling, head_sample
from tt_model import TwoTower, TwoTowerConfig
from tt_model.engine import passes as decoder
from tt_model.engine.settings import MODES
from tt_model.modeling.moe import MoE
from tt_model.modeling.state import Cache
from tt_model.two_tower import ASSETS

from . import clock, measure, whole
from .measure import parser, percentile, percentiles, positive
from .models import PUBLISHED, random_on_device
from .oracle import DTYPES
from .targets import H200
from .whole import AR, COMMIT, DENOISER

Line = dict[str, Any]
RUNS_IN = {name: dtype for dtype, name in DTYPES.items() if name != "fp64"}


@dataclass
class Subject:
    """A model and what identifies its lines."""

    name: str
    model: TwoTower
    roofs: dict[str, float] | None

    @property
    def gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def paper(self, kind: str, batch: int, context: int) -> whole.Pass:
        """A pass on paper."""
        stored = "fp32" if self.model.dtype == torch.float32 else "bf16"
        return whole.Pass(self.model.config, kind, batch, context, whole.FORMATS[stored])

    def line(self, kind: str, batch: int, context: int, **found: Any) -> Line:
        of = {"kind": kind, "model": self.name, "dtype": DTYPES[self.model.dtype], "batch": batch, "context": context}
        return of | found

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """By the wall, until the device has done it; and what it returns."""
        synchronize = torch.cuda.synchronize if self.gpu else lambda: None
        synchronize()
        begin = time.perf_counter()
        result = call()
        synchronize()
        return time.perf_counter() - begin, result

    def prompts(self, batch: int, context: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randint(4, self.model.config.vocab_size, (batch, context), generator=g)


def load(name: str, device: str, dtype: torch.dtype | None = None) -> Subject:
    """A model in a dtype (None: its own). One from a folder goes by the folder's name."""
    if name == "published":
        config = replace(PUBLISHED, dtype=dtype or PUBLISHED.dtype)
        return Subject("published size, random weights", random_on_device(config, device, config.dtype), None)
    path, shown = (None, name) if name == "bundled" else (name, Path(name).resolve().name)
    return Subject(shown, TwoTower.from_pretrained(path, device=device, dtype=dtype), None)


def config_of(name: str) -> TwoTowerConfig:
    """Without its weights."""
    return PUBLISHED if name == "published" else TwoTowerConfig.from_file(ASSETS if name == "bundled" else name)


def timed(
    subject: Subject, ready: Callable[[], Callable[[], Any]], rounds: int
) -> tuple[list[float], list[float], str]:
    """Seconds of a call: on the device, and by the wall; and how. `ready` makes each call, outside of the clock.

    On a GPU the device sleeps until the host has queued all of the call, so its time holds no launch that was waited
    for; the wall's is what a caller without a CUDA graph sees, host included.
    """
    walls, devices = [], []
    for i in range(rounds + 1):
        walls.append(subject.seconds(ready())[0])
        if subject.gpu and i:
            call = ready()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2e9 * (1.5 * walls[-1] + 1e-3)))  # cycles at 2 GHz
            start.record()
            call()
            end.record()
            end.synchronize()
            devices.append(start.elapsed_time(end) / 1e3)
    return (devices, walls[1:], "device") if subject.gpu else (walls[1:], [], "wall")


def denoiser_pass(subject: Subject, cache: Cache, batch: int) -> Callable[[], Any]:
    """One pass over a half-masked block, as `generate` runs it: the tower, then head and commit rule in one op, which
    writes no logits. The cache is only read."""
    model, c, device = subject.model, subject.model.config, subject.model.device
    block = subject.prompts(batch, c.block_size).to(device)
    block[:, ::2] = c.mask_token_id
    row = lambda value, dtype: torch.full((batch,), value, dtype=dtype, device=device)
    t, sampling = row(0.5, torch.float32), Sampling.of(batch, device=device)
    rule = dict(mask_token_id=c.mask_token_id, threshold=row(0.8, torch.float64), steps_left=row(8, torch.int64))

    def call() -> Any:
        with torch.inference_mode():
            hidden = model.denoise(block, t, cache, output="hidden")
            # By its module's name, so that a profile can put a label around it.
            return decoder.unmask(hidden, model.lm_head.weight, block, sampling, **rule)

    return call


@torch.inference_mode()
def passes(subject: Subject, batch: int, context: int, rounds: int) -> Iterator[Line]:
    """A line for each pass after `context` tokens of every row. A denoiser's block is half masked, as in its middle."""
    model, c = subject.model, subject.model.config
    S = c.block_size
    cache = model.prefill(subject.prompts(batch, context), reserve=S + 1)
    block = subject.prompts(batch, S).to(model.device)
    denoise = denoiser_pass(subject, cache, batch)
    cold = Sampling.of(batch, device=model.device)

    def commit() -> Callable[[], Any]:
        mine = cache.fork()  # states of its own; the pages past the context are written again and again
        return lambda: model.commit(block, mine)

    def ar() -> Callable[[], Any]:
        mine = cache.fork()

        def step() -> None:
            token, _ = head_sample(mine.last_hidden, mine.head, cold)
            model.commit(token.unsqueeze(1), mine)

        return step

    for kind, ready in ((DENOISER, lambda: denoise), (COMMIT, commit), (AR, ar)):
        seconds, walls, how = timed(subject, ready, rounds)
        least = subject.paper(kind, batch, context)
        measured = {
            "pass": kind,
            "config": c.to_dict(),
            "clock": how,
            "rounds": len(seconds),
            **percentiles(seconds),
            "wall": percentile(walls, 0.5) if walls else None,
            "flops": least.flops,
            "bytes": least.bytes,
            "floor": least.floor(subject.roofs) if subject.roofs else None,
            "roofs": subject.roofs,
            "experts": experts_hit(model, ready()),
            "experts_worst": least.experts,
        }
        yield subject.line("pass", batch, context, **measured)


def experts_hit(model: TwoTower, call: Callable[[], Any]) -> float | None:
    """Different experts that a layer's tokens chose in one call, the mean over layers; None without experts."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.load = torch.zeros(layer.config.n_routed_experts, dtype=torch.int64, device=model.device)
    try:
        call()
        counts = [int((layer.load > 0).sum()) for layer in layers]  # of one of the towers: the other's stay 0
    finally:
        for layer in layers:
            layer.load = None
    used = [count for count in counts if count]
    return sum(used) / len(used) if used else None


def decoding(subject: Subject, batch: int, context: int, mode: str, *, new: int, threshold: float, rounds: int) -> Line:
    """A line of tokens a second, prefill excluded: the time of `new` tokens less that of none. Where that is half of it
    or more, the difference would be noise: then the line is of the whole, and says so."""
    prompts = subject.prompts(batch, context).tolist()
    options = dict(mode=mode, confidence_threshold=threshold, confidence="probability", eos_token_id=None, seed=0)

    def run(tokens: int) -> tuple[float, Any]:
        return subject.seconds(lambda: subject.model.generate(prompts, max_new_tokens=tokens, **options))

    run(new)
    samples = [(run(new), run(0)[0]) for _ in range(rounds)]
    times = [seconds for (seconds, _), _ in samples]
    prefill = percentile([seconds for _, seconds in samples], 0.5)
    included = prefill >= percentile(times, 0.2) / 2
    p20, p50, p80 = (percentile(times, share) - (0 if included else prefill) for share in (0.2, 0.5, 0.8))
    out = samples[0][0][1]
    written, nfe = sum(map(len, out.tokens)), sum(out.nfe)
    measured = {
        "mode": mode,
        "threshold": threshold if mode == "mask_diffusion" else None,
        "new": new,
        "prefill_included": included,
        "tokens_per_s": written / p50,
        "tokens_p20": written / p80,
        "tokens_p80": written / p20,
        "tokens_per_pass": written / nfe if nfe else None,
        "rounds": rounds,
    }
    return subject.line("decode", batch, context, **measured)


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("bench.generate", __doc__)
    many = lambda name, default, of: p.add_argument(name, type=positive, nargs="+", default=default, help=of)
    p.add_argument("--model", default="published" if gpu else "bundled", help="published, bundled or a folder")
    p.add_argument("--dtype", choices=RUNS_IN, help="of weights and activations (default: the model's own)")
    many("--batch", [1, 4, 16, 32, 64, 128] if gpu else [1, 4], "default: %(default)s")
    many("--context", [2048] if gpu else [64], "tokens before (default: %(default)s)")
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--new", type=positive, default=128 if gpu else 32, help="tokens written (default: %(default)s)")
    p.add_argument("--threshold", type=float, default=0.8, help="of mask_diffusion (default: %(default)s)")
    rounds = "of each pass; of decoding half as many, at least 5 (default: %(default)s)"
    p.add_argument("--rounds", type=positive, default=10 if gpu else 5, help=rounds)
    p.add_argument("--card", action="store_true", help="print the static card and stop: needs neither weights nor GPU")
    p.add_argument("--no-decoding", action="store_true", help="passes only")
    p.add_argument("--record", action="store_true", help="append the lines to bench/results/")
    o = p.parse_args(arguments)
    if o.record and (why := measure.no_commit()):
        p.error(f"--record: {why}")
    try:
        c = config_of(o.model)
        if o.card:
            print("\n\n".join(whole.card(c, o.batch, o.context)))
            return 0
        subject = load(o.model, "cuda" if gpu else "cpu", RUNS_IN.get(o.dtype))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        p.error(f"--model {o.model}: {error}")
    where = measure.where()
    subject.roofs = clock.roofs(clock.DeviceClock()) if gpu else None
    print(measure.in_a_line(where) + "\n")
    print("\n\n".join(whole.card(c, o.batch, o.context, subject.roofs or H200)), flush=True)
    found: dict[str, list[Line]] = {"pass": [], "decode": []}
    for line in lines(subject, o):
        found[line["kind"]].append(line)
        if o.record:
            measure.record({"machine": where, **line})
    if not found["pass"]:
        p.error("nothing of it fits into memory")
    print(f"\n{whole.pass_table(found['pass'])}")
    if text := whole.regime(c, found["pass"]):
        print(f"\nWhen diffusion beats AR:\n\n{text}")
    if found["decode"]:
        print(f"\nDecoding, prefill excluded:\n\n{whole.decode_table(found['decode'])}")
    return 0


def lines(subject: Subject, o: argparse.Namespace) -> Iterator[Line]:
    """Of passes and of decoding at every context and batch, each as soon as it is there."""
    for context, batch in product(o.context, o.batch):
        try:
            yield from passes(subject, batch, context, o.rounds)
            for mode in () if o.no_decoding else o.modes:
                rounds = max(5, o.rounds // 2)
                yield decoding(subject, batch, context, mode, new=o.new, threshold=o.threshold, rounds=rounds)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU has no error of its own for it
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            print(f"batch {batch}, context {context}: out of memory", flush=True)


if __name__ == "__main__":
    sys.exit(main())
