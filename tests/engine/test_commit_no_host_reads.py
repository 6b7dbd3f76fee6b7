"""The context tower's passes on meta tensors, which hold nothing that the host could read: `commit`, prefill's
stretches and `verify` never wait for the device, and what a stretch needs does not grow with the prompt before it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import CONFIG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tt_kernels.runtime.launch import INTERPRET, recording
from tt_model import TwoTower
from tt_model.modeling.state import PAGE_SIZE, Cache
from tt_model.modeling.two_tower import PREFILL_CHUNK, prefill_stretch

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
TOWER = replace(CONFIG, dtype=torch.bfloat16)


@pytest.fixture
def model() -> Iterator[TwoTower]:
    with torch.device("meta"):
        yield TwoTower(TOWER).to(torch.bfloat16)


def cache_of(rows: int, tokens: int) -> Cache:
    """Of rows that hold up to `tokens` tokens, with room for a stretch more."""
    room = tokens + PREFILL_CHUNK
    cache = Cache.empty(TOWER, rows, device=torch.device("meta"), dtype=torch.bfloat16, reserve=room)
    for row in cache._rows:
        row.length = tokens
    return cache


def test_commit_reads_no_device_value(model: TwoTower) -> None:
    cache = cache_of(3, 100)
    with recording(90) as launches:
        model.commit(torch.zeros(3, 16, dtype=torch.int64), cache)
    assert cache.longest == 116 and cache.lengths.shape == (3,)
    assert len(launches) >= len(TOWER.pattern), "its ops are kernels"
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names.count("_context_attention_kernel") == TOWER.pattern.count("*"), "attention and append are one launch"


def test_ragged_prefill_reads_no_device_value(model: TwoTower) -> None:
    """The first counts[b] tokens of each row enter."""
    cache = cache_of(3, 0)
    with recording(90), torch.no_grad():
        model._extend(torch.zeros(3, 40, dtype=torch.int64), cache, [40, 3, 0])
    assert cache.longest == 40


def test_verify_reads_no_device_value(model: TwoTower) -> None:
    cache = cache_of(2, 100)
    with recording(90):
        logits, pending = model.verify(torch.zeros(2, 5, dtype=torch.int64), cache)
    assert logits.shape == (2, 5, TOWER.vocab_size) and set(pending.kv) == set(cache.pool.keys)


class Made(TorchDispatchMode):
    """Bytes of all tensors that come to be inside the `with` block; a bound on what lives at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not t._is_view():
                self.total += t.numel() * t.element_size()
                self.largest = max(self.largest, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_a_stretch_of_a_prompt_needs_the_same_wherever_it_is(model: TwoTower, rows: int) -> None:
    def needs(tokens: int) -> tuple[int, int]:
        cache, made = cache_of(rows, tokens), Made()
        stretch = prefill_stretch(rows)
        counts = [stretch] if rows == 1 else [0] * rows
        ids = torch.zeros(rows, stretch, dtype=torch.int64)
        with recording(90), made, torch.no_grad():
            model._extend(ids, cache, counts)
        return made.total, made.largest

    alone, early, (total, largest) = needs(0), needs(4 * PREFILL_CHUNK), needs(64 * PREFILL_CHUNK)
    assert needs(256 * PREFILL_CHUNK) == (total, largest)
    assert rows > 1 or early == (total, largest)  # rows of a batch are split where they are long
    # Of the splits of one layer at most (maxima and sums count twice, being views); the published heads have one split.
    partial = 128 * 128 * (TOWER.head_dim + 4) * 4
    assert total - alone[0] <= TOWER.pattern.count("*") * rows * partial
    widest = max(TOWER.conv_dim + TOWER.mamba_num_heads * (TOWER.mamba_head_dim + 1), 4 * TOWER.hidden_size)
    # A batch needs what one prompt does, as long as that is 64 tokens of each.
    tokens = rows * prefill_stretch(rows)
    assert tokens <= max(PREFILL_CHUNK, 64 * rows)
    assert largest <= max(8 * widest * tokens, rows * partial), "more than a few activations of every token"
    assert rows > 1 or largest < 2 * PREFILL_CHUNK**2, "scores of a stretch by itself"


def test_a_block_needs_little_whatever_the_context(model: TwoTower) -> None:
    """Partial results of splits: 128 * 128 rows of a head at most."""
    heads, P = TOWER.num_attention_heads, TOWER.head_dim
    for tokens in (1000, 8 * PREFILL_CHUNK, 500 * PREFILL_CHUNK):
        cache, made = cache_of(1, tokens), Made()
        with recording(90), made:
            model.commit(torch.zeros(1, 16, dtype=torch.int64), cache)
        assert made.largest <= max(128 * 128 * P * 4, 64 * 16 * heads * P * 4)
    assert PAGE_SIZE % 64 == 0  # what TMA tiles and splits count on
