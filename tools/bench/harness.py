"""Compare ways to do one thing: each measurement in a process of its own, the ways in turns, ratios with their spread.

Every tool of this room imports this module first, because it puts ``tools`` on the path.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.results import write_result

__all__ = ["apart", "in_turns", "parser", "ratio", "start", "write_result"]
CASE = "--case"


def parser(description: str | None) -> ArgumentParser:
    """Return a parser that shows a tool's docstring as it is."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def start(main: Callable[[], None], measure: Callable[[Any], Any]) -> None:
    """Begin a tool: with a measurement, where ``apart`` has started this process for one."""
    if sys.argv[1:2] == [CASE] and isgeneratorfunction(measure):
        steps = measure(json.loads(sys.argv[2]))
        for _ in sys.stdin:  # a line for each step, see ``experiments.harness.step_by_step``
            print(json.dumps(next(steps)), flush=True)
    elif sys.argv[1:2] == [CASE]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()


def apart(case: Any, variables: Mapping[str, str] | None = None) -> Any:
    """Call the running tool's ``measure`` in a process of its own; return what it returns.

    Args:
        case: its argument, anything JSON can hold.
        variables: of the environment, beside this process's.
    """
    command = [sys.executable, sys.argv[0], CASE, json.dumps(case)]
    done = subprocess.run(command, env=os.environ | (variables or {}), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {case} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(ways: Mapping[str, Callable[[], dict]], rounds: int) -> dict[str, list[dict]]:
    """Measure every way once a round, so that a machine that slows down slows all of them; return each way's rows."""
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(1, rounds + 1):
        for way, measure in ways.items():
            found[way].append(measure())
            print(f"{number}/{rounds} {way}", file=sys.stderr, flush=True)
    return found


def ratio(ours: Iterable[dict], theirs: Iterable[dict], key: str) -> dict[str, float]:
    """Return ours / theirs of the rows of the same round: median and range."""
    each = [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
