"""Denoisers: loss and gradients are those of a diffusers training step; planned, resumed, and loaded by diffusers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from methods import Case, ledger_of, plan
from safetensors.torch import load_file, save_file
from torch.nn import functional

pytest.importorskip("diffusers")
import diffusers
import peft
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from tiny_denoisers import CONFIGS, OF_CLASSES, latent_examples, save_denoiser

from qlora_lite.adapters.diffusers_files import save_for_diffusers
from qlora_lite.adapters.files import Lora, load_adapter, save_adapter
from qlora_lite.adapters.full import Full
from qlora_lite.adapters.lora.inject import Target, add_lora, lora_layers
from qlora_lite.errors import DataError, ModelError, TrainingError
from qlora_lite.ext.diffusion.denoisers import load_denoiser, meta_denoiser, spec_of
from qlora_lite.ext.diffusion.denoising import DenoisingLoss, denoiser
from qlora_lite.ext.diffusion.latents import LatentExample, shapes_of
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options, stream_of
from qlora_lite.offload.own_blocks import BlockCalls
from qlora_lite.planning.simulate import Job, simulate, simulate_whole
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.loop import largest_batches
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import accumulate_gradients

CPU = torch.device("cpu")
TARGETS = "to_q", "to_k", "to_v", "*.to_out.0"
MORE_TARGETS = {
    "flux": ("*.ff.net.2", "*.single_transformer_blocks.*.proj_out"),
    "flux2": ("to_qkv_mlp_proj", "to_out"),
}
LOSSES = {
    "epsilon": DenoisingLoss(),
    "min_snr": DenoisingLoss(weighting="min_snr"),
    "v": DenoisingLoss("v", weighting="min_snr"),
    "flow": DenoisingLoss("flow", "logit_normal", shift=3.0),
    "cosmap": DenoisingLoss("flow", weighting="cosmap"),
    "sigma_sqrt": DenoisingLoss("flow", weighting="sigma_sqrt"),
}
USUAL = {
    "unet": "min_snr",
    "pixart": "epsilon",
    "sd3": "flow",
    "flux": "flow",
    "flux2": "cosmap",
    "dit": "epsilon",
    "unet2d": "min_snr",
}
NOT_LOADED = "pixart", *OF_CLASSES  # families that diffusers loads no LoRA file into


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoisers")
    return {name: save_denoiser(folder / name, name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


def method(name):
    return Lora(tuple(map(Target, (*TARGETS, *MORE_TARGETS.get(name, ())))), rank=4, alpha=6.0, dtype=torch.float32)


def workload(name, quant="none", loss=None):
    spec = spec_of(CONFIGS[name], quant=quant, compute_dtype=torch.float32)
    return denoiser(spec, shapes_of(latent_examples(name)[0]), LOSSES[loss or USUAL[name]], method(name))


def case(folders, name, quant="none", loss=None):
    work = workload(name, quant, loss)
    changes = {"max_tokens": 2, "packing": False, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    return Case(work, lambda: load_denoiser(folders[name], work.spec.base), latent_examples(name), changes)


def adapted(folders, work, name, draws_b=True):
    """A model with LoRA weights none of which is zero."""
    model = load_denoiser(folders[name], work.spec.base)
    torch.manual_seed(1)
    work.method.apply(model)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(0, 0.1 if draws_b else 0)
    set_memory_options(model, MemoryOptions(), work.spec.blocks(model))
    return model


def in_diffusers(folder, name):
    return getattr(diffusers, CONFIGS[name]["_class_name"]).from_pretrained(folder)


def predicted_by(model, name, noisy, timesteps, given):
    """What diffusers' training scripts ask of each class."""
    if name == "unet":
        return model(
            noisy,
            timesteps.long(),
            given.text,
            added_cond_kwargs={"text_embeds": given.pooled, "time_ids": given.sizes},
        ).sample
    if name == "pixart":
        sizes = {"resolution": None, "aspect_ratio": None}
        out = model(
            noisy,
            encoder_hidden_states=given.text,
            encoder_attention_mask=given.mask,
            timestep=timesteps,
            added_cond_kwargs=sizes,
        ).sample
        return out.chunk(2, 1)[0]
    if name == "sd3":
        return model(
            noisy, timestep=timesteps, encoder_hidden_states=given.text, pooled_projections=given.pooled
        ).sample
    n, c, h, w = noisy.shape
    if name in OF_CLASSES:
        return model(noisy, timesteps.long(), given.labels).sample[:, :c]
    if name == "flux":
        pipe = diffusers.FluxPipeline
        out = model(
            hidden_states=pipe._pack_latents(noisy, n, c, h, w),
            timestep=timesteps / 1000,
            guidance=torch.ones(n),
            pooled_projections=given.pooled,
            encoder_hidden_states=given.text,
            txt_ids=torch.zeros(5, 3),
            img_ids=pipe._prepare_latent_image_ids(n, h // 2, w // 2, CPU, torch.float32),
        ).sample
        return pipe._unpack_latents(out, h * 8, w * 8, 8)
    pipe = diffusers.Flux2Pipeline
    places = pipe._prepare_latent_ids(noisy)
    out = model(
        hidden_states=pipe._pack_latents(noisy),
        timestep=timesteps / 1000,
        encoder_hidden_states=given.text,
        txt_ids=pipe._prepare_text_ids(given.text),
        img_ids=places,
    ).sample
    return pipe._unpack_latents_with_ids(out, places)


def in_step(model):
    """Return diffusers' model in training mode, but for the classes that DiT would leave out."""
    model.train()
    for module in model.modules():
        if isinstance(module, diffusers.models.embeddings.LabelEmbedding):
            module.dropout_prob = 0
    return model


def reference_step(model, name, loss, batch):
    """The step of diffusers' training scripts, on noise and timesteps of ours."""
    x, e, t = batch.latents, batch.noise, batch.draws.timestep
    if loss.prediction == "flow":
        sigmas = (t / 1000)[:, None, None, None]
        noisy, target = (1.0 - sigmas) * x + sigmas * e, e - x
        weights = compute_loss_weighting_for_sd3(loss.weighting, sigmas)
        predicted = predicted_by(model, name, noisy, t, batch.conditions)
        result = (weights * (predicted - target) ** 2).reshape(len(x), -1).mean(1).mean()
    else:
        kind = {"epsilon": "epsilon", "v": "v_prediction"}[loss.prediction]
        scheduler = diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind
        )
        noisy = scheduler.add_noise(x, e, t.long())
        target = e if loss.prediction == "epsilon" else scheduler.get_velocity(x, e, t.long())
        predicted = predicted_by(model, name, noisy, t, batch.conditions)
        if loss.weighting == "none":
            result = functional.mse_loss(predicted, target)
        else:
            snr = compute_snr(scheduler, t.long())
            weights = torch.stack([snr, loss.min_snr_gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
            weights = weights / snr if loss.prediction == "epsilon" else weights / (snr + 1)
            result = (functional.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)) * weights).mean()
    result.backward()
    return result.item()


@pytest.mark.parametrize(
    ("family", "loss"),
    [*USUAL.items(), ("unet", "epsilon"), ("unet", "v"), ("sd3", "cosmap"), ("pixart", "v"), ("sd3", "sigma_sqrt")],
)
def test_loss_and_gradients_are_those_of_a_training_step_of_diffusers(folders, family, loss):
    work = workload(family, loss=loss)
    model = adapted(folders, work, family)
    theirs, layers = in_diffusers(folders[family], family), dict(lora_layers(model))
    paths = [path.partition(".")[2] for path in layers]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=paths), theirs)
    for (_, layer), path in zip(layers.items(), paths, strict=True):
        their_layer = theirs.get_submodule(path)
        their_layer.lora_A.default.weight.data.copy_(layer.lora_A)
        their_layer.lora_B.default.weight.data.copy_(layer.lora_B)
    batch = work.batches.training_batch(latent_examples(family)[:4], 0, 1)
    ours = accumulate_gradients(work, model.train(), [batch])
    expected = reference_step(in_step(theirs), family, work.objective, batch)
    assert float(ours.loss) == pytest.approx(expected, rel=1e-5)
    for (name, layer), path in zip(layers.items(), paths, strict=True):
        their_layer = theirs.get_submodule(path)
        for own, other in ((layer.lora_A, their_layer.lora_A), (layer.lora_B, their_layer.lora_B)):
            gradient = other.default.weight.grad
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(own.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions("none"),
        MemoryOptions(uncheckpointed_layers=1),
        MemoryOptions(resident_layers=1),
        MemoryOptions(offload_checkpoints=True, resident_layers=0),
    ],
    ids=["none", "kept", "streamed", "offloaded"],
)
def test_memory_options_change_no_gradient(folders, family, options):
    work = workload(family)
    batch = work.batches.training_batch(latent_examples(family)[:2], 0, 1)
    gradients = []
    for each in (MemoryOptions("none"), options):
        model = adapted(folders, work, family).train()
        place(model, CPU, each, work.spec.blocks(model))
        set_memory_options(model, each, work.spec.blocks(model))
        runs = [accumulate_gradients(work, model, [batch]).loss for _ in range(2)]
        assert torch.equal(*runs)
        gradients.append([p.grad for _, p in work.method.parameters(model)])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)


def test_all_blocks_are_recomputed_in_the_order_in_which_they_run(folders, family):
    work = workload(family)
    model, seen = adapted(folders, work, family).train(), []
    blocks = work.spec.blocks(model)
    model.run_blocks({block: lambda block, *inputs: (seen.append(block), block(*inputs))[1] for block in blocks})
    work.loss(model, work.batches.training_batch(latent_examples(family)[:1], 0, 1))
    assert seen == blocks
    assert len(blocks) == work.spec.depth


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_it_is_planned_and_holds_to_the_plan(folders, family, quant):
    tried = case(folders, family, quant)
    fastest, least = plan(tried, 2**40)
    assert fastest.peak_bytes > least.peak_bytes
    assert least.options.recomputes
    for candidate in (fastest, least):
        measured = ledger_of(tried.trainer(candidate.options)).peak
        assert measured.total == pytest.approx(candidate.prediction.simulation.peak().total, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [MemoryOptions(resident_layers=1), MemoryOptions(offload_checkpoints=True)],
    ids=["streamed", "offloaded"],
)
def test_what_goes_to_host_memory_holds_to_the_plan(folders, family, options):
    tried = case(folders, family, "nf4")
    if family == "dit" and options.resident_layers is not None:  # whose blocks are not for that
        with pytest.raises(TrainingError, match="has no resident_layers to set"):
            placed(tried, options).check()
        return
    trainer, work = placed(tried, options), tried.workload
    largest, evaluation = largest_batches(work, tried.examples, tried.examples, trainer.epochs)
    accumulates = trainer.settings.gradient_accumulation_steps > 1
    job = Job(
        work,
        work.batches.shape(largest),
        work.batches.shape(evaluation),
        optimizer="adamw_torch",
        accumulating=accumulates,
        options=options,
    )
    ledger, found = ledger_of(trainer), simulate(job)
    assert ledger.peak.total == pytest.approx(found.peak().total, rel=0.01)
    assert ledger.offloaded_peak_bytes == pytest.approx(found.offloaded_bytes, rel=0.01) != 0


def placed(tried, options):
    """A trainer whose weights lie where the options say."""

    def build():
        model = tried.build()
        return place(model, CPU, options, tried.workload.spec.blocks(model))

    return replace(tried, build=build).trainer(options)


@pytest.mark.parametrize(("family", "quant"), [*((name, "nf4") for name in CONFIGS), ("flux", "none")])
def test_killed_and_resumed_it_goes_on_to_the_bit(folders, family, quant, tmp_path):
    tried = case(folders, family, quant)
    whole = tried.trainer()
    steps = list(whole)
    first = tried.trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    del first, metrics
    torch.manual_seed(1)
    resumed = tried.trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_it_learns(folders):
    tried = case(folders, "pixart", "nf4")
    trainer = replace(tried, changes={**tried.changes, "max_steps": 10}).trainer()
    before = trainer.evaluate(trainer.examples)
    assert before == trainer.evaluate(trainer.examples)
    list(trainer)
    assert trainer.evaluate(trainer.examples).loss < 0.9 * before.loss


def test_diffusers_computes_the_same_with_the_adapter_file(folders, family, tmp_path):
    work = workload(family)
    model = adapted(folders, work, family)
    path = save_for_diffusers(model, tmp_path / "lora")
    save_adapter(model, tmp_path / "adapter", folders[family], method=work.method)
    batch = work.batches.collate(latent_examples(family)[:2])
    theirs, plain = in_diffusers(folders[family], family), in_diffusers(folders[family], family)
    asked = family, batch.latents, batch.draws.timestep, batch.conditions
    if family in NOT_LOADED:
        paths = [name.partition(".")[2] for name, _ in lora_layers(model)]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=paths), theirs)
        weights = {name.partition(".")[2]: tensor for name, tensor in load_file(path).items()}
        assert not peft.set_peft_model_state_dict(theirs, weights).unexpected_keys
    else:
        theirs.load_lora_adapter(tmp_path / "lora", prefix=model.part, weight_name=path.name)
    with torch.no_grad():
        ours, expected, without = model(*asked[1:]), predicted_by(theirs, *asked), predicted_by(plain, *asked)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 0.01
    again = load_adapter(load_denoiser(folders[family], work.spec.base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(*asked[1:]), ours)


@pytest.mark.parametrize("options", [MemoryOptions(resident_layers=0), MemoryOptions(offload_checkpoints=True)])
def test_pictures_of_two_shapes_share_a_micro_batch_whatever_the_memory_options(folders, options):
    work, (one, other) = workload("sd3"), latent_examples("sd3", 2)
    other = replace(other, latents=other.latents[:, :, :4])
    found = []
    for each in (MemoryOptions("none"), options):
        model = adapted(folders, work, "sd3").train()
        place(model, CPU, each, work.spec.blocks(model))
        set_memory_options(model, each, work.spec.blocks(model))
        accumulate_gradients(work, model, [work.batches.collate([one, other])])
        found.append([parameter.grad for _, parameter in work.method.parameters(model)])
    for plain, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)


LARGE = {"sample_size": 128, "num_attention_heads": 6, "cross_attention_dim": 48}  # the sizes' embeddings are thirds


def test_pixart_of_large_pictures_is_told_their_sizes(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel.from_config(CONFIGS["pixart"] | LARGE).eval()
    theirs.save_pretrained(tmp_path)
    spec = spec_of(tmp_path, compute_dtype=torch.float32)
    example = replace(latent_examples("pixart", 1)[0], sizes=np.array([90, 70, 0, 0, 64, 32], np.float32))
    shapes, model = shapes_of(example), load_denoiser(tmp_path, spec).eval()
    work = denoiser(spec, shapes, LOSSES["epsilon"], method("pixart"))
    assert model.condition_shapes(5)["sizes"] == shapes.sizes == (6,)
    batch, steps = work.batches.collate([example]), torch.tensor([400.0])
    sizes = {"resolution": torch.tensor([[64.0, 32.0]]), "aspect_ratio": torch.tensor([[2.0]])}
    with torch.no_grad():
        said = batch.conditions
        expected = theirs(batch.latents, said.text, steps, sizes, encoder_attention_mask=said.mask, return_dict=False)[
            0
        ]
        torch.testing.assert_close(model(batch.latents, steps, said), expected[:, :4])


def test_noise_follows_from_seed_step_and_example_alone():
    work, examples = workload("pixart"), latent_examples("pixart")
    both, alone = work.batches.training_batch(examples[:2], 0, 1), work.batches.training_batch(examples[1:2], 0, 1)
    assert torch.equal(both.noise[1], alone.noise[0]) and both.draws.timestep[1] == alone.draws.timestep[0]
    for other in (work.batches.training_batch(examples[1:2], 1, 1), work.batches.training_batch(examples[1:2], 0, 2)):
        assert not torch.equal(other.noise, alone.noise) and other.draws.timestep != alone.draws.timestep
    assert not torch.equal(both.noise[0], both.noise[1])
    assert torch.equal(work.batches.collate(examples).noise, work.batches.collate(examples).noise)


def test_timesteps_are_drawn_as_they_are_said_to_be():
    def timesteps(loss, count=2000):
        generator = torch.Generator().manual_seed(0)
        return torch.tensor([float(loss.draw(generator).timestep) for _ in range(count)])

    uniform = timesteps(LOSSES["epsilon"])
    assert uniform.min() < 10 and uniform.max() <= 999 and uniform.mean() == pytest.approx(499.5, abs=20)
    assert torch.equal(uniform, uniform.round())
    middle = timesteps(DenoisingLoss("flow", "logit_normal")) / 1000
    assert middle.logit().mean() == pytest.approx(0, abs=0.07) and middle.logit().std() == pytest.approx(1, abs=0.07)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    place = 0.25
    assert DenoisingLoss("flow", shift=3.0).at(place).noise == pytest.approx(float(scheduler.sigmas[-250]), rel=1e-5)


def test_linear_layers_of_blocks_alone_are_packed(folders, family):
    work = workload(family, "nf4")
    model = load_denoiser(folders[family], work.spec.base)
    plain = load_denoiser(folders[family], replace(work.spec.base, quant="none"))
    packed = {path for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    inside = tuple(f"{path}." for path in model.block_paths())
    linear = {path for path, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert packed == {path for path in linear if path.startswith(inside)} != linear
    skeleton = meta_denoiser(work.spec.base).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in skeleton.items()
    }
    batch = work.batches.collate(latent_examples(family)[:1])
    with torch.no_grad():
        outputs = [each(batch.latents, batch.draws.timestep, batch.conditions) for each in (plain, model)]
    assert 0 < functional.mse_loss(*outputs) / outputs[0].var() < 0.1


def test_files_that_are_not_those_of_the_configuration_are_refused(folders, tmp_path):
    spec = workload("pixart").spec.base
    with pytest.raises(ModelError, match=r"has no diffusion_pytorch_model\.safetensors; fetch"):
        load_denoiser(tmp_path, spec)
    tensors = load_file(folders["pixart"] / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn1.to_q.weight"
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    for changed, said in (
        ({"other": torch.zeros(1)}, "other, which the model has not"),
        ({name: torch.zeros(2, 2)}, r"of the shape \(2"),
    ):
        save_file(tensors | changed, file)
        for quant in ("none", "nf4"):
            with pytest.raises(ModelError, match=said):
                load_denoiser(tmp_path, replace(spec, quant=quant))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ModelError, match=f"no transformer.{name}"):
        load_denoiser(tmp_path, spec)
    with pytest.raises(ModelError, match="VQModel is no denoiser"):
        spec_of({"_class_name": "VQModel"})
    with pytest.raises(ModelError, match="give the folder transformer or unet"):
        spec_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_per_block", 10**6),
        ("layers_per_block", [2, 10**6]),
        ("transformer_layers_per_block", [[1], [10**6]]),
        ("block_out_channels", [16, 2**30]),
        ("cross_attention_dim", 2**30),
        ("num_layers", 501),
    ],
)
def test_sizes_of_no_model_are_refused_before_anything_is_built(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", key: value}))
    with pytest.raises(ModelError, match=rf"has {key} [\d,]+, and no model has more than"):
        spec_of(tmp_path)


def test_a_configuration_that_contradicts_itself_is_one_clean_error():
    for changes in ({"norm_num_groups": 0}, {"block_out_channels": []}):
        with pytest.raises(ModelError, match="can be built from this configuration"):
            meta_denoiser(spec_of(CONFIGS["unet"] | changes))


def test_wrong_settings_and_examples_are_refused(folders):
    work, examples = workload("pixart"), latent_examples("pixart")
    for wrong in ({"prediction": "x"}, {"prediction": "flow", "weighting": "min_snr"}, {"shift": 2.0}, {"shift": 0}):
        with pytest.raises(ModelError):
            DenoisingLoss(**wrong)
    odd = LatentExample(np.zeros((4, 8, 16), np.float32), examples[0].text, 3, mask=examples[0].mask, place="a.png")
    with pytest.raises(DataError, match=r"a.png: latents \(4, 8, 16\) in place of \(4, 8, 8\)"):
        replace(case(folders, "pixart"), examples=[*examples, odd]).trainer()
    with pytest.raises(TrainingError, match="layers_per_checkpoint"):
        case(folders, "pixart").trainer(MemoryOptions(layers_per_checkpoint=2))
    assert work.batches.places([odd]) == ["a.png"]
    whole = replace(work, method=Full())
    model = load_denoiser(folders["pixart"], work.spec.base)
    whole.method.apply(model)
    place(model, CPU, MemoryOptions(resident_layers=0), work.spec.blocks(model), trains_base=True)
    with pytest.raises(TrainingError, match=r"updated together; set memory\.resident_layers to all"):
        whole.check_model(model, case(folders, "pixart").trainer().settings)


def test_gradients_of_grouped_inputs_are_not_lost():
    is_target = torch.ones(2, requires_grad=True)
    block = torch.nn.Identity()
    with pytest.raises(ModelError, match="would be lost"):
        BlockCalls({block: lambda block, *inputs: block(*inputs)})(block, is_target, (is_target,))


def test_layers_outside_of_blocks_are_adapted_only_where_they_are_named(folders):
    model = add_lora(load_denoiser(folders["flux"], workload("flux").spec.base), "all-linear", rank=2)
    assert {path for path, _ in lora_layers(model)}.isdisjoint({"transformer.x_embedder", "transformer.proj_out"})
    model = add_lora(load_denoiser(folders["flux"], workload("flux").spec.base), ["x_embedder"], rank=2)
    assert [path for path, _ in lora_layers(model)] == ["transformer.x_embedder"]


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(),
        pytest.param(MemoryOptions(uncheckpointed_layers=3), marks=pytest.mark.slow),
        MemoryOptions(resident_layers=2, offload_checkpoints=True),
    ],
    ids=["block", "kept", "streamed"],
)
@pytest.mark.parametrize(("family", "depth"), [pytest.param("pixart", 9, marks=pytest.mark.slow), ("flux", 9)])
def test_a_deep_model_is_planned_as_two_shallow_ones_continued(family, depth, options):
    work = workload(family, "nf4").at_depth(depth)
    assert work.spec.depth == depth and work.spec.pattern(work.method) == ((0, 1) if family == "pixart" else (1, 1))
    for device_type in ("cpu", "cuda"):
        job = Job(work, work.batches.full_pack(2, True), None, device_type, optimizer="adamw_torch", options=options)
        assert simulate(job).peak() == simulate_whole(job).peak()
        assert simulate(job).offloaded_bytes == simulate_whole(job).offloaded_bytes


def test_blocks_that_are_adapted_otherwise_are_not_alike():
    some = Lora((Target("*.single_transformer_blocks.1.attn.to_q"),), rank=2)
    assert workload("flux").spec.pattern(some) == (3, 1)
    unet = workload("unet")
    assert unet.spec.pattern(unet.method) == (unet.spec.depth, 1)
    sd3 = workload("sd3")
    assert sd3.spec.pattern(sd3.method) == (2, 1)


def test_a_parameter_of_a_streamed_block_itself_is_there_when_the_block_begins(folders):
    options, work, seen = MemoryOptions(resident_layers=0), workload("pixart"), []
    model = adapted(folders, work, "pixart").train()
    place(model, CPU, options, work.spec.blocks(model))
    set_memory_options(model, options, work.spec.blocks(model))
    slots = {slot.untyped_storage().data_ptr() for slot in stream_of(model).slots}
    for block in work.spec.blocks(model):
        block.register_forward_pre_hook(lambda block, _: seen.append(block.scale_shift_table.untyped_storage()))
    accumulate_gradients(work, model, [work.batches.collate(latent_examples("pixart")[:1])])
    assert len(seen) == 4 and all(storage.data_ptr() in slots for storage in seen)
