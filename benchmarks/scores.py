"""How good predictions are: the figures that all accuracy benchmarks report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def relative_errors(predicted: Array, measured: Array) -> Array:
    """|predicted / measured - 1|."""
    return np.abs(predicted / measured - 1)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation, ties averaged; NaN for fewer than three runs."""
    if len(a) < 3:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pairs(a: Array, b: Array) -> tuple[int, int]:
    """Pairs in the same order less those in the opposite one, and all pairs that differ in `b`."""
    agree = count = 0
    for i, j in combinations(range(len(a)), 2):
        if b[i] != b[j]:
            agree += int(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
            count += 1
    return agree, count


def kendall_tau(a: Array, b: Array, groups: Sequence[object]) -> float:
    """Kendall's tau over all pairs of runs of the same group; NaN where there are none."""
    agree = count = 0
    labels = [str(group) for group in groups]
    for label in dict.fromkeys(labels):
        own = np.array([index for index, each in enumerate(labels) if each == label])
        found = pairs(a[own], b[own])
        agree, count = agree + found[0], count + found[1]
    return agree / count if count else float("nan")


def summary(predicted: Array, measured: Array) -> dict[str, float]:
    """Mean, median and 95th percentile of the relative errors, and the mean signed one."""
    errors = relative_errors(predicted, measured)
    return {
        "runs": len(errors),
        "mean_relative_error": float(errors.mean()),
        "median_relative_error": float(np.median(errors)),
        "p95_relative_error": float(np.quantile(errors, 0.95)),
        "bias": float((predicted / measured - 1).mean()),
    }


def line(name: str, found: dict[str, float]) -> str:
    """A table row: runs, mean, median and 95th percentile in per cent."""
    return (
        f"| {name} | {found['runs']:.0f} | {found['mean_relative_error']:.1%} "
        f"| {found['median_relative_error']:.1%} | {found['p95_relative_error']:.1%} |"
    )


HEADER = "| constants | runs | mean error | median | 95th percentile |\n|---|---|---|---|---|"


def write(path: Path | None, result: dict[str, object]) -> None:
    """The result as JSON, to a file where one is named."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
