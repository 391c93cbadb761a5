"""Chapter 4: a run that is stopped and started again is the run that never stopped."""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bigmodel_nb.training import loop
from bigmodel_nb.training.loop import Checkpoint, MixedPrecision, fit


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


class Noisy(Dataset):
    "Rows that are drawn anew each time, by torch, numpy and Python."

    def __init__(self, rows=24):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 6, generator=generator)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        noise = torch.randn(6) + np.random.randn() + random.random()
        return self.x[row] + 0.1 * noise, self.y[row]


def some_loader(kind, workers=0):
    generator = torch.Generator().manual_seed(7)
    options = dict(batch_size=5, num_workers=workers)
    if kind == "own generator":
        return DataLoader(Noisy(), shuffle=True, generator=generator, **options)
    if kind == "with replacement":
        sampler = RandomSampler(Noisy(), replacement=True, generator=generator)
        return DataLoader(Noisy(), sampler=sampler, **options)
    return DataLoader(Noisy(), shuffle=kind == "global", **options)


LOADERS = ("own generator", "with replacement", "global", "in order")
OPTIMIZERS = {
    "adamw": lambda each: torch.optim.AdamW(each, lr=0.01),
    "sgd": lambda each: torch.optim.SGD(each, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda each: torch.optim.Adam(each, lr=0.01, amsgrad=True),
}
SCHEDULES = {
    "none": lambda optimizer: None,
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, 9
    ),
    "steps": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=50
    ),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        ],
        [3],
    ),
}


class Killed(BaseException):
    "What no `except Exception` sees: the process is gone."


class KillAt:
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, history):
        if history.steps == self.step:
            raise Killed


def a_run(
    folder=None,
    kill=None,
    every=1,
    *,
    kind,
    optimizer,
    schedule,
    workers=0,
    rows=None,
    **options,
):
    "Everything anew, as in a fresh process with the seeds of its first lines."
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    steered = OPTIMIZERS[optimizer](model.parameters())
    checkpoint = (
        None if folder is None else Checkpoint(folder, steps=every, seconds=None)
    )
    history = fit(
        model,
        some_loader(kind, workers),
        DataLoader(Noisy(10), 4, shuffle=True),
        optimizer=steered,
        scheduler=SCHEDULES[schedule](steered),
        callbacks=[] if kill is None else [KillAt(kill)],
        checkpoint=checkpoint,
        every=rows,
        device="cpu",
        **options,
    )
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    after = torch.rand(1).item(), np.random.rand(), random.random()
    return model.state_dict(), history.batch_losses, rows, history.best, after


def same(first, second):
    weights = all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert weights, "the weights differ"
    assert first[1:] == second[1:]


choices = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(LOADERS),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "schedule": st.sampled_from(sorted(SCHEDULES)),
        "accumulate": st.integers(1, 3),
        "precision": st.sampled_from(["float32", "bfloat16", "auto"]),
        "ema": st.sampled_from([None, 0.8]),
        "keep": st.sampled_from(["last", "best"]),
        "epochs": st.just(3),
    }
)


@given(choices, st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_run_killed_at_any_step_is_the_run_that_never_stopped(options, kills, every):
    with TemporaryDirectory() as made:
        never = a_run(**options)
        for kill in kills:
            try:
                a_run(made, kill, every, **options)
            except Killed:
                pass
        same(a_run(made, None, every, **options), never)


def test_saving_changes_nothing(tmp_path):
    options = dict(kind="own generator", optimizer="adamw", schedule="none", epochs=2)
    same(a_run(tmp_path / "run", **options), a_run(**options))


@pytest.mark.parametrize("kill", [2, 6, 8])
def test_workers_repeat_too(tmp_path, kill):
    options = dict(
        kind="own generator", optimizer="sgd", schedule="cosine", epochs=2, workers=2
    )
    with pytest.raises(Killed):
        a_run(tmp_path / "run", kill, **options)
    same(a_run(tmp_path / "run", **options), a_run(**options))


def test_rows_within_an_epoch_go_on(tmp_path):
    options = dict(kind="global", optimizer="sgd", schedule="none", steps=11, rows=3)
    for kill in (2, 7):
        with pytest.raises(Killed):
            a_run(tmp_path / "run", kill, patience=3, **options)
    same(a_run(tmp_path / "run", patience=3, **options), a_run(patience=3, **options))


def test_a_run_that_has_ended_comes_back_at_once_and_can_be_made_longer(tmp_path):
    options = dict(
        kind="own generator", optimizer="adamw", schedule="none", keep="best"
    )
    same(a_run(tmp_path / "run", **options, epochs=2), a_run(**options, epochs=2))
    model = a_run(tmp_path / "run", kill=1, **options, epochs=2)  # takes no step
    same(model, a_run(**options, epochs=2))
    same(a_run(tmp_path / "run", **options, epochs=4), a_run(**options, epochs=4))


def test_float16_scales_its_loss_and_resumes(tmp_path):
    options = dict(
        kind="own generator",
        optimizer="sgd",
        schedule="none",
        epochs=3,
        precision="float16",
    )
    never = a_run(**options)
    with pytest.raises(Killed):
        a_run(tmp_path / "run", 6, **options)
    same(a_run(tmp_path / "run", **options), never)


class Counts:
    "A callback that keeps something."

    def __init__(self):
        self.calls = 0

    def on_batch_end(self, history):
        self.calls += 1
        if self.calls == 4 and not history.resumed:
            raise Killed

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def simple(checkpoint=None, seed=0, epochs=2, callbacks=(), width=8, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    batches = options.pop("batches", list(zip(x.split(4), y.split(4))))
    options.setdefault("device", "cpu")
    history = fit(
        model,
        batches,
        epochs=epochs,
        checkpoint=checkpoint,
        callbacks=callbacks,
        **options,
    )
    return model, history


def test_callbacks_with_a_state_go_on(tmp_path):
    every = Checkpoint(tmp_path / "run", steps=1)
    with pytest.raises(Killed):
        simple(every, callbacks=[Counts()])
    counts = Counts()
    _, history = simple(every, callbacks=[counts])
    assert history.resumed == 3 and counts.calls == 10


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            dict(width=9),
            "is of another model: '0.weight' is (8, 6) of torch.float32 there and"
            " (9, 6) of torch.float32 here",
        ),
        (dict(accumulate=2), "accumulate is 2, and the checkpoint in"),
        (dict(ema=0.9), "ema is 0.9, and the checkpoint in"),
        (dict(precision="bfloat16"), "precision is 'bfloat16', and the checkpoint in"),
    ],
)
def test_a_checkpoint_of_another_run_names_what_differs(tmp_path, change, sentence):
    simple(tmp_path / "run")
    before = sorted((p, p.stat().st_mtime) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        simple(tmp_path / "run", epochs=3, **change)
    kept = [pair for pair in before if "lock" not in pair[0].name]
    after = sorted((p, p.stat().st_mtime) for p in (tmp_path / "run").rglob("*"))
    assert kept == [pair for pair in after if "lock" not in pair[0].name]


def test_a_checkpoint_of_another_optimizer_is_told(tmp_path):
    simple(tmp_path / "run")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"optimizer is 'SGD with groups of \[4\]', and"
    ):
        fit(
            model,
            [(torch.randn(4, 6), torch.zeros(4).long())],
            epochs=5,
            optimizer=optimizer,
            checkpoint=tmp_path / "run",
            device="cpu",
        )


def test_a_loader_that_ends_early_is_told(tmp_path):
    every = Checkpoint(tmp_path / "run", steps=1)
    with pytest.raises(Killed):
        simple(every, callbacks=[KillAt(5)])
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    sentence = (
        "train_loader gave 2 batches in epoch 1, of which the checkpoint has used 4"
    )
    with pytest.raises(ValueError, match=sentence):
        simple(every, batches=list(zip(x.split(4), y.split(4))))


def test_workers_that_persist_are_refused(tmp_path):
    batches = DataLoader(Noisy(), 5, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="^train_loader keeps its workers"):
        simple(tmp_path / "run", batches=batches)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(steps=0), "steps is 0; allowed is an integer of at least 1"),
        (dict(keep=None), "keep is None; allowed is an integer of at least 1"),
        (dict(seconds=-1), "seconds is -1; allowed is a number of at least 0 or None"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_told(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Checkpoint("run", **options)


def test_two_runs_into_one_folder_are_refused(tmp_path):
    class Second:
        def on_epoch_end(self, history):
            simple(tmp_path / "run")

    with pytest.raises(ValueError, match="run"):
        simple(tmp_path / "run", callbacks=[Second()])
    simple(tmp_path / "run")  # and afterwards the folder is free


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("everything")
    with pytest.raises(ValueError, match="thesis.tex"):
        simple(folder)
    assert [each.name for each in folder.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(tmp_path):
    every = Checkpoint(tmp_path / "run", steps=1, keep=3)
    with pytest.raises(Killed):
        simple(every, callbacks=[KillAt(7)])
    newest = max((tmp_path / "run").glob("step-*"))
    [file] = newest.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=newest.name):
        model, history = simple(every)
    assert history.resumed == 5
    never, _ = simple()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), never.parameters())
    )


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path, monkeypatch
):
    every = Checkpoint(tmp_path / "run", steps=1)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        simple(every)
    monkeypatch.setattr(os, "fsync", real)
    model, history = simple(every)
    assert history.resumed
    never, _ = simple()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), never.parameters())
    )


def test_old_checkpoints_are_pruned(tmp_path):
    simple(Checkpoint(tmp_path / "run", steps=1, keep=2))
    assert len(list((tmp_path / "run").glob("step-*"))) == 2


SCRIPT = """
    import os, sys, time, torch
    from torch import nn
    from bigmodel_nb.training.loop import Checkpoint, fit

    os.environ["TQDM_DISABLE"] = "1"
    folder, result = sys.argv[1:3]
    pause = float(sys.argv[3])
    torch.manual_seed(0)
    layers = nn.Linear(6, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 3)
    model = nn.Sequential(*layers)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    data = torch.utils.data.TensorDataset(x, y)
    batches = torch.utils.data.DataLoader(data, 4, shuffle=True)

    class Slow:
        def on_batch_end(self, history):
            print(history.steps, flush=True)
            time.sleep(pause)

    history = fit(model, batches, epochs=6, checkpoint=Checkpoint(folder, steps=3),
                  callbacks=[Slow()], accumulate=2, ema=0.9, device="cpu")
    if history.interrupted:
        sys.exit(3)
    torch.save(model.state_dict(), result)
"""


def start(tmp_path, name, pause):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [tmp_path / name, tmp_path / f"{name}.pt", str(pause)]
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_goes_on(tmp_path, how):
    process = start(tmp_path, "never", 0.0)
    assert process.wait(120) == 0, process.stderr.read()
    process = start(tmp_path, "stopped", 0.05)
    for line in process.stdout:
        if int(line) == 20:
            process.send_signal(how)
            break
    process.communicate(timeout=60)
    expected = 3 if how == signal.SIGINT else -how
    assert process.returncode == expected
    saved = sorted((tmp_path / "stopped").glob("step-*"))
    last = int(saved[-1].name.split("-")[1])
    assert last in (18, 21) if how == signal.SIGKILL else last >= 20, (
        "the step at hand is saved"
    )
    process = start(tmp_path, "stopped", 0.0)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(output.split()[0]) == last + 1, "nothing is done twice"
    ends = [torch.load(tmp_path / f"{each}.pt") for each in ("never", "stopped")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_environment_gives_each_run_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CHECKPOINT", str(tmp_path / "all"))
    monkeypatch.setattr(loop, "_CALLS", {})
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    class Tick:
        def __init__(self, kill=None):
            self.kill = kill

        def on_batch_end(self, history):
            clock[0] += 30
            if history.steps == self.kill:
                raise Killed

    simple(epochs=1)  # ends within a minute: nothing is written
    assert not (tmp_path / "all").exists()
    with pytest.raises(Killed):
        simple(callbacks=[Tick(8)])
    assert [each.name for each in (tmp_path / "all").iterdir()] == ["fit-002"]
    monkeypatch.setattr(loop, "_CALLS", {})
    simple(epochs=1)
    model, history = simple(callbacks=[Tick()])
    assert history.resumed == 6
    monkeypatch.delenv("BIGMODEL_CHECKPOINT")
    never, _ = simple()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), never.parameters())
    )


def test_without_a_checkpoint_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    class Look:
        def on_batch_end(self, history):
            seen.append(
                (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
            )

    simple(callbacks=[Look()])
    assert set(seen) == {before}


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    simple(tmp_path / "run")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def robust_objectives():
    from bigmodel_nb.robust.attacks import FGSM, PGD
    from bigmodel_nb.robust.certify import IntervalTraining, NoiseTraining
    from bigmodel_nb.robust.training import (
        AWP,
        MART,
        TRADES,
        AdversarialTraining,
        FreeTraining,
        RandomFGSM,
    )

    climb = PGD(eps=0.1, steps=2)
    return {
        "adversarial": lambda: AdversarialTraining(climb),
        "one step": lambda: AdversarialTraining(RandomFGSM(eps=0.1)),
        "trades": lambda: TRADES(climb),
        "mart": lambda: MART(climb),
        "awp": lambda: AWP(AdversarialTraining(climb)),
        "free": lambda: FreeTraining(FGSM(eps=0.1)),
        "noise": lambda: NoiseTraining(0.1),
        "intervals": lambda: IntervalTraining(0.1, ramp=8),
        "mixed": lambda: MixedPrecision(AdversarialTraining(climb), torch.bfloat16),
    }


@pytest.mark.parametrize("name", sorted(robust_objectives()))
def test_robust_objectives_go_on_with_their_own_randomness(tmp_path, name):
    def run(folder=None, kill=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.rand(20, 6), torch.randint(0, 3, (20,))
        every = None if folder is None else Checkpoint(folder, steps=2)
        fit(
            model,
            list(zip(x.split(4), y.split(4))),
            epochs=2,
            objective=robust_objectives()[name](),
            callbacks=[] if kill is None else [KillAt(kill)],
            checkpoint=every,
            device="cpu",
        )
        return model

    never = run()
    with pytest.raises(Killed):
        run(tmp_path / "run", 5)
    again = run(tmp_path / "run")
    pairs = zip(never.parameters(), again.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_alarm_goes_on_with_its_checks(tmp_path):
    from bigmodel_nb.robust.attacks import PGD
    from bigmodel_nb.robust.training import CatastrophicOverfittingAlarm

    def run(folder, kill=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.rand(20, 6), torch.randint(0, 3, (20,))
        alarm = CatastrophicOverfittingAlarm(
            model, x, y, PGD(eps=0.1, steps=2), every=2
        )
        callbacks = [alarm] + ([] if kill is None else [KillAt(kill)])
        batches = list(zip(x.split(4), y.split(4)))
        fit(
            model,
            batches,
            epochs=2,
            callbacks=callbacks,
            checkpoint=Checkpoint(folder, steps=1),
        )
        return alarm

    never = run(tmp_path / "never")
    with pytest.raises(Killed):
        run(tmp_path / "run", 5)
    again = run(tmp_path / "run")
    assert again.checks == never.checks and again.best == never.best
    assert all(
        torch.equal(never.best_weights[name], again.best_weights[name])
        for name in never.best_weights
    )
