"""Where short products pay: a step of training in bfloat16 beside one in float32.

Nets from a linear classifier to a ResNet-18 and GPTs of several widths, each a few
steps of `fit` in float32, in bfloat16 and with "auto", taking turns in each round.
Prints medians, ratios and what "auto" took. Exit code 1 where "auto" is slower than
float32 by more than a twentieth and a tenth of a millisecond, which on a busy machine
may be noise.

Two cores with AVX-512 BF16, no AMX: below 3 million FLOPs an operation, 80 an element
or 120 a parameter bfloat16 ran at 0.65 to 1.15 times the speed of float32, above all
three at 1.05 to 1.9.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.kit.core import copy_model
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.models.language import GPT, GPTConfig
from bigmodel_nb.training.loop import History, fit, supervised

ROUNDS, STEPS = 7, 4


def next_token(model: nn.Module, input: torch.Tensor, target: torch.Tensor):
    """The objective of a language model."""
    return F.cross_entropy(model(input).float().flatten(0, 1), target.flatten())


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers = [nn.Flatten()]
    for inner, outer in zip(widths, widths[1:]):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def contestants() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor, Callable]]:
    """Model, inputs, targets and objective by name."""
    torch.manual_seed(0)
    found, classify = {}, supervised(F.cross_entropy)
    for width, batch, time_ in (
        (32, 16, 64),
        (64, 16, 64),
        (128, 4, 64),
        (128, 16, 128),
        (256, 1, 128),
        (256, 16, 128),
    ):
        sizes = dict(n_positions=time_, n_embd=width, n_layer=4, n_head=4)
        ids = torch.randint(256, (batch, time_))
        name = f"GPT, {width} channels, {batch} × {time_}"
        found[name] = GPT(GPTConfig(256, **sizes)), ids, ids, next_token
    targets = torch.randint(10, (64,))
    digits, colour = torch.rand(64, 1, 8, 8), torch.rand(16, 3, 64, 64)
    large = torch.rand(64, 1, 28, 28)
    found["linear, 8 × 8"] = mlp(64, 10), digits, targets, classify
    found["MLP, 784-128-10"] = mlp(784, 128, 10), large, targets, classify
    wide = mlp(784, 1024, 1024, 10)
    found["MLP, 784-1024-1024-10"] = wide, large, targets, classify
    for width in (8, 16, 32, 64):
        net = SmallConvNet(width=width)
        found[f"SmallConvNet, width {width}"] = net, digits, targets, classify
    few = targets[:16]
    small = torchvision.models.mobilenet_v3_small(num_classes=10)
    found["MobileNet-v3 small, 64 × 64"] = small, colour, few, classify
    residual = torchvision.models.resnet18(num_classes=10)
    found["ResNet-18, 32 × 32"] = residual, colour[:, :, ::2, ::2], few, classify
    return found


class Clock:
    """A callback: when each batch ended."""

    def __init__(self):
        self.times = []

    def on_batch_end(self, history: History) -> None:
        self.times.append(time.perf_counter())


def steps(
    model: nn.Module,
    input: torch.Tensor,
    target: torch.Tensor,
    objective: Callable,
    precision: str,
) -> tuple[float, str]:
    """Seconds of a step behind the first, and the type that was used."""
    clock, batches = Clock(), [(input, target)] * (1 + STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    chosen = dict(objective=objective, optimizer=optimizer, callbacks=[clock])
    done = fit(model, batches, epochs=1, precision=precision, device="cpu", **chosen)
    return (clock.times[-1] - clock.times[0]) / STEPS, done.precision


def main() -> int:
    os.environ["TQDM_DISABLE"] = "1"
    able = torch.cpu.get_capabilities()
    print(
        f"AVX-512 BF16: {bool(able.get('avx512_bf16'))},"
        f" AMX: {bool(able.get('amx_bf16'))}, threads: {torch.get_num_threads()}"
    )
    slower = []
    for name, (model, *rest) in contestants().items():
        seconds = {precision: [] for precision in ("float32", "bfloat16", "auto")}
        for _ in range(ROUNDS):
            for precision, each in seconds.items():
                taken, used = steps(copy_model(model), *rest, precision)
                each.append(taken)
        whole = statistics.median(seconds["float32"])
        ratios = {
            precision: statistics.median(
                a / b for a, b in zip(seconds["float32"], seconds[precision])
            )
            for precision in ("bfloat16", "auto")
        }
        print(
            f"{name:30} {1e3 * whole:8.2f} ms  bfloat16 {ratios['bfloat16']:5.2f} times"
            f" as fast  auto ({used}) {ratios['auto']:5.2f}"
        )
        more = statistics.median(seconds["auto"]) - whole
        if ratios["auto"] < 0.95 and more > 1e-4:  # what choosing costs in Python
            slower.append(name)
    print("auto is slower with:", ", ".join(slower) or "none")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
