"""Chapter 6: training against attacks beside plain formulas, their manners as guests,
what they cost, and the alarm of catastrophic overfitting.
"""

import copy
import math
import warnings

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bigmodel_nb.robust.training as training
from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.kit.core import Proportion
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import APGD, FGSM, PGD, MomentumPGD, robust_accuracy
from bigmodel_nb.robust.training import (
    AWP,
    MART,
    TRADES,
    AdversarialTraining,
    CatastrophicOverfittingAlarm,
    FreeTraining,
    RandomFGSM,
    RepeatBatches,
    boosted_cross_entropy,
    cost_meter,
)
from bigmodel_nb.training.loop import History, evaluate, fit, supervised

BOX = (-20.0, 20.0)
SEVERAL = PGD(0.1, steps=3)
OBJECTIVES = {
    "adversarial": lambda: AdversarialTraining(SEVERAL),
    "mixed": lambda: AdversarialTraining(SEVERAL, clean_weight=0.3),
    "one step": lambda: AdversarialTraining(RandomFGSM(0.1)),
    "fgsm": lambda: AdversarialTraining(FGSM(0.1)),
    "trades": lambda: TRADES(SEVERAL, 4.0),
    "mart": lambda: MART(SEVERAL, 3.0),
    "free": lambda: FreeTraining(FGSM(0.1)),
}
ALL = {
    **OBJECTIVES,
    **{
        f"awp of {name}": lambda name=name: AWP(OBJECTIVES[name](), 0.02)
        for name in OBJECTIVES
    },
}
every_objective = pytest.mark.parametrize("name", ALL)


def smooth_net(norm=False, dropout=False):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3),
        *([nn.BatchNorm2d(3)] if norm else []),
        nn.Tanh(),
        *([nn.Dropout(0.5)] if dropout else []),
        nn.Flatten(),
        nn.Linear(48, 4),
    ]
    return nn.Sequential(*layers).double()


def batch(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(
        n, 1, 6, 6, dtype=torch.float64, generator=generator
    ), torch.randint(0, 4, (n,), generator=generator)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


class Logistic(nn.Module):
    """Logits 0 and w·x, with the weight as a row, so that AWP moves it."""

    def __init__(self, d=6, seed=0):
        super().__init__()
        self.w = nn.Parameter(
            torch.randn(
                1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
        )

    def forward(self, input):
        return torch.stack([torch.zeros_like(input[:, 0]), input @ self.w[0]], 1)


def rows(n=30, d=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator), torch.randint(
        0, 2, (n,), generator=generator
    )


# --- each loss beside a plain formula


def formula(name, model, x, moved, y):
    """What the paper writes, in torch's own functions."""
    clean, other = model(x), model(moved)
    p, q, picked = clean.softmax(1), other.softmax(1), torch.arange(len(y))
    if name in ("adversarial", "one step", "fgsm", "free"):
        return F.cross_entropy(other, y)
    if name == "mixed":
        return 0.7 * F.cross_entropy(other, y) + 0.3 * F.cross_entropy(clean, y)
    if name == "trades":
        return F.cross_entropy(clean, y) + 4 * F.kl_div(
            q.log(), p, reduction="batchmean"
        )
    wrong = q.clone()
    wrong[picked, y] = 0
    boosted = -q[picked, y].log() - (1 - wrong.amax(1)).log()
    return (boosted + 3 * (p * (p / q).log()).sum(1) * (1 - p[picked, y])).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_formula(name):
    model, (x, y), objective = smooth_net(), batch(), OBJECTIVES[name]()
    moved = objective.attacked(model, x, y).detach()
    ours, plain = (
        objective.loss_at(model, x, moved, y),
        formula(name, model, x, moved, y),
    )
    assert abs(ours.item() - plain.item()) < 1e-12
    assert all(
        (a - b).abs().max() < 1e-12
        for a, b in zip(gradients(model, ours), gradients(model, plain))
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_agrees_with_central_differences(name):
    model, (x, y), objective = smooth_net(), batch(), OBJECTIVES[name]()
    moved = objective.attacked(model, x, y).detach()
    gradient = gradients(model, objective.loss_at(model, x, moved, y))
    generator = torch.Generator().manual_seed(3)
    direction = [
        torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for p in model.parameters()
    ]

    def at(length):
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for p, step in zip(shifted.parameters(), direction):
                p.add_(length * step)
        return objective.loss_at(shifted, x, moved, y).item()

    expected = sum((g * step).sum().item() for g, step in zip(gradient, direction))
    assert (at(1e-5) - at(-1e-5)) / 2e-5 == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_call_is_the_loss_at_its_own_attack(name):
    model, (x, y) = smooth_net(), batch()
    whole, parts = OBJECTIVES[name](), OBJECTIVES[name]()
    for _ in range(
        2
    ):  # the second call starts elsewhere, or where the first left the change
        loss, moved = whole(model, x, y), parts.attacked(model, x, y)
        other = parts.loss_at(model, x, moved, y)
        assert (
            torch.equal(loss, other)
            and (moved - x).abs().max() <= 0.1 + 1e-12
            and moved.min() >= 0
            and moved.max() <= 1
        )
        loss.backward(), other.backward()


@given(
    st.integers(1, 6), st.integers(2, 6), st.integers(0, 10**6), st.floats(0.1, 60.0)
)
@settings(max_examples=30, deadline=None)
def test_boosted_cross_entropy_is_its_formula_and_stays_finite(n, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = (
        scale * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    ).requires_grad_()
    y = torch.randint(0, classes, (n,), generator=generator)
    value = boosted_cross_entropy(logits, y)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()
    q = logits.detach().softmax(1)
    rival = q.scatter(1, y[:, None], 0).amax(1)
    if (1 - rival).min() > 1e-6:
        assert value.item() == pytest.approx(
            (-q.gather(1, y[:, None])[:, 0].log() - (1 - rival).log()).mean().item(),
            rel=1e-6,
        )


# --- where the answer is known


@pytest.mark.parametrize(
    "attack",
    [
        PGD(0.3, bounds=BOX),
        FGSM(0.3, bounds=BOX),
        RandomFGSM(0.3, alpha=2.0, bounds=BOX),
        PGD(0.3, bounds=BOX, restarts=2),
    ],
)
def test_logistic_regression_has_the_closed_forms_gradient(attack):
    model, (x, y) = Logistic(), rows()
    (measured,) = gradients(model, AdversarialTraining(attack)(model, x, y))
    margin = (2 * y - 1) * (x @ model.w[0])
    (derived,) = gradients(
        model, F.softplus(-(margin - 0.3 * model.w.abs().sum())).mean()
    )
    assert (measured - derived).abs().max() < 1e-12


@given(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25, 1.75, 2.0]), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_one_step_from_a_random_point_attains_its_share(alpha, seed):
    model, x = Logistic(4000, seed), torch.rand(8, 4000, dtype=torch.float64)
    attack = RandomFGSM(0.3, bounds=BOX, alpha=alpha, seed=seed)
    gain = (x - attack(model, x, torch.ones(8, dtype=torch.long))) @ model.w[0].detach()
    assert (gain / (0.3 * model.w.abs().sum())).mean().item() == pytest.approx(
        1 - (2 - alpha) ** 2 / 4, abs=0.02
    )


@pytest.mark.parametrize("norm, order", [("linf", math.inf), ("l2", 2), ("l1", 1)])
def test_one_step_stays_in_ball_and_box(norm, order):
    model, (x, y) = smooth_net(), batch(20)
    found = RandomFGSM(0.4, norm, alpha=1.5)(model, x, y)
    sizes = torch.linalg.vector_norm((found - x).flatten(1), order, dim=1)
    assert (
        sizes.max() <= 0.4 * (1 + 1e-9)
        and sizes.min() > 0.2
        and found.min() >= 0
        and found.max() <= 1
    )


@pytest.mark.parametrize("restarts", [1, 8])
@pytest.mark.parametrize("fast", [False, True])
def test_trades_climbs_to_the_largest_divergence(restarts, fast):
    """With linear logits each side has its top at a corner; an ascent keeps one."""
    model, (x, y) = Logistic(), rows()
    p, step = model(x).detach().softmax(1), 0.3 * model.w[0].detach().sign()

    def divergence(points):
        return (p * (p / model(points).detach().softmax(1)).log()).sum(1)

    found = divergence(
        TRADES(PGD(0.3, steps=15, restarts=restarts, bounds=BOX, fast=fast)).attacked(
            model, x, y
        )
    )
    tops = torch.stack([divergence(x - step), divergence(x + step)])
    if restarts == 8:
        assert ((found / tops.amax(0)).sub(1).abs() < 1e-6).double().mean() > 0.95
    assert ((found / tops).sub(1).abs().amin(0) < 1e-6).all()


def test_trades_climbs_a_net_higher_than_chance_and_heeds_no_class():
    model, (x, y) = smooth_net(), batch(12)
    moved = TRADES(PGD(0.2, steps=10)).attacked(model, x, y)
    p = model(x).log_softmax(1)

    def divergence(points):
        return (p.exp() * (p - model(points).log_softmax(1))).sum(1)

    generator = torch.Generator().manual_seed(1)
    chance = torch.stack(
        [
            divergence(
                (
                    x
                    + 0.2
                    * torch.rand(x.shape, dtype=x.dtype, generator=generator)
                    .sub(0.5)
                    .sign()
                ).clamp(0, 1)
            )
            for _ in range(50)
        ]
    )
    assert (divergence(moved) > chance.amax(0)).all()
    assert torch.equal(
        moved, TRADES(PGD(0.2, steps=10)).attacked(model, x, (y + 1) % 4)
    )


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_awp_on_logistic_regression_is_the_closed_form(gamma):
    model, (x, y) = Logistic(), rows()
    signs, w = (2 * y - 1).double(), model.w[0].detach()
    moved = x - 0.3 * signs[:, None] * w.sign()

    def gradient(at):
        return -(torch.sigmoid(-signs * (moved @ at)) * signs) @ moved / len(x)

    there = w + gamma * w.norm() * gradient(w) / gradient(w).norm()
    loss = AWP(AdversarialTraining(PGD(0.3, bounds=BOX)), gamma)(model, x, y)
    assert loss.item() == pytest.approx(
        F.softplus(-signs * (moved @ there)).mean().item(), rel=1e-12
    )
    assert (gradients(model, loss)[0][0] - gradient(there)).abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_awp_moves_each_weight_by_its_share_and_leaves_all_as_it_was(name):
    model, (x, y), objective = (
        smooth_net(norm=True).train(),
        batch(),
        OBJECTIVES[name](),
    )
    moved = objective.attacked(model, x, y)
    before = copy.deepcopy(model.state_dict())
    changes = training._uphill(model, objective, 0.03, x, moved, y)
    assert set(changes) == {"0.weight", "4.weight"}  # no bias, no batch norm
    for key, change in changes.items():
        assert change.norm().item() == pytest.approx(
            0.03 * before[key].norm().item(), rel=1e-12
        )
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    spare = copy.deepcopy(model)
    for key, gradient in zip(
        dict(spare.named_parameters()),
        gradients(spare, objective.loss_at(spare, x, moved, y)),
    ):
        if key in changes:
            assert F.cosine_similarity(
                gradient.flatten(), changes[key].flatten(), dim=0
            ).item() == pytest.approx(1, abs=1e-9)


def test_awp_through_fit_never_touches_the_weights_but_by_the_optimiser():
    model, (x, y) = smooth_net(norm=True), batch(8)
    before = copy.deepcopy(model.state_dict())
    fit(
        model,
        [(x, y)],
        epochs=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        objective=AWP(TRADES(SEVERAL), 0.5),
        device="cpu",
    )
    assert all(
        torch.equal(value, before[name]) for name, value in model.named_parameters()
    )


# --- what reduces to what


@pytest.mark.parametrize(
    "first, second",
    [
        (lambda: TRADES(SEVERAL, 0.0), lambda: supervised(cross_entropy)),
        (
            lambda: MART(SEVERAL, 0.0),
            lambda: AdversarialTraining(SEVERAL, boosted_cross_entropy),
        ),
        (lambda: AdversarialTraining(PGD(0.0)), lambda: supervised(cross_entropy)),
        (
            lambda: AdversarialTraining(SEVERAL, clean_weight=1.0),
            lambda: supervised(cross_entropy),
        ),
        (lambda: FreeTraining(FGSM(0.0)), lambda: supervised(cross_entropy)),
        (
            lambda: FreeTraining(FGSM(0.1)),
            lambda: supervised(cross_entropy),
        ),  # its first call
        *(
            (lambda name=name: AWP(OBJECTIVES[name](), 0.0), OBJECTIVES[name])
            for name in OBJECTIVES
        ),
    ],
)
def test_the_simpler_method_exactly(first, second):
    for norm, dropout in ((False, False), (True, True)):
        x, y = batch()
        model = smooth_net(norm, dropout).train()
        state, start = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        ours = first()(model, x, y)
        ours, after = (ours, gradients(model, ours)), copy.deepcopy(model.state_dict())
        torch.set_rng_state(state)
        model.load_state_dict(start)
        theirs = second()(model, x, y)
        if getattr(first(), "loss_passes", 1) == 2 and dropout:
            continue  # a second pass counts in the running statistics
        assert torch.equal(ours[0], theirs) and all(
            (a - b).abs().max() < 1e-15
            for a, b in zip(ours[1], gradients(model, theirs))
        )
        assert all(
            torch.equal(value, after[key]) for key, value in model.state_dict().items()
        )  # running statistics too


def test_one_replay_is_the_loader_and_several_repeat_each_batch():
    batches = [batch(3), batch(2, 1)]
    assert [id(each) for each in RepeatBatches(batches, 1)] == [
        id(each) for each in batches
    ] and len(RepeatBatches(batches, 1)) == 2
    assert [id(each) for each in RepeatBatches(batches, 3)] == [
        id(each) for each in batches for _ in range(3)
    ] and len(RepeatBatches(batches, 3)) == 6
    data = loader(*batch(9), batch_size=4, shuffle=True)
    assert len(list(RepeatBatches(data, 2))) == len(RepeatBatches(data, 2)) == 6


# --- one backward pass for two gradients


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_training_takes_both_gradients_from_one_backward_pass(norm):
    model, (x, y), objective = smooth_net(), batch(), FreeTraining(FGSM(0.1, norm))
    change = torch.zeros_like(x)
    for _ in range(3):
        model.zero_grad()
        with training._Products() as products:
            objective(model, x, y).backward()
        with training._Products() as forwards, torch.no_grad():
            model(x)
        assert products.total == 3 * forwards.total
        here = (x + change).requires_grad_()
        loss = F.cross_entropy(model(here), y)
        gradient, *weights = torch.autograd.grad(loss, [here, *model.parameters()])
        assert all(
            (p.grad - each).abs().max() < 1e-14
            for p, each in zip(model.parameters(), weights)
        )
        step = 0.1 * (
            gradient.sign()
            if norm == "linf"
            else gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        )
        if norm == "linf":
            change = (change + step).clamp(-0.1, 0.1)
            change = (x + change).clamp(0, 1) - x
            assert (objective.attacked(model, x, y) - x - change).abs().max() < 1e-12
        else:
            kept = objective.attacked(model, x, y).detach() - x
            assert kept.flatten(1).norm(dim=1).max() <= 0.1 + 1e-9
            change = kept


def test_free_training_keeps_the_change_from_batch_to_batch():
    model, (x, y), (other, z), objective = (
        smooth_net(),
        batch(6),
        batch(4, 5),
        FreeTraining(FGSM(0.1)),
    )
    objective(model, x, y).backward()
    kept = objective.attacked(model, x, y).detach() - x
    moved = objective.attacked(model, other, z).detach()
    assert (
        torch.allclose(moved, (other + kept[:4]).clamp(0, 1), atol=1e-12)
        and kept.abs().max() > 0.05
    )
    assert objective.attacked(model, *batch(9)).shape == (
        9,
        1,
        6,
        6,
    )  # a larger batch starts anew


def test_free_training_runs_through_fit_and_hardens():
    images, targets = digits()
    train, test = split_indices(targets, (0.6, 0.4), 0)
    nets = {}
    for name, objective in (("free", FreeTraining(FGSM(0.12))), ("ordinary", None)):
        torch.manual_seed(0)
        nets[name] = SmallConvNet(width=8)
        fit(
            nets[name],
            RepeatBatches(loader(images[train], targets[train], 64, shuffle=True), 4),
            epochs=3,
            objective=objective,
            device="cpu",
            optimizer=torch.optim.AdamW(nets[name].parameters(), lr=5e-3),
        )
    held = loader(images[test], targets[test], 512)
    free, ordinary = (
        robust_accuracy(nets[name].eval(), held, PGD(0.12, steps=8, early_stop=True))
        for name in nets
    )
    assert (
        free.low > ordinary.high and evaluate(nets["free"], held).accuracy.value > 0.9
    )


# --- manners


@every_objective
@pytest.mark.parametrize("mode", [True, False])
def test_the_attack_leaves_no_trace(name, mode):
    model, (x, y), objective = (
        smooth_net(norm=True, dropout=True).train(mode),
        batch(),
        ALL[name](),
    )
    model[5].bias.grad = torch.ones(4, dtype=torch.float64)
    passes = getattr(objective, "loss_passes", None) or objective.objective.loss_passes
    counted, hook = (
        [],
        model.register_forward_hook(lambda module, *_: counted.append(module.training)),
    )
    inner = objective.objective if isinstance(objective, AWP) else objective
    inner.attacked(model, x, y)
    hook.remove()
    assert (
        not any(counted)
        and [module.training for module in model.modules()] == [mode] * 7
    )
    assert model[1].num_batches_tracked == 0 and (model[1].running_mean == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = objective(model, x, y)
    assert loss.dim() == 0 and loss.requires_grad
    assert model[1].num_batches_tracked == (
        passes if mode else 0
    )  # the loss alone, not the attack, not AWP's look
    assert torch.equal(model[5].bias.grad, torch.ones(4, dtype=torch.float64)) and all(
        p.grad is None for p in list(model.parameters())[:-1]
    )


@every_objective
def test_a_model_that_raises_is_left_as_it_was(name):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = (
                nn.BatchNorm1d(3, dtype=torch.float64),
                nn.Linear(3, 2, dtype=torch.float64),
            )

        def forward(self, input):
            self.layer(self.norm(input))
            raise RuntimeError("no")

    model, x = Failing().train(), torch.rand(4, 3, dtype=torch.float64)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        ALL[name]()(model, x, torch.tensor([0, 1, 0, 1]))
    assert all(module.training for module in model.modules()) and torch.equal(
        torch.get_rng_state(), state
    )
    if "free" not in name:  # it runs the loss alone, which counts
        assert all(
            torch.equal(value, before[key]) for key, value in model.state_dict().items()
        )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        AdversarialTraining,
        TRADES,
        MART,
        lambda attack: AWP(TRADES(attack)),
        lambda attack: AdversarialTraining(RandomFGSM(0.4)),
    ],
)
def test_random_starts_differ_between_calls_and_repeat_between_objectives(make):
    model, (x, y) = smooth_net(), batch()

    def losses():
        objective = make(PGD(0.4, steps=1, step_size=0.01))
        return [objective(model, x, y).item() for _ in range(2)]

    first = losses()
    assert first[0] != first[1] and losses() == first


@pytest.mark.parametrize(
    "options",
    [
        {"fast": False},
        {"restarts": 2, "fast": False},
        {"early_stop": True},
        {"fast": True},
        {"fast": True, "early_stop": True},
    ],
)
def test_training_runs_an_attack_without_its_last_look(options):
    seen = []

    class Watched(nn.Linear):
        def forward(self, input):
            seen.append(len(input))
            return super().forward(input)

    torch.manual_seed(0)
    model, x, y = Watched(5, 3), torch.rand(9, 5), torch.arange(9) % 3
    attack = PGD(0.05, steps=4, step_size=0.02, **options)
    moved = AdversarialTraining(attack).attacked(model, x, y)
    if options == {"fast": False}:
        assert seen == [9] * 4
        here = (x + training._random_change(x, 0.05, "linf", 0)).clamp(0, 1)
        for _ in range(4):
            here.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(here), y), here)
            here = (
                (x + (here + 0.02 * gradient.sign() - x).clamp(-0.05, 0.05))
                .clamp(0, 1)
                .detach()
            )
        assert (moved - here).abs().max() < 1e-6
    if "restarts" in options:
        assert seen == [9] * 10 and torch.equal(moved, attack(model, x, y))
    assert (moved - x).abs().max() <= 0.05 + 1e-6
    assert F.cross_entropy(model(moved), y) > F.cross_entropy(model(x), y)


# --- what it costs


def test_units_are_what_is_counted():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 40, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 40, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1440, 4),
    ).double()
    x, y = batch(3)
    attacks = {
        "restarts": AdversarialTraining(PGD(0.1, steps=2, restarts=3)),
        "momentum": AdversarialTraining(MomentumPGD(0.1, steps=2)),
        "fast": MART(PGD(0.1, steps=2, fast=True)),
    }
    objectives = {
        "ordinary": supervised(cross_entropy),
        **{name: make() for name, make in ALL.items()},
        **attacks,
    }
    before, calls = copy.deepcopy(model.state_dict()), objectives["adversarial"]._calls
    table = cost_meter(objectives, model, x, y, rounds=1)
    assert list(table.columns) == [
        "predicted",
        "counted",
        "seconds",
        "predicted_ratio",
        "measured_ratio",
    ] and list(table.index) == list(objectives)
    extra = table["counted"] - table["predicted"]
    assert (extra.drop("fast").abs() < 0.02).all(), table
    assert extra["fast"] == pytest.approx(
        4 / len(x), abs=0.02
    )  # two examples tell whether the copy still answers alike
    expected = {
        "ordinary": 3,
        "adversarial": 9,
        "mixed": 12,
        "one step": 5,
        "fgsm": 5,
        "trades": 13,
        "mart": 12,
        "free": 3,
        "awp of adversarial": 12,
        "awp of trades": 19,
        "restarts": 18,
        "momentum": 8,
        "fast": 10,
    }
    assert {name: table["predicted"][name] for name in expected} == expected
    assert table["measured_ratio"]["ordinary"] == 1 and table["predicted_ratio"][
        "trades"
    ] == pytest.approx(13 / 3)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    ) and all(p.grad is None for p in model.parameters())
    assert objectives["adversarial"]._calls == calls == 0 and isinstance(
        table, pd.DataFrame
    )


@pytest.mark.parametrize(
    "came", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
def test_costs_are_told_for_inputs_of_any_floating_type(own, came):
    model, (x, y) = smooth_net().to(own), batch(3)
    by_hand = lambda model, input, target: F.cross_entropy(model(input), target)
    objectives = {
        "ordinary": supervised(cross_entropy),
        "adversarial": AdversarialTraining(SEVERAL),
        "by hand": by_hand,
    }
    tables = [
        cost_meter(objectives, model, each, y, rounds=1)
        for each in (x.to(came), x.to(own))
    ]
    assert tables[0]["counted"].equals(tables[1]["counted"]), tables


@pytest.mark.parametrize("named", [False, True], ids=["tensor", "mapping"])
def test_costs_are_told_without_a_change_of_the_inputs(named):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(x.sub_(0.5))

    x = torch.rand(4, 3)
    before = x.clone()
    cost_meter(
        {"ordinary": supervised(cross_entropy)},
        Overwrites(),
        {"x": x} if named else x,
        torch.tensor([0, 1, 0, 1]),
        rounds=1,
    )
    assert torch.equal(x, before)


# --- the alarm


class Scripted:
    """Stands in for `robust_accuracy`: shares of one step and of several, of 200."""

    def __init__(self, *pairs):
        self.values = [value for pair in pairs for value in pair]

    def __call__(self, model, data, attack):
        assert type(attack) is (FGSM if len(self.values) % 2 == 0 else PGD)
        assert attack.eps == 0.2
        return Proportion.of(200 * self.values.pop(0), 200)


GOOD, COLLAPSED = (0.6, 0.5), (0.7, 0.1)


def alarmed(monkeypatch, cure, *pairs, every=None, epochs=None, start=(0.1, 0.05)):
    monkeypatch.setattr(training, "robust_accuracy", Scripted(start, *pairs))
    torch.manual_seed(0)
    model, (x, y), weights = smooth_net(), batch(4), []
    objective = AdversarialTraining(FGSM(0.2))
    held_out = batch(8)[0], torch.arange(8) % 4  # the least, a quarter of each class
    chosen = objective if cure == "objective" else cure
    attack = PGD(0.2, steps=3)
    alarm = CatastrophicOverfittingAlarm(model, *held_out, attack, chosen, every)

    class Note:
        def on_epoch_end(self, history):
            weights.append(model[0].weight.detach().clone())

    history = fit(
        model,
        [(x, y)] * 2,
        epochs=epochs or len(pairs),
        objective=objective,
        callbacks=[Note(), alarm],
        device="cpu",
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
    )
    return model, alarm, objective, history, weights


@pytest.mark.parametrize(
    "start, pairs",
    [
        pytest.param((0.1, 0.05), [GOOD, (0.9, 0.46)], id="sound"),
        pytest.param((0.7, 0.1), [COLLAPSED, (0.8, 0.09)], id="large radius"),
        pytest.param((0.7, 0.3), [COLLAPSED, (0.8, 0.2)], id="intervals meet"),
        pytest.param((0.1, 0.05), [GOOD, (0.1, 0.05)], id="both fall"),
        pytest.param((0.2, 0.2), [(0.3, 0.25), (0.7, 0.0)], id="never learnt"),
    ],
)
def test_no_alarm_where_nothing_collapses_under_several_steps_alone(
    monkeypatch, start, pairs
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, alarm, objective, history, _ = alarmed(
            monkeypatch, "objective", *pairs, start=start
        )
    assert alarm.raised_at is None and not history.stop
    assert type(objective.attack) is FGSM
    assert [check["batch"] for check in alarm.checks] == [0, 2, 4]
    assert alarm.checks[-1]["several"].value == pytest.approx(pairs[-1][1])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(8, 400),
)
@settings(max_examples=60, deadline=None)
def test_the_alarm_is_raised_by_a_fall_and_by_nothing_else(pairs, n):
    """Whatever one step leaves: where several steps never lose half, all is quiet."""
    shares = [
        {
            "one_step": Proportion.of(n * one, n),
            "several": Proportion.of(n * several, n),
        }
        for one, several in pairs
    ]
    best = shares[0]
    for now in shares[1:]:
        raised = training._overfitted(best, now, constant=0.1)
        if raised:
            assert now["several"].value < best["several"].value / 2
            assert best["several"].value > 0.1
        if now["several"].value >= best["several"].value / 2:
            assert not raised
        best = max(best, now, key=lambda check: check["several"].value)


def test_the_alarm_knows_the_model_before_training(monkeypatch):
    """A hardened net that goes on against one step may collapse before any check."""
    with pytest.warns(UserWarning, match="where they left 50.0% .* at batch 0"):
        _, alarm, *_ = alarmed(monkeypatch, None, COLLAPSED, start=GOOD)
    assert alarm.raised_at == 2 and alarm.best["batch"] == 0


def test_the_alarm_warns_once_and_without_a_cure_changes_nothing(monkeypatch):
    said = (
        r"catastrophic overfitting by batch 4: 3 steps leave 10.0% .* of the held-out"
        r" examples, where they left 50.0% .* at batch 2; one step leaves 70.0% .*,"
        r" where it left 60.0%"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        model, alarm, objective, history, weights = alarmed(
            monkeypatch, None, GOOD, COLLAPSED, COLLAPSED
        )
    assert len(caught) == 1 and alarm.raised_at == 4 and len(history.rows) == 3
    assert type(objective.attack) is FGSM
    assert torch.equal(model[0].weight, weights[-1])


def test_the_alarm_stops_at_the_best_weights(monkeypatch):
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        model, alarm, _, history, weights = alarmed(
            monkeypatch, "stop", GOOD, (0.65, 0.4), COLLAPSED, epochs=5
        )
    assert history.stop and len(history.rows) == 3
    assert torch.equal(model[0].weight, weights[0])  # not those of the check before
    assert not torch.equal(weights[0], weights[1])
    assert alarm.best["batch"] == 2
    assert torch.equal(alarm.best_weights["0.weight"], weights[0])


def test_the_alarm_goes_back_and_on_against_several_steps(monkeypatch):
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        model, alarm, objective, history, weights = alarmed(
            monkeypatch, "objective", GOOD, COLLAPSED, GOOD
        )
    assert objective.attack == PGD(0.2, steps=3)
    assert len(history.rows) == 3 and alarm.raised_at == 4
    assert not torch.equal(model[0].weight, weights[0])  # it went on
    farthest = (weights[1] - weights[0]).norm() * 1.5  # as far as an epoch goes
    assert (model[0].weight - weights[0]).norm() < farthest


def test_the_alarm_counts_batches(monkeypatch):
    _, alarm, *_ = alarmed(monkeypatch, None, GOOD, GOOD, every=3, epochs=3)
    assert [check["batch"] for check in alarm.checks] == [0, 3, 6]


def test_the_alarm_sees_what_one_step_does_not():
    """One step jumps over the wrong answers: they are halfway to its corner."""

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.bend = nn.Parameter(torch.zeros(()))

        def forward(self, input):
            side = 2 * (input[:, 1] > 0.5).float() - 1
            wave = (8 * math.pi * input[:, 0]).sin()
            logit = side * (1 + 0.01 * wave + 3 * self.bend * wave)
            return torch.stack([torch.zeros(len(input)), logit], 1)

    generator, model = torch.Generator().manual_seed(0), Bent()
    y = torch.arange(200) % 2
    near = 0.5 + 0.01 * torch.rand(200, generator=generator)
    x = torch.stack([near, 0.2 + 0.6 * y], 1)
    attack = PGD(0.125, steps=10, restarts=4, loss="margin")
    alarm = CatastrophicOverfittingAlarm(model, x, y, attack)
    with torch.no_grad():
        model.bend += 1
    with pytest.warns(UserWarning, match="catastrophic overfitting by batch 1:"):
        alarm.on_epoch_end(History(batch_losses=[1.0]))
    first, second = alarm.checks
    assert first["one_step"].value == first["several"].value == 1
    assert second["one_step"].value > 0.9 and second["several"].value < 0.3


def watched(net, images, radius, objective, epochs, rate, seed=0, cure=None):
    """The alarm of a net that was trained on digits."""
    targets = digits()[1]
    train, valid, _ = split_indices(targets, seed=0)
    batches = loader(images[train], targets[train], 64, shuffle=True, seed=seed)
    optimizer = torch.optim.AdamW(net.parameters())
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    attack = PGD(radius, steps=10, loss="margin", early_stop=True)
    alarm = CatastrophicOverfittingAlarm(
        net, images[valid], targets[valid], attack, cure, every=20
    )
    fit(
        net,
        batches,
        epochs=epochs,
        optimizer=optimizer,
        scheduler=schedule,
        objective=objective,
        callbacks=[alarm],
        device="cpu",
    )
    return alarm


@pytest.mark.parametrize("radius", [0.1, 0.2, 0.3, 0.5])
def test_no_alarm_for_a_net_that_is_trained_against_several_steps(radius):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="catastrophic")
        objective = AdversarialTraining(PGD(radius, steps=3))
        alarm = watched(SmallConvNet(width=8), digits()[0], radius, objective, 5, 1e-2)
    assert alarm.raised_at is None and len(alarm.checks) == 6


def test_the_alarm_is_raised_by_catastrophic_overfitting():
    """Whether a run collapses depends on its seed: one of three must."""
    images = F.interpolate(digits()[0], size=16, mode="bilinear").clamp(0, 1)
    for seed in range(3):
        torch.manual_seed(seed)
        layers, before = [], 1
        for after, stride in zip((16, 32, 64, 64), (2, 1, 2, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)
        net, objective = nn.Sequential(*layers, *last), AdversarialTraining(FGSM(0.2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alarm = watched(net, images, 0.2, objective, 16, 2e-2, seed, "stop")
        if alarm.raised_at:
            break
    best, last = alarm.best, alarm.checks[-1]
    assert alarm.raised_at and last["several"].high < best["several"].low / 2
    assert last["one_step"].value > 0.4 and best["several"].value > 0.2


# --- on digits


def test_adversarial_training_holds_where_ordinary_training_does_not():
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    nets = []
    for objective in (None, AdversarialTraining(PGD(0.15, steps=3))):
        torch.manual_seed(0)
        net = SmallConvNet(width=8)
        fit(
            net,
            loader(images[train], targets[train], 64, shuffle=True),
            epochs=8,
            optimizer=torch.optim.AdamW(net.parameters(), lr=7e-3),
            objective=objective,
            device="cpu",
        )
        nets.append(net.eval())
    judge, held = (
        PGD(0.15, steps=15, early_stop=True),
        loader(images[test], targets[test], 512),
    )
    ordinary, hardened = (robust_accuracy(net, held, judge) for net in nets)
    assert hardened.low > ordinary.high and evaluate(nets[1], held).accuracy.value > 0.9


# --- bad input


@pytest.mark.parametrize(
    "make, error, said",
    [
        (
            lambda: AdversarialTraining(PGD(0.1, targeted=True)),
            ValueError,
            "attack is targeted; allowed are untargeted",
        ),
        (
            lambda: AdversarialTraining(0.1),
            TypeError,
            "attack is a float; allowed are attacks",
        ),
        (
            lambda: AdversarialTraining(APGD(0.1)),
            TypeError,
            "attack is a APGD; allowed are attacks, PGD",
        ),
        (
            lambda: AdversarialTraining(FGSM(0.1), clean_weight=2),
            ValueError,
            "clean_weight is 2; allowed is a number from 0 to 1",
        ),
        (
            lambda: TRADES(FGSM(0.1)),
            ValueError,
            "attack is FGSM.*; allowed is a PGD without loss and early_stop",
        ),
        (lambda: TRADES(MomentumPGD(0.1)), ValueError, "attack is MomentumPGD"),
        (
            lambda: TRADES(PGD(0.1, loss="margin")),
            ValueError,
            "allowed is a PGD without loss",
        ),
        (
            lambda: TRADES(PGD(0.1, early_stop=True)),
            ValueError,
            "allowed is a PGD without loss and early_stop",
        ),
        (
            lambda: TRADES(PGD(0.1), beta=-1),
            ValueError,
            "beta is -1; allowed is a number from 0 up",
        ),
        (lambda: MART(PGD(0.1), beta=math.nan), ValueError, "beta is nan"),
        (lambda: MART(None), TypeError, "attack is a NoneType"),
        (lambda: MART(PGD(0.1), beta=math.inf), ValueError, "beta is inf"),
        (
            lambda: FreeTraining(PGD(0.1)),
            ValueError,
            "attack is PGD.*; allowed is an FGSM",
        ),
        (
            lambda: FreeTraining(FGSM(0.1, loss="margin")),
            ValueError,
            "an FGSM without loss and fast",
        ),
        (lambda: FreeTraining(RandomFGSM(0.1)), ValueError, "attack is RandomFGSM"),
        (
            lambda: RepeatBatches([], 0),
            ValueError,
            "replays is 0; allowed is an integer of at least 1",
        ),
        (lambda: RepeatBatches([], 2.0), ValueError, "replays is 2.0"),
        (
            lambda: RandomFGSM(0.1, alpha=-1),
            ValueError,
            "alpha is -1; allowed is a number from 0 up",
        ),
        (lambda: RandomFGSM(8), ValueError, "eps is 8; allowed is a radius"),
        (lambda: RandomFGSM(0.1, seed=-1), ValueError, "seed is -1"),
        (
            lambda: AWP(supervised(cross_entropy)),
            TypeError,
            "objective is a function; allowed are those of this module",
        ),
        (lambda: AWP(AWP(MART(PGD(0.1)))), TypeError, "objective is a AWP"),
        (lambda: AWP(MART(PGD(0.1)), gamma="1"), ValueError, "gamma is '1'"),
        (
            lambda: cost_meter(
                {}, nn.Linear(2, 2), torch.rand(3, 2), torch.zeros(3).long()
            ),
            ValueError,
            "objectives is empty; allowed is at least one",
        ),
        (
            lambda: cost_meter({"a": 1}, nn.Linear(2, 2), None, None, rounds=0),
            ValueError,
            "rounds is 0",
        ),
        (
            lambda: CatastrophicOverfittingAlarm(
                nn.Linear(2, 2), None, None, FGSM(0.1)
            ),
            TypeError,
            "attack is a FGSM; allowed is a PGD",
        ),
        (
            lambda: CatastrophicOverfittingAlarm(
                nn.Linear(2, 2), None, None, PGD(0.1), cure="rest"
            ),
            ValueError,
            "cure is 'rest'; allowed are None, 'stop'",
        ),
        (
            lambda: CatastrophicOverfittingAlarm(
                nn.Linear(2, 2),
                torch.rand(7, 2),
                torch.zeros(7, dtype=torch.long),
                PGD(0.1),
            ),
            ValueError,
            "input has 7 examples, .* allowed are at least 8",
        ),
        (
            lambda: CatastrophicOverfittingAlarm(
                nn.Linear(2, 2), None, None, PGD(0.1), every=0
            ),
            ValueError,
            "every is 0",
        ),
        (
            lambda: AdversarialTraining(PGD(0.1))(
                nn.Linear(3, 2),
                torch.ones(2, 3, dtype=torch.uint8),
                torch.tensor([0, 1]),
            ),
            TypeError,
            "x is torch.uint8",
        ),
        (
            lambda: TRADES(PGD(0.1))(
                nn.Linear(3, 2), torch.rand(2, 3), torch.tensor([0, 5])
            ),
            ValueError,
            "y holds class 5; allowed are 0 to 1",
        ),
        (
            lambda: TRADES(PGD(0.1))(
                nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)),
                torch.rand(2, 3),
                torch.tensor([0, 1]),
            ),
            ValueError,
            "model gives probabilities",
        ),
        (
            lambda: FreeTraining(FGSM(0.1))(
                nn.Linear(3, 2), torch.full((2, 3), 2.0), torch.tensor([0, 1])
            ),
            ValueError,
            "x ranges from 2 to 2; allowed are values within bounds",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, error, said):
    with pytest.raises(error, match=said):
        make()


# --- validation by these objectives


@every_objective
def test_validation_measures_the_objective_and_changes_no_training(name):
    pairs, ends = [batch(7, seed) for seed in range(3)], []
    for valid in (None, pairs[:2]):
        torch.manual_seed(1)
        model, objective = smooth_net(norm=True, dropout=True), ALL[name]()
        history = fit(
            model,
            pairs,
            valid,
            epochs=2,
            objective=objective,
            device="cpu",
            optimizer=torch.optim.SGD(model.parameters(), 0.05),
        )
        ends.append(model)
    assert all(
        map(torch.equal, ends[0].state_dict().values(), ends[1].state_dict().values())
    )
    assert (
        history.frame["valid_loss"].gt(0).all()
        and history.frame["valid_accuracy"].notna().all()
    )
    first, second = (evaluate(ends[1], pairs, objective=objective) for _ in range(2))
    assert (
        first == second
    )  # an objective keeps its state, so it is measured from the same random starts


class WithoutGradient(torch.autograd.Function):
    """Rounds, and has no gradient."""

    @staticmethod
    def forward(ctx, input):
        return input.round()

    @staticmethod
    def backward(ctx, gradient):
        return None


class Rounding(nn.Linear):
    def forward(self, input):
        return super().forward(WithoutGradient.apply(input))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make, wrap, error, said",
    [
        (
            lambda: FreeTraining(FGSM(0.1)),
            lambda: Rounding(3, 2),
            ValueError,
            "do not depend differentiably on its input; allowed are models with a gra",
        ),
        (
            lambda: AWP(AdversarialTraining(PGD(0.1, steps=1))),
            lambda: nn.DataParallel(nn.Linear(3, 2)),
            TypeError,
            "model is a DataParallel, whose weights cannot be shifted",
        ),
        (
            lambda: AWP(AdversarialTraining(PGD(0.1, steps=1))),
            lambda: torch.jit.script(nn.Linear(3, 2)),
            TypeError,
            "model is a .*, whose weights cannot be shifted",
        ),
    ],
)
def test_models_that_an_objective_cannot_take_are_named(make, wrap, error, said):
    with pytest.raises(error, match=said):
        make()(wrap(), torch.rand(2, 3), torch.tensor([0, 1])).backward()


# --- what the lesson must find


def expect_training(m):
    defended = ("adversarial", "trades", "mart", "awp", "fast", "free")
    assert m["accuracy_adversarial"]["value"] > 0.93, (
        "adversarial training costs little accuracy"
    )
    assert m["robust_gain"]["low"] > 0.2, (
        "on the same digits the adversarially trained net is far more robust"
    )
    undefended = max(m["robust_ordinary"]["high"], m["robust_noise"]["high"])
    assert undefended < min(m[f"robust_{name}"]["low"] for name in defended), (
        "each defence is more robust than none and than noise"
    )
    assert (
        m["accuracy_under_noise"]["ordinary"]["low"] > m["robust_ordinary"]["high"]
    ), "noise of the same size does less than an attack"
    assert (
        max(m["saddle_difference"], m["awp_difference"]) < 1e-12 and m["free_agrees"]
    ), "the objectives are those of their papers"
    assert (
        m["trades_gradient_at_start"] < 1e-6 and 0.999 < m["trades_attained"] < 1 + 1e-6
    ), "the divergence of TRADES starts flat, and its attack attains the maximum"
    assert all(
        abs(m["cost_counted"][name] / units - 1) < 0.05
        for name, units in m["cost_predicted"].items()
    ), "the cost is the number of passes"
    derived = (0.4375, 0.75, 0.859375, 1)
    assert (
        max(abs(share - due) for share, due in zip(m["one_step_attained"], derived))
        < 0.03
    ), "one step attains what was derived"
    raised = [draw for draw, batch in enumerate(m["alarms_at_batch"]) if batch]
    assert raised, "a net that is trained against one step overfits catastrophically"
    stages = "at its best", "at the end", "cured"
    runs = [
        [m["collapse"][f"run {draw}, {stage}"] for stage in stages] for draw in raised
    ]
    fallen = [
        (best, end, cured)
        for best, end, cured in runs
        if end["the judge"]["high"] < best["the judge"]["low"]
    ]
    assert fallen, "under several steps its accuracy falls, and stays below what it was"
    stays = [
        end["one step"]["high"] > best["one step"]["low"] for best, end, _ in fallen
    ]
    assert 2 * sum(stays) > len(stays), "that under one step mostly does not"
    for _, end, cured in fallen:
        assert end["the judge"]["high"] < cured["the judge"]["low"], "the cure works"


undecided_training = {
    "alarms_at_batch": "whether and when a run collapses hangs on single roundings",
    "collapse": "single runs, of which one rounding more decides the course",
}
