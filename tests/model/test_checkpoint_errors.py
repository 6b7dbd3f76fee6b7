"""Checkpoints that are wrong: keys, shapes, values, files. Every error is one line that names what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, SHARD, loaded, meta_model, model_of, plain, rewritten
from safetensors.torch import save_file
from torch import Tensor

from tt_model.checkpoint import load, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model_of(), tmp_path / "model", max_shard_bytes=SHARD)
    return tmp_path / "model"


def test_one_error_lists_everything(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["denoiser_tower.layers.4.mixer.experts.7.down_proj.weight"]
        tensors["context_tower.layers.2.mixer.q_norm.weight"] = torch.ones(6)
        tensors["context_tower.layers.1.mixer.experts.11.up_proj.weight"] = torch.ones(5, 12)
        tensors["context_tower.embeddings.weight"] = torch.ones(30, 12)
        tensors["context_tower.layers.1.mixer.experts.2.up_proj.weight"] = torch.ones(12, 5)

    model = meta_model()
    with pytest.raises(ValueError) as caught:
        load(model, rewritten(saved, spoil), device="cpu", dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message and str(saved) in message
    assert "2 missing (denoiser_tower.layers.4.mixer.experts.7.down_proj.weight, lm_head.weight)" in message
    assert "2 unexpected (context_tower.layers.1.mixer.experts.11.up_proj.weight, context_tower.layers.2" in message
    assert "2 mis-shaped (context_tower.embeddings.weight is [30, 12], not [29, 12]" in message
    assert "experts.2.up_proj.weight is [12, 5], not [5, 12])" in message
    assert all(p.is_meta for p in model.parameters()), "nothing may be loaded from a checkpoint that does not fit"


def test_long_lists_are_cut(saved: Path) -> None:
    with pytest.raises(ValueError) as caught:
        loaded(saved, replace(CONFIG, pattern="ME*-EE"))
    assert "and " in str(caught.value) and " more)" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_stack_and_its_parts_are_not_both_taken(tmp_path: Path) -> None:
    plain(tmp_path / "plain", stacked=True)
    key = "backbone.layers.1.mixer.experts.0.up_proj.weight"
    rewritten(tmp_path / "plain", lambda tensors: tensors.update({key: torch.ones(5, 12)}))
    with pytest.raises(ValueError, match=f"1 unexpected \\({key}\\)"):
        loaded(tmp_path / "plain", towers="context")


def test_another_model(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not a TwoTower or Nemotron-H model: it holds transformer\.wte\.weight"):
        loaded(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_named(saved: Path, value: float, dtype: torch.dtype) -> None:
    keys = ["denoiser_tower.layers.1.mixer.experts.3.up_proj.weight", "scale_shift_tables.2"]

    def spoil(tensors: dict[str, Tensor]) -> None:
        for key in keys:
            tensors[key][1, 2] = value

    with pytest.raises(ValueError, match=rf"NaN or Inf in the weights: {keys[0]}, {keys[1]}$"):
        loaded(rewritten(saved, spoil), dtype=dtype)


def test_too_large_for_the_type(saved: Path, tmp_path: Path) -> None:
    rewritten(saved, lambda tensors: tensors["lm_head.weight"][3].fill_(1e6))
    with pytest.raises(ValueError, match=r"too large for float16: lm_head\.weight"):
        loaded(saved, dtype=torch.float16)
    model = loaded(saved)
    with pytest.raises(ValueError, match=r"lm_head\.weight holds values that are too large for float16"):
        save(model, tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        model.t_block[1].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"t_block\.1\.bias holds values that are NaN"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(saved: Path) -> None:
    shard = sorted(saved.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for damaged in (whole[:-5], whole[:100], whole[:4], b"", b"\xff" * len(whole)):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name}: unreadable, truncated or corrupt"):
            loaded(saved)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} missing, of \d+ files"):
        loaded(saved)


def test_damaged_index(saved: Path) -> None:
    index = saved / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for text in ("{", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: (not valid JSON|expected a JSON object|not an index)"):
            loaded(saved)
    # A key that the index does not know, and one that is not where the index says.
    moved = next(key for key, file in whole["weight_map"].items() if "00002" in file)
    strange = {k: v for k, v in whole["weight_map"].items() if k not in ("lm_head.weight", moved)}
    index.write_text(json.dumps({"weight_map": {**strange, moved: whole["weight_map"]["lm_head.weight"]}}))
    with pytest.raises(ValueError, match=r"2 missing \(.*lm_head\.weight\); 1 unexpected \(lm_head\.weight\)"):
        loaded(saved)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        loaded(saved)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        loaded(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file: not a folder"):
        loaded(tmp_path / "file")
    with pytest.raises(ValueError, match="towers is 'all'"):
        load(meta_model(), tmp_path, device="cpu", dtype=torch.float32, towers="all")


def test_both_towers_into_a_model_of_one(saved: Path) -> None:
    with pytest.raises(ValueError, match="the model has no denoiser"):
        load(meta_model(towers="context"), saved, device="cpu", dtype=torch.float32)


def test_quantised_weights_are_refused(saved: Path) -> None:
    rewritten(saved, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored as F8_E4M3"):
        loaded(saved)
