"""The unmasking step: head, prediction with its confidence, and the commit rule.

Noise is counter-based: Philox4x32-10 of (row's seed, position in the sequence, denoising step, token id) and of nothing
else, so a token does not depend on batch slot, batch size or tiling.
"""

from ..reference import Committed, Remasked, Remasking, Sampled, Sampling, Strategy, Unmasked
from .commit import commit
from .gumbel_noise import gumbel_noise
from .head_sample import head_sample
from .remask import remask
from .sample import sample
from .unmask import unmask
from .unmask_logits import unmask_logits

__all__ = [
    "Committed",
    "Remasked",
    "Remasking",
    "Sampled",
    "Sampling",
    "Strategy",
    "Unmasked",
    "commit",
    "gumbel_noise",
    "head_sample",
    "remask",
    "sample",
    "unmask",
    "unmask_logits",
]
