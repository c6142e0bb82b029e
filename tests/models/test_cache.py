"""The cache of quantised models is found by content, and a broken or unwritable one never spoils a load."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import assert_same_weights
from tiny_files import save_tiny

from qlora_lite.files import cache_root, content_digest
from qlora_lite.models import cache as caching
from qlora_lite.models import gguf_header
from qlora_lite.models import load as loading
from qlora_lite.models.cache import cache_entry, from_gguf_header
from qlora_lite.models.gguf_header import Header, read_header
from qlora_lite.models.load import load_model
from qlora_lite.models.locate import locate


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test alone."""
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(folder, quant="nf4", dtype=torch.float32, **options):
    return load_model(str(folder), quant, compute_dtype=dtype, **options)


def entries(cache):
    return sorted(path.name for path in (cache / "models").glob("*")) if (cache / "models").exists() else []


@pytest.fixture
def no_quantising(monkeypatch):
    """Call the result to fail the test at the next quantisation."""

    def forbid():
        def fail(*args, **kwargs):
            raise AssertionError("the cache missed")

        monkeypatch.setattr(loading, "save_for_cache", fail)  # which a miss does
        monkeypatch.setattr(loading, "quantize_in_place", fail)

    return forbid


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_second_load_comes_from_the_cache_and_is_equal(model, cache, no_quantising, quant, double_quant):
    first = load(model, quant, double_quant=double_quant)
    no_quantising()
    assert_same_weights(load(model, quant, double_quant=double_quant), first)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "cohere"])
def test_every_kind_of_layer_comes_back_from_the_cache(model_type, tmp_path, cache, no_quantising):
    save_tiny(tmp_path / "model", model_type)
    first = load(tmp_path / "model")
    no_quantising()
    second = load(tmp_path / "model")
    assert_same_weights(second, first)
    ids = torch.arange(10)[None]
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


def test_the_same_content_under_another_path_hits(model, cache, no_quantising, tmp_path):
    load(model)
    shutil.copytree(model, tmp_path / "elsewhere")
    no_quantising()
    load(tmp_path / "elsewhere")


def test_changed_content_under_the_same_path_misses(model, cache):
    load(model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    changed = load(model)
    assert len(entries(cache)) == 2
    assert_same_weights(changed, load(model, use_cache=False))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_changed_configuration_misses(model, cache, name):
    load(model)
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))
    assert load(model).generation_config.eos_token_id == (3 if name.startswith("generation") else 2)
    assert len(entries(cache)) == 2


def test_other_settings_have_another_entry(model, cache):
    for options in (
        {},
        {"quant": "fp4"},
        {"double_quant": False},
        {"dtype": torch.bfloat16},
    ):
        load(model, **options)
    assert len(entries(cache)) == 4


def test_a_digest_is_remembered_until_the_file_changes(cache, tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = content_digest(file)
    monkeypatch.setattr("qlora_lite.files.sha256", lambda path: "counted again")
    assert content_digest(file) == first
    for note in (cache / "digests").iterdir():
        note.write_text(note.read_text().replace(first, first[::-1]))
    assert content_digest(file) == "counted again"
    file.write_bytes(b"three")
    assert content_digest(file) == "counted again"


def test_nothing_is_kept_where_no_cache_is_wanted(model, cache):
    load(model, use_cache=False)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_one_line_and_no_more(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert_same_weights(load(model), load(model, use_cache=False))
    assert "the quantised model is not cached: cannot write" in caplog.text


def test_what_a_killed_process_left_of_an_entry_is_gone_a_day_later(model, cache):
    for name, hours in ((".a.1.partial", 25), (".b.1.partial", 23)):
        (cache / "models" / name).mkdir(parents=True)
        long_ago = time.time() - hours * 3600
        os.utime(cache / "models" / name, (long_ago, long_ago))
    load(model)
    assert [name for name in entries(cache) if name.startswith(".")] == [".b.1.partial"]


def test_a_folder_inside_an_entry_does_not_count(model, cache, no_quantising):
    load(model)
    (cache / "models" / entries(cache)[0] / "of the file manager").mkdir()
    no_quantising()
    load(model)


@pytest.mark.parametrize("damage", ["cut short", "missing", "one bit", "a bit of the configuration", "no sums"])
def test_a_damaged_entry_is_made_again(model, cache, damage, caplog, no_quantising):
    first = load(model)
    (weights,) = cache_root().glob("models/*/model.safetensors")
    name = {"a bit of the configuration": "config.json", "no sums": "sums.json"}.get(damage, weights.name)
    file = weights.with_name(name)
    whole = bytearray(file.read_bytes())
    if damage in ("missing", "no sums"):
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(whole[:-100])
    else:
        file.write_bytes(whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:])
    assert_same_weights(load(model), first)
    assert "the cached model is damaged and rebuilt: " in caplog.text
    assert file.read_bytes() == whole
    no_quantising()
    assert_same_weights(load(model), first)


def test_an_entry_is_the_folder_of_an_ordinary_checkpoint(model, cache):
    load(model)
    entry = cache_entry(locate(str(model)), quant="nf4", double_quant=True, dtype="torch.float32")
    assert entries(cache) == [entry.name]
    assert json.loads((entry / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"


class Converted:
    """What transformers would make of a header."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        (folder / "part.json").write_text(self.text)


@pytest.fixture
def header(tmp_path, cache, monkeypatch):
    """A GGUF file's path, and a function that reads a part of it through the cache and lists the conversions."""
    path, conversions = tmp_path / "model.gguf", []
    monkeypatch.setattr(caching, "read_header", lambda path: Header({}, {}, 0, path.read_text()))

    def convert(folder, gguf_file):
        conversions.append(gguf_file)
        time.sleep(0.05)  # in which another one may begin
        return Converted((folder / gguf_file).read_text())

    def read(content="one", part="config"):
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        return from_gguf_header(path, part, convert, lambda folder: Converted((folder / "part.json").read_text())).text

    return read, conversions


def test_what_is_made_of_a_header_is_converted_once(header, monkeypatch):
    read, conversions = header
    assert [read(), read(), len(conversions)] == ["one", "one", 1]
    assert [read("two"), read(part="tokenizer"), read("two"), len(conversions)] == ["two", "one", "two", 3]
    monkeypatch.setattr(caching, "transformers", SimpleNamespace(__version__="another"))
    assert [read(), len(conversions)] == ["one", 4]


@pytest.mark.parametrize("damage", ["changed", "removed", "added", "seal"])
def test_a_damaged_conversion_is_made_again(header, cache, damage):
    read, conversions = header
    read()
    (entry,) = (cache / "headers").iterdir()
    if damage == "removed":
        (entry / "part.json").unlink()
    else:
        name = {"changed": "part.json", "added": "more.json", "seal": "sha256.json"}[damage]
        (entry / name).write_text("not one")
    assert [read(), read(), len(conversions)] == ["one", "one", 2]


def test_of_several_that_want_a_header_converted_one_does_it_and_the_others_read_what_it_made(header, cache, caplog):
    read, conversions = header
    read(part="tokenizer")
    with ThreadPoolExecutor(3) as pool:  # for the lock of a folder, threads are as processes
        assert list(pool.map(lambda _: read(), range(3))) == ["one"] * 3
    assert [len(conversions), len(list((cache / "headers").iterdir())), caplog.text] == [2, 2, ""]


def test_a_conversion_that_cannot_be_kept_is_used(header, cache, monkeypatch, caplog):
    cache.mkdir()
    (cache / "headers").write_text("a file in the way")
    read, conversions = header
    assert [read(), read(), len(conversions)] == ["one", "one", 2]
    assert "the config of model.gguf is not cached" in caplog.text


def test_a_header_is_walked_once_until_the_file_changes(tmp_path, monkeypatch):
    walked = []
    monkeypatch.setattr(gguf_header, "_Walk", lambda content: walked.append(1) or SimpleNamespace(whole=content.read))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    assert read_header(path) == read_header(path) == b"one"
    path.write_bytes(b"three")
    assert [read_header(path), len(walked)] == [b"three", 2]
