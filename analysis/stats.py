"""The few statistics of a table, by scipy. Values are given by seed, so that comparisons can be paired."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05


@dataclass(frozen=True)
class Summary:
    n: int
    mean: float
    std: float  # of the sample (n - 1); NaN for fewer than two values
    ci95: float  # half the width of Student's t interval of the mean; NaN for fewer than two values


def summary(values: Sequence[float]) -> Summary:
    """NaN in, NaN out: a run that ended in NaN is not left out silently."""
    nan = float("nan")
    if not values:
        return Summary(0, nan, nan, nan)
    if not np.isfinite(values).all():
        return Summary(len(values), nan, nan, nan)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Summary(1, mean, nan, nan)
    from scipy import stats

    error = float(stats.sem(values))
    low, _ = stats.t.interval(1 - ALPHA, len(values) - 1, loc=mean, scale=error) if error else (mean, mean)
    return Summary(len(values), mean, float(np.std(values, ddof=1)), mean - float(low))


def p_value(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Two-sided: the paired t-test over the seeds that both have, else Welch's. None where neither can be made."""
    from scipy import stats

    seeds = sorted(one.keys() & other.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that are all equal
        if len(seeds) >= 2:
            found = stats.ttest_rel([one[s] for s in seeds], [other[s] for s in seeds]).pvalue
        elif min(len(one), len(other)) >= 2:
            found = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue
        else:
            return None
    return None if np.isnan(found) else float(found)


def best(rows: Mapping[str, Mapping[int, float]], higher: bool = True) -> str | None:
    """The row that is best, if a test says so against every other row that has finite values."""
    means = {name: s.mean for name, v in rows.items() if np.isfinite((s := summary(list(v.values()))).mean)}
    if len(means) < 2:
        return None
    top = max(means, key=lambda name: means[name] if higher else -means[name])
    p_values = [p_value(rows[top], rows[name]) for name in means if name != top]
    return top if all(p is not None and p < ALPHA for p in p_values) else None
