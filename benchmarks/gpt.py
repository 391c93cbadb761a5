"""GPT of models/language beside transformers' GPT-2 and a plain loop in float32.

A step of training, n_layer 4, n_head 4, n_embd 256, 128 tokens, batches of 16: ours
through `training.fit` with `precision="auto"`; the same model in a plain loop in
float32; transformers' GPT-2 as it comes (dropout off), in float32. Then tokens a second
at batch 1, greedily, with a cache, ours with weights of 32 and of 16 bits beside
`generate` of transformers: the same small model, and SmolLM2-135M-Instruct where it has
been fetched. There, on ten prompts, whether 16 bits write the 64 tokens of float32; and
what reading a prompt costs, which on a processor is dearer in float16.

All take turns in each round. Prints medians, ratios and the processor. Exit code 1
where a ratio is below its floor: training beside the plain loop and transformers 2.2
and 2.5 with AMX, 1.6 and 1.8 with AVX-512 BF16 alone, else 1; writing in float16 beside
transformers 2 with the small model and 1.5 with SmolLM2, nine of ten prompts alike.
"""

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from bigmodel_nb.models.language import (
    GPT,
    GPTConfig,
    from_transformers,
    generate,
    to_transformers,
)
from bigmodel_nb.models.layers import attention
from bigmodel_nb.models.pretrained import find, load_gguf
from bigmodel_nb.training.loop import MixedPrecision, fit

SIZES = dict(n_positions=128, n_embd=256, n_layer=4, n_head=4)
BATCH, STEPS, ROUNDS, WRITTEN = 16, 4, 6, 100
PROMPTS = (
    "The history of",
    "Once upon a time",
    "How do I bake bread?",
    "The capital of France is",
    "def fibonacci(n):",
    "In the year 1969,",
    "My favourite book is",
    "The three laws of motion are",
    "Dear Sir or Madam,",
    "Water boils at",
)


def next_token(model: torch.nn.Module, input: torch.Tensor, target: torch.Tensor):
    """The objective of a language model."""
    logits = model(input)
    logits = logits if torch.is_tensor(logits) else logits.logits
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def training() -> dict[str, Callable[[], None]]:
    """Each contestant, ready for a few steps."""
    torch.manual_seed(0)
    rows = torch.randint(256, (STEPS, BATCH, SIZES["n_positions"] + 1))
    batches = [(each[:, :-1], each[:, 1:]) for each in rows]

    def through_fit(objective: Callable) -> Callable[[], None]:
        model = GPT(GPTConfig(256, **SIZES, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        chosen = dict(objective=objective, optimizer=optimizer, max_norm=1.0)
        return lambda: fit(model, batches, epochs=1, device="cpu", **chosen)

    def plain(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def steps() -> None:
            for input, target in batches:
                loss = next_token(model, input, target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

        return steps

    config = transformers.GPT2Config(vocab_size=256, **SIZES)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return {
        # as precision="auto" does; its first batch is in the round that warms up
        "ours, fit, auto": through_fit(MixedPrecision(next_token, "auto")),
        "ours, fit, float32": through_fit(next_token),
        "ours, plain loop, float32": plain(GPT(GPTConfig(256, **SIZES))),
        "transformers, plain loop": plain(transformers.GPT2LMHeadModel(config)),
    }


def small_model() -> tuple[GPT, Any, torch.Tensor]:
    """Ours, transformers' with the same weights, and a prompt."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(256, **{**SIZES, "n_positions": 256})).eval()
    return ours, to_transformers(ours), torch.randint(256, (1, 16))


def writing(ours: GPT, theirs: Any, ids: torch.Tensor) -> dict[str, Callable]:
    """Each contestant, ready to write."""
    options = dict(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
    models = {"ours, float32": ours}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        models[f"ours, {name}"] = copy.deepcopy(ours).to(dtype)
    contestants = {
        name: lambda model=model: generate(model, ids, WRITTEN, temperature=0)
        for name, model in models.items()
    }
    return contestants | {"transformers": lambda: theirs.generate(ids, **options)}


def alike(ours: GPT, words: Any) -> dict[str, int]:
    """On how many prompts weights of 16 bits write 64 tokens as float32 does."""
    written = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(ours).to(dtype)
        asked = (words(each, return_tensors="pt")["input_ids"] for each in PROMPTS)
        name = str(dtype).removeprefix("torch.")
        written[name] = [generate(model, ids, 64, temperature=0) for ids in asked]
    return {
        name: sum(map(torch.equal, texts, written["float32"]))
        for name, texts in written.items()
    }


def reading(ours: GPT) -> dict[str, Callable]:
    """A prompt of 256 tokens, by the type of the weights."""
    ids = torch.randint(ours.config.vocab_size, (1, 256))
    models = {
        str(dtype).removeprefix("torch."): copy.deepcopy(ours).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    read = torch.no_grad()(lambda model: model(ids, logits_to_keep=1))
    return {name: lambda model=model: read(model) for name, model in models.items()}


def one_query() -> dict[str, Callable]:
    """Attention of a query over 116 and 1,000 keys in nine heads, by type, fused."""
    found = {}
    for keys in (116, 1000):
        q, k, v = (torch.randn(1, 9, size, 64) for size in (1, keys, keys))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            each = [x.to(dtype) for x in (q, k, v)]
            name = f"{keys:,} keys, {str(dtype).removeprefix('torch.')}"
            found[name] = lambda each=each: [
                attention(*each, implementation="fused") for _ in range(200)
            ]
    return found


def measured(contestants: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round; the first round warms up."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in seconds.items()}


def show(
    seconds: dict[str, list[float]], beside: str, count: int, unit: str
) -> dict[str, float]:
    """Prints rates and ratios; returns the ratios."""
    ratios = {}
    for name, each in seconds.items():
        ratios[name] = statistics.median(b / a for a, b in zip(each, seconds[beside]))
        rate = count / statistics.median(each)
        print(f"  {name:28} {rate:9.0f} {unit} {ratios[name]:6.2f} times {beside}")
    return ratios


def main() -> int:
    able = torch.cpu.get_capabilities()
    amx, short = able.get("amx_bf16"), able.get("avx512_bf16")
    print(
        f"AVX-512 BF16: {bool(short)}, AMX: {bool(amx)},"
        f" threads: {torch.get_num_threads()}"
    )
    os.environ["TQDM_DISABLE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    print("A step of training")
    found = measured(training(), ROUNDS)
    tokens = STEPS * BATCH * SIZES["n_positions"]
    beside = show(found, "transformers, plain loop", tokens, "tokens/s")
    plain = "ours, plain loop, float32"
    ratio = statistics.median(
        b / a for a, b in zip(found["ours, fit, auto"], found[plain])
    )
    floors = (2.2, 2.5) if amx else (1.6, 1.8) if short else (1.0, 1.0)
    held = [
        ("fit with auto beside the plain loop", ratio, floors[0]),
        ("and beside transformers", beside["ours, fit, auto"], floors[1]),
    ]
    models = {"small GPT": (*small_model(), None)}
    place = find("SmolLM2-135M-Instruct")
    if place:
        theirs, words = load_gguf(next(place.glob("*.gguf")))
        ids = words("The history of", return_tensors="pt")["input_ids"]
        models["SmolLM2"] = from_transformers(theirs), theirs, ids, words
    for name, (ours, theirs, ids, words) in models.items():
        print(f"Writing {WRITTEN} tokens, {name}")
        seconds = measured(writing(ours, theirs, ids), 20 if words is None else 3)
        ratios = show(seconds, "transformers", WRITTEN, "tokens/s")
        floor = 2.0 if words is None else 1.5
        held.append((f"{name} writes in float16", ratios["ours, float16"], floor))
        if words is not None:
            same = alike(ours, words)
            print(f"  of {len(PROMPTS)} prompts, 64 tokens as in float32: {same}")
            held.append(("prompts alike in float16", same["float16"], 9))
            print("Attention of one query")
            show(measured(one_query(), 5), "116 keys, float32", 200, "times/s")
            print("Reading a prompt of 256 tokens")
            show(measured(reading(ours), 3), "float32", 256, "tokens/s")
    for what, value, floor in held:
        missed = "" if value >= floor else "  MISSED"
        print(f"{what}: {value:.2f}, at least {floor}{missed}")
    return int(any(value < floor for _, value, floor in held))


if __name__ == "__main__":
    sys.exit(main())
