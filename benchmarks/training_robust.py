"""What an epoch of training against PGD with 7 steps costs, in ordinary epochs.

As it is, on the fast path, and with TRADES, MART, AWP, Free and one step. The fast
path: the attack runs on a copy in lower precision (`fast="auto"`, as it comes;
elsewhere `fast=False`), the step of training is in mixed precision
(`MixedPrecision`), and the net's numbers are laid out with the channels last.

Two nets: a ResNet-18 of CIFAR's size on random images, for which the ceilings stand,
and the convolutional net of the digits, in which much of the time goes by between the
products. All take turns in each round, so that whatever else the machine does falls
on all; loading and the optimiser's step are included. Before that, the net of the
digits is trained for some epochs, so that the attack that stops early (`early_stop`)
does not only meet examples that are fooled at once.

Prints medians and ratios beside the predicted ones, and exits with 1 where a ceiling
is missed: 5.7 for PGD-7 in float32, and for the fast path 2.2 where the processor has
matrix products in bfloat16 (AMX). With AVX-512 an ordinary epoch in bfloat16 costs
0.54 to 0.68 of one in float32, and 17/3 of that are 3.1 to 3.9, which is the ceiling
there; without either there is none.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch import nn
from torchvision.models import resnet18

from bigmodel_nb.data.sources import digits, loader
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.kit.core import best_dtype, copy_model
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import FGSM, PGD
from bigmodel_nb.robust.training import (
    AWP,
    MART,
    TRADES,
    AdversarialTraining,
    FreeTraining,
    RandomFGSM,
)
from bigmodel_nb.training.loop import MixedPrecision, fit, supervised

CEILINGS = {"PGD-7": 5.7}  # of the ResNet-18
if best_dtype("cpu") == torch.bfloat16:
    CEILINGS["PGD-7, fast path"] = (
        2.2 if torch.cpu.get_capabilities().get("amx_bf16") else 3.9
    )
CHANNELS_LAST = ("ordinary, fast path", "PGD-7, fast path", "the same, early_stop")


def objectives(eps: float) -> dict:
    """Each contestant, the ordinary one first."""
    fast = PGD(eps, steps=7)
    attack = replace(fast, fast=False)
    return {
        "ordinary": supervised(cross_entropy),
        "ordinary, fast path": MixedPrecision(supervised(cross_entropy)),
        "Free": FreeTraining(FGSM(eps)),
        "one step": AdversarialTraining(RandomFGSM(eps)),
        "PGD-7": AdversarialTraining(attack),
        "PGD-7, fast": AdversarialTraining(fast),
        "PGD-7, fast path": MixedPrecision(AdversarialTraining(fast)),
        "the same, early_stop": MixedPrecision(
            AdversarialTraining(replace(fast, early_stop=True))
        ),
        "TRADES-7": TRADES(attack),
        "MART-7": MART(attack),
        "AWP of PGD-7": AWP(AdversarialTraining(attack)),
    }


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def measured(
    model: nn.Module, batches, eps: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds of an epoch of each contestant in each round, from the same weights."""
    seconds = {}
    for number in range(rounds + 1):  # the first round warms up
        for name, objective in objectives(eps).items():
            net = copy_model(model)
            if name in CHANNELS_LAST:
                net.to(memory_format=torch.channels_last)
            start = time.perf_counter()
            fit(net, batches, epochs=1, objective=objective, device="cpu")
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: each[1:] for name, each in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="in which each takes its turn, after one that warms up",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=64,
        help="of the ResNet, in one batch; as many as a batch of training has",
    )
    parser.add_argument(
        "--width", type=int, default=32, help="of the net of the digits"
    )
    chosen = parser.parse_args()
    images, targets = digits()
    batches = loader(images, targets, 256, shuffle=True)
    net = SmallConvNet(width=chosen.width)
    fit(
        net,
        batches,
        epochs=10,
        objective=AdversarialTraining(PGD(0.15, steps=3)),
        optimizer=torch.optim.AdamW(net.parameters(), lr=5e-3),
        device="cpu",
    )
    x = torch.rand(chosen.images, 3, 32, 32)
    cases = {
        "digits": (net, batches, 0.15, chosen.rounds),
        "ResNet-18": (
            resnet(),
            [(x, torch.arange(len(x)) % 10)],
            8 / 255,
            max(1, chosen.rounds - 2),
        ),
    }
    missed = False
    for case, (model, data, eps, rounds) in cases.items():
        seconds = measured(model, data, eps, rounds)
        print(case)
        for name, objective in objectives(eps).items():
            ratio = statistics.median(
                own / other for own, other in zip(seconds[name], seconds["ordinary"])
            )
            predicted = getattr(objective, "passes", 3) / 3
            ceiling = CEILINGS.get(name) if case == "ResNet-18" else None
            said = "" if ceiling is None else f"  at most {ceiling:g} is promised"
            print(
                f"  {name:22} {statistics.median(seconds[name]):8.3f} s "
                f" {ratio:5.2f} ordinary epochs, {predicted:.2f} predicted{said}",
                flush=True,
            )
            missed |= ceiling is not None and ratio > ceiling
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
