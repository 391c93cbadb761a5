"""Chapter 10: a run that was cut off goes on where it was, or is refused in a sentence.

The notebooks count steps in files, as `fit` keeps checkpoints.
"""

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless import run as module
from bigmodel_nb.headless.cli import app
from bigmodel_nb.headless.parameters import BadRequest
from bigmodel_nb.headless.run import RunFailed, notebook_hash, read_run, run

PARAMETERS = """steps: int = 6  # how many
stop: str = ""  # what happens after the third step, unless a file is there
place: str = ""  # its path, without `go` at its end
ratio: float = 0.1  # a number
"""
COUNT = """import os, signal, time
from pathlib import Path
from bigmodel_nb.kit.record import record

home = Path(FOLDER, "fit-001")
home.mkdir(parents=True, exist_ok=True)
state = home / "step"
begun = int(state.read_text()) if state.exists() else 0
for step in range(begun, steps):
    (home / "new").write_text(str(step + 1))
    os.replace(home / "new", state)
    if step == 2 and not Path(place + "go").exists():
        if stop == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if stop == "raise":
            raise RuntimeError("no")
        while stop == "wait":
            time.sleep(0.01)
record("begun", begun)
record("folder", FOLDER)
"""
WAYS = {
    "fresh": COUNT.replace("FOLDER", 'os.environ["BIGMODEL_CHECKPOINT"]'),
    "forked": COUNT.replace("FOLDER", 'os.environ.get("BIGMODEL_CHECKPOINT")'),
}


@pytest.fixture
def save(workshop):
    def write(source=WAYS["forked"], name="mine.ipynb", parameters=PARAMETERS):
        tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [tagged, *map(new_code_cell, [source] if source else [])]
        nbformat.write(new_notebook(cells=cells), name)
        return name

    return write


def gate():
    """The path of no file or folder, since what a value names changes a fingerprint."""
    return str(Path.cwd() / "to-")


def everything(folder="out"):
    """All files below a folder with their contents, to see that nothing is written."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def cut_off(name, stop, folder="out", **more):
    with pytest.raises(RunFailed) as failure:
        run(name, out=folder, stop=stop, place=gate(), **more)
    return failure.value.run


def ended_and_clean(done, attempts, begun=3):
    assert done.status == "ok" and done.metrics["begun"] == begun
    assert done == read_run(done.folder)
    record = done.record
    assert record["resumed"] == len(record["attempts"]) == attempts
    total = sum(each["seconds"] for each in record["attempts"]) + record["seconds"]
    assert record["seconds_total"] == pytest.approx(total, abs=0.02)
    assert done.seconds == record["seconds"] > 0
    assert not (done.folder / "checkpoints").exists()
    left = [path.name for path in done.folder.iterdir() if path.name[0] == "."]
    assert not left and not {"pid", "kernel_process"} & set(record)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "stop, status", [("kill", "killed"), ("raise", "failed"), ("wait", "timeout")]
)
def test_a_run_that_was_cut_off_goes_on(save, way, stop, status):
    if way == "forked" and kernel.can_fork():
        assert kernel.warm() is not None
    name = save(WAYS[way])
    options = {"timeout": 3} if stop == "wait" else {}
    first = cut_off(name, stop, **options)
    assert first.status == status and first.record["resumed"] == 0
    assert first.record["seconds_total"] == first.seconds
    assert Path("out/checkpoints/fit-001/step").read_text() == "3"
    Path("to-go").touch()
    done = run(name, resume="out")
    ended_and_clean(done, 1)
    assert done.metrics["folder"] == str(Path("out/checkpoints").absolute())
    assert done.parameters["stop"] == stop and done.record["given"]["stop"] == stop
    if way == "forked" and kernel.can_fork():
        assert done.record["kernel"] == first.record["kernel"] == "forked"
    assert done.record["attempts"] == [
        {
            "started": first.record["started"],
            "status": status,
            "message": first.error["message"],
            "seconds": first.seconds,
        }
    ]


def test_attempts_add_up(save):
    name = save(WAYS["forked"].replace("step == 2", "step in (2, 4)"))
    cut_off(name, "raise")
    with pytest.raises(RunFailed) as failure:
        run(resume="out")
    second = failure.value.run.record
    assert second["resumed"] == 1 and second["seconds_total"] > second["seconds"]
    Path("to-go").touch()
    third = run(resume="out")
    ended_and_clean(third, 2, begun=5)
    assert "resumed 2 times" in " ".join(third.record["notes"])
    assert "resumed 2 times" in third.report.read_text()


def test_each_run_has_a_folder_of_its_own_whatever_the_user_has_set(save, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CHECKPOINT", str(Path("theirs").absolute()))
    name = save()
    folders = [run(name, out=each).metrics["folder"] for each in ("a", "b", "c")]
    assert folders == [str(Path(each, "checkpoints").absolute()) for each in "abc"]
    assert not Path("theirs").exists()


def test_what_the_notebook_keeps_itself_stays(save):
    own = "Path('checkpoints/mine').mkdir()\nPath('checkpoints/mine/x').touch()"
    done = run(save(f"{WAYS['forked']}\n{own}"), out="out")
    assert done.status == "ok"
    assert list(Path("out/checkpoints").rglob("*")) == [
        Path("out/checkpoints/mine"),
        Path("out/checkpoints/mine/x"),
    ]


def test_the_first_record_is_whole_before_the_first_cell(save):
    see = "import shutil\nshutil.copyfile('metrics.json', 'seen')"
    name = save(see, parameters="x: float = 1.0  # any\nday: str = 'a'  # any")
    run(name, {"x": 0.25}, out="out")
    seen = json.loads(Path("out/seen").read_text())
    assert seen["status"] == "running" and seen["given_source"] == {"x": "0.25"}
    assert seen["notebook_hash"] == notebook_hash(Path(name))
    assert seen["notebook_file"] == str(Path(name).absolute())
    process = seen["kernel_process"]
    assert process["pid"] != seen["pid"] == os.getpid()


# --- processes that are killed


def started(*words):
    """The command in a process of its own."""
    program = "from bigmodel_nb.headless.cli import main; main()"
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, *words], **quiet)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def at_step(folder, step="3"):
    def reached():
        state = Path(folder, "checkpoints", "fit-001", "step")
        return state.exists() and state.read_text() == step

    return reached


def start(name, folder="out"):
    words = "-p", "stop", "wait", "-p", "place", gate(), "--out", folder
    process = started("run", name, *words)
    reached = at_step(folder)

    def there():
        assert process.poll() is None, process.communicate()
        return reached()

    wait_for(there)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_was_ended_goes_on_by_its_folder_alone(save, number):
    process = start(save())
    kernel_pid = json.loads(Path("out/metrics.json").read_text())["kernel_process"][
        "pid"
    ]
    before = everything()
    if number == signal.SIGKILL:
        for words in (["run", "mine.ipynb"], ["run"]):
            busy = CliRunner().invoke(app, [*words, "--resume", "out"])
            assert busy.exit_code == 2 and "a run that goes on" in busy.output
            assert busy.output.count("\n") == 1
        after = everything()
        after.pop("out/.reserve"), before.pop("out/.reserve")
        assert after == before
    process.send_signal(number)
    process.communicate()
    status = {"SIGKILL": "running"}.get(signal.Signals(number).name, "interrupted")
    found = read_run("out")
    assert found.status == status and found.stale == (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        shown = CliRunner().invoke(app, ["show", "out"])
        assert "its process is gone" in shown.output
    Path("to-go").touch()
    again = started("run", "--resume", "out")
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert not psutil.pid_exists(kernel_pid)
    assert "begun: 3" in out and "resumed once" in out
    ended_and_clean(read_run("out"), 1)


def test_a_kernel_that_outlives_its_killed_run_is_waited_for_and_then_killed(save):
    cut_off(save(), "raise")
    stubborn = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    path = Path("out/metrics.json")
    record = json.loads(path.read_text())
    record["kernel_process"] = module._process(stubborn.pid)
    path.write_text(json.dumps(record))
    Path("to-go").touch()
    begun = time.monotonic()
    ended_and_clean(run(resume="out"), 1)
    assert time.monotonic() - begun > 5 and not psutil.pid_exists(stubborn.pid)
    stubborn.wait(5)


def test_a_run_that_could_not_write_its_end_goes_on_in_the_same_process(save):
    name = save()
    cut_off(name, "raise")
    path = Path("out/metrics.json")
    record = json.loads(path.read_text())
    for key in ("seconds", "error", "cells"):
        del record[key]
    stuck = {**record, **module._process(os.getpid()), "status": "running"}
    path.write_text(json.dumps(stuck))
    with module._marked(Path("out").absolute()), pytest.raises(BadRequest) as refused:
        run(resume="out")
    assert "a run that goes on" in str(refused.value)
    Path("to-go").touch()
    ended_and_clean(run(resume="out"), 1)


@pytest.mark.parametrize("age, goes_on", [(0, True), (1000, False)])
def test_a_run_of_another_machine_goes_on_as_long_as_it_touches_its_file(
    save, age, goes_on
):
    cut_off(save(), "raise")
    path = Path("out/metrics.json")
    record = {**json.loads(path.read_text()), **module._process(os.getpid())}
    record |= {"status": "running", "host": "elsewhere"}
    path.write_text(json.dumps(record))
    Path("out/.reserve").write_text("0")
    os.utime("out/.reserve", (time.time() - age,) * 2)
    Path("to-go").touch()
    assert read_run("out").stale != goes_on
    if goes_on:
        with pytest.raises(BadRequest, match="a run that goes on"):
            run(resume="out")
    else:
        ended_and_clean(run(resume="out"), 1)


def test_a_run_touches_its_file_while_it_goes_on(save, monkeypatch):
    watch = module._Watch()
    watch.folder = Path.cwd()
    Path(".reserve").touch()
    os.utime(".reserve", (0, 0))
    watch.touch()
    assert time.time() - Path(".reserve").stat().st_mtime < 60
    os.utime(".reserve", (0, 0))
    watch.touch()
    assert Path(".reserve").stat().st_mtime == 0, "not more often than needed"
    watch.touched -= 11
    watch.touch()
    assert time.time() - Path(".reserve").stat().st_mtime < 60


def test_a_folder_that_was_only_reserved_is_begun(save):
    name = save()
    Path("out").mkdir()
    Path("out/.reserve").write_text("0")
    with pytest.raises(BadRequest, match="allowed is to name it"):
        run(resume="out")
    done = run(name, {"steps": 2}, resume="out")
    assert done.status == "ok" and done.record["resumed"] == 0
    assert done.parameters["steps"] == 2


# --- what is refused


def refused(*words):
    before = everything(".")
    answer = CliRunner().invoke(app, ["run", *words])
    assert answer.exit_code == 2, answer.output
    assert answer.output.count("\n") == 1 and answer.output.startswith("bigmodel: ")
    assert everything(".") == before, "nothing is written"
    return answer.output


def test_what_differs_is_refused_in_one_sentence(save):
    name = save()
    cut_off(name, "raise", steps=5)
    here = f"the run in {str(Path('out').absolute())!r}"
    assert refused(name, "-p", "steps", "7", "--resume", "out") == (
        f"bigmodel: parameter 'steps' is 7, and was 5 in {here}; "
        "allowed is what it was, or a run in another folder\n"
    )
    assert "parameter 'ratio' is 0.2, and was 0.1 in" in refused(
        name, "-p", "ratio", "0.2", "--resume", "out"
    ), "one that kept its default"
    assert "lesson is False, and was True in" in refused(
        name, "--no-lesson", "--resume", "out"
    )
    assert "are both given" in refused(name, "--out", "x", "--resume", "out")
    assert "there is no notebook 'turo'" in refused("turo", "--resume", "out")
    assert "unknown parameter 'step'" in refused("-p", "step", "5", "--resume", "out")
    save("1", "other.ipynb")
    assert f"{here} is one of" in refused("other.ipynb", "--resume", "out")
    save(WAYS["fresh"])
    assert "has changed since" in refused(name, "--resume", "out")
    assert "has changed since" in refused("--resume", "out")
    save()
    Path("to-go").touch()
    shutil.copyfile(name, "same.ipynb")
    ended_and_clean(run("same.ipynb", {"steps": 5, "ratio": 0.1}, resume="out"), 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: Path("out").mkdir(),
        lambda: Path("out").touch(),
        lambda: (Path("out").mkdir(), Path("out/metrics.json").write_text("{")),
        lambda: (Path("out").mkdir(), Path("out/metrics.json").write_text('{"a": 1}')),
        lambda: (
            Path("out").mkdir(),
            Path("out/x").touch(),
            Path("out/.reserve").touch(),
        ),
        lambda: (
            Path("out").mkdir(),
            Path("out/metrics.json").write_text(
                '{"status": "failed", "metrics": {}, "parameters": {}}'
            ),
        ),
    ],
    ids=["none", "empty", "a file", "half", "other", "without a record", "of before"],
)
def test_a_folder_that_holds_no_run_is_refused(save, make):
    name = save()
    make()
    assert "resume is 'out'" in refused(name, "--resume", "out")
    assert "resume is 'out'" in refused("--resume", "out")


def test_a_notebook_that_is_gone_and_a_command_without_one_are_refused(save):
    cut_off(save(), "raise")
    Path("mine.ipynb").unlink()
    assert "there is no notebook file" in refused("--resume", "out")
    assert "no notebook is named" in refused()
    with pytest.raises(BadRequest):
        run()
    with pytest.raises(BadRequest):
        run(resume=3)


def test_a_new_run_does_not_go_on_from_what_lies_in_its_folder(save):
    Path("out/checkpoints/fit-001").mkdir(parents=True)
    with pytest.raises(BadRequest, match="already holds a run"):
        run(save(), out="out")


def test_a_run_that_ended_ok_is_not_run_again(save):
    done = run(save(), {"steps": 2}, out="out")
    before = everything()
    assert run("mine.ipynb", resume="out") == run(resume="out") == done
    answer = CliRunner().invoke(app, ["run", "--resume", "out", "-p", "steps=2"])
    assert answer.exit_code == 0 and "ended ok, and is not run again" in answer.output
    assert "begun: 0" in answer.output
    assert "was 2 in" in refused("--resume", "out", "-p", "steps=3")
    assert everything() == before


def test_the_command_says_how_to_go_on(save):
    name = save()
    words = "-p", "stop", "raise", "-p", f"place={gate()}", "--out", "my out"
    answer = CliRunner().invoke(app, ["run", name, *words])
    assert answer.exit_code == 1
    assert "to go on: bigmodel run --resume 'my out'\n" in answer.output
    save("1 / 0", "short.ipynb")
    assert "to go on" not in CliRunner().invoke(app, ["run", "short.ipynb"]).output


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, VALUES)
def test_any_value_is_what_it_was_or_refused(tmp_path, value, other):
    from bigmodel_nb.headless.parameters import Kernel, as_source, read_parameters

    path = tmp_path / "any.ipynb"
    cell = new_code_cell("x = None  # any", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[cell])
    nbformat.write(notebook, path)
    python, declared = Kernel("python3", "python", ""), read_parameters(notebook)
    first = module._first_record("any", path, declared, {"x": value}, python, True)
    earlier = module._run_of(tmp_path, json.loads(module._to_text(first)))
    given, lesson = module._as_before(earlier, path, python, declared, {}, None)
    assert as_source(given["x"]) == as_source(value) and lesson is True
    assert type(given["x"]) is type(value)
    asked = earlier, path, python, declared, {"x": other}, None
    if as_source(value) == as_source(other):
        assert module._as_before(*asked)[0].keys() == {"x"}
    else:
        with pytest.raises(BadRequest, match="parameter 'x' is") as refused:
            module._as_before(*asked)
        assert "\n" not in str(refused.value)


def test_two_that_take_up_one_run_do_not_both(save):
    cut_off(save(), "raise")
    with module._earlier("out", None) as found:
        assert found.status == "failed"
        if os.name == "posix":
            with pytest.raises(BadRequest, match="a run that goes on"):
                run(resume="out")
    Path("to-go").touch()
    ended_and_clean(run(resume="out"), 1)


# --- sweeps


def swept(name, **options):
    from bigmodel_nb.headless.sweep import sweep

    grid = {"steps": [4, 5], "stop": ["raise"], "place": [gate()]}
    return sweep(name, grid, out="swept", workers=1, **options)


def folders(table):
    return [Path("swept", each).name for each in table.folder]


def test_a_sweep_that_is_started_again_goes_on(save):
    name = save()
    first = swept(name)
    assert list(first.status) == ["failed"] * 2
    assert len(list(Path("swept").glob("*/checkpoints/fit-001/step"))) == 2
    Path("to-go").touch()
    done = swept(name)
    assert list(done.status) == ["ok"] * 2 and list(done.begun) == [3, 3]
    runs = [read_run(path.parent) for path in Path("swept").glob("*/metrics.json")]
    for each in runs:
        ended_and_clean(each, 1)
    anew = swept(name, again=True)
    assert list(anew.begun) == [0, 0]


def test_a_sweep_again_begins_anew_and_without_checkpoints_too(save):
    name = save()
    swept(name)
    Path("to-go").touch()
    assert list(swept(name, again=True).begun) == [0, 0]


def test_a_second_attempt_at_a_killed_run_goes_on(save):
    from bigmodel_nb.headless.sweep import sweep

    grid = {"stop": ["kill"], "place": [str(Path.cwd() / "nowhere")]}
    table = sweep(save(), grid, out="swept", workers=1, retries=1)
    assert list(table.status) == ["ok"] and list(table.begun) == [3]
    (path,) = Path("swept").glob("*/metrics.json")
    assert read_run(path.parent).record["attempts"][0]["status"] == "killed"


def test_a_record_that_the_sweep_finishes_keeps_what_resuming_needs(save):
    from bigmodel_nb.headless.sweep import _cut_off

    done = cut_off(save(), "raise")
    record = {**done.record, "status": "running", "seconds_total": 5.0}
    record |= {"host": socket.gethostname(), "pid": 1, "process_started": 0.0}
    ended = _cut_off(module._run_of(done.folder, record), "killed")
    assert ended["given_source"] == record["given_source"]
    assert ended["seconds_total"] == round(5 + ended["seconds"], 2)


# --- the training loop


def fit_takes_checkpoints():
    from bigmodel_nb.training.loop import fit

    return "checkpoint" in inspect.signature(fit).parameters


FIT = """import os
import time
import torch
from torch.utils.data import DataLoader, TensorDataset
from pathlib import Path
from bigmodel_nb.kit.record import record
from bigmodel_nb.training.loop import fit

torch.manual_seed(0)
x = torch.randn(64, 4)
data = TensorDataset(x, (x[:, 0] > 0).long())
model = torch.nn.Linear(4, 2)
rows = DataLoader(data, batch_size=16, shuffle=True)
clock = time.monotonic


class Slow:  # each step takes a minute, as far as fit can tell
    def on_batch_end(self, history):
        time.monotonic = lambda: clock() + 60 * history.steps


first = fit(model, rows, epochs=3, callbacks=[Slow()])
time.monotonic = clock
if stop and not Path(place + "go").exists():
    raise RuntimeError("between two calls")
second = fit(model, rows, epochs=2)
record("weights", [float(each) for each in model.weight.flatten()])
"""


@pytest.mark.skipif(not fit_takes_checkpoints(), reason="fit keeps no checkpoints yet")
def test_fit_goes_on_in_a_run_bit_for_bit(save):
    name = save(FIT)
    whole = run(name, out="whole").metrics["weights"]
    cut_off(name, "raise")
    assert [path.name for path in module._checkpoints(Path("out"))] == ["fit-001"]
    Path("to-go").touch()
    done = run(resume="out")
    assert done.metrics["weights"] == whole
    assert not Path("out/checkpoints").exists()
