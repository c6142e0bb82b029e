"""The table of GPUs: names as people write them, and figures that cannot be far off."""

import pytest

from qlora_lite.memory.gpus import GPUS, RULE_BYTES, RULE_SHARE, GpuError, find_gpu, slowest_gpu


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx-4060", "RTX 4060"),
        ("RTX 4060", "RTX 4060"),
        ("rtx4060", "RTX 4060"),
        ("4060", "RTX 4060"),
        ("NVIDIA GeForce RTX 4060", "RTX 4060"),
        (" rtx_4060_8gb ", "RTX 4060"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("RTX-4060-Ti-8GB", "RTX 4060 Ti 8GB"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4050 Laptop GPU", "RTX 4050 Laptop"),
        ("rtx-4060-laptop", "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", "RTX 5070 Ti Laptop"),
        ("t4", "Tesla T4"),
        ("a10", "A10"),
        ("A10G", "A10G"),
        ("h100", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-16GB", "Tesla V100 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("h200-141gb", "H200"),
        ("NVIDIA GB10", "GB10"),
        ("2060 12gb", "RTX 2060 12GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA L40", "L40"),
    ],
)
def test_a_gpu_is_found_as_people_and_drivers_write_it(written, name):
    assert find_gpu(written).name == name


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_every_gpu_is_found_by_its_own_name_only(card):
    assert find_gpu(card.name) is card
    assert find_gpu(card.name.lower().replace(" ", "-")) is card


@pytest.mark.parametrize(
    ("name", "variants"), [("4060 ti", ("8GB", "16GB")), ("a100", ("40GB", "80GB")), ("RTX 2060", ("6GB", "12GB"))]
)
def test_a_name_of_several_sizes_names_them(name, variants):
    with pytest.raises(GpuError, match="several sizes") as error:
        find_gpu(name)
    assert all(variant in str(error.value) for variant in variants)


@pytest.mark.parametrize(("name", "near"), [("rtx-4065", "RTX 4060"), ("rtx 3099", "RTX 3090"), ("a600", "RTX A6000")])
def test_an_unknown_gpu_names_the_nearest(name, near):
    with pytest.raises(GpuError, match=f"{name}.*did you mean.*{near}") as error:
        find_gpu(name)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "   ", "rtx", "Radeon", "12GiB", "x\n<b>", "9" * 10_000])
def test_what_is_no_gpu_is_refused(name):
    with pytest.raises(GpuError, match=r"(plan --gpus lists it; o|did you mean .*\? O)r .* --vram 12GiB"):
        find_gpu(name)


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_no_gpu_promises_its_boxs_memory(card):
    withheld_bytes = card.box_gib * 2**30 - card.memory_bytes
    assert 64 * 2**20 <= withheld_bytes < 0.1 * card.box_gib * 2**30


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_rates_are_in_the_range_of_their_time(card):
    assert 190e9 <= card.bandwidth_bytes_per_second <= 8e12
    assert (
        (6e12 <= card.flops_per_second <= 15e12)
        if card.trains_in == "float32"
        else (18e12 <= card.flops_per_second <= 2.25e15)
    )
    assert 10e9 <= card.pcie_bytes_per_second <= 51e9
    assert card.memory_source in ("reported", "sibling", "rule")


def test_a_gpu_trains_in_the_type_of_its_generation_at_that_type_s_rate():
    for name, dtype, rate in (
        ("1080 ti", "float32", 11.3e12),
        ("v100 16gb", "float16", 112e12),
        ("t4", "float16", 65e12),
        ("2080 ti", "float16", 53.8e12),
        ("4090", "bfloat16", 165.2e12),
    ):
        card = find_gpu(name)
        assert (card.trains_in, card.flops_per_second) == (dtype, rate)


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_a_gpu_that_trains_in_float16_has_a_lower_rate_in_float32(card):
    assert (card.float32_flops_per_second is not None) == (card.trains_in == "float16")
    assert (card.float32_flops_per_second or 0) <= card.flops_per_second / 4 * 1.05  # as GeForce GPUs, or less


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        (7, "RTX 3050"),
        (8, "RTX 3050"),
        (8.9, "RTX 3050"),
        (11.5, "RTX 3060"),
        (0.5, "RTX 4050 Laptop"),
        (500, "B200"),
        (100, "RTX PRO 6000 Blackwell"),
        (140, "H200"),
    ],
)
def test_memory_without_a_gpu_s_name_is_as_fast_as_the_slowest_gpu_of_that_size(gib, name):
    found = slowest_gpu(int(gib * 2**30))
    assert found.name == name
    assert not [
        c
        for c in GPUS
        if c.box_gib == found.box_gib and c.trains_in == "bfloat16" and c.flops_per_second < found.flops_per_second
    ]


def test_a_plug_is_slower_than_its_data_rate():
    assert find_gpu("4090").pcie_bytes_per_second == pytest.approx(25.2e9, rel=1e-3)
    assert find_gpu("4060").pcie_bytes_per_second == pytest.approx(12.6e9, rel=1e-3)


def test_the_rule_stays_below_what_was_reported_without_error_correction():
    corrected = ("Tesla T4", "A10G", "L4", "A40", "L40S", "GB10")  # the last shares its memory with the host
    reported = [card for card in GPUS if card.memory_source == "reported" and card.name not in corrected]
    assert len(reported) > 15
    for card in reported:
        by_rule_bytes = (1 - RULE_SHARE) * card.box_gib * 2**30 - RULE_BYTES
        assert by_rule_bytes <= card.memory_bytes, card.name
