"""Small ways to adapt a model: each begins, trains, saves and goes as it says."""

import copy
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.adapting.lora import add_lora, trainable_parameters
from bigmodel_nb.adapting.methods import (
    BottleneckLinear,
    Prefix,
    ScaledLinear,
    adapt,
    load_adaptation,
    merge_adaptation,
    remove_adaptation,
    save_adaptation,
)

transformers = pytest.importorskip("transformers")
METHODS = "head", "bitfit", "ia3", "adapter", "prompt", "prefix", "lora", "dora", "full"
IDENTITY = {"head", "bitfit", "ia3", "adapter", "lora", "dora", "full"}


def expect_methods(m):
    assert m["numbers_by_formula"] == m["numbers_counted"], "the formulas count"
    for method, moved in m["moved_at_start"].items():
        identity = method in IDENTITY
        assert (moved == 0) == identity, f"{method} begins as the identity, or does not"
    assert all(each > 0 for each in m["moved_after_a_step"].values()), (
        "all of it learns"
    )
    assert all(m["base_bitwise"].values()), "and the base comes back bit for bit"
    assert m["key_bias_gradient"] < 1e-10, "softmax does not see a bias of the keys"
    start = m["start_of_bottleneck"]
    assert start["moves the output by"] == start["gradient of down"] == 0
    assert start["gradient of up"] > 0, "up learns first"
    assert m["scales_merged_difference"] < 1e-12 and m["mixture_difference"] < 1e-12
    assert max(m["central_differences"].values()) < 1e-7, "the gradients are right"
    for name, each in m["differences_from_peft"].items():
        moves = each.pop("it moves outputs by")
        assert max(each.values()) < 1e-5 and moves > 1e-2, f"{name} is peft's"
    moved = m["moved_by_a_hidden_word"]
    assert moved["forgets the prefix"] == 0 < moved["counts the prefix"], (
        "a mask that forgets the prefix hides the end of the text"
    )
    assert "512 places" in m["refused"], "a prompt without a place is refused"
    for method, over in m["over_head"].items():
        assert method == "head" or over["high"] > -0.01, (
            f"{method} is not worse than the head alone"
        )
    probe = m["accuracy_of_probe"]
    assert probe["base"] > probe["commonest"] + 0.1, "the probe reads something"
    stored, disk = m["stored_bytes"], m["disk_bytes"]
    assert stored["head"] < stored["bitfit"] < stored["lora"] < stored["dora"]
    assert stored["bitfit"] < stored["ia3"], "a bias needs no inputs of its layer"
    left = m["probe_by_rate_of_all_weights"].values()
    assert min(left) < probe["base"] - 0.1, "too high a rate destroys old features"
    assert disk["ia3"] < disk["bitfit"] < disk["lora"] < disk["full"]
    ranks = m["rank_of_change"]
    assert ranks["lora"] <= 8 < ranks["ia3"], "scales change a weight at full rank"


# Of one run: a row of a test set, or a rate that is nearly as good as its neighbour.
undecided_methods = {
    "at_edge": "two rates may be alike on the validation rows",
    "rank_of_change": "it is of the run at the rate chosen",
    "probe_by_rate_of_all_weights": "of one run each, some at rates that are too high",
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.second(torch.tanh(self.first(x)))))


OF_NET = {
    "head": {},
    "bitfit": {},
    "ia3": {"targets": "first", "inner": "second"},
    "adapter": {"size": 2, "targets": "second"},
    "lora": {"rank": 2, "targets": ("first", "second")},
    "dora": {"rank": 2, "targets": ("first", "second")},
    "full": {},
}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def bert(kind="BertModel"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, intermediate_size=24, max_position_embeddings=20, **SIZES
    )
    config._attn_implementation = "eager"
    return getattr(transformers, kind)(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, intermediate_size=24, num_key_value_heads=1, **SIZES
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
    config = transformers.GPT2Config(
        vocab_size=60, bos_token_id=0, eos_token_id=0, **sizes
    )
    return transformers.GPT2LMHeadModel(config).eval()


def classifier():
    return bert("BertForSequenceClassification")


MODELS = {each.__name__: each for each in (bert, classifier, llama, gpt2)}
IDS = torch.tensor([[5, 7, 11, 13, 17, 19], [23, 29, 31, 37, 0, 0]])
MASK = (IDS != 0).long()


def output(model, ids=IDS, mask=MASK):
    return model(input_ids=ids, attention_mask=mask)[0]


def state(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def tensors(folder):
    return dict(sorted(load_file(folder / "adapter_model.safetensors").items()))


def samples(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()["bigmodel_nb.base"]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def trains(model):
    return [each for each in model.parameters() if each.requires_grad]


def disturb(model, by=0.1):
    with torch.no_grad():
        for each in trains(model):
            each.add_(by * torch.randn_like(each))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_begins_trains_and_gives_the_base_back(name, method, tmp_path):
    model = MODELS[name]()
    if name == "llama" and method == "bitfit":
        with pytest.raises(ValueError, match="without biases"):
            adapt(model, method)
        return
    if name != "classifier" and method == "head":
        return
    model.get_input_embeddings().weight.requires_grad_(False)
    base, before = state(model), output(model)
    was = {key: each.requires_grad for key, each in model.named_parameters()}
    whole = "classifier" if name == "classifier" else ()
    assert adapt(model, method, trainable=whole) is model
    start = output(model)
    assert start.shape == before.shape
    assert torch.equal(start, before) == (method in IDENTITY)
    optimizer = torch.optim.SGD(trains(model), 1.0)
    (output(model) * torch.randn_like(start)).sum().backward()
    assert any(each.grad is not None for each in trains(model))
    optimizer.step()
    trained = output(model)
    assert not torch.equal(trained, start)
    save_adaptation(model, tmp_path / "a")
    back = load_adaptation(MODELS[name](), tmp_path / "a")
    assert torch.equal(output(back), trained)
    numbers = trainable_parameters(model)["trainable"]
    assert trainable_parameters(back)["trainable"] == numbers
    again = save_adaptation(back, tmp_path / "b")
    for read in (tensors, samples, config_of):
        assert str(read(again)) == str(read(tmp_path / "a"))
    assert remove_adaptation(model) is model
    assert equal(state(model), base) and torch.equal(output(model), before)
    assert was == {key: each.requires_grad for key, each in model.named_parameters()}
    assert not hasattr(model, "adaptation") and not model._forward_pre_hooks


@pytest.mark.parametrize("method", OF_NET)
def test_any_module(method, tmp_path):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 6)
    base, before = state(model), model(x)
    adapt(model, method, trainable="head", **OF_NET[method])
    assert torch.equal(model(x), before)
    disturb(model)
    trained = model(x)
    assert not torch.equal(trained, before)
    save_adaptation(model, tmp_path / "a")
    torch.manual_seed(0)
    assert torch.equal(load_adaptation(Net(), tmp_path / "a")(x), trained)
    if method == "adapter":
        with pytest.raises(ValueError, match="no weights of the base equal"):
            merge_adaptation(model)
    else:
        merged = merge_adaptation(copy.deepcopy(model))
        assert torch.allclose(merged(x), trained, atol=1e-6)
        assert state(merged).keys() == base.keys()
    remove_adaptation(model)
    assert equal(state(model), base) and torch.equal(model(x), before)


def test_the_base_s_own_parameters_never_move():
    model = Net()
    own = dict(model.named_parameters())
    values = {name: each.detach().clone() for name, each in own.items()}
    for method, options in OF_NET.items():
        adapt(model, method, trainable="head", **options)
        optimizer = torch.optim.AdamW(trains(model), 0.1)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(own[name], each) for name, each in values.items())
        remove_adaptation(model)
        assert all(own[name] is each for name, each in model.named_parameters())


def test_numbers_are_those_of_the_formulas():
    L, d, m, p, b = 2, 16, 24, 8, 16
    counts = {
        "bitfit": L * (7 * d + m) + 2 * d,
        "ia3": L * (2 * d + m),
        "adapter": 2 * L * (2 * b * d + b + d),
        "prompt": p * d,
        "prefix": 2 * p * L * d,
        "lora": 4 * 8 * L * d,
    }
    for method, count in counts.items():
        assert trainable_parameters(adapt(bert(), method))["trainable"] == count
    one_head = adapt(llama(), "prefix", count=3).adaptation.vectors
    assert one_head.shape == (3, L * 2 * d // 2), "keys and values of one head of two"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_equals_peft(name, method, tmp_path):
    peft = pytest.importorskip("peft")
    ours = disturb(adapt(MODELS[name](), method))
    task = {"bert": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}.get(
        name, "CAUSAL_LM"
    )
    if method == "ia3":
        layers = {k: e for k, e in ours.named_modules() if isinstance(e, ScaledLinear)}
        config = peft.IA3Config(
            target_modules=list(layers),
            feedforward_modules=[key for key, each in layers.items() if each.inner],
            fan_in_fan_out=name == "gpt2",
        )
    else:
        kind = "PromptTuningConfig" if method == "prompt" else "PrefixTuningConfig"
        config = getattr(peft, kind)(task_type=task, num_virtual_tokens=8)
    theirs = peft.get_peft_model(MODELS[name](), config).eval()
    if method == "ia3":
        place = "base_model.model.{}.ia3_l.default"
        pairs = [
            (each.scale, theirs.get_parameter(place.format(key)))
            for key, each in layers.items()
        ]
    else:
        learned = theirs.prompt_encoder["default"].embedding.weight
        pairs = [(ours.adaptation.vectors, learned)]
    with torch.no_grad():
        for own, its in pairs:
            its.copy_(own.view_as(its))
    cut = lambda each: each[:, -6:] if each.ndim == 3 else each  # noqa: E731
    made, other = output(ours), cut(output(theirs))
    assert torch.allclose(made, other, rtol=0, atol=1e-6)
    assert (made - output(MODELS[name]())).abs().max() > 1e-6
    direction = torch.randn_like(made)
    for each in (made, other):
        (each * direction).sum().backward()
    for own, its in pairs:
        gap = (own.grad.flatten() - its.grad.flatten()).abs().max()
        assert gap <= 1e-5 * own.grad.abs().max().clamp(min=1e-3)
    save_adaptation(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours").eval()
    assert torch.allclose(cut(output(read)), made, rtol=0, atol=1e-6)
    if name == "classifier" and method != "ia3":
        return  # peft saves a head of its own there
    back = load_adaptation(MODELS[name](), tmp_path / "theirs")
    assert torch.allclose(output(back), made, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_peft_reads_a_head_too(method, tmp_path):
    peft = pytest.importorskip("peft")
    ours = disturb(adapt(classifier(), method, trainable="classifier"))
    save_adaptation(ours, tmp_path / "a")
    read = peft.PeftModel.from_pretrained(classifier(), tmp_path / "a").eval()
    assert torch.allclose(output(read), output(ours), rtol=0, atol=1e-6)
    read.save_pretrained(tmp_path / "b")
    back = load_adaptation(classifier(), tmp_path / "b")
    assert torch.allclose(output(back), output(ours), rtol=0, atol=1e-6)
    assert torch.equal(back.classifier.weight, ours.classifier.weight)


@pytest.mark.parametrize("method", ["bitfit", "adapter", "ia3"])
def test_gradients_equal_central_differences(method):
    torch.manual_seed(1)
    model, x = Net().double(), torch.randn(3, 6).double()
    target = torch.randn(3, 3).double()
    disturb(adapt(model, method, **OF_NET[method]), 0.3)

    def loss():
        return (model(x) - target).square().sum()

    loss().backward()
    h = 1e-6
    for each in trains(model):
        flat, grad = each.data.view(-1), each.grad.reshape(-1)
        for at in range(len(flat)):
            own = flat[at].item()
            with torch.no_grad():
                flat[at] = own + h
                above = loss()
                flat[at] = own - h
                gap = (above - loss()) / (2 * h) - grad[at]
                flat[at] = own
            assert abs(gap) < 1e-6 * (1 + abs(grad[at]))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_scales_merge_into_any_layer(inputs, outputs, bias, transposed, seed):
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias).double()
    if transposed:
        base = transformers.pytorch_utils.Conv1D(outputs, inputs).double()
    x = torch.randn(3, inputs).double()
    model = nn.Sequential(nn.Sequential(base), nn.Identity())
    for options in ({"targets": "0.0"}, {"targets": (), "inner": "0.0"}):
        adapted = disturb(adapt(copy.deepcopy(model), "ia3", **options))
        made = adapted(x)
        merged = merge_adaptation(adapted)
        assert torch.allclose(merged(x), made, atol=1e-12)
        assert merged.state_dict().keys() == model.state_dict().keys()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_vectors_begin_as_tokens_that_were_read(count, length, seed):
    model = llama()
    ids = torch.randint(1, 60, (1, length))
    torch.manual_seed(seed)
    adapt(model, "prefix", count=count)
    with_keys = output(model, ids, torch.ones_like(ids))
    remove_adaptation(model)
    torch.manual_seed(seed)
    adapt(model, "prompt", count=count)
    vectors = model.adaptation.vectors.detach()
    led = output(model, ids, torch.ones_like(ids))
    table = model.get_input_embeddings().weight
    told = torch.cdist(vectors, table).argmin(1)[None]
    remove_adaptation(model)
    plain = output(model, torch.cat([told, ids], 1), None)[:, count:]
    assert torch.allclose(led, plain, atol=1e-5)
    assert torch.allclose(with_keys, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generates_with_a_cache_as_without(name, method):
    model = adapt(MODELS[name](), method, count=3)
    ids, mask = IDS.flip(1), MASK.flip(1)  # padded on the left
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    made = model.generate(
        input_ids=ids, attention_mask=mask, eos_token_id=None, **options
    )
    for logits in made.logits:
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given_ = {"attention_mask": mask, "position_ids": places}
        without = model(input_ids=ids, **given_).logits[:, -1]
        assert torch.allclose(logits, without, atol=1e-6)
        chosen = without.argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)
    assert torch.equal(made.sequences, ids)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_read_and_padding_is_not(name, method):
    model = adapt(MODELS[name](), method, count=4)
    made, other = output(model), IDS.clone()
    other[1, 4:] = 41
    padded = output(model, other)
    rows = MASK.bool() if made.ndim == 3 else slice(None)
    assert torch.equal(made[rows], padded[rows])
    keyword = model(
        inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK
    )
    assert torch.allclose(keyword[0][rows], made[rows], atol=1e-6)
    positional = model(IDS, attention_mask=MASK)[0]
    assert torch.equal(positional[rows], made[rows])
    places = {"position_ids": torch.arange(6).expand(2, -1)}
    told = model(IDS, attention_mask=MASK, **places)[0]
    assert torch.allclose(told[rows], made[rows], atol=1e-6)
    disturb(model, 1.0)
    assert not torch.allclose(output(model)[rows], made[rows], atol=1e-4)


def test_a_prompt_leaves_hidden_states_of_the_text():
    model = adapt(bert(), "prompt", count=4)
    made = model(IDS, MASK, token_type_ids=MASK, output_hidden_states=True)
    assert {tuple(each.shape) for each in made.hidden_states} == {(2, 6, 16)}
    assert torch.equal(made.hidden_states[-1], made.last_hidden_state)
    pair = model(IDS, MASK, token_type_ids=MASK, return_dict=False)
    assert torch.equal(pair[0], made.last_hidden_state)


def test_an_encoder_inside_another_module():
    class Sentence(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = bert(), nn.Linear(16, 2)

        def forward(self, ids):
            return self.head(self.encoder(ids).last_hidden_state.mean(1))

    model = Sentence()
    before = model(IDS)
    adapt(model, "prefix", trainable="head", count=2)
    assert trainable_parameters(model)["trainable"] == 2 * 2 * 2 * 16 + 34
    twin = copy.deepcopy(model)
    disturb(model)
    assert not torch.equal(model(IDS), twin(IDS)), "a copy has vectors of its own"
    assert torch.equal(remove_adaptation(model)(IDS), before)
    assert torch.equal(remove_adaptation(twin)(IDS), before)


def test_attention_among_the_words_keeps_its_proportions():
    config = bert()
    model = adapt(config, "prefix", count=4)
    model.adaptation.vectors.data.normal_()
    layers = model(IDS, MASK, output_attentions=True).attentions[0]
    with torch.no_grad():
        plain = remove_adaptation(model)
        places = torch.arange(4, 10)[None]
        alone = plain(IDS, MASK, position_ids=places, output_attentions=True)
    words = layers[..., 4:]
    words = words / words.sum(-1, keepdim=True)
    assert torch.allclose(words, alone.attentions[0], atol=1e-5)
    assert (layers[..., :4].sum(-1) > 0).all()


def test_torch_s_fast_path_does_not_pass_an_adapter_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        for method, options in (
            ("adapter", {"targets": ("linear1", "linear2")}),
            ("ia3", {"targets": "linear1", "inner": "linear2"}),
        ):
            adapt(layer, method, **options)
            assert torch.allclose(layer(x), before, atol=1e-6)
            disturb(layer)
            assert not torch.allclose(layer(x), before, atol=1e-3)
            remove_adaptation(layer)


def test_tied_weights_stay_tied():
    model = adapt(gpt2(), "full")
    assert model.lm_head.weight is model.transformer.wte.weight
    disturb(model)
    remove_adaptation(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_short_weights_get_vectors_in_float32():
    for method in ("ia3", "adapter", "prompt", "prefix"):
        model = adapt(llama().bfloat16(), method)
        assert {each.dtype for each in trains(model)} == {torch.float32}
        assert output(model).dtype == torch.bfloat16


def test_what_moves_to_another_type_comes_back_in_it():
    model = adapt(Net(), "full").double()
    remove_adaptation(model)
    assert {each.dtype for each in model.parameters()} == {torch.float64}


WRONG = {
    "method is 'magic'": ("magic", {}),
    "method is []": ([], {}),
    "trainable is (), and": ("head", {}),
    "trainable has 'haed'": ("head", {"trainable": "haed"}),
    "trainable is 3": ("head", {"trainable": 3}),
    "targets has 'third'": ("adapter", {"targets": "third"}),
    "targets is None": ("adapter", {}),
    "targets is 3": ("ia3", {"targets": 3}),
    "inner has 'first', and so": ("ia3", {"targets": "first", "inner": "first"}),
    "size is 0": ("adapter", {"targets": "first", "size": 0}),
    "size is 2.5": ("adapter", {"targets": "first", "size": 2.5}),
    "size is True": ("adapter", {"targets": "first", "size": True}),
    "size is no option": ("bitfit", {"size": 3}),
    "variant is no option": ("lora", {"variant": "pissa"}),
    "rank is 0": ("lora", {"targets": "first", "rank": 0}),
    "model is a Net": ("prompt", {}),
}


@pytest.mark.parametrize("said", WRONG)
def test_refuses_in_one_sentence_and_changes_nothing(said):
    method, options = WRONG[said]
    model = Net()
    base, modules = state(model), list(model.modules())
    with pytest.raises((TypeError, ValueError)) as error:
        adapt(model, method, **options)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert equal(state(model), base) and list(model.modules()) == modules
    assert all(each.requires_grad for each in model.parameters())
    assert not vars(model).get("_adaptation")


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3)),
    st.sampled_from(["size", "targets", "trainable", "inner", "count", "other"]),
    st.sampled_from(METHODS),
)
def test_any_option_works_or_is_refused(value, option, method):
    model = Net()
    base = state(model)
    try:
        adapt(model, method, **{option: value})
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        assert equal(state(model), base) and not hasattr(model, "_adaptation")
    else:
        remove_adaptation(model)
        assert equal(state(model), base)


def test_one_adaptation_at_a_time():
    model = Net()
    for call in (remove_adaptation, merge_adaptation):
        with pytest.raises(ValueError, match="model has no adaptation"):
            call(model)
    with pytest.raises(ValueError, match="model has no adaptation"):
        save_adaptation(model, "nowhere")
    adapt(model, "bitfit")
    with pytest.raises(ValueError, match="model has an adaptation, 'bitfit'"):
        adapt(model, "full")
    remove_adaptation(model)
    add_lora(model, 2, targets="first")
    with pytest.raises(ValueError, match="adapters of add_lora"):
        adapt(model, "bitfit")
    with pytest.raises(TypeError, match="model is a str"):
        adapt("model", "full")


def test_no_place_for_a_prompt():
    with pytest.raises(ValueError, match="allowed are 20 places together"):
        adapt(bert(), "prompt", count=20)
    model = adapt(bert(), "prefix", count=15)
    with pytest.raises(ValueError, match="input has 6 tokens, and 15 learned vectors"):
        output(model)
    assert output(model, IDS[:, :5], MASK[:, :5]).shape == (2, 5, 16)
    adapt(llama(), "prompt", count=40)  # turned positions have no table
    with pytest.raises(ValueError, match="attention_mask is of shape"):
        model(IDS[:, :5], torch.ones(2, 1, 5, 5))
    distil = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=60, dim=16, n_heads=2, n_layers=1)
    )
    with pytest.raises(ValueError, match="that take past_key_values"):
        adapt(distil, "prefix")
    t5 = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    with pytest.raises(ValueError, match="one stack of layers"):
        adapt(transformers.T5Model(t5), "prompt")


def test_drawing_a_prefix_leaves_the_modes_of_training(monkeypatch):
    model = bert().train()
    model.encoder.layer[0].eval()
    modes = [each.training for each in model.modules()]
    adapt(model, "prefix")
    remove_adaptation(model)
    assert modes == [each.training for each in model.modules()]

    def broken(*args, **kwargs):
        assert not model.training, "keys and values are drawn without dropout"
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.encoder, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        adapt(model, "prefix")
    assert modes == [each.training for each in model.modules()]
    assert all(each.requires_grad for each in model.parameters())
    assert not hasattr(model, "_adaptation")


def test_a_prefix_and_checkpointing():
    model = adapt(llama(), "prefix")
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        output(model.train())
    output(model.eval())


def other_base(model):
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1 * torch.randn_like(each))
    return model


@pytest.mark.parametrize("method", [each for each in METHODS if each != "full"])
def test_another_base_is_refused(method, tmp_path):
    save_adaptation(adapt(classifier(), method, trainable="classifier"), tmp_path / "a")
    for model in (other_base(classifier()), gpt2(), Net(), bert()):
        base = state(model)
        with pytest.raises(ValueError, match="another base") as error:
            load_adaptation(model, tmp_path / "a")
        assert "\n" not in str(error.value)
        assert equal(state(model), base) and not hasattr(model, "_adaptation")
    load_adaptation(other_base(classifier()), tmp_path / "a", strict=False)
    load_adaptation(classifier().bfloat16(), tmp_path / "a")


def test_a_new_head_is_no_other_base(tmp_path):
    model, x = Net(), torch.randn(4, 6)
    other = copy.deepcopy(model)
    nn.init.normal_(other.head.weight)
    disturb(adapt(model, "ia3", trainable="head", **OF_NET["ia3"]))
    save_adaptation(model, tmp_path / "a")
    load_adaptation(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))


def test_files_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="without adapter_config.json"):
        load_adaptation(bert(), tmp_path / "none")
    folder = save_adaptation(adapt(bert(), "ia3"), tmp_path / "a")
    config = folder / "adapter_config.json"
    about = json.loads(config.read_text())
    for key, value in (
        ("peft_type", "VERA"),
        ("peft_type", ["IA3"]),
        ("peft_type", None),
    ):
        config.write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match="folder is .*peft_type"):
            load_adaptation(bert(), folder)
    folder = save_adaptation(adapt(bert(), "prefix"), tmp_path / "b")
    config = folder / "adapter_config.json"
    about = json.loads(config.read_text()) | {"prefix_projection": True}
    config.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="prefix_projection = True"):
        load_adaptation(bert(), folder)
    config.write_text("{")
    with pytest.raises(ValueError, match="broken"):
        load_adaptation(bert(), folder)


def test_what_is_shared_or_quantised_is_not_merged():
    model = Net()
    model.twin = nn.Linear(6, 8)
    model.twin.weight = model.first.weight
    adapt(model, "ia3", targets="first")
    with pytest.raises(ValueError, match="quantised or shared"):
        merge_adaptation(model)
    assert isinstance(model.first, ScaledLinear)


def test_wrappers_by_hand():
    base = nn.Linear(4, 3).double()
    x = torch.randn(2, 4).double()
    scaled, inner = ScaledLinear(base), ScaledLinear(base, inner=True)
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        inner.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.allclose(scaled(x), base(x) * scaled.scale)
    assert torch.allclose(inner(x), base(x * inner.scale))
    neck = BottleneckLinear(base, 2)
    assert torch.equal(neck(x), base(x)) and neck.weight is base.weight
    disturb(neck)
    own = base(x)
    assert torch.allclose(neck(x), own + neck.up(F.gelu(neck.down(own))))
    vectors = torch.arange(2 * 2 * 2 * 16.0).view(2, -1)
    parts = Prefix(vectors).keys_and_values(bert())
    assert parts.shape == (2, 2, 2, 2, 8)
    assert torch.equal(parts[1, 0, 1, 1], vectors[1, 40:48])


def test_tensors_of_another_shape_and_tensors_that_are_missing(tmp_path):
    for method in ("bitfit", "adapter"):
        adapted = adapt(Net(), method, trainable="head", **OF_NET[method])
        save_adaptation(adapted, tmp_path / method)
    other = Net()
    other.head = nn.Linear(6, 4)
    for method in ("bitfit", "adapter"):
        base = state(other)
        with pytest.raises(ValueError, match=r"\(3,.*in the file and \(4,.*in the mod"):
            load_adaptation(other, tmp_path / method, strict=False)
        assert equal(state(other), base)
    held = tensors(tmp_path / "adapter")
    del held["second.up.bias"]
    save_file(
        held, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="it lacks 'second.up.bias'"):
        load_adaptation(Net(), tmp_path / "adapter")


def test_a_size_of_numpy_is_saved(tmp_path):
    model = nn.Sequential(OrderedDict(query=nn.Linear(6, 6), head=nn.Linear(6, 2)))
    adapt(model, "adapter", trainable="head", size=np.int64(2), targets=("query",))
    save_adaptation(model, tmp_path / "kept")
    assert (tmp_path / "kept").is_dir()
