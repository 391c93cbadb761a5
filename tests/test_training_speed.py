"""Where the time goes: honest ratios, steps taken apart, settings that compute the same
thing, and a search that leaves everything as it was. No test asserts a time."""

import copy
import math
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.models.language import GPT, GPTConfig
from bigmodel_nb.models.scale import Roofline, flops
from bigmodel_nb.training import speed
from bigmodel_nb.training.objective import supervised
from bigmodel_nb.training.speed import (
    Ratio,
    Settings,
    SlowTexts,
    amdahl,
    checkpoint_blocks,
    compare_settings,
    fastest,
    fuse_optimizer,
    interleaved,
    model_flops,
    peak_memory,
    set_attention,
    step_anatomy,
    utilisation,
)

CONFIG = GPTConfig(50, n_positions=64, n_embd=16, n_layer=2, n_head=2)


@supervised
def objective(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def made(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**CONFIG.__dict__, **changes}))


def texts(batch=3, time=20):
    drawn = torch.randint(50, (batch, time + 1), generator=torch.Generator())
    return drawn[:, :-1], drawn[:, 1:]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


ROWS = torch.randn(12, 4, generator=torch.Generator()), torch.arange(12) % 3


def gradients(model, batch, how=objective):
    model.zero_grad()
    how(model, *batch).backward()
    return [each.grad.clone() for each in model.parameters()]


def everything(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    modes = [each.training for each in model.modules()]
    kinds = [type(each) for each in model.modules()]
    return copy.deepcopy(model.state_dict()), state, modes, kinds, torch.get_rng_state()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# -- ratios --------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=40))
def test_the_interval_is_that_of_the_ranks(ratios):
    from scipy.stats import binom

    found, n = Ratio.of(ratios, [1.0] * len(ratios)), len(ratios)
    left_out = sum(value < found.low for value in ratios)
    assert found.low <= found.value * (1 + 1e-12)
    assert found.value <= found.high * (1 + 1e-12)
    assert 2 * binom.cdf(left_out, n, 0.5) <= 0.05  # so that it covers 95 %
    widest = sorted(ratios)[int(binom.ppf(0.025, n, 0.5)) - 1]
    assert found.low == widest, "and no interval of ranks inside it does"


def test_one_disturbed_round_of_nine_does_not_hide_what_is_faster():
    first, second = [2.0] * 9, [1.0] * 8 + [60.0]
    assert Ratio.of(first, second).verdict == "faster"
    assert Ratio.of(second, first).verdict == "slower"
    assert Ratio.of(first, first).verdict == "not told apart"


def test_programs_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(ways, 6)
    assert "".join(calls) == "ab" + "abba" * 3
    assert [len(each) for each in times.values()] == [6, 6]


@given(st.floats(0, 1), st.floats(0.01, 100), st.floats(0.1, 100))
def test_amdahl_is_the_ratio_of_two_sums(share, speedup, whole):
    part, rest = share * whole, (1 - share) * whole
    assert math.isclose(
        amdahl(share, speedup), whole / (rest + part / speedup), rel_tol=1e-9
    )
    assert amdahl(share, speedup) <= amdahl(share) * (1 + 1e-12)


# -- work and its share of the peak --------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 1},
        {"activation": "swiglu", "norm": "rms", "positions": "rotary", "bias": False},
        {"tie_weights": False},
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 20), (2, 64)])
def test_flops_are_those_of_the_closed_form(changes, size):
    model = made(**changes)
    counted = sum(flops(model.config, size[1], size[0], backward=True).values())
    assert model_flops(model, texts(*size), objective) == counted
    set_attention(model, "fused")
    checkpoint_blocks(model)
    assert model_flops(model, texts(*size), objective) == counted, (
        "what a setting adds is no work of the model"
    )


def test_utilisation_is_a_share_of_the_peak_of_its_type():
    roof = Roofline("cpu", {"float32": 100.0, "bfloat16": 400.0}, 1.0)
    assert utilisation(50, 1.0, roof) == 0.5
    assert utilisation(50, 0.5, roof, "bfloat16") == 0.25


# -- a step taken apart --------------------------------------------------------------


def test_the_parts_of_a_step_are_the_whole_and_nothing_is_changed():
    model = made(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradients(model, texts())
    optimizer.step()
    before = everything(model, optimizer)
    found = step_anatomy(model, texts(), objective, optimizer, steps=2)
    assert same(before, everything(model, optimizer))
    assert set(found.phases) == set(speed.PHASES) == set(found.kinds.columns)
    assert math.isclose(found.kinds.to_numpy().sum(), 1.0, rel_tol=1e-9)
    assert math.isclose(sum(map(found.share, speed.PHASES)), 1.0, rel_tol=1e-9)
    products = found.kinds.loc["matrix products"]
    assert products["forward"] > 0 and products["backward"] > 0
    assert products["optimizer"] == products["data"] == 0
    assert found.calls > 100


def test_waiting_for_data_is_found():
    rows = torch.randint(50, (8, 9))
    loader = torch.utils.data.DataLoader(SlowTexts(rows, seconds=0.1), batch_size=4)
    found = step_anatomy(made(), loader, objective, steps=2)
    assert max(found.phases, key=found.phases.get) == "data"
    assert found.phases["data"] >= 0.4


# -- settings compute the same thing -------------------------------------------------


def test_checkpointing_gives_the_same_gradients_and_is_undone():
    model, batch = made(dropout=0.2), texts()
    names, kinds = list(model.state_dict()), [type(each) for each in model.modules()]
    torch.manual_seed(1)
    plain = gradients(model, batch)
    assert checkpoint_blocks(model) == 2
    assert checkpoint_blocks(model) == 0, "once is enough"
    torch.manual_seed(1)
    assert same(plain, gradients(model, batch)), "dropout draws the same again"
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].mlp.down.weight.zero_()
    torch.manual_seed(1)
    assert same(plain, gradients(model, batch)), "a copy is a model of its own"
    assert checkpoint_blocks(model, False) == 2
    assert [type(each) for each in model.modules()] == kinds


def test_checkpointing_saves_memory_and_the_plain_formula_takes_a_square():
    model = made(n_layer=4)

    def peak(time, **how):
        return peak_memory(model, texts(2, time), objective, settings=Settings(**how))

    assert peak(64, checkpointing=True) < peak(64)
    bends = {}
    for attention in ("plain", "fused"):
        a, b, c = (peak(time, attention=attention) for time in (16, 32, 64))
        bends[attention] = (c - b) / (b - a)
    assert bends["fused"] == pytest.approx(2, abs=0.2)
    assert bends["plain"] > bends["fused"] + 0.2


def test_a_fused_optimizer_goes_on_where_the_plain_one_was():
    models = [made(), made()]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in models]
    for turn in range(4):
        if turn == 2:
            fuse_optimizer(optimizers[1])
        for model, optimizer in zip(models, optimizers):
            gradients(model, texts())
            optimizer.step()
    assert optimizers[1].param_groups[0]["fused"] is True
    for one, other in zip(*(each.parameters() for each in models)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_settings_go_into_the_loop():
    from bigmodel_nb.training.loop import fit

    how = Settings("bfloat16", "plain", fused=True, checkpointing=True)
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert how.apply(model, optimizer) is model
    history = fit(
        model,
        [texts()] * 8,
        epochs=1,
        optimizer=optimizer,
        objective=objective,
        device="cpu",
        **how.fit,
    )
    assert history.precision == "bfloat16"
    assert history.batch_losses[-1] < history.batch_losses[0]


def test_each_setting_is_within_its_bound():
    changes = [
        Settings(precision="bfloat16"),
        Settings(attention="plain"),
        Settings(attention="fused"),
        Settings(fused=True),
        Settings(checkpointing=True),
    ]
    model = made()
    base, *found = compare_settings(model, texts(), changes, objective, rounds=6)
    assert base.error == 0 and base.ratio is None and base.settings == Settings()
    assert [each.settings for each in found] == changes
    for each in found:
        assert each.error <= speed.BOUNDS[each.settings.precision]
        if each is found[0] and each.ratio is None:  # where bfloat16 is not native
            assert not each.kept and each.why.startswith("slower: a pass takes")
            continue
        assert each.memory > 0 and each.ratio.n == 6
    assert 1e-4 < found[0].error, "bfloat16 was in force"
    assert found[4].error == 0 and found[4].memory < base.memory


def test_what_a_model_lacks_gets_a_row_that_says_so():
    model = classifier()
    optimizer = torch.optim.Rprop(model.parameters())
    changes = [
        Settings(attention="plain"),
        Settings(checkpointing=True),
        Settings(fused=True),
    ]
    base, *found = compare_settings(model, ROWS, changes, optimizer=optimizer, rounds=6)
    assert [each.ratio for each in found] == [None] * 3
    assert not any(each.kept for each in found)
    assert "no attention" in found[0].why and "ModuleList" in found[1].why
    assert "Rprop" in found[2].why


class Crawl(nn.Module):
    "In bfloat16 each pass takes its time, or the first alone, which is cold."

    def __init__(self, cold: bool):
        super().__init__()
        self.inner, self.cold, self.passes = nn.Linear(8, 4), cold, 0

    def forward(self, x):
        y, self.passes = self.inner(x), self.passes + 1
        if y.dtype == torch.bfloat16 and (self.passes == 1 or not self.cold):
            Crawl.crawled += 1
            time.sleep(0.5)
        return y.float()


@pytest.mark.parametrize("cold", [False, True])
def test_hopeless_settings_are_given_up_at_once_and_cold_ones_are_not(cold):
    Crawl.crawled, rows = 0, (torch.randn(16, 8), torch.randint(4, (16,)))
    changes = [Settings(precision="bfloat16"), Settings(fused=True)]
    _, bf16, fused = compare_settings(Crawl(cold), rows, changes, rounds=30)
    assert fused.ratio.n == 30, "the others go on"
    if cold:
        assert Crawl.crawled == 1 and bf16.ratio.n == 30 and bf16.memory > 0
        return
    assert Crawl.crawled == 2, "two passes and no step"
    assert (bf16.ratio, bf16.memory, bf16.kept) == (None, None, False)
    assert bf16.error < 0.1 and re.search(r"slower: .* \d+ times as long", bf16.why)


def test_the_search_does_not_return_to_what_was_hopeless():
    Crawl.crawled, rows = 0, (torch.randn(16, 8), torch.randint(4, (16,)))
    found = fastest(Crawl(False), rows, rounds=6)
    assert Crawl.crawled == 2 and found.settings.precision == "float32"
    assert [each.change for each in found.trials].count("precision: bfloat16") == 1


# -- the search ----------------------------------------------------------------------


def priced(monkeypatch, price):
    "Times are made up: `price(settings)` seconds, the same in each round."

    def made_up(ways, rounds, device):
        return {how: [price(how)] * rounds for how in ways}

    monkeypatch.setattr(speed, "interleaved", made_up)


def test_the_search_leaves_everything_as_it_was():
    model = made(dropout=0.1)
    model.blocks[0].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradients(model, texts())
    optimizer.step()
    before = everything(model, optimizer)
    kept = [each.grad.clone() for each in model.parameters()]
    found = fastest(model, texts(), objective, optimizer, rounds=6)
    assert same(before, everything(model, optimizer))
    assert same(kept, [each.grad for each in model.parameters()])
    assert len(found.table) == len(found.trials) >= 5


def test_levers_are_kept_where_they_pay(monkeypatch):
    priced(monkeypatch, lambda how: 1 - 0.3 * how.fused + 0.2 * how.checkpointing)
    found = fastest(made(), texts(), objective)
    assert found.settings == Settings(fused=True)
    assert found.gain.value == pytest.approx(1 / 0.7)
    assert [each.change for each in found.trials if each.kept] == ["fused: on"]


def test_a_lever_that_only_pays_after_another_is_tried_again(monkeypatch):
    def price(how):
        short, plain = how.precision == "bfloat16", how.attention == "plain"
        return {(0, 0): 1.0, (1, 0): 1.2, (0, 1): 0.9, (1, 1): 0.5}[short, plain]

    priced(monkeypatch, price)
    found = fastest(made(), texts(), objective)
    assert found.settings == Settings("bfloat16", "plain")
    assert found.gain.value == pytest.approx(2)


def test_a_gain_that_fresh_rounds_do_not_confirm_is_given_back(monkeypatch):
    rounds = iter([0.5, 1.0])  # fast when it is chosen, and no longer after

    def lucky(ways, rounds_, device):
        other = next(rounds)
        return {how: [other if how.fused else 1.0] * rounds_ for how in ways}

    monkeypatch.setattr(speed, "interleaved", lucky)
    found = fastest(made(), texts(), objective, levers=["fused"])
    assert found.settings == Settings()
    assert "not confirmed" in found.trials[0].why and not found.trials[0].kept


def test_a_fast_setting_that_computes_something_else_is_not_kept(monkeypatch):
    priced(monkeypatch, lambda how: 0.1 if how.precision == "bfloat16" else 1.0)
    monkeypatch.setitem(speed.BOUNDS, "bfloat16", 1e-9)
    found = fastest(made(), texts(), objective, levers=["precision"])
    assert found.settings == Settings()
    assert "gradient" in found.trials[0].why


@pytest.mark.parametrize("limit, kept", [(1, True), (1e12, False), (None, False)])
def test_checkpointing_is_kept_where_memory_is_short(limit, kept, monkeypatch):
    priced(monkeypatch, lambda how: 1 + how.checkpointing)
    found = fastest(made(), texts(), objective, levers=["checkpointing"], memory=limit)
    assert found.settings.checkpointing is kept
    start, end = found.memory
    assert (end < start) is kept


# -- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Ratio.of([1.0] * 5, [1.0] * 5), "5 and 5 rounds"),
        (lambda: Ratio.of([1.0] * 6, [1.0] * 7), "6 and 7 rounds"),
        (lambda: Ratio.of([1.0] * 6, [0.0] * 6), "not above 0"),
        (lambda: interleaved({"a": int}, 5), "rounds is 5"),
        (lambda: interleaved({"a": int}, True), "rounds is True"),
        (lambda: amdahl(1.1), "share is 1.1"),
        (lambda: amdahl(0.5, 0), "speedup is 0"),
        (lambda: utilisation(0, 1, Roofline("cpu", {}, 1)), "flops is 0"),
        (lambda: utilisation(1, math.nan, Roofline("cpu", {}, 1)), "seconds is nan"),
        (lambda: utilisation(1, 1, Roofline("cpu", {"x": 1}, 1)), "dtype is 'float32'"),
        (lambda: set_attention(made(), "sdpa"), "implementation is 'sdpa'"),
        (lambda: fuse_optimizer(torch.optim.Rprop(made().parameters())), "Rprop"),
        (lambda: Settings(attention="plain").apply(classifier()), "no attention"),
        (lambda: Settings(checkpointing=True).apply(classifier()), "no ModuleList"),
        (lambda: step_anatomy(classifier(), []), "gave no batch"),
        (lambda: step_anatomy(classifier(), [3]), "batch is a int"),
        (lambda: step_anatomy(classifier(), ROWS, steps=0), "steps is 0"),
        (lambda: step_anatomy(classifier(), ROWS, objective=3), "objective is 3"),
        (lambda: model_flops(classifier(), ROWS[0]), "batch is a Tensor"),
        (lambda: fastest(classifier(), ROWS, rounds=3), "rounds is 3"),
        (lambda: fastest(classifier(), ROWS, levers="precision"), "levers is"),
        (lambda: fastest(classifier(), ROWS, levers=["speed"]), "levers is"),
        (lambda: fastest(classifier(), ROWS, memory=0), "memory is 0"),
        (
            lambda: fastest(
                classifier(), ROWS, optimizer=torch.optim.SGD(made().parameters())
            ),
            "optimizer has no parameter of model",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -- the lesson ----------------------------------------------------------------------


def expect_speed(m):
    assert m["flops"] == m["flops_closed_form"] == m["flops_torch"], (
        "three counts of the FLOPs of a step agree"
    )
    errors, memory = m["gradient_errors"], m["memory"]
    assert errors["checkpointing: on"] <= 1e-6, "recomputed gradients are equal"
    assert errors["attention: plain"] < 1e-4, "the formula is the kernel"
    assert errors["precision: bfloat16"] < 0.1, "bfloat16 rounds within its bound"
    assert memory["checkpointing: on"] < 0.8 * memory["none"], "and saves memory"
    peaks, growth = m["context_megabytes"], m["context_growth"]
    assert peaks["plain attention"][-1] > 2 * peaks["fused attention"][-1]
    assert growth["plain attention"] > 3 > 2.3 > growth["fused attention"], (
        "a square against a line"
    )
    assert math.isclose(sum(m["kinds_speed"].values()), 1, rel_tol=1e-6)
    assert m["kinds_speed"]["matrix products"] > 0.1, "products are a large part"
    same_step = m["same_step_speed"]
    assert same_step["low"] <= 1.5 and same_step["high"] >= 0.67, (
        "a step is about as fast as itself"
    )
    assert 0 < m["fetching_speed"] < 1
    known = {"precision", "attention", "fused", "checkpointing", "compiled"}
    assert {each.split(":")[0] for each in m["chosen_speed"]} <= known
