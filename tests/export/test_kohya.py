"""Denoisers' LoRA weights in kohya's layout, read by diffusers' own converters and loaders."""

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from tiny_denoisers import CONFIGS, latent_examples, save_denoiser
from train.test_denoiser import in_diffusers, predicted_by, workload

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.lora.inject import Target, lora_layers
from qlora_lite.adapters.read import Factors
from qlora_lite.errors import ModelError
from qlora_lite.ext.diffusion.denoisers import load_denoiser
from qlora_lite.ext.diffusion.kohya import kohya_tensors

# The single blocks of FLUX.1 compute queries, keys, values and more at once, which diffusers' converter takes apart at
# the sizes of the published model alone: see below.
TARGETS = {
    "unet": ("all-linear", "*embedding*"),
    "flux2": ("all-linear",),
    "flux": ("*.transformer_blocks.*", "*.single_transformer_blocks.*.proj_out", "*.norm.linear"),
}
PIPELINES = {
    "unet": diffusers.StableDiffusionXLPipeline,
    "flux": diffusers.FluxPipeline,
    "flux2": diffusers.Flux2Pipeline,
}


def kind_of(family):
    return CONFIGS[family]["_class_name"]


def factors(inputs, outputs, rank, alpha=3.0):
    return Factors(torch.randn(rank, inputs), torch.randn(outputs, rank), alpha)


def load(family, tensors, denoiser):
    pipeline = PIPELINES[family]
    if family == "flux2":
        pipeline.load_lora_into_transformer(pipeline.lora_state_dict(tensors), denoiser)
    else:
        into = pipeline.load_lora_into_unet if family == "unet" else pipeline.load_lora_into_transformer
        given = {} if family == "unet" else {"return_alphas": True}
        into(*pipeline.lora_state_dict(tensors, **given), denoiser)


@pytest.mark.parametrize("family", TARGETS)
def test_diffusers_loads_the_layout_and_computes_the_same(family, tmp_path):
    work = workload(family)
    model = load_denoiser(save_denoiser(tmp_path, family), work.spec.base)
    torch.manual_seed(1)
    Lora(tuple(map(Target, TARGETS[family])), rank=3, alpha=5.0, dtype=torch.float32).apply(model)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, 0.1)
    layers = {path: Factors(layer.lora_A.detach(), layer.lora_B.detach(), 5.0) for path, layer in lora_layers(model)}
    plain, theirs = in_diffusers(tmp_path, family), in_diffusers(tmp_path, family)
    load(family, kohya_tensors(layers, kind_of(family)), theirs)
    adapted = {name.partition(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A" in name}
    assert adapted == {path.partition(".")[2] for path in layers}
    batch = work.batches.collate(latent_examples(family)[:2])
    asked = family, batch.latents, batch.draws.timestep, batch.conditions
    with torch.no_grad():
        ours, expected, without = model(*asked[1:]), predicted_by(theirs, *asked), predicted_by(plain, *asked)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 0.01


def test_what_a_single_block_of_flux_computes_at_once_is_taken_apart_again():
    torch.manual_seed(0)
    outputs = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = {
        f"transformer.single_transformer_blocks.7.{name}": factors(3072, size, 2) for name, size in outputs.items()
    }
    tensors = kohya_tensors(layers, kind_of("flux"))
    assert sorted(tensors) == [
        f"lora_unet_single_blocks_7_linear1.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    found = diffusers.FluxPipeline.lora_state_dict(tensors)
    for path, held in layers.items():
        assert torch.equal(found[f"{path}.lora_A.weight"], held.lora_A)
        assert torch.equal(found[f"{path}.lora_B.weight"], 1.5 * held.lora_B)


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_of_layers_that_are_computed_at_once_some_may_have_no_lora_weights(family):
    torch.manual_seed(0)
    block = "transformer.transformer_blocks.0.attn"
    layers = {
        f"{block}.to_q": factors(6, 6, 3),
        f"{block}.to_v": factors(6, 6, 3, 4.0),
        f"{block}.add_k_proj": factors(6, 6, 2),
    }
    found = PIPELINES[family].lora_state_dict(kohya_tensors(layers, kind_of(family)))
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        product = found[f"{block}.{name}.lora_B.weight"] @ found[f"{block}.{name}.lora_A.weight"]
        held = layers.get(f"{block}.{name}")
        expected = held.scale * held.lora_B @ held.lora_A if held else torch.zeros(6, 6)
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_name_in_the_layout_is_refused():
    layer = {"transformer.transformer_blocks.0.attn.to_q": factors(6, 6, 2)}
    with pytest.raises(ModelError, match=r"U-Nets with texts, FLUX\.1 and FLUX\.2, not for SD3Transformer2DModel"):
        kohya_tensors(layer, kind_of("sd3"))
    with pytest.raises(ModelError, match=r"no name for transformer\.context_embedder; leave it out of lora\.targets"):
        kohya_tensors(layer | {"transformer.context_embedder": factors(6, 6, 2)}, kind_of("flux"))
