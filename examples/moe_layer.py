"""A layer of experts, to train: sigmoid router, relu^2 experts, one shared.

    python -m examples.moe_layer

`route` sorts the pairs of tokens and experts once, and `experts` walks them expert by expert: each expert's weights are
read once, whatever the tokens choose.
"""

import torch
from torch import Tensor, nn

from tt_kernels import ExpertWeights, experts, route

from .comparison import DEVICE, compare

TOKENS, WIDTH, EXPERTS, INNER, TOP_K = 64, 128, 16, 96, 4


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parameter = lambda *shape: nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)
        self.router, self.bias = parameter(EXPERTS, WIDTH), nn.Buffer(torch.zeros(EXPERTS))
        self.up, self.down = parameter(EXPERTS, INNER, WIDTH), parameter(EXPERTS, WIDTH, INNER)
        self.shared_up, self.shared_down = parameter(2 * INNER, WIDTH), parameter(WIDTH, 2 * INNER)

    def forward(self, x: Tensor) -> Tensor:
        routing = route(x, self.router, self.bias, top_k=TOP_K)
        shared = ExpertWeights(self.shared_up, self.shared_down)
        return experts(x, routing, ExpertWeights(self.up, self.down), shared=shared, activation="relu2")

    def plain(self, x: Tensor) -> Tensor:
        """The same, expert by expert, with a look from the host at each."""
        scores = (x @ self.router.T).sigmoid()
        weights, ids = scores.topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        y = (x @ self.shared_up.T).relu().square() @ self.shared_down.T
        for e in range(EXPERTS):
            tokens, place = (ids == e).nonzero(as_tuple=True)
            h = (x[tokens] @ self.up[e].T).relu().square() @ self.down[e].T
            y = y.index_add(0, tokens, weights[tokens, place, None] * h)
        return y


def main() -> None:
    torch.manual_seed(0)
    layer, x = MoE().to(DEVICE), torch.randn(TOKENS, WIDTH, device=DEVICE)
    with torch.no_grad():
        compare(f"{TOKENS} tokens, {TOP_K} of {EXPERTS} experts", lambda: layer(x), lambda: layer.plain(x))

    def gradient(forward: nn.Module) -> Tensor:
        layer.zero_grad()
        forward(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in layer.parameters()])

    compare("gradients of all weights", lambda: gradient(layer), lambda: gradient(layer.plain))


if __name__ == "__main__":
    main()
