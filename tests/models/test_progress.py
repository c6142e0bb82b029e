"""Work of minutes says how far it is."""

import pytest
from transformers.utils import logging as transformers_logging

from qlora_lite.models.progress import Progress


@pytest.mark.parametrize("bars", [False, True])
def test_long_work_says_how_far_it_is_now_and_then(bars, monkeypatch, caplog, capfd):
    times = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("qlora_lite.models.progress.time.monotonic", lambda: next(times))
    was_shown = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    with caplog.at_level("INFO", "qlora_lite"):
        progress = Progress("splitting weights", 4)
        for _ in range(4):
            progress.step()
    (transformers_logging.enable_progress_bar if was_shown else transformers_logging.disable_progress_bar)()
    assert caplog.messages == ["splitting weights: 2 of 4"]
    assert ("4/4" in capfd.readouterr().err) == bars
