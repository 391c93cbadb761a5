"""Chapter 4: `fit` under torchrun, unchanged, is `fit` in one process."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import itertools, os, sys, time, torch
from types import SimpleNamespace
from torch import nn
from bigmodel_nb.data.sources import loader
from bigmodel_nb.kit.core import seed_everything
from bigmodel_nb.robust.attacks import FGSM
from bigmodel_nb.robust.training import AdversarialTraining
from bigmodel_nb.training import loop
from bigmodel_nb.training.loop import Checkpoint, History, fit

os.environ["TQDM_DISABLE"] = "1"
torch.set_num_threads(1)
folder = sys.argv[1]
together = int(os.environ.get("WORLD_SIZE", "1")) > 1
found = {}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.embed(words).tanh()).mT


def ragged():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 5, (21, 7), generator=generator)
    tags = torch.randint(0, 3, (21, 7), generator=generator)
    for row in range(21):  # of very different length, some of nothing
        tags[row, row % 8 if row % 3 else 0 :] = -100
    return list(zip(words.split(5), tags.split(5)))  # the last batch holds one row


def train(name, wrap=lambda model: model, model=None, batches=None, **options):
    model = Tagger().double() if model is None else model
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    options.setdefault("epochs", 3)
    options |= dict(optimizer=optimizer, device="cpu")
    history = fit(wrapped, batches or ragged(), **options)
    whole = [
        getattr(each, "full_tensor", lambda: each)() for each in model.parameters()
    ]
    weights = torch.cat([each.detach().double().flatten() for each in whole])
    losses = torch.tensor(history.batch_losses, dtype=torch.float64)
    names = "train_loss", "valid_loss", "valid_accuracy"
    rows = [[row.get(name, 0.0) for name in names] for row in history.rows]
    found[name] = [weights, losses, torch.tensor(rows, dtype=torch.float64)]


def ddp(model):
    if not together:
        return model
    from bigmodel_nb.training.loop import join_ranks
    join_ranks("cpu")
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    if not together:
        return model
    from torch.distributed.fsdp import fully_shard
    from bigmodel_nb.training.loop import join_ranks
    join_ranks("cpu")
    return fully_shard(model)


train("plain")
train("validated", valid_loader=ragged(), keep="best", patience=2)
train("accumulated", accumulate=3)
train("clipped", max_norm=0.01)
train("averaged", ema=0.9)
train("ddp", ddp)
train("ddp accumulated", ddp, accumulate=2, max_norm=0.1)
train("fsdp", sharded, accumulate=2, max_norm=0.1)
x = torch.rand(20, 6, generator=torch.Generator().manual_seed(1))
images = loader(x, (x[:, 0] > 0.5).long(), 8, shuffle=True, seed=0)
seed_everything(0)
attacked = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()
under_attack = AdversarialTraining(FGSM(eps=0.1))
train("attacked", model=attacked, batches=images, objective=under_attack)
train("saved", checkpoint=Checkpoint(folder + "/run", steps=2), epochs=2)
train("saved", checkpoint=Checkpoint(folder + "/run", steps=2))
train("float32", model=Tagger(), epochs=None, steps=1)
train("float32, ddp", ddp, model=Tagger(), epochs=None, steps=1)
train("ddp kept", ddp, valid_loader=ragged(), keep="best")
os.environ["BIGMODEL_CHECKPOINT"] = folder + "/kept"
clock = itertools.count(0, 40)  # seconds: a save is due every other step
loop.time = SimpleNamespace(
    monotonic=lambda: next(clock), perf_counter=time.perf_counter
)
train("by environment")
if int(os.environ.get("RANK", "0")) == 0:
    torch.save(found, f"{folder}/{together}.pt")
"""


def launch(folder, *prefix):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *prefix, script, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    alone, ranks = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("ranks")
    launch(alone)
    launch(ranks, *TORCHRUN)
    return torch.load(alone / "False.pt"), torch.load(ranks / "True.pt")


NAMES = (
    "plain",
    "validated",
    "accumulated",
    "clipped",
    "averaged",
    "ddp",
    "ddp accumulated",
    "fsdp",
    "saved",
    "ddp kept",
    "by environment",
)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_take_the_steps_of_one_process(found, name):
    for alone, together in zip(found[0][name], found[1][name]):
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["float32", "float32, ddp"])
def test_gradients_of_two_ranks_in_float32(found, name):
    "After one step of rate 0.5: so far apart are half the gradients."
    alone, together = (each[name][0] for each in found)
    assert (alone - together).abs().max() < 0.5e-7


def test_robust_objectives_train_on_two_ranks(found):
    "Random starts are drawn by each rank for its own rows, so no equality is promised."
    alone, together = found[0]["attacked"], found[1]["attacked"]
    assert together[0].isfinite().all() and len(alone[1]) == len(together[1])
    torch.testing.assert_close(together[2], alone[2], rtol=0.1, atol=0.1)
