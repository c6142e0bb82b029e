"""Train the same random weights on the same tokens with this package and with the peers, in one process."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from _cases import OUT_OF_MEMORY, examples_of, free_memory, model_of, trainer_of
from _peers import dressed, peers_step, stock_model

from qlora_lite.doctor import missing_for_triton
from qlora_lite.errors import QloraLiteError
from qlora_lite.models.levers import Levers

SIDES, WARMUP, STEPS = 5, 1, 3
LOSS_DIFFERENCE = 0.01  # of the first loss, before anything was learned: more means that other work was done


def compare_sides(name: str, rows: int, length: int, chosen: Levers, device: torch.device) -> Iterator[dict]:
    """Yield speed and memory of every side: ours as planned and as the peers, the peers, the peers with Liger.

    Args:
        name: a key of ``_models.MODELS``.
        rows: of a step, each of ``length`` tokens, all learned.
        chosen: the levers of the planner's choice.
    """
    case = {"model": name, "tokens": rows * length, "rows": rows, "optimizer": "adamw_8bit"}
    sides: dict[str, Callable[[], dict]] = {
        "ours, as planned": lambda: _ours(case | asdict(chosen), device),
        "ours, blocks computed again": lambda: _ours(case | asdict(Levers()), device),
        "peers": lambda: peers_side(case, device, False),
        "peers + Liger": lambda: peers_side(case, device, True),
        "ours, blocks computed again and compiled": lambda: _ours(case | asdict(Levers(compile=True)), device),
    }
    first_loss = None
    for side, run in sides.items():
        row = {"side": side, "model": name, "rows": rows, "length": length}
        reason = _missing(side, device)
        if reason:
            yield row | {"skipped": reason}
            continue
        free_memory(device)
        try:
            row |= run()
        except OUT_OF_MEMORY as error:
            yield row | {"out_of_memory": str(error).partition(".")[0]}
            continue
        except QloraLiteError as error:  # blocks that cannot be compiled here
            yield row | {"problem": str(error)}
            continue
        first_loss = first_loss or row["first_loss"]
        differs = abs(row["first_loss"] / first_loss - 1) > LOSS_DIFFERENCE
        yield row | ({"problem": f"first loss {row['first_loss']:.4f}, not {first_loss:.4f}"} if differs else {})


def _missing(side: str, device: torch.device) -> str:
    if side.endswith("compiled"):
        missing = missing_for_triton() if device.type == "cuda" else "" if shutil.which("g++") else "g++"
        if missing:
            return f"there is no {missing}"
    needed = ["peft"] * side.startswith("peers") + ["liger_kernel"] * side.endswith("Liger")
    return ", ".join(f"{name} is not installed" for name in needed if importlib.util.find_spec(name) is None)


def _ours(case: dict, device: torch.device) -> dict:
    trainer = trainer_of(case, model_of(case, device), WARMUP + STEPS)
    free_memory(device)
    metrics = list(trainer)
    trainer.meter.close()
    return {"tokens_per_second": statistics.median(step.tokens_per_second for step in metrics[WARMUP:]),
            "first_loss": metrics[0].loss, **_peak(device)}  # fmt: skip


def peers_side(case: dict, device: torch.device, liger: bool) -> dict:
    """Train the case the stock way; return speed, first loss and the allocator's peak on a card."""
    model = stock_model(case["model"], device)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    ids = [example.token_ids.tolist() for example in examples_of(case)]
    at_once = case["rows"]
    model, optimizer = dressed(model, case["optimizer"])
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for number in range(WARMUP + STEPS):
        chosen = [ids[(number * at_once + row) % len(ids)] for row in range(at_once)]
        rows = [{"ids": row, "learned": [False] + [True] * (len(row) - 1)} for row in chosen]
        started = time.perf_counter()
        losses.append(peers_step(model, optimizer, rows, at_once, device))
        seconds.append(time.perf_counter() - started)
    return {"tokens_per_second": case["tokens"] / statistics.median(seconds[WARMUP:]), "first_loss": losses[0],
            **_peak(device)}  # fmt: skip


def _peak(device: torch.device) -> dict:
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
