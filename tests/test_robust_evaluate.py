"""Chapter 6, evaluate: the standard ensemble, one sweep for all radii, files.

Masked models are found out, and sound ones left in peace.
"""

import copy
import json
import math
import pickle
import warnings

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from torch import nn

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.kit.record import to_json
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust import attacks, evaluate
from bigmodel_nb.robust.attacks import (
    APGD,
    EOT,
    FAB,
    FGSM,
    PGD,
    EnsembleAttack,
    MomentumPGD,
    Square,
    _judged,
    _losses,
    _standing,
    is_stochastic,
)
from bigmodel_nb.robust.evaluate import (
    BPDA,
    MaskingReport,
    Normalized,
    expected_correct,
    expected_curve,
    load_classifier,
    masking_report,
    noise_curve,
    plot_attacked,
    plot_robustness,
    robust_accuracy,
    robustness_curve,
    sample_images,
)
from bigmodel_nb.robust.training import AdversarialTraining
from bigmodel_nb.training.loop import fit

IMAGES, TARGETS = digits()
TRAIN, TEST = split_indices(TARGETS, (0.8, 0.2), 0)
X, Y = IMAGES[TEST], TARGETS[TEST]


def trained(
    model,
    epochs=6,
    objective=None,
    seed=0,
    images=IMAGES[TRAIN],
    targets=TARGETS[TRAIN],
    rate=5e-3,
):
    fit(
        model,
        loader(images, targets, shuffle=True, seed=seed),
        epochs=epochs,
        objective=objective,
        device="cpu",
        optimizer=torch.optim.AdamW(model.parameters(), lr=rate),
    )
    return model.eval()


def small(seed=0, **options):
    torch.manual_seed(seed)
    return SmallConvNet(width=8, **options)


@pytest.fixture(scope="module")
def net():
    """A net trained on digits."""
    return trained(small())


@pytest.fixture(scope="module")
def stranger():
    """An undefended net trained on its own: a substitute."""
    return trained(small(7))


class Counted(nn.Module):
    """Counts forward passes, a backward pass as two."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, input):
        self.passes += len(input) * (3 if input.requires_grad else 1)
        return self.model(input)


class Before(nn.Module):
    """A net behind something that is done to its input, its logits, or both."""

    def __init__(self, model, change=lambda x: x, scale=1.0, shift=0.0):
        super().__init__()
        self.model, self.change, self.scale, self.shift = model, change, scale, shift

    def forward(self, input):
        return self.scale * self.model(self.change(input)) + self.shift


# --- the targeted losses


def test_targeted_losses_are_the_papers():
    logits, y, rival = (
        torch.tensor([[5.0, 3.0, 1.0, 0.0, -2.0], [1.0, 4.0, 2.0, 0.5, 0.0]]),
        torch.tensor([0, 0]),
        torch.tensor([2, 3]),
    )
    dlr = torch.tensor(
        [(1 - 5) / (5 - (1 + 0) / 2), (0.5 - 1) / (4 - (1 + 0.5) / 2)]
    )  # Croce and Hein 2020, equation 7
    assert torch.allclose(_losses(logits, y, "dlr", rival), dlr) and torch.allclose(
        _losses(300 * logits - 50, y, "dlr", rival), dlr
    )
    lead = torch.tensor([1.0 - 5, 0.5 - 1])
    assert torch.allclose(_losses(logits, y, "margin", rival), lead)
    assert torch.allclose(
        _losses(logits, y, "ce", rival),
        nn.functional.cross_entropy(
            torch.stack([0 * lead, lead], 1), torch.zeros(2).long(), reduction="none"
        ),
    )
    assert torch.equal(
        _losses(logits[:, :3], y, "dlr", torch.tensor([2, 1])),
        logits[:, [2, 1]].diagonal() - logits[:, 0],
    )  # below four classes: the margin


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_gradients_of_targeted_losses_are_central_differences(loss, classes):
    logits = torch.randn(
        5,
        classes,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(classes),
    )
    y, rival = torch.zeros(5).long(), torch.full((5,), classes - 1)
    assert torch.autograd.gradcheck(
        lambda z: _losses(z, y, loss, rival), logits.requires_grad_()
    )


def test_targeted_apgd_tries_as_many_rivals_as_there_are():
    x, y = torch.rand(4, 6), torch.zeros(4).long()
    for classes, tried in ((2, 1), (3, 2), (10, 9), (14, 9)):
        model = nn.Linear(6, classes)
        goals = APGD(0.1, multi_targeted=True)._goals(APGD(0.1)._slope(model, x), x, y)
        assert len(goals) == tried and all((goal[:, 1] != 0).all() for goal in goals)
    assert (
        len(
            APGD(0.1, multi_targeted=True, n_target_classes=3, restarts=2)._goals(
                APGD(0.1)._slope(model, x), x, y
            )
        )
        == 6
    )


def linear_distances(weight, bias, x, y, dual):
    """(batch,) exact distance to the nearest input of another class, without a box."""
    logits = x @ weight.T + bias
    lead = logits.gather(1, y[:, None]) - logits
    return (
        (lead / (weight[y][:, None] - weight).norm(dual, dim=2))
        .scatter(1, y[:, None], math.inf)
        .amin(1)
    )


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2), ("l1", math.inf)])
@pytest.mark.parametrize("classes", [2, 5])
def test_curves_of_a_linear_model_are_its_exact_distances(norm, dual, classes):
    torch.manual_seed(classes)
    model, x = nn.Linear(12, classes).double(), torch.randn(20, 12, dtype=torch.float64)
    y = torch.where(
        torch.arange(20) < 18, model(x).argmax(1), (model(x).argmax(1) + 1) % classes
    )
    exact = linear_distances(
        model.weight.detach(), model.bias.detach(), x, y, dual
    ).detach()
    known = exact[:18].sort().values
    middle = ((known[1:] + known[:-1]) / 2)[
        (known[1:] - known[:-1]) > 1e-3 * known[:-1]
    ]  # radii that no example is near
    radii = [0.0, *middle[:: max(1, len(middle) // 3)].tolist(), 2 * known[-1].item()]
    expected = [
        ((exact > radius) & (exact > 0)).double().mean().item() for radius in radii
    ]
    for attack in (
        APGD(
            0.1,
            norm,
            steps=10,
            loss="dlr",
            multi_targeted=True,
            early_stop=True,
            bounds=(-50.0, 50.0),
        ),
        FAB(math.inf, norm, steps=3, bounds=(-50.0, 50.0)),
    ):
        curve = robustness_curve(
            model, [(x[:12], y[:12]), (x[12:], y[12:])], attack, radii
        )
        assert curve["accuracy"].tolist() == pytest.approx(expected), type(
            attack
        ).__name__


# --- the standard ensemble

CHEAP = dict(steps=10, n_target_classes=3, queries=60)


def test_standard_is_the_papers_ensemble():
    parts = EnsembleAttack.standard(0.1).attacks
    assert [type(part) for part in parts] == [APGD, APGD, FAB, Square]
    assert [getattr(part, "multi_targeted", None) for part in parts] == [
        False,
        True,
        True,
        None,
    ]
    assert (
        parts[0].loss,
        parts[1].loss,
        parts[0].steps,
        parts[1].n_target_classes,
        parts[2].steps,
        parts[3].queries,
    ) == ("ce", "dlr", 100, 9, 100, 5000)
    assert {
        part.eps for part in EnsembleAttack.standard(0.1, "l2").at(0.5).attacks
    } == {0.5}
    several = EnsembleAttack.standard(0.1, restarts=3).attacks
    assert [part.restarts for part in several[:3]] == [3, 3, 3] and [
        part.seed for part in several[3:]
    ] == [0, 1, 2]


def test_standard_is_the_minimum_for_each_example(net):
    x, y = X[:60], Y[:60]
    for norm, eps in (("linf", 0.08), ("l1", 1.2)):
        whole = EnsembleAttack.standard(eps, norm, **CHEAP)
        alone = torch.stack(
            [_judged(net, part(net, x, y), y) for part in whole.attacks]
        )
        fallen = _judged(net, whole(net, x, y), y) > 0
        assert torch.equal(fallen, (alone > 0).any(0)) and 0 < fallen.sum() < 60


def test_standard_cares_for_neither_shift_nor_scale(net):
    attack, found = EnsembleAttack.standard(0.15, **CHEAP), []
    for model in (net, Before(net, shift=1000.0), Before(net, scale=1000.0)):
        with warnings.catch_warnings(action="ignore"):
            found.append(
                (_judged(net, attack(model, X[:60], Y[:60]), Y[:60]) > 0).sum().item()
            )
    assert max(found) - min(found) <= 3


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_standard_takes_few_classes(classes):
    torch.manual_seed(classes)
    model, x = nn.Linear(20, classes).double(), torch.rand(30, 20, dtype=torch.float64)
    y = model(x).argmax(1)
    exact = linear_distances(
        model.weight.detach(), model.bias.detach(), x, y, 1
    ).detach()
    eps = exact.median().item() * 1.05
    stands = (
        _judged(
            model,
            EnsembleAttack.standard(eps, bounds=(-9.0, 9.0), **CHEAP)(model, x, y),
            y,
        )
        <= 0
    )
    assert torch.equal(stands, exact > eps)


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: MomentumPGD(0.1, momentum=-1),
            "momentum is -1; allowed is a number from 0 up",
        ),
        (lambda: MomentumPGD(0.1, momentum=math.nan), "momentum is nan"),
        (lambda: MomentumPGD(0.1, momentum="1"), "momentum is '1'"),
        (
            lambda: APGD(0.1, multi_targeted=True, targeted=True),
            "multi_targeted is True and targeted too",
        ),
        (lambda: APGD(0.1, n_target_classes=0), "n_target_classes is 0"),
        (lambda: EnsembleAttack.standard(8), "eps is 8"),
        (lambda: EOT(nn.Linear(2, 2), 0), "samples is 0"),
    ],
)
def test_bad_settings_get_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# --- randomised models


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 3000))
def test_expectation_is_the_log_of_the_mean_probability(seed, samples, scale):
    draws = scale * torch.randn(
        samples,
        4,
        3,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    rest = iter(draws.requires_grad_())

    class Lots(nn.Module):
        def forward(self, input):
            return next(rest)

    found = EOT(Lots(), samples)(torch.zeros(4, 2))
    assert torch.isfinite(found).all() and torch.allclose(
        found.exp(), draws.softmax(2).mean(0), atol=1e-12
    )
    assert torch.isfinite(torch.autograd.grad(found.sum(), draws)[0]).all()


def test_a_randomised_model_is_known_and_warned_of(net):
    lots = Before(net, lambda x: x + 0.2 * torch.randn_like(x))
    assert (
        is_stochastic(lots, X[:4])
        and not is_stochastic(net, X[:4])
        and not is_stochastic(nn.Sequential(nn.Dropout(), net), X[:4])
    )
    with pytest.warns(
        UserWarning, match=r"a single draw says is no verdict, take EOT\(model\)"
    ):
        robust_accuracy(lots, [(X[:20], Y[:20])], FGSM(0.1))
    with warnings.catch_warnings(action="error"):
        held = robust_accuracy(EOT(lots, 20), [(X[:20], Y[:20])], FGSM(0.1))
        plain = robust_accuracy(net, [(X[:20], Y[:20])], FGSM(0.1))
    assert 0 < held.value <= 1 and 0 < plain.value < 1


class Coin(nn.Module):
    """Right with probability 0.7 in each draw; the mean of its draws always is."""

    def forward(self, input):
        right = (torch.rand(len(input)) < 0.7).float() + 0 * input.flatten(1).sum(1)
        return 10 * torch.stack([right, 1 - right], 1)


def test_a_randomised_model_is_judged_in_expectation_not_by_its_mean():
    x, y = torch.rand(300, 4), torch.zeros(300).long()
    share, again = (expected_correct(Coin(), x, y, 40, seed) for seed in (0, 0))
    assert (
        abs(share.mean() - 0.7) < 0.02
        and torch.equal(share, again)
        and not torch.equal(share, expected_correct(Coin(), x, y, 40, 1))
    )
    state = torch.get_rng_state()
    with warnings.catch_warnings(action="ignore"):  # that it has no gradient
        smoothed = robust_accuracy(EOT(Coin(), 40), [(x, y)], FGSM(0.1))
        curve = expected_curve(
            Coin(),
            [(x[:200], y[:200]), (x[200:], y[200:])],
            PGD(0.1, steps=2),
            [0.1, 0.0],
            draws=20,
        )
    assert smoothed.value > 0.95  # another classifier
    assert (
        torch.equal(torch.get_rng_state(), state)
        and curve["eps"].tolist() == [0.0, 0.1]
        and curve["n"].tolist() == [300, 300]
    )
    assert (
        ((curve["accuracy"] - 0.7).abs() < 0.03).all()
        and (curve["low"] < 0.7).all()
        and (0.7 < curve["high"]).all()
    )


def test_of_a_model_without_chance_the_expectation_is_its_answer(net):
    assert torch.equal(expected_correct(net, X, Y, 3), (net(X).argmax(1) == Y).double())
    attack = PGD(0.1, steps=5)
    value = expected_curve(net, [(X[:50], Y[:50])], attack, [0.1], draws=1)[
        "accuracy"
    ].item()
    assert value == pytest.approx(
        robust_accuracy(net, [(X[:50], Y[:50])], attack).value
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 3_000_000))
def test_parts_are_the_whole(rows, width):
    x = torch.zeros(rows, 1).expand(rows, width)
    seen = []
    found = evaluate._in_parts(
        lambda x, y: seen.append(x.shape) or y, x, torch.arange(rows)
    )
    assert torch.equal(found, torch.arange(rows)) and all(
        part[0] * width <= max(2_000_000, width) for part in seen
    )


# --- BPDA


def test_bpda_has_the_values_of_the_part_and_the_gradient_of_the_stand_in():
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    for stand_in, expected in ((None, torch.ones_like(x)), (torch.sin, x.cos())):
        found = BPDA(lambda x: (5 * x).round() / 5, stand_in)(x)
        assert torch.allclose(found, (5 * x).round() / 5, atol=1e-15)
        assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], expected)


def test_bpda_sees_through_a_rounding(net):
    rounded, attack = (
        Before(net, lambda x: (5 * x).round() / 5),
        PGD(0.15, early_stop=True),
    )
    seen_through = nn.Sequential(BPDA(lambda x: (5 * x).round() / 5), net)
    with warnings.catch_warnings(action="ignore"):
        masked = robust_accuracy(rounded, [(X, Y)], attack)
    found = attack(seen_through, X, Y)
    assert (
        masked.low > 0.8
        and ((rounded(found).argmax(1) == Y) & (rounded(X).argmax(1) == Y))
        .double()
        .mean()
        < masked.low - 0.5
    )


# --- one sweep


def from_below(model, attack, radii, x, y):
    """(radius, example) whether it stays correct; each radius attacks what does."""
    standing, rows = _standing(model, x, y), []
    for radius in radii:
        index = standing.nonzero()[:, 0]
        if len(index):
            standing[index] = _standing(
                model, attack.at(radius)(model, x[index], y[index]), y[index]
            )
        rows.append(standing.clone())
    return torch.stack(rows)


RADII = [0.0, 0.03, 0.06, 0.1, 0.15, 0.25]


@pytest.mark.parametrize(
    "attack, dearest",
    [
        (PGD(0.1, steps=20, early_stop=True), 1.8),
        (APGD(0.1, early_stop=True), 1.5),
        (FGSM(0.1), 6.0),
        (Square(0.1, queries=50, early_stop=True), 2.4),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_sweep_hides_nothing_and_costs_little_more_than_its_dearest_radius(
    attack, dearest, net
):
    x, y = X[:80], Y[:80]
    counted, hardest = Counted(net), []
    curve = robustness_curve(counted, [(x, y)], attack, RADII[::-1])
    below = from_below(net, attack, RADII, x, y).sum(1)
    swept = torch.tensor((curve["accuracy"] * 80).round().to_numpy())
    assert (
        curve["eps"].tolist() == RADII
        and curve["accuracy"].is_monotonic_decreasing
        and (swept - below).abs().max() <= 3
    )
    for radius in RADII[1:]:
        alone = Counted(net)
        value = robust_accuracy(alone, [(x, y)], attack.at(radius)).value
        hardest.append(alone.passes)
        assert curve.set_index("eps")["accuracy"][radius] <= value + 0.04
    assert curve["accuracy"].iloc[-1] <= value and counted.passes <= dearest * max(
        hardest
    )


def test_a_sweep_finds_what_a_long_step_has_overshot():
    class Band(
        nn.Module
    ):  # misread only where the first input lies between 0.3 and 0.4
        def forward(self, input):
            inside = (0.05 - (input[:, 0] - 0.35).abs()) * 100 + 3 * input[:, 0]
            return torch.stack([torch.zeros_like(inside), inside - 3], 1)

    x, y = torch.zeros(3, 2), torch.zeros(3).long()
    assert robust_accuracy(Band(), [(x, y)], FGSM(0.9)).value == 1
    assert robustness_curve(Band(), [(x, y)], FGSM(0.9), [0.1, 0.2, 0.35, 0.9])[
        "accuracy"
    ].tolist() == [1, 1, 0, 0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=6), st.integers(1, 3))
def test_a_curve_never_rises_whatever_the_radii(radii, steps):
    torch.manual_seed(steps)
    model, x = nn.Linear(5, 3), torch.rand(12, 5)
    y = torch.randint(0, 3, (12,))
    for curve in (
        robustness_curve(model, [(x, y)], PGD(0.1, steps=steps), radii),
        noise_curve(model, [(x, y)], radii, draws=2),
    ):
        assert curve["accuracy"].is_monotonic_decreasing and curve[
            "eps"
        ].tolist() == sorted(radii)
        for row in curve.itertuples():
            known = stats.binomtest(round(row.accuracy * 12), 12).proportion_ci(
                method="wilson"
            )
            assert (row.low, row.high) == pytest.approx(
                (known.low, known.high), abs=1e-9
            ) and row.n == 12


# --- noise, pictures


@pytest.mark.parametrize(
    "norm, size",
    [
        ("linf", lambda d: d.abs().amax(1)),
        ("l2", lambda d: d.norm(dim=1)),
        ("l1", lambda d: d.abs().sum(1)),
    ],
)
def test_noise_is_as_large_as_the_radius(norm, size):
    seen = []

    class Watching(nn.Module):
        def forward(self, input):
            seen.append(input.clone())
            return nn.functional.one_hot(torch.zeros(len(input)).long(), 2).double()

    x = torch.rand(6, 5, dtype=torch.float64)
    noise_curve(
        Watching(),
        [(x, torch.zeros(6).long())],
        [0.4],
        norm,
        draws=3,
        bounds=(-9.0, 9.0),
    )
    changes = [each - x for each in seen if len(each) == 6 and not torch.equal(each, x)]
    assert len(changes) == 3 and all(
        torch.allclose(size(change), torch.full((6,), 0.4).double())
        for change in changes
    )
    assert norm != "linf" or all(
        torch.allclose(change.abs(), torch.tensor(0.4).double()) for change in changes
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 600), st.integers(1, 600), st.sampled_from([0.05, 0.01]))
def test_a_check_holds_or_fails_only_where_its_whole_interval_does(against, n, limit):
    seen = object.__new__(evaluate._Examined)
    seen.tolerance, seen.strict = 0.05, 0.01
    flags = torch.arange(n) < min(against, n)
    found = seen.check("a check", flags, "so it is", strict=limit == 0.01)
    known = stats.binomtest(min(against, n), n).proportion_ci(method="wilson")
    expected = (
        "fails" if known.low > limit else "holds" if known.high <= limit else "open"
    )
    assert found.verdict == expected and found.limit == limit
    assert (
        found.verdict != "holds" or found.against.value < limit
    )  # a masked share as large as the limit never passes
    if "takes" in found.reason:
        enough = int(found.reason.split(" takes ")[1].split()[0])
        none = [
            stats.binomtest(0, count).proportion_ci(method="wilson").high
            for count in (enough - 1, enough)
        ]
        assert none[1] <= limit < none[0] and n < enough


def test_a_report_has_a_sentence_for_each_outcome():
    share = evaluate.Proportion.of(0, 100)
    of = lambda *verdicts, name="c": str(
        MaskingReport(
            tuple(evaluate.Check(name, each, "r", share, 0.05) for each in verdicts),
            1.0,
            "PGD",
        )
    )
    assert (
        of("holds", "holds")
        == "All 2 checks of PGD on 100 correctly classified images hold: there is no"
        " sign that gradients are masked"
    )
    assert of("holds", "open").startswith(
        "None of 2 checks of PGD on 100 correctly classified images fails, 1 holds and"
        " 1 is open: "
    ) and "not settled" in of("open", "open")
    assert of("fails", "open", "open").startswith(
        "1 of 3 checks of PGD on 100 correctly classified images fails, 2 are open and"
        " 0 hold: the attack does not see"
    )
    assert of("fails", "holds", name=ALIKE).endswith(
        "the model is randomised, and a single draw of it is no verdict"
    )
    assert "BPDA" in of("fails", "fails", name=ALIKE) and "takes" not in of(
        "open"
    )  # a hundred examples tell 5 %
    few = evaluate.Check("c", "open", "r", share, 0.01)
    assert str(MaskingReport((few,), 1.0, "PGD")).endswith(
        "not settled (that takes 381)"
    )


def test_pictures_say_what_they_show(net):
    curve = robustness_curve(net, [(X[:20], Y[:20])], FGSM(0.1), [0.0, 0.1])
    for certified in (None, curve.assign(accuracy=0.0, low=0.0, high=0.1)):
        said = plot_robustness(
            curve,
            certified,
            noise_curve(net, [(X[:20], Y[:20])], [0.0, 0.1]),
            chance=0.1,
        ).metadata["alt"]
        assert (
            "under noise" in said
            and "under attack" in said
            and ("certified" in said) == (certified is not None)
        )
    share = evaluate.Proportion.of(3, 20)
    said = plot_robustness(
        curve, attack="FGSM", point=("the ensemble", 0.1, share)
    ).metadata["alt"]
    assert (
        "under FGSM it falls" in said
        and f"under the ensemble it is {share} at radius 0.1" in said
    )
    assert (
        "7 is taken for 1"
        in plot_attacked(X[:1], X[:1] * 0.9, ["7"], ["1"], "a title").metadata["alt"]
    )
    plot_attacked(
        torch.rand(2, 3, 8, 8),
        torch.rand(2, 3, 8, 8),
        ["cat", "dog"],
        ["dog", "cat"],
        "in colour",
    )
    with pytest.raises(ValueError, match="the curve 'certified' lacks \\['high'\\]"):
        plot_robustness(curve, curve.drop(columns="high"))
    with pytest.raises(ValueError, match="the curve 'under attack' lacks rows"):
        plot_robustness(curve.iloc[:0])
    with pytest.raises(ValueError, match="allowed is one length from 1 to 8"):
        plot_attacked(X[:2], X[:1], ["7"], ["1"], "a title")
    with pytest.raises(ValueError, match="draws is 0"):
        noise_curve(net, [(X[:2], Y[:2])], [0.1], draws=0)
    with pytest.raises(ValueError, match="eps is 8"):
        noise_curve(net, [(X[:2], Y[:2])], [0.1, 8])


# --- masked models and sound ones

LESS = dict(steps=10, examples=100, queries=200, points=500)
(
    ALIKE,
    GRADIENT,
    ENTROPY,
    STEPS,
    EFFORT,
    WIDER,
    UNLIMITED,
    SEARCH,
    SUBSTITUTE,
    RANDOM,
) = (
    "the same input gets the same prediction",
    "the gradient reaches the input",
    "cross-entropy fools what the margin fools",
    "many steps fool what one step fools",
    "more effort changes nothing",
    "a larger radius fools no less",
    "without a limit all are fooled",
    "a search without gradients finds nothing more",
    "a transfer attack finds nothing more",
    "random points find nothing more",
)


def resized(x):
    width = int(torch.randint(6, 9, ()))
    shrunk = nn.functional.interpolate(x, size=(width, width), mode="bilinear")
    place = int(torch.randint(0, 9 - width, ()))
    return nn.functional.pad(
        shrunk, (place, 8 - width - place, place, 8 - width - place)
    )


class Saturated(nn.Module):
    """A sigmoid after the first convolution, trained flat and used steep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest, self.steep = (
            nn.Conv2d(1, 8, 3, padding=1),
            SmallConvNet(in_channels=8, width=8),
            5.0,
        )

    def forward(self, input):
        return self.rest((self.steep * self.first(input)).sigmoid())


def saturated():
    model = trained(Saturated())
    model.steep = 500.0
    return model


MASKED = {
    "scaled logits": (lambda net: Before(net, scale=1000.0), {GRADIENT, ENTROPY}),
    "quantised input": (
        lambda net: Before(net, lambda x: (5 * x).round() / 5),
        {GRADIENT, UNLIMITED, SEARCH, SUBSTITUTE},
    ),
    "shattered gradients": (
        lambda net: Before(net, lambda x: x + 0.03 * torch.sin(2000 * x)),
        {SEARCH},
    ),
    "random resizing": (lambda net: Before(net, resized), {ALIKE}),
    "early saturated sigmoid": (lambda net: saturated(), {SEARCH}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_models_are_exposed(name, net, stranger):
    make, least = MASKED[name]
    model = make(net)
    assert (model(X).argmax(1) == Y).double().mean() > 0.8 or name == "random resizing"
    less = (
        LESS | {"examples": 50, "queries": 50} if name == "random resizing" else LESS
    )  # each look costs twenty passes
    report = masking_report(model, loader(X, Y, 100), 0.15, substitute=stranger, **less)
    assert least <= {check.check for check in report.failed}, report.frame.to_string()


def test_a_few_masked_images_are_noticed(net, stranger):
    """A twentieth of the images have no gradient.

    That is less than sound attacks disagree on, and more than masking may hide in.
    """
    darkest = X.flatten(1).sum(1).quantile(0.05)
    masked = Before(
        net,
        lambda x: torch.where(
            x.flatten(1).sum(1)[:, None, None, None] <= darkest, x.detach(), x
        ),
    )
    report = masking_report(
        masked, [(X, Y)], 0.05, substitute=stranger, **LESS | {"examples": 400}
    )
    found = {check.check: check for check in report.checks}[GRADIENT]
    assert (
        0.02 < found.against.value <= 0.06
        and found.verdict == "fails"
        and found in report.failed
    )


def test_a_defence_without_any_path_is_exposed(net, stranger):
    report = masking_report(
        Before(net, lambda x: (5 * x.detach()).round() / 5),
        [(X, Y)],
        0.15,
        substitute=stranger,
        **LESS,
    )
    verdicts = {check.check: check for check in report.checks}
    assert "nothing differentiable leads there" in verdicts[GRADIENT].reason and {
        GRADIENT,
        SEARCH,
    } <= {check.check for check in report.failed}
    assert (
        verdicts[STEPS].verdict == verdicts[WIDER].verdict == "open"
        and "ask at a larger radius" in verdicts[STEPS].reason
    )


def test_random_points_are_tried_on_every_example_that_stands():
    class Corner(nn.Module):
        """Flat; wrong in a sixth of the ball, where the first pixel is not dark."""

        def forward(self, input):
            return torch.stack(
                [
                    torch.full_like(input[:, 0, 0, 0], 0.5),
                    (input[:, 0, 0, 0] > 0.1).to(input),
                ],
                1,
            )

    x = X[:40]
    report = masking_report(
        Corner(),
        [(x, torch.zeros(40, dtype=torch.long))],
        0.15,
        substitute=nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        **LESS,
    )
    found = report.checks[-1]
    assert (
        found.check == RANDOM
        and found.verdict == "fails"
        and found.against.n == found.against.value * 40 == 40
    ), report.frame.to_string()


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )


def of_two():
    rows = TARGETS[TRAIN] < 2
    return trained(
        small(num_classes=2), images=IMAGES[TRAIN][rows], targets=TARGETS[TRAIN][rows]
    )


SOUND = {
    "ordinary": lambda: trained(small(3)),
    "sure of itself": lambda: trained(small(4), epochs=16),
    "hardened": lambda: trained(
        small(5), epochs=5, objective=AdversarialTraining(PGD(0.15, steps=3))
    ),
    "linear": lambda: trained(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), epochs=8, rate=1e-2
    ),
    "batch norm": lambda: trained(normed(), epochs=4),
    "two classes": of_two,
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_give_no_false_alarm(name, stranger):
    model = SOUND[name]()
    x, y = (X[Y < 2], Y[Y < 2]) if name == "two classes" else (X, Y)
    other = {"substitute": stranger} if name not in ("two classes", "linear") else {}
    for seed, eps in ((0, 0.15), (1, 0.08))[: 2 if other else 1]:
        report = masking_report(model, [(x, y)], eps, seed=seed, **other, **LESS)
        assert not report.failed and len(report.checks) == 10, report.frame.to_string()


def test_other_balls_have_the_same_checks(net, stranger):
    for norm, eps in (("l2", 0.8), ("l1", 5.0)):
        report = masking_report(
            net,
            [(X[:80], Y[:80])],
            eps,
            norm,
            substitute=stranger,
            steps=10,
            examples=40,
            queries=100,
            points=200,
        )
        assert not report.failed, report.frame.to_string()
        masked = masking_report(
            MASKED["quantised input"][0](net),
            [(X[:80], Y[:80])],
            eps,
            norm,
            substitute=stranger,
            steps=10,
            examples=40,
            queries=100,
            points=200,
        )
        assert {GRADIENT, SEARCH} <= {check.check for check in masked.failed}, (
            masked.frame.to_string()
        )


def test_a_report_reads_well_and_leaves_the_model(net):
    model, state = copy.deepcopy(net).train(), torch.get_rng_state()
    model.head.bias.grad, before = torch.ones(10), copy.deepcopy(model.state_dict())
    counted = Counted(model)
    settings = dict(steps=3, examples=40, queries=20, points=50)
    report = masking_report(counted, loader(X[:100], Y[:100], 30), 0.1, **settings)
    assert (
        model.training
        and torch.equal(model.head.bias.grad, torch.ones(10))
        and torch.equal(torch.get_rng_state(), state)
    )
    assert (
        all(
            torch.equal(value, before[name])
            for name, value in model.state_dict().items()
        )
        and model.head.weight.grad is None
    )
    assert (
        isinstance(report, MaskingReport)
        and list(report.frame.columns) == ["verdict", "against", "limit", "reason"]
        and len(report.frame) == 10
    )
    assert report.frame.index.tolist() == [
        ALIKE,
        GRADIENT,
        ENTROPY,
        STEPS,
        EFFORT,
        WIDER,
        UNLIMITED,
        SEARCH,
        SUBSTITUTE,
        RANDOM,
    ]
    assert (
        json.dumps(to_json(report.metrics))
        and "forward passes for each example" in report._repr_html_()
    )
    assert (
        report.forward_passes <= 33 * 3 + 20 + 50 + 20
        and report.forward_passes * 40 <= counted.passes
    )
    again = masking_report(counted, loader(X[:100], Y[:100], 100), 0.1, **settings)
    assert again == report  # whatever the batches


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(eps=8), "eps is 8"),
        (dict(eps=0), "eps is 0.* allowed are an eps above 0"),
        (dict(eps=0.1, norm="l3"), "norm is 'l3'"),
        (dict(eps=0.1, queries=0), "queries is 0"),
        (dict(eps=0.1, steps=0), "steps is 0"),
        (dict(eps=0.1, tolerance=1), "tolerance 1"),
        (dict(eps=0.1, strict=0), "strict 0"),
        (dict(eps=0.1, examples=0), "examples 0"),
    ],
)
def test_bad_settings_of_a_report_get_a_sentence(options, said, net):
    with pytest.raises(ValueError, match=said):
        masking_report(net, [(X[:10], Y[:10])], **options)


def test_bad_data_gets_a_sentence(net):
    with pytest.raises(
        ValueError, match="model classifies none of the 4 examples correctly"
    ):
        masking_report(net, [(X[:4], (net(X[:4]).argmax(1) + 1) % 10)], 0.1)
    with pytest.raises(ValueError, match="data gives no batch"):
        masking_report(net, [], 0.1)
    with pytest.raises(ValueError, match="data gives a batch of type Tensor"):
        robustness_curve(net, [X], PGD(0.1), [0.1])
    with pytest.raises(ValueError, match="attack is targeted"):
        robust_accuracy(net, [(X[:4], Y[:4])], PGD(0.1, targeted=True))


# --- a model of one's own


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    """The net in each form, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("own")
    torch.export.save(
        torch.export.export(
            net,
            (torch.rand(4, 1, 8, 8),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        ),
        folder / "net.pt2",
    )
    torch.export.save(
        torch.export.export(net, (torch.rand(4, 1, 8, 8),)), folder / "fixed.pt2"
    )
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(net, torch.rand(4, 1, 8, 8)).save(str(folder / "script.pt"))
    save_file(net.state_dict(), folder / "weights.safetensors")
    torch.save(net.state_dict(), folder / "state.pt")
    (folder / "junk.pt2").write_bytes(b"no")
    (folder / "junk.pt").write_bytes(b"no")
    for row in range(60):
        (folder / "photos" / str(Y[row].item())).mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * X[row, 0].numpy()).round().astype(np.uint8)).save(
            folder / "photos" / str(Y[row].item()) / f"{row}.png"
        )
    return folder


@pytest.mark.parametrize(
    "name, options",
    [
        ("net.pt2", {}),
        ("script.pt", dict(size=8, channels=1)),
        ("weights.safetensors", dict(architecture="SmallConvNet")),
        ("state.pt", dict(architecture="SmallConvNet")),
    ],
)
def test_a_model_from_a_file_is_the_same_model(name, options, files, net):
    found = load_classifier(str(files / name), 10, **options)
    x, y, names = sample_images(files / "photos", found.size, found.channels)
    assert (
        (found.size, found.channels, found.classes) == (8, 1, 10)
        and names == [str(digit) for digit in range(10)]
        and len(x) == 60
    )
    assert (
        torch.allclose(found.model(x), net(x), atol=1e-5)
        and (net(x).argmax(1) == y).double().mean() > 0.9
    )
    attack = PGD(0.15, early_stop=True)
    assert robust_accuracy(found.model, [(x, y)], attack).value == pytest.approx(
        robust_accuracy(net, [(x, y)], attack).value, abs=0.02
    )  # gradients flow


def test_preprocessing_is_inside_what_is_attacked(net, files):
    class Normalised(nn.Module):
        def forward(self, input):
            return net(0.5 * input + 0.25)

    wrapped = Normalized(
        Normalised(), [0.25 / 0.5], [1 / 0.5]
    )  # undone again, in pixels
    x = X[:10]
    assert torch.allclose(
        wrapped(x), net(0.5 * ((x - 0.5) / 2) + 0.25)
    ) and torch.allclose(Normalized(net)(x), net(x))
    three = Normalized(nn.Flatten(), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])(
        torch.ones(1, 3, 1, 1)
    )
    assert torch.allclose(three, torch.tensor([[0.9, 0.4, 0.175]]))
    assert (
        load_classifier(
            str(files / "net.pt2"), 10, mean=[0.1], std=[0.5]
        ).model.std.item()
        == 0.5
    )


def test_models_of_transformers_and_torchvision(tmp_path):
    from torchvision.models import mobilenet_v3_small
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=16,
            patch_size=8,
            num_labels=4,
        )
    ).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path / "vit")
    found = load_classifier(f"hf:{tmp_path / 'vit'}", 4)
    assert found.size == 16 and found.model.mean.flatten().tolist() == pytest.approx(
        [0.4, 0.5, 0.6]
    )
    assert PGD(0.1, steps=2)(
        found.model, torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    ).shape == (2, 3, 16, 16)
    save_file(
        mobilenet_v3_small(num_classes=5).state_dict(), tmp_path / "mobile.safetensors"
    )
    assert (
        load_classifier(
            str(tmp_path / "mobile.safetensors"),
            5,
            "torchvision:mobilenet_v3_small",
            size=32,
        ).classes
        == 5
    )


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"weight": Trap(sprung)}, tmp_path / "zip.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("zip.pt", "old.pt"):
        with pytest.raises(
            ValueError,
            match="holds no plain weights; allowed are safetensors.* never a pickled"
            " object",
        ):
            load_classifier(str(tmp_path / name), 2, "SmallConvNet")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "name, options, said",
    [
        (
            "gone.pt2",
            {},
            "there is no such file; allowed are files, 'torchvision:NAME' and"
            " 'hf:NAME'",
        ),
        ("net.pt2", dict(classes=9), "data has 9 class folders"),
        (
            "fixed.pt2",
            {},
            "does not take 3 images of 1 x 8 x 8 .*a batch of any size: dynamic_shapes",
        ),
        ("script.pt", {}, "size is None, and the model does not tell"),
        (
            "script.pt",
            dict(size=16, channels=1),
            "does not take 3 images of 1 x 16 x 16",
        ),
        (
            "weights.safetensors",
            {},
            "architecture is None; allowed for a file of weights",
        ),
        (
            "weights.safetensors",
            dict(architecture="torchvision:resnet18", size=32),
            "weights that are not those of torchvision:resnet18",
        ),
        ("junk.pt2", {}, "which is no exported program"),
        ("junk.pt", dict(architecture="SmallConvNet"), "holds no plain weights"),
        (
            "torchvision:resnet8",
            {},
            "allowed are classifiers of torchvision, such as .*resnet18",
        ),
        ("net.pt2", dict(std=[0.0]), "std above 0"),
        ("net.pt2", dict(mean=[0.1, 0.2], std=[1.0, 1.0, 1.0]), "one number a channel"),
    ],
)
def test_bad_models_get_a_sentence(name, options, said, files):
    options = {"classes": 10} | options
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_classifier(name if ":" in name else str(files / name), **options)
    assert "\n" not in str(error.value)


def test_bad_folders_get_a_sentence(tmp_path, files):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="whose class folders hold no file"):
        sample_images(tmp_path, 8)
    (tmp_path / "a" / "no.png").write_text("no")
    with pytest.raises(
        ValueError, match="data holds a/no.png, which is no readable image"
    ):
        sample_images(tmp_path, 8)
    with pytest.raises(
        ValueError, match="most is -3; allowed is an integer of at least 1"
    ):
        sample_images(files / "photos", 8, most=-3)
    with pytest.raises(FileNotFoundError, match="^data names"):
        sample_images(tmp_path / "none", 8)
    few = [
        sample_images(files / "photos", 8, 1, most=20, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert (
        len(few[0]) == 20
        and torch.equal(few[0], few[1])
        and not torch.equal(few[0], few[2])
    )
    assert sample_images(files / "photos", 4, 3, most=5)[0].shape == (5, 3, 4, 4)


def asked_of(files, **parameters):
    """The code of the notebook, its parameters set, up to its records."""
    given = {
        "model": str(files / "net.pt2"),
        "data": files / "photos",
        "eps": 0.1,
        "examples": 30,
    } | parameters
    names = dict(vars(evaluate)) | {"__name__": "notebook"}
    for cell in nbformat.read(catalogue()["robust/evaluate"], as_version=4).cells:
        if cell.cell_type == "code" and "%pip" not in cell.source:
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names.update(given)
            yield cell, names


@pytest.fixture
def recorded(monkeypatch):
    """What the notebook records."""
    from bigmodel_nb.kit import record

    found = {}
    monkeypatch.setattr(record, "record", found.__setitem__)
    return found


@pytest.fixture
def shown(monkeypatch):
    """What the notebook shows, in order: place (None: that of the cell) and thing."""
    import IPython.display as ipython

    found = []
    for name in ("display", "update_display"):
        monkeypatch.setattr(
            ipython,
            name,
            lambda thing, display_id=None: found.append((display_id, thing)),
        )
    return found


def answers_first(shown):
    """The answer, by place: all places come first, and each is filled later."""
    places = ["verdict", "picture", "evidence", "images"]
    assert [place for place, _ in shown[:4]] == places and {
        place for place, _ in shown[4:]
    } == {None, *places}
    last = {place: thing for place, thing in shown if place}
    assert all(last[place] is not first for place, first in shown[:4])
    return last


def test_the_notebook_reports_on_a_model_of_ones_own(files, workshop, recorded, shown):
    """On an exported net and a folder: one story, of the user's model alone."""
    order = []
    for cell, names in asked_of(files):
        order.append(cell.source)
    answered = answers_first(shown)
    assert (
        answered["verdict"].data.startswith("**net.pt2** classifies")
        and str(names["report"]) in answered["verdict"].data
    )
    assert "curve's 20-step PGD, a cheaper attack, leaves" in answered["verdict"].data
    assert (
        str(names["robust"]) in answered["picture"].metadata["alt"]
        and "taken for" in answered["images"].metadata["alt"]
    )
    assert (
        len([place for place, _ in shown if place is None]) == 1
    )  # the sentence that leads over to the lesson
    assert (
        names["named"] == "net.pt2"
        and names["as_they_are"].value > 0.9
        and names["as_they_are"].n == 30
    )
    assert (
        names["robust"].value < names["as_they_are"].value
        and not names["report"].failed
    )
    assert (
        names["own_curve"]["accuracy"][0] == names["as_they_are"].value
        and names["doubt"] == ""
    )
    for own in (
        "net",
        "hardened",
        "promised",
        "sweeps",
        "linear",
        "exposed",
        "resizing",
        "kept_by",
        "two",
        "verdicts",
        "by_bpda",
    ):
        assert own not in names, f"{own} is the lesson's own"
    assert {
        "rounded",
        "robust_of_60",
        "linear_gap",
        "sweep_cost",
        "checks_failed_by_the_rounded_net",
    }.isdisjoint(recorded)
    place = {
        part: next(row for row, source in enumerate(order) if part in source)
        for part in (
            "strongest(judged",
            'point=("the ensemble',
            "report = masking_report(",
        )
    }
    assert (
        place["strongest(judged"]
        < place['point=("the ensemble']
        < place["report = masking_report("]
    )
    assert (
        "20 steps, 3 target classes, 300 queries; standard: 100, 9, 5,000"
        in recorded["verdict"]
    )
    assert len(recorded["verdict"]) <= 400  # what a report shows unfolded
    assert (
        recorded["attack"] in recorded["verdict"]
        and "AutoAttack's standard ensemble" not in recorded["verdict"]
    )
    verdicts = [
        *recorded["checks_held"],
        *recorded["checks_open"],
        *recorded["checks_failed"],
    ]
    assert (
        sorted(verdicts) == sorted(check.check for check in names["report"].checks)
        and len(recorded["checks"]) == 10
    )
    assert (
        recorded["checks_open"]
        and not recorded["checks_failed"]
        and "open: whether gradients are masked is not settled" in recorded["verdict"]
    )
    assert {check.against.n for check in names["report"].checks} == {
        int(names["clean"].sum())
    }  # the images of the verdict
    assert json.dumps(to_json(recorded))


def test_the_notebook_judges_a_randomised_model_in_expectation(
    files, workshop, recorded, shown, net
):
    lots = Before(net, lambda x: (x + 0.25 * torch.randn_like(x)).clamp(0, 1)).eval()
    torch.export.save(
        torch.export.export(
            lots,
            (torch.rand(4, 1, 8, 8),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        ),
        files / "lots.pt2",
    )
    for _, names in asked_of(files, model=str(files / "lots.pt2"), examples=8):
        pass
    assert (
        names["randomised"]
        and names["judged"].samples == names["draws"] == 10
        and "noise" not in recorded
    )
    assert names["robust"].value == pytest.approx(
        expected_correct(names["subject"], names["points"], names["answers"], 10)
        .mean()
        .item(),
        abs=0.05,
    )
    assert (
        recorded["checks_failed"][:1] == [ALIKE]
        and "in expectation over 10 other draws" in recorded["verdict"]
        and "standard" not in recorded["verdict"]
    )
    assert recorded["curve"]["eps"] == [0.0, 0.05, 0.1, 0.2] and answers_first(shown)[
        "verdict"
    ].data.startswith("**lots.pt2** classifies")


@pytest.mark.parametrize(
    "norm, full, said",
    [
        (
            "linf",
            True,
            "AutoAttack's standard ensemble (100 steps, 9 target classes, 5,000"
            " queries)",
        ),
        ("l2", False, "AutoAttack's ensemble at reduced effort (20 steps"),
        (
            "l1",
            True,
            "an ensemble like AutoAttack's, whose ℓ1 attacks are stronger (100 steps, 9"
            " target classes, 5,000 queries)",
        ),
    ],
)
def test_only_full_effort_in_its_own_ball_is_called_standard(norm, full, said):
    (cell,) = [
        cell
        for cell in nbformat.read(catalogue()["robust/evaluate"], as_version=4).cells
        if "attacked_by = (" in cell.source
    ]
    effort = {} if full else {"steps": 20, "n_target_classes": 3, "queries": 300}
    names = dict(vars(evaluate)) | {
        "strongest": EnsembleAttack.standard(0.1, norm, **effort),
        "eps": 0.1,
        "norm": norm,
        "randomised": False,
    }
    exec(cell.source, names)
    assert names["attacked_by"].startswith(said)


@pytest.mark.parametrize(
    "parameters, said",
    [
        (dict(examples=0), "^examples is 0; allowed is an integer of at least 1$"),
        (dict(examples=-3), "^examples is -3"),
        (dict(eps=0), "^eps is 0; allowed is a number above 0"),
        (dict(eps=-1), "^eps is -1; allowed is a number above 0"),
        (dict(eps=math.nan), "^eps is nan"),
        (dict(eps=8), "^eps is 8"),
        (dict(size=0), "^size is 0"),
        (dict(norm="l3"), "^norm is 'l3'"),
        (dict(data=None), "^data is not given, and model is '.*net.pt2'; allowed"),
        (dict(model=None), "^model is not given, and data is '.*photos'; allowed"),
        (dict(model="nofile.pt2"), "^model is 'nofile.pt2', and there is no such file"),
        (
            dict(model="nofile.pt2", data=None),
            "^model is 'nofile.pt2', and there is no such file",
        ),
        (dict(data="nowhere"), "^data names 'nowhere', and there is no such folder"),
        (dict(std=[0.0]), "std above 0"),
        (dict(std=[math.nan]), "std above 0"),
        (dict(mean=[]), "one number a channel"),
        (
            dict(model=None, data=None, grey=True),
            "^grey is True, and model is not given",
        ),
        (dict(model=None, data=None, size=8), "^size is 8, and model is not given"),
    ],
)
def test_a_bad_request_gets_a_sentence_at_the_top(parameters, said, files):
    cells = 0
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        for cells, _ in enumerate(asked_of(files, **parameters)):
            pass
    assert (
        cells < 7
        and "\n" not in str(error.value)
        and "images is" not in str(error.value)
    )


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.integers(-5, 0), st.floats(), st.booleans(), st.text(max_size=3)))
def test_no_number_of_examples_but_a_positive_integer_is_taken(value):
    with pytest.raises(
        ValueError, match="^examples is .*; allowed is an integer of at least 1"
    ):
        evaluate._check_request(None, None, 0.1, value)


def test_what_chapter_6_judges_by_is_found_in_both_places():
    assert (
        robust_accuracy is attacks.robust_accuracy
        and robustness_curve is attacks.robustness_curve
    )
    assert {"robust_accuracy", "robustness_curve", "masking_report"} <= set(
        evaluate.__all__
    )


def test_a_sample_takes_images_of_folders_within_and_no_litter(tmp_path):
    for name in ("a", "b"):
        for inner in ("", "sub", "sub/deep"):
            (tmp_path / name / inner).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / name / inner / "x.png")
        for litter in ("Thumbs.db", "desktop.ini", "ehthumbs.db", "Icon\r"):
            (tmp_path / name / litter).write_bytes(b"no image")
    for seed in range(6):
        images, classes, _ = sample_images(tmp_path, 4, most=3, seed=seed)
        assert len(images) == 3
    assert len(sample_images(tmp_path, 4)[0]) == 6
    (tmp_path / "a" / "sub" / "torn.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a/sub/torn.png"):
        sample_images(tmp_path, 4)
