"""Several processes on this machine, joined by gloo, that each run a function of a test file."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SECONDS = 240  # for all of them
START = """
import sys, json
from importlib import import_module
import torch
import torch.distributed as dist
torch.set_num_threads(1)
_, module, name, folder, number, count, arguments = sys.argv
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(number), world_size=int(count))
getattr(import_module(module), name)(int(number), int(count), folder, *json.loads(arguments))
dist.destroy_process_group()
"""


def together(
    count: int, module: str, name: str, folder: Path, *arguments, expected: Sequence[int] | None = None
) -> list[str]:
    """Call ``module.name(number, count, folder, *arguments)`` in so many processes; return what each wrote to stderr.

    Args:
        expected: exit codes.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    (folder / "meeting").unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, module, name, str(folder), str(number), str(count), json.dumps(arguments)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == list(expected or [0] * count), said
    return said
