"""How good samples are, as numbers."""

from pygan.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance

__all__ = ["FeatureStatistics", "feature_statistics", "frechet_distance"]
