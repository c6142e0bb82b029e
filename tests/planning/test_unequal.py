"""GPUs that are not equal: each has a plan of its own, of a step's packs by speed and of the base by its budget."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from planning.test_shared_step import OF_BLOCK, save_config
from tiny_files import save_tiny

from qlora_lite.errors import DoesNotFitError, RecipeError
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.offload.stream import ALIGNMENT
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.planning.shared_step import Cluster
from qlora_lite.prepare.ranks import Ranks, _known_speed, part_of_base, plan_ranks, require_fit
from qlora_lite.recipe.load import recipe_of

GPUS = "rtx-4090", "rtx-3060"
FAST, SLOW = (machine_of_gpu(find_gpu(gpu)) for gpu in GPUS)


@pytest.fixture
def planned(tmp_path):
    """Plan the GPUs for a 24-layer model of 1.4 GiB in 16 bit, 8 packs a step."""
    save_config(tmp_path)
    common = (
        "train.gradient_accumulation_steps=8",
        "model.quant=none",
        "data.max_tokens=256",
        "memory.embeddings=device",
        "memory.head=device",
        "memory.offload_checkpoints=false",
        "memory.cache_dequantized=false",
        "memory.checkpointing=block",
        "memory.tile_tokens=off",
    )

    def plan(budgets, *settings, machines=(FAST, SLOW), kept=()):
        recipe = recipe_of(
            {"model": {"path": str(tmp_path)}, "data": {"train": "not-read.jsonl"}}, [*common, *settings], "r"
        )
        parts = tuple(Cluster(len(machines), link="pcie4").part(machine) for machine in machines)
        return plan_ranks(recipe, Ranks(parts, tuple(int(gib * 2**30) for gib in budgets)), kept)

    return plan


def packs_of(plan):
    return plan.chosen.packs * plan.chosen.micro_batches


def test_gpus_with_room_for_the_whole_model_have_packs_by_speed_and_memory_options_of_their_own(planned):
    plans = planned([12, 2.3])
    assert [packs_of(plan) for plan in plans] == [7, 1]  # 152 and 24 TFLOP/s
    assert all(plan.fits and plan.chosen.options.resident_layers is None for plan in plans)
    assert plans[0].chosen.options.uncheckpointed_layers > plans[1].chosen.options.uncheckpointed_layers
    assert list(map(part_of_base, plans)) == [(0, 0), (0, 0)]


def test_where_every_layer_is_to_stay_nothing_is_divided(planned):
    plans = planned([12, 12], "memory.resident_layers=24")
    assert all(plan.fits for plan in plans) and list(map(part_of_base, plans)) == [(0, 0), (0, 0)]


@pytest.mark.slow
def test_the_model_is_divided_by_what_budgets_leave_and_all_run_as_many_micro_batches(planned):
    budgets = 2.2, 1.5
    plans = planned(budgets)
    first, second = (plan.chosen for plan in plans)
    assert all(plan.fits for plan in plans)
    assert first.micro_batches == second.micro_batches and first.packs > second.packs
    assert packs_of(plans[0]) + packs_of(plans[1]) == 8
    assert first.options.resident_layers == second.options.resident_layers
    assert (first.options.shards.weights, first.options.shards.rank) == (second.options.shards.weights, 0)
    streamed = 24 - first.options.resident_layers
    parts = [part_of_base(plan)[0] for plan in plans]
    assert 0 <= sum(parts) - streamed * OF_BLOCK <= streamed * 2 * ALIGNMENT
    beside = [plan.peak_bytes - part for plan, part in zip(plans, parts, strict=True)]
    rooms = [budget * 2**30 - other for budget, other in zip(budgets, beside, strict=True)]
    assert parts[0] / parts[1] == pytest.approx(rooms[0] / rooms[1], rel=0.25), "as much is left to both"
    passes = 2 * streamed - 2  # the last of forward is the first of backward, and so on
    for plan, other in zip(plans, reversed(parts), strict=True):
        work = plan.chosen.prediction.simulation.work
        assert work.link_bytes == passes * other / streamed, "what it does not have"
        seconds = passes * sum(parts) / streamed / plan.machine.link_bytes_per_second
        assert plan.machine.link_seconds(work) == pytest.approx(seconds, rel=0.01), "one after the other"
    kept = [plan.chosen.settings for plan in plans]
    again = planned([2.0, 1.7], kept=kept)
    assert [plan.chosen.settings for plan in again] == kept and all(plan.fits for plan in again)
    assert part_of_base(again[0]) < part_of_base(plans[0]), "divided anew"


@pytest.mark.slow
def test_equally_fast_gpus_with_unequal_room_have_as_many_packs(planned):
    plans = planned([2.6, 1.4], machines=(SLOW, SLOW))
    assert all(plan.fits for plan in plans) and [packs_of(plan) for plan in plans] == [4, 4]
    (large, _), (small, share) = map(part_of_base, plans)
    assert large > small and share < 0.4


def test_gpus_without_room_for_their_shares_are_named(planned):
    plans = planned([1.3, 0.7], "memory.stream_from=ranks", "memory.micro_batches=as-given")
    assert not any(plan.fits for plan in plans)
    with pytest.raises(
        DoesNotFitError,
        match=r"^does not fit: .* of 1.3 GiB on .*, .* too much .*; nor does rank 1 \(.* of 716.8 MiB\)$",
    ):
        require_fit(plans)


def test_ranks_without_room_for_the_process_itself_are_alike_if_they_lack_the_same():
    ranks = [Ranks((replace(SLOW, base_bytes=400 * 2**20),) * count, (200 * 2**20,) * count) for count in (1, 2)]
    assert all(each.are_alike for each in ranks)


@pytest.mark.slow
def test_where_gpus_have_no_room_for_their_parts_these_wait_in_host_memory(planned):
    plans = planned([1.25, 1.05])
    options = [plan.chosen.options for plan in plans]
    assert all(plan.fits for plan in plans) and {each.stream_from for each in options} == {"host"}
    assert len({each.resident_layers for each in options}) == 1 and options[0].shards.weights == (1, 1)


@pytest.mark.parametrize(
    ("machines", "says"),
    [
        ((FAST, machine_of_gpu(find_gpu("rtx-2060-6gb"))), "train one model: set it to float16"),
        ((FAST,) * 4 + (SLOW,) * 5, "9 processes cannot share the 8 packs"),
        ((FAST, FAST, FAST), "3 processes cannot share the 8 packs"),
    ],
)
def test_what_unequal_gpus_cannot_share_is_said(machines, says, planned):
    with pytest.raises(RecipeError, match=says):
        planned([8] * len(machines), machines=machines)


@pytest.mark.parametrize(
    ("name", "mib", "speed"),
    [
        ("NVIDIA GeForce RTX 3060", 12028, SLOW.flops_per_second),
        ("NVIDIA GeForce RTX 3080", 10002, 0.92 * 59.5e12),
        ("NVIDIA GeForce RTX 3080", 12028, 0.92 * 61.3e12),
        ("AMD Instinct MI300X", 196288, 0),
    ],
)
def test_how_fast_a_gpu_is_stands_in_the_table_and_is_the_same_in_each_run(name, mib, speed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=mib * 2**20))
    assert _known_speed(torch.device("cuda", 0)) == pytest.approx(speed) and _known_speed(torch.device("cpu")) == 0


@pytest.mark.slow
def test_the_command_shows_what_each_has_and_why(tmp_path, command):
    save_tiny(tmp_path)
    model = str(tmp_path), "train.gradient_accumulation_steps=8", "lora.rank=4"
    gpus = [word for gpu in GPUS for word in ("--gpu", gpu)]
    code, out, err = command("plan", *model, *gpus, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["fits"] and [rank["packs"] for rank in found["ranks"]] == [7, 1]
    assert [rank["machine"] for rank in found["ranks"]] == ["RTX 4090", "RTX 3060"]
    slowest = max(rank["step_seconds_estimate"] for rank in found["ranks"])
    assert found["shared"]["step_seconds"] == slowest + found["shared"]["wire_seconds"]
    code, out, err = command("plan", *model, *gpus, "memory.stream_from=ranks", "memory.resident_layers=0")
    assert code == 0 and "divide its layers by what each budget leaves" in " ".join(out.split()), err
    assert "on RTX 4090, RTX 3060" in err and "2 GPUs, each its share of a step's packs" in out
    equal = [
        command("plan", *model, *of, "--json")[1] for of in (["--gpu", "3060"] * 2, ["--gpu", "3060", "--gpus", 2])
    ]
    assert equal[0] == equal[1]


@pytest.mark.parametrize("option", [["--gpus", "2"], ["--nodes", "2"], ["--max-tokens"]])
def test_options_of_equal_gpus_are_refused_with_unequal_ones(option, tmp_path, command):
    save_tiny(tmp_path)
    code, _, err = command("plan", tmp_path, "--gpu", "rtx-4090", "--gpu", "rtx-3060", *option)
    assert code == 2 and ("leave out --gpus and --nodes" in err or "for GPUs that are equal" in err)
