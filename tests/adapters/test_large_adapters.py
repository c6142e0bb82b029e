"""However much an adapter's files hold, what is wrong is said in seconds and in little memory."""

import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny, random_factors

from qlora_lite.adapters.files import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.errors import ModelError
from qlora_lite.memory.meter import PeakMeter

MAX_SECONDS = 10.0  # of processor time: about 1 on a quiet machine, with room for a slow one
MAX_BYTES = 200 * 2**20  # beside twice the file
SIZES = pytest.mark.parametrize("count", [40_000, pytest.param(1_000_000, marks=pytest.mark.slow)])


@pytest.fixture
def folder(tmp_path):
    """An adapter of all layers of a tiny Llama."""
    model = add_lora(build_tiny("llama"), rank=3, alpha=6.0)
    random_factors(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def outcome(folder) -> str:
    """Load an adapter within the limits; return "" or the text of the clean error."""
    model, said = build_tiny("llama"), ""
    file_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    with PeakMeter("cpu") as meter:
        before, started = meter.peak_bytes(), time.process_time()
        try:
            load_adapter(model, folder)
        except ModelError as error:
            said = str(error)
        seconds, peak_bytes = time.process_time() - started, meter.peak_bytes() - before
    assert seconds < MAX_SECONDS
    assert peak_bytes < 2 * file_bytes + MAX_BYTES
    assert len(said) < 20_000
    assert not said or not list(lora_layers(model)), "a refused adapter must leave the model as it was"
    return said


def write_header(folder, entries, tensors=b""):
    """Write a weights file whose header holds the entries given, as text."""
    text = b"{" + b",".join(entries) + b"}"
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def change_config(folder, **values):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_good_adapter_is_loaded(folder):
    assert outcome(folder) == ""


@SIZES
def test_a_file_of_very_many_names_is_refused(folder, count):
    entries = (b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    write_header(folder, entries)
    said = outcome(folder)
    assert ("names more tensors than" if count > 100_000 else "belongs to no linear layer; and 39964 more") in said


@SIZES
def test_a_file_of_very_many_weights_of_unknown_layers_is_refused(folder, count):
    name = b"base_model.model.layers.%d.lora_A.weight"
    entries = (b'"' + name % n + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' for n in range(count))
    write_header(folder, entries)
    assert outcome(folder)


@SIZES
def test_a_configuration_of_very_many_patterns_is_refused(folder, count):
    change_config(folder, alpha_pattern={f"x{number}.*": 3 for number in range(count)})
    assert outcome(folder)


@SIZES
def test_a_configuration_of_very_many_targets_is_no_hang(folder, count):
    change_config(folder, target_modules=[f"x{number}" for number in range(count)])
    assert outcome(folder) == "" or count > 100_000


def test_as_many_patterns_as_layers_are_looked_up_and_the_first_that_matches_counts(folder):
    names = [name for name, _ in lora_layers(load_adapter(build_tiny("llama"), folder))]
    patterns = {f"nothing{number}": 1 for number in range(400)} | {r"layers\.1\..*": 12} | dict.fromkeys(names, 24)
    change_config(folder, alpha_pattern=patterns)
    found = {name: layer.scale for name, layer in lora_layers(load_adapter(build_tiny("llama"), folder))}
    assert found == {name: (12 if ".layers.1." in name else 24) / 3 for name in names}


def test_many_patterns_that_each_take_long_are_given_up_together(folder):
    change_config(folder, alpha_pattern={rf"(.|.|.)*[A-Z]{{{number}}}": 3 for number in range(1, 50)})
    outcome(folder)


@pytest.mark.parametrize("megabytes", [40])
def test_a_large_factor_of_a_wrong_shape_or_behind_the_end_takes_little_memory(folder, megabytes):
    tensors = load_file(folder / WEIGHTS_NAME)
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.zeros(megabytes * 2**18)}, folder / WEIGHTS_NAME)
    assert "has shapes" in outcome(folder)
    with (folder / WEIGHTS_NAME).open("ab") as file:
        file.write(bytes(megabytes * 2**20))
    assert "not a safetensors file" in outcome(folder)


def test_one_very_long_name_is_cut_short_in_the_message(folder):
    write_header(folder, [b'"' + b"n" * 3_000_000 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'])
    assert "n" * 200 + " belongs to no linear layer" in outcome(folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "is not an ordinary file" in outcome(folder)
