"""Several processes train what one would: shared steps, evaluations, and what only one of them meets."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from rank_processes import together
from safetensors.torch import load_file, save_file
from tiny_trainer import examples, trainer

from qlora_lite.errors import LaunchError, TrainingError
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train import process_group
from qlora_lite.train.process_group import ProcessGroup, _buckets
from qlora_lite.train.processes import ALONE, FirstRankLostError, Processes, RankLostError
from qlora_lite.train.shares import Share

SETTINGS = dict(gradient_accumulation_steps=4, max_steps=7, optimizer="adamw_8bit", weight_decay=0.01)
EVALUATED = slice(0, 5)


def course(training):
    """Train, evaluate before and after, and return the numbers of it and what was learned."""
    found = {"before": training.evaluate(examples()[EVALUATED])}
    found["steps"] = [[m.loss, m.grad_norm, m.tokens, m.target_tokens] for m in training]
    found["after"] = training.evaluate(examples()[EVALUATED])
    return found, {name: p.detach().clone() for name, p in zip(training.names, training.parameters, strict=True)}


def shared_course(number, count, folder, settings, failing):
    """What each process does; memory runs out once on the one named."""
    shares = tuple(Share(*share) for share in settings.pop("shares", ()))
    training = trainer(**settings, shares=shares)
    training.processes = ProcessGroup(number, count)
    if number == failing:
        fail_once(training)
    found, is_target = course(training)
    save_file(is_target, f"{folder}/{number}.safetensors")
    Path(folder, f"{number}.json").write_text(json.dumps(found))


def fail_once(training):
    """Let memory run out in the second micro-batch of the third step."""
    loss, calls = training.workload.loss, []

    def failing(model, inputs):
        calls.append(1)
        if training.step == 3 and len(calls) % 2 == 0:
            object.__setattr__(training.workload, "loss", loss)
            raise MemoryError("no room")
        return loss(model, inputs)

    object.__setattr__(training.workload, "loss", failing)


def found_by(number, folder):
    return json.loads((folder / f"{number}.json").read_text()), load_file(folder / f"{number}.safetensors")


@pytest.mark.parametrize(
    ("count", "changes", "failing"),
    [
        (2, {}, None),
        (3, {"gradient_accumulation_steps": 3}, None),
        (2, {"optimizer": "adamw_torch"}, 1),
        (2, {"optimizer": "adamw_torch", "shares": [(1, 1), (3, 2)]}, 1),
    ],
)
def test_ranks_learn_what_one_process_learns(count, changes, failing, tmp_path):
    """Over epochs of 12 rows, so that the last step of each has fewer micro-batches than ranks."""
    settings = SETTINGS | changes
    together(count, "train.test_processes", "shared_course", tmp_path, settings, failing)
    settings.pop("shares", None)
    expected, is_target = course(trainer(**settings))
    ours, weights = found_by(0, tmp_path)
    for number in range(1, count):
        theirs, other = found_by(number, tmp_path)
        assert theirs == ours and all(torch.equal(weights[name], other[name]) for name in weights)
    torch.testing.assert_close(torch.tensor(ours["steps"]), torch.tensor(expected["steps"]), rtol=1e-5, atol=1e-6)
    for when in ("before", "after"):
        assert ours[when][:3] == pytest.approx(expected[when][:3], rel=1e-5)
    for name, tensor in is_target.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5)


def test_a_share_is_a_rank_s_part_in_order_and_all_of_them_are_the_whole():
    for count in (1, 2, 3, 5):
        for parts in range(8):
            shares = [Processes(number, count).share(range(parts)) for number in range(count)]
            assert [part for share in shares for part in share] == list(range(parts))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gradients_are_added_up_a_bucket_at_a_time(monkeypatch):
    monkeypatch.setattr(process_group, "BUCKET_NUMBERS", 10)
    tensors = [torch.zeros(*size) for size in ((2, 2), (6,), (3,), (5, 5), (2,), (2,))]
    assert [[len(t) for t in some] for some in _buckets(tensors)] == [[4, 6], [3], [10], [10], [5, 2, 2]]
    assert list(_buckets([])) == []


def test_a_process_alone_exchanges_nothing_and_draws_on():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ALONE.seed(0, 1, torch.device("cpu"))
    assert torch.equal(torch.rand(1), expected)
    assert ALONE.exchange(1, 2) == [1, 2] and ALONE.tell("x") == "x" and ALONE.any(True) and ALONE.gather(3) == [3]
    ALONE.require_equal("data", "same")


def agreeing(number, count, folder):
    group = ProcessGroup(number, count)
    assert group.tell(f"from {number}") == "from 0" and group.largest(number) == count - 1
    group.require_equal("data", "same")
    with pytest.raises(LaunchError, match=r"^ranks 1 and 2 have other data than rank 0"):
        group.require_equal("data", "other" if number else "same")
    assert group.any(number == 1) and not group.any(False)
    half, other = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(2, 2))
    half.grad = torch.full((3,), 2.0**-9 if number else 1.0, dtype=torch.bfloat16)  # lost one by one, in bfloat16
    other.grad = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).t()
    group.add_up_gradients([half, other])
    assert half.grad.tolist() == [1 + 2.0**-8 * 0 if count == 2 else torch.tensor(1 + 2.0**-8).bfloat16().item()] * 3
    assert other.grad.tolist() == [[0.0, 2.0 * count], [count, 3.0 * count]]
    drawn = []
    for step in (1, 2, 1):
        group.seed(5, step, torch.device("cpu"))
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1] and len({*group.gather(drawn[0])}) == count


def test_ranks_agree(tmp_path):
    together(3, "train.test_processes", "agreeing", tmp_path)


def connecting(number, count, folder):
    group, called = ProcessGroup(number, count, 2), []
    for name in ("broadcast", "all_to_all_single", "all_reduce"):
        plain = getattr(process_group.dist, name)
        setattr(process_group.dist, name, lambda *a, name=name, plain=plain, **b: called.append(name) or plain(*a, **b))
    group.connect(torch.device("cpu"), trains_parts=False)
    assert called == ["broadcast"] * 2
    group.connect(torch.device("cpu"), trains_parts=True)
    assert called[2:] == ["broadcast", "broadcast", "all_to_all_single", "all_reduce"]


def test_each_way_to_exchange_parts_of_a_model_is_used_once_to_connect(tmp_path):
    together(4, "train.test_processes", "connecting", tmp_path)


def left_alone(number, count, folder):
    group = ProcessGroup(number, count)
    if number == 1:
        return
    with pytest.raises(LaunchError, match="another process of this run has ended or does not answer"):
        for _ in range(2):
            group.exchange(1)


def test_a_rank_that_ended_is_noticed(tmp_path):
    together(2, "train.test_processes", "left_alone", tmp_path)


def test_a_step_that_updates_in_backward_is_not_shared():
    whole = MemoryOptions(optimizer_in_backward=True)
    with pytest.raises(TrainingError, match=r"optimizer_in_backward .* is for one process"):
        shared_trainer(whole)


def shared_trainer(options):
    training = trainer(gradient_accumulation_steps=1, options=options, max_grad_norm=0.0)
    return type(training)(training.model, training.examples, training.settings, processes=Processes(0, 2))


def waiting_for(number, count, folder, hanging, sums):
    group = ProcessGroup(number, count)
    process_group.ANSWER_SECONDS, process_group.VERDICT_SECONDS = 1.0, 3.0
    group.exchange(1)
    group.exchange(1)
    if number == hanging:
        time.sleep(8)
        os._exit(0)
    with pytest.raises(RankLostError, match=rf"^rank {hanging} has not answered") as caught:
        group.add_up([torch.zeros(1)]) if sums else group.exchange(1)
    assert isinstance(caught.value, FirstRankLostError) is (hanging == 0)


@pytest.mark.parametrize(
    ("hanging", "sums"),
    [(0, False), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, False), (0, True), (1, True)))],
)
def test_a_rank_that_hangs_is_named_by_another(hanging, sums, tmp_path):
    together(2, "train.test_processes", "waiting_for", tmp_path, hanging, sums)


@pytest.mark.parametrize(
    ("backends", "minutes"), [("cpu:gloo,cuda:gloo", 1), ("cpu:gloo,cuda:nccl", 10)], ids=["gloo", "nccl"]
)
def test_nccl_which_ends_the_process_waits_longer_than_gloo_for_a_rank_in_a_step(backends, minutes, monkeypatch):
    groups = []

    def new(*_ranks, timeout, backend=None):
        groups.append((backend, timeout.total_seconds() / 60))
        return None, []

    for name in ("new_group", "new_subgroups", "new_subgroups_by_enumeration"):
        monkeypatch.setattr(process_group.dist, name, new)
    monkeypatch.setattr(process_group.dist, "get_backend_config", lambda: backends)
    ProcessGroup(0, 2)
    assert groups == [("gloo", 120), (None, minutes)]
    ProcessGroup(0, 4, 2)
    assert groups[2:] == [("gloo", 120), (None, minutes), (None, minutes)]
