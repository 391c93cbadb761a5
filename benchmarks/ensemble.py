"""What the standard ensemble of robust/attacks and AutoAttack leave standing.

AutoAttack is that of torchattacks and that of ART; the nets are hardened, and all is
compared example by example. Three cases: a digits net, the same at another radius, and
a net for MNIST where `BIGMODEL_DATA` names a folder that holds it. All attack with 100
steps and 5,000 queries, ours and torchattacks towards nine rivals. ART starts each
climb and search five times, so ours takes part with one start and with five; the parts
of torchattacks' AutoAttack take 10 steps, so they take part with 10 and with 100.
Whatever an attack finds is judged by the model in float32.

Prints what stands, and for each pair which examples only one of them fells, with the
margin that the other one reached: within rounding of 0 the two stopped at the same
boundary. Exits with 1 where another ensemble leaves fewer standing than ours of five
starts. torchattacks and ART take part where they are installed
(`pip install torchattacks adversarial-robustness-toolbox`).
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from mnist_robust import mnist
from torch import Tensor, nn

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.kit.core import Proportion
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import PGD, EnsembleAttack, _judged
from bigmodel_nb.robust.training import AdversarialTraining
from bigmodel_nb.training.loop import fit

try:
    import torchattacks
except ImportError:
    torchattacks = None
try:
    from art.attacks.evasion import AutoAttack
    from art.estimators.classification import PyTorchClassifier
except ImportError:
    AutoAttack = None


def hardened(
    net: nn.Module, images: Tensor, targets: Tensor, eps: float, epochs: int
) -> nn.Module:
    fit(
        net,
        loader(images, targets, 64, shuffle=True),
        epochs=epochs,
        optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
        device="cpu",
        objective=AdversarialTraining(PGD(eps, steps=5)),
    )
    return net.eval()


def cases(count: int) -> dict[str, tuple[nn.Module, Tensor, Tensor, float]]:
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    torch.manual_seed(0)
    net = hardened(SmallConvNet(width=16), images[train], targets[train], 0.15, 10)
    some, labels = images[test][:count], targets[test][:count]
    found = {
        "digits, 0.15": (net, some, labels, 0.15),
        "digits, 0.2": (net, some, labels, 0.2),
    }
    folder = Path(os.environ.get("BIGMODEL_DATA", "")) / "mnist"
    if folder.is_dir():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        found["MNIST, 0.15"] = (
            hardened(net, *mnist(folder, "train", 6000), 0.15, 8),
            *mnist(folder, "t10k", count),
            0.15,
        )
    return found


def contestants(
    net: nn.Module, eps: float
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each ensemble, ready to be called."""
    found = {
        f"ours, {starts} start{'s' * (starts > 1)}": lambda x, y, starts=starts: (
            EnsembleAttack.standard(eps, restarts=starts)(net, x, y)
        )
        for starts in (1, 5)
    }
    if torchattacks:
        common = {"eps": eps, "seed": 0}
        found["torchattacks"] = torchattacks.AutoAttack(net, **common)
        found["torchattacks, 100 steps"] = torchattacks.MultiAttack(
            [
                torchattacks.APGD(net, steps=100, **common),
                torchattacks.APGDT(net, steps=100, **common),
                torchattacks.FAB(
                    net, steps=100, multi_targeted=True, n_classes=10, **common
                ),
                torchattacks.Square(net, n_queries=5000, **common),
            ]
        )
    if AutoAttack:

        def of_art(x: Tensor, y: Tensor) -> Tensor:
            wrapped = PyTorchClassifier(
                net,
                nn.CrossEntropyLoss(),
                tuple(x.shape[1:]),
                10,
                clip_values=(0.0, 1.0),
                device_type="cpu",
            )
            return torch.from_numpy(
                AutoAttack(
                    wrapped, eps=eps, eps_step=eps / 10, batch_size=len(x)
                ).generate(x.numpy(), y.numpy())
            ).float()

        found["ART"] = of_art
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="images in each case")
    chosen, missed = parser.parse_args(), False
    for case, (net, x, y, eps) in cases(chosen.examples).items():
        with torch.no_grad():
            right = net(x).argmax(1) == y
        x, y, margins = x[right], y[right], {}
        print(f"{case}: {len(x)} of {len(right)} images are read rightly")
        for name, attack in contestants(net, eps).items():
            start = time.perf_counter()
            with warnings.catch_warnings(action="ignore"):
                found = attack(x, y)
            seconds = time.perf_counter() - start
            outside = (found - x).abs().max().item() - eps
            margins[name] = _judged(net, found, y)
            left = Proportion.of((margins[name] <= 0).sum(), len(x))
            print(
                f"  {name:24} {left} stand, {seconds:6.1f} s"
                + (f", {outside:.1e} outside of the ball" if outside > 1e-6 else ""),
                flush=True,
            )
        ours = "ours, 5 starts"
        for name in [each for each in margins if each != ours]:
            for first, second in ((ours, name), (name, ours)):
                only = (margins[first] > 0) & ~(margins[second] > 0)
                for row in only.nonzero()[:, 0].tolist():
                    print(
                        f"    image {row} falls to {first} by"
                        f" {margins[first][row]:.4f} and stands under {second} by"
                        f" {-margins[second][row]:.4f} (logits)"
                    )
            missed |= bool((margins[ours] <= 0).sum() > (margins[name] <= 0).sum())
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
