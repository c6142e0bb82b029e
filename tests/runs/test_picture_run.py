"""Runs of vision encoders as a user has them: trained, resumed, used by commands and by peft, and refused."""

import json
import os
import re
import shutil
from contextlib import nullcontext

import numpy as np
import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from tiny_heads import save_headless
from tiny_pictures import (
    CLASSES,
    COLOURS,
    ENCODERS,
    drawn,
    encoded,
    hub_of,
    mask_recipe,
    picture_recipe,
    save_encoder,
    write_parquet,
    write_pictures,
)
from tiny_runs import evaluations, run_whole_and_stopped, stop_at, summary_of
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.cli.main import cli
from qlora_lite.data.picture_files import decode
from qlora_lite.errors import CheckpointError, DataError, Interrupted, ModelError, OutputError, RecipeError
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.label import label_rows
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.models.load import load_model
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.prepare.plan import plan_recipe
from qlora_lite.prepare.preflight import preflight
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(folder / name, name) for name in ENCODERS}


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A finished run with augmentations, and its recipe."""
    train = {"max_steps": 16, "eval_every_steps": 8, "save_every_steps": 4, "lr_scheduler": "constant"}
    recipe = picture_recipe(tmp_path_factory.mktemp("run"), bases["dinov2"], train=train, data={"augment": "crop-flip"})
    return run_recipe(load_recipe(recipe)), recipe


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)


def test_it_learns_and_writes_down_scores_labels_and_confusion(run):
    folder, _ = run
    summary = summary_of(folder)
    assert summary["metrics"]["after"]["accuracy"]["value"] == 1.0
    neighbour = [summary["metrics"][when]["accuracy_nearest_neighbour"] for when in ("before", "after")]
    assert neighbour[1]["value"] == 1.0 and [each["examples"] for each in neighbour] == [8, 8]
    assert summary["labels"] == ["cool", "hot"] and summary["confusion"]["after"] == [[4, 0], [0, 4]]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    report = json.loads((folder / "data.json").read_text())
    assert report["sources"][0]["format"] == "pictures" and report["labels"]["train"]["baseline_accuracy"] == 0.5
    shown = json.loads((folder / "pictures.json").read_text())
    assert len(shown["given"]) == len(shown["before"]) == len(shown["after"]) == 8
    assert [one["label"] for one in shown["after"]] == [one["label"] for one in shown["given"]]
    assert {each["label"] for one in shown["after"][:4] for each in one["neighbours"]} == {"cool"}
    assert shown["before"] != shown["after"]
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 8 * (1 + 2 * 4) and "Pictures before and after" in page
    measured, predicted = (summary["plan"][name] for name in ("measured_peak_bytes", "predicted_peak_bytes"))
    assert measured == pytest.approx(predicted, rel=0.3)  # of a process of 300 MiB; the ledger is compared elsewhere


def test_a_stopped_run_with_augmentations_is_resumed_to_the_bit(run, tmp_path):
    folder, recipe = run

    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'out'}"])
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(7))
    assert run_recipe(settings, resume=tmp_path / "out") == tmp_path / "out"
    one, other = (load_file(path / "adapter-last" / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [
        [line["loss"] for line in lines(path / "metrics.jsonl") if "loss" in line]
        for path in (folder, tmp_path / "out")
    ]
    assert losses[0] == losses[1]


def test_evaluations_do_not_follow_the_planned_micro_batches(bases, tmp_path):
    train = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4, "eval_every_steps": 1}
    recipe = load_recipe(picture_recipe(tmp_path, bases["dinov2"], train=train, memory={"micro_batches": "auto"}))
    whole = run_whole_and_stopped(recipe, tmp_path)
    assert summary_of(whole)["plan"]["chosen"]["train.micro_batch_size"] > 1
    resumed, trained = run_recipe(recipe, resume=tmp_path / "out"), open_trained(whole, has_head=True)
    assert evaluations(resumed) == evaluations(whole)
    assert evaluate_recipe(trained.recipe, trained.adapter, 0)["eval_loss"] == summary_of(whole)["eval_loss_after"]


def test_another_picture_or_processor_is_another_run(bases, tmp_path):
    base = shutil.copytree(bases["vit"], tmp_path / "base")
    recipe = picture_recipe(tmp_path, base, train={"save_every_steps": 2})

    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), stop_at(3))
    changed = tmp_path / "train" / "hot" / "000.png"
    before = changed.read_bytes()
    drawn("hot", 77).save(changed)
    with pytest.raises(CheckpointError, match="other training rows than before"):
        run_recipe(load_recipe(recipe), resume=tmp_path / "out")
    changed.write_bytes(before)
    settings = tmp_path / "base" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.4"))
    with pytest.raises(CheckpointError, match="picture processor"):
        run_recipe(load_recipe(recipe), resume=tmp_path / "out")
    settings.write_text(settings.read_text().replace("0.4", "0.5"))
    run_recipe(load_recipe(recipe), resume=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pictures.json").read_text()).keys() == {"given", "before", "after"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", ["dinov2", "vit", "siglip", "clip"])
def test_real_peft_and_transformers_give_the_probabilities_that_predict_wrote(bases, name, tmp_path):
    recipe = picture_recipe(tmp_path, bases[name])
    folder = run_recipe(load_recipe(recipe))
    adapter = folder / "adapter"
    assert label_rows(folder, tmp_path / "eval", tmp_path / "out.jsonl").rows == 8
    base = AutoModelForImageClassification.from_pretrained(bases[name], config=AutoConfig.from_pretrained(adapter))
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    processor = AutoImageProcessor.from_pretrained(adapter, backend="pil")
    assert model.config.id2label == {0: "cool", 1: "hot"}
    for row in lines(tmp_path / "out.jsonl"):
        with torch.no_grad():
            shares = model(**processor(decode(row["picture"]), return_tensors="pt")).logits.softmax(-1)[0]
        assert list(row["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert row["reference"] == os.path.basename(os.path.dirname(row["picture"]))


def test_predict_takes_a_folder_a_table_and_an_adapter_alone(run, tmp_path):
    folder, recipe = run
    rows = recipe.parent / "eval" / "hot"
    result = command("predict", folder, "--rows", rows, "--out", tmp_path / "a.jsonl")
    assert result.exit_code == 0 and "4 rows labelled" in result.output
    found = lines(tmp_path / "a.jsonl")
    assert {row["label"] for row in found} == {"hot"} and "reference" not in found[0]
    table = tmp_path / "rows.csv"
    table.write_text("path\n" + "".join(f"{path}\n" for path in sorted(rows.iterdir())))
    label_rows(folder, table, tmp_path / "b.jsonl")
    assert [row["probabilities"] for row in lines(tmp_path / "b.jsonl")] == [row["probabilities"] for row in found]
    shutil.copytree(folder / "adapter", tmp_path / "alone")
    label_rows(tmp_path / "alone", rows, tmp_path / "c.jsonl")
    alone = [row["probabilities"]["hot"] for row in lines(tmp_path / "c.jsonl")]
    assert alone == pytest.approx([row["probabilities"]["hot"] for row in found], abs=0.05)  # in bfloat16, maybe
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"none")
    with pytest.raises(DataError, match="not a whole picture"):
        label_rows(folder, tmp_path / "bad", tmp_path / "d.jsonl")


def test_predict_says_that_its_file_cannot_be_written_before_anything_is_read_and_makes_new_folders(run, tmp_path):
    folder, recipe = run
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        label_rows(folder, "no rows", tmp_path / "file" / "out.jsonl", "no model")
    label_rows(folder, recipe.parent / "eval", out := tmp_path / "new" / "one" / "out.jsonl")
    assert len(out.read_text().splitlines()) == 8


def test_push_says_that_it_is_not_for_such_a_run_before_it_asks_for_a_token(run, monkeypatch):
    monkeypatch.setattr("qlora_lite.ext.hub.push.get_token", lambda: None)
    with pytest.raises(RecipeError, match="labels pictures"):
        command("push", run[0], "owner/name", "--yes")


def test_evaluate_measures_it_again_without_augmentations(run):
    folder, _ = run
    trained, summary = open_trained(folder, has_head=True), summary_of(folder)
    found = evaluate_recipe(trained.recipe, trained.adapter, 0)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert found["confusion"]["matrix"] == summary["confusion"]["after"]


@pytest.mark.parametrize("how", ["dora", "probe", "nf4", "held out", "budget"])
def test_other_ways_to_train_it(bases, tmp_path, how):
    sections = {
        "dora": {"adapter": {"method": "dora"}},
        "probe": {"lora": {"targets": []}},
        "nf4": {"model": {"quant": "nf4"}},
        "held out": {"data": {"eval_share": 0.25}},
        "budget": {"memory": {"micro_batches": "auto", "budget": "2GiB"}},
    }[how]
    path = picture_recipe(tmp_path, bases["dinov2"], **sections)
    if how == "held out":
        settings = yaml.safe_load(path.read_text())
        del settings["data"]["eval"]
        path.write_text(yaml.safe_dump(settings))
    recipe = load_recipe(path)
    assert recipe.model.quant == ("nf4" if how == "nf4" else "none")
    summary = summary_of(run_recipe(recipe))
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    if how == "held out":
        assert summary["metrics"]["after"]["accuracy"]["examples"] == 6


def test_full_fine_tuning_leaves_a_classifier_that_transformers_loads(bases, tmp_path):
    path = picture_recipe(tmp_path, bases["dinov2"], adapter={"method": "full"}, train={"learning_rate": 0.002})
    settings = yaml.safe_load(path.read_text())
    del settings["lora"]
    path.write_text(yaml.safe_dump(settings))
    folder = run_recipe(load_recipe(path))
    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model", backend="pil")
    label_rows(folder, tmp_path / "eval", tmp_path / "out.jsonl")
    for row in lines(tmp_path / "out.jsonl"):
        with torch.no_grad():
            shares = model(**processor(decode(row["picture"]), return_tensors="pt")).logits.softmax(-1)[0]
        assert list(row["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_segmentation_is_learned_resumed_evaluated_and_written_as_masks(bases, tmp_path):
    recipe = mask_recipe(tmp_path, bases["dinov2"], data={"augment": "flip"}, train={"save_every_steps": 10})
    folder = run_recipe(load_recipe(recipe))
    summary = summary_of(folder)
    before, after = (summary["metrics"][when]["miou"]["value"] for when in ("before", "after"))
    assert after > 0.6 > before and summary["labels"] == ["0", "1", "2"]
    assert sum(map(sum, summary["confusion"]["after"])) == 6 * (28 * 28 - 1)
    trained = open_trained(folder, has_head=True)
    assert evaluate_recipe(trained.recipe, trained.adapter, 0)["metrics"]["miou"]["value"] == pytest.approx(after)

    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'again'}"])
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(13))
    mask = tmp_path / "masked" / "masks" / "003.png"
    before = mask.read_bytes()
    mask.write_bytes((tmp_path / "masked" / "masks" / "001.png").read_bytes())  # of the same classes
    with pytest.raises(CheckpointError, match="other labels than before"):
        run_recipe(settings, resume=tmp_path / "again")
    mask.write_bytes(before)
    shutil.move(tmp_path / "masked", tmp_path / "moved")
    moved = load_recipe(recipe, [f"output.dir={tmp_path / 'again'}", f"data.train={tmp_path / 'moved'}"])
    run_recipe(moved, resume=tmp_path / "again")
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)

    images = tmp_path / "masked-eval" / "images"
    assert label_rows(folder, images, tmp_path / "out.jsonl").rows == 6
    for row in lines(tmp_path / "out.jsonl"):
        with Image.open(row["mask"]) as given, Image.open(row["picture"].replace("images", "masks")) as mask:
            assert given.size == mask.size
            assert (np.asarray(given) == np.asarray(mask)).mean() > 0.8
        assert sum(row["shares"].values()) == pytest.approx(1)
    shutil.copytree(folder / "adapter", tmp_path / "alone")
    label_rows(tmp_path / "alone", images, tmp_path / "b.jsonl")
    for row, other in zip(lines(tmp_path / "out.jsonl"), lines(tmp_path / "b.jsonl"), strict=True):
        with Image.open(row["mask"]) as one, Image.open(other["mask"]) as two:
            assert (np.asarray(one) == np.asarray(two)).mean() > 0.95  # in bfloat16, maybe


def test_embeddings_bring_a_class_together_and_are_written_by_predict(bases, tmp_path):
    train = {"max_steps": 30, "lr_scheduler": "constant"}
    recipe = picture_recipe(tmp_path / "run", bases["dinov2"], task={"kind": "image-embedding"}, train=train)
    folder, rows = run_recipe(load_recipe(recipe)), tmp_path / "run" / "eval"
    scores = summary_of(folder)["metrics"]["after"]
    assert scores["accuracy_nearest_neighbour"]["value"] == 1.0 and scores["accuracy"]["value"] == 1.0
    shutil.copytree(folder / "adapter", tmp_path / "alone")
    written = []
    for trained in (folder, tmp_path / "alone"):
        label_rows(trained, rows, out := tmp_path / "found" / f"{trained.name}.jsonl")
        written.append(torch.tensor([line["embedding"] for line in lines(out)]))
    found, alone = written
    assert (found * alone).sum(1).min() > 0.999  # in bfloat16, maybe
    assert found.shape == (8, 64) and torch.allclose(found.norm(dim=1), torch.ones(8), atol=1e-5)
    is_hot = torch.tensor([line["reference"] == "hot" for line in lines(out)])
    alike, cosines = is_hot[:, None] == is_hot, found @ found.T
    assert is_hot.sum() == 4 and cosines[alike].min() > cosines[~alike].max()


def test_a_picture_with_a_mask_is_resized_whole(bases, tmp_path):
    base = shutil.copytree(bases["dinov2"], tmp_path / "base")
    middle = {"do_resize": True, "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 28}
    (base / "preprocessor_config.json").write_text(json.dumps(middle))
    recipes = picture_recipe(tmp_path / "a", base), mask_recipe(tmp_path / "b", base)
    assert [find_task(load_recipe(recipe)).reader(load_recipe(recipe)).resize for recipe in recipes] == [32, (28, 28)]


def test_a_mask_with_a_class_that_training_lacks_is_found_before(bases, tmp_path):
    recipe = mask_recipe(tmp_path, bases["vit"])
    Image.new("L", (28, 28), 7).save(tmp_path / "masked-eval" / "masks" / "101.png")
    with pytest.raises(DataError, match="the label '7' is none of those that are trained: 0, 1, 2"):
        run_recipe(load_recipe(recipe))


def test_labels_that_are_not_trained_are_named_with_what_to_do(bases, tmp_path):
    rare = write_pictures(tmp_path / "rare", 6)
    shutil.copytree(rare / "hot", tmp_path / "rare" / "warm", ignore=shutil.ignore_patterns("00[1-5]*"))
    pictures, masks = picture_recipe(tmp_path / "a", bases["vit"]), mask_recipe(tmp_path / "b", bases["vit"])
    cases = [
        (pictures, ["task.labels=[hot, warm]"], "'cool' is none of those that are trained: hot, warm; name it in task"),
        (pictures, [f"data.eval={rare}"], "'warm' is none of those that are trained: cool, hot; give training rows"),
        (
            pictures,
            [f"data.train={rare}", "data.eval=null", "data.eval_share=0.6"],
            "'warm' is none of those that are trained: cool, hot; data.eval_share held out all rows with it",
        ),
        (masks, ["task.labels=[a, b]"], "'2' is none of those that are trained: 0 (a), 1 (b); name it in task.labels"),
    ]
    for path, overrides, fault in cases:
        recipe = load_recipe(path, overrides)
        found = preflight(recipe, find_task(recipe).reader(recipe))
        with pytest.raises(DataError, match=re.escape(fault)):
            found.raise_if_unusable()


def test_classes_of_no_picture_and_of_one_are_spoken_of(bases, tmp_path):
    rare = write_pictures(tmp_path / "rare", 6)
    shutil.copytree(rare / "hot", rare / "warm", ignore=shutil.ignore_patterns("00[1-5]*"))
    (rare / "cold").mkdir()
    (rare / ".trash").mkdir()
    recipe = load_recipe(picture_recipe(tmp_path / "a", bases["vit"]), [f"data.train={rare}", "data.eval=null"])
    report = preflight(recipe, find_task(recipe).reader(recipe)).report
    assert report["sources"][0]["notes"] == ["no pictures in cold"]
    messages = [problem["message"] for problem in report["problems"]]
    assert messages == ["only one row has the label warm; give more rows of it, or leave it out"] and report["ok"]


def test_data_and_plan_speak_of_pictures_and_of_what_4_bits_save(bases, run):
    _, recipe = run
    said = command("data", recipe).output
    assert "(pictures)" in said and "24 read, 24 kept" in said and "tokens" not in said
    said = command("plan", recipe).output
    assert "4 pictures of 28 x 28 pixels" in said and "model.quant=nf4" in said
    assert json.loads(command("plan", recipe, "--json").output.splitlines()[-1])["fits"]
    settled = "memory.checkpointing=block", "memory.resident_layers=all", "--vram", "700MiB", "--json"
    found = json.loads(command("plan", recipe, *settled, "--max-resolution").output.splitlines()[-1])
    assert 0 < found["max_resolution"] < 8000 and found["max_resolution"] % 70 == 0  # patches of 14 pixels
    with pytest.raises(Exception, match="--max-tokens is for rows of tokens"):
        CliRunner().invoke(cli, ["plan", str(recipe), "--max-tokens"], catch_exceptions=False, standalone_mode=False)


def test_resolution_and_model_are_checked_before_anything_is_read(bases, tmp_path):
    recipe = picture_recipe(tmp_path, bases["dinov2"])
    with pytest.raises(ModelError, match=r"data.resolution 30 is no multiple of .* 14 pixels; write 28 or 42"):
        run_recipe(load_recipe(recipe, ["data.resolution=30"]))
    summary = summary_of(run_recipe(load_recipe(recipe, ["data.resolution=42", "train.max_steps=2"])))
    assert summary["steps"] == 2
    bert = save_headless(tmp_path / "bert", "bert")
    with pytest.raises(ModelError, match=r"\(bert\) is no vision encoder"):
        run_recipe(load_recipe(recipe, [f"model.path={bert}", f"output.dir={tmp_path / 'other'}"]))
    with pytest.raises(ModelError, match=r"reads pictures; write task\.kind: image-classification"):
        load_model(bases["dinov2"], "none", use_cache=False)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"data": {"max_tokens": 512}}, "data.max_tokens = 512: not possible with task.kind image-classification"),
        ({"data": {"overflow": "truncate"}}, "data.overflow = truncate: not possible"),
        ({"data": {"order": "by-length"}}, "data.order = by-length: not possible"),
        ({"memory": {"tile_tokens": 8}}, "memory.tile_tokens = 8: not possible"),
        ({"model": {"quant": "keep"}}, "model.quant = keep: not possible"),
        (
            {"model": {"keep_16bit": ["key"]}},
            "with model.quant none all layers are in 16 bit; remove it, or write model",
        ),
        ({"data": {"template": "plain"}}, "data.template = plain: for a language model"),
        ({"adapter": {"method": "full"}, "model": {"quant": "nf4"}}, "full fine-tuning trains 16-bit weights"),
        ({"task": {"labels": ["a"]}}, "one label is nothing to choose from"),
        ({"task": {"kind": "classification"}, "data": {"augment": "flip"}}, "data.augment: only with task.kind image"),
    ],
)
def test_settings_that_make_no_sense_for_pictures_are_refused(bases, tmp_path, settings, fault):
    path = picture_recipe(tmp_path, bases["vit"], **settings)
    with pytest.raises(RecipeError, match=re.escape(fault)):
        load_recipe(path)


def test_a_run_s_own_recipe_loads_again(run):
    folder, recipe = run
    assert load_recipe(folder / "recipe.yaml").recipe_hash == load_recipe(recipe).recipe_hash


def test_numbers_as_labels_stay_in_their_order(bases, tmp_path):
    recipe = picture_recipe(tmp_path, bases["vit"], train={"max_steps": 1})
    rows = [f"train/{label}/{number:03}.png,{number % 11}\n" for label in ("cool", "hot") for number in range(12)]
    (tmp_path / "rows.csv").write_text("path,label\n" + "".join(rows))
    folder = run_recipe(load_recipe(recipe, [f"data.train={tmp_path / 'rows.csv'}", "data.eval=null"]))
    assert summary_of(folder)["labels"] == [str(number) for number in range(11)]


def test_a_run_of_a_hub_data_set_has_the_classes_of_a_folder(bases, tmp_path, monkeypatch):
    rows = [
        {"image": encoded(drawn(label, number)), "label": CLASSES["label"].str2int(label)}
        for label in COLOURS
        for number in range(12)
    ]
    path = write_parquet(tmp_path / "hub.parquet", rows, CLASSES)
    data = {"train": hub_of(monkeypatch, tmp_path, "parquet", data_files=path)}  # and folders to evaluate on
    recipe = picture_recipe(tmp_path / "run", bases["vit"], data=data, train={"max_steps": 16})
    summary = summary_of(run_recipe(load_recipe(recipe)))
    assert summary["labels"] == ["cool", "hot"] and summary["metrics"]["after"]["accuracy"]["value"] == 1.0


WHOLE = {"adapter": {"method": "full"}, "lora": None}


@pytest.mark.parametrize(
    ("kind", "settings", "refused"),
    [
        ("image-segmentation", {}, "the loss of masks"),
        ("image-classification", {"data": {"resolution": 56}} | WHOLE, "position embeddings"),
        ("image-classification", WHOLE, ""),
    ],
)
def test_what_has_no_deterministic_gradients_on_a_gpu_is_refused_in_its_plan(kind, settings, refused, tmp_path):
    save_encoder(tmp_path / "model", "dinov2")
    write = mask_recipe if kind == "image-segmentation" else picture_recipe
    model = {"device": "auto", "compute_dtype": "auto"}
    path = write(tmp_path, tmp_path / "model", train={"deterministic": True}, model=model, **settings)
    recipe = load_recipe(path)
    gpu = find_gpu("rtx-4060")
    with pytest.raises(ModelError, match=refused) if refused else nullcontext():
        plan_recipe(recipe, machine_of_gpu(gpu), gpu.memory_bytes)
