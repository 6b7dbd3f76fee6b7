"""Kernels of a two-tower Mamba-2 / attention / mixture-of-experts model."""

from .reference import *  # noqa: F403
from .reference import __all__  # noqa: F401
