"""What `fit` costs a step beside a bare loop, and what a checkpoint costs.

Bare loops stand beside it, on the same run, by turns: the ten lines; the ten lines that
look at the loss (`.item()`), as every loop that reports it does; and these with
clipping, which `fit` with `max_norm` does too. Each step is timed, setting up is not;
of a round the median step counts. Ratios are medians over rounds, with quartiles. Exit
code 1 where a step of `fit` is 3 % longer than that of a bare loop that does the same,
at a step of 20 ms, which on a busy machine may be noise.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bigmodel_nb.training.loop import Checkpoint, fit, supervised

WAYS = ("bare", "bare, loss", "bare, loss, clips", "fit", "fit, max_norm")


class Marks:
    """When each step ended: a callback of `fit`, and called by the bare loops."""

    def __init__(self):
        self.times = []

    def on_batch_end(self, history=None):
        self.times.append(time.perf_counter())


def network(width: int) -> nn.Module:
    """Three linear layers, the same weights each time."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def bare(model, batches, optimizer, marks, looks, clips):
    """The ten lines."""
    for input, target in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if looks:
            loss.item()
        marks.on_batch_end()


def step_seconds(way: str, width: int, rows: int, count: int) -> float:
    """The median step of a run in one of the ways."""
    model, marks = network(width).train(), Marks()
    input = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    batches = [(input, torch.zeros(rows, dtype=torch.long))] * count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = dict(epochs=1, optimizer=optimizer, callbacks=[marks], device="cpu")
    options |= dict(objective=supervised(nn.functional.cross_entropy))
    with tempfile.TemporaryDirectory() as folder:
        if way == "fit":
            fit(model, batches, **options)
        elif way == "fit, max_norm":
            fit(model, batches, max_norm=1.0, **options)
        elif way == "fit, saved each step":
            every = Checkpoint(Path(folder) / "run", steps=1)
            fit(model, batches, checkpoint=every, **options)
        else:
            bare(model, batches, optimizer, marks, "loss" in way, "clips" in way)
    return float(np.median(np.diff(marks.times)))


def compare(width: int, rows: int, count: int, rounds: int, ways=WAYS) -> dict:
    """Median steps by way, one a round, the ways in turn."""
    for way in ways:
        step_seconds(way, width, rows, 3)
    taken = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways if turn % 2 else reversed(ways):
            taken[way].append(step_seconds(way, width, rows, count))
    return {way: np.array(each) for way, each in taken.items()}


def told(ratios: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    slow = False
    for width, rows, count in ((32, 64, 200), (1024, 512, 20)):
        taken = compare(width, rows, count, 15)
        step = 1000 * np.median(taken["bare, loss"])
        print(f"width {width}, {rows} rows: a step of {step:.2f} ms with its loss")
        for way, each in taken.items():
            print(f"  {way:18s} {told(each / taken['bare, loss'])} times that")
        for ours, theirs in (("fit", "bare, loss"), ("fit, max_norm", WAYS[2])):
            ratios = taken[ours] / taken[theirs]
            bound = " (at most 1.03)" if step > 15 else ""
            print(f"  {ours} beside {theirs}: {told(ratios)}{bound}")
            slow |= step > 15 and np.median(ratios) > 1.03
    taken = compare(1024, 512, 15, 5, ("fit", "fit, saved each step"))
    plain, saved = (np.median(each) for each in taken.values())
    size = sum(each.numel() * 4 for each in network(1024).parameters()) / 1e6
    print(f"a checkpoint of {size:.0f} MB of weights: {1000 * (saved - plain):.1f} ms,")
    print(f"  {(saved - plain) / 60:.3%} of the time at one a minute, the default")
    sys.exit(int(slow))
