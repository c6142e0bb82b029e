"""No step of a run holds more than its memory probe did, whatever else than its tokens makes a micro-batch large."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_trainer import trainer

from qlora_lite.adapters.prompt import PromptTuning
from qlora_lite.data.tokens.batch import extent_of
from qlora_lite.data.tokens.storage import Example
from qlora_lite.ext.preferences.objective import Preference, preference_lm
from qlora_lite.memory.ledger import Ledger
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import largest_batches

PACK = 256


def row(length, is_target):
    mask = np.zeros(length, bool)
    mask[length - min(is_target, length - 1) :] = True
    return Example(np.random.default_rng(length).integers(3, 160, length).astype(np.int32), mask, "", "", "f:1")


SETS = {
    "few learned in the fullest": [row(256, 3)] + [row(250, 249)] * 3,
    "one row in the fullest": [row(256, 255)] + [row(10, 9)] * 75,
    "many rows in the fullest": [row(16, 15)] * 16 + [row(250, 249)] * 3,
    "all at once in none": [row(16, 3)] * 16 + [row(250, 2)] + [row(3, 2)] * 80 + [row(100, 99)] * 2,
}


def peak_of(training, run):
    ledger = Ledger()
    with ledger:
        for tensor, category, _ in categorised(causal_lm(), training.model):
            ledger.claim([tensor], category)
        ledger.watch(training.model)
        run()
    return ledger.peak.total


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(),
        MemoryOptions("none"),
        MemoryOptions("selective"),
        pytest.param(MemoryOptions(uncheckpointed_layers=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_no_step_holds_more_than_the_memory_probe_did(rows, options):
    training = trainer(
        rows=rows, order="as-is", max_tokens=PACK, max_steps=6, gradient_accumulation_steps=1, options=options
    )
    rehearsed, steps = peak_of(training, training.probe_memory), iter(training)
    later = [peak_of(training, lambda: next(steps)) for _ in range(training.total_steps)]
    assert max(later) <= 1.01 * rehearsed


@pytest.mark.parametrize("virtual", [0, 20])
def test_pairs_are_rehearsed_with_as_many_tokens_as_a_step_has(virtual):
    work = preference_lm(PromptTuning(virtual), Preference())
    pairs = [replace(row(40, 20), first=20) for _ in range(4)]
    most = extent_of(work.batches.lengths(pairs), work.batches.target_counts(pairs), [[0, 1, 2, 3]])
    real, planned = (
        work.batches.shape(work.batches.collate(each)) for each in (pairs, work.batches.enlarged(pairs, most))
    )
    assert sum(planned.lengths) == sum(real.lengths) == 4 * 2 * (20 + virtual)
    assert sorted(planned.lengths) == sorted(real.lengths)


@pytest.mark.parametrize("most_tokens", [100, 74, 30])
@pytest.mark.parametrize("rows", [*SETS.values(), [row(20, 1)] * 12 + [row(40, 1)] * 6], ids=[*SETS, "one each"])
def test_what_is_rehearsed_after_memory_ran_out_has_something_to_learn(rows, most_tokens):
    training = trainer(rows=rows, order="as-is", max_tokens=PACK, max_steps=6, gradient_accumulation_steps=1)
    training.most_tokens = most_tokens
    for batch in largest_batches(causal_lm(), training.examples, rows, training.epochs, most_tokens):
        assert sum(batch.row_lengths) <= max(most_tokens, *batch.row_lengths)
    training.probe_memory(rows)


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_no_evaluation_holds_more_than_the_rehearsed_one_did(rows):
    training = trainer(rows=[row(8, 4)], max_tokens=PACK, max_steps=1, gradient_accumulation_steps=1)
    rehearsed = peak_of(training, lambda: training.probe_memory(rows))
    assert peak_of(training, lambda: training.evaluate(rows)) <= 1.01 * rehearsed
