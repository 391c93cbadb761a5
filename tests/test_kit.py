"""Chapter 0: records, pictures, device, seeds and shares."""
import dataclasses
import io
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from bigmodel_nb.kit.core import Proportion, best_device, best_dtype, count_parameters, seed_everything
from bigmodel_nb.kit.plots import COLORS, _light, contrast, figure, image_grid, ink, label_lines, limit_line, show, spread, table
from bigmodel_nb.kit.record import read_records, record, to_json

# --- record

json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@given(json_values)
def test_plain_json_values_pass_unchanged(value):
    assert to_json(value) == value
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == value


@pytest.mark.parametrize("value, expected", [
    (np.float32(0.5), 0.5), (np.arange(3), [0, 1, 2]), (torch.tensor([[1, 2]]), [[1, 2]]), (torch.tensor(2.5), 2.5),
    ((1, 2), [1, 2]), (Proportion(0.5, 0.4, 0.6, 10), {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}), (np.bool_(True), True)])
def test_scientific_values_become_json(value, expected):
    assert to_json(value) == expected


@pytest.mark.parametrize("value", [float("nan"), [1.0, math.inf], {"a": np.float64("nan")}, torch.tensor(float("-inf"))])
def test_numbers_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match="which JSON cannot hold; allowed are finite numbers"):
        to_json(value, "loss")


def test_objects_that_json_has_no_form_for_are_refused():
    with pytest.raises(TypeError, match=r"loss\['a'\]\[0\] is a object; allowed are numbers"):
        to_json({"a": [object()]}, "loss")


def test_record_has_scrapbooks_form(monkeypatch):
    shown = []
    monkeypatch.setattr("bigmodel_nb.kit.record.display", lambda data, **options: shown.append((data, options)))
    record("accuracy", np.float64(0.5))
    (data, options), = shown
    assert data == {"application/scrapbook.scrap.json+json": {"name": "accuracy", "data": 0.5, "encoder": "json", "version": 1}}
    assert options == {"metadata": {"scrapbook": {"name": "accuracy", "data": True, "display": False}}, "raw": True}
    assert read_records({"cells": [{"outputs": [{"data": data}]}]}) == {"accuracy": 0.5}


def test_papermills_old_form_is_read_and_the_last_record_of_a_name_stands():
    cells = [{"outputs": [{"data": {"application/papermill.record+json": {"a": 1, "b": 2}}}]}, {},
             {"outputs": [{"data": {"application/papermill.record+json": {"a": 3}}}, {"name": "stdout", "text": "x"}]}]
    assert read_records({"cells": cells}) == {"a": 3, "b": 2}


@pytest.mark.parametrize("name", ["", "two words", "1st", None, "a-b"])
def test_record_refuses_names_that_are_no_identifiers(name):
    with pytest.raises(ValueError, match="allowed is an identifier"):
        record(name, 1)


# --- plots

@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.01, 20))
def test_spread_keeps_distance_order_and_centre(wanted, gap):
    placed = spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= gap * (1 - 1e-9) - 1e-9).all()
    assert placed.mean() == pytest.approx(np.mean(wanted), abs=1e-6)


def test_spread_moves_nothing_that_need_not_move():
    assert spread([0.0, 5.0, 10.0], gap=1.0).tolist() == [0.0, 5.0, 10.0]
    assert len(spread([], gap=1.0)) == 0


@pytest.mark.parametrize("end", [False, True])
def test_a_limit_is_named_inside_the_picture_at_the_end_that_is_asked_for(end):
    made, axes = figure("A line and its limit", height=2)
    axes.plot([0, 1], [0, 1])
    limit_line(axes, 0.5, "limit", end=end)
    made.canvas.draw()
    (name,) = [text.get_window_extent() for text in axes.texts if text.get_text() == "limit"]
    frame = axes.get_window_extent()
    assert frame.x0 < name.x0 and name.x1 < frame.x1 and (name.x0 > frame.x0 + frame.width / 2) == end


def test_labels_of_lines_do_not_overlap():
    made, axes = figure("Three lines that end together", height=2)
    for offset in (0.0, 0.001, 0.002):
        axes.plot([0, 1], [0, 1 + offset], label=f"line {offset}")
    limit_line(axes, 0.5, "limit")
    axes.set_ylim(0, 3)
    label_lines(axes)
    made.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("line")]
    assert len(boxes) == 3
    assert not any(first.overlaps(second) for index, first in enumerate(boxes) for second in boxes[index + 1:])
    assert all(box.x0 > axes.bbox.x1 for box in boxes), "not over the end of the axis"
    plt.close(made)


def test_figure_has_the_house_style():
    made, axes = figure("A sentence", grid=True)
    assert made.get_figwidth() == 7 and made.dpi == 110 and axes.get_title(loc="left") == "A sentence"
    assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
    made, grid = figure("Two", 1, 2)
    assert grid.shape == (2,) and made.get_suptitle() == "Two"
    plt.close("all")


def test_show_gives_a_png_with_alternative_text_and_closes_the_figure():
    made, axes = figure("A sentence")
    image = show(made, alt="A line.")
    data, metadata = image._repr_mimebundle_()
    assert "image/png" in data and metadata["image/png"]["alt"] == "A line."
    assert not plt.fignum_exists(made.number)


def test_a_drawing_is_saved_in_256_colours_and_looks_the_same():
    made, axes = figure("A sentence")
    axes.plot([0, 1], [0, 1], color=COLORS["ours"])
    axes.plot([0, 0.02], [1, 1], color=COLORS["failure"], linewidth=4)  # a short line beside much of another colour
    whole = io.BytesIO()
    made.savefig(whole, format="png")
    short = show(made, alt="Two lines.").data
    assert PIL.Image.open(io.BytesIO(short)).mode == "P" and len(short) < 0.5 * len(whole.getvalue())
    before, after = (np.asarray(PIL.Image.open(each).convert("RGB")).astype(int) for each in (whole, io.BytesIO(short)))
    assert before.shape == after.shape and abs(before - after).max() <= 16


def test_a_photograph_keeps_its_colours_and_a_transparent_figure_its_transparency():
    colours = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 2), -1)
    made, axes = figure("A sentence", height=4)
    axes.imshow(np.concatenate([colours, np.random.default_rng(0).random((40, 40, 1))], -1))
    whole = io.BytesIO()
    made.savefig(whole, format="png")
    picture = PIL.Image.open(io.BytesIO(show(made, alt="All colours.").data))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(PIL.Image.open(whole).convert("RGB")))
    made, _ = figure("A sentence")
    made.patch.set_alpha(0)
    assert PIL.Image.open(io.BytesIO(show(made, alt="Nothing behind.").data)).mode == "RGBA"


def test_bad_input_of_plots():
    made, axes = figure("A sentence")
    with pytest.raises(ValueError, match="alt is empty; allowed is a sentence"):
        show(made, alt="")
    with pytest.raises(ValueError, match="along is 'z'; allowed are 'x' and 'y'"):
        limit_line(axes, 1, "limit", along="z")
    with pytest.raises(ValueError, match="lengths 2, 3 and none"):
        image_grid(np.zeros((2, 8, 8)), [1, 2, 3])
    with pytest.raises(ValueError, match="'gone'; allowed are the columns"):
        table(pd.DataFrame({"a": [1.0]}), highest=["gone"])
    plt.close("all")


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8), (3, 3, 8, 8)])
def test_image_grid_marks_wrong_predictions_without_colour_alone(shape):
    made = image_grid(np.zeros(shape), [1, 2, 3], [1, 0, 3], "One of three is wrong")
    captions = [axes.get_xlabel() for axes in made.axes]
    assert captions == ["1 ✓", "2 → 0 ✗", "3 ✓"]
    widths = [axes.spines["left"].get_linewidth() for axes in made.axes]
    assert widths[1] > widths[0] == widths[2]
    plt.close(made)


def test_table_escapes_text_and_is_the_same_each_time():
    frame = pd.DataFrame({"text": ["<script>"], "score": [0.123456]})
    first, second = (table(frame, "caption", highest=["score"]).to_html() for _ in range(2))
    assert first == second and "<script>" not in first and "&lt;script&gt;" in first and "0.123" in first and "bold" in first


def test_colours_are_distinct():
    assert len(set(COLORS.values())) == len(COLORS)


# --- core

def test_device_and_dtype():
    assert isinstance(best_device(), torch.device)
    assert best_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert best_dtype("meta") == torch.float32


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_seed_repeats_all_generators(seed):
    import random

    def draw(generator):
        return random.random(), np.random.rand(), torch.rand(2).tolist(), torch.rand(2, generator=generator).tolist()

    assert draw(seed_everything(seed)) == draw(seed_everything(seed))


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "0", True, None])
def test_seed_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="allowed is an integer from 0"):
        seed_everything(seed)


def test_count_parameters_counts_shared_once_and_frozen_on_request():
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, linear, nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    assert count_parameters(model) == 16 + 8 + 2 and count_parameters(model, trainable_only=True) == 24


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_proportion_equals_scipys_wilson_interval(counts, confidence):
    k, n = counts
    ours, theirs = Proportion.of(k, n, confidence), binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert ours.value == k / n and ours.n == n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12) and ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_proportion_as_text_and_as_data():
    assert str(Proportion.of(90, 100)) == "90.0% [82.6%, 94.5%]"
    assert set(dataclasses.asdict(Proportion.of(1, 2))) == {"value", "low", "high", "n"}


@pytest.mark.parametrize("successes, n, confidence, said", [
    (3, 0, 0.95, "successes is 3 and n is 0"), (-1, 5, 0.95, "successes is -1"), (6, 5, 0.95, "successes is 6"), (1, 2, 95, "confidence is 95")])
def test_proportion_refuses_impossible_counts(successes, n, confidence, said):
    with pytest.raises(ValueError, match=said):
        Proportion.of(successes, n, confidence)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_ink_reads_on_white_and_keeps_its_hue(color):
    dark = ink(color)
    assert contrast(dark) >= 4.5 - 1e-6 and all(0 <= channel <= 1 for channel in dark)
    if contrast(color) >= 4.5:
        assert np.allclose(dark, color, atol=1e-3)
    else:
        assert abs(contrast(dark) - 4.5) < 1e-6, "no darker than it takes"
        assert np.allclose(np.cross(_light(dark), _light(color)), 0, atol=1e-6), "one factor for all channels"


def test_contrast_is_that_of_the_guidelines():
    assert contrast("white") == pytest.approx(1) and contrast("black") == pytest.approx(21)
    assert contrast("#767676") == pytest.approx(4.54, abs=0.005) and contrast("#ff0000") == pytest.approx(4.0, abs=0.005)
