"""Measure the machine and simulate equal steps only once, for tests of many plans or runs: most of their time."""

import qlora_lite.prepare.ranks
from qlora_lite.planning import simulate

_KNOWN: dict[str, object] = {}  # simulations of this process: most files train the same tiny models


def remember_simulations(setattr_=setattr) -> dict:
    """Put a memory before the simulation of a step at some depth.

    Args:
        setattr_: pytest's ``monkeypatch.setattr``, to take it back afterwards.

    Returns:
        What is known, which may be forgotten; a test that changes what is simulated has to, before and after.
    """
    real = simulate._on_meta

    def remembered(job, timeline=False):
        if timeline:
            return real(job, timeline)
        key = repr(job)
        if key not in _KNOWN:
            _KNOWN[key] = real(job)
        return _KNOWN[key]

    setattr_(simulate, "_on_meta", remembered)
    return _KNOWN


def remember_predictions(setattr_=setattr) -> dict:
    """Remember simulations, and measure this machine once; arguments and result as of ``remember_simulations``."""
    known = remember_simulations(setattr_)
    machines = {}
    real = qlora_lite.prepare.ranks.this_machine

    def measured_once(*arguments):
        if arguments not in machines:
            machines[arguments] = real(*arguments)
        return machines[arguments]

    setattr_(qlora_lite.prepare.ranks, "this_machine", measured_once)
    return known
