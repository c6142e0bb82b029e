"""The longest sequence is the longest for which the search has a plan, whichever memory is short."""

from dataclasses import replace

import pytest
import torch
from jobs import changed
from remembered_plans import remember_simulations
from test_simulate import config_of, job_for

from qlora_lite.errors import DoesNotFitError
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.candidate import Step, choose
from qlora_lite.planning.largest import LENGTH_STEP
from qlora_lite.planning.length import longest_job
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.planning.predict import predict
from qlora_lite.planning.search import SMALL_TILE_TOKENS, search, with_less_on_host
from qlora_lite.train.batches import BatchShape

CARD, DEPTH, FAR = machine_of_gpu(find_gpu("rtx-4060")), 5, 4096
FIXED = {"checkpointing": "block", "uncheckpointed_layers": 0, "tile_tokens": None, "cache_dequantized": False}
ON_HOST = {"offload_checkpoints": True, "host_embeddings": True, "host_head": True}


@pytest.fixture(scope="module", autouse=True)
def _simulated_once():
    with pytest.MonkeyPatch.context() as patch:
        remember_simulations(patch.setattr)
        yield


def longest_tokens(*given):
    return longest_job(*given).shape.tokens


def step_of(tokens, depth=DEPTH, **fixed):
    config = config_of("llama", num_hidden_layers=depth, intermediate_size=1024)
    job = job_for(config, compute_dtype=torch.bfloat16, device_type="cuda", eval_shape=None)
    return Step(job, BatchShape((tokens,), tokens - 1), 1, 1, FIXED | fixed)


def needs(tokens, resident_layers, depth=DEPTH, **options):
    """Return the bytes on the device and on the host of one way to run the step."""
    step = step_of(tokens, depth)
    options = MemoryOptions(
        loss_chunk_tokens=AUTO_CHUNK_TOKENS, resident_layers=resident_layers, **FIXED | ON_HOST | options
    )
    found = predict(changed(step.job, shape=step.pack, options=options))
    return found.peak_bytes, found.host_bytes


@pytest.mark.parametrize(
    ("depth", "resident", "more_on_device", "offload_checkpoints"),
    [
        (5, 0, 0, True),
        (5, 2, 0, True),
        (5, 2, 0, False),
        (5, None, 0, False),
        pytest.param(5, 2, 50_000, True, marks=pytest.mark.slow),
        pytest.param(5, 3, 0, True, marks=pytest.mark.slow),
        (8, 3, 0, True),  # deep enough to be continued in a straight line
    ],
)
@pytest.mark.slow
def test_one_step_more_has_no_plan(depth, resident, more_on_device, offload_checkpoints):
    fixed = ON_HOST | {"offload_checkpoints": offload_checkpoints}
    device, host = needs(1024, resident, depth, **fixed)
    device += more_on_device
    found = longest_tokens(step_of(64, depth, **fixed), device, host, 64, FAR)
    for tokens, fits in ((found, True), (found + LENGTH_STEP, False)):
        candidates = search(step_of(tokens, depth, **fixed), replace(CARD, host_bytes=host), device)
        assert (choose(candidates, device) is not None) == fits
    assert 1024 <= found < FAR


def test_where_the_host_has_no_room_for_any_block_small_tiles_are_tried_with_all_on_the_device():
    device, host = needs(FAR, None, tile_tokens=SMALL_TILE_TOKENS)
    step = step_of(FAR, **ON_HOST)
    del step.fixed["tile_tokens"], step.fixed["offload_checkpoints"]
    chosen = choose(search(step, replace(CARD, host_bytes=host), device), device)
    assert chosen.options.tile_tokens == SMALL_TILE_TOKENS and chosen.options.resident_layers is None


@pytest.mark.slow
def test_where_files_take_the_block_inputs_the_host_s_room_is_for_weights():
    folder = {"offload_folder": "a folder that a plan does not look for"}
    device, host = needs(1024, None, host_embeddings=False, host_head=False, **folder)
    step = step_of(64, **folder)
    assert longest_tokens(step, device, host, 64, FAR) >= 1024
    assert choose(search(step_of(1024, **folder), replace(CARD, host_bytes=host), device), device) is not None


@pytest.mark.slow
def test_the_last_blocks_may_be_kept_beside_a_limit_of_the_host():
    step = step_of(64, 8, uncheckpointed_layers=2, offload_checkpoints=True)
    assert longest_tokens(step, 2**30, 2**31, 64, 512) == 512
    device, host = needs(1024, 2, 8, uncheckpointed_layers=2)
    without = replace(step, fixed=step.fixed | {"stream_from": "host"})
    assert longest_tokens(without, device, host, 64, FAR) >= 1024 > longest_tokens(without, device, host - 1, 64, FAR)
    assert longest_tokens(step, device, host - 1, 64, FAR) >= 1024


def test_where_the_host_has_no_room_for_weights_they_are_read_from_the_disk():
    (device, all_of_them), (_, two) = needs(1024, 0), needs(1024, 0, stream_from="disk")
    assert two < all_of_them
    assert longest_tokens(step_of(64, **ON_HOST), device, two, 64, FAR) >= 1024


@pytest.mark.parametrize(("quant", "ways"), [("nf4", 2), ("none", 0)])
def test_only_weights_that_were_prepared_in_a_file_are_read_from_it(quant, ways):
    step = step_of(64)
    step = replace(step, job=changed(step.job, quant=quant))
    assert sum("stream_from" in each.fixed for each in with_less_on_host(step)) == ways


def test_of_a_single_block_nothing_is_streamed_for_the_longest():
    step = step_of(64)
    step.job.workload.spec.config.num_hidden_layers = 1
    plain = predict(
        changed(step.job, shape=step.pack, options=MemoryOptions(loss_chunk_tokens=AUTO_CHUNK_TOKENS, **FIXED))
    )
    assert longest_tokens(step, plain.peak_bytes, None, 64, FAR) == LENGTH_STEP


def test_with_room_for_nothing_on_the_host_all_stays_on_the_device():
    device, _ = needs(512, None, offload_checkpoints=False, host_embeddings=False, host_head=False)
    assert longest_tokens(step_of(64), device, 0, 64, FAR) == 512


def test_without_a_limit_of_the_host_the_device_s_alone_counts():
    device, _ = needs(1024, 0)
    assert longest_tokens(step_of(64, **ON_HOST), device, None, 64, FAR) == 1024


@pytest.mark.parametrize(("less_on_device", "less_on_host", "memory"), [(1, 0, "$"), (0, 1, " host memory$")])
def test_the_memory_that_has_no_room_for_the_shortest_is_named(less_on_device, less_on_host, memory):
    device, host = needs(LENGTH_STEP, 0)
    step = step_of(64, resident_layers=0, stream_from="host", **ON_HOST)
    with pytest.raises(DoesNotFitError, match=f"even the smallest needs .*iB of .*iB{memory}"):
        longest_tokens(step, device - less_on_device, host - less_on_host, 64, FAR)


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_oss"])
def test_a_search_with_too_little_memory_ends_for_families_whose_mlps_are_no_plain_functions(model_type):
    step = Step(job_for(config_of(model_type), eval_shape=None), BatchShape((40,), 39), 1, 1)
    found = search(step, CARD, 1)
    assert any(candidate.options.tile_tokens for candidate in found) and choose(found, 1) is None


@pytest.mark.parametrize("offload_checkpoints", [True, False])
def test_of_a_model_that_computes_so_many_tokens_at_most_no_more_are_looked_at(offload_checkpoints):
    step = step_of(64, offload_checkpoints=offload_checkpoints)
    step = replace(step, job=changed(step.job, config=config_of("gpt_neo")))
    assert longest_tokens(step, 2**30, 2**31, 256, FAR) == 128
