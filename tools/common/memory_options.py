"""The memory options that lower memory, stacked one on the other, what saves most first.

What saves most differs from model to model and from length to length, so the order is a prediction's (``by_saving``).
Memory options that spend memory for speed come after all that save it, and those that do not go with streamed weights
or tiles are a stack of their own (``resident_cases``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from common.cases import OUT_OF_MEMORY, RANK, free_memory, job_of, memory_options_of, model_of, trainer_of, under_ledger
from common.models import config_of, dtype_of
from qlora_lite.adapters.files import Lora
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS
from qlora_lite.memory.meter import held_bytes
from qlora_lite.models.load import resolve_device
from qlora_lite.planning.predict import predict
from qlora_lite.planning.simulate import Job
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import TextSpec, causal_lm

SEEN_TILES = 4  # a step is cut into at least so many tiles and chunks, so that the memory options show at any length
MAX_TILE_TOKENS = 1024
KEPT_BLOCKS, CHECKPOINT_EVERY = 4, 2


def saving_options(tokens: int) -> dict[str, dict]:
    """Return the memory options that save memory where blocks are recomputed, by the names of their rows.

    Embeddings and head are moved together, since in the model for CPUs they are the same.
    """
    part = max(1, tokens // SEEN_TILES)
    return {
        "weights in host memory": {"resident_layers": 0},
        "embeddings, head in host memory": {"host_embeddings": True, "host_head": True},
        "block inputs in host memory": {"offload_checkpoints": True},
        "8-bit optimizer states": {"optimizer": "paged_adamw_8bit"},
        "MLPs and norms in tiles": {"tile_tokens": min(MAX_TILE_TOKENS, part)},
        "updates in backward, no clipping": {"optimizer_in_backward": True},
        "loss by slices of tokens too": {"loss_chunk_tokens": min(AUTO_CHUNK_TOKENS, part)},
    }


def first_case(model: str, tokens: int) -> dict:
    """Return the case without any memory option; of the loss there are never all words' logits
    (``kernels.loss.TILE_WORDS``)."""
    return {
        "model": model,
        "tokens": tokens,
        "checkpointing": "none",
        "loss_chunk_tokens": tokens,
        "optimizer": "paged_adamw_32bit",
    }


def by_saving(model: str, tokens: int, device_type: str) -> list[str]:
    """Return the names of ``saving_options``, what saves most first: each predicted by itself, blocks recomputed."""
    config, again = config_of(model), first_case(model, tokens) | {"checkpointing": "block"}

    def needed(change: dict) -> int:
        return predict(_row_job(again | change, config, device_type)).simulation.peak().total

    options = saving_options(tokens)
    return sorted(options, key=lambda name: needed(options[name]))


def _row_job(case: dict, config, device_type: str) -> Job:
    """Describe a case's step of one row to the planner, without a model."""
    rows = BatchShape((case["tokens"],), case["tokens"] - 1)
    spec = TextSpec(config, quant_head=case.get("quant_head", False), compute_dtype=dtype_of(config))
    work = causal_lm(method=Lora(rank=RANK), spec=spec)
    return Job(work, rows, None, device_type, optimizer=case["optimizer"], options=memory_options_of(case))


def memory_option_cases(model: str, tokens: int, order: Sequence[str]) -> list[dict]:
    """Return one case for each memory option, each with all memory options before it; "memory option" names what is
    new.

    Args:
        model: a key of ``models.MODELS``.
        tokens: of the one row of a step, all of them learned.
        order: of the memory options that save memory (see ``by_saving``).
    """
    saving = saving_options(tokens)
    return _stack(
        [
            ("none: all kept, loss by word slices", first_case(model, tokens)),
            ("blocks recomputed", {"checkpointing": "block"}),
            *((name, saving[name]) for name in order),
            ("weights dequantised once a backward", {"cache_dequantized": True}),
            ("attention's results kept on a GPU", {"checkpointing": "selective"}),
            ("block inputs on a disk instead", {"offload_folder": "."}),
            ("weights on a disk too", {"stream_from": "disk"}),
            (
                "4-bit head instead (not exact)",
                {"quant_head": True, "host_head": False, "offload_folder": None, "stream_from": "host"},
            ),
        ]
    )


def alone_cases(model: str, tokens: int) -> list[dict]:
    """Return the case in which blocks are recomputed, and that case with each memory option that saves memory alone."""
    again = first_case(model, tokens) | {"checkpointing": "block"}
    changes = {"blocks recomputed": {}, **saving_options(tokens)}
    return [{"option": name, **again, **change} for name, change in changes.items()]


def resident_cases(model: str, tokens: int) -> list[dict]:
    """Return a stack of what needs its weights on the device: fewer block inputs, uncheckpointed layers, compiled
    blocks."""
    first = {"model": model, "tokens": tokens, "checkpointing": "block", "optimizer": "paged_adamw_8bit"}
    return _stack(
        [
            (f"{CHECKPOINT_EVERY} blocks recomputed at once", first | {"layers_per_checkpoint": CHECKPOINT_EVERY}),
            ("blocks recomputed one by one", {"layers_per_checkpoint": 1}),
            (f"last {KEPT_BLOCKS} blocks kept", {"uncheckpointed_layers": KEPT_BLOCKS}),
            ("blocks compiled", {"compile": True}),
        ]
    )


def _stack(steps: Sequence[tuple[str, dict]]) -> list[dict]:
    found, case = [], {}
    for name, change in steps:
        case = case | change
        found.append({"option": name, **case})
    return found


def measure(case: dict, warmup: int, steps: int) -> dict:
    """Train some steps in this process and probe one under the ledger; return memory and speed.

    The device's memory is the ledger's: tensors, exactly, on a CPU as on a GPU, where it is the allocator's rounding
    too. The process's (on a GPU: the allocator's counter) is what was really taken over all steps.

    Returns:
        The case with its figures; where the GPU has too little memory, with "failed" and the prediction alone.
    """
    device = resolve_device()
    base = 0 if device.type == "cuda" else held_bytes(device)  # cuBLAS's workspaces stay from one case to the next
    try:
        trainer = trainer_of(case, model_of(case, device), warmup + steps)
    except OUT_OF_MEMORY as error:
        job = _row_job(case, config_of(case["model"]), device.type)
        return case | _predicted(job) | {"failed": str(error).partition(".")[0]}
    row = case | _predicted(job_of(case, trainer, evaluates=False))
    free_memory(device)
    try:
        metrics = list(trainer)
        process_bytes = trainer.meter.peak_bytes() - base
        ledger = under_ledger(trainer)
    except OUT_OF_MEMORY as error:
        return row | {"failed": str(error).partition(".")[0]}
    finally:
        trainer.meter.close()
    return row | {
        "measured_bytes": ledger.peak.total,
        "measured_host_bytes": ledger.offloaded_peak_bytes,
        "measured_breakdown": ledger.peak.breakdown,
        "measured_place": f"{ledger.peak.phase} {ledger.peak.module}",
        "measured_process_bytes": process_bytes,
        "loss": metrics[-1].loss,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in metrics[warmup:]),
    }


def _predicted(job: Job) -> dict:
    """Return the figures of a prediction."""
    prediction = predict(job)
    expected = prediction.simulation.peak()
    return {
        "predicted_bytes": expected.total,
        "planned_bytes": prediction.peak_bytes,
        "predicted_host_bytes": prediction.simulation.offloaded_bytes,
        "predicted_breakdown": expected.breakdown,
        "predicted_process_bytes": prediction.allocated_bytes if job.device_type == "cuda" else prediction.peak_bytes,
    }


def merged(repeats: Sequence[dict]) -> dict:
    """Return the figures of one case from several processes: the first's memory, every one's speed."""
    first = dict(repeats[0])
    speeds = [row["tokens_per_second"] for row in repeats if "failed" not in row]
    if speeds:
        first |= {"tokens_per_second": statistics.median(speeds), "each_tokens_per_second": speeds}
        first["measured_process_bytes"] = max(row["measured_process_bytes"] for row in repeats)
    return first
