"""The one door to transformers' ``from_pretrained`` and ``from_config``: code from a model's folder is never run.

Where transformers is not told so, it asks on standard input whether to run the code that a folder's ``auto_map`` names,
and any "y" there is an answer. It would also fetch the kernels that a ``config.json`` names under
``attn_implementation``, which are code too. A folder with an ``auto_map`` loads if transformers has the classes itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from qlora_lite.errors import ModelError

from .locate import read_json

_LARGEST = {
    r"(^|_)(layers?|blocks|depth)(_per_block)?$": 500,
    r"(^|_)experts$": 10_000,
    r"(^|_)(size|dims?|heads|rank|embd|channels|width|model|ff|inner)$": 2**24,
}
# What transformers raises over files that contradict themselves, or want a library that is not there.
BUILD_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RuntimeError,
    ArithmeticError,
    ImportError,
    StrictDataclassError,
)
_NO_CODE = {"local_files_only": True, "trust_remote_code": False}


def tokenizer_of(folder: Path, auto=AutoTokenizer, **options):
    """Return the tokenizer of a folder.

    Raises:
        ModelError: it takes code from the folder; beside what transformers raises.
    """
    if "gguf_file" not in options:
        _refuse_code(folder)
    return auto.from_pretrained(folder, **_NO_CODE, **options)


def config_of(folder: Path, **options):
    """Return the configuration of a folder, with attention and experts as transformers chooses them.

    Raises:
        ModelError: it takes code from the folder, or has sizes of no model; beside what transformers raises.
    """
    if "gguf_file" not in options:  # which says all that the folder's own files would
        _refuse_code(folder)
    config = AutoConfig.from_pretrained(folder, **_NO_CODE, **options)
    config._attn_implementation = config._experts_implementation = None  # of the parts inside it, too
    refuse_sizes(folder, config.to_dict())
    return config


class ImagesAlone(NamedTuple):
    """What is read of a processor whose own class needs further libraries, by the names that it has there."""

    image_processor: Any
    image_token: str
    chat_template: str | None
    beside: tuple[str, str]  # what stands behind each row of a picture but the last, and behind that; or before and
    # behind a picture; of some families


def processor_of(folder: Path, model_type: str, tokens: int, image_token: int | None = None):
    """Return the processor of a vision-language model, which resizes by Pillow wherever it runs.

    SmolVLM's own needs libraries for videos; what it makes of pictures, that of Idefics3 makes too.

    Args:
        tokens: of a picture of one size.
        image_token: the token for a part of a picture, of a model whose pictures keep their shapes; of such a one the
            processor of its images alone is returned.

    Raises:
        ModelError: it takes code from the folder; beside what transformers raises.
    """
    _refuse_code(folder)
    if model_type == "smolvlm" or image_token is not None:
        images, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil", **_NO_CODE), tokenizer_of(folder)
        if image_token is None:
            return Idefics3Processor(images, tokenizer, tokens)
        said, older = (
            {} if not path.is_file() else read_json(path)
            for path in (folder / "processor_config.json", folder / "chat_template.json")
        )
        beside = said.get("image_break_token", "[IMG_BREAK]"), said.get("image_end_token", "[IMG_END]")
        if model_type == "gemma4":
            beside = tokenizer.boi_token, tokenizer.eoi_token
        template = tokenizer.chat_template or older.get("chat_template")
        return ImagesAlone(images, tokenizer.convert_ids_to_tokens(image_token), template, beside)
    return AutoProcessor.from_pretrained(folder, backend="pil", **_NO_CODE)


def is_of_pictures(config) -> bool:
    """Return whether a configuration is that of a vision encoder, which transformers puts a head for pictures on."""
    kind = type(config)
    return kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def is_vision_language(config) -> bool:
    """Return whether a configuration is that of a language model and a vision tower together."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def auto_of(config):
    """Return transformers' class for a configuration: a causal language model, alone or with a vision tower, or one
    with a head (``heads``)."""
    if is_vision_language(config):
        return AutoModelForImageTextToText
    if config.problem_type and is_of_pictures(config):
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification if config.problem_type else AutoModelForCausalLM


def model_of(folder: Path, config=None, **options):
    """Return what transformers loads of a folder, see ``auto_of``.

    Args:
        folder: holds the weights.
        config: None for the folder's own.
        options: of ``from_pretrained``.

    Raises:
        ModelError: it takes code from the folder; beside what transformers raises.
    """
    config = config or config_of(folder)
    return auto_of(config).from_pretrained(folder, config=config, **_NO_CODE, **options)


def text_encoder_of(kind: Any, folder: Path, **options):
    """Return what a class of transformers loads of a text encoder's folder in a diffusion pipeline, and what
    ``from_pretrained`` says of that: which weights are missing.

    Args:
        kind: the class.
        options: of ``from_pretrained``.

    Raises:
        ModelError: it has sizes of no model; beside what transformers raises.
    """
    config = kind.config_class.from_pretrained(folder, **_NO_CODE)
    config._attn_implementation = config._experts_implementation = None
    refuse_sizes(folder, config.to_dict())
    return kind.from_pretrained(folder, config=config, output_loading_info=True, **_NO_CODE, **options)


def model_with(config, state: dict[str, torch.Tensor], **options):
    """Return transformers' model of a configuration with tensors by the names of its parameters, see ``auto_of``.

    Args:
        options: of ``from_pretrained``.
    """
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if config.problem_type else MODEL_FOR_CAUSAL_LM_MAPPING
    return classes[type(config)].from_pretrained(None, config=config, state_dict=state, **_NO_CODE, **options)


def model_from(config, auto=None, **options) -> nn.Module:
    """Return transformers' model of a configuration, its weights not loaded.

    Args:
        auto: transformers' class for it; None is that of ``auto_of``.
    """
    return (auto or auto_of(config)).from_config(config, trust_remote_code=False, **options)


def _refuse_code(folder: Path) -> None:
    """Raise if transformers lacks a class for which a folder's own files name code."""
    checks = {
        "config.json": ("model_type", _is_known),
        "tokenizer_config.json": ("tokenizer_class", tokenizer_class_from_name),
    }
    for file, (key, is_known) in checks.items():
        said = read_json(folder / file) if (folder / file).is_file() else {}
        name = said.get(key)
        if said.get("auto_map") and isinstance(name, str) and not is_known(name):
            raise ModelError(
                f"{folder / file}: {key} {name!r} needs code from the model's own folder (auto_map), and "
                "code from a model's folder is never run; choose a model whose classes transformers has "
                "itself (a newer transformers may)"
            )


def refuse_sizes(folder: Path, said: Mapping[str, Any]) -> None:
    """Refuse a configuration of which a number, or that of a part, would take for ever to build without weights.

    Raises:
        ModelError: one does.
    """
    for key, value in said.items():
        if isinstance(value, Mapping):
            refuse_sizes(folder, value)
        largest = next((limit for pattern, limit in _LARGEST.items() if re.search(pattern, str(key))), None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, list | tuple):
                refuse_sizes(folder, {key: each})
            elif largest and isinstance(each, int) and each > largest:
                raise ModelError(
                    f"the configuration in {folder} has {key} {each:,}, and no model has more than "
                    f"{largest:,}; take it from the model's source again"
                )


def _is_known(model_type: str) -> bool:
    """Return whether transformers has a language model of this type, alone or inside another."""
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
    return model_type in CONFIG_MAPPING and any(CONFIG_MAPPING[model_type] in known for known in kinds)
