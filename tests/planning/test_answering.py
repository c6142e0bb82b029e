"""A model that is only used lies on the device as far as it fits, and answers as one that fits whole."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, UNUSUAL, build_tiny, quantized_pair, random_batch, random_factors
from tiny_runs import logits, tiny_run

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import WEIGHTS_NAME, Adapter, Factors
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.export.agreement import compare, outputs
from qlora_lite.ext.serve import app
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.generate import answer
from qlora_lite.inference.multi_adapter import open_tasks
from qlora_lite.memory.process import (
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    CUDA_LATER_BYTES,
    GROWING_SEGMENT_BYTES,
)
from qlora_lite.models.anatomy import blocks, decoder, device_of
from qlora_lite.models.kernels import kernels_of
from qlora_lite.models.memory_options import MemoryOptions, on_host, place, set_memory_options, stream_of
from qlora_lite.models.skeleton import meta_model
from qlora_lite.offload.stream import ALIGNMENT, spare_bytes
from qlora_lite.offload.tile import Tiled
from qlora_lite.planning import answering
from qlora_lite.planning.answering import (
    MAX_PROMPTS,
    UNPLANNED,
    bytes_on_device,
    memory_to_use,
    placement,
    prompt_bytes,
    prompts_at_once,
)
from qlora_lite.planning.meta_results import NeedsValuesError
from qlora_lite.prepare import model as base_model

CPU, META = torch.device("cpu"), torch.device("meta")
WITH_STATES = {"mamba", "mamba2", "recurrent_gemma"}  # in place of keys and values


def skeleton_of(model_type, **changes):
    return meta_model(build_tiny(model_type, **changes).config, "nf4", True, torch.bfloat16)


def tensors(model):
    """Every tensor of a model once, with the module that has it."""
    found = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found.setdefault(id(tensor), (module, tensor))
    return found.values()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_less_memory_gives_placements_that_need_less_and_fit(model_type, tied):
    model = skeleton_of(model_type, num_hidden_layers=4, tie_word_embeddings=tied)
    prompt, seen = prompt_bytes(model, 100), []
    memory = prompt + bytes_on_device(model, MemoryOptions())
    while not seen or placement(model, 100, memory) != seen[-1]:
        seen.append(placement(model, 100, memory))
        needs = prompt + bytes_on_device(model, seen[-1])
        assert needs <= memory
        memory = needs - 1
    assert seen[0] == MemoryOptions() and seen[-1] == MemoryOptions(
        resident_layers=0, host_embeddings=True, host_head=True
    )
    assert (MemoryOptions(host_embeddings=True) in seen) is not tied
    assert MemoryOptions(host_embeddings=not tied, resident_layers=1) in seen
    assert placement(model, 100, 0) == seen[-1], "what needs least, where nothing fits"
    for options in seen:
        memory = prompt + bytes_on_device(model, options)
        assert placement(model, 100, memory, 2**40) == options
        if options.resident_layers is None:
            assert placement(model, 100, memory, 0) == options
            continue
        streamed = place(skeleton_of(model_type, num_hidden_layers=4, tie_word_embeddings=tied), META, options)
        table = model.get_input_embeddings().weight.nbytes
        pinned = 1 << (table - 1).bit_length() if options.host_head else 0
        on_host = sum(stream_of(streamed).sizes) + spare_bytes(stream_of(streamed).sizes) + pinned
        on_host += table if options.host_embeddings and not (tied and options.host_head) else 0
        assert placement(model, 100, memory, on_host) == options
        assert placement(model, 100, memory, on_host - 1) == replace(options, stream_from="disk")
    assert placement(model, 10_000, prompt + bytes_on_device(model, MemoryOptions())) == seen[-1], "a longer prompt"


@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, *UNUSUAL} - WITH_STATES))
def test_a_longer_prompt_takes_its_cache_at_least(model_type):
    model, real = skeleton_of(model_type), build_tiny(model_type, torch.bfloat16)

    def cached(tokens):
        out = decoder(real)(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=True)
        layers = map(vars, out.past_key_values.layers)
        return sum(x.nbytes for layer in layers for x in layer.values() if isinstance(x, torch.Tensor))

    assert prompt_bytes(model, 120) - prompt_bytes(model, 60) >= cached(120) - cached(60) - 512 * len(blocks(real))


def test_a_budget_is_shared_with_what_the_process_holds(monkeypatch):
    card, gib, given_back = torch.device("cuda", 0), 2**30, []
    monkeypatch.setattr(answering, "free_cached_memory", given_back.append)
    monkeypatch.setattr(answering, "free_bytes", lambda _device: 8 * gib)
    monkeypatch.setattr(answering, "held_bytes", lambda _device: gib)
    assert memory_to_use(card, None) == memory_to_use(card, 24 * gib) == 8 * gib - CUDA_LATER_BYTES
    assert given_back == [card, card]
    assert memory_to_use(card, 6 * gib) == 5 * gib - CUDA_CONTEXT_BYTES
    assert memory_to_use(CPU, 6 * gib) is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_as_many_prompts_are_read_at_once_as_there_is_room_for(device_type):
    model, tokens = skeleton_of("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4), 700
    needs = {n: UNPLANNED * prompt_bytes(model, tokens, n, device_type) for n in (1, 2, 4, 8, 16, 32)}
    assert list(needs.values()) == sorted(needs.values()) and needs[32] > 8 * needs[2] - 7 * needs[1]
    for prompts, room in needs.items():
        assert prompts_at_once(model, tokens, room, device_type) == prompts
        assert prompts_at_once(model, tokens, room - 1, device_type) == max(1, prompts // 2)
    assert prompts_at_once(model, tokens, -1, device_type) == 1


@pytest.fixture
def unplanned(monkeypatch):
    """A skeleton whose own code reads a packed weight, so that it cannot run without values."""
    monkeypatch.setattr("qlora_lite.quant.linear.of_mamba", lambda *_: set())
    return skeleton_of("mamba")


def test_as_many_prompts_as_ever_are_read_at_once_where_nothing_can_be_planned(unplanned):
    assert prompts_at_once(unplanned, 8, 0, "cpu") == MAX_PROMPTS


MEASURE = """
import sys, torch
from test_answering import OneToken, skeleton_of
from tiny import quantized_pair
from qlora_lite.inference.generate import answer
from qlora_lite.memory.meter import PeakMeter, held_bytes
from qlora_lite.planning.answering import prompt_bytes
shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 2048}
count, tokens, new = 16, 1000, 4
model = quantized_pair("llama", dtype=torch.bfloat16, **shape)[0]
answer(model, OneToken(), ["9"], 1)
prompts = ["9" * (tokens - 50 * (i % 5)) for i in range(count)]
before = held_bytes(torch.device("cpu"))
with PeakMeter("cpu") as meter:
    answer(model, OneToken(), prompts, new)
    taken = meter.peak_bytes() - before
print(taken, prompt_bytes(skeleton_of("llama", **shape), tokens + new, count, "cpu"))
"""


def test_prompts_take_no_more_of_a_cpu_s_memory_than_is_reckoned_for_them():
    alone = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}}  # with no memory of other tests to take
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, **alone)
    taken, planned = map(int, out.stdout.split()[-2:])
    kernels = 64 * 2**20  # of a processor other than those that this was measured on
    assert taken <= UNPLANNED * planned + kernels and planned <= 2 * taken


def test_the_weights_themselves_are_no_part_of_a_prompt():
    config = build_tiny("llama", hidden_size=2048, intermediate_size=8192, vocab_size=512).config
    dense = meta_model(config, "none", False, torch.bfloat16)
    assert bytes_on_device(dense, MemoryOptions()) > 240 * 2**20
    assert prompt_bytes(dense, 8) < 200 * 2**20


def test_a_model_that_cannot_run_without_values_leaves_a_share_of_the_memory_to_prompts(unplanned):
    with pytest.raises(NeedsValuesError):
        prompt_bytes(unplanned, 8)
    whole = bytes_on_device(unplanned, MemoryOptions())
    assert placement(unplanned, 8, whole * 4 // 3 + 2) == MemoryOptions() != placement(unplanned, 8, whole * 5 // 4)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma2"])
def test_on_a_gpu_a_prompt_takes_what_was_reckoned(model_type):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}  # the work of fewer is split, with memory for it
    changes, tokens = shape | heads, 1500
    constants = GROWING_SEGMENT_BYTES + CUBLAS_WORKSPACE_BYTES
    expected = prompt_bytes(skeleton_of(model_type, **changes), tokens) - constants
    model = quantized_pair(model_type, dtype=torch.bfloat16, **changes)[0].to("cuda")
    answer(model, OneToken(), ["9"], 2)  # what is taken once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer(model, OneToken(), ["9" * tokens], 2)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.03)


class OneToken:
    """A tokenizer whose every character is one token."""

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=list(map(ord, text)))

    def decode(self, ids, skip_special_tokens):
        return ""


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(),
        MemoryOptions(host_embeddings=True),
        MemoryOptions(resident_layers=2),
        MemoryOptions(resident_layers=0, host_embeddings=True),
        MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True),
    ],
    ids=str,
)
def test_bytes_on_the_device_are_those_that_placing_leaves_there(options):
    expected = bytes_on_device(quantized_pair("llama", num_hidden_layers=4)[0], options)
    model = place(quantized_pair("llama", num_hidden_layers=4)[0], CPU, options)
    found = sum(tensor.nbytes for module, tensor in tensors(model) if not on_host(model, module, tensor))
    slots = stream_of(model).slots if options.resident_layers is not None else ()
    aligned = ALIGNMENT * len(list(tensors(blocks(model)[0])))  # at most, of a slot
    assert expected <= found + sum(slot.nbytes for slot in slots) <= expected + aligned * len(slots)


def random_adapter(model_type):
    adapted = add_lora(quantized_pair(model_type)[0], rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(adapted)
    return Adapter(
        {name: Factors(layer.lora_A.detach(), layer.lora_B.detach(), 6.0) for name, layer in lora_layers(adapted)}, 0.0
    )


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_model_placed_before_its_adapters_gives_the_same_logits(model_type):
    def placed():
        model = quantized_pair(model_type)[0]
        return place(model, CPU, list(answering._placements(model))[-1])

    adapter, streamed = random_adapter(model_type), placed()
    assert torch.equal(logits(streamed), logits(quantized_pair(model_type)[0]))
    whole = attach_adapter(quantized_pair(model_type)[0], adapter)
    assert torch.equal(logits(attach_adapter(streamed, adapter)), logits(whole))
    found = []
    for model in (placed(), quantized_pair(model_type)[0]):
        switch = add_switch(model, {"one": adapter})
        with switch.using("one"):
            found.append(logits(model))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], logits(model), atol=1e-2), "the adapter changes something"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_tiled_model_takes_adapters(model_type):
    adapter, tiled = random_adapter(model_type), [quantized_pair(model_type)[0] for _ in range(2)]
    for model in tiled:
        set_memory_options(model, MemoryOptions(tile_tokens=4))
    expected = logits(attach_adapter(quantized_pair(model_type)[0], adapter))
    with add_switch(tiled[0], {"one": adapter}).using("one"):
        assert torch.allclose(logits(tiled[0]), expected, atol=1e-4)
    assert torch.allclose(logits(attach_adapter(tiled[1], adapter)), expected, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_a_small_gpu_evaluates_answers_and_compares_as_a_large_one(tmp_path, monkeypatch, caplog, device, tied):
    run = tiny_run(tmp_path, overrides=[f"model.device={device}"], num_hidden_layers=4, tie_word_embeddings=tied)
    found, placed, some = [], [], MemoryOptions(resident_layers=1, host_embeddings=not tied)
    monkeypatch.setattr(base_model, "place", lambda *args: placed.append(args[-1]) or place(*args))
    small = needed(open_trained(run), some)
    for memory, host in ((2**40, 2**40), (small, 2**40), (0, 2**40), (small, 0)):
        monkeypatch.setattr(base_model, "memory_to_use", lambda _device, _budget, memory=memory: memory)
        monkeypatch.setattr(base_model, "free_bytes", lambda _device, host=host: host)
        found.append(uses(run, device))
    for loss, answer_text, alike in found[1:]:
        assert answer_text == found[0][1]
        assert loss == pytest.approx(found[0][0], rel=1e-6), "a head in slices may round otherwise"
        assert alike == pytest.approx(found[0][2], rel=1e-4)
    said = [message.partition("in host memory: ")[2] for message in caplog.messages if "no room for all" in message]
    table = "" if tied else "embeddings"
    places = [
        ", ".join(filter(None, (table, "3 of 4 blocks"))),
        "embeddings, head, 4 of 4 blocks",
        f"{table or 'nothing'}; on the disk: 3 of 4 blocks",
    ]
    assert said == [place for place in places for _ in range(3)]
    chosen = (
        some,
        MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True),
        replace(some, stream_from="disk"),
    )
    assert placed == [options for options in chosen for _ in range(3)]


@pytest.mark.parametrize("use", ["base", "evaluation", "tasks", "generate", "serve"])
def test_the_device_has_room_for_the_adapters_and_the_context(tmp_path, monkeypatch, command, use):
    run, placed = tiny_run(tmp_path, num_hidden_layers=4), []
    twin, trained = shutil.copytree(run, tmp_path / "twin"), open_trained(run)
    longer = (run / "recipe.yaml").read_text().replace("max_tokens: 128", "max_tokens: 300")
    (twin / "recipe.yaml").write_text(longer)
    uses_of_model = {
        "base": trained.build_base,
        "tasks": lambda: open_tasks([run, twin]),
        "evaluation": lambda: evaluate_recipe(trained.recipe, trained.adapter, 0),
        "generate": lambda: command("generate", run, "--prompt", "3?", "--max-new-tokens", 1, "--context-tokens", 300),
        "serve": lambda: command("serve", run, "--context-tokens", 300),
    }
    monkeypatch.setattr(app, "run_server", lambda *_arguments: None)
    longest = trained if use in ("base", "evaluation") else open_trained(twin)
    enough = needed(longest, MemoryOptions())
    if use == "tasks":  # both adapters
        enough += (run / "adapter" / WEIGHTS_NAME).stat().st_size
    assert longest is trained or enough > needed(trained, MemoryOptions()) + 2**19
    monkeypatch.setattr(base_model, "place", lambda *args: placed.append(args[-1]) or place(*args))
    for memory, expected in ((enough, 0), (enough - 1, 1)):
        monkeypatch.setattr(base_model, "memory_to_use", lambda _device, _budget, memory=memory: memory)
        uses_of_model[use]()
        assert len(placed) == expected


def needed(trained, options):
    """What a run's model takes of a GPU beside its longest row and its adapter."""
    skeleton, adapter = trained.skeleton(), (trained.adapter / WEIGHTS_NAME).stat().st_size
    return prompt_bytes(skeleton, trained.recipe.data.max_tokens) + bytes_on_device(skeleton, options) + adapter


def uses(run, device):
    """What a run's evaluation says, its model in a conversation, and the base beside the trained model."""
    trained, session = open_trained(run), open_session(run, max_new_tokens=6)
    assert device_of(session.tasks.model).type == device
    session.say("3?")
    model = trained.build_base()
    base = outputs(model, [random_batch(vocabulary=120)])
    adapted = outputs(attach_adapter(model, trained.read_adapter(trained.skeleton())), [random_batch(vocabulary=120)])
    assert adapted.hidden.device.type == "cpu", "of all rows: more than a GPU may have room for"
    figures = evaluate_recipe(trained.recipe, trained.adapter, 3)
    figures |= figures.pop("metrics")["exact_match"]
    return {key: value for key, value in figures.items() if key != "adapter"}, session.reply(), compare(adapted, base)


def test_a_run_is_used_in_the_tiles_of_its_plan(tmp_path):
    run = tiny_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    for tile in (None, 16):
        summary["plan"] = {"chosen": {"memory.tile_tokens": tile or "off"}}
        (run / "summary.json").write_text(json.dumps(summary))
        trained = open_trained(run)
        model = trained.build_base()
        tiles = [module.tile_tokens for module in model.modules() if isinstance(module, Tiled)]
        assert set(tiles) == ({tile} if tile else set())
        assert not kernels_of(model), "which nobody has tried"
    for chosen in ({"memory.of_another_version": 1}, None, [1]):
        summary["plan"] = {"chosen": chosen}
        (run / "summary.json").write_text(json.dumps(summary))
        assert open_trained(run).recipe.memory == trained.recipe.memory.model_copy(update={"tile_tokens": "auto"})
