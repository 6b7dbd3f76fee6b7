"""docs/kernels.md is what cards, docstrings and results give, and its table names what there is."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_commands import a_row

from cards import OPS
from cards.elsewhere import ELSEWHERE, MODULES, PACKAGES
from tools import kernels_page


def test_the_page_is_fresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_page.main(["--check"]) == 0, "python -m tools.kernels_page"
    page = tmp_path / "kernels.md"
    assert kernels_page.main(["--check", "--out", str(page)]) == 1 and "is stale" in capsys.readouterr().err
    assert kernels_page.main(["--out", str(page)]) == 0 and kernels_page.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("softmax", "softmin"))
    assert kernels_page.main(["--check", "--out", str(page)]) == 1


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_it_all(name: str) -> None:
    op = OPS[name]
    assert op.when, f"{name}: its card does not say when to use it"
    text = "\n\n".join(kernels_page.section(op, []))
    assert all(f"`{parameter}`" in text for parameter in re.findall(r"\w+(?=:)", kernels_page.signature(op)))
    assert all(f"`{output}`" in text for output in op.outputs)
    _, program = text.split("```python\n")
    assert re.search(rf"^from tt_kernels import .*\b{name}\b", program, re.MULTILINE) and f"{name}(" in program
    assert "- Raises: " in text and "Cost: " in text and text.endswith(kernels_page.UNMEASURED)


def test_recorded_rows_stand_beside_their_op(tmp_path: Path) -> None:
    row = a_row(p50=4e-4, peers={"eager": dict(seconds=8e-4, ratio=2.0, clock="graph")})
    (tmp_path / "fast.jsonl").write_text(json.dumps(row) + "\n")
    text = kernels_page.page(tmp_path)
    experts = text.partition("### experts\n")[2].partition("\n### ")[0]
    assert "Recorded on Fast" in experts and "eager/ours" in experts and kernels_page.UNMEASURED not in experts
    assert kernels_page.NO_GPU not in text and kernels_page.NO_GPU in kernels_page.page(Path(tmp_path / "none"))


def test_the_table_has_every_op() -> None:
    assert set(ELSEWHERE) == set(OPS)
    assert all(set(found) <= set(PACKAGES) for found in ELSEWHERE.values())


@pytest.mark.parametrize("package", MODULES)
def test_what_the_table_names_is_there(package: str) -> None:
    """Of the packages that are installed: read, not imported, as some of them want a GPU."""
    used = {name for found in ELSEWHERE.values() for name in re.findall(r"`(\w+)`", found.get(package, ""))}
    assert used == set(MODULES[package])
    for name, module in MODULES[package].items():
        top, *inner = module.split(".")
        if (spec := importlib.util.find_spec(top)) is None:
            pytest.skip(f"{top} is not installed")
        (folder,) = spec.submodule_search_locations
        tree = ast.parse(Path(folder, *inner).with_suffix(".py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}, module
