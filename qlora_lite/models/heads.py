"""Models with a head for classification: one row of outputs for each sequence, or for each picture.

What transformers' ``AutoModelForSequenceClassification`` or ``AutoModelForImageClassification`` makes of a
configuration, so that peft and transformers load what is trained here. The configuration says it, by transformers' own
``problem_type`` and ``id2label``; without them (``nested.read_language_part``) the same files are those of a language
model.

A decoder's head reads the last token of a sequence, an encoder's the first one, or the mean of all. transformers
computes a head of a padded batch; here its modules are run on the tokens that they read, of packed sequences. Which
modules these are is asked of the model, and ``ext.heads.text`` compares the result with the model's own outputs.

Shapes: T tokens of N packed sequences, hidden states [T, D], outputs [N, C].
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from qlora_lite.adapters.parts import head_paths, is_headed, is_norm
from qlora_lite.errors import ModelError

from .nested import LanguagePart
from .pretrained import is_of_pictures

# What config.json says of heads that use the same modules otherwise, in words of this package: an adapter alone is not
# to be taken for one of image-classification. By task.kind.
MARKS = {"image-segmentation": "qlora_lite_pixel_labels", "image-embedding": "qlora_lite_embedding"}
_new: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()  # names of weights that no file had, by model


@dataclass(frozen=True, slots=True)
class Head:
    """What a head gives for each sequence.

    Args:
        problem: one of those of ``data.labels``, in transformers' words.
        labels: the names of its outputs, in order; of a number there is one.
        seed: of the weights that it begins with.
        of_pictures: whether it reads pictures and no text.
        mark: one of ``MARKS``; None of a head as transformers computes it.
    """

    problem: str
    labels: tuple[str, ...]
    seed: int = 0
    of_pictures: bool = False
    mark: str | None = None


def with_head(part: LanguagePart, head: Head | None) -> LanguagePart:
    """Return a language model as one with a head; None leaves it a language model.

    Raises:
        ModelError: transformers has no such model.
    """
    if is_of_pictures(part.config) != bool(head and head.of_pictures):
        raise ModelError(_other_inputs(part.config))
    if head is None:
        return part
    config = copy.deepcopy(part.config)
    if head.of_pictures:
        _describe(config, head)
        return replace(part, config=config)
    if part.whole is not None or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no model of the type {config.model_type} for sequence classification; "
            "choose another model"
        )
    _describe(config, head)
    return replace(part, config=config)


def _other_inputs(config) -> str:
    """Say that a model reads something else than is asked of it, or is no model that transformers has a head for."""
    if is_of_pictures(config):
        return f"a model of the type {config.model_type} reads pictures; write task.kind: image-classification"
    why = "transformers has no model of the type {} for image classification; choose DINOv2, ViT, SigLIP or CLIP"
    return why.format(config.model_type)


def _describe(config, head: Head) -> None:
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: number for number, label in enumerate(head.labels)}
    config.problem_type = head.problem
    if head.mark:
        setattr(config, head.mark, True)


def is_encoder(model: nn.Module) -> bool:
    """Return whether a model has a head that reads all tokens of a sequence by way of its first, or of their mean."""
    return is_headed(model) and not hasattr(model, "score")


def note_new(model: nn.Module, missing: Sequence[str]) -> set[str]:
    """Note which weights of a head no file has; return the other ones that are missing."""
    inside = tuple(f"{path}." for path in head_paths(model))
    new = {name for name in missing if name.startswith(inside)} if inside else set()
    _new[model] = frozenset(new)
    return {*missing} - new


def new_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the head's weights that no file had."""
    return _new.get(model, frozenset())


def begin_head(model: nn.Module, head: Head) -> None:
    """Draw the weights of the head that no file had: linear layers as transformers does, biases 0, norms 1.

    The configuration of a cached model may name other labels, as many, and gets these.
    """
    _describe(model.config, head)
    generator = torch.Generator().manual_seed(head.seed)
    scale = getattr(model.config, "initializer_range", None) or 0.02
    for name in sorted(new_weights(model)):
        path, _, leaf = name.rpartition(".")
        parameter = model.get_submodule(path)._parameters[leaf].data
        if leaf == "bias":
            parameter.zero_()
        elif is_norm(model.get_submodule(path)):
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))


def outputs_of(model: nn.Module, hidden: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
    """Return a head's outputs [N, C] for the last hidden states [T, D] of packed sequences.

    Raises:
        ModelError: the head is of a kind that is not known here.
    """
    rows = hidden.split([*row_lengths])
    if hasattr(model, "score"):  # a decoder's
        return model.score(torch.stack([row[-1] for row in rows]))
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        read = torch.stack([row.mean(0) for row in rows])
    else:
        read = torch.stack([row[0] for row in rows])
    if hasattr(model, "head"):  # ModernBERT
        return model.classifier(model.drop(model.head(read)))
    if not hasattr(model, "classifier"):
        raise ModelError(f"the head of a {type(model).__name__} is not known here; choose another model")
    alone = read[:, None]  # sequences of one token, of which these modules read the first
    pooler = getattr(model, "pooler", None) or getattr(model.base_model, "pooler", None)
    if pooler is None:  # RoBERTa, whose classifier is all of the head
        return model.classifier(alone)
    return model.classifier(model.dropout(pooler(alone)))
