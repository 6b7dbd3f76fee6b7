"""`make hub`: `kernels` loads the folder, beside another version of it, and transformers runs its layers."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from torch import nn

from tools import hub
from tt_kernels.integrations import hub as layers

FOLDER = Path(sys.prefix) / "hub-0.17.2"  # kernels 0.17.2 and transformers 5.20.2: the Makefile makes it
INSTALLED = pytest.mark.skipif(not FOLDER.is_dir(), reason="kernels 0.17 is not there: make .venv/hub-0.17.2")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder by its version."""
    base = tmp_path_factory.mktemp("hub")

    def build(version: int) -> Path:
        folder = base / f"v{version}"
        if not folder.is_dir():
            assert hub.main(["--out", str(folder), "--version", str(version)]) == 0
        return folder

    return build


def session(case: str, *folders: Path, **environment: str) -> None:
    """A case of hub_session.py, away from the checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TT_KERNELS_ON_CPU", "TRITON_INTERPRET")}
    clean |= {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    script = [sys.executable, str(ROOT / "tests/integrations/hub_session.py"), case, *map(str, folders)]
    done = subprocess.run(script, cwd=folders[0].parent, env=clean, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("well\n"), done.stdout + done.stderr


def test_it_imports_itself_relatively(built: Callable[[int], Path]) -> None:
    """Nothing but torch, Triton and the standard library; transformers only where somebody calls for it."""
    for file in sorted((built(1) / "build/torch-cuda").rglob("*.py")):
        tree = ast.parse(file.read_text())
        late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom(level=0):
                    names = [str(node.module)]
                case _:
                    continue
            for name in (name.partition(".")[0] for name in names):
                known = name in sys.stdlib_module_names or name in ("torch", "triton")
                assert known or (name == "transformers" and id(node) in late), f"{file}:{node.lineno}: {name}"


def test_builds_differ_by_version_backend_and_source(built: Callable[[int], Path]) -> None:
    read = lambda version, backend: json.loads((built(version) / f"build/torch-{backend}/metadata.json").read_text())
    found = [read(version, backend) for version in (1, 2) for backend in hub.BACKENDS]
    assert len({one["id"] for one in found}) == 4 and [one["version"] for one in found] == [1, 1, 2, 2]
    package = hub.sources()
    assert hub.identity(package, 1, "cuda") == found[0]["id"]
    assert hub.identity(package | {"norm/rms_norm.py": ""}, 1, "cuda") != found[0]["id"]
    assert 'NAMESPACE = "tt"' not in package["runtime/registry.py"] and "testing.py" not in package


def test_a_folder_is_replaced_whole_and_others_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "text").write_text("a")
    assert hub.main(["--out", str(mine)]) == 2 and "no folder that this has written" in capsys.readouterr().err
    assert (mine / "text").read_text() == "a" and [p.name for p in tmp_path.iterdir()] == ["mine"]
    monkeypatch.setattr(hub, "sources", lambda: {"__init__.py": ""})
    out = tmp_path / "out"
    assert hub.main(["--out", str(out), "--repo-id", "somebody/kernels", "--version", "3"]) == 0
    assert 'get_kernel("somebody/kernels", version=3)' in (out / "CARD.md").read_text()
    assert 'repo-id = "somebody/kernels"' in (out / "build.toml").read_text()
    (out / "build/torch-cuda/old.py").write_text("")
    assert hub.main(["--out", str(out)]) == 0
    assert not (out / "build/torch-cuda/old.py").exists() and "repo-id" not in (out / "build.toml").read_text()
    for wrong in (["--version", "-1"], ["--repo-id", "kernels"]):
        with pytest.raises(SystemExit):
            hub.main(wrong)


@pytest.mark.parametrize("name", hub.LAYERS)
def test_a_layer_is_a_forward_of_theirs(name: str) -> None:
    """As `kernels` wants them: no constructor, no members but two flags; the parameters of what they replace."""
    pytest.importorskip("transformers")
    from transformers.models.nemotron_h import modeling_nemotron_h as theirs

    layer = getattr(layers, name)
    assert layer.__init__ is nn.Module.__init__
    members = {member for member, _ in inspect.getmembers(layer)} - {
        member for member, _ in inspect.getmembers(nn.Module)
    }
    assert members == {"can_torch_compile", "has_backward"}
    known = {
        "RMSNorm": theirs.NemotronHRMSNorm.forward,
        "mamba_chunk_scan_combined": theirs.mamba2_chunk_scan,
        "selective_state_update": theirs.mamba2_selective_state_update,
    }
    kinds = lambda f: [(p.kind, p.name) for p in inspect.signature(f).parameters.values() if p.name != "self"]
    variadic = lambda found: [(kind, "" if kind == inspect.Parameter.VAR_KEYWORD else n) for kind, n in found]
    assert variadic(kinds(layer.forward)) == variadic(kinds(known.get(name) or getattr(theirs, name)))


@INSTALLED
def test_kernels_reads_what_it_is(built: Callable[[int], Path]) -> None:
    session("described", built(1))


@INSTALLED
@pytest.mark.parametrize("interpret", [0, 1])
def test_two_versions_live_in_one_process(built: Callable[[int], Path], interpret: int) -> None:
    session("loaded", built(1), built(2), **({"TRITON_INTERPRET": "1"} if interpret else {}))


@INSTALLED
def test_transformers_runs_the_layers(built: Callable[[int], Path]) -> None:
    session("served", built(1))


@INSTALLED
def test_its_own_tests_pass(built: Callable[[int], Path]) -> None:
    """Those that go to the Hub with it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests"]
    env = os.environ | {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=built(1), env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr
