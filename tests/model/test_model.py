"""The model's own promises: rows do not matter to each other, whole passes equal block by block, errors speak."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, prompts_of, random_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tt_kernels.runtime.launch import recording
from tt_model import Step, TwoTower
from tt_model.checkpoint import start_denoiser
from tt_model.modeling.moe import MoE
from tt_model.modeling.two_tower import TimeEmbedder, _frequencies
from tt_model.training.loop import init_weights
from tt_model.training.objective import ar_loss, denoiser_loss, mask_blocks


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


# ---- a row gets the tokens that it would get alone ----


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    mode=st.sampled_from(["mask_diffusion", "mask_diffusion", "ar", "mock_ar"]),
    block_size=st.integers(1, 8),
    steps=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 0.8, 1.0]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    narrow=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}]),
    eos=st.sampled_from([None, 5, 11, (7, 20, 30)]),
    new=st.integers(0, 20),
)
def test_batch_invariance(model, lengths, mode, block_size, steps, threshold, temperature, narrow, eos, new):
    prompts = prompts_of(lengths)
    options = dict(mode=mode, max_new_tokens=new, block_size=block_size, steps_per_block=steps, eos_token_id=eos)
    options |= dict(confidence_threshold=threshold, temperature=temperature, **narrow)
    together = model.generate(prompts, seed=3, **options)
    for b, prompt in enumerate(prompts):
        alone = model.generate([prompt], seed=[3 + b], **options)
        assert alone.tokens[0] == together.tokens[b]
        assert alone.nfe[0] == together.nfe[b]
        assert len(alone.tokens[0]) <= new
    turned = model.generate(prompts[::-1], seed=[3 + b for b in range(len(prompts))][::-1], **options)
    assert turned.tokens == together.tokens[::-1]


def test_seeds_matter_and_repeat(model):
    options = dict(max_new_tokens=16, temperature=1.0, eos_token_id=None)
    prompt = prompts_of([9])
    outs = [model.generate(prompt, seed=s, **options).tokens[0] for s in (1, 1, 2, 3)]
    assert outs[0] == outs[1] and len({tuple(o) for o in outs}) > 1
    torch.manual_seed(0)
    first = model.generate(prompt, **options).tokens
    torch.manual_seed(0)
    assert model.generate(prompt, **options).tokens == first


def test_on_step_tells_all(model):
    """Replaying what on_step reports gives the output: every position is committed once and never changes."""
    prompts, steps = prompts_of([3, 12]), []
    out = model.generate(prompts, max_new_tokens=20, confidence_threshold=0.1, eos_token_id=None, on_step=steps.append)
    for b, prompt in enumerate(prompts):
        written = {}
        passes = 0
        for s in steps:
            assert isinstance(s, Step)
            if b in s.rows:
                r = s.rows.index(b)
                passes += 1
                for i in s.committed[r].nonzero().flatten().tolist():
                    assert s.start[r] + i not in written
                    assert 0 < s.confidence[r, i] <= 1
                    written[s.start[r] + i] = int(s.tokens[r, i])
        assert passes == out.nfe[b]
        assert sorted(written) == list(range(len(prompt), len(prompt) + 24))  # whole blocks of 8
        assert [written[len(prompt) + i] for i in range(20)] == out.tokens[b]


# ---- one pass equals many ----


def test_prefill_in_stretches(model, monkeypatch):
    monkeypatch.setattr("tt_model.modeling.two_tower.PREFILL_CHUNK", 16)
    prompts = prompts_of([70, 5, 33, 16])
    stretched = model.prefill(prompts)
    monkeypatch.undo()
    whole = model.prefill(prompts)
    torch.testing.assert_close(stretched.last_logits, whole.last_logits, rtol=1e-9, atol=1e-9)  # fp64, sums reordered
    for i in CONFIG.layers_of("M"):
        torch.testing.assert_close(stretched.states(i), whole.states(i), rtol=1e-9, atol=1e-9)


def test_commit_in_parts(model):
    """A block committed at once, and token by token, across a page's edge."""
    (prompt,) = prompts_of([60])
    (block,) = prompts_of([8])
    at_once, by_token = model.prefill([prompt]), model.prefill([prompt])
    model.commit(torch.tensor([block]), at_once)
    for token in block:
        model.commit(torch.tensor([[token]]), by_token)
    torch.testing.assert_close(at_once.last_logits, by_token.last_logits, rtol=1e-9, atol=1e-9)
    whole = model.context_logits(torch.tensor([prompt + block]))
    torch.testing.assert_close(at_once.last_logits, whole[:, -1], rtol=1e-9, atol=1e-9)


def test_what_lies_past_a_row_does_not_show(model):
    """Unused pages may hold anything, NaN included."""
    prompts = prompts_of([3, 40])
    cache, dirty = model.prefill(prompts), model.prefill(prompts)
    for pages in (t for i in CONFIG.layers_of("*") for t in dirty.kv(i)):
        for b, n in enumerate(dirty.lengths.tolist()):
            rows = pages[dirty.page_table[b].long()].flatten(0, 1)
            rows[n:] = float("nan")
            pages[dirty.page_table[b].long()] = rows.view(-1, *pages.shape[1:])
    block = torch.full((2, 8), 3)
    t = torch.ones(2)
    assert torch.equal(model.denoise(block, t, cache), model.denoise(block, t, dirty))


@pytest.mark.parametrize("packed", [False, True])
def test_denoise_all_is_denoise_block_by_block(model, packed):
    S, N = CONFIG.block_size, 48
    clean = torch.tensor(prompts_of([N, N + 1])[0] + prompts_of([N, N + 2])[0]).view(2, N)
    noise = torch.Generator().manual_seed(1)
    noisy, _, t = mask_blocks(clean, S, CONFIG.mask_token_id, noise)
    bounds = [0, 16, 48, 56, 96] if packed else [0, 48, 96]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    got = model.denoise_all(model.encode_clean(clean, S, cu_seqlens), noisy, t).flatten(0, 1)
    for begin, end in pairwise(bounds):
        sequence = clean.flatten()[begin:end].tolist()
        for s in range(0, end - begin, S):
            block, at = noisy.flatten()[begin + s : begin + s + S], t.flatten()[(begin + s) // S]
            cache = model._prefill([sequence[:s]], 0)
            want = model.denoise(block[None], at[None], cache)[0]
            torch.testing.assert_close(got[begin + s : begin + s + S], want, rtol=1e-8, atol=1e-8)


def test_losses_keep_packed_documents_apart(model):
    ids = torch.tensor(prompts_of([64]))
    cu_seqlens = torch.tensor([0, 24, 64], dtype=torch.int32)
    parts = [ar_loss(model, ids[:, :24]), ar_loss(model, ids[:, 24:])]
    whole = ar_loss(model, ids, cu_seqlens)
    torch.testing.assert_close(whole, (parts[0] * 23 + parts[1] * 39) / 62)


def test_denoiser_loss_by_hand(model):
    clean = torch.tensor(prompts_of([32]))
    drawn = noisy, masked, t = mask_blocks(clean, 8, CONFIG.mask_token_id, torch.Generator().manual_seed(5))
    assert masked.any() and not masked.all() and (noisy[masked] == CONFIG.mask_token_id).all()
    assert torch.equal(noisy[~masked], clean[~masked]) and ((t > 0) & (t <= 1)).all()
    logits = model.denoise_all(model.encode_clean(clean, 8), noisy, t)
    want = -logits.log_softmax(-1).gather(-1, clean.unsqueeze(-1)).squeeze(-1)[masked].mean()
    torch.testing.assert_close(denoiser_loss(model, clean, drawn), want)


def test_started_denoiser_is_the_context_tower():
    """Tables (0, 0, 1) and a zero last linear: a one-token block with time conditioning predicts as mock-AR does."""
    model = TwoTower(CONFIG)
    init_weights(model, 1)
    start_denoiser(model, seed=1)
    model = model.to(torch.float64).requires_grad_(False)
    (prompt,) = prompts_of([12])
    cache, last = model.prefill([prompt[:-1]]), torch.tensor([prompt[-1:]])
    conditioned = model.denoise(last, torch.tensor([0.5]), cache)
    torch.testing.assert_close(conditioned, model.denoise(last, None, cache))
    torch.testing.assert_close(conditioned[:, -1], model.context_logits(torch.tensor([prompt]))[:, -1])


@pytest.mark.parametrize("strict", [False, True])
def test_a_trace_leaves_nothing_behind(strict):
    """What a trace makes in place of tensors must not come out of a later call."""
    embedder, t = TimeEmbedder(12, 8), torch.tensor([0.25, 1.0])
    want = embedder(t)
    _frequencies.cache_clear()
    exported = torch.export.export(embedder, (t,), strict=strict)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        embedder(fake.from_tensor(t))
    for got in (embedder(t), exported.module()(t), torch.compile(embedder, backend="aot_eager")(t)):
        assert type(got) is torch.Tensor and torch.equal(got, want)


# ---- 16 bits ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_model_runs_with_fp32_states(dtype, tmp_path):
    from tt_model.checkpoint import save

    model = random_model(seed=2).to(torch.float32)
    save(model, tmp_path / "m")
    small = TwoTower.from_pretrained(tmp_path / "m", dtype=dtype, device="cpu")
    assert small.dtype == dtype
    cache = small.prefill(prompts_of([20, 7]))
    assert all(s.dtype == torch.float32 for s in cache.pool.ssm.values())
    assert all(k.dtype == dtype for k in cache.pool.keys.values())
    assert cache.last_logits.dtype == torch.float32 and cache.last_logits.isfinite().all()
    out = small.generate(prompts_of([20, 7]), max_new_tokens=16, eos_token_id=None)
    assert [len(t) for t in out.tokens] == [16, 16]


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="beam"), "mode is 'beam', expected one of mask_diffusion, ar, mock_ar"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1, expected an integer of at least 0"),
        (dict(block_size=0), "block_size is 0, expected an integer of at least 1"),
        (dict(steps_per_block=0), "steps_per_block is 0"),
        (dict(confidence_threshold=1.5), "confidence_threshold is 1.5, expected 0 to 1"),
        (dict(confidence_threshold=float("nan")), "confidence_threshold is nan"),
        (dict(temperature=1e-40), "temperature is 1e-40, expected 0 .greedy., or 1e-30 and above"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(eos_token_id=50), "eos_token_id is 50, expected 0 to 49"),
        (dict(max_new_tokens=600), "exceed the model's context of 512"),
        (dict(seed=[1, 2]), "seed has 2 values"),
    ],
)
def test_settings_are_checked_before_any_work(model, options, message, monkeypatch):
    monkeypatch.setattr(type(model), "_prefill", lambda *a: pytest.fail("worked before checking"))
    with pytest.raises(ValueError, match=message):
        model.generate([[4, 5]], **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: expected at least one"),
        ([[4], []], "prompt 1 is empty"),
        ([[4, 50]], "prompts holds token id 50, expected 0 to 49"),
        ([[4, -1]], "prompts holds token id -1"),
    ],
)
def test_prompts_are_checked(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts)


def test_context_only_model_says_so():
    model = TwoTower(CONFIG, towers="context")
    init_weights(model)
    model = model.double()
    assert len(model.generate([[4, 5]], mode="ar", max_new_tokens=3, eos_token_id=None).tokens[0]) == 3
    with pytest.raises(ValueError, match='only "ar" works'):
        model.generate([[4, 5]])
    with pytest.raises(ValueError, match="it has no denoiser"):
        model.denoise(torch.tensor([[4]]), None, model.prefill([[4]]))
    with pytest.raises(ValueError, match="towers is 'one'"):
        TwoTower(CONFIG, towers="one")
    with pytest.raises(ValueError, match="dtype is 'bfloat16', expected a torch"):
        TwoTower.from_pretrained(dtype="bfloat16")


def test_a_block_above_the_trained_size_warns(model):
    with pytest.warns(UserWarning, match="block_size 9 is above the 8"):
        model.generate([[4, 5]], block_size=9, max_new_tokens=1)


def test_shapes_are_checked(model):
    cache = model.prefill([[4, 5], [6]])
    with pytest.raises(ValueError, match="denoise: block has shape"):
        model.denoise(torch.full((1, 8), 3), torch.ones(1), cache)
    with pytest.raises(ValueError, match="output is 'probabilities'"):
        model.denoise(torch.full((2, 8), 3), torch.ones(2), cache, output="probabilities")
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        model.prefill([[4], []])
    with pytest.raises(ValueError, match="multiple of"):
        model.encode_clean(torch.full((1, 9), 4), 8)
    _, pending = model.verify(torch.tensor([[4, 5], [6, 7]]), cache)
    with pytest.raises(ValueError, match="expected values from 0 to the block's 2"):
        cache.advance(pending, torch.tensor([3, 0]))


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_a_whole_number_is_a_temperature(model, mode):
    for temperature in (0, 1):
        options = dict(mode=mode, max_new_tokens=4, seed=1, eos_token_id=None)
        want = model.generate([[4, 5]], temperature=float(temperature), **options)
        assert model.generate([[4, 5]], temperature=temperature, **options) == want


def test_a_step_may_be_kept(model):
    """What on_step is given does not change afterwards."""
    kept = []
    options = dict(max_new_tokens=16, confidence_threshold=0.15, eos_token_id=None)
    model.generate(prompts_of([3, 12, 30]), on_step=lambda s: kept.append((s.tokens, s.tokens.clone())), **options)
    assert len({len(tokens) for tokens, _ in kept}) > 1, "rows did not end apart: nothing was tested"
    assert all(torch.equal(tokens, then) for tokens, then in kept)


def test_accepting_little_takes_little_room(model):
    cache = model.prefill([[4, 5]], reserve=0)
    for _ in range(40):
        _, pending = model.verify(torch.full((1, 8), 6), cache)
        cache.advance(pending, torch.tensor([1]))
    assert cache.lengths.tolist() == [42] and cache.longest == 42 and cache.page_table.shape[1] == 1
    with pytest.raises(ValueError, match="the cache has changed"):
        cache.advance(pending, torch.tensor([1]))


def test_last_logits_of_a_16_bit_model_are_not_rounded(tmp_path):
    small = random_model(seed=2).to(torch.bfloat16)
    cache = small.prefill(prompts_of([20, 7]))
    want = cache.last_hidden.float() @ small.context_lm_head.weight.float().T
    torch.testing.assert_close(cache.last_logits, want)
    assert not torch.equal(want, want.bfloat16().float())


def test_experts_are_summed_where_the_next_norm_reads_them():
    with torch.device("meta"), torch.no_grad(), recording(90) as launches:
        model = TwoTower(replace(CONFIG, dtype=torch.bfloat16)).to(torch.bfloat16)
        model.context_logits(torch.zeros(1, 8, dtype=torch.int64))
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names.count("_experts_down_kernel") == CONFIG.pattern.count("E")
    assert names.count("_modulated_rms_norm_fwd_kernel") == len(CONFIG.pattern) + 1
    assert "_experts_combine_kernel" not in names


def test_what_stands_in_the_place_of_experts_is_called_with_hidden_states():
    """Whatever wraps them, torch.compile for one, sees what it sees of other mixers, and nothing changes."""
    model, ids = random_model(), torch.tensor([[4, 5, 6]])
    want = model.context_logits(ids)
    for layer in model.context_tower.layers:
        layer.mixer = Wrapped(layer.mixer) if isinstance(layer.mixer, MoE) else layer.mixer
    assert torch.equal(model.context_logits(ids), want)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner(h)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.generate([4, 5]), "prompts: prompt 0 is 4, expected a list of token ids"),
        (lambda m, c: m.generate(["ab", [4]]), "prompts: prompt 0 is 'ab'"),
        (lambda m, c: m.generate(["ab"]), "not loaded from a folder; give prompts as token ids"),
        (lambda m, c: m.generate([[4.7, 5]]), r"prompts: prompt 0 is \[4.7, 5\]"),
        (lambda m, c: m.prefill([4, 5]), "prompts: prompt 0 is 4"),
        (lambda m, c: m.generate([[4]], seed=1.5), "seed is 1.5"),
        (lambda m, c: m.generate([[4]], eos_token_id="x"), "eos_token_id is 'x'"),
        (lambda m, c: m.generate([[4]], top_k=5.0), "top_k is 5.0, expected an integer"),
        (
            lambda m, c: m.generate([[4]], confidence_threshold="0.5"),
            "confidence_threshold is '0.5', expected a number",
        ),
        (lambda m, c: m.commit(torch.tensor([[50]]), c), "commit: block holds token id 50"),
        (lambda m, c: m.denoise(torch.ones(1, 8), None, c), "denoise: block has shape .* expected .* integers"),
        (lambda m, c: m.encode_clean(torch.full((1, 8), 4), 0), "block_size=0, expected at least 1"),
        (
            lambda m, c: m.encode_clean(torch.full((1, 16), 4), 8, torch.tensor([0, 5, 16])),
            "expected multiples of block_size=8",
        ),
    ],
)
def test_bad_arguments_are_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, model.prefill([[4]]))
