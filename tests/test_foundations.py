"""Chapter 2: losses, and what is read about training."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import sigmoid_focal_loss

from bigmodel_nb.foundations.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    check_outputs,
    cross_entropy,
    focal_loss,
    kl_divergence,
    log_softmax,
    mse_loss,
    nll_loss,
    softmax,
)

ROOT = Path(__file__).parents[1]
scales = st.sampled_from([1.0, 100.0, 1e4])
reductions = st.sampled_from(["none", "mean", "sum"])


@st.composite
def problems(draw):
    """Logits (batch, class, ...), targets, the options of both cross-entropies."""
    batch = draw(st.integers(1, 5))
    classes = draw(st.integers(1, 6))
    rest = draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    input = draw(scales) * torch.randn(
        batch, classes, *rest, generator=generator, dtype=torch.float64
    )
    target = torch.randint(0, classes, (batch, *rest), generator=generator)
    ignored = draw(st.sampled_from([-100, 0, 7]))
    target[
        torch.rand(target.shape, generator=generator)
        < draw(st.sampled_from([0.0, 0.3]))
    ] = ignored
    weight = (
        torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
        if draw(st.booleans())
        else None
    )
    return (
        input,
        target,
        {"weight": weight, "ignore_index": ignored, "reduction": draw(reductions)},
    )


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True
    )


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
    close(nll_loss(input, target, **options), F.nll_loss(input, target, **options))


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(-1, 0),
    scales,
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_softmax_and_its_logarithm_equal_torch(shape, dim, scale, seed):
    input = scale * torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    close(softmax(input, dim), torch.softmax(input, dim))
    close(log_softmax(input, dim), torch.log_softmax(input, dim))
    close(
        softmax(input, dim).sum(dim), torch.ones(()).double().expand_as(input.sum(dim))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_types_keep_their_type_and_their_digits(dtype):
    input = (torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 20).to(
        dtype
    )
    target = torch.arange(16)
    exact = F.cross_entropy(input.double(), target, reduction="none")
    ours = cross_entropy(input, target, reduction="none")
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.double(),
        exact,
        rtol=2 * torch.finfo(dtype).eps,
        atol=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps,
    )
    close(
        log_softmax(input).double(),
        torch.log_softmax(input, -1).double(),
        torch.finfo(dtype).eps,
    )
    torch.testing.assert_close(
        softmax(input).double(),
        torch.softmax(input, -1).double(),
        rtol=torch.finfo(dtype).eps,
        atol=1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_do_no_harm(dtype):
    input = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(input, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=torch.finfo(dtype).eps)
    assert input.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_gradient_is_probability_minus_truth_by_central_differences():
    input = torch.randn(
        3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    target = torch.tensor([0, 3, 1])
    step = 1e-6
    expected = (softmax(input) - torch.eye(4, dtype=torch.float64)[target]) / 3
    for row in range(3):
        for column in range(4):
            change = torch.zeros_like(input)
            change[row, column] = step
            slope = (
                cross_entropy(input + change, target)
                - cross_entropy(input - change, target)
            ) / (2 * step)
            assert slope.item() == pytest.approx(expected[row, column].item(), abs=1e-9)


def test_second_derivatives_are_right():
    input = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda z: cross_entropy(z, torch.tensor([0, 2]), label_smoothing=0.1), input
    )


def test_masked_logits_cost_nothing():
    input = torch.tensor(
        [[0.0, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True
    )
    loss = cross_entropy(input, torch.tensor([0]))
    loss.backward()
    close(loss.detach(), F.cross_entropy(input.detach(), torch.tensor([0])))
    assert input.grad[0, 1] == 0 and input.grad.isfinite().all()


def test_one_example_without_a_batch():
    close(
        cross_entropy(
            torch.tensor([1.0, 2.0]).double(), torch.tensor(1), label_smoothing=0.2
        ),
        F.cross_entropy(
            torch.tensor([1.0, 2.0]).double(), torch.tensor(1), label_smoothing=0.2
        ),
    )


def test_only_ignored_targets_give_what_torch_gives():
    input, target = torch.zeros(2, 3), torch.tensor([-100, -100])
    assert cross_entropy(input, target).isnan()
    assert F.cross_entropy(input, target).isnan()
    assert cross_entropy(input, target, reduction="sum") == 0


LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "arguments, error, sentence",
    [
        (
            dict(target=torch.tensor([0])),
            ValueError,
            r"target has shape \(1,\) and input \(2, 3\);"
            r" allowed is input \(batch, class, ...\) with target \(batch, ...\)",
        ),
        (
            dict(input=torch.tensor(1.0)),
            ValueError,
            r"target has shape \(2,\) and input \(\); allowed",
        ),
        (
            dict(target=torch.tensor([0.0, 1.0])),
            TypeError,
            "target is torch.float32; allowed are integers",
        ),
        (
            dict(target=torch.tensor([0, 3])),
            ValueError,
            "target holds class 3; allowed are 0 to 2, and ignore_index -100",
        ),
        (
            dict(target=torch.tensor([0, -1])),
            ValueError,
            "target holds class -1; allowed are 0 to 2",
        ),
        (
            dict(weight=torch.ones(2)),
            ValueError,
            r"weight has shape \(2,\); allowed is \(3,\), a number for each class",
        ),
        (
            dict(reduction="average"),
            ValueError,
            "reduction is 'average'; allowed are 'none', 'mean' and 'sum'",
        ),
        (
            dict(label_smoothing=1.5),
            ValueError,
            "label_smoothing is 1.5; allowed is a number from 0 to 1",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_a_sentence(
    arguments, error, sentence
):
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
    differ(
        cross_entropy,
        F.cross_entropy,
        input,
        target,
        label_smoothing=smoothing,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_of_any_width_are_classes(dtype):
    input, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    expected = F.cross_entropy(
        input, target, weight, label_smoothing=0.1, ignore_index=1
    )
    close(
        cross_entropy(
            input, target.to(dtype), weight, label_smoothing=0.1, ignore_index=1
        ),
        expected,
    )


@st.composite
def shaped(draw, kind):
    """An input of a kind and a target of its shape, some at the ends of the allowed."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = draw(scales) * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    target = torch.where(target < 0.4, 0.0, torch.where(target > 0.6, 1.0, target))
    input = {"logits": z, "probability": z.sigmoid(), "log-probability": -z.abs()}[kind]
    weight = (
        torch.rand(shape[-1:], generator=generator, dtype=torch.float64)
        if draw(st.booleans())
        else None
    )
    return input, target, weight, draw(reductions)


@given(shaped("probability"))
@settings(max_examples=150, deadline=None)
def test_binary_cross_entropy_equals_torch(problem):
    input, target, weight, reduction = problem
    differ(
        binary_cross_entropy,
        F.binary_cross_entropy,
        input,
        target,
        weight=weight,
        reduction=reduction,
    )


@given(shaped("logits"), st.booleans())
@settings(max_examples=150, deadline=None)
def test_binary_cross_entropy_with_logits_equals_torch(problem, rare):
    input, target, weight, reduction = problem
    options = {
        "weight": weight,
        "reduction": reduction,
        "pos_weight": 3 * torch.ones(input.shape[-1:]).double() if rare else None,
    }
    differ(
        binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        input,
        target,
        **options,
    )


@given(shaped("logits"))
@settings(max_examples=80, deadline=None)
def test_squared_error_equals_torch(problem):
    input, target, _, reduction = problem
    differ(mse_loss, F.mse_loss, input, target, reduction=reduction)


# torch's 'mean' is to become 'batchmean'
@pytest.mark.filterwarnings("ignore:reduction")
@given(shaped("log-probability"), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_divergence_equals_torch(problem, log_target, batchmean):
    input, target, _, reduction = problem
    target = target.add(1e-3).log() if log_target else target
    reduction = "batchmean" if batchmean and input.dim() else reduction
    differ(
        kl_divergence,
        F.kl_div,
        input,
        target,
        reduction=reduction,
        log_target=log_target,
    )


def test_divergence_of_what_neither_expects_is_nothing():
    input, target = torch.tensor([[0.0, -math.inf]]), torch.tensor([[1.0, 0.0]])
    assert kl_divergence(input, target, reduction="sum") == 0
    assert F.kl_div(input, target, reduction="sum").isnan()
    assert kl_divergence(input, target.flip(1), reduction="sum").isinf()
    logs = target.log().requires_grad_()
    found = kl_divergence(input, logs, reduction="sum", log_target=True)
    found.backward()
    assert found == 0 and logs.grad.isfinite().all()


def test_a_vector_of_logits_has_no_batch_of_targets():
    for loss in (cross_entropy, nll_loss):
        with pytest.raises(ValueError, match="target has shape|allowed is"):
            loss(torch.randn(5), torch.arange(5))


@pytest.mark.parametrize(
    "logit, target, expected",
    [
        (0.0, 1.0, -0.5),
        (0.0, 0.0, 0.5),
        (1e4, 0.0, 1.0),
        (-1e4, 1.0, -1.0),
        (1e4, 1.0, 0.0),
    ],
)
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


@pytest.mark.parametrize(
    "loss, leaf",
    [
        (binary_cross_entropy, torch.rand(5, dtype=torch.float64) * 0.8 + 0.1),
        (binary_cross_entropy_with_logits, torch.randn(5, dtype=torch.float64)),
        (mse_loss, torch.randn(5, dtype=torch.float64)),
        (kl_divergence, torch.randn(5, dtype=torch.float64)),
    ],
)
def test_first_and_second_derivatives_by_differences(loss, leaf):
    target = (torch.rand(5, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    leaf = leaf.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (leaf, target))
    assert torch.autograd.gradgradcheck(loss, (leaf, target))


@pytest.mark.parametrize(
    "loss, theirs, kind",
    [
        (cross_entropy, F.cross_entropy, "class"),
        (focal_loss, None, "class"),
        (nll_loss, F.nll_loss, "class"),
        (binary_cross_entropy, F.binary_cross_entropy, "share"),
        (mse_loss, F.mse_loss, "share"),
        (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, "share"),
    ],
)
def test_slopes_of_single_examples_under_function_transforms(loss, theirs, kind):
    input = torch.rand(5, 4, dtype=torch.float64) * 0.8 + 0.1
    target = (
        torch.tensor([0, 3, 1, 2, 2])
        if kind == "class"
        else torch.rand(5, 4, dtype=torch.float64)
    )
    slopes = torch.func.vmap(torch.func.grad(loss))(input, target)
    for row in range(5):
        leaf = input[row].clone().requires_grad_()
        close(
            slopes[row],
            torch.autograd.grad((theirs or loss)(leaf, target[row]), leaf)[0],
        )


@given(problems(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
@settings(max_examples=100, deadline=None)
def test_focal_is_cross_entropy_times_a_power_and_never_nan(problem, gamma):
    input, target, options = problem
    none = options | {"reduction": "none", "weight": None}
    p = -(-cross_entropy(input, target, **none)).expm1()
    close(
        focal_loss(input, target, gamma, **none),
        p**gamma * cross_entropy(input, target, **none),
    )
    if gamma == 0:
        close(
            focal_loss(input, target, gamma, **options),
            cross_entropy(input, target, **options),
        )
    leaf = input.clone().requires_grad_()
    focal_loss(leaf, target, gamma, **options | {"reduction": "sum"}).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_of_two_classes_is_that_of_torchvision(gamma):
    z, t = 4 * torch.randn(200, dtype=torch.float64), torch.randint(0, 2, (200,))
    close(
        focal_loss(
            torch.stack([torch.zeros_like(z), z], 1), t, gamma, reduction="none"
        ),
        sigmoid_focal_loss(z, t.double(), alpha=-1, gamma=gamma),
    )
    assert torch.autograd.gradcheck(
        lambda input: focal_loss(input, t[:4], gamma),
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_short_types_are_rounded_once(dtype):
    z = (4 * torch.randn(200, generator=torch.Generator().manual_seed(0))).to(dtype)
    t = torch.rand(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    for loss, input in (
        (binary_cross_entropy_with_logits, z),
        (mse_loss, z),
        (kl_divergence, -z.abs()),
        (binary_cross_entropy, z.sigmoid()),
    ):
        exact = loss(input.double(), t.double(), reduction="none")
        mine = loss(input, t, reduction="none")
        assert mine.dtype == dtype
        torch.testing.assert_close(
            mine.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )
    steep = torch.tensor([1e4, -1e4], dtype=dtype)
    assert (
        binary_cross_entropy_with_logits(steep, torch.tensor([1.0, 0.0], dtype=dtype))
        == 0
    )
    assert (
        focal_loss(z.reshape(-1, 2), torch.zeros(100).long(), reduction="none").dtype
        == dtype
    )


@given(st.floats(0.05, 50), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_temperature_divides_the_logits(temperature, seed):
    z = torch.randn(
        3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    close(softmax(z, temperature=temperature), torch.softmax(z / temperature, -1))
    close(log_softmax(z, 0, temperature), torch.log_softmax(z / temperature, 0))


def test_nothing_in_gives_what_torch_gives():
    for shape in ((0, 3), (2, 0), (0,)):
        close(softmax(torch.zeros(shape)), torch.softmax(torch.zeros(shape), -1))
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert cross_entropy(*empty).isnan()
    assert focal_loss(*empty).isnan()
    assert cross_entropy(*empty, reduction="sum") == 0
    assert mse_loss(torch.zeros(0), torch.zeros(0)).isnan()
    assert mse_loss(torch.zeros(0), torch.zeros(0), reduction="none").shape == (0,)
    assert focal_loss(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (
            lambda: softmax(torch.tensor([1, 2])),
            TypeError,
            "input is torch.int64; allowed are floating types",
        ),
        (
            lambda: softmax(torch.zeros(2), temperature=-1),
            ValueError,
            "temperature is -1; allowed is a positive number",
        ),
        (
            lambda: log_softmax(torch.zeros(2), temperature=math.nan),
            ValueError,
            "temperature is nan; allowed is a positive",
        ),
        (
            lambda: cross_entropy(LOGITS, torch.tensor([True, False])),
            TypeError,
            "target is torch.bool; allowed are integers",
        ),
        (
            lambda: nll_loss(LOGITS, torch.tensor([0.0, 1.0])),
            TypeError,
            "target is torch.float32; allowed are integers",
        ),
        (
            lambda: cross_entropy(LOGITS, torch.eye(3)[TARGETS], weight=torch.ones(2)),
            ValueError,
            r"weight has shape \(2,\); allowed is \(3,\)",
        ),
        (
            lambda: focal_loss(LOGITS, TARGETS, -1.0),
            ValueError,
            "gamma is -1.0; allowed is a number from 0 on",
        ),
        (
            lambda: focal_loss(LOGITS, TARGETS + 1),
            ValueError,
            "target holds class 3; allowed are 0 to 2",
        ),
        (
            lambda: mse_loss(torch.zeros(3, 1), torch.zeros(3)),
            ValueError,
            r"target has shape \(3,\) and input \(3, 1\);"
            r" allowed is one shape for both",
        ),
        (
            lambda: binary_cross_entropy(torch.tensor([1.5]), torch.ones(1)),
            ValueError,
            "input holds 1.5; allowed are numbers from 0 to 1",
        ),
        (
            lambda: binary_cross_entropy(torch.tensor([math.nan]), torch.ones(1)),
            ValueError,
            "input holds nan; allowed are numbers",
        ),
        (
            lambda: binary_cross_entropy_with_logits(
                torch.zeros(2), torch.tensor([-1.0, 1.0])
            ),
            ValueError,
            "target holds -1; allowed are numbers from 0 to 1",
        ),
        (
            lambda: binary_cross_entropy_with_logits(
                torch.zeros(2), torch.zeros(2), reduction="batch"
            ),
            ValueError,
            "reduction is 'batch'; allowed",
        ),
        (
            lambda: binary_cross_entropy_with_logits(
                torch.zeros(2).long(), torch.zeros(2)
            ),
            TypeError,
            "input is torch.int64; allowed are floating",
        ),
        (
            lambda: kl_divergence(torch.zeros(2), torch.zeros(3)),
            ValueError,
            r"target has shape \(3,\) and input \(2,\); allowed is one shape",
        ),
        (
            lambda: kl_divergence(torch.zeros(2), torch.zeros(2), reduction="x"),
            ValueError,
            "reduction is 'x'; allowed are 'none', 'mean', 'batchmean' and 'sum'",
        ),
    ],
)
def test_each_loss_refuses_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


EACH_LOSS = [
    (cross_entropy, "logits", "classes"),
    (cross_entropy, "logits", "shares"),
    (nll_loss, "logits", "classes"),
    (focal_loss, "logits", "classes"),
    (binary_cross_entropy, "shares", "shares"),
    (binary_cross_entropy_with_logits, "logits", "shares"),
    (mse_loss, "logits", "shares"),
    (kl_divergence, "logits", "shares"),
]
KINDS = {
    "logits": torch.randn(6, 4),
    "classes": torch.tensor([0, 3, 1, -100, 2, 2]),
    "shares": torch.rand(6, 4),
}


class Operations(TorchDispatchMode):
    """The names of the operations that were asked for while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss, kind, target", EACH_LOSS)
def test_no_loss_waits_for_an_accelerator(loss, kind, target):
    """What makes the host wait: to choose by a mask, and to fetch a number.

    "meta" stands for a device.
    """
    with Operations() as asked:
        assert loss(KINDS[kind].to("meta"), KINDS[target].to("meta")).shape == ()
    assert not asked.names & {
        "index",
        "nonzero",
        "masked_select",
        "_local_scalar_dense",
        "item",
        "is_nonzero",
    }, asked.names


@pytest.mark.parametrize("loss, kind, target", EACH_LOSS)
def test_each_loss_is_one_graph(loss, kind, target):
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    close(compiled(KINDS[kind], KINDS[target]), loss(KINDS[kind], KINDS[target]))


def test_the_mean_of_the_focal_loss_and_what_others_divide_by():
    """Ours divides by the weights that took part.

    torchvision divides by the examples, the paper by the positive ones.
    """
    z = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    yes = torch.arange(50) % 5 == 0
    logits = torch.stack([torch.zeros_like(z), z], 1)
    weight = torch.tensor([0.75, 0.25], dtype=torch.float64)
    total = focal_loss(logits, yes.long(), weight=weight, reduction="sum")
    close(total / 50, sigmoid_focal_loss(z, yes.double(), alpha=0.25, reduction="mean"))
    close(
        total / weight[yes.long()].sum(), focal_loss(logits, yes.long(), weight=weight)
    )


def net(outputs, *last):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs), *last)


def zeroed(model, bias=0.0):
    """The last layer starts at zero or at a bias: no output depends on the input.

    That is no mistake.
    """
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.as_tensor(bias))
    return model


def small(model, bias=0.0):
    """The last layer starts at nearly zero, as that of ConvNeXt does."""
    with torch.no_grad():
        model[-1].weight.mul_(1e-3)
        model[-1].bias.copy_(torch.as_tensor(bias))
    return model


INPUT = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
CLASSES = torch.arange(40) % 4
YES = (torch.arange(40) % 2).float()
ONE_HOT = torch.eye(4)[CLASSES]
# 38 of the class 0, one each of 1 and 2
RARE = torch.where(torch.arange(40) % 20 == 0, torch.arange(40) // 20 + 1, 0)
SHARES = torch.tensor([38, 1, 1, 0.01]) / 40.01
MANY = torch.eye(200)[torch.arange(40) * 3]


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
CLASSED, ANSWERED = (INPUT, CLASSES), (INPUT, YES[:, None])
HOT, LABELLED = (INPUT, ONE_HOT), (INPUT, MANY)
NAMED = ({"input_ids": TOKENS}, NEXT)
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1)
BCE = F.binary_cross_entropy_with_logits


def summed(z, t):
    return cross_entropy(z, t, reduction="sum")


def nll_of_shares(p, t):
    return F.nll_loss(p.log(), t)


def of(*layers):
    """A net with these last layers, made anew by each call."""
    return lambda: net(*layers)


FOUR, ONE, SOFTMAX = of(4), of(1), of(4, nn.Softmax(-1))
LOG_SOFTMAX, SIGMOID = of(4, nn.LogSoftmax(-1)), of(1, nn.Sigmoid())
MISTAKES = {
    "softmax twice": [
        (SOFTMAX, CLASSED, F.cross_entropy),
        (SOFTMAX, CLASSED, WEIGHTED),
        (SOFTMAX, CLASSED, lambda z, t: F.cross_entropy(z, t, reduction="sum")),
        (SOFTMAX, HOT, F.cross_entropy),
        (SOFTMAX, CLASSED, focal_loss),
        (lambda: AsTransformers(nn.Softmax(-1)), NAMED, flat),
    ],
    "log-softmax twice": [(LOG_SOFTMAX, CLASSED, cross_entropy)],
    "sigmoid twice": [
        (SIGMOID, ANSWERED, BCE),
        (of(1, nn.Sigmoid(), nn.Flatten(0)), (INPUT, YES), BCE),
    ],
    "logits where log-probabilities are wanted": [(FOUR, CLASSED, F.nll_loss)],
    "probabilities where log-probabilities are wanted": [(SOFTMAX, CLASSED, nll_loss)],
    "log-probabilities where probabilities are wanted": [
        (LOG_SOFTMAX, CLASSED, nll_of_shares),
    ],
    "logits where probabilities are wanted": [
        (FOUR, CLASSED, nll_of_shares),
        (ONE, ANSWERED, F.binary_cross_entropy),
    ],
    "the sign of the loss": [
        (
            SIGMOID,
            ANSWERED,
            lambda y, t: (-t * y.log() + (1 - t) * (1 - y).log()).mean(),
        ),
        (ONE, ANSWERED, lambda z, t: -BCE(z, t)),
        (FOUR, CLASSED, lambda z, t: -F.cross_entropy(z, t)),
        (LOG_SOFTMAX, CLASSED, lambda z, t: z.gather(1, t[:, None]).mean()),
    ],
    "a loss without the target": [
        (FOUR, CLASSED, lambda z, t: F.cross_entropy(z, z.argmax(1))),
        (ONE, ANSWERED, lambda z, t: F.softplus(-z.abs()).mean()),
    ],
    "no prior in the bias": [
        (of(200), LABELLED, BCE),
        (of(200, nn.Sigmoid()), LABELLED, nn.BCELoss(reduction="sum")),
    ],
    "targets of the wrong kind": [(FOUR, (INPUT, CLASSES.float()), F.cross_entropy)],
    "targets out of range": [
        (FOUR, (INPUT, CLASSES + 1), F.cross_entropy),
        (FOUR, (INPUT, CLASSES - 1), F.cross_entropy),
        (ONE, (INPUT, 2 * YES[:, None] - 1), BCE),
    ],
    "shapes that broadcast": [
        (ONE, (INPUT, YES), F.mse_loss),
        (ONE, (INPUT, YES), BCE),
    ],
    "one output for cross-entropy": [(ONE, (INPUT, YES.long()), F.cross_entropy)],
    "targets of the wrong shape": [(FOUR, (INPUT, ONE_HOT[:, :3]), F.cross_entropy)],
    "a start too high": [
        (FOUR, (1e4 * INPUT, CLASSES), lambda z, t: F.cross_entropy(100 * z, t)),
    ],
    "a loss that is no number": [(FOUR, (INPUT * torch.nan, CLASSES), F.cross_entropy)],
}


@pytest.mark.parametrize(
    "mistake, model, batch, loss",
    [(mistake, *case) for mistake, cases in MISTAKES.items() for case in cases],
)
def test_mistakes_are_named(mistake, model, batch, loss):
    torch.manual_seed(0)
    found = check_outputs(model(), batch, loss)
    assert [each.name for each in found] == [mistake], found
    assert found[0].evidence and found[0].fix


SEVENTH = (torch.arange(40) == 7).float()[:, None]
THIRDS = (torch.arange(160).reshape(40, 4) % 3 == 0).float()
FLAGS = (NEXT[..., None] == torch.arange(5)).float()
RIGHT = [
    (FOUR, CLASSED, F.cross_entropy),
    (of(1, nn.Flatten(0)), (INPUT, YES), BCE),
    (of(1, nn.Flatten(0)), (INPUT, 100 + INPUT[:, 0]), nn.L1Loss()),
    (FOUR, CLASSED, WEIGHTED),
    (FOUR, CLASSED, summed),
    (FOUR, CLASSED, focal_loss),
    (FOUR, (INPUT, torch.where(CLASSES == 0, -100, CLASSES)), F.cross_entropy),
    (
        FOUR,
        (INPUT, torch.where(CLASSES == 0, 9, CLASSES)),
        nn.CrossEntropyLoss(ignore_index=9),
    ),
    (FOUR, HOT, F.cross_entropy),
    (lambda: zeroed(net(4)), CLASSED, F.cross_entropy),
    (lambda: zeroed(net(4), SHARES.log()), (INPUT, RARE), F.cross_entropy),
    (lambda: small(net(4), SHARES.log()), (INPUT, RARE), F.cross_entropy),
    (
        lambda: small(net(4), SHARES.log()),
        (INPUT, RARE),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    ),
    (lambda: zeroed(net(1)), ANSWERED, BCE),
    (lambda: zeroed(net(1), 0.4), ANSWERED, BCE),
    (lambda: small(net(1), 0.4), ANSWERED, BCE),
    (lambda: zeroed(net(1), math.log(1 / 39)), (INPUT, SEVENTH), BCE),
    (lambda: zeroed(net(4)), HOT, BCE),
    (FOUR, HOT, BCE),
    (lambda: small(net(200), math.log(1 / 199)), LABELLED, BCE),
    (LOG_SOFTMAX, CLASSED, F.nll_loss),
    (SOFTMAX, CLASSED, nll_of_shares),
    (ONE, ANSWERED, BCE),
    (ONE, ANSWERED, nn.BCEWithLogitsLoss(pos_weight=torch.tensor([5.0]))),
    (SIGMOID, ANSWERED, F.binary_cross_entropy),
    (FOUR, (INPUT, THIRDS), BCE),
    (ONE, (INPUT, 100 * INPUT[:, :1]), F.mse_loss),
    (of(3), (INPUT, INPUT[:, :3]), nn.L1Loss()),
    (lambda: AsTransformers(), NAMED, flat),
    (
        lambda: AsTransformers(nn.Sigmoid()),
        ({"input_ids": TOKENS}, FLAGS),
        F.binary_cross_entropy,
    ),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model, batch, loss", RIGHT)
def test_what_is_right_raises_no_alarm(model, batch, loss, seed):
    torch.manual_seed(seed)
    assert check_outputs(model(), batch, loss) == []


@given(
    st.integers(2, 30), st.integers(0, 999), st.sampled_from([0.0, 1e-3]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_a_last_layer_that_starts_at_any_prior_raises_no_alarm(
    outputs, seed, scale, exclusive
):
    """Classes as common as may be; a last layer near zero, whose bias says the rest."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(outputs, generator=generator) ** 3 + 1e-3
    if exclusive:
        target = torch.multinomial(shares, 40, replacement=True, generator=generator)
        prior, loss = (shares / shares.sum()).log(), F.cross_entropy
    else:
        target = (
            torch.rand(40, outputs, generator=generator) < shares.clamp_max(0.99)
        ).float()
        prior, loss = shares.clamp_max(0.99).logit(), F.binary_cross_entropy_with_logits
    model = net(outputs)
    with torch.no_grad():
        model[-1].weight.mul_(scale), model[-1].bias.copy_(prior)
    assert check_outputs(model, (INPUT, target), loss) == []


def test_a_model_is_left_as_it_was_and_may_be_trained_already():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)
    )
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_outputs(model, (INPUT, CLASSES), F.cross_entropy)
    assert [module.training for module in model] == [
        True,
        True,
        False,
        True,
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    knows = nn.Linear(4, 4)
    with torch.no_grad():
        knows.weight.copy_(9 * torch.eye(4)), knows.bias.zero_()
    assert [
        each.name for each in check_outputs(knows, (ONE_HOT, CLASSES), F.cross_entropy)
    ] == ["a start too low"]
    assert check_outputs(knows, (ONE_HOT, CLASSES), F.cross_entropy, trained=True) == []


def test_a_model_that_gives_no_outputs_is_refused():
    with pytest.raises(
        TypeError,
        match=r"model gives tuple; allowed is a floating tensor \(batch, ...\),"
        " or an object with `logits`",
    ):
        check_outputs(nn.LSTM(6, 3), (INPUT, CLASSES), F.cross_entropy)
    with pytest.raises(TypeError, match=r"model gives torch.int64 of shape \(40,\)"):
        check_outputs(
            type("Votes", (nn.Module,), {"forward": lambda self, x: x.argmax(1)})(),
            (INPUT, CLASSES),
            F.cross_entropy,
        )


def expect_losses(metrics):
    """The derivations hold in numbers, and the mistakes are told from what is right."""
    assert metrics["largest_difference_from_torch"] < 1e-12, (
        "each loss and its gradient equal torch's"
    )
    assert metrics["gradient_difference"] < 1e-8, (
        "the gradient of cross-entropy is probability minus truth"
    )
    assert metrics["largest_gradient_error"] < 1e-8, (
        "each gradient equals central differences"
    )
    assert metrics["focal_difference"] < 1e-12, (
        "focal loss equals torchvision's, with its mean"
    )
    assert abs(metrics["gaussian_difference"]) < 1e-12, (
        "squared error is a Gaussian likelihood"
    )
    assert abs(metrics["first_loss"] - math.log(10)) < 0.1, (
        "an untrained network starts near log K"
    )
    assert (
        metrics["loss_with_logits"]
        < metrics["softmax_twice_floor"]
        < metrics["softmax_twice_loss"]
    ), "softmax twice has a floor"
    assert abs(metrics["best_smoothed_logit"] - math.log(19)) < 0.1, (
        "label smoothing has a finite best logit"
    )
    distilled = metrics["distilled_gradient"]
    assert abs(distilled["largest temperature"] / distilled["limit"] - 1) < 0.05, (
        "times T squared, the gradient keeps its size"
    )
    assert metrics["mistakes_named"] == metrics["mistakes_tried"] >= 12, (
        "each mistake is named"
    )
    assert metrics["false_alarms"] == 0, (
        "what is right is not accused, a zero or a prior in the last layer included"
    )


def expect_reading(metrics):
    """What each mistake costs, and that the repair pays."""
    chance = 0.2  # twice the chance level of ten classes
    assert metrics["right_accuracy"] > 0.95, "the network without a mistake learns"
    assert metrics["script_accuracy"]["value"] > 0.95, "the corrected script learns"
    for name in ("own_answers", "without_input", "of_old_optimizer"):
        assert metrics[f"accuracy_{name}"] < chance, f"{name}: nothing is learnt"
    assert metrics["loss_own_answers"] < 1e-3, (
        "its own answers please a model to the last digit"
    )
    blind = metrics["loss_without_input"]
    assert abs(blind["last"] - blind["entropy"]) < 0.05, (
        "without the input, the loss stays at the entropy of the prior"
    )
    assert metrics["loss_of_wrong_sign"] < -1e3, (
        "with one sign turned, the loss has no bottom"
    )
    assert metrics["accuracy_of_wrong_sign"] < 0.6, (
        "and the model answers the same to everything"
    )
    binary = metrics["binary_after_50_steps"]
    assert (
        abs(binary["loss"] - binary["silent"]) < 0.2 * binary["silent"]
        and binary["accuracy"] < 0.05
    ), "the binary loss is near 0 before anything is learnt"
    assert metrics["gain_by_prior_at_first"]["low"] > 0.3, (
        "the prior in the bias saves the slow start"
    )
    assert all(share > 0.8 for share in metrics["accuracy_in_the_end"].values()), (
        "each of the three losses teaches a hundred classes"
    )
    assert abs(metrics["gain_of_binary_in_the_end"]["value"]) < 0.05, (
        "the binary loss is slow at first, and not worse in the end by much"
    )
    assert metrics["gain_of_binary_with_prior_in_the_end"]["low"] > -0.02, (
        "with the prior it is no worse than cross-entropy"
    )
    assert metrics["softmax_twice_loss"] > metrics["softmax_twice_floor"], (
        "softmax twice has a floor"
    )
    assert metrics["softmax_twice_times_slower"] > 3, (
        "and is slower, each at its best learning rate"
    )
    language = metrics["language"]
    assert (
        language["copied"] < 0.01 and language["not shifted"] > language["shifted"] + 3
    ), "without the shift a model copies, and does not know the next token"
    assert metrics["padding_ranks_wrongly"], (
        "padding lowers the loss, and turns the order of two models"
    )
    assert metrics["accuracy_of_regression"] < 0.5, (
        "a regression on class numbers is a bad classifier"
    )
    assert metrics["eval_gain"] > 0.2, (
        "without eval(), small batches are judged wrongly"
    )
    optimism = [metrics["optimism"][count] for count in ("1", "5", "30")]
    assert abs(optimism[0]) < 0.01 < optimism[1] < optimism[2], (
        "a choice on test data promises more, the more candidates there are"
    )
    assert len(metrics["mistakes_named"]) == 4, "four of nine are named from one batch"


def test_the_reading_list_can_be_true():
    """Addresses are whole, ISBNs hold, and nothing was preprinted after it appeared."""
    notebook = json.loads(
        (ROOT / "nbs/02_foundations/04_reading.ipynb").read_text(encoding="utf-8")
    )
    rows = [
        line
        for cell in notebook["cells"]
        for line in "".join(cell["source"]).splitlines()
        if re.match(r"\| [A-Z].*\]\(https", line)
    ]
    assert len(rows) > 50
    for row in rows:
        who, what, where, why = (part.strip() for part in row.strip("|").split("|"))
        address = re.search(r"\]\((https://[^\s)]+)\)", what)[1]
        year = re.search(r"\((\d{4})\)", who)
        assert where and why and (year or "20" not in who), row
        if arxiv := re.search(r"arxiv\.org/abs/(\d\d)(\d\d)\.\d{4,5}$", address):
            assert 2000 + int(arxiv[1]) <= int(year[1]), row
            assert 1 <= int(arxiv[2]) <= 12, row
        if "openlibrary.org/isbn" in address:
            figures = [int(figure) for figure in address[-13:]]
            assert (sum(figures[0::2]) + 3 * sum(figures[1::2])) % 10 == 0, row
