"""Chapter 5: classifiers on encoders.

A tiny random encoder stands in for the pretrained one wherever size does not matter.
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import string
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from bigmodel_nb.adapting.classifier import (
    TextClassifierModule,
    describe_tokens,
    finetune,
    fit_linear_probe,
    load_probe,
    parameter_groups,
    rows_for_token_budget,
    sample_rows,
    split_texts,
    tfidf_baseline,
    warmup_linear,
)
from bigmodel_nb.adapting.features import (
    MINILM,
    SentenceEncoder,
    load_encoder,
    mean_pool,
    tokenized_loader,
)
from bigmodel_nb.kit.core import copy_model
from bigmodel_nb.models.pretrained import MODELS
from bigmodel_nb.training.loop import predict

TEXTS = [
    "fine",
    "not fine at all",
    "a much longer text that says rather little about anything",
    "good",
    "bad , very bad",
    "it works every day",
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def minilm():
    return load_encoder()


def tiny(minilm, labels=("no", "yes"), seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=minilm[1].vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return TextClassifierModule(
        BertModel(config), minilm[1], labels, max_length=32
    ).eval()


def same_answers(first, second):
    return first["label"].equals(second["label"]) and np.allclose(
        first["probability"], second["probability"], atol=1e-6
    )


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# the encoder


def test_load_encoder_is_the_published_one(minilm):
    encoder, tokenizer = minilm
    assert (
        not encoder.training
        and sum(p.numel() for p in encoder.parameters()) == 22_713_216
    )
    vectors = SentenceEncoder(encoder, tokenizer).encode(
        ["A cat sits outside", "A feline is outdoors", "The stock market fell"]
    )
    unit = F.normalize(vectors)
    assert unit[0] @ unit[1] > 0.5 > 0.2 > unit[0] @ unit[2]


def test_load_encoder_checks_the_weights(monkeypatch):
    minilm = MODELS["all-MiniLM-L6-v2"]
    files = {**minilm.files, "model.safetensors": "0" * 64}
    changed = dataclasses.replace(minilm, files=files)
    monkeypatch.setitem(MODELS, "all-MiniLM-L6-v2", changed)
    with pytest.raises(ValueError) as error:
        load_encoder()
    one_sentence(error, MINILM, "SHA-256 53aa51172d", "allowed is the published 0000")


def test_load_encoder_refuses_what_is_no_encoder(tmp_path):
    for name in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(ValueError) as error:
            load_encoder(name)
        one_sentence(error, f"model is {name!r}", "in safetensors")


def test_no_pickle_is_ever_read(tmp_path, minilm):
    classifier = tiny(minilm)
    classifier.encoder.config.save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    torch.save(classifier.encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_encoder(str(tmp_path))
    one_sentence(error, "safetensors")


def test_load_encoder_from_a_folder_and_attention(tmp_path, minilm):
    tiny(minilm).encoder.save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    outputs = []
    for attention in ("eager", "sdpa"):
        encoder, tokenizer = load_encoder(str(tmp_path), attention)
        assert encoder.config._attn_implementation == attention
        outputs.append(SentenceEncoder(encoder, tokenizer, 32).encode(TEXTS))
    assert torch.allclose(*outputs, atol=1e-5)


# pooling and batches


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 9)
)
def test_mean_pool_leaves_padding_out(lengths, seed):
    hidden = torch.randn(
        len(lengths),
        7,
        3,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    wanted = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths)])
    assert torch.allclose(mean_pool(hidden, mask), wanted)
    assert torch.allclose(
        mean_pool(hidden + 1e6 * (1 - mask).unsqueeze(-1), mask), wanted
    )


def test_loader_keeps_the_order_and_pads_each_batch(minilm):
    loader = tokenized_loader(TEXTS, [0, 1, 0, 1, 0, 1], minilm[1], batch_size=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 3 and torch.cat(
        [target for _, target in batches]
    ).tolist() == [0, 1, 0, 1, 0, 1]
    for input, _ in batches:
        assert (
            set(input) == {"input_ids", "attention_mask"}
            and input["attention_mask"].sum(1).max() == input["input_ids"].shape[1]
        )
    assert (
        minilm[1].decode(batches[0][0]["input_ids"][0], skip_special_tokens=True)
        == "fine"
    )
    cut = next(iter(tokenized_loader(TEXTS, None, minilm[1], 6, max_length=5)))
    assert cut[0]["input_ids"].shape == (6, 5) and cut[1].tolist() == [0] * 6


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(st.integers(1, 25), min_size=1, max_size=60),
    size=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_shuffled_loader_sees_every_row_once(minilm, words, size, seed):
    texts, numbers = ["word " * count for count in words], torch.arange(len(words))
    loaders = [
        tokenized_loader(texts, numbers, minilm[1], size, shuffle=True, seed=seed)
        for _ in range(2)
    ]
    epochs = [[target.tolist() for _, target in loaders[0]] for _ in range(2)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == numbers.tolist() and len(epoch) == len(
            loaders[0]
        ) == math.ceil(len(words) / size)
    assert epochs[0] == [target.tolist() for _, target in loaders[1]]


def test_length_batches_waste_less_padding_and_change_each_epoch(minilm):
    texts = ["word " * (1 + 7 * number % 30) for number in range(200)]
    padding = {
        shuffle: sum(
            (input["attention_mask"] == 0).sum().item()
            for input, _ in tokenized_loader(texts, None, minilm[1], 10, shuffle)
        )
        for shuffle in (False, True)
    }
    assert padding[True] < padding[False] / 3
    loader = tokenized_loader(texts, range(200), minilm[1], 10, shuffle=True)
    assert [t.tolist() for _, t in loader] != [t.tolist() for _, t in loader]


def test_loader_refuses(minilm):
    for texts, targets, words in (
        (["a"], [0, 1], "texts has 1 entries and targets 2"),
        ([], [], "at least one text"),
    ):
        with pytest.raises(ValueError) as error:
            tokenized_loader(texts, targets, minilm[1])
        one_sentence(error, words)
    with pytest.raises(ValueError, match="batch_size is 0"):
        tokenized_loader(["a"], [0], minilm[1], batch_size=0)


# the classifier


def test_encode_keeps_the_order_mode_and_neighbours_out(minilm):
    classifier = tiny(minilm, dropout=0.5).train()
    together = classifier.encode(TEXTS, batch_size=4)
    assert classifier.training and classifier.encoder.training
    alone = torch.cat([classifier.encode([text]) for text in TEXTS])
    assert (
        together.shape == (6, 16)
        and torch.allclose(together, alone, atol=1e-6)
        and not together.requires_grad
    )


def test_encode_puts_texts_of_as_many_tokens_together(minilm, monkeypatch):
    """Tokens count, not letters: long words may be one token, short ones too."""
    classifier, padded = tiny(minilm), []
    long_words = ["international development organization"] * 4
    short_words = ["a b c d e f g h i j"] * 4
    mixed = [text for pair in zip(long_words, short_words) for text in pair]
    forward = SentenceEncoder.forward

    def watched(self, input_ids=None, attention_mask=None, **given):
        padded.append(int((attention_mask == 0).sum()))
        return forward(self, input_ids, attention_mask, **given)

    monkeypatch.setattr(SentenceEncoder, "forward", watched)
    classifier.encode(["so short", *mixed, "a b c"], batch_size=5)
    own = sorted(map(len, minilm[1](["so short", *mixed, "a b c"])["input_ids"]))
    least = sum(max(part) - n for part in (own[:5], own[5:]) for n in part)
    assert sum(padded) == least


def test_logits_are_those_of_forward(minilm):
    classifier = tiny(minilm, dropout=0.5).train()
    logits = classifier.logits(TEXTS, batch_size=4)
    assert classifier.training and not logits.requires_grad
    input, _ = next(iter(tokenized_loader(TEXTS, None, minilm[1], 6)))
    torch.testing.assert_close(logits, classifier.eval()(**input).detach())
    answers = classifier.predict(TEXTS)
    labels = [classifier.labels[each] for each in logits.argmax(1)]
    assert answers["label"].tolist() == labels


def test_forward_takes_embeddings(minilm):
    classifier = tiny(minilm)
    input, _ = next(iter(tokenized_loader(TEXTS, None, minilm[1], 6)))
    embeddings = classifier.encoder.get_input_embeddings()(input["input_ids"])
    logits = classifier(**input)
    assert logits.shape == (6, 2) and logits.dtype == torch.float32
    assert torch.equal(
        classifier(inputs_embeds=embeddings, attention_mask=input["attention_mask"]),
        logits,
    )
    single, _ = next(iter(tokenized_loader(TEXTS[:1], None, minilm[1], 1)))
    assert torch.allclose(classifier(single["input_ids"]), logits[:1], atol=1e-6)
    for wrong in ({}, dict(input_ids=input["input_ids"], inputs_embeds=embeddings)):
        with pytest.raises(ValueError) as error:
            classifier(**wrong)
        one_sentence(error, "input_ids and inputs_embeds", "exactly one")


def test_predict_agrees_with_forward(minilm):
    classifier = tiny(minilm, labels=("a", "b", "c"))
    found = classifier.predict(TEXTS, batch_size=4)
    logits = predict(classifier, tokenized_loader(TEXTS, None, minilm[1], 6))
    assert found["text"].tolist() == TEXTS and found["label"].tolist() == [
        "abc"[index] for index in logits.argmax(1)
    ]
    assert np.allclose(found["probability"], logits.softmax(1).max(1).values, atol=1e-6)


def test_classifier_refuses_labels(minilm):
    for labels in (["one"], ["a", "a"], []):
        with pytest.raises(ValueError) as error:
            TextClassifierModule(minilm[0], minilm[1], labels)
        one_sentence(error, f"labels is {labels}")


def test_saved_and_loaded(tmp_path, minilm):
    classifier = tiny(minilm, labels=("größe", "b"))
    folder = tmp_path / "deep" / "model"
    classifier.save_pretrained(folder)
    again = TextClassifierModule.from_pretrained(folder)
    assert (
        again.labels == ["größe", "b"] and again.max_length == 32 and not again.training
    )
    assert same_answers(again.predict(TEXTS), classifier.predict(TEXTS))
    assert {path.suffix for path in folder.iterdir()} <= {
        ".json",
        ".safetensors",
        ".txt",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    tiny(minilm, labels=("x", "y", "z"), seed=1).save_pretrained(folder)  # replaces
    assert TextClassifierModule.from_pretrained(folder).labels == ["x", "y", "z"]


def test_saving_never_replaces_what_is_no_classifier(tmp_path, minilm):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError) as error:
            tiny(minilm).save_pretrained(folder)
        one_sentence(error, "holds something else")
    with pytest.raises(FileNotFoundError) as error:
        TextClassifierModule.from_pretrained(tmp_path)
    one_sentence(error, "there is no classifier in it")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_saving_never_takes_other_files_along(tmp_path, minilm):
    folder = tmp_path / "model"
    tiny(minilm).save_pretrained(folder)
    (folder / "notes.txt").write_text("years of work")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError) as error:
        tiny(minilm, seed=1).save_pretrained(folder)
    one_sentence(error, "holds 'notes.txt' beside a classifier", "allowed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interruption_at_the_last_moment_leaves_the_old_one(
    tmp_path, minilm, monkeypatch
):
    folder = tmp_path / "model"
    classifier = tiny(minilm)
    classifier.save_pretrained(folder)
    before, rename = classifier.predict(TEXTS), os.rename

    def interrupted(path, target):
        if target == folder and path.suffix != ".old":
            raise OSError("interrupted")
        return rename(path, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        tiny(minilm, seed=1).save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same_answers(
        TextClassifierModule.from_pretrained(folder).predict(TEXTS), before
    )


def test_a_failed_save_leaves_the_old_one(tmp_path, minilm, monkeypatch):
    classifier = tiny(minilm)
    classifier.save_pretrained(tmp_path / "model")
    before = classifier.predict(TEXTS)
    broken = tiny(minilm, seed=1)
    monkeypatch.setattr(
        broken.tokenizer.__class__,
        "save_pretrained",
        lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        broken.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same_answers(
        TextClassifierModule.from_pretrained(tmp_path / "model").predict(TEXTS), before
    )


# head, groups, schedule, training


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_head_says_what_the_regression_says(minilm, classes):
    generator = torch.Generator().manual_seed(classes)
    vectors, targets = (
        torch.randn(140, 16, generator=generator),
        torch.arange(140) % classes,
    )
    regression = fit_linear_probe(vectors, targets, vectors[:30], targets[:30])
    classifier = tiny(minilm, labels=[str(number) for number in range(classes)])
    load_probe(classifier, regression)
    with torch.no_grad():
        probability = classifier.head(vectors).softmax(1)
    assert np.allclose(
        probability, regression.predict_proba(vectors.numpy()), atol=1e-5
    )


def test_a_linear_probe_is_fitted_on_one_thread(monkeypatch):
    """Products of small matrices on several threads take ten times as long."""
    used, fit = [], LogisticRegression.fit

    def threads():
        return {
            each["num_threads"]
            for each in threadpool_info()
            if each["user_api"] == "blas"
        }

    monkeypatch.setattr(
        LogisticRegression,
        "fit",
        lambda self, *given: (used.append(threads()), fit(self, *given))[1],
    )
    vectors, targets = torch.randn(12, 4), torch.arange(12) % 2
    with threadpool_limits(2, user_api="blas"):
        outside = threads()
        fit_linear_probe(vectors, targets, vectors, targets, penalties=(1.0,))
        assert threads() == outside
    assert used == [{1}]


def test_fit_head_chooses_by_validation():
    generator = torch.Generator().manual_seed(0)
    vectors, coin = (
        torch.randn(40, 16, generator=generator),
        torch.randint(0, 2, (40,), generator=generator),
    )
    assert (
        fit_linear_probe(
            vectors,
            coin,
            torch.randn(200, 16, generator=generator),
            torch.arange(200) % 2,
            (1e-4, 100.0),
        ).C
        == 1e-4
    )
    assert fit_linear_probe(vectors, coin, vectors, coin, (1e-4, 100.0)).C == 100.0


def test_no_layer_learns_faster_than_the_head_where_the_depth_is_not_known():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = torch.nn.Module(), torch.nn.Linear(4, 2)
            self.encoder.layer = torch.nn.ModuleList(
                torch.nn.Linear(4, 4) for _ in range(3)
            )

    rates = {group["lr"] for group in parameter_groups(Net(), 1e-3, layer_decay=0.5)}
    assert rates == {1e-3}


def test_parameter_groups_hold_each_parameter_once(minilm):
    classifier = tiny(minilm)
    groups = parameter_groups(classifier, 1e-3, layer_decay=0.5, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, classifier.parameters()))
    rate = {
        id(parameter): group["lr"] for group in groups for parameter in group["params"]
    }
    decay = {
        id(parameter): group["weight_decay"]
        for group in groups
        for parameter in group["params"]
    }
    encoder = classifier.encoder
    assert rate[id(classifier.head.weight)] == 1e-3
    assert [rate[id(layer.output.dense.weight)] for layer in encoder.encoder.layer] == [
        5e-4,
        1e-3,
    ]
    assert rate[id(encoder.embeddings.word_embeddings.weight)] == 2.5e-4
    assert decay[id(encoder.encoder.layer[0].output.dense.weight)] == 0.1
    assert (
        decay[id(encoder.encoder.layer[0].output.dense.bias)]
        == decay[id(encoder.embeddings.LayerNorm.weight)]
        == 0
    )


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_warmup_linear_rises_and_falls(steps, warmup):
    rates = [warmup_linear(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert (
        max(rates) == pytest.approx(1.0)
        and min(rates) > 0
        and warmup_linear(steps, steps, warmup) in (0.0, 1.0)
    )
    assert all(a < b for a, b in zip(rates[: rise - 1], rates[1:rise])) and all(
        a >= b for a, b in zip(rates[rise:], rates[rise + 1 :])
    )


def colours(rows=48, seed=0):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, rows)
    articles, things = ["the", "a", "one"], ["car", "hat", "door"]
    texts = [
        f"{generator.choice(articles)} {['red', 'blue'][target]}"
        f" {generator.choice(things)}"
        for target in targets
    ]
    return texts, torch.from_numpy(targets)


def test_finetune_learns_and_repeats_bit_for_bit(minilm):
    texts, targets = colours()
    trained = []
    for _ in range(2):
        classifier = tiny(minilm, dropout=0.1)
        torch.manual_seed(5)
        history = finetune(
            classifier,
            tokenized_loader(texts, targets, minilm[1], 8, True),
            epochs=6,
            learning_rate=5e-3,
            layer_decay=1.0,
        )
        trained.append(classifier.cpu())
    assert not classifier.training and history.frame["train_loss"].iloc[-1] < 0.1
    answers = classifier.predict(texts)["label"]
    assert (answers == [["no", "yes"][target] for target in targets]).all()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            trained[0].state_dict().values(), trained[1].state_dict().values()
        )
    )


def test_finetune_takes_an_objective(minilm):
    texts, targets = colours(16)
    calls = []

    def objective(model, input, target):
        calls.append(len(target))
        return F.cross_entropy(model(**input), target)

    finetune(
        tiny(minilm),
        tokenized_loader(texts, targets, minilm[1], 8),
        epochs=2,
        objective=objective,
        device="cpu",
    )
    assert calls == [8, 8, 8, 8]


# rows


def frame(counts, seed=0):
    generator = np.random.default_rng(seed)
    rows = [
        (
            " ".join(
                generator.choice(["alpha", "beta", "gamma", "delta", "rho", "chi"], 6)
            )
            + f" {number} {name}",
            name,
        )
        for name, count in counts.items()
        for number in range(count)
    ]
    return pd.DataFrame(rows, columns=["text", "label"]).sample(
        frac=1, random_state=seed
    )


def test_split_texts_parts():
    rows = frame({"good": 60, "bad": 40})
    split = split_texts(rows, seed=1)
    assert split.labels == ["bad", "good"] and split.left_out == 0
    assert [
        len(part) for part in (split.train, split.valid, split.test)
    ] == pytest.approx([60, 10, 30], abs=3)
    texts = [set(part["text"]) for part in (split.train, split.valid, split.test)]
    assert not (
        texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2]
    ) and set.union(*texts) == set(rows["text"])
    for part in (split.train, split.valid, split.test):
        assert [split.labels[target] for target in part["target"]] == part[
            "label"
        ].tolist()


def test_split_texts_keeps_copies_apart_from_the_test_rows():
    rows = pd.concat(
        [
            frame({"good": 30, "bad": 30}),
            pd.DataFrame(
                {
                    "text": ["Same  text", "near copy of a longer text, number 1"] * 2,
                    "label": ["good"] * 4,
                }
            ),
        ]
    )
    test = pd.DataFrame(
        {
            "text": ["same text", "something new", "something newer"],
            "label": ["good", "bad", "bad"],
        }
    )
    split = split_texts(rows, test)
    assert (
        "Same  text" not in [*split.train["text"], *split.valid["text"]]
        and len(split.test) == 3
    )
    nearly = test.assign(text=["near copy of a longer text, number 2", "new", "newer"])
    split = split_texts(rows, nearly)
    used = [*split.train["text"], *split.valid["text"]]
    assert not any("near copy" in text for text in used), "near duplicates are apart"
    assert "Same  text" in used and split.left_out == len(rows) - 2 - len(used)
    near = pd.DataFrame(
        {
            "text": [
                f"this complaint was copied from a form, number {number % 5}"
                + "!" * (number // 5)
                for number in range(30)
            ],
            "label": "bad",
        }
    )
    parts = split_texts(
        pd.concat(
            [
                frame({"good": 30, "bad": 30}),
                near.assign(
                    text=near["text"] + pd.Series(range(30)).astype(str).str[-1]
                ),
            ]
        ),
        seed=0,
    )
    owners = [
        part["text"].str.startswith("this complaint").any()
        for part in (parts.train, parts.valid, parts.test)
    ]
    assert sum(owners) == 1


def test_split_texts_limits_rows_and_keeps_rare_classes():
    rows = frame({"common": 400, "rare": 4})
    split = split_texts(rows, max_rows=100)
    assert 95 <= len(split.train) + len(split.valid) + len(
        split.test
    ) <= 105 and split.left_out == 404 - len(split.train) - len(split.valid) - len(
        split.test
    )
    assert all(
        "rare" in set(part["label"]) for part in (split.train, split.valid, split.test)
    )


def test_split_texts_refuses():
    with pytest.raises(ValueError) as error:
        split_texts(frame({"a": 10, "b": 2}))
    one_sentence(error, "'b' (2)", "too few rows to split")
    with pytest.raises(ValueError) as error:
        split_texts(
            frame({"a": 10, "b": 10}), pd.DataFrame({"text": ["new"], "label": ["c"]})
        )
    one_sentence(error, "test has the label 'c', which data does not have", "a, b")


def test_sample_rows():
    rows = frame({"a": 80, "b": 20, "c": 2})
    drawn = sample_rows(rows, 50, seed=3)
    counts = drawn["label"].value_counts()
    assert (
        counts["a"] == pytest.approx(39, abs=1)
        and counts["c"] == 2
        and drawn.index.isin(rows.index).all()
    )
    assert drawn.equals(sample_rows(rows, 50, seed=3)) and not drawn.equals(
        sample_rows(rows, 50, seed=4)
    )
    assert sample_rows(rows, None) is rows and sample_rows(rows, 500) is rows


def test_rows_within(minilm):
    assert (
        rows_for_token_budget(["word"] * 10, minilm[1], tokens=300) == 100
    )  # a word and two marks
    assert (
        rows_for_token_budget(
            ["word " * 500] * 10, minilm[1], max_length=30, tokens=300
        )
        == 10
    )


def test_tfidf_reads_words_and_unparted_scripts():
    rows = frame({"good": 60, "bad": 60}).assign(
        text=lambda rows: (
            rows["text"]
            + rows["label"].map({"good": " works well", "bad": " broke soon"})
        )
    )
    split = split_texts(rows)
    assert (
        tfidf_baseline(split).predict(split.test["text"]) == split.test["target"]
    ).mean() > 0.95
    signs = frame({"good": 60, "bad": 60}).assign(
        text=lambda rows: [
            f"房间{number}{'很好' if name == 'good' else '太差'}了{number * 7}"
            for number, name in zip(range(120), rows["label"])
        ]
    )
    split = split_texts(signs)
    assert (
        tfidf_baseline(split).predict(split.test["text"]) == split.test["target"]
    ).mean() > 0.9


# measures


def test_frozen_model_is_left_as_it_was(minilm):
    encoder = minilm[0]
    before = copy.deepcopy(encoder.state_dict())
    SentenceEncoder(*minilm).encode(TEXTS)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), encoder.state_dict().values())
    )


def test_a_copy_has_its_own_weights_and_the_same_tokenizer(minilm):
    classifier = tiny(minilm)
    classifier.register_forward_hook(lambda model, given, made: made)
    for made in (copy.deepcopy(classifier), copy_model(classifier)):
        assert type(made) is type(classifier) and made.labels == classifier.labels
        assert made.tokenizer is classifier.tokenizer and made._forward_hooks
        pairs = zip(made.state_dict().items(), classifier.state_dict().items())
        for (name, own), (other, kept) in pairs:
            assert name == other and torch.equal(own, kept)
            assert own.data_ptr() != kept.data_ptr()
        assert torch.equal(made.logits(TEXTS), classifier.logits(TEXTS))


# encoders and tokenizers of other people


def without_padding(minilm):
    "MiniLM's words in a tokenizer that has no padding token, as GPT-2's has none."
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=minilm[1].backend_tokenizer, unk_token="[UNK]"
    )


def decoder(vocabulary, positions=64):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_without_padding_works(minilm, side):
    tokenizer = without_padding(minilm)
    tokenizer.padding_side = side
    classifier = TextClassifierModule(
        decoder(tokenizer.vocab_size), tokenizer, ["no", "yes"], max_length=32
    ).eval()
    together = classifier.encode(TEXTS)
    alone = torch.cat([classifier.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    losses = finetune(
        classifier,
        tokenized_loader(TEXTS, [1, 0, 0, 1, 0, 1], tokenizer, 4, True, max_length=32),
        epochs=1,
        device="cpu",
    ).batch_losses
    assert (
        len(losses) == 2 and tokenizer.pad_token is None
    )  # the caller's tokenizer stays as it was


def test_padding_is_the_tokenizers_own(minilm):
    tokenizer = minilm[1]
    ((batch, _),) = tokenized_loader(TEXTS, None, tokenizer, 6)
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert all(
        torch.equal(batch[name], expected[name])
        for name in ("input_ids", "attention_mask")
    )


def test_max_length_beyond_the_positions_is_refused(minilm):
    for encoder, limit in (
        (
            BertModel(
                BertConfig(
                    vocab_size=minilm[1].vocab_size,
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=8,
                    max_position_embeddings=64,
                )
            ),
            64,
        ),
        (decoder(minilm[1].vocab_size, 48), 48),
        (minilm[0], 512),
    ):
        with pytest.raises(ValueError) as error:
            TextClassifierModule(
                encoder, minilm[1], ["no", "yes"], max_length=limit + 1
            )
        one_sentence(
            error,
            f"max_length is {limit + 1}",
            f"allowed are 1 to {limit}, the positions of this encoder",
        )
        long = TextClassifierModule(
            encoder, minilm[1], ["no", "yes"], max_length=limit
        ).encode(["word " * 600])
        assert long.isfinite().all()
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="max_length is .*; allowed are 1 to 512"):
            SentenceEncoder(*minilm, max_length=wrong)


def test_relative_positions_have_no_end(minilm):
    from transformers import LlamaConfig, LlamaModel

    encoder = LlamaModel(
        LlamaConfig(
            vocab_size=minilm[1].vocab_size,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    vectors = SentenceEncoder(encoder, minilm[1], max_length=10_000).encode(
        ["word " * 300, "word"]
    )
    assert vectors.shape == (2, 16) and vectors.isfinite().all()


def test_places_of_padding_in_the_table_are_no_positions(minilm):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=minilm[1].vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=66,
    )
    with pytest.raises(ValueError, match="max_length is 65; allowed are 1 to 64"):
        SentenceEncoder(RobertaModel(config), minilm[1], max_length=65)
    assert (
        SentenceEncoder(RobertaModel(config), minilm[1], max_length=64)
        .encode(["word " * 300])
        .isfinite()
        .all()
    )


def test_an_encoder_with_a_decoder_is_refused(tmp_path, minilm):
    from transformers import T5Config, T5Model

    T5Model(
        T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load_encoder(str(tmp_path))
    one_sentence(
        error,
        f"model is {str(tmp_path)!r}",
        "T5Model",
        "reads one text and writes another",
    )


def test_a_sample_of_rows_with_a_repeated_index_is_as_large_as_asked():
    rows = pd.concat(
        [
            pd.DataFrame(
                {
                    "text": [f"{part} {number}" for number in range(20)],
                    "label": ["a", "b"] * 10,
                }
            )
            for part in "xy"
        ]
    )
    found = sample_rows(rows, 10, seed=0)
    assert (
        len(found) == 10
        and found["text"].is_unique
        and found["label"].value_counts().tolist() == [5, 5]
    )
    order = rows["text"].tolist()
    assert [order.index(text) for text in found["text"]] == sorted(
        order.index(text) for text in found["text"]
    )


def test_vectors_of_all_layers(minilm):
    classifier = tiny(minilm)
    found = classifier.encode(TEXTS, batch_size=4, layers="all")
    tokens = minilm[1](TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = classifier.encoder(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            output_hidden_states=True,
        ).hidden_states
    expected = torch.stack(
        [mean_pool(state, tokens["attention_mask"]) for state in states[1:]], 1
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        found[:, -1], classifier.encode(TEXTS), atol=1e-6, rtol=1e-5
    )
    with pytest.raises(ValueError, match="layers is 3; allowed are 'last' and 'all'"):
        classifier.encode(TEXTS, layers=3)


# what is refused, what is taken in any container, what is said of a language


@pytest.fixture(scope="module")
def classifier(minilm):
    return tiny(minilm)


def calls(classifier):
    "Each public way that takes texts."
    return {
        "encode": classifier.encode,
        "predict": classifier.predict,
        "tokenized_loader": lambda texts: tokenized_loader(
            texts, None, classifier.tokenizer
        ),
        "rows_for_token_budget": lambda texts: rows_for_token_budget(
            texts, classifier.tokenizer
        ),
        "describe_tokens": lambda texts: describe_tokens(texts, classifier.tokenizer),
    }


@pytest.mark.parametrize(
    "way",
    [
        "encode",
        "predict",
        "tokenized_loader",
        "rows_for_token_budget",
        "describe_tokens",
    ],
)
def test_one_string_is_not_a_sequence_of_texts(classifier, way):
    with pytest.raises(TypeError) as error:
        calls(classifier)[way]("I like it")
    one_sentence(
        error,
        "texts is 'I like it'",
        "allowed is a sequence of strings, such as ['I like it']",
    )


@pytest.mark.parametrize(
    "way",
    [
        "encode",
        "predict",
        "tokenized_loader",
        "rows_for_token_budget",
        "describe_tokens",
    ],
)
def test_what_is_no_text_is_named_with_its_place(classifier, way):
    for texts, said in (
        ([None], "texts holds None at place 0"),
        (["fine", 3], "texts holds 3 at place 1"),
        (["a", float("nan")], "texts holds nan"),
        (7, "texts is 7"),
        (None, "texts is None"),
        (b"bytes", "texts is b'bytes'"),
        ({"a": 1}, "texts is {'a': 1}"),
    ):
        with pytest.raises(TypeError) as error:
            calls(classifier)[way](texts)
        one_sentence(error, said, "sequence of strings")
    with pytest.raises(ValueError) as error:
        calls(classifier)[way]([])
    one_sentence(error, "at least one text")


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(
        st.text(string.ascii_letters + " é中", max_size=12), min_size=1, max_size=5
    ),
    start=st.integers(-3, 9),
)
def test_any_container_of_texts_gives_the_same(classifier, texts, start):
    expected = classifier.encode(texts)
    for given_as in (
        tuple(texts),
        pd.Series(texts, index=range(start, start + len(texts))),
        np.array(texts, dtype=object),
        iter(texts),
    ):
        assert torch.equal(classifier.encode(given_as), expected)
    found = classifier.predict(pd.Series(texts, index=range(start, start + len(texts))))
    assert found["text"].tolist() == texts and found.index.tolist() == list(
        range(len(texts))
    )


def test_forward_takes_what_the_tokenizer_gives(classifier, minilm):
    given_tokens = minilm[1](TEXTS, padding=True, return_tensors="pt")
    assert "token_type_ids" in given_tokens
    with torch.no_grad():
        for module in (classifier, SentenceEncoder(classifier.encoder, minilm[1], 32)):
            bare = module(given_tokens["input_ids"], given_tokens["attention_mask"])
            assert torch.equal(module(**given_tokens), bare)
    pair = minilm[1]("a text", "and another", return_tensors="pt")
    with pytest.raises(ValueError) as error:
        classifier(**pair)
    one_sentence(
        error, "token_type_ids marks a second text", "allowed are single texts"
    )
    for wrong in ("I like it", [[101, 102]], minilm[1](TEXTS)["input_ids"]):
        with pytest.raises(TypeError) as error:
            classifier(wrong)
        one_sentence(
            error, f"input_ids is a {type(wrong).__name__}", "return_tensors='pt'"
        )


def test_targets_are_class_numbers(minilm):
    for targets, said in (
        (["bad", "good"], "targets holds 'bad'"),
        (np.array(["bad", "good"]), "targets holds 'bad'"),
        ([0, None], "targets holds None"),
    ):
        with pytest.raises(TypeError) as error:
            tokenized_loader(["a", "b"], targets, minilm[1])
        one_sentence(error, said, "allowed are class numbers", "encode_labels")
    ((_, target),) = tokenized_loader(
        ["a", "b"], pd.Series([1, 0], index=[5, 6]), minilm[1]
    )
    assert target.tolist() == [1, 0]
    for name, wrong in (
        ("max_length", 0),
        ("max_length", -5),
        ("max_length", 2.0),
        ("batch_size", 1.5),
        ("batch_size", True),
    ):
        with pytest.raises(ValueError) as error:
            tokenized_loader(["a", "b"], None, minilm[1], **{name: wrong})
        one_sentence(error, f"{name} is {wrong!r}; allowed is an integer of at least 1")
    with pytest.raises(TypeError) as error:
        TextClassifierModule(minilm[0], minilm[1], "ab")
    one_sentence(error, "labels is 'ab'", "allowed is a sequence of names")


def test_counts_of_rows_are_refused_or_kept():
    rows = frame({"good": 60, "bad": 40})
    for wrong in (0, -5, 2.5, True, "9"):
        for call, name in (
            (lambda: split_texts(rows, max_rows=wrong), "max_rows"),
            (lambda: sample_rows(rows, wrong), "count"),
        ):
            with pytest.raises(ValueError) as error:
                call()
            one_sentence(error, f"{name} is {wrong!r}; allowed")
    split = split_texts(rows, max_rows=4)  # as documented: three of each class are kept
    assert len(split.train) + len(split.valid) + len(
        split.test
    ) == 6 and "but three of each class" in inspect.getsource(split_texts)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    count=st.integers(1, 300),
    seed=st.integers(0, 3),
)
def test_a_sample_is_never_larger_than_asked_unless_classes_need_it(sizes, count, seed):
    rows = pd.DataFrame(
        [
            (f"{name} {number}", str(name))
            for name, size in enumerate(sizes)
            for number in range(size)
        ],
        columns=["text", "label"],
    )
    drawn = sample_rows(rows, count, seed)
    needed = sum(min(size, 3) for size in sizes)
    assert len(drawn) <= max(count, needed) and drawn.index.is_monotonic_increasing
    assert all(
        (drawn["label"] == str(name)).sum() >= min(size, 3)
        for name, size in enumerate(sizes)
        if len(rows) > count
    )


def test_training_refuses(minilm):
    batches = tokenized_loader(TEXTS, [1, 0] * 3, minilm[1], 4)
    for options, said in (
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": "3"}, "epochs is '3'"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"warmup": 2}, "warmup is 2"),
        ({"warmup": "0.1"}, "warmup is '0.1'"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": "x"}, "learning_rate is 'x'"),
        ({"layer_decay": 0}, "layer_decay is 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"keep": "best"}, "keep is 'best'"),
        ({"patience": 1}, "patience is 1"),
    ):
        with pytest.raises(ValueError) as error:
            finetune(tiny(minilm), batches, device="cpu", **options)
        one_sentence(error, said, "allowed")
    vectors = torch.randn(6, 4)
    with pytest.raises(ValueError) as error:
        fit_linear_probe(
            vectors,
            torch.tensor([0, 0, 0, 2, 2, 2]),
            vectors,
            torch.tensor([0, 1, 2] * 2),
        )
    one_sentence(error, "targets holds the classes 0, 2", "each of 0, 1, 2")


def test_training_refuses_what_is_frozen(minilm):
    classifier = tiny(minilm).requires_grad_(False)
    with pytest.raises(ValueError) as error:
        parameter_groups(classifier)
    one_sentence(error, "nothing to train", "allowed")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vectors": torch.ones(4)}, "vectors and targets have the shapes (4,)"),
        ({"targets": torch.tensor([0, 1])}, "vectors and targets have the shapes"),
        ({"vectors": torch.full((4, 3), math.nan)}, "vectors holds other than numbers"),
        ({"valid_vectors": torch.ones(4, 2)}, "valid_vectors are 2 wide"),
        ({"valid_vectors": torch.ones(0, 3)}, "valid_vectors and valid_targets have"),
        ({"targets": torch.zeros(4).long()}, "holds the classes 0;"),
        ({"targets": torch.tensor([-1, 0, 1, 0])}, "holds the classes -1, 0, 1"),
        ({"penalties": ()}, "penalties is empty"),
        ({"penalties": (1.0, -1.0)}, "penalties is -1.0"),
    ],
)
def test_a_probe_refuses(change, words):
    rows, classes = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1])
    given = {"vectors": rows, "targets": classes}
    given |= {"valid_vectors": rows, "valid_targets": classes}
    with pytest.raises(ValueError) as error:
        fit_linear_probe(**given | change)
    one_sentence(error, words, "allowed")


def test_a_probe_of_other_vectors_or_classes_is_not_loaded(minilm):
    classifier = tiny(minilm)
    width, before = classifier.head.in_features, classifier.head.weight.clone()
    for classes, wide in ((2, width + 1), (3, width)):
        vectors = np.random.default_rng(0).normal(size=(30, wide))
        fitted = LogisticRegression().fit(vectors, np.arange(30) % classes)
        with pytest.raises(ValueError) as error:
            load_probe(classifier, fitted)
        one_sentence(error, f"regression has {classes} classes", "allowed")
    assert (classifier.head.weight == before).all()


def test_tables_of_texts_are_checked():
    rows = frame({"a": 20, "b": 20})
    for asked, words, kind in (
        ((rows[["text"]],), "rows has no column 'label'", ValueError),
        ((rows[:0],), "rows has no row", ValueError),
        (
            (rows.assign(label=[None, *rows["label"][1:]]),),
            "no label in row 0",
            ValueError,
        ),
        ((rows.to_dict(),), "rows is a dict", TypeError),
        ((rows, rows[["label"]]), "test has no column 'text'", ValueError),
        ((rows, rows[:0]), "test has no row", ValueError),
        ((rows, rows), "test repeats every text", ValueError),
    ):
        with pytest.raises(kind) as error:
            split_texts(*asked)
        one_sentence(error, words)
    with pytest.raises(ValueError) as error:
        sample_rows(rows, 3, at_least=0)
    one_sentence(error, "at_least is 0", "allowed")


def test_the_baseline_takes_texts_without_a_word():
    rows = frame({"a": 30, "b": 30})
    signs = {"a": ("+", "*"), "b": ("=", "#")}
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(signs[each], 9)) for each in rows["label"]]
    split = split_texts(rows.assign(text=texts))
    found = tfidf_baseline(split)
    assert found[0].analyzer == "char_wb"
    assert (found.predict(split.test["text"]) == split.test["target"]).mean() > 0.9


@pytest.mark.parametrize(
    "damage", ["json", "keys", "names", "head", "no head", "one name"]
)
def test_a_damaged_folder_is_told(tmp_path, minilm, damage):
    tiny(minilm).save_pretrained(tmp_path / "model")
    facts, head = (
        tmp_path / "model" / name for name in ("classifier.json", "head.safetensors")
    )
    kept = json.loads(facts.read_text())
    texts = {
        "json": "{",
        "keys": "{}",
        "names": json.dumps(kept | {"labels": ["a", "b", "c"]}),
        "one name": json.dumps(kept | {"labels": "yes"}),
    }
    if damage in texts:
        facts.write_text(texts[damage])
    elif damage == "head":
        head.write_bytes(b"no tensors")
    else:
        head.unlink()
    with pytest.raises(ValueError) as error:
        TextClassifierModule.from_pretrained(tmp_path / "model")
    one_sentence(error, "cannot be read", "allowed is what save_pretrained wrote")


def test_the_rate_rises_from_its_first_share():
    assert (
        warmup_linear(0, 100, 0.1) == pytest.approx(0.1)
        and "1 / rise" in warmup_linear.__doc__
    )


def test_token_facts_tell_foreign_texts(minilm):
    english = describe_tokens(
        ["The parcel came two days late and the box was open."] * 3, minilm[1]
    )
    german = describe_tokens(
        ["Die Verpackungsbeilage war hervorragend übersetzt, vielen herzlichen Dank."],
        minilm[1],
    )
    chinese = describe_tokens(
        ["这家酒店的房间很干净，服务态度也很好，早餐丰富。"], minilm[1]
    )
    assert english["tokens per word"] < 1.3 and english["unknown tokens"] == 0
    assert (
        german["tokens per word"] > 1.5
        and chinese["unknown tokens"] > 0.2
        and chinese["tokens per word"] < 1.3
    )
    assert (
        describe_tokens(["!!!", ""], minilm[1])["words"] == 0
    )  # no word: no rate, and no division by zero


def test_a_tokenizer_without_a_word_for_unknown_ones(minilm):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=minilm[1].backend_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert describe_tokens(["good"], bare)["unknown tokens"] == 0


def expect_classifier(m):
    assert m["accuracy_majority"]["high"] < m["accuracy_tfidf"]["low"], (
        "counting words beats the most frequent class"
    )
    assert m["gain_of_frozen_over_tfidf"]["low"] > 0, (
        "a probe of the frozen encoder beats counting words"
    )
    assert m["gain_over_tfidf"]["low"] > 0, "so does fine-tuning"
    assert m["gain_over_frozen"]["value"] > 0, (
        "fine-tuning is not behind the frozen encoder"
    )
    assert m["accuracy_fine_tuned"]["value"] > 0.84, (
        "and is right about ordinary reviews"
    )
    start = m["loss_before_the_first_step"]
    assert start["loss of the probe"] < start["loss of a random head"] and (
        start["loss of the probe"] < start["loss of the uniform prediction, log K"]
    ), "a head that is fitted first starts lower than a random one"
    assert m["overfits"], "the validation loss rises while the training loss falls"
    assert (
        max(each["value"] for each in m["accuracy_on_hard_part"].values())
        < m["accuracy_tfidf"]["low"]
    ), "the hard part is hard for all"
    assert m["gains_on_hard_part"]["fine-tuned over TF-IDF"]["low"] < 0, (
        "there no gain is shown"
    )
    assert (
        m["accuracy_at_100_times_the_rate"]["high"]
        < m["accuracy_before_the_first_step"]["low"]
    ), "a learning rate too high destroys what was learnt"
    assert max(m["largest_differences"].values()) < 1e-4, (
        "the libraries compute the same"
    )
    assert m["reloaded_difference"] < 1e-5, "a saved model answers as before"
    later = m["last_epoch_over_early_stopping"]["loss"]
    assert later["low"] > 0, "to stop early would have given a lower log loss"
    old, forgotten = m["same_topic"], m["forgotten"]
    worst = "100 times the learning rate"
    assert forgotten[worst]["high"] < -0.1, "steps too long destroy the old task"
    assert old[worst]["high"] < old["fine-tuned"]["low"], "more than fine-tuning does"
