"""A step of several GPUs: each plans its share, and what goes over the wire is counted."""

import json
from dataclasses import replace

import pytest
from tiny_files import save_tiny
from transformers import AutoConfig

from qlora_lite.errors import RecipeError
from qlora_lite.memory.gpus import LINKS, REACHED, find_gpu
from qlora_lite.offload.stream import ALIGNMENT
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.planning.shared_step import Cluster, shared_step
from qlora_lite.prepare import plan as planner
from qlora_lite.prepare import ranks
from qlora_lite.recipe.load import recipe_of
from qlora_lite.reporting import plan_text


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


@pytest.mark.slow
def test_gpus_that_have_no_room_for_the_model_divide_it(tmp_path):
    """A 24-layer model of 1.4 GiB in 16 bit: whole where it fits, and else what there is no room for."""
    save_config(tmp_path)
    settings = "train.gradient_accumulation_steps=8", "model.quant=none", "data.max_tokens=256"
    recipe = recipe_of({"model": {"path": str(tmp_path)}, "data": {"train": "not-read.jsonl"}}, settings, "r")
    card = machine_of_gpu(find_gpu("rtx-3060"))

    def plan(gib, gpus, **memory):
        own = recipe.model_copy(update={"memory": recipe.memory.model_copy(update=memory)})
        machine = Cluster(gpus, link="pcie4" if gpus > 1 else None).part(card)
        return planner.plan_recipe(ranks.share_of(own, gpus), machine, int(gib * 2**30))

    whole = plan(8, 2)
    assert whole.chosen.options.resident_layers is None and whole.chosen.prediction.simulation.work.link_bytes == 0
    found = plan(1.75, 4)
    options, work = found.chosen.options, found.chosen.prediction.simulation.work
    assert found.fits and options.is_sharded and options.shards.count == 4
    part = -(-OF_BLOCK // (4 * ALIGNMENT)) * ALIGNMENT
    passes = 2 * (24 - options.resident_layers) - 2  # the last of forward is the first of backward, and so on
    assert work.link_bytes == passes * part * 3
    assert "of weights from the other ranks" in plan_text.transfers(found)
    from_host = plan(1.75, 2, stream_from="host")
    assert from_host.fits and from_host.chosen.options.stream_from == "host"
    streamed = 24 - from_host.chosen.options.resident_layers
    assert 1 <= from_host.chosen.prediction.simulation.offloaded_bytes / (streamed * OF_BLOCK / 2) < 1.2, "half of it"
    with pytest.raises(RecipeError, match="divides the weights of layers among several processes, and this is one"):
        plan(1.75, 1, stream_from="ranks")


def test_gpus_that_have_no_room_for_all_that_is_trained_divide_it(tmp_path):
    """Of the same model 8 GiB with gradients and states: to host memory only what is not divided could go."""
    save_config(tmp_path)
    settings = (
        "adapter.method=full",
        "model.quant=none",
        "data.max_tokens=256",
        "train.gradient_accumulation_steps=4",
        "memory.loss_chunk_tokens=1024",
    )
    recipe = recipe_of({"model": {"path": str(tmp_path)}, "data": {"train": "not-read.jsonl"}}, settings, "r")
    card = machine_of_gpu(find_gpu("rtx-3060"))

    def plan(gib, gpus, nodes=1, train=(), **memory):
        changes = {"memory": memory, "train": dict(train)}
        own = recipe.model_copy(
            update={section: getattr(recipe, section).model_copy(update=each) for section, each in changes.items()}
        )
        joined = {"link": "pcie4" if gpus > 1 else None, "network": "ethernet-10g" if nodes > 1 else None}
        machine = ranks.dividing(own, Cluster(gpus, nodes, **joined).part(card), gpus * nodes)
        return planner.plan_recipe(ranks.share_of(own, gpus * nodes), machine, int(gib * 2**30))

    whole, found = plan(7, 2), plan(4, 4)
    assert whole.fits and whole.chosen.options.resident_layers is None
    options, simulation = found.chosen.options, found.chosen.prediction.simulation
    assert found.fits and options.is_sharded and (options.resident_layers, options.stream_from) == (0, "ranks")
    part = -(-OF_BLOCK // (4 * ALIGNMENT)) * ALIGNMENT
    brought, sent = 2 * 24 - 2, 24  # the last two of forward are the first two of backward
    assert simulation.work.link_bytes == (brought + sent) * part * 3
    assert "of weights and their gradients from the other ranks" in plan_text.transfers(found)
    outside = 2 * 4096 * 1024 + 1024  # numbers of embeddings, head and the last norm
    assert simulation.trained_numbers == outside
    assert simulation.trained_bytes == 2 * outside + 24 * OF_BLOCK // 4
    assert simulation.saved_bytes == 2 * outside + 24 * OF_BLOCK
    assert found.chosen.prediction.host_updates == 0
    updated = plan(
        4,
        4,
        train={"micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
        optimizer_in_backward=True,
    )
    saved = found.peak_bytes - updated.peak_bytes
    assert updated.chosen.options.is_sharded and 0.8 < saved / (24 * OF_BLOCK / 4) < 1.1, "the gradients of a part"
    assert planner.disk_bytes(found) == pytest.approx(planner.disk_bytes(whole), rel=0.05)
    on_machines = plan(4, 4, 2, train={"gradient_accumulation_steps": 8}).chosen
    assert (
        on_machines.options.shards.count == 4
        and on_machines.prediction.peak_bytes == found.chosen.prediction.peak_bytes
    )
    assert on_machines.prediction.simulation.part_numbers == 24 * OF_BLOCK // 8, "each machine's ranks have all parts"
    step = shared_step(None, on_machines, Cluster(4, 2, "pcie4", "ethernet-10g"))
    assert step.wire_bytes == 4 * outside * 2 * 7 // 8 + 4 * 24 * OF_BLOCK // 8 * 2 // 2
    with pytest.raises(RecipeError, match=r"optimizer_in_backward is for .* among the GPUs of one machine"):
        plan(7, 2, 2, optimizer_in_backward=True)
    machines = ranks.Ranks((card, replace(card, flops_per_second=2 * card.flops_per_second)), (2**33, 2**33))
    own = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"stream_from": "ranks"})})
    with pytest.raises(RecipeError, match=r"divided in equal parts, .* and these GPUs are not alike: leave it out"):
        ranks.plan_ranks(own, machines)


@pytest.mark.slow
def test_divided_weights_that_are_converted_when_they_are_loaded_take_host_memory(tmp_path):
    """Files in float16 and a step in bfloat16: what is not a page of a file any more is whole in each process."""
    save_config(tmp_path, dtype="float16")
    settings = "memory.stream_from=ranks", "memory.resident_layers=2", "model.quant=none", "data.max_tokens=256"
    recipe = recipe_of(
        {"model": {"path": str(tmp_path)}, "data": {"train": "not-read.jsonl"}},
        [*settings, "train.gradient_accumulation_steps=4"],
        "r",
    )
    machine = Cluster(4, link="pcie4").part(machine_of_gpu(find_gpu("rtx-3060")))

    def plan(host_gib=None, **model):
        own = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
        host_bytes = host_gib and int(host_gib * 2**30)
        return planner.plan_recipe(ranks.share_of(own, 4), replace(machine, host_bytes=host_bytes), 4 * 2**30)

    converted, mapped = plan(), plan(compute_dtype="float16")
    assert mapped.fits and mapped.chosen.prediction.simulation.offloaded_bytes == 0
    assert converted.fits and converted.chosen.prediction.simulation.offloaded_bytes == 22 * OF_BLOCK
    assert converted.chosen.prediction.peak_bytes == pytest.approx(mapped.chosen.prediction.peak_bytes, rel=0.01)
    assert plan(3).fits and not plan(1.5).fits and plan(1.5, compute_dtype="float16").fits


OF_BLOCK = 2 * (4 * 1024 * 1024 + 3 * 1024 * 8192 + 2 * 1024)


def save_config(folder, **changes):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        **changes,
    )
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "expected", "slowest"),
    [
        (["--gpus", 2, "--nodes", 4], (2, 4, "pcie4", "ethernet-10g"), 1.25e9),
        (["--nodes", 2, "--network", "infiniband-400g"], (1, 2, None, "infiniband-400g"), 50e9),
        (
            ["--gpus", 2, "--nodes", 2, "--link", "pcie3", "--network", "infiniband-400g"],
            (2, 2, "pcie3", "infiniband-400g"),
            15.8e9,
        ),
    ],
)
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
