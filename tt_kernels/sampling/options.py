"""What the options of the unmasking ops may be."""

from numbers import Integral, Real

import torch
from torch import Tensor

from ..runtime.checks import refuse


def check_whole(op: str, name: str, value: object, least: int, most: int, expected: str) -> None:
    """Refuse what is no whole number of least to most; True is none. As `check`, torch.compile leaves it out."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        refuse(op, name, value, expected)


def check_sampling(
    op: str, vocab_size: int, temperature: Tensor, top_k: int | None, top_p: float | None, **tokens: int | None
) -> None:
    """Refuse options of a sample out of their range, and tokens (of which there is one) that are no id or the only one.

    Temperatures are looked at where that waits for nothing: on a CPU, outside graphs.
    """
    if torch.compiler.is_compiling():
        return
    if top_k is not None:
        check_whole(op, "top_k", top_k, 1, 2**63 - 1, "1 or more, or None")
    if top_p is not None and (not isinstance(top_p, Real) or isinstance(top_p, bool) or not 0 < top_p <= 1):
        refuse(op, "top_p", top_p, "above 0 and up to 1, or None")
    for name, token in tokens.items():
        if token is None and name == "suppress":
            continue
        check_whole(op, name, token, 0, vocab_size - 1, f"a token id below V={vocab_size}")
        if vocab_size == 1:
            refuse(op, name, token, "tokens beside it, but V is 1")
    if temperature.device.type == "cpu" and temperature.numel():
        least = temperature.detach().min().item()  # NaN where there is one
        if not least >= 0:
            refuse(op, "temperature", least, "0 or more")
