"""Chapter 0: records, pictures, device, seeds, copies and shares."""

import copy
import dataclasses
import io
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial, ttest_rel
from torch import nn
from torch.nn.utils import parametrizations, prune

from bigmodel_nb.kit.core import (
    Difference,
    Estimate,
    Proportion,
    best_device,
    best_dtype,
    copy_model,
    count_parameters,
    evaluating,
    seed_everything,
)
from bigmodel_nb.kit.plots import (
    COLORS,
    _light,
    contrast,
    figure,
    image_grid,
    ink,
    label_lines,
    reference_line,
    show,
    spread,
    table,
    with_palette,
)
from bigmodel_nb.kit.record import read_records, record, to_json


def expect_record(m):
    assert abs(m["pi"] - math.pi) < 4 * m["standard_error"], (
        "the crossings measure pi, as well as their standard error says"
    )
    assert 0 < m["standard_error"] < 0.1, "well enough to be of use"
    assert m["relative_error"] == abs(m["pi"] / math.pi - 1)


def expect_plots(m):
    assert m["lowest_contrast_of_ink"] > 4.499, (
        "ink of every colour can be read on white (WCAG 2.2)"
    )
    assert (
        m["nearest_neighbour_accuracy"] > 0.95
        and m["images_that_beat_the_tree"] < 0.5 * m["images"]
    ), (
        "the nearest neighbour with fewer than half of the images "
        "beats the tree with all of them"
    )
    assert m["spread_largest_difference"] < 1e-3, (
        "pooling adjacent violators solves the problem that a general solver solves"
    )


def expect_core(m):
    assert m["digits_accuracy"]["low"] > 0.9, (
        "a linear classifier does well on the digits"
    )
    assert m["largest_difference_from_scipy"] < 1e-12, "Wilson's interval is SciPy's"
    assert m["wilson_lowest_coverage"] > 0.85 and m["wald_lowest_coverage"] < 0.5, (
        "Wilson's interval nearly keeps its promise, Wald's does not"
    )
    assert m["least_coverage_of_paired_difference"] > 0.93, (
        "the paired difference nearly keeps its promise with twenty examples"
    )


def expect_exercises(m):
    assert m["states"] == ["empty", "wrong", "wrong", "solved"], (
        "a stub, two mistakes and an answer in another form are told apart"
    )
    assert (
        m["passed_by_chance"]["five cases"] < 0.01 < m["passed_by_chance"]["one case"]
    ), "five fresh cases are not passed by a hard-coded number"
    assert m["passed_by_a_side_effect"], (
        "the shortest check is passed by an answer that overwrites its argument"
    )
    assert m["equal_to_the_last_digit"] < 0.95 and m["alike"] == 1, (
        "right formulas differ in their last digits, within the tolerance"
    )
    assert m["disagreements"] == 0, (
        "where no number is near zero the comparison is NumPy's"
    )


def expect_widgets(m):
    assert m["forms_without_a_kernel"] == 1, (
        "an explorer leaves one form more than ipywidgets' own: the image"
    )
    assert m["left_open"] == {"careless": 12, "engine": 0}, (
        "figures that nobody closes stay; the engine closes its own"
    )
    assert m["graph_difference"] < 1e-12, (
        "the gradients of the graph are those of backward"
    )
    assert m["walk_difference"] < 1e-12, "the trajectory is that of torch.optim.SGD"
    assert "allowed are positive numbers" in m["said_of_a_failed_drawing"], (
        "a drawing that fails says why"
    )
    assert m["difference_at_most_labels"]["low"] > 0, (
        "with 1,200 labels the nearest image is ahead of logistic regression"
    )


# --- record

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_plain_json_values_pass_unchanged(value):
    assert to_json(value) == value
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == value


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        (torch.tensor(2.5), 2.5),
        ((1, 2), [1, 2]),
        (
            Proportion(0.5, 0.4, 0.6, 10),
            {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10},
        ),
        (np.bool_(True), True),
    ],
)
def test_scientific_values_become_json(value, expected):
    assert to_json(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        [1.0, math.inf],
        {"a": np.float64("nan")},
        torch.tensor(float("-inf")),
    ],
)
def test_numbers_that_json_cannot_hold_are_refused(value):
    with pytest.raises(
        ValueError, match="which JSON cannot hold; allowed are finite numbers"
    ):
        to_json(value, "loss")


def test_objects_that_json_has_no_form_for_are_refused():
    with pytest.raises(
        TypeError, match=r"loss\['a'\]\[0\] is a object; allowed are numbers"
    ):
        to_json({"a": [object()]}, "loss")


def test_record_has_scrapbooks_form(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **options: shown.append((data, options))
    )
    record("accuracy", np.float64(0.5))
    ((data, options),) = shown
    assert data == {
        "application/scrapbook.scrap.json+json": {
            "name": "accuracy",
            "data": 0.5,
            "encoder": "json",
            "version": 1,
        }
    }
    assert options == {
        "metadata": {"scrapbook": {"name": "accuracy", "data": True, "display": False}},
        "raw": True,
    }
    assert read_records({"cells": [{"outputs": [{"data": data}]}]}) == {"accuracy": 0.5}


def test_papermills_old_form_is_read_and_the_last_record_of_a_name_stands():
    cells = [
        {
            "outputs": [
                {"data": {"application/papermill.record+json": {"a": 1, "b": 2}}}
            ]
        },
        {},
        {
            "outputs": [
                {"data": {"application/papermill.record+json": {"a": 3}}},
                {"name": "stdout", "text": "x"},
            ]
        },
    ]
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
    reference_line(axes, 0.5, "limit", end=end)
    made.canvas.draw()
    (name,) = [
        text.get_window_extent() for text in axes.texts if text.get_text() == "limit"
    ]
    frame = axes.get_window_extent()
    assert frame.x0 < name.x0
    assert name.x1 < frame.x1
    assert (name.x0 > frame.x0 + frame.width / 2) == end


def test_labels_of_lines_do_not_overlap():
    made, axes = figure("Three lines that end together", height=2)
    for offset in (0.0, 0.001, 0.002):
        axes.plot([0, 1], [0, 1 + offset], label=f"line {offset}")
    reference_line(axes, 0.5, "limit")
    axes.set_ylim(0, 3)
    label_lines(axes)
    made.canvas.draw()
    boxes = [
        text.get_window_extent()
        for text in axes.texts
        if text.get_text().startswith("line")
    ]
    assert len(boxes) == 3
    assert not any(
        first.overlaps(second)
        for index, first in enumerate(boxes)
        for second in boxes[index + 1 :]
    )
    assert all(box.x0 > axes.bbox.x1 for box in boxes), "not over the end of the axis"
    plt.close(made)


def test_figure_has_the_house_style():
    made, axes = figure("A sentence", grid=True)
    assert made.get_figwidth() == 7
    assert made.dpi == 110
    assert axes.get_title(loc="left") == "A sentence"
    assert not axes.spines["top"].get_visible()
    assert not axes.spines["right"].get_visible()
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
    # a short line beside much of another colour
    axes.plot([0, 0.02], [1, 1], color=COLORS["failure"], linewidth=4)
    whole = io.BytesIO()
    made.savefig(whole, format="png")
    short = show(made, alt="Two lines.").data
    assert PIL.Image.open(io.BytesIO(short)).mode == "P"
    assert len(short) < 0.5 * len(whole.getvalue())
    before, after = (
        np.asarray(PIL.Image.open(each).convert("RGB")).astype(int)
        for each in (whole, io.BytesIO(short))
    )
    assert before.shape == after.shape and abs(before - after).max() <= 16


def test_a_photograph_keeps_its_colours_and_a_transparent_figure_its_transparency():
    colours = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 2), -1)
    made, axes = figure("A sentence", height=4)
    axes.imshow(
        np.concatenate([colours, np.random.default_rng(0).random((40, 40, 1))], -1)
    )
    whole = io.BytesIO()
    made.savefig(whole, format="png")
    picture = PIL.Image.open(io.BytesIO(show(made, alt="All colours.").data))
    assert picture.mode == "RGB"
    assert np.array_equal(
        np.asarray(picture), np.asarray(PIL.Image.open(whole).convert("RGB"))
    )
    made, _ = figure("A sentence")
    made.patch.set_alpha(0)
    assert (
        PIL.Image.open(io.BytesIO(show(made, alt="Nothing behind.").data)).mode
        == "RGBA"
    )


def test_bad_input_of_plots():
    made, axes = figure("A sentence")
    with pytest.raises(ValueError, match="alt is empty; allowed is a sentence"):
        show(made, alt="")
    with pytest.raises(ValueError, match="along is 'z'; allowed are 'x' and 'y'"):
        reference_line(axes, 1, "limit", along="z")
    with pytest.raises(ValueError, match="lengths 2, 3 and none"):
        image_grid(np.zeros((2, 8, 8)), [1, 2, 3])
    with pytest.raises(ValueError, match="'gone'; allowed are the columns"):
        table(pd.DataFrame({"a": [1.0]}), highest=["gone"])
    plt.close("all")


def test_image_grid_of_one_image():
    made = image_grid(np.zeros((1, 8, 8)), [1], [0], "One")
    assert made.axes[0].get_title(loc="left") and made.get_suptitle() == ""


def test_a_palette_keeps_the_colours_of_areas():
    """Many hues of single pixels; areas of grey must not become violet or pink."""
    draw = np.random.default_rng(0)
    image = np.full((128, 256, 4), 255, np.uint8)
    tints = draw.integers(-10, 10, (64, 256, 3))
    image[:64, :, :3] = draw.integers(20, 235, (64, 256, 1)) + tints
    for place, grey in enumerate(range(0, 250, 5)):
        image[64:, 5 * place : 5 * place + 5, :3] = grey
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    kept = PIL.Image.open(io.BytesIO(with_palette(buffer.getvalue()))).convert("RGB")
    areas = np.asarray(kept)[64:, :250].astype(int)
    assert abs(areas - image[64:, :250, :3]).max() <= 6


def test_numbers_of_a_table_have_three_digits():
    values = [0.0, 0.01234, 12.345, 999.4, 999.7, 1234.0, 9994.0, 9996.0, 1e-5]
    text = table(pd.DataFrame({"a": values})).to_html()
    found = re.findall(r'<td id="[^"]*"[^>]*>([^<]*)</td>', text)
    assert found == [
        "0.00",
        "0.0123",
        "12.3",
        "999",
        "1000",
        "1230",
        "9990",
        "1.00e+04",
        "1.00e-05",
    ]


def test_tables_of_one_caption_do_not_share_their_style():
    made = [table(pd.DataFrame({"a": [1.0, 2.0]})), table(pd.DataFrame({"a": [3.0]}))]
    assert made[0].uuid != made[1].uuid


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
    first, second = (
        table(frame, "caption", highest=["score"]).to_html() for _ in range(2)
    )
    assert first == second
    assert "<script>" not in first
    assert "&lt;script&gt;" in first
    assert "0.123" in first
    assert "bold" in first


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
        return (
            random.random(),
            np.random.rand(),
            torch.rand(2).tolist(),
            torch.rand(2, generator=generator).tolist(),
        )

    assert draw(seed_everything(seed)) == draw(seed_everything(seed))


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "0", True, None])
def test_seed_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="allowed is an integer from 0"):
        seed_everything(seed)


def test_count_parameters_counts_shared_once_and_frozen_on_request():
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, linear, nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    assert count_parameters(model) == 16 + 8 + 2
    assert count_parameters(model, trainable_only=True) == 24


class Keeping(nn.Module):
    """Keeps what it computed last, deep in containers."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(6, 6), None

    def forward(self, input):
        output = self.layer(input)
        self.kept = {"last": [output, (output.softmax(1), output[:1])]}
        return output


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    model[0].register_forward_hook(Shift(2.0))
    return model


class Shift:
    """A hook with a number of its own."""

    def __init__(self, size):
        self.size = size

    def __call__(self, module, input, output):
        return output + self.size


UNUSUAL = {
    "old weight norm": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(6, 6)), nn.Tanh()
    ),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "pruned": lambda: nn.Sequential(
        prune.l1_unstructured(nn.Linear(6, 6), "weight", amount=0.5)
    ),
    "keeping": Keeping,
    "tied, with a hook": tied,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    "exported": lambda: torch.export.export(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()), (torch.ones(4, 6),)
    ).module(),
    "compiled": lambda: torch.compile(nn.Linear(6, 6), backend="eager"),
}


def unusual(name):
    torch.manual_seed(0)
    model = UNUSUAL[name]()
    model(torch.rand(4, 6))
    # an exported program refuses to be told its mode
    return model if name == "exported" else model.eval()


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_copy_computes_the_same_and_shares_nothing(name):
    model, x = unusual(name), torch.rand(4, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    twin = copy_model(model)
    assert type(twin).__name__ == type(model).__name__
    assert torch.equal(twin(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)
    mine, others = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == others.keys()
    assert all(
        each.requires_grad == mine[key].requires_grad for key, each in others.items()
    )
    places = [{each.data_ptr() for each in some.values()} for some in (mine, others)]
    assert not places[0] & places[1]
    twin(x).square().sum().backward()
    assert all(
        each.grad is not None and each.grad.abs().sum() > 0 for each in others.values()
    )
    assert all(each.grad is None for each in mine.values())
    with torch.no_grad():
        for each in others.values():
            each.mul_(2)
    assert not torch.equal(twin(x), model(x))
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )


def test_evaluating_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval(), nn.Dropout())
    before = [each.training for each in model.modules()]
    assert before == [True, True, False, True]
    with evaluating(model) as inside:
        assert inside is model
        assert not any(each.training for each in model.modules())
    assert [each.training for each in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [each.training for each in model.modules()] == before


def test_a_copy_keeps_ties_hooks_and_values_and_takes_what_the_memo_holds():
    model = unusual("tied, with a hook")
    twin = copy_model(model)
    assert twin[2].weight is twin[0].weight and twin[0].weight is not model[0].weight
    (hook,) = twin[0]._forward_hooks.values()
    assert isinstance(hook, Shift)
    assert hook.size == 2
    assert hook is not next(iter(model[0]._forward_hooks.values()))
    assert torch.equal(twin[1].running_mean, model[1].running_mean)
    assert twin[1].running_mean is not model[1].running_mean
    sharing = copy_model(model, {id(model[0].weight): model[0].weight})
    assert sharing[2].weight is model[0].weight and sharing[0].bias is not model[0].bias
    keeping = unusual("keeping")
    (output, (_, first)), (ours, (_, slice_)) = (
        each.kept["last"] for each in (keeping, copy_model(keeping))
    )
    assert torch.equal(ours, output) and not ours.requires_grad and output.requires_grad
    assert (
        slice_.untyped_storage().data_ptr()
        == ours.untyped_storage().data_ptr()
        != first.untyped_storage().data_ptr()
    ), "views of one tensor stay such"


@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_proportion_equals_scipys_wilson_interval(counts, confidence):
    k, n = counts
    ours = Proportion.of(k, n, confidence)
    theirs = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert ours.value == k / n and ours.n == n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_estimates_of_two_kinds_are_never_equal_and_show_what_they_are():
    share, gain = Proportion(0.5, 0.4, 0.6, 10), Difference(0.5, 0.4, 0.6, 10)
    assert isinstance(share, Estimate)
    assert isinstance(gain, Estimate)
    assert share != gain
    assert share == Proportion(0.5, 0.4, 0.6, 10)
    assert repr(gain) == "Difference(value=0.5, low=0.4, high=0.6, n=10)"
    assert str(gain) == "+50.0 points [+40.0, +60.0]" != str(share)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gain.value = 0.0


def test_proportion_as_text_and_as_data():
    assert str(Proportion.of(90, 100)) == "90.0% [82.6%, 94.5%]"
    assert set(dataclasses.asdict(Proportion.of(1, 2))) == {"value", "low", "high", "n"}


@pytest.mark.parametrize(
    "successes, n, confidence, said",
    [
        (3, 0, 0.95, "successes is 3 and n is 0"),
        (-1, 5, 0.95, "successes is -1"),
        (6, 5, 0.95, "successes is 6"),
        (1, 2, 95, "confidence is 95"),
    ],
)
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
        assert np.allclose(np.cross(_light(dark), _light(color)), 0, atol=1e-6), (
            "one factor for all channels"
        )


def test_contrast_is_that_of_the_guidelines():
    assert contrast("white") == pytest.approx(1)
    assert contrast("black") == pytest.approx(21)
    assert contrast("#767676") == pytest.approx(4.54, abs=0.005)
    assert contrast("#ff0000") == pytest.approx(4.0, abs=0.005)


def paired_outcomes(n):
    for b, c in ((b, c) for b in range(n + 1) for c in range(n + 1 - b)):
        yield (
            b,
            c,
            Difference.of_trials(
                np.repeat([1, 0, 0], [b, c, n - b - c]),
                np.repeat([0, 1, 0], [b, c, n - b - c]),
            ),
        )


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize(
    "only_first, only_second",
    [(0.05, 0.05), (0.1, 0.3), (0.3, 0.3), (0.02, 0.5), (0.0, 0.1)],
)
def test_a_paired_difference_covers_nearly_as_often_as_it_promises(
    n, only_first, only_second
):
    """Summed over all outcomes: no sampling error."""
    covered = sum(
        multinomial.pmf(
            [b, c, n - b - c],
            n,
            [only_first, only_second, 1 - only_first - only_second],
        )
        for b, c, found in paired_outcomes(n)
        if found.low <= only_second - only_first <= found.high
    )
    assert covered > 0.91
    plain = 0.0  # the textbook interval: of no width where no pair differs
    for b, c, found in paired_outcomes(n):
        half = 1.96 * max(b + c - (c - b) ** 2 / n, 0) ** 0.5 / n
        if abs(found.value - (only_second - only_first)) <= half:
            plain += multinomial.pmf(
                [b, c, n - b - c],
                n,
                [only_first, only_second, 1 - only_first - only_second],
            )
    assert covered >= plain - 1e-12


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_is_the_same_from_both_sides(pairs):
    first, second = np.array(pairs).T
    there = Difference.of_trials(first, second)
    back = Difference.of_trials(second, first)
    assert there.value == pytest.approx(second.mean() - first.mean())
    assert there.low <= there.value <= there.high
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert {there.verdict, back.verdict} in ({"more", "less"}, {"not told apart"})
    assert -1 <= there.low < there.high <= 1  # of no width even where no pair differs


def test_the_difference_of_runs_is_students():
    first, second = [0.61, 0.63, 0.60, 0.66], [0.70, 0.69, 0.71, 0.70]
    ours = Difference.of_runs(first, second)
    theirs = ttest_rel(second, first).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.verdict == "more"
    assert Difference.of_runs(second, first).verdict == "less"
    assert Difference.of_runs([0.5, 0.7], [0.6, 0.55]).verdict == "not told apart"


def test_the_sentence_of_a_difference_says_what_its_interval_allows():
    first = np.repeat([True, False], [150, 50])
    second = np.repeat([True, False], [164, 36])
    assert Difference.of_trials(first, second).sentence("A", "B") == (
        "The accuracy of B is higher than that of A: +7.0 points [+3.3, +10.6]"
    )
    said = Difference.of_trials(second, first).sentence("B", "A")
    assert "is lower than that of B" in said
    said = Difference.of_trials(first, first).sentence("A", "B", "recall")
    assert "cannot be told apart" in said


@pytest.mark.parametrize(
    "make, first, second, named",
    [
        (Difference.of_trials, [1, 0], [1], r"shapes \(2,\) and \(1,\)"),
        (Difference.of_trials, [], [], "n >= 1"),
        (Difference.of_trials, [[1]], [[0]], "shapes"),
        (Difference.of_trials, [0.5], [1], "booleans"),
        (Difference.of_runs, [0.5], [0.6], "n >= 2"),
        (Difference.of_runs, [0.5, np.nan], [0.6, 0.6], "finite"),
    ],
)
def test_a_difference_says_what_it_cannot_compare(make, first, second, named):
    with pytest.raises(ValueError, match=named):
        make(first, second)
    with pytest.raises(ValueError, match="confidence is 95"):
        make([1, 0], [1, 0], confidence=95)
