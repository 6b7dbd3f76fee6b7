"""What decides whether an op runs as kernels, and what is refused instead of handed to them: GPUs, dtypes, devices.

GPUs are faked: tensors that hold nothing, with properties of any GPU.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from parity import leaves, make, with_leaves
from torch._subclasses.fake_tensor import FakeTensorMode

import tt_kernels
from cards import OPS
from tt_kernels.runtime import registry
from tt_kernels.runtime.launch import INTERPRET, ON_CPU

pytestmark = pytest.mark.kernels
# Per-row settings, in fp64 on purpose: no dtype of theirs is refused.
SETTINGS = {"sampling.temperature", "threshold", "strategy.factor", "strategy.entropy_bound"}
SETTINGS |= {"remasking.edit", "remasking.verify", "remasking.sigma"}
COMPUTED_WITH = [
    pytest.param(name, leaf, id=f"{name}-{leaf}")
    for name, op in OPS.items()
    if op.kernels
    for leaf, t in leaves(make(op, op.cases[0], torch.float32)).items()
    if t.is_floating_point() and leaf not in SETTINGS
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Its properties, to be changed; tensors made meanwhile hold nothing, and may be on device "cuda"."""
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(registry, "_properties", lambda device: properties)
    with FakeTensorMode():
        yield properties


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3)])
def test_gpus_that_launches_are_made_for(gpu: SimpleNamespace, capability: tuple[int, int]) -> None:
    gpu.major, gpu.minor = capability
    assert registry.takes_kernel("t", torch.ones(2, device="cuda"), None)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (12, 0)])
def test_other_gpus_are_refused_by_name(gpu: SimpleNamespace, capability: tuple[int, int]) -> None:
    gpu.major, gpu.minor = capability
    x, weight = torch.ones(2, 4, device="cuda"), torch.ones(4, device="cuda")
    named = "cuda:0 has compute capability {}.{}, kernels are made for 8.0, 9.0, 10.0, 10.3".format(*capability)
    with pytest.raises(NotImplementedError) as error:
        tt_kernels.rms_norm(x, weight)
    assert str(error.value).startswith(f"rms_norm: {named}; ") and 'tt_kernels.use("reference")' in str(error.value)
    with tt_kernels.use("reference"):
        assert not registry.takes_kernel("rms_norm", x, weight)


def test_what_a_gpu_is_does_not_break_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_properties", lambda device: SimpleNamespace(major=8, minor=9))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + registry._capability(0), fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 90
    torch._dynamo.reset()


def test_devices_must_be_one(gpu: SimpleNamespace) -> None:
    x, weight = torch.ones(2, 4, device="cuda"), torch.ones(4)
    with pytest.raises(ValueError, match="rms_norm: weight is on cpu, but x is on cuda:0"):
        tt_kernels.rms_norm(x, weight)
    with pytest.raises(ValueError, match="t: tensors are on cuda:0 and cuda:1, expected one device"):
        registry.takes_kernel("t", x, None, torch.ones(4, device="cuda:1"))


@pytest.mark.parametrize("wide", ["x", "weight", "shift", "branch"])
def test_a_gpu_refuses_fp64_wherever_it_is(gpu: SimpleNamespace, wide: str) -> None:
    sizes = dict(x=(1, 2, 4), weight=(4,), shift=(1, 4), scale=(1, 4), branch=(1, 2, 4), gate=(1, 4))
    kwargs = {name: torch.ones(size, device="cuda") for name, size in sizes.items()}
    kwargs[wide] = kwargs[wide].double()
    with pytest.raises(NotImplementedError, match="modulated_rms_norm: no fp64 kernel on a GPU"):
        tt_kernels.modulated_rms_norm(**kwargs)


@pytest.mark.parametrize(
    "name", ["context_attention", "append_attention", "causal_attention", "block_diffusion_attention"]
)
def test_attention_is_in_one_dtype(name: str) -> None:
    kwargs = make(OPS[name], OPS[name].cases[0], torch.float32)
    for leaf in leaves(kwargs).keys() & {"k", "v", "k_pages", "v_pages", "k_clean", "v_clean"}:
        mixed = with_leaves(kwargs, {leaf: leaves(kwargs)[leaf].half()})
        with pytest.raises(
            ValueError, match=f"^{name}: {leaf} is torch.float16, expected torch.float32, the dtype of q"
        ):
            OPS[name].fn(**mixed)


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ValueError, match="causal_attention: q has Hq=0, expected 1 or more"):
        tt_kernels.causal_attention(torch.ones(1, 3, 0, 4), *torch.ones(2, 1, 3, 1, 4))
    with pytest.raises(ValueError, match="causal_conv1d: weight has K=0, expected 1 or more"):
        tt_kernels.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 0))
    with pytest.raises(ValueError, match="conv_advance: x has C=0, expected 1 or more"):
        tt_kernels.conv_advance(torch.ones(1, 3, 0), torch.ones(1, 0, 2))


@pytest.mark.skipif(not INTERPRET, reason="bf16 is right elsewhere")
@pytest.mark.parametrize("name,leaf", COMPUTED_WITH)
def test_the_interpreter_refuses_bf16_wherever_it_is(name: str, leaf: str) -> None:
    kwargs = make(OPS[name], OPS[name].cases[0], torch.float32)
    kwargs = with_leaves(kwargs, {leaf: leaves(kwargs)[leaf].bfloat16()})
    # The experts' matrices and what attends are of one dtype: they are named before.
    with pytest.raises((NotImplementedError, ValueError), match=f"^{name}: ") as error:
        OPS[name].fn(**kwargs)
    assert isinstance(error.value, NotImplementedError) or name.startswith("experts") or "attention" in name


def test_a_cpu_takes_the_reference() -> None:
    assert registry.takes_kernel("t", torch.ones(2), torch.ones(2)) == ON_CPU
