"""Diffusion models that are planned without a network have the published numbers of weights."""

import json

import pytest

pytest.importorskip("diffusers")
from click.testing import CliRunner
from huggingface_hub.utils import filter_repo_objects
from tiny_diffusion import save_sd_pipeline

from qlora_lite.cli.main import cli
from qlora_lite.errors import ModelError
from qlora_lite.ext.diffusion.denoisers import skeleton_of
from qlora_lite.ext.diffusion.latents import LatentShapes
from qlora_lite.ext.diffusion.pipelines import Pipeline, open_pipeline, spec_in
from qlora_lite.ext.diffusion.spec import build_fit, build_loss, recipe_shapes
from qlora_lite.models.families import known_pipelines
from qlora_lite.recipe.load import recipe_of


def test_a_folder_that_the_index_does_not_name_is_no_part(tmp_path):
    (tmp_path / "vae").mkdir()
    assert not Pipeline(tmp_path, {"_class_name": "DDPMPipeline"}, "unet").has("vae")
    assert Pipeline(tmp_path, {"vae": ["diffusers", "AutoencoderKL"]}, "unet").has("vae")


# Billions of weights of the denoiser, as published, and what a picture of 1024 x 1024 pixels is to it.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (0.860, LatentShapes((4, 128, 128), (77, 768)), "epsilon"),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        2.57,
        LatentShapes((4, 128, 128), (77, 2048), (1280,), sizes=(6,)),
        "epsilon",
    ),
    "black-forest-labs/FLUX.1-dev": (11.9, LatentShapes((16, 128, 128), (512, 4096), (768,)), "flow"),
    "black-forest-labs/FLUX.2-klein-base-4B": (3.88, LatentShapes((128, 64, 64), (512, 7680)), "flow"),
}


@pytest.mark.parametrize("name", known_pipelines())
def test_weights_shapes_and_objective_are_those_that_are_published(name):
    billions, shapes, prediction = PUBLISHED[name]
    model = skeleton_of(spec_in(open_pipeline(name, with_weights=False)))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)
    recipe = recipe_of(
        {"model": {"path": name}, "task": {"kind": "image-generation"}, "data": {"train": "x", "resolution": 1024}},
        (),
        "x",
    )
    assert recipe_shapes(recipe, model, build_fit(recipe)) == shapes
    assert build_loss(recipe).prediction == prediction


def test_a_known_model_is_planned_by_its_name(monkeypatch):
    name = "black-forest-labs/FLUX.2-klein-base-4B"
    asked = ["plan", name, "data.resolution=512", "memory.resident_layers=0", "--gpu", "rtx-4060", "--json"]
    done = CliRunner().invoke(cli, asked, catch_exceptions=False)
    found = json.loads(done.output.splitlines()[-1])
    assert found["fits"] and found["peak_bytes"] < 4 * 2**30
    assert name in CliRunner().invoke(cli, ["plan", "--models"], catch_exceptions=False).output


def test_a_run_takes_the_files_beside_the_weights(monkeypatch, tmp_path):
    name, asked = "stable-diffusion-v1-5/stable-diffusion-v1-5", []
    base = save_sd_pipeline(tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append(k) or str(base))
    assert open_pipeline(name, with_weights=True).folder == base and asked
    assert open_pipeline(name, with_weights=False).folder != base
    monkeypatch.setattr("qlora_lite.ext.diffusion.pipelines.try_to_load_from_cache", lambda *_: str(base / "x"))
    assert open_pipeline(name, with_weights=False).folder == base
    with pytest.raises(ModelError, match="is no diffusion pipeline"):
        open_pipeline(tmp_path)


def test_of_a_hub_pipeline_each_weight_is_fetched_and_loaded_once(monkeypatch, tmp_path):
    """The parts' folders, without all of it again in one file at the top or in float16."""
    wanted = [
        "model_index.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    ]
    others = [
        "sd_xl_base_1.0.safetensors",
        "flux1-dev.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "unet/model.onnx",
    ]
    base, asked = save_sd_pipeline(tmp_path / "base"), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **how: asked.append(how) or str(base))
    whole = open_pipeline("them/theirs", with_weights=True).files("them/theirs")
    (how,) = ({name: how[name] for name in ("allow_patterns", "ignore_patterns")} for how in asked)
    assert list(filter_repo_objects([*wanted, *others], **how)) == wanted
    again = whole.weights[0].with_name("diffusion_pytorch_model.fp16.safetensors")
    again.write_bytes(whole.weights[0].read_bytes())
    assert open_pipeline(base).files("x").weights == whole.weights
