"""What common NVIDIA GPUs can hold and do, for plans made on a machine that has none of them.

Memory is what `torch.cuda.mem_get_info` reports as the total, not the number on the box: the driver withholds
some, and GPUs that check their memory (error-correcting GDDR6) lose another sixteenth. Planning with the
box's number is the known other way, and promises 0.2 to 3.6 GiB that no program ever gets.

- `reported`: the lowest total that we found in public output of torch on that GPU under Linux (the banner that
  Unsloth prints, the one that Ultralytics prints, `torch.cuda.get_device_properties`). Newer drivers withhold
  more than older ones and Windows reports the box's number, so the lowest is the one to plan with.
- `sibling`: the total reported for another GPU of the same memory and generation (the comment names it), where
  none was found, or only a higher one from an older driver.
- `rule`: nothing was found. The box's number less 2 % and 288 MiB, which is at or below every total reported
  for a GPU without error correction.

Rates are the vendor's: bandwidth from the product pages and datasheets; operations from the architecture
papers (Pascal, Volta, Turing, Ampere GA100 and GA102, Ada, Hopper, Blackwell) and datasheets, in the type that a GPU
trains in: bfloat16 on dense tensor cores with float32 accumulation, which GeForce GPUs do at half the advertised rate,
twice their float32 rate; before compute capability 8.0, which has no bfloat16, float16 with the same accumulation (four
times the float32 rate of a GeForce GPU of the 20 series), and float32 before 7.0, which has no tensor cores. Real
kernels reach a part of these; a time estimate has to apply its own efficiency. Of a laptop's GPU, rates are those of
the highest clock that the vendor's comparison of laptops or a public test states, for the 50 series a sixteenth of the
vendor's AI TOPS where these are stated; an eighth for RTX PRO 6000 and GB10, of which public tests measured 417 and 92
TFLOP/s. Bandwidth is the bus's width times the data rate of its generation's memory where no figure was found (RTX
4080, 5070 Ti, 5080 and 5090). Makers choose the power: by the range of clocks that the vendor states, the same GPU
with the least of it takes up to 1.8 times as long.

Of some GPUs the vendor's figures were found only where others repeat them (L40, B200, RTX 2060 12GB, RTX 5050, 4000
and 5000 Ada): the L40 does half of what its chip does as L40S; the B200 is that of HGX at 1,000 W; tensor rates of the
RTX GPUs are four times their float32 rates, as the vendor states of others of a generation, and the bandwidth of the
5000 Ada is its 256 bits at 18 Gbit/s.

Host to device: 80 % of the data rate of the GPU's PCIe link (8, 16 or 32 GT/s per lane for generations 3, 4
and 5, 128 bits of data in 130), the part that large copies from pinned memory usually reach; a board with
fewer lanes or an older slot gives less.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_lite.errors import QloraLiteError

PCIE_TRANSFERS_PER_SECOND = {3: 8e9, 4: 16e9, 5: 32e9}  # per lane, one bit each
PCIE_REACHED = 0.8
RULE_SHARE, RULE_BYTES = 0.02, 288 * 2**20  # withheld where no total was reported
NO_MEANING = re.compile(
    r"nvidia|geforce|rtx|gtx|tesla|quadro|generation|(workstation|server).edition|gpu|sxm\d?|hbm\de?|[^a-z0-9]"
)
# Between GPUs, bytes a second in one direction: PCIe with 16 lanes; the bridge of an RTX 3090; NVLink of an A100 and an
# H100 by their datasheets; networks by their names.
LINKS = {
    "pcie3": 15.8e9,
    "pcie4": 31.5e9,
    "pcie5": 63e9,
    "nvlink": 56.25e9,
    "nvlink-a100": 300e9,
    "nvlink-h100": 450e9,
    "ethernet-10g": 1.25e9,
    "ethernet-25g": 3.125e9,
    "ethernet-100g": 12.5e9,
    "infiniband-400g": 50e9,
}
LINK, NETWORK = "pcie4", "ethernet-10g"  # of GPUs, and of machines, of which nothing is said
REACHED = 0.8  # of a link's rate, as large copies usually do; assumed


class GpuError(QloraLiteError):
    """Report a GPU that is not in the table, or a name that several GPUs share."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics GPU.

    Args:
        name: as in the table, with the size where GPUs of one name differ in it.
        box_gib: memory as sold.
        memory_bytes: total that torch sees.
        memory_source: "reported", "sibling" or "rule"; see the module's text.
        bandwidth_bytes_per_second: of the GPU's own memory.
        flops_per_second: in the type that it trains in, dense, float32 accumulation.
        pcie_bytes_per_second: host to device, large copies from pinned memory.
        compute_capability: NVIDIA's (major, minor).
        float32_flops_per_second: of a GPU that trains in float16, for models that cannot; else None.
    """

    name: str
    box_gib: int
    memory_bytes: int
    memory_source: str
    bandwidth_bytes_per_second: float
    flops_per_second: float
    pcie_bytes_per_second: float
    compute_capability: tuple[int, int]
    float32_flops_per_second: float | None = None

    @property
    def trains_in(self) -> str:
        """The type that it trains in; see ``fastest_type``."""
        return fastest_type(self.compute_capability)

    @property
    def is_geforce(self) -> bool:
        """Whether it is one for games: RTX or GTX and four digits, and not a workstation's ("RTX 6000 Ada")."""
        return re.match(r"[RG]TX \d{4}(?! Ada)", self.name) is not None

    @property
    def is_for_data_centres(self) -> bool:
        """Whether it is one of the large chips for computing alone, such as A100 and H100."""
        return self.compute_capability in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def fastest_type(compute_capability: tuple[int, int]) -> str:
    """Return the type that GPUs of a compute capability multiply fastest: bfloat16, float16 or float32.

    Below 8.0 torch emulates bfloat16; below 7.0 there are no tensor cores.
    """
    return "bfloat16" if compute_capability >= (8, 0) else "float16" if compute_capability >= (7, 0) else "float32"


def _gpu(
    name: str,
    box_gib: int,
    memory: str,
    gigabytes_per_second: float,
    teraflops: float,
    pcie: str,
    capability: str,
    float32_teraflops: float | None = None,
) -> Gpu:
    """Build a GPU from its line in the table: memory is "source MiB", pcie "generation x lanes"."""
    source, _, mib = memory.partition(" ")
    box_bytes = box_gib * 2**30
    memory_bytes = int(mib) * 2**20 if mib else int(box_bytes * (1 - RULE_SHARE)) - RULE_BYTES
    generation, lanes = map(int, pcie.split("x"))
    link_bytes_per_second = PCIE_TRANSFERS_PER_SECOND[generation] * lanes * 128 / 130 / 8
    major, minor = map(int, capability.split("."))
    return Gpu(
        name,
        box_gib,
        memory_bytes,
        source,
        gigabytes_per_second * 1e9,
        teraflops * 1e12,
        PCIE_REACHED * link_bytes_per_second,
        (major, minor),
        float32_teraflops and float32_teraflops * 1e12,
    )


GPUS = (
    #     name               box  torch's total MiB  GB/s   TFLOP/s  PCIe  capability (and TFLOP/s in float32)
    _gpu("GTX 1080 Ti", 11, "reported 11172", 484, 11.3, "3x16", "6.1"),
    _gpu("RTX 2060 6GB", 6, "reported 5918", 336, 25.8, "3x16", "7.5", 6.5),
    _gpu("RTX 2060 12GB", 12, "rule", 336, 28.7, "3x16", "7.5", 7.2),
    _gpu("RTX 2070", 8, "sibling 7753", 448, 29.9, "3x16", "7.5", 7.5),  # RTX 3070
    _gpu("RTX 2080 Ti", 11, "reported 11012", 616, 53.8, "3x16", "7.5", 13.4),
    _gpu("RTX 3050", 8, "sibling 7753", 224, 18.2, "4x8", "8.6"),  # RTX 3070
    _gpu("RTX 3060", 12, "reported 12028", 360, 25.6, "4x16", "8.6"),
    _gpu("RTX 3060 Ti", 8, "sibling 7753", 448, 32.4, "4x16", "8.6"),  # RTX 3070
    _gpu("RTX 3070", 8, "reported 7753", 448, 40.6, "4x16", "8.6"),
    _gpu("RTX 3070 Ti", 8, "sibling 7753", 608, 43.5, "4x16", "8.6"),  # RTX 3070
    _gpu("RTX 3080 10GB", 10, "reported 10002", 760, 59.5, "4x16", "8.6"),
    _gpu("RTX 3080 12GB", 12, "sibling 12028", 912, 61.3, "4x16", "8.6"),  # RTX 3060
    _gpu("RTX 3080 Ti", 12, "sibling 12028", 912, 68.2, "4x16", "8.6"),  # RTX 3060
    _gpu("RTX 3090", 24, "sibling 24110", 936, 71.0, "4x16", "8.6"),  # RTX 3090 Ti; reported 24252
    _gpu("RTX 3090 Ti", 24, "reported 24110", 1008, 80.0, "4x16", "8.6"),
    _gpu("RTX 3060 Laptop", 6, "rule", 336, 26.2, "4x16", "8.6"),
    _gpu("RTX 3070 Laptop", 8, "rule", 448, 33.2, "4x16", "8.6"),
    _gpu("RTX 3080 Laptop 8GB", 8, "rule", 448, 42.0, "4x16", "8.6"),
    _gpu("RTX 3080 Laptop 16GB", 16, "rule", 448, 42.0, "4x16", "8.6"),
    _gpu("RTX 4050 Laptop", 6, "rule", 192, 24.3, "4x8", "8.9"),
    _gpu("RTX 4060 Laptop", 8, "rule", 256, 29.1, "4x8", "8.9"),
    _gpu("RTX 4070 Laptop", 8, "rule", 256, 40.1, "4x8", "8.9"),
    _gpu("RTX 4080 Laptop", 12, "rule", 432, 67.7, "4x16", "8.9"),
    _gpu("RTX 4090 Laptop", 16, "rule", 576, 79.4, "4x16", "8.9"),
    _gpu("RTX 4060", 8, "sibling 7806", 272, 30.2, "4x8", "8.9"),  # RTX 4060 Ti; reported 7807
    _gpu("RTX 4060 Ti 8GB", 8, "reported 7806", 288, 44.1, "4x8", "8.9"),
    _gpu("RTX 4060 Ti 16GB", 16, "reported 15945", 288, 44.1, "4x8", "8.9"),
    _gpu("RTX 4070", 12, "reported 11994", 504, 58.3, "4x16", "8.9"),
    _gpu("RTX 4070 Super", 12, "sibling 11994", 504, 71.0, "4x16", "8.9"),  # RTX 4070
    _gpu("RTX 4070 Ti", 12, "sibling 11994", 504, 80.2, "4x16", "8.9"),  # RTX 4070; reported 12007
    _gpu("RTX 4070 Ti Super", 16, "sibling 15945", 672, 88.2, "4x16", "8.9"),  # RTX 4060 Ti; reported 16069
    _gpu("RTX 4080", 16, "sibling 15945", 717, 97.5, "4x16", "8.9"),  # RTX 4060 Ti 16GB
    _gpu("RTX 4080 Super", 16, "sibling 15945", 736, 104.4, "4x16", "8.9"),  # RTX 4060 Ti 16GB
    _gpu("RTX 4090", 24, "reported 24074", 1008, 165.2, "4x16", "8.9"),
    _gpu("RTX 5050", 8, "rule", 320, 26.3, "5x8", "12.0"),
    _gpu("RTX 5060", 8, "rule", 448, 38.4, "5x8", "12.0"),
    _gpu("RTX 5060 Ti 8GB", 8, "rule", 448, 47.4, "5x8", "12.0"),
    _gpu("RTX 5060 Ti 16GB", 16, "reported 15848", 448, 47.4, "5x8", "12.0"),
    _gpu("RTX 5070", 12, "rule", 672, 61.7, "5x16", "12.0"),
    _gpu("RTX 5070 Ti", 16, "sibling 15848", 896, 87.9, "5x16", "12.0"),  # RTX 5060 Ti 16GB
    _gpu("RTX 5080", 16, "sibling 15848", 960, 112.6, "5x16", "12.0"),  # RTX 5060 Ti 16GB
    _gpu("RTX 5090", 32, "reported 32119", 1792, 209.5, "5x16", "12.0"),
    _gpu("RTX 5060 Laptop", 8, "rule", 384, 26.8, "5x8", "12.0"),
    _gpu("RTX 5070 Laptop", 8, "rule", 384, 49.9, "5x8", "12.0"),
    _gpu("RTX 5070 Ti Laptop", 12, "rule", 672, 62.0, "5x16", "12.0"),
    _gpu("RTX 5080 Laptop", 16, "rule", 896, 83.4, "5x16", "12.0"),
    _gpu("RTX 5090 Laptop", 24, "rule", 896, 114.0, "5x16", "12.0"),
    _gpu("RTX A4000", 16, "reported 16117", 448, 76.7, "4x16", "8.6"),  # workstation GPUs are sold with
    _gpu("RTX A5000", 24, "reported 24248", 768, 111.1, "4x16", "8.6"),  # error correction off; where it
    _gpu("RTX A6000", 48, "reported 48569", 768, 154.8, "4x16", "8.6"),  # is on, a sixteenth is missing
    _gpu("RTX 4000 Ada", 20, "rule", 360, 106.9, "4x16", "8.9"),
    _gpu("RTX 5000 Ada", 32, "rule", 576, 261.1, "4x16", "8.9"),
    _gpu("RTX 6000 Ada", 48, "reported 48520", 960, 364.2, "4x16", "8.9"),
    _gpu("RTX PRO 6000 Blackwell", 96, "reported 97249", 1792, 500.0, "5x16", "12.0"),
    _gpu("GB10", 128, "reported 122572", 273, 125.0, "5x16", "12.1"),  # the host's own memory: no bus
    _gpu("Tesla P100", 16, "reported 16269", 732, 9.3, "3x16", "6.0"),
    _gpu("Tesla V100 16GB", 16, "reported 16130", 900, 112.0, "3x16", "7.0", 14.0),
    _gpu("Tesla V100 32GB", 32, "reported 32494", 900, 112.0, "3x16", "7.0", 14.0),
    _gpu("Tesla T4", 16, "reported 14912", 320, 65.0, "3x16", "7.5", 8.1),
    _gpu("A10", 24, "sibling 22515", 600, 125.0, "4x16", "8.6"),  # A10G
    _gpu("A10G", 24, "reported 22515", 600, 70.0, "4x16", "8.6"),
    _gpu("L4", 24, "reported 22563", 300, 121.0, "4x16", "8.9"),
    _gpu("A40", 48, "reported 45416", 696, 149.7, "4x16", "8.6"),
    _gpu("L40", 48, "sibling 45457", 864, 181.0, "4x16", "8.9"),  # L40S
    _gpu("L40S", 48, "reported 45457", 864, 362.0, "4x16", "8.9"),
    _gpu("A100 40GB", 40, "reported 40441", 1555, 312.0, "4x16", "8.0"),
    _gpu("A100 80GB", 80, "reported 81050", 2039, 312.0, "4x16", "8.0"),
    _gpu("H100", 80, "reported 81079", 3350, 989.0, "5x16", "9.0"),
    _gpu("H100 PCIe", 80, "sibling 81079", 2000, 756.0, "5x16", "9.0"),  # H100
    _gpu("H200", 141, "reported 143052", 4800, 989.0, "5x16", "9.0"),
    _gpu("B200", 180, "reported 182630", 8000, 2250.0, "5x16", "10.0"),
)


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, written as people write it or as the driver does.

    Args:
        name: "rtx-4060", "RTX 4060", "4060", "4060 ti 16gb" or "NVIDIA A100-SXM4-80GB".

    Raises:
        GpuError: no GPU has that name (the nearest are named), or several sizes have it (all are named).
    """
    wanted = NO_MEANING.sub("", str(name).lower())
    for key in (wanted, wanted.replace("pcie", "")):  # few GPUs differ by their plug
        found = [gpu for gpu in GPUS if key in _keys(gpu)]
        if len(found) == 1:
            return found[0]
        if found:
            raise GpuError(f"{name!r} is sold in several sizes; write {_either(found)}")
    every = {key: gpu for gpu in GPUS for key in _keys(gpu)}
    near = dict.fromkeys(every[key] for key in get_close_matches(wanted, every, 6))
    cure = f"did you mean {_either(list(near)[:3])}? Or" if near else "qlora-lite plan --gpus lists it; or"
    raise GpuError(f"there is no GPU {name!r} in the table; {cure} give the memory itself, such as --vram 12GiB")


def slowest_gpu(memory_bytes: int) -> Gpu:
    """Return the slowest GPU with bfloat16 among those whose size is nearest to so much memory."""
    return min(
        GPUS,
        key=lambda gpu: (gpu.trains_in != "bfloat16", abs(gpu.box_gib - memory_bytes / 2**30), gpu.flops_per_second),
    )


def _keys(gpu: Gpu) -> tuple[str, str]:
    """Return the GPU's name without and with its size, in the form that `find_gpu` compares."""
    size = f"{gpu.box_gib}gb"
    plain = NO_MEANING.sub("", gpu.name.lower()).removesuffix(size)
    return plain, plain + size


def _either(gpus: list[Gpu]) -> str:
    *first, last = (gpu.name for gpu in gpus)
    return f"{', '.join(first)} or {last}" if first else last
