"""A denoising step never waits for the device: run on meta tensors, which hold nothing that the host could read."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from checkpoints import CONFIG

from tt_kernels import Sampling, unmask
from tt_kernels.runtime.launch import INTERPRET, recording
from tt_model import TwoTower
from tt_model.modeling.state import Cache
from tt_model.modeling.two_tower import _frequencies

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
ROWS = 3


@pytest.fixture
def model() -> Iterator[TwoTower]:
    with torch.device("meta"):
        yield TwoTower(replace(CONFIG, dtype=torch.bfloat16)).to(torch.bfloat16).requires_grad_(False)
    _frequencies.cache_clear()


def filled(model: TwoTower, rows: int) -> Cache:
    return Cache.empty(model.config, rows, device=torch.device("meta"), dtype=torch.bfloat16, reserve=100)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_denoise(model: TwoTower, rows: int) -> None:
    block = torch.zeros(rows, model.config.block_size, dtype=torch.int64, device="meta")
    with recording(90) as launches:
        logits = model.denoise(block, torch.zeros(rows, device="meta"), filled(model, rows))
    assert logits.shape == (rows, model.config.block_size, model.config.vocab_size)
    assert len(launches) >= len(model.config.pattern), "its ops are kernels"


@pytest.mark.parametrize("narrow", [dict(), dict(top_k=3), dict(top_p=0.5), dict(top_k=3, top_p=0.5)], ids=str)
def test_unmask(model: TwoTower, narrow: dict) -> None:
    c = model.config
    with torch.device("meta"):
        block = torch.zeros(ROWS, c.block_size, dtype=torch.int64)
        hidden = torch.zeros(*block.shape, c.hidden_size, dtype=torch.bfloat16)
        whole, real = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.float64)
        sampling = Sampling.of(ROWS, temperature=real, **narrow)
        rule = dict(mask_token_id=c.mask_token_id, threshold=real, steps_left=whole)
        with recording(90) as launches:
            results = unmask(hidden, model.lm_head.weight, block, sampling, **rule)
    assert [t.shape for t in results] == [block.shape] * 3 + [(ROWS,)]
    assert launches
