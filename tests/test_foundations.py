"""Chapter 2: losses."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigmodel_nb.foundations.losses import cross_entropy, log_softmax, nll, softmax

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
