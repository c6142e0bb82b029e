"""What ``merge`` measures, refuses and writes beside the weights."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny, random_batch
from tiny_files import byte_tokenizer, save_tiny
from tiny_runs import END_OF_ANSWER, make_run, replace_adapter, tiny_run
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, LlamaConfig

from qlora_lite.errors import DataError, DoesNotFitError, ModelError, OutputError, RecipeError
from qlora_lite.export import merge
from qlora_lite.export.agreement import compare, outputs
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.files import sha256
from qlora_lite.models.load import load_model, use_row_attention
from qlora_lite.models.merge import Merged, _write_configs
from qlora_lite.models.save import save_quantized

GIB = 2**30


@pytest.fixture(scope="module")
def original_run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(original_run, tmp_path):
    """A copy of a run of a tiny Llama, and of its model beside it."""
    return shutil.copytree(original_run.parent, tmp_path / "copy") / "run"


def refusal(error, run, out, model=None, unfinished=False, **settings) -> str:
    with pytest.raises(error) as caught:
        merge_run(run, out, MergeSettings(**settings), model, unfinished)
    assert not out.exists(), "a refused merge leaves nothing behind"
    return str(caught.value)


def test_the_comparison_is_that_of_whole_logits_in_float64():
    batch = random_batch((40, 31, 50))
    models = [build_tiny("gemma2", seed=seed) for seed in (0, 1)]
    for model in models:
        use_row_attention(model)
    found = compare(*(outputs(model, [batch]) for model in models))

    said, start = [[], []], 0
    for length in batch.row_lengths:
        rows = slice(start, start + length)
        for place, model in enumerate(models):
            said[place].append(model(input_ids=batch.input_ids[:, rows]).logits[0].double())
        start += length
    is_target = batch.labels != -100
    p, q = (torch.log_softmax(torch.cat(each)[is_target], -1) for each in said)
    assert found.loss == pytest.approx(functional.nll_loss(q, batch.labels[is_target]).item(), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 0 < found.agreement < 1 and found.kl > 0.1


def test_the_report_compares_base_merged_and_quantised_again_with_the_trained_model(run, tmp_path):
    report = merge_run(run, tmp_path / "out", MergeSettings(dtype="f32", rows=4))
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report
    models = report["models"]
    assert list(models) == ["base", "trained", "merged", "merged, then nf4"]
    assert models["trained"]["kl"] == 0 and models["trained"]["agreement"] == 1
    assert models["merged"]["kl"] < 1e-7 and models["merged"]["agreement"] == 1
    assert models["merged"]["loss"] == pytest.approx(models["trained"]["loss"], rel=1e-5)
    assert models["merged, then nf4"]["kl"] > 100 * models["merged"]["kl"]
    assert models["base"]["kl"] > models["merged, then nf4"]["kl"]
    assert (report["rows"], report["measured_on"], report["layers"]) == (4, "data.eval", 14)
    assert all(math.isfinite(value) for found in models.values() for value in found.values())


def test_merging_into_the_original_weights_is_another_model_and_says_so(run, tmp_path):
    kept = merge_run(run, tmp_path / "nf4", MergeSettings(dtype="f32", rows=4))
    other = merge_run(run, tmp_path / "original", MergeSettings(dtype="f32", base="original", rows=4))
    assert other["models"]["merged"]["kl"] > 1000 * kept["models"]["merged"]["kl"]
    assert any("the model differs" in note for note in other["notes"])
    assert not any("loses" in note for note in other["notes"]) and "rounded once more" in other["notes"][-1]
    assert kept["notes"] == ["use it with model.quant: none; quantised again it loses much or all of the update"]


@pytest.mark.parametrize("asked", ["nf4", "none"])
def test_a_run_of_a_4_bit_checkpoint_is_merged_into_its_weights_whatever_was_asked_for(asked, tmp_path):
    save_tiny(tmp_path / "plain", intermediate_size=128)
    save_quantized(
        load_model(str(tmp_path / "plain"), "fp4", True, torch.float32), tmp_path / "packed", byte_tokenizer()
    )
    run = make_run(tmp_path, tmp_path / "packed", [f"model.quant={asked}", "model.double_quant=false"])
    for base, text in (("original", "leave out --base"), ("nf4", "trained on fp4 weights, not on nf4: leave out")):
        assert text in refusal(ModelError, run, tmp_path / "out", base=base)
    for base in (None, "fp4"):
        report = merge_run(run, tmp_path / f"out-{base}", MergeSettings(base, dtype="f32", rows=4))
        assert report["merged_into"] == "fp4" and report["models"]["merged"]["kl"] < 1e-7


@pytest.mark.parametrize("base", [None, "original"])
def test_quantised_it_is_the_4_bit_checkpoint_that_was_measured(base, run, tmp_path, monkeypatch):
    measured, build = [], merge.build_to_use

    def building(recipe, *arguments, **options):
        measured.append(sha256(Path(recipe.model.path) / "model.safetensors"))
        return build(recipe, *arguments, **options)

    monkeypatch.setattr(merge, "build_to_use", building)
    path = run / "adapter" / "adapter_model.safetensors"
    replace_adapter(run, {name: tensor * (4 if "lora_B" in name else 1) for name, tensor in load_file(path).items()})
    report = merge_run(run, tmp_path / "out", MergeSettings(base, quantize="nf4", rows=4))
    assert any("own codes" in note for note in report["notes"]) == (base is None)
    assert measured[-1] == sha256(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(type(module).__name__ == "Linear4bit" for module in loaded.modules())
    assert loaded.generation_config.eos_token_id == [2, END_OF_ANSWER], "it stops where an answer was trained to end"
    assert not any("rounded once, to" in note for note in report["notes"]), "of a model that is not written"
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "merge_report.json").exists()
    assert report["models"]["merged, then nf4"]["kl"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "out"}, "the 16-bit model is gone"


def test_a_4_bit_model_in_which_rounding_took_the_adapter_away_is_refused_and_never_left_unmeasured(run, tmp_path):
    path = run / "adapter" / "adapter_model.safetensors"
    small = {name: tensor * (0.02 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    replace_adapter(run, small)
    text = refusal(ModelError, run, tmp_path / "out", quantize="nf4", rows=4)
    assert "in 4 bits the merged model is nearly the base" in text and "away; try --base original, write 16" in text
    text = refusal(ModelError, run, tmp_path / "out", base="original", quantize="nf4", rows=4)
    assert "the original weights are others than those that the run saw, and" in text.lower()
    assert "leave out --base, write 16 bit" in text
    assert {entry.name for entry in tmp_path.iterdir()} == {"copy"}
    assert "needs --rows 1 or more" in refusal(ModelError, run, tmp_path / "out", quantize="nf4", rows=0)


def test_what_each_type_of_16_bits_keeps_of_the_update_is_in_the_report(run, tmp_path):
    exact = merge_run(run, tmp_path / "f32", MergeSettings("original", "f32", rows=0))
    base = load_file(run.parent / "model" / "model.safetensors")
    update, kept = 0.0, {"bf16": 0.0, "f16": 0.0}
    for name, merged in load_file(tmp_path / "f32" / "model.safetensors").items():
        before = base[name].double()
        update += (merged.double() - before).square().sum().item()
        for half, dtype in {"bf16": torch.bfloat16, "f16": torch.float16}.items():
            kept[half] += ((merged.to(dtype).double() - before) * (merged.double() - before)).sum().item()
    for half, share in kept.items():
        report = merge_run(run, tmp_path / half, MergeSettings("original", half, rows=0))
        assert report["update_kept"] == exact["update_kept"]
        assert report["update_kept"][half] == pytest.approx(share / update, abs=1e-5)
        (note,) = [note for note in report["notes"] if "rounded once, to" in note]
        assert f"to {half}, which keeps {share / update:.1%}" in note and ("--dtype f16" in note) == (half == "bf16")


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma3Config])
def test_a_longer_vocabulary_is_written_also_where_the_base_leaves_it_to_its_class(kind, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    text = kind().get_text_config().to_dict()  # as the hub has Gemma 3: without what is the class's default
    said = {name: text[name] for name in ("model_type", "hidden_size")}
    said = {"model_type": "gemma3", "text_config": said} if kind is Gemma3Config else said
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    longer = kind.from_dict(said)
    longer.get_text_config().vocab_size = text["vocab_size"] + 2
    made = SimpleNamespace(
        config=longer,
        files=SimpleNamespace(folder=tmp_path / "base", gguf_file=None),
        architecture="Some",
        base=SimpleNamespace(in_memory=False),
        has_new_tokens=True,
    )
    _write_configs(made, tmp_path / "out", torch.bfloat16, [2])
    assert AutoConfig.from_pretrained(tmp_path / "out").get_text_config().vocab_size == text["vocab_size"] + 2


def test_a_4_bit_head_is_not_in_what_is_written_in_4_bit_and_the_report_says_so(tmp_path):
    save_tiny(tmp_path / "model", tie_word_embeddings=False)
    run = make_run(tmp_path / "made", tmp_path / "model", ["model.quant_head=true", "train.merge_aware=nf4"])
    said = "the run computed with a 4-bit copy of the head; the merged model has the original head"
    assert said in merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=2))["notes"]
    assert said not in merge_run(run, tmp_path / "dense", MergeSettings(rows=2))["notes"]


def test_layers_that_transformers_does_not_load_in_4_bit_are_refused_before_anything_is_merged(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "falcon")
    run = make_run(tmp_path / "made", tmp_path / "model", [])
    monkeypatch.setattr(merge, "_write_dense", None)
    with pytest.raises(ModelError, match="does not load 4-bit weights into layers of class FalconLinear"):
        merge_run(run, tmp_path / "out", MergeSettings(quantize="nf4", rows=2))


def test_without_rows_nothing_is_measured_and_the_data_is_not_needed(tmp_path):
    run = tiny_run(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    assert "models" not in merge_run(run, tmp_path / "out", MergeSettings(rows=0))


def test_a_weight_too_large_for_the_type_is_named_whether_or_not_rows_are_measured(tmp_path):
    save_tiny(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, file, {"format": "pt"})
    run = make_run(tmp_path, tmp_path / "model")
    for base, rows in (("original", 0), ("nf4", 4)):
        said = refusal(ModelError, run, tmp_path / "out", base=base, dtype="f16", rows=rows)
        assert "model.norm.weight is too large for float16" in said
    report = merge_run(run, tmp_path / "out", MergeSettings("original", rows=0))
    assert report["update_kept"]["f16"] is None and "the largest weight exceeds f16" in report["notes"][1]


def test_a_16_bit_run_is_not_told_that_its_weights_were_quantised(tmp_path):
    save_tiny(tmp_path / "plain")
    run = make_run(tmp_path, tmp_path / "plain", ["model.quant=none"])
    report = merge_run(run, tmp_path / "out", MergeSettings(dtype="f32", rows=0))
    assert not any("quantised weights" in note for note in report["notes"])


def test_training_rows_are_measured_on_where_there_are_no_others(tmp_path):
    run = tiny_run(tmp_path, overrides=["data.eval=null", "train.metrics_examples=0"])
    assert merge_run(run, tmp_path / "out", MergeSettings(rows=3))["measured_on"] == "data.train"


def test_rows_that_are_gone_are_an_error_that_names_the_way_out(tmp_path):
    run = tiny_run(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    assert "--rows 0" in refusal(DataError, run, tmp_path / "out")


def test_an_output_folder_with_something_in_it_is_refused_and_kept(run, tmp_path):
    model = run.parent / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(OutputError, match="is not an empty folder; choose another --out"):
        merge_run(run, model, MergeSettings(rows=0))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.fixture
def signalled(monkeypatch):
    """Send this process a signal at a call of a function."""

    def at_call(owner, name, call, number):
        real, calls = getattr(owner, name), iter(range(10**6))

        def wrapped(*arguments, **options):
            if next(calls) == call:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)

    return at_call


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
@pytest.mark.parametrize("weight", [0, 3, 8, 14, 20])
def test_an_interrupted_merge_leaves_nothing_and_can_be_done_again(run, tmp_path, command, signalled, number, weight):
    earlier = signal.getsignal(number)
    signalled(Merged, "weight", weight, number)
    code, out, _ = command("merge", run, "--out", tmp_path / "out", "--rows", 0)
    assert code == 130 and "wrote" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    assert signal.getsignal(number) is earlier
    assert command("merge", run, "--out", tmp_path / "out", "--rows", 0)[0] == 0
    merge_run(run, tmp_path / "whole", MergeSettings(rows=0))
    files = [tmp_path / name / "model.safetensors" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@SIGNALS
@pytest.mark.parametrize("options", [(), ("--quantize", "nf4")])
def test_a_merge_interrupted_while_it_measures_leaves_nothing(run, tmp_path, command, signalled, options, number):
    from qlora_lite.export import merge

    signalled(merge, "outputs", 2, number)  # of the merged model
    code, _, err = command("merge", run, "--out", tmp_path / "out", *options, "--rows", 4)
    assert code == 130 and err.splitlines()[-1] == "interrupted"
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_memory_that_runs_out_over_the_measurement_names_the_way_without_it(run, tmp_path, monkeypatch):
    from qlora_lite.export import merge

    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def gone(*_arguments):
        raise FileNotFoundError(2, "No such file or directory", "/usr/bin/gcc")

    for failing, error in ((full, DoesNotFitError), (gone, ModelError)):
        monkeypatch.setattr(merge, "outputs", failing)
        said = refusal(error, run, tmp_path / "out")
        assert "measure" in said and "--rows 0 merges without measuring" in said and "cannot write" not in said


@SIGNALS
@pytest.mark.parametrize("form", ["peft", "gguf-adapter"])
def test_an_export_interrupted_before_it_is_proven_leaves_nothing(run, tmp_path, command, signalled, form, number):
    from qlora_lite.export import adapters
    from qlora_lite.ext.gguf import forms

    signalled(adapters if form == "peft" else forms, "check_change", 0, number)
    assert command("export", run, "--to", form, "--out", tmp_path / "out")[0] == 130
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_too_little_disk_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10 * GIB, 10 * GIB, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    text = refusal(OutputError, run, tmp_path / "out", rows=0)
    assert "needs 64.2 MiB and its disk has 1000 B free" in text


def test_an_adapter_for_a_model_of_another_shape_names_the_layer_and_both_shapes(run, tmp_path):
    save_tiny(tmp_path / "other", hidden_size=128)
    forget_fingerprint(run)
    text = refusal(ModelError, run, tmp_path / "out", str(tmp_path / "other"), rows=0)
    assert "q_proj has shapes [(4, 64), (64, 4)], its layer is 128 x 128" in text


def test_a_base_with_other_weights_is_refused_with_both_fingerprints(run, tmp_path):
    save_tiny(tmp_path / "other", seed=1)
    text = refusal(ModelError, run, tmp_path / "out", str(tmp_path / "other"), rows=0)
    recorded = json.loads((run / "summary.json").read_text())["base_fingerprint"]
    assert recorded in text and str(tmp_path / "other") in text and "is another model" in text


def test_a_base_that_moved_is_found_where_one_says(tmp_path):
    run = tiny_run(tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    text = refusal(ModelError, run, tmp_path / "out", rows=0)
    assert "is not where it was" in text and "--model PATH" in text
    merge_run(run, tmp_path / "out", MergeSettings(rows=0), str(tmp_path / "elsewhere"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_nan_missing_and_empty_weights_are_refused(run, tmp_path):
    path = run / "adapter" / "adapter_model.safetensors"
    good = load_file(path)
    names = sorted(good)

    def with_change(change):
        tensors = {name: tensor.clone() for name, tensor in good.items()}
        change(tensors)
        replace_adapter(run, tensors)
        return refusal(ModelError, run, tmp_path / "out", rows=0)

    assert f"{names[0]} is not finite" in with_change(lambda t: t[names[0]].view(-1)[:1].fill_(float("nan")))
    text = with_change(lambda t: [t.pop(name) for name in names[:6:2]])
    assert all(f"{name} is missing" in text for name in names[:6:2]), "all of them in one error"
    zeros = with_change(lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name])
    assert "changes nothing: every lora_B is zero" in zeros


def test_a_half_finished_run_offers_the_adapter_it_has(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text()) | {"status": "interrupted"}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "adapter").rename(run / "adapter-last")
    text = refusal(RecipeError, run, tmp_path / "out", rows=0)
    assert "status interrupted" in text and f"add --unfinished to use its adapter {run / 'adapter-last'}." in text
    assert f"To resume: qlora-lite train {run / 'recipe.yaml'} --resume {run}" in text
    merge_run(run, tmp_path / "out", MergeSettings(rows=0), unfinished=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_without_a_recorded_fingerprint_is_used(run, tmp_path):
    forget_fingerprint(run)
    merge_run(run, tmp_path / "out", MergeSettings(rows=0))


def forget_fingerprint(run):
    summary = json.loads((run / "summary.json").read_text())
    del summary["base_fingerprint"]
    (run / "summary.json").write_text(json.dumps(summary))
