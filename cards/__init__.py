"""A card for every op: small cases, published shapes, inputs, costs, tensor-core and tuning facts."""

from . import attention, conv1d, loss, mamba, moe, norm, sampling, ssm
from .op import Op

OPS: dict[str, Op] = {
    op.fn.__name__: op for family in (norm, conv1d, ssm, mamba, moe, attention, sampling, loss) for op in family.OPS
}

__all__ = ["OPS", "Op"]
