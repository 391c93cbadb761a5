"""Chapter 4: what is minimised, and how it is measured."""

import copy
import json
import math
import re
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.training import objective
from bigmodel_nb.training.objective import (
    Evaluation,
    MixedPrecision,
    check_metrics,
    evaluate,
    supervised,
)

CLASSES = 4


def macro_f1(outputs, targets):
    return f1_score(targets, outputs.argmax(1), average="macro")


def ragged(seed, sizes=((3, 5), (1, 2), (6, 3)), padding=0.3, dtype=torch.float64):
    """Batches of logits (row, class, place) and class indices, some of them padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, places in sizes:
        logits = torch.randn(rows, CLASSES, places, generator=generator, dtype=dtype)
        target = torch.randint(CLASSES, (rows, places), generator=generator)
        hidden = torch.rand(rows, places, generator=generator) < padding
        hidden[0, 0] = False
        batches.append((logits, target.masked_fill(hidden, -100)))
    return batches


def that_count(batches):
    """All logits (target, class) and targets (target,) that count, by hand."""
    logits = torch.cat([z.movedim(1, -1).reshape(-1, CLASSES) for z, _ in batches])
    targets = torch.cat([target.flatten() for _, target in batches])
    return logits[targets != -100], targets[targets != -100]


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1)


@given(st.integers(0, 2**31), shapes)
@settings(max_examples=40, deadline=None)
def test_metrics_are_those_of_all_that_counts(seed, sizes):
    batches = ragged(seed, sizes)
    logits, targets = that_count(batches)
    calls = []

    def seen(outputs, truths):
        calls.append((outputs, truths))
        return 0

    found = evaluate(nn.Identity(), batches, metrics={"f1": macro_f1, "seen": seen})
    assert found.metrics == {"f1": macro_f1(logits, targets), "seen": 0.0}
    assert len(calls) == 1, "a metric is called once"
    assert torch.equal(calls[0][0], logits) and torch.equal(calls[0][1], targets)
    assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item(), 1e-12)
    assert (found.accuracy.value, found.accuracy.n) == (
        (logits.argmax(1) == targets).double().mean().item(),
        len(targets),
    )


def test_a_mean_of_batches_would_be_caught():
    batches = ragged(0)
    parts = [macro_f1(*that_count([batch])) for batch in batches]
    whole = evaluate(nn.Identity(), batches, metrics={"f1": macro_f1}).metrics["f1"]
    assert abs(np.mean(parts) - whole) > 0.05
    weights = [int((target != -100).sum()) for _, target in batches]
    assert abs(np.average(parts, weights=weights) - whole) > 1e-3, "weighed or not"


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_outputs_that_are_no_classes_are_concatenated(shape):
    torch.manual_seed(0)
    batches = [(torch.randn(n, *shape), torch.randn(n, *shape)) for n in (4, 1, 2)]
    inputs, targets = (torch.cat(each) for each in zip(*batches))
    kept = {}
    found = evaluate(
        nn.Identity(),
        batches,
        objective=supervised(F.mse_loss),
        metrics={
            "absolute": lambda a, b: (a - b).abs().mean(),
            "kept": lambda a, b: kept.update(outputs=a, targets=b) or 1,
        },
    )
    assert torch.equal(kept["outputs"], inputs)
    assert torch.equal(kept["targets"], targets)
    assert found.metrics["absolute"] == (inputs - targets).abs().mean().item()
    assert found.accuracy is None


def test_probabilities_as_targets_reach_a_metric():
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3), torch.rand(n, 3).softmax(1)) for n in (4, 2)]
    outputs, targets = (torch.cat(each) for each in zip(*batches))
    agree = lambda a, b: (a.argmax(1) == b.argmax(1)).double().mean()
    found = evaluate(nn.Identity(), batches, metrics={"agree": agree})
    assert found.metrics == {"agree": agree(outputs, targets).item()}


def test_an_objective_of_ones_own_has_metrics_too():
    passes = []
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda *_: passes.append(1))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    of_twice = lambda model, input, target: F.mse_loss(model(2 * input), target)
    error = lambda outputs, targets: F.mse_loss(outputs, targets)
    found = evaluate(model, [(x, y)], objective=of_twice, metrics={"error": error})
    assert found.loss == pytest.approx(F.mse_loss(model(2 * x), y).item())
    assert found.metrics["error"] == pytest.approx(F.mse_loss(model(x), y).item())
    passes.clear()
    evaluate(model, [(x, y)], objective=of_twice)
    assert len(passes) == 1, "without metrics no pass is added"


def test_classes_in_the_last_dimension_are_concatenated_as_they_are():
    """Where either dimension could hold the classes, nothing is guessed."""
    batches = [(torch.randn(n, 3, 3), torch.randint(3, (n, 3))) for n in (2, 4)]
    last = lambda z, target: F.cross_entropy(z.flatten(0, 1), target.flatten())
    shape = {}
    note = lambda a, b: shape.update(outputs=a.shape, targets=b.shape) or 0
    evaluate(
        nn.Identity(), batches, objective=supervised(last), metrics={"shape": note}
    )
    assert shape == {"outputs": (6, 3, 3), "targets": (6, 3)}
    evaluate(nn.Identity(), batches, metrics={"shape": note})
    assert shape == {"outputs": (18, 3), "targets": (18,)}


def test_another_index_of_padding_is_left_out():
    logits, target = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    measured = supervised(nn.CrossEntropyLoss(ignore_index=0))
    count = {"count": lambda outputs, targets: len(targets)}
    found = evaluate(nn.Identity(), [(logits, target)], None, measured, count)
    assert found.metrics == {"count": 4.0} and found.accuracy.n == 4


@pytest.mark.parametrize(
    "number", [1, 1.0, True, np.float32(1), np.ones(()), torch.ones(()), torch.ones(1)]
)
def test_numbers_of_all_kinds_become_floats(number):
    found = evaluate(
        nn.Identity(), ragged(0), metrics={"one": lambda outputs, targets: number}
    )
    assert found.metrics == {"one": 1.0} and type(found.metrics["one"]) is float


@given(
    st.one_of(
        st.none(),
        st.text(),
        st.lists(st.floats()),
        st.complex_numbers(),
        st.just(np.ones(3)),
        st.just(torch.ones(2, 2)),
    )
)
@settings(max_examples=30, deadline=None)
def test_a_metric_that_gives_no_number_is_named(value):
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    said = f"metric 'odd' gives a {type(value).__name__}{shape}; allowed is a number"
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        evaluate(nn.Identity(), ragged(0), metrics={"odd": lambda *_: value})


@pytest.mark.parametrize(
    "metrics, said",
    [
        ({"loss": macro_f1}, "metric 'loss' has the name of what is always measured"),
        ({"accuracy": macro_f1}, "metric 'accuracy' has the name"),
        ([macro_f1], "metrics is a list; allowed is a mapping of names to callables"),
        (macro_f1, "metrics is a function; allowed is a mapping"),
        ({"f1": 0.5}, "metrics holds 'f1' and a float; allowed is a mapping"),
        ({1: macro_f1}, "metrics holds 1 and a function; allowed is a mapping"),
    ],
)
def test_metrics_that_cannot_be_meant_are_refused_before_anything_runs(metrics, said):
    never = nn.Identity()
    never.register_forward_hook(lambda *_: pytest.fail("nothing may run"))
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate(never, ragged(0), metrics=metrics)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_metrics(metrics)


def test_no_metrics_are_none():
    assert check_metrics(None) == check_metrics({}) == {}
    assert evaluate(nn.Identity(), ragged(0)).metrics == {}
    assert Evaluation(1.0, None) == Evaluation(1.0, None, {})
    assert hash(Evaluation(1.0, None)) == hash(Evaluation(1.0, None, {"f1": 0.5}))


def test_outputs_that_do_not_concatenate_name_the_metric():
    batches = [(torch.randn(2, n), torch.randn(2, n)) for n in (3, 4)]
    said = (
        "metrics 'error' cannot be taken, for the batches do not concatenate: outputs"
        " and targets are a Tensor of shape (2, 3), a Tensor of shape (2, 4); allowed"
        " are tensors that differ in their first dimension alone"
    )
    measured = supervised(F.mse_loss)
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate(nn.Identity(), batches, None, measured, {"error": F.mse_loss})

    Pair = namedtuple("Pair", "first second")
    two = nn.Module()
    two.forward = lambda input: Pair(input, input)
    own = supervised(lambda output, target: F.mse_loss(output.first, target))
    with pytest.raises(ValueError, match="outputs and targets are a Pair, a Tensor"):
        evaluate(two, batches[:1], None, own, {"error": F.mse_loss})


def test_an_error_within_a_metric_says_in_which():
    def fails(outputs, targets):
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own") as caught:
        evaluate(nn.Identity(), ragged(0), metrics={"odd": fails})
    assert caught.value.__notes__ == ["raised by the metric 'odd'"]


def test_what_is_kept_is_a_copy():
    """A model that writes its outputs into one memory spoils no metric."""

    class Reuses(nn.Module):
        memory = torch.zeros(2, 1)

        def forward(self, input):
            return self.memory.copy_(input)

    batches = [(torch.full((2, 1), float(n)), torch.zeros(2, 1)) for n in (1, 2, 3)]
    mean = {"mean": lambda outputs, targets: outputs.mean()}
    found = evaluate(Reuses(), batches, None, supervised(F.mse_loss), mean)
    assert found.metrics == {"mean": 2.0}


# MixedPrecision


def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 1024), nn.ReLU(), nn.Linear(1024, 1024))


def narrow(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("make, name", [(wide, "bfloat16"), (narrow, "float32")])
def test_what_auto_has_chosen_outlives_the_run(make, name, monkeypatch):
    monkeypatch.setattr(objective, "best_dtype", lambda device: torch.bfloat16)
    model, x, y = make(), torch.randn(512, 4), torch.randint(3, (512,))
    first = MixedPrecision(supervised(F.cross_entropy), "auto")
    assert first.state_dict() == {"chosen": None}
    losses = [first(model, x, y).item() for _ in range(2)]
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"chosen": name}
    monkeypatch.setattr(objective, "_Work", None)  # counting again would fail
    resumed = MixedPrecision(supervised(F.cross_entropy), "auto")
    resumed.load_state_dict(state)
    assert resumed(model, x, y).item() == losses[1]
    assert str(resumed.used) == f"torch.{name}"
    assert (losses[0] != losses[1]) == (name == "bfloat16"), "first in float32"
    resumed.load_state_dict({"chosen": None})
    with pytest.raises(TypeError, match="NoneType"):  # it counts again
        resumed(model, x, y)


def test_a_state_that_does_not_fit_is_refused():
    auto = MixedPrecision(supervised(F.cross_entropy), "auto")
    for state in ({}, {"chosen": "float64"}, {"chosen": torch.bfloat16}, None, "auto"):
        with pytest.raises(ValueError, match="allowed is what state_dict gives"):
            auto.load_state_dict(state)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        fixed = MixedPrecision(supervised(F.cross_entropy), dtype)
        assert fixed.state_dict() == {"chosen": None}
        fixed.load_state_dict({"chosen": None})
        with pytest.raises(
            ValueError, match="state holds 'bfloat16', chosen by 'auto'"
        ):
            fixed.load_state_dict({"chosen": "bfloat16"})
        assert fixed._chosen == dtype


def test_the_state_of_the_objective_within_is_kept():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(()))

        def forward(self, model, input, target):
            return self.weight * F.cross_entropy(model(input), target)

    first, second = (MixedPrecision(Weighed(), torch.bfloat16) for _ in range(2))
    assert first.objective.weight != second.objective.weight
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.objective.weight == second.objective.weight


def test_float16_shortens_the_products_alone():
    model, x, y = narrow(), torch.randn(64, 4), torch.randint(3, (64,))
    types, gradients, losses = [], [], []
    model.register_forward_hook(lambda *each: types.append(each[2].dtype))
    for dtype in (torch.float32, torch.float16):
        short = MixedPrecision(supervised(F.cross_entropy), dtype)
        model.zero_grad()
        losses.append(short(model, x, y))
        losses[-1].backward()
        gradients.append(model.weight.grad.clone())
    assert types == [torch.float32, torch.float16] and short.used == torch.float16
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()


def test_float16_comes_unscaled():
    """What a loop's loss scaling is for: a small share of the loss becomes 0."""
    model, x, y = narrow(), torch.randn(8, 4), torch.randint(3, (8,))
    tiny = lambda model, input, target: 1e-9 * F.cross_entropy(model(input), target)
    half = MixedPrecision(tiny, torch.float16)
    half(model, x, y).backward()
    assert not model.weight.grad.any()
    model.zero_grad()
    (2.0**24 * half(model, x, y)).backward()
    assert model.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16", "fast", 16])
def test_a_dtype_that_there_is_not_is_named(dtype):
    said = (
        f"dtype is {dtype!r}; allowed are torch.bfloat16, torch.float16, torch.float32,"
        " 'auto' and None, the fast one"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        MixedPrecision(supervised(F.cross_entropy), dtype)


def test_short_products_are_those_of_torch_autocast():
    model, x, y = wide(), torch.randn(64, 4), torch.randint(1024, (64,))
    ours = MixedPrecision(supervised(F.cross_entropy), torch.bfloat16)(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(model(x).float(), y)
    assert torch.equal(ours, theirs)


# Several ranks


class Normalised(nn.Module):
    """Logits (row, class, place) by way of a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES)

    def forward(self, input):
        return self.norm(input)


def shares():
    """Batches of each rank: of unlike number, the last of the second all padding."""
    first, second = ragged(1), ragged(2, sizes=((2, 7), (4, 3)))
    logits, target = ragged(3, sizes=((2, 2),))[0]
    return first, [*second, (logits, torch.full_like(target, -100))]


def told(run):
    """What `run` gives in JSON, or what it raises."""
    try:
        found = run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    accuracy = found.accuracy and [found.accuracy.value, found.accuracy.n]
    return [found.loss, accuracy, found.metrics]


def at_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    mine = shares()[rank]
    model = Normalised().double()
    parallel = nn.parallel.DistributedDataParallel(model)
    model.norm.running_mean += rank  # as after a step on other rows
    calls = []
    metrics = {"f1": macro_f1, "calls": lambda *_: calls.append(1) or len(calls)}
    together = dict(across_ranks=True)
    squared = supervised(F.mse_loss)
    numbers = [(each, each + 1 + rank) for each, _ in mine]
    same = [
        (each[:, :, :2].reshape(-1, 2), each[:, :, 2:4].reshape(-1, 2))
        for each, _ in ragged(rank, ((3, 4),))
    ]
    fails = [*mine, "no pair"] if rank else mine
    padding = [(z, torch.full_like(target, -100)) for z, target in mine]
    said = {
        "alone": told(lambda: evaluate(nn.Identity(), mine, metrics=metrics)),
        "all": told(lambda: evaluate(nn.Identity(), mine, metrics=metrics, **together)),
        "wrapped": told(lambda: evaluate(parallel, mine, **together)),
        "numbers": told(
            lambda: evaluate(nn.Identity(), numbers, objective=squared, **together)
        ),
        "pairs": told(
            lambda: evaluate(
                nn.Identity(), same, None, squared, {"error": F.mse_loss}, **together
            )
        ),
        "fails": told(lambda: evaluate(nn.Identity(), fails, **together)),
        "odd": told(
            lambda: evaluate(
                nn.Identity(), mine, metrics={"odd": lambda *_: None}, **together
            )
        ),
        "padding": told(lambda: evaluate(nn.Identity(), padding, **together)),
        "calls": len(calls),
        "mode": parallel.training and parallel.module.norm.training,
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(said, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(at_a_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def close(found, expected):
    loss, accuracy, metrics = found
    return (
        math.isclose(loss, expected.loss, rel_tol=1e-12)
        and (accuracy and accuracy[0])
        == (expected.accuracy and expected.accuracy.value)
        and metrics.get("f1") == expected.metrics.get("f1")
    )


def test_ranks_find_together_what_one_process_finds(ranks):
    everything = [batch for share in shares() for batch in share]
    whole = evaluate(nn.Identity(), everything, metrics={"f1": macro_f1})
    assert ranks[0]["all"] == ranks[1]["all"], "each rank gets the same, to the bit"
    assert close(ranks[0]["all"], whole)
    assert ranks[0]["all"][1][1] == whole.accuracy.n
    assert close(ranks[0]["wrapped"], evaluate(Normalised().double(), everything))
    assert ranks[0]["wrapped"] == ranks[1]["wrapped"]


def test_without_across_ranks_each_rank_is_for_itself(ranks):
    for rank, share in enumerate(shares()):
        alone = evaluate(nn.Identity(), share, metrics={"f1": macro_f1})
        assert close(ranks[rank]["alone"], alone)
    assert ranks[0]["alone"][0] != ranks[1]["alone"][0]


def test_a_metric_of_all_ranks_is_taken_once(ranks):
    assert [rank["calls"] for rank in ranks] == [2, 1], "once alone, once together"


def test_numbers_add_up_over_ranks_too(ranks):
    # by 1 off at the first rank and by 2 at the second, each row alike
    rows = [sum(len(z) for z, _ in share) for share in shares()]
    loss = (rows[0] * 1 + rows[1] * 4) / sum(rows)
    for rank in ranks:
        assert rank["numbers"] == [pytest.approx(loss), None, {}]
        assert rank["pairs"][0] == pytest.approx(rank["pairs"][2]["error"], rel=1e-12)


def test_an_error_at_one_rank_ends_the_evaluation_at_all(ranks):
    assert ranks[1]["fails"].startswith("ValueError: loader gives a batch of type str")
    assert ranks[0]["fails"].startswith("RuntimeError: evaluate failed at 1 of 2 ranks")
    assert ranks[0]["odd"] == ranks[1]["odd"]
    assert ranks[0]["odd"].startswith("ValueError: metric 'odd' gives a NoneType")
    assert ranks[0]["padding"] == ranks[1]["padding"]
    assert "no target that counts" in ranks[0]["padding"]
    assert ranks[0]["mode"] and ranks[1]["mode"], "the mode comes back"


def test_without_a_group_across_ranks_changes_nothing():
    batches, metrics = ragged(0), {"f1": macro_f1}
    alone = evaluate(nn.Identity(), batches, metrics=metrics)
    assert alone == evaluate(nn.Identity(), batches, metrics=metrics, across_ranks=True)


def expect_objective(m):
    ways = m["wrong_over_right"]
    low, high = ways["loss: mean of batch means"]
    assert low < 1 < high, "the mean of batch means depends on the order"
    assert ways["F1: mean of batch F1s"][1] < 1.02, "batch F1s do not rise above F1"
    assert ways["loss: dropout on"][0] > 1.1, "dropout raises the loss measured"
    assert ways["loss: padding counted as zeros"][0] > 1.3, "padding raises it"
    assert ways["squared error: (n,) beside (n, 1)"][0] > 1.2, "broadcasting too"
    assert m["evaluation_repeats"], "the loss varies in training mode only"
    by_evaluate = m["f1_by_batch_size"]["evaluate"]
    assert max(by_evaluate) - min(by_evaluate) < 1e-12, "F1 is that of all examples"
    assert m["f1_by_batch_size"]["mean"][0] < by_evaluate[0] - 0.02, (
        "the mean over single numbers is another"
    )
    assert m["added_difference"] < 1e-6, "sums of shares add up"
    assert m["broadcast_refused"], "targets that would be broadcast are refused"
    assert m["mixed_precision_accuracy"] > 0.7, "a wide net learns in short products"
    assert m["mixed_precision_gain"]["low"] > -0.1, (
        "mixed precision costs no tenth of the accuracy"
    )
    error = m["float16_error"]
    assert error["best"] < error["unscaled"] / 3, "loss scaling keeps small gradients"
    assert m["float16_overflows"], "a factor too large overflows"
    modes = m["accuracy_in_training_mode"]
    after = m["accuracy_after_it"]
    assert min(modes["sorted by class"]) < 0.5 < 0.95 < after["evaluation mode"], (
        "BatchNorm in training mode mistakes sorted digits"
    )
    assert min(after["training mode"]) < after["evaluation mode"], (
        "and the model has changed"
    )
    assert m["refusals"] == 4, "what cannot be meant is refused"
    largest = m["largest_difference"]
    assert largest.pop("gradient (torch.autocast)") == 0, "torch.autocast, bit for bit"
    assert max(largest.values()) < 1e-12, "torch and scikit-learn find the same"
