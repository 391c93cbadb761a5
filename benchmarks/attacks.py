"""PGD of robust/attacks with 20 steps against torchattacks, foolbox and a plain loop: the time, at a robust accuracy that is as low.

Four cases: a CIFAR-size ResNet-18 (random weights, classes as it gives them), a digits net at a radius that fells most digits, on all 1,797 of them and on
the 362 that were held out, and at one that fells nearly all. All take turns in each round; whatever an attack finds is judged by the model in float32.
Prints medians and ratios, and exits with 1 where a floor is missed: as fast copy (`fast`) 2 times torchattacks on the ResNet; as fast copy that leaves fooled
images alone (`early_stop`) 4 times torchattacks on all digits; and 3 times more through `early_stop` on the undefended net; nowhere with a robust accuracy
above the interval of the others. foolbox takes part where it is installed (`pip install foolbox`).
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchattacks
from torch import Tensor, nn
from torchvision.models import resnet18

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.kit.core import Proportion
from bigmodel_nb.models.vision import SmallConvNet
from bigmodel_nb.robust.attacks import PGD
from bigmodel_nb.training.loop import fit

try:
    import foolbox
except ImportError:
    foolbox = None

STEPS = 20
FLOORS = {("ResNet-18", "fast", "torchattacks"): 2.0, ("digits", "fast, early_stop", "torchattacks"): 4.0,
          ("undefended", "fast, early_stop", "fast"): 3.0}


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Steps of eps / 4 along the sign of the slope, in the input alone."""
    found = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        found.requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(found), y), found)
        found = (x + (found.detach() + eps / 4 * slope.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return found


def attacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Callable[[], Tensor]]:
    """Each contestant, ready to be called."""
    theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)
    others = {}
    if foolbox:
        watched, other = foolbox.PyTorchModel(model, bounds=(0, 1)), foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=0.25)
        others["foolbox"] = lambda: other(watched, x, y, epsilons=eps)[1]
    ours = {"as it is": {}, "fast": {"fast": True}, "fast, early_stop": {"fast": True, "early_stop": True}}
    return {
        "plain loop": lambda: plain_loop(model, x, y, eps),
        "torchattacks": lambda: theirs(x, y),
        **others,
        **{name: lambda options=options: PGD(eps, steps=STEPS, **options)(model, x, y) for name, options in ours.items()},
    }


def resnet_case(batch: int) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A ResNet-18 of random weights, and random images with the classes that it gives them."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 32, 32))  # running means of something
        x = torch.rand(batch, 3, 32, 32)
        return model, x, model.eval()(x).argmax(1), 8 / 255


def digits_case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A net, all images and classes, and the rows on which the net was not trained."""
    images, targets = digits()
    train, test = split_indices(targets, (0.8, 0.2), 0)
    torch.manual_seed(0)
    net = SmallConvNet()
    fit(net, loader(images[train], targets[train], shuffle=True), epochs=8, optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3), device="cpu")
    return net.eval(), images, targets, test


def measured(model: nn.Module, x: Tensor, y: Tensor, eps: float, rounds: int) -> tuple[dict[str, list[float]], dict[str, Proportion]]:
    """Seconds of each contestant in each round, and the robust accuracy that it leaves."""
    contestants, seconds, left = attacks(model, x, y, eps), {}, {}
    for number in range(rounds + 1):  # the first round warms up
        for name, attack in contestants.items():
            start = time.perf_counter()
            found = attack()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            with torch.no_grad():
                left[name] = Proportion.of((model(found).argmax(1) == y).sum(), len(y))
            model.zero_grad()  # foolbox writes into the parameters' gradients
    return {name: each[1:] for name, each in seconds.items()}, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="in which each takes its turn, after one that warms up")
    parser.add_argument("--batch", type=int, default=48, help="images for the ResNet")
    chosen = parser.parse_args()
    net, x, y, held = digits_case()
    cases = {"ResNet-18": resnet_case(chosen.batch), "digits": (net, x, y, 0.15), "digits held out": (net, x[held], y[held], 0.15),
             "undefended": (net, x, y, 0.3)}
    missed = False
    for case, (model, inputs, targets, eps) in cases.items():
        seconds, left = measured(model, inputs, targets, eps, chosen.rounds if case != "ResNet-18" else max(1, chosen.rounds - 2))
        print(f"{case}, {len(inputs)} images, radius {eps:.3f}")
        for name, each in seconds.items():
            ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds["torchattacks"], each))
            print(f"  {name:17} {statistics.median(each):8.3f} s  {ratio:5.2f} times torchattacks  robust accuracy {left[name]}")
        for (where, ours, other), floor in FLOORS.items():
            if where == case:
                ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[other]))
                print(f"  {ours}: {ratio:.2f} times as fast as {other}; at least {floor:g} is promised")
                missed |= ratio < floor or left[ours].value > left[other].high
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
