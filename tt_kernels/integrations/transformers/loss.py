"""Head and loss of transformers' causal models in one, in training: `linear_cross_entropy`, which keeps no logits."""

import functools
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import linear_cross_entropy
from .changes import Changes

# Types whose forward is: hidden states through lm_head, and loss_function of that. Others do more with the logits.
SERVED = ("nemotron_h", "bamba", "mamba2", "zamba2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_IGNORED = -100


def unserved(model: Any) -> str | None:
    """Why a model with an lm_head is not served, or None."""
    head, kind = model.lm_head, model.config.model_type
    if kind not in SERVED:
        return f"models of type {kind} scale their logits or do more with them; served are {', '.join(SERVED)}"
    if type(head) is not nn.Linear or head.bias is not None:
        return f"its lm_head is a {type(head).__name__}{' with a bias' * (getattr(head, 'bias', None) is not None)}"
    if getattr(model, "z_loss_coefficient", 0):
        return f"z_loss_coefficient is {model.z_loss_coefficient}, which asks for logits"
    if hasattr(model, "_loss_function") or getattr(model, "loss_type", None) != "ForCausalLM":
        return "its loss_function is another's"
    if "forward" in vars(model) or "forward" in vars(head):
        return "its forward is another's already (a hook, or other kernels)"
    return None


class _Fused:
    """One model's three places: its forward notes the labels, its head makes the loss of them, its loss hands it on."""

    def __init__(self, model: Any) -> None:
        self.forward, self.head, self.loss = model.forward, model.lm_head.forward, model.loss_function
        self.targets: Tensor | None = None

    def _asked(self, model: Any, labels: Tensor | None, skip_logits: bool | None, given: dict[str, Any]) -> bool:
        if labels is None or not (model.training if skip_logits is None else skip_logits):
            return False
        options = (given.get(name) for name in ("shift_labels", "logits_to_keep", "ignore_index"))
        return all(option is None or (isinstance(option, int) and option == 0) for option in options)

    def in_forward(self, model: Any, *args: Any, skip_logits: bool | None = None, **given: Any) -> Any:
        """skip_logits: None: in training; False: logits too; True: in evaluation as well."""
        labels, tuples = given.get("labels"), given.get("return_dict", model.config.return_dict) is False
        if tuples or not self._asked(model, labels, skip_logits, given):
            return self.forward(*args, **given)
        assert labels is not None  # else not asked
        self.targets = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
        try:
            out = self.forward(*args, **given)
        finally:
            self.targets = None
        return type(out)(**{name: value for name, value in out.items() if name != "logits"})

    def in_head(self, head: Any, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, N, D] -> logits, or the mean loss in their place, which FSDP then takes for its output."""
        if self.targets is None:
            return self.head(hidden_states)
        targets = self.targets.to(hidden_states.device)
        return linear_cross_entropy(hidden_states, head.weight, targets, targets != _IGNORED)

    def in_loss(self, logits: Tensor, labels: Tensor, *args: Any, **given: Any) -> Tensor:
        if self.targets is None:
            return self.loss(logits, labels, *args, **given)
        items = given.get("num_items_in_batch")
        if items is None:
            return logits
        count = (self.targets != _IGNORED).sum().to(logits.device)
        return logits * count / (items.to(logits.device) if isinstance(items, Tensor) else items)


def apply_loss(changes: Changes, model: Any) -> None:
    """Let a causal model with labels make its loss without logits, while it trains."""
    if not hasattr(model, "lm_head"):
        return
    if (reason := unserved(model)) is not None:
        changes.left["loss"] = reason
        return
    fused, head = _Fused(model), model.lm_head
    forward = functools.wraps(type(model).forward)(lambda self, *args, **given: fused.in_forward(self, *args, **given))
    changes.swap(model, "forward", MethodType(forward, model))
    changes.swap(head, "forward", MethodType(lambda self, hidden_states: fused.in_head(self, hidden_states), head))
    changes.swap(model, "_loss_function", fused.in_loss)
    changes.replaced.append(f"loss: {type(model).__name__}.lm_head, with labels in training")
