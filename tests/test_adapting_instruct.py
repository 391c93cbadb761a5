"""Chapter 5: instruction tuning and preference tuning of a chat model.

A tiny random Llama and a tokenizer of a few dozen words stand in for the real ones.
"""

import copy
import json
import math
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bigmodel_nb.adapting.instruct import (
    Preference,
    answer_log_likelihood,
    answer_loss,
    answer_losses,
    change_per_token,
    chat_examples,
    chat_file,
    chat_loader,
    chat_prompt,
    course_questions,
    dpo_loss,
    instruct,
    load_chat,
    lower_states,
    per_token,
    prefer,
    question_rows,
    replies,
    split_questions,
    text_examples,
    upper_part,
)
from bigmodel_nb.adapting.lora import add_lora, set_adapters
from bigmodel_nb.data.sources import near_duplicates
from bigmodel_nb.headless.run import RunFailed, run
from bigmodel_nb.models.language import GPT, GPTConfig
from bigmodel_nb.models.pretrained import find, load_gguf

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' + m['content'] + ' </s> ;' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s> assistant : ' }}{% endif %}"
)
WORDS = (
    "user assistant system : ; a b c d e f g h is it so yes no long very brief".split()
)
QUESTIONS = ["is a b", "is it so", "is c d e f"]
ANSWERS = ["a b c", "yes", "no it is d"]


@pytest.fixture
def tokenizer():
    """A token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def tiny(tokenizer, layers=3):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer)


@pytest.fixture
def examples(tokenizer):
    return chat_examples(tokenizer, QUESTIONS, ANSWERS, system="brief")


# ---- what is learnt


def test_labels_are_the_answer_and_its_end_and_nothing_else(tokenizer, examples):
    for question, answer, each in zip(QUESTIONS, ANSWERS, examples):
        ids, labels = each["input_ids"].tolist(), each["labels"].tolist()
        counts = [i for i, label in enumerate(labels) if label != -100]
        assert counts == list(range(counts[0], len(ids))), "one stretch, up to the end"
        assert [ids[i] for i in counts] == [labels[i] for i in counts], "not shifted"
        assert tokenizer.decode([labels[i] for i in counts]) == f"{answer} </s>"
        prompt = ids[: counts[0]]
        assert prompt == chat_prompt(tokenizer, question, "brief"), (
            "what stands before is what generation will be given"
        )
        said = f"<s> system : brief </s> ; <s> user : {question} </s> ; <s> assistant :"
        assert tokenizer.decode(prompt) == said


def test_the_mask_is_that_of_transformers(tokenizer, examples):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' }}{% if m['role'] =="
        " 'assistant' %}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + ' </s>' }}{% endif %}{{ ' ;' }}{% endfor %}"
    )
    for question, answer, each in zip(QUESTIONS, ANSWERS, examples):
        turns = zip(("system", "user", "assistant"), ("brief", question, answer))
        theirs = marked.apply_chat_template(
            [{"role": role, "content": said} for role, said in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = (each["labels"] != -100).int().tolist()
        assert theirs["assistant_masks"][: len(mask)] == mask
        assert theirs["input_ids"][: len(mask)] == each["input_ids"].tolist()


WHOLE = "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' + m['content']"
ASKS = "{% if add_generation_prompt %}{{ '<s> assistant : ' }}{% endif %}"


@pytest.mark.parametrize(
    "template, words",
    [
        (WHOLE + " + ' ;' }}{% endfor %}" + ASKS, "does not end an answer"),
        (
            TEMPLATE.replace("'<s> assistant : '", "'<s> assistant ; '"),
            "token 10 is ':' instead of ';'",
        ),
        (
            TEMPLATE.replace("m['content']", "m['content'].replace('b', 'c')"),
            "of the answer",
        ),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_teaches_something_else_is_refused(tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="row 0: .*" + words):
        chat_examples(tokenizer, ["is it a"], ["b"])


@pytest.mark.parametrize(
    "question, answer, words",
    [
        ("is it", "", "answer is ''"),
        ("  ", "a", "question is '  '"),
        ("is it", None, "answer is None"),
        ("is it </s>", "a", "question holds '</s>'"),
        ("is it", "a <s> user", "answer holds '<s>'"),
        ("is it", "a " * 40, "(?:4|5)[0-9] tokens; allowed are at most 40"),
    ],
)
def test_a_row_that_cannot_be_learnt_is_named(tokenizer, question, answer, words):
    with pytest.raises(ValueError, match=f"row 1: .*{words}"):
        chat_examples(tokenizer, ["is it", question], ["a", answer], max_length=40)


def test_questions_and_answers_go_together(tokenizer):
    with pytest.raises(ValueError, match="2 entries and answers 1"):
        chat_examples(tokenizer, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        chat_examples(tokenizer, [], [])
    with pytest.raises(TypeError, match="one string"):
        chat_examples(tokenizer, "a", ["a"])
    with pytest.raises(ValueError, match="examples is empty"):
        chat_loader([])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        chat_examples(tokenizer, ["a"], ["a"])


# ---- losses


def by_hand(model, example):
    """Minus the log-probabilities of the tokens that count, one after the other."""
    log = model(example["input_ids"][None]).logits[0].log_softmax(-1)
    pairs = enumerate(example["labels"].tolist())
    return -sum(log[i - 1, label].item() for i, label in pairs if label != -100)


def test_log_likelihood_is_the_sum_over_the_answer_whatever_the_batch(model, examples):
    expected = [by_hand(model, each) for each in examples]
    input, labels = next(iter(chat_loader(examples, 3)))
    with torch.no_grad():
        together = answer_log_likelihood(model, input, labels)
        mean = answer_loss(model, input, labels)
        theirs = model(**input, labels=labels).loss
    assert together.tolist() == pytest.approx([-each for each in expected], abs=1e-4)
    tokens = sum((each["labels"] != -100).sum().item() for each in examples)
    assert mean.item() == pytest.approx(sum(expected) / tokens, abs=1e-5)
    assert mean.item() == pytest.approx(theirs.item(), abs=1e-5)
    found = answer_losses(model, chat_loader(examples, 2))
    assert found["nats"].tolist() == pytest.approx(expected, abs=1e-4)
    assert found["tokens"].tolist() == [len(each.split()) + 1 for each in ANSWERS]
    assert per_token(found) == pytest.approx(sum(expected) / tokens, abs=1e-5)


def test_a_model_of_the_course_is_measured_too(tokenizer, examples):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(len(tokenizer), 64, 16, 2, 2)).eval()
    input, labels = next(iter(chat_loader(examples, 3)))
    whole = gpt(**input)[:, :-1].mT
    expected = F.cross_entropy(whole, labels[:, 1:])
    assert answer_loss(gpt, input, labels).item() == pytest.approx(expected.item())


def test_labels_without_any_that_counts_are_refused(model, examples):
    input, labels = next(iter(chat_loader(examples, 3)))
    with pytest.raises(ValueError, match="none that counts"):
        answer_loss(model, input, torch.full_like(labels, -100))


def test_plain_texts_count_from_their_second_token(tokenizer):
    made = text_examples(tokenizer, ["a b c d", "a", "is it so"], max_length=3)
    assert [len(each["labels"]) for each in made] == [3, 3], "one token says nothing"
    assert all(each["labels"][0] == -100 for each in made)
    assert all(torch.equal(e["labels"][1:], e["input_ids"][1:]) for e in made)


def test_change_per_token_is_the_ratio_and_covers_it():
    generator, inside, width = np.random.default_rng(0), 0, []
    for _ in range(400):
        tokens = generator.integers(2, 30, 12)
        before = pd.DataFrame({"nats": np.zeros(12), "tokens": tokens})
        change = -0.5 * tokens + np.sqrt(tokens) * generator.normal(size=12)
        found = change_per_token(before, before.assign(nats=change))
        assert found.value == pytest.approx(change.sum() / tokens.sum())
        inside += found.low <= -0.5 <= found.high
        width.append(found.high - found.low)
    assert 0.91 <= inside / 400 <= 0.985, "95 % intervals"
    with pytest.raises(ValueError, match="same answers"):
        change_per_token(before, before.head(5))


# ---- parts of a model


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_upper_part_continues_the_lower_one(model, examples, first):
    kept = lower_states(model, examples, first, batch_size=2)
    sizes = [tuple(each["inputs_embeds"].shape) for each in kept]
    assert sizes == [(len(each["labels"]), 32) for each in examples], "no padding"
    upper = upper_part(model, first)
    assert len(upper.model.layers) == 3 - first and len(model.model.layers) == 3
    whole = answer_losses(model, chat_loader(examples, 3))["nats"]
    parted = answer_losses(upper, chat_loader(kept, 3))["nats"]
    assert parted.tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    assert not isinstance(model.model.norm, nn.Identity), "the model is as it was"


SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
FAMILIES = {  # whose layers differ, or whose embedding is scaled
    "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=8),
    "gemma3_text": dict(head_dim=8, sliding_window=8, sliding_window_pattern=3),
    "granite": dict(embedding_multiplier=12.0, residual_multiplier=0.5),
    "granitemoe": dict(
        embedding_multiplier=12.0, num_local_experts=2, num_experts_per_tok=1
    ),
    "mistral": dict(sliding_window=8),
    "olmo3": dict(sliding_window=8),
}


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_differ_or_scale_are_parted_too(tokenizer, family, first):
    torch.manual_seed(0)
    options = SIZES | FAMILIES[family] | {"vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    model = model.float().eval()
    long = chat_examples(tokenizer, ["a b c d e f g h"], ["h g f e d c b a " * 2])
    short = chat_examples(tokenizer, ["a b"], ["c"])
    kept = lower_states(model, long + short, first)
    whole = answer_losses(model, chat_loader(long + short))["nats"]
    parted = answer_losses(upper_part(model, first), chat_loader(kept))["nats"]
    assert parted.tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    assert model.config.num_hidden_layers == len(model.model.layers) == 4


def test_a_body_that_does_more_than_its_layers_is_refused(model):
    model.model.register_forward_hook(
        lambda body, given, output: type(output)(output.last_hidden_state * 2 + 1)
    )
    with pytest.raises(ValueError, match="whose layers from 1 on give other states"):
        upper_part(model, 1)


def test_each_module_keeps_its_own_mode(tokenizer, model, examples):
    model.train()
    model.model.layers[0].eval()
    before = [each.training for each in model.modules()]
    calls = [
        lambda: answer_losses(model, chat_loader(examples)),
        lambda: upper_part(model, 1),
        lambda: replies(model, tokenizer, QUESTIONS, max_new_tokens=2),
    ]
    for call in calls:
        call()
        assert [each.training for each in model.modules()] == before
    model.model.norm = None
    for call in calls:
        with pytest.raises(TypeError):
            call()
        after = [each.training for each in model.modules()]
        assert after == before[: len(after)], "after an error too"


def test_one_text_is_not_taken_for_its_letters(tokenizer, model):
    with pytest.raises(TypeError, match="questions is 'is it so'; allowed is a seq"):
        replies(model, tokenizer, "is it so")
    with pytest.raises(TypeError, match="texts is 'a b'; allowed is a sequence"):
        text_examples(tokenizer, "a b")


def test_the_upper_part_shares_what_is_trained(tokenizer, model, examples):
    kept, upper = lower_states(model, examples, 2), upper_part(model, 2)
    lower_before = model.model.layers[0].self_attn.q_proj.weight.clone()
    add_lora(model, 4, 8, targets=("layers.2.self_attn.q_proj", "layers.2.mlp.up_proj"))
    before = answer_losses(model, chat_loader(examples, 3))
    instruct(upper, chat_loader(kept, 3, True), epochs=20, learning_rate=1e-2)
    after = answer_losses(model, chat_loader(examples, 3))
    assert per_token(after) < per_token(before) - 0.1, "the whole model has learnt"
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, lower_before)
    set_adapters(model, None)
    again = answer_losses(model, chat_loader(examples, 3))
    assert again["nats"].tolist() == pytest.approx(before["nats"].tolist(), abs=1e-5)


def test_parts_are_refused_where_there_are_none(model):
    with pytest.raises(ValueError, match="allowed are 0 to 2"):
        upper_part(model, 3)
    with pytest.raises(ValueError, match="model is a Linear"):
        upper_part(nn.Linear(2, 2), 0)


# ---- training and answering


def test_a_tuned_model_answers_what_it_was_told_and_stops(tokenizer, model, examples):
    free = replies(model, tokenizer, QUESTIONS, max_new_tokens=9, system="brief")
    assert free["answer"].tolist() != ANSWERS
    long = ["a " * 20, "b", *QUESTIONS]
    both = [replies(model, tokenizer, long, batch_size=size) for size in (1, 5)]
    pd.testing.assert_frame_equal(*both)
    history = instruct(
        model, chat_loader(examples, 3, True), epochs=60, learning_rate=1e-2
    )
    assert len(history.rows) == 60 and not model.training
    told = replies(model, tokenizer, QUESTIONS, max_new_tokens=9, system="brief")
    assert told["answer"].tolist() == ANSWERS and told["ended"].all()
    assert told["tokens"].tolist() == [len(each.split()) + 1 for each in ANSWERS]
    one = replies(model, tokenizer, QUESTIONS, system="brief", batch_size=1)
    assert one["answer"].tolist() == ANSWERS, "alone as in a batch"


def test_without_labels_of_the_end_a_model_never_stops(tokenizer, model, examples):
    for each in examples:
        each["labels"][-1] = -100
    instruct(model, chat_loader(examples, 3, True), epochs=60, learning_rate=1e-2)
    told = replies(model, tokenizer, QUESTIONS, max_new_tokens=9, system="brief")
    starts = [a.startswith(b) for a, b in zip(told["answer"], ANSWERS)]
    assert all(starts), "the answers are learnt"
    assert not told["ended"].any() and (told["tokens"] == 9).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_training_that_cannot_work_is_refused(model, examples, options, words):
    with pytest.raises(ValueError, match=words):
        instruct(model, chat_loader(examples), **options)


def test_a_model_that_is_frozen_is_refused(model, examples):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that asks for gradients"):
        instruct(model, chat_loader(examples))


# ---- preferences


def four(n=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return 20 * torch.randn(4, n, generator=generator, dtype=dtype)


@pytest.mark.parametrize("smooth", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_dpo_loss_is_the_published_one(beta, smooth):
    """The closed form, and TRL's "sigmoid" loss written out."""
    a, b, c, d = numbers = four()
    margin = beta * (torch.log(a.exp() / c.exp()) - torch.log(b.exp() / d.exp()))
    closed = (1 - smooth) * torch.log1p(torch.exp(-margin))
    closed += smooth * torch.log1p(torch.exp(margin))
    logits = (a - b) - (c - d)
    trl = -F.logsigmoid(beta * logits) * (1 - smooth)
    trl -= F.logsigmoid(-beta * logits) * smooth
    ours = dpo_loss(*numbers, beta, smooth, "none")
    assert torch.allclose(ours, closed, rtol=1e-9)
    assert torch.allclose(ours, trl, rtol=1e-12, atol=1e-13)
    assert torch.allclose(dpo_loss(*numbers, beta, smooth), ours.mean())
    assert torch.allclose(dpo_loss(*numbers, beta, smooth, "sum"), ours.sum())
    assert dpo_loss(*torch.zeros(4, 3), beta, smooth).item() == pytest.approx(
        math.log(2)
    ), "a model that is its reference cannot tell"


def test_gradient_of_dpo_loss():
    numbers = four(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: dpo_loss(*n, 0.1, 0.2, "none"), numbers)
    (found,) = torch.autograd.grad(dpo_loss(*numbers, 0.1, reduction="sum"), numbers)
    a, b, c, d = numbers
    push = -0.1 * torch.sigmoid(-0.1 * ((a - c) - (b - d)))
    assert torch.allclose(found[0], push) and torch.allclose(found[1], -push)


def test_dpo_loss_has_a_gradient_where_it_is_most_wrong():
    chosen = torch.tensor([-1e4], requires_grad=True)
    dpo_loss(chosen, *torch.zeros(3, 1), beta=0.1).backward()
    assert chosen.grad.item() == pytest.approx(-0.1)


def test_dpo_ends_at_the_solution_of_the_objective():
    """Equation 4, in a world of four answers."""
    reward = torch.tensor([1.0, 0.2, -0.5, 0.3], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64).log()
    i, j = torch.tensor([(a, b) for a in range(4) for b in range(4) if a != b]).T
    wins, scores = torch.sigmoid(reward[i] - reward[j]), reference.clone()
    scores.requires_grad_()
    solver = torch.optim.LBFGS([scores], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        log = scores.log_softmax(0)
        pair = log[i], log[j], reference[i], reference[j]
        loss = (wins * dpo_loss(*pair, 0.5, reduction="none")).sum()
        loss.backward()
        return loss

    for _ in range(5):
        solver.step(closure)
    solution = (reference + reward / 0.5).softmax(0)
    assert torch.allclose(scores.detach().softmax(0), solution, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"reduction": "average"}, "reduction is 'average'"),
    ],
)
def test_dpo_loss_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        dpo_loss(*four(), **options)
    with pytest.raises(ValueError, match="shapes"):
        dpo_loss(*four()[:3], torch.zeros(3))
    if "reduction" not in options:
        with pytest.raises(ValueError, match=words):
            Preference(**options)


@pytest.fixture
def worse(tokenizer):
    long = [f"{answer} very very long" for answer in ANSWERS]
    return chat_examples(tokenizer, QUESTIONS, long, system="brief")


def sums(model, rows):
    return -answer_losses(model, chat_loader(rows, 3))["nats"].to_numpy()


def test_prefer_widens_the_margin_and_beta_holds_it(tokenizer, examples, worse):
    margins, drifts = [], []
    for beta in (0.1, 3.0):
        model = tiny(tokenizer)
        before = sums(model, examples), sums(model, worse)
        history = prefer(
            model, examples, worse, beta=beta, epochs=30, learning_rate=3e-3
        )
        moved = [
            now - was
            for now, was in zip((sums(model, examples), sums(model, worse)), before)
        ]
        assert (moved[0] > moved[1]).all()
        margins.append((moved[0] - moved[1]).mean())
        losses = history.batch_losses
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4), (
            "the reference is the model that it starts from"
        )
        assert losses[-1] < losses[0] / 2
        expected = np.log1p(np.exp(-beta * (moved[0] - moved[1]))).mean()
        assert losses[-1] == pytest.approx(expected, rel=0.5), "of the last step"
        drifts.append(abs(moved[1]).mean())
    assert margins[0] > margins[1] and drifts[0] > drifts[1], (
        "a larger beta stays closer to the reference"
    )


def test_prefer_takes_kept_states(tokenizer, model, examples, worse):
    plain = copy.deepcopy(model)
    for each in (model, plain):
        torch.manual_seed(1)
        add_lora(each, 4, 8, targets="layers.2.self_attn.v_proj")
    options = dict(epochs=3, learning_rate=1e-2, seed=3)
    kept = [lower_states(model, rows, 2) for rows in (examples, worse)]
    ours = prefer(upper_part(model, 2), *kept, **options)
    theirs = prefer(plain, examples, worse, **options)
    assert ours.batch_losses == pytest.approx(theirs.batch_losses, abs=1e-5)


def test_prefer_refuses(model, examples, worse):
    with pytest.raises(ValueError, match="row 0: the chosen answer is the rejected"):
        prefer(model, examples, examples)
    with pytest.raises(ValueError, match="3 entries and rejected 2"):
        prefer(model, examples, worse[:2])
    with pytest.raises(ValueError, match="beta is 0"):
        prefer(model, examples, worse, beta=0)


# ---- rows


def table_of(n=8):
    return pd.DataFrame(
        {
            "q": [f"question {i}" for i in range(n)],
            "a": [f"answer {i}" for i in range(n)],
            "w": [f"worse {i}" for i in range(n)],
        }
    )


def test_rows_that_lack_something_are_left_out_and_counted():
    table = table_of()
    table.loc[0, "q"], table.loc[1, "a"], table.loc[2, "w"] = (
        "question 7",
        " ",
        "answer 2",
    )
    rows = question_rows(table, "q", "a", "w")
    assert rows.columns.tolist() == ["question", "answer", "rejected"]
    assert rows["question"].tolist() == [
        "question 7",
        *[f"question {i}" for i in range(3, 7)],
    ]
    assert rows.index.tolist() == [1, 4, 5, 6, 7], "those of the table, from 1"
    assert rows.attrs["left_out"] == {
        2: "no answer",
        3: "the rejected answer is the answer",
        8: "the question of row 1",
    }
    table.loc[3, "a"] = None
    assert len(question_rows(table, "q", "a")) == 5
    parts = split_questions(rows, 0.4)
    assert sorted([*parts[0].index, *parts[1].index]) == rows.index.tolist()


def test_an_error_names_the_row_of_the_user_s_table(tokenizer):
    table = pd.DataFrame({"q": list("abcdef"), "a": list("bcdefg")})
    rows = question_rows(table, "q", "a").iloc[2:]
    with pytest.raises(ValueError, match="row 3: with its answer it has [0-9]+ tokens"):
        texts = rows["question"], rows["answer"]
        chat_examples(tokenizer, *texts, rows=rows.index, max_length=3)


@pytest.mark.parametrize(
    "columns, words",
    [
        (("question", "a"), "question is 'question'; the columns of the table are 'q'"),
        (("q", "b"), "answer is 'b'"),
        (("q", "a", "no"), "rejected is 'no'"),
        (("a", "a"), "question is 'a', answer is 'a'; allowed are different"),
        (("q", "a", "a"), "allowed are different"),
    ],
)
def test_columns_that_are_not_there_are_named(columns, words):
    with pytest.raises(ValueError, match=words):
        question_rows(table_of(), *columns)
    with pytest.raises(ValueError, match="3 rows of 3"):
        question_rows(table_of(3), "q", "a")


def test_questions_are_split_with_near_duplicates_on_one_side():
    rows = table_of(40).rename(columns={"q": "question", "a": "answer"})
    words = course_questions()["question"]
    rows["question"] = [words[i] for i in range(40)]
    rows.loc[39, "question"] = rows.loc[38, "question"] + "?"
    for seed in range(6):
        train, test = split_questions(rows, 0.25, seed)
        assert len(train) + len(test) == 40 and 9 <= len(test) <= 12
        sides = [set(part["answer"]) for part in (train, test)]
        assert any({"answer 38", "answer 39"} <= side for side in sides)
    assert split_questions(rows, 0.25, 1)[1].equals(split_questions(rows, 0.25, 1)[1])
    with pytest.raises(ValueError, match="4 questions.* allowed are at least 2 each"):
        split_questions(rows.head(4), 0.9)


def test_a_template_of_questions_does_not_fill_the_held_out_part():
    """Most questions of a FAQ are phrased alike: they are trained on, together."""
    asked = [
        f"How do I reset the password of my account number {i}?" for i in range(30)
    ]
    asked += list(course_questions()["question"][:10])
    rows = pd.DataFrame({"question": asked, "answer": [f"Do {i}." for i in range(40)]})
    for seed in range(8):
        train, test = split_questions(rows, 0.25, seed)
        assert len(test) == 10 and len(train) == 30
    with pytest.raises(ValueError, match="up to 30 are alike"):
        split_questions(rows.head(30), 0.25)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=12, max_size=60), st.integers(0, 99))
def test_no_held_out_answer_was_trained_on(numbers, seed):
    words = course_questions()["question"]
    rows = pd.DataFrame({"question": [words[i % 48] for i in range(len(numbers))]})
    rows["answer"] = [
        f"{'Answer' if i % 2 else 'answer '} {n}" for i, n in enumerate(numbers)
    ]
    try:
        train, test = split_questions(rows, 0.3, seed)
    except ValueError as error:
        assert "allowed are at least 2 each" in str(error)
        return
    plain = [
        {" ".join(each.casefold().split()) for each in part["answer"]}
        for part in (train, test)
    ]
    assert not plain[0] & plain[1] and 2 <= len(test) <= max(2, round(0.3 * len(rows)))


def test_the_course_s_questions_are_whole():
    rows = course_questions()
    assert rows.columns.tolist() == ["question", "asks", "answer", "rejected", "split"]
    assert rows["split"].value_counts().to_dict() == {"train": 36, "test": 12}
    assert len(course_questions("train")) == 36 and len(course_questions("test")) == 12
    for column in ("question", "asks", "answer", "rejected"):
        assert rows[column].is_unique and (rows[column].str.strip() != "").all()
        assert rows[column].map(str.isascii).all()
    lengths = rows["rejected"].str.split().map(len) / rows["answer"].str.split().map(
        len
    )
    assert lengths.min() > 2, "each rejected answer is long-winded"
    side = rows["split"]
    for column in ("question", "answer"):
        near = near_duplicates(rows[column], 0.5)
        assert not [i for i, j, _ in near if side[i] != side[j]]
    with pytest.raises(ValueError, match="split is 'valid'"):
        course_questions("valid")


def test_commands_that_answers_name_are_there():
    """What a reader can check, the tests do too."""
    from typer.main import get_command

    from bigmodel_nb.headless.cli import app

    commands = get_command(app).commands
    said = course_questions()["answer"].str.extract(r"`bigmodel (\w+)")[0].dropna()
    assert len(said) >= 7 and set(said) <= set(commands)


# ---- the real model


def test_the_real_chat_model_learns_to_end_its_answers():
    folder = find("SmolLM2-135M-Instruct")
    if folder is None:
        pytest.skip("needs the chat model: bigmodel fetch SmolLM2-135M-Instruct")
    model, tokenizer = load_gguf(next(folder.glob("*.gguf")))
    rows = course_questions("train").head(6)
    first = len(model.model.layers) - 8
    made = chat_examples(
        tokenizer, rows["question"], rows["answer"], system="Be brief."
    )
    marks = [tokenizer.decode(e["labels"][e["labels"] != -100]) for e in made]
    assert marks == [f"{each}<|im_end|>" for each in rows["answer"]]
    kept, upper = lower_states(model, made, first), upper_part(model, first)
    names = [
        f"layers.{i}.mlp.{p}_proj" for i in range(first, 30) for p in ("up", "down")
    ]
    add_lora(model, 8, 16, targets=names)
    before = answer_losses(upper, chat_loader(kept))
    instruct(upper, chat_loader(kept, 3, True), epochs=10, learning_rate=2e-3)
    after = answer_losses(upper, chat_loader(kept))
    assert change_per_token(before, after).high < -0.5
    asked = replies(model, tokenizer, rows["question"][:2].tolist(), system="Be brief.")
    assert asked["ended"].all()


# ---- the lesson, also as a job


def expect_instruct(m):
    change = m["change_of_loss"]
    assert change["trained on"]["high"] < 0, "the page is learnt"
    assert change["held out"]["high"] < 0, "and the form of answers that are not on it"
    ended, asked = m["replies_ended"], m["rows"]["held out"]
    assert ended["after"] >= ended["before"], "answers end"
    assert m["kept_difference"] < 1e-2, "the upper part is the model"
    assert m["refusals"] == 4, "templates and texts that teach something else"
    for found in m["preference"].values():
        assert found["trained on"]["low"] > 0, "the margin grows"
    assert m["toy_error"] < 1e-4, "the loss ends at the solution of the objective"
    assert m["same_mask"] == 8, "transformers marks the same tokens"
    assert set(m["another_form"]) == {
        "template → another form",
        "another form → that, ending on a space",
    }, "the missing template and the space are told apart"
    largest = m["largest_difference"]
    assert largest["answer_loss, transformers"] < 1e-4
    assert max(v for k, v in largest.items() if "transformers" not in k) < 1e-8
    if m["chat_model"] == "SmolLM2-135M-Instruct":
        assert m["asked_otherwise_minus_trained_on"]["low"] > 0, (
            "more is learnt of the wording that was trained on"
        )
        assert ended["after"] >= asked - 3 > 3 > ended["before"]
        space = m["another_form"]["another form → that, ending on a space"]
        assert space["low"] > 0, "behind a space of its own an answer costs more"
        assert m["ended_without_end"] < ended["after"] - 3, "without its label no end"


def _undecided():
    if find("SmolLM2-135M-Instruct") is None:
        reason = "the lesson runs on a small model where the real one is not fetched"
        names = "chat_model perplexity change_of_loss replies_ended rows trainable"
        names += " preference chosen_moved kl_per_token all_tokens_minus_answers"
        names += " ended_without_end loss_of_end another_form known_by_heart"
        names += " asked_otherwise_minus_trained_on"
        return dict.fromkeys(names.split(), reason)
    near = "rounding decides which of two near tokens a reply goes on with"
    return {
        "replies_ended": near,
        "ended_without_end": near,
        "known_by_heart": near,
        "toy_error": "it is rounding, where the solver comes to rest",
        "kept_difference": "it is rounding of one product in another order",
    }


undecided_instruct = _undecided()


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"layers": 1.5}, "layers is 1.5"),
    ],
)
def test_a_job_that_cannot_work_ends_with_a_sentence(tmp_path, parameters, words):
    with pytest.raises(RunFailed) as failed:
        run("adapting/instruct", out=tmp_path / "run", **parameters)
    assert words in str(failed.value)


def test_a_chat_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`bigmodel fetch SmolLM2-135M"):
        chat_file("SmolLM2-135M-Instruct")
    with pytest.raises(FileNotFoundError, match="'no/such/folder', which is not there"):
        load_chat("no/such/folder")
    with pytest.raises(ValueError, match="allowed is a chat model"):
        chat_file("all-MiniLM-L6-v2")


def test_a_job_on_own_rows_says_what_it_did_and_how_to_use_it(
    tmp_path, tokenizer, model, monkeypatch
):
    """The report, and the code in the README of the adapter's folder."""
    tokenizer.save_pretrained(tmp_path / "chat")
    model.save_pretrained(tmp_path / "chat")
    rows = table_of(14)
    letters = "a b c d e f g h".split()
    generator = np.random.default_rng(0)
    for column, count in (("q", 6), ("a", 4), ("w", 8)):
        rows[column] = [" ".join(generator.choice(letters, count)) for _ in range(14)]
    rows.loc[3, "a"] = " "
    rows.to_csv(tmp_path / "qa.csv", index=False)
    done = run(
        "adapting/instruct",
        out=tmp_path / "run",
        data=tmp_path / "qa.csv",
        question="q",
        answer="a",
        rejected="w",
        system="brief",
        model=str(tmp_path / "chat"),
        layers=0.7,
    )
    assert done.metrics["steps"] >= 60
    assert "asked otherwise" not in done.metrics["change_of_loss"]
    cells = nbformat.read(done.notebook, as_version=4).cells
    shown = [c.get("outputs", c.source) for c in cells if c.cell_type != "raw"]
    report = json.dumps(shown, ensure_ascii=False)
    assert f"After {done.metrics['steps']} steps" in report
    assert "no answer" in report, "row 4 is named"
    for of_lesson in (
        "Exercise",
        "Bradley",
        "this course",
        "SmolLM",
    ):
        assert of_lesson not in report, of_lesson
    assert "Markdown object" not in done.report.read_text(encoding="utf-8")
    monkeypatch.chdir(done.folder)
    for name in ("adapter", "adapter-preferred"):
        said = (done.folder / name / "README.md").read_text(encoding="utf-8")
        code = said.split("```python\n")[1].split("```")[0]
        assert "system='brief'" in code and str(tmp_path / "chat") in code
        names = {}
        exec(code, names)
        assert names["answers"]["answer"].tolist()


def test_what_cannot_be_measured_or_asked_is_said(tokenizer, model, tmp_path):
    with pytest.raises(ValueError, match="loader has no batch"):
        answer_losses(model, [])
    with pytest.raises(ValueError, match="texts has none of two tokens"):
        text_examples(tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="rows has 1 entries; allowed is one for each"):
        chat_examples(tokenizer, QUESTIONS, ANSWERS, rows=[1])
    mark = tokenizer.eos_token
    for call, role in (
        (lambda: replies(model, tokenizer, [f"a {mark} b"]), "question"),
        (lambda: replies(model, tokenizer, ["a"], system=mark), "system"),
        (lambda: chat_examples(tokenizer, ["a"], ["b"], system=mark), "system"),
        (lambda: chat_examples(tokenizer, ["a"], [mark], role="rejected"), "rejected"),
    ):
        with pytest.raises(ValueError, match=f"{role} holds '.*', a mark"):
            call()
    for wrong in (tmp_path, Path(__file__)):
        with pytest.raises(ValueError, match="which is neither; allowed are a .gguf"):
            load_chat(wrong)


def test_a_loss_that_is_not_finite_is_no_result(tokenizer, model):
    examples = chat_examples(tokenizer, QUESTIONS, ANSWERS, system="brief")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of answer 0 is nan"):
        answer_losses(broken, chat_loader(examples))


def test_pairs_answer_one_question(tokenizer, model):
    chosen = chat_examples(tokenizer, ["is it a", "is it b"], ["a", "b"])
    other = chat_examples(tokenizer, ["is it a", "is it c"], ["b", "a"])
    with pytest.raises(ValueError, match="row 1: the pair answers two questions"):
        prefer(copy.deepcopy(model), chosen, other)
    same = chat_examples(tokenizer, ["is it a", "is it b"], ["b", "a"])
    with pytest.raises(ValueError, match="precision is 'auto'; allowed are 'float32'"):
        prefer(copy.deepcopy(model), chosen, same, precision="auto")
