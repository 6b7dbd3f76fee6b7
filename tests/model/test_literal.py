"""tests/literal against the golden files, and by hand in the few places that no golden file reaches.

Every forward logit and cache of the three models, and every generation case. Three of masked diffusion (1, 8 and 10 of
each model: many passes, nothing that the others lack) are marked slow. 25 s of CPU time, with these 35 s.
"""

import json
import math
from functools import cache
from pathlib import Path

import literal
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

MODELS = ["small", "uneven", "large_state"]
COUNTS = {"mask_diffusion": 13, "ar": 4, "mock_ar": 4}
LONG = [("mask_diffusion", 1), ("mask_diffusion", 8), ("mask_diffusion", 10)]
CASES = [(mode, i) for mode, count in COUNTS.items() for i in range(count)]
CASES = [pytest.param(*case, marks=pytest.mark.slow) if case in LONG else case for case in CASES]
SETTINGS = ["max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id"]
GENERATE = {
    "mask_diffusion": literal.generate_mask_diffusion,
    "ar": literal.generate_ar,
    "mock_ar": literal.generate_mock_ar,
}


@cache
def load_model(folder: Path) -> literal.Model:
    return literal.load(folder)


@cache
def load_forward(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "forward.safetensors")


@cache
def load_generations(folder: Path) -> dict:
    return json.loads((folder / "generate.json").read_text())


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """1e-5 of the largest magnitude: golden/README.md's bound; the golden side is fp32 and lies within 3e-6."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = (got - want.double()).abs().max().item() / want.abs().max().item()
    assert error <= 1e-5, f"{what}: {error:.1e} of the largest magnitude"


def assert_cache(got: literal.Cache, prefix: str, want: dict[str, Tensor]) -> None:
    parts = {f"{prefix}.layer{i}.{part}": value for i, state in enumerate(got) for part, value in state.items()}
    assert parts.keys() == {key for key in want if key.startswith(f"{prefix}.")}
    for key, value in parts.items():
        assert_close(value, want[key], key)


@pytest.mark.parametrize("i", range(5))
def test_forward(golden_model: Path, i: int) -> None:
    m, want = load_model(golden_model), load_forward(golden_model)
    prompt = want[f"forward{i}.prompt"][0].tolist()

    _, before_last = literal.context_forward(m, prompt[:-1])
    got = literal.mock_ar_logits(m, prompt[-1], before_last)
    assert_close(got, want[f"forward{i}.mock_ar_logits"], "mock_ar_logits")

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


@pytest.mark.parametrize(("mode", "i"), CASES)
def test_generation(golden_model: Path, mode: str, i: int) -> None:
    case = load_generations(golden_model)[mode][i]
    settings = {key: case[key] for key in SETTINGS if key in case}
    got = GENERATE[mode](load_model(golden_model), case["prompt"], **settings)
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


def test_no_golden_case_is_left_out(golden_model: Path) -> None:
    assert {mode: len(cases) for mode, cases in load_generations(golden_model).items()} == COUNTS
    assert {key.split(".")[0] for key in load_forward(golden_model)} == {f"forward{i}" for i in range(5)}


def test_last_block_is_whole_and_the_output_is_cut(golden_dir: Path) -> None:
    """No golden case has a max_new_tokens that the block size does not divide."""
    case = load_generations(golden_dir / "small")["mask_diffusion"][3]
    settings = {key: case[key] for key in SETTINGS} | {"max_new_tokens": 13}
    got = literal.generate_mask_diffusion(load_model(golden_dir / "small"), case["prompt"], **settings)
    start = len(case["prompt"])
    assert got.output == case["output"][: start + 16]
    assert got.tokens == case["output"][start : start + 13]


def test_mock_ar_after_one_token_starts_from_an_empty_cache(golden_dir: Path) -> None:
    m = load_model(golden_dir / "small")
    got = literal.generate_mock_ar(m, [8], max_new_tokens=2)
    first = literal.denoise(m, [8], None, literal.empty_cache(m))[0].argmax().item()
    second = literal.denoise(m, [first], None, literal.context_forward(m, [8])[1])[0].argmax().item()
    assert got.tokens == [first, second]


def with_config(m: literal.Model, **settings: object) -> literal.Model:
    return m._replace(config=m.config | settings)


def test_settings_that_no_golden_model_uses(golden_dir: Path) -> None:
    m = load_model(golden_dir / "small")
    h = m.weights["context_tower.embeddings.weight"][7]

    moe = "context_tower.layers.1.mixer"
    raw = literal.route(with_config(m, norm_topk_prob=False), moe, h)
    total = sum(weight for _, weight in raw)
    assert not math.isclose(total, 2.5)  # routed_scaling_factor
    assert literal.route(m, moe, h) == [(expert, pytest.approx(weight / total * 2.5)) for expert, weight in raw]

    mamba, state = "context_tower.layers.0.mixer", literal.empty_cache(m)[0]
    large_dt = m.weights | {f"{mamba}.dt_bias": torch.full((8,), 1e4, dtype=torch.float64)}
    models = [
        with_config(m, time_step_limit=[0.5, 0.5]),
        with_config(m, time_step_limit=[0.0, 0.5])._replace(weights=large_dt),
        m,
    ]
    a, b, free = (literal.mamba_step(each, mamba, h, state)[1]["ssm_state"] for each in models)
    assert torch.equal(a, b) and not torch.equal(a, free)

    attention, bias = "context_tower.layers.3.mixer", torch.linspace(-1, 1, 32, dtype=torch.float64)
    biases = {f"{attention}.k_proj.bias": bias, f"{attention}.v_proj.bias": 2 * bias}
    biased = with_config(m, attention_bias=True)._replace(weights=m.weights | biases)
    (key, value), (plain_key, plain_value) = (literal.key_value(each, attention, h) for each in (biased, m))
    torch.testing.assert_close(key, plain_key + bias.view(2, 16))
    torch.testing.assert_close(value, plain_value + 2 * bias.view(2, 16))


def test_unchosen_groups_count_as_zero() -> None:
    """And not as minus infinity: an expert of such a group is chosen before one with a negative score."""
    config = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": False}
    biased = torch.tensor([-0.1, 0.4, -1.5, 1.1, -1.0, -1.0], dtype=torch.float64)
    weights = {
        "x.gate.weight": torch.zeros(6, 1, dtype=torch.float64),  # every score is 0.5
        "x.gate.e_score_correction_bias": biased - 0.5,
    }
    m = literal.Model(config | {"routed_scaling_factor": 1.0}, weights, torch.float32)
    # The best two of a group sum to 0.3 and 0.1: the first group stays, although the largest score is in the second.
    assert literal.route(m, "x", torch.ones(1, dtype=torch.float64)) == [(1, 0.5), (3, 0.5)]


@pytest.mark.parametrize(
    ("confidence", "threshold", "remaining", "positions"),
    [
        ([0.1, 0.2, 0.3], 0.8, 16, [9]),  # never none
        ([0.9, 0.2, 0.95], 0.8, 16, [2, 9]),  # all above the threshold
        ([0.8, 0.2, 0.9], 0.8, 16, [9]),  # at the threshold is not above it
        ([0.9, 0.2, 0.3], 0.8, 2, [2, 9]),  # at least ceil(3 / 2)
        ([0.1, 0.2, 0.3], 0.8, 1, [2, 5, 9]),  # all in the last step
        ([0.3, 0.3, 0.3], 0.8, 2, [2, 5]),  # of equals the lower positions
    ],
)
def test_commit_rule(confidence: list[float], threshold: float, remaining: int, positions: list[int]) -> None:
    assert literal.commit_rule([2, 5, 9], confidence, threshold, remaining) == positions


def test_sample() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    assert literal.sample(logits) == 1  # of equals the lowest id
    last = torch.tensor([0.0, 0.0, 0.0, 7.0], dtype=torch.float64)  # noise in favour of the last word
    assert literal.sample(logits, last, temperature=1.0) == 3
    assert literal.sample(logits, last, temperature=0.1) == 1  # 30 against 0 + 7
    assert literal.sample(logits, last, temperature=1.0, top_k=3) == 1
    assert literal.sample(logits, last, temperature=1.0, top_p=0.9) == 1
    third = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert literal.sample(logits, third, temperature=1.0, top_k=1) == 2  # what equals the k-th stays
    assert literal.sample(logits, third, temperature=1.0, top_p=0.1) == 1  # the first word always stays


def test_time_embedding_rounds_to_the_model_dtype() -> None:
    m = literal.Model({}, {"t_embedder.mlp.0.weight": torch.zeros(1, 256)}, torch.bfloat16)
    e = literal.time_embedding(m, 5 / 11)  # t rounds to 0.455078125, and 1000 times that to 456
    assert e[0] == torch.tensor(456.0).cos().bfloat16() and e[128] == torch.tensor(456.0).sin().bfloat16()
