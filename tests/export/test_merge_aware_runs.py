"""What a merge-aware run leaves: the merged 4-bit model is the one that was trained, to the bit."""

import json
from dataclasses import replace

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from tiny_files import MERGES, byte_tokenizer, save_tiny
from tiny_runs import logits, make_run, replace_adapter

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import ModelError
from qlora_lite.export import own_codes
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.gguf.model import MODEL_FILE
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.multi_adapter import load_tasks
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.load import load_model
from qlora_lite.models.save import save_quantized
from qlora_lite.quant.product import materialize

TOKENS = torch.arange(120)[None]  # those of "e" and "o" among them


def aware_run(folder, to="nf4", overrides=(), model=None):
    if model is None:
        save_tiny(model := folder / "model", merges=MERGES)
    return make_run(folder, model, [f"train.merge_aware={to}", *overrides], lora={"rank": 4, "alpha": 8})


def trained_model(run):
    trained = open_trained(run)
    return attach_adapter(trained.build_base(), trained.adapter_to_merge(trained.skeleton()))


def logits_of(folder, quant):
    return logits(load_model(str(folder), quant, compute_dtype=torch.float32))


def test_the_merged_4_bit_checkpoint_has_the_logits_of_the_trained_model_to_the_bit(tmp_path):
    run = aware_run(tmp_path / "made")
    report = merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    found = report["models"]["merged, then nf4"]
    assert found["kl"] == 0 and found["agreement"] == 1 and report["models"]["base"]["kl"] > 0
    assert report["notes"] == ["the weights are the nf4 ones that the run computed with (train.merge_aware)"]
    expected = logits(trained_model(run))
    assert torch.equal(logits_of(tmp_path / "out", "nf4"), expected)
    merge_run(run, tmp_path / "dense", MergeSettings(rows=0))
    assert json.loads((tmp_path / "dense" / "merge_report.json").read_text())["dtype"] == "f32"
    assert torch.equal(logits_of(tmp_path / "dense", "none"), expected)
    plain = replace(open_trained(run).adapter_to_merge(open_trained(run).skeleton()), merge_aware="off")
    assert not torch.allclose(logits(attach_adapter(open_trained(run).build_base(), plain)), expected, atol=1e-3)


def test_layers_in_16_bit_beside_them_stay_so_and_have_their_updates(tmp_path):
    run = aware_run(tmp_path / "made", overrides=['model.keep_16bit=["v_proj"]'])
    merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    assert torch.allclose(logits_of(tmp_path / "out", "nf4"), logits(trained_model(run)), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_trained_tokens_are_in_the_tables_of_the_4_bit_checkpoint(tied, tmp_path):
    save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    run = aware_run(tmp_path / "made", overrides=['adapter.train_tokens=["e", "o"]'], model=tmp_path / "model")
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    replace_adapter(run, {name: tensor * (-2 if "trainable_tokens" in name else 1) for name, tensor in before.items()})
    report = merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    expected = logits(trained_model(run), TOKENS)
    found = logits(load_model(str(tmp_path / "out"), compute_dtype=torch.float32), TOKENS)
    assert torch.allclose(found, expected, atol=1e-5)  # rows of the head alone are a product of another size
    assert not torch.allclose(logits(open_trained(run).build_base(), TOKENS), expected, atol=1e-2)
    assert report["models"]["merged, then nf4"]["kl"] < 1e-9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "token_rows" in name]


def test_so_it_has_where_only_a_4_bit_base_exists(tmp_path):
    save_tiny(tmp_path / "plain")
    save_quantized(load_model(str(tmp_path / "plain"), "nf4", True, torch.float32), tmp_path / "base", byte_tokenizer())
    run = aware_run(tmp_path / "made", model=tmp_path / "base")
    merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    merge_run(run, tmp_path / "dense", MergeSettings(dtype="f32", rows=0))
    expected = logits(trained_model(run))
    assert torch.equal(logits_of(tmp_path / "out", "nf4"), expected)
    assert torch.equal(logits_of(tmp_path / "dense", "none"), expected)


def test_answers_and_evaluations_are_those_of_the_merged_model(tmp_path):
    run = aware_run(tmp_path / "made")
    merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    trained = open_trained(run)
    tasks = load_tasks({"run": trained})
    with tasks.using("run"):
        assert torch.equal(logits(tasks.model), logits_of(tmp_path / "out", "nf4"))
    own = evaluate_recipe(trained.recipe, trained.adapter, 0)
    other = trained.recipe.model.model_copy(update={"path": str(tmp_path / "out")})
    assert own["eval_loss"] == evaluate_recipe(trained.recipe.model_copy(update={"model": other}), None, 0)["eval_loss"]


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("to", ["q4_0", "q8_0"])
def test_a_gguf_file_of_the_format_holds_every_weight_that_was_trained(to, quant, tmp_path):
    run = aware_run(tmp_path / "made", to, [f"model.quant={quant}"])
    report = export_run(run, tmp_path / "out", ExportSettings("gguf"))
    assert report["dtype"] == to and report["distance"] < 0.05
    model = trained_model(run)
    names = gguf_names(model.config)
    read = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(tmp_path / "out" / MODEL_FILE).tensors
    }
    for path in ("q_proj", "v_proj"), ("down_proj",):
        for leaf in path:
            part = "mlp" if leaf == "down_proj" else "self_attn"
            layer = model.get_submodule(f"model.layers.1.{part}.{leaf}")
            weight = materialize(*layer.described, torch.float32)
            parameter = f"model.layers.1.{part}.{leaf}.weight"
            assert torch.equal(names.from_gguf(parameter, torch.tensor(read[names.of(parameter)])), weight)


def test_as_an_adapter_it_is_plain_lora_and_says_so(tmp_path):
    run = aware_run(tmp_path / "made")
    report = export_run(run, tmp_path / "out", ExportSettings("peft"))
    assert any("not quite what was trained" in note for note in report["notes"])


def test_other_weights_than_its_own_are_refused(tmp_path):
    run = aware_run(tmp_path / "made")
    with pytest.raises(ModelError, match="trained to be merged into its nf4 weights"):
        merge_run(run, tmp_path / "out", MergeSettings(base="original", rows=0))


def test_codes_that_training_rows_choose_are_nearer_to_the_trained_model_than_stochastic_ones(tmp_path):
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", lora={"rank": 4, "alpha": 8})
    path = run / "adapter" / "adapter_model.safetensors"
    replace_adapter(run, {name: tensor * (4 if "lora_B" in name else 1) for name, tensor in load_file(path).items()})
    report = merge_run(run, tmp_path / "chosen", MergeSettings(quantize="nf4", rows=6))
    (tmp_path / "train.jsonl").unlink()
    other = merge_run(run, tmp_path / "stochastic", MergeSettings(quantize="nf4", rows=6))
    chosen, stochastic = (found["models"]["merged, then nf4"]["kl"] for found in (report, other))
    assert 0 < chosen < 0.5 * stochastic
    assert not any("stochastically" in note for note in report["notes"])
    assert "train.jsonl" in other["notes"][-1] and "rounded stochastically instead" in other["notes"][-1]


def test_a_training_row_without_room_among_them_is_left_out(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", lora={"rank": 4, "alpha": 8})
    path = tmp_path / "train.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[1] = rows[1].replace("1?", "1" * 30 + "?")
    path.write_text("".join(rows))
    trained = open_trained(run)
    short, long, *_ = own_codes.calibration_rows(trained).row_lengths
    monkeypatch.setattr(own_codes, "CALIBRATION_TOKENS", long - 1)
    batch = own_codes.calibration_rows(trained)
    assert batch.row_lengths[0] == short and max(batch.row_lengths) < long
    report = merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=4))
    assert not any("stochastically" in note for note in report["notes"])
    monkeypatch.setattr(own_codes, "CALIBRATION_TOKENS", 3)
    assert sum(own_codes.calibration_rows(trained).row_lengths) <= long
