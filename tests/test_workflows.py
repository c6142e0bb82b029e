"""The workflows call scripts that exist, and the scripts find Python on every system they are called on."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHON_THAT_MAKES_A_FOLDER = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/{programs}" && cp "$0" "$3/{programs}/python"
"""


def load(path):
    """Return a workflow's triggers, in YAML 1.1 the key of which is true, and its jobs."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return workflow[True], workflow["jobs"]


def test_there_are_workflows_for_every_system_and_for_a_gpu():
    assert [path.name for path in WORKFLOWS] == ["gpu.yml", "site.yml", "tests.yml"]
    _, jobs = load(ROOT / ".github" / "workflows" / "tests.yml")
    systems = {case["system"].split("-")[0] for case in jobs["newest"]["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "windows", "macos"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_scripts_that_exist(path):
    commands = [step["run"] for job in load(path)[1].values() for step in job["steps"] if "run" in step]
    called = [file for command in commands for file in re.findall(r"\b(?:tools|tests|recipes)/[\w./-]+", command)]
    assert len(called) >= len(commands) >= 1
    assert all((ROOT / file).is_file() for file in called), called


def test_no_pull_request_starts_code_on_the_machine_with_the_gpu():
    triggers, jobs = load(ROOT / ".github" / "workflows" / "gpu.yml")
    assert set(triggers) == {"workflow_dispatch"}
    assert all("self-hosted" in job["runs-on"] for job in jobs.values())


@pytest.mark.skipif(os.name == "nt", reason="its programs are shell scripts")
@pytest.mark.parametrize(
    ("system", "programs", "name"),
    [("Linux", "bin", "python3"), ("Darwin", "bin", "python3.12"), ("MINGW64_NT-10.0", "Scripts", "python")],
)
def test_a_virtual_environment_is_made_and_found_on_every_system(tmp_path, system, programs, name):
    files = {name: PYTHON_THAT_MAKES_A_FOLDER.format(programs=programs), "uname": f"#!/bin/sh\necho {system}\n"}
    (tmp_path / "fakes").mkdir()
    for file, text in files.items():
        (tmp_path / "fakes" / file).write_text(text)
        (tmp_path / "fakes" / file).chmod(0o755)
    for tool in ("bash", "sh", "dirname", "mkdir", "cp"):  # and no Python but the one above
        (tmp_path / "fakes" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "tools").mkdir()
    shutil.copyfile(ROOT / "tools" / "_venv.sh", tmp_path / "tools" / "_venv.sh")
    script = f'source "{tmp_path}/tools/_venv.sh"; command -v python'
    done = subprocess.run(["bash", "-c", script], env={"PATH": str(tmp_path / "fakes")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path.resolve() / ".venv" / programs / "python")
