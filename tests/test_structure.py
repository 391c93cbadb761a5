"""Notebooks have the anatomy of the course, modules documentation, and both agree."""

import ast
import base64
import io
import json
import re
import shutil
import subprocess
import symtable
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.specifiers import SpecifierSet
from PIL import Image

from bigmodel_nb.headless.parameters import catalogue, declaration, read_parameters
from bigmodel_nb.kit.exercises import read_exercises
from bigmodel_nb.kit.plots import figure, png

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import glossary  # noqa: E402

glossary.prose = cache(glossary.prose)  # no test writes a notebook

NAMES = list(catalogue())
PLACE = "bigmodel-nb/bigmodel_nb"
SETUP = f"""import sys

if "google.colab" in sys.modules:  # which lacks this package
    %pip install -q --no-deps -r https://raw.githubusercontent.com/{PLACE}/main/requirements/colab.txt"""
# they teach nothing that could be imported
WITHOUT_MODULE = ("tour", "foundations/reading")
LESSONS = [name for name in NAMES if name != "tour"]
MODULES = sorted(
    path
    for path in (ROOT / "bigmodel_nb").rglob("*.py")
    if path.name not in ("__init__.py", "_modidx.py")
)
# Words of earlier versions, for: gradient, norm ball, fooled, misclassified,
# gradient masking, stochastic, near duplicate, ReLU.
HOME_MADE = (
    "hidden slopes?",
    "slopes of the loss",
    "fells",
    "misreads?",
    "draws? lots",
    "near cop(?:y|ies)",
    "rectifiers?",
)
FOLDED = {"engine", "figure"}
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|work|Users|private|var/folders)/"
)


@cache
def read(name):
    """A notebook, which several tests look at and none changes."""
    return nbformat.read(catalogue()[name], as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def module_of(name):
    return "bigmodel_nb." + name.replace("/", ".")


@pytest.mark.parametrize("name", NAMES)
def test_opening(name):
    cells = read(name).cells
    prose = next(cell.source for cell in cells if cell.cell_type == "markdown")
    directive = (
        "" if name in WITHOUT_MODULE else f"#| default_exp {name.replace('/', '.')}\n"
    )
    assert cells[0].source == directive + SETUP, "make sync"
    assert re.match(r"# .+\n\n> .+[.]\n", prose), "a title, then a promise"
    assert re.search(
        r"^\*Measured on 2 CPU cores: \d+ s, [\d.]+ GB\.\*$", prose, re.MULTILINE
    ), "the measured cost"
    for heading in ("You need", "Stands on", "On a GPU"):
        assert f"**{heading}**" in prose, heading


@pytest.mark.parametrize("name", NAMES)
def test_opens_elsewhere(name):
    """The links below the measured cost open this very notebook.

    Binder only where 2 GB hold it and JupyterLab.
    """
    prose = next(
        cell.source for cell in read(name).cells if cell.cell_type == "markdown"
    )
    gigabytes, line = re.search(
        r"^\*Measured on .*, ([\d.]+) GB\.\*\n(.+)$", prose, re.MULTILINE
    ).groups()
    path = catalogue()[name].relative_to(ROOT).as_posix()
    allowed = f"[Open in Colab](https://colab.research.google.com/github/{PLACE}/blob/main/{path})"
    if float(gigabytes) < 1.75:
        allowed += f" · [Binder](https://mybinder.org/v2/gh/{PLACE}/main?urlpath=lab/tree/{path})"
    assert (
        line == allowed + f" · [Glossary]({'../' * (path.count('/') - 1)}glossary.md)"
    ), "make sync"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_cell(name):
    notebook = read(name)
    tagged = [
        cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    statements = [
        node
        for node in ast.parse(tagged[0].source).body
        if not isinstance(node, ast.ImportFrom)
    ]
    assert all(isinstance(node, ast.AnnAssign) for node in statements), (
        "every parameter has a type"
    )
    parameters = read_parameters(notebook)
    assert parameters["budget"].choices == ("quick", "full")
    assert parameters["budget"].default == "quick"
    assert parameters["seed"].type == "int" and parameters["seed"].default == 0
    assert all(parameter.help for parameter in parameters.values()), (
        "every parameter says what it is"
    )


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_explained(name):
    notebook = read(name)
    hidden = [
        cell.source
        for cell in code(notebook)
        if FOLDED & set(cell.metadata.get("tags", [])) or cell.source.startswith("#|")
    ]
    teaching = [cell.source for cell in code(notebook) if cell.source not in hidden]
    lines = sorted(len(source.splitlines()) for source in teaching)
    unfolded = [
        len(cell.source.splitlines())
        for cell in code(notebook)
        if not FOLDED & set(cell.metadata.get("tags", []))
    ]
    assert max(unfolded) <= 25, "no open cell over 25 lines, exported ones included"
    assert lines[len(lines) // 2] <= 12, "most open cells under 12 lines"
    assert all(len(source.splitlines()) <= 55 for source in hidden), (
        "a class in one cell at the most"
    )
    assert all(
        len(line) <= 88
        for source in teaching + hidden
        for line in source.splitlines()
        if "%pip" not in line
    ), "lines fit a page"
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    solutions = re.findall(r"```python\n(.*?)```", "\n".join(prose), re.DOTALL)
    assert all(len(line) <= 88 for each in solutions for line in each.splitlines()), (
        "code in prose fits a page"
    )
    words = sum(len(source.split()) for source in prose)
    assert words >= 10 * len(code(notebook)), "prose says why"


# the measured cost and the links below it
WRITTEN = re.compile(r"^(?:\*Measured on|\[Open in Colab\]).*$", re.MULTILINE)
# One sitting: what a lesson may hold at most. Cells of all kinds; words of its prose,
# formulas, tables and folds included, what `make sync` writes not; lines of open code.
SITTING = {"cells": 90, "words": 3000, "lines": 400}
# Lessons that were larger on 29 November 2026, and how large: none may grow, and what
# has come within the bounds leaves the list.
LARGER = {
    "kit/widgets": {"cells": 97},
    "data/sources": {"cells": 139, "words": 3690, "lines": 490},
    "foundations/losses": {"cells": 146, "words": 4075},
    "foundations/autograd": {"cells": 162, "words": 4450, "lines": 621},
    "foundations/optim": {"cells": 161, "words": 4867, "lines": 716},
    "foundations/reading": {"cells": 106, "words": 4705},
    "models/layers": {"words": 3351},
    "adapting/lora": {"cells": 102},
    "robust/attacks": {"cells": 179, "words": 5886, "lines": 655},
    "robust/training": {"cells": 119, "words": 3798, "lines": 405},
    "robust/evaluate": {"cells": 106, "words": 3252, "lines": 518},
    "robust/certify": {"cells": 107, "words": 3718},
    "robust/text": {"cells": 118, "words": 3354},
    "headless/parameters": {"cells": 99},
    "headless/run": {"cells": 112},
}


def size(notebook):
    """Cells, words of prose and open lines of code of a notebook."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    open_cells = [
        cell.source
        for cell in code(notebook)
        if not FOLDED & set(cell.metadata.get("tags", []))
    ]
    return {
        "cells": len(notebook.cells),
        "words": sum(len(WRITTEN.sub("", source).split()) for source in prose),
        "lines": sum(len(source.splitlines()) for source in open_cells),
    }


def beyond(found, bounds):
    """What of a size is over its bound."""
    return {each: found[each] for each in found if found[each] > bounds[each]}


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_one_sitting(name):
    found, larger = size(read(name)), LARGER.get(name, {})
    over = beyond(found, SITTING | larger)
    assert not over, f"{over}: cut, merge, or make two lessons of it"
    assert beyond(found, SITTING).keys() == larger.keys(), (
        f"{name} holds {found}: take what is within the bounds out of LARGER"
    )


def test_lessons_that_are_larger_exist():
    assert LARGER.keys() <= set(NAMES)


def test_size_counts_what_a_reader_sees():
    cell = nbformat.v4.new_code_cell
    folded = [cell("x = 1\ny = 2", metadata={"tags": [tag]}) for tag in FOLDED]
    prose = nbformat.v4.new_markdown_cell("Two words\n*Measured on 2 cores.*")
    notebook = nbformat.v4.new_notebook(cells=[prose, cell("x\n\ny"), *folded])
    assert size(notebook) == {"cells": 4, "words": 2, "lines": 3}
    assert beyond(size(notebook), SITTING | {"words": 1}) == {"words": 2}
    assert not beyond(size(notebook), SITTING | {"words": 2})


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_folded_by_their_tags(name):
    for cell in code(read(name)):
        tags = set(cell.metadata.get("tags", []))
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert (
            folded
            == bool(tags & FOLDED)
            == ("hide-input" in tags)
            == ("cellView" in cell.metadata)
        ), "make sync"


def names(cells):
    """Global names that cells bind, and global names they read, in functions too."""

    def walk(table):
        for symbol in table.get_symbols():
            if table is top and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                read.add(symbol.get_name())
        for inner in table.get_children():
            walk(inner)

    bound, read = set(), set()
    for cell in cells:
        top = symtable.symtable(plain_python(cell.source), cell.id, "exec")
        walk(top)
    return bound, read


@pytest.mark.parametrize("name", NAMES)
def test_a_job_needs_no_cell_that_only_teaches(name):
    """Without the cells tagged `lesson`, no name is read that only they bind."""
    cells = code(read(name))
    teaching = [cell for cell in cells if "lesson" in cell.metadata.get("tags", [])]
    kept = [cell for cell in cells if cell not in teaching]
    assert not any(cell.source.startswith("#| export") for cell in teaching), (
        "what is exported belongs to the job"
    )
    missing = names(teaching)[0] - names(kept)[0]
    assert not missing & names(kept)[1]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    said = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, f"make format\n{said.stdout}{said.stderr}"


def test_the_tour_shows_a_beginner_little_code():
    open_cells = [
        cell.source
        for cell in code(read("tour"))
        if not {"engine", "figure"} & set(cell.metadata.get("tags", []))
    ]
    assert sum(len(source.splitlines()) for source in open_cells) < 120


@pytest.mark.parametrize(
    "name", [name for name in LESSONS if name not in WITHOUT_MODULE]
)
def test_lesson_has_its_parts(name):
    prose = "\n".join(
        cell.source for cell in read(name).cells if cell.cell_type == "markdown"
    )
    assert "## Against the library" in prose and "## Break it" in prose


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_has_exercises(name):
    notebook = read(name)
    assert len(read_exercises(notebook, name)) >= 2
    headings = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    ]
    numbered = [
        int(line.split()[2]) for line in headings if line.startswith("### Exercise ")
    ]
    assert numbered == list(range(1, len(numbered) + 1)) and "## Exercises" in headings
    sections = [line.lstrip("# ") for line in headings]
    for exercise in read_exercises(notebook, name).values():
        assert exercise.reread in sections, (
            f"{exercise.name} sends the reader to “{exercise.reread}”,"
            " which is no section"
        )


def test_modules_form_floors():
    """No module imports one of a later notebook, so that no circle can arise."""
    for place, name in enumerate(NAMES):
        path = ROOT / "bigmodel_nb" / f"{name}.py"
        if path.exists():
            later = {module_of(other) for other in NAMES[place:]}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    own = module_of(name).split(".")
                    parts = own[: len(own) - node.level] if node.level else []
                    assert ".".join([*parts, node.module or ""]) not in later, (
                        f"{name} imports {node.module}"
                    )


@pytest.mark.parametrize("name", NAMES)
def test_records_at_its_end(name):
    last = code(read(name))[-1].source
    assert "from bigmodel_nb.kit.record import record" in last or "record(" in last
    assert re.search(r"^record\(\"\w+\", ", last, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_imports_only_from_earlier_notebooks(name):
    earlier = {module_of(other) for other in NAMES[: NAMES.index(name)]}
    allowed = earlier | {"bigmodel_nb"}
    # what every notebook ends with: its exercises, its records
    if name.startswith("kit/"):
        allowed |= {"bigmodel_nb.kit.exercises", "bigmodel_nb.kit.record"}
    if name == "tour":  # written to be read first, run on everything
        allowed = {module_of(other) for other in NAMES}
    for cell in code(read(name)):
        # %magics become calls
        for node in ast.walk(ast.parse(plain_python(cell.source))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "bigmodel_nb"
            ):
                assert node.module in allowed, (
                    f"{node.module} comes later in the course"
                )


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_there_and_small(name):
    path = catalogue()[name]
    notebook, text = read(name), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 500_000
    assert "widgets" not in notebook.metadata
    assert all(cell.execution_count is None for cell in code(notebook))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)
    recorded = [
        output
        for output in outputs
        if "application/scrapbook.scrap.json+json" in output.get("data", {})
    ]
    assert recorded, "outputs of a whole run"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_alternative_text(name):
    outputs = [
        output
        for cell in code(read(name))
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert outputs, "at least one picture"
    for output in outputs:
        assert output.metadata.get("image/png", {}).get("alt"), (
            "every picture has alternative text"
        )


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(ROOT / "bigmodel_nb").as_posix()
)
def test_module_is_documented(path):
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    assert ast.get_docstring(tree), "the notebook's promise"
    assert "fastcore" not in source
    assert "nbdev" not in source.replace("nbdev. ", "").split("__all__")[1]
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
    ]
    methods = [
        member
        for node in public
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
    ]
    for node in public:
        assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in [
        node for node in public if isinstance(node, ast.FunctionDef)
    ] + methods:
        if node.name in ("forward",) and ast.get_docstring(node) is None:
            raise AssertionError(f"{node.name} has no docstring")
        arguments = [
            each
            for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if each.arg not in ("self", "cls")
        ]
        for each in arguments:
            assert each.annotation is not None, f"{node.name}: {each.arg} has no type"
            documented = (
                "#" in lines[each.lineno - 1]
                or (each.end_lineno and "#" in lines[each.end_lineno - 1])
                or "typer." in ast.unparse(each.annotation)
            )
            # methods that a framework calls have the framework's meaning
            assert documented or node.name.startswith("on_"), (
                f"{node.name}: {each.arg} is not documented"
            )
        assert node.returns is not None, f"{node.name} has no return type"


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    """A copy of the project in which everything generated was generated anew."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(
        ROOT / "nbs",
        folder / "nbs",
        ignore=shutil.ignore_patterns("*.py", ".ipynb_checkpoints", "runs", "model"),
    )
    (folder / "bigmodel_nb").mkdir()
    for file in ("settings.ini", "setup.py", "bigmodel_nb/__init__.py"):
        shutil.copy(ROOT / file, folder / file)
    script = (
        "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; "
        "nbdev_export(); nbdev_clean()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return folder


def test_modules_are_in_sync(made_again):
    files = {path.relative_to(ROOT) for path in (ROOT / "bigmodel_nb").rglob("*.py")}
    assert files == {
        path.relative_to(made_again)
        for path in (made_again / "bigmodel_nb").rglob("*.py")
    }, "make sync"
    for file in files:
        assert (made_again / file).read_text(encoding="utf-8") == (
            ROOT / file
        ).read_text(encoding="utf-8"), f"{file}: make sync"


def test_notebooks_are_clean(made_again):
    for name, path in catalogue().items():
        cleaned = made_again / path.relative_to(ROOT)
        assert json.loads(cleaned.read_text(encoding="utf-8")) == json.loads(
            path.read_text(encoding="utf-8")
        ), f"{name}: make sync"


def test_readme_lists_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, path in catalogue().items():
        said = declaration(name)
        place = path.relative_to(ROOT / "nbs").as_posix()
        row = (
            f"| [{name}](nbs/{place}) | {said.title} | {said.promise}"
            f" | {said.cost.rstrip('.')} |"
        )
        assert row in text, f"{name}: make sync"


def test_readme_is_in_sync():
    script = (
        "import sys; sys.path.insert(0, 'tools'); import sync; "
        "sys.stdout.buffer.write(sync.readme().encode())"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), "make sync"


def test_figures_of_readme_are_in_sync():
    script = (
        "import sys; sys.path.insert(0, 'tools'); import sync; "
        "print(all(file.read_bytes() == picture "
        "for file, picture in sync.covers().items()), len(sync.covers()))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert made == "True 2\n", "make sync"


def test_glossary_is_in_sync():
    assert glossary.PAGE.read_text(encoding="utf-8") == glossary.page(), "make sync"


def test_outputs_are_stale_once_code_has_changed(monkeypatch, tmp_path):
    """What has been committed meanwhile counts for nothing; prose and comments too."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import sync

    monkeypatch.setattr(sync, "reaches", lambda path: set())
    path = tmp_path / "a.ipynb"

    def changed(**sources):
        notebook = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_markdown_cell(sources.get("prose", "Why")),
                nbformat.v4.new_code_cell(
                    sources.get("code", "x = 1"),
                    outputs=[nbformat.v4.new_output("stream", text="1")],
                ),
            ],
            metadata={sync.DEPENDS: before} if before else {},
        )
        nbformat.write(notebook, path)
        return sync.is_stale(path)

    before = None
    assert changed(), "it never was run"
    before = sync.outputs_depend_on(path)
    assert not changed()
    assert not changed(prose="Because") and not changed(code="x = 1  # one")
    assert changed(code="x = 2") and changed(code="%time x = 1")


def test_no_term_is_introduced_twice():
    lessons = {}
    for term in glossary.all_terms():
        lessons.setdefault(term.term.lower(), []).append(term.lesson)
    assert not {term: where for term, where in lessons.items() if len(where) > 1}


@pytest.mark.parametrize("name", LESSONS)
def test_a_term_stands_in_italics_where_it_is_first_used(name):
    """A term that a lesson introduces is in italics where its prose first uses it.

    Headings and tables apart.
    """
    for term in glossary.terms_of(name):
        first = glossary.first_use(name, term.term)
        assert first is None or first.startswith("*"), (
            f"{term.term!r} is used before it is introduced: “{first}”"
        )


@pytest.mark.parametrize("name", NAMES)
def test_home_made_words_are_not_used(name):
    """Where the field has a word, the lesson has it too."""
    prose, _, _ = glossary.prose(catalogue()[name]).partition(glossary.HEADING)
    found = re.findall(r"\b(?:%s)\b" % "|".join(HOME_MADE), prose, re.IGNORECASE)
    assert not found, f"{found}: use the field's word"


@cache
def plain_python(source):
    return TransformerManager().transform_cell(source)  # %magics become calls


# A number with one of these units says how something came out, or how it was asked for.
CLAIM = re.compile(
    r"(?<![\w.$−^-])(\d[\d,]*(?:\.\d+)?)\s*(?:(%)|points\b|times\b|seconds?\b|[kMG]B\b|ms\b)"
)
CITED = re.compile(r"\b(?:19|20)\d\d\b")
LEVELS = {
    0.8,
    0.9,
    0.95,
    0.99,
    0.999,
}  # confidence, and what is left on one or two sides
KNOWN = {
    0.0,
    1.0,
    *LEVELS,
    *(round(k * (1 - x) / 2, 6) for x in LEVELS for k in (1, 2)),
}


def typed_claims(text, numbers):
    """Numbers with units in a text: no level, not cited, not in the code."""
    for sentence in re.split(r"(?<=[.!?:;]) (?=[A-Z*`])|\n", text):
        for number, percent in CLAIM.findall(
            "" if CITED.search(sentence) else sentence
        ):
            value = float(number.replace(",", ""))
            if not {value, round(value / 100, 6) if percent else value} & (
                numbers | KNOWN
            ):
                yield f"{number}{percent} in {sentence!r}"


def said_of_results(notebook):
    """What an author typed: prose, and the texts of titles and alternatives."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield re.sub(r"^(\*Measured on|\|).*$", "", cell.source, flags=re.MULTILINE)
    for source in map(plain_python, (cell.source for cell in code(notebook))):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.keyword) and node.arg in ("title", "alt"):
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def numbers_in_code(notebook):
    trees = [ast.parse(plain_python(cell.source)) for cell in code(notebook)]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {
        float(node.value)
        for node in nodes
        if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    }


def runs_out(png):
    """Whether a title, at the top of a picture, reaches its right border."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    grey = Image.alpha_composite(white, image).convert("L")
    end = grey.crop((grey.width - 6, 0, grey.width, 24))  # wider than a space
    return end.getextrema()[0] < 200


@pytest.mark.parametrize("name", NAMES)
def test_no_title_runs_out_of_its_picture(name):
    for cell in code(read(name)):
        for output in cell.outputs:
            png = output.get("data", {}).get("image/png")
            assert not (png and runs_out(png)), f"cut at the right:\n{cell.source}"


def test_a_title_that_runs_out_is_seen():
    seen = []
    for title in ("short", "a title that is much too long for one figure " * 3):
        made, _ = figure(title)
        seen.append(runs_out(base64.b64encode(png(made))))
    assert seen == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_results_are_not_typed(name):
    """A result in prose, a title or an alternative text is computed in the run.

    What may be typed: confidence levels, what a cited source says, what the code sets.
    """
    notebook = read(name)
    numbers = numbers_in_code(notebook)
    for text in said_of_results(notebook):
        assert not list(typed_claims(text, numbers))


def test_typed_results_are_told():
    told = "The net gets 97.5 % right. It takes 3 seconds."
    assert len(list(typed_claims(told, set()))) == 2
    assert list(typed_claims(told, {3.0})) == ["97.5% in 'The net gets 97.5 % right.'"]
    assert not list(
        typed_claims("In 95 % of all runs. Smith (2018) got 47.1 %.", set())
    )


def test_package_import_is_instant():
    script = (
        "import sys; before = set(sys.modules); import bigmodel_nb; "
        "print(len(set(sys.modules) - before))"
    )
    added = int(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
    )
    assert added < 5, "import bigmodel_nb imports nothing heavy"


def test_wheel_holds_notebooks_and_data(tmp_path):
    from zipfile import ZipFile

    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "runs", "*.egg-info", "tests"
        ),
    )
    pip = "-m pip wheel --no-deps --no-build-isolation --wheel-dir".split()
    command = [sys.executable, *pip, str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    for path in catalogue().values():
        assert f"bigmodel_nb/nbs/{path.relative_to(ROOT / 'nbs').as_posix()}" in names
    assert "bigmodel_nb/data/files/reviews.csv" in names
    assert "bigmodel_nb/data/files/reviews.md" in names
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "tools/"))
        or name.endswith(".py")
        and "/nbs/" in name
    ]


def test_locked_versions_install_on_the_oldest_python():
    """Locked versions that are installed here take the oldest Python promised.

    That is its first patch release.
    """
    oldest = (
        re.search(
            r"^min_python *= *(\S+)",
            (ROOT / "settings.ini").read_text(encoding="utf-8"),
            re.MULTILINE,
        ).group(1)
        + ".0"
    )
    lock = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
    checked, refused = 0, []
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version != version:
            continue
        checked += 1
        if not SpecifierSet(found.metadata.get("Requires-Python") or "").contains(
            oldest
        ):
            refused.append(
                f"{name} {version} needs Python {found.metadata['Requires-Python']}"
            )
    assert not refused
    if not checked:
        pytest.skip("none of the locked versions is installed here")


def test_two_lessons_of_a_folder_save_into_two_folders():
    """Both are run in one folder in JupyterLab, and no one replaces the other's."""
    places = {}
    for name, path in catalogue().items():
        saved = declaration(name).parameters.get("save_to")
        if saved:
            places.setdefault((path.parent, saved.default), []).append(name)
    assert len(places) > 2
    assert not [names for names in places.values() if len(names) > 1]
