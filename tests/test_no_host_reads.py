"""A denoiser pass never waits for the device: run on meta tensors, which hold nothing that the host could read."""

from dataclasses import replace

import pytest
import torch
from checkpoints import CONFIG

from tt_kernels.launch import INTERPRET, recording
from tt_model import TwoTower
from tt_model.cache import Cache
from tt_model.two_tower import _frequencies


@pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
@pytest.mark.parametrize("rows", [1, 3])
def test_denoise_reads_no_device_value(rows: int) -> None:
    config = replace(CONFIG, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = TwoTower(config).to(torch.bfloat16)
        cache = Cache(config, rows, device=torch.device("meta"), dtype=torch.bfloat16)
        cache.reserve(100)
        block = torch.zeros(rows, config.block_size, dtype=torch.int64)
        with recording(90) as launches:
            logits = model.denoise(block, torch.zeros(rows), cache)
    _frequencies.cache_clear()
    assert logits.shape == (rows, config.block_size, config.vocab_size)
    assert len(launches) >= len(config.pattern), "its ops are kernels"
