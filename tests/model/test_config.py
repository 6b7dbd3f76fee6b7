"""TwoTowerConfig: both spellings of config.json, round trips, and every refusal names its field and value."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from tt_model.config import TwoTowerConfig

# What the published config.json says, as far as it is known.
PUBLISHED = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 1856,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "expand": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, math.inf],
    "time_step_min": 0.001,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "max_position_embeddings": 262144,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
SMALL = {
    **PUBLISHED,
    "vocab_size": 50,
    "hidden_size": 12,
    "hybrid_override_pattern": "M*E-",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mamba_num_heads": 6,
    "n_groups": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def test_published_sizes() -> None:
    config = TwoTowerConfig.from_dict(PUBLISHED)
    assert (config.d_inner, config.conv_dim, config.num_hidden_layers) == (4096, 6144, 52)
    assert [len(config.layers_of(kind)) for kind in "ME*-"] == [23, 23, 6, 0]
    assert config.layers_of("*") == (5, 12, 19, 26, 33, 42)
    assert (config.mask_token_id, config.block_size, config.time_embedding_size) == (3, 16, 256)
    assert (config.confidence_threshold, config.confidence) == (0.8, "probability")
    assert config.dtype is torch.bfloat16
    assert config.time_step_limit == (0.0, math.inf)
    with pytest.raises(ValueError, match="'X'"):
        config.layers_of("X")


def test_golden_configs_round_trip(golden_model: Path) -> None:
    written = json.loads((golden_model / "config.json").read_text())
    config = TwoTowerConfig.from_file(golden_model)
    assert config == TwoTowerConfig.from_file(golden_model / "config.json")
    for name in set(written) - {"architectures", "hybrid_override_pattern"} - set(config.to_dict()):
        assert name.startswith(("time_step_", "rope", "partial")), f"{name} is lost"
    shared = set(written) & set(config.to_dict())
    assert {n: written[n] for n in shared} == {n: config.to_dict()[n] for n in shared}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "eos_token_id": (2, 11), "pad_token_id": None, "time_step_limit": (0.01, 0.5)},
        {"mask_token_id": 7, "block_size": 32, "time_embedding_size": 64, "eos_token_id": None, "bos_token_id": None},
        {"confidence_threshold": 0.95, "confidence": "sequential"},
        {"moe_shared_expert_intermediate_size": 0},
        {"pattern": "M-", "mlp_bias": True, "n_routed_experts": 0, "num_attention_heads": 0, "use_bias": True},
    ],
)
def test_dict_round_trip(changes: dict) -> None:
    config = dataclasses.replace(TwoTowerConfig.from_dict(SMALL), **changes)
    again = TwoTowerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_transformers_spelling(tmp_path: Path) -> None:
    """transformers writes a list of kinds, {"__float__": "Infinity"} and `dtype`; it reads what we write."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TwoTowerConfig.from_dict(SMALL), eos_token_id=(2, 11))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.NemotronHConfig.from_pretrained(tmp_path / "ours")
    assert theirs.layers_block_type == ["linear_attention", "full_attention", "moe", "mlp"]
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "hybrid_override_pattern" not in written
    assert TwoTowerConfig.from_file(tmp_path / "theirs") == config


@pytest.mark.parametrize("name", ["layers_block_type", "layer_types"])
def test_kinds_as_a_list(name: str) -> None:
    values = without(SMALL, "hybrid_override_pattern")
    for kinds in (["mamba", "attention", "moe", "mlp"], ["linear_attention", "full_attention", "moe", "mlp"]):
        assert TwoTowerConfig.from_dict({**values, name: kinds}).pattern == "M*E-"


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("layer_norm_epsilon", "norm_eps"),
        ("n_groups", "mamba_n_groups"),
        ("conv_kernel", "mamba_d_conv"),
        ("use_conv_bias", "mamba_conv_bias"),
        ("chunk_size", "mamba_chunk_size"),
        ("time_step_limit", "mamba_dt_limit"),
        ("n_routed_experts", "num_local_experts"),
        ("torch_dtype", "dtype"),
    ],
)
def test_aliases(name: str, alias: str) -> None:
    values = {**without(SMALL, name, "norm_eps"), alias: SMALL[name]}
    assert TwoTowerConfig.from_dict(values) == TwoTowerConfig.from_dict(SMALL)
    with pytest.raises(ValueError, match="must agree"):
        TwoTowerConfig.from_dict({**SMALL, name: SMALL[name], alias: "float16" if name == "torch_dtype" else [0.5, 2]})


def test_defaults_and_nulls() -> None:
    config = TwoTowerConfig.from_dict({**SMALL, "num_key_value_heads": None, "conv_kernel": None, "eos_token_id": None})
    assert (config.num_key_value_heads, config.conv_kernel, config.eos_token_id) == (4, 4, None)
    assert config.eos_token_ids == ()
    assert TwoTowerConfig.from_dict({**SMALL, "eos_token_id": [2, 11]}).eos_token_ids == (2, 11)
    assert TwoTowerConfig.from_dict({**SMALL, "n_shared_experts": 0}).moe_shared_expert_intermediate_size == 0


def test_what_cannot_matter_is_ignored() -> None:
    ignored = {"expand": 7, "rope_theta": 5, "attention_dropout": 0.3, "initializer_range": 1.0, "use_cache": False}
    assert TwoTowerConfig.from_dict({**SMALL, **ignored}) == TwoTowerConfig.from_dict(SMALL)
    # A pattern without experts needs none of their sizes.
    few = without(SMALL, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hybrid_override_pattern")
    assert TwoTowerConfig.from_dict({**few, "hybrid_override_pattern": "M*--"}).n_routed_experts == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("hybrid_override_pattern", "M*X-"),
        ("hybrid_override_pattern", ""),
        ("hybrid_override_pattern", 4),
        ("layers_block_type", ["mamba", "rwkv"]),
        ("layers_block_type", ["moe", "moe", "moe", "moe"]),
        ("num_hidden_layers", 5),
        ("vocab_size", 0),
        ("vocab_size", "many"),
        ("vocab_size", 3),
        ("hidden_size", 12.5),
        ("hidden_size", True),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 0),
        ("head_dim", -1),
        ("mamba_num_heads", 8),
        ("mamba_hidden_act", "gelu"),
        ("mamba_proj_bias", True),
        ("conv_kernel", 1),
        ("chunk_size", 0),
        ("time_step_limit", [0.1]),
        ("time_step_limit", [0.5, 0.1]),
        ("time_step_limit", 0.1),
        ("mlp_hidden_act", "gelu"),
        ("mlp_bias", True),
        ("mlp_bias", "no"),
        ("n_shared_experts", 2),
        ("moe_shared_expert_intermediate_size", 0),
        ("moe_latent_size", 8),
        ("num_experts_per_tok", 9),
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 2),
        ("routed_scaling_factor", "2.5"),
        ("routed_scaling_factor", math.nan),
        ("layer_norm_epsilon", 0.0),
        ("norm_eps", 1e-6),
        ("residual_in_fp32", 1),
        ("tie_word_embeddings", True),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "modelopt"}),
        ("torch_dtype", "int8"),
        ("dtype", "float16"),
        ("eos_token_id", 50),
        ("eos_token_id", "two"),
        ("mask_token_id", 50),
        ("mask_token_id", -1),
        ("block_size", 0),
        ("max_position_embeddings", 0),
        ("time_embedding_size", 3),
        ("confidence_threshold", 1.5),
        ("confidence_threshold", "0.8"),
        ("confidence", "sure"),
    ],
)
def test_refusals_name_field_and_value(name: str, value: object) -> None:
    values = {**SMALL, name: value}
    if name == "n_group" and value == 8:
        values["topk_group"] = 4
    with pytest.raises(ValueError) as caught:
        TwoTowerConfig.from_dict(values)
    field = "dtype" if name == "torch_dtype" else name
    said = str(value).strip("[]")  # a pair is shown as the tuple that it became
    message = str(caught.value)
    assert "\n" not in message
    if (name, value) != ("vocab_size", 3):  # said of the mask token, which falls outside
        assert re.search(rf"\b{field}\b", message), message
    if name != "layers_block_type":
        assert said in message, message


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "head_dim", "ssm_state_size", "moe_intermediate_size"])
def test_missing_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} missing"):
        TwoTowerConfig.from_dict(without(SMALL, name))


def test_missing_pattern() -> None:
    with pytest.raises(ValueError, match="no layer pattern: one of hybrid_override_pattern"):
        TwoTowerConfig.from_dict(without(SMALL, "hybrid_override_pattern"))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        TwoTowerConfig.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TwoTowerConfig.from_file(tmp_path / "nowhere")
    file = tmp_path / "config.json"
    for text in (b'{"vocab_size": ', b"\xff\xfe"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
            TwoTowerConfig.from_file(tmp_path)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        TwoTowerConfig.from_file(tmp_path)
    file.write_text(json.dumps({**SMALL, "mlp_hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"config\.json: config: mlp_hidden_act is 'gelu'"):
        TwoTowerConfig.from_file(tmp_path)


def test_replace_checks_again() -> None:
    config = TwoTowerConfig.from_dict(SMALL)
    with pytest.raises(ValueError, match="pattern"):
        dataclasses.replace(config, pattern="MQ")
    with pytest.raises(ValueError, match="dtype"):
        dataclasses.replace(config, dtype=torch.int8)
