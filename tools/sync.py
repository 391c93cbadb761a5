"""Bring modules, outputs and README in line with the notebooks: `make sync`.

Exports every notebook's module; runs the notebooks whose code, or a module that they
import, or bundled files that they read have changed since their last run (or those
named, or --all), from top to bottom in a fresh kernel, and stores their outputs and
measured cost; writes what lets each be opened elsewhere, a cell for
Colab and the links; cleans; writes README.md with its figures, and the glossary.
"""

import argparse
import ast
import base64
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import glossary
import nbformat
from check import code, module_path, reaches
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.headless.run import RunFailed, run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
INDEX = NOTEBOOKS / "index.ipynb"
DATA = ROOT / "bigmodel_nb" / "data" / "files"
DEPENDS = "outputs_depend_on"  # key of a notebook's metadata
READER = {"course": "07_instruct"}  # notebooks of files that data.sources does not read
COST = re.compile(r"^\*Measured on 2 CPU cores: .*\*$", re.MULTILINE)
LINKS = re.compile(r"^\[Open in Colab\]\(.*$\n?", re.MULTILINE)
BINDER_GIGABYTES = (
    1.7  # what a notebook may take on Binder, whose 2 GB hold JupyterLab too
)
VIEW = "application/vnd.jupyter.widget-view+json"
FOLDED = {"engine", "figure"}  # tags of cells that a reader opens on demand
KERNEL = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
}


def sources(notebook: dict) -> list[tuple[str, str]]:
    """Kind and text of each cell, apart from the measured cost and the links."""
    return [
        (
            cell["cell_type"],
            LINKS.sub("", COST.sub("", "".join(cell["source"]))).strip(),
        )
        for cell in notebook["cells"]
    ]


def committed(path: Path) -> dict | None:
    """The notebook as it stands in the last commit."""
    shown = subprocess.run(
        ["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return json.loads(shown.stdout) if shown.returncode == 0 else None


@cache
def without_docstrings(source: str) -> str:
    """What Python does with a module, whatever its comments and docstrings say."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def outputs_depend_on(path: Path) -> str:
    """A fingerprint of what decides a notebook's outputs.

    Its own code, the modules that it imports, through others too, and the bundled
    files.
    """
    notebook, modules = nbformat.read(path, as_version=4), sorted(reaches(path))
    written = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    written = [TransformerManager().transform_cell(cell) for cell in written]
    written += [code(module_path(module)) for module in modules]
    parts = [without_docstrings(source) for source in written]
    if "data.sources" in modules:  # which reads them
        parts += [
            file.read_text(encoding="utf-8")
            for file in sorted(DATA.iterdir())
            if READER.get(file.stem, path.stem) == path.stem
        ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def is_stale(path: Path) -> bool:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if not any(cell.get("outputs") for cell in notebook["cells"]):
        return True
    if path == INDEX:  # its outputs are words alone
        before = committed(path)
        return before is None or sources(notebook) != sources(before)
    return notebook["metadata"].get(DEPENDS) != outputs_depend_on(path)


def cost(seconds: float, megabytes: float) -> str:
    """The measured cost in words, rounded so that two runs agree."""
    step = 5 if seconds < 60 else 15
    rounded = max(step, step * round(seconds / step))
    return f"*Measured on 2 CPU cores: {rounded} s, {megabytes / 1000:.1f} GB.*"


def services() -> dict[str, str]:
    """Where each service opens a file of this project; the file's path is to follow."""
    project = get_config()
    place = f"{project.user}/{project.repo}"
    return {
        "Colab": f"https://colab.research.google.com/github/{place}/blob/{project.branch}/",
        "Binder": f"https://mybinder.org/v2/gh/{place}/{project.branch}?urlpath=lab/tree/",
        "Codespaces": f"https://codespaces.new/{place}",
    }


def setup() -> str:
    """The first cell of a notebook: on Colab it installs the package, else nothing."""
    project = get_config()
    raw = f"https://raw.githubusercontent.com/{project.user}/{project.repo}/{project.branch}"
    return (
        'import sys\n\nif "google.colab" in sys.modules:  # which lacks this package\n'
        f"    %pip install -q --no-deps -r {raw}/requirements/colab.txt"
    )


def links(path: Path, gigabytes: float) -> str:
    """Where else the notebook can be opened, and the glossary.

    Binder is named if the notebook fits into the memory there.
    """
    place, address = path.relative_to(ROOT).as_posix(), services()
    found = [f"[Open in Colab]({address['Colab']}{place})"]
    if gigabytes <= BINDER_GIGABYTES:
        found.append(f"[Binder]({address['Binder']}{place})")
    way = Path(os.path.relpath(glossary.PAGE, path.parent)).as_posix()
    return " · ".join([*found, f"[Glossary]({way})"])


def open_anywhere(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Write the cell for Colab, and the links below the measured cost."""
    if notebook.cells[0].cell_type == "markdown":  # the tour has no module
        notebook.cells.insert(0, nbformat.v4.new_code_cell())
    directives = [
        line for line in notebook.cells[0].source.splitlines() if line.startswith("#|")
    ]
    notebook.cells[0].source = "\n".join([*directives, setup()])
    notebook.cells[0].metadata.tags = sorted(
        {*notebook.cells[0].metadata.get("tags", []), "engine"}
    )
    prose = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    measured = COST.search(prose.source)
    if not measured:
        sys.exit(
            f"{path}: its opening has no line {cost(5, 100)!r},"
            " which the run keeps true"
        )
    line = links(path, float(re.search(r"([\d.]+) GB", measured.group()).group(1)))
    prose.source = COST.sub(
        f"{measured.group()}\n{line}", LINKS.sub("", prose.source)
    ).strip()


def fold(notebook: nbformat.NotebookNode) -> None:
    """Fold the source of cells tagged `engine` or `figure`; others stand open.

    So it is in JupyterLab, in Colab and on the site.
    """
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "hide-input"]
        for key in ("jupyter", "cellView"):
            cell.metadata.pop(key, None)
        if FOLDED & set(tags):
            tags.append("hide-input")
            cell.metadata.update(jupyter={"source_hidden": True}, cellView="form")
        if tags or "tags" in cell.metadata:
            cell.metadata.tags = tags


def without_views(outputs: list) -> list:
    """Outputs as a reader without a kernel needs them.

    Where an image stands beside the view of a widget, the image.
    """
    for output in outputs:
        if "image/png" in output.get("data", {}):
            output["data"].pop(VIEW, None)
    return outputs


def execute(name: str, path: Path) -> None:
    """Run the notebook and store outputs and cost in it."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(name, out=folder)
        executed = nbformat.read(done.notebook, as_version=4)
    source = nbformat.read(path, as_version=4)
    outputs = {
        cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"
    }
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs = without_views(outputs[cell.id])
        else:
            cell.source = COST.sub(cost(done.seconds, done.peak_memory), cell.source)
    if path != INDEX:
        open_anywhere(path, source)
    fold(source)
    nbformat.write(source, path)
    if path != INDEX:
        source.metadata[DEPENDS] = outputs_depend_on(path)
        nbformat.write(source, path)


def covers() -> dict[Path, bytes]:
    """The figures that README shows, the tour's cells tagged `cover`, by path."""
    tagged = [
        cell
        for cell in nbformat.read(catalogue()["tour"], as_version=4).cells
        if "cover" in cell.metadata.get("tags", [])
    ]
    pictures = [
        next(
            each.data["image/png"]
            for each in cell.outputs
            if "image/png" in each.get("data", {})
        )
        for cell in tagged
    ]
    return {
        ROOT / "docs" / "_static" / f"cover-{place}.png": base64.b64decode(picture)
        for place, picture in enumerate(pictures, 1)
    }


def badges() -> str:
    """Pictures that open the first lesson in Colab and Binder, all in Codespaces."""
    address, lesson = services(), "nbs/02_foundations/01_losses.ipynb"
    pictures = {
        "Colab": (
            "https://colab.research.google.com/assets/colab-badge.svg",
            "nbs/tour.ipynb",
        ),
        "Binder": ("https://mybinder.org/badge_logo.svg", lesson),
        "Codespaces": ("https://github.com/codespaces/badge.svg", ""),
    }
    return "\n".join(
        f"[![Open in {name}]({picture})]({address[name]}{place})"
        for name, (picture, place) in pictures.items()
    )


def readme() -> str:
    """The text of README.md: prose, code and displayed text of nbs/index.ipynb.

    Badges stand below the title: here only, since pictures of other sites would be
    fetched by whoever opens the notebook.
    """
    parts = []
    for cell in nbformat.read(INDEX, as_version=4).cells:
        hidden = cell.source.startswith("#|")
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif not hidden:
            parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts.append(
                data.get("text/markdown")
                or f"```\n{output.get('text') or data.get('text/plain', '')}\n```"
            )
    text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    return re.sub(
        r"^# .*$",
        lambda title: f"{title.group()}\n\n{badges()}",
        text,
        count=1,
        flags=re.MULTILINE,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="notebooks to run, such as robust/attacks"
    )
    parser.add_argument("--all", action="store_true", help="run every notebook")
    chosen = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    everything = {**catalogue(), "index": INDEX}
    for name in chosen.names:
        if name not in everything:
            near = difflib.get_close_matches(name, everything, 1, 0.0)
            parser.error(f"names has {name!r}; the nearest notebook is {near[0]}")
    for path in everything.values():
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.update(KERNEL)
        if path != INDEX:
            open_anywhere(path, notebook)
        fold(notebook)
        nbformat.write(notebook, path)
    nbdev_export()
    names = chosen.names or [
        name for name, path in everything.items() if chosen.all or is_stale(path)
    ]
    # the index shows what the others cost
    for name in [*(each for each in names if each != "index"), "index"]:
        print(f"running {name}", flush=True)
        try:
            execute(name if name != "index" else str(INDEX), everything[name])
        except RunFailed as failure:
            print(f"{name}: {failure}", file=sys.stderr)
            return 1
    nbdev_clean()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    for file, picture in covers().items():
        file.write_bytes(picture)
    glossary.PAGE.write_text(glossary.page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
