"""Write the datasheet of the reviews, bigmodel_nb/data/files/reviews.md, from the reviews themselves: `python tools/make_reviews.py`."""
from pathlib import Path

import pandas as pd

from bigmodel_nb.data.sources import near_duplicates, reviews

SHEET = Path(__file__).resolve().parent.parent / "bigmodel_nb" / "data" / "files" / "reviews.md"
TEXT = """# Datasheet: the reviews

`reviews.csv`, {count} short English reviews of products and services, each with a yes-or-no label. Read it with `bigmodel_nb.data.sources.reviews()`.

## What for

To teach and test text classifiers without a network and without anybody's private words. The set is small enough for two processor cores, and hard: a method that counts words stays far from a careful reader, and so does a small pretrained model.
It is no benchmark. A score on it says how a method does on these examples, not how it does on customers.

## How they were written

The reviews are examples written for this project. They were **not** collected from customers, shops or other data sets, and no template or word list filled them in. Each is a small situation of its own, written in one of five styles (below); some carry typing errors on purpose.
They were then read again with one question in mind: can the label be decided from the text? Those of which that was doubtful, and those that told another's story again, were rewritten.

## The label

One rule: **would this customer choose it again, on the whole?** 1 is yes, 0 is no. Nothing in between was written.

## Columns

| column | content |
|---|---|
| `id` | `r0001` and so on, without meaning |
| `text` | the review, ASCII characters only |
| `label` | 1: would choose it again; 0: would not |
| `domain` | what it is about, one of {domains} |
| `style` | `plain`: the judgement is said openly; `negation`: it hangs on a negation; `irony`: the words say the opposite, in either direction; `mixed`: good and bad are both named and one clause decides; `implied`: facts from which the judgement follows |
| `typos` | whether it carries typing errors on purpose |
| `split` | `train`, `valid` or `test` |

## Composition

{style}

{split}

{domain}

{typos} reviews carry typing errors. Half of the reviews have {median} words or fewer; nine in ten have between {few} and {many}; the longest has {longest}.

## Split

Fixed: six tenths to train on, one to choose settings, three to test, each with both labels equally often within every style. No two reviews are near copies: the most similar pair shares {closest:.0%} of its runs of five characters (near copies share 80 % or more). A test of the project checks balance and copies.

## Limits

- One house wrote all of it. Vocabulary, humour and taste in situations are less varied than among real customers, and a model may learn the house's habits; a score here may well fall on other reviews.
- The shares of styles and domains are chosen, not measured; real reviews hold less irony. Do not read them as facts about anything.
- Labels are the writers' own intention, checked by reading again. They were not annotated by independent people, so there is no agreement to report.
- The learning rates of the project's own classifier were tried with the test score in sight, so its score here leans to the good side.
- Written to be hard for word counts, so such methods look worse here than on most real data.
- English only, everyday matters only.
- {test} test rows: an accuracy near 75 % comes with an interval of about {width:.0f} points. Smaller differences need more data.

## Licence

Apache-2.0, like the rest of the project.
"""


def counts(frame: pd.DataFrame, column: str) -> str:
    """A table of the reviews of each value of `column`, most first."""
    lines = [f"| {name} | {len(part)} | {part['label'].sum()} | {(1 - part['label']).sum()} |"
             for name, part in sorted(frame.groupby(column), key=lambda pair: (-len(pair[1]), pair[0]))]
    return "\n".join([f"| {column} | reviews | label 1 | label 0 |", "|---|---|---|---|", *lines])


def datasheet() -> str:
    """The text of the datasheet, all numbers counted."""
    frame = reviews()
    words, test = frame["text"].str.split().str.len(), int((frame["split"] == "test").sum())
    few, median, many = words.quantile([0.05, 0.5, 0.95]).astype(int)
    return TEXT.format(count=len(frame), domains=frame["domain"].nunique(), typos=frame["typos"].sum(), few=few, median=median, many=many, longest=words.max(),
                       closest=near_duplicates(frame["text"], 0.05)[0][2], test=test, width=2 * 196 * (0.75 * 0.25 / test) ** 0.5,
                       **{column: counts(frame, column) for column in ("style", "split", "domain")})


if __name__ == "__main__":
    SHEET.write_text(datasheet(), encoding="utf-8")
