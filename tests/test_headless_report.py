"""The report: one file that fetches nothing, runs nothing and shows mathematics."""

import base64
import json
import re
import sys
import warnings
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from IPython.display import Latex, Math
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
    new_raw_cell,
)

from bigmodel_nb.headless.report import mathml, page, to_html
from bigmodel_nb.kit.record import digits, in_a_line, read_notebook, read_records

sys.path.insert(0, str(Path(__file__).resolve().parent))
import nasty  # noqa: E402

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kg"
    "AAAABJRU5ErkJggg=="
)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M0 0L9 9" '
    'stroke="red"/></svg>'
)
SCRAP = "application/scrapbook.scrap.json+json"


def shown(*outputs, **options):
    """The report of one cell with outputs, each a bundle."""
    made = [
        new_output("display_data", each) if "output_type" not in each else each
        for each in outputs
    ]
    return body(
        to_html(new_notebook(cells=[new_code_cell("f()", outputs=made)]), **options)
    )


def told(*prose, **options):
    cells = [
        each if isinstance(each, dict) else new_markdown_cell(each) for each in prose
    ]
    return body(to_html({"cells": cells}, **options))


def body(html):
    return html[html.index("<main>") :]


class Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.addresses = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value
            for name, value in attributes
            if name
            in ("src", "href", "srcset", "poster", "data", "background", "action")
            and tag != "a"
        ]
        assert not [name for name, _ in attributes if name.startswith("on")], attributes
        assert not [
            value
            for name, value in attributes
            if (value or "").lower().strip().startswith(("javascript:", "data:text"))
        ], attributes

    def handle_data(self, data):
        self.text += data


# --- mathematics

x = sympy.Symbol("x")


@pytest.mark.parametrize(
    "thing",
    [
        Math(r"\frac{a}{b}"),
        Latex(r"so $x^2$ holds"),
        Latex(r"$$x^2$$"),
        Latex(r"\begin{align}x&=1\\y&=2\end{align}"),
        Latex(r"\(x\) and \[y\]"),
        sympy.Integral(sympy.exp(-(x**2)), (x, -sympy.oo, sympy.oo)),
        sympy.Matrix([[1, x], [x**2, 2]]),
        sympy.Piecewise((x, x > 0), (0, True)),
        sympy.Sum(1 / x**2, (x, 1, sympy.oo)),
        sympy.sqrt(x) / 3,
        sympy.Eq(x, sympy.asin(x)),
    ],
    ids=str,
)
def test_formulas_of_outputs_are_mathml(thing):
    text = thing._repr_latex_()
    page = shown({"text/latex": text, "image/png": PNG, "text/plain": "plain"})
    assert (
        "<math" in page and "\\" not in page and "$" not in page and "<img" not in page
    )


def test_formulas_of_markdown_outputs_and_of_html_in_markdown_are_mathml():
    assert shown({"text/markdown": "**so** $x^2$ and $$y$$"}).count("<math") == 2
    assert (
        told("<table><tr><td>$b < 1$</td></tr></table>\n\n<div>$$c$$</div>").count(
            "<math"
        )
        == 2
    )
    assert "<style" not in told("<!-- a > $b$ -->") and "$" not in told(
        "<!-- a > $b$ -->"
    )


def test_formulas_in_the_cells_of_tables_are_mathml_and_prices_are_not():
    frame = pd.DataFrame(
        {"formula": [r"$\alpha^2$", "$x$"], "price": ["$5", "from $5 to $10"]},
        index=["$i$", "j"],
    )
    for html in (frame.to_html(), frame.style.to_html(), frame._repr_html_()):
        page = shown({"text/html": html})
        assert (
            page.count("<math") == 3
            and "<td>$5</td>" in re.sub(r"<td [^>]*>", "<td>", page)
            and "from $5 to $10" in page
        )
    with pd.option_context("display.html.use_mathjax", False):
        assert "<math" not in shown({"text/html": frame._repr_html_()})
    assert "<math" not in shown({"text/html": "<pre>$x$</pre><code>$y$</code>"})


@pytest.mark.parametrize(
    "tex",
    [
        r"\begin{tabular}{l}a\end{tabular}",
        r"\unknown{x}",
        r"\frac{1}{",
        r"\require{physics}",
    ],
)
def test_what_is_no_mathematics_is_shown_as_it_was_written(tex):
    assert (
        mathml(tex).startswith("<code>")
        and tex in shown({"text/latex": tex})
        and f"<code>{tex}</code>" in told(f"${tex}$")
    )


def outline(tex, display="block"):
    """What a formula shows: cells in brackets, rows on lines, the rest as text."""
    made = mathml(tex, display)
    assert "<math" in made, tex
    made = made.replace("</mtr><mtr>", "\n").replace("</mtd>", "]")
    return re.sub(
        r"\s*\n\s*",
        " / ",
        unescape(
            re.sub(
                r"<[^>]*>",
                "",
                re.sub(
                    r"<mtd[^>]*?(/?)>", lambda found: "[]" if found[1] else "[", made
                ),
            )
        ),
    ).strip(" /")


@pytest.mark.parametrize(
    "tex, said",
    [
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "[a][=b] / [c][=d]"),
        (
            r"\begin{aligned}[t] a &= b \\[4pt] c &= d \\* e &= f \end{aligned}",
            "[a][=b] / [c][=d] / [e][=f]",
        ),
        (r"\begin{eqnarray} a &=& b \\ c &\le& d \end{eqnarray}", "[a][=b] / [c][≤d]"),
        (
            r"\begin{eqnarray*} a &=& b \\ &=& c \nonumber \end{eqnarray*}",
            "[a][=b] / [][=c]",
        ),
        (
            (
                r"\begin{eqnarray} a &=& \begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 "
                r"\end{pmatrix} \\ b &=& c \end{eqnarray}"
            ),
            "[a][=][([1][2][3] / [4][5][6])] / [b][=][c]",
        ),
        (
            r"\begin{alignat}{2} a &= b & c &= d \\ e &= f & g &= h \end{alignat}",
            "[a][=b][c][=d] / [e][=f][g][=h]",
        ),
        (r"\begin{alignedat}{2} a &= b & c &= d \end{alignedat}", "[a][=b][c][=d]"),
        (r"\begin{flalign*} a &= b \\ c &= d \end{flalign*}", "[a][=b] / [c][=d]"),
        (
            r"\begin{align} a &= b \label{eq:a} \\ c &= d \end{align}",
            "[a][=b] / [c][=d]",
        ),
        *[
            (rf"\begin{{{name}}} a = b \\ c = d \end{{{name}}}", "[a=b] / [c=d]")
            for name in ("gather", "gather*", "gathered", "multline", "multline*")
        ],
        (
            (
                r"\begin{equation}\begin{aligned} a &= b \\ c &= d "
                r"\end{aligned}\end{equation}"
            ),
            "[a][=b] / [c][=d]",
        ),
        (
            r"\left\{\begin{aligned} a &= b \\ c &= d \end{aligned}\right.",
            "{[a][=b] / [c][=d]",
        ),
        (
            (
                r"\begin{aligned} & a = b \\ & \begin{gathered} c \\ d "
                r"\end{gathered} \end{aligned}"
            ),
            "[][a=b] / [][[c] / [d]]",
        ),
        (
            (
                r"\begin{cases} \begin{aligned} a &= b \\ c &= d \end{aligned} & x "
                r"\\ y & z \end{cases}"
            ),
            "{[[a][=b] / [c][=d]][x] / [y][z]",
        ),
        (r"\begin{dcases} a & b \\ c & d \end{dcases}", "{[a][b] / [c][d]"),
        (r"\begin{rcases} a & b \\ c & d \end{rcases}", "[a][b] / [c][d]}"),
        (r"\begin{subarray}{l} a \\ b \end{subarray}", "[a] / [b]"),
        (r"a \\ b", "[a] / [b]"),
        (r"\begin{array}[t]{lr} a & b \end{array}", "[a][b]"),
    ],
)
def test_rows_and_columns_of_formulas_are_those_of_tex(tex, said):
    assert outline(tex) == said
    assert outline(tex, "inline") == said


@pytest.mark.parametrize(
    "tex, said",
    [
        *[
            (tex, "arg minxf")
            for tex in (
                r"\underset{x}{\arg\min} f",
                r"\arg\min_x f",
                r"\arg\,\min_x f",
                r"\mathop{\arg\min}_x f",
                r"\operatorname*{arg\,min}_x f",
                r"\operatorname*{argmin}_x f",
                r"\mathop{\mathrm{argmin}}_x f",
                r"\mathop{\mathrm{arg\,min}}\limits_x f",
                r"\underset{x}{\operatorname{argmin}} f",
                r"\argmin_x f",
            )
        ],
        (r"\operatorname*{median}_x f", "medianxf"),
        (r"\arg z", "argz"),
        (r"\label{a} x", "x"),
        (r"x \notag", "x"),
        (r"x \tag{1}", "x(1)"),
        (r"\bigl\{x\bigr\}", "{x}"),
        (r"\bigg\| x \bigg\|", "‖x‖"),
        (r"\bigl\lVert x \bigr\rVert", "‖x‖"),
        (r"\big\langle x \big\rangle", "⟨x⟩"),
        (r"\text{5\$ \& 3\%}", "5$ & 3%"),
        (r"5\% \& \#", "5%&#"),
        (r"\hspace*{1em} x", "x"),
        (r"\mathbb E \mathcal L \mathbf x", "𝔼ℒ𝐱"),
        (r"\boldsymbol{\mu}\mathbf{\Sigma}\mathbb{1}\mathbf{0}\mathit{h}", "𝝁𝚺𝟙𝟎ℎ"),
        (r"\mathbbm{1}\mathds{1}", "𝟙𝟙"),
        ("a % a remark\n+ b", "a+b"),
        (r"A \backslash B", "A\\B"),
    ],
)
def test_common_commands_are_translated(tex, said):
    assert outline(tex).replace("\xa0", " ").replace(
        "\u2009", " "
    ) == said and "\\" not in outline(tex).replace("A\\B", "")


@pytest.mark.parametrize(
    "tex",
    [r"a & b", r"a & b \\ c & d", r"\eqref{eq:1}", r"\bigl\unknown x", r"\ce{H2O}"],
)
def test_what_cannot_be_drawn_rightly_is_code(tex):
    assert mathml(tex, "block") == f"<code>{escape(tex)}</code>"


def test_limits_stand_below_in_a_formula_by_itself():
    assert "<munder>" in mathml(r"\max_x f", "block") and "<munder>" not in mathml(
        r"\max_x f"
    )
    assert mathml(r"p\log p", "block").count("mspace") == 2 and "mspace" not in mathml(
        r"\log\left(x\right)"
    )


def test_struck_boxed_and_ruled_formulas_are_drawn_so():
    assert 'class="updiagonalstrike"' in told(
        r"$\cancel{x}$"
    ) and 'class="box"' in told(r"$\boxed{x}$")
    page = told(r"$\begin{array}{c|c} a & b \\ \hline c & d \end{array}$")
    assert page.count("below") == 2 and page.count("beside") == 2


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("$\\()[]{}xy ab^_&%<>\"'\n0123") | st.characters())
)
def test_any_text_is_shown_as_latex_and_markdown_and_html(text):
    for kind in ("text/latex", "text/markdown", "text/html"):
        Reader(shown({kind: text})).close()


# --- pictures


@pytest.fixture
def folder(tmp_path):
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "a.png").write_bytes(base64.b64decode(PNG))
    (figures / "é b.png").write_bytes(base64.b64decode(PNG))
    (figures / "c.svg").write_text(SVG)
    (figures / "notes.txt").write_text("secret")
    (figures / "scan.tiff").write_bytes(b"II*")
    return tmp_path


@pytest.mark.parametrize(
    "how",
    [
        "![a picture]({})",
        "<img src='{}' alt='a picture'>",
        "<p><img alt='a picture' srcset='{} 2x'></p>",
        "![a picture][r]\n\n[r]: {}",
    ],
)
@pytest.mark.parametrize(
    "address",
    [
        "figures/a.png",
        "./figures/a.png",
        "figures/%C3%A9%20b.png",
        "figures/c.svg",
        "figures/../figures/a.png?v=2",
    ],
)
def test_a_picture_beside_the_notebook_is_in_the_page(folder, how, address):
    for html in (
        told(how.format(address), folder=folder),
        shown({"text/markdown": how.format(address)}, folder=str(folder)),
    ):
        assert (
            html.count("<img") == 1
            and 'src="data:image/' in html
            and 'alt="a picture"' in html
            and "figures" not in html
        )
    html = told(how.format(address))
    assert (
        "<img" not in html
        and f"[picture not found: a picture, {address.split('?')[0]}" in html
    ), "without the folder"


@pytest.mark.parametrize(
    "address, why",
    [
        ("figures/gone.png", "not found"),
        ("figures/notes.txt", "left out, of a kind that browsers do not show"),
        ("figures/scan.tiff", "of a kind"),
        ("figures", "not found"),
        ("https://example.org/a.png", "left out"),
        ("//example.org/a.png", "left out"),
        ("ftp://example.org/a.png", "left out"),
        ("attachment:gone.png", "not found"),
        ("a" * 5000 + ".png", "not found"),
        ("%00.png", "not found"),
        ("data:text/html,x", "left out"),
        ("data:image/tiff;base64,xx", "left out"),
    ],
)
def test_a_picture_that_is_not_there_is_said_in_words(folder, address, why):
    for html in (
        told(f"![a picture]({address})", folder=folder),
        told(f"<img src='{address}' alt='a picture'>", folder=folder),
        shown({"text/html": f"<img alt='a picture' src='{address}'>"}, folder=folder),
    ):
        assert "<img" not in html and re.search(
            rf"\[picture [^\]:]*{why}[^\]:]*: a picture, {re.escape(address[:60])}",
            html,
        ), html[-500:]


@pytest.mark.parametrize(
    "output",
    [
        {"text/html": '<img src="s.png"/>'},
        {"text/markdown": "![](s.png)"},
        {"text/html": "<svg><image href='s.png'/></svg>"},
    ],
    ids=str,
)
def test_a_picture_that_the_run_wrote_is_in_the_page(tmp_path, output):
    notebook, working = tmp_path / "course", tmp_path / "run"
    for place, data in (notebook, b"old"), (working, base64.b64decode(PNG)):
        place.mkdir()
        (place / "s.png").write_bytes(data)
    (notebook / "beside.png").write_bytes(b"old")
    record = {"status": "ok", "working_folder": str(working)}
    assert f"data:image/png;base64,{PNG}" in shown(
        output, record=record, folder=notebook
    ) and f"data:image/png;base64,{PNG}" in shown(output, record=record)
    assert base64.b64encode(b"old").decode() in told(
        "![](beside.png)", record=record, folder=notebook
    ), "then beside the notebook"
    for odd in (None, 3, "", "gone", "\0", ["a"]):
        assert "<main>" in body(
            shown(output, record={"working_folder": odd})
        ) and "not found" in shown(output, record={"working_folder": odd})


def test_data_is_shown_as_indented_text():
    for kind, data in (
        ("application/json", {"a": [1, {"b": "<c>"}]}),
        ("application/geo+json", {"type": "Point", "coordinates": [1, 2]}),
    ):
        page = shown({kind: data, "text/plain": "<IPython.core.display.JSON object>"})
        assert (
            "IPython" not in page
            and "<summary>{" not in page
            and unescape(re.findall("<pre>(.*?)</pre>", page, re.DOTALL)[-1])
            == json.dumps(data, indent=2)
        )
    page = shown(
        {
            "application/json": list(range(100)),
            "text/plain": "<IPython.core.display.JSON object>",
        }
    )
    assert "<summary>100 values: 0, 1, 2" in page and "IPython" not in page
    assert "<img" in shown(
        {"application/json": {}, "image/png": PNG}
    ) and "<b>" in shown({"application/json": {}, "text/html": "<b>x</b>"}), (
        "the richer goes before"
    )


def test_a_file_too_large_for_a_page_is_named(folder, monkeypatch):
    monkeypatch.setattr("bigmodel_nb.headless.report._MAX_BYTES", 10)
    assert "[picture left out, 0 MB: figures/a.png]" in told(
        "![](figures/a.png)", folder=folder
    )


def test_attachments_are_shown(folder):
    attached = new_markdown_cell(
        "![](attachment:a.png) ![](attachment:c.svg)",
        attachments={
            "a.png": {"image/png": PNG},
            "c.svg": {"image/svg+xml": base64.b64encode(SVG.encode()).decode()},
        },
    )
    assert told(attached).count('src="data:image/') == 2
    for odd in (
        {"a.png": {}},
        {"a.png": None},
        {"a.png": {"image/png": 3}},
        {"a.png": {"text/html": "x"}},
        [],
        "x",
    ):
        assert "<img" not in told(dict(attached, attachments=odd))


def test_links_to_files_stay_links(folder):
    page = told(
        (
            "[data](data/rows.csv) [above](../x.ipynb#a) [here](#title) "
            "[mail](mailto:a@b.org) [site](https://example.org) [no](javascript:1) "
            "[nor](data:text/html,x)"
        ),
        folder=folder,
    )
    assert re.findall(r'<a href="([^"]*)"', page) == [
        "data/rows.csv",
        "../x.ipynb#a",
        "#title",
        "mailto:a@b.org",
        "https://example.org",
    ]


def test_sounds_and_films_that_are_at_hand_stay(folder):
    sound = "<audio controls src='data:audio/wav;base64,UklGRg=='></audio>"
    assert 'src="data:audio/wav' in shown({"text/html": sound}) and "controls" in shown(
        {"text/html": sound}
    )
    (folder / "film.mp4").write_bytes(b"film")
    assert 'src="data:video/mp4;base64,ZmlsbQ=="' in shown(
        {"text/html": "<video controls><source src='film.mp4'></video>"}, folder=folder
    )
    assert "[film left out: https://example.org/film.mp4]" in shown(
        {"text/html": "<video src='https://example.org/film.mp4'></video>"}
    )


# --- nothing fetched, nothing run (in a browser: browser/test_report.py)


@pytest.mark.parametrize(
    "html",
    [
        each.replace("HOST", "https://host.example").replace("NETWORK", "host.example")
        for each in [*nasty.FETCHING, *nasty.RUNNING]
    ],
)
def test_nothing_is_left_that_fetches_or_runs(html):
    for made in (
        shown({"text/html": html}),
        told(html),
        shown({"image/svg+xml": html}),
        told(f"Before\n\n{html}\n\nAfter"),
        shown({"text/markdown": html}),
    ):
        seen = Reader(made)
        assert not set(seen.tags) & {
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "meta",
            "base",
            "form",
            "template",
            "noscript",
            "foreignobject",
            "animate",
            "set",
        }
        assert not [
            each
            for each in seen.addresses
            if each and not each.startswith(("data:image/", "#"))
        ], seen.addresses
        assert not [
            sheet
            for sheet in re.findall(r"<style>(.*?)</style>", made, re.DOTALL)
            + re.findall(r'style="([^"]*)"', made)
            if "host.example" in sheet
        ]


@pytest.mark.parametrize(
    "html, said",
    [
        (
            "<iframe src='https://example.org/map'></iframe>",
            "[frame left out: https://example.org/map]",
        ),
        (
            "<script src='https://cdn.example/x.js'></script>",
            "[script left out: https://cdn.example/x.js]",
        ),
        (
            "<link rel=stylesheet href='https://cdn.example/x.css'>",
            "[link left out: https://cdn.example/x.css]",
        ),
        (
            "<style>@import 'https://cdn.example/y.css';</style>",
            "[style left out: https://cdn.example/y.css]",
        ),
        (
            "<style>p {background: url(https://cdn.example/p.png)}</style>",
            "[style left out: https://cdn.example/p.png]",
        ),
        (
            "<meta http-equiv=refresh content='0; url=https://example.org'>",
            "[meta left out: https://example.org]",
        ),
        ("<script>x()</script>", "[script left out]"),
        (
            "<svg><image href='https://example.org/a.png'/></svg>",
            "[picture left out: https://example.org/a.png]",
        ),
    ],
)
def test_what_is_left_out_is_named(html, said):
    assert said in shown({"text/html": html}) and said in told(html)
    assert "<a" not in shown({"text/html": html}), "as plain text"


def test_a_script_falls_back_on_the_picture_beside_it():
    page = shown(
        {
            "text/html": "<div id='plot'></div><script>draw()</script>",
            "image/png": PNG,
            "text/plain": "Figure()",
        }
    )
    assert page.count("<img") == 1 and "left out" not in page and "Figure()" not in page
    assert "[script left out]" in shown(
        {
            "application/javascript": "f()",
            "text/plain": "<IPython.core.display.Javascript object>",
        }
    )
    assert "IPython" not in shown(
        {
            "application/javascript": "f()",
            "text/plain": "<IPython.core.display.Javascript object>",
        }
    )


def test_tables_drawings_and_folds_stay():
    styler = (
        pd.DataFrame({"a": [1.5, 2]})
        .style.set_caption("Title")
        .highlight_max(props="font-weight: bold")
        .set_table_styles([{"selector": "th", "props": "color: green"}])
    )
    page = shown({"text/html": styler.to_html()})
    assert (
        "<caption>Title</caption>" in page
        and "font-weight: bold" in page
        and re.search(r"#T_\w+ th\s*\{\s*color: green", page)
    )
    drawing = (
        '<svg viewBox="0 0 9 9"><title>A line</title><defs><linearGradient '
        'id="g" gradientUnits="userSpaceOnUse"><stop offset="0" '
        'stop-color="red"/></linearGradient>'
        '<clipPath id="c"><rect width="9" height="9"/></clipPath></defs><path '
        'd="M0 0" fill="url(#g)" clip-path="url(#c)"/><use '
        'xlink:href="#g"/></svg>'
    )
    page = shown({"text/html": drawing})
    for part in (
        'viewBox="0 0 9 9"',
        "<linearGradient",
        'gradientUnits="userSpaceOnUse"',
        "<clipPath",
        'fill="url(#g)"',
        'clip-path="url(#c)"',
        'href="#g"',
        'aria-label="A line"',
    ):
        assert part in page, part
    fold = "<details open><summary>More</summary>\n\nInside **bold**\n\n</details>"
    assert (
        "<details open" in told(fold)
        and "<strong>bold</strong>" in told(fold)
        and "<summary>More</summary>" in told(fold)
    )
    assert 'type="checkbox"' in shown(
        {"text/html": "<input type=checkbox id=a><label for=a>open</label>"}
    )


def test_a_style_holds_within_its_own_output():
    page = shown(
        {
            "text/html": (
                "<style>p {color: red} :root {--a: 1px} @keyframes k {from {left: "
                "0}} @media print {p {top: 0}}</style><p>red</p>"
            )
        },
        record={"status": "ok"},
    )
    (sheet,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    scope = re.search(r'<div class="(scope-\w+)"><p>red</p></div>', page).group(1)
    assert (
        sheet.startswith("@keyframes")
        and f".{scope} {{p {{" in sheet.replace("\n", "")
        and "& {--a" in sheet.replace("&{", "& {")
    )
    for escaping in (
        "a{b:c}}} p{color:red}",
        "a{} } @import 'x'; p{color:red}",
        "</style><script>x</script>",
        "a{b:'</style><script>x()</script>'}",
    ):
        page = shown({"text/html": f"<style>{escaping}</style><p>text</p>"})
        assert "<script" not in page and "}}" not in page.replace("}}</style>", "")


def test_a_tag_that_is_not_closed_ends_with_its_output():
    page = shown(
        {"text/html": "<div><table><tr><td>one"},
        {"text/html": "</div></main></body>two"},
        {"text/html": "<!-- three"},
        {"text/html": "<textarea>four"},
        {"text/plain": "five"},
    )
    assert page.count("</main>") == 1 and "<pre>five</pre>" in page
    seen = Reader(page)
    assert [seen.tags.count(tag) for tag in ("table", "textarea")] == [
        1,
        0,
    ] and page.count("<div") == page.count("</div>")


def test_every_page_has_the_policy():
    for html in (page("T", "x"), to_html(new_notebook())):
        assert (
            html.index("Content-Security-Policy") < html.index("<style>")
            and "default-src 'none'" in html
            and "script-src" not in html
        )


# --- any notebook


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "display_data"},
        {"output_type": "display_data", "data": None, "metadata": {}},
        {"output_type": "display_data", "data": {"text/html": None}, "metadata": None},
        {
            "output_type": "display_data",
            "data": {"image/png": {"a": 1}, "text/plain": "plain"},
            "metadata": {},
        },
        {
            "output_type": "display_data",
            "data": {"image/png": "no picture!", "text/plain": "plain"},
            "metadata": {},
        },
        {
            "output_type": "display_data",
            "data": {"image/png": PNG},
            "metadata": {"image/png": None, "alt": 3},
        },
        {"output_type": "display_data", "data": {"text/plain": 3.5}, "metadata": {}},
        {
            "output_type": "display_data",
            "data": {"application/vnd.plotly.v1+json": {"data": [1]}},
            "metadata": {},
        },
        {"output_type": "display_data", "data": {"": ""}, "metadata": {}},
        {"output_type": "display_data", "data": ["a"], "metadata": {}},
        {"output_type": "display_data", "data": {"text/latex": [1]}, "metadata": {}},
        {"output_type": "stream"},
        {"output_type": "stream", "name": "stdout", "text": None},
        {"output_type": "error"},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": None},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": [1, None]},
        {"output_type": "odd", "x": 1},
        {},
        None,
        "text",
        3,
        {"output_type": "display_data", "data": {SCRAP: {}}},
        {"output_type": "display_data", "data": {SCRAP: None, "text/plain": "plain"}},
    ],
)
def test_an_odd_output_is_shown_as_text_and_the_rest_as_it_is(output):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "before"},
        output,
        {
            "output_type": "display_data",
            "data": {"text/plain": "after"},
            "metadata": {},
        },
    ]
    notebook = {
        "cells": [{"cell_type": "code", "source": "f()", "outputs": outputs}],
        "nbformat": 4,
    }
    html = to_html(notebook, {"status": "ok"})
    assert (
        "<pre>before</pre>" in html
        and "<pre>after</pre>" in html
        and "<pre><span></span>" in html
    )
    if "'plain'" in str(output):
        assert "plain" in body(html)
    assert read_records(notebook) == {}


@pytest.mark.parametrize(
    "cell",
    [
        {},
        {"cell_type": "code"},
        {"cell_type": "markdown", "source": None},
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": "1", "outputs": None},
        {"cell_type": "odd", "source": "x"},
        {"cell_type": "code", "source": 3, "outputs": {}, "metadata": []},
        "text",
        None,
        new_raw_cell("<script>raw</script>"),
    ],
)
def test_an_odd_cell_costs_no_report(cell):
    html = to_html({"cells": [cell, {"cell_type": "markdown", "source": "# After"}]})
    assert "<h1>After</h1>" in html and "<script" not in html
    assert read_records({"cells": [cell]}) == {}
    for notebook in ({}, {"cells": None}, {"cells": 3, "metadata": 3}):
        assert to_html(notebook).endswith("</html>") and read_records(notebook) == {}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=[])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KINDS = [
    "text/html",
    "text/plain",
    "text/latex",
    "text/markdown",
    "image/png",
    "image/svg+xml",
    "image/jpeg",
    "application/javascript",
    "application/json",
    SCRAP,
    "application/papermill.record+json",
    "application/scrapbook.scrap.text+json",
    "application/vnd.jupyter.widget-view+json",
    "text/csv",
    "x",
]
SCRAPS = st.fixed_dictionaries(
    {}, optional={"name": JSON, "data": JSON, "encoder": JSON}
)
OUTPUTS = st.fixed_dictionaries(
    {},
    optional={
        "output_type": st.sampled_from(
            ["stream", "error", "display_data", "execute_result"]
        )
        | JSON,
        "name": JSON,
        "text": JSON,
        "traceback": JSON,
        "ename": JSON,
        "evalue": JSON,
        "metadata": JSON,
        "data": st.dictionaries(
            st.sampled_from(KINDS),
            JSON
            | SCRAPS
            | st.sampled_from([*nasty.FETCHING, *nasty.RUNNING, SVG, PNG]),
            max_size=3,
        )
        | JSON,
    },
)
CELLS = st.fixed_dictionaries(
    {"cell_type": st.sampled_from(["code", "markdown", "raw"]) | JSON},
    optional={
        "source": JSON | st.sampled_from([*nasty.MARKDOWN, *nasty.FETCHING]),
        "metadata": JSON,
        "outputs": st.lists(OUTPUTS | JSON, max_size=2) | JSON,
        "attachments": JSON,
    },
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.fixed_dictionaries(
        {},
        optional={"cells": st.lists(CELLS | JSON, max_size=3) | JSON, "metadata": JSON},
    ),
    st.dictionaries(
        st.sampled_from(
            [
                "status",
                "metrics",
                "parameters",
                "error",
                "seconds",
                "device",
                "versions",
            ]
        ),
        JSON,
    ),
)
def test_any_notebook_and_record_make_a_page_that_can_be_written(notebook, record):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html, records = to_html(notebook, record), read_records(notebook)
    html.encode("utf-8")
    Reader(html)
    assert all(isinstance(name, str) for name in records) and all(
        isinstance(in_a_line(value), str) for value in records.values()
    )


def test_records_of_scrapbook_are_read_and_halves_are_passed_over():
    scraps = [
        {"name": "a", "data": 1},
        {"name": "b"},
        {"data": 2},
        {"name": 3, "data": 3},
        {"name": "a", "data": None},
        None,
        "c",
    ]
    outputs = [{"data": {SCRAP: scrap}} for scrap in scraps]
    text = {
        "data": {
            "application/scrapbook.scrap.text+json": {
                "name": "said",
                "data": "text",
                "encoder": "text",
            }
        }
    }
    assert read_records({"cells": [{"outputs": [*outputs, text]}]}) == {
        "a": None,
        "said": "text",
    }


def test_half_an_emoji_is_replaced():
    html = to_html(
        new_notebook(cells=[new_markdown_cell("half \ud83d")]),
        {"status": "ok", "metrics": {"text": "\ud83d"}},
    )
    assert html.count("\N{REPLACEMENT CHARACTER}") == 2 and html.encode()


def test_a_long_text_is_cut_in_its_middle():
    html = shown(
        new_output("stream", name="stdout", text="start " + "x" * 1_000_000 + " end")
    )
    assert (
        len(html) < 250_000
        and "start" in html
        and " end" in html
        and "characters left out" in html
    )


def test_what_a_carriage_return_left_is_shown_in_the_colours_of_a_terminal():
    html = shown(
        new_output("stream", name="stderr", text=" 10%\r 50%"),
        new_output("stream", name="stderr", text="\r100%\r\n\x1b[31mred\x1b[0m <b>"),
    )
    assert (
        "<pre>100%\n" in html
        and '<span class="ansi-red-fg">red</span> &lt;b&gt;' in html
    )


def test_code_of_any_language_is_shown():
    for told_language in (
        {"name": "R"},
        {"pygments_lexer": "nonsense"},
        {"name": 3},
        {},
    ):
        assert "&lt;-" in to_html(
            {
                "cells": [new_code_cell("x <- 1")],
                "metadata": {"language_info": told_language},
            }
        ).replace("</span>", "").replace('<span class="o">', "")


# --- what a run measured


def test_numbers_have_three_digits_and_their_whole_part():
    assert [
        digits(number)
        for number in (
            0.123456,
            12.3456,
            1234.56,
            0.5,
            7,
            1e-7,
            1.23456e9,
            0.9996,
            999.7,
            -0.0123456,
        )
    ] == [
        "0.123",
        "12.3",
        "1235",
        "0.5",
        "7",
        "1e-07",
        "1.23e+09",
        "1",
        "1000",
        "-0.0123",
    ]
    assert (
        digits(0.5, fixed=True) == "0.500"
        and digits(float("nan")) == "nan"
        and digits(True) == "True"
    )


@given(st.floats(-1e300, 1e300))
def test_rounding_keeps_the_size_of_a_number(number):
    assert float(digits(number)) == pytest.approx(number, rel=5.1e-3, abs=1e-307)


INTERVAL = {"value": 0.81234567, "low": 0.7712345, "high": 0.8498765, "n": 400}


@pytest.mark.parametrize(
    "value, folded, said",
    [
        (0.12345678901234567, False, "0.123"),
        (INTERVAL, False, "0.812 [0.771, 0.850], n = 400"),
        ([1 / 3, 2 / 3], False, "0.333, 0.667"),
        (
            [index / 7 for index in range(40)],
            True,
            "<summary>40 values: 0, 0.143, 0.286 … 5.57</summary>",
        ),
        (
            [{"name": "a", "share": 1 / 3}, {"name": "b", "share": 0.5}],
            False,
            "<td>b</td><td class=number>0.500</td>",
        ),
        (
            [{"step": step} for step in range(500)],
            True,
            "<summary>500 rows: step</summary>",
        ),
        ({"epoch": [1, 2], "loss": [0.5, 1 / 3]}, False, "<th>epoch</th><th>loss</th>"),
        (
            {"good": INTERVAL, "bad": INTERVAL},
            False,
            "<td>bad</td><td class=number>0.812</td>",
        ),
        (
            {f"class {index}": 1 / 3 for index in range(30)},
            True,
            "<summary>30 entries</summary>",
        ),
        (
            [[1 / 3, 2], [3, 4]],
            False,
            "<td class=number>0.333</td><td class=number>2</td>",
        ),
        ({"a": {"b": {"c": [1 / 3, {"d": 2 / 3}]}}}, False, "0.667"),
        ("x" * 1000, True, "1,000 characters"),
        ("<b>", False, "&lt;b&gt;"),
        (None, False, "null"),
        (True, False, "true"),
        ([], False, "[]"),
        ({}, False, "{}"),
    ],
)
def test_a_metric_is_drawn_or_folded(value, folded, said):
    html = body(to_html(new_notebook(), {"status": "ok", "metrics": {"it": value}}))
    assert said in html and (html.count("<details") == 2) == folded
    assert not re.search(r"\d\.\d{4}", html), "three digits"
    assert len(html) < 20_000


def test_parameters_keep_their_digits():
    html = to_html(
        new_notebook(),
        {
            "status": "ok",
            "parameters": {"rate": 0.30000000000000004, "rates": [0.123456789]},
        },
    )
    assert "0.30000000000000004" in html and "0.123456789" in html


def test_a_metric_has_one_line_on_a_terminal():
    assert (
        in_a_line(INTERVAL) == "0.812 [0.771, 0.850], n = 400"
        and in_a_line({"a": INTERVAL, "b": [1 / 3]})
        == "{a: 0.812 [0.771, 0.850], n = 400, b: [0.333]}"
    )
    assert (
        in_a_line([index / 7 for index in range(40)])
        == "40 values: 0, 0.143, 0.286 … 5.57"
    )
    assert in_a_line("a\nb") == '"a\\nb"' and len(in_a_line("x" * 1000)) == 100


@given(JSON)
def test_any_value_has_one_line(value):
    line = in_a_line(value)
    line.encode()
    assert len(line) <= 100 and len(line.splitlines()) <= 1


# --- a notebook's file


def test_a_notebook_is_read_as_nbformat_reads_it(tmp_path):
    for path in sorted(Path("nbs").rglob("*.ipynb")) or pytest.skip(
        "the course's notebooks are elsewhere"
    ):
        if not any(part.startswith(".") for part in path.parts):
            ours, theirs = (
                read_notebook(path)["cells"],
                nbformat.read(path, as_version=4).cells,
            )
            assert [
                (cell["cell_type"], cell["source"], cell["metadata"]) for cell in ours
            ] == [(cell.cell_type, cell.source, cell.metadata) for cell in theirs]
    nbformat.write(
        nbformat.v3.new_notebook(
            worksheets=[
                nbformat.v3.new_worksheet(
                    cells=[nbformat.v3.new_code_cell(input="x = 1")]
                )
            ]
        ),
        tmp_path / "old.ipynb",
        version=3,
    )
    (cell,) = read_notebook(tmp_path / "old.ipynb")["cells"]
    assert (cell["cell_type"], cell["source"]) == ("code", "x = 1")
    (tmp_path / "odd.ipynb").write_text(
        '\ufeff{"nbformat": 4, "cells": [3, {"source": 3, "metadata": null}]}',
        encoding="utf-8",
    )
    assert read_notebook(tmp_path / "odd.ipynb")["cells"] == [
        {"cell_type": None, "source": "", "metadata": {}}
    ]


@settings(max_examples=200, deadline=None)
@given(
    JSON
    | st.fixed_dictionaries(
        {"nbformat": st.just(4) | JSON},
        optional={"cells": st.lists(CELLS | JSON, max_size=2) | JSON},
    )
)
def test_any_json_is_read_or_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "any.ipynb"
    path.write_text(json.dumps(content))
    try:
        assert all(
            isinstance(cell["source"], str) and cell["metadata"] is not None
            for cell in read_notebook(path)["cells"]
        )
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"cells": 3}',
        b"[" * 100_000,
        b'{"nbformat": 4, "cells": 3}',
    ],
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, data):
    (tmp_path / "no.ipynb").write_bytes(data)
    with pytest.raises(ValueError):
        read_notebook(tmp_path / "no.ipynb")


def test_an_interval_without_a_count_is_one_line_too():
    record = {
        "status": "ok",
        "metrics": {
            "gain": {"value": 0.04780876494, "low": 0.0225763612, "high": 0.0703851261},
            "share": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8},
        },
    }
    page = to_html(new_notebook(), record)
    assert "0.0478 [0.0226, 0.0704]<" in page and "0.500 [0.250, 0.750], n = 8" in page


def test_the_summary_says_notes_and_what_is_not_known_and_none_apart():
    page = told(
        "x",
        record={
            "status": "ok",
            "notes": ["a <note>"],
            "unknown": ["clock"],
            "parameters": {"model": None},
        },
    )
    assert (
        "<p>a &lt;note&gt;</p>" in page
        and "<p>not known: the values of clock</p>" in page
        and "<td>model</td><td>null</td>" in page
    )


def test_the_title_stands_above_the_summary_and_once():
    record = {"status": "ok", "notebook": "mine/attacks.ipynb"}
    for prose in (
        "# The *size* of $x$ & more\n\nText.",
        "Before\n\n# The *size* of $x$ & more\n\nText.",
        "The *size* of $x$ & more\n=====\n\nText.",
    ):
        html = to_html(
            new_notebook(
                cells=[
                    new_code_cell("1"),
                    new_markdown_cell(prose),
                    new_markdown_cell("# A second"),
                ]
            ),
            record,
        )
        made = body(html)
        assert (
            made.startswith("<main><h1>The <em>size</em> of <math")
            and made.count("<h1>") == 2
            and made.index("</h1>") < made.index("summary") < made.index("<p>Text.</p>")
        )
        assert "<title>The size of x &amp; more</title>" in html
    for prose in ("```\n# a remark\n```", "text", "<p>&#35; no title</p>"):
        html = to_html(new_notebook(cells=[new_markdown_cell(prose)]), record)
        assert (
            body(html).startswith("<main><h1>mine/attacks.ipynb</h1>")
            and "<title>mine/attacks.ipynb</title>" in html
        )
    html = to_html(new_notebook(cells=[new_markdown_cell("text")]))
    assert (
        body(html).startswith("<main><p>text</p>") and "<title>notebook</title>" in html
    )


def test_the_summary_says_when_the_run_began():
    page = told(
        "x",
        record={"status": "ok", "started": "2026-11-28T09:41:07+01:00", "seconds": 3},
    )
    assert (
        '<time datetime="2026-11-28T09:41:07+01:00">2026-11-28 09:41 UTC+01:00</time>'
        in page
    )
    for odd in (None, 3, "", "yesterday", [], "<b>"):
        assert "<time" not in told("x", record={"status": "ok", "started": odd})


LINES = "".join(f"epoch {number} <b>\n" for number in range(60))


@pytest.mark.parametrize(
    "output, summary",
    [
        (
            new_output("stream", name="stdout", text=LINES),
            "60 lines: epoch 0 &lt;b&gt;",
        ),
        (new_output("stream", name="stdout", text=LINES[:300]), ""),
        (
            new_output("execute_result", {"text/plain": LINES}),
            "60 lines: epoch 0 &lt;b&gt;",
        ),
        (
            new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m " * 2000),
            "1 line: red red",
        ),
        (
            new_output(
                "display_data",
                {"text/html": pd.DataFrame({"a": range(60)}).to_html(max_rows=60)},
            ),
            "60 rows: a",
        ),
        (
            new_output(
                "display_data", {"text/html": pd.DataFrame({"a": range(30)}).to_html()}
            ),
            "",
        ),
        (new_output("display_data", {"image/png": PNG * 200}), ""),
        (new_output("error", ename="E", evalue="v", traceback=LINES.split("\n")), ""),
    ],
    ids=[
        "stream",
        "short stream",
        "result",
        "one line",
        "table",
        "short table",
        "picture",
        "error",
    ],
)
def test_a_long_output_is_folded_under_a_line_that_says_how_long(output, summary):
    page = body(to_html({"cells": [new_code_cell("", outputs=[output])]}))
    assert (
        page.count("<details") == bool(summary)
        and f"<summary>{summary}" in page
        or not summary
    )
    assert (
        len(re.findall("<summary>(.*?)</summary>", page + "<summary></summary>")[0])
        < 120
    )


def test_an_escaped_sign_separates_no_columns():
    assert (
        outline(r"R \& D \\ c") == "[R&D] / [c]"
        and outline(r"\text{R\&D} & x".replace(" & ", r" \& ")) == "R&D&x"
    )


def test_an_answer_stands_above_what_was_measured_and_the_lesson_below():
    answer = new_code_cell(
        "verdict",
        metadata={"tags": ["answer"]},
        outputs=[new_output("display_data", {"text/markdown": "It **lost**."})],
    )
    cells = [
        new_markdown_cell("# A job"),
        new_markdown_cell("How it works."),
        answer,
        new_code_cell("1", metadata={"tags": ["answer"]}),
    ]
    record = {
        "status": "ok",
        "metrics": {"accuracy": 0.5},
        "started": "2026-01-02T03:04:05+00:00",
    }
    made = to_html(new_notebook(cells=cells), record)
    places = [
        made.index(part)
        for part in (
            "A job</h1>",
            "<strong>ok",
            "It <strong>lost",
            "accuracy",
            "How it works.",
        )
    ]
    assert places == sorted(places) and made.count("It <strong>lost") == 1
    assert "<details open><summary>metrics" not in made, (
        "the answer holds the key numbers"
    )
    plain = to_html(
        new_notebook(
            cells=[new_markdown_cell("# A job"), new_markdown_cell("How it works.")]
        ),
        record,
    )
    assert "<details open><summary>metrics" in plain
