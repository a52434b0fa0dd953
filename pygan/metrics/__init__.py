"""How good samples are, as numbers."""

from pygan.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from pygan.metrics.kernel import KernelDistance, kernel_distance
from pygan.metrics.neighbours import Neighbours, neighbours

__all__ = [
    "FeatureStatistics",
    "KernelDistance",
    "Neighbours",
    "feature_statistics",
    "frechet_distance",
    "kernel_distance",
    "neighbours",
]
