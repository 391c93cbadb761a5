"""The glossary of the course, nbs/glossary.md.

It is gathered from the lessons' tables "In the literature" by `make sync`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from bigmodel_nb.headless.parameters import catalogue, declaration

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
PAGE = NOTEBOOKS / "glossary.md"
HEADING = "## In the literature"
COLUMNS = ["term", "symbol", "meaning", "source"]


@dataclass(frozen=True)
class Term:
    """A row of a lesson's table, with the lesson."""

    term: str
    symbol: str
    meaning: str
    source: str
    lesson: str


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def terms_of(lesson: str) -> list[Term]:
    """The terms that a lesson introduces; none where it has no table.

    Raises `ValueError` for a table of another form.
    """
    _, found, section = prose(catalogue()[lesson]).partition(HEADING)
    if not found:
        return []
    rows = [
        line
        for line in re.split(r"^#+ ", section, flags=re.MULTILINE)[0].splitlines()
        if line.startswith("|")
    ]
    if len(rows) < 3 or cells_of(rows[0]) != COLUMNS:
        raise ValueError(
            f"{lesson}: below {HEADING!r} stands no table | {' | '.join(COLUMNS)} |"
        )
    terms = []
    for row in rows[2:]:
        cells = cells_of(row)
        if len(cells) != len(COLUMNS) or not re.fullmatch(r"\*[^*]+\*", cells[0]):
            raise ValueError(
                f"{lesson}: the row {row!r} is not"
                " | *term* | symbol | meaning | source |"
            )
        terms.append(Term(cells[0].strip("*"), *cells[1:], lesson))
    return terms


def all_terms() -> list[Term]:
    """The terms of all lessons, in the order in which they are met."""
    return [term for lesson in catalogue() for term in terms_of(lesson)]


def first_use(lesson: str, term: str) -> str | None:
    """The first place, with its asterisks, where a lesson's running prose has a term.

    None where it never has.
    """
    text = prose(catalogue()[lesson]).partition(HEADING)[0]
    text = re.sub(
        r"^(?:#|\||>)[^\n]*$|`[^`\n]*`|```.*?```|\$[^$]*\$",
        "",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    words = r"[\s-]+".join(re.escape(word) for word in re.split(r"[\s-]+", term))
    found = re.search(rf"\**(?<!\w){words}(?:s|es)?(?!\w)\**", text, re.IGNORECASE)
    return found and found.group()


def page() -> str:
    """The glossary in Markdown, in the order of the alphabet."""
    lines = [
        "# Glossary",
        "",
        "The terms of the field, each with the lesson that introduces it. "
        "This page is written from the tables",
        f"“{HEADING.removeprefix('## ')}” of the lessons.",
        "",
        "| term | symbol | meaning | lesson | source |",
        "|---|---|---|---|---|",
    ]
    for term in sorted(all_terms(), key=lambda each: each.term.lower()):
        address = catalogue()[term.lesson].relative_to(NOTEBOOKS).as_posix()
        lesson = f"[{declaration(term.lesson).title}]({address})"
        lines.append(
            f"| *{term.term}* | {term.symbol} | {term.meaning}"
            f" | {lesson} | {term.source} |"
        )
    return "\n".join(lines) + "\n"
