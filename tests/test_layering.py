"""Imports point one way, packages keep to themselves, and no file names a machine: read with ast, nothing imported."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tt_kernels", "tt_model")
TOOLS = ("bench", "cards", "eval", "profiling", "tests", "tools")

# From first to last; a module may import what stands above it, and what shares its unit (a file, or a folder of parts).
# "tt_kernels.*" is every other folder of tt_kernels: a family of ops. A package's own name is its __init__.
LADDER = (
    ("tt_kernels.reference",),
    ("tt_kernels.runtime",),
    ("tt_kernels.*",),
    ("tt_kernels",),
    ("tt_kernels.testing",),
    ("tt_kernels.integrations",),
    ("tt_model.files", "tt_model.stops"),
    ("tt_model.config",),
    ("tt_model.arguments", "tt_model.vocabulary"),
    ("tt_model.modeling",),
    ("tt_model.checkpoint",),
    ("tt_model.engine", "tt_model.training"),
    ("tt_model.two_tower",),
    ("tt_model",),
    ("tt_model.cli",),
)
RUNG = {unit: rung for rung, units in enumerate(LADDER) for unit in units}
# Families may use the parts of those before them: the scan that starts from a projection convolves it first, and a norm
# sums what experts have made.
FAMILIES = {("tt_kernels.ssm", "tt_kernels.conv1d"), ("tt_kernels.moe", "tt_kernels.norm")}

LINE_LIMIT = 400


@dataclass(frozen=True)
class Import:
    line: int
    module: str  # "a.b" of `import a.b` and of `from a.b import c`, relative dots resolved
    name: str | None  # "c", or None for `import a.b`
    late: bool  # inside a function, or for type checkers only


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands; importlib.import_module("...") and tt_kernels.name count too."""
    package = module_name(path) if path.endswith("/__init__.py") else module_name(path).rpartition(".")[0]
    aliases: set[str] = set()

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(node.lineno, alias.name, None, late)
                    if alias.name == "tt_kernels":
                        aliases.add(alias.asname or alias.name)
            case ast.ImportFrom():
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield Import(node.lineno, module, alias.name, late)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(module)), *_]
            ):
                if called in ("import_module", "__import__"):
                    yield Import(node.lineno, module, None, late)
            case ast.Attribute(value=ast.Name(id=name)) if name in aliases:
                yield Import(node.lineno, "tt_kernels", node.attr, late)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            late = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return visit(ast.parse(source, path), late=False)


def public_names(source: str, modules: Iterable[str]) -> set[str]:
    """What tt_kernels/__init__.py exports: its __all__, or what it binds that is neither private nor a module."""
    bound: set[str] = set()
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
            case ast.ImportFrom(level=1, module=None) | ast.ImportFrom(level=0, module="tt_kernels"):
                bound |= {
                    alias.asname or alias.name for alias in node.names if f"tt_kernels.{alias.name}" not in modules
                }
            case ast.ImportFrom(level=1) if node.module:
                bound |= {alias.asname or alias.name for alias in node.names}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                bound.add(name)
    return {name for name in bound if not name.startswith("_")}


def unit_of(module: str) -> str:
    unit = ".".join(module.split(".")[:2])
    return "tt_kernels.*" if unit.startswith("tt_kernels.") and unit not in RUNG else unit


def dependencies() -> tuple[set[str], set[str]]:
    """The import names that pyproject.toml requires, and those of its extras `cuda` and `transformers`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda lines: {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    extras = project["optional-dependencies"]
    return names(project["dependencies"]), names([*extras["cuda"], *extras["transformers"]])


def violations(files: dict[str, str]) -> list[str]:
    """What is wrong with the imports of {path: source}, one line each."""
    modules = {module_name(path) for path in files}
    public = public_names(files.get("tt_kernels/__init__.py", ""), modules)
    required, optional = dependencies()
    found = []
    inner: dict[str, dict[str, str]] = {}  # module -> what it imports of our packages, and where
    for path, source in sorted(files.items()):
        importer, top = module_name(path), path.split("/")[0]
        if top in PACKAGES and unit_of(importer) not in RUNG:
            found.append(f"{path}: has no place in LADDER (tests/test_layering.py): give it one")
            continue
        for item in imports(path, source):
            where = f"{path}:{item.line}"
            target = item.module
            submodule = f"{item.module}.{item.name}"
            if item.name and submodule in modules and not (target == "tt_kernels" and item.name in public):
                target = submodule
            target_top = target.split(".")[0]

            if target_top == "triton" and top not in ("tt_kernels", *TOOLS):
                found.append(f"{where}: imports triton outside tt_kernels, {', '.join(TOOLS)}")
            if top not in PACKAGES:
                continue
            if target_top in TOOLS:
                found.append(f"{where}: a package imports {target}")
            elif target_top in PACKAGES:
                found += arrow(where, importer, target, item, public)
                if target in modules and not f"{importer}.".startswith(f"{target}."):  # `from . import sibling`
                    inner.setdefault(importer, {}).setdefault(target, where)
            elif unit_of(importer) == "tt_kernels.reference" and target_top != "torch":
                if target_top not in sys.stdlib_module_names:
                    found.append(
                        f"{where}: the reference imports {target}, which is neither torch nor standard library"
                    )
            elif target_top not in sys.stdlib_module_names | required and not (item.late and target_top in optional):
                found.append(f"{where}: {target_top} is not a dependency in pyproject.toml")
    return found or circles(inner)


def circles(imported: dict[str, dict[str, str]]) -> list[str]:
    """The imports that close a circle of modules, where no arrow points back."""
    found, done, path = [], set(), []

    def visit(module: str) -> None:
        path.append(module)
        for target, where in imported.get(module, {}).items():
            if target in path:
                found.append(f"{where}: a circle: {' -> '.join([*path[path.index(target) :], target])}")
            elif target not in done:
                visit(target)
        done.add(path.pop())

    for module in sorted(imported):
        if module not in done:
            visit(module)
    return found


def arrow(where: str, importer: str, target: str, item: Import, public: set[str]) -> list[str]:
    """What is wrong with an import of one of our packages by another of our modules."""
    if importer.split(".")[0] == "tt_model" and target.split(".")[0] == "tt_kernels":
        if target != "tt_kernels" or (item.name and item.name not in public):
            return [f"{where}: {'.'.join(filter(None, (item.module, item.name)))} is not a public name of tt_kernels"]
        return []
    source, sink = unit_of(importer), unit_of(target)
    ours, theirs = (".".join(module.split(".")[:2]) for module in (importer, target))
    same = ours == theirs or (ours, theirs) in FAMILIES
    if sink not in RUNG:
        return [f"{where}: {target} has no place in LADDER (tests/test_layering.py)"]
    if same or RUNG[sink] < RUNG[source]:
        return []
    return [
        f"{where}: {importer} imports {target}, which comes {'after' if RUNG[sink] > RUNG[source] else 'beside'} it"
    ]


# What no file may name: a home or working folder of some machine, a package registry, or an option that points at one.
MACHINE = re.compile(
    r"""(?<![\w.~$}-])/(?:work|root|opt|home/\w+|Users/\w+)/
      | \b(?:pypi|test\.pypi|anaconda|pypi\.nvidia|pythonhosted|download\.pytorch)\.(?:org|com)\b
      | --(?:find-links|(?:extra-)?index-url) | PIP_(?:(?:EXTRA_)?INDEX|FIND)""",
    re.VERBOSE,
)
# A vocabulary learned from the standard library's source may hold anything.
LEARNED = {"tt_model/assets/tokenizer.json"}


def repository_files() -> list[str]:
    """Tracked files, and those that would be with `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


def test_no_arrow_points_back() -> None:
    files = {path: (ROOT / path).read_text() for path in repository_files() if path.endswith(".py")}
    assert set(PACKAGES) <= {path.split("/")[0] for path in files}
    assert violations(files) == []


def test_files_are_short() -> None:
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in repository_files() if path.endswith(".py")}
    assert {path: count for path, count in lines.items() if count > LINE_LIMIT} == {}


def test_no_file_names_a_machine() -> None:
    found = []
    for path in set(repository_files()) - LEARNED:
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:8192]:
            lines = data.decode(errors="replace").splitlines()
            found += [f"{path}:{n}: {hit[0]}" for n, line in enumerate(lines, 1) if (hit := MACHINE.search(line))]
    assert found == []


TREE = {
    "tt_kernels/__init__.py": "from . import runtime\nfrom .norm import rms_norm\nfrom .runtime.x import use, _x\n",
    "tt_kernels/reference.py": "import math\nimport torch.nn.functional as F\n",
    "tt_kernels/runtime/__init__.py": "",
    "tt_kernels/runtime/core.py": "import torch\nfrom tt_kernels import reference\n",
    "tt_kernels/norm/__init__.py": "",
    "tt_kernels/norm/rms.py": "import triton\nfrom .. import reference\nfrom ..runtime.core import use\n",
    "tt_kernels/conv1d/conv.py": "",
    "tt_kernels/ssm/__init__.py": "",
    "tt_kernels/ssm/block.py": "from ..runtime.core import use\nfrom ..conv1d.conv import f\n",
    "tt_kernels/ssm/chunk.py": "from .block import f\nfrom .. import reference\n",
    "tt_model/__init__.py": "from tt_model.two_tower import TwoTower\n",
    "tt_model/config.py": "import json\n",
    "tt_model/modeling/mamba2.py": "import tt_kernels\nfrom tt_model import config\nfrom .wide import Wide\n",
    "tt_model/modeling/wide.py": "import tt_kernels\nx = tt_kernels.rms_norm\n",
    "tt_model/modeling/tower.py": "from .mamba2 import Mixer\n",
    "tt_model/engine/generate.py": "import tt_kernels as tt\nfrom ..modeling.tower import Tower\ny = tt.use\n",
    "tt_model/two_tower.py": "from .engine.generate import generate\n",
    "tt_model/cli.py": "import rich\nfrom tt_model import TwoTower\nfrom tt_kernels import rms_norm\n",
    "bench/bench_generate.py": "import triton\nfrom tt_kernels.runtime import use\nfrom tt_model import Tower\n",
    "tests/test_x.py": "import transformers\nfrom bench import bench_generate\n",
}


def test_checker_accepts_a_sound_tree() -> None:
    assert violations(TREE) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("tt_kernels/reference.py", "import numpy", "neither torch nor standard library"),
        ("tt_kernels/reference.py", "def f():\n  import triton", "neither torch nor standard library"),
        ("tt_kernels/reference.py", "from .runtime.core import use", "comes after"),
        ("tt_kernels/reference/norm.py", "import einops", "neither torch nor standard library"),
        ("tt_kernels/runtime/core.py", "from ..norm import rms_norm", "comes after"),
        ("tt_kernels/runtime/core.py", "from .. import norm", "comes after"),
        ("tt_kernels/norm/rms.py", "from ..ssm.block import f", "comes beside"),
        ("tt_kernels/conv1d/conv.py", "from ..norm.rms import f", "comes beside"),
        ("tt_kernels/norm/rms.py", "from tt_kernels import rms_norm", "comes after"),
        ("tt_kernels/norm/rms.py", "import tt_model.config", "comes after"),
        ("tt_kernels/norm/rms.py", "import tests.literal", "a package imports"),
        ("tt_kernels/norm/rms.py", "from cards import OPS", "a package imports"),
        ("tt_kernels/norm/rms.py", "from profiling import nsight", "a package imports"),
        ("tt_kernels/norm/rms.py", "import transformers", "not a dependency"),
        ("tt_kernels/norm/rms.py", "import mamba_ssm", "not a dependency"),
        ("tt_kernels/integrations/x.py", "import transformers", "not a dependency"),
        ("tt_kernels/norm/rms.py", "from ..integrations import x", "comes after"),
        ("tt_model/config.py", "from .modeling.mamba2 import Mixer", "comes after"),
        ("tt_model/config.py", "if TYPE_CHECKING:\n  from .two_tower import TwoTower", "comes after"),
        ("tt_model/config.py", "def f():\n  from .engine.generate import generate", "comes after"),
        ("tt_model/modeling/tower.py", "from ..engine.generate import generate", "comes after"),
        ("tt_model/modeling/tower.py", "def f():\n  from ..training.loop import step", "comes after"),
        ("tt_model/modeling/wide.py", "from .mamba2 import Mixer", "a circle"),
        ("tt_model/engine/generate.py", "from tt_model import TwoTower", "comes after"),
        ("tt_model/engine/generate.py", "from ..training.objective import loss", "comes beside"),
        ("tt_model/engine/generate.py", "from .. import cli", "comes after"),
        ("tt_model/engine/generate.py", "__import__('tt_model.cli')", "comes after"),
        ("tt_model/engine/generate.py", "from bench.bench_generate import f", "a package imports"),
        ("tt_model/modeling/moe.py", "import triton.language as tl", "imports triton outside"),
        ("tt_model/modeling/moe.py", "importlib.import_module('triton')", "imports triton outside"),
        ("tt_model/modeling/moe.py", "from tt_kernels.norm import rms_norm", "not a public name"),
        ("tt_model/modeling/moe.py", "import tt_kernels.norm", "not a public name"),
        ("tt_model/modeling/moe.py", "from tt_kernels import runtime", "not a public name"),
        ("tt_model/modeling/moe.py", "from tt_kernels import _x", "not a public name"),
        ("tt_model/modeling/moe.py", "from tt_kernels import *", "not a public name"),
        ("tt_model/modeling/moe.py", "import tt_kernels as k\nk.runtime.use", "not a public name"),
        ("tt_model/surprise.py", "", "has no place in LADDER"),
        ("setup_helper.py", "import triton", "imports triton outside"),
    ],
)
def test_checker_catches(path: str, line: str, complaint: str) -> None:
    extra = {"tt_model/training/objective.py": "", "tt_model/training/loop.py": ""}
    planted = {path: TREE.get(path, "") + line + "\n"}
    found = violations(TREE | extra | planted)
    assert len(found) == 1, found
    assert found[0].startswith(path), found
    assert complaint in found[0], found


def test_public_names_follow_all() -> None:
    source = "__all__ = ['norm']\nfrom .norm import norm\nfrom .runtime.core import use\n"
    assert public_names(source, {"tt_kernels.norm"}) == {"norm"}
    files = TREE | {"tt_kernels/__init__.py": source, "tt_model/cli.py": "from tt_kernels import norm\n"}
    assert not [line for line in violations(files) if "cli" in line]


@pytest.mark.parametrize("folder", ["work", "root", "home/someone", "Users/someone"])
def test_machine_pattern_finds_folders(folder: str) -> None:
    assert MACHINE.search(f"cd /{folder}/project")
    assert not MACHINE.search(f"tests/{folder}/x") and not MACHINE.search(f"../{folder}/x")


@pytest.mark.parametrize("host", ["pypi", "files.pythonhosted", "download.pytorch"])
def test_machine_pattern_finds_registries(host: str) -> None:
    assert MACHINE.search(f"https://{host}.org/simple")
    assert MACHINE.search("pip install --" + "index-url")
    assert not MACHINE.search("https://pytorch.org/docs")
