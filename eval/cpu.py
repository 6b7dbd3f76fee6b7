"""`python -m eval.cpu`: how fast the plain-PyTorch model is on a CPU, against transformers and its own products.

Two questions, on the same random mid-size model (`eval.models.MIDDLE`), batch 1, fp32:
1. AR decoding, prefill included: tokens/s of `generate(mode="ar")` and of transformers on the same weights, with each
   experts implementation that runs here; with --compile also all of them by torch.compile. Goal: twice the best.
2. One denoiser pass over a block of 16: its time over the time of its own matrix products, recorded as it runs and run
   again with nothing between them. Goal: at most 1.5.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import in_a_line, interleaved, no_commit, positive, ratio, record, table, where
from tt_model import TwoTower, TwoTowerConfig
from tt_model.modeling.moe import MoE

from .models import MIDDLE, as_nemotron_h, experts_implementations, greedy_nemotron_h, random_model

OURS = 'this model, mode "ar"'
BY_COMPILER = ", compiled"
COMPILED = OURS + BY_COMPILER

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten._grouped_mm)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu


class Recorder(TorchDispatchMode):
    """Keeps every matrix product that runs inside the `with` block, with its arguments, and counts its operations.

    Of an attention these are two: queries by keys, and weights by values, the query heads of a KV head as one matrix.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.overloadpacket in PRODUCTS:
            left = args[function.overloadpacket in (aten.addmm, aten.addmv, aten.baddbmm)]
            self.calls.append((function, args, kwargs))
            self.flops += 2 * result.numel() * left.shape[-1]
        elif function.overloadpacket is ATTENTION:
            k, v = (t.flatten(0, 1).contiguous() for t in args[1:3])  # [B * Hkv, S, P]
            q = args[0].reshape(len(k), -1, k.shape[-1])
            weights = (q @ k.mT).softmax(-1)
            self.calls += [(aten.bmm.default, (q, k.mT), {}), (aten.bmm.default, (weights, v), {})]
            self.flops += 4 * weights.numel() * q.shape[-1]
        return result

    def replay(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def needed_flops(model: TwoTower, tokens: int) -> int:
    """Operations that a denoiser pass over `tokens` tokens of one row needs in its linear layers and chosen experts."""
    c, tower = model.config, model.denoiser_tower
    linears = [m for m in (*tower.modules(), model.lm_head) if isinstance(m, torch.nn.Linear)]
    total = sum(2 * tokens * m.weight.numel() for m in linears)
    time = [m for m in (*model.t_embedder.modules(), *model.t_block) if isinstance(m, torch.nn.Linear)]
    total += sum(2 * m.weight.numel() for m in time)
    for module in tower.modules():
        if isinstance(module, MoE):
            pairs = tokens * c.num_experts_per_tok
            total += 2 * tokens * module.gate.weight.numel() + 4 * pairs * c.moe_intermediate_size * c.hidden_size
    return total


def decoding(
    model: TwoTower, prompt: Tensor, new_tokens: int, rounds: int, *, compiled: TwoTower | None = None
) -> dict[str, list[float]]:
    """Seconds to read a prompt [1, P] and write new tokens: this model, then transformers in all its forms.

    With `compiled`, the model with compiled passes, each again by torch.compile, but for transformers' `generate`.
    """
    ids = prompt.tolist()

    def ours(model: TwoTower) -> list[int]:
        return model.generate(ids, mode="ar", max_new_tokens=new_tokens, eos_token_id=None).tokens[0]

    expected = ours(model)
    runs: dict[str, Callable[[], Any]] = {OURS: lambda: ours(model)}
    if compiled is not None:
        if ours(compiled) != expected:
            raise RuntimeError("compiled, this model writes other tokens: nothing to compare")
        runs[COMPILED] = lambda: ours(compiled)
    for experts in experts_implementations():
        peer = as_nemotron_h(model, experts=experts)
        try:
            tokens = greedy_nemotron_h(peer, prompt, new_tokens)[0].tolist()
        except Exception as error:  # needs a GPU or a package
            print(f"transformers, {experts}: not here ({str(error).splitlines()[0][:80]})", file=sys.stderr)
            continue
        if tokens != expected:
            raise RuntimeError(f"transformers with experts {experts!r} writes other tokens: nothing to compare")
        runs[f"transformers, {experts}"] = lambda peer=peer: greedy_nemotron_h(peer, prompt, new_tokens)
        runs[f"transformers, {experts}, its generate()"] = lambda peer=peer: peer.generate(
            prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        if compiled is not None:
            other = as_nemotron_h(model, experts=experts)
            other.compile()
            for _ in range(2):  # once more for what is compiled anew for other sizes
                tokens = greedy_nemotron_h(other, prompt, new_tokens)[0].tolist()
            if tokens != expected:
                raise RuntimeError(f"compiled, transformers with experts {experts!r} writes other tokens")
            runs[f"transformers, {experts}{BY_COMPILER}"] = lambda other=other: greedy_nemotron_h(
                other, prompt, new_tokens
            )
    return interleaved(runs, rounds)


def denoiser(
    model: TwoTower, context: int, rounds: int, block_size: int = 16, compiled: TwoTower | None = None
) -> tuple[dict[str, list[float]], Recorder]:
    """Seconds of a denoiser pass over a half-masked block after `context` tokens, of its products alone, and of the
    same pass of a model with compiled passes."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4, model.config.vocab_size, (1, context + block_size), generator=g)
    cache, block = model.prefill(ids[:, :context]), ids[:, context:].clone()
    block[:, ::2] = model.config.mask_token_id
    t = torch.tensor([0.5])
    with Recorder() as recorder:
        model.denoise(block, t, cache)
    with torch.inference_mode():  # as generate runs it
        runs: dict[str, Callable[[], Any]] = {
            "pass": lambda: model.denoise(block, t, cache),
            "products": recorder.replay,
        }
        if compiled is not None:
            runs["compiled"] = lambda: compiled.denoise(block, t, cache)
        times = interleaved(runs, rounds, repeats=5)
    return times, recorder


def fastest(times: dict[str, list[float]], ours: str) -> float:
    """How many times as fast one of our rows is as the best of transformers, compiled ones where it is compiled too."""
    peers = (name for name in times if not name.startswith(OURS))
    allowed = (name for name in peers if ours == COMPILED or not name.endswith(BY_COMPILER))
    best = min(allowed, key=lambda name: median(times[name]))
    print(f"{ours}: {(speedup := ratio(times, best, ours)):.2f} times as fast as {best} (goal: 2)")
    return speedup


def report(config: TwoTowerConfig, options: argparse.Namespace) -> dict[str, Any]:
    ran_on = where()
    print(in_a_line(ran_on))
    model = random_model(config)
    size = sum(p.numel() for p in model.context_tower.parameters()) / 1e6
    print(f"{config.pattern}, hidden size {config.hidden_size}, {size:.0f} M parameters a tower, batch 1, fp32")
    prompt = torch.randint(4, config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))

    print(f"\nAR decoding, {options.prompt} tokens read, {options.new} written, median of {options.rounds}:\n")
    compiled = copy.deepcopy(model) if options.compile else None
    if compiled is not None:
        compiled.compile_passes()
    times = decoding(model, prompt, options.new, options.rounds, compiled=compiled)
    rows = [
        (
            name,
            f"{options.new / median(t):.1f}",
            f"{1e3 * median(t) / options.new:.2f}",
            f"{ratio(times, name, OURS):.2f}",
        )
        for name, t in times.items()
    ]
    print(table(("", "tokens/s", "ms a token", "times our time"), rows))
    print()
    speedups = {"speedup": fastest(times, OURS)}
    if compiled is not None:
        speedups["compiled_speedup"] = fastest(times, COMPILED)

    print(f"\nA denoiser pass over 16 tokens, median of {options.rounds}:\n")
    rows, passes = [], []
    for context in options.context:
        taken, recorder = denoiser(model, context, options.rounds, compiled=compiled)
        over = ratio(taken, "pass", "products")
        whole, bare = (1e3 * median(taken[name]) for name in ("pass", "products"))
        extra = recorder.flops / needed_flops(model, 16)
        found = (f"{1e3 * median(taken['compiled']):.2f}",) if compiled else ()
        rows.append(
            (context, f"{whole:.2f}", f"{bare:.2f}", f"{over:.2f}", len(recorder.calls), f"{extra:.3f}", *found)
        )
        passes.append({"context": context, "pass_ms": whole, "products_ms": bare, "ratio": over})
    header = ("tokens before", "pass ms", "products ms", "ratio (goal: 1.5)", "products", "flops / needed")
    header += ("compiled ms",) if compiled else ()
    print(table(header, rows))
    decode = {name: options.new / median(t) for name, t in times.items()}
    return {"kind": "cpu", "machine": ran_on, "tokens_per_s": decode, **speedups, "denoiser": passes}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=9, help="of alternating runs (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="default: what torch takes")
    parser.add_argument("--prompt", type=positive, default=64, help="tokens read (default: %(default)s)")
    parser.add_argument("--new", type=positive, default=64, help="tokens written (default: %(default)s)")
    parser.add_argument("--context", type=positive, nargs="+", default=[64, 128, 256], help="tokens before the block")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too: minutes more")
    parser.add_argument("--record", action="store_true", help="append a JSON line to bench/results/")
    options = parser.parse_args(arguments)
    if options.record and (why := no_commit()):
        parser.error(f"--record: {why}")
    longest, limit = (
        max(options.prompt + options.new, *(n + 16 for n in options.context)),
        MIDDLE.max_position_embeddings,
    )
    if longest > limit:
        parser.error(
            f"--prompt and --new, or --context and a block of 16, are {longest} tokens; the model takes {limit}"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    row = report(MIDDLE, options)
    try:
        if options.record:
            print(f"\n{record(row)}")
    except OSError as error:
        parser.error(f"--record: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
