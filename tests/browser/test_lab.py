"""The notebooks in JupyterLab, with hands.

A browser opens them, runs them, moves what moves and solves an exercise.
"""

import re
import time
from datetime import date

import nbformat
import pytest

from bigmodel_nb.headless.parameters import declaration
from bigmodel_nb.kit.exercises import catalogue, read_exercises

LESSON = "foundations/losses"  # whose first exercise is solved
# The heading at which a run ends: what follows takes as long again, in the same way.
UNTIL = {"tour": "## 6 · Words"}
SECOND = 1000
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
ERROR = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]'
STDERR = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'
SOLVED = re.compile(r"\bSolved\b")
UNSOLVED = re.compile(r"Not yet|Nothing to check yet")


def seconds(name):
    """What a run of the notebook costs, as measured."""
    return int(re.match(r"(\d+) s", declaration(name).cost).group(1))


def cheapest_of_each_chapter():
    """The tour too; of the chapters, those that have one of up to ten seconds."""
    chapters = {}
    for name in catalogue():
        chapters.setdefault(name.split("/")[0], []).append(name)
    cheapest = [min(names, key=seconds) for names in chapters.values()]
    return [name for name in cheapest if name == "tour" or seconds(name) <= 10]


def of_cells(*sources, kernel="python3"):
    """A notebook of code cells."""
    metadata = {
        "kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}
    }
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
        metadata=metadata,
    )


class Notebook:
    """A notebook that is open in a tab."""

    def __init__(self, page, lab, path):
        self.page, self.lab, self.path = page, lab, path
        page.goto(f"{lab.address}/lab/tree/{path}?token={lab.token}&reset")
        self.wait_until_open()

    def wait_until_open(self):
        """Until its cells are there and it is connected to an idle kernel.

        One is chosen where JupyterLab asks for one. The server is asked, since
        JupyterLab calls a kernel idle that has not started yet, and then runs nothing.
        """
        self.page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=60 * SECOND)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.kernel_dialog.is_visible():
                self.choose_kernel()
            kernels = [
                each["kernel"]
                for each in self.lab.ask("sessions")
                if each["path"] == self.path
            ]
            if (
                kernels
                and kernels[0]["connections"]
                and kernels[0]["execution_state"] == "idle"
            ):
                break
            self.page.wait_for_timeout(100)
        else:
            raise AssertionError(
                f"{self.path} has no idle kernel after a minute: {kernels}"
            )
        self.page.wait_for_selector(
            f'{PANEL} .jp-Notebook-ExecutionIndicator[data-status="idle"]'
        )

    @property
    def kernel_dialog(self):
        return self.page.locator(".jp-Dialog", has_text="Select Kernel")

    def choose_kernel(self):
        """Answer JupyterLab's question with the kernel of this Python."""
        names = self.kernel_dialog.locator("select")
        names.select_option(
            label=names.locator("option", has_text="Python 3").first.inner_text()
        )
        self.kernel_dialog.get_by_role("button", name="Select").click()
        self.kernel_dialog.wait_for(state="detached")

    def menu(self, title, command):
        """Choose an entry of the menu bar."""
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(
            title, exact=True
        ).click()
        self.page.locator(f'.lm-Menu [data-command="{command}"]').first.click()

    def run_all(self, limit=60):
        """Run all cells, and wait up to `limit` seconds until all ran or one failed."""
        self.menu("Run", "runmenu:run-all")
        self.wait_until_idle(limit)

    def wait_until_idle(self, limit=60):
        """Until no cell is running or waits for its turn, and the kernel is idle."""
        self.page.wait_for_function(
            """panel => {
                const shown = document.querySelector(panel);
                const shows = shown.querySelectorAll(".jp-CodeCell .jp-InputPrompt");
                const prompts = [...shows].map(each => each.textContent);
                return prompts.some(each => /\\d/.test(each))
                    && !prompts.some(each => each.includes("*"))
                    && shown.querySelector(
                        '.jp-Notebook-ExecutionIndicator[data-status="idle"]');
            }""",
            arg=PANEL,
            timeout=limit * SECOND,
            polling=250,  # not sixty times a second, beside a kernel that computes
        )

    def run_above(self, index, limit=60):
        """Run the cells above the one at `index`, and wait as `run_all` does."""
        self.cell(index).click()
        self.menu("Run", "notebook:run-all-above")
        self.wait_until_idle(limit)

    def cell(self, index):
        """The cell at `index` of the notebook, from 0."""
        return self.page.locator(f"{PANEL} .jp-Cell").nth(index)

    def run(self, index, limit=60):
        """Run one cell, as a learner does, and wait for its end."""
        self.cell(index).locator(".cm-content").first.click()
        self.page.keyboard.press("Control+Enter")
        self.wait_until_idle(limit)

    def type(self, index, text):
        """Put `text` into a cell in place of what stands there."""
        self.cell(index).locator(".cm-content").first.click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(text)

    def save(self):
        """Save, and wait until the file is written: its tab is marked no more."""
        self.page.keyboard.press("Control+s")
        self.page.wait_for_selector(
            ".lm-DockPanel-tabBar .lm-mod-current:not(.jp-mod-dirty)",
            timeout=30 * SECOND,
        )

    def restart(self):
        """Restart the kernel and agree that its variables are lost."""
        self.menu("Kernel", "kernelmenu:restart")
        with self.page.expect_response(
            lambda answer: answer.url.split("?")[0].endswith("/restart")
        ):
            self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.wait_until_open()

    def errors(self):
        """What the outputs show of exceptions and on stderr."""
        return self.page.locator(f"{PANEL} :is({ERROR}, {STDERR})").all_inner_texts()

    def cut_off(self):
        """The longest line of each cell whose code is wider than its editor."""
        return self.page.locator(
            f"{PANEL} .jp-InputArea-editor .cm-scroller"
        ).evaluate_all(
            """all => all.filter(each => each.scrollWidth > each.clientWidth + 1)
                .map(each => each.innerText.split("\\n")
                    .reduce((a, b) => a.length < b.length ? b : a))"""
        )

    def pictures(self):
        """The widths of the outputs' pictures, in pixels; 0 for one not to be drawn."""
        return self.page.locator(f"{PANEL} .jp-OutputArea img").evaluate_all(
            "all => all.map(each => each.naturalWidth)"
        )


@pytest.mark.parametrize("name", cheapest_of_each_chapter())
def test_notebook_runs_in_the_browser(name, page, lab):
    path = catalogue()[name].relative_to(catalogue()["tour"].parent).as_posix()
    cells = lab.read(path).cells
    notebook, last = Notebook(page, lab, path), len(cells)
    assert not notebook.pictures(), "the copy has no outputs before it runs"
    if name in UNTIL:
        last = [UNTIL[name] in cell.source for cell in cells].index(True)
        notebook.run_above(last, limit=120 + 4 * seconds(name))
    else:
        notebook.run_all(limit=120 + 4 * seconds(name))
    assert not notebook.errors()
    assert notebook.pictures() and min(notebook.pictures()) > 100
    assert not notebook.cut_off()
    notebook.save()
    ran = [
        cell.execution_count
        for cell in lab.read(path).cells[:last]
        if cell.cell_type == "code" and cell.source.strip()
    ]
    assert ran == list(range(1, len(ran) + 1)), "every cell ran once, in order"


def test_an_unknown_kernel_is_asked_for(page, lab):
    path = lab.write("unknown.ipynb", of_cells("1 + 2", kernel="nowhere"))
    page.goto(f"{lab.address}/lab/tree/{path}?token={lab.token}&reset")
    page.locator(".jp-Dialog", has_text="Select Kernel").wait_for(timeout=60 * SECOND)
    notebook = Notebook(page, lab, path)  # opened again: it answers the question
    notebook.run_all()
    assert notebook.cell(0).locator(".jp-OutputArea").inner_text().strip().endswith("3")


def test_a_failing_cell_is_seen(page, lab):
    """What the other tests look for is there when a cell fails."""
    notebook = Notebook(
        page,
        lab,
        lab.write(
            "failing.ipynb",
            of_cells("1 / 0", "import sys\nprint('told', file=sys.stderr)"),
        ),
    )
    notebook.run(0)
    notebook.run(1)
    assert "ZeroDivisionError" in notebook.errors()[0]
    assert notebook.errors()[1].strip() == "told"


FORM = """import base64, io
import ipywidgets as widgets
import matplotlib.pyplot as plt

slider = widgets.FloatSlider(value=1.0, min=0.5, max=3.0, step=0.5, description="power")
shown = widgets.HTML()

def draw(change=None):
    made, axes = plt.subplots(figsize=(4, 2))
    inputs = [x / 10 for x in range(11)]
    axes.plot(inputs, [x ** slider.value for x in inputs])
    buffer = io.BytesIO()
    made.savefig(buffer, format="png")
    plt.close(made)
    source = base64.b64encode(buffer.getvalue()).decode()
    alt = f"x to the power {slider.value}"
    shown.value = f'<img alt="{alt}" src="data:image/png;base64,{source}">'

slider.observe(draw, "value")
draw()
widgets.VBox([slider, shown])"""


def move_first_slider(notebook):
    """Press an arrow key on the first slider.

    The description and the source of the picture, before and after.
    """
    handle = notebook.page.locator(f"{PANEL} .noUi-handle").first
    handle.wait_for(timeout=30 * SECOND)
    picture = notebook.page.locator(
        f"{PANEL} .widget-html img, {PANEL} .jupyter-widgets img"
    ).first
    picture.wait_for()
    before = picture.get_attribute("alt"), picture.get_attribute("src")
    handle.focus()
    notebook.page.keyboard.press("ArrowRight")
    notebook.page.wait_for_function(
        "([panel, old]) => [...document.querySelectorAll(panel + ' img')]"
        ".every(each => each.src != old)",
        arg=[PANEL, before[1]],
        timeout=30 * SECOND,
    )
    notebook.wait_until_idle()
    return before, (picture.get_attribute("alt"), picture.get_attribute("src"))


def test_a_slider_moves_the_picture(page, lab):
    notebook = Notebook(
        page, lab, lab.write("slider.ipynb", of_cells(FORM, "slider.value"))
    )
    notebook.run(0)
    before, after = move_first_slider(notebook)
    assert before[0] == "x to the power 1.0" and after[0] == "x to the power 1.5"
    notebook.run(1)
    assert (
        notebook.cell(1).locator(".jp-OutputArea").inner_text().strip().endswith("1.5")
    ), "the kernel knows"
    assert min(notebook.pictures()) > 100 and not notebook.errors()


def test_an_explorer_moves_its_picture(page, lab):
    cell = "from bigmodel_nb.kit.widgets import softmax_explorer\nsoftmax_explorer()"
    notebook = Notebook(page, lab, lab.write("explorer.ipynb", of_cells(cell)))
    notebook.run(0)
    before, after = move_first_slider(notebook)
    assert before[1] != after[1]
    assert min(notebook.pictures()) > 100 and not notebook.errors()


def test_an_exercise_is_solved_and_stays_solved(page, lab):
    source = nbformat.read(catalogue()[LESSON], as_version=4)
    exercise = next(iter(read_exercises(source).values()))
    stub = next(
        place for place, cell in enumerate(source.cells) if cell.source == exercise.stub
    )
    source.cells.append(
        nbformat.v4.new_code_cell(
            "from bigmodel_nb.kit.exercises import progress\nprogress()"
        )
    )
    lab.write("exercise.ipynb", source)
    check, last = stub + 1, len(source.cells) - 1
    notebook = Notebook(page, lab, "exercise.ipynb")

    notebook.run_all(limit=120)
    assert not notebook.errors(), "an unsolved exercise raises nothing"
    answer = notebook.cell(check).locator(".jp-Cell-outputWrapper")
    table = notebook.cell(last).locator(".jp-Cell-outputWrapper")
    assert UNSOLVED.search(answer.inner_text())
    assert not SOLVED.search(answer.inner_text())
    assert exercise.title in table.inner_text()
    assert str(date.today()) not in table.inner_text()

    notebook.type(stub, exercise.solution)
    notebook.run(stub)
    notebook.run(check)
    assert SOLVED.search(answer.inner_text())
    assert not UNSOLVED.search(answer.inner_text())
    notebook.run(last)
    solved = table.inner_text()
    assert solved.count(str(date.today())) == 1, "one exercise is noted as solved"

    notebook.save()
    page.reload()
    notebook.wait_until_open()
    notebook.restart()
    assert (
        notebook.cell(stub).locator(".cm-content").inner_text().split()
        == exercise.solution.split()
    ), "what was typed is kept"
    notebook.run(last)
    assert notebook.cell(last).locator(".jp-InputPrompt").inner_text() == "[1]:", (
        "a new kernel"
    )
    assert str(date.today()) in table.inner_text(), "progress is kept"
