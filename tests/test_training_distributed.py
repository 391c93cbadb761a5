"""Several ranks from one process: equal to one process, and nothing is left behind.

Two gloo ranks of one thread each; several facts share a run, since each costs seconds.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training import distributed as module
from bigmodel_nb.training.distributed import (
    RanksFailed,
    deal_rows,
    last_run,
    load_ipython_extension,
    load_sharded,
    result,
    ring_bytes,
    save_sharded,
    stored_bytes,
    torchrun,
)

START = """
import os
import signal
import time

import torch
import torch.distributed as dist
from bigmodel_nb.training.distributed import *
from bigmodel_nb.training.loop import join_ranks
device = join_ranks()
rank, ranks = dist.get_rank(), dist.get_world_size()
"""


def expect_distributed(m):
    assert m["gradient_difference"]["float64"] < 1e-14, "the gradient of one process"
    assert m["gradient_difference"]["float32"] < 1e-6
    assert m["mean_of_means_error"] > 0.1, "a mean of means is wrong, and seen to be"
    assert m["weighted_difference"] < 1e-14, "weighted by tokens it is right"
    assert max(m["ddp_difference"].values()) < 1e-14, "so is DDP, with no_sync too"
    assert m["sent_in_no_sync"] == 0, "no_sync sends nothing"
    assert m["norm_difference"] < 1e-14 and m["clipped_difference"] < 1e-14
    assert max(m["ways_difference"].values()) < 1e-6, "three ways, one gradient"
    assert m["stored_as_computed"] and m["traffic_as_computed"], "as computed"
    assert m["ring_right"] and m["ring_as_computed"], "a ring by hand"
    whole, shard = (sum(m["stored"][way].values()) for way in ("DDP", "FSDP2"))
    assert 0.49 < shard / whole < 0.51, "two ranks share everything"
    assert m["read_equal"], "one process reads what two have saved"
    assert m["restarts"] == 1 and m["resumed_after"] == 3 and m["resumed_equal"]
    assert m["plan_checked"], "the arithmetic of the plan"
    assert "rank 0 was in line 9, `dist.all_reduce" in m["deadlock"]
    assert "rank 1 was in line 11, `dist.barrier" in m["deadlock"]
    assert m["rows_missed"]["one seed"] == 0 < m["rows_missed"]["each its own"]
    assert m["order_repeats"] == {"forgotten": True, "set_epoch(1)": False}


def nobody_left(folder_of_ranks):
    """Processes of these tests whose code is a rank's."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and folder_of_ranks in line:
                found.append(line)
        except psutil.Error:
            continue
    return not found


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """The folders of runs lie here, so that their processes can be told."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    yield str(tmp_path)
    end = time.monotonic() + 15
    while not nobody_left(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert nobody_left(str(tmp_path)), "ranks are left"
    assert not list(tmp_path.glob("ranks-*")), "a folder is left"


# --- the launcher


def double(x):
    return 2 * x


def test_values_and_functions_go_there_and_results_come_back(own_folders, capsys):
    x = torch.randn(3, dtype=torch.float64)
    code = """
import torch
from bigmodel_nb.training.distributed import result
from bigmodel_nb.training.loop import join_ranks
import torch.distributed as dist

print("device", join_ranks())
rank = dist.get_rank()
result(twice=double(x), rank=rank, many={"a": [1, 2.5, None, "b"]})
result(rank=rank + 10)
print("a bar 10%\\ra bar 100%")
print("no newline at the end", end="")
"""
    found = torchrun(code, given={"x": x, "double": double})
    assert last_run() is found and found.restarts == 0 and found.seconds > 0
    for rank, each in enumerate(found.results):
        assert torch.equal(each["twice"], 2 * x) and each["rank"] == rank + 10
        assert each["many"] == {"a": [1, 2.5, None, "b"]}
    shown = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        own = [line for line in shown if line.startswith(f"rank {rank} | ")]
        assert [line.removeprefix(f"rank {rank} | ") for line in own] == [
            "device cpu",
            "a bar 100%",
            "no newline at the end",
        ]


def test_no_rank_goes_on_before_all_have_joined(own_folders):
    code = """
import os, time
import torch.distributed as dist
from bigmodel_nb.training.distributed import result
from bigmodel_nb.training.loop import join_ranks

start = dist.init_process_group
def late(*given, **named):
    start(*given, **named)
    time.sleep(3 * int(os.environ["RANK"]))
dist.init_process_group = late
join_ranks()
result(joined=time.time())
"""
    first, second = (each["joined"] for each in torchrun(code).results)
    assert abs(second - first) < 2, "a rank that ends early would break off the others"


def test_the_rank_that_failed_is_named_with_its_line(own_folders, capsys):
    code = (
        START + "if rank == 1:\n    raise KeyError('no such thing')\ndist.barrier()\n"
    )
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        torchrun(code)
    assert time.monotonic() - start < 60
    assert str(caught.value) == (
        "rank 1 of 2 failed, in line 13 of the cell, `raise KeyError('no such thing')`:"
        " KeyError: 'no such thing'; the other rank was stopped"
    )
    assert caught.value.rank == 1
    assert caught.value.tracebacks[1].startswith("Traceback (most recent call last)")
    assert caught.value._render_traceback_() == [f"RanksFailed: {caught.value}"]


def test_a_killed_rank_ends_the_others_and_a_restart_goes_on(own_folders):
    code = START + (
        "if rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "x = torch.ones(1)\ndist.all_reduce(x)\n"
        "result(x=x, kept=os.environ.get('BIGMODEL_CHECKPOINT'))\n"
    )
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        torchrun(code, echo=False)
    assert time.monotonic() - start < 60, "it does not wait for a timeout"
    assert str(caught.value).startswith("rank 1 of 2 was killed by SIGKILL")
    assert caught.value.rank == 1
    found = torchrun(code, max_restarts=1, echo=False)
    assert found.restarts == 1 and [each["x"].item() for each in found.results] == [
        2,
        2,
    ]
    assert all(each["kept"] for each in found.results), "a folder for checkpoints"


def test_after_the_timeout_it_says_where_each_rank_stands(own_folders):
    code = START + ("if rank == 0:\n    dist.barrier()\nelse:\n    time.sleep(1000)\n")
    with pytest.raises(RanksFailed) as caught:
        torchrun(code, timeout=15, echo=False)  # they import for seconds
    assert str(caught.value) == (
        "the ranks had not ended after 15 s and were stopped: rank 0 was in line 13,"
        " `dist.barrier()`; rank 1 was in line 15, `time.sleep(1000)`"
    )


def test_different_collectives_are_named(own_folders):
    code = START + (
        "if rank == 0:\n    dist.broadcast(torch.ones(1), 0)\n"
        "else:\n    dist.all_reduce(torch.ones(1))\n"
    )
    with pytest.raises(RanksFailed, match="mismatch between collectives") as caught:
        torchrun(code, debug=True, timeout=60, echo=False)
    assert "BROADCAST" in str(caught.value) and "ALLREDUCE" in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_an_interrupt_stops_all_ranks(own_folders):
    code = START + "print('here')\ntime.sleep(1000)\n"
    stopper = threading.Timer(12, os.kill, (os.getpid(), signal.SIGINT))
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        torchrun(code, echo=False)
    stopper.join()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ranks_end_with_the_process_that_started_them(own_folders, tmp_path):
    marker = tmp_path / "there"
    script = tmp_path / "notebook.py"
    code = START + f"open({str(marker)!r} + str(rank), 'w').close()\ntime.sleep(1000)\n"
    script.write_text(
        "import tempfile\nfrom bigmodel_nb.training.distributed import torchrun\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\ntorchrun({code!r}, max_restarts=2)\n"
    )
    process = module.subprocess.Popen([sys.executable, str(script)])
    end = time.monotonic() + 120
    while time.monotonic() < end and not all(
        Path(f"{marker}{rank}").exists() for rank in (0, 1)
    ):
        time.sleep(0.1)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while time.monotonic() < end and not nobody_left(str(tmp_path)):
        time.sleep(0.2)
    assert nobody_left(str(tmp_path))
    for left in tmp_path.glob("ranks-*"):
        module.shutil.rmtree(left)


def test_nothing_starts_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(module, "_start", None)
    for options, said in (
        (dict(nproc=0), "nproc is 0; allowed is an integer from 1 on"),
        (dict(nproc=True), "nproc is True"),
        (dict(max_restarts=-1), "max_restarts is -1; allowed is an integer from 0 on"),
        (dict(threads=0), "threads is 0"),
        (dict(timeout=0), "timeout is 0; allowed are seconds above 0, or None"),
        (dict(given={"a b": 1}), "given has 'a b'; allowed are identifiers"),
    ):
        with pytest.raises(ValueError, match=said):
            torchrun("pass", **options)
    with pytest.raises(TypeError, match="given 'x' is a object; allowed are tensors"):
        torchrun("pass", given={"x": object()})
    with pytest.raises(SyntaxError):
        torchrun("for")


def test_the_magic_parses_gives_and_takes(monkeypatch):
    class Shell:
        user_ns = {"a": 1}

        def register_magic_function(self, function, kind, name):
            self.magic = function
            assert (kind, name) == ("cell", "torchrun")

    asked = {}

    def pretend(code, **options):
        asked.update(options, code=code)
        return module.Ranks([{"b": 2}], [""], 0, 1.0)

    monkeypatch.setattr(module, "torchrun", pretend)
    shell = Shell()
    load_ipython_extension(shell)
    shell.magic("--nproc 3 --timeout 5 --give a --into found", "x = 1")
    assert asked.pop("code") == "x = 1" and shell.user_ns["found"] == [{"b": 2}]
    assert asked == dict(
        nproc=3, max_restarts=0, timeout=5.0, threads=1, debug=False, given={"a": 1}
    )
    with pytest.raises(NameError, match="--give names 'c'"):
        shell.magic("--give c", "")
    from IPython.core.error import UsageError

    with pytest.raises(UsageError):
        shell.magic("--nproc two", "")


def test_elsewhere_results_are_printed(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    result(loss=0.5)
    assert capsys.readouterr().out == "rank 3: loss = 0.5\n"


FIT = """
import os
import signal

import torch
from bigmodel_nb.training.distributed import result
from bigmodel_nb.training.loop import fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Dies:
    def on_epoch_end(self, history):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if dies and first and len(history.rows) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(0)
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
model, loader = nn.Linear(4, 3), DataLoader(data, 8, shuffle=True)
history = fit(model, loader, epochs=4, callbacks=[Dies()])
result(losses=history.batch_losses, weight=model.weight.detach())
"""


def test_fit_of_a_rank_that_died_goes_on_bitwise(own_folders):
    lived = torchrun(FIT, given={"dies": False}, echo=False)
    died = torchrun(FIT, given={"dies": True}, max_restarts=1, echo=False)
    assert lived.restarts == 0 and died.restarts == 1
    for one, other in zip(lived.results, died.results):
        assert one["losses"] == other["losses"] and len(one["losses"]) == 12
        assert torch.equal(one["weight"], other["weight"])
    assert torch.equal(died.results[0]["weight"], died.results[1]["weight"])


# --- gradients, memory, traffic


@given(st.integers(1, 64), st.floats(0, 1e12))
def test_bytes_of_rings(ranks, size):
    whole = ring_bytes("all-reduce", size, ranks)
    halves = [ring_bytes(k, size, ranks) for k in ("all-gather", "reduce-scatter")]
    assert whole == pytest.approx(sum(halves)) and whole <= 2 * size
    assert ring_bytes("broadcast", size, ranks) == (size if ranks > 1 else 0)


def test_rings_that_are_none():
    with pytest.raises(ValueError, match="kind is 'gather'; allowed are 'all-reduce'"):
        ring_bytes("gather", 1, 2)
    with pytest.raises(ValueError, match="ranks is 0"):
        ring_bytes("all-reduce", 1, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
@settings(deadline=None)
def test_dealt_rows_are_all_rows_and_each_rank_has_its_share(shares, ranks):
    parts = [ranks * each for each in shares]
    order = deal_rows(parts, ranks)
    assert sorted(order.tolist()) == list(range(sum(parts)))
    starts = torch.tensor([0, *parts]).cumsum(0)
    for mine in order.chunk(ranks):
        for start, end, share in zip(starts, starts[1:], shares):
            assert ((mine >= start) & (mine < end)).sum() == share


def test_gradients_on_two_ranks_are_those_of_one(own_folders):
    """Uneven weights, a rank without any, missing gradients; tensor parallelism."""
    code = (
        START
        + """
from bigmodel_nb.models.language import GPT, GPTConfig
from torch.distributed.device_mesh import init_device_mesh
from torch import nn

torch.manual_seed(0)
data = torch.randn(7, 3, dtype=torch.float64)
for cut in (4, 7):  # rank 1 has three rows, or none
    whole, mine = (nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))
    mine.load_state_dict(whole.state_dict())
    dist.broadcast(whole.weight.data, 0), dist.broadcast(whole.bias.data, 0)
    mine.load_state_dict(whole.state_dict())
    whole(data).square().mean().backward()
    rows = data[:cut] if rank == 0 else data[cut:]
    if len(rows):
        mine(rows).square().mean().backward()
    average_gradients(mine.parameters(), len(rows))
    far = max((a.grad - b.grad).abs().max() for a, b in
              zip(mine.parameters(), whole.parameters()))
    result(**{f"far_{cut}": far.item()})
try:
    average_gradients(mine.parameters(), 0)
except ValueError as error:
    result(none=str(error))

mesh, seen = init_device_mesh("cpu", (2,)), {}
forms = {"gpt": {}, "llama": dict(activation="swiglu", norm="rms", positions="rotary",
         bias=False, n_kv_head=2, tie_weights=False)}
for name, options in forms.items():
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(GPT(GPTConfig(50, 16, 16, 2, 4, **options)).double())
    whole, cut = models[0], tensor_parallel(models[1], mesh)
    ids = torch.arange(12).view(2, 6)
    for step in range(2):
        for model in (whole, cut):
            model(ids).log_softmax(-1)[..., 3].mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.5, foreach=False).step()
            model.zero_grad()
    seen[name] = (whole(ids) - cut(ids)).abs().max().item()
    with Traffic() as traffic:
        cut(ids).sum().backward()
    seen[f"{name} calls"] = traffic.calls
    seen[f"{name} bytes"] = traffic.bytes
result(**{"tensor": seen})
try:
    tensor_parallel(GPT(GPTConfig(50, 16, 15, 1, 3)), mesh)
except ValueError as error:
    result(odd=str(error))
"""
    )
    for each in torchrun(code, echo=False).results:
        assert each["far_4"] < 1e-15 and each["far_7"] < 1e-15
        assert each["none"].startswith("weight is 0 on all ranks")
        for name in ("gpt", "llama"):
            assert each["tensor"][name] < 1e-12
            assert each["tensor"][f"{name} calls"] == {"all-reduce": 8}
            assert each["tensor"][f"{name} bytes"] == {"all-reduce": 8 * 12 * 16 * 8}
        assert each["odd"] == (
            "model has 3 heads of keys and values; allowed are multiples of the 2 ranks"
        )


def test_stored_bytes_of_one_process():
    model = nn.Linear(10, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    assert stored_bytes(model, optimizer) == dict(weights=220, gradients=0, optimizer=0)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    found = stored_bytes(model, optimizer)
    assert found == dict(weights=220, gradients=220, optimizer=448)
    assert stored_bytes(model)["optimizer"] == 0


# --- checkpoints


def net(width=6):
    torch.manual_seed(0)
    first = [nn.Linear(4, width), nn.BatchNorm1d(width)]
    model = nn.Sequential(*first, nn.Linear(width, width), nn.Linear(width, width))
    model[3].weight = model[2].weight  # tied
    return model


def stepped(model, steps=2, lr=0.1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    return optimizer


def same_states(one, other):
    states = [each.state_dict() for each in (one, other)]
    groups = [each["param_groups"] for each in states]
    assert [{**g, "params": 0} for g in groups[0]] == [
        {**g, "params": 0} for g in groups[1]
    ]
    for key, state in states[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, states[1]["state"][key][name]), (key, name)


def test_one_process_reads_what_it_saved(tmp_path):
    model = net()
    optimizer = stepped(model)
    save_sharded(tmp_path / "kept", model, optimizer)
    other = net()
    other[0].weight.data.zero_()
    gradient = other[0].weight.grad = torch.ones(6, 4)
    into = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_sharded(tmp_path / "kept", other, into)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items()
    ):
        assert torch.equal(a, b), name
    same_states(optimizer, into)
    assert into.param_groups[0]["betas"] == (0.8, 0.9)
    assert other[0].weight.grad is gradient, "gradients are nobody's business here"
    save_sharded(tmp_path / "kept", other, into)  # in place of the older one
    load_sharded(tmp_path / "kept", net())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob(".metadata"))


def test_two_ranks_read_what_one_saved_and_back(own_folders, tmp_path):
    model = net()
    optimizer = stepped(model)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    save_sharded(one, model, optimizer)
    code = (
        START
        + """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

model = net()
for each in model.parameters():
    each.data.zero_()
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
load_sharded(one, model, optimizer)
result(weights=[each.full_tensor().detach() for each in model.parameters()])
save_sharded(two, model, optimizer)
path = sorted(n for n in os.listdir(two) if n.endswith("safetensors"))[-1]
dist.barrier()
if rank == 0:
    with open(f"{two}/{path}", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
dist.barrier()
try:
    load_sharded(two, model, optimizer)
except ValueError as error:
    result(said=str(error))
dist.barrier()
if rank == 0:
    with open(f"{two}/{path}", "r+b") as file:
        file.seek(-1, 2)
        file.write(last)
"""
    )
    values = {"one": one, "two": two, "net": net}
    for each in torchrun(code, given=values, echo=False).results:
        assert all(map(torch.equal, each["weights"], model.parameters()))
        assert "is not as it was written; load another checkpoint" in each["said"]
    other = net()
    into = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_sharded(two, other, into)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    same_states(optimizer, into)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


def test_folders_that_hold_no_such_checkpoint(tmp_path):
    model = net()
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_sharded(tmp_path / "none", model)
    (tmp_path / "notes.txt").write_text("mine")
    for call in (save_sharded, load_sharded):
        with pytest.raises(ValueError, match="which holds no sharded checkpoint"):
            call(tmp_path, model)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    kept = tmp_path / "kept"
    for name in ("kept.old", "kept.part"):  # folders of the user's
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    save_sharded(kept, model, stepped(model))
    save_sharded(kept, model, stepped(model))
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt",
        "kept",
        "kept.old",
        "kept.part",
    }
    assert len(list(tmp_path.glob("kept.*/mine.txt"))) == 2
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds 'notes.txt' beside a checkpoint"):
        save_sharded(kept, model)
    (kept / "notes.txt").unlink()
    before = [each.clone() for each in net(7).parameters()]
    other = net(7)
    with pytest.raises(ValueError) as caught:
        load_sharded(kept, other)
    assert str(caught.value) == (
        "folder holds torch.float32 (6,) for model.0.bias, where model and optimizer"
        " have torch.float32 (7,); load one of this model"
    )
    assert all(map(torch.equal, before, other.parameters())), "nothing has changed"
    with pytest.raises(ValueError, match="for optimizer.state"):
        load_sharded(kept, model, torch.optim.SGD(model.parameters(), lr=0.1))
    file = next(kept.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file.name} in folder .* as it was written"):
        load_sharded(kept, model)
    file.unlink()
    with pytest.raises(ValueError, match=f"lacks {file.name}; load another"):
        load_sharded(kept, model)
