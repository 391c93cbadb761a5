"""Chapter 1: from raw rows to batches."""
import json
import re
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bigmodel_nb.data.sources import (check_classes, class_numbers, copy_groups, digits, image_folder, loader, near_duplicates, read_table, reviews,
                                      split_indices, text_facts, text_rows, without_copies)


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# digits, loader

def test_digits():
    images, targets = digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32 and targets.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1 and targets.bincount().tolist()[:3] == [178, 182, 177]


def test_loader_orders():
    inputs, targets = torch.arange(10.0), torch.arange(10)
    assert [len(x) for x, _ in loader(inputs, targets, batch_size=4)] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in loader(inputs, targets, batch_size=4)]), inputs)
    shuffled = loader(inputs, targets, batch_size=4, shuffle=True, seed=1)
    first, second = (torch.cat([y for _, y in shuffled]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    torch.rand(5)
    assert first == torch.cat([y for _, y in loader(inputs, targets, batch_size=4, shuffle=True, seed=1)]).tolist()
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
@given(counts=st.lists(st.integers(3, 60), min_size=1, max_size=5), seed=st.integers(0, 5), fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.5), (0.9, 0.05, 0.05)]))
def test_split_is_a_stratified_partition(counts, seed, fractions):
    targets = torch.cat([torch.full((count,), 10 * number) for number, count in enumerate(counts)])
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))]
    parts = split_indices(targets, fractions, seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(targets)))
    for part, fraction in zip(parts, fractions):
        assert part.dtype == torch.int64 and (part.diff() > 0).all()
        for number, count in enumerate(counts):
            have = (targets[part] == 10 * number).sum().item()
            assert have >= 1 and abs(have - fraction * count) <= len(fractions)
    assert all(torch.equal(a, b) for a, b in zip(parts, split_indices(targets, fractions, seed)))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=20, max_size=60), seed=st.integers(0, 5))
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
        assert ((targets[part].bincount() - fraction * targets.bincount()).abs() <= 1.5).all()


@pytest.mark.parametrize("arguments, words", [
    (dict(targets=[0, 1] * 5, fractions=(0.5, 0.6)), "fractions is (0.5, 0.6)"),
    (dict(targets=[0, 1] * 5, fractions=(1.0,)), "two or more positive numbers"),
    (dict(targets=[0, 1] * 5, fractions=(1.5, -0.5)), "fractions"),
    (dict(targets=[0, 0, 0, 1, 1]), "2 rows or groups of class 1"),
    (dict(targets=[0, 1] * 5, groups=[1, 2]), "groups has 2 entries and targets 10"),
    (dict(targets=[]), "targets has shape (0,)"),
    (dict(targets=[0] * 5 + [1] * 5, groups=[0, 1, 2, 3, 4, 9, 9, 9, 9, 9]), "1 rows or groups of class 1"),
])
def test_split_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        split_indices(**arguments)
    one_sentence(error, words)


# tables

def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_read_table_kinds(tmp_path):
    frame = pd.DataFrame({"text": ['a, "b"', "c\td", "e"], "label": [1, 0, 1]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        assert read_table(tmp_path / f"a.{ending}").equals(frame), ending
    tabs = read_table(write(tmp_path, "a.tsv", 'he said "no\t0\nyes\t1\n'), header=False)
    assert tabs.columns.tolist() == ["0", "1"] and tabs["0"].tolist() == ['he said "no', "yes"]  # quotes are text
    at = read_table(write(tmp_path, "a.txt", 'profit "rose", much@positive\nno news@neutral\n'), header=False, delimiter="@")
    assert at["0"].tolist() == ['profit "rose", much', "no news"] and at["1"].tolist() == ["positive", "neutral"]


def test_read_table_encodings(tmp_path):
    marked = write(tmp_path, "mark.csv", "\ufefftext,label\nöl,1\n")
    assert read_table(marked).columns.tolist() == ["text", "label"] and read_table(marked, encoding="UTF8")["text"][0] == "öl"
    latin = write(tmp_path, "latin.csv", "text,label\nöl,1\n".encode("latin-1"))
    assert read_table(latin, encoding="latin-1")["text"][0] == "öl"
    with pytest.raises(ValueError) as error:
        read_table(latin)
    one_sentence(error, "'latin.csv' was read as utf-8 and is not", "0xf6 at 11", "set encoding")
    with pytest.raises(ValueError) as error:
        read_table(latin, encoding="utf-9")
    one_sentence(error, "encoding is 'utf-9'", "allowed are names such as")


def test_read_table_as_text_keeps_fields(tmp_path):
    path = write(tmp_path, "codes.csv", "text,label\nNone,01\nNA,1\n,2\n")
    kept = read_table(path, as_text=True)
    assert kept["label"].tolist() == ["01", "1", "2"] and kept["text"].tolist()[:2] == ["None", "NA"] and pd.isna(kept["text"][2])
    assert read_table(path)["text"].isna().all()


@pytest.mark.parametrize("name, content, options, words", [
    ("empty.csv", "", {}, "'empty.csv' is empty"),
    ("bare.csv", "text,label\n", {}, "'bare.csv' has no rows"),
    ("torn.csv", "text,label\na,1\nb,2,3,4\n", {}, "'torn.csv' cannot be read"),
    ("a.xls", "x", {}, "table is 'a.xls'; allowed are files that end in .csv"),
    ("a.csv", "a,b\n1,2\n", dict(delimiter=";;"), "delimiter is ';;'; allowed is one character"),
    ("a.jsonl", "{\n", {}, "'a.jsonl' cannot be read"),
    ("a.parquet", "no", {}, "'a.parquet' cannot be read"),
    ("zip.csv", b"PK\x03\x04\x14\x00\x08\x08\x08\x00\x91\xff\xfe", {}, "'zip.csv'"),
])
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
    table = pd.DataFrame({"t": ["a b", None, "  ", "c ", "d"], "y": [1, 2, 2, np.nan, 2]})
    rows = text_rows(table, "t", "y")
    assert rows["text"].tolist() == ["a b", "d"] and rows["label"].tolist() == ["1", "2"] and rows.index.tolist() == [0, 4]
    assert text_rows(pd.DataFrame({"t": ["a", "b"], "y": [1.5, 2]}), "t", "y")["label"].tolist() == ["1.5", "2.0"]
    same = text_rows(pd.DataFrame({"t": ["good", "bad"]}), "t", "t")
    assert same["label"].tolist() == ["good", "bad"]


@pytest.mark.parametrize("frame, arguments, words", [
    (dict(texts=["a", "b"], label=[1, 2]), {}, ("text is 'text'", "did you mean 'texts'?", "'texts', 'label'")),
    (dict(text=["a", "b"], stars=[1, 2]), {}, ("label is 'label'", "'stars'")),
    (dict(text=["a", "b"], label=[1, 1]), {}, ("label is 'label'", "one class only ('1')", "at least two")),
    (dict(text=[3, 4.5], label=[1, 2]), {}, ("text is 'text'", "holds numbers (such as 3", "a column of texts")),
    (dict(text=["3", "4"], label=[1, 2]), {}, ("holds numbers",)),
    (dict(text=[None, " "], label=[1, 2]), {}, ("no class at all",)),
    ({str(number): [1] for number in range(40)}, dict(text="0", label="x"), ("and 28 more",)),
])
def test_text_rows_refuses(frame, arguments, words):
    with pytest.raises(ValueError) as error:
        text_rows(pd.DataFrame(frame), **arguments)
    one_sentence(error, *words)


def test_without_copies():
    rows = pd.DataFrame({"text": ["Fine.", "fine. ", "No", "no", "Other"], "label": ["1", "1", "1", "0", "0"]}, index=[5, 6, 7, 8, 9])
    assert without_copies(rows).index.tolist() == [5, 9]  # the copy goes; so do both rows of the disputed text


def test_check_classes():
    check_classes(pd.Series(list("aaabbb")))
    with pytest.raises(ValueError) as error:
        check_classes(pd.Series(list("aaabbc")))
    one_sentence(error, "label has classes with too few rows to split: 'b' (2), 'c' (1)", "at least 3")
    with pytest.raises(ValueError, match="and 21 more"):
        check_classes(pd.Series(list("abcdefghijklmnopqrstuvwxyz")))


def test_class_numbers():
    numbers, names = class_numbers(["10", "9", "-1", "9"])
    assert names == ["-1", "9", "10"] and numbers.tolist() == [2, 1, 0, 1] and numbers.dtype == torch.int64
    assert class_numbers(["b", "10", "a"])[1] == ["10", "a", "b"]


# near duplicates

def jaccard(first, second):
    runs = [{f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())} "[start:][:5] for start in range(len(text) + 2)} for text in (first, second)]
    runs = [{run for run in each if len(run) == 5} for each in runs]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab cé.中", min_size=0, max_size=30), min_size=0, max_size=12), threshold=st.sampled_from([0.1, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_the_jaccard_similarity(texts, threshold):
    texts = [text for text in texts if len("".join(c for c in text if c.isalnum())) == 0 or sum(c.isalnum() for c in text) > 5]
    found = {(i, j): s for i, j, s in near_duplicates(texts, threshold)}
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            if any(c.isalnum() for c in texts[i]) and any(c.isalnum() for c in texts[j]):
                similarity = jaccard(texts[i], texts[j])
                assert ((i, j) in found) == (similarity >= threshold)
                if (i, j) in found:
                    assert found[i, j] == pytest.approx(similarity)
            else:
                assert (i, j) not in found


def test_near_duplicates_beyond_one_block():
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
    texts = ["the lamp arrived on time today", "the lamp arrived on time todax", "something else altogether", "the lamp arrived on time tdx"]
    groups = copy_groups(texts, 0.6)
    assert groups[0] == groups[1] == groups[3] != groups[2] and groups.dtype == torch.int64
    assert copy_groups(["a single text"]).tolist() == [0]


# images

@pytest.fixture
def pictures(tmp_path):
    for name, level in (("dark", 20), ("light", 240)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB" if number else "L", (10 + number, 8), tuple([level] * 3) if number else level).save(tmp_path / name / f"{number}.png")
    (tmp_path / "dark" / ".hidden").write_text("x")
    (tmp_path / "notes.txt").write_text("no class")
    return tmp_path


def test_image_folder(pictures):
    images, targets, classes, left_out = image_folder(pictures, size=6)
    assert images.shape == (6, 3, 6, 6) and images.dtype == torch.float32 and classes == ["dark", "light"] and left_out == []
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:3].max() == pytest.approx(20 / 255) and images[3:].min() == pytest.approx(240 / 255)


def test_image_folder_with_broken_files(pictures):
    good = (pictures / "light" / "1.png").read_bytes()
    (pictures / "light" / "torn.png").write_bytes(good[: len(good) // 2])
    (pictures / "dark" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        image_folder(pictures)
    one_sentence(error, "images holds dark/empty.jpg, which is no readable image", "on_broken to 'skip'")
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


# the reviews

def test_reviews_are_balanced_and_split():
    frame = reviews()
    assert frame.columns.tolist() == ["id", "text", "label", "domain", "style", "typos", "split"]
    assert len(frame) >= 800 and frame["label"].mean() == 0.5 and set(frame["label"]) == {0, 1}
    assert frame["id"].is_unique and frame["text"].is_unique and not frame.isna().any().any()
    assert frame["text"].map(lambda text: text.isascii() and text == text.strip() and 10 < len(text) < 500).all()
    assert set(frame["style"]) == {"plain", "negation", "irony", "mixed", "implied"}
    shares = frame["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.02) and shares["valid"] == pytest.approx(0.1, abs=0.02) and shares["test"] == pytest.approx(0.3, abs=0.02)
    by = frame.groupby(["style", "split"])["label"].agg(["mean", "size"])
    assert (by["mean"] == 0.5).all() and by["size"].min() >= 8


def test_no_review_is_near_another():
    closest = near_duplicates(reviews()["text"], 0.05)[0]
    assert closest[2] < 0.4


def test_words_of_judgement_stand_on_both_sides():
    frame = reviews()
    for word in ("refund", "broke", "recommend", "worth", "quick", "friendly", "cheap", "love"):
        labels = frame.loc[frame["text"].str.lower().str.contains(word), "label"]
        assert len(labels) >= 4 and 0.1 < labels.mean() < 0.9, word


def test_datasheet_says_what_the_file_holds():
    sheet, frame = (files("bigmodel_nb.data") / "files" / "reviews.md").read_text(encoding="utf-8"), reviews()
    assert f"{len(frame)} short English reviews" in sheet and f"{frame['typos'].sum()} reviews carry typing errors" in sheet, "python tools/make_reviews.py"
    for column in ("style", "split", "domain"):
        for name, part in frame.groupby(column):
            assert f"| {name} | {len(part)} | {part['label'].sum()} | {(1 - part['label']).sum()} |" in sheet, name
    for said in ("Apache-2.0", "would this customer choose it again", "**not** collected"):
        assert said in sheet


def test_text_facts():
    table = pd.DataFrame({"text": ["a b", "A  b", "c", None, "d", "D"], "label": ["x", "x", "y", "x", "x", "y"]})
    facts = text_facts(text_rows(table), table)
    assert facts["rows"] == 6 and facts["rows without text or label"] == 1 and facts["copies of an earlier row"] == 2
    assert facts["texts with more than one label"] == 1 and facts["rows left"] == 2 and facts["classes"] == 2 and facts["rows of the largest class"] == 3
    json.dumps(facts)
    assert all(re.fullmatch(r"[\w ,%]+", name) for name in facts)
