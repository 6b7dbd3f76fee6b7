"""The loss of masked tokens, head included."""

from torch import Tensor

from .. import reference
from ..runtime.checks import check


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean negative log-likelihood of targets under softmax(hidden weight^T), over the tokens where mask is set.

    For training: the caller passes hidden states and the head, and never holds logits.

    Args:
        hidden:  [*, D] float.
        weight:  [V, D] float: the head.
        targets: [*] int: token ids from 0 to V-1. Others are refused on a CPU, and stop a GPU or a graph with an error
                 of PyTorch's; none is ignored.
        mask:    [*] bool, or None for all tokens. Elsewhere hidden and targets are not read.
    Returns:
        loss: a scalar, fp32 (fp64 where hidden or weight is fp64); 0 without any token.

    Numerics: logits, softmax and sum in the dtype of the loss. Deterministic on a CPU.
    Gradients: for hidden and weight.
    Raises: ValueError for sizes that disagree and targets that are no ids.
    Cost: for M masked tokens 2 M V D flops and V D itemsize bytes. The reference runs on every device and holds the
    M V logits in memory, in a graph of torch.compile those of all tokens.
    Source: TwoTower (2606.26493); without logits in memory: Wijmans et al. (2411.09009).

    Example:
        >>> hidden, targets = torch.randn(2, 64, 256), torch.randint(1000, (2, 64))
        >>> loss = linear_cross_entropy(hidden, torch.randn(1000, 256), targets, mask=targets > 10)
    """
    check(
        "linear_cross_entropy",
        3,
        hidden=(hidden, "* D"),
        weight=(weight, "V D"),
        targets=(targets, "*", int),
        mask=(mask, "*", bool),
    )
    return reference.linear_cross_entropy(hidden, weight, targets, mask)
