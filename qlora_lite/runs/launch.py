"""The processes that a launcher started: how many, and which of them this is.

torchrun and accelerate launch say it in the environment, and say where the processes meet; ``qlora-lite train --gpus``
starts torchrun's own agent. mpirun's variables are looked at so that its processes are not each a whole training;
SLURM's are not: its tasks may well be runs of their own. torch is imported where processes are started, because every
command asks how many there are.
"""

import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from qlora_lite.errors import LaunchError, RecipeError

from .signals import describe_kill

if TYPE_CHECKING:  # its library takes a while, and every command asks how many processes there are
    from qlora_lite.recipe.schema import Recipe

log = logging.getLogger("qlora_lite")

_SIZES = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
_MEETING = "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
HEARD_SECONDS = 1  # torchrun ends all ranks as soon as one has ended
WATCH_SECONDS = 0.5  # between two looks at other processes
SAVING_SECONDS = 600  # from a signal until torchrun kills a rank, which ends its step and saves


class Launched(NamedTuple):
    """This process's rank and the number of processes, on this machine and in all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def require_one_process() -> None:
    """Check that this process is the only one; of several, rank 0 says so and the others end without a word.

    Raises:
        LaunchError: a launcher started several.
    """
    if found := _named():
        size, rank, count = found
        _say(
            rank,
            f"{count} processes were started ({size}), and only train shares its work among several: start this "
            f"command without torchrun, accelerate launch or mpirun, or unset {size}",
        )


def is_first() -> bool:
    """Return whether this process speaks for all that a launcher started: rank 0, or the only one."""
    found = _named()
    return found is None or found[1] == 0


def launched() -> Launched | None:
    """Return which of several processes this is; None where it is the only one.

    Raises:
        LaunchError: a launcher started several and does not say where they meet, or which of them this is.
    """
    if (found := _named()) is None:
        return None
    size, rank, count = found
    if missing := [name for name in (_SIZES[size], *_MEETING) if not os.environ.get(name)]:
        _say(
            rank,
            f"{count} processes were started ({size}), and nothing says where they meet ({', '.join(missing)}): "
            "start them with torchrun or accelerate launch, or with qlora-lite train --gpus",
        )
    limits = {
        _SIZES[size]: count,
        "LOCAL_WORLD_SIZE": count + 1,
        "LOCAL_RANK": _number("LOCAL_WORLD_SIZE"),
        "MASTER_PORT": 2**16,
    }
    for name, limit in limits.items():
        if not 0 <= _number(name) < limit:
            raise LaunchError(
                f"{count} processes were started ({size}), and {name} is {os.environ[name]!r}: "
                f"it must be a number below {max(limit, 1)}"
            )
    return Launched(rank, count, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE"))


def _number(name: str) -> int:
    """Return a variable's number, -1 if it is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else -1


def _named() -> tuple[str, int, int] | None:
    """Return the variable that says how many processes were started, this one's rank, and how many; None for one."""
    for size, rank in _SIZES.items():
        count, number = os.environ.get(size, ""), os.environ.get(rank, "0")
        if count.isdecimal() and int(count) > 1:
            return size, int(number) if number.isdecimal() else 0, int(count)
    return None


def _say(rank: int, words: str) -> None:
    if rank:
        time.sleep(HEARD_SECONDS)
    raise LaunchError("" if rank else words)


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """End this process by SIGTERM, as a signal to the launcher would, when the launcher is gone: it can end none."""
    launcher = os.getppid()

    def watch(is_over: Event) -> None:
        while not is_over.wait(WATCH_SECONDS):
            if os.getppid() != launcher:
                log.warning("the launcher of these processes has ended, and they end too")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    with _watching(watch):
        yield


@contextmanager
def _continuing_stopped_ranks() -> Iterator[None]:
    """Continue ranks that SIGSTOP has stopped as soon as a signal has come or a rank has ended: these end all others.

    A stopped rank acts on no signal, so torchrun's agent would wait for it, after its own signal 10 minutes.
    """
    import psutil

    if not hasattr(signal, "SIGCONT"):  # Windows
        yield
        return
    launcher = psutil.Process()

    def watch(is_over: Event) -> None:
        most = 0
        while not is_over.wait(WATCH_SECONDS):
            ranks = launcher.children()
            most = max(most, len(ranks))
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                has_ended = len(ranks) < most or any(rank.status() == psutil.STATUS_ZOMBIE for rank in ranks)
                if has_ended or select.select([signalled], [], [], 0)[0]:
                    for rank in ranks:
                        rank.send_signal(signal.SIGCONT)

    signalled, waking = os.pipe()
    os.set_blocking(waking, False)
    before = signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    try:
        with _watching(watch):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(signalled)
        os.close(waking)


@contextmanager
def _watching(watch: Callable[[Event], None]) -> Iterator[None]:
    """Run a function in a thread that ends when it is told so by an event."""
    is_over = Event()
    thread = Thread(target=watch, args=(is_over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def start(count: int, arguments: Sequence[str], recipe: "Recipe") -> int:
    """Run the command line in so many processes on this machine, by torchrun's agent; return the exit code.

    Args:
        arguments: of ``qlora-lite``.
        recipe: that they train.

    Raises:
        LaunchError: there are not so many GPUs, processes without one cannot share its steps, or one was killed.
    """
    from qlora_lite.prepare.share import check_packs, share_of

    check_packs(recipe, range(count))  # as GPUs of which no two are alike would share them, which asks for least
    import torch

    gpus = torch.cuda.device_count() if recipe.model.device != "cpu" and torch.cuda.is_available() else 0
    if gpus and count > gpus:
        raise LaunchError(f"--gpus {count}: this machine has {gpus}")
    if not gpus:  # each has its part of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        try:
            share_of(recipe, count)
        except RecipeError as error:
            raise LaunchError(f"--gpus {count}, without a GPU in use: {error}") from None
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the agent's words for what a rank says itself
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # likewise
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=SAVING_SECONDS,
    )
    try:
        with _continuing_stopped_ranks():
            elastic_launch(config, sys.executable)("-m", "qlora_lite", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            words = (
                f"rank {rank} was killed by {describe_kill(-failure.exitcode)}; "
                "`qlora-lite train RECIPE --resume` resumes the newest checkpoint"
            )
            raise LaunchError(words) from None
        return failure.exitcode
    except SignalException:
        return 130
    return 0
