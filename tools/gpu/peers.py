"""Train the same random weights on the same tokens with this package and with the peers, in one process."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from common.cases import OUT_OF_MEMORY, examples_of, free_memory, model_of, trainer_of
from common.models import config_of, dtype_of
from common.peers import dressed, peers_step, stock_model
from qlora_lite.compilers import missing_for_compile
from qlora_lite.errors import QloraLiteError
from qlora_lite.kernels.fused_loss import CHECKED_TOKENS, FUSED, Loss, errors_of
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, Head, chunked_cross_entropy
from qlora_lite.kernels.trial import foreign_errors
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.prepare.plan import Plan
from simulated_gpu.runtime import LIBRARY

SIDES, WARMUP, STEPS = 5, 1, 3
PLANNED = "ours, as planned"
HEAD_SPREAD = 0.02
LOSS_DIFFERENCE = 0.01  # of the first loss, before anything was learned: more means that other work was done


class Comparison:
    """Speed and memory of every side on one step: ours as planned and as the peers, the peers, the peers with Liger."""

    def __init__(self, name: str, rows: int, length: int, plan: Plan, device: torch.device):
        """Prepare the sides.

        Args:
            name: a key of ``models.MODELS``.
            rows: of a step, each of ``length`` tokens, all learned.
            plan: the planner's choice for this step; if it runs out of memory although it was planned to fit, that is a
                problem. Of the other sides it is a finding.
        """
        case = {"model": name, "tokens": rows * length, "rows": rows, "optimizer": "adamw_8bit"}
        self.name, self.tokens = name, rows * length
        self._row = {"model": name, "rows": rows, "length": length}
        self._plan, self._device, self._first_loss = plan, device, None
        self._plain: dict[str, Callable[[], dict]] = {
            PLANNED: lambda: _ours(case | asdict(plan.chosen.options), device),
            "ours, blocks recomputed": lambda: _ours(case | asdict(MemoryOptions()), device),
            "peers": lambda: peers_side(case, device, False),
            "peers + Liger": lambda: peers_side(case, device, True),
        }
        self._compiled: dict[str, Callable[[], dict]] = {
            "ours, blocks recomputed and compiled": lambda: _ours(case | asdict(MemoryOptions(compile=True)), device),
        }

    def plain(self) -> Iterator[dict]:
        """Yield a row of each side that is not compiled."""
        for side, run in self._plain.items():
            yield self._found(side, run)

    def compiled(self) -> Iterator[dict]:
        """Yield a row of each side that is; a compiler may take longer than all others together."""
        for side, run in self._compiled.items():
            yield self._found(side, run)

    def _found(self, side: str, run: Callable[[], dict]) -> dict:
        row = {"side": side, **self._row}
        if reason := _missing(side, self._device):
            return row | {"skipped": reason}
        free_memory(self._device)
        try:
            row |= run()
        except OUT_OF_MEMORY as error:
            return row | {"out_of_memory": str(error).partition(".")[0]} | _against_plan(side, self._plan)
        except (QloraLiteError, *foreign_errors()) as error:
            return row | {"problem": _told(error)}
        self._first_loss = self._first_loss or row["first_loss"]
        differs = abs(row["first_loss"] / self._first_loss - 1) > LOSS_DIFFERENCE
        problem = f"first loss {row['first_loss']:.4f}, not {self._first_loss:.4f}"
        return row | ({"problem": problem} if differs else {})


def _told(error: Exception) -> str:
    """Return an error's first line and its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _against_plan(side: str, plan: Plan) -> dict:
    return {"problem": "it was planned to fit, and memory ran out"} if side == PLANNED and plan.fits else {}


def why_not_compiled(device_type: str) -> str:
    """Say why blocks cannot be compiled here; "" where they can."""
    if LIBRARY in os.environ:
        return "a compiler sees nothing of a simulated GPU"
    missing = missing_for_compile(device_type)
    return f"{missing} is missing" if missing else ""


def _missing(side: str, device: torch.device) -> str:
    if side.endswith("compiled") and (reason := why_not_compiled(device.type)):
        return reason
    return _not_installed(["peft"] * side.startswith("peers") + ["liger_kernel"] * side.endswith("Liger"))


def _not_installed(needed: list[str]) -> str:
    return ", ".join(f"{name} is not installed" for name in needed if importlib.util.find_spec(name) is None)


def _ours(case: dict, device: torch.device) -> dict:
    trainer = trainer_of(case, model_of(case, device), WARMUP + STEPS)
    free_memory(device)
    metrics = list(trainer)
    trainer.meter.close()
    return {
        "tokens_per_second": statistics.median(step.tokens_per_second for step in metrics[WARMUP:]),
        "first_loss": metrics[0].loss,
        "first_step_seconds": metrics[0].seconds,
        **_peak(device),
    }


def peers_side(case: dict, device: torch.device, liger: bool) -> dict:
    """Train the case the stock way; return speed, first loss and the allocator's peak on a GPU."""
    model = stock_model(case["model"], device)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    ids = [example.token_ids.tolist() for example in examples_of(case)]
    at_once = case["rows"]
    model, optimizer = dressed(model)
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
    return {
        "tokens_per_second": case["tokens"] / statistics.median(seconds[WARMUP:]),
        "first_loss": losses[0],
        **_peak(device),
    }


def _peak(device: torch.device) -> dict:
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def compare_losses(name: str, tokens: int, device: torch.device) -> Iterator[dict]:
    """Yield speed, memory and relative errors of the loss alone: ours, and those of ``kernels.fused_loss``.

    Args:
        name: a key of ``models.MODELS``, whose head, frozen and random, is taken.
        tokens: all learned.
    """
    row = {"model": name, "rows": 1, "length": tokens}
    try:
        inputs = _loss_inputs(name, tokens, device)
    except OUT_OF_MEMORY as error:
        yield {"side": "the loss alone", **row, "out_of_memory": str(error).partition(".")[0]}
        return
    expected = None
    for side, (package, loss) in LOSSES.items():
        found = {"side": side, **row, **_loss_row(package, loss, inputs)}
        expected = expected or found.get("loss")
        if "loss" in found and abs(found["loss"] / expected - 1) > LOSS_DIFFERENCE:
            found["problem"] = f"loss {found['loss']:.4f}, not {expected:.4f}"
        yield found


def _loss_inputs(name: str, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return hidden states, the head's weight and targets."""
    config, random = config_of(name), torch.Generator(device).manual_seed(0)
    made = {"generator": random, "device": device, "dtype": dtype_of(config)}
    weight = torch.randn(config.vocab_size, config.hidden_size, **made) * HEAD_SPREAD
    hidden = torch.randn(tokens, config.hidden_size, **made).requires_grad_()
    return hidden, weight, torch.randint(config.vocab_size, (tokens,), generator=random, device=device)


def _loss_row(package: str, loss: Loss, inputs: tuple[torch.Tensor, ...]) -> dict:
    """Return what a loss took, or why it has no figures."""
    device = inputs[0].device
    reason = _not_installed([package]) if package else ""
    if package and not reason and device.type == "cpu":
        reason = "its kernels are for a GPU"
    if reason:
        return {"skipped": reason}
    free_memory(device)
    try:
        return _timed_loss(loss, *inputs)
    except OUT_OF_MEMORY as error:
        return {"out_of_memory": str(error).partition(".")[0]}
    except foreign_errors() as error:
        return {"problem": _told(error)}


def _timed_loss(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict:
    seconds = []
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats(hidden.device)
    for _ in range(WARMUP + STEPS):
        hidden.grad, started = None, time.perf_counter()
        total = loss(hidden, targets, Head(weight))
        total.backward()
        mean = total.item() / len(targets)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        seconds.append(time.perf_counter() - started)
    found = {
        "tokens_per_second": len(targets) / statistics.median(seconds[WARMUP:]),
        "loss": mean,
        **_peak(hidden.device),
    }
    loss_error, gradient_error = errors_of(loss, hidden[:CHECKED_TOKENS], targets[:CHECKED_TOKENS], Head(weight))
    return found | {"loss_error": loss_error, "gradient_error": gradient_error}


def _our_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    return chunked_cross_entropy(hidden, targets, head, AUTO_CHUNK_TOKENS)


LOSSES = {"the loss alone, ours": ("", _our_loss)} | {f"the loss alone, {name}": FUSED[name] for name in FUSED}
