"""The unmasking step: head, prediction with its confidence, and the commit rule.

Noise is counter-based: Philox4x32-10 of (row's seed, position in the sequence, denoising step, token id) and of nothing
else, so a token does not depend on batch slot, batch size or tiling.
"""

import torch
from torch import Tensor

from . import reference
from .core import Op, check, refuse


def gumbel_noise(seed: Tensor, position: Tensor, step: Tensor, *, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token id, a pure function of its arguments.

    Word v % 4 of Philox4x32-10 at counter (v // 4, position, step, 0) and key (seed mod 2^32, seed >> 32), as
    u = (word + 1/2) / 2^32, gives -log(-log(1 - u)), from -3.13 to 22.87.

    Args:
        seed, position, step: [*] int; position and step from 0 to 2^32 - 1.
        vocab_size:           V.
    Returns:
        noise: [*, V] fp64.

    Exact in fp64. No gradients. Raises ValueError for sizes that disagree. Cost: about 40 integer operations and two
    logarithms a number. Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); Random123.
    """
    check("gumbel_noise", seed=(seed, "*", int), position=(position, "*", int), step=(step, "*", int))
    if vocab_size < 1:
        refuse("gumbel_noise", "vocab_size", vocab_size, "1 or more")
    return reference.gumbel_noise(seed, position, step, vocab_size=vocab_size)


def _check_sampling(op: str, vocab_size: int, top_k: int | None, top_p: float | None, **tokens: int | None) -> None:
    if top_k is not None and top_k < 1:
        refuse(op, "top_k", top_k, "1 or more, or None")
    if top_p is not None and not 0 < top_p <= 1:
        refuse(op, "top_p", top_p, "above 0 and up to 1, or None")
    for name, token in tokens.items():
        if token is not None and not 0 <= token < vocab_size:
            refuse(op, name, token, f"a token id below V={vocab_size}")


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict a token from logits, with its confidence.

    At temperature 0 the argmax; above it the argmax of logits / temperature + Gumbel noise, which is a sample of
    softmax(logits / temperature). Of equal scores the lowest id wins. The confidence is the token's probability at
    temperature 1, under all tokens but the suppressed one.

    Args:
        logits:      [*, V] float.
        temperature: [*] float, 0 or more, one for each row of logits, as are the next three.
        seed:        [*] int, any 64 bits.
        position:    [*] int, the token's position in its sequence.
        step:        [*] int, the denoising step.
        top_k:       sample among the k best (and all that equal the k-th), or None.
        top_p:       sample among the best whose probabilities at this temperature, summed from the best down and after
                     top_k, first exceed p, or None. Neither touches rows of temperature 0.
        suppress:    a token id that counts as -inf, or None.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 for fp64 logits).

    Computes in the dtype of the confidence, noise in fp64. No gradients. Deterministic. Raises ValueError for sizes
    that disagree and options out of their range. Cost for R rows: R V itemsize bytes; with noise 40 R V operations.
    Source: TwoTower (2606.26493); Gumbel-max as in Maddison et al. (1411.0030).
    """
    check(
        "sample",
        logits=(logits, "* V"),
        temperature=(temperature, "*"),
        seed=(seed, "*", int),
        position=(position, "*", int),
        step=(step, "*", int),
    )
    _check_sampling("sample", logits.shape[-1], top_k, top_p, suppress=suppress)
    return reference.sample(
        logits,
        temperature=temperature,
        seed=seed,
        position=position,
        step=step,
        top_k=top_k,
        top_p=top_p,
        suppress=suppress,
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

    Products of 16-bit numbers are summed in fp32. No gradients. Deterministic. Raises ValueError as `sample` does.
    Cost for R rows: 2 R V D flops, (V D + R D) itemsize bytes: bound by reading the head. Source: as `sample`.
    """
    check(
        "head_sample",
        hidden=(hidden, "* D"),
        weight=(weight, "V D"),
        temperature=(temperature, "*"),
        seed=(seed, "*", int),
        position=(position, "*", int),
        step=(step, "*", int),
    )
    _check_sampling("head_sample", weight.shape[0], top_k, top_p, suppress=suppress)
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


def commit(
    block: Tensor, token: Tensor, confidence: Tensor, *, mask_token_id: int, threshold: Tensor, steps_left: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the most confident masked positions of each row take their prediction.

    With m masked positions: min(m, max(1, how many have confidence > threshold, ceil(m / steps_left))) of them commit,
    the most confident first, of equals the lower position. The rest stay masked; what is not masked never changes.

    Args:
        block:         [B, L] int.
        token:         [B, L] int, same dtype: predictions, read where the block is masked.
        confidence:    [B, L] float, read where the block is masked.
        mask_token_id: the mask.
        threshold:     [B] float.
        steps_left:    [B] int: denoising steps that remain, this one included; below 1 counts as 1.
    Returns:
        block:     [B, L] dtype of block, in new memory.
        committed: [B, L] bool: what changed now.
        masked:    [B] int64: how many are masked still.

    No gradients. Deterministic. Raises ValueError for sizes that disagree. Cost: a sort of L numbers a row.
    Source: TwoTower (2606.26493).
    """
    check(
        "commit",
        block=(block, "B L", int),
        token=(token, "B L", int),
        confidence=(confidence, "B L"),
        threshold=(threshold, "B"),
        steps_left=(steps_left, "B", int),
    )
    return reference.commit(
        block, token, confidence, mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left
    )


def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    *,
    mask_token_id: int,
    threshold: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    steps_left: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One unmasking step: `head_sample` of the masked positions with the mask token suppressed, then `commit`.

    Args:
        hidden:        [B, L, D] float, after the final norm.
        weight:        [V, D] float: the head.
        block:         [B, L] int64.
        mask_token_id: the mask.
        threshold:     [B] float: confidence above which a position commits.
        temperature:   [B] float, 0 or more.
        seed:          [B] int, any 64 bits.
        position:      [B] int: of the block's first token in its sequence.
        step:          [B] int: the denoising step, from 0.
        steps_left:    [B] int: steps that remain, this one included.
        top_k, top_p:  as in `sample`.
    Returns:
        block:      [B, L] int64, in new memory.
        committed:  [B, L] bool: what changed now.
        confidence: [B, L] fp32 (fp64 where hidden is fp64): of the prediction; 0 where the block was not masked.
        masked:     [B] int64: how many are masked still.

    Computes as `head_sample` does. No gradients. Deterministic. Raises ValueError as `sample` does. Cost for M masked
    positions: 2 M V D flops, V D itemsize bytes: bound by reading the head. Source: TwoTower (2606.26493).
    """
    check(
        "unmask",
        hidden=(hidden, "B L D"),
        weight=(weight, "V D"),
        block=(block, "B L", int),
        threshold=(threshold, "B"),
        temperature=(temperature, "B"),
        seed=(seed, "B", int),
        position=(position, "B", int),
        step=(step, "B", int),
        steps_left=(steps_left, "B", int),
    )
    _check_sampling("unmask", weight.shape[0], top_k, top_p, mask_token_id=mask_token_id)
    return reference.unmask(
        hidden,
        weight,
        block,
        mask_token_id=mask_token_id,
        threshold=threshold,
        temperature=temperature,
        seed=seed,
        position=position,
        step=step,
        steps_left=steps_left,
        top_k=top_k,
        top_p=top_p,
    )


def _keys(R: int) -> dict[str, Tensor]:
    return dict(seed=torch.randint(-(2**63), 2**63 - 1, (R,)), position=torch.arange(R) * 7, step=torch.arange(R) % 3)


def _temperatures(dtype: torch.dtype, R: int, hot: int) -> Tensor:
    """Every other row at temperature 0, the rest at 0.1 to 1; hot=0: all at 0."""
    return hot * torch.linspace(0.1, 1, R, dtype=torch.promote_types(dtype, torch.float32)) * (torch.arange(R) % 2)


def _noise(dtype: torch.dtype, R: int, V: int) -> dict[str, object]:
    return dict(**_keys(R), vocab_size=V)


def _sample(dtype: torch.dtype, R: int, V: int, hot: int = 1, narrow: int = 0) -> dict[str, object]:
    narrowed = dict(top_k=max(1, V // 2), top_p=0.9) if narrow else {}
    logits = 3 * torch.randn(R, V, dtype=dtype)
    return dict(logits=logits, temperature=_temperatures(dtype, R, hot), suppress=V // 2, **_keys(R), **narrowed)


def _head(dtype: torch.dtype, R: int, D: int, V: int, hot: int = 1, narrow: int = 0) -> dict[str, object]:
    inputs = _sample(dtype, R, V, hot, narrow)
    del inputs["logits"]
    weight = 3 * D**-0.5 * torch.randn(V, D, dtype=dtype)
    return dict(hidden=torch.randn(R, D, dtype=dtype), weight=weight, **inputs)


def _rule(B: int, L: int, V: int) -> dict[str, object]:
    block = torch.randint(V, (B, L)).masked_fill(torch.rand(B, L) < 0.6, V - 1)
    return dict(block=block, mask_token_id=V - 1, threshold=torch.full((B,), 0.3), steps_left=torch.arange(B) % 4 + 1)


def _commit(dtype: torch.dtype, B: int, L: int, V: int) -> dict[str, object]:
    wide = torch.promote_types(dtype, torch.float32)
    return dict(**_rule(B, L, V), token=torch.randint(V - 1, (B, L)), confidence=torch.rand(B, L, dtype=wide))


def _unmask(dtype: torch.dtype, B: int, L: int, D: int, V: int, hot: int = 1, narrow: int = 0) -> dict[str, object]:
    inputs = _head(dtype, B, D, V, hot, narrow)
    del inputs["suppress"]
    return dict(inputs, hidden=torch.randn(B, L, D, dtype=dtype), **_rule(B, L, V))


OPS = (
    Op(
        fn=gumbel_noise,
        reference=reference.gumbel_noise,
        inputs=_noise,
        cases=(dict(R=3, V=11), dict(R=1, V=64), dict(R=0, V=4)),
        shapes=(dict(R=16, V=131072),),
        outputs=("noise",),
        cost=lambda itemsize, R, V: (40 * R * V, 8 * R * V),
    ),
    Op(
        fn=sample,
        reference=reference.sample,
        inputs=_sample,
        cases=(dict(R=6, V=11), dict(R=4, V=64, hot=0), dict(R=6, V=37, narrow=1), dict(R=0, V=5)),
        shapes=(dict(R=1, V=131072, hot=0), dict(R=16, V=131072)),
        outputs=("token", "confidence"),
        cost=lambda itemsize, R, V, hot=1, narrow=0: (40 * R * V, R * V * itemsize),
        compiles=False,  # without a row above temperature 0 there is no noise: read on the host
    ),
    Op(
        fn=head_sample,
        reference=reference.head_sample,
        inputs=_head,
        cases=(dict(R=6, D=16, V=37), dict(R=4, D=6, V=11, hot=0), dict(R=6, D=8, V=29, narrow=1), dict(R=0, D=4, V=5)),
        shapes=(dict(R=1, D=2688, V=131072, hot=0), dict(R=16, D=2688, V=131072)),
        outputs=("token", "confidence"),
        cost=lambda itemsize, R, D, V, hot=1, narrow=0: (2 * R * V * D, (V * D + R * D) * itemsize),
        compiles=False,  # as sample
    ),
    Op(
        fn=commit,
        reference=reference.commit,
        inputs=_commit,
        cases=(dict(B=4, L=7, V=11), dict(B=1, L=16, V=5), dict(B=2, L=1, V=5), dict(B=0, L=4, V=5)),
        shapes=(dict(B=1, L=16, V=131072), dict(B=64, L=16, V=131072)),
        outputs=("block", "committed", "masked"),
        cost=lambda itemsize, B, L, V: (0, B * L * (4 * 8 + itemsize)),
    ),
    Op(
        fn=unmask,
        reference=reference.unmask,
        inputs=_unmask,
        cases=(
            dict(B=4, L=5, D=16, V=37),
            dict(B=2, L=16, D=6, V=11, hot=0),
            dict(B=3, L=4, D=8, V=29, narrow=1),
            dict(B=0, L=4, D=4, V=5),
        ),
        shapes=(dict(B=1, L=16, D=2688, V=131072), dict(B=64, L=16, D=2688, V=131072)),
        outputs=("block", "committed", "confidence", "masked"),
        cost=lambda itemsize, B, L, D, V, hot=1, narrow=0: (2 * B * L * V * D, (V * D + B * L * D) * itemsize),
        compiles=False,  # the number of masked positions is a size
    ),
)
