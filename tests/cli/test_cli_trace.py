"""`twotower generate --trace`: the page, and what is refused before any work."""

import json
from pathlib import Path

import pytest
from checkpoints import model_of
from test_cli import ASSETS, CONFIG, PROMPT, SHORT, folder, refused, twotower, unloaded  # noqa: F401 (fixtures)

from tt_model.checkpoint import save

# Fixtures come by their names.
# ruff: noqa: F811


def data_of(page: Path) -> dict:
    return json.loads(page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar", "speculative"])
def test_trace_beside_the_text(twotower, tmp_path: Path, mode: str) -> None:
    arguments = (*SHORT, "--mode", mode, "--json", PROMPT)
    plain = json.loads(twotower(*arguments)[1])
    experts = ["--trace-experts"] * (mode != "ar")
    code, out, _ = twotower(*arguments, "--trace", tmp_path / "out.html", *experts)
    said = json.loads(out)
    assert code == 0 and said["tokens"] == plain["tokens"] and said["text"] == plain["text"]
    data = data_of(tmp_path / "out.html")
    (row,) = data["rows"]
    assert (data["mode"], row["prompt"]) == (mode, PROMPT)
    assert [token for cell in row["cells"] if cell[6] in ("", "special") for token in cell[2]] == said["tokens"]
    assert row["figures"]["tokens"] == str(len(said["tokens"]))
    assert row["figures"].get("denoiser passes", "0") == str(said["nfe"])
    assert "seed 0" in data["settings"] and "model model" in data["settings"]
    assert (data["experts"] is None) == (mode == "ar")
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_trace_of_ids_and_with_a_view(twotower, tmp_path: Path) -> None:
    code, out, _ = twotower("--tokens", "5 6 7", "--max-new-tokens", "4", "--watch", "--trace", tmp_path / "out.html")
    (row,) = data_of(tmp_path / "out.html")["rows"]
    assert code == 0 and row["prompt"] + "".join(cell[0] for cell in row["cells"] if cell[6] == "") == out.strip() + " "


def test_traces_that_cannot_be_made(twotower, unloaded: None, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    refused(twotower("--trace", "/nowhere/out.html", PROMPT), "--trace /nowhere/out.html: No such file")
    refused(twotower("--trace", tmp_path, PROMPT), f"--trace {tmp_path}: is a folder")
    refused(twotower("--trace-experts", PROMPT), "--trace-experts: needs --trace FILE")
    refused(twotower("--trace", page, "--output", page, PROMPT), f"--trace {page}: is the file of --output, too")
    refused(twotower("--trace", page, "--trace-experts", "--mode", "ar", PROMPT), "--mode ar has no denoiser")
    values = CONFIG.to_dict() | {"hybrid_override_pattern": "M*M"}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(values))
    refused(twotower("--trace", page, "--trace-experts", PROMPT, model=tmp_path / "dense"), "has no experts")
    assert not page.exists()


def test_a_failed_generation_leaves_the_page_as_it_was(
    twotower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out.html"
    page.write_text("before")
    monkeypatch.setattr("tt_model.engine.trace.Trace.page", lambda *a: (_ for _ in ()).throw(ValueError("no page")))
    refused((twotower(*SHORT, "--trace", page, "--json", PROMPT)), "no page")
    assert page.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_no_experts_are_a_model_of_its_own(twotower, tmp_path: Path) -> None:
    """A trace without experts needs none."""
    from dataclasses import replace

    dense = replace(CONFIG, pattern="M*")
    save(model_of(dense), tmp_path / "model", tokenizer=ASSETS / "tokenizer.json")
    assert twotower(*SHORT, "--trace", tmp_path / "out.html", PROMPT, model=tmp_path / "model")[0] == 0
    assert data_of(tmp_path / "out.html")["experts"] is None
