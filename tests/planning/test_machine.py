"""The machine at hand: what is measured of it, and what that leaves behind."""

import torch

from qlora_lite.memory.meter import PeakMeter, held_bytes
from qlora_lite.memory.process import CPU_BUFFERS_BYTES
from qlora_lite.planning.machine import this_machine

CPU = torch.device("cpu")


def test_buffers_of_the_measurement_are_not_part_of_what_the_process_holds():
    this_machine(CPU)  # the first product starts threads and compiles a kernel
    before = held_bytes(CPU)
    with PeakMeter(CPU) as meter:
        base = this_machine(CPU).base_bytes
    assert abs(base - before) < 16 * 2**20  # what malloc keeps of a product
    assert meter.peak_bytes() - before < CPU_BUFFERS_BYTES + 32 * 2**20  # less than any step adds
