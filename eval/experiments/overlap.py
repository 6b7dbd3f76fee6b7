"""How many different experts the tokens of a block use, in each layer of both towers, beside independent draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tt_model import TwoTower
from tt_model.modeling import moe
from tt_model.training.boilerplate import program
from tt_model.training.objective import mask_blocks

from ..quality import held_out

STATES = ("context", "denoiser, all masked", "denoiser, half masked")


@contextmanager
def routed() -> Iterator[list[Tensor]]:
    """The experts [T, k] of every layer with experts that runs meanwhile, in the order of the layers."""
    found: list[Tensor] = []
    route = moe.route

    def listening(*arguments: Any, **options: Any) -> Any:
        routing = route(*arguments, **options)
        found.append(routing.topk_ids.clone())
        return routing

    moe.route = listening
    try:
        yield found
    finally:
        moe.route = route


def distinct(ids: Tensor, block: int, experts: int) -> Tensor:
    """[T / block]: different experts in every block of tokens with experts [T, k]."""
    blocks = ids.long().reshape(-1, block * ids.shape[1])
    return torch.zeros(len(blocks), experts).scatter_(1, blocks.cpu(), 1).sum(1)


def expected(share: Tensor, block: int) -> float:
    """The same, if every token drew its experts without regard to the others: share [E] of tokens that use each."""
    return float((1 - (1 - share.double()) ** block).sum())


@torch.no_grad()
def measure(model: TwoTower, documents: int = 64) -> dict[str, Any]:
    """Over held-out documents: the mean over blocks, and what independent draws would give, evenly or as often as each
    expert is used. A denoiser's block is as it begins, and with every second token masked by chance."""
    c, seen = model.config, {state: [] for state in STATES}
    S, E = c.block_size, c.n_routed_experts
    noise = torch.Generator().manual_seed(0)
    for header in held_out("headers", documents):
        ids = [*model.tokenizer.encode(f"{header}\n{program(header)}"), c.eos_token_ids[0]]
        clean = torch.tensor([ids[: len(ids) // S * S]], device=model.device)
        with routed() as found:
            context = model.encode_clean(clean, S)
        seen["context"].append(found)
        full = mask_blocks(clean, S, c.mask_token_id, noise, full=1.0)
        half = torch.rand(clean.shape, generator=noise).to(model.device) < 0.5
        noisy = {1.0: full.ids, 0.5: clean.masked_fill(half, c.mask_token_id)}
        for state, (t, block_ids) in zip(STATES[1:], noisy.items(), strict=True):
            with routed() as found:
                model.denoise_all(context, block_ids, torch.full_like(full.t, t))
            seen[state].append(found)
    layers = []
    for i, layer in enumerate(c.layers_of("E")):
        for state, passes in seen.items():
            ids = torch.cat([found[i] for found in passes])
            share = torch.bincount(ids.flatten().long(), minlength=E) / len(ids)
            mean = float(distinct(ids, S, E).mean())
            layers.append({"layer": layer, "state": state, "distinct": mean, "alike": expected(share.cpu(), S)})
    even = expected(torch.full((E,), c.num_experts_per_tok / E), S)
    return {"block_size": S, "experts": E, "top_k": c.num_experts_per_tok, "even": even, "layers": layers}
