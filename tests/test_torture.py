"""A few of each of the faults of ``tools/torture``: all survived, no step lost, no result damaged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "torture"
KILLS, ALL = 5, 18  # kinds of faults


@pytest.mark.parametrize(
    ("part", "faults"),
    [(["--only", "kills"], KILLS), pytest.param([], ALL, marks=pytest.mark.slow)],
    ids=["kills", "all"],
)
def test_killed_stopped_hindered_and_damaged_runs_come_to_the_same_end(part, faults):
    done = subprocess.run([sys.executable, TOOL, "--short", *part], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.{58})" + r" +(\d+)" * 5 + "$", done.stdout, re.MULTILINE)
    may_mount = faults == ALL and "left out, this process may not mount one" not in done.stdout
    assert len(rows) == faults + may_mount
    for fault, tried, survived, lost, damaged, again in rows:
        assert int(tried) == int(survived) > 0, fault
        assert int(lost) == int(damaged) == 0, fault
        if fault.startswith("SIG"):  # at most the interval before, and the one whose checkpoint was being written
            assert int(again) <= 4, fault
