"""`apply` in tiny models of every type: what comes out is theirs, on the CPU, where ours run as references."""

import copy

import pytest
import torch
from tiny import IDS, PADDED, TINY, error, gradients, greedy, logits, tiny

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt

# fp64 on both sides (tiny.Wide), whose roundings are 1e-16: a few layers of sums, exponentials and norms make 1e-13 of
# them. One part in fp32 would show as 1e-7.
BOUND = 1e-11


@pytest.mark.parametrize("model_type", TINY)
def test_it_is_the_same_model(model_type: str) -> None:
    model = tiny(model_type)
    before = logits(model), *greedy(model)
    slopes = gradients(model)
    data = [p.data_ptr() for p in model.parameters()]
    changes = tt.apply(model)
    assert changes.replaced
    after = logits(model), *greedy(model)
    assert torch.equal(after[1], before[1])
    assert error(after[0], before[0]) < BOUND and error(after[2], before[2]) < BOUND
    found = gradients(model)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert error(found[name], slope) < BOUND, name
    assert data == [p.data_ptr() for p in model.parameters()]  # nothing was copied
    changes.undo()
    assert torch.equal(logits(model), before[0]) and torch.equal(greedy(model)[1], before[2])
