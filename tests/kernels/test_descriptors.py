"""Which kernels the small cases run with tensor descriptors and without."""

from collections import defaultdict

import pytest
import torch
from parity import leaves, make, values_and_gradients, with_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from cards import OPS
from tt_kernels.runtime.launch import INTERPRET, recording

pytestmark = pytest.mark.sanitize


@pytest.mark.skipif(INTERPRET, reason="launches are not recorded")
def test_small_cases_take_the_forms_with_descriptors_and_without() -> None:
    """As on sm_90, which a CPU stands for."""
    seen: dict[str, set[bool]] = defaultdict(set)
    for name in ("experts", "context_attention", "append_attention", "head_sample"):
        for dims in (dims for dims in OPS[name].cases if dims.get("T") != 0):
            kwargs = make(OPS[name], dims, torch.bfloat16)
            kwargs = with_leaves(kwargs, {key: t.to("meta") for key, t in leaves(kwargs).items()})
            with recording(90) as launches:
                values_and_gradients(OPS[name], OPS[name].fn, kwargs)
            for kernel, _, arguments, _ in launches:
                seen[kernel.__name__].add(any(isinstance(a, TensorDescriptor) for a in arguments))
                operands = [part for a in arguments if isinstance(a, tuple) for part in a]
                assert not any(isinstance(part, TensorDescriptor) for part in operands), "Triton 3.6 cannot launch that"
    assert {kernel for kernel, forms in seen.items() if len(forms) == 2} == {
        *("_experts_up_kernel", "_experts_down_kernel", "_experts_bwd_hidden_kernel"),
        *("_context_attention_kernel", "_head_kernel"),
    }
