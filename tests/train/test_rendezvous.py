"""Processes find each other, also when they are started again, and who does not come is named."""

import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch.distributed as dist

from qlora_lite.errors import LaunchError
from qlora_lite.train import rendezvous
from qlora_lite.train.processes import Processes, name_ranks
from qlora_lite.train.rendezvous import meet


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(rendezvous, "LATER_SECONDS", 1.0)


def together(store, ranks, size):
    """Let some ranks, given with how many they are told there are, meet; return names or what was said, by rank."""

    def outcome(rank):
        try:
            return meet(store, rank, size + ranks[rank], "here")
        except LaunchError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(outcome, ranks), strict=True))


def test_all_agree_on_a_name_that_no_meeting_in_this_store_had_before():
    store, names = dist.HashStore(), []
    for _ in range(3):  # the second and third as when an agent starts its processes again
        (name,) = set(together(store, dict.fromkeys((2, 1, 0), 0), 3).values())
        names.append(name)
    assert len(set(names)) == 3


def test_who_does_not_come_is_named_by_rank_0_alone():
    found = together(dist.HashStore(), {0: 0, 2: 0}, 5)
    assert str(found[0]).startswith("ranks 1, 3 and 4 of 5 have not come to here within 1.0s: start as many")
    assert isinstance(found[2], LaunchError) and str(found[2]) == ""
    assert str(together(dist.HashStore(), {0: 0}, 2)[0]).startswith("rank 1 of 2 has not come")


def test_a_rank_0_of_earlier_is_not_taken_for_one_that_is_there():
    store = dist.HashStore()
    together(store, {0: 0, 1: 0}, 2)
    assert "rank 1 of 2 has waited 1.0s at here for rank 0" in str(together(store, {1: 0}, 2)[1])


def test_ranks_that_count_differently_are_told():
    found = together(dist.HashStore(), {0: 0, 1: 1}, 2)
    assert "rank 1 was started as one of 3 processes and rank 0 as one of 2" in str(found[1])


def test_nobody_at_the_address_is_said_in_one_line(capfd, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.create_server(("localhost", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(free))
    with (
        pytest.raises(LaunchError, match=rf"^rank 1 has not found rank 0 at localhost:{free} within 1.0s \(.*refused"),
        rendezvous.joined(1, 2, 0, 1, "cpu"),
    ):
        raise AssertionError

    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with (
        pytest.raises(LaunchError, match=r"^rank 0 does not know MASTER_ADDR localhost \(Name or service not known\)$"),
        rendezvous.joined(0, 2, 0, 1, "cpu"),
    ):
        raise AssertionError
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("machines", [(1, 1), (2, 2), (4,), (1, 3), (2, 3)])
def test_the_first_of_each_machine_goes_ahead_of_the_others_there(machines):
    """Also where machines have different numbers of processes, whose ranks follow one another."""
    barrier, gone = Barrier(sum(machines)), []

    class Waiting(Processes):
        def wait(self, long=False):
            barrier.wait(timeout=30)

    def go(processes):
        with processes.one_ahead():
            gone.append(processes.rank)

    ranks, firsts = [], []
    for local in machines:
        on_this = [Waiting(len(ranks) + number, sum(machines), local) for number in range(local)]
        firsts += [each.rank for each in on_this if each.is_first_here]
        ranks += on_this
        assert len(firsts) == len(set(firsts)) and firsts[-1] in {each.rank for each in on_this}
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(go, ranks))
    assert len(firsts) == len(machines) and firsts[0] == 0
    assert set(gone[: len(machines)]) == set(firsts) and sorted(gone) == list(range(len(ranks)))


def test_ranks_are_named_in_words():
    assert [name_ranks(ranks) for ranks in ([1], [1, 2], [0, 2, 5])] == ["rank 1", "ranks 1 and 2", "ranks 0, 2 and 5"]
