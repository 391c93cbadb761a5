"""Ways to adapt MiniLM, compared on SST-2: quality, time, memory, disk, forgetting.

Takes the Stanford Sentiment Treebank from BIGMODEL_DATA/sst2 (train.tsv, dev.tsv,
test.tsv: text, tab, label), 6,920 rows to train and the official test file. The rules
are those of the lesson `adapting/methods`: the head is a logistic regression, trained
until it stops improving, with which every other way begins; each way gets the same
number of rates, a factor of four apart, and takes the one with the least loss on dev
rows; each seed draws its own training rows, order and start, the same for all ways, so
that differences are paired. Forgetting is what is left of a probe of another task (the
business of a customer's question, bundled), fitted on the base once.

    BIGMODEL_DATA=/data python benchmarks/methods.py
    BIGMODEL_DATA=/data python benchmarks/methods.py --rows 512 --seeds 5 --top 2

With all 6,920 rows the seeds differ in order and start alone. `--top N` adapts the N
topmost layers and computes what is below once. Intervals cover seeds (and the draw of
training rows, if fewer are drawn), not the draw of the test rows.
"""

import argparse
import os
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from bigmodel_nb.adapting.lora import trainable_parameters
from bigmodel_nb.adapting.methods import adapt, merge_adaptation, save_adaptation
from bigmodel_nb.data.sources import read_table, support, text_rows
from bigmodel_nb.kit.core import Difference, best_device
from bigmodel_nb.models.pretrained import fetch

MIDDLE = {
    "ia3": 2e-2,
    "bitfit": 2e-3,
    "lora": 1e-3,
    "dora": 1e-3,
    "adapter": 1e-3,
    "full": 4e-4,
}
LONGEST = 64  # tokens


def arguments() -> argparse.Namespace:
    """What to compare on, and for how long."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--rows", type=int, default=6920, help="training rows of a seed")
    asked.add_argument("--valid", type=int, default=872, help="rows of dev")
    asked.add_argument("--test", type=int, default=1821, help="rows of test")
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--epochs", type=int, default=3)
    asked.add_argument("--rates", type=int, default=5, help="of each way")
    asked.add_argument("--top", type=int, default=6, help="layers that are adapted")
    asked.add_argument("--ways", nargs="+", default=list(MIDDLE), choices=MIDDLE)
    return asked.parse_args()


class Upper(nn.Module):
    """The topmost layers of the encoder, the mean over tokens, and a head."""

    def __init__(self, encoder: nn.Module, top: int):
        super().__init__()
        self.layer = deepcopy(encoder.encoder.layer[len(encoder.encoder.layer) - top :])
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def pooled(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens of what the layers give."""
        for layer in self.layer:
            states = layer(states, (1 - mask[:, None, None]) * -1e9)
        return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.pooled(states, mask))


class Data:
    """Rows as the frozen lower layers leave them, in batches cut to their longest."""

    def __init__(self, texts, targets, encoder, tokenizer, top: int, device):
        taken = tokenizer(
            list(texts),
            padding="max_length",
            max_length=LONGEST,
            truncation=True,
            return_tensors="pt",
        )
        self.mask = taken["attention_mask"].float()
        self.target = torch.tensor(np.asarray(targets)).long()
        below = len(encoder.encoder.layer) - top
        size = (*self.mask.shape, encoder.config.hidden_size)
        self.states, self.device = torch.zeros(size), device
        with torch.no_grad():
            for rows in self.mask.sum(1).argsort().split(128):
                longest = int(self.mask[rows].sum(1).max())
                ids, mask = (
                    taken[key][rows, :longest].to(device)
                    for key in ("input_ids", "attention_mask")
                )
                found = encoder(ids, attention_mask=mask, output_hidden_states=True)
                self.states[rows, :longest] = found.hidden_states[below].cpu()

    def batch(self, rows) -> tuple[torch.Tensor, ...]:
        longest = int(self.mask[rows].sum(1).max())
        parts = self.states[rows][:, :longest], self.mask[rows][:, :longest]
        return tuple(part.to(self.device) for part in (*parts, self.target[rows]))

    @torch.no_grad()
    def outputs(self, function) -> torch.Tensor:
        order = self.mask.sum(1).argsort()
        made = [function(*self.batch(rows)[:2]).cpu() for rows in order.split(128)]
        return torch.cat(made)[order.argsort()]


def regression(features, target, C: float = 1.0) -> LogisticRegression:
    """A logistic regression that is trained until it stops improving."""
    return LogisticRegression(C=C, max_iter=10_000).fit(features, target)


def begun(base: Upper, fitted: LogisticRegression) -> Upper:
    """The base with that regression for a head."""
    model = deepcopy(base)
    with torch.no_grad():
        model.head.weight[1] = torch.tensor(fitted.coef_[0] / 2)
        model.head.bias[1] = float(fitted.intercept_[0] / 2)
        model.head.weight[0], model.head.bias[0] = (
            -model.head.weight[1],
            -model.head.bias[1],
        )
    return model


def train(
    start: Upper, way: str, rate: float, data: Data, rows, seed: int, epochs: int
):
    """AdamW over shuffled batches of 32, with a linear descent; and seconds a step."""
    torch.manual_seed(seed)
    model = adapt(deepcopy(start), way, trainable="head").train()
    named = [pair for pair in model.named_parameters() if pair[1].requires_grad]
    heads = [each for key, each in named if "head" in key]
    others = [each for key, each in named if "head" not in key]
    groups = [{"params": others, "lr": rate}, {"params": heads, "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = epochs * -(-len(rows) // 32)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / steps)
    began = time.perf_counter()
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows))].split(32):
            states, mask, target = data.batch(part)
            loss = F.cross_entropy(model(states, mask), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falls.step()
    return model.eval(), (time.perf_counter() - began) / steps


def stored_bytes(model: nn.Module, batch) -> int:
    """Bytes of what autograd keeps for the backward pass, apart from weights."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(*batch[:2]), batch[2])
    return sum(found.values())


def rank_of_change(model: Upper, base: Upper) -> int:
    """Singular values with nine tenths of the change of the topmost values' weight."""
    value = merge_adaptation(deepcopy(model)).layer[-1].attention.self.value
    change = value.weight - base.layer[-1].attention.self.value.weight
    squares = torch.linalg.svdvals(change.detach()).square().cumsum(0)
    return int((squares < 0.9 * squares[-1]).sum()) + 1


def sentiment(name: str) -> pd.DataFrame:
    folder = Path(os.environ.get("BIGMODEL_DATA", "."), "sst2")
    read = read_table(folder / f"{name}.tsv", header=False, as_text=True)
    return text_rows(read, "0", "1")


def main() -> None:
    asked, device = arguments(), best_device()
    source = str(fetch("all-MiniLM-L6-v2"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    options = {"use_safetensors": True, "attn_implementation": "eager"}
    encoder = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
    encoder = encoder.to(device).eval().requires_grad_(False)

    def prepared(texts, targets):
        return Data(texts, targets, encoder, tokenizer, asked.top, device)

    rows, parts = sentiment("train"), {}
    generators = (torch.Generator().manual_seed(seed) for seed in range(asked.seeds))
    drawn = [torch.randperm(len(rows), generator=g)[: asked.rows] for g in generators]
    some, places = torch.cat(drawn).unique(return_inverse=True)
    drawn = list(places.split([len(each) for each in drawn]))
    for name, rows in (
        ("train", rows.iloc[some.numpy()]),
        ("dev", sentiment("dev")[: asked.valid]),
        ("test", sentiment("test")[: asked.test]),
    ):
        parts[name] = prepared(rows["text"], rows["label"].astype(int))
    train_data, dev, test = parts.values()
    questions = support()
    kinds = questions["business"].astype("category").cat.codes
    fitted_on, read_from = (
        prepared(questions["text"][own], kinds[own])
        for own in (questions["split"] == "train", questions["split"] == "test")
    )
    base = Upper(encoder, asked.top).to(device).eval()
    probe = regression(fitted_on.outputs(base.pooled), fitted_on.target)
    features = train_data.outputs(base.pooled)
    ratings = [k - asked.rates // 2 for k in range(asked.rates)]

    def dev_loss(model):
        return F.cross_entropy(dev.outputs(model), dev.target).item()

    def head(rows, C):
        return begun(base, regression(features[rows], train_data.target[rows], C))

    losses = {"head": {k: dev_loss(head(drawn[0], 4.0**k)) for k in ratings}}
    C = 4.0 ** min(losses["head"], key=losses["head"].get)
    models = {"head": [head(rows, C) for rows in drawn]}
    seconds = {}
    for way in asked.ways:
        began, losses[way] = time.perf_counter(), {}
        for k in ratings:
            run = (train_data, drawn[0], 0, asked.epochs)
            model, _ = train(models["head"][0], way, MIDDLE[way] * 4.0**k, *run)
            losses[way][k] = dev_loss(model)
            if losses[way][k] == min(losses[way].values()):
                models[way] = [model]
        rate = MIDDLE[way] * 4.0 ** min(losses[way], key=losses[way].get)
        took = []
        for seed in range(1, asked.seeds):
            run = (train_data, drawn[seed], seed, asked.epochs)
            model, each = train(models["head"][seed], way, rate, *run)
            models[way].append(model)
            took.append(each)
        seconds[way] = float(np.median(took)) if took else float("nan")
        spent = time.perf_counter() - began
        told = {
            f"{MIDDLE[way] * 4.0**k:.1e}": round(v, 4) for k, v in losses[way].items()
        }
        print(f"{way}: dev loss by rate {told}, {spent:.0f} s", flush=True)

    def right(model):
        return (test.outputs(model).argmax(1) == test.target).float().mean().item()

    def left(model):
        read = probe.predict(read_from.outputs(model.pooled))
        return (read == read_from.target.numpy()).mean()

    found = {way: [right(each) for each in own] for way, own in models.items()}
    kept = {way: [left(each) for each in own] for way, own in models.items()}
    rows, batch = {}, train_data.batch(drawn[0][:32])
    for way, own in models.items():
        fresh = adapt(deepcopy(models["head"][0]), way, trainable="head")
        with tempfile.TemporaryDirectory() as folder:
            save_adaptation(fresh, Path(folder, "a"))
            disk = Path(folder, "a", "adapter_model.safetensors").stat().st_size
        count = trainable_parameters(fresh)["trainable"]
        best = min(losses[way], key=losses[way].get)
        merges = way in ("ia3", "lora", "dora", "full")
        rows[way] = {
            "accuracy": f"{np.mean(found[way]):.2%}",
            "over the head": str(Difference.of_runs(found["head"], found[way])),
            "probe": str(Difference.of_runs(kept["head"], kept[way])),
            "at an edge": best in (ratings[0], ratings[-1]),
            "numbers": f"{count:,}",
            "state MB": f"{12 * count / 1e6:.2f}",
            "stored MB": f"{stored_bytes(fresh, batch) / 1e6:.1f}",
            "disk MB": f"{disk / 1e6:.2f}",
            "ms/step": f"{1000 * seconds.get(way, 0):.0f}",
            "rank": rank_of_change(own[0], base) if merges else "-",
        }
    print(vars(asked))
    print(
        f"probe of the base {np.mean(kept['head']):.1%}, {len(test.target)} test rows"
    )
    print(pd.DataFrame(rows).T.to_string())
    names = list(found)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for pair in pairs:
        apart = Difference.of_runs(*(found[each] for each in pair))
        if apart.verdict != "not told apart":
            print(apart.sentence(*pair))


if __name__ == "__main__":
    main()
