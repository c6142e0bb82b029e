"""Segmentation: loss and gradients are those of transformers' and peft's modules put together; planned, and cut."""

import json
import random
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from methods import Case, assert_as_planned, assert_gradients_of_peft, gradients, plan, with_factors
from PIL import Image
from tiny_pictures import ENCODERS, STILL, save_encoder, write_masks
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

from qlora_lite.adapters.files import Lora, save_adapter
from qlora_lite.data.labels import MASKS, ONE_LABEL
from qlora_lite.data.picture_files import BROKEN, decode
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.errors import DataError
from qlora_lite.ext.pictures.examples import NO_MASK, LabelledPictureReader
from qlora_lite.ext.pictures.mask_head import MaskSpec, mask_head, score_masks
from qlora_lite.ext.pictures.masks import classes_of
from qlora_lite.ext.pictures.pixels import processor_of
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.load import load_model
from qlora_lite.models.skeleton import read_part
from qlora_lite.train.step import accumulate_gradients

CPU = torch.device("cpu")
NAMES = ("0", "1", "2")
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32, head=True)
HEAD = Head(ONE_LABEL, NAMES, 0, of_pictures=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(folder / name, name) for name in ENCODERS}


def read(folder):
    return read_examples([Source(str(folder))], None, reader=LabelledPictureReader(MASKS))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return list(read(write_masks(tmp_path_factory.mktemp("masked"), 6)).examples)


def loaded(folder):
    return load_model(folder, "none", compute_dtype=torch.float32, use_cache=False, head=HEAD)


def workload(folder, size=28, augment="none"):
    spec = MaskSpec(with_head(read_part(str(folder)), HEAD).config, "none", compute_dtype=torch.float32)
    processor = replace(processor_of(STILL, 28, size, augment), resize=(size, size))
    return mask_head(METHOD, NAMES, processor, spec)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(("name", "size"), [("dinov2", 28), ("dinov2", 42), ("vit", 28), ("siglip", 42), ("clip", 28)])
def test_loss_and_gradients_are_those_of_transformers_and_peft(folders, rows, name, size, tmp_path):
    work, model = workload(folders[name], size), loaded(folders[name])
    torch.manual_seed(0)
    METHOD.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", folders[name], method=METHOD)
    batch = work.batches.inputs(work.batches.collate(rows), CPU)
    ours = accumulate_gradients(work, model, [batch]).loss.item()

    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(
        folders[name], config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    inner, resized = theirs.base_model.model, {"interpolate_pos_encoding": True} if name == "siglip" else {}
    encoder = getattr(inner, {"dinov2": "dinov2", "vit": "vit"}.get(name, "vision_model"))
    hidden = encoder(pixel_values=batch.pixels, **resized).last_hidden_state
    side = size // 14
    patches = hidden[:, hidden.shape[1] - side * side :]
    if name == "dinov2":
        patches = torch.cat([hidden[:, :1].repeat(1, side * side, 1), patches], dim=-1)
    logits = inner.classifier(patches).reshape(len(rows), side, side, 3).permute(0, 3, 1, 2)
    logits = functional.interpolate(logits, size=(size, size), mode="bilinear")
    each = [
        functional.cross_entropy(one[None], target[None], ignore_index=-100)
        for one, target in zip(logits, batch.targets, strict=True)
    ]
    loss = torch.stack(each).mean()
    loss.backward()
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_of_peft(gradients(METHOD, model), theirs)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_plan_is_the_ledger_s_peak_whatever_the_memory_options(folders, rows, name):
    one = Case(
        workload(folders[name]),
        lambda: loaded(folders[name]),
        rows,
        {"max_tokens": 3, "packing": False, "micro_batch_size": 3},
    )
    assert_as_planned(one, plan(one, 2**40))


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop-flip"])
def test_a_mask_is_cut_and_turned_as_its_picture_is(rows, augment):
    processor = replace(processor_of(STILL, 28, None, augment), resize=(28, 28), resample=0)
    for step in range(12):
        chance = None if augment == "none" else f"0/{step}"
        picture, classes = (
            processor.cut(decode(rows[step % 6].prompt), 0, 0, chance and random.Random(chance)),
            classes_of(rows[step % 6], processor, chance and random.Random(chance)),
        )
        label = 1 + int(rows[step % 6].prompt[-7:-4]) % 2
        there = np.abs(picture[0].astype(int) - 120) > 80  # red is 20 or 220 in the box, and about 120 beside it
        known = classes != -100
        assert np.array_equal((classes == label)[known], there[known])
        assert set(np.unique(classes)) <= {-100, 0, label}


def test_scores_are_those_of_the_pixels(folders, rows):
    work, model = workload(folders["dinov2"]), loaded(folders["dinov2"])
    batch = work.batches.collate(rows)
    scores, matrix = score_masks(work, model, [work.batches.collate(rows[:4]), work.batches.collate(rows[4:])])
    with torch.no_grad():
        given = work.spec.outputs(model.eval(), batch).argmax(1)
    counted = batch.targets != -100
    assert sum(map(sum, matrix)) == counted.sum() == 6 * 28 * 28 - 6
    assert scores["pixel_accuracy"].value == pytest.approx((given == batch.targets)[counted].float().mean().item())
    ious = []
    for label in range(3):
        there, said = (batch.targets == label)[counted], (given == label)[counted]
        if (there | said).any():
            ious.append((there & said).sum() / (there | said).sum())
    assert scores["miou"].value == pytest.approx(torch.stack(ious).mean().item())


def test_every_wrong_mask_is_named_and_counted(tmp_path):
    folder = write_masks(tmp_path / "rows", 8)
    masks = folder / "masks"
    Image.new("RGB", (28, 28)).save(masks / "000.png")
    Image.new("L", (14, 28)).save(masks / "001.png")
    Image.new("L", (28, 28), 255).save(masks / "002.png")
    (masks / "003.png").write_bytes(b"none")
    (masks / "004.png").unlink()
    data = read(folder)
    assert data.rows_kept == 3 and data.dropped == {BROKEN: 4, NO_MASK: 1}
    named = {problem.where[-9:-2]: problem.message for problem in data.problems.found}
    assert named.keys() == {f"00{number}.png" for number in range(5)}
    assert "pixels of the kind RGB" in named["000.png"] and "14 x 28" in named["001.png"]
    assert "every pixel" in named["002.png"] and "not a whole picture" in named["003.png"]
    assert json.loads(data.examples[0].answer)["classes"] == ["0", "2"]
    (tmp_path / "rows" / "table.csv").write_text("image,mask,x\nimages/005.png,masks/005.png,1\nimages/006.png,,1\n")
    data = read(tmp_path / "rows" / "table.csv")
    assert data.rows_kept == 1 and "missing" in data.problems.found[0].message
    with pytest.raises(DataError, match="the folders images and masks"):
        read(write_masks(tmp_path / "other", 1) / "images").problems.raise_if_any()
