"""What the options of the unmasking ops may be, and how `Sampling` enters a registered op."""

from numbers import Integral

import torch
from torch import Tensor

from ..reference import Remasking, Sampling, Strategy
from ..reference.unmasking import CONFIDENCES
from ..runtime.checks import as_float, is_real, looks_at, refuse

KINDS = dict(temperature=float, seed=int, position=int, step=int, top_k=int, top_p=float)  # of `Sampling`'s fields

# Of `Strategy`'s.
RULES = dict(confidence=int, factor=float, entropy_bound=float, number=int, tempered=bool, alg_temp=float)


def flat(sampling: Sampling | Strategy | Remasking) -> list[Tensor | None]:
    """The fields, as registered ops take them: nothing is differentiated through them."""
    return [t.detach() if t is not None and t.requires_grad else t for t in sampling]


def specs(op: str, sampling: Sampling, rows: str) -> dict[str, tuple]:
    """What `check` is to hold the fields to, those that may be None last."""
    if not isinstance(sampling, Sampling):
        refuse(op, "sampling", sampling, "a Sampling")
    return {name: (getattr(sampling, name), rows, kind) for name, kind in KINDS.items()}


def strategy_specs(op: str, strategy: Strategy | None, rows: str) -> dict[str, tuple]:
    """As `specs`, of a strategy."""
    if strategy is None:
        return {}
    if not isinstance(strategy, Strategy):
        refuse(op, "strategy", strategy, "a Strategy or None")
    if isinstance(kinds := strategy.confidence, Tensor) and looks_at(kinds) and kinds.numel():
        least, most = (bound.item() for bound in torch.aminmax(kinds))
        if not 0 <= least <= most < len(CONFIDENCES):
            refuse(op, "confidence", least if least < 0 else most, f"0 to {len(CONFIDENCES) - 1}")
    return {f"strategy.{name}": (getattr(strategy, name), rows, kind) for name, kind in RULES.items()}


def check_whole(op: str, name: str, value: object, least: int, most: int, expected: str) -> None:
    """Refuse what is no whole number of least to most; True is none. As `check`, torch.compile leaves it out."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        refuse(op, name, value, expected)


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        refuse(op, name, value, "True or False")


def cap_of(op: str, softcap: float | None) -> float | None:
    """The cap, as launchers take it. Beyond, fp32 would hold neither it nor what is divided by it."""
    if softcap is None:
        return None
    if not (is_real(softcap) and 1e-30 <= softcap <= 1e30):
        refuse(op, "softcap", softcap, "a finite number above 0, of 1e-30 to 1e30, or None")
    return as_float(softcap)


def check_token(op: str, name: str, token: int | None, vocab_size: int) -> None:
    """Refuse a token to leave out that is no id, or the only one. As `check`, torch.compile leaves it out."""
    if torch.compiler.is_compiling():  # also: the message would make a constant of V
        return
    check_whole(op, name, token, 0, vocab_size - 1, f"a token id below V={vocab_size}")
    if vocab_size == 1:
        refuse(op, name, token, "tokens beside it, but V is 1")


def check_range(op: str, sampling: Sampling) -> None:
    """Refuse numbers out of their range where looking at them waits for nothing. NaN is in none."""
    for name, field, expected in (
        ("temperature", sampling.temperature, "0 or more"),
        ("top_k", sampling.top_k, "0 or more"),
        ("top_p", sampling.top_p, "above 0 and up to 1"),
    ):
        if field is None or not field.numel() or not looks_at(field):
            continue
        least, most = (bound.item() for bound in torch.aminmax(field.detach()))
        if not (least > 0 and most <= 1 if name == "top_p" else least >= 0):
            refuse(op, name, least if not least > 0 else most, expected)
