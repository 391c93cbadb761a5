"""Every notebook runs from top to bottom and finds what it claims.

Headlessly, at the quick budget, with the network off.
"""

import json
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.headless.run import run

SCRAP = "application/scrapbook.scrap.json+json"


def expect_tour(m):
    assert m["accuracy"]["value"] >= 0.97, "the net classifies digits"
    assert abs(m["first_loss"] - 2.303) < 0.1, "an untrained net's loss is log 10"
    assert m["loss_after_one_step"] < m["first_loss"], (
        "a step against the gradient lowers the loss"
    )
    assert m["robust_accuracy_ordinary"] < 0.1, "an ordinary net is fooled"
    assert m["robust_accuracy_adversarial"] > m["robust_accuracy_ordinary"] + 0.25, (
        "adversarial training helps"
    )
    assert m["accuracy_adversarial"] > 0.93, "and costs little accuracy"
    assert m["text_accuracy_tfidf"]["low"] > 0.5, "the baseline is better than chance"
    assert m["gain_of_frozen_over_tfidf"]["low"] > 0, (
        "a frozen encoder is better than counting words"
    )
    assert m["gain_of_fine_tuned_over_tfidf"]["low"] > 0, "so is a fine-tuned one"
    assert m["labels_frozen_needs"] < 0.5 * m["labels_tfidf_has"], (
        "pretraining saves more than half of the labels"
    )


def of_chapter(name, prefix):
    """`PREFIX_NOTEBOOK` of a test file of the notebook's chapter, or None."""
    chapter, _, notebook = name.rpartition("/")
    files = Path(__file__).parent.glob(f"test_{chapter or 'notebooks'}*.py")
    for path in sorted(files):
        found = getattr(import_module(path.stem), f"{prefix}_{notebook}", None)
        if found:
            return found


def expectation(name):
    """What a notebook must find: `expect_NOTEBOOK(metrics)`, which asserts."""
    found = of_chapter(name, "expect")
    assert found, f"no test file of {name}'s chapter says what it must find"
    return found


# Committed results and those of a run now: an interval is alike where it overlaps,
# another number within a tenth of the larger one or 0.05, a count within a tenth or 2;
# words but for their digits. What a clock or a memory said is not compared, nor what
# one rounding more may decide: `undecided_NOTEBOOK` of the chapter's test file names
# such metrics, each with its reason.
RELATIVE, ABSOLUTE, COUNT = 0.1, 0.05, 2
MEASURED = re.compile(
    r"seconds|cost|times_|_times|faster|slower|speed|memory|megabytes|ratio"
)


def committed(name):
    """The metrics that the committed outputs of a notebook hold."""
    outputs = [
        output
        for cell in nbformat.read(catalogue()[name], 4).cells
        for output in cell.get("outputs", [])
    ]
    scraps = [
        output.data[SCRAP] for output in outputs if SCRAP in output.get("data", {})
    ]
    return {scrap["name"]: scrap["data"] for scrap in scraps}


def unlike(before, now, where="", undecided=()):
    """Where two results differ by more than two runs of the same code may.

    On any machine; `undecided` names metrics that are not compared.
    """
    if MEASURED.search(where.rsplit(".", 1)[-1]) or where.lstrip(".") in undecided:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        if {"low", "high"} <= before.keys() & now.keys():
            return (
                []
                if before["low"] <= now["high"] and now["low"] <= before["high"]
                else [f"{where}: {before} and {now}"]
            )
        if before.keys() != now.keys():
            return [f"{where} has other names: {sorted(before.keys() ^ now.keys())}"]
        return [
            said
            for name in before
            for said in unlike(before[name], now[name], f"{where}.{name}", undecided)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            said
            for place, pair in enumerate(zip(before, now))
            for said in unlike(*pair, f"{where}[{place}]", undecided)
        ]
    if (
        isinstance(before, (int, float))
        and isinstance(now, (int, float))
        and not isinstance(before, bool)
    ):
        least = COUNT if isinstance(before, int) and isinstance(now, int) else ABSOLUTE
        alike = (
            abs(before - now) <= least + RELATIVE * max(abs(before), abs(now))
            or before == now
        )
    else:
        alike = re.sub(r"[\d.]+", "#", str(before)) == re.sub(r"[\d.]+", "#", str(now))
    return [] if alike else [f"{where}: {before!r} and {now!r}"]


def test_unlike_results_are_told():
    before = {
        "few": 0,
        "accuracy": {"value": 0.9, "low": 0.85, "high": 0.95},
        "n": 100,
        "curve": [1.0, 0.5],
        "said": "fell 26%",
        "ok": True,
        "seconds_forked": 2.0,
    }
    assert (
        unlike(
            before,
            before
            | {
                "n": 108,
                "few": 1,
                "curve": [0.99, 0.45],
                "said": "fell 23%",
                "seconds_forked": 9.0,
                "accuracy": {"value": 0.8, "low": 0.75, "high": 0.86},
            },
        )
        == []
    )
    for change in (
        {"n": 150},
        {"curve": [1.0, 0.3]},
        {"curve": [1.0]},
        {"said": "none fell"},
        {"ok": False},
        {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}},
    ):
        assert len(unlike(before, before | change)) == 1
        assert not unlike(before, before | change, undecided=list(change))
    assert len(unlike(before, {key: before[key] for key in before if key != "n"})) == 1
    nested = {"scores": {"0": 0.2}}, {"scores": {"0": 0.9}}
    assert unlike(*nested) and not unlike(*nested, undecided=["scores"])
    assert not unlike(*nested, undecided=["scores.0"])


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_what_is_undecided_is_recorded_and_has_a_reason(name):
    for metric, reason in (of_chapter(name, "undecided") or {}).items():
        found = committed(name)
        for part in metric.split("."):
            assert part in found, f"{name} records no {metric}"
            found = found[part]
        assert len(reason.split()) > 3


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_each_notebook_has_an_expectation_that_its_committed_results_meet(name):
    expectation(name)(committed(name))


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_notebook_runs_and_finds_what_it_claims(name, tmp_path):
    done = run(name, out=tmp_path / "run")
    assert done.metrics, f"{name} records nothing"
    expectation(name)(done.metrics)
    told = json.loads((done.folder / "metrics.json").read_text(encoding="utf-8"))
    undecided = of_chapter(name, "undecided") or {}
    assert not unlike(committed(name), told["metrics"], undecided=undecided), (
        "make sync"
    )
    assert done.peak_memory < 4096
    assert "<script" not in done.report.read_text(encoding="utf-8")
    outputs = [
        output
        for cell in nbformat.read(done.notebook, 4).cells
        for output in cell.get("outputs", [])
    ]
    assert not [
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]


def test_kernels_of_tests_have_no_network(tmp_path):
    cell = (
        "import socket\nfrom bigmodel_nb.kit.record import record\n"
        "try:\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\n"
        "except OSError as error:\n    record('said', str(error))"
    )
    nbformat.write(new_notebook(cells=[new_code_cell(cell)]), tmp_path / "reach.ipynb")
    done = run(str(tmp_path / "reach.ipynb"), out=tmp_path / "run")
    assert done.metrics["said"].startswith("the network is off in tests")
