"""Chapter 6: certificates beside exact distances, SciPy, and attacks on them."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import PGD, robustness_curve
from bigmodel_nb.robust.certify import (
    IntervalTraining,
    NoiseTraining,
    SmoothedClassifier,
    certified_accuracy,
    certified_curve,
    clopper_pearson,
    interval_bounds,
    interval_radii,
    margin_bounds,
    smoothed_radii,
)
from bigmodel_nb.training.loop import fit, supervised

WIDE = (-1e3, 1e3)


def linear(d=6, classes=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(d, classes).to(dtype).requires_grad_(False)


def network(seed, dtype=torch.float64, images=False, last=True):
    """A small net with random weights, statistics and depth."""
    torch.manual_seed(seed)
    layers = []
    if images:
        layers += [
            nn.Conv2d(2, 4, 3, padding=seed % 2),
            nn.BatchNorm2d(4, affine=seed % 3 > 0),
            nn.ReLU(),
            (nn.AvgPool2d, nn.MaxPool2d)[seed % 2](2),
            nn.Conv2d(4, 6, 2, groups=1 + seed % 2, bias=seed % 3 == 0),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2 if seed % 4 else 1),
            nn.Flatten(),
        ]
        width = 24 if seed % 4 else 6
    else:
        width = 5
    layers.append(
        nn.Sequential(
            nn.Linear(width, 8),
            nn.Identity(),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
    )
    layers += [nn.Linear(8, 3)] if last else [nn.Linear(8, 3), nn.ReLU()]
    net = nn.Sequential(*layers).to(dtype).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2.0)
            if module.weight is not None:
                module.weight.normal_()
                module.bias.normal_()
    return net


def distances(model, x, y, order):
    logits = model(x)
    gaps = logits.gather(1, y[:, None]) - logits
    lengths = (model.weight[y][:, None] - model.weight).norm(order, dim=2)
    return (gaps / lengths).scatter(1, y[:, None], math.inf).amin(1)


# Intervals ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_one_layer_is_exact_by_brute_force(seed, d):
    layer = linear(d, 4, seed)
    low = torch.randn(1, d, dtype=torch.float64)
    high = low + torch.rand(1, d, dtype=torch.float64) * torch.randint(0, 2, (1, d))
    corners = torch.cartesian_prod(*torch.stack([low[0], high[0]], 1)).view(-1, d)
    reached = layer(corners)
    least, most = interval_bounds(layer, low, high)
    assert (least[0] <= reached.amin(0)).all() and (most[0] >= reached.amax(0)).all()
    assert torch.allclose(least[0], reached.amin(0), atol=1e-12) and torch.allclose(
        most[0], reached.amax(0), atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_inside_gets_outside(seed, eps, images, dtype):
    net = network(seed, dtype, images)
    shape = (2, 7, 7) if images else (5,)
    x = torch.randn(3, *shape, dtype=dtype)
    low, high = interval_bounds(net, x - eps, x + eps)
    y = torch.tensor([0, 1, 2])
    margins = margin_bounds(net, x - eps, x + eps, y)
    share = torch.rand(300, 3, *shape, dtype=dtype)
    share[:100] = share[:100].round()  # corners
    for each in share:
        z = (x - eps) + each * ((x + eps) - (x - eps))
        logits = net(torch.minimum(torch.maximum(z, x - eps), x + eps))
        assert (logits >= low).all() and (logits <= high).all()
        assert (logits.gather(1, y[:, None]) - logits >= margins).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float64]))
def test_rounding_is_included(seed, dtype):
    """An interval of one point holds what the model computes, summed in any order."""
    net = network(seed, dtype, images=True)
    x = 100 * torch.randn(4, 2, 7, 7, dtype=dtype)
    low, high = interval_bounds(net, x, x)
    for output in (
        net(x),
        net(x.to(memory_format=torch.channels_last)),
        torch.cat([net(each) for each in x.split(1)]),
        copy.deepcopy(net).double()(x.double()),
    ):
        assert (output >= low).all() and (output <= high).all()
    assert (
        (high - low)
        <= (1e-2 if dtype == torch.float32 else 1e-10) * (1 + high.abs().amax())
    ).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1))
def test_elision_is_tighter_and_true_without_a_linear_end_too(seed, eps):
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([2, 0, 1])
    net = network(seed)
    low, high = interval_bounds(net, x - eps, x + eps)
    apart = (low.gather(1, y[:, None]) - high).scatter(1, y[:, None], 0.0)
    assert (margin_bounds(net, x - eps, x + eps, y) >= apart - 1e-9).all()
    net = network(seed, last=False)
    low, high = interval_bounds(net, x - eps, x + eps)
    assert torch.equal(
        margin_bounds(net, x - eps, x + eps, y),
        (low.gather(1, y[:, None]) - high).scatter(1, y[:, None], 0.0),
    )


@pytest.mark.parametrize(
    "dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_certificate_of_a_linear_model_is_the_exact_distance(seed, dtype, rounding):
    model = linear(12, 4, seed, dtype)
    x = torch.rand(40, 12, dtype=dtype)
    y = model(x).argmax(1)
    exact = distances(model.double(), x.double(), y, 1)
    found = interval_radii(model.to(dtype), x, y, bounds=(-10.0, 10.0))
    assert (found <= exact + 1e-15).all() and (
        (found - exact).abs() <= rounding * (1 + exact)
    ).all()


def test_radii_at_their_ends():
    model = nn.Linear(2, 2).double().requires_grad_(False)
    model.weight.zero_()
    model.bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.rand(3, 2, dtype=torch.float64)
    assert interval_radii(model, x, torch.tensor([0, 0, 1])).tolist() == [
        1.0,
        1.0,
        -1.0,
    ]
    assert interval_radii(model, x[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
    model.bias.zero_()
    assert interval_radii(model, x, torch.tensor([0, 0, 1])).tolist() == [-1.0] * 3, (
        "a tie certifies nothing"
    )


@pytest.mark.filterwarnings("ignore:the model has no gradient")  # dead units
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_no_attack_inside_a_certificate_on_random_nets(seed, images):
    net = network(seed, torch.float32, images)
    shape = (2, 7, 7) if images else (5,)
    x = torch.rand(12, *shape)
    y = net(x).argmax(1)
    radii = interval_radii(net, x, y)
    for i in (radii > 0).nonzero()[:, 0].tolist()[:4]:
        attack = PGD(radii[i].item(), steps=10, restarts=2, loss="margin")
        assert net(attack(net, x[i : i + 1], y[i : i + 1])).argmax(1) == y[i]


def trained(objective, model, epochs=8, rate=1e-2):
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    batches = loader(images[train], targets[train], batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(batches)
    )
    fit(
        model,
        batches,
        epochs=epochs,
        optimizer=optimizer,
        scheduler=schedule,
        objective=objective,
        device="cpu",
    )
    return model.eval(), images[test][:150], targets[test][:150]


def shallow():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )


@pytest.fixture(scope="module")
def tight():
    return trained(IntervalTraining(0.1, ramp=180), shallow())


@pytest.fixture(scope="module")
def calm():
    torch.manual_seed(0)
    return trained(NoiseTraining(0.25), SmallConvNet(width=8), rate=5e-3)


def test_training_makes_the_bound_tight_and_no_attack_breaks_it(tight):
    net, x, y = tight
    radii = interval_radii(net, x, y)
    plain, *_ = trained(supervised(cross_entropy), shallow())
    assert (
        certified_accuracy(radii, 0.1).low
        > certified_accuracy(interval_radii(plain, x, y), 0.1).high + 0.2
    )
    attack = PGD(0.1, steps=20, restarts=3, loss="margin", early_stop=True)
    asked = [0.0, 0.02, 0.05, 0.1, 0.15]
    proven, left = (
        certified_curve(radii, asked),
        robustness_curve(net, loader(x, y), attack, asked),
    )
    assert (
        list(proven.columns) == list(left.columns)
        and (proven["accuracy"] <= left["accuracy"]).all()
    )
    for i in (radii > 0).nonzero()[:20, 0].tolist():  # at each example's own radius
        found = PGD(radii[i].item(), steps=20, restarts=3, loss="margin")(
            net, x[i : i + 1], y[i : i + 1]
        )
        assert net(found).argmax(1) == y[i]


def test_interval_training_bounds_the_loss_of_every_attack(tight):
    net, x, y = tight
    bound = IntervalTraining(0.08, clean_weight=0.0)(net, x, y)
    attacked = PGD(0.08, steps=20)(net, x, y)
    assert cross_entropy(net(attacked), y) <= bound
    assert abs(IntervalTraining(0.0)(net, x, y) - cross_entropy(net(x), y)) < 1e-3


def test_interval_training_of_a_linear_model_is_the_exact_worst_loss():
    model, x, y = (
        linear(6, 2),
        torch.rand(9, 6, dtype=torch.float64),
        torch.randint(0, 2, (9,)),
    )
    model.requires_grad_()
    w = model.weight[1] - model.weight[0]
    margin = (2 * y - 1) * (x @ w + model.bias[1] - model.bias[0])
    worst = nn.functional.softplus(-(margin - 0.2 * w.abs().sum())).mean()
    ours = IntervalTraining(0.2, clean_weight=0.0, bounds=WIDE)(model, x, y)
    assert abs(ours - worst) < 1e-10
    for one, other in zip(
        torch.autograd.grad(ours, [*model.parameters()]),
        torch.autograd.grad(worst, [*model.parameters()]),
    ):
        assert (one - other).abs().max() < 1e-10


def test_ramp_starts_at_the_plain_loss_and_arrives():
    model, x, y = (
        linear(),
        torch.rand(5, 6, dtype=torch.float64),
        torch.randint(0, 3, (5,)),
    )
    objective = IntervalTraining(0.1, ramp=4, clean_weight=0.25)
    values = [objective(model, x, y).item() for _ in range(7)]
    assert values[0] == pytest.approx(cross_entropy(model(x), y).item())
    assert (
        all(a < b for a, b in zip(values[:4], values[1:5]))
        and values[4] == values[5] == values[6]
    )
    assert values[4] == pytest.approx(
        IntervalTraining(0.1, clean_weight=0.25)(model, x, y).item()
    )
    halfway = IntervalTraining(0.05, clean_weight=1 - 0.5 * 0.75)(model, x, y).item()
    assert values[2] == pytest.approx(halfway), (
        "radius and weight of the bound grow together"
    )


# Noise --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-4, 0.9))
def test_bound_is_scipys(n, share, alpha):
    k = round(share * n)
    theirs = (
        stats.binomtest(k, n, alternative="greater")
        .proportion_ci(1 - alpha, "exact")
        .low
    )
    assert abs(clopper_pearson(k, n, alpha) - theirs) < 1e-9
    if k:
        assert (
            abs(stats.binom.sf(k - 1, n, clopper_pearson(k, n, alpha)) - alpha) < 1e-9
        ), "k or more come with probability alpha"


@pytest.mark.parametrize("n", [1, 10, 100])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_coverage_is_at_least_promised_everywhere(n, alpha):
    ends = np.array([clopper_pearson(k, n, alpha) for k in range(n + 1)])
    truths = np.linspace(0.001, 0.999, 333)[:, None]
    covered = (stats.binom.pmf(np.arange(n + 1), n, truths) * (ends <= truths)).sum(1)
    assert covered.min() >= 1 - alpha - 1e-12
    just_above = ends[1:] * (1 - 1e-9)  # where the promise is used up
    worst = stats.binom.cdf(np.arange(n), n, just_above)
    assert np.allclose(worst, 1 - alpha, atol=1e-6)


def test_coverage_by_simulation():
    drawn = np.random.default_rng(0).binomial(200, 0.93, 40_000)
    ends = np.array([clopper_pearson(k, 200, 0.05) for k in range(201)])
    miss = (ends[drawn] > 0.93).mean()
    exact = stats.binom.pmf(np.arange(201), 200, 0.93)[ends > 0.93].sum()
    assert (
        abs(miss - exact) < 4 * (exact * (1 - exact) / 40_000) ** 0.5 and exact <= 0.05
    )


def test_certificate_of_a_linear_model_nears_the_exact_distance_from_below():
    model = linear(3, 2)
    x = torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64)
    y = model(x).argmax(1)
    exact = distances(model, x, y, 2).item()
    sigma, medians = 1.2 * exact, []
    for n in (100, 1000, 10_000):
        runs = [
            SmoothedClassifier(model, 2, sigma, seed=seed).certify(x, 50, n, 0.05)
            for seed in range(100)
        ]
        radii = np.array([radius.item() for classes, radius in runs])
        assert all(classes.item() in (-1, y.item()) for classes, _ in runs)
        assert (
            stats.binomtest(
                int((radii > exact).sum()), 100, 0.05, alternative="greater"
            ).pvalue
            > 1e-3
        )
        medians.append(np.median(radii))
    assert medians == sorted(medians) and 0.95 * exact < medians[-1] < exact
    p = stats.norm.cdf(exact / sigma)
    expected = sigma * stats.norm.ppf(clopper_pearson(round(p * 10_000), 10_000, 0.05))
    assert medians[-1] == pytest.approx(expected, rel=0.02)


class Recorder(nn.Module):
    """A linear model that keeps what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, input):
        self.seen.append(input)
        return self.model(input)


def noise_of(call, x, **options):
    """What `call` of a smoothed classifier adds to `x`, (example, draw, ...)."""
    recorder = Recorder(linear(x[0].numel(), 2, dtype=x.dtype))
    call(SmoothedClassifier(recorder, 2, 0.5, batch_size=50, **options))
    return (
        torch.stack(recorder.seen).unflatten(0, (len(x), -1)).flatten(1, 2) - x[:, None]
    )


def test_noise_is_not_known_before_the_input_unless_a_seed_is_given():
    """Who knows the noise can choose an input whose certificate is false."""
    x = torch.zeros(1, 4)

    def drawn(**options):
        return noise_of(lambda smoothed: smoothed.certify(x, 50, 100), x, **options)

    assert not torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(seed=None), drawn(seed=None))
    assert torch.equal(drawn(seed=7), drawn(seed=7))
    assert not torch.equal(drawn(seed=7), drawn(seed=8))


def test_one_classifier_without_a_seed_draws_anew_at_each_call():
    x = torch.zeros(1, 4)
    for method in ("certify", "predict"):
        both = noise_of(
            lambda smoothed: [getattr(smoothed, method)(each, 50) for each in (x, x)],
            x,
        )
        first, second = both.chunk(2, 1)
        assert not torch.equal(first, second)


def test_different_inputs_meet_independent_noise():
    """Else the errors of one run come together, and no interval over examples holds."""
    x = torch.stack([torch.zeros(4), torch.ones(4)]).double()
    for seed in (None, 3):
        noise = noise_of(lambda smoothed: smoothed.predict(x, 1000), x, seed=seed)
        assert abs(noise.std() - 0.5) < 0.02
        across = np.corrcoef(noise.flatten(1).numpy())[0, 1]
        assert abs(across) < 5 / noise[0].numel() ** 0.5


def test_the_judge_never_draws_the_noise_of_training():
    """The model depends on the noise that it was trained with."""
    x = torch.zeros(1, 4, dtype=torch.float64)
    judged = noise_of(lambda smoothed: smoothed.predict(x, 50), x, seed=0)[0]
    attacked = noise_of(lambda smoothed: smoothed(x), x, seed=0, draws=50)[0]
    trainer, recorder = NoiseTraining(0.5, seed=0), Recorder(linear(4, 2))
    trainer(recorder, x.expand(50, 4), torch.zeros(50, dtype=torch.long))
    for one, other in ((judged, recorder.seen[0]), (judged, attacked)):
        assert not torch.isin(one, other).any()


def test_radius_is_the_bound_of_the_votes_in_double_precision():
    """Rounded to a shorter type it could be too long."""
    x = torch.zeros(1, 2)
    for n in (10, 100, 1000, 12_345):
        radius = SmoothedClassifier(Always(), 2, 0.3, seed=0).certify(x, 1, n)[1]
        wanted = 0.3 * stats.norm.ppf(clopper_pearson(n, n, 0.001))
        assert radius.item() == pytest.approx(wanted, rel=1e-14, abs=0)


def test_class_is_chosen_by_other_draws_than_it_is_certified_with():
    """At a tie the same draws would be wrong up to twice as often.

    Abstaining depends on the second stage alone.
    """
    model = nn.Linear(1, 2, bias=False).double().requires_grad_(False)
    model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    false = sum(
        SmoothedClassifier(model, 2, 1.0, seed=seed).certify(x, 200, 200, 0.3)[0].item()
        >= 0
        for seed in range(600)
    )
    promised = stats.binom.pmf(np.arange(201), 200, 0.5)[
        [clopper_pearson(k, 200, 0.3) > 0.5 for k in range(201)]
    ].sum()
    assert promised <= 0.3 and stats.binomtest(false, 600, promised).pvalue > 1e-3

    recorder = Recorder(model)
    SmoothedClassifier(recorder, 2, 1.0, batch_size=64).certify(x, 100, 150, 0.1)
    seen = [each.flatten() for each in recorder.seen]
    drawn = torch.cat(seen)
    assert (
        len(drawn) == 250 and len(drawn.unique()) == 250 and max(map(len, seen)) == 64
    )


def test_predict_is_the_test_of_the_paper(calm):
    net, x, _ = calm
    smoothed = SmoothedClassifier(net, 10, 0.6, batch_size=64, seed=0)
    for alpha in (0.001, 0.3):
        said, counts = (
            smoothed.predict(x[:40], 60, alpha),
            smoothed._votes(x[:40], 60)[0],
        )
        for answer, count in zip(said.tolist(), counts):
            (a, b), top = (
                count.sort(descending=True).values[:2].tolist(),
                count.argmax().item(),
            )
            assert count.sum() == 60 and answer == (
                top if stats.binomtest(a, a + b).pvalue <= alpha else -1
            )
    assert (said == -1).any() and (said >= 0).any()


def test_smoothing_is_the_same_whatever_stands_beside(calm):
    net, x, y = calm
    smoothed = SmoothedClassifier(net, 10, 0.25, seed=3)
    classes, radii = smoothed.certify(x[:6], 20, 100)
    again = smoothed.certify(x[:6], 20, 100)
    assert torch.equal(classes, again[0]) and torch.equal(radii, again[1])
    order = torch.tensor([4, 0, 5])
    assert torch.equal(smoothed.certify(x[order], 20, 100)[1], radii[order])
    assert not torch.equal(
        SmoothedClassifier(net, 10, 0.25, seed=4).certify(x[:6], 20, 100)[1], radii
    )
    assert classes.dtype == torch.long and radii.dtype == torch.float64
    assert torch.equal(
        smoothed_radii(smoothed, x[:6], y[:6], 20, 100),
        torch.where(classes == y[:6], radii, -1.0),
    )
    for empty in (*smoothed.certify(x[:0], 2, 10), smoothed.predict(x[:0], 11)):
        assert empty.shape == (0,)


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    net[1].eval()
    before, modes = (
        copy.deepcopy(net.state_dict()),
        [module.training for module in net.modules()],
    )
    x, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    state = torch.get_rng_state()
    SmoothedClassifier(net, 3, 0.1).certify(x, 5, 10)
    SmoothedClassifier(net, 3, 0.1).predict(x, 11)
    interval_radii(net, x, y)
    with pytest.raises(ValueError, match="allowed are 0 to 2"):
        interval_radii(net, x, y + 1)
    assert all(
        torch.equal(before[name], value) for name, value in net.state_dict().items()
    )
    assert [module.training for module in net.modules()] == modes and torch.equal(
        torch.get_rng_state(), state
    )
    assert all(parameter.grad is None for parameter in net.parameters())


def test_nothing_of_the_callers_is_written_to():
    low, high = -torch.ones(1, 3), torch.ones(1, 3)
    interval_bounds(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), low, high)
    assert (low == -1).all()


def test_no_attack_breaks_the_certificates_of_the_trained_net(calm):
    net, x, y = calm
    smoothed, stand_in = (
        SmoothedClassifier(net, 10, 0.25, batch_size=200, seed=0),
        SmoothedClassifier(net, 10, 0.25, seed=9),
    )
    x, y = x[:60], y[:60]
    radii = smoothed_radii(smoothed, x, y, 50, 400, 0.001)
    certified = (radii > 0.05).nonzero()[:, 0]
    assert len(certified) > 40
    for i in certified.tolist()[:25]:
        for share in (0.6, 0.999):
            found = PGD(
                share * radii[i].item(), "l2", 10, loss="margin", bounds=(-1.0, 2.0)
            )(stand_in, x[i : i + 1], y[i : i + 1])
            assert smoothed.predict(found, 400, 0.001).item() in (y[i].item(), -1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_the_worst_case_formula_holds_on_random_nets(seed, sigma):
    """Votes at a moved input are as many as the formula says, but for sampling."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(
        False
    )
    x = torch.randn(1, 2)
    counts = SmoothedClassifier(net, 3, sigma, batch_size=5000, seed=seed)._votes(
        x, 5000
    )[0, 0]
    top, low = counts.argmax(), clopper_pearson(counts.max().item(), 5000, 1e-4)
    for angle in (0.0, 1.5, 3.0, 4.5):
        length = 0.8 * sigma
        moved = x + length * torch.tensor([[math.cos(angle), math.sin(angle)]])
        votes = (
            SmoothedClassifier(net, 3, sigma, batch_size=5000, seed=seed + 1)
            ._votes(moved, 5000)[0, 0, top]
            .item()
        )
        least = stats.norm.cdf(stats.norm.ppf(low) - length / sigma)
        assert stats.binom.cdf(votes, 5000, least) > 1e-6


def test_surrogate_is_the_mean_of_probabilities_and_has_a_gradient(calm):
    net, x, _ = calm
    recorder = Recorder(net)
    smoothed = SmoothedClassifier(recorder, 10, 0.25, draws=5)
    said = smoothed(x[:3])
    mean = torch.stack([net(each).softmax(1) for each in recorder.seen]).mean(0)
    noise = torch.stack(recorder.seen) - x[:3]
    assert len(noise) == 5 and torch.allclose(noise, noise[:, :1], atol=1e-6)
    assert torch.allclose(said.exp(), mean, atol=1e-5)
    assert torch.equal(smoothed(x[:3]), said), "the same at each call, with no seed too"
    wanted = x[:2].clone().requires_grad_()
    assert torch.autograd.grad(smoothed(wanted).sum(), wanted)[0].abs().sum() > 0


def test_noise_training_draws_fresh_noise_that_repeats():
    recorder = Recorder(nn.Linear(3, 2))
    x, y = torch.zeros(4000, 3), torch.zeros(4000, dtype=torch.long)
    first, again = NoiseTraining(0.3), NoiseTraining(0.3)
    for objective in (first, first, again):
        objective(recorder, x, y)
    seen = recorder.seen
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert abs(seen[0].std().item() - 0.3) < 0.01 and abs(seen[0].mean().item()) < 0.01


# Curves and bad input -----------------------------------------------------------------


def test_curve_counts_and_never_rises():
    radii = torch.tensor([-1.0, 0.0, 0.1, 0.2, 0.5], dtype=torch.float64)
    curve = certified_curve(radii, [0.5, 0.0, 0.1])
    assert curve["eps"].tolist() == [0.0, 0.1, 0.5] and curve["accuracy"].tolist() == [
        0.8,
        0.6,
        0.2,
    ]
    assert (
        (curve["n"] == 5).all()
        and (curve["low"] < curve["accuracy"]).all()
        and (curve["accuracy"] < curve["high"]).all()
    )


class Own(nn.Module):
    def forward(self, input):
        return input


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, input):
        return self.make(input)


def hooked():
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


X, Y = torch.rand(2, 3), torch.tensor([0, 1])
BAD = {
    "sigma zero": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.0),
        "sigma is 0.0; allowed is a positive number",
    ),
    "sigma nan": (
        lambda: NoiseTraining(math.nan),
        "sigma is nan; allowed is a positive number",
    ),
    "seed": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1, seed=-1),
        "seed is -1; allowed is an integer of at least 0, or None",
    ),
    "seed of training": (
        lambda: NoiseTraining(0.1, seed=-1),
        "seed is -1; allowed is an integer of at least 0",
    ),
    "classes": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 1, 0.1),
        "classes is 1; allowed is an integer of at least 2",
    ),
    "alpha": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(X, alpha=1.0),
        "alpha is 1.0; allowed is a number between 0 and 1",
    ),
    "alpha percent": (
        lambda: clopper_pearson(3, 5, 5),
        "alpha is 5; allowed is a number between 0 and 1",
    ),
    "n": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).predict(X, 0),
        "n is 0; allowed is an integer of at least 1",
    ),
    "n that certifies nothing": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(X, n=9),
        "n is 9, and at alpha 0.001 even draws that all agree give a certificate from"
        " 10 on",
    ),
    "n that answers nothing": (
        lambda: smoothed_radii(
            SmoothedClassifier(nn.Linear(3, 2), 2, 0.1), X, Y, n=4, alpha=0.05
        ),
        "n is 4, and at alpha 0.05 .* allowed are at least 5",
    ),
    "n0": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(X, 0),
        "n0 is 0; allowed is an integer of at least 1",
    ),
    "successes": (
        lambda: clopper_pearson(6, 5, 0.1),
        "successes is 6; allowed is an integer from 0 to n, here 5",
    ),
    "probabilities": (
        lambda: SmoothedClassifier(
            nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), 2, 0.1
        ).predict(X),
        "gives probabilities",
    ),
    "wrong classes": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 5, 0.1).predict(X, 19),
        r"allowed are logits \(19, 5\)",
    ),
    "nan logits": (
        lambda: SmoothedClassifier(
            Outputs(lambda x: x[:, :2] * math.nan), 2, 0.1
        ).predict(X),
        "model gives nan for 100 of 100",
    ),
    "integers": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(Y[:, None]),
        "x is torch.int64; allowed is a floating tensor",
    ),
    "nan": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(X * math.nan),
        "x holds nan or infinity",
    ),
    "no batch": (
        lambda: SmoothedClassifier(nn.Linear(3, 2), 2, 0.1).certify(X[0]),
        r"x has shape \(3,\); allowed is \(batch, ...\)",
    ),
    "interval integers": (
        lambda: interval_bounds(nn.Linear(3, 2), Y[:, None], Y[:, None]),
        "low is torch.int64",
    ),
    "interval nan": (
        lambda: interval_bounds(nn.Linear(3, 2), X, X * math.nan),
        "high holds nan or infinity",
    ),
    "low above high": (
        lambda: interval_bounds(nn.Linear(3, 2), X, X - 0.1),
        "low is above high in some places; allowed are ends of one shape",
    ),
    "shapes": (
        lambda: interval_bounds(nn.Linear(3, 2), X, X[:1]),
        r"low has shape \(2, 3\) and high \(1, 3\)",
    ),
    "own module": (
        lambda: interval_bounds(nn.Sequential(nn.Linear(3, 2), Own()), X, X),
        "model holds a Own, through which no interval is known to pass",
    ),
    "softmax": (
        lambda: interval_radii(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), X, Y),
        "model holds a Softmax",
    ),
    "own net": (
        lambda: interval_radii(SmallConvNet(), torch.rand(2, 1, 8, 8), Y),
        "model holds a SmallConvNet",
    ),
    "hooks": (lambda: interval_bounds(hooked(), X, X), "Linear with forward hooks"),
    "batch norm": (
        lambda: interval_bounds(nn.BatchNorm1d(3), X, X),
        r"BatchNorm1d that depends on its batch or on chance; .* call model.eval\(\)",
    ),
    "no statistics": (
        lambda: interval_bounds(
            nn.BatchNorm1d(3, track_running_stats=False).eval(), X, X
        ),
        "BatchNorm1d that depends on its batch",
    ),
    "dropout": (
        lambda: IntervalTraining(0.1)(
            nn.Sequential(nn.Dropout(), nn.Linear(3, 2)), X, Y
        ),
        "Dropout that depends on its batch or on chance",
    ),
    "y": (
        lambda: margin_bounds(nn.Linear(3, 2), X, X, Y + 1),
        "y ranges from 1 to 2; allowed are 0 to 1",
    ),
    "y shape": (
        lambda: margin_bounds(nn.Linear(3, 2), X, X, Y[:1]),
        r"allowed are integers of shape \(2,\)",
    ),
    "y of float": (
        lambda: smoothed_radii(
            SmoothedClassifier(nn.Linear(3, 2), 2, 0.1), X, Y.float()
        ),
        "y is torch.float32",
    ),
    "outside": (
        lambda: interval_radii(nn.Linear(3, 2), 255 * X, Y),
        "allowed are values within bounds, 0 to 1",
    ),
    "box": (
        lambda: interval_radii(nn.Linear(3, 2), X, Y, bounds=(1, 0)),
        r"bounds is \(1, 0\); allowed are a low and a higher number",
    ),
    "eps of training": (
        lambda: IntervalTraining(8),
        "eps is 8; allowed is a radius in input units, from 0 to 1",
    ),
    "ramp": (
        lambda: IntervalTraining(0.1, ramp=-1),
        "ramp is -1; allowed is an integer of at least 0",
    ),
    "clean weight": (
        lambda: IntervalTraining(0.1, clean_weight=2),
        "clean_weight is 2; allowed is a number from 0 to 1",
    ),
    "radii": (lambda: certified_accuracy(X, 0.1), r"radii is shape \(2, 3\)"),
    "radii nan": (
        lambda: certified_accuracy(X[0] * math.nan, 0.1),
        "nan not among them",
    ),
    "eps": (
        lambda: certified_accuracy(X[0], -0.1),
        "eps is -0.1; allowed is a radius in input units, from 0 up",
    ),
    "no eps": (lambda: certified_curve(X[0], []), "eps has no radius"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(name):
    call, said = BAD[name]
    with pytest.raises((ValueError, TypeError), match=said) as raised:
        call()
    assert "\n" not in str(raised.value) and "allowed" in str(raised.value)


class Always(nn.Module):
    """Says 1, whatever it is asked."""

    def forward(self, input):
        return torch.tensor([-1.0, 1.0]).expand(len(input), 2)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 0.6))
def test_the_least_number_of_draws_is_where_a_certificate_begins(alpha):
    """What is refused could not have been certified, and what is allowed can be."""
    smoothed, x = SmoothedClassifier(Always(), 2, 1.0), torch.zeros(1, 2)
    for ask, can in (
        (
            lambda n: smoothed.certify(x, 1, n, alpha)[0],
            lambda n: clopper_pearson(n, n, alpha) > 0.5,
        ),
        (lambda n: smoothed.predict(x, n, alpha), lambda n: 2 * 0.5**n <= alpha),
    ):
        least = next(n for n in range(1, 99) if can(n))
        assert ask(least).item() == 1
        if least > 1:
            with pytest.raises(
                ValueError, match=f"n is {least - 1}, .* allowed are at least {least}"
            ):
                ask(least - 1)


def test_validation_of_interval_training_is_at_the_whole_radius():
    from bigmodel_nb.training.loop import evaluate

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    pairs = [(torch.rand(5, 4), torch.randint(0, 3, (5,)))]
    ramping, whole = IntervalTraining(0.1, ramp=100), IntervalTraining(0.1)
    assert (
        evaluate(model, pairs, objective=ramping)
        == evaluate(model, pairs, objective=whole)
        and ramping._calls == 0
    )
    assert evaluate(model, pairs, objective=whole).loss > evaluate(model, pairs).loss


def expect_certify(m):
    low, high = m["certified_by_intervals"], m["under_pgd_by_intervals"]
    assert 0.6 < low["low"] and low["value"] <= high["value"], (
        "after certified training intervals prove much, and never more than PGD leaves"
    )
    assert m["certified_ordinary"]["high"] < 0.1, (
        "an ordinary net has no useful interval bounds"
    )
    assert m["certified_training_gain"]["low"] > 0.5, "certified training makes them"
    assert m["certified_training_cost"]["low"] > -0.1, "and costs little accuracy here"
    assert m["loss_under_pgd"] <= m["bound_of_the_loss"], (
        "what certified training minimises bounds the loss of an attack"
    )
    assert m["outside_without_rounding"] > 50 and m["outside_with_rounding"] == 0, (
        "an interval is a proof only with its rounding"
    )
    for exact in ("corner_difference", "linear_difference", "library_difference"):
        assert m[exact] < 1e-9, "bounds are exact where they can be"
    loose = [m["looseness"][str(depth)] for depth in range(1, 8)]
    assert loose[0] < 1.001 and loose[5] > 20 and loose == sorted(loose), (
        "intervals become looser with every layer"
    )
    covered = m["lowest_coverage"]
    assert covered["exact"] >= 0.95 > 0.6 > covered["Wald"], (
        "the exact bound keeps its level for every probability, the Wald interval not"
    )
    assert m["simulated_coverage"]["high"] > 0.95, "in a simulation too"
    assert m["turned"] == [0, m["digits_read_by_the_linear_model"]], (
        "on a linear model every change below the radius fails, one above succeeds"
    )
    assert m["longer_than_the_distance"]["low"] < 0.05, "radii are false rarely enough"
    assert 0.95 < m["share_of_the_distance"] < 1.01, "and near the exact distance"
    false = m["false_certificates"]
    assert false["as derived"]["low"] <= 0.05, "as rarely as promised"
    assert m["false_for_an_input_fixed_before"] <= 0.05 + 1e-9, (
        "for each input that was fixed before the noise"
    )
    wrong = [share["low"] for name, share in false.items() if name != "as derived"]
    assert len(wrong) == 4 and min(wrong) > 0.07, "each shortcut breaks the promise"
    assert false["input chosen after the noise"]["low"] > 0.15, (
        "known noise lets an input be found whose certificate is false"
    )
    assert 0 < m["certified_radius_of_the_opening"] < 0.62, "the opening certifies"
    assert m["predict_disagreements"] == 0, "predictions are the test of the paper"
    assert m["certificates_broken"] == 0, "no attack breaks a certificate"
    assert m["noise_training_gain"]["0.5"]["low"] > 0, (
        "training with noise certifies more digits at two standard deviations"
    )
    proven, left = m["curve_certified"], m["curve_under_pgd"]
    below = np.interp(left["eps"], proven["eps"], proven["accuracy"])
    assert (below <= np.array(left["accuracy"]) + 0.02).all(), (
        "certified accuracy is below what PGD leaves"
    )
    assert m["median_certified_radius"] > 0.25, "in the unit of the noise: above one"


undecided_certify = {
    "certified_radius_of_the_opening": "votes of one digit that the net barely decides"
}
