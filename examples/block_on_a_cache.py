"""A block of tokens on a paged cache: one prompt, three guesses of what follows, no copy of the prompt's keys.

    python -m examples.block_on_a_cache

The rows share the pages of the prompt. Tokens of a block see the prompt and, both ways, each other: what a denoiser of
block diffusion does. Then the first row's block enters the cache, which `append_attention` does as it attends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import append_attention, context_attention

from .comparison import DEVICE, compare

B, L, PROMPT, HEADS, KV_HEADS, SIZE, PAGE = 3, 16, 500, 8, 2, 64, 64


def plain_attention(q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor) -> Tensor:
    """The same from a cache without pages, which each row has a copy of."""
    k, v = (torch.cat([prompt.expand(len(own), -1, -1, -1), own], 1) for prompt, own in ((k_prompt, k), (v_prompt, v)))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def main() -> None:
    torch.manual_seed(0)
    k_prompt, v_prompt = torch.randn(2, 1, PROMPT, KV_HEADS, SIZE, device=DEVICE)
    pages = -(-PROMPT // PAGE)
    k_pages, v_pages = torch.zeros(2, pages + 1, PAGE, KV_HEADS, SIZE, device=DEVICE)  # one more, for what follows
    for pool, prompt in ((k_pages, k_prompt), (v_pages, v_prompt)):
        pool.flatten(0, 1)[:PROMPT] = prompt[0]
    table = torch.arange(pages, device=DEVICE).expand(B, -1)  # every row: the same pages
    lengths = torch.full((B,), PROMPT, device=DEVICE)

    q = torch.randn(B, L, HEADS, SIZE, device=DEVICE)
    k, v = torch.randn(2, B, L, KV_HEADS, SIZE, device=DEVICE)
    compare(
        f"{B} blocks of {L} on {PROMPT} cached tokens",
        lambda: context_attention(q, k, v, k_pages, v_pages, table, lengths),
        lambda: plain_attention(q, k, v, k_prompt, v_prompt),
    )

    table = torch.arange(pages + 1, device=DEVICE).unsqueeze(0)
    append_attention(q[:1], k[:1], v[:1], k_pages, v_pages, table, lengths[:1])
    entered = k_pages.flatten(0, 1)[PROMPT : PROMPT + L]
    assert torch.equal(entered, k[0])
    print(f"the first block is in the cache, at {PROMPT} to {PROMPT + L - 1}")


if __name__ == "__main__":
    main()
