"""A built wheel holds the whole package, the bundled model included, and works away from the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 16 * 2**20


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:  # to import pip, or to look for it, would keep setuptools from being imported in this process afterwards
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip is not installed in this environment")
    source = tmp_path_factory.mktemp("source")  # a copy: setuptools writes build/ beside what it builds
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("tt_kernels", "tt_model"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*build, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture
def outside(installed: Path, tmp_path: Path):
    """Run a command that sees the installed wheel, from a folder that has nothing to do with the checkout."""
    return lambda *command: run(*command, cwd=tmp_path, env={"PYTHONPATH": str(installed), "NO_COLOR": "1"})


def test_wheel_holds_every_module_and_the_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        path.relative_to(ROOT).as_posix() for top in ("tt_kernels", "tt_model") for path in (ROOT / top).rglob("*.py")
    }
    assert not modules - names, "a folder without __init__.py is not packaged"
    assert {name.split("/")[0] for name in names} == {"tt_kernels", "tt_model", "twotower-0.1.0.dist-info"}

    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tt_kernels").glob("tuned/*.json")}
    data |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tt_model/assets").iterdir() if path.is_file()}
    data |= {"tt_kernels/py.typed", "tt_model/py.typed", "tt_model/engine/trace.html"}
    data |= {f"tt_model/assets/{name}" for name in ("config.json", "tokenizer.json", "README.md")}
    assert not data - names
    assert any(name.startswith("tt_model/assets/") and name.endswith(".safetensors") for name in names)
    assert "twotower-0.1.0.dist-info/licenses/LICENSE" in names
    assert wheel.stat().st_size <= SIZE_LIMIT


def test_wheel_requires_nothing_heavy(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read("twotower-0.1.0.dist-info/METADATA").decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {line.split(";")[0].split(">")[0].split("<")[0].strip() for line in required}
    assert names == {"torch", "triton", "numpy", "safetensors", "tokenizers", "rich", "jinja2", "matplotlib"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_packages_import_from_the_wheel_and_lightly(installed: Path, outside) -> None:
    code = (
        "import sys, tt_kernels, tt_model\n"
        "print(tt_kernels.__file__, tt_model.__file__, sep='\\n')\n"
        "assert not {'matplotlib', 'transformers'} & set(sys.modules), 'import these where they are used'"
    )
    for line in outside(sys.executable, "-c", code).stdout.splitlines():
        assert Path(line).is_relative_to(installed)


def test_command_teaches_itself(installed: Path, outside) -> None:
    assert "generate" in outside(sys.executable, installed / "bin" / "twotower", "--help").stdout
    assert "generate" in outside(sys.executable, "-m", "tt_model.cli", "--help").stdout


def test_command_writes_with_the_bundled_model(installed: Path, outside) -> None:
    done = outside(sys.executable, installed / "bin" / "twotower", "generate", "# enum Color: RED, GREEN\n")
    assert "GREEN = auto()" in done.stdout


def python(code: str) -> str:
    command = (sys.executable, "-c", code)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_the_reference_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch, tt_kernels.reference
print(tt_kernels.reference.rms_norm(torch.ones(2, 4), torch.ones(4)).shape[0])
try:
    tt_kernels.rms_norm
except ImportError as error:
    print(str(error).startswith("tt_kernels.rms_norm needs Triton"))
print(hasattr(tt_kernels, "no_such_op"))
"""
    assert python(code).split() == ["2", "True", "False"]


def test_importing_the_kernels_takes_little() -> None:
    """No Dynamo, no look for a GPU; below 0.8 s behind torch and triton: the best of three, for busy machines."""
    code = """
import sys, time
import torch, triton
torch.cuda.is_available = torch.cuda.device_count = lambda: sys.exit("a GPU was looked for")
start = time.perf_counter()
import tt_kernels
print(time.perf_counter() - start, "torch._dynamo" in sys.modules)
"""
    tries = [python(code).split() for _ in range(3)]
    assert {dynamo for _, dynamo in tries} == {"False"}
    assert min(float(seconds) for seconds, _ in tries) < 0.8
