"""How long each explorer takes to draw anew after a move, at the default size.

That is computing, drawing, PNG, exchange. Prints the median of each, over moves of
every control to both of its ends and back. A hand feels no delay below 150 ms.
"""

import argparse
import statistics
import time

import pandas as pd
import torch
from sklearn.datasets import load_digits

from bigmodel_nb.adapting.features import load_encoder
from bigmodel_nb.kit.widgets import (
    Explorer,
    attack_explorer,
    attention_explorer,
    descent_explorer,
    graph_explorer,
    label_explorer,
    softmax_explorer,
)
from bigmodel_nb.models.convolution import SmallConvNet
from bigmodel_nb.robust.attacks import PGD


def explorers() -> dict[str, Explorer]:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:50] / 16).float().unsqueeze(1)
    rows = [
        {"labels": count, "method": method, "value": 0.8, "low": 0.7, "high": 0.9}
        for count in (16, 32, 64, 128, 256)
        for method in ("one", "another", "third")
    ]
    return {
        "softmax": softmax_explorer(labels=["positive", "mixed", "negative"]),
        "graph": graph_explorer(
            lambda w, x, b, t: (torch.tanh(w * x + b) - t) ** 2,
            w=0.5,
            x=2.0,
            b=-0.3,
            t=1.0,
        ),
        "descent": descent_explorer(
            lambda x, y: (x**2 + 20 * y**2) / 2,
            (-1.8, 0.6),
            ((-2.0, 2.0), (-1.0, 1.0)),
            rate=0.09,
        ),
        "attention": attention_explorer(*load_encoder(), "I would not buy it again."),
        "attack": attack_explorer(
            SmallConvNet().eval(),
            images,
            torch.from_numpy(load_digits().target[:50]),
            lambda model, x, y, radius, norm, steps: PGD(radius, norm, steps)(
                model, x, y
            ),
        ),
        "label": label_explorer(pd.DataFrame(rows)),
    }


def moves(explorer: Explorer) -> list[dict]:
    """The values at both ends of every control, each followed by those at the start."""
    found = []
    for name, control in explorer.controls.items():
        start = {each: explorer.values[each] for each in explorer.controls}
        if control.has_trait("options"):
            values = [
                each[1] if isinstance(each, tuple) else each for each in control.options
            ]
            ends = values[0], values[-1]
        elif control.has_trait("min"):
            ends = [
                control.base**end if control.has_trait("base") else end
                for end in (control.min, control.max)
            ]
        else:
            ends = "Words that were typed", "And others"
        found += [move for end in ends for move in ({name: end}, start)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of the round of all moves"
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="time of the processor in place of the clock's, for a busy machine",
    )
    chosen = parser.parse_args()
    now = time.process_time if chosen.cpu else time.perf_counter
    for name, explorer in explorers().items():
        taken = []
        for move in moves(explorer) * chosen.repeats:
            start = now()
            explorer.set(**move)
            taken.append(1000 * (now() - start))
            assert explorer.error is None, explorer.error
        print(
            f"{name}: median {statistics.median(taken):.0f} ms,"
            f" longest {max(taken):.0f} ms of {len(taken)} moves"
        )


if __name__ == "__main__":
    main()
