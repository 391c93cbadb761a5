"""ResNet and ViT: beside torchvision's and transformers' own, image by image, and what
cannot be built, read or converted is named."""

import math

import pytest
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VisionTransformer

from bigmodel_nb.kit.core import count_parameters
from bigmodel_nb.models import convolution, vision
from bigmodel_nb.models.vision import (
    ResidualBlock,
    ResNet,
    ViT,
    ViTConfig,
    from_torchvision,
    from_transformers,
)

SIZES = {"image_size": 32, "patch_size": 8}


def of_transformers(**options):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=7,
            **SIZES,
            **options,
        )
    )


def of_torchvision(**options):
    sizes = dict(num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7)
    return VisionTransformer(**SIZES, **{**sizes, **options})


LIBRARY = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet18, 5 classes": lambda: torchvision.models.resnet18(num_classes=5),
    "vit, torchvision": of_torchvision,
    "vit, transformers": of_transformers,
}


def moved(model):
    """Other weights and running means than those of the start; in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for each in model.double().parameters():
            each.add_(0.05 * torch.randn_like(each))
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    return model.eval()


def logits(model, images):
    out = model(images)
    return out if torch.is_tensor(out) else out.logits


@pytest.mark.parametrize("name", LIBRARY)
def test_logits_and_gradients_are_those_of_the_library(name):
    theirs = moved(LIBRARY[name]())
    convert = from_transformers if hasattr(theirs, "config") else from_torchvision
    ours = convert(theirs)
    assert not ours.training and ours.head.weight.dtype == torch.float64
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    answers = [logits(each, images) for each in (ours, theirs)]
    assert (answers[0] - answers[1]).abs().max() < 1e-9 * answers[1].abs().max()
    gradients = []
    for each, answer in zip((ours, theirs), answers):
        first = next(m for m in each.modules() if isinstance(m, nn.Conv2d)).weight
        gradients += torch.autograd.grad(answer.square().sum(), first)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-9 * gradients[1].abs().max()
    with torch.no_grad():
        ours.head.weight.zero_()
    assert logits(theirs, images).std() > 0, "weights are copies"


def test_the_published_numbers_of_parameters_come_out():
    with torch.device("meta"):
        found = {
            "ResNet-18": ResNet(),
            "ResNet-34": ResNet((3, 4, 6, 3)),
            "ResNet-50": ResNet((3, 4, 6, 3), bottleneck=True),
            "ResNet-101": ResNet((3, 4, 23, 3), bottleneck=True),
            "ViT-B/16": ViT(ViTConfig()),
            "ViT-B/32": ViT(ViTConfig(patch_size=32)),
            "ViT-L/16": ViT(ViTConfig(n_embd=1024, n_layer=24, n_head=16)),
        }
    assert {name: count_parameters(model) for name, model in found.items()} == {
        "ResNet-18": 11_689_512,
        "ResNet-34": 21_797_672,
        "ResNet-50": 25_557_032,
        "ResNet-101": 44_549_160,
        "ViT-B/16": 86_567_656,
        "ViT-B/32": 88_224_232,
        "ViT-L/16": 304_326_632,
    }


@given(
    st.lists(st.integers(1, 2), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(4, 40),
    st.integers(4, 40),
)
@settings(max_examples=30, deadline=None)
def test_a_resnet_of_any_size_reads_images_of_any_size(
    layers, width, classes, channels, bottleneck, small, height, wide
):
    torch.manual_seed(height)
    model = ResNet(tuple(layers), width, classes, channels, bottleneck, small)
    found = model(torch.rand(3, channels, height, wide))
    assert found.shape == (3, classes) and found.isfinite().all()
    found.square().sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    model.eval()
    images = torch.rand(3, channels, height, wide)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, rtol=1e-3, atol=1e-4)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_a_vit_of_any_size_gives_logits_with_gradients_everywhere(
    patch, side, channels, heads, width, layers
):
    torch.manual_seed(patch)
    config = ViTConfig(
        patch * side, patch, channels, 6, 2 * heads * width, layers, heads
    )
    model = ViT(config)
    images = torch.rand(3, channels, patch * side, patch * side)
    vectors = model.encode(images)
    assert vectors.shape == (3, side**2 + 1, config.n_embd)
    assert config.n_patches == side**2
    found = model(images)
    assert found.shape == (3, 6) and found.isfinite().all()
    found.square().sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(found, alone, atol=1e-5)


def test_an_untrained_classifier_is_near_the_logarithm_of_its_classes():
    losses = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = ViT(ViTConfig(32, 8, 3, 10, 64, 2, 4))
        found = model(torch.rand(64, 3, 32, 32))
        losses.append(nn.functional.cross_entropy(found, torch.randint(10, (64,))))
    assert abs(torch.stack(losses).mean() - math.log(10)) < 0.25


def test_each_overfits_one_batch():
    torch.manual_seed(0)
    images, targets = torch.rand(16, 1, 8, 8), torch.randint(10, (16,))
    for model in (
        ResNet((1, 1), 16, 10, 1, small=True),
        ViT(ViTConfig(8, 2, 1, 10, 32, 2, 4)),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(200):
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05


def test_a_residual_block_that_adds_nothing_lets_pass_what_is_positive():
    block = ResidualBlock(6, 6).eval()
    nn.init.zeros_(block.norms[-1].weight)
    x = torch.rand(2, 6, 5, 5)
    assert torch.equal(block(x), x)
    assert ResidualBlock(6, 4, 2)(x).shape == (2, 4, 3, 3)
    assert ResidualBlock(6, 4, bottleneck=True)(x).shape == (2, 16, 5, 5)


def test_the_small_network_is_here_too():
    assert vision.SmallConvNet is convolution.SmallConvNet
    assert "SmallConvNet" in vision.__all__


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ResNet(()), "layers is empty; allowed is at least one stage"),
        (
            lambda: ResNet((1, 0)),
            "layers[1] is 0; allowed is an integer of at least 1",
        ),
        (
            lambda: ResNet(width=2.5),
            "width is 2.5; allowed is an integer of at least 1",
        ),
        (
            lambda: ViTConfig(30, 16),
            "patch_size is 16; allowed is a divisor of image_size, 30",
        ),
        (
            lambda: ViTConfig(n_layer=True),
            "n_layer is True; allowed is an integer of at least 1",
        ),
        (
            lambda: ViT(ViTConfig(8, 4, n_embd=10, n_head=4)),
            "num_heads is 4; allowed is a divisor of embed_dim, 10",
        ),
        (
            lambda: ResNet((1,), 4)(torch.rand(2, 1, 32, 32)),
            "input has shape (2, 1, 32, 32); allowed is (batch, 3, height, width)",
        ),
        (
            lambda: ViT(ViTConfig(8, 4, 1, 10, 8, 1, 1))(torch.rand(2, 1, 8, 9)),
            "input has shape (2, 1, 8, 9); allowed is (batch, 1, 8, 8)",
        ),
        (
            lambda: from_torchvision(torchvision.models.resnext50_32x4d()),
            "model has groups or dilated convolutions; allowed are plain ResNets",
        ),
        (
            lambda: from_torchvision(torchvision.models.wide_resnet50_2()),
            "model has 'layer1.0.conv1.weight' of shape (128, 64, 1, 1); allowed is"
            " (64, 64, 1, 1)",
        ),
        (
            lambda: from_torchvision(nn.Linear(2, 2)),
            "model is Linear; allowed are torchvision's ResNet, and its"
            " VisionTransformer without a stem of convolutions",
        ),
        (
            lambda: from_torchvision(of_torchvision(representation_size=9)),
            "model has 'heads.head.weight' of shape (7, 9); allowed is (7, 32)",
        ),
        (
            lambda: from_transformers(of_transformers(hidden_act="relu")),
            "model has hidden_act 'relu'; allowed is 'gelu'",
        ),
        (
            lambda: from_transformers(of_transformers(qkv_bias=False)),
            "model has qkv_bias False; allowed is True",
        ),
        (
            lambda: from_transformers(nn.Linear(2, 2)),
            "model is Linear; allowed is ViTForImageClassification",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(make, said):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == said


def test_integers_are_no_images():
    with pytest.raises(TypeError, match="divide bytes by 255"):
        ResNet((1,), 4)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_converted_model_has_no_dropout():
    theirs = of_torchvision(dropout=0.5).train()
    ours, images = from_torchvision(theirs), torch.rand(2, 3, 32, 32)
    assert torch.equal(ours(images), ours.train()(images))


def expect_vision(m):
    assert m["gradient_ratio"]["plain"] > 3 * m["gradient_ratio"]["residual"] > 3, (
        "the gradient grows towards the first layers, less so with residual connections"
    )
    assert m["gain_of_residual"]["low"] > 0.2, "which make thirty layers trainable"
    assert m["loss_of_deep"]["plain"] > m["loss_of_deep"]["residual"] + 0.5
    assert m["patch_difference"] < 1e-5, "a projection of patches is a convolution"
    for apart in m["difference_from_library"].values():
        assert apart["logits"] < 1e-9 and apart["gradient"] < 1e-9, (
            "models of the libraries answer alike in our form"
        )
    assert m["bag_difference"] < 1e-4, "without positions the order is nothing"
    assert m["gain_of_positions"]["low"] > 0, "and with them more digits are right"
    assert m["gain_of_resnet"][0]["value"] > 0.04, "with few labels the ViT is behind"
    assert m["gain_of_resnet"][-1]["low"] > 0, "and with all digits too"
    for name in ("resnet", "vit"):
        values = [each["value"] for each in m[f"accuracy_{name}"]]
        assert values == sorted(values), "more labels, more right"
    assert min(m["lowest_fitted"].values()) > 0.98, "the training images are learnt"
    assert m["shift_costs_resnet_less"]["low"] > 0, "a shift costs the ViT more"


undecided_vision = {
    "bag_accuracy": "one run of training, which one rounding can lead elsewhere",
}
