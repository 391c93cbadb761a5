"""Chapter 2: losses."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from bigmodel_nb.foundations.losses import (
    binary_cross_entropy, binary_cross_entropy_with_logits, check_outputs, cross_entropy, focal, kl_divergence,
    log_softmax, mse, nll, softmax,
)

ROOT = Path(__file__).parents[1]
scales = st.sampled_from([1.0, 100.0, 1e4])
reductions = st.sampled_from(["none", "mean", "sum"])


@st.composite
def problems(draw):
    """Logits (batch, class, ...), targets, and the options that both cross-entropies take."""
    batch, classes, rest = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    input = draw(scales) * torch.randn(batch, classes, *rest, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch, *rest), generator=generator)
    ignored = draw(st.sampled_from([-100, 0, 7]))
    target[torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = ignored
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1 if draw(st.booleans()) else None
    return input, target, {"weight": weight, "ignore_index": ignored, "reduction": draw(reductions)}


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(problems(), st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=150, deadline=None)
def test_cross_entropy_and_its_gradient_equal_torch(problem, smoothing):
    input, target, options = problem
    results = []
    for loss in (cross_entropy, F.cross_entropy):
        leaf = input.clone().requires_grad_()
        value = loss(leaf, target, label_smoothing=smoothing, **options)
        results.append((value, *torch.autograd.grad(value.sum(), leaf)))
    for ours, theirs in zip(*results):
        close(ours, theirs)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_nll_equals_torch(problem):
    input, target, options = problem
    close(nll(input, target, **options), F.nll_loss(input, target, **options))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(-1, 0), scales, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_softmax_and_its_logarithm_equal_torch(shape, dim, scale, seed):
    input = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(softmax(input, dim), torch.softmax(input, dim))
    close(log_softmax(input, dim), torch.log_softmax(input, dim))
    close(softmax(input, dim).sum(dim), torch.ones(()).double().expand_as(input.sum(dim)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_types_keep_their_type_and_their_digits(dtype):
    input = (torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    target = torch.arange(16)
    exact = F.cross_entropy(input.double(), target, reduction="none")
    ours = cross_entropy(input, target, reduction="none")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    close(log_softmax(input).double(), torch.log_softmax(input, -1).double(), torch.finfo(dtype).eps)
    torch.testing.assert_close(softmax(input).double(), torch.softmax(input, -1).double(), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_do_no_harm(dtype):
    input = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(input, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=torch.finfo(dtype).eps)
    assert input.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_gradient_is_probability_minus_truth_by_central_differences():
    input, target, step = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.tensor([0, 3, 1]), 1e-6
    expected = (softmax(input) - torch.eye(4, dtype=torch.float64)[target]) / 3
    for row in range(3):
        for column in range(4):
            change = torch.zeros_like(input)
            change[row, column] = step
            slope = (cross_entropy(input + change, target) - cross_entropy(input - change, target)) / (2 * step)
            assert slope.item() == pytest.approx(expected[row, column].item(), abs=1e-9)


def test_second_derivatives_are_right():
    input = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, torch.tensor([0, 2]), label_smoothing=0.1), input)


def test_masked_logits_cost_nothing():
    input = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(input, torch.tensor([0]))
    loss.backward()
    close(loss.detach(), F.cross_entropy(input.detach(), torch.tensor([0])))
    assert input.grad[0, 1] == 0 and input.grad.isfinite().all()


def test_one_example_without_a_batch():
    close(cross_entropy(torch.tensor([1.0, 2.0]).double(), torch.tensor(1), label_smoothing=0.2),
          F.cross_entropy(torch.tensor([1.0, 2.0]).double(), torch.tensor(1), label_smoothing=0.2))


def test_only_ignored_targets_give_what_torch_gives():
    input, target = torch.zeros(2, 3), torch.tensor([-100, -100])
    assert cross_entropy(input, target).isnan() and F.cross_entropy(input, target).isnan()
    assert cross_entropy(input, target, reduction="sum") == 0


LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize("arguments, error, sentence", [
    (dict(target=torch.tensor([0])), ValueError, r"target has shape \(1,\) and input \(2, 3\); allowed is input \(batch, class, ...\) with target \(batch, ...\)"),
    (dict(input=torch.tensor(1.0)), ValueError, r"target has shape \(2,\) and input \(\); allowed"),
    (dict(target=torch.tensor([0.0, 1.0])), TypeError, "target is torch.float32; allowed are integers"),
    (dict(target=torch.tensor([0, 3])), ValueError, "target holds class 3; allowed are 0 to 2, and ignore_index -100"),
    (dict(target=torch.tensor([0, -1])), ValueError, "target holds class -1; allowed are 0 to 2"),
    (dict(weight=torch.ones(2)), ValueError, r"weight has shape \(2,\); allowed is \(3,\), a number for each class"),
    (dict(reduction="average"), ValueError, "reduction is 'average'; allowed are 'none', 'mean' and 'sum'"),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5; allowed is a number from 0 to 1"),
])
def test_arguments_that_cannot_work_are_refused_in_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        cross_entropy(**{"input": LOGITS, "target": TARGETS} | arguments)


def differ(ours, theirs, leaf, *rest, tolerance=1e-12, **options):
    """Both losses and their slopes are the same, to a relative difference."""
    results = []
    for loss in (ours, theirs):
        input = leaf.clone().requires_grad_()
        value = loss(input, *rest, **options)
        results.append((value, *torch.autograd.grad(value.sum(), input)))
    assert results[0][0].dtype == results[1][0].dtype
    for mine, other in zip(*results):
        close(mine, other, tolerance)


@given(problems(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=80, deadline=None)
def test_targets_that_are_probabilities_equal_torch(problem, smoothing):
    input, _, options = problem
    options.pop("ignore_index")
    target = torch.softmax(input.roll(1, 0) / 1e4, 1)
    differ(cross_entropy, F.cross_entropy, input, target, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_of_any_width_are_classes(dtype):
    input, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    expected = F.cross_entropy(input, target, weight, label_smoothing=0.1, ignore_index=1)
    close(cross_entropy(input, target.to(dtype), weight, label_smoothing=0.1, ignore_index=1), expected)


@st.composite
def shaped(draw, kind):
    """An input of a kind and a target of the same shape, some at the ends of what is allowed."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = draw(scales) * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    target = torch.where(target < 0.4, 0.0, torch.where(target > 0.6, 1.0, target))
    input = {"logits": z, "probability": z.sigmoid(), "log-probability": -z.abs()}[kind]
    weight = torch.rand(shape[-1:], generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return input, target, weight, draw(reductions)


@given(shaped("probability"))
@settings(max_examples=150, deadline=None)
def test_binary_cross_entropy_equals_torch(problem):
    input, target, weight, reduction = problem
    differ(binary_cross_entropy, F.binary_cross_entropy, input, target, weight=weight, reduction=reduction)


@given(shaped("logits"), st.booleans())
@settings(max_examples=150, deadline=None)
def test_binary_cross_entropy_with_logits_equals_torch(problem, rare):
    input, target, weight, reduction = problem
    options = {"weight": weight, "reduction": reduction, "pos_weight": 3 * torch.ones(input.shape[-1:]).double() if rare else None}
    differ(binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, input, target, **options)


@given(shaped("logits"))
@settings(max_examples=80, deadline=None)
def test_squared_error_equals_torch(problem):
    input, target, _, reduction = problem
    differ(mse, F.mse_loss, input, target, reduction=reduction)


@pytest.mark.filterwarnings("ignore:reduction")  # torch's 'mean' is to become 'batchmean'
@given(shaped("log-probability"), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_divergence_equals_torch(problem, log_target, batchmean):
    input, target, _, reduction = problem
    target = target.add(1e-3).log() if log_target else target
    reduction = "batchmean" if batchmean and input.dim() else reduction
    differ(kl_divergence, F.kl_div, input, target, reduction=reduction, log_target=log_target)


def test_divergence_of_what_neither_expects_is_nothing():
    input, target = torch.tensor([[0.0, -math.inf]]), torch.tensor([[1.0, 0.0]])
    assert kl_divergence(input, target, reduction="sum") == 0 and F.kl_div(input, target, reduction="sum").isnan()
    assert kl_divergence(input, target.flip(1), reduction="sum").isinf()


@pytest.mark.parametrize("logit, target, expected", [(0.0, 1.0, -0.5), (0.0, 0.0, 0.5), (1e4, 0.0, 1.0), (-1e4, 1.0, -1.0), (1e4, 1.0, 0.0)])
def test_binary_slope_is_probability_minus_truth_everywhere(logit, target, expected):
    z = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    loss = binary_cross_entropy_with_logits(z, torch.tensor(target).double())
    loss.backward()
    assert z.grad == expected and loss.isfinite()


def test_binary_is_the_two_class_case():
    z, t = 3 * torch.randn(50, dtype=torch.float64), torch.randint(0, 2, (50,))
    pair = torch.stack([torch.zeros_like(z), z], 1)
    close(binary_cross_entropy_with_logits(z, t), cross_entropy(pair, t))
    close(binary_cross_entropy(z.sigmoid(), t), cross_entropy(pair, t), 1e-9)


@pytest.mark.parametrize("loss, leaf", [
    (binary_cross_entropy, torch.rand(5, dtype=torch.float64) * 0.8 + 0.1),
    (binary_cross_entropy_with_logits, torch.randn(5, dtype=torch.float64)),
    (mse, torch.randn(5, dtype=torch.float64)), (kl_divergence, torch.randn(5, dtype=torch.float64)),
])
def test_first_and_second_derivatives_by_differences(loss, leaf):
    target = (torch.rand(5, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    leaf = leaf.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (leaf, target)) and torch.autograd.gradgradcheck(loss, (leaf, target))


@pytest.mark.parametrize("loss, theirs, kind", [
    (cross_entropy, F.cross_entropy, "class"), (focal, None, "class"), (nll, F.nll_loss, "class"),
    (binary_cross_entropy, F.binary_cross_entropy, "share"), (mse, F.mse_loss, "share"),
    (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, "share"),
])
def test_slopes_of_single_examples_under_function_transforms(loss, theirs, kind):
    input = torch.rand(5, 4, dtype=torch.float64) * 0.8 + 0.1
    target = torch.tensor([0, 3, 1, 2, 2]) if kind == "class" else torch.rand(5, 4, dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(loss))(input, target)
    for row in range(5):
        leaf = input[row].clone().requires_grad_()
        close(slopes[row], torch.autograd.grad((theirs or loss)(leaf, target[row]), leaf)[0])


@given(problems(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
@settings(max_examples=100, deadline=None)
def test_focal_is_cross_entropy_times_a_power_and_never_nan(problem, gamma):
    input, target, options = problem
    none = options | {"reduction": "none", "weight": None}
    p = -(-cross_entropy(input, target, **none)).expm1()
    close(focal(input, target, gamma, **none), p**gamma * cross_entropy(input, target, **none))
    if gamma == 0:
        close(focal(input, target, gamma, **options), cross_entropy(input, target, **options))
    leaf = input.clone().requires_grad_()
    focal(leaf, target, gamma, **options | {"reduction": "sum"}).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_of_two_classes_is_that_of_torchvision(gamma):
    z, t = 4 * torch.randn(200, dtype=torch.float64), torch.randint(0, 2, (200,))
    close(focal(torch.stack([torch.zeros_like(z), z], 1), t, gamma, reduction="none"),
          sigmoid_focal_loss(z, t.double(), alpha=-1, gamma=gamma))
    assert torch.autograd.gradcheck(lambda input: focal(input, t[:4], gamma), torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_short_types_are_rounded_once(dtype):
    z = (4 * torch.randn(200, generator=torch.Generator().manual_seed(0))).to(dtype)
    t = torch.rand(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    for loss, input in ((binary_cross_entropy_with_logits, z), (mse, z), (kl_divergence, -z.abs()), (binary_cross_entropy, z.sigmoid())):
        exact = loss(input.double(), t.double(), reduction="none")
        mine = loss(input, t, reduction="none")
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    steep = torch.tensor([1e4, -1e4], dtype=dtype)
    assert binary_cross_entropy_with_logits(steep, torch.tensor([1.0, 0.0], dtype=dtype)) == 0
    assert focal(z.reshape(-1, 2), torch.zeros(100).long(), reduction="none").dtype == dtype


@given(st.floats(0.05, 50), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_temperature_divides_the_logits(temperature, seed):
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(softmax(z, temperature=temperature), torch.softmax(z / temperature, -1))
    close(log_softmax(z, 0, temperature), torch.log_softmax(z / temperature, 0))


def test_nothing_in_gives_what_torch_gives():
    for shape in ((0, 3), (2, 0), (0,)):
        close(softmax(torch.zeros(shape)), torch.softmax(torch.zeros(shape), -1))
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert cross_entropy(*empty).isnan() and focal(*empty).isnan() and cross_entropy(*empty, reduction="sum") == 0
    assert mse(torch.zeros(0), torch.zeros(0)).isnan() and mse(torch.zeros(0), torch.zeros(0), reduction="none").shape == (0,)
    assert focal(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()


@pytest.mark.parametrize("call, error, sentence", [
    (lambda: softmax(torch.tensor([1, 2])), TypeError, "input is torch.int64; allowed are floating types"),
    (lambda: softmax(torch.zeros(2), temperature=-1), ValueError, "temperature is -1; allowed is a positive number"),
    (lambda: log_softmax(torch.zeros(2), temperature=math.nan), ValueError, "temperature is nan; allowed is a positive"),
    (lambda: cross_entropy(LOGITS, torch.tensor([True, False])), TypeError, "target is torch.bool; allowed are integers"),
    (lambda: nll(LOGITS, torch.tensor([0.0, 1.0])), TypeError, "target is torch.float32; allowed are integers"),
    (lambda: cross_entropy(LOGITS, torch.eye(3)[TARGETS], weight=torch.ones(2)), ValueError, r"weight has shape \(2,\); allowed is \(3,\)"),
    (lambda: focal(LOGITS, TARGETS, -1.0), ValueError, "gamma is -1.0; allowed is a number from 0 on"),
    (lambda: focal(LOGITS, TARGETS + 1), ValueError, "target holds class 3; allowed are 0 to 2"),
    (lambda: mse(torch.zeros(3, 1), torch.zeros(3)), ValueError, r"target has shape \(3,\) and input \(3, 1\); allowed is one shape for both"),
    (lambda: binary_cross_entropy(torch.tensor([1.5]), torch.ones(1)), ValueError, "input holds 1.5; allowed are numbers from 0 to 1"),
    (lambda: binary_cross_entropy(torch.tensor([math.nan]), torch.ones(1)), ValueError, "input holds nan; allowed are numbers"),
    (lambda: binary_cross_entropy_with_logits(torch.zeros(2), torch.tensor([-1.0, 1.0])), ValueError, "target holds -1; allowed are numbers from 0 to 1"),
    (lambda: binary_cross_entropy_with_logits(torch.zeros(2), torch.zeros(2), reduction="batch"), ValueError, "reduction is 'batch'; allowed"),
    (lambda: binary_cross_entropy_with_logits(torch.zeros(2).long(), torch.zeros(2)), TypeError, "input is torch.int64; allowed are floating"),
    (lambda: kl_divergence(torch.zeros(2), torch.zeros(3)), ValueError, r"target has shape \(3,\) and input \(2,\); allowed is one shape"),
    (lambda: kl_divergence(torch.zeros(2), torch.zeros(2), reduction="x"), ValueError, "reduction is 'x'; allowed are 'none', 'mean', 'batchmean' and 'sum'"),
])
def test_each_loss_refuses_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def net(outputs, *last):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs), *last)


def zeroed(model):
    """The last layer starts at zero: each output is the same, and that is no mistake."""
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.zero_()
    return model


INPUT, CLASSES, YES = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 4, (torch.arange(40) % 2).float()
ONE_HOT = torch.eye(4)[CLASSES]


class AsTransformers(nn.Module):
    """Takes keywords, gives an object with logits, and flattens nothing."""

    def __init__(self, last=None):
        super().__init__()
        self.embedding, self.last = nn.Embedding(9, 5), last or nn.Identity()

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.last(self.embedding(input_ids))})()


def flat(z, t):
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


TOKENS, NEXT = torch.arange(24).reshape(4, 6) % 9, torch.arange(24).reshape(4, 6) % 5


@pytest.mark.parametrize("model, batch, loss, mistake", [
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), F.cross_entropy, "softmax twice"),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1), "softmax twice"),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), lambda z, t: F.cross_entropy(z, t, reduction="sum"), "softmax twice"),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, ONE_HOT), F.cross_entropy, "softmax twice"),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), focal, "softmax twice"),
    (lambda: net(4, nn.LogSoftmax(-1)), (INPUT, CLASSES), cross_entropy, "log-softmax twice"),
    (lambda: net(4), (INPUT, CLASSES), F.nll_loss, "logits where log-probabilities are wanted"),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), nll, "probabilities where log-probabilities are wanted"),
    (lambda: net(4, nn.LogSoftmax(-1)), (INPUT, CLASSES), lambda p, t: F.nll_loss(p.log(), t), "log-probabilities where probabilities are wanted"),
    (lambda: net(4), (INPUT, CLASSES), lambda p, t: F.nll_loss(p.log(), t), "logits where probabilities are wanted"),
    (lambda: net(1, nn.Sigmoid()), (INPUT, YES[:, None]), F.binary_cross_entropy_with_logits, "sigmoid twice"),
    (lambda: net(1), (INPUT, YES[:, None]), F.binary_cross_entropy, "logits where probabilities are wanted"),
    (lambda: net(1, nn.Sigmoid()), (INPUT, YES[:, None]), lambda y, t: (-t * y.log() + (1 - t) * (1 - y).log()).mean(), "the sign of the loss"),
    (lambda: net(1), (INPUT, YES[:, None]), lambda z, t: -F.binary_cross_entropy_with_logits(z, t), "the sign of the loss"),
    (lambda: net(4), (INPUT, CLASSES), lambda z, t: -F.cross_entropy(z, t), "the sign of the loss"),
    (lambda: net(4, nn.LogSoftmax(-1)), (INPUT, CLASSES), lambda z, t: z.gather(1, t[:, None]).mean(), "the sign of the loss"),
    (lambda: net(4), (INPUT, CLASSES), lambda z, t: F.cross_entropy(z, z.argmax(1)), "a loss without the target"),
    (lambda: net(1), (INPUT, YES[:, None]), lambda z, t: F.softplus(-z.abs()).mean(), "a loss without the target"),
    (lambda: net(4), (INPUT, ONE_HOT), F.binary_cross_entropy_with_logits, "a binary loss for one of many classes"),
    (lambda: net(4), (INPUT, CLASSES.float()), F.cross_entropy, "targets of the wrong kind"),
    (lambda: net(4), (INPUT, CLASSES + 1), F.cross_entropy, "targets out of range"),
    (lambda: net(4), (INPUT, CLASSES - 1), F.cross_entropy, "targets out of range"),
    (lambda: net(1), (INPUT, 2 * YES[:, None] - 1), F.binary_cross_entropy_with_logits, "targets out of range"),
    (lambda: net(1), (INPUT, YES), F.mse_loss, "shapes that broadcast"),
    (lambda: net(1), (INPUT, YES), F.binary_cross_entropy_with_logits, "shapes that broadcast"),
    (lambda: net(1), (INPUT, YES.long()), F.cross_entropy, "one output for cross-entropy"),
    (lambda: net(4), (INPUT, ONE_HOT[:, :3]), F.cross_entropy, "targets of the wrong shape"),
    (lambda: net(4), (1e4 * INPUT, CLASSES), lambda z, t: F.cross_entropy(100 * z, t), "a start too high"),
    (lambda: net(4), (INPUT * torch.nan, CLASSES), F.cross_entropy, "a loss that is no number"),
    (lambda: AsTransformers(nn.Softmax(-1)), ({"input_ids": TOKENS}, NEXT), flat, "softmax twice"),
])
def test_mistakes_are_named(model, batch, loss, mistake):
    torch.manual_seed(0)
    found = check_outputs(model(), batch, loss)
    assert [each.mistake for each in found] == [mistake], found
    assert found[0].seen and found[0].repair


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model, batch, loss", [
    (lambda: net(4), (INPUT, CLASSES), F.cross_entropy),
    (lambda: net(4), (INPUT, CLASSES), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1)),
    (lambda: net(4), (INPUT, CLASSES), lambda z, t: cross_entropy(z, t, reduction="sum")),
    (lambda: net(4), (INPUT, CLASSES), focal),
    (lambda: net(4), (INPUT, torch.where(CLASSES == 0, -100, CLASSES)), F.cross_entropy),
    (lambda: net(4), (INPUT, torch.where(CLASSES == 0, 9, CLASSES)), nn.CrossEntropyLoss(ignore_index=9)),
    (lambda: net(4), (INPUT, ONE_HOT), F.cross_entropy),
    (lambda: zeroed(net(4)), (INPUT, CLASSES), F.cross_entropy),
    (lambda: net(4, nn.LogSoftmax(-1)), (INPUT, CLASSES), F.nll_loss),
    (lambda: net(4, nn.Softmax(-1)), (INPUT, CLASSES), lambda p, t: F.nll_loss(p.log(), t)),
    (lambda: net(1), (INPUT, YES[:, None]), F.binary_cross_entropy_with_logits),
    (lambda: net(1), (INPUT, YES[:, None]), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([5.0]))),
    (lambda: net(1, nn.Sigmoid()), (INPUT, YES[:, None]), F.binary_cross_entropy),
    (lambda: net(4), (INPUT, (torch.arange(160).reshape(40, 4) % 3 == 0).float()), F.binary_cross_entropy_with_logits),
    (lambda: net(1), (INPUT, 100 * INPUT[:, :1]), F.mse_loss),
    (lambda: net(3), (INPUT, INPUT[:, :3]), nn.L1Loss()),
    (lambda: AsTransformers(), ({"input_ids": TOKENS}, NEXT), flat),
    (lambda: AsTransformers(nn.Sigmoid()), ({"input_ids": TOKENS}, (NEXT[..., None] == torch.arange(5)).float()), F.binary_cross_entropy),
])
def test_what_is_right_raises_no_alarm(model, batch, loss, seed):
    torch.manual_seed(seed)
    assert check_outputs(model(), batch, loss) == []


def test_a_model_is_left_as_it_was_and_may_be_trained_already():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model[2].eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    check_outputs(model, (INPUT, CLASSES), F.cross_entropy)
    assert [module.training for module in model] == [True, True, False, True] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    knows = nn.Linear(4, 4)
    with torch.no_grad():
        knows.weight.copy_(9 * torch.eye(4)), knows.bias.zero_()
    assert [each.mistake for each in check_outputs(knows, (ONE_HOT, CLASSES), F.cross_entropy)] == ["a start too low"]
    assert check_outputs(knows, (ONE_HOT, CLASSES), F.cross_entropy, trained=True) == []


def test_a_model_that_gives_no_outputs_is_refused():
    with pytest.raises(TypeError, match=r"model gives tuple; allowed is a floating tensor \(batch, ...\), or an object with `logits`"):
        check_outputs(nn.LSTM(6, 3), (INPUT, CLASSES), F.cross_entropy)
    with pytest.raises(TypeError, match=r"model gives torch.int64 of shape \(40,\)"):
        check_outputs(type("Votes", (nn.Module,), {"forward": lambda self, x: x.argmax(1)})(), (INPUT, CLASSES), F.cross_entropy)


def test_the_reading_list_can_be_true():
    """Addresses are whole, ISBNs hold, and nothing was preprinted after it appeared."""
    notebook = json.loads((ROOT / "nbs/02_foundations/04_reading.ipynb").read_text(encoding="utf-8"))
    rows = [line for cell in notebook["cells"] for line in "".join(cell["source"]).splitlines() if re.match(r"\| [A-Z].*\]\(https", line)]
    assert len(rows) > 50
    for row in rows:
        who, what, where, why = (part.strip() for part in row.strip("|").split("|"))
        address = re.search(r"\]\((https://[^\s)]+)\)", what)[1]
        year = re.search(r"\((\d{4})\)", who)
        assert where and why and (year or "20" not in who), row
        if arxiv := re.search(r"arxiv\.org/abs/(\d\d)(\d\d)\.\d{4,5}$", address):
            assert 2000 + int(arxiv[1]) <= int(year[1]) and 1 <= int(arxiv[2]) <= 12, row
        if "openlibrary.org/isbn" in address:
            figures = [int(figure) for figure in address[-13:]]
            assert (sum(figures[0::2]) + 3 * sum(figures[1::2])) % 10 == 0, row
