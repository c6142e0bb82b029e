"""What fused kernels spare a step on a GPU, as its plan counts it."""

import pytest
from jobs import changed, new_job
from transformers import AutoConfig

from qlora_lite.models import kernels
from qlora_lite.models.families import known_config
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.simulate import simulate
from qlora_lite.train.batches import BatchShape

EIGHT_B = AutoConfig.for_model(**known_config("meta-llama/Llama-3.1-8B"))
MAX_BYTES = 235e9  # of a step of 2 x 2,048 tokens, blocks recomputed; 391e9 with plain operators


def job_of(lengths, config=EIGHT_B, **options):
    rows = BatchShape(lengths, sum(lengths) - len(lengths))
    return new_job(config, rows, None, device_type="cuda", options=MemoryOptions(cache_dequantized=True, **options))


def test_a_step_of_an_8b_model_moves_few_bytes_beside_its_products():
    assert simulate(job_of((2048, 2048))).work.moved_bytes <= MAX_BYTES


def test_liger_s_kernels_are_counted_where_it_is_installed_with_the_memory_of_plain_operators(monkeypatch):
    simulations = []
    for packages in ([], ["liger"]):
        monkeypatch.setattr(kernels, "installed", lambda packages=packages: packages)
        simulations.append(simulate(job_of((2048, 2048))))
    without, liger = simulations
    numbers = 32 * 4096 * 20 * EIGHT_B.intermediate_size  # bytes spared, both runs and backward
    assert without.work.moved_bytes - liger.work.moved_bytes == pytest.approx(numbers, rel=0.01)
    assert liger.work.operations < without.work.operations and liger.work.flops == without.work.flops
    assert liger.moments.keys() == without.moments.keys()
    for key, moment in without.moments.items():
        assert liger.moments[key].total >= moment.total
    assert liger.peak().total == without.peak().total


def test_plain_operators_are_counted_as_such():
    plain = simulate(job_of((2048, 2048), kernels="plain")).work
    assert plain.moved_bytes > 1.5 * MAX_BYTES
    compiled = job_of((2048, 2048), compile=True)
    assert simulate(compiled).work == plain._replace(operations=0)


@pytest.mark.parametrize("checkpointing", ["block", "none"])
def test_64_sequences_cost_what_one_of_as_many_tokens_does_but_for_its_scores(checkpointing):
    one, many = (simulate(job_of(rows, checkpointing=checkpointing)).work for rows in ((4096,), (64,) * 64))
    assert many.operations <= 1.05 * one.operations and many.moved_bytes <= 1.05 * one.moved_bytes
    assert many.flops < 0.95 * one.flops


@pytest.mark.parametrize("model", ["mistralai/Mistral-7B-v0.3", "google/gemma-3-1b-it"])
def test_windows_are_part_of_the_call(model):
    config = AutoConfig.for_model(**known_config(model))
    config.sliding_window = 512
    one, many = (simulate(job_of(rows, config)).work for rows in ((2048,), (64,) * 32))
    assert many.operations <= 1.05 * one.operations and many.moved_bytes <= 1.05 * one.moved_bytes


def test_a_run_that_repeats_itself_attends_to_one_sequence_after_the_other():
    jobs = [changed(job_of(rows), deterministic=True) for rows in ((512,), (64,) * 8)]
    one, many = (simulate(job).work for job in jobs)
    assert many.operations > 1.1 * one.operations and many.moved_bytes < 1.1 * one.moved_bytes


@pytest.mark.parametrize(
    ("config", "most", "share"),
    [
        (known_config("google/gemma-2-9b"), 20_000, 0.65),
        (known_config("unsloth/gpt-oss-20b-BF16"), 15_000, 0.65),
    ],
    ids=["gemma-2-9b", "gpt-oss-20b"],
)
def test_capped_scores_and_sinks_take_one_call_a_layer_but_on_turing(config, most, share):
    job = new_job(AutoConfig.for_model(**config), BatchShape((4096,), 4095), device_type="cuda")
    at_once, block_by_block = (simulate(changed(job, capability=each)).work for each in ((8, 0), (7, 5)))
    assert at_once.operations < most < block_by_block.operations
    assert at_once.moved_bytes < share * block_by_block.moved_bytes
