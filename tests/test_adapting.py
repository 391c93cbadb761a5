"""Chapter 5: fine-tuning. A tiny random encoder stands in for the pretrained one wherever size does not matter."""
import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from bigmodel_nb.adapting import finetune as module
from bigmodel_nb.adapting.finetune import (MINILM, SentenceEncoder, TextClassifier, bootstrap, confused_pairs, confusion, finetune, fit_head, load_encoder,
                                           macro_f1, mean_pool, parameter_groups, rows_within, sample_rows, set_head, split_texts, tfidf_baseline,
                                           tokenized_loader, warmup_linear)
from bigmodel_nb.training.loop import predict

TEXTS = ["fine", "not fine at all", "a much longer text that says rather little about anything", "good", "bad , very bad", "it works every day"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def minilm():
    return load_encoder()


def tiny(minilm, labels=("no", "yes"), seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=minilm[1].vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return TextClassifier(BertModel(config), minilm[1], labels, max_length=32).eval()


def same_answers(first, second):
    return first["label"].equals(second["label"]) and np.allclose(first["probability"], second["probability"], atol=1e-6)


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# the encoder

def test_load_encoder_is_the_published_one(minilm):
    encoder, tokenizer = minilm
    assert not encoder.training and sum(p.numel() for p in encoder.parameters()) == 22_713_216
    vectors = SentenceEncoder(encoder, tokenizer).encode(["A cat sits outside", "A feline is outdoors", "The stock market fell"])
    unit = F.normalize(vectors)
    assert unit[0] @ unit[1] > 0.5 > 0.2 > unit[0] @ unit[2]


def test_load_encoder_checks_the_weights(monkeypatch):
    monkeypatch.setattr(module, "_MINILM_SHA256", "0" * 64)
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
        outputs.append(SentenceEncoder(encoder, tokenizer).encode(TEXTS))
    assert torch.allclose(*outputs, atol=1e-5)


# pooling and batches

@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_mean_pool_leaves_padding_out(lengths, seed):
    hidden = torch.randn(len(lengths), 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    wanted = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths)])
    assert torch.allclose(mean_pool(hidden, mask), wanted)
    assert torch.allclose(mean_pool(hidden + 1e6 * (1 - mask).unsqueeze(-1), mask), wanted)


def test_loader_keeps_the_order_and_pads_each_batch(minilm):
    loader = tokenized_loader(TEXTS, [0, 1, 0, 1, 0, 1], minilm[1], batch_size=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 3 and torch.cat([target for _, target in batches]).tolist() == [0, 1, 0, 1, 0, 1]
    for input, _ in batches:
        assert set(input) == {"input_ids", "attention_mask"} and input["attention_mask"].sum(1).max() == input["input_ids"].shape[1]
    assert minilm[1].decode(batches[0][0]["input_ids"][0], skip_special_tokens=True) == "fine"
    cut = next(iter(tokenized_loader(TEXTS, None, minilm[1], 6, max_length=5)))
    assert cut[0]["input_ids"].shape == (6, 5) and cut[1].tolist() == [0] * 6


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.integers(1, 25), min_size=1, max_size=60), size=st.integers(1, 8), seed=st.integers(0, 3))
def test_shuffled_loader_sees_every_row_once(minilm, words, size, seed):
    texts, numbers = ["word " * count for count in words], torch.arange(len(words))
    loaders = [tokenized_loader(texts, numbers, minilm[1], size, shuffle=True, seed=seed) for _ in range(2)]
    epochs = [[target.tolist() for _, target in loaders[0]] for _ in range(2)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == numbers.tolist() and len(epoch) == len(loaders[0]) == math.ceil(len(words) / size)
    assert epochs[0] == [target.tolist() for _, target in loaders[1]]


def test_length_batches_waste_less_padding_and_change_each_epoch(minilm):
    texts = ["word " * (1 + 7 * number % 30) for number in range(200)]
    padding = {shuffle: sum((input["attention_mask"] == 0).sum().item() for input, _ in tokenized_loader(texts, None, minilm[1], 10, shuffle)) for shuffle in (False, True)}
    assert padding[True] < padding[False] / 3
    loader = tokenized_loader(texts, range(200), minilm[1], 10, shuffle=True)
    assert [t.tolist() for _, t in loader] != [t.tolist() for _, t in loader]


def test_loader_refuses(minilm):
    for texts, targets, words in ((["a"], [0, 1], "texts has 1 entries and targets 2"), ([], [], "at least one text")):
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
    assert together.shape == (6, 16) and torch.allclose(together, alone, atol=1e-6) and not together.requires_grad


def test_forward_takes_embeddings(minilm):
    classifier = tiny(minilm)
    input, _ = next(iter(tokenized_loader(TEXTS, None, minilm[1], 6)))
    embeddings = classifier.encoder.get_input_embeddings()(input["input_ids"])
    logits = classifier(**input)
    assert logits.shape == (6, 2) and logits.dtype == torch.float32
    assert torch.equal(classifier(inputs_embeds=embeddings, attention_mask=input["attention_mask"]), logits)
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
    assert found["text"].tolist() == TEXTS and found["label"].tolist() == ["abc"[index] for index in logits.argmax(1)]
    assert np.allclose(found["probability"], logits.softmax(1).max(1).values, atol=1e-6)


def test_classifier_refuses_labels(minilm):
    for labels in (["one"], ["a", "a"], []):
        with pytest.raises(ValueError) as error:
            TextClassifier(minilm[0], minilm[1], labels)
        one_sentence(error, f"labels is {labels}")


def test_saved_and_loaded(tmp_path, minilm):
    classifier = tiny(minilm, labels=("größe", "b"))
    folder = tmp_path / "deep" / "model"
    classifier.save_pretrained(folder)
    again = TextClassifier.from_pretrained(folder)
    assert again.labels == ["größe", "b"] and again.max_length == 32 and not again.training
    assert same_answers(again.predict(TEXTS), classifier.predict(TEXTS))
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".txt"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    tiny(minilm, labels=("x", "y", "z"), seed=1).save_pretrained(folder)  # replaces
    assert TextClassifier.from_pretrained(folder).labels == ["x", "y", "z"]


def test_saving_never_replaces_what_is_no_classifier(tmp_path, minilm):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError) as error:
            tiny(minilm).save_pretrained(folder)
        one_sentence(error, "holds something else")
    with pytest.raises(FileNotFoundError) as error:
        TextClassifier.from_pretrained(tmp_path)
    one_sentence(error, "there is no classifier in it")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_old_one(tmp_path, minilm, monkeypatch):
    classifier = tiny(minilm)
    classifier.save_pretrained(tmp_path / "model")
    before = classifier.predict(TEXTS)
    broken = tiny(minilm, seed=1)
    monkeypatch.setattr(broken.tokenizer.__class__, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        broken.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same_answers(TextClassifier.from_pretrained(tmp_path / "model").predict(TEXTS), before)


# head, groups, schedule, training

@pytest.mark.parametrize("classes", [2, 3, 7])
def test_head_says_what_the_regression_says(minilm, classes):
    generator = torch.Generator().manual_seed(classes)
    vectors, targets = torch.randn(140, 16, generator=generator), torch.arange(140) % classes
    regression = fit_head(vectors, targets, vectors[:30], targets[:30])
    classifier = tiny(minilm, labels=[str(number) for number in range(classes)])
    set_head(classifier, regression)
    with torch.no_grad():
        probability = classifier.head(vectors).softmax(1)
    assert np.allclose(probability, regression.predict_proba(vectors.numpy()), atol=1e-5)


def test_fit_head_chooses_by_validation():
    generator = torch.Generator().manual_seed(0)
    vectors, coin = torch.randn(40, 16, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    assert fit_head(vectors, coin, torch.randn(200, 16, generator=generator), torch.arange(200) % 2, (1e-4, 100.0)).C == 1e-4
    assert fit_head(vectors, coin, vectors, coin, (1e-4, 100.0)).C == 100.0


def test_parameter_groups_hold_each_parameter_once(minilm):
    classifier = tiny(minilm)
    groups = parameter_groups(classifier, 1e-3, layer_decay=0.5, head_factor=2.0, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, classifier.parameters()))
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    encoder = classifier.encoder
    assert rate[id(classifier.head.weight)] == 2e-3
    assert [rate[id(layer.output.dense.weight)] for layer in encoder.encoder.layer] == [5e-4, 1e-3]
    assert rate[id(encoder.embeddings.word_embeddings.weight)] == 2.5e-4
    assert decay[id(encoder.encoder.layer[0].output.dense.weight)] == 0.1
    assert decay[id(encoder.encoder.layer[0].output.dense.bias)] == decay[id(encoder.embeddings.LayerNorm.weight)] == 0


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_warmup_linear_rises_and_falls(steps, warmup):
    rates = [warmup_linear(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert max(rates) == pytest.approx(1.0) and min(rates) > 0 and warmup_linear(steps, steps, warmup) in (0.0, 1.0)
    assert all(a < b for a, b in zip(rates[: rise - 1], rates[1:rise])) and all(a >= b for a, b in zip(rates[rise:], rates[rise + 1 :]))


def colours(rows=48, seed=0):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, rows)
    return [f"{generator.choice(['the', 'a', 'one'])} {['red', 'blue'][target]} {generator.choice(['car', 'hat', 'door'])}" for target in targets], torch.from_numpy(targets)


def test_finetune_learns_and_repeats_bit_for_bit(minilm):
    texts, targets = colours()
    trained = []
    for _ in range(2):
        classifier = tiny(minilm, dropout=0.1)
        torch.manual_seed(5)
        history = finetune(classifier, tokenized_loader(texts, targets, minilm[1], 8, True), epochs=6, learning_rate=5e-3, layer_decay=1.0)
        trained.append(classifier.cpu())
    assert not classifier.training and history.frame["train_loss"].iloc[-1] < 0.1
    answers = classifier.predict(texts)["label"]
    assert (answers == [["no", "yes"][target] for target in targets]).all()
    assert all(torch.equal(a, b) for a, b in zip(trained[0].state_dict().values(), trained[1].state_dict().values()))


def test_finetune_takes_an_objective(minilm):
    texts, targets = colours(16)
    calls = []

    def objective(model, input, target):
        calls.append(len(target))
        return F.cross_entropy(model(**input), target)

    finetune(tiny(minilm), tokenized_loader(texts, targets, minilm[1], 8), epochs=2, objective=objective, device="cpu")
    assert calls == [8, 8, 8, 8]


# rows

def frame(counts, seed=0):
    generator = np.random.default_rng(seed)
    rows = [(" ".join(generator.choice(["alpha", "beta", "gamma", "delta", "rho", "chi"], 6)) + f" {number} {name}", name)
            for name, count in counts.items() for number in range(count)]
    return pd.DataFrame(rows, columns=["text", "label"]).sample(frac=1, random_state=seed)


def test_split_texts_parts():
    rows = frame({"good": 60, "bad": 40})
    split = split_texts(rows, seed=1)
    assert split.labels == ["bad", "good"] and split.left_out == 0
    assert [len(part) for part in (split.train, split.valid, split.test)] == pytest.approx([60, 10, 30], abs=3)
    texts = [set(part["text"]) for part in (split.train, split.valid, split.test)]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2]) and set.union(*texts) == set(rows["text"])
    for part in (split.train, split.valid, split.test):
        assert [split.labels[target] for target in part["target"]] == part["label"].tolist()


def test_split_texts_keeps_copies_apart_from_the_test_rows():
    rows = pd.concat([frame({"good": 30, "bad": 30}), pd.DataFrame({"text": ["Same  text", "near copy of a longer text, number 1"] * 2, "label": ["good"] * 4})])
    test = pd.DataFrame({"text": ["same text", "something new", "something newer"], "label": ["good", "bad", "bad"]})
    split = split_texts(rows, test)
    assert "Same  text" not in [*split.train["text"], *split.valid["text"]] and len(split.test) == 3
    near = pd.DataFrame({"text": [f"this complaint was copied from a form, number {number % 5}{'!' * (number // 5)}" for number in range(30)], "label": "bad"})
    parts = split_texts(pd.concat([frame({"good": 30, "bad": 30}), near.assign(text=near["text"] + pd.Series(range(30)).astype(str).str[-1])]), seed=0)
    owners = [part["text"].str.startswith("this complaint").any() for part in (parts.train, parts.valid, parts.test)]
    assert sum(owners) == 1


def test_split_texts_limits_rows_and_keeps_rare_classes():
    rows = frame({"common": 400, "rare": 4})
    split = split_texts(rows, max_rows=100)
    assert 95 <= len(split.train) + len(split.valid) + len(split.test) <= 105 and split.left_out == 404 - len(split.train) - len(split.valid) - len(split.test)
    assert all("rare" in set(part["label"]) for part in (split.train, split.valid, split.test))


def test_split_texts_refuses():
    with pytest.raises(ValueError) as error:
        split_texts(frame({"a": 10, "b": 2}))
    one_sentence(error, "'b' (2)", "too few rows to split")
    with pytest.raises(ValueError) as error:
        split_texts(frame({"a": 10, "b": 10}), pd.DataFrame({"text": ["new"], "label": ["c"]}))
    one_sentence(error, "test has the label 'c', which data does not have", "a, b")


def test_sample_rows():
    rows = frame({"a": 80, "b": 20, "c": 2})
    drawn = sample_rows(rows, 50, seed=3)
    counts = drawn["label"].value_counts()
    assert counts["a"] == pytest.approx(39, abs=1) and counts["c"] == 2 and drawn.index.isin(rows.index).all()
    assert drawn.equals(sample_rows(rows, 50, seed=3)) and not drawn.equals(sample_rows(rows, 50, seed=4))
    assert sample_rows(rows, None) is rows and sample_rows(rows, 500) is rows


def test_rows_within(minilm):
    assert rows_within(["word"] * 10, minilm[1], tokens=300) == 100  # a word and two marks
    assert rows_within(["word " * 500] * 10, minilm[1], max_length=30, tokens=300) == 10


def test_tfidf_reads_words_and_unparted_scripts():
    rows = frame({"good": 60, "bad": 60}).assign(text=lambda rows: rows["text"] + rows["label"].map({"good": " works well", "bad": " broke soon"}))
    split = split_texts(rows)
    assert (tfidf_baseline(split).predict(split.test["text"]) == split.test["target"]).mean() > 0.95
    signs = frame({"good": 60, "bad": 60}).assign(text=lambda rows: [f"房间{number}{'很好' if name == 'good' else '太差'}了{number * 7}" for number, name in zip(range(120), rows["label"])])
    split = split_texts(signs)
    assert (tfidf_baseline(split).predict(split.test["text"]) == split.test["target"]).mean() > 0.9


# measures

@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_macro_f1_is_scikit_learns(rows):
    targets, found = np.array(rows).T
    counts = confusion(targets, found, 5)
    assert counts.sum() == len(rows) and counts[targets[0], found[0]] >= 1
    assert macro_f1(counts) == pytest.approx(f1_score(targets, found, average="macro"))
    assert macro_f1(np.stack([counts, counts])).shape == (2,)


def test_confusion_takes_booleans():
    assert confusion(np.array([True, True, False]), np.array([True, False, False]), 2).tolist() == [[1, 0], [1, 1]]


def test_bootstrap_covers_as_promised():
    share = lambda counts: counts[..., 0] / counts.sum(-1)
    found = bootstrap(share, np.array([60, 40]), draws=4000)
    half = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert found.value == 0.6 and found.low == pytest.approx(0.6 - half, abs=0.02) and found.high == pytest.approx(0.6 + half, abs=0.02)
    assert found == bootstrap(share, np.array([60, 40]), draws=4000) and str(found).startswith("60.0% [")
    sure = bootstrap(share, np.array([50, 0]))
    assert sure.low == sure.high == 1


def test_confused_pairs():
    counts = np.array([[5, 3, 0], [1, 7, 0], [0, 9, 1]])
    pairs = confused_pairs(counts, ["a", "b", "c"], limit=2)
    assert pairs.values.tolist() == [["c", "b", 9, 0.9], ["a", "b", 3, 0.375]]
    assert confused_pairs(np.diag([1, 2]), ["a", "b"]).empty
    json.dumps(pairs.to_dict("records"))


def test_frozen_model_is_left_as_it_was(minilm):
    encoder = minilm[0]
    before = copy.deepcopy(encoder.state_dict())
    SentenceEncoder(*minilm).encode(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values()))
