"""The course as a site: every page in a browser, in light and dark and on a phone."""

import base64
import html.parser
import io
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from bigmodel_nb.headless.parameters import declaration
from bigmodel_nb.kit.exercises import catalogue

ROOT = Path(__file__).resolve().parent.parent.parent
ARTEFACTS = Path(__file__).parent / "artefacts"
NOTEBOOKS = {
    path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix(): name
    for name, path in catalogue().items()
}
MODULES = {
    f"api/{'.'.join(path.relative_to(ROOT).with_suffix('').parts[1:])}.html": path
    for path in sorted((ROOT / "bigmodel_nb").glob("*/*.py"))
    if path.name != "__init__.py"
}
OTHERS = [
    "index.html",
    "glossary.html",
    "CONTRIBUTING.html",
    "api/index.html",
    "genindex.html",
    "search.html",
]
# It need not fetch the style sheets anew: no rule below reads them, and it looks for
# an imported one in a wrong place.
AXE = {"resultTypes": ["violations"], "preload": False}
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
RULES = {"runOnly": {"type": "tag", "values": LEVELS}, **AXE}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}, **AXE}
# Contrast takes axe-core most of a minute on a page with thousands of coloured words of
# code. A word's colour hangs on its kind alone, so one word of each kind stays, and the
# others become plain text.
ONE_OF_EACH = """() => {
  const seen = new Set()
  for (const word of document.querySelectorAll('pre span, code span, .sig span')) {
    const around = word.closest('.cell_input, .cell_output, .highlight, .sig, code')
    const kind = word.className + ' in ' + around?.className
    if (seen.has(kind)) word.replaceWith(...word.childNodes)
    seen.add(kind)
  }
  document.querySelectorAll('pre, code, .sig').forEach(each => each.normalize())
}"""
# Likewise one element stands for all whose text has the same colour, size and weight on
# the same grounds: contrast is a matter of these.
ONE_OF_EACH_LOOK = """() => {
  const looks = new Map(), grounds = new Map()
  const ground = element => {
    if (!element) return ''
    if (!grounds.has(element)) {
      const {backgroundColor, backgroundImage, opacity} = getComputedStyle(element)
      const own = [backgroundColor, backgroundImage, opacity].join()
      const clear = own == 'rgba(0, 0, 0, 0),none,1'
      grounds.set(element, ground(element.parentElement) + (clear ? '' : own + ';'))
    }
    return grounds.get(element)
  }
  for (const element of document.body.querySelectorAll('*')) {
    const said = [...element.childNodes].some(node => node.nodeType == Node.TEXT_NODE
                                                     && node.data.trim())
    element.removeAttribute('data-look')
    if (said && element.checkVisibility({visibilityProperty: true})) {
      const {color, fontSize, fontWeight} = getComputedStyle(element)
      looks.set([color, fontSize, fontWeight, ground(element)].join(), element)
    }
  }
  looks.forEach(element => element.setAttribute('data-look', ''))
  return looks.size
}"""
RUN = """([where, options]) =>
  axe.run(where ?? document, options).then(found => found.violations)"""
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def opened(chromium, address: str, page: str = "index.html", **options):
    """A tab with one page; in the end nothing went wrong, and nobody else was asked."""
    wrong = []
    context = chromium.new_context(
        **{"viewport": DESK, "reduced_motion": "reduce", **options}
    )
    context.set_default_timeout(60_000)
    tab = context.new_page()

    def note(bad: bool, what: str) -> None:
        if bad:
            wrong.append(what)

    tab.on(
        "console",
        lambda said: note(said.type in ("error", "warning"), f"console: {said.text}"),
    )
    tab.on("pageerror", lambda error: note(True, f"script: {error}"))
    # What the browser itself gave up is no failure: an icon, for instance, that was
    # still on its way when the page is left.
    tab.on(
        "requestfailed",
        lambda asked: note(
            asked.failure != "net::ERR_ABORTED",
            f"failed: {asked.url} ({asked.failure})",
        ),
    )
    tab.on(
        "response", lambda came: note(came.status >= 400, f"{came.status}: {came.url}")
    )
    ours = (address, "data:", "about:")
    tab.on(
        "request",
        lambda asked: note(not asked.url.startswith(ours), f"foreign: {asked.url}"),
    )
    try:
        tab.goto(address + page)
        yield tab
        assert not wrong
    finally:
        context.close()


def violations(tab) -> list[str]:
    """What axe-core finds against WCAG 2.2 A and AA, contrast in light and in dark."""
    from axe_playwright_python.base import AXE_SCRIPT

    tab.evaluate(ONE_OF_EACH)
    tab.evaluate(AXE_SCRIPT)
    others = {**RULES, "rules": {"color-contrast": {"enabled": False}}}
    found = {"": tab.evaluate(RUN, [None, others])}
    for look in ("light", "dark"):
        tab.emulate_media(color_scheme=look)
        tab.wait_for_function(
            "look => document.documentElement.dataset.theme === look", arg=look
        )
        assert tab.evaluate(ONE_OF_EACH_LOOK) > 5, "there is text of several kinds"
        found[look] = tab.evaluate(RUN, [{"include": [["[data-look]"]]}, CONTRAST])
    return [
        f"{look}: {rule['id']}: {node['html'][:150]} {node['failureSummary']}"
        for look, rules in found.items()
        for rule in rules
        for node in rule["nodes"]
    ]


def formulas(markdown: str) -> int:
    """How many formulas a text in Markdown holds."""
    prose = re.sub(
        r"^```.*?^```|`[^`]+`|\\\$", "", markdown, flags=re.MULTILINE | re.DOTALL
    )
    blocks = re.findall(
        r"\$\$.+?\$\$|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", prose, flags=re.DOTALL
    )
    inline = re.sub(r"\$\$.+?\$\$", "", prose, flags=re.DOTALL)
    return len(blocks) + len(re.findall(r"\$(?!\s)[^$]+?(?<!\s)\$(?!\d)", inline))


def shown(notebook) -> Counter:
    """What a page must show of a notebook."""
    cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    outputs = [
        output.get("data", {}) for cell in cells for output in cell.get("outputs", [])
    ]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    prose += [data.get("text/markdown", "") for data in outputs]
    return Counter(
        math=sum(map(formulas, prose)),
        pictures=sum("image/png" in data for data in outputs),
        tables=sum(data.get("text/html", "").count("<table") for data in outputs),
    )


COUNT = """() => {
  const article = document.querySelector('article') ?? document.querySelector('main');
  const all = what => [...article.querySelectorAll(what)];
  const prose = article.cloneNode(true);
  prose.querySelectorAll('pre, code, table, iframe').forEach(each => each.remove());
  return {
    math: all('math').length,
    pictures: all('img').length,
    tables: all('.cell_output table').length,
    flat: all('math').filter(each => !each.getBoundingClientRect().height).length,
    raw: (prose.textContent.match(/\\$\\$|\\\\frac|\\\\sum|\\\\begin/g) || []).length,
    unreadable: all('merror').length,
    diagrams: all('.mermaid, .language-mermaid, .highlight-mermaid').length,
    silent: all('img:not([alt]), img[alt=""]').length,
    broken: all('img').filter(each => !each.naturalWidth).length,
    cut: all('.highlight pre')
      .filter(each => !each.closest('.cell_output'))
      .filter(each => each.scrollWidth > each.clientWidth + 1).length,
    directives: all('pre').filter(each => /^#\\|/m.test(each.textContent)).length,
  }
}"""


@pytest.mark.parametrize("page", [*OTHERS, *NOTEBOOKS, *MODULES])
def test_page(chromium, site, page):
    with opened(chromium, site.address, page) as tab:
        tab.evaluate(
            "document.querySelectorAll('article details')"
            ".forEach(fold => fold.open = true)"
        )
        found = Counter(tab.evaluate(COUNT))
        content = Counter(
            {kind: found.pop(kind) for kind in ("math", "pictures", "tables")}
        )
        assert not +found, "nothing is wrong with what is shown"
        if page in NOTEBOOKS:
            assert content == shown(
                nbformat.read(catalogue()[NOTEBOOKS[page]], as_version=4)
            ), "nothing is missing"
        assert not violations(tab)
        tab.set_viewport_size(PHONE)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], (
            "the page scrolls sideways"
        )


def pages_of(site) -> list[Path]:
    # the theme's templates
    return [path for path in site.folder.rglob("*.html") if "_static" not in path.parts]


def test_every_page_is_visited(site):
    assert {path.relative_to(site.folder).as_posix() for path in pages_of(site)} == {
        *OTHERS,
        *NOTEBOOKS,
        *MODULES,
    }


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
@pytest.mark.parametrize(
    "page", ["index.html", "02_foundations/01_losses.html", "api/robust.attacks.html"]
)
def test_screenshots(chromium, site, page, look):
    ARTEFACTS.mkdir(exist_ok=True)
    options = {"viewport": PHONE} if look == "phone" else {"color_scheme": look}
    with opened(chromium, site.address, page, **options) as tab:
        file = (
            ARTEFACTS
            / f"site-{page.removesuffix('.html').replace('/', '-')}-{look}.png"
        )
        tab.screenshot(path=file, full_page=True)
        assert file.stat().st_size > 20_000


def test_map_leads_to_every_notebook(chromium, site):
    with opened(chromium, site.address, viewport=PHONE) as tab:
        rooms = tab.locator(".house a")
        assert sorted(
            rooms.evaluate_all("all => all.map(each => each.getAttribute('href'))")
        ) == sorted(NOTEBOOKS)
        boxes = rooms.evaluate_all(
            "all => all.map(each => each.getBoundingClientRect().toJSON())"
        )
        assert all(
            box["height"] >= 24 and box["left"] >= 0 and box["right"] <= PHONE["width"]
            for box in boxes
        )
        text = tab.locator("article").inner_text().replace("\u2019", "'")
        for name in catalogue():
            said = declaration(name)
            assert said.title in text and said.cost.rstrip(".") in text


def test_notebook_and_module_lead_to_each_other(chromium, site):
    with opened(chromium, site.address, "06_robust/01_attacks.html") as tab:
        tab.get_by_role("link", name="bigmodel_nb.robust.attacks").click()
        tab.wait_for_url("**/api/robust.attacks.html")
        tab.locator("article").get_by_role(
            "link", name=declaration("robust/attacks").title
        ).click()
        tab.wait_for_url("**/06_robust/01_attacks.html")


def test_module_page_says_what_the_source_says(chromium, site):
    cells = "all => all.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    with opened(chromium, site.address, "api/foundations.losses.html") as tab:
        entry = tab.locator(
            "dl.py.function",
            has=tab.locator("[id='bigmodel_nb.foundations.losses.log_softmax']"),
        )
        signature = re.sub(r"\s+", "", entry.locator("dt").first.inner_text())
        assert signature.startswith(
            "log_softmax(input:Tensor,dim:int=-1,temperature:float=1.0)→Tensor"
        )
        assert entry.locator("table tr").evaluate_all(cells)[1:] == [
            ["input", "Tensor", "logits of any shape, floating"],
            ["dim", "int", "the dimension of the classes"],
            [
                "temperature",
                "float",
                "divides the logits; above 1 it evens probabilities out",
            ],
            ["returns", "Tensor", "the shape of input"],
        ]
    with opened(chromium, site.address, "api/robust.attacks.html") as tab:
        text = tab.locator(
            "dl.py.class", has=tab.locator("[id='bigmodel_nb.robust.attacks.FGSM']")
        ).inner_text()
        assert "radius of the ball, in input units" in text and "__call__" in text
    with opened(chromium, site.address, "api/headless.cli.html") as tab:
        entry = tab.locator(
            "dl.py.function", has=tab.locator("[id='bigmodel_nb.headless.cli.run']")
        )
        rows = entry.locator("table tr").evaluate_all(cells)
        # an option keeps both of its dashes
        told = "A notebook of the course, or a path; with --resume it may be left out."
        assert ["name", "str | None", told] in rows


def test_search_finds_a_page(chromium, site):
    with opened(chromium, site.address) as tab:
        tab.keyboard.press("Control+K")
        tab.keyboard.type("softmax")
        tab.keyboard.press("Enter")
        result = tab.locator("#search-results li a").first
        result.wait_for()
        # the list quotes the pages it found: leaving now would cut that off
        tab.wait_for_load_state("networkidle")
        result.click()
        tab.wait_for_url(lambda url: "search.html" not in url)
        assert "softmax" in tab.locator("article").inner_text()


def test_switch_turns_the_page_dark_and_is_remembered(chromium, site):
    with opened(chromium, site.address, color_scheme="light") as tab:

        def ground() -> int:
            color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            return sum(map(int, re.findall(r"\d+", color)[:3]))

        assert ground() > 600
        tab.locator("button.theme-switch-button:visible").click()
        tab.get_by_role("button", name="Dark", exact=True).click()
        assert ground() < 200
        tab.reload()
        assert ground() < 200


class _Links(html.parser.HTMLParser):
    """The anchors of a page and the addresses that it names."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.addresses = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            if key in ("href", "src") and value:
                self.addresses.add(value)


def test_links_lead_somewhere(site):
    pages = {
        path.relative_to(site.folder).as_posix(): _Links(path)
        for path in pages_of(site)
    }
    lost, checked = [], 0
    for page, links in pages.items():
        for address in links.addresses:
            if scheme := urlsplit(address).scheme:
                assert scheme in ("https", "http", "data", "mailto"), address
                continue
            target, anchor = urldefrag(urljoin(page, address))
            target = unquote(urlsplit(target).path) or page
            checked += 1
            found = (site.folder / target).is_file()
            if (
                not found
                or anchor
                and target in pages
                and unquote(anchor) not in pages[target].anchors
            ):
                lost.append(f"{page}: {address}")
    assert not lost
    assert checked > 1000


# What no notebook of the course has, or may have one day, on a page of its own

FOLDS = r"""# Folds

A badge: [![Open it](https://example.org/badge.svg)](https://example.org/)

<details>
<summary>Hint 1</summary>

The slope is $\frac{1}{x}$, and

$$\int_1^e \frac{1}{x}\, dx = 1$$

```python
def slope(x):
    return 1 / x
```

</details>
"""
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import nbformat
from make_site import notebook_page, run_sphinx
folder = Path(sys.argv[2])
page = folder / "source" / "index.ipynb"
nbformat.write(notebook_page(nbformat.read(page, as_version=4)), page)
sys.exit(run_sphinx(folder / "source", folder / "site"))
"""


def built(folder: Path, *cells) -> subprocess.CompletedProcess:
    """A site of one page, made of a notebook with these cells."""
    (folder / "source").mkdir()
    kernel = {
        "kernelspec": {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    }
    nbformat.write(
        new_notebook(cells=list(cells), metadata=kernel),
        folder / "source" / "index.ipynb",
    )
    command = [sys.executable, "-c", BUILD, str(ROOT / "docs"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def picture(alt: str | None):
    """The output of a cell that shows a widget, with its first state as a picture."""
    dot = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(dot, "PNG")
    png = base64.b64encode(dot.getvalue()).decode()
    widget = {
        "application/vnd.jupyter.widget-view+json": {
            "model_id": "1",
            "version_major": 2,
            "version_minor": 0,
        }
    }
    return new_output(
        "display_data",
        {"image/png": png, "text/plain": "Figure(700x300)", **widget},
        metadata={"image/png": {"alt": alt}} if alt else {},
    )


def test_folds_pictures_tags_and_records(chromium, serving, tmp_path):
    record = new_output(
        "display_data",
        {"application/scrapbook.scrap.json+json": {"name": "secret", "data": 1}},
        metadata={"scrapbook": {"name": "secret"}},
    )
    pictures = [picture("A “red” dot & [more]"), picture("Second")]
    done = built(
        tmp_path,
        new_markdown_cell(FOLDS),
        new_code_cell("#| export\n#| hide_line\nvisible = 1"),
        new_code_cell("#| hide\nhidden = 1"),
        new_code_cell("record()", outputs=[record]),
        new_code_cell(
            "tagged = 1", metadata={"tags": ["remove-input"]}, outputs=pictures
        ),
    )
    assert done.returncode == 0, done.stderr
    with serving(tmp_path / "site") as site, opened(chromium, site.address) as tab:
        fold = tab.locator("article details")
        assert not fold.locator("math").first.is_visible()
        fold.locator("summary").click()
        assert fold.locator("math").count() == 2
        assert fold.locator("math").last.is_visible()
        assert fold.locator(".highlight .k").first.inner_text() == "def", (
            "code is highlighted"
        )
        assert tab.locator("article a", has_text="Open it").count() == 1, (
            "a badge is a link in words"
        )
        text = tab.locator("article").inner_text()
        assert "visible = 1" in text and "record()" in text
        assert not [
            word
            for word in ("#|", "hidden = 1", "tagged = 1", "secret", "Figure(700x300)")
            if word in text
        ]
        alternatives = tab.locator("article img").evaluate_all(
            "all => all.map(each => each.alt)"
        )
        assert alternatives == ["A “red” dot & [more]", "Second"]
        assert not violations(tab)
        tab.evaluate("document.querySelector('article p').style.color = '#999'")
        assert [each[:21] for each in violations(tab)] == ["light: color-contrast"], (
            "grey on white is found"
        )


def test_what_a_reader_would_miss_stops_the_build(tmp_path):
    prose = "# A page\n\n$\\frac{1}{$ and $\\nosuchsymbol{1}$, [nowhere](nowhere.ipynb)"
    done = built(
        tmp_path,
        new_markdown_cell(prose),
        new_code_cell("draw()", outputs=[picture(None)]),
    )
    assert done.returncode != 0
    for complaint in (
        r"cannot be shown: \frac{1}{",
        r"cannot be shown: \nosuchsymbol{1}",
        "nowhere.ipynb",
        "a picture without alternative text",
    ):
        assert complaint in done.stderr


def test_a_browser_that_broke_off_is_replaced(started, site):
    with opened(started.living(), site.address, "search.html"):
        pass
    broken = started.browser
    with pytest.raises(Exception, match="closed|crashed|Protocol"):
        broken.new_browser_cdp_session().send("Browser.crash")
    assert started.living() is not broken
    with opened(started.living(), site.address, "search.html") as tab:
        assert tab.title()
