"""Mixture of experts: the router and the experts."""

from .experts import ExpertWeights, experts
from .route import route

__all__ = ["ExpertWeights", "experts", "route"]
