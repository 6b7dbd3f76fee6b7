"""RMS norm: the kernels of the modulated one, without its options."""

from torch import Tensor

from .. import reference
from ..runtime.checks import check, eps_of
from ..runtime.registry import takes_kernel
from .modulated_rms_norm import ModulatedRMSNorm


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x by its root mean square: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x:      [*, D] float, any strides.
        weight: [D] float.
        eps:    added to the mean square.
    Returns:
        y: [*, D] dtype of x.

    Numerics: computes in fp32 (fp64 where an argument is fp64) and rounds once. Deterministic.
    Gradients: for x and weight.
    Raises: ValueError where sizes disagree and for an eps below 0.
    Cost: for T rows 4 T D flops and (2 T D + D) itemsize bytes: bound by memory.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    Example:
        >>> x = torch.randn(4, 2688)
        >>> y = rms_norm(x, torch.ones(2688))
    """
    check("rms_norm", 2, x=(x, "* D"), weight=(weight, "D"))
    eps = eps_of("rms_norm", eps)
    if not takes_kernel("rms_norm", x, weight):
        return reference.rms_norm(x, weight, eps=eps)
    y: Tensor = ModulatedRMSNorm.apply(x, weight, eps, x.dtype)[0]
    return y
