"""The experts of a mixture: grouped products over tokens sorted by expert."""

from .op import OPS, ExpertWeights, experts

__all__ = ["OPS", "ExpertWeights", "experts"]
