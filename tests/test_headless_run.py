"""Chapter 10: a run is the notebook, and it always leaves one finished record."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless import run as module
from bigmodel_nb.headless.parameters import BadRequest
from bigmodel_nb.headless.run import RunFailed, read_run, run

RECORD = "from bigmodel_nb.kit.record import record\n"


def tagged(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)})


@pytest.fixture
def save(workshop):
    def write(*cells, parameters=None, name="mine.ipynb", **metadata):
        made = [tagged(parameters, "parameters")] if parameters is not None else []
        made += [
            cell if isinstance(cell, dict) else new_code_cell(cell) for cell in cells
        ]
        Path(name).write_text(
            json.dumps(
                {
                    "cells": made,
                    "metadata": metadata,
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            ),
            encoding="utf-8",
        )
        return name

    return write


@pytest.fixture(scope="module", autouse=True)
def zygote():
    """The runs of this file fork their kernels where they may, which saves seconds."""
    return kernel.warm() if kernel.can_fork() else None


def finished(folder="out"):
    """The record in a folder, which must be whole, JSON and the end of its run."""

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    text = (Path(folder) / "metrics.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=refuse)
    assert record["status"] in ("ok", "failed", "killed", "timeout", "interrupted")
    assert (record["error"] is None) == (record["status"] == "ok")
    assert record["error"] is None or "\n" not in record["error"]["message"]
    assert not [
        path.name for path in Path(folder).iterdir() if path.name.startswith(".")
    ], "nothing stays"
    notebook = json.loads(
        (Path(folder) / "notebook.ipynb").read_text(encoding="utf-8"),
        parse_constant=refuse,
    )
    assert notebook["nbformat"] == 4 and (Path(folder) / "report.html").stat().st_size
    return record


def outcome(name, out="out", **options):
    """The run, however it ends, and its record."""
    try:
        done = run(name, out=out, **options)
    except RunFailed as failure:
        done = failure.run
    assert done == read_run(out) and done.record == finished(out)
    return done


def shown(done, cell):
    return nbformat.read(done.notebook, 4).cells[cell].outputs


# --- the record says what the notebook used

USED = """
from datetime import date
from pathlib import Path
rounds: int = 3  # a number
total = rounds * 2
seconds = 60 * 60
limit: int | None = None  # a bound
size = (32, 32)
seen = {1}
raw = b"x"
day = date(2024, 2, 29)
far = 1e999
undefined = float("nan")
by_label = {0: "good"}
place = Path("a") / "b"
huge = 10 ** 400
kinds = [int, None]
word = "\\ud83d"
"""
TOLD = {
    "rounds": 3,
    "total": 6,
    "seconds": 3600,
    "limit": None,
    "size": [32, 32],
    "seen": "{1}",
    "raw": "b'x'",
    "day": "datetime.date(2024, 2, 29)",
    "far": "inf",
    "undefined": "nan",
    "by_label": "{0: 'good'}",
    "place": "a/b",
    "huge": str(10**400),
    "kinds": ["<class 'int'>", None],
    "word": "\ud83d",
}


def test_the_record_says_the_values_that_the_kernel_had(save):
    done = outcome(save("1", parameters=USED))
    assert done.parameters == TOLD and done.unknown == [] and done.record["given"] == {}
    again = outcome("mine.ipynb", "again", rounds=5)
    assert again.parameters == {**TOLD, "rounds": 5} and again.record["given"] == {
        "rounds": 5
    }
    assert (
        nbformat.read(again.notebook, 4).cells[1].source == "# Parameters\nrounds = 5"
    )


def test_only_what_was_asked_for_is_injected(save):
    done = outcome(save("1", parameters="a: int = 1  # a\nb: int | None = None  # b"))
    assert [cell.source for cell in nbformat.read(done.notebook, 4).cells] == [
        "a: int = 1  # a\nb: int | None = None  # b",
        "1",
    ]


def test_a_value_is_asked_of_the_kernel_not_of_the_source(save):
    done = outcome(
        save("a = 'later'", parameters="a: int = 1  # a\nif True:\n    a = 2")
    )
    assert done.parameters == {"a": 2}


@pytest.mark.parametrize(
    "first, parameters, unknown",
    [
        ("import os; os._exit(3)", {}, ["a", "b"]),
        ("1 / 0", {}, ["a", "b"]),
        ("1", {"a": 1}, ["b"]),
    ],
)
def test_what_nobody_learnt_is_unknown_and_not_none(save, first, parameters, unknown):
    name = save(first, tagged("a = 1\n1 / 0\nb = None", "parameters"))
    done = outcome(name)
    assert done.status in ("failed", "killed") and (done.parameters, done.unknown) == (
        parameters,
        unknown,
    )


def test_a_kernel_with_pretty_printing_of_its_own_still_answers(save):
    pretty = (
        "get_ipython().display_formatter.formatters['text/plain'].for_type(object, "
        "lambda *a: 1 / 0)\nimport builtins; builtins.print = None"
    )
    assert outcome(save(pretty, tagged("a = 2", "parameters"))).parameters == {"a": 2}


class Odd:
    def __repr__(self):
        raise RuntimeError("no")


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(Odd)
    | st.dates()
    | st.sets(st.integers()),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
    max_leaves=8,
)


@given(NESTED)
def test_any_value_has_a_form_in_a_record(value):
    plain = module._plain(value)
    assert json.loads(module._to_text(value)) == plain == module._plain(plain)
    assert module._plain([value]) == [plain], (
        "a value does not change with where it stands"
    )


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_what_json_holds_is_kept(value):
    assert module._plain(value) == value


def test_a_value_that_holds_itself_or_is_very_deep_has_a_form():
    ring, deep = [], []
    ring.append(ring)
    for _ in range(5000):
        deep = [deep]
    for value in (ring, deep, {"a": ring}, float("inf"), 10**5000):
        json.loads(module._to_text(value))


# --- whatever happens, one finished record

ATTACHED = new_markdown_cell("# Gone\n\n![x](attachment:gone.png) $\\frac$ <script>")
SHOW = "from IPython.display import display\n"
NASTY = {
    "a default that is a set": (["1"], dict(parameters="x = {1, 2}")),
    "a default that is bytes": (["1"], dict(parameters="x = b'1'")),
    "a default beyond all floats": (["1"], dict(parameters="x: float = 1e999")),
    "an attachment that is gone": ([ATTACHED, "1"], {}),
    "half an emoji in prose": ([new_markdown_cell("# half \ud83d"), "1"], {}),
    "half an emoji shown": (["'\\ud83d'", "print('\\ud83d', '\\udce9')"], {}),
    "a kernel without a name": (["1"], dict(kernelspec={"display_name": "Python"})),
    "a kernel that is no mapping": (
        ["1"],
        dict(kernelspec=["python3"], language_info="python"),
    ),
    "a scrap without a name": (
        [
            SHOW
            + (
                "display({'application/scrapbook.scrap.json+json': {'data': 1}}, "
                "raw=True)"
            )
        ],
        {},
    ),
    "a scrap without data": (
        [
            SHOW
            + (
                "display({'application/scrapbook.scrap.json+json': {'name': 'x'}}, "
                "raw=True)"
            )
        ],
        {},
    ),
    "a scrap that is a list": (
        [SHOW + "display({'application/scrapbook.scrap.json+json': [1]}, raw=True)"],
        {},
    ),
    "a scrap of infinity": (
        [
            SHOW
            + (
                "display({'application/scrapbook.scrap.json+json': {'name': 'x', "
                "'data': float('inf')}}, raw=True)"
            )
        ],
        {},
    ),
    "unknown kinds of output": (
        [
            SHOW
            + (
                "display({'chemical/x-pdb': 'ATOM', 'application/x+json': {'a': "
                "[1]}, 'image/png': 'no base64'}, raw=True)"
            )
        ],
        {},
    ),
    "an empty output": ([SHOW + "display({}, raw=True)"], {}),
    "bad widget state": (
        ["1"],
        dict(widgets={"application/vnd.jupyter.widget-state+json": 3}),
    ),
    "a view of no widget": (
        [
            SHOW
            + (
                "display({'application/vnd.jupyter.widget-view+json': 3, "
                "'text/plain': 'x'}, raw=True)"
            )
        ],
        {},
    ),
    "metadata of the wrong kind": (
        ["1"],
        dict(papermill="x", language_info=3, title=None, authors=3),
    ),
    "tags of the wrong kind": (
        [
            {**new_code_cell("1"), "metadata": {"tags": tags}}
            for tags in (None, "parameters", [1])
        ],
        {},
    ),
    "much text": (["for n in range(300_000): print(n, 'x' * 60)"], {}),
    "a folder that is deleted": (["import os, shutil; shutil.rmtree(os.getcwd())"], {}),
    "a folder in the report's place": (["import os; os.remove('notebook.ipynb')"], {}),
    "an exit": (["exit()", "1 / 0"], {}),
    "a quiet exit": (["import sys; sys.exit()", "1 / 0"], {}),
    "no cells": ([], {}),
    "empty cells": (["", "   ", new_markdown_cell("")], {}),
}


SHORT_REPORT = (
    "an attachment that is gone",
    "a view of no widget",
)  # where a short one may do


@pytest.mark.parametrize("case", NASTY)
def test_a_good_notebook_with_something_odd_ends_ok(save, case):
    cells, options = NASTY[case]
    done = outcome(save(*cells, **options))
    assert done.status == "ok", done.error
    if case not in SHORT_REPORT:
        assert not [note for note in done.record["notes"] if "report" in note], (
            done.record["notes"]
        )


def test_half_an_emoji_in_code_fails_that_cell(save):
    done = outcome(save("1", "x = '\ud83d'", "2"))
    assert (
        done.status == "failed"
        and done.error["cell"] == 2
        and "UnicodeEncodeError" in done.error["message"]
    )


@pytest.mark.parametrize(
    "value", ["caf\udce9", "half \ud83d", "\x00", "'\"\\\n", "{}", "été"]
)
def test_any_text_reaches_the_notebook_as_it_is(save, value):
    done = outcome(
        save("open('got', 'w').write(ascii(word))", parameters="word: str = ''  # any"),
        word=value,
    )
    assert (
        done.status == "ok"
        and Path("out/got").read_text() == ascii(value)
        and done.parameters == {"word": value}
    )


def test_a_report_that_cannot_be_made_does_not_fail_the_run(save, monkeypatch):
    def broken(*_):
        raise RuntimeError("first\nlast <b>")

    monkeypatch.setattr("bigmodel_nb.headless.report.to_html", broken)
    done = outcome(save("7 * 6"))
    assert done.status == "ok" and done.record["notes"][1:] == [
        (
            "the report could not be made, a short one takes its place: "
            "RuntimeError: first … last <b>"
        )
    ]
    page = done.report.read_text()
    assert "&quot;status&quot;: &quot;ok&quot;" in page and "<b>" not in page


@pytest.mark.parametrize(
    "part", ["_metrics", "_correct_states", "_cell_rows", "_verdict", "_to_ipynb"]
)
@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, RecursionError, OSError]
)
def test_a_fault_of_our_own_still_ends_in_a_record(save, monkeypatch, part, error):
    def broken(*_):
        raise error("no")

    with monkeypatch.context() as patched:
        name = save("1")
        run_cells(patched)
        patched.setattr(module, part, broken)
        try:
            run(name, out="out")
        except RunFailed:
            pass
    record = json.loads(Path("out/metrics.json").read_text())
    assert (
        record["status"] in ("ok", "failed", "interrupted")
        and not Path("out/.reserve").exists()
    )
    assert record["error"] or record["notes"], "the fault is told"


def run_cells(patched):
    """No kernel: what is tested comes after it."""
    patched.setattr(module, "_execute", lambda manager, *_: manager.notebook_start())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
KINDS = st.sampled_from(
    [
        "text/plain",
        "text/html",
        "image/png",
        "image/svg+xml",
        "application/json",
        "text/latex",
        "text/markdown",
        "application/javascript",
        "application/scrapbook.scrap.json+json",
        "application/papermill.record+json",
        "application/vnd.jupyter.widget-view+json",
        "x/y",
    ]
)
DATA = st.dictionaries(KINDS, JSON, max_size=3)
OUTPUTS = st.one_of(
    st.fixed_dictionaries(
        {
            "output_type": st.just("display_data"),
            "data": DATA,
            "metadata": st.dictionaries(KINDS, JSON, max_size=1),
        }
    ),
    st.fixed_dictionaries(
        {"output_type": st.just("stream"), "name": st.just("stdout"), "text": st.text()}
    ),
    st.fixed_dictionaries(
        {
            "output_type": st.just("error"),
            "ename": st.text(),
            "evalue": st.text(),
            "traceback": st.lists(st.text()),
        }
    ),
)
ANY_CELLS = st.fixed_dictionaries(
    {},
    optional={
        "cell_type": st.sampled_from(["code", "markdown", "raw", "heading", 3]),
        "source": JSON | st.lists(st.text()),
        "metadata": JSON,
        "outputs": JSON,
        "id": JSON | st.sampled_from(["a", "a b"]),
        "attachments": JSON,
        "execution_count": JSON,
    },
)


SHOWN = dict(
    outputs=st.lists(OUTPUTS, max_size=3),
    prose=st.text(),
    metrics=st.dictionaries(st.text(), JSON, max_size=2),
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(**SHOWN)
@example(
    outputs=[{"output_type": "error", "ename": "A\nB", "evalue": "", "traceback": []}],
    prose="",
    metrics={},
)
def test_whatever_a_notebook_shows_the_record_is_written(
    tmp_path_factory, outputs, prose, metrics
):
    with pytest.MonkeyPatch.context() as patched:  # the report takes most of a second
        patched.setattr(
            "bigmodel_nb.headless.report.to_html",
            lambda notebook, record, folder: json.dumps(record, allow_nan=False),
        )
        conclude(tmp_path_factory, outputs, prose, metrics)


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.generate],
)
@given(**SHOWN)
def test_whatever_a_notebook_shows_the_report_is_written(
    tmp_path_factory, outputs, prose, metrics
):
    conclude(tmp_path_factory, outputs, prose, metrics)


def conclude(tmp_path_factory, outputs, prose, metrics):
    """The end of a run whose notebook shows all this."""
    folder = tmp_path_factory.mktemp("run")
    cells = [new_markdown_cell(prose), {**new_code_cell("1"), "outputs": outputs}]
    notebook = nbformat.from_dict(
        {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    )
    watch, record = (
        module._Watch(),
        {
            "status": "running",
            "notebook": "x",
            "notes": [],
            "seed": None,
            "working_folder": ".",
            "notebook_folder": ".",
            "seconds": 1.0,
        },
    )
    watch.parameters = {"a": metrics}
    (folder / ".reserve").write_text("0")
    module._conclude(record, notebook, watch, None, None, ["a", "b"])
    module._finish(folder, notebook, record)
    written = finished(folder)
    assert written["unknown"] == ["b"] and written["status"] == (
        "failed"
        if any(each.output_type == "error" for each in notebook.cells[1].outputs)
        else "ok"
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "cells": st.lists(ANY_CELLS | JSON, max_size=3) | JSON,
            "metadata": JSON
            | st.fixed_dictionaries(
                {},
                optional={
                    "kernelspec": JSON
                    | st.fixed_dictionaries(
                        {}, optional={"name": JSON, "language": JSON}
                    ),
                    "language_info": JSON,
                    "papermill": JSON,
                    "execution": JSON,
                },
            ),
        },
    ),
    st.sampled_from([0, 1, 2, 3, 4, 5, 99, None, "4"]),
)
def test_any_file_is_run_or_refused_in_a_sentence(tmp_path_factory, content, minor):
    folder = tmp_path_factory.mktemp("any")
    (folder / "any.ipynb").write_text(
        json.dumps({"nbformat": 4, "nbformat_minor": minor, **content}),
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patched:
        run_cells(patched)
        patched.setattr(
            "bigmodel_nb.headless.report.to_html",
            lambda notebook, record, folder: "<p>",
        )  # it takes most of a second
        try:
            run(str(folder / "any.ipynb"), out=folder / "out")
        except BadRequest as error:
            assert "\n" not in str(error) and not (folder / "out").exists()
            return
    finished(folder / "out")


# --- the run is the notebook


def test_an_executed_notebook_is_run_with_its_defaults_or_what_is_asked_for_now(save):
    outcome(
        save(RECORD + "record('n', n)", parameters="n: int = 1  # a number"),
        "first",
        n=7,
    )
    executed = "first/notebook.ipynb"
    plain, other = outcome(executed, "second"), outcome(executed, "third", n=9)
    assert (plain.metrics, plain.parameters) == ({"n": 1}, {"n": 1}) and (
        other.metrics,
        other.parameters,
    ) == ({"n": 9}, {"n": 9})
    assert [cell.source for cell in nbformat.read(other.notebook, 4).cells].count(
        "# Parameters\nn = 9"
    ) == 1


def test_values_injected_where_nothing_is_declared_stay(save):
    name = save(tagged("n = 4", "injected-parameters"), RECORD + "record('n', n)")
    assert outcome(name).metrics == {"n": 4}


def test_a_cell_that_may_raise_does_not_fail_the_run(save):
    done = outcome(
        save(tagged("1 / 0", "raises-exception"), RECORD + "record('after', 1)")
    )
    assert (
        done.status == "ok"
        and done.metrics == {"after": 1}
        and shown(done, 0)[0].ename == "ZeroDivisionError"
    )
    assert "ZeroDivisionError" in done.report.read_text()
    later = outcome(
        save(tagged("1 / 0", "raises-exception"), "[][0]", name="later.ipynb"), "later"
    )
    assert later.error["message"] == "cell 2: IndexError: list index out of range"


@pytest.mark.parametrize("tool", ["execution", "nbclient", "nbsphinx"])
def test_metadata_may_allow_all_errors(save, tool):
    name = save(
        "1 / 0", RECORD + "record('after', 1)", **{tool: {"allow_errors": True}}
    )
    assert outcome(name).metrics == {"after": 1}


RICH = "import rich.traceback; rich.traceback.install()"
OWN = (
    "get_ipython().set_custom_exc((Exception,), lambda shell, kind, value, tb, "
    "tb_offset=None: print('shown by hand'))"
)
RAISED = {
    "1 / 0": "ZeroDivisionError: division by zero",
    OWN + "\nraise LookupError": "LookupError",
    "raise ValueError('first\\nsecond\\nlast')": "ValueError: first … last",
    "%run {folder}/script.py": "ZeroDivisionError: division by zero",
    "%%time\n1 / 0": "ZeroDivisionError: division by zero",
    "%timeit -n1 -r1 1 / 0": "ZeroDivisionError: division by zero",
    "get_ipython().run_line_magic('nothing', '')": (
        "UsageError: Line magic function `%nothing` not found"
    ),
    "raise ExceptionGroup('two', [ValueError('a'), TypeError('b')])": (
        "ExceptionGroup: two (2 sub-exceptions)"
    ),
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise SystemExit(2)": "SystemExit: 2",
    "raise SystemExit('bad input')": "SystemExit: bad input",
    "x = ": "SyntaxError: invalid syntax",
    "raise BaseException('base')": "BaseException: base",
    "import asyncio\nawait asyncio.wait_for(asyncio.sleep(9), 0.01)": "TimeoutError",
}


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
def test_an_exception_keeps_its_name(save, rich):
    Path("script.py").write_text("1 / 0\n")
    if rich:
        pytest.importorskip("rich")
    for number, (source, message) in enumerate(RAISED.items()):
        if rich and source.startswith(
            "%run"
        ):  # rich prints that traceback, and the kernel calls the cell good
            continue
        before = [RICH] if rich else []
        done = outcome(
            save(*before, source.replace("{folder}", str(Path.cwd()))), f"out{number}"
        )
        assert done.status == "failed", source
        assert done.error["message"].startswith(f"cell {len(before) + 1}: {message}"), (
            source,
            done.error,
        )
        assert done.error["exception"] == message.split(":")[0]


LOOP = """
from {module} import tqdm
import time
bar = tqdm(total=400)
while bar.n < bar.total:
    bar.update(1)
    time.sleep(0.002)
bar.close()
count = bar.n
for _ in tqdm(range(3), leave=False):
    time.sleep(0.15)
"""


@pytest.mark.parametrize("name", ["tqdm", "tqdm.auto", "tqdm.notebook"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "forked"])
def test_a_bar_counts_and_takes_no_room(save, name, fresh):
    env = "import os; os.environ['X'] = '1'" if fresh else "1"
    done = outcome(
        save(env, LOOP.format(module=name), RECORD + "record('count', count)"),
        timeout=60,
    )
    assert done.metrics == {"count": 400} and done.record["kernel"] == (
        "fresh" if fresh or not kernel.can_fork() else "forked"
    )
    outputs = shown(done, 1)
    text = "".join(
        each.get("text", "") + each.get("data", {}).get("text/plain", "")
        for each in outputs
    )
    assert (
        len(json.dumps(outputs)) < 1000
        and "100%" in text
        and "400/400" in text
        and " 0%" not in text
    ), outputs
    assert ("widget" in json.dumps(outputs)) == (
        name != "tqdm"
    ) and "widgets" not in nbformat.read(done.notebook, 4).metadata


def test_bars_inside_bars_and_text_between_them(save):
    source = """
from tqdm import tqdm
import sys, time
for outer in tqdm(range(3), desc='outer'):
    for inner in tqdm(range(40), desc='inner', leave=False):
        time.sleep(0.005)
print('done')
"""
    other = """
import sys, time
sys.stdout.write('10 %\\r20 %\\r'); sys.stdout.flush(); time.sleep(0.5); print('100 %')
"""
    done = outcome(save(source, other))
    error, out = (
        next(each.text for each in shown(done, 0) if each.name == name)
        for name in ("stderr", "stdout")
    )
    assert (
        out == "done\n"
        and [each.text for each in shown(done, 1)] == ["100 %\n"]
        and "outer: 100%" in error
        and error.count("inner") <= 1
        and len(error) < 300
    )


@given(st.lists(st.text(alphabet="ab\n\r\b", max_size=6)))
def test_pieces_show_what_the_whole_shows(pieces):
    by_piece, whole = module._Screen(), module._Screen()
    for piece in pieces:
        shown_last = by_piece.write(piece)
    assert not pieces or shown_last == whole.write("".join(pieces))
    assert module._Screen().write(
        "".join(pieces).replace("\r", "").replace("\b", "")
    ) == "".join(pieces).replace("\r", "").replace("\b", "")


def test_modules_beside_the_notebook_are_found_and_the_record_says_where_it_works(save):
    Path("helper.py").write_text("answer = 42\n")
    Path("package").mkdir()
    Path("package/__init__.py").write_text("from .part import more\n")
    Path("package/part.py").write_text("more = 43\n")
    done = outcome(
        save(
            RECORD
            + (
                "import helper, package, os\n"
                "record('got', [helper.answer, package.more])\n"
                "record('place', os.getcwd())"
            )
        )
    )
    assert done.metrics["got"] == [42, 43]
    assert done.record["working_folder"] == str(done.folder) == done.metrics[
        "place"
    ] and done.record["notebook_folder"] == str(Path.cwd())


def test_a_file_beside_the_notebook_is_named_with_what_to_do(save):
    Path("rows.csv").write_text("a\n1\n")
    for number, source in enumerate(
        ["open('rows.csv')", "import pandas; pandas.read_csv('rows.csv')"]
    ):
        done = outcome(save(source), f"out{number}")
        assert done.error["message"].endswith(
            "('rows.csv' lies beside the notebook, "
            "and a run works in a folder of its own: "
            "give its path as a parameter)"
        )
    assert "beside" not in outcome(save("open('none.csv')"), "none").error["message"]


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "forked"])
def test_what_a_notebooks_own_programs_write_does_not_reach_this_terminal(
    save, capfd, monkeypatch, fresh
):
    monkeypatch.delenv(
        "PYTEST_CURRENT_TEST"
    )  # with it a kernel does not take what its programs write
    leak = (
        "import os, subprocess, sys\nos.system('echo leaked; echo leaked >&2')\n"
        "subprocess.run(['echo', 'leaked']); os.write(1, b'leaked\\n'); "
        "print('leaked', file=sys.__stdout__)"
    )
    done = outcome(
        save("%env X=1" if fresh else "1", leak, "import time; time.sleep(0.2)")
    )
    assert done.record["kernel"] == (
        "fresh" if fresh or not kernel.can_fork() else "forked"
    )
    text = "".join(each.get("text", "") for each in shown(done, 1))
    assert text.count("leaked") >= 4 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("timeout", [0.7, 1, 1.5])
def test_a_timeout_may_be_a_fraction(save, timeout):
    assert outcome(save("1"), timeout=timeout + 20).status == "ok"
    done = outcome(save("import time; time.sleep(30)"), "late", timeout=timeout)
    assert (
        done.status == "timeout"
        and done.error["message"] == f"cell 1: the cell took longer than {timeout:g} s"
        and done.seconds < 20
    )


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e300, "3", True])
def test_a_timeout_that_is_none_is_refused(save, timeout):
    with pytest.raises(BadRequest, match="^timeout is .*; allowed are seconds"):
        run(save("1"), out="out", timeout=timeout)
    assert not Path("out").exists()


def test_a_repr_that_raises_keeps_its_name(save):
    thing = (
        "class Thing:\n    def __repr__(self):\n"
        "        raise LookupError('not shown')\n"
    )
    done = outcome(save(thing + "Thing()", "1"))
    assert (done.status, done.error["exception"], done.error["message"]) == (
        "failed",
        "LookupError",
        "cell 1: LookupError: not shown",
    )
    assert (
        outcome(save(thing + "Thing()", "1/0", allow_errors=True), "again").error[
            "exception"
        ]
        == "LookupError"
    )


def test_values_are_told_whatever_the_notebook_calls_dict(save):
    shadows = "\n".join(
        f"{name} = {{1: 2}}"
        for name in (
            "dict",
            "exec",
            "globals",
            "isinstance",
            "str",
            "json",
            "sys",
            "Any",
            "space",
            "list",
        )
    )
    done = outcome(save("1", parameters="n: int = 3\n" + shadows), n=4)
    assert done.parameters["n"] == 4 and done.unknown == []


def test_a_cell_that_is_tagged_to_be_skipped_runs_as_in_jupyterlab(save):
    assert outcome(
        save(RECORD + "n = 1", tagged("n = 2", "skip-execution"), "record('n', n)")
    ).metrics == {"n": 2}


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "a\0b", "~no_such_user/x", "\ud83d"]
)
def test_a_folder_that_no_run_can_have_is_refused(save, name):
    notebook = save("1")
    with pytest.raises(BadRequest, match="^out is .*, where nothing can be written: ."):
        run(notebook, out=name)
    assert os.listdir() == ["mine.ipynb"]
    with pytest.raises(FileNotFoundError, match="^folder is .*, which holds no run"):
        read_run(name)


def test_a_current_folder_that_is_gone_is_told(save, monkeypatch):
    notebook = Path(save("1")).absolute()
    Path("gone").mkdir()
    monkeypatch.chdir("gone")
    os.rmdir("../gone")
    with pytest.raises(
        BadRequest,
        match=(
            "^out is 'runs/.*', where nothing can be written: "
            "the current folder is gone"
        ),
    ):
        run(notebook)
    with pytest.raises(BadRequest, match="^there is no notebook file 'mine.ipynb'"):
        run("mine.ipynb")
    with pytest.raises(FileNotFoundError, match="^folder is 'out', which holds no run"):
        read_run("out")


WHOLE = {"status": "ok", "metrics": {}, "parameters": {}}
RUNNING = {**WHOLE, "status": "running", "host": "x", "pid": 1, "process_started": 1.0}


@pytest.mark.parametrize(
    "record, said",
    [
        ([], "it holds a list"),
        (3, "it holds a int"),
        ({}, "status is missing"),
        ({**WHOLE, "metrics": []}, r"metrics is \[\]"),
        ({**WHOLE, "parameters": None}, "parameters is None"),
        ({**WHOLE, "status": "fine"}, "status is 'fine'"),
        ({**WHOLE, "status": []}, "status is"),
        ({**WHOLE, "error": "x"}, "error is 'x'"),
        ({**WHOLE, "error": {}}, "error has no message"),
        ({**WHOLE, "seconds": "3"}, "seconds is '3'"),
        ({**RUNNING, "host": None}, "host is None"),
        (
            {key: each for key, each in RUNNING.items() if key != "host"},
            "host is missing",
        ),
        ({**RUNNING, "pid": "1"}, "pid is '1'"),
        ({**WHOLE, "unknown": 3}, "unknown is 3"),
    ],
)
def test_a_record_that_no_run_has_written_is_told(workshop, record, said):
    Path("metrics.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=f"^folder is '.', whose metrics.json is no run's: {said}"
    ):
        read_run(".")


def test_a_record_of_a_run_is_read(workshop):
    for record in (WHOLE, RUNNING):
        Path("metrics.json").write_text(json.dumps(record))
        assert read_run(".").status == record["status"] and read_run(".").stale is False
    Path("metrics.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no run's"):
        read_run(".")


def test_a_folder_that_is_taken_is_found_before_the_format_of_notebooks_is_imported(
    save,
):
    save("1")
    Path("metrics.json").write_text(json.dumps(WHOLE))
    source = """
import sys
from bigmodel_nb.headless.run import BadRequest, read_run, run
assert read_run(".").status == "ok"
try:
    run("mine.ipynb", out=".")
except BadRequest as error:
    said = "out is '.', which already holds a run; allowed is a new folder"
    assert str(error) == said
else:
    raise AssertionError
print(*{"nbformat", "jsonschema", "papermill", "torch"} & {*sys.modules})
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True
        ).stdout
        == "\n"
    )


# --- kernels


def specification(monkeypatch, name, **changes):
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": name,
        "language": "python",
    }
    folder = Path("share/kernels") / name
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({**spec, **changes}))
    monkeypatch.setenv("JUPYTER_PATH", str(Path("share").absolute()))


@pytest.mark.parametrize(
    "spec, info",
    [
        (None, None),
        ({}, None),
        ({"name": ""}, None),
        ({"name": "python3"}, None),
        ({"name": "Python3", "language": "python"}, None),
        ({"name": 3}, {"name": "python"}),
        ({"name": "py39"}, None),
        ({"name": "conda-env-x-py", "language": "python"}, {}),
        ({"name": "somebody", "language": "python"}, None),
        ({"name": "python2", "language": "python"}, None),
        (None, {"name": "ipython"}),
    ],
)
def test_a_notebook_in_python_runs_on_this_python(save, spec, info):
    metadata = {
        key: each
        for key, each in (("kernelspec", spec), ("language_info", info))
        if each is not None
    }
    done = outcome(
        save(RECORD + "import sys; record('python', sys.executable)", **metadata)
    )
    assert (
        done.metrics == {"python": sys.executable}
        and done.record["kernel_name"] == "python3"
    )
    named = (spec or {}).get("name")
    expected = (
        f"the kernel {named!r}, which is not installed here"
        if isinstance(named, str) and named
        else "no kernel"
    )
    assert done.record["notes"] == (
        []
        if str(named).lower() == "python3"
        else [f"the notebook names {expected}: it ran on 'python3'"]
    )
    assert nbformat.read(done.notebook, 4).metadata.kernelspec.name.lower() == "python3"


@pytest.mark.parametrize(
    "spec, info, said",
    [
        ({"name": "ir", "language": "R"}, None, "the kernel 'ir'"),
        ({"name": "ir"}, None, "the kernel 'ir'"),
        ({"name": "julia-1.9"}, {"name": "julia"}, "the kernel 'julia-1.9'"),
        (None, {"name": "R"}, "a kernel for R"),
        ({"language": "scala"}, None, "a kernel for scala"),
        ({"name": "bash", "language": "bash"}, {"name": "bash"}, "the kernel 'bash'"),
    ],
)
def test_another_language_without_its_kernel_is_refused_before_anything_starts(
    save, spec, info, said
):
    metadata = {
        key: each
        for key, each in (("kernelspec", spec), ("language_info", info))
        if each is not None
    }
    with pytest.raises(
        BadRequest,
        match=(
            f"the notebook needs {said}, which is not installed here; "
            "installed are .*python3"
        ),
    ):
        run(save("x <- 3", **metadata), out="out")
    assert not Path("out").exists()


def test_another_kernel_that_is_installed_is_used(save, monkeypatch):
    specification(monkeypatch, "other", env={"WHOSE": "other", "OMP_NUM_THREADS": "1"})
    source = RECORD + (
        "import os, torch; record('whose', os.environ.get('WHOSE')); "
        "record('threads', torch.get_num_threads())"
    )
    kernel.warm()
    done = outcome(save(source, kernelspec={"name": "other", "language": "python"}))
    assert (
        done.metrics == {"whose": "other", "threads": 1}
        and done.record["kernel_name"] == "other"
        and done.record["notes"] == []
    )
    assert done.record["kernel"] == "fresh", (
        "the libraries of a copy were imported in another environment"
    )


def test_a_kernel_of_the_same_language_stands_in(save, monkeypatch):
    specification(monkeypatch, "ir", language="R")
    done = outcome(save("1 + 1", kernelspec={"name": "ir-4.0", "language": "R"}))
    assert done.status == "ok" and done.record["kernel_name"] == "ir"
    assert done.record["kernel_reason"] == "its language is r"
    assert done.record["notes"] == [
        (
            "the notebook names the kernel 'ir-4.0', which is not installed here: "
            "it ran on 'ir'"
        )
    ]


def test_a_kernel_that_cannot_start_is_a_failed_run(save, monkeypatch):
    specification(monkeypatch, "broken", argv=["/no/such/program", "{connection_file}"])
    done = outcome(
        save(
            "1",
            kernelspec={"name": "broken", "language": "python"},
        )
    )
    assert (
        done.status == "failed"
        and "/no/such/program" in done.error["message"]
        and done.record["kernel"] is None
    )


def test_a_long_temporary_folder(save, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long)}
    save(RECORD + "import tempfile; record('folder', tempfile.gettempdir())")
    code = (
        "from bigmodel_nb.headless.run import run; [run('mine.ipynb', "
        "out=f'out{n}') for n in range(2)]; from bigmodel_nb.headless import "
        "kernel; kernel.warm(); run('mine.ipynb', out='out2')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    records = [finished(f"out{n}") for n in range(3)]
    assert [each["metrics"] for each in records] == [{"folder": str(long)}] * 3
    assert not list(long.glob("bm*")) and records[2]["kernel"] == (
        "forked" if kernel.can_fork() else "fresh"
    )


def test_without_a_place_for_sockets_kernels_talk_over_the_network(save, monkeypatch):
    monkeypatch.setattr(kernel, "socket_folder", lambda: None)
    asked = (
        "import json, ipykernel.connect; record('transport', "
        "json.loads(ipykernel.connect.get_connection_info())['transport'])"
    )
    assert outcome(save(RECORD + asked)).metrics == {"transport": "tcp"}


def test_threads_that_wait_do_not_spin(save, monkeypatch):
    name = save(RECORD + "import os; record('spin', os.environ.get('GOMP_SPINCOUNT'))")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert outcome(name).metrics == {"spin": "1000"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert outcome(name, "given").metrics == {"spin": "7"}
    assert kernel.kernel_environment({"OMP_WAIT_POLICY": "active"}) == {
        "OMP_WAIT_POLICY": "active"
    }


# a lesson that is also a job

JOB = [
    tagged(
        "data: str | None = None  # a table\nepochs: int = 1  # how often\n"
        "preset: str = 'small'  # a model's name",
        "parameters",
    ),
    tagged("taught = 1", "lesson"),
    new_markdown_cell("Why it is so.", metadata={"tags": ["lesson"]}),
    new_code_cell(
        "from bigmodel_nb.kit.record import record\n"
        "record('taught', 'taught' in globals())"
    ),
]


@pytest.mark.parametrize(
    "values, options, taught",
    [
        ({}, {}, True),
        ({"epochs": 2}, {}, True),
        ({"data": None}, {}, True),
        ({"data": "my.csv"}, {}, False),
        ({"preset": "small"}, {}, False),
        ({"data": "my.csv"}, {"lesson": True}, True),
        ({}, {"lesson": False}, False),
    ],
)
def test_cells_that_only_teach_are_left_out_of_a_job(save, values, options, taught):
    done = run(save(*JOB), values, out="out", **options)
    assert done.metrics == {"taught": taught}
    said = "2 cells that only teach left out; lesson=True or --lesson keeps them"
    assert (said in done.record["notes"]) != taught
    kept = [cell.source for cell in nbformat.read(done.notebook, 4).cells]
    assert ("Why it is so." in kept) == ("taught = 1" in kept) == taught


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_reply_that_comes_while_a_widget_is_told_something_is_not_waited_for_in_vain(
    timeout,
):
    """jupyter_client sends past asyncio, which then does not learn of the reply."""
    import asyncio
    import time

    import zmq.asyncio
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.session import Session

    async def reply(again: bool) -> str:
        session = Session(key=b"k")
        with (
            zmq.Context() as context,
            context.socket(zmq.ROUTER) as kernel,
            zmq.asyncio.Context(context).socket(zmq.DEALER) as mine,
        ):
            mine.identity = b"me"
            kernel.bind("inproc://lost")
            mine.connect("inproc://lost")
            channel = AsyncZMQSocketChannel(mine, session)
            if again:
                module._look_again(channel)
            channel.send(session.msg("execute_request"))
            session.recv(kernel)
            waiting = asyncio.ensure_future(channel.get_msg(timeout=timeout))
            await asyncio.sleep(0.1)
            session.send(kernel, "execute_reply", ident=b"me")
            time.sleep(0.05)
            channel.send(session.msg("comm_msg"))
            try:
                return (await asyncio.wait_for(waiting, 4))["msg_type"]
            except TimeoutError:
                return "lost"
            finally:
                mine.linger = kernel.linger = 0

    assert [asyncio.run(reply(again)) for again in (False, True)] == [
        "lost",
        "execute_reply",
    ]


def test_a_channel_that_looks_again_ends_in_time():
    import asyncio
    import time
    from queue import Empty
    from types import SimpleNamespace

    asked = []

    async def get_msg(timeout=None):
        asked.append(timeout)
        await asyncio.sleep(timeout)
        raise Empty

    channel, start = SimpleNamespace(get_msg=get_msg), time.monotonic()
    module._look_again(channel)
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=0.3))
    assert 0.3 <= time.monotonic() - start < 1 and max(asked) <= 0.3
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=0))


IRI = """
import sys
import bigmodel_nb.headless.run
import jsonschema
import nbformat
from importlib.util import find_spec

def compiled():
    return "rfc3987_syntax.syntax_helpers" in sys.modules

assert find_spec("rfc3987_syntax") and not compiled()
checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
schema = jsonschema.Draft202012Validator({"format": "iri"}, format_checker=checker)
print(schema.is_valid("http://exämple.org/a"), schema.is_valid("none"), compiled())
import rfc3987_syntax
print(rfc3987_syntax.is_valid_syntax_h16("1f"))
"""


def test_grammars_of_addresses_are_compiled_where_one_is_checked():
    """jsonschema would have it done in every run, and it takes seconds."""
    pytest.importorskip("rfc3987_syntax")
    done = subprocess.run(
        [sys.executable, "-c", IRI], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True False True\nTrue\n"
