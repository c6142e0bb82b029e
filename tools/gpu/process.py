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
from contextlib import suppress
from pathlib import Path

MARK = "ROW "
LIMIT_SECONDS = {  # of the sections of tools/gpu_check, in order of value; "ranks" is for several GPUs
    "tests": 95,
    "streamed": 40,
    "plan": 50,
    "numbers": 20,
    "caps": 80,
    "peers": 85,
    "answers": 25,
    "options": 55,
    "paged": 20,
    "ranks": 100,
}
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
        "status" ("passed", "failed", "timed out", "skipped", or "stopped" where this process was interrupted),
        "seconds", "rows", and "output" unless it passed.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        with path.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
            code, ended = None, "timed out"
            try:
                code = process.wait(max(limit_seconds, 0.0))
            except subprocess.TimeoutExpired:
                _end(process)
            except KeyboardInterrupt:  # Ctrl-C, and what ``interruptible`` makes the same of
                ended = "stopped"
                _end(process)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for line in lines if line.startswith(MARK) and (row := _row(line)) is not None]
    found = {
        "status": ended if code is None else _status(code, rows),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    if found["status"] in ("failed", "timed out", "stopped"):
        found["output"] = [line for line in lines if not line.startswith(MARK)][-TAIL_LINES:]
    return found


def interruptible() -> None:
    """Have a request to end, or a terminal that goes away, interrupt this process as Ctrl-C does.

    A section is not in its process group, so that it would live on, and what it found be lost.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)


def _end(process: subprocess.Popen) -> None:
    """Kill a process and its children, if there are any left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _row(line: str) -> dict | None:
    try:
        return json.loads(line.removeprefix(MARK))
    except ValueError:  # the process was stopped while it wrote
        return None


def _status(code: int, rows: Sequence[Mapping]) -> str:
    if code != 0 or not rows or any("problem" in row for row in rows):
        return "failed"
    return "skipped" if all("skipped" in row for row in rows) else "passed"
