"""Formulas of the learnt logit scores and of shaping in plain float64 numpy, row by row."""

from __future__ import annotations

import numpy as np

from tests.golden.oracles import F64, log_sum_exp, two

__all__ = ["ash", "clipped", "doctor", "energy_of", "gen", "kl", "openmax", "rankfeat", "scale"]


def softmax(row: F64) -> F64:
    raised = np.exp(row - row.max())
    shares: F64 = raised / raised.sum()
    return shares


def gen(logits: F64, gamma: float, top: int) -> F64:
    scores = []
    for row in logits:
        row = two(row)
        order = np.argsort(-row, kind="stable")
        log_p = row[order] - log_sum_exp(row)
        rest = np.array([log_sum_exp(np.delete(row, k)) for k in order]) - log_sum_exp(row)
        scores.append(np.exp(gamma * (log_p + rest))[:top].sum())
    return np.array(scores)


def doctor(logits: F64) -> F64:
    """1 - sum of p squared as the sum of p (1 - p), so that nothing cancels."""
    scores = []
    for row in logits:
        row = two(row)
        p = softmax(row)
        rest = np.array([np.delete(p, k).sum() for k in range(len(p))])
        scores.append(np.log((p * rest).sum()) - np.log((p * p).sum()))
    return np.array(scores)


def kl(logits: F64, typical: F64) -> F64:
    scores = []
    for row in logits:
        p = softmax(row)
        some = p > 0
        scores.append(min((p[some] * (np.log(p[some]) - np.log(t[some]))).sum() for t in typical))
    return np.array(scores)


def openmax(logits: F64, mean: F64, rate: F64, location: F64, alpha: int) -> F64:
    """Log-odds of the unknown class."""
    scores = []
    for row in logits:
        revised, unknown = row.copy(), 0.0
        for rank, k in enumerate(np.argsort(-row, kind="stable")[:alpha]):
            distance = np.sqrt(((row - mean[k]) ** 2).sum())
            extreme = 1.0 - np.exp(-np.exp(min(rate[k] * (distance - location[k]), 50.0)))
            share = extreme * (alpha - rank) / alpha
            unknown += row[k] * share
            revised[k] = row[k] * (1.0 - share)
        scores.append(unknown - log_sum_exp(revised))
    return np.array(scores)


def energy_of(features: F64, weight: F64, bias: F64) -> F64:
    return np.array([-log_sum_exp(weight @ row + bias) for row in features])


def clipped(maps: F64, lower: float, upper: float) -> F64:
    """(B, D) of maps (B, D, P)."""
    found: F64 = np.where(maps <= lower, 0.0, np.minimum(maps, upper)).mean(axis=2)
    return found


def _kept(one: F64, pruned: float) -> tuple[F64, int]:
    """Which of (D, P) are kept, by a full sort, and how many are to be."""
    count = one.size - round(one.size * pruned)
    order = np.argsort(-one.ravel(), kind="stable")[:count]
    kept = np.zeros(one.size)
    kept[order] = 1.0
    return kept.reshape(one.shape) * (one > 0), count


def scale(maps: F64, pruned: float) -> F64:
    shaped = []
    for one in maps:
        kept, _ = _kept(one, pruned)
        shaped.append(one.mean(axis=1) * np.exp(one.sum() / (one * kept).sum()))
    return np.array(shaped)


def ash(maps: F64, pruned: float, kind: str) -> F64:
    shaped = []
    for one in maps:
        kept, count = _kept(one, pruned)
        if kind == "b":
            shaped.append((kept * one.sum() / count).mean(axis=1))
        elif kind == "p":
            shaped.append((kept * one).mean(axis=1))
        else:
            factor = np.exp(one.sum() / (one * kept).sum())
            shaped.append((kept * one).mean(axis=1) * factor)
    return np.array(shaped)


def rankfeat(maps: F64) -> F64:
    shaped = []
    for one in maps:
        u, s, v = np.linalg.svd(one, full_matrices=False)
        shaped.append((one - s[0] * np.outer(u[:, 0], v[0])).mean(axis=1))
    return np.array(shaped)
