"""Fréchet distance between two sets of features.

With features taken for Gaussian, of mean m and covariance C:

    d² = |m_a - m_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^½)

the squared 2-Wasserstein distance of the two Gaussians. Called FID where the features are those of
a particular Inception network; the features are the caller's choice here.

With C = L Lᵀ the eigenvalues of C_a C_b are the squared singular values of L_aᵀ L_b, so the last
trace is the sum of those singular values. Taken this way, no eigenvalue of a nonsymmetric product
and no square root of one that rounding made slightly negative is needed, and rank-deficient
covariances (fewer samples than features) are as good as any.

Sources: Dowson and Landau, The Fréchet distance between multivariate normal distributions, Journal
of Multivariate Analysis 12, 1982; Heusel et al. 2017, arXiv:1706.08500 (as a measure of GANs).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pygan.errors import UserError

Float64 = NDArray[np.float64]


class FeatureStatistics(NamedTuple):
    """Mean ``[d]`` and covariance ``[d, d]`` of features, float64."""

    mean: Float64
    covariance: Float64


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean and unbiased covariance (divided by n - 1) in float64.

    Args:
        features: ``[n, d]``, any real type, n at least 2: an array or a CPU tensor.

    Raises:
        UserError: another shape, fewer than two rows, NaN or infinity.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise UserError(
            f"features have shape {list(values.shape)}; give [n, d] with n at least 2 and d at "
            "least 1"
        )
    if not np.isfinite(values).all():
        raise UserError("features hold NaN or infinity; give finite ones")
    mean = values.mean(axis=0)
    centred = values - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(values) - 1))


def _square_root(covariance: Float64) -> Float64:
    """L with L Lᵀ = covariance, from its eigenvectors; rounding below zero counts as zero."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return eigenvectors * np.sqrt(eigenvalues.clip(min=0.0))


def frechet_distance(
    features_a: ArrayLike | FeatureStatistics, features_b: ArrayLike | FeatureStatistics
) -> float:
    """Fréchet distance d² (as FID is reported) between two sets of features.

    Symmetric, at least zero, and zero for equal statistics up to rounding. It is biased upwards by
    small samples: compare values of equal sample sizes only.

    Args:
        features_a, features_b: ``[n, d]`` each (n may differ), or their `feature_statistics`.

    Returns:
        d², in squared units of the features.

    Raises:
        UserError: features that have no statistics, or different d.
    """
    a, b = (
        given if isinstance(given, FeatureStatistics) else feature_statistics(given)
        for given in (features_a, features_b)
    )
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features have {a.mean.size} and {b.mean.size} dimensions; give both of one extractor"
        )
    overlap = _square_root(a.covariance).T @ _square_root(b.covariance)
    cross = np.linalg.svd(overlap, compute_uv=False).sum()
    squared = np.square(a.mean - b.mean).sum()
    squared += np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(max(squared, 0.0))
