"""Faults of one process among several that train together, put into runs that ``train --gpus`` starts.

Signals from outside are sent to the rank's process, found by its environment in /proc. What has to come at a certain
call is put in by the rank itself (``faults.rank``), as ``lab`` does it for a run of one process; a rank may also hit
another one when it comes to a point of its own, such as a file operation of a save that only rank 0 makes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from faults.faults import at_call, failing_disk
from faults.lab import Install, Lab, Row, count_calls

FAULT, HAPPENED = "TORTURE_FAULT", "TORTURE_HAPPENED"  # variables: what is put in; a file that says when it came
END_SECONDS = 90  # in which all have ended: 50 of silence, 3 for others' words, 30 until torchrun sends SIGKILL
RUN_SECONDS = 240  # of a whole run
TOOLS = Path(__file__).resolve().parents[1]


class RanksLab(Lab):
    """A recipe and its undisturbed run by several processes.

    Args:
        folder: an empty folder for everything.
        ranks: how many processes; each has one micro-batch of a step.
    """

    def __init__(self, folder: Path, ranks: int):
        self.ranks, self.options = ranks, ("--gpus", str(ranks))
        folder.mkdir(exist_ok=True)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TOOLS.parent), str(TOOLS)])  # of the ranks
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m faults.rank "$@"\n', encoding="ascii")
        self.python.chmod(0o755)
        super().__init__(folder, (f"train.gradient_accumulation_steps={ranks}",))

    def _warm_up(self) -> None:
        """Import what the launcher needs, so that its children need not."""
        import torch.distributed.launcher.api  # noqa: F401

    def counting(self, path: Path) -> Install:
        """See ``Lab``; what rank 0 does is counted."""
        return self.in_rank({"rank": 0, "count": str(path)})

    def in_rank(self, fault: Mapping, happened: Path | None = None) -> Install:
        """Return what makes the launcher start ranks with a fault.

        Args:
            fault: see ``install_in_rank``.
            happened: a file that is there as soon as it has come.
        """

        def install() -> None:
            sys.executable = str(self.python)
            os.environ[FAULT] = json.dumps(fault)
            if happened:
                os.environ[HAPPENED] = str(happened)

        return install

    def wait(self, child: int) -> int:
        """Return a launcher's exit code; one that does not end is killed."""
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        return super().wait(child)

    def ended(self, row: Row, out: Path, name: str, since: float | None, words: str) -> None:
        """Check how the processes of a run that had a fault have ended, before it is resumed.

        Args:
            since: when the fault came, by ``time.time``; None if it never did.
            words: a pattern of the error, which has to be the only one; "" for a run that may have none.
        """
        before = len(row.failures)
        if since:
            row.longest_end_seconds = max(row.longest_end_seconds, round(time.time() - since, 1))
        if since and time.time() - since > END_SECONDS:
            row.failures.append(f"{name}: all had ended only after {time.time() - since:.0f} s")
        if left := processes_of(out):
            row.failures.append(f"{name}: processes {left} were left")
            for process in left:
                os.kill(process, signal.SIGKILL)
        log = self.log_of(out)
        errors, stops = (
            re.findall(f"^{start}.*", log, re.MULTILINE) for start in ("error: ", "(?:stopped |interrupted)")
        )
        said = errors + stops  # a rank that the launcher ends because another was killed may say that it was stopped
        was_complete = "done: " in log  # the fault came after that
        is_named = not words or was_complete or any(re.search(words, line) for line in said)
        if len(errors) > 1 or len(stops) > 1 or not is_named:
            row.failures.append(f"{name}: one message was to have {words!r}, and not {said}")
        row.ended_wrongly += len(row.failures) > before


def install_in_rank(fault: Mapping, rank: int) -> None:
    """Put a fault into this rank if it is for it.

    Args:
        fault: "rank", and "count" (see ``count_calls``), "disk" (see ``failing_disk``), or "signal", which "whom" gets
            at the "call" of that number and kind.
    """
    if rank != fault["rank"]:
        return
    if "count" in fault:
        count_calls(Path(fault["count"]))
    elif "disk" in fault:
        failing_disk(*fault["disk"])()
    else:

        def act() -> None:
            whom = os.getpid() if fault["whom"] == rank else process_of(os.getppid(), fault["whom"])
            Path(os.environ[HAPPENED]).touch()
            os.kill(whom, fault["signal"])

        at_call(*fault["call"], act)()


def process_of(launcher: int, rank: int) -> int | None:
    """Return the process id of a launcher's rank; None as long as there is none."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()
        for child in map(int, children):
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
    except OSError:  # it has ended
        pass
    return None


def processes_of(out: Path) -> list[int]:
    """Return the processes whose command line names a run's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"output.dir={out}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def signalled_rank(lab: RanksLab, row: Row, rank: int | None, number: int, seconds: float, words: str) -> None:
    """Send a signal to a rank, or to the launcher (None), some time after the start, and resume the run.

    Args:
        seconds: from when the rank is there.
        words: see ``RanksLab.ended``.
    """
    out, name = _trial(lab, row), f"rank {rank} after {seconds:.2f} s"
    launcher = lab.start(out)
    until = time.monotonic() + RUN_SECONDS
    while process_of(launcher, rank or 0) is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(seconds)
    since = time.time()
    whom = launcher if rank is None else process_of(launcher, rank)
    if whom:
        with contextlib.suppress(ProcessLookupError):
            os.kill(whom, number)
    _judge(lab, row, out, name, lab.wait(launcher), since, words)


def signalled_rank_at(
    lab: RanksLab, row: Row, rank: int, number: int, call: tuple[str, int], words: str, by: int | None = None
) -> None:
    """Send a signal to a rank at a call, and resume the run.

    Args:
        call: its kind and number; of ``by``, or else of the rank itself.
        words: see ``RanksLab.ended``.
    """
    out, name = _trial(lab, row), f"rank {rank} at {call[0]} {call[1]} of rank {rank if by is None else by}"
    fault = {"rank": rank if by is None else by, "call": call, "whom": rank, "signal": number}
    happened = out.with_name(f"{out.name}.happened")
    code = lab.wait(lab.start(out, install=lab.in_rank(fault, happened)))
    _judge(lab, row, out, name, code, happened.stat().st_mtime if happened.exists() else None, words)


def hindered_rank(lab: RanksLab, row: Row, number: int, code: int, lasting: bool) -> None:
    """Let the disk of the first rank fail, and resume the run when it is well again."""
    out = _trial(lab, row)
    ended = lab.wait(lab.start(out, install=lab.in_rank({"rank": 0, "disk": [number, code, lasting]})))
    _judge(lab, row, out, f"operation {number}", ended, None, "" if ended == 0 else ".")


def _trial(lab: RanksLab, row: Row) -> Path:
    return lab.folder / f"trial-{re.sub('[^A-Za-z0-9]+', '-', row.fault)}-{row.tried}"


def _judge(lab: RanksLab, row: Row, out: Path, name: str, code: int, since: float | None, words: str) -> None:
    lab.ended(row, out, name, since, words)
    lab.note_steps(out)
    lab.judge(row, out, name, (code, lab.resume(out)), {0, 2, 130})
