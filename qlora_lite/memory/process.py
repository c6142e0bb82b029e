"""What a device or a process needs beyond its tensors, as named constants with their source."""

from typing import NamedTuple

from .ledger import Moment


class Overhead(NamedTuple):
    """Bytes that no tensor accounts for, and why they are there."""

    name: str
    bytes: int
    why: str


def overheads(device_type: str, peak: Moment) -> tuple[Overhead, ...]:
    return ()
