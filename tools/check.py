"""Run what a change can affect: `make check`.

Files that differ from a commit (the last one, or BASE) are followed along the imports:
a changed notebook is run, so are those that import its module, the cheapest first,
while their measured costs stay within a bound; test files that reach a changed module
are run, and structure, export and lint always. What is left to `make test` is named.
"""

import argparse
import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from bigmodel_nb.headless.parameters import catalogue, declaration

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ALWAYS = ["tests/test_structure.py", "tests/test_exercises.py"]
SECONDS = 120  # for notebooks that only import what changed


def imports(source: str, module: str = "") -> set[str]:
    """The modules of bigmodel_nb that a text of Python imports, such as "kit.core".

    Relative ones are as seen from `module`.
    """
    found = set()
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {
        name.removeprefix("bigmodel_nb.")
        for name in found
        if name.startswith("bigmodel_nb.")
    }


def code(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def module_path(module: str) -> Path:
    return ROOT / "bigmodel_nb" / f"{module.replace('.', '/')}.py"


@cache
def graph() -> dict[str, set[str]]:
    """The modules that the cells of each lesson import, through other modules too.

    A lesson is called "chapter.name".
    """
    names = [name.replace("/", ".") for name in catalogue()]
    modules = {
        name: imports(code(module_path(name)), f"bigmodel_nb.{name}") & set(names)
        for name in names
        if module_path(name).exists()
    }
    for name in modules:  # in the order of the course: a module stands on earlier ones
        modules[name] |= set().union(*(modules[other] for other in modules[name]))
    found = {}
    for name, path in zip(names, catalogue().values()):
        asked = imports(code(path)) & set(modules) - {name}
        found[name] = (asked | modules.get(name, set())).union(
            *(modules[other] for other in asked)
        )
    return found


def reaches(path: Path) -> set[str]:
    """The modules that decide what a notebook shows: all that it imports in the end."""
    name = next(name for name, place in catalogue().items() if place == path)
    return graph()[name.replace("/", ".")]


def changed_files(base: str) -> list[Path]:
    """What differs from a commit, what git does not know yet included."""
    commands = (
        ["git", "diff", "--name-only", base],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    listed = [
        subprocess.run(
            each, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for each in commands
    ]
    return [ROOT / name for names in listed for name in names]


def seconds(name: str) -> float:
    return float(re.search(r"([\d.]+) s", declaration(name.replace(".", "/")).cost)[1])


def plan(changed: list[Path]) -> tuple[list[str], list[str], list[str]]:
    """Notebooks to run, test files to run, notebooks left to `make test`."""
    places = {path: name.replace("/", ".") for name, path in catalogue().items()}
    stands_on = graph()
    touched = {places[path] for path in changed if path in places}
    reach = [
        name for name in stands_on if stands_on[name] & touched and name not in touched
    ]
    chosen, left, spent = sorted(touched, key=list(stands_on).index), [], 0.0
    for name in sorted(reach, key=seconds):
        spent += seconds(name)
        (chosen if spent <= SECONDS else left).append(name)
    chapters = {name.split(".")[0] for name in touched}
    files = [
        path
        for path in sorted(TESTS.glob("test_*.py"))
        if path.name != "test_notebooks.py"
    ]
    affected = [
        path
        for path in files
        if path in changed
        or any(path.name.startswith(f"test_{chapter}") for chapter in chapters)
        and imports(code(path)) & (touched | set(reach))
    ]
    names = [path.relative_to(ROOT).as_posix() for path in affected]
    return (
        [name.replace(".", "/") for name in chosen],
        [*ALWAYS, *(name for name in names if name not in ALWAYS)],
        left,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "base",
        nargs="?",
        default="HEAD",
        help="the commit with which files are compared",
    )
    parser.add_argument("--workers", default="2")
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be run"
    )
    chosen = parser.parse_args()
    notebooks, files, left = plan(changed_files(chosen.base))
    print("notebooks:", *notebooks or ["none"])
    print("tests:", *files)
    if left:
        print("left to make test:", *left)
    if chosen.plan:
        return 0
    lint = [sys.executable, "-m", "ruff"]
    tests = [
        f"tests/test_notebooks.py::test_notebook_runs_and_finds_what_it_claims[{name}]"
        for name in notebooks
    ]
    options = "--dist worksteal --durations 10".split()
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", chosen.workers, *options]
    return max(
        subprocess.run(each, cwd=ROOT).returncode
        for each in (
            [*lint, "check"],
            [*lint, "format", "--check"],
            [*pytest, *files, *tests],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
