"""Chapter 5: image and text in one space, on tiny models and a folder made here."""

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from bigmodel_nb.adapting.multimodal import (
    CaptionedImages,
    DualEncoder,
    TextEncoder,
    WordTokenizer,
    caption_folder,
    clip_loss,
    contrastive,
    encode_pairs,
    from_clip,
    glyphs,
    load_clip,
    one_of_each,
    pair_loader,
    prompt_vectors,
    ranks,
    recall_at_k,
    split_pairs,
    split_words,
)
from bigmodel_nb.headless.run import RunFailed, run
from bigmodel_nb.models.language import BERTConfig
from bigmodel_nb.models.vision import ViT, ViTConfig
from bigmodel_nb.training.loop import fit


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def signs():
    return glyphs(16, ["DejaVuSansMono", "DejaVuSans"])


def unit(*shape, seed=0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=made, dtype=dtype), dim=1)


def dual(words, size=16, channels=1):
    torch.manual_seed(0)
    image = ViT(ViTConfig(size, 8, channels, 16, 16, 1, 2))
    return DualEncoder(image, TextEncoder(BERTConfig(words, 24, 16, 1, 2)), 8)


def by_loops(x, y, scale, target=None):
    total, n = 0.0, len(x)
    for i in range(n):
        kept = [
            j for j in range(n) if j == i or target is None or target[j] != target[i]
        ]
        row = [math.exp(scale * float(x[i] @ y[j])) for j in kept]
        column = [math.exp(scale * float(x[j] @ y[i])) for j in kept]
        own = math.exp(scale * float(x[i] @ y[i]))
        total -= math.log(own / sum(row)) + math.log(own / sum(column))
    return total / (2 * n)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.floats(-1, 4), st.integers(0, 99), st.booleans())
def test_the_loss_is_that_of_a_double_loop(n, log_scale, seed, told):
    x, y = unit(n, 4, seed=seed), unit(n, 4, seed=seed + 100)
    target = torch.arange(n) // 2 if told else None
    found = clip_loss(x, y, torch.tensor(log_scale, dtype=torch.float64), target)
    assert abs(found.item() - by_loops(x, y, math.exp(log_scale), target)) < 1e-9


def test_the_loss_is_transformers_and_its_gradient_that_of_differences():
    x, y, log_scale = unit(6, 4), unit(6, 4, seed=1), torch.tensor(2.5).double()
    theirs = image_text_contrastive_loss(log_scale.exp() * y @ x.T)
    torch.testing.assert_close(clip_loss(x, y, log_scale), theirs)
    torch.testing.assert_close(clip_loss(y, x, log_scale), theirs)  # symmetric
    inputs = [each.requires_grad_() for each in (x, y, log_scale)]
    assert torch.autograd.gradcheck(clip_loss, inputs)
    target = torch.tensor([0, 0, 1, 2, 3, 1])
    assert torch.autograd.gradcheck(lambda *a: clip_loss(*a, target), inputs)


def test_the_scale_is_clipped_at_100():
    x, y = unit(5, 4), unit(5, 4, seed=1)
    at, beyond = (clip_loss(x, y, torch.tensor(s).double().log()) for s in (100, 900))
    assert at == beyond != clip_loss(x, y, torch.tensor(99.0).double().log())


def test_equal_captions_are_no_negatives():
    perfect, twice = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    scale = torch.tensor(100.0).log()
    assert abs(clip_loss(perfect, perfect, scale) - math.log(2)) < 1e-4
    assert clip_loss(perfect, perfect, scale, twice) < 1e-4


def test_glyphs_are_named_once_and_look_different(signs):
    assert len(signs.images) == len(signs.rows) == len(signs.sources)
    assert signs.images.shape[1:] == (1, 16, 16) and 0 <= signs.images.min()
    assert signs.images.max() <= 1 and (signs.images.amax((1, 2, 3)) > 0).all()
    assert len(set(signs.captions)) == len(signs.captions) > 4000
    assert "BLACK CHESS KNIGHT" in signs.captions
    same = "LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA"
    assert [each in signs.captions for each in same] == [True, False]
    for font in set(signs.sources):
        own = [n for n, each in enumerate(signs.sources) if each == font]
        pictures = signs.images[own].flatten(1).mul(255).byte().numpy()
        assert len({each.tobytes() for each in pictures}) == len(own), "once a font"
    for caption in signs.captions[::50]:
        assert unicodedata.category(unicodedata.lookup(caption))[0] not in "MZC"
    with pytest.raises(ValueError, match="fonts holds 'Comic'; allowed are"):
        glyphs(16, ["Comic"])
    with pytest.raises(ValueError, match="size is 0"):
        glyphs(0)


def test_the_baseline_of_letters_is_one_line():
    made = glyphs(24, ["DejaVuSans"])
    bottoms = []
    for caption in ("LATIN SMALL LETTER X", "LATIN CAPITAL LETTER H"):
        row = made.rows[:, 1].tolist().index(made.captions.index(caption))
        bottoms.append(int(made.images[row, 0].sum(1).nonzero().max()))
    small, capital = bottoms
    assert abs(small - capital) <= 1


def test_no_caption_and_no_picture_stands_on_two_sides(signs):
    withhold = lambda caption: "CHESS" in caption
    parts = split_pairs(signs, 0.2, withhold, seed=3)
    assert sum(map(len, parts.values())) == len(signs.rows)
    for place in (0, 1):
        sides = [set(signs.rows[rows][:, place].tolist()) for rows in parts.values()]
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    held = set(signs.of(parts["withheld"])[1])
    assert held and all("CHESS" in each for each in held)
    again = split_pairs(signs, 0.2, withhold, seed=3)
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert 0.15 < len(parts["held"]) / len(signs.rows) < 0.25
    few = one_of_each(signs, parts["held"])
    assert len(few) == len(set(signs.of(parts["held"])[1]))


def test_groups_join_what_shares_an_image_or_a_caption():
    rows = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2], [3, 3], [3, 2]])
    made = CaptionedImages(torch.zeros(4, 1, 4, 4), list("abcd"), rows, list("wxyz"))
    groups = made.groups.tolist()
    assert len(set(groups[:3])) == 1 == len(set(groups[3:])) and groups[0] != groups[3]
    with pytest.raises(ValueError, match="share is 1.5"):
        split_pairs(made, 1.5)
    with pytest.raises(ValueError, match="leave none held"):
        split_pairs(made, 0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
def test_recall_is_that_of_sorting(n, k, seed):
    similarity = torch.from_numpy(
        np.random.default_rng(seed).permutation(n * n)
    ).float()
    similarity = similarity.view(n, n)  # no ties
    top = similarity.argsort(1, descending=True)[:, :k]
    wanted = (top == torch.arange(n)[:, None]).any(1)
    found = recall_at_k(similarity, k)
    assert found.value == wanted.double().mean() and found.n == n


def test_ties_lose_and_own_others_are_no_rivals():
    assert recall_at_k(torch.ones(5, 5), 4).value == 0
    assert recall_at_k(torch.ones(5, 5), 5).value == 1
    relevant = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    similarity = torch.tensor([[3.0, 9, 5, 1], [1, 2, 0, 2]])
    assert ranks(similarity, relevant).tolist() == [1, 2]


def test_words_and_padding():
    words = WordTokenizer(["LATIN LETTER-07", "latin dog"])
    assert split_words("TILE-06 Ñandú's") == ["tile", "0", "6", "ñandú", "s"]
    ids = words(["latin 7", "cat"])
    assert ids.shape == (2, 2) and ids[1].tolist() == [1, 0] and (ids[0] > 1).all()
    assert words.knows("dog 0") and not words.knows("dog 1")
    assert len(words) == 2 + 5 and len(WordTokenizer(["a b", "a"], least=2)) == 3
    assert WordTokenizer(["a b c"], max_length=2)(["a b c"]).shape == (1, 2)
    encoder = TextEncoder(BERTConfig(len(words), 24, 16, 1, 2)).eval()
    alone, among = encoder(words(["dog"])), encoder(words(["dog", "latin letter 7"]))
    torch.testing.assert_close(alone[0], among[0])


def test_two_encoders_give_vectors_of_norm_1_and_learn(signs):
    rows = torch.arange(0, 1200, 20)
    words = WordTokenizer(signs.of(rows)[1])
    model = dual(len(words))
    batches = pair_loader(signs, rows, words, 30, shuffle=True)
    images, texts, scale = model(**next(iter(batches))[0])
    assert images.shape == texts.shape == (30, 8) and scale is model.logit_scale
    for each in (images, texts):
        torch.testing.assert_close(each.norm(dim=1), torch.ones(30))
    options = {"optimizer": torch.optim.AdamW(model.parameters(), 3e-3)}
    losses = fit(
        model, batches, epochs=40, objective=contrastive, **options
    ).batch_losses
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert model.logit_scale.grad is not None, "the scale is learnt"
    model.train()
    one, two = encode_pairs(model, signs, rows, words, 7)
    assert model.training, "the mode stays"
    recall = recall_at_k(one @ two.T, 10)
    assert recall.low > 10 / 60, "what was learnt is found"
    vectors = prompt_vectors(model, {"a": ["dog"], "b": ["latin", "letter"]}, words)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_batches_tell_equal_captions_and_keep_their_order(signs):
    rows = torch.arange(50)
    words = WordTokenizer(signs.captions)
    batches = pair_loader(signs, rows, words, 20)
    assert [len(target) for _, target in batches] == [20, 20, 10]
    assert torch.equal(torch.cat([t for _, t in batches]), signs.groups[:50])
    shuffled = pair_loader(signs, rows, words, 20, shuffle=True, seed=1)
    assert [len(target) for _, target in shuffled] == [20, 20], "the last batch whole"
    input, _ = next(iter(batches))
    ids = words(signs.of(rows[:20])[1])
    assert torch.equal(input["token_ids"], ids), "padded to the longest of the batch"


def tiny_clip(folder=None):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {"vocab_size": 40, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    text |= small | {"max_position_embeddings": 12}
    vision = small | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    made = CLIPModel(config).eval()
    if folder is not None:
        from tokenizers import Tokenizer, pre_tokenizers, processors
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        known = {"<s>": 0, "</s>": 1, "[UNK]": 2, "red": 3, "blue": 4, "a": 5}
        words = Tokenizer(WordLevel(known, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        ends = [("<s>", 0), ("</s>", 1)]
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ends
        )
        marks = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "[UNK]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **marks)
        tokenizer.save_pretrained(folder)
        made.save_pretrained(folder)
    return made


def test_a_clip_of_transformers_gives_the_same(tmp_path):
    theirs = tiny_clip(tmp_path)
    ours, tokenize, prepare = load_clip(str(tmp_path))
    ids = tokenize(["a red a", "blue"])
    images = prepare(torch.rand(2, 3, 24, 24))
    assert images.shape == (2, 3, 16, 16)
    with torch.no_grad():
        said = theirs(pixel_values=images, input_ids=ids, return_loss=True)
        image, text, scale = ours(images, ids)
        torch.testing.assert_close(image, said.image_embeds)
        torch.testing.assert_close(text, said.text_embeds)
        torch.testing.assert_close(clip_loss(image, text, scale), said.loss)
        alone = ours.encode_text(tokenize(["blue"]))
    torch.testing.assert_close(text[1:], alone, msg="padding counts for nothing")
    assert sum(p.numel() for p in ours.parameters()) == sum(
        p.numel() for p in theirs.parameters()
    )


def write_folder(folder, n=24, form="csv"):
    draw, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(n):
        color = place % 2
        pixels = draw.integers(0, 60, (20, 30, 3), dtype=np.uint8)
        pixels[..., 2 * color] += 180
        Image.fromarray(pixels).save(folder / f"{place}.png")
        lines.append((f"{place}.png", f"a {'red blue'.split()[color]} one, {place}"))
    if form == "csv":
        text = "".join(f'{name},"{caption}"\n' for name, caption in lines)
        (folder / "captions.csv").write_text("image,caption\n" + text)
    else:
        (folder / "annotations").mkdir()
        told = {
            "images": [{"id": n, "file_name": f} for n, (f, _) in enumerate(lines)],
            "annotations": [
                {"image_id": n, "caption": f"{c} {again}"}
                for n, (_, c) in enumerate(lines)
                for again in "xy"
            ],
        }
        file = folder / "annotations" / "captions_train.json"
        file.write_text(json.dumps(told))
    return folder


def test_a_folder_with_a_table_and_one_of_coco(tmp_path):
    made = caption_folder(write_folder(tmp_path / "a"), 8)
    assert made.images.shape == (24, 3, 8, 8) and len(made.captions) == 24
    assert made.images[0, 0].mean() > made.images[0, 2].mean(), "red is red"
    assert made.of([1])[1] == ["a blue one, 1"] and made.sources[1] == "1.png"
    coco = caption_folder(write_folder(tmp_path / "b", form="coco"), 8)
    assert len(coco.rows) == 48 and len(coco.groups.unique()) == 24
    torch.testing.assert_close(coco.images, made.images)


def broken(folder, change):
    write_folder(folder)
    change(folder)
    return folder


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "captions.csv").unlink(), "no file of captions"),
        (replace("captions.tsv", "image\tcaption\n"), "several files of captions"),
        (replace("captions.csv", "image,text\n0.png,a\n"), "has no column 'caption'"),
        (
            replace("captions.csv", "image,caption\n99.png,a\n"),
            "'99.png', which is not",
        ),
        (replace("captions.csv", "image,caption\n0.png,...\n"), "at least one word"),
        (replace("captions.csv", "image,caption\n0.png,a\n"), "has 1 captioned images"),
        (replace("3.png", "no picture"), "3.png, which is no readable image"),
    ],
)
def test_a_bad_folder_gets_a_sentence(tmp_path, change, said):
    with pytest.raises(ValueError) as raised:
        caption_folder(broken(tmp_path / "a", change))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_missing_or_of_a_broken_coco_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        caption_folder(tmp_path / "none")
    folder = write_folder(tmp_path / "a", form="coco")
    (folder / "annotations" / "captions_train.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="no file of captions as COCO has them"):
        caption_folder(folder)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: clip_loss(unit(3, 4), unit(4, 4), torch.tensor(1.0)),
            "image_features",
        ),
        (
            lambda: clip_loss(unit(1, 4), unit(1, 4), torch.tensor(1.0)),
            "image_features",
        ),
        (
            lambda: clip_loss(unit(3, 4), unit(3, 4), torch.tensor(1.0), torch.ones(2)),
            "target has shape (2,); allowed is (3,)",
        ),
        (lambda: clip_loss(unit(3, 4), unit(3, 4), 2.0), "logit_scale is 2.0"),
        (lambda: clip_loss(unit(3, 4), unit(3, 4), torch.ones(4)), "logit_scale is (4"),
        (
            lambda: clip_loss(unit(3, 4), unit(3, 4).float(), torch.tensor(1.0)),
            "image_features and text_features are torch.float64",
        ),
        (lambda: WordTokenizer("abc"), "captions is 'abc'"),
        (lambda: glyphs(16, []), "fonts is empty"),
        (lambda: prompt_vectors(None, {}, None), "prompts is empty"),
        (lambda: recall_at_k(torch.ones(2, 3)), "similarity has shape (2, 3)"),
        (lambda: recall_at_k(torch.ones(2, 2), 0), "k is 0"),
        (lambda: recall_at_k(torch.full((2, 2), math.nan)), "similarity holds numbers"),
        (lambda: ranks(torch.ones(2, 2), torch.eye(2)), "relevant is torch.float32"),
        (
            lambda: ranks(torch.ones(2, 2), torch.zeros(2, 2).bool()),
            "relevant has a query without any item",
        ),
        (lambda: WordTokenizer(["..."]), "captions hold no word"),
        (lambda: WordTokenizer(["a"])("a"), "captions is 'a'"),
        (lambda: DualEncoder(nn.ReLU(), nn.ReLU(), 4), "image_encoder has no linear"),
        (lambda: DualEncoder(nn.Linear(2, 2), nn.Linear(2, 2), 0), "width is 0"),
        (lambda: from_clip(nn.Linear(2, 2)), "clip is a Linear"),
        (lambda: load_clip("/nowhere"), "model is '/nowhere'; allowed is a folder"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_a_job_answers_for_captioned_pictures_and_refuses_bad_ones(tmp_path):
    folder = write_folder(tmp_path / "mine", 30)
    options = {"data": folder, "image_size": 16, "timeout": 200}
    done = run("adapting/multimodal", out=tmp_path / "run", epochs=2, **options)
    assert done.metrics["pairs"]["held"] == 9
    assert "among the first 1 of 9" in done.metrics["verdict"]
    assert not {"zero_shot", "gap"} & done.metrics.keys()
    (folder / "captions.csv").unlink()
    with pytest.raises(RunFailed, match="no file of captions"):
        run("adapting/multimodal", out=tmp_path / "other", **options)


def test_a_job_with_a_pretrained_clip(tmp_path):
    tiny_clip(tmp_path / "clip")
    folder = write_folder(tmp_path / "mine", 12)
    options = {"data": folder, "model": str(tmp_path / "clip"), "timeout": 200}
    done = run("adapting/multimodal", out=tmp_path / "run", **options)
    assert done.metrics["pairs"] == {"learnt": 0, "held": 12}
    assert done.metrics["gain_over_rival"] is None


OF_A_RUN = "of one short training run, which rounding may lead elsewhere"
undecided_multimodal = {
    "verdict": "names the rival and says which way one run came out",
    "gain_over_rival": OF_A_RUN,
    "recall_by_kind": OF_A_RUN,
    "zero_shot": OF_A_RUN,
    "preferred": OF_A_RUN,
    "counting": OF_A_RUN,
    "gap": OF_A_RUN,
    "recall_once_closed": OF_A_RUN,
    "nats_shown": OF_A_RUN,
    "recall_ours_to_caption": OF_A_RUN,
    "recall_ours_to_picture": OF_A_RUN,
}


def expect_multimodal(m):
    assert m["loop_apart"] < 1e-9 and m["formula_apart"] < 1e-9, "the loss is derived"
    assert m["central_differences"], "and its gradient"
    assert max(m["largest_differences"].values()) < 1e-4, "the libraries agree"
    free = m["free_losses"]
    assert free["scale 1"] > free["floor at scale 1"] > 2, "cosines alone stay blunt"
    assert free["scale learnt"] < 0.1 < free["scale 1"], "a scale makes them sharp"
    for way in ("to_caption", "to_picture"):
        found = m[f"recall_ours_{way}"]
        assert found["at_10"]["low"] > 10 * m["chance"], "unseen captions are found"
        assert found["at_1"]["value"] < found["at_5"]["value"] < found["at_10"]["value"]
    assert m["gain_over_rival"]["value"] > 0.02, "more than the nearest pictures find"
    case = {
        name.split(", ")[1]: e for name, e in m["zero_shot"].items() if "case" in name
    }
    assert case["training captions"]["low"] > case["most frequent class"]["high"], (
        "words alone name a class"
    )
    small = m["preferred"]["word: capital, small, its own picture"]
    assert small["low"] > 0.7, "a word that decides many pairs of a batch is learnt"
    nats = {int(n): each for n, each in m["nats_shown"].items()}
    assert all(each < math.log(n) for n, each in nats.items()), "log n is the most"
    assert nats[2] < nats[16] < nats[max(nats)], "larger batches show more"
    assert abs(m["false_negatives"]["blind"] - math.log(2)) < 1e-3
    assert m["false_negatives"]["told"] < 1e-3, "equal captions are no negatives"
    assert m["collapsed"] == {"naive": 1.0, "honest": 0.0}, "ties must lose"


def test_each_module_gets_its_own_mode_back(signs):
    rows = torch.arange(8)
    tokenize = WordTokenizer([signs.captions[row] for row in rows.tolist()])
    model = dual(len(tokenize)).train()
    model.image_encoder.eval()
    modes = [each.training for each in model.modules()]
    encode_pairs(model, signs, rows, tokenize)
    assert [each.training for each in model.modules()] == modes
    prompt_vectors(model, {"one": ["letter"], "two": ["digit"]}, tokenize)
    assert [each.training for each in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        prompt_vectors(model, {"one": ["letter"]}, lambda prompts: 1 / 0)
    assert [each.training for each in model.modules()] == modes
