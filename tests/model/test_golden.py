"""The model against what the published implementation computes (golden/): logits, caches, tokens and passes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tt_kernels.runtime.launch import ON_CPU
from tt_model import Cache, Engine, TwoTower

# Interpreted, a pass takes seconds: one short case per mode here, all of it in `make test-full`.
pytestmark = [pytest.mark.kernels, pytest.mark.slow] if ON_CPU else []

# Of a tensor's largest magnitude. The golden files were computed in fp32; a plain fp32 implementation differs by 2e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def model(golden_model: Path) -> TwoTower:
    return TwoTower.from_pretrained(golden_model, device="cpu")


@pytest.fixture(scope="session")
def forward(golden_model: Path) -> dict[str, Tensor]:
    return load_file(golden_model / "forward.safetensors")


@pytest.fixture(scope="session")
def generated(golden_model: Path) -> dict[str, list[dict]]:
    return json.loads((golden_model / "generate.json").read_text())


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    error, scale = (got - want).abs().max(), want.abs().max()
    assert error <= TOLERANCE * scale, f"{what}: error {error:.2e} of {scale:.2e}"


def assert_cache(cache: Cache, row: int, want: dict[str, Tensor], prefix: str) -> None:
    n = int(cache.lengths[row])
    for i in cache.pool.ssm:
        conv, ssm = cache.states(i)
        assert_close(ssm[row], want[f"{prefix}.layer{i}.ssm_state"], f"{prefix} layer {i} SSM state")
        assert_close(conv[row], want[f"{prefix}.layer{i}.conv_state"], f"{prefix} layer {i} conv state")
    table = cache.page_table[row].long()
    for i in cache.pool.keys:
        for pages, name in zip(cache.kv(i), ("key", "value"), strict=True):
            rows = pages[table].flatten(0, 1)[:n].transpose(0, 1)
            assert_close(rows, want[f"{prefix}.layer{i}.{name}"], f"{prefix} layer {i} {name}")


@pytest.mark.parametrize("i", range(5))
def test_forward(model: TwoTower, forward: dict[str, Tensor], i: int) -> None:
    prompt = forward[f"forward{i}.prompt"]
    assert_close(model.context_logits(prompt)[0], forward[f"forward{i}.context_logits"], "context logits")
    cache = model.prefill(prompt)
    assert_close(cache.last_logits[0], forward[f"forward{i}.context_logits"][-1], "last logits")
    assert_cache(cache, 0, forward, f"forward{i}.cache")
    for j in range(4):
        block = {k: forward[f"forward{i}.block{j}.{k}"] for k in ("tokens", "t", "denoiser_logits")}
        assert_close(model.denoise(block["tokens"], block["t"], cache)[0], block["denoiser_logits"], f"block {j}")
    assert_cache(cache, 0, forward, f"forward{i}.cache")  # denoise only reads it
    if prompt.shape[1] > 1:
        before = model.prefill(prompt[:, :-1])
        mock_ar = model.denoise(prompt[:, -1:], None, before)[0, -1]
        assert_close(mock_ar, forward[f"forward{i}.mock_ar_logits"], "mock-AR logits")
    model.commit(forward[f"forward{i}.commit.tokens"], cache)
    assert_cache(cache, 0, forward, f"forward{i}.commit.cache")


def test_denoise_with_a_pool_for_each_tower(golden_model: Path, forward: dict[str, Tensor]) -> None:
    model = TwoTower.from_pretrained(golden_model, device=("cpu", "cpu"))
    for i in range(5):
        cache = model.prefill(forward[f"forward{i}.prompt"])
        for j in range(4):
            block = {k: forward[f"forward{i}.block{j}.{k}"] for k in ("tokens", "t", "denoiser_logits")}
            assert_close(model.denoise(block["tokens"], block["t"], cache)[0], block["denoiser_logits"], f"block {j}")


def test_forward_in_one_ragged_batch(model: TwoTower, forward: dict[str, Tensor]) -> None:
    prompts = [forward[f"forward{i}.prompt"][0].tolist() for i in range(5)]
    cache = model.prefill(prompts)
    for i in range(5):
        assert_close(cache.last_logits[i], forward[f"forward{i}.context_logits"][-1], "last logits")
        assert_cache(cache, i, forward, f"forward{i}.cache")
    for j in range(4):
        tokens, t = (torch.cat([forward[f"forward{i}.block{j}.{k}"] for i in range(5)]) for k in ("tokens", "t"))
        logits = model.denoise(tokens, t, cache)
        for i in range(5):
            assert_close(logits[i], forward[f"forward{i}.block{j}.denoiser_logits"], f"block {j} of prompt {i}")
    model.commit(torch.cat([forward[f"forward{i}.commit.tokens"] for i in range(5)]), cache)
    for i in range(5):
        assert_cache(cache, i, forward, f"forward{i}.commit.cache")


def test_verify_and_advance_are_commit(model: TwoTower, forward: dict[str, Tensor]) -> None:
    """Letting a verified block in token count by token count gives the cache of prefilling just those tokens."""
    prompt, block = forward["forward2.prompt"], forward["forward2.commit.tokens"]
    logits, _ = model.verify(block, model.prefill(prompt))
    whole = model.context_logits(torch.cat([prompt, block], 1))
    assert_close(logits, whole[:, prompt.shape[1] :], "verify logits")
    rows = [0, 1, 3, 9, 16]
    cache = model.prefill(prompt.repeat(len(rows), 1))
    _, pending = model.verify(block.repeat(len(rows), 1), cache)
    cache.advance(pending, torch.tensor(rows))
    for b, n in enumerate(rows):
        alone = model.prefill(torch.cat([prompt, block[:, :n]], 1))
        want = {}
        for i in cache.pool.ssm:
            conv, ssm = alone.states(i)
            want |= {f"x.layer{i}.ssm_state": ssm[0], f"x.layer{i}.conv_state": conv[0]}
        for i in cache.pool.keys:
            for name, pages in zip(("key", "value"), alone.kv(i), strict=True):
                length = int(alone.lengths[0])
                want[f"x.layer{i}.{name}"] = pages[alone.page_table[0].long()].flatten(0, 1)[:length].transpose(0, 1)
        assert_cache(cache, b, want, "x")
        assert_close(cache.last_logits[b], alone.last_logits[0], "last logits after advance")


def settings_of(case: dict) -> dict:
    names = ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id")
    return {k: case[k] for k in names if k in case}


def expected(case: dict) -> list[int]:
    """The golden output as the interface cuts it: new tokens, up to the length and the first end of sequence."""
    new = case["output"][len(case["prompt"]) :][: case["max_new_tokens"]]
    eos = case["eos_token_id"]
    return new[: new.index(eos) + 1] if eos in new else new


@pytest.mark.filterwarnings("ignore:block_size 32 is above")
@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_generation(model: TwoTower, generated: dict[str, list[dict]], mode: str) -> None:
    assert generated[mode]
    for case in generated[mode]:
        blocks: list[list[int]] = []

        def on_step(step, blocks=blocks, case=case):
            tokens = torch.where(step.committed, model.config.mask_token_id, step.tokens)
            blocks.append(tokens[0].tolist())  # the block as it was before the step

        out = model.generate([case["prompt"]], mode=mode, on_step=on_step, **settings_of(case))
        assert out.tokens[0] == expected(case), case
        if mode == "mask_diffusion":
            assert out.nfe == [case["nfe"]]
            assert blocks == case["block_before_step"]
        else:
            assert out.nfe == [len(out.tokens[0]) if mode == "mock_ar" else 0]


def generates(model: TwoTower, mode: str, case: dict) -> None:
    out = model.generate([case["prompt"]], mode=mode, **settings_of(case))
    assert out.tokens[0] == expected(case), (mode, case["prompt"])
    assert mode != "mask_diffusion" or out.nfe == [case["nfe"]]


def test_generation_in_one_batch(model: TwoTower, generated: dict[str, list[dict]]) -> None:
    """Cases that share their settings, prompts of unequal length, as one batch."""
    for mode in ("ar", "mock_ar"):
        cases = [c for c in generated[mode] if c["eos_token_id"] is None]
        out = model.generate([c["prompt"] for c in cases], mode=mode, max_new_tokens=24, eos_token_id=None)
        for tokens, case in zip(out.tokens, cases, strict=True):
            assert tokens[: case["max_new_tokens"]] == expected(case)
    cases = [c for c in generated["mask_diffusion"] if settings_of(c)["confidence_threshold"] == 0.8]
    cases = [c for c in cases if (c["block_size"], c["steps_per_block"]) == (16, 16)]
    out = model.generate([c["prompt"] for c in cases], max_new_tokens=32, eos_token_id=None)
    assert len(cases) >= 2
    for tokens, case in zip(out.tokens, cases, strict=True):
        assert tokens == case["output"][len(case["prompt"]) :][:32]


@pytest.mark.filterwarnings("ignore:block_size 32 is above")
@pytest.mark.parametrize(("rows", "device"), [(3, "cpu"), (16, "cpu"), (5, ("cpu", "cpu"))])
def test_all_cases_through_one_engine(
    golden_model: Path, generated: dict[str, list[dict]], rows: int, device: str | tuple[str, str]
) -> None:
    """Every mode and setting beside the others, rows entering as others leave; and what AR wrote once more, drafted.
    Two devices: with a pool for each tower."""
    model = TwoTower.from_pretrained(golden_model, device=device)
    cases = [(mode, case) for mode, found in generated.items() for case in found]
    cases += [("speculative", case) for case in generated["ar"]]
    engine = Engine(model, max_rows=rows)
    requests = [engine.submit(case["prompt"], mode=mode, **settings_of(case)) for mode, case in cases]
    list(engine)
    for request, (mode, case) in zip(requests, cases, strict=True):
        assert request.tokens == expected(case), (mode, case["prompt"])
        assert mode != "mask_diffusion" or request.nfe == case["nfe"]


@pytest.mark.gpu
def test_on_a_gpu(golden_model: Path, forward: dict[str, Tensor], generated: dict[str, list[dict]]) -> None:
    """fp32 on CUDA, TF32 off: the same logits, and the same tokens in every case."""
    model = TwoTower.from_pretrained(golden_model, device="cuda")
    prompt = forward["forward4.prompt"].cuda()
    assert_close(model.context_logits(prompt)[0].cpu(), forward["forward4.context_logits"], "context logits")
    cache = model.prefill(prompt)
    block = {k: forward[f"forward4.block3.{k}"] for k in ("tokens", "t", "denoiser_logits")}
    assert_close(model.denoise(block["tokens"], block["t"], cache)[0].cpu(), block["denoiser_logits"], "block 3")
    for mode, cases in generated.items():
        for case in cases:
            generates(model, mode, case)
