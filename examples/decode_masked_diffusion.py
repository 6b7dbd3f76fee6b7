"""A small masked diffusion transformer, decoded as LLaDA, Dream, Fast-dLLM and the EB-Sampler decode, each by one op.

    python -m examples.decode_masked_diffusion

Its weights are random: the page shows the loop, and that the op takes the positions that plain PyTorch takes.
"""

import math

import torch
from torch import Tensor, nn

from tt_kernels import Sampling, Strategy, unmask_logits

VOCABULARY, MASK, BLOCK, STEPS = 400, 399, 16, 6


class Denoiser(nn.Module):
    """A transformer that sees its whole sequence."""

    def __init__(self, width: int = 64, layers: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.head.weight, std=0.4)  # sure of some tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids) + self.place.weight[: ids.shape[1]]))


def plain_step(logits: Tensor, block: Tensor, name: str, step: int) -> Tensor:
    """The same step on whole logits in PyTorch: softmax, sort, and a look at every row from the host."""
    p = logits.double().index_fill(2, torch.tensor([MASK]), -math.inf).softmax(-1)
    sure, token = p.max(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    block = block.clone()
    for b in range(len(block)):
        score = -entropy[b] if name in ("Dream", "EB-Sampler") else sure[b]
        masked = (block[b] == MASK).nonzero().flatten()
        order = masked[score[masked].argsort(descending=True, stable=True)]
        m = len(masked)
        if name == "LLaDA":
            count = math.ceil(m / (STEPS - step))
        elif name == "Dream":
            count = dream_number(m, step)
        elif name == "Fast-dLLM":
            passes = [n == 1 or float(sure[b, i]) >= 1 - 1.0 / (n + 1) for n, i in enumerate(order, 1)]
            count = [*passes, False].index(False)
        else:
            count = int((entropy[b][order].cumsum(0) - entropy[b][order] <= 2.0).sum())
        block[b, order[:count]] = token[b, order[:count]]
    return block


def dream_number(masked: int, step: int, eps: float = 1e-3) -> int:
    t, s = (1 - i * (1 - eps) / STEPS for i in (step, step + 1))
    return int(masked * (1 - s / t)) if step < STEPS - 1 else masked


def op_step(logits: Tensor, block: Tensor, name: str, step: int) -> Tensor:
    """One call; on a GPU nothing comes back to the host."""
    B = len(block)
    options: dict = dict(mask_token_id=MASK)
    if name == "LLaDA":
        options |= dict(steps_left=torch.full((B,), STEPS - step))
    elif name == "Dream":
        number = torch.tensor([dream_number(int((row == MASK).sum()), step) for row in block])
        options |= dict(strategy=Strategy.of(B, confidence="entropy", number=number))
    elif name == "Fast-dLLM":
        options |= dict(strategy=Strategy.of(B, factor=1.0))
    else:
        options |= dict(strategy=Strategy.of(B, confidence="entropy", entropy_bound=2.0))
    return unmask_logits(logits, block, Sampling.of(B), **options).block


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, prompt = Denoiser().eval(), torch.randint(VOCABULARY - 1, (3, 8))
    for name in ("LLaDA", "Dream", "Fast-dLLM", "EB-Sampler"):
        block, passes = torch.full((3, BLOCK), MASK), 0
        while (block == MASK).any():
            first = prompt.shape[1] - (name == "Dream")  # its logits i are of token i + 1
            logits = model(torch.cat([prompt, block], 1))[:, first : first + BLOCK]
            new = op_step(logits, block, name, passes)
            assert torch.equal(new, plain_step(logits, block, name, passes)), f"{name}: pass {passes} differs"
            block, passes = new, passes + 1
        print(f"{name:10s} {BLOCK} tokens a row in {passes:2d} passes, each as plain PyTorch takes them")


if __name__ == "__main__":
    main()
