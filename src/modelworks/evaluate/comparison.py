"""Two models on the same samples: the difference of their scores, and whether it can be told from chance.

The interval is a paired bootstrap's: samples are drawn with replacement, each with both models' outcomes (Efron and
Tibshirani 1993, ch. 13). Where outcomes are right or wrong, McNemar's exact test stands beside it (McNemar 1947): the
probability that the samples which one model alone gets right would be shared so unequally by fair coins.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modelworks.spec.errors import InputError

DRAWS = 10_000
CONFIDENCE = 0.95
_ROWS = 500
"""Draws whose samples stand in memory together."""


def aggregate(metric: str, values: np.ndarray) -> np.ndarray:
    """A metric (...) of samples (..., N, 2): each its value, and its weight, 1 but for likelihoods of texts.

    The mean, or for `perplexity`, `word_perplexity`, `byte_perplexity` and `bits_per_byte` what they are of the mean
    log-likelihood per word or byte.
    """
    mean = values[..., 0].sum(-1) / values[..., 1].sum(-1)
    if metric == "bits_per_byte":
        return np.asarray(-mean / math.log(2))
    return np.asarray(np.exp(-mean) if "perplexity" in metric else mean)


def compare(first: dict[str, Any], other: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Compare a report with another's, by the samples that both have.

    Returns
    -------
    dict
        ``model``, ``against`` and ``rows``, each with ``task``, ``metric``, ``score``, ``against``, ``difference``,
        ``interval`` (95 %), ``mcnemar_p`` (or None), ``samples`` and ``verdict``: `better`, `worse`, or `no difference
        shown with N samples`.

    Raises
    ------
    InputError
        If they have no task in common, one task's versions differ, or a task's samples aren't the same.
    """
    shared = [task for task in first["samples"] if task in other["samples"]]
    if not shared:
        raise InputError(
            f"the reports have no task in common: {', '.join(first['samples'])} and {', '.join(other['samples'])}"
        )
    rows = []
    for task in shared:
        versions = [report["tasks"][task]["version"] for report in (first, other)]
        if versions[0] != versions[1]:
            raise InputError(f"{task}: version {versions[0]} is not comparable with version {versions[1]}")
        if first["tasks"][task].get("shots") != other["tasks"][task].get("shots"):
            raise InputError(f"{task}: reports with different numbers of shots are not comparable")
        better = first["tasks"][task]["higher_is_better"]
        for metric, values in first["samples"][task].items():
            others = other["samples"][task].get(metric, {})
            both = [sample for sample in values if sample in others]
            if not both:
                raise InputError(f"{task}: the reports have no sample in common")
            pairs = np.array([[_weighted(values[sample]), _weighted(others[sample])] for sample in both])
            rows.append(_row(task, metric, pairs, higher=better.get(metric) is not False, seed=seed))
    return {"model": first["model"], "against": other["model"], "confidence": CONFIDENCE, "rows": rows}


def _weighted(value: float | list[float]) -> list[float]:
    return list(value) if isinstance(value, list) else [value, 1.0]


def _row(task: str, metric: str, pairs: np.ndarray, *, higher: bool, seed: int) -> dict[str, Any]:
    """One metric's comparison from the samples (N, 2, 2) of both models."""
    name, count = metric.partition(",")[0], len(pairs)
    scores = [float(aggregate(name, pairs[:, side])) for side in (0, 1)]
    draws = np.concatenate(list(_draws(name, pairs, seed)))
    low, high = (float(edge) for edge in np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    outcomes = pairs[..., 0]
    binary = bool(np.isin(outcomes, (0.0, 1.0)).all() and (pairs[..., 1] == 1.0).all())
    p = mcnemar(outcomes) if binary else None
    shown = (low > 0 or high < 0) and (p is None or p < 1 - CONFIDENCE)
    above = scores[0] > scores[1]
    verdict = "better" if above is higher else "worse"
    return {
        "task": task,
        "metric": metric,
        "score": scores[0],
        "against": scores[1],
        "difference": scores[0] - scores[1],
        "interval": [low, high],
        "mcnemar_p": p,
        "samples": count,
        "higher_is_better": higher,
        "verdict": verdict if shown else f"no difference shown with {count} samples",
    }


def _draws(name: str, pairs: np.ndarray, seed: int) -> Any:
    chance = np.random.default_rng(seed)
    for start in range(0, DRAWS, _ROWS):
        rows = min(_ROWS, DRAWS - start)
        drawn = pairs[chance.integers(len(pairs), size=(rows, len(pairs)))]  # (rows, N, 2, 2)
        yield aggregate(name, drawn[:, :, 0]) - aggregate(name, drawn[:, :, 1])


def mcnemar(outcomes: np.ndarray) -> float:
    """The two-sided p of right and wrong outcomes (N, 2), by the binomial distribution."""
    first = int((outcomes[:, 0] > outcomes[:, 1]).sum())
    other = int((outcomes[:, 0] < outcomes[:, 1]).sum())
    total = first + other
    tail = sum(math.comb(total, count) for count in range(min(first, other) + 1))
    return min(1.0, float(2 * tail / 2**total))


def standard_error(metric: str, values: list[Any], seed: int = 0) -> float:
    """A score's standard error by the bootstrap."""
    own = np.array([_weighted(value) for value in values])
    chance = np.random.default_rng(seed)
    draws = [aggregate(metric, own[chance.integers(len(own), size=len(own))]) for _ in range(1000)]
    return float(np.std(draws, ddof=1))
