"""Tiny random vision encoders, pictures that a few steps can tell apart, and recipes for both."""

import io
import json
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tiny_files import save_recipe
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from qlora_lite.data.labels import ONE_LABEL
from qlora_lite.data.readers import hub
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.ext.pictures.examples import LabelledPictureReader

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
_TOWER = dict(**_SIZES, intermediate_size=48, image_size=28, patch_size=14)
_TEXT = dict(**_SIZES, intermediate_size=48, vocab_size=50, max_position_embeddings=8)
# name -> (model_type, settings, transformers' class whose files a user has)
ENCODERS = {
    "dinov2": ("dinov2", dict(**_SIZES, mlp_ratio=2, image_size=28, patch_size=14), AutoModel),
    "vit": ("vit", _TOWER, AutoModelForImageClassification),
    "siglip": ("siglip", dict(vision_config=_TOWER, text_config=_TEXT), AutoModel),
    "clip": ("clip", dict(vision_config=_TOWER, text_config=_TEXT), AutoModel),
}
STILL = dict(
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    size={"height": 28, "width": 28},
    do_resize=True,
    resample=2,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_processor_type="ViTImageProcessor",
)
COLOURS = {"cool": (20, 60, 200), "hot": (220, 70, 30)}


def save_encoder(folder: Path, name: str, seed: int = 0, **changes) -> Path:
    """Write a tiny model of a family as it is published, with its processor's settings."""
    model_type, settings, auto = ENCODERS[name]
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(model_type, **(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STILL))
    return folder


def drawn(label: str, number: int, size: int = 34) -> Image.Image:
    """A noisy picture in the colour of its class, of another shape each."""
    chance = np.random.default_rng([number, len(label)])
    shape = (size, size + number % 5, 3)
    noise = chance.normal(0, 25, shape)
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Write a folder with a folder of so many pictures for each class."""
    for label in COLOURS:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            drawn(label, number).save(folder / label / f"{number:03}.png")
    return folder


CLASSES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["hot", "cool"])})
_LOAD = datasets.load_dataset


def encoded(image: Image.Image) -> dict:
    """A picture as data sets of the hub hold it."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path: Path, rows: list[dict], features: datasets.Features) -> str:
    """Write rows as ``datasets`` uploads them to the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def hub_of(monkeypatch, folder: Path, builder: str, **files) -> str:
    """Let ``datasets`` build from files of this disk whatever is asked of the hub; return a path to ask for."""

    def load(_name, _config, split):
        return _LOAD(builder, split=split, cache_dir=str(folder / "hub"), **files)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_fetch", cache(hub._fetch.__wrapped__))
    return "hub:owner/name"


def picture_recipe(folder: Path, base: Path | str, **sections) -> Path:
    """Write pictures and a recipe of a run that takes a second; ``sections`` are merged over its own."""
    recipe = {
        "model": {"path": str(base), "compute_dtype": "float32", "device": "cpu"},
        "task": {"kind": "image-classification"},
        "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
        "data": {
            "train": str(write_pictures(folder / "train", 12)),
            "eval": str(write_pictures(folder / "eval", 4, 100)),
        },
        "train": {"max_steps": 6, "learning_rate": 0.01, "optimizer": "adamw_torch", "micro_batch_size": 4},
        "memory": {"checkpointing": "block", "micro_batches": "as-given"},
        "output": {"dir": str(folder / "out")},
    }
    return save_recipe(folder, recipe, sections)


def picture_rows(folder: Path) -> list:
    """The examples of a folder of pictures, in memory."""
    return list(read_examples([Source(str(folder))], None, reader=LabelledPictureReader(ONE_LABEL)).examples)


def write_masks(folder: Path, count: int, first: int = 0) -> Path:
    """Write pictures of a box on noise, and masks that say where it is: 1 a cool one, 2 a hot one, 0 elsewhere."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        chance = np.random.default_rng(number)
        picture = np.clip(chance.normal(120, 15, (28, 28, 3)), 0, 255).astype(np.uint8)
        mask = np.zeros((28, 28), np.uint8)
        left, top = 14 * chance.integers(0, 2, 2)
        label = number % 2
        picture[top : top + 14, left : left + 14] = list(COLOURS.values())[label]
        mask[top : top + 14, left : left + 14] = 1 + label
        mask[0, 0] = 255
        Image.fromarray(picture).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")
    return folder


def mask_recipe(folder: Path, base: Path | str, **sections) -> Path:
    """Write a recipe as ``picture_recipe`` does, of pictures with masks."""
    data = {"train": str(write_masks(folder / "masked", 16)), "eval": str(write_masks(folder / "masked-eval", 6, 100))}
    sections["data"] = data | sections.get("data", {})
    train = {"max_steps": 30, "lr_scheduler": "constant"} | sections.pop("train", {})
    return picture_recipe(folder, base, task={"kind": "image-segmentation"}, train=train, **sections)
