"""Measure the machine and simulate equal steps only once, for tests of many plans or runs: most of their time."""

from dataclasses import replace

import qlora_lite.prepare.ranks
from qlora_lite.planning import simulate


def _shown(spec):
    """A spec with all of its configuration; a denoiser's is text already."""
    config = spec.config
    return spec if isinstance(config, str) else replace(spec, config=config.to_json_string(use_diff=False))


def remember_simulations(setattr_=setattr) -> dict:
    """Put a memory before the simulation of a step at some depth.

    Args:
        setattr_: pytest's ``monkeypatch.setattr``, to take it back afterwards.

    Returns:
        What is known, which may be forgotten.
    """
    known, real = {}, simulate._on_meta

    def remembered(job, timeline=False):
        if timeline:
            return real(job, timeline)
        spec = job.workload.spec  # which is not shown
        key = repr((job, _shown(spec)))
        if key not in known:
            known[key] = real(job)
        return known[key]

    setattr_(simulate, "_on_meta", remembered)
    return known


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
