"""What is wrong with an adapter's files is said in one error, and nothing in them can hang or slip through."""

import json
import pickle
import time

import pytest
import torch
from hostile import Trap
from safetensors.torch import load_file, save_file
from tiny import build_tiny, random_factors
from tiny_files import byte_tokenizer

from qlora_lite.adapters.files import load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import Target, add_lora, lora_layers
from qlora_lite.errors import ModelError, OutputError

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def folder(tmp_path):
    """An adapter of the two q_proj layers of a tiny Llama."""
    model = add_lora(build_tiny("llama"), ["q_proj"], rank=3, alpha=6.0)
    random_factors(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refusal(folder) -> str:
    model = build_tiny("llama")
    with pytest.raises(ModelError) as caught:
        load_adapter(model, folder)
    assert not list(lora_layers(model)), "a refused adapter must leave the model as it was"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_adapter_is_loaded_bit_for_bit_with_its_settings(tmp_path):
    model = add_lora(build_tiny("llama"), ["q_proj", Target("*.mlp.*", rank=2, alpha=5.0)], 3, 6.0, 0.1, rslora=True)
    random_factors(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = dict(lora_layers(load_adapter(build_tiny("llama"), tmp_path / "adapter")))
    for name, layer in lora_layers(model):
        other = loaded.pop(name)
        assert torch.equal(layer.lora_A, other.lora_A) and torch.equal(layer.lora_B, other.lora_B)
        assert (layer.scale, layer.dropout, layer.lora_A.dtype) == (other.scale, other.dropout, other.lora_A.dtype)
    assert not loaded


def test_the_digest_is_that_of_the_file_and_the_same_for_the_same_weights(tmp_path):
    import hashlib

    model = add_lora(build_tiny("llama"), rank=2)
    first, second = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b")
    assert first == second == hashlib.sha256((tmp_path / "a" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(folder):
    save_adapter(add_lora(build_tiny("llama"), ["up_proj"], rank=1), folder)
    assert {name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")} == {"up_proj"}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "name",
    [
        "my_notes.md",
        "checkpoint-500/adapter_model.safetensors",
        "model.safetensors",
    ],
)
def test_an_adapter_among_other_things_is_never_replaced(folder, name):
    model = load_adapter(build_tiny("llama"), folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"holds {name.split('/')[0]}, which is no part of an adapter"):
        save_adapter(model, folder)
    assert (folder / name).read_text() == "mine"


def test_the_templates_of_a_tokenizer_with_several_are_replaced_with_the_adapter(folder, tmp_path):
    tokenizer, model = byte_tokenizer("chatml"), load_adapter(build_tiny("llama"), folder)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    for _ in range(2):
        save_adapter(model, tmp_path / "own", "base", tokenizer)
    assert (tmp_path / "own" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_an_adapter_stored_in_float16_is_one_in_float32(folder):
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    factors = dict(lora_layers(load_adapter(build_tiny("llama"), folder)))
    assert {layer.lora_A.dtype for layer in factors.values()} == {torch.float32}


def test_an_adapter_of_several_types_is_one_in_the_type_that_holds_all(folder):
    weights = folder / "adapter_model.safetensors"
    *_, last = sorted(stored := load_file(weights))
    for changed, dtype in (([last], torch.float32), (stored, torch.float8_e4m3fn)):
        tensors = {
            name: (1.01 * tensor.float()).to(dtype) if name in changed else tensor for name, tensor in stored.items()
        }
        save_file(tensors, weights)
        layers = dict(lora_layers(load_adapter(build_tiny("llama"), folder)))
        for path, layer in layers.items():
            for side, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                (stored_as,) = (t for n, t in tensors.items() if f"{path}.lora_{side}." in n)
                assert factor.dtype == torch.float32 and torch.equal(factor, stored_as.float())


def test_a_file_is_never_replaced_by_an_adapter(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="would be gone; choose another folder"):
        save_adapter(load_adapter(build_tiny("llama"), folder), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_something_else_is_never_replaced(folder):
    model = load_adapter(build_tiny("llama"), folder)
    (folder.parent / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="no part of an adapter and would be gone; choose another"):
        save_adapter(model, folder.parent)
    assert (folder.parent / "notes.txt").read_text() == "mine" and folder.is_dir()
    (folder.parent / "empty").mkdir()
    save_adapter(model, folder.parent / "empty")


def test_loading_from_a_path_and_saving_to_it_keeps_every_byte(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = load_adapter(build_tiny("llama"), folder)
    save_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    factors = load_file(folder / "adapter_model.safetensors")
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A, factors[f"base_model.model.{name}.lora_A.weight"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pickle_offered_as_an_adapter_is_refused_and_never_run(folder, tmp_path, name):
    trap = pickle.dumps(Trap(tmp_path / "ran"))
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(trap)
    assert "adapter_model" in refusal(folder) or "adapter_config" in refusal(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(trap)
    assert (tmp_path / "ran").exists(), "it would have been run by a reader of pickles"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_not_saved(folder, bad):
    before = (folder / "adapter_model.safetensors").read_bytes()
    model = add_lora(build_tiny("llama"), rank=1)
    next(lora_layers(model))[1].lora_B.data[3] = bad
    with pytest.raises(ModelError, match=r"1 tensors are not finite, first .*q_proj\.lora_B"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_model_without_an_adapter_cannot_be_saved_as_one(tmp_path):
    with pytest.raises(ModelError, match="no LoRA layers"):
        save_adapter(build_tiny("llama"), tmp_path / "a")


def test_everything_wrong_with_the_tensors_is_in_one_error(folder):
    def spoil(tensors):
        del tensors[Q.format(0, "B")]
        tensors[Q.format(1, "A")] = torch.zeros(3, 63)
        tensors[Q.format(1, "B")][0, 0] = float("nan")
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(1, 64)

    change_tensors(folder, spoil)
    text = refusal(folder)
    assert Q.format(0, "B") + " is missing" in text
    assert "model.layers.1.self_attn.q_proj has shapes [(3, 63), (64, 3)], its layer is 64 x 64" in text
    assert Q.format(1, "B") + " is not finite" in text
    assert "base_model.model.lm_head.lora_A.weight belongs to no linear layer" in text


def test_a_layer_that_the_configuration_names_and_the_file_lacks_is_an_error(folder):
    change_tensors(folder, lambda t: [t.pop(Q.format(1, side)) for side in "AB"])
    assert "model.layers.1.self_attn.q_proj has no factors" in refusal(folder)


def test_a_long_list_of_faults_is_cut(folder):
    change_tensors(folder, lambda t: t.update({f"other.{i}": torch.zeros(1) for i in range(62)}))
    assert "and 12 more" in refusal(folder)


@pytest.mark.parametrize("tensor", [torch.zeros(3, 64, dtype=torch.int64), torch.zeros(64), torch.zeros(0, 64)])
def test_weights_of_another_kind_are_refused(folder, tensor):
    change_tensors(folder, lambda t: t.update({Q.format(0, "A"): tensor}))
    assert "q_proj" in refusal(folder)


def test_a_file_without_tensors_is_refused(folder):
    save_file({}, folder / "adapter_model.safetensors")
    assert "it has no LoRA weights" in refusal(folder)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(folder, setting):
    change_config(folder, **setting)
    (key, value) = next(iter(setting.items()))
    assert f"{key}={value!r} is not supported" in refusal(folder)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": -1},
        {"lora_alpha": float("nan")},
        {"lora_dropout": "0.1"},
        {"lora_dropout": 1.0},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "8"}},
        {"peft_type": "IA3"},
        {"modules_to_save": "lm_head"},
    ],
)
def test_a_setting_of_a_wrong_type_or_size_is_refused_by_name(folder, setting):
    change_config(folder, **setting)
    assert next(iter(setting)) in refusal(folder)


def test_a_pattern_is_matched_as_peft_does(folder):
    change_config(folder, alpha_pattern={r"layers\.1\..*": 12, "q_proj": 24, "proj": 48, "1.self_attn.q_proj": 96})
    scales = [layer.scale for _, layer in lora_layers(load_adapter(build_tiny("llama"), folder))]
    assert scales == [24 / 3, 12 / 3]


@pytest.mark.parametrize(
    "pattern", [r"((\w|\w)+\.?)+[^\w]", r"(.|.|.)*[A-Z]", r"(a+)+b", r"(.*)(.*)(.*)(.*)(.*)(.*)[A-Z]"]
)
def test_a_hostile_pattern_cannot_hang(folder, pattern):
    change_config(folder, alpha_pattern={pattern: 12})
    started = time.process_time()
    try:
        load_adapter(build_tiny("llama"), folder)
    except ModelError as error:
        assert "alpha_pattern" in str(error)
    assert time.process_time() - started < 10


def test_a_pattern_that_is_no_regular_expression_is_refused(folder):
    change_config(folder, alpha_pattern={"q_proj(": 12})
    assert "alpha_pattern 'q_proj(' cannot be used: missing )" in refusal(folder)


def test_patterns_that_take_too_long_are_refused_in_these_words(folder, monkeypatch):
    monkeypatch.setattr("qlora_lite.adapters.read.MATCH_SECONDS", 0.0)
    change_config(folder, alpha_pattern={"q_proj": 12})
    assert refusal(folder).endswith("alpha_pattern 'q_proj' cannot be used: it takes too long")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"peft_type": "LORA"}'])
def test_a_configuration_that_is_no_object_of_a_lora_is_refused(folder, content):
    (folder / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_weights_file_cut_short_is_refused(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short or not a safetensors file" in refusal(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(folder)
    assert "adapter_config.json is missing" in refusal(tmp_path)
