"""Weights that are trained and divided among ranks become what whole ones do, in the memory that was planned."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters.test_full import WORK, job_of, ledger_of
from rank_processes import together
from tiny import build_tiny
from tiny_files import byte_tokenizer
from tiny_trainer import SETTINGS, examples
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.models import save
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, divided_weights, place, settle, stream_of
from qlora_lite.offload.flat_block import ALIGNMENT, FlatBlock
from qlora_lite.offload.offload import SideStream
from qlora_lite.offload.stream import Division
from qlora_lite.planning.simulate import simulate, simulate_whole
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.loop import Trainer
from qlora_lite.train.process_group import ProcessGroup
from qlora_lite.train.processes import ALONE, Shards
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE, capture, collection_of, restore
from qlora_lite.train.whole_tensors import Whole, layout_of

BLOCKS = 3


def divided_by(count):
    return MemoryOptions(resident_layers=0, stream_from="ranks", shards=Division((1,) * count))


def trainer(group, options, name="llama", dtype="float32", architecture=(), rows=None, **settings):
    """A trainer of all weights of a tiny model; equal arguments give equal ones."""
    model = adopt(build_tiny(name, getattr(torch, dtype), num_hidden_layers=BLOCKS, **dict(architecture)))
    WORK.method.apply(model)
    place(model, torch.device("cpu"), options, trains_base=True, ranks=group.shards)
    settings = TrainSettings(**(SETTINGS | settings | dict(options=options)))
    training = Trainer(model, rows or examples(), settings, workload=WORK, processes=group)
    training.check()
    return training


def whole_weights(training):
    """Return all weights, put together on every rank."""
    layout, weights = layout_of(WORK.method, training.model), divided_weights(training.model)
    found = {}
    for name, parameter in WORK.method.parameters(training.model):
        found[name] = parameter.detach()
        if name in layout.ranges:
            found[name] = torch.zeros(parameter.numel())
            part, rank = weights[parameter].part, training.processes.rank
            if part is not None and rank < len(layout.ranges[name]):  # of the first machine
                values = layout.ranges[name][rank]
                found[name][values.start : values.stop] = part.detach()
            training.processes.add_up([found[name]])
            found[name] = found[name].view(parameter.shape).to(parameter.dtype)
    return found


def course(training):
    """Train, evaluate before and after, and return the numbers of it and what was learned."""
    found = [training.evaluate(examples()[:5])]
    found += [[m.loss, m.grad_norm, m.tokens, m.target_tokens] for m in training]
    found += [training.evaluate(examples()[:5]), training.answer_losses(examples()[:3])]
    return found, whole_weights(training)


UNCLIPPED = dict(max_grad_norm=0.0, weight_decay=0.1, max_steps=3)
CASES = [  # settings, and whether gradients are added up in the order of ranks with whole models
    (dict(optimizer="adamw_8bit"), True),
    (dict(dtype="bfloat16", optimizer="adamw_8bit", stochastic_rounding=False), True),
    (dict(name="qwen2", architecture=[("tie_word_embeddings", True)], optimizer="lion_8bit"), True),
    (dict(name="qwen3_moe", optimizer="adamw_torch"), True),
    (dict(optimizer="adamw_torch", gradient_accumulation_steps=5, max_grad_norm=0.1, max_steps=4), False),
]


def steps_of(found):
    return torch.tensor([numbers for numbers in found if isinstance(numbers, list) and len(numbers) == 4])


def courses(number, count, folder, cases):
    """What each process does: each case with divided weights, with whole ones, and alone."""
    group = ProcessGroup(number, count)
    for settings, is_same_order in [CASES[case] for case in cases]:
        settings = UNCLIPPED | dict(gradient_accumulation_steps=count) | settings
        training = trainer(group, divided_by(count), **settings)
        found, is_target = course(training)
        if is_same_order:
            whole, expected = course(trainer(group, MemoryOptions(), **settings))
            assert all(torch.equal(is_target[name], tensor) for name, tensor in expected.items()), settings
            torch.testing.assert_close(steps_of(found), steps_of(whole), rtol=1e-6, atol=0)  # norms add up otherwise
            assert (found[0], *found[-2:]) == (whole[0], *whole[-2:])
        check_memory(training, number, count)
        if number:
            continue
        alone, by_one = course(trainer(ALONE, MemoryOptions(), **settings))
        torch.testing.assert_close(steps_of(found), steps_of(alone), rtol=1e-5, atol=1e-6)
        for name, tensor in by_one.items():
            torch.testing.assert_close(is_target[name], tensor, rtol=1e-4, atol=2e-5)


def check_memory(training, number, count):
    """Each rank has its part of all that is trained of blocks, and of its gradients and states."""
    stream, weights = stream_of(training.model), divided_weights(training.model)
    parts = [each.part for each in weights.values() if each.part is not None]
    whole = sum(weight.nbytes for weight in weights)
    own = sum(map(len, stream.shards))
    assert 0 <= own - whole / count <= len(weights) * ALIGNMENT
    assert sum(part.nbytes for part in parts) <= own and all(
        any(part.untyped_storage().data_ptr() == shard.data_ptr() for shard in stream.shards) for part in parts
    )
    settle(training.model)
    assert all(weight.untyped_storage().nbytes() == weight.itemsize and weight.isnan().all() for weight in weights)
    for weight, each in weights.items():
        begins = [values.start for values in each.ranges if values]
        ends = [values.stop for values in each.ranges if values]
        assert [0, *ends] == [*begins, weight.numel()] and not any(start % 256 for start in begins)


@pytest.mark.parametrize(("count", "cases"), [(2, [0, 1, 2, 3, 4]), pytest.param(3, [4], marks=pytest.mark.slow)])
def test_divided_weights_become_what_whole_ones_do(count, cases, tmp_path):
    """To the bit, where gradients are added up in one order: of two ranks with one micro-batch each.

    The others have rows that do not divide by the ranks, so that some run a micro-batch for nothing.
    """
    together(count, "train.test_divided", "courses", tmp_path, cases)


def on_machines(number, count, folder):
    """What each process of two machines with two each does: both machines have all parts, alike to the bit."""
    group, options = ProcessGroup(number, count, 2), divided_by(2)
    for changes in (
        dict(optimizer="adamw_torch", max_grad_norm=0.1),
        dict(optimizer="adamw_8bit", dtype="bfloat16"),
    ):
        settings = UNCLIPPED | dict(gradient_accumulation_steps=4) | changes
        training = trainer(group, options, **settings)
        found, is_target = course(training)
        parts = [
            each.part.detach().float() for each in divided_weights(training.model).values() if each.part is not None
        ]
        sums = [part.clone() for part in parts]
        group.add_up_parts([SimpleNamespace(grad=each) for each in sums])
        assert all(torch.equal(both, 2 * part) for both, part in zip(sums, parts, strict=True))
        if number or changes.get("dtype"):
            continue
        alone, by_one = course(trainer(ALONE, MemoryOptions(), **settings))
        torch.testing.assert_close(steps_of(found), steps_of(alone), rtol=1e-5, atol=1e-6)
        for name, tensor in by_one.items():
            torch.testing.assert_close(is_target[name], tensor, rtol=1e-4, atol=2e-5)
    resumed(group, options, Path(folder))


@pytest.mark.slow
def test_each_of_two_machines_divides_the_weights_that_are_trained(tmp_path):
    together(4, "train.test_divided", "on_machines", tmp_path)


def others(number, count, folder):
    """What each process does: bfloat16 is rounded stochastically, memory is as planned, a run is killed and resumed."""
    group, options = ProcessGroup(number, count), divided_by(count)
    in_backward(group, options)
    skipped(group, options)
    rounded(group, options)
    planned(group, options)
    resumed(group, options, Path(folder))
    saved(group, options, Path(folder))


def in_backward(group, options):
    """With a last step of an epoch in which one rank has no micro-batch."""
    settings = dict(optimizer="adamw_8bit", rows=examples(5), max_steps=4) | UNCLIPPED
    found = [
        course(trainer(group, each, **settings)) for each in (options, replace(options, optimizer_in_backward=True))
    ]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[1][1][name], tensor) for name, tensor in found[0][1].items())


def skipped(group, options):
    """A step that is not finite on one rank is left out by all."""
    found = []
    for each in (options, MemoryOptions()):
        settings = dict(optimizer="adamw_8bit", on_not_finite="skip", max_skipped_steps=1) | UNCLIPPED
        training = trainer(group, each, **settings)
        loss, calls = training.workload.loss, []

        def broken(model, inputs, training=training, loss=loss, calls=calls):
            found, is_bad = loss(model, inputs), training.step == 2 and not calls and group.rank == 1
            calls += [1] * is_bad
            return found._replace(sum=found.sum * float("nan")) if is_bad else found

        object.__setattr__(training.workload, "loss", broken)
        try:
            list(training)
        finally:
            object.__delattr__(training.workload, "loss")
        assert training.skipped == 1
        found.append(whole_weights(training))
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def rounded(group, options):
    """By chances that are drawn anew by a run's step, so that equal runs are equal; small updates are kept."""
    settings = dict(dtype="bfloat16", optimizer="adamw_8bit", learning_rate=2e-5, max_steps=4)
    found = []
    for stochastic in (True, True, False):
        training = trainer(group, options, stochastic_rounding=stochastic, **settings)
        before = whole_weights(training)
        list(training)
        found.append(whole_weights(training))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = [(each[name] - before[name]).float().abs().mean().item() for each in found]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    assert moved[0] == pytest.approx(4 * 2e-5, rel=0.4) and moved[2] < 4 * 2e-5 / 4


def planned(group, options):
    for accumulated, is_in_backward in ((2, False), (4, False), (2, True)):
        settings = dict(
            dtype="bfloat16", optimizer="adamw_8bit", architecture=[("vocab_size", 4096)], max_grad_norm=0.0
        )
        options = replace(options, optimizer_in_backward=is_in_backward)
        training = trainer(group, options, gradient_accumulation_steps=accumulated, **settings)
        job = replace(job_of(training, training.model.config), accumulating=training._accumulates)
        job = replace(job, options=replace(options, shards=Division((1, 1), group.rank)))
        found = ledger_of(training).peak
        if not group.is_first:  # whose plan is the same
            continue
        plan = simulate(job)
        assert plan.peak().total == pytest.approx(found.total, rel=0.01)
        for name in ("trained weights", "gradients", "optimizer", "base weights"):
            here, there = (moment.breakdown.get(name, 0) for moment in (plan.peak(), found))
            assert here == pytest.approx(there, rel=0.01, abs=2048), name
        if job.accumulating:
            continue
        deep = replace(job, workload=job.workload.at_depth(9), eval_shape=None)
        short, long = simulate(deep), simulate_whole(deep)
        assert short.peak().bytes == long.peak().bytes and short.trained == long.trained


def resumed(group, options, folder):
    """On as many ranks to the bit; from whole models to divided ones, and back, likewise: files hold whole tensors."""
    make = partial(
        trainer,
        group,
        dtype="bfloat16",
        optimizer="adamw_8bit",
        stochastic_rounding=False,
        max_steps=4,
        max_grad_norm=0.0,
    )
    whole = make(options)
    list(whole)
    expected = whole_weights(whole)
    pairs = (options, options), (options, MemoryOptions()), (MemoryOptions(), options)
    for number, (first, second) in enumerate(pairs):
        begun = make(first)
        for _ in zip(range(2), begun):  # noqa: B905 (the second step is the last one that is taken)
            pass
        at = folder / f"checkpoints {number}"
        collection = collection_of(begun, {})
        if group.is_first:
            tensors, state = capture(begun, False, collection)
            write_checkpoint(at, Checkpoint(2, tensors, {STATE: state}), {}, "")
            if collection:
                collection.end()
        elif collection:
            collection.serve()
        group.wait(long=True)
        found = read_checkpoint(next(at.iterdir()))
        again = make(second)
        restore(again, found)
        list(again)
        assert all(torch.equal(whole_weights(again)[name], tensor) for name, tensor in expected.items())


def saved(group, options, folder):
    """Fetched for one file at a time, or all at once where files have experts one by one."""
    save.SHARD_BYTES = 100_000
    for name in ("llama", "qwen3_moe"):
        training = trainer(group, options, name)
        expected, collection = whole_weights(training), collection_of(training, {})
        if not group.is_first:
            collection.serve()
            continue
        weights = collection.tensors[WEIGHTS_NAME]
        elsewhere = {key: each for key, each in weights.items() if isinstance(each, Whole)}
        save.save_model(training.model, folder / name, byte_tokenizer(), (), elsewhere)
        collection.end()
        assert len(list((folder / name).glob("*.safetensors"))) > 1 and len(elsewhere) > 20
        again = AutoModelForCausalLM.from_pretrained(folder / name).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


def test_divided_weights_are_rounded_planned_resumed_and_saved(tmp_path):
    together(2, "train.test_divided", "others", tmp_path)


class Twin(Shards):
    """The first of two ranks that compute alike, and change nothing: what the other one has of each block is known."""

    def __init__(self, model):
        super().__init__(0, 2)
        self.wholes, self.numbers = [], {}
        for block in blocks(model):
            flat = FlatBlock(block, trains=True)
            self.wholes.append(torch.zeros(2 * -(-flat.size // (2 * ALIGNMENT)) * ALIGNMENT, dtype=torch.uint8))
            flat.fill(self.wholes[-1])

    def gather(self, whole, sizes, own):
        number = self.numbers.setdefault(own.data_ptr(), len(self.numbers))
        whole.copy_(torch.cat([own, self.wholes[number][len(own) :]]))

    def exchange(self, received, sent):
        received.copy_(sent[:1].expand_as(sent))


class Late(SideStream):
    """A side stream whose work is done in the moment that something waits for it."""

    def __init__(self, device):
        self.device, self.stream, self.done, self.begun = device, None, 0, []

    def launch(self, action):
        self.begun.append(action)
        return len(self.begun)

    def wait(self, event):
        while event is not None and self.done < event:
            self.begun[self.done]()
            self.done += 1


def test_exchanges_that_end_late_are_waited_for(monkeypatch):
    """The buffer of gradients is not written to before it has been sent, and no sum is used before it is there."""
    found = []
    for side in (SideStream, Late):
        monkeypatch.setattr("qlora_lite.offload.stream.SideStream", side)
        model = adopt(build_tiny("llama", num_hidden_layers=BLOCKS))
        WORK.method.apply(model)
        ranks = Twin(model)
        place(model, torch.device("cpu"), divided_by(2), trains_base=True, ranks=ranks)
        settings = TrainSettings(**(SETTINGS | dict(learning_rate=0.0, options=divided_by(2))))
        training = Trainer(model, examples(), settings, workload=WORK)
        training.check()
        found.append([(step.loss, step.grad_norm) for step in training])
    assert found[0] == found[1] and all(norm > 0 for _, norm in found[0])
