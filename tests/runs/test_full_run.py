"""A run of full fine-tuning, as a user has it: what it leaves is a model, used and resumed like any run."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_files import MERGES, save_tiny, write_recipe
from tiny_runs import stop_at, summary_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import Interrupted, ModelError, RecipeError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.serve.engine import Engine
from qlora_lite.files import sha256
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.compare import compare_runs
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import stages
from qlora_lite.runs.run import run_recipe


def full_recipe(folder, model, *overrides, **sections):
    """A recipe of full fine-tuning: the tests' own without LoRA weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_recipe(folder, model, adapter={"method": "full"}, **sections)
    settings = yaml.safe_load(path.read_text())
    del settings["lora"]
    settings["model"]["quant"] = "none"
    settings["train"] |= {"optimizer": "adamw_8bit", "learning_rate": 0.003, "save_every_steps": 2}
    path.write_text(yaml.safe_dump(settings))
    return load_recipe(path, overrides)


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A finished run, and what the base model's file was."""
    before = sha256(model_folder / "model.safetensors")
    folder = run_recipe(full_recipe(tmp_path_factory.mktemp("full"), model_folder))
    assert sha256(model_folder / "model.safetensors") == before
    return folder


def test_it_leaves_a_model_folder_that_transformers_loads(run, model_folder):
    model, tokenizer = (auto.from_pretrained(run / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    base = load_file(model_folder / "model.safetensors")
    assert all(
        not torch.equal(tensor, base[name]) for name, tensor in load_file(run / "model/model.safetensors").items()
    )
    assert model.dtype == torch.float32 and tokenizer.chat_template == (run / "template.jinja").read_text()
    assert {path.name for path in run.iterdir()} & {"adapter", "adapter-last", "model-last"} == set()
    assert summary_of(run)["model_sha256"] == sha256(run / "model" / "model.safetensors")


def test_it_is_evaluated_answers_and_is_served_from_its_model(run):
    summary, trained = summary_of(run), open_trained(run)
    found = evaluate_recipe(trained.recipe, trained.adapter, 2)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert found["eval_loss"] < summary["eval_loss_before"]
    session = open_session(run)
    sample = summary["samples"][0]
    session.say(sample["question"])
    assert session.reply(False).startswith(sample["after"])
    assert compare_runs(run, answers=0)["models"][0]["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert Engine(session.tasks, 1).names == (run.name,)


@pytest.mark.parametrize("overrides", [[], ["adapter.switch_every=2"]], ids=["", "blocks in turn"])
def test_a_stopped_run_is_resumed_to_the_bit_and_can_be_used_meanwhile(run, model_folder, tmp_path, overrides):
    if overrides:
        run = run_recipe(full_recipe(tmp_path / "whole", model_folder, *overrides))
        before, after = (load_file(at / "model.safetensors") for at in (model_folder, run / "model"))
        assert [name for name in after if torch.equal(after[name], before[name])] == [
            name for name in after if "layers" not in name
        ]
    recipe = full_recipe(tmp_path, model_folder, *overrides)
    with pytest.raises(Interrupted):
        run_recipe(recipe, stop_at(3))
    assert open_run(tmp_path / "out").adapter.name == "model-last"
    run_recipe(recipe, resume="")
    assert sha256(tmp_path / "out/model/model.safetensors") == sha256(run / "model/model.safetensors")
    assert open_run(tmp_path / "out").adapter.name == "model" and not (tmp_path / "out" / "model-last").exists()


def test_blocks_that_are_trained_in_turn_are_counted_as_memory_from_the_first_on(model_folder, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(stages, "mapped_bytes", lambda tensors: counted.append([*tensors]) or 0)
    folder = run_recipe(full_recipe(tmp_path, model_folder, "adapter.switch_every=2", "train.max_steps=1"))
    blocks = [tensor for name, tensor in load_file(model_folder / "model.safetensors").items() if "layers" in name]
    assert summary_of(folder)["trainable_parameters"] == sum(tensor.numel() for tensor in blocks)
    assert counted and not any(isinstance(tensor, torch.nn.Parameter) for tensors in counted for tensor in tensors)


def test_what_needs_an_adapter_or_the_base_model_is_refused_with_what_to_do(run, tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter: its model is a folder of its own, .*nothing to merge"):
        merge_run(run, tmp_path / "merged", MergeSettings())
    for form in ("peft", "vllm", "gguf-adapter"):
        with pytest.raises(ModelError, match=r"has no adapter: .* --to gguf and ollama convert it"):
            export_run(run, tmp_path / form, ExportSettings(form))
    for use in (lambda: compare_runs(run, with_base=True), lambda: open_session(run, base=True)):
        with pytest.raises(ModelError, match="trained all weights of its base model"):
            use()
    with pytest.raises(ModelError, match="needs no base model: leave out --model"):
        open_trained(run, str(tmp_path))


def test_commands_refuse_the_base_of_such_a_run_and_name_what_was_measured(run, command):
    code, _, err = command("evaluate", run, "--base")
    assert code and "trained all weights of its base model, which is another model now" in err
    code, out, _ = command("evaluate", run, "--rows", "0")
    assert code == 0 and "none: all weights were trained" in out


def test_a_damaged_model_and_a_run_without_one_are_refused(run, model_folder, tmp_path):
    recipe = full_recipe(tmp_path, model_folder)
    run_recipe(recipe)
    file = tmp_path / "out" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model is damaged: its SHA-256 is not the one"):
        open_run(tmp_path / "out")
    (tmp_path / "out" / "model" / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"has no model; .* the newest checkpoint is of step 6\. To resume"):
        open_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.quant=nf4"], "model.quant = nf4: full fine-tuning trains 16-bit weights; write model.quant: none"),
        (["model.compute_dtype=float16"], "no updates of float16 weights; write bfloat16 or float32"),
        (["lora.rank=8"], "lora.rank: only with adapter.method dora or lora; remove one"),
        (["train.loraplus_lr_ratio=4"], "train.loraplus_lr_ratio = 4: not possible with adapter.method full"),
        (["memory.head=host"], "memory.head = host: not possible with adapter.method full; write device"),
        (["memory.resident_layers=1"], "memory.resident_layers: streamed weights are trained one at a time"),
        (["memory.optimizer_in_backward=true"], "write train.max_grad_norm: 0"),
        (["adapter.switch_every=5", "train.compile=true"], "adapter.switch_every: not possible with train.compile"),
        (["adapter.switch_every=5", "memory.resident_layers=1"], "all blocks are streamed, or none; write 0 or all"),
        (["adapter.switch_every=5", "train.optimizer=paged_adamw_8bit"], "paged memory is never given back"),
        (["adapter.switch_every=5", "adapter.method=lora"], "adapter.switch_every: only with adapter.method full"),
    ],
)
def test_settings_that_it_cannot_have_are_faults_of_the_recipe(model_folder, tmp_path, overrides, said):
    with pytest.raises(RecipeError) as caught:
        full_recipe(tmp_path, model_folder, *overrides)
    assert said in str(caught.value)


def test_without_a_word_on_quantisation_the_cure_is_named(model_folder, tmp_path):
    path = write_recipe(tmp_path, model_folder, adapter={"method": "full"})
    with pytest.raises(RecipeError, match=r"adapter\.method = full: full fine-tuning trains 16-bit weights; write"):
        load_recipe(path)


def test_it_is_exported_as_a_gguf_file_with_its_models_logits(tmp_path):
    save_tiny(tmp_path / "base", merges=MERGES)
    folder = run_recipe(full_recipe(tmp_path, tmp_path / "base", "train.max_steps=2", "train.metrics_examples=0"))
    report = export_run(folder, tmp_path / "gguf", ExportSettings("gguf"))
    assert report["distance"] < 0.01 and report["layers"] == 0 and "share" not in report
    assert (tmp_path / "gguf" / "model.gguf").is_file()
