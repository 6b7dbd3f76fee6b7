"""The unmasking step: head, prediction with its confidence, and the commit rule.

Noise is counter-based: Philox4x32-10 of (row's seed, position in the sequence, denoising step, token id) and of nothing
else, so a token does not depend on batch slot, batch size or tiling.
"""

from .commit import OPS as _COMMIT
from .commit import commit
from .head import OPS as _HEAD
from .head import head_sample
from .noise import OPS as _NOISE
from .noise import gumbel_noise
from .sample import OPS as _SAMPLE
from .sample import sample
from .step import OPS as _STEP
from .step import unmask

OPS = (*_NOISE, *_SAMPLE, *_HEAD, *_COMMIT, *_STEP)

__all__ = ["OPS", "commit", "gumbel_noise", "head_sample", "sample", "unmask"]
