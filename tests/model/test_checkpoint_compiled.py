"""torch.compile around a model, or a part of it, leaves no trace in what is saved, loaded or started."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, SHARD, contents, loaded, meta_model, model_of, same
from torch import nn
from torch.nn.utils import parametrizations

from tt_model import TwoTower
from tt_model.checkpoint import load, save, start_denoiser

compiled = lambda module: torch.compile(module, backend="eager")


def parts(model: TwoTower) -> TwoTower:
    """A tower, its layers, one mixer and a head, each compiled by itself, one inside the other."""
    model.context_tower.layers[1].mixer = compiled(model.context_tower.layers[1].mixer)
    for i, layer in enumerate(model.context_tower.layers):
        model.context_tower.layers[i] = compiled(layer)
    model.context_tower = compiled(model.context_tower)
    model.lm_head = compiled(model.lm_head)
    model.t_embedder.mlp = compiled(model.t_embedder.mlp)
    return model


def in_place(model: TwoTower) -> TwoTower:
    model.compile(backend="eager")
    model.denoiser_tower.compile(backend="eager")
    return model


WAYS: dict[str, Callable[[TwoTower], nn.Module]] = {
    "whole": compiled,
    "parts": parts,
    "whole and parts": lambda model: compiled(parts(model)),
    "in place": in_place,
}


@pytest.mark.parametrize("way", WAYS)
def test_saved_as_if_it_were_not_compiled(tmp_path: Path, way: str) -> None:
    save(model_of(), tmp_path / "plain", max_shard_bytes=SHARD)
    save(WAYS[way](model_of()), tmp_path / "compiled", max_shard_bytes=SHARD)
    assert contents(tmp_path / "compiled") == contents(tmp_path / "plain")
    same(loaded(tmp_path / "compiled"), model_of())


@pytest.mark.parametrize("way", WAYS)
def test_loaded_and_started(tmp_path: Path, way: str) -> None:
    save(model_of(seed=1), tmp_path / "model")
    model = model_of()
    load(WAYS[way](model), tmp_path / "model", device="cpu", dtype=torch.float32)
    save(model, tmp_path / "again")
    same(loaded(tmp_path / "again"), model_of(seed=1))
    made = meta_model()
    load(WAYS[way](made), tmp_path / "model", device="cpu", dtype=torch.float32)
    save(made, tmp_path / "made")
    same(loaded(tmp_path / "made"), model_of(seed=1))

    want = model_of(seed=1)
    start_denoiser(want, seed=4)
    start_denoiser(compiled(made) if way == "whole" else made, seed=4)
    save(made, tmp_path / "started")
    same(loaded(tmp_path / "started"), want)


def test_one_parameter_in_two_places_is_stored_twice(tmp_path: Path) -> None:
    model = model_of()
    model.lm_head.weight = model.context_lm_head.weight
    save(model, tmp_path / "model")
    again = loaded(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, again.context_lm_head.weight)
    assert torch.equal(again.lm_head.weight, model_of().context_lm_head.weight)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    def normed(model: TwoTower) -> None:
        parametrizations.weight_norm(model.lm_head)

    def adapted(model: TwoTower) -> None:
        model.context_tower.layers[0].adapter = nn.Linear(2, 2)

    def widened(model: TwoTower) -> None:
        model.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size + 3, bias=False)

    def cut(model: TwoTower) -> None:
        del model.t_block

    for change, key in (
        (normed, r"lm_head\.parametrizations"),
        (adapted, r"context_tower\.layers\.0\.adapter\.weight"),
        (widened, r"lm_head\.weight"),
        (cut, r"t_block\.1\.weight"),
    ):
        model = model_of()
        change(model)
        with pytest.raises(ValueError, match=f"save: the model's parameters are not those of its config: .*{key}"):
            save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="save: model is a Sequential, expected a TwoTower"):
        save(nn.Sequential(model_of()), tmp_path / "model")
    assert not list(tmp_path.iterdir())
