"""All GPUs of a machine that train one model together, a process each, beside one of them that trains it alone.

Each process is a ``Trainer`` on random weights, joined as the command line joins its ranks (``train.process_group``:
NCCL between GPUs, gloo on CPUs); the command line itself would need a model in files. Run as a module, this is one
rank.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from common.cases import model_of, trainer_of
from qlora_lite.errors import LaunchError
from qlora_lite.models.load import resolve_device
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.train.processes import ALONE, RankLostError
from qlora_lite.train.rendezvous import joined

STEPS, KILLED_STEPS, KILLED_AFTER = 20, 6, 3
LOSS_ERROR = 1e-3  # of a step's loss, relative: sums are in another order
NOTICED_SECONDS = 60
TOOLS = Path(__file__).resolve().parents[1]


def rank_rows(name: str, tokens: int, ranks: int, limit_seconds: float) -> Iterator[dict]:
    """Yield one GPU's steps, those of all GPUs beside them, and whether a killed rank is noticed.

    Args:
        name, tokens: of the model and of each micro-batch; each rank has one of a step.
        ranks: how many processes.
        limit_seconds: for each of the three.
    """
    case = {"model": name, "tokens": tokens, "checkpointing": "block", "accumulation": ranks}
    yield {"kind": "task", "model": name, "tokens": tokens, "ranks": ranks}
    alone, all_of_them = (run_ranks(case, count, STEPS, limit_seconds) for count in (1, ranks))
    for found in (alone, all_of_them):
        if "problem" in found:
            yield found
            return
    yield {"kind": "speed", "ranks": 1, "tokens_per_second": alone["tokens_per_second"]}
    yield {
        "kind": "speed",
        "ranks": ranks,
        "tokens_per_second": all_of_them["tokens_per_second"],
        "of_one": all_of_them["tokens_per_second"] / alone["tokens_per_second"],
    }
    yield losses_row(alone["losses"], all_of_them["losses"])
    yield killed_row(run_ranks(case, ranks, KILLED_STEPS, limit_seconds, KILLED_AFTER))


def losses_row(alone: list[float], together: list[float]) -> dict:
    """Compare the losses of the same steps."""
    errors = [abs(one - other) / one for one, other in zip(alone, together, strict=True)]
    row = {"kind": "losses", "steps": len(alone), "largest_error": max(errors)}
    far = [f"{error:.1e}" for error in errors if not error <= LOSS_ERROR]  # or not a number
    return row | {"problem": f"losses differ by {', '.join(far)}"} if far else row


def killed_row(found: Mapping) -> dict:
    """Say whether the others have noticed that a rank was killed."""
    if "problem" in found:
        return dict(found)
    row = {"kind": "killed", "seconds": found.get("seconds"), "message": found.get("lost")}
    if found.get("lost") is None:
        return row | {"problem": "nobody noticed that a rank was killed"}
    return row if row["seconds"] <= NOTICED_SECONDS else row | {"problem": f"noticed after {row['seconds']:.0f} s"}


def run_ranks(case: Mapping, ranks: int, steps: int, limit_seconds: float, killed_after: int = 0) -> dict:
    """Train in so many processes; return what the first one reports, or a "problem".

    Args:
        limit_seconds: all are killed after it.
        killed_after: a step after which the last rank kills itself; 0 is none.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "PYTHONPATH": f"{TOOLS}{os.pathsep}{TOOLS.parent}",
    }
    command = [sys.executable, "-m", "gpu.ranks", json.dumps([case, steps, killed_after])]
    with tempfile.TemporaryFile("w+") as said:
        processes = [
            subprocess.Popen(command, env=os.environ | variables | {"RANK": str(rank)}, stdout=said)
            for rank in range(ranks)
        ]
        try:
            processes[0].wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return {"problem": f"{ranks} processes did not end within {limit_seconds:.0f} s"}
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    if processes[0].returncode or not lines:
        return {"problem": f"rank 0 of {ranks} ended with {processes[0].returncode}"}
    return json.loads(lines[-1])  # the others print nothing


def main() -> None:
    """Train as one rank; the first one prints what it found."""
    case, steps, killed_after = json.loads(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = resolve_device()
    with ExitStack() as stack:
        processes = ALONE
        if ranks > 1:
            processes = stack.enter_context(joined(rank, ranks, rank, ranks, device.type))
        if device.type == "cuda":
            device = torch.device("cuda", rank)
        trainer = trainer_of(case, model_of(case, device), steps)
        trainer.processes, last_step, found = processes, time.monotonic(), []
        try:
            for metrics in trainer:
                found.append(metrics)
                last_step = time.monotonic()
                if metrics.step == killed_after and rank == ranks - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            processes.require_equal("adapter weights", str([bit_sums(each) for each in trainer.parameters]))
            speed = statistics.median(metrics.tokens_per_second for metrics in found)
            row = {"losses": [metrics.loss for metrics in found], "tokens_per_second": speed}
        except RankLostError as error:
            row = {"lost": str(error), "seconds": time.monotonic() - last_step}
        except LaunchError as error:
            row = {"problem": str(error)}
        if rank == 0:
            print(json.dumps(row), flush=True)
        sys.stdout.flush()
        os._exit(0)  # NCCL may wait for a rank that was killed


if __name__ == "__main__":
    main()
