"""A step of several GPUs: each plans its share, and what goes over the wire is counted."""

import json

import pytest
from tiny_files import save_tiny

from qlora_lite.memory.gpus import LINKS
from qlora_lite.planning.shared_step import REACHED


def planned(command, *arguments):
    code, out, err = command("plan", *arguments, "--gpu", "rtx-3090", "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(("gpus", "link"), [(2, "nvlink"), (4, "ethernet-10g")])
def test_each_gpu_plans_its_share_and_the_wire_takes_its_time(gpus, link, tmp_path, command):
    save_tiny(tmp_path)
    model = str(tmp_path), "train.gradient_accumulation_steps=8", "memory.micro_batches=as-given", "lora.rank=4"
    one, all_of_them = planned(command, *model), planned(command, *model, "--gpus", gpus, "--link", link)
    shared = all_of_them["shared"]
    assert all_of_them["chosen"]["train.gradient_accumulation_steps"] == shared["packs"] == 8 // gpus
    assert all_of_them["machine"] == f"each of {gpus}: RTX 3090" and "shared" not in one
    trained = 2 * 4 * sum(i + o for i, o in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)])
    assert shared["wire_bytes"] == 4 * trained * 2 * (gpus - 1) // gpus
    assert shared["wire_seconds"] == shared["wire_bytes"] / (REACHED * LINKS[link])
    assert shared["step_seconds"] == all_of_them["step_seconds_estimate"] + shared["wire_seconds"]
    assert shared["speed_up"] == one["step_seconds_estimate"] / shared["step_seconds"]


@pytest.mark.parametrize(
    ("given", "expected", "slowest"),
    [
        (["--gpus", 2, "--nodes", 4], (2, 4, "pcie4", "ethernet-10g"), 1.25e9),
        (["--nodes", 2, "--network", "infiniband-400g"], (1, 2, None, "infiniband-400g"), 50e9),
        (["--gpus", 2, "--nodes", 2, "--link", "pcie3", "--network", "infiniband-400g"],
         (2, 2, "pcie3", "infiniband-400g"), 15.8e9),
    ],
)  # fmt: skip
def test_the_slowest_link_decides_for_a_ring_over_machines(given, expected, slowest, tmp_path, command):
    """Of 2 * (trained numbers) of 4 bytes, (N - 1) / N go over every link; 80 % of its rate are reached."""
    save_tiny(tmp_path)
    model = str(tmp_path), "train.gradient_accumulation_steps=8", "memory.micro_batches=as-given", "lora.rank=4"
    found = planned(command, *model, *given)
    shared, ranks = found["shared"], expected[0] * expected[1]
    assert tuple(shared[key] for key in ("gpus", "nodes", "link", "network")) == expected
    trained = 4 * 2 * (128 + 96 + 96 + 128 + 160 + 160 + 160)  # rank * layers * (inputs + outputs)
    assert shared["packs"] == 8 // ranks and shared["wire_bytes"] == 2 * 4 * trained * (ranks - 1) // ranks
    assert shared["wire_seconds"] == pytest.approx(shared["wire_bytes"] / (0.8 * slowest), rel=1e-12)
    assert found["machine"] == f"each of {ranks} on {expected[1]} machines: RTX 3090"
    code, out, _ = command("plan", *model, *given, "--gpu", "rtx-3090")
    assert code == 0 and f"{ranks} GPUs on {expected[1]} machines, each {8 // ranks} of a step's packs" in out
    assert f"of gradients a step over {shared['slowest_link']}, " in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--link", "nvlink"], "say how many with --gpus N"),
        (["--gpus", "2", "--link", "string"], "'string' is not one of"),
        (["--nodes", "2", "--link", "nvlink"], "say how many with --gpus N"),
        (["--gpus", "2", "--network", "nvlink"], "say how many with --nodes M"),
        (["--gpus", "2", "--nodes", "3"], "6 processes cannot share the 8 packs of a step"),
        (["--gpus", "3"], "3 processes cannot share the 8 packs of a step"),
    ],
)
def test_what_cannot_be_shared_is_said(arguments, says, tmp_path, command):
    save_tiny(tmp_path)
    code, _, err = command("plan", tmp_path, "train.gradient_accumulation_steps=8", "--gpu", "rtx-3090", *arguments)
    assert code == 2 and says in err, err
