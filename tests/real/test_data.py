"""Chapter 1 on real tables and images."""

import pandas as pd
import pytest
import torch

from bigmodel_nb.data.sources import (
    check_classes,
    deduplicate,
    describe_texts,
    encode_labels,
    image_folder,
    near_duplicate_groups,
    near_duplicates,
    read_table,
    split_indices,
    text_rows,
)

# Rows, columns and how they were written, as counted by whoever collected the sets,
# and by csv and grep.
TABLES = {
    "banking77/train.csv": (10_003, 2, "UTF-8", ","),
    "banking77/test.csv": (3_080, 2, "UTF-8", ","),
    "waimai_10k/waimai_10k.csv": (11_987, 2, "UTF-8", ","),
    "chnsenticorp_hotel/ChnSentiCorp_htl_all.csv": (7_766, 2, "UTF-8", ","),
    "titanic/titanic.csv": (891, 15, "UTF-8", ","),
    "penguins/penguins.csv": (344, 8, "UTF-8", ","),
    "penguins/penguins_raw.csv": (344, 17, "UTF-8", ","),
    "movielens_latest_small/ratings.csv": (100_004, 4, "UTF-8", ","),
    "movielens_latest_small/movies.csv": (9_125, 3, "UTF-8", ","),
    "movielens_latest_small/tags.csv": (1_296, 4, "UTF-8", ","),
    "movielens_latest_small/links.csv": (9_125, 3, "UTF-8", ","),
    "covid_faq/faq_covidbert.csv": (213, 12, "UTF-8", ","),
    "covid_faq/eval_question_similarity_en.csv": (488, 3, "UTF-8", ","),
}
WITHOUT_HEADER = {
    "adult_census/adult-train.csv": (32_561, 15, "UTF-8", ","),
    "adult_census/adult-test.csv": (16_281, 15, "UTF-8", ","),
    "sst2/train.tsv": (6_920, 2, "UTF-8", "\t"),
    "sst2/dev.tsv": (872, 2, "UTF-8", "\t"),
    "sst2/test.tsv": (1_821, 2, "UTF-8", "\t"),
    "tatoeba_cmn_eng/cmn.txt": (29_155, 3, "UTF-8", "\t"),
    "financial_phrasebank/Sentences_50Agree.txt": (4_846, 2, "cp1252", "@"),
    "financial_phrasebank/Sentences_75Agree.txt": (3_453, 2, "cp1252", "@"),
    "financial_phrasebank/Sentences_AllAgree.txt": (2_264, 2, "UTF-8", "@"),
}


@pytest.mark.parametrize("name", [*TABLES, *WITHOUT_HEADER])
def test_tables_are_read_without_help(real_data, name):
    rows, columns, encoding, delimiter = (TABLES | WITHOUT_HEADER)[name]
    frame = read_table(real_data / name, header=name in TABLES)
    found = frame.attrs["format"]
    assert frame.shape == (rows, columns), str(found)
    assert (found["encoding"], found["delimiter"]) == (encoding, delimiter), str(found)
    if name in TABLES:  # what pandas reads too, once it is told
        assert frame.equals(pd.read_csv(real_data / name))


def test_quotes_are_text_where_tabs_separate(real_data):
    frame = read_table(
        real_data / "tatoeba_cmn_eng" / "cmn.txt", header=False, as_text=True
    )
    lines = (
        (real_data / "tatoeba_cmn_eng" / "cmn.txt")
        .read_bytes()
        .decode("utf-8-sig")
        .split("\n")
    )
    assert frame["0"].tolist() == [line.split("\t")[0] for line in lines if line]
    assert frame.attrs["format"]["quotechar"] == ""


def test_sst2_has_no_header(real_data):
    rows = text_rows(
        read_table(real_data / "sst2" / "train.tsv", header=False, as_text=True),
        "0",
        "1",
    )
    assert len(rows) == 6920 and set(rows["label"]) == {"0", "1"}


def test_phrasebank_tells_its_encoding(real_data):
    path = real_data / "financial_phrasebank" / "Sentences_50Agree.txt"
    with pytest.raises(ValueError, match="was read as utf-8 and is not"):
        read_table(path, header=False, encoding="utf-8")
    told = read_table(
        path, header=False, delimiter="@", encoding="latin-1", as_text=True
    )
    assert told.equals(read_table(path, header=False, as_text=True))
    rows = text_rows(told, "0", "1")
    assert rows["label"].value_counts().to_dict() == {
        "neutral": 2879,
        "positive": 1363,
        "negative": 604,
    }


def test_banking77_and_its_near_copies(real_data):
    rows = deduplicate(
        text_rows(
            read_table(real_data / "banking77" / "train.csv", as_text=True),
            "text",
            "category",
        )
    )
    targets, names = encode_labels(rows["label"])
    check_classes(rows["label"])
    assert len(names) == 77 and len(rows) > 9_500
    sample = rows["text"].iloc[:3000].tolist()
    pairs, groups = near_duplicates(sample), near_duplicate_groups(sample)
    assert pairs and all(groups[i] == groups[j] for i, j, _ in pairs)
    train, valid, test = split_indices(targets[:3000], (0.6, 0.1, 0.3), groups=groups)
    assert not set(groups[train].tolist()) & set(
        groups[torch.cat([valid, test])].tolist()
    )


def test_hotel_reviews_in_chinese(real_data):
    table = read_table(
        real_data / "chnsenticorp_hotel" / "ChnSentiCorp_htl_all.csv", as_text=True
    )
    rows = text_rows(table, "review", "label")
    facts = describe_texts(rows, table)
    assert facts["rows"] == 7766
    assert facts["rows without text or label"] == 1
    assert facts["classes"] == 2
    with pytest.raises(ValueError, match="did you mean 'review'"):
        text_rows(table, "reviews", "label")


def test_cifar_folder(real_data):
    images, targets, classes, left_out = image_folder(
        real_data / "cifar10_subset" / "test"
    )
    assert images.shape == (1000, 3, 32, 32) and len(classes) == 10 and left_out == []
    assert targets.bincount().tolist() == [100] * 10 and 0.3 < images.mean() < 0.6
