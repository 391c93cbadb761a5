"""Chapter 4: the loop."""
import copy
import math
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.data.sources import loader
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.training import loop
from bigmodel_nb.training.loop import History, LiveCurve, MixedPrecision, draw_history, evaluate, fit, forward, move, predict, supervised


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
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


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

@given(st.integers(1, 40), st.integers(1, 17), st.integers(1, 3), st.sampled_from([None, 0.1, 100.0]), st.sampled_from(["sgd", "adamw"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_equals_a_bare_loop_bit_for_bit(rows, batch_size, epochs, max_norm, name, scheduled):
    ends, losses = [], []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) if name == "sgd" else torch.optim.AdamW(model.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) if scheduled else None
        train = batches(rows, batch_size, shuffle=True)
        if ours:
            history = fit(model, train, batches(10), epochs=epochs, optimizer=optimizer, scheduler=scheduler, max_norm=max_norm,
                          objective=supervised(F.cross_entropy), device="cpu")
            losses.append(history.batch_losses)
        else:
            losses.append(bare_loop(model, train, epochs, optimizer, scheduler, max_norm))
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
    fit(second, batches(), epochs=2, device="cpu", objective=supervised(cross_entropy), optimizer=torch.optim.AdamW(second.parameters(), lr=1e-3))
    assert same_weights(first, second)


def test_learns():
    model = network()
    history = fit(model, batches(200, shuffle=True), batches(200), epochs=20, optimizer=torch.optim.AdamW(model.parameters(), 0.02))
    assert history.frame["valid_accuracy"].iloc[-1] > 0.9 and history.frame["train_loss"].iloc[-1] < 0.5 * history.frame["train_loss"].iloc[0]


def test_frozen_parameters_stay():
    model = network()
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(False)
    fit(model, batches(), epochs=1, device="cpu")
    assert torch.equal(before, model[0].weight)


# --- history and callbacks

def test_history_has_a_row_an_epoch_and_a_loss_a_batch():
    history = fit(network(), batches(50, 16), batches(), epochs=3)
    assert list(history.frame.columns) == ["epoch", "train_loss", "valid_loss", "valid_accuracy", "seconds"]
    assert history.frame["epoch"].tolist() == [1, 2, 3] and len(history.batch_losses) == 12
    weighted = sum(loss * size for loss, size in zip(history.batch_losses[:4], (16, 16, 16, 2))) / 50
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
    assert frame[["valid_loss", "valid_accuracy"]].isna().all().all() and len(History().frame) == 0


def test_callbacks_are_called_in_time():
    calls = []
    both = SimpleNamespace(on_batch_end=lambda history: calls.append(len(history.batch_losses)), on_epoch_end=lambda history: calls.append(-len(history.rows)))
    only = SimpleNamespace(on_epoch_end=lambda history: calls.append("end"))
    fit(network(), batches(32, 16), epochs=2, callbacks=iter([both, only, object()]))
    assert calls == [1, 2, -1, "end", 3, 4, -2, "end"]


def stopper(after):
    def on_batch_end(history):
        history.stop = len(history.batch_losses) >= after
    return SimpleNamespace(on_batch_end=on_batch_end)


def test_a_callback_can_stop_the_run():
    history = fit(network(), batches(50, 16), batches(), epochs=9, callbacks=[stopper(6)])
    assert (len(history.batch_losses), len(history.rows)) == (6, 2) and "stopped by a callback" in repr(history)


def test_ctrl_c_keeps_the_history_and_the_weights():
    def interrupt(history):
        if len(history.batch_losses) == 6:
            raise KeyboardInterrupt
    model, reference = network(), network()
    with pytest.warns(UserWarning, match="fit was interrupted in epoch 2 of 5; the model keeps the weights it has"):
        history = fit(model, batches(50, 16), epochs=5, device="cpu", callbacks=[SimpleNamespace(on_batch_end=interrupt)])
    assert history.interrupted and (len(history.rows), len(history.batch_losses)) == (1, 6) and repr(history).endswith("interrupted)")
    fit(reference, batches(50, 16), epochs=5, device="cpu", callbacks=[stopper(6)])
    assert same_weights(model, reference)


def test_live_curve_redraws_one_picture_a_run(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda picture: shown.append(("update", picture)))
    monkeypatch.setattr(loop, "display", lambda picture, display_id: shown.append(("display", picture)) or handle)
    curve = LiveCurve(every=2)
    fit(network(), batches(), batches(), epochs=2, callbacks=[curve])
    assert shown == []  # no notebook, no picture
    monkeypatch.setattr(loop, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    for _ in range(2):
        fit(network(), batches(), batches(), epochs=5, callbacks=[curve])
    assert [kind for kind, _ in shown] == ["display", "update"] * 2
    assert "Loss by epoch; after 4 epochs" in shown[1][1].metadata["alt"] and shown[0][1].data[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="every is 0; allowed is an integer of at least 1"):
        LiveCurve(0)


def test_an_empty_history_has_no_picture():
    with pytest.raises(ValueError, match="history has no epoch; allowed is one of at least one epoch"):
        draw_history(History())


# --- forward, move, objectives

def test_forward_passes_mappings_by_keyword_and_takes_logits():
    model = nn.Linear(4, 3)
    named = lambda mask=None, inputs=None: SimpleNamespace(logits=model(inputs) * mask)
    inputs = torch.randn(2, 4)
    assert torch.equal(forward(model, inputs), model(inputs))
    assert torch.equal(forward(named, UserDict(inputs=inputs, mask=0.5)), model(inputs) * 0.5)


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize("dtype, found", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_logits_of_16_bits_come_back_in_32(dtype, found):
    model, x = nn.Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype)
    assert forward(model, x).dtype == found and torch.equal(forward(model, x), model(x).to(found))
    assert forward(lambda x: "no tensor", x) == "no tensor"


@given(st.recursive(st.sampled_from(["tensor", 3, "text", None]),
                    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.builds(Pair, inner, inner)))
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

    moved = move(with_tensors(structure, "cpu"), "meta")
    assert devices(moved) == devices(with_tensors(structure, "meta"))


def test_any_loss_makes_an_objective():
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 1), data()[0]
    history = fit(model, loader(inputs, inputs[:, :1] * 3), epochs=200, objective=supervised(F.mse_loss), optimizer=torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    assert history.batch_losses[-1] < 1e-4 and model.weight[0, 0].item() == pytest.approx(3, abs=0.05)


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
    model, x, y = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), last), scale * torch.randn(20, 4), torch.randint(3, (20,))
    losses, slopes = [], []
    for objective in (supervised(cross_entropy), MixedPrecision(supervised(cross_entropy), torch.bfloat16)):
        model.zero_grad()
        losses.append(objective(model, x, y))
        losses[-1].backward()
        slopes.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert last.types == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert losses[1].dtype == slopes[1].dtype == torch.float32 and not torch.equal(*losses)
    assert abs(losses[0] - losses[1]) < 0.02 * (1 + losses[0].abs()) and (slopes[0] - slopes[1]).norm() < 0.05 * slopes[0].norm()
    assert not torch.is_autocast_enabled("cpu")


def test_mixed_precision_changes_nothing_else():
    objective = supervised(cross_entropy)
    objective.units = 7
    long = MixedPrecision(objective, torch.float32)
    model, (x, y) = network().eval(), data()
    assert torch.equal(long(model, x, y), objective(model, x, y)) and long.units == 7 and MixedPrecision(supervised(cross_entropy)).units == 3
    class Counting:
        calls = 0

        def __call__(self, model, input, target):
            self.calls += 1
            return objective(model, input, target)

    first = MixedPrecision(Counting())
    second = copy.deepcopy(first)
    second(model, x, y)
    assert (first.objective.calls, second.objective.calls) == (0, 1)  # a copy has a state of its own, as `cost_meter` needs it
    plain, mixed = (fit(network(), batches(), epochs=5, objective=each, device="cpu").frame["train_loss"].tolist() for each in (None, MixedPrecision(supervised(cross_entropy), torch.bfloat16)))
    assert mixed == pytest.approx(plain, rel=0.01) and mixed != plain and mixed[-1] < mixed[0]
    with pytest.raises(ValueError, match="dtype is torch.float16; allowed are torch.bfloat16, torch.float32 and None"):
        MixedPrecision(objective, torch.float16)


def test_mixed_precision_takes_the_type_of_the_device(monkeypatch):
    last = Seen(nn.Linear(4, 3))
    x, y = data()
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(loop, "best_dtype", lambda device: dtype)
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
    assert len(history.batch_losses) == 6 and history.frame["valid_accuracy"].notna().all()


# --- evaluate and predict

def test_evaluate_weighs_examples_not_batches():
    model = network().eval()
    inputs, targets = data(50)
    result = evaluate(model, loader(inputs, targets, batch_size=16))
    assert result.loss == pytest.approx(F.cross_entropy(model(inputs), targets).item(), rel=1e-6)
    assert result.accuracy.value == (model(inputs).argmax(1) == targets).double().mean().item() and result.accuracy.n == 50


def test_predict_gives_logits_in_order():
    model = network(dropout=0.5)
    inputs, targets = data(50)
    logits = predict(model, loader(inputs, targets, batch_size=16))
    torch.testing.assert_close(logits, copy.deepcopy(model).eval()(inputs))
    assert not logits.requires_grad and torch.equal(logits, predict(model, list(inputs.split(16))))


@pytest.mark.parametrize("function", [evaluate, predict])
def test_each_module_gets_its_mode_back_even_after_an_error(function):
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    function(model, batches())
    with pytest.raises(RuntimeError):
        function(model, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="loader gave no batch; allowed is at least one"):
        function(model, [])


# --- what is refused

@pytest.mark.parametrize("at, row", [((1, 1), 3), ((1, 3), 40), ((1, 4), 49)])
def test_a_loss_that_is_no_number_ends_the_run_before_it_does_harm(at, row):
    inputs, targets = data(50)
    inputs[row] = math.nan
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(model.state_dict())
    with pytest.raises(FloatingPointError, match=rf"the loss is nan in epoch {at[0]}, batch {at[1]} \(both counted from 1\)") as caught:
        fit(model, loader(inputs, targets, batch_size=16), epochs=2, optimizer=torch.optim.SGD(model.parameters(), 0.1),
            objective=supervised(F.cross_entropy), device="cpu")
    assert len(caught.value.history.batch_losses) == at[1] - 1 and "\n" not in str(caught.value)
    bare_loop(reference, [(inputs[i:i + 16], targets[i:i + 16]) for i in range(0, 16 * (at[1] - 1), 16)], 1, torch.optim.SGD(reference.parameters(), 0.1))
    assert same_weights(model, reference)


def test_a_diverging_run_names_its_epoch():
    model = nn.Linear(4, 1)
    with pytest.raises(FloatingPointError, match=r"the loss is (inf|nan) in epoch \d+, batch \d+"):
        fit(model, loader(data()[0], data()[0][:, :1]), epochs=500, objective=supervised(F.mse_loss), optimizer=torch.optim.SGD(model.parameters(), 100.0))


def other_scheduler():
    return torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(network().parameters(), 0.1))


@pytest.mark.parametrize("options, sentence", [
    (dict(epochs=0), "epochs is 0; allowed is an integer of at least 1"),
    (dict(epochs=1.5), "epochs is 1.5; allowed"),
    (dict(epochs=True), "epochs is True; allowed"),
    (dict(max_norm=0.0), "max_norm is 0.0; allowed is a positive number or None"),
    (dict(max_norm=math.nan), "max_norm is nan; allowed"),
    (dict(train_loader=[]), "train_loader is empty; allowed is at least one batch"),
    (dict(train_loader=iter(())), "train_loader gave no batch; allowed is at least one"),
    (dict(valid_loader=[]), "valid_loader is empty; allowed is at least one batch"),
    (dict(train_loader=[torch.zeros(2, 4)]), r"train_loader gives a batch of type Tensor; allowed are pairs \(input, target\)"),
    (dict(optimizer=torch.optim.SGD(network().parameters(), 0.1)), "optimizer holds no trainable parameter of model"),
    (dict(scheduler=other_scheduler()), "scheduler belongs to another optimizer"),
    (dict(model=nn.ReLU()), "model has no parameter that requires a gradient; allowed is at least one"),
    (dict(objective=lambda model, input, target: F.cross_entropy(model(input), target, reduction="none")), r"objective gave a tensor of shape \(16,\); allowed is a scalar tensor"),
    (dict(objective=lambda model, input, target: 1.0), "objective gave a float; allowed is a scalar tensor"),
])
def test_arguments_that_cannot_work_are_refused_in_a_sentence(options, sentence):
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=sentence):
        fit(**{"model": model, "train_loader": batches(), "epochs": 1} | options)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_a_scheduler_that_waits_for_a_metric_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="scheduler is a ReduceLROnPlateau, which waits for a metric"):
        fit(model, batches(), epochs=1, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_a_generator_that_runs_dry_is_named():
    with pytest.raises(ValueError, match="train_loader gave no batch; allowed is at least one .a generator is empty after one epoch"):
        fit(network(), iter(list(batches())), epochs=2)
