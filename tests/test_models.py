"""Chapter 3: models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_nb.data.sources import digits, loader, split_indices
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.kit.core import Proportion
from bigmodel_nb.models.convolution import SmallConvNet


@given(
    st.integers(4, 40),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_any_size_gives_logits_with_gradients_everywhere(
    image_size, in_channels, num_classes, width, batch
):
    torch.manual_seed(image_size)
    model = SmallConvNet(image_size, in_channels, num_classes, width)
    logits = model(torch.rand(batch, in_channels, image_size, image_size))
    assert logits.shape == (batch, num_classes) and logits.isfinite().all()
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_large_images_need_no_large_head():
    model = SmallConvNet(image_size=200, in_channels=3, width=8)
    assert model.head.in_features <= 3 * 3 * 32
    assert model(torch.rand(1, 3, 200, 200)).shape == (1, 10)


def test_examples_do_not_influence_each_other_and_modes_do_not_differ():
    model, images = SmallConvNet().double(), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model.eval()(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_signal_keeps_its_size_through_many_stages():
    torch.manual_seed(0)
    model, images = SmallConvNet(image_size=64, width=32), torch.rand(4, 1, 64, 64)
    sizes = [images := stage[:4](images) for stage in model.stages]
    before_pooling = [size.square().mean().sqrt().item() for size in sizes]
    assert all(0.1 < size < 5 for size in before_pooling), before_pooling


def test_same_seed_same_weights():
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(SmallConvNet().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_reads_digits():
    images, targets = digits()
    train, test = split_indices(targets, (0.7, 0.3))
    torch.manual_seed(2)
    model = SmallConvNet()
    batches = loader(images[train], targets[train], batch_size=64, shuffle=True, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
    with torch.no_grad():
        result = Proportion.of(
            (model(images[test]).argmax(1) == targets[test]).sum(), len(test)
        )
    assert result.value >= 0.975, str(result)


@pytest.mark.parametrize(
    "name, value, least",
    [
        ("image_size", 3, 4),
        ("image_size", 8.0, 4),
        ("in_channels", 0, 1),
        ("num_classes", 0, 1),
        ("width", -1, 1),
        ("width", True, 1),
    ],
)
def test_sizes_that_cannot_work_are_refused(name, value, least):
    with pytest.raises(
        ValueError,
        match=f"{name} is {value!r}; allowed is an integer of at least {least}",
    ):
        SmallConvNet(**{name: value})


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (2, 8, 8, 1), (2, 3, 8, 8), (2, 1, 9, 9), (2, 64)]
)
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"input has shape .*; allowed is \(batch, 1, 8, 8\)"
    ):
        SmallConvNet(width=2)(torch.zeros(shape))


def test_bytes_are_refused():
    with pytest.raises(
        TypeError,
        match="input is torch.uint8;"
        " allowed are floating numbers in .0, 1.: divide bytes by 255",
    ):
        SmallConvNet(width=2)(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def expect_convolution(m):
    """What the lesson must find at the quick budget."""
    assert m["test_accuracy"]["value"] > 0.96, (
        "the network classifies digits after seconds of training"
    )
    assert m["linear_accuracy"]["value"] > 0.94, (
        "the baseline is trained until it stops improving"
    )
    assert m["late_gain_of_linear"]["low"] <= 0.002, (
        "which the last quarter of its epochs shows"
    )
    assert m["gain_over_linear"]["low"] > 0, (
        "the network is better than the trained baseline, beyond what seeds change"
    )
    assert m["without_relu_over_linear"]["low"] <= 0, (
        "without ReLU it is no better than the baseline"
    )
    assert (
        max(m["nonlinearity"]["linear"], m["nonlinearity"]["without ReLU"])
        < 1e-3
        < m["nonlinearity"]["convolutional"]
    ), "because it is affine then"
    assert m["shifted_gain_over_linear"]["low"] > 0.1, (
        "a shift of one pixel costs the linear classifier much more"
    )
    moved = m["cosine_of_filters"]
    assert moved["stages.0.0"] == max(moved.values()) > 0.95, (
        "the first layer moves least, and hardly at all"
    )
    assert m["frozen_first_layer_over_trained"]["high"] > -0.01, (
        "so it may as well stay as it was drawn"
    )
    assert (
        m["rms_after_twelve_layers"]["He"]
        > 100 * m["rms_after_twelve_layers"]["default"]
    ), "He initialisation keeps the activations"
    assert m["matrix_product_times_faster"] > 5, (
        "one matrix product is faster than loops over positions"
    )
    assert m["equivariance_difference"] < 1e-6, "the feature map shifts with the image"
    assert m["largest_difference_from_torch"] < 1e-10, "the convolution is torch's"
