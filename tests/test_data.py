"""Chapter 1: from raw rows to batches."""

import csv
import importlib.util
import io
import json
import re
import tracemalloc
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bigmodel_nb.data import sources
from bigmodel_nb.data.sources import (
    check_classes,
    deduplicate,
    describe_images,
    describe_texts,
    digits,
    encode_labels,
    headlines,
    image_folder,
    loader,
    near_duplicate_groups,
    near_duplicates,
    read_table,
    reviews,
    split_indices,
    support,
    support_faq,
    support_unanswered,
    text_rows,
)


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


def expect_sources(m):
    gain = m["wine_gain"]
    assert gain["low"] > 0, (
        "the nearest neighbours classify standardised wines better, "
        "on the same test rows"
    )
    assert (
        abs(
            gain["value"]
            - (m["wine_accuracy_standardised"]["value"] - m["wine_accuracy"]["value"])
        )
        < 1e-9
    )
    assert m["leaky_accuracy"]["low"] > m["honest_accuracy"]["high"] + 0.1, (
        "near duplicates across a split make coin tosses predictable"
    )
    assert m["honest_accuracy"]["low"] < 0.5 < m["honest_accuracy"]["high"], (
        "kept together they leave them at the chance level"
    )
    assert m["closest_pair_across_split"] < 0.5, (
        "no review has a near duplicate on the other side of the split"
    )
    assert m["similarity_largest_difference"] < 1e-9, (
        "the product of matrices gives Jaccard's similarity of the sets"
    )
    assert m["rows"] >= 800 and m["near_duplicates"] == 0, (
        "the reviews are many and differ"
    )


# digits, loader


def test_digits():
    images, targets = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert images.min() == 0
    assert images.max() == 1
    assert targets.bincount().tolist()[:3] == [178, 182, 177]


def test_loader_orders():
    inputs, targets = torch.arange(10.0), torch.arange(10)
    assert [len(x) for x, _ in loader(inputs, targets, batch_size=4)] == [4, 4, 2]
    assert torch.equal(
        torch.cat([x for x, _ in loader(inputs, targets, batch_size=4)]), inputs
    )
    shuffled = loader(inputs, targets, batch_size=4, shuffle=True, seed=1)
    first, second = (torch.cat([y for _, y in shuffled]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    torch.rand(5)
    assert (
        first
        == torch.cat(
            [y for _, y in loader(inputs, targets, batch_size=4, shuffle=True, seed=1)]
        ).tolist()
    )
    assert all((x == y).all() for x, y in shuffled)


def test_loader_refuses():
    with pytest.raises(ValueError) as error:
        loader(torch.zeros(3, 2), torch.zeros(2))
    one_sentence(error, "inputs has 3 rows and targets 2")
    with pytest.raises(ValueError) as error:
        loader(torch.zeros(3), torch.zeros(3), batch_size=0)
    one_sentence(error, "batch_size is 0")


# split_indices


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(3, 60), min_size=1, max_size=5),
    seed=st.integers(0, 5),
    fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.5), (0.9, 0.05, 0.05)]),
)
def test_split_is_a_stratified_partition(counts, seed, fractions):
    targets = torch.cat(
        [torch.full((count,), 10 * number) for number, count in enumerate(counts)]
    )
    targets = targets[
        torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    ]
    parts = split_indices(targets, fractions, seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(targets)))
    for part, fraction in zip(parts, fractions):
        assert part.dtype == torch.int64 and (part.diff() > 0).all()
        for number, count in enumerate(counts):
            have = (targets[part] == 10 * number).sum().item()
            assert have >= 1 and abs(have - fraction * count) <= len(fractions)
    assert all(
        torch.equal(a, b)
        for a, b in zip(parts, split_indices(targets, fractions, seed))
    )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=20, max_size=60), seed=st.integers(0, 5)
)
def test_split_keeps_groups_together(sizes, seed):
    groups = torch.repeat_interleave(torch.arange(len(sizes)) * 7, torch.tensor(sizes))
    targets = groups // 7 % 2
    parts = split_indices(targets, (0.6, 0.2, 0.2), seed, groups)
    owners = [set(groups[part].tolist()) for part in parts]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert sum(map(len, parts)) == len(groups)
    assert abs(len(parts[0]) - 0.6 * len(groups)) <= 12


def test_split_depends_on_the_seed_and_is_even_on_digits():
    _, targets = digits()
    first, second = split_indices(targets, seed=0), split_indices(targets, seed=1)
    assert not torch.equal(first[2], second[2])
    for part, fraction in zip(first, (0.7, 0.1, 0.2)):
        assert (
            (targets[part].bincount() - fraction * targets.bincount()).abs() <= 1.5
        ).all()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(targets=[0, 1] * 5, fractions=(0.5, 0.6)), "fractions is (0.5, 0.6)"),
        (dict(targets=[0, 1] * 5, fractions=(1.0,)), "two or more positive numbers"),
        (dict(targets=[0, 1] * 5, fractions=(1.5, -0.5)), "fractions"),
        (
            dict(targets=[0, 0, 0, 1, 1]),
            "class 1 has 2 rows; allowed are at least 3 rows, one for each part",
        ),
        (
            dict(targets=[0, 0, 0, 1, 1], names=["ham", "spam"]),
            "class 'spam' has 2 rows; allowed are at least 3 rows",
        ),
        (
            dict(targets=[0, 1] * 5, groups=[1, 2]),
            "groups has 2 entries and targets 10",
        ),
        (dict(targets=[]), "targets has shape (0,)"),
        (
            dict(
                targets=[0] * 5 + [1] * 5,
                groups=[0, 1, 2, 3, 4, 9, 9, 9, 9, 9],
                names=["ham", "spam"],
            ),
            "class 'spam' has 5 rows in 1 group that stay together,"
            " such as near duplicates; allowed are at least 3 groups",
        ),
        (
            dict(targets=[0] * 5 + [1] * 4, groups=[0, 1, 2, 3, 4, 8, 8, 9, 9]),
            "class 1 has 4 rows in 2 groups",
        ),
    ],
)
def test_split_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        split_indices(**arguments)
    one_sentence(error, words)


# tables


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_written(path, rows, encoding="utf-8", **options):
    """Rows as `csv.writer` writes them.

    It quotes no end of line but its own: where two ends meet, no reader can tell.
    """
    end = options.get("lineterminator", "\r\n")
    if any(
        row[0].startswith("\n")
        and end == "\r"
        or row[-1].endswith("\r")
        and end == "\n"
        for row in rows
    ):
        assume(False)
    page = io.StringIO(newline="")
    csv.writer(page, **options).writerows(rows)
    path.write_bytes(page.getvalue().encode(encoding))


def rows_of(frame):
    return list(frame.fillna("").itertuples(index=False, name=None))


ANY_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=12
) | st.text("a ,;|\t\"'\\\n\r.1é", max_size=12)
ROWS = st.lists(
    st.tuples(ANY_TEXT, st.sampled_from(["1", "0", "good", "a b"])),
    min_size=1,
    max_size=6,
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@settings(max_examples=150, deadline=None)
@given(
    rows=ROWS,
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    end=ENDS,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    ending=st.sampled_from(["csv", "tsv", "txt"]),
)
def test_a_written_table_is_read_back_without_help(
    tmp_path_factory, rows, delimiter, quoting, end, encoding, ending
):
    path = tmp_path_factory.getbasetemp() / f"found.{ending}"
    as_written(
        path,
        [("text", "label"), *rows],
        encoding,
        delimiter=delimiter,
        quoting=quoting,
        lineterminator=end,
    )
    back = read_table(path, as_text=True)
    # ",1 twice may be two rows or one over two lines, and that is said
    if "lone quotes" in str(back.attrs["format"]):
        back = read_table(path, as_text=True, quotechar='"')
    assert back.columns.tolist() == ["text", "label"] and rows_of(back) == rows
    found = back.attrs["format"]
    assert found["delimiter"] == delimiter
    assert found["encoding"] == encoding.removesuffix("-sig").upper()
    again = read_table(
        path,
        as_text=True,
        **{
            name: found[name]
            for name in ("encoding", "delimiter", "quotechar", "escapechar")
        },
    )
    assert again.equals(back)


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS,
    delimiter=st.sampled_from(",;\t|@"),
    end=ENDS,
    encoding=st.sampled_from(["utf-8", "utf-16-le", "gb18030"]),
    header=st.booleans(),
    style=st.sampled_from(
        [
            {},
            dict(quoting=csv.QUOTE_ALL),
            dict(quotechar="'"),
            dict(doublequote=False, escapechar="\\"),
            dict(quoting=csv.QUOTE_NONE, escapechar="\\"),
        ]
    ),
)
def test_a_written_table_is_read_back_as_told(
    tmp_path_factory, rows, delimiter, end, encoding, header, style
):
    assume(header or not any(end in text for text, _ in rows for end in "\r\n"))
    path = tmp_path_factory.getbasetemp() / "told.csv"
    as_written(
        path,
        [("text", "label")] * header + rows,
        encoding,
        delimiter=delimiter,
        lineterminator=end,
        **style,
    )
    quote = (
        "" if style.get("quoting") == csv.QUOTE_NONE else style.get("quotechar", '"')
    )
    back = read_table(
        path,
        header,
        delimiter,
        encoding,
        as_text=True,
        quotechar=quote,
        escapechar=style.get("escapechar", ""),
    )
    assert rows_of(back) == rows


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5), end=ENDS)
def test_one_column_of_any_texts(tmp_path_factory, texts, end):
    path = tmp_path_factory.getbasetemp() / "one.csv"
    as_written(path, [("text",), *((text,) for text in texts)], lineterminator=end)
    assert rows_of(read_table(path, as_text=True)) == [(text,) for text in texts]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.floats(allow_nan=False),
            st.integers(-(10**12), 10**12),
            st.floats(-1e6, 1e6).map(lambda x: round(x, 3)),
            st.text('ab;,". \n', max_size=6).map("x".__add__),
        ),
        min_size=1,
        max_size=6,
    ),
    delimiter=st.sampled_from(";,\t"),
    decimal=st.sampled_from(",."),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
)
def test_numbers_that_pandas_wrote(tmp_path_factory, rows, delimiter, decimal, quoting):
    path = tmp_path_factory.getbasetemp() / "numbers.csv"
    frame = pd.DataFrame(rows, columns=["a", "b", "c", "text"])
    frame.to_csv(path, sep=delimiter, decimal=decimal, quoting=quoting, index=False)
    for options in ({}, {"decimal": decimal}):
        back = read_table(path, **options)
        # 1,234 alone may be either, and that is said
        if options or "left as text" not in str(back.attrs["format"]):
            pd.testing.assert_frame_equal(
                back, frame, check_dtype=False, rtol=1e-15, atol=0
            )


# a file's name, its bytes, arguments; the rows as texts and what the line says
READ = {
    "text with a comma in semicolons": (
        "a.csv",
        'text;label\n"Gut; aber teuer";1\nSchlecht, leider;0\n',
        {},
        [("Gut; aber teuer", "1"), ("Schlecht, leider", "0")],
        "separated by ';', fields quoted",
    ),
    "quotes between tabs": (
        "a.tsv",
        'text\tlabel\n"tab\there"\t1\n"a ""word"""\t0\n',
        {},
        [("tab\there", "1"), ('a "word"', "0")],
        "separated by tabs, fields quoted",
    ),
    "lone quotes between tabs": (
        "a.tsv",
        '"great" , he said\t1\na " too many\t0\n"never closed\t0\n',
        dict(header=False),
        [('"great" , he said', "1"), ('a " too many', "0"), ('"never closed', "0")],
        "quotes part of the text",
    ),
    "lone quotes between commas": (
        "a.csv",
        'text,label\n5" disk,1\n"twas fine,0\n',
        {},
        [('5" disk', "1"), ('"twas fine', "0")],
        "quotes part of the text",
    ),
    "comma at each line's end": (
        "a.csv",
        "text,label,\ngood,1,\nbad,0,\n",
        {},
        [("good", "1"), ("bad", "0")],
        "a delimiter at each line's end left out",
    ),
    "comma at each row's end": (
        "a.csv",
        "text,label\ngood,1,\nbad,0,\n",
        {},
        [("good", "1"), ("bad", "0")],
        "a delimiter at each line's end left out",
    ),
    "an empty last column of its own": (
        "a.csv",
        "text,label,note\ngood,1,\nbad,0,\n",
        {},
        [("good", "1", ""), ("bad", "0", "")],
        "2 rows x 3 columns",
    ),
    "quotes after blanks": (
        "a.csv",
        'text, label\n"a, b", "1"\nc, "0"\n',
        {},
        [("a, b", "1"), ("c", "0")],
        "fields quoted",
    ),
    "backslashes": (
        "a.csv",
        'text,label\n"he said \\"no\\", twice",1\nfine,0\n',
        {},
        [('he said "no", twice', "1"), ("fine", "0")],
        "backslashes escape",
    ),
    "a path's backslash": (
        "a.csv",
        'text,label\n"C:\\",1\nC:\\new,0\n',
        {},
        [("C:\\", "1"), ("C:\\new", "0")],
        "fields quoted",
    ),
    "sep= of a spreadsheet": (
        "a.csv",
        "sep=;\r\ntext;label\r\na,b;1\r\n",
        {},
        [("a,b", "1")],
        "separated by ';'",
    ),
    "numbers tell the delimiter": (
        "a.csv",
        "1,5;2,5\n3,0;4,25\n",
        dict(header=False),
        [("1,5", "2,5"), ("3,0", "4,25")],
        "',' cuts all rows alike too; set delimiter if meant",
    ),
    "a text over lines": (
        "a.csv",
        'text,label\n"a\n\nb",1\n',
        {},
        [("a\n\nb", "1")],
        "1 row over several lines",
    ),
    "empty lines": (
        "a.csv",
        "text,label\n\na,1\n  \n\nb,0\n\n\n",
        {},
        [("a", "1"), ("b", "0")],
        "2 empty lines passed over",
    ),
    "no last line end": (
        "a.csv",
        "text,label\r\na,1\r\nb,0",
        {},
        [("a", "1"), ("b", "0")],
        "2 rows x 2 columns",
    ),
    "a lone return in a text": (
        "a.csv",
        "text,label\na\rb,1\n",
        {},
        [("a\rb", "1")],
        "1 row x 2 columns",
    ),
    "other line breaks": (
        "a.tsv",
        "text\tlabel\na\u2028b\x85c\x0bd\t1\n",
        {},
        [("a\u2028b\x85c\x0bd", "1")],
        "1 row x 2 columns",
    ),
    "lines of prose": (
        "a.txt",
        "One, two, three.\nFour.\nFive, six.\n",
        dict(header=False),
        [("One, two, three.",), ("Four.",), ("Five, six.",)],
        "3 rows x 1 column",
    ),
    "one column by order": (
        "a.csv",
        "a,b\nc,d\n",
        dict(header=False, delimiter=""),
        [("a,b",), ("c,d",)],
        "2 rows x 1 column",
    ),
    "an at sign": (
        "a.txt",
        "Profit rose, much.@positive\nNo news.@neutral\n",
        dict(header=False),
        [("Profit rose, much.", "positive"), ("No news.", "neutral")],
        "separated by '@'",
    ),
    "a long text": (
        "a.csv",
        f"text,label\n{'a' * 200_000},1\n",
        {},
        [("a" * 200_000, "1")],
        "1 row x 2 columns",
    ),
    "names twice": (
        "a.csv",
        "text,text,,label\na,b,c,1\n",
        {},
        [("a", "b", "c", "1")],
        "the next column called 'text' is 'text.1'",
    ),
    "UTF-16 without a mark": (
        "a.csv",
        "text,label\na b c,1\n".encode("utf-16-le"),
        {},
        [("a b c", "1")],
        "read as UTF-16-LE",
    ),
    "Western European": (
        "a.csv",
        "text,label\nschön “très”,1\n".encode("cp1252"),
        {},
        [("schön “très”", "1")],
        "no UTF-8 (byte 0xf6 in line 2), so taken for Western European;"
        " set encoding if not",
    ),
    "a first line that names nothing": (
        "a.csv",
        "# my data\ntext,label\na b,1\n",
        {},
        [("text,label",), ("a b,1",)],
        "',' cuts all lines but the first alike;"
        " take the first line out if it names no columns",
    ),
    "one column of texts": (
        "a.csv",
        "review\nGood, cheap\nBad\n",
        {},
        [("Good, cheap",), ("Bad",)],
        "a.csv: read as UTF-8, 2 rows x 1 column",
    ),
    "one quote too many left out": (
        "a.csv",
        'text,label\n"a b",1\n"c d,1\n"e f",0\n"g "h" i",0\n"j, k",1\n',
        dict(on_bad_lines="skip"),
        [("a b", "1"), ("e f", "0"), ("j, k", "1")],
        "2 rows left out (line 3, 5)",
    ),
    "Central European": (
        "a.csv",
        "text,label\ndziękuję bardzo,1\n".encode("cp1250"),
        {},
        [("dziêkujê bardzo", "1")],
        "so taken for Western European; set encoding if not",
    ),
    "a row too wide left out": (
        "a.csv",
        "text,label\ngood, cheap,1\nfine,1\nbad\n",
        dict(on_bad_lines="skip"),
        [("fine", "1")],
        "2 rows left out (line 2, 4)",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_table_is_read_as_it_was_meant(tmp_path, case):
    name, content, options, rows, words = READ[case]
    back = read_table(write(tmp_path, name, content), as_text=True, **options)
    said = str(back.attrs["format"])
    assert rows_of(back) == rows, said
    assert words in said, said
    json.dumps(back.attrs["format"])


@pytest.mark.parametrize(
    "content, options, words",
    [
        (
            "text,label\ngood, cheap,1\nbad, dear,0\n",
            {},
            [
                "3 fields ('good, cheap,1') in line 2; allowed are 2 fields,"
                " as in the header (1 more line like it)",
                "on_bad_lines to 'skip'",
            ],
        ),
        ("text,label\ngood,1\nbad\n", {}, ["1 field ('bad') in line 3"]),
        ('text,label\n"a\nb",1\n\nc,1,2\n', {}, ["3 fields", "in line 5"]),
        ("text,label\r\na,1\r\nb,1,2\r\n", {}, ["in line 3"]),
        ("text,label\ra,1\rb,1,2\r", {}, ["in line 3"]),
        ("sep=,\ntext,label\na,1\nb,1,2\n", {}, ["in line 4"]),
        ('text,label\n"a",1\n"b "c" d",0\n"e, f",1\n', {}, ["a stray quote in line 3"]),
        (
            'text,label\n"a, b",1\n"c, d",0\n"e,1\n',
            {},
            ["a quote that is never closed in line 4"],
        ),
        (
            "text,label\n" + '"a b",1\n' * 20 + '"c "d" e",0\n',
            {},
            [
                "a stray quote in line 22; allowed are quotes around a field,"
                " and one within it written twice"
            ],
        ),
        (
            "text;label\n" + '"a b";1\n' * 20 + '"c "d" e";0\n',
            {},
            ["a stray quote in line 22"],
        ),
        (
            "text,label\n" + '"a b",1\n' * 20 + '"c d,0\n',
            {},
            ["a quote that is never closed in line 22"],
        ),
        (
            "text,label\n" + '"a b",1\n' * 3 + '"c d,0\n' + '"a b",1\n' * 17,
            {},
            ["quote in line 5"],
        ),
        (
            "a,1\nb,0\nc,1,2\nd,1\n",
            dict(header=False),
            ["in line 3", "as in most lines"],
        ),
        (
            "a,b\n1,2\n",
            dict(delimiter=";;"),
            ["delimiter is ';;'; allowed is one character", "'' for a single column"],
        ),
        ("a,b\n1,2\n", dict(delimiter="\n"), ["delimiter is '\\n'"]),
        ("a,b\n1,2\n", dict(delimiter='"'), ["delimiter is '\"'"]),
        ("a,b\n1,2\n", dict(quotechar="x"), ["quotechar is 'x'; allowed are '\"'"]),
        ("a,b\n1,2\n", dict(escapechar="x"), ["escapechar is 'x'"]),
        ("a,b\n1,2\n", dict(decimal="x"), ["decimal is 'x'; allowed are '.' and ','"]),
        (
            "a,b\n1,2\n",
            dict(on_bad_lines="warn"),
            ["on_bad_lines is 'warn'; allowed are 'error' and 'skip'"],
        ),
        (
            "text,label\nмасло,1\n".encode("cp1251"),
            {},
            [
                "neither UTF-8 (byte 0xec in line 2) nor Western European",
                "set encoding",
            ],
        ),
        ("text,label\n很好,1\n".encode("gb18030"), {}, ["neither UTF-8", "'gb18030'"]),
        (
            "text,label\nölig und schön,1\n".encode() + b"l\xf6\n",
            {},
            ["is UTF-8 but for byte 0xf6 in line 3"],
        ),
        (b"text,label\n\xf6\x00\x00,1\n", {}, ["neither UTF-8"]),
    ],
)
def test_a_table_that_is_not_sound_is_refused(tmp_path, content, options, words):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, "a.csv", content), **options)
    one_sentence(error, *words)


@pytest.mark.parametrize(
    "content, columns, words",
    [
        ("a;b\n1,5;2\n3;4\n", {"a": [1.5, 3], "b": [2, 4]}, "decimal comma"),
        (
            "a;b\n1.234,5;1.234\nNA;7\n",
            {"a": [1234.5, np.nan], "b": [1234, 7]},
            "decimal comma",
        ),
        (
            "a;b\n1,234;x\n5,678;y\n",
            {"a": ["1,234", "5,678"], "b": ["x", "y"]},
            "numbers such as '1,234' left as text; set decimal",
        ),
        (
            "a;b\n1,5;2.5\n2,5;3.5\n",
            {"a": ["1,5", "2,5"], "b": [2.5, 3.5]},
            "numbers such as '1,5' left as text",
        ),
        ("a,b\n1.5,2\n", {"a": [1.5], "b": [2]}, "1 row x 2 columns"),
        ("a;b\n1,5;about 2,5\n", {"a": [1.5], "b": ["about 2,5"]}, "decimal comma"),
        ("a\tb\n0,001\t1\n", {"a": [0.001], "b": [1]}, "decimal comma"),
        (
            "day;b\n01.02.2024;1,5\n",
            {"day": ["01.02.2024"], "b": [1.5]},
            "decimal comma",
        ),
    ],
)
def test_decimal_commas(tmp_path, content, columns, words):
    back = read_table(write(tmp_path, "a.csv", content))
    pd.testing.assert_frame_equal(back, pd.DataFrame(columns), check_dtype=False)
    assert words in str(back.attrs["format"])


def test_json_lines_name_what_is_absent(tmp_path):
    lines = (
        '{"text": "a\\u2028b", "label": 1}\r\n\n{"label": 0, "date": "2024-05-01"}\n'
    )
    back = read_table(write(tmp_path, "a.jsonl", lines))
    assert back["text"][0] == "a\u2028b"
    assert back["date"][1] == "2024-05-01"
    assert back["label"].tolist() == [1, 0]
    assert str(back.attrs["format"]) == (
        "a.jsonl: read as UTF-8, JSON lines, 2 rows x 3 columns;"
        " 'text' absent from 1 row; 'date' absent from 1 row"
    )
    for wrong in ("[1, 2]", '"text"', "{"):
        path = write(tmp_path, "b.jsonl", '{"text": "a"}\n\n' + wrong + "\n")
        with pytest.raises(ValueError) as error:
            read_table(path)
        one_sentence(error, "in line 3; allowed is a JSON object a line")
        assert len(read_table(path, on_bad_lines="skip")) == 1


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a", "label": 1}, {"text": "b", "label": 0}]',
        "[]",
        '[["x", 2]]\n',
        '[\n {"text": "a"},\n {"text": "b"}\n]\n',
        " \n[1]",
        '[["text", "a"], ["label", 1]]',
    ],
)
def test_a_json_array_is_not_an_object_a_line(tmp_path, content):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, "a.jsonl", content))
    one_sentence(
        error,
        "allowed is a JSON object a line",
        "this is one JSON array, not one object a line",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON, min_size=1, max_size=4))
def test_json_lines_are_objects_or_refused(tmp_path_factory, values):
    path = write(
        tmp_path_factory.getbasetemp(),
        "values.jsonl",
        "\n".join(map(json.dumps, values)),
    )
    strange = [
        line for line, value in enumerate(values, 1) if not isinstance(value, dict)
    ]
    if strange:
        with pytest.raises(ValueError) as error:
            read_table(path)
        one_sentence(error, f"in line {strange[0]}; allowed is a JSON object a line")
    else:
        assert len(read_table(path)) == len(values)


def test_the_format_is_a_record(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert (
        str(read_table(tmp_path / "a.parquet").attrs["format"])
        == "a.parquet: read as Parquet, 2 rows x 2 columns"
    )
    back = read_table(write(tmp_path, "a.csv", "text;label\na;1\nb;0\n"))
    assert (
        str(back.attrs["format"])
        == "a.csv: read as UTF-8, separated by ';', 2 rows x 2 columns"
    )
    back.to_parquet(tmp_path / "b.parquet")  # pandas writes attributes as JSON
    assert text_rows(back).attrs["format"] == back.attrs["format"]


def test_read_table_kinds(tmp_path):
    frame = pd.DataFrame({"text": ['a, "b"', "c\td", "e"], "label": [1, 0, 1]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        assert read_table(tmp_path / f"a.{ending}").equals(frame), ending
    tabs = read_table(
        write(tmp_path, "a.tsv", 'he said "no\t0\nyes\t1\n'), header=False
    )
    assert tabs.columns.tolist() == ["0", "1"]
    assert tabs["0"].tolist() == ['he said "no', "yes"]  # quotes are text
    at = read_table(
        write(tmp_path, "a.txt", 'profit "rose", much@positive\nno news@neutral\n'),
        header=False,
        delimiter="@",
    )
    assert at["0"].tolist() == ['profit "rose", much', "no news"]
    assert at["1"].tolist() == ["positive", "neutral"]


def test_read_table_encodings(tmp_path):
    marked = write(tmp_path, "mark.csv", "\ufefftext,label\nöl,1\n")
    assert read_table(marked).columns.tolist() == ["text", "label"]
    assert read_table(marked, encoding="UTF8")["text"][0] == "öl"
    latin = write(tmp_path, "latin.csv", "text,label\nöl,1\n".encode("latin-1"))
    assert read_table(latin, encoding="latin-1")["text"][0] == "öl"
    with pytest.raises(ValueError) as error:
        read_table(latin, encoding="utf-8")
    one_sentence(
        error, "'latin.csv' was read as utf-8 and is not", "0xf6 at 11", "set encoding"
    )
    with pytest.raises(ValueError) as error:
        read_table(latin, encoding="utf-9")
    one_sentence(error, "encoding is 'utf-9'", "allowed are names such as")


def test_read_table_as_text_keeps_fields(tmp_path):
    path = write(tmp_path, "codes.csv", "text,label\nNone,01\nNA,1\n,2\n")
    kept = read_table(path, as_text=True)
    assert kept["label"].tolist() == ["01", "1", "2"]
    assert kept["text"].tolist()[:2] == ["None", "NA"]
    assert pd.isna(kept["text"][2])
    assert read_table(path)["text"].isna().all()


@pytest.mark.parametrize(
    "name, content, options, words",
    [
        ("empty.csv", "", {}, "'empty.csv' is empty"),
        ("bare.csv", "text,label\n", {}, "'bare.csv' has no rows"),
        (
            "torn.csv",
            "text,label\na,1\nb,2,3,4\n",
            {},
            "'torn.csv' has 4 fields ('b,2,3,4') in line 3",
        ),
        (
            "none.csv",
            "text,label\na,1,2\n",
            dict(on_bad_lines="skip"),
            "'none.csv' has no rows",
        ),
        ("a.xls", "x", {}, "table is 'a.xls'; allowed are endings .csv"),
        (
            "a.jsonl",
            "{\n",
            {},
            "'a.jsonl' has '{' in line 1; allowed is a JSON object a line",
        ),
        ("b.jsonl", "\n", {}, "'b.jsonl' has no rows"),
        ("a.parquet", "no", {}, "'a.parquet' cannot be read"),
        ("zip.csv", b"PK\x03\x04\x14\x00\x08\x08\x08\x00\x91\xff\xfe", {}, "'zip.csv'"),
    ],
)
def test_read_table_refuses(tmp_path, name, content, options, words):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, name, content), **options)
    one_sentence(error, words)


def test_read_table_missing(tmp_path):
    for path in (tmp_path / "gone.csv", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            read_table(path)
        one_sentence(error, "table names", "no such file")


def test_text_rows_drops_what_is_missing():
    table = pd.DataFrame(
        {"t": ["a b", None, "  ", "c ", "d"], "y": [1, 2, 2, np.nan, 2]}
    )
    rows = text_rows(table, "t", "y")
    assert rows["text"].tolist() == ["a b", "d"]
    assert rows["label"].tolist() == ["1", "2"]
    assert rows.index.tolist() == [0, 4]
    assert text_rows(pd.DataFrame({"t": ["a", "b"], "y": [1.5, 2]}), "t", "y")[
        "label"
    ].tolist() == ["1.5", "2.0"]
    assert (
        rows.attrs["left_out"]
        == "3 of 5 rows left out: 2 without a text and 1 without a label"
    )
    whole = text_rows(pd.DataFrame({"text": list("ab"), "label": list("xy")}))
    assert whole.attrs["left_out"] == "no row lacks a text or a label"
    twice = pd.concat([table, table])  # an index that repeats
    again = text_rows(twice, "t", "y")
    assert again["text"].tolist() == ["a b", "d"] * 2
    assert deduplicate(again)["text"].tolist() == ["a b", "d"]
    assert describe_texts(again, twice)["duplicates of an earlier row"] == 2


@pytest.mark.parametrize(
    "frame, arguments, words",
    [
        (
            dict(texts=["a", "b"], label=[1, 2]),
            {},
            ("text is 'text'", "did you mean 'texts'?", "'texts', 'label'"),
        ),
        (dict(text=["a", "b"], stars=[1, 2]), {}, ("label is 'label'", "'stars'")),
        (
            dict(text=["a", "b"], label=[1, 1]),
            {},
            ("label is 'label'", "one class only ('1')", "at least two"),
        ),
        (
            dict(text=[3, 4.5], label=[1, 2]),
            {},
            ("text is 'text'", "holds numbers (such as 3", "a column of texts"),
        ),
        (
            dict(text=["a", "b"]),
            dict(label="text"),
            ("text and label are both 'text'; allowed are two columns",),
        ),
        (dict(text=["3", "4"], label=[1, 2]), {}, ("holds numbers",)),
        (dict(text=["3,5", "4"], label=[1, 2]), {}, ("holds numbers",)),
        (dict(text=[None, " "], label=[1, 2]), {}, ("no class at all",)),
        (
            {str(number): [1] for number in range(40)},
            dict(text="0", label="x"),
            ("and 28 more",),
        ),
    ],
)
def test_text_rows_refuses(frame, arguments, words):
    with pytest.raises(ValueError) as error:
        text_rows(pd.DataFrame(frame), **arguments)
    one_sentence(error, *words)


def test_text_rows_needs_one_column_of_a_name():
    with pytest.raises(ValueError) as error:
        text_rows(
            pd.DataFrame(
                [["a", "b", 1], ["c", "d", 2]], columns=["text", "text", "label"]
            )
        )
    one_sentence(error, "text is 'text', which 2 columns are called")


def test_without_copies():
    rows = pd.DataFrame(
        {
            "text": ["Fine.", "fine. ", "No", "no", "Other"],
            "label": ["1", "1", "1", "0", "0"],
        },
        index=[5, 6, 7, 8, 9],
    )
    # the copy goes; so do both rows of the disputed text
    assert deduplicate(rows).index.tolist() == [5, 9]


def test_check_classes():
    check_classes(pd.Series(list("aaabbb")))
    with pytest.raises(ValueError) as error:
        check_classes(pd.Series(list("aaabbc")))
    one_sentence(
        error,
        "label has classes with too few rows to split: 'b' (2), 'c' (1)",
        "at least 3",
    )
    with pytest.raises(ValueError, match="and 21 more"):
        check_classes(pd.Series(list("abcdefghijklmnopqrstuvwxyz")))
    with pytest.raises(ValueError) as error:  # texts, taken for labels by mistake
        check_classes(pd.Series(["x" * 500, "y" * 500]))
    one_sentence(error, "'" + "x" * 39 + "…' (1)")


def test_class_numbers():
    numbers, names = encode_labels(["10", "9", "-1", "9"])
    assert names == ["-1", "9", "10"]
    assert numbers.tolist() == [2, 1, 0, 1]
    assert numbers.dtype == torch.int64
    assert encode_labels(["b", "10", "a"])[1] == ["10", "a", "b"]


@pytest.mark.parametrize("odd", ["nan", "NaN", "inf", "-Infinity", "1e999"])
def test_class_numbers_have_one_order(odd):
    """Not a number is neither above nor below any.

    Sorted among numbers, it gave an order that hung on the hash seed.
    """
    numbers = [str(number) for number in range(40)]
    for labels in (
        numbers + [odd],
        [odd] + numbers[::-1],
        numbers[20:] + [odd] + numbers[:20],
    ):
        assert encode_labels(labels)[1] == numbers + [odd]


# near duplicates


def jaccard(first, second):
    runs = []
    for text in (first, second):
        words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
        padded = f" {' '.join(words)} "
        runs.append({padded[start : start + 5] for start in range(len(padded) - 4)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.text(alphabet="ab cé.中", min_size=0, max_size=30), min_size=0, max_size=12
    ),
    threshold=st.sampled_from([0.1, 0.5, 0.8, 1.0]),
)
def test_near_duplicates_are_the_jaccard_similarity(texts, threshold):
    texts = [
        text
        for text in texts
        if len("".join(c for c in text if c.isalnum())) == 0
        or sum(c.isalnum() for c in text) > 5
    ]
    found = {(i, j): s for i, j, s in near_duplicates(texts, threshold)}
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            if all(any(c.isalnum() for c in texts[k]) for k in (i, j)):
                similarity = jaccard(texts[i], texts[j])
                assert ((i, j) in found) == (similarity >= threshold)
                if (i, j) in found:
                    assert found[i, j] == pytest.approx(similarity)
            else:
                assert (i, j) not in found


def test_near_duplicates_beyond_one_block(monkeypatch):
    monkeypatch.setattr(sources, "_AT_A_TIME", 100_000)
    texts = [f"text number {number} {number * 7919}" for number in range(1100)]
    texts[1050] = texts[3].upper() + "!"
    assert (3, 1050, 1.0) == near_duplicates(texts, 0.95)[0]
    assert near_duplicates(["ok", "OK!", "no"]) == [(0, 1, 1.0)]
    assert near_duplicates(["", "...", ""]) == [] and near_duplicates([]) == []


def test_near_duplicates_refuses():
    for threshold in (0, 1.1):
        with pytest.raises(ValueError) as error:
            near_duplicates(["a"], threshold)
        one_sentence(error, f"threshold is {threshold}")


def test_copy_groups_follow_links():
    texts = [
        "the lamp arrived on time today",
        "the lamp arrived on time todax",
        "something else altogether",
        "the lamp arrived on time tdx",
    ]
    groups = near_duplicate_groups(texts, 0.6)
    assert groups[0] == groups[1] == groups[3] != groups[2]
    assert groups.dtype == torch.int64
    assert near_duplicate_groups(["a single text"]).tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("ab c", max_size=14), max_size=14),
    threshold=st.sampled_from([0.3, 0.6, 0.9]),
)
def test_groups_and_limit_are_those_of_all_pairs(texts, threshold):
    pairs = near_duplicates(texts, threshold)
    links = np.array([pair[:2] for pair in pairs], dtype=int).reshape(-1, 2)
    linked = coo_array(
        (np.ones(len(links)), (links[:, 0], links[:, 1])),
        shape=(len(texts), len(texts)),
    )
    assert near_duplicate_groups(texts, threshold).tolist() == (
        connected_components(linked, directed=False)[1].tolist() if texts else []
    )
    assert near_duplicates(texts, threshold, limit=3) == pairs[:3]


def test_groups_over_many_blocks(monkeypatch):
    """Links that reach from block to block.

    A chain of texts, each a near copy of the next, shuffled among others.
    """
    monkeypatch.setattr(sources, "_AT_A_TIME", 1000)
    words = [f"word{number}" for number in range(60)]
    chain = [" ".join(words[start : start + 20]) for start in range(40)]
    others = [
        " ".join(f"{letter}{letter}{number}" for number in range(20))
        for letter in "abcdefgh"
    ]
    texts = [
        (chain + others)[place]
        for place in np.random.default_rng(0).permutation(len(chain) + len(others))
    ]
    groups = near_duplicate_groups(texts, 0.8)
    chained = torch.tensor([text in chain for text in texts])
    assert len(groups[chained].unique()) == 1
    assert len(groups.unique()) == 1 + len(others)
    # in the order of first texts
    assert list(dict.fromkeys(groups.tolist())) == list(range(1 + len(others)))
    monkeypatch.undo()
    assert torch.equal(groups, near_duplicate_groups(texts, 0.8))


def test_memory_of_groups_grows_with_the_texts():
    """Pairs of 2,500 equal texts are three million: a list of them takes 100s of MB."""
    texts = [
        f"order {number % 7} of yours has been shipped and will arrive tomorrow"
        for number in range(2500)
    ]
    tracemalloc.start()
    assert len(near_duplicate_groups(texts).unique()) == 1
    assert len(near_duplicates(texts, limit=10)) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6
    with pytest.raises(ValueError) as error:
        near_duplicates(texts, limit=0)
    one_sentence(error, "limit is 0")


# images


@pytest.fixture
def pictures(tmp_path):
    for name, level in (("dark", 20), ("light", 240)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new(
                "RGB" if number else "L",
                (10 + number, 8),
                tuple([level] * 3) if number else level,
            ).save(tmp_path / name / f"{number}.png")
    (tmp_path / "dark" / ".hidden").write_text("x")
    (tmp_path / "notes.txt").write_text("no class")
    return tmp_path


def test_image_folder(pictures):
    images, targets, classes, left_out = image_folder(pictures, size=6)
    assert images.shape == (6, 3, 6, 6)
    assert images.dtype == torch.float32
    assert classes == ["dark", "light"]
    assert left_out == []
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:3].max() == pytest.approx(20 / 255)
    assert images[3:].min() == pytest.approx(240 / 255)


def test_image_folder_with_broken_files(pictures):
    good = (pictures / "light" / "1.png").read_bytes()
    (pictures / "light" / "torn.png").write_bytes(good[: len(good) // 2])
    (pictures / "dark" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        image_folder(pictures)
    one_sentence(
        error,
        "images holds dark/empty.jpg, which is no readable image",
        "on_broken to 'skip'",
    )
    images, _, _, left_out = image_folder(pictures, on_broken="skip")
    assert len(images) == 6 and left_out == ["dark/empty.jpg", "light/torn.png"]


def test_image_folder_turns_photographs(pictures):
    picture = Image.new("RGB", (8, 8), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 8, 4))  # black above, white below
    tags = Image.Exif()
    tags[0x0112] = 3  # the camera was upside down
    picture.save(pictures / "dark" / "9.png", exif=tags)
    image = image_folder(pictures, size=8)[0][3]
    assert image[:, 1].mean() == 1 and image[:, 6].mean() == 0


def grey(levels, mode="uint16"):
    return Image.fromarray(
        np.array(levels, dtype=mode).reshape(1, -1).repeat(len(levels), 0)
    )


def painted(mode, color, transparent=None):
    picture = Image.new(mode, (4, 4), color)
    return picture, ({} if transparent is None else {"transparency": transparent})


def frames(*colors):
    first, *others = (Image.new("RGB", (4, 4), color) for color in colors)
    return first, dict(save_all=True, append_images=others)


def palette(colors):
    picture = Image.new("P", (4, 4))
    picture.putpalette([value for color in colors for value in color])
    return picture


RAMP = [0, 16384, 32768, 65535]
MIDDLE, WHITE, RED = [np.mean(RAMP) / 65535] * 3, [1, 1, 1], [1, 0, 0]
DEEP, CLEAR = "grey of 16 bits, divided by 65,535", "transparent, shown on white"
FIRST = "of several frames or pages, the first"
ORANGE = (255, 51, 0)
# a file's ending, the picture and how it is saved; its mean colour; what is counted
PICTURES = {
    "16-bit grey PNG": ("png", grey(RAMP), {}, MIDDLE, DEEP),
    "16-bit grey TIFF": ("tif", grey(RAMP), {}, MIDDLE, DEEP),
    "16-bit grey PGM": ("pgm", grey(RAMP), {}, MIDDLE, DEEP),
    "dark 16-bit grey": ("png", grey([300] * 4), {}, [300 / 65535] * 3, DEEP),
    "32-bit float TIFF": (
        "tif",
        grey([0, 0.25, 0.5, 1], "float32"),
        {},
        [0.4375] * 3,
        "floating numbers, taken as they are",
    ),
    "8-bit grey": ("png", *painted("L", 51), [0.2] * 3, None),
    "8-bit colour": ("png", *painted("RGB", ORANGE), [1, 0.2, 0], None),
    "1 bit": ("png", *painted("1", 1), WHITE, None),
    "palette": ("png", palette([ORANGE, (0, 0, 0)]), {}, [1, 0.2, 0], None),
    "palette with a transparent colour": (
        "png",
        palette([ORANGE, (0, 0, 0)]),
        {"transparency": 0},
        WHITE,
        CLEAR,
    ),
    "colour, nothing to be seen": ("png", *painted("RGBA", (0, 0, 0, 0)), WHITE, CLEAR),
    "colour, half to be seen": (
        "png",
        *painted("RGBA", (255, 0, 0, 128)),
        [1, 0.498, 0.498],
        CLEAR,
    ),
    "one colour transparent": ("png", *painted("RGB", ORANGE, ORANGE), WHITE, CLEAR),
    "grey, nothing to be seen": ("png", *painted("LA", (0, 0)), WHITE, CLEAR),
    "one 16-bit grey transparent": ("png", *painted("I;16", 300, 300), WHITE, CLEAR),
    "CMYK": (
        "tif",
        *painted("CMYK", (0, 255, 255, 0)),
        RED,
        "in CMYK, turned into colours of a screen",
    ),
    "animated GIF": ("gif", *frames((255, 0, 0), (0, 0, 255)), RED, FIRST),
    "TIFF of two pages": ("tif", *frames((255, 0, 0), (0, 0, 255)), RED, FIRST),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_keep_their_content(pictures, case):
    ending, picture, options, color, decision = PICTURES[case]
    picture.save(pictures / "dark" / f"9.{ending}", **options)
    images, targets, _, left_out = image_folder(pictures, size=4)
    assert left_out == []
    assert targets.tolist() == [0] * 4 + [1] * 3
    assert images.dtype == torch.float32
    assert images[3].mean((1, 2)).tolist() == pytest.approx(color, abs=0.006)
    assert 0 <= images[3].min() and images[3].max() <= 1
    facts = describe_images(pictures)
    assert facts["images"] == 7
    assert facts.get(decision or "images") == (1 if decision else 7)
    assert decision or set(facts) == {
        "classes",
        "images",
        "not square, squeezed to a square",
        "different sizes",
    }
    json.dumps(facts)


@pytest.mark.parametrize(
    "picture, words",
    [
        (
            grey([0, 0.5, 812, 1], "float32"),
            "floating numbers from 0 to 812; allowed are 0 to 1",
        ),
        (grey([-1, 0, 1, 1], "float32"), "from -1 to 1"),
        (grey([0, np.nan, 1, 1], "float32"), "nan"),
        (
            grey([0, 70_000, 1, 1], "int32"),
            "whole numbers from 0 to 70000; allowed are 0 to 65535",
        ),
    ],
)
def test_pictures_whose_white_is_unknown_are_named(pictures, picture, words):
    picture.save(pictures / "dark" / "9.tif")
    with pytest.raises(ValueError) as error:
        image_folder(pictures)
    one_sentence(error, "images holds dark/9.tif", words)
    assert image_folder(pictures, on_broken="skip")[3] == ["dark/9.tif"]


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00II*\x00\xff\xff\xff\x7f",
        b"Exif\x00\x00" + bytes(range(40)),
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x05abcd",
        b"junk",
    ],
)
@pytest.mark.parametrize("on_broken", ["raise", "skip"])
def test_pictures_with_broken_exif_are_read_as_stored(pictures, exif, on_broken):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(pictures / "dark" / "9.jpg", exif=exif)
    images, _, _, left_out = image_folder(pictures, size=4, on_broken=on_broken)
    assert left_out == []
    assert images[3].mean((1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert describe_images(pictures)["images"] == 7


@settings(max_examples=30, deadline=None)
@given(
    content=st.binary(max_size=60),
    start=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"II*\x00",
            b"MM\x00*",
            b"BM",
            b"\xff\xd8\xff\xe1",
            b"RIFF\x10\0\0\0WEBPVP8 ",
            b"P5 4 4 9 ",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        ]
    ),
)
def test_any_bytes_are_left_out_by_name(tmp_path_factory, content, start):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / name / "1.png")
    (folder / "a" / "2.png").write_bytes(start + content)
    images, _, _, left_out = image_folder(folder, size=2, on_broken="skip")
    assert len(images) + len(left_out) == 3 and set(left_out) <= {"a/2.png"}


def test_folders_within_a_class_belong_to_it(pictures):
    (pictures / "dark" / "more" / "deep").mkdir(parents=True)
    (pictures / "dark" / "1.png").rename(pictures / "dark" / "more" / "deep" / "1.png")
    for litter in (
        "Thumbs.db",
        "thumbs.db",
        ".DS_Store",
        "desktop.ini",
        "more/._1.png",
        "more/Desktop.ini",
        ".ipynb_checkpoints/1.png",
        "__MACOSX/1.png",
    ):
        (pictures / "dark" / litter).parent.mkdir(exist_ok=True)
        (pictures / "dark" / litter).write_bytes(
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 not a picture"
        )
    (pictures / "__MACOSX").mkdir()
    images, targets, classes, left_out = image_folder(pictures)
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert classes == ["dark", "light"]
    assert left_out == []
    (pictures / "dark" / "more" / "torn.png").write_bytes(b"no")
    Image.new("L", (4, 4)).save(pictures / "astray.png")
    assert image_folder(pictures, on_broken="skip")[3] == [
        "astray.png",
        "dark/more/torn.png",
    ]
    facts = describe_images(pictures)
    assert (
        facts["images without a class, left out"]
        == facts["files that are no image"]
        == 1
    )
    assert facts["different sizes"] == 3


def test_turned_photographs_are_counted(pictures):
    tags = Image.Exif()
    tags[0x0112] = 3
    Image.new("RGB", (8, 8)).save(pictures / "dark" / "9.png", exif=tags)
    assert describe_images(pictures)["turned as the camera says"] == 1


def test_images_that_lose_their_aspect_ratio_are_counted(pictures):
    Image.new("RGB", (8, 8)).save(pictures / "dark" / "9.png")
    facts = describe_images(pictures)
    assert facts["images"] == 7 and facts["not square, squeezed to a square"] == 6
    assert "aspect ratio" in image_folder.__doc__


def test_image_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        image_folder(tmp_path / "gone")
    one_sentence(error, "images names", "no such folder")
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError) as error:
        image_folder(tmp_path)
    one_sentence(error, "1 class folders; allowed are at least two")
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError) as error:
        image_folder(tmp_path)
    one_sentence(error, "no readable image of class 'one'")
    with pytest.raises(ValueError) as error:
        image_folder(tmp_path, on_broken="ignore")
    one_sentence(error, "on_broken is 'ignore'; allowed are 'raise' and 'skip'")


# the texts of the package

FILES = files("bigmodel_nb.data") / "files"


@pytest.fixture(scope="module")
def make_texts():
    spec = importlib.util.spec_from_file_location(
        "make_texts", Path(__file__).resolve().parent.parent / "tools" / "make_texts.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reviews_are_balanced_and_split():
    everything = reviews("all")
    assert everything.columns.tolist() == [
        "id",
        "text",
        "label",
        "domain",
        "style",
        "typos",
        "split",
        "part",
    ]
    assert everything["id"].is_unique
    assert everything["text"].is_unique
    assert not everything.isna().any().any()
    assert (
        everything["text"]
        .map(
            lambda text: text.isascii() and text == text.strip() and 3 < len(text) < 800
        )
        .all()
    )
    for part, frame in everything.groupby("part"):
        assert reviews(part).equals(frame.reset_index(drop=True))
        assert abs(frame["label"].mean() - 0.5) < 0.03 and set(frame["label"]) == {0, 1}
        assert set(frame["style"]) == {"plain", "negation", "irony", "mixed", "implied"}
        shares = frame["split"].value_counts(normalize=True)
        assert shares["train"] == pytest.approx(0.6, abs=0.02)
        assert shares["valid"] == pytest.approx(0.1, abs=0.02)
        assert shares["test"] == pytest.approx(0.3, abs=0.02)
        by = frame.groupby(["style", "label"])["split"].value_counts(normalize=True)
        assert all(
            abs(share - {"train": 0.6, "valid": 0.1, "test": 0.3}[name[-1]]) < 0.08
            for name, share in by.items()
        )
    with pytest.raises(ValueError) as error:
        reviews("easy")
    one_sentence(error, "part is 'easy'; allowed are 'ordinary', 'hard' and 'all'")


def test_the_hard_reviews_are_the_old_ones():
    frame = reviews("hard")
    assert len(frame) == 1056
    assert frame["id"].tolist() == [f"r{number:04}" for number in range(1, 1057)]
    assert frame.groupby(["style", "split"])["label"].mean().eq(0.5).all()


def test_no_review_is_near_another():
    assert near_duplicates(reviews("all")["text"], 0.05, limit=1)[0][2] < 0.5


def test_words_of_judgement_stand_on_both_sides():
    frame = reviews("hard")
    words = "refund broke recommend worth quick friendly cheap love"
    for word in words.split():
        labels = frame.loc[frame["text"].str.lower().str.contains(word), "label"]
        assert len(labels) >= 4 and 0.1 < labels.mean() < 0.9, word


def test_ordinary_reviews_say_their_judgement():
    frame = reviews()
    shares = frame["style"].value_counts(normalize=True)
    assert len(frame) >= 1600
    assert shares["plain"] > 0.7
    assert 0.1 < shares["mixed"] < 0.2
    assert shares["irony"] < 0.03
    assert 30 <= frame["domain"].nunique() <= 60
    assert 0.08 < frame["typos"].mean() < 0.16
    assert (
        frame["text"].str.split().str.len().quantile([0.25, 0.75]).between(10, 40).all()
    )


WORD = re.compile(r"[a-z']{3,}")


def words_of(text):
    common = (
        "the and you your for can not have with what how does did when this that are"
        " was but from why get there will"
    )
    return set(WORD.findall(text.lower())) - set(common.split())


def test_support_has_messages_intents_and_a_help_page():
    messages = support("all")
    assert messages.columns.tolist() == ["text", "intent", "business", "split", "part"]
    assert not messages.duplicated(["text", "business"]).any()
    for part, least in (("ordinary", 1500), ("hard", 1000)):
        frame = support(part)
        assert len(frame) >= least
        assert messages[messages["part"] == part].reset_index(drop=True).equals(frame)
        intents = frame.groupby("business")["intent"].agg(set)
        assert all(len(each) == 13 and "outside" in each for each in intents)
        assert len(set.union(*intents)) == 37
        assert frame.groupby(["business", "intent"]).size().min() >= 20
        assert set(frame["split"]) == {"train", "valid", "test"}
    faq, unanswered = support_faq(), support_unanswered()
    assert len(faq) >= 150
    assert faq["id"].is_unique
    assert faq["asks"].map(len).min() >= 3
    assert unanswered.groupby("business").size().min() >= 50
    shared = [
        len(words_of(ask) & words_of(question))
        / max(1, len(words_of(ask) | words_of(question)))
        for question, asks in zip(faq["question"], faq["asks"])
        for ask in asks
    ]
    # other ways of asking share few words
    assert np.mean(shared) < 0.1
    assert np.quantile(shared, 0.95) < 0.3


def test_headlines_are_about_companies_that_they_name():
    frame = headlines()
    assert len(frame) >= 800
    assert frame.columns.tolist() == ["text", "name", "sentiment", "date", "split"]
    assert not frame.duplicated(["text", "name"]).any()
    assert all(name in text for name, text in zip(frame["name"], frame["text"]))
    assert set(frame["sentiment"]) == {"positive", "negative", "neutral"}
    dates = pd.to_datetime(frame["date"], format="%Y-%m-%d")
    assert (dates.dt.day_of_week < 5).all()
    assert frame.groupby("text")["split"].nunique().eq(1).all()
    assert (
        frame.groupby("text")["sentiment"].nunique() > 1
    ).sum() >= 50  # good for one, not for the other


def test_no_text_is_near_another_across_a_split():
    for frame in (reviews("all"), support("all"), headlines().drop_duplicates("text")):
        side = frame["split"].to_numpy()
        assert not [
            pair
            for *pair, _ in near_duplicates(frame["text"], 0.8)
            if side[pair[0]] != side[pair[1]]
        ]


def test_no_message_comes_twice():
    assert not near_duplicates(support("all")["text"], 1.0)


def test_the_domains_of_ordinary_reviews_are_those_of_the_table(make_texts):
    assert set(reviews()["domain"]) == set(make_texts.DOMAINS)
    narrow = [
        name for names in make_texts.DOMAINS.values() for name in names.split("; ")
    ]
    assert len(narrow) == len(set(narrow)) == len(make_texts.BROAD)
    assert list(make_texts.DOMAINS) == sorted(make_texts.DOMAINS)
    # made twice, it is the same
    broads = make_texts.BROAD
    assert all(broads.get(broad, broad) == broad for broad in make_texts.DOMAINS)


def test_copies_in_another_part_lie_on_the_same_side(make_texts):
    rows = pd.DataFrame(
        {
            "text": [
                invented(1),
                invented(2),
                invented(1).upper() + "!",
                invented(3),
                invented(2) + " x",
            ],
            "part": ["ordinary"] * 2 + ["hard"] * 3,
            "split": ["train", "test", "test", "valid", "valid"],
        }
    )
    placed = make_texts.on_one_side(rows)
    assert placed["split"].tolist() == ["train", "test", "train", "valid", "test"]
    assert make_texts.without_repeats(placed).index.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "rows, words",
    [
        (
            [("a", "a", "a", 8), ("b", "b", "b", 9)],
            "agree on 17 rows, 100.0%; Cohen's kappa is 1.000.",
        ),
        ([("a", "a", "a", 8), ("b", "a", "", 1)], "The other one was left out."),
        (
            [("a", "a", "a", 8), ("b", "a", "", 1), ("a", "b", "", 2)],
            "The 3 others were left out.",
        ),
        (
            [
                ("a", "a", "a", 8),
                ("b", "a", "c", 1),
                ("b", "c", "b", 2),
                ("a", "b", "b", 1),
            ],
            "Of the 4 others 2 keep the first label, 1 got the second, 1 got a third.",
        ),
    ],
)
def test_agreement_is_told_in_whole_sentences(make_texts, tmp_path, rows, words):
    counts = pd.DataFrame(rows, columns=["first", "second", "holds", "size"]).assign(
        set="reviews"
    )
    counts.to_csv(tmp_path / "agreement.csv", index=False)
    assert make_texts.agreement(tmp_path, "reviews").endswith(words)


def test_datasheets_say_who_wrote_and_labelled(make_texts):
    sheets = make_texts.datasheets(FILES)
    assert "no agreement between people is claimed" in sheets.pop("course.md")
    for name, text in sheets.items():
        assert (
            "invented for this project" in text
            and "labellings come from the project that wrote the texts" in text
            and "One house" not in text
        ), name
    assert "rewritten before the agreement was computed" in sheets["reviews.md"]
    assert "were left out (7)" in sheets["support.md"]
    test = reviews().query("split == 'test'")["style"].value_counts()
    assert (
        f"{test['irony']} of style `irony` and {test['implied']} of style `implied`"
        in sheets["reviews.md"]
    )


def test_datasheets_are_counted_from_the_files(make_texts):
    sheets = make_texts.datasheets(FILES)
    for name, text in sheets.items():
        assert (FILES / name).read_text(encoding="utf-8") == text, (
            "python tools/make_texts.py"
        )
        assert "Apache-2.0" in text and "**not** collected" in text and "{" not in text
    assert set(sheets) == {
        path.name for path in FILES.iterdir() if path.name.endswith(".md")
    }
    assert f"{len(reviews('all'))} English reviews" in sheets["reviews.md"]
    assert "would this customer choose it again" in sheets["reviews.md"]
    for column in ("style", "split", "domain"):
        for name, part in reviews("hard").groupby(column):
            bad, good = (1 - part["label"]).sum(), part["label"].sum()
            row = f"| {name} | {len(part)} | {bad} | {good} |"
            assert row in sheets["reviews.md"], name


LETTERS = (
    "alder birch cedar dogwood elm fir gum hazel ilex juniper kauri larch maple nutmeg"
    " oak pine quince rowan spruce teak"
).split()


def invented(number):
    """A short text that is no near copy of another number's."""
    return (
        " ".join(
            LETTERS[(number * 7 + step * (number % 13 + 3)) % 20] for step in range(8)
        )
        + f" {number}"
    )


@pytest.fixture
def written_texts(tmp_path):
    """A few texts as they are handed in, and the folder into which they are made."""

    def save(name, rows):
        (tmp_path / name).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )

    styles = ["plain", "mixed"]
    rows = [
        {
            "text": invented(number),
            "label": number % 2,
            "domain": "kettle",
            "style": styles[number // 2 % 2],
            "typos": number % 8 == 0,
            "second_label": number % 2,
        }
        for number in range(120)
    ]
    # one is left out, one got another label
    rows[0]["second_label"], rows[1]["second_label"], rows[1]["decided"] = 1, 0, 0
    rows[3]["text"] = rows[7]["text"] + "!"  # near copies
    save("reviews.jsonl", rows)
    save(
        "messages.jsonl",
        [
            {
                "text": invented(200 + number),
                "intent": ["fees", "outside"][number % 2],
                "business": ["bank", "shop"][number // 2 % 2],
                "part": "ordinary",
                "second_intent": ["fees", "outside"][number % 2],
            }
            for number in range(80)
        ],
    )
    save(
        "faq.jsonl",
        [
            {
                "id": f"bank-{number:02}",
                "business": "bank",
                "question": f"Question {number}?",
                "answer": "Yes.",
                "asks": ["a", "b, c", 'd "e"'],
            }
            for number in range(3)
        ],
    )
    save("unanswered.jsonl", [{"text": "Is it so?", "business": "bank"}])
    save(
        "headlines.jsonl",
        [
            {
                "text": invented(400 + number // 2),
                "name": f"Firm {number % 2}",
                "sentiment": ["positive", "negative"][number % 2],
                "date": "2024-03-18",
                "second_sentiment": ["positive", "negative"][number % 2],
            }
            for number in range(80)
        ],
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "reviews.csv").write_text(
        (FILES / "reviews.csv").read_text(encoding="utf-8"), encoding="utf-8"
    )
    return tmp_path, out


def test_texts_are_made_the_same_way_each_time(make_texts, written_texts):
    source, out = written_texts
    make_texts.make(source, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    make_texts.make(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    frame = pd.read_csv(out / "reviews.csv", keep_default_na=False)
    assert frame[frame["part"] == "hard"].equals(reviews("hard"))
    ordinary = frame[frame["part"] == "ordinary"].reset_index(drop=True)
    assert len(ordinary) == 119
    assert ordinary["id"].tolist()[:2] == ["o0001", "o0002"]
    assert ordinary["label"][0] == 0
    assert ordinary["split"][2] == ordinary["split"][6]
    assert ordinary["split"].value_counts().to_dict() == pytest.approx(
        {"train": 71, "test": 36, "valid": 12}, abs=2
    )
    headlines = pd.read_csv(out / "headlines.csv")
    assert headlines.groupby("text")["split"].nunique().eq(1).all()
    assert headlines["split"].nunique() == 3
    sheets = make_texts.datasheets(out)
    assert "Each of 120 rows was labelled twice" in sheets["reviews.md"]
    assert "agree on 118 rows, 98.3%; Cohen's kappa is 0.967" in sheets["reviews.md"]
    assert "Of the 2 others 1 got the second, 1 was left out." in sheets["reviews.md"]
    assert "80 messages with 1 intents and 40 messages outside" in sheets["support.md"]
    assert "3 questions with answers, and 9 other ways" in sheets["support.md"]
    assert (
        "40 of them occur with more than one company,"
        " 40 of these with different answers"
    ) in sheets["headlines.md"]


def test_texts_with_a_class_in_one_group_are_refused(make_texts):
    rows = pd.DataFrame(
        {
            "text": [invented(number) for number in range(6)]
            + ["the same text again"] * 6,
            "intent": ["fees"] * 6 + ["outside"] * 6,
        }
    )
    with pytest.raises(ValueError) as error:
        make_texts.with_split(rows, ["intent"])
    one_sentence(error, "class 'outside' has 6 rows in 1 group")


def test_text_facts():
    table = pd.DataFrame(
        {
            "text": ["a b", "A  b", "c", None, "d", "D"],
            "label": ["x", "x", "y", "x", "x", "y"],
        }
    )
    facts = describe_texts(text_rows(table), table)
    assert facts["rows"] == 6
    assert facts["rows without text or label"] == 1
    assert facts["duplicates of an earlier row"] == 2
    assert facts["texts with more than one label"] == 1
    assert facts["rows left"] == 2
    assert facts["classes"] == 2
    assert facts["rows of the largest class"] == 3
    json.dumps(facts)
    assert all(re.fullmatch(r"[\w ,%]+", name) for name in facts)


@pytest.mark.parametrize("between, ending", [("\t", "tsv"), (",", "csv")])
def test_two_lone_quotes_swallow_no_rows(tmp_path, between, ending):
    """A text that begins with a quote and a later one that ends with one are two."""
    rows = [(f"text number {place}", str(place % 2)) for place in range(200)]
    rows[10], rows[150] = (
        ('" ' + rows[10][0], rows[10][1]),
        (rows[150][0] + ' "', rows[150][1]),
    )
    path = tmp_path / f"sst.{ending}"
    path.write_text(
        "".join(f"{text}{between}{label}\n" for text, label in rows), encoding="utf-8"
    )
    table = read_table(path, header=False, as_text=True)
    assert list(table.itertuples(index=False, name=None)) == rows
    small = tmp_path / f"small.{ending}"
    small.write_text(
        f'"begin only{between}1\nb{between}0\nend only"{between}1\n', encoding="utf-8"
    )
    assert read_table(small, header=False, as_text=True)["0"].tolist() == [
        '"begin only',
        "b",
        'end only"',
    ]


@pytest.mark.parametrize(
    "text",
    ["first line\nsecond, line", "soft, and\nwarm", "nice,\nwarm", ",\n", "a, b\nc, d"],
)
@pytest.mark.parametrize("between, ending", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
@pytest.mark.parametrize(
    "quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]
)
def test_a_field_over_several_lines_stays_one(tmp_path, text, between, ending, quoting):
    path = tmp_path / f"long.{ending}"
    rows = [
        (text.replace(",", between), "1"),
        ("plain", "0"),
        (text.replace(",", between), "good"),
    ]
    as_written(
        path,
        [("text", "label"), *rows],
        delimiter=between,
        quoting=quoting,
        lineterminator="\n",
    )
    back = read_table(path, as_text=True)
    assert rows_of(back) == rows and "lone quotes" not in str(back.attrs["format"])


def test_lone_quotes_or_a_field_over_lines_is_said_and_settled_by_an_argument(tmp_path):
    path = tmp_path / "either.csv"
    path.write_text('text,label\n"warm,1\nsoft",1\n', encoding="utf-8")
    assert "set quotechar to '\"'" in str(read_table(path).attrs["format"])
    assert len(read_table(path)) == 2
    assert read_table(path, quotechar='"')["text"].tolist() == ["warm,1\nsoft"]


@pytest.mark.parametrize("missing", ["#N/A", "n/a", "<NA>", "-nan", "NULL"])
def test_a_decimal_comma_is_found_beside_whatever_pandas_calls_missing(
    tmp_path, missing
):
    path = tmp_path / "prices.csv"
    path.write_text(f"preis;text\n3,5;a\n4,25;b\n{missing};c\n", encoding="utf-8")
    assert read_table(path)["preis"].tolist()[:2] == [3.5, 4.25]


def test_litter_and_links_that_lead_back_are_no_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "@eaDir").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name / "one.png")
        Image.new("L", (4, 4)).save(tmp_path / name / "@eaDir" / "thumb.png")
        for litter in ("ehthumbs_vista.db", "Thumbs.db:encryptable"):
            (tmp_path / name / litter).write_bytes(b"no image")
        (tmp_path / name / "again").symlink_to(tmp_path / name)
    images, *_ = image_folder(tmp_path)
    assert len(images) == 2


def test_a_tiff_of_16_bits_in_which_0_is_white(tmp_path):
    for name, value in (("a", 0), ("b", 65535)):
        (tmp_path / name).mkdir()
        values = np.full((4, 4), value, dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / name / "x.tif", tiffinfo={262: 0})
    images, *_ = image_folder(tmp_path, size=4)
    assert images[0].min() == 1 and images[1].max() == 0
