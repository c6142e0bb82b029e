"""Rows in their steps: what a run sees, and what is looked at to find its largest micro-batch."""

from itertools import chain, count

from hypothesis import given
from hypothesis import strategies as st
from tiny_trainer import SETTINGS

from qlora_lite.train.epochs import Epochs, pack_by_pack
from qlora_lite.train.settings import TrainSettings


def packs_of(lengths, settings):
    """Return the packs of a run, of whole steps."""
    epochs = Epochs(lengths, settings)
    steps = chain.from_iterable(epochs.steps(epoch) for epoch in count())
    return [tuple(rows) for _, step in zip(range(epochs.total_steps()), steps, strict=False) for rows in step]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.one_of(st.tuples(st.integers(1, 4), st.just(1.0)), st.tuples(st.none(), st.sampled_from([0.3, 1.0, 2.5]))),
    st.integers(1, 3), st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_pack_by_pack_a_run_sees_all_that_it_sees_step_by_step(lengths, ends, packs, accumulation, packing):
    max_steps, epochs = ends
    changes = {"max_steps": max_steps, "epochs": epochs, "micro_batch_size": packs, "packing": packing,
               "gradient_accumulation_steps": accumulation, "max_tokens": 64}  # fmt: skip
    settings = TrainSettings(**SETTINGS | changes)
    one = packs_of(lengths, pack_by_pack(settings, lengths))
    seen = {row for rows in one for row in rows}
    assert {row for rows in packs_of(lengths, settings) for row in rows} <= seen
    most = max(sum(lengths[row] for row in rows) for rows in packs_of(lengths, settings))
    assert most <= packs * max(sum(lengths[row] for row in rows) for rows in one)
