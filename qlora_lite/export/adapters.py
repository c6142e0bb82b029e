"""Adapter folders for peft and vLLM.

peft
    What a run writes already, with few keys in ``adapter_config.json``: a key that an older peft does not know
    is an error there.
vLLM
    It reads ``r``, ``lora_alpha``, ``use_rslora`` and ``target_modules``, and ignores every other key without a word:
    per-layer ranks and alphas would give wrong scales (``vllm/lora/peft_helper.py``). So scales are folded into B
    and all layers get one rank (``with_one_scaling``).

The adapted weight is W + s_i B_i A_i with a scale of its own for each layer. A reader that takes one alpha for all
computes alpha / r_i (or, with one rank R, alpha / R). So the commonest alpha is kept, B_i is multiplied by what is
missing, and factors of a smaller rank get rows and columns of zeros, which add nothing. Layers that have the common
scale already keep their bits; the others are written in float32 where the product is not exact in their own type.

Shapes: A [r, in], B [out, r]; R the common rank.
"""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.adapters.checkpoint_names import outside, prefixes_of
from qlora_lite.adapters.files import adapter_config, attach_adapter, detach_adapter, load_adapter, write_adapter
from qlora_lite.adapters.fused_names import why_no_dora
from qlora_lite.adapters.parts import TOKEN_ROWS
from qlora_lite.adapters.read import Adapter, Factors, stored_names, tensor_names, weight_name
from qlora_lite.errors import ModelError
from qlora_lite.models.locate import read_json
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.quant.linear import stands_for_conv1d

from .check import check_change, logits_of
from .form import Job, Written, adapter_change, load_base

# vLLM models that take adapters and whose layers have the names and the joins that transformers' have.
VLLM_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "cohere",
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank


def write_peft(adapter: Adapter, skeleton: nn.Module, out: Path, base_model: str, tokenizer) -> None:
    """Write an adapter folder for peft.

    Args:
        skeleton: the base model on the meta device.
        base_model: what ``base_model_name_or_path`` says.
        tokenizer: with the chat template that training used.

    Raises:
        OutputError: the folder cannot be written.
    """
    with torch.no_grad():
        config = adapter_config(attach_adapter(skeleton, adapter), base_model)
    detach_adapter(skeleton, {})
    tensors: dict[str, torch.Tensor] = {}
    stored = stored_names(skeleton, adapter.layers)
    for name, factors in adapter.layers.items():
        names = tensor_names(stored[name])
        tensors |= {names[leaf]: tensor.contiguous() for leaf, tensor in factors.tensors.items()}
    adapted = {outside(skeleton, name) for name in adapter.layers}
    tables = config.get("trainable_token_indices", ())  # of tied ones the embeddings alone, as ``save_adapter`` has it
    weights = {outside(skeleton, path): weight for path, weight in adapter.weights.items()}
    tensors |= {
        weight_name(path, adapted): weight
        for path, weight in weights.items()
        if not path.endswith(TOKEN_ROWS) or path.removesuffix(f".{TOKEN_ROWS}") in tables
    }
    config = {key: value for key, value in config.items() if value not in ({}, False)}
    write_adapter(out, tensors, config, tokenizer)


def refuse_dora_without_peft(adapter: Adapter, skeleton: nn.Module) -> None:
    """Check that peft loads an adapter.

    Raises:
        ModelError: it is DoRA, of layers that peft has none for.
    """
    if adapter.is_dora and (why := why_no_dora(skeleton, adapter.layers)):
        raise ModelError(f"the adapter is DoRA, and {why}")


def for_vllm(adapter: Adapter, skeleton: nn.Module, family: str) -> tuple[Adapter, int]:
    """Return an equal adapter that vLLM reads, and the ``--max-lora-rank`` it needs.

    Args:
        family: ``model_type`` of the base model's configuration.

    Raises:
        ModelError: vLLM cannot read an adapter of this method or rank, or for this model.
    """
    refuse_all_but_lora(adapter, "vLLM")
    if family not in VLLM_FAMILIES or any(stands_for_conv1d(skeleton.get_submodule(name)) for name in adapter.layers):
        known = ", ".join(VLLM_FAMILIES)
        raise ModelError(f"vLLM is not known to support adapters for {family} (but for {known}); merge and serve that")
    largest = max(factors.rank for factors in adapter.layers.values())
    if largest > VLLM_RANKS[-1]:
        raise ModelError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, the adapter has {largest}; merge and serve that")
    return with_one_scaling(adapter, largest), next(rank for rank in VLLM_RANKS if rank >= largest)


def refuse_all_but_lora(adapter: Adapter, program: str) -> None:
    """Check that an adapter is LoRA, for a program that would leave all else out.

    Raises:
        ModelError: it is DoRA, or has weights for fused experts, or weights of the base that were trained too.
    """
    merged = "`qlora-lite merge`, or export --to gguf or ollama, writes a merged model, which needs none"
    if any(factors.experts > 1 for factors in adapter.layers.values()):
        raise ModelError(
            f"the adapter has LoRA weights for fused experts, and {program} takes linear layers' alone; "
            "`qlora-lite merge` writes a merged model, which needs none"
        )
    if adapter.is_dora:
        raise ModelError(f"the adapter is DoRA, and {program} takes LoRA alone, without DoRA's magnitudes; {merged}")
    if adapter.weights:
        first = next(iter(adapter.weights))
        raise ModelError(
            f"the adapter has weights of the base that were trained too, first {first}, and {program} "
            f"takes LoRA alone; {merged}"
        )


def with_one_scaling(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return an equal adapter whose layers share one alpha and plain scales (alpha / r).

    Args:
        adapter: any; it is left as it is.
        rank: the rank that every layer gets, at least the largest; None leaves each its own.
    """
    alphas = {name: factors.scale * (rank or factors.rank) for name, factors in adapter.layers.items()}
    values = list(alphas.values())
    alpha = max(values, key=values.count)
    gains = {name: value / alpha for name, value in alphas.items()}
    dtypes = {factors.lora_A.dtype for factors in adapter.layers.values()}
    is_exact = len(dtypes) == 1 and all(map(_is_exact, gains.values()))
    dtype = dtypes.pop() if is_exact else torch.float32
    layers = {
        name: _folded(factors, alpha, gains[name], rank or factors.rank, dtype)
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.dropout)


def _is_exact(gain: float) -> bool:
    """Return whether multiplying by a number only moves the exponent."""
    return abs(math.frexp(gain)[0]) == 0.5


def _folded(factors: Factors, alpha: float, gain: float, rank: int, dtype: torch.dtype) -> Factors:
    missing = rank - factors.rank
    lora_a = functional.pad(factors.lora_A, (0, 0, 0, missing)).to(dtype).contiguous()
    lora_b = functional.pad((factors.lora_B.float() * gain).to(dtype), (0, missing)).contiguous()
    return Factors(lora_a, lora_b, alpha)


class AdapterFolder:
    """An adapter folder, read back by this package's own reader."""

    dtypes = ()
    draws = False

    def write(self, job: Job) -> Written:
        """Write the folder for peft."""
        refuse_dora_without_peft(job.adapter, job.skeleton)
        write_peft(job.adapter, job.skeleton, job.out, job.trained.recipe.model.path, job.trained.tokenizer())
        use = f'PeftModel.from_pretrained(base, "{job.out}")'
        return Written({"notes": _of_the_whole(job), "use": use})

    def check(self, job: Job, _written: Written) -> dict:
        """Compare what the folder's adapter changes in the base's logits with what the run's changes."""
        change = adapter_change(job)
        return {"error": check_change(change, logits_of(load_adapter(load_base(job), job.out)), str(job.out))}


class VllmFolder(AdapterFolder):
    """Likewise, with one rank and one scale for all layers."""

    def write(self, job: Job) -> Written:
        """Write the folder for vLLM."""
        adapter, needed_rank = for_vllm(job.adapter, job.skeleton, str(job.skeleton.config.model_type))
        write_peft(adapter, job.skeleton, job.out, job.trained.recipe.model.path, job.trained.tokenizer())
        module = shlex.quote(f"{job.trained.name}={job.out}")
        use = f"vllm serve BASE --enable-lora --max-lora-rank {needed_rank} --lora-modules {module}"
        return Written({"notes": [*_of_the_whole(job), *_to_tell_vllm(job)], "use": use})


def _of_the_whole(job: Job) -> list[str]:
    """Return what an adapter folder fits, if the run's model is part of a larger one."""
    if (begins := prefixes_of(job.skeleton)) is None:
        return []
    return [
        f"the adapter fits the whole of {job.trained.files.name} as transformers loads it, with layer names that "
        f"begin with {begins[1]!r}, and not its language model alone"
    ]


def _to_tell_vllm(job: Job) -> Iterator[str]:
    """Yield what a server of the base model does not know of the run: its chat template, and what ends its answers."""
    trained = job.trained
    own, model = trained.tokenizer().chat_template, trained.recipe.model
    if own is not None and own != load_tokenizer(model.path, model.revision).chat_template:
        template = shlex.quote(str(job.out / "chat_template.jinja"))
        yield f"vLLM renders chats with the base's template: serve with --chat-template {template}"
    generation = trained.files.folder / "generation_config.json"
    config = read_json(generation) if generation.is_file() else trained.files.config
    known = config.get("eos_token_id")
    if ends := sorted(set(trained.end_token_ids) - set(known if isinstance(known, list) else [known])):
        yield f"vLLM does not stop at the end tokens of the training data: send stop_token_ids {ends} with requests"


PEFT, VLLM = AdapterFolder(), VllmFolder()
