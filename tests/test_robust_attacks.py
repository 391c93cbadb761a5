"""Chapter 6, attacks: closed forms in three balls with their box.

Laws of random starts, invariances, and what a copy may cost.
"""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torchvision.models import resnet18

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    CarliniWagner,
    DeepFool,
    EnsembleAttack,
    MomentumPGD,
    Square,
    _best_change,
    _copied,
    _judged,
    _least_change,
    _losses,
    _margin,
    _project,
    _Quick,
    _random_change,
    _side,
    _size,
    robust_accuracy,
    robustness_curve,
)
from bigmodel_nb.training.loop import fit

NORMS = ["linf", "l2", "l1"]
CLIMBERS = [PGD, MomentumPGD, APGD]
SEEKERS = (
    [(DeepFool, norm) for norm in NORMS]
    + [(FAB, norm) for norm in NORMS]
    + [(CarliniWagner, "l2")]
)
ACROSS = {
    "linf": lambda d: 1.0,
    "l2": lambda d: d**0.5,
    "l1": lambda d: float(d),
}  # the size of the box's diagonal


def linear(d=20, classes=2, seed=0):
    """A linear model whose weights differ much in size."""
    torch.manual_seed(seed)
    model = nn.Linear(d, classes).double()
    with torch.no_grad():
        model.weight.mul_(torch.randn_like(model.weight) ** 2)
    return model


def examples(n=12, d=20, seed=1):
    """Half of the entries at an edge of the box."""
    return (
        torch.rand(
            n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        * 2
        - 0.5
    ).clamp(0, 1)


def best_gain(w, x, eps, norm, bounds=(0.0, 1.0)):
    """The largest rise of w·x in ball and box, w (batch, d), eps (batch,).

    Entry by entry, by greedy filling, or by a search of the multiplier.
    """
    room, steep = torch.where(w > 0, bounds[1] - x, x - bounds[0]), w.abs()
    if norm == "linf":
        return (steep * torch.minimum(room, eps[:, None])).sum(1)
    if norm == "l1":
        total, left = torch.zeros(len(x), dtype=x.dtype), eps.clone()
        for column in steep.argsort(dim=1, descending=True).unbind(1):
            bought = torch.minimum(left, room.gather(1, column[:, None])[:, 0])
            total, left = (
                total + bought * steep.gather(1, column[:, None])[:, 0],
                left - bought,
            )
        return total
    low, high = torch.zeros_like(eps), torch.full_like(eps, 1e9)
    for _ in range(90):
        middle = (low + high) / 2
        inside = torch.minimum(middle[:, None] * steep, room).norm(dim=1) <= eps
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (torch.minimum(low[:, None] * steep, room) * steep).sum(1)


def exact_distance(model, x, y, norm, bounds=(0.0, 1.0)):
    """(batch,) the smallest radius at which a class catches up with y, or infinity."""
    weight, logits, found = (
        model.weight.detach(),
        model(x).detach(),
        torch.full((len(x),), math.inf, dtype=x.dtype),
    )
    for target in range(len(weight)):
        w, lead = (
            weight[target] - weight[y],
            logits.gather(1, y[:, None])[:, 0] - logits[:, target],
        )
        low, high = (
            torch.zeros_like(found),
            torch.full_like(found, (bounds[1] - bounds[0]) * ACROSS[norm](x.shape[1])),
        )
        possible = (best_gain(w, x, high, norm, bounds) >= lead) & (y != target)
        for _ in range(45):
            middle = (low + high) / 2
            enough = best_gain(w, x, middle, norm, bounds) >= lead
            low, high = (
                torch.where(enough, low, middle),
                torch.where(enough, middle, high),
            )
        found = torch.where(possible, torch.minimum(found, high), found)
    return found


# --- the closed forms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("d", [4, 64])
def test_climbers_reach_the_optimum_of_a_linear_model_box_included(norm, share, d):
    eps, seed = share * ACROSS[norm](d), d + int(100 * share)
    model, x, y = (
        linear(d, seed=seed),
        examples(24, d, seed),
        torch.zeros(24, dtype=torch.long),
    )
    w = (model.weight[1] - model.weight[0]).detach()
    best = best_gain(w.expand_as(x), x, torch.full((24,), eps, dtype=x.dtype), norm)
    for attack in (
        FGSM(eps, norm),
        *(kind(eps, norm) for kind in CLIMBERS),
        PGD(eps, norm, loss="dlr"),
        APGD(eps, norm, loss="margin"),
    ):
        found = attack(model, x, y)
        gain = (found - x) @ w
        assert (gain >= 0.9999 * best - 1e-12).all(), type(attack).__name__
        assert (gain <= best * (1 + 1e-9) + 1e-12).all() and (
            _size(found - x, norm) <= eps * (1 + 1e-9)
        ).all()
        assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2), ("l1", math.inf)])
def test_fgsm_without_a_box_gains_the_dual_norm(norm, dual):
    model, x = linear(), examples()
    w = (model.weight[1] - model.weight[0]).detach()
    found = FGSM(0.3, norm, bounds=(-50.0, 50.0))(
        model, x, torch.zeros(12, dtype=torch.long)
    )
    assert ((found - x) @ w / (0.3 * w.norm(p=dual))).sub(1).abs().max() < 1e-9


def test_square_gains_more_with_more_queries_and_asks_for_no_gradient():
    model, x, y = linear(64), examples(16, 64), torch.zeros(16, dtype=torch.long)
    w = (model.weight[1] - model.weight[0]).detach()
    for norm, least in (("linf", 0.98), ("l2", 0.5), ("l1", 0.3)):
        eps = 0.2 * ACROSS[norm](64)
        best = best_gain(w.expand_as(x), x, torch.full((16,), eps, dtype=x.dtype), norm)
        few, many = (
            ((Square(eps, norm, queries=queries)(model, x, y) - x) @ w / best).mean()
            for queries in (30, 800)
        )
        assert few + 0.1 < many <= 1 + 1e-9 and many > least, norm


@pytest.mark.parametrize("kind, norm", SEEKERS)
@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-100.0, 101.0)])
def test_seekers_fool_every_example_at_the_exact_distance(kind, norm, classes, bounds):
    for seed, d in ((8, 6), (1, 40)):
        model, x = linear(d, classes, seed), examples(12, d, seed)
        y = model(x).argmax(1)
        exact = exact_distance(model, x, y, norm, bounds)
        found = kind(norm=norm, bounds=bounds)(model, x, y)
        can = exact < math.inf
        assert (model(found).argmax(1) != y)[can].all() and torch.equal(
            found[~can], x[~can]
        )
        ratio = (_size(found - x, norm) / exact)[can]
        assert not len(ratio) or ratio.max() <= 1.005 and ratio.min() >= 1 - 1e-6


@pytest.mark.parametrize("kind, norm", SEEKERS)
def test_seekers_give_back_what_is_too_far_and_what_is_misread(kind, norm):
    model, x = linear(20, 4, 3), examples(30, 20, 4)
    y = torch.where(
        torch.arange(30) < 25, model(x).argmax(1), (model(x).argmax(1) + 1) % 4
    )
    exact = exact_distance(model, x, y, norm)
    eps = exact[:25].median().item()
    found = kind(eps, norm)(model, x, y)
    near, far = exact * 1.005 < eps, exact > eps
    assert (
        near[:25].any()
        and far.any()
        and torch.equal(found[25:], x[25:])
        and torch.equal(found[far], x[far])
    )
    assert (model(found).argmax(1) != y)[near].all() and (
        _size(found - x, norm) <= eps * (1 + 1e-12)
    ).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NORMS),
    st.integers(0, 10_000),
    st.floats(0.01, 1.0),
    st.integers(1, 8),
)
def test_projection_has_no_better_neighbour(norm, seed, share, d):
    # the projection p of c satisfies (c - p)·(z - p) <= 0 for every allowed z
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(1, d, dtype=torch.float64, generator=generator) - 0.5).clamp(
        0, 1
    )
    change, eps = (
        2 * torch.randn(1, d, dtype=torch.float64, generator=generator),
        share * ACROSS[norm](d),
    )
    nearest = _project(change, x, eps, norm, (0.0, 1.0))
    assert (
        _size(nearest, norm) <= eps * (1 + 1e-9)
        and (x + nearest >= -1e-15).all()
        and (x + nearest <= 1 + 1e-15).all()
    )
    steepest = best_gain(
        change - nearest, x, torch.full((1,), eps, dtype=torch.float64), norm
    )  # the largest (c - p)·z
    assert steepest - ((change - nearest) * nearest).sum() <= 1e-7


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NORMS), st.integers(0, 10_000), st.floats(0.02, 0.98))
def test_least_and_best_change_are_two_sides_of_one_path(norm, seed, share):
    generator = torch.Generator().manual_seed(seed)
    x, gradient = (
        examples(3, 7, seed),
        torch.randn(3, 7, dtype=torch.float64, generator=generator) ** 3,
    )
    eps = share * ACROSS[norm](7)
    best = _best_change(gradient, x, eps, norm, (0.0, 1.0))
    gain = (gradient * best).sum(1)
    assert torch.allclose(
        gain,
        best_gain(gradient, x, torch.full((3,), eps, dtype=x.dtype), norm),
        rtol=1e-9,
    )
    least = _least_change(gradient, 0.9 * gain, x, norm, (0.0, 1.0))
    assert (
        torch.allclose((gradient * least).sum(1), 0.9 * gain, rtol=1e-6)
        and (_size(least, norm) <= eps * (1 + 1e-9)).all()
    )


# --- random starts


@pytest.mark.parametrize("d", [1, 2, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_sizes_of_random_starts_follow_the_exact_law(norm, d):
    x = torch.rand(
        5000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)
    )
    sizes = _size(_random_change(x, 2.0, norm, seed=3), norm)
    assert (
        stats.kstest((sizes / 2.0) ** d, "uniform").pvalue > 1e-3
    )  # the ball of radius r has (r / eps)^d of the volume


@pytest.mark.parametrize("norm", NORMS)
def test_coordinates_of_random_starts_follow_the_exact_law(norm):
    d, x = (
        4,
        torch.rand(
            5000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
        ),
    )
    change = _random_change(x, 1.0, norm, seed=0)
    law = {
        "linf": lambda size: size,
        "l2": stats.beta(0.5, (d + 1) / 2).cdf,
        "l1": stats.beta(1, d).cdf,
    }[norm]  # of one entry's size, or its square
    for column in change.unbind(1):
        assert (
            stats.kstest(column.square() if norm == "l2" else column.abs(), law).pvalue
            > 1e-3
        )
        assert abs((column > 0).double().mean() - 0.5) < 0.03
    assert (torch.corrcoef(change.T) - torch.eye(d)).abs().max() < 0.06


def test_random_starts_belong_to_the_example():
    x = torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    for norm in NORMS:
        whole = _random_change(x, 1.0, norm, seed=5)
        assert torch.equal(whole[[7, 3]], _random_change(x[[7, 3]], 1.0, norm, seed=5))
        assert len({tuple(row) for row in whole.flatten(1).tolist()}) == 20
        for other in (
            _random_change(x, 1.0, norm, seed=6),
            _random_change(x, 1.0, norm, seed=5, draw=1),
        ):
            assert (whole - other).flatten(1).abs().amax(1).min() > 1e-3
    same = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(*_random_change(same, 1.0, "l2", seed=0))


def few_bits(kind, n, d):
    """(n, d) float32 examples that differ in little, as real images do."""
    drawn, rows = torch.Generator().manual_seed(1), torch.arange(n)
    if kind == "one pixel":  # of zeros, one is something else
        return torch.zeros(n, d).scatter(
            1, (rows % d)[:, None], (1 + rows // d)[:, None] / 512
        )
    if kind == "grey":
        return (rows / 4096.0)[:, None].expand(n, d)
    if kind == "black and white":
        return (rows[:, None] >> torch.arange(d) & 1).float()
    if kind == "last bit":
        base = torch.rand(d, generator=drawn).expand(n, d).contiguous()
        return (
            base.view(torch.int32) + (rows[:, None] >> torch.arange(d) & 1).int()
        ).view(torch.float32)
    return torch.randint(0, 17, (n, d), generator=drawn) / 16


def least_chance(starts):
    """The smallest p-value of chi-squared tests, times their number.

    Tests of single numbers, pairs of pixels and of examples, steps of three pixels.
    """
    unit = ((starts.double() + 1) / 2).clamp(0, 1 - 1e-12)
    d, found = unit.shape[1], []

    def test(*columns, bins):
        place = sum(
            (bins * column).long() * bins**k for k, column in enumerate(columns)
        )
        found.append(
            stats.chisquare(
                torch.bincount(place.flatten(), minlength=bins ** len(columns))
            ).pvalue
        )

    for i in range(d):
        test(unit[:, i], bins=64)
        for j in {(i + 1) % d, (i * 5 + 2) % d} - {i}:
            test(unit[:, i], unit[:, j], bins=8)
            test(unit[:-1, i], unit[1:, j], bins=8)
        test(unit[:-1, i], unit[1:, i], bins=8)
        test(
            ((unit[:-1, i] - unit[:-1, i - 1]) - (unit[1:, i] - unit[1:, i - 1])) % 1,
            bins=64,
        )  # is the step the same next door?
        test((unit[:, i - 2] - 2 * unit[:, i - 1] + unit[:, i]) % 1, bins=64)
    return min(found) * len(found)


@given(
    kind=st.sampled_from(
        ["one pixel", "grey", "black and white", "last bit", "sixteenths"]
    ),
    seed=st.integers(-(2**70), 2**70),
    draw=st.integers(0, 5000),
)
@settings(max_examples=25, deadline=None)
def test_random_starts_are_uniform_and_independent(kind, seed, draw):
    x = few_bits(kind, 4096, 12)
    starts = _random_change(x, 1.0, "linf", seed, draw)
    assert len(starts.unique(dim=0)) == len(x.unique(dim=0)) == 4096
    assert least_chance(starts) > 1e-7


def test_starts_that_are_not_independent_are_found_out():
    torch.manual_seed(0)
    table, turns, steps = (
        torch.rand(12, dtype=torch.float64),
        torch.rand(4096, 2, dtype=torch.float64),
        torch.arange(12),
    )
    bad = {
        "the same for all": table.expand(4096, 12),
        "one table, turned": table + turns[:, :1],
        "counted up": turns[:, :1] * 1000 * steps + turns[:, 1:],
        "each pixel twice": torch.rand(4096, 6, dtype=torch.float64).repeat_interleave(
            2, 1
        ),
        "each example twice": torch.rand(
            2048, 12, dtype=torch.float64
        ).repeat_interleave(2, 0),
        "not uniform": torch.rand(4096, 12, dtype=torch.float64) ** 1.2,
    }
    assert all(least_chance(2 * (starts % 1) - 1) < 1e-7 for starts in bad.values())
    assert least_chance(2 * torch.rand(4096, 12, dtype=torch.float64) - 1) > 1e-7


@pytest.mark.parametrize("seed", [0, 1])
def test_the_pixels_of_one_large_image_are_independent(seed):
    unit = (
        _random_change(torch.zeros(1, 3, 224, 224), 1.0, "linf", seed).flatten() + 1
    ) / 2
    assert stats.kstest(unit, "uniform").pvalue > 1e-4
    place = (16 * unit.clamp(0, 1 - 1e-7)).long()
    for apart in (1, 2, 224, 224 * 224):  # next door, one row down, the next channel
        pairs = place[: len(place) // (2 * apart) * 2 * apart].view(-1, 2, apart)
        assert (
            stats.chisquare(
                torch.bincount(
                    (pairs[:, 0] + 16 * pairs[:, 1]).flatten(), minlength=256
                )
            ).pvalue
            > 1e-4
        )


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_depend_on_the_numbers_of_an_example_alone(norm):
    x = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.0
    whole, some = (
        _random_change(x, 1.0, norm, seed=5),
        torch.tensor([99, 0, 21, 22, 42]),
    )
    negative = x.clone()
    negative[:, 0] = -0.0
    for other in (
        x[some],
        x.to(memory_format=torch.channels_last)[some],
        negative[some],
        x.repeat_interleave(2, 3)[some][..., ::2],
    ):
        assert torch.equal(_random_change(other, 1.0, norm, seed=5), whole[some])
    assert torch.allclose(
        _random_change(x[some].double(), 1.0, norm, seed=5).float(),
        whole[some],
        atol=1e-6,
    )
    if torch.cuda.is_available():
        assert torch.allclose(
            _random_change(x.cuda(), 1.0, norm, seed=5).cpu(), whole, atol=1e-6
        )


def test_any_integer_is_a_seed():
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    seeds = [
        0,
        1,
        2,
        -1,
        2**31,
        2**32 - 1,
        2**32,
        2**63 - 1,
        2**63,
        2**64 - 2,
        -(2**63) + 1,
        10**30,
    ]
    starts = torch.stack(
        [
            _random_change(x, 1.0, "linf", seed, draw)
            for seed in seeds
            for draw in (0, 1, 10**6)
        ]
    ).flatten(0, 1)
    assert (
        torch.corrcoef(starts).fill_diagonal_(0).abs().max() < 0.8
        and starts.abs().max() <= 1
    )  # of 40 numbers; 0.5 is 3 in a thousand


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_any_size_are_followed(norm, factor):
    model, x = linear().float(), examples().float()
    y, attack = model(x).argmax(1), PGD(0.3, norm, loss="margin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual, found = (
            _margin(model(attack(each, x, y)), y)
            for each in (model, Changed(model, scale=factor))
        )
    assert torch.allclose(found, usual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0, 1.25, 2.0])
def test_one_step_from_a_random_start_attains_what_is_derived(share):
    model, d = linear(200), 200
    w = (model.weight[1] - model.weight[0]).detach()
    x = 0.01 * torch.randn(
        400, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    change = (
        PGD(0.5, steps=1, step_size=0.5 * share, bounds=(-2.0, 2.0))(
            model, x, torch.zeros(400, dtype=torch.long)
        )
        - x
    )
    attained = (change @ w) / (0.5 * w.abs().sum())
    assert (
        abs(attained.mean() - (1 - (2 - share) ** 2 / 4))
        < 5 * attained.std() / 400**0.5 + 1e-9
    )


# --- invariances


@pytest.fixture(scope="module")
def net():
    """A net trained on digits, in float64, and 40 test digits that it reads."""
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    torch.manual_seed(0)
    model = SmallConvNet(width=8)
    fit(
        model,
        loader(images[train], targets[train], shuffle=True),
        epochs=6,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3),
        device="cpu",
    )
    model.eval().double()
    x, y = images[test].double(), targets[test]
    right = model(x).argmax(1) == y
    return model, x[right][:40], y[right][:40]


ATTACKS = [
    FGSM(0.1),
    PGD(0.1, steps=4, restarts=2),
    PGD(1.5, "l1", steps=4),
    PGD(0.5, "l2", steps=3, step_size=0.2),
    MomentumPGD(0.5, "l2", steps=4),
    PGD(0.1, steps=6, restarts=2, early_stop=True),
    APGD(0.1, steps=8),
    APGD(0.1, steps=8, loss="dlr", early_stop=True),
    APGD(1.5, "l1", steps=8),
    DeepFool(0.5),
    FAB(0.1, "linf", steps=3, restarts=2),
    FAB(1.5, "l1", steps=3, multi_targeted=True, n_target_classes=2),
    CarliniWagner(0.5, steps=10, rounds=2, n_target_classes=2),
    Square(0.12, queries=30),
    Square(0.9, "l2", queries=30),
    Square(4.0, "l1", queries=30, early_stop=True),
    EnsembleAttack(
        [APGD(0.1, steps=4), FAB(0.1, "linf", steps=2), Square(0.1, queries=20)]
    ),
]
NAMES = [f"{type(attack).__name__}-{attack.norm}" for attack in ATTACKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_order_and_split_of_batches_change_nothing(attack, net):
    model, x, y = net
    whole = attack(model, x, y)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    parts = torch.cat([attack(model, x[rows], y[rows]) for rows in order.split(13)])
    fooled = model(whole).argmax(1) != y
    assert 0 < fooled.sum() < 40 and torch.equal(
        (model(parts).argmax(1) != y[order]), fooled[order]
    )
    assert (
        (parts - whole[order]).abs().flatten(1).amax(1) < 1e-6
    ).double().mean() >= 0.95  # rounding may part two ways


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_eps_0_is_the_identity_and_the_ball_is_kept(attack, net):
    model, x, y = net
    assert torch.equal(attack.at(0)(model, x, y), x)
    found = attack(model, x, y)
    assert (
        (_size(found - x, attack.norm) <= attack.eps * (1 + 1e-9)).all()
        and found.min() >= 0
        and found.max() <= 1
    )


class Changed(nn.Module):
    def __init__(self, model, shift=0.0, scale=1.0):
        super().__init__()
        self.model, self.shift, self.scale = model, shift, scale

    def forward(self, input):
        return self.scale * self.model(input) + self.shift


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_neither_shift_nor_scale_of_logits_hides_anything(attack, net):
    model, x, y = net
    usual = (model(attack(model, x, y)).argmax(1) != y).sum()
    for changed in (
        Changed(model, shift=-100.0),
        Changed(model, shift=1000.0),
        Changed(model, scale=1000.0),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert abs((model(attack(changed, x, y)).argmax(1) != y).sum() - usual) <= (
                0 if changed.scale == 1 else 4
            )


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_the_model_is_left_as_it_was(attack):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(144, 3),
    ).train()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(3)
    hook = model[0].register_forward_hook(lambda module, input, output: None)
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    before, hooks, state = (
        copy.deepcopy(model.state_dict()),
        dict(model[0]._forward_hooks),
        torch.get_rng_state(),
    )
    with pytest.warns(
        UserWarning,
        match="the model is in training mode: it was attacked in evaluation mode",
    ):
        attack(model, x, y)
    assert (
        all(module.training for module in model.modules())
        and dict(model[0]._forward_hooks) == hooks
    )
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    ) and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert (
        torch.equal(model[4].bias.grad, torch.ones(3)) and model[4].weight.grad is None
    )
    hook.remove()


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_two_classes_work(attack):
    model, x = linear(20, 2, 5), examples(30, 20, 6)
    y = model(x).argmax(1)
    radius = {"linf": 0.6, "l2": 3.0, "l1": 10.0}[attack.norm]
    assert (model(attack.at(radius)(model, x, y)).argmax(1) != y).double().mean() > 0.6


def test_dlr_is_the_papers_and_below_three_classes_the_margin():
    logits, y = (
        torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 4.0, 2.0, 0.0]]),
        torch.tensor([0, 0]),
    )
    assert torch.allclose(
        _losses(logits, y, "dlr"),
        torch.tensor([-(5 - 3) / (5 - 1), -(1 - 4) / (4 - 1)]),
    )
    assert torch.allclose(
        _losses(1000 * logits - 7, y, "dlr"), _losses(logits, y, "dlr")
    )
    assert torch.equal(_losses(logits[:, :2], y, "dlr"), _margin(logits[:, :2], y))


def test_the_ratio_has_a_gradient_where_the_wanted_class_is_third():
    x, y = torch.tensor([[0.9, 0.7, 0.5, 0.1]]), torch.tensor([2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FGSM(0.3, loss="dlr", targeted=True)(nn.Identity(), x, y).argmax(1) == y
    logits = torch.tensor([[4.0, 3.0, 2.5, 1.0, 0.0]])
    assert torch.allclose(
        _losses(logits, y, "dlr", targeted=True),
        torch.tensor([(4 - 2.5) / (4 - (2.5 + 1) / 2)]),
    )  # Croce and Hein 2020, eq. 7
    assert torch.equal(
        _losses(logits[:, :3], y, "dlr", targeted=True), _margin(logits[:, :3], y)
    )


def test_targeted_attacks_arrive(net):
    model, x, y = net
    goal = (y + 1) % 10
    for attack in (
        PGD(0.6, steps=20, targeted=True),
        APGD(0.6, targeted=True),
        CarliniWagner(targeted=True),
        MomentumPGD(0.6, steps=20, targeted=True),
        Square(0.6, queries=300, targeted=True),
    ):
        share = (model(attack(model, x, goal)).argmax(1) == goal).double().mean()
        assert share > (0.4 if isinstance(attack, Square) else 0.8), type(
            attack
        ).__name__


def test_an_ensemble_is_the_minimum_and_asks_later_attacks_about_what_stands_only(net):
    model, x, y = net
    attacks = [PGD(0.08, steps=3), Square(0.08, queries=40), FAB(0.08, "linf", steps=3)]
    alone = torch.stack([_judged(model, attack(model, x, y), y) for attack in attacks])
    together = _judged(model, EnsembleAttack(attacks)(model, x, y), y)
    assert (
        torch.equal(together > 0, (alone > 0).any(0)) and 0 < (together > 0).sum() < 40
    )
    stands = together <= 0
    assert torch.allclose(together[stands], alone.amax(0)[stands])
    sizes = []
    hook = model.register_forward_hook(
        lambda module, input, output: sizes.append(len(input[0]))
    )
    EnsembleAttack(attacks)(model, x, y)
    hook.remove()
    first_falls = (alone[0] > 0).sum()
    assert (
        first_falls > 0
        and sizes[5] == 40 - first_falls
        and sizes == sorted(sizes, reverse=True)
    )  # 4 looks and a judgement of all


def test_a_curve_takes_every_attack(net):
    model, x, y = net
    for attack in (
        ATTACKS[-1],
        FAB(0.1, "linf", steps=2),
        PGD(0.1, step_size=0.04, steps=3),
    ):
        curve = robustness_curve(model, [(x, y)], attack, [0.0, 0.05, 0.1])
        assert (
            curve["accuracy"][0] == 1
            and curve["accuracy"].is_monotonic_decreasing
            and curve["accuracy"][2] < 1
        )
    assert (
        PGD(0.05, step_size=0.01).at(0.1).step_size == pytest.approx(0.02)
        and PGD(0.05).at(0.1).step_size is None
    )


@pytest.mark.parametrize(
    "attack",
    [PGD(0.05, early_stop=True), APGD(0.05, steps=10, early_stop=True)],
    ids=lambda each: type(each).__name__,
)
def test_a_fooled_example_that_waits_in_the_batch_is_left_as_it_was_first_fooled(
    attack, net
):
    model, x, y = net
    whole, alone = (
        attack(model, x, y),
        torch.cat([attack(model, one[None], label[None]) for one, label in zip(x, y)]),
    )
    fooled = model(whole).argmax(1) != y
    assert 0 < fooled.sum() < 0.2 * len(y)  # too few to make the batch smaller
    assert (
        torch.equal(model(alone).argmax(1) != y, fooled)
        and (whole - alone)[fooled].abs().max() < 1e-6
    )


def test_early_stop_costs_nothing(net):
    model, x, y = net
    for attack in (APGD(0.1, steps=20), Square(0.12, queries=60), PGD(1.5, "l1")):
        whole, early = (
            (model(each(model, x, y)).argmax(1) != y)
            for each in (attack, replace(attack, early_stop=True))
        )
        assert torch.equal(whole, early) and 0 < whole.sum() < 40


# --- the quick copy


def test_the_quick_copy_weakens_nothing_and_leaves_the_model(net):
    model, x, y = copy.deepcopy(net[0]).float(), net[1].float(), net[2]
    before = copy.deepcopy(model.state_dict())
    for attack in (
        FGSM(0.1),
        PGD(0.1),
        APGD(0.1, steps=10),
        PGD(0.1, early_stop=True),
        PGD(0.5, "l2"),
    ):
        plain, quick = (
            _judged(model, each(model, x, y), y) > 0
            for each in (attack, replace(attack, fast=True))
        )
        assert abs(int(plain.sum()) - int(quick.sum())) <= 2 and plain.any()
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    ) and all(p.requires_grad for p in model.parameters())


def test_what_only_the_copy_misreads_is_attacked_again(net, monkeypatch):
    model, x, y = copy.deepcopy(net[0]).float(), net[1].float(), net[2]
    monkeypatch.setattr(
        _Quick,
        "forward",
        lambda self, input: (
            0.01 * input.flatten(1)[:, :10]
            - 5 * nn.functional.one_hot(y[: len(input)], 10)
        ),
    )
    plain, quick = (
        _judged(model, PGD(0.1, fast=fast, early_stop=True)(model, x, y), y) > 0
        for fast in (False, True)
    )
    assert torch.equal(plain, quick) and plain.any()


def test_batchnorm_is_folded_where_that_changes_nothing():
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model(torch.rand(8, 3, 32, 32))  # gives the running means something to fold
    model.eval()
    x, before = torch.rand(2, 3, 32, 32), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        folded = _Quick(model)
        assert not any(
            isinstance(module, nn.BatchNorm2d) for module in folded.modules()
        )
        assert torch.allclose(folded(x), model(x), rtol=1e-3, atol=1e-4)
    PGD(0.03, steps=1, fast=True)(model, x, torch.tensor([1, 2]))
    now = model.state_dict()
    assert all(
        now[name].dtype == value.dtype
        and now[name].stride() == value.stride()
        and torch.equal(now[name], value)
        for name, value in before.items()
    )
    assert all(
        parameter.requires_grad and parameter.grad is None
        for parameter in model.parameters()
    )

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)

        def forward(self, input):
            return (
                self.norm(self.conv(input)).mean((2, 3)) if input.mean() > 0 else None
            )

    untouched = Branching().eval()
    quick, suits = _copied(untouched, x, (0.0, 1.0), set())
    assert suits and any(
        isinstance(module, nn.BatchNorm2d) for module in quick.modules()
    )
    assert (
        PGD(0.03, steps=2, fast=True)(untouched, x, torch.tensor([1, 2])).shape
        == x.shape
    )


@pytest.mark.parametrize(
    "make",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model, torch.rand(2, 1, 8, 8)),
        lambda model: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(model[0]), *model[1:]
        ),
    ],
    ids=["scripted", "traced", "parametrised"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_that_are_not_plain_modules_have_quick_copies(make):
    torch.manual_seed(0)
    model = make(
        nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        ).eval()
    ).eval()
    x, before = torch.rand(20, 1, 8, 8), copy.deepcopy(model.state_dict())
    y = model(x).argmax(1)
    plain, quick = (
        _judged(model, PGD(0.2, fast=fast)(model, x, y), y) > 0
        for fast in (False, True)
    )
    assert plain.any() and abs(int(plain.sum()) - int(quick.sum())) <= 1
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    ) and all(each.requires_grad for each in model.parameters())


# --- bad input


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: APGD(8),
            "eps is 8; allowed is a radius in input units, from 0 to 1, the width of"
            " bounds .*8/255",
        ),
        (lambda: Square(-0.1), "eps is -0.1"),
        (lambda: PGD(math.inf), "eps is inf"),
        (lambda: FAB(-1.0), "eps is -1.0"),
        (lambda: CarliniWagner(norm="linf"), "norm is 'linf'; allowed are 'l2'"),
        (lambda: Square(0.1, queries=0), "queries is 0"),
        (lambda: DeepFool(n_target_classes=0), "n_target_classes is 0"),
        (lambda: CarliniWagner(rounds=0), "rounds is 0"),
        (
            lambda: APGD(0.1, loss="hinge"),
            "loss is 'hinge'; allowed are 'ce' and 'margin' and 'dlr'",
        ),
        (lambda: EnsembleAttack([]), "attacks is .*at least one"),
        (lambda: EnsembleAttack([PGD(0.1), 3]), "attacks is"),
        (lambda: EnsembleAttack([PGD(0.1), PGD(0.2)]), "attacks differ in eps"),
        (lambda: EnsembleAttack([PGD(0.1), PGD(0.1, "l2")]), "attacks differ in norm"),
        (
            lambda: EnsembleAttack([PGD(0.1), PGD(0.1, targeted=True)]),
            "attacks differ in targeted",
        ),
    ],
)
def test_bad_settings_get_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "attack",
    [PGD(0.1), APGD(0.1), DeepFool(), FAB(), CarliniWagner(), Square(0.1, queries=5)],
)
def test_bad_examples_and_models_get_a_sentence(attack):
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    for model, inputs, classes, error, said in [
        (
            nn.Linear(3, 2),
            255 * x,
            y,
            ValueError,
            "x ranges from .* allowed are values within bounds",
        ),
        (nn.Linear(3, 2), x.byte(), y, TypeError, "x is torch.uint8"),
        (nn.Linear(3, 2), x, y + 4, ValueError, "y holds class 4; allowed are 0 to 1"),
        (nn.Linear(3, 2), x * math.nan, y, ValueError, "x holds nan"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)),
            x,
            y,
            ValueError,
            "model gives probabilities",
        ),
        (nn.Linear(3, 1), x, y * 0, ValueError, "allowed are logits"),
    ]:
        with pytest.raises(error, match=said):
            attack(model, inputs, classes)


def test_probabilities_in_16_bits_are_told_of():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Softmax(1)), torch.rand(40, 6)
    with pytest.raises(ValueError, match="model gives probabilities"):
        PGD(0.1)(model, x, torch.zeros(40, dtype=torch.long))
    with pytest.warns(UserWarning, match="model seems to give probabilities"):
        PGD(0.1)(model.bfloat16(), x, torch.zeros(40, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(0.1)(model[0].float(), x, torch.zeros(40, dtype=torch.long))


def test_without_a_gradient_square_is_offered_and_does():
    class Rounded(nn.Linear):
        def forward(self, input):
            return super().forward((input * 4).round().detach() / 4)

    torch.manual_seed(0)
    model, x = Rounded(30, 3), torch.rand(40, 30)
    y = model(x).argmax(1)
    for attack in (PGD(0.3), APGD(0.3), DeepFool(), FAB(), CarliniWagner()):
        with pytest.raises(ValueError, match="model is a Rounded .* such as Square"):
            attack(model, x, y)
    assert robust_accuracy(model, [(x, y)], Square(0.3, queries=200)).value < 0.5


def test_sides_of_squares():
    assert (
        _side(0.8, 10, 10) == (9, 9)
        and _side(0.001, 10, 10) == (1, 1)
        and _side(0.5, 1, 64) == (1, 32)
        and _side(0.8, 4, 100) == (4, 18)
    )
