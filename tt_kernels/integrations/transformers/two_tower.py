"""The published TwoTower (remote code, NemotronHTwoTowerForCausalLM): its denoiser and commit passes on ours.

Found by structure, as remote code is of no module of transformers: two towers of blocks with a `block_type`, a `norm`
and a `mixer`, and methods of the model that run a mixer over a block. Prefill and single tokens go through the mixers'
own forward, and stay theirs but for experts and norms.
"""

import weakref
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ExpertWeights, MambaState, MambaWeights, Routing, context_attention, experts, mamba_block, mamba_extend
from ...runtime.registry import wants_gradients
from .attention import _as_pages
from .changes import Changes
from .experts import _DTYPES, activation_of

_PARTS = ("context_tower", "denoiser_tower", "_denoiser_block_attention", "_denoiser_block_mamba")
_JOINED = "_tt_kernels_joined"
_NO_BACKWARD = "no backward kernel: train on theirs, with {flag}=False, or run under torch.no_grad()"


def is_two_tower(model: Any) -> bool:
    """Whether it has the parts of the published remote code."""
    return all(hasattr(model, name) for name in _PARTS)


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"tt_kernels: two towers: {reason}")


def _mixers(model: Any, kind: str) -> list[Any]:
    blocks = [*model.context_tower.layers, *model.denoiser_tower.layers]
    return [block.mixer for block in blocks if block.block_type == kind]


def _sharded(model: Any) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


# ---- experts ----


class _Rows(torch.autograd.Function):
    """Tensors that lie one after the other as one tensor, without a copy in either pass."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *rows: Tensor) -> Tensor:
        return joined.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.unbind(0)


class _Joined:
    """The weights of all experts of a layer in one tensor, of which each expert's parameter is a row.

    The parameters stay the same objects with the same numbers, and lie one after the other: joined at the first call,
    and again when something has moved them (`to`, `half`, a checkpoint that is assigned).
    """

    def __init__(self, model: Any) -> None:
        self.model, self.held = weakref.ref(model), dict[str, Tensor]()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Joined":
        return _Joined(memo.get(id(model := self.model()), model))  # of a copy, whose parameters lie elsewhere

    def __call__(self, name: str, modules: Sequence[Any]) -> Tensor:
        """`name`, up_proj or down_proj, of all experts: [E, ...]."""
        rows = [getattr(module, name).weight for module in modules]
        held, first = self.held.get(name), rows[0]
        if held is None or held.dtype != first.dtype or held.device != first.device or not _lie_in(held, rows):
            if _sharded(self.model()):
                _refuse("experts of a model that was sharded after apply(): undo it before fully_shard, and leave them")
            held = self.held[name] = torch.stack([row.detach() for row in rows])
            for row, data in zip(rows, held, strict=True):
                row.data = data
        return _Rows.apply(held, *rows) if wants_gradients(*rows) else held


def _lie_in(held: Tensor, rows: Sequence[Tensor]) -> bool:
    start, step = held.data_ptr(), held.stride(0) * held.element_size()
    return all(row.data_ptr() == start + i * step for i, row in enumerate(rows))


def _unserved_experts(moe: Any) -> str | None:
    name = type(moe).__name__
    if not (hasattr(moe, "moe") and isinstance(getattr(moe, "experts", None), nn.ModuleList)):
        return f"{name} has no list of experts and no method `moe` that runs them"
    first = moe.experts[0]
    for expert in moe.experts:
        parts = dict(expert.named_children())
        linear = [part for part in parts.values() if isinstance(part, nn.Linear)]
        if type(expert) is not type(first) or len(linear) != 2 or not {"up_proj", "down_proj"} <= parts.keys():
            return f"{name}.experts are not all of up_proj and down_proj, linear, and an activation"
        if any(part.bias is not None for part in linear):
            return f"{name}.experts have biases, served are none"
        if any(type(part.weight) is not nn.Parameter or part.weight.dtype not in _DTYPES for part in linear):
            return (
                f"{name}.experts hold {type(linear[0].weight).__name__} of {linear[0].weight.dtype}, served are floats"
            )
        if expert.up_proj.weight.shape != first.up_proj.weight.shape:
            return f"{name}.experts are of different sizes"
    return None if activation_of(first) else f"{name}.experts' act_fn is {first.act_fn}, served are SiLU and relu2"


def _moe(self: Any, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
    """hidden_states [T, D], topk_indices and topk_weights [T, K] -> [T, D]."""
    joined, modules = vars(self)[_JOINED], list(self.experts)
    weights = ExpertWeights(joined("up_proj", modules), joined("down_proj", modules))
    activation = activation_of(modules[0])
    assert activation is not None  # else unserved
    return experts(hidden_states, Routing(topk_indices, topk_weights), weights, activation=activation)


# ---- attention and Mamba-2 over a block ----


def _block_attention(self: Any, mixer: Any, hidden: Tensor, ctx_k: Tensor, ctx_v: Tensor) -> Tensor:
    """hidden [B, L, D], ctx_k and ctx_v [B, Hkv, S, P] -> [B, L, D]: a block to its context and itself, both ways."""
    B, L, _ = hidden.shape
    heads = (mixer.num_heads, mixer.num_key_value_heads, mixer.num_key_value_heads)
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = (p(hidden).view(B, L, n, mixer.head_dim) for p, n in zip(projections, heads, strict=True))
    if q.is_cuda and wants_gradients(q, k, v, ctx_k, ctx_v):
        _refuse(_NO_BACKWARD.format(flag="attention"))
    keys, values = (t.to(device=k.device, dtype=k.dtype).transpose(1, 2) for t in (ctx_k, ctx_v))
    lengths = torch.full((B,), keys.shape[1], dtype=torch.int32, device=q.device)
    pages, table = _as_pages(keys, values, torch.zeros_like(lengths))
    return mixer.o_proj(context_attention(q, k, v, *pages, table, lengths).reshape(B, L, -1))


def _block_mamba(
    self: Any,
    mixer: Any,
    hidden: Tensor,
    init_conv: Tensor | None,
    init_ssm: Tensor | None,
    return_states: bool = False,
) -> Any:
    """hidden [B, L, D], init_conv [B, C, K - 1], init_ssm [B, H, P, N] -> [B, L, D], with return_states also the states
    behind the block, [B, C, K] and [B, H, P, N] in fp32 or wider."""
    proj = mixer.in_proj(hidden)
    z, xBC, dt = proj.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
    if wants_gradients(xBC) and (return_states or xBC.is_cuda):
        _refuse(_NO_BACKWARD.format(flag="mamba"))
    B, _, C = xBC.shape
    wide = torch.promote_types(xBC.dtype, torch.float32)
    A = -mixer.A_log.to(torch.promote_types(mixer.A_log.dtype, torch.float32)).exp()
    weights = MambaWeights(mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, A, mixer.D, mixer.dt_bias)
    # New memory: a state that moves on is not the caller's.
    conv = xBC.new_zeros(B, C, mixer.conv_kernel_size) if init_conv is None else F.pad(init_conv, (1, 0))
    sizes = (B, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    ssm = xBC.new_zeros(sizes, dtype=wide) if init_ssm is None else init_ssm.to(wide, copy=return_states)
    if return_states:
        y = mamba_extend(xBC, dt, weights, MambaState(conv, ssm))
    else:
        y = mamba_block(xBC, dt, weights, MambaState(conv, ssm))
    out = mixer.out_proj(mixer.norm(y.flatten(2), z))
    return (out, conv, ssm) if return_states else out


def _unserved_mamba(mixer: Any) -> str | None:
    activation = getattr(mixer, "activation", None)
    return None if activation in ("silu", "swish") else f"its activation is {activation!r}, served is SiLU"


_LEFT = {
    "routers, shared experts": "theirs, as in every mixture",
    "prefill and single tokens of Mamba-2 and attention": "they go through the mixers' own forward",
}


def parts(
    model: Any, *, experts: bool, attention: bool, mamba: bool
) -> Iterator[tuple[str, Sequence[Any], str | None]]:
    """What is asked for and there: its name, the modules, and why it is not served."""
    found: list[tuple[bool, str, str, Any]] = [
        (experts, "experts", "moe", _unserved_experts),
        (attention, "attention", "attention", lambda mixer: None),
        (mamba, "mamba", "mamba", _unserved_mamba),
    ]
    for asked, name, kind, unserved in found:
        if asked and (modules := _mixers(model, kind)):
            yield name, modules, next(filter(None, map(unserved, modules)), None)


def apply_two_tower(changes: Changes, model: Any, *, experts: bool, attention: bool, mamba: bool) -> None:
    """Experts of both towers; attention and Mamba-2 of blocks, the denoiser's and those that the context commits."""
    for name, modules, reason in parts(model, experts=experts, attention=attention, mamba=mamba):
        if name == "experts" and reason is None and _sharded(model):
            reason = "the model is sharded: its parameters cannot be laid one after the other"
        if reason is not None:
            changes.left[name] = reason
            continue
        if name == "experts":
            for module in modules:
                changes.swap(module, _JOINED, _Joined(model))
                changes.swap(module, "moe", MethodType(_moe, module))
        elif name == "attention":
            changes.swap(model, "_denoiser_block_attention", MethodType(_block_attention, model))
        else:
            changes.swap(model, "_denoiser_block_mamba", MethodType(_block_mamba, model))
        changes.replaced.append(f"{name}: {len(modules)} {type(modules[0]).__name__}")
    changes.left |= _LEFT
