"""Full fine-tuning: every weight learns as plain torch has it, in the memory that was planned."""

import copy
from dataclasses import replace

import pytest
import torch
from jobs import new_job
from safetensors.torch import load_file
from tiny import build_tiny, config_of, quantized_pair
from tiny_files import byte_tokenizer
from tiny_trainer import SETTINGS, examples
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.adapters.full import Full
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.memory.ledger import Ledger
from qlora_lite.models.families import known_config
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, place, settle, stream_of
from qlora_lite.models.save import save_model
from qlora_lite.planning.candidate import Step
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.planning.plan_ledger import ALLOCATION_BYTES
from qlora_lite.planning.predict import predict
from qlora_lite.planning.search import search
from qlora_lite.planning.simulate import Job, simulate, simulate_whole
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.rounding import round_stochastically
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE, capture, restore

WORK = causal_lm(method=Full())
IN_TURN = causal_lm(method=Full(switch_every=2))
IN_BACKWARD = dict(gradient_accumulation_steps=1, max_grad_norm=0.0, options=MemoryOptions(optimizer_in_backward=True))
TIED = dict(tie_word_embeddings=True)
DEEP = dict(num_hidden_layers=6)


def trainer(name="llama", dtype=torch.float32, model=None, work=WORK, **changes):
    """A trainer of all weights of a tiny model; equal arguments give equal ones."""
    settings = {key: changes.pop(key) for key in changes.keys() & SETTINGS.keys() | {"options"} & changes.keys()}
    model = model or build_tiny(name, dtype, **changes)
    work.method.apply(adopt(model))
    training = Trainer(model, examples(), TrainSettings(**(SETTINGS | settings)), workload=work)
    training.check()
    return training


def plain_steps(model, training, turns=None):
    """Train a copy of a model as anyone would write it: each row by itself, no packing, no recomputed blocks.

    Args:
        turns: the module that each step trains; None trains all of the model.
    """
    s, optimizer, before = training.settings, None, None
    steps = [step for epoch in range(s.max_steps) for step in training.epochs.steps(epoch)][: s.max_steps]
    for step, learns in zip(steps, turns or [model] * s.max_steps, strict=True):
        if learns is not before:
            model.requires_grad_(False)
            weights = learns.requires_grad_(True).parameters()
            optimizer = torch.optim.AdamW(weights, lr=s.learning_rate, weight_decay=s.weight_decay, foreach=False)
            before = learns
        rows = [training.examples[row] for micro_batch in step for row in micro_batch]
        loss = 0.0
        for row in rows:
            count = len(row.token_ids)
            ids = functional.pad(torch.from_numpy(row.token_ids).long(), (0, 16 - count))  # of one length: sooner
            losses = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = loss + losses[: count - 1][torch.from_numpy(row.is_target[1:])].sum()
        (loss / sum(int(row.is_target[1:].sum()) for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("settings", [{}, IN_BACKWARD], ids=["", "in backward"])
def test_blocks_in_turn_become_what_an_adamw_for_each_makes_of_them(settings):
    training = trainer(work=IN_TURN, num_hidden_layers=3, learning_rate=1e-3, max_steps=5, **settings)
    plain, turns = build_tiny("llama", num_hidden_layers=3), []
    for step in range(1, 6):
        IN_TURN.method.take_turn(model := build_tiny("llama", num_hidden_layers=3), step)
        (learns,) = (i for i, block in enumerate(model.model.layers) if block.mlp.up_proj.weight.requires_grad)
        turns.append(plain.model.layers[learns])
    assert len(set(turns)) == 3 and turns[0] is turns[1] is not turns[2] is turns[3] is not turns[4]
    before = copy.deepcopy(training.model.state_dict())
    wanted = plain_steps(plain, training, turns).state_dict()
    list(training)
    for key, value in training.model.state_dict().items():
        assert torch.equal(value, before[key]) == ("layers" not in key), key
        assert (value - wanted[key]).norm() <= 1e-5 * wanted[key].norm().clamp(min=1.0), key


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_no_turn_of_a_block_is_rounded_by_the_chances_of_an_earlier_one(optimizer, monkeypatch):
    drawn = []

    def noted(values, step, place):
        drawn.append((step, place))
        return round_stochastically(values, step, place)

    monkeypatch.setattr("qlora_lite.train.flat.round_stochastically", noted)
    monkeypatch.setattr("qlora_lite.train.rounding.round_stochastically", noted)
    list(trainer(work=IN_TURN, dtype=torch.bfloat16, optimizer=optimizer, max_steps=8))
    assert {step for step, _ in drawn} == {*range(1, 9)} and len(drawn) == len({*drawn})


def test_of_blocks_in_turn_all_are_streamed_or_none():
    work = new_job(AutoConfig.for_model(**known_config("meta-llama/Llama-3.1-8B")), None, quant="none").workload
    job = Job(replace(work, method=Full(switch_every=50)), BatchShape((2048,), 2047), None, "cuda", max_grad_norm=0.0)
    step = Step(job, job.shape, 1, 1, {"optimizer_in_backward": True}, False)
    gpu = find_gpu("rtx-4090")
    machine = machine_of_gpu(gpu)
    for gib in (6, 12):
        found = search(step, machine, gib * 2**30 - machine.base_bytes)
        assert {candidate.options.resident_layers for candidate in found} <= {None, 0}
        assert any(candidate.options.resident_layers == 0 for candidate in found)


def test_backward_ends_at_the_block_whose_turn_it_is():
    """Blocks before it are not recomputed, and no state or gradient is there of any other."""
    training, runs = trainer(work=IN_TURN, num_hidden_layers=4, max_steps=8, gradient_accumulation_steps=1), []
    for number, block in enumerate(training.model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: runs.append(number))
    for _ in training:
        (learns,) = (i for i, block in enumerate(training.model.model.layers) if block.mlp.up_proj.weight.requires_grad)
        assert runs == [0, 1, 2, 3, *range(3, learns - 1, -1)]
        assert len(training.optimizer.state) == 9 and all(f"layers.{learns}." in name for name in training.names)
        runs.clear()


TILES = dict(options=MemoryOptions(tile_tokens=4, loss_chunk_tokens=5))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("qwen2", TIED | IN_BACKWARD), ("gemma2", TILES), ("gpt2", TILES)],
    ids=["llama", "qwen2 tied, in backward", "gemma2 in tiles", "gpt2 in tiles"],
)
def test_weights_after_steps_are_those_of_plain_adamw_in_float32(name, settings):
    training = trainer(name, learning_rate=1e-3, weight_decay=0.1, max_steps=2, **settings)
    before = copy.deepcopy(training.model.state_dict())
    architecture = {key: value for key, value in settings.items() if key in TIED}
    wanted = plain_steps(build_tiny(name, **architecture), training).state_dict()
    list(training)
    for key, value in training.model.state_dict().items():
        found, expected, moved = value, wanted[key], wanted[key] - before[key]
        if key.endswith("c_attn.bias"):  # a key's bias changes no attention: its gradient is rounding, to Adam as well
            found, expected = (tensor.chunk(3)[2] for tensor in (found, expected))
        assert moved.norm() > 1e-4, key
        assert (found - expected).norm() <= 1e-5 * expected.norm().clamp(min=1.0), key


def test_bf16_weights_keep_small_updates_by_stochastic_rounding():
    """A rate whose updates are each below half a step of bf16: rounded to nearest, nothing moves."""

    def moved(stochastic):
        training = trainer(
            dtype=torch.bfloat16, learning_rate=2e-5, stochastic_rounding=stochastic, optimizer="adamw_8bit"
        )
        weight = training.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        before = weight.detach().float().clone()
        list(training)
        return (weight.detach().float() - before).abs().mean().item()

    assert moved(True) == pytest.approx(4 * 2e-5, rel=0.4)
    assert moved(False) < 4 * 2e-5 / 4


def ledger_of(training):
    ledger = Ledger(allocation_bytes=ALLOCATION_BYTES["cpu"])
    with ledger:
        for tensor, category, _ in categorised(training.workload, training.model):
            ledger.claim([tensor], category)
        ledger.watch(training.model)
        training.probe_memory(training.examples)
    return ledger


def job_of(training, config):
    s = training.settings
    work = replace(
        training.workload,
        spec=replace(new_job(config, None).workload.spec, quant="none", compute_dtype=training.model.dtype),
    )
    largest, evaluation = largest_batches(work, training.examples, training.examples, training.epochs)
    return Job(
        work,
        work.batches.shape(largest),
        work.batches.shape(evaluation),
        optimizer=s.optimizer,
        max_grad_norm=s.max_grad_norm,
        accumulating=s.gradient_accumulation_steps > 1,
        options=s.options,
    )


@pytest.mark.parametrize(
    ("settings", "dtype", "changes"),
    [
        ({}, torch.bfloat16, {}),
        (TIED, torch.float32, {}),
        (TIED, torch.bfloat16, IN_BACKWARD),
        (DEEP, torch.bfloat16, dict(work=IN_TURN)),
        (DEEP, torch.bfloat16, dict(work=IN_TURN) | IN_BACKWARD),
    ],
    ids=["bf16", "tied", "tied, updated in backward", "in turn", "in turn, updated in backward"],
)
def test_the_plan_is_what_the_ledger_finds_with_weights_gradients_and_states(settings, dtype, changes):
    training = trainer(dtype=dtype, optimizer="adamw_8bit", vocab_size=4096, **settings, **changes)
    planned, found = simulate(job_of(training, training.model.config)), ledger_of(training).peak
    weights = sum(p.nbytes for p in training.parameters)
    assert planned.peak().total == pytest.approx(found.total, rel=0.01)
    for name in ("trained weights", "gradients", "optimizer"):
        here, there = (moment.breakdown.get(name, 0) for moment in (planned.peak(), found))
        assert here == pytest.approx(there, rel=0.01, abs=2048), name  # two code tables of 8-bit states
    # the optimizer lays norms out in whole blocks of 256 values
    assert planned.resident.breakdown["trained weights"] == pytest.approx(weights, rel=0.01, abs=1024)
    most = max(moment.breakdown.get("gradients", 0) for moment in planned.moments.values())
    assert most < 0.9 * weights if "options" in changes else most >= weights
    saved = training.workload.method.tensors(training.model).values()
    assert planned.saved_bytes == sum(tensor.nbytes for tensor in saved)
    assert planned.state_bytes == pytest.approx(training.optimizer_bytes, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "optimizer", "work"),
    [({}, "adamw_8bit", WORK), (TIED, "adamw_torch", WORK), ({}, "adamw_8bit", IN_TURN)],
    ids=["", "tied", "in turn"],
)
def test_a_deep_model_is_continued_from_shallow_ones(settings, optimizer, work):
    config = config_of("llama", **(settings | dict(num_hidden_layers=9)))
    job = replace(job_of(trainer(work=work, optimizer=optimizer), config), eval_shape=None)
    short, whole = simulate(job), simulate_whole(job)
    assert (short.saved_bytes, short.state_bytes) == (whole.saved_bytes, whole.state_bytes)
    assert sorted(map(str, short.trained)) == sorted(map(str, whole.trained))
    assert short.peak().bytes == whole.peak().bytes and short.peak("optimizer").bytes == whole.peak("optimizer").bytes


@pytest.mark.parametrize(
    "changes", [{}, IN_BACKWARD, dict(work=IN_TURN)], ids=["plain", "updated in backward", "in turn"]
)
def test_killed_and_resumed_it_goes_on_to_the_bit(changes, tmp_path):
    make = lambda: trainer(dtype=torch.bfloat16, optimizer="adamw_8bit", **changes)  # noqa: E731
    whole, first = make(), make()
    losses = [step.loss for step in whole]
    steps = iter(first)
    next(steps), next(steps)  # the last of a block's turn
    tensors, state = capture(first, copies=False)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(2, tensors, {STATE: state}), {}, "")
    resumed = make()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "qwen3_moe"])
def test_what_is_saved_is_a_model_folder_that_transformers_loads_to_the_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lite.models.save.SHARD_BYTES", 100_000)
    training = trainer(name, **(TIED if name == "qwen2" else {}))
    list(training)
    save_model(training.model, tmp_path / "model", byte_tokenizer(), [4])
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (key, ours), theirs in zip(training.model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert again.generation_config.eos_token_id == [2, 4]
    names = {key for file in (tmp_path / "model").glob("*.safetensors") for key in load_file(file)}
    assert ("model.layers.0.mlp.experts.0.gate_proj.weight" in names) == (name == "qwen3_moe")
    assert name != "qwen2" or "lm_head.weight" not in names


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ModelError, match=r"has some in 4 bit: load it with model\.quant none"):
        Full().apply(quantized_pair("llama")[0])
    with pytest.raises(ModelError, match=r"set model\.compute_dtype to bfloat16 or float32"):
        Full().apply(adopt(build_tiny("llama", torch.float16)))
    with pytest.raises(TrainingError, match="this kind of model has no host_embeddings, host_head to set"):
        trainer(options=MemoryOptions(host_embeddings=True, host_head=True))
    with pytest.raises(TrainingError, match=r"set memory\.optimizer_in_backward to true, or memory\.resident_layers"):
        model = adopt(build_tiny("llama"))
        Full().apply(model)
        options = MemoryOptions(resident_layers=0)
        trainer_of = Trainer(
            place(model, torch.device("cpu"), options, trains_base=True),
            examples(),
            TrainSettings(**(SETTINGS | dict(options=options))),
            workload=WORK,
        )
        trainer_of.check()
    with pytest.raises(TrainingError, match="loraplus_lr_ratio 4 is for LoRA weights"):
        trainer(loraplus_lr_ratio=4.0)
    with pytest.raises(TrainingError, match=r"memory\.optimizer_in_backward is incompatible with"):
        trainer(options=MemoryOptions(optimizer_in_backward=True))


def test_a_weight_that_the_first_rows_do_not_reach_is_a_warning(caplog):
    model = adopt(build_tiny("llama"))
    Full().apply(model)
    norms = {name: 1.0 for name, _ in Full().parameters(model)} | {"lm_head.weight": 0.0}
    Full().check_reached(model, norms)
    assert "1 of 21 weights got no gradient in the first step, first lm_head.weight" in caplog.text


@pytest.mark.parametrize("work", [WORK, IN_TURN], ids=["", "in turn"])
def test_a_plan_of_streamed_weights_is_what_the_ledger_finds(work):
    training = streamed(STREAMED, work=work, vocab_size=4096)
    planned, found = simulate(job_of(training, training.model.config)), ledger_of(training)
    assert planned.peak().total == pytest.approx(found.peak.total, rel=0.01)
    assert planned.offloaded_bytes == pytest.approx(found.offloaded_peak_bytes, rel=0.01)


def test_llama_8b_is_trained_whole_on_a_gpu_of_8_gib_beside_40_gib_of_host_memory():
    work = new_job(AutoConfig.for_model(**known_config("meta-llama/Llama-3.1-8B")), None, quant="none").workload
    options = replace(STREAMED, tile_tokens=4096, loss_chunk_tokens=1024)
    job = Job(replace(work, method=Full()), BatchShape((2048,), 2047), None, "cuda", max_grad_norm=0.0, options=options)
    planned = predict(job)
    assert planned.peak_bytes <= 8 * 2**30 and planned.host_bytes <= 40 * 2**30
    blocks = 32 * 2 * 218_112_000  # bfloat16 weights of the blocks, and as many bytes of optimizer states
    assert planned.host_bytes > 2 * blocks
    job = replace(job, workload=replace(work, method=Full(switch_every=50)))
    planned = predict(job)
    assert planned.peak_bytes <= 5 * 2**30 and planned.host_bytes <= 20 * 2**30
    assert planned.host_updates == blocks // (2 * 32)


def streamed(options, dtype=torch.bfloat16, optimizer="adamw_8bit", work=WORK, **settings):
    """A trainer whose blocks' weights lie in host memory, but for those of the options' last ones."""
    model = adopt(build_tiny("llama", dtype, num_hidden_layers=4, **settings))
    work.method.apply(model)
    place(model, torch.device("cpu"), options, trains_base=True)
    changes = SETTINGS | IN_BACKWARD | dict(optimizer=optimizer, options=options)
    training = Trainer(model, examples(), TrainSettings(**changes), workload=work)
    training.check()
    return training


STREAMED = MemoryOptions(optimizer_in_backward=True, resident_layers=0)


@pytest.mark.parametrize(
    ("optimizer", "work"),
    [("adamw_8bit", WORK), ("adamw_torch", WORK), ("lion_8bit", WORK), ("adamw_8bit", IN_TURN)],
)
@pytest.mark.parametrize(
    "options",
    [STREAMED, replace(STREAMED, resident_layers=2, tile_tokens=5), replace(STREAMED, offload_checkpoints=True)],
    ids=["all", "two, in tiles", "checkpoints offloaded"],
)
def test_streamed_weights_are_trained_as_resident_ones_to_the_bit(optimizer, work, options):
    both = replace(options, resident_layers=None), options
    pair = [streamed(each, optimizer=optimizer, work=work) for each in both]
    assert len(stream_of(pair[1].model).trained) == 9 * (1 if work is IN_TURN else 4 - options.resident_layers)
    pair[1].probe_memory(pair[1].examples)
    steps = [list(training) for training in pair]
    for ours, theirs in zip(*steps, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert pair[0].evaluate(examples()) == pair[1].evaluate(examples())
    settle(pair[1].model)
    named = [dict(training.model.named_parameters()) for training in pair]
    assert all(torch.equal(weight, named[1][name]) for name, weight in named[0].items())


@pytest.mark.parametrize("work", [WORK, IN_TURN])
def test_the_sinks_of_gpt_oss_stay_and_all_else_learns(work):
    training = trainer("gpt_oss", work=work, max_steps=4)
    sinks = {name: p.detach().clone() for name, p in training.model.named_parameters() if name.endswith("sinks")}
    assert sinks and len(list(training)) == 4
    assert all(torch.equal(training.model.get_parameter(name), before) for name, before in sinks.items())
