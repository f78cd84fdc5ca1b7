"""Intervals against textbook values, and their coverage against a truth that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tl_tomsparse._intervals import ClusterBootstrap, agreed_interval, difference, holm, proportion_interval


def test_exact_intervals():
    assert proportion_interval(0, 20) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert proportion_interval(20, 20) == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert proportion_interval(7, 20) == pytest.approx((0.1539, 0.5922), abs=1e-4)  # published tables
    assert all(math.isnan(end) for end in proportion_interval(0, 0))


def test_holm():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_estimate_is_the_ratio_of_sums_and_draws_do_not_depend_on_order():
    numerator, denominator = np.array([1.0, -2.0, 0.0, 3.0]), np.array([1.0, 2.0, 0.0, 3.0])
    boot = ClusterBootstrap(4, n_draws=500, seed=3)
    first = boot.ratio(numerator, denominator)
    assert first.value == pytest.approx(2 / 6)
    boot.contrast([(numerator, denominator), (denominator, denominator)])
    again = boot.ratio(numerator, denominator)
    assert (first.low, first.high) == (again.low, again.high)
    other = ClusterBootstrap(4, n_draws=500, seed=3).ratio(numerator, denominator)
    assert (first.low, first.high) == (other.low, other.high)
    contrast = boot.contrast([(numerator, denominator), (denominator, denominator)])
    assert contrast.value == pytest.approx(2 / 6 - 1)


def test_nothing_to_estimate_is_nan():
    empty = ClusterBootstrap(3, n_draws=50).ratio(np.zeros(3), np.zeros(3))
    assert math.isnan(empty.value)
    assert empty.p_differs() == empty.p_within(-1.0, 1.0) == 1.0


def test_no_change_in_a_few_stories_is_no_proof_of_no_change():
    few, many = (ClusterBootstrap(n, n_draws=2000).ratio(np.zeros(n), np.full(n, 2.0)) for n in (10, 400))
    assert few.value == many.value == 0
    assert few.low < -0.1
    assert few.high > 0.1
    assert few.p_within(-0.05, 0.05) > 0.05
    assert -0.03 < many.low < 0 < many.high < 0.03
    assert many.p_within(-0.05, 0.05) < 0.01


def test_samples_that_all_agree_leave_room_for_those_that_were_not_seen():
    for n in (1, 3, 14):
        assert agreed_interval(0.0, n) == pytest.approx(proportion_interval(0, n))
        assert agreed_interval(1.0, n) == pytest.approx(proportion_interval(n, n))
    # The worst truth inside: others, not seen in three draws with a chance of 2.5 %, all have 1 (or none).
    low, high = agreed_interval(0.25, 3)
    others = 1 - 0.025 ** (1 / 3)
    assert (1 - others) ** 3 == pytest.approx(0.025)
    assert (low, high) == pytest.approx((0.25 * (1 - others), 0.25 * (1 - others) + others))
    low, high = agreed_interval(0.0, 5, lowest=-1.0)
    assert -low == high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_p_values_agree_with_the_interval():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2, 0.3, 0.5):
        change = (rng.random(60) < shift).astype(float) * -1
        estimate = ClusterBootstrap(60, n_draws=4000, seed=2).ratio(change, np.ones(60))
        assert (estimate.p_below() <= 0.05) == (estimate.high < 0)
        assert (estimate.p_differs() <= 0.05) == (estimate.high < 0 or estimate.low > 0)
        assert (estimate.p_within(-0.3, 0.3) <= 0.05) == (estimate.low > -0.3 and estimate.high < 0.3)


def test_coverage_with_correlated_questions():
    """Stories of 1 to 4 questions that change together: an interval by question is too narrow."""
    rng = np.random.default_rng(0)
    n_stories, p_fall, runs, covered, naive = 60, 0.3, 300, 0, 0
    for run in range(runs):
        sizes = rng.integers(1, 5, n_stories)
        falls = rng.random(n_stories) < p_fall
        change = -np.array([rng.binomial(m, 0.95 if f else 0.05) for m, f in zip(sizes, falls)], dtype=float)
        truth = -(p_fall * 0.95 + (1 - p_fall) * 0.05)
        estimate = ClusterBootstrap(n_stories, n_draws=500, seed=run).ratio(change, sizes.astype(float))
        covered += estimate.low <= truth <= estimate.high
        share, n = -change.sum() / sizes.sum(), sizes.sum()
        half = 1.96 * math.sqrt(share * (1 - share) / n)
        naive += -share - half <= truth <= -share + half
    assert 0.92 <= covered / runs <= 0.99
    assert naive / runs < 0.88


def test_coverage_of_a_mean_over_random_masks():
    """With members that differ, drawing stories alone is too narrow; drawing members too covers."""
    rng = np.random.default_rng(0)
    n_stories, n_members, runs = 80, 12, 200
    covered = alone = 0
    for run in range(runs):
        rates = np.clip(0.3 + 0.15 * rng.standard_normal(n_members), 0, 1)
        falls = -(rng.random((n_stories, n_members)) < rates).astype(float)
        boot = ClusterBootstrap(n_stories, n_draws=500, seed=run)
        both = boot.ratio(falls, np.ones(n_stories))
        covered += both.low <= -0.3 <= both.high
        stories = boot.ratio(falls.mean(1), np.ones(n_stories))
        alone += stories.low <= -0.3 <= stories.high
    assert covered / runs >= 0.91
    assert alone / runs < 0.8


def test_coverage_of_a_difference_between_two_models():
    """Each with random masks of its own; on the same stories, hard ones hard for both, or on others."""
    rng = np.random.default_rng(0)
    n_stories, n_members, runs, truth = 80, 12, 200, -0.5 + 0.2
    ones, covered, widths = np.ones(n_stories), {"paired": 0, "apart": 0}, {"paired": 0.0, "apart": 0.0}

    def beyond(rate: float, luck: np.ndarray) -> np.ndarray:
        """Right under the mask minus right under each random mask; these differ in what they break."""
        masks = np.clip(0.1 + 0.05 * rng.standard_normal(n_members), 0, 1)
        return (luck[:, None] > rate + 0.1).astype(float) - (rng.random((n_stories, n_members)) > masks)

    for run in range(runs):
        luck = rng.random(n_stories)
        first, second = beyond(0.5, luck), beyond(0.2, luck)
        boot = ClusterBootstrap(n_stories, n_draws=400, seed=run)
        found = {"paired": boot.contrast([(first, ones), (second, ones)], members=[0, 1])}
        other = ClusterBootstrap(n_stories, n_draws=400, seed=10_000 + run)
        elsewhere = beyond(0.2, rng.random(n_stories))
        found["apart"] = difference(boot.ratio(first, ones), other.ratio(elsewhere, ones))
        for name, estimate in found.items():
            covered[name] += estimate.low <= truth <= estimate.high
            widths[name] += estimate.high - estimate.low
    assert all(0.91 <= count / runs <= 0.99 for count in covered.values()), covered
    assert widths["paired"] < 0.85 * widths["apart"]


def test_members_of_another_number_are_drawn_by_themselves():
    ones = np.ones(30)
    first = np.random.default_rng(0).standard_normal((30, 5))
    boot = ClusterBootstrap(30, n_draws=400, seed=0, smooth=False)
    same = boot.contrast([(first, ones), (first, ones)])
    assert same.low == same.high == 0
    assert same.draws.tolist() == boot.contrast([(first, ones), (first, ones)], members=[1, 1]).draws.tolist()
    apart = boot.contrast([(first, ones), (first, ones)], members=[0, 1])
    assert apart.value == 0
    assert apart.low < -0.1 < 0.1 < apart.high
