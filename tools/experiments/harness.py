"""What every study uses of ``bench.harness``, and what studies alone use.

Every study imports this module first, because it puts ``tools`` on the path.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import CASE, apart, in_turns, parser, ratio, start, write_result

__all__ = ["apart", "in_turns", "mean_of", "parser", "ratio", "start", "step_by_step", "write_result"]


def step_by_step(cases: Mapping[str, Any], steps: int) -> dict[str, list[float]]:
    """Let the running tool's ``measure`` go on in a process of its own for each case, one step of each in turn.

    Where other programs change the speed of a machine from minute to minute, this compares what was slowed down alike.

    Args:
        cases: each an argument of ``measure``, which is a generator here: of a number for each step.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, sys.argv[0], CASE, json.dumps(case)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for name, case in cases.items()
        }
        for _ in range(steps):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()):
                    raise SystemExit(f"error: {cases[name]} ended with {process.wait()}")
                found[name].append(json.loads(line))
        for process in running.values():
            process.stdin.close()
    return found


def mean_of(rows: Iterable[dict], key: str) -> dict[str, float | None]:
    """Return a number's mean over rows, and its standard deviation where there are several."""
    values = [row[key] for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {key: statistics.fmean(values), "standard_deviation": spread}
