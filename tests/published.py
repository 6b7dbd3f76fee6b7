"""Published programs run beside our ops: a model that is a table, and torch with our noise in place of its own.

They are not here. TT_PEER_SOURCES names a folder of checkouts OWNER/NAME, of which these files are read, no more:

    ML-GSAI/LLaDA            b7e6c35  generate.py
    NVlabs/Fast-dLLM         24cc59e  llada/generate.py
    inclusionAI/dInfer       fce4e32  python/dinfer/decoding/parallel_strategy.py (Fast-dLLM's factor)
    JetAstra/SDAR            c2041a8  generate.py
    InternLM/lmdeploy        1263d5c  lmdeploy/pytorch/strategies/dllm/unmasking.py
    Feng-Hong/WINO-DLLM      9549a1d  LLaDA/decoding.py
    kuleshov-group/remdm     f830d65  diffusion.py
    ZHZisZZ/dllm             ca17675  dllm/pipelines/dream/models/generation_utils.py and
                                      dllm/pipelines/llada21/models/modeling_llada21_moe.py: Dream's and LLaDA2.1's own

Models are tables; where programs draw, they are handed our noise. The mask's logit is -inf, which they do not see to.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.peers.base import Unavailable
from bench.peers.sources import published
from tt_kernels import Sampling, gumbel_noise, unmask_logits
from tt_kernels.reference.unmasking import DRAW, RANDOM, gumbel, uniform

V, MASK, B, PROMPT = 40, 39, 3, 8


class Model:
    """Logits [B, T, V] in fp64, a fixed function of tokens and places; it remembers what it was asked last."""

    device = torch.device("cpu")

    def __init__(self, seed: int, row: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own, self.before, self.after, self.place = (
            1.5 * torch.randn(n, V, generator=generator).double() for n in (V, V, V, 128)
        )
        self.row, self.prompt = row, torch.randint(0, MASK, (B, PROMPT), generator=generator)

    def logits(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1]) if places is None else places.flatten()
        around = self.before[x.roll(1, 1)] + self.after[x.roll(-2, 1)]
        return (self.own[x] + around + self.place[places]).index_fill(2, torch.tensor([MASK]), -math.inf)

    def __call__(self, x: Tensor, *rest: Any, position_ids: Tensor | None = None, **more: Any) -> SimpleNamespace:
        self.x, self.places = x.clone(), torch.arange(x.shape[1]) if position_ids is None else position_ids.flatten()
        return SimpleNamespace(logits=self.logits(x, self.places), past_key_values=None)

    forward = __call__

    def eval(self) -> None:
        pass

    def key(self) -> tuple[Tensor, Tensor, Tensor]:
        """What our noise is keyed on, [B, T]: row, place, and for the step how many are masked."""
        rows = self.row + torch.arange(len(self.x)).unsqueeze(1)
        return tuple(t.expand(self.x.shape) for t in (rows, self.places, (self.x == MASK).sum(1, keepdim=True)))


class Dice:
    """torch, whose random numbers are ours, of the model's last pass."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def noise(self) -> Tensor:
        return gumbel_noise(*self.model.key(), vocab_size=V)

    def rand_like(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        assert t.shape == (*self.model.x.shape, V)
        return (-(-self.noise()).exp()).exp()  # of which the program takes -log(-log)

    def rand(self, *size: Any, device: Any) -> Tensor:
        chance = uniform(*self.model.key(), RANDOM)
        return chance if size == (tuple(chance.shape),) else 1 - chance[self.model.x == MASK]  # Dream's: of masked ones

    def multinomial(self, p: Tensor, num_samples: int) -> Tensor:
        if p.shape == self.model.x.shape:  # of positions
            return (p.log() + gumbel(*self.model.key(), DRAW)).topk(num_samples).indices
        return (p.log() + self.noise().flatten(0, 1)).argmax(-1, keepdim=True)

    def Categorical(self, probs: Tensor) -> SimpleNamespace:
        drawn = (probs.log() + self.noise()[self.model.x == MASK]).argmax(-1)
        return SimpleNamespace(sample=lambda: drawn)


def theirs(repository: str, path: str, *names: str, **given: Any) -> SimpleNamespace:
    try:
        return published(repository, path, *names, **given)
    except Unavailable as why:
        pytest.skip(str(why))


def masked(prompt: Tensor, length: int) -> Tensor:
    return torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)


def each(number: float | Tensor) -> Tensor:
    return torch.as_tensor(number).expand(B)


def settings(x: Tensor, position: int = 0, **more: Any) -> Sampling:
    return Sampling.of(len(x), seed=torch.arange(len(x)), position=position, step=(x == MASK).sum(1), **more)


def step(model: Model, x: Tensor, a: int, b: int, drawn: dict[str, Any], *, alone: bool = False, **rule: Any) -> Tensor:
    """One pass of ours over places a to b of sequences, which the model sees alone or all of."""
    block = x[:, a:b]
    logits = model.logits(block, torch.arange(a, b)) if alone else model.logits(x)[:, a:b]
    sampling = settings(block if alone else x, a, **drawn)
    out = unmask_logits(logits, block, sampling, mask_token_id=MASK, **rule)
    return torch.cat([x[:, :a], out.block, x[:, b:]], 1)
