"""TwoTower: a block-diffusion language model of a causal context tower and a denoiser tower."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TwoTowerConfig
    from .engine.engine import Engine, Event
    from .engine.request import Request
    from .engine.settings import Generation, Result, Step
    from .modeling.state import Cache
    from .two_tower import TwoTower

__version__ = "0.1.0"
__all__ = ["Cache", "Engine", "Event", "Generation", "Request", "Result", "Step", "TwoTower", "TwoTowerConfig"]

_HOMES = {
    "Cache": "modeling.state",
    "Engine": "engine.engine",
    "Event": "engine.engine",
    "Generation": "engine.settings",
    "Request": "engine.request",
    "Result": "engine.settings",
    "Step": "engine.settings",
    "TwoTower": "two_tower",
    "TwoTowerConfig": "config",
}


def __getattr__(name: str) -> object:
    """Public names load torch when they are first used, not when `twotower --help` runs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
