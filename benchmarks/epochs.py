"""Which epoch of fine-tuning to keep: the last, or the one that validates best.

Best is by loss or by accuracy. `python benchmarks/epochs.py` fine-tunes at the quick
budget of adapting/classifier with five seeds. The rules are judged on reviews that are
drawn for nothing else: rows of the training part that the budget leaves out, never the
test rows. Exit code 1 where a rule that chooses by validation rows is better than the
last epoch, or the loss of the judging rows does not rise while their accuracy does.
"""

import sys
import warnings

import torch

from bigmodel_nb.adapting.classifier import (
    TextClassifierModule,
    finetune,
    fit_linear_probe,
    load_probe,
    rows_for_token_budget,
    split_texts,
)
from bigmodel_nb.adapting.features import load_encoder, tokenized_loader
from bigmodel_nb.data.sources import reviews, text_rows
from bigmodel_nb.kit.core import Difference, seed_everything
from bigmodel_nb.training.loop import evaluate

RULES = {
    "last epoch": lambda epochs: epochs[-1],
    "lowest validation loss": lambda epochs: min(
        epochs, key=lambda each: each["valid"].loss
    ),
    "highest validation accuracy": lambda epochs: max(
        epochs, key=lambda each: each["valid"].accuracy.value
    ),
}


def trained(seed: int) -> list[dict]:
    """Validation and judging rows after each epoch."""
    written = reviews()
    rows = text_rows(written)[written["split"] != "test"].sample(
        frac=1, random_state=seed
    )
    encoder, tokenizer = load_encoder()
    limit = int(rows_for_token_budget(rows["text"], tokenizer) / 0.88)
    split = split_texts(rows.iloc[:limit], rows.iloc[limit:], None, seed)
    parts = {
        "train": split.train,
        "valid": split.valid,
        "judge": split.test.sample(500, random_state=0),
    }
    texts = {name: part["text"].tolist() for name, part in parts.items()}
    targets = {
        name: torch.from_numpy(part["target"].to_numpy(copy=True))
        for name, part in parts.items()
    }
    classifier, epochs = TextClassifierModule(encoder, tokenizer, split.labels), []
    vectors = {name: classifier.encode(texts[name]) for name in ("train", "valid")}
    load_probe(
        classifier,
        fit_linear_probe(
            vectors["train"], targets["train"], vectors["valid"], targets["valid"]
        ),
    )

    class Watch:
        def on_epoch_end(self, history):
            found = {
                name: evaluate(
                    classifier,
                    tokenized_loader(texts[name], targets[name], tokenizer, 64),
                )
                for name in ("valid", "judge")
            }
            classifier.train()
            epochs.append(found)

    seed_everything(seed)
    finetune(
        classifier,
        tokenized_loader(texts["train"], targets["train"], tokenizer, 16, True, seed),
        callbacks=[Watch()],
    )
    return epochs


def main() -> int:
    warnings.simplefilter("ignore")
    runs = [trained(seed) for seed in range(5)]
    for number in range(len(runs[0])):
        judged = [run[number]["judge"] for run in runs]
        print(
            f"epoch {number + 1}: judging rows, means of five seeds:"
            f" loss {sum(each.loss for each in judged) / 5:.3f},"
            f" accuracy {sum(each.accuracy.value for each in judged) / 5:.1%}"
        )
    kept = {
        name: [rule(run)["judge"].accuracy.value for run in runs]
        for name, rule in RULES.items()
    }
    gains = {
        name: Difference.of_runs(kept["last epoch"], scores)
        for name, scores in kept.items()
        if name != "last epoch"
    }
    for name, gain in gains.items():
        print(f"{name} against the last epoch, over seeds: {gain}")
    rises = [
        sum(run[-1]["judge"].loss - run[0]["judge"].loss for run in runs),
        sum(
            run[-1]["judge"].accuracy.value - run[0]["judge"].accuracy.value
            for run in runs
        ),
    ]
    return int(any(gain.low > 0 for gain in gains.values()) or min(rises) <= 0)


if __name__ == "__main__":
    sys.exit(main())
