"""Chapter 0: what is stored comes back bit for bit, or is not there at all."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter, OrderedDict, deque, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from torch import nn

from bigmodel_nb.kit import store
from bigmodel_nb.kit.store import (
    Checkpoints,
    Damaged,
    load_tree,
    new_content,
    save_tree,
)


def write(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)


def held(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_new_content_takes_the_place_of_the_old(tmp_path):
    folder = tmp_path / "a" / "b"
    for text in ("one", "two"):
        with new_content(folder, "marker", "a thing", ["README"]) as new:
            write(new, marker=text, other=text)
            before = held(folder) if text == "two" else {}
            assert before in ({}, dict.fromkeys(["marker", "other", "README"], "one"))
        assert held(folder) == {"marker": text, "other": text}
        write(folder, README="one")  # may stand there, and goes
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_new_content_that_fails_leaves_the_old(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    for there in (False, True):
        if there:
            folder.mkdir()
            write(folder, marker="old")
        with pytest.raises(OSError, match="full"):
            with new_content(folder, "marker", "a thing") as new:
                write(new, marker="half")
                raise OSError("full")
        assert [path.name for path in tmp_path.iterdir()] == ["kept"] * there
    rename, calls = os.rename, []

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("no")
        rename(*paths)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        with new_content(folder, "marker", "a thing") as new:
            write(new, marker="new")
    assert held(folder) == {"marker": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_new_content_never_takes_what_is_not_its_own(tmp_path):
    write(tmp_path, notes="mine")
    entered = []
    for place in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ValueError, match="holds something else; allowed is a new"):
            with new_content(place, "marker", "a thing"):
                entered.append(place)
    assert not entered, "which is said before anything is written"
    write(tmp_path, marker="old")
    with pytest.raises(ValueError, match="which holds 'notes' beside a thing"):
        with new_content(tmp_path, "marker", "a thing") as new:
            write(new, marker="new")
    assert held(tmp_path) == {"marker": "old", "notes": "mine"}
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_content(tmp_path / "link", "marker", "a thing") as new:
        write(new, marker="new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").is_dir()


KEPT_TYPES = [
    getattr(torch, name)
    for name in (
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16"
        " float32 float64 complex64 complex128 float8_e4m3fn float8_e4m3fnuz"
        " float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
    ).split()
]


def expect_store(m):
    assert m["json_keeps"] < m["entries"] == m["store_keeps"], (
        "JSON changes entries; the store gives each back"
    )
    assert m["lost_by_overwriting"] > 50 and m["lost_by_renaming"] == 0, (
        "a kill while overwriting loses both states; renaming never"
    )
    assert m["step_taken"] == 10, "the checkpoint before the damaged one is taken"
    assert m["difference_to_safetensors"] == 0, "the library reads the same weights"
    assert m["unnoticed_by_store"] == 0, "no flipped bit goes by"


def same(first, second):
    """Alike in type, in order and in every bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and raw(first) == raw(second)
        )
    if isinstance(first, (np.ndarray, np.generic)):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.tobytes() == second.tobytes()
        )
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second)
    if isinstance(first, complex):
        return same(first.real, second.real) and same(first.imag, second.imag)
    if isinstance(first, dict):
        return len(first) == len(second) and all(
            same(*pair) for pair in zip(first.items(), second.items())
        )
    if isinstance(first, deque) and first.maxlen != second.maxlen:
        return False
    if isinstance(first, (list, tuple, deque)):
        return len(first) == len(second) and all(
            same(*pair) for pair in zip(first, second)
        )
    return first == second


def raw(tensor):
    if not tensor.numel():
        return b""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def there_and_back(folder, tree):
    place = folder / f"tree-{random.getrandbits(60)}"
    save_tree(place, tree)
    try:
        return load_tree(place)
    finally:
        shutil.rmtree(place)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(60, 9_000).map(lambda bits: 1 - 2**bits)
    | st.floats(width=64)
    | st.sampled_from([-0.0, math.nan, -math.nan, math.inf, -math.inf, 5e-324])
    | st.complex_numbers(allow_nan=True)
    | st.text(st.characters(exclude_categories=[]))  # lone surrogates too
    | st.binary()
)
NUMPY = hnp.arrays(
    hnp.scalar_dtypes(),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


def tensor_of(dtype, shape, seed):
    """Any bits, of a shape; for bool those that it can have."""
    draw = np.random.default_rng(seed)
    high = 2 if dtype == torch.bool else 256
    bits = draw.integers(0, high, math.prod(shape) * dtype.itemsize, np.uint8)
    bits = torch.from_numpy(bits)
    return (bits.view(dtype) if len(bits) else bits.to(dtype)).reshape(shape)


TENSORS = st.builds(
    tensor_of,
    st.sampled_from(KEPT_TYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 1000),
)
KEYS = st.recursive(
    SCALARS.filter(lambda each: each == each),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
LEAVES = (
    SCALARS
    | NUMPY
    | NUMPY.filter(lambda each: each.size).map(lambda each: each.reshape(-1)[0])
    | TENSORS
    | st.sampled_from(KEPT_TYPES)
    | st.lists(st.floats(), min_size=64, max_size=70)
    | st.builds(Counter, st.text(max_size=5))
    | st.sets(KEYS, max_size=3)
    | st.frozensets(KEYS, max_size=3)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
        | st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 3, 5]))
    ),
    max_leaves=12,
)


@given(tree=TREES)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_tree_comes_back_bit_for_bit(tmp_path, tree):
    back = there_and_back(tmp_path, tree)
    assert same(tree, back) or repr_of_sets(tree) == repr_of_sets(back)


def repr_of_sets(tree):
    """For trees in which sets stand: these compare by their members."""
    if isinstance(tree, (set, frozenset)):
        return type(tree).__name__, sorted(map(repr, tree))
    if isinstance(tree, dict):
        return (
            type(tree).__name__,
            [(repr(k), repr_of_sets(v)) for k, v in tree.items()],
        )
    if isinstance(tree, (list, tuple, deque)):
        return type(tree).__name__, [repr_of_sets(item) for item in tree]
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tree.shape, raw(tree)
    if isinstance(tree, (np.ndarray, np.generic)):
        return tree.dtype, tree.shape, tree.tobytes()
    return repr(tree)


def test_every_type_of_torch_is_kept(tmp_path):
    torch.manual_seed(0)
    for dtype in KEPT_TYPES:
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 3, 16))
        tensor = bits.to(torch.uint8).view(dtype)
        pair = [tensor, tensor.reshape(-1)[0], tensor[:0]]
        assert same(pair, there_and_back(tmp_path, pair)), dtype


def test_empty_tensors_of_any_origin(tmp_path):
    empty = [torch.from_numpy(np.empty(0)), torch.empty(0, 3).T, torch.empty(2, 0)]
    assert same(empty, there_and_back(tmp_path, empty))


def test_views_are_kept_by_value(tmp_path):
    base = torch.randn(4, 6, dtype=torch.complex64)
    views = [
        base.T,
        base[:, ::2],
        base[1:, 2:],
        base.conj(),
        base.imag,
        base.expand(2, 4, 6),
    ]
    back = there_and_back(tmp_path, views)
    assert same(views, back)
    assert all(view.is_contiguous() for view in back)


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 50, bias=False))
    model[1].weight = model[0].weight
    save_tree(tmp_path / "tied", model.state_dict())
    size = (tmp_path / "tied" / "tensors.safetensors").stat().st_size
    assert size < 1.2 * 50 * 40 * 4
    back = load_tree(tmp_path / "tied")
    assert back["0.weight"].data_ptr() == back["1.weight"].data_ptr()
    overlapping = torch.arange(6.0)
    first, second = there_and_back(tmp_path, [overlapping[:4], overlapping[2:]])
    assert same(first, overlapping[:4]) and same(second, overlapping[2:])
    # equal places, other meaning: a view as another type, a conjugate
    twice = [overlapping, overlapping.view(torch.int32), overlapping.view(2, 3)]
    assert same(twice, there_and_back(tmp_path, twice))


def test_the_state_of_a_model_with_its_versions(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    back = there_and_back(tmp_path, model.state_dict())
    assert isinstance(back, OrderedDict)
    assert back._metadata == model.state_dict()._metadata
    assert back._metadata["1"]["version"] == 2
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    other.load_state_dict(back)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    parameter = there_and_back(tmp_path, [nn.Parameter(torch.ones(2))])[0]
    assert type(parameter) is torch.Tensor and not parameter.requires_grad


def test_random_states_go_on_where_they_were(tmp_path):
    generator = np.random.default_rng(3)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    draw = lambda: (
        random.random(),
        np.random.rand(),
        generator.random(),
        torch.rand(1).item(),
    )
    first = draw()
    back = there_and_back(tmp_path, states)
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    generator.bit_generator.state = back["generator"]
    torch.set_rng_state(back["torch"])
    assert draw() == first


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "RMSprop", "LBFGS"])
def test_the_state_of_an_optimizer(tmp_path, name):
    model = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state_dict()
    assert same(state, there_and_back(tmp_path, state))


def test_the_library_reads_the_tensors(tmp_path):
    tree = {"model": {"weight": torch.randn(3, 5)}, "odd": torch.ones(1).bool()}
    save_tree(tmp_path / "one", tree)
    with safe_open(tmp_path / "one" / "tensors.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["state.model.weight", "state.odd"]
        assert same(file.get_tensor("state.model.weight"), tree["model"]["weight"])
    json.loads((tmp_path / "one" / "state.json").read_text())


def test_names_that_collide(tmp_path):
    one, two, three = torch.zeros(1), torch.ones(2), torch.ones(3)
    tree = {"a.b": one, "a": {"b": two}, ("a", "b"): three, "1": one + 1, 1: two + 1}
    assert same(tree, there_and_back(tmp_path, tree))
    assert same({"__metadata__": one}, there_and_back(tmp_path, {"__metadata__": one}))
    assert same({"\udc80\0": one}, there_and_back(tmp_path, {"\udc80\0": one}))


def test_integers_longer_than_python_prints(tmp_path):
    """More than the 4,300 digits that `str` allows, as values and as keys."""
    huge = 3**30_000
    tree = {huge: torch.ones(2), "n": [huge, -huge]}
    assert same(tree, there_and_back(tmp_path, tree))
    with pytest.raises(TypeError, match="is a function"):
        save_tree(tmp_path / "one", {huge: lambda: 1})


def test_what_looks_like_our_own_marks(tmp_path):
    for tree in [{"tensor": "state"}, {"int": "0x1"}, [{"dict": []}], {"tuple": [1]}]:
        assert same(tree, there_and_back(tmp_path, tree))


Point = namedtuple("Point", "x y")


class Mine(dict):
    pass


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"scheduler": {"fn": lambda step: 1}},
            "state['scheduler']['fn'] is a function",
        ),
        ([1, [2, print]], "state[1][1] is a builtin_function_or_method"),
        (object(), "state is an object"),
        ({"p": Point(1, 2)}, "state['p'] is a Point"),
        ({"m": Mine()}, "state['m'] is a Mine"),
        ({3: {"model": nn.Linear(1, 1)}}, "state[3]['model'] is a Linear"),
        ({"s": torch.eye(2).to_sparse()}, "state['s'] is a sparse"),
        (
            {"s": torch.ones(2, device="meta")},
            "state['s'] is a tensor on the device meta",
        ),
        ({"a": np.array([None, 1])}, "state['a'] is a ndarray of object"),
        (
            {"a": np.zeros(2, [("x", "f4")])},
            "state['a'] is a ndarray of [('x', '<f4')]",
        ),
        ({"a": np.ma.array([1, 2])}, "state['a'] is a MaskedArray"),
        ({"path": Path("x")}, "state['path'] is a PosixPath"),
        ({"signal": signal.SIGTERM}, "state['signal'] is a Signals"),
        ({(1, Mine): 2}, "is a type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "tree",
)
def test_what_cannot_be_held_is_named_by_its_place(tmp_path, tree, said):
    with pytest.raises(TypeError) as caught:
        save_tree(tmp_path / "one", tree)
    assert said in str(caught.value).replace("WindowsPath", "PosixPath")
    assert "a checkpoint can hold numbers" in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    tree = []
    tree.append(tree)
    with pytest.raises(ValueError, match="nested too deeply, or holds itself"):
        save_tree(tmp_path / "one", tree)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused(tmp_path):
    save_tree(tmp_path / "one", 1)
    with pytest.raises(FileExistsError, match="allowed is a new one"):
        save_tree(tmp_path / "one", 2)
    assert load_tree(tmp_path / "one") == 1
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_tree(tmp_path / "two")


def test_loading_puts_tensors_on_a_device_and_arrays_nowhere(tmp_path):
    tree = {"w": torch.ones(2), "a": np.ones(2), "losses": [0.5] * 99}
    save_tree(tmp_path / "one", tree)
    back = load_tree(tmp_path / "one", device="meta")
    assert back["w"].is_meta and back["a"].tolist() == [1, 1]
    assert back["losses"] == tree["losses"]
    back["a"][0] = 2  # it may be written to


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "one"
    save_tree(folder, {"w": torch.randn(20), "step": 3, "pi": 3.14, "text": "e\u0301"})
    return folder


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_damage_is_noticed_and_its_file_named(tmp_path, whole, data):
    copied = tmp_path / "one"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(whole, copied)
    file = copied / data.draw(st.sampled_from(["state.json", "tensors.safetensors"]))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "more", "zeros", "gone", "other"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[place:]
    elif how == "more":
        content += bytes([data.draw(st.integers(0, 255))])
    elif how == "zeros":  # what a file system leaves after the power failed
        end = min(len(content), place + 16)
        if not any(content[place:end]):
            return
        content[place:end] = bytes(end - place)
    file.write_bytes(content)
    if how == "gone":
        file.unlink()
    elif how == "other":  # whole, and of another checkpoint
        save_tree(tmp_path / "other", {"w": torch.zeros(20)})
        other = tmp_path / "other" / file.name
        if file.name == "state.json":
            file.write_bytes(other.read_bytes())
            file = copied / "tensors.safetensors"
        else:
            file.write_bytes(other.read_bytes())
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(Damaged) as caught:
        load_tree(copied)
    assert str(file) in str(caught.value)


def test_a_later_format_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_FORMAT", "bigmodel_nb store 9")
    save_tree(tmp_path / "one", 1)
    monkeypatch.undo()
    with pytest.raises(Damaged, match="store 9.*this version reads"):
        load_tree(tmp_path / "one")


def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    assert checkpoints.newest() is None and checkpoints.steps() == []
    for step in (1, 5, 9):
        checkpoints.save(step, {"step": step})
    assert checkpoints.newest() == (9, {"step": 9})
    file = tmp_path / "run" / "step-00000009" / "state.json"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="step-00000009/state.json is damaged"):
        assert checkpoints.newest() == (5, {"step": 5})
    checkpoints.save(6, {"step": 6})
    assert checkpoints.steps() == [1, 5, 6], "the damaged one is gone, three stay"
    for step in (1, 5, 6):
        shutil.rmtree(tmp_path / "run" / f"step-{step:08d}")
        (tmp_path / "run" / f"step-{step:08d}").mkdir()
    with pytest.warns(UserWarning) as told:
        assert checkpoints.newest() is None
    assert len(told) == 3 and "is missing" in str(told[0].message)


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, 5)
    (tmp_path / "step-00000012").mkdir()  # damaged, and newer
    with pytest.warns(UserWarning, match="passed over"):
        checkpoints.newest()
    checkpoints.save(6, 6)
    assert checkpoints.steps() == [6]
    (tmp_path / "step-00000012").mkdir()
    unaware = Checkpoints(tmp_path, keep=1)
    unaware.save(7, 7)  # what was just saved stays, whatever is newer
    with pytest.warns(UserWarning):
        assert unaware.newest() == (7, 7)


@given(
    steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=7, unique=True),
    keep=st.integers(1, 4),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_pruning_keeps_the_newest(tmp_path, steps, keep):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, keep=keep)
    steps.sort()
    for step in steps:
        checkpoints.save(step, step)
    assert checkpoints.steps() == steps[-keep:]
    assert checkpoints.newest() == (steps[-1], steps[-1])
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        *(f"step-{step:08d}" for step in steps[-keep:]),
    }
    checkpoints.save(steps[-1], "again")
    assert checkpoints.newest() == (steps[-1], "again")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": 0}, "keep is 0; allowed is a whole number of at least 1"),
        ({"keep": True}, "keep is True"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": None}, "keep is None"),
    ],
)
def test_bad_arguments(tmp_path, arguments, said):
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path / "run", **arguments)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [-1, 1.0, "3", True, None])
def test_bad_steps(tmp_path, step):
    with pytest.raises(ValueError, match="step is .*whole number of at least 0"):
        Checkpoints(tmp_path).save(step, {})


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex; allowed is a folder of"):
        Checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="a file; allowed is a folder"):
        Checkpoints(tmp_path / "thesis.tex")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "step-00000001").write_text("a file of that name")
    with pytest.raises(ValueError, match="holds step-00000001"):
        Checkpoints(tmp_path / "other")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").touch()
    Checkpoints(tmp_path / "hidden").save(1, 1)
    assert Checkpoints(tmp_path / "hidden" / "new" / "deep").steps() == []


def test_the_folder_stays_the_same_when_the_program_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save(1, 1)
    assert (tmp_path / "run" / "step-00000001").is_dir()


# A full disk


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("after", range(5))
def test_a_full_disk_leaves_the_last_whole_checkpoint(
    tmp_path, monkeypatch, call, after
):
    checkpoints = Checkpoints(tmp_path / "run")
    calls, real = [], getattr(os, call)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    for step in (3, 7):
        checkpoints.save(step, {"step": step, "w": torch.ones(9)})
    monkeypatch.setattr(os, call, full)
    try:
        checkpoints.save(8, {"step": 8, "w": torch.ones(9)})
        whole = 8
    except OSError as error:
        assert error.errno == errno.ENOSPC
        assert "No space left" in str(error) and str(tmp_path / "run") in str(error)
        assert "step 8 was not saved" in str(error)
        # the last fsync is of the folder, once the checkpoint stands in it
        whole = 8 if "whole checkpoint there: step 8" in str(error) else 7
        assert f"last whole checkpoint there: step {whole}" in str(error)
    monkeypatch.undo()
    assert checkpoints.newest()[0] == whole
    assert all(name.startswith("step-") for name in visible(tmp_path / "run")) or (
        call == "rename"
    )
    checkpoints.save(9, {"step": 9})
    assert checkpoints.steps()[-1] == 9 and len(visible(tmp_path / "run")) == 2


def test_a_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="whole checkpoint there: none"):
        checkpoints.save(0, 1)
    with pytest.raises(OSError, match="No space"):
        save_tree(tmp_path / "tree", 1)
    assert visible(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
@pytest.mark.parametrize("bytes_allowed", [0, 1, 300, 5_000, 39_000])
def test_a_write_that_stops_midway(tmp_path, bytes_allowed):
    """The system itself refuses to write beyond a length, as on a disk that is full."""
    done = run_script(
        f"""
        import resource, signal, torch
        from bigmodel_nb.kit.store import Checkpoints
        checkpoints = Checkpoints({str(tmp_path / "run")!r})
        checkpoints.save(1, {{"w": torch.ones(10_000)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed}, -1))
        try:
            checkpoints.save(2, {{"w": torch.ones(10_000)}})
        except OSError as error:
            print(error)
        """
    )
    assert "step 2 was not saved" in done and "there: step 1" in done
    assert visible(tmp_path / "run") == ["step-00000001"]
    assert Checkpoints(tmp_path / "run").newest()[0] == 1


def test_ctrl_c_while_saving_leaves_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, 1)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, 2)
    assert visible(tmp_path) == ["step-00000001"]


# Kills

SCRIPT = """
import sys, torch
from bigmodel_nb.kit.store import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
found = checkpoints.newest()
step = found[0] if found else 0
with checkpoints.locked():
    print("ready", flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"step": step, "w": torch.full((30_000,), float(step))})
"""


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run_script(text, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(folder):
    """A process that saves checkpoints without end, and has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def loads_whole(folder):
    """Every checkpoint that is there, read with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints = Checkpoints(folder)
        for step in checkpoints.steps():
            tree = load_tree(folder / f"step-{step:08d}")
            assert tree["step"] == step and (tree["w"] == step).all()
        return checkpoints.steps()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_anywhere_while_saving(tmp_path):
    """A hundred kills: each leaves whole checkpoints only, none older."""
    context, before = multiprocessing.get_context("fork"), 0
    draw = random.Random(0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    began = time.perf_counter()
    for step in range(5):
        w = torch.full((30_000,), float(step))
        checkpoints.save(step, {"step": step, "w": w})
    takes = (time.perf_counter() - began) / 5

    def work(step, pipe):
        torch.set_num_threads(1)
        with Checkpoints(tmp_path, keep=2).locked() as mine:
            pipe.send("ready")
            while True:
                step += 1
                w = torch.full((30_000,), float(step))
                mine.save(step, {"step": step, "w": w})

    for _ in range(100):
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(before, theirs))
        child.start()
        assert ours.recv() == "ready"
        time.sleep(draw.random() * 3 * takes)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        steps = loads_whole(tmp_path)
        assert not before or steps and steps[-1] >= before
        saved = (steps[-1] if steps else 0) - before
        takes *= 1.2 if not saved else 0.9 if saved > 3 else 1  # a machine gets busy
        before += saved
    assert before > 30, "many were saved"
    checkpoints.save(before + 1, {"step": before + 1})
    assert len(visible(tmp_path)) == 2, "what the dead left is gone"


def test_killed_process_restarts_in_its_folder(tmp_path):
    before = 0
    for _ in range(3):
        process = started(tmp_path)
        end = time.monotonic() + 60
        while time.monotonic() < end and Checkpoints(tmp_path).steps()[-1:] <= [before]:
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
        process.wait()
        steps = loads_whole(tmp_path)
        assert steps[-1] > before
        before = steps[-1]


def test_leftovers_of_a_dead_process_go_at_the_next_save(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = tmp_path / f".tree.{host}.{dead.pid}.0123abcd.tmp"
    alive = tmp_path / f".tree.{host}.{os.getppid()}.0123abcd.tmp"
    afar = tmp_path / f".tree.not-{host}.{dead.pid}.0123abcd.tmp"
    for path in (gone, alive, afar):
        path.mkdir()
    save_tree(tmp_path / "tree", 1)
    assert not gone.exists() and alive.exists() and afar.exists()


# Locks


def test_two_runs_into_one_folder(tmp_path):
    process = started(tmp_path)
    try:
        with pytest.raises(ValueError) as caught:
            Checkpoints(tmp_path).save(1, {})
        said = str(caught.value)
        assert f"{tmp_path} is in use by process {process.pid} on" in said
        assert "allowed is one run at a time" in said and said.count("\n") == 0
        with pytest.raises(ValueError), Checkpoints(tmp_path).locked():
            pass
    finally:
        process.kill()
        process.wait()
    with Checkpoints(tmp_path).locked() as taken_over:
        taken_over.save(10**6, {})


def test_two_runs_of_one_process(tmp_path):
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    with first.locked():
        first.save(1, 1)
        with pytest.raises(ValueError, match="by this very process"):
            second.save(2, 2)
        with pytest.raises(ValueError, match="by this very process"), first.locked():
            pass
        first.save(3, 3)
        assert second.newest() == (3, 3), "reading needs no lock"
    with second.locked():
        second.save(4, 4)
    first.save(5, 5)
    assert first.steps() == [4, 5]


def test_the_lock_ends_with_an_exception(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ZeroDivisionError), checkpoints.locked():
        raise ZeroDivisionError
    with checkpoints.locked():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_loaders_worker_does_not_keep_the_lock(tmp_path):
    """Workers are forked and may outlive a killed run by seconds."""
    script = f"""
    import os, time
    from bigmodel_nb.kit.store import Checkpoints
    with Checkpoints({str(tmp_path)!r}).locked():
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(60)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(process.stdout.readline())
    with pytest.raises(ValueError, match=f"by process {process.pid}"):
        Checkpoints(tmp_path).save(1, 1)
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)  # it lives
        Checkpoints(tmp_path).save(1, 1)
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_does_not_write_under_its_parents_lock(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with checkpoints.locked():
        child = os.fork()
        if child == 0:
            try:
                checkpoints.save(1, 1)
            except ValueError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("missing", ["no module", "a file system without locks"])
def test_without_locks_of_the_system(tmp_path, monkeypatch, missing):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    held = SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=unsupported)
    monkeypatch.setattr(store, "fcntl", None if missing == "no module" else held)
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    with first.locked():
        with pytest.raises(ValueError, match="by this very process"):
            second.save(2, 2)
    second.save(2, 2)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    (tmp_path / ".lock").write_text(f"{dead.pid} {host}\n")
    second.save(3, 3)
    (tmp_path / ".lock").write_text(f"{os.getppid()} {host}\n")
    with pytest.raises(ValueError, match=f"process {os.getppid()} on {host}"):
        second.save(4, 4)
    (tmp_path / ".lock").write_text("17 elsewhere\n")
    with pytest.raises(ValueError, match="process 17 on elsewhere"):
        second.save(4, 4)
    (tmp_path / ".lock").write_bytes(b"\xff nonsense")
    second.save(5, 5)


def test_reading_runs_no_code_and_needs_no_pickle():
    source = Path(store.__file__).read_text(encoding="utf-8")
    assert "import pickle" not in source and "torch.load" not in source
    assert "eval(" not in source
