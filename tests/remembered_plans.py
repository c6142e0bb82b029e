"""Measure the machine and predict equal jobs only once, for tests of many tiny runs: that is most of their time."""

import qlora_lite.planning.candidate
import qlora_lite.planning.largest
import qlora_lite.prepare.plan
from qlora_lite.planning.predict import predict


def remember_predictions(setattr_=setattr) -> None:
    """Put a memory before ``predict`` where plans are made.

    Args:
        setattr_: pytest's ``monkeypatch.setattr``, to take it back afterwards.
    """
    known = {}

    def remembered(job):
        key = repr(job)
        if key not in known:
            known[key] = predict(job)
        return known[key]

    machines = {}
    real = qlora_lite.prepare.plan.this_machine

    def measured_once(*arguments):
        if arguments not in machines:
            machines[arguments] = real(*arguments)
        return machines[arguments]

    setattr_(qlora_lite.prepare.plan, "this_machine", measured_once)
    for module in (qlora_lite.prepare.plan, qlora_lite.planning.candidate, qlora_lite.planning.largest):
        setattr_(module, "predict", remembered)
