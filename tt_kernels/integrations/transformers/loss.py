"""Head and loss of transformers' causal models in one, in training: `linear_cross_entropy`, which keeps no logits.

A model's forward notes the labels, its head makes the loss of them, its loss hands it on. All three look at the model
that they are called of, so that a copy of it is served by itself, and at each call whether they are still the ones.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import linear_cross_entropy
from .changes import Changes

# Types whose forward is: hidden states through lm_head, and loss_function of that. Others do more with the logits.
SERVED = ("nemotron_h", "bamba", "mamba2", "zamba2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_IGNORED = -100
_NOTE = "_tt_kernels_note"


class _Note:
    """What a model and its head know of each other."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss  # theirs
        self.targets: Tensor | None = None  # [B, N] labels of a call that is to have no logits


def unserved(model: Any) -> str | None:
    """Why a model with an lm_head is not served, or None."""
    head, kind = model.lm_head, model.config.model_type
    if kind not in SERVED:
        return f"type {kind} is none of those whose loss is of plain logits, {', '.join(SERVED)}"
    if type(head) is not nn.Linear or head.bias is not None:
        return f"its lm_head is a {type(head).__name__}{' with a bias' * (getattr(head, 'bias', None) is not None)}"
    if getattr(model, "z_loss_coefficient", 0):
        return f"z_loss_coefficient is {model.z_loss_coefficient}, which asks for logits"
    if hasattr(model, "_loss_function") or getattr(model, "loss_type", None) != "ForCausalLM":
        return "its loss_function is another's"
    if "forward" in vars(model) or "forward" in vars(head):
        return "its forward is another's already (a hook, or other kernels)"
    return "a hook listens to its lm_head" if _is_heard(head) else None


def _is_heard(head: nn.Module) -> bool:
    """Whether a hook is given logits, or may change them. FSDP's hooks only gather weights."""
    kinds = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return not all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


def _is_ours(model: Any) -> bool:
    """Whether head and loss are still the ones that `apply_loss` has changed, and nobody listens."""
    head, loss = model.lm_head, vars(model).get("_loss_function")
    same = vars(head).get(_NOTE) is vars(model)[_NOTE] and getattr(loss, "__func__", None) is _in_loss
    ours = getattr(vars(head).get("forward"), "__func__", None) is _in_head
    return same and ours and not _is_heard(head)


def _is_asked(model: Any, labels: Tensor | None, skip_logits: bool | None, given: dict[str, Any]) -> bool:
    if labels is None or not (model.training if skip_logits is None else skip_logits):
        return False
    options = (given.get(name) for name in ("shift_labels", "logits_to_keep", "ignore_index"))
    return all(option is None or (isinstance(option, int) and option == 0) for option in options)


def _in_forward(theirs: Callable[..., Any], model: Any, args: tuple, skip_logits: bool | None, given: dict) -> Any:
    labels, tuples = given.get("labels"), given.get("return_dict", model.config.return_dict) is False
    if tuples or not _is_asked(model, labels, skip_logits, given) or not _is_ours(model):
        return theirs(model, *args, **given)
    assert labels is not None  # else not asked
    note = vars(model)[_NOTE]
    note.targets = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    try:
        out = theirs(model, *args, **given)
    finally:
        note.targets = None
    return type(out)(**{name: value for name, value in out.items() if name != "logits"})


def _in_head(head: Any, hidden_states: Tensor) -> Tensor:
    """hidden_states [B, N, D] -> logits, or the mean loss in their place, which FSDP then takes for its output."""
    targets = vars(head)[_NOTE].targets
    if targets is None:
        return type(head).forward(head, hidden_states)
    targets = targets.to(hidden_states.device)
    return linear_cross_entropy(hidden_states, head.weight, targets, targets != _IGNORED)


def _in_loss(model: Any, logits: Tensor, labels: Tensor, *args: Any, **given: Any) -> Tensor:
    note = vars(model)[_NOTE]
    if note.targets is None:
        return note.loss(logits, labels, *args, **given)
    items = given.get("num_items_in_batch")
    if items is None:
        return logits
    count = (note.targets != _IGNORED).sum().to(logits.device)
    return logits * count / (items.to(logits.device) if isinstance(items, Tensor) else items)


def apply_loss(changes: Changes, model: Any) -> None:
    """Let a causal model with labels make its loss without logits, while it trains. Where head or loss become others
    later, or a hook listens, the model is as it was."""
    if not hasattr(model, "lm_head"):
        return
    if (reason := unserved(model)) is not None:
        changes.left["loss"] = reason
        return
    theirs, head, note = type(model).forward, model.lm_head, _Note(model.loss_function)

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **given: Any) -> Any:
        """skip_logits: None: in training; False: logits too; True: in evaluation as well."""
        return _in_forward(theirs, self, args, skip_logits, given)

    for owner in (model, head):
        changes.swap(owner, _NOTE, note)
    changes.swap(model, "forward", MethodType(forward, model))
    changes.swap(head, "forward", MethodType(_in_head, head))
    changes.swap(model, "_loss_function", MethodType(_in_loss, model))
    changes.replaced.append(f"loss: {type(model).__name__}.lm_head, with labels in training")
