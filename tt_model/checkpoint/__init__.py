"""Checkpoints: load, save and convert safetensors folders in the published layout, one tensor at a time.

Keys on disk are the published ones; in memory the routed experts of a layer are stacked: `experts.up_proj` [E, N, D]
for `experts.0.up_proj.weight` [N, D] and its siblings. A plain Nemotron-3-Nano (`backbone.*`, or transformers'
`model.*` with stacked experts) is read as a context tower.
"""

from .denoiser import convert, start_denoiser
from .keys import FP32_PARAMETERS, layout, parameter_dtype
from .read import load
from .write import TOKENIZER_FILES, atomic_folder, save

__all__ = [
    "FP32_PARAMETERS",
    "TOKENIZER_FILES",
    "atomic_folder",
    "convert",
    "layout",
    "load",
    "parameter_dtype",
    "save",
    "start_denoiser",
]
