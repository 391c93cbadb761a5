"""Chapter 2: optimisers, their rates, and the noise of their gradients."""

import copy
import inspect
import io
import itertools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.foundations import optim
from bigmodel_nb.foundations.optim import (
    SGD,
    Adam,
    AdamW,
    Lion,
    Muon,
    RMSprop,
    clip_grad_norm_,
    gradient_noise,
    lr_range_test,
    newton_schulz,
    warmup_cosine,
)

KINDS = [SGD, RMSprop, Adam, AdamW, Muon]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
rates = st.floats(1e-4, 0.3)
shares = st.floats(0.0, 0.99)
decays = st.sampled_from([0.0, 0.01, 0.3])


def theirs(kind):
    return getattr(torch.optim, kind.__name__)


@st.composite
def options(draw, kind):
    """Options that ours and torch's both take."""
    chosen = {"lr": draw(rates), "weight_decay": draw(decays)}
    if kind is SGD:
        chosen |= {
            "momentum": draw(st.sampled_from([0.0, 0.5, 0.99])),
            "maximize": draw(st.booleans()),
        }
        chosen["nesterov"] = chosen["momentum"] > 0 and draw(st.booleans())
        chosen["dampening"] = 0.0 if chosen["nesterov"] else draw(shares)
    elif kind is RMSprop:
        chosen |= {
            "alpha": draw(shares),
            "eps": draw(st.sampled_from([1e-8, 0.1])),
            "momentum": draw(st.sampled_from([0.0, 0.9])),
            "centered": draw(st.booleans()),
            "maximize": draw(st.booleans()),
        }
    elif kind is Muon:
        chosen |= {
            "momentum": draw(shares),
            "nesterov": draw(st.booleans()),
            "ns_steps": draw(st.integers(0, 7)),
            "adjust_lr_fn": draw(
                st.sampled_from(
                    [None, "original", "match_rms_adamw", "spectral_unclamped"]
                )
            ),
        }
    else:
        chosen |= {
            "betas": (draw(shares), draw(shares)),
            "eps": draw(st.sampled_from([1e-8, 0.1])),
            "amsgrad": draw(st.booleans()),
            "maximize": draw(st.booleans()),
        }
    return chosen


@st.composite
def problems(draw):
    """A kind, the shapes of its parameters, options of one or two groups, a seed."""
    kind = draw(st.sampled_from(KINDS))
    shape = (
        st.lists(st.integers(1, 4), min_size=2, max_size=2)
        if kind is Muon
        else st.lists(st.integers(0, 4), max_size=3)
    )
    shapes = draw(st.lists(shape, min_size=2, max_size=4))
    groups = [draw(options(kind)) for _ in range(draw(st.integers(1, 2)))]
    return kind, shapes, groups, draw(st.integers(0, 2**31))


def leaves(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def grouped(parameters, groups):
    return [
        {"params": parameters[place :: len(groups)], **group}
        for place, group in enumerate(groups)
    ]


def give_slopes(copies, step, seed):
    """The same slopes to all copies: a pull to zero plus noise; now and then none."""
    for place, same in enumerate(zip(*copies)):
        generator = torch.Generator().manual_seed(seed + 1000 * step + place)
        noise = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        absent = torch.rand((), generator=generator) < 0.15
        for parameter in same:
            parameter.grad = (
                None
                if absent
                else (parameter.detach().double() + noise).to(parameter.dtype)
            )


def apart(one, other):
    """Largest relative difference.

    Where torch's number is none, which a variance of zero can give it, ours is to be
    none as well.
    """
    pairs = [
        (a.detach().double().flatten(), b.detach().double().flatten())
        for a, b in zip(one, other)
    ]
    ours, torchs = (torch.cat(each) for each in zip(*pairs))
    return (
        torch.where(
            ours.isnan() & torchs.isnan(),
            0.0,
            (ours - torchs).abs() / (1 + torchs.abs()),
        )
        .sum()
        .item()
    )


@given(problems())
@settings(max_examples=120, deadline=None)
def test_each_step_equals_torch(problem):
    kind, shapes, groups, seed = problem
    copies = leaves(shapes, seed), leaves(shapes, seed)
    optimizers = [
        make(grouped(parameters, groups))
        for make, parameters in zip((kind, theirs(kind)), copies)
    ]
    places = [parameter.data_ptr() for parameter in copies[0]]
    for step in range(20):
        give_slopes(copies, step, seed)
        before = [
            None if each.grad is None else each.grad.clone() for each in copies[0]
        ]
        with pytest.MonkeyPatch.context() as patch:
            # Muon's way on a processor with bfloat16, which is torch's on any: the
            # other one rounds now and then to the neighbouring number
            patch.setattr(optim, "best_dtype", lambda device: torch.bfloat16)
            for optimizer in optimizers:
                optimizer.step()
        assert apart(*copies) < 1e-12
        for parameter, slope in zip(copies[0], before):  # the slopes are not touched
            assert (
                slope is None
                and parameter.grad is None
                or torch.allclose(parameter.grad, slope, rtol=0, atol=0, equal_nan=True)
            )
    assert places == [parameter.data_ptr() for parameter in copies[0]]
    # the same names in the state, with the same values
    for ours, torchs in zip(*copies):
        state, other = (
            optimizer.state.get(each, {})
            for optimizer, each in zip(optimizers, (ours, torchs))
        )
        assert set(state) == {
            name for name, value in other.items() if value is not None
        }
        assert all(
            torch.allclose(value, other[name], rtol=1e-12, atol=1e-12, equal_nan=True)
            for name, value in state.items()
        )


@every_kind
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_short_types_equal_torch_and_keep_their_type(kind, dtype, tolerance):
    copies = leaves([(4, 3), (2, 2)], 0, dtype), leaves([(4, 3), (2, 2)], 0, dtype)
    optimizers = [
        make(parameters, lr=0.01)
        for make, parameters in zip((kind, theirs(kind)), copies)
    ]
    for step in range(20):
        give_slopes(copies, step, 0)
        for optimizer in optimizers:
            optimizer.step()
        assert apart(*copies) <= tolerance and copies[0][0].dtype == dtype
    assert all(
        value.dtype == dtype
        for name, value in optimizers[0].state[copies[0][0]].items()
        if name != "step"
    )


@every_kind
@pytest.mark.parametrize("back", ["same", "torch"])
def test_a_saved_state_goes_on_in_ours_and_in_torch(kind, back):
    """A run that is saved and gone on with elsewhere ends where a whole one ends.

    It is loaded without unpickling code.
    """
    extra = {
        SGD: {"momentum": 0.9},
        RMSprop: {"momentum": 0.5, "centered": True},
        Adam: {"amsgrad": True},
    }.get(kind, {})
    whole, parts = leaves([(3, 2), (2, 4)], 1), leaves([(3, 2), (2, 4)], 1)
    optimizers = [kind(each, lr=0.02, **extra) for each in (whole, parts)]
    for step in range(20):
        if step == 9:
            file = io.BytesIO()
            torch.save(optimizers[1].state_dict(), file)
            file.seek(0)
            parts = [parameter.detach().clone().requires_grad_() for parameter in parts]
            optimizers[1] = (kind if back == "same" else theirs(kind))(parts, lr=0.5)
            optimizers[1].load_state_dict(torch.load(file, weights_only=True))
            assert optimizers[1].param_groups[0]["lr"] == 0.02
        give_slopes((whole, parts), step, 1)
        for optimizer in optimizers:
            optimizer.step()
    assert apart(whole, parts) < 1e-12


@every_kind
def test_a_state_of_torch_goes_on_in_ours(kind):
    whole, parts = leaves([(3, 2)], 2), leaves([(3, 2)], 2)
    optimizers = [theirs(kind)(each, lr=0.02) for each in (whole, parts)]
    for step in range(12):
        if step == 6:
            state = optimizers[1].state_dict()
            optimizers[1] = kind(parts)
            optimizers[1].load_state_dict(state)
        give_slopes((whole, parts), step, 2)
        for optimizer in optimizers:
            optimizer.step()
    assert apart(whole, parts) < 1e-12


@pytest.mark.parametrize("kind", [*KINDS, Lion], ids=lambda kind: kind.__name__)
def test_closure_groups_added_later_and_copies(kind):
    first, later = leaves([(2, 3), (3, 3)], 3)
    optimizer = kind([first], lr=0.1)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(torch.is_grad_enabled())
        loss = (first**2).sum() + (later**2).sum()
        loss.backward()
        return loss

    value, before = optimizer.step(closure), later.clone()
    assert value.requires_grad and seen == [True] and torch.equal(before, later)
    optimizer.add_param_group({"params": [later], "lr": 0.02})
    with torch.no_grad():
        optimizer.step(closure)
    assert seen == [True, True]
    assert not torch.equal(before, later)
    assert first.requires_grad
    assert first.is_leaf
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert set(optimizer.param_groups[0]) == set(optimizer.param_groups[1])
    twin = copy.deepcopy(optimizer)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("kind", [*KINDS, Lion], ids=lambda kind: kind.__name__)
def test_a_walk_down_arrives_and_a_walk_up_mirrors_it(kind):
    down, up = leaves([(3, 4)], 4) + leaves([(3, 4)], 4)
    down_by = kind([down], lr=0.02, weight_decay=0)
    up_by = kind([up], lr=0.02, weight_decay=0, maximize=True)
    start = down.square().sum().item()
    for _ in range(300):
        down.grad, up.grad = down.detach().clone(), -up.detach()
        down_by.step()
        up_by.step()
    assert torch.equal(down, up) and down.square().sum() < 0.05 * start


# Lion, which torch has not


def lion_by_the_paper(theta, slopes, lr, betas, decay):
    """Algorithm 2 of Chen et al. 2023, in NumPy."""
    m = np.zeros_like(theta)
    for g in slopes:
        c = betas[0] * m + (1 - betas[0]) * g
        theta = theta - lr * (np.sign(c) + decay * theta)
        m = betas[1] * m + (1 - betas[1]) * g
    return theta, m


@given(
    st.lists(st.integers(1, 4), max_size=3),
    rates,
    st.tuples(shares, shares),
    decays,
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_lion_is_the_formula_of_the_paper(shape, rate, betas, decay, seed):
    generator = np.random.default_rng(seed)
    theta, slopes = generator.normal(size=shape), generator.normal(size=(20, *shape))
    parameter = torch.tensor(theta)
    optimizer = Lion([parameter], rate, betas, decay)
    for slope in slopes:
        parameter.grad = torch.tensor(slope)
        optimizer.step()
    expected, mean = lion_by_the_paper(theta, slopes, rate, betas, decay)
    assert np.allclose(parameter, expected, rtol=1e-12, atol=1e-12)
    assert np.allclose(optimizer.state[parameter]["exp_avg"], mean, atol=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
def test_lion_moves_each_coordinate_by_its_rate_or_not_at_all(dtype):
    parameter = torch.zeros(6, dtype=dtype)
    parameter.grad = torch.tensor([3.0, -1e-3, 0.0, 1e4, -2.0, 0.0], dtype=dtype)
    Lion([parameter], lr=0.5).step()
    assert parameter.tolist() == [-0.5, 0.5, 0.0, -0.5, 0.5, 0.0]
    assert parameter.dtype == dtype


def test_lion_equals_the_package_lion_pytorch():
    package = pytest.importorskip(
        "lion_pytorch", reason="needs lion-pytorch, which is no dependency"
    )
    copies = leaves([(4, 3), (5,)], 5), leaves([(4, 3), (5,)], 5)
    optimizers = [
        make(parameters, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
        for make, parameters in zip((Lion, package.Lion), copies)
    ]
    for step in range(20):
        give_slopes(copies, step, 5)
        for optimizer in optimizers:
            optimizer.step()
        assert apart(*copies) < 1e-12


# Muon's matrix


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_newton_schulz_keeps_the_vectors_and_maps_the_values(
    rows, columns, steps, seed
):
    matrix = torch.randn(
        rows,
        columns,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = sizes / matrix.norm()
    for _ in range(steps):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    found = newton_schulz(matrix, steps=steps, dtype=torch.float64)
    assert found.shape == matrix.shape
    assert torch.allclose(found, u * expected @ v, atol=1e-10)
    short = newton_schulz(matrix, steps=steps)
    reference = torch.optim._muon._zeropower_via_newtonschulz(
        matrix, (3.4445, -4.775, 2.0315), steps, 1e-7
    )
    assert short.dtype == torch.bfloat16 and torch.equal(short, reference)


def test_newton_schulz_reaches_the_polar_factor_with_coefficients_that_converge():
    matrix = torch.randn(
        7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(
        newton_schulz(matrix, (1.5, -0.5, 0.0), steps=60, dtype=torch.float64),
        u @ v,
        atol=1e-12,
    )
    assert torch.equal(
        newton_schulz(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.bfloat16)
    )
    with pytest.raises(
        ValueError, match=r"input has shape \(3,\); allowed is a matrix"
    ):
        newton_schulz(torch.ones(3))


# What cannot work

ONE = lambda: [torch.ones(2, 2, requires_grad=True)]  # noqa: E731


@pytest.mark.parametrize(
    "make, error, sentence",
    [
        (
            lambda: SGD([]),
            ValueError,
            "params is empty; allowed is at least one parameter",
        ),
        (lambda: Adam(iter(())), ValueError, "params is empty"),
        (
            lambda: SGD(ONE(), lr=-0.1),
            ValueError,
            "lr is -0.1; allowed is a finite number of at least 0",
        ),
        (lambda: SGD(ONE(), lr=math.nan), ValueError, "lr is nan; allowed"),
        (lambda: SGD(ONE(), lr=math.inf), ValueError, "lr is inf; allowed"),
        (lambda: SGD(ONE(), lr="0.1"), TypeError, "lr is '0.1'; allowed is a number"),
        (lambda: SGD(ONE(), momentum=-1), ValueError, "momentum is -1; allowed"),
        (
            lambda: SGD(ONE(), nesterov=True),
            ValueError,
            "nesterov is set with momentum 0 and dampening 0;"
            " allowed is a momentum above 0",
        ),
        (
            lambda: SGD(ONE(), momentum=0.9, dampening=0.1, nesterov=True),
            ValueError,
            "nesterov is set with momentum 0.9 and dampening 0.1",
        ),
        (
            lambda: RMSprop(ONE(), alpha=1.5),
            ValueError,
            "alpha is 1.5; allowed is a number from 0 to 1",
        ),
        (lambda: RMSprop(ONE(), eps=-1e-8), ValueError, "eps is -1e-08; allowed"),
        (
            lambda: Adam(ONE(), betas=(0.9, 1.0)),
            ValueError,
            r"betas is \(0.9, 1.0\);"
            " allowed are two numbers, each at least 0 and below 1",
        ),
        (
            lambda: AdamW(ONE(), weight_decay=-1),
            ValueError,
            "weight_decay is -1; allowed",
        ),
        (lambda: Lion(ONE(), betas=(-0.1, 0.9)), ValueError, r"betas is \(-0.1, 0.9\)"),
        (
            lambda: Lion(ONE(), betas=(0.9,)),
            ValueError,
            r"betas is \(0.9,\); allowed are two",
        ),
        (
            lambda: Adam([torch.ones(2, dtype=torch.complex64)]),
            TypeError,
            "params holds a tensor of torch.complex64; allowed are real",
        ),
        (
            lambda: Muon([torch.ones(3)]),
            ValueError,
            r"params holds a tensor of shape \(3,\); allowed are matrices",
        ),
        (
            lambda: Muon([torch.ones(3, 0)]),
            ValueError,
            r"params holds a tensor of shape \(3, 0\)",
        ),
        (
            lambda: Muon(ONE(), ns_steps=100),
            ValueError,
            "ns_steps is 100; allowed is an integer from 0 to 99",
        ),
        (
            lambda: Muon(ONE(), ns_coefficients=(1.0, 2.0)),
            ValueError,
            "ns_coefficients is .*; allowed are three numbers",
        ),
        (
            lambda: Muon(ONE(), adjust_lr_fn="half"),
            ValueError,
            "adjust_lr_fn is 'half'; allowed are None and original, match_rms_adamw",
        ),
        (
            lambda: Adam([{"params": ONE(), "lr": -1.0}]),
            ValueError,
            "lr is -1.0; allowed",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_refused_group_is_not_added():
    optimizer = Muon(ONE())
    with pytest.raises(ValueError, match="allowed are matrices"):
        optimizer.add_param_group({"params": [torch.ones(3)]})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_moves():
    embedding, bias = nn.Embedding(4, 2, sparse=True), torch.ones(2, requires_grad=True)
    (embedding(torch.tensor([1])).sum() + bias.sum()).backward()
    optimizer = Adam([bias, embedding.weight])
    with pytest.raises(
        TypeError,
        match="a gradient has the layout torch.sparse_coo; allowed are dense gradients",
    ):
        optimizer.step()
    assert torch.equal(bias, torch.ones(2)) and not optimizer.state


def test_a_rate_may_be_a_tensor():
    copies = leaves([(3,)], 6), leaves([(3,)], 6)
    optimizers = [
        make(each, lr=torch.tensor(0.05))
        for make, each in zip((Adam, torch.optim.Adam), copies)
    ]
    for step in range(5):
        give_slopes(copies, step, 6)
        for optimizer in optimizers:
            optimizer.step()
    assert apart(*copies) < 1e-7


# Theory


@given(st.floats(1.5, 1000), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_gradient_descent_contracts_as_theory_says(condition, seed):
    bends = torch.tensor([1.0, condition], dtype=torch.float64)
    (point,) = leaves([(2,)], seed)
    optimizer, start = SGD([point], lr=2 / (condition + 1)), point.detach().clone()
    for _ in range(10):
        point.grad = bends * point.detach()
        optimizer.step()
    factor = (condition - 1) / (condition + 1)
    assert torch.allclose(point.abs(), start.abs() * factor**10, rtol=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.01, 2.5), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_momentum_is_a_linear_recurrence(momentum, bend, steps):
    point = torch.ones(1, dtype=torch.float64)
    optimizer = SGD([point], lr=1.0, momentum=momentum)
    for _ in range(steps):
        point.grad = bend * point
        optimizer.step()
    matrix = np.array([[1 + momentum - bend, -momentum], [1, 0]])
    expected = (np.linalg.matrix_power(matrix, steps) @ [1.0, 1.0])[0]
    assert point.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.floats(2, 500), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_nesterov_stays_below_its_bound(condition, seed):
    bends, root = torch.tensor([1.0, condition], dtype=torch.float64), condition**0.5
    (point,) = leaves([(2,)], seed)
    bound = (condition + 1) / 2 * point.detach().square().sum().item()
    optimizer = SGD(
        [point], lr=1 / condition, momentum=(root - 1) / (root + 1), nesterov=True
    )
    for step in range(1, 80):
        point.grad = bends * point.detach()
        optimizer.step()
        before_look = (
            point.detach()
            + optimizer.state[point]["momentum_buffer"]
            * (root - 1)
            / (root + 1)
            / condition
        )
        assert (bends * before_look**2).sum().item() / 2 <= bound * (
            1 - 1 / root
        ) ** step + 1e-300


# Rates over time


@given(st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_warmup_cosine_is_its_formula_and_transformers_schedule(warmup, rest, final):
    from transformers import get_cosine_schedule_with_warmup

    total, optimizers = warmup + rest, [SGD([torch.zeros(1)], lr=0.3) for _ in range(2)]
    schedules = (
        warmup_cosine(optimizers[0], warmup, total, final),
        get_cosine_schedule_with_warmup(optimizers[1], warmup, total),
    )
    assert isinstance(schedules[0], torch.optim.lr_scheduler.LambdaLR)
    for step in range(total + 5):
        progress = min(1.0, (step - warmup) / rest)
        share = (
            step / warmup
            if step < warmup
            else final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        )
        ours, other = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        assert ours == pytest.approx(0.3 * share, abs=1e-15)
        if final == 0 and step <= total:
            assert ours == pytest.approx(other, abs=1e-15)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()


def test_warmup_cosine_goes_on_from_a_saved_state_and_refuses_what_cannot_work():
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    schedule = warmup_cosine(optimizer, 2, 10, final=0.1)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    file = io.BytesIO()
    torch.save((schedule.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    states, other = torch.load(file, weights_only=True), SGD([torch.zeros(1)], lr=1.0)
    again = warmup_cosine(other, 2, 10, final=0.1)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for each, one in ((schedule, optimizer), (again, other)):
        one.step()
        each.step()
    assert (
        optimizer.param_groups[0]["lr"]
        == other.param_groups[0]["lr"]
        == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    )
    for steps in ((10, 10), (-1, 5)):
        with pytest.raises(
            ValueError,
            match=f"warmup_steps is {steps[0]} and total_steps {steps[1]};"
            " allowed are 0 <= warmup_steps < total",
        ):
            warmup_cosine(optimizer, *steps)
    with pytest.raises(
        ValueError, match="final is 1.5; allowed is a number from 0 to 1"
    ):
        warmup_cosine(optimizer, 1, 5, final=1.5)


# The range test


def batches(count=6, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count * size, 5, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
    return torch.utils.data.DataLoader(
        data, size, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2)
    )


def everything(model, optimizer, loader):
    """All that a range test could have changed, to the bit."""
    tensors = [
        *model.state_dict().values(),
        *(each.grad for each in model.parameters() if each.grad is not None),
        *(value for state in optimizer.state.values() for value in state.values()),
        torch.get_rng_state(),
        loader.generator.get_state(),
    ]
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    places = [each.data_ptr() for each in model.parameters()]
    return [tensor.clone() for tensor in tensors], [
        groups,
        places,
        [module.training for module in model.modules()],
        random.getstate(),
    ]


def used(kind=Adam):
    """A model in the middle of its training, with gradients not yet used.

    It is partly in evaluation mode.
    """
    model, loader = net(), batches()
    optimizer = kind(model.parameters(), lr=0.01)
    for input, target in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(input), target).backward()
        optimizer.step()
    model[1].eval()
    return model, optimizer, loader


@pytest.mark.parametrize(
    "end",
    [None, ValueError, KeyboardInterrupt],
    ids=["finished", "exception", "Ctrl-C"],
)
def test_a_range_test_leaves_no_trace(end):
    model, optimizer, loader = used()
    tensors, rest = everything(model, optimizer, loader)
    calls = itertools.count()

    def loss(output, target):
        if end is not None and next(calls) == 20:
            raise end("now")
        return F.cross_entropy(output, target)

    if end is None:
        lr_range_test(model, loader, loss, optimizer, steps=30)
    else:
        with pytest.raises(end, match="now"):
            lr_range_test(model, loader, loss, optimizer, steps=30)
    after, rest_after = everything(model, optimizer, loader)
    assert rest == rest_after and len(tensors) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(tensors, after))


def test_a_range_test_trains_at_rising_rates_and_repeats_itself():
    model, optimizer, loader = used(SGD)
    found = lr_range_test(
        model, loader, F.cross_entropy, optimizer, lowest=1e-4, highest=1.0, steps=25
    )
    assert np.allclose(np.diff(np.log(found.rates)), math.log(1e4) / 24)
    assert found.rates[0] == 1e-4
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert (
        lr_range_test(
            model,
            loader,
            F.cross_entropy,
            optimizer,
            lowest=1e-4,
            highest=1.0,
            steps=25,
        )
        == found
    )
    made = lr_range_test(
        model, loader, F.cross_entropy, SGD, lowest=1e-4, highest=1.0, steps=25
    )
    # SGD without momentum has no state, so one that is made anew walks alike
    assert made == found
    by_hand, mean = [], 0.0
    for step, loss in enumerate(found.losses, 1):
        mean = 0.9 * mean + 0.1 * loss
        by_hand.append(mean / (1 - 0.9**step))
    assert np.allclose(found.smoothed, by_hand)
    assert found.suggestion == found.rates[int(np.argmin(found.smoothed))] / 10


def test_a_range_test_is_the_plain_loop():
    """The losses are those of a loop that sets the rate by hand."""
    model, _, _ = used()
    data = [(torch.randn(4, 5), torch.randint(0, 2, (4,))) for _ in range(3)]
    model[2].p = 0.0  # dropout off: nothing random
    found = lr_range_test(
        model, data, F.cross_entropy, Adam, lowest=1e-3, highest=0.1, steps=7
    )
    twin, losses = copy.deepcopy(model).train(), []
    optimizer = Adam(twin.parameters())
    for rate, (input, target) in zip(found.rates, itertools.cycle(data)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(input), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert found.losses == losses


def test_a_range_test_stops_where_the_loss_diverges_and_keeps_proportions_of_groups():
    weight = nn.Linear(1, 1, bias=False)
    data = [(torch.ones(4, 1), torch.zeros(4, 1))]
    found = lr_range_test(
        weight, data, F.mse_loss, SGD, lowest=1e-3, highest=1e3, steps=60, smoothing=0.0
    )
    assert found.diverged
    assert len(found.losses) < 60
    assert found.losses[-1] <= 4 * min(found.losses)
    assert found.suggestion < 1.0  # the loss is w², its limit the rate 1
    calm = lr_range_test(
        weight,
        data,
        F.mse_loss,
        SGD,
        lowest=1e-6,
        highest=1e-5,
        steps=10,
        smoothing=0.0,
    )
    assert not calm.diverged and len(calm.losses) == 10
    seen = []

    class Watched(SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    model = nn.Linear(5, 2)
    optimizer = Watched(
        [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias], "lr": 0.02}]
    )
    lr_range_test(
        model, batches(), F.cross_entropy, optimizer, lowest=1e-4, highest=1e-2, steps=5
    )
    assert np.allclose([one / other for one, other in seen], 10)
    assert np.allclose(seen[-1], [1e-2, 1e-3])


def test_a_loss_that_never_falls_suggests_nothing():
    model = nn.Linear(1, 1, bias=False)
    found = lr_range_test(
        model,
        [(torch.ones(1, 1), torch.zeros(1, 1))],
        lambda output, _: -output.abs().sum().exp() + 1e3,
        lambda ps: SGD(ps, maximize=True),
        steps=5,
        highest=1e-3,
    )
    assert found.suggestion is None


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            dict(lowest=0.0),
            "lowest is 0.0, highest 10.0 and steps 100;"
            " allowed are 0 < lowest < highest",
        ),
        (dict(lowest=1.0, highest=0.1), "lowest is 1.0, highest 0.1"),
        (dict(steps=1), "steps 1; allowed are .* at least 2 steps"),
        (dict(smoothing=1.0), "smoothing is 1.0 and divergence 4.0; allowed"),
        (dict(divergence=1.0), "divergence 1.0; allowed"),
        (dict(loader=[]), "loader gave no batch; allowed is at least one"),
        (dict(loader=[torch.ones(2, 5)]), "loader gives a Tensor; allowed are pairs"),
        (
            dict(optimizer=SGD([torch.ones(2, requires_grad=True)])),
            "optimizer holds no parameter of model; allowed",
        ),
    ],
)
def test_a_range_test_that_cannot_work_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        lr_range_test(
            **{
                "model": net(),
                "loader": batches(),
                "loss": F.cross_entropy,
                "optimizer": SGD,
            }
            | arguments
        )


class Named(nn.Module):
    """Takes its input by name and wraps its logits, as transformers do.

    `pooler` is never used.
    """

    def __init__(self):
        super().__init__()
        self.inner, self.pooler = nn.Linear(5, 2), nn.Linear(5, 5)

    def forward(self, features):
        return type("Output", (), {"logits": self.inner(features)})()


def test_inputs_by_name_are_taken():
    torch.manual_seed(0)
    model = Named()
    named, plain = (
        [(wrap(input), target) for input, target in batches()]
        for wrap in (lambda input: {"features": input}, lambda input: input)
    )
    arguments = dict(
        loss=F.cross_entropy, optimizer=partial(SGD, momentum=0.9), steps=20
    )
    assert lr_range_test(model, named, **arguments) == lr_range_test(
        model.inner, plain, **arguments
    )


def test_noise_takes_inputs_by_name_and_a_parameter_without_use():
    torch.manual_seed(0)
    model, data = Named(), list(batches())
    found = gradient_noise(
        model,
        [({"features": input}, target) for input, target in data],
        F.cross_entropy,
    )
    assert found == gradient_noise(model.inner, data, F.cross_entropy)


def samplers(data):
    """Loaders whose random numbers come from a generator of their sampler."""
    generator = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    yield torch.utils.data.DataLoader(data, 8, sampler=sampler), generator
    yield (
        torch.utils.data.DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(sampler, 8, False)
        ),
        generator,
    )
    weighted = torch.utils.data.WeightedRandomSampler(
        torch.ones(len(data)), len(data), generator=generator
    )
    yield torch.utils.data.DataLoader(data, 8, sampler=weighted), generator


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(
    "look",
    [lambda *given: lr_range_test(*given, SGD, steps=5), gradient_noise],
    ids=["range test", "noise"],
)
def test_a_generator_of_the_sampler_goes_on_as_before(look, which):
    loader, generator = list(samplers(batches().dataset))[which]
    before = generator.get_state()
    look(net(), loader, F.cross_entropy)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 5), (torch.ones(2, 5),), {"features": torch.ones(2, 5)}]
)
def test_batches_that_are_no_pairs_are_refused_by_both(batch):
    for look in (lambda *given: lr_range_test(*given, SGD), gradient_noise):
        with pytest.raises(
            ValueError,
            match=f"loader gives a {type(batch).__name__}.*; allowed are pairs",
        ):
            look(net(), [batch, batch], F.cross_entropy)


# Clipping


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4),
    st.floats(0, 20),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_clipping_equals_torch(shapes, longest, seed):
    copies = leaves(shapes, seed), leaves(shapes, seed)
    give_slopes(copies, 0, seed)
    lengths = (
        clip_grad_norm_(copies[0], longest),
        nn.utils.clip_grad_norm_(copies[1], longest),
    )
    assert torch.allclose(*(length.double() for length in lengths), rtol=1e-12)
    slopes = [
        [each.grad for each in parameters if each.grad is not None]
        for parameters in copies
    ]
    assert not slopes[0] or apart(*slopes) < 1e-12
    assert (
        math.sqrt(sum(slope.square().sum().item() for slope in slopes[0]))
        <= max(longest, 0) + 1e-9
    )


def test_clipping_takes_one_tensor_and_refuses_a_negative_length():
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_(parameter, 1.0) == 5.0
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-6)
    assert clip_grad_norm_([torch.zeros(1)], 1.0) == 0.0
    with pytest.raises(
        ValueError, match="max_norm is -1; allowed is a number of at least 0"
    ):
        clip_grad_norm_(parameter, -1)


# Noise


def linear_problem(examples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 1, dtype=torch.float64)
    inputs = torch.randn(examples, 3, dtype=torch.float64, generator=generator)
    targets = torch.randn(examples, 1, dtype=torch.float64, generator=generator)
    singles = []
    for row in range(examples):
        slopes = torch.autograd.grad(
            F.mse_loss(model(inputs[row : row + 1]), targets[row : row + 1]),
            list(model.parameters()),
        )
        singles.append(torch.cat([slope.flatten() for slope in slopes]))
    return model, inputs, targets, torch.stack(singles)


@given(st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_noise_of_single_examples_is_exact(examples, seed):
    model, inputs, targets, singles = linear_problem(examples, seed)
    found = gradient_noise(
        model, list(zip(inputs.split(1), targets.split(1))), F.mse_loss
    )
    trace, mean = singles.var(0).sum().item(), singles.mean(0).square().sum().item()
    assert found.variance == pytest.approx(trace, rel=1e-9)
    assert found.squared_gradient == pytest.approx(
        mean - trace / examples, rel=1e-9, abs=1e-12
    )
    assert (found.batch_size, found.batches) == (1, examples)
    assert found.scale == (
        found.variance / found.squared_gradient
        if found.squared_gradient > 0
        else math.inf
    )


def pairings(rows):
    """All ways to part `rows` into pairs."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for place, other in enumerate(rest):
        for pairs in pairings(rest[:place] + rest[place + 1 :]):
            yield [(first, other), *pairs]


def test_noise_of_batches_is_right_on_average_over_all_partitions():
    """All 15 ways to part six examples into three batches.

    Their mean is the exact variance, not merely near it.
    """
    model, inputs, targets, singles = linear_problem(6)
    found = [
        gradient_noise(
            model,
            [(inputs[list(pair)], targets[list(pair)]) for pair in pairs],
            F.mse_loss,
        ).variance
        for pairs in pairings(list(range(6)))
    ]
    assert len(found) == 15
    assert np.mean(found) == pytest.approx(singles.var(0).sum().item(), rel=1e-10)


def test_noise_is_right_on_average_over_all_draws_with_replacement():
    """All 81 ways to draw two batches of two from three examples with replacement.

    Both estimates are exact on average.
    """
    model, inputs, targets, singles = linear_problem(3)
    found = []
    for rows in itertools.product(range(3), repeat=4):
        two = [list(rows[:2]), list(rows[2:])]
        found.append(
            gradient_noise(
                model, [(inputs[each], targets[each]) for each in two], F.mse_loss
            )
        )
    trace = singles.var(0, correction=0).sum().item()
    assert np.mean([each.variance for each in found]) == pytest.approx(trace, rel=1e-10)
    assert np.mean([each.squared_gradient for each in found]) == pytest.approx(
        singles.mean(0).square().sum().item(), rel=1e-10
    )


def test_looking_at_noise_leaves_no_trace_and_refuses_too_little():
    model, optimizer, loader = used()
    model.train()
    tensors, rest = everything(model, optimizer, loader)
    assert gradient_noise(model, loader, F.cross_entropy).batches == 6
    after, rest_after = everything(model, optimizer, loader)
    assert rest == rest_after
    assert all(torch.equal(one, other) for one, other in zip(tensors, after))
    uneven = [
        (torch.randn(size, 5), torch.randint(0, 2, (size,))) for size in (4, 4, 3)
    ]
    assert gradient_noise(net(), uneven, F.cross_entropy).batches == 2
    with pytest.raises(
        ValueError, match="loader gave 1 batches of one size; allowed are at least two"
    ):
        gradient_noise(net(), uneven[1:], F.cross_entropy)
    with pytest.raises(
        ValueError, match="model has no parameter that requires a gradient"
    ):
        gradient_noise(nn.Flatten(), loader, F.cross_entropy)


@every_kind
def test_signatures_are_torchs(kind):
    """What is given by position has torch's names and order, all torch's defaults.

    Muon alone has one option more.
    """
    ours, other = (inspect.signature(each).parameters for each in (kind, theirs(kind)))
    by_position = [
        name for name, each in ours.items() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    assert by_position == list(other)[: len(by_position)]
    assert set(ours) - set(other) == ({"maximize"} if kind is Muon else set())
    assert all(
        ours[name].default == other[name].default for name in set(ours) & set(other)
    )


def test_all_is_exported():
    names = (
        "SGD RMSprop Adam AdamW Lion Muon newton_schulz RangeTest lr_range_test"
        " warmup_cosine GradientNoise gradient_noise clip_grad_norm_"
    )
    assert set(optim.__all__) == set(names.split())


def expect_optim(m):
    """What the lesson must find at the quick budget."""
    assert m["largest_difference_from_torch"] < 1e-12, (
        "the optimisers take torch's steps"
    )
    assert m["closed_form_difference"] < 1e-12, (
        "momentum is a linear recurrence, solved by its roots"
    )
    assert m["contraction_error"] < 1e-3, "theory names the factor of a step"
    exponents = m["exponents_of_steps"]
    assert abs(exponents["gradient descent"] - 1) < 0.1, (
        "gradient descent needs steps as the condition number"
    )
    assert all(
        abs(exponents[kind] - 0.5) < 0.1 for kind in ("heavy ball", "Nesterov")
    ), "momentum as its root"
    low, high = m["newton_schulz_band"]
    assert 0.6 < low < 1 < high < 1.3, (
        "five steps bring singular values into a band around 1"
    )
    assert m["newton_schulz_limit_difference"] < 1e-12, (
        "coefficients that converge lead to the polar factor"
    )
    assert m["scale_free_difference"] < 1e-5, (
        "RMSProp does not depend on the scale of a coordinate"
    )
    assert max(m["schedule_difference"], m["clip_difference"]) < 1e-12, (
        "schedule and clipping are the library's"
    )
    assert m["noise_difference"] < 1e-5, (
        "the estimate from batches of one example is exact"
    )
    assert (
        abs(m["variance_exponent"] + 1) < 0.05 and m["variance_largest_deviation"] < 0.3
    ), "variance falls as one over the batch"
    decay = m["weights_after_decay"]
    assert decay["penalty"][0] > 0.7 and decay["penalty"][1] < 0.05, (
        "an L2 penalty under Adam decays by the size of the gradient"
    )
    assert all(abs(weight - decay["due"]) < 0.1 for weight in decay["decoupled"]), (
        "decoupled weight decay does not"
    )
    far = m["distance_from_minimum"]
    assert all(
        distance > 0.03
        for name, distance in far.items()
        if name.startswith(("Lion", "Muon"))
    ), "steps of fixed size do not settle"
    accuracy = m["test_accuracy"]
    assert accuracy["Adam"] > 0.94 and accuracy["Muon, AdamW"] > 0.94, (
        "tuned, they train the net"
    )
    assert accuracy["Adam"] > accuracy["gradient descent"] + 0.05, (
        "in few steps gradient descent is far behind"
    )
    assert all(
        m["gain_over_gradient_descent"][name]["low"] > 0
        for name in ("Adam", "Muon, AdamW")
    ), "beyond what seeds change"


@pytest.mark.parametrize("shape", [(3, 10), (64, 64), (96, 40)])
def test_slow_bfloat16_is_computed_in_float32_and_rounded_alike(monkeypatch, shape):
    torch.manual_seed(0)
    matrix, found = torch.randn(*shape), []
    for native in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(optim, "best_dtype", lambda device, native=native: native)
        found.append(newton_schulz(matrix))
    assert all(each.dtype == torch.bfloat16 for each in found)
    apart = (found[0].float() - found[1].float()).norm() / found[0].float().norm()
    assert apart < 0.02, "both differ by a few roundings"
    exact = newton_schulz(matrix, dtype=torch.float64)
    far = [(each.double() - exact).norm() / exact.norm() for each in found]
    assert far[1] < 2 * far[0] + 0.01, "neither is nearer to the exact one"
