"""Blocks of transformers whose router is a linear and a softmax: router and experts as `route` and `experts`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ... import route
from .experts import routed
from .experts import unserved as unserved_experts

# Of each class of blocks its router's name and class. A router that does not say norm_topk_prob always divides by the
# sum; Granite's softmax over the chosen logits is the same.
BLOCKS = {
    "MixtralSparseMoeBlock": ("gate", "MixtralTopKRouter"),
    "Qwen3MoeSparseMoeBlock": ("gate", "Qwen3MoeTopKRouter"),
    "OlmoeSparseMoeBlock": ("gate", "OlmoeTopKRouter"),
    "GraniteMoeHybridMoE": ("router", "GraniteMoeHybridTopKRouter"),
}
_CAPTURING = "transformers.utils.output_capturing"


def unserved(block: Any) -> str | None:
    """Why a block of BLOCKS is not served now, or None."""
    name, cls = BLOCKS[type(block).__name__]
    router, experts = getattr(block, name), block.experts
    if type(router).__name__ != cls:
        return f"{name} is a {type(router).__name__}, served is {cls}"
    for module in (router, experts):
        if "forward" in vars(module) or module._forward_pre_hooks:
            return f"the forward of its {type(module).__name__} is another's already (a hook, or other kernels)"
        if any(type(p) is not nn.Parameter for p in module.parameters(recurse=False)):
            return f"the weights of its {type(module).__name__} are spread over devices"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over devices"
    if block.training and getattr(block, "jitter_noise", 0):
        return f"jitter_noise is {block.jitter_noise}, served is 0"
    return unserved_experts(experts)


def _is_heard(module: nn.Module) -> bool:
    """Whether anyone is given what a module returns: by a hook; by transformers' own while router logits are wanted."""
    hooks = module._forward_hooks.values()
    if not hooks:
        return False
    if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return True
    from transformers.utils import output_capturing

    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return True
    return "router_logits" in (collector.get() or ())


def block_forward(theirs: Callable[..., Any], implementation: str | None = None) -> Callable[..., Any]:
    """The forward of a block: `theirs` where a call is not served or the router's own output is asked for, and where
    the block's experts implementation is by now another than the one that is named here."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        router = getattr(self, BLOCKS[type(self).__name__][0])
        chosen = implementation is None or self.experts.config._experts_implementation == implementation
        heard = _is_heard(router) or self.experts._forward_hooks
        if kwargs or len(args) != 1 or not chosen or heard or unserved(self):
            return theirs(self, *args, **kwargs)
        hidden_states: Tensor = args[0]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        norm = bool(getattr(router, "norm_topk_prob", True))
        routing = route(x, router.weight, top_k=router.top_k, scores="softmax", norm_topk_prob=norm)
        return routed(self.experts, x, routing).reshape(hidden_states.shape)

    return forward
