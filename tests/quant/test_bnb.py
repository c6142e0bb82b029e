"""What bitsandbytes' libraries are asked before one of their kernels is called."""

import struct
from pathlib import Path

import pytest
import torch
from bitsandbytes.consts import PACKAGE_DIR

from qlora_lite.models.load import missing_kernels
from qlora_lite.quant.bnb import architectures


def container(*entries):
    """A container of CUDA code with entries (1 is PTX, 2 machine code; architecture)."""
    header = "<HHIQIIHHI32x8x"
    coded = b"".join(struct.pack(header, kind, 0x101, 64, 8, 8, 0, 8, 1, number) for kind, number in entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(coded)) + coded


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (b"", ("sm_75", "sm_90", "compute_120", "sm_120")),
        (b"__nv_relfatbin", ("sm_75", "sm_90", "sm_120")),
    ],
)
def test_a_library_is_asked_for_which_gpus_it_has_kernels(rest, expected, tmp_path):
    codes = container((2, 90), (1, 120)), container((2, 75), (2, 120), (2, 90)), b"\x7fELF", container()[:10]
    library = tmp_path / "library.so"
    library.write_bytes(b"\n".join(codes) + rest)
    assert architectures(str(library)) == expected


def test_the_libraries_of_bitsandbytes_hold_those_that_its_builds_name():
    libraries = [*Path(PACKAGE_DIR).glob("libbitsandbytes_cuda*")]
    if not libraries:
        pytest.skip("this build of bitsandbytes has no library for CUDA")
    for library in libraries:
        found = architectures(str(library))
        assert {"sm_80", "sm_90"} <= {*found} and not any(name.startswith("compute") for name in found)
    assert architectures(str(Path(__file__))) == ()


@pytest.mark.gpu
def test_on_a_gpu_the_library_that_was_loaded_has_kernels_for_it():
    assert architectures() and missing_kernels(torch.device("cuda")) == ""
