"""Learning from images without labels: contrast, self-distillation, hidden patches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.adapting.selfsup import frozen
from bigmodel_nb.adapting.selfvision import (
    Augment,
    ConvEncoder,
    MaskedAutoencoder,
    SelfDistillation,
    assignment_information,
    distillation,
    effective_rank,
    encode_some,
    masked_pixels,
    nt_xent,
    patchify,
    projected,
    simclr,
)
from bigmodel_nb.data.sources import loader
from bigmodel_nb.models.vision import ViT, ViTConfig
from bigmodel_nb.training.loop import fit


def expect_selfvision(m):
    assert m["off_loops"] < 1e-12 and m["off_encode"] < 1e-5
    assert max(m["of_library"].values()) < 1e-12
    gain = m["gain_of_augmentation"]
    assert gain["all"]["low"] > 0, "augmentation is what contrast learns from"
    assert gain["zoom, shift"]["value"] > 0.08
    by = m["accuracy_by_augmentation"]
    assert by["none"]["value"] < by["random weights"]["value"], (
        "contrast without augmentation is worse than none"
    )
    for few in ("1", "2", "20"):
        assert m["gain"]["SimCLR against pixels"][few]["value"] > 0.02, few
        poor = m["gain"]["MAE against pixels"][few]["value"] < 0
        assert poor, "a probe of MAE is poor"
    untrained = m["gain"]["MAE against a ViT with random weights"]
    assert all(untrained[few]["value"] > 0.04 for few in ("1", "2")), (
        "and yet better than that of the same network before its training"
    )
    assert m["probe_lost"]["no centring"]["value"] < 0, "a collapse costs its vectors"
    for name, by_labels in m["gain_over_scratch"].items():
        assert all(each["low"] < 0 for each in by_labels.values()), (
            f"{name}: no label is shown to be saved against a network from scratch"
        )
    assert {"SimCLR's probe", "SimCLR, fine-tuned"} <= m["gain_over_scratch"].keys()
    both = m["information"]["centring and sharpening"]
    for force, lost in m["information_lost"].items():
        assert lost["high"] < 0, f"{force}: collapse, in each run"
    assert m["information"]["no sharpening"] < 0.1 < 0.4 < both
    assert m["information"]["no centring"] < 0.5 * both, "each force is needed"
    assert m["loss_without_centring"]["value"] < m["loss_with_both_forces"]["value"], (
        "the loss is lower where the network has collapsed"
    )
    assert m["masked_error"]["high"] < m["constant_error"], (
        "hidden patches are told better than by their place"
    )


undecided_selfvision = {
    "information.centring and sharpening": "the spread of three runs",
    "information.no centring": "of runs that are about to collapse",
    "entropies_without_centring": "of runs that are about to collapse",
    "information_lost.no centring": "of runs that are about to collapse",
    "information_lost.no sharpening": "the spread of three runs",
    "effective_rank": "directions of almost no variance count",
}


def vit(size=8, patch=2, channels=1, seed=0):
    torch.manual_seed(seed)
    return ViT(ViTConfig(size, patch, channels, 3, 16, 1, 2))


@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.05, 3), st.integers(0, 9999))
@settings(deadline=None)
def test_nt_xent_is_its_formula(n, width, temperature, seed):
    "Against a double loop in float64; and it does not matter which view comes first."
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    z = [v / v.norm() for v in views.flatten(0, 1)]
    total = 0.0
    for i in range(2 * n):
        others = [float(z[i] @ z[k]) / temperature for k in range(2 * n) if k != i]
        top = max(others)
        total += math.log(sum(math.exp(x - top) for x in others)) + top
        total -= float(z[i] @ z[(i + n) % (2 * n)]) / temperature
    assert abs(nt_xent(*views, temperature).item() - total / (2 * n)) < 1e-9
    assert torch.isclose(nt_xent(*views), nt_xent(*views.flip(0)))


def test_nt_xent_has_the_gradient_of_its_value_and_says_what_is_wrong():
    views = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: nt_xent(*v, 0.4), (views,))
    perfect = torch.eye(5)
    assert nt_xent(perfect, perfect, 0.01) < 1e-6, "its own similarity is left out"
    with pytest.raises(ValueError, match="^first and second have the shapes"):
        nt_xent(perfect, perfect[:3])
    with pytest.raises(ValueError, match="^temperature is 0; allowed"):
        nt_xent(perfect, perfect, 0)


@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(4, 12),
    st.floats(0, 1),
    st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_views_keep_the_shape_and_are_finite(count, channels, side, strength, flip):
    images = torch.rand(count, channels, side, side)
    how = Augment((1 - strength / 2, 1.1), strength, strength, strength, strength, flip)
    seen = how(images)
    assert seen.shape == images.shape and seen.isfinite().all()


def test_without_changes_an_image_is_itself():
    images = torch.rand(5, 1, 8, 8)
    plain = Augment((1, 1), 0.0, 0.0, 0.0, 0.0)
    assert torch.equal(plain(images), images)
    flipped = Augment((1, 1), 0.0, 0.0, 0.0, 0.0, True)(images.repeat(20, 1, 1, 1))
    pairs = (
        flipped == images.repeat(20, 1, 1, 1),
        flipped == images.flip(3).repeat(20, 1, 1, 1),
    )
    same, mirrored = (each.flatten(1).all(1) for each in pairs)
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    with pytest.raises(ValueError, match="^images is torch.int64 of shape"):
        plain(torch.ones(1, 1, 8, 8).long())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"zoom": (0, 0)}, r"zoom is \(0, 0\)"),
        ({"zoom": (-1, -1)}, "zoom is"),
        ({"zoom": (1.1, 0.5)}, "zoom is"),
        ({"zoom": 0.8}, "zoom is 0.8; allowed are two numbers above 0"),
        ({"zoom": (1, math.inf)}, "zoom is"),
        ({"noise": -1}, "noise is -1; allowed is a number from 0 on"),
        ({"noise": math.nan}, "noise is nan; allowed"),
        ({"shift": math.inf}, "shift is inf; allowed"),
        ({"gain": 5}, "gain is 5; allowed is a number from 0 to 1"),
        ({"colour": -0.1}, "colour is -0.1; allowed"),
    ],
)
def test_changes_that_are_none_are_refused(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        Augment(**wrong)


def test_brightness_is_of_an_image_and_colour_of_a_channel():
    images = torch.rand(40, 3, 4, 4) + 0.1
    still = {"zoom": (1, 1), "shift": 0.0, "turn": 0.0, "noise": 0.0}
    brighter = (Augment(**still, gain=0.4)(images) / images).flatten(2)
    assert torch.allclose(brighter, brighter[:, :1, :1].expand_as(brighter), atol=1e-5)
    coloured = (Augment(**still, gain=0.0, colour=0.4)(images) / images).flatten(2)
    assert torch.allclose(coloured, coloured[:, :, :1].expand_as(coloured), atol=1e-5)
    assert (coloured[:, 0, 0] - coloured[:, 1, 0]).abs().max() > 0.1
    assert coloured.min() > 0.59 and coloured.max() < 1.41


def test_a_quarter_turn_is_that_of_torch(monkeypatch):
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    how = Augment((1, 1), 0.0, math.pi / 2, 0.0, 0.0)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(1))
    assert torch.allclose(how(images), images.rot90(1, (2, 3)), atol=1e-9) or (
        torch.allclose(how(images), images.rot90(-1, (2, 3)), atol=1e-9)
    )
    half = Augment((0.5, 0.5), 0.5, 0.0, 0.0, 0.0)  # the lower right quarter
    seen = half(images)
    by = F.interpolate(images[..., 4:, 4:], (8, 8), mode="bilinear")
    assert torch.allclose(seen[..., 2:-2, 2:-2], by[..., 2:-2, 2:-2], atol=1e-9)


def test_frozen_features_do_not_move_a_bit():
    torch.manual_seed(0)
    encoder = ConvEncoder(1, 4).train()
    before = {name: each.clone() for name, each in encoder.state_dict().items()}
    with frozen(encoder) as inside:
        assert not inside.training
        one = inside(torch.rand(9, 1, 8, 8))
    assert not one.requires_grad and encoder.training
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def moved(model, objective, callbacks=(), steps=4, images=None):
    images = torch.rand(16, 1, 8, 8) if images is None else images
    trained = [each for each in model.parameters() if each.requires_grad]
    batches = loader(images, torch.zeros(len(images)).long(), 8, shuffle=True)
    optimizer = torch.optim.AdamW(trained, 1e-2)
    own = {"optimizer": optimizer, "objective": objective, "callbacks": callbacks}
    return fit(model, batches, steps=steps, **own)


def test_simclr_is_nt_xent_of_two_views():
    model, images = projected(ConvEncoder(1, 2)), torch.rand(6, 1, 8, 8)
    augment = Augment()
    torch.manual_seed(1)
    views = [model(augment(images)), model(augment(images))]
    torch.manual_seed(1)
    assert torch.equal(simclr(augment, 0.2)(model, images, None), nt_xent(*views, 0.2))
    assert math.isfinite(moved(model, simclr(augment)).batch_losses[-1])


def test_the_teacher_is_the_moving_average_and_gets_no_gradient():
    torch.manual_seed(0)
    model = SelfDistillation(ConvEncoder(1, 2), 8, decay=0.9)
    slow = [each.clone() for each in model.teacher.parameters()]
    fast = []

    class Watch:
        def on_batch_end(self, history):
            fast.append([each.detach().clone() for each in model.student.parameters()])

    moved(model, distillation(Augment()), [Watch(), model])
    for weights in fast:
        slow = [0.9 * s + 0.1 * f for s, f in zip(slow, weights)]
    for expected, found in zip(slow, model.teacher.parameters()):
        assert torch.allclose(expected, found, atol=1e-6)
        assert found.grad is None and not found.requires_grad
    assert model.centre.abs().sum() > 0


def test_the_teacher_s_running_statistics_are_its_own():
    "They are taken of what its own weights make, and not copied from the student."
    torch.manual_seed(0)
    model = SelfDistillation(ConvEncoder(1, 2), 8).train()
    with torch.no_grad():
        for each in model.teacher[0][0].layers[0].parameters():
            each.mul_(3)
    distillation(Augment())(model, torch.rand(9, 1, 8, 8), None)
    before = {name: each.clone() for name, each in model.teacher.named_buffers()}
    model.on_batch_end(None)
    for name, each in model.teacher.named_buffers():
        assert torch.equal(each, before[name]), name
    own, student = (
        net[0][0].layers[1].running_var for net in (model.teacher, model.student)
    )
    assert not torch.allclose(own, student)


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"teacher_temperature": 0}, "a number above 0"),
        ({"student_temperature": -1}, "a number above 0"),
        ({"student_temperature": math.nan}, "a number above 0"),
        ({"decay": 1.5}, "a number from 0 to 1"),
        ({"decay": -3}, "a number from 0 to 1"),
        ({"centre_momentum": 2}, "a number from 0 to 1"),
    ],
)
def test_self_distillation_says_what_is_wrong(wrong, allowed):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}; allowed is {allowed}$"):
        SelfDistillation(ConvEncoder(), **wrong)


def test_the_centre_moves_by_its_momentum():
    model = SelfDistillation(ConvEncoder(1, 2), 8, centre_momentum=0.25).train()
    images, before = torch.rand(5, 1, 8, 8), model.centre.clone() + 1
    model.centre += 1
    logits = model.teacher(images).detach()
    distillation(lambda images: images)(model, images, None)
    moved_to = 0.25 * before + 0.75 * logits.mean(0)
    assert torch.allclose(model.centre, moved_to, atol=1e-5)


def test_distillation_is_its_formula():
    torch.manual_seed(0)
    model = SelfDistillation(ConvEncoder(1, 2), 8).eval()
    model.centre += torch.linspace(-1, 1, 8)
    images = torch.rand(5, 1, 8, 8)
    same = lambda images: images
    found = distillation(same)(model, images, None)
    p = F.softmax((model.teacher(images) - model.centre) / 0.04, 1)
    q = F.log_softmax(model.student(images) / 0.1, 1)
    assert torch.isclose(found, -(p * q).sum(1).mean())
    assert torch.allclose(model(images), p)
    model.train()
    before = model.centre.clone()
    logits = model.teacher(images).detach()
    distillation(same)(model, images, None)
    assert torch.allclose(model.centre, 0.9 * before + 0.1 * logits.mean(0), atol=1e-5)
    still = SelfDistillation(ConvEncoder(1, 2), 8, centring=False).train()
    distillation(same)(still, images, None)
    assert (still.centre == 0).all()


def test_each_view_is_predicted_from_the_other():
    torch.manual_seed(0)
    model, images = (
        SelfDistillation(ConvEncoder(1, 2), 8).eval(),
        torch.rand(5, 1, 8, 8),
    )
    views = [images, images.flip(3)]
    given = iter(views)
    found = distillation(lambda _: next(given))(model, images, None)
    p = [model(each) for each in views]
    q = [F.log_softmax(model.student(each) / 0.1, 1) for each in views]
    crossed = -(p[0] * q[1] + p[1] * q[0]).sum(1).mean() / 2
    assert torch.isclose(found, crossed)
    assert not torch.isclose(found, -(p[0] * q[0] + p[1] * q[1]).sum(1).mean() / 2)


def test_information_is_0_for_both_collapses_and_log_k_at_best():
    k = 6
    even = torch.full((30, k), 1 / k)
    one = F.one_hot(torch.zeros(30).long(), k).double()
    best = F.one_hot(torch.arange(30) % k, k).double()
    assert assignment_information(even) < 1e-6
    assert assignment_information(one) == 0
    assert abs(assignment_information(best) - math.log(k)) < 1e-12
    p = torch.rand(9, 4, dtype=torch.float64).softmax(1)
    mean = p.mean(0)  # the mean Kullback-Leibler divergence to the mean
    assert abs(assignment_information(p) - (p * (p / mean).log()).sum(1).mean()) < 1e-12
    for wrong in (torch.full((4,), 0.25), torch.ones(0, 4), torch.ones(4, 0)):
        with pytest.raises(ValueError, match="^probabilities has the shape"):
            assignment_information(wrong)
    nan = torch.full((3, 4), math.nan)
    for wrong in (torch.ones(3, 4), torch.tensor([[1.5, -0.5]]), nan):
        with pytest.raises(ValueError, match="^probabilities has the least entry"):
            assignment_information(wrong)


def test_effective_rank_counts_directions():
    base = torch.randn(60, 60, dtype=torch.float64)
    left = torch.linalg.qr(base - base.mean(0))[0][:, :5]
    assert abs(effective_rank(left) - 5) < 1e-6, "five directions, equally used"
    line = torch.randn(50, 1) @ torch.randn(1, 7)
    assert abs(effective_rank(line) - 1) < 1e-3
    assert effective_rank(torch.ones(9, 4)) == 0
    assert effective_rank(torch.zeros(9, 4)) == 0
    values = np.linalg.svd((base - base.mean(0)).numpy(), compute_uv=False)
    p = values / values.sum()
    expected = math.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert abs(effective_rank(base) - expected) < 1e-6
    for wrong in (torch.ones(3), torch.ones(1, 3), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="^vectors has the shape"):
            effective_rank(wrong)
    with pytest.raises(ValueError, match="^vectors holds numbers that are not finite"):
        effective_rank(torch.full((3, 2), math.nan))


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
@settings(deadline=None)
def test_patches_are_cut_row_by_row(size, channels):
    images = torch.randn(2, channels, 8, 8)
    patches = patchify(images, size)
    across = 8 // size
    for number in range(across**2):
        top, left = size * (number // across), size * (number % across)
        part = images[:, :, top : top + size, left : left + size]
        assert torch.equal(patches[:, number], part.flatten(1))
    for wrong in (3, 0, 16):
        with pytest.raises(ValueError, match=f"^size is {wrong} and images"):
            patchify(images, wrong)


def test_encoding_all_patches_is_encode_and_hidden_ones_do_not_matter():
    model, images = vit(8, 2, 3).double().eval(), torch.randn(4, 3, 8, 8).double()
    every = torch.arange(16).expand(4, -1)
    assert torch.allclose(encode_some(model, images, every), model.encode(images))
    kept = torch.rand(4, 16).argsort(1)[:, :4]
    seen = encode_some(model, images, kept)
    patches = patchify(images, 2)
    noisy = patches + 9 * torch.randn_like(patches)
    where = kept[..., None].expand(-1, -1, 12)
    noisy.scatter_(1, where, patches.gather(1, where))
    back = noisy.view(4, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 8, 8)
    assert torch.allclose(encode_some(model, back, kept), seen)
    turned = encode_some(model, images, kept.flip(1))
    assert torch.allclose(turned[:, 1:].flip(1), seen[:, 1:]), "the order is free"
    for wrong in (kept[:2], kept[0], kept.double()):
        with pytest.raises(ValueError, match="^kept is torch"):
            encode_some(model, images, wrong)
    for wrong in (kept - 16, kept + 16):
        with pytest.raises(ValueError, match="^kept holds numbers from"):
            encode_some(model, images, wrong)


def test_a_masked_autoencoder_hides_its_share_and_is_judged_by_it():
    torch.manual_seed(0)
    model = MaskedAutoencoder(vit(), 0.75).eval()
    images = torch.randn(6, 1, 8, 8)
    torch.manual_seed(3)
    said, hidden = model(images)
    assert said.shape == (6, 16, 4) and (hidden.sum(1) == 12).all()
    torch.manual_seed(3)
    loss = masked_pixels(model, images, None)
    wrong = (said - patchify(images, 2))[hidden]
    assert torch.isclose(loss, wrong.square().mean())
    for ratio in (0, 1, 0.01, -1, 2, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^ratio is {ratio}, .* of 16 patches"):
            MaskedAutoencoder(vit(), ratio)
    with pytest.raises(ValueError, match="^layers is -1; allowed"):
        MaskedAutoencoder(vit(), layers=-1)


def test_a_vit_that_is_wrapped_stays_as_it_was():
    given = vit()
    before = given.places.detach().clone()
    model = MaskedAutoencoder(given)
    assert model.vit is given and torch.equal(given.places, before)


def test_what_is_hidden_is_not_read():
    "A change of the hidden pixels changes no prediction."
    torch.manual_seed(0)
    model, images = MaskedAutoencoder(vit()).eval(), torch.randn(3, 1, 8, 8)
    torch.manual_seed(5)
    said, hidden = model(images)
    patches = patchify(images, 2)
    patches[hidden] += 5
    other = patches.view(3, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(3, 1, 8, 8)
    torch.manual_seed(5)
    assert torch.allclose(model(other)[0], said, atol=1e-6)


def test_a_masked_autoencoder_learns_what_its_neighbours_tell():
    torch.manual_seed(0)
    shade = torch.randn(64, 1, 1, 1).expand(-1, -1, 8, 8)  # of one grey each
    model = MaskedAutoencoder(vit())
    losses = moved(model, masked_pixels, steps=120, images=shade).batch_losses
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="^in_channels is 0"):
        ConvEncoder(0)
    with pytest.raises(ValueError, match="^prototypes is 1"):
        SelfDistillation(ConvEncoder(), 1)
    with pytest.raises(ValueError):
        ConvEncoder(3)(torch.rand(2, 1, 8, 8))
    assert isinstance(projected(ConvEncoder(1, 2), 5, 6)[1], nn.Sequential)
    with pytest.raises(TypeError, match="^encoder is a Linear without `channels`"):
        projected(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="^hidden is 0"):
        projected(ConvEncoder(1, 2), hidden=0)
