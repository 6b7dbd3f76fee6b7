"""`python -m bench.generate`: the whole model: what passes cannot do without, what they take, tokens a second.

First the static card, from the config alone. Then each pass (denoiser, commit, one AR step) at every batch and context,
with the experts that its tokens really hit; then decoding in every mode. --record appends the lines to bench/results/.

--model bundled (the small one in the package; default on a CPU), published (random weights of the published size, both
towers on the same 63 GB; default on a GPU) or a folder. Random weights route evenly and commit nothing sensible: their
passes are right to time, their tokens a pass are not to be believed; give a folder for those.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tt_kernels import head_sample
from tt_model import TwoTower, TwoTowerConfig
from tt_model import generate as decoder
from tt_model.cache import Cache
from tt_model.cli import sizes
from tt_model.generate import MODES
from tt_model.layers import MoE
from tt_model.two_tower import ASSETS

from . import clock, measure, whole
from .clock import percentile
from .models import PUBLISHED, random_on_device
from .oracle import DTYPES
from .whole import AR, COMMIT, DENOISER


@dataclass
class Subject:
    """A model and what identifies its lines."""

    name: str
    model: TwoTower
    roofs: dict[str, float] | None

    @property
    def gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def prompts(self, batch: int, context: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randint(4, self.model.config.vocab_size, (batch, context), generator=g)


def load(name: str, device: str) -> Subject:
    if name == "published":
        model = random_on_device(PUBLISHED, device, torch.bfloat16)
        return Subject("published size, random weights", model, None)
    path = None if name == "bundled" else name
    return Subject(name, TwoTower.from_pretrained(path, device=device), None)


def config_of(name: str) -> TwoTowerConfig:
    """Without its weights."""
    return PUBLISHED if name == "published" else TwoTowerConfig.from_file(ASSETS if name == "bundled" else name)


def synchronize(subject: Subject) -> None:
    if subject.gpu:
        torch.cuda.synchronize()


def timed(
    subject: Subject, ready: Callable[[], Callable[[], Any]], rounds: int
) -> tuple[list[float], list[float], str]:
    """Seconds of a call: on the device, and by the wall; and how. `ready` makes each call, outside of the clock.

    On a GPU the device sleeps until the host has queued all of the call, so its time holds no launch that was waited
    for; the wall's is what a caller without a CUDA graph sees, host included.
    """
    walls, devices = [], []
    for i in range(rounds + 1):
        call = ready()
        synchronize(subject)
        begin = time.perf_counter()
        call()
        synchronize(subject)
        walls.append(time.perf_counter() - begin)
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
    keys = {name: row(0, torch.int64) for name in ("seed", "position", "step")}
    keys |= {name: row(value, torch.float64) for name, value in (("threshold", 0.8), ("temperature", 0.0))}
    t, left = row(0.5, torch.float32), row(8, torch.int64)

    def call() -> Any:
        with torch.inference_mode():
            hidden = model.denoise(block, t, cache, output="hidden")
            # By its module's name, so that a profile can put a label around it.
            return decoder.unmask(
                hidden, model.lm_head.weight, block, mask_token_id=c.mask_token_id, steps_left=left, **keys
            )

    return call


@torch.inference_mode()
def passes(subject: Subject, batch: int, context: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each pass after `context` tokens of every row. A denoiser's block is half masked, as in its middle."""
    model, c = subject.model, subject.model.config
    S = c.block_size
    cache = model.prefill(subject.prompts(batch, context), reserve=S + 1)
    block = subject.prompts(batch, S).to(model.device)
    everyone, denoise = torch.arange(batch, device=model.device), denoiser_pass(subject, cache, batch)
    keys = {name: torch.zeros(batch, dtype=torch.int64, device=model.device) for name in ("seed", "position", "step")}
    cold = torch.zeros(batch, dtype=torch.float64, device=model.device)

    def denoiser() -> Callable[[], Any]:
        return denoise

    def commit() -> Callable[[], Any]:
        mine = cache.select(everyone)  # states of its own; the pages past the context are written again and again
        return lambda: model.commit(block, mine)

    def ar() -> Callable[[], Any]:
        mine = cache.select(everyone)

        def step() -> None:
            token, _ = head_sample(mine.last_hidden, mine.head, temperature=cold, **keys)
            model.commit(token.unsqueeze(1), mine)

        return step

    for kind, ready in ((DENOISER, denoiser), (COMMIT, commit), (AR, ar)):
        seconds, walls, how = timed(subject, ready, rounds)
        tokens = batch * (1 if kind == AR else S)
        roofs = subject.roofs
        yield {
            "kind": "pass",
            "model": subject.name,
            "config": c.to_dict(),
            "dtype": DTYPES[model.dtype],
            "pass": kind,
            "batch": batch,
            "context": context,
            "clock": how,
            "rounds": len(seconds),
            "p20": percentile(seconds, 0.2),
            "p50": percentile(seconds, 0.5),
            "p80": percentile(seconds, 0.8),
            "wall": percentile(walls, 0.5) if walls else None,
            "flops": whole.pass_flops(c, kind, batch=batch, context=context),
            "bytes": sum(sizes.pass_bytes(c, format_of(model), kind, batch=batch, context=context).values()),
            "floor": None
            if roofs is None
            else whole.floor(c, kind, batch=batch, context=context, roofs=roofs, format=format_of(model)),
            "roofs": roofs,
            "experts": experts_hit(model, ready()),
            "experts_worst": sizes.distinct_experts(c, tokens),
        }


def format_of(model: TwoTower) -> sizes.Format:
    return whole.FORMATS["bf16" if model.dtype.itemsize == 2 else "fp32"]


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


def decoding(
    subject: Subject, batch: int, context: int, mode: str, *, new: int, threshold: float, rounds: int
) -> dict[str, Any]:
    """A line of tokens a second, prefill excluded: the time of `new` tokens less that of none. Where that is half of it
    or more, the difference would be noise: then the line is of the whole, and says so."""
    prompts = subject.prompts(batch, context).tolist()
    options = dict(mode=mode, confidence_threshold=threshold, eos_token_id=None, seed=0)

    def run(tokens: int) -> tuple[float, Any]:
        synchronize(subject)
        begin = time.perf_counter()
        out = subject.model.generate(prompts, max_new_tokens=tokens, **options)
        synchronize(subject)
        return time.perf_counter() - begin, out

    run(new)
    samples = [(run(new), run(0)[0]) for _ in range(rounds)]
    whole_time = percentile([seconds for (seconds, _), _ in samples], 0.5)
    prefill = percentile([seconds for _, seconds in samples], 0.5)
    included = prefill >= whole_time / 2
    seconds = whole_time if included else whole_time - prefill
    out = samples[0][0][1]
    written, nfe = sum(map(len, out.tokens)), sum(out.nfe)
    return {
        "kind": "decode",
        "model": subject.name,
        "dtype": DTYPES[subject.model.dtype],
        "mode": mode,
        "batch": batch,
        "context": context,
        "threshold": threshold if mode == "mask_diffusion" else None,
        "new": new,
        "prefill_included": included,
        "tokens_per_s": written / seconds,
        "tokens_per_pass": written / nfe if nfe else None,
        "rounds": rounds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="published" if gpu else "bundled",
        help="published, bundled or a folder (default: %(default)s)",
    )
    parser.add_argument("--batch", type=measure.positive, nargs="+", default=[1, 4, 16, 32, 64, 128] if gpu else [1, 4])
    parser.add_argument(
        "--context", type=measure.positive, nargs="+", default=[2048] if gpu else [64], help="tokens before"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--new", type=measure.positive, default=128 if gpu else 32, help="tokens written (default: %(default)s)"
    )
    parser.add_argument("--threshold", type=measure.share, default=0.8, help="of mask_diffusion (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=measure.positive, default=10 if gpu else 5, help="of each pass (default: %(default)s)"
    )
    parser.add_argument(
        "--card", action="store_true", help="print the static card and stop: needs neither weights nor GPU"
    )
    parser.add_argument("--no-decoding", action="store_true", help="passes only")
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/")
    options = parser.parse_args(arguments)
    device = "cuda" if gpu else "cpu"
    try:
        c = config_of(options.model)
        subject = None if options.card else load(options.model, device)
    except (OSError, ValueError, KeyError, torch.OutOfMemoryError) as error:
        print(f"bench.generate: error: --model {options.model}: {error}", file=sys.stderr)
        return 2
    if subject is None:
        print("\n\n".join(whole.card(c, options.batch, options.context)))
        return 0
    watch = clock.DeviceClock() if gpu else clock.HostClock()
    where = clock.where(watch) | {"threads": torch.get_num_threads()}
    if gpu:
        subject.roofs = clock.roofs(watch)
    print(clock.in_a_line(where) + "\n")
    if not gpu:
        print("CPU, references, no claim about kernels. The card's floors are an H200's.\n")
    print("\n\n".join(whole.card(c, options.batch, options.context, subject.roofs or whole.H200)), flush=True)
    found: dict[str, list[dict[str, Any]]] = {"pass": [], "decode": []}

    def keep(line: dict[str, Any]) -> None:
        found[line["kind"]].append(line)
        if options.record:
            measure.record({"machine": where, **line})

    for context in options.context:
        for batch in options.batch:
            try:
                for line in passes(subject, batch, context, options.rounds):
                    keep(line)
                if not options.no_decoding:
                    for mode in options.modes:
                        options_of = dict(
                            new=options.new, threshold=options.threshold, rounds=max(1, options.rounds // 5)
                        )
                        keep(decoding(subject, batch, context, mode, **options_of))
            except torch.OutOfMemoryError:
                print(f"batch {batch}, context {context}: out of memory", flush=True)
    if found["pass"]:
        print(f"\n{whole.pass_table(found['pass'])}")
        if text := whole.regime(c, found["pass"], subject.roofs):
            print(f"\nWhen diffusion beats AR:\n\n{text}")
    if found["decode"]:
        print(f"\nDecoding, prefill excluded, {options.new} tokens:\n\n{whole.decode_table(found['decode'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
