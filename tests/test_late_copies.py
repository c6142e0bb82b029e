"""The double of a GPU's side stream shows a wait that is missing and memory that is given back too early."""

import pytest
import torch
from late_copies import LateCopies, copies_end_late

from qlora_lite.offload import offload

CPU, SOURCE = torch.device("cpu"), torch.arange(4.0)


def test_a_target_holds_nothing_before_the_wait_and_after_it_what_the_source_held_then():
    side, source, targets = LateCopies(CPU, []), SOURCE.clone(), torch.zeros(2, 4)
    version = targets._version
    first, _ = side.copy([(targets[0], source)]), side.copy([(targets[1], source)])
    assert targets.isnan().all() and targets._version == version + 2
    source += 1
    side.wait(None)
    side.wait(first)
    assert torch.equal(targets[0], SOURCE + 1) and targets[1].isnan().all()


def test_copies_are_made_in_the_order_in_which_they_began():
    side, there, back, other = LateCopies(CPU, []), torch.zeros(4), torch.zeros(4), SOURCE + 1
    side.wait(side.copy([(there, SOURCE), (back, there), (there, other)]))
    assert torch.equal(back, SOURCE) and torch.equal(there, other)


@pytest.mark.parametrize("dropped", ["target", "source"])
def test_memory_that_is_given_back_before_the_wait_is_an_error(dropped):
    side, tensors = LateCopies(CPU, []), {"target": torch.zeros(4), "source": SOURCE.clone()}
    event = side.copy([tuple(tensors.values())])
    del tensors[dropped]
    with pytest.raises(AssertionError, match="given back before its copy"):
        side.wait(event)


@pytest.mark.parametrize("dropped", ["host", "device", "nothing"])
def test_of_copies_that_nobody_waited_for_only_the_host_s_memory_may_be_gone(dropped):
    def copy():
        with copies_end_late():
            side, tensors = offload.SideStream(CPU), {"device": torch.zeros(8, dtype=torch.uint8)}
            tensors["host"] = offload.host_memory(8, CPU)
            side.copy([(tensors["device"], tensors["host"])])
            tensors.pop(dropped, None)

    if dropped == "device":
        with pytest.raises(AssertionError, match="nobody waited"):
            copy()
    else:
        copy()


def test_a_test_without_copies_has_not_tested_them():
    with pytest.raises(AssertionError, match="no copy"), copies_end_late():
        pass
