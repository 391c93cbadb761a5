"""Chapter 5: which rows to label next, on small sets of points."""

import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import SelfTrainingClassifier

from bigmodel_nb.adapting.labels import (
    HOW,
    choose,
    cross_validated,
    curve_gain,
    draw_with_chances,
    fit_linear,
    importance_weights,
    label_curve,
    label_rounds,
    labels_saved,
    partly_labelled,
    pseudo_label,
    split_pool,
    tune,
    uncertainty,
)
from bigmodel_nb.headless.run import RunFailed, run


def blobs(rows=120, classes=3, width=4, spread=0.7, seed=0):
    "Vectors around a centre for each class, and the classes."
    draw = np.random.default_rng(seed)
    target = np.arange(rows) % classes
    centres = 2 * draw.normal(size=(classes, width))
    return centres[target] + spread * draw.normal(size=(rows, width)), target


def likelihoods(rows, classes=3, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), rows)


# what is chosen


@settings(deadline=None, max_examples=60)
@given(
    how=st.sampled_from(HOW),
    rows=st.integers(2, 30),
    data=st.data(),
    copies=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_choice_is_of_rows_without_a_label(how, rows, data, copies, seed):
    known = data.draw(
        st.lists(st.integers(0, rows - 1), unique=True, max_size=rows - 1)
    )
    count = data.draw(st.integers(1, rows - len(known)))
    vectors = np.random.default_rng(seed).normal(size=(rows, 3))
    if copies:
        vectors[:] = vectors[0]
    likely = np.full((rows, 3), 1 / 3) if copies else likelihoods(rows, seed=seed)
    found = choose(vectors, known, count, how, likely, seed)
    assert len(set(found.tolist())) == count
    assert not set(found.tolist()) & set(known)
    assert 0 <= found.min() <= found.max() < rows
    again = choose(vectors, known, count, how, likely, seed)
    assert (found == again).all(), "a seed repeats"


@pytest.mark.parametrize("how", ["margin", "entropy", "least"])
def test_the_least_sure_come_first(how):
    likely = likelihoods(50, 4)
    ordered = np.sort(likely, 1)
    by_hand = {
        "margin": [a - b for a, b in zip(ordered[:, -1], ordered[:, -2])],
        "entropy": [-entropy(each) for each in likely],
        "least": [each.max() for each in likely],
    }[how]
    left = [row for row in np.argsort(by_hand) if row not in (3, 7)]
    found = choose(np.zeros((50, 2)), [3, 7], 12, how, likely)
    assert found.tolist() == left[:12]


def test_strategies_differ_where_they_should():
    likely = np.array([[0.5, 0.5, 0.0], [0.4, 0.35, 0.25], [0.9, 0.05, 0.05]])
    first = {how: uncertainty(likely, how).argmax() for how in ("margin", "entropy")}
    assert first == {"margin": 0, "entropy": 1}


def test_chance_is_even_and_needs_no_classifier():
    vectors = np.zeros((10, 2))
    drawn = [choose(vectors, [0, 1], 2, "random", seed=each) for each in range(2000)]
    counts = np.bincount(np.ravel(drawn), minlength=10)
    assert (counts[:2] == 0).all() and 400 < counts[2:].min() <= counts.max() < 600


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3))
def test_k_centre_is_at_most_twice_the_best_radius(seed, count):
    points = np.random.default_rng(seed).normal(size=(9, 2))
    apart = np.linalg.norm(points[:, None] - points, axis=2)

    def radius(centres):
        return apart[:, list(centres)].min(1).max()

    found = choose(points, [0], count, "k_center")
    best = min(radius([0, *each]) for each in combinations(range(1, 9), count))
    assert radius([0, *found]) <= 2 * best + 1e-9
    known, by_hand = [0], []
    for _ in range(count):  # the greedy choice itself
        by_hand.append(int(apart[:, known].min(1).argmax()))
        known.append(by_hand[-1])
    assert found.tolist() == by_hand


def test_badge_draws_as_k_means_plus_plus_on_the_gradients_of_autograd():
    vectors = np.random.default_rng(0).normal(size=(40, 5))
    layer = torch.nn.Linear(5, 3).double()
    likely = torch.softmax(layer(torch.from_numpy(vectors)), 1).detach().numpy()
    gradients = []
    for row in torch.from_numpy(vectors):
        logits = layer(row)
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax())
        gradients.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
    gradients = torch.stack(gradients).numpy()[4:]
    for seed in range(20):
        draw, taken = np.random.default_rng(seed), []
        taken.append(int((gradients**2).sum(1).argmax()))
        while len(taken) < 8:
            square = ((gradients[:, None] - gradients[taken]) ** 2).sum(2).min(1)
            taken.append(int(draw.choice(36, p=square / square.sum())))
        found = choose(vectors, [0, 1, 2, 3], 8, "badge", likely, seed)
        assert (found - 4).tolist() == taken


def test_badge_passes_over_copies():
    vectors = np.repeat(np.random.default_rng(1).normal(size=(6, 4)), 5, axis=0)
    likely = np.repeat(likelihoods(6), 5, axis=0)
    found = choose(vectors, [], 6, "badge", likely)
    assert len(set((found // 5).tolist())) == 6
    assert len(set((choose(vectors, [], 6, "margin", likely) // 5).tolist())) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"how": "best"}, "how is 'best'"),
        ({"vectors": np.zeros(4)}, "vectors has the shape (4,)"),
        ({"vectors": np.full((4, 2), np.nan)}, "finite"),
        ({"labelled": [0.5]}, "labelled is an array"),
        ({"labelled": [9]}, "labelled holds 9"),
        ({"labelled": [-1]}, "labelled holds -1"),
        ({"count": 0}, "count is 0"),
        ({"count": 4}, "count is 4, and 3 rows"),
        ({"probabilities": None}, "probabilities has the shape None"),
        ({"probabilities": np.ones((3, 2))}, "with 4 rows"),
        ({"probabilities": np.ones((4, 1))}, "two classes"),
        ({"probabilities": -np.ones((4, 2))}, "below 0"),
    ],
)
def test_choose_refuses(change, words):
    usual = {
        "vectors": np.eye(4),
        "labelled": [0],
        "count": 1,
        "how": "margin",
        "probabilities": np.full((4, 2), 0.5),
    }
    choose(**usual)
    with pytest.raises(ValueError) as caught:
        choose(**usual | change)
    assert words in str(caught.value) and "allowed" in str(caught.value)


# bad input gets a sentence


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda x, y: list(label_rounds(x, y, "margin", 0)), "start is 0"),
        (lambda x, y: list(label_rounds(x, y, "margin", 99)), "start is 99, stop 200"),
        (lambda x, y: label_curve(x, y, "best"), "how is 'best'"),
        (lambda x, y: label_curve(x, y, start=30, stop=10), "start is 30, stop 10"),
        (lambda x, y: label_curve(x, y, held=1.0), "held is 1.0"),
        (lambda x, y: label_curve(x, y, start=99), "target has 60 rows"),
        (lambda x, y: label_curve(x, y[:9]), "vectors and target have the shapes"),
        (lambda x, y: label_curve(x, y.astype(str)), "target holds"),
        (lambda x, y: pseudo_label(x, y, [0, 99]), "labelled holds 0 to 99"),
        (lambda x, y: uncertainty(np.ones(3)), "probabilities has the shape (3,)"),
        (lambda x, y: uncertainty(np.ones((3, 1))), "probabilities has the shape"),
        (lambda x, y: tune(x, y, folds=1), "folds is 1"),
        (lambda x, y: tune(x, y, ()), "folds is 3"),
        (lambda x, y: fit_linear(x, y * 0), "target holds one class"),
        (lambda x, y: fit_linear(x, y, 0), "strength is 0"),
        (lambda x, y: cross_validated(x, y, (2.0,)), "shares is (2.0,)"),
        (lambda x, y: importance_weights(np.ones((2, 2)), 5), "chances has 2 entries"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    vectors, target = blobs(60)
    with pytest.raises(ValueError) as caught:
        call(vectors, target)
    assert str(caught.value).startswith(said) and "allowed" in str(caught.value)
    assert "\n" not in str(caught.value)


# what it brings


def test_draws_are_the_same_for_all_strategies():
    vectors, target = blobs()
    sizes = {"start": 6, "step": 6, "stop": 30, "draws": 3}
    curve = label_curve(vectors, target, ("random", "margin", "badge"), **sizes)
    assert sorted(curve["labels"].unique()) == [6, 12, 18, 24, 30]
    first = curve[curve["labels"] == 6].groupby("draw")["accuracy"]
    assert (first.nunique() == 1).all(), "the same first labels and held-out rows"
    alone = label_curve(vectors, target, "margin", **sizes)
    same = curve[curve["how"] == "margin"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, same)
    other = label_curve(vectors, target, "margin", **sizes, seed=1)
    assert not alone["accuracy"].equals(other["accuracy"])


def test_rounds_buy_what_choose_says():
    vectors, target = blobs()
    rounds = list(label_rounds(vectors, target, "margin", 5, 4, 15))
    assert [len(known) for known, _ in rounds] == [5, 9, 13]
    known, fitted = rounds[1]
    wanted = choose(vectors, known, 4, "margin", fitted.predict_proba(vectors))
    assert rounds[2][0][-4:].tolist() == wanted.tolist()


def test_pool_and_held_out_rows_are_disjoint_and_know_two_classes():
    target = np.array([0] * 97 + [1] * 3)
    for seed in range(30):
        held, pool = split_pool(target, 0.2, 5, seed)
        assert sorted([*held, *pool]) == list(range(100)) and len(held) == 20
        assert len(set(target[pool[:5]])) == 2 or not (target[pool] == 1).any()
    with pytest.raises(ValueError, match="two classes"):
        split_pool(np.zeros(50, int), 0.2, 5)


def curves(values, labels_at=(10, 20, 30)):
    return pd.DataFrame(
        [
            [draw, at, value]
            for draw, row in enumerate(values)
            for at, value in zip(labels_at, row)
        ],
        columns=["draw", "labels", "accuracy"],
    )


def test_gain_and_labels_saved_by_hand():
    slow = curves([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    fast = curves([[0.2, 0.3, 0.4], [0.2, 0.3, 0.4], [0.2, 0.3, 0.4]])
    assert curve_gain(slow, fast).value == pytest.approx(0.1)
    assert labels_saved(slow, fast).value == pytest.approx(10)
    assert labels_saved(fast, slow).value == pytest.approx(-10)
    dips = curves([[0.1, 0.3, 0.25]] * 3)
    assert labels_saved(slow, dips).value == pytest.approx(10), "first reached at 20"
    with pytest.raises(ValueError, match="other numbers of labels"):
        curve_gain(slow, curves([[0.1, 0.2]] * 3, (10, 20)))
    with pytest.raises(ValueError, match="other numbers of labels"):
        labels_saved(slow, curves([[0.1, 0.2]] * 3, (10, 20)))
    with pytest.raises(ValueError, match="have one draw"):
        labels_saved(curves([[0.1, 0.2, 0.3]]), curves([[0.1, 0.2, 0.3]]))
    with pytest.raises(ValueError, match="several strategies"):
        labels_saved(pd.concat([slow, slow]), slow)


def test_interval_of_labels_saved_is_the_t_interval_where_it_is_linear():
    from scipy.stats import sem, t

    gains = np.array([0.02, 0.05, 0.03, 0.06])
    slow = curves([[0.1, 0.2, 0.3]] * 4)
    fast = curves([[0.1 + g, 0.2 + g, 0.3 + g] for g in gains])
    saved = labels_saved(slow, fast)  # a gain g is worth 100 g labels
    assert saved.value == pytest.approx(100 * gains.mean())
    half = t.ppf(0.975, 3) * sem(100 * gains)
    assert saved.high - saved.value == pytest.approx(half)


def test_tune_prefers_what_is_right_elsewhere():
    vectors, target = blobs(80, spread=2.5)
    rare = np.r_[:40, np.arange(41, 80, 3)]  # classes that are not equally frequent
    found = tune(vectors[rare], target[rare], (0.001, 1.0))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(found) == 4 and len(set(found.values())) > 1
    noise = np.random.default_rng(0).integers(0, 3, 60)
    wide = np.random.default_rng(1).normal(size=(60, 40))
    assert max(tune(wide, noise).values()) < 0.7, "held-out rows are held out"


# labels that nobody gave


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"count": 15}, {"criterion": "k_best", "k_best": 15}),
        ({"threshold": 0.6}, {"criterion": "threshold", "threshold": 0.6}),
    ],
)
@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_self_training_is_scikit_learns(ours, theirs, rounds):
    vectors, target = blobs(spread=1.5)
    draw = np.random.default_rng(0).permutation(120)
    vectors, target = vectors[draw], target[draw]
    masked = np.where(np.arange(120) < 20, target, -1)
    made = pseudo_label(vectors, masked, np.arange(20), rounds=rounds, **ours)
    base = LogisticRegression(class_weight="balanced", max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = SelfTrainingClassifier(base, max_iter=rounds, **theirs)
        library.fit(vectors, masked)
    mine = np.full(120, -1)
    mine[made.rows] = made.classes
    assert (mine == library.transduction_).all() and (mine[20:] >= 0).any()
    found = made.classifier.predict_proba(vectors)
    assert np.abs(found - library.predict_proba(vectors)).max() < 1e-6


def test_pseudo_labels_by_class_are_even():
    vectors, target = blobs(150)
    made = pseudo_label(
        vectors, target, np.arange(9), count=12, rounds=2, per_class=True
    )
    assert np.bincount(made.classes[9:]).tolist() == [8, 8, 8]
    assert made.given == 9 and made.rows[:9].tolist() == list(range(9))
    for options in ({"count": 1, "threshold": 0.5}, {"threshold": 2}):
        with pytest.raises(ValueError, match="allowed is one of them, a threshold"):
            pseudo_label(vectors, target, np.arange(9), **options)


# what is measured


def test_cross_validation_holds_out_rows_and_groups():
    vectors, _ = blobs(80)
    noise = np.random.default_rng(0).integers(0, 2, 80)
    assert 0.25 < cross_validated(vectors, noise).mean() < 0.75
    twins, same = np.repeat(vectors, 2, axis=0), np.repeat(noise, 2)
    learn_by_heart = lambda v, t: fit_linear(1e3 * v, t, 1e4)
    loose = cross_validated(
        np.hstack([twins, 5 * np.repeat(np.eye(80), 2, 0)]), same, fit=learn_by_heart
    ).mean()
    tied = cross_validated(
        np.hstack([twins, 5 * np.repeat(np.eye(80), 2, 0)]),
        same,
        groups=np.repeat(np.arange(80), 2),
        fit=learn_by_heart,
    ).mean()
    assert loose > 0.85 > tied + 0.1, "a copy in another fold tells the label"
    by_share = cross_validated(*blobs(90, spread=2.5), shares=(0.05, 1.0))
    assert by_share.shape == (2, 90) and by_share[0].mean() < by_share[1].mean()
    with pytest.raises(ValueError, match="allowed are at least two"):
        cross_validated(vectors[:2], np.array([0, 1]))


@settings(deadline=None, max_examples=30)
@given(pool=st.integers(2, 30), data=st.data())
def test_even_chances_weigh_one(pool, data):
    drawn = data.draw(st.integers(1, pool))
    chances = 1 / (pool - np.arange(drawn))
    np.testing.assert_allclose(importance_weights(chances, pool), 1)


def test_importance_weights_are_unbiased():
    """The expectation over all orders of drawing two of four rows, exactly."""
    preference = np.array([1.0, 2.0, 5.0, 9.0])
    values = np.array([1.0, 0.0, 0.0, 3.0])
    weighted = plain = 0.0
    for first in range(4):
        p = preference / preference.sum()
        for second in set(range(4)) - {first}:
            left = np.delete(preference, first).sum()
            q = preference[second] / left
            both = values[[first, second]]
            weights = importance_weights(np.array([p[first], q]), 4)
            weighted += p[first] * q * (weights * both).mean()
            plain += p[first] * q * both.mean()
    assert weighted == pytest.approx(values.mean()) and abs(plain - weighted) > 0.3


def test_drawn_chances_are_those_of_the_draw():
    preference = np.array([1.0, 2.0, 5.0, 9.0])
    first = []
    for seed in range(3000):
        rows, chances = draw_with_chances(preference, 3, seed)
        assert len(set(rows)) == 3
        left = preference.sum()
        for row, chance in zip(rows, chances):
            assert chance == pytest.approx(preference[row] / left)
            left -= preference[row]
        first.append(rows[0])
    shares = np.bincount(first, minlength=4) / 3000
    assert np.abs(shares - preference / 17).max() < 0.04
    for given_, count in (([0.0, 1.0], 1), ([np.inf, 1.0], 1), ([1.0, 1.0], 3)):
        with pytest.raises(ValueError, match="allowed"):
            draw_with_chances(given_, count)
    with pytest.raises(ValueError, match="allowed"):
        importance_weights([0.0], 3)


# a table of one's own


def written(rows=36, labelled=24):
    good, bad = "I love this {} {}", "I hate this {} {}"
    things = "lamp chair desk shirt book pan bike tent bag coat hat cup".split()
    more = ("a lot", "really", "so much", "today")
    said = [
        (form.format(thing, end), name)
        for thing in things
        for end in more
        for form, name in ((good, "good"), (bad, "bad"))
    ][:rows]
    names = [name if place < labelled else "" for place, (_, name) in enumerate(said)]
    return pd.DataFrame({"said": [each for each, _ in said], "mark": names})


def test_partly_labelled_keeps_rows_apart():
    table = written()
    table.loc[30, "said"] = "  i LOVE this lamp a lot "  # has a label in row 1
    table.loc[31, "said"] = table.loc[32, "said"]
    table.loc[33, "said"] = " "
    rows = partly_labelled(table, "said", "mark")
    assert rows["row"].tolist() == [*range(1, 31), 32, 35, 36]
    assert (rows["label"] != "").sum() == 24 and not rows["random"].any()
    table["drawn"] = ["random"] * 4 + [""] * 28 + ["random"] * 4
    marked = partly_labelled(table, "said", "mark", drawn="drawn")
    assert marked.loc[marked["random"], "row"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "change, arguments, words",
    [
        ({}, {"text": "mark"}, "text and label are both 'mark'"),
        ({}, {"drawn": "mark"}, "label and drawn are both 'mark'"),
        ({}, {"text": "sad"}, "text is 'sad', and the table has no such column"),
        ({}, {"label": "marks"}, "label is 'marks', and the table has no such column"),
        ({}, {"drawn": "marks"}, "drawn is 'marks', and the table has no such column"),
        ({"mark": ""}, {}, "no class at all"),
        ({"mark": ["a"] * 9 + [""] * 27}, {}, "one class only"),
        ({"mark": ["a"] * 9 + ["b"] + [""] * 26}, {}, "'b' (1)"),
        ({"mark": ["a", "b"] * 18}, {}, "empty in no row"),
        ({}, {"count": 13}, "count is 13, and 12 different texts"),
        ({}, {"count": 0}, "count is 0"),
    ],
)
def test_a_table_that_cannot_work_is_told_in_a_sentence(change, arguments, words):
    table = written().assign(**change)
    with pytest.raises(ValueError) as caught:
        partly_labelled(table, **{"text": "said", "label": "mark"} | arguments)
    said = str(caught.value)
    assert words in said and "\n" not in said and ". " not in said


def test_a_job_ends_before_the_encoder_is_loaded(tmp_path):
    written().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(RunFailed) as caught:
        run(
            "adapting/labels",
            out=tmp_path / "run",
            data=tmp_path / "t.csv",
            text="said",
            label="mark",
            count=50,
            model="no/such/model",
        )
    assert "count is 50, and 12 different texts" in str(caught.value)


def test_a_job_answers_for_a_table_and_says_what_to_label(tmp_path):
    table = written(96, 64)
    table["drawn"] = ["random", "random", "", ""] * 24
    table.to_csv(tmp_path / "t.csv", index=False)
    done = run(
        "adapting/labels",
        out=tmp_path / "run",
        data=tmp_path / "t.csv",
        text="said",
        label="mark",
        count=10,
        drawn="drawn",
    )
    assert done.metrics["accuracy"]["value"] > 0.8
    assert done.metrics["rows"] == {"given": 64, "pool": 32, "classes": 2}
    assert "on 32 rows drawn by chance and set apart" in done.metrics["verdict"]
    assert not {"gains", "pseudo", "against"} & done.metrics.keys()
    found = pd.read_csv(done.folder / "to_label.csv")
    assert found["row"].tolist() == done.metrics["to_label"] and len(found) == 10
    assert found["row"].between(65, 96).all() and found["row"].is_unique
    assert (found["text"] == table["said"][found["row"] - 1].to_numpy()).all()
    assert found["drawn"].tolist() == ["random"] * 2 + ["margin"] * 8
    assert set(found["guess"]) <= {"good", "bad"}
    sure = found["probability"][2:] - found["probability_of_second"][2:]
    assert sure.is_monotonic_increasing, "the least sure first"
    assert done.metrics["accuracy"]["n"] == 32, "the rows set apart measure"
    assert done.metrics["gain_over_chance"] is None, "labels were chosen, not drawn"


undecided_labels = {
    "to_label": "rows whose margins differ by less than a rounding change places",
}


def expect_labels(m):
    assert m["accuracy_as_it_comes"]["high"] < 0.3 and m["favoured"]["answers"] > 0.5, (
        "with few labels the classifier as it comes answers with one class"
    )
    assert m["tuning_of_120"]["low"] > 0.15 and m["gain_tuning"]["low"] > 0.1, (
        "two settings bring much"
    )
    assert m["gain_as_it_comes"]["value"] > 0, "margin sampling mends a part of it"
    assert m["largest_class"]["margin"] < m["largest_class"]["random"], "by evening out"
    gains = m["gains"]
    assert gains["margin"]["high"] < 0.05, "and brings little after tuning"
    assert gains["k_center"]["high"] < 0, "k-centre loses"
    assert m["gain_tuning"]["low"] > max(each["high"] for each in gains.values())
    saved = m["labels_saved"]
    assert saved["tuning"]["low"] > 80, "a better baseline is worth many labels"
    assert saved["k-centre, tuned"]["high"] < -20
    assert m["batches"]["k_center"]["nearness"] < m["batches"]["whole pool"]["nearness"]
    assert m["batches"]["margin"]["different"] < m["batches"]["badge"]["different"]
    assert m["toy_unknown"]["margin"] == 0 < m["toy_unknown"]["k-centre"], "cold start"
    assert m["toy_outliers"]["k-centre"] >= 4, "k-centre collects outliers"
    pseudo = m["pseudo"]
    assert pseudo["as it comes"]["high"] < 0 < pseudo["balanced"]["low"], (
        "the sign of pseudo-labels depends on the classifier"
    )
    assert pseudo["as it comes, by class"]["low"] > 0, "and on what is taken"
    assert m["pseudo_largest_class"]["as it comes"] > 0.5
    assert m["pseudo_by_prior"]["uneven, by class"]["high"] < -0.05, (
        "even shares harm where the pool is uneven"
    )
    right = m["pseudo_right_by_prior"]
    assert right["uneven, by class"] < right["uneven"] - 0.1
    off = m["cross_validation_off"]
    assert off["margin, cross-validated"]["high"] < -0.1, "chosen labels mislead"
    assert off["margin, on its random part"]["value"] < -0.04
    assert abs(off["random, cross-validated"]["value"]) < 0.06
    assert m["testing_off"]["unsure rows"]["high"] < -0.05
    assert abs(m["testing_off"]["unsure rows, weighted"]["value"]) < 0.02
    graph, own = pseudo["balanced, against a graph"], pseudo["balanced"]
    assert graph["value"] < own["low"], "label spreading brings less"
    assert m["testing_spread"]["unsure rows, weighted"] > m["testing_spread"]["random"]
    against = m["against"]
    assert against["BADGE, products"] < 1e-9
    assert against["self-training by k_best, rows"] <= 2
    assert against["self-training by threshold, rows"] <= 2
    assert against["k-centre, largest ratio to the best radius"] <= 2
    assert m["last_half"]["low"] > 0, "the last labels still brought something"
