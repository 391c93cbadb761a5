"""Chapter 10: sweeps. Points, one table, resuming, the death of a worker."""
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bigmodel_nb.headless.parameters import BadRequest
from bigmodel_nb.headless.run import run
from bigmodel_nb.headless.sweep import Range, _Board, _collect, draw_sweep, grid_points, mean_interval, parse_values, sampled_points, sweep

PARAMETERS = "n: int = 1  # a number\nseed: int = 0  # of all\ndata: str = ''  # a file"
BODY = "from bigmodel_nb.kit.record import record\nopen('ran', 'w').close()\nrecord('share', seed + 1 / n)"


@pytest.fixture
def save(workshop):
    def write(body=BODY):
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(body)]
        nbformat.write(new_notebook(cells=cells), "mine.ipynb")
        return "mine.ipynb"

    return write


def gated():
    """A body in which all but two runs wait until there is a file `go`, so that they cannot end before a signal is heard."""
    go = str(Path("go").absolute())
    return f"{BODY}\nimport os, time\nbegun = time.monotonic()\nwhile n > 2 and not os.path.exists({go!r}) and time.monotonic() < begun + 60:\n    time.sleep(0.1)"


def stamps(out="out"):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(out).glob("*/ran")}


def test_points():
    assert grid_points({"a": [1, 2], "b": Range(0, 1), "c": "x"}) == [{"a": a, "b": b, "c": "x"} for a in (1, 2) for b in (0, 1)]
    drawn = sampled_points({"a": Range(0.0, 1.0), "b": Range(1, 10)}, 10, "latin", 3)
    assert sorted(int(10 * point["a"]) for point in drawn) == list(range(10)) and sorted(point["b"] for point in drawn) == list(range(1, 11))
    assert drawn == sampled_points({"a": Range(0.0, 1.0), "b": Range(1, 10)}, 10, "latin", 3)
    assert (parse_values("0..4"), parse_values("1e-5..1e-3"), parse_values("a,b")) == (Range(0, 4), Range(1e-5, 1e-3), ["a", "b"])
    assert parse_values({"low": 1e-5, "high": 1, "log": True}) == Range(1e-5, 1, True)


@pytest.mark.parametrize("grid, said", [({"n": Range(0.0, 1.0)}, "has endless values"), ({"m": [1]}, "unknown parameter 'm'"), ({"n": ["x"]}, "n is 'x'; it needs an integer"),
                                        ({"n": []}, "grid has 0 points")])
def test_a_bad_grid_writes_nothing(save, grid, said):
    with pytest.raises(BadRequest, match=said):
        sweep(save(), grid, out="out")
    assert not Path("out").exists()


def test_a_range_is_checked():
    with pytest.raises(BadRequest, match="the lower one first"):
        Range(2, 1)
    with pytest.raises(BadRequest, match="allowed is a number above 0"):
        Range(0, 1, log=True)


def test_intervals_of_one_value_are_unknown():
    assert mean_interval([2.0])[0] == 2.0 and pd.isna(mean_interval([2.0])[1])


@pytest.mark.parametrize("seeds, bands", [(1, 0), (2, 0), (3, 2)])
def test_an_interval_is_drawn_from_three_seeds_on(seeds, bands):
    rows = [{"n": n, "norm": norm, "seed": seed, "share": n + seed, "status": "ok"} for n in (1, 2, 4) for norm in "ab" for seed in range(seeds)]
    made, axes = draw_sweep(pd.DataFrame(rows), "share", ["n", "norm", "seed"])
    means = [line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert means == [[n + (seeds - 1) / 2 for n in (1, 2, 4)]] * 2, "a line for each norm"
    assert len(axes.collections) == bands and sum(len(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None") == len(rows)
    plt.close(made)


def test_points_that_differ_in_more_than_is_drawn_are_not_joined():
    table = pd.DataFrame([{"rate": n / 100, "dropout": n / 50, "share": n, "status": "ok"} for n in range(20)])
    made, axes = draw_sweep(table, "share", ["rate", "dropout"])
    assert [line.get_linestyle() for line in axes.lines] == ["None"] and not axes.collections
    plt.close(made)


def test_a_sweep_makes_one_table_and_runs_only_what_is_new(save):
    name = save()
    table = sweep(name, {"n": [0, 1, 2], "seed": Range(0, 1)}, out="out")
    assert list(table.columns) == ["n", "seed", "data", "share", "status", "seconds", "error", "folder"]
    assert list(table.status) == ["failed"] * 2 + ["ok"] * 4 and list(table.share)[2:] == [1, 2, 0.5, 1.5]
    assert "ZeroDivisionError" in table.error[0]
    pd.testing.assert_frame_equal(pd.read_csv("out/sweep.csv", keep_default_na=False, na_values=[""])[["n", "share", "status"]], table[["n", "share", "status"]])
    page = Path("out/sweep.html").read_text()
    assert page.count("<img") == 2 and "4 ok, 2 failed" in page and "http" not in page.replace("http://www.w3.org", "")
    before = stamps()
    sweep(name, {"n": [1, 2, 4], "seed": Range(0, 1)}, out="out")
    after = stamps()
    assert {key for key in after if after[key] != before.get(key)} == set(after) - set(before) and len(after) == len(before) + 2
    sweep(name, {"n": 1}, out="out", again=True)
    assert sum(stamps()[key] != after[key] for key in after) == 1, "again forces"


def test_a_changed_notebook_or_data_file_runs_again(save):
    Path("data.csv").write_text("1")
    grid = {"data": str(Path("data.csv").absolute())}
    folders = [sweep(save(), grid, out="out").folder[0]]
    Path("data.csv").write_text("2")
    folders.append(sweep("mine.ipynb", grid, out="out").folder[0])
    folders.append(sweep(save(BODY + " + 1"), grid, out="out").folder[0])
    assert len(set(folders)) == 3


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_the_death_of_a_worker_loses_no_run(save):
    name = save("from bigmodel_nb.kit.record import record\nimport os, time\ntime.sleep(2)\nrecord('parent', os.getppid())")

    killed = []

    def murder():
        while not killed:
            time.sleep(0.05)
            for each in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ipykernel_launcher" in " ".join(each.cmdline()) and not killed:
                        killed.append(each.ppid())
                        psutil.Process(each.ppid()).send_signal(signal.SIGKILL)

    thread = threading.Thread(target=murder, daemon=True)
    thread.start()
    table = sweep(name, {"n": [1, 2, 3, 4]}, out="out")
    thread.join(5)
    assert killed and not psutil.pid_exists(killed[0])
    assert list(table.status) == ["ok"] * 4


SCRIPT = """
import signal
import subprocess
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from bigmodel_nb.headless.sweep import sweep
if __name__ == "__main__":
    sweep("mine.ipynb", {"n": [1, 2, 3, 4, 5, 6]}, out="out")
"""


DEAF = """
import os
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from bigmodel_nb.headless import sweep

class Deaf:
    "An exception in a destructor is swallowed."
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def write(board, before=sweep._Board.write):
    if any(record["status"] == "ok" for record in board.records.values()) and board.open():
        Deaf()
    return before(board)

sweep._Board.write = write
if __name__ == "__main__":
    sweep.sweep("mine.ipynb", {"n": [1, 2, 3, 4, 5, 6]}, out="out")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_an_interrupt_is_heard_wherever_it_strikes(save):
    save(gated())
    Path("script.py").write_text(DEAF)
    done = subprocess.run([sys.executable, "script.py"], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr.splitlines()[-1]
    assert set(pd.read_csv("out/sweep.csv").status) == {"ok", "interrupted"}


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_sigterm_leaves_a_valid_table_too(save):
    save(gated())
    Path("script.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, "script.py"], stderr=subprocess.DEVNULL) as sweeper:
        while not list(Path("out").glob("*/report.html")):
            assert sweeper.poll() is None
            time.sleep(0.05)
        sweeper.terminate()
    assert sweeper.returncode != 0
    stopped = pd.read_csv("out/sweep.csv")
    assert len(stopped) == 6 and "interrupted" in set(stopped.status) and set(stopped.status) <= {"ok", "interrupted"}


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_a_sweep_that_was_interrupted_goes_on_where_it_stopped(save):
    name = save(gated())
    Path("script.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, "script.py"], start_new_session=True, stderr=subprocess.DEVNULL) as sweeper:
        while len(list(Path("out").glob("*/report.html"))) < 2:
            assert sweeper.poll() is None
            time.sleep(0.05)
        os.killpg(sweeper.pid, signal.SIGINT)
    assert sweeper.returncode != 0
    stopped = pd.read_csv("out/sweep.csv")
    assert len(stopped) == 6 and set(stopped.status) == {"ok", "interrupted"} and Path("out/sweep.html").read_text().endswith("</html>")
    before = {path.parent.name: path.stat().st_mtime_ns for path in Path("out").glob("*/report.html")}
    Path("go").touch()
    resumed = sweep(name, {"n": [1, 2, 3, 4, 5, 6]}, out="out")
    assert list(resumed.status) == ["ok"] * 6
    after = {path.parent.name: path.stat().st_mtime_ns for path in Path("out").glob("*/report.html")}
    assert before and all(after[key] == before[key] for key in before), "what was done is not done again"


class Silent:
    """A task whose worker dies before it can say that it is done."""

    def add_done_callback(self, _):
        pass


@pytest.mark.parametrize("begun_later, status", [(0, ["ok", "interrupted"]), (3600, ["interrupted", "interrupted"])], ids=["now", "before"])
def test_a_run_that_ended_before_the_interrupt_is_told_so_if_this_sweep_began_it(save, interruptible, begun_later, status):
    board = _Board(Path("out").absolute(), "mine", ["n"], {"a": {"n": 1}, "b": {"n": 2}})
    board.begun += timedelta(seconds=begun_later)
    run(save(), out="out/a")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        _collect(board, {Silent(): "a", Silent(): "b"}, progress=False)
    assert list(pd.read_csv("out/sweep.csv").status) == status


def test_a_scheduler_that_does_not_answer_writes_nothing(save):
    with pytest.raises(BadRequest, match="scheduler is 'tcp://127.0.0.1:9', which does not answer"):
        sweep(save(), {"n": [1]}, scheduler="tcp://127.0.0.1:9", out="out")
    assert not Path("out").exists()


def test_a_sweep_on_a_scheduler_at_an_address(save):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        assert list(sweep(save(), {"n": [1, 2]}, scheduler=cluster.scheduler_address, out="out").status) == ["ok", "ok"]


def test_two_sweeps_in_one_folder_cannot_both_work(save):
    from bigmodel_nb.headless.sweep import _alone

    with _alone(Path("out").absolute()), pytest.raises(BadRequest, match="where another sweep is at work"):
        sweep(save(), {"n": [1]}, out="out")
