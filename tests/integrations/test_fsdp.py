"""Two processes that share the layers of a model: gradients are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("transformers", minversion="5.20")

PROGRAM = """
import os
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny import error, gradients, tiny
from tt_kernels.integrations import transformers as tt

rank, store, *types = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
for model_type in types:
    model = tiny(model_type)
    tt.apply(model)
    alone = gradients(model, wide=False)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    shared = gradients(model, wide=False)
    assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.dim() > 1 < len(p))
    print(max(error(shared[name].full_tensor(), grad) for name, grad in alone.items()), flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive the group, and then end the interpreter with an abort
"""


TYPES = ("nemotron_h", "qwen2_moe")


def test_gradients(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store"), *TYPES],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    for process in [start(0), start(1)]:
        out, _ = process.communicate(timeout=200)
        # Both read the same batch: what is averaged is equal, and only the order of sums can differ.
        errors = [float(line) for line in out.splitlines()[-len(TYPES) :]]
        assert process.returncode == 0 and len(errors) == len(TYPES) and max(errors) < 1e-11
