"""Measures of samples against closed forms and sums by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from pygan.errors import UserError
from pygan.metrics import (
    FeatureStatistics,
    Neighbours,
    feature_statistics,
    frechet_distance,
    kernel_distance,
    neighbours,
)


def _features(n: int, d: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) + 3.0


def _rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def test_statistics_are_numpys() -> None:
    features = _features(50, 7, 0).astype(np.float32)
    mean, covariance = feature_statistics(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-12, atol=1e-13)


def test_one_dimension() -> None:
    # Two normal distributions on a line: (m_a - m_b)² + (s_a - s_b)².
    a = FeatureStatistics(np.array([1.0]), np.array([[9.0]]))
    b = FeatureStatistics(np.array([-1.0]), np.array([[0.25]]))
    assert frechet_distance(a, b) == pytest.approx(4.0 + 2.5**2, rel=1e-14)


def test_commuting_covariances() -> None:
    # Covariances with the same eigenvectors: the sum of (sqrt a_i - sqrt b_i)².
    turn = _rotation(32, 1)
    generator = np.random.default_rng(2)
    values_a, values_b = generator.uniform(0.1, 5.0, (2, 32))
    a, b = (
        FeatureStatistics(np.zeros(32), turn @ np.diag(values) @ turn.T)
        for values in (values_a, values_b)
    )
    expected = np.square(np.sqrt(values_a) - np.sqrt(values_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_not_commuting_in_two_dimensions() -> None:
    # For 2x2 matrices tr(M^½) = sqrt(tr M + 2 sqrt(det M)), here with M = C_a C_b.
    c_a = np.array([[2.0, 0.3], [0.3, 1.0]])
    c_b = np.array([[0.7, -0.4], [-0.4, 3.0]])
    product = c_a @ c_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    a = FeatureStatistics(np.array([1.0, 0.0]), c_a)
    b = FeatureStatistics(np.array([0.0, 2.0]), c_b)
    expected = 5.0 + np.trace(c_a) + np.trace(c_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_shift_of_the_same_features() -> None:
    features = _features(200, 16, 3)
    shift = np.linspace(-1, 1, 16)
    assert frechet_distance(features, features + shift) == pytest.approx(
        np.square(shift).sum(), rel=1e-10
    )


def test_scaling_of_the_same_features() -> None:
    # C becomes 4 C, so tr(C + 4C - 2 sqrt(4 C²)) = tr C; means are taken out.
    features = _features(300, 12, 4)
    features -= features.mean(0)
    expected = np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(features, 2 * features) == pytest.approx(expected, rel=1e-10)


def test_invariant_under_rotation_and_symmetric() -> None:
    a, b = _features(100, 9, 5), _features(150, 9, 6)
    turn = _rotation(9, 7)
    distance = frechet_distance(a, b)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)


def test_fewer_samples_than_features() -> None:
    # Rank 9 covariances in 64 dimensions: a sum of square roots of rounding would give about 1e-6.
    a = _features(10, 64, 8)
    scale = np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, a) <= 1e-12 * scale
    # Disjoint coordinates: C_a C_b = 0, and only the traces are left.
    left, right = np.zeros((10, 8)), np.zeros((10, 8))
    left[:, :4], right[:, 4:] = _features(10, 4, 9), _features(10, 4, 10)
    apart = np.square(left.mean(0) - right.mean(0)).sum()
    apart += np.trace(np.cov(left, rowvar=False)) + np.trace(np.cov(right, rowvar=False))
    assert frechet_distance(left, right) == pytest.approx(apart, rel=1e-12)


def test_takes_tensors_and_statistics() -> None:
    a, b = _features(40, 5, 11), _features(40, 5, 12)
    distance = frechet_distance(a, b)
    assert frechet_distance(torch.from_numpy(a), feature_statistics(b)) == distance


@pytest.mark.parametrize(
    ("features", "named"),
    [
        (np.zeros((1, 4)), "shape [1, 4]"),
        (np.zeros(4), "shape [4]"),
        (np.zeros((4, 0)), "shape [4, 0]"),
        (np.full((3, 2), np.nan), "NaN"),
        (np.full((3, 2), np.inf), "infinity"),
    ],
)
def test_refuses(features: np.ndarray, named: str) -> None:
    with pytest.raises(UserError) as refusal:
        feature_statistics(features)
    assert named in str(refusal.value)


def test_refuses_different_dimensions() -> None:
    with pytest.raises(UserError, match="4 and 5 dimensions"):
        frechet_distance(_features(10, 4, 0), _features(10, 5, 0))


def _by_hand(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3)

    def within(rows: np.ndarray) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in a for y in b]
    return within(a) + within(b) - 2 * sum(between) / len(between)


def test_kernel_distance_by_hand() -> None:
    a, b = _features(9, 4, 1), _features(9, 4, 2)
    found = kernel_distance(a, b, subsets=3, subset_size=100)
    # Each set is one subset, whatever the order of its rows.
    assert found.mean == pytest.approx(_by_hand(a, b), rel=1e-12)
    assert found.deviation == pytest.approx(0.0, abs=1e-9 * abs(found.mean))


def test_kernel_distance_of_one_distribution_is_about_zero() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 1000, 8))
    found = kernel_distance(a, b, subsets=50, subset_size=200)
    assert abs(found.mean) < 3 * found.deviation
    assert kernel_distance(a, b + 1.0, subset_size=200).mean > 10 * found.deviation
    assert kernel_distance(a, b, subset_size=200) == kernel_distance(a, b, subset_size=200)


def _neighbours_by_hand(real: np.ndarray, fake: np.ndarray) -> Neighbours:
    def apart(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.square(x - y).sum()))

    def radius(rows: np.ndarray, i: int, k: int) -> float:
        return sorted(apart(rows[i], other) for j, other in enumerate(rows) if j != i)[k - 1]

    real3 = [radius(real, i, 3) for i in range(len(real))]
    real5 = [radius(real, i, 5) for i in range(len(real))]
    fake3 = [radius(fake, i, 3) for i in range(len(fake))]
    double = np.quantile([radius(real, i, 1) for i in range(len(real))], 0.01)
    d = np.array([[apart(f, r) for r in real] for f in fake])
    return Neighbours(
        precision=float(np.mean([any(row <= real3) for row in d])),
        recall=float(np.mean([any(column <= fake3) for column in d.T])),
        density=float((d <= real5).sum() / (5 * len(fake))),
        coverage=float(np.mean([column.min() <= r for column, r in zip(d.T, real5, strict=True)])),
        copies=float(np.mean(d.min(1) < double)),
    )


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_neighbours_by_hand(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[neighbours.__module__], "_BLOCK", 7)
    generator = np.random.default_rng(3)
    real = generator.standard_normal((40, 3))
    fake = np.concatenate([generator.standard_normal((29, 3)) + shift, real[:3]])
    assert neighbours(real, fake) == pytest.approx(_neighbours_by_hand(real, fake), abs=1e-12)


def test_neighbours_at_the_limits() -> None:
    generator = np.random.default_rng(4)
    real, others = generator.standard_normal((2, 300, 4))
    same = neighbours(real, real)
    assert (same.precision, same.recall, same.coverage, same.copies) == (1, 1, 1, 1)
    assert neighbours(real, others + 100) == (0, 0, 0, 0, 0)
    fresh = neighbours(real, others)
    assert fresh.copies < 0.05
    assert fresh.density == pytest.approx(1.0, abs=0.15)
    # One mode only: what is there is good, and little is covered.
    narrow = neighbours(real, real[:1] + 1e-3 * others)
    assert narrow.precision == 1
    assert narrow.recall < 0.05 and narrow.coverage < 0.1


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (np.zeros((5, 3)), np.zeros((9, 3)), "at least 6"),
        (np.zeros((9, 3)), np.zeros((9, 2)), "3 and 2 dimensions"),
        (np.zeros((9, 3)), np.full((9, 3), np.nan), "NaN"),
        (np.zeros(9), np.zeros((9, 3)), r"shape \[9\]"),
    ],
)
def test_features_without_neighbours(real: np.ndarray, fake: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        neighbours(real, fake)


def test_subsets_that_say_nothing() -> None:
    with pytest.raises(UserError, match="0 subsets"):
        kernel_distance(np.zeros((3, 1)), np.zeros((3, 1)), subsets=0)
