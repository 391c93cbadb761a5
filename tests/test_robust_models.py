"""Chapter 6, models of other people, through every function.

Old weight norm, kept outputs, layers that work in place, other types and other files.
"""

import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from bigmodel_nb.foundations.optim import SGD, gradient_noise, lr_range_test
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust import attacks
from bigmodel_nb.robust.attacks import (
    APGD,
    EOT,
    FAB,
    FGSM,
    PGD,
    CarliniWagner,
    DeepFool,
    EnsembleAttack,
    MomentumPGD,
    Square,
    is_stochastic,
    logits_of,
    robust_accuracy,
    robustness_curve,
    within_bounds,
)
from bigmodel_nb.robust.certify import (
    IntervalTraining,
    NoiseTraining,
    SmoothedClassifier,
    interval_radii,
    smoothed_radii,
)
from bigmodel_nb.robust.evaluate import load_classifier, masking_report, noise_curve
from bigmodel_nb.robust.text import Typos
from bigmodel_nb.robust.training import (
    AWP,
    MART,
    TRADES,
    AdversarialTraining,
    CatastrophicOverfittingAlarm,
    FreeTraining,
    RandomFGSM,
    cost_meter,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:the model",
)


class Keeping(nn.Module):
    """Keeps its last output in a container."""

    def __init__(self, net):
        super().__init__()
        self.net, self.kept = net, {}

    def forward(self, input):
        output = self.net(input)
        self.kept["last"] = [output]
        return output


class Centred(nn.Module):
    """Normalises what it is given in place."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input):
        return self.net(input.sub_(0.5).div_(0.25))


class Apart(Centred):
    """Normalises a copy."""

    def forward(self, input):
        return self.net(input.sub(0.5).div(0.25))


def net(first=nn.Conv2d, norm=None):
    layers = [first(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*layers[:1], *([norm] if norm else []), *layers[1:])


def wrapped(wrap):
    model = net()
    model[0] = wrap(model[0])
    return model


COMPUTED = {
    "old weight norm": lambda: wrapped(nn.utils.weight_norm),
    "old spectral norm": lambda: wrapped(nn.utils.spectral_norm),
    "keeping": lambda: Keeping(net()),
    "pruned": lambda: wrapped(
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3)
    ),
    "parametrised": lambda: wrapped(parametrizations.weight_norm),
}
IN_PLACE = {
    "first ReLU in place": lambda: nn.Sequential(nn.ReLU(inplace=True), *net()),
    "normalised in place": lambda: Centred(net()),
}
MODELS = COMPUTED | IN_PLACE
FUNCTIONS = {
    **{
        f"{type(attack).__name__} {getattr(attack, 'fast', '')}": attack
        for attack in (
            FGSM(0.1),
            RandomFGSM(0.1),
            PGD(0.1, steps=2),
            PGD(0.1, steps=2, fast=True),
            PGD(0.5, "l2", steps=2, fast=False),
            MomentumPGD(0.1, steps=2),
            APGD(0.1, steps=3),
            APGD(0.1, steps=3, loss="dlr", fast=True),
            DeepFool(steps=3),
            FAB(steps=2),
            CarliniWagner(steps=3, rounds=2),
            Square(0.1, queries=4),
            EnsembleAttack.standard(0.1, steps=2, queries=4),
        )
    },
    "robust_accuracy": lambda model, x, y: robust_accuracy(
        model, [(x, y)], PGD(0.1, steps=2)
    ),
    "robustness_curve": lambda model, x, y: robustness_curve(
        model, [(x, y)], PGD(0.1, steps=2), [0.05, 0.1]
    ),
    "is_stochastic": lambda model, x, y: is_stochastic(model, x),
    "expectation": lambda model, x, y: PGD(0.1, steps=2)(EOT(model, 2), x, y),
    "noise_curve": lambda model, x, y: noise_curve(model, [(x, y)], [0.1], draws=2),
    "masking_report": lambda model, x, y: masking_report(
        model, [(x, y)], 0.1, steps=2, queries=4, points=4
    ),
    **{
        name: lambda model, x, y, make=make: make()(model, x, y).backward()
        for name, make in {
            "adversarial": lambda: AdversarialTraining(PGD(0.1, steps=2)),
            "mixed": lambda: AdversarialTraining(FGSM(0.1), clean_weight=0.5),
            "trades": lambda: TRADES(PGD(0.1, steps=2)),
            "mart": lambda: MART(PGD(0.1, steps=2)),
            "awp": lambda: AWP(AdversarialTraining(PGD(0.1, steps=2))),
            "free": lambda: FreeTraining(FGSM(0.1)),
            "noise training": lambda: NoiseTraining(0.1),
        }.items()
    },
    "cost_meter": lambda model, x, y: cost_meter(
        {"adversarial": AdversarialTraining(PGD(0.1, steps=2))}, model, x, y, rounds=1
    ),
    "alarm": lambda model, x, y: CatastrophicOverfittingAlarm(
        model, x, y, PGD(0.1, steps=2)
    )._check(type("History", (), {"batch_losses": []})()),
    "smoothed": lambda model, x, y: smoothed_radii(
        SmoothedClassifier(model, 3, 0.1), x, y, 5, 20
    ),
    "smoothed logits": lambda model, x, y: PGD(0.1, steps=2)(
        SmoothedClassifier(model, 3, 0.1), x, y
    ),
}


def made(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.rand(12, 1, 6, 6)
    y = model(x.clone()).argmax(1)  # leaves computed tensors behind
    return model.eval(), x, y


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_function_takes_every_model_and_leaves_the_examples_alone(function, name):
    model, x, y = made(name)
    given, classes, before = (
        x.clone(),
        y.clone(),
        {key: value.clone() for key, value in model.state_dict().items()},
    )
    FUNCTIONS[function](model, x, y)
    assert torch.equal(x, given) and torch.equal(y, classes)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda *given: lr_range_test(*given, SGD, steps=5),
        lambda *given: gradient_noise(*given),
    ],
    ids=["lr_range_test", "gradient_noise"],
)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_tools_of_optim_take_models_that_hold_computed_tensors(function, name):
    model, x, y = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    function(model, [(x[:6], y[:6]), (x[6:], y[6:])], cross_entropy)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_attack_finds_the_same_whether_the_model_works_in_place_or_not(name):
    model, x, y = made(name)
    twin = (
        nn.Sequential(nn.ReLU(), *model[1:])
        if name.startswith("first")
        else Apart(model.net)
    )
    for attack in (PGD(0.1, steps=4), APGD(0.1, steps=4), FAB(steps=3)):
        found = attack(model, x, y)
        assert torch.equal(found, attack(twin, x, y))
        fooled = logits_of(model, found).argmax(1) != y
        assert robust_accuracy(model, [(x, y)], attack).value == pytest.approx(
            1 - fooled.double().mean().item()
        )
    report, other = (
        masking_report(each, [(x, y)], 0.2, steps=5, queries=20, points=20)
        for each in (model, twin)
    )
    assert report.metrics == other.metrics, "no accusation that its twin does not get"
    assert (
        len(report.open) + len(report.failed) == 10
        and "open" in str(report) + report.frame.to_string()
    ), "twelve examples prove nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_type_than_the_model(dtype):
    model, x, y = made("parametrised")
    x = x.to(dtype)
    for attack in (
        FGSM(0.1),
        PGD(0.1, steps=2),
        APGD(0.1, steps=2),
        DeepFool(steps=3),
        Square(0.1, queries=5),
    ):
        found = attack(model, x, y)
        assert found.dtype == dtype and (found - x).abs().max() <= (
            0.1 if attack.eps == 0.1 else 99
        ) * (1 + 8 * torch.finfo(dtype).eps)
    assert (
        robust_accuracy(model, [(x, y)], PGD(0.1, steps=2)).n
        == noise_curve(model, [(x, y)], [0.1], draws=1)["n"][0]
        == 12
    )
    assert (
        TRADES(PGD(0.1, steps=2))(model, x, y).dtype
        == NoiseTraining(0.1)(model, x, y).dtype
        == torch.float32
    )
    if dtype == torch.float64:
        exact, rounded = (
            interval_radii(net().eval(), each, y) for each in (x, x.float())
        )
        assert exact.shape == rounded.shape
        masking_report(model, [(x, y)], 0.1, steps=2, queries=4, points=4)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(-6, 12),
    st.integers(-6, 12),
    st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)]),
)
def test_a_few_roundings_outside_the_box_are_its_edge_and_more_are_named(
    dtype, under, over, bounds
):
    ulp = float(np.spacing(np.float32(max(map(abs, bounds)))))
    x = torch.tensor(
        [[bounds[0] - under * ulp, bounds[1] + over * ulp, sum(bounds) / 2]],
        dtype=torch.float64,
    ).to(dtype)
    if max(under, over) <= 4:
        y = within_bounds(x, bounds)
        assert (
            y.min() >= bounds[0]
            and y.max() <= bounds[1]
            and (y - x).abs().max() <= 6.5 * ulp
            and torch.equal(y, x.clamp(*bounds))
        )
    elif max(under, over) > 9:
        with pytest.raises(ValueError) as caught:
            within_bounds(x, bounds)
        said = str(caught.value)
        assert f"{x.max().item():.9g}" in said and f"{x.min().item():.9g}" in said


def test_pixels_at_1_00000012_are_attacked_and_1_00001_is_told_as_it_is():
    model, x, y = made("parametrised")
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1 + 2.0**-23, -(2.0**-26)
    for name, function in FUNCTIONS.items():
        function(model, x, y)
    interval_radii(net().eval(), x, y)
    IntervalTraining(0.1, ramp=5)(net(), x, y)
    x[2, 0, 0, 0] = 1.00001
    for function in (
        PGD(0.1),
        lambda *given: noise_curve(given[0], [given[1:]], [0.1]),
        lambda *given: masking_report(given[0], [given[1:]], 0.1),
        lambda *given: interval_radii(net(), *given[1:]),
    ):
        with pytest.raises(
            ValueError, match="to 1.00001.*; allowed are values within bounds, 0 to 1"
        ):
            function(model, x, y)


# --- quick copies


def large(seed=0):
    torch.manual_seed(seed)
    return SmallConvNet(width=32).eval()


@pytest.fixture
def copies(monkeypatch):
    """Copies may pay on every machine; counts those that are made."""
    made_here, make = [], attacks._copied
    monkeypatch.setattr(attacks, "best_dtype", lambda device=None: torch.bfloat16)
    monkeypatch.setattr(
        attacks, "_copied", lambda *given: made_here.append(1) or make(*given)
    )
    return made_here


def test_a_copy_is_made_once_and_follows_the_weights(copies):
    model, x = large(), torch.rand(30, 1, 8, 8)
    y, attack = model(x).argmax(1), PGD(0.1, steps=4)
    first = attack(model, x, y)
    assert torch.equal(attack(model, x, y), first) and len(copies) == 1
    assert not torch.equal(replace(attack, fast=False)(model, x, y), first), (
        "auto climbs on the copy"
    )
    for change in (
        lambda: model.head.weight.data.mul_(-1),
        lambda: model.load_state_dict(large(1).state_dict()),
        lambda: model.head.bias.data.copy_(torch.arange(10.0)),
    ):
        change()  # .data leaves no trace in the version of a tensor
        twin = large(2)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(attack(model, x, y), attack(twin, x, y))
    assert len(copies) == 4  # one each
    model.head = nn.Sequential(nn.Linear(model.head.in_features, 10))
    attack(model, x, y)
    model.head[0].register_forward_hook(lambda module, input, output: -output)
    again = attack(model, x, y)
    assert len(copies) == 6 and not torch.equal(again, first)


def test_what_is_found_on_a_copy_does_not_depend_on_what_stands_beside_it(copies):
    model, x = large(), torch.rand(40, 1, 8, 8)
    y, attack = model(x).argmax(1), PGD(0.03, steps=6)
    whole, order = attack(model, x, y), torch.randperm(40)
    parts = torch.cat([attack(large(), x[rows], y[rows]) for rows in order.split(13)])
    fooled = [
        attacks._judged(model, each, classes) > 0
        for each, classes in ((whole[order], y[order]), (parts, y[order]))
    ]
    assert (
        0 < fooled[0].sum() < 40
        and torch.equal(*fooled)
        and ((parts - whole[order]).abs().flatten(1).amax(1) < 1e-6).double().mean()
        >= 0.95
    )


class Shifted(nn.Module):
    """Its last layer adds 10,000 to all logits; bfloat16 keeps the first two digits."""

    def __init__(self):
        super().__init__()
        self.net = large()
        self.net.head.bias.data.add_(10_000)

    def forward(self, input):
        return self.net(input)


class Lucky(nn.Module):
    """Draws lots."""

    def __init__(self):
        super().__init__()
        self.net = large()

    def forward(self, input):
        return self.net(input + torch.randn_like(input))


@pytest.mark.parametrize("kind", [Shifted, Lucky])
def test_a_model_that_no_copy_suits_is_attacked_itself_and_told_once(copies, kind):
    model, x = kind(), torch.rand(6, 1, 8, 8)
    y = torch.arange(6)
    with pytest.warns(
        UserWarning, match="the model has no quick copy that answers alike"
    ):
        PGD(0.1, steps=2)(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(0.1, steps=2)(model, x, y)
    assert len(copies) == 1


def test_small_models_float64_and_searches_get_no_copy(copies):
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    PGD(0.1, steps=2)(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y)
    PGD(0.1, steps=2)(large().double(), x.double(), y)
    for attack in (
        FGSM(0.1),
        Square(0.1, queries=3),
        FAB(steps=2),
        PGD(0.1, steps=2, fast=False),
    ):
        attack(large(), x, y)
    assert not copies
    with pytest.raises(
        ValueError, match="fast is 'always'; allowed are True, False and 'auto'"
    ):
        PGD(0.1, fast="always")


def test_a_copy_that_has_gone_stale_unseen_deceives_nobody(copies):
    model, x = large(), torch.rand(30, 1, 8, 8)
    scale = [1.0]
    model.register_forward_hook(lambda module, input, output: output * scale[0])
    y = model(x).argmax(1)
    PGD(0.1, steps=4)(model, x, y)
    made_for = attacks._COPIES[model]
    for parameter in made_for.quick.parameters():
        parameter.data = parameter.data.neg()
    made_for.quick.copies, made_for.quick.folds = [], []  # never refreshed again
    plain, quick = (
        attacks._judged(model, PGD(0.1, steps=4, fast=fast)(model, x, y), y) > 0
        for fast in (False, "auto")
    )
    assert plain.any() and int(plain.sum()) == int(quick.sum())


def test_copies_die_with_their_models(copies):
    model, x = large(), torch.rand(2, 1, 8, 8)
    PGD(0.1, steps=2)(model, x, torch.arange(2))
    assert model in attacks._COPIES
    count = len(attacks._COPIES)
    del model
    assert len(attacks._COPIES) == count - 1


# --- models that keep, count, cannot be copied, and change their mind


class Keeps(nn.Module):
    """Keeps its last output, a mask of the batch's size, and what it has counted."""

    def __init__(self):
        super().__init__()
        self.net, self.last, self.mask, self.calls, self.seen = (
            large(),
            None,
            None,
            0,
            [],
        )

    def forward(self, input):
        if self.mask is None or self.mask.shape != input.shape:
            self.mask = torch.ones_like(input)
        self.calls, self.seen = self.calls + 1, [input.mean()]
        self.last = self.net(input * self.mask)
        return self.last


def test_what_a_forward_pass_leaves_in_a_model_is_no_part_of_it(copies):
    model, x, y = Keeps(), torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    attack = PGD(0.1, steps=2)
    found = [attack(model, x, y) for _ in range(4)]
    assert len(copies) == 1 and all(torch.equal(each, found[0]) for each in found)
    assert (
        torch.equal(attack(model, x[:2], y[:2]), attack(model, x[:2], y[:2]))
        and len(copies) == 1
    )
    assert robust_accuracy(model, [(x, y)] * 3, attack).n == 192
    objective = AdversarialTraining(attack)
    for _ in range(3):
        objective(model, x, y).backward()
    assert len(copies) == 1


@pytest.mark.parametrize(
    "held", [threading.Lock(), iter([1, 2]), (each for each in range(3))]
)
def test_a_model_that_cannot_be_copied_is_attacked_itself(copies, held):
    model, x, y = large(), torch.rand(6, 1, 8, 8), torch.arange(6)
    model.held = held
    if isinstance(held, type(iter([]))):
        model.held = open(__file__)
    with pytest.warns(UserWarning, match="no quick copy that answers alike") as said:
        found = PGD(0.1, steps=2)(model, x, y)
    assert [each.filename for each in said] == [__file__]
    assert torch.equal(found, PGD(0.1, steps=2, fast=False)(model, x, y))
    model.epoch = 3  # a setting more, nothing to tell anew
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(PGD(0.1, steps=2, fast=True)(model, x, y), found)
        AdversarialTraining(PGD(0.1, steps=2))(model, x, y).backward()
        robust_accuracy(model, [(x, y)], PGD(0.1, steps=2))


def test_a_model_for_batches_of_one_size_is_attacked_itself(copies):
    class Six(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = large()

        def forward(self, input):
            return self.net(input.view(6, 1, 8, 8))

    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    assert PGD(0.1, steps=2, fast=True)(Six(), x, y).shape == x.shape


def test_no_copy_is_made_of_layers_of_a_channel_each(copies):
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    for groups, made in ((32, 0), (8, 1)):
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, groups=groups),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.Flatten(),
            nn.LazyLinear(10),
        ).eval()
        model(x)
        PGD(0.1, steps=2)(model, x, y)
        assert len(copies) == made


@pytest.mark.parametrize(
    "attack",
    [
        CarliniWagner(steps=20, rounds=3, n_target_classes=3),
        FAB(steps=2),
        FAB(steps=2, restarts=2),
        DeepFool(steps=3),
        EnsembleAttack.standard(0.1, steps=3, queries=5),
    ],
)
def test_float32_images_of_a_float64_model(attack):
    torch.manual_seed(0)
    model, x = SmallConvNet(width=8).double().eval(), torch.rand(8, 1, 8, 8)
    y = logits_of(model, x).argmax(1)
    found = attack(model, x, y)
    assert found.dtype == x.dtype and not torch.equal(found, x)


@pytest.mark.parametrize("width", [8, 32])
def test_probabilities_are_named_whether_there_is_a_copy_or_not(copies, width):
    model, x, y = (
        nn.Sequential(SmallConvNet(width=width), nn.Softmax(1)),
        torch.rand(6, 1, 8, 8),
        torch.arange(6),
    )
    for function in (
        AdversarialTraining(PGD(0.1, steps=2)),
        AdversarialTraining(FGSM(0.1)),
        PGD(0.1, steps=2),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match="model gives probabilities"):
                function(model, x, y)


def test_a_copy_in_training_follows_settings_that_are_changed_in_place(copies):
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.cfg = large(), {"flip": False}

        def forward(self, input):
            return -self.net(input) if self.cfg["flip"] else self.net(input)

    model, x, y = Turning(), torch.rand(6, 1, 8, 8), torch.arange(6)
    before = AdversarialTraining(PGD(0.1, steps=2)).attacked(model, x, y)
    model.cfg["flip"] = True
    after = AdversarialTraining(PGD(0.1, steps=2)).attacked(model, x, y)
    fresh = Turning()
    fresh.cfg["flip"] = True
    assert torch.equal(
        after, AdversarialTraining(PGD(0.1, steps=2)).attacked(fresh, x, y)
    ) and not torch.equal(after, before)


def test_a_model_without_a_gradient_is_named_as_it_is(copies):
    class Stepped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = large()

        def forward(self, input):
            return self.net(input.detach())

    with pytest.raises(
        ValueError, match="model is a Stepped whose logits do not depend"
    ):
        PGD(0.1, steps=2)(Stepped(), torch.rand(2, 1, 8, 8), torch.arange(2))


# --- files

WRAPPED = {
    "bare": lambda state: state,
    "compiled": lambda state: {
        f"_orig_mod.{key}": value for key, value in state.items()
    },
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "both": lambda state: {
        f"module._orig_mod.{key}": value for key, value in state.items()
    },
    "part compiled": lambda state: {
        key.replace("head.", "head._orig_mod."): value for key, value in state.items()
    },
    "checkpoint": lambda state: {
        "epoch": 3,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {"state": {}},
    },
    "nested": lambda state: {"model": {"state_dict": state}},
    "lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()}
    },
    "averaged": lambda state: (
        {"n_averaged": torch.tensor(3)}
        | {f"module.{key}": value for key, value in state.items()}
    ),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found_under_what_was_wrapped_around_them(how, tmp_path):
    model = SmallConvNet(8, 1, 10, 8).eval()
    torch.save(WRAPPED[how](model.state_dict()), tmp_path / "weights.pt")
    found = load_classifier(str(tmp_path / "weights.pt"), 10, "SmallConvNet")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(found.model(x), model(x))
    with pytest.raises(
        ValueError,
        match="also without the names that torch.compile, DataParallel and Lightning"
        " put before them",
    ):
        load_classifier(
            str(tmp_path / "weights.pt"), 10, "torchvision:resnet18", size=32
        )


@pytest.mark.parametrize(
    "state, said",
    [
        (
            {"weights": {"a": torch.ones(1)}, "epoch": 1},
            "which holds a dict of weights, epoch, not a state dict; allowed .*"
            " 'state_dict'",
        ),
        ([1, 2], "which holds a list"),
        ({}, "which holds a dict of "),
    ],
)
def test_other_dicts_are_named(state, said, tmp_path):
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=said):
        load_classifier(str(tmp_path / "weights.pt"), 10, "SmallConvNet")


# --- what says something of texts


def scores(texts):
    """(text, class) logits by the length of words."""
    return torch.tensor(
        [[float(len(each)), 5.0 + each.count("o")] for each in texts],
        requires_grad=True,
    )


class Output:
    def __init__(self, logits):
        self.logits = logits


def pipeline(texts, names=("LABEL_0", "LABEL_1")):
    return [
        sorted(
            ({"label": name, "score": float(score)} for name, score in zip(names, row)),
            key=lambda each: -each["score"],
        )
        for row in scores(texts).softmax(1)
    ]


SAID = {
    "tensor with gradient": lambda texts: scores(texts).softmax(1),
    "bfloat16": lambda texts: scores(texts).softmax(1).bfloat16(),
    "float16": lambda texts: scores(texts).softmax(1).half(),
    "output": lambda texts: Output(scores(texts)),
    "numpy": lambda texts: scores(texts).softmax(1).detach().numpy(),
    "lists": lambda texts: scores(texts).softmax(1).tolist(),
    "pipeline": pipeline,
}


@pytest.mark.parametrize("kind", SAID)
def test_word_attacks_take_whatever_a_model_says(kind):
    texts, labels = ["some wooden chair", "a good room"], [0, 0]
    usual = Typos()(SAID["numpy"], texts, labels)
    assert Typos()(SAID[kind], texts, labels)[["right", "fooled"]].equals(
        usual[["right", "fooled"]]
    )


@pytest.mark.parametrize(
    "model, said",
    [
        (
            lambda texts: [row[:1] for row in pipeline(texts)],
            "scores of LABEL_.*not of every class",
        ),
        (
            lambda texts: pipeline(texts, ("bad", "good")),
            "scores of bad, good, .* allowed is a pipeline",
        ),
        (lambda texts: [row[0] for row in pipeline(texts)], "top_k=None"),
        (
            lambda texts: scores(texts),
            "no probabilities; allowed are .* an output with logits",
        ),
        (lambda texts: ["good"] * len(texts), "no array of numbers|shape"),
    ],
)
def test_what_cannot_be_understood_gets_one_sentence(model, said):
    with pytest.raises(ValueError, match=said):
        Typos()(model, ["some wooden chair", "a good room"], [0, 0])
