"""What a step takes that several GPUs share: calculated from counted bytes and published rates of links.

Nothing here was measured on a network. NCCL joins all GPUs in one ring, which enters and leaves each machine once: each
GPU passes 2 (N - 1) / N of the gradients, in float32, to the next, all links at once, so that the slowest link decides
for all N of them. None of that is hidden behind computation, because it begins when the last micro-batch has ended.
Sums within each machine first, and then between machines, would take the network 2 (M - 1) / M of them for M machines:
less than the ring by at most the factor 2 - 2 / N, and by hardly anything with many machines. NCCL's trees, which it
prefers for small messages, pass as many bytes in fewer turns; what a turn costs is not counted.

Weights that are trained and divided among the GPUs of each of several machines have their gradients added up between
the machines too: each GPU's part in a ring of its own, all of which the machine's network carries.
"""

from dataclasses import replace
from typing import NamedTuple

from qlora_lite.memory.gpus import LINKS, REACHED
from qlora_lite.offload.stream import Division

from .candidate import Candidate
from .machine import Machine


class Cluster(NamedTuple):
    """Machines with so many GPUs each, what joins the GPUs of one, and what joins the machines.

    Both are names in ``memory.gpus.LINKS``, None where there is nothing to join.
    """

    gpus: int
    nodes: int = 1
    link: str | None = None
    network: str | None = None

    @property
    def world_size(self) -> int:
        """How many GPUs there are in all."""
        return self.gpus * self.nodes

    def part(self, one: Machine) -> Machine:
        """Return one GPU of all, which divides weights with those of its machine; the only one there, with those of
        all machines."""
        ranks, joins = (self.gpus, self.link) if self.gpus > 1 else (self.nodes, self.network)
        if joins is None:
            return one
        shards = Division((1,) * ranks)
        part = replace(one.shared_by(self.gpus), shards=shards, link_bytes_per_second=REACHED * LINKS[joins])
        if self.nodes == 1:
            return part
        return part.renamed(f"each of {self.world_size} on {self.nodes} machines: {one.name}", one.memory_bytes)

    @property
    def slowest(self) -> str:
        """The link that a ring over all GPUs waits for."""
        return min(filter(None, (self.network, self.link)), key=LINKS.__getitem__)


class SharedStep(NamedTuple):
    """A step of several GPUs.

    ``wire_bytes`` is what each sends of gradients a step, ``wire_seconds`` how long that takes; ``weight_bytes`` is
    what each gets of divided weights, and of the gradients of those that are trained, beside the computation.
    ``step_seconds`` is ``wire_seconds`` and the share's own time, and ``speed_up`` how many times as fast as one such
    GPU.
    """

    gpus: int  # of each machine
    nodes: int
    link: str | None
    network: str | None
    slowest_link: str
    packs: int  # of each GPU, a step
    wire_bytes: int
    wire_seconds: float
    weight_bytes: int
    step_seconds: float
    speed_up: float | None  # None where one GPU has no room for the model


def gradient_bytes(trained_numbers: int, ranks: int) -> int:
    """Return what each rank sends where gradients in float32 are added up in a ring."""
    return 4 * trained_numbers * 2 * (ranks - 1) // ranks


def shared_step(alone: Candidate | None, share: Candidate, cluster: Cluster) -> SharedStep:
    """Return what a step takes.

    Args:
        alone: the plan of one GPU for all packs of a step; None without one that fits.
        share: that of one GPU's part of them.
        cluster: the GPUs and their links.
    """
    simulation = share.prediction.simulation
    of_whole = gradient_bytes(simulation.trained_numbers, cluster.world_size)
    of_parts = gradient_bytes(simulation.part_numbers, cluster.nodes) if cluster.gpus > 1 else 0
    wire_bytes = of_whole + of_parts
    wire_seconds = (of_whole + cluster.gpus * of_parts) / (REACHED * LINKS[cluster.slowest])
    seconds = share.step_seconds + wire_seconds
    packs = share.packs * share.micro_batches
    speed_up = alone.step_seconds / seconds if alone else None
    weight_bytes = share.micro_batches * share.prediction.simulation.work.link_bytes
    return SharedStep(*cluster, cluster.slowest, packs, wire_bytes, wire_seconds, weight_bytes, seconds, speed_up)
