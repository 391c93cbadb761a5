"""Figures that move, from plain Python: what controls change, is said, torch says."""

import base64
import io
import math
import re

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.kit.plots import figure
from bigmodel_nb.kit.widgets import (
    Explorer,
    attack_explorer,
    attention_explorer,
    descend,
    descent_explorer,
    graph_explorer,
    label_explorer,
    softmax_explorer,
)

NUMBER = r"(-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf|nan))"
NEURON = {"w": 0.5, "x": 2.0, "b": -0.3, "t": 1.0}


def one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and "allowed" in text, text
    for word in words:
        assert word in text, text


def neuron(w, x, b, t):
    return (torch.tanh(w * x + b) - t) ** 2


def valley(x, y):
    return (x**2 + 20 * y**2) / 2


def small_encoder(**options):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    return BertModel(BertConfig(**sizes, **options))


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of letters, each a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {
        word: number for number, word in enumerate([*marks, *map(chr, range(33, 127))])
    }
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def signs(model, x, y, radius, norm, steps):
    """A plain attack: steps along the slope of the loss, back into ball and box."""
    change = torch.zeros_like(x)
    for _ in range(steps):
        here = (x + change).requires_grad_()
        (slope,) = torch.autograd.grad(
            nn.functional.cross_entropy(model(here), y), here
        )
        if norm == "linf":
            change = (change + radius * slope.sign()).clamp(-radius, radius)
        else:
            change = change + radius * slope / slope.norm().clamp(min=1e-12)
            change = change * (radius / change.norm().clamp(min=1e-12)).clamp(max=1)
        change = (x + change).clamp(0, 1) - x
    return x + change


def digits(count=5, channels=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 4))
    return model, torch.rand(count, channels, 8, 8), torch.arange(count) % 4


def results():
    return pd.DataFrame(
        [
            {
                "labels": labels,
                "method": method,
                "value": value,
                "low": value - 0.05,
                "high": min(1.0, value + 0.04),
            }
            for labels, row in {
                16: (0.5, 0.4),
                64: (0.7, 0.72),
                256: (0.9, None),
            }.items()
            for method, value in zip(("fine-tuned", "frozen"), row)
            if value is not None
        ]
    )


MADE = {
    "softmax": lambda letters: softmax_explorer(
        labels=["good", "$mixed$", "b<a>d"], target=2
    ),
    "graph": lambda letters: graph_explorer(neuron, **NEURON),
    "descent": lambda letters: descent_explorer(
        valley, (-1.8, 0.6), ((-2.0, 2.0), (-1.0, 1.0)), rate=0.09
    ),
    "attention": lambda letters: attention_explorer(
        small_encoder(), letters, "not again"
    ),
    "attack": lambda letters: attack_explorer(*digits(), signs),
    "label": lambda letters: label_explorer(results()),
}


@pytest.fixture(params=MADE)
def explorer(request, letters):
    return MADE[request.param](letters)


def ends(control):
    """Values at both ends of a control."""
    if control.has_trait("options"):
        values = [
            each[1] if isinstance(each, tuple) else each for each in control.options
        ]
        return values[0], values[-1]
    if control.has_trait("min"):
        return [
            control.base**end if control.has_trait("base") else end
            for end in (control.min, control.max)
        ]
    return "a", "$x_ <b> \\frac{ and more"


# every explorer


def test_each_control_moves_picture_and_text_and_nothing_fails(explorer):
    opened = plt.get_fignums()
    for name, control in explorer.controls.items():
        found = set()
        for value in ends(control):
            explorer.set(**{name: value})
            assert explorer.error is None, explorer.error
            assert (
                explorer.values[name] == pytest.approx(value)
                if isinstance(value, float)
                else explorer.values[name] == value
            )
            assert explorer.picture.startswith(b"\x89PNG") and explorer.alt.strip()
            found.add((explorer.picture, explorer.alt))
        assert len({picture for picture, _ in found}) == 2, f"{name} moves the picture"
        assert len({alt for _, alt in found}) == 2, f"{name} moves the text"
    assert plt.get_fignums() == opened


def test_first_state_is_a_static_picture_with_text(explorer):
    data, metadata = explorer._repr_mimebundle_()
    stored, shown = (
        PIL.Image.open(io.BytesIO(each))
        for each in (base64.b64decode(data["image/png"]), explorer.picture)
    )
    assert stored.size == shown.size
    assert len(data["image/png"]) < 0.6 * len(explorer.picture), (
        "stored small, shown quickly"
    )
    assert metadata == {"image/png": {"alt": explorer.alt}}
    assert "application/vnd.jupyter.widget-view+json" in data
    assert len(data["text/plain"]) < 300


def test_the_page_shows_the_same_picture_and_text(explorer):
    from html.parser import HTMLParser

    class Read(HTMLParser):
        def handle_starttag(self, tag, attributes):
            self.found = (tag, dict(attributes))

    page = Read()
    page.feed(explorer.children[-1].value)
    tag, attributes = page.found
    assert tag == "img" and attributes["alt"] == explorer.alt
    assert (
        base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        == explorer.picture
    )
    assert int.from_bytes(explorer.picture[16:20], "big") == int(attributes["width"])
    assert (
        abs(int.from_bytes(explorer.picture[20:24], "big") - int(attributes["height"]))
        <= 1
    )


def test_controls_have_names_and_answer_while_they_move(explorer):
    def inside(widget):
        return [widget] + [
            each for child in getattr(widget, "children", ()) for each in inside(child)
        ]

    shown = inside(explorer)
    assert [each for each in shown if each in explorer.controls.values()] == list(
        explorer.controls.values()
    ), "in the order of reading"
    for control in explorer.controls.values():
        assert control.description
        assert not control.has_trait("continuous_update") or control.continuous_update


def test_the_same_state_gives_the_same_picture(explorer):
    start, picture, alt = explorer.values, explorer.picture, explorer.alt
    name, control = list(explorer.controls.items())[0]
    explorer.set(**{name: ends(control)[1]})
    explorer.set(**start)
    assert explorer.values == start
    assert explorer.alt == alt
    assert explorer.picture == picture


# the engine


def line(height, name="a"):
    made, axes = figure("A line", height=1.5)
    axes.axhline(height)
    return made, f"A line at {height} for {name}"


def two():
    return Explorer(
        line,
        {
            "height": ipywidgets.FloatSlider(0.5, min=0.0, max=1.0),
            "name": ipywidgets.Dropdown(options=["a", "b"]),
        },
    )


@pytest.mark.parametrize(
    "values, words",
    [
        ({"width": 1}, ["'width' is no control", "height, name"]),
        ({"height": 2}, ["height is 2", "numbers from 0 to 1"]),
        ({"height": "0.5"}, ["height is '0.5'"]),
        ({"height": math.nan}, ["height is nan"]),
        ({"height": None}, ["height is None"]),
        ({"height": 0.2, "name": "c"}, ["name is 'c'", "'a', 'b'"]),
        ({"height": [0.1]}, ["height is [0.1]"]),
    ],
)
def test_set_refuses_and_moves_nothing(values, words):
    explorer = two()
    before = explorer.picture
    with pytest.raises(ValueError) as error:
        explorer.set(**values)
    one_sentence(error, *words)
    assert explorer.values == {"height": 0.5, "name": "a"}
    assert explorer.picture == before


@given(st.floats(0, 1))
@settings(max_examples=8, deadline=None)
def test_any_value_in_range_is_taken_exactly(value):
    explorer = two()
    explorer.set(height=value, name="b")
    assert explorer.values == {"height": value, "name": "b"}
    assert explorer.alt == f"A line at {value} for b"


@given(
    st.one_of(
        st.floats(allow_nan=True),
        st.integers(),
        st.text(max_size=5),
        st.none(),
        st.lists(st.integers(), max_size=2),
    )
)
@settings(max_examples=20, deadline=None)
def test_set_takes_a_value_or_says_why_not(value):
    explorer = two()
    try:
        explorer.set(height=value)
        assert 0 <= value <= 1 and explorer.values["height"] == value
    except ValueError as error:
        assert str(error).endswith("allowed are numbers from 0 to 1")
        assert explorer.values["height"] == 0.5


SEVERAL = {
    "IntRangeSlider": (
        dict(value=(2, 5), min=0, max=10),
        (1, 3),
        [(1, 30), (1.5, 3), (3, 1), (1,), "13"],
        "are two integers from 0 to 10, the lower first",
    ),
    "FloatRangeSlider": (
        dict(value=(0.2, 0.5), min=0.0, max=1.0),
        (0.1, 0.3),
        [(0.1, 3.0), (0.1,), 0.5],
        "are two numbers from 0 to 1, the lower first",
    ),
    "SelectionRangeSlider": (
        dict(options=[1, 2, 3], value=(1, 2)),
        (2, 3),
        [(1, 9), 2],
        "are two of 1, 2, 3",
    ),
    "SelectMultiple": (
        dict(options=["a", "b", "c"], value=("a",)),
        ("b", "c"),
        [("z",), "a"],
        "are any of 'a', 'b', 'c'",
    ),
    "TagsInput": (
        dict(value=["a"], allowed_tags=["a", "b"]),
        ("b",),
        [("z",), "b"],
        "is a value of type list",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("form", [tuple, list, np.array])
def test_controls_that_hold_several_values_take_any_sequence(kind, form):
    options, wanted, _, _ = SEVERAL[kind]
    explorer = Explorer(
        lambda several: line(0.5), {"several": getattr(ipywidgets, kind)(**options)}
    )
    explorer.set(several=form(wanted))
    assert tuple(explorer.values["several"]) == wanted


@pytest.mark.parametrize(
    "kind, value",
    [(kind, value) for kind, (_, _, values, _) in SEVERAL.items() for value in values],
)
def test_controls_that_hold_several_values_refuse(kind, value):
    options, _, _, allowed = SEVERAL[kind]
    explorer = Explorer(
        lambda several: line(0.5), {"several": getattr(ipywidgets, kind)(**options)}
    )
    with pytest.raises(ValueError) as error:
        explorer.set(several=value)
    one_sentence(error, f"several is {value!r}; allowed {allowed}")
    assert explorer.values == {"several": options["value"]}


def test_a_date_that_is_a_text_is_refused():
    explorer = Explorer(lambda day: line(0.5), {"day": ipywidgets.DatePicker()})
    with pytest.raises(ValueError) as error:
        explorer.set(day="2020-01-01")
    one_sentence(error, "day is '2020-01-01'; allowed is a value of type date")


def test_several_controls_are_one_drawing():
    drawn = []
    explorer = Explorer(
        lambda **values: (drawn.append(values), line(**values))[1], dict(two().controls)
    )
    explorer.set(height=0.1, name="b")
    assert drawn == [{"height": 0.5, "name": "a"}, {"height": 0.1, "name": "b"}]


def failing(height, name):
    made = line(height, name)
    if height > 0.9:
        raise RuntimeError("too <high>")
    return made


def test_a_drawing_that_fails_is_said_and_left_behind():
    opened = plt.get_fignums()
    explorer = Explorer(failing, dict(two().controls))
    explorer.controls["height"].value = 1.0  # as a hand moves it
    assert explorer.picture is None and isinstance(explorer.error, RuntimeError)
    assert explorer.alt == "Nothing is drawn. RuntimeError: too <high>"
    assert "too &lt;high&gt;" in explorer.children[-1].value
    assert "<img" not in explorer.children[-1].value
    data, metadata = explorer._repr_mimebundle_()
    assert "image/png" not in data and metadata == {}
    assert plt.get_fignums() == opened, "the figure that was begun is closed"
    explorer.controls["height"].value = 0.2
    assert explorer.error is None
    assert explorer.picture
    assert "A line at 0.2" in explorer.children[-1].value
    with pytest.raises(RuntimeError, match="too <high>"):
        Explorer(
            failing,
            {
                "height": ipywidgets.FloatSlider(1.0, min=0.0, max=1.0),
                "name": ipywidgets.Dropdown(options=["a"]),
            },
        )
    assert plt.get_fignums() == opened


def test_an_empty_text_is_no_picture():
    with pytest.raises(ValueError, match="alt is empty"):
        Explorer(
            lambda height: (line(height)[0], " "),
            {"height": ipywidgets.FloatSlider(0.5)},
        )


def test_axes_keep_their_places_where_the_layout_is_said_to_depend_on_nothing():
    def wide(tick):
        made, axes = figure("Ticks")
        axes.set_yticks([0, 1], ["a" * tick, "b"])
        places.append(made)
        return made, f"tick {tick}"

    def left(layout_by):
        places.clear()
        explorer = Explorer(
            wide, {"tick": ipywidgets.IntSlider(1, min=1, max=30)}, layout_by=layout_by
        )
        explorer.set(tick=30)
        return [made.axes[0].get_position().x0 for made in places]

    places = []
    first, second = left(())
    assert first == pytest.approx(second)
    for layout_by in (None, ("tick",)):
        first, second = left(layout_by)
        assert second > first + 0.1, "room for the longer label"


# softmax


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=5),
    st.floats(0.1, 10),
    st.integers(0, 4),
)
@settings(max_examples=10, deadline=None)
def test_softmax_says_what_torch_says(logits, temperature, target):
    target %= len(logits)
    explorer = softmax_explorer(logits, target=target)
    explorer.set(temperature=temperature)
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(z / temperature, torch.tensor(target))
    loss.backward()
    assert float(
        re.search(f"has the loss {NUMBER} nats", explorer.alt)[1]
    ) == pytest.approx(loss.item(), rel=1e-3, abs=1e-12)
    found = [
        tuple(map(float, pair))
        for pair in re.findall(
            rf"class \d {NUMBER}, gradient {NUMBER}, (?:raise|lower)", explorer.alt
        )
    ]
    assert len(found) == len(logits)
    expected = torch.stack([torch.softmax(z.detach() / temperature, 0), z.grad], 1)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-12)
    for (_, slope), word in zip(found, re.findall("raise|lower", explorer.alt)):
        assert (slope > 0) == (word == "lower")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"logits": [1.0]}, ["logits is [1.0]", "two or more"]),
        ({"logits": [1.0, math.nan]}, ["finite"]),
        ({"labels": ["a"]}, ["labels has 1 names", "3"]),
        ({"target": 3}, ["target is 3", "0 to 2"]),
        ({"target": True}, ["target is True"]),
    ],
)
def test_softmax_refuses(options, words):
    with pytest.raises(ValueError) as error:
        softmax_explorer(**options)
    one_sentence(error, *words)


def test_softmax_has_room_for_large_logits():
    explorer = softmax_explorer([40.0, 0.0])
    assert explorer.values["logit_0"] == 40.0 and explorer.controls["logit_0"].max >= 40


# graph


def gradients(explorer):
    explorer.set(step=explorer.controls["step"].max)
    return {
        name: float(value)
        for name, value in re.findall(
            rf"gradient of (\w+) {NUMBER}(?=[;.])", explorer.alt
        )
    }


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=8, deadline=None)
def test_graph_has_torchs_gradients(values):
    inputs = dict(zip("wxbt", values))
    found = gradients(graph_explorer(neuron, **inputs))
    leaves = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in inputs.items()
    }
    mul = leaves["w"] * leaves["x"]
    add = mul + leaves["b"]
    nodes = leaves | {"mul": mul, "add": add, "tanh": torch.tanh(add)}
    nodes["sub"] = nodes["tanh"] - leaves["t"]
    result = nodes["sub"] ** 2
    expected = dict(zip(nodes, torch.autograd.grad(result, list(nodes.values())))) | {
        "pow_1": torch.tensor(1.0)
    }
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-12), name


def test_graph_sums_over_ways_and_says_the_chain_rule():
    explorer = graph_explorer(lambda a, b: (a * b) * torch.exp(a) + a, a=0.7, b=-1.3)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(a * -1.3 * a.exp() + a, a)
    assert gradients(explorer)["a"] == pytest.approx(slope.item(), rel=1e-3)
    for step in range(explorer.controls["step"].max + 1):
        explorer.set(step=step)
        said = re.search(
            rf"backward: gradient of (\w+) is {NUMBER}, from (.*?)\. Known",
            explorer.alt,
        )
        if said:
            parts = re.findall(rf"{NUMBER} of \w+ times {NUMBER}", said[3])
            assert sum(float(x) * float(y) for x, y in parts) == pytest.approx(
                float(said[2]), rel=2e-3
            ), explorer.alt
    assert step == 10 and said[1] == "a" and len(parts) == 3, (
        "three arrows leave a, the last of ten steps"
    )


def test_graph_walks_forwards_then_backwards_by_buttons():
    explorer = graph_explorer(neuron, **NEURON)
    (row,) = [
        child for child in explorer.children if isinstance(child, ipywidgets.HBox)
    ]
    back, _, on = row.children
    phases = []
    for _ in range(40):
        phases.append(
            (
                explorer.values["step"],
                re.search(r"forward|backward|inputs", explorer.alt)[0],
            )
        )
        on.click()
    assert phases[0] == (0, "inputs")
    assert phases[1][1] == "forward"
    assert phases[5] == (5, "forward")
    assert phases[6] == (6, "backward")
    assert phases[-1] == (14, "backward"), "stays at the end"
    assert (
        "is 1, since it is the result itself" in (explorer.set(step=6), explorer.alt)[1]
    )
    back.click()
    assert explorer.values["step"] == 5 and "pow_1 = sub ^ 2 is 0.1565" in explorer.alt


def test_graph_takes_tensors_modules_and_defaults():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    x = torch.randn(4, 3)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, scale=2.0):
            return scale * self.layer(x).square().mean()

    explorer = graph_explorer(Whole(), x=x)
    explorer.set(step=explorer.controls["step"].max)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(2 * layer(leaf).square().mean(), leaf)
    said = re.search(rf"gradient of x is \(4, 3\), norm {NUMBER}", explorer.alt)
    assert float(said[1]) == pytest.approx(slope.norm().item(), rel=1e-3)
    assert not x.requires_grad
    assert x.grad is None
    assert all(each.grad is None for each in layer.parameters())


def test_a_deep_graph_with_long_arrows_is_drawn():
    def deep(a, b, c):
        h = torch.relu(a * b + c)
        return (h * a + h - c / b).exp().log() * h

    explorer = graph_explorer(deep, a=1.0, b=2.0, c=-0.5)
    for step in range(explorer.controls["step"].max + 1):
        explorer.set(step=step)
        assert explorer.error is None


def branching(x):
    return x if x > 0 else -x


def long(x):
    for _ in range(30):
        x = torch.sin(x)
    return x


@pytest.mark.parametrize(
    "function, inputs, words",
    [
        (neuron, {"w": 1.0}, ["inputs are w", "w, x, b, t"]),
        (neuron, NEURON | {"z": 1.0}, ["z", "allowed are w, x, b, t"]),
        (branching, {"x": 1.0}, ["cannot be traced", "does not branch"]),
        (lambda x: 2 * x, {"x": torch.ones(3)}, ["shape (3,)", "scalar"]),
        (
            lambda x: x * 2,
            {"x": torch.tensor(3)},
            ["scalar that depends on a floating input"],
        ),
        (lambda x: x, {"x": 1.0}, ["1 nodes"]),
        (long, {"x": 1.0}, ["31 nodes", "2 to 24"]),
        (lambda x: (x * 2, x), {"x": 1.0}, ["a tuple"]),
    ],
)
def test_graph_refuses(function, inputs, words):
    with pytest.raises(ValueError) as error:
        graph_explorer(function, **inputs)
    one_sentence(error, *words)


# descent


@given(
    st.floats(-2, 2),
    st.floats(-1, 1),
    st.floats(0.001, 0.09),
    st.floats(0, 0.9),
    st.integers(0, 25),
)
@settings(max_examples=25, deadline=None)
def test_walk_is_the_walk_by_hand_and_torchs(x, y, rate, momentum, steps):
    places, losses = descend(valley, (x, y), rate, momentum, steps)
    place, speed, by_hand = np.array([x, y]), np.zeros(2), []
    for _ in range(steps + 1):
        by_hand.append(place)
        speed = momentum * speed + place * [1, 20]
        place = place - rate * speed
    assert np.allclose(places, by_hand, atol=1e-9)
    assert np.allclose(losses, [(x**2 + 20 * y**2) / 2 for x, y in by_hand], atol=1e-9)
    theirs = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theirs], lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        valley(*theirs).backward()
        optimizer.step()
    assert np.allclose(places[-1], theirs.detach(), atol=1e-9)


def test_descent_says_where_it_ends():
    explorer = descent_explorer(valley, (-1.8, 0.6), rate=0.05)
    explorer.set(rate=0.07, momentum=0.5, steps=20)
    places, losses = descend(valley, (-1.8, 0.6), 0.07, 0.5, 20)
    said = re.search(
        rf"from {NUMBER} to {NUMBER}; the trajectory ends at \({NUMBER}, {NUMBER}\)",
        explorer.alt,
    )
    assert [float(each) for each in said.groups()] == pytest.approx(
        [losses[0], losses[-1], *places[-1]], rel=1e-3
    )
    assert "diverges" not in explorer.alt


def test_divergence_is_said_at_the_rate_of_theory():
    explorer = descent_explorer(valley, (-1.8, 0.6), rate=0.099)
    explorer.set(steps=60)
    assert "diverges" not in explorer.alt
    explorer.set(rate=0.101, steps=60)
    assert "it diverges" in explorer.alt and explorer.error is None


def test_a_loss_that_is_no_number_any_more_is_drawn_and_said():
    for loss, ending in (
        (lambda x, y: torch.exp(x**2) + y**2, "up to infinity"),
        (lambda x, y: (x + 3).log() + y**2, "to a value that is no number"),
    ):
        explorer = descent_explorer(loss, (1.5, 1.0), rate=0.01)
        assert "diverges" not in explorer.alt
        explorer.set(rate=10, steps=60)
        assert explorer.error is None
        assert "it diverges" in explorer.alt
        assert ending in explorer.alt


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"start": (5.0, 0.0)}, ["start is (5.0, 0.0)"]),
        ({"rate": 0}, ["rate is 0"]),
        ({"max_steps": 0}, ["max_steps 0"]),
        ({"loss": lambda x, y: (x * y).sum()}, ["loss gives a tensor of shape ()"]),
        ({"loss": lambda x, y: 0 * x}, ["same everywhere"]),
    ],
)
def test_descent_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        descent_explorer(**{"loss": valley, "start": (0.5, 0.5)} | arguments)
    one_sentence(error, *words)


# attention


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_attention_is_the_models_and_rows_sum_to_one(letters, form, monkeypatch):
    model = small_encoder(attn_implementation=form).train()
    drawn = []
    monkeypatch.setattr(
        "bigmodel_nb.kit.widgets.draw_attention",
        lambda words, weights, *rest: (
            drawn.append((words, weights)),
            line(0, str(len(drawn))),
        )[1],
    )
    explorer = attention_explorer(model, letters, "not it")
    explorer.set(layer=1, head=3)
    words, weights = drawn[-1]
    assert words == ["[CLS]", *"notit", "[SEP]"] and weights.shape == (7, 7)
    assert np.allclose(weights.sum(1), 1, atol=1e-6)
    assert model.training and model.config._attn_implementation == form, (
        "left as it was"
    )
    plain = small_encoder(attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = plain(
            **letters("not it", return_tensors="pt"), output_attentions=True
        ).attentions[0][0, 2]
    assert np.allclose(weights, expected, atol=1e-6)


def test_attention_says_where_each_token_looks(letters):
    explorer = attention_explorer(small_encoder(), letters, "ab")
    said = re.findall(rf"(\S+) to (\S+) {NUMBER}(?=[;.])", explorer.alt)
    assert [token for token, *_ in said] == ["[CLS]", "a", "b", "[SEP]"]
    assert all(0.25 <= float(value) <= 1 for *_, value in said)


def test_the_model_runs_once_for_each_text(letters):
    model, calls = small_encoder(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    explorer = attention_explorer(model, letters, "one")
    for head in range(1, 5):
        explorer.set(head=head, layer=1)
    assert len(calls) == 1
    explorer.set(text="two")
    assert len(calls) == 2


def test_long_texts_are_cut_and_empty_ones_refused(letters):
    explorer = attention_explorer(small_encoder(), letters, "short", max_tokens=12)
    assert "cut" not in explorer.alt
    for text in ("x" * 11, "long " * 50, "y " * 200_000):
        explorer.set(text=text)
        assert "cut to 12 tokens" in explorer.alt
        assert len(re.findall(rf"\S+ to \S+ {NUMBER}(?=[;.])", explorer.alt)) == 12
    explorer.set(text="x" * 10)
    assert "cut" not in explorer.alt
    assert len(re.findall(rf"\S+ to \S+ {NUMBER}(?=[;.])", explorer.alt)) == 12
    explorer.set(text=" \n ")
    assert explorer.picture is None
    assert (
        explorer.alt
        == "Nothing is drawn. ValueError: text is empty; allowed is at least one word"
    )
    explorer.set(text="again")
    assert explorer.error is None


@pytest.fixture(scope="module")
def typed(letters):
    return attention_explorer(small_encoder(), letters, "start", max_tokens=12)


@given(text=st.text(max_size=30))
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_a_learner_types_is_drawn_or_said(typed, text):
    typed.set(text=text)
    if text.strip():
        assert typed.error is None, typed.error
    else:
        assert "text is empty" in typed.alt


def test_attention_refuses(letters):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, **inputs):
            return type("Output", (), {"attentions": ()})()

    with pytest.raises(ValueError) as error:
        attention_explorer(Silent(), letters)
    one_sentence(error, "Silent that gives no attention", "attn_implementation='eager'")
    for wrong in (2, 65, "many"):
        with pytest.raises(ValueError) as error:
            attention_explorer(small_encoder(), letters, max_tokens=wrong)
        one_sentence(error, f"max_tokens is {wrong!r}", "3 to 64")


# attack


@pytest.mark.parametrize("channels", [1, 3])
def test_attack_says_what_the_model_says(channels):
    model, images, targets = digits(channels=channels)
    explorer = attack_explorer(
        model, images, targets, signs, labels=["$a", "b", "c", "d"]
    )
    for norm, radius in (("linf", 0.1), ("l2", 2.5)):
        explorer.set(image=2, norm=norm, radius=radius, steps=3)
        x = images[2:3]
        found = signs(model, x, targets[2:3], radius, norm, 3)
        before, after = (torch.softmax(model(each), 1)[0] for each in (x, found))
        said = re.search(
            rf"True class c: probability {NUMBER} on the image,"
            rf" {NUMBER} on the attacked one",
            explorer.alt,
        )
        assert [float(each) for each in said.groups()] == pytest.approx(
            [before[2].item(), after[2].item()], rel=1e-3
        )
        name = ["$a", "b", "c", "d"][after.argmax()]
        assert f"as {name}." in explorer.alt
        size = re.search(
            rf"largest change of a pixel {NUMBER}, l2 norm {NUMBER}$",
            explorer.alt.rstrip("."),
        )
        change = found - x
        assert [float(each) for each in size.groups()] == pytest.approx(
            [change.abs().max().item(), change.norm().item()], rel=1e-3
        )


def test_the_norm_brings_its_own_radii():
    explorer = attack_explorer(*digits(), signs, radii={"linf": 0.2, "l2": 2.0})
    assert explorer.values["radius"] == pytest.approx(0.1)
    drawn = []
    draw = explorer._draw
    explorer._draw = lambda **values: (drawn.append(values), draw(**values))[1]
    explorer.controls["norm"].value = "l2"
    assert explorer.values["radius"] == pytest.approx(1.0)
    assert explorer.controls["radius"].max == 2.0
    assert len(drawn) == 1 and drawn[0]["radius"] == pytest.approx(1.0), (
        "one picture, of the new norm and its radius"
    )
    with pytest.raises(
        ValueError, match="radius is 1.5; allowed are numbers from 0 to 0.2"
    ):
        explorer.set(norm="linf", radius=1.5)
    assert explorer.values["norm"] == "l2"
    assert explorer.values["radius"] == pytest.approx(1.0)
    explorer.controls["norm"].value = "linf"
    assert explorer.values["radius"] == pytest.approx(0.1)


def test_radius_zero_changes_nothing_and_an_attack_that_fails_is_said():
    model, images, targets = digits()
    explorer = attack_explorer(model, images, targets, signs)
    explorer.set(radius=0)
    assert explorer.error is None
    assert "largest change of a pixel 0, l2 norm 0" in explorer.alt

    def failing(model, x, y, radius, norm, steps):
        if steps > 15:
            raise ValueError("steps is too large; allowed are a few")
        return x

    explorer = attack_explorer(model, images, targets, failing)
    explorer.set(steps=20)
    assert (
        explorer.alt
        == "Nothing is drawn. ValueError: steps is too large; allowed are a few"
    )


def test_attack_refuses():
    model, images, targets = digits()
    for wrong in (
        (images[0], targets),
        (images[:0], targets[:0]),
        (images, targets[:2]),
    ):
        with pytest.raises(ValueError) as error:
            attack_explorer(model, *wrong, signs)
        one_sentence(
            error, "images has shape", "allowed are (batch, channel, height, width)"
        )


# labels


def test_labels_say_values_intervals_and_what_is_missing():
    explorer = label_explorer(results())
    assert explorer.values == {"labels": 256}, (
        "all rows, where every method is at its best"
    )
    explorer.set(labels=64)
    assert "frozen is highest: 0.720; intervals overlap" in explorer.alt
    assert (
        "fine-tuned 0.700 [0.650, 0.740]; frozen 0.720 [0.670, 0.760]" in explorer.alt
    )
    explorer.set(labels=16)
    assert "fine-tuned is highest: 0.500, its interval apart" in explorer.alt, (
        "0.45 to 0.54 and 0.35 to 0.44"
    )
    explorer.set(labels=256)
    assert "frozen not measured here" in explorer.alt
    assert "fine-tuned is highest: 0.900." in explorer.alt
    with pytest.raises(ValueError, match="labels is 100; allowed are 16, 64, 256"):
        explorer.set(labels=100)


def test_labels_call_none_highest_where_methods_tie():
    rows = [(12, name, 1.0, 0.7, 1.0) for name in ("frozen", "fine-tuned")]
    explorer = label_explorer(
        pd.DataFrame(rows, columns=["labels", "method", "value", "low", "high"])
    )
    assert explorer.alt.startswith(
        "With 12 labels frozen and fine-tuned are equal: 1.000; intervals overlap."
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda rows: rows.drop(columns="low"),
            [
                "allowed is one row or more with the columns"
                " labels, method, value, low, high"
            ],
        ),
        (lambda rows: rows.iloc[:0], ["0 rows"]),
        (lambda rows: rows.assign(low=0.99), ["low <= value <= high"]),
        (lambda rows: pd.concat([rows, rows]), ["one row for each method"]),
        (lambda rows: rows.assign(value=math.nan), ["'value': nan"]),
        (
            lambda rows: rows.assign(labels=rows["labels"] - 16),
            ["positive number of labels"],
        ),
        (
            lambda rows: pd.concat(
                [rows.assign(method=str(k)) for k in range(8)]
            ).drop_duplicates(["labels", "method"]),
            ["8 methods", "up to 6"],
        ),
    ],
)
def test_labels_refuse(change, words):
    with pytest.raises(ValueError) as error:
        label_explorer(change(results()))
    one_sentence(error, *words)


# what is committed and reported


def test_sync_keeps_the_image_and_drops_the_view_beside_it():
    import sys
    from pathlib import Path

    from nbformat.v4 import output_from_msg

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    try:
        import sync
    finally:
        sys.path.pop(0)
    data, metadata = two()._repr_mimebundle_()
    message = {
        "header": {"msg_type": "display_data"},
        "content": {"data": data, "metadata": metadata},
    }
    alone = {
        "header": {"msg_type": "display_data"},
        "content": {"data": {sync.VIEW: {}, "text/plain": "a"}, "metadata": {}},
    }
    kept, other = sync.without_views([output_from_msg(message), output_from_msg(alone)])
    assert sorted(kept["data"]) == ["image/png", "text/plain"]
    assert kept["metadata"]["image/png"]["alt"] == "A line at 0.5 for a"
    assert sync.VIEW in other["data"], "what has no image stays as it is"
