"""Kill a process at every file operation of a save, one after the other; print what is there each time.

Run as a program with a folder, because a process is forked for each: a test process has threads.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from qlora_lite.train.checkpoints import Checkpoint, keep_only, newest_whole, write_checkpoint

OPERATIONS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink")


def checkpoint(step):
    return Checkpoint(
        step, {"optimizer.safetensors": {"a": torch.full((50,), float(step))}}, {"state.json": {"n": step}}
    )


def kill_at(point):
    """Make the process kill itself before its operation number ``point`` of the kinds above."""
    calls = iter(range(10**6))
    for name in OPERATIONS:
        real = getattr(os, name)

        def counted(*arguments, real=real, **options):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, counted)


def save(root, step):
    write_checkpoint(root, checkpoint(step), {}, "")
    keep_only(root, [step])


def outcome(root, point):
    """Save step 2 over step 1 in a process that is killed at a point; return which one is whole then."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    save(root, 1)
    child = os.fork()
    if child == 0:
        kill_at(point)
        save(root, 2)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found, reasons = newest_whole(root)
    assert found is not None and reasons == [], (point, reasons)
    assert torch.equal(found.tensors["optimizer.safetensors"]["a"], torch.full((50,), float(found.step)))
    save(root, 3)  # whatever was left behind is in nobody's way
    assert newest_whole(root)[0].step == 3
    return {1: "old", 2: "new"}[found.step] if killed else "ended"


if __name__ == "__main__":
    outcomes = []
    while not outcomes or outcomes[-1] != "ended":
        outcomes.append(outcome(Path(sys.argv[1]) / "checkpoints", len(outcomes)))
    print(json.dumps(outcomes))
