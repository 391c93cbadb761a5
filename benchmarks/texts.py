"""What the bundled texts teach: the order of methods, and what pretraining saves.

The order is that on the ordinary reviews, the saving that on the messages to a customer
service. `python benchmarks/texts.py` trains at the quick budget of adapting/classifier
with five seeds, which draw the training rows, the order of batches and the dropout.
Each method reads the same test rows; a gain is averaged over the seeds row by row, and
its interval is that of the mean over rows. On the messages, counting words and a probe
of frozen MiniLM learn from ten messages an intent. Exit code 1 where an expectation is
missed.
"""

import sys
import warnings

import numpy as np
import torch

from bigmodel_nb.adapting.classifier import (
    TextClassifierModule,
    TextSplit,
    finetune,
    fit_linear_probe,
    load_probe,
    rows_for_token_budget,
    split_texts,
    tfidf_baseline,
)
from bigmodel_nb.adapting.features import load_encoder, tokenized_loader
from bigmodel_nb.data.sources import encode_labels, reviews, support, text_rows
from bigmodel_nb.kit.core import seed_everything

SEEDS = range(5)


def numbers(part) -> torch.Tensor:
    return torch.from_numpy(part["target"].to_numpy(copy=True))


def reviewed(seed: int) -> dict[str, np.ndarray]:
    """For each method which test reviews it reads rightly, at the quick budget."""
    written = reviews()
    rows, is_test = text_rows(written), written["split"] == "test"
    encoder, tokenizer = load_encoder()
    limit = int(
        rows_for_token_budget(
            rows.loc[~is_test, "text"].sample(frac=1, random_state=seed), tokenizer
        )
        / 0.88
    )
    split = split_texts(
        rows.loc[~is_test].sample(limit, random_state=seed), rows[is_test], None, seed
    )
    expected = split.test["target"].to_numpy()
    texts = {
        name: getattr(split, name)["text"].tolist()
        for name in ("train", "valid", "test")
    }
    classifier = TextClassifierModule(encoder, tokenizer, split.labels)
    vectors = {
        name: classifier.encode(each, layers="all") for name, each in texts.items()
    }
    train, valid = numbers(split.train), numbers(split.valid)
    probe = fit_linear_probe(
        vectors["train"].flatten(1), train, vectors["valid"].flatten(1), valid
    )
    load_probe(
        classifier,
        fit_linear_probe(
            vectors["train"][:, -1], train, vectors["valid"][:, -1], valid
        ),
    )
    found = {
        "majority": np.full(len(expected), split.train["target"].mode()[0]),
        "counting words": tfidf_baseline(split).predict(texts["test"]),
        "MiniLM, frozen": probe.predict(vectors["test"].flatten(1).numpy()),
    }
    seed_everything(seed)
    finetune(
        classifier, tokenized_loader(texts["train"], train, tokenizer, 16, True, seed)
    )
    found["MiniLM, fine-tuned"] = (
        classifier.predict(texts["test"])["label"].map(split.labels.index).to_numpy()
    )
    return {name: each == expected for name, each in found.items()}


def messaged(seed: int, vectors: torch.Tensor, messages) -> dict[str, float]:
    """Accuracy after ten training messages an intent."""
    targets, names = encode_labels(messages["intent"])
    drawn = messages.assign(target=targets.numpy(), label=messages["intent"])
    part = lambda name, count: (
        drawn[drawn["split"] == name].groupby("intent").sample(count, random_state=seed)
    )
    train = part("train", 10)
    valid = part("valid", 3)
    test = drawn[drawn["split"] == "test"]
    counted = tfidf_baseline(TextSplit(train, valid, test, names, 0)).predict(
        test["text"]
    )
    rows = lambda part: vectors[torch.from_numpy(part.index.to_numpy(copy=True))]
    probe = fit_linear_probe(rows(train), numbers(train), rows(valid), numbers(valid))
    return {
        "counting words": (counted == test["target"]).mean(),
        "MiniLM, frozen": (probe.predict(rows(test).numpy()) == test["target"]).mean(),
    }


def main() -> int:
    warnings.simplefilter("ignore")
    missed = 0
    right = [reviewed(seed) for seed in SEEDS]
    methods = list(right[0])
    for name in methods:
        scores = [run[name].mean() for run in right]
        print(
            f"{name:20} {np.mean(scores):.1%}"
            f"  seeds {min(scores):.1%} to {max(scores):.1%}",
            flush=True,
        )
    for low, high in zip(methods, methods[1:]):
        gain = np.mean([run[high].astype(float) - run[low] for run in right], axis=0)
        half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
        missed += gain.mean() - half <= 0
        print(
            f"{high} over {low}: {100 * gain.mean():+.1f} points"
            f" [{100 * (gain.mean() - half):+.1f}, {100 * (gain.mean() + half):+.1f}]"
        )
    missed += np.mean([run["MiniLM, fine-tuned"].mean() for run in right]) < 0.86
    messages = support()
    encoder, tokenizer = load_encoder()
    vectors = TextClassifierModule(encoder, tokenizer, ["0", "1"]).encode(
        messages["text"].tolist()
    )
    scores = [messaged(seed, vectors, messages) for seed in SEEDS]
    gains = [100 * (each["MiniLM, frozen"] - each["counting words"]) for each in scores]
    counting, frozen = (
        np.mean([each[name] for each in scores])
        for name in ("counting words", "MiniLM, frozen")
    )
    print(
        f"support, ten messages an intent: counting words {counting:.1%},"
        f" frozen MiniLM {frozen:.1%};"
        f" gains {min(gains):.1f} to {max(gains):.1f} points"
    )
    missed += np.mean(gains) < 10
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
