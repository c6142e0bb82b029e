"""Vision encoders with a head: loss and gradients are those of transformers and peft; planned, augmented, resumed."""

from dataclasses import replace

import peft
import pytest
import torch
from methods import Case, assert_as_planned, assert_gradients_of_peft, gradients, ledger_of, plan, with_factors
from tiny_pictures import ENCODERS, STILL, picture_rows, save_encoder, write_pictures
from tiny_trainer import SETTINGS
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, DINOv3ViTConfig, SwinConfig

from qlora_lite.adapters.files import Lora, load_adapter, save_adapter
from qlora_lite.adapters.full import Full
from qlora_lite.data.labels import ONE_LABEL
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.ext.pictures.embedding import EmbeddingSpec
from qlora_lite.ext.pictures.head import PictureBatches, Pictures, VisionSpec, picture_head
from qlora_lite.ext.pictures.pixels import processor_of
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.load import load_model
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.skeleton import read_part
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import accumulate_gradients

CPU, META = torch.device("cpu"), torch.device("meta")
NAMES = ("cool", "hot")
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32, head=True)
HEAD = Head(ONE_LABEL, NAMES, 0, of_pictures=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(folder / name, name) for name in ENCODERS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return picture_rows(write_pictures(tmp_path_factory.mktemp("pictures"), 5))


@pytest.fixture(params=ENCODERS)
def family(request):
    return request.param


def loaded(folder, quant="none"):
    return load_model(folder, quant, compute_dtype=torch.float32, use_cache=False, head=HEAD)


def workload(folder, quant="none", size=28, augment="none", method=METHOD, kind=VisionSpec):
    config = with_head(read_part(str(folder)), HEAD).config
    spec = kind(config, quant, compute_dtype=torch.float32)
    processor = processor_of(STILL, 28, size, augment)
    return picture_head(method, NAMES, processor, spec)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("size", [28, 42])
def test_loss_gradients_and_logits_are_those_of_transformers_and_peft(folders, rows, family, size, tmp_path):
    folder, work = folders[family], workload(folders[family], size=size)
    model = loaded(folder)
    torch.manual_seed(0)
    METHOD.apply(model)
    with_factors(model)
    save_adapter(model, tmp_path / "adapter", folder, method=METHOD)
    batch = work.batches.inputs(work.batches.collate(rows), CPU)
    ours = accumulate_gradients(work, model, [batch]).loss.item()

    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    resized = {} if size == 28 or family == "dinov2" else {"interpolate_pos_encoding": True}
    found = theirs(pixel_values=batch.pixels, labels=batch.targets, **resized)
    found.loss.backward()
    assert ours == pytest.approx(found.loss.item(), rel=1e-5)
    torch.testing.assert_close(work.spec.outputs(model, batch), found.logits, rtol=1e-5, atol=1e-5)
    assert_gradients_of_peft(gradients(METHOD, model), theirs)


def read_by_the_head(name, model, pixels):
    """What transformers' class for image classification gives its classifier, written out for each family."""
    if name == "dinov2":
        hidden = model.dinov2(pixels).last_hidden_state
        return torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)
    if name == "vit":
        return model.vit(pixels).last_hidden_state[:, 0]
    hidden = model.vision_model(pixels).last_hidden_state
    return (hidden if name == "siglip" else hidden[:, 1:]).mean(1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_the_loss_and_gradients_of_embeddings_are_those_of_transformers_and_peft(folders, rows, family, tmp_path):
    folder = folders[family]
    work, model = workload(folder, kind=EmbeddingSpec), loaded(folder)
    torch.manual_seed(0)
    METHOD.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", folder, method=METHOD)
    batches = [work.batches.inputs(work.batches.collate(part), CPU) for part in (rows[:3], rows[3:])]
    ours = accumulate_gradients(work, model, batches).loss.item()

    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    inner, whole = theirs.base_model.model, work.batches.collate(rows)
    read = read_by_the_head(family, inner, whole.pixels)
    head = inner.classifier.modules_to_save["default"]
    cosines = functional.cosine_similarity(read[:, None], head.weight[None], dim=2)
    loss = functional.cross_entropy(cosines / 0.05 + head.bias, whole.targets)
    loss.backward()
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_of_peft(gradients(METHOD, model), theirs)
    found = work.spec.embeddings(model.eval(), whole)
    torch.testing.assert_close(found, functional.normalize(read, dim=1), rtol=1e-5, atol=1e-5)


def case(folder, rows, **how):
    work, quant = workload(folder, **how), how.get("quant", "none")
    changes = {"max_tokens": 4, "packing": False, "micro_batch_size": 4}
    return Case(work, lambda: loaded(folder, quant), rows, changes)


@pytest.mark.parametrize(
    ("name", "quant", "kind"),
    [
        ("dinov2", "none", VisionSpec),
        ("dinov2", "nf4", VisionSpec),
        ("vit", "none", VisionSpec),
        ("clip", "nf4", VisionSpec),
        ("siglip", "nf4", VisionSpec),
        ("dinov2", "none", EmbeddingSpec),
        ("clip", "none", EmbeddingSpec),
    ],
)
def test_the_plan_is_the_ledger_s_peak_whatever_the_memory_options(folders, rows, name, quant, kind):
    one = case(folders[name], rows, quant=quant, kind=kind)
    assert_as_planned(one, plan(one, 2**40))


def test_all_weights_are_planned_and_trained_too(folders, rows, family, caplog):
    """All but ViT have some that no head reads: they are told of once, and stay as they are."""
    one = case(folders[family], rows, method=Full())
    fastest, _ = plan(one, 2**40)
    trainer = one.trainer(fastest.options)
    assert ledger_of(trainer).peak.total == pytest.approx(fastest.prediction.simulation.peak().total, rel=0.01)
    before = {name: weight.detach().clone() for name, weight in Full().parameters(trainer.model)}
    steps = list(trainer)
    assert steps[-1].loss < steps[0].loss
    idle = [name for name, weight in Full().parameters(trainer.model) if torch.equal(weight, before[name])]
    parts = {"dinov2": "mask_token", "vit": "", "siglip": ".head.", "clip": ".post_layernorm."}
    assert all(parts[family] in name for name in idle) and bool(idle) == (family != "vit")
    assert ("weights got no gradient in the first step" in caplog.text) == (family != "vit")


@pytest.mark.parametrize("method", [METHOD, Full()], ids=["lora", "full"])
def test_killed_and_resumed_it_goes_on_to_the_bit_with_augmentations(folders, rows, method, tmp_path):
    one = case(folders["dinov2"], rows, augment="crop-flip", method=method)
    whole = one.trainer()
    steps = list(whole)
    first = one.trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    torch.manual_seed(1)
    resumed = one.trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    plain = case(folders["dinov2"], rows, method=method).trainer()
    assert [step.loss for step in plain] != [step.loss for step in steps]


def test_lora_weights_that_no_head_reads_are_an_error_that_names_them(folders, rows):
    one = case(folders["siglip"], rows, method=replace(METHOD, targets=("*fc1",)))
    with pytest.raises(TrainingError, match=r"got no gradient, first .*head\.mlp\.fc1; leave them out of lora.targets"):
        next(iter(one.trainer()))


def test_a_step_s_pictures_do_not_depend_on_how_it_is_cut_or_on_what_was_expected(folders, rows):
    work = workload(folders["dinov2"], augment="crop-flip")
    whole = work.batches.training_batch(rows, 0, 7).pixels
    work.batches.expect(rows[3:], 0, 7)
    parts = [work.batches.training_batch(part, 0, 7).pixels for part in (rows[:3], rows[3:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(work.batches.training_batch(rows[::-1], 0, 7).pixels, whole.flip(0))
    for other in (
        work.batches.training_batch(rows, 0, 8),
        work.batches.training_batch(rows, 1, 7),
        work.batches.collate(rows),
    ):
        assert not torch.equal(other.pixels, whole)
    assert torch.equal(work.batches.collate(rows).pixels, work.batches.collate(rows).pixels)


def test_the_next_step_s_pictures_are_made_while_this_one_computes(folders, rows, monkeypatch):
    trainer = case(folders["dinov2"], rows, augment="flip").trainer()
    told = []
    monkeypatch.setattr(PictureBatches, "expect", lambda self, *what: told.append((len(what[0]), *what[1:])))
    steps = len(list(trainer))
    # the settings of the test's trainer have two micro-batches a step and seed 0: 8, 2, 8, 2 pictures of two epochs
    assert told == [(2, trainer.settings.seed, 2), (0, trainer.settings.seed, 3), (2, trainer.settings.seed, 4)]
    assert steps == 4


def test_a_saved_adapter_gives_the_same_outputs_again(folders, rows, family, tmp_path):
    model, work = loaded(folders[family]), workload(folders[family])
    METHOD.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", "base", method=METHOD)
    again = load_adapter(loaded(folders[family]), tmp_path / "adapter")
    batch = work.batches.inputs(work.batches.collate(rows), CPU)
    assert torch.equal(work.spec.outputs(model.eval(), batch), work.spec.outputs(again.eval(), batch))


def test_models_that_cannot_be_trained_so_are_refused_with_a_reason(folders):
    part = read_part(str(folders["vit"]))
    with pytest.raises(ModelError, match="no model of the type dinov3_vit for image classification; choose DINOv2"):
        with_head(replace(part, config=DINOv3ViTConfig()), HEAD)
    for head in (None, Head(ONE_LABEL, NAMES)):
        with pytest.raises(ModelError, match=r"a model of the type vit reads pictures; write task.kind: image-class"):
            with_head(part, head)
    swin = SwinConfig(image_size=28, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=7)
    spec = VisionSpec(with_head(replace(part, config=swin), HEAD).config, "none", compute_dtype=torch.float32)
    with pytest.raises(ModelError, match="no plain vision transformer"):
        spec.planned_model(METHOD, META, MemoryOptions(), BatchShape((1,), 1))


def test_a_weight_that_is_not_finite_is_named_before_training(folders):
    model = loaded(folders["dinov2"])
    model.get_parameter("dinov2.encoder.layer.1.norm1.weight").data[3] = torch.nan
    with pytest.raises(ModelError, match=r"layer\.1\.norm1\.weight holds NaN or infinity; the model's files are"):
        workload(folders["dinov2"]).check_model(model, TrainSettings(**SETTINGS))


def test_a_real_encoder_s_table_of_positions_stays_in_16_bit_beside_nf4(tmp_path):
    folder = save_encoder(tmp_path / "large", "dinov2", hidden_size=64, image_size=518)
    model = loaded(folder, "nf4")
    positions = model.dinov2.embeddings.position_embeddings
    assert positions.numel() > 2**16 and positions.is_floating_point()
    assert type(model.dinov2.encoder.layer[0].mlp.fc1).__name__ == "QuantLinear"


def test_a_layer_whose_weight_is_read_past_its_forward_stays_in_16_bit(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    plain, name = loaded(folders["siglip"]), "vision_model.head.attention.out_proj"
    for _ in range(2):  # the second is the cache's
        model = load_model(folders["siglip"], "nf4", compute_dtype=torch.float32, head=HEAD)
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
        assert isinstance(model.get_submodule("vision_model.encoder.layers.0.self_attn.out_proj"), QuantLinear)


def test_shapes_count_pictures(folders, rows):
    work = workload(folders["vit"])
    assert (
        work.batches.shape(work.batches.collate(rows)) == BatchShape((1,) * 10, 10)
        and work.batches.collate(rows).pixels.is_contiguous()
    )
    assert work.batches.full_pack(6, True) == BatchShape((1,) * 6, 6) and work.batches.full_pack(
        6, False
    ) == BatchShape((1,), 1)
    planned = work.batches.planned_inputs(BatchShape((1,) * 3, 3), META)
    assert isinstance(planned, Pictures) and planned.pixels.shape == (3, 3, 28, 28) and len(planned.targets) == 3
