"""The modes: what one request does, pass after pass. The engine makes the passes, for many requests at once.

A program yields what it wants next and is sent what the pass has made of its row.
"""

from __future__ import annotations

from collections.abc import Callable

from .request import PREFILL, Program, Request, Want
from .settings import Settings


def _is_settled(request: Request, block: list[int], masked: int, mask: int) -> bool:
    """Whether a block needs no further pass.

    It does not once an end-of-sequence token is there and no mask token before it: tokens behind it are dropped. A
    single position behind is resolved all the same: the published NFE, which the golden files pin, counts that pass.
    """
    if masked < 2:
        return masked == 0
    ends = request.settings.eos_token_ids
    return next((t for t in block if t == mask or t in ends), mask) != mask


def mask_diffusion(request: Request, mask: int) -> Program:
    """Denoise a block of mask tokens until none is left, then let the context tower read it."""
    s = request.settings
    yield PREFILL
    while True:
        block, probable = list[int](), [0.0] * s.block_size
        for step in range(s.passes_per_block):
            seen = yield Want("denoise", s.block_size)
            request.nfe += 1
            request.report(step)
            *block, masked = seen.listed
            if s.logprobs:
                now = zip(seen.confidence, seen.committed, probable, strict=True)
                probable = [new if committed else old for new, committed, old in now]
            if _is_settled(request, block, masked, mask):
                break
        if request.write(block, probable):
            return
        yield Want("commit", s.block_size)
        request.length += s.block_size


def ar(request: Request, mask: int) -> Program:
    """The context tower alone, one token a step."""
    seen = yield PREFILL
    while True:
        request.report(0)
        if request.write(seen.listed, seen.confidence if request.settings.logprobs else ()):
            return
        seen = yield Want("ar", 1)
        request.length += len(seen.listed)


def mock_ar(request: Request, mask: int) -> Program:
    """The denoiser, one token a step, on a cache without the last token."""
    yield PREFILL
    while True:
        seen = yield Want("mock_ar", 1)
        request.nfe += 1
        request.length += 1
        request.report(0)
        if request.write(seen.listed, seen.confidence if request.settings.logprobs else ()):
            return


def speculative(request: Request, mask: int) -> Program:
    """The autoregressive mode's tokens, several a cycle: the denoiser drafts what follows a token that is certain, the
    context tower reads the draft, and what it would have written itself stays."""
    s = request.settings
    yield PREFILL
    while True:
        for _ in range(s.draft_steps if s.block_size > 1 else 0):
            seen = yield Want("denoise", s.block_size)
            request.nfe += 1
            *block, masked = seen.listed
            if _is_settled(request, block, masked, mask):
                break
        seen = yield Want("verify", s.block_size)
        *block, count = seen.listed
        request.cycles += 1
        request.report(0)
        request.length += count
        if request.write(block[:count], seen.confidence if s.logprobs else ()):
            return


PROGRAMS: dict[str, Callable[[Request, int], Program]] = {
    "mask_diffusion": mask_diffusion,
    "ar": ar,
    "mock_ar": mock_ar,
    "speculative": speculative,
}
# The passes that each wants after its prompt has been read.
WANTS: dict[str, Callable[[Settings], list[Want]]] = {
    "mask_diffusion": lambda s: [Want("denoise", s.block_size), Want("commit", s.block_size)],
    "ar": lambda s: [Want("ar", 1)],
    "mock_ar": lambda s: [Want("mock_ar", 1)],
    "speculative": lambda s: [Want("denoise", s.block_size), Want("verify", s.block_size)],
}
