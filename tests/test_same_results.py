"""The tool that guards refactorings: every changed, missing or new value is found, and nothing else."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from check import same_cases

TOOL = Path(__file__).parent.parent / "tools" / "check" / "same_results"

HERE = {"machine": {"cpu": "one"}, "versions": {"torch": "2.0"}}


def results(weight: float, loss: float = 0.1 + 0.2, folder: Path | None = None):
    """Write a run's files, and return what the tool takes from them."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    save_file(
        {"lora_A": torch.tensor([[weight]], dtype=torch.bfloat16), "lora_B": torch.zeros(2)},
        folder / "adapter" / "weights.safetensors",
    )
    (folder / "adapter" / "config.json").write_text(json.dumps({"base": str(folder / "model"), "rank": 1}))
    (folder / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    lines = [{"step": 1, "loss": loss, "seconds": weight}, {"step": 2, "loss": float("nan"), "why": str(weight)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exported = same_cases.exported(folder / "adapter", folder)
    return exported | same_cases.json_file(folder / "metrics.jsonl", folder)


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Compare recorded cases with those that are found now; the function's exit code."""
    module = runpy.run_path(str(TOOL))

    def run(recorded, now, pattern="", there=HERE, renamed=None):
        def records(_):
            yield HERE
            yield from ({"case": name, "cpu_seconds": 1.0, "results": found} for name, found in now.items())

        names = module["compare"].__globals__
        monkeypatch.setitem(names, "records", records)
        monkeypatch.setitem(names, "RENAMED", renamed or {})
        (tmp_path / "recorded.json").write_text(json.dumps(there | {"cases": recorded}))
        return module["compare"](tmp_path / "recorded.json", pattern)

    return run


def test_runs_with_the_same_weights_and_losses_are_the_same_wherever_and_however_fast(compare, tmp_path, capsys):
    first, second = results(1.0, folder=tmp_path / "a"), results(1.0, folder=tmp_path / "b")
    assert compare({"run": first}, {"run": second}) == 0
    assert "all 9 values are the same" in capsys.readouterr().out


def test_a_changed_digest_and_the_last_bit_of_a_loss_are_found_with_both_values(compare, tmp_path, capsys):
    first, second = results(1.0, folder=tmp_path / "a"), results(1.0078125, loss=0.3, folder=tmp_path / "b")
    assert compare({"run": first}, {"run": second}) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "recorded" in line]
    name = "weights.safetensors/lora_A"
    assert said == [
        "  metrics.jsonl/0/loss: recorded 0.30000000000000004, now 0.3",
        f"  {name}: recorded {first[name]!r}, now {second[name]!r}",
    ]
    assert first[name].startswith("BF16 [1, 1] ") and first[name] != second[name]


def test_what_is_only_on_one_side_differs_and_a_renamed_word_does_not(compare, capsys):
    assert compare({"a": {"x": 1}, "b": {"x": 1}}, {"a": {"x": 1, "y": 2}}) == 1
    said = capsys.readouterr().out
    assert "y: recorded 'nothing', now 2" in said and "b: recorded, and not run now" in said
    recorded, now = (
        {"a": {"uncheckpointed_layers/0": "uncheckpointed_layers=1"}},
        {"a": {"whole_blocks/0": "whole_blocks=1"}},
    )
    assert compare(recorded, now) == 1
    assert compare(recorded, now, renamed={"uncheckpointed_layers": "whole_blocks"}) == 0
    assert compare({"other": {"x": 1}}, {}, pattern="none") == 1  # nothing was compared


def test_results_of_other_versions_or_processors_are_not_compared(compare, capsys):
    there = HERE | {"versions": {"torch": "1.9"}}
    assert compare({"a": {"x": 1}}, {"a": {"x": 1}}, there=there) == 2
    assert "torch: recorded '1.9', now '2.0'" in capsys.readouterr().err


def test_no_file_is_written_when_a_case_failed(monkeypatch, tmp_path, capsys):
    record = runpy.run_path(str(TOOL))["record"]
    rows = [HERE, *({"case": name, "cpu_seconds": 1.0, "results": {"x": 1}} for name in "ab")]
    monkeypatch.setitem(record.__globals__, "records", lambda _: iter(rows))
    assert record(tmp_path / "new.json", "") == 0 and json.loads((tmp_path / "new.json").read_text())["cases"]["b"]
    rows[2]["results"] = {"failed": "no room"}
    assert record(tmp_path / "other.json", "") == 1 and not (tmp_path / "other.json").exists()
    assert "b: no room" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_that_fails_is_a_failed_case_and_one_that_prints_gives_its_text(tmp_path):
    """In a process of one thread, since it forks."""
    code = (
        "import sys, pathlib; from same_cases import *; folder = pathlib.Path(sys.argv[1])\n"
        "assert command(folder, '--version').startswith('qlora-lite')\n"
        "try: command(folder, 'plan', 'no-such-recipe')\n"
        "except CommandError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=TOOL.parent)
    assert done.stdout.startswith("qlora-lite plan ended with 2: error: no recipe"), done.stderr


def test_every_case_has_a_name_of_its_own():
    counted = sum(
        map(
            len,
            (
                same_cases.ARCHITECTURES,
                same_cases.UNUSUAL,
                same_cases.NESTED,
                same_cases.OPTIONS,
                same_cases.SETTINGS,
                same_cases.PLANS,
                same_cases.KINDS,
                same_cases.OF_RANKS,
            ),
        )
    )
    assert len(same_cases.cases()) == counted + 3


@pytest.mark.slow
def test_a_recorded_run_is_the_same_again_and_its_digest_is_compared(tmp_path):
    def tool(*arguments):
        command = [sys.executable, str(TOOL), *map(str, arguments), "--only", "^family llama$"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    path = tmp_path / "recorded.json"
    assert tool("--record", path).returncode == 0
    assert tool("--against", path).returncode == 0
    content = json.loads(path.read_text())
    name = next(name for name in content["cases"]["family llama"] if name.startswith("adapter/"))
    content["cases"]["family llama"][name] = "another digest"
    path.write_text(json.dumps(content))
    done = tool("--against", path)
    assert done.returncode == 1 and f"{name}: recorded 'another digest', now 'BF16" in done.stdout
