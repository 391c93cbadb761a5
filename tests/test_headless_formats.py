"""Chapter 10: notebooks of every year and tool run or fail as they do in JupyterLab."""

import json
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.cli import app
from bigmodel_nb.headless.parameters import BadRequest
from bigmodel_nb.headless.run import RunFailed, run

PYTHON = {"display_name": "Python 3", "language": "python", "name": "python3"}
INFO = {
    "name": "python",
    "version": "3.6.8",
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
STREAM = {
    "name": "stdout",
    "output_type": "stream",
    "text": ["stored by an earlier run\n"],
}
RESULT = {
    "data": {"text/plain": ["41"]},
    "execution_count": 7,
    "metadata": {},
    "output_type": "execute_result",
}


def code(source, **more):
    return {
        "cell_type": "code",
        "execution_count": 7,
        "metadata": {},
        "outputs": [STREAM, RESULT],
        "source": source,
        **more,
    }


def prose(source, **more):
    return {"cell_type": "markdown", "metadata": {}, "source": source, **more}


ANSWER = ["answer = 6 * 7\n", "answer"]
FILES = {
    "4.0, classic": dict(
        nbformat_minor=0,
        metadata={
            "kernelspec": {**PYTHON, "name": "python2"},
            "language_info": INFO,
            "signature": "sha256:0",
            "trusted": True,
        },
        cells=[
            prose(["# Title\n", "text"], metadata={"collapsed": True}),
            code(
                ANSWER, metadata={"collapsed": False, "scrolled": True, "trusted": True}
            ),
        ],
    ),
    "4.1, attachments": dict(
        nbformat_minor=1,
        metadata={"kernelspec": PYTHON},
        cells=[
            prose(
                "![x](attachment:x.png)",
                attachments={"x.png": {"image/png": "iVBORw0KGgo="}},
            ),
            code(ANSWER),
        ],
    ),
    "4.2, Colab": dict(
        nbformat_minor=0,
        metadata={
            "accelerator": "GPU",
            "colab": {"provenance": [], "gpuType": "T4"},
            "kernelspec": {"display_name": "Python 3", "name": "python3"},
            "widgets": {
                "application/vnd.jupyter.widget-state+json": {
                    "ab": {"model_module": "@jupyter-widgets/controls"}
                }
            },
        },
        cells=[
            code(
                [
                    '#@title Form { run: "auto" }\n',
                    'n = 6 #@param {type:"slider"}\n',
                    "answer = n * 7\n",
                    "answer",
                ],
                metadata={
                    "id": "xY-1",
                    "colab": {"base_uri": "https://localhost:8080/"},
                    "outputId": "a-b",
                    "cellView": "form",
                },
            )
        ],
    ),
    "4.2, Kaggle": dict(
        nbformat_minor=1,
        metadata={
            "kernelspec": PYTHON,
            "language_info": INFO,
            "kaggle": {"accelerator": "none", "dataSources": []},
        },
        cells=[
            code(
                ANSWER,
                metadata={
                    "_uuid": "8f2839f",
                    "_cell_guid": "b1076dfc",
                    "execution": {"iopub.execute_input": "2023-01-01T00:00:00Z"},
                    "trusted": True,
                },
            )
        ],
    ),
    "4.2, VS Code": dict(
        nbformat_minor=2,
        metadata={
            "language_info": {"name": "python"},
            "orig_nbformat": 4,
            "vscode": {"interpreter": {"hash": "0"}},
        },
        cells=[
            prose(["text"]),
            code(ANSWER, metadata={"vscode": {"languageId": "python"}}),
        ],
    ),
    "4.4, no kernelspec": dict(nbformat_minor=4, metadata={}, cells=[code(ANSWER)]),
    "4.4, a kernelspec without a name": dict(
        nbformat_minor=4,
        metadata={"kernelspec": {"display_name": "Python 3"}},
        cells=[code(ANSWER)],
    ),
    "4.4, Databricks": dict(
        nbformat_minor=0,
        metadata={
            "application/vnd.databricks.v1+notebook": {
                "language": "python",
                "widgets": {},
            }
        },
        cells=[
            code(
                ANSWER,
                metadata={
                    "application/vnd.databricks.v1+cell": {
                        "cellMetadata": {},
                        "inputWidgets": {},
                        "nuid": "0",
                        "showTitle": False,
                        "title": "",
                    }
                },
            )
        ],
    ),
    "4.5, JupyterLab": dict(
        nbformat_minor=5,
        metadata={
            "kernelspec": {**PYTHON, "display_name": "Python 3 (ipykernel)"},
            "language_info": INFO,
        },
        cells=[
            prose(
                "# A",
                id="0f",
                metadata={
                    "jp-MarkdownHeadingCollapsed": True,
                    "editable": True,
                    "slideshow": {"slide_type": ""},
                },
            ),
            code(ANSWER, id="1f", metadata={"scrolled": True}),
        ],
    ),
    "4.5, no ids": dict(
        nbformat_minor=5,
        metadata={"kernelspec": PYTHON},
        cells=[code(ANSWER), prose("x")],
    ),
    "4.5, ids twice": dict(
        nbformat_minor=5,
        metadata={"kernelspec": PYTHON},
        cells=[code(ANSWER, id="a"), prose("x", id="a")],
    ),
    "4.5, nbdev": dict(
        nbformat_minor=4,
        metadata={
            "kernelspec": {
                "display_name": "python3",
                "language": "python",
                "name": "python3",
            }
        },
        cells=[code(["#| export\n", *ANSWER], execution_count=None, outputs=[])],
    ),
    "4.5, marimo": dict(
        nbformat_minor=5,
        metadata={"marimo": {"app_config": {}}},
        cells=[
            code(
                "answer = 6 * 7\nanswer",
                id="Hbol",
                outputs=[],
                metadata={"marimo": {"config": {}}},
            )
        ],
    ),
    "4.9, of the future": dict(
        nbformat_minor=9,
        metadata={"kernelspec": PYTHON},
        cells=[code(ANSWER, id="a", future={"a": 1})],
        more={"b": 2},
    ),
    "no outputs, no counts": dict(
        nbformat_minor=4,
        metadata={},
        cells=[{"cell_type": "code", "source": ANSWER, "metadata": {}}],
    ),
    "no metadata of cells": dict(
        nbformat_minor=4, metadata={}, cells=[{"cell_type": "code", "source": ANSWER}]
    ),
    "raw cells": dict(
        nbformat_minor=4,
        metadata={},
        cells=[
            {
                "cell_type": "raw",
                "metadata": {"format": "text/restructuredtext"},
                "source": [":a: b"],
            },
            code(ANSWER),
        ],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def zygote():
    """Kernels are forked where they may be: it saves seconds each."""
    return kernel.warm() if kernel.can_fork() else None


def write(content, name="mine.ipynb", **options):
    Path(name).write_bytes(
        json.dumps({"nbformat": 4, **content}, ensure_ascii=False, **options).encode()
    )
    return name


def cells(*sources, **metadata):
    return dict(
        nbformat_minor=4,
        metadata={"kernelspec": PYTHON, **metadata},
        cells=[code(source, outputs=[]) for source in sources],
    )


def outputs(done, index):
    return nbformat.read(done.notebook, 4).cells[index].outputs


def assert_whole(done):
    """What a run leaves is valid in the newest form, and its report could be made."""
    executed = nbformat.read(done.notebook, 4)
    assert (executed.nbformat, executed.nbformat_minor) == (4, 5)
    nbformat.validate(executed)
    assert (
        not [note for note in done.record["notes"] if "report" in note]
        and "stored by an earlier run" not in done.report.read_text()
    )
    return executed


@pytest.mark.parametrize("name", FILES)
def test_a_notebook_of_another_tool_runs(workshop, name, capfd):
    done = run(write(FILES[name]), out="out")
    executed = assert_whole(done)
    (result,) = [
        output.data["text/plain"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
    ]
    assert (
        result == "42"
        and executed.metadata.kernelspec.name == "python3"
        and executed.metadata.language_info.version.startswith("3.")
    )
    assert capfd.readouterr().err == "", "nothing on the terminal"


@pytest.mark.parametrize("minor", range(6))
@pytest.mark.parametrize(
    "name",
    [
        "4.1, attachments",
        "4.2, Colab",
        "4.4, a kernelspec without a name",
        "4.5, JupyterLab",
        "no metadata of cells",
    ],
)
def test_each_minor_format_runs_with_what_belongs_to_any_other(workshop, name, minor):
    """Tools write attachments, ids and states of widgets under any minor version."""
    executed = assert_whole(
        run(write({**FILES[name], "nbformat_minor": minor}), out="out")
    )
    assert (
        executed.cells[-1].outputs[0].data["text/plain"] == "42"
        and "widgets" not in executed.metadata
        and all(cell.id for cell in executed.cells)
    )


def test_a_file_with_a_byte_order_mark_and_windows_lines(workshop):
    name = write(FILES["4.5, JupyterLab"], indent=1)
    Path(name).write_bytes(
        b"\xef\xbb\xbf" + Path(name).read_bytes().replace(b"\n", b"\r\n")
    )
    assert run(name, out="out").status == "ok"


OLD = {
    "metadata": {"name": "old"},
    "nbformat": 3,
    "nbformat_minor": 0,
    "worksheets": [
        {
            "metadata": {},
            "cells": [
                {"cell_type": "heading", "level": 1, "metadata": {}, "source": ["Old"]},
                {
                    "cell_type": "code",
                    "collapsed": False,
                    "input": ["answer = 6 * 7\n", "answer"],
                    "language": "python",
                    "metadata": {},
                    "prompt_number": 3,
                    "outputs": [
                        {
                            "output_type": "pyout",
                            "prompt_number": 3,
                            "metadata": {},
                            "text": ["41"],
                        }
                    ],
                },
            ],
        }
    ],
}


def test_format_3_is_upgraded_and_the_record_says_so(workshop):
    done = run(write(OLD), out="out")
    assert (
        outputs(done, 1)[0].data["text/plain"] == "42"
        and "the file is of format 3, and was read as format 4" in done.record["notes"]
    )
    assert_whole(done)


@pytest.mark.parametrize("version", [5, 99, "4", None, -1])
def test_a_format_that_nobody_knows_is_refused_in_a_sentence(workshop, version):
    with pytest.raises(
        BadRequest, match="'mine.ipynb' cannot be read as a notebook: "
    ) as refused:
        run(write({**FILES["4.4, no kernelspec"], "nbformat": version}), out="out")
    assert "\n" not in str(refused.value) and not Path("out").exists()


def test_magics(workshop):
    done = run(
        write(
            cells(
                "%matplotlib inline\n%load_ext autoreload\n%autoreload 2",
                "%%capture caught\nprint('hidden')",
                "!echo shell",
                "%%bash\necho script",
                "%%html\n<b>bold</b>",
                (
                    "print(caught.stdout.strip()); files = !ls\n"
                    "print(type(files).__name__)"
                ),
                "%%writefile written.txt\nword",
                "%timeit -n1 -r1 pass",
                "x = 3\n%who_ls",
                "print?",
                "%%javascript\nalert(1)",
                "await __import__('asyncio').sleep(0)",
                "%cd -q .\n%pwd",
            )
        ),
        out="out",
    )
    text = [
        "".join(
            str(output.get("text") or output.data.get("text/plain", ""))
            for output in outputs(done, index)
        )
        for index in range(13)
    ]
    assert (
        text[2].strip() == "shell"
        and text[3].strip() == "script"
        and text[5] == "hidden\nSList\n"
        and "per loop" in text[7]
        and "x" in text[8]
    )
    assert (
        outputs(done, 4)[0].data["text/html"] == "<b>bold</b>\n"
        and Path("out/written.txt").read_text() == "word\n"
    )
    assert_whole(done)


def test_displays_are_updated_where_they_stand(workshop):
    done = run(
        write(
            cells(
                (
                    "from IPython.display import HTML, clear_output, display, "
                    "update_display\nhandle = display('first', display_id='here')\n"
                    "display('again', display_id='here')\nprint('a')"
                ),
                "handle.update('second')",
                "update_display(HTML('<i>third</i>'), display_id='here')",
                "print('gone'); clear_output(wait=True); print('stays')",
                "print('gone'); clear_output(); display('shown')",
                (
                    "class Own:\n    def _repr_mimebundle_(self, **_): "
                    "return {'text/plain': 'own', 'application/x+json': {'a': 1}}\n"
                    "Own()"
                ),
            )
        ),
        out="out",
    )
    first = outputs(done, 0)
    assert [output.data.get("text/html") for output in first[:2]] == [
        "<i>third</i>"
    ] * 2 and first[2].text == "a\n"
    assert [output.text for output in outputs(done, 3)] == ["stays\n"] and [
        output.data["text/plain"] for output in outputs(done, 4)
    ] == ["'shown'"]
    assert outputs(done, 5)[0].data["application/x+json"] == {"a": 1}
    assert_whole(done)


def test_figures_as_svg_and_as_they_come(workshop):
    done = run(
        write(
            cells(
                (
                    "%config InlineBackend.figure_formats = ['svg']\n"
                    "import matplotlib.pyplot as plt\nplt.plot([1, 2])"
                ),
                (
                    "from IPython.display import SVG\n"
                    "SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')"
                ),
                "fig, ax = plt.subplots()\nax.set_title('größer')\nfig",
            )
        ),
        out="out",
    )
    kinds = [
        {kind for output in outputs(done, index) for kind in output.data}
        for index in range(3)
    ]
    assert (
        all("image/svg+xml" in each for each in kinds)
        and "svg" in done.report.read_text()
    )
    assert_whole(done)


def test_widgets_of_all_kinds(workshop):
    done = run(
        write(
            cells(
                (
                    "import ipywidgets as w\nfrom IPython.display import display\n"
                    "out = w.Output()\nwith out:\n    print('inside')\nout"
                ),
                "w.interact(lambda n: n, n=3);",
                (
                    "box = w.VBox([w.Text('été'), w.Button()])\ndisplay(box)\n"
                    "box.children[0].value = 'other'"
                ),
                "gone = w.IntSlider()\ndisplay(gone)\ngone.close()",
            )
        ),
        out="out",
    )
    executed = assert_whole(done)
    assert [output.get("text") for output in executed.cells[0].outputs] == [
        "inside\n"
    ] and executed.cells[1].outputs[-1].data["text/plain"] == "3"
    assert "widgets" not in executed.metadata and executed.cells[3].outputs == [], (
        "what is closed has left the page"
    )


NAMES = [
    "größe.ipynb",
    "день.ipynb",
    "my notebook (copy).ipynb",
    "日本語/ノート.ipynb",
    "a'b\"c.ipynb",
    "{n}.ipynb",
    "u\u0308.ipynb",
    "🚀.ipynb",
    "%20.ipynb",
    "-p.ipynb",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_in_any_script(workshop, name):
    Path(name).parent.mkdir(exist_ok=True)
    content = cells(
        "größe: float = 1.0  # Maß",
        (
            "from pathlib import Path\n"
            "Path('größe.txt').write_text(str(größe), encoding='utf-8')"
        ),
    )
    content["cells"][0]["metadata"] = {"tags": ["parameters"]}
    done = run(write(content, name), größe=2.5)
    assert (
        done.parameters == {"größe": 2.5}
        and (done.folder / "größe.txt").read_text(encoding="utf-8") == "2.5"
    )
    assert (
        done.folder.is_relative_to(Path("runs").absolute() / Path(name).with_suffix(""))
        and done.record["notebook"] == name
    )
    said = CliRunner().invoke(
        app, ["run", "--out", "out", "-p", "größe", "3", "--", name]
    )
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "print 'Python 2'",
            "cell 1: SyntaxError: Missing parentheses in call to 'print'",
        ),
        (
            "import nothing_of_this_name",
            "cell 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        (
            "%no_such_magic",
            "cell 1: UsageError: Line magic function `%no_such_magic` not found",
        ),
        ("input('name? ')", "cell 1: StdinNotImplementedError: raw_input was called"),
        ("%%R\nx <- 3", "cell 1: UsageError: Cell magic `%%R` not found"),
        ("def f(:", "cell 1: SyntaxError: invalid syntax"),
    ],
)
def test_what_fails_in_jupyterlab_fails_here(workshop, source, message):
    with pytest.raises(RunFailed) as failed:
        run(write(cells(source, "1")), out="out")
    assert failed.value.run.error["message"].startswith(message)


def test_no_warning_of_the_format_reaches_the_terminal(workshop):
    name = write(FILES["4.5, no ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            run(name, out="out").record["kernel_name"] == "python3"
            and sys.modules["nbformat"]
        )
