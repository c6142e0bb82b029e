"""Full fine-tuning: every weight learns as plain torch has it, in the memory that was planned."""

import copy
from dataclasses import replace

import pytest
import torch
from jobs import new_job
from safetensors.torch import load_file
from tiny import ARCHITECTURES, build_tiny, quantized_pair
from tiny_files import byte_tokenizer
from tiny_trainer import SETTINGS, examples
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.adapters.full import Full
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.memory.ledger import Ledger
from qlora_lite.models.families import known_config
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, place, settle, stream_of
from qlora_lite.models.save import save_model
from qlora_lite.planning.plan_ledger import ALLOCATION_BYTES
from qlora_lite.planning.predict import predict
from qlora_lite.planning.simulate import Job, simulate, simulate_whole
from qlora_lite.train.causal_lm import CausalLM
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.settings import TrainSettings, auto_learning_rate, full_learning_rate
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.workload import BatchShape

WORK = CausalLM(method=Full())
IN_BACKWARD = dict(gradient_accumulation_steps=1, max_grad_norm=0.0, options=MemoryOptions(optimizer_in_backward=True))
TIED = dict(tie_word_embeddings=True)


def trainer(name="llama", dtype=torch.float32, model=None, **changes):
    """A trainer of all weights of a tiny model; equal arguments give equal ones."""
    settings = {key: changes.pop(key) for key in changes.keys() & SETTINGS.keys() | {"options"} & changes.keys()}
    model = model or build_tiny(name, dtype, **changes)
    WORK.method.apply(adopt(model))
    training = Trainer(model, examples(), TrainSettings(**(SETTINGS | settings)), workload=WORK)
    training.check()
    return training


def plain_steps(model, training):
    """Train a copy of a model as anyone would write it: each row by itself, no packing, no recomputed blocks."""
    model.requires_grad_(True)
    s = training.settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay, foreach=False)
    for step in [step for epoch in range(s.max_steps) for step in training.epochs.steps(epoch)][: s.max_steps]:
        rows = [training.examples[row] for micro_batch in step for row in micro_batch]
        loss = 0.0
        for row in rows:
            count = len(row.token_ids)
            ids = functional.pad(torch.from_numpy(row.token_ids).long(), (0, 16 - count))  # of one length: sooner
            losses = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = loss + losses[: count - 1][torch.from_numpy(row.learned[1:])].sum()
        (loss / sum(int(row.learned[1:].sum()) for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    return model


TILES = dict(options=MemoryOptions(tile_tokens=4, loss_chunk_tokens=5))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("qwen2", TIED | IN_BACKWARD), ("gemma2", TILES), ("gpt2", TILES)],
    ids=["llama", "qwen2 tied, in backward", "gemma2 in tiles", "gpt2 in tiles"],
)  # fmt: skip
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
        )  # fmt: skip
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
    work = replace(WORK, spec=replace(new_job(config, None).workload.spec, quant="none",
                                      compute_dtype=training.model.dtype))  # fmt: skip
    largest, evaluation = largest_batches(work, training.examples, training.examples, training.epochs)
    return Job(work, work.shape(largest), work.shape(evaluation), optimizer=s.optimizer, max_grad_norm=s.max_grad_norm,
               accumulating=s.gradient_accumulation_steps > 1, options=s.options)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "dtype", "changes"),
    [({}, torch.bfloat16, {}), (TIED, torch.float32, {}), (TIED, torch.bfloat16, IN_BACKWARD)],
    ids=["bf16", "tied", "tied, updated in backward"],
)  # fmt: skip
def test_the_plan_is_what_the_ledger_finds_with_weights_gradients_and_states(settings, dtype, changes):
    training = trainer(dtype=dtype, optimizer="adamw_8bit", vocab_size=4096, **settings, **changes)
    planned, found = simulate(job_of(training, training.model.config)), ledger_of(training).peak
    weights = sum(p.nbytes for p in training.parameters)
    assert planned.peak().total == pytest.approx(found.total, rel=0.01)
    for name in ("trained weights", "gradients", "optimizer"):
        assert planned.peak().breakdown[name] == pytest.approx(found.breakdown[name], rel=0.01), name
    assert planned.resident.breakdown["trained weights"] == pytest.approx(weights, rel=0.01)
    most = max(moment.breakdown.get("gradients", 0) for moment in planned.moments.values())
    assert most < 0.9 * weights if changes else most >= weights


@pytest.mark.parametrize(("settings", "optimizer"), [({}, "adamw_8bit"), (TIED, "adamw_torch")], ids=["", "tied"])
def test_a_deep_model_is_continued_from_shallow_ones(settings, optimizer):
    config = AutoConfig.for_model("llama", **(ARCHITECTURES["llama"] | settings | dict(num_hidden_layers=9)))
    job = replace(job_of(trainer(optimizer=optimizer), config), eval_shape=None)
    short, whole = simulate(job), simulate_whole(job)
    assert sorted(map(str, short.trained)) == sorted(map(str, whole.trained))
    assert short.peak().bytes == whole.peak().bytes and short.peak("optimizer").bytes == whole.peak("optimizer").bytes


@pytest.mark.parametrize("changes", [{}, IN_BACKWARD], ids=["plain", "updated in backward"])
def test_killed_and_resumed_it_goes_on_to_the_bit(changes, tmp_path):
    make = lambda: trainer(dtype=torch.bfloat16, optimizer="adamw_8bit", **changes)  # noqa: E731
    whole, first = make(), make()
    losses = [step.loss for step in whole]
    steps = iter(first)
    next(steps), next(steps)
    tensors, state = capture(first, copies=False)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(2, tensors, {STATE: state}), {}, "")
    resumed = make()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


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
    with pytest.raises(TrainingError, match="CausalLM has no host_embeddings, host_head to set"):
        trainer(options=MemoryOptions(host_embeddings=True, host_head=True))
    with pytest.raises(TrainingError, match=r"set memory\.optimizer_in_backward to true, or memory\.resident_layers"):
        model = adopt(build_tiny("llama"))
        Full().apply(model)
        options = MemoryOptions(resident_layers=0)
        trainer_of = Trainer(place(model, torch.device("cpu"), options, trains_base=True), examples(),
                             TrainSettings(**(SETTINGS | dict(options=options))), workload=WORK)  # fmt: skip
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


def test_the_automatic_rate_is_a_tenth_of_loras():
    for family, width in (("llama", 4096), ("qwen2", 896), ("gemma3_text", 640)):
        lora = auto_learning_rate(family, width, 16, 2.0)
        assert full_learning_rate(family, width) == pytest.approx(lora / 10, rel=0.02)


def test_a_plan_of_streamed_weights_is_what_the_ledger_finds():
    training = streamed(STREAMED, vocab_size=4096)
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


def streamed(options, dtype=torch.bfloat16, optimizer="adamw_8bit", **settings):
    """A trainer whose blocks' weights lie in host memory, but for those of the options' last ones."""
    model = adopt(build_tiny("llama", dtype, num_hidden_layers=4, **settings))
    WORK.method.apply(model)
    place(model, torch.device("cpu"), options, trains_base=True)
    changes = SETTINGS | IN_BACKWARD | dict(optimizer=optimizer, options=options)
    training = Trainer(model, examples(), TrainSettings(**changes), workload=WORK)
    training.check()
    return training


STREAMED = MemoryOptions(optimizer_in_backward=True, resident_layers=0)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch", "lion_8bit"])
@pytest.mark.parametrize(
    "options",
    [STREAMED, replace(STREAMED, resident_layers=2, tile_tokens=5), replace(STREAMED, offload_checkpoints=True)],
    ids=["all", "two, in tiles", "checkpoints offloaded"],
)  # fmt: skip
def test_streamed_weights_are_trained_as_resident_ones_to_the_bit(optimizer, options):
    pair = [streamed(each, optimizer=optimizer) for each in (replace(options, resident_layers=None), options)]
    assert len(stream_of(pair[1].model).trained) == 9 * (4 - options.resident_layers)
    pair[1].probe_memory(pair[1].examples)
    steps = [list(training) for training in pair]
    for ours, theirs in zip(*steps, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert pair[0].evaluate(examples()) == pair[1].evaluate(examples())
    settle(pair[1].model)
    named = [dict(training.model.named_parameters()) for training in pair]
    assert all(torch.equal(weight, named[1][name]) for name, weight in named[0].items())
