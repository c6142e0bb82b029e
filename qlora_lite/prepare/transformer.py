"""A recipe's model of transformers: what most tasks load, plan and skeletons are made of, with or without a head."""

import torch
from torch import nn

from qlora_lite.adapters.checkpoint_names import set_checkpoint_name
from qlora_lite.adapters.lora.start import set_base
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.constraints import UPDATES_IN_FLOAT16
from qlora_lite.errors import ModelError
from qlora_lite.models.gguf_codes import Formats, kept_formats
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.gguf_settings import check_config
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.kept import check_kept
from qlora_lite.models.load import (
    KEEP,
    auto_dtype,
    fast_dtype,
    is_converted,
    load_model,
    name_of_base,
    resolve_compute_dtype,
    stored_quantization,
)
from qlora_lite.models.locate import locate
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.memory_options import place as place_model
from qlora_lite.models.nested import LanguagePart, of_blocks
from qlora_lite.models.published import published_formats
from qlora_lite.models.save import bnb_config
from qlora_lite.models.skeleton import meta_model, read_part
from qlora_lite.offload.stream import Ranks
from qlora_lite.planning.machine import Machine
from qlora_lite.quant.merging import GGUF, NF4
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.model_spec import TransformerSpec

from .method import find_method
from .objective import find_objective
from .start import check_start, rate_share, resolve_start


def describe_model(recipe: Recipe, head: Head | None, multimodal: bool) -> LanguagePart:
    """Return a recipe's model without weights, with a head if one is given; see ``models.skeleton.read_part``.

    Raises:
        ModelError: see ``read_part`` and ``models.heads.with_head``.
    """
    return with_head(read_part(recipe.model.path, recipe.model.revision, multimodal), head)


def read_config(recipe: Recipe, multimodal: bool):
    """Return the configuration of a recipe's model: the language model's inside a larger one, unless it is multimodal.

    Raises:
        ModelError: see ``read_part``.
    """
    return read_part(recipe.model.path, recipe.model.revision, multimodal).config


def quantization(recipe: Recipe, config: dict) -> tuple[str, bool]:
    """Return the type of the linear layers' weights, and whether their absmax values are quantized too.

    Args:
        config: what the model's ``config.json`` says.
    """
    return stored_quantization(config) or (recipe.model.quant, recipe.model.double_quant)


def kept_codes(recipe: Recipe, config) -> Formats:
    """Return the formats of the layers that keep the codes of the model's files; none where all are quantized here.

    Raises:
        ModelError: see ``kept_formats``, and ``locate``.
    """
    m = recipe.model
    if quantization(recipe, config.to_dict())[0] != KEEP:
        return ()
    return published_formats(config) or kept_formats(locate(m.path, m.revision, with_weights=False), config)


def compute_dtype(recipe: Recipe, device: torch.device, multimodal: bool) -> torch.dtype:
    """Return the type that a recipe's model computes in on a device of this machine."""
    stated = recipe.model.compute_dtype
    asks = stated == "auto" and fast_dtype(device) == torch.float16  # else the model does not matter
    return resolve_compute_dtype(stated, device, of_blocks(read_config(recipe, multimodal)).model_type if asks else "")


def auto_learning_rate(recipe: Recipe, multimodal: bool) -> float:
    """Return the peak learning rate that auto means for a recipe's model and what is trained.

    Raises:
        ModelError: the model's configuration is not known here, or says no hidden size.
    """
    config = of_blocks(read_config(recipe, multimodal))
    if not isinstance(width := getattr(config, "hidden_size", None), int):
        raise ModelError(
            "train.learning_rate auto needs the model's hidden_size, which its configuration does not say; set a number"
        )
    rate = find_method(recipe).auto_learning_rate(recipe, config.model_type, width)
    share = find_objective(recipe).rate_share * rate_share(recipe)
    return rate if share == 1.0 else float(f"{rate * share:.1e}")


def build_skeleton(recipe: Recipe, part: LanguagePart, dtype: torch.dtype) -> nn.Module:
    """Return a recipe's base model on the meta device, its layers in 4 bit where those of the loaded one are.

    Args:
        part: the model, see ``describe_model``.

    Raises:
        ModelError: a pattern of model.keep_16bit matches no layer, or the model has one in 4 bit only.
    """
    m = recipe.model
    check_kept(part.config, m.keep_16bit, m.path)
    how = quantization(recipe, part.config.to_dict())
    model = meta_model(part.config, *how, dtype, m.quant_head, m.keep_16bit, kept_codes(recipe, part.config))
    if start := resolve_start(recipe):
        set_base(model, name_of_base(locate(m.path, m.revision), start, *how))
    return set_checkpoint_name(model, part.outside)


def load(
    recipe: Recipe,
    device: torch.device | str,
    dtype: torch.dtype,
    in_files: bool,
    use_cache: bool,
    head: Head | None,
    multimodal: bool,
) -> nn.Module:
    """Load a recipe's base model; see ``prepare.task.Task.load`` and ``models.load.load_model``."""
    m = recipe.model
    return load_model(
        m.path,
        m.quant,
        m.double_quant,
        dtype,
        device,
        m.revision,
        use_cache,
        quant_head=m.quant_head,
        in_files=in_files,
        keep_16bit=m.keep_16bit,
        start=resolve_start(recipe),
        head=head,
        with_vision=multimodal,
    )


def place(
    recipe: Recipe,
    model: nn.Module,
    device: torch.device,
    options: MemoryOptions,
    trains_base: bool,
    ranks: Ranks | None,
    multimodal: bool,
) -> nn.Module:
    """Move a recipe's model to its device; see ``models.memory_options.place``."""
    if not options.places_weights:
        return model
    stored, dtype = read_config(recipe, multimodal), compute_dtype(recipe, device, multimodal)
    in_files = not is_converted(stored, recipe.model.quant, dtype)
    return place_model(model, device, options, trains_base=trains_base, ranks=ranks, in_files=in_files)


def plan_spec(
    kind: type[TransformerSpec], recipe: Recipe, config, method: AdapterMethod, machine: Machine
) -> TransformerSpec:
    """Return the model of a recipe as a plan has it.

    Args:
        kind: of model.
        config: transformers' configuration of the model.
        machine: planned for.

    Raises:
        ModelError: the machine is a GPU that has no bfloat16, and the recipe asks for it; or the step is to compute in
            float16 and update weights in backward; or the model is stored in a way that the recipe has no use for.
    """
    m, t = recipe.model, recipe.train
    quant, double_quant = quantization(recipe, config.to_dict())
    check_start(recipe, config)
    auto = auto_dtype(machine.dtype, config.model_type)
    dtype = auto if m.compute_dtype == "auto" else getattr(torch, m.compute_dtype)
    if machine.device_type == "cuda" and dtype == torch.bfloat16 != machine.dtype:
        raise ModelError(
            "model.compute_dtype bfloat16 is for training on GPUs of compute capability 8.0 and later, "
            "since earlier ones only emulate it, slowly; leave it on auto"
        )
    if method.trains_base and (quant != "none" or dtype == torch.float16):
        what = (
            "computes in float16 here; write model.compute_dtype: float32"
            if quant == "none"
            else (f"is stored in {quant}; name its 16-bit files in model.path")
        )
        raise ModelError(f"adapter.method full trains 16-bit or 32-bit weights, and the model {what}")
    if dtype == torch.float16 and recipe.memory.optimizer_in_backward:
        raise ModelError(f"memory.optimizer_in_backward: {UPDATES_IN_FLOAT16}")
    check_kept(config, m.keep_16bit, m.path)
    _check_merged(t.merge_aware, config, quant, dtype)
    return kind(
        config,
        quant,
        double_quant,
        m.quant_head,
        dtype,
        recipe.data.max_tokens,
        m.keep_16bit,
        kept_codes(recipe, config),
    )


def _check_merged(to: str, config, quant: str, dtype: torch.dtype) -> None:
    """Check that merging can write what ``train.merge_aware`` trains: a 4-bit checkpoint, or a GGUF file.

    Raises:
        ModelError: it cannot.
    """
    try:
        if to == NF4 == quant:
            bnb_config(meta_model(config, quant, True, dtype))
        elif to in GGUF:
            check_config(config, gguf_names(config).architecture)
    except ModelError as error:
        raise ModelError(f"train.merge_aware {to}: {error}; set it to off") from error
