"""Chapter 6: training against attacks beside plain formulas, their manners as guests, what they cost, and the alarm."""
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
from bigmodel_nb.models.vision import SmallConvNet
from bigmodel_nb.robust.attacks import APGD, FGSM, PGD, MomentumPGD, robust_accuracy
from bigmodel_nb.robust.training import (AWP, MART, TRADES, AdversarialTraining, FreeTraining, OverfittingAlarm, RandomFGSM, Replayed,
                                         boosted_cross_entropy, cost_meter)
from bigmodel_nb.training.loop import History, evaluate, fit, supervised

BOX = (-20.0, 20.0)
SEVERAL = PGD(0.1, steps=3)
OBJECTIVES = {"adversarial": lambda: AdversarialTraining(SEVERAL), "mixed": lambda: AdversarialTraining(SEVERAL, clean_weight=0.3),
              "one step": lambda: AdversarialTraining(RandomFGSM(0.1)), "fgsm": lambda: AdversarialTraining(FGSM(0.1)), "trades": lambda: TRADES(SEVERAL, 4.0),
              "mart": lambda: MART(SEVERAL, 3.0), "free": lambda: FreeTraining(FGSM(0.1))}
ALL = {**OBJECTIVES, **{f"awp of {name}": lambda name=name: AWP(OBJECTIVES[name](), 0.02) for name in OBJECTIVES}}
every_objective = pytest.mark.parametrize("name", ALL)


def smooth_net(norm=False, dropout=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), *([nn.BatchNorm2d(3)] if norm else []), nn.Tanh(), *([nn.Dropout(0.5)] if dropout else []), nn.Flatten(), nn.Linear(48, 4)]
    return nn.Sequential(*layers).double()


def batch(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, dtype=torch.float64, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def slopes(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


class Logistic(nn.Module):
    """Logits 0 and w·x, with the weight as a row, so that AWP moves it."""

    def __init__(self, d=6, seed=0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input):
        return torch.stack([torch.zeros_like(input[:, 0]), input @ self.w[0]], 1)


def rows(n=30, d=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator), torch.randint(0, 2, (n,), generator=generator)


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
        return F.cross_entropy(clean, y) + 4 * F.kl_div(q.log(), p, reduction="batchmean")
    wrong = q.clone()
    wrong[picked, y] = 0
    boosted = -q[picked, y].log() - (1 - wrong.amax(1)).log()
    return (boosted + 3 * (p * (p / q).log()).sum(1) * (1 - p[picked, y])).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_slope_are_those_of_the_formula(name):
    model, (x, y), objective = smooth_net(), batch(), OBJECTIVES[name]()
    moved = objective.attacked(model, x, y).detach()
    ours, plain = objective.loss_at(model, x, moved, y), formula(name, model, x, moved, y)
    assert abs(ours.item() - plain.item()) < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(slopes(model, ours), slopes(model, plain)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_slope_agrees_with_central_differences(name):
    model, (x, y), objective = smooth_net(), batch(), OBJECTIVES[name]()
    moved = objective.attacked(model, x, y).detach()
    gradient = slopes(model, objective.loss_at(model, x, moved, y))
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]

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
    for _ in range(2):  # the second call starts elsewhere, or where the first left the change
        loss, moved = whole(model, x, y), parts.attacked(model, x, y)
        other = parts.loss_at(model, x, moved, y)
        assert torch.equal(loss, other) and (moved - x).abs().max() <= 0.1 + 1e-12 and moved.min() >= 0 and moved.max() <= 1
        loss.backward(), other.backward()


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 10**6), st.floats(0.1, 60.0))
@settings(max_examples=30, deadline=None)
def test_boosted_cross_entropy_is_its_formula_and_stays_finite(n, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, classes, dtype=torch.float64, generator=generator)).requires_grad_()
    y = torch.randint(0, classes, (n,), generator=generator)
    value = boosted_cross_entropy(logits, y)
    (slope,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and slope.isfinite().all()
    q = logits.detach().softmax(1)
    rival = q.scatter(1, y[:, None], 0).amax(1)
    if (1 - rival).min() > 1e-6:
        assert value.item() == pytest.approx((-q.gather(1, y[:, None])[:, 0].log() - (1 - rival).log()).mean().item(), rel=1e-6)


# --- where the answer is known

@pytest.mark.parametrize("attack", [PGD(0.3, bounds=BOX), FGSM(0.3, bounds=BOX), RandomFGSM(0.3, alpha=2.0, bounds=BOX), PGD(0.3, bounds=BOX, restarts=2)])
def test_logistic_regression_has_the_closed_forms_gradient(attack):
    model, (x, y) = Logistic(), rows()
    (measured,) = slopes(model, AdversarialTraining(attack)(model, x, y))
    margin = (2 * y - 1) * (x @ model.w[0])
    (derived,) = slopes(model, F.softplus(-(margin - 0.3 * model.w.abs().sum())).mean())
    assert (measured - derived).abs().max() < 1e-12


@given(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25, 1.75, 2.0]), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_one_step_from_a_random_point_attains_its_share(alpha, seed):
    model, x = Logistic(4000, seed), torch.rand(8, 4000, dtype=torch.float64)
    attack = RandomFGSM(0.3, bounds=BOX, alpha=alpha, seed=seed)
    gain = (x - attack(model, x, torch.ones(8, dtype=torch.long))) @ model.w[0].detach()
    assert (gain / (0.3 * model.w.abs().sum())).mean().item() == pytest.approx(1 - (2 - alpha) ** 2 / 4, abs=0.02)


@pytest.mark.parametrize("norm, order", [("linf", math.inf), ("l2", 2), ("l1", 1)])
def test_one_step_stays_in_ball_and_box(norm, order):
    model, (x, y) = smooth_net(), batch(20)
    found = RandomFGSM(0.4, norm, alpha=1.5)(model, x, y)
    sizes = torch.linalg.vector_norm((found - x).flatten(1), order, dim=1)
    assert sizes.max() <= 0.4 * (1 + 1e-9) and sizes.min() > 0.2 and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("restarts", [1, 8])
@pytest.mark.parametrize("fast", [False, True])
def test_trades_climbs_to_the_largest_divergence(restarts, fast):
    """With two classes and linear logits each side has its top at a corner; a climb ends on the side where it starts."""
    model, (x, y) = Logistic(), rows()
    p, step = model(x).detach().softmax(1), 0.3 * model.w[0].detach().sign()

    def divergence(points):
        return (p * (p / model(points).detach().softmax(1)).log()).sum(1)

    found = divergence(TRADES(PGD(0.3, steps=15, restarts=restarts, bounds=BOX, fast=fast)).attacked(model, x, y))
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
    chance = torch.stack([divergence((x + 0.2 * torch.rand(x.shape, dtype=x.dtype, generator=generator).sub(0.5).sign()).clamp(0, 1)) for _ in range(50)])
    assert (divergence(moved) > chance.amax(0)).all()
    assert torch.equal(moved, TRADES(PGD(0.2, steps=10)).attacked(model, x, (y + 1) % 4))


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_awp_on_logistic_regression_is_the_closed_form(gamma):
    model, (x, y) = Logistic(), rows()
    signs, w = (2 * y - 1).double(), model.w[0].detach()
    moved = x - 0.3 * signs[:, None] * w.sign()

    def slope(at):
        return -(torch.sigmoid(-signs * (moved @ at)) * signs) @ moved / len(x)

    there = w + gamma * w.norm() * slope(w) / slope(w).norm()
    loss = AWP(AdversarialTraining(PGD(0.3, bounds=BOX)), gamma)(model, x, y)
    assert loss.item() == pytest.approx(F.softplus(-signs * (moved @ there)).mean().item(), rel=1e-12)
    assert (slopes(model, loss)[0][0] - slope(there)).abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_awp_moves_each_weight_by_its_share_and_leaves_all_as_it_was(name):
    model, (x, y), objective = smooth_net(norm=True).train(), batch(), OBJECTIVES[name]()
    moved = objective.attacked(model, x, y)
    before = copy.deepcopy(model.state_dict())
    changes = training._uphill(model, objective, 0.03, x, moved, y)
    assert set(changes) == {"0.weight", "4.weight"}  # no bias, no batch norm
    for key, change in changes.items():
        assert change.norm().item() == pytest.approx(0.03 * before[key].norm().item(), rel=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    spare = copy.deepcopy(model)
    for key, gradient in zip(dict(spare.named_parameters()), slopes(spare, objective.loss_at(spare, x, moved, y))):
        if key in changes:
            assert F.cosine_similarity(gradient.flatten(), changes[key].flatten(), dim=0).item() == pytest.approx(1, abs=1e-9)


def test_awp_through_fit_never_touches_the_weights_but_by_the_optimiser():
    model, (x, y) = smooth_net(norm=True), batch(8)
    before = copy.deepcopy(model.state_dict())
    fit(model, [(x, y)], epochs=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), objective=AWP(TRADES(SEVERAL), 0.5), device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


# --- what reduces to what

@pytest.mark.parametrize("first, second", [
    (lambda: TRADES(SEVERAL, 0.0), lambda: supervised(cross_entropy)), (lambda: MART(SEVERAL, 0.0), lambda: AdversarialTraining(SEVERAL, boosted_cross_entropy)),
    (lambda: AdversarialTraining(PGD(0.0)), lambda: supervised(cross_entropy)), (lambda: AdversarialTraining(SEVERAL, clean_weight=1.0), lambda: supervised(cross_entropy)),
    (lambda: FreeTraining(FGSM(0.0)), lambda: supervised(cross_entropy)), (lambda: FreeTraining(FGSM(0.1)), lambda: supervised(cross_entropy)),  # its first call
    *((lambda name=name: AWP(OBJECTIVES[name](), 0.0), OBJECTIVES[name]) for name in OBJECTIVES)])
def test_the_simpler_method_exactly(first, second):
    for norm, dropout in ((False, False), (True, True)):
        x, y = batch()
        model = smooth_net(norm, dropout).train()
        state, start = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        ours = first()(model, x, y)
        ours, after = (ours, slopes(model, ours)), copy.deepcopy(model.state_dict())
        torch.set_rng_state(state)
        model.load_state_dict(start)
        theirs = second()(model, x, y)
        if getattr(first(), "passes", 1) == 2 and dropout:
            continue  # a second pass counts in the running statistics
        assert torch.equal(ours[0], theirs) and all((a - b).abs().max() < 1e-15 for a, b in zip(ours[1], slopes(model, theirs)))
        assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())  # running statistics too


def test_one_replay_is_the_loader_and_several_repeat_each_batch():
    batches = [batch(3), batch(2, 1)]
    assert [id(each) for each in Replayed(batches, 1)] == [id(each) for each in batches] and len(Replayed(batches, 1)) == 2
    assert [id(each) for each in Replayed(batches, 3)] == [id(each) for each in batches for _ in range(3)] and len(Replayed(batches, 3)) == 6
    data = loader(*batch(9), batch_size=4, shuffle=True)
    assert len(list(Replayed(data, 2))) == len(Replayed(data, 2)) == 6


# --- one backward pass for two slopes

@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_training_takes_both_slopes_from_one_backward_pass(norm):
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
        assert all((p.grad - each).abs().max() < 1e-14 for p, each in zip(model.parameters(), weights))
        step = 0.1 * (gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None])
        if norm == "linf":
            change = (change + step).clamp(-0.1, 0.1)
            change = (x + change).clamp(0, 1) - x
            assert (objective.attacked(model, x, y) - x - change).abs().max() < 1e-12
        else:
            kept = objective.attacked(model, x, y).detach() - x
            assert kept.flatten(1).norm(dim=1).max() <= 0.1 + 1e-9
            change = kept


def test_free_training_keeps_the_change_from_batch_to_batch():
    model, (x, y), (other, z), objective = smooth_net(), batch(6), batch(4, 5), FreeTraining(FGSM(0.1))
    objective(model, x, y).backward()
    kept = objective.attacked(model, x, y).detach() - x
    moved = objective.attacked(model, other, z).detach()
    assert torch.allclose(moved, (other + kept[:4]).clamp(0, 1), atol=1e-12) and kept.abs().max() > 0.05
    assert objective.attacked(model, *batch(9)).shape == (9, 1, 6, 6)  # a larger batch starts anew


def test_free_training_runs_through_fit_and_hardens():
    images, targets = digits()
    train, test = split_indices(targets, (0.6, 0.4), 0)
    nets = {}
    for name, objective in (("free", FreeTraining(FGSM(0.12))), ("ordinary", None)):
        torch.manual_seed(0)
        nets[name] = SmallConvNet(width=8)
        fit(nets[name], Replayed(loader(images[train], targets[train], 64, shuffle=True), 4), epochs=3, objective=objective, device="cpu",
            optimizer=torch.optim.AdamW(nets[name].parameters(), lr=5e-3))
    held = loader(images[test], targets[test], 512)
    free, ordinary = (robust_accuracy(nets[name].eval(), held, PGD(0.12, steps=8, early_stop=True)) for name in nets)
    assert free.low > ordinary.high and evaluate(nets["free"], held).accuracy.value > 0.9


# --- manners

@every_objective
@pytest.mark.parametrize("mode", [True, False])
def test_the_attack_leaves_no_trace(name, mode):
    model, (x, y), objective = smooth_net(norm=True, dropout=True).train(mode), batch(), ALL[name]()
    model[5].bias.grad = torch.ones(4, dtype=torch.float64)
    passes = getattr(objective, "passes", None) or objective.objective.passes
    counted, hook = [], model.register_forward_hook(lambda module, *_: counted.append(module.training))
    inner = objective.objective if isinstance(objective, AWP) else objective
    inner.attacked(model, x, y)
    hook.remove()
    assert not any(counted) and [module.training for module in model.modules()] == [mode] * 7
    assert model[1].num_batches_tracked == 0 and (model[1].running_mean == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = objective(model, x, y)
    assert loss.dim() == 0 and loss.requires_grad
    assert model[1].num_batches_tracked == (passes if mode else 0)  # the loss alone, not the attack, not AWP's look
    assert torch.equal(model[5].bias.grad, torch.ones(4, dtype=torch.float64)) and all(p.grad is None for p in list(model.parameters())[:-1])


@every_objective
def test_a_model_that_raises_is_left_as_it_was(name):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, input):
            self.layer(self.norm(input))
            raise RuntimeError("no")

    model, x = Failing().train(), torch.rand(4, 3, dtype=torch.float64)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        ALL[name]()(model, x, torch.tensor([0, 1, 0, 1]))
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    if "free" not in name:  # it runs the loss alone, which counts
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [AdversarialTraining, TRADES, MART, lambda attack: AWP(TRADES(attack)), lambda attack: AdversarialTraining(RandomFGSM(0.4))])
def test_random_starts_differ_between_calls_and_repeat_between_objectives(make):
    model, (x, y) = smooth_net(), batch()

    def losses():
        objective = make(PGD(0.4, steps=1, step_size=0.01))
        return [objective(model, x, y).item() for _ in range(2)]

    first = losses()
    assert first[0] != first[1] and losses() == first


@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"early_stop": True}, {"fast": True}, {"fast": True, "early_stop": True}])
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
    if not options:
        assert seen == [9] * 4
        here = (x + training._random_change(x, 0.05, "linf", 0)).clamp(0, 1)
        for _ in range(4):
            here.requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(here), y), here)
            here = (x + (here + 0.02 * slope.sign() - x).clamp(-0.05, 0.05)).clamp(0, 1).detach()
        assert (moved - here).abs().max() < 1e-6
    if options == {"restarts": 2}:
        assert seen == [9] * 10 and torch.equal(moved, attack(model, x, y))
    assert (moved - x).abs().max() <= 0.05 + 1e-6
    assert F.cross_entropy(model(moved), y) > F.cross_entropy(model(x), y)


# --- what it costs

def test_units_are_what_is_counted():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1440, 4)).double()
    x, y = batch(3)
    attacks = {"restarts": AdversarialTraining(PGD(0.1, steps=2, restarts=3)), "momentum": AdversarialTraining(MomentumPGD(0.1, steps=2)), "fast": MART(PGD(0.1, steps=2, fast=True))}
    objectives = {"ordinary": supervised(cross_entropy), **{name: make() for name, make in ALL.items()}, **attacks}
    before, calls = copy.deepcopy(model.state_dict()), objectives["adversarial"]._calls
    table = cost_meter(objectives, model, x, y, rounds=1)
    assert list(table.columns) == ["predicted", "counted", "seconds", "predicted_ratio", "measured_ratio"] and list(table.index) == list(objectives)
    extra = table["counted"] - table["predicted"]
    assert (extra.drop("fast").abs() < 0.02).all() and abs(extra["fast"] - 1) < 0.02, table  # a copy is tried on 1 and 2 examples: as many as a batch has here
    expected = {"ordinary": 3, "adversarial": 9, "mixed": 12, "one step": 5, "fgsm": 5, "trades": 13, "mart": 12, "free": 3, "awp of adversarial": 12, "awp of trades": 19,
                "restarts": 18, "momentum": 8, "fast": 10}
    assert {name: table["predicted"][name] for name in expected} == expected
    assert table["measured_ratio"]["ordinary"] == 1 and table["predicted_ratio"]["trades"] == pytest.approx(13 / 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    assert objectives["adversarial"]._calls == calls == 0 and isinstance(table, pd.DataFrame)


# --- the alarm

class Scripted:
    """Stands in for `robust_accuracy`: accuracies of one step and of several, in turn, out of 200."""

    def __init__(self, *pairs):
        self.values = [value for pair in pairs for value in pair]

    def __call__(self, model, data, attack):
        assert type(attack) is (FGSM if len(self.values) % 2 == 0 else PGD) and attack.eps == 0.2
        return Proportion.of(200 * self.values.pop(0), 200)


def alarmed(monkeypatch, cure, *pairs, every=None, epochs=None):
    monkeypatch.setattr(training, "robust_accuracy", Scripted(*pairs))
    torch.manual_seed(0)
    model, (x, y), weights = smooth_net(), batch(4), []
    objective = AdversarialTraining(FGSM(0.2))
    alarm = OverfittingAlarm(model, x, y, PGD(0.2, steps=3), objective if cure == "objective" else cure, every)

    class Note:
        def on_epoch_end(self, history):
            weights.append(model[0].weight.detach().clone())

    history = fit(model, [(x, y)] * 2, epochs=epochs or len(pairs), objective=objective, callbacks=[Note(), alarm], device="cpu", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    return model, alarm, objective, history, weights


GOOD, BAD = (0.6, 0.5), (0.7, 0.1)


def test_a_sound_run_raises_no_alarm(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, alarm, objective, history, _ = alarmed(monkeypatch, "objective", GOOD, (0.9, 0.46), (0.02, 0.0))  # few left by both tell nothing apart
    assert alarm.raised_at is None and len(alarm.checks) == 3 and type(objective.attack) is FGSM and not history.stop
    assert [check["batch"] for check in alarm.checks] == [2, 4, 6] and alarm.checks[1]["several"].value == pytest.approx(0.46)


def test_the_alarm_warns_once_and_without_a_cure_changes_nothing(monkeypatch):
    with pytest.warns(UserWarning, match=r"one step has stopped working by batch 4: one step leaves 70.0% .* of the held-out examples, 3 steps leave 10.0%") as caught:
        model, alarm, objective, history, weights = alarmed(monkeypatch, None, GOOD, BAD, BAD)
    assert len(caught) == 1 and alarm.raised_at == 4 and len(history.rows) == 3 and type(objective.attack) is FGSM
    assert torch.equal(model[0].weight, weights[-1])


def test_the_alarm_stops_at_the_last_good_weights(monkeypatch):
    with pytest.warns(UserWarning, match="stopped working"):
        model, alarm, _, history, weights = alarmed(monkeypatch, "stop", GOOD, GOOD, BAD, epochs=5)
    assert history.stop and len(history.rows) == 3 and torch.equal(model[0].weight, weights[1]) and not torch.equal(weights[1], weights[2])


def test_the_alarm_goes_back_and_on_against_several_steps(monkeypatch):
    with pytest.warns(UserWarning, match="stopped working"):
        model, alarm, objective, history, weights = alarmed(monkeypatch, "objective", GOOD, BAD, GOOD)
    assert objective.attack == PGD(0.2, steps=3) and len(history.rows) == 3 and alarm.raised_at == 4
    assert not torch.equal(model[0].weight, weights[0])  # it went on
    assert (model[0].weight - weights[0]).norm() < (weights[1] - weights[0]).norm() * 1.5  # from there: as far as an epoch goes


def test_the_alarm_counts_batches(monkeypatch):
    _, alarm, *_ = alarmed(monkeypatch, None, GOOD, GOOD, every=3, epochs=3)
    assert [check["batch"] for check in alarm.checks] == [3, 6]


def test_the_alarm_sees_what_one_step_does_not():
    """A net that one step cannot tell: its logit is low halfway to the corner and high again there."""
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, input):
            return torch.stack([torch.zeros(len(input)), 1 + 3 * self.w * (8 * math.pi * input[:, 0]).sin()], 1)

    x = 0.5 + 0.01 * torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    alarm = OverfittingAlarm(Masked(), x, torch.ones(200, dtype=torch.long), PGD(0.125, steps=10, restarts=4, loss="margin"))
    with pytest.warns(UserWarning, match="stopped working by batch 1"):
        alarm.on_epoch_end(History(batch_losses=[1.0]))
    assert alarm.checks[0]["one_step"].value > 0.9 and alarm.checks[0]["several"].value < 0.3


# --- on digits

def test_adversarial_training_holds_where_ordinary_training_does_not():
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    nets = []
    for objective in (None, AdversarialTraining(PGD(0.15, steps=3))):
        torch.manual_seed(0)
        net = SmallConvNet(width=8)
        fit(net, loader(images[train], targets[train], 64, shuffle=True), epochs=8, optimizer=torch.optim.AdamW(net.parameters(), lr=7e-3), objective=objective, device="cpu")
        nets.append(net.eval())
    judge, held = PGD(0.15, steps=15, early_stop=True), loader(images[test], targets[test], 512)
    ordinary, hardened = (robust_accuracy(net, held, judge) for net in nets)
    assert hardened.low > ordinary.high and evaluate(nets[1], held).accuracy.value > 0.9


# --- bad input

@pytest.mark.parametrize("make, error, said", [
    (lambda: AdversarialTraining(PGD(0.1, targeted=True)), ValueError, "attack is targeted; allowed are untargeted"), (lambda: AdversarialTraining(0.1), TypeError, "attack is a float; allowed are attacks"),
    (lambda: AdversarialTraining(APGD(0.1)), TypeError, "attack is a APGD; allowed are attacks, PGD"), (lambda: AdversarialTraining(FGSM(0.1), clean_weight=2), ValueError, "clean_weight is 2; allowed is a number from 0 to 1"),
    (lambda: TRADES(FGSM(0.1)), ValueError, "attack is FGSM.*; allowed is a PGD without loss and early_stop"), (lambda: TRADES(MomentumPGD(0.1)), ValueError, "attack is MomentumPGD"),
    (lambda: TRADES(PGD(0.1, loss="margin")), ValueError, "allowed is a PGD without loss"), (lambda: TRADES(PGD(0.1, early_stop=True)), ValueError, "allowed is a PGD without loss and early_stop"),
    (lambda: TRADES(PGD(0.1), beta=-1), ValueError, "beta is -1; allowed is a number from 0 up"), (lambda: MART(PGD(0.1), beta=math.nan), ValueError, "beta is nan"), (lambda: MART(None), TypeError, "attack is a NoneType"),
    (lambda: MART(PGD(0.1), beta=math.inf), ValueError, "beta is inf"), (lambda: FreeTraining(PGD(0.1)), ValueError, "attack is PGD.*; allowed is an FGSM"), (lambda: FreeTraining(FGSM(0.1, loss="margin")), ValueError, "an FGSM without loss and fast"),
    (lambda: FreeTraining(RandomFGSM(0.1)), ValueError, "attack is RandomFGSM"), (lambda: Replayed([], 0), ValueError, "replays is 0; allowed is an integer of at least 1"), (lambda: Replayed([], 2.0), ValueError, "replays is 2.0"),
    (lambda: RandomFGSM(0.1, alpha=-1), ValueError, "alpha is -1; allowed is a number from 0 up"), (lambda: RandomFGSM(8), ValueError, "eps is 8; allowed is a radius"), (lambda: RandomFGSM(0.1, seed=-1), ValueError, "seed is -1"),
    (lambda: AWP(supervised(cross_entropy)), TypeError, "objective is a function; allowed are those of this module"), (lambda: AWP(AWP(MART(PGD(0.1)))), TypeError, "objective is a AWP"), (lambda: AWP(MART(PGD(0.1)), gamma="1"), ValueError, "gamma is '1'"),
    (lambda: cost_meter({}, nn.Linear(2, 2), torch.rand(3, 2), torch.zeros(3).long()), ValueError, "objectives is empty; allowed is at least one"),
    (lambda: cost_meter({"a": 1}, nn.Linear(2, 2), None, None, rounds=0), ValueError, "rounds is 0"),
    (lambda: OverfittingAlarm(nn.Linear(2, 2), None, None, FGSM(0.1)), TypeError, "attack is a FGSM; allowed is a PGD"), (lambda: OverfittingAlarm(nn.Linear(2, 2), None, None, PGD(0.1), cure="rest"), ValueError, "cure is 'rest'; allowed are None, 'stop'"),
    (lambda: OverfittingAlarm(nn.Linear(2, 2), None, None, PGD(0.1), every=0), ValueError, "every is 0"),
    (lambda: AdversarialTraining(PGD(0.1))(nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.uint8), torch.tensor([0, 1])), TypeError, "x is torch.uint8"),
    (lambda: TRADES(PGD(0.1))(nn.Linear(3, 2), torch.rand(2, 3), torch.tensor([0, 5])), ValueError, "y holds class 5; allowed are 0 to 1"),
    (lambda: TRADES(PGD(0.1))(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), torch.rand(2, 3), torch.tensor([0, 1])), ValueError, "model gives probabilities"),
    (lambda: FreeTraining(FGSM(0.1))(nn.Linear(3, 2), torch.full((2, 3), 2.0), torch.tensor([0, 1])), ValueError, "x ranges from 2 to 2; allowed are values within bounds")])
def test_bad_input_gets_a_sentence(make, error, said):
    with pytest.raises(error, match=said):
        make()
