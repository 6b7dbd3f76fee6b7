"""A tower's passes by torch.compile, for a CPU: what generation makes again and again for a single row.

Between the products of a token or a block lie hundreds of small operations, each of which takes longer to call than to
compute; compiled, they are a few loops. A GPU replays graphs instead. Batches of several rows stay as they are: each
size would take its own minute to compile.
"""

import functools
import itertools
import logging
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TwoTowerConfig
from .state import ForwardContext, View

_log = logging.getLogger(__name__)


class Layered(Protocol):
    """A tower, seen from here."""

    compiled: bool
    config: TwoTowerConfig

    def layered(self, ids: Tensor, ctx: ForwardContext, modulation: Tensor | None, /) -> Tensor: ...


def _check_compiler() -> None:
    """ValueError where torch.compile cannot make code for this CPU: tried with one addition, in seconds."""
    try:
        torch.compile(torch.add, fullgraph=True)(torch.ones(3), torch.ones(3))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"torch.compile fails here ({reason}); it needs a C++ compiler, such as g++. Go without"
        ) from error


def start(*towers: Layered | None) -> None:
    """Have towers compile their passes as they come."""
    _check_compiler()
    for tower in towers:
        if tower is not None:
            tower.compiled = True


def is_repeated(ids: Tensor, ctx: ForwardContext, block_size: int) -> bool:
    """Whether a pass is one of those that are compiled: a token or a whole block [1, L] of a row with a cache."""
    wanted = ctx.cache is not None and ctx.counts is None and ids.shape[0] == 1 and ids.shape[1] in (1, block_size)
    return wanted and ids.is_cpu and not torch.is_grad_enabled()


def run(tower: Layered, ids: Tensor, ctx: ForwardContext, modulation: Tensor | None) -> Tensor:
    """`tower.layered`, compiled at the first call for each length and kind of pass, whatever the cache's size."""
    v = ctx.cache
    assert v is not None
    table = v.page_table
    if table.shape[1] == 1:  # a size of 1 would have a graph of its own; no token lies in the second page
        table = F.pad(table, (0, 1))
        ctx = replace(ctx, cache=View(v.pool, v.lengths, table, v.ssm, v.ssm_out, v.conv, v.conv_out))
    torch._dynamo.maybe_mark_dynamic(table, 1)
    for buffer in (*v.pool.keys.values(), *v.pool.values.values()):
        torch._dynamo.maybe_mark_dynamic(buffer, 0)
    return _compiled(ctx.kind, ids.shape[1], tower.config)(tower, ids, ctx, modulation)


def _layered(tower: Layered, ids: Tensor, ctx: ForwardContext, modulation: Tensor | None) -> Tensor:
    return tower.layered(ids, ctx, modulation)


@functools.cache
def _compiled(kind: str, length: int, config: TwoTowerConfig) -> Callable[..., Tensor]:
    """`_layered` under a code of its own: torch.compile makes 8 graphs of one at most, and says little of it.

    Models of one config share them: weights are inputs of a graph.
    """
    _log.info("compiling a pass of kind %s over %d tokens: half a minute or so", kind, length)
    own = _layered.__code__.replace(co_name=f"{kind}_{length}_{next(_count)}")  # equal ones would be one
    return torch.compile(types.FunctionType(own, globals()))


_count = itertools.count()
