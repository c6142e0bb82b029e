"""Run one section of a longer check in a process of its own, with a time limit, and keep what it found so far.

A section prints a line ``ROW {...}`` for every finding as soon as it has it. Its rows are read from a file, so that
they are there whether it ended, failed or was stopped. (A pipe's last lines would be lost with the process.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MARK = "ROW "
LIMIT_SECONDS = {  # of the sections of tools/gpu_check, in order of value
    "tests": 100, "streamed": 45, "plan": 55, "caps": 100, "peers": 75, "levers": 75, "paged": 20,
}  # fmt: skip
TAIL_LINES = 15  # of a failed section's own output


def report(row: Mapping) -> None:
    """Print a finding of a section; "problem" in it makes the section fail, "skipped" says what did not run."""
    print(MARK + json.dumps(row), flush=True)


def run_section(command: Sequence[str], limit_seconds: float, environment: Mapping[str, str] | None = None) -> dict:
    """Run a command with a time limit, its children included.

    Args:
        command: prints rows with ``report``.
        limit_seconds: it is stopped after this.
        environment: added to this process's.

    Returns:
        "status" ("passed", "failed", "timed out" or "skipped"), "seconds", "rows", and "output" unless it passed.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        with path.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
            try:
                code = process.wait(max(limit_seconds, 0.0))
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for line in lines if line.startswith(MARK) and (row := _row(line)) is not None]
    found = {"status": _status(code, rows), "seconds": round(time.perf_counter() - started, 1), "rows": rows}
    if found["status"] in ("failed", "timed out"):
        found["output"] = [line for line in lines if not line.startswith(MARK)][-TAIL_LINES:]
    return found


def _row(line: str) -> dict | None:
    try:
        return json.loads(line.removeprefix(MARK))
    except ValueError:  # the process was stopped while it wrote
        return None


def _status(code: int | None, rows: Sequence[Mapping]) -> str:
    if code is None:
        return "timed out"
    if code != 0 or not rows or any("problem" in row for row in rows):
        return "failed"
    return "skipped" if all("skipped" in row for row in rows) else "passed"
