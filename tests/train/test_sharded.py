"""Ranks that divide the blocks' weights among them train what ranks do that each have the whole model, to the bit."""

from functools import partial

import pytest
import torch
from rank_processes import together
from tiny import quantized_pair
from tiny_trainer import examples, trainer

from qlora_lite.errors import DoesNotFitError, LaunchError, ModelError
from qlora_lite.models.memory_options import MemoryOptions, place, stream_of
from qlora_lite.offload.stream import ALIGNMENT, SLOTS, BlockStream, Division, OnAllRanks
from qlora_lite.train.process_group import ProcessGroup
from qlora_lite.train.shares import Share

SETTINGS = dict(gradient_accumulation_steps=4, max_steps=5, optimizer="adamw_8bit", weight_decay=0.01)
CASES = [
    ("llama", {}, {"resident_layers": 0}, {}),
    ("gemma2", {"tile_tokens": 7, "cache_dequantized": True, "offload_checkpoints": True}, {"resident_layers": 1}, {}),
    ("llama", {"checkpointing": "selective"}, {"resident_layers": 0}, {"dropout": 0.2, "optimizer": "adamw_torch"}),
    ("qwen3_moe", {}, {"resident_layers": 0}, {"gradient_accumulation_steps": 3}),
    ("llama", {}, {"resident_layers": 0}, {"most_tokens": 9}),
    ("llama", {}, {"resident_layers": 0, "stream_from": "host"}, {}),
]
UNEQUAL = [  # by number of ranks: what the ranks have of each step, and the weights of their parts of the model
    {"shares": [(3, 3), (1, 1)], "weights": [5, 1]},
    {"shares": [(2, 1), (1, 1), (1, 1)], "weights": [1, 4, 2]},
]


def course(training, most_tokens):
    """Train, evaluate before and after, and return the numbers of it and what was learned."""
    training.most_tokens = most_tokens
    found = [training.evaluate(examples()[:5]), *([m.loss, m.grad_norm, m.tokens, m.target_tokens] for m in training)]
    found += [training.evaluate(examples()[:5]), training.answer_losses(examples()[:3])]
    return found, [parameter.detach().clone() for parameter in training.parameters]


def sharded_courses(number, count, folder, cases, local_count=1, shares=(), weights=None):
    """What each process does: each case with whole models and with divided ones."""
    group = ProcessGroup(number, count, local_count)
    count = local_count if local_count > 1 else count  # among which weights are divided
    assert (group.shards.rank, group.shards.count) == (number % count, count)
    division = Division(tuple(weights or (1,) * count), group.shards.rank)
    for model_type, options, sharded, changes in [CASES[case] for case in cases]:
        changes = SETTINGS | changes | {"shares": tuple(Share(*share) for share in shares)}
        most_tokens = changes.pop("most_tokens", None)
        found = []
        for how in ({}, {"stream_from": "ranks", "shards": division} | sharded):
            training = trainer(model_type, processes=group, options=MemoryOptions(**options, **how), **changes)
            assert training.is_sharded == bool(how)
            found.append(course(training, most_tokens))
        (whole, is_target), (divided, other) = found
        assert whole == divided, (model_type, options)
        assert all(map(torch.equal, is_target, other))
        stream = stream_of(training.model)
        assert bool(stream.shards) != bool(stream.buffers)
        own, slots = sum(map(len, (*stream.shards, *stream.buffers))), sum(map(len, stream.slots))
        share = division.weights[division.rank] / sum(division.weights)
        assert 0 <= own - sum(stream.sizes) * share < len(stream.sizes) * ALIGNMENT
        assert slots <= SLOTS * (max(stream.sizes) + count * ALIGNMENT)


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, [1, 5]),
        (3, [3]),
        pytest.param(3, [4], marks=pytest.mark.slow),
        pytest.param(2, [0, 2, 3, 4], marks=pytest.mark.slow),
    ],
)
def test_divided_weights_give_what_whole_ones_do_to_the_bit(count, cases, tmp_path):
    """With rows that do not divide by the ranks, so that some run a micro-batch for nothing."""
    together(count, "train.test_sharded", "sharded_courses", tmp_path, cases)


@pytest.mark.parametrize(
    ("count", "cases"),
    [(2, [0]), pytest.param(3, [5], marks=pytest.mark.slow), pytest.param(2, [1, 5], marks=pytest.mark.slow)],
)
def test_ranks_of_unequal_gpus_have_unequal_parts_of_weights_and_steps(count, cases, tmp_path):
    """One has most of a step's sequences, joined to as many micro-batches as the other runs, and most of the model."""
    together(count, "train.test_sharded", "sharded_courses", tmp_path, cases, 1, *UNEQUAL[count - 2].values())


@pytest.mark.parametrize("cases", [[5], pytest.param([1, 3], marks=pytest.mark.slow)])
def test_each_of_two_machines_divides_the_weights_among_its_own_ranks(cases, tmp_path):
    """Two machines of two ranks, each with the whole model: what four ranks with whole models learn, to the bit."""
    together(4, "train.test_sharded", "sharded_courses", tmp_path, cases, 2)


def running_out(number, count, folder):
    group = ProcessGroup(number, count)
    options = MemoryOptions(resident_layers=0, stream_from="ranks", shards=Division((1,) * count))
    training = trainer(processes=group, options=options, **SETTINGS)
    if number == 1:
        loss = training.workload.loss

        def failing(model, inputs):
            loss(model, inputs)
            raise MemoryError("no room")

        object.__setattr__(training.workload, "loss", failing)
        with pytest.raises(DoesNotFitError, match="between ranks that wait for each other's weights"):
            next(iter(training))
        return
    with pytest.raises(LaunchError, match="another process of this run has ended or does not answer"):
        next(iter(training))


def test_memory_that_runs_out_on_one_rank_ends_all(tmp_path):
    together(2, "train.test_sharded", "running_out", tmp_path)


class Together:
    """The ranks of several streams over one model in one process, whose parts are all at hand."""

    def __init__(self, rank, parts):
        self.rank, self.count, self.parts, self.number = rank, len(parts), parts, None

    def gather(self, whole, sizes, own):
        assert torch.equal(own, self.parts[self.rank][self.number])
        assert sizes == [len(parts[self.number]) for parts in self.parts]
        whole.copy_(torch.cat([parts[self.number] for parts in self.parts]))


@pytest.mark.parametrize(
    ("weights", "in_host_memory"),
    [
        ([1], False),
        ([1, 1], True),
        ([1] * 5, False),
        ([1] * 8, True),
        ([24, 12], False),
        ([1, 5, 1000], True),
        ([10**6, 1, 1], False),
    ],
)
def test_the_parts_of_all_ranks_are_the_blocks(weights, in_host_memory):
    """Of tensors of several types whose bytes end anywhere, some cut in the middle of a number."""
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(37 + n, 11), torch.nn.LayerNorm(5)) for n in range(3)]
    for block in blocks:
        block.requires_grad_(False)
        block[1].register_buffer("codes", torch.randint(0, 256, (1001,), dtype=torch.uint8))
        block[1].register_buffer("turned", torch.randn(77, 3).bfloat16().t())
    expected = [[t.clone() for t in (*block.parameters(), *block.buffers())] for block in blocks]
    parts = [[] for _ in weights]
    for rank in range(len(weights)):
        ranks = Together(rank, parts)
        placement = partial(OnAllRanks, ranks=ranks, weights=weights, in_host_memory=in_host_memory)
        stream = BlockStream(blocks, torch.device("cpu"), placement)
        parts[rank] += (*stream.shards, *stream.buffers)
        for part, size in zip(parts[rank], stream.sizes, strict=True):
            assert len(part) == Division(tuple(weights), rank).own_bytes(size)
            assert 0 <= len(part) - size * weights[rank] / sum(weights) < ALIGNMENT
    for ranks.number in range(3):
        slot = torch.empty(stream.placement.slot_bytes, dtype=torch.uint8)
        stream.placement.bring(ranks.number, slot)
        stream._blocks[ranks.number].show(slot)
        found = [*blocks[ranks.number].parameters(), *blocks[ranks.number].buffers()]
        assert all(map(torch.equal, found, expected[ranks.number]))
        stream._blocks[ranks.number].show(None)


def test_one_process_divides_nothing():
    model, _ = quantized_pair("llama")
    with pytest.raises(ModelError, match="this is the only one"):
        place(model, torch.device("cpu"), MemoryOptions(resident_layers=0, stream_from="ranks"))
