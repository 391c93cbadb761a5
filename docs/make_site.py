"""Build the course as a site: `make site`.

The pages are the notebooks as committed, an index with the map of the course, and a
page for each module. They are written into a temporary folder, from which Sphinx makes
the site; a warning is an error.
"""

import argparse
import re
import shutil
import sys
import tempfile
from configparser import ConfigParser
from functools import cache
from html import escape
from importlib import import_module
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

from bigmodel_nb.headless.parameters import declaration
from bigmodel_nb.kit import exercises

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NOTEBOOKS = exercises.notebooks_folder()
catalogue = cache(exercises.catalogue)  # asked for each link
SCRAP = "application/scrapbook.scrap.json+json"
CHAPTERS = {
    "kit": "What every notebook stands on: device and seeds, pictures, recorded"
    " results, exercises, things to move.",
    "data": "From raw rows to batches: collect, clean, check, split.",
    "foundations": "The mathematics: the loss, backpropagation, optimisation.",
    "models": "The networks: layers, real files, language, images, and what makes"
    " them large.",
    "training": "Fit, watch, debug, go fast, go wide.",
    "adapting": "Transfer learning: what a pretrained model knows, used as it is and"
    " fine-tuned on data of your own.",
    "robust": "Adversarial examples, and what really stops them.",
    "explain": "Why the model said that.",
    "shipping": "Smaller, portable, behind an endpoint.",
    "apps": "The applications, made of the floors below.",
    "headless": "Notebooks that run without hands: parameters, records, reports,"
    " sweeps.",
}


def git_url() -> str:
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["git_url"]


def chapters() -> dict[str, list[str]]:
    """Each chapter's notebooks by name, from the ground floor up, without the tour."""
    found = {}
    for name in catalogue():
        if "/" in name:
            found.setdefault(name.split("/")[0], []).append(name)
    if unknown := set(found) - set(CHAPTERS):
        raise SystemExit(
            "docs/make_site.py: CHAPTERS does not say"
            f" what {sorted(unknown)[0]!r} is about"
        )
    return found


def address(name: str, suffix: str) -> str:
    """Where a notebook lies, in nbs/ and likewise, with its suffix, on the site."""
    return catalogue()[name].relative_to(NOTEBOOKS).with_suffix(suffix).as_posix()


def floor(chapter: str) -> str:
    return str(int(address(chapters()[chapter][0], "").split("_")[0]))


def module_of(name: str) -> str | None:
    return (
        name.replace("/", ".")
        if (ROOT / "bigmodel_nb" / f"{name}.py").exists()
        else None
    )


# The pages


def notebook_page(
    notebook: nbformat.NotebookNode, top: str = ""
) -> nbformat.NotebookNode:
    """A notebook as readers see it; names of notebooks are links from `top`.

    It has no directives to nbdev, no cell for Colab and no records.
    """
    names = {name: address(name, ".ipynb") for name in catalogue() if "/" in name}

    def linked(found: re.Match) -> str:
        return (
            f"[{found[0]}]({top}{names[found[1]]})" if found[1] in names else found[0]
        )

    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(?<!\[)`([\w/]+)`", linked, cell.source)
        if cell.cell_type == "code":
            if (
                re.match(r"#\| *hide\b", cell.source)
                or '"google.colab" in sys.modules' in cell.source
            ):
                continue
            cell.source = re.sub(r"\A(#\|.*(\n|\Z))+", "", cell.source)
            cell.outputs = [
                output
                for output in cell.outputs
                if set(output.get("data", {"": ""})) != {SCRAP}
            ]
            if "hide-input" in cell.metadata.get("tags", []):
                cell.metadata["mystnb"] = {
                    "code_prompt_show": fold_name(cell),
                    "code_prompt_hide": fold_name(cell),
                }
        if cell.source.strip():
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def fold_name(cell: nbformat.NotebookNode) -> str:
    """What stands on the fold of a cell: what it defines, or that it draws."""
    defined = re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE)
    public = [name for name in defined if not name.startswith("_")] or defined
    if "figure" in cell.metadata.tags or not public:
        return "The code of this figure" if "figure" in cell.metadata.tags else "Code"
    return "Code: " + ", ".join(public)


def links(name: str, top: str) -> str:
    """The line from a notebook to its module, its command, its file, the glossary."""
    module, path = module_of(name), address(name, ".ipynb")
    found = (
        [f"**Module** [`bigmodel_nb.{module}`]({top}api/{module}.md)"] if module else []
    )
    found += [
        f"**Run** `bigmodel run {name}`",
        f"**File** [{path.split('/')[-1]}]({git_url()}/blob/main/nbs/{path})",
    ]
    found.append(f"**Words** [glossary]({top}glossary.md)")
    return ". ".join(found) + "."


def module_page(name: str) -> str:
    module, said = module_of(name), declaration(name)
    return (
        f"# {module}\n\n**Notebook** [{said.title}](../{address(name, '.ipynb')}).\n\n"
        f"```{{eval-rst}}\n.. automodule:: bigmodel_nb.{module}\n```\n"
    )


def course_map() -> str:
    """The floors of the course, the top one first, as on a drawing of a house."""
    lines = [
        '<nav class="house" aria-label="Map of the course">',
        f'<a class="lift" href="{address("tour", ".html")}">',
        "<strong>tour</strong><span>the whole way in one sitting</span></a>",
        "<ol reversed>",
    ]
    for chapter, names in reversed(chapters().items()):
        rooms = [
            f'<li><a href="{address(name, ".html")}">'
            f"{escape(name.split('/')[1])}</a></li>"
            for name in names
        ]
        lines += [
            f'<li><span class="floor"><span class="level">{floor(chapter)}</span>'
            f" {escape(chapter)}</span>",
            f"<ul>{''.join(rooms)}</ul></li>",
        ]
    return "\n".join([*lines, "</ol>", "</nav>"])


def listing(name: str) -> str:
    said = declaration(name)
    lines = [
        f"- **[{said.title}]({address(name, '.ipynb')})**",
        said.promise,
        f"*`{name}`, {said.cost.rstrip('.')}*",
    ]
    return "  \n  ".join(lines)


def toctree(pages: list[str], caption: str = "") -> str:
    head = [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", ":hidden:", *head, "", *pages, "```"])


def outward(markdown: str) -> str:
    """Links to files that are no pages of the site lead to the repository."""

    def lead(found: re.Match) -> str:
        target = found[1]
        if target.startswith("nbs/") or target.startswith("docs/_static/"):
            return f"]({target.removeprefix('nbs/').removeprefix('docs/')})"
        outside = target != "CONTRIBUTING.md" and (ROOT / target).exists()
        return f"]({git_url()}/blob/main/{target})" if outside else found[0]

    return re.sub(r"\]\(([\w./-]+)\)", lead, markdown)


def index_page() -> str:
    """The prose of nbs/index.ipynb, with the map where its table stands."""
    cells = nbformat.read(NOTEBOOKS / "index.ipynb", as_version=4).cells
    figures = [
        output.data["text/markdown"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "![" in output.data["text/markdown"]
    ]
    written = [cell.source for cell in cells if cell.cell_type == "markdown"]
    prose = outward("\n\n".join([written[0], *figures, *written[1:]]))
    opening, paths, rest = prose.replace("## The course\n", "").split("\n## ", 2)
    parts = [
        opening,
        f"## {paths}",
        "## The course",
        "Read the house from the ground up: "
        "a notebook stands only on notebooks before it.",
        course_map(),
        "What a run costs is measured on 2 CPU cores.",
        listing("tour"),
    ]
    trees = [toctree([address("tour", "")])]
    for chapter, names in chapters().items():
        caption = f"{floor(chapter)} · {chapter.capitalize()}"
        parts += [
            f"### {caption}",
            CHAPTERS[chapter],
            "\n".join(listing(name) for name in names),
        ]
        trees.append(toctree([address(name, "") for name in names], caption))
    return (
        "\n\n".join(
            [
                *parts,
                "## " + rest,
                *trees,
                toctree(["glossary", "api/index", "CONTRIBUTING"], "Reference"),
            ]
        )
        + "\n"
    )


def reference_page() -> str:
    """The list of modules by chapter."""
    parts = [
        "# Modules",
        "Each module is exported from one notebook, "
        "which derives and tests what it holds. "
        "The {ref}`index <genindex>` has every name.",
    ]
    pages = []
    for names in chapters().values():
        modules = {
            module_of(name): declaration(name).title
            for name in names
            if module_of(name)
        }
        rows = [
            f"- [`bigmodel_nb.{module}`]({module}.md): {title}"
            for module, title in modules.items()
        ]
        parts.append("\n".join(rows))
        pages += modules
    return "\n\n".join([*parts, toctree(pages)]) + "\n"


def write_sources(folder: Path) -> None:
    """Every page of the site as Sphinx reads it."""
    (folder / "api").mkdir(parents=True)
    for name, path in catalogue().items():
        place = folder / address(name, ".ipynb")
        place.parent.mkdir(exist_ok=True)
        top = "../" * address(name, "").count("/")
        notebook = notebook_page(nbformat.read(path, as_version=4), top)
        first = next(
            index
            for index, cell in enumerate(notebook.cells)
            if cell.cell_type == "markdown"
        )
        notebook.cells.insert(first + 1, new_markdown_cell(links(name, top)))
        nbformat.write(notebook, place)
        if module_of(name):
            (folder / "api" / f"{module_of(name)}.md").write_text(
                module_page(name), encoding="utf-8"
            )
    (folder / "index.md").write_text(index_page(), encoding="utf-8")
    shutil.copyfile(NOTEBOOKS / "glossary.md", folder / "glossary.md")
    (folder / "_static").mkdir()
    for figure in (HERE / "_static").glob("cover-*.png"):
        shutil.copy(figure, folder / "_static")
    (folder / "api" / "index.md").write_text(reference_page(), encoding="utf-8")
    contributing = outward((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    (folder / "CONTRIBUTING.md").write_text(contributing, encoding="utf-8")


def run_sphinx(source: Path, out: Path, builder: str = "html") -> int:
    """Sphinx on the pages in `source`; its exit code."""
    for name in catalogue():  # once, and not again in each process that Sphinx forks
        if module := module_of(name):
            import_module(f"bigmodel_nb.{module}")
    options = ["-b", builder, *"-n -W --keep-going -q -j auto".split()]
    places = ["-c", str(HERE), "-d", f"{source}.doctrees", str(source), str(out)]
    return sphinx([*options, *places])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", nargs="?", type=Path, default=ROOT / "_site", help="folder of the site"
    )
    parser.add_argument(
        "--builder",
        default="html",
        help="html, or linkcheck, which asks every address outside",
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "site"
        write_sources(source)
        code = run_sphinx(source, made, chosen.builder)
        if not code and chosen.builder == "html":
            shutil.copytree(made, chosen.out, dirs_exist_ok=True)
            print(chosen.out / "index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
