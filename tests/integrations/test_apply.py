"""`apply` in tiny models of every type: what comes out is theirs, on the CPU, where ours run as references."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
from conftest import ROOT
from packaging.version import Version
from tiny import LIMITED, TINY, error, gradients, greedy, logits, tiny

pytest.importorskip("transformers", minversion="5.20")

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers import mamba
from tt_kernels.runtime.launch import INTERPRET

# fp64 on both sides (tiny.Wide), whose roundings are 1e-16: a few layers of sums, exponentials and norms make 1e-13 of
# them. One part in fp32 would show as 1e-7.
BOUND = 1e-11

FALCON = dict(mamba_rms_norm=True, mamba_norm_before_gate=False)
WINDOWS = dict(use_sliding_window=True, sliding_window=4, max_window_layers=2, num_hidden_layers=3)
MODELS = {
    **{name: (name, {}) for name in TINY},
    "falcon_h1, gated norm": ("falcon_h1", FALCON),
    "qwen2_moe, windows": ("qwen2_moe", WINDOWS),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_same_model(name: str) -> None:
    model_type, options = MODELS[name]
    if options is FALCON and Version(version("transformers")) < Version("5.23"):
        pytest.skip("its gated norm drops a dimension of one token: its own cached generation fails")
    model = tiny(model_type, **options)
    before, slopes = (logits(model), *greedy(model)), gradients(model)
    data = [p.data_ptr() for p in model.parameters()]
    changes = tt.apply(model)
    after, found = (logits(model), *greedy(model)), gradients(model)
    assert torch.equal(after[1], before[1])
    assert error(after[0], before[0]) < BOUND and error(after[2], before[2]) < BOUND
    assert found.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        assert error(found[parameter], slope) < BOUND, parameter
    assert data == [p.data_ptr() for p in model.parameters()]
    changes.undo()
    assert not changes.replaced and torch.equal(logits(model), before[0])


@pytest.mark.parametrize("name", LIMITED)
def test_windows_and_soft_caps(name: str) -> None:
    """Padded rows longer than the window, generation far past it through caches that drop what is before, gradients."""
    model = tiny(name)
    before, slopes = (logits(model), *greedy(model, 9)), gradients(model)
    wide = tiny(name, sliding_window=64)
    assert error(logits(wide), before[0]) > 1e-3, "the window does not matter"
    if name == "gemma2":
        assert error(logits(tiny(name, attn_logit_softcapping=None)), before[0]) > 1e-3, "the cap does not matter"
    changes = tt.apply(model, norm=False)
    assert replaced(changes)["attention"][0].endswith("and its mask")
    after, found = (logits(model), *greedy(model, 9)), gradients(model)
    assert torch.equal(after[1], before[1])
    assert error(after[0], before[0]) < BOUND and error(after[2], before[2]) < BOUND
    assert found.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        assert error(found[parameter], slope) < BOUND, parameter
    changes.undo()
    assert torch.equal(logits(model), before[0])


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRET, reason="test_it_is_the_same_model does more by references")
@pytest.mark.parametrize("model_type", TINY)
def test_by_kernels(model_type: str) -> None:
    """A padded prompt, a token on its cache, and gradients."""
    model = tiny(model_type)
    (sequences, expected), slopes = greedy(model, 2), gradients(model)
    changes = tt.apply(model)
    (found, got), own = greedy(model, 2), gradients(model)
    changes.undo()
    assert torch.equal(found, sequences) and error(got, expected) < BOUND
    assert own.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        assert error(own[parameter], slope) < BOUND, parameter


def replaced(changes: tt.Changes) -> dict[str, list[str]]:
    """What was replaced, by kind."""
    kinds: dict[str, list[str]] = {}
    for line in changes.replaced:
        kind, _, what = line.partition(": ")
        kinds.setdefault(kind, []).append(what)
    return kinds


def test_it_says_what_it_did() -> None:
    model = tiny("nemotron_h")
    changes = tt.apply(model)
    found = replaced(changes)
    assert found["experts"] == ["1 NemotronHExperts"]
    assert found["attention"] == ["1 NemotronHAttention, and its mask"]
    assert found["norm"] == ["6 NemotronHRMSNorm", "2 NemotronHRMSNormGated"]
    assert found["mamba"] == [f"modeling_nemotron_h.{name}" for name in mamba.FUNCTIONS]
    assert set(changes.left) == {"routers, shared experts", "convolution and scan in training on a GPU"}
    assert "left      routers" in str(changes) and "replaced  experts: 1" in str(changes)
    tt.revert(model)
    assert str(changes) == ""


PARTS = ("experts", "attention", "mamba", "norm", "loss")


@pytest.mark.parametrize("part", PARTS)
def test_parts_can_be_chosen(part: str) -> None:
    model = tiny("nemotron_h")
    others = {name: name == part for name in PARTS}
    assert set(replaced(tt.apply(model, **others))) == {part}
    tt.revert(model)


def test_undoing_one_model_leaves_another_of_its_type() -> None:
    """The functions of a module serve all models of a type: they go with the last."""
    module: Any = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    theirs = module.mamba2_chunk_scan
    first, second = tiny("mamba2"), tiny("mamba2")
    tt.apply(first)
    tt.apply(first)  # again: the first time is undone
    tt.apply(second)
    tt.revert(first)
    assert module.mamba2_chunk_scan is not theirs
    tt.revert(second)
    tt.revert(second)
    assert module.mamba2_chunk_scan is theirs
    assert all("forward" not in vars(m) for m in (*first.modules(), *second.modules()))


@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_moe"])
def test_classes_of_a_type(model_type: str) -> None:
    """Without a model, what is made before and after runs ours, and attention is for the config."""
    model = tiny(model_type)
    before = logits(model)
    changes = getattr(tt, f"apply_tt_kernels_to_{model_type}")()
    try:
        later = tiny(model_type)
        for m in (model, later):
            assert error(logits(m), before) < BOUND and m.config._attn_implementation != tt.NAME
        assert set(replaced(changes)) == (
            {"experts", "norm", "mamba"} if model_type == "nemotron_h" else {"experts", "router", "norm"}
        )
        assert "attn_implementation" in changes.left["attention"]
    finally:
        changes.undo()
    assert torch.equal(logits(model), before)


def test_the_functions_of_types() -> None:
    model = tiny("olmoe")
    with pytest.raises(ValueError, match="model is of type 'olmoe', expected 'mixtral'"):
        tt.apply_tt_kernels_to_mixtral(model)
    assert "experts" in replaced(tt.apply_tt_kernels_to_olmoe(model, norm=False))
    tt.revert(model)
    with pytest.raises(AttributeError, match="model types are nemotron_h"):
        _ = tt.apply_tt_kernels_to_gpt2
    assert {f"apply_tt_kernels_to_{t}" for t in TINY} <= set(dir(tt))


def test_what_is_not_served_is_left() -> None:
    changes = tt.apply(tiny("mixtral", hidden_act="quick_gelu", attention_dropout=0.1))
    assert "act_fn" in changes.left["experts"] and "attention_dropout is 0.1" in changes.left["attention"]
    model = tiny("olmoe")
    model.model.layers[1].self_attn.sinks = torch.zeros(4)  # as gpt_oss has them
    assert "sinks" in tt.apply(model).left["attention"]
    tt.revert(model)
    changes = tt.apply(model := tiny("falcon_h1", mamba_rms_norm=True))
    assert "norm_before_gate" in changes.left["norm: FalconH1RMSNormGated"]
    tt.revert(model)


def test_activation_checkpointing() -> None:
    model = tiny("nemotron_h")
    tt.apply(model)
    slopes = gradients(model, wide=False)
    model.gradient_checkpointing_enable()
    found = gradients(model, wide=False)
    tt.revert(model)
    assert all(error(found[name], slope) < BOUND for name, slope in slopes.items())


@pytest.mark.parametrize("model_type", TINY)
def test_autocast(model_type: str) -> None:
    """A step of mixed training: weights in fp32, autocast to bf16. Ours round elsewhere than theirs: what the two
    gradients, all in one, differ by is no more than what theirs differ by from fp32."""
    model = tiny(model_type).float()
    exact = gradients(model, wide=False)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(model, wide=False)
        tt.apply(model)
        ours = gradients(model, wide=False)
    tt.revert(model)
    assert set(ours) == set(theirs) and all(t.dtype == torch.float32 for t in ours.values())
    flat = [torch.cat([found[name].flatten() for name in exact]) for found in (ours, theirs, exact)]
    assert (flat[0] - flat[2]).norm() < 2 * (flat[1] - flat[2]).norm()


def scan(**options: Any) -> Any:
    x, dt, A, B, C = (torch.randn(s) for s in ((1, 6, 4, 8), (1, 6, 4), (4,), (1, 6, 2, 5), (1, 6, 2, 5)))
    return mamba.mamba2_chunk_scan(x, dt, -A.exp(), B, C, **(dict(chunk_size=4, dt_softplus=True) | options))


def update(*, grad: bool = False, **options: Any) -> Any:
    x, dt, A, B, C = (torch.randn(s) for s in ((2, 4, 8), (2, 4), (4,), (2, 2, 5), (2, 2, 5)))
    given = dict(dt=dt[..., None].expand(-1, -1, 8), A=(-A.exp())[:, None, None].expand(-1, 8, 5), B=B, C=C)
    given |= dict(dt_softplus=True) | options
    return mamba.mamba2_selective_state_update(torch.zeros(2, 4, 8, 5), x.requires_grad_(grad), **given)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: scan(seq_idx=torch.zeros(1, 6)), "seq_idx is given"),
        (lambda: scan(dt_softplus=False), "dt_softplus is False"),
        (
            lambda: scan(initial_states=torch.zeros(1, 4, 8, 5, requires_grad=True), return_final_states=True),
            r"under torch\.no_grad",
        ),
        (lambda: update(dt_softplus=False), "dt_softplus is False"),
        (lambda: update(dt=torch.zeros(2, 4, 8)), "dt differs within a head"),
        (lambda: update(A=torch.zeros(4, 8, 5)), "A differs within a head"),
        (lambda: update(grad=True), r"under torch\.no_grad"),
        (
            lambda: mamba.causal_conv1d_fn(torch.zeros(1, 3, 5), torch.zeros(3, 4), activation="gelu"),
            "activation is 'gelu', served are 'silu' and None",
        ),
        (
            lambda: mamba.causal_conv1d_fn(torch.zeros(1, 3, 5), torch.zeros(3, 4), cu_seqlens=torch.zeros(2)),
            "cu_seqlens is given",
        ),
    ],
)
def test_mamba_refuses(call: Any, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        call()


@pytest.mark.parametrize("call", [scan, update])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_inside(call: Any, dtype: torch.dtype) -> None:
    """As mamba_ssm's scan and step have it: y times z sigmoid(z), computed in fp32, in the dtype of y."""
    torch.manual_seed(0)
    y = call()
    z = torch.randn(y.shape).mul(4).to(dtype)
    torch.manual_seed(0)
    gated = call(z=z)
    torch.testing.assert_close(gated, y * (z.float() * z.float().sigmoid()))
    assert gated.dtype == y.dtype and not torch.equal(gated, y)


def test_initial_states_stay_as_they_were() -> None:
    state = torch.randn(1, 4, 8, 5)
    kept = state.clone()
    y, final = scan(initial_states=state, return_final_states=True)
    assert torch.equal(state, kept) and final.shape == state.shape and not torch.equal(final, state)
    assert not y.isnan().any()


def test_training_on_a_gpu_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no GPUs here: a tensor that says it is on one stands for it."""
    function = mamba.unless_training_on_gpu(lambda x: "ours", lambda x: "theirs")
    x = torch.zeros(1, requires_grad=True)
    assert function(x) == "ours"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert function(x) == "theirs" and function(x.detach()) == "ours"
    with torch.no_grad():
        assert function(x) == "ours"


def test_importing_the_kernels_imports_no_transformers() -> None:
    code = "import sys, tt_kernels.integrations.transformers as tt; tt.TYPES; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "False"
