"""The model in graphs: what it checks on the host is left out of them."""

import torch
from models import CONFIG, random_model
from torch import Tensor, nn


def test_logits_are_exported_for_any_length() -> None:
    model = random_model()

    class Logits(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return model.context_logits(ids)

    first, other = torch.ones(1, 9, dtype=torch.int64), torch.arange(23).remainder(CONFIG.vocab_size).unsqueeze(0)
    program = torch.export.export(Logits(), (first,), dynamic_shapes=({1: torch.export.Dim("P", min=2, max=100)},))
    torch.testing.assert_close(program.module()(other), model.context_logits(other))
