"""A base in four bits: levels, blocks, scales of scales, the layer, the whole base."""

import copy
import hashlib
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

from bigmodel_nb.adapting.lora import add_lora, merge_lora
from bigmodel_nb.adapting.qlora import (
    NF4,
    QuantizedLinear,
    dequantize_base,
    dequantize_blocks,
    dequantize_scales,
    model_bytes,
    normal_float,
    quantize_base,
    quantize_blocks,
    quantize_scales,
)

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "05_adapting" / "08_qlora.ipynb"


def expect_qlora(m):
    assert m["levels_apart"] < 2e-7, "the derived levels are the published ones"
    assert 4.12 < m["bits_a_weight"] < 4.13
    error = m["relative_error"]
    assert error["Q8_0"] < 0.01 < error["NF4"] < error["INT4"]
    assert 1.2 * error["INT8"] < error["INT8, scales in 8 bits"] < 0.015, "at 8 bits"
    assert error["NF4, blocks of 32"] < error["Q4_0"] < error["NF4"], "at 4.5 bits"
    assert 0 < error["NF4, scales in 8 bits"] - error["NF4"] < 0.001
    share = m["share_of_a_level"]
    assert share["least"] < 0.04 and share["most"] > 0.08, "not used equally"
    cosine = m["cosine"]
    assert cosine["INT8"] > 0.999 and cosine["NF4"] > 0.95
    assert cosine["NF4"] > cosine["INT4"] > cosine["NF2"]
    assert m["loss_by_bits"]["NF4"]["high"] > 0, "four bits are not told apart"
    assert m["stored_bytes"]["NF4"] < 0.62 * m["stored_bytes"]["float32"]
    assert abs(m["gain_of_qlora_over_lora"]["value"]) < 0.05
    left = m["left_of_merged"]
    assert 0 < min(left) and max(left) < 0.8, "rounding takes much of a merged adapter"
    harm = m["error_of_others"]
    assert harm["one scale, one outlier"] > 0.5, "one outlier ruins a layer"
    assert harm["blocks of 64, one outlier"] < 1.1 * harm["blocks of 64, as it is"]


class Net(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_levels_are_the_published_ones():
    assert torch.allclose(normal_float(4), NF4.double(), atol=2e-7)
    for bits in range(2, 9):
        levels = normal_float(bits)
        assert len(levels) == 2**bits and (levels.diff() > 0).all()
        assert levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_codes_and_scales_are_those_of_bitsandbytes():
    """Of bitsandbytes 0.50.2, `quantize_4bit(weight, quant_type="nf4")`."""
    k = torch.arange(48 * 128)
    weight = ((k * k * 7919 % 4093 - 2046) * (k * 31 % 61)).float().view(48, 128) / 1024
    codes, scales = quantize_blocks(weight)
    assert digest(codes) == "5a6766a59999e99d"
    assert digest(scales) == "afcac50843bc72ef"
    assert digest(dequantize_blocks(codes, scales, weight.shape)) == "fed0efbd138a6cb3"


def test_any_weight_becomes_what_bitsandbytes_makes_of_it():
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes, which is no dependency"
    )
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), NF4)
    torch.manual_seed(1)
    for shape in ((64, 64), (384, 384), (30, 128)):
        weight = torch.randn(shape) * torch.rand(shape)
        theirs, state = functional.quantize_4bit(weight, quant_type="nf4")
        codes, scales = quantize_blocks(weight)
        assert torch.equal(scales, state.absmax)
        assert torch.equal(codes, theirs.flatten())
        restored = functional.dequantize_4bit(theirs, state)
        assert torch.equal(dequantize_blocks(codes, scales, shape), restored)


@given(
    st.integers(1, 9),
    st.integers(1, 41),
    st.sampled_from([2, 16, 64]),
    st.sampled_from([2, 3, 4, 5, 8]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_each_weight_becomes_the_nearest_level(out, inside, block, bits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inside, generator=generator).to(dtype)
    levels = normal_float(bits).float()
    codes, scales = quantize_blocks(weight, levels, block)
    count = -(-weight.numel() // block)
    assert codes.dtype == torch.uint8 and scales.shape == (count,)
    assert len(codes) == count * block // (2 if bits <= 4 else 1)
    restored = dequantize_blocks(codes, scales, weight.shape, levels, block)
    flat, scale = weight.float().flatten(), scales.repeat_interleave(block)
    scale = scale[: len(flat)]
    nearest = (flat[:, None] - scale[:, None] * levels).abs().amin(1)
    apart = (restored.flatten() - flat).abs()
    assert torch.allclose(apart, nearest, atol=1e-5 * float(scale.max()))


def test_zeros_stay_zeros():
    codes, scales = quantize_blocks(torch.zeros(3, 64))
    assert not dequantize_blocks(codes, scales, (3, 64)).any()
    layer = nn.Linear(64, 3)
    nn.init.zeros_(layer.weight)
    assert not QuantizedLinear(layer).dequantize().any()


@given(st.integers(1, 700), st.integers(0, 2**31))
def test_scales_of_scales(count, seed):
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    short, outer, mean = quantize_scales(scales)
    assert short.dtype == torch.float8_e4m3fn and len(short) == 256 * len(outer)
    back = dequantize_scales(short, outer, mean, count)
    # three bits of mantissa: half a step is a sixteenth of what is left of the mean
    bound = (scales - scales.mean()).abs() / 16 + outer.max() * 2**-9 + 1e-6
    assert ((back - scales).abs() <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("double", [True, False])
def test_layer_equals_a_linear_layer_of_the_restored_weight(bits, double):
    torch.manual_seed(2)
    linear = nn.Linear(96, 40)
    layer = QuantizedLinear(linear, bits, double=double)
    plain = copy.deepcopy(linear)
    plain.weight.data = layer.dequantize()
    results = []
    for each in (layer, plain):
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(3))
        x.requires_grad_()
        output = each(x)
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        results.append((output, gradient))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < (0.12 if bits == 4 else 0.01)


def test_gradients_by_central_differences():
    layer = QuantizedLinear(nn.Linear(6, 4, bias=False))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_nothing_is_stored_for_the_backward_pass():
    layer, stored = QuantizedLinear(nn.Linear(64, 64, bias=False)), []
    x = torch.randn(2, 64, requires_grad=True)
    keep = lambda tensor: stored.append(tensor) or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    assert not stored and x.grad is not None


def test_bits_a_weight(net):
    layer = QuantizedLinear(nn.Linear(512, 512, bias=False))
    held = sum(each.nbytes for each in layer.state_dict().values())
    assert 8 * held / 512**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_a_change_of_type_leaves_codes_and_scales():
    layer = QuantizedLinear(nn.Linear(64, 32))
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), before)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_chooses_the_type_of_the_product():
    layer = QuantizedLinear(nn.Linear(64, 32))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    weight = layer.dequantize().to(torch.bfloat16)
    expected = F.linear(x.detach().bfloat16(), weight) + layer.bias.bfloat16()
    torch.testing.assert_close(output, expected)
    assert x.grad.dtype == torch.float32


def test_state_goes_into_another_layer_and_through_a_copy():
    first, second = (QuantizedLinear(nn.Linear(64, 32)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), copy.deepcopy(first)(x))


def test_a_base_is_quantised_but_for_what_is_skipped(net):
    before, x = copy.deepcopy(net), torch.randn(4, 64)
    assert quantize_base(net, skip=["head"]) is net
    assert isinstance(net.first, QuantizedLinear)
    assert type(net.head) is nn.Linear
    assert model_bytes(net) < 0.2 * model_bytes(before)
    assert (net(x) - before(x)).norm() / before(x).norm() < 0.3
    packed = net(x)
    dequantize_base(net)
    assert type(net.first) is nn.Linear and not net.first.weight.requires_grad
    torch.testing.assert_close(net(x), packed)


def test_a_tied_weight_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 64)
            self.inner, self.out = nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
            self.out.weight = self.embedding.weight

    model = quantize_base(Tied())
    assert model.out.weight is model.embedding.weight
    assert isinstance(model.inner, QuantizedLinear)


def test_an_adapter_trains_on_a_quantised_base_and_the_base_stays(net):
    quantize_base(net, skip=["head"])
    codes = {n: b.clone() for n, b in net.named_buffers()}
    add_lora(net, rank=4, targets=["first", "second"], trainable=["head"])
    x, target = torch.randn(64, 64), torch.randint(3, (64,))
    adapted = [each for each in net.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(adapted, lr=0.01)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    after = {n.replace(".base.", "."): b for n, b in net.named_buffers()}
    assert all(torch.equal(after[name], value) for name, value in codes.items())


def test_an_adapter_is_merged_after_the_base_was_restored(net):
    quantize_base(net, skip=["head"])
    add_lora(net, rank=4, targets=["first", "second"])
    for name, each in net.named_parameters():
        if each.requires_grad:
            nn.init.normal_(each, std=0.1)
    x = torch.randn(4, 64)
    beside = net(x)
    with pytest.raises(ValueError):
        merge_lora(net)
    merged = merge_lora(dequantize_base(net), unload=True)
    torch.testing.assert_close(merged(x), beside)


def test_a_layer_that_is_all_of_the_model_cannot_be_replaced():
    said = "model is itself a linear layer; allowed is a model that holds some"
    layer = nn.Linear(64, 64)
    for call in (quantize_base, dequantize_base):
        with pytest.raises(ValueError, match=said):
            call(layer if call is quantize_base else QuantizedLinear(layer))
    assert not list(layer.children())


@pytest.mark.parametrize("unpack", [False, True])
def test_a_layer_in_two_places_stays_one_layer(unpack):
    model = nn.Module()
    model.first = model.second = nn.Linear(64, 64)
    model.other = nn.Linear(64, 64).eval()
    quantize_base(model, skip=["other"])
    kind = QuantizedLinear
    if unpack:
        dequantize_base(model)
        kind = nn.Linear
    assert type(model.first) is kind and model.second is model.first
    assert type(model.other) is nn.Linear and not model.other.training
    with pytest.raises(ValueError, match="is a Module without a linear layer"):
        quantize_base(dequantize_base(model), skip=["second", "other"])


def test_what_an_adapter_trains_whole_is_not_quantised(net):
    add_lora(net, rank=4, targets=["first"], trainable=["head"])
    before = [type(each) for each in net.modules()]
    with pytest.raises(ValueError) as raised:
        quantize_base(net)
    said = "model has adapters, which train 'head'; allowed is to quantise before"
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)
    assert before == [type(each) for each in net.modules()]
    quantize_base(net, skip=["head"])
    assert isinstance(net.first.base, QuantizedLinear)
    assert isinstance(net.second, QuantizedLinear)
    for head in (net.head.base, net.head.adapters["default"]):
        assert type(head) is nn.Linear


def test_scales_are_quantised_where_it_costs_little():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    linear.weight.data[0] /= 100  # as a pruned unit's
    assert QuantizedLinear(linear).double and not QuantizedLinear(linear, 8).double
    errors = {}
    for double in (None, True, False):
        layer = QuantizedLinear(linear, 8, double=double)
        apart = (layer.dequantize() - linear.weight)[0]
        errors[double] = (apart.norm() / linear.weight[0].norm()).item()
    assert errors[None] == errors[False] < 0.01 < errors[True]


@pytest.mark.parametrize(
    "other", [{"block_size": 32}, {"bits": 8, "double": True}, {"double": False}]
)
def test_a_state_of_another_form_is_refused(other):
    layer, model = QuantizedLinear(nn.Linear(64, 32)), nn.Sequential()
    model.append(QuantizedLinear(nn.Linear(64, 32), **other))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="bits, block_size and double are"):
        model.load_state_dict(nn.Sequential(layer).state_dict())
    after = model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_a_restored_base_leaves_the_layer_it_was_made_of():
    linear = nn.Linear(64, 8)
    linear.bias.requires_grad_(False)
    packed = nn.Sequential(QuantizedLinear(linear))
    dequantize_base(packed, torch.bfloat16)
    assert linear.bias.dtype == torch.float32
    assert packed[0].bias.dtype == torch.bfloat16 and not packed[0].bias.requires_grad


def test_rounds_of_the_exercise_beat_nf4():
    """Lloyd's rounds, on weights divided by the largest of their block."""
    lesson = nbformat.read(NOTEBOOK, 4)
    cell = next(
        c
        for c in lesson.cells
        if "<summary>Solution" in c.source and c.source.count("def moved_levels")
    )
    names = {"torch": torch}
    exec(cell.source.split("```python\n")[1].split("```")[0], names)
    weight = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(-1, 64)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    levels = NF4.clone()
    for _ in range(20):
        levels = names["moved_levels"](scaled, levels).float()
        levels[[0, 7, 15]] = torch.tensor([-1.0, 0.0, 1.0])
    errors = []
    for each in (levels, NF4):
        back = dequantize_blocks(*quantize_blocks(weight, each), weight.shape, each)
        errors.append((back - weight).norm() / weight.norm())
    assert errors[0] < 0.995 * errors[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: normal_float(1), "bits is 1; allowed is a whole number from 2 to 8"),
        (lambda: normal_float(True), "bits is True"),
        (lambda: QuantizedLinear(nn.Linear(8, 8), 3), "bits is 3; allowed are 4 and 8"),
        (
            lambda: quantize_blocks(torch.tensor([1.0, float("nan")])),
            "weight holds numbers that are not finite",
        ),
        (lambda: quantize_blocks(torch.ones(4), block_size=5), "block_size is 5"),
        (lambda: quantize_blocks(torch.ones(4), block_size=0), "block_size is 0"),
        (lambda: quantize_blocks(torch.ones(4), NF4.flip(0)), "levels has the shape"),
        (lambda: normal_float(4.0), "bits is 4.0; allowed is a whole number"),
        (lambda: QuantizedLinear(nn.Linear(8, 8), [4]), "bits is [4]; allowed are"),
        (
            lambda: quantize_blocks(torch.ones(4), torch.arange(-7, 8.0)),
            "levels has the shape (15,); allowed are 2 to 256 numbers in ascending",
        ),
        (
            lambda: quantize_blocks(torch.ones(4), torch.tensor([0, float("nan"), 1])),
            "levels has the shape (3,); allowed are 2 to 256 numbers in ascending",
        ),
        (lambda: quantize_base(nn.ReLU()), "model is a ReLU without a linear layer"),
        (
            lambda: quantize_base(Net(), skip=["haed"]),
            "skip names 'haed'; allowed are modules, such as 'head'",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_what_is_no_number_or_list():
    with pytest.raises(TypeError, match="block_size is 64.0"):
        quantize_blocks(torch.ones(4), block_size=64.0)
    with pytest.raises(TypeError, match="skip is 'head'; allowed is a list of names"):
        quantize_base(Net(), skip="head")
    with pytest.raises(TypeError, match="skip is None; allowed is a list of names"):
        quantize_base(Net(), skip=None)
    with pytest.raises(TypeError, match="levels is a list; allowed is a tensor"):
        quantize_blocks(torch.ones(4), NF4.tolist())
    for weight, kind in ((torch.arange(4), "torch.int64"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"weight is .*{kind}; allowed is a float"):
            quantize_blocks(weight)


def test_a_base_that_cannot_be_quantised_stays_as_it_was(net):
    net.second.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        quantize_base(net)
    assert type(net.first) is nn.Linear


@pytest.mark.parametrize("kind", ["encoder layer", "T5"])
def test_models_that_read_a_weight_find_it(kind):
    torch.manual_seed(0)
    if kind == "T5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1}
        config = T5Config(vocab_size=40, num_heads=4, **sizes)
        model = T5EncoderModel(config).eval()
        given = {"input_ids": torch.arange(6)[None]}
        run = lambda made: made(**given).last_hidden_state
    else:
        model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        x = torch.randn(2, 5, 64)
        run = lambda made: made(x)
    with torch.no_grad():
        held = run(quantize_base(copy.deepcopy(model)))
        plain = run(dequantize_base(quantize_base(copy.deepcopy(model))))
    torch.testing.assert_close(held, plain, atol=1e-4, rtol=1e-4)


def test_a_base_unpacked_in_sixteen_bits_computes():
    model = dequantize_base(quantize_base(nn.Sequential(nn.Linear(64, 8))), torch.half)
    assert model[0].bias.dtype == torch.half
    assert model(torch.ones(1, 64).half()).dtype == torch.half


def test_bytes_of_a_model_without_memory_are_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 4 * (64 * 64 + 2 * 64)
