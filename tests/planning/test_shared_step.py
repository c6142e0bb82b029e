"""A step of several GPUs: each plans its share, and what goes over the wire is counted."""

import json

import pytest
from tiny_files import save_tiny

from qlora_lite.memory.gpus import LINKS, REACHED


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
    ("arguments", "says"),
    [
        (["--link", "nvlink"], "say how many with --gpus N"),
        (["--gpus", "2", "--link", "string"], "'string' is not one of"),
        (["--gpus", "3"], "3 processes cannot share the 8 packs of a step"),
    ],
)
def test_what_cannot_be_shared_is_said(arguments, says, tmp_path, command):
    save_tiny(tmp_path)
    code, _, err = command("plan", tmp_path, "train.gradient_accumulation_steps=8", "--gpu", "rtx-3090", *arguments)
    assert code == 2 and says in err, err
