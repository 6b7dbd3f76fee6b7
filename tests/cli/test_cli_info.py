"""`twotower info`: its formulas against the model's own parameters and caches, and against the published sizes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tt_model import Cache, TwoTower, TwoTowerConfig
from tt_model.checkpoint import parameter_dtype
from tt_model.cli import main, sizes
from tt_model.cli.info import count_text, size_text, time_text
from tt_model.modeling.attention import Attention
from tt_model.modeling.mamba2 import Mamba2
from tt_model.modeling.moe import MLP, MoE
from tt_model.modeling.state import PAGE_SIZE

PUBLISHED = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}
CONFIG = TwoTowerConfig.from_dict(PUBLISHED)
BIASED = TwoTowerConfig(
    vocab_size=29,
    hidden_size=12,
    pattern="ME*-*-",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attention_bias=True,
    mamba_num_heads=4,
    mamba_head_dim=5,
    ssm_state_size=7,
    n_groups=2,
    use_bias=True,
    use_conv_bias=False,
    intermediate_size=9,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=5,
    n_group=2,
)
DENSE = replace(
    BIASED, pattern="-*-M", mlp_bias=True, n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0
)
FP32, BF16, FP8, FP4 = sizes.FORMATS


@pytest.fixture(params=[CONFIG, BIASED, DENSE], ids=["published", "biased", "dense"])
def config(request: pytest.FixtureRequest) -> TwoTowerConfig:
    return request.param


def on_meta(config: TwoTowerConfig) -> TwoTower:
    with torch.device("meta"):
        return TwoTower(config)


def test_published_sizes() -> None:
    count = sizes.parameters(CONFIG)
    tower = sum(count.values())
    assert round(tower / 1e9, 1) == 31.6
    assert round((2 * tower + sizes.time_modules(CONFIG)) / 1e9, 1) == 63.2
    assert round(sum(sizes.active_parameters(CONFIG).values()) / 1e9, 1) == 3.6
    experts = count["routed experts"] + count["shared experts"]
    assert experts / tower == pytest.approx(0.945, abs=5e-4)


def test_parameters_are_the_model_s(config: TwoTowerConfig) -> None:
    model = on_meta(config)
    tower, count = model.context_tower, sizes.parameters(config)
    mixers: dict[type, int] = {}
    for layer in tower.layers:
        mixers[type(layer.mixer)] = mixers.get(type(layer.mixer), 0) + sum(p.numel() for p in layer.mixer.parameters())
    experts = count["routed experts"] + count["shared experts"] + count["router"]
    assert count["embeddings"] == tower.embeddings.weight.numel() and count["head"] == model.lm_head.weight.numel()
    for kind, n in ((Mamba2, "Mamba-2"), (Attention, "attention"), (MLP, "dense MLP")):
        assert count[n] == mixers.get(kind, 0), n
    assert experts == mixers.get(MoE, 0)
    assert count["norms"] == sum(
        p.numel() for n, p in tower.named_parameters() if ".norm." in n and ".mixer." not in n
    ) + (tower.norm_f.weight.numel())
    whole = sum(p.numel() for p in model.parameters())
    assert 2 * sum(count.values()) + sizes.time_modules(config) == whole


@pytest.mark.parametrize("form", [FP32, BF16])
def test_bytes_are_the_model_s(config: TwoTowerConfig, form: sizes.Format) -> None:
    dtype = {32: torch.float32, 16: torch.bfloat16}[form.other]
    model = on_meta(config)
    stored = {n: p.numel() * parameter_dtype(n, dtype).itemsize for n, p in model.named_parameters()}
    context = sum(b for n, b in stored.items() if n.startswith("context_"))
    assert sizes.tower_bytes(config, form) == context
    assert sizes.tower_bytes(config, form, denoiser=True) == sum(stored.values()) - context
    pool = Cache.empty(config, 1, device=torch.device("meta"), dtype=dtype).pool
    assert sizes.state_bytes(config, form, planes=2) == sum(t.nbytes for t in (*pool.conv.values(), *pool.ssm.values()))
    per_page = sum(t[0].nbytes for t in (*pool.keys.values(), *pool.values.values()))
    assert sizes.kv_bytes(config, form) * PAGE_SIZE == per_page


def test_smaller_experts() -> None:
    count = sizes.parameters(CONFIG)["routed experts"]
    assert sizes.tower_bytes(CONFIG, BF16) - sizes.tower_bytes(CONFIG, FP8) == count
    assert sizes.tower_bytes(CONFIG, FP8) - sizes.tower_bytes(CONFIG, FP4) == count * (8 - 4.25) / 8


def test_distinct_experts() -> None:
    counts = [sizes.distinct_experts(CONFIG, t) for t in range(1, 300)]
    assert counts[0] == pytest.approx(6) and counts[15] == pytest.approx(68.6, abs=0.05)
    assert counts == sorted(counts) and counts[-1] == pytest.approx(128, abs=1e-3)
    rng, trials = random.Random(0), 2000
    drawn = sum(len({e for _ in range(5) for e in rng.sample(range(8), 3)}) for _ in range(trials)) / trials
    # A count of 8 experts has a deviation below 1, its mean over the trials one below 0.03.
    assert sizes.distinct_experts(BIASED, 5) == pytest.approx(drawn, abs=0.1)
    assert sizes.distinct_experts(DENSE, 5) == 0


def milliseconds(kind: str, form: sizes.Format = BF16, batch: int = 1) -> float:
    return sum(sizes.pass_bytes(CONFIG, form, kind, batch=batch, context=2048).values()) / 4.3e9


def test_floors_of_the_published_model() -> None:
    """Against figures that were worked out by hand, apart from this code: AR 1.53 ms, denoiser 8.21 ms at batch 1."""
    assert milliseconds("AR step") == pytest.approx(1.53, abs=0.01)
    assert milliseconds("denoiser pass") == pytest.approx(8.21, abs=0.03)
    assert milliseconds("AR step", batch=32) == pytest.approx(12.41, abs=0.03)
    assert milliseconds("AR step", FP8) == pytest.approx(1.21, abs=0.01)
    assert milliseconds("denoiser pass", FP8) == pytest.approx(4.55, abs=0.03)
    head = 131072 * 2688 * 2
    assert (
        milliseconds("denoiser pass") > milliseconds("commit pass") > milliseconds("denoiser pass") - head / 4.3e9 - 0.1
    )
    assert sizes.break_even(CONFIG, BF16, batch=1, context=2048) == pytest.approx(8.0, abs=0.1)
    assert sizes.break_even(CONFIG, BF16, batch=32, context=2048) < 1.6


def test_pass_bytes_by_hand() -> None:
    """A pass over 2 sequences of 10 tokens, DENSE in fp32: every weight but the embedding table, and the cache."""
    c, batch, context = DENSE, 2, 10
    count = sizes.parameters(c)
    weights = sum(count.values()) - count["embeddings"]
    kv, states = 4 * 2 * 2 * 6, sizes.state_bytes(c, FP32)  # one attention layer, 2 heads of 6
    for kind, tokens in (("AR step", 2), ("denoiser pass", 32), ("commit pass", 32)):
        moved = sizes.pass_bytes(c, FP32, kind, batch=batch, context=context)
        more = {"AR step": 0, "denoiser pass": sizes.time_modules(c), "commit pass": -count["head"]}[kind]
        writes = kind != "denoiser pass"
        assert moved == {
            "experts": 0,
            "other weights": 4 * (weights + more + tokens * c.hidden_size),
            "K/V": kv * (batch * context + tokens * writes),
            "states": states * batch * (1 + writes),
        }


def test_units() -> None:
    assert [count_text(n) for n in (0, 999, 1000, 31.577e9, 352.3e6)] == ["0", "999", "1.00 k", "31.6 B", "352 M"]
    assert [size_text(n) for n in (512, 6144, 999_960)] == ["512 B", "6.14 kB", "1.00 MB"]
    assert [time_text(n) for n in (1.53e-3, 2.5e-6, 12)] == ["1.53 ms", "2.50 us", "12.0 s"]


# ---- the command ----


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config.json on its own: no weights."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path / "config.json"


def test_info_needs_no_weights(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for model in (file, file.parent):
        assert main(["info", "--model", str(model)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for words in (
            *("52 layers a tower: 23 Mamba-2, 6 attention, 23 mixture of experts", "routed experts", "29.4 B"),
            *("31.6 B", "3.58 B", "63.2 B", "126 GB", "6.14 kB", "50.5 MB", "Lower bounds at 4.3 TB/s", "1.53 ms"),
            *("break-even", "68.6", "1 sequence of 2048 tokens"),
        ):
            assert words in out, words
        assert "\x1b" not in out and max(map(len, out.splitlines())) <= 120


def test_info_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = []
    for bandwidth in ("4.3", "8.6"):
        main(["info", "--model", str(file), "--bandwidth", bandwidth, "--batch", "4", "--context", "100", "--json"])
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[0]["parameters"]["tower"] == sizes.parameters(CONFIG)
    memory = facts[0]["memory"]["bf16"]
    assert memory["all"] - memory["each of two devices"] == memory["context tower"], "each tower reads its own copy"
    slow, fast = (f["floors"]["passes"]["denoiser pass"]["bf16"] for f in facts)
    assert slow["bytes"] == fast["bytes"] == sizes.pass_bytes(CONFIG, BF16, "denoiser pass", batch=4, context=100)
    assert slow["seconds"] == pytest.approx(2 * fast["seconds"])
    assert facts[0]["distinct experts"]["16"] == pytest.approx(68.6, abs=0.05)


def test_info_of_a_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE.to_dict()))
    assert main(["info", "--model", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "dense MLP" in out and "istinct experts" not in out and "router" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "/nowhere"], 1, "/nowhere: no such file"),
        (["--bandwidth", "0"], 2, "0 is not at least"),
        (["--bandwidth", "nan"], 2, "nan is not at least"),
        (["--batch", "x"], 2, "invalid int value: 'x'"),
    ],
)
def test_info_refuses(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("twotower: error: ") and err.count("\n") == 1 and words in err
