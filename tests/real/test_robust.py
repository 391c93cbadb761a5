"""Attacks and adversarial training on handwritten digits of 28 x 28 pixels (MNIST)."""

import functools
import gzip
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bigmodel_nb.data.sources import loader
from bigmodel_nb.robust.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    CarliniWagner,
    EnsembleAttack,
    MomentumPGD,
    Square,
    robust_accuracy,
    robustness_curve,
)
from bigmodel_nb.robust.evaluate import masking_report
from bigmodel_nb.robust.training import AdversarialTraining
from bigmodel_nb.training.loop import evaluate, fit


def mnist(folder, part, count):
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(
            file.read(16 + 784 * count), np.uint8, offset=16
        ).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        targets = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return torch.from_numpy(images / np.float32(255)), torch.from_numpy(
        targets.astype(np.int64)
    )


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def trained(images, targets, epochs, objective=None):
    net = small_net()
    fit(
        net,
        loader(images, targets, 64, shuffle=True),
        epochs=epochs,
        optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
        objective=objective,
        device="cpu",
    )
    return net.eval()


@functools.cache
def ordinary(folder):
    """A net trained on 3,000 digits, and 200 test digits."""
    return trained(*mnist(folder, "train", 3000), epochs=10), mnist(folder, "t10k", 200)


def test_a_good_net_falls_and_noise_does_not_fell_it(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    batches = loader(x, y, 100)
    curve = robustness_curve(
        net, batches, PGD(0.1, steps=10, early_stop=True), [0.0, 0.05, 0.1, 0.2]
    )
    assert curve["accuracy"][0] == evaluate(net, batches).accuracy.value > 0.9
    assert curve["accuracy"].is_monotonic_decreasing and curve["accuracy"][3] < 0.1
    noise = (
        0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    )
    assert (net((x + noise).clamp(0, 1)).argmax(1) == y).float().mean() > 0.8


def test_several_steps_do_more_than_one_in_both_balls(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    for norm, eps in (("linf", 0.1), ("l2", 1.5)):
        one, ten = (
            robust_accuracy(net, loader(x, y), attack).value
            for attack in (FGSM(eps, norm), PGD(eps, norm, early_stop=True))
        )
        assert ten < one
        change = (PGD(eps, norm, steps=3)(net, x, y) - x).flatten(1)
        assert (
            change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        ).max() <= eps * (1 + 1e-5)


def test_large_logits_hide_nothing(real_data):
    net, (x, y) = ordinary(real_data / "mnist")

    class Scaled(nn.Module):
        def forward(self, input):
            return 1000 * net(input)

    plain = robust_accuracy(net, loader(x, y, 200), PGD(0.06))
    with pytest.warns(UserWarning, match="the margin is used there"):
        masked = robust_accuracy(Scaled(), loader(x, y, 200), PGD(0.06))
    assert plain.low <= masked.value <= plain.high


def test_adversarial_training_holds(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    hardened = trained(
        *mnist(real_data / "mnist", "train", 3000),
        epochs=10,
        objective=AdversarialTraining(PGD(0.1, steps=3)),
    )
    judge, batches = (
        PGD(0.1, steps=10, loss="margin", early_stop=True),
        loader(x, y, 200),
    )
    assert (
        robust_accuracy(hardened, batches, judge).low
        > robust_accuracy(net, batches, judge).high
    )
    assert evaluate(hardened, batches).accuracy.value > 0.9


def test_each_attack_fells_what_noise_does_not(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    x, y = x[:60], y[:60]
    for attack, most in (
        (MomentumPGD(0.1), 0.5),
        (APGD(0.1, steps=20), 0.45),
        (APGD(0.1, steps=20, loss="dlr"), 0.5),
        (APGD(1.5, "l2", steps=20), 0.3),
        (APGD(15.0, "l1", steps=20), 0.3),
        (FAB(1.5, "l2", steps=5), 0.35),
        (CarliniWagner(1.5, steps=20, rounds=3, n_target_classes=2), 0.35),
        (Square(0.1, queries=500, early_stop=True), 0.75),
    ):
        assert robust_accuracy(net, [(x, y)], attack).value <= most, attack


def test_an_ensemble_and_a_quick_copy_are_no_easier(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    alone, quick, several = (
        robust_accuracy(net, loader(x, y, 100), attack)
        for attack in (
            PGD(0.06, steps=20),
            PGD(0.06, steps=20, fast=True, early_stop=True),
            EnsembleAttack([PGD(0.06, steps=20), APGD(0.06, steps=20, loss="dlr")]),
        )
    )
    assert (
        quick.value <= alone.value + 0.015
        and several.value <= alone.value
        and 0.2 < alone.value < 0.9
    )


# --- evaluate


def test_a_sweep_of_real_digits_agrees_with_single_radii(real_data):
    net, (x, y) = ordinary(real_data / "mnist")
    attack, radii = PGD(0.05, steps=20, early_stop=True), [0.0, 0.02, 0.04, 0.06, 0.1]
    curve = robustness_curve(net, loader(x, y, 100), attack, radii)
    alone = [
        robust_accuracy(net, loader(x, y, 100), attack.at(radius)).value
        for radius in radii
    ]
    assert (
        curve["accuracy"].tolist() == pytest.approx(alone, abs=0.015)
        and curve["accuracy"].iloc[-1] <= alone[-1]
    )


def test_the_standard_ensemble_is_no_easier_than_the_library(real_data):
    torchattacks = pytest.importorskip("torchattacks")
    net, (x, y) = ordinary(real_data / "mnist")
    x, y, common = x[:60], y[:60], {"eps": 0.06, "seed": 0}
    theirs = torchattacks.MultiAttack(
        [
            torchattacks.APGD(net, steps=20, **common),
            torchattacks.APGDT(net, steps=20, **common),
            torchattacks.FAB(
                net, steps=10, multi_targeted=True, n_classes=10, **common
            ),
            torchattacks.Square(net, n_queries=300, **common),
        ]
    )
    ours = robust_accuracy(
        net, [(x, y)], EnsembleAttack.standard(0.06, steps=20, queries=300)
    ).value
    assert 0.1 < ours <= (net(theirs(x, y)).argmax(1) == y).float().mean() + 1 / 60


def test_masks_on_real_digits_are_exposed_and_a_plain_net_is_not(real_data):
    net, (x, y) = ordinary(real_data / "mnist")

    class Before(nn.Module):
        def __init__(self, change, scale):
            super().__init__()
            self.change, self.scale = change, scale

        def forward(self, input):
            return self.scale * net(self.change(input))

    less = dict(
        steps=10,
        examples=100,
        queries=300,
        points=300,
        substitute=ordinary(real_data / "mnist")[0],
    )
    assert not masking_report(net, loader(x, y, 100), 0.06, **less).failed
    for masked in (
        Before(lambda x: x, 1000.0),
        Before(lambda x: (4 * x).round() / 4, 1.0),
    ):
        failed = {
            check.check
            for check in masking_report(masked, loader(x, y, 100), 0.1, **less).failed
        }
        assert "the gradient reaches the input" in failed and len(failed) >= 2


def test_a_net_trained_for_seconds_withstands_the_strongest_attack(real_data):
    """Radius 0.3, as in the literature, where nothing is left of an ordinary net.

    The whole experiment is benchmarks/mnist_robust.py.
    """
    bench = SimpleNamespace(
        **runpy.run_path(
            str(Path(__file__).parents[2] / "benchmarks" / "mnist_robust.py")
        )
    )
    batches, held = (
        loader(*mnist(real_data / "mnist", "train", 6000), 50, shuffle=True),
        [mnist(real_data / "mnist", "t10k", 120)],
    )
    shares = []
    for objective, callbacks in (
        (None, []),
        (
            objective := AdversarialTraining(PGD(0.3, steps=3)),
            [bench.Ramp(objective, 240)],
        ),
    ):
        net = bench.small_net(8)
        optimizer = torch.optim.AdamW(net.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 8e-3, total_steps=480
        )
        fit(
            net,
            batches,
            epochs=4,
            objective=objective,
            optimizer=optimizer,
            scheduler=scheduler,
            callbacks=callbacks,
            device="cpu",
        )
        assert evaluate(net, held).accuracy.value > 0.95
        shares.append(robust_accuracy(net.eval(), held, bench.strongest(0.3)))
    ordinary, hardened = shares
    assert ordinary.high < 0.1 and hardened.low > 0.5, shares
