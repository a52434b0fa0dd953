"""Kernel distance between two sets of features, called KID where these are Inception's.

The squared maximum mean discrepancy with k(x, y) = (x·y / d + 1)³, estimated without bias:

    mean over i != j of k(a_i, a_j) + mean over i != j of k(b_i, b_j) - 2 mean k(a_i, b_j)

on subsets drawn without replacement. Unlike the Fréchet distance its expectation does not depend on
the number of samples, and it may be slightly negative. Source: Bińkowski et al. 2018,
arXiv:1801.01401.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pygan.errors import UserError
from pygan.metrics.frechet import Float64

DEGREE = 3


class KernelDistance(NamedTuple):
    """Mean over the subsets, and their standard deviation."""

    mean: float
    deviation: float


def checked_features(*given: ArrayLike, least: int) -> list[Float64]:
    """As float64 ``[n, d]`` of one d.

    Raises:
        UserError: another shape, fewer than ``least`` rows, different d, NaN or infinity.
    """
    found = [np.asarray(each, dtype=np.float64) for each in given]
    for values in found:
        if values.ndim != 2 or len(values) < least or values.shape[1] < 1:
            raise UserError(
                f"features have shape {list(values.shape)}; give [n, d] with n at least {least} "
                "and d at least 1"
            )
        if not np.isfinite(values).all():
            raise UserError("features hold NaN or infinity; give finite ones")
    sizes = [values.shape[1] for values in found]
    if len(set(sizes)) > 1:
        raise UserError(
            f"features have {' and '.join(map(str, sizes))} dimensions; give both of one extractor"
        )
    return found


def _discrepancy(a: Float64, b: Float64) -> float:
    n, d = a.shape

    def kernel(x: Float64, y: Float64) -> Float64:
        values: Float64 = (x @ y.T / d + 1) ** DEGREE
        return values

    within = [k.sum() - np.trace(k) for k in (kernel(a, a), kernel(b, b))]
    return float(sum(within) / (n * (n - 1)) - 2 * kernel(a, b).mean())


def kernel_distance(
    features_a: ArrayLike,
    features_b: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Squared maximum mean discrepancy of two sets of features.

    Args:
        features_a, features_b: ``[n, d]`` each, n may differ: arrays or CPU tensors.
        subsets: how many are drawn of each set.
        subset_size: rows of each, at most; fewer where a set holds fewer.
        seed: of the subsets.

    Raises:
        UserError: features of other shapes, fewer than two rows, NaN or infinity, or sizes below 1.
    """
    a, b = checked_features(features_a, features_b, least=2)
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"{subsets} subsets of {subset_size} were asked for; take at least one of two rows"
        )
    random = np.random.default_rng(seed)
    size = min(subset_size, len(a), len(b))
    found = [
        _discrepancy(
            a[random.choice(len(a), size, replace=False)],
            b[random.choice(len(b), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(found)), float(np.std(found)))
