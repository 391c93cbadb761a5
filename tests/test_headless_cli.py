"""What the command imports before it answers, and what it says."""

import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bigmodel_nb.headless import cli
from bigmodel_nb.headless.cli import CHECKS, app


def imported(*words, **environment):
    """The exit status of a command, its output, and the modules that it imported."""
    script = """
        import atexit, sys
        def told():
            found = [name for name in sys.modules if sys.modules[name]]
            sys.stderr.write("\\nIMPORTED " + " ".join(found))
        atexit.register(told)
        sys.argv[0] = "bigmodel"
        from bigmodel_nb.headless.cli import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    said, _, modules = done.stderr.rpartition("\nIMPORTED ")
    return done.returncode, done.stdout + said, set(modules.split())


def test_a_run_that_is_refused_has_not_imported_a_kernel(workshop):
    for words, said in (
        (["run", "turo"], "did you mean 'tour'"),
        (["run", "kit/record", "-p", "trows", "5"], "unknown parameter"),
        (["run", "kit/record", "-p", "throws", "lots"], "throws is 'lots'"),
        (["run", "gone.ipynb"], "no notebook file"),
        (["run", "kit/record", "-f", "gone.yaml"], "cannot be read"),
    ):
        code, output, modules = imported(*words)
        assert (
            code == 2
            and said in output
            and not modules
            & {"jupyter_client", "nbconvert", "torch", "bigmodel_nb.headless.run"}
        ), words


def test_doctor_imports_torch_and_no_more(workshop):
    code, output, modules = imported("doctor", HF_HUB_OFFLINE="1")
    assert (
        code in (0, 1)
        and "torch" in modules
        and not modules & {"torchvision", "torch._dynamo", "nbconvert"}
    )


def test_doctor_finds_what_is_wrong_with_torchvision(monkeypatch):
    (check,) = [each for each in CHECKS if each.__name__ == "_check_torchvision"]
    assert check()[2] == "", "it works here"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        check()[1] == "does not work: there is no torchvision"
        and "matched pair" in check()[2]
    )


def test_doctor_does_not_wait_for_a_network_that_does_not_answer(monkeypatch):
    import threading

    monkeypatch.setattr(cli, "_check_hub", lambda: threading.Event().wait())
    monkeypatch.setattr(cli, "CHECKS", [*CHECKS[:1], cli._check_hub])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "cannot be reached" in result.output


def test_a_metric_has_three_digits_on_the_terminal_and_all_in_the_file(workshop):
    import json
    from pathlib import Path

    import nbformat

    source = (
        "from bigmodel_nb.kit.record import record\n"
        "record('curve', [step / 7 for step in range(40)])\n"
        "record('share', {'value': 1 / 3, 'low': 0.25, 'high': 0.4, 'n': 9})"
    )
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]),
        "mine.ipynb",
    )
    result = CliRunner().invoke(app, ["run", "mine.ipynb", "--out", "out"])
    assert result.output.splitlines()[:2] == [
        "curve: 40 values: 0, 0.143, 0.286 … 5.57",
        "share: 0.333 [0.250, 0.400], n = 9",
    ]
    assert (
        json.loads(Path("out/metrics.json").read_text())["metrics"]["curve"][1] == 1 / 7
    )


def test_lab_gives_its_kernels_the_environment_of_runs(workshop, monkeypatch):
    started = {}
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **options: (
            started.update(options, command=command)
            or subprocess.CompletedProcess(command, 0)
        ),
    )
    assert CliRunner().invoke(app, ["lab", "mine", "--no-browser"]).exit_code == 0
    assert (
        started["env"]["GOMP_SPINCOUNT"] == "1000"
        and started["env"]["PATH"] == os.environ["PATH"]
        and started["command"][-1] == "--no-browser"
    )
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    CliRunner().invoke(app, ["lab", "mine"])
    assert started["env"]["GOMP_SPINCOUNT"] == "5"


BAD_CELL = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
        {
            "cell_type": "code",
            "source": "x: int = = 3",
            "metadata": {"tags": ["parameters"]},
            "outputs": [],
            "id": "a",
        }
    ],
}
OF_R = {
    "nbformat": 4,
    "cells": [],
    "metadata": {"kernelspec": {"name": "nonesuch", "language": "R"}},
}


@pytest.mark.parametrize(
    "notebook, words, said",
    [
        (BAD_CELL, [], "the parameters cell is no Python"),
        (
            OF_R,
            [],
            (
                "the notebook needs the kernel 'nonesuch', "
                "which is not installed here; installed are python3"
            ),
        ),
        (
            {"nbformat": 4, "cells": [], "metadata": 3},
            ["--out", "/proc/nothing"],
            "out is '/proc/nothing', where nothing can be written",
        ),
        ([], [], "'odd.ipynb' cannot be read as a notebook: ValueError"),
        (
            {"nbformat": 4, "cells": [], "metadata": {}},
            ["--out", "odd.ipynb"],
            "out is 'odd.ipynb', where nothing can be written: File exists",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_without_the_libraries_of_runs(
    workshop, notebook, words, said
):
    import json

    (workshop / "odd.ipynb").write_text(json.dumps(notebook))
    code, output, modules = imported("run", "odd.ipynb", *words)
    assert (
        code == 2
        and said in output
        and output.count("\n") == 1
        and not modules & {*HEAVY, "bigmodel_nb.headless.run"}
    )
    assert [path.name for path in workshop.iterdir()] == ["odd.ipynb"]


HEAVY = {
    "nbformat",
    "jsonschema",
    "rfc3987_syntax",
    "nbconvert",
    "nbclient",
    "jupyter_client",
    "papermill",
    "IPython",
    "torch",
    "torchvision",
    "transformers",
    "pandas",
    "matplotlib",
    "distributed",
    "dask",
    "scipy",
}


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--help"], 0, "Usage"),
        (["run", "--help"], 0, "--timeout"),
        (["list"], 0, "robust/attacks"),
        (["show", "kit/record"], 0, "-p throws 2000"),
        (["show", "turo"], 2, "did you mean 'tour'"),
        (["run", "turo"], 2, "did you mean 'tour'"),
        (["run", "kit/record", "-p", "trows", "5"], 2, "unknown parameter"),
        (["run", "kit/record", "-p", "throws", "lots"], 2, "throws is 'lots'"),
        (["run", "kit/record", "-f", "gone.yaml"], 2, "cannot be read"),
        (["sweep", "turo"], 2, "did you mean 'tour'"),
        (["sweep", "kit/record", "-g", "throws"], 2, "allowed is NAME=VALUES"),
        (["sweep", "kit/record", "-g", "trows=1"], 2, "unknown parameter"),
        (["sweep", "kit/record", "-g", "throws=1,lots"], 2, "throws is 'lots'"),
        (["sweep", "kit/record", "-g", "throws=0.1..0.5"], 2, ""),
    ],
)
def test_an_answer_without_a_kernel_imports_nothing_heavy(workshop, words, code, said):
    ended, output, modules = imported(*words)
    assert ended == code and said in output and not modules & HEAVY
    assert not list(workshop.iterdir())


def test_completion_imports_nothing_heavy(workshop):
    ended, output, modules = imported(
        _BIGMODEL_COMPLETE="complete_bash",
        COMP_WORDS="bigmodel show rob",
        COMP_CWORD="2",
    )
    assert "robust/attacks" in output and not modules & HEAVY


def test_a_run_is_shown_without_the_libraries_of_its_report(workshop):
    (workshop / "out").mkdir()
    (workshop / "out" / "metrics.json").write_text(
        '{"status": "ok", "metrics": {"n": 3}, "parameters": {}, "notebook": "mine"}'
    )
    ended, output, modules = imported("show", "out")
    assert ended == 0 and "n: 3" in output and not modules & HEAVY


def test_the_report_of_a_run_holds_the_pictures_beside_the_notebook(workshop):
    import base64

    import nbformat

    png = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60"
        "e6kgAAAABJRU5ErkJggg=="
    )
    (workshop / "course" / "figures").mkdir(parents=True)
    (workshop / "course" / "figures" / "a.png").write_bytes(base64.b64decode(png))
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell("![a](figures/a.png)")]
        ),
        "course/mine.ipynb",
    )
    assert (
        CliRunner().invoke(app, ["run", "course/mine.ipynb", "--out", "out"]).exit_code
        == 0
    )
    assert (
        f'src="data:image/png;base64,{png}"'
        in (workshop / "out" / "report.html").read_text()
    )


def write(name, *sources, **metadata):
    import nbformat

    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(each) for each in sources],
            metadata=metadata,
        ),
        name,
    )


def test_the_report_of_a_run_holds_the_pictures_that_the_run_wrote(workshop):

    png = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60"
        "e6kgAAAABJRU5ErkJggg=="
    )
    write(
        "mine.ipynb",
        (
            "import base64, pathlib\nfrom IPython.display import HTML, Image, "
            "JSON, Markdown\npathlib.Path('s.png')"
            f".write_bytes(base64.b64decode('{png}'))"
        ),
        "HTML('<img src=\"s.png\">')",
        "Markdown('![](s.png)')",
        "Image(url='s.png')",
        "JSON({'a': [1]})",
    )
    assert CliRunner().invoke(app, ["run", "mine.ipynb", "-o", "out"]).exit_code == 0
    report = (workshop / "out" / "report.html").read_text()
    assert (
        report.count(f'src="data:image/png;base64,{png}"') == 3
        and "not found" not in report
        and "IPython.core" not in report
    )


def test_a_terminal_of_another_encoding_costs_no_result(workshop):
    write(
        "mine.ipynb",
        (
            "from bigmodel_nb.kit.record import record\n"
            "record('mood', '\N{GRINNING FACE} ?')\nrecord('n', 3)"
        ),
    )
    ended, output, _ = imported(
        "run", "mine.ipynb", "--out", "out", PYTHONIOENCODING="latin-1"
    )
    assert ended == 0 and r'mood: "\U0001f600 ' in output and "n: 3" in output
    for words, code in (
        (["show", "out"], 0),
        (["show", "out", "\N{GRINNING FACE}"], 2),
        (["run", "\N{GRINNING FACE}.ipynb"], 2),
    ):
        ended, output, _ = imported(*words, PYTHONIOENCODING="latin-1")
        assert ended == code and "Traceback" not in output and r"\U0001f600" in output


RUN = {
    "status": "ok",
    "metrics": {"n": 3},
    "parameters": {"lr": 0.1, "model": None},
    "unknown": ["clock"],
    "notes": ["the kernel of another Python: <3.14>"],
    "notebook": "mine",
    "seconds": 2.0,
    "peak_memory_mb": 90.0,
}


def test_a_run_is_shown_with_its_notes_and_what_is_not_known(workshop):
    import json

    (workshop / "out").mkdir()
    (workshop / "out" / "metrics.json").write_text(json.dumps(RUN))
    result = CliRunner().invoke(app, ["show", "out"])
    assert result.exit_code == 0 and result.output.splitlines() == [
        "mine: ok",
        "  -p lr 0.1",
        "  -p model null",
        "n: 3",
        "not known: the values of clock",
        "note: the kernel of another Python: <3.14>",
        "2 s, 90 MB",
        "out",
    ]


def test_a_run_says_none_and_not_known_apart(workshop):
    import nbformat

    source = (
        "model: str | None = None  # a model\nlr: float = 0.1  # the step\n"
        "clock: float = __import__('time').time()  # since 1970"
    )
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    for name, cells in {
        "known": [cell],
        "unknown": [
            nbformat.v4.new_code_cell(
                source + "\ndel clock", metadata={"tags": ["parameters"]}
            )
        ],
    }.items():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), f"{name}.ipynb")
        assert (
            CliRunner().invoke(app, ["run", f"{name}.ipynb", "--out", name]).exit_code
            == 0
        )
        shown = CliRunner().invoke(app, ["show", name]).output.splitlines()
        assert "  -p model null" in shown and "  -p lr 0.1" in shown
        assert any(line.startswith("  -p clock 1") for line in shown) == (
            name == "known"
        )
        assert ("not known: the values of clock" in shown) == (name == "unknown"), (
            "None is a value, and said above"
        )


def test_doctor_answers_where_the_current_folder_is_gone(tmp_path):
    gone = tmp_path / "gone"
    script = (
        f"import os, sys; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); "
        f"os.rmdir({str(gone)!r}); sys.argv = ['bigmodel', *sys.argv[1:]]; "
        "from bigmodel_nb.headless.cli import main; main()"
    )
    place = os.path.dirname(os.path.dirname(cli.__file__))
    for words in (
        ["doctor"],
        ["list"],
        ["run", "kit/record"],
        ["sweep", "kit/record", "-g", "throws=1"],
        ["show", "kit/record"],
        ["lab", "--no-browser"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.path.dirname(place),
            },
        )
        assert "Traceback" not in done.stderr, words
        if words[0] in ("run", "sweep", "lab"):
            assert (
                done.returncode == 2
                and done.stderr.count("\n") == 1
                and "current folder" in done.stderr
            )
        if words[0] == "doctor":
            assert (
                done.returncode == 2
                and done.stderr.count("\n") == 1
                and "the current folder is gone" in done.stderr
            )


def test_a_folder_that_cannot_be_a_runs_and_a_file_that_is_no_notebook_are_refused(
    workshop,
):
    (workshop / "out").mkdir()
    (workshop / "out" / "metrics.json").write_text("{}")
    (workshop / "broken.ipynb").write_text("{")
    for words, said in (
        (["kit/record", "--out", "out"], "already holds a run"),
        (["kit/record", "--out", "broken.ipynb"], "File exists"),
        (["kit/record", "--out", "broken.ipynb/x"], "Not a directory"),
        (["broken.ipynb"], "cannot be read as a notebook: JSONDecodeError"),
    ):
        code, output, modules = imported("run", *words)
        assert code == 2 and said in output and not modules & HEAVY, words


def test_the_command_and_a_run_refuse_a_folder_in_the_same_words(workshop):
    from bigmodel_nb.headless.parameters import BadRequest
    from bigmodel_nb.headless.run import run

    write("mine.ipynb", "1")
    (workshop / "taken").mkdir()
    (workshop / "taken" / "metrics.json").write_text("{}")
    for out in (
        "taken",
        "mine.ipynb",
        "mine.ipynb/x",
        "/proc/nothing",
        "~nobody-of-that-name/x",
    ):
        with pytest.raises(BadRequest) as refused:
            run("mine.ipynb", out=out)
        result = CliRunner().invoke(app, ["run", "mine.ipynb", "--out", out])
        assert result.exit_code == 2 and result.output == f"bigmodel: {refused.value}\n"


def test_without_a_folder_of_its_own_a_run_needs_only_a_place_for_one(workshop):
    write("mine.ipynb", "1")
    (workshop / "runs").mkdir()
    (workshop / "runs" / "metrics.json").write_text("{}")
    cli._refuse("mine.ipynb", {}, None)
    (workshop / "runs" / "metrics.json").unlink()
    (workshop / "runs").rmdir()
    (workshop / "runs").touch()
    result = CliRunner().invoke(app, ["run", "mine.ipynb"])
    assert result.exit_code == 2 and result.output == (
        "bigmodel: out is 'runs/NAME/TIME', where nothing can be written: "
        "Not a directory\n"
    )


@pytest.mark.parametrize(
    "words, given",
    [
        (["-p", "data", "a=b"], {"data": "a=b"}),
        (["-p", "data=x.csv"], {"data": "x.csv"}),
        (["-p", "data=a=b=c", "--parameter", "n", "3"], {"data": "a=b=c", "n": "3"}),
        (["-p", "n=3", "-q", "-p", "data", "-x"], {"n": "3", "data": "-x"}),
        (["-p", "data="], {"data": ""}),
        (["-p", "data=a b", "-pn=3"], {"data": "a b", "n": "3"}),
        (["--parameter=data=x", "-p", "n", "=3"], {"data": "x", "n": "=3"}),
    ],
)
def test_a_parameter_is_given_in_two_words_or_in_one(monkeypatch, words, given):
    asked = []
    monkeypatch.setattr(
        cli,
        "_refuse",
        lambda name, values, out: (
            asked.append((name, values)) or cli._fail("enough", 7)
        ),
    )
    for line in (["mine.ipynb", *words], [*words, "mine.ipynb"]):
        assert CliRunner().invoke(app, ["run", *line]).exit_code == 7
    assert asked == [("mine.ipynb", given)] * 2


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.sampled_from(["data", "n", "größe"]),
        st.tuples(
            st.text(
                st.characters(exclude_characters="\x1f", codec="utf-8"), max_size=6
            ),
            st.booleans(),
        ),
        max_size=3,
    )
)
def test_a_value_arrives_whole_in_either_form(monkeypatch, values):
    asked = []
    monkeypatch.setattr(
        cli,
        "_refuse",
        lambda name, values, out: asked.append(values) or cli._fail("enough", 7),
    )
    words = [
        word
        for name, (text, one) in values.items()
        for word in (["-p", f"{name}={text}"] if one else ["-p", name, text])
    ]
    assert CliRunner().invoke(
        app, ["run", "mine.ipynb", *words]
    ).exit_code == 7 and asked[-1] == {name: text for name, (text, _) in values.items()}


def swept(
    workshop,
    *rows,
    metrics=("acc", "loss_low"),
    swept=("hidden",),
    ends=("acc_low", "acc_high"),
):
    """The folder of a sweep with such a table."""
    import csv
    import json

    (workshop / "sw").mkdir()
    with open(workshop / "sw" / "sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (workshop / "sw" / "sweep.json").write_text(
        json.dumps({"title": "Mine", "swept": swept, "metrics": metrics, "ends": ends})
    )


ROW = {
    "hidden": "[64]",
    "budget": "quick",
    "acc": "0.512345",
    "acc_low": "0.4",
    "acc_high": "0.6",
    "loss_low": "0.125",
    "status": "ok",
    "seconds": "2.0",
    "error": "",
    "folder": "a",
}
LONG = "cell 3 (The data): ValueError: " + "a long sentence " * 12


def test_the_table_of_a_sweep_shows_what_was_varied_and_what_differs(workshop):
    swept(
        workshop,
        ROW,
        {**ROW, "hidden": "[64, 128]", "loss_low": "0.25", "seconds": "3.5"},
        {
            **ROW,
            "hidden": "[]",
            "status": "failed",
            "error": LONG,
            "acc": "",
            "loss_low": "",
        },
    )
    result = CliRunner().invoke(app, ["show", "sw"])
    lines = result.output.splitlines()
    assert (
        result.exit_code == 0
        and lines[0] == "Mine: 2 ok, 1 failed"
        and lines[-1] == "sw/sweep.html"
    )
    assert lines[1].split() == [
        "hidden",
        "acc",
        "loss_low",
        "seconds",
        "status",
    ] and lines[3].split() == ["[64,", "128]", "0.512", "0.25", "3.5", "ok"]
    assert f"hidden []: failed, {LONG}" in lines, "whole, however long"


def test_the_table_of_a_sweep_says_once_what_is_alike_in_all_runs(workshop):
    swept(workshop, ROW, {**ROW, "hidden": "[128]"})
    lines = CliRunner().invoke(app, ["show", "sw"]).output.splitlines()
    assert lines[1].split() == ["hidden", "seconds"], "what it cost is always said"
    assert lines[4] == "in all runs: acc 0.512, loss_low 0.125"


def test_a_wide_table_is_continued_below_with_what_was_varied(workshop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    many = {f"a_long_metric_{place}": str(place / 7) for place in range(5)}
    swept(
        workshop,
        {**many, **ROW},
        {**dict.fromkeys(many, "2.5"), **ROW, "hidden": "[1]"},
        metrics=list(many),
    )
    lines = CliRunner().invoke(app, ["show", "sw"]).output.splitlines()
    heads = [line.split() for line in lines if "hidden" in line]
    assert (
        len(heads) > 1
        and all(head[0] == "hidden" for head in heads)
        and {name for head in heads for name in head[1:]} == {*many, "seconds"}
        and max(map(len, lines[:-2])) <= 40
    )


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "\0", "status\n", "status,error\nok\n"]
)
def test_a_folder_whose_table_is_none_is_refused_in_one_line(workshop, text):
    (workshop / "sw").mkdir()
    (workshop / "sw" / "sweep.csv").write_text(text)
    result = CliRunner().invoke(app, ["show", "sw"])
    assert (
        result.exit_code == 2
        and result.output.startswith(
            "bigmodel: folder is 'sw', whose table cannot be read: "
        )
        and result.output.count("\n") == 1
    )


def test_a_folder_that_holds_nothing_is_not_an_unknown_notebook(workshop):
    (workshop / "runs").mkdir()
    result = CliRunner().invoke(app, ["show", "runs"])
    assert (
        result.exit_code == 2
        and "allowed is that of a run or a sweep" in result.output
        and "tour" not in result.output
    )


JUPYTER = """
import os, signal, sys, time
def asked(*_):
    time.sleep(1)  # the reader thinks about the question
    print("kernels are shut down", flush=True)
    sys.exit(5)
signal.signal(signal.SIGINT, asked)
os.kill(os.getppid(), signal.SIGINT)  # a terminal sends it to both
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_ctrl_c_is_for_jupyterlab_to_answer_while_it_runs(workshop):
    (workshop / "jupyter.py").write_text(JUPYTER)
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, "
        "signal.default_int_handler); sys.argv = ['bigmodel', 'lab', 'there']; "
        "from bigmodel_nb.headless.cli import main; main()"
    )
    path = os.pathsep.join(
        [str(workshop), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (
        5,
        "kernels are shut down",
        "",
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize(
    "words",
    [["run", "kit/record"], ["sweep", "kit/record", "-g", "throws=1,2"], ["doctor"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("where", ["typer", "numpy", "torch", "jupyter_client"])
def test_ctrl_c_is_answered_in_one_line_whenever_it_comes(workshop, words, where):
    """The signal comes while a library is imported, if the command imports it."""
    script = f"""
        import os, signal, sys
        # as a terminal starts it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Strike:
            def find_spec(self, name, path=None, target=None):
                if name == {where!r}:
                    sys.stderr.write("struck ")
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Strike())
        sys.argv[0] = "bigmodel"
        from bigmodel_nb.headless.cli import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if "struck" in done.stderr:
        assert (
            done.returncode == 130
            and done.stderr == "struck bigmodel: interrupted\n"
            and not done.stdout
        )
    else:
        assert where in ("torch", "jupyter_client")


def test_the_terminal_says_the_whole_verdict(workshop):
    import nbformat

    said = "No gain is shown: " + "+4.2 points on 120 rows, " * 8
    source = (
        f"from bigmodel_nb.kit.record import record\nrecord('verdict', {said!r})\n"
        f"record('other', {said!r})"
    )
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]),
        "mine.ipynb",
    )
    lines = (
        CliRunner()
        .invoke(app, ["run", "mine.ipynb", "--out", "out"])
        .output.splitlines()
    )
    assert lines[0] == f"verdict: {said}" and lines[1].endswith("…")
