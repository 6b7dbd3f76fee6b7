"""Mixture of experts: the router and the experts."""

from ..reference.moe import ExpertWeights, Matrix, Routing
from .experts import experts
from .experts_norm import experts_norm
from .route import route

__all__ = ["ExpertWeights", "Matrix", "Routing", "experts", "experts_norm", "route"]
