"""Chapter 10: a value on its way. What the notebook receives equals what was given.

By terminal, by file, from Python, through sweeps.
"""

import json
import math
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from bigmodel_nb.headless.cli import app
from bigmodel_nb.headless.parameters import (
    UNKNOWN,
    BadRequest,
    Parameter,
    Text,
    as_source,
    check_parameters,
    check_value,
    parse_text,
    read_parameters,
    read_values,
)
from bigmodel_nb.headless.run import run
from bigmodel_nb.headless.sweep import sweep

HERE = Path(__file__).absolute()
INFINITE = "float('inf')"


def parameter(kind, source=""):
    return Parameter("x", kind, UNKNOWN, source=source)


def same(one, other):
    """Equal, and of the same types all the way down: 1, 1.0 and True are equal too."""
    return as_source(one) == as_source(other) and one == other


# --- the three doors, for any type


class Case(NamedTuple):
    kind: str
    value: Any


def spell(value):
    """A value as one would write it in a terminal, within brackets."""
    if isinstance(value, (list, tuple, set, frozenset)):
        marks = {list: "[]", tuple: "()", set: "{}", frozenset: "{}"}[type(value)]
        if not value and isinstance(value, (set, frozenset)):
            return "[]"  # as {} is an empty dict
        return (
            marks[0]
            + ", ".join(map(spell, value))
            + "," * (len(value) == 1 and marks == "()")
            + marks[1]
        )
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{spell(key)}: {spell(each)}" for key, each in value.items())
            + "}"
        )
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if len(value) % 2 else json.dumps(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    return repr(str(value)) if isinstance(value, (Path, timedelta)) else repr(value)


def in_terminal(case):
    return case.value if case.kind == "str" else spell(case.value)


class Dumper(yaml.SafeDumper):
    """Sequences as lists, texts in quotes, everything else as YAML writes it."""


Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style='"'
    ),
)
for kind in (tuple, set, frozenset):
    Dumper.add_representer(
        kind, lambda dumper, value: dumper.represent_list(list(value))
    )
for kind in (type(HERE), timedelta, time):
    Dumper.add_representer(
        kind,
        lambda dumper, value: dumper.represent_scalar(
            dumper.resolve(yaml.ScalarNode, str(value), (True, False)), str(value)
        ),
    )  # without quotes: 0:00:01 is a number to YAML


def in_yaml(value):
    """Keys that are tuples stand there as in a terminal."""
    if isinstance(value, dict):
        return {
            spell(key) if isinstance(key, tuple) else key: in_yaml(each)
            for key, each in value.items()
        }
    return (
        type(value)(map(in_yaml, value)) if isinstance(value, (list, tuple)) else value
    )


LETTERS = st.characters(codec="utf-8")
LEAVES = {
    "int": st.integers(-(10**20), 10**20),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "str": st.text(LETTERS, max_size=6)
    | st.sampled_from(
        [
            "none",
            "true",
            "1",
            "1e-3",
            "8/255",
            "[1, 2]",
            "a, b",
            "2024-02-29",
            "~",
            "it's",
            '"',
            "\\n",
            "no",
            "{a: 1}",
            "0..4",
            "#",
            "",
        ]
    ),
    "None": st.none(),
    "date": st.dates(),
    "datetime": st.datetimes() | st.datetimes(timezones=st.just(timezone.utc)),
    "time": st.times().filter(lambda value: value.fold == 0),
    "Path": st.sampled_from([HERE, HERE.parent]),
    "bytes": st.binary(max_size=4),
    "typing.Literal['fast', 'None', 3, None, True]": st.sampled_from(
        ["fast", "None", 3, None, True]
    ),
}
KEYS = {name: LEAVES[name] for name in ("int", "str", "date", "bool")} | {
    "tuple[int, bool]": st.tuples(LEAVES["int"], LEAVES["bool"])
}
LEAVES["datetime"] = LEAVES["datetime"].filter(lambda value: value.fold == 0)


def cases(depth):
    """Annotations with a value of each."""
    plain = st.sampled_from(list(LEAVES)).flatmap(
        lambda kind: LEAVES[kind].map(lambda value: Case(kind, value))
    )
    if depth == 0:
        return plain

    @st.composite
    def nested(draw):
        inner = [draw(cases(depth - 1)) for _ in range(2)]
        (one, first), (two, second) = inner
        key = draw(st.sampled_from(list(KEYS)))
        keys = draw(st.lists(KEYS[key], max_size=3, unique=True))
        form = draw(st.integers(0, 11))
        return [
            lambda: Case(f"list[{one}]", [first] * draw(st.integers(0, 2))),
            lambda: Case(
                f"List['{one}']" if "'" not in one else f"List[{one}]", [first]
            ),
            lambda: Case(f"tuple[{one}, {two}]", (first, second)),
            lambda: Case(f"tuple[{one}, ...]", (first,) * draw(st.integers(0, 2))),
            lambda: Case(f"dict[{key}, {one}]", dict.fromkeys(keys, first)),
            lambda: Case(f"Mapping[{key}, {two}]", dict.fromkeys(keys, second)),
            lambda: Case(f"set[{key}]", set(keys)),
            lambda: Case(f"frozenset[{key}]", frozenset(keys)),
            lambda: Case(f"{one} | None", draw(st.sampled_from([first, None]))),
            lambda: Case(f"Optional[{one}]", first),
            lambda: (
                Case(
                    f"typing.Union[str, {one}]",
                    draw(st.sampled_from([first, "text", "3", "none"])),
                )
                if "Path" not in one
                else inner[0]
            ),
            lambda: Case(f"collections.abc.Sequence[{one}]", [first, first]),
        ][form]()

    return plain | nested()


@settings(max_examples=600, deadline=None)
@given(cases(3))
@example(Case("list[str]", ["New York, NY", "Paris"]))
@example(Case("list[list[int]]", [[1, 2], [3]]))
@example(Case("dict[int, str]", {1: "a"}))
@example(Case("tuple[int, int]", (32, 32)))
@example(Case("list[float]", [1e-3, 1e-4]))
@example(Case("dict[str, float]", {"a": 1e-3}))
def test_what_is_given_arrives_by_every_door(case):
    wanted = parameter(case.kind)
    assert same(check_value(wanted, case.value), case.value), "Python"
    assert same(check_value(wanted, in_terminal(case), text=True), case.value), (
        f"terminal: {in_terminal(case)}"
    )
    assert same(
        check_value(wanted, check_value(wanted, in_terminal(case), text=True)),
        case.value,
    ), "checked again, as a sweep's run does"
    assert same(
        eval(as_source(case.value), {"__builtins__": {"__import__": __import__}}),
        case.value,
    ), "as Python's source, with no name but that"


@settings(max_examples=300, deadline=None)
@given(cases(2))
@example(Case("typing.Union[str, time]", time(0, 0, 0, 1)))
@example(Case("typing.Union[str, time]", "00:00:00.000001"))
def test_what_is_given_arrives_from_a_file(tmp_path_factory, case):
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(
        yaml.dump(
            {"x": in_yaml(case.value)},
            Dumper=Dumper,
            allow_unicode=True,
            sort_keys=False,
        ),
        encoding="utf-8",
    )
    assert same(
        check_value(parameter(case.kind), read_values(file)["x"], text=True), case.value
    ), file.read_text()
    with_json = case.value
    try:
        text = json.dumps({"x": with_json})
        assume(same(json.loads(text)["x"], with_json))
    except TypeError:
        return
    file = file.with_suffix(".json")
    file.write_text(text)
    assert same(
        check_value(parameter(case.kind), read_values(file)["x"], text=True), case.value
    ), text


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            "int",
            "float",
            "bool",
            "str",
            "list[int]",
            "list[str]",
            "tuple[int, float]",
            "dict[str, list[float]]",
            "set[int]",
            "Any",
            "date",
            "int | str",
            "Path",
            "Literal[1, 'a']",
            "mine.Type",
            "Foo['",
        ]
    ),
    st.text(max_size=12) | st.text("[](){}:,'\"1a \\b", max_size=12),
)
def test_any_text_is_read_or_refused_in_one_sentence(kind, text):
    try:
        got = check_value(parameter(kind), text, text=True)
    except BadRequest as error:
        assert str(error).startswith("x ") and len(str(error).splitlines()) == 1
    else:
        assert same(check_value(parameter(kind), got), got), (
            "what was read is a value of the parameter"
        )


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=2)
    | st.just(object())
    | st.just(print)
    | st.just(HERE)
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            "int",
            "float",
            "complex",
            "bool",
            "list[int]",
            "tuple[int, float]",
            "dict[str, list[float]]",
            "Any",
            "int | str",
            "Path",
            "mine.Type",
            "list",
        ]
    ),
    JUNK,
)
def test_any_value_arrives_or_is_refused_in_one_sentence(kind, value):
    try:
        got = check_value(parameter(kind), value)
    except BadRequest as error:
        assert str(error).startswith("x ") and len(str(error).splitlines()) == 1
    else:
        assert got == value or kind in (
            "Path",
            "list",
            "list[int]",
            "tuple[int, float]",
            "dict[str, list[float]]",
        ), "of these, another sequence or an absolute path"
        assert same(eval(as_source(got)), got)


# --- the grammar, example by example


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("list[str]", '["New York, NY", "Paris"]', ["New York, NY", "Paris"]),
        ("list[str]", '"New York, NY", San Jose', ["New York, NY", "San Jose"]),
        ("list[str]", "[it's, don't]", ["it's", "don't"]),
        ("list[list[int]]", "[[1, 2], [3]]", [[1, 2], [3]]),
        ("list[list[int]]", "[1, 2], [3]", [[1, 2], [3]]),
        ("list[int]", "8", [8]),
        ("list[int]", "", []),
        ("list[int]", "(1, 2)", [1, 2]),
        ("tuple[int, int]", "32,32", (32, 32)),
        ("tuple[int, int]", "[32, 32]", (32, 32)),
        ("tuple", "(1, a)", (1, "a")),
        ("tuple[()]", "()", ()),
        ("Tuple[float, ...]", "8/255, 1e-3", (8 / 255, 1e-3)),
        ("dict[str, float]", '{"a": 1e-3, b: 8/255}', {"a": 1e-3, "b": 8 / 255}),
        ("dict[int, str]", "{1: a, 2: 'b, c'}", {1: "a", 2: "b, c"}),
        ("dict", '{"a": [true, null]}', {"a": [True, None]}),
        ("dict[str, str]", "{when: 12:30}", {"when": "12:30"}),
        ("Union[int, str]", "3", 3),
        ("Union[int, str]", '"3"', "3"),
        ("str | int", "3", 3),
        ("int | float", "3", 3),
        ("float | int", "3.0", 3.0),
        ("Optional[str]", "none", None),
        ("Optional[str]", '"none"', "none"),
        ("str", "none", "none"),
        ("str", '"a"', '"a"'),
        ("str | list[str]", "a,b", "a,b"),
        ("str | list[str]", "[a,b]", ["a", "b"]),
        ("Literal['a', 1, None]", "1", 1),
        ("Literal['a', 1, None]", "null", None),
        ("Literal[True, 'x']", "true", True),
        ("'list[int]'", "1,2", [1, 2]),
        ("typing.Optional['typing.List[int]']", "[1]", [1]),
        ("t.List[int]", "1", [1]),
        ("Annotated[int, 'of steps']", "3", 3),
        ("Iterable[int]", "1,2", [1, 2]),
        ("abc.Set[int]", "{1}", {1}),
        ("tp.List[int]", "1", [1]),
        ("T.Optional[tp.Dict[str, np.float32]]", "{a: 1e-3}", {"a": 1e-3}),
        ("np.float32", "8/255", 8 / 255),
        ("numbers.Number", "3", 3),
        ("Number", "0.5", 0.5),
        ("Real", "3", 3),
        ("np.int64", "3", 3),
        ("date", "2024-02-29", date(2024, 2, 29)),
        ("dt.datetime", "2024-02-29T12:30", datetime(2024, 2, 29, 12, 30)),
        ("datetime.date", "2024-02-29", date(2024, 2, 29)),
        ("timedelta", "01:30:00", timedelta(minutes=90)),
        ("list[date]", "2024-02-29, 2024-03-01", [date(2024, 2, 29), date(2024, 3, 1)]),
        ("bytes", "b'a, b'", b"a, b"),
        ("list[bytes]", "[b'a, b', b'c']", [b"a, b", b"c"]),
        ("bool", "no", False),
        ("int", "1_000", 1000),
        ("int", "0x10", 16),
        ("complex", "1 + 2j", 1 + 2j),
        ("list[str]", "[1.10, 007]", ["1.10", "007"]),
        ("Any", "[a, 1e-3, true]", ["a", 1e-3, True]),
        ("Any", "1e-3", 1e-3),
        ("Any", "cuda:0", "cuda:0"),
        ("Any", "'3'", "3"),
        ("Any", "[draft] x", "[draft] x"),
        ("Any", "{'a': (1, 2)}", {"a": (1, 2)}),
        ("Any", "...", "..."),
        ("list[str]", '["\\ud83d\\ude00", "a\\/b"]', ["😀", "a/b"]),
        ("Path", str(HERE), HERE),
        ("list[Path]", f"[{HERE}]", [HERE]),
        ("Path | str", str(HERE), str(HERE)),
        ("Path | str", "hub:name", "hub:name"),
        ("Path | None", "", None),
    ],
)
def test_text_is_read_as_the_annotation_says(kind, text, value):
    assert same(check_value(parameter(kind), text, text=True), value)


@pytest.mark.parametrize(
    "kind, text, said",
    [
        ("list[int]", "[1,", r"x is '\[1,'; it needs a list \(an integer each\)"),
        ("list[int]", "1,,2", "needs a list"),
        pytest.param("list[int]", "[" * 5000, "… .* needs a list", id="deep"),
        ("tuple[int, float]", "1", r"needs a tuple \(an integer, a float\)"),
        ("dict[str, float]", "{a: b}", r"needs an object \(a text: a float each\)"),
        ("dict[int, int]", "{1: 1, 1: 2}", "needs an object"),
        ("set[list[int]]", "{[1]}", "needs a set"),
        ("Literal['a', 1]", "b", "needs 'a' or 1"),
        ("int | None", "x", "needs an integer or none"),
        ("date", "29.2.2024", "needs a date such as 2024-02-29"),
        ("date", "1704067200", "needs a date"),
        ("date", "20240101.5", "needs a date"),
        ("bytes", "abc", "needs bytes"),
        ("float", "nan", "needs a float"),
        ("float", "inf", "needs a float"),
        ("float", "1e999", "needs a float"),
        ("float", "1/0", "needs a float"),
        pytest.param("int", "9" * 5000, "needs an integer", id="long"),
        ("list[Path]", "gone.csv", "x names 'gone.csv', and there is no such file"),
        pytest.param("Path", "a" * 5000, "no such file", id="long path"),
        ("Path", "~nobody/x", "no such file"),
        ("bool", "1", "needs true or false"),
        ("float", "-1e999", "needs a float"),
        ("Any", "1e999", "x is '1e999', which is beyond all floats"),
        ("Any", "[0, -1e999]", "beyond all floats"),
        ("Any", "1e999j", "beyond all floats"),
        (
            "torch.device",
            "cuda:0",
            (
                "x is declared as 'torch.device', which cannot be checked, "
                "and its default is no literal to go by"
            ),
        ),
        ("int | torch.dtype", "x", "x is declared as"),
        ("list[mine.Type]", "x", "x is declared as"),
        ("Literal[Color.RED]", "x", "x is declared as"),
        (
            "dict[float, str]",
            "{1: a, 1.0: b}",
            "x has the key 1.0 twice, as '1' and '1.0'; allowed is each key once",
        ),
        ("dict[str, int]", '{"a": 1, a: 2}', "x has the key 'a' twice"),
        (
            "dict[bool, int]",
            "{yes: 1, true: 2}",
            "x has the key True twice, as 'yes' and 'true'",
        ),
        ("dict", "{1: a, 0x1: b}", "x has the key 1 twice"),
        ("list[dict[int, int]]", "[{1: 1, 01: 2}]", "x has the key 1 twice"),
        (
            "dict[int, dict[str, int]] | None",
            "{1: {a: 1, 'a': 2}}",
            "x has the key 'a' twice",
        ),
        ("Any", "{1: a, True: b}", "x has the key True twice"),
    ],
)
def test_text_that_does_not_fit_is_refused_in_one_sentence(kind, text, said):
    with pytest.raises(BadRequest, match=said):
        check_value(parameter(kind), text, text=True)


@pytest.mark.parametrize(
    "kind, value, wanted",
    [
        ("tuple[int, int]", [1, 2], (1, 2)),
        ("list[int]", (1, 2), [1, 2]),
        ("tuple | list", [1], [1]),
        ("list | tuple", (1,), (1,)),
        ("Sequence[int]", (1, 2), (1, 2)),
        ("set[int]", [1, 2], {1, 2}),
        ("int | float", 2.0, 2.0),
        ("float", 3, 3.0),
        ("float | int", 3, 3),
        ("str", "3", "3"),
        ("Any", "3", "3"),
        ("Any", {1: (2, {3})}, {1: (2, {3})}),
        ("int", np.int64(3), 3),
        ("float", np.float32(0.5), 0.5),
        ("bool", np.bool_(True), True),
        ("list[float]", np.ones(2), [1.0, 1.0]),
        ("dict[str, list[int]]", {"a": torch.tensor([1])}, {"a": [1]}),
        ("Path", str(HERE), HERE),
        ("Path | str", HERE, HERE),
        pytest.param("int", 10**5000, 10**5000, id="long"),
        ("Any", math.inf, math.inf),
        ("PurePath", PurePosixPath(HERE), HERE),
    ],
)
def test_a_value_from_python_keeps_its_type_or_gets_the_declared_one(
    kind, value, wanted
):
    assert same(check_value(parameter(kind), value), wanted)


@pytest.mark.parametrize(
    "kind, value",
    [
        ("int", "3"),
        ("list[int]", ["3"]),
        ("list[int]", {1}),
        ("int", True),
        ("float", 2**53 + 1),
        ("Literal[1]", True),
        ("Literal[1]", 1.0),
        ("Any", object()),
        ("Any", [math.nan]),
        ("float", math.inf),
        ("date", datetime(2024, 1, 1)),
        ("str", b"a"),
        ("bool", 1),
        ("dict[str, int]", {1: 1}),
        ("tuple[int]", (1, 2)),
    ],
)
def test_a_value_from_python_that_does_not_fit_is_refused(kind, value):
    with pytest.raises(BadRequest, match="^x is .*; it needs "):
        check_value(parameter(kind), value)


def test_a_list_that_holds_itself_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(BadRequest, match="^x is .*; it needs "):
        check_value(parameter("list"), endless)


@pytest.mark.parametrize(
    "source, text, value",
    [
        (INFINITE, "inf", math.inf),
        ("math.inf", "-inf", -math.inf),
        ("1e999", ".inf", math.inf),
        ("np.inf", "3", 3.0),
    ],
)
def test_a_float_may_be_infinite_where_its_default_is(source, text, value):
    declared = read_parameters(
        new_notebook(
            cells=[
                new_code_cell(f"x: float = {source}", metadata={"tags": ["parameters"]})
            ]
        )
    )
    assert check_parameters(declared, {"x": text}, text=True) == {
        "x": value
    } and check_parameters(declared, {"x": value}) == {"x": value}


def test_an_annotation_is_never_evaluated(workshop):
    for kind in (
        "__import__('os').mkdir('made')",
        "list[open('made', 'w')]",
        "Literal[open('made', 'w')]",
        "Annotated[int, open('made', 'w')]",
        '\'open("made", "w")\'',
        "(made := 3)",
    ):
        with suppress(BadRequest):
            check_value(parameter(kind), "3", text=True)
    assert not list(workshop.iterdir())


def test_a_default_without_an_annotation_is_the_type():
    cell = (
        "a = (32, 32)\nb = 60 * 60\nc = None\nd = {1: 'x'}\ne = {1}\nf = b''\n"
        "g = [[1]] + []\nh = {[]}"
    )
    declared = read_parameters(
        new_notebook(cells=[new_code_cell(cell, metadata={"tags": ["parameters"]})])
    )
    assert [each.type for each in declared.values()] == [
        "tuple",
        "Any",
        "Any",
        "dict",
        "set",
        "bytes",
        "Any",
        "Any",
    ]
    assert [each.default for each in declared.values()] == [
        (32, 32),
        UNKNOWN,
        None,
        {1: "x"},
        {1},
        b"",
        UNKNOWN,
        UNKNOWN,
    ]
    assert declared["b"].source == "60 * 60" and check_parameters(
        declared, {"a": "64,64", "b": "60", "d": "{2: y}"}, text=True
    ) == {"a": (64, 64), "b": 60, "d": {2: "y"}}


def declared(*lines):
    return read_parameters(
        new_notebook(
            cells=[new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})]
        )
    )


@pytest.mark.parametrize(
    "line, text, value",
    [
        ("x: int = None", "None", None),
        ("x: int = None", "3", 3),
        ("x: list[int] = None", "null", None),
        ("x: 'int' = None", "none", None),
        ("x: Literal['a'] = None", "none", None),
        ("x: str = None", "none", None),
        ("x: Path = None", "none", None),
        ("x: object = None", "null", None),
        ("x = None", "None", None),
        ("x: mine.Type = None", "none", None),
    ],
)
def test_the_default_none_can_be_given(line, text, value):
    found = declared(line)
    assert (
        check_parameters(found, {"x": text}, text=True)
        == {"x": value}
        == check_parameters(found, {"x": value})
    )


def test_the_default_none_is_among_what_is_needed():
    with pytest.raises(BadRequest, match="x is 'a'; it needs an integer or none"):
        check_parameters(declared("x: int = None"), {"x": "a"}, text=True)


def test_a_row_of_a_sweep_may_be_the_default_none():
    from bigmodel_nb.headless.sweep import parse_values

    found = declared("limit: int = None")["limit"]
    assert (
        parse_values([None, 3], found)
        == parse_values(Text("none, 3"), found)
        == [None, 3]
    )


@pytest.mark.parametrize(
    "line, text, value",
    [
        ("x: mine.Type = 3", "4", 4),
        ("x: Size = [1, 2.5]", "1, 2", [1, 2]),
        ("x: L[int] = ['a']", "3", ["3"]),
        ("x: mine.Type | None = 3", "none", None),
        ("x: Final = 'a'", "3", "3"),
        ("x: Config = {}", "{a: 1}", {"a": 1}),
        ("x: no python = 3", None, None),
        ("x: 'no python' = 3", "4", 4),
    ],
)
def test_a_type_of_the_authors_own_is_that_of_its_default(line, text, value):
    if text is None:
        with pytest.raises(BadRequest, match="is no Python"):
            declared(line)
        return
    assert same(check_parameters(declared(line), {"x": text}, text=True)["x"], value)
    with pytest.raises(BadRequest, match="^x is .*; it needs "):
        check_parameters(declared(line), {"x": b"?"})


# --- files


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("list[float]", "[1e-3, 1e-4]", [1e-3, 1e-4]),
        ("dict[str, float]", "{a: 1e-3}", {"a": 1e-3}),
        ("dict[str, float]", "\n  a: 1e-3\n  b: 8/255", {"a": 1e-3, "b": 8 / 255}),
        ("str", "1.10", "1.10"),
        ("str", "no", "no"),
        ("bool", "no", False),
        ("str", "2024-02-29", "2024-02-29"),
        ("date", "2024-02-29", date(2024, 2, 29)),
        ("int | str", '"3"', "3"),
        ("int | str", "3", 3),
        ("float", '"8/255"', 8 / 255),
        ("list[int]", "8,16", [8, 16]),
        ("int | None", "", None),
        ("int | None", "~", None),
        ("Any", "1e-3", 1e-3),
        ("Any", '"1e-3"', "1e-3"),
        ("Any", "true", True),
        ("tuple[int, int]", "[32, 32]", (32, 32)),
        ("list[tuple[int, int]]", "\n- (1, 2)\n- [3, 4]", [(1, 2), (3, 4)]),
        ("dict[int, str]", "{1: a}", {1: "a"}),
        ("str", "|-\n  two\n  lines", "two\nlines"),
        ("bytes", "!!binary YQ==", b"a"),
        ("int", "010", 10),
        ("Path", str(HERE), HERE),
        ("int | str", "!!str 5", "5"),
        ("Any", "!!str 5", "5"),
        ("int | str", "!!str true", "true"),
    ],
)
def test_what_stands_unquoted_in_yaml_is_read_as_in_a_terminal(
    workshop, kind, text, value
):
    Path("v.yaml").write_text(f"x: {text}\n")
    assert same(
        check_value(parameter(kind), read_values(Path("v.yaml"))["x"], text=True), value
    )


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("v.yaml", "x: 1\nx: 2", "'x' is given twice"),
        ("v.yaml", "- 1", "holds no names with values"),
        ("v.yaml", "x: [", "which is no YAML"),
        ("v.json", "x: 1", "which is no JSON"),
        ("v.json", '{"x": 1, "x": 2}', "'x' is given twice"),
        ("v.yaml", "x: !!python/object/apply:os.mkdir [made]", "which is no YAML"),
        pytest.param("v.json", "[" * 100_000, "which is no JSON", id="deep"),
    ],
)
def test_a_file_that_is_none_is_refused(workshop, name, text, said):
    Path(name).write_text(text)
    with pytest.raises(BadRequest, match=said):
        read_values(Path(name))
    assert not Path("made").exists()


@pytest.mark.parametrize("name, text", [("v.json", '{"x": 3}'), ("v.yaml", "x: 3")])
def test_a_file_may_begin_with_a_byte_order_mark(workshop, name, text):
    Path(name).write_text(text, encoding="utf-8-sig")
    assert check_value(parameter("int"), read_values(Path(name))["x"], text=True) == 3


def test_null_in_yaml_is_not_text(workshop):
    Path("v.yaml").write_text("x: null")
    with pytest.raises(BadRequest, match="x is None; it needs a text"):
        check_value(parameter("str"), read_values(Path("v.yaml"))["x"], text=True)


def test_brackets_and_quotes_part_a_text():
    assert parse_text('a, "b, c", [d, (e,)]') == [
        Text("a"),
        Text("b, c", quoted=True),
        [Text("d"), (Text("e"),)],
    ]


# --- all the way into a notebook

GIVEN = {
    "cities: list[str]": ["New York, NY", "Paris"],
    "nested: list[list[int]]": [[1, 2], [3]],
    "size: tuple[int, int]": (32, 32),
    "weights: dict[str, float]": {"a": 1e-3},
    "names: dict[int, str]": {1: "a", 2: "it's"},
    "either: typing.Union[int, str]": "3",
    "quoted: 'list[int]'": [1],
    "mode: Literal['fast', None]": None,
    "day: date": date(2024, 2, 29),
    "moment: datetime": datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc),
    "raw: bytes": b"\x00a",
    "kinds: set[int]": {1, 2},
    "frozen: frozenset[str]": frozenset({"a"}),
    "file: Path | None": HERE,
    "files: list[Path]": [HERE],
    "bound: float": math.inf,
    "text: str": "no\n'\"\\",
    "limit: int | None": None,
    "deep: dict[int, list[tuple[int, str]]]": {1: [(1, "a"), (2, "b, c")]},
    "loose": [1, {"a": [2.5, None, True]}, {3: "x"}],
    "flag: bool": False,
    "emoji: str": "😀",
}
DEFAULTS = {
    name: f"{name} = {INFINITE if name.startswith('bound') else None}" for name in GIVEN
}
BODY = """
from bigmodel_nb.headless.parameters import as_source
from bigmodel_nb.kit.record import record
record("all", {name: as_source(globals()[name]) for name in NAMES})"""
HEAD = (
    "import typing\nfrom datetime import date, datetime\nfrom pathlib import Path\n"
    "from typing import Literal\n"
)


@pytest.fixture
def values(workshop):
    """A notebook that records what it received; what is given to it."""
    given = {name.partition(":")[0]: value for name, value in GIVEN.items()}
    cell = new_code_cell(
        HEAD + "\n".join(DEFAULTS.values()), metadata={"tags": ["parameters"]}
    )
    nbformat.write(
        new_notebook(
            cells=[cell, new_code_cell(BODY.replace("NAMES", str(list(given))))]
        ),
        "mine.ipynb",
    )
    return given


def received(given):
    return {name: as_source(value) for name, value in given.items()}


def as_words(given):
    kinds = {
        name.partition(":")[0]: name.partition(":")[2].strip() or "Any"
        for name in GIVEN
    }
    return {
        name: "inf"
        if value == math.inf
        else repr(value)
        if kinds[name] == "Any"
        else in_terminal(Case(kinds[name], value))
        for name, value in given.items()
    }


def test_the_notebook_receives_what_python_gave(values):
    assert run("mine.ipynb", values, out="out").metrics["all"] == received(values)


def test_the_notebook_receives_what_the_terminal_gave(values):
    words = [
        word for name, text in as_words(values).items() for word in ("-p", name, text)
    ]
    done = CliRunner().invoke(
        app, ["run", "mine.ipynb", *words, "--out", "out", "--json"]
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["metrics"][
        "all"
    ] == received(values), done.output


def test_the_notebook_receives_what_the_file_gave(values):
    Path("v.yaml").write_text(
        yaml.dump(in_yaml(values), Dumper=Dumper, allow_unicode=True, sort_keys=False),
        encoding="utf-8",
    )
    done = CliRunner().invoke(
        app, ["run", "mine.ipynb", "-f", "v.yaml", "--out", "out", "--json"]
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["metrics"][
        "all"
    ] == received(values), done.output


def test_the_notebook_receives_through_a_sweep_what_was_given(values):
    grid = {name: [value] for name, value in values.items()} | {"flag": [False, True]}
    table = sweep("mine.ipynb", grid, out="python")
    assert [json.loads(row) for row in table["all"]] == [
        received({**values, "flag": flag}) for flag in (False, True)
    ]
    words = [
        word
        for name, text in as_words(values).items()
        for word in (
            "-g",
            f"{name}=[{text if name != 'text' else json.dumps(values['text'])}]",
        )
    ]
    done = CliRunner().invoke(app, ["sweep", "mine.ipynb", *words, "--out", "terminal"])
    made = json.loads(next(Path("terminal").glob("*/metrics.json")).read_text())
    assert done.exit_code == 0 and made["metrics"]["all"] == received(values), (
        done.output
    )
    Path("g.yaml").write_text(
        yaml.dump(
            {name: [in_yaml(value)] for name, value in values.items()},
            Dumper=Dumper,
            allow_unicode=True,
            sort_keys=False,
        ),
        encoding="utf-8",
    )
    done = CliRunner().invoke(
        app, ["sweep", "mine.ipynb", "-f", "g.yaml", "--out", "terminal"]
    )
    assert (
        done.exit_code == 0 and len(list(Path("terminal").glob("*/metrics.json"))) == 1
    ), "the same values are the same run"


def test_show_tells_what_is_computed_from_what_is_none(workshop):
    cell = (
        "steps = 60 * 60  # seconds\nlimit: int | None = None  # of rows\n"
        "name: str = 'a b'  # a text\nsize = (32, 32)  # pixels"
    )
    nbformat.write(
        new_notebook(cells=[new_code_cell(cell, metadata={"tags": ["parameters"]})]),
        "mine.ipynb",
    )
    shown = CliRunner().invoke(app, ["show", "mine.ipynb"]).stdout
    for line in (
        "-p steps 60 * 60 (computed)\n",
        "-p limit None\n",
        "-p name a b\n",
        "-p size (32, 32)\n",
    ):
        assert line in shown
