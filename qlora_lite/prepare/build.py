"""Turn the sections of a recipe into the arguments of the lower layers: model, loop settings, the planner's job."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from qlora_lite.adapters.bottleneck import Bottleneck
from qlora_lite.adapters.checkpoint_names import set_checkpoint_name
from qlora_lite.adapters.files import Lora, begin_at, begin_with, keep_first
from qlora_lite.adapters.full import Full
from qlora_lite.adapters.lora.eva import EVA
from qlora_lite.adapters.lora.inject import Target
from qlora_lite.adapters.lora.layer import lora_scale
from qlora_lite.adapters.lora.qera import QERA
from qlora_lite.adapters.lora.start import (
    KAIMING,
    LOFTQ,
    First,
    Start,
    chosen_layers,
    load_first,
    set_base,
    take_first,
)
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.adapters.prefix import PrefixTuning
from qlora_lite.adapters.prompt import PromptTuning
from qlora_lite.adapters.read import adapter_bytes, begins_with_qera, changes_base, read_adapter
from qlora_lite.constraints import UPDATES_IN_FLOAT16, WITH_COMPILE
from qlora_lite.errors import CheckpointError, DoesNotFitError, ModelError
from qlora_lite.experts.packing import adapts_experts, expert_weights
from qlora_lite.memory.meter import free_bytes, set_memory_limit
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.cache import base_fingerprint
from qlora_lite.models.denoisers import load_denoiser, meta_denoiser
from qlora_lite.models.gguf_codes import Formats, kept_formats
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.gguf_settings import check_config
from qlora_lite.models.kept import check_kept
from qlora_lite.models.load import (
    KEEP,
    auto_dtype,
    fast_dtype,
    is_converted,
    load_model,
    name_of_base,
    refuse_stored,
    resolve_compute_dtype,
    resolve_device,
    stored_quantization,
)
from qlora_lite.models.locate import ModelFiles, locate
from qlora_lite.models.memory_options import MemoryOptions, memory_options_of, place, set_memory_options
from qlora_lite.models.nested import of_blocks, without_weights
from qlora_lite.models.published import published_formats
from qlora_lite.models.save import bnb_config
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.ops.stream import Ranks
from qlora_lite.planning.answering import left_on_host, memory_to_use, placement
from qlora_lite.planning.machine import Machine
from qlora_lite.planning.simulate import Job
from qlora_lite.quant.merging import GGUF, NF4
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import FORMER_NAMES, GRPO, WITH_VIRTUAL_TOKENS, Recipe
from qlora_lite.train.causal_lm import CausalLM
from qlora_lite.train.head_workload import HeadLoss
from qlora_lite.train.mask_head import MaskHead, MaskLoss
from qlora_lite.train.picture_chats import PictureChatLM
from qlora_lite.train.picture_embedding import PictureEmbedding
from qlora_lite.train.picture_head import PictureHead
from qlora_lite.train.policy import GroupPolicy, PolicyLM
from qlora_lite.train.preference import BETAS, SFT_WEIGHTS, USUAL_BETA, Preference, PreferenceLM
from qlora_lite.train.reward_head import PairLoss, RewardHead
from qlora_lite.train.sequence_head import SequenceHead
from qlora_lite.train.settings import (
    METHOD_SHARES,
    PREFERENCE_SHARE,
    START_SHARES,
    TrainSettings,
    auto_learning_rate,
    method_learning_rate,
)
from qlora_lite.train.transformer import ModelSpec
from qlora_lite.train.workload import BatchShape, Workload

from .recipe_denoiser import (
    FULL_RATE,
    LORA_RATE,
    denoiser_of,
    in_float32_or_bfloat16,
    pipeline_of,
    spec_of_recipe,
)
from .recipe_head import config_of, head_of, part_of, picture_processor, picture_reader

MICRO_BATCHES = "micro_batch_size", "gradient_accumulation_steps"
log = logging.getLogger(__name__)


def train_settings(recipe: Recipe) -> TrainSettings:
    """Return the loop's settings from a recipe.

    Raises:
        RecipeError: it is no recipe.
    """
    require_recipe(recipe)
    said = recipe.data.model_dump() | recipe.train.model_dump() | recipe.memory.model_dump()
    said["options"] = MemoryOptions(**fixed_options(recipe))
    said["learning_rate"] = learning_rate_of(recipe)
    said["max_tokens"], said["packing"] = recipe.sequence_tokens, recipe.packs
    return TrainSettings(**{field.name: said[field.name] for field in fields(TrainSettings) if field.name != "shares"})


def learning_rate_of(recipe: Recipe) -> float:
    """Return the peak learning rate that a recipe sets, or that auto means for its model and what is trained.

    Raises:
        ModelError: the model's configuration is not known here, or says no hidden size.
    """
    if recipe.train.learning_rate != "auto":
        return recipe.train.learning_rate
    if recipe.generates_pictures:
        return FULL_RATE if recipe.adapter.method == "full" else LORA_RATE
    config, lora = of_blocks(config_of(recipe)), recipe.lora
    if not isinstance(width := getattr(config, "hidden_size", None), int):
        raise ModelError(
            "train.learning_rate auto needs the model's hidden_size, which its configuration does not say; set a number"
        )
    if recipe.adapter.method in METHOD_SHARES:
        rate = method_learning_rate(config.model_type, width, recipe.adapter.method)
    else:
        scale = lora_scale(lora.alpha, lora.rank, lora.rslora)
        rate = auto_learning_rate(config.model_type, width, lora.rank, scale)
    share = PREFERENCE_SHARE if recipe.train.objective != "sft" else 1.0
    share *= START_SHARES.get(lora.start, 1.0) if lora.start_alternations else 1.0  # none is the plain start
    return rate if share == 1.0 else float(f"{rate * share:.1e}")


def fixed_options(recipe: Recipe) -> dict[str, Any]:
    """Return the memory options that a recipe sets, by the names of ``MemoryOptions``; those left to the planner are
    not in it."""
    said = recipe.memory.model_dump() | {"compile": recipe.train.compile}
    return memory_options_of(said | WITH_COMPILE if recipe.train.compile else said)  # each is that or "auto"


def compute_dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return the type that a recipe's model computes in on a device."""
    m = recipe.model
    if recipe.generates_pictures:
        return in_float32_or_bfloat16(resolve_compute_dtype(m.compute_dtype, device))
    asks = m.compute_dtype == "auto" and fast_dtype(device) == torch.float16  # else the model does not matter
    model_type = of_blocks(config_of(recipe)).model_type if asks else ""
    return resolve_compute_dtype(m.compute_dtype, device, model_type)


def build_model(
    recipe: Recipe,
    options: MemoryOptions | None = None,
    adapter: Path | None = None,
    first: First | None = None,
    ranks: Ranks | None = None,
) -> nn.Module:
    """Load a recipe's base model on its device, with LoRA weights, for training.

    Args:
        options: which of its weights stay in host memory, on a disk or on other ranks.
        adapter: see ``add_adapter``.
        first: what the LoRA weights begin as, of lora.start eva and qera.
        ranks: among which weights are divided.
    """
    m = recipe.model
    device = resolve_device(m.device)
    dtype = compute_dtype_of(recipe, device)
    options = options or MemoryOptions()
    if recipe.generates_pictures:
        model = load_denoiser(pipeline_of(recipe, with_weights=True).denoiser, spec_of_recipe(recipe, dtype))
        add_adapter(recipe, model, adapter)
        paths = map(model.get_submodule, model.block_paths())
        return place(model, device, options, list(paths), trains_base=method_of(recipe).trains_base)
    model = load_model(
        m.path,
        m.quant,
        m.double_quant,
        dtype,
        "cpu" if options.places_weights else device,
        m.revision,
        quant_head=m.quant_head,
        in_files=options.loads_from_files,
        keep_16bit=m.keep_16bit,
        start=start_of(recipe),
        head=head_of(recipe),
        with_vision=recipe.with_vision,
    )
    add_adapter(recipe, model, adapter)
    if first:
        begin_at(model, first)
        if recipe.lora.start == QERA:
            keep_first(model, first)
    if not options.places_weights:
        return model
    in_files = not is_converted(config_of(recipe), m.quant, dtype)
    trains_base = method_of(recipe).trains_base
    return place(model, device, options, trains_base=trains_base, ranks=ranks, in_files=in_files)


def add_adapter(recipe: Recipe, model: nn.Module, adapter: Path | None = None) -> nn.Module:
    """Add a recipe's LoRA weights to a base model (a skeleton, too); return the model.

    Args:
        adapter: folder of the adapter that lora.init_from means; None makes new factors.

    Raises:
        ModelError: a target matches no layer, or the adapter is not of the recipe's layers, ranks and scales.
    """
    first = read_adapter(model, adapter) if adapter else None
    torch.manual_seed(recipe.train.seed)
    method_of(recipe).apply(model)
    if any(expert_weights(model)) and not adapts_experts(model):
        log.info("the model's experts get no LoRA weights; lora.targets: [all-linear, experts] adapts them too")
    if adapter is None or first is None:
        return model
    if begins_with_qera(adapter):
        keep_first(model, load_first(adapter))
    return begin_with(model, first)


def tokens_of(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """Return the tokens of ``adapter.train_tokens``, rising, and how many the tokenizer has without new ones.

    Without a tokenizer, in a plan of what is not there yet, they are those behind the model's vocabulary.
    """
    wanted, m = recipe.adapter.train_tokens, recipe.model
    if not wanted:
        return (), 0
    try:
        known = len(load_tokenizer(m.path, m.revision))
        found = load_tokenizer(m.path, m.revision, wanted).convert_tokens_to_ids(list(wanted))
    except ModelError:
        known = read_config(m.path, m.revision).get_text_config(decoder=True).vocab_size
        found = range(known, known + len(wanted))
    return tuple(sorted({*found})), known


def start_of(recipe: Recipe) -> Start | None:
    """Return what splits a recipe's weights between base and LoRA weights; None if nothing does."""
    x = recipe.lora
    if x.start in (KAIMING, EVA, QERA) or (x.start == LOFTQ and not x.start_alternations):
        return None
    return Start(
        x.start,
        x.start_alternations,
        targets_of(recipe),
        x.rank,
        x.alpha,
        x.rslora,
        getattr(torch, x.dtype),
        recipe.model.keep_16bit,
    )


def without_start(recipe: Recipe) -> Recipe:
    """Return a recipe whose base is the model as its files have it."""
    unset = {name: Recipe.model_fields["lora"].default.model_dump()[name] for name in ("start", "start_alternations")}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=unset)})


def base_files(recipe: Recipe) -> ModelFiles:
    """Return the files of a recipe's base model.

    Raises:
        ModelError: see ``locate``, and ``models.pipelines.Pipeline.files``.
    """
    m = recipe.model
    if recipe.generates_pictures:
        return pipeline_of(recipe, with_weights=True).files(m.path)
    return locate(m.path, m.revision)


def fingerprint_of(recipe: Recipe, files: ModelFiles) -> str:
    """Return what names the base that a recipe's LoRA weights belong to, by its content and how it was split."""
    if (start := start_of(recipe)) is None:
        return base_fingerprint(files)
    return name_of_base(files, start, *quantization_of(recipe, files.config))


def targets_of(recipe: Recipe) -> tuple[Target, ...]:
    """Return what lora.targets names."""
    return tuple(Target(t.pattern, t.rank, t.alpha) for t in recipe.lora.targets)


def method_of(recipe: Recipe) -> AdapterMethod:
    """Return the adapter method that a recipe describes."""
    if recipe.adapter.method == "bottleneck":
        b = recipe.bottleneck
        return Bottleneck(b.width, b.placement, b.activation, getattr(torch, b.dtype))
    if recipe.adapter.method in WITH_VIRTUAL_TOKENS:
        p = recipe.prompt
        begin = p.virtual_tokens, _first_of_prompt(recipe)
        return PrefixTuning(*begin) if recipe.adapter.method == "prefix" else PromptTuning(*begin, p.encoder_width)
    if recipe.adapter.method == "full":
        return Full(recipe.adapter.switch_every)
    x, is_dora = recipe.lora, recipe.adapter.method == "dora"
    also = recipe.adapter.train_also, recipe.adapter.train_also_lr_ratio, *tokens_of(recipe)
    how = x.rank, x.alpha, x.dropout, x.rslora, getattr(torch, x.dtype), is_dora
    return Lora(targets_of(recipe), *how, *also, start_of(recipe), recipe.train.merge_aware, recipe.problem is not None)


def _first_of_prompt(recipe: Recipe) -> tuple[int, ...]:
    """Return the tokens of ``prompt.init_text``; none without a tokenizer, in a plan of what is not there yet."""
    text, m = recipe.prompt.init_text, recipe.model
    if not text:
        return ()
    try:
        return tuple(load_tokenizer(m.path, m.revision)(text, add_special_tokens=False).input_ids)
    except ModelError:
        return ()


def build_to_use(
    recipe: Recipe, adapters: Sequence[Path] = (), context_tokens: int | None = None, use_cache: bool = True
) -> nn.Module:
    """Load a recipe's base model for answers and evaluations, its weights on the device as far as they fit.

    From then on the process is capped at ``memory.budget``.

    Args:
        adapters: folders of those that the device must have room for; they are for the caller to attach. Without any,
            the model is loaded as its files have it, whatever lora.start is.
        context_tokens: of the longest prompt with its answer that it must have room for; None is data.max_tokens.
        use_cache: keep and reuse the quantised model on disk.
    """
    m = recipe.model
    device = resolve_device(m.device)
    dtype = compute_dtype_of(recipe, device)
    # without fused kernels, which training alone tries
    tiles, options = (
        MemoryOptions(tile_tokens=fixed_options(recipe).get("tile_tokens"), kernels="plain"),
        MemoryOptions(),
    )
    memory = memory_to_use(device, recipe.memory.budget_bytes) if recipe.problem is None else None
    if memory is not None:
        set_memory_limit(device, None)  # loading may take more for a moment
        skeleton = build_skeleton(recipe)
        if tiles.tile_tokens:
            set_memory_options(skeleton, tiles)
        memory -= sum(adapter_bytes(folder) for folder in adapters)
        options = placement(skeleton, context_tokens or recipe.data.max_tokens, memory, free_bytes(torch.device("cpu")))
    model = load_model(
        m.path,
        m.quant,
        m.double_quant,
        dtype,
        "cpu" if options.places_weights else device,
        m.revision,
        use_cache,
        quant_head=m.quant_head,
        in_files=options.weights_on_disk,
        keep_16bit=m.keep_16bit,
        start=start_of(recipe) if adapters else None,
        head=head_of(recipe),
        with_vision=recipe.with_vision,
    )
    take_first(model)  # which training alone begins with
    if options.resident_layers is not None and any(map(changes_base, adapters)):
        raise DoesNotFitError(
            "the GPU has no room for all weights, and those of an adapter that has norms, biases or "
            "tables of its own cannot be brought to it one block at a time: merge it (qlora-lite "
            "merge), and use the merged model"
        )
    if options.places_weights:
        left = left_on_host(options, len(blocks(model)))
        log.warning("the GPU has no room for all weights, so that answers take longer; in host memory: %s", left)
        place(model, device, options)
    if tiles.tile_tokens:
        set_memory_options(model, tiles)
    set_memory_limit(device, recipe.memory.budget_bytes)
    return model


def build_skeleton(recipe: Recipe) -> nn.Module:
    """Return a recipe's base model on the meta device, its layers in 4 bit where those of the loaded one are.

    Raises:
        ModelError: a pattern of model.keep_16bit matches no layer, or the model has one in 4 bit only.
    """
    m = recipe.model
    dtype = compute_dtype_of(recipe, resolve_device(m.device))
    if recipe.generates_pictures:
        return meta_denoiser(spec_of_recipe(recipe, dtype))
    part = part_of(recipe)
    check_kept(part.config, m.keep_16bit, m.path)
    quantization = quantization_of(recipe, part.config.to_dict())
    formats = formats_of(recipe, part.config)
    model = meta_model(part.config, *quantization, dtype, m.quant_head, m.keep_16bit, formats)
    if start := start_of(recipe):
        set_base(model, name_of_base(locate(m.path, m.revision), start, *quantization))
    return set_checkpoint_name(model, part.outside)


def job_of(recipe: Recipe, config, machine: Machine, eval_shape: BatchShape | None) -> Job:
    """Describe a recipe's training step for the planner; the shape of its micro-batches is the planner's to set.

    Args:
        config: transformers configuration of the model; None of a denoiser.
        machine: planned for.
        eval_shape: of the largest evaluation batch, None without one.

    Raises:
        ModelError: the machine is a GPU that has no bfloat16, and the recipe asks for it; or the step is to
            compute in float16 and update LoRA weights in backward; or see ``build_skeleton``.
    """
    m, t = recipe.model, recipe.train

    def job(work: Workload) -> Job:
        return Job(
            work,
            BatchShape((1,), 1),
            eval_shape,
            machine.device_type,
            t.optimizer,
            t.stochastic_rounding,
            t.max_grad_norm,
            t.loraplus_lr_ratio,
            deterministic=t.deterministic,
            saved_adapters=1 if eval_shape is None else 2,
            capability=machine.compute_capability,
        )

    if recipe.generates_pictures:
        auto = in_float32_or_bfloat16(machine.dtype)
        dtype = auto if m.compute_dtype == "auto" else getattr(torch, m.compute_dtype)
        return job(denoiser_of(recipe, method_of(recipe), dtype))
    quant, double_quant = quantization_of(recipe, config.to_dict())
    start = start_of(recipe)
    needs_16_bit = start.kind if start else QERA if recipe.lora.start == QERA else None
    refuse_stored(needs_16_bit, stored_quantization(config.to_dict()))
    auto = auto_dtype(machine.dtype, config.model_type)
    dtype = auto if m.compute_dtype == "auto" else getattr(torch, m.compute_dtype)
    if machine.device_type == "cuda" and dtype == torch.bfloat16 != machine.dtype:
        raise ModelError(
            "model.compute_dtype bfloat16 is for training on GPUs of compute capability 8.0 and later, "
            "since earlier ones only emulate it, slowly; leave it on auto"
        )
    method = method_of(recipe)
    if method.trains_base and (quant != "none" or dtype == torch.float16):
        what = (
            "computes in float16 here; write model.compute_dtype: float32"
            if quant == "none"
            else (f"is stored in {quant}; name its 16-bit files in model.path")
        )
        raise ModelError(f"adapter.method full trains 16-bit or 32-bit weights, and the model {what}")
    if dtype == torch.float16 and recipe.memory.optimizer_in_backward:
        raise ModelError(f"memory.optimizer_in_backward: {UPDATES_IN_FLOAT16}")
    if machine.device_type == "cuda" and t.deterministic and recipe.of_pictures:
        _check_deterministic(recipe, config)
    check_kept(config, m.keep_16bit, m.path)
    _check_merged(t.merge_aware, config, quant, dtype)
    if recipe.lora.start in (EVA, QERA):
        x = recipe.lora
        chosen_layers(without_weights(config), targets_of(recipe), x.rank, x.alpha, x.start)
    spec = ModelSpec(
        config,
        quant,
        double_quant,
        m.quant_head,
        dtype,
        recipe.data.max_tokens,
        m.keep_16bit,
        formats_of(recipe, config),
    )
    return job(workload_of(recipe, spec))


def _check_deterministic(recipe: Recipe, config) -> None:
    """Check that torch has deterministic operators on a GPU for pictures and their labels.

    source: torch.use_deterministic_algorithms, which names the loss of two dimensions and bicubic interpolation.

    Raises:
        ModelError: it has not.
    """
    pixels, tower = picture_processor(recipe), of_blocks(config)
    is_resized = (pixels.height, pixels.width) != (tower.image_size, tower.image_size)
    if recipe.has_masks or (is_resized and recipe.adapter.method == "full"):
        what = "the loss of masks" if recipe.has_masks else "position embeddings of another size that are trained"
        raise ModelError(f"train.deterministic: torch has no deterministic gradients for {what} on a GPU; remove it")


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


def workload_of(recipe: Recipe, spec: ModelSpec | None = None) -> Workload:
    """Return what a recipe trains: a head, a denoiser, or a language model by its objective.

    Args:
        spec: of the model, for a plan.
    """
    method, o, kind = method_of(recipe), recipe.objective, recipe.train.objective
    if recipe.generates_pictures:
        return denoiser_of(recipe, method, compute_dtype_of(recipe, resolve_device(recipe.model.device)))
    if (head := head_of(recipe)) and recipe.task.kind == "reward":
        return RewardHead(PairLoss(), method, spec, labels=head.labels)
    if head and recipe.has_masks:
        return MaskHead(MaskLoss(), method, spec, labels=head.labels, processor=picture_processor(recipe))
    if head and recipe.of_pictures:
        kind_of_head = PictureEmbedding if recipe.task.kind == "image-embedding" else PictureHead
        processor = picture_processor(recipe)
        return kind_of_head(HeadLoss(head.problem), method, spec, labels=head.labels, processor=processor)
    if head:
        return SequenceHead(HeadLoss(head.problem), method, spec, labels=head.labels)
    if kind == GRPO:
        how = o.group_size, o.max_completion_tokens, o.sampling_temperature, o.policy_loss, o.scale_rewards
        return PolicyLM(GroupPolicy(*how), method=method, spec=spec)
    if reader := picture_reader(recipe):
        return PictureChatLM(method=method, spec=spec, reader=reader)
    if recipe.preference is None:
        return CausalLM(method=method, spec=spec)
    beta = BETAS.get(kind, USUAL_BETA) if o.beta == "auto" else o.beta
    sft_weight = SFT_WEIGHTS.get(kind, 0.0) if o.sft_weight == "auto" else o.sft_weight
    weights = o.desirable_weight, o.undesirable_weight
    objective = Preference(kind, beta, o.label_smoothing, o.gamma, sft_weight, *weights)
    return PreferenceLM(objective=objective, method=method, spec=spec)


def work_to_measure(recipe: Recipe, virtual: int | None = None) -> CausalLM:
    """Return what computes the likelihood of a recipe's answers, whatever it learns them by.

    Args:
        virtual: see ``CausalLM``.
    """
    work = workload_of(recipe) if recipe.with_vision else CausalLM(virtual=virtual)
    assert isinstance(work, CausalLM)
    return work


def quantization_of(recipe: Recipe, config: dict) -> tuple[str, bool]:
    """Return the type of the linear layers' weights, and whether their absmax values are quantised too.

    Args:
        config: what the model's ``config.json`` says.
    """
    return stored_quantization(config) or (recipe.model.quant, recipe.model.double_quant)


def formats_of(recipe: Recipe, config) -> Formats:
    """Return the formats of the layers that keep the codes of the model's files; none where all are quantised here.

    Raises:
        ModelError: see ``kept_formats``, and ``locate``.
    """
    m = recipe.model
    if quantization_of(recipe, config.to_dict())[0] != KEEP:
        return ()
    return published_formats(config) or kept_formats(locate(m.path, m.revision, with_weights=False), config)


def with_plan(recipe: Recipe, options: Mapping[str, object], micro_batches: bool = True) -> Recipe:
    """Return a recipe with an earlier plan's memory options in place of those it leaves open.

    Args:
        options: settings by dotted key, as ``planning.candidate.Candidate.settings`` gives them.
        micro_batches: take those of the plan, too. Pictures are evaluated in batches of the recipe's own size.

    Raises:
        CheckpointError: a memory option is unknown or invalid.
    """
    sections: dict[str, dict] = {"memory": {"micro_batches": "as-given"}, "train": {}}
    try:
        for key, value in options.items():
            section, _, name = FORMER_NAMES.get(key, key).partition(".")
            if micro_batches or name not in MICRO_BATCHES:
                sections[section][name] = value
        changed = {
            name: type(getattr(recipe, name)).model_validate(getattr(recipe, name).model_dump() | values)
            for name, values in sections.items()
        }
    except (KeyError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"the plan on record is not one that this version makes: {error!r}") from None
    return recipe.model_copy(update=changed)
