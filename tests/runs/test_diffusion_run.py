"""Runs of denoisers as a user has them: trained, resumed, drawn with, loaded by diffusers, and refused."""

import importlib.util
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from runs.test_launch import ended, start
from safetensors.torch import load_file, save_file
from tiny_runs import evaluations, run_whole_and_stopped, stop_at, summary_of

pytest.importorskip("diffusers")
import diffusers
from tiny_diffusion import PIPELINES, diffusion_recipe, picture, save_dit_pipeline, write_captioned

from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.cli.main import cli
from qlora_lite.errors import CheckpointError, DataError, Interrupted, ModelError, OutputError, RecipeError
from qlora_lite.ext.diffusion.denoisers import Conditions, meta_denoiser
from qlora_lite.ext.diffusion.denoising import conditions_of
from qlora_lite.ext.diffusion.draw import Drawing, denoise, scheduler_of
from qlora_lite.ext.diffusion.encode import encode, encode_texts, named_classes
from qlora_lite.ext.diffusion.latents import LatentExample, LatentSet, arrays_in
from qlora_lite.ext.diffusion.pipelines import Autoencoder, TextEncoders, open_pipeline, spec_in
from qlora_lite.ext.diffusion.spec import build_fit, build_loss, with_neutral
from qlora_lite.inference.draw import draw_prompts
from qlora_lite.models.skeleton import give_storage
from qlora_lite.prepare.datasets import read_data
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.model import build_model
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.catalog import copy_recipe
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.step import accumulate_gradients

CPU = torch.device("cpu")
SMALL = {"data": {"resolution": 16}}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in a scheduler of diffusers


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    made = {name: save(folder / name) for name, save in PIPELINES.items()}
    return made | {"dit": save_dit_pipeline(folder / "dit")}


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A finished run of Stable Diffusion, and its recipe."""
    sections = SMALL | {"train": {"max_steps": 8, "save_every_steps": 4, "learning_rate": 0.02}}
    sections["diffusion"] = {"caption_dropout": 0.3, "weighting": "min_snr"}
    recipe = diffusion_recipe(tmp_path_factory.mktemp("run"), bases["sd"], **sections)
    return run_recipe(load_recipe(recipe)), recipe


def command(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)


def planned(*arguments):
    """The plan of a recipe or model as JSON."""
    return json.loads(command("plan", *arguments, "--json").output.splitlines()[-1])


def whole_pipeline(folder):
    """diffusers' own pipeline, without the parts that a tiny SD3 lacks."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    return getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "sdxl" else ()) for name in (*PIPELINES, "dit")]
)
def test_every_family_is_trained_and_shown_before_and_after(bases, tmp_path, family):
    data = {} if family == "dit" else SMALL
    folder = run_recipe(load_recipe(diffusion_recipe(tmp_path, bases[family], **data)))
    summary = summary_of(folder)
    assert summary["status"] == "complete" and summary["steps"] == 6
    measured, predicted = (summary["plan"][name] for name in ("measured_peak_bytes", "predicted_peak_bytes"))
    assert measured == pytest.approx(predicted, rel=0.3)  # of a process of 300 MiB; the ledger is compared elsewhere
    shown = json.loads((folder / "samples" / "samples.json").read_text())
    assert shown["prompts"] == ["hot", ""] and len(shown["before"]) == len(shown["after"]) == 2
    assert shown["before"] != shown["after"]
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 4 and "Samples before and after" in page and "Pictures per second" in page
    for when in ("before", "after"):
        assert pixels(folder / "samples" / f"{when}-01.png").shape == ((8, 8, 3) if family == "dit" else (16, 16, 3))
    assert summary.get("classes") == (["cool", "hot"] if family == "dit" else [])


def test_another_run_begins_with_its_adapter(run, bases, tmp_path):
    folder, _ = run
    begun = SMALL | {
        "lora": {"init_from": str(folder)},
        "train": {"max_steps": 1},
        "diffusion": {"weighting": "min_snr"},
    }
    second = run_recipe(load_recipe(diffusion_recipe(tmp_path, bases["sd"], **begun)))
    last = sorted((folder / "samples").glob("after-*.png"))
    assert last and all(
        (second / "samples" / each.name.replace("after", "before")).read_bytes() == each.read_bytes() for each in last
    )


def test_it_learns(bases, tmp_path):
    train = {"max_steps": 60, "micro_batch_size": 4, "learning_rate": 0.02}
    summary = summary_of(run_recipe(load_recipe(diffusion_recipe(tmp_path, bases["dit"], train=train))))
    assert summary["eval_loss_after"] < 0.8 * summary["eval_loss_before"]


def test_in_4_bit_with_streamed_blocks_it_learns_what_it_learns_without_streaming(bases, tmp_path):
    found = []
    for name, memory in (("resident", {}), ("streamed", {"resident_layers": 2, "uncheckpointed_layers": 0})):
        sections = {"model": {"quant": "nf4"}, "memory": memory, "lora": {"targets": ["to_q", "to_v"]}}
        found.append(run_recipe(load_recipe(diffusion_recipe(tmp_path / name, bases["sd"], **SMALL, **sections))))
    weights = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in found]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert summary_of(found[1])["plan"]["chosen"]["memory.resident_layers"] == 2
    assert (found[1] / "samples" / "after-01.png").is_file()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(bases, tmp_path):
    path = diffusion_recipe(tmp_path, bases["sd"], train={"max_steps": 3, "gradient_accumulation_steps": 2})
    ended(start(path, f"output.dir={tmp_path / 'two'}"))
    run_recipe(load_recipe(path, [f"output.dir={tmp_path / 'one'}"]))
    written = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([[m["loss"], m["grad_norm"]] for m in map(json.loads, lines) if "loss" in m] for lines in written)
    assert len(one) == 3
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_a_stopped_run_is_resumed_to_the_bit(run, tmp_path):
    folder, recipe = run
    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'out'}"])
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(5))
    drawn = command("generate", tmp_path / "out", "--prompt", "hot", "--steps", 1, "--out", tmp_path / "five.png")
    assert drawn.exit_code == 0 and pixels(tmp_path / "five.png").shape == (16, 16, 3)
    assert run_recipe(settings, resume=tmp_path / "out") == tmp_path / "out"
    one, other = (load_file(path / "adapter-last" / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [
        [json.loads(line).get("loss") for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "out")
    ]
    assert losses[0] == losses[1]
    assert (tmp_path / "out" / "samples" / "before-01.png").is_file()


def test_evaluations_do_not_follow_the_planned_micro_batches(bases, tmp_path):
    train = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4, "eval_every_steps": 1}
    sections = {"train": train, "memory": {"micro_batches": "auto"}, "diffusion": {"sample_prompts": []}}
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["dit"], **sections))
    whole = run_whole_and_stopped(recipe, tmp_path)
    assert summary_of(whole)["plan"]["chosen"]["train.micro_batch_size"] > 1
    assert evaluations(run_recipe(recipe, resume=tmp_path / "out")) == evaluations(whole)


def test_another_caption_or_picture_is_another_run(bases, tmp_path):
    settings = load_recipe(diffusion_recipe(tmp_path, bases["dit"], train={"save_every_steps": 2}))
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(3))
    caption = tmp_path / "train" / "003.txt"
    caption.write_text("cool")
    with pytest.raises(CheckpointError, match="other labels than before"):
        run_recipe(settings, resume=tmp_path / "out")
    caption.write_text("hot")
    picture("hot", 99, 16, 16).save(tmp_path / "train" / "003.png")
    with pytest.raises(CheckpointError, match="other training rows than before"):
        run_recipe(settings, resume=tmp_path / "out")


def test_what_was_encoded_is_found_again_and_no_encoder_is_loaded(run, tmp_path, monkeypatch):
    _, recipe = run
    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'out'}", "train.max_steps=1"])
    for name in ("Autoencoder", "TextEncoders"):
        monkeypatch.setattr(f"qlora_lite.ext.diffusion.encode.{name}", lambda *_, name=name: pytest.fail(name))
    run_recipe(settings)


def test_a_damaged_latent_or_text_in_the_cache_is_encoded_anew(bases, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["sd"], **SMALL))
    fit = find_task(recipe).reader(recipe)
    data = read_data(recipe, fit, ("train",))["train"]

    def arrays():
        examples = encode(recipe, fit, [data]).parts[0].examples
        return [(example.latents.copy(), example.text.copy()) for example in examples]  # of mapped files

    first = arrays()
    for kind in ("pictures", "texts"):
        caplog.clear()
        path, *_ = sorted((tmp_path / "cache" / "latents" / kind).glob("*/*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        for one, other in zip(first, arrays(), strict=True):
            assert all(map(np.array_equal, one, other))
        assert f"1 cached file damaged, or of an earlier version: encoded anew, first {path}" in caplog.text
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not as it was written.*; resume it"):
        arrays_in(path)


# What encode_prompt gives beside the text, by place, and what it is asked for beside the prompt.
ALONE = {"do_classifier_free_guidance": False}
TEXTS = {
    "sd": ({}, ALONE),
    "sdxl": ({"pooled": 2}, ALONE),
    "pixart": ({"mask": 1}, ALONE),
    "sd3": ({"pooled": 2}, {**ALONE, "prompt_2": None, "prompt_3": None}),
    "flux": ({"pooled": 1}, {"prompt_2": None}),
    "klein": ({}, {}),
}


def latents_of(pipeline, pictures):
    """The latents that the pipeline's own code trains on or begins with."""
    if hasattr(pipeline, "_encode_vae_image"):  # FLUX.2
        return pipeline._encode_vae_image(pictures, torch.Generator())
    latents = pipeline.vae.encode(pictures).latent_dist.mean
    return (latents - (getattr(pipeline.vae.config, "shift_factor", None) or 0.0)) * pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("family", PIPELINES)
def test_latents_and_texts_are_what_the_pipeline_gives(bases, tmp_path, family):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases[family], data={"resolution": 16}))
    fit = find_task(recipe).reader(recipe)
    data = read_data(recipe, fit, ("train",))["train"]
    found = encode(recipe, fit, [data]).parts[0].examples
    assert isinstance(found, LatentSet) and len(found) == 12
    pipeline = whole_pipeline(bases[family])
    given, said = TEXTS[family]
    shapes = set()
    for example, row in zip(found, data.examples, strict=True):
        with torch.no_grad():
            text, *others = pipeline.encode_prompt(prompt=row.answer, device="cpu", num_images_per_prompt=1, **said)
            expected = latents_of(pipeline, torch.from_numpy(fit.cut(Image.open(row.prompt))[0])[None])
        torch.testing.assert_close(torch.from_numpy(example.latents), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(example.text), text[0], rtol=1e-5, atol=1e-6)
        for name, place in given.items():
            ours = torch.from_numpy(getattr(example, name))
            torch.testing.assert_close(ours, others[place - 1][0].to(ours.dtype), rtol=1e-5, atol=1e-6)
        shapes.add(example.latents.shape)
    sizes = {(8, 8), (10, 6), (6, 10)}
    assert shapes == ({(16, h // 2, w // 2) for h, w in sizes} if family == "klein" else {(4, *size) for size in sizes})
    assert fit.largest == (16, 16)


@pytest.mark.parametrize("family", PIPELINES)
def test_pictures_are_those_that_the_pipeline_draws(bases, tmp_path, family):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases[family], data={"resolution": 16}))
    model = build_model(recipe).eval()
    pipeline = whole_pipeline(bases[family])
    noise = torch.randn(
        1, *((16, 4, 4) if family == "klein" else (4, 8, 8)), generator=torch.Generator().manual_seed(1)
    )
    texts = encode_texts(recipe, ["hot", ""])
    told, neutral = (
        conditions_of([LatentExample(None, **arrays_in(texts[text]), number=0)], torch.float32) for text in ("hot", "")
    )
    kept = {"callback_on_step_end": lambda _p, _i, _t, given: latents.append(given["latents"].clone()) or given}
    latents, said, begin = [], {"negative_prompt": ""}, noise.clone()
    if family == "sdxl":
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
        told, neutral = told._replace(sizes=sizes), neutral._replace(sizes=sizes)
    elif family == "pixart":
        said |= {"use_resolution_binning": False}
        kept = {"callback": lambda _i, _t, each: latents.append(each.clone())}
    elif family == "flux":
        begin, said = pipeline._pack_latents(begin, 1, 4, 8, 8), {}
    elif family == "klein":
        said = {}
    with torch.no_grad():
        pipeline(
            prompt="hot",
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=begin,
            height=16,
            width=16,
            output_type="pil",
            **said,
            **kept,
        )
        ours = denoise(
            model, scheduler_of(open_pipeline(bases[family])), noise, told, neutral, Drawing(4, 3.0), torch.float32
        )
    if family == "flux":
        ours = pipeline._pack_latents(ours, 1, 4, 8, 8)
    elif family == "klein":
        ours = pipeline._pack_latents(ours)
    torch.testing.assert_close(ours, latents[-1], rtol=1e-3, atol=1e-4)


def test_diffusers_draws_otherwise_with_the_adapter(run, bases):
    folder, _ = run
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(bases["sd"])
    said = {"num_inference_steps": 3, "output_type": "np", "height": 16, "width": 16}

    def drawn():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipeline("hot", negative_prompt="", guidance_scale=4.0, latents=noise, **said).images[0]

    before = drawn()
    pipeline.load_lora_weights(folder / "adapter", weight_name="pytorch_lora_weights.safetensors")
    after = drawn()
    assert np.abs(before - after).max() > 0.02
    ours = draw_prompts(folder, ["hot"], base=True), draw_prompts(folder, ["hot"])
    for theirs, (mine,) in zip((before, after), ours, strict=True):
        assert np.abs(255 * theirs - mine).max() < 2
    assert np.array_equal(ours[1][0], pixels(folder / "samples" / "after-01.png"))


def test_diffusers_draws_the_same_with_the_layout_that_other_programs_read(run, bases, tmp_path):
    folder, _ = run
    said = command("export", folder, "--to", "kohya", "--out", tmp_path / "out").output
    path = tmp_path / "out" / f"{folder.name}.safetensors"
    assert f"wrote {tmp_path / 'out'}: kohya, " in said and f"in ComfyUI, put {path} into models/loras" in said
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    pictures = []
    for given in (None, (folder / "adapter", "pytorch_lora_weights.safetensors"), (path.parent, path.name)):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(bases["sd"])
        if given:
            pipeline.load_lora_weights(given[0], weight_name=given[1])
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pictures += [
            pipeline("hot", latents=noise, num_inference_steps=3, output_type="np", height=16, width=16).images
        ]
    assert np.abs(pictures[1] - pictures[0]).max() > 0.02
    np.testing.assert_allclose(pictures[2], pictures[1], atol=1e-4)
    with pytest.raises(RecipeError, match="draws pictures"):
        CliRunner().invoke(
            cli,
            ["export", str(folder), "--to", "peft", "--out", str(tmp_path / "peft")],
            catch_exceptions=False,
            standalone_mode=False,
        )


def test_pictures_are_drawn_by_command(run, tmp_path):
    folder, _ = run
    out = tmp_path / "a" / "hot.png"
    said = command("generate", folder, "--prompt", "hot", "--out", out).output
    assert said == f"1 picture drawn in {out}\n"
    asked = "generate", folder, "--prompt", "hot", "--out", out
    assert f"{out} is there already; add --overwrite" in " ".join(command(*asked).output.split())
    assert "--temperature is for a run that answers" in " ".join(command(*asked, "--temperature", 1).output.split())
    assert np.array_equal(pixels(out), pixels(folder / "samples" / "after-01.png"))
    (tmp_path / "prompts.txt").write_text("hot\ncool\n")
    command("generate", folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "b", "--seed", 3, "--base")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["0001.png", "0002.png"]
    for wrong, fault in (("--prompt hot", "--out FILE.png"), ("--prompt hot --out x.jpg", "is a .png file")):
        with pytest.raises(Exception, match=re.escape(fault)):
            CliRunner().invoke(
                cli, ["generate", str(folder), *wrong.split()], catch_exceptions=False, standalone_mode=False
            )
    with pytest.raises(RecipeError, match=r"draws pictures .*use `qlora-lite generate`"):
        CliRunner().invoke(cli, ["evaluate", str(folder)], catch_exceptions=False, standalone_mode=False)


def test_steps_are_profiled_and_hold_to_the_plan(bases, tmp_path):
    recipe = diffusion_recipe(tmp_path, bases["sd"], **SMALL, diffusion={"caption_dropout": 0.5})
    command("profile", recipe, "--steps", 2, "--out", tmp_path / "profile")
    figures = json.loads((tmp_path / "profile" / "memory.json").read_text())
    assert figures["peak_bytes"] == pytest.approx(figures["predicted_peak_bytes"], rel=0.01)
    with pytest.raises(RecipeError, match=r"a denoiser .* is not evaluated by itself"):
        CliRunner().invoke(cli, ["evaluate", str(recipe)], catch_exceptions=False, standalone_mode=False)


def test_full_fine_tuning_leaves_a_pipeline_with_its_other_parts(bases, tmp_path):
    full = {"adapter": {"method": "full"}, "lora": None, "train": {"learning_rate": 0.001}}
    recipe = diffusion_recipe(tmp_path, bases["sd"], **SMALL, adapter=full["adapter"], train=full["train"])
    recipe.write_text(recipe.read_text().replace("lora:\n  alpha: 8\n  dtype: float32\n  rank: 4\n", ""))
    folder = run_recipe(load_recipe(recipe))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "hot",
        negative_prompt="",
        guidance_scale=4.0,
        latents=noise,
        num_inference_steps=3,
        output_type="np",
        height=16,
        width=16,
    ).images[0]
    assert np.abs(255 * theirs - pixels(folder / "samples" / "after-01.png")).max() < 2
    (mine,) = draw_prompts(folder, ["hot"])
    assert np.array_equal(mine, pixels(folder / "samples" / "after-01.png"))
    with pytest.raises(ModelError, match="trained all weights of its base model"):
        draw_prompts(folder, ["hot"], base=True)


def test_a_bare_denoiser_is_trained_whole_and_adapted_after(bases, tmp_path):
    bare = shutil.copytree(bases["dit"] / "transformer", tmp_path / "bare")
    recipe = diffusion_recipe(tmp_path / "a", bare, adapter={"method": "full"}, task={"labels": ["hot", "cool"]})
    recipe.write_text(recipe.read_text().replace("lora:\n  alpha: 8\n  dtype: float32\n  rank: 4\n", ""))
    folder = run_recipe(load_recipe(recipe))
    assert diffusers.DiTTransformer2DModel.from_pretrained(folder / "model").config.num_layers == 2
    again = diffusion_recipe(tmp_path / "b", folder / "model", task={"labels": ["hot", "cool"]})
    assert summary_of(run_recipe(load_recipe(again)))["classes"] == ["hot", "cool"]


def test_names_of_classes_come_with_the_pipeline(bases, tmp_path):
    recipe = diffusion_recipe(tmp_path / "a", bases["dit"], adapter={"method": "full"})
    recipe.write_text(recipe.read_text().replace("lora:\n  alpha: 8\n  dtype: float32\n  rank: 4\n", ""))
    folder = run_recipe(load_recipe(recipe))
    assert open_pipeline(folder / "model").labels == ("cool", "hot")
    only = diffusion_recipe(tmp_path / "b", folder / "model", diffusion={"sample_prompts": ["warm"]})
    with pytest.raises(DataError, match=r"diffusion\.sample_prompts: 'warm' is no class of the model: cool, hot"):
        run_recipe(load_recipe(only))
    (tmp_path / "b" / "eval" / "101.txt").write_text("warm")
    with pytest.raises(DataError, match=r"eval/101\.png:1: 'warm' is no class of the model: cool, hot"):
        run_recipe(load_recipe(only))


def test_prompts_are_lines_or_a_column_and_what_cannot_be_drawn_is_said_before_anything_loads(run, bases, tmp_path):
    folder, recipe = run
    (tmp_path / "lines.txt").write_text("hot\n\n")
    (tmp_path / "rows.jsonl").write_text('{"file_name": "a.png", "text": "hot"}\n')
    (tmp_path / "named.csv").write_text("n,said\n1,hot\n")
    (tmp_path / "latin.txt").write_bytes("h\xf6t".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    few = "--steps", 1, "--out"
    drawn = {}
    for name, more in (("lines.txt", ()), ("rows.jsonl", ()), ("named.csv", ("--column", "said"))):
        done = command("generate", folder, "--prompts", tmp_path / name, *more, *few, tmp_path / "new" / name)
        assert done.exit_code == 0, done.output
        drawn[name] = sorted((tmp_path / "new" / name).iterdir())
    assert [len(files) for files in drawn.values()] == [2, 1, 1]
    assert len({files[0].read_bytes() for files in drawn.values()}) == 1
    for name, fault in (
        ("named.csv", "no prompt is among the columns 'n', 'said'; name it with --column"),
        ("latin.txt", "not UTF-8"),
        ("empty.txt", "there is no prompt"),
    ):
        with pytest.raises(DataError, match=fault):
            command("generate", folder, "--prompts", tmp_path / name, *few, tmp_path / "none")
    (tmp_path / "file").touch()
    for out in (
        ("--prompt", "hot", "--out", tmp_path / "file" / "a.png"),
        ("--prompts", tmp_path / "lines.txt", "--out", tmp_path / "file"),
    ):
        with pytest.raises(OutputError, match="cannot write"):
            command("generate", folder, "--model", tmp_path / "gone", *out)
    (tmp_path / "a.png").mkdir()
    assert "is a folder" in command("generate", folder, "--prompt", "hot", "--out", tmp_path / "a.png").output
    for path in (recipe, bases["sd"]):
        assert "is no run" in command("generate", path, "--prompt", "hot", "--out", tmp_path / "b.png").output
    assert not (tmp_path / "none").exists() and not (tmp_path / "b.png").exists()


def test_captions_are_left_out_as_often_as_it_is_said(bases, tmp_path):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["dit"], diffusion={"caption_dropout": 0.3}))
    fit = find_task(recipe).reader(recipe)
    data = read_data(recipe, fit, ("train",))["train"]
    rows = encode(named_classes(recipe, data), fit, [data]).parts[0].examples
    work = with_neutral(build_workload(recipe), rows)
    labels = torch.cat([work.batches.training_batch(list(rows), 0, step).conditions.labels for step in range(1, 60)])
    assert (labels == 2).float().mean() == pytest.approx(0.3, abs=0.05)
    assert not (work.batches.collate(list(rows)).conditions.labels == 2).any()
    some = work.batches.training_batch(list(rows)[:3], 0, 7).conditions.labels  # whoever else is in the batch
    assert torch.equal(some, work.batches.training_batch(list(rows), 0, 7).conditions.labels[:3])
    without = replace(work.batches, caption_dropout=0.0).training_batch(list(rows), 0, 1)
    assert torch.equal(without.noise, work.batches.training_batch(list(rows), 0, 1).noise)


def test_pictures_keep_their_sizes_where_a_caption_is_left_out(bases, tmp_path):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["sdxl"], **SMALL, diffusion={"caption_dropout": 0.5}))
    fit = find_task(recipe).reader(recipe)
    rows = encode(recipe, fit, [read_data(recipe, fit, ("train",))["train"]]).parts[0].examples
    work, alike = with_neutral(build_workload(recipe), rows), list(rows)[::3]
    neutral, are_left_out = torch.from_numpy(rows.neutral_example().text), set()
    for step in range(1, 9):
        conditions = work.batches.training_batch(alike, 0, step).conditions
        assert torch.equal(conditions.sizes, torch.stack([torch.from_numpy(row.sizes) for row in alike]))
        are_left_out.add(sum(torch.equal(text, neutral) for text in conditions.text))
    assert are_left_out & {1, 2, 3}


def test_pictures_of_other_shapes_in_a_batch_have_the_losses_that_they_have_alone(bases, tmp_path):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["sd"], **SMALL))
    fit = find_task(recipe).reader(recipe)
    rows = list(encode(recipe, fit, [read_data(recipe, fit, ("train",))["train"]]).parts[0].examples)[:5]
    model, work = build_model(recipe).train(), build_workload(recipe)
    torch.manual_seed(0)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, 0.1)
    assert len({row.latents.shape for row in rows}) == 3
    found = []
    for groups in ([rows], [[row] for row in rows]):
        model.zero_grad()
        result = accumulate_gradients(work, model, [work.batches.training_batch(group, 0, 1) for group in groups])
        found.append((float(result.loss), [p.grad.clone() for _, p in work.method.parameters(model)]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_objective_is_what_the_scheduler_says(bases, tmp_path):
    sd, sd3 = (load_recipe(diffusion_recipe(tmp_path / name, bases[name], **SMALL)) for name in ("sd", "sd3"))
    assert (build_loss(sd).prediction, build_loss(sd).schedule, build_loss(sd).beta_end) == (
        "epsilon",
        "scaled_linear",
        0.012,
    )
    assert (build_loss(sd3).prediction, build_loss(sd3).shift) == ("flow", 3.0)
    base = shutil.copytree(bases["sd"], tmp_path / "v")
    path = base / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"prediction_type": "v_prediction"}))
    recipe = load_recipe(diffusion_recipe(tmp_path / "vr", base, **SMALL, diffusion={"weighting": "min_snr"}))
    assert (build_loss(recipe).prediction, build_loss(recipe).weighting) == ("v", "min_snr")
    for change, fault in (
        ({"beta_schedule": "squaredcos_cap_v2"}, "betas .squaredcos"),
        ({"rescale_betas_zero_snr": True}, "rescaled to zero SNR"),
        ({"prediction_type": "sample"}, "prediction_type is"),
        ({"num_train_timesteps": 500}, "the scheduler has 500 timesteps"),
        ({"beta_start": -1}, r"betas rise .*from -1\.0 to"),
        ({"beta_end": 1e9}, "rise between 0"),
        ({"beta_start": "x"}, "the scheduler's beta_start is 'x', which is no number"),
    ):
        path.write_text(json.dumps(said | change))
        with pytest.raises(ModelError, match=fault):
            build_loss(load_recipe(diffusion_recipe(tmp_path / "w", base, **SMALL)))


def test_captions_beside_pictures_in_tables_and_for_all(bases, tmp_path):
    def captions(source, **data):
        recipe = load_recipe(diffusion_recipe(tmp_path / "r", bases["dit"], data={"train": str(source), **data}))
        found = read_data(recipe, find_task(recipe).reader(recipe), ("train",))["train"]
        return [example.answer for example in found.examples], found.problems

    pictures = write_captioned(tmp_path / "pictures", 4)
    assert captions(pictures)[0] == ["cool", "hot", "cool", "hot"]
    (pictures / "001.txt").unlink()
    _, problems = captions(pictures)
    assert problems.count == 1 and "the picture has no caption: write 001.txt beside it" in problems.found[0].message
    assert captions(pictures, caption="sks")[0] == ["cool", "sks", "cool", "hot"]
    assert captions(pictures, caption="")[0] == ["cool", "", "cool", "hot"]
    (pictures / "metadata.jsonl").write_text('{"file_name": "001.png", "text": "a b"}\n{"file_name": "002.png"}\n')
    found, problems = captions(pictures)
    assert found == ["a b"] and "the caption is missing" in problems.found[0].message
    (pictures / "metadata.jsonl").unlink()
    classes = tmp_path / "classes"
    for number, name in enumerate(("hot", "cool", "hot")):
        (classes / name).mkdir(parents=True, exist_ok=True)
        picture(name, number, 16, 16).save(classes / name / f"{number}.png")
    assert captions(classes)[0] == ["cool", "hot", "hot"]
    picture("hot", 1, 6, 20).save(classes / "hot" / "small.png")
    (classes / "hot" / "broken.png").write_bytes(b"none")
    _, problems = captions(classes)
    said = sorted(problem.message for problem in problems.found)
    assert "6 x 20 pixels, and 8 x 8 are wanted; give a larger one" in said[1] and "not a whole picture" in said[0]


def test_a_run_s_own_recipe_loads_again(bases, tmp_path):
    recipe = load_recipe(diffusion_recipe(tmp_path, bases["sd"], **SMALL))
    path = tmp_path / "resolved.yaml"
    path.write_text(resolve_to_yaml(recipe))
    assert load_recipe(path).recipe_hash == recipe.recipe_hash


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data": {"augment": "flip"}}, "data.augment: only with task.kind image-classification"),
        ({"adapter": {"method": "dora"}}, "adapter.method = dora: a denoiser"),
        ({"adapter": {"method": "full"}, "model": {"quant": "nf4"}}, "full fine-tuning trains 16-bit weights"),
        ({"diffusion": {"weighting": "cosmap", "prediction": "epsilon"}}, "diffusion.weighting = cosmap: not with"),
        ({"task": {"kind": "image-classification"}}, "diffusion.sample_prompts: only with task.kind image-generation"),
        ({"memory": {"stream_from": "disk"}}, "memory.stream_from = disk: not possible"),
        ({"model": {"compute_dtype": "float16"}}, "model.compute_dtype = float16: not possible"),
        ({"lora": {"targets": []}}, "lora.targets = []: nothing is trained"),
        ({"diffusion": {"min_snr_gamma": 3.0}}, "diffusion.min_snr_gamma: only with diffusion.weighting min_snr"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bases, tmp_path, changes, fault):
    with pytest.raises(RecipeError, match=re.escape(fault)):
        load_recipe(diffusion_recipe(tmp_path, bases["sd"], **changes))


def test_resolutions_and_folders_that_are_wrong_are_one_clean_error(bases, tmp_path):
    def fit(base, **data):
        return build_fit(load_recipe(diffusion_recipe(tmp_path / "r", base, data=data)))

    with pytest.raises(ModelError, match=r"data.resolution 18 is no multiple of the model's 4 pixels; write 16 or 20"):
        fit(bases["sd"], resolution=18)
    with pytest.raises(ModelError, match="takes pictures of its own size alone; write 8"):
        fit(bases["dit"], resolution=16)
    assert fit(bases["sd"], resolution=16, buckets=False).sizes == ((16, 16),)
    with pytest.raises(ModelError, match=r"data\.resolution 36: the model's position embeddings reach 32 pixels"):
        fit(bases["sd3"], resolution=36)
    assert max(max(size) for size in fit(bases["sd3"], resolution=28).sizes) == 32
    with pytest.raises(ModelError, match=r"task\.labels are names of classes, and the denoiser .* knows none"):
        run_recipe(load_recipe(diffusion_recipe(tmp_path / "l", bases["sd"], **SMALL, task={"labels": ["hot"]})))
    base = shutil.copytree(bases["sd"], tmp_path / "cut")
    shutil.rmtree(base / "vae")
    with pytest.raises(ModelError, match="latents of 4 channels and has no autoencoder"):
        fit(base, resolution=16)
    shutil.rmtree(base / "unet")
    with pytest.raises(ModelError, match="without a folder transformer or unet"):
        fit(base)
    (base / "model_index.json").unlink()
    with pytest.raises(ModelError, match="is no diffusion pipeline"):
        fit(base)
    bare = shutil.copytree(bases["sd"] / "unet", tmp_path / "bare")
    with pytest.raises(ModelError, match=r"latents of 4 channels and has no autoencoder"):
        run_recipe(load_recipe(diffusion_recipe(tmp_path / "b", bare)))


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({name: each.clone() for name, each in tensors.items()}, path, metadata={"format": "pt"})


def named(tensors, end):
    (name,) = (name for name in tensors if name.endswith(end))
    return name


LAST = "final_layer_norm.bias"
VAE, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda base: rewrite_tensors(base / ENCODER, lambda each: each.pop(named(each, LAST))),
            r"text_encoder lack 1 weight that .*, first .*final_layer_norm\.bias; fetch it again",
        ),
        (
            lambda base: rewrite_tensors(base / ENCODER, lambda each: each[named(each, LAST)].fill_(math.nan)),
            "encodes a caption to NaN or infinity",
        ),
        (
            lambda base: rewrite_json(base / "model_index.json", text_encoder=["transformers", "BertModel"]),
            "text_encoder is BertModel, and StableDiffusionPipeline takes CLIPTextModel",
        ),
        (lambda base: rewrite_json(base / "text_encoder" / "config.json", num_hidden_layers=3), "lack 16 weights"),
        (
            lambda base: rewrite_json(base / "text_encoder" / "config.json", hidden_size=2**30),
            "hidden_size 1,073,741,824",
        ),
        (
            lambda base: rewrite_tensors(base / VAE, lambda each: each.pop("decoder.conv_in.weight")),
            r"vae lack 1 weight that .*, first decoder\.conv_in\.weight",
        ),
        (
            lambda base: rewrite_tensors(base / VAE, lambda each: each["decoder.conv_in.weight"].fill_(math.nan)),
            r"the weight decoder\.conv_in\.weight holds NaN",
        ),
        (
            lambda base: rewrite_json(base / "vae" / "config.json", scaling_factor=0),
            "scaling_factor 0 is no number above",
        ),
        (lambda base: rewrite_json(base / "vae" / "config.json", shift_factor="x"), "shift_factor 'x' no number"),
    ],
)
def test_damaged_encoders_are_one_clean_error(bases, tmp_path, damage, fault):
    base = shutil.copytree(bases["sd"], tmp_path / "base")
    damage(base)
    with pytest.raises(ModelError, match=fault):
        TextEncoders(open_pipeline(base), CPU).encode(["hot"])
        Autoencoder(open_pipeline(base), CPU)


def test_a_tokenizer_that_sets_no_length_takes_as_many_tokens_as_clip(bases, tmp_path):
    base = shutil.copytree(bases["sd"], tmp_path / "base")
    path, positions = base / "text_encoder" / "config.json", "embeddings.position_embedding.weight"
    rewrite_json(path, max_position_embeddings=77)
    with pytest.raises(ModelError, match=rf"or have them in other shapes, first .*{positions}"):
        TextEncoders(open_pipeline(base), CPU)
    rewrite_tensors(base / ENCODER, lambda each: each.update({named(each, positions): torch.randn(77, 32)}))
    for length in (77, int(1e30), None):
        rewrite_json(base / "tokenizer" / "tokenizer_config.json", model_max_length=length)
        found = TextEncoders(open_pipeline(base), CPU).encode(["hot"])[0]["text"]
        assert found.shape == (open_pipeline(base).text_tokens, 32) == (77, 32)
    rewrite_json(path, max_position_embeddings=8)
    rewrite_tensors(base / ENCODER, lambda each: each.update({named(each, positions): torch.randn(8, 32)}))
    with pytest.raises(ModelError, match="cannot encode a caption"):
        TextEncoders(open_pipeline(base), CPU).encode(["hot"])


@pytest.mark.parametrize(
    ("family", "changes", "fault"),
    [
        (
            "sd",
            {"timestep_spacing": "none"},
            "DDIMScheduler: diffusers cannot follow its scheduler_config.* .none is not",
        ),
        ("sd", {"beta_start": "x"}, "DDIMScheduler: diffusers cannot"),
        ("sd", {"prediction_type": "none"}, "prediction_type"),
        ("sdxl", {"final_sigmas_type": "none"}, "EulerDiscreteScheduler: diffusers cannot .*final_sigmas_type"),
        ("sd3", {"shift": "x"}, "FlowMatchEulerDiscreteScheduler: diffusers cannot"),
    ],
)
def test_schedulers_that_cannot_draw_are_one_clean_error(bases, tmp_path, family, changes, fault):
    base = shutil.copytree(bases[family], tmp_path / "base")
    rewrite_json(base / "scheduler" / "scheduler_config.json", **changes)
    pipeline, empty = open_pipeline(base), Conditions()
    model = give_storage(meta_denoiser(spec_in(pipeline)))
    model.forward = lambda latents, *_: torch.zeros_like(latents)
    with pytest.raises(ModelError, match=fault):
        denoise(model, scheduler_of(pipeline), torch.zeros(1, 4, 8, 8), empty, empty, Drawing(2, 1.0), torch.float32)


@pytest.mark.slow
def test_a_plan_needs_the_pipeline_s_configurations_alone(bases, tmp_path):
    base = shutil.copytree(bases["sd"], tmp_path / "configs")
    for path in base.rglob("*.safetensors"):
        path.unlink()
    said = command("plan", base, "data.resolution=16", "--vram", "8GiB").output
    assert "1 picture of 16 x 16 pixels" in said and "fits" in said
    assert planned(base, "data.resolution=16", "--vram", "8GiB")["fits"]
    asked = base, "memory.checkpointing=block", "memory.resident_layers=all", "--vram", "700MiB"
    largest = planned(*asked, "--max-resolution")["max_resolution"]
    assert planned(bases["sd3"], "--vram", "8GiB", "--max-resolution")["max_resolution"] == 0  # its positions reach 32
    fits = [planned(*asked, f"data.resolution={n}")["fits"] for n in (largest, largest + 64)]
    assert largest % 64 == 0 and fits == [True, False]
    one_size = ["plan", str(bases["dit"]), "--vram", "8GiB", "--max-resolution"]
    with pytest.raises(Exception, match="takes pictures of its own size alone"):
        CliRunner().invoke(cli, one_size, catch_exceptions=False, standalone_mode=False)
    with pytest.raises(ModelError, match=r"has no diffusion_pytorch_model\.safetensors"):
        run_recipe(load_recipe(diffusion_recipe(tmp_path / "r", base, **SMALL)))


def test_the_digits_of_a_copied_recipe_are_made_where_the_copy_reads_them(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    copy_recipe("digits", tmp_path)
    copy_recipe("digits-three", tmp_path)
    spec = importlib.util.spec_from_file_location("make_digits", tmp_path / "data" / "make_digits.py")
    make_digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_digits)
    monkeypatch.setattr("sys.argv", ["make_digits.py"])
    make_digits.main()
    recipe = load_recipe(tmp_path / "digits.yaml")
    assert Path(recipe.model.path) == tmp_path / "data" / "digits" / "model"
    load_recipe(tmp_path / "digits.yaml", ["model.path=data/digits/unet"])
    shutil.copytree(recipe.model.path, tmp_path / "runs" / "digits" / "model")  # where training leaves it
    load_recipe(tmp_path / "digits-three.yaml")
