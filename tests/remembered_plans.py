"""Let equal jobs be predicted once, for tests of many runs of one recipe: planning takes most of a tiny run's time."""

import qlora_lite.plan
import qlora_lite.planning.search
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

    for module in (qlora_lite.plan, qlora_lite.planning.search):
        setattr_(module, "predict", remembered)
