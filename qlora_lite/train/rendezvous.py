"""Where the processes of a run find each other, and what torchrun's agent keeps when it starts them again.

They meet in a key-value store at ``MASTER_ADDR:MASTER_PORT``: rank 0's own, or the one of torchrun's agent, which
outlives the processes. torch's ``env://`` would take that store as it is: processes that were started again would then
find the addresses of those before them, and connect to ports that nobody has any more. ``TORCHELASTIC_RESTART_COUNT``
cannot tell them apart, because each machine's agent counts for itself. So rank 0 draws a name for every meeting, and
answers each of the others, by a number which that one has drawn, only when all are there: who does not come is named.
"""

import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qlora_lite.errors import LaunchError, first_line
from qlora_lite.units import format_seconds

from .process_group import FIRST_ANSWER, ProcessGroup
from .processes import Processes, name_ranks

JOIN_SECONDS = 180.0  # until all have come; torchrun has waited for its agents before it starts any of them
LATER_SECONDS = 10.0  # that the others wait longer than rank 0, which knows who is missing
POLL_SECONDS = 0.1
MEETING = "qlora-lite meeting"
_joins = itertools.count()  # of this process, to tell its runs apart


@contextmanager
def joined(rank: int, world_size: int, local_rank: int, local_world_size: int, device: str) -> Iterator[Processes]:
    """Join the other processes, each of a machine with a GPU of its own if any is used.

    Args:
        device: auto, cpu or cuda.

    Raises:
        LaunchError: there are more than GPUs, or they do not find each other.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_world_size > torch.cuda.device_count():
            raise LaunchError(
                f"{local_world_size} processes were started on a machine with "
                f"{torch.cuda.device_count()} GPUs: start one for each"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"{address}:{port}"
    try:
        store = _store(rank, address, port)
        meeting = dist.PrefixStore(meet(store, rank, world_size, where), store)
        store.set_timeout(FIRST_ANSWER)
        dist.init_process_group(backend, store=meeting, timeout=FIRST_ANSWER, rank=rank, world_size=world_size)
        if on_gpu:  # its buffers are there before anybody asks how much memory is free
            dist.all_reduce(torch.zeros(1, device="cuda"))
    except RuntimeError as error:
        raise LaunchError(f"rank {rank} does not find the other processes at {where} ({first_line(error)})") from None
    yield ProcessGroup(rank, world_size, local_world_size, dist.PrefixStore(f"run {next(_joins)}", store), meeting)
    dist.destroy_process_group()  # after an error the others may wait for this one, and its end is their answer


def _store(rank: int, address: str, port: int) -> dist.TCPStore:
    """Return the store in which all meet; rank 0 begins it where no agent has done so.

    Raises:
        LaunchError: nobody has begun it in time, or there is no such machine.
    """
    begins = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not begins:
        _wait_for_port(rank, address, port)
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise LaunchError(f"rank {rank} does not know MASTER_ADDR {address} ({error.strerror})") from None
    return dist.TCPStore(
        address,
        port,
        is_master=begins,
        multi_tenant=begins,
        timeout=timedelta(seconds=JOIN_SECONDS),
        wait_for_workers=False,
    )


def _wait_for_port(rank: int, address: str, port: int) -> None:
    """Return when somebody listens; torch's own waiting ends with two stack traces of C++."""
    end, reason = time.monotonic() + JOIN_SECONDS, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((address, port), timeout=JOIN_SECONDS).close()
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(POLL_SECONDS)
        else:
            return
    raise LaunchError(
        f"rank {rank} has not found rank 0 at {address}:{port} within {format_seconds(JOIN_SECONDS)} "
        f"({reason}): see MASTER_ADDR and MASTER_PORT, and whether rank 0 was started"
    )


def meet(store: dist.Store, rank: int, world_size: int, where: str) -> str:
    """Return the name of this meeting when all ranks have come to it.

    Args:
        where: the store is, in words.

    Raises:
        LaunchError: naming the ranks that have not come in time; without a text where rank 0 names them.
    """
    own = uuid.uuid4().hex
    return _gather(store, own, world_size, where) if rank == 0 else _come(store, own, rank, world_size, where)


def _gather(store: dist.Store, meeting: str, world_size: int, where: str) -> str:
    """Wait for the others; then answer each."""
    store.set(MEETING, meeting)
    keys, end = {rank: f"{meeting} {rank}" for rank in range(1, world_size)}, time.monotonic() + JOIN_SECONDS
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if time.monotonic() >= end:
            break
        time.sleep(POLL_SECONDS)
    _answer(store, [keys[rank] for rank in keys if rank not in missing], ["" if missing else meeting, world_size])
    if not missing:
        return meeting
    time.sleep(1)  # in which they read that
    raise LaunchError(
        f"{name_ranks(missing)} of {world_size} {'has' if len(missing) == 1 else 'have'} not come to {where} within "
        f"{format_seconds(JOIN_SECONDS)}: start as many processes as WORLD_SIZE says, with the same MASTER_ADDR and "
        "MASTER_PORT and RANK from 0 on"
    )


def _answer(store: dist.Store, keys: Sequence[str], answer: list) -> None:
    for key in keys:
        store.set(f"answer {store.get(key).decode()}", json.dumps(answer))


def _come(store: dist.Store, own: str, rank: int, world_size: int, where: str) -> str:
    """Come to rank 0's meeting, and to its next one if that was one of processes that are gone."""
    end = time.monotonic() + JOIN_SECONDS + LATER_SECONDS
    while time.monotonic() < end:
        if store.check([MEETING]):
            store.set(f"{store.get(MEETING).decode()} {rank}", own)
        if store.check([f"answer {own}"]):
            meeting, expected = json.loads(store.get(f"answer {own}"))
            if expected != world_size:
                raise LaunchError(
                    f"rank {rank} was started as one of {world_size} processes and rank 0 as one of "
                    f"{expected}: WORLD_SIZE must be the same"
                )
            if not meeting:
                raise LaunchError("")
            return meeting
        time.sleep(POLL_SECONDS)
    raise LaunchError(
        f"rank {rank} of {world_size} has waited {format_seconds(JOIN_SECONDS)} at {where} for rank 0, "
        "which has not come, or does not expect this one: see RANK and WORLD_SIZE"
    )
