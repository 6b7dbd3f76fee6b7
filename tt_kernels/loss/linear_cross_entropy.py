"""The loss of masked tokens, head included."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.common import can_look, compute_dtype, full_precision
from ..reference.loss import check_targets
from ..runtime.checks import check
from ..runtime.registry import as_on_a_gpu, define

# Logits that lie in memory at a time. Forward 34 MB in fp32, which stay in the cache while they are summed; backward
# 268 MB, for with every part the gradient of hidden states is read and written.
LOGITS, MORE_LOGITS = 2**23, 2**26
NARROWEST = 2048  # tokens of the vocabulary at a time, however many rows there are: products stay on tensor cores
SCALE = 2.0**15  # of probabilities in fp16, whose least number above 0 is then one of 2e-12


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of 16-bit numbers in fp32: PyTorch sums such products in fp32 and can leave them so, on a GPU."""
    if a.is_cuda and a.dtype == b.dtype and a.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    acc = compute_dtype(a.dtype, b.dtype)
    return a.to(acc) @ b.to(acc)


def _in_parts(probabilities: Tensor, like: Tensor) -> list[Tensor]:
    """Parts in the dtype of `like` whose sum the probabilities are: two of 16 bits are off by 2^-17 at most."""
    if like.itemsize > 2:
        return [probabilities]
    first = probabilities.to(like.dtype)
    return [first, probabilities.sub_(first).to(like.dtype)]


class _Rows(NamedTuple):
    """All tokens, of which those that are not masked do not count."""

    hidden: Tensor  # [T, D]: 0 where not masked, for NaN times a weight of 0 is NaN
    weight: Tensor
    targets: Tensor  # [T] int64: 0 where not masked
    mask: Tensor  # [T]

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> "_Rows":
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.reshape(-1)
        if hidden.dtype != weight.dtype:
            acc = compute_dtype(hidden.dtype, weight.dtype)
            hidden, weight = hidden.to(acc), weight.to(acc)
        return cls(torch.where(mask.unsqueeze(-1), hidden, 0), weight, torch.where(mask, targets, 0), mask)

    def parts(self, logits: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of the vocabulary: where it is, its logits [T, n], each row's target there [T, 1], and whether it is."""
        V, T = len(self.weight), max(len(self.targets), 1)
        width = max(NARROWEST, logits // T // 128 * 128)
        for start in range(0, V, width):
            part = slice(start, min(start + width, V))
            local = self.targets - start
            here = (local >= 0) & (local < part.stop - start) & self.mask
            local = torch.where(here, local, 0)
            yield part, _product(self.hidden, self.weight[part].T), local.unsqueeze(-1), here

    def masked(self) -> Tensor:
        """How many count."""
        return self.mask.sum().clamp(min=1)


@full_precision
def _linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss, and the logarithm of every row's sum of exponentials."""
    rows = _Rows.of(hidden, weight, targets, mask)
    torch.zeros_like(weight[:, 0]).gather(0, rows.targets)  # stops where one is no token
    loss, lse = _linear_cross_entropy_fwd_fake(hidden, weight, targets)
    lse, logit = lse.fill_(-torch.inf), torch.zeros_like(lse)
    for _, logits, local, here in rows.parts(LOGITS):
        logit = torch.where(here, logits.gather(1, local).squeeze(-1), logit)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
    return loss.copy_(torch.where(rows.mask, lse - logit, 0).sum() / rows.masked()), lse


def _linear_cross_entropy_fwd_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden.dtype, weight.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(targets.numel(), dtype=dtype)


@full_precision
def _linear_cross_entropy_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Part by part of the vocabulary: the head's gradient of one is whole at once, that of hidden states grows."""
    rows = _Rows.of(hidden, weight, targets, mask)
    lse = lse.unsqueeze(-1)
    scale = SCALE if weight.dtype == torch.float16 else 1.0
    share = grad / rows.masked() / scale
    dhidden, dweight = torch.zeros_like(rows.hidden, dtype=lse.dtype), torch.empty_like(weight)
    for part, logits, local, here in rows.parts(MORE_LOGITS):
        p = logits.sub_(lse).exp_()
        p.scatter_(1, local, p.gather(1, local) - here.unsqueeze(-1).to(p.dtype))
        if scale != 1:
            p.mul_(scale)
        found = torch.zeros_like(rows.weight[part], dtype=p.dtype)
        for factor in _in_parts(p, rows.weight):
            dhidden += _product(factor, rows.weight[part])
            found += _product(factor.T, rows.hidden)
        dweight[part] = found * share
    dhidden = torch.where(rows.mask.unsqueeze(-1), dhidden.mul_(share), 0)
    return dhidden.to(hidden.dtype).view(hidden.shape), dweight


def _linear_cross_entropy_bwd_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), torch.empty_like(weight)


_fwd = define(_linear_cross_entropy_fwd, _linear_cross_entropy_fwd_fake)

_bwd = define(_linear_cross_entropy_bwd, _linear_cross_entropy_bwd_fake)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, mask):
        loss, lse = _fwd(hidden, weight, targets, mask)
        ctx.save_for_backward(hidden, weight, targets, mask, lse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *_bwd(grad, *ctx.saved_tensors), None, None


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

    Numerics: logits, softmax and sum in the dtype of the loss; on a GPU 16-bit products are tensor cores', summed in
    fp32, and their gradients take softmax as the sum of two 16-bit numbers. Deterministic on a CPU.
    Gradients: for hidden and weight.
    Raises: ValueError for sizes that disagree and targets that are no ids.
    Cost: on a CPU, for M masked tokens, 2 M V D flops and V D itemsize bytes, and 4 M V D flops for gradients; M V
    logits lie in memory, in a graph of torch.compile those of all tokens. On a GPU, which is not asked how many are
    masked, all T tokens are computed: 2 T V D flops, for gradients 10 T V D in 16 bits and 6 T V D else, by parts of
    the vocabulary. Of each the head is read, without a copy, and its gradient written once, in its dtype. 2^23 logits
    lie in memory at a time, written and read in 7 passes, which a cache of 50 MB holds; for gradients 2^26 (4 bytes
    each) in 13 passes; from 4096 and 32768 tokens on more. Who knows which few are masked selects them before.
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
    if not as_on_a_gpu(hidden):
        return reference.linear_cross_entropy(hidden, weight, targets, mask)
    if can_look(targets):
        check_targets(targets if mask is None else targets[mask], len(weight))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, mask)
    return loss
