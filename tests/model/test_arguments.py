"""What the model's functions refuse: one line that names the argument, what it is and what was expected."""

import re

import numpy as np
import pytest
import torch
from models import CONFIG, random_model

from tt_model import TwoTower
from tt_model.arguments import device_of, integer, is_integer, row_seeds, token_rows, wrapped
from tt_model.checkpoint import convert, load, save, start_denoiser


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


CUDA_DEVICES = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (f"cuda:{CUDA_DEVICES}", f"device is 'cuda:{CUDA_DEVICES}', but there are {CUDA_DEVICES} CUDA devices here"),
        (torch.device("cuda", 99), "device is 'cuda:99', but there are"),
        ("mps", "device is 'mps', expected cpu or cuda"),
        (torch.device("meta"), "device is 'meta', expected cpu or cuda"),
        ("abacus", "device is 'abacus', expected something like cpu, cuda or cuda:1"),
        ("", "device is '', expected something like cpu"),
        (1.5, "device is 1.5, expected something like cpu"),
        (True, "device is True, expected"),
        ([], r"device is \[\], expected"),
    ],
)
def test_devices(device: object, message: str) -> None:
    refused(lambda: TwoTower.from_pretrained(device=device), message)
    refused(lambda: load(TwoTower(CONFIG), "nowhere", device=device, dtype=torch.float32), message)
    with pytest.raises(ValueError, match=r"^--device is"):
        device_of(device, "--device")


@pytest.mark.skipif(CUDA_DEVICES > 0, reason="there is a GPU")
def test_cuda_where_there_is_none() -> None:
    refused(lambda: TwoTower.from_pretrained(device="cuda"), "device is 'cuda', but there are 0 CUDA devices here")
    assert device_of(None) == torch.device("cpu")


def test_devices_that_are_here() -> None:
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn, 16])
def test_dtypes(model: TwoTower, dtype: object, tmp_path) -> None:
    for call in (
        lambda: TwoTower.from_pretrained(dtype=dtype),
        lambda: save(model, tmp_path / "a", dtype=dtype),
        lambda: convert(tmp_path / "a", tmp_path / "b", dtype=dtype),
    ):
        refused(call, f"dtype is {re.escape(repr(dtype))}, expected a torch.dtype of float32, bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eos_token_id="</s>"), "eos_token_id is '</s>', expected one or several token ids, or None"),
        (dict(eos_token_id=b"x"), "eos_token_id is b'x'"),
        (dict(eos_token_id=True), "eos_token_id is True"),
        (dict(eos_token_id=2.0), "eos_token_id is 2.0"),
        (dict(eos_token_id=[2, True]), "eos_token_id is True, expected 0 to 49"),
        (dict(eos_token_id=[2, "a"]), "eos_token_id is 'a', expected 0 to 49"),
        (dict(eos_token_id=-1), "eos_token_id is -1, expected 0 to 49"),
        (dict(max_new_tokens=True), "max_new_tokens is True, expected an integer of at least 0"),
        (dict(max_new_tokens=8.0), "max_new_tokens is 8.0, expected an integer of at least 0"),
        (dict(max_new_tokens=None), "max_new_tokens is None, expected an integer"),
        (dict(max_new_tokens="8"), "max_new_tokens is '8', expected an integer"),
        (dict(max_new_tokens=2**70), "exceed the model's context of 512"),
        (dict(block_size=True), "block_size is True, expected an integer of at least 1"),
        (dict(block_size=2**70), f"block_size is {2**70}, expected at most the model's context of 512"),
        (dict(steps_per_block=np.bool_(True)), "steps_per_block is np.True_, expected an integer of at least 1"),
        (dict(confidence_threshold=True), "confidence_threshold is True, expected a number"),
        (dict(temperature=True), "temperature is True, expected a number"),
        (dict(temperature="hot"), "temperature is 'hot', expected a number"),
        (dict(temperature=float("nan")), "temperature is nan, expected 0 .greedy., or 1e-30 and above, finite"),
        (dict(temperature=float("inf")), "temperature is inf, expected 0"),
        (dict(temperature=10**400), "temperature is 1000"),
        (dict(top_k=True), "top_k is True, expected an integer"),
        (dict(top_p=True), "top_p is True, expected a number"),
        (dict(top_p=float("nan")), "top_p is nan"),
        (dict(seed=True), "seed is True, expected an integer, or one for each of the 1 prompts"),
        (dict(seed="0"), "seed is '0', expected an integer"),
        (dict(seed=[0.5]), r"seed is \[0.5\], expected an integer"),
        (dict(seed=[True]), r"seed is \[True\], expected an integer"),
        (dict(seed=np.array([0.5])), r"seed is array\(\[0.5\]\), expected an integer"),
        (dict(seed=[]), "seed has 0 values, expected one for each of the 1 prompts"),
        (dict(on_step=5), "on_step is 5, expected a function"),
        (dict(mode=["ar"]), r"mode is \['ar'\], expected one of"),
    ],
)
def test_settings(model: TwoTower, options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "_prefill", lambda *a: pytest.fail("worked before checking"))
    refused(lambda: model.generate([[4, 5]], **options), message)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts is 5, expected a list"),
        (torch.tensor(5), r"prompts is tensor\(5\), expected a list"),
        ([[4, True]], r"prompts: prompt 0 is \[4, True\], expected a list of token ids"),
        (torch.tensor([[True]]), r"prompts: prompt 0 is \[True\]"),
        (torch.tensor([[4.0]]), r"prompts: prompt 0 is \[4.0\]"),
        ([[4], {5: 6}], r"prompts: prompt 1 is \{5: 6\}"),
        ([[4], [2**70]], f"prompts holds token id {2**70}, expected 0 to 49 .prompt 1."),
        (torch.ones(1, 2, 3, dtype=torch.int64), "prompts: prompt 0 is"),
        (torch.ones(2, 0, dtype=torch.int64), "prompt 0 is empty: every prompt needs at least one token"),
    ],
)
def test_prompts(model: TwoTower, prompts: object, message: str) -> None:
    refused(lambda: model.generate(prompts), message)
    refused(lambda: model.prefill(prompts), message)


def test_text_needs_a_tokenizer_and_a_prefill_token_ids(model: TwoTower) -> None:
    refused(lambda: model.prefill("hello"), "prompts is 'hello', expected a list of lists of token ids")
    refused(lambda: model.prefill(None), "prompts is None, expected a list")
    refused(lambda: model.generate("hello"), "the model was not loaded from a folder; give prompts as token ids")
    refused(lambda: model.generate(None), "prompts, messages: expected one of them")


BLOCK = torch.full((1, 8), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.prefill([[4]], reserve=-1), "reserve is -1, expected an integer of at least 0"),
        (lambda m, c: m.prefill([[4]], reserve=True), "reserve is True"),
        (lambda m, c: m.commit([[4, 5]], c), r"commit: block is \[\[4, 5\]\], expected a tensor \[B, L\] of integers"),
        (lambda m, c: m.verify(BLOCK.bool(), c), "verify: block has shape .* dtype torch.bool, expected"),
        (lambda m, c: m.context_logits(BLOCK.float()), "ids has shape .* dtype torch.float32"),
        (lambda m, c: m.encode_clean(BLOCK.tolist(), 8), "clean is .*, expected a tensor"),
        (lambda m, c: m.encode_clean(BLOCK, True), "block_size=True, expected at least 1"),
        (lambda m, c: m.encode_clean(BLOCK, 8.0), "block_size=8.0, expected at least 1"),
        (lambda m, c: m.denoise(BLOCK, torch.ones(2), c), r"denoise: t has shape \[2\], expected \[B\] with .* B=1"),
        (lambda m, c: m.denoise(BLOCK, 0.5, c), "denoise: t is 0.5, expected"),
        (lambda m, c: c.advance(m.verify(BLOCK, c)[1], [3]), r"advance: counts is \[3\], expected a tensor of int"),
        (lambda m, c: c.advance(m.verify(BLOCK, c)[1], torch.tensor([1.5])), "advance: counts is .*1.5"),
        (lambda m, c: c.fork([1]), r"fork: rows is \[1\], expected 0 to 0"),
        (lambda m, c: c.fork(torch.tensor([0, -1])), r"fork: rows is \[0, -1\], expected 0 to 0"),
        (lambda m, c: c.fork(torch.tensor([True])), r"fork: rows is \[True\], expected 0 to 0"),
        (lambda m, c: c.fork([0.5]), r"fork: rows is \[0.5\], expected 0 to 0"),
        (
            lambda m, c: c.fork().advance(m.verify(torch.tensor([[1, 2]]), c)[1], torch.tensor([1])),
            "advance: pending is of another cache",
        ),
        (lambda m, c: start_denoiser(m, seed=0.5), "seed is 0.5, expected an integer"),
        (lambda m, c: save(m, "nowhere", max_shard_bytes=0), "max_shard_bytes is 0, expected a number above 0"),
        (lambda m, c: save(m, "nowhere", max_shard_bytes="5GB"), "max_shard_bytes is '5GB'"),
        (lambda m, c: save(m.context_tower.layers, "nowhere"), "save: model is a ModuleList, expected a TwoTower"),
    ],
)
def test_parts(model: TwoTower, call, message: str) -> None:
    refused(lambda: call(model, model.prefill([[4]])), message)


def test_integers() -> None:
    assert all(map(is_integer, (0, -1, 2**70, np.int8(3), np.uint64(2**63))))
    assert not any(map(is_integer, (True, np.True_, 1.0, np.float32(1), "1", None, [1])))
    assert type(integer("n", np.int64(3), 0)) is int


def test_seeds_as_signed_64_bits() -> None:
    assert [wrapped(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, -(2**63) - 1)] == [
        *(0, 2**63 - 1, -(2**63), -1, 0, -1, 2**63 - 1)
    ]
    cpu = torch.device("cpu")
    assert row_seeds(2**63 - 1, 3, cpu).tolist() == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert row_seeds([0, 2**63], 2, cpu).tolist() == [0, -(2**63)]
    assert row_seeds(np.uint64(2**64 - 1), 2, cpu).tolist() == [-1, 0]
    assert row_seeds(None, 3, cpu).dtype == torch.int64


def test_prompts_of_any_kind_are_lists_afterwards() -> None:
    want = [[1, 2], [3]]
    for prompts in (want, [np.array([1, 2]), (3,)], [range(1, 3), torch.tensor([3])], iter(want)):
        rows = token_rows(prompts, 10)
        assert rows == want and all(type(i) is int for row in rows for i in row)
    assert token_rows([[]], 10) == [[]]
