"""The detectors' formulas once more, in plain float64 numpy: slow, direct, and sharing no code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def log_sum_exp(row: F64) -> float:
    top = float(row.max())
    return top + float(np.log(np.exp(row - top).sum())) if np.isfinite(top) else top


def two(row: F64) -> F64:
    return np.array([-row[0] / 2, row[0] / 2]) if len(row) == 1 else row


def msp(logits: F64, temperature: float = 1.0) -> F64:
    """log(1 - max p)."""
    scores = []
    for row in logits:
        row = two(row) / temperature
        others = np.delete(row, int(row.argmax()))
        scores.append(log_sum_exp(others) - log_sum_exp(row))
    return np.array(scores)


def probability(logits: F64) -> F64:
    """-max p."""
    return np.array([-np.exp(two(row).max() - log_sum_exp(two(row))) for row in logits])


def max_logit(logits: F64) -> F64:
    return np.array([-two(row).max() for row in logits])


def energy(logits: F64, temperature: float = 1.0) -> F64:
    return np.array([-temperature * log_sum_exp(two(row) / temperature) for row in logits])


def entropy(logits: F64) -> F64:
    """-sum p log p, where log p of the top class is -log1p of the others' odds."""
    scores = []
    for row in logits:
        row = two(row)
        top = int(row.argmax())
        gaps = np.delete(row, top) - row[top]
        odds = np.exp(gaps)
        log_total = np.log1p(odds.sum())
        p = odds / (1.0 + odds.sum())
        scores.append(log_total - (p * np.where(p > 0, gaps, 0.0)).sum())
    return np.array(scores)


def gram_statistics(maps: F64, powers: Sequence[int], statistic: str) -> F64:
    """(B, P, N) of maps (B, C, M), through the whole Gram matrix."""
    found = []
    for one in maps:
        per_power = []
        for power in powers:
            raised = one**power
            matrix = raised @ raised.T
            if statistic == "rowsum":
                values = matrix.sum(axis=1)
            elif statistic == "diag":
                values = np.diag(matrix)
            else:
                values = matrix[np.triu_indices(len(matrix))]
            per_power.append(np.sign(values) * np.abs(values) ** (1.0 / power))
        found.append(per_power)
    return np.array(found)


def gram_deviation(values: F64, lower: F64, upper: F64, epsilon: float) -> F64:
    """(B,) of values (B, P, N) and the predicted class's range (B, P, N)."""
    total = np.zeros(len(values))
    for i in range(len(values)):
        for v, low, high in zip(values[i].ravel(), lower[i].ravel(), upper[i].ravel(), strict=True):
            if v < low:
                total[i] += (low - v) / (abs(low) + epsilon)
            elif v > high:
                total[i] += (v - high) / (abs(high) + epsilon)
    return total


def kernel_distance(features: F64, weight: F64, centroid: F64, length_scale: float) -> F64:
    """min_c mean_m (W_c φ - e_c)² / (2σ²)."""
    scores = []
    for row in features:
        distances = [
            ((weight[:, c] @ row - centroid[:, c]) ** 2).mean() / (2 * length_scale**2)
            for c in range(weight.shape[1])
        ]
        scores.append(min(distances))
    return np.array(scores)
