"""From a simulated step to what the device or the process will show."""

from dataclasses import dataclass

from qlora_lite.memory.process import HOST_PROCESS_BYTES, LATER_KERNELS, Overhead, later_kernels, overheads

from .simulate import Job, Simulation, simulate

CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The tensors of a step by phase and category, and what comes on top of them."""

    job: Job
    simulation: Simulation
    overheads: tuple[Overhead, ...]

    @property
    def peak_bytes(self) -> int:
        """Most memory the step needs: on a GPU with its context, on a CPU above the process's baseline."""
        beside = self.simulation.offloaded_bytes if self.job.device_type == "cpu" else 0  # the same memory there
        return self.simulation.peak().total + beside + sum(overhead.bytes for overhead in self.overheads)

    @property
    def later_bytes(self) -> int:
        """What of the peak no memory probe shows: a checkpoint that is being written, kernels of other batches."""
        return sum(overhead.bytes for overhead in self.overheads if overhead.name in (CHECKPOINT, LATER_KERNELS))

    @property
    def host_bytes(self) -> int:
        """Memory that the process needs beside a GPU: libraries, and what is kept off the GPU."""
        return HOST_PROCESS_BYTES + self.off_device_bytes

    @property
    def off_device_bytes(self) -> int:
        """What is kept off a GPU; an adapter's copies are small, and a whole model's best weights are not."""
        best = copied_bytes(self.job, self.simulation) if self.job.workload.method.trains_base else 0
        return self.simulation.offloaded_bytes + best

    @property
    def host_updates(self) -> int:
        """How many weights a step updates in host memory, where streamed blocks are trained."""
        job, sizes = self.job, self.simulation.streamed_sizes
        if not sizes or not job.workload.method.trains_base or job.options.is_sharded:
            return 0
        streamed = 1 if job.workload.method.in_turn else job.options.streamed_of(job.workload.spec.depth)
        return streamed * sum(sizes) // len(sizes) // job.workload.spec.compute_dtype.itemsize

    def missing_bytes(self, limit_bytes: float, host_limit_bytes: int | None) -> float:
        """Return by how much the step exceeds the device's limit or the host's, the larger; below 0 it fits."""
        beyond = self.peak_bytes - limit_bytes
        if host_limit_bytes is None or not self.off_device_bytes:
            return beyond
        return max(beyond, self.host_bytes - host_limit_bytes)

    def fits(self, limit_bytes: float, host_limit_bytes: int | None) -> bool:
        """Return whether the device and the host beside it have room for the step."""
        return self.missing_bytes(limit_bytes, host_limit_bytes) <= 0

    def fits_host(self, limit_bytes: int | None) -> bool:
        """Return whether the host beside a GPU has room for what is kept there; None is a limit that is not known."""
        return limit_bytes is None or not self.off_device_bytes or self.host_bytes <= limit_bytes

    @property
    def allocated_bytes(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would show."""
        return self.simulation.peak().total + sum(overhead.bytes for overhead in self.overheads if overhead.allocated)


def predict(job: Job) -> Prediction:
    """Simulate a job and add the constants of its kind of device."""
    return with_constants(job, simulate(job))


def with_constants(job: Job, simulation: Simulation) -> Prediction:
    """Add to a job's simulation the constants of its kind of device."""
    moments, products = simulation.moments.values(), simulation.work.compiled_products
    found = overheads(job.device_type, moments, simulation.resident, products, job.options.compile)
    if job.saved_adapters and job.device_type == "cpu":
        copy = Overhead(CHECKPOINT, copied_bytes(job, simulation), "its copy, until it is written")
        found += (copy, later_kernels(products))
    return Prediction(job, simulation, found)


def copied_bytes(job: Job, simulation: Simulation) -> int:
    """Return what is copied for a checkpoint: of a whole model the best weights so far alone, see ``train.state``."""
    if job.workload.method.trains_base:
        own = simulation.trained_bytes if job.options.is_sharded else simulation.saved_bytes
        return max(0, job.saved_adapters - 1) * own
    held = simulation.resident.breakdown
    return job.saved_adapters * held.get("adapter", 0) + held.get("optimizer", 0)
