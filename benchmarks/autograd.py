"""The engine of foundations/autograd against micrograd and torch.

On micrograd's own example: two moons, an MLP of 2-16-16-1, the max-margin loss with
weight decay, gradient descent; 100 examples in float64, one thread, the garbage
collector off. The three take turns, after ten steps in which their losses must agree to
1e-9. Prints the median time of a step of each and two ratios, and exits with 1 where a
floor is missed: 300 times micrograd, as fast as torch.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from micrograd.engine import Value
from micrograd.nn import MLP
from sklearn.datasets import make_moons

from bigmodel_nb.foundations import autograd

FLOORS = {"micrograd": 300.0, "torch": 1.0}
DECAY = 1e-4


def rate(step: int) -> float:
    return 1.0 - 0.9 * min(step, 99) / 100


def micrograd_step(
    model: MLP, inputs: np.ndarray, targets: np.ndarray
) -> Callable[[int], float]:
    rows, signs = [list(map(Value, row)) for row in inputs], targets.tolist()

    def step(number: int) -> float:
        losses = [(1 - sign * model(row)).relu() for row, sign in zip(rows, signs)]
        loss = sum(losses) * (1.0 / len(losses)) + DECAY * sum(
            p * p for p in model.parameters()
        )
        model.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.data -= rate(number) * p.grad
        return loss.data

    return step


def tensor_step(
    library,
    tensor: Callable,
    weights: list[np.ndarray],
    inputs: np.ndarray,
    targets: np.ndarray,
) -> Callable[[int], float]:
    """The same step with tensors: the code is the same for both libraries."""
    weights = [tensor(weight, requires_grad=True) for weight in weights]
    rows, signs = tensor(inputs), tensor(targets[:, None])

    def step(number: int) -> float:
        hidden = rows
        for place in range(0, len(weights), 2):
            hidden = hidden @ weights[place] + weights[place + 1]
            hidden = hidden.relu() if place < len(weights) - 2 else hidden
        loss = (1 - signs * hidden).relu().mean()
        for weight in weights:
            loss = loss + DECAY * (weight * weight).sum()
        loss.backward()
        with library.no_grad():
            for weight in weights:
                weight -= rate(number) * weight.grad
                weight.grad = None
        return loss.item()

    return step


def arrays(model: MLP) -> list[np.ndarray]:
    """The weights of a micrograd model, layer by layer.

    Matrices are (input, output), vectors (output,).
    """
    found = []
    for layer in model.layers:
        found.append(
            np.array(
                [[w.data for w in neuron.w] for neuron in layer.neurons], dtype=float
            ).T
        )
        found.append(np.array([neuron.b.data for neuron in layer.neurons], dtype=float))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, help="in which each takes its turn"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=200,
        help="of both tensor libraries in a turn; micrograd takes one",
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(1337)
    inputs, signs = make_moons(n_samples=100, noise=0.1, random_state=1337)
    targets, model = 2.0 * signs - 1, MLP(2, [16, 16, 1])
    weights = arrays(model)
    steps = {
        "micrograd": micrograd_step(model, inputs, targets),
        "ours": tensor_step(autograd, autograd.Tensor, weights, inputs, targets),
        "torch": tensor_step(torch, torch.tensor, weights, inputs, targets),
    }
    gc.disable()
    losses = [[step(number) for step in steps.values()] for number in range(10)]
    apart = np.ptp(losses, axis=1).max()
    taken = {name: [] for name in steps}
    for _ in range(chosen.rounds):
        for name, step in steps.items():
            repeats = 1 if name == "micrograd" else chosen.steps
            start = time.perf_counter()
            for _ in range(repeats):
                step(100)
            taken[name].append((time.perf_counter() - start) / repeats)
        gc.collect()
    medians = {name: statistics.median(each) for name, each in taken.items()}
    print(
        "; ".join(f"{name} {1e6 * each:,.0f} µs" for name, each in medians.items()),
        "a step;",
        f"losses differ by {apart:.0e} at most",
    )
    ratios = {
        name: statistics.median(b / a for a, b in zip(taken["ours"], taken[name]))
        for name in FLOORS
    }
    for name, ratio in ratios.items():
        print(
            f"{ratio:,.1f} times as fast as {name};"
            f" at least {FLOORS[name]:g} is promised"
        )
    return int(
        apart > 1e-9 or any(ratios[name] < floor for name, floor in FLOORS.items())
    )


if __name__ == "__main__":
    sys.exit(main())
