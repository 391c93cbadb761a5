"""Chapter 6: text under attack.

Beside closed forms, central differences and brute force.
"""

import copy
import itertools
import math
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.adapting.classifier import TextClassifierModule
from bigmodel_nb.adapting.features import (
    SentenceEncoder,
    load_encoder,
    max_positions,
    tokenized_loader,
)
from bigmodel_nb.foundations.losses import cross_entropy
from bigmodel_nb.robust.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    CarliniWagner,
    DeepFool,
    MomentumPGD,
    Square,
)
from bigmodel_nb.robust.text import (
    NEGATIONS,
    EmbeddingTraining,
    SmoothnessTraining,
    Typos,
    WordSubstitution,
    _ending,
    _negates,
    attack_embeddings,
    embedding_curve,
    embedding_groups,
    embedding_norms,
    is_negation,
    negations,
    perturbable_tokens,
    show_changes,
    success_rate,
)
from bigmodel_nb.robust.training import cost_meter
from bigmodel_nb.training.loop import fit

ENDLESS = (-math.inf, math.inf)


class Toy(nn.Module):
    """Logits of the mean embedding, or of what a small net makes of each.

    0 is padding, 1 and 2 are special.
    """

    def __init__(self, width=4, classes=2, deep=False, dropout=0.0, words=20):
        super().__init__()
        self.table, self.dropout = nn.Embedding(words, width), nn.Dropout(dropout)
        self.body = (
            nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, width))
            if deep
            else nn.Identity()
        )
        self.head = nn.Linear(width, classes)
        self.double().eval()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        vectors = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask.to(vectors.dtype)[..., None]
        return self.head(self.dropout((self.body(vectors) * mask).sum(1) / mask.sum(1)))


SPECIAL = (0, 1, 2)


def toy_batch(rows=5, time=7, seed=0):
    torch.manual_seed(seed)
    lengths = torch.randint(3, time + 1, (rows,))
    ids, mask = (
        torch.zeros(rows, time, dtype=torch.long),
        torch.zeros(rows, time, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.cat(
            [torch.tensor([1]), torch.randint(3, 20, (length - 2,)), torch.tensor([2])]
        )
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options)


@pytest.fixture(scope="module")
def minilm():
    return load_encoder()


@pytest.fixture(scope="module")
def classifier(minilm):
    encoder, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    encoder.encoder.layer = encoder.encoder.layer[:1]
    torch.manual_seed(0)
    return TextClassifierModule(encoder, tokenizer, ["bad", "good"], 24)


@pytest.fixture(scope="module")
def swap(minilm):
    return WordSubstitution(SentenceEncoder(*minilm, 32), words=2)


# The attacks of robust/attacks, without a box and on embeddings -----------------------
def lead_of_others(logits, y):
    """(batch,) how far the highest other logit lies above that of `y`."""
    own = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -math.inf).max(1).values - own


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_box_is_a_wide_box(norm):
    torch.manual_seed(0)
    net, x = nn.Linear(8, 3).double().requires_grad_(False), torch.randn(5, 8).double()
    y = net(x).argmax(1)
    attacks = [
        each(0.3, norm=norm, bounds=ENDLESS) for each in (FGSM, PGD, MomentumPGD, APGD)
    ]
    attacks += [
        Square(0.3, norm=norm, queries=20, bounds=ENDLESS),
        DeepFool(norm=norm, bounds=ENDLESS),
        FAB(norm=norm, steps=4, bounds=ENDLESS),
    ]
    attacks += (
        [CarliniWagner(bounds=ENDLESS, steps=5, rounds=2)] if norm == "l2" else []
    )
    for attack in attacks:
        wide = copy.copy(attack)
        object.__setattr__(wide, "bounds", (-50.0, 50.0))
        free, boxed = attack(net, x, y), wide(net, x, y)
        assert torch.isfinite(free).all()
        if isinstance(attack, Square):
            # it keeps a higher proposal, if by a rounding: other points, as good
            (free_margin, boxed_margin), order = (
                (lead_of_others(net(each), y) for each in (free, boxed)),
                {"linf": math.inf, "l2": 2, "l1": 1}[norm],
            )
            torch.testing.assert_close(free_margin, boxed_margin, rtol=0, atol=1e-5)
            assert (
                max((each - x).norm(order, dim=1).max() for each in (free, boxed))
                <= 0.3 + 1e-9
            )
        else:
            torch.testing.assert_close(free, boxed, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(0.3, bounds=ENDLESS),
        PGD(0.3, bounds=ENDLESS),
        APGD(0.3, bounds=ENDLESS),
        MomentumPGD(0.3, norm="l2", bounds=ENDLESS),
        PGD(0.3, norm="l1", bounds=ENDLESS),
        Square(0.3, queries=30, bounds=ENDLESS),
        DeepFool(bounds=ENDLESS),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_padding_and_special_tokens_stay_exactly(attack, deep):
    net, input = toy(deep=deep), toy_batch()
    y = net(**input).argmax(1)
    radius = torch.rand(input["input_ids"].shape)
    per = "text" if isinstance(attack, DeepFool) else "token"
    found, before = (
        attack_embeddings(attack, net, input, y, radius, SPECIAL, per),
        net.table(input["input_ids"]),
    )
    free = perturbable_tokens(net, input, SPECIAL)
    assert torch.equal(free, input["input_ids"] > 2)
    assert (found - before)[~free].eq(0).all() and (found - before)[
        free
    ].abs().max() > 1e-3


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
def test_linear_model_reaches_the_closed_form_token_by_token(seed):
    net, input = toy(seed).requires_grad_(False), toy_batch(seed=seed)
    y, eps = net(**input).argmax(1), 0.2
    radius = torch.rand(input["input_ids"].shape).double()
    free, mask = perturbable_tokens(net, input, SPECIAL), input["attention_mask"]
    w = (net.head.weight[1] - net.head.weight[0]) * (1 - 2 * y)[
        :, None
    ]  # raises the margin
    before = net.table(input["input_ids"])
    for attack, size in ((FGSM, 1e-9), (PGD, 1e-9), (APGD, 1e-3)):
        found = attack_embeddings(
            attack(eps, bounds=ENDLESS), net, input, y, radius, SPECIAL
        )
        exact = before + eps * (radius * free)[..., None] * w.sign()[:, None]
        assert (found - exact).abs().max() < size
    up = (w / w.norm(dim=1, keepdim=True))[:, None]
    # an l2 ball around each token: each gains what it can
    for attack in (FGSM, PGD, MomentumPGD, APGD):
        found = attack_embeddings(
            attack(eps, norm="l2", bounds=ENDLESS), net, input, y, radius, SPECIAL
        )
        gained, best = ((found - before) * up).sum(2), eps * radius * free
        assert (gained >= 0.9999 * best - 1e-12).all() and (
            gained <= best * (1 + 1e-9) + 1e-12
        ).all()
    found = attack_embeddings(
        FGSM(eps, norm="l2", bounds=ENDLESS), net, input, y, None, SPECIAL, "text"
    )
    share = eps / free.sum(1).double().sqrt()  # the text shares the radius evenly
    exact = (
        before
        + share[:, None, None]
        * free[..., None]
        * (w / w.norm(dim=1, keepdim=True))[:, None]
    )
    assert (found - exact).abs().max() < 1e-9
    logits = net(inputs_embeds=found, attention_mask=mask)
    assert torch.isfinite(logits).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2"]), st.booleans())
def test_no_token_moves_farther_than_its_own_radius(seed, norm, early_stop):
    net, input = toy(seed, deep=True), toy_batch(seed=seed)
    y, radius = net(**input).argmax(1), embedding_norms(net, input)
    torch.testing.assert_close(
        radius, net.table(input["input_ids"]).pow(2).sum(2).sqrt()
    )
    attack = PGD(0.3, norm=norm, steps=4, early_stop=early_stop, bounds=ENDLESS)
    change = attack_embeddings(attack, net, input, y, radius, SPECIAL) - net.table(
        input["input_ids"]
    )
    moved = change.abs().amax(2) if norm == "linf" else change.norm(dim=2)
    free = perturbable_tokens(net, input, SPECIAL)
    assert (moved <= 0.3 * radius * (1 + 1e-6)).all() and moved[~free].eq(0).all()
    assert (
        moved[free] > 0.9 * 0.3 * radius[free]
    ).any()  # radii are reached, token by token
    still = attack_embeddings(attack.at(0.0), net, input, y, radius, SPECIAL)
    assert torch.allclose(still, net.table(input["input_ids"]), atol=1e-12)


def test_what_a_text_becomes_does_not_depend_on_the_batch():
    net, input = toy(deep=True), toy_batch(8)
    y, attack = net(**input).argmax(1), PGD(0.3, bounds=ENDLESS, steps=4)
    found = attack_embeddings(attack, net, input, y, special=SPECIAL)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mixed = attack_embeddings(
        attack,
        net,
        {name: each[order] for name, each in input.items()},
        y[order],
        special=SPECIAL,
    )
    torch.testing.assert_close(mixed, found[order], rtol=0, atol=1e-12)
    wider = {
        name: nn.functional.pad(each, (0, 3)) for name, each in input.items()
    }  # more padding
    torch.testing.assert_close(
        attack_embeddings(attack, net, wider, y, special=SPECIAL)[:, :7],
        found,
        rtol=0,
        atol=1e-12,
    )
    left = {
        name: torch.stack(
            [
                row.roll(7 - int(length))
                for row, length in zip(each, input["attention_mask"].sum(1))
            ]
        )
        for name, each in input.items()
    }  # padding on the other side
    again = attack_embeddings(attack, net, left, y, special=SPECIAL)
    for row, length in enumerate(input["attention_mask"].sum(1)):
        torch.testing.assert_close(
            again[row, 7 - length :], found[row, :length], rtol=0, atol=1e-12
        )


def test_minilm_under_attack_is_left_as_it_was(classifier):
    texts = ["A room.", "The food was cold and nobody came to the table.", "Good."]
    ((input, y),) = tokenized_loader(
        texts, [0, 1, 1], classifier.tokenizer, max_length=24
    )
    classifier.train()
    before, random = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="training mode"):
        found = attack_embeddings(
            PGD(0.02, bounds=ENDLESS, steps=2), classifier, input, y
        )
    assert (
        classifier.training
        and classifier.head.training
        and torch.equal(random, torch.get_rng_state())
    )
    assert all(
        torch.equal(before[name], each)
        for name, each in classifier.state_dict().items()
    )
    assert all(each.grad is None for each in classifier.parameters())
    ids = input["input_ids"]
    change = found - classifier.encoder.get_input_embeddings()(ids)
    fixed = torch.isin(ids, torch.tensor([0, 101, 102]))
    assert change[fixed].eq(0).all() and (change[~fixed].abs().amax(1) > 1e-4).all()
    assert torch.equal(perturbable_tokens(classifier, input), ~fixed)
    classifier.eval()
    with torch.no_grad():
        for rows, view, x in embedding_groups(classifier, input):
            torch.testing.assert_close(
                view(x), classifier(**input)[rows], rtol=0, atol=1e-5
            )


def test_curve_is_what_the_attack_leaves_standing():
    net, input = toy(deep=True), toy_batch(20)
    y = net(**input).argmax(1)
    y[:3] = 1 - y[:3]
    data, attack = (
        [
            ({name: each[:12] for name, each in input.items()}, y[:12]),
            ({name: each[12:] for name, each in input.items()}, y[12:]),
        ],
        PGD(0.1, bounds=ENDLESS),
    )
    curve = embedding_curve(net, data, attack, [0.5, 0.0, 0.1, 5.0], SPECIAL)
    found = attack_embeddings(attack, net, input, y, special=SPECIAL)
    standing = (
        net(inputs_embeds=found, attention_mask=input["attention_mask"]).argmax(1) == y
    ) & (net(**input).argmax(1) == y)
    assert curve["eps"].tolist() == [0.0, 0.1, 0.5, 5.0] and curve["n"].eq(20).all()
    assert (
        curve["accuracy"][0] == 0.85
        and curve["accuracy"][1] == standing.double().mean().item()
    )
    assert curve["accuracy"].is_monotonic_decreasing and curve["accuracy"][3] < 0.2


# Objectives ---------------------------------------------------------------------------
def gradients(net, objective, input, y):
    return torch.autograd.grad(
        objective(net, input, y), list(net.parameters()), allow_unused=True
    )


def at(net, input, change):
    return net(
        inputs_embeds=net.table(input["input_ids"]) + change,
        attention_mask=input["attention_mask"],
    )


def direction(net, input, y, change, per="token"):
    "The unit gradient at free tokens, written anew."
    change = change.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(at(net, input, change), y), change)
    gradient = gradient * (input["input_ids"] > 2)[..., None]
    length = (
        gradient.abs()
        if per == "entry"
        else gradient.norm(dim=2 if per == "token" else (1, 2), keepdim=True)
    )
    return torch.where(length > 0, gradient / length.clamp_min(1e-300), 0.0)


@pytest.mark.parametrize("per", ["entry", "token", "text"])
@pytest.mark.parametrize("average", [True, False])
def test_objective_has_the_gradient_of_the_mean_loss_at_fixed_changes(per, average):
    net, input = toy(deep=True), toy_batch()
    y = torch.tensor([0, 1, 1, 0, 1])
    objective = EmbeddingTraining(
        0.4, 2, 0.3, average=average, per=per, special=SPECIAL
    )
    changes = [torch.zeros(5, 7, 4).double()]
    for _ in range(2):
        moved = changes[-1] + 0.3 * direction(net, input, y, changes[-1], per)
        length = (
            moved.abs()
            if per == "entry"
            else moved.norm(dim=2 if per == "token" else (1, 2), keepdim=True)
        )
        changes.append(moved * (0.4 / length.clamp_min(1e-300)).clamp_max(1.0))
    used = changes if average else changes[-1:]

    def loss():
        return sum(cross_entropy(at(net, input, each), y) for each in used) / len(used)

    torch.testing.assert_close(objective(net, input, y), loss(), rtol=0, atol=1e-12)
    found = gradients(net, objective, input, y)
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), found):
            flat, index = parameter.view(-1), parameter.numel() - 2
            start = flat[index].item()
            ends = []
            for side in (1e-5, -1e-5):
                flat[index] = start + side
                ends.append(loss())
            flat[index] = start
            assert abs((ends[0] - ends[1]) / 2e-5 - gradient.view(-1)[index]) < 1e-8


def test_fgm_on_a_linear_model_moves_each_token_along_the_weights():
    net, input = toy(), toy_batch()
    y = net(**input).argmax(1)
    w = (net.head.weight[1] - net.head.weight[0]).detach()
    fixed = (
        0.5
        * (1 - 2 * y)[:, None, None]
        * (w / w.norm())
        * (input["input_ids"] > 2)[..., None]
    )
    expected = (
        cross_entropy(net(**input), y) + cross_entropy(at(net, input, fixed), y)
    ) / 2
    torch.testing.assert_close(
        EmbeddingTraining.fgm(0.5, special=SPECIAL)(net, input, y),
        expected,
        rtol=0,
        atol=1e-12,
    )


class Spy(nn.Module):
    "Remembers what embeddings it was shown."

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.table = net, [], net.table

    def get_input_embeddings(self):
        return self.table

    def forward(self, inputs_embeds, attention_mask):
        self.seen.append(inputs_embeds.detach())
        return self.net(inputs_embeds=inputs_embeds, attention_mask=attention_mask)


OBJECTIVES = [
    *(
        make(0.4, per=per, special=SPECIAL)
        for make in (
            EmbeddingTraining.fgm,
            EmbeddingTraining.pgd,
            EmbeddingTraining.freelb,
            SmoothnessTraining.vat,
            SmoothnessTraining.smart,
        )
        for per in ("entry", "token", "text")
    ),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_keep_padding_and_stay_in_the_ball(objective):
    spy, input = Spy(toy(deep=True)), toy_batch()
    objective(spy, input, torch.tensor([0, 1, 1, 0, 1]))
    free, moved = (input["input_ids"] > 2), 0.0
    for seen in spy.seen:
        change = seen - spy.table(input["input_ids"]).detach()
        length = {
            "entry": change.abs(),
            "token": change.norm(dim=2),
            "text": change.norm(dim=(1, 2)),
        }[objective.per]
        assert change[~free].eq(0).all() and length.max() <= 0.4 + 1e-9
        moved = max(moved, length.max().item())
    assert moved > 0.39
    passes = objective.steps + (2 if isinstance(objective, SmoothnessTraining) else 1)
    assert len(spy.seen) == passes


@pytest.mark.parametrize(
    "make",
    [
        EmbeddingTraining.fgm,
        EmbeddingTraining.freelb,
        EmbeddingTraining.pgd,
        SmoothnessTraining.vat,
        SmoothnessTraining.smart,
    ],
)
def test_radius_zero_is_ordinary_training_with_the_same_dropout(make):
    net, input = toy(deep=True, dropout=0.5).train(), toy_batch()
    y = torch.tensor([0, 1, 1, 0, 1])
    torch.manual_seed(3)
    objective = make(0.0, special=SPECIAL)
    value = objective(net, input, y)
    values = [value]
    if isinstance(
        objective, SmoothnessTraining
    ):  # the divergence is exactly zero: dropout is the same in all passes
        torch.manual_seed(3)
        objective.weight = 1e9
        values.append(objective(net, input, y))
        assert values[0].item() == values[1].item()
    else:
        torch.manual_seed(3)
        if objective.random_start:
            (
                torch.rand_like(torch.zeros(5, 7, 1).double()),
                torch.randn_like(torch.zeros(5, 7, 4).double()),
            )
        torch.testing.assert_close(
            value, cross_entropy(net(**input), y), rtol=0, atol=1e-12
        )


def test_units_are_what_is_counted():
    objectives = {
        str(place): make
        for place, make in enumerate(
            [
                EmbeddingTraining.fgm(0.1, special=SPECIAL),
                EmbeddingTraining.pgd(0.1, 1, special=SPECIAL),
                EmbeddingTraining.pgd(0.1, 3, special=SPECIAL),
                EmbeddingTraining.freelb(0.1, 2, special=SPECIAL),
                EmbeddingTraining.freelb(0.1, 4, special=SPECIAL),
                EmbeddingTraining(0.1, 3, average=False, special=SPECIAL),
                SmoothnessTraining.vat(0.1, special=SPECIAL),
                SmoothnessTraining.smart(0.1, special=SPECIAL),
                SmoothnessTraining.vat(0.1, steps=3, special=SPECIAL),
            ]
        )
    }
    table = cost_meter(
        objectives, toy(deep=True), toy_batch(), torch.tensor([0, 1, 0, 1, 1]), rounds=1
    )
    assert table["counted"].tolist() == pytest.approx(
        table["predicted"].tolist(), abs=1e-9
    )
    assert table["predicted"].tolist() == [6, 5, 9, 6, 12, 9, 8, 8, 12]


def test_smoothness_adds_the_divergence_of_what_is_said():
    net, input = toy(deep=True), toy_batch()
    y = torch.tensor([0, 1, 1, 0, 1])
    for make, both in (
        (SmoothnessTraining.vat, False),
        (SmoothnessTraining.smart, True),
    ):
        spy = Spy(net)
        value = make(0.3, 2.0, special=SPECIAL)(spy, input, y)
        clean, last = (
            net(inputs_embeds=each, attention_mask=input["attention_mask"]).log_softmax(
                1
            )
            for each in (spy.seen[0], spy.seen[-1])
        )
        apart = nn.functional.kl_div(
            last, clean, reduction="batchmean", log_target=True
        )
        apart = (
            apart
            + nn.functional.kl_div(clean, last, reduction="batchmean", log_target=True)
            if both
            else apart
        )
        torch.testing.assert_close(
            value, cross_entropy(net(**input), y) + 2 * apart, rtol=0, atol=1e-12
        )
        assert apart > 1e-5


def test_objectives_train():
    input = toy_batch(16)
    y = (input["input_ids"].max(1).values > 17).long()
    for objective in (
        EmbeddingTraining.freelb(0.1, special=SPECIAL),
        SmoothnessTraining.vat(0.1, special=SPECIAL),
    ):
        net = toy(deep=True)
        history = fit(
            net,
            [(input, y)],
            epochs=60,
            objective=objective,
            device="cpu",
            optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
        )
        assert history.batch_losses[-1] < 0.3 * history.batch_losses[0]


# Words --------------------------------------------------------------------------------
class Bag:
    "Probabilities of two classes from the sum of the words' weights."

    def __init__(self, weights, bias=0.0):
        self.weights, self.bias, self.asked = weights, bias, 0

    def __call__(self, texts):
        self.asked += len(texts)
        logits = np.array(
            [
                self.bias
                + sum(self.weights.get(word.strip(".,"), 0.0) for word in text.split())
                for text in texts
            ]
        )
        return np.stack([1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))], 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_search_finds_what_brute_force_finds_on_a_bag_of_words(seed):
    random = np.random.default_rng(seed)
    attack = Typos(words=3)
    words = ["plate", "glass", "stone"]
    choices = [[word, *attack._candidates(word)] for word in words]
    bag = Bag(
        {word: random.normal() for group in choices for word in group}, bias=12.0
    )  # cannot be fooled
    found = attack(bag, [" ".join(words)], [1]).iloc[0]
    best = min(
        itertools.product(*choices),
        key=lambda each: sum(bag.weights[word] for word in each),
    )
    assert found["attacked"].split() == list(best)
    assert (
        found["changed"] == sum(a != b for a, b in zip(best, words))
        and not found["fooled"]
    )


def test_most_important_word_goes_first_and_queries_are_counted():
    bag = Bag({"plate": 1.0, "stone": 3.0, "glass": 0.5}, bias=-2.0)
    found = Typos(words=1)(bag, ["plate stone glass"], [1]).iloc[0]
    assert (
        found["attacked"].split()[::2] == ["plate", "glass"]
        and found["fooled"]
        and found["changed"] == 1
    )
    assert found["queries"] == bag.asked == 1 + 3 + len(Typos()._candidates("stone"))
    wrong = Typos()(bag, ["plate"], [1]).iloc[0]
    assert (
        not wrong["right"]
        and not wrong["fooled"]
        and wrong["queries"] == 1
        and wrong["attacked"] == "plate"
    )


SENTENCES = st.lists(
    st.sampled_from(
        [
            "good",
            "bad",
            "never",
            "not",
            "Isn't",
            "comfortable",
            "awful",
            "dont",
            "NO",
            "slow",
            "cheap",
            "without",
            "knot",
            "notes",
            "then",
            "nor",
        ]
    ),
    min_size=1,
    max_size=7,
).map(" ".join)


@settings(max_examples=12, deadline=None)
@given(SENTENCES, st.integers(0, 1000))
def test_negations_are_never_touched(swap, sentence, seed):
    def model(texts):  # an arbitrary function of the letters
        values = np.array(
            [crc32(f"{seed} {each}".encode()) % 1000 / 1000 for each in texts]
        )
        return np.stack([values, 1 - values], 1)

    label = int(model([sentence]).argmax())
    for attack in (swap, Typos(words=3)):
        found = attack(model, [sentence], [label]).iloc[0]
        assert negations(found["attacked"]) == negations(sentence)
        for old, new in zip(sentence.split(), found["attacked"].split()):
            assert is_negation(old) == is_negation(new) and (
                old == new or not is_negation(old)
            )
        assert found["changed"] <= attack.words and len(
            found["attacked"].split()
        ) == len(sentence.split())


def test_opposites_are_no_replacements(swap):
    opposite = [
        ("good", "bad"),
        ("polite", "rude"),
        ("faster", "slow"),
        ("slowly", "quickly"),
        ("loved", "hate"),
        ("useful", "useless"),
        ("comfortable", "uncomfortable"),
        ("warm", "cold"),
        ("cheap", "expensive"),
        ("best", "worst"),
        ("clean", "dirty"),
    ]
    alike = [
        ("good", "great"),
        ("awful", "terrible"),
        ("slow", "slower"),
        ("returned", "returning"),
        ("quickly", "rapidly"),
    ]
    assert all(_negates(one, other) and _negates(other, one) for one, other in opposite)
    assert not any(_negates(one, other) or _negates(other, one) for one, other in alike)
    assert (
        "bad" not in swap._candidates("good")
        and "rude" not in swap._candidates("polite")
        and "good" not in swap._candidates("bad")
    )


def test_replacements_end_as_their_word_does(swap):
    assert [
        _ending(each)
        for each in ("waiting", "waited", "quickly", "rooms", "glass", "room", "virus")
    ] == ["ing", "ed", "ly", "s", "", "", ""]
    for word in ("slow", "quickly", "waiting", "returned", "awful", "rooms"):
        found = swap._candidates(word)
        assert {_ending(each) for each in found} <= {_ending(word)}


def test_slips_are_one_letter_away_inside_the_word():
    slips = Typos()._candidates("Stone")
    assert (
        {"Sotne", "Stne", "Srone", "Syone", "Stobe"} <= set(slips)
        and "Stone" not in slips
        and len(slips) == len(set(slips))
    )
    assert all(
        each[0] == "S"
        and each[-1] == "e"
        and each.isascii()
        and abs(len(each) - 5) <= 1
        for each in slips
    )
    assert Typos()._candidates("zażółć")  # letters that are on no key


def test_no_slip_makes_a_negation():
    assert all(is_negation(each) for each in (*NEGATIONS, "Isn't", "isn’t", "NEVER"))
    assert not any(is_negation(each) for each in ("knot", "now", "nothings", "good"))
    bag = Bag({"never": -100.0, "hardly": -100.0}, bias=1.0)  # the only ways to fool it
    found = Typos()(bag, ["neever haardly"], [1]).iloc[0]
    assert not found["fooled"] and negations(found["attacked"]) == []


def test_neighbours_are_near_and_no_negations(swap):
    assert "uncomfortable" not in swap._candidates(
        "comfortable"
    ) and "discomfort" not in swap._candidates("comfort")
    assert (
        swap._candidates("Awful")[0] == "Terrible"
        and swap._candidates("AWFUL")[0] == "TERRIBLE"
    )
    assert not swap._open("not") and not swap._open("the") and not swap._open("qqqq")


def test_similarity_bound_is_kept(swap):
    texts = [
        "The food was awful and the room was cold.",
        "A comfortable chair at a cheap price.",
    ]
    bag = Bag({"awful": 3.0, "comfortable": 3.0, "cheap": 2.0, "cold": 1.0}, bias=-0.5)
    found = swap(bag, texts, [1, 1])
    vectors = [
        nn.functional.normalize(swap.encoder.encode(list(found[name])), dim=1)
        for name in ("text", "attacked")
    ]
    cosines = (vectors[0] * vectors[1]).sum(1)
    assert (
        found["fooled"].any()
        and np.allclose(found["similarity"], cosines, atol=1e-5)
        and (cosines >= 0.8).all()
    )
    strict = WordSubstitution(swap.encoder, similarity=1.0)(bag, texts, [1, 1])
    assert not strict["fooled"].any() and strict["changed"].eq(0).all()


def test_a_classifier_is_left_as_it_was_and_order_does_not_matter(classifier):
    texts = [
        "The food was awful.",
        "A chair that broke in a week.",
        "Lovely people, good coffee.",
    ]
    labels = [
        int(each)
        for each in classifier.predict(texts)["label"].map(classifier.labels.index)
    ]
    classifier.train()
    classifier.encoder.eval()
    before, random = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()
    found = Typos(words=1)(classifier, texts, labels)
    assert (
        classifier.training
        and not classifier.encoder.training
        and torch.equal(random, torch.get_rng_state())
    )
    assert all(
        torch.equal(before[name], each)
        for name, each in classifier.state_dict().items()
    )
    turned = Typos(words=1)(classifier, texts[::-1], labels[::-1])
    assert (
        found["attacked"].tolist() == turned["attacked"].tolist()[::-1]
        and found["right"].all()
    )


def test_shown_changes_do_not_rest_on_colour_and_are_escaped():
    frame = pd.DataFrame(
        [
            {
                "text": "a <b> stone & glass",
                "attacked": "a <b> stoone & glass",
                "label": 1,
                "right": True,
                "fooled": True,
                "changed": 1,
                "queries": 9,
                "similarity": 0.9,
            }
        ]
    )
    shown = show_changes(frame, ["<x>", "<y>"]).data
    assert (
        ">stone</del>" in shown
        and ">stoone</ins>" in shown
        and "&lt;b&gt;" in shown
        and "&lt;y&gt;" in shown
    )
    assert shown.count("<del") == 1 and "<b>" not in shown
    assert "No text was fooled" in show_changes(frame.assign(fooled=False)).data
    rate = success_rate(
        pd.concat(
            [frame, frame.assign(fooled=False), frame.assign(right=False, fooled=False)]
        )
    )
    assert (rate.value, rate.n) == (0.5, 2)


# Bad input: one sentence --------------------------------------------------------------
def fails(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "allowed" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_input(swap, classifier):
    net, input = toy(), toy_batch()
    y = net(**input).argmax(1)
    attack = PGD(0.1, bounds=ENDLESS)
    fails(
        TypeError,
        "input is a dict without input_ids",
        lambda: attack_embeddings(attack, net, {}, y),
    )
    fails(
        TypeError,
        "model is a Linear",
        lambda: attack_embeddings(attack, nn.Linear(2, 2), input, y),
    )
    fails(
        ValueError,
        "radius has shape",
        lambda: attack_embeddings(attack, net, input, y, torch.ones(2)),
    )
    fails(
        ValueError,
        "radius goes down to -1",
        lambda: attack_embeddings(attack, net, input, y, -torch.ones(5, 7)),
    )
    fails(
        TypeError,
        "whose forward takes no inputs_embeds",
        lambda: attack_embeddings(attack, nn.Embedding(20, 2), input, y),
    )
    fails(
        ValueError,
        "per is 'word'",
        lambda: attack_embeddings(attack, net, input, y, None, SPECIAL, "word"),
    )
    fails(
        ValueError,
        "the DeepFool looks for the nearest point",
        lambda: attack_embeddings(DeepFool(bounds=ENDLESS), net, input, y),
    )
    fails(
        ValueError,
        "the PGD is fast",
        lambda: embedding_curve(net, [], PGD(0.1, fast=True, bounds=ENDLESS), [0.1]),
    )
    fails(
        ValueError,
        "y holds class 7",
        lambda: attack_embeddings(attack, net, input, y + 7, None, SPECIAL),
    )
    fails(
        ValueError,
        "empty text at place 1",
        lambda: Typos()(classifier, ["a stone", " "], [0, 1]),
    )
    fails(
        ValueError,
        "data gives no batch",
        lambda: embedding_curve(net, [], attack, [0.1]),
    )
    fails(ValueError, "radius is -1", lambda: EmbeddingTraining(-1))
    fails(ValueError, "radius is nan", lambda: SmoothnessTraining(math.nan))
    fails(ValueError, "steps is 0", lambda: EmbeddingTraining(0.1, 0))
    fails(ValueError, "per is 'word'", lambda: EmbeddingTraining(0.1, per="word"))
    fails(ValueError, "weight is -1", lambda: SmoothnessTraining(0.1, -1))
    fails(ValueError, "step_size is 0", lambda: EmbeddingTraining(0.1, step_size=0))
    fails(ValueError, "words is 0", lambda: Typos(words=0))
    fails(
        ValueError,
        "similarity is 80",
        lambda: WordSubstitution(swap.encoder, similarity=80),
    )
    fails(TypeError, "encoder is a Linear", lambda: WordSubstitution(nn.Linear(2, 2)))
    fails(TypeError, "model is a Toy", lambda: Typos()(net, ["a stone"], [0]))
    fails(TypeError, "model is a int", lambda: Typos()(3, ["a stone"], [0]))
    fails(
        ValueError,
        "texts has 1 entries and labels 2",
        lambda: Typos()(classifier, ["a stone"], [0, 1]),
    )
    fails(
        ValueError,
        "labels holds class 2",
        lambda: Typos()(classifier, ["a stone"], [2]),
    )
    fails(
        ValueError,
        "no probabilities",
        lambda: Typos()(lambda texts: [[1.0, 2.0]] * len(texts), ["a stone"], [0]),
    )
    fails(
        ValueError,
        "model gives shape",
        lambda: Typos()(lambda texts: [0.5] * len(texts), ["a stone"], [0]),
    )
    fails(
        ValueError,
        "none classified rightly",
        lambda: success_rate(Typos()(Bag({}, -1.0), ["a stone"], [1])),
    )


# --- models of other people


def test_a_tokenizer_without_a_padding_token_changes_nothing(minilm, classifier):
    tokenizer = copy.deepcopy(minilm[1])
    tokenizer.pad_token = None
    texts = ["a wooden chair", "a chair of wood that stands in the kitchen"]
    first, second = (
        Typos()(model, texts, [0, 1])
        for model in (classifier, bare(classifier, tokenizer))
    )
    assert first.equals(second)
    assert (
        WordSubstitution(SentenceEncoder(minilm[0], tokenizer)).encoder.tokenizer
        is tokenizer
    )


def bare(classifier, tokenizer):
    """The same classifier with another tokenizer."""
    made = TextClassifierModule(
        classifier.encoder, tokenizer, classifier.labels, classifier.max_length
    )
    made.head = classifier.head
    return made.eval()


def test_texts_beyond_the_positions_of_the_encoder_get_a_sentence(minilm, classifier):
    with pytest.raises(
        ValueError,
        match="max_length is 1000; allowed are 1 to 512, the positions of this encoder",
    ):
        TextClassifierModule(minilm[0], minilm[1], ["bad", "good"], 1000)
    ids = torch.full((1, 600), 2003)
    given, y = (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.tensor([0]),
    )
    for ask in (
        lambda: attack_embeddings(
            PGD(0.1, bounds=(-math.inf, math.inf)), classifier, given, y
        ),
        lambda: EmbeddingTraining(0.1)(classifier, given, y),
        lambda: SmoothnessTraining(0.1)(classifier, given, y),
    ):
        with pytest.raises(
            ValueError,
            match="input has 600 tokens a text, and the model knows 512 positions;"
            " allowed are at most 512",
        ):
            ask()


@pytest.mark.parametrize(
    "kind, fits", [("bert", 20), ("roberta", 18), ("gpt2", 20), ("opt", 20)]
)
def test_positions_are_those_that_a_model_can_use(kind, fits):
    """One token more than is said cannot be computed."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "gpt2": dict(n_positions=20, n_embd=8, n_head=2, n_layer=1),
        "opt": dict(
            max_position_embeddings=20,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=8,
            num_attention_heads=2,
            num_hidden_layers=1,
        ),
    }
    usual = dict(
        max_position_embeddings=20,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    model = AutoModel.from_config(
        AutoConfig.for_model(kind, vocab_size=50, **sizes.get(kind, usual))
    ).eval()
    assert max_positions(model) == fits
    model(torch.full((1, fits), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, fits + 1), 5))


def test_a_pipeline_of_transformers_is_a_model(minilm):
    from transformers import (
        AutoModelForSequenceClassification,
        TextClassificationPipeline,
    )

    torch.manual_seed(0)
    config = copy.deepcopy(minilm[0].config)
    config.num_hidden_layers, config.id2label, config.label2id = (
        1,
        {0: "bad", 1: "good", 2: "so so"},
        {"bad": 0, "good": 1, "so so": 2},
    )
    net = AutoModelForSequenceClassification.from_config(config).eval()
    pipe = TextClassificationPipeline(model=net, tokenizer=minilm[1])

    def plain(texts):
        with torch.no_grad():
            return torch.cat(
                [
                    net(**minilm[1](text, return_tensors="pt")).logits.softmax(1)
                    for text in texts
                ]
            )

    texts = ["some wooden chair", "a good room"]
    ours, theirs = (
        Typos()(model, texts, plain(texts).argmax(1).tolist())
        for model in (pipe, plain)
    )
    assert (
        ours.drop(columns="similarity").equals(theirs.drop(columns="similarity"))
        and ours["right"].all()
    )


def test_an_attack_that_could_try_nothing_says_so():
    def says(texts):
        return np.tile([0.9, 0.1], (len(texts), 1))

    with pytest.warns(
        UserWarning, match="Typos knows no word that it may change in 1 of 2 texts"
    ):
        found = Typos()(says, ["ok no", "comfortable chairs"], [0, 0])
    assert found["fooled"].tolist() == [False, False]


def test_a_list_of_tensors_with_gradients_is_read():
    def says(texts):
        row = torch.tensor([0.2, 0.8], requires_grad=True)
        return [row * 1 for _ in texts]

    assert Typos()(says, ["comfortable chairs"], [1])["right"].tolist() == [True]


# The lesson ---------------------------------------------------------------------------
def expect_text(m):
    assert m["attained_of_closed_form"] > 0.9999 and m["central_difference"] < 1e-7, (
        "attacks on embeddings are exact where a closed form is known"
    )
    assert m["batch_mate_difference"] < 1e-4, "no text depends on who stands beside it"
    assert m["gain_over_constant"]["low"] > 0.15, "the victim is a good classifier"
    curve = m["curve"]["accuracy"]
    assert curve[0] > m["constant_on_attacked"] + 0.1, "it is one on the texts attacked"
    assert curve == sorted(curve, reverse=True), "accuracy falls with the radius"
    assert m["curve"]["high"][-1] < m["constant_on_attacked"], (
        "an attack takes it below the constant answer"
    )
    still, moved = m["divergence_gradients"].values()
    assert still < 1e-3 * moved, "at no change the divergence has no gradient"
    assert m["fooled_by_swaps"]["low"] > 0.02, "substituted words fool"
    assert m["fooled_by_typos"]["low"] > 0.2, "typos fool"
    assert m["opposite_similarity"] > 0.8, "the bound on similarity lets opposites pass"
    differences = m["largest_differences"]
    assert differences["neighbours not shared with scikit-learn"] <= 2, (
        "neighbours are scikit-learn's"
    )
    for name in ("gradient of FGM, two backward passes", "divergence, torch"):
        assert differences[name] < 1e-10, "FGM and the divergence are as written"
    for row in m["costs"].values():
        assert abs(row["counted"] / row["predicted"] - 1) < 0.02, (
            "the cost is the number of passes"
        )
    expect_honest_comparison(m)


def expect_honest_comparison(m):
    names = ["ordinary", "FGM", "PGD", "FreeLB", "VAT", "SMART", "constant answer"]
    assert set(m["commonest_class"]) == set(m["beats_constant"]) == set(names), (
        "beside each robust accuracy stands the share of the commonest class"
    )
    assert m["commonest_class"]["constant answer"] == [1.0] * 5, "its share is all"
    assert not m["beats_constant"]["constant answer"], "it has collapsed"
    for name in ("ordinary", "FGM", "FreeLB"):
        assert m["beats_constant"][name], "these classifiers have not"
    constant = np.mean(m["scores"]["constant answer, accuracy"])
    for name in names:
        kept = np.mean(m["scores"][f"{name}, accuracy"])
        assert not m["beats_constant"][name] or kept > constant, (
            "only who reads the texts beats the constant answer"
        )
    for name in names[1:]:
        for measure in ("accuracy", "robust accuracy"):
            before, after = (
                np.mean(m["scores"][f"{who}, {measure}"]) for who in ("ordinary", name)
            )
            gain = m["gains"][f"{name}, {measure}"]
            assert gain["low"] <= gain["value"] <= gain["high"], "it has an interval"
            assert gain["value"] == pytest.approx(after - before, abs=1e-9), (
                "a gain is a difference of means"
            )


undecided_text = {
    "scores": "those of single training runs; their paired differences are compared",
    "commonest_class": "shares of single training runs, as their scores",
}
