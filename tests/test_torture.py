"""A few of each of the faults of ``tools/torture``: all survived, no step lost, no result damaged."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "torture"
KILLS, ALL, RANKS = 5, 18, 3  # kinds of faults


@pytest.mark.parametrize(
    ("part", "faults"),
    [
        (["--only", "kills"], KILLS),
        pytest.param([], ALL, marks=pytest.mark.slow),
        pytest.param(["--ranks", "2"], RANKS, marks=pytest.mark.slow),
        pytest.param(["--kinds", "DPO", "masks"], 2, marks=pytest.mark.slow),
    ],
    ids=["kills", "all", "ranks", "kinds"],
)
@pytest.mark.slow
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


@pytest.fixture(scope="module")
def torture():
    loader = SourceFileLoader("torture", str(TOOL))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


KILLED = "error: rank 1 was killed by SIGKILL"


@pytest.mark.parametrize(
    ("log", "words", "is_right"),
    [
        (KILLED, "rank 1 was killed", True),
        (f"step 1\n{KILLED}\nerror: another process has ended", "rank 1 was killed", False),
        ("error: another process has ended", "rank 1 was killed", False),
        (f"stopped at once by SIGTERM\n{KILLED}", "rank 1 was killed", True),
        ("step 1", "rank 1 was killed", False),
        ("done: 8 steps", "rank 1 was killed", True),
        ("stopped by SIGTERM after step 3", "", True),
        ("stopped by SIGTERM after step 3\ninterrupted", "", False),
        ("", "", True),
    ],
)
def test_a_run_of_several_processes_has_to_end_with_one_message(log, words, is_right, torture, tmp_path):
    lab = torture.RanksLab.__new__(torture.RanksLab)  # without its runs
    row = torture.Row("SIGKILL of a rank")
    lab.log_path(tmp_path / "out").write_text(log + "\n", encoding="utf-8")
    lab.ended(row, tmp_path / "out", "trial", None, words)
    assert (not row.failures) is (not row.ended_wrongly) is is_right, row.failures


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_process_that_is_left_is_found_and_ended(torture, tmp_path):
    lab, row, out = torture.RanksLab.__new__(torture.RanksLab), torture.Row("SIGKILL of a rank"), tmp_path / "out"
    lab.log_path(out).write_text("done: 8 steps\n", encoding="utf-8")
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", f"output.dir={out}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as left:
        left.stdout.readline()
        lab.ended(row, out, "trial", None, "")
        assert left.wait(10) == -9 and f"processes [{left.pid}] were left" in row.failures[0]


def test_results_of_several_processes_are_kept_beside_those_of_one(torture, tmp_path, monkeypatch):
    monkeypatch.setattr(torture, "RESULTS", tmp_path)
    monkeypatch.setattr(torture, "write_result", lambda name, found: written(tmp_path / f"{name}.json", found))
    row, other = ({"fault": name, "tried": 1} for name in ("SIGKILL", "damage"))
    written(tmp_path / "torture.json", {"date": "then", "rows": [row, other]})
    torture.write([torture.Row("SIGKILL", 5, longest_end_seconds=2.0)], Namespace(ranks=2, only=None, seed=0))
    found = json.loads((tmp_path / "torture.json").read_text("utf-8"))
    assert found["date"] == "then" and found["rows"] == [row, other]
    assert [(row["tried"], row["longest_end_seconds"]) for row in found["ranks"]["2"]["rows"]] == [(5, 2.0)]
    torture.write([torture.Row("hang", 1)], Namespace(ranks=2, only="hanging_ranks", seed=0))
    torture.write([torture.Row("SIGKILL", 7)], Namespace(ranks=1, only="kills", seed=0))
    found = json.loads((tmp_path / "torture.json").read_text("utf-8"))
    assert [row["fault"] for row in found["ranks"]["2"]["rows"]] == ["SIGKILL", "hang"]
    assert [(row["fault"], row["tried"]) for row in found["rows"]] == [("SIGKILL", 7), ("damage", 1)]


def written(path, found):
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
