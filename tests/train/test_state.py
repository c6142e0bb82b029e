"""A trainer put back into a checkpoint's state goes on bit for bit as if nothing had happened."""

import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_trainer import TWO_TOKENS, examples, trainer

from qlora_lite.adapters.files import WEIGHTS_NAME, adapter_tensors
from qlora_lite.adapters.lora.inject import lora_parameters
from qlora_lite.data.tokens.batch import collate
from qlora_lite.errors import CheckpointError, TrainingError
from qlora_lite.train import loss_scale
from qlora_lite.train.causal_lm import TextBatches
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.generators import generator_states, restore_generators
from qlora_lite.train.optim import BITSANDBYTES_NAMES
from qlora_lite.train.state import GENERATORS, OPTIMIZER, STATE, capture, restore

TIMES = ("seconds", "tokens_per_second", "peak_bytes")


def steps_of(training, count=None):
    """Train; return the metrics without those that are times."""
    found = []
    for metrics in training:
        found.append({key: value for key, value in asdict(metrics).items() if key not in TIMES})
        if len(found) == count:
            break
    return found


def saved(training, folder):
    """Write a checkpoint of a trainer to disk and read it again."""
    tensors, state = capture(training)
    return read_checkpoint(write_checkpoint(folder, Checkpoint(training.step, tensors, {STATE: state}), {}, ""))


def state_of(training):
    tensors, numbers = capture(training)
    return {f"{file}/{name}": t for file, content in tensors.items() for name, t in content.items()}, numbers


def assert_same_state(one, other):
    (tensors, numbers), (others, other_numbers) = state_of(one), state_of(other)
    assert tensors.keys() == others.keys() and numbers == other_numbers
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def interrupted(folder, stops, **options):
    """Train to the end, in a new trainer from a checkpoint after each of the stops; return it and its steps."""
    training, found = trainer(**options), []
    for stop in stops:
        found += steps_of(training, stop - training.step)
        checkpoint = saved(training, folder / str(stop))
        torch.manual_seed(99)  # a new process draws from elsewhere
        training = trainer(**options)
        restore(training, checkpoint)
    return training, found + steps_of(training)


@pytest.mark.parametrize("optimizer", [*BITSANDBYTES_NAMES, "adamw_torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_goes_on_bit_for_bit_with_states_of_the_same_type(tmp_path, optimizer, dtype):
    options = dict(optimizer=optimizer, rank=64, weight_decay=0.1, lr_scheduler="cosine", max_steps=3, dtype=dtype)
    whole = trainer(**options)
    steps = steps_of(whole)
    training, found = interrupted(tmp_path, [2], **options)
    assert found == steps
    assert_same_state(training, whole)
    kinds = {tensor.dtype for name, tensor in capture(whole)[0][OPTIMIZER].items() if name.endswith("state1")}
    assert (torch.uint8 in kinds) == ("8bit" in optimizer)


def test_a_run_in_float16_goes_on_at_the_scale_and_the_count_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    options = dict(compute_dtype=torch.float16, dropout=0.1, max_steps=6)

    def of_large_scale():
        training = trainer(**options)
        training.loss_scale.value = 2.0**20  # more than its gradients bear
        return training

    whole = of_large_scale()
    scales = [asdict(whole.loss_scale) for _ in whole]
    assert len({scale["value"] for scale in scales}) > 1 and len({scale["good_steps"] for scale in scales}) > 1
    training = of_large_scale()
    for stop in (2, 3):
        steps_of(training, stop - training.step)
        checkpoint = saved(training, tmp_path / str(stop))
        torch.manual_seed(99)
        training = trainer(**options)
        restore(training, checkpoint)
        assert asdict(training.loss_scale) == scales[stop - 1]
    steps_of(training)
    assert_same_state(training, whole)


@pytest.mark.parametrize(
    "scale", [{"value": 0.5, "good_steps": 1}, {"value": 2.0}, 4.0, {"value": 8.0, "good_steps": -1}]
)
def test_a_loss_scale_that_is_none_is_refused(tmp_path, scale):
    training = trainer()
    steps_of(training, 1)
    checkpoint = saved(training, tmp_path)
    state = checkpoint.documents[STATE] | {"loss_scale": scale}
    with pytest.raises(CheckpointError, match=r"lacks numbers in state\.json"):
        restore(trainer(), replace(checkpoint, documents={STATE: state}))


@pytest.mark.parametrize(
    ("packing", "accumulation", "streaming"),
    [
        (True, 1, False),
        (True, 3, True),
        (False, 1, True),
        (False, 3, False),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in ((True, 1, True), (True, 3, False), (False, 1, False), (False, 3, True))
        ),
    ],
)
def test_every_place_to_stop_gives_the_uninterrupted_run(tmp_path, packing, accumulation, streaming):
    rows = examples(5)
    options = dict(
        rows=rows,
        packing=packing,
        gradient_accumulation_steps=accumulation,
        dropout=0.1,
        max_steps=7,
        order="as-is" if streaming else "shuffle",
        stream=rows if streaming else None,
        warmup_ratio=0.5,
    )
    whole = trainer(**options)
    steps = steps_of(whole)
    assert whole.epoch > 0
    stopped, checkpoints = trainer(**options), []
    for metrics in stopped:  # mid-epoch, at an epoch's end, and one behind it, whatever their length
        checkpoints.append(saved(stopped, tmp_path / str(metrics.step)))
    assert_same_state(stopped, whole)
    for checkpoint in checkpoints[:-1]:
        torch.manual_seed(99)  # a new process draws from elsewhere
        training = trainer(**options)
        restore(training, checkpoint)
        assert steps_of(training) == steps[checkpoint.step :], checkpoint.step
        assert_same_state(training, whole)


@pytest.mark.parametrize("stop", [1, 2])
def test_whether_every_adapter_took_part_is_asked_once_in_a_run_that_goes_on(tmp_path, stop):
    options = dict(rows=[TWO_TOKENS, *examples(3)], packing=False, gradient_accumulation_steps=1, order="as-is")
    training = trainer(**options)
    steps_of(training, stop)
    other = trainer(**options)
    restore(other, saved(training, tmp_path))
    other.model.get_submodule("model.layers.1.mlp.up_proj").lora_B.register_hook(torch.zeros_like)
    if stop == 1:  # of a row that cannot show it
        with pytest.raises(TrainingError, match="1 of the wrapped layers got no gradient"):
            steps_of(other)
    else:
        assert len(steps_of(other)) == 2


def test_two_interruptions_in_one_epoch_see_every_row_once(tmp_path, monkeypatch):
    seen = []

    def watched(_workload, rows):
        batch = collate(rows)
        seen.extend(batch.where)
        return batch

    monkeypatch.setattr(TextBatches, "collate", watched)
    rows = examples(11)
    options = dict(rows=rows, packing=False, max_steps=None, epochs=1.0, gradient_accumulation_steps=2)
    training, steps = interrupted(tmp_path, [2, 4], **options)
    assert training.total_steps == len(steps) == 6
    assert sorted(seen) == sorted(row.where for row in rows)


def test_the_adapter_right_after_a_restore_is_that_of_the_checkpoint(tmp_path):
    training = trainer(dtype=torch.bfloat16)
    steps_of(training, 2)
    checkpoint = saved(training, tmp_path)
    other = trainer(dtype=torch.bfloat16)
    restore(other, checkpoint)
    factors = adapter_tensors(other.model)
    assert factors.keys() == checkpoint.tensors[WEIGHTS_NAME].keys()
    assert all(torch.equal(tensor, checkpoint.tensors[WEIGHTS_NAME][name]) for name, tensor in factors.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in factors.values())


@pytest.mark.parametrize("file", [WEIGHTS_NAME, OPTIMIZER])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "type"])
def test_a_tensor_that_is_missing_too_much_or_of_another_kind_is_fatal(tmp_path, file, fault):
    training = trainer()
    steps_of(training, 1)
    checkpoint = saved(training, tmp_path)
    content = dict(checkpoint.tensors[file])
    name = sorted(content)[0]
    tensor = content.pop(name)
    if fault == "unexpected":
        content |= {name: tensor, "other": tensor}
    elif fault != "missing":
        content[name] = tensor.double() if fault == "type" else tensor.new_zeros(3, 3)
    spoiled = replace(checkpoint, tensors={**checkpoint.tensors, file: content})
    with pytest.raises(CheckpointError, match=rf"the checkpoint's {file} does not fit this run: .*") as caught:
        restore(trainer(), spoiled)
    assert ("other" if fault == "unexpected" else name) in str(caught.value)


@pytest.mark.parametrize("lacking", [WEIGHTS_NAME, OPTIMIZER, GENERATORS, "step", "optimizer"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path, lacking):
    training = trainer()
    steps_of(training, 1)
    checkpoint = saved(training, tmp_path)
    tensors = {file: content for file, content in checkpoint.tensors.items() if file != lacking}
    state = {key: value for key, value in checkpoint.documents[STATE].items() if key != lacking}
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        restore(trainer(), Checkpoint(1, tensors, {STATE: state}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 2}, r"state\.json is of step 2, the checkpoint of step 3"),
        ({"epoch": 10**9}, "step 3 cannot be step 1 of epoch 1000000000"),
        ({"epoch_step": 10**12}, "step 3 cannot be step 1000000000000 of epoch 1"),
        ({"epoch": 0}, "step 3 cannot be step 1 of epoch 0"),
        ({"skipped": 4}, "4 skipped steps and 3 of 4 steps"),
        ({"total_steps": 2}, "0 skipped steps and 3 of 2 steps"),
    ],
    ids=str,
)
def test_a_checkpoint_whose_numbers_contradict_each_other_is_refused(tmp_path, changes, said):
    training = trainer()
    steps_of(training, 3)
    checkpoint = saved(training, tmp_path)
    state = checkpoint.documents[STATE] | changes
    with pytest.raises(CheckpointError, match=f"the checkpoint's numbers contradict each other: {said}"):
        restore(trainer(), replace(checkpoint, documents={STATE: state}))


@pytest.mark.parametrize("steps", [float("nan"), -1.0])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_an_optimizer_s_step_that_is_none_is_refused(tmp_path, optimizer, steps):
    training = trainer(optimizer=optimizer, rank=64)
    steps_of(training, 1)
    checkpoint = saved(training, tmp_path)
    tensors, state = dict(checkpoint.tensors[OPTIMIZER]), checkpoint.documents[STATE]
    if state["optimizer"]:
        state = state | {"optimizer": {name: {**values, "step": steps} for name, values in state["optimizer"].items()}}
    else:
        tensors = {n: torch.full_like(t, steps) if n.endswith(".step") else t for n, t in tensors.items()}
    broken = replace(checkpoint, tensors={**checkpoint.tensors, OPTIMIZER: tensors}, documents={STATE: state})
    with pytest.raises(CheckpointError, match=r"lacks numbers in state\.json|\.step is no number of steps"):
        restore(trainer(optimizer=optimizer, rank=64), broken)


def test_every_random_generator_comes_back():
    device = torch.device("cpu")
    random.gauss(), np.random.normal()  # each leaves a second value waiting
    states = generator_states(device)
    drawn = [random.random(), random.gauss(), np.random.normal(), np.random.rand(), torch.rand(()).item()]
    restore_generators(states, device)
    assert [random.random(), random.gauss(), np.random.normal(), np.random.rand(), torch.rand(()).item()] == drawn


@pytest.mark.parametrize("name", ["torch", "python", "numpy", "numpy_rest"])
def test_a_generator_state_that_is_none_is_an_error(name):
    device = torch.device("cpu")
    states = generator_states(device)
    with pytest.raises(CheckpointError, match="random generators cannot be used"):
        restore_generators(states | {name: torch.zeros(2, dtype=torch.int64)}, device)
    with pytest.raises(CheckpointError, match="random generators cannot be used"):
        restore_generators({key: value for key, value in states.items() if key != name}, device)


def test_weights_that_are_not_finite_are_never_saved():
    training = trainer()
    steps_of(training, 1)
    next(iter(lora_parameters(training.model)))[1].data[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"step 1: the factor .*lora_A\.weight is not finite; no checkpoint"):
        capture(training)


def test_an_adapter_that_does_nothing_after_training_is_never_saved():
    training = trainer()
    capture(training)  # before the first step every B is zero, as it should be
    steps_of(training, 1)
    for name, parameter in lora_parameters(training.model):
        if name.endswith("lora_B"):
            parameter.data.zero_()
    with pytest.raises(TrainingError, match="after 1 updates the adapter still does nothing: it is as it began"):
        capture(training)


def test_a_snapshot_does_not_change_when_training_goes_on():
    training = trainer(optimizer="adamw_8bit", rank=64)
    steps_of(training, 1)
    tensors, _ = capture(training)
    copies = {file: {n: t.clone() for n, t in content.items()} for file, content in tensors.items()}
    steps_of(training, 1)
    assert all(torch.equal(t, tensors[file][n]) for file, content in copies.items() for n, t in content.items())
