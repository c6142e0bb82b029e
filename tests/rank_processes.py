"""Several processes on this machine, joined by gloo, that each run a function of a test file.

They are forked from a server process that has imported what tests import, which takes longer than most of them.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from unittest.mock import patch

SECONDS = 240  # for all of them
PRELOADED = "imported_by_tests"


def together(
    count: int, module: str, name: str, folder: Path, *arguments, expected: Sequence[int] | None = None
) -> list[str]:
    """Call ``module.name(number, count, folder, *arguments)`` in so many processes; return what each wrote to stderr.

    Args:
        expected: exit codes.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    (folder / "meeting").unlink(missing_ok=True)
    context = get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload([PRELOADED])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    written = [folder / f"stderr-{number}" for number in range(count)]
    processes = [
        context.Process(target=_run, args=(environment, to, module, name, str(folder), number, count, arguments))
        for number, to in enumerate(written)
    ]
    with patch.dict(os.environ, environment):  # of the server, if it has not begun
        for process in processes:
            process.start()
    end = monotonic() + SECONDS
    try:
        while left := [process.sentinel for process in processes if process.is_alive()]:
            assert wait(left, max(0, end - monotonic())), f"{len(left)} processes have not ended in {SECONDS} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = [each.read_text() for each in written]
    codes = [process.exitcode for process in processes]
    assert codes == list(expected or [0] * count), said
    return said


def _run(environment, written, module, name, folder, number, count, arguments) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(written, "w") as file:
        os.dup2(file.fileno(), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=count)
    getattr(import_module(module), name)(number, count, folder, *arguments)
    dist.destroy_process_group()
