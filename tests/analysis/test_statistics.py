from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from analysis import stats

LOW = {0: 0.50, 1: 0.512, 2: 0.521}
MIDDLE = {0: 0.503, 1: 0.514, 2: 0.526}
HIGH = {0: 0.60, 1: 0.611, 2: 0.622}


def test_p_values_are_corrected_for_the_number_of_rows() -> None:
    found = stats.compare({"low": LOW, "middle": MIDDLE, "high": HIGH})
    assert found is not None
    assert found.top == "high"
    raw = [stats.p_value(HIGH, other) for other in (LOW, MIDDLE)]
    assert list(found.p_values.values()) == pytest.approx(list(multipletests(raw, method="holm")[1]))


def test_what_one_comparison_would_show_two_need_not() -> None:
    top, near = {0: 0.60, 1: 0.612, 2: 0.619}, {0: 0.55, 1: 0.532, 2: 0.579}
    rows = {"top": top, **{f"near {i}": {s: v - i * 1e-3 for s, v in near.items()} for i in range(4)}}
    assert stats.best({"top": top, "near": near}) == "top"
    assert stats.best(rows) is None
    made = stats.compare(rows)
    assert made is not None
    assert all(p is not None and p > stats.ALPHA for p in made.p_values.values())


def test_a_comparison_that_no_test_can_make_stays_open() -> None:
    made = stats.compare({"high": HIGH, "one seed": {9: 0.1}, "low": LOW})
    assert made is not None
    assert made.p_values["one seed"] is None
    assert not made.decided


def test_the_interquartile_mean_is_scipys_and_its_interval_always_the_same() -> None:
    values = list(np.random.default_rng(1).normal(size=20))
    found = stats.iqm([values])
    assert found.mean == pytest.approx(scipy_stats.trim_mean(values, 0.25))
    assert found.low < found.mean < found.high
    assert found == stats.iqm([values])
    outlier = stats.iqm([[*values[:-1], 1e6]])
    assert abs(outlier.mean) < 2


def test_the_bootstrap_draws_within_each_column() -> None:
    columns = [[c + 0.01 * s for s in range(5)] for c in range(6)]
    within = stats.iqm(columns)
    pooled = stats.iqm([[value for column in columns for value in column]])
    assert within.mean == pytest.approx(pooled.mean)
    assert within.high - within.low < 0.1 * (pooled.high - pooled.low)


@pytest.mark.parametrize("strata", [[[0.5]], [[0.5, 0.6], [0.1]]])
def test_one_value_has_no_interval(strata: list[list[float]]) -> None:
    found = stats.iqm(strata)
    assert math.isfinite(found.mean)
    assert math.isnan(found.low)


def test_equal_values_have_an_interval_without_width() -> None:
    assert stats.iqm([[0.5, 0.5, 0.5]]) == stats.Iqm(3, 0.5, 0.5, 0.5)


def test_nan_is_never_left_out() -> None:
    assert math.isnan(stats.iqm([[0.5, math.nan, 0.6]]).mean)
    assert stats.iqm([]).n == 0


def test_two_seeds_or_equal_differences_are_no_test() -> None:
    assert stats.p_value({0: 0.569, 1: 0.594}, {0: 0.637, 1: 0.662}) is None
    assert stats.p_value({0: 0.1, 1: 0.3, 2: 0.2}, {0: 0.2, 1: 0.4, 2: 0.3}) is None
    assert stats.p_value({0: 0.1, 1: 0.3}, {5: 0.2, 6: 0.4, 7: 0.3}) is None
