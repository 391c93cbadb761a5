"""The package on the GPU that tests/rehearsal.py rehearses.

Each case runs on the CPU and on "cuda:0", and says the same there: a constant made on
the CPU, a generator of the wrong device or a `.numpy()` without `.cpu()` raises. The
rehearsed GPU's generators give other numbers than the CPU's, and the results must be
the same nonetheless. A case that draws on the GPU says so: there a generator gives what
it gives on the CPU, and without that the result must differ.
"""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import sys
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from rehearsal import Rehearsal
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from bigmodel_nb.adapting import (
    calibrate,
    instruct,
    lora,
    methods,
    multimodal,
    qlora,
    selfsup,
    selfvision,
)
from bigmodel_nb.adapting import classifier as classifying
from bigmodel_nb.adapting import features as frozen
from bigmodel_nb.adapting import finetune as estimators
from bigmodel_nb.data import sources
from bigmodel_nb.foundations import losses, optim
from bigmodel_nb.kit import core, exercises, plots, store, widgets
from bigmodel_nb.models import convolution, language, layers, scale, vision
from bigmodel_nb.robust import attacks, certify, evaluate, text, training
from bigmodel_nb.training import diagnose, distributed, loop, objective, resume, speed

CASES = {}


def case(*covers, drawn=""):
    """Keep a function of the device; `drawn` names what it draws there, if anything."""

    def keep(function):
        CASES[function.__name__] = (function, covers, drawn)
        return function

    return keep


def put(value, device):
    if isinstance(value, (torch.Tensor, nn.Module)):
        return value.to(device)
    return type(value)(put(v, device) for v in value)


def images(device, n=8):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 8, 8, generator=g)
    return put(x, device), put(torch.arange(n) % 3, device)


def net(device, seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    return put(made.eval(), device)


def batches():
    x, y = images("cpu", 12)
    return sources.loader(x, y, batch_size=6)


def gpt(device, **options):
    torch.manual_seed(0)
    config = language.GPTConfig(
        vocab_size=16, n_positions=12, n_embd=8, n_layer=1, n_head=2, **options
    )
    return put(language.GPT(config).eval(), device)


def bert(device):
    torch.manual_seed(0)
    config = language.BERTConfig(
        vocab_size=16, n_positions=12, n_embd=8, n_layer=1, n_head=2
    )
    return language.BERT(config).eval()


TEXTS = [
    "fine food",
    "a very bad film and bad food",
    "good",
    "bad",
    "really good film",
    "a terrible film",
]
TARGETS = torch.tensor([1, 0, 1, 0, 1, 0])


def tokenizer():
    """Whole words, as BERT marks a text: no file is read."""
    words = sorted({word for each in TEXTS for word in each.split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    numbers = {name: number for number, name in enumerate(names)}
    made = Tokenizer(WordLevel(numbers, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    marks = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def encoder(attention="eager", dropout=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )
    return transformers.BertModel(config).eval()


def classifier(device, **options):
    made = encoder(**options)
    found = classifying.TextClassifierModule(made, tokenizer(), ["bad", "good"], 12)
    return put(found.eval(), device)


def texts(**options):
    return frozen.tokenized_loader(TEXTS, TARGETS, tokenizer(), 3, **options)


def ids(device):
    return put(torch.arange(8).view(2, 4), device)


def plain(value):
    """The result on the CPU, as nested numbers and tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, nn.Module):
        return plain(dict(value.state_dict()))
    if isinstance(value, pd.DataFrame):
        return value.drop(columns="seconds", errors="ignore").to_dict("list")
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def same(here, there, where="result"):
    assert type(here) is type(there), where
    if isinstance(here, dict):
        assert here.keys() == there.keys(), where
        for k in here:
            same(here[k], there[k], f"{where}[{k!r}]")
    elif isinstance(here, list):
        assert len(here) == len(there), where
        for i, pair in enumerate(zip(here, there)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(here, torch.Tensor):
        assert here.shape == there.shape and here.dtype == there.dtype, where
        torch.testing.assert_close(
            there, here, equal_nan=True, msg=lambda said: f"{where}: {said}"
        )
    elif isinstance(here, float):
        assert np.isclose(here, there, rtol=1e-4, atol=1e-5, equal_nan=True), where
    else:
        assert here == there or here != here, where


@case("softmax", "log_softmax", "nll_loss", "cross_entropy", "focal_loss")
def classification_losses(d):
    x, y = images(d)
    logits = net(d)(x)
    weight = put(torch.tensor([1.0, 2.0, 0.5]), d)
    return [
        losses.softmax(logits),
        losses.nll_loss(losses.log_softmax(logits), y, weight),
        losses.cross_entropy(logits, y, weight, label_smoothing=0.1),
        losses.focal_loss(logits, y, weight=weight),
    ]


@case(
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "kl_divergence",
)
def other_losses(d):
    x, _ = images(d)
    return [
        losses.binary_cross_entropy(x, x.round()),
        losses.binary_cross_entropy_with_logits(x, x.round(), pos_weight=x[0]),
        losses.mse_loss(x, 1 - x),
        losses.kl_divergence(losses.log_softmax(x), losses.softmax(1 - x)),
    ]


@case("check_outputs")
def outputs(d):
    return losses.check_outputs(net(d), images(d), F.cross_entropy)


def optimizer_case(kind):
    def run(d):
        model = net(d)
        x, y = images(d)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = kind(matrices if kind is optim.Muon else model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optim.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return model

    newton = ("newton_schulz",) if kind is optim.Muon else ()
    CASES[f"optimizer_{kind.__name__}"] = (
        run,
        (kind.__name__, "clip_grad_norm_", *newton),
        "",
    )


for each in (optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW, optim.Lion, optim.Muon):
    optimizer_case(each)


@case("lr_range_test", "gradient_noise")
def rates(d):
    model, (x, y) = net(d), images(d)
    data = [(x, y), (x, y)]
    found = optim.lr_range_test(model, data, F.cross_entropy, optim.SGD, steps=6)
    return [found.losses, optim.gradient_noise(model, data, F.cross_entropy)]


@case("SmallConvNet", "ResNet", "ResidualBlock", "ViT", "check_images")
def vision_models(d):
    torch.manual_seed(0)
    vit = vision.ViTConfig(8, 4, 1, 3, n_embd=8, n_layer=1, n_head=2)
    models = [
        convolution.SmallConvNet(width=4),
        vision.ResNet((1, 1), 4, 3, 1, small=True),
        vision.ResNet((1,), 4, 3, 1, bottleneck=True),
        vision.ViT(vit),
    ]
    return [put(m.eval(), d)(images(d)[0]) for m in models]


@case("features", "nearest", "probe", "neighbour_accuracy", "EfficientNetLite0")
def frozen_features(d):
    torch.manual_seed(0)
    net, pictures = frozen.EfficientNetLite0(4), torch.rand(12, 3, 32, 32)
    found = frozen.features(net, pictures.split(5), device=d)[:, 0]
    marks = torch.arange(12) % 2
    held = torch.arange(6)
    probed = frozen.probe(put(found, d), put(marks, d), held, folds=2)
    near = frozen.nearest(put(found, d), put(found[:2], d), 3)
    voted = frozen.neighbour_accuracy(put(found, d), put(marks, d), held, 3)
    return [found, near[0], probed.accuracy.n, voted.n, put(net, d)(put(pictures, d))]


@case("GPT", "KVCache", "Block", "MultiHeadAttention", "MLP", "attention", "stream")
def language_model(d):
    out = []
    for options in ({}, {"positions": "rotary", "norm": "rms", "activation": "swiglu"}):
        model = gpt(d, **options)
        out += [model(ids(d)), language.generate(model, ids(d), 3, temperature=0)]
        mask = put(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), d)
        out.append(model(ids(d), attention_mask=mask))
    return out


@case("generate", "sample", "mask_tokens", drawn="tokens, by a generator beside them")
def draws_of_language(d):
    logits = gpt(d)(ids(d))[:, -1]
    g = torch.Generator(d).manual_seed(0)
    return [
        language.generate(gpt(d), ids(d), 3, temperature=1.0, top_k=4, seed=1),
        language.sample(logits, top_p=0.9, generator=g),
        list(language.mask_tokens(ids(d), 15, 16, generator=g)),
    ]


@case("token_probabilities", "window_losses", "mean_interval", "attention_maps")
def measures_of_language(d):
    model = gpt(d)
    rows = window = language.window_losses(model, put(torch.arange(10).view(2, 5), d))
    return [
        language.token_probabilities(model(ids(d))[:, -1], top_k=3),
        window,
        language.mean_interval(rows),
        language.attention_maps(model, ids(d)),
    ]


@case("BERT", "MaskedLM", "SequenceClassifier")
def berts(d):
    models = [
        bert(d),
        language.MaskedLM(bert(d)),
        language.SequenceClassifier(bert(d), 3),
    ]
    torch.manual_seed(0)
    for parameter in models[2].parameters():
        nn.init.normal_(parameter, std=0.1)
    mask = put(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), d)
    return [put(m.eval(), d)(ids(d), attention_mask=mask) for m in models]


@case("rotation", "rotate", "attention_weights")
def rotary(d):
    x, _ = images(d)
    cos, sin = layers.rotation(put(torch.arange(8), d), 8)
    torch.manual_seed(0)
    layer = put(layers.MultiHeadAttention(8, 2), d)
    return [layers.rotate(x, cos, sin), layers.attention_weights(layer, x[:, 0])]


@case("fit", "evaluate", "predict", "supervised", "forward", "to_device", "History")
def training_loop(d):
    model = net(d)
    run = loop.fit(model, batches(), batches(), epochs=2, max_norm=1.0, device=d)
    return [
        model,
        run.batch_losses,
        loop.evaluate(model, batches(), device=d),
        loop.predict(model, batches(), device=d),
    ]


@case("Checkpoint", "random_state")
def a_long_run(d):
    """Accumulation, average, best weights, metrics, float16, a checkpoint and back."""
    results = []
    with TemporaryDirectory() as folder:
        for epochs in (1, 2):
            model = net(d)
            run = loop.fit(
                model,
                batches(),
                batches(),
                epochs=epochs,
                accumulate=2,
                ema=0.9,
                keep="best",
                metrics={"spread": lambda output, target: output.std()},
                checkpoint=loop.Checkpoint(folder, steps=1),
                device=d,
            )
            results += [
                model,
                run.batch_losses,
                run.steps,
                loop.random_state(d)["torch"],
            ]
    return results


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
    return LlamaForCausalLM(config).eval()


@case("answer_loss", "answer_log_likelihood", "answer_losses", "chat_loader")
def chat_losses(d):
    rows = [
        {"input_ids": torch.arange(n), "labels": torch.tensor([-100, *range(1, n)])}
        for n in (3, 4, 2)
    ]
    model, batches = gpt(d), instruct.chat_loader(rows, 2)
    input, labels = objective.to_device(next(iter(batches)), d)
    found = instruct.answer_losses(model, batches)
    return [
        instruct.answer_loss(model, input, labels),
        torch.tensor(found["nats"].to_numpy()),
    ]


@case("dpo_loss", "Preference")
def preferences(d):
    pairs = [
        ({"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 2)),
        ({"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (2, 4)),
    ]
    rows = [(*pair, torch.tensor([-3.0, -4.0])) for pair in pairs]
    input, target = objective.to_device(instruct._pairs(rows), d)
    return instruct.Preference(0.5, 0.1)(gpt(d), input, target)


@case("instruct", "prefer")
def tuned_on_conversations(d):
    model = gpt("cpu")
    chosen, rejected = (
        [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in lengths]
        for lengths in ((3, 2), (2, 4))
    )
    learnt = instruct.instruct(
        model, instruct.chat_loader(chosen, 2), epochs=1, precision="float32", device=d
    )
    preferred = instruct.prefer(
        model, chosen, rejected, batch_size=2, precision="float32", device=d
    )
    return [learnt.batch_losses, preferred.batch_losses, model]


@case("replies")
def replies_of_a_chat_model(d):
    model, words = llama().to(d), tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"
    )
    words.eos_token = words.pad_token
    return list(instruct.replies(model, words, TEXTS[:2], max_new_tokens=2)["answer"])


@case(
    *"quantize_blocks dequantize_blocks quantize_scales dequantize_scales".split(),
    *"QuantizedLinear quantize_base dequantize_base model_bytes".split(),
)
def a_base_in_four_bits(d):
    model, (x, _) = net(d), images(d, 3)
    x.requires_grad_()
    out = []
    for bits in (4, 8):
        qlora.quantize_base(model, bits, skip=["3"])
        out += [qlora.model_bytes(model), model(x)]
        out.append(torch.autograd.grad(out[-1].square().sum(), x)[0])
        qlora.dequantize_base(model)
    return [*out, model]


@case("upper_part", "lower_states")
def upper_layers(d):
    model = llama().to(d)
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}]
    kept = instruct.lower_states(model, rows, 1)
    upper, batches = instruct.upper_part(model, 1), instruct.chat_loader(kept)
    return torch.tensor(instruct.answer_losses(upper, batches)["nats"].to_numpy())


def masking_tokenizer():
    words = tokenizer()
    words.add_special_tokens({"mask_token": "[MASK]"})
    return words


@case("mask_tokens", drawn="masks, by a generator beside the tokens")
def hidden_words(d):
    words, g = masking_tokenizer(), torch.Generator(d).manual_seed(0)
    return list(selfsup.mask_tokens(ids(d), words, 0.5, g))


@case(
    *"masked_loss TextEncoder info_nce check_pairs alignment uniformity frozen".split()
)
def texts_without_labels(d):
    model = language.MaskedLM(bert(d)).to(d).eval()
    words = masking_tokenizer()
    batches = selfsup.masked_loader(TEXTS, words, 6, shuffle=False, probability=0.5)
    input, target = objective.to_device(next(iter(batches)), d)
    encoder = selfsup.TextEncoder(model.bert)
    loss = selfsup.masked_loss(model, input, target)
    with selfsup.frozen(encoder) as still:
        first = still(**input)
    second = first.flip(1)
    return [
        loss,
        torch.autograd.grad(loss, model.bias)[0],
        selfsup.info_nce(first, second),
        selfsup.alignment(first, second),
        selfsup.uniformity(first),
    ]


@case("causal_loss")
def next_tokens_of_texts(d):
    tokens = ids(d)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    input = {"input_ids": tokens, "attention_mask": mask}
    return [selfsup.causal_loss(gpt(d), input, None)]


@case("few_labels", "standardised", "few_label_accuracy")
def few_labels_of_each(d):
    x, y = images(d, 24)
    rows = selfsup.few_labels(y, 2)
    found = selfsup.standardised(x.flatten(1), rows)
    rest = np.setdiff1d(np.arange(24), rows)
    own = rows, rest[:6], rest[6:]
    return [found, selfsup.few_label_accuracy(found, y, *own).value]


@case(
    *"ConvEncoder projected nt_xent patchify encode_some".split(),
    *"assignment_information effective_rank".split(),
)
def images_without_labels(d):
    x, _ = images(d)
    torch.manual_seed(0)
    model = selfvision.projected(selfvision.ConvEncoder(1, 2)).to(d).eval()
    first, second = model(x), model(x.flip(3))
    loss = selfvision.nt_xent(first, second)
    sight = vision.ViT(vision.ViTConfig(8, 2, 1, 3, 8, 1, 2)).to(d).eval()
    kept = put(torch.arange(4).expand(len(x), -1), d)
    return [
        loss,
        torch.autograd.grad(loss, model[0].layers[0].weight)[0],
        selfvision.patchify(x, 2),
        selfvision.encode_some(sight, x, kept),
        selfvision.assignment_information(first.softmax(1)),
        selfvision.effective_rank(second),
    ]


@case("SelfDistillation", "distillation")
def a_teacher_of_itself(d):
    x, _ = images(d)
    torch.manual_seed(0)
    model = selfvision.SelfDistillation(selfvision.ConvEncoder(1, 2), 8).to(d)
    loss = selfvision.distillation(lambda each: each.flip(3))(model, x, None)
    loss.backward()
    with torch.no_grad():
        model.student[1].weight.sub_(0.1)
    model.on_batch_end(None)
    return [loss, model.centre, model(x)]


@case(
    "Augment", "simclr", "MaskedAutoencoder", "masked_pixels", drawn="views and masks"
)
def views_and_masks(d):
    x, _ = images(d)
    torch.manual_seed(0)
    model = selfvision.projected(selfvision.ConvEncoder(1, 2)).to(d).eval()
    sight = vision.ViT(vision.ViTConfig(8, 2, 1, 3, 8, 1, 2))
    hiding = selfvision.MaskedAutoencoder(sight).to(d).eval()
    augment = selfvision.Augment(flip=True)
    return [
        augment(x),
        selfvision.simclr(augment)(model, x, None),
        selfvision.masked_pixels(hiding, x, None),
    ]


@case("each_tensor", "checked_batches", "count_targets", "classification_loss")
def parts_of_the_loop(d):
    x, y = images(d)
    pairs = objective.checked_batches([(x, y)], torch.device(d), "train_loader")
    return [
        objective.each_tensor({"x": [x]}, torch.relu),
        list(pairs),
        objective.count_targets(y, objective.supervised(F.cross_entropy)),
        objective.classification_loss(net(d)(x), y),
    ]


@case("set_attention", "checkpoint_blocks", "fuse_optimizer", "model_flops")
def levers(d):
    model, x = gpt(d, tie_weights=False), ids(d)
    speed.set_attention(model, "plain")
    speed.checkpoint_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    speed.fuse_optimizer(optimizer)
    next_token = lambda model, input, target: F.cross_entropy(  # noqa: E731
        forward_of(model, input).flatten(0, 1), target.flatten()
    )
    flops = speed.model_flops(model, (x, x), next_token)
    next_token(model, x, x).backward()
    optimizer.step()
    return [flops, model]


def forward_of(model, input):
    return objective.forward(model, input)


@case("diagnose")
def a_diagnosis(d):
    x, y = images(d, 12)
    found = diagnose.diagnose(net(d).train(), (x, y), F.cross_entropy, device=d)
    return found.faults


@case("count_parameters", "copy_model", "evaluating", "match_dtype")
def of_models(d):
    model = net(d)
    x = images(d)[0].double()
    with core.evaluating(model.train()):
        inside = model(x.float())
    return [
        inside,
        core.copy_model(model),
        core.count_parameters(model),
        objective.match_dtype(model, x),
    ]


def attack_case(name, attack):
    def run(d):
        return attack(net(d), *images(d))

    CASES[f"attack_{name}"] = (run, (type(attack).__name__,), "")


# random attacks draw by arithmetic on the input, the same on each device
for norm in ("linf", "l2", "l1"):
    eps = {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm]
    for each in (
        attacks.FGSM(eps, norm),
        attacks.PGD(eps, norm, 3, restarts=2),
        attacks.MomentumPGD(eps, norm, 3),
        attacks.APGD(eps, norm, 4, restarts=2),
        attacks.APGD(eps, norm, 4, multi_targeted=True, n_target_classes=2),
        attacks.DeepFool(eps, norm, 3),
        attacks.FAB(eps, norm, 3, restarts=2),
        attacks.Square(eps, norm, 5),
        training.RandomFGSM(eps, norm),
    ):
        many = "_targets" if getattr(each, "multi_targeted", False) else ""
        attack_case(f"{type(each).__name__}{many}_{norm}", each)
attack_case("CarliniWagner", attacks.CarliniWagner(1.0, steps=4, rounds=2))
both = (attacks.FGSM(0.1), attacks.PGD(0.1, steps=2))
attack_case("Ensemble", attacks.EnsembleAttack(both))


@case("PGD", "copy_model", "best_dtype")
def attack_on_a_quick_copy(d):
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    model = put(nn.Sequential(*body, nn.Linear(144, 3)).eval(), d)
    return attacks.PGD(0.1, steps=3, fast=True)(model, *images(d))


@case(
    "robust_accuracy",
    "robustness_curve",
    "logits_of",
    "within_bounds",
    "EOT",
    "is_stochastic",
)
def robustness(d):
    model, attack = net(d), attacks.FGSM(0.1)
    x, _ = images(d)
    return [
        attacks.robust_accuracy(model, batches(), attack, device=d),
        attacks.robustness_curve(model, batches(), attack, (0.0, 0.1), device=d),
        attacks.EOT(model, 2)(x),
        attacks.is_stochastic(model, x),
        attacks.logits_of(model, x),
        attacks.within_bounds(x),
    ]


def training_case(name, make):
    def run(d):
        model = net(d)
        loop.fit(model, batches(), epochs=1, objective=make(), device=d)
        return model

    noise = "the noise" if name == "NoiseTraining" else ""
    CASES[f"objective_{name}"] = (run, (name,), noise)


pgd = attacks.PGD(0.1, steps=2)
for name, make in {
    "AdversarialTraining": lambda: training.AdversarialTraining(pgd, clean_weight=0.5),
    "TRADES": lambda: training.TRADES(pgd),
    "MART": lambda: training.MART(pgd),
    "AWP": lambda: training.AWP(training.TRADES(pgd)),
    "FreeTraining": lambda: training.FreeTraining(attacks.FGSM(0.1)),
    "IntervalTraining": lambda: certify.IntervalTraining(0.05, ramp=2),
    "NoiseTraining": lambda: certify.NoiseTraining(0.2),
    "MixedPrecision": lambda: objective.MixedPrecision(
        objective.supervised(F.cross_entropy), torch.bfloat16
    ),
}.items():
    training_case(name, make)


@case("CatastrophicOverfittingAlarm", "cost_meter", "boosted_cross_entropy")
def alarms(d):
    model, (x, y) = net(d), images(d)
    alarm = training.CatastrophicOverfittingAlarm(model, x, y, pgd)
    goal = training.AdversarialTraining(pgd)
    loop.fit(model, batches(), epochs=1, objective=goal, callbacks=[alarm], device=d)
    cost = training.cost_meter({"TRADES": training.TRADES(pgd)}, model, x, y, rounds=2)
    return [
        alarm.checks,
        cost["counted"].tolist(),
        training.boosted_cross_entropy(model(x), y),
    ]


@case(
    "interval_bounds",
    "margin_bounds",
    "interval_radii",
    "certified_accuracy",
    "certified_curve",
)
def intervals(d):
    model, (x, y) = net(d), images(d)
    radii = certify.interval_radii(model, x, y)
    return [
        list(certify.interval_bounds(model, x - 0.01, x + 0.01)),
        certify.margin_bounds(model, x - 0.01, x + 0.01, y),
        radii,
        certify.certified_accuracy(radii, 0.01),
        certify.certified_curve(radii, (0.0, 0.01)),
    ]


@case("SmoothedClassifier", "smoothed_radii", drawn="the noise")
def smoothing(d):
    x, y = images(d)
    smoothed = certify.SmoothedClassifier(net(d), 3, 0.1, seed=0)
    return [
        smoothed(x),
        smoothed.predict(x, n=20),
        certify.smoothed_radii(smoothed, x, y, n0=10, n=20),
    ]


@case("train_substitute")
def substitute(d):
    x, _ = images(d, 1000)
    torch.manual_seed(0)
    return evaluate.train_substitute(put(nn.Linear(8, 3), d), x[:, 0, 0])


@case("masking_report")
def masking(d):
    options = {"steps": 2, "examples": 6, "queries": 10, "points": 20, "device": d}
    report = evaluate.masking_report(
        net(d), batches(), 0.1, substitute=net(d, 1), **options
    )
    return [(check.check, check.verdict, check.against) for check in report.checks]


@case(
    "Normalized",
    "BPDA",
    "expected_correct",
    "expected_curve",
    "noise_curve",
    "plot_attacked",
)
def evaluations(d):
    model, (x, y) = net(d), images(d)
    squeezed = nn.Sequential(put(evaluate.BPDA(torch.round), d), model)
    found = attacks.FGSM(0.1)(squeezed, x, y)
    evaluate.plot_attacked(x, found, ["a"] * 8, ["b"] * 8, "All are taken for b")
    return [
        evaluate.expected_curve(model, batches(), pgd, (0.0, 0.1), draws=2, device=d),
        evaluate.noise_curve(model, batches(), (0.0, 0.1), draws=2, device=d),
        put(evaluate.Normalized(model, [0.5], [0.2]), d)(x),
        found,
        evaluate.expected_correct(model, x, y, draws=2),
    ]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.head((x * attention_mask[..., None]).mean(1))


@case("perturbable_tokens", "embedding_norms", "attack_embeddings", "EmbeddingModel")
def embeddings(d):
    model = put(Words().eval(), d)
    mask = put(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), d)
    input, y = {"input_ids": ids(d), "attention_mask": mask}, put(torch.arange(2), d)
    wide = attacks.FGSM(0.1, "l2", bounds=(-math.inf, math.inf))
    out = [
        text.perturbable_tokens(model, input, special=(0,)),
        text.embedding_norms(model, input),
        text.attack_embeddings(wide, model, input, y, special=(0,)),
    ]
    for goal in (
        text.EmbeddingTraining(0.1, special=(0,)),
        text.SmoothnessTraining(0.1, special=(0,)),
    ):
        loss = goal(model, input, y)
        loss.backward()
        out.append(loss.isfinite())
    return out


@case("embedding_groups", "embedding_curve", "max_positions")
def embeddings_of_transformers(d):
    model = classifier(d)
    wide = attacks.PGD(0.1, "l2", 2, bounds=(-math.inf, math.inf))
    input, _ = next(iter(texts()))
    groups = text.embedding_groups(model, put_all(input, d))
    return [
        frozen.max_positions(model),
        text.embedding_curve(model, texts(), wide, (0.0, 0.5), device=d),
        [[rows, vectors] for rows, _, vectors in groups],
    ]


def put_all(batch, device):
    return {name: put(each, device) for name, each in batch.items()}


@case("EmbeddingTraining", "SmoothnessTraining", drawn="the starts, by torch's state")
def random_starts_of_embeddings(d):
    model, found = put(Words().train(), d), []
    input = {"input_ids": ids(d), "attention_mask": put(torch.ones(2, 4), d)}
    for per in ("entry", "token", "text"):
        for kind in (text.EmbeddingTraining.freelb, text.SmoothnessTraining.vat):
            torch.manual_seed(0)
            goal = kind(0.1, per=per, special=(0,))
            found.append(goal(model, input, put(torch.arange(2), d)))
    return found


@case("WordSubstitution", "Typos", "success_rate")
def words(d):
    model, found = classifier(d), []
    labels = [int(each) for each in model.logits(TEXTS).argmax(1)]
    swap = text.WordSubstitution(model, similarity=-1.0, nearness=-1.0)
    for attack in (swap, text.Typos()):
        found.append(attack(model, TEXTS, labels))
    return [*found, text.success_rate(found[0])]


@case(
    "SentenceEncoder",
    "TextClassifierModule",
    "mean_pool",
    "tokenized_loader",
    "map_texts",
)
def sentence_vectors(d):
    model = classifier(d, attention="sdpa")
    vectors = put(frozen.SentenceEncoder(encoder(), tokenizer(), 12), d)
    input, _ = next(iter(texts()))
    input = put_all(input, d)
    return [
        model.encode(TEXTS, layers="all"),
        vectors.encode(TEXTS, batch_size=2),
        model.predict(TEXTS),
        model(**input),
        model(input["input_ids"]),
        frozen.mean_pool(input["input_ids"][..., None], input["attention_mask"]),
        [target for _, target in texts(shuffle=True, seed=1)],
        list(frozen.tokenized_loader(TEXTS, put(TARGETS, d), tokenizer(), 3)),
    ]


@case(
    *"answers overconfidence reliability calibrated_reference log_loss".split(),
    *"expected_calibration_error brier_score temperature_scale".split(),
    *"coverage_curve abstain_threshold classwise_calibration".split(),
    *"suspicious_labels suspicious_by_chance".split(),
)
def worth_of_answers(d):
    z = torch.randn(90, 3, generator=torch.Generator().manual_seed(1))
    p, y = put(z.softmax(1), d), put((z + z.flip(0)).argmax(1), d)
    given = [calibrate.answers, calibrate.overconfidence, calibrate.reliability]
    given += [calibrate.log_loss, calibrate.brier_score, calibrate.coverage_curve]
    given += [calibrate.expected_calibration_error, calibrate.suspicious_labels]
    out = [function(p, y) for function in given]
    out.append(calibrate.classwise_calibration(p, y).drop(columns="difference"))
    out.append(calibrate.abstain_threshold(p, y, 0.5))
    out += [calibrate.calibrated_reference(p), calibrate.suspicious_by_chance(p)]
    return [*out, calibrate.temperature_scale(put(z, d), y)]


@case("fit_linear_probe", "load_probe")
def linear_probe(d):
    model = classifier(d)
    vectors = put(model.encode(TEXTS), d)
    given = vectors, put(TARGETS, d)
    probe = classifying.fit_linear_probe(*given, *given, penalties=(0.1, 1.0))
    classifying.load_probe(model, probe)
    return [probe.C, probe.coef_, probe.intercept_, model.logits(TEXTS)]


@case("finetune", "parameter_groups", "load_encoder")
def finetuning(d):
    """With validation; saved, read again and moved."""
    model = classifier("cpu")
    history = classifying.finetune(
        model, texts(shuffle=True), texts(), epochs=2, device=d
    )
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = classifying.TextClassifierModule.from_pretrained(folder)
    return [
        history.frame,
        model.predict(TEXTS),
        again.predict(TEXTS),
        put(again, d).predict(TEXTS),
    ]


@case("apply_method")
def methods_of_estimators(d):
    found = []
    for method in ("head", "bitfit", "lora", "full"):
        torch.manual_seed(0)
        model = estimators.apply_method(classifier(d), method)
        found += [model.logits(TEXTS), model]
    return found


@case("finetune", drawn="dropout and starts, by torch's state")
def finetuning_on_moved_texts(d):
    model = classifier("cpu", dropout=0.1)
    smooth = text.SmoothnessTraining.smart(0.1)
    torch.manual_seed(0)
    classifying.finetune(model, texts(), epochs=1, objective=smooth, device=d)
    return model


@case("to_transformers")
def in_the_form_of_transformers(d):
    return [
        language.to_transformers(put(each, d))(ids("cpu"))[0]
        for each in (gpt(d), bert(d))
    ]


@case("from_torchvision", "from_transformers")
def from_other_libraries(d):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    theirs = put(transformers.ViTForImageClassification(config).eval(), d)
    other = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    return [
        vision.from_transformers(theirs)(images("cpu")[0]),
        vision.from_torchvision(put(other, d)),
    ]


def next_token(model, input, target):
    logits = objective.forward(model, input)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def counted(trial):
    """What of a comparison is no measurement of the device."""
    return [trial.change, trial.error, trial.settings]


@case("step_anatomy", "SlowTexts")
def anatomy(d):
    """Times differ, and of kernels of a GPU the profiler sees none here."""
    model = gpt(d)
    rows = speed.SlowTexts(torch.arange(10).view(2, 5), 0.0)
    slow = torch.utils.data.DataLoader(rows, 2)
    found = speed.step_anatomy(model, slow, next_token, steps=1)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = ids(d), ids(d)
    again = speed.step_anatomy(model, batch, next_token, optimizer, steps=1)
    counts = [each.calls > 0 for each in (found, again)]
    return [list(found.phases), counts, [each for each, _ in optimizer.state.items()]]


@case("compare_settings", "peak_memory", "Settings", "Ratio", "interleaved")
def settings(d):
    model, batch = gpt(d), (ids(d), ids(d))
    change = speed.Settings(
        precision="bfloat16", attention="plain", fused=True, checkpointing=True
    )
    tried = speed.compare_settings(model, batch, [change], next_token, rounds=6)
    memory = speed.peak_memory(model, batch, next_token, settings=change)
    return [[counted(each) for each in tried], memory > 0, change.apply(model)]


@case("fastest")
def the_fastest(d):
    levers = "precision", "fused"
    found = speed.fastest(gpt(d), (ids(d), ids(d)), next_token, rounds=6, levers=levers)
    sound = [
        each.error <= speed.BOUNDS[each.settings.precision] for each in found.trials
    ]
    return [[each.change for each in found.trials[:2]], all(sound)]


@case("stored_bytes", "LiveMemory")
def bytes_of_a_model(d):
    model = gpt(d)
    optimizer = torch.optim.AdamW(model.parameters())
    next_token(model, ids(d), ids(d)).backward()
    optimizer.step()
    with scale.LiveMemory(model.parameters()) as memory:
        model(ids(d))
    return [distributed.stored_bytes(model, optimizer), memory.peak > 0]


@case("split_indices", "loader", "RepeatBatches")
def data_that_lies_on_the_device(d):
    x, y = images(d, 12)
    parts = sources.split_indices(y, (0.5, 0.5), groups=put(torch.arange(12), d))
    repeated = training.RepeatBatches(sources.loader(x, y, 6, shuffle=True), 2)
    return [parts, [x[parts[0]], y[parts[1]]], list(repeated)]


@case("differing", "difference")
def unlike_results(d):
    x = torch.arange(3.0)
    here, there = {"a": x, "b": x}, {"a": put(x, d), "b": put(x + 1, d)}
    return [resume.differing(here, there), exercises.difference(there, here)]


@case("save_tree", "load_tree")
def stored_trees(d):
    tree = {"a": [put(torch.arange(3.0), d), 2.5], "b": put(torch.tensor(True), d)}
    with TemporaryDirectory() as folder:
        store.save_tree(f"{folder}/made", tree)
        return [
            store.load_tree(f"{folder}/made"),
            store.load_tree(f"{folder}/made", device=d),
        ]


@case("Difference", "Proportion")
def intervals_of_trials(d):
    one, other = put(torch.arange(12) % 2 > 0, d), put(torch.arange(12) % 3 > 0, d)
    return [
        core.Proportion.of(one.sum(), len(one)),
        core.Difference.of_trials(one, other),
        core.Difference.of_runs(put(torch.rand(6), d), put(torch.rand(6), d)),
    ]


@case("image_grid")
def a_grid_of_images(d):
    x, y = images(d)
    made = plots.image_grid(x, y, y.flip(0), "Three are told apart")
    return [
        [each.get_xlabel() for each in made.axes],
        made.axes[0].images[0].get_array(),
    ]


@case("load_classifier", "Classifier")
def a_classifier_from_a_file(d):
    torch.manual_seed(0)
    made = convolution.SmallConvNet(8, 1, 3, width=4)
    with TemporaryDirectory() as folder:
        torch.save(made.state_dict(), f"{folder}/made.pt")
        found = evaluate.load_classifier(f"{folder}/made.pt", 3, "SmallConvNet", 8, 1)
    return put(found.model, d)(images(d)[0])


@case("graph_explorer", "explore_graph", "Explorer")
def a_graph(d):
    x = put(torch.tensor([1.0, 2.0]), d)
    shown = widgets.graph_explorer(lambda x, w: (x * w).sum(), x=x, w=x + 1)
    shown.set(step=3)
    return shown.alt


class Letters:
    """A tokenizer of letters, sixteen of them."""

    def encode(self, said):
        return [ord(each) % 16 for each in said]

    def decode(self, numbers):
        return "".join(chr(97 + each) for each in numbers)


@case("sampling_explorer", drawn="the text that is written, by a generator beside it")
def explorer_of_samples(d):
    return language.sampling_explorer(gpt(d), Letters(), "abc", 6).alt


@case("gpt_attention_explorer", "attention_explorer", "attack_explorer")
def explorers(d):
    def found(model, x, y, radius, norm, steps):
        return attacks.PGD(radius, norm, steps)(model, x, y)

    return [
        language.gpt_attention_explorer(gpt(d), Letters(), "abc").alt,
        widgets.attention_explorer(put(encoder(), d), tokenizer(), TEXTS[1]).alt,
        widgets.attack_explorer(net(d), *images(d), found).alt,
    ]


def rehearsed(function, own_numbers):
    with Rehearsal(own_numbers):
        torch.manual_seed(0)
        return plain(function("cuda:0"))


@case(
    *"layer_sizes base_weight principal_part Adapter TaskModule LoRALinear".split(),
    *"add_lora set_adapters adapters_for merge_lora unmerge_lora remove_lora".split(),
    *"combine_lora trainable_parameters save_lora load_lora".split(),
    *"is_transposed is_plain adapter_type exchange_modules weight_sample".split(),
    *"write_adapter path_of".split(),
)
def adapters(d):
    model, (x, _) = net(d), images(d, 3)
    out, options = [], {"targets": "1", "trainable": "3"}
    for name, variant in (("a", "lora"), ("b", "pissa"), ("c", "dora")):
        lora.add_lora(model, 2, name=name, variant=variant, **options)
        model(x).square().sum().backward()
        out += [model(x), lora.trainable_parameters(model)["trainable"]]
    with torch.no_grad():
        for key, each in model.named_parameters():
            if ".adapters." in key:
                each.add_(torch.linspace(-0.1, 0.1, each.numel()).view_as(each).to(d))
    with lora.adapters_for(model, ["a", None, "b"]):
        out.append(model(x))
    lora.combine_lora(model, {"a": 1, "b": -1})
    out.append(model(x))
    out.append(lora.merge_lora(lora.set_adapters(model, {"a": 2, "c": 1}))(x))
    lora.unmerge_lora(model)
    with TemporaryDirectory() as folder:
        lora.save_lora(model, f"{folder}/c", "c")
        out.append(lora.load_lora(net(d), f"{folder}/c")(x))
    return [*out, lora.remove_lora(model)(x), lora.base_weight(model[1])]


@case(
    *"adapt remove_adaptation merge_adaptation save_adaptation".split(),
    *"load_adaptation ScaledLinear BottleneckLinear Prompt Prefix".split(),
)
def other_small_methods(d):
    model, out = encoder().to(d), []
    ids = torch.arange(10).view(2, 5).to(d)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).to(d)
    for method in "bitfit ia3 adapter prompt prefix lora dora full".split():
        methods.adapt(model, method)
        with torch.no_grad():
            for each in model.parameters():
                if each.requires_grad:
                    steps = torch.linspace(-0.1, 0.1, each.numel())
                    each.copy_(each.detach() + steps.view_as(each).to(d))
                    if method in ("prompt", "prefix"):  # what it draws
                        each.copy_(steps.view_as(each).to(d))
                    if method in ("lora", "dora"):
                        each.copy_(steps.view_as(each).to(d) + 1)
                    if method == "adapter":
                        each.copy_(steps.view_as(each).to(d))
        states = model(ids, attention_mask=mask).last_hidden_state
        own = [each for each in model.parameters() if each.requires_grad]
        out += [states, torch.autograd.grad(states.square().sum() / 9, own[:1])[0]]
        with TemporaryDirectory() as folder:
            methods.save_adaptation(model, folder)
            twin = methods.load_adaptation(encoder().to(d), folder)
            out.append(twin(ids, attention_mask=mask).last_hidden_state)
        if method == "ia3":
            methods.merge_adaptation(twin)
            out.append(twin(ids, attention_mask=mask).last_hidden_state)
        methods.remove_adaptation(model)
    return [*out, model(ids).last_hidden_state]


def tiny_clip():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text_config = small | marks | {"vocab_size": 20, "max_position_embeddings": 12}
    vision = small | {"image_size": 8, "patch_size": 4, "num_channels": 1}
    parts = {"text_config": text_config, "vision_config": vision}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=8))


@case(
    *"CaptionedImages one_of_each TextEncoder DualEncoder from_clip".split(),
    *"clip_loss contrastive pair_loader encode_pairs prompt_vectors".split(),
    *"ranks recall_at_k".split(),
)
def two_encoders(d):
    torch.manual_seed(0)
    rows = torch.stack([torch.arange(8), torch.arange(8) // 2], 1)  # of the CPU
    captions = ["a dog", "a cat and a dog", "two cats", "none"]
    pairs = multimodal.CaptionedImages(images("cpu")[0], captions, rows, ["x"] * 8)
    words = multimodal.WordTokenizer(captions)
    config = language.BERTConfig(len(words), 24, 16, 1, 2)
    picture = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    model = multimodal.DualEncoder(picture, multimodal.TextEncoder(config), 8)
    model, every, out = put(model, d), torch.arange(8), []
    for input, target in multimodal.pair_loader(pairs, every, words, 5):
        loss = multimodal.contrastive(model, loop.to_device(input, d), put(target, d))
        loss.backward()
        out += [loss, model.logit_scale.grad]
    one, two = multimodal.encode_pairs(model, pairs, every, words, 3)
    similarity = put(one @ two.T, d)
    relevant = put(pairs.groups[:, None] == pairs.groups, d)
    clip = multimodal.from_clip(put(tiny_clip(), d))
    ids = torch.tensor([[0, 5, 1], [0, 7, 1]])
    prompts = {"x": ["a dog"], "y": ["none", "two"]}
    return [
        *out,
        multimodal.one_of_each(pairs, every),
        multimodal.ranks(similarity, relevant),
        multimodal.recall_at_k(similarity, 2),
        multimodal.prompt_vectors(model, prompts, words),
        clip(put(pairs.images[:2], d), put(ids, d)),
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_gpu_does_what_the_cpu_does(name):
    function, covers, drawn = CASES[name]
    torch.manual_seed(0)
    called = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code))
    try:
        here = plain(function("cpu"))
    finally:
        sys.setprofile(None)
    same(here, rehearsed(function, not drawn))
    if drawn:
        with pytest.raises(AssertionError):
            same(here, rehearsed(function, True))
    known = public()
    for cover in covers:
        codes = [codes_of(each) for each in known.get(cover, [])]
        assert codes and any(called & each for each in codes), f"{cover} was not called"


def codes_of(public):
    """What of a public name runs when it is used."""
    if not inspect.isclass(public):
        return {inspect.unwrap(public).__code__, getattr(public, "__code__", None)}
    held = [each for kind in public.__mro__ for each in vars(kind).values()]
    held += [each.fget for each in held if isinstance(each, property)]
    held = [getattr(each, "__func__", each) for each in held]
    return {each.__code__ for each in held if inspect.isfunction(each)}


def public(tensors_only=False):
    """Public names of the chapters that compute, each with what bears it."""
    found = {}
    for chapter in ("kit", "data", "foundations", "models", "training", "adapting"):
        found |= names_of(chapter, found, tensors_only)
    return names_of("robust", found, tensors_only)


def names_of(chapter, found, tensors_only):
    package = importlib.import_module(f"bigmodel_nb.{chapter}")
    for each in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"bigmodel_nb.{chapter}.{each.name}")
        for name in module.__all__:
            value = getattr(module, name)
            own = getattr(value, "__module__", None) == module.__name__
            if own and callable(value) and (takes_tensors(value) or not tensors_only):
                found.setdefault(name, []).append(value)
    return found


KINDS = "Tensor", "Module", "Optimizer", "loader", "GPT", "BERT", "Classifier"
KINDS += "Encoder", "ArrayLike"
NAMES = "model", "images", "came"


def takes_tensors(value):
    """Whether a parameter of a function, or of a class, is a tensor or a model."""
    functions = [value]
    if inspect.isclass(value):
        functions = [each for each in vars(value).values() if inspect.isfunction(each)]
        functions = [
            f for f in functions if f.__name__[:1] != "_" or f.__name__ in DUNDER
        ]
    told = [p for f in functions for p in inspect.signature(f).parameters.values()]
    named = any(p.name in NAMES for p in told)
    return named or any(k in f"{p.annotation} {p.name}" for k in KINDS for p in told)


DUNDER = "__init__", "__call__"
# Public names that take tensors or models and have no case, by the reason.
WITHOUT = {
    "arrays of NumPy, never on a GPU": """Tensor backward mul add sub div pow neg tanh
        exp log sqrt sigmoid relu gelu clip where sum mean var max matmul reshape
        transpose cat stack layer_norm embedding dropout conv2d max_pool2d graph
        gradcheck PowerLaw sentence_of_gain""",
    "counts by the shapes of a configuration, or is arithmetic": """parameter_count
        flops device_memory training_memory generation_memory plan warmup_cosine""",
    "takes two scalars of the CPU, which it makes itself": "descend descent_explorer",
    "needs several processes, between which C++ carries the bytes": """
        tensor_parallel""",
    "torch's writer of shards copies through streams of CUDA, in C++": """save_sharded
        load_sharded""",
    "a base class; its children have cases": "Attack RobustObjective",
}


def test_each_public_name_that_takes_tensors_has_a_case_or_a_reason():
    covered = {name for _, covers, _ in CASES.values() for name in covers}
    excused = {name for names in WITHOUT.values() for name in names.split()}
    known = public(tensors_only=True)
    assert not known.keys() - covered - excused, "neither a case nor a reason"
    assert not excused & covered, "a reason not to have the case that is there"
    assert not excused - known.keys(), "a reason for what there is not"
