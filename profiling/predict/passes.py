"""Whole passes on meta tensors: every launch of ours and every operation of PyTorch, in their order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.whole import AR, COMMIT, DENOISER, Pass
from tt_kernels import Sampling, head_sample, unmask
from tt_kernels.runtime.launch import recording
from tt_model import TwoTower, TwoTowerConfig
from tt_model.modeling.state import Cache

from .rates import Rates

PASSES = ("denoise", "commit", "ar", "prefill", "clean", "noisy")
# What launches nothing: views, and memory that nobody fills.
QUIET = {
    "view", "reshape", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "permute", "detach", "unbind",
    "split", "split_with_sizes", "as_strided", "empty", "empty_like", "empty_strided", "new_empty", "alias", "squeeze",
    "unsqueeze", "lift_fresh", "unflatten", "flatten", "chunk", "narrow", "numpy_T", "movedim", "unfold", "view_as",
    "expand_as", "resize_", "set_", "sym_size", "is_same_size", "result_type", "contiguous", "to", "new_empty_strided",
    "swapaxes", "diagonal", "real", "mT", "data", "_reshape_alias", "broadcast_to", "promote_types", "scalar_tensor",
    "size", "stride", "item", "_local_scalar_dense", "dropout",
}  # fmt: skip
COPIES = {"to", "contiguous", "reshape", "flatten"}  # of QUIET, where they cannot be views
PRODUCTS = {"linear", "mm", "addmm", "bmm", "matmul", "baddbmm", "_grouped_mm"}
NEAR = 30e6  # bytes, half of an H200's L2
LEAST = {True: 2.0e-6, False: 1.5e-6}  # s of a small product, of any other small operation: assumed


@dataclass
class Operation:
    """An operation of PyTorch: what it moves and computes."""

    name: str
    shape: tuple[int, ...]
    bytes: float
    flops: float

    def seconds(self, r: Rates) -> float:
        return max(self.limit(r), LEAST[self.flops > 0])

    def limit(self, r: Rates) -> float:
        return max(self.bytes / r.dram, self.flops / r.products)


@dataclass
class Recorded:
    """What a pass launches: (kernel, grid, arguments, options) and operations, and its floor."""

    launches: list[Any] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    far: set[int] = field(default_factory=set)  # storages of weights, caches and states

    def near(self, t: Tensor) -> bool:
        """Whether a launch finds it in L2: an earlier one of the pass has written it, and it is small enough."""
        return t.untyped_storage()._cdata not in self.far and t.numel() * t.element_size() < NEAR


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        own = {t.untyped_storage()._cdata for t in made} - {t.untyped_storage()._cdata for t in given}
        if name in COPIES and own:
            name = "_to_copy"  # inference mode shows no parts of what is made of others
        elif function.namespace != "aten" or name in QUIET or getattr(function, "is_view", False):
            return result
        if not made:
            return result
        size = lambda t: t.numel() * t.element_size()
        moved = sum(map(size, given)) + sum(map(size, made))
        if name in ("embedding", "index_select", "index", "gather"):
            moved = 2 * sum(map(size, made))
        elif name in ("copy_", "zero_", "fill_", "_to_copy", "clone"):
            moved = 2 * size(made[0]) if given[1:] or name in ("_to_copy", "clone") else size(made[0])
        flops = 0.0
        if name in PRODUCTS and len(given) > 1:
            inner = next(t for t in given if t.dim() > 1).shape[-1] if name != "addmm" else given[1].shape[-1]
            flops = 2.0 * made[0].numel() * inner
        self.seen.append(Operation(name, tuple(made[0].shape), float(moved), flops))
        return result


def _cache(model: TwoTower, batch: int, context: int, room: int) -> Cache:
    config = model.config
    cache = Cache.empty(config, batch, device=torch.device("meta"), dtype=torch.bfloat16, reserve=context + room)
    for row in cache._rows:
        row.length = context
    cache.last_hidden = torch.zeros(batch, config.hidden_size, dtype=torch.bfloat16)
    cache.head = model.context_lm_head.weight
    return cache


def make(
    config: TwoTowerConfig, kind: str, batch: int, context: int, length: int
) -> tuple[Callable[[], Any], TwoTower, Cache | None]:
    """The call that is the pass, to be made on the meta device; its model and cache."""
    model = TwoTower(replace(config, dtype=torch.bfloat16)).to(torch.bfloat16)
    S = config.block_size
    if kind in ("clean", "noisy"):
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        if kind == "clean":
            return (lambda: model.encode_clean(tokens, S)), model, None
        states = model.encode_clean(tokens, S)
        t = torch.zeros(batch, length // S)
        return (lambda: model.denoise_all(states, tokens, t, output="hidden")), model, None
    L = {"ar": 1, "prefill": length}.get(kind, S)
    cache = _cache(model, batch, context, 2 * L)
    block = torch.zeros(batch, L, dtype=torch.int64)
    sampling = Sampling.of(batch, device=torch.device("meta"))
    if kind == "denoise":
        t, row = torch.zeros(batch), lambda dtype: torch.zeros(batch, dtype=dtype)
        rule = dict(mask_token_id=config.mask_token_id, threshold=row(torch.float64), steps_left=row(torch.int64))

        def denoise() -> Any:
            hidden = model.denoise(block, t, cache, output="hidden")
            return unmask(hidden, model.lm_head.weight, block, sampling, **rule)

        return denoise, model, cache
    if kind == "ar":

        def step() -> Any:
            assert cache.last_hidden is not None and cache.head is not None
            token, _ = head_sample(cache.last_hidden, cache.head, sampling)[:2]
            return model.commit(token.unsqueeze(1), cache)

        return step, model, cache
    return (lambda: model.commit(block, cache)), model, cache


def record(
    config: TwoTowerConfig, kind: str, *, batch: int = 1, context: int = 2048, length: int = 2048, target: int = 90
) -> Recorded:
    """Runs a pass on meta tensors: nothing is computed."""
    with torch.device("meta"), torch.no_grad(), recording(target) as launches:
        call, model, cache = make(config, kind, batch, context, length)
        kept: list[Tensor] = [*model.parameters(), *model.buffers()]
        if cache is not None:
            pool = cache.pool
            kept += [t for part in (pool.conv, pool.ssm, pool.keys, pool.values) for t in part.values()]
        with torch.inference_mode() if kind not in ("clean", "noisy") else nullcontext():
            call()  # what is kept of the weights is made
        del launches[:]
        # Training's noisy pass keeps what a backward needs; its launches are the forward's all the same.
        with torch.inference_mode() if kind not in ("clean", "noisy") else nullcontext(), _Operations() as operations:
            call()
    from tt_model.modeling.two_tower import _frequencies

    _frequencies.cache_clear()  # made on the meta device here
    return Recorded(list(launches), operations.seen, {t.untyped_storage()._cdata for t in kept})


def least(config: TwoTowerConfig, kind: str, r: Rates, *, batch: int, context: int) -> float | None:
    """The floor of a pass by bench/whole.py, as in SPEED.md, at the model's rates; None for whole sequences."""
    kinds = {"denoise": DENOISER, "commit": COMMIT, "ar": AR}
    if kind not in kinds:
        return None
    roofs = {"bandwidth": r.dram, "compute": r.products}
    return Pass(config, kinds[kind], batch, context).floor(roofs)
