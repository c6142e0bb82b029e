"""Streamed blocks are on the device when they run, and the next one is on its way."""

import torch

from qlora_lite.ops.stream import BlockStream


def test_a_forward_pass_after_another_has_its_second_block_under_way_while_the_first_runs(monkeypatch):
    blocks = [torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False)) for _ in range(4)]
    stream, order, load = BlockStream(blocks, torch.device("cpu")), [], BlockStream._load

    def loaded(self, number):
        order.append(f"load {number}")
        load(self, number)

    monkeypatch.setattr(BlockStream, "_load", loaded)
    for _ in range(2):
        order.append("forward")
        for number in range(4):
            stream.enter(number)
            order.append(f"run {number}")
    forward = ["load 0", "load 1", "run 0", "load 2", "run 1", "load 3", "run 2", "run 3"]
    assert order == ["forward", *forward] * 2
    order.clear()
    for number in (2, 1, 0):  # backward, from the last block on
        stream.enter(number)
    assert order == ["load 1", "load 0"]
