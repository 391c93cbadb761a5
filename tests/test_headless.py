"""Chapter 10: what a notebook declares, how a run ends, what the command says."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.cli import CHECKS, app, copy_notebooks
from bigmodel_nb.headless.parameters import (
    UNKNOWN,
    BadRequest,
    Parameter,
    catalogue,
    check_parameters,
    check_value,
    declaration,
    find_notebook,
    read_parameters,
    suggestion,
)
from bigmodel_nb.headless.report import to_html
from bigmodel_nb.headless.run import (
    RunFailed,
    _share_of,
    _Watch,
    notebook_hash,
    read_run,
    run,
    write_atomic,
)

DECLARED = """from pathlib import Path
epsilon: float = 0.3  # radius
steps: int = 10  # steps # and a sharp
norm: str = "linf"  # "linf": largest; "l2": length
name: str = "free"  # any text
loud: bool = False  # say so
sizes: list[int] = [8, 16]  # sides
limit: float | None = None  # a bound
data: Path | None = None  # a file
plain = 3
computed = max(1, 2)  # not a literal
"""


def notebook(*cells, parameters=None):
    made = (
        [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        if parameters
        else []
    )
    return new_notebook(
        cells=made
        + [cell if isinstance(cell, dict) else new_code_cell(cell) for cell in cells]
    )


@pytest.fixture
def save(workshop):
    def write(*cells, parameters=None, name="mine.ipynb"):
        nbformat.write(notebook(*cells, parameters=parameters), name)
        return name

    return write


def ended(name, **options):
    """The run of a notebook that does not end well."""
    with pytest.raises(RunFailed) as caught:
        run(name, out="out", **options)
    on_disk = json.loads(Path("out/metrics.json").read_text())
    assert on_disk["status"] == caught.value.run.status
    assert not [
        path.name for path in Path("out").iterdir() if path.name.startswith(".")
    ], "nothing half-written stays"
    return caught.value.run


def bigmodel(*words):
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output.strip()


# --- what a notebook declares


def test_declaration_is_read_without_running_it():
    found = read_parameters(notebook(parameters=DECLARED))
    assert list(found) == [
        "epsilon",
        "steps",
        "norm",
        "name",
        "loud",
        "sizes",
        "limit",
        "data",
        "plain",
        "computed",
    ]
    assert found["epsilon"] == Parameter(
        "epsilon", "float", 0.3, "radius", source="0.3"
    )
    assert found["steps"].help == "steps # and a sharp"
    assert found["norm"].choices == ("linf", "l2") and found["name"].choices == ()
    assert (
        found["plain"].type,
        found["computed"].type,
        found["computed"].default,
        found["computed"].source,
    ) == ("int", "Any", UNKNOWN, "max(1, 2)")
    assert read_parameters(notebook("x: int = 1")) == {}


def test_a_parameters_cell_that_is_no_python_is_a_bad_request():
    with pytest.raises(BadRequest, match="the parameters cell is no Python"):
        read_parameters(notebook(parameters="x: int = = 3"))


@pytest.mark.parametrize(
    "source",
    [
        "x = 'a\ud83d'",
        pytest.param("x = " + "+".join(["1"] * 5000), id="deep"),
        pytest.param("x = " + "(" * 5000, id="deeper"),
        pytest.param("x = " + "-" * 100_000 + "1", id="deepest"),
        "x = 'a\0'",
        "x = 1\n  y = 2",
    ],
)
def test_a_parameters_cell_that_no_parser_reads_is_a_bad_request(workshop, source):
    made = notebook(parameters=source)
    with pytest.raises(
        BadRequest, match="^the parameters cell is no Python: ."
    ) as caught:
        read_parameters(made)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()
    Path("mine.ipynb").write_text(json.dumps(made))
    for words in (
        ["show", "mine.ipynb"],
        ["run", "mine.ipynb", "--out", "out"],
        ["sweep", "mine.ipynb", "-g", "x=1,2"],
    ):
        code, said = bigmodel(*words)
        assert code == 2 and "Traceback" not in said and len(said.splitlines()) <= 3, (
            said
        )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "head",
    [
        "%matplotlib inline",
        "!echo a \\\n  b",
        "print?",
        "?print",
        "files = !ls",
        "where = %pwd",
        "%%time",
        "if True:\n    %matplotlib inline\n    !ls",
        "import sys\nif 'google.colab' in sys.modules:\n    %pip install x",
    ],
)
@pytest.mark.parametrize("indent", ["", "    "])
def test_a_parameters_cell_that_ipython_reads_is_read(head, indent):
    source = "\n".join(
        indent + line
        for line in [
            *head.split("\n"),
            "epochs: int = 3  # rounds",
            "size = (1,",
            "  2)",
            "rate = 1e-3  # a step?",
        ]
    )
    found = read_parameters(notebook(parameters=source))
    assert [
        (each.name, each.type, each.default, each.help) for each in found.values()
    ] == [
        ("epochs", "int", 3, "rounds"),
        ("size", "tuple", (1, 2), ""),
        ("rate", "float", 1e-3, "a step?"),
    ]


def test_two_parameters_cells_are_refused_as_values_would_be_set_between_them(save):
    later = new_code_cell("epochs = 4", metadata={"tags": ["parameters"]})
    name = save("1", later, parameters="epochs: int = 3")
    for values in ({}, {"epochs": 5}):
        with pytest.raises(
            BadRequest, match="^cells 1 and 3 are tagged 'parameters'; allowed is one"
        ):
            run(name, values, out="out")
    assert not Path("out").exists()


def test_a_text_cell_that_is_tagged_sets_nothing(save):
    text = new_markdown_cell("# Title", metadata={"tags": ["parameters"]})
    nbformat.write(
        new_notebook(
            cells=[
                text,
                *notebook(
                    "from bigmodel_nb.kit.record import record; record('n', n)",
                    parameters="n: int = 3",
                ).cells,
            ]
        ),
        "mine.ipynb",
    )
    done = run("mine.ipynb", n=4, out="out")
    assert done.metrics == {"n": 4} == done.parameters


def test_a_path_may_name_a_notebook(save):
    name = Path(save("1", parameters="n: int = 3"))
    assert (
        find_notebook(name) == name.absolute()
        and declaration(name).name == "mine.ipynb"
    )
    done = run(name, n=4)
    assert (
        done.parameters == {"n": 4}
        and done.record["notebook"] == "mine.ipynb"
        and done.folder.parent == Path("runs/mine").absolute()
    )
    with pytest.raises(BadRequest, match="name is 3; allowed is"):
        run(3)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("epsilon", "0.3", 0.3),
        ("epsilon", "1e-3", 1e-3),
        ("epsilon", "8/255", 8 / 255),
        ("epsilon", "2", 2.0),
        ("steps", "-3", -3),
        ("loud", "true", True),
        ("loud", "False", False),
        ("norm", "l2", "l2"),
        ("name", "0.3", "0.3"),
        ("sizes", "1,2, 3", [1, 2, 3]),
        ("sizes", "[4]", [4]),
        ("sizes", "[]", []),
        ("limit", "none", None),
        ("limit", "2.5", 2.5),
        ("plain", "4", 4),
        ("computed", "so", "so"),
    ],
)
def test_text_of_a_terminal_becomes_the_declared_type(name, text, value):
    got = check_parameters(
        read_parameters(notebook(parameters=DECLARED)), {name: text}, text=True
    )[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("epsilon", "lots", "epsilon is 'lots'; it needs a float"),
        ("epsilon", "1/0", "needs a float"),
        ("epsilon", "nan", "needs a float"),
        ("steps", "1e-3", "steps is '1e-3'; it needs an integer"),
        ("steps", "3.0", "needs an integer"),
        ("loud", "yes please", "needs true or false"),
        ("norm", "l3", "norm is 'l3'; allowed are 'linf', 'l2'"),
        ("sizes", "8,many", r"it needs a list \(an integer each\)"),
        ("limit", "big", "limit is 'big'; it needs a float or none"),
        ("data", "gone.csv", "data names 'gone.csv', and there is no such file"),
    ],
)
def test_text_that_does_not_fit_gets_a_sentence(name, text, said):
    with pytest.raises(BadRequest, match=said):
        check_parameters(
            read_parameters(notebook(parameters=DECLARED)), {name: text}, text=True
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("epsilon", "0.3"),
        ("epsilon", True),
        ("epsilon", float("inf")),
        ("steps", 3.0),
        ("steps", True),
        ("loud", 1),
        ("name", 3),
        ("sizes", [1, "2"]),
        ("sizes", 3),
        ("limit", "none"),
        ("norm", None),
    ],
)
def test_values_from_python_keep_their_type(name, value):
    with pytest.raises(BadRequest, match=f"^{name} is "):
        check_parameters(read_parameters(notebook(parameters=DECLARED)), {name: value})


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.lists(st.integers(), max_size=3),
    ),
    st.sampled_from(["epsilon", "steps", "norm", "name", "loud", "sizes", "limit"]),
)
def test_any_value_is_either_of_the_declared_type_or_refused(value, name):
    types = {
        "epsilon": float,
        "steps": int,
        "norm": str,
        "name": str,
        "loud": bool,
        "sizes": list,
        "limit": (float, type(None)),
    }
    try:
        got = check_parameters(
            read_parameters(notebook(parameters=DECLARED)), {name: value}
        )[name]
    except BadRequest as error:
        assert name in str(error)
    else:
        assert isinstance(got, types[name]) and (
            not isinstance(got, bool) or name == "loud"
        )
        json.dumps(got, allow_nan=False)


@given(st.text(), st.text(max_size=20))
def test_any_name_and_text_either_fits_or_is_refused(name, text):
    declared = read_parameters(notebook(parameters=DECLARED))
    try:
        got = check_parameters(declared, {name: text}, text=True)
    except BadRequest:
        return
    assert name in declared and list(got) == [name]


@pytest.mark.parametrize(
    "name", ["n=1;print(1)#", "", "a b", "1x", "class", "x.y", "__import__('os')", 3]
)
def test_a_name_that_is_no_identifier_is_refused(name):
    with pytest.raises(BadRequest, match="is not a parameter name"):
        check_parameters(read_parameters(notebook(parameters=DECLARED)), {name: 1})


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(
        BadRequest, match="unknown parameter 'epsilom'; did you mean 'epsilon'"
    ):
        check_parameters(
            read_parameters(notebook(parameters=DECLARED)), {"epsilom": 1.0}
        )
    assert suggestion("kot", ["kit", "far"], "there are") == "; did you mean 'kit'?", (
        "and no list of all"
    )
    assert (
        suggestion("zzz", ["kit"], "there are") == "; there are kit"
        and suggestion("x", [], "it takes") == "; it takes none"
    )


def test_a_path_is_resolved_against_the_current_folder(workshop):
    Path("rows.csv").write_text("a\n1\n")
    parameter = Parameter("data", "Path | None", None)
    assert (
        check_value(parameter, "rows.csv", text=True)
        == check_value(parameter, Path("rows.csv"))
        == workshop / "rows.csv"
    )
    assert check_value(parameter, None) is None
    either = Parameter(
        "model", "Path | str | None", None
    )  # a file, or a name where there is no such file
    assert (
        check_value(either, "rows.csv", text=True) == str(workshop / "rows.csv")
        and check_value(either, "hub:name", text=True)
        == check_value(either, "hub:name")
        == "hub:name"
    )


def test_catalogue_has_the_course_in_order():
    names = list(catalogue())
    assert (
        names.index("kit/core")
        < names.index("data/sources")
        < names.index("robust/attacks")
        < names.index("headless/run")
    )
    assert "index" not in names and "tour" in names
    assert (
        declaration("kit/core").promise
        and declaration("kit/core").parameters["seed"].default == 0
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("turo", "did you mean 'tour'"),
        ("robust/atacks", "did you mean 'robust/attacks'"),
        ("gone.ipynb", "no notebook file 'gone.ipynb'"),
        ("~no_such_user/x.ipynb", "no notebook file"),
        ("a\0.ipynb", "no notebook file"),
        ("\ud83d.ipynb", "no notebook file"),
        pytest.param("a" * 300 + ".ipynb", "no notebook file", id="long"),
        pytest.param("a" * 5000, "no notebook 'aaa", id="longer"),
        ("a\0", "no notebook 'a"),
    ],
)
def test_an_unknown_notebook_brings_the_nearest(name, said):
    with pytest.raises(BadRequest, match=said):
        find_notebook(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_a_bad_request(workshop, text):
    Path("broken.ipynb").write_text(text)
    with pytest.raises(BadRequest, match="'broken.ipynb' cannot be read as a notebook"):
        declaration("broken.ipynb")


# --- runs


def test_a_kernel_keeps_its_complaints_off_the_terminal(save, capfd):
    name = save("import time; time.sleep(30)")
    with pytest.raises(RunFailed) as failure:
        run(name, out="out", timeout=1)
    assert (
        failure.value.run.status == "timeout"
        and "IPKernelApp" not in capfd.readouterr().err
    )


def test_memory_is_seen_however_short_the_run():
    watch = _Watch()
    with watch.over(os.getpid()):
        pass
    assert watch.peak > 1e6


def test_a_run_returns_what_was_recorded_and_leaves_three_files(save):
    name = save(
        new_markdown_cell("# Mine\n\n> Promise."),
        "from bigmodel_nb.kit.record import record\nrecord('double', 2 * n)",
        "import os; os.getcwd()",
        parameters="n: int = 1  # a number",
    )
    done = run(name, out="out", n=21)
    assert (done.status, done.metrics, done.parameters) == (
        "ok",
        {"double": 42},
        {"n": 21},
    )
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "metrics.json",
        "notebook.ipynb",
        "report.html",
    ]
    record = json.loads((done.folder / "metrics.json").read_text())
    assert {
        "status",
        "metrics",
        "parameters",
        "versions",
        "seed",
        "device",
        "seconds",
        "peak_memory_mb",
        "error",
    } <= set(record)
    assert (
        record["status"] == "ok"
        and record["error"] is None
        and record["device"] == "cpu"
        and record["versions"]["python"]
    )
    assert 20 < record["peak_memory_mb"] < 1000 and record["seconds"] > 0
    assert str(Path("out").absolute()) in str(
        nbformat.read(done.notebook, 4).cells[-1].outputs
    ), "the kernel works in the run's folder"
    assert Path.cwd() != Path("out").absolute()


def test_default_folder_is_runs_name_time(save):
    done = run(save("1"))
    assert done.folder.parent == Path("runs/mine").absolute()


def test_a_parameter_given_as_mapping_may_have_any_name(save):
    done = run(
        save(
            "from bigmodel_nb.kit.record import record\nrecord('got', out)",
            parameters="out: str = 'a'  # a word",
        ),
        {"out": "b"},
        out="out",
    )
    assert done.metrics == {"got": "b"}


def test_parameters_named_as_those_of_the_course_go_by_keyword(save):
    done = run(
        save(
            "from bigmodel_nb.kit.record import record\nrecord('got', text)",
            parameters="text: str = 'a'  # a word",
        ),
        text="b",
        out="out",
    )
    assert done.metrics == {"got": "b"}


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells who shares a page"
)
def test_memory_that_processes_share_counts_once(save):
    program = """import os, time
block = b"x" * 300_000_000
children = []
for _ in range(4):
    pid = os.fork()
    if not pid:
        time.sleep(3)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)"""
    cells = run(save("x = 1", program), out="shared").record["cells"]
    alone, shared = (each["peak_memory_mb"] for each in cells)
    more = shared - alone
    # each child once more would be 1,500 MB
    assert 250 < more < 500


class Sharing:
    "One of those that hold 300 bytes together, until it is read `ends` times."

    all = []

    def __init__(self, ends=99):
        self.left = ends
        self.all.append(self)

    def memory_full_info(self):
        holders = sum(each.left > 0 for each in self.all)
        held = SimpleNamespace(pss=300 / holders if self.left > 0 else 0, rss=300)
        self.left -= 1
        return held

    def memory_info(self):
        return SimpleNamespace(rss=300 if self.left > 0 else 0)


@pytest.mark.parametrize("ends", [(99, 99), (1, 99), (1, 1, 99), (1, 2, 99)])
def test_what_one_that_ends_leaves_to_others_counts_once(monkeypatch, ends):
    monkeypatch.setattr(Sharing, "all", [])
    assert _share_of([Sharing(each) for each in ends]) == 300


def test_those_that_end_count_nothing(monkeypatch):
    monkeypatch.setattr(Sharing, "all", [])
    assert _share_of([Sharing(1), Sharing(1)]) == 0


def test_peak_memory_is_that_of_the_kernel(save):
    # a forked kernel sees the libraries' pages, a fresh one does not: both are forked
    kernel.warm()
    small = run(save("x = 1"), out="small").peak_memory
    large = run(
        save("x = b'1' * 400_000_000\nimport time; time.sleep(0.3)"), out="large"
    ).peak_memory
    assert 350 < large - small < 500


def test_a_failing_cell_keeps_what_came_before(save):
    name = save(
        "from bigmodel_nb.kit.record import record\nrecord('before', 1)",
        new_markdown_cell("## The division"),
        "1 / 0",
        "record('after', 2)",
    )
    failed = ended(name)
    assert failed.status == "failed" and failed.metrics == {"before": 1}
    assert failed.error == {
        "cell": 3,
        "title": "The division",
        "exception": "ZeroDivisionError",
        "message": "cell 3 (The division): ZeroDivisionError: division by zero",
    }
    states = [
        cell.metadata.papermill.status
        for cell in nbformat.read(failed.notebook, 4).cells
    ]
    assert states == ["completed", "completed", "failed", "pending"]
    assert "ZeroDivisionError" in failed.report.read_text()


def test_sys_exit_with_a_code_is_a_failure(save):
    assert (
        ended(save("import sys; sys.exit(3)")).error["message"]
        == "cell 1: SystemExit: 3"
    )


def test_a_killed_kernel_is_called_killed(save):
    killed = ended(save("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "1"))
    assert (
        killed.status == "killed"
        and killed.error["message"] == "cell 1: the kernel was ended by signal 9"
    )
    assert [
        cell.metadata.papermill.status
        for cell in nbformat.read(killed.notebook, 4).cells
    ] == ["failed", "pending"]


def test_a_cell_that_takes_too_long_is_a_timeout(save):
    late = ended(save("1", "import time; time.sleep(60)"), timeout=2)
    assert (
        late.status == "timeout"
        and late.error["message"] == "cell 2: the cell took longer than 2 s"
        and late.seconds < 30
    )


WAIT = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(60)"
STUBBORN = """
import pathlib, time
pathlib.Path('started').touch()
for _ in range(600):
    try:
        time.sleep(0.1)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize(
    "source", [WAIT, STUBBORN], ids=["sleeps", "catches the interrupt"]
)
def test_ctrl_c_is_an_interrupted_run(save, source):
    import _thread

    name = save("'shown'", source, "'never'")

    def press():
        while not Path("out/started").exists():
            threading.Event().wait(0.05)
        _thread.interrupt_main()

    threading.Thread(target=press).start()
    stopped = ended(name)
    assert stopped.status == "interrupted" and stopped.seconds < 40
    assert stopped.error["message"] == "cell 2: interrupted by SIGINT"
    assert [
        cell.metadata.papermill.status
        for cell in nbformat.read(stopped.notebook, 4).cells
    ] == ["completed", "failed", "pending"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, (
        "the program's own handling is back"
    )


def command(name, ignored=None):
    """`bigmodel run` as a terminal starts it, or with one signal ignored."""
    handled = "".join(
        (
            f"signal.signal({number:d}, "
            f"signal.{'SIG_IGN' if number == ignored else 'SIG_DFL'}); "
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    start = handled.replace(
        f"({signal.SIGINT:d}, signal.SIG_DFL)",
        f"({signal.SIGINT:d}, signal.default_int_handler)",
    )
    code = f"import signal; {start}from bigmodel_nb.headless.cli import main; main()"
    return [sys.executable, "-c", code, "run", name, "--out", "out"]


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(save, ignored):
    name = save(WAIT.replace("60", "3"))
    with subprocess.Popen(
        command(name, ignored),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as runner:
        while not Path("out/started").exists():
            assert runner.poll() is None
            threading.Event().wait(0.05)
        runner.send_signal(ignored)
        said, _ = runner.communicate(timeout=40)
    assert (
        runner.returncode,
        json.loads(Path("out/metrics.json").read_text())["status"],
    ) == (0, "ok"), said


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_ends_the_kernel_and_leaves_a_record(save, number):
    name = save("import os; open('kernel', 'w').write(str(os.getpid()))", WAIT)
    with subprocess.Popen(
        command(name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as runner:
        while not Path("out/started").exists():
            assert runner.poll() is None
            threading.Event().wait(0.05)
        runner.send_signal(number)
        _, said = runner.communicate(timeout=40)
    record = json.loads(Path("out/metrics.json").read_text())
    assert (runner.returncode, record["status"]) == (130, "interrupted")
    assert said.splitlines() == [
        "kept in out",
        f"bigmodel: interrupted: cell 2: interrupted by {number.name}",
    ]
    assert not psutil.pid_exists(int(Path("out/kernel").read_text()))


EARLY = """import os, signal
from bigmodel_nb.headless import run

def write(path, text, *rest, before=run._write):
    before(path, text, *rest)
    if path.name == ".reserve":
        os.kill(os.getpid(), signal.SIGTERM)

run._write = write
try:
    run.run("mine.ipynb", out="out")
except run.RunFailed as failure:
    print(failure.run.status)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_a_run_that_is_stopped_while_it_makes_its_folder_has_a_record(save):
    save("open('ran', 'w')")
    done = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "interrupted\n", done.stderr
    assert json.loads(Path("out/metrics.json").read_text())["status"] == "interrupted"
    assert not Path("out/.reserve").exists() and not list(Path().rglob("ran"))


def test_a_runner_that_was_killed_leaves_a_record_that_can_be_told_as_stale(save):
    name = save(
        "import os; open('kernel', 'w').write(str(os.getpid()))", WAIT, "'never'"
    )
    with subprocess.Popen(
        command(name), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as runner:
        while not Path("out/started").exists():
            assert runner.poll() is None
            threading.Event().wait(0.05)
        alive = read_run("out")
        assert (alive.status, alive.stale, alive.record["pid"]) == (
            "running",
            False,
            runner.pid,
        )
        runner.kill()
    left = read_run("out")
    assert left.status == "running" and left.stale
    states = [
        cell.metadata.papermill.status for cell in nbformat.read(left.notebook, 4).cells
    ]
    assert states[0] == "completed" and "completed" not in states[1:]
    assert all(
        json.loads(path.read_text())
        for pattern in ("*.json", "*.ipynb")
        for path in Path("out").glob(pattern)
    )
    kernel = int(Path("out/kernel").read_text())
    for _ in range(200):
        if not psutil.pid_exists(kernel):
            break
        threading.Event().wait(0.05)
    assert not psutil.pid_exists(kernel), "the kernel follows its runner"


def test_a_record_of_another_machine_is_not_called_stale(save):
    done = run(save("1"), out="out")
    record = {
        **done.record,
        "status": "running",
        "pid": 1,
        "process_started": 0.0,
        "host": "elsewhere",
    }
    Path("out/metrics.json").write_text(json.dumps(record))
    assert not read_run("out").stale
    Path("out/metrics.json").write_text(
        json.dumps({**record, "host": socket.gethostname()})
    )
    assert read_run("out").stale, (
        "process 1 did not start then: the number is used again"
    )


def test_a_run_read_back_is_the_run_that_ended(save):
    done = run(
        save(
            "from bigmodel_nb.kit.record import record\nrecord('n', n)",
            parameters="n: int = 1  # a number",
        ),
        out="out",
        n=4,
    )
    assert read_run("out") == done
    failed = run_that_fails(save("1 / 0", name="bad.ipynb"), "bad")
    assert read_run("bad") == failed


def run_that_fails(name, out):
    with pytest.raises(RunFailed) as caught:
        run(name, out=out)
    return caught.value.run


def test_what_is_no_run_is_told_in_a_sentence(workshop):
    with pytest.raises(
        FileNotFoundError, match="which holds no run: metrics.json is not there"
    ):
        read_run("gone")
    Path("metrics.json").write_text("{}")
    with pytest.raises(
        ValueError, match="whose metrics.json is no run's: status is missing"
    ):
        read_run(".")


def test_two_runs_into_one_folder_cannot_both_begin(save):
    name, ends = save("1"), []

    def start():
        try:
            ends.append(run(name, out="out").status)
        except BadRequest as error:
            ends.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        sorted(ends)
        == ["ok"]
        + ["out is 'out', which already holds a run; allowed is a new folder"] * 5
    )
    assert read_run("out").status == "ok"
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "metrics.json",
        "notebook.ipynb",
        "report.html",
    ]


def test_the_record_says_what_each_cell_cost(save):
    done = run(
        save(
            new_markdown_cell("## Much"),
            (
                "import time; x = bytearray(300_000_000); x[::4096] = x[::4096]; "
                "del x; time.sleep(0.3)"
            ),
            "1",
        ),
        out="out",
    )
    much, little = done.record["cells"]
    assert (much["cell"], much["title"], much["status"]) == (
        2,
        "Much",
        "completed",
    ) and (little["cell"], little["status"]) == (3, "completed")
    assert 0.3 <= much["seconds"] < 20 and little["seconds"] < much["seconds"]
    assert much["peak_memory_mb"] > 300, "however short, the peak is seen"
    if sys.platform == "linux":
        assert little["peak_memory_mb"] < much["peak_memory_mb"] - 200, (
            "each cell has its own peak"
        )
    assert done.peak_memory == max(
        row["peak_memory_mb"] for row in done.record["cells"]
    )


def test_the_record_says_what_a_result_depends_on(save):
    first = run(
        save("1", parameters="n: int = 1  # a number\nseed: int = 3  # of all"), out="a"
    ).record
    assert (
        first["git"] is None
        and first["seed"] == 3
        and {"python", "torch", "bigmodel_nb"} <= set(first["versions"])
    )
    assert (
        first["notebook_hash"]
        == run("mine.ipynb", out="b", n=2).record["notebook_hash"]
    )
    assert first["notebook_hash"] != notebook_hash(
        save(
            "2",
            parameters="n: int = 1  # a number\nseed: int = 3  # of all",
            name="other.ipynb",
        )
    )
    for words in (
        ["init", "-q"],
        ["add", "mine.ipynb"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert run("mine.ipynb", out="c").record["git"] == {
        "commit": head,
        "modified": False,
    }
    save("3")
    assert run("mine.ipynb", out="d").record["git"] == {
        "commit": head,
        "modified": True,
    }
    assert run("other.ipynb", out="e").record["git"] is None, (
        "not part of the repository"
    )


LITTLE = """
import resource
held = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (held + 1_000_000_000, held + 1_000_000_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that Linux keeps")
@pytest.mark.parametrize(
    "source, exception",
    [
        ("x = bytearray(8_000_000_000)", "MemoryError"),
        ("import numpy; numpy.ones(10**9)", "MemoryError"),
        (
            "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')",
            "RuntimeError",
        ),
    ],
)
def test_want_of_memory_is_named(save, source, exception):
    short = ended(save(LITTLE, source))
    assert (
        short.status == "failed"
        and short.error["exception"] == exception
        and short.error["message"].endswith("(out of memory)")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that Linux keeps")
def test_a_kernel_that_dies_for_want_of_memory_is_named(save):
    source = (
        'import os, sys; sys.__stderr__.write("terminate called after throwing an '
        "instance of 'std::bad_alloc'\\n\"); sys.__stderr__.flush(); os.abort()"
    )
    died = ended(save(source))
    assert (
        died.status == "killed"
        and died.error["message"]
        == "cell 1: the kernel was ended by signal 6: out of memory"
    )


def test_scrapbook_reads_what_a_run_recorded(save):
    scrapbook = pytest.importorskip("scrapbook")
    done = run(
        save(
            (
                "from bigmodel_nb.kit.record import record\nrecord('loss', 0.5)\n"
                "record('sizes', [1, 2])"
            ),
            parameters="n: int = 1  # a number",
        ),
        out="out",
        n=3,
    )
    theirs = scrapbook.read_notebook(str(done.notebook))
    assert (
        theirs.scraps.data_dict == done.metrics == {"loss": 0.5, "sizes": [1, 2]}
        and theirs.parameters["n"] == 3
    )


def test_report_shows_the_picture_that_a_widget_brings_along(save):
    cell = """import ipywidgets
from bigmodel_nb.kit.plots import figure
from bigmodel_nb.kit.widgets import Explorer

def draw(height):
    made, axes = figure("A line", height=1.5)
    axes.axhline(height)
    return made, f"A line at {height}, <high>"

Explorer(draw, {"height": ipywidgets.FloatSlider(0.5, min=0.0, max=1.0)})"""
    done = run(save(cell, "ipywidgets.IntSlider(3)"), out="out")
    page = done.report.read_text(encoding="utf-8")
    (picture,) = [
        output.data["image/png"]
        for cell in nbformat.read(done.notebook, 4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.data
    ]
    assert (
        picture.strip() in page.replace("\n", "")
        and 'alt="A line at 0.5, &lt;high&gt;"' in page
    )
    assert page.count("<img") == 1 and "<script" not in page and "cdn" not in page
    assert "IntSlider(value=3)" in page, "a widget without a picture is shown as text"


def test_text_from_data_is_escaped_in_the_report(save):
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    done = run(
        save(
            new_markdown_cell("# Data"),
            "import pandas\npandas.DataFrame({'text': [text]})",
            "print(text)",
            "text",
            "from bigmodel_nb.kit.record import record\nrecord('text', text)",
            (
                "from bigmodel_nb.kit.plots import table\n"
                "table(pandas.DataFrame({'text': [text]}))"
            ),
            parameters="text: str = ''  # of the data",
        ),
        out="out",
        text=nasty,
    )
    page = done.report.read_text()
    assert (
        "<script" not in page
        and "<img src=x" not in page
        and page.count("&lt;script&gt;") >= 5
    )
    failed = run_that_fails(
        save(f"raise ValueError({nasty!r})", name="bad.ipynb"), "bad"
    )
    assert "<script" not in failed.report.read_text()


def test_a_metric_that_json_cannot_hold_fails_where_it_is_recorded(save):
    failed = ended(
        save("from bigmodel_nb.kit.record import record\nrecord('loss', float('nan'))")
    )
    assert "loss is nan, which JSON cannot hold" in failed.error["message"]


@pytest.mark.parametrize(
    "mapping, said",
    [
        ({"epsilom": 1.0}, "unknown parameter"),
        ({"n": "x"}, "n is 'x'; it needs an integer"),
        ({"n=1": 1}, "not a parameter name"),
    ],
)
def test_a_bad_request_writes_nothing(save, mapping, said):
    name = save("1", parameters="n: int = 1  # a number")
    with pytest.raises(BadRequest, match=said):
        run(name, mapping, out="out/deep")
    assert sorted(path.name for path in Path().iterdir()) == [name]


def test_a_folder_that_holds_a_run_is_left_alone(save):
    done = run(save("1"), out="out")
    before = (done.folder / "metrics.json").read_bytes()
    with pytest.raises(
        BadRequest,
        match="out is 'out', which already holds a run; allowed is a new folder",
    ):
        run("mine.ipynb", out="out")
    assert (done.folder / "metrics.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_found_before_anything_starts(save):
    name = save("1")
    Path("file").write_text("in the way")
    with pytest.raises(
        BadRequest, match="out is 'file/deep', where nothing can be written"
    ):
        run(name, out="file/deep")
    if os.geteuid() != 0:  # root writes everywhere
        Path("closed").mkdir(mode=0o500)
        with pytest.raises(BadRequest, match="where nothing can be written"):
            run(name, out="closed/out")
        assert not list(Path("closed").iterdir())


LIMITED = """
import resource, sys
sys.path.insert(0, {offline!r})
import sitecustomize
from bigmodel_nb.headless.cli import app
import bigmodel_nb.headless.run, papermill.execute, nbclient
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
app(["run", "mine.ipynb", "--out", "out"])
"""


def test_a_file_that_may_grow_no_further_fails_the_run_in_one_sentence(save):
    save("'x' * 300_000", "1")
    script = LIMITED.format(
        offline=str(Path(__file__).parent / "offline"), limit=100_000
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("bigmodel: failed: the disk is full")
        and "Traceback" not in done.stderr
    )
    record = json.loads(Path("out/metrics.json").read_text())
    assert record["status"] == "failed" and record["error"]["message"].startswith(
        "the disk is full"
    )
    assert all(json.loads(path.read_text()) for path in Path("out").glob("*.ipynb"))


def test_a_disk_that_fills_fails_the_run_in_one_sentence(save, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small disk here")
    try:
        save("'x' * 300_000", "1")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from bigmodel_nb.headless.cli import main; main()",
                "run",
                "mine.ipynb",
                "--out",
                str(disk / "out"),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert (
            done.stderr.strip().splitlines()[-1]
            == "bigmodel: failed: the disk is full: No space left on device"
        )
        assert "Traceback" not in done.stderr
        record = json.loads((disk / "out" / "metrics.json").read_text())
        assert (
            record["status"] == "failed"
            and "the disk is full" in record["error"]["message"]
        )
        for path in (disk / "out").glob("*.ipynb"):
            json.loads(path.read_text())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_runs_side_by_side_do_not_disturb_each_other(save):
    name = save(
        (
            "from bigmodel_nb.kit.record import record\nimport os\nrecord('n', n)\n"
            "record('place', os.path.basename(os.getcwd()))"
        ),
        parameters="n: int = 0  # a number",
    )
    done = {}
    threads = [
        threading.Thread(
            target=lambda n=n: done.update({n: run(name, out=f"out{n}", n=n)})
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: each.metrics for n, each in done.items()} == {
        n: {"n": n, "place": f"out{n}"} for n in range(4)
    }


def test_an_atomic_write_keeps_the_old_file_when_it_fails(workshop, monkeypatch):
    path = workshop / "record.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [each.name for each in workshop.iterdir()] == [
        "record.json"
    ]


# --- the report


def test_report_is_one_file_with_its_mathematics():
    prose = (
        "# Title & more\n\n$a^2$ and\n\n$$\\sum_i x_i$$\n\n"
        "\\begin{align}x &= 1\\end{align}\n\n```\ncode\n```\n\n| a |\n|---|\n"
        "| $b$ |"
    )
    page = to_html(
        notebook(new_markdown_cell(prose), "x = '<b>'"),
        {
            "status": "ok",
            "metrics": {},
            "parameters": {"file": "<script>alert(1)</script>"},
        },
    )
    assert page.count("<math") == 4 and "<title>Title &amp; more</title>" in page
    assert (
        "<script" not in page
        and "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
    )


def test_a_function_stands_apart_from_its_argument():
    page = to_html(
        notebook(
            new_markdown_cell(r"$\log 10$ and $\log p_y$ and $\log(x)$ and $\log_2 x$"),
            "1",
        ),
        {"status": "ok"},
    )
    assert (
        len(re.findall(r'<mi>log</mi><mspace width="0.167em"', page)) == 2
        and page.count("<mi>log</mi><mo") == 1
    )
    assert "<msub><mi>log</mi><mn>2</mn></msub>" in page


def test_report_shows_shares_with_their_interval_and_failures():
    page = to_html(
        notebook("1"),
        {
            "status": "failed",
            "error": {"message": "cell 1: <bad>"},
            "metrics": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 50}},
        },
    )
    assert "0.900 [0.800, 0.950], n = 50" in page and "cell 1: &lt;bad&gt;" in page


def test_report_keeps_a_formula_that_is_no_tex():
    assert "<code>\\frac{1}{</code>" in to_html(
        notebook(new_markdown_cell("Here: $\\frac{1}{$"))
    )


def test_report_shows_outputs_and_alternative_text():
    picture = new_output(
        "display_data",
        {"image/png": "aGVsbG8="},
        metadata={"image/png": {"alt": 'A "wave".'}},
    )
    text = new_output("execute_result", {"text/plain": "'<i>'"})
    scrap = new_output(
        "display_data",
        {"application/scrapbook.scrap.json+json": {"name": "n", "data": 1}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = to_html(notebook(new_code_cell("f()", outputs=[picture, text, scrap])))
    assert (
        'alt="A &quot;wave&quot;."' in page
        and "&lt;i&gt;" in page
        and "<details" in page
    )


# --- the command


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "turo"], "did you mean 'tour'"),
        (["show", "turo"], "did you mean 'tour'"),
        (
            ["run", "kit/record", "-p", "trows", "5"],
            "unknown parameter 'trows'; did you mean 'throws'",
        ),
        (
            ["run", "kit/record", "-p", "throws", "lots"],
            "throws is 'lots'; it needs an integer",
        ),
        (
            ["run", "kit/record", "-p", "n;print(1)#", "3"],
            "'n;print(1)#' is not a parameter name",
        ),
        (["run", "kit/record", "-p", "n=1;print(1)#"], "unknown parameter 'n'"),
        (
            ["run", "kit/record", "-p", "throws=lots"],
            "throws is 'lots'; it needs an integer",
        ),
        (
            ["run", "kit/record", "-p", "throws=5", "-p", "throws", "6"],
            "parameter 'throws' is given twice",
        ),
        (["run", "kit/record", "-p", "1x=5", "6"], "'1x=5' is not a parameter name"),
        (
            ["run", "kit/record", "-p", "budget", "fast"],
            "budget is 'fast'; allowed are 'quick', 'full'",
        ),
        (
            ["run", "kit/record", "-p", "seed", "1", "-p", "seed", "2"],
            "parameter 'seed' is given twice",
        ),
        (["run", "kit/record", "-p", "seed"], "parameter 'seed' comes without a value"),
        (
            ["run", "kit/record", "-f", "gone.yaml"],
            "file is 'gone.yaml', which cannot be read: No such file or directory",
        ),
        (
            ["run", "kit/record", "--budget", "fast"],
            "budget is 'fast'; allowed are 'quick', 'full'",
        ),
        (["sweep", "turo"], "did you mean 'tour'"),
        (
            ["sweep", "kit/record", "-g", "throws"],
            "grid is 'throws'; allowed is NAME=VALUES",
        ),
        (["sweep", "kit/record", "-g", "throws=0.1..0.5"], "has endless values"),
        (
            ["sweep", "kit/record", "-g", "throws=1,lots"],
            "throws is 'lots'; it needs an integer",
        ),
        (
            ["sweep", "kit/record", "-g", "seed=1", "-g", "seed=2"],
            "parameter 'seed' is given twice",
        ),
        (
            ["sweep", "kit/record", "--latin", "2", "--random", "2"],
            "allowed is one of them",
        ),
        (["run", "gone.ipynb"], "there is no notebook file 'gone.ipynb'"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_code_2(workshop, words, said):
    code, output = bigmodel(*words)
    assert (
        code == 2
        and said in output
        and len(output.splitlines()) == 1
        and output.startswith("bigmodel: ")
    )
    assert not list(workshop.iterdir()), "nothing written"


def test_commands_show_what_there_is(workshop):
    code, listed = bigmodel("list")
    assert code == 0 and all(name in listed for name in catalogue())
    code, shown = bigmodel("show", "kit/record")
    assert code == 0 and "-p throws 2000" in shown and "throws of the needle" in shown
    assert bigmodel()[0] in (0, 2)


def test_run_prints_metrics_and_where_the_report_is(save):
    save(
        "from bigmodel_nb.kit.record import record\nrecord('answer', n)",
        parameters="n: int = 1  # a number",
    )
    code, output = bigmodel("run", "mine.ipynb", "-p", "n", "42", "--out", "out")
    assert (
        code == 0
        and output.splitlines()[0] == "answer: 42"
        and output.splitlines()[-1] == "out/report.html"
    )
    assert bigmodel("run", "mine.ipynb", "--quiet", "--out", "quiet") == (
        0,
        "quiet/report.html",
    )


def test_papermill_does_not_call_a_known_parameter_unknown(save):
    save("pass", parameters="n: int | None = None  # a number")
    assert bigmodel(
        "run", "mine.ipynb", "-p", "n", "42", "--quiet", "--out", "out"
    ) == (0, "out/report.html")


def test_run_of_a_failing_notebook_exits_with_1(save):
    code, output = bigmodel("run", save("1 / 0"), "--out", "out")
    assert code == 1 and output.splitlines() == [
        "kept in out",
        "bigmodel: failed: cell 1: ZeroDivisionError: division by zero",
    ]


def test_lab_copies_notebooks_and_never_over_a_file(workshop):
    copied, kept = copy_notebooks(workshop / "mine")
    assert copied == len(catalogue()) + 1 and kept == 0
    mine = workshop / "mine" / "00_kit" / "01_record.ipynb"
    mine.write_text("my work")
    assert (
        copy_notebooks(workshop / "mine") == (0, copied)
        and mine.read_text() == "my work"
    )
    Path("file").write_text("in the way")
    with pytest.raises(
        BadRequest, match="folder is 'file', where notebooks cannot be written"
    ):
        copy_notebooks(Path("file"))


def test_doctor_checks_the_ground(workshop):
    found = {
        name: (finding, advice)
        for name, finding, advice in (check() for check in CHECKS)
    }
    assert {
        "Python",
        "torch",
        "torchvision",
        "GPU",
        "precision",
        "model hub",
        "MiniLM",
        "memory",
        "disk",
    } == set(found)
    assert found["model hub"][0] == "switched off by HF_HUB_OFFLINE"
    assert (
        not found["torch"][1] and not found["torchvision"][1] and not found["Python"][1]
    )


def test_doctor_advises(workshop, monkeypatch):
    import torch

    def mismatched(path):
        raise OSError("undefined symbol: torchvision::nms")

    monkeypatch.setattr(torch.ops, "load_library", mismatched)
    monkeypatch.setenv(
        "HF_HUB_OFFLINE", "0"
    )  # the hub is looked for, and the tests' network is off
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0)
    )
    code, output = bigmodel("doctor")
    assert code == 1
    for part in (
        "undefined symbol: torchvision::nms",
        "both in one command",
        "cannot be reached",
        "free some space here",
    ):
        assert part in output


def test_command_is_quick_to_ask():
    script = (
        "import sys, bigmodel_nb.headless.cli; sys.exit(bool({'torch', "
        "'transformers', 'papermill', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_parameters_come_from_a_file_and_the_command_goes_before_it(save):
    save(
        "from bigmodel_nb.kit.record import record\nrecord('all', [n, rate, name])",
        parameters="n: int = 1  # a\nrate: float = 0.5  # b\nname: str = 'x'  # c",
    )
    Path("values.yaml").write_text("n: 5\nrate: 1e-3\nname: y\n")
    code, said = bigmodel(
        "run",
        "mine.ipynb",
        "-f",
        "values.yaml",
        "-p",
        "n",
        "7",
        "--out",
        "out",
        "--json",
    )
    record = json.loads(said)
    assert (
        code == 0
        and record["metrics"] == {"all": [7, 0.001, "y"]}
        and record == json.loads(Path("out/metrics.json").read_text())
    )
    for text, why in (
        ("[1, 2]", "which holds no names with values"),
        ("a: [", "which is no YAML"),
        ("n: true", "n is 'true'; it needs an integer"),
    ):
        Path("values.yaml").write_text(text)
        code, said = bigmodel(
            "run", "mine.ipynb", "-f", "values.yaml", "--out", "other"
        )
        assert (
            code == 2
            and why in said
            and len(said.splitlines()) == 1
            and not Path("other").exists()
        )


def test_the_record_of_a_failed_run_goes_to_stdout_too(save):
    save("1 / 0")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from bigmodel_nb.headless.cli import main; main()",
            "run",
            "mine.ipynb",
            "--out",
            "out",
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and json.loads(done.stdout)["status"] == "failed"
        and "ZeroDivisionError" in done.stderr
    )
    assert "\x1b" not in done.stderr, "no colour outside a terminal"


def test_show_tells_of_a_run_how_it_ended(save):
    run(save("from bigmodel_nb.kit.record import record\nrecord('n', 3)"), out="out")
    assert bigmodel("show", "out")[1].splitlines()[:2] == ["mine.ipynb: ok", "n: 3"]
    run_that_fails(save("1 / 0"), "bad")
    assert (
        "failed, cell 1: ZeroDivisionError: division by zero"
        in bigmodel("show", "bad")[1]
    )
    record = json.loads(Path("out/metrics.json").read_text())
    Path("out/metrics.json").write_text(
        json.dumps(
            {
                **record,
                "status": "running",
                "pid": 1,
                "process_started": 0.0,
                "host": socket.gethostname(),
            }
        )
    )
    assert "its process is gone" in bigmodel("show", "out")[1]


def test_the_report_is_opened_where_asked(save, monkeypatch):
    opened = []
    monkeypatch.setattr("typer.launch", lambda address: opened.append(address))
    assert bigmodel("run", save("1"), "--out", "out", "--open")[0] == 0
    assert opened == [Path("out/report.html").absolute().as_uri()]


def test_the_command_sweeps(save):
    save(
        (
            "from bigmodel_nb.kit.record import record\nrecord('share', 1 / n)\n"
            "record('curve', [n])"
        ),
        parameters="n: int = 1  # a",
    )
    Path("grid.yaml").write_text("n: [5, 6]\n")
    code, said = bigmodel(
        "sweep", "mine.ipynb", "-f", "grid.yaml", "-g", "n=0..2", "-q"
    )
    assert code == 1 and said == "runs/mine/sweep/sweep.html", (
        "one point divides by zero"
    )
    assert Path("runs/mine/sweep/sweep.csv").read_text().count("\n") == 4
    code, said = bigmodel(
        "sweep", "mine.ipynb", "-g", "n=1..40", "--latin", "2", "--out", "drawn"
    )
    assert code == 0 and len(said.splitlines()) == 5
    assert said.splitlines()[0].endswith("2 ok") and said.splitlines()[1].split() == [
        "n",
        "share",
        "seconds",
    ], "no folder, no list that was recorded"


def test_names_are_completed():
    from bigmodel_nb.headless.cli import _names

    assert "robust/attacks" in _names("rob") and not _names("x")
    assert all(declaration(name).gpu for name in catalogue() if name != "index"), (
        "what changes on a GPU"
    )


def test_the_kernels_of_this_machine_are_those_that_jupyter_client_finds(
    workshop, monkeypatch
):
    from jupyter_client.kernelspec import KernelSpecManager

    from bigmodel_nb.headless.parameters import installed_kernels

    monkeypatch.setenv(
        "JUPYTER_PATH", str(workshop / "first") + os.pathsep + str(workshop / "second")
    )
    monkeypatch.setenv("IPYTHONDIR", str(workshop / "own"))
    for place, name, text in (
        (
            "first/kernels",
            "Mine",
            '{"argv": ["a"], "language": "R", "display_name": "a"}',
        ),
        (
            "second/kernels",
            "mine",
            '{"argv": ["a"], "language": "julia", "display_name": "a"}',
        ),
        ("second/kernels", "broken", "{"),
        ("second/kernels", "list", "[]"),
        (
            "own/kernels",
            "old",
            '{"argv": ["a"], "language": "octave", "display_name": "a"}',
        ),
    ):
        (workshop / place / name).mkdir(parents=True)
        (workshop / place / name / "kernel.json").write_text(text)
    theirs = {
        name: each["spec"]["language"].lower()
        for name, each in KernelSpecManager().get_all_specs().items()
    }
    assert (
        installed_kernels() == theirs
        and theirs["mine"] == "r"
        and theirs["old"] == "octave"
    )


def expect_parameters(m):
    assert m["let_through_here"] == 0, "each bad request is refused before a run"
    assert m["let_through_by_papermill"] == m["bad_requests"] > 0, (
        "papermill alone refuses none of them"
    )


def expect_report(m):
    assert m["addresses_fetched"] == 0 < m["addresses_fetched_by_lab_template"], (
        "a report fetches nothing, and nbconvert's page does"
    )
    assert m["formulas_translated"] == 1, "and it shows its mathematics"


def expect_run(m):
    assert m["statuses"] == ["ok", "failed", "killed"], "a record says how a run ended"
    assert abs(m["pi"] - 3.14159) < 0.15, "and what it found"


def expect_kernel(m):
    assert m["answers"] == ["3"], "a forked kernel answers"
    assert m["forked"] == kernel.can_fork(), "kernels are forked where that is possible"
    if kernel.can_fork():
        assert m["seconds_forked"] < m["seconds_ordinary"], "which is faster"
        assert m["kernel_ended_with_zygote"], "forked kernels end with their zygote"
        assert m["replaced"], "and the next request starts another one"


def expect_sweep(m):
    assert m["runs"] == 9, "a sweep is a table of runs"
    assert m["error_of_the_mean"] < 0.1, "whose mean estimates what each run estimates"
    assert m["interval_largest_difference"] < 1e-12, "with Student's interval"
    assert m["statuses"] == ["failed", "ok", "ok"], (
        "a failed run does not stop the others"
    )


def expect_cli(m):
    assert m["exit_codes"] == [0, 2, 2, 2, 2, 2], "a mistaken request ends with 2"
