"""The head and the sampling from its logits in one pass over the vocabulary: the logits never reach memory."""

from torch import Tensor

from .. import reference
from ..runtime.checks import check
from ..runtime.registry import define, takes_kernel
from .head_sample_launch import _head_sample, _head_sample_fake
from .options import check_sampling

_op = define(
    "head_sample(Tensor hidden, Tensor weight, Tensor temperature, Tensor seed, Tensor position, Tensor step, "
    "int? top_k, float? top_p, int? suppress) -> (Tensor, Tensor)",
    _head_sample,
    _head_sample_fake,
)


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict a token from a hidden state: `sample` of hidden weight^T, whose logits stay fp32 in 16-bit models.

    Args:
        hidden:      [*, D] float, after the final norm.
        weight:      [V, D] float: the head.
        temperature: [*] float, as all that follow: see `sample`.
        seed:        [*] int.
        position:    [*] int.
        step:        [*] int.
        top_k:       int or None.
        top_p:       float or None.
        suppress:    a token id or None.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 where hidden or weight is fp64).

    Products of 16-bit numbers are summed in fp32. No gradients. Deterministic; kernels sum over the vocabulary in an
    order that does not depend on how many rows there are. Raises ValueError as `sample` does.
    Cost for R rows: 2 R V D flops, (V D + R D) itemsize bytes: bound by reading the head. Source: as `sample`.
    """
    check(
        "head_sample",
        6,
        hidden=(hidden, "* D"),
        weight=(weight, "V D"),
        temperature=(temperature, "*"),
        seed=(seed, "*", int),
        position=(position, "*", int),
        step=(step, "*", int),
    )
    check_sampling("head_sample", weight.shape[0], temperature, top_k, top_p, suppress=suppress)
    if not takes_kernel("head_sample", hidden, weight):
        return reference.head_sample(
            hidden,
            weight,
            temperature=temperature,
            seed=seed,
            position=position,
            step=step,
            top_k=top_k,
            top_p=top_p,
            suppress=suppress,
        )
    hidden, weight, temperature = (t.detach() for t in (hidden, weight, temperature))
    return _op(hidden, weight, temperature, seed, position, step, top_k, top_p, suppress)
