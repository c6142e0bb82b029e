"""Load a base model as frozen 4-bit layers.

Several ways in, one result (a transformers model whose block linears are ``QuantLinear``): 16-bit safetensors
are quantised weight by weight while they are read; a checkpoint that is packed already is read as it is
(bitsandbytes' 4 bit here, others by ``published``); a GGUF file is dequantised and quantised again, or keeps its
codes (``gguf_codes``; families that it does not know are read by transformers); and whatever was quantised here before
comes from the cache.

Weights of the head, the embeddings and the norms keep the compute type; tied weights stay tied. Of a larger model the
language model alone is loaded (``nested``).
"""

import copy
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from qlora_lite.adapters.checkpoint_names import set_checkpoint_name
from qlora_lite.adapters.lora.start import First, Start, set_base
from qlora_lite.errors import ModelError, OutputError, first_line, require_one_of
from qlora_lite.experts.packing import projections, use_experts
from qlora_lite.files import cache_root, explain_write_errors
from qlora_lite.kernels.attention import row_attention
from qlora_lite.kernels.gated import use_lean_mlps
from qlora_lite.kernels.norm import use_lean_norms
from qlora_lite.memory.gpus import fastest_type
from qlora_lite.memory.meter import free_bytes, grow_segments, keep_few_kernels, use_device
from qlora_lite.quant.bnb import architectures
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.nf4 import from_bnb_state
from qlora_lite.units import counted, format_bytes

from .cache import base_fingerprint, cache_entry, check_sums
from .gguf_codes import kept_formats, read_codes
from .gguf_names import ARCHITECTURES
from .heads import Head, begin_head, note_new, with_head
from .kept import check_kept, kept_layers
from .locate import ModelFiles, locate
from .nested import LanguagePart, of_blocks, read_language_part, stored_names, without_weights
from .pretrained import is_of_pictures, is_vision_language, model_of, model_with
from .published import is_published, published_formats, published_state
from .quantizer import InFiles, QuantizeConfig, quantize_head, quantize_in_place, register, replace_weights
from .save import save_for_cache
from .split import read_first, save_first, split_in_place
from .unused_gpu import MEANT, fault_of_cuda, unsupported_gpu

log = logging.getLogger("qlora_lite")

_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)(a?)f?")  # as torch names what it was built for; a: that GPU alone
KEEP = "keep"
QUANTS = ("nf4", "fp4", KEEP, "none")
ROW_ATTENTION = "qlora_lite_rows"
# What model types begin with whose activations exceed float16, or whose gradients do at any scale of the loss, as users
# of vLLM and Unsloth found out
BEYOND_FLOAT16 = ("gemma2", "gemma3", "gemma4", "glm4", "gpt_oss", "plamo2", "qwen3_5", "qwen3_moe", "qwen3_vl_moe")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device to train on: CUDA if there is one, unless told otherwise; have it waste little memory.

    One line of the log names a GPU that is there and not supported.

    Raises:
        ModelError: CUDA is asked for and not usable; there is an NVIDIA GPU that torch cannot use, and nothing says
            that the CPU is meant; or the GPU is too old for this build of torch.
    """
    if name != "cpu" and (problem := fault_of_cuda()):
        raise ModelError(f"{problem}; or {MEANT}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch finds no CUDA device; see qlora-lite doctor")
    if name == "auto" and (unused := unsupported_gpu()):
        _warn_once(f"computing on the CPU, many times slower: {unused}; {MEANT}")
    usable = torch.cuda.is_available() if name == "auto" else name == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")
    if usable and (problem := missing_kernels(device)):
        raise ModelError(f"{problem}; or compute on the processor, with an empty CUDA_VISIBLE_DEVICES")
    grow_segments(device)
    keep_few_kernels(device)
    return device


@lru_cache
def _warn_once(text: str) -> None:
    log.warning(text)


def missing_kernels(device: torch.device) -> str:
    """Say why this build of torch or of bitsandbytes cannot compute on a GPU, and the cure; "" where both can.

    A build has machine code for some generations, and may have one form that newer GPUs translate.
    """
    if torch.version.cuda is None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    for library, names, cure in (
        (
            f"torch {torch.__version__}",
            torch.cuda.get_arch_list(),
            "install a build for it from pytorch.org, such as one for {} CUDA",
        ),
        ("bitsandbytes", architectures(), "build it from source (huggingface.co/docs/bitsandbytes/installation)"),
    ):
        parts = [found.groups() for name in names if (found := _ARCHITECTURE.fullmatch(name))]
        built = [((int(major), int(minor)), kind, only) for kind, major, minor, only in parts]
        if built and not any(
            own == capability or (own < capability and only != "a" and (kind == "compute" or own[0] == capability[0]))
            for own, kind, only in built
        ):
            other = "a later" if capability > max(built)[0] else "an earlier"
            return (
                f"{library} has no kernels for {torch.cuda.get_device_name(device)}, compute capability "
                f"{capability[0]}.{capability[1]} (it has {', '.join(names)}): {cure.format(other)}"
            )
    return ""


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the type whose matrices the device multiplies in hardware: bfloat16, a GPU's float16, or float32."""
    if device.type == "cuda":
        return getattr(torch, fastest_type(torch.cuda.get_device_capability(device)))
    capabilities = _cpu_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    return torch.bfloat16 if has_bf16 and not _hides_avx512() else torch.float32


def _cpu_capabilities() -> dict[str, object]:
    """Return torch's names of the instructions that this CPU has, as far as it says."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _hides_avx512() -> bool:
    """Return whether the environment keeps torch from the CPU's AVX-512."""
    return os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2")


def auto_dtype(fast: torch.dtype, model_type: str) -> torch.dtype:
    """Return what ``model.compute_dtype: auto`` is for a model on a device that is fast at a type."""
    return torch.float32 if fast == torch.float16 and model_type.startswith(BEYOND_FLOAT16) else fast


def resolve_compute_dtype(name: str, device: torch.device, model_type: str = "") -> torch.dtype:
    """Return the type that a name means, auto being what a device is fast at, with one line where it is not bfloat16.

    Args:
        model_type: transformers' name of the architecture; some exceed float16.

    Raises:
        ModelError: it is bfloat16 on a CPU whose AMX torch's attention would use, and may not.
    """
    if name == "bfloat16" and device.type == "cpu" and _hides_avx512() and _cpu_capabilities().get("amx_bf16"):
        raise ModelError(
            "model.compute_dtype bfloat16: ATEN_CPU_CAPABILITY keeps torch from AVX-512, which its "
            "attention in bfloat16 needs on this CPU; unset it, or write float32"
        )
    if name != "auto":
        return getattr(torch, name)
    fast = fast_dtype(device)
    dtype = auto_dtype(fast, model_type)
    if dtype != torch.bfloat16:
        why = f"this {device.type} has no fast bfloat16" if dtype == fast else f"{model_type} exceeds float16"
        log.info("compute type %s: %s (model.compute_dtype overrides)", str(dtype).removeprefix("torch."), why)
    return dtype


def is_converted(config, quant: str, compute_dtype: torch.dtype) -> bool:
    """Return whether weights are loaded in another type than their files have, and so take host memory of their own.

    Args:
        config: of the model, which says the type; of one that does not, it is taken to be the compute type.
        quant: what weights are stored in here.
    """
    stored = getattr(config, "dtype", None) or getattr(of_blocks(config), "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    return quant == "none" and stored not in (None, compute_dtype)


def load_model(
    path: str | Path,
    quant: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    use_cache: bool = True,
    quant_head: bool = False,
    in_files: bool = False,
    keep_16bit: Sequence[str] = (),
    start: Start | None = None,
    head: Head | None = None,
    with_vision: bool = False,
) -> nn.Module:
    """Load a causal language model, or one with a head for sequence classification, frozen, in training mode off.

    Args:
        path: folder, ``.gguf`` file, ``package:NAME/FILE`` or hub id.
        quant: ``nf4``, ``fp4``, ``keep`` (a GGUF file's own codes) or ``none`` (16-bit linears); of a checkpoint that
            is packed already, its own counts.
        double_quant: quantise the absmax values too: 4.127 instead of 4.5 bits per weight.
        compute_dtype: of activations, head, embeddings and norms.
        device: cpu or cuda; a GPU becomes the current one.
        use_cache: keep and reuse the quantised model on disk.
        quant_head: keep a 4-bit copy of the head.
        in_files: where the device is the host and weights are quantised, or split, from 16-bit safetensors, never have
            all of them in its memory: they stay in files that the process sees as memory, those of the cache if it is
            used, also while they are made. (A GGUF file is dequantised in memory first; what is stored in 4 bit stays
            where it is.)
        keep_16bit: names and glob patterns, as of LoRA's targets, of layers and weights of experts that stay in 16 bit
            while the others are quantised.
        start: how weights are split between the base, which is loaded, and what its LoRA weights begin as
            (``adapters.lora.start.take_first``).
        head: of sequences; None loads a language model.
        with_vision: load the whole of a vision-language model, and not its language model alone.

    Raises:
        ModelError: files are missing or broken, part of the model would silently stay in 16 bit, a pattern of
            ``keep_16bit`` matches no layer, there is no such type or device, or weights that are packed already are to
            be split.
    """
    require_one_of("quant", quant, QUANTS)
    if compute_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ModelError(f"compute_dtype is {compute_dtype!r}; give torch.bfloat16, torch.float16 or torch.float32")
    _check_device(device)
    use_device(torch.device(device))
    files = locate(path, revision)
    path = files.name
    stored, asked = stored_quantization(files.config), (quant, double_quant)
    part = with_head(read_language_part(files.folder, path, files.gguf_file, with_vision), head)
    if isinstance(keep_16bit, str):
        raise ModelError(f"keep_16bit is {keep_16bit!r}; give a list of names and patterns")
    if keep_16bit and stored is None and quant not in FOUR_BIT:
        raise ModelError(f"keep_16bit is for a model that is quantised here, and quant is {quant}")
    check_kept(part.config, keep_16bit, path)
    if part.whole is not None and use_cache:
        log.info("%s is a %s: its language model alone is loaded", path, type(part.whole).__name__)
    if stored is not None:
        if stored[0] == KEEP != quant:
            log.warning("%s is quantised already and keeps its codes: model.quant keep", path)
        elif stored != asked and quant != KEEP:
            log.warning(
                "%s is stored in 4 bit already and is taken as it is: model.quant %s, model.double_quant %s",
                path,
                stored[0],
                str(stored[1]).lower(),
            )
        quant, double_quant = stored
    if quant == KEEP:
        refuse_stored(start.kind if start else None, (KEEP, False))
        model = _load_kept(files, part, compute_dtype, device, in_files)
    elif stored is not None:
        _refuse_stored_experts(path, part)
        refuse_stored(start.kind if start else None, stored)
        model = _load_prequantized(files, part, compute_dtype, device)
    elif quant == "none":
        model = _from_pretrained(files, part, compute_dtype, device)
        first = _split(model, files, start, use_cache, in_files) if start else None
    else:
        config = QuantizeConfig(quant, double_quant, keep_16bit=keep_16bit, start=start)
        model, first = _load_quantized(files, part, config, compute_dtype, device, use_cache, in_files)
    if start:
        set_base(model, name_of_base(files, start, quant, double_quant), first)
    if quant_head:
        quantize_head(model, quant, double_quant)
    if head:
        begin_head(model, head)
    return adopt(set_checkpoint_name(model, part.outside))


def refuse_stored(start: str | None, stored: tuple[str, bool] | None) -> None:
    """Refuse a start that needs 16-bit weights where they are in 4 bit in their files: what was lost is not there.

    Raises:
        ModelError: they are.
    """
    if start and stored:
        what = "packed" if stored[0] == KEEP else f"in {stored[0]}"
        raise ModelError(
            f"lora.start {start} needs the 16-bit weights, and the model's files have them {what}: "
            "name its 16-bit files in model.path, or set lora.start to kaiming"
        )


def name_of_base(files: ModelFiles, start: Start, quant: str, double_quant: bool) -> str:
    """Return what ``adapters.lora.start.base_of`` does of a model that is loaded so."""
    return f"{start.kind}:{base_fingerprint(files, _with_quantization(start, quant, double_quant))}"


def _with_quantization(start: Start, quant: str, double_quant: bool) -> dict:
    return start.settings() | {"quant": quant, "double_quant": quant != "none" and double_quant}


def entry_of(
    files: ModelFiles,
    config,
    quant: str,
    double_quant: bool,
    dtype: torch.dtype,
    keep_16bit: Sequence[str] = (),
    start: Start | None = None,
) -> Path:
    """Return the cache's folder of a model that is quantised, or split, here; arguments are those of ``load_model``.

    Args:
        config: of the language model in the files.
        quant: how it is stored here, and not in its files.
    """
    how: dict[str, object] = {"dtype": str(dtype)}
    if quant != "none":
        how |= {"quant": quant, "double_quant": double_quant}
    if config.problem_type:
        how["outputs"] = config.num_labels
    if is_vision_language(config):
        how["with_vision"] = True
    if keep_16bit:
        how["keep_16bit"] = sorted(kept_layers(without_weights(config), keep_16bit))
    if start:
        how["start"] = start.settings()
    return cache_entry(files, **how)


def _split(model: nn.Module, files: ModelFiles, start: Start, use_cache: bool, in_files: bool) -> First:
    """Split the weights of a model in 16 bit or more, by what the cache has if it is to be used."""
    entry = entry_of(files, model.config, "none", False, model.dtype, start=start)
    known = read_first(entry) if use_cache else None
    first = split_in_place(model, start, known, InFiles(_folder_for_files()) if in_files else None)
    if use_cache and known is None:
        save_first(entry, first)
    return first


def _check_device(device: torch.device | str) -> None:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise ModelError(f"device is {device!r}; give cpu or cuda") from None
    if kind not in ("cpu", "cuda", "meta"):
        raise ModelError(
            f"device is {kind}, which is not supported: memory is planned, counted and limited by torch's "
            "CUDA allocator; give cpu"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is cuda, but torch finds no CUDA device; see qlora-lite doctor")
    if kind == "cuda" and (torch.device(device).index or 0) >= (count := torch.cuda.device_count()):
        raise ModelError(f"device is {device}, but torch finds {counted(count, 'CUDA device')}, numbered from 0")


def _refuse_stored_experts(path: str, part: LanguagePart) -> None:
    """Refuse a 4-bit checkpoint of a mixture of experts before transformers makes room for its experts in 16 bit."""
    if any(projections(without_weights(part.config))):
        raise ModelError(
            f"{path} is a 4-bit checkpoint of a mixture of experts, which transformers reads with experts "
            "in 16 bit, if at all; use the 16-bit model instead"
        )


def adopt(model: nn.Module) -> nn.Module:
    """Freeze a transformers model and put this package's attention, experts, norms and products of gated MLPs into it;
    return it."""
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    use_row_attention(model)
    use_experts(model)
    use_lean_norms(model)
    use_lean_mlps(model)
    return model


def _load_quantized(
    files, part, config: QuantizeConfig, dtype, device, use_cache, in_files
) -> tuple[nn.Module, First | None]:
    register()
    start, how = config.start, (config.quant_type, config.double_quant, dtype, config.keep_16bit, config.start)
    entry = entry_of(files, part.config, *how) if use_cache else None
    if entry is not None and entry.exists() and _is_whole(entry):
        model = _load_prequantized(ModelFiles(str(entry), entry, ()), None, dtype, device)
        if start is None or (first := read_first(entry)) is not None:
            return model, first if start else None
    if files.gguf_file:
        model = _from_pretrained(files, part, dtype, "cpu")
        first = quantize_in_place(model, config.quant_type, config.double_quant, config.keep_16bit, start)
        model.to(device)
    else:
        place = device if _has_room(part, config, dtype, device) else "cpu"
        config.folder = _folder_for_files() if in_files else None
        model = _from_pretrained(files, part, dtype, place, config)
        first = model.hf_quantizer.splitter.first
        _forget_quantizer(model)
        model.to(device)
    if entry is not None:
        try:
            save_for_cache(model, entry, first if start else None)
        except (OutputError, ModelError) as error:
            log.warning("the quantised model is not cached: %s", error)
        else:
            if in_files:
                return _load_prequantized(ModelFiles(str(entry), entry, ()), None, dtype, device), first
    return model, first


def _load_kept(files, part, dtype, device, in_files):
    """Load a model on its own codes, which no cache is needed for."""
    register()
    with ExitStack() as stack:
        own_files = InFiles(_folder_for_files()) if in_files else None
        if formats := published_formats(part.config):
            state = published_state(files, part, formats, stack, own_files.empty if own_files else None)
            part = replace(part, config=copy.deepcopy(part.config))
            del part.config.quantization_config  # what is loaded says the rest
        else:
            formats = kept_formats(files, part.config)
            state = read_codes(files, part.config, formats, dtype, own_files.put if own_files else None)
        model = _from_pretrained(files, part, dtype, device, QuantizeConfig(formats=dict(formats)), state)
    _forget_quantizer(model)
    return model


def _folder_for_files() -> str:
    folder = cache_root()
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _has_room(part: LanguagePart, config: QuantizeConfig, dtype, device) -> bool:
    """Return whether a device has room for what loading takes there for a moment.

    Beside the weights that is little, but for experts, those of a block of which transformers puts together in 16 bit,
    and for weights that are split, in float32.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return True
    model = without_weights(part.config, dtype=dtype)
    stacked = max((each.stacking_bytes for each in projections(model)), default=0)
    paths = config.start.ranks(model) if config.start else ()
    split = max((2 * 4 * model.get_submodule(path).weight.numel() for path in paths), default=0)
    what = "split weights in float32" if split > stacked else "a block's experts in 16 bit"
    stacked = max(stacked, split)
    if not stacked:
        return True
    replace_weights(model, config.quant_type, config.double_quant, kept_layers(model, config.keep_16bit))
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if weights + stacked <= free_bytes(device) + cached:
        return True
    log.info(
        "the model is quantised in host memory: %s take %s more on the GPU for a moment", what, format_bytes(stacked)
    )
    return False


def _is_whole(entry: Path) -> bool:
    """Check a cache entry as any model folder is checked, and what its files hold."""
    try:
        check_sums(entry)
        locate(str(entry))
    except ModelError as error:
        log.warning("the cached model is damaged and rebuilt: %s", error)
        return False
    return True


def stored_quantization(config: dict) -> tuple[str, bool] | None:
    """Return (quant type, double quantisation) of a checkpoint that is bitsandbytes 4-bit already, (KEEP, False) of one
    whose codes are kept (``published``), else None.

    Args:
        config: what ``config.json`` says.

    Raises:
        ModelError: it is quantised in another way.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise ModelError(f"quantization_config in config.json must be an object, not {stored!r}")
    if is_published(stored):
        return KEEP, False
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit", stored.get("_load_in_4bit")):
        raise ModelError(f"the model is quantised with {stored.get('quant_method')}; use the 16-bit model instead")
    return stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))


def _load_prequantized(files: ModelFiles, part: LanguagePart | None, dtype, device) -> nn.Module:
    """Load a bitsandbytes checkpoint through transformers and take over its packed tensors; or one of the cache, which
    may have packed tensors of our own."""
    model = _from_pretrained(files, part, dtype, device)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            model.set_submodule(name, _from_linear4bit(module, dtype))
    _forget_quantizer(model)
    return _in_type(model, dtype)


def _in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model's parameters the type that was asked for; return it.

    transformers leaves those of a 4-bit checkpoint in that of its files. What it has in float32 in any model stays so.
    """
    others = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.dtype != dtype
    }
    if others:
        planned = dict(without_weights(model.config, dtype=dtype).named_parameters())
        for name, weight in others.items():
            weight.data = weight.data.to(planned[name].dtype if name in planned else dtype)
        model.config.dtype = dtype
    return model


def _from_linear4bit(module: nn.Module, dtype: torch.dtype) -> QuantLinear:
    state = module.weight.quant_state.as_dict(packed=True)
    packed, shape, _, quant_type = from_bnb_state({"": module.weight.data, **state})
    layer = QuantLinear.from_packed(packed, shape, module.bias, quant_type, dtype)
    layer.replaces = module.source_cls.__name__
    return layer


def _from_pretrained(
    files: ModelFiles, part: LanguagePart | None, dtype, device, quantization_config=None, state=None
) -> nn.Module:
    config = None if part is None else part.config
    if config is not None and state is None and files.gguf_file and config.model_type in ARCHITECTURES:
        state = read_codes(files, config, (), dtype)
    extra = {"quantization_config": quantization_config} if quantization_config else {}
    is_headed = config is not None and bool(config.problem_type)
    load = partial(model_of, files.folder) if state is None else partial(model_with, config, state)
    if state is not None:
        pass  # which is all that the files have
    elif files.gguf_file:
        extra = {"gguf_file": files.gguf_file, "config": config, **_gguf_options()}
    else:
        extra |= {"use_safetensors": True, **(_of_language_model(files, part) if part and part.whole else {})}
        if part:  # the folder's own file may say another problem_type
            extra.setdefault("config", copy.deepcopy(part.config))
    try:
        with _without_report():
            model, info = load(
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        raise ModelError(f"cannot load {files.name}: {first_line(error)}") from error
    if problems := getattr(getattr(model, "hf_quantizer", None), "problems", None):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"cannot load {files.name}: {problems[0]}{more}")
    other_shapes = {name: f"{tuple(stored)}, not {tuple(wanted)}" for name, stored, wanted in info["mismatched_keys"]}
    absent = note_new(model, [*info["missing_keys"], *other_shapes])
    missing = sorted({re.sub(r"\.absmax\w*$", ".weight", key) for key in absent - other_shapes.keys()})
    misshaped = [f"{name} {shapes}" for name, shapes in other_shapes.items() if name in absent]
    broken = [*misshaped, *map(str, info.get("conversion_errors") or ())]
    if missing or broken:
        shown = ", ".join([*missing, *broken][:4])
        raise ModelError(
            f"{files.name}: {counted(len(missing) + len(broken), 'weight')} missing or of another shape: {shown}"
        )
    if (unused := sorted(info["unexpected_keys"])) and not ("key_mapping" in extra or is_headed):
        log.warning(
            "%s: %d weights of its files have no place in the model that its config.json describes, and are "
            "left out, first %s",
            files.name,
            len(unused),
            unused[0],
        )
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from listing every tensor that is left out, new or missing: what is wrong is said here."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)


def _of_language_model(files: ModelFiles, part: LanguagePart) -> dict:
    """Return the options of transformers that load the language model alone from the files of a larger one."""
    mapping = part.key_mapping(stored_names(files))
    if stored := getattr(part.config, "quantization_config", None):
        skipped = stored.get("llm_int8_skip_modules") or []
        stored["llm_int8_skip_modules"] = [part.here(path, mapping) for path in skipped]
    return {"config": part.config, "key_mapping": mapping}


def _gguf_options() -> dict:
    """Ask newer transformers for dense weights; older ones (before 5.20) give nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_quantizer(model: nn.Module) -> None:
    """Remove the loader's marks: from here on the layers are plain modules."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = model.is_loaded_in_4bit = False


def use_row_attention(model: nn.Module) -> bool:
    """Attend row by row where the architecture takes its attention from transformers' interface.

    Returns:
        False for architectures with attention of their own (Falcon): they keep transformers' block-diagonal
        mask, which is exact as well but costs the batch length squared.
    """
    AttentionInterface.register(ROW_ATTENTION, row_attention)
    AttentionMaskInterface.register(ROW_ATTENTION, _mask_for_padding_only)
    if not model._supports_attention_backend:
        return False
    with _without_report() if is_of_pictures(model.config) else nullcontext():  # of the absent half of CLIP
        model.set_attn_implementation(ROW_ATTENTION)
    return True


def uses_row_attention(model: nn.Module) -> bool:
    """Return whether the model's blocks take ``row_lengths``."""
    return model.config._attn_implementation == ROW_ATTENTION


def _mask_for_padding_only(q_length, kv_length, attention_mask=None, **kwargs):
    """Build transformers' SDPA mask for padding or a cache; ``row_attention`` needs none without them.

    Older transformers (5.17) say with a mask of ones that nothing is padded. What they would make of it for a window
    takes the square of the prompt's length: 256 MiB for 16,384 tokens.
    """
    if q_length == kv_length and (attention_mask is None or attention_mask.all()):
        return None
    sdpa_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
