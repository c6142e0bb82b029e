"""Train the same random weights on the same tokens with this package and with the peers, in one process."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from _cases import OUT_OF_MEMORY, examples_of, free_memory, model_of, trainer_of
from _levers import missing_compiler
from _models import config_of
from _peers import dressed, peers_step, stock_model

from qlora_lite.errors import QloraLiteError
from qlora_lite.models.levers import Levers
from qlora_lite.ops.loss import AUTO_CHUNK_TOKENS, Head, chunked_cross_entropy
from qlora_lite.plan import Plan

SIDES, WARMUP, STEPS = 5, 1, 3
PLANNED = "ours, as planned"
HEAD_SPREAD = 0.02
LOSS_DIFFERENCE = 0.01  # of the first loss, before anything was learned: more means that other work was done


def compare_sides(name: str, rows: int, length: int, plan: Plan, device: torch.device) -> Iterator[dict]:
    """Yield speed and memory of every side: ours as planned and as the peers, the peers, the peers with Liger.

    Args:
        name: a key of ``_models.MODELS``.
        rows: of a step, each of ``length`` tokens, all learned.
        plan: the planner's choice for this step; if it runs out of memory although it was planned to fit, that is a
            problem. Of the other sides it is a finding.
    """
    case = {"model": name, "tokens": rows * length, "rows": rows, "optimizer": "adamw_8bit"}
    sides: dict[str, Callable[[], dict]] = {
        PLANNED: lambda: _ours(case | asdict(plan.chosen.levers), device),
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
            yield row | {"out_of_memory": str(error).partition(".")[0]} | _against_plan(side, plan)
            continue
        except QloraLiteError as error:  # blocks that cannot be compiled here
            yield row | {"problem": str(error)}
            continue
        first_loss = first_loss or row["first_loss"]
        differs = abs(row["first_loss"] / first_loss - 1) > LOSS_DIFFERENCE
        yield row | ({"problem": f"first loss {row['first_loss']:.4f}, not {first_loss:.4f}"} if differs else {})


def _against_plan(side: str, plan: Plan) -> dict:
    return {"problem": "it was planned to fit, and memory ran out"} if side == PLANNED and plan.fits else {}


def _missing(side: str, device: torch.device) -> str:
    if side.endswith("compiled") and (missing := missing_compiler(device.type)):
        return f"there is no {missing}"
    return _not_installed(["peft"] * side.startswith("peers") + ["liger_kernel"] * side.endswith("Liger"))


def _not_installed(needed: list[str]) -> str:
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


def compare_losses(name: str, tokens: int, device: torch.device) -> Iterator[dict]:
    """Yield speed and memory of the loss alone, forward and backward: ours, Liger's fused one, cut-cross-entropy's.

    Args:
        name: a key of ``_models.MODELS``, whose head, frozen and random, is taken.
        tokens: all learned.
    """
    config, random = config_of(name), torch.Generator(device).manual_seed(0)
    made = {"generator": random, "device": device, "dtype": torch.bfloat16}
    weight = torch.randn(config.vocab_size, config.hidden_size, **made) * HEAD_SPREAD
    hidden = torch.randn(tokens, config.hidden_size, **made).requires_grad_()
    targets = torch.randint(config.vocab_size, (tokens,), generator=random, device=device)
    expected = None
    for side, (package, loss_of) in LOSSES.items():
        row = {"side": side, "model": name, "rows": 1, "length": tokens}
        reason = _not_installed([package]) if package else ""
        if package and not reason and device.type == "cpu":
            reason = "its kernels are for a card"
        if reason:
            yield row | {"skipped": reason}
            continue
        free_memory(device)
        row |= _timed_loss(loss_of(), hidden, weight, targets)
        expected = expected or row["loss"]
        differs = abs(row["loss"] / expected - 1) > LOSS_DIFFERENCE
        yield row | ({"problem": f"loss {row['loss']:.4f}, not {expected:.4f}"} if differs else {})


def _timed_loss(loss_of: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict:
    seconds = []
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats(hidden.device)
    for _ in range(WARMUP + STEPS):
        hidden.grad, started = None, time.perf_counter()
        loss = loss_of(hidden, weight, targets)
        loss.backward()
        mean = loss.item() / len(targets)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        seconds.append(time.perf_counter() - started)
    return {"tokens_per_second": len(targets) / statistics.median(seconds[WARMUP:]), "loss": mean,
            **_peak(hidden.device)}  # fmt: skip


def _our_loss() -> Callable:
    return lambda hidden, weight, targets: chunked_cross_entropy(hidden, targets, Head(weight), AUTO_CHUNK_TOKENS)


def _liger_loss() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_loss() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, reduction="sum")


LOSSES = {  # side -> the package that it needs beside this one, and what gives the summed loss
    "the loss alone, ours": ("", _our_loss),
    "the loss alone, Liger": ("liger_kernel", _liger_loss),
    "the loss alone, cut-cross-entropy": ("cut_cross_entropy", _cut_loss),
}
