"""A Mamba-2 layer that keeps its state: a prompt in stretches, then token by token, in the same two buffers.

    python -m examples.mamba_layer

`mamba_extend` runs convolution and scan from the states and moves them on. `mamba_block` only reads them: for tokens
that may yet change, as a denoiser's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_kernels import MambaState, MambaWeights, gated_group_norm, mamba_block, mamba_extend

from .comparison import DEVICE, compare

B, WIDTH, HEADS, SIZE, GROUPS, N, TAPS = 2, 64, 4, 32, 2, 16, 4
INNER, CHANNELS = HEADS * SIZE, HEADS * SIZE + 2 * GROUPS * N


class Mamba2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, INNER + CHANNELS + HEADS, bias=False)
        self.conv = nn.Parameter(torch.randn(CHANNELS, TAPS) * 0.3)
        self.A_log, self.D = nn.Parameter(torch.rand(HEADS).mul(15).add(1).log()), nn.Parameter(torch.ones(HEADS))
        self.dt_bias, self.norm = nn.Parameter(torch.randn(HEADS) - 3), nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def weights(self) -> MambaWeights:
        return MambaWeights(self.conv, None, -self.A_log.exp(), self.D, self.dt_bias)

    def forward(self, x: Tensor, state: MambaState, *, keep: bool = True) -> Tensor:
        """x [B, L, WIDTH]. keep: whether the state moves on."""
        z, xBC, dt = self.in_proj(x).split([INNER, CHANNELS, HEADS], -1)
        y = (mamba_extend if keep else mamba_block)(xBC, dt, self.weights(), state)
        return self.out_proj(gated_group_norm(y.flatten(2), z, self.norm, groups=GROUPS))

    def plain(self, x: Tensor) -> Tensor:
        """The whole sequence from zero states, one token after the other."""
        z, xBC, dt = self.in_proj(x).split([INNER, CHANNELS, HEADS], -1)
        columns = F.silu(F.conv1d(F.pad(xBC.mT, (TAPS - 1, 0)), self.conv.unsqueeze(1), groups=CHANNELS).mT)
        v, k, q = columns.split([INNER, GROUPS * N, GROUPS * N], -1)
        v = v.unflatten(-1, (HEADS, SIZE))
        k, q = (t.unflatten(-1, (GROUPS, N)).repeat_interleave(HEADS // GROUPS, 2) for t in (k, q))
        dt = F.softplus(dt + self.dt_bias)
        state, outputs = v.new_zeros(len(x), HEADS, SIZE, N), []
        for t in range(x.shape[1]):
            decay = (dt[:, t] * -self.A_log.exp()).exp()[..., None, None]
            state = state * decay + (dt[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None]
            outputs.append((state * q[:, t, :, None]).sum(-1) + self.D[:, None] * v[:, t])
        y = (torch.stack(outputs, 1).flatten(2) * F.silu(z)).unflatten(-1, (GROUPS, -1))
        return self.out_proj(F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(2) * self.norm)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer, x = Mamba2().to(DEVICE), torch.randn(B, 120, WIDTH, device=DEVICE)

    def in_parts() -> Tensor:
        """100 tokens, a block of 16 that is only looked at and then entered, 4 tokens one by one."""
        conv = torch.zeros(B, CHANNELS, TAPS, device=DEVICE)
        state = MambaState(conv, torch.zeros(B, HEADS, SIZE, N, device=DEVICE))
        outputs = [layer(x[:, :100], state)]
        looked = layer(x[:, 100:116], state, keep=False)
        outputs += [layer(x[:, 100:116], state), *(layer(x[:, i : i + 1], state) for i in range(116, 120))]
        assert torch.allclose(looked, outputs[1], rtol=1e-4, atol=1e-5)
        return torch.cat(outputs, 1)

    compare("120 tokens in six stretches", in_parts, lambda: layer.plain(x))


if __name__ == "__main__":
    main()
