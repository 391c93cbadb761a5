"""Learning from texts without labels: hidden words, contrast, and an honest probe."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from test_rehearsed_gpu import TEXTS, tokenizer
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.adapting.selfsup import (
    TextEncoder,
    alignment,
    causal_loss,
    check_pairs,
    few_label_accuracy,
    few_labels,
    frozen,
    info_nce,
    mask_tokens,
    masked_loader,
    masked_loss,
    simcse,
    standardised,
    uniformity,
)
from bigmodel_nb.models.language import BERT, GPT, BERTConfig, GPTConfig, MaskedLM
from bigmodel_nb.training.loop import evaluate, fit


def expect_selfsup(m):
    assert m["masked_loss_change"]["own texts"]["high"] < 0, (
        "continued pretraining lowers the held-out loss on its kind of text"
    )
    for kind, loss in m["small_losses"].items():
        assert loss["high"] > m["unigram"][kind], (
            f"{kind}: 50 steps are not shown to beat the frequencies of words"
        )
    reached = m["masked_loss_before"]["own texts"]
    reached += m["masked_loss_change"]["own texts"]["high"]
    assert reached > m["own_unigram"], "nor are 10 of continued pretraining"
    assert m["off_cache"] < 1e-4, "what frozen layers make of a text may be kept"
    for shares in (m["shares"], m["shares_of_transformers"]):
        expected = {
            "chosen, of ordinary": 0.15,
            "[MASK], of chosen": 0.8,
            "exchanged, of chosen": 0.1,
            "chosen, of special": 0.0,
        }
        for name, share in expected.items():
            assert abs(shares[name]["value"] - share) < 0.02, name
    in_float32 = m["apart"].pop("causal_loss")  # transformers casts to it
    assert in_float32 < 1e-6
    assert max(m["apart"].values()) < 1e-12 and m["off_closed_form"] < 1e-12
    assert m["off_floor"] < 1e-6, "copies in a batch set a floor of log k"
    gain = m["gain"]["MiniLM over TF-IDF"]
    assert gain["4"]["low"] > 0.1 and gain["16"]["low"] > 0.1, (
        "pretrained vectors need fewer labels"
    )
    assert m["gain_with_fewer_labels"]["low"] > 0, "four labels with, sixteen without"
    tuned = m["gain_of_tuned_over_scratch"]["4"]
    assert tuned["low"] > 0.1, "and so does the network that is fine-tuned"
    for kind in ("next token", "masked words"):
        low = m["accuracy"][f"{kind}, from scratch, 4"]["value"]
        assert low < m["accuracy"]["TF-IDF, 4"]["value"], (
            "a few hundred texts are too few to learn a language from"
        )
    for way in ("masked words", "SimCSE"):
        gain = m["gain"][f"{way} on the own texts, over MiniLM"]["16"]
        assert gain["value"] < 0.05, "a few steps are no great gain"


@pytest.fixture
def words():
    made = tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


def bert(words, dropout=0.0, width=16):
    torch.manual_seed(0)
    config = BERTConfig(len(words), 16, width, 1, 2, dropout=dropout)
    return BERT(config)


def test_masks_have_the_distribution_of_the_papers_and_of_transformers(words):
    """Counts of 3 outcomes against the exact shares and the collator's, chi-squared."""
    from scipy.stats import chi2_contingency, chisquare

    ordinary = len(words.all_special_ids)
    ids = torch.randint(4, len(words) - 1, (400, 100))
    ids[:, 0], ids[:, 90:] = words.cls_token_id, words.pad_token_id
    generator = torch.Generator().manual_seed(0)
    masked, labels = mask_tokens(ids, words, generator=generator)
    torch.manual_seed(0)
    collator = transformers.DataCollatorForLanguageModeling(words)
    theirs = collator([{"input_ids": each.tolist()} for each in ids])

    def outcomes(masked, labels):
        special = torch.isin(ids, torch.tensor(words.all_special_ids))
        chosen = labels != -100
        assert not (chosen & special).any() and ordinary == 5
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(masked[~chosen], ids[~chosen])
        hidden = (masked == words.mask_token_id) & chosen
        other = (masked != ids) & chosen & ~hidden
        same = chosen & (masked == ids)
        rest = ~chosen & ~special
        return [int(each.sum()) for each in (hidden, other, same, rest)]

    ours = outcomes(masked, labels)
    # a token drawn at random is now and then the same one, or the mask
    again = 1 / len(words)
    hidden, other = 0.15 * (0.8 + 0.1 * again), 0.15 * 0.1 * (1 - 2 * again)
    shares = np.array([hidden, other, 0.15 - hidden - other, 0.85])
    assert chisquare(ours, shares * sum(ours)).pvalue > 1e-3
    both = [ours, outcomes(theirs["input_ids"], theirs["labels"])]
    assert chi2_contingency(both).pvalue > 1e-3


@given(st.floats(0.01, 1), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_batch_is_masked(probability, rows, time, seed):
    words = tokenizer()
    words.add_special_tokens({"mask_token": "[MASK]"})
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(words), (rows, time), generator=generator)
    masked, labels = mask_tokens(ids, words, probability, generator)
    chosen = labels != -100
    assert torch.equal(torch.where(chosen, labels, masked), ids)
    special = torch.isin(ids, torch.tensor(words.all_special_ids))
    assert not (chosen & special).any()
    if probability == 1:
        assert torch.equal(chosen, ~special)


def test_masking_says_what_is_wrong(words):
    ids = torch.ones(1, 3).long()
    for wrong in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=f"^probability is {wrong}; allowed"):
            mask_tokens(ids, words, wrong)
    with pytest.raises(ValueError, match="^tokenizer has no mask token; allowed"):
        mask_tokens(ids, tokenizer())
    with pytest.raises(ValueError, match="^tokenizer has no mask token; allowed"):
        masked_loader(TEXTS, tokenizer())
    with pytest.raises(TypeError, match="^texts is 'one'"):
        masked_loader("one", words)


def test_batches_are_masked_anew_and_repeat_with_the_seed(words):
    loader = masked_loader(TEXTS, words, 3, shuffle=False, probability=0.5)
    first, second = ([pair[1] for pair in loader] for _ in range(2))
    assert not all(torch.equal(*pair) for pair in zip(first, second))
    again = masked_loader(TEXTS, words, 3, shuffle=False, probability=0.5)
    assert all(torch.equal(a, b[1]) for a, b in zip(first, again))


def test_masked_loss_is_that_of_all_logits(words):
    model = MaskedLM(bert(words)).double().eval()
    nn.init.normal_(model.bias)
    for input, target in masked_loader(TEXTS, words, 4, probability=0.5):
        logits = model(**input)
        whole = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        assert abs(masked_loss(model, input, target) - whole) < 1e-12
    none = torch.full_like(target, -100)
    loss = masked_loss(model, input, none)
    loss.backward()
    assert loss == 0, "a batch without a hidden token is worth nothing, and not nan"


def test_causal_loss_is_that_of_each_text_alone(words):
    "Padding counts nowhere, and the mean is over all next tokens of the batch."
    torch.manual_seed(0)
    model = GPT(GPTConfig(len(words), 16, 16, 1, 2)).double().eval()
    own = [torch.randint(5, len(words), (n,)) for n in (3, 7, 2, 1)]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in own], True)
    input = {"input_ids": nn.utils.rnn.pad_sequence(own, True), "attention_mask": mask}
    total = 0.0
    for each in own:
        logits = model(each[None])[0, :-1]
        total += F.cross_entropy(logits, each[1:], reduction="sum")
    assert torch.isclose(causal_loss(model, input, None), total / 9)
    alone = {name: each[3:, :1] for name, each in input.items()}
    assert causal_loss(model, alone, None) == 0, "one token has no next one"


def test_fit_and_evaluate_take_it(words):
    model = MaskedLM(bert(words))
    loader = masked_loader(TEXTS * 4, words, 8)
    judge = masked_loader(TEXTS, words, 8, False, 1, 0.5)
    before = evaluate(model, judge, objective=masked_loss).loss
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    fit(model, loader, epochs=15, objective=masked_loss, optimizer=optimizer)
    judge = masked_loader(TEXTS, words, 8, False, 1, 0.5)
    assert evaluate(model, judge, objective=masked_loss).loss < 0.8 * before


vectors = st.tuples(st.integers(2, 9), st.integers(1, 7), st.integers(0, 999))


@given(vectors, st.floats(0.02, 5))
@settings(deadline=None)
def test_info_nce_is_its_formula(shape, temperature):
    """Against a double loop over pairs, in float64."""
    n, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    cosine = lambda u, v: float(u @ v / (u.norm() * v.norm()))
    losses = []
    for i in range(n):
        row = [cosine(a[i], b[j]) / temperature for j in range(n)]
        top = max(row)
        losses.append(math.log(sum(math.exp(x - top) for x in row)) + top - row[i])
    assert abs(info_nce(a, b, temperature).item() - sum(losses) / n) < 1e-9


def test_info_nce_is_that_of_sentence_transformers():
    pytest.importorskip("sentence_transformers", reason="an extra")
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
    )

    theirs = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.07)
    pair = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    ours = info_nce(*pair, temperature=0.07)
    other = theirs.compute_loss_from_embeddings([pair[0], pair[1]], None)
    assert abs(ours - other) < 1e-12
    gradients = [torch.autograd.grad(each, pair)[0] for each in (ours, other)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_info_nce_says_what_is_wrong():
    a = torch.randn(3, 2)
    for other in (torch.randn(2, 2), torch.randn(3, 4), torch.randn(3)):
        with pytest.raises(ValueError, match="^first and second have the shapes"):
            info_nce(a, other)
    with pytest.raises(ValueError, match="with at least 2 rows$"):
        info_nce(a[:1], a[:1])
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="^temperature is"):
            check_pairs(a, a, wrong)


def test_simcse_needs_dropout(words):
    input, target = next(iter(masked_loader(TEXTS, words, 6)))
    model = TextEncoder(bert(words, 0.2)).train()
    loss = simcse(0.1)(model, input, target)
    torch.manual_seed(3)
    first, second = model(**input), model(**input)
    torch.manual_seed(3)
    assert torch.equal(simcse(0.1)(model, input, target), info_nce(first, second, 0.1))
    assert loss.requires_grad
    for still in (model.eval(), TextEncoder(bert(words)).train()):
        with pytest.raises(ValueError, match="^model gives each text the same vector"):
            simcse(0.1)(still, input, target)


def test_a_text_encoder_does_not_see_padding(words):
    model = TextEncoder(bert(words)).double().eval()
    ids = torch.tensor([words("good film")["input_ids"]])
    alone = model(ids, torch.ones_like(ids))
    padded = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 3))
    assert torch.allclose(model(padded, mask), alone, atol=1e-12)


def test_alignment_and_uniformity_are_their_formulas():
    a, b = torch.randn(2, 7, 3)
    u, v = F.normalize(a.double()), F.normalize(b.double())
    assert abs(alignment(a, b) - (u - v).pow(2).sum(1).mean()) < 1e-12
    pairs = [
        math.exp(-2 * float((u[i] - u[j]).pow(2).sum()))
        for i in range(7)
        for j in range(i)
    ]
    assert abs(uniformity(a) - math.log(sum(pairs) / len(pairs))) < 1e-12
    assert uniformity(torch.ones(5, 3)) == 0 and alignment(a, 2 * a) < 1e-12
    assert abs(alignment(a, -a) - 4) < 1e-9
    assert abs(alignment(a[:1], -a[:1]) - 4) < 1e-9, "of one pair it is defined"
    for wrong in (a[:1], a[0], a.long()):
        with pytest.raises(ValueError, match="^vectors is torch"):
            uniformity(wrong)
    with pytest.raises(ValueError, match="^first is torch.int64 and second"):
        info_nce(a.long(), b.long())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.head.weight.requires_grad_(False)


def test_frozen_is_in_evaluation_mode_and_comes_back_as_it_was():
    model = Counting().train()
    model.norm.eval()
    with frozen(model) as inside:
        assert inside is model and not model.training
        assert not any(each.requires_grad for each in model.parameters())
        model.head(model.norm(torch.randn(4, 3)))
    assert model.training and not model.norm.training
    assert model.head.bias.requires_grad and not model.head.weight.requires_grad


def test_frozen_tells_a_change_of_one_bit_and_of_a_buffer():
    model = Counting()
    with pytest.raises(RuntimeError, match="^'head.bias' has changed"), frozen(model):
        bits = model.head.bias.data.view(torch.int32)
        bits[0] ^= 1
    assert model.training, "the modes come back nonetheless"
    with (
        pytest.raises(RuntimeError, match="^'norm.(running|num)"),
        frozen(model),
    ):
        model.train()  # what a loop might do
        model.norm(torch.randn(4, 3))
    model.register_buffer("unsaved", torch.zeros(2), persistent=False)
    with pytest.raises(RuntimeError, match="^'unsaved' has changed"), frozen(model):
        model.unsaved[1] = 3
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with frozen(model):
        pass  # what is no number is equal to itself here


@given(st.integers(1, 4), st.integers(0, 99))
def test_larger_draws_hold_smaller_ones(n, seed):
    targets = np.arange(40) % 3
    rows = np.arange(5, 35)
    chosen = few_labels(targets, n, rows, seed)
    assert set(chosen) <= set(rows) and len(set(chosen)) == 3 * n
    assert np.bincount(targets[chosen]).tolist() == [n] * 3
    assert set(chosen) <= set(few_labels(targets, n + 1, rows, seed))


def test_too_many_labels_are_told():
    with pytest.raises(ValueError, match="at most 2, the rows of class 1$"):
        few_labels([0, 0, 0, 1, 1], 3)
    with pytest.raises(ValueError, match="^per_class is 0; allowed"):
        few_labels([0, 1], 0)


def test_rows_are_numbers_or_booleans_each_once():
    targets = np.arange(8) % 2
    some = np.array([True] * 6 + [False] * 2)
    assert set(few_labels(targets, 2, some)) <= set(range(6))
    assert np.array_equal(
        few_labels(targets, 2, some), few_labels(targets, 2, range(6))
    )
    features = torch.randn(8, 3)
    by_numbers = standardised(features, range(6))
    assert torch.equal(standardised(features, some), by_numbers)
    for wrong in ([0, 8], [-1, 0, 1], [], [0.0, 1.0], some[:5], "a"):
        with pytest.raises(ValueError, match="^rows is .*; allowed are at least one"):
            few_labels(targets, 1, wrong)
    with pytest.raises(ValueError, match="^rows holds a row twice; allowed"):
        few_labels(targets, 1, [0, 0, 1, 1])


def test_a_probe_says_what_is_wrong():
    targets, features = np.arange(12) % 2, torch.randn(12, 3)
    parts = dict(learn=range(4), valid=range(4, 8), test=range(8, 12))

    def refused(words, features=features, targets=targets, **other):
        with pytest.raises(ValueError, match=words):
            few_label_accuracy(features, targets, **(parts | other))

    refused("^penalties is ", penalties=())
    refused("^penalties is ", penalties=(1.0, -1.0))
    refused("^valid shares rows with learn; allowed", valid=range(4))
    refused("^test shares rows with valid; allowed", test=range(7, 12))
    refused("^test is .*; allowed are at least one number from 0 to 11", test=[])
    refused("^valid is ", valid=[99])
    refused("^learn holds one class; allowed", learn=[0, 2, 8], test=[9, 10])
    refused("^features holds numbers that are not finite", features=features / 0)
    refused(r"^features has the shape \(11, 3\) and targets \(12,\)", features[:11])
    asked = features.clone().requires_grad_()
    masks = {
        name: np.isin(np.arange(12), list(rows)) for name, rows in parts.items()
    }  # booleans are as good as numbers
    expected = few_label_accuracy(features, targets, **parts)
    assert few_label_accuracy(asked, targets, **masks) == expected


def test_a_probe_learns_from_its_rows_only():
    targets = np.arange(60) % 2
    clear = torch.randn(60, 4) + 4 * torch.tensor(targets)[:, None] - 2
    learn, valid, test = np.arange(10), np.arange(10, 20), np.arange(20, 60)
    found = few_label_accuracy(clear, targets, learn, valid, test)
    assert found.value == 1 and found.n == 40
    sparse = csr_matrix(clear.numpy())
    assert few_label_accuracy(sparse, targets, learn, valid, test) == found
    exchanged = targets.copy()
    exchanged[:10] = 1 - exchanged[:10]  # not the labels that choose the penalty
    assert few_label_accuracy(clear, exchanged, learn, valid, test).value == 0
    with pytest.raises(ValueError, match="^test shares rows with learn"):
        few_label_accuracy(clear, targets, learn, valid, np.arange(9, 20))


def test_standardised_by_some_rows():
    x = torch.randn(50, 3).mul(4).add(7)
    x[:, 2] = 5
    found = standardised(x, np.arange(30))
    assert torch.allclose(found[:30].mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(found[:30, :2].std(0), torch.ones(2), atol=1e-4)
    assert (found[:, 2] == 0).all() and found[30:, :2].mean().abs() > 1e-4
    assert (standardised(torch.full((5, 2), 3.0), range(4)) == 0).all()
    with pytest.raises(ValueError, match="^rows holds 1 row; allowed"):
        standardised(x, [0])
