"""tests/literal.py against the golden files, and by hand in the few places that no golden file reaches.

Every forward logit and cache, and every generation case but the two longest of masked diffusion (1 and 8 of each model, a
third of the time): these run too where TWOTOWER_ALL_CASES is set. One core, fp64: 20 s, with all cases 30 s.
"""

import json
import math
import os
from functools import cache
from pathlib import Path

import literal
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("TWOTOWER_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")
MODELS = ["small", "uneven", "large_state"]
LONG = [] if os.environ.get("TWOTOWER_ALL_CASES") else [1, 8]
CASES = [("mask_diffusion", i) for i in range(13) if i not in LONG]
CASES += [(mode, i) for mode in ("ar", "mock_ar") for i in range(4)]
SETTINGS = ["max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id"]
GENERATE = {
    "mask_diffusion": literal.generate_mask_diffusion,
    "ar": literal.generate_ar,
    "mock_ar": literal.generate_mock_ar,
}

golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}: name their folder in TWOTOWER_GOLDEN"
)


@cache
def model(name: str) -> literal.Model:
    return literal.load(GOLDEN / name)


@cache
def forward(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "forward.safetensors")


@cache
def generations(name: str) -> dict:
    return json.loads((GOLDEN / name / "generate.json").read_text())


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """1e-5 of the largest magnitude: golden/README.md's bound; the golden side is fp32 and lies within 3e-6."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = (got - want.double()).abs().max().item() / want.abs().max().item()
    assert error <= 1e-5, f"{what}: {error:.1e} of the largest magnitude"


def assert_cache(got: literal.Cache, prefix: str, want: dict[str, Tensor]) -> None:
    keys = {f"{prefix}.layer{i}.{part}" for i, state in enumerate(got) for part in state}
    assert keys == {key for key in want if key.startswith(f"{prefix}.")}
    for i, state in enumerate(got):
        for part, value in state.items():
            assert_close(value, want[f"{prefix}.layer{i}.{part}"], f"{prefix}.layer{i}.{part}")


@golden
@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, i: int) -> None:
    m, want = model(name), forward(name)
    prompt = want[f"forward{i}.prompt"][0].tolist()

    _, before_last = literal.context_forward(m, prompt[:-1])
    assert_close(literal.mock_ar_logits(m, prompt[-1], before_last), want[f"forward{i}.mock_ar_logits"], "mock_ar_logits")

    logits, prefilled = literal.context_forward(m, prompt)
    assert_close(logits, want[f"forward{i}.context_logits"], "context_logits")
    assert_cache(prefilled, f"forward{i}.cache", want)

    for j in range(4):
        block, t = want[f"forward{i}.block{j}.tokens"][0].tolist(), want[f"forward{i}.block{j}.t"].item()
        got = literal.denoise(m, block, t, prefilled)
        assert_close(got, want[f"forward{i}.block{j}.denoiser_logits"], f"block{j}.denoiser_logits")
    assert_cache(prefilled, f"forward{i}.cache", want)  # the denoiser has not written to it

    _, committed = literal.context_forward(m, want[f"forward{i}.commit.tokens"][0].tolist(), prefilled)
    assert_cache(committed, f"forward{i}.commit.cache", want)


@golden
@pytest.mark.parametrize(("mode", "i"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str, mode: str, i: int) -> None:
    case = generations(name)[mode][i]
    got = GENERATE[mode](model(name), case["prompt"], **{key: case[key] for key in SETTINGS if key in case})
    assert got.output == case["output"]
    new = case["output"][len(case["prompt"]) :]
    end = new.index(case["eos_token_id"]) + 1 if case["eos_token_id"] in new else len(new)
    assert got.tokens == new[:end]
    if mode == "mask_diffusion":
        assert got.nfe == case["nfe"]
        assert got.block_before_step == case["block_before_step"]
        assert got.block_of_step == case["block_of_step"]
    else:
        assert got.nfe == (0 if mode == "ar" else len(new))


@golden
@pytest.mark.parametrize("name", MODELS)
def test_every_golden_case_is_listed(name: str) -> None:
    counts = {mode: len(cases) for mode, cases in generations(name).items()}
    assert counts == {"mask_diffusion": 13, "ar": 4, "mock_ar": 4}
    assert {int(key.split(".")[0].removeprefix("forward")) for key in forward(name)} == set(range(5))


@golden
def test_last_block_is_whole_and_the_output_is_cut() -> None:
    """No golden case has a max_new_tokens that the block size does not divide."""
    case = generations("small")["mask_diffusion"][3]
    settings = {key: case[key] for key in SETTINGS} | {"max_new_tokens": 13}
    got = literal.generate_mask_diffusion(model("small"), case["prompt"], **settings)
    start = len(case["prompt"])
    assert got.output == case["output"][: start + 16]
    assert got.tokens == case["output"][start : start + 13]


@golden
def test_mock_ar_after_one_token_starts_from_an_empty_cache() -> None:
    m = model("small")
    got = literal.generate_mock_ar(m, [8], max_new_tokens=2)
    first = literal.denoise(m, [8], None, literal.empty_cache(m))[0].argmax().item()
    second = literal.denoise(m, [first], None, literal.context_forward(m, [8])[1])[0].argmax().item()
    assert got.tokens == [first, second]


@golden
def test_settings_that_no_golden_model_uses() -> None:
    """Each changes the result, and in the way that its name says."""
    m = model("small")
    h = m.weights["context_tower.embeddings.weight"][7]

    moe = "context_tower.layers.1.mixer"
    normed = literal.route(m, moe, h)
    raw = literal.route(m._replace(config=m.config | {"norm_topk_prob": False}), moe, h)
    assert math.isclose(sum(w for _, w in normed), 2.5)
    total = sum(w for _, w in raw)
    assert not math.isclose(total, 2.5)
    assert [(e, pytest.approx(w / total * 2.5)) for e, w in raw] == normed

    mamba, state = "context_tower.layers.0.mixer", literal.empty_cache(m)[0]
    limited = m._replace(config=m.config | {"time_step_limit": [0.5, 0.5]})
    fixed = m._replace(weights=m.weights | {f"{mamba}.dt_bias": torch.full((8,), 1e4, dtype=torch.float64)})
    fixed = fixed._replace(config=m.config | {"time_step_limit": [0.0, 0.5]})
    a, b, free = (literal.mamba_step(x, mamba, h, state)[1]["ssm_state"] for x in (limited, fixed, m))
    assert torch.equal(a, b) and not torch.equal(a, free)

    bias = torch.linspace(-1, 1, 32, dtype=torch.float64)
    attention = "context_tower.layers.3.mixer"
    biases = {f"{attention}.k_proj.bias": bias, f"{attention}.v_proj.bias": 2 * bias}
    biased = literal.Model(m.config | {"attention_bias": True}, m.weights | biases, m.dtype)
    for got, plain, add in zip(
        literal.key_value(biased, attention, h), literal.key_value(m, attention, h), (bias, 2 * bias), strict=True
    ):
        assert torch.allclose(got, plain + add.view(2, 16), rtol=0, atol=1e-12)


def test_routing_with_groups() -> None:
    """Unchosen groups count as 0, not -inf: where the kept ones hold negative scores, their first expert is chosen."""
    config = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": False, "routed_scaling_factor": 1}
    weights = {
        "x.gate.weight": torch.zeros(6, 1, dtype=torch.float64),  # every score 0.5
        "x.gate.e_score_correction_bias": torch.tensor([-0.6, -0.1, -2.0, 0.6, -1.5, -1.5], dtype=torch.float64),
    }
    m = literal.Model(config, weights, torch.float32)
    h = torch.ones(1, dtype=torch.float64)
    # Biased: -0.1 0.4 -1.5 | 1.1 -1 -1. Top 2 sum to 0.3 and 0.1: the first group stays although the largest is in the second.
    assert literal.route(m, "x", h) == [(1, 0.5), (3, 0.5)]


@pytest.mark.parametrize(
    ("confidence", "threshold", "remaining", "positions"),
    [
        ([0.1, 0.2, 0.3], 0.8, 16, [9]),  # never none
        ([0.9, 0.2, 0.95], 0.8, 16, [2, 9]),  # all above the threshold
        ([0.8, 0.2, 0.7], 0.8, 16, [2]),  # at the threshold is not above it
        ([0.9, 0.2, 0.3], 0.8, 2, [2, 9]),  # at least ceil(3 / 2)
        ([0.1, 0.2, 0.3], 0.8, 1, [2, 5, 9]),  # all in the last step
        ([0.3, 0.3, 0.3], 0.8, 2, [2, 5]),  # of equals the lower positions
    ],
)
def test_commit_rule(confidence: list[float], threshold: float, remaining: int, positions: list[int]) -> None:
    assert literal.commit_rule([2, 5, 9], confidence, threshold, remaining) == positions


def test_sample() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    no_noise = torch.zeros(4, dtype=torch.float64)
    assert literal.sample(logits) == 1  # of equals the lowest id
    favour_last = torch.tensor([0.0, 0.0, 0.0, 7.0], dtype=torch.float64)
    assert literal.sample(logits, favour_last, temperature=1.0) == 3
    assert literal.sample(logits, favour_last, temperature=0.1) == 1  # 30 against 0 + 7
    assert literal.sample(logits, favour_last, temperature=1.0, top_k=3) == 1
    assert literal.sample(logits, favour_last, temperature=1.0, top_p=0.9) == 1
    favour_second = no_noise + torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert literal.sample(logits, favour_second, temperature=1.0, top_k=1) == 2  # what equals the k-th stays
    assert literal.sample(logits, favour_second, temperature=1.0, top_p=0.1) == 1  # the first always stays


def test_time_embedding_rounds_to_the_model_dtype() -> None:
    weights = {"t_embedder.mlp.0.weight": torch.zeros(1, 256)}
    in_bf16 = literal.time_embedding(literal.Model({}, weights, torch.bfloat16), 0.3)
    t1000 = torch.tensor(0.3, dtype=torch.bfloat16) * 1000
    assert t1000.item() == 300.0 and torch.tensor(0.3, dtype=torch.bfloat16).item() != 0.3
    assert in_bf16[0] == torch.tensor(300.0).cos().bfloat16() and in_bf16[128] == torch.tensor(300.0).sin().bfloat16()
