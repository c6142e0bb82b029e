"""The rows of a step are the same however they are cut into micro-batches."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_trainer import SETTINGS, examples, trainer

from qlora_lite.data.tokens.batch import ORDERS
from qlora_lite.errors import TrainingError
from qlora_lite.train import epochs as epochs_module
from qlora_lite.train.epochs import Epochs
from qlora_lite.train.settings import TrainSettings


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.sampled_from(ORDERS), st.booleans())
def test_the_steps_of_an_epoch_have_the_same_rows_in_micro_batches_of_every_size(lengths, order, packing):
    steps = []
    for packs, micro_batches in ((1, 6), (2, 3), (6, 1)):
        changes = {"micro_batch_size": packs, "gradient_accumulation_steps": micro_batches, "max_tokens": 64}
        epochs = Epochs(lengths, lengths, TrainSettings(**SETTINGS | changes | {"order": order, "packing": packing}))
        steps.append([[row for rows in step for row in rows] for step in epochs.steps(0)])
        assert all(len(step) <= micro_batches for step in epochs.steps(0))
    assert steps[0] == steps[1] == steps[2]
    assert sorted(row for step in steps[0] for row in step) == list(range(len(lengths)))


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 11), (2.1, 21), (1.25, 13), (0.05, 1), (3, 30)])
def test_a_part_of_an_epoch_is_what_it_is_in_decimals(epochs, steps):
    changes = {"max_steps": None, "epochs": epochs, "packing": False, "gradient_accumulation_steps": 1}
    assert (
        Epochs([5] * 10, [4] * 10, TrainSettings(**SETTINGS | changes | {"micro_batch_size": 1})).total_steps() == steps
    )


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.sampled_from(ORDERS),
    st.booleans(),
    st.one_of(st.integers(1, 9), st.fractions(Fraction(1, 50), 3).map(float)),
)
def test_the_largest_micro_batch_is_that_of_all_steps_that_the_run_has(lengths, order, packing, until):
    many = {"max_steps": until} if isinstance(until, int) else {"max_steps": None, "epochs": until}
    settings = TrainSettings(**SETTINGS | many | {"max_tokens": 64, "order": order, "packing": packing})
    targets = [(7 * length) % 11 + 1 for length in lengths]
    pictures = np.array([(length % 3, length % 2) for length in lengths])
    epochs = Epochs(lengths, targets, settings, pictures=pictures)
    per_epoch, whole = [epochs.steps(epoch) for epoch in range(12)], until
    if isinstance(until, float):
        whole = sum(map(len, per_epoch[: int(until)]))
        whole += ceil(Fraction(until - int(until)).limit_denominator(1_000_000) * len(per_epoch[int(until)]))
    assert epochs.total_steps() == max(1, whole)
    seen = [rows for steps in per_epoch for step in steps for rows in step]
    micro_batches = [rows for step in [step for steps in per_epoch for step in steps][: max(1, whole)] for rows in step]
    largest, most = epochs.largest()
    assert largest in seen and sum(lengths[row] for row in largest) == most.tokens
    assert most == (
        max(sum(lengths[row] for row in rows) for rows in micro_batches),
        max(map(len, micro_batches)),
        max(lengths[row] for rows in micro_batches for row in rows),
        max(sum(targets[row] for row in rows) for rows in micro_batches),
        max(sum(pictures[row, 0] for row in rows) for rows in micro_batches),
        max(pictures[row, 1] for rows in micro_batches for row in rows),
    )


def test_of_a_run_without_an_end_on_few_rows_no_micro_batch_is_taken_to_have_more_than_all_of_them(monkeypatch):
    monkeypatch.setattr(epochs_module, "LOOKED_AT", 24)
    endless = {"max_steps": 10**9, "max_tokens": 4096, "packing": True, "micro_batch_size": 8}
    pictures = np.ones((24, 2), np.int64)
    _, most = Epochs([20] * 24, [7] * 24, TrainSettings(**SETTINGS | endless), pictures=pictures).largest()
    assert most == (480, 24, 20, 168, 24, 1)


@pytest.mark.parametrize(("packing", "tokens"), [(True, 2 * 64), (False, 60 + 59)])
def test_of_a_run_without_an_end_a_part_is_looked_at_and_the_rest_taken_to_be_as_full_as_can_be(
    packing, tokens, monkeypatch
):
    monkeypatch.setattr(epochs_module, "LOOKED_AT", 3 * 60)
    endless = {"max_steps": 10**9, "max_tokens": 64, "packing": packing, "micro_batch_size": 2}
    epochs = Epochs(range(1, 61), range(60), TrainSettings(**SETTINGS | endless))
    assert epochs.total_steps() == 10**9
    _, most = epochs.largest()
    assert most.tokens == tokens >= most.targets and most.longest == 60
    for epoch in range(12):
        for rows in (rows for step in epochs.steps(epoch) for rows in step):
            assert sum(epochs.lengths[row] for row in rows) <= most.tokens
            assert sum(epochs.targets[row] for row in rows) <= most.targets


def test_a_run_without_rows_is_an_error_and_no_endless_loop():
    with pytest.raises(TrainingError, match="there are no rows to train on"):
        trainer(rows=[])
    training = trainer(stream=(), packing=False, order="as-is")
    with pytest.raises(TrainingError, match="the stream of rows has none"):
        next(iter(training))


def test_a_stream_is_not_read_for_a_step_behind_the_last():
    def stream():
        yield from examples(5)  # of which one is looked ahead at
        raise AssertionError("nobody needs this row")

    training = trainer(stream=stream(), max_steps=4, packing=False, order="as-is", gradient_accumulation_steps=1)
    assert [metrics.step for metrics in training] == [1, 2, 3, 4]
