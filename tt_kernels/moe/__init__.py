"""Mixture of experts: the router and the experts."""

from . import experts as _experts
from . import route as _route
from .experts import ExpertWeights, experts
from .route import route

OPS = (*_route.OPS, *_experts.OPS)

__all__ = ["OPS", "ExpertWeights", "experts", "route"]
