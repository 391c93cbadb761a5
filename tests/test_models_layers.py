"""Attention, positions, the cache and the block: equal to torch and to themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.models.layers import (
    MLP,
    Block,
    KVCache,
    MultiHeadAttention,
    attention,
    attention_weights,
    rotate,
    rotation,
    sinusoidal_positions,
)

BOTH = pytest.mark.parametrize("implementation", ["plain", "fused"])


def expect_layers(m):
    assert m["largest_weight"]["unscaled"] > 0.8, "without the scaling one weight rules"
    assert m["largest_weight"]["scaled"] < 0.2, "with it none does, at any width"
    for d, variance in m["variance_of_scores"].items():
        assert abs(variance / float(d) - 1) < 0.1, "the variance of a score is d"
    assert m["plain_from_fused"]["float32"] < 1e-5, "the implementations agree"
    assert m["plain_from_fused"]["bfloat16"] < 3e-2, "in 16 bits too"
    assert m["shuffle_difference"] < 1e-6, "attention does not know the order"
    assert m["rotary_spread"] < 1e-4, "rotary scores depend on the distance alone"
    assert m["norm_difference"] < 1e-12, "the norms are torch's"
    assert m["first_gradient"]["plain"] < 1e-3, "without residuals the gradient is lost"
    assert m["first_gradient"]["residual, pre-norm"] > 0.1, "with them it is not"
    assert m["cache_difference"] < 1e-5, "word by word is the same as all at once"
    honest, leaking = (
        m["loss_on_random_digits"][name] for name in ("causal mask", "no mask")
    )
    assert honest > math.log(10) - 0.05, "nobody predicts random digits"
    assert leaking < 1, "but a model without a mask does"
    assert max(m["difference_from_library"].values()) < 1e-6, "the blocks are torch's"


@st.composite
def problems(draw):
    """Query, key, value, and what attention may see."""
    shared, times = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 9))
    queries = draw(st.integers(1, keys))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    query = torch.randn(2, shared * times, queries, 8)
    key, value = torch.randn(2, 2, shared, keys, 8)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(2, 1, draw(st.sampled_from([1, queries])), keys) < 0.5
    return query, key, value, {"mask": mask, "causal": draw(st.booleans())}


def by_hand(query, key, value, mask, causal):
    """One query after the other, in float64; no key: 0."""
    query, key, value = (each.double() for each in (query, key, value))
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    times, keys = query.shape[1] // key.shape[1], key.shape[2]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        last = keys - query.shape[2] + i if causal else keys - 1
        seen = [
            j
            for j in range(last + 1)
            if mask is None or mask[b, 0, min(i, mask.shape[2] - 1), j]
        ]
        if seen:
            k, v = key[b, h // times, seen], value[b, h // times, seen]
            weights = (k @ query[b, h, i] / math.sqrt(query.shape[3])).softmax(0)
            output[b, h, i] = weights @ v
    return output


@BOTH
@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_attention_is_the_weighted_average(implementation, problem):
    *tensors, options = problem
    found = attention(*tensors, **options, implementation=implementation)
    assert (found - by_hand(*tensors, **options)).abs().max() < 1e-5


@settings(deadline=None, max_examples=30)
@given(problem=problems())
def test_implementations_agree_in_bfloat16_and_in_gradients(problem):
    *tensors, options = problem
    half = [each.bfloat16() for each in tensors]
    outputs = [
        attention(*half, **options, implementation=i) for i in ("plain", "fused")
    ]
    assert (outputs[0] - outputs[1]).abs().max() < 3e-2
    gradients = []
    for implementation in ("plain", "fused"):
        leaves = [each.clone().requires_grad_() for each in tensors]
        y = attention(*leaves, **options, implementation=implementation)
        gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    for one, other in zip(*gradients):
        assert one.isfinite().all() and (one - other).abs().max() < 1e-4


@BOTH
def test_no_earlier_output_changes_by_a_bit(implementation):
    torch.manual_seed(0)
    block = Block(16, 4, 2, causal=True, implementation=implementation).eval()
    x = torch.randn(2, 12, 16)
    changed = x.clone()
    changed[:, 7] = torch.randn(2, 16)  # a constant would be normalised away
    one, other = block(x), block(changed)
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.isclose(one[:, 7:], other[:, 7:]).all(-1).any()


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(implementation, causal):
    torch.manual_seed(0)
    block = Block(16, 4, causal=causal, implementation=implementation).eval()
    x = torch.randn(1, 5, 16)
    for left in (True, False):
        filler = torch.randn(1, 3, 16)
        padded = torch.cat([filler, x] if left else [x, filler], 1)
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[:, slice(0, 3) if left else slice(5, 8)] = False
        found = block(padded, mask)
        assert found.isfinite().all()
        assert (found[mask] - block(x)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 1, 3], [9]])
def test_the_cache_gives_what_the_whole_gives(lengths):
    torch.manual_seed(0)
    block = Block(24, 4, 2, activation="swiglu", norm="rms", causal=True).eval()
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        whole = block(x, rotation=rotation(torch.arange(9), 6))
        cache, parts, start = KVCache(9), [], 0
        for length in lengths:
            places = torch.arange(start, start + length)
            part = x[:, start : start + length]
            parts.append(block(part, rotation=rotation(places, 6), cache=cache))
            start += length
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5
    assert cache.nbytes == 2 * 2 * 2 * 9 * 6 * 4 and cache.length == 9
    with pytest.raises(ValueError, match="holds 9 of 9 positions; allowed are 0 more"):
        block(x[:, :1], rotation=rotation(torch.tensor([9]), 6), cache=cache)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_weights_are_those_that_the_layer_takes_its_means_with(causal, num_kv_heads):
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, num_kv_heads, causal).eval()
    x, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False  # padded on the left: under a causal mask two see nothing
    turns = rotation(torch.arange(7), 4)
    weights = attention_weights(layer, x, mask, turns)
    assert weights.shape == (2, 4, 7, 7)
    value = layer._heads(x, turns)[2].repeat_interleave(4 // num_kv_heads, 1)
    rebuilt = layer.out((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(rebuilt, layer(x, mask, turns), atol=1e-6)
    assert weights[0, :, :, :2].abs().max() == 0, "no weight on padding"
    sums = weights.sum(-1)
    blind = torch.zeros(2, 4, 7, dtype=torch.bool)
    blind[0, :, :2] = causal
    assert torch.allclose(sums, (~blind).float()), "a row sums to 1, or sees nothing"


def test_dropout_is_off_in_evaluation_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 2, dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    expected = layer(x)
    drawn = torch.stack([layer.train()(x) for _ in range(2000)])
    assert not torch.equal(drawn[0], drawn[1])
    deviation = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - expected).abs() < 5 * deviation).all()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 5000), st.integers(0, 40), st.integers(0, 99))
def test_rotated_scores_know_the_distance_alone(half, start, distance, seed):
    torch.manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 2 * half, dtype=torch.float64)

    def score(at):
        turned = [
            rotate(each, *rotation(torch.tensor([place]), 2 * half))
            for each, place in ((query, at + distance), (key, at))
        ]
        return (turned[0] * turned[1]).sum()

    assert (score(start) - score(0)).abs() < 2e-3 * query.norm() * key.norm()
    turned = rotate(query, *rotation(torch.tensor([start]), 2 * half))
    assert (turned.norm() - query.norm()).abs() < 1e-5 * (1 + query.norm())


def test_sinusoidal_positions_are_the_papers():
    found = sinusoidal_positions(50, 8)
    for t in (0, 1, 49):
        for c in range(4):
            angle = t / 10_000 ** (2 * c / 8)
            assert abs(found[t, c] - math.sin(angle)) < 1e-5
            assert abs(found[t, 4 + c] - math.cos(angle)) < 1e-5


@pytest.mark.parametrize(
    "activation, formula",
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
        ("silu", F.silu),
    ],
)
def test_mlp_is_its_formula(activation, formula):
    torch.manual_seed(0)
    layer, x = MLP(6, 10, activation), torch.randn(3, 5, 6)
    up, down = layer.up, layer.down
    expected = formula(x @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert (layer(x) - expected).abs().max() < 1e-6


def test_swiglu_is_the_papers():
    torch.manual_seed(0)
    layer, x = MLP(6, 10, "swiglu", bias=False), torch.randn(3, 5, 6)
    gate, up = layer.up.weight[:10], layer.up.weight[10:]
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    assert (layer(x) - expected).abs().max() < 1e-6


def test_the_first_of_more_queries_than_keys_see_nothing():
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 2, 5, 8), torch.randn(2, 1, 2, 3, 8)
    found = [
        attention(query, key, value, causal=True, implementation=name)
        for name in ("plain", "fused")
    ]
    assert (found[0] - found[1]).abs().max() < 1e-6
    for each in found:
        assert (each[:, :, :2] == 0).all() and (each[:, :, 2:] != 0).any()


def test_weights_in_sixteen_bits_leave_the_angles_exact():
    block = Block(32, 2, norm="rms", causal=True).bfloat16().eval()
    cos, _ = rotation(torch.arange(4000), 16)
    assert cos.dtype == torch.float32
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    assert block(x, rotation=rotation(torch.arange(5), 16)).dtype == torch.bfloat16


def test_a_step_of_training_reaches_every_parameter():
    torch.manual_seed(0)
    for options in ({}, {"pre_norm": False}, {"norm": "rms", "activation": "swiglu"}):
        block = Block(16, 4, 2, **options)
        block(torch.randn(2, 5, 16)).square().sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()
        )


Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: attention(Q[0], K, K), ValueError, "query has shape (4, 3, 8)"),
        (lambda: attention(Q, K.double(), K), TypeError, "key is torch.float64"),
        (lambda: attention(Q, K, K[:, :, :4]), ValueError, "value (2, 2, 4, 8)"),
        (lambda: attention(Q[..., :6], K, K), ValueError, "query has shape"),
        (lambda: attention(Q[:, :3], K, K), ValueError, "query has 3 heads and key 2"),
        (
            lambda: attention(Q, K, K, mask=torch.ones(2, 1, 1, 5)),
            TypeError,
            "mask is torch.float32; allowed is torch.bool",
        ),
        (
            lambda: attention(Q, K, K, mask=torch.ones(2, 5, dtype=torch.bool)),
            ValueError,
            "mask has shape (2, 5)",
        ),
        (
            lambda: attention(Q, K, K, implementation="flash"),
            ValueError,
            "implementation is 'flash'",
        ),
        (lambda: Block(10, 4), ValueError, "num_heads is 4; allowed is a divisor"),
        (
            lambda: Block(12, 4, 3),
            ValueError,
            "num_kv_heads is 3; allowed is a divisor",
        ),
        (lambda: Block(12, 0), ValueError, "num_heads is 0"),
        (lambda: Block(12, 4, 0), ValueError, "num_kv_heads is 0"),
        (lambda: Block(12, 4, norm="batch"), ValueError, "norm is 'batch'"),
        (lambda: MLP(8, activation="tanh"), ValueError, "activation is 'tanh'"),
        (lambda: KVCache(0), ValueError, "capacity is 0"),
        (lambda: rotation(torch.arange(3), 5), ValueError, "head_dim is 5"),
    ],
)
def test_what_cannot_be_gets_a_sentence(call, error, said):
    with pytest.raises(error) as raised:
        call()
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_block_is_torchs_encoder_layer_while_it_trains():
    """With the same weights: the loss and the gradient of each parameter."""
    torch.manual_seed(0)
    ours = Block(16, 2).double()
    theirs = nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True
    ).double()
    pairs = {
        "self_attn.in_proj_weight": ours.attention.qkv.weight,
        "self_attn.in_proj_bias": ours.attention.qkv.bias,
        "self_attn.out_proj.weight": ours.attention.out.weight,
        "self_attn.out_proj.bias": ours.attention.out.bias,
        "linear1.weight": ours.mlp.up.weight,
        "linear1.bias": ours.mlp.up.bias,
        "linear2.weight": ours.mlp.down.weight,
        "linear2.bias": ours.mlp.down.bias,
        "norm1.weight": ours.norm_1.weight,
        "norm1.bias": ours.norm_1.bias,
        "norm2.weight": ours.norm_2.weight,
        "norm2.bias": ours.norm_2.bias,
    }
    theirs.load_state_dict(pairs)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    own = dict(theirs.named_parameters())
    for name, parameter in pairs.items():
        assert (own[name].grad - parameter.grad).abs().max() < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_a_query_is_answered_as_in_float32(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, size, 16) for size in (1, 300, 300))
    short = [each.to(dtype) for each in (query, key, value)]
    exact = attention(*(each.double() for each in short), implementation="plain")
    found = attention(*short, causal=True)
    assert found.dtype == dtype, "the type is kept"
    assert torch.equal(found, exact.to(dtype)) or torch.allclose(
        found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6
    ), "one rounding, at the end"
    with torch.enable_grad():
        query = short[0].requires_grad_()
        attention(query, *short[1:]).sum().backward()
    assert query.grad.dtype == dtype
