"""Attacks on sentences from film reviews (SST-2), read by the first layer of MiniLM."""

import math

import pandas as pd
import torch

from bigmodel_nb.adapting.classifier import (
    TextClassifierModule,
    fit_linear_probe,
    load_probe,
)
from bigmodel_nb.adapting.features import (
    SentenceEncoder,
    load_encoder,
    tokenized_loader,
)
from bigmodel_nb.robust.attacks import PGD
from bigmodel_nb.robust.text import Typos, embedding_curve, negations, success_rate


def sst2(folder, part, count):
    rows = pd.read_csv(
        folder / "sst2" / f"{part}.tsv",
        sep="\t",
        header=None,
        names=["text", "label"],
        quoting=3,
    )
    rows = rows[rows["text"].str.split().str.len().between(6, 20)].sample(
        count, random_state=0
    )
    return rows["text"].tolist(), torch.tensor(rows["label"].to_numpy())


def test_a_reader_of_film_reviews_falls_in_embeddings_and_to_typos(real_data):
    (texts, targets), (held, truth) = (
        sst2(real_data, "train", 700),
        sst2(real_data, "dev", 48),
    )
    encoder, tokenizer = load_encoder()
    encoder.encoder.layer = encoder.encoder.layer[:1]
    reader = TextClassifierModule(
        encoder, tokenizer, ["negative", "positive"], 32
    ).eval()
    vectors = SentenceEncoder.encode(reader, texts)
    load_probe(
        reader,
        fit_linear_probe(vectors[:600], targets[:600], vectors[600:], targets[600:]),
    )
    batches = tokenized_loader(held, truth, tokenizer, 48)
    attack = PGD(
        0.02,
        norm="l2",
        steps=3,
        loss="margin",
        bounds=(-math.inf, math.inf),
        early_stop=True,
    )
    curve = embedding_curve(reader, batches, attack, [0.0, 0.05, 0.2])
    assert (
        curve["accuracy"][0] > 0.65
        and curve["accuracy"][2] < 0.5 * curve["accuracy"][0]
    )
    found = Typos(words=2)(reader, held[:24], truth[:24])
    assert success_rate(found).low > 0.1 and (found["changed"] <= 2).all()
    assert all(
        negations(old) == negations(new)
        for old, new in zip(found["text"], found["attacked"])
    )
