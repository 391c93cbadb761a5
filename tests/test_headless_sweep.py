"""Chapter 10: sweeps. Points, one table, resuming, the death of a worker."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from bigmodel_nb.headless.parameters import BadRequest, Parameter, Text, declaration
from bigmodel_nb.headless.run import read_run, run
from bigmodel_nb.headless.sweep import (
    Range,
    _Board,
    _close,
    _collect,
    _range,
    _run_on_worker,
    _Runners,
    _table,
    fingerprint,
    grid_points,
    mean_interval,
    parse_values,
    plot_sweep,
    sampled_points,
    sweep,
)

PARAMETERS = "n: int = 1  # a number\nseed: int = 0  # of all\ndata: str = ''  # a file"
BODY = (
    "from bigmodel_nb.kit.record import record\nopen('ran', 'w').close()\n"
    "record('share', seed + 1 / n)"
)


@pytest.fixture
def save(workshop):
    def write(body=BODY):
        cells = [
            new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            new_code_cell(body),
        ]
        nbformat.write(new_notebook(cells=cells), "mine.ipynb")
        return "mine.ipynb"

    return write


def gated():
    """A body in which all but two runs wait for a file `go`, to end after a signal."""
    go = str(Path("go").absolute())
    return (
        f"{BODY}\nimport os, time\nbegun = time.monotonic()\n"
        f"while n > 2 and not os.path.exists({go!r}) and time.monotonic() < begun "
        "+ 60:\n    time.sleep(0.1)"
    )


def stamps(out="out"):
    return {
        path.parent.name: path.stat().st_mtime_ns for path in Path(out).glob("*/ran")
    }


def test_points():
    assert grid_points({"a": [1, 2], "b": Range(0, 1), "c": "x"}) == [
        {"a": a, "b": b, "c": "x"} for a in (1, 2) for b in (0, 1)
    ]
    drawn = sampled_points({"a": Range(0.0, 1.0), "b": Range(1, 10)}, 10, "latin", 3)
    assert sorted(int(10 * point["a"]) for point in drawn) == list(
        range(10)
    ) and sorted(point["b"] for point in drawn) == list(range(1, 11))
    assert drawn == sampled_points(
        {"a": Range(0.0, 1.0), "b": Range(1, 10)}, 10, "latin", 3
    )


NUMBERS, WORDS, EITHER, SHAPE, TABLE = (
    "list[int]",
    "list[str]",
    "int | list[int]",
    "tuple[int, int]",
    "dict[str, float]",
)


@pytest.mark.parametrize(
    "kind, given, wanted",
    [
        ("int", Text("0..4"), Range(0, 4)),
        ("float", Text("1e-5..1e-3"), Range(1e-5, 1e-3)),
        ("float", Text("0..1"), Range(0, 1)),
        ("Any", Text("0..4"), Range(0, 4)),
        ("str", Text("0..4"), ["0..4"]),
        ("str", Text("a..b"), ["a..b"]),
        ("float", {"low": 1e-5, "high": 1, "log": True}, Range(1e-5, 1, True)),
        (
            "float",
            {
                Text("low"): Text("1e-5"),
                Text("high"): Text("1"),
                Text("log"): Text("true"),
            },
            Range(1e-5, 1, True),
        ),
        (TABLE, {"low": 1.0, "high": 2.0}, [{"low": 1.0, "high": 2.0}]),
        ("float", Text("0.1, 8/255"), [0.1, 8 / 255]),
        ("float", Text("[0.1, 0.2]"), [0.1, 0.2]),
        ("float", 0.1, [0.1]),
        ("float", np.array([0.25, 0.5]), [0.25, 0.5]),
        ("int", range(3), [0, 1, 2]),
        ("str", Text("a,b"), ["a", "b"]),
        ("str", Text('"New York, NY", Paris'), ["New York, NY", "Paris"]),
        ("str", Text('"New York, NY"'), ["New York, NY"]),
        ("str", Text("a, b", quoted=True), ["a, b"]),
        ("str", "a,b", ["a,b"]),
        ("str", ["a,b", "c"], ["a,b", "c"]),
        ("bool", Text("true,no"), [True, False]),
        ("int | None", Text("none, 3"), [None, 3]),
        ("int | None", [None, 3], [None, 3]),
        (NUMBERS, Text("[64,128]"), [[64, 128]]),
        (NUMBERS, Text("64,128"), [[64, 128]]),
        (NUMBERS, Text("64"), [[64]]),
        (NUMBERS, Text("[[64],[64,128]]"), [[64], [64, 128]]),
        (NUMBERS, Text("[64],[64,128]"), [[64], [64, 128]]),
        (NUMBERS, [64, 128], [[64, 128]]),
        (NUMBERS, [[64], [64, 128]], [[64], [64, 128]]),
        (NUMBERS, [], [[]]),
        (NUMBERS, [[]], [[]]),
        (WORDS, Text("a,b"), [["a", "b"]]),
        (WORDS, ["a", "b"], [["a", "b"]]),
        (WORDS, Text('[a], ["b, c"]'), [["a"], ["b, c"]]),
        ("list[list[int]]", [[1], [2]], [[[1], [2]]]),
        (EITHER, [64, 128], [64, 128]),
        (EITHER, [[64, 128]], [[64, 128]]),
        (EITHER, Text("64, [64, 128]"), [64, [64, 128]]),
        (SHAPE, (32, 32), [(32, 32)]),
        (SHAPE, Text("32,32"), [(32, 32)]),
        (SHAPE, Text("(32,32),(64,64)"), [(32, 32), (64, 64)]),
        (SHAPE, [(32, 32), (64, 64)], [(32, 32), (64, 64)]),
        ("int", Text("{low: 0, high: 3}"), Range(0, 3)),
        ("float", Text(' {"low": 1e-5, high: 1, log: true} '), Range(1e-5, 1, True)),
        ("int | None", Text("{high: 3, low: 0}"), Range(0, 3)),
        (TABLE, Text("{low: 1, high: 2}"), [{"low": 1.0, "high": 2.0}]),
        ("dict[str, str]", Text("{low: a, high: b}"), [{"low": "a", "high": "b"}]),
        ("dict[str, str]", {"low": "a", "high": "b"}, [{"low": "a", "high": "b"}]),
        ("str", Text("{low: 0, high: 3}"), ["{low: 0, high: 3}"]),
        ("str", Text("{low: a, high: b}"), ["{low: a, high: b}"]),
        ("str", Text("{low"), ["{low"]),
        (TABLE, Text("{a: 1e-3}"), [{"a": 0.001}]),
        (TABLE, Text("{a: 1}, {b: 2}"), [{"a": 1.0}, {"b": 2.0}]),
        ("Any", [1, "a"], [1, "a"]),
        ("Any", Text("1,a"), [1, "a"]),
    ],
)
def test_the_annotation_tells_values_from_one_value_that_is_a_list(kind, given, wanted):
    assert parse_values(given, Parameter("x", kind, None)) == wanted


@pytest.mark.parametrize(
    "grid, said",
    [
        ({"n": Range(0.0, 1.0)}, "has endless values"),
        ({"m": [1]}, "unknown parameter 'm'"),
        ({"n": ["x"]}, "n is 'x'; it needs an integer"),
        ({"n": []}, "grid has 0 points"),
    ],
)
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
    rows = [
        {"n": n, "norm": norm, "seed": seed, "share": n + seed, "status": "ok"}
        for n in (1, 2, 4)
        for norm in "ab"
        for seed in range(seeds)
    ]
    made, axes = plot_sweep(pd.DataFrame(rows), "share", ["n", "norm", "seed"])
    means = [
        line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "-"
    ]
    assert means == [[n + (seeds - 1) / 2 for n in (1, 2, 4)]] * 2, (
        "a line for each norm"
    )
    assert len(axes.collections) == bands and sum(
        len(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"
    ) == len(rows)
    plt.close(made)


def test_points_that_differ_in_more_than_is_drawn_are_not_joined():
    table = pd.DataFrame(
        [
            {"rate": n / 100, "dropout": n / 50, "share": n, "status": "ok"}
            for n in range(20)
        ]
    )
    made, axes = plot_sweep(table, "share", ["rate", "dropout"])
    assert [line.get_linestyle() for line in axes.lines] == [
        "None"
    ] and not axes.collections
    plt.close(made)


def test_a_sweep_makes_one_table_and_runs_only_what_is_new(save):
    name = save()
    table = sweep(name, {"n": [0, 1, 2], "seed": Range(0, 1)}, out="out")
    assert list(table.columns) == [
        "n",
        "seed",
        "data",
        "share",
        "status",
        "seconds",
        "error",
        "folder",
    ]
    assert list(table.status) == ["failed"] * 2 + ["ok"] * 4 and list(table.share)[
        2:
    ] == [1, 2, 0.5, 1.5]
    assert "ZeroDivisionError" in table.error[0]
    pd.testing.assert_frame_equal(
        pd.read_csv("out/sweep.csv", keep_default_na=False, na_values=[""])[
            ["n", "share", "status"]
        ],
        table[["n", "share", "status"]],
    )
    page = Path("out/sweep.html").read_text()
    assert (
        page.count("<img") == 1
        and (
            "<p>6 runs: 4 ok, 2 failed.</p><ul><li>share: from 0.5 (n 2, "
            "seed 0) to 2 (n 1, seed 1)</li></ul>"
        )
        in page
        and "://" not in page.replace("http://www.w3.org", "")
    )
    before = stamps()
    sweep(name, {"n": [1, 2, 4], "seed": Range(0, 1)}, out="out")
    after = stamps()
    assert {key for key in after if after[key] != before.get(key)} == set(after) - set(
        before
    ) and len(after) == len(before) + 2
    sweep(name, {"n": 1, "seed": 0}, out="out", again=True)
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
@pytest.mark.parametrize("place", [0, 1], ids=["runner", "worker"])
def test_the_death_of_a_worker_loses_no_run(save, place):
    name = save(
        "from bigmodel_nb.kit.record import record\nimport os, time\n"
        "time.sleep(2)\nrecord('parent', os.getppid())"
    )

    killed = []

    def murder():
        while not killed:
            time.sleep(0.05)
            for each in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ipykernel_launcher" in " ".join(each.cmdline()) and not killed:
                        above = each.parents()[place]
                        killed.append(above.pid)
                        above.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=murder, daemon=True)
    thread.start()
    table = sweep(name, {"n": [1, 2, 3, 4]}, out="out")
    thread.join(5)
    assert killed and not psutil.pid_exists(killed[0])
    assert list(table.status) == ["ok"] * 4


PLAIN = """
open("begun", "a").write("x")
from bigmodel_nb.headless.sweep import sweep
print(list(sweep("mine.ipynb", {"n": [1, 2]}, out="out").status))
"""


@pytest.mark.parametrize(
    "words",
    [["a plain script.py"], ["-"], ["-c", PLAIN], ["-m", "plain"]],
    ids=["script", "stdin", "command", "module"],
)
def test_a_script_without_a_main_guard_may_sweep(save, words):
    """A worker that imported the script would begin a sweep within the sweep."""
    Path("a folder").mkdir()
    os.chdir("a folder")
    save()
    Path("a plain script.py").write_text(PLAIN)
    Path("plain.py").write_text(PLAIN)
    done = subprocess.run(
        [sys.executable, *words],
        input=PLAIN if words == ["-"] else "",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 0 and done.stdout == "['ok', 'ok']\n" and not done.stderr
    ), done.stderr
    assert Path("begun").read_text() == "x", "no worker ran the script again"


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_a_sweep_whose_process_of_workers_dies_says_so(save):
    save("import time\ntime.sleep(60 * (n > 1))")
    script = "import psutil, threading, time\n" + PLAIN.replace(
        'open("begun", "a").write("x")',
        """
def murder():
    from pathlib import Path
    while not list(Path("out").glob("*/report.html")):
        time.sleep(0.1)
    psutil.Process().children()[0].kill()

threading.Thread(target=murder).start()""",
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and sorted(pd.read_csv("out/sweep.csv").status) == [
        "killed",
        "ok",
    ], done.stderr
    assert "the process of the workers was ended" in Path("out/sweep.csv").read_text()


def test_a_run_gets_what_was_asked_for_and_keeps_its_other_defaults(save):
    """Each of these defaults was once passed on, and changed or killed the run."""
    parameters = (
        "rounds: int = 2  # a\nlimit: int | None = None  # b\n"
        "steps = 60 * 60  # c\nsize = (32, 32)  # d\ntotal = rounds * 2  # e\n"
        "home = str(3)  # f"
    )
    body = (
        "from bigmodel_nb.kit.record import record\n"
        "record('all', [rounds, limit, steps, repr(size), total, home])"
    )
    nbformat.write(
        new_notebook(
            cells=[
                new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                new_code_cell(body),
            ]
        ),
        save(),
    )
    table = sweep("mine.ipynb", {"rounds": [1, 2]}, out="out")
    assert list(table["all"]) == [
        f'[{rounds}, null, 3600, "(32, 32)", 4, "3"]' for rounds in (1, 2)
    ], "`total` is computed above what is injected"
    assert list(table.rounds) == [1, 2] and list(table.limit) == [None, None]


def test_none_is_not_nan(save):
    nbformat.write(
        new_notebook(
            cells=[
                new_code_cell(
                    "limit: int | None = 3  # a", metadata={"tags": ["parameters"]}
                ),
                new_code_cell("1"),
            ]
        ),
        save(),
    )
    table = sweep("mine.ipynb", {"limit": [None, 10]}, out="out")
    assert list(table.limit) == [None, 10] and pd.read_csv(
        "out/sweep.csv", keep_default_na=False
    ).limit.tolist() == ["None", "10"]


def test_a_picture_takes_none_and_containers():
    rows = [
        {"limit": limit, "size": size, "share": 1.0, "status": "ok"}
        for limit in (None, 10)
        for size in ("(32, 32)", "[1]")
    ]
    made, axes = plot_sweep(
        _table(
            [{**row, "seconds": 1, "error": "", "folder": ""} for row in rows],
            ["limit", "size"],
        ),
        "share",
        ["limit", "size"],
    )
    assert {text.get_text() for text in axes.get_legend().get_texts()} in (
        {"None", "10"},
        {"(32, 32)", "[1]"},
    )
    plt.close(made)


def test_a_fingerprint_is_that_of_what_was_asked_for(save):
    Path("rows.csv").write_text("1")
    declared = declaration(save())
    points = [
        {},
        {"n": 1},
        {"n": True},
        {"n": 1.0},
        {"n": "1"},
        {"n": None},
        {"n": [1]},
        {"n": (1,)},
        {"n": {1: 1}},
        {"n": {"1": 1}},
        {"n": {1}},
        {"n": b"1"},
        {"n": float("inf")},
        {"m": 1},
        {"n": [Path("rows.csv")]},
        {"n": Path("rows.csv")},
    ]
    keys = [fingerprint(declared, point) for point in points]
    assert len(set(keys)) == len(points) and keys == [
        fingerprint(declared, point) for point in points
    ]
    assert fingerprint(declared, {"n": 1, "m": {3, 1, 2}}) == fingerprint(
        declared, {"m": {2, 3, 1}, "n": 1}
    ), "no order"
    Path("rows.csv").write_text("2")
    changed = [fingerprint(declared, point) for point in points]
    assert [one != other for one, other in zip(keys, changed)] == [False] * 14 + [
        True
    ] * 2, "a file within a list too"


def test_a_folder_of_data_may_lose_files_while_it_is_read(save, monkeypatch):
    for name in ("data/kept.csv", "data/going/gone.csv", "data/last.csv"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("1")
    declared, point = declaration(save()), {"data": Path("data")}
    before, listed = fingerprint(declared, point), os.scandir

    def scandir(path):
        if str(path).endswith("going"):
            shutil.rmtree(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    after = fingerprint(declared, point)
    assert not Path("data/going").exists() and after != before
    assert after == fingerprint(declared, point)


SCRIPT = """
import shutil
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
import shutil
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from bigmodel_nb.headless import sweep

class Deaf:
    "An exception in a destructor is swallowed."
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def write(board, before=sweep._Board.write):
    ended = [record["status"] for record in board.records.values()]
    if "ok" in ended and board.open():
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
    done = subprocess.run(
        [sys.executable, "script.py"], stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr.splitlines()[-1]
    assert set(pd.read_csv("out/sweep.csv").status) == {
        "ok",
        "interrupted",
        "not run",
    }, "two workers, six runs"


def ended_in_order(out="out"):
    """How many runs were interrupted; each that began has a whole record."""
    assert not list(Path(out).glob("*/.reserve"))
    runs = [read_run(path.parent) for path in Path(out).glob("*/metrics.json")]
    for each in runs:
        assert (
            each.status in ("ok", "interrupted")
            and each.report.exists()
            and each.notebook.exists()
        ), each.status
        assert {
            "seconds",
            "cells",
            "kernel",
            "kernel_reason",
            "device",
            "peak_memory_mb",
            "unknown",
        } <= set(each.record) and "pid" not in each.record
        assert (each.error is None) == (each.status == "ok") and (
            each.status == "ok" or each.error["exception"] == "KeyboardInterrupt"
        )
    return sum(each.status == "interrupted" for each in runs)


@pytest.fixture
def sockets():
    """A folder for temporary files of what a test starts, short enough for sockets."""
    with tempfile.TemporaryDirectory(
        dir="/tmp" if os.path.isdir("/tmp") else None
    ) as folder:
        yield folder


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_sigterm_leaves_a_valid_table_too(save, sockets):
    save(gated())
    Path("script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "script.py"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": sockets},
    ) as sweeper:
        while not list(Path("out").glob("*/report.html")):
            assert sweeper.poll() is None
            time.sleep(0.05)
        sweeper.terminate()
    assert sweeper.returncode != 0 and not list(Path(sockets).glob("bm*"))
    ended_in_order()
    stopped = pd.read_csv("out/sweep.csv")
    assert (
        len(stopped) == 6
        and "interrupted" in set(stopped.status)
        and set(stopped.status) <= {"ok", "interrupted", "not run"}
    )
    assert {
        name
        for name, status in zip(stopped.folder, stopped.status)
        if status == "not run"
    } == {name for name in stopped.folder if not Path("out", name).exists()}
    links = re.findall(
        r'href="([^"]+)"', Path("out/sweep.html").read_text().partition("<main>")[2]
    )
    assert len(links) == (stopped.status != "not run").sum() and all(
        Path("out", link).is_file() for link in links
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_a_sweep_that_was_interrupted_goes_on_where_it_stopped(save, sockets):
    name = save(gated())
    Path("script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "script.py"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": sockets},
    ) as sweeper:
        while len(list(Path("out").glob("*/report.html"))) < 2:
            assert sweeper.poll() is None
            time.sleep(0.05)
        while len(list(Path("out").glob("*/metrics.json"))) < 4:
            time.sleep(0.05)
        os.killpg(sweeper.pid, signal.SIGINT)
    assert (
        sweeper.returncode != 0
        and ended_in_order() == 2
        and not list(Path(sockets).glob("bm*"))
    )
    stopped = pd.read_csv("out/sweep.csv")
    assert (
        len(stopped) == 6
        and list(stopped.status.value_counts()[["ok", "interrupted", "not run"]])
        == [2, 2, 2]
        and Path("out/sweep.html").read_text().endswith("</html>")
    )
    done = {
        path.parent
        for path in Path("out").glob("*/report.html")
        if read_run(path.parent).status == "ok"
    }
    before = {path.name: (path / "report.html").stat().st_mtime_ns for path in done}
    Path("go").touch()
    resumed = sweep(name, {"n": [1, 2, 3, 4, 5, 6]}, out="out")
    assert list(resumed.status) == ["ok"] * 6
    after = {
        path.parent.name: path.stat().st_mtime_ns
        for path in Path("out").glob("*/report.html")
    }
    assert before and all(after[key] == before[key] for key in before), (
        "what was done is not done again"
    )


class Silent:
    """A task whose worker dies before it can say that it is done."""

    def add_done_callback(self, _):
        pass


@pytest.mark.parametrize(
    "begun_later, status",
    [(0, ["ok", "not run"]), (3600, ["not run", "not run"])],
    ids=["now", "before"],
)
def test_a_run_that_ended_before_the_interrupt_is_told_so_if_this_sweep_began_it(
    save, begun_later, status
):
    board = _Board(
        Path("out").absolute(), "mine", ["n"], {"a": {"n": 1}, "b": {"n": 2}}
    )
    board.begun += timedelta(seconds=begun_later)
    run(save(), out="out/a")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        _collect(board, {Silent(): "a", Silent(): "b"}, progress=False)
    assert list(pd.read_csv("out/sweep.csv").status) == status


def test_a_scheduler_that_does_not_answer_writes_nothing(save):
    with pytest.raises(
        BadRequest, match="scheduler is 'tcp://127.0.0.1:9', which does not answer"
    ):
        sweep(save(), {"n": [1]}, scheduler="tcp://127.0.0.1:9", out="out")
    assert not Path("out").exists()


def test_a_sweep_on_a_scheduler_at_an_address(save):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0
    ) as cluster:
        assert list(
            sweep(
                save(), {"n": [1, 2]}, scheduler=cluster.scheduler_address, out="out"
            ).status
        ) == ["ok", "ok"]


def test_two_sweeps_in_one_folder_cannot_both_work(save):
    from bigmodel_nb.headless.sweep import _alone

    with (
        _alone(Path("out").absolute()),
        pytest.raises(BadRequest, match="where another sweep is at work"),
    ):
        sweep(save(), {"n": [1]}, out="out")


def pages(rows, parameters, swept, folder="out"):
    """The table, sweep.csv and sweep.html of runs: pairs of parameters and metrics."""
    Path(folder).mkdir(exist_ok=True)
    board = _Board(
        Path(folder).absolute(),
        "mine",
        swept,
        {str(place): point for place, (point, _) in enumerate(rows)},
    )
    for place, (point, metrics) in enumerate(rows):
        board.set(
            str(place),
            {
                "status": "ok",
                "metrics": metrics,
                "parameters": {**parameters, **point},
                "seconds": 1.5,
                "error": None,
            },
        )
    return (
        board.write(),
        pd.read_csv(f"{folder}/sweep.csv", keep_default_na=False),
        Path(f"{folder}/sweep.html").read_text(),
    )


@pytest.mark.parametrize(
    "values",
    [
        [None, 0.5],
        [True, 1, 1.0],
        [0.123456, "a"],
        [None, True, 0.5],
        [float("inf"), None],
    ],
)
def test_a_table_takes_numbers_among_other_values(workshop, values):
    table, _, page = pages(
        [({"x": value}, {"share": 0.25}) for value in values], {}, ["x"]
    )
    assert [repr(each) for each in table.x] == [repr(each) for each in values]
    assert "0.123456" not in page and "0.25" in page


def test_a_metric_cannot_take_the_column_of_how_a_run_ended(workshop):
    metrics = {
        "error": 0.5,
        "seconds": 7,
        "status": "fine",
        "folder": "mine",
        "error_measured": 3,
    }
    table, written, _ = pages([({"n": 1}, metrics)], {}, ["n"])
    row = table.iloc[0].to_dict()
    assert (row["status"], row["seconds"], row["error"], row["folder"]) == (
        "ok",
        1.5,
        "",
        "0",
    )
    assert sorted(
        value
        for name, value in row.items()
        if name.startswith("error_") and isinstance(value, float | int)
    ) == [0.5, 3]
    assert (
        row["seconds_measured"],
        row["status_measured"],
        row["folder_measured"],
    ) == (7, "fine", "mine") and list(written) == list(table)


def test_a_parameter_of_such_a_name_has_a_column_of_its_own(workshop):
    table, written, page = pages(
        [({"error": error, "status": "x"}, {"error": 2.5}) for error in (0.1, 0.2)],
        {"seconds": 9, "error_parameter": 4},
        ["error", "status"],
    )
    assert (
        list(table.columns)
        == list(written)
        == [
            "error_parameter_parameter",
            "status_parameter",
            "seconds_parameter",
            "error_parameter",
            "error_measured",
            "status",
            "seconds",
            "error",
            "folder",
        ]
    )
    assert (
        list(table.error_parameter_parameter) == [0.1, 0.2]
        and list(table.error_parameter) == [4, 4]
        and list(table.seconds_parameter) == [9, 9]
        and list(table.error) == ["", ""]
    )
    assert page.count("<img") == 0, "nothing that was measured differs"


def test_each_interval_has_its_own_ends(workshop):
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    for place, metrics in enumerate(
        [
            {"acc": {**interval, "n": 9}, "acc_low": 7, "loss": interval},
            {"acc_low": 7, "loss": interval, "acc": {**interval, "n": 9}},
        ]
    ):
        table, _, page = pages([({"n": 1}, metrics)], {}, ["n"], f"out{place}")
        row = table.iloc[0].to_dict()
        assert [
            row[name]
            for name in (
                "acc",
                "acc_low",
                "acc_high",
                "acc_n",
                "acc_low_measured",
                "loss",
                "loss_low",
                "loss_high",
            )
        ] == [0.5, 0.25, 0.75, 9, 7, 0.5, 0.25, 0.75]
        assert "loss_n" not in row and page.count("<img") == 0, (
            "one run, in which nothing varies"
        )


def test_each_metric_keeps_its_column_in_all_rows(workshop):
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    table, _, _ = pages(
        [
            ({"n": 1}, {"acc": 1.0, "acc_low": 7}),
            ({"n": 2}, {"acc": interval, "acc_low": 8}),
        ],
        {},
        ["n"],
    )
    assert (
        list(table["acc"]) == [1.0, 0.5]
        and list(table["acc_low_measured"]) == [7, 8]
        and list(table["acc_low"])[1] == 0.25
    )


def test_a_sweep_page_has_the_title_of_the_notebook(workshop):
    page = pages([({"n": 1}, {"share": 1.0})], {}, ["n"])[2]
    assert "<title>Sweep of mine</title>" in page and "<h1>Sweep of mine</h1>" in page


def test_half_a_character_stands_in_the_table_as_its_escape(workshop):
    table, _, page = pages(
        [
            (
                {"n": "caf\udce9"},
                {"said \ud83d": 1.0, "words": "\ud83d", "list": ["\ud83d"]},
            )
        ],
        {},
        ["n"],
    )
    assert (
        list(table.n) == ["caf\\udce9"]
        and list(table.words) == ["\\ud83d"]
        and "caf\\udce9" in page
    )


def test_a_sweep_takes_the_name_of_a_latin_1_file(save):
    Path("caf\udce9.csv").write_text("1")
    given = str(Path("caf\udce9.csv").absolute())
    table = sweep(
        save(
            "from bigmodel_nb.kit.record import record\n"
            "record('read', open(data).read())"
        ),
        {"data": [given, ""]},
        workers=1,
        out="out",
    )
    assert (
        list(table.status) == ["ok", "failed"]
        and table.data[0].endswith("caf\\udce9.csv")
        and str(table.read[0]) == "1"
    )


JSON_TYPES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["value", "low", "high", "n"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)
COLUMN_NAMES = st.sampled_from(
    [
        "a",
        "a_low",
        "a_high",
        "a_n",
        "a_measured",
        "a_low_measured",
        "error",
        "status",
        "error_measured",
        "error_parameter",
        "error_parameter_low",
    ]
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.fixed_dictionaries({"error": JSON_TYPES, "a_low": JSON_TYPES}),
            st.dictionaries(COLUMN_NAMES, JSON_TYPES, max_size=5),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_was_given_and_recorded_makes_a_table(workshop, rows):
    table, written, _ = pages(rows, {}, [])
    columns = list(table.columns)
    assert (
        len(set(columns)) == len(columns)
        and columns == list(written)
        and list(table.status) == ["ok"] * len(rows)
    )
    assert {*columns[:2]} == {"error_parameter", "a_low"} and columns[-4:] == [
        "status",
        "seconds",
        "error",
        "folder",
    ]


@pytest.mark.parametrize(
    "before, status",
    [("pending", "interrupted"), ("interrupted", "interrupted"), ("killed", "killed")],
)
def test_a_record_whose_process_is_gone_is_finished_with_the_sweep(
    save, before, status
):
    gone = subprocess.Popen([sys.executable, "-c", "1"])
    gone.wait()
    run(save(), {"n": 2}, out="out/a")
    path, report = Path("out/a/metrics.json"), Path("out/a/report.html")
    record = json.loads(path.read_text())
    for key in (
        "seconds",
        "cells",
        "kernel",
        "kernel_reason",
        "device",
        "peak_memory_mb",
        "error",
    ):
        del record[key]
    path.write_text(
        json.dumps(
            {
                **record,
                "status": "running",
                "pid": gone.pid,
                "process_started": 1.0,
                "host": socket.gethostname(),
                "metrics": {},
            }
        )
    )
    report.unlink()
    Path("out/a/.reserve").touch()
    board = _Board(
        Path("out").absolute(), "mine", ["n"], {"a": {"n": 2}, "b": {"n": 3}}
    )
    board.set("a", {"status": before})
    _close(board)
    made = read_run("out/a")
    assert (
        made.status == status
        and made.seconds >= 0
        and made.parameters == {}
        and {*made.unknown} == {"n", "seed", "data"}
    )
    assert (
        "\n" not in made.error["message"]
        and "pid" not in made.record
        and report.exists()
        and not Path("out/a/.reserve").exists()
    )
    assert not Path("out/b").exists()


def test_the_record_of_a_living_process_is_left_to_it(save, monkeypatch):
    run(save(), out="out/a")
    path, me = Path("out/a/metrics.json"), psutil.Process()
    text = json.dumps(
        {
            **json.loads(path.read_text()),
            "status": "running",
            "pid": me.pid,
            "process_started": me.create_time(),
            "host": socket.gethostname(),
        }
    )
    path.write_text(text)
    board = _Board(Path("out").absolute(), "mine", ["n"], {"a": {"n": 2}})
    monkeypatch.setattr(
        "bigmodel_nb.headless.sweep.time.monotonic", iter(range(0, 1000, 10)).__next__
    )
    _close(board)
    assert path.read_text() == text


def test_a_run_that_began_behind_the_back_of_its_sweep_is_in_the_table(save):
    board = _Board(
        Path("out").absolute(), "mine", ["n"], {"a": {"n": 2}, "b": {"n": 3}}
    )
    run(save(), {"n": 2}, out="out/a")
    Path("out/b").mkdir()  # of a process that was ended before its first record
    Path("out/b/.reserve").touch()
    for key in board.points:
        board.set(key, {"status": "not run"})
    board.write()
    _close(board)
    told = pd.read_csv("out/sweep.csv").set_index("n").status
    assert told.to_dict() == {2: "ok", 3: "not run"} and not Path("out/b").exists()


def test_what_an_earlier_sweep_left_is_not_taken_for_a_run_of_this_one(save):
    run(save(), {"n": 2}, out="out/a")
    board = _Board(Path("out").absolute(), "mine", ["n"], {"a": {"n": 2}})
    board.begun += timedelta(hours=1)
    board.set("a", {"status": "not run"})
    _close(board)
    assert board.records["a"] == {"status": "not run"}
    assert read_run("out/a").status == "ok"


def test_no_run_begins_on_a_worker_once_its_sweep_has_ended(workshop, monkeypatch):
    """However late: the end is told while the worker takes a runner from its shelf."""
    worker = SimpleNamespace(bigmodel_runners=_Runners())
    runners = worker.bigmodel_runners

    class Runner:
        environment, process = None, SimpleNamespace(poll=lambda: None)
        ended = False

        def answer(self, *request):
            pytest.fail("the run has begun")

        def end(self):
            self.ended = True

    class Shelf(list):
        def pop(self):
            runners.ended.add("sweep")
            return super().pop()

    runner = Runner()
    runners.idle = Shelf([runner])
    monkeypatch.setattr("distributed.get_worker", lambda: worker)
    Path("kept").mkdir()
    with pytest.raises(RuntimeError, match="the sweep has ended"):
        _run_on_worker("sweep", None, "mine.ipynb", {}, "kept", None)
    assert runner.ended and not runners.busy and not runners.idle
    assert Path("kept").is_dir(), "an earlier run is not removed for nothing"


HEARD = """from bigmodel_nb.kit.record import record
import os
seen = os.environ.copy()
names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
names += ["MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED", "MINE"]
record("heard", [seen.get(name) for name in names])"""


@pytest.mark.parametrize(
    "workers, given, wanted",
    [
        (1, {}, [None] * 6),
        (
            2,
            {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "7", "MINE": "a b"},
            ["3", None, None, None, "7", "a b"],
        ),
        (2, {}, ["cores", None, None, None, None, None]),
    ],
    ids=["alone", "set", "unset"],
)
def test_kernels_see_the_environment_of_who_sweeps(
    save, monkeypatch, workers, given, wanted
):
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MALLOC_TRIM_THRESHOLD_",
        "PYTHONHASHSEED",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share = (
        str(max(1, len(os.sched_getaffinity(0)) // 2))
        if hasattr(os, "sched_getaffinity")
        else str(max(1, os.cpu_count() // 2))
    )
    table = sweep(save(HEARD), {"n": [1, 2]}, workers=workers, out="out")
    told = [share if each == "cores" else each for each in wanted]
    assert [json.loads(each) for each in table.heard] == [told] * 2
    assert (f"OMP_NUM_THREADS={share}" in Path("out/sweep.html").read_text()) == (
        "cores" in wanted
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("{low: 3, high: 0}", "the lower one first"),
        ("{low: a, high: 3}", "it needs"),
        ("{low: 0}", "it needs"),
        ("{low: 0, high: 3, log: true}", "a number above 0"),
        ("{low: 0", "it needs"),
    ],
)
def test_a_range_of_a_terminal_is_checked_too(text, said):
    with pytest.raises(BadRequest, match=said):
        parse_values(Text(text), Parameter("x", "int", 1))


def test_a_terminal_sweeps_a_range_that_is_a_mapping(save):
    from typer.testing import CliRunner

    from bigmodel_nb.headless.cli import app

    done = CliRunner().invoke(
        app, ["sweep", save(), "-g", "n={low: 2, high: 3}", "--out", "out", "-q"]
    )
    assert done.exit_code == 0 and pd.read_csv("out/sweep.csv").n.tolist() == [2, 3]


@pytest.mark.parametrize(
    "metadata, language",
    [
        (
            {"kernelspec": {"name": "ir", "language": "R"}},
            "the kernel 'ir', which is not installed",
        ),
        ({"kernelspec": {"name": "ir"}}, "the kernel 'ir'"),
        ({"language_info": {"name": "julia"}}, "a kernel for julia"),
        ({"kernelspec": {"name": "python3", "language": "R"}}, None),
        ({"kernelspec": {"name": "mine", "language": "python"}}, None),
        ({"kernelspec": {"name": "my_pytorch"}}, None),
        ({"kernelspec": 3, "language_info": []}, None),
        ({}, None),
    ],
)
def test_a_notebook_of_another_language_is_refused_before_anything_starts(
    save, monkeypatch, metadata, language
):
    nbformat.write(
        nbformat.from_dict({**nbformat.read(save(), 4), "metadata": metadata}),
        "mine.ipynb",
    )
    monkeypatch.setattr(
        "bigmodel_nb.headless.sweep._cluster",
        lambda *_: (_ for _ in ()).throw(InterruptedError),
    )
    said = f"the notebook needs {language}" if language else None
    with pytest.raises(BadRequest if language else InterruptedError, match=said):
        sweep("mine.ipynb", {"n": [1]}, out="out")
    assert language is None or not Path("out").exists()


def test_a_changed_module_beside_the_notebook_runs_again(save):
    Path("package/inner").mkdir(parents=True)
    Path("helper.py").write_text("from package.inner import deep")
    for name in ("package/__init__.py", "package/inner/__init__.py", "unused.py"):
        Path(name).write_text("")
    Path("package/inner/deep.py").write_bytes(b"# caf\xe9")
    declared = declaration(save("import helper"))
    keys = [fingerprint(declared, {"n": 1})]
    for name in ("helper.py", "package/inner/deep.py", "unused.py"):
        Path(name).write_bytes(Path(name).read_bytes() + b"\nx = 1")
        keys.append(fingerprint(declared, {"n": 1}))
    assert len(set(keys)) == 3 and keys[2] == keys[3], (
        "what is not imported does not count"
    )
    assert fingerprint(declaration(save()), {"n": 1}) not in keys
    swept = [sweep(save("import helper"), {"n": [1]}, out="out").folder[0]]
    Path("helper.py").write_text("x = 2")
    assert sweep("mine.ipynb", {"n": [1]}, out="out").folder[0] not in swept


REFUSED = """
import sys
from bigmodel_nb.headless.parameters import BadRequest
from bigmodel_nb.headless.sweep import Range, sweep
try:
    sweep("mine.ipynb", {given}, out="a file/out")
except BadRequest as error:
    heavy = {{"scipy", "dask", "distributed", "pandas", "matplotlib", "nbclient"}}
    heavy |= {{"bigmodel_nb.headless.run"}}
    print(error, sorted(heavy & {{*sys.modules}}))
"""


@pytest.mark.parametrize(
    "given, said",
    [
        ("{'n': Range(0.5, 1)}, samples=3", "n is 0.5; it needs an integer"),
        ("{'n': Range(1, 9)}, samples=0", "samples is 0"),
        ("{'n': []}, samples=2", "grid has 0 points"),
        ("{'n': Range(1, 9)}, samples=2, method='sobol'", "method 'sobol'"),
        ("{'n': [1]}, workers=0", "workers is 0"),
        ("{'n': [1]}", "where nothing can be written"),
    ],
)
def test_what_is_refused_is_refused_at_once(save, given, said):
    save()
    Path("a file").touch()
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(given=given)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        said in done.stdout
        and done.stdout.endswith(" []\n")
        and "\n" not in done.stdout.strip()
    ), done.stderr


def test_a_notebook_whose_kernel_speaks_another_language_is_refused(save, monkeypatch):
    Path("kernels/ir").mkdir(parents=True)
    Path("kernels/ir/kernel.json").write_text(
        '{"argv": ["R"], "language": "R", "display_name": "R"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(Path().absolute()))
    nbformat.write(
        nbformat.from_dict(
            {**nbformat.read(save(), 4), "metadata": {"kernelspec": {"name": "ir"}}}
        ),
        "mine.ipynb",
    )
    with pytest.raises(
        BadRequest,
        match="'mine.ipynb' is a notebook of r; allowed are notebooks of Python",
    ):
        sweep("mine.ipynb", {"n": [1]}, out="out")


INTERVAL = {"low": 0.25, "high": 0.75, "n": 9}


def test_a_page_says_first_how_the_runs_ended_and_draws_what_differs(workshop):
    Path("out").mkdir()
    points = {
        "a": {"hidden": [64]},
        "b": {"hidden": [64, 128]},
        "c": {"hidden": [1]},
        "d": {"hidden": [2]},
    }
    board = _Board(Path("out").absolute(), "mine & yours", ["hidden"], points)
    for key, value in {"a": 0.5, "b": 0.4}.items():
        board.set(
            key,
            {
                "status": "ok",
                "metrics": {"acc": {"value": value, **INTERVAL}, "same": 3},
                "parameters": points[key],
                "seconds": value,
                "error": None,
            },
        )
    board.set(
        "c",
        {
            "status": "failed",
            "metrics": {},
            "parameters": points["c"],
            "seconds": 1.0,
            "error": {"message": "cell 2: ValueError: <too small>"},
        },
    )
    board.set("d", {"status": "not run"})
    board.write()
    page = Path("out/sweep.html").read_text()
    assert page.count("<img") == 1, (
        "acc; not what is alike in all runs, nor the seconds"
    )
    told = [
        "<h1>Sweep of mine &amp; yours</h1><p>4 runs: 2 ok, 1 failed, 1 not run.</p>",
        "<li>acc: from 0.4 (hidden [64, 128]) to 0.5 (hidden [64])</li>",
        "<li>hidden [1]: failed, cell 2: ValueError: &lt;too small&gt;</li>",
        "<li>hidden [2]: not run</li>",
        'alt="acc: from 0.4 (hidden [64, 128]) to 0.5 (hidden [64])"',
        "<h2>Runs</h2><table>",
        '<a href="a/report.html">a</a>',
        "<td>d</td>",
    ]
    places = [page.find(each) for each in told]
    assert -1 not in places and places == sorted(places), (
        told[places.index(-1)] if -1 in places else places
    )
    assert json.loads(Path("out/sweep.json").read_text()) == {
        "title": "mine & yours",
        "swept": ["hidden"],
        "metrics": ["acc", "same"],
        "ends": ["acc_high", "acc_low", "acc_n"],
    }


def test_no_point_is_called_the_highest_where_several_are():
    table = pd.DataFrame({"n": [1, 2, 3, 4], "acc": [0.5, 0.25, 0.5, 0.5]})
    assert (
        _range(table, "acc", ["n"]) == "acc: from 0.25 (n 2) to 0.5 (n 1, and 2 more)"
    )


def test_words_get_points_with_their_intervals_and_no_line():
    rows = [
        {
            "hidden": hidden,
            "flag": flag,
            "acc": 0.5 + place / 10,
            "acc_low": 0.4,
            "acc_high": 0.7,
            "status": "ok",
        }
        for place, hidden in enumerate(["[1]", "[2]", "[3]"])
        for flag in (True, False)
    ]
    for swept, groups in ((["hidden"], 1), (["hidden", "flag"], 2), (["flag"], 1)):
        made, axes = plot_sweep(pd.DataFrame(rows), "acc", swept)
        assert {line.get_linestyle() for line in axes.lines} == {"None"} and len(
            axes.lines
        ) == groups
        assert sum(len(each.get_segments()) for each in axes.collections) == len(
            rows
        ) and axes.collections[0].get_segments()[0][:, 1].tolist() == [0.4, 0.7]
        plt.close(made)
