"""Chapter 4: what a long run needs: accumulation, averages, best weights, guards."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.data.sources import loader
from bigmodel_nb.training import loop
from bigmodel_nb.training.loop import evaluate, fit, supervised


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def data(rows=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x[:, 0] > 0).long()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def apart(first, second):
    return max(
        (a - b).abs().max().item()
        for a, b in zip(first.parameters(), second.parameters())
    )


class Tagger(nn.Module):
    "Classes for each of several words, (batch, class, word)."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.embed(words).tanh()).mT


def ragged(lengths, seed=0):
    "Sentences of some lengths, padded to the longest, in one batch each and in all."
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    words = torch.randint(0, 5, (len(lengths), width), generator=generator)
    tags = torch.randint(0, 3, (len(lengths), width), generator=generator)
    for row, length in enumerate(lengths):
        tags[row, length:] = -100
    return words, tags


@given(st.lists(st.integers(0, 9), min_size=2, max_size=7).filter(any))
@settings(max_examples=40, deadline=None)
def test_accumulation_weighs_by_targets_and_equals_the_large_batch(lengths):
    words, tags = ragged(lengths)
    at_once, in_parts = Tagger().double(), Tagger().double()
    for model, batches, count in (
        (at_once, [(words, tags)], 1),
        (in_parts, list(zip(words.split(1), tags.split(1))), len(lengths)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        history = fit(
            model,
            batches,
            epochs=1,
            optimizer=optimizer,
            accumulate=count,
            device="cpu",
        )
        assert history.steps == 1
    assert apart(at_once, in_parts) < 1e-12


def test_a_mean_of_means_would_be_caught():
    words, tags = ragged([1, 8])
    whole, means = Tagger(), Tagger()
    objective = supervised(F.cross_entropy)
    objective(whole, words, tags).backward()
    for word, tag in zip(words.split(1), tags.split(1)):
        (objective(means, word, tag) / 2).backward()
    wrong = means.head.weight.grad - whole.head.weight.grad
    assert wrong.norm() > 0.25 * whole.head.weight.grad.norm()
    tried = Tagger()
    batches = list(zip(words.split(1), tags.split(1)))
    rate = torch.optim.SGD(tried.parameters(), lr=1.0)
    fit(tried, batches, epochs=1, optimizer=rate, accumulate=2, device="cpu")
    moved = Tagger().head.weight - tried.head.weight
    torch.testing.assert_close(moved, whole.head.weight.grad, rtol=1e-6, atol=1e-6)


def test_the_last_group_of_an_epoch_may_be_smaller():
    x, y = data(40)
    model = network()
    history = fit(model, loader(x, y, 8), epochs=2, accumulate=2, device="cpu")
    assert history.steps == 6 and len(history.batch_losses) == 10
    assert history.frame["step"].tolist() == [3, 6]


@pytest.mark.parametrize(
    "steps, every, rows", [(7, None, [3, 6, 7]), (7, 2, [2, 4, 6, 7])]
)
def test_a_run_may_be_as_long_as_its_steps(steps, every, rows):
    x, y = data(48)
    seen = []

    class Watch:
        def on_epoch_end(self, history):
            seen.append(history.steps)

    model = network()
    history = fit(
        model,
        loader(x, y, 16),
        loader(x, y),
        steps=steps,
        every=every,
        callbacks=[Watch()],
        device="cpu",
    )
    assert history.steps == steps and history.frame["step"].tolist() == rows == seen
    assert history.frame["valid_loss"].notna().all()


def test_steps_need_no_end_of_the_loader():
    x, y = data(8)

    class Endless:
        def __iter__(self):
            while True:
                yield x, y

    assert fit(network(), Endless(), steps=5, every=2, device="cpu").steps == 5


def test_each_step_counts_in_exactly_one_row():
    x, y = data(48)
    history = fit(network(), loader(x, y, 16), epochs=3, every=2, device="cpu")
    losses, ends = history.batch_losses, history.frame["step"].tolist()
    assert ends == [2, 4, 6, 8, 9]
    for start, end, told in zip([0, *ends], ends, history.frame["train_loss"]):
        assert told == pytest.approx(sum(losses[start:end]) / (end - start), rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_moving_average_is_torchs(decay):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    x, y = data()
    plain, ours = network(), network()
    theirs = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(3):
        for a, b in loader(x, y, 16):
            optimizer.zero_grad()
            F.cross_entropy(plain(a), b).backward()
            optimizer.step()
            theirs.update_parameters(plain)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    history = fit(
        ours,
        loader(x, y, 16),
        loader(x, y),
        epochs=3,
        optimizer=optimizer,
        ema=decay,
        objective=supervised(F.cross_entropy),
        device="cpu",
    )
    assert apart(ours, theirs.module) < 1e-6 < apart(ours, plain)
    found = evaluate(theirs.module, loader(x, y)).loss
    assert history.frame["valid_loss"].iloc[-1] == pytest.approx(found, abs=1e-6)


def test_the_best_weights_stay_and_patience_ends_the_run():
    x, y = data(16)
    valid = loader(*data(200, seed=1))
    losses, weights = [], []
    model = network()

    class Keep:
        def on_epoch_end(self, history):
            losses.append(history.rows[-1]["valid_loss"])
            weights.append(copy.deepcopy(model.state_dict()))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    history = fit(
        model,
        loader(x, y, 16),
        valid,
        epochs=200,
        optimizer=optimizer,
        keep="best",
        patience=4,
        callbacks=[Keep()],
        device="cpu",
    )
    best = losses.index(min(losses))
    assert history.stop and len(losses) == best + 5 < 200 and history.best == best
    assert all(
        torch.equal(model.state_dict()[k], weights[best][k]) for k in weights[best]
    )
    assert evaluate(model, valid).loss == min(losses)


def test_a_metric_by_name_can_choose_the_best():
    x, y = data()

    def spread(output, target):
        assert output.shape == (48, 3) and target.shape == (48,)
        return output.std()

    history = fit(
        network(),
        loader(x, y, 16),
        loader(x, y, 20),
        epochs=4,
        metrics={"spread": spread},
        monitor="valid_spread",
        mode="min",
        keep="best",
        device="cpu",
    )
    column = history.frame["valid_spread"]
    assert column.notna().all() and history.best == column.idxmin()


def test_groups_keep_their_own_rates():
    x, y = data()
    model = network()
    start = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    fit(model, loader(x, y, 16), epochs=1, optimizer=optimizer, device="cpu")
    assert torch.equal(model[0].weight, start[0].weight)
    assert not torch.equal(model[2].weight, start[2].weight)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(epochs=1, steps=1),
            "both are given of epochs and steps; allowed is one of the two",
        ),
        (dict(), "neither is given of epochs and steps; allowed is one of the two"),
        (dict(steps=0), "steps is 0; allowed is an integer of at least 1"),
        (
            dict(epochs=1, every=True),
            "every is True; allowed is an integer of at least 1",
        ),
        (
            dict(epochs=1, accumulate=0),
            "accumulate is 0; allowed is an integer of at least 1",
        ),
        (
            dict(epochs=1, accumulate=None),
            "accumulate is None; allowed is an integer of at least 1",
        ),
        (
            dict(epochs=1, ema=1.0),
            "ema is 1.0; allowed is a decay between 0 and 1 or None",
        ),
        (
            dict(epochs=1, keep="first"),
            "keep is 'first'; allowed are 'last' and 'best'",
        ),
        (
            dict(epochs=1, patience=0),
            "patience is 0; allowed is an integer of at least 1",
        ),
        (
            dict(epochs=1, keep="best", mode="up"),
            "mode is 'up'; allowed are 'min', 'max' and None",
        ),
        (
            dict(epochs=1, keep="best"),
            "monitor is 'valid_loss'; this run measures 'train_loss'",
        ),
    ],
)
def test_options_that_cannot_work_are_named(options, sentence):
    x, y = data()
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fit(model, loader(x, y), device="cpu", **options)
    assert apart(model, before) == 0


def test_a_metric_needs_to_be_told_which_way_is_better():
    x, y = data()
    with pytest.raises(
        ValueError, match=r"^mode is None; allowed for 'valid_f' are 'min' and 'max'$"
    ):
        fit(
            network(),
            loader(x, y),
            loader(x, y),
            epochs=1,
            metrics={"f": lambda o, t: 1.0},
            monitor="valid_f",
            keep="best",
        )


class Bursts(nn.Module):
    "Makes an infinity in the middle, from inputs above 5."

    def forward(self, x):
        return torch.where(x > 5, 1 / torch.zeros_like(x), x)


def guarded(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), Bursts(), nn.BatchNorm1d(6), nn.Linear(6, 3))


def test_the_layer_that_went_first_is_named():
    x, y = data()
    x[20] = 100.0
    with pytest.raises(
        FloatingPointError,
        match=r"; the first layer whose output is not finite is '1' \(Bursts\)$",
    ):
        fit(guarded(), loader(x, y, 16), epochs=1, device="cpu")


def test_an_input_that_is_not_finite_is_named():
    x, y = data()
    x[20, 1] = math.nan
    with pytest.raises(
        FloatingPointError, match="; the input holds numbers that are not finite$"
    ):
        fit(guarded(), loader(x, y, 16), epochs=1, device="cpu")


class Root(nn.Module):
    def forward(self, x):
        return (0 * x).sqrt()


def test_the_layer_at_which_a_gradient_goes_bad_is_named():
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Root(), nn.Linear(6, 3))
    sentence = "; the gradient is not finite first where it comes back to the output"
    sentence += r" of '0' \(Linear\)$"
    with pytest.raises(FloatingPointError, match=sentence):
        fit(model, loader(x, y, 16), epochs=1, device="cpu")


def test_the_guard_leaves_no_hooks_and_draws_no_random_numbers(monkeypatch):
    x, y = data()
    x[20] = 100.0
    states = []
    for look in (loop._origin, lambda run, *pair, backward: ""):
        monkeypatch.setattr(loop, "_origin", look)
        model = nn.Sequential(nn.Dropout(), *guarded())
        torch.manual_seed(3)
        with pytest.raises(FloatingPointError):
            fit(model, loader(x, y, 16), epochs=1, device="cpu")
        states.append(torch.get_rng_state())
        assert not any(module._forward_hooks for module in model.modules())
        assert model[3].running_mean.isfinite().all(), "buffers are put back"
    assert torch.equal(*states)


def test_memory_stays_flat_over_500_steps():
    import gc

    import psutil

    x, y = data(512)
    model = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 3))
    held = []

    class Watch:
        def on_batch_end(self, history):
            if history.steps in (100, 500):
                gc.collect()
                tensors = sum(
                    isinstance(each, torch.Tensor) for each in gc.get_objects()
                )
                held.append((tensors, psutil.Process().memory_info().rss))

    fit(
        model,
        loader(x, y, 64),
        loader(x, y),
        steps=500,
        every=50,
        ema=0.9,
        keep="best",
        accumulate=2,
        callbacks=[Watch()],
        device="cpu",
    )
    (few, before), (many, after) = held
    assert many == few, "no tensor is kept from step to step"
    assert after - before < 20e6


def test_rows_of_one_epoch_are_told_apart():
    from bigmodel_nb.training.loop import plot_history

    x, y = data(48)
    history = fit(network(), loader(x, y, 12), steps=4, every=1, device="cpu")
    assert repr(history) == "History(4 rows, 4 batches)"
    assert plot_history(history).alt.startswith("Loss by step; after 4 steps")
    history = fit(network(), loader(x, y, 12), epochs=2, device="cpu")
    assert repr(history) == "History(2 epochs, 8 batches)"
