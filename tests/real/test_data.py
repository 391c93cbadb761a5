"""Chapter 1 on real tables and images."""
import pytest
import torch

from bigmodel_nb.data.sources import check_classes, class_numbers, copy_groups, image_folder, near_duplicates, read_table, split_indices, text_facts, text_rows, without_copies


def test_sst2_has_no_header(real_data):
    rows = text_rows(read_table(real_data / "sst2" / "train.tsv", header=False, as_text=True), "0", "1")
    assert len(rows) == 6920 and set(rows["label"]) == {"0", "1"}


def test_phrasebank_needs_its_encoding_and_delimiter(real_data):
    path = real_data / "financial_phrasebank" / "Sentences_50Agree.txt"
    with pytest.raises(ValueError, match="was read as utf-8 and is not"):
        read_table(path, header=False, delimiter="@", as_text=True)
    rows = text_rows(read_table(path, header=False, delimiter="@", encoding="latin-1", as_text=True), "0", "1")
    assert rows["label"].value_counts().to_dict() == {"neutral": 2879, "positive": 1363, "negative": 604}
    whole = read_table(path.with_name("Sentences_AllAgree.txt"), header=False, delimiter="@", as_text=True)
    assert len(whole) == 2264


def test_banking77_and_its_near_copies(real_data):
    rows = without_copies(text_rows(read_table(real_data / "banking77" / "train.csv", as_text=True), "text", "category"))
    targets, names = class_numbers(rows["label"])
    check_classes(rows["label"])
    assert len(names) == 77 and len(rows) > 9_500
    sample = rows["text"].iloc[:3000].tolist()
    pairs, groups = near_duplicates(sample), copy_groups(sample)
    assert pairs and all(groups[i] == groups[j] for i, j, _ in pairs)
    train, valid, test = split_indices(targets[:3000], (0.6, 0.1, 0.3), groups=groups)
    assert not set(groups[train].tolist()) & set(groups[torch.cat([valid, test])].tolist())


def test_hotel_reviews_in_chinese(real_data):
    table = read_table(real_data / "chnsenticorp_hotel" / "ChnSentiCorp_htl_all.csv", as_text=True)
    rows = text_rows(table, "review", "label")
    facts = text_facts(rows, table)
    assert facts["rows"] == 7766 and facts["rows without text or label"] == 1 and facts["classes"] == 2
    with pytest.raises(ValueError, match="did you mean 'review'"):
        text_rows(table, "reviews", "label")


def test_cifar_folder(real_data):
    images, targets, classes, left_out = image_folder(real_data / "cifar10_subset" / "test")
    assert images.shape == (1000, 3, 32, 32) and len(classes) == 10 and left_out == []
    assert targets.bincount().tolist() == [100] * 10 and 0.3 < images.mean() < 0.6
