"""The three ways in: by name, in a model that is there, in all models of a type."""

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from .attention import attention_forward, mask
from .blocks import BLOCKS, block_forward
from .blocks import unserved as unserved_block
from .changes import Changes
from .experts import experts_forward
from .experts import unserved as unserved_experts
from .loss import apply_loss
from .mamba import FUNCTIONS, unless_training_on_gpu
from .norms import FORWARD
from .norms import unserved as unserved_norm
from .two_tower import apply_two_tower, is_two_tower

NAME = "tt_kernels"
# The model types whose norms and mixers were held against ours. By name, experts and attention serve others too.
TYPES = (
    *("nemotron_h", "bamba", "mamba2", "zamba2", "falcon_h1", "granitemoehybrid"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
)
_FOLDER = "transformers.models"
_HEARD = "theirs where router logits are asked for, or a hook listens to a router"
_NO_BACKWARD = "no backward kernel: theirs run where gradients are wanted on a GPU"


def register() -> None:
    """Make "tt_kernels" a name that attn_implementation and experts_implementation take.

    Attention has its mask function with it. What a model asks for and is not served raises NotImplementedError at its
    first call, with the reason.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    ExpertsInterface.register(NAME, experts_forward)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)


def apply(
    model: Any,
    *,
    experts: bool = True,
    router: bool = True,
    attention: bool = True,
    mamba: bool = True,
    norm: bool = True,
    loss: bool = True,
) -> Changes:
    """Let a model of transformers run ours wherever it is served; its weights stay where they are.

    Args:
        model:     any PreTrainedModel. Mixers and norms are replaced in models of TYPES and in the published TwoTower's
                   remote code.
        experts:   the routed experts. Shared experts stay theirs, but for qwen2_moe's, which go with the router.
        router:    with the experts, routers that are a linear and a softmax (mixtral, qwen2_moe, qwen3_moe, olmoe,
                   granitemoehybrid): they choose by exact logits, which theirs round to the model's dtype.
        attention: needs a mask of ours, and sets both.
        mamba:     convolution and scan of Mamba-2 mixers, in all models of the type: theirs are functions of a module.
        norm:      RMS norms, plain and gated.
        loss:      head and loss in one where the model is given labels in training: logits are None then, unless it is
                   called with skip_logits=False.
    Returns:
        What it replaced, what it left and why, and `undo()`. A second call undoes the first.
    """
    revert(model)
    register()
    changes = Changes()
    two_towers = is_two_tower(model)
    if two_towers:
        apply_two_tower(changes, model, experts=experts, attention=attention, mamba=mamba)
    if experts and not two_towers:
        _experts(changes, model, router)
    if attention and not two_towers:
        _attention(changes, model)
    if mamba and not two_towers:
        for module in sorted({type(m).__module__ for m in model.modules()}):
            _mamba(changes, sys.modules[module])
    if norm:
        _norms(changes, model, anywhere=two_towers)
    if loss and not two_towers:
        apply_loss(changes, model)
    model._tt_kernels_changes = changes
    return changes


def revert(model: Any) -> None:
    """Undo `apply`, if it was."""
    changes = vars(model).pop("_tt_kernels_changes", None)
    if changes is not None:
        changes.undo()


def apply_to(model_type: str) -> Callable[..., Changes]:
    """The function apply_tt_kernels_to_<model_type>."""

    def function(
        model: Any = None,
        *,
        experts: bool = True,
        router: bool = True,
        attention: bool = True,
        mamba: bool = True,
        norm: bool = True,
        loss: bool = True,
    ) -> Changes:
        """`apply` to a model of this type; without one, to the classes of the type: all its models, made or to come.
        Then attention is left, as a model's config chooses it, and so is the loss."""
        if model is not None:
            found = model.config.model_type
            if found != model_type:
                raise ValueError(f"{function.__name__}: model is of type {found!r}, expected {model_type!r}")
            parts = dict(experts=experts, router=router, attention=attention, mamba=mamba, norm=norm, loss=loss)
            return apply(model, **parts)
        register()
        changes = Changes()
        module = importlib.import_module(f"{_FOLDER}.{model_type}.modeling_{model_type}")
        classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        for cls in classes:
            if experts and hasattr(cls, "_apply_gate"):
                changes.share(cls, "forward", partial(_where_served, experts_forward, unserved_experts))
                changes.replaced.append(f"experts: {cls.__name__}")
            if experts and router and _has_router(cls):
                changes.share(cls, "forward", block_forward)
                changes.replaced.append(f"router: {cls.__name__}")
                changes.left["routers"] = _HEARD
            if norm and (ours := _norm_forward(cls)):
                changes.share(cls, "forward", partial(_where_served, ours, unserved_norm))
                changes.replaced.append(f"norm: {cls.__name__}")
        if attention:
            changes.left["attention"] = f'a config chooses it: load with attn_implementation="{NAME}"'
        if loss:
            changes.left["loss"] = "it is a model's own: call apply(model)"
        if mamba:
            _mamba(changes, module)
        return changes

    function.__name__ = function.__qualname__ = f"apply_tt_kernels_to_{model_type}"
    return function


def _experts(changes: Changes, model: Any, router: bool) -> None:
    found = [m for m in model.modules() if hasattr(m, "_apply_gate")]  # what use_experts_implementation decorates
    if not found:
        return
    reason = next(filter(None, map(unserved_experts, found)), None)
    if reason:
        changes.left["experts"] = reason
        return
    before = model.config._experts_implementation
    model.set_experts_implementation(NAME)
    changes.call_back(model.set_experts_implementation, before)
    changes.replaced.append(f"experts: {len(found)} {type(found[0]).__name__}")
    if not (router and _routers(changes, model)):
        changes.left["routers, shared experts"] = "they lie outside of what an experts implementation is given"


def _has_router(cls: type) -> bool:
    return cls.__name__ in BLOCKS and cls.__module__ in _modules_of_types()


def _routers(changes: Changes, model: Any) -> bool:
    """Replace what blocks of BLOCKS do; whether there were any."""
    found = [m for m in model.modules() if _has_router(type(m))]
    if not found:
        return False
    name = type(found[0]).__name__
    taken = next((m for m in found if "forward" in vars(m)), None)
    reason = "its forward is another's already (a hook, or other kernels)" if taken is not None else None
    reason = reason or next(filter(None, map(unserved_block, found)), None)
    if reason:
        changes.left[f"router: {name}"] = reason
        return True
    for module in found:
        changes.swap(module, "forward", MethodType(block_forward(type(module).forward, NAME), module))
    changes.replaced.append(f"router: {len(found)} {name}")
    changes.left["routers"] = _HEARD
    return True


def _attention(changes: Changes, model: Any) -> None:
    every = [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "is_causal")]
    found = [m for m in every if hasattr(m, "num_key_value_groups")]
    if not found:
        by_name = f'not a kind that was held against ours; by name it may run: attn_implementation="{NAME}"'
        changes.left |= {f"attention: {type(m).__name__}": by_name for m in every}
        return
    reason = next(filter(None, map(_unserved_attention, found)), None)
    if reason is None and model.training and any(p.is_cuda for p in model.parameters()):
        reason = "no backward kernel, and the model is on a GPU in training mode"
    if reason is None:
        before = _attention_of(model.config)
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            reason = f"{type(model).__name__} lets nobody choose its attention"
    if reason:
        changes.left["attention"] = reason
        return
    changes.call_back(model.set_attn_implementation, before)
    chosen = [m for m in every if getattr(m, "config", model.config)._attn_implementation == NAME]
    for name, count in Counter(type(m).__name__ for m in chosen).items():
        changes.replaced.append(f"attention: {count} {name}, and its mask")


def _attention_of(config: Any) -> str | dict[str, str]:
    """What a config says of attention, of all its parts, as `set_attn_implementation` takes it."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    said = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation} | said if said else config._attn_implementation


def _unserved_attention(module: Any) -> str | None:
    if getattr(module, "sinks", None) is not None:
        return "its layers have sinks, which no kernel of ours has"
    dropout = getattr(module, "attention_dropout", 0.0)
    return f"attention_dropout is {dropout}, served is 0" if dropout else None


def _mamba(changes: Changes, module: ModuleType) -> None:
    if not module.__name__.startswith(_FOLDER) or not hasattr(module, "mamba2_chunk_scan"):
        if module.__name__.startswith(_FOLDER) and hasattr(module, "mamba_selective_scan"):
            changes.left["mamba"] = "it is Mamba-1, served is Mamba-2"
        return
    short = module.__name__.rpartition(".")[2]
    for name, ours in FUNCTIONS.items():
        if hasattr(module, name):
            changes.share(module, name, partial(unless_training_on_gpu, ours))
            changes.replaced.append(f"mamba: {short}.{name}")
    changes.left["convolution and scan in training on a GPU"] = _NO_BACKWARD


def _modules_of_types() -> set[str]:
    return {f"{_FOLDER}.{t}.modeling_{t}" for t in TYPES}


def _norm_forward(cls: type, anywhere: bool = False) -> Callable | None:
    """Ours for a class of norms of TYPES, or of that name in any module."""
    if not anywhere and cls.__module__ not in _modules_of_types():
        return None
    return next((forward for end, forward in FORWARD.items() if cls.__name__.endswith(end)), None)


def _norms(changes: Changes, model: Any, *, anywhere: bool) -> None:
    replaced: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        if not isinstance(module, nn.Module) or "RMSNorm" not in name:
            continue
        ours = _norm_forward(type(module), anywhere)
        reason = unserved_norm(module)
        if ours is None:
            reason = f"it is of none of the types {', '.join(TYPES)}"
        elif "forward" in vars(module):
            reason = "its forward is another's already (a hook, or other kernels)"
        if reason or ours is None:
            changes.left[f"norm: {name}"] = str(reason)
            continue
        changes.swap(module, "forward", MethodType(ours, module))
        replaced[name] += 1
    changes.replaced += [f"norm: {count} {name}" for name, count in replaced.items()]


def _where_served(ours: Callable, unserved: Callable, theirs: Callable) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (theirs if unserved(self) else ours)(self, *args, **kwargs)

    return forward
