"""What threads that wait cost.

Steps of training a small transformer with and without `GOMP_SPINCOUNT=1000`. Each
measurement is a process of its own with two threads, alone and beside a process that
keeps a core busy, in turns. Prints the medians and their ratios. `--measure` is one
measurement: it prints steps a second.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from bigmodel_nb.headless.kernel import KERNEL_ENVIRONMENT


def measure(seconds: float) -> float:
    """Steps a second."""
    import torch

    torch.manual_seed(0)
    # the size of MiniLM's
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.randn(16, 32, 384)

    def step() -> None:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        step()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def ask(environment: dict[str, str], beside: int, seconds: float) -> float:
    """One measurement in a process of its own, beside processes that compute."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(beside)
    ]
    try:
        command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
        done = subprocess.run(
            command,
            env={**plain, "OMP_NUM_THREADS": "2", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)
    finally:
        for each in busy:
            each.kill()
            each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument(
        "--measure", action="store_true", help="only measure, in this process"
    )
    options = parser.parse_args()
    if options.measure:
        print(measure(options.seconds))
        return
    for beside, words in ((0, "alone"), (1, "beside a busy process")):
        turns = [
            (
                ask({}, beside, options.seconds),
                ask(KERNEL_ENVIRONMENT, beside, options.seconds),
            )
            for _ in range(options.repeats)
        ]
        spinning, sleeping = (statistics.median(column) for column in zip(*turns))
        ratios = sorted(after / before for before, after in turns)
        print(
            f"{words}: {spinning:.1f} steps a second spinning,"
            f" {sleeping:.1f} with GOMP_SPINCOUNT=1000:"
            f" {statistics.median(ratios):.2f} times as fast"
            f" (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
