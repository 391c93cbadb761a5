"""Chapter 3 on real photographs and real text: the jobs answer, and say what they rest
on."""

import pytest

from bigmodel_nb.headless.run import run


@pytest.fixture
def photographs(real_data):
    return real_data / "cifar10_subset" / "train"


def test_photographs_in_folders_are_learnt_by_both_networks(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run(
        "models/vision", out="out", data=photographs, image_size=16, steps=80, runs=2
    )
    m = done.metrics
    assert m["labels"] == [87, 350, 1400] and m["skipped"] == 0
    assert m["constant_accuracy"] == pytest.approx(0.1, abs=0.01)
    for name in ("resnet", "vit"):
        last = m[f"accuracy_{name}"][-1]
        assert last["value"] > 0.2 and last["n"] == 2, "above chance, on two seeds"
    report = done.report.read_text()
    assert "with more <code>steps</code> both may do better" in report
    assert "gradient_ratio" not in m and "bag of patches" not in report


def test_a_play_is_learnt_by_the_gpt(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = real_data / "tinyshakespeare" / "input.txt"
    m = run("models/language", out="out", data=text, steps=120).metrics
    assert m["loss"]["high"] < m["loss_without_network"]["unigram"] - 0.5
    assert m["gain_over_bigram"]["low"] > 0, "better than pairs of letters"
