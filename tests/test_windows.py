"""Commands work where Python has what it has on Windows (``as_windows``: no Windows is at hand)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_files import save_tiny, write_recipe

from qlora_lite.data.chat import probe

COMMANDS = """
import sys
from qlora_lite.cli.main import main
for arguments in {!r}:
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


def on_windows(*arguments):
    """Start Python as it would be on Windows."""
    path = os.pathsep.join([str(Path(__file__).parent / "as_windows"), os.environ.get("PYTHONPATH", "")])
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], text=True, env=os.environ | {"PYTHONPATH": path}, **pipes
    )


def said_by(process) -> str:
    """Return what a process wrote, once it has ended well."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    save_tiny(folder / "model")
    file = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    for path in (folder / "model").glob("chat_template*"):
        path.unlink()
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(file | {"chat_template": template}))
    return write_recipe(folder, folder / "model")


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "list"], ["train", "--help"]])
def test_commands_that_need_no_model_work_on_windows(arguments):
    assert said_by(on_windows("-m", "qlora_lite", *arguments))


def test_a_run_is_looked_at_trained_and_merged_on_windows(recipe):
    out, merged = recipe.parent / "out", recipe.parent / "merged"
    commands = [["doctor"], ["data", recipe], ["plan", recipe], ["train", recipe], ["merge", out, "--out", merged]]
    said = said_by(on_windows("-c", COMMANDS.format([list(map(str, arguments)) for arguments in commands])))
    for words in ("bitsandbytes backend", "<|im_start|>", "evaluation loss", str(merged)):
        assert words in said
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and (merged / "model.safetensors").is_file()


def test_a_folder_is_locked_on_windows(tmp_path):
    (tmp_path / "run").mkdir()
    code = f"""
from pathlib import Path
from qlora_lite.errors import OutputError
from qlora_lite.files import locked
for path in ("run", "none"):
    for _ in range(2):
        try:
            with locked(Path({str(tmp_path)!r}, path)), locked(Path({str(tmp_path)!r}, path)):
                print("not locked")
        except OutputError as error:
            print(error)
"""
    first, again, *missing = said_by(on_windows("-c", code)).splitlines()
    assert first == again and "another process is writing" in first
    assert all("none: No such file" in each for each in missing) and len(missing) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_a_template_that_computes_for_ever_is_ended_by_the_clock_on_windows():
    probe.end_child()  # of this process, which is forgotten below
    code = "from qlora_lite.data.chat import probe\nprobe.CLOCK_SECONDS = 0.2\n"
    code += "probe._limit_seconds(0)\nprobe._limit_seconds(None)\nprint('there')\n"
    process = on_windows("-c", code + "probe._limit_seconds(0)\n9 ** (9**8)")
    assert process.stdout.readline() == "there\n"
    assert probe._why_it_ended(process) == "takes more than 10 seconds"
