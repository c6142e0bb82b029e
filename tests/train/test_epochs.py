"""The rows of a step are the same however they are cut into micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_trainer import SETTINGS, examples, trainer

from qlora_lite.data.batch import ORDERS
from qlora_lite.train.epochs import Epochs
from qlora_lite.train.settings import TrainSettings


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.sampled_from(ORDERS), st.booleans())
def test_the_steps_of_an_epoch_have_the_same_rows_in_micro_batches_of_every_size(lengths, order, packing):
    steps = []
    for packs, micro_batches in ((1, 6), (2, 3), (6, 1)):
        changes = {"micro_batch_size": packs, "gradient_accumulation_steps": micro_batches, "max_tokens": 64}
        epochs = Epochs(lengths, TrainSettings(**SETTINGS | changes | {"order": order, "packing": packing}))
        steps.append([[row for rows in step for row in rows] for step in epochs.steps(0)])
        assert all(len(step) <= micro_batches for step in epochs.steps(0))
    assert steps[0] == steps[1] == steps[2]
    assert sorted(row for step in steps[0] for row in step) == list(range(len(lengths)))


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 11), (2.1, 21), (1.25, 13), (0.05, 1), (3, 30)])
def test_a_part_of_an_epoch_is_what_it_is_in_decimals(epochs, steps):
    changes = {"max_steps": None, "epochs": epochs, "packing": False, "gradient_accumulation_steps": 1}
    assert Epochs([5] * 10, TrainSettings(**SETTINGS | changes | {"micro_batch_size": 1})).total_steps() == steps


def test_a_stream_is_not_read_for_a_step_behind_the_last():
    def stream():
        yield from examples(5)  # of which one is looked ahead at
        raise AssertionError("nobody needs this row")

    training = trainer(stream=stream(), max_steps=4, packing=False, order="as-is", gradient_accumulation_steps=1)
    assert [metrics.step for metrics in training] == [1, 2, 3, 4]
