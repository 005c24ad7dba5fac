"""The statistics of a table, by scipy and statsmodels. Values are given by seed, so that comparisons can be paired."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
ENOUGH = 3  # seeds, for a test
NOISE = 1e-12  # of floats: differences that vary by less are equal
RESAMPLES = 2000  # of the bootstrap, always with the same seed: a table printed twice is the same table


@dataclass(frozen=True)
class Summary:
    n: int
    mean: float
    std: float  # of the sample (n - 1); NaN for fewer than two values
    ci95: float  # half the width of Student's t interval of the mean; NaN for fewer than two values


@dataclass(frozen=True)
class Iqm:
    """The mean of the middle half of the values, with a 95 % percentile bootstrap interval."""

    n: int
    mean: float
    low: float  # NaN, as high, for fewer than two values
    high: float


def summary(values: Sequence[float]) -> Summary:
    """NaN in, NaN out: a run that ended in NaN is not left out silently."""
    return _summary(tuple(values))


@functools.lru_cache(10_000)  # a table asks for each cell's many times
def _summary(values: tuple[float, ...]) -> Summary:
    nan = float("nan")
    if not values:
        return Summary(0, nan, nan, nan)
    if not np.isfinite(values).all():
        return Summary(len(values), nan, nan, nan)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Summary(1, mean, nan, nan)
    from scipy import special

    std = float(np.std(values, ddof=1))
    quantile = float(special.stdtrit(len(values) - 1, 1 - ALPHA / 2))  # of Student's t
    return Summary(len(values), mean, std, quantile * std / math.sqrt(len(values)))


def iqm(strata: Sequence[Sequence[float]]) -> Iqm:
    """The interquartile mean of all values together; the bootstrap draws within each stratum (a column of a table),
    as Agarwal et al. (NeurIPS 2021) recommend for a few seeds. NaN in, NaN out."""
    from scipy import stats

    def middle(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        found: np.ndarray = stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)
        return found

    nan, samples = float("nan"), [np.asarray(each, dtype=float) for each in strata if len(each)]
    n = sum(map(len, samples))
    if not n or not all(np.isfinite(each).all() for each in samples):
        return Iqm(n, nan, nan, nan)
    mean = float(middle(*samples))
    if n < 2 or any(len(each) < 2 for each in samples):  # nothing to draw from
        return Iqm(n, mean, nan, nan)
    found = stats.bootstrap(
        samples,
        middle,
        n_resamples=RESAMPLES,
        confidence_level=1 - ALPHA,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Iqm(n, mean, float(found.low), float(found.high))


def p_value(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Two-sided: the paired t-test over the seeds that both have, else Welch's. None where neither can be made.

    With two seeds, accuracies of a thousand pictures differ by the same amount too often: a test would be sure of it.
    """
    from scipy import stats

    seeds = sorted(one.keys() & other.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that are all equal
        if len(seeds) >= ENOUGH:
            if np.ptp([one[s] - other[s] for s in seeds]) < NOISE:
                return None
            found = stats.ttest_rel([one[s] for s in seeds], [other[s] for s in seeds]).pvalue
        elif min(len(one), len(other)) >= ENOUGH:
            found = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue
        else:
            return None
    return None if np.isnan(found) else float(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for making so many comparisons (Holm, 1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


@dataclass(frozen=True)
class Comparison:
    """The row that leads, and for every other row how likely its distance is by chance, corrected."""

    top: str
    p_values: Mapping[str, float | None]  # None: too few seeds to say

    @property
    def decided(self) -> bool:
        return all(p is not None and p < ALPHA for p in self.p_values.values())


def compare(rows: Mapping[str, Mapping[int, float]], higher: bool = True) -> Comparison | None:
    """The leading row against every other row that has finite values. None for fewer than two such rows."""
    means = {name: s.mean for name, v in rows.items() if np.isfinite((s := summary(list(v.values()))).mean)}
    if len(means) < 2:
        return None
    top = max(means, key=lambda name: means[name] if higher else -means[name])
    made = {name: p_value(rows[top], rows[name]) for name in means if name != top}
    corrected = iter(holm([p for p in made.values() if p is not None]))
    return Comparison(top, {name: None if p is None else next(corrected) for name, p in made.items()})


def best(rows: Mapping[str, Mapping[int, float]], higher: bool = True) -> str | None:
    """The row that is best, if a test says so against every other row that has finite values."""
    found = compare(rows, higher)
    return found.top if found and found.decided else None
