"""Probabilities of being preferred: what is fitted is what made the labels, and what measures it agrees with scikit-learn."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from flowalign.scoring.calibrate import (
    Link,
    accuracy,
    brier,
    expected_calibration_error,
    fit_link,
    folds_of,
    log_loss,
    logistic,
    ranks,
    reliability,
    resampled,
    win_rate,
    with_intervals,
)
from flowalign.scoring.fusion import PENALTIES, fit_fusion
from flowalign.scoring.ties import Ties, fit_ties
from tests.scoring.tables import bradley_terry


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# ------------------------------------------------------------------------------------------------ links
@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_the_temperature_that_made_the_votes_is_found(temperature: float) -> None:
    d, votes, _ = bradley_terry(20_000, temperature=temperature)
    assert fit_link("temperature", d, votes).temperature == pytest.approx(temperature, rel=0.05)


def test_swapped_labels_turn_the_slope_around_and_leave_a_raw_probability_that_is_worse_than_none() -> None:
    d, votes, _ = bradley_terry(5_000)
    right, wrong = fit_link("temperature", d, votes), fit_link("temperature", d, 1 - votes)
    assert wrong.slope == pytest.approx(-right.slope, rel=1e-9)
    raw = Link("temperature")(d)
    assert expected_calibration_error(raw, votes) < 0.03
    assert expected_calibration_error(raw, 1 - votes) > 0.4
    assert log_loss(raw, 1 - votes) > math.log(2) > log_loss(raw, votes)
    assert accuracy(raw, votes) + accuracy(raw, 1 - votes) == pytest.approx(1)
    assert expected_calibration_error(wrong(d), 1 - votes) < 0.03


def test_the_likeliest_slopes_are_those_of_scikit_learn() -> None:
    d, votes, _ = bradley_terry(800, seed=3)
    votes = np.where(np.arange(800) % 7 == 0, 1.0, votes)  # a liking for the first place
    oracle = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(d[:, None], votes)
    platt = fit_link("platt", d, votes)
    assert (platt.slope, platt.offset) == pytest.approx((oracle.coef_[0, 0], oracle.intercept_[0]), rel=1e-4)
    assert platt.offset > 0.1
    oracle = LogisticRegression(C=np.inf, tol=1e-12, fit_intercept=False).fit(d[:, None], votes)
    assert fit_link("temperature", d, votes).slope == pytest.approx(oracle.coef_[0, 0], rel=1e-4)
    assert platt(0.3) == pytest.approx(sigmoid(platt.slope * 0.3 + platt.offset))


def test_shares_of_votes_are_votes_counted() -> None:
    d = np.array([-1.0, 0.2, 0.9, 2.0])
    shares, judges = np.array([0.2, 0.6, 0.6, 1.0]), 5
    many = np.concatenate([[1.0] * round(share * judges) + [0.0] * round((1 - share) * judges) for share in shares])
    for kind in ("temperature", "platt"):
        one, other = fit_link(kind, d, shares), fit_link(kind, np.repeat(d, judges), many)
        assert (one.slope, one.offset) == pytest.approx((other.slope, other.offset), rel=1e-6)


def test_isotonic_is_scikit_learns_on_the_pairs_and_the_same_pairs_exchanged() -> None:
    d, votes, _ = bradley_terry(400, seed=1)
    d = np.round(d, 1) * np.where(np.arange(400) % 2, 1.0, 1 + 1e-15)  # equal differences, up to their last bits
    assert len(np.unique(d)) > len(np.unique(np.round(d, 6)))
    both, labels = np.concatenate([d, -d]), np.concatenate([votes, 1 - votes])
    oracle = IsotonicRegression(y_min=1 / 402, y_max=401 / 402, out_of_bounds="clip").fit(np.round(both, 6), labels)
    link = fit_link("isotonic", d, votes)
    grid = np.concatenate([np.unique(np.round(both, 6)), np.linspace(-9, 9, 301)])
    assert link(grid) == pytest.approx(oracle.predict(grid), abs=1e-9)
    assert link(grid) + link(-grid) == pytest.approx(1)
    assert (np.diff(link(np.sort(grid))) >= -1e-12).all()
    assert len(link.knots) < len(np.unique(both))
    assert 0 < link(-100) < link(100) < 1


def test_labels_that_separate_perfectly_give_a_steep_link_and_no_failure() -> None:
    d = np.array([-2.0, -1.0, 1.0, 2.0])
    for kind in ("temperature", "platt"):
        probability = fit_link(kind, d, (d > 0).astype(float))(d)
        assert np.isfinite(probability).all()
        assert probability == pytest.approx([0, 0, 1, 1], abs=1e-4)


@pytest.mark.parametrize("kind", ["temperature", "platt", "isotonic"])
def test_differences_without_a_score_stay_without_a_probability(kind: str) -> None:
    link = fit_link(kind, [-1.0, 0.5, 2.0, -0.3], [0.0, 1.0, 1.0, 0.5])
    assert np.isnan(link([np.nan, 1.0])).tolist() == [True, False]


def test_constant_scores_say_nothing() -> None:
    for kind in ("temperature", "platt", "isotonic"):
        assert fit_link(kind, np.zeros(10), np.array([1.0, 0.0] * 5))(np.zeros(3)) == pytest.approx([0.5] * 3)


def test_unknown_links_are_refused() -> None:
    with pytest.raises(ValueError, match="'beta'; allowed: temperature, platt, isotonic"):
        fit_link("beta", [1.0], [1.0])


# ------------------------------------------------------------------------------------------------ ties
@pytest.mark.parametrize(("kind", "width"), [("rao_kupper", 0.4), ("rao_kupper", 1.5), ("davidson", 0.3), ("davidson", 2.0)])
def test_the_law_of_ties_that_made_the_labels_is_found(kind: str, width: float) -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0, 3, 20_000)
    law = Ties(kind, 0.7, width)
    drawn = (rng.random((len(d), 1)) > law(d).cumsum(1)[:, :2]).sum(1)
    found = fit_ties(kind, d, np.array([1.0, 0.5, 0.0])[drawn])
    assert (found.slope, found.width) == pytest.approx((0.7, width), rel=0.08)


def test_laws_of_ties_are_the_formulas() -> None:
    for d in (-2.0, 0.0, 0.3, 5.0):
        for theta in (1.0, 1.7, 6.0):
            a, b = math.exp(0.7 * d), 1.0
            win, loss = a / (a + theta * b), b / (b + theta * a)
            assert Ties("rao_kupper", 0.7, math.log(theta))(d) == pytest.approx([win, 1 - win - loss, loss], abs=1e-12)
        for nu in (0.0, 0.4, 3.0):
            total = a + b + nu * math.sqrt(a * b)
            law = Ties("davidson", 0.7, nu)
            assert law(d) == pytest.approx([a / total, nu * math.sqrt(a * b) / total, b / total], abs=1e-12)
            assert law.preferred(d) == pytest.approx((a + 0.5 * nu * math.sqrt(a * b)) / total)


def test_without_differences_the_share_of_ties_is_the_laws() -> None:
    """At d = 0 Rao and Kupper give (θ − 1)/(θ + 1) ties and Davidson ν/(2 + ν): both invert to the share that is there."""
    outcome = np.array([1.0] * 30 + [0.0] * 30 + [0.5] * 40)
    d = np.zeros(100)
    assert fit_ties("rao_kupper", d, outcome)(0.0)[1] == pytest.approx(0.4, abs=1e-4)
    assert fit_ties("rao_kupper", d, outcome).width == pytest.approx(math.log(1.4 / 0.6), rel=1e-3)
    assert fit_ties("davidson", d, outcome).width == pytest.approx(0.8 / 0.6, rel=1e-3)


def test_a_law_of_ties_leaves_the_temperature_unspoilt_by_them() -> None:
    """Ties counted as halves pull the temperature up; a law of ties explains them."""
    rng = np.random.default_rng(1)
    d = rng.normal(0, 2, 20_000)
    drawn = (rng.random((len(d), 1)) > Ties("rao_kupper", 1.0, 1.2)(d).cumsum(1)[:, :2]).sum(1)
    labels = np.array([1.0, 0.5, 0.0])[drawn]
    assert fit_ties("rao_kupper", d, labels).slope == pytest.approx(1.0, rel=0.05)
    assert fit_link("temperature", d, labels).slope < 0.85


# ------------------------------------------------------------------------------------------------ win rates
def test_win_rates_are_the_mean_of_sigmoids() -> None:
    scores, tau = [0.3, -1.0, 2.0, 0.3], 0.7
    link = Link("temperature", slope=1 / tau)
    expected = [
        sum(sigmoid((a - b) / tau) for j, b in enumerate(scores) if j != i) / (len(scores) - 1) for i, a in enumerate(scores)
    ]
    assert win_rate(scores, link) == pytest.approx(expected)
    assert win_rate(scores, link).mean() == pytest.approx(0.5)
    base = [1.0, 0.0]
    against = [sum(sigmoid((a - b) / tau) for b in base) / 2 for a in scores]
    assert win_rate(scores, link, base) == pytest.approx(against)


def test_at_temperature_0_win_rates_are_ranks() -> None:
    scores = np.array([0.3, -1.0, 2.0, 0.3, 0.1])
    expected = [Fraction(5, 8), 0, 1, Fraction(5, 8), Fraction(1, 4)]
    assert win_rate(scores, ranks) == pytest.approx([float(each) for each in expected])
    assert win_rate(scores, Link("temperature", slope=1e9)) == pytest.approx(win_rate(scores, ranks))
    assert win_rate(scores, Link("temperature", slope=0.0)) == pytest.approx([0.5] * 5)


def test_pictures_without_a_score_take_no_part() -> None:
    scores = [0.3, np.nan, 2.0]
    found = win_rate(scores, Link("temperature"))
    assert found[[0, 2]] == pytest.approx([sigmoid(-1.7), sigmoid(1.7)])
    assert np.isnan(found[1])
    assert np.isnan(win_rate([1.0], Link("temperature"))).all()
    assert np.isnan(win_rate([1.0, 2.0], Link("temperature"), [])).all()


def test_large_prompts_are_held_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=57)
    whole = win_rate(scores, Link("temperature")), win_rate(scores, Link("temperature"), scores[:9])
    monkeypatch.setattr("flowalign.scoring.calibrate.BLOCK", 200)
    assert np.array_equal(win_rate(scores, Link("temperature")), whole[0])
    assert np.array_equal(win_rate(scores, Link("temperature"), scores[:9]), whole[1])


# ------------------------------------------------------------------------------------------------ how good a probability is
def test_measures_are_those_of_scikit_learn() -> None:
    d, votes, _ = bradley_terry(700, seed=5)
    q = fit_link("platt", d + 0.3, votes)(d * 1.7)
    assert log_loss(q, votes) == pytest.approx(sklearn_log_loss(votes, q))
    assert brier(q, votes) == pytest.approx(brier_score_loss(votes, q))
    assert accuracy(q, votes) == pytest.approx(np.mean((q > 0.5) == (votes > 0.5)))
    for scheme, strategy in (("width", "uniform"), ("mass", "quantile")):
        observed, predicted = calibration_curve(votes, q, n_bins=10, strategy=strategy)
        dots = reliability(q, votes, 10, scheme)
        assert [dot.observed for dot in dots] == pytest.approx(observed.tolist())
        assert [dot.predicted for dot in dots] == pytest.approx(predicted.tolist())
        gap = sum(dot.count * abs(dot.observed - dot.predicted) for dot in dots) / 700
        assert expected_calibration_error(q, votes, 10, scheme) == pytest.approx(gap)


def test_ties_are_half_right() -> None:
    assert accuracy([0.9, 0.5, 0.9, 0.5, 0.2], [1.0, 1.0, 0.5, 0.5, 0.0]) == pytest.approx((1 + 0.5 + 0.5 + 0.5 + 1) / 5)


def test_a_label_of_a_half_costs_what_two_half_labels_cost() -> None:
    assert log_loss([0.8], [0.5]) == pytest.approx(-0.5 * math.log(0.8) - 0.5 * math.log(0.2))
    assert math.isfinite(log_loss([0.0, 1.0], [1.0, 0.0]))
    assert log_loss([0.0, 1.0], [0.0, 1.0]) == pytest.approx(0, abs=1e-9)


def test_equal_probabilities_share_a_bin() -> None:
    dots = reliability([0.3] * 70 + [0.8] * 30, [0.0] * 35 + [1.0] * 65, 10, "mass")
    assert Counter({round(dot.predicted, 9): dot.count for dot in dots}) == {0.3: 70, 0.8: 30}
    assert [dot.observed for dot in dots] == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="equal mass or width"):
        reliability([0.5], [1.0], 10, "log")


def test_bootstrap_samples_are_whole_groups() -> None:
    group = np.array([0, 1, 1, 2, 0, 3])
    seen = Counter()
    for rows in resampled(group, 200, 0):
        counts = Counter(rows.tolist())
        assert counts[0] == counts[4]
        assert counts[1] == counts[2]
        assert len(Counter(group[rows])) <= 4
        seen.update(group[rows].tolist())
    assert seen[1] / sum(seen.values()) == pytest.approx(2 / 6, abs=0.06)


def test_intervals_cover_the_truth_about_as_often_as_they_say_and_grow_where_pairs_of_a_prompt_agree() -> None:
    truth, covered = 0.7, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        votes = (rng.random(150) < truth).astype(float)
        _, low, high = with_intervals(np.full(150, 0.9), votes, range(150), resamples=150, seed=seed)["accuracy"]
        covered += low <= truth <= high
    assert 33 <= covered <= 40
    votes = np.repeat((np.random.default_rng(0).random(30) < truth).astype(float), 10)
    alone = with_intervals(np.full(300, 0.9), votes, range(300), resamples=200)["accuracy"]
    grouped = with_intervals(np.full(300, 0.9), votes, [row // 10 for row in range(300)], resamples=200)["accuracy"]
    assert grouped[2] - grouped[1] > 2 * (alone[2] - alone[1])


def test_the_interval_of_a_small_ece_holds_it() -> None:
    d, votes, prompts = bradley_terry(300, each=2)
    value, low, high = with_intervals(Link("temperature")(d), votes, prompts, resamples=100)["ece"]
    assert low <= value <= high


# ------------------------------------------------------------------------------------------------ fusion
def test_folds_keep_groups_whole_and_even() -> None:
    fold, group = folds_of([f"p{row % 23}" for row in range(200)], 5, 0)
    for each in range(23):
        assert len(set(fold[group == each])) == 1
    assert sorted(Counter(fold[:23]).values()) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_regularised_weights_are_scikit_learns(penalty: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4))
    y = (rng.random(500) < 1 / (1 + np.exp(-x @ [1.0, -0.5, 0.0, 2.0]))).astype(float)
    oracle = LogisticRegression(C=1 / (penalty * 500), fit_intercept=False, tol=1e-12, max_iter=1000).fit(x, y)
    assert logistic(x, y, penalty) == pytest.approx(oracle.coef_[0], rel=1e-3, abs=1e-4)
    assert logistic(x, y, penalty, start=np.full(4, 3.0)) == pytest.approx(logistic(x, y, penalty), rel=1e-6)


def test_a_fusion_finds_the_weights_on_whatever_scales_and_says_how_sure_it_is() -> None:
    rng = np.random.default_rng(2)
    scales, truth = np.array([100.0, 0.01, 1.0]), np.array([1.5, -0.8, 0.0])
    x = rng.normal(size=(4000, 3))
    y = (rng.random(4000) < 1 / (1 + np.exp(-x @ truth))).astype(float)
    prompts = [row // 8 for row in range(4000)]
    fusion, out = fit_fusion(["a", "b", "c"], x * scales, y, prompts, resamples=60)
    assert fusion.weights == pytest.approx(truth, abs=0.12)
    assert fusion.scales == pytest.approx(scales, rel=0.05)
    assert all(low < weight < high for low, weight, high in zip(fusion.low, fusion.weights, fusion.high, strict=True))
    assert fusion.low[2] < 0 < fusion.high[2]
    assert fusion.low[0] > 1
    assert fusion(x * scales) == pytest.approx(1 / (1 + np.exp(-x @ np.array(fusion.weights))), abs=0.02)
    assert (
        log_loss(out.probability, y) < min(log_loss(fit_link("temperature", x[:, k], y)(x[:, k]), y) for k in range(3)) - 0.02
    )


def test_what_is_out_of_fold_saw_nothing_of_its_fold() -> None:
    """Labels of one fold are turned around: models of the others do not notice."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = (x[:, 0] > 0).astype(float)
    prompts = [row // 3 for row in range(300)]
    _, before = fit_fusion(["a", "b"], x, y, prompts, resamples=0)
    turned = np.where(before.fold == 2, 1 - y, y)
    _, after = fit_fusion(["a", "b"], x, turned, prompts, resamples=0)
    held = before.fold == 2
    assert np.array_equal(before.probability[held], after.probability[held])
    assert not np.allclose(before.probability[~held], after.probability[~held])
    expected = [1 / (1 + np.exp(-d @ before.weights[fold])) for d, fold in zip(x, before.fold, strict=True)]
    assert before.probability == pytest.approx(np.array(expected))


def test_rewards_of_noise_are_kept_small() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 30)), rng.integers(0, 2, 60).astype(float)
    fusion, out = fit_fusion([f"r{k}" for k in range(30)], x, y, list(range(60)), resamples=0)
    assert fusion.penalty >= PENALTIES[-2]
    assert log_loss(out.probability, y) < 0.85
