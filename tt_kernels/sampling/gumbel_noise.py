"""Gumbel noise, a pure function of seed, position, step and token id."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..runtime.checks import check
from ..runtime.lang import gumbel, philox, programmatic_launch
from ..runtime.launch import Launch, run
from ..runtime.registry import define, takes_kernel
from .options import check_whole


@triton.jit
def _gumbel_noise_kernel(
    seed_ptr,  # [R], as position and step
    position_ptr,
    step_ptr,
    noise_ptr,  # [R, V] fp64
    V,
    parts,  # programs a row
    BLOCK_Q: tl.constexpr,  # counters a program: four tokens each
):
    programmatic_launch()
    row = (tl.program_id(0) // parts).to(tl.int64)
    c = tl.program_id(0) % parts * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position, step = tl.load(position_ptr + row), tl.load(step_ptr + row)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr + row), c, position, step)
    token = (c >> 5 << 7) | ((c & 24) << 1) | (c & 7)  # the counter's first, as `noise_counter` has it
    out = noise_ptr + row * V + token
    tl.store(out, gumbel(w0, WIDE=True), mask=token < V)
    tl.store(out + 8, gumbel(w1, WIDE=True), mask=token + 8 < V)
    tl.store(out + 64, gumbel(w2, WIDE=True), mask=token + 64 < V)
    tl.store(out + 72, gumbel(w3, WIDE=True), mask=token + 72 < V)


def counters(V: int) -> int:
    """How many give the noise of V tokens: 128 tokens have 32 between them."""
    return 32 * triton.cdiv(V, 128)


def gumbel_noise_launch(V: int) -> Launch:
    """Two counters a thread: two logarithms in fp64 for each of their eight words keep a thread busy."""
    return Launch(BLOCK_Q=min(256, triton.next_power_of_2(counters(V))))


def _gumbel_noise(seed: Tensor, position: Tensor, step: Tensor, vocab_size: int) -> Tensor:
    noise = _gumbel_noise_fake(seed, position, step, vocab_size)
    launch = gumbel_noise_launch(vocab_size)
    parts = triton.cdiv(counters(vocab_size), launch.BLOCK_Q)
    run(
        _gumbel_noise_kernel,
        (seed.numel() * parts,),  # one axis: the others take no more than 65535
        *(seed.contiguous(), position.contiguous(), step.contiguous(), noise, vocab_size, parts),
        launch=launch,
    )
    return noise


def _gumbel_noise_fake(seed: Tensor, position: Tensor, step: Tensor, vocab_size: int) -> Tensor:
    return seed.new_empty((*seed.shape, vocab_size), dtype=torch.float64)


_noise = define(_gumbel_noise, _gumbel_noise_fake)


def gumbel_noise(seed: Tensor, position: Tensor, step: Tensor, *, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token id, a pure function of its arguments.

    Token v takes word w of Philox4x32-10 at counter (c, position, step, 0) and key (seed mod 2^32, seed >> 32): w is
    made of bits 3 and 6 of v (w = v / 8 mod 2 + 2 (v / 64 mod 2)), c of the others in their order. So a thread that
    holds a tile of products on tensor cores has all four tokens of a counter. u = (word + 1/2) / 2^32 gives
    -log(-log(1 - u)), from -3.13 to 22.87.

    Args:
        seed, position, step: [*] int: all 64 bits of the seed, the lower 32 of position and step.
        vocab_size:           V, 1 or more.
    Returns:
        noise: [*, V] fp64.

    Numerics: exact words; logarithms in fp64. Deterministic.
    Gradients: none.
    Raises: ValueError for sizes that disagree and a vocab_size below 1.
    Cost: about 40 integer operations and two logarithms a number, of 8 bytes.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); Random123.

    Example:
        >>> seed, position, step = torch.tensor([1, 2]), torch.tensor([5, 5]), torch.tensor([0, 0])
        >>> gumbel_noise(seed, position, step, vocab_size=1000)  # [2, 1000]
    """
    check("gumbel_noise", 3, seed=(seed, "*", int), position=(position, "*", int), step=(step, "*", int))
    check_whole("gumbel_noise", "vocab_size", vocab_size, 1, 2**31 - 1, "1 or more")
    if not takes_kernel("gumbel_noise", seed):
        return reference.gumbel_noise(seed, position, step, vocab_size=vocab_size)
    return _noise(seed, position, step, vocab_size)
