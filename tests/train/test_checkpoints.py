"""A checkpoint is whole or it is not one: every kind of damage is found, and the one before is taken."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_lite.errors import CheckpointError, OutputError
from qlora_lite.memory.meter import mapped_bytes
from qlora_lite.quant.tensor_file import write_tensors
from qlora_lite.train.checkpoints import (
    MANIFEST,
    Checkpoint,
    folder_of,
    keep_only,
    newest_whole,
    read_checkpoint,
    sealed,
    steps_on_disk,
    write_checkpoint,
)

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def content(step):
    """A checkpoint with two files of tensors and one of numbers, other ones for each step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "adapter_model.safetensors": {"a": torch.randn(7, 3, generator=generator), "b": torch.arange(step)},
        "optimizer.safetensors": {"state1": torch.randint(0, 255, (300,), generator=generator, dtype=torch.uint8)},
    }
    return Checkpoint(step, tensors, {"state.json": {"step": step, "name": "ü", "values": [1.5, None]}})


@pytest.fixture
def root(tmp_path):
    for step in (3, 12):
        write_checkpoint(tmp_path / "checkpoints", content(step), {"torch": "1"}, "abc")
    return tmp_path / "checkpoints"


def assert_content(checkpoint, step):
    wanted = content(step)
    assert checkpoint.step == step and checkpoint.documents == wanted.documents
    assert checkpoint.tensors.keys() == wanted.tensors.keys()
    for file, tensors in wanted.tensors.items():
        assert checkpoint.tensors[file].keys() == tensors.keys()
        assert all(torch.equal(tensor, checkpoint.tensors[file][name]) for name, tensor in tensors.items())


def test_whoever_may_read_a_users_new_files_may_read_its_tensors(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_checkpoint_that_is_read_takes_pages_of_its_files_and_no_memory(tmp_path):
    tensors = {"optimizer.safetensors": {"state": torch.zeros(2**20)}}
    write_checkpoint(tmp_path, Checkpoint(1, tensors, {}), {"torch": "1"}, "abc")
    read = read_checkpoint(folder_of(tmp_path, 1)).tensors["optimizer.safetensors"]
    assert mapped_bytes(read.values()) == 4 * 2**20
    read["state"][: 2**19] = 1
    assert mapped_bytes(read.values()) == pytest.approx(2 * 2**20, abs=2**13), "pages that were written to are memory"


def test_a_checkpoint_comes_back_as_it_was_and_the_newest_is_found(root):
    checkpoint, reasons = newest_whole(root)
    assert reasons == []
    assert_content(checkpoint, 12)
    assert_content(read_checkpoint(folder_of(root, 3)), 3)
    assert steps_on_disk(root) == [12, 3]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000012"]


def test_the_manifest_names_versions_recipe_and_every_file(root):
    manifest = json.loads((folder_of(root, 12) / MANIFEST).read_text())["manifest"]
    assert manifest["versions"] == {"torch": "1"} and manifest["recipe_sha256"] == "abc" and manifest["step"] == 12
    assert manifest["files"].keys() == {*FILES} - {MANIFEST}
    assert all(
        entry["bytes"] == (folder_of(root, 12) / name).stat().st_size for name, entry in manifest["files"].items()
    )


def test_where_there_is_no_checkpoint_none_is_found(tmp_path):
    assert newest_whole(tmp_path / "none") == (None, [])
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".step-00000004.77.partial").mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    checkpoint, reasons = newest_whole(tmp_path)
    assert checkpoint is None and len(reasons) == 1


def flip(place):
    def damage(path):
        raw = bytearray(path.read_bytes())
        raw[int(place * (len(raw) - 1))] ^= 1
        path.write_bytes(raw)

    return damage


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first bit": flip(0.0),
    "middle bit": flip(0.5),
    "last bit": flip(1.0),
    "of another step": lambda path: shutil.copy(folder_of(path.parent.parent, 3) / path.name, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.with_suffix(".kept")), path.symlink_to(path.with_suffix(".kept"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a pickle": lambda path: torch.save({"a": torch.ones(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_of_every_file_is_found_and_the_one_before_is_taken(root, file, damage):
    damage(folder_of(root, 12) / file)
    checkpoint, reasons = newest_whole(root)
    assert_content(checkpoint, 3)
    assert len(reasons) == 1 and file in reasons[0] and str(folder_of(root, 12)) in reasons[0]
    assert "\n" not in reasons[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_damage(root):
    (folder_of(root, 12) / FILES[0]).chmod(0)
    assert newest_whole(root)[0].step == 3


def test_a_folder_under_another_number_is_not_taken_for_it(root):
    folder_of(root, 12).rename(folder_of(root, 20))
    checkpoint, reasons = newest_whole(root)
    assert checkpoint.step == 3 and f"{MANIFEST} is that of step 12" in reasons[0]


def forged(root, change):
    """Rewrite the manifest of step 12 with a right seal, as someone who knows how would."""
    path = folder_of(root, 12) / MANIFEST
    manifest = json.loads(path.read_text())["manifest"]
    change(manifest)
    path.write_text(sealed(manifest))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder_of(root, 12))
    return str(caught.value)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "..", "", "a/b.json", "x.pickle", "x.bin", MANIFEST])
def test_a_forged_manifest_reaches_no_other_file(root, name):
    (root / "secret.json").write_text("{}")
    entry = {"bytes": 2, "sha256": "0" * 64}
    assert "is no name of a file in it" in forged(root, lambda m: m["files"].update({name: entry}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files=[]),
        lambda m: m.update(files={"x.json": 3}),
        lambda m: m.update(files=None),
        lambda m: m.update(format=1),
        lambda m: m.update(step="12"),
        lambda m: m.update(step=True),
        lambda m: m.pop("step"),
        lambda m: m["files"]["state.json"].update(bytes="9"),
        lambda m: m["files"]["state.json"].pop("sha256"),
    ],
    ids=range(9),
)
def test_a_forged_manifest_is_one_clean_error(root, change):
    assert "\n" not in forged(root, change)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"manifest": {}}', "\xff\xfe", "NaN"])
def test_a_manifest_that_is_no_manifest_is_one_clean_error(root, text):
    (folder_of(root, 12) / MANIFEST).write_bytes(text.encode("latin-1"))
    assert newest_whole(root)[0].step == 3


def test_only_the_steps_named_are_kept(root):
    write_checkpoint(root, content(15), {}, "")
    keep_only(root, [15, 12])
    assert steps_on_disk(root) == [15, 12]
    assert len(list(root.iterdir())) == 2


def test_a_checkpoint_of_the_same_step_is_replaced(root):
    (folder_of(root, 12) / "state.json").unlink()
    write_checkpoint(root, content(12), {}, "")
    assert_content(newest_whole(root)[0], 12)


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*checkpoints: No such file"):
        write_checkpoint(tmp_path / "gone" / "checkpoints", content(1), {}, "")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_at_any_point_leaves_the_checkpoints_there_are(root, monkeypatch, number):
    """Let the n-th flush or rename fail, for every n."""
    for function in ("fsync", "rename"):
        point = 0
        while True:
            calls, real = iter(range(10_000)), getattr(os, function)

            def fail(*arguments, calls=calls, real=real, point=point):
                if next(calls) == point:
                    raise OSError(number, os.strerror(number))
                return real(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, function, fail)
                try:
                    write_checkpoint(root, content(13), {}, "")
                except OutputError as error:
                    assert "cannot write" in str(error)
                else:
                    break
            checkpoint, reasons = newest_whole(root)
            assert checkpoint.step in (12, 13) and reasons == [] and steps_on_disk(root)[-2:] == [12, 3]
            point += 1
        assert point > (5 if function == "fsync" else 0)
        shutil.rmtree(folder_of(root, 13))


def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    driver = Path(__file__).parent / "kill_at_every_point.py"
    done = subprocess.run([sys.executable, driver, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 15 and outcomes[-1] == "ended"
    assert set(outcomes[:-1]) == {"old", "new"}
    assert outcomes.index("new") >= 10  # all that can fail comes before the rename
