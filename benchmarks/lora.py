"""A step of low-rank adaptation beside peft as it comes: seconds and peak memory.

MiniLM with rank 8 on query and value and a head of two classes, 74,498 numbers; batches
of 16 texts of 64 tokens, AdamW. As it comes, peft takes float32 and torch's attention
kernel. Ours is `add_lora` with `MixedPrecision`'s choice of type and the attention
that is fast on the processor. Between them stand both with the other's settings, which
tell what the adapters bring and what the settings do.

All take turns in each round. Prints medians, paired ratios with intervals, what it
adds to the memory of a process of its own (on Linux), and the processor. Exit code 1
where ours is below its floor, 1.7 times peft as it comes with AMX, 1.6 with AVX-512
BF16 alone, else 1, or where it takes more memory.
"""

import argparse
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from bigmodel_nb.adapting.features import mean_pool
from bigmodel_nb.adapting.lora import add_lora, trainable_parameters
from bigmodel_nb.models.pretrained import fetch
from bigmodel_nb.training.objective import MixedPrecision
from bigmodel_nb.training.speed import Ratio, interleaved, set_attention

BATCH, LENGTH, RANK, STEPS, ROUNDS = 16, 64, 8, 3, 11
OURS, PEFT = "ours", "peft as it comes"
SETTINGS = {  # adapters, type, attention
    PEFT: ("peft", torch.float32, "fused"),
    "ours with peft's settings": ("ours", torch.float32, "fused"),
    "peft with ours": ("peft", "auto", "plain"),
    OURS: ("ours", "auto", "plain"),
}


class Classifier(nn.Module):
    """MiniLM, the mean over tokens, and a head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(mean_pool(output.last_hidden_state, attention_mask))


def classify(model: nn.Module, input: dict, target: torch.Tensor) -> torch.Tensor:
    """The objective."""
    return F.cross_entropy(model(**input).float(), target)


def contestant(name: str) -> Callable[[], None]:
    """A few steps of one of them, ready to be called."""
    adapters, dtype, attention = SETTINGS[name]
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(
        str(fetch("all-MiniLM-L6-v2")), dtype=torch.float32, use_safetensors=True
    )
    set_attention(encoder, attention)
    model = Classifier(encoder)
    if adapters == "peft":
        from peft import LoraConfig, get_peft_model

        chosen = dict(target_modules=["query", "value"], modules_to_save=["head"])
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, **chosen))
    else:
        add_lora(model, RANK, 16, targets=("query", "value"), trainable="head")
    assert trainable_parameters(model)["trainable"] == 74_498
    model.train()
    generator = torch.Generator().manual_seed(0)
    input = {
        "input_ids": torch.randint(1000, 20_000, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
    }
    target = torch.randint(2, (BATCH,), generator=generator)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    objective = MixedPrecision(classify, dtype)

    def steps() -> None:
        for _ in range(STEPS):
            loss = objective(model, input, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def held(which: str) -> float:
    """MB of this process by Linux: VmRSS now, or VmHWM, the most since a reset."""
    found = re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000


def own_peak(name: str) -> float:
    """What training adds at most to what this process holds before, in MB."""
    steps = contestant(name)
    gc.collect()
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    steps()
    return held("VmHWM") - before


def peak(name: str) -> float:
    """`own_peak` of a process of its own."""
    program = [sys.executable, str(Path(__file__)), "--memory", name]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[-1])


def processor() -> tuple[str, float]:
    """What of it counts here, and the floor of the ratio."""
    able = torch.cpu.get_capabilities()
    if able.get("amx_bf16"):
        return "AMX", 1.7
    return (
        ("AVX-512 BF16, no AMX", 1.6) if able.get("avx512_bf16") else ("neither", 1.0)
    )


def main() -> int:
    """Print the table; the exit code."""
    ways = {name: contestant(name) for name in SETTINGS}
    seconds = interleaved(ways, ROUNDS, "cpu")
    memory = {name: peak(name) for name in SETTINGS}
    kind, floor = processor()
    print(
        f"{kind}; {torch.get_num_threads()} threads; {ROUNDS} rounds of {STEPS} steps"
    )
    for name, each in seconds.items():
        faster = Ratio.of(seconds[PEFT], each)
        print(
            f"{name:26} {1000 * median(each) / STEPS:7.1f} ms a step,"
            f" {faster} times {PEFT}, +{memory[name]:.0f} MB"
        )
    ratio = median(seconds[PEFT]) / median(seconds[OURS])
    print(f"{OURS}: {ratio:.2f} times {PEFT}, at least {floor} wanted")
    return int(ratio < floor or memory[OURS] > memory[PEFT])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=list(SETTINGS))
    chosen = parser.parse_args()
    if chosen.memory:
        print(own_peak(chosen.memory))
    else:
        sys.exit(main())
