"""The language model inside a larger one: Gemma 3 with its vision tower, Mistral 3, Qwen3.5 and their like.

The config.json of such a model nests the language model's. That one alone is planned, loaded and trained: the tensors
of towers and projectors are not read. What it is called in the files is asked of transformers: the class that it has
for the whole is built on the meta device, and the decoder there is found by its class.

Adapters are for the whole, since that is what others load from the same files, see ``adapters.checkpoint_names``. Some
families (Qwen3.5) are taken apart by ``AutoModelForCausalLM`` itself; their adapters are for the language model.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qlora_lite.errors import ModelError, first_line

from .anatomy import decoder
from .cache import from_gguf_header
from .gguf_settings import as_the_file_says
from .locate import ModelFiles
from .pretrained import BUILD_ERRORS, config_of, is_of_pictures, is_vision_language, model_from
from .vision_language import FAMILIES, check_family


@dataclass(frozen=True, slots=True)
class LanguagePart:
    """A language model, and where it lies in a larger one.

    Args:
        config: its transformers configuration.
        whole: the larger model on the meta device; None where there is none, or transformers takes it apart itself.
        paths: how the names of its decoder's and its head's weights begin in the whole -> in the language model.
    """

    config: PreTrainedConfig
    whole: nn.Module | None
    paths: dict[str, str]

    @property
    def outside(self) -> tuple[str, str] | None:
        """How paths of the decoder's modules begin here and in the whole; None if they begin alike."""
        return None if self.whole is None else next((here, there) for there, here in self.paths.items())

    def key_mapping(self, stored: Iterable[str]) -> dict[str, str] | None:
        """Return transformers' patterns that turn the names of the files into the language model's."""
        if self.whole is None:
            return None
        mapping = {}
        for name, (renamed, _) in names_in_model(self.whole, stored).items():
            for there, here in self.paths.items():
                rest = renamed.removeprefix(there)
                begin = name.removesuffix(rest)
                if rest != renamed and begin not in ("", name, here):
                    mapping[f"^{re.escape(begin)}"] = here
        return mapping

    def here(self, path: str, mapping: dict[str, str] | None) -> str:
        """Return what a path of the files or of the whole is in the language model.

        Args:
            mapping: see ``key_mapping``.
        """
        begins = (mapping or {}) | {f"^{re.escape(there)}": here for there, here in self.paths.items()}
        return next((re.sub(begin, here, path) for begin, here in begins.items() if re.search(begin, path)), path)


def of_blocks(config):
    """Return the configuration that says how many blocks there are, and their width: of CLIP that of its tower, of a
    vision-language model that of its language model."""
    if is_vision_language(config):
        return config.get_text_config(decoder=True)
    return config.vision_config if is_of_pictures(config) and hasattr(config, "vision_config") else config


def read_language_part(
    folder: Path, name: str, gguf_file: str | None = None, with_vision: bool = False
) -> LanguagePart:
    """Read the configuration of a folder, or of a GGUF file in it, and find the language model.

    Args:
        name: of the model, for messages.
        gguf_file: its name in the folder.
        with_vision: see ``language_part``.

    Raises:
        ModelError: it cannot be read, or says that 16-bit weights are in 4 bit; see ``as_the_file_says`` and
            ``language_part``.
    """
    try:
        if gguf_file:
            path = folder / gguf_file
            config = as_the_file_says(from_gguf_header(path, "config", config_of, config_of), path)
        else:
            config = config_of(folder)
            _refuse_unpacked(folder, config)
        config.problem_type = None  # what is built of it is for others to say (``heads.with_head``)
    except (OSError, *BUILD_ERRORS) as error:
        raise ModelError(f"cannot read the configuration of {name}: {first_line(error)}") from error
    return language_part(config, with_vision)


def _refuse_unpacked(folder: Path, config) -> None:
    """Raise if a configuration says that bitsandbytes packed the weights, and those that are there are in 16 bit."""
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != "bitsandbytes":
        return
    weights = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "adapter_model.safetensors"]
    try:
        is_packed = any(".quant_state." in name for path in weights for name in _names_in(path))
    except (OSError, SafetensorError):  # which loading them reports
        return
    if weights and stored.get("load_in_4bit", stored.get("_load_in_4bit")) and not is_packed:
        raise ModelError(
            f"{folder / 'config.json'} says that its weights are in 4 bit (quantization_config), and its "
            "files hold them in 16 bit: remove quantization_config from it"
        )


def language_part(config, with_vision: bool = False) -> LanguagePart:
    """Return the language model of a configuration, which may be all that there is.

    Args:
        with_vision: return the whole of a vision-language model.

    Raises:
        ModelError: transformers cannot load the language model alone, or the whole is of no family that is known.
    """
    if with_vision:
        check_family(config)
        return LanguagePart(config, None, {})
    if is_of_pictures(config):  # CLIP and SigLIP nest a vision tower, which transformers takes apart itself
        return LanguagePart(config, None, {})
    try:
        text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    except ValueError as error:
        raise _not_alone(config, error) from error
    if text is config:
        return LanguagePart(config, None, {})
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_alone(config, f"it has no class for {text.model_type}")
    text = copy.deepcopy(text)
    if stored := getattr(config, "quantization_config", None):
        text.quantization_config = stored
    try:
        return _taken_out(config, text)
    except BUILD_ERRORS as error:
        raise _not_alone(config, error) from error


def _taken_out(config, text) -> LanguagePart:
    whole = _whole(config)
    if type(whole.config) is type(text):
        return LanguagePart(text, None, {})
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", text.tie_word_embeddings))
    return LanguagePart(text, whole, _paths(whole, without_weights(text)))


def _not_alone(config, reason: object) -> ModelError:
    said, is_known = next(iter(str(reason).strip().splitlines()), ""), config.model_type in FAMILIES
    cure = (
        "set task.kind to image-text-to-text, which takes chats without pictures too"
        if is_known
        else ("choose a model of text alone")
    )
    return ModelError(
        f"models of the type {config.model_type} hold a language model among other parts, and "
        f"transformers cannot load it alone: {said}; {cure}"
    )


def _whole(config) -> nn.Module:
    known = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    auto = next((auto for auto, mapping in known.items() if type(config) in mapping), None)
    if auto is None:
        raise _not_alone(config, "it has no class for the whole")
    return without_weights(config, auto)


def without_weights(config, auto=None, **options) -> nn.Module:
    """Return transformers' model of a configuration on the meta device, in 16 bit whatever it says of quantisation."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return model_from(config, auto, **options)


def _paths(whole: nn.Module, alone: nn.Module) -> dict[str, str]:
    inner = decoder(alone)
    found = [path for path, module in whole.named_modules() if type(module) is type(inner)]
    if len(found) != 1:
        raise _not_alone(
            whole.config, f"{type(whole).__name__} has {len(found)} parts of the class {type(inner).__name__}"
        )
    paths = {f"{found[0]}.": f"{_path_of(inner, alone)}."}
    if (head := whole.get_output_embeddings()) is not None:
        paths[f"{_path_of(head, whole)}."] = f"{_path_of(alone.get_output_embeddings(), alone)}."
    return paths


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, each in model.named_modules() if each is module)


def stored_names(files: ModelFiles) -> list[str]:
    """Return the names of all tensors in safetensors files."""
    return [name for path in files.weights for name in _names_in(path)]


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def names_in_model(
    model: nn.Module, stored: Iterable[str], key_mapping: dict[str, str] | None = None
) -> dict[str, tuple[str, str | None]]:
    """Return the parameter that transformers makes of each stored name, and the rule by which it joins or splits it.

    Args:
        model: shapes are enough.
        key_mapping: patterns that are applied first, as ``from_pretrained`` takes them.
    """
    mapping = get_model_conversion_mapping(model, key_mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    state = model.state_dict()
    return {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state) for name in stored}


def stacking_rules(model: nn.Module, key_mapping: dict[str, str] | None = None) -> dict[str, tuple[int, int]]:
    """Return the rules that stack the weights of single experts, with which of how many parts of the rows they give.

    The first product of gated experts has two parts. Arguments as for ``names_in_model``.
    """
    found: dict[str, tuple[int, int]] = {}
    for entry in get_model_conversion_mapping(model, key_mapping):
        if isinstance(entry, WeightConverter):
            steps = [(type(step), getattr(step, "dim", None)) for step in entry.operations]
            if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                parts = entry.source_patterns
                found |= {rule: (number, len(parts)) for number, rule in enumerate(parts)}
    return found


def turning_rules(model: nn.Module, key_mapping: dict[str, str] | None = None) -> set[str]:
    """Return the rules that exchange rows and columns of experts' weights, unless files have them as the model does.

    Arguments as for ``names_in_model``.
    """
    entries = (each for each in get_model_conversion_mapping(model, key_mapping) if isinstance(each, WeightConverter))
    turning = (entry for entry in entries if [*map(type, entry.operations)] == [Transpose])
    return {rule for entry in turning for rule in entry.source_patterns}
