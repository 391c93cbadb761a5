"""Chapter 5 on real tables, as an analyst runs it: small samples, one epoch."""

import pandas as pd
import pytest

from bigmodel_nb.adapting.classifier import split_texts, tfidf_baseline
from bigmodel_nb.adapting.features import EFFICIENTNET
from bigmodel_nb.adapting.finetune import load_estimator
from bigmodel_nb.data.sources import read_table, text_rows
from bigmodel_nb.headless.run import RunFailed, run
from bigmodel_nb.models.pretrained import find


def test_banking_with_a_given_test_file(real_data, tmp_path):
    test = pd.read_csv(real_data / "banking77" / "test.csv").groupby("category").head(6)
    test.to_csv(tmp_path / "test.csv", index=False)
    done = run(
        "adapting/finetune",
        out=tmp_path / "run",
        data=real_data / "banking77" / "train.csv",
        test=tmp_path / "test.csv",
        label="category",
        epochs=1,
        max_rows=300,
        learning_rate=1e-4,
    )
    assert (
        done.metrics["rows"]["classes"] == 77
        and done.metrics["rows"]["left_out"] > 9000
    )
    assert (
        done.metrics["score_frozen_encoder"]["value"]
        > 0.5
        > 0.2
        > done.metrics["score_majority"]["value"]
    )
    model = load_estimator(tmp_path / "run" / "model")
    assert len(model.classes_) == 77
    asked = ["Where is my card? It should have come last week."]
    assert model.predict(asked)[0] in (
        "card_arrival",
        "card_delivery_estimate",
        "lost_or_stolen_card",
    )


def test_phrasebank_in_its_own_encoding(real_data, tmp_path):
    options = dict(
        data=real_data / "financial_phrasebank" / "Sentences_50Agree.txt",
        text="0",
        label="1",
        header=False,
        delimiter="@",
        epochs=1,
        max_rows=300,
    )
    done = run(
        "adapting/finetune", options, out=tmp_path / "run"
    )  # the encoding is found
    assert (
        done.metrics["rows"]["classes"] == 3
        and done.metrics["score_frozen_encoder"]["low"] > 0.5
    )
    # Most sentences are neutral, so accuracy says little and macro-F1 more.
    macro_f1 = done.metrics["gain_of_macro_f1"]
    assert (
        macro_f1["low"] > 0
        and f"{100 * macro_f1['value']:+.1f} points"
        in (done.metrics["verdict"].partition("by macro-F1")[2])
    )
    with pytest.raises(RunFailed, match="was read as utf-8 and is not"):
        run(
            "adapting/finetune", options | {"encoding": "utf-8"}, out=tmp_path / "other"
        )


@pytest.mark.skipif(
    find(EFFICIENTNET) is None, reason="needs `bigmodel fetch tf_efficientnet_lite0`"
)
def test_photographs_in_folders(real_data, tmp_path):
    photographs = real_data / "cifar10_subset"
    done = run(
        "adapting/finetune",
        out=tmp_path / "run",
        data=photographs / "train",
        test=photographs / "test",
        max_rows=100,
        image_size=128,
    )
    m = done.metrics
    assert m["rows"]["classes"] == 10 and m["rows"]["test"] == 100
    assert m["gain_over_pixels"]["low"] > 0, (
        "a pretrained encoder sees more than pixels"
    )
    model = load_estimator(tmp_path / "run" / "model")
    said = model.predict(sorted((photographs / "test" / "ship").iterdir())[:40])
    assert (said == "ship").mean() > 0.3


def test_chinese_hotel_reviews_run(real_data, tmp_path):
    table = real_data / "chnsenticorp_hotel" / "ChnSentiCorp_htl_all.csv"
    done = run(
        "adapting/finetune",
        {
            "data": table,
            "text": "review",
            "epochs": 1,
            "max_rows": 150,
            "max_length": 48,
        },
        out=tmp_path / "run",
    )
    assert (
        done.metrics["rows"]["classes"] == 2
        and 0 < done.metrics["score_model"]["value"] <= 1
    )


def test_counting_letters_reads_chinese(real_data):
    rows = text_rows(
        read_table(
            real_data / "chnsenticorp_hotel" / "ChnSentiCorp_htl_all.csv", as_text=True
        ),
        "review",
        "label",
    )
    split = split_texts(rows, max_rows=1500)
    found = tfidf_baseline(split).predict(split.test["text"])
    assert (found == split.test["target"]).mean() > 0.75 and isinstance(
        split.test, pd.DataFrame
    )
