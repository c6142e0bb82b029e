"""What a process may still take: the machine's free memory, or what a container leaves."""

import threading
import time

import psutil
import pytest
import torch

from qlora_lite.memory import meter


@pytest.mark.parametrize(("limit", "free"), [("1000", 1000 - 700 + 300), ("max", None), ("9" * 30, None)])
def test_what_a_container_leaves_counts_the_pages_that_can_be_dropped(tmp_path, monkeypatch, limit, free):
    limits = {"limit": limit, "used": "700", "stat": "anon 400\ninactive_file 300\n"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    files = tmp_path / "limit", tmp_path / "used", tmp_path / "stat", "inactive_file"
    monkeypatch.setattr(meter, "_CGROUP_FILES", (files,))
    found = meter.free_bytes(torch.device("cpu"))
    assert found == free or (free is None and 0.5 < found / psutil.virtual_memory().available < 2)


def test_a_meter_can_be_closed_by_its_own_thread(monkeypatch):
    """As when that thread collects the garbage that holds it."""
    ended = []

    def held(_device):
        if threading.current_thread().name == "memory-meter" and not ended:
            ended.append(peak_meter.close())
        return 7

    monkeypatch.setattr(meter, "held_bytes", held)
    peak_meter = meter.PeakMeter("cpu")
    for _ in range(500):
        if ended:
            break
        time.sleep(0.01)
    assert ended == [None] and peak_meter.peak_bytes() == 7
