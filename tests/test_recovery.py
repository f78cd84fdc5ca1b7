"""Solvers, tests and stopping against planted effects, brute force and plain least squares."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._head_solvers import Solver, step_down
from tl_tomsparse.heads import Knockouts, knockout_design, measure_knockouts
from tl_tomsparse.recovery import recover_heads

GRID = [(layer, head) for layer in range(8) for head in range(8)]
PLANTED = {3: -1.0, 20: -0.7, 33: 0.8, 61: -1.3}
SOLVERS = [
    Solver(),
    Solver("lasso", "bic"),
    Solver("lasso", 0.02),
    Solver("omp"),
    Solver("iht"),
    Solver("iht", 4),
]


def effects_of(planted=PLANTED, n_heads=64):
    effects = np.zeros(n_heads)
    effects[list(planted)] = list(planted.values())
    return effects


def measured(n=120, share=0.1, noise=0.0, planted=PLANTED, seed=0, unedited=5.0, kind="balanced"):
    design = knockout_design(GRID, n, share=share, seed=seed, kind=kind)
    rest = noise * np.random.default_rng(seed).standard_normal(n)
    return Knockouts(design, unedited + design.out @ effects_of(planted) + rest, unedited)


@pytest.mark.parametrize("kind", ["balanced", "stratified", "bernoulli"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: f"{solver.name}-{solver.penalty}")
def test_every_solver_finds_planted_effects(solver, kind):
    knockouts = measured(kind=kind)
    found = solver.effects(knockouts.design.out, knockouts.scores, 0)
    assert set(np.argsort(-np.abs(found))[:4]) == set(PLANTED)
    np.testing.assert_allclose(found, effects_of(), atol=0.05)
    noisy = measured(noise=0.15, kind=kind)
    found = solver.effects(noisy.design.out, noisy.scores, 0)
    assert set(np.argsort(-np.abs(found))[:4]) == set(PLANTED)


def test_chosen_heads_get_least_squares_effects():
    knockouts = measured(noise=0.3)
    found = Solver("lasso", 0.05).effects(knockouts.design.out, knockouts.scores, 0)
    chosen = np.flatnonzero(found)
    x = np.concatenate([np.ones((120, 1)), knockouts.design.out[:, chosen]], 1)
    expected = np.linalg.lstsq(x, knockouts.scores, rcond=None)[0][1:]
    np.testing.assert_allclose(found[chosen], expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["omp", "iht"])
def test_greedy_solvers_find_the_best_subset(name):
    rng = np.random.default_rng(1)
    out = rng.random((300, 9)) < 0.3
    scores = out @ np.array([0, -1, 0, 2, 0, 0, -0.5, 0, 0.2]) + 0.05 * rng.standard_normal(300)

    def left(chosen):
        x = np.concatenate([np.ones((300, 1)), out[:, list(chosen)]], 1)
        return np.linalg.lstsq(x, scores, rcond=None)[1].sum()

    for k in (1, 2, 3):
        found = set(np.flatnonzero(Solver(name, k).effects(out, scores, 0)))
        assert found == set(min(combinations(range(9), k), key=left))


def test_what_does_not_change_has_no_effects():
    knockouts = measured(planted={})
    for solver in SOLVERS:
        assert not solver.effects(knockouts.design.out, knockouts.scores, 0).any()


@pytest.mark.parametrize(
    ("solver", "penalty", "message"),
    [
        ("ridge", "cv", "'ridge'"),
        ("lasso", "aic", "'aic'"),
        ("omp", "bic", "'bic'"),
        ("iht", 1.5, "whole number"),
        ("lasso", 0.0, "above 0"),
    ],
)
def test_solvers_are_refused_by_name(solver, penalty, message):
    with pytest.raises(TomsparseError, match=message):
        recover_heads(measured(), solver=solver, penalty=penalty)


def test_step_down_estimates_are_least_squares_beside_the_found():
    knockouts = measured(noise=0.2)
    tested = step_down(knockouts.design.out, knockouts.scores, level=0.05, n_permutations=299, seed=0)
    assert set(tested.found) == set(PLANTED)
    for head in (3, 5, 40):
        columns = [head, *(other for other in tested.found if other != head)]
        x = np.concatenate([np.ones((120, 1)), knockouts.design.out[:, columns]], 1)
        assert tested.estimate[head] == pytest.approx(np.linalg.lstsq(x, knockouts.scores, rcond=None)[0][1])
    assert (np.abs(tested.estimate - effects_of()) <= tested.half_width).all()
    assert tested.half_width.max() < 0.5


def test_where_nothing_is_nothing_is_found_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    found, covered = 0, 0
    for seed in range(120):
        out = knockout_design(GRID, 40, share=0.1, seed=seed).out
        tested = step_down(out, rng.standard_normal(40), level=0.05, n_permutations=99, seed=seed)
        found += len(tested.found) > 0
        covered += bool((np.abs(tested.estimate) <= tested.half_width).all())
    assert found <= 13  # 6 expected; 14 or more have a chance below 0.003
    assert covered >= 100


def test_step_down_stops_where_nothing_is_left_and_copes_with_odd_columns():
    knockouts = measured()
    out = knockouts.design.out.copy()
    out[:, 7] = out[:, 3]  # always out together: they cannot be told apart, and one is taken
    out[:, 8] = False
    out[:, 9] = True
    tested = step_down(out, 5 + out @ effects_of(), level=0.05, n_permutations=199, seed=0)
    assert len(tested.found) == 4
    assert {3, 7} & set(tested.found)
    assert np.isinf(tested.half_width[[8, 9]]).all()


def test_held_out_r2_is_that_of_predictions_from_the_other_measurements():
    from sklearn.model_selection import KFold

    knockouts = measured(noise=0.5)
    found = recover_heads(knockouts, penalty=0.1, n_bootstrap=2, folds=4, seed=3)
    out, y = knockouts.design.out, knockouts.scores
    rest = total = 0.0
    for train, test in KFold(4, shuffle=True, random_state=3).split(y):
        effects = Solver("lasso", 0.1).effects(out[train], y[train], 3)
        for m in test:
            predicted = y[train].mean() + (out[m].astype(float) - out[train].mean(0)) @ effects
            assert found.predicted[m] == pytest.approx(predicted)
            rest += (y[m] - predicted) ** 2
            total += (y[m] - y[train].mean()) ** 2
    assert found.r2 == pytest.approx(1 - rest / total)
    assert found.r2_low < found.r2 < found.r2_high
    assert found.r2 < 0.9


def test_planted_heads_are_found_and_measurements_are_enough():
    found = recover_heads(measured(noise=0.1))
    assert found.found == [(7, 5), (0, 3), (2, 4), (4, 1)]
    assert found.ranked()[:3] == [(7, 5), (0, 3), (2, 4)]
    assert found.enough
    assert found.r2 > 0.9
    assert found.p <= 0.001
    frame = found.to_frame().set_index(["layer", "head"])
    assert (frame.stability[frame.found] >= 0.8).all()
    row = frame.loc[(7, 5)]
    assert row.low < -1.3 < row.high
    assert row.effect == pytest.approx(-1.3, abs=0.1)
    assert found.intercept == pytest.approx(5.0, abs=0.2)
    assert "L7H5, L0H3" in repr(found)


def test_too_few_measurements_ask_for_more():
    found = recover_heads(measured(n=20, noise=0.1))
    assert not found.enough
    assert found.reason.endswith("measure more.")


def test_noise_is_not_called_an_effect_and_small_effects_are_excluded():
    noisy = measured(noise=1.0, planted={}, unedited=5.0, seed=4)
    found = recover_heads(noisy)
    assert found.found == []
    assert not found.enough
    assert "0.5 would matter: measure more" in found.reason
    assert found.r2_low < 0.1
    quiet = recover_heads(measured(noise=0.01, planted={}, seed=4))
    assert quiet.found == []
    assert quiet.enough
    assert "are excluded" in quiet.reason


@pytest.mark.parametrize("unedited", [5.0, 0.0])
def test_constant_scores_say_so(unedited):
    found = recover_heads(measured(planted={}, unedited=unedited))
    assert found.found == []
    assert found.ranked() == []
    assert found.enough
    assert np.isnan(found.r2)
    assert "the same in all 120 measurements" in found.reason
    moved = recover_heads(Knockouts(measured().design, np.full(120, 2.0), 5.0))
    assert "unedited it is another" in moved.reason


def test_repetitions_are_one_measurement():
    one = measured(n=60, noise=0.3)
    twice = Knockouts(
        dataclasses.replace(one.design, out=np.concatenate([one.design.out, one.design.out])),
        np.concatenate([one.scores + 0.1, one.scores - 0.1]),
        one.unedited,
    )
    expected, found = recover_heads(one), recover_heads(twice)
    np.testing.assert_allclose(found.scores, expected.scores)
    assert found.r2 == pytest.approx(expected.r2)
    assert found.found == expected.found
    # single heads again and again: another one is never predicted by them
    alone = knockout_design(GRID[:24], 120, share=0.04)
    effects = np.random.default_rng(0).standard_normal(24)
    singles = recover_heads(measure_knockouts(lambda out: out @ effects, alone))
    assert len(singles.scores) == 24
    assert singles.r2 < 0.2
    with pytest.raises(TomsparseError, match="4 different measurements"):
        recover_heads(
            measure_knockouts(lambda out: out[:, 0] * 1.0, knockout_design(GRID[:4], 40, share=0.2))
        )


def test_interactions_lower_the_r2_of_additive_effects():
    design = knockout_design(GRID, 150, share=0.2)

    def meter(out):
        return 1.0 - (out[:, 3] ^ out[:, 20])  # each alone breaks it, both together do not

    exclusive = recover_heads(measure_knockouts(meter, design))
    additive = recover_heads(measure_knockouts(lambda out: 1.0 - out[:, 3] - 0.5 * out[:, 20], design))
    assert additive.r2 > 0.99
    assert exclusive.r2 < 0.8


def test_refusals():
    with pytest.raises(TomsparseError, match="9 different measurements are too few"):
        recover_heads(measured(n=9))
    with pytest.raises(TomsparseError, match=r"level=1\.5"):
        recover_heads(measured(), level=1.5)
    with pytest.raises(TomsparseError, match="n_bootstrap=0"):
        recover_heads(measured(), n_bootstrap=0)
