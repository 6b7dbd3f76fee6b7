"""What test_hub.py runs in processes of their own, where `kernels` 0.17 and a transformers that takes it are installed:
`python hub_session.py CASE FOLDER...`. Each case prints "well" at its end."""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import kernels
import torch
from kernels import Mode, use_kernel_mapping
from torch import Tensor

EXACT = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # fp32: a few roundings of 1e-7, in sums of 96


def normed(kernel, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A norm's result and the gradient of its input, held to PyTorch's."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96, dtype=dtype, requires_grad=True), torch.randn(96, dtype=dtype)
    y, expected = kernel.rms_norm(x, weight), torch.nn.functional.rms_norm(x, (96,), weight, 1e-5)
    (slope,), (wanted,) = torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    EXACT(y, expected), EXACT(slope, wanted)
    return y, slope


def loaded(one: Path, other: Path) -> None:
    """Two versions in one process, each with operators of its own, and none of them the package that is installed."""
    first, second = map(kernels.get_local_kernel, (one, other))
    spaces = [kernel.runtime.registry.NAMESPACE for kernel in (first, second)]
    assert spaces == [first.__name__, second.__name__] and len(set(spaces)) == 2
    for name in spaces:
        assert hasattr(getattr(torch.ops, name), "modulated_rms_norm_fwd"), name
    assert first.rms_norm is not second.rms_norm and "tt_kernels" not in sys.modules
    assert not hasattr(torch.ops.tt, "modulated_rms_norm_fwd")
    assert all(map(torch.equal, normed(first), normed(second)))
    with first.use("reference"):
        assert [kernel.runtime.registry._uses_reference() for kernel in (first, second)] == [True, False]
    found = [kernel.metadata for kernel in kernels.get_loaded_kernels()]
    assert [str(m.name) for m in found] == ["tt-kernels"] * 2 and [m.version for m in found] == [1, 2]


def described(folder: Path) -> None:
    """The metadata of every build as `kernels` parses it, and its digest of the files that are there."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    variants = sorted((folder / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert metadata.id.isidentifier() and variant.name.removeprefix("torch-") in metadata.id
    assert metadata.backend.archs == ["8.0", "9.0", "10.0", "10.3"]


def served(folder: Path) -> None:
    """transformers' Nemotron-H on the layers, chosen by KernelConfig: the same logits, and the same tokens through its
    cache; in training theirs where ours have no backward."""
    import tiny
    import transformers
    from transformers import KernelConfig

    kernel = kernels.get_local_kernel(folder)
    names = [
        name
        for name, value in vars(kernel.layers).items()
        if getattr(value, "__module__", "") == kernel.layers.__name__
    ]
    config = KernelConfig({name: f"{folder}:{name}" for name in names}, use_local_kernel=True)
    model = tiny.tiny("nemotron_h")
    before, slopes = (tiny.logits(model), *tiny.greedy(model)), tiny.gradients(model)
    config.sanitize_kernel_mapping(model)
    # It takes no CPU for a device, so it is told of another one; `kernels` takes a CPU.
    with patch.object(transformers.utils.kernel_config, "infer_device", lambda model: "cuda"):
        config.create_compatible_mapping(model)
    mapping = {name: {"cpu": repos["cuda"]} for name, repos in config.kernel_mapping.items()}
    norms = [m for m in model.modules() if type(m).__name__ == "NemotronHRMSNorm"]
    functions = list({id(f): f for m in model.modules() for f in getattr(m, "_kernel_funcs", {}).values()}.values())

    def ours() -> set[str]:
        return {type(f).kernel_layer_name for f in [*norms, *functions] if kernel.__name__ in f.forward.__module__}

    assert not ours()
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert ours() == set(names) and len(norms) > 4
    after = (tiny.logits(model), *tiny.greedy(model))
    assert torch.equal(after[1], before[1])
    assert tiny.error(after[0], before[0]) < 1e-11 and tiny.error(after[2], before[2]) < 1e-11  # as in test_apply.py

    training = {name: {"cpu": {Mode.FALLBACK: repos["cpu"][Mode.INFERENCE]}} for name, repos in mapping.items()}
    with use_kernel_mapping(training, inherit_mapping=False):
        kernels.kernelize(model, mode=Mode.TRAINING, device="cpu")
    assert ours() == {"RMSNorm"}
    found = tiny.gradients(model)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert tiny.error(found[name], slope) < 1e-11, name


if __name__ == "__main__":
    case, *folders = sys.argv[1:]
    globals()[case](*map(Path, folders))
    print("well")
