"""Chapter 4: the loop."""

import copy
import functools
import json
import math
import re
import warnings
from collections import UserDict, namedtuple
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_nb.data.sources import loader
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.training import loop
from bigmodel_nb.training import objective as objectives
from bigmodel_nb.training.loop import (
    History,
    LiveCurve,
    MixedPrecision,
    evaluate,
    fit,
    forward,
    match_dtype,
    plot_history,
    predict,
    supervised,
    to_device,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def data(rows=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 4, generator=generator)
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def batches(rows=50, batch_size=16, shuffle=False, seed=0):
    return loader(*data(rows), batch_size=batch_size, shuffle=shuffle, seed=seed)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(8, 3),
    )


def same_weights(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(
            first.state_dict().values(), second.state_dict().values(), strict=True
        )
    )


def bare_loop(model, batches, epochs, optimizer, scheduler=None, max_norm=None):
    model.train()
    losses = []
    for _ in range(epochs):
        for input, target in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(input), target)
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
    return losses


# --- the same as a bare loop, and again


@given(
    st.integers(1, 40),
    st.integers(1, 17),
    st.integers(1, 3),
    st.sampled_from([None, 0.1, 100.0]),
    st.sampled_from(["sgd", "adamw"]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_equals_a_bare_loop_bit_for_bit(
    rows, batch_size, epochs, max_norm, name, scheduled
):
    ends, losses = [], []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = (
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            if name == "sgd"
            else torch.optim.AdamW(model.parameters(), 0.01)
        )
        scheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            if scheduled
            else None
        )
        train = batches(rows, batch_size, shuffle=True)
        if ours:
            history = fit(
                model,
                train,
                batches(10),
                epochs=epochs,
                optimizer=optimizer,
                scheduler=scheduler,
                max_norm=max_norm,
                objective=supervised(F.cross_entropy),
                device="cpu",
            )
            losses.append(history.batch_losses)
        else:
            losses.append(
                bare_loop(model, train, epochs, optimizer, scheduler, max_norm)
            )
        ends.append(model)
    assert same_weights(*ends) and losses[0] == losses[1]


def test_same_seed_repeats_bit_for_bit_with_dropout_and_another_differs():
    ends = []
    for seed in (1, 1, 2):
        model = network(seed, dropout=0.5)
        fit(model, batches(shuffle=True, seed=seed), batches(), epochs=2, device="cpu")
        ends.append(model)
    assert same_weights(ends[0], ends[1]) and not same_weights(ends[0], ends[2])


def test_evaluation_between_epochs_changes_nothing():
    ends = [network(dropout=0.5) for _ in range(2)]
    for model, valid in zip(ends, (None, batches())):
        torch.manual_seed(5)
        fit(model, batches(), valid, epochs=3, device="cpu")
    assert same_weights(*ends)


def test_default_is_adamw_with_our_cross_entropy():
    first, second = network(), network()
    fit(first, batches(), epochs=2, device="cpu")
    fit(
        second,
        batches(),
        epochs=2,
        device="cpu",
        objective=supervised(cross_entropy),
        optimizer=torch.optim.AdamW(second.parameters(), lr=1e-3),
    )
    assert same_weights(first, second)


def test_learns():
    model = network()
    history = fit(
        model,
        batches(200, shuffle=True),
        batches(200),
        epochs=20,
        optimizer=torch.optim.AdamW(model.parameters(), 0.02),
    )
    assert (
        history.frame["valid_accuracy"].iloc[-1] > 0.9
        and history.frame["train_loss"].iloc[-1]
        < 0.5 * history.frame["train_loss"].iloc[0]
    )


def test_frozen_parameters_stay():
    model = network()
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(False)
    fit(model, batches(), epochs=1, device="cpu")
    assert torch.equal(before, model[0].weight)


# --- history and callbacks


def test_history_has_a_row_an_epoch_and_a_loss_a_batch():
    history = fit(network(), batches(50, 16), batches(), epochs=3)
    assert list(history.frame.columns) == [
        "epoch",
        "step",
        "train_loss",
        "valid_loss",
        "valid_accuracy",
        "seconds",
    ]
    assert (
        history.frame["epoch"].tolist() == [1, 2, 3] and len(history.batch_losses) == 12
    )
    weighted = (
        sum(
            loss * size for loss, size in zip(history.batch_losses[:4], (16, 16, 16, 2))
        )
        / 50
    )
    assert history.frame["train_loss"][0] == pytest.approx(weighted, rel=1e-12)
    assert (history.frame["seconds"] > 0).all()
    assert repr(history) == "History(3 epochs, 12 batches)"


def test_last_row_is_what_evaluate_says():
    model, valid = network(dropout=0.5), batches(30)
    row = fit(model, batches(), valid, epochs=2).frame.iloc[-1]
    result = evaluate(model, valid)
    assert (row.valid_loss, row.valid_accuracy) == (result.loss, result.accuracy.value)


def test_without_validation_its_columns_are_empty():
    frame = fit(network(), batches(), epochs=2).frame
    assert (
        frame[["valid_loss", "valid_accuracy"]].isna().all().all()
        and len(History().frame) == 0
    )


def test_callbacks_are_called_in_time():
    calls = []
    both = SimpleNamespace(
        on_batch_end=lambda history: calls.append(len(history.batch_losses)),
        on_epoch_end=lambda history: calls.append(-len(history.rows)),
    )
    only = SimpleNamespace(on_epoch_end=lambda history: calls.append("end"))
    fit(network(), batches(32, 16), epochs=2, callbacks=iter([both, only, object()]))
    assert calls == [1, 2, -1, "end", 3, 4, -2, "end"]


def stopper(after):
    def on_batch_end(history):
        history.stop = len(history.batch_losses) >= after

    return SimpleNamespace(on_batch_end=on_batch_end)


def test_a_callback_can_stop_the_run():
    history = fit(
        network(), batches(50, 16), batches(), epochs=9, callbacks=[stopper(6)]
    )
    assert (len(history.batch_losses), len(history.rows)) == (
        6,
        2,
    ) and "stopped by a callback" in repr(history)


def test_ctrl_c_keeps_the_history_and_the_weights():
    def interrupt(history):
        if len(history.batch_losses) == 6:
            raise KeyboardInterrupt

    model, reference = network(), network()
    with pytest.warns(
        UserWarning,
        match="fit was interrupted in epoch 2 of 5; the model keeps the weights it has",
    ):
        history = fit(
            model,
            batches(50, 16),
            epochs=5,
            device="cpu",
            callbacks=[SimpleNamespace(on_batch_end=interrupt)],
        )
    assert (
        history.interrupted
        and (len(history.rows), len(history.batch_losses)) == (1, 6)
        and repr(history).endswith("interrupted)")
    )
    fit(reference, batches(50, 16), epochs=5, device="cpu", callbacks=[stopper(6)])
    assert same_weights(model, reference)


def test_ctrl_c_after_the_last_epoch_names_no_epoch_more():
    def interrupt(history):
        raise KeyboardInterrupt

    last = SimpleNamespace(on_epoch_end=interrupt)
    with pytest.warns(UserWarning, match="interrupted in epoch 1 of 1"):
        fit(network(), batches(), epochs=1, device="cpu", callbacks=[last])


def test_live_curve_redraws_one_picture_a_run(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda picture: shown.append(("update", picture)))
    monkeypatch.setattr(
        "IPython.display.display",
        lambda picture, display_id: shown.append(("display", picture)) or handle,
    )
    curve = LiveCurve(every=2)
    fit(network(), batches(), batches(), epochs=2, callbacks=[curve])
    assert shown == []  # no notebook, no picture
    running = MagicMock(kernel=object())
    monkeypatch.setattr("IPython.get_ipython", lambda: running)
    for _ in range(2):
        fit(network(), batches(), batches(), epochs=5, callbacks=[curve])
    assert [kind for kind, _ in shown] == ["display", "update"] * 2
    assert (
        "Loss by epoch; after 4 epochs" in shown[1][1].metadata["alt"]
        and shown[0][1].data[:4] == b"\x89PNG"
    )
    with pytest.raises(
        ValueError, match="every is 0; allowed is an integer of at least 1"
    ):
        LiveCurve(0)


def test_an_empty_history_has_no_picture():
    with pytest.raises(
        ValueError, match="history has no epoch; allowed is one of at least one epoch"
    ):
        plot_history(History())


# --- forward, move, objectives


def test_forward_passes_mappings_by_keyword_and_takes_logits():
    model = nn.Linear(4, 3)
    named = lambda mask=None, inputs=None: SimpleNamespace(logits=model(inputs) * mask)
    inputs = torch.randn(2, 4)
    assert torch.equal(forward(model, inputs), model(inputs))
    assert torch.equal(
        forward(named, UserDict(inputs=inputs, mask=0.5)), model(inputs) * 0.5
    )


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "dtype, found",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_logits_of_16_bits_come_back_in_32(dtype, found):
    model, x = nn.Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype)
    assert forward(model, x).dtype == found and torch.equal(
        forward(model, x), model(x).to(found)
    )
    assert forward(lambda x: "no tensor", x) == "no tensor"


@given(
    st.recursive(
        st.sampled_from(["tensor", 3, "text", None]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            | st.builds(Pair, inner, inner)
        ),
    )
)
def test_move_keeps_the_structure(structure):
    def with_tensors(each, device):
        if isinstance(each, dict):
            return {name: with_tensors(value, device) for name, value in each.items()}
        if isinstance(each, Pair):
            return Pair(*(with_tensors(value, device) for value in each))
        if isinstance(each, (list, tuple)):
            return type(each)(with_tensors(value, device) for value in each)
        return torch.ones(2, device=device) if each == "tensor" else each

    def devices(each):
        if isinstance(each, dict):
            return {name: devices(value) for name, value in each.items()}
        if isinstance(each, Pair):
            return Pair(*map(devices, each))
        if isinstance(each, (list, tuple)):
            return type(each)(map(devices, each))
        return str(each.device) if isinstance(each, torch.Tensor) else each

    moved = to_device(with_tensors(structure, "cpu"), "meta")
    assert devices(moved) == devices(with_tensors(structure, "meta"))


def test_any_loss_makes_an_objective():
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 1), data()[0]
    history = fit(
        model,
        loader(inputs, inputs[:, :1] * 3),
        epochs=200,
        objective=supervised(F.mse_loss),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        device="cpu",
    )
    assert history.batch_losses[-1] < 1e-4 and model.weight[
        0, 0
    ].item() == pytest.approx(3, abs=0.05)


class Seen(nn.Module):
    """Notes the types of its input and of its answer."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.types = inside, []

    def forward(self, x):
        answer = self.inside(x)
        self.types += [x.dtype, answer.dtype]
        return answer


@given(st.integers(0, 2**31), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_mixed_precision_shortens_products_only(seed, scale):
    torch.manual_seed(seed)
    last = Seen(nn.Linear(32, 3))
    model, x, y = (
        nn.Sequential(nn.Linear(4, 32), nn.Tanh(), last),
        scale * torch.randn(20, 4),
        torch.randint(3, (20,)),
    )
    losses, slopes = [], []
    for objective in (
        supervised(cross_entropy),
        MixedPrecision(supervised(cross_entropy), torch.bfloat16),
    ):
        model.zero_grad()
        losses.append(objective(model, x, y))
        losses[-1].backward()
        slopes.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        )
    assert last.types == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert losses[1].dtype == slopes[1].dtype == torch.float32
    assert not torch.equal(*slopes)  # the two losses may be the same number
    assert (
        abs(losses[0] - losses[1]) < 0.02 * (1 + losses[0].abs())
        and (slopes[0] - slopes[1]).norm() < 0.05 * slopes[0].norm()
    )
    assert not torch.is_autocast_enabled("cpu")


def test_mixed_precision_changes_nothing_else():
    objective = supervised(cross_entropy)
    objective.passes = 7
    long = MixedPrecision(objective, torch.float32)
    model, (x, y) = network().eval(), data()
    assert (
        torch.equal(long(model, x, y), objective(model, x, y))
        and long.passes == 7
        and MixedPrecision(supervised(cross_entropy)).passes == 3
    )

    class Counting:
        calls = 0

        def __call__(self, model, input, target):
            self.calls += 1
            return objective(model, input, target)

    first = MixedPrecision(Counting())
    second = copy.deepcopy(first)
    second(model, x, y)
    assert (first.objective.calls, second.objective.calls) == (
        0,
        1,
    )  # a copy has a state of its own, as `cost_meter` needs it
    plain, mixed = (
        fit(network(), batches(), epochs=5, objective=each, device="cpu")
        .frame["train_loss"]
        .tolist()
        for each in (None, MixedPrecision(supervised(cross_entropy), torch.bfloat16))
    )
    assert (
        mixed == pytest.approx(plain, rel=0.01)
        and mixed != plain
        and mixed[-1] < mixed[0]
    )
    with pytest.raises(
        ValueError,
        match="dtype is torch.float64; allowed are torch.bfloat16, torch.float16,"
        " torch.float32, 'auto' and None",
    ):
        MixedPrecision(objective, torch.float64)


def wide_network():
    torch.manual_seed(0)
    hidden = nn.Linear(1024, 1024)
    return nn.Sequential(nn.Linear(4, 1024), nn.ReLU(), hidden, nn.Linear(1024, 3))


def test_auto_takes_short_products_where_they_pay(monkeypatch):
    monkeypatch.setattr(objectives, "best_dtype", lambda device: torch.bfloat16)
    rows = torch.randn(3, 512, 4), torch.randint(3, (3, 512))
    chosen = {}
    for precision in ("float32", "bfloat16", "auto"):
        for name, make in (("narrow", network), ("wide", wide_network)):
            torch.manual_seed(0)
            history = fit(
                make(), list(zip(*rows)), epochs=1, precision=precision, device="cpu"
            )
            chosen[name, precision] = history
    assert chosen["narrow", "auto"].precision == "float32"
    assert chosen["wide", "auto"].precision == "bfloat16"
    long, short, auto = (
        chosen["wide", each].batch_losses for each in ("float32", "bfloat16", "auto")
    )
    assert auto[0] == long[0] != short[0], "the first batch is counted in float32"
    assert auto[1] != long[1]
    narrow = (chosen["narrow", each].batch_losses for each in ("float32", "auto"))
    assert len(set(map(tuple, narrow))) == 1
    again = fit(
        wide_network(), list(zip(*rows)), epochs=1, precision="auto", device="cpu"
    )
    assert again.batch_losses == auto, "repeats bit for bit"
    by_objective = fit(
        wide_network(),
        list(zip(*rows)),
        epochs=1,
        objective=MixedPrecision(supervised(cross_entropy), torch.bfloat16),
        device="cpu",
    )
    assert by_objective.batch_losses == short
    assert by_objective.precision == "bfloat16"


def test_auto_counts_nothing_where_there_are_no_short_products(monkeypatch):
    monkeypatch.setattr(objectives, "best_dtype", lambda device: torch.float32)
    monkeypatch.setattr(objectives, "_Work", None)  # using it would fail
    rows = torch.randn(1, 512, 4), torch.randint(3, (1, 512))
    history = fit(wide_network(), zip(*rows), epochs=1, precision="auto", device="cpu")
    assert history.precision == "float32"


def test_work_is_counted_as_torch_does():
    model, convolution = wide_network(), nn.Conv2d(1, 3, 3)
    x, image = torch.randn(7, 4), torch.randn(2, 1, 8, 8)
    work = objectives._Work()
    with FlopCounterMode(display=False) as counter:
        model(x), convolution(image)
    with work.of(model):
        model(x)
        wide_network()(x)  # another model is not counted
    with work.of(convolution):
        convolution(image)
    assert work.flops == counter.get_total_flops() > 0
    counted = work.operations  # views among them
    assert counted >= 5  # three products, one ReLU, one convolution
    assert work.elements == 7 * (3 * 1024 + 3) + 2 * 3 * 6 * 6
    assert work.parameters == 30, "of the last that was counted"
    model(x)
    assert work.operations == counted, "outside nothing is counted"


@given(st.one_of(st.text(), st.integers(), st.none(), st.just("float64")))
@settings(max_examples=30, deadline=None)
def test_a_precision_that_there_is_not_is_named(precision):
    assume(precision not in ("float32", "bfloat16", "float16", "auto"))
    said = f"precision is {precision!r}; allowed are 'float32', 'bfloat16', 'float16'"
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(network(), batches(), epochs=1, precision=precision)


def test_a_model_that_fails_while_it_is_counted_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(objectives, "best_dtype", lambda device: torch.bfloat16)
    model = nn.Linear(5, 3)  # the inputs have four features
    with pytest.raises(RuntimeError):
        fit(model, batches(), epochs=1, precision="auto", device="cpu")
    assert not model._forward_hooks and not model._forward_pre_hooks
    work = objectives._Work()
    torch.ones(2) + 1
    assert not work.operations


def test_mixed_precision_takes_the_type_of_the_device(monkeypatch):
    last = Seen(nn.Linear(4, 3))
    x, y = data()
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(objectives, "best_dtype", lambda device: dtype)
        MixedPrecision(supervised(cross_entropy))(last, x, y)
    assert last.types[1::2] == [torch.bfloat16, torch.float32]


def test_mappings_train():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, values=None, scale=None):
            return self.inner(values * scale)

    inputs, targets = data()
    train = [({"values": inputs, "scale": torch.ones(1)}, targets)] * 3
    history = fit(ByName(), train, train, epochs=2)
    assert (
        len(history.batch_losses) == 6 and history.frame["valid_accuracy"].notna().all()
    )


# --- evaluate and predict


def test_evaluate_weighs_examples_not_batches():
    model = network().eval()
    inputs, targets = data(50)
    result = evaluate(model, loader(inputs, targets, batch_size=16))
    assert result.loss == pytest.approx(
        F.cross_entropy(model(inputs), targets).item(), rel=1e-6
    )
    assert (
        result.accuracy.value
        == (model(inputs).argmax(1) == targets).double().mean().item()
        and result.accuracy.n == 50
    )


def test_predict_gives_logits_in_order():
    model = network(dropout=0.5)
    inputs, targets = data(50)
    logits = predict(model, loader(inputs, targets, batch_size=16))
    torch.testing.assert_close(logits, copy.deepcopy(model).eval()(inputs))
    assert not logits.requires_grad and torch.equal(
        logits, predict(model, list(inputs.split(16)))
    )


@pytest.mark.parametrize("function", [evaluate, predict])
def test_each_module_gets_its_mode_back_even_after_an_error(function):
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    function(model, batches())
    with pytest.raises(RuntimeError):
        function(model, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    assert [
        module.training for module in model.modules()
    ] == modes and torch.is_grad_enabled()
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    with pytest.raises(
        ValueError, match="loader gave no batch; allowed is at least one"
    ):
        function(model, [])


# --- what validation measures, and where something counts


def regression(rows=64):
    inputs = data(rows)[0]
    return inputs, inputs[:, :1] * 3 + 1


def test_validation_uses_the_objective_and_a_regression_has_no_accuracy():
    torch.manual_seed(0)
    model, (inputs, targets) = nn.Linear(4, 1), regression()
    valid = loader(inputs, targets, batch_size=10)
    history = fit(
        model,
        loader(inputs, targets),
        valid,
        epochs=2,
        objective=supervised(F.mse_loss),
        device="cpu",
    )
    expected = F.mse_loss(model(inputs), targets).item()
    assert (
        history.frame["valid_loss"].iloc[-1] == pytest.approx(expected, rel=1e-6)
        and expected > 0.1
    )
    assert history.frame["valid_accuracy"].isna().all()
    result = evaluate(model, valid, objective=supervised(F.mse_loss))
    assert result.loss == pytest.approx(expected, rel=1e-6) and result.accuracy is None


@pytest.mark.parametrize("shape", [(64, 1), (64,), (64, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_targets_that_are_no_classes_have_no_accuracy(shape, dtype):
    model = nn.Sequential(
        nn.Linear(4, 3 if shape[1:] == (3,) else 1),
        nn.Flatten(0) if len(shape) == 1 else nn.Identity(),
    )
    targets = torch.randint(0, 5, shape).to(dtype)
    objective = supervised(
        lambda output, target: F.mse_loss(output, target.to(output.dtype))
    )
    history = fit(
        model,
        loader(data(64)[0], targets),
        loader(data(64)[0], targets),
        epochs=1,
        objective=objective,
        device="cpu",
    )
    assert (
        history.frame["valid_accuracy"].isna().all()
        and history.frame["valid_loss"].iloc[0] > 0.1
    )


@pytest.mark.parametrize("function", ["fit", "evaluate"])
def test_one_column_of_logits_has_no_cross_entropy(function):
    (inputs, targets), model = regression(), nn.Linear(4, 1)
    for given_targets in (targets, torch.zeros(64, dtype=torch.long)):
        batches = loader(inputs, given_targets)
        with pytest.raises(
            ValueError,
            match=r"logits have shape \(64, 1\), one class, whose cross-entropy is"
            " always 0; allowed are two or more, or an objective ",
        ):
            fit(
                model, batches, epochs=1, device="cpu"
            ) if function == "fit" else evaluate(model, batches)


def test_soft_targets_have_a_loss_and_no_accuracy():
    model, (inputs, _) = network().eval(), data()
    soft = torch.rand(50, 3).softmax(1)
    result = evaluate(model, loader(inputs, soft, batch_size=16))
    assert result.accuracy is None and result.loss == pytest.approx(
        F.cross_entropy(model(inputs), soft).item(), rel=1e-6
    )


class Reads(nn.Module):
    """Logits (batch, class, time) that are sure of the class that the input names."""

    def __init__(self, classes=3):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.classes = classes

    def forward(self, x):
        return self.scale * F.one_hot(x, self.classes).float().movedim(-1, 1)


def test_padding_counts_nowhere():
    words = torch.tensor([[0, 1, 2, 2]])
    result = evaluate(Reads(), [(words, torch.tensor([[0, 1, -100, -100]]))])
    assert result.accuracy.value == 1 and result.accuracy.n == 2 and result.loss < 1e-6


@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_ragged_batches_count_by_target(seed, lengths):
    torch.manual_seed(seed)
    model, pairs = Reads(), []
    for length in lengths:
        x, y = torch.randint(0, 3, (2, length)), torch.randint(0, 3, (2, length))
        pairs.append((x, y.masked_fill(torch.rand(2, length) < 0.4, -100)))
    model.scale.data.fill_(2.0)
    kept = [(model(x).movedim(1, -1)[y != -100], y[y != -100]) for x, y in pairs]
    logits, targets = map(torch.cat, zip(*kept))
    if not len(targets):
        with pytest.raises(
            ValueError, match="loader has no target that counts: all are -100"
        ):
            evaluate(model, pairs)
        return
    result = evaluate(model, pairs)
    assert result.loss == pytest.approx(
        F.cross_entropy(logits, targets).item(), rel=1e-5, abs=1e-7
    )
    assert (
        result.accuracy.n == len(targets)
        and round(result.accuracy.value * len(targets))
        == (logits.argmax(1) == targets).sum()
    )
    if all(
        (y != -100).any() for _, y in pairs
    ):  # the mean of an epoch counts by target too; a rate of 0 keeps the model
        frame = fit(
            model,
            pairs,
            epochs=1,
            optimizer=torch.optim.SGD(model.parameters(), 0.0),
            device="cpu",
        ).frame
        assert frame["train_loss"][0] == pytest.approx(result.loss, rel=1e-5, abs=1e-7)


def test_another_index_can_mark_padding():
    words, targets = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 0, 0]])
    objective = supervised(
        lambda logits, target: F.cross_entropy(logits, target, ignore_index=0),
        ignore_index=0,
    )
    result = evaluate(Reads(), [(words, targets)], objective=objective)
    assert (result.accuracy.value, result.accuracy.n) == (1, 1) and result.loss < 1e-6


def test_a_batch_of_padding_alone_is_named_before_it_does_harm():
    model = Reads()
    full, empty = (
        (torch.tensor([[0, 1]]), torch.tensor([[0, 1]])),
        (torch.tensor([[0, 1]]), torch.tensor([[-100, -100]])),
    )
    with pytest.raises(
        ValueError,
        match=r"no target counts in epoch 1, batch 2 \(both counted from 1\): all are"
        " -100",
    ):
        fit(model, [full, empty], epochs=1, device="cpu")
    assert model.scale.isfinite() and evaluate(model, [full, empty]).accuracy.n == 2


class Noisy:
    """An objective with a state and random numbers of its own, and gradients inside."""

    calls = 0

    def __call__(self, model, input, target):
        self.calls += 1
        input = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            cross_entropy(forward(model, input), target), input
        )
        return cross_entropy(
            forward(
                model,
                input.detach() + 0.1 * gradient.sign() + 0.01 * torch.randn_like(input),
            ),
            target,
        )


def test_validation_by_an_objective_with_a_state_changes_nothing():
    ends, objectives = [network(dropout=0.5) for _ in range(2)], [Noisy(), Noisy()]
    for model, objective, valid in zip(ends, objectives, (None, batches())):
        torch.manual_seed(5)
        history = fit(
            model, batches(), valid, epochs=3, objective=objective, device="cpu"
        )
    assert same_weights(*ends) and objectives[0].calls == objectives[1].calls == 12
    clean = evaluate(ends[1], batches())
    assert (
        history.frame["valid_loss"].iloc[-1] > clean.loss + 0.01
    )  # it is the objective's, under its change
    assert (
        history.frame["valid_accuracy"].iloc[-1] == clean.accuracy.value
    )  # of the inputs as they are


def test_an_objective_says_what_is_measured_instead():
    objective = Noisy()
    objective.validation = supervised(cross_entropy)
    model, valid = network(), batches()
    assert (
        evaluate(model, valid, objective=objective) == evaluate(model, valid)
        and objective.calls == 0
    )
    assert (
        MixedPrecision(objective).validation is objective.validation
        and MixedPrecision(supervised(F.mse_loss)).validation.criterion is F.mse_loss
    )


def test_one_forward_pass_gives_loss_and_accuracy():
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    evaluate(model, batches(48), objective=MixedPrecision(supervised(cross_entropy)))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "objective",
    [
        lambda model, input, target: cross_entropy(
            model(input), target, reduction="none"
        ),
        lambda model, input, target: 1.0,
    ],
)
def test_an_objective_that_gives_no_scalar_is_refused_in_validation_too(objective):
    with pytest.raises(
        ValueError, match="objective gave a .*; allowed is a scalar tensor"
    ):
        evaluate(network(), batches(), objective=objective)


# --- gradients that are not finite


class Rooted(nn.Module):
    """Finite everywhere, with an infinite derivative at 0."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x).abs().sqrt())


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("row", [3, 40])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(max_norm, row):
    inputs, targets = data(50)
    inputs[row] = 0.0
    torch.manual_seed(0)
    model = Rooted()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    number = row // 16 + 1
    with pytest.raises(
        FloatingPointError,
        match="the gradient of 'first.weight' is not finite in epoch 1, batch"
        rf" {number} \(both counted from 1\), where the loss is [\d.]+, and the"
        " parameters and buffers are still those from before this batch",
    ) as caught:
        fit(
            model,
            loader(inputs, targets, batch_size=16),
            epochs=2,
            optimizer=optimizer,
            max_norm=max_norm,
            device="cpu",
        )
    assert (
        "max_norm" not in str(caught.value)
        and len(caught.value.history.batch_losses) == number - 1
    )
    good = [
        (inputs[i : i + 16], targets[i : i + 16])
        for i in range(0, 16 * (number - 1), 16)
    ]
    bare_loop(
        reference,
        good,
        1,
        torch.optim.SGD(reference.parameters(), 0.1),
        max_norm=max_norm,
    )
    for first, second in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(first, second)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_advice_names_nothing_that_is_done_already():
    inputs = data()[0]
    inputs[3] = math.nan
    for max_norm, advice in (
        (None, "lower the learning rate, set max_norm, or look"),
        (1.0, "lower the learning rate or look"),
    ):
        with pytest.raises(FloatingPointError, match=advice):
            fit(network(), loader(inputs, data()[1]), epochs=1, max_norm=max_norm)


def test_sparse_gradients_are_looked_at_too():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten())
    batch = [(torch.tensor([[0], [2]]), torch.tensor([0, 1]))]
    fit(
        model,
        batch,
        epochs=1,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        device="cpu",
    )
    with pytest.raises(
        FloatingPointError, match="the gradient of '0.weight' is not finite"
    ):
        fit(
            model,
            batch,
            epochs=1,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            device="cpu",
            objective=lambda model, input, target: (0 * model(input)).sqrt().sum(),
        )
    assert model[0].weight.isfinite().all()


def test_a_gradient_whose_length_overflows_is_named():
    model, batch = nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([0]))]
    with pytest.raises(
        FloatingPointError, match="the norm of the gradient is not finite"
    ):
        fit(
            model,
            batch,
            epochs=1,
            optimizer=torch.optim.SGD(model.parameters(), 1e-30),
            device="cpu",
            objective=lambda model, input, target: 1e30 * model(input).sum(),
        )


# --- what is refused


@pytest.mark.parametrize("at, row", [((1, 1), 3), ((1, 3), 40), ((1, 4), 49)])
def test_a_loss_that_is_no_number_ends_the_run_before_it_does_harm(at, row):
    inputs, targets = data(50)
    inputs[row] = math.nan
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(model.state_dict())
    with pytest.raises(
        FloatingPointError,
        match=rf"the loss is nan in epoch {at[0]}, batch {at[1]} \(both counted from"
        r" 1\)",
    ) as caught:
        fit(
            model,
            loader(inputs, targets, batch_size=16),
            epochs=2,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            objective=supervised(F.cross_entropy),
            device="cpu",
        )
    assert len(caught.value.history.batch_losses) == at[1] - 1 and "\n" not in str(
        caught.value
    )
    bare_loop(
        reference,
        [
            (inputs[i : i + 16], targets[i : i + 16])
            for i in range(0, 16 * (at[1] - 1), 16)
        ],
        1,
        torch.optim.SGD(reference.parameters(), 0.1),
    )
    assert same_weights(model, reference)


def test_a_diverging_run_names_its_epoch():
    model = nn.Linear(4, 1)
    with pytest.raises(
        FloatingPointError, match=r"the loss is (inf|nan) in epoch \d+, batch \d+"
    ):
        fit(
            model,
            loader(data()[0], data()[0][:, :1]),
            epochs=500,
            objective=supervised(F.mse_loss),
            optimizer=torch.optim.SGD(model.parameters(), 100.0),
        )


def other_scheduler():
    return torch.optim.lr_scheduler.ConstantLR(
        torch.optim.SGD(network().parameters(), 0.1)
    )


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(epochs=0), "epochs is 0; allowed is an integer of at least 1"),
        (dict(epochs=1.5), "epochs is 1.5; allowed"),
        (dict(epochs=True), "epochs is True; allowed"),
        (dict(max_norm=0.0), "max_norm is 0.0; allowed is a positive number or None"),
        (dict(max_norm=math.nan), "max_norm is nan; allowed"),
        (dict(train_loader=[]), "train_loader is empty; allowed is at least one batch"),
        (
            dict(train_loader=iter(())),
            "train_loader gave no batch; allowed is at least one",
        ),
        (dict(valid_loader=[]), "valid_loader is empty; allowed is at least one batch"),
        (
            dict(train_loader=[torch.zeros(2, 4)]),
            r"train_loader gives a batch of type Tensor; allowed are pairs \(input,"
            r" target\)",
        ),
        (
            dict(optimizer=torch.optim.SGD(network().parameters(), 0.1)),
            "optimizer holds no trainable parameter of model",
        ),
        (dict(scheduler=other_scheduler()), "scheduler belongs to another optimizer"),
        (
            dict(model=nn.ReLU()),
            "model has no parameter that requires a gradient; allowed is at least one",
        ),
        (
            dict(
                objective=lambda model, input, target: F.cross_entropy(
                    model(input), target, reduction="none"
                )
            ),
            r"objective gave a tensor of shape \(16,\); allowed is a scalar tensor",
        ),
        (
            dict(objective=lambda model, input, target: 1.0),
            "objective gave a float; allowed is a scalar tensor",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_a_sentence(options, sentence):
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=sentence):
        fit(**{"model": model, "train_loader": batches(), "epochs": 1} | options)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_a_scheduler_that_waits_for_a_metric_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        ValueError, match="scheduler is a ReduceLROnPlateau, which waits for a metric"
    ):
        fit(
            model,
            batches(),
            epochs=1,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        )


def test_a_generator_that_runs_dry_is_named():
    with pytest.raises(
        ValueError,
        match="train_loader gave no batch; allowed is at least one .a generator is"
        " empty after one epoch",
    ):
        fit(network(), iter(list(batches())), epochs=2)


# --- a refused batch leaves nothing behind


class Reassigns(nn.Module):
    """A mean in a buffer that is made anew each time, and a table that stays."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.seen = 0.9 * self.seen + 0.1 * x.mean(0)
        return x + 0 * self.table


@pytest.mark.parametrize(
    "first", [nn.BatchNorm1d(4), Reassigns()], ids=["in place", "made anew"]
)
@pytest.mark.parametrize("row", [3, 40])
def test_a_refused_loss_leaves_the_buffers_as_they_were(first, row):
    inputs, targets = data(50)
    model = nn.Sequential(copy.deepcopy(first), nn.Linear(4, 3))
    reference = copy.deepcopy(model)
    inputs[row, 2] = math.nan
    good = [
        (inputs[i : i + 16], targets[i : i + 16]) for i in range(0, row // 16 * 16, 16)
    ]
    with pytest.raises(
        FloatingPointError,
        match="the parameters and buffers are still those from before this batch",
    ):
        fit(
            model,
            loader(inputs, targets, batch_size=16),
            epochs=1,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            device="cpu",
        )
    if good:
        fit(
            reference,
            good,
            epochs=1,
            optimizer=torch.optim.SGD(reference.parameters(), 0.1),
            device="cpu",
        )
    assert same_weights(model, reference) and all(
        value.isfinite().all() for value in model.state_dict().values()
    )


def test_a_refused_gradient_leaves_the_buffers_as_they_were():
    inputs, targets = data(16)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = copy.deepcopy(model)
    with pytest.raises(
        FloatingPointError,
        match="the parameters and buffers are still those from before this batch",
    ):
        fit(
            model,
            [(inputs, targets)],
            epochs=1,
            device="cpu",
            objective=lambda model, input, target: (0 * model(input)).sqrt().sum(),
        )
    assert same_weights(model, before)


# --- targets that do not fit their loss, and losses given as objectives


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        nn.L1Loss(),
        lambda output, target: ((output - target) ** 2).mean(),
        lambda output, target: (target - output).abs().mean(),
    ],
    ids=["function", "module", "own", "own, the other way round"],
)
@pytest.mark.parametrize("function", ["fit", "evaluate", "call"])
@pytest.mark.parametrize("flat", ["target", "output"])
def test_targets_that_would_be_broadcast_are_refused(loss, function, flat):
    (inputs, targets), objective = regression(), supervised(loss)
    model = (
        nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        if flat == "output"
        else nn.Linear(4, 1)
    )
    targets = targets.flatten() if flat == "target" else targets
    shapes = (
        [r"\(64,\)", r"\(64, 1\)"] if flat == "target" else [r"\(64, 1\)", r"\(64,\)"]
    )
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError,
        match=f"target has shape {shapes[0]} and the model's output {shapes[1]}, which"
        " the loss would broadcast to .*; allowed is one shape for both",
    ) as caught:
        if function == "fit":
            fit(
                model,
                loader(inputs, targets),
                epochs=1,
                objective=objective,
                device="cpu",
            )
        elif function == "evaluate":
            evaluate(model, loader(inputs, targets), objective=objective)
        else:
            MixedPrecision(objective)(model, inputs, targets)
    assert same_weights(model, before) and "\n" not in str(caught.value)


def test_torchs_own_losses_broadcast_nothing_at_all():
    inputs, targets = regression()
    with pytest.raises(
        ValueError, match=r"target has shape \(64, 1\) and the model's output \(64, 3\)"
    ):
        evaluate(
            nn.Linear(4, 3), loader(inputs, targets), objective=supervised(F.mse_loss)
        )


@pytest.mark.parametrize(
    "columns, loss",
    [
        (
            1,
            lambda output, target: F.mse_loss(output.squeeze(1), target),
        ),  # fits them itself
        (1, lambda output, target: F.mse_loss(output, target[:, None])),
        (
            2,
            lambda output, target: F.gaussian_nll_loss(
                output[:, 0], target, output[:, 1].exp()
            ),
        ),  # a mean and a variance
        (
            3,
            lambda output, target: torch.maximum(
                output - target[:, None], 0.5 * (target[:, None] - output)
            ).mean(),
        ),  # quantiles
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_losses_that_fit_shapes_themselves_are_let_through(columns, loss, rows):
    inputs, targets = regression(rows)
    model = nn.Linear(4, columns)
    batches = [(inputs, targets.flatten())]
    expected = loss(model(inputs), targets.flatten()).item()
    assert evaluate(model, batches, objective=supervised(loss)).loss == pytest.approx(
        expected
    )
    assert fit(
        model, batches, epochs=1, objective=supervised(loss), device="cpu"
    ).batch_losses == [pytest.approx(expected)]


@given(
    st.integers(1, 20),
    st.integers(2, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_the_default_objective_takes_probabilities_and_no_other_numbers(
    rows, classes, dtype, per_pixel, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, classes, 3) if per_pixel else (rows, classes)
    model = nn.Unflatten(1, shape[1:])
    inputs = torch.randn(rows, math.prod(shape[1:]), generator=generator)
    soft = torch.randn(shape, generator=generator).softmax(1).to(dtype)
    assert evaluate(model, [(inputs, soft)]).accuracy is None
    for spoilt in (-soft, soft - soft.mean(1, keepdim=True), 2 * soft, soft * math.nan):
        with pytest.raises(
            ValueError,
            match="the targets are numbers and no probabilities; allowed are class"
            " indices, rows of at least 0 that sum to 1, or"
            r" an objective such as supervised\(torch.nn.functional.mse_loss\)",
        ):
            evaluate(model, [(inputs, spoilt.to(dtype))])


def test_numbers_of_another_shape_than_the_logits_name_the_objective_for_them():
    (inputs, targets), model = regression(), nn.Linear(4, 3)
    with pytest.raises(
        ValueError,
        match=r"the targets are numbers and no probabilities, of shape \(64, 1\)"
        r" beside logits \(64, 3\); allowed are class indices, .*mse_loss",
    ):
        fit(model, loader(inputs, targets), epochs=1, device="cpu")


class Callable3:
    def __call__(self, model, input, target, extra=None):
        return cross_entropy(model(input), target)


class Module3(nn.Module):
    def forward(self, model, input, target):
        return cross_entropy(model(input), target)


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        F.cross_entropy,
        cross_entropy,
        nn.CrossEntropyLoss(),
        F.huber_loss,
        lambda output, target: output.mean(),
        lambda output: output.mean(),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        "mse",
        3,
    ],
)
@pytest.mark.parametrize("function", ["fit", "evaluate", "MixedPrecision"])
def test_a_loss_given_as_objective_is_told_what_wraps_it(loss, function):
    with pytest.raises(
        ValueError,
        match=r"objective is .*; allowed is a callable of \(model, input, target\):"
        r" wrap a loss of \(output, target\) in supervised\(\.\.\.\)",
    ):
        if function == "fit":
            fit(network(), batches(), epochs=1, objective=loss)
        elif function == "evaluate":
            evaluate(network(), batches(), objective=loss)
        else:
            MixedPrecision(loss)


@pytest.mark.parametrize(
    "objective",
    [
        Callable3(),
        Module3(),
        Callable3().__call__,
        lambda *all: cross_entropy(all[0](all[1]), all[2]),
        lambda model, input, y, weight=1: cross_entropy(model(input), y),
        functools.partial(
            lambda scale, model, input, target: (
                scale * cross_entropy(model(input), target)
            ),
            2.0,
        ),
        functools.partial(
            lambda model, input, target, scale: (
                scale * cross_entropy(model(input), target)
            ),
            scale=2.0,
        ),
    ],
)
def test_callables_of_three_are_objectives(objective):
    assert (
        len(
            fit(
                network(), batches(), epochs=1, objective=objective, device="cpu"
            ).batch_losses
        )
        == 4
    )


# --- the bar, and advice


@pytest.mark.parametrize("end", ["whole", "stop", "interrupt", "nan"])
def test_no_bar_is_left_behind(monkeypatch, end):
    closed = []

    class Bar(loop.tqdm):
        def close(self):
            closed.append((self.n, self.total))
            super().close()

    def act(history):
        if len(history.batch_losses) == 3 and end == "interrupt":
            raise KeyboardInterrupt
        history.stop = end == "stop" and len(history.batch_losses) == 3

    inputs, targets = data(64)
    inputs[50 if end == "nan" else slice(0)] = math.nan
    monkeypatch.setattr(loop, "tqdm", Bar)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(
                network(),
                loader(inputs, targets, batch_size=16),
                epochs=2,
                callbacks=[SimpleNamespace(on_batch_end=act)],
            )
    except FloatingPointError:
        pass
    assert (
        closed[0]
        == {"whole": (8, 8), "stop": (3, 3), "interrupt": (3, 3), "nan": (3, 3)}[end]
    )


def test_a_gradient_that_is_not_finite_is_first_put_to_the_learning_rate():
    inputs, targets = data(16)
    with pytest.raises(
        FloatingPointError,
        match="before this batch; lower the learning rate if the losses before have"
        " grown, or look for a division, a root or a logarithm at 0, and at this batch",
    ):
        fit(
            network(),
            [(inputs, targets)],
            epochs=1,
            device="cpu",
            objective=lambda model, input, target: (0 * model(input)).sqrt().sum(),
        )


def test_the_lesson_stores_no_bar():
    notebook = json.loads(catalogue()["training/loop"].read_text(encoding="utf-8"))
    outputs = [
        output for cell in notebook["cells"] for output in cell.get("outputs", [])
    ]
    assert outputs and not [
        output
        for output in outputs
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]


# --- padding that the loss knows, hits of what is not a number, where classes are


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=0),
        functools.partial(F.cross_entropy, ignore_index=0),
        functools.partial(nn.CrossEntropyLoss(ignore_index=0)),
        lambda output, target, ignore_index=0: F.cross_entropy(
            output, target, ignore_index=ignore_index
        ),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_padding_of_a_loss_counts_nowhere(loss, mixed):
    words, targets = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 0, 0]])
    objective = MixedPrecision(supervised(loss)) if mixed else supervised(loss)
    result = evaluate(
        Reads(),
        [(words, targets), (words, torch.zeros_like(targets))],
        objective=objective,
    )
    assert (result.accuracy.value, result.accuracy.n) == (1, 1) and result.loss < 1e-6
    with pytest.raises(ValueError, match="loader has no target that counts: all are 0"):
        evaluate(Reads(), [(words, torch.zeros_like(targets))], objective=objective)
    with pytest.raises(
        ValueError,
        match=r"no target counts in epoch 1, batch 1 \(both counted from 1\): all are"
        " 0",
    ):
        fit(
            Reads(),
            [(words, torch.zeros_like(targets))],
            epochs=1,
            objective=objective,
            device="cpu",
        )


def test_an_index_that_is_given_wins_and_others_are_minus_100():
    assert (
        supervised(nn.CrossEntropyLoss(ignore_index=0), ignore_index=2).ignore_index
        == 2
    )
    without = SimpleNamespace(ignore_index=None)
    assert [
        supervised(each).ignore_index
        for each in (
            F.mse_loss,
            nn.MSELoss(),
            cross_entropy,
            nn.CrossEntropyLoss(),
            torch.dist,
            lambda a, b: a,
            max,
        )
    ] == [-100] * 7

    class Without:
        ignore_index = without.ignore_index
        __call__ = staticmethod(F.cross_entropy)

    assert supervised(Without()).ignore_index == -100


@pytest.mark.parametrize("objective", [None, Noisy()], ids=["criterion", "own"])
@pytest.mark.parametrize("rows, right", [(50, 0), (10, None)])
def test_rows_of_logits_that_are_no_numbers_are_no_hits(objective, rows, right):
    inputs = torch.eye(3).repeat(20, 1)[:50]
    model, targets = nn.Sequential(nn.Linear(3, 3)), inputs.argmax(1)
    model[0].weight.data, model[0].bias.data = 9 * torch.eye(3), torch.zeros(3)
    inputs = inputs.clone()
    inputs[:rows] = math.nan
    result = evaluate(model, [(inputs, targets)], objective=objective)
    assert math.isnan(result.loss) and result.accuracy.value == (50 - rows) / 50


class Words(nn.Module):
    """Logits (batch, time, class), sure of the class that the input names."""

    def forward(self, x):
        return 20 * F.one_hot(x, 3).float()


@pytest.mark.parametrize("own", [False, True])
def test_classes_in_the_last_dimension_are_taken_for_no_others(own):
    words = torch.tensor([[0, 1, 1], [2, 2, 0]])  # as many words as classes
    loss = lambda output, target: F.cross_entropy(output.transpose(1, 2), target)
    objective = (
        (lambda model, input, target: loss(model(input), target))
        if own
        else supervised(loss)
    )
    result = evaluate(Words(), [(words, words)], objective=objective)
    assert result.accuracy is None and result.loss < 1e-6
    for known in (
        None,
        supervised(nn.CrossEntropyLoss()),
        supervised(functools.partial(F.cross_entropy, label_smoothing=0.1)),
        supervised(cross_entropy),
    ):
        assert evaluate(Reads(), [(words, words)], objective=known).accuracy.value == 1


# --- inputs of any floating type, and whose they are

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def by_hand(model, input, target):
    output = model(**input) if isinstance(input, dict) else model(input)
    return F.cross_entropy(output.float(), target)


@given(
    st.recursive(
        st.sampled_from(
            [
                *FLOATS,
                torch.int64,
                torch.uint8,
                torch.bool,
                torch.complex64,
                3,
                "text",
                None,
            ]
        ),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            | st.builds(Pair, inner, inner)
        ),
    ),
    st.sampled_from([*FLOATS, torch.complex64, None]),
    st.booleans(),
)
def test_match_dtype_changes_floating_types_and_nothing_else(structure, own, copied):
    def each(change, of):
        if isinstance(of, dict):
            return {name: each(change, value) for name, value in of.items()}
        if isinstance(of, Pair):
            return Pair(*(each(change, value) for value in of))
        if isinstance(of, (list, tuple)):
            return type(of)(each(change, value) for value in of)
        return change(of)

    kinds = lambda of: of.dtype if isinstance(of, torch.Tensor) else of
    wanted = lambda kind: own if kind in FLOATS and own in FLOATS else kind
    made = each(
        lambda kind: (
            torch.ones(2, dtype=kind) if isinstance(kind, torch.dtype) else kind
        ),
        structure,
    )
    given_ = match_dtype(
        nn.Linear(1, 1, dtype=own) if own else nn.ReLU(), made, copy=copied
    )
    assert each(kinds, given_) == each(wanted, structure)
    before, after = [], []
    each(before.append, made), each(after.append, given_)
    for one, two in zip(before, after, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.to(two.dtype), two) and (two is one) == (
                not copied and one.dtype == two.dtype
            )


def test_match_dtype_keeps_a_type_that_the_model_holds():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    assert match_dtype(model, torch.ones(2)).dtype == torch.float32
    assert match_dtype(model, torch.ones(2).double()).dtype == torch.bfloat16


class Inside(nn.Module):
    def __init__(self, dtype=None, wrap=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.wrap = nn.Linear(4, 3, dtype=dtype), wrap

    def forward(self, x):
        return self.wrap(self.inside(x))


@pytest.mark.parametrize("named", [False, True], ids=["tensors", "mappings"])
@pytest.mark.parametrize(
    "objective",
    [None, supervised(F.cross_entropy), by_hand],
    ids=["default", "supervised", "by hand"],
)
@pytest.mark.parametrize("own", FLOATS)
@pytest.mark.parametrize("came", FLOATS)
def test_inputs_of_any_floating_type_are_taken(came, own, objective, named):
    model, (inputs, targets) = Inside(own), data(20)
    cast = inputs.to(came).to(own)
    lot = lambda x: [({"x": x} if named else x, targets)]
    reference = copy.deepcopy(model)
    assert torch.equal(
        predict(model, lot(inputs.to(came))), predict(reference, lot(cast))
    )
    assert evaluate(model, lot(inputs.to(came)), objective=objective) == evaluate(
        reference, lot(cast), objective=objective
    )
    for each, x in ((model, inputs.to(came)), (reference, cast)):
        fit(
            each,
            lot(x),
            lot(x),
            epochs=2,
            optimizer=torch.optim.SGD(each.parameters(), 0.1),
            objective=objective,
            device="cpu",
        )
    assert same_weights(model, reference)


@pytest.mark.parametrize("came", FLOATS)
def test_objectives_take_inputs_of_any_floating_type(came):
    (inputs, targets), model = data(20), Inside()
    plain = supervised(cross_entropy)
    assert plain(model, inputs.to(came), targets) == plain(
        model, inputs.to(came).float(), targets
    )
    for inner in (plain, by_hand):
        mixed = MixedPrecision(inner, torch.bfloat16)
        assert mixed(model, inputs.to(came), targets) == mixed(
            model, inputs.to(came).float(), targets
        )


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        F.huber_loss,
        F.smooth_l1_loss,
        F.cross_entropy,
        cross_entropy,
        F.binary_cross_entropy_with_logits,
    ],
)
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("came", FLOATS)
def test_targets_of_any_floating_type_are_taken(came, own, loss):
    """numpy's are float64: torch's Huber loss takes none beside float32 outputs."""
    model, (inputs, _) = (
        Inside(own),
        data(16),
    )  # a power of 2, which weighs a mean without rounding
    numbers = torch.rand(16, 3).softmax(1).to(came)
    want = loss(
        forward(model, inputs.to(own)),
        numbers.to(torch.promote_types(own, torch.float32)),
    )
    assert (
        evaluate(model, [(inputs, numbers)], objective=supervised(loss)).loss
        == want.item()
    )
    fit(model, [(inputs, numbers)], epochs=1, objective=supervised(loss), device="cpu")


class Overwrites(nn.Module):
    """Normalises in place, as many a model does with its input."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x, ids=None):
        if ids is not None:
            ids.clamp_(max=1)
        return self.last(F.relu(x.sub_(0.5).div_(2.0), inplace=True))


@pytest.mark.parametrize("objective", [None, by_hand], ids=["default", "by hand"])
@pytest.mark.parametrize("named", [False, True], ids=["tensors", "mappings"])
@pytest.mark.parametrize(
    "does",
    [
        lambda model, lot, objective: evaluate(model, lot, objective=objective),
        lambda model, lot, objective: predict(model, lot),
        lambda model, lot, objective: predict(model, [input for input, _ in lot]),
        lambda model, lot, objective: fit(
            model, lot, lot, epochs=2, objective=objective, device="cpu"
        ),
    ],
    ids=["evaluate", "predict", "predict inputs", "fit"],
)
def test_what_a_model_does_in_place_does_not_reach_the_callers_batches(
    does, named, objective
):
    inputs, targets = data(20)
    before, ids = inputs.clone(), torch.arange(5)
    lot = [({"x": inputs, "ids": ids}, targets)] if named else [(inputs, targets)]
    does(Overwrites(), lot, objective)
    assert torch.equal(inputs, before) and torch.equal(ids, torch.arange(5))


def test_hits_are_counted_on_the_inputs_as_they_came():
    (inputs, targets), model = data(200), Overwrites()
    assert evaluate(model, [(inputs, targets)], objective=by_hand) == evaluate(
        model, [(inputs.clone(), targets)], objective=supervised(F.cross_entropy)
    )


# --- models that give more than logits


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: UserDict(logits=logits),
        lambda logits: SimpleNamespace(logits=logits),
    ],
    ids=["dict", "mapping", "attribute"],
)
def test_logits_are_found_in_an_output_by_name(wrap):
    model, (inputs, targets) = Inside(wrap=wrap), data(20)
    assert torch.equal(predict(model, [inputs]), model.inside(inputs))
    assert evaluate(model, [(inputs, targets)]).loss == pytest.approx(
        F.cross_entropy(model.inside(inputs), targets).item()
    )
    fit(model, [(inputs, targets)], epochs=1, device="cpu")


OUTPUTS = {
    "tuple": (lambda logits: (logits, logits), "a tuple of 2"),
    "dict": (
        lambda logits: {"scores": logits, "mean": 0},
        "a dict with 'scores', 'mean'",
    ),
    "nothing": (lambda logits: {}, "a dict with nothing"),
    "none": (lambda logits: None, "a NoneType"),
    "no logits": (lambda logits: {"logits": None}, "a NoneType"),
}
LOSSES = {
    "torch's": F.cross_entropy,
    "ours": cross_entropy,
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "module": nn.CrossEntropyLoss(),
    "one's own": lambda output, target: 2 * F.cross_entropy(output, target),
    "of numbers": lambda output, target: (output - target).square().mean(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_an_output_without_logits_is_named(loss, kind):
    wrap, given_ = OUTPUTS[kind]
    objective = loss and supervised(LOSSES[loss])
    said = (
        f"^model gives {given_}, which {{}} does not take; allowed are logits: a"
        " tensor, or an output that holds one as 'logits'$"
    )
    with pytest.raises(ValueError, match=said.format("the loss")):
        evaluate(Inside(wrap=wrap), [data(20)], objective=objective)
    with pytest.raises(ValueError, match=said.format("the loss")):
        fit(
            Inside(wrap=wrap),
            [data(20)],
            epochs=1,
            objective=objective and MixedPrecision(objective),
            device="cpu",
        )
    with pytest.raises(ValueError, match=said.format("predict")):
        predict(Inside(wrap=wrap), [data(20)])


def test_a_loss_of_ones_own_may_read_what_it_likes():
    """As of a variational autoencoder: the output is a tuple, and its loss knows."""
    model, (inputs, _) = Inside(wrap=lambda logits: (logits, logits.mean())), data(20)
    for objective in (
        supervised(
            lambda output, target: (output[0] - target).square().mean() + output[1]
        ),
        lambda model, input, target: (
            (forward(model, input)[0] - target).square().mean()
        ),
    ):
        history = fit(
            model,
            [(inputs, inputs[:, :3])],
            [(inputs, inputs[:, :3])],
            epochs=1,
            objective=objective,
            device="cpu",
        )
        assert (
            math.isfinite(history.frame["valid_loss"][0])
            and evaluate(model, [(inputs, inputs[:, :3])], objective=objective).accuracy
            is None
        )


def test_what_fails_within_a_loss_of_ones_own_is_still_to_be_seen():
    def wrong(output, target):
        return output[0].mean() + target.of_the_encoder

    with pytest.raises(
        ValueError, match="a tuple of 2, which the loss does not take"
    ) as caught:
        evaluate(
            Inside(wrap=lambda logits: (logits, logits)),
            [data(20)],
            objective=supervised(wrong),
        )
    assert "of_the_encoder" in str(caught.value.__cause__)
    with pytest.raises(AttributeError, match="of_the_encoder"):
        evaluate(Inside(), [data(20)], objective=supervised(wrong))


# --- steps that ruin the parameters


def ruins(kind):
    """A first step that is not finite, though its gradient is: 0 / 0 if eps is 0."""
    torch.manual_seed(0)
    inputs, targets = data(32)
    inputs[:, 1] = 0
    model = nn.Linear(4, 3)
    if kind == "half":
        return model.half(), inputs.half(), targets, torch.optim.AdamW
    return model, inputs, targets, functools.partial(torch.optim.Adam, eps=0.0)


@pytest.mark.parametrize("kind", ["half", "eps of 0"])
def test_a_step_that_ruins_the_parameters_is_named_at_the_end_of_its_epoch(kind):
    model, inputs, targets, optimizer = ruins(kind)
    with pytest.raises(
        FloatingPointError,
        match="^parameter 'weight' is not finite after epoch 1, though each loss and"
        " gradient was; lower the learning rate, or raise the optimizer's eps",
    ) as caught:
        fit(
            model,
            [(inputs, targets)],
            [(inputs, targets)],
            epochs=3,
            optimizer=optimizer(model.parameters(), 1e-3),
            device="cpu",
        )
    history = caught.value.history
    assert (
        len(history.batch_losses) == 1
        and not history.rows
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize("kind", ["half", "eps of 0"])
def test_the_batch_after_a_ruinous_step_is_not_blamed(kind):
    model, inputs, targets, optimizer = ruins(kind)
    with pytest.raises(
        FloatingPointError,
        match=r"^the loss is nan in epoch 1, batch 2 \(both counted from 1\), and"
        " parameter 'weight' was not finite before this batch; lower the learning"
        " rate, or",
    ) as caught:
        fit(
            model,
            [(inputs[:16], targets[:16]), (inputs[16:], targets[16:])],
            epochs=1,
            optimizer=optimizer(model.parameters(), 1e-3),
            device="cpu",
        )
    assert len(caught.value.history.batch_losses) == 1


def test_a_ruined_parameter_is_named_beside_its_gradient():
    """A finite loss, 1 / exp(bias) of an infinite bias, whose gradient is nan."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias[0] = math.inf
    objective = lambda model, input, target: (
        F.cross_entropy(input @ model.weight.T, target) + (1 / model.bias.exp()).sum()
    )
    with pytest.raises(
        FloatingPointError,
        match="^the gradient of 'bias' is not finite in epoch 1, batch 1 .*, where"
        " the loss is .*, and parameter 'bias' was not finite before this batch",
    ):
        fit(model, [data(16)], epochs=1, objective=objective, device="cpu")


def test_a_model_that_came_ruined_is_named():
    model = network()
    with torch.no_grad():
        model[4].bias[1] = math.nan
    with pytest.raises(
        FloatingPointError,
        match=r"batch 1 \(both counted from 1\), and parameter '4.bias' was not finite"
        " before this batch",
    ):
        fit(model, batches(), epochs=1)


def test_parameters_that_are_not_trained_and_long_ones_are_no_ruin():
    model = network()
    model.register_parameter(
        "mask", nn.Parameter(torch.tensor([-math.inf, 0.0]), requires_grad=False)
    )
    model.register_parameter("long", nn.Parameter(torch.full((4,), 3e38)))
    assert len(fit(model, batches(), epochs=2, device="cpu").rows) == 2


def test_a_run_that_a_callback_ends_is_looked_at_too():
    model, inputs, targets, optimizer = ruins("eps of 0")
    with pytest.raises(
        FloatingPointError, match="parameter 'weight' is not finite after epoch 1"
    ):
        fit(
            model,
            [(inputs, targets)] * 2,
            epochs=1,
            optimizer=optimizer(model.parameters()),
            callbacks=[stopper(1)],
            device="cpu",
        )


def expect_loop(m):
    assert m["plane_error"] < 0.01, "a small step lowers the loss as its plane does"
    weights = m["finite_weights"]
    assert weights["plain loop"] == 0, "one pixel that is nan ruins a plain loop"
    assert weights["careful step"] == 1, "a check before the step keeps the weights"
    assert weights["fit"][:2] == [1, 1], "fit checks the loss and the gradient"
    assert weights["fit"][2] < 1, "a finite gradient can end in a step that is not"
    assert m["test_accuracy"]["value"] > 0.95, "the loop trains a net"
    assert m["overfitting"] > 1.2, (
        "validation loss rises where training goes on too long"
    )
    assert m["log_ratio_of_losses"]["low"] > 0, (
        "over seeds, the last epoch has a higher test loss than the early stop"
    )
    assert m["overconfidence"]["low"] > 0, (
        "over seeds, the last epoch is more confident than accurate"
    )
    assert m["right_ends_lowest"], "the right run ends below three with one mistake"
    assert m["stopped"] == ["too high"], "a learning rate too high is stopped"
    assert m["error_of_mean_of_means"] > 0.25, "a mean of means is another gradient"
    assert m["accumulated_difference"] < 1e-6, "accumulation is the large batch"
    assert m["early_stop_as_by_hand"], "patience and keep do what is done by hand"
    assert m["log_ratio_of_averaging"]["high"] < 0, (
        "over seeds, at a high rate the average has a lower test loss"
    )
    assert m["libraries"]["fit"] == 0, "fit ends where the ten lines end"
    assert all(apart < 1e-5 for apart in m["libraries"].values()), (
        "transformers and Lightning take the same steps"
    )
    assert m["repeats_bit_for_bit"], "a seed repeats a run bit for bit"
    assert m["same_as_tutorial_loop"], "fit does what the ten lines of a tutorial do"
