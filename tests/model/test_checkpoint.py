"""Checkpoints: round trips, golden and plain layouts, the start of a denoiser, conversion."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, SHARD, loaded, meta_model, model_of, plain, rewritten, same, tensors_of
from safetensors.torch import load_file

from tt_model import checkpoint
from tt_model.checkpoint import convert, layout, load, save, start_denoiser
from tt_model.config import TwoTowerConfig
from tt_model.two_tower import TwoTower


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model_of(), tmp_path / "model", max_shard_bytes=SHARD)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shard", [SHARD, 5e9])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype, shard: float) -> None:
    model = model_of(replace(CONFIG, dtype=dtype))
    save(model, tmp_path / "model", max_shard_bytes=shard)
    config = TwoTowerConfig.from_file(tmp_path / "model")
    assert config == replace(CONFIG, dtype=dtype)
    same(loaded(tmp_path / "model", config, dtype=dtype), model)
    assert layout(tmp_path / "model") == "two_tower"
    # And again: the same bytes.
    save(loaded(tmp_path / "model", config, dtype=dtype), tmp_path / "again", max_shard_bytes=shard)
    files = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard == SHARD)
    for name in files:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_shards_and_index(saved: Path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in saved.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    held = {key: name for name in shards for key in load_file(saved / name)}
    assert held == index["weight_map"]
    sizes = [[v.nbytes for v in load_file(saved / name).values()] for name in shards]
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"]
    assert all(sum(held) <= SHARD or len(held) == 1 for held in sizes)
    experts = {held[f"denoiser_tower.layers.{i}.mixer.experts.{j}.up_proj.weight"] for i in (1, 4) for j in range(11)}
    assert len(experts) > 2, "the test means to read a layer's experts from two files"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_in_less_than_it_computes_in(tmp_path: Path, dtype: torch.dtype) -> None:
    model = model_of()
    save(model, tmp_path / "model", dtype=dtype)
    config = TwoTowerConfig.from_file(tmp_path / "model")
    assert config.dtype is torch.float32
    again = loaded(tmp_path / "model", config)
    wide = ("A_log", "dt_bias", "mixer.D", "gate.weight", "e_score_correction_bias")
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert q.dtype is torch.float32
        assert torch.equal(q, p if name.endswith(wide) else p.to(dtype).float()), name
    assert tensors_of(tmp_path / "model")["context_tower.layers.0.mixer.A_log"].dtype is torch.float32


def test_16_bit_models_keep_some_parameters_wide(saved: Path) -> None:
    model = loaded(saved, dtype=torch.bfloat16)
    wide = {name.split(".mixer.")[1] for name, p in model.named_parameters() if p.dtype is torch.float32}
    assert wide == set(checkpoint.FP32_PARAMETERS)
    reference = loaded(saved)
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(p, q.to(p.dtype)), name


def test_filled_in_place_where_it_can_be(saved: Path) -> None:
    model = model_of(seed=1)
    model.context_tower.requires_grad_(False)
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    load(model, saved, device="cpu", dtype=torch.float32)
    same(model, model_of())
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.data_ptr() == before[name][1], name
    load(model, saved, device="cpu", dtype=torch.float64)
    assert not model.context_tower.embeddings.weight.requires_grad
    assert model.denoiser_tower.embeddings.weight.requires_grad
    assert all(p.dtype is torch.float64 for p in model.parameters())


def test_attention_and_projection_biases(tmp_path: Path) -> None:
    config = replace(CONFIG, attention_bias=True, use_bias=True, use_conv_bias=False, conv_kernel=3)
    save(model_of(config), tmp_path / "model")
    same(loaded(tmp_path / "model", config), model_of(config))
    with pytest.raises(ValueError, match=r"12 unexpected .*q_proj\.bias.*missing|missing.*12 unexpected"):
        loaded(tmp_path / "model", replace(CONFIG, conv_kernel=3))


def test_golden_checkpoints(golden_model: Path) -> None:
    config = TwoTowerConfig.from_file(golden_model)
    model = loaded(golden_model, config)
    stored = tensors_of(golden_model)
    read = 0
    for name, p in model.named_parameters():
        head, _, kind = name.rpartition(".")
        if head.endswith(".experts"):
            for j, part in enumerate(p):
                assert torch.equal(part, stored[f"{head}.{j}.{kind}.weight"]), (name, j)
            read += len(p)
        else:
            assert torch.equal(p, stored[name]), name
            read += 1
    assert read == len(stored)
    assert layout(golden_model) == "two_tower"


def test_golden_context_alone(golden_model: Path) -> None:
    config = TwoTowerConfig.from_file(golden_model)
    model = loaded(golden_model, config, towers="context")
    assert model.denoiser_tower is None
    both = loaded(golden_model, config)
    for name, p in model.named_parameters():
        assert torch.equal(p, both.get_parameter(name)), name


def test_golden_saved_again(golden_model: Path, tmp_path: Path) -> None:
    model = loaded(golden_model, TwoTowerConfig.from_file(golden_model))
    save(model, tmp_path / "model", max_shard_bytes=1e6)
    ours, theirs = tensors_of(tmp_path / "model"), tensors_of(golden_model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(("prefix", "stacked"), [("backbone.", False), ("model.", True), ("model.", False)])
def test_plain_layout(tmp_path: Path, prefix: str, stacked: bool) -> None:
    tower = plain(tmp_path / "plain", prefix=prefix, stacked=stacked)
    assert layout(tmp_path / "plain") == "plain"
    same(loaded(tmp_path / "plain", towers="context"), tower)
    with pytest.raises(ValueError, match=r'plain Nemotron-H.*towers="context".*convert'):
        loaded(tmp_path / "plain")


@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_writes(tmp_path: Path, original: bool) -> None:
    transformers = pytest.importorskip("transformers")
    kinds = ["linear_attention", "moe", "full_attention", "mlp", "moe"]
    values = {k: v for k, v in CONFIG.to_dict().items() if not k.startswith(("hybrid", "num_hidden", "arch", "model"))}
    theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**values, layers_block_type=kinds))
    theirs.save_pretrained(tmp_path, max_shard_size="12KB", save_original_format=original)
    config = TwoTowerConfig.from_file(tmp_path)
    model = loaded(tmp_path, config, towers="context")
    state = theirs.state_dict()
    for name, p in model.named_parameters():
        key = name.replace("context_tower.", "model.").replace("context_lm_head.", "lm_head.")
        assert torch.equal(p, state[key]), name


def test_context_alone_saved_and_loaded(tmp_path: Path) -> None:
    tower = model_of(towers="context")
    save(tower, tmp_path / "model")
    assert layout(tmp_path / "model") == "context"
    same(loaded(tmp_path / "model", towers="context"), tower)
    with pytest.raises(ValueError, match="holds a context tower only"):
        loaded(tmp_path / "model")


def check_start(model: TwoTower, dtype: torch.dtype = torch.float32) -> None:
    context, denoiser = model.context_tower, model.denoiser_tower
    same(denoiser, context)
    assert torch.equal(model.lm_head.weight, model.context_lm_head.weight)
    for table in model.scale_shift_tables:
        assert torch.equal(table, torch.tensor([0, 0, 1], dtype=dtype)[:, None].expand(3, 12))
    assert not model.t_block[1].weight.any() and not model.t_block[1].bias.any()
    for i in (0, 2):
        weight, bias = model.t_embedder.mlp[i].weight, model.t_embedder.mlp[i].bias
        assert 0.01 < weight.float().std() < 0.03 and not bias.any()
    for p, q in zip(denoiser.parameters(), context.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_denoiser(tmp_path: Path, dtype: torch.dtype) -> None:
    plain(tmp_path / "plain")
    model = meta_model()
    load(model, tmp_path / "plain", device="cpu", dtype=dtype, towers="context")
    assert model.lm_head.weight.is_meta
    with pytest.raises(ValueError, match="parameters have no values: denoiser_tower"):
        save(model, tmp_path / "half")
    start_denoiser(model, seed=4)
    check_start(model, dtype)
    trained = model_of(replace(CONFIG, dtype=dtype))  # from any state, in place
    before = trained.lm_head.weight
    start_denoiser(trained, seed=4)
    check_start(trained, dtype)
    assert trained.lm_head.weight is before
    assert torch.equal(trained.t_embedder.mlp[0].weight, model.t_embedder.mlp[0].weight)
    start_denoiser(trained, seed=5)
    assert not torch.equal(trained.t_embedder.mlp[0].weight, model.t_embedder.mlp[0].weight)


def test_start_denoiser_refuses() -> None:
    with pytest.raises(ValueError, match="no denoiser"):
        start_denoiser(model_of(towers="context"))
    with pytest.raises(ValueError, match=r"context_tower\.embeddings\.weight has no values"):
        start_denoiser(meta_model())


@pytest.mark.parametrize(("prefix", "stacked"), [("backbone.", False), ("model.", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_equals_start_denoiser(tmp_path: Path, prefix: str, stacked: bool, dtype: torch.dtype) -> None:
    config = replace(CONFIG, dtype=dtype)
    plain(tmp_path / "plain", config, prefix=prefix, stacked=stacked)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    written = convert(tmp_path / "plain", tmp_path / "two", seed=4, block_size=8, max_shard_bytes=SHARD)
    assert written == TwoTowerConfig.from_file(tmp_path / "two") == replace(config, block_size=8)
    model = meta_model(config)
    load(model, tmp_path / "plain", device="cpu", dtype=dtype, towers="context")
    start_denoiser(model, seed=4)
    same(loaded(tmp_path / "two", written, dtype=dtype), model)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{}"


def test_convert_stores_what_it_is_told(tmp_path: Path) -> None:
    save(model_of(replace(CONFIG, mask_token_id=5), "context"), tmp_path / "ar")
    config = convert(tmp_path / "ar", tmp_path / "two", dtype=torch.float16)
    assert (config.mask_token_id, config.dtype) == (5, torch.float32)
    kinds = {k: v.dtype for k, v in tensors_of(tmp_path / "two").items()}
    assert {k.split(".mixer.")[1] for k, v in kinds.items() if v is not torch.float16} == set(
        checkpoint.FP32_PARAMETERS
    )


def test_convert_refuses(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a denoiser already"):
        convert(saved, tmp_path / "two")
    plain(tmp_path / "plain")
    with pytest.raises(ValueError, match="onto itself"):
        convert(tmp_path / "plain", tmp_path / "here" / ".." / "plain")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "two")
    rewritten(tmp_path / "plain", lambda t: t["backbone.layers.1.mixer.experts.3.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"context_tower\.layers\.1\.mixer\.experts\.3\.up_proj\.weight .* NaN"):
        convert(tmp_path / "plain", tmp_path / "two")
    assert not (tmp_path / "two").exists()
