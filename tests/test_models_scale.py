"""What a model takes, counted and beside the real thing: parameters of built models,
FLOPs of torch's counter, bytes of real steps and caches; plans that add up."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bigmodel_nb.headless.run import run
from bigmodel_nb.models.language import GPT, GPTConfig
from bigmodel_nb.models.scale import (
    PRESETS,
    LiveMemory,
    Roofline,
    device_memory,
    fit_power_law,
    flops,
    generation_memory,
    measure_roofline,
    parameter_count,
    plan,
    plan_explorer,
    training_memory,
    zero_states,
)


def total(parts):
    return sum(parts.values())


def built(config):
    with torch.device("meta"):
        return GPT(config)


@st.composite
def configurations(
    draw, vocabularies=(7, 50, 300), least_layers=1, per_head=(2, 8, 16)
):
    head = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([None, *(k for k in (1, 2, 4) if head % k == 0)]))
    width = head * draw(st.sampled_from(per_head))
    return GPTConfig(
        draw(st.sampled_from(vocabularies)),
        128,
        width,
        draw(st.integers(least_layers, 3)),
        head,
        groups,
        draw(st.sampled_from([None, 24, 3 * width])),
        draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "swiglu"])),
        draw(st.sampled_from(["layer", "rms"])),
        draw(st.sampled_from(["learned", "rotary"])),
        bias=draw(st.booleans()),
        tie_weights=draw(st.booleans()),
    )


# --- parameters

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_built_models(name):
    config = PRESETS[name]
    found = total(parameter_count(config))
    assert found == sum(each.numel() for each in built(config).parameters())
    assert found == PUBLISHED.get(name, found)


def test_gpt3_has_its_published_number_of_parameters():
    assert round(total(parameter_count(PRESETS["gpt3"])) / 1e8) == 1746


@given(configurations())
@settings(max_examples=60, deadline=None)
def test_any_configuration_has_the_parameters_of_its_model(config):
    model, parts = built(config), parameter_count(config)
    real = {
        "embedding": model.tokens,
        "positions": model.places or torch.nn.Identity(),
        "attention": torch.nn.ModuleList(each.attention for each in model.blocks),
        "MLP": torch.nn.ModuleList(each.mlp for each in model.blocks),
        "norms": torch.nn.ModuleList(
            [model.norm, *(n for b in model.blocks for n in (b.norm_1, b.norm_2))]
        ),
    }
    for part, module in real.items():
        assert parts[part] == sum(each.numel() for each in module.parameters()), part
    assert total(parts) == sum(each.numel() for each in model.parameters())


# --- operations


def with_attention(model, implementation):
    for block in model.blocks:
        block.attention.implementation = implementation
    return model


def loss_of(model, rows):
    logits = model(rows[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@given(configurations(), st.integers(1, 3), st.integers(1, 20), st.booleans())
@settings(max_examples=25, deadline=None)
def test_flops_are_those_of_torchs_counter(config, batch, time, backward):
    model = with_attention(GPT(config), "plain")
    rows = torch.randint(config.vocab_size, (batch, time + 1))
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model, rows)
        if backward:
            loss.backward()
    assert total(flops(config, time, batch, backward=backward)) == (
        counter.get_total_flops()
    )


@given(configurations(), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_flops_with_a_cache_are_those_of_torchs_counter(config, batch, past, time):
    model = with_attention(GPT(config), "plain").eval()
    caches = model.new_caches(past + time)
    with torch.no_grad():
        model(torch.zeros(batch, past, dtype=torch.long), caches=caches)
        with FlopCounterMode(display=False) as counter:
            model(
                torch.zeros(batch, time, dtype=torch.long),
                caches=caches,
                logits_to_keep=1,
            )
    assert total(flops(config, time, batch, past=past, logits_to_keep=1)) == (
        counter.get_total_flops()
    )


def test_checkpointing_computes_the_blocks_once_more():
    config = GPTConfig(50, 32, 32, 3, 4)
    model = with_attention(GPT(config), "plain")
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, torch.randint(50, (2, 33))).backward()
    counted = total(flops(config, 32, 2, backward=True, checkpointing=True))
    # torch stops once it has what the gradients need: before the last product
    last = 2 * 2 * 32 * 128 * 32 * config.n_layer
    assert counted - last == counter.get_total_flops()


def test_fused_attention_takes_what_torch_counts_for_its_kernels():
    config, shape = GPTConfig(50, 64, 32, 1, 4), (2, 4, 64, 8)
    aten = torch.ops.aten
    back = flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ahead = flop_registry[aten._scaled_dot_product_flash_attention]
    each = [torch.empty(shape, device="meta")] * 4
    expected = ahead(*each[:3], out_val=each[0]) + back(*each, out_val=each[0])
    found = flops(config, 64, 2, backward=True, attention="fused")
    assert found["attention scores"] == expected


def test_gpt3_took_about_its_published_compute():
    found = total(flops(PRESETS["gpt3"], 2048, backward=True)) / 2048 * 300e9
    assert 3.14e23 < found < 1.05 * 3.14e23  # Brown et al. count no scores


# --- bytes; torch's kernel of attention takes heads of fewer than 8 channels apart


def measured_peak(config, batch, time, precision, attention, checkpointing):
    dtype = getattr(torch, precision)
    model = with_attention(GPT(config).to(dtype), attention)
    if checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = torch.randint(config.vocab_size, (batch, time + 1))
    for _ in range(2):
        states = [each for s in optimizer.state.values() for each in s.values()]
        with LiveMemory([*model.parameters(), *states]) as live:
            loss_of(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


@given(
    configurations((512, 2000), least_layers=2, per_head=(8, 16)),
    st.integers(1, 4),
    st.sampled_from([32, 64, 100]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["plain", "fused"]),
)
@settings(max_examples=25, deadline=None)
def test_the_peak_of_a_step_is_counted_within_5_percent(
    config, batch, time, precision, attention
):
    counted = training_memory(config, batch, time, precision, attention=attention).peak
    found = measured_peak(config, batch, time, precision, attention, False)
    assert abs(counted / found - 1) < 0.05


@given(
    configurations((512, 2000), least_layers=2, per_head=(8, 16)),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["plain", "fused"]),
)
@settings(max_examples=12, deadline=None)
def test_so_it_is_with_checkpointing(config, precision, attention):
    options = dict(attention=attention, checkpointing=True)
    counted = training_memory(config, 4, 64, precision, **options).peak
    found = measured_peak(config, 4, 64, precision, attention, True)
    assert abs(counted / found - 1) < 0.1


def saved_bytes(model, rows):
    own = {each.untyped_storage()._cdata for each in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, rows)
    del loss
    return sum(kept.values())


@given(
    configurations((300,), per_head=(8, 16)),
    st.integers(2, 4),
    st.sampled_from(["plain", "fused"]),
)
@settings(max_examples=25, deadline=None)
def test_activations_are_what_autograd_keeps(config, batch, attention):
    model = with_attention(GPT(config), attention)
    found = saved_bytes(model, torch.randint(300, (batch, 65)))
    counted = training_memory(config, batch, 64, attention=attention)
    # of the logits three tables are counted, one of which is kept
    assert abs((counted.activations + counted.logits / 3) / found - 1) < 0.02


def test_what_is_live_is_counted_once_and_freed():
    held = torch.ones(250)
    with LiveMemory([held]) as live:
        assert live.now == 1000
        one = held + 1
        view = one.view(25, 10)[3:]
        assert live.now == 2000
        del one
        assert live.now == 2000
        del view
        assert live.now == 1000 and live.peak == 2000


def test_sixteen_bytes_a_parameter():
    config = PRESETS["gpt2"]
    count = total(parameter_count(config))
    for precision in ("float32", "mixed"):
        found = training_memory(config, 1, 8, precision)
        assert found.weights + found.gradients + found.optimizer == 16 * count
        assert found.total == 16 * count + found.activations + found.logits
    for optimizer, states in {"adamw": 2, "momentum": 1, "sgd": 0}.items():
        found = training_memory(config, 1, 8, optimizer=optimizer)
        assert found.optimizer == 4 * states * count


@given(configurations(), st.integers(1, 3), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_a_cache_has_the_bytes_that_are_counted(config, batch, time):
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config).to(dtype).eval()
        caches = model.new_caches(time)
        with torch.no_grad():
            model(torch.zeros(batch, time, dtype=torch.long), caches=caches)
        found = generation_memory(config, batch, time, dtype)
        assert found["cache"] == sum(each.nbytes for each in caches)
        assert found["weights"] == sum(each.nbytes for each in model.parameters())


# --- roofline and laws


def test_the_roofline_has_its_ridge():
    roof = Roofline("cpu", {"float32": 100.0, "bfloat16": 400.0}, 10.0)
    assert roof.ridge() == 10 and roof.ridge("bfloat16") == 40
    assert roof.attainable(5) == 50 and roof.attainable(50) == 100
    assert roof.attainable(20, "bfloat16") == 200
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed are 'float32'"):
        roof.ridge("int8")


def test_a_measured_roofline_is_of_this_machine():
    roof = measure_roofline("cpu", [torch.float32], seconds=0.05)
    assert list(roof.peak) == ["float32"] and roof.device == "cpu"
    assert roof.peak["float32"] > 1e8 and roof.bandwidth > 1e8


@given(st.floats(0.01, 2), st.floats(0.1, 100), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_power_law_is_found_again(exponent, coefficient, floor):
    x = [10.0**k for k in range(2, 8)]
    y = [floor + coefficient * each**-exponent for each in x]
    assume(min(each - floor for each in y) > 1e-9)
    law = fit_power_law(x, y, floor=floor)
    assert abs(law.exponent.value - exponent) < 1e-4
    assert law.exponent.low <= law.exponent.value <= law.exponent.high
    assert all(math.isclose(law.predict(a), b, rel_tol=1e-3) for a, b in zip(x, y))


def test_its_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    x, inside = [10.0**k for k in range(2, 8)], 0
    for _ in range(400):
        noise = (0.1 * torch.randn(6, generator=generator)).exp().tolist()
        law = fit_power_law(x, [3 * a**-0.3 * e for a, e in zip(x, noise)])
        inside += law.exponent.low <= 0.3 <= law.exponent.high
    assert 0.92 < inside / 400 < 0.98


# --- plans


def test_zero_leaves_on_a_device_what_its_paper_says():
    published = {0: 120, 1: 31.4, 2: 16.6, 3: 1.9}  # GB, figure 1
    for stage, gigabytes in published.items():
        found = total(zero_states(7.5e9, 64, stage)) / 1e9
        assert abs(found - gigabytes) < 0.05


def test_gpt3_needs_its_states_shared():
    found = plan(PRESETS["gpt3"], 64, 80, 300e9)
    assert found.fits and found.sharding == "ZeRO-3 (FSDP)" and found.checkpointing
    assert found.bytes <= found.usable == pytest.approx(72e9)
    assert not plan(PRESETS["gpt3"], 8, 80, 300e9).fits
    assert plan(PRESETS["gpt2"], 8, 80, 300e9).sharding == "none"


@given(
    st.sampled_from(list(PRESETS)),
    st.sampled_from([1, 2, 6, 8, 64, 256]),
    st.sampled_from([16.0, 80.0, 192.0]),
)
@settings(max_examples=60, deadline=None)
def test_plans_add_up(name, devices, memory):
    config = PRESETS[name]
    options = dict(time=min(config.n_positions, 2048), batch_tokens=2**20)
    found = plan(config, devices, memory, 1e11, **options)
    assert found.data * found.tensor * found.pipeline == devices
    assert found.fits == (found.bytes <= found.usable)
    assert found.parts == device_memory(
        config,
        found.micro_batch,
        options["time"],
        data=found.data,
        tensor=found.tensor,
        pipeline=found.pipeline,
        stage=found.stage,
        checkpointing=found.checkpointing,
    )
    assert found.cost == pytest.approx(2.0 * 24 * devices * found.days)
    one = total(
        flops(config, options["time"], backward=True, checkpointing=found.checkpointing)
    )
    assert found.flops == pytest.approx(one * 1e11 / options["time"])
    least = found.flops / (devices * 312e12 * 0.4) / 86_400
    assert found.days >= least * (1 - 1e-9)
    twice = plan(config, devices, memory, 2e11, price=4.0, **options)
    assert twice.days == pytest.approx(2 * found.days)
    assert twice.cost == pytest.approx(4 * found.cost)


def test_with_more_memory_what_fitted_still_fits():
    for name in ("gpt2-xl", "llama-3-8b", "llama-3-70b"):
        fits = [
            plan(PRESETS[name], 8, memory, 1e11, time=2048).fits
            for memory in (8, 16, 40, 80, 192, 400)
        ]
        assert fits == sorted(fits)


def test_stage_3_gathers_the_largest_piece():
    for name, largest in (("gpt2", "head"), ("llama-3-8b", "head"), ("gpt3", "blocks")):
        config = PRESETS[name]
        count = parameter_count(config)
        pieces = {
            "head": config.vocab_size * config.n_embd,
            "blocks": 2 * (count["attention"] + count["MLP"]) // config.n_layer,
        }
        assert max(pieces, key=pieces.get) == largest
        found = device_memory(config, 1, 1024, data=8, stage=3, tensor=2)["gathered"]
        assert found == 2 * pieces[largest] / 2, "two bytes each, on two devices"
        assert device_memory(config, 1, 1024, data=8, stage=2)["gathered"] == 0


def test_a_pipeline_has_the_shortest_bubble_that_the_batch_allows():
    config = PRESETS["gpt3"]
    found = plan(config, 1024, 80, 300e9, batch_tokens=16 * 2048)
    assert found.pipeline > 1 and found.micro_batch == 1
    rounds = 16 // found.data
    assert found.idle == (found.pipeline - 1) / rounds
    work = found.flops / (1024 * 312e12 * 0.4) / 86_400
    assert found.days == pytest.approx(work * (1 + found.idle))
    assert str(f"{found.idle:.2g}") in found.formulas["Days"]
    larger = plan(config, 1024, 80, 300e9, batch_tokens=1024 * 2048)
    assert larger.idle == 0 and larger.days < found.days / 2


def test_the_fewest_texts_that_are_asked_for_suffice():
    config = PRESETS["llama-3.1-405b"]
    with pytest.raises(ValueError) as caught:
        plan(config, 512, 80, 1e12, batch_tokens=config.n_positions)
    least = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    assert least == 32 * config.n_positions
    plan(config, 512, 80, 1e12, batch_tokens=least)


def test_each_number_opens_to_its_formula():
    found = plan(PRESETS["gpt3"], 64, 80, 300e9, price=3.0)
    said = found.explain()
    assert said.count("<details>") == len(found.formulas) >= 11
    assert "174,604,259,328" in found.formulas["Weights on a device"]
    assert "/ 64 devices" in found.formulas["Optimiser on a device"]
    assert f"= {found.days:.3g}" in found.formulas["Days"]
    assert "3 an hour" in found.formulas["Cost"]


def test_the_sliders_of_the_plan_ask_the_plan():
    explorer = plan_explorer("gpt3")
    found = plan(PRESETS["gpt3"], 64, 80, 300e9)
    assert explorer.alt.startswith("gpt3 fits on 64 devices of 80 GB.")
    assert f"{found.days:,.3g} days, {found.cost:,.0f} at 2 a device" in explorer.alt
    for part, size in found.parts.items():
        assert f"{part} {size / 1e9:.3g}" in explorer.alt
    shown = {explorer.picture}
    for moved in ({"utilisation": 0.2}, {"tokens": 30}, {"memory": 192}):
        explorer.set(**moved)
        shown.add(explorer.picture)
    assert len(shown) == 4
    explorer.set(devices=1, memory=16)
    assert explorer.alt.startswith("gpt3 does not fit on 1 device of 16 GB.")
    assert "days" not in explorer.alt
    for preset in PRESETS:
        for devices in (1, 16_384):
            explorer.set(preset=preset, devices=devices)
            assert explorer.error is None
    with pytest.raises(ValueError, match="preset is 'gpt5'; allowed are 'gpt2'"):
        plan_explorer("gpt5")


def test_a_plan_is_a_job_that_answers_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("models/scale", out="out", preset="gpt3", devices=64)
    assert next(iter(done.metrics)) == "verdict"
    assert done.metrics["verdict"].startswith("gpt3 fits on 64 devices of 80 GB")
    assert "exponent_parameters" not in done.metrics, "the lesson is left out"
    assert done.metrics["plan"]["sharding"] == "ZeRO-3 (FSDP)"
    few = run("models/scale", out="few", preset="gpt3", devices=4)
    assert "does not fit on 4 devices" in few.metrics["verdict"]
    assert "64 such devices would do." in few.metrics["verdict"]


# --- what cannot be

SMALL = GPTConfig(50, 32, 32, 2, 4)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: flops(SMALL, 0), "time is 0; allowed is an integer from 1 on"),
        (lambda: flops(SMALL, 8, 1.5), "batch is 1.5; allowed"),
        (lambda: flops(SMALL, 8, past=-1), "past is -1; allowed"),
        (lambda: flops(SMALL, attention="flash"), "attention is 'flash'; allowed are"),
        (lambda: training_memory(SMALL, 0), "batch is 0; allowed"),
        (lambda: training_memory(SMALL, 1, 8, "int8"), "precision is 'int8'; allowed"),
        (
            lambda: training_memory(SMALL, 1, optimizer="lion"),
            "optimizer is 'lion'; allowed are 'adamw', 'momentum', 'sgd'",
        ),
        (lambda: generation_memory(SMALL, -1), "batch is -1; allowed"),
        (lambda: measure_roofline("cpu", seconds=0), "seconds is 0; allowed"),
        (lambda: fit_power_law([1, 2], [1, 2]), "x and y have 2 and 2 values"),
        (lambda: fit_power_law([0, 1, 2], [1, 2, 3]), "x holds 0; allowed"),
        (
            lambda: fit_power_law([1, 2, 3], [1, 2, 3], floor=1),
            "y holds 1; allowed are numbers above floor, 1",
        ),
        (
            lambda: fit_power_law([1, 2, 3], [1, 2, 3], confidence=1),
            "confidence is 1; allowed",
        ),
        (lambda: zero_states(1e9, 8, 4), "stage is 4; allowed are 0, 1, 2, 3"),
        (lambda: zero_states(0, 8, 1), "parameters is 0; allowed"),
        (lambda: device_memory(SMALL, 1, tensor=0), "tensor is 0; allowed"),
        (lambda: plan(SMALL, 0, 80, 1e9), "devices is 0; allowed"),
        (lambda: plan(SMALL, 8, -1, 1e9), "memory is -1; allowed"),
        (lambda: plan(SMALL, 8, 80, math.inf), "tokens is inf; allowed"),
        (lambda: plan(SMALL, 8, 80, 1e9, utilisation=1.2), "utilisation is 1.2"),
        (lambda: plan(SMALL, 8, 80, 1e9, reserve=1), "reserve is 1; allowed"),
        (
            lambda: plan(SMALL, 7, 80, 1e9, batch_tokens=64),
            "batch_tokens is 64, 2 texts for 7 devices; allowed are at least 224",
        ),
    ],
)
def test_what_cannot_be_counted_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_long_texts_are_counted_beyond_the_positions():
    short = replace(SMALL, n_positions=8)
    assert total(flops(short, 64)) == total(flops(SMALL, 64))


# --- what the lesson must find


def expect_scale(m):
    assert all(m["parameters_published"].values()), (
        "each preset has its published number of parameters"
    )
    assert all(m["parameters_built"].values()), "and that of the model when built"
    assert m["parameters"] == 124_439_808, "GPT-2's among them"
    assert m["flops_equal_torch"], "the FLOPs are those of torch's counter"
    assert m["memory_error"] < 0.05, (
        "the bytes of a step are counted within 5 % of what is measured"
    )
    assert m["cache_equal"], "those of the cache exactly"
    assert m["prefill_times_decoding"] > 2, (
        "prefill attains more operations a second than decoding"
    )
    assert m["exponent_parameters"]["low"] > 0, "loss falls with parameters"
    assert m["exponent_tokens"]["low"] > 0, "and with tokens"
    assert m["fits"] and m["plan"]["sharding"] == "none", (
        "GPT-2 fits on each device of 80 GB"
    )
    assert m["plan"]["gigabytes_on_a_device"] <= m["plan"]["gigabytes_usable"], (
        "within what may be filled"
    )


undecided_scale = {}
