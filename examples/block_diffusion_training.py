"""A small transformer trained for block diffusion: all noisy blocks of a sequence in one pass, as BD3-LM does it.

    python -m examples.block_diffusion_training

Noisy and clean tokens go through the same layers. A noisy token sees the clean blocks before its own, and its own noisy
block both ways; a clean one sees clean blocks up to its own. Both are `block_diffusion_attention`, and no mask of
[2 N, 2 N] is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_kernels import block_diffusion_attention

from .comparison import DEVICE, compare

B, N, S, VOCABULARY, WIDTH, HEADS = 8, 64, 8, 32, 64, 4
MASK = VOCABULARY - 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        heads = lambda x: self.qkv(self.first(x)).view(B, N, 3, HEADS, -1).unbind(2)
        q, k, v = heads(noisy)
        q_clean, k_clean, v_clean = heads(clean)
        seen = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=S)
        seen_clean = block_diffusion_attention(q_clean, k_clean, v_clean, k_clean, v_clean, block_size=S)
        noisy, clean = (x + self.out(o.flatten(2)) for x, o in ((noisy, seen), (clean, seen_clean)))
        return noisy + self.mlp(self.second(noisy)), clean + self.mlp(self.second(clean))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(N, WIDTH)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        noisy, clean = (self.embed(ids) + self.place.weight for ids in (noisy, clean))
        for layer in self.layers:
            noisy, clean = layer(noisy, clean)
        return self.head(noisy)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, k_clean: Tensor, v_clean: Tensor) -> Tensor:
    """The same with a mask over [clean, noisy] keys."""
    block = torch.arange(N, device=q.device) // S
    mask = torch.cat([block[:, None] > block, block[:, None] == block], 1)
    q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def main() -> None:
    torch.manual_seed(0)
    tensors = torch.randn(5, B, N, HEADS, WIDTH // HEADS, device=DEVICE)
    ours = lambda: block_diffusion_attention(*tensors, block_size=S)
    compare(f"attention of {N // S} noisy blocks", ours, lambda: plain_attention(*tensors))

    model = Denoiser().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        # Sequences that count up from some number: known once a token of it is known.
        clean = (torch.randint(MASK, (B, 1)) + torch.arange(N)).remainder(MASK).to(DEVICE)
        t = torch.rand(B, N // S, device=DEVICE).repeat_interleave(S, 1)
        masked = torch.rand(B, N, device=DEVICE) < t
        loss = F.cross_entropy(model(clean.masked_fill(masked, MASK), clean)[masked], clean[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of masked tokens: {losses[0]:.2f} nats, after {len(losses)} steps {sum(losses[-10:]) / 10:.2f}")
    assert sum(losses[-10:]) < 0.5 * 10 * losses[0]


if __name__ == "__main__":
    main()
