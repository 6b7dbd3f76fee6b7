"""Blocks of transformers whose router is a linear and a softmax: router and experts as `route` and `experts`, with the
shared expert where the block has one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ... import ExpertWeights, route
from .experts import activation_of, routed
from .experts import unserved as unserved_experts

# Of each class of blocks its router's name and class. A router that does not say norm_topk_prob always divides by the
# sum; Granite's softmax over the chosen logits is the same.
BLOCKS = {
    "MixtralSparseMoeBlock": ("gate", "MixtralTopKRouter"),
    "Qwen2MoeSparseMoeBlock": ("gate", "Qwen2MoeTopKRouter"),
    "Qwen3MoeSparseMoeBlock": ("gate", "Qwen3MoeTopKRouter"),
    "OlmoeSparseMoeBlock": ("gate", "OlmoeTopKRouter"),
    "GraniteMoeHybridMoE": ("router", "GraniteMoeHybridTopKRouter"),
}
# Those with an expert for every token, weighted by the sigmoid of a linear: the names and the class of the expert, and
# the name of the linear.
SHARED = {"Qwen2MoeSparseMoeBlock": ("shared_expert", "Qwen2MoeMLP", "shared_expert_gate")}
_CAPTURING = "transformers.utils.output_capturing"


def _is_another(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class's forward; hooks behind it are asked for apart."""
    hooks = module._forward_pre_hooks or module._backward_pre_hooks or module._backward_hooks
    return "forward" in vars(module) or bool(hooks)


def unserved(block: Any) -> str | None:
    """Why a block of BLOCKS is not served now, or None."""
    name, cls = BLOCKS[type(block).__name__]
    router, experts = getattr(block, name), block.experts
    if type(router).__name__ != cls:
        return f"{name} is a {type(router).__name__}, served is {cls}"
    for module in (router, experts):
        if _is_another(module):
            return f"the forward of its {type(module).__name__} is another's already (a hook, or other kernels)"
        if any(type(p) is not nn.Parameter for p in module.parameters(recurse=False)):
            return f"the weights of its {type(module).__name__} are spread over devices"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over devices"
    if block.training and getattr(block, "jitter_noise", 0):
        return f"jitter_noise is {block.jitter_noise}, served is 0"
    return unserved_experts(experts) or _unserved_shared(block)


def _unserved_shared(block: Any) -> str | None:
    """Why the shared expert of a block is not served, or None, also where it has none. Its weights are read without
    calling its modules, so nobody may be listening to them."""
    if type(block).__name__ not in SHARED:
        return None
    name, cls, _ = SHARED[type(block).__name__]
    shared = getattr(block, name)
    if type(shared).__name__ != cls:
        return f"{name} is a {type(shared).__name__}, served is {cls}"
    for module in shared.modules():
        if _is_another(module) or module._forward_hooks:
            return f"the forward of {name} is another's already, or listened to (a hook, or other kernels)"
    for part in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(shared, part)
        if type(linear) is not nn.Linear or linear.bias is not None:
            return f"{name}.{part} is {linear}, served is a Linear without bias"
        if type(linear.weight) is not nn.Parameter:
            return f"the weights of {name} are spread over devices"
        if linear.weight.dtype != block.experts.down_proj.dtype:
            return f"{name}.{part} is {linear.weight.dtype}, served is {block.experts.down_proj.dtype}, as the experts"
    if activation_of(shared) != activation_of(block.experts):
        return f"{name}.act_fn is {shared.act_fn}, served is the experts', {block.experts.act_fn}"
    return None


def _shared(block: Any, x: Tensor) -> dict[str, Any]:
    """What `experts` is given of a block's shared expert."""
    if type(block).__name__ not in SHARED:
        return {}
    name, _, gate = SHARED[type(block).__name__]
    shared = getattr(block, name)
    weights = ExpertWeights(shared.up_proj.weight, shared.down_proj.weight, shared.gate_proj.weight)
    return dict(shared=weights, shared_weight=getattr(block, gate)(x).sigmoid().squeeze(-1))


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
        return routed(self.experts, x, routing, **_shared(self, x)).reshape(hidden_states.shape)

    return forward
