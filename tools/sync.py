"""Bring modules, outputs and README in line with the notebooks: `make sync`.

Exports every notebook's module; runs the notebooks whose cells differ from the last commit (or those named, or --all)
from top to bottom in a fresh kernel, and stores their outputs and measured cost; cleans; writes README.md.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.headless.run import RunFailed, run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
INDEX = NOTEBOOKS / "index.ipynb"
COST = re.compile(r"^\*Measured on 2 CPU cores: .*\*$", re.MULTILINE)
VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


def sources(notebook: dict) -> list[tuple[str, str]]:
    """What a reader wrote: kind and text of each cell, the measured cost apart."""
    return [(cell["cell_type"], COST.sub("", "".join(cell["source"]))) for cell in notebook["cells"]]


def committed(path: Path) -> dict | None:
    """The notebook as it stands in the last commit."""
    shown = subprocess.run(["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"], cwd=ROOT, capture_output=True, text=True)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def is_stale(path: Path) -> bool:
    notebook, before = json.loads(path.read_text(encoding="utf-8")), committed(path)
    has_outputs = any(cell.get("outputs") for cell in notebook["cells"])
    return before is None or not has_outputs or sources(notebook) != sources(before)


def cost(seconds: float, megabytes: float) -> str:
    """The measured cost in words, rounded so that two runs agree."""
    step = 5 if seconds < 60 else 15
    return f"*Measured on 2 CPU cores: {max(step, step * round(seconds / step))} s, {megabytes / 1000:.1f} GB.*"


def without_views(outputs: list) -> list:
    """Outputs as a reader without a kernel needs them: where an image stands beside the view of a widget, the image."""
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
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs = without_views(outputs[cell.id])
        else:
            cell.source = COST.sub(cost(done.seconds, done.peak_memory), cell.source)
    nbformat.write(source, path)


def readme() -> str:
    """The text of README.md, from nbs/index.ipynb: its prose, its code and the text that the code displays."""
    parts = []
    for cell in nbformat.read(INDEX, as_version=4).cells:
        hidden = cell.source.startswith("#|")
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif not hidden:
            parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts.append(data.get("text/markdown") or f"```\n{output.get('text') or data.get('text/plain', '')}\n```")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run, such as robust/attacks")
    parser.add_argument("--all", action="store_true", help="run every notebook")
    chosen = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    everything = {**catalogue(), "index": INDEX}
    for path in everything.values():
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.update(KERNEL)
        nbformat.write(notebook, path)
    nbdev_export()
    names = chosen.names or [name for name, path in everything.items() if chosen.all or is_stale(path)]
    for name in [*(each for each in names if each != "index"), "index"]:  # the index shows what the others cost
        print(f"running {name}", flush=True)
        try:
            execute(name if name != "index" else str(INDEX), everything[name])
        except RunFailed as failure:
            print(f"{name}: {failure}", file=sys.stderr)
            return 1
    nbdev_clean()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
