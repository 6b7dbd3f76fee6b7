"""TwoTower: a block-diffusion language model of a causal context tower and a denoiser tower."""

from .cache import Cache
from .config import TwoTowerConfig
from .generate import Generation, Step
from .two_tower import TwoTower

__version__ = "0.1.0"
__all__ = ["Cache", "Generation", "Step", "TwoTower", "TwoTowerConfig"]
