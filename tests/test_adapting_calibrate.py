"""What a classifier's answers are worth: calibration, abstention, wrong labels."""

import json
import math

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, f1_score
from sklearn.metrics import log_loss as their_log_loss

from bigmodel_nb.adapting import calibrate
from bigmodel_nb.adapting.calibrate import (
    abstain_threshold,
    answers,
    bootstrap,
    brier_score,
    calibrated_reference,
    classwise_calibration,
    confused_pairs,
    confusion_matrix,
    coverage_curve,
    expected_calibration_error,
    log_loss,
    macro_f1,
    overconfidence,
    plot_reliability,
    read_predictions,
    reliability,
    suspicious_by_chance,
    suspicious_labels,
    temperature_scale,
)
from bigmodel_nb.headless.run import run
from bigmodel_nb.kit.core import Estimate, Proportion


def expect_calibrate(m):
    assert m["overconfidence"]["low"] > 0.05, "a head that overfits is overconfident"
    error, chance = m["expected_calibration_error"], m["calibrated_reference"]
    assert error["low"] > chance["high"], "more than chance makes of its confidences"
    assert m["temperature"] > 2, "its logits must come down"
    assert m["log_loss_change"]["high"] < 0, "and then the log loss falls on other rows"
    ece = m["ece_before_and_after"]
    assert ece["after"]["high"] < ece["before"]["low"], "so does the ECE"
    by_model = m["overconfidence_by_model"]
    assert by_model["regression, C = 0.01"]["high"] < 0, (
        "strong regularisation makes a classifier underconfident"
    )
    floor = m["ece_of_calibrated"]
    assert floor["100"]["value"] > 0.02 > 0.01 > floor["10000"]["value"], (
        "few rows make a calibrated classifier look miscalibrated"
    )
    broken = m["promises_broken"]
    assert broken["tempting"]["low"] > 0.2, "the tempting threshold breaks its promise"
    assert broken["guaranteed"]["low"] <= 0.05, "the guaranteed one at most as allowed"
    assert m["shift_by_weights"]["balanced"]["low"] > 0, "class weights shift"
    plain, balanced = (m["shift_by_weights"][n] for n in ("plain", "balanced"))
    assert abs(plain["value"]) < balanced["value"] / 2, "what was nearly calibrated"
    planted = m["planted_labels"]
    found, any_row = planted["confident learning"], planted["any row"]
    assert found["precision"]["low"] > 2 * any_row["precision"]["high"], (
        "suspicious rows are wrong far more often than any row"
    )
    assert found["recall"]["value"] > 0.4, "and hold many of the wrong labels"
    plainer, as_many = (
        m["recall_of_the_plainer_rule"],
        planted["as many, lowest probability of the label"],
    )
    assert as_many["rows"] == found["rows"] and plainer["high"] > 0, (
        "a plainer rule is not behind on as many rows"
    )
    by_class = m["difference_by_class"]
    assert by_class["balanced"]["1"]["low"] > 0 > by_class["balanced"]["0"]["high"], (
        "with weights the classes are off in opposite directions"
    )
    assert m["planted_labels_in_sample"]["recall"]["high"] < found["recall"]["low"], (
        "but not where the classifier has learnt the wrong labels"
    )
    assert max(m["largest_differences"].values()) < 1e-6, "scikit-learn and SciPy agree"


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def sample(n=400, classes=3, heat=1.0, seed=0):
    """Logits, and targets drawn from their softmax; the logits then made hotter."""
    g = np.random.default_rng(seed)
    z = 2 * g.normal(size=(n, classes))
    target = (softmax(z).cumsum(1) < g.random((n, 1))).sum(1)
    return z * heat, target


def event(n, seed=0, shift=0.0):
    """Confidences, and whether the answers are right: calibrated but for `shift`."""
    g = np.random.default_rng(seed)
    confidence = 0.5 + 0.5 * g.beta(3, 1.2, n)
    return confidence, g.random(n) < confidence - shift


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


rows = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=n, max_size=n
        ),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
    )
)


def normal(scores):
    scores = np.array(scores)
    return scores / scores.sum(1, keepdims=True)


# temperature


@pytest.mark.parametrize("heat", [0.2, 1.0, 7.0])
def test_temperature_finds_what_heated_the_logits(heat):
    z, target = sample(20_000, heat=heat)
    assert temperature_scale(z, target) == pytest.approx(heat, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_has_the_lowest_loss(seed):
    z, target = sample(150, heat=3, seed=seed)
    found = temperature_scale(z, target)
    loss = lambda b: log_loss(softmax(b * z), target)
    by_scipy = minimize_scalar(loss, bounds=(0.01, 5), method="bounded")
    assert found == pytest.approx(1 / by_scipy.x, rel=1e-4)
    p = softmax(z / found)
    derivative = (p * z).sum(1).mean() - z[np.arange(len(z)), target].mean()
    assert abs(derivative) < 1e-12


def test_temperature_is_scikit_learns():
    z, target = sample(600, classes=4, heat=2)
    fitted = LogisticRegression(C=50).fit(z[:60] + z[1:61], target[:60])
    scaled = CalibratedClassifierCV(FrozenEstimator(fitted), method="temperature")
    scaled.fit(z[60:], target[60:])
    theirs = 1 / scaled.calibrated_classifiers_[0].calibrators[0].beta_
    ours = temperature_scale(fitted.decision_function(z[60:]), target[60:])
    assert ours == pytest.approx(theirs, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(factor=st.floats(1e-6, 1e6), shift=st.floats(-100, 100), seed=st.integers(0, 9))
def test_temperature_goes_with_the_scale_of_the_logits(factor, shift, seed):
    z, target = sample(60, seed=seed)
    found = temperature_scale(z * factor + shift * factor, target)
    assert found == pytest.approx(factor * temperature_scale(z, target), rel=1e-6)


def test_temperature_of_two_classes_takes_one_logit():
    z, target = sample(200, classes=2)
    one = temperature_scale(z[:, 1] - z[:, 0], target)
    assert one == pytest.approx(temperature_scale(z, target), rel=1e-10)


@pytest.mark.parametrize(
    "z, target, words",
    [
        ([[2, 0], [0, 1]], [0, 1], "highest for the true class in every row"),
        ([[2, 0], [0, 1]], [1, 0], "no higher for the true class"),
        ([[1, 1], [3, 3]], [0, 1], "no higher for the true class"),
        ([[1, math.inf], [3, 3]], [0, 1], "logits holds [1.0, inf] in row 0"),
        ([[1, 0], [3, 3]], [0, 2], "target holds 2 in row 1"),
    ],
)
def test_temperature_refuses(z, target, words):
    with pytest.raises(ValueError) as error:
        temperature_scale(z, target)
    one_sentence(error, words, "allowed")


# reliability, and its error


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 20), st.sampled_from(["width", "count"]))
def test_reliability_accounts_for_each_row(given, bins, by):
    p, target = normal(given[0]), np.array(given[1])
    found = reliability(p, target, bins, by)
    confidence, right = answers(p, target)
    assert found["rows"].sum() == len(p) and (found["rows"] > 0).all()
    assert np.isclose(found["rows"] @ found["confidence"], confidence.sum())
    assert np.isclose(found["rows"] @ found["accuracy"], right.sum())
    inside = found["confidence"].between(found["from"] - 1e-9, found["to"] + 1e-9)
    assert inside.all() and len(found) <= bins
    first = found.iloc[0]
    wilson = Proportion.of(round(first["accuracy"] * first["rows"]), first["rows"])
    assert (first["low"], first["high"]) == (wilson.low, wilson.high)
    order = np.random.default_rng(0).permutation(len(p))
    again = reliability(p[order], target[order], bins, by)
    pd.testing.assert_frame_equal(found, again)
    error = expected_calibration_error(p, target, bins, by, draws=20)
    gap = abs(found["accuracy"] - found["confidence"])
    assert error.value == pytest.approx(found["rows"] @ gap / len(p), abs=1e-12)
    assert 0 <= error.low <= error.high


def test_reliability_is_scikit_learns_curve():
    confidence, right = event(300)
    for by, strategy in (("width", "uniform"), ("count", "quantile")):
        shares, means = calibration_curve(
            right, confidence, n_bins=6, strategy=strategy
        )
        found = reliability(confidence, right, 6, by)
        assert np.allclose(
            found["accuracy"], shares, atol=1e-12 if by == "width" else 0.05
        )
        assert np.allclose(
            found["confidence"], means, atol=1e-12 if by == "width" else 0.01
        )


def test_bins_of_equal_counts_keep_equal_confidences_together():
    confidence = np.repeat([0.6, 0.7, 0.9], [50, 5, 5])
    found = reliability(confidence, np.arange(60) % 2, 4, "count")
    assert found["rows"].tolist() == [50, 10] or found["rows"].tolist() == [50, 5, 5]
    spread = reliability(np.linspace(0.5, 1, 100), np.arange(100) % 2, 4, "count")
    assert spread["rows"].tolist() == [25] * 4


def test_a_confidence_on_an_edge_lies_in_the_bin_below():
    found = reliability(np.array([0.0, 0.5, 0.500001, 1.0]), [0, 1, 1, 1], 2)
    assert found["rows"].tolist() == [2, 2]
    assert found[["from", "to"]].values.tolist() == [[0, 0.5], [0.5, 1]]


def test_the_reference_is_what_calibrated_classifiers_show():
    for n, seed in ((60, 1), (600, 2)):
        confidence = event(n, seed)[0]
        told = calibrated_reference(confidence, draws=400)
        g = np.random.default_rng(5)
        found = [
            expected_calibration_error(
                confidence, g.random(n) < confidence, draws=1
            ).value
            for _ in range(200)
        ]
        found = np.array(found)
        assert told.value == pytest.approx(found.mean(), rel=0.1)
        inside = np.mean((told.low <= found) & (found <= told.high))
        assert 0.9 <= inside <= 0.99
    few, many = (calibrated_reference(event(n)[0], draws=100) for n in (50, 5000))
    assert few.value > 0.04 > 0.02 > many.value > 0


@pytest.mark.parametrize("shift, least", [(0.0, 0.92), (0.08, 0.85), (0.25, 0.88)])
def test_the_interval_of_the_error_holds_the_truth(shift, least):
    """A percentile bootstrap holds a true error of 0 never."""
    held = []
    for seed in range(100):
        found = expected_calibration_error(*event(300, seed, shift), draws=150)
        held.append(found.low <= shift <= found.high)
    assert np.mean(held) >= least


def test_the_error_repeats_and_is_an_estimate():
    given = event(200)
    first, again = (expected_calibration_error(*given, draws=50) for _ in range(2))
    assert first == again and type(first) is Estimate and first.n == 200
    assert first != expected_calibration_error(*given, draws=50, seed=1)


def test_overconfidence_is_signed_and_covers():
    shifts = [(s, overconfidence(*event(400, s, 0.1))) for s in range(60)]
    assert 0.85 <= np.mean([e.low <= 0.1 <= e.high for _, e in shifts])
    assert overconfidence(*event(2000, 0, -0.1)).verdict == "less"


def test_a_figure_of_one_and_of_several():
    frame = reliability(*event(100))
    for frames, names in ((frame, 2), ({"a": frame, "b": frame}, 3)):
        made = plot_reliability(frames, "A title")
        assert len(made.legends[0].get_texts()) == names
        plt.close(made)


# proper scores


@settings(max_examples=60, deadline=None)
@given(rows)
def test_scores_are_scikit_learns(given):
    p, target = normal(given[0]), np.array(given[1])
    labels = [0, 1, 2]
    assert log_loss(p, target) == pytest.approx(
        their_log_loss(target, p, labels=labels)
    )
    theirs = brier_score_loss(target, p, labels=labels, scale_by_half=False)
    assert brier_score(p, target) == pytest.approx(theirs)
    one = p[:, 0], target == 0
    two = np.stack([1 - p[:, 0], p[:, 0]], 1), (target == 0).astype(int)
    assert log_loss(*one) == pytest.approx(log_loss(*two))
    assert 2 * brier_score(*one) == pytest.approx(brier_score(*two))
    assert log_loss(p, target, "none").shape == target.shape


def test_log_loss_of_the_impossible_is_infinite():
    assert log_loss([[1.0, 0.0], [0.5, 0.5]], [1, 1]) == math.inf


# answering where sure


@settings(max_examples=60, deadline=None)
@given(rows)
def test_the_curve_counts_what_each_threshold_keeps(given):
    p, target = normal(given[0]), np.array(given[1])
    confidence, right = answers(p, target)
    curve = coverage_curve(p, target)
    assert curve["threshold"].is_monotonic_decreasing and curve["threshold"].is_unique
    for row in curve.itertuples():
        kept = confidence >= row.threshold
        assert row.rows == kept.sum() and row.coverage == kept.mean()
        assert row.accuracy == pytest.approx(right[kept].mean())
        assert row.low <= row.accuracy <= row.high
    assert curve["coverage"].iloc[-1] == 1


def test_the_guarantee_holds_and_the_tempting_threshold_breaks_it():
    world = np.sort(event(200_000)[0])
    beyond = np.cumsum(world[::-1])[::-1] / np.arange(len(world), 0, -1)
    broken = {"guaranteed": 0, "tempting": 0, "kept": 0}
    for seed in range(300):
        given = event(300, seed + 10)
        rule, curve = abstain_threshold(*given, 0.9), coverage_curve(*given)
        tempting = curve["threshold"][curve["accuracy"] >= 0.9].min()
        for name, at in (("guaranteed", rule.threshold), ("tempting", tempting)):
            true = beyond[min(np.searchsorted(world, at), len(world) - 1)]
            broken[name] += true < 0.9
        broken["kept"] += rule.coverage > 0
    assert broken["guaranteed"] <= 0.05 * 300 + 10 and broken["tempting"] > 100
    assert broken["kept"] > 30, "it must answer now and then to show anything"


def test_the_threshold_is_the_last_before_the_first_that_fails():
    """Ten steps of 100 rows; the fourth hundred is wrong, the rest is right again."""
    confidence = np.linspace(1, 0.5, 1000)
    right = np.ones(1000, bool)
    right[300:400] = False
    rule = abstain_threshold(confidence, right, 0.95)
    assert rule.threshold == confidence[299] and rule.coverage == 0.3
    exact = binomtest(300, 300, alternative="greater").proportion_ci(0.95, "exact")
    assert rule.bound == pytest.approx(exact.low, abs=1e-12)
    assert abstain_threshold(confidence, right, 0.7).coverage == 1
    order = np.random.default_rng(0).permutation(1000)
    assert abstain_threshold(confidence[order], right[order], 0.95) == rule


def test_too_few_rows_show_nothing_and_ties_stay_together():
    nowhere = abstain_threshold(np.full(58, 0.9), np.ones(58))
    assert nowhere == (math.inf, 0.0, 0.0)
    enough = abstain_threshold(np.full(59, 0.9), np.ones(59))
    assert enough.threshold == 0.9 and enough.coverage == 1 and enough.bound > 0.95
    surest = np.r_[np.zeros(10), np.ones(990)]  # wrong where it is surest
    assert abstain_threshold(np.linspace(1, 0.5, 1000), surest).threshold == math.inf


# classes


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60
    )
)
def test_macro_f1_is_scikit_learns(rows):
    targets, found = np.array(rows).T
    counts = confusion_matrix(targets, found, 5)
    assert counts.sum() == len(rows) and counts[targets[0], found[0]] >= 1
    assert macro_f1(counts) == pytest.approx(f1_score(targets, found, average="macro"))
    assert macro_f1(np.stack([counts, counts])).shape == (2,)


def test_confusion_takes_booleans():
    assert confusion_matrix(
        np.array([True, True, False]), np.array([True, False, False]), 2
    ).tolist() == [[1, 0], [1, 1]]


def test_bootstrap_covers_as_promised():
    share = lambda counts: counts[..., 0] / counts.sum(-1)
    found = bootstrap(share, np.array([60, 40]), draws=4000)
    half = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert (
        found.value == 0.6
        and found.low == pytest.approx(0.6 - half, abs=0.02)
        and found.high == pytest.approx(0.6 + half, abs=0.02)
    )
    assert found == bootstrap(share, np.array([60, 40]), draws=4000)
    assert type(found) is Estimate and found.n == 100
    sure = bootstrap(share, np.array([50, 0]))
    assert sure.low == sure.high == 1


def test_confused_pairs():
    counts = np.array([[5, 3, 0], [1, 7, 0], [0, 9, 1]])
    pairs = confused_pairs(counts, ["a", "b", "c"], limit=2)
    assert pairs.values.tolist() == [["c", "b", 9, 0.9], ["a", "b", 3, 0.375]]
    assert confused_pairs(np.diag([1, 2]), ["a", "b"]).empty
    json.dumps(pairs.to_dict("records"))


def test_classwise_tells_the_class_that_is_off():
    """The confidence of answers is right on the mean; two classes are not."""
    p = np.tile([0.6, 0.3, 0.1], (1000, 1))
    target = np.repeat([0, 1, 2], [600, 100, 300])
    found = classwise_calibration(p, target, ["a", "b", "c"])
    assert found["class"].tolist() == ["a", "b", "c"]
    assert np.allclose(found["ECE"], [0, 0.2, 0.2], atol=1e-12)
    assert [e.verdict for e in found["difference"]] == [
        "not told apart",
        "more",
        "less",
    ]
    assert overconfidence(p, target).verdict == "not told apart"
    assert found["rows"].tolist() == [600, 100, 300]


# wrong labels


def given_to_cleanlab():
    i = np.arange(40)
    p = np.stack([(7 * i % 11) + 1, (5 * i % 13) + 1, (3 * i % 7) + 1], 1) ** 2.0
    p, target = normal(p), i % 3
    target[::2] = p.argmax(1)[::2]
    return p, target


def test_suspicious_rows_are_those_of_cleanlab():
    """What cleanlab 2.9.0 finds: compute_confident_joint's off-diagonal rows."""
    found = suspicious_labels(*given_to_cleanlab())
    assert sorted(found["row"]) == GIVEN_BY_CLEANLAB
    count = pytest.importorskip("cleanlab.count", reason="cleanlab is not installed")
    for seed in range(50):
        g = np.random.default_rng(seed)
        p = g.dirichlet(np.ones(4) * 0.6, 80)
        target = np.where(g.random(80) < 0.6, p.argmax(1), g.integers(0, 4, 80))
        target[:4] = range(4)
        theirs = count.compute_confident_joint(
            target, p, return_indices_of_off_diagonals=True, calibrate=False
        )[1]
        assert sorted(suspicious_labels(p, target)["row"]) == sorted(theirs)


def test_labels_that_are_right_are_suspicious_as_often_as_is_said():
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(4, 0.4), 500)
    usual = suspicious_by_chance(p, draws=400)
    assert 0 < usual.low < usual.value < usual.high < usual.n == 500
    others = generator.random((1000, 500, 1))
    labels = (p.cumsum(1)[:, :-1] < others).sum(2)
    found = np.array([len(suspicious_labels(p, each)) for each in labels])
    inside = ((usual.low <= found) & (found <= usual.high)).mean()
    assert 0.92 < inside < 0.98 and abs(found.mean() - usual.value) < 1
    wrong = (labels[0] + 1) % 4
    assert len(suspicious_labels(p, wrong)) > usual.high, "wrong labels are more"
    assert suspicious_by_chance(p, draws=400) == usual, "the seed decides"
    assert suspicious_by_chance(np.eye(3)).value == 0, "who is sure has none"
    with pytest.raises(ValueError, match="draws is 0; allowed"):
        suspicious_by_chance(p, draws=0)
    for bad in (p[:, 0], p[:0], p + 0.1, 0.3):
        with pytest.raises(ValueError, match="^probabilities .*; allowed "):
            suspicious_by_chance(bad)


def test_suspicious_rows_are_sorted_and_named():
    p, target = given_to_cleanlab()
    found = suspicious_labels(p, target)
    assert (found["target"] == target[found["row"]]).all()
    assert (found["suggested"] != found["target"]).all()
    assert np.allclose(found["given"], p[found["row"], found["target"]])
    assert np.allclose(found["other"], p[found["row"], found["suggested"]])
    assert (found["given"] - found["other"]).is_monotonic_increasing


def test_a_class_without_rows_is_never_suggested_and_none_may_be_suspicious():
    p = np.array([[0.5, 0.1, 0.4], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    assert set(suspicious_labels(p, [0, 1, 0])["suggested"]) <= {0, 1}
    sure = suspicious_labels(np.eye(3)[[0, 1, 2]], [0, 1, 2])
    assert sure.empty and list(sure.columns)[:3] == ["row", "target", "suggested"]


def test_a_threshold_of_its_own_finds_a_class_that_is_never_sure():
    """A row of a hesitant class with another label, which argmax does not give it."""
    p = np.array([[0.55, 0.45]] * 5 + [[0.9, 0.1]] * 10 + [[0.55, 0.45]])
    target = np.array([1] * 5 + [0] * 10 + [0])
    assert suspicious_labels(p, target)["row"].tolist() == [15]


# what is given


GIVEN_BY_CLEANLAB = [1, 5, 13, 15, 17, 23, 27, 29, 33, 35, 37]
EACH = {
    "answers": answers,
    "overconfidence": overconfidence,
    "reliability": reliability,
    "expected_calibration_error": expected_calibration_error,
    "log_loss": log_loss,
    "brier_score": brier_score,
    "coverage_curve": coverage_curve,
    "abstain_threshold": abstain_threshold,
    "classwise_calibration": classwise_calibration,
    "suspicious_labels": suspicious_labels,
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    "p, target, words",
    [
        ([[0.5, 0.6]], [0], "probabilities sum to 1.1 in row 0"),
        (
            [[0.5, 0.5], [math.nan, 1]],
            [0, 1],
            "probabilities holds [nan, 1.0] in row 1",
        ),
        ([[-0.5, 1.5]], [0], "probabilities holds [-0.5, 1.5] in row 0"),
        ([[0.5, 0.5]], [2], "target holds 2 in row 0"),
        ([[0.5, 0.5]], [-1], "target holds -1 in row 0"),
        ([[0.5, 0.5]], [0.5], "target holds 0.5 in row 0"),
        ([[0.5, 0.5]], [math.nan], "target holds nan in row 0"),
        ([[0.5, 0.5]], [0, 1], "has the shape (1, 2) and target (2,)"),
        (np.zeros((0, 2)), [], "at least one row"),
        ([[1.0]], [0], "at least one row and two classes"),
        ([[[0.5, 0.5]]], [0], "allowed are (row, class) or (row,)"),
        ([[0.5, 0.5], [1.0]], [0, 1], "rows of different lengths"),
    ],
)
def test_bad_rows_are_told_in_a_sentence(name, p, target, words):
    with pytest.raises(ValueError) as error:
        EACH[name](p, target)
    one_sentence(error, words, "allowed")


@pytest.mark.parametrize("name", EACH)
def test_labels_that_are_words_are_told(name):
    with pytest.raises(TypeError) as error:
        EACH[name]([[0.5, 0.5]], ["yes"])
    one_sentence(error, "target holds 'yes'", "encode_labels")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p, y: reliability(p, y, 0), "bins is 0"),
        (lambda p, y: reliability(p, y, by="size"), "by is 'size'"),
        (lambda p, y: expected_calibration_error(p, y, draws=0), "draws is 0"),
        (lambda p, y: log_loss(p, y, "sum"), "reduction is 'sum'"),
        (lambda p, y: abstain_threshold(p, y, 1.0), "accuracy is 1.0"),
        (lambda p, y: abstain_threshold(p, y, level=0), "level is 0"),
        (lambda p, y: abstain_threshold(p, y, "0.9"), "accuracy is '0.9'"),
        (lambda p, y: classwise_calibration(p, y, ["a"]), "labels has 1 entries"),
        (lambda p, y: classwise_calibration(p[:, 0], y == 0), "(row, class)"),
        (lambda p, y: suspicious_labels(p[:, 0], y == 0), "(row, class)"),
        (lambda p, y: reliability(p[:, 0], 2 * (y > 0)), "target holds 2"),
        (lambda p, y: overconfidence(p[:1], y[:1]), "probabilities has one row"),
        (lambda p, y: calibrate.calibrated_reference(0.5), "has the shape ()"),
        (lambda p, y: plot_reliability({}, "title"), "frames holds 0 tables"),
        (lambda p, y: plot_reliability(pd.DataFrame(p), "title"), "1 tables, 0 fit"),
        (lambda p, y: confusion_matrix(y - 1, y, 3), "targets holds -1"),
        (lambda p, y: confusion_matrix(y, y + 0.5, 3), "predicted holds"),
        (lambda p, y: confusion_matrix(y, y[:3], 3), "predicted (3,)"),
        (lambda p, y: confusion_matrix(y, y, 0), "classes is 0"),
        (lambda p, y: confused_pairs(np.ones((3, 3)), ["a"]), "labels 1 entries"),
        (lambda p, y: macro_f1(np.zeros((2, 2))), "sums to 0"),
        (lambda p, y: macro_f1(np.ones((2, 3))), "counts has the shape (2, 3)"),
        (lambda p, y: bootstrap(macro_f1, np.zeros((2, 2))), "sums to 0"),
        (lambda p, y: bootstrap(macro_f1, 0.3 * np.eye(2)), "whole numbers"),
        (lambda p, y: bootstrap(macro_f1, np.eye(2), draws=0), "draws is 0"),
    ],
)
def test_options_are_checked(call, words):
    z, target = sample(30)
    with pytest.raises(ValueError) as error:
        call(softmax(z), target)
    one_sentence(error, words, "allowed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_taken_as_arrays(dtype):
    z, target = sample(80)
    scores = torch.tensor(z, dtype=dtype, requires_grad=True)
    p = scores.softmax(1)
    plain, marks = p.detach().double().numpy(), torch.tensor(target)
    for name, function in EACH.items():
        there, here = function(p, marks), function(plain, target)
        assert str(there) == str(here), name
    assert temperature_scale(scores, marks) == temperature_scale(
        scores.detach().numpy(), target
    )
    assert reliability(p.bfloat16(), marks)["rows"].sum() == 80


# a table of predictions


def a_table(names=("no", "yes", "maybe"), prefix="p_", n=240, seed=0):
    z, target = sample(n, len(names), heat=3, seed=seed)
    p = softmax(z)
    table = pd.DataFrame(p, columns=[prefix + each for each in names])
    table.insert(0, "truth", [names[each] for each in target])
    return table, p, target


@pytest.mark.parametrize("prefix", ["p_", "", "probability of "])
@pytest.mark.parametrize(
    "names", [("no", "yes", "maybe"), ("0", "1", "10"), ("a", "aa")]
)
def test_columns_of_classes_are_found(prefix, names):
    table, p, target = a_table(names, prefix)
    found = read_predictions(table.astype(str), "truth")
    assert sorted(found.labels) == sorted(names)
    order = [found.labels.index(each) for each in names]
    assert np.allclose(found.probabilities[:, order], p)
    assert [found.labels[each] for each in found.target] == table["truth"].tolist()
    assert found.rows.tolist() == list(range(len(table)))


def test_a_class_that_no_row_has_keeps_its_column():
    table, p, _ = a_table()
    table = table[table["truth"] != "maybe"]
    found = read_predictions(table, "truth")
    assert sorted(found.labels) == ["maybe", "no", "yes"]
    assert found.probabilities.shape == (len(table), 3)


@pytest.mark.parametrize("prefix", ["", "p_"])
def test_columns_that_are_no_class_are_passed_over(prefix):
    table, p, _ = a_table(prefix=prefix)
    table = table[table["truth"] != "maybe"].reset_index(drop=True)
    table["text"], table["length"] = "some text", 7
    found = read_predictions(table.astype(str), "truth")
    assert found.labels == ["maybe", "no", "yes"]


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(
        st.text("abcxyz0123-é", min_size=1, max_size=4),
        min_size=2,
        max_size=4,
        unique=True,
    ),
    prefix=st.sampled_from(["p_", "P(class) ", "probability "]),
)
def test_a_table_is_read_as_it_was_written(names, prefix):
    table, p, target = a_table(names, prefix, n=60)
    found = read_predictions(table.astype(str), "truth")
    assert sorted(found.labels) == sorted(names)
    order = [found.labels.index(each) for each in names]
    assert np.allclose(found.probabilities[:, order], p)
    assert [found.labels[each] for each in found.target] == table["truth"].tolist()


def test_a_column_twice_is_refused():
    table = pd.DataFrame([["a", 1.0, 0.0, "b"]], columns=["truth", "a", "b", "truth"])
    with pytest.raises(ValueError) as error:
        read_predictions(table, "truth")
    one_sentence(error, "label is 'truth', as several columns are called", "allowed")


def test_rows_without_a_label_are_left_out():
    table, *_ = a_table(n=40)
    table.loc[[3, 7], "truth"] = None
    found = read_predictions(table, "truth")
    assert len(found.target) == 38 and not {3, 7} & set(found.rows)


def test_predictions_with_a_confidence():
    table, p, target = a_table()
    chosen = p.argmax(1)
    table["said"] = np.array(["no", "yes", "maybe"])[chosen]
    table["sure"] = p.max(1)
    form = {"prediction": "said", "confidence": "sure"}
    found = read_predictions(table, "truth", **form)
    assert np.allclose(found.probabilities, p.max(1))
    assert (found.target == (chosen == target)).all()
    two, p, target = a_table(("no", "yes"))
    two["said"], two["sure"] = np.array(["no", "yes"])[p.argmax(1)], p.max(1)
    both = read_predictions(two, "truth", **form)
    assert np.allclose(both.probabilities, p) and (both.target == target).all()


def test_decimal_commas_and_whole_labels_are_read():
    table = pd.DataFrame(
        {
            "truth": [1.0, 0.0, None],
            "0": ["0,25", "0,5", "1"],
            "1": ["0,75", "0,5", "0"],
        }
    )
    found = read_predictions(table, "truth")
    assert found.labels == ["0", "1"] and found.target.tolist() == [1, 0]
    assert found.probabilities.tolist() == [[0.25, 0.75], [0.5, 0.5]]


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, {"label": "trth"}, "did you mean 'truth'"),
        (
            {"truth": "perhaps"},
            {},
            "label holds 'perhaps', and the table has no column",
        ),
        ({"p_no": 2.0}, {}, "column 'p_no' holds 2.0 in row 1"),
        ({"p_no": "much"}, {}, "column 'p_no' holds much in row 1"),
        ({"p_no": 0.9, "p_yes": 0.9}, {}, "probabilities sum to"),
        ({"p_no": None}, {}, "column 'p_no' holds"),
        ({}, {"prediction": "truth"}, "prediction is given alone"),
        ({}, {"confidence": "p_no"}, "confidence is given alone"),
        (
            {"said": "no"},
            {"prediction": "said", "confidence": "sure"},
            "confidence is 'sure'",
        ),
        ({"truth": None}, {}, "no row has one"),
        (
            {"q_no": 0.2, "q_yes": 0.3, "q_maybe": 0.5},
            {},
            "begin with 'p_' and with 'q_'; allowed is prefix",
        ),
        ({}, {"prefix": "q_"}, "no column 'q_"),
        ({}, {"prediction": "truth", "confidence": "p_no"}, "three different columns"),
        (
            {"said": "no"},
            {"prediction": "said", "confidence": "p_no", "prefix": "p_"},
            "prefix and prediction are both given",
        ),
        (
            {"said": None},
            {"prediction": "said", "confidence": "p_no"},
            "column 'said' is empty in row 1",
        ),
    ],
)
def test_tables_that_cannot_be_read_are_told(change, options, words):
    table, *_ = a_table(n=30)
    table = table.astype(object).assign(**change)
    with pytest.raises(ValueError) as error:
        read_predictions(table, **{"label": "truth"} | options)
    one_sentence(error, words)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 19), st.integers(0, 19))
def test_a_row_is_told_by_its_number_in_the_table(empty, bad):
    "Also where rows without a label come before it."
    table = pd.DataFrame({"label": ["no", "yes"] * 11, "p_no": 0.5, "p_yes": 0.5})
    table.loc[empty, "label"] = None
    table.loc[bad, "p_no"] = 0.75
    if empty == bad:  # what has no label is not read
        assert len(read_predictions(table).rows) == 21
        return
    with pytest.raises(ValueError) as error:
        read_predictions(table)
    one_sentence(error, f"sum to 1.25 in row {bad + 1};", "allowed")


def outputs(done):
    cells = nbformat.read(done.notebook, as_version=4).cells
    return json.dumps([c.outputs for c in cells if c.cell_type == "code"])


def test_a_report_on_a_table_of_predictions(tmp_path):
    table, p, target = a_table(n=600)
    table["note"] = [f"note {each}" for each in range(len(table))]
    table.to_csv(tmp_path / "predictions.csv", index=False)
    given = {"data": tmp_path / "predictions.csv", "label": "truth", "text": "note"}
    done = run("adapting/calibrate", out=tmp_path / "run", **given)
    m = done.metrics
    assert m["verdict"].startswith("Overconfident: on 600 rows")
    assert m["overconfidence"]["value"] == pytest.approx(
        overconfidence(p, target).value
    )
    assert 2 < m["temperature"] < 4.5 and m["log_loss_change"]["high"] < 0
    scaled = softmax(np.log(p) / m["temperature"])
    suspects = suspicious_labels(scaled, target)
    assert m["suspicious_labels"] == len(suspects)
    chance = m["suspicious_by_chance"]
    assert chance["low"] <= len(suspects) <= chance["high"], "no label is wrong here"
    text = outputs(done)
    assert f"note {suspects['row'][0]}" in text and "promises_broken" not in m
    for absent in ("Reviews:", "telecom", "Nothing to check yet"):
        assert absent not in text, absent


def test_a_report_on_answers_with_a_confidence(tmp_path):
    table, p, target = a_table(n=300)
    table["said"] = np.array(["no", "yes", "maybe"])[p.argmax(1)]
    table["sure"] = p.max(1)
    table[["truth", "said", "sure"]].to_csv(tmp_path / "answers.csv", index=False)
    given = {"data": tmp_path / "answers.csv", "label": "truth"}
    given |= {"prediction": "said", "confidence": "sure"}
    m = run("adapting/calibrate", out=tmp_path / "run", **given).metrics
    assert m["temperature"] is None and m["suspicious_labels"] is None
    assert m["overconfidence"]["value"] == pytest.approx(
        overconfidence(p, target).value
    )


def test_the_module_has_what_finetune_had():
    for name in ("confusion_matrix", "macro_f1", "bootstrap", "confused_pairs"):
        assert name in calibrate.__all__
