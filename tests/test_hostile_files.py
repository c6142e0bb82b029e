"""Whatever a file holds that came from elsewhere, the outcome is success or one clean error, and soon.

Files are corrupted 5,000 times in all here, and recipes and rows elsewhere; with the tests marked slow, SLOW_FACTOR
times as often.
"""

import json
import logging
import struct
from dataclasses import fields
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hostile import ANYTHING, SLOW_FACTOR, TIMES, clean, fuzz, spoiled, spoiled_bytes, with_header
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_trainer import trainer
from torch import nn

from qlora_lite.adapters.files import CONFIG_NAME, WEIGHTS_NAME, adapter_config, load_adapter
from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.models.locate import INDEX_NAME, check_gguf, locate
from qlora_lite.prepare.preflight import Preflight
from qlora_lite.prepare.settings import with_plan
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.resume import RUN, Continuation, checked
from qlora_lite.runs.stages import Proven
from qlora_lite.runs.training import Training
from qlora_lite.train.checkpoints import MANIFEST, Checkpoint, newest_whole, sealed, write_checkpoint
from qlora_lite.train.state import STATE, capture, restore


class Bare(nn.Module):
    """Two linear layers that LoRA may wrap, and no head."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.config = None
        self.q_proj, self.up_proj, self.table = nn.Linear(6, 4), nn.Linear(4, 8), nn.Embedding(5, 6)

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return None


@pytest.fixture(scope="module")
def good_adapter():
    """The configuration, the header and the file of an adapter of ``Bare``."""
    model = add_lora(Bare(), rank=2, alpha=4, dtype=torch.float32)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": getattr(model.get_submodule(name), f"lora_{side}").detach()
        for name in ("q_proj", "up_proj")
        for side in "AB"
    }
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return adapter_config(model, "base") | {"alpha_pattern": {"q_proj": 8.0}}, header, content, content[8 + length :]


@pytest.fixture
def adapter(tmp_path, good_adapter):
    """Write an adapter folder with one file replaced, and load it."""
    config, _, content, _ = good_adapter
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    assert clean(load_adapter, Bare(), tmp_path) == ""

    def load(name, replaced: bytes):
        (tmp_path / name).write_bytes(replaced)
        model = Bare()
        before = [parameter.clone() for parameter in model.parameters()]
        said = clean(load_adapter, model, tmp_path)
        assert not said or all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return said

    return load


@TIMES
def test_an_adapter_s_configuration_may_hold_anything(adapter, good_adapter, times):
    kind, raw = "adapter_config.json", json.dumps(good_adapter[0]).encode()
    fuzz(kind, spoiled(good_adapter[0]), 900 * times, lambda value: adapter(CONFIG_NAME, json.dumps(value).encode()), 2)
    fuzz(kind, spoiled_bytes(raw), 300 * times, lambda content: adapter(CONFIG_NAME, content), 2)


@TIMES
def test_a_safetensors_file_may_hold_anything(adapter, good_adapter, times):
    _, header, content, tensors = good_adapter
    kind, start = "safetensors of an adapter", 8 + len(json.dumps(header))
    fuzz(kind, spoiled(header), 600 * times, lambda value: adapter(WEIGHTS_NAME, with_header(value, tensors)), 2)
    fuzz(kind, spoiled_bytes(content, start), 400 * times, lambda raw: adapter(WEIGHTS_NAME, raw), 2)


@pytest.fixture
def model_folder(tmp_path, good_adapter):
    """A model folder of one shard with an index."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_bytes(good_adapter[2])
    return tmp_path


GOOD_INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}


@TIMES
def test_an_index_may_hold_anything_and_names_no_file_outside(model_folder, times):
    (model_folder.parent / "x").write_bytes(b"outside")

    def check(content: bytes):
        (model_folder / INDEX_NAME).write_bytes(content)
        found = []
        said = clean(lambda: found.extend(locate(str(model_folder)).weights))
        assert all(path.parent == model_folder for path in found)
        return said

    kind = "index of a model's files"
    check(json.dumps(GOOD_INDEX).encode())
    fuzz(kind, spoiled(GOOD_INDEX), 400 * times, lambda value: check(json.dumps(value).encode()))
    fuzz(kind, spoiled_bytes(json.dumps(GOOD_INDEX).encode()), 200 * times, check)


@TIMES
def test_a_shard_of_a_model_may_hold_anything(model_folder, good_adapter, times):
    _, header, content, tensors = good_adapter

    def check(raw: bytes):
        (model_folder / "model-1.safetensors").write_bytes(raw)
        return clean(locate, str(model_folder))

    kind = "safetensors of a model"
    fuzz(kind, spoiled(header), 300 * times, lambda value: check(with_header(value, tensors)))
    fuzz(kind, spoiled_bytes(content, 8 + len(json.dumps(header))), 300 * times, check)


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("general.quantized", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "", "é"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0, 3.0, 4.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    writer.add_tensor("output.weight", np.zeros((2, 18), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@TIMES
def test_a_gguf_file_may_hold_anything_and_one_that_passes_is_read_by_gguf(tmp_path, good_gguf, times):
    path = tmp_path / "x.gguf"

    def check(raw: bytes):
        path.write_bytes(raw)
        said = clean(check_gguf, path)
        assert said or gguf.GGUFReader(path).tensors
        return said

    assert check(good_gguf) == ""
    fuzz("GGUF header", spoiled_bytes(good_gguf, 600), 1000 * times, check)


def test_counts_of_a_gguf_file_that_would_keep_a_reader_busy_for_good_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"k"
    array_of_bytes = key + struct.pack("<IIQ", 9, 0, 2**60)
    array_of_nothing = key + struct.pack("<IIQ", 9, 9, 2**60)
    for metadata, counts in [
        (array_of_bytes, (0, 1)),
        (array_of_nothing, (0, 1)),
        (b"", (2**60, 0)),
        (b"", (0, 2**60)),
    ]:
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + metadata)
        assert "cut short or not a GGUF file" in clean(check_gguf, path)


def test_a_gguf_tensor_of_no_values_whose_other_length_is_beyond_all_memory_is_refused(tmp_path, good_gguf):
    path, lengths = tmp_path / "x.gguf", struct.pack("<QQ", 32, 2)
    assert lengths in good_gguf
    path.write_bytes(good_gguf.replace(lengths, struct.pack("<QQ", 2**60, 0), 1))
    assert "has 0 values" in clean(check_gguf, path)


def checkpoint_of(training, run):
    tensors, state = capture(training)
    return Checkpoint(training.step, tensors, {STATE: state, RUN: run})


@pytest.fixture(scope="module")
def trained():
    """A trainer after a step, a second one to be put back, and what a checkpoint holds of its run."""
    training = trainer(max_steps=6)
    next(iter(training))
    run = {
        "recipe": {"train": {"seed": 0, "learning_rate": 2e-4}, "lora": {"rank": 4}},
        "identity": {"tokenizer": "x"},
        "environment": {"torch": "2", "threads": 1},
        "summary": {"status": "running", "resumed": []},
        "plan": {"memory.checkpointing": "block", "memory.loss_chunk_tokens": 64, "train.micro_batch_size": 1},
        "progress": {
            "evaluated_step": 0,
            "evaluations_without_better": 0,
            "totals": {"steps": 1, "seconds": 1.5, "tokens": 9, "target_tokens": 8},
            "peak_bytes": 10,
            "before": {"score": 0.5, "answers": ["a"]},
            "best_loss": None,
        },
        "metrics_bytes": 12,
    }
    return training, trainer(max_steps=6), run


@TIMES
def test_a_manifest_may_hold_anything(tmp_path, trained, times):
    training, _, run = trained
    folder = write_checkpoint(tmp_path, checkpoint_of(training, run), {"torch": "1"}, "abc")
    good = (folder / MANIFEST).read_text()

    def check(content: bytes):
        (folder / MANIFEST).write_bytes(content)
        found, reasons = newest_whole(tmp_path)
        assert (found is None) == bool(reasons)
        return "".join(reasons)

    assert check(good.encode()) == ""
    kind, manifest = "manifest of a checkpoint", json.loads(good)["manifest"]
    fuzz(kind, spoiled_bytes(good.encode()), 200 * times, check)
    fuzz(kind, spoiled(manifest), 200 * times, lambda value: check(sealed(value).encode()))
    fuzz(kind, ANYTHING, 100 * times, lambda value: check(json.dumps(value).encode()))


@TIMES
def test_the_numbers_of_a_checkpoint_may_be_anything(trained, tmp_path, times, caplog):
    caplog.set_level(logging.ERROR, "qlora_lite")
    training, other, run = trained
    good = checkpoint_of(training, run)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {train: rows.jsonl}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    names = {field.name: None for field in fields(Proven)} | {"trainer": other, "model": other.model}
    proven = Proven(**names | {"recipe": recipe, "data": Preflight(None, None, {})})

    def go_on(documents):
        continuation = Continuation(checked(Checkpoint(1, good.tensors, documents)), force=True)
        continuation.compare_settings(recipe)
        continuation.compare_identity({"tokenizer": "y"})
        continuation.say_changes({"torch": "3"})
        continuation.compare_schedule(6, other.settings)
        with_plan(recipe, continuation.run["plan"])
        restore(other, continuation.checkpoint)
        Training(proven).restore(continuation)

    assert clean(go_on, good.documents) == ""
    state, everything = good.documents[STATE], st.sampled_from([STATE, RUN])
    values = everything.flatmap(lambda name: st.tuples(st.just(name), spoiled(state if name == STATE else run)))
    values = values.filter(lambda pair: isinstance(pair[1], dict))  # reading the file sees to that
    fuzz("numbers of a checkpoint", values, 400 * times, lambda pair: clean(go_on, good.documents | {pair[0]: pair[1]}))


def test_the_counts_of_the_fuzz_tests_are_those_that_are_announced():
    import re

    here = Path(__file__).parent
    files = (Path(__file__), here / "data" / "test_data_fuzz.py", here / "recipe" / "test_recipe_fuzz.py")
    counts = [sum(int(n) for n in re.findall(r"(\d+) \* times", file.read_text())) for file in files]
    assert counts[0] >= 5000 and counts[2] >= 5000 and sum(counts) * SLOW_FACTOR >= 200_000
