"""Each notebook has the anatomy of the course, each module its documentation, and both say the same."""
import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.specifiers import SpecifierSet

from bigmodel_nb.headless.parameters import catalogue, declaration, read_parameters
from bigmodel_nb.kit.exercises import read_exercises

ROOT = Path(__file__).resolve().parent.parent
NAMES = list(catalogue())
PLACE = "bigmodel-nb/bigmodel_nb"
SETUP = f"""import sys
if "google.colab" in sys.modules:  # which lacks this package
    %pip install -q --no-deps -r https://raw.githubusercontent.com/{PLACE}/main/requirements/colab.txt"""
WITHOUT_MODULE = ("tour", "foundations/reading")  # they teach nothing that could be imported
LESSONS = [name for name in NAMES if name != "tour"]
MODULES = sorted(path for path in (ROOT / "bigmodel_nb").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|private|var/folders)/")


def read(name):
    return nbformat.read(catalogue()[name], as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def module_of(name):
    return "bigmodel_nb." + name.replace("/", ".")


@pytest.mark.parametrize("name", NAMES)
def test_opening(name):
    cells = read(name).cells
    prose = next(cell.source for cell in cells if cell.cell_type == "markdown")
    directive = "" if name in WITHOUT_MODULE else f"#| default_exp {name.replace('/', '.')}\n"
    assert cells[0].source == directive + SETUP, "make sync"
    assert re.match(r"# .+\n\n> .+[.]\n", prose), "a title, then a promise"
    assert re.search(r"^\*Measured on 2 CPU cores: \d+ s, [\d.]+ GB\.\*$", prose, re.MULTILINE), "the measured cost"
    for heading in ("You need", "Stands on", "On a GPU"):
        assert f"**{heading}**" in prose, heading


@pytest.mark.parametrize("name", NAMES)
def test_opens_elsewhere(name):
    """The links below the measured cost open this very notebook; Binder only where 2 GB hold it and JupyterLab."""
    prose = next(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    gigabytes, line = re.search(r"^\*Measured on .*, ([\d.]+) GB\.\*\n(.+)$", prose, re.MULTILINE).groups()
    path = catalogue()[name].relative_to(ROOT).as_posix()
    allowed = f"[Open in Colab](https://colab.research.google.com/github/{PLACE}/blob/main/{path})"
    if float(gigabytes) < 1.75:
        allowed += f" · [Binder](https://mybinder.org/v2/gh/{PLACE}/main?urlpath=lab/tree/{path})"
    assert line == allowed, "make sync"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_cell(name):
    notebook = read(name)
    tagged = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = [node for node in ast.parse(tagged[0].source).body if not isinstance(node, ast.ImportFrom)]
    assert all(isinstance(node, ast.AnnAssign) for node in statements), "every parameter has a type"
    parameters = read_parameters(notebook)
    assert parameters["budget"].choices == ("quick", "full") and parameters["budget"].default == "quick"
    assert parameters["seed"].type == "int" and parameters["seed"].default == 0
    assert all(parameter.help for parameter in parameters.values()), "every parameter says what it is"


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_explained(name):
    notebook = read(name)
    teaching = [cell.source for cell in code(notebook) if not cell.source.startswith("#|")]
    exported = [cell.source for cell in code(notebook) if cell.source.startswith("#|")]
    lines = sorted(len(source.splitlines()) for source in teaching)
    assert lines[-1] <= 25, "no teaching cell over 25 lines"
    assert lines[len(lines) // 2] <= 12, "most teaching cells under 12 lines"
    assert all(len(source.splitlines()) <= 55 for source in exported), "a class in one cell at the most"
    assert all(len(line) <= 120 for source in teaching + exported for line in source.splitlines()), "lines fit a page"
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words >= 10 * len(code(notebook)), "prose says why"


@pytest.mark.parametrize("name", [name for name in LESSONS if name not in WITHOUT_MODULE])
def test_lesson_has_its_parts(name):
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert "## Against the library" in prose and "## Break it" in prose


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_has_exercises(name):
    notebook = read(name)
    assert len(read_exercises(notebook, name)) >= 2
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines() if line.startswith("#")]
    numbered = [int(line.split()[2]) for line in headings if line.startswith("### Exercise ")]
    assert numbered == list(range(1, len(numbered) + 1)) and "## Exercises" in headings
    sections = [line.lstrip("# ") for line in headings]
    for exercise in read_exercises(notebook, name).values():
        assert exercise.reread in sections, f"{exercise.name} sends the reader to “{exercise.reread}”, which is no section"


def test_modules_form_floors():
    """No module imports one of a later notebook, so the modules have an order and never a circle."""
    for place, name in enumerate(NAMES):
        path = ROOT / "bigmodel_nb" / f"{name}.py"
        if path.exists():
            later = {module_of(other) for other in NAMES[place:]}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    parts = module_of(name).split(".")[: -node.level]
                    assert ".".join([*parts, node.module]) not in later, f"{name} imports {node.module}"


@pytest.mark.parametrize("name", NAMES)
def test_records_at_its_end(name):
    last = code(read(name))[-1].source
    assert "from bigmodel_nb.kit.record import record" in last or "record(" in last
    assert re.search(r"^record\(\"\w+\", ", last, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_imports_only_from_earlier_notebooks(name):
    earlier = {module_of(other) for other in NAMES[: NAMES.index(name)]}
    allowed = earlier | {"bigmodel_nb"}
    if name.startswith("kit/"):  # what every notebook ends with: its exercises, its records
        allowed |= {"bigmodel_nb.kit.exercises", "bigmodel_nb.kit.record"}
    if name == "tour":  # written to be read first, run on everything
        allowed = {module_of(other) for other in NAMES}
    for cell in code(read(name)):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):  # %magics become calls
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigmodel_nb"):
                assert node.module in allowed, f"{node.module} comes later in the course"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_there_and_small(name):
    path = catalogue()[name]
    notebook, text = read(name), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 500_000
    assert "widgets" not in notebook.metadata
    assert all(cell.execution_count is None for cell in code(notebook))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)
    recorded = [output for output in outputs if "application/scrapbook.scrap.json+json" in output.get("data", {})]
    assert recorded, "outputs of a whole run"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_alternative_text(name):
    outputs = [output for cell in code(read(name)) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert outputs, "at least one picture"
    for output in outputs:
        assert output.metadata.get("image/png", {}).get("alt"), "every picture has alternative text"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / "bigmodel_nb").as_posix())
def test_module_is_documented(path):
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    assert ast.get_docstring(tree), "the notebook's promise"
    assert "fastcore" not in source and "nbdev" not in source.replace("nbdev. ", "").split("__all__")[1]
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    methods = [member for node in public if isinstance(node, ast.ClassDef) for member in node.body
               if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")]
    for node in public:
        assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in [node for node in public if isinstance(node, ast.FunctionDef)] + methods:
        if node.name in ("forward",) and ast.get_docstring(node) is None:
            raise AssertionError(f"{node.name} has no docstring")
        arguments = [each for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if each.arg not in ("self", "cls")]
        for each in arguments:
            assert each.annotation is not None, f"{node.name}: {each.arg} has no type"
            documented = "#" in lines[each.lineno - 1] or (each.end_lineno and "#" in lines[each.end_lineno - 1]) or "typer." in ast.unparse(each.annotation)
            # methods that a framework calls have the framework's meaning
            assert documented or node.name.startswith("on_"), f"{node.name}: {each.arg} is not documented"
        assert node.returns is not None, f"{node.name} has no return type"


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    """A copy of the project in which everything generated was generated anew."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns("*.py", ".ipynb_checkpoints", "runs", "model"))
    (folder / "bigmodel_nb").mkdir()
    for file in ("settings.ini", "setup.py", "bigmodel_nb/__init__.py"):
        shutil.copy(ROOT / file, folder / file)
    script = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return folder


def test_modules_are_in_sync(made_again):
    files = {path.relative_to(ROOT) for path in (ROOT / "bigmodel_nb").rglob("*.py")}
    assert files == {path.relative_to(made_again) for path in (made_again / "bigmodel_nb").rglob("*.py")}, "make sync"
    for file in files:
        assert (made_again / file).read_text(encoding="utf-8") == (ROOT / file).read_text(encoding="utf-8"), f"{file}: make sync"


def test_notebooks_are_clean(made_again):
    for name, path in catalogue().items():
        cleaned = made_again / path.relative_to(ROOT)
        assert json.loads(cleaned.read_text(encoding="utf-8")) == json.loads(path.read_text(encoding="utf-8")), f"{name}: make sync"


def test_readme_lists_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, path in catalogue().items():
        said = declaration(name)
        row = f"| [{name}](nbs/{path.relative_to(ROOT / 'nbs').as_posix()}) | {said.title} | {said.promise} | {said.cost.rstrip('.')} |"
        assert row in text, f"{name}: make sync"


def test_readme_is_in_sync():
    script = "import sys; sys.path.insert(0, 'tools'); import sync; sys.stdout.buffer.write(sync.readme().encode())"
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), "make sync"


def test_package_import_is_instant():
    script = "import sys; before = set(sys.modules); import bigmodel_nb; print(len(set(sys.modules) - before))"
    added = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert added < 5, "import bigmodel_nb imports nothing heavy"


def test_wheel_holds_notebooks_and_data(tmp_path):
    from zipfile import ZipFile

    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "tests"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
                   check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    for path in catalogue().values():
        assert f"bigmodel_nb/nbs/{path.relative_to(ROOT / 'nbs').as_posix()}" in names
    assert "bigmodel_nb/data/files/reviews.csv" in names and "bigmodel_nb/data/files/reviews.md" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/")) or name.endswith(".py") and "/nbs/" in name]


def test_locked_versions_install_on_the_oldest_python():
    """Each version of the lock file that is installed here takes the first patch release of the oldest Python promised."""
    oldest = re.search(r"^min_python *= *(\S+)", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE).group(1) + ".0"
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
        if not SpecifierSet(found.metadata.get("Requires-Python") or "").contains(oldest):
            refused.append(f"{name} {version} needs Python {found.metadata['Requires-Python']}")
    assert not refused
    if not checked:
        pytest.skip("none of the locked versions is installed here")
