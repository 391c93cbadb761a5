"""Write the bundled texts and their datasheets from what was written and labelled.

`python tools/make_texts.py FOLDER` reads reviews.jsonl, messages.jsonl, faq.jsonl,
unanswered.jsonl and headlines.jsonl (those that are there) and writes tables with ids
and a fixed split, the counts of agreement, and the datasheets. Without FOLDER it writes
the datasheets anew from the tables. Every number in a datasheet is counted from the
files.

A row whose two labels differ is left out, unless it carries `decided`, the label that
was agreed on afterwards.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from bigmodel_nb.data.sources import (
    encode_labels,
    near_duplicate_groups,
    near_duplicates,
    split_indices,
)
from bigmodel_nb.kit.core import Proportion

FILES = Path(__file__).resolve().parent.parent / "bigmodel_nb" / "data" / "files"
SHEETS = Path(__file__).resolve().parent / "datasheets"
LABELS = {"reviews": "label", "messages": "intent", "headlines": "sentiment"}
SPLIT = {"train": 0.6, "valid": 0.1, "test": 0.3}
NEAR = 0.8  # Jaccard similarity from which two texts are near copies
# What the ordinary reviews are about, and the narrower names that writers gave it.
DOMAINS = {
    "app": "app; banking app; fitness app; map app; phone app; running app",
    "audio": "earbuds; gaming headset; headphones; smart speaker; sound bar; speaker",
    "baby things": "baby food; car seats; prams",
    "bakery": "bakery",
    "bank": "bank",
    "books": "audiobooks; books",
    "cafe": "cafe; tea room",
    "camera": "baby camera; camera; dash camera; doorbell camera; instant camera;"
    " web camera; wildlife camera",
    "car hire": "car hire; van hire",
    "car repair": "car repair; garage",
    "cinema & films": "cinema; films",
    "cleaning": "cleaning; cleaning firm; dry cleaner; laundry; window cleaner",
    "clothes": "clothes; coat; jeans; school uniform; underwear",
    "computer": "gaming keyboard; gaming mouse; keyboard; label printer; laptop; mouse;"
    " photo printer; printer",
    "concert & theatre": "concert; open air theatre; opera; theatre; ticket agency",
    "cosmetics": "cosmetics; shampoo; sun cream",
    "course": "course; driving lessons; driving school; online course; riding school;"
    " swimming lessons",
    "crafts & stationery": "craft supplies; sewing; stationery",
    "electronics": "car charger; charging cable; charging stand; electronics;"
    " phone charger; power bank",
    "flight": "flight",
    "food & drink": "beer; beer & cider; coffee; food; tea; wine",
    "food delivery": "food delivery; meal delivery; take-away",
    "furniture": "furniture; lamp; mattress; shelf; sofa",
    "garden": "garden; garden centre; garden things; garden tools; plants",
    "groceries": "butcher; convenience store; deli; farm shop; greengrocer; groceries;"
    " grocery delivery; supermarket",
    "gym": "climbing hall; gym",
    "hairdresser": "barber; hairdresser; nail salon",
    "health": "dentist; glasses; optician; over-the-counter medicine; physiotherapist",
    "holiday stay": "campsite; holiday flat",
    "home textiles": "bed linen; curtains",
    "hotel": "guest house; hostel; hotel; youth hostel",
    "household appliances": "fans; heaters; vacuum cleaner; washing machine",
    "insurance": "insurance",
    "kitchen": "kettle & toaster; kitchen things; pan",
    "letting agent": "letting agent",
    "library": "library",
    "moving company": "moving company; removals",
    "museum & outings": "bowling alley; museum; spa; swimming pool; zoo",
    "musical instruments": "musical instruments",
    "parcel service": "parcel service",
    "pets": "kennels; pet food; pet things; vet",
    "phone & tablet": "mobile phone; smart watch; tablet",
    "restaurant": "restaurant",
    "shoes & bags": "bag; shoes",
    "shop & other services": "bicycle workshop; nursery; photographer; shop",
    "software": "accounting program; antivirus program; backup program;"
    " calendar program; computer program; design program; drawing program;"
    " invoice program; layout program; music program; password program; photo program;"
    " security program; tax program; video program; writing program",
    "sports gear": "bicycles; camping gear; scooters; sports; sports gear",
    "streaming": "streaming; streaming service",
    "taxi": "airport transfer; taxi; taxi app",
    "telecoms & energy": "energy supplier; internet provider; mobile network;"
    " phone company",
    "television": "television",
    "tools & paint": "paint; tools; tools & paint",
    "toys & games": "board games; toys",
    "tradesman": "bathroom fitter; builder; carpenter; carpet fitter; decorator;"
    " electrician; fencing contractor; gardener; handyman; heating engineer; joiner;"
    " locksmith; painter; painter & decorator; plasterer; plumber; roofer; tiler;"
    " window fitter",
    "train & coach": "coach; ferry; train",
    "video game": "video game",
}
BROAD = {
    narrow: broad for broad, names in DOMAINS.items() for narrow in names.split("; ")
}


def read_lines(path: Path) -> pd.DataFrame:
    """Rows of a file with a JSON object a line."""
    return pd.DataFrame(
        [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
    )


def read(folder: Path, name: str) -> pd.DataFrame:
    """A table that was written here."""
    return pd.read_csv(folder / name, keep_default_na=False)


def agreed(rows: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with the label that holds, and how many rows each pair of labels had.

    A pair is counted with the label that was agreed on ("": the row is left out).
    """
    label = LABELS[name]
    second = f"second_{label}"
    given, again = rows[label].astype(str), rows[second].astype(str)
    decided = (
        rows["decided"].map(
            lambda each: (
                ""
                if pd.isna(each)
                else f"{each:g}"
                if isinstance(each, float)
                else str(each)
            )
        )
        if "decided" in rows
        else ""
    )
    holds = given.where(given == again, decided)
    counted = pd.DataFrame(
        {"set": name, "first": given, "second": again, "holds": holds}
    )
    kept = rows.assign(**{label: holds})[holds != ""].drop(
        columns=[second, "decided"], errors="ignore"
    )
    return kept.reset_index(drop=True), counted.groupby(
        list(counted), as_index=False
    ).size()


def with_split(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The rows with a column `split`: each combination of `by` in the same shares.

    Near copies lie in one part.
    """
    targets, names = encode_labels(rows[list(by)].astype(str).agg(" / ".join, axis=1))
    parts = split_indices(
        targets,
        tuple(SPLIT.values()),
        0,
        near_duplicate_groups(rows["text"].tolist(), NEAR),
        names,
    )
    split = pd.Series("", rows.index)
    for name, part in zip(SPLIT, parts):
        split.iloc[part.numpy()] = name
    return rows.assign(split=split)


def on_one_side(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with near copies on one side of the split, over all parts.

    A group lies where its first row does, whatever the business. Each part is split by
    itself, so that this moves no row but the few whose copy lies in another part.
    """
    groups = near_duplicate_groups(rows["text"].tolist(), NEAR).numpy()
    return rows.assign(split=rows.groupby(groups)["split"].transform("first"))


def without_repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows but for those whose text, case and marks apart, an earlier one has."""
    return rows[
        ~pd.Series(
            near_duplicate_groups(rows["text"].tolist(), 1.0).numpy(), rows.index
        ).duplicated()
    ]


def make(source: Path, folder: Path) -> None:
    """Write the tables into `folder`, which holds the hard reviews."""
    counts = []
    if (source / "reviews.jsonl").exists():
        hard = read(folder, "reviews.csv")
        hard = hard[hard["part"] == "hard"]
        rows, counted = agreed(read_lines(source / "reviews.jsonl"), "reviews")
        rows["domain"] = rows["domain"].map(lambda name: BROAD.get(name, name))
        rows = with_split(rows, ("style", "label")).assign(
            part="ordinary", id=[f"o{n:04}" for n in range(1, len(rows) + 1)]
        )
        pd.concat([hard, rows[hard.columns]]).to_csv(
            folder / "reviews.csv", index=False, lineterminator="\n"
        )
        counts.append(counted)
    if (source / "messages.jsonl").exists():
        rows, counted = agreed(read_lines(source / "messages.jsonl"), "messages")
        rows = pd.concat(
            [
                with_split(part, ("business", "intent"))
                for _, part in rows.groupby("part", sort=False)
            ]
        )
        rows = without_repeats(on_one_side(rows.reset_index(drop=True)))
        rows[["text", "intent", "business", "split", "part"]].to_csv(
            folder / "support.csv", index=False, lineterminator="\n"
        )
        counts.append(counted)
        faq = [
            json.dumps(row, ensure_ascii=False)
            for row in read_lines(source / "faq.jsonl")[
                ["id", "business", "question", "answer", "asks"]
            ].to_dict("records")
        ]
        (folder / "support_faq.jsonl").write_text(
            "\n".join(faq) + "\n", encoding="utf-8"
        )
        read_lines(source / "unanswered.jsonl")[["text", "business"]].to_csv(
            folder / "support_unanswered.csv", index=False, lineterminator="\n"
        )
    if (source / "headlines.jsonl").exists():
        rows, counted = agreed(read_lines(source / "headlines.jsonl"), "headlines")
        with_split(rows, ("sentiment",))[
            ["text", "name", "sentiment", "date", "split"]
        ].to_csv(folder / "headlines.csv", index=False, lineterminator="\n")
        counts.append(counted)
    if counts:
        known = (
            [read(folder, "agreement.csv")]
            if (folder / "agreement.csv").exists()
            else []
        )
        made = {frame["set"].iloc[0] for frame in counts}
        kept = [frame[~frame["set"].isin(made)] for frame in known]
        pd.concat([*kept, *counts]).to_csv(
            folder / "agreement.csv", index=False, lineterminator="\n"
        )


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def counted(frame: pd.DataFrame, column: str, label: str, what: str) -> str:
    """Rows of each value of `column`, and how many of them have each label."""
    labels = sorted(set(frame[label].astype(str)))
    parts = sorted(frame.groupby(column), key=lambda pair: (-len(pair[1]), pair[0]))
    return table(
        [column, what, *(f"{label} {each}" for each in labels)],
        [
            [
                name,
                len(part),
                *((part[label].astype(str) == each).sum() for each in labels),
            ]
            for name, part in parts
        ],
    )


def agreement(folder: Path, name: str) -> str:
    """How far two labellers agreed, and what became of the rows where they did not."""
    found = read(folder, "agreement.csv").astype(
        {"holds": str, "first": str, "second": str}
    )
    found = found[found["set"] == name]
    total = found["size"].sum()
    alike = found.loc[found["first"] == found["second"], "size"].sum()
    kappa = cohen_kappa_score(
        found["first"], found["second"], sample_weight=found["size"]
    )
    apart = found[found["first"] != found["second"]]
    became = {
        ("keeps the first label", "keep the first label"): apart["holds"]
        == apart["first"],
        ("got the second",) * 2: apart["holds"] == apart["second"],
        ("was left out", "were left out"): apart["holds"] == "",
    }
    became["got a third", "got a third"] = ~np.any(list(became.values()), axis=0)
    sizes = {
        words: apart.loc[which, "size"].sum()
        for words, which in became.items()
        if which.any()
    }
    said = ", ".join(f"{size} {words[int(size > 1)]}" for words, size in sizes.items())
    others = f"Of the {total - alike} others"
    if len(sizes) == 1:
        others, said = (
            "The other one" if total == alike + 1 else f"The {total - alike} others",
            said.partition(" ")[2],
        )
    return (
        f"Each of {total} rows was labelled twice, the second time without sight of the"
        f" first. The two labels agree on {alike} rows, {alike / total:.1%};"
        f" Cohen's kappa is {kappa:.3f}."
        + (f" {others} {said}." if total > alike else "")
    )


def lengths(texts: pd.Series) -> str:
    words = texts.str.split().str.len()
    few, median, many = words.quantile([0.05, 0.5, 0.95]).astype(int)
    return (
        f"Half have {median} words or fewer; nine in ten have between {few} and {many};"
        f" the longest has {words.max()}."
    )


def closest(frame: pd.DataFrame) -> str:
    """The most similar pair of different texts across the split, in per cent."""
    frame = frame.drop_duplicates("text")
    side = frame["split"].to_numpy()
    pairs = near_duplicates(frame["text"], 0.05)
    return f"{next((s for i, j, s in pairs if side[i] != side[j]), 0):.0%}"


def coarse(rows: pd.DataFrame) -> str:
    """How many test rows the rarest styles have, and how coarse accuracy is there."""
    styles = rows.loc[rows["split"] == "test", "style"].value_counts()
    rarest = styles.sort_values().head(2)
    found = [Proportion.of(round(0.85 * size), size) for size in rarest]
    half = max(each.high - each.low for each in found) / 2
    said = " and ".join(f"{size} of style `{name}`" for name, size in rarest.items())
    return (
        f"The test part of the ordinary reviews has {said}: an accuracy near 85 % on so"
        f" few is known to about {100 * half:.0f} points either way at worst,"
        " too coarse to compare styles or methods by."
    )


def reviews_sheet(folder: Path) -> str:
    frame = read(folder, "reviews.csv")
    sheet = (SHEETS / "reviews.md").read_text(encoding="utf-8")
    parts = {part: rows for part, rows in frame.groupby("part")}
    said = {
        "count": len(frame),
        "closest": closest(frame),
        "ordinary": "",
        "agreement": "",
        "coarse": "",
        "domains": 0,
    }
    if "ordinary" in parts:
        said["agreement"] = agreement(folder, "reviews")
        said["coarse"] = coarse(parts["ordinary"])
        said["domains"] = parts["ordinary"]["domain"].nunique()
    for part, rows in parts.items():
        tables = "\n\n".join(
            counted(rows, column, "label", "reviews")
            for column in ("style", "split", "domain")
        )
        said[part] = (
            f"{len(rows)} reviews; {rows['typos'].sum()} carry typing errors."
            f" {lengths(rows['text'])}\n\n{tables}"
        )
    return sheet.format(**said)


def support_sheet(folder: Path) -> str:
    messages = read(folder, "support.csv")
    faq = read_lines(folder / "support_faq.jsonl")
    unanswered = read(folder, "support_unanswered.csv")
    sheet = (SHEETS / "support.md").read_text(encoding="utf-8")
    asks = faq["asks"].map(len)
    asked = near_duplicates([*faq["question"], *messages["text"]], 1.0)
    asked = len({second for first, second, _ in asked if first < len(faq) <= second})
    labelled = (
        read(folder, "agreement.csv")
        .query("set == 'messages' and holds != ''")["size"]
        .sum()
    )
    faq_table = table(
        ["business", "questions", "other ways of asking", "asks without an answer"],
        [
            [
                name,
                len(rows),
                rows["asks"].map(len).sum(),
                (unanswered["business"] == name).sum(),
            ]
            for name, rows in faq.groupby("business")
        ],
    )
    return sheet.format(
        messages=len(messages),
        ordinary=(messages["part"] == "ordinary").sum(),
        hard=(messages["part"] == "hard").sum(),
        intents=messages["intent"].nunique() - 1,
        outside=(messages["intent"] == "outside").sum(),
        lengths=lengths(messages["text"]),
        agreement=agreement(folder, "messages"),
        closest=closest(messages),
        copies=labelled - len(messages),
        asked=asked,
        questions=len(faq),
        asks=asks.sum(),
        fewest=asks.min(),
        unanswered=len(unanswered),
        by_intent=counted(messages, "intent", "split", "messages"),
        by_business=counted(messages, "business", "split", "messages"),
        faq=faq_table,
    )


def headlines_sheet(folder: Path) -> str:
    frame = read(folder, "headlines.csv")
    sheet = (SHEETS / "headlines.md").read_text(encoding="utf-8")
    by = frame.groupby("text")["sentiment"]
    return sheet.format(
        count=len(frame),
        texts=by.ngroups,
        names=frame["name"].nunique(),
        two=(by.size() > 1).sum(),
        different=(by.nunique() > 1).sum(),
        first=frame["date"].min(),
        last=frame["date"].max(),
        lengths=lengths(frame.drop_duplicates("text")["text"]),
        agreement=agreement(folder, "headlines"),
        closest=closest(frame),
        by_sentiment=counted(frame, "sentiment", "split", "rows"),
    )


def course_sheet(folder: Path) -> str:
    frame = read(folder, "course.csv")
    sheet = (SHEETS / "course.md").read_text(encoding="utf-8")
    words = {
        name: frame[name].str.split().map(len).mean() for name in ("answer", "rejected")
    }
    return sheet.format(
        count=len(frame),
        answer_words=f"{words['answer']:.1f}",
        rejected_words=f"{words['rejected']:.1f}",
        times=f"{words['rejected'] / words['answer']:.1f}",
        train=(frame["split"] == "train").sum(),
        test=(frame["split"] == "test").sum(),
        closest=closest(frame.rename(columns={"question": "text"})),
    )


def datasheets(folder: Path) -> dict[str, str]:
    """The text of each datasheet whose tables are in `folder`."""
    kinds = {
        "reviews": reviews_sheet,
        "support": support_sheet,
        "headlines": headlines_sheet,
        "course": course_sheet,
    }
    return {
        f"{name}.md": write(folder)
        for name, write in kinds.items()
        if (folder / f"{name}.csv").exists()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="folder of the texts as they were written and labelled",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FILES,
        help="folder of the tables (default: that of the package)",
    )
    chosen = parser.parse_args()
    if chosen.source:
        make(chosen.source, chosen.out)
    for name, text in datasheets(chosen.out).items():
        (chosen.out / name).write_text(text, encoding="utf-8")
