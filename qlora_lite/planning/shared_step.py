"""What a step takes that several GPUs share, each with the whole model: calculated from counted bytes and link rates.

Nothing here was measured on a network: a ring passes 2 (N - 1) / N of the gradients, in float32, over every link once a
step, and none of that is hidden behind computation, because it begins when the last micro-batch has ended.
"""

from typing import NamedTuple

from qlora_lite.memory.gpus import LINKS, REACHED

from .candidate import Candidate


class SharedStep(NamedTuple):
    """A step of several GPUs.

    ``wire_bytes`` is what each sends a step, ``wire_seconds`` how long that takes; ``step_seconds`` is that and the
    share's own time, and ``speed_up`` how many times as fast as one such GPU.
    """

    gpus: int
    link: str
    packs: int  # of each, a step
    wire_bytes: int
    wire_seconds: float
    step_seconds: float
    speed_up: float | None  # None where one GPU has no room for the model


def shared_step(alone: Candidate | None, share: Candidate, gpus: int, link: str) -> SharedStep:
    """Return what a step takes.

    Args:
        alone: the plan of one GPU for all packs of a step; None without one that fits.
        share: that of one GPU's part of them.
        link: between the GPUs, one of ``memory.gpus.LINKS``.
    """
    trained = share.prediction.simulation.trained_numbers
    wire_bytes = 4 * trained * 2 * (gpus - 1) // gpus
    wire_seconds = wire_bytes / (REACHED * LINKS[link])
    seconds = share.step_seconds + wire_seconds
    packs = share.packs * share.micro_batches
    speed_up = alone.step_seconds / seconds if alone else None
    return SharedStep(gpus, link, packs, wire_bytes, wire_seconds, seconds, speed_up)
