"""What each memory option computes and moves again, counted exactly."""

from dataclasses import replace

import pytest
import torch
from counted import counted
from memory_option_cases import rotary_flops
from tiny import quantized_pair, random_batch

from qlora_lite.adapters.lora.inject import add_lora, lora_layers, lora_parameters
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.quant.linear import frozen_weight
from qlora_lite.quant.product import materialize, merged
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import hidden_states, prepare
from qlora_lite.train.step import accumulate_gradients

DEPTH, RANK, LENGTH = 4, 3, 32


@pytest.fixture(scope="module")
def model():
    return add_lora(quantized_pair("llama", num_hidden_layers=DEPTH)[0], rank=RANK, dtype=torch.float32)


def inputs(model):
    return prepare(random_batch((LENGTH,)), device_of(model))


def step_work(model, options, device_type="cuda"):
    """Return the work of a step once the blocks know what they may leave out."""
    set_memory_options(model, options)
    model.train()
    with planning_for(device_type):
        accumulate_gradients(causal_lm().with_options(options), model, [inputs(model)])
        with counted() as counter:
            accumulate_gradients(causal_lm().with_options(options), model, [inputs(model)])
    for _, parameter in lora_parameters(model):
        parameter.grad = None
    return counter.work


def step_flops(model, options, device_type="cuda"):
    return step_work(model, options, device_type).flops


def forward_flops(model, device_type="cuda"):
    """Return the operations of all blocks' forward."""
    set_memory_options(model, MemoryOptions("none"))
    with torch.no_grad(), planning_for(device_type), phase("forward"), counted() as counter:
        hidden_states(model, inputs(model))
    return counter.work.flops


def product_flops(model, name):
    """Return the operations of ``x W^T + low B^T`` in the layers of a name, over all blocks."""
    return sum(
        2 * LENGTH * layer.base.out_features * (layer.base.in_features + RANK)
        for path, layer in lora_layers(model)
        if path.endswith(name)
    )


def test_keeping_everything_computes_each_product_once_forward_and_its_gradients_once(model):
    linear = 0
    for number, (path, layer) in enumerate(lora_layers(model)):
        inside, outside = layer.base.in_features, layer.base.out_features
        first = number < 3 and path.rpartition(".")[2] in (
            "q_proj",
            "k_proj",
            "v_proj",
        )  # their input needs no gradient
        linear += 2 * LENGTH * (inside * outside + RANK * (inside + outside))  # forward
        linear += 2 * LENGTH * RANK * (inside + 2 * outside)  # gradients of low, A and B
        linear += 0 if first else 2 * LENGTH * (inside * outside + RANK * inside)  # gradient of x
    with planning_for("cuda"), counted() as attention:
        q = torch.zeros(1, 4, LENGTH, 16, requires_grad=True)
        k, v = (torch.zeros(1, 2, LENGTH, 16, requires_grad=True) for _ in range(2))
        with phase("forward"):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out.backward(torch.ones_like(out))
    scores = 4 * LENGTH * LENGTH * 16 // 2  # of four heads, half of each seen
    assert attention.work.flops == 2 * scores * (2 + 5)  # forward: 2 products; backward: the scores again, 4 gradients
    is_target = len(inputs(model).targets)
    head = 2 * 2 * is_target * 160 * 64  # logits, and their gradient back to the hidden states
    once = linear + DEPTH * attention.work.flops + head + rotary_flops(model, LENGTH)
    assert step_flops(model, MemoryOptions("none")) == once


def test_checkpointing_computes_a_block_again_but_for_its_last_product(model):
    again = forward_flops(model) - rotary_flops(model, LENGTH) - product_flops(model, "down_proj")
    assert step_flops(model, MemoryOptions()) - step_flops(model, MemoryOptions("none")) == again


@pytest.mark.parametrize("kept", [1, 3, DEPTH])
def test_kept_blocks_are_not_recomputed(model, kept):
    every, none = step_flops(model, MemoryOptions()), step_flops(model, MemoryOptions("none"))
    assert (
        step_flops(model, MemoryOptions(uncheckpointed_layers=kept)) - none == (every - none) * (DEPTH - kept) // DEPTH
    )


def test_blocks_of_two_kinds_and_one_class_leave_out_as_much_as_if_each_were_a_class_of_its_own(monkeypatch):
    model = add_lora(quantized_pair("qwen3_5_text")[0], rank=RANK, dtype=torch.float32)
    found = step_flops(model, MemoryOptions())
    monkeypatch.setattr("qlora_lite.models.memory_options._kind", id)
    assert found == step_flops(model, MemoryOptions())


@pytest.mark.parametrize("every", [2, 3, DEPTH])
def test_of_a_stretch_only_the_last_block_leaves_out_its_last_product(model, every):
    inside = DEPTH - -(-DEPTH // every)  # blocks that are not the last of their segment
    more = step_flops(model, MemoryOptions(layers_per_checkpoint=every)) - step_flops(model, MemoryOptions())
    assert more == product_flops(model, "down_proj") // DEPTH * inside


def test_on_a_cpu_attention_is_not_recomputed_either(model):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    low = sum(2 * LENGTH * RANK * layer.base.in_features for _, layer in lora_layers(model))  # x A^T of every layer
    again = low + sum(product_flops(model, name) for name in names)
    assert step_flops(model, MemoryOptions(), "cpu") - step_flops(model, MemoryOptions("none"), "cpu") == again


@pytest.mark.parametrize("kept", [0, 1])
def test_with_its_results_kept_attention_is_not_recomputed(model, kept):
    scores = 2 * LENGTH * LENGTH * 64 // 2  # of all heads, half of each seen
    attention = 2 * scores  # and the sum of values
    block, selective = (
        step_flops(model, MemoryOptions(way, uncheckpointed_layers=kept)) for way in ("block", "selective")
    )
    assert block - selective == (DEPTH - kept) * attention
    assert step_work(model, MemoryOptions("selective"), "cpu") == step_work(model, MemoryOptions(), "cpu")


def test_kept_results_of_attention_travel_with_the_inputs(model):
    inputs_only, both = (
        step_work(model, MemoryOptions(way, offload_checkpoints=True)) for way in ("block", "selective")
    )
    input_bytes, logsumexp_bytes = 4 * LENGTH * 64, 4 * LENGTH * 4  # float32, four heads
    journeys = DEPTH + DEPTH - 1  # the last block's come back before they have left
    assert inputs_only.bus_bytes == journeys * input_bytes
    assert both.bus_bytes == journeys * (2 * input_bytes + logsumexp_bytes)
    assert step_work(model, MemoryOptions("selective")).flops == both.flops < inputs_only.flops


@pytest.mark.parametrize("chunk", [LENGTH, 10])
def test_a_head_in_host_memory_travels_once_for_each_chunk_of_the_loss(chunk):
    options = MemoryOptions(host_head=True, loss_chunk_tokens=chunk)
    model = add_lora(quantized_pair("llama", num_hidden_layers=DEPTH)[0], rank=RANK, dtype=torch.float32)
    place(model, torch.device("cpu"), options)
    chunks = -(-len(inputs(model).targets) // chunk)
    assert step_work(model, options).bus_bytes == chunks * model.lm_head.weight.nbytes


@pytest.mark.parametrize("tile_tokens", [8, LENGTH])
def test_tiles_in_a_checkpointed_block_cost_no_product_more(model, tile_tokens):
    assert step_flops(model, MemoryOptions(tile_tokens=tile_tokens)) == step_flops(model, MemoryOptions())


def test_where_tensors_lie_changes_no_operation(model):
    assert step_flops(model, MemoryOptions(offload_checkpoints=True)) == step_flops(model, MemoryOptions())


def unpacking_bytes(model, *names):
    """Return the bytes that dequantising the layers of some names once moves, over all blocks."""
    with phase("forward"), counted() as counter:
        for path, layer in lora_layers(model):
            if path.endswith(names):
                materialize(*frozen_weight(layer.base), torch.float32)
    return counter.work.moved_bytes


def reused_by_attention(model):
    """Return the bytes of one dequantisation of what attention multiplies by in a recomputation and again in backward.

    The first block's q, k and v are not among it: their input needs no gradient.
    """
    attention = unpacking_bytes(model, "q_proj", "k_proj", "v_proj", "o_proj")
    return attention - unpacking_bytes(model, *(f"layers.0.self_attn.{name}_proj" for name in "qkv"))


def test_reuse_unpacks_each_weight_of_a_block_twice_a_step_and_not_three_times(model):
    before, after = step_work(model, MemoryOptions()), step_work(model, MemoryOptions(cache_dequantized=True))
    # down_proj's is dequantised twice in any case: its product is left out of the recomputation
    saved = reused_by_attention(model) + unpacking_bytes(model, "gate_proj", "up_proj")
    assert before.moved_bytes - after.moved_bytes == saved > 0
    assert before._replace(moved_bytes=0, operations=0) == after._replace(moved_bytes=0, operations=0)


@pytest.mark.parametrize("tile_tokens", [8, LENGTH])
def test_with_reuse_all_tiles_share_what_one_unpacks(model, tile_tokens):
    options, tiles = MemoryOptions(tile_tokens=tile_tokens), LENGTH // tile_tokens
    before, after = step_work(model, options), step_work(model, replace(options, cache_dequantized=True))
    # without: gate and up forward, again and backward in each tile, down forward and backward; with: all of them twice
    saved = (3 * tiles - 2) * unpacking_bytes(model, "gate_proj", "up_proj")
    saved += (2 * tiles - 2) * unpacking_bytes(model, "down_proj")
    assert before.moved_bytes - after.moved_bytes == saved + reused_by_attention(model)
    assert before._replace(moved_bytes=0, operations=0) == after._replace(moved_bytes=0, operations=0)


def test_merged_weights_are_made_once_a_step_and_not_for_each_product():
    model = add_lora(quantized_pair("llama", num_hidden_layers=DEPTH)[0], rank=RANK, merge_aware="nf4")
    set_memory_options(model, MemoryOptions())
    with phase("forward"), counted() as once, torch.no_grad():
        for _, layer in lora_layers(model):
            merged(*layer.described)
    before, after = step_work(model, MemoryOptions()), step_work(model, MemoryOptions(cache_merged=True))
    # of down_proj, whose product is left out of the recomputation, backward makes it again
    assert before.moved_bytes - after.moved_bytes == 2 * once.work.moved_bytes
    assert before.flops - after.flops == 2 * once.work.flops and before.update_bytes == 0
    products = sum(tensor.nbytes for _, layer in lora_layers(model) for tensor in (layer.lora_A, layer.lora_B))
    assert after.update_bytes > once.work.moved_bytes + products


def test_blocks_that_keep_everything_have_nothing_to_unpack_again(model):
    assert step_work(model, MemoryOptions("none", cache_dequantized=True)) == step_work(model, MemoryOptions("none"))
