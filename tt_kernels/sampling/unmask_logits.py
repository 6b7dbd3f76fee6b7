"""One unmasking step of logits that somebody else has made."""

from typing import Any

from torch import Tensor

from .. import reference
from ..reference import Sampling, Strategy, Unmasked
from ..reference.common import compute_dtype
from ..runtime.checks import check
from ..runtime.launch import by_row
from ..runtime.registry import define, takes_kernel
from .finished import finished_records
from .options import cap_of, check_flag, check_range, check_token, flat, specs, strategy_specs
from .records import Rows, new_records
from .sample import sample_parts
from .strategies import look_of, unmasked
from .unmask import masked_rows, new_unmasked


def _unmask_logits(
    logits: Tensor,
    block: Tensor,
    threshold: Tensor | None,
    steps_left: Tensor | None,
    mask_token_id: int,
    bias: Tensor | None,
    softcap: float | None,
    shift: bool,
    confidence: Tensor | None,
    factor: Tensor | None,
    entropy_bound: Tensor | None,
    number: Tensor | None,
    tempered: Tensor | None,
    alg_temp: Tensor | None,
    *settings: Tensor | None,
) -> Unmasked:
    out = _unmask_logits_fake(logits, block)
    if not block.numel():
        out.masked.zero_()
        return out
    block, logits = block.contiguous(), by_row(logits)
    strategy = Strategy(confidence, factor, entropy_bound, number, tempered, alg_temp).contiguous()
    listed, look = masked_rows(block, mask_token_id)[0], look_of(strategy, block)
    rows = Rows.of(settings, block.shape[1], listed, look, by_row=True, shift=shift)
    bias = None if bias is None else bias.contiguous()
    records = new_records(rows, sample_parts(logits), logits, out.confidence.dtype)
    finished_records(logits, rows, records, mask_token_id, bias, softcap)
    return unmasked(records, rows, block, threshold, steps_left, strategy, mask_token_id, out)


def _unmask_logits_fake(logits: Tensor, block: Tensor, *rest: object) -> Unmasked:
    return new_unmasked(block, compute_dtype(logits.dtype))


_op = define(_unmask_logits, _unmask_logits_fake, rest=Sampling)


def unmask_logits(
    logits: Tensor,
    block: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    threshold: Tensor | None = None,
    steps_left: Tensor | None = None,
    strategy: Strategy | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: bool = False,
) -> Unmasked:
    """One unmasking step as `unmask` makes it, of logits in memory.

    For models whose head is not ours: LLaDA, Dream, SDAR and others. Only rows of masked positions are read.

    Args:
        logits:        [B, L, V] float.
        block:         [B, L] int.
        sampling:      `Sampling` of tensors [B], as in `unmask`; so are the next four.
        mask_token_id: the mask, which is never predicted.
        threshold:     [B] float, or None.
        steps_left:    [B] int, or None.
        strategy:      `Strategy` of tensors [B], or None.
        bias:          [V] float that is added to the logits; -inf: such a token is never predicted, as the mask.
        softcap:       logits are cap tanh(logits / cap), from 1e-30 to 1e30; the bias comes before. A logit of -inf is
                       then -cap, unless the bias is -inf.
        shift:         whether logits i are of token i + 1, and the first ones of token 0 too, as Dream's are: they are
                       read from there, not moved.
    Returns:
        block:      [B, L] dtype of block, in new memory.
        committed:  [B, L] bool: what changed now.
        confidence: [B, L] fp32 (fp64 for fp64 logits): probability of the prediction, as `unmask`'s; 0 where nothing
                    was masked. `confidence.log()` is its log-probability.
        masked:     [B] int64: how many are masked still.

    Numerics: as `sample`. Entropies are added as whole numbers of 2^-32. Deterministic.
    Gradients: none.
    Raises: ValueError as `unmask` does.
    Cost: as `sample` of the M masked rows: M V itemsize bytes; a bias or a soft cap takes no pass of its own. Beside
    top_k or top_p, which read a row several times, they do: those rows are written first, 512 at a time, 4 M V bytes.
    A block cut out of longer sequences' logits is copied first where B is above 1: 2 B L V itemsize bytes more.
    Source: as `unmask`.

    Example:
        >>> logits, block = torch.randn(1, 4, 1000), torch.tensor([[7, 999, 999, 999]])
        >>> strategy = Strategy.of(1, confidence="entropy", entropy_bound=0.1)
        >>> unmask_logits(logits, block, Sampling.of(1), mask_token_id=999, strategy=strategy).block
    """
    check(
        "unmask_logits",
        6,
        logits=(logits, "B L V"),
        block=(block, "B L", int),
        **specs("unmask_logits", sampling, "B"),
        threshold=(threshold, "B"),
        steps_left=(steps_left, "B", int),
        bias=(bias, "V"),
        **strategy_specs("unmask_logits", strategy, "B"),
    )
    check_range("unmask_logits", sampling)
    check_token("unmask_logits", "mask_token_id", mask_token_id, logits.shape[-1])
    softcap = cap_of("unmask_logits", softcap)
    check_flag("unmask_logits", "shift", shift)
    if not takes_kernel("unmask_logits", logits, bias):
        rule: dict[str, Any] = dict(mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left)
        more: dict[str, Any] = dict(strategy=strategy, bias=bias, softcap=softcap, shift=shift)
        return reference.unmask_logits(logits, block, sampling, **rule, **more)
    ending = (None if bias is None else bias.detach(), softcap, shift)
    rules = flat(strategy or Strategy())
    return Unmasked(
        *_op(logits.detach(), block, threshold, steps_left, mask_token_id, *ending, *rules, *flat(sampling))
    )
