"""Plans of recipes: the command's figures, its choice, and a run that keeps to it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from jobs import changed
from remembered_plans import remember_simulations
from tiny import UNUSUAL, config_of
from tiny_files import save_tiny, write_recipe
from tiny_trainer import examples
from transformers import AutoConfig

from qlora_lite.cli.main import main
from qlora_lite.cli.plan import machine_for
from qlora_lite.data.tokens.batch import collate
from qlora_lite.data.tokens.storage import row_lengths
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.memory.process import CPU_KERNEL_BYTES, CUDA_COMPILER_BYTES, KERNELS_KEPT
from qlora_lite.models.families import known_config
from qlora_lite.models.skeleton import shallow_config
from qlora_lite.planning import machine, simulate
from qlora_lite.planning.candidate import EQUALLY_FAST, build_candidate
from qlora_lite.planning.largest import LENGTH_STEP, largest_of
from qlora_lite.planning.machine import DISK_BYTES_PER_SECOND, Machine, machine_of_gpu
from qlora_lite.planning.predict import predict
from qlora_lite.prepare import plan as planner
from qlora_lite.prepare import ranks
from qlora_lite.prepare.job import build_job
from qlora_lite.recipe.load import load_recipe
from qlora_lite.reporting import plan_text
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.processes import Processes
from qlora_lite.units import format_bytes, format_seconds

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def simulations():
    """Simulate equal steps of all tests here once; what is known may be forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        yield remember_simulations(patch.setattr)


@pytest.fixture
def recipe(tmp_path):
    """Load a recipe for a Llama-3.2-1B that is not here, with changed settings; its rows need not exist."""

    def load(*overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text("model:\n  path: meta-llama/Llama-3.2-1B\ndata:\n  train: rows.jsonl\n  max_tokens: 1024\n")
        return load_recipe(file, overrides, check_files=False)

    return load


@pytest.fixture(scope="module")
def few_blocks(tmp_path_factory):
    """Name a model as a known one is, but of four blocks: each candidate is then one simulation of few operators."""

    @cache
    def setting(name="Llama-3.2-1B", owner="meta-llama"):
        folder = tmp_path_factory.mktemp(name)
        config = known_config(f"{owner}/{name}") | {"num_hidden_layers": 4}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:4]
        (folder / "config.json").write_text(json.dumps(config))
        return f"model.path={folder}"

    return setting


CARD = machine_of_gpu(find_gpu("rtx-4060"))
# What a test is not about: for each option that is open, candidates with it and without it are simulated.
SETTLED = "memory.checkpointing=block", "memory.uncheckpointed_layers=0", "memory.cache_dequantized=false"
EVERYTHING_SET = (
    "memory.checkpointing=block",
    "memory.loss_chunk_tokens=100",
    "train.micro_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "memory.micro_batches=as-given",
    "memory.uncheckpointed_layers=1",
    "memory.tile_tokens=64",
    "memory.offload_checkpoints=true",
    "memory.resident_layers=all",
    "memory.embeddings=device",
    "memory.cache_dequantized=true",
)


@pytest.mark.parametrize(("gib", "changes"), [(8, ["model.quant=none"]), (8, []), (2, []), (1.6, [])])
def test_no_single_change_that_fits_is_faster_than_by_what_the_time_model_tells_apart(recipe, few_blocks, gib, changes):
    settings = recipe(few_blocks(), "train.gradient_accumulation_steps=16", *changes)
    plan = planner.plan_recipe(settings, CARD, int(gib * GIB))
    fitting = [a for a in planner.alternatives(plan) if a.fits and a.change.startswith("memory.")]
    assert all(plan.chosen.step_seconds <= EQUALLY_FAST * a.step_seconds for a in fitting)
    alone = [a for a in fitting if " " not in a.change and a.step_seconds <= plan.chosen.step_seconds]
    assert not any(a.change.endswith(("=device", "offload_checkpoints=false", "resident_layers=all")) for a in alone)
    is_near = any(a.step_seconds < plan.chosen.step_seconds for a in fitting)
    assert is_near <= ("within 3 % of the fastest" in plan_text.reason(plan))


def test_other_micro_batches_are_shown_in_words_since_one_setting_alone_would_change_the_step(recipe, few_blocks):
    settings = recipe(few_blocks(), *SETTLED, "train.micro_batch_size=2", "train.gradient_accumulation_steps=3")
    plan = planner.plan_recipe(settings, CARD, 8 * GIB)
    changes = [a.change for a in planner.alternatives(plan)]
    shown = {c.packs: f"micro-batch size {c.packs}, micro-batches {6 // c.packs}" for c in plan.found}
    del shown[plan.chosen.packs]
    assert shown and {*shown.values()} <= {*changes} and not any("train.micro_batch" in change for change in changes)


def test_no_setting_that_fits_makes_a_faster_plan(recipe, few_blocks):
    def plan(gib, *overrides):
        settings = recipe(few_blocks(), "train.gradient_accumulation_steps=4", *overrides)
        return planner.plan_recipe(settings, CARD, int(gib * GIB))

    auto, tables = plan(1.1), ("memory.embeddings=host", "memory.head=host")
    chosen = auto.chosen
    assert (
        auto.fits and chosen.packs == 1 and chosen.options.host_embeddings and chosen.options.uncheckpointed_layers > 0
    )
    for overrides in ((), ("memory.offload_checkpoints=true",), ("memory.cache_dequantized=true",)):
        other = plan(1.1, *tables, *overrides)
        assert not other.fits or chosen.step_seconds <= EQUALLY_FAST * other.chosen.step_seconds, overrides
    assert planner.max_batch(auto) > 1  # with the memory that the chosen plan spends on blocks that are kept
    hosts = [replace(auto, machine=replace(CARD, host_bytes=int(gib * GIB))) for gib in (2.05, 2.1, 3)]
    found = [planner.max_batch(each) for each in hosts]
    assert found == sorted(found) and 0 < found[0] < found[-1]  # more memory of the host is never for fewer
    roomier = plan(1.6)
    assert roomier.chosen.options.checkpointing == "none" and roomier.chosen.options.host_embeddings


def test_no_job_is_simulated_twice_for_a_plan_and_its_alternatives(recipe, few_blocks, monkeypatch):
    asked = []
    monkeypatch.setattr("qlora_lite.planning.candidate.predict", lambda job: asked.append(repr(job)) or predict(job))
    settings = recipe(few_blocks(), "train.gradient_accumulation_steps=4")
    plan = planner.plan_recipe(settings, CARD, int(1.3 * GIB))
    list(planner.alternatives(plan))
    assert len(asked) == len({*asked}) > 10
    step, chosen = plan.step, plan.chosen
    shallow = replace(step, job=changed(step.job, config=shallow_config(step.job.workload.spec.config, 3)))
    smaller, same = (build_candidate(each, CARD, chosen.options, chosen.packs) for each in (shallow, step))
    assert smaller.peak_bytes < same.peak_bytes == chosen.peak_bytes


def test_where_more_packs_fit_than_anybody_asks_for_the_search_ends(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(planner, "most_packs", lambda *_: asked.append(1) or planner.MAX_PACKS)
    assert planner.max_batch(planner.plan_recipe(recipe(), CARD, 2**40)) == planner.MAX_PACKS and len(asked) == 1


def test_all_blocks_are_kept_only_with_what_was_set_and_within_the_room_for_it(recipe, few_blocks):
    for gib, settings in ((1.6, ()), (1.4, ("memory.cache_dequantized=true", "memory.tile_tokens=1024"))):
        chosen = planner.plan_recipe(recipe(few_blocks(), *settings), CARD, int(gib * GIB)).chosen
        assert chosen.options.cache_dequantized or not settings
        assert chosen.options.host_embeddings and chosen.peak_bytes <= 0.97 * gib * GIB


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("uncheckpointed_layers", 3),
        ("layers_per_checkpoint", 2),
        ("offload_checkpoints", "true"),
        ("cache_dequantized", "true"),
        ("resident_layers", 3),
    ],
)
def test_what_is_set_for_blocks_that_are_recomputed_has_them_recomputed(setting, value, recipe, few_blocks):
    plan = planner.plan_recipe(recipe(few_blocks(), f"memory.{setting}={value}"), CARD, 24 * GIB)
    assert plan.fits and str(plan.chosen.settings[f"memory.{setting}"]).lower() == str(value)
    assert plan.chosen.options.recomputes


@pytest.mark.parametrize(("model_type", "rows"), [("llama", 8), ("qwen3_5_text", 1)])
def test_of_a_pack_that_runs_row_by_row_one_row_is_assumed_where_no_data_is_known(tmp_path, recipe, model_type, rows):
    save_tiny(tmp_path / "model", model_type)
    fixed = recipe(f"model.path={tmp_path / 'model'}", "data.max_tokens=128", "data.eval=rows.jsonl", *SETTLED)
    step = planner.plan_recipe(fixed, CARD, 24 * GIB).step
    assert len(step.pack.lengths) == len(step.job.eval_shape.lengths) == rows
    assert step.pack.tokens == step.job.eval_shape.tokens == 128


def test_words_that_virtual_tokens_begin_with_need_no_tokenizer_in_a_plan(recipe, few_blocks):
    prompt = few_blocks(), "adapter.method=prompt", "train.learning_rate=0.02", *SETTLED
    plain, begun = (
        planner.plan_recipe(recipe(*prompt, *more), CARD, 8 * GIB) for more in ((), ("prompt.init_text=Some words",))
    )
    assert plain.fits and begun.chosen.settings == plain.chosen.settings


def test_prefix_tuning_of_a_model_that_runs_row_by_row_is_refused_by_the_plan(tmp_path, recipe):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64} | factors
    save_tiny(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=512)
    fixed = f"model.path={tmp_path / 'model'}", "adapter.method=prefix", "train.learning_rate=0.02", *SETTLED
    with pytest.raises(ModelError, match=r"runs row by row, .*; take adapter\.method prompt"):
        planner.plan_recipe(recipe(*fixed), CARD, 8 * GIB)


@pytest.mark.parametrize(("gpu", "capability"), [("t4", (7, 5)), ("rtx-4090", (8, 9))])
def test_a_step_is_planned_with_kernels_that_the_gpu_planned_for_can_have(gpu, capability, recipe):
    assert build_job(recipe(), machine_of_gpu(find_gpu(gpu)), None).capability == capability


def test_a_size_of_memory_is_planned_for_with_the_speed_of_a_gpu_that_computes_in_bfloat16(recipe):
    assert machine_for(recipe(), 12 * 10**9, None).dtype == torch.bfloat16  # nearest to it is an older one


def test_more_blocks_than_the_model_has_are_refused(recipe, few_blocks):
    recipe = partial(recipe, few_blocks())
    for name in ("uncheckpointed_layers", "resident_layers"):
        with pytest.raises(RecipeError, match=rf"^memory\.{name} = 5: the model has 4 blocks; write at most as many$"):
            planner.plan_recipe(recipe(f"memory.{name}=5"), CARD, 24 * GIB)
        planner.plan_recipe(recipe(f"memory.{name}=4"), CARD, 24 * GIB)


def test_the_fastest_settings_that_fit_are_chosen_and_the_effective_batch_is_kept(recipe, few_blocks):
    on_device = "memory.embeddings=device", "memory.resident_layers=all", "memory.offload_checkpoints=false"
    settings = recipe(few_blocks(), "train.gradient_accumulation_steps=4", *on_device)
    roomy, tight = (planner.plan_recipe(settings, CARD, int(gib * GIB)) for gib in (24, 1.55))
    assert roomy.fits and tight.fits
    assert roomy.chosen.options.checkpointing == "none" and tight.chosen.options.checkpointing == "block"
    assert roomy.chosen.step_seconds < tight.chosen.step_seconds
    for plan in (roomy, tight):
        assert plan.chosen.packs * plan.chosen.micro_batches == 4
        assert plan.peak_bytes <= plan.budget_bytes
    assert "would need" in plan_text.reason(tight)


def test_a_plan_is_described_in_lines_of_the_terminal_and_says_why_much_stays_free(recipe, few_blocks):
    def lines(plan, name):
        text = plan_text.describe(plan, []).split("\n")
        (start,) = [i for i, line in enumerate(text) if line.startswith(f"{name} ")] or (len(text),)
        assert all(len(line) <= 80 for line in text if line.startswith(("settings", "why", "headroom", " " * 17)))
        return "\n".join(text[start : start + 2])

    four = "train.gradient_accumulation_steps=4"
    tight = planner.plan_recipe(recipe(few_blocks(), four), CARD, int(1.1 * GIB))
    roomy = planner.plan_recipe(recipe(four), CARD, 40 * GIB)
    assert lines(tight, "settings") and lines(tight, "why") and not lines(tight, "headroom")
    fastest = min(roomy.found, key=lambda c: c.step_seconds)
    saved = f"saves {100 * (1 - fastest.step_seconds / roomy.chosen.step_seconds):.1f} %"
    no_room = replace(tight.chosen, step_seconds=0, host_limit_bytes=-1)
    budget = int(1.4 * roomy.peak_bytes)
    assert fastest.peak_bytes > budget
    for plan, why in (
        (roomy, f"the fastest plan that fits takes {format_bytes(fastest.peak_bytes)} and {saved}"),
        (replace(roomy, found=(roomy.chosen, no_room)), "faster plans need more host memory than there is"),
        (replace(roomy, budget_bytes=budget), "the next faster plan does not fit"),
        (
            replace(roomy, found=tuple(c for c in roomy.found if c.step_seconds >= roomy.chosen.step_seconds)),
            "no plan that uses more is faster",
        ),
        (
            planner.plan_recipe(recipe(few_blocks(), *EVERYTHING_SET), CARD, 24 * GIB),
            "the recipe leaves no memory option open",
        ),
    ):
        free = format_bytes(plan.budget_bytes - plan.peak_bytes)
        assert f"headroom {free}: {why}" in re.sub(r"\s+", " ", lines(plan, "headroom"))


def test_a_gpu_without_fast_bfloat16_is_planned_in_the_type_that_it_will_run_in(recipe, few_blocks):
    recipe = partial(recipe, few_blocks(), *SETTLED)
    older, old = (machine_of_gpu(find_gpu(name)) for name in ("p100", "tesla-t4"))
    plans = [planner.plan_recipe(recipe(), card, 24 * GIB) for card in (older, old, CARD)]
    assert [plan.step.job.workload.spec.compute_dtype for plan in plans] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
    for card in (older, old):
        with pytest.raises(ModelError, match="compute_dtype bfloat16 is for training on GPUs"):
            planner.plan_recipe(recipe("model.compute_dtype=bfloat16"), card, 24 * GIB)
    sizes = [plan.chosen.prediction.simulation.resident.total for plan in plans]
    assert sizes[0] > sizes[1] == sizes[2]
    whole = ["train.max_grad_norm=0", "train.gradient_accumulation_steps=1", "memory.optimizer_in_backward=true"]
    with pytest.raises(ModelError, match="optimizer_in_backward: in float16 an overflow is seen too late"):
        planner.plan_recipe(recipe(*whole), old, 24 * GIB)
    assert planner.plan_recipe(recipe(*whole, "model.compute_dtype=float32"), old, 24 * GIB).fits


def test_a_model_beyond_float16_is_planned_in_float32_at_that_type_s_rate(recipe, few_blocks):
    old, gemma = machine_of_gpu(find_gpu("tesla-t4")), few_blocks("gemma-3-1b-it", "google")
    plan = planner.plan_recipe(recipe(gemma, *SETTLED), old, 24 * GIB)
    assert plan.step.job.workload.spec.compute_dtype == torch.float32
    assert (
        plan.machine.flops_per_second == old.float32_flops_per_second == pytest.approx(old.flops_per_second / 8, 0.01)
    )
    asked = planner.plan_recipe(recipe(gemma, *SETTLED, "model.compute_dtype=float16"), old, 24 * GIB)
    assert (
        asked.step.job.workload.spec.compute_dtype == torch.float16
        and asked.machine.flops_per_second == old.flops_per_second
    )
    said = [re.findall("^compute type +(.*)$", plan_text.describe(of, []), re.MULTILINE) for of in (plan, asked)]
    assert said == [["float32: gemma3_text exceeds float16"], ["float16"]]
    assert [plan_text.as_json(of, [])["compute_dtype"] for of in (plan, asked)] == ["float32", "float16"]


def test_what_the_recipe_fixes_is_kept(recipe):
    plan = planner.plan_recipe(recipe(*EVERYTHING_SET), CARD, 24 * GIB)
    assert plan.chosen.settings == {
        "memory.checkpointing": "block",
        "memory.uncheckpointed_layers": 1,
        "memory.layers_per_checkpoint": 1,
        "memory.loss_chunk_tokens": 100,
        "memory.tile_tokens": 64,
        "memory.embeddings": "device",
        "memory.head": "device",
        "memory.offload_checkpoints": True,
        "memory.resident_layers": "all",
        "memory.cache_dequantized": True,
        "memory.stream_from": "host",
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
    }
    assert plan_text.reason(plan).endswith("as the recipe says")
    assert "block inputs in host memory" in plan_text.reason(plan)


def test_every_memory_option_of_the_recipe_is_named_and_none_that_does_nothing(recipe, few_blocks):
    def reason(*settings):
        return plan_text.reason(planner.plan_recipe(recipe(few_blocks(), *settings), CARD, 24 * GIB))

    once = reason("memory.optimizer_in_backward=true", "train.max_grad_norm=0", "train.compile=true")
    assert "weights updated in backward" in once and "blocks compiled" in once
    plain = reason("memory.checkpointing=none", "memory.cache_dequantized=true", "memory.tile_tokens=auto")
    assert not any(words in plain for words in ("dequantised once", "in backward", "compiled"))
    tiled = reason("memory.checkpointing=none", "memory.cache_dequantized=true", "memory.tile_tokens=64")
    assert "dequantised once" in tiled


def test_where_the_host_is_slower_than_the_gpu_more_packs_go_through_at_once_and_it_is_told(recipe):
    settings, words = ("train.gradient_accumulation_steps=8",), "limited by the host, which launches"
    slow, fast = (
        planner.plan_recipe(recipe(*settings), replace(CARD, flops_per_second=rate, bytes_per_second=rate), 24 * GIB)
        for rate in (1e13, 1e16)
    )
    assert words in plan_text.describe(fast, []) and words not in plan_text.describe(slow, [])
    streamed = planner.plan_recipe(recipe(*settings, "memory.resident_layers=0"), fast.machine, 24 * GIB)
    work = streamed.chosen.prediction.simulation.work
    for share, hidden in ((0.9, "hidden behind "), (1.1, "longer than ")):
        bus = work.bus_bytes / (share * fast.machine.starting_seconds(work))
        said = plan_text.transfers(replace(streamed, machine=replace(fast.machine, bus_bytes_per_second=bus)))
        assert hidden in said and "of launching operations" in said
    assert fast.chosen.packs > slow.chosen.packs


def test_the_time_of_transfers_is_told_beside_that_of_computing(recipe):
    streamed = "memory.resident_layers=0", "memory.offload_checkpoints=false", "data.max_tokens=512"
    for bus, words in ((1e9, "longer than "), (1e12, "hidden behind ")):
        machine = replace(CARD, bus_bytes_per_second=bus)
        plan = planner.plan_recipe(recipe(*streamed), machine, 24 * GIB)
        work, chosen = plan.chosen.prediction.simulation.work, plan.chosen
        seconds = chosen.micro_batches * work.bus_bytes / bus
        said = f"{format_seconds(seconds)} of copies between host and GPU, {words}"
        assert plan_text.as_json(plan, [])["transfers"].startswith(said) and said in plan_text.describe(plan, [])
        update = work.update_bytes / machine.bytes_per_second
        assert (chosen.step_seconds == pytest.approx(seconds + update)) == (words == "longer than ")
    resident = planner.plan_recipe(recipe(), CARD, 24 * GIB)
    assert plan_text.transfers(resident) is None and "transfers" not in plan_text.describe(resident, [])


def test_weights_are_unpacked_once_for_a_backward_where_that_is_faster_by_more_than_estimates_tell(recipe, few_blocks):
    """Short rows: dequantisation is a large part of a step. Long rows: it is not, and its memory keeps blocks
    instead."""
    block, keeps_none = (few_blocks(), "memory.checkpointing=block"), "memory.uncheckpointed_layers=0"
    short = planner.plan_recipe(recipe(*block, keeps_none, "data.max_tokens=256"), CARD, 8 * GIB)
    long = planner.plan_recipe(recipe(*block, keeps_none, "data.max_tokens=4096"), CARD, 8 * GIB)
    assert short.chosen.options.cache_dequantized and not long.chosen.options.cache_dequantized
    assert "weights dequantised once" in plan_text.reason(short)
    (without,) = (c for c in short.found if not c.options.cache_dequantized)
    assert EQUALLY_FAST * short.chosen.step_seconds < without.step_seconds
    assert short.chosen.peak_bytes > without.peak_bytes
    changes = {a.change: a for a in planner.alternatives(long)}
    other = changes["memory.cache_dequantized=true"]
    assert other.step_seconds < long.chosen.step_seconds and other.peak_bytes > long.peak_bytes
    fixed = planner.plan_recipe(recipe(*block, "data.max_tokens=256", "memory.cache_dequantized=false"), CARD, 8 * GIB)
    assert not any(c.options.cache_dequantized for c in fixed.found)
    assert not any("cache_dequantized" in a.change for a in planner.alternatives(fixed))
    tight = planner.plan_recipe(recipe(*block, keeps_none, "data.max_tokens=256"), CARD, without.peak_bytes + 2**20)
    assert tight.fits and not tight.chosen.options.cache_dequantized


def test_merged_weights_are_kept_for_a_step_where_there_is_room_for_their_codes(recipe, few_blocks):
    aware = few_blocks(), "train.merge_aware=nf4", "train.gradient_accumulation_steps=4", *SETTLED
    kept = planner.plan_recipe(recipe(*aware), CARD, 8 * GIB)
    assert kept.chosen.settings["memory.cache_merged"] is True and "merged once a step" in plan_text.reason(kept)
    changes = {a.change: a for a in planner.alternatives(kept)}
    anew = changes["memory.cache_merged=false"]
    assert anew.step_seconds > 1.2 * kept.chosen.step_seconds and anew.peak_bytes < kept.peak_bytes
    between, on_device = (anew.peak_bytes + kept.peak_bytes) // 2, "memory.embeddings=device"
    tight = planner.plan_recipe(recipe(*aware, on_device), CARD, between)
    assert tight.fits and not tight.chosen.options.cache_merged
    streamed = planner.plan_recipe(recipe(*aware, "memory.resident_layers=1"), CARD, 8 * GIB)
    assert streamed.fits and not any(c.options.cache_merged for c in streamed.found)
    fixed = planner.plan_recipe(recipe(*aware, "memory.cache_merged=true"), CARD, tight.chosen.peak_bytes // 2)
    assert all(c.options.cache_merged and c.options.resident_layers is None for c in fixed.found)
    plain = planner.plan_recipe(recipe(few_blocks(), *SETTLED, "memory.cache_merged=true"), CARD, 8 * GIB)
    assert "memory.cache_merged" not in plain.chosen.settings and not plain.chosen.options.cache_merged


@pytest.mark.parametrize(
    ("model_type", "to", "text"),
    [
        ("qwen3_moe", "nf4", "transformers does not load experts in 4 bit"),
        ("falcon", "nf4", "does not load 4-bit weights into layers of class FalconLinear"),
        ("gpt2", "q4_0", "family gpt2 are not exported to GGUF"),
    ],
)
def test_no_run_trains_merged_weights_that_merging_cannot_write(model_type, to, text, tmp_path):
    save_tiny(tmp_path / "model", model_type)
    settings = load_recipe(write_recipe(tmp_path, tmp_path / "model"), [f"train.merge_aware={to}"])
    with pytest.raises(ModelError, match=f"train.merge_aware {to}: .*{text}.*set it to off"):
        planner.plan_recipe(settings, CARD, 8 * GIB)


def test_attention_is_kept_on_a_gpu_where_rows_are_long_enough_to_show_it_and_memory_is_left(recipe, few_blocks):
    recipe, long = partial(recipe, few_blocks(), *SETTLED[1:]), "data.max_tokens=32768"
    on_device = "memory.offload_checkpoints=false"
    roomy = planner.plan_recipe(recipe(long, on_device), CARD, 8 * GIB)
    assert roomy.chosen.options.checkpointing == "selective"
    assert "checkpointing selective" in plan_text.reason(roomy)
    (block,) = (
        c
        for c in roomy.found
        if c.options.checkpointing == "block" and c.options == replace(roomy.chosen.options, checkpointing="block")
    )
    assert EQUALLY_FAST * roomy.chosen.step_seconds < block.step_seconds
    # of 3 blocks, beside the one that runs and has it either way: a hidden state in bf16, a float for each of 32 heads
    kept = 32768 * (2 * 2048 + 4 * 32) * 3
    assert roomy.chosen.peak_bytes - block.peak_bytes == pytest.approx(kept, rel=0.1)
    changes = {a.change: a for a in planner.alternatives(roomy)}
    assert changes["memory.checkpointing=block"].step_seconds == block.step_seconds
    tight = planner.plan_recipe(recipe(long, on_device), CARD, block.peak_bytes + 2**20)
    frees = tight.chosen.options.tile_tokens is not None or tight.chosen.options.host_embeddings
    assert tight.fits and (tight.chosen.options.checkpointing == "block" or frees)
    assert tight.chosen.step_seconds <= EQUALLY_FAST * block.step_seconds
    fixed = planner.plan_recipe(recipe(long, "memory.checkpointing=block"), CARD, 8 * GIB)
    assert not any(c.options.checkpointing == "selective" for c in fixed.found)
    short = planner.plan_recipe(recipe("data.max_tokens=1024"), CARD, int(1.1 * GIB))
    assert short.chosen.options.checkpointing == "block"


def test_attention_is_kept_on_the_host_where_the_device_has_no_room_and_the_host_has(recipe):
    settings = recipe("data.max_tokens=32768", "memory.tile_tokens=4096", "memory.embeddings=device")
    block = planner.plan_recipe(settings, replace(CARD, host_bytes=GIB), 6 * GIB).chosen
    assert block.options.checkpointing == "block" and not block.options.offload_checkpoints
    chosen = planner.plan_recipe(settings, CARD, 6 * GIB).chosen
    assert chosen.options == replace(block.options, checkpointing="selective", offload_checkpoints=True)
    assert chosen.prediction.simulation.offloaded_bytes > GIB


@pytest.mark.parametrize(("model", "moved"), [("Llama-3.1-8B", {"head"}), ("Llama-3.2-1B", {"embeddings", "head"})])
@pytest.mark.slow
def test_the_head_goes_to_the_host_before_the_blocks_with_the_embeddings_if_they_are_the_same(
    recipe, few_blocks, model, moved
):
    recipe, here, long = partial(recipe, *SETTLED), few_blocks(model), "data.max_tokens=16384"
    without = planner.plan_recipe(recipe(here, long, "memory.head=device", "memory.resident_layers=all"), CARD, GIB)
    assert not without.fits and not any(candidate.options.host_head for candidate in without.found)
    budget = without.peak_bytes - 100 * 2**20
    plan = planner.plan_recipe(recipe(here, long), CARD, budget)
    assert plan.fits and plan.chosen.options.host_head and plan.chosen.options.host_embeddings
    assert plan.chosen.options.resident_layers is None
    assert "head in host memory" in plan_text.reason(plan)
    changes = [set(alternative.change.split()) for alternative in planner.alternatives(plan)]
    assert {f"memory.{name}=device" for name in moved} in changes
    kept = planner.plan_recipe(recipe(here, long, "memory.embeddings=device"), CARD, budget)
    assert any(candidate.options.host_head for candidate in kept.found) is (moved == {"head"})


def test_a_host_budget_never_makes_the_host_larger_than_it_is(recipe, few_blocks, caplog):
    for there, given in ((3 * GIB, 3 * GIB), (None, 200 * GIB)):
        settings = recipe(few_blocks(), *SETTLED, "memory.host_budget=200GiB")
        plan = planner.plan_recipe(settings, replace(CARD, host_bytes=there), 8 * GIB)
        assert plan.machine.host_bytes == given
    assert caplog.messages == ["memory.host_budget: 200.0 GiB is more than the host has, 3.0 GiB; that is the budget"]


@pytest.mark.slow
def test_what_the_host_has_no_room_for_stays_on_the_gpu_or_does_not_fit(recipe, few_blocks):
    recipe, long = partial(recipe, few_blocks(), *SETTLED), "data.max_tokens=32768"
    host, tight = "memory.host_budget={}GiB".format, int(2.45 * GIB)
    free = planner.plan_recipe(recipe(long), CARD, tight)
    assert free.fits and free.chosen.options.offload_checkpoints
    needed = free.chosen.prediction.host_bytes
    assert needed == planner.host_bytes(free) > 2.4 * GIB

    enough = planner.plan_recipe(recipe(long, host(3)), CARD, tight)
    assert enough.chosen.settings == free.chosen.settings
    assert "of 3.0 GiB" in plan_text.describe(enough, [])
    little = planner.plan_recipe(recipe(long, host(2.2)), CARD, tight)
    assert not little.fits and little.chosen.fits_host and not little.chosen.options.offload_checkpoints
    said = str(planner.does_not_fit(little, []))
    assert "too much" in said and "memory.offload_checkpoints=true" in said
    assert "2.5 GiB of host memory where 2.2 GiB may be used: raise memory.host_budget, or name a disk" in said
    roomy = planner.plan_recipe(recipe(long, host(2.2)), CARD, 6 * GIB)
    assert roomy.fits and roomy.chosen.fits_host

    offloading = "memory.offload_checkpoints=true", "memory.layers_per_checkpoint=1"
    fixed = planner.plan_recipe(recipe(long, host(1.9), *offloading), CARD, 8 * GIB)
    assert not fixed.fits and fixed.peak_bytes <= fixed.budget_bytes
    assert "GiB of host memory where 1.9 GiB may be used beside RTX 4060" in str(planner.does_not_fit(fixed, []))
    assert "does not fit[/] in host memory" in plan_text.describe(fixed, [])
    only = replace(fixed, found=(fixed.chosen,))  # as of a resumed run, whose plan is given
    assert "may be used beside RTX 4060; free host memory, or raise memory.host_budget" in str(
        planner.does_not_fit(only, [])
    )


@pytest.mark.slow
def test_fewer_block_inputs_are_kept_where_nothing_else_makes_room_for_them(recipe, few_blocks):
    recipe, long = partial(recipe, *SETTLED), "data.max_tokens=32768"
    offloading = "memory.offload_checkpoints=true", "memory.host_budget=1.9GiB"
    for_host = planner.plan_recipe(recipe(few_blocks(), long, *offloading), CARD, 8 * GIB)
    assert (
        for_host.fits
        and for_host.chosen.options.layers_per_checkpoint > 1
        and for_host.chosen.options.offload_checkpoints
    )
    assert f"{for_host.chosen.options.layers_per_checkpoint} layers per checkpoint" in plan_text.reason(for_host)

    here = long, "memory.offload_checkpoints=false", "memory.resident_layers=all"
    each = planner.plan_recipe(recipe(*here, "memory.layers_per_checkpoint=1"), CARD, GIB)
    budget = each.peak_bytes - 50 * 2**20
    for_device = planner.plan_recipe(recipe(*here), CARD, budget)
    assert not each.fits and for_device.fits and for_device.chosen.options.layers_per_checkpoint == 2
    assert planner.max_tokens(for_device) >= 32768
    streamed = planner.plan_recipe(recipe(few_blocks(), long, "memory.layers_per_checkpoint=2"), CARD, GIB)
    assert not streamed.fits and all(c.options.resident_layers is None for c in streamed.found)


@pytest.mark.slow
def test_as_many_blocks_stay_on_the_gpu_as_it_has_room_for_where_the_host_has_none_for_all(recipe):
    big = *SETTLED, "model.path=meta-llama/Llama-3.1-8B", "memory.embeddings=device", "memory.head=device"
    free = planner.plan_recipe(recipe(*big, "memory.resident_layers=0"), CARD, 5 * GIB)
    needed = free.chosen.prediction.host_bytes / GIB
    plan = planner.plan_recipe(recipe(*big, f"memory.host_budget={needed - 1:.2f}GiB"), CARD, 5 * GIB)
    assert plan.fits and plan.chosen.prediction.host_bytes <= (needed - 1) * GIB
    assert 0 < plan.chosen.options.resident_layers < 32


def test_weights_come_from_the_disk_where_the_host_has_room_for_no_other_plan(recipe, few_blocks):
    tables = "memory.embeddings=device", "memory.head=device"
    big = *SETTLED, *tables, few_blocks("Llama-3.1-8B"), "data.max_tokens=2048"
    budget = planner.plan_recipe(recipe(*big, "memory.resident_layers=all"), CARD, GIB).peak_bytes - 100 * 2**20
    free = planner.plan_recipe(recipe(*big), CARD, budget)
    assert free.chosen.options.resident_layers is not None and not free.chosen.options.weights_on_disk
    assert "from the disk" not in plan_text.transfers(free)
    room = free.chosen.prediction.host_bytes / GIB - 0.2
    small = [f"memory.host_budget={room:.2f}GiB"]
    plan = planner.plan_recipe(recipe(*big, *small), CARD, budget)
    work, host = plan.chosen.prediction.simulation.work, plan.chosen.prediction.host_bytes
    assert plan.fits and plan.chosen.options.weights_on_disk and host <= room * GIB
    seconds = plan.chosen.micro_batches * work.disk_bytes / DISK_BYTES_PER_SECOND
    assert plan.chosen.step_seconds >= seconds > 0
    said = plan_text.describe(plan, [])
    assert "weights streamed from disk" in said
    assert (
        f"{format_bytes(plan.chosen.micro_batches * work.disk_bytes)} read from disk, {format_seconds(seconds)} at"
        in said
    )
    assert planner.disk_bytes(plan) - planner.disk_bytes(free) == plan.chosen.prediction.simulation.frozen_bytes
    assert len({(c.options, c.packs) for c in plan.found}) == len(plan.found)
    whole = planner.plan_recipe(recipe("memory.stream_from=disk"), CARD, 8 * GIB)
    assert whole.chosen.settings["memory.resident_layers"] == "all"
    assert whole.chosen.settings["memory.stream_from"] == "host", "nothing is streamed"
    for each in (plan, whole):
        assert all((c.options.stream_from == "disk") == c.options.weights_on_disk for c in each.found)
    refused = planner.plan_recipe(recipe(*big, *small, "memory.stream_from=host"), CARD, budget)
    assert not refused.fits
    assert "set memory.stream_from to auto" in str(planner.does_not_fit(refused, []))


def test_where_weights_are_streamed_the_last_blocks_stay_and_keep_all_if_that_is_faster(recipe):
    settled = (
        "memory.checkpointing=block",
        "memory.cache_dequantized=false",
        "memory.tile_tokens=off",
        "memory.offload_checkpoints=true",
        "memory.embeddings=host",
        "memory.head=host",
    )
    big = recipe("model.path=meta-llama/Llama-3.1-8B", "data.max_tokens=512", *settled)
    plan = planner.plan_recipe(big, CARD, 4 * GIB)
    options = plan.chosen.options
    assert plan.fits and 2 <= options.uncheckpointed_layers == options.resident_layers < 32
    streaming_all = replace(options, uncheckpointed_layers=0, resident_layers=0)
    slower = build_candidate(plan.step, plan.machine, streaming_all, plan.chosen.packs)
    assert plan.chosen.step_seconds * EQUALLY_FAST < slower.step_seconds
    one_more = replace(
        options,
        uncheckpointed_layers=options.uncheckpointed_layers + 2,
        resident_layers=options.uncheckpointed_layers + 2,
    )
    assert build_candidate(plan.step, plan.machine, one_more, plan.chosen.packs).peak_bytes > 0.97 * plan.limit_bytes


def test_checkpoints_on_a_disk_need_its_room_and_not_the_host_s(recipe, tmp_path):
    offloading = (
        "memory.checkpointing=block",
        "memory.uncheckpointed_layers=0",
        "memory.offload_checkpoints=true",
        "data.max_tokens=8192",
    )
    in_memory, on_disk = (
        planner.plan_recipe(recipe(*offloading, *more), CARD, 8 * GIB)
        for more in ([], [f"memory.offload_folder={tmp_path}"])
    )
    checkpoints = 16 * 8192 * 2048 * 2  # blocks, tokens, hidden size, bfloat16
    assert in_memory.chosen.prediction.host_bytes - on_disk.chosen.prediction.host_bytes == checkpoints
    assert planner.disk_bytes(on_disk) == planner.disk_bytes(in_memory)
    assert plan_text.as_json(on_disk, [])["offload_folder_bytes"] == checkpoints
    assert on_disk.peak_bytes == in_memory.peak_bytes
    said = plan_text.describe(on_disk, [])
    assert "block inputs on disk" in said and "offload folder   512.0 MiB" in said
    assert "offload folder" not in plan_text.describe(in_memory, [])


def test_a_disk_is_for_what_fits_in_no_other_way(recipe, few_blocks, tmp_path):
    recipe = partial(recipe, few_blocks(), "data.max_tokens=32768", "memory.cache_dequantized=false")
    folder = f"memory.offload_folder={tmp_path}"
    in_memory = planner.plan_recipe(recipe(), CARD, 3 * GIB)  # as fast, or faster
    assert in_memory.chosen.options.offload_checkpoints
    without = planner.plan_recipe(recipe("memory.offload_checkpoints=false"), CARD, 3 * GIB)
    assert planner.plan_recipe(recipe(folder), CARD, 3 * GIB).chosen.settings == without.chosen.settings
    for gib in (2.3, 2.4):
        tight = planner.plan_recipe(recipe(folder), CARD, int(gib * GIB))
        assert tight.fits and tight.chosen.options.uses_disk and tight.chosen.options.checkpointing == "block"


def test_a_disk_is_named_as_the_cure_only_where_it_is_one(recipe, few_blocks):
    block = *SETTLED, few_blocks(), "data.max_tokens=4096", "memory.layers_per_checkpoint=1"
    offloading = *block, "memory.offload_checkpoints=true", "memory.host_budget=1.55GiB"
    for embeddings, helps in (("device", True), ("host", False)):
        plan = planner.plan_recipe(recipe(*offloading, f"memory.embeddings={embeddings}"), CARD, 8 * GIB)
        assert not plan.fits
        assert ("name a disk in memory.offload_folder" in str(planner.does_not_fit(plan, []))) == helps


@pytest.mark.slow
def test_a_cpu_that_is_short_of_memory_puts_checkpoints_on_a_disk_if_one_is_named(recipe, few_blocks, tmp_path):
    def plan(gib, *more):
        cpu = Machine("a CPU", "cpu", gib * GIB, 0, 1e11, 1e10, 1e10)
        settings = recipe(few_blocks(), *SETTLED, "data.max_tokens=2048", *more)
        return planner.plan_recipe(settings, cpu, gib * GIB)

    folder = f"memory.offload_folder={tmp_path}"
    assert not plan(8, folder).chosen.options.offload_checkpoints
    enough = plan(0.5, folder).peak_bytes / GIB  # of what needs least
    assert plan(enough, folder).fits and plan(enough, folder).chosen.options.offload_checkpoints
    assert not plan(enough).fits


@pytest.mark.parametrize(
    ("model", "place", "warned"),
    [
        ("Llama-3.2-1B", "device", True),
        ("Llama-3.2-1B", "host", False),
        ("Llama-3.1-8B", "device", False),
    ],
)
def test_a_four_bit_head_that_spares_nothing_is_warned_of(recipe, few_blocks, caplog, model, place, warned):
    recipe = partial(recipe, few_blocks(model), *SETTLED)
    head = planner.plan_recipe(recipe(f"memory.embeddings={place}", "model.quant_head=true"), CARD, 24 * GIB)
    assert ("the 4-bit copy takes memory and saves none" in caplog.text) == warned
    without = planner.plan_recipe(recipe("memory.embeddings=device", "memory.head=device"), CARD, 24 * GIB)
    frozen = [plan.chosen.prediction.simulation.resident.total for plan in (head, without)]
    assert (frozen[0] > frozen[1]) == warned


@pytest.mark.parametrize(("settings", "adapters"), [((), 1), (("data.eval=rows.jsonl",), 2)])
def test_on_a_cpu_a_checkpoint_s_copy_and_later_kernels_are_part_of_the_plan_and_of_no_memory_probe(
    recipe, few_blocks, settings, adapters
):
    recipe = partial(recipe, few_blocks())
    cpu = Machine("a CPU", "cpu", 24 * GIB, 300 * 2**20, 1e11, 1e10, 1e10)
    for where, counted in ((cpu, 1), (CARD, 0)):
        plan = planner.plan_recipe(recipe("lora.rank=64", *settings), where, 24 * GIB)
        prediction = plan.chosen.prediction
        beside = sum(constant["bytes"] for constant in plan_text.constants(plan))
        assert beside + prediction.simulation.peak().total == plan.peak_bytes
        held = prediction.simulation.resident.breakdown
        found = {overhead.name: overhead.bytes for overhead in prediction.overheads}
        copied = adapters * held["adapter"] + held["optimizer"]
        assert found.get("checkpoint", 0) == counted * copied and ("later kernels" in found) == counted
        kernels = found.get("matrix kernels", 0) + found.get("later kernels", 0)
        assert kernels == counted * KERNELS_KEPT * CPU_KERNEL_BYTES
        assert prediction.later_bytes == counted * (copied + found.get("later kernels", 0))
        assert planner.expected_peak(plan, collate(examples(1)), None).later_bytes == 0


@pytest.mark.parametrize(("tokens", "warned"), [(8192, False), (8256, True)])
def test_rows_longer_than_the_model_was_made_for_are_warned_of(recipe, few_blocks, caplog, tokens, warned):
    settings = recipe(few_blocks("Meta-Llama-3-8B"), f"data.max_tokens={tokens}", *SETTLED)
    plan = planner.plan_recipe(settings, CARD, 8 * GIB)
    assert ("a row of 8,256 tokens is longer than the 8,192 that the model was made for" in caplog.text) == warned
    longest = planner.max_tokens(plan)
    assert f"a row of {longest:,} tokens is longer than the 8,192" in caplog.text


def test_the_largest_pack_is_looked_for_among_all_packs_of_the_steps(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def seen(_recipe, _machine, _budget, rows, *_others):
        raise Seen(rows)

    save_tiny(tmp_path / "model")
    written = write_recipe(
        tmp_path,
        tmp_path / "model",
        data={"packing": False, "order": "as-is"},
        train={"max_steps": 1, "gradient_accumulation_steps": 6, "micro_batch_size": 2},
    )
    rows = sorted(examples(12), key=lambda row: len(row.token_ids))
    monkeypatch.setattr(ranks, "plan_recipe", seen)
    with pytest.raises(Seen) as caught:
        ranks.plan_run(load_recipe(written), rows, ())
    assert caught.value.args[0].lengths == (max(row_lengths(rows)),)


@pytest.mark.parametrize(("method", "trains_parts"), [("full", True), ("lora", False)])
def test_ranks_are_connected_before_free_memory_is_read(method, trains_parts, recipe, monkeypatch):
    class Read(Exception):
        pass

    class Connected(Processes):
        def connect(self, device, trains_parts):
            done.append(trains_parts)

    def read(*_arguments):
        raise Read

    done = []
    monkeypatch.setattr(ranks, "this_machine", read)
    with pytest.raises(Read):
        ranks.plan_run(recipe(f"adapter.method={method}", "model.quant=none"), (), (), processes=Connected())
    assert done == [trains_parts]


def test_on_a_cpu_the_host_s_memory_is_the_device_s(recipe):
    cpu = Machine("a CPU", "cpu", 64 * GIB, 0, 1e11, 1e10, 1e10)
    on_device, on_host = (
        planner.plan_recipe(recipe(*SETTLED, f"memory.head={where}"), cpu, 64 * GIB).peak_bytes
        for where in ("device", "host")
    )
    assert on_device <= on_host < 1.05 * on_device


def test_a_head_in_four_bits_is_never_planned_for_the_host(recipe, few_blocks):
    big = few_blocks("Llama-3.1-8B"), "model.quant_head=true"
    plan = planner.plan_recipe(recipe(*big, *SETTLED), CARD, GIB // 2)
    assert not plan.fits and any(candidate.options.host_embeddings for candidate in plan.found)
    assert not any(candidate.options.host_head for candidate in plan.found)
    assert not any("memory.head" in alternative.change for alternative in planner.alternatives(plan))


@pytest.mark.parametrize("budget", [24, 4, 2.2])
def test_a_plan_for_compiled_blocks_leaves_out_what_they_do_not_go_with(recipe, few_blocks, budget):
    recipe, long = partial(recipe, few_blocks()), "data.max_tokens=16384"
    plan = planner.plan_recipe(recipe("train.compile=true", long), replace(CARD, host_bytes=64 * GIB), budget * GIB)
    for candidate in plan.found:
        x = candidate.options
        assert x.compile and x.tile_tokens is None and x.resident_layers is None
        assert x.checkpointing in ("block", "none")
    assert {a.change for a in planner.alternatives(plan)}  # which are simulated like all others
    without = recipe(long, "memory.tile_tokens=off", "memory.resident_layers=all")
    plain = planner.plan_recipe(without, CARD, budget * GIB - CUDA_COMPILER_BYTES)
    for compiled in plan.found:
        options = replace(compiled.options, compile=False, kernels="plain")  # of which a compiler makes its own
        same = build_candidate(plain.step, CARD, options, compiled.packs)
        assert compiled.peak_bytes == same.peak_bytes + CUDA_COMPILER_BYTES


def test_a_recipe_may_keep_attention_and_the_last_blocks(recipe):
    attention = "memory.checkpointing=selective", "memory.cache_dequantized=false", "memory.tile_tokens=off"
    settings = recipe(*attention, "data.max_tokens=1024", "memory.offload_checkpoints=false")
    plan = planner.plan_recipe(settings, CARD, 3 * GIB)
    assert plan.fits and plan.chosen.options.checkpointing == "selective" and plan.chosen.options.uncheckpointed_layers
    assert f"selective except for the last {plan.chosen.options.uncheckpointed_layers} layers" in plan_text.reason(plan)


def test_the_parts_add_up_to_the_peak_and_the_json_has_the_agreed_keys(recipe, few_blocks):
    streamed = planner.plan_recipe(recipe("data.max_tokens=32768", *SETTLED), CARD, 2.5 * GIB)
    assert streamed.chosen.prediction.simulation.offloaded_bytes > GIB
    assert sum(streamed.breakdown.values()) == streamed.peak_bytes <= streamed.budget_bytes
    page = plan_text.page_record(streamed, [], "a plan")
    assert "Host memory: " in page["sentences"][1]
    for moment in page["timeline"]:
        assert sum(moment["bytes"].values()) <= page["peak"]["bytes"] == sum(page["peak"]["breakdown"].values())
    plan = planner.plan_recipe(recipe(few_blocks()), CARD, 8 * GIB)
    values = plan_text.as_json(plan, list(planner.alternatives(plan)))
    assert set(values) >= {
        "fits",
        "budget_bytes",
        "peak_bytes",
        "peak_phase",
        "peak_module",
        "breakdown",
        "host_bytes",
        "disk_bytes",
        "offload_folder_bytes",
        "step_seconds_estimate",
        "chosen",
        "alternatives",
    }
    assert sum(values["breakdown"].values()) == values["peak_bytes"]
    changes = {a["change"].partition("=")[0] for a in values["alternatives"]}
    assert {"memory.checkpointing", "memory.loss_chunk_tokens", "train.optimizer", "data.max_tokens"} <= changes
    assert json.loads(json.dumps(values)) == values


def test_max_tokens_is_the_longest_that_fits(recipe, few_blocks):
    recipe, budget = partial(recipe, few_blocks(), *SETTLED), int(1.5 * GIB)
    plan = planner.plan_recipe(recipe(), CARD, budget)
    longest = planner.max_tokens(plan)
    for tokens, fits in ((longest, True), (longest + 64, False)):
        settings = recipe("memory.loss_chunk_tokens=1024", f"data.max_tokens={tokens}")
        again = planner.plan_recipe(settings, CARD, budget)
        assert again.fits is fits


@pytest.mark.parametrize("steps_of", [1, 1000, 10**8])  # memory may be taken in steps
@pytest.mark.parametrize("limit", [11, 999, 12345, 10**9])
def test_the_largest_number_under_a_limit_is_found_with_few_tries(limit, steps_of):
    tried = []

    def missing(n):
        tried.append(n)
        return (3 * n + n * n // 1000) // steps_of * steps_of - limit

    found = largest_of(missing, missing(1), 5, 10**6)
    assert len(tried) < 40
    assert missing(found) <= 0
    assert found == 10**6 or missing(found + 1) > 0


@pytest.mark.parametrize("start", [8, 1000])
@pytest.mark.parametrize("limit", [25_000, 2_600_000, 20_000_000])
def test_on_a_slight_curve_the_largest_number_is_found_with_a_few_tries(start, limit):
    tried = []

    def missing(n):
        tried.append(n)
        return 1000 * n + n * n // 100 - limit

    found = largest_of(missing, missing(1), start, 2**15)
    assert len(tried) <= 10 and missing(found) <= 0 < missing(found + 1)


@pytest.mark.parametrize(
    ("optimizer", "other"),
    [
        ("paged_adamw_8bit", "adamw_32bit"),
        ("adamw_32bit", "adamw_8bit"),
        ("paged_lion_8bit", "lion_32bit"),
        ("lion_32bit", "lion_8bit"),
        ("adamw_torch", "adamw_8bit"),
    ],
)
def test_the_optimizer_that_is_offered_is_of_the_same_family(recipe, few_blocks, optimizer, other):
    plan = planner.plan_recipe(recipe(few_blocks(), f"train.optimizer={optimizer}"), CARD, 24 * GIB)
    assert [a.change for a in planner.alternatives(plan) if "optimizer" in a.change] == [f"train.optimizer={other}"]


def test_what_does_not_fit_is_told_with_the_parts_and_the_smallest_change(recipe):
    keeps_all = recipe("memory.checkpointing=none", "memory.tile_tokens=off", "memory.head=device")
    budget = 5 * GIB // 2
    plan = planner.plan_recipe(keeps_all, CARD, budget)
    assert not plan.fits and plan_text.reason(plan).endswith(f"the smallest of {len(plan.found)} plans tried")
    error = planner.does_not_fit(plan, list(planner.alternatives(plan)))
    assert error.exit_code == 3
    assert "saved activations" in str(error) and "data.overflow says what to do with them" in str(error)
    longest = int(re.search(r"data\.max_tokens=(\d+) fits", str(error))[1])
    settings = ("memory.checkpointing=none", "memory.tile_tokens=off", "memory.head=device")
    for tokens, fits in ((longest, True), (longest + LENGTH_STEP, False)):
        assert planner.plan_recipe(recipe(*settings, f"data.max_tokens={tokens}"), CARD, budget).fits is fits
    for budget_bytes, cure in ((GIB // 2, "beside tensors takes"), (int(0.68 * GIB), "choose a smaller model")):
        floor = planner.plan_recipe(recipe(), CARD, budget_bytes)
        assert cure in str(planner.does_not_fit(floor, list(planner.alternatives(floor))))
    nothing = planner.plan_recipe(recipe(), CARD, 1024)  # less than the adapter too, which is not what to cure
    assert "beside tensors takes" in str(planner.does_not_fit(nothing, list(planner.alternatives(nothing))))


@pytest.mark.parametrize(
    ("rank", "budget_gib", "said"),
    [
        (20000, 4, "what is trained and its optimizer alone take"),
        (4000, 3, "weights, adapter, optimizer and constants alone"),
    ],
)
@pytest.mark.slow
def test_a_rank_that_alone_is_too_much_is_what_to_lower(recipe, few_blocks, rank, budget_gib, said):
    plan = planner.plan_recipe(recipe(few_blocks(), f"lora.rank={rank}", *SETTLED), CARD, budget_gib * GIB)
    error = str(planner.does_not_fit(plan, list(planner.alternatives(plan))))
    assert said in error and error.endswith(": lower lora.rank")


def test_a_slower_machine_is_estimated_slower(recipe, few_blocks):
    fast = Machine("fast", "cuda", 8 * GIB, 0, 1e14, 1e12, 1e10)
    slow = Machine("slow", "cuda", 8 * GIB, 0, 1e13, 1e12, 1e10)
    times = [planner.plan_recipe(recipe(few_blocks(), *SETTLED), m, 8 * GIB).chosen.step_seconds for m in (fast, slow)]
    assert 2 < times[1] / times[0] < 10


def test_the_disk_needs_room_for_a_model_that_is_quantised_here_alone(recipe, tmp_path):
    config = config_of("llama")
    config.save_pretrained(tmp_path / "plain")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.save_pretrained(tmp_path / "packed")
    quantised, plain, packed = (
        planner.plan_recipe(
            recipe(f"model.path={tmp_path / name}", f"model.quant={quant}", "data.max_tokens=64"), CARD, 8 * GIB
        )
        for name, quant in (("plain", "nf4"), ("plain", "none"), ("packed", "nf4"))
    )
    written = quantised.chosen.prediction.simulation.frozen_bytes
    assert planner.disk_bytes(quantised) - written == planner.disk_bytes(plain) == planner.disk_bytes(packed) > 0


def test_an_unknown_model_names_the_nearest(recipe):
    with pytest.raises(ModelError, match=r"nearest known models are .*Llama-3\.2-1B"):
        planner.plan_recipe(recipe("model.path=someone/Llama-3.2-1"), CARD, GIB)


def test_an_operator_that_needs_values_is_measured_on_small_real_models_and_named(
    recipe, simulations, tmp_path, monkeypatch, caplog
):
    config_of("llama", num_hidden_layers=5).save_pretrained(tmp_path)
    settings = recipe(f"model.path={tmp_path}", "data.max_tokens=64", *SETTLED)
    planned = planner.plan_recipe(settings, CARD, 8 * GIB)
    plain_step = simulate.probe_step

    def step_that_looks_at_values(*arguments):
        arguments[4].input_ids.nonzero()
        plain_step(*arguments)

    monkeypatch.setattr(simulate, "probe_step", step_that_looks_at_values)
    simulate._say_measured.cache_clear()
    simulations.clear()
    measured = planner.plan_recipe(settings, CARD, 8 * GIB)
    because = measured.chosen.prediction.simulation.measured_because
    assert because.startswith("aten.nonzero.default cannot run without values (")
    assert f"{because}: measured on" in plan_text.describe(measured, [])
    (said,) = [r.message for r in caplog.records if because in r.message]
    assert "measured on the processor with real tensors" in said
    assert measured.peak_bytes == pytest.approx(planned.peak_bytes, abs=100)
    simulations.clear()


class TestCommand:
    """The command line."""

    def call(self, capsys, *arguments):
        with pytest.raises(SystemExit) as caught:
            main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("model:\n  path: meta-llama/Llama-3.2-1B\ndata:\n  train: rows.jsonl\n  max_tokens: 256\n")
        return path

    def test_prints_the_verdict_and_writes_the_page(self, capsys, file, tmp_path):
        page = tmp_path / "plan.html"
        code, out, _ = self.call(capsys, file, "--gpu", "rtx-4060", "--html", page, "--max-batch")
        assert code == 0 or code is None
        assert "RTX 4060" in out and "fits" in out and "saved activations" in out and "largest micro-batch" in out
        assert "<svg" in page.read_text()
        steps = "data.max_tokens 256, train.gradient_accumulation_steps 1, rank 16"
        assert f"Memory plan of recipe: meta-llama/Llama-3.2-1B, {steps}, on RTX 4060" in page.read_text()

    def test_a_page_that_cannot_be_written_is_refused_before_anything_is_planned(self, capsys, file, monkeypatch):
        monkeypatch.setattr("qlora_lite.prepare.plan.plan_recipe", lambda *_: pytest.fail("it was planned"))
        code, _, err = self.call(capsys, file, "--gpu", "rtx-4060", "--html", file / "plan.html")
        assert code == 2 and "plan.html" in err

    def test_ranks_that_only_a_run_knows_are_said_to_be_equal_ones(self, capsys, file):
        eva, plain = (
            self.call(capsys, file, "--gpu", "rtx-4060", "train.learning_rate=1e-3", f"lora.start={start}")
            for start in ("eva", "kaiming")
        )
        assert "planned with equal ranks" in eva[2] and eva[1] == plain[1] and "equal ranks" not in plain[2]

    @pytest.mark.parametrize("second", ["--gpu", "--card"])
    def test_more_than_one_gpu_is_not_ignored(self, capsys, file, second):
        code, out, err = self.call(capsys, file, "--gpu", "rtx-3090", second, "rtx-4090")
        assert code == 2 and out == "" and "2 processes cannot share the 1 packs of a step" in err

    def test_the_option_s_former_name_is_understood_and_not_shown(self, capsys, file):
        assert self.call(capsys, file, "--card", "rtx-4061")[2] == self.call(capsys, file, "--gpu", "rtx-4061")[2]
        assert self.call(capsys, "--cards")[1] == self.call(capsys, "--gpus")[1]
        shown = self.call(capsys, "--help")[1]
        assert "--gpu" in shown and "--card" not in shown

    @pytest.mark.parametrize(("found", "shown"), [(planner.MAX_PACKS, "256 or more"), (7, "7"), (None, "none")])
    def test_the_plan_is_shown_before_what_takes_longer(self, capsys, file, monkeypatch, found, shown):
        def counted(_plan):
            assert "RTX 4060" in capsys.readouterr().out
            return found

        monkeypatch.setattr(planner, "max_batch", counted)
        _, out, _ = self.call(capsys, file, "--gpu", "rtx-4060", "--max-batch")
        assert out == f"largest micro-batch that fits, with all options that save memory: {shown}\n"

    def test_json_is_one_object_and_nothing_else(self, capsys, file, few_blocks):
        code, out, _ = self.call(capsys, file, "--vram", "0.5GiB", "--json", "--max-tokens", few_blocks(), *SETTLED)
        values = json.loads(out)
        assert code == 3 and values["fits"] is False and values["max_tokens"] is None

    @pytest.mark.parametrize(("budget", "planned_for"), [("24GiB", 2**29), ("0.25GiB", 2**28)])
    def test_a_budget_never_makes_a_gpu_larger_than_it_is(self, capsys, file, few_blocks, budget, planned_for):
        settings = few_blocks(), *SETTLED, f"memory.budget={budget}"
        _, out, err = self.call(capsys, file, "--vram", "0.5GiB", "--json", *settings)
        assert json.loads(out)["budget_bytes"] == planned_for
        assert ("24.0 GiB is more than a GPU with 512.0 MiB" in err) == (budget == "24GiB")

    def test_a_budget_never_makes_this_machine_larger_than_it_is(self, capsys, file, few_blocks):
        _, out, _ = self.call(capsys, file, "--json", few_blocks(), *SETTLED, "memory.budget=900000GiB")
        assert json.loads(out)["budget_bytes"] < 2**49

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--vram", "12"], "no unit; write 12GiB"),
            (["--vram", "0GiB"], "must be more than 0"),
            (["--gpu", "rtx-4061"], "RTX 4060"),
            (["--gpu", "l4", "--vram", "1GiB"], "exclude each other"),
            (["memory.budget=8"], "such as 8GiB"),
        ],
    )
    def test_wrong_arguments_end_with_exit_code_2_and_a_cure(self, capsys, file, arguments, message):
        code, _, err = self.call(capsys, file, *arguments)
        assert code == 2 and message in err

    @pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "unsloth/llama-3.2-1b", "Llama-3.2-1B", "folder"])
    def test_a_model_is_planned_like_a_recipe_that_names_it(self, capsys, file, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "config.json").write_text(json.dumps(known_config("meta-llama/Llama-3.2-1B")))
        options = "--gpu", "rtx-4060", "--json"
        code, out, err = self.call(capsys, model, "data.max_tokens=256", *options)
        assert (code or 0) == 0 and out == self.call(capsys, file, *options)[1]
        copy = f"{model} is taken for a copy of meta-llama/Llama-3.2-1B: planned with the shapes of that"
        assert (copy in err) == (model in ("unsloth/llama-3.2-1b", "Llama-3.2-1B"))

    def test_a_recipe_comes_before_a_model_of_its_name(self, capsys, file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        file.rename(tmp_path / "Llama-3.1-8B")
        assert (
            "meta-llama/Llama-3.2-1B, data.max_tokens 256" in self.call(capsys, "Llama-3.1-8B", "--gpu", "rtx-4060")[2]
        )

    @pytest.mark.parametrize(
        ("named", "said"),
        [
            ("Llama-3.1-8", "did you mean llama3.1-8b, meta-llama/Llama-3.1-8B"),
            ("zzz", "plan --models"),
            ("llama3.1-8b-24gb", "`qlora-lite plan llama3.1-8b --gpu NAME`"),
            (".", "has no config.json"),
            ("zz/zzz", "not among the configurations"),
            ("none.gguf", "no file"),
            ("none.yaml", "no such file"),
        ],
    )
    def test_what_is_neither_recipe_nor_model_is_one_line_with_the_way_out(
        self, capsys, named, said, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        code, _, err = self.call(capsys, named, "--gpu", "rtx-4060")
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and said in last
        assert ("with just the model's config.json is enough" in last) == (named in ("Llama-3.1-8", "zzz", "zz/zzz"))

    def test_lists_gpus_and_models_without_a_recipe(self, capsys):
        assert "RTX 4090" in self.call(capsys, "--gpus")[1]
        assert "meta-llama/Llama-3.1-8B" in self.call(capsys, "--models")[1].splitlines()
        assert "meta-llama/Llama-3.1-8B" in json.loads(self.call(capsys, "--models", "--json")[1])["models"]
        known = {gpu["name"]: gpu for gpu in json.loads(self.call(capsys, "--gpus", "--json")[1])["gpus"]}
        assert known["RTX 4090"]["memory_bytes"] > 23 * GIB
        assert self.call(capsys)[0] == 2


def test_a_run_keeps_to_its_plan_and_writes_predicted_beside_measured(tmp_path):
    save_tiny(tmp_path / "model")
    memory = {"checkpointing": "auto", "loss_chunk_tokens": "auto", "micro_batches": "auto"}
    file = write_recipe(
        tmp_path, tmp_path / "model", memory=memory, train={"gradient_accumulation_steps": 2, "max_steps": 2}
    )
    folder = run_recipe(load_recipe(file))
    plan = json.loads((folder / "summary.json").read_text())["plan"]
    assert plan["measured_peak_bytes"] <= plan["budget_bytes"]
    # The process is counted with what it holds while the machine's speed is measured, which a tiny model never needs.
    assert plan["measured_peak_bytes"] <= 1.15 * plan["predicted_peak_bytes"]
    assert plan["predicted_peak_bytes"] <= 1.3 * plan["measured_peak_bytes"] + 2 * machine._COPY_BYTES["cpu"]
    chosen = plan["chosen"]
    assert chosen["train.micro_batch_size"] * chosen["train.gradient_accumulation_steps"] == 2
    assert "predicted" in (folder / "log.txt").read_text()


def test_the_command_says_what_the_longest_sequence_takes_of_host_and_time(tmp_path, command):
    file = tmp_path / "recipe.yaml"
    file.write_text("model:\n  path: meta-llama/Llama-3.2-1B\ndata:\n  train: rows.jsonl\n  max_tokens: 256\n")
    code, out, _ = command("plan", file, "--gpu", "rtx-4060", "--max-tokens", "--json", *SETTLED)
    found = json.loads(out)
    assert code == 0 and found["max_tokens"] > 1024 and found["max_tokens"] % LENGTH_STEP == 0
    assert found["max_tokens_host_bytes"] > found["host_bytes"]
    assert found["max_tokens_step_seconds"] > found["step_seconds_estimate"]
    code, out, _ = command("plan", file, "--gpu", "rtx-4060", "--max-tokens", *SETTLED)
    price = f"{found['max_tokens']} ({format_bytes(found['max_tokens_host_bytes'])} of host memory, about "
    assert price + format_seconds(found["max_tokens_step_seconds"]) in out


@pytest.mark.slow
def test_on_a_cpu_the_host_memory_of_the_longest_sequence_is_that_of_the_process(tmp_path):
    file = tmp_path / "recipe.yaml"
    shape = "model:\n  path: HuggingFaceTB/SmolLM2-135M\n  device: cpu\ndata:\n  train: rows.jsonl\n  max_tokens: 64\n"
    file.write_text(f"{shape}memory:\n  budget: 1GiB\n")
    command = [sys.executable, "-m", "qlora_lite", "plan", str(file), "--max-tokens", "--json", *SETTLED]
    found = json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout
    )  # in as small a process as a user's
    assert 0.9 * 2**30 < found["max_tokens_host_bytes"] <= found["budget_bytes"] == 2**30


def test_the_command_plans_a_built_in_recipe_by_its_name_and_says_that_a_run_would_not_use_the_gpu(command):
    small = "llama3.2-3b", "data.max_tokens=64", "train.gradient_accumulation_steps=1", "model.device=cpu", *SETTLED
    code, out, err = command("plan", *small, "--vram", "8GiB", "--json")
    assert code == 0 and json.loads(out)["fits"]
    assert command("plan", "no-such-recipe")[0] == 2
    code, _, err = command("plan", *small, "--gpu", "rtx-4060")
    assert code == 0 and "model.device cpu: this is the plan of a GPU all the same" in err


def test_the_disk_needs_room_for_experts_that_are_put_together_where_blocks_stay_in_files(recipe, tmp_path):
    family, settings = UNUSUAL["qwen3_moe"]
    config = AutoConfig.for_model(family, **settings | {"moe_intermediate_size": 128})
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    on_disk, in_memory = (
        planner.plan_recipe(
            recipe(
                f"model.path={tmp_path}",
                "data.max_tokens=64",
                "memory.resident_layers=0",
                f"memory.stream_from={place}",
            ),
            CARD,
            8 * GIB,
        )
        for place in ("disk", "host")
    )
    codes = 2 * 8 * 3 * 128 * 64  # blocks, experts, weights of each
    scales = 2 * 8 * 3 * 4
    assert planner.disk_bytes(on_disk) - planner.disk_bytes(in_memory) == codes + scales
