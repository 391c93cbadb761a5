"""Every exercise of the course, three ways; and the checker itself."""

import ast
import copy
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from bigmodel_nb.kit import exercises
from bigmodel_nb.kit.exercises import (
    Verdict,
    catalogue,
    check,
    difference,
    progress,
    read_exercises,
    show_value,
)

NOTEBOOKS = {
    name: json.loads(path.read_text(encoding="utf-8"))
    for name, path in catalogue().items()
}
ALL = [
    exercise
    for name, notebook in NOTEBOOKS.items()
    for exercise in read_exercises(notebook, name).values()
]


@pytest.fixture(autouse=True)
def progress_here(tmp_path, monkeypatch):
    """Nothing that a test solves reaches the reader's own notes."""
    monkeypatch.setenv("BIGMODEL_PROGRESS", str(tmp_path / "progress"))
    return tmp_path / "progress"


def ask(exercise, source=None, answer=None) -> Verdict:
    """What the exercise's own check cell says of an answer."""
    names = {**exercises._names(NOTEBOOKS[exercise.notebook]), "check": check}
    if source is not None:
        exec(source, names)
    if answer is not None:
        names[exercise.name] = answer
    *before, last = ast.parse(exercise.check).body
    exec(compile(ast.Module(before, []), "check", "exec"), names)
    return eval(compile(ast.Expression(last.value), "check", "eval"), names)


each_exercise = pytest.mark.parametrize(
    "exercise", ALL, ids=lambda exercise: f"{exercise.notebook}/{exercise.name}"
)


@each_exercise
def test_the_stub_fails(exercise):
    assert ask(exercise, exercise.stub).state == "empty"


@each_exercise
def test_the_solution_passes_and_is_noted(exercise, progress_here):
    for _ in range(3):  # the cases are other ones each time
        verdict = ask(exercise, exercise.solution)
        assert verdict.solved, verdict
    assert (progress_here / exercise.notebook / f"{exercise.name}.json").exists()


@each_exercise
def test_each_classic_mistake_is_known(exercise):
    assert exercise.mistakes
    assert all(sentence and source for sentence, source in exercise.mistakes)
    for sentence, source in exercise.mistakes:
        verdict = ask(exercise, source)
        assert verdict.state == "wrong" and verdict.message.startswith(sentence), (
            f"{source}\n{verdict}"
        )
        given_away = [
            line
            for line in exercise.solution.splitlines()[1:]
            if len(line.strip()) > 12 and line.strip() in verdict.message
        ]
        assert not given_away


@each_exercise
def test_a_typed_in_answer_fails(exercise, monkeypatch):
    seen = {}

    def spy(exercise, answer, names, inputs, measure=None, *more):
        seen["value"] = exercises._Trial(
            answer, exercises._draw(inputs, 12345), measure, 0
        ).value
        return Verdict("wrong", "")

    with monkeypatch.context() as patched:
        patched.setattr(exercises, "judge", spy)
        ask(exercise, exercise.solution)
    assert (
        ask(exercise, answer=lambda *_, **__: copy.deepcopy(seen["value"])).state
        == "wrong"
    )


@each_exercise
def test_hints_are_graded_and_few(exercise):
    assert 1 <= len(exercise.hints) <= 3 and all(exercise.hints)
    assert 1 <= exercise.difficulty <= 3 and 1 <= exercise.minutes <= 60


# the checker

SOLUTION = "def double(x):\n    return 2 * x"
MISTAKE = "def double(x):\n    return x**2"


@pytest.fixture
def lesson(tmp_path):
    """Writes a notebook with one exercise; its path."""

    def write(
        heading="### Exercise 1 · Double\n\n●○○ · 5 minutes · reread “Twice”",
        stub="def double(x):\n    ...",
        check_cell="check('lesson', 'double', inputs=lambda: 1)",
        solution=SOLUTION,
        mistakes=(("Squared.", MISTAKE),),
    ):
        folds = (
            f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n</details>\n"
            if solution
            else ""
        )
        folds += "".join(
            f"\n<details><summary>A classic mistake</summary>\n\n{said}\n\n"
            f"```python\n{code}\n```\n</details>\n"
            for said, code in mistakes
        )
        cells = [
            new_code_cell("import torch\nimport numpy as np\n%matplotlib inline"),
            new_markdown_cell(heading),
            new_code_cell(stub, metadata={"tags": ["exercise"]}),
            new_code_cell(check_cell),
            new_markdown_cell(folds),
        ]
        nbformat.write(new_notebook(cells=cells), tmp_path / "lesson.ipynb")
        return str(tmp_path / "lesson.ipynb")

    return write


def asked(lesson_path, answer, **options):
    names = {
        "check": check,
        "double": answer,
        "options": {"inputs": lambda: torch.randn(3), **options},
        "path": lesson_path,
    }
    return eval("check(path, 'double', **options)", names)


def test_a_verdict_names_case_value_and_what_to_reread(lesson):
    verdict = asked(lesson(), lambda x: 3 * x, seed=7)
    assert re.match(
        r"Case 1 of 5, `x` = \[.+\]: came -?[\d.]+, expected -?[\d.]+ at \[\d\]\."
        r" To reread: “Twice”\. To see .* `seed=7`\.$",
        verdict.message,
    )
    assert verdict == asked(lesson(), lambda x: 3 * x, seed=7), (
        "the same seed, the same cases"
    )
    assert asked(lesson(), lambda x: 3 * x) != asked(lesson(), lambda x: 3 * x), (
        "otherwise fresh ones"
    )


def test_whatever_an_answer_does_is_told_in_words(lesson):
    def fails(x):
        raise KeyError("oops")

    def changes(x):
        x *= 2
        return x

    path = lesson()
    assert "came the exception KeyError: 'oops'" in asked(path, fails).message
    assert "an argument was changed on the way" in asked(path, changes).message
    assert (
        "came shape (1, 3), expected shape (3,)"
        in asked(path, lambda x: 2 * x[None]).message
    )
    assert "came a str, expected" in asked(path, lambda x: "2x").message
    assert "takes 0 positional arguments" in asked(path, lambda: 1).message
    assert "came the exception SystemExit" in asked(path, lambda x: sys.exit()).message
    assert (
        asked(path, None).message
        == "There is no `double` yet. Run the cell above first."
    )
    assert asked(path, lambda x: x * 2).solved and asked(path, lambda x: x + x).solved


def test_a_known_mistake_is_named_only_where_it_fits_every_case(lesson):
    path = lesson()
    assert asked(path, lambda x: x * x).message.startswith("Squared.\n\nCase")
    assert asked(path, lambda x: x**2 + 1).message.startswith("Case")
    assert (
        "Squared."
        not in asked(path, lambda x: x * x if x.sum() > 0 else 3 * x, cases=20).message
    )


def test_a_check_that_does_not_work_says_so(lesson, tmp_path):
    assert asked(str(tmp_path / "none.ipynb"), lambda x: x).state == "broken"
    assert "none" in asked("kit/none", lambda x: x).message
    assert (
        asked(
            lesson(solution="def double(x):\n    return x.nothing"), lambda x: x
        ).state
        == "broken"
    )
    assert asked(lesson(), lambda x: x, inputs=lambda: 1 / 0).state == "broken"


@pytest.mark.parametrize(
    "change, part",
    [
        ({"heading": "### Exercise 1 · Double"}, "a heading with difficulty"),
        ({"stub": "x = 1"}, "one function or class"),
        ({"check_cell": "1"}, "a cell with check"),
        ({"solution": ""}, "a fold “Solution”"),
    ],
)
def test_an_exercise_that_lacks_a_part_is_named(lesson, change, part):
    path = lesson(**change)
    with pytest.raises(ValueError, match=part):
        read_exercises(nbformat.read(path, 4), "mine")
    assert part in asked(path, lambda x: x).message


def test_the_learners_names_do_not_reach_the_solution(lesson):
    solution = "def double(x):\n    return torch.add(x, x)"
    names = {
        "check": check,
        "double": lambda x: 2 * x,
        "torch": None,
        "path": lesson(solution=solution),
        "inputs": lambda: __import__("torch").randn(3),
    }
    assert eval("check(path, 'double', inputs=inputs)", names).solved


def test_a_class_is_compared_by_what_it_is_measured_by(lesson):
    path = lesson(
        stub="class double:\n    def __call__(self, x):\n"
        "        raise NotImplementedError",
        solution="class double:\n    def __call__(self, x):\n        return 2 * x",
        mistakes=(),
    )
    right = type("double", (), {"__call__": lambda self, x: x + x})
    stub = type(
        "double",
        (),
        {"__call__": lambda self, x: (_ for _ in ()).throw(NotImplementedError)},
    )
    assert asked(path, right, measure=lambda made, x: made()(x)).solved
    assert asked(path, stub, measure=lambda made, x: made()(x)).state == "empty"


def test_random_numbers_go_on_as_if_nothing_had_been(lesson):
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    asked(lesson(), lambda x: 2 * x)
    assert torch.equal(torch.randn(2), expected)


def test_an_answer_that_draws_gets_the_same_draws(lesson):
    solution = "def double(x):\n    return 2 * x + torch.randn(3)"
    assert asked(lesson(solution=solution), lambda x: torch.randn(3) + x + x).solved


def test_progress_follows_the_path_that_the_readme_shows():
    chapters = list(dict.fromkeys(name.split("/")[0] for name in progress().notebook))
    assert chapters == [name for name in exercises.CHAPTERS if name in chapters]
    assert set(exercises.CHAPTERS) == {name.split("/")[0] for name in catalogue()}
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    path = readme.split("in this order: ")[1].split(".")[0]
    assert tuple(re.findall(r"`(\w+)`", path)) == exercises.CHAPTERS[1:7]


def test_progress_is_kept_and_shown(progress_here, monkeypatch):
    first = ALL[0]
    assert not progress().solved.any()
    assert ask(first, first.solution).solved
    shown = progress()
    assert list(shown.notebook[shown.solved != ""]) == [first.notebook]
    assert len(shown) == len(ALL)
    (progress_here / first.notebook / f"{first.name}.json").write_text("{")
    assert not progress().solved.any(), "a spoilt note is no note"
    monkeypatch.setenv("BIGMODEL_PROGRESS", str(Path(__file__)))
    verdict = ask(first, first.solution)
    assert verdict.solved and "could not be noted" in verdict.message


def test_progress_of_an_own_notebook_stays_in_the_folder_of_progress(
    lesson, progress_here
):
    assert asked(lesson(), lambda x: 2 * x).solved
    assert len(list(progress_here.rglob("double.json"))) == 1


numbers = (
    st.floats(allow_nan=True, allow_infinity=True)
    | st.integers(-(10**9), 10**9)
    | st.booleans()
    | st.none()
    | st.text(max_size=4)
)
values = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values, values)
@settings(deadline=None)
def test_any_two_values_are_compared_and_described(one, other):
    assert difference(one, copy.deepcopy(one)) is None
    said = difference(one, other)
    assert said is None or said.startswith(("came", "at "))
    assert isinstance(show_value(one), str) and len(show_value(one)) <= 80


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.floats(-1e-9, 1e-9))
def test_rounding_is_no_difference_and_more_is(values, error):
    expected = np.array(values)
    scale = max(abs(expected).max(), 1e-9)
    assert difference(expected + error * scale, expected) is None
    assert difference(expected + 1e-3 * scale, expected) is not None


def test_kinds_of_numbers_are_told_apart_where_it_matters():
    assert difference(torch.tensor(2.0), 2.0) is None
    assert difference(2, np.float64(2.0)) is None
    assert difference(torch.ones(3, dtype=torch.bfloat16), torch.ones(3)) is None
    assert difference([1, 2], (1, 2)) is None and difference([1], [1, 2]) is not None
    assert (
        difference(torch.tensor([float("nan")]), torch.tensor([float("nan")])) is None
    )
    assert (
        difference(torch.tensor([1, 2]), torch.tensor([1, 3]))
        == "came 2, expected 3 at [1]"
    )
    assert "keys a" in difference({}, {"a": 1})
    assert difference({"a": 1}, {"a": 1}) is None


def test_values_are_shown_in_a_few_words():
    assert show_value(torch.tensor([0.1, 0.25])) == "[0.1, 0.25]"
    assert show_value(np.arange(3)) == "[0, 1, 2]"
    assert show_value(torch.ones(2, 3)) == "a tensor of shape (2, 3)"
    assert show_value(np.ones((2, 3))) == "an array of shape (2, 3)"
    assert (
        show_value([torch.ones(2, 3)] * 4)
        == "a list of 4: a tensor of shape (2, 3), a tensor of shape (2, 3), …"
    )
    assert show_value(torch.tensor(1 / 3)) == "0.333333"
    assert show_value("x" * 99).startswith("a str: 'xxx")


def test_arguments_have_the_names_of_whoever_takes_them(lesson):
    path = lesson(solution="def double(x):\n    return x + x")
    assert "`x` = 'ab'" in asked(path, lambda x: x, inputs=lambda: "ab").message
    assert (
        "`letters` = 'ab'"
        in asked(
            path,
            lambda y: y,
            inputs=lambda: "ab",
            measure=lambda made, letters: made(letters),
        ).message
    )
    long = "a = 1\n" * 20
    assert (
        f"\n~~~\n{long}\n~~~\n" in asked(path, lambda x: x, inputs=lambda: long).message
    )


@pytest.mark.parametrize("came", [np.arange(3), torch.ones(2), [1, 2], None, 3.5])
def test_an_answer_of_another_kind_than_a_text_is_wrong_and_not_broken(lesson, came):
    assert difference(came, "text").startswith("came")
    verdict = asked(
        lesson(solution="def double(x):\n    return 'text'"), lambda x: came
    )
    assert verdict.state == ("empty" if came is None else "wrong"), verdict


def test_what_a_plain_reader_sees_keeps_the_signs_of_a_value():
    assert (
        repr(Verdict("wrong", "came 'a*b', expected `c`.\n\nTo reread: x."))
        == "Not yet. came 'a*b', expected c.\n\nTo reread: x."
    )


def test_a_note_that_cannot_be_written_leaves_nothing_behind(
    progress_here, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exercises.os, "replace", full)
    verdict = ask(ALL[0], ALL[0].solution)
    assert verdict.solved
    assert "could not be noted" in verdict.message
    assert "No space left" in verdict.message
    assert not [path for path in progress_here.rglob("*") if path.is_file()]
