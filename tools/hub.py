"""`python -m tools.hub`: the folder that the Hugging Face Hub wants of a kernel in pure Triton, into build/hub.

    build.toml, CARD.md, LICENSE, torch-ext/tt_kernels    what kernel-builder starts from
    tests/                                                that it works, through `kernels`
    build/torch-cuda, build/torch-cpu                     what `kernels` loads: the same, with _ops.py and metadata.json

The package is tt_kernels but for what tests need, with layers (`integrations/hub.py`) and with operators in a namespace
of this version, backend and source, so that several of them live in one process. On a CPU its references run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cards import OPS
from tt_kernels.integrations import hub
from tt_kernels.runtime.registry import SERVED
from tt_model.files import partial

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tt_kernels"
NAME = PACKAGE.replace("_", "-")
LICENSE = "Apache-2.0"
BACKENDS = ("cuda", "cpu")
LAYERS = tuple(name for name, value in vars(hub).items() if getattr(value, "__module__", "") == hub.__name__)
LEFT_OUT = {"testing.py", "py.typed"}
# A line of a file, and what stands there instead: (path, before, after).
CHANGES = (
    (
        "runtime/registry.py",
        'NAMESPACE = "tt"  # of registered operators: torch.ops.tt.<name>\n',
        'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")  # of this build\n',
    ),
    (
        "runtime/registry.py",
        "\nfrom .checks import",
        "\nfrom .._ops import add_op_namespace_prefix\nfrom .checks import",
    ),
    ("__init__.py", "\n__all__ = [\n", '\nfrom .integrations import hub as layers\n\n__all__ = [\n    "layers",\n'),
)
OPS_PY = '''"""The namespace of this build's operators."""

import torch

_OPS_NAME = "{id}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''
BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]
{hub}
[torch-noarch]
pyext = ["py", "json"]
cuda-capabilities = [{archs}]
"""
TEST = '''"""The kernel, loaded as its users load it."""

from pathlib import Path

import kernels
import pytest
import torch

kernel = kernels.get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(33, 96, dtype=dtype, device=DEVICE), torch.randn(96, dtype=dtype, device=DEVICE)
    expected = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(kernel.rms_norm(x, weight), expected.to(dtype))


@pytest.mark.kernels_ci
def test_layer() -> None:
    layer = kernel.layers.RMSNorm()
    layer.weight, layer.variance_epsilon = torch.nn.Parameter(torch.ones(96, device=DEVICE)), 1e-5
    x = torch.randn(5, 96, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), torch.nn.functional.rms_norm(x, (96,), layer.weight, 1e-5))
    assert torch.isfinite(x.grad).all() and torch.isfinite(layer.weight.grad).all()
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

Triton kernels of block-diffusion models with Mamba-2, attention and mixtures of experts.

- PyTorch 2.11 to 2.15, Triton 3.6 to 3.9
- NVIDIA GPUs of compute capability {archs}
- on a CPU PyTorch's operations run; CPU builds of PyTorch do not bring Triton, which must be installed all the same

## How to use

```python
{load}

y = kernel.rms_norm(x, weight)
```

## Layers

By the names under which transformers' models ask for them:

```python
KernelConfig({{"RMSNorm": "{where}:RMSNorm"}}{local})
```

{layers}

Convolution and scan have no backward kernels: in training the models keep theirs.

## Functions

{functions}
"""


def sources() -> dict[str, str]:
    """The package for the Hub, by path, without _ops.py. RuntimeError where a line that changes is not there once."""
    folder = ROOT / PACKAGE
    files = [p for kind in ("py", "json") for p in sorted(folder.rglob(f"*.{kind}")) if p.name not in LEFT_OUT]
    found = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in files}
    for path, before, after in CHANGES:
        if found[path].count(before) != 1:
            raise RuntimeError(f"{PACKAGE}/{path} has {before!r} {found[path].count(before)} times, expected once")
        found[path] = found[path].replace(before, after)
    return found


def identity(package: Mapping[str, str], version: int, backend: str) -> str:
    """A name of the build, of its operators' namespace and of its module: no other version or source has it."""
    text = json.dumps([version, sorted(package.items())])
    return f"_{PACKAGE}_{backend}_{hashlib.sha256(text.encode()).hexdigest()[:7]}"


def metadata(variant: Path, identifier: str, version: int, backend: str) -> dict[str, object]:
    """What `kernels` reads of a build: who it is, where it runs, and a digest of every file."""
    files = {p.relative_to(variant).as_posix(): p.read_bytes() for p in sorted(variant.rglob("*")) if p.is_file()}
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
    archs = {"archs": [str(capability / 10) for capability in SERVED]} if backend == "cuda" else {}
    return {
        "name": NAME,
        "id": identifier,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend, **archs},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def build(out: Path, version: int = 0, repo_id: str | None = None) -> None:
    """Write the folder; an earlier one is replaced. FileExistsError where `out` is something else."""
    if out.exists() and not (out / "build.toml").is_file():
        raise FileExistsError(f"{out} is there, and is no folder that this has written")
    package, quoted = sources(), lambda names: ", ".join(f'"{name}"' for name in names)
    archs = [str(capability / 10) for capability in SERVED]
    general = dict(name=NAME, version=version, license=LICENSE, backends=quoted(BACKENDS), archs=quoted(archs))
    load = (
        f'from pathlib import Path\n\nfrom kernels import get_local_kernel\n\nkernel = get_local_kernel(Path("{NAME}"))'
    )
    if repo_id:
        load = f'from kernels import get_kernel\n\nkernel = get_kernel("{repo_id}", version={version})'
    items = lambda names: "\n".join(f"- `{name}`" for name in names)
    top = {
        "build.toml": BUILD_TOML.format(hub=f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else "", **general),
        "CARD.md": CARD.format(
            name=NAME,
            archs=", ".join(archs),
            load=load,
            where=repo_id or "/path/of/this/folder",
            local="" if repo_id else ", use_local_kernel=True",
            layers=items(LAYERS),
            functions=items(OPS),
        ),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        f"tests/test_{PACKAGE}.py": TEST,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial(out, folder=True) as new:
        write(new, top | {f"torch-ext/{PACKAGE}/{path}": text for path, text in package.items()})
        for backend in BACKENDS:
            variant, identifier = new / f"build/torch-{backend}", identity(package, version, backend)
            write(variant, package | {"_ops.py": OPS_PY.format(id=identifier)})
            said = metadata(variant, identifier, version, backend)
            write(variant, {"metadata.json": json.dumps(said, indent=2) + "\n"})
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.hub", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub", help="folder to write (default: build/hub)")
    parser.add_argument("--version", type=int, default=0, help="of the kernel, a branch v<version>; 0 is for betas")
    parser.add_argument("--repo-id", help="owner/name on the Hub, for the card and for uploads")
    options = parser.parse_args(arguments)
    if options.version < 0:
        parser.error(f"--version is {options.version}, expected 0 or more")
    if options.repo_id is not None and options.repo_id.count("/") != 1:
        parser.error(f"--repo-id is {options.repo_id!r}, expected owner/name")
    try:
        build(options.out, options.version, options.repo_id)
    except OSError as error:
        print(f"tools.hub: error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
