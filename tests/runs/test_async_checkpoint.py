"""Saving stalls training no longer than copying the state takes, and never more than one checkpoint is on its way."""

import os
import signal
import threading

import pytest
import torch

from qlora_lite.errors import OutputError
from qlora_lite.runs import async_checkpoint as saver_module
from qlora_lite.runs.async_checkpoint import Saver
from qlora_lite.train.checkpoints import Checkpoint, newest_whole, steps_on_disk

LONG = 20  # seconds, for what must come soon
SHORT = 0.3  # seconds, for what must not come


def checkpoint(step):
    tensors = {"optimizer.safetensors": {"a": torch.full((8,), float(step))}}
    return Checkpoint(step, tensors, {"state.json": {"n": step}})


class SlowDisk:
    """A writer that waits until it may go on."""

    def __init__(self):
        self.gate, self.writing = threading.Event(), threading.Event()

    def __call__(self):
        self.writing.set()
        assert self.gate.wait(LONG)


def make_saver(root, prepare):
    return Saver(root, 1, 0.0, 5, prepare, {}, "")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    disk = SlowDisk()
    with make_saver(tmp_path, disk) as saver:
        saver.save(1, lambda: checkpoint(1))  # returns though the disk waits
        assert disk.writing.wait(LONG)
        assert saver.due(2) and saver.newest_step is None and steps_on_disk(tmp_path) == []
        disk.gate.set()
        saver.wait()
        assert saver.newest_step == 1 and newest_whole(tmp_path)[0].step == 1


def test_a_second_checkpoint_waits_for_the_first_and_is_not_even_copied_before(tmp_path):
    disk, copied, done = SlowDisk(), [], threading.Event()

    def copy(step):
        copied.append(step)
        return checkpoint(step)

    with make_saver(tmp_path, disk) as saver:
        saver.save(1, lambda: copy(1))

        def second():
            saver.save(2, lambda: copy(2))
            done.set()

        training = threading.Thread(target=second)
        training.start()
        assert not done.wait(SHORT) and copied == [1], "one in flight: a second copy would need its memory too"
        disk.gate.set()
        training.join(LONG)
        assert done.is_set() and copied == [1, 2]
    assert steps_on_disk(tmp_path) == [2, 1], "leaving the block waits for the last one"


def test_the_copy_is_made_before_save_returns(tmp_path):
    """What is written is the state at the step, though training changes it while the disk waits."""
    disk, state = SlowDisk(), torch.zeros(8)
    with make_saver(tmp_path, disk) as saver:
        saver.save(1, lambda: Checkpoint(1, {"optimizer.safetensors": {"a": state.clone()}}, {"state.json": {}}))
        state.fill_(9.0)
        disk.gate.set()
    assert torch.equal(newest_whole(tmp_path)[0].tensors["optimizer.safetensors"]["a"], torch.zeros(8))


def test_an_error_of_the_writer_reaches_the_user_and_the_next_interval_tries_again(tmp_path, monkeypatch, caplog):
    write, calls = saver_module.write_checkpoint, []

    def failing(root, *rest):
        calls.append(1)
        if len(calls) == 1:
            raise OutputError(f"cannot write {root}: the disk is full")
        return write(root, *rest)

    monkeypatch.setattr(saver_module, "write_checkpoint", failing)
    with make_saver(tmp_path, lambda: None) as saver:
        saver.save(1, lambda: checkpoint(1))
        saver.wait()
        assert "the disk is full" in saver.failure and saver.newest_step is None
        saver.save(2, lambda: checkpoint(2))
        saver.wait()
        assert saver.failure is None and saver.newest_step == 2
    assert "step 1: no checkpoint was written" in caplog.text


@pytest.fixture
def interrupts():
    """Let SIGINT interrupt, though a shell has set it to be ignored for what runs in its background."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("interrupts")
def test_a_wait_cut_off_by_a_signal_forgets_no_checkpoint(tmp_path):
    disk = SlowDisk()
    with make_saver(tmp_path, disk) as saver:
        saver.save(1, lambda: checkpoint(1))
        threading.Timer(SHORT, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
        disk.gate.set()
    assert saver.newest_step == 1


def test_any_other_error_of_the_writer_ends_the_run(tmp_path):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), make_saver(tmp_path, broken) as saver:
        saver.save(1, lambda: checkpoint(1))
