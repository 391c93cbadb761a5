"""GPT and BERT: beside transformers' own, causal to the bit, the same with a cache, in
a batch and alone; what cannot be written or converted is named."""

import dataclasses
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigmodel_nb.models.language import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    MaskedLM,
    SequenceClassifier,
    attention_maps,
    from_transformers,
    generate,
    gpt_attention_explorer,
    mask_tokens,
    mean_interval,
    sample,
    sampling_explorer,
    stream,
    to_transformers,
    token_probabilities,
    window_losses,
)
from bigmodel_nb.models.pretrained import find, load_gguf

SMALL = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
FORMS = {
    "GPT-2": GPTConfig(50, **SMALL),
    "Llama": GPTConfig(
        50,
        **SMALL,
        n_kv_head=2,
        n_inner=48,
        activation="swiglu",
        norm="rms",
        positions="rotary",
        bias=False,
    ),
}
COMMON = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}


def gpt2(**options):
    config = transformers.GPT2Config(**COMMON, **{**SMALL, **options})
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    config = transformers.LlamaConfig(**COMMON, **{**sizes, **options})
    return transformers.LlamaForCausalLM(config)


def bert(kind=transformers.BertModel, **options):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    return kind(transformers.BertConfig(**{**sizes, **options}))


def grown(model, factor=5):
    """Weights scaled, so that nothing hides in small numbers; in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim > 1 else 1)
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


# --- beside transformers

MODELS = {
    "GPT-2": gpt2,
    "GPT-2, untied": lambda: gpt2(tie_word_embeddings=False),
    "GPT-2, n_inner": lambda: gpt2(n_inner=40, activation_function="gelu"),
    "Llama": llama,
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "Llama, no groups": lambda: llama(num_key_value_heads=4),
    "masked": lambda: bert(transformers.BertForMaskedLM),
    "classes": lambda: bert(transformers.BertForSequenceClassification, num_labels=3),
    "BERT": lambda: transformers.BertModel(bert().config, add_pooling_layer=False),
}


def answer(model, ids, **options):
    found = model(ids, **options)
    if torch.is_tensor(found):
        return found
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


@pytest.mark.parametrize("factor", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_answers_alike(name, factor):
    torch.manual_seed(0)
    theirs = grown(MODELS[name](), factor)
    ours, ids = from_transformers(theirs), tokens(2, 20)
    assert not ours.training
    # transformers' Llama computes its norms and angles in float32 whatever it is given
    near = 1e-5 if name.startswith("Llama") else 1e-9
    first, second = answer(ours, ids), answer(theirs, ids)
    assert (first - second).abs().max() < near * second.abs().max().clamp_min(1)
    for each in (first, second):
        each.logsumexp(-1).sum().backward()
    embeddings = (
        ours.get_submodule("tokens" if isinstance(ours, GPT | BERT) else "bert.tokens"),
        theirs.get_input_embeddings(),
    )
    apart = embeddings[0].weight.grad - embeddings[1].weight.grad
    if embeddings[1].padding_idx is not None:  # a row that theirs does not train
        apart[embeddings[1].padding_idx] = 0
    assert apart.abs().max() < 10 * near * embeddings[1].weight.grad.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_and_comes_back_with_the_same_weights(name):
    torch.manual_seed(0)
    theirs = grown(MODELS[name]())
    back = to_transformers(from_transformers(theirs))
    assert type(back) is type(theirs)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_gpt_2_in_float32_within_1e5_and_gradients_within_1e6():
    torch.manual_seed(0)
    theirs = gpt2(n_embd=64).eval()
    ours, ids = from_transformers(theirs), tokens(2, 30)
    first, second = ours(ids), theirs(ids).logits
    assert (first - second).abs().max() < 1e-5
    for logits in (first, second):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    apart = ours.tokens.weight.grad - theirs.transformer.wte.weight.grad
    assert apart.abs().max() < 1e-6


def test_a_model_of_ours_is_published(tmp_path):
    torch.manual_seed(0)
    for config in FORMS.values():
        ours = GPT(config).eval()
        to_transformers(ours).save_pretrained(tmp_path)
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        ids = tokens(2, 12)
        assert (read(ids).logits - ours(ids)).abs().max() < 1e-5


def test_what_is_published_has_the_dropout_of_the_model():
    for config in FORMS.values():
        for dropout in (0.0, 0.2):
            theirs = to_transformers(GPT(dataclasses.replace(config, dropout=dropout)))
            kept = vars(theirs.config)
            names = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"}
            assert {kept[name] for name in names & kept.keys()} == {dropout}
    bert_of_ours = to_transformers(BERT(BERTConfig(50, 32, 32, 2, 4)))
    assert bert_of_ours.config.hidden_dropout_prob == 0


def test_padding_hides_from_bert_as_in_transformers():
    torch.manual_seed(0)
    theirs = grown(transformers.BertModel(bert().config, add_pooling_layer=False))
    ours, ids = from_transformers(theirs), tokens(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    kinds = (torch.arange(9) > 3).long().expand(2, 9)
    found = ours(ids, mask, kinds)
    expected = theirs(ids, mask.long(), kinds).last_hidden_state
    assert (found - expected)[mask].abs().max() < 1e-9


@pytest.mark.parametrize(
    "model, said",
    [
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda: gpt2(activation_function="tanh"), "activation_function 'tanh'"),
        (lambda: llama(attention_bias=True), "attention_bias True; allowed is False"),
        (lambda: llama(head_dim=16), "head_dim 16; allowed is 8"),
        (
            lambda: llama(
                rope_parameters={
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                }
            ),
            "rope_type 'linear'",
        ),
        (lambda: bert(hidden_act="relu"), "hidden_act 'relu'; allowed is 'gelu'"),
        (lambda: torch.nn.Linear(2, 2), "model is Linear; allowed are GPT2LMHeadModel"),
    ],
)
def test_models_of_another_kind_are_named(model, said):
    with pytest.raises(ValueError, match=said):
        from_transformers(model())


def test_a_form_that_no_library_has_is_named():
    mixed = GPT(GPTConfig(50, **SMALL, positions="rotary"))
    with pytest.raises(ValueError, match="allowed are GPT-2's form"):
        to_transformers(mixed)


@pytest.mark.filterwarnings("ignore")
def test_minilm_within_2e5_on_padded_batches():
    folder = find("all-MiniLM-L6-v2")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ours = from_transformers(theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        ["A cat sits outside.", "No.", "It " + "really " * 40 + "works."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state
        found = ours(given["input_ids"], given["attention_mask"])
    mask = given["attention_mask"].bool()
    assert (found - expected)[mask].abs().max() < 2e-5


CHAT = "SmolLM2-135M-Instruct"


@pytest.mark.skipif(find(CHAT) is None, reason=f"bigmodel fetch {CHAT}")
def test_the_chat_model_answers_as_transformers_does():
    theirs, tokenizer = load_gguf(next(find(CHAT).glob("*.gguf")))
    ours = from_transformers(theirs)
    asked = [{"role": "user", "content": "Name the capital of France."}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        expected = theirs(ids).logits
        apart = (ours(ids) - expected).abs().max()
    assert apart < 1e-5 * expected.abs().max()
    written = generate(ours, ids, 16, temperature=0, stop=tokenizer.eos_token_id)
    expected = theirs.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(written, expected[:, : written.shape[1]])


# --- what a language model must be


@pytest.fixture(params=FORMS)
def model(request):
    torch.manual_seed(0)
    return GPT(FORMS[request.param]).eval()


def test_no_logit_depends_on_a_later_token(model):
    ids = tokens(2, 30)
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 50
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_the_first_loss_is_that_of_the_uniform_prediction(model):
    ids = tokens(16, 32)
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(50)) < 0.05


def test_one_batch_is_learnt_by_heart(model):
    ids = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(150):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_weights_are_tied_where_the_configuration_says_so():
    tied = GPT(GPTConfig(50, **SMALL))
    untied = GPT(GPTConfig(50, **SMALL, tie_weights=False))
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight


def test_gpt_2_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(each.numel() for each in model.parameters()) == 124_439_808


# --- writing


def without_cache(model, ids, count):
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1)[:, None]], 1)
    return ids


def test_with_a_cache_the_same_is_written(model):
    ids = tokens(3, 5)
    assert torch.equal(
        generate(model, ids, 20, temperature=0), without_cache(model, ids, 20)
    )


def test_each_module_keeps_its_own_mode(model):
    """One of them frozen in evaluation mode while the rest is in training mode."""
    model.train()
    model.blocks[0].eval()
    before = [each.training for each in model.modules()]
    calls = [
        lambda: generate(model, tokens(2, 4), 3),
        lambda: next(stream(model, tokens(2, 4), 3)),
        lambda: window_losses(model, tokens(3, 9)),
        lambda: attention_maps(model, tokens(1, 4)),
    ]
    for call in calls:
        call()
        assert [each.training for each in model.modules()] == before
    for call in (window_losses, attention_maps):
        with pytest.raises((IndexError, ValueError)):
            call(model, tokens(2, 4) + 10**6)
        assert [each.training for each in model.modules()] == before


def test_a_batch_padded_on_the_left_writes_what_each_text_alone_does(model):
    texts = [tokens(1, n)[0] for n in (3, 8, 5)]
    longest = max(map(len, texts))
    left = [longest - len(each) for each in texts]
    ids = [F.pad(each, (n, 0), value=7) for each, n in zip(texts, left)]
    mask = [F.pad(torch.ones(len(each)), (n, 0)) for each, n in zip(texts, left)]
    ids, mask = torch.stack(ids), torch.stack(mask)
    together = generate(model, ids, 12, attention_mask=mask.long(), temperature=0)
    for text, written in zip(texts, together):
        alone = without_cache(model, text[None], 12)[0]
        assert torch.equal(written[longest:], alone[len(text) :])
    other = torch.where(mask.bool(), ids, 9)
    again = generate(model, other, 12, attention_mask=mask.long(), temperature=0)
    assert torch.equal(together[:, longest:], again[:, longest:])


def test_a_stream_gives_tokens_as_they_come(model):
    ids, drawn = tokens(2, 4), []
    model.train()
    for each in stream(model, ids, 6, temperature=0):
        drawn.append(each)
        assert not model.training
    assert model.training
    model.eval()
    assert torch.equal(
        torch.stack(drawn, 1), generate(model, ids, 6, temperature=0)[:, 4:]
    )


def test_a_stream_that_is_left_leaves_the_model_as_it_was(model):
    model.train()
    for _ in stream(model, tokens(1, 4), 6):
        break
    assert model.training


def test_a_seed_repeats(model):
    ids = tokens(2, 4)
    one, two = (generate(model, ids, 20, seed=3) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, generate(model, ids, 20, seed=4))


def test_a_text_ends_at_its_stop(model):
    ids = tokens(4, 4)
    free = generate(model, ids, 20, temperature=0)
    stop = free[0, 10].item()
    first = next(place for place in range(4, 24) if free[0, place] == stop)
    found = generate(model, ids, 20, temperature=0, stop=stop)
    assert torch.equal(found[0, : first + 1], free[0, : first + 1])
    assert (found[0, first:] == stop).all()


def test_nothing_more_is_written_once_all_texts_have_ended(model):
    free = generate(model, tokens(1, 4), 20, temperature=0)
    stop = free[0, 4].item()
    assert generate(model, tokens(1, 4), 20, temperature=0, stop=stop).shape == (1, 5)


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=9),
    st.integers(1, 9),
    st.floats(0.05, 1),
    st.floats(0.1, 3),
)
@settings(max_examples=80, deadline=None)
def test_only_what_the_settings_allow_is_drawn(logits, top_k, top_p, temperature):
    logits = torch.tensor([logits]).expand(64, -1)
    probabilities = (logits[0] / temperature).softmax(0)
    ordered = probabilities.sort(descending=True).values
    drawn = sample(logits, temperature, top_k=top_k)
    assert (probabilities[drawn] >= ordered[:top_k][-1]).all()
    drawn = sample(logits, temperature, top_p=top_p)
    needed = int((ordered.cumsum(0) - ordered < top_p - 1e-6).sum())
    assert (probabilities[drawn] >= ordered[needed - 1] - 1e-6).all()
    assert (sample(logits, 0) == logits.argmax(1)).all()


def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(40_000, -1), 0.7, generator=generator)
    found = torch.bincount(drawn, minlength=4) / 40_000
    assert (found - (logits / 0.7).softmax(0)).abs().max() < 0.01


# --- masked tokens, classes, losses


@given(
    st.floats(0.0, 3.0),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_are_those_that_are_drawn_from(temperature, top_k, top_p, seed):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    found = token_probabilities(logits, temperature, top_k, top_p)
    assert found.shape == logits.shape and torch.allclose(found.sum(1), torch.ones(3))
    one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
    drawn = sample(logits, temperature, top_k, top_p, one)
    assert (found.gather(1, drawn[:, None]) > 0).all()
    if temperature:
        assert torch.equal(drawn, torch.multinomial(found, 1, generator=other)[:, 0])
    if top_k is None and top_p is None and temperature:
        exact = (logits.double() / temperature).softmax(-1)
        assert temperature < 1e-3 or torch.allclose(found.double(), exact, atol=1e-6)


# --- attention seen


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT"])
def test_maps_are_those_of_transformers(name):
    make = {"GPT-2": gpt2, "Llama": llama, "BERT": bert}[name]
    theirs = make().eval()
    theirs.set_attn_implementation("eager")
    ours, ids = from_transformers(theirs).train(), torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = torch.stack(theirs(ids, output_attentions=True).attentions)
    assert torch.allclose(attention_maps(ours, ids), expected, atol=1e-6)
    assert ours.training, "the model is left as it was"


def test_maps_in_another_temperature_and_without_a_mask():
    torch.manual_seed(0)
    model, ids = GPT(FORMS["Llama"]).eval(), torch.randint(50, (1, 9))
    before = model(ids)
    as_it_is, hot, open_ = (
        attention_maps(model, ids, **options)
        for options in ({}, {"temperature": 1e6}, {"causal": False})
    )
    assert as_it_is.shape == (2, 1, 4, 9, 9)
    assert as_it_is.triu(1).abs().max() == 0 < open_.triu(1).abs().max()
    seen = torch.arange(1, 10)[:, None]
    assert torch.allclose(hot, (torch.ones(9, 9) / seen).tril().expand_as(hot))
    for maps in (as_it_is, hot, open_):
        assert torch.allclose(maps.sum(-1), torch.ones(2, 1, 4, 9))
    assert torch.equal(model(ids), before), "nothing of it stays"
    with pytest.raises(ValueError, match="temperature is 0; allowed is a number above"):
        attention_maps(model, ids, temperature=0)
    for each in model.modules():
        assert not each._forward_hooks and not each._forward_pre_hooks


class Letters:
    """Letters as tokens, all that a small vocabulary holds."""

    def encode(self, text):
        return [ord(letter) % 50 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + each % 26) for each in ids)


def test_the_knobs_of_sampling_move_the_picture():
    torch.manual_seed(0)
    model = GPT(FORMS["GPT-2"]).train()
    explorer = sampling_explorer(model, Letters(), "abc", max_new_tokens=8)
    assert explorer.alt.startswith("50 of 50 tokens can be drawn"), explorer.alt
    ids = torch.tensor([Letters().encode("abc")])
    follows = generate(model, ids, 8, seed=0)[0, 3:].tolist()
    assert explorer.alt.endswith(f"What follows: {Letters().decode(follows)!r}.")
    first = explorer.picture
    explorer.set(top_k=3)
    assert explorer.alt.startswith("3 of 50 tokens") and explorer.picture != first
    explorer.set(temperature=0.0)
    assert explorer.alt.startswith("1 of 50 tokens") and "with 100%" in explorer.alt
    explorer.set(text="")
    assert "text has 0 tokens; allowed are 1 to 31" in explorer.alt
    explorer.set(text="a" * 32)
    assert "text has 32 tokens; allowed are 1 to 31" in explorer.alt
    explorer.set(text="a" * 31, temperature=1.0)
    assert explorer.error is None and model.training
    with pytest.raises(ValueError, match="text has 0 tokens"):
        sampling_explorer(model, Letters(), "")


def test_the_knobs_of_attention_move_the_picture():
    torch.manual_seed(0)
    model = GPT(FORMS["Llama"]).eval()
    explorer = gpt_attention_explorer(model, Letters(), "self", max_tokens=6)
    assert explorer.alt.startswith("Attention of layer 2, head 1: most attention goes")
    assert "to" in explorer.alt and "cut" not in explorer.alt
    seen = set()
    for knobs in ({}, {"head": 3}, {"layer": 1}, {"temperature": 0.1}, {"causal": 0}):
        explorer.set(**knobs)
        assert explorer.error is None
        seen.add(explorer.picture)
    assert len(seen) == 5, "each of them moves it"
    explorer.set(text="a longer text")
    assert "(cut to 6 tokens)" in explorer.alt
    explorer.set(text="")
    assert "text has no token; allowed is at least one" in explorer.alt


def test_masked_tokens_are_those_of_the_paper():
    ids = tokens(400, 500)
    generator = torch.Generator().manual_seed(0)
    masked, targets = mask_tokens(ids, 50, 50, generator=generator)
    chosen = targets != -100
    assert abs(chosen.double().mean() - 0.15) < 0.005
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    hidden = (masked[chosen] == 50).double().mean()
    kept = (masked[chosen] == ids[chosen]).double().mean()
    assert abs(hidden - 0.8) < 0.01 and abs(kept - (0.1 + 0.1 / 50)) < 0.01


def test_padding_is_never_chosen_to_be_restored():
    ids = tokens(40, 50)
    allowed = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked, targets = mask_tokens(ids, 50, 50, share=1.0, allowed=allowed)
    assert torch.equal(targets != -100, allowed)
    assert torch.equal(masked[~allowed], ids[~allowed])


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification"])
def test_heads_mind_the_segments_as_in_transformers(kind):
    torch.manual_seed(0)
    theirs = grown(getattr(transformers, f"BertFor{kind}")(bert().config))
    ids = tokens(2, 9)
    segments = (torch.arange(9) > 4).long().expand(2, -1)
    ours = from_transformers(theirs)
    with torch.no_grad():
        logits = ours(ids, token_type_ids=segments)
        assert (logits - theirs(ids, token_type_ids=segments).logits).abs().max() < 1e-4
        assert (logits - ours(ids)).abs().max() > 1e-2


def test_heads_have_the_shapes_that_they_promise():
    encoder = BERT(BERTConfig(50, 32, 32, 2, 4))
    assert MaskedLM(encoder)(tokens(3, 7)).shape == (3, 7, 50)
    assert SequenceClassifier(encoder, 4)(tokens(3, 7)).shape == (3, 4)


def test_window_losses_are_the_cross_entropy_of_each_window(model):
    rows = tokens(4, 11)
    model.train()
    losses = window_losses(model, rows, batch_size=3)
    assert losses.shape == (4,) and model.training
    model.eval()
    for row, loss in zip(rows, losses):
        expected = F.cross_entropy(model(row[None, :-1])[0], row[1:])
        assert abs(loss - expected) < 1e-6


def test_an_interval_of_a_mean_is_students():
    found = mean_interval(torch.tensor([1.0, 2.0, 4.0, 7.0]))
    assert found.value == 3.5 and found.n == 4
    assert abs(found.high - 3.5 - 3.18244630 * 2.64575131 / 2) < 1e-6


# --- what cannot be


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m(tokens(1, 33)), "reaches position 33; allowed are at most 32"),
        (lambda m: m(tokens(1, 4) + 50), "allowed are 0 to 49"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "holds no token"),
        (lambda m: m(torch.zeros(4, dtype=torch.long)), r"of shape \(4,\); allowed"),
        (lambda m: m(torch.zeros(1, 4)), "input_ids is torch.float32"),
        (lambda m: m(tokens(1, 4), torch.ones(1, 3)), "attention_mask has shape"),
        (lambda m: generate(m, tokens(1, 30), 3), "max_new_tokens is 3; allowed are"),
        (lambda m: generate(m, tokens(1, 3), -1), "max_new_tokens is -1"),
        (lambda m: generate(m, tokens(1, 3), 2, temperature=-1), "temperature is -1"),
        (lambda m: generate(m, tokens(1, 3), 2, top_k=0), "top_k is 0"),
        (lambda m: generate(m, tokens(1, 3), 2, top_p=1.5), "top_p is 1.5"),
        (lambda m: window_losses(m, tokens(9)), r"rows has shape \(9,\); allowed is"),
        (lambda m: window_losses(m, tokens(3, 1)), r"rows has shape \(3, 1\); allowed"),
    ],
)
def test_what_cannot_be_read_or_written_is_named(model, call, said):
    with pytest.raises(ValueError, match=said):
        call(model)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"n_layer": 0}, "n_layer is 0; allowed is an integer from 1 on"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5"),
        ({"positions": "alibi"}, "positions is 'alibi'; allowed are"),
        ({"n_embd": 30, "n_head": 4}, "30"),
    ],
)
def test_configurations_that_cannot_be_built_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        GPT(GPTConfig(**{"vocab_size": 50, **SMALL, **options}))


# --- what the lesson must find


def expect_language(m):
    assert m["gain_over_bigram"]["low"] > 0, (
        "the model knows more of the text than pairs of bytes"
    )
    assert abs(m["initial_loss"] - math.log(256)) < 0.05, (
        "an untrained model gives every byte the same probability"
    )
    assert m["cache_changes_nothing"], "a cache and padding change nothing"
    for name, apart in m["difference_from_library"].items():
        near = 1e-4 if name == "Llama" else 1e-9  # its norms are float32 in there
        assert apart["logits"] < near and apart["gradient of the embedding"] < near, (
            "models of transformers answer alike in our form"
        )
        assert apart["and back"] == 0, "and come back bit for bit"
    assert m["unshifted_loss"] < 0.1, "a forgotten shift looks like a perfect model"
    for side in ("behind", "before"):
        assert m["restored"][f"mirror image seen, {side} the digit"]["low"] > 0.9, (
            "BERT looks both ways"
        )
    assert m["restored"]["mirror image hidden too"]["low"] < 0.15, (
        "and knows nothing where nothing can be known"
    )
    assert m["minilm_difference"] < 2e-5, "the real MiniLM has the same vectors"
    if m["chat"]:
        assert m["chat"]["logits"] < 1e-3, "and the chat model the same logits"
        same = m["chat"]["same_tokens"]
        assert same["float16"] > 0.9 * same["float32"], "float16 writes the same answer"


undecided_language = {
    "chat": "it is none where the chat model has not been fetched",
    "restored": "a run of four hundred steps, of which one rounding decides the course",
}
