"""The head and the sampling from its logits: of up to 64 rows in one pass, without logits in memory."""

from torch import Tensor

from .. import reference
from ..reference import Sampled, Sampling
from ..runtime.checks import check
from ..runtime.registry import define, takes_kernel
from .head_sample_launch import _head_sample, _head_sample_fake
from .options import check_range, check_token, flat, specs

_op = define(_head_sample, _head_sample_fake, rest=Sampling)


def head_sample(hidden: Tensor, weight: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Sampled:
    """Predict a token from a hidden state: `sample` of hidden weight^T, whose logits stay fp32 in 16-bit models.

    For generation, where nobody needs the logits. With top_k or top_p they are written, some rows at a time.

    Args:
        hidden:   [*, D] float, after the final norm.
        weight:   [V, D] float: the head.
        sampling: `Sampling` of tensors [*], as in `sample`.
        suppress: a token id or None, as in `sample`.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 where hidden or weight is fp64).

    Numerics: products of 16-bit numbers are summed in fp32. Deterministic; kernels sum over the vocabulary in an order
    that does not depend on how many rows there are.
    Gradients: none.
    Raises: ValueError as `sample` does.
    Cost: 2 R V D flops and (V D + R D) itemsize bytes for R rows: bound by reading the head up to some 180 rows. Above
    64 rows also the logits, written and read, 512 rows at a time; with top_k or top_p too, which read them as `sample`.
    Source: as `sample`.

    Example:
        >>> hidden, weight = torch.randn(2, 64), torch.randn(1000, 64)
        >>> token, confidence = head_sample(hidden, weight, Sampling.of(2, temperature=0.7, seed=1), suppress=0)
    """
    check("head_sample", 6, hidden=(hidden, "* D"), weight=(weight, "V D"), **specs("head_sample", sampling, "*"))
    check_range("head_sample", sampling)
    if suppress is not None:
        check_token("head_sample", "suppress", suppress, weight.shape[0])
    if not takes_kernel("head_sample", hidden, weight):
        return reference.head_sample(hidden, weight, sampling, suppress=suppress)
    return Sampled(*_op(hidden.detach(), weight.detach(), suppress, *flat(sampling)))
