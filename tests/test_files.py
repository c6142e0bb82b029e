"""A file or folder is the old one or the new one, never half of either, and disk faults are one line with a cure."""

import errno
import glob
import hashlib
import os
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build_tiny

from qlora_lite import files
from qlora_lite.adapters.files import save_adapter
from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.data.readers.data_files import find_files
from qlora_lite.errors import DataError, OutputError
from qlora_lite.files import cache_root, explain_write_errors, replacing_folder, require_empty, sha256, write_text
from qlora_lite.runs.tracking import tracking


@contextmanager
def disk_of(limit: int):
    """Let no file grow beyond ``limit`` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    return tmp_path / "folder"


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_replaced_folder_has_only_the_new_files(folder):
    with replacing_folder(folder) as new:
        (new / "other").write_text("new")
        assert content(folder) == {"file": "old"}
    assert content(folder) == {"other": "new"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
def test_an_error_in_the_block_leaves_the_old_folder(folder, error):
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), replacing_folder(folder) as new:
        (new / "other").write_text("new")
        raise error
    assert content(folder) == {"file": "old"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_rename_that_fails_gives_the_old_folder_back(folder, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "the disk went away")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="the disk went away"), replacing_folder(folder) as new:
        (new / "other").write_text("new")
    assert content(folder) == {"file": "old"}


def test_two_writers_of_one_process_number_get_in_no_way_of_each_other(folder):
    with replacing_folder(folder) as first:
        (first / "file").write_text("first")
        with replacing_folder(folder) as second:
            (second / "file").write_text("second")
        assert content(folder) == {"file": "second"}
        (first / "other").write_text("first")
    assert content(folder) == {"file": "first", "other": "first"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_is_not_written_through_a_link_of_its_partial_name(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f".mine.{os.getpid()}.partial").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "mine", "mine")
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "mine").is_symlink()


def test_a_signal_between_the_two_renames_gives_the_old_folder_back(folder, monkeypatch):
    rename = Path.rename

    def cut_off(path, target):
        rename(path, target)
        if target.name.endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as new:
        (new / "other").write_text("new")
    assert content(folder) == {"file": "old"}


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, r"the disk is full \(.* free\); free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, r"read-only; name a writable one \(output.dir, --out or --html\)"),
        (errno.EACCES, "no permission; change the folder's owner"),
        (errno.ENOTDIR, "Not a directory; check the path"),
    ],
)
def test_every_fault_of_the_disk_names_the_path_and_a_cure(tmp_path, number, cure):
    with (
        pytest.raises(OutputError, match=rf"cannot write .*/deep/file: .*{cure}") as caught,
        explain_write_errors(tmp_path / "deep" / "file"),
    ):
        raise OSError(number, "Not a directory")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", [".", "..", "/", "folder/.."])
def test_a_folder_that_is_there_under_no_name_is_neither_a_file_to_write_nor_replaced(folder, monkeypatch, path):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(OutputError, match="it is a folder; name a file"):
        write_text(Path(path), "x")
    for use in (require_empty, lambda path: replacing_folder(path).__enter__()):
        with pytest.raises(OutputError, match="cannot be replaced; name a new one inside it"):
            use(Path(path))
    assert content(folder) == {"file": "old"}


def test_a_folder_that_a_rename_would_not_replace_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    require_empty(tmp_path / "empty")
    with pytest.raises(OutputError, match="is a link, and would be replaced; name the folder that it leads to"):
        require_empty(tmp_path / "link")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "empty")
    with pytest.raises(OutputError, match="is where a disk is mounted, and cannot be replaced; name a new folder"):
        require_empty(tmp_path / "empty")


def test_a_fault_of_the_cache_names_the_cache_s_own_setting():
    path = cache_root() / "tokens" / "x"
    with pytest.raises(OutputError, match=r"the disk is full .*\(\$QLORA_LITE_CACHE\)$"), explain_write_errors(path):
        raise OSError(errno.ENOSPC, "full")


def test_a_path_under_a_file_cannot_be_written(folder):
    named = {path.name for path in folder.iterdir()}
    for write in (lambda path: write_text(path, "x"), lambda path: replacing_folder(path).__enter__(), require_empty):
        with pytest.raises(OutputError, match="Not a directory"):
            write(folder / "file" / "below")
    require_empty(folder / "new" / "below")
    assert {path.name for path in folder.iterdir()} == named


def test_an_adapter_that_the_disk_has_no_room_for_is_one_line_and_the_old_one_stays(tmp_path):
    model = add_lora(build_tiny("llama"), rank=8)
    digest = save_adapter(model, tmp_path / "adapter")
    torch.nn.init.ones_(next(p for p in model.parameters() if p.requires_grad))
    with disk_of(10_000), pytest.raises(OutputError, match=r"cannot write .*adapter: .*File too large"):
        save_adapter(model, tmp_path / "adapter")
    assert sha256(tmp_path / "adapter" / "adapter_model.safetensors") == digest
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_text_that_the_disk_has_no_room_for_leaves_the_old_text(tmp_path):
    write_text(tmp_path / "file", "old")
    with disk_of(10_000), pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "file", "x" * 100_000)
    assert (tmp_path / "file").read_text() == "old"


def test_the_digest_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_pattern_matches_what_glob_says_and_searches_no_whole_disk(tmp_path, monkeypatch):
    for name in ("a/b/c/x.txt", "a/y.txt", "a/[z]/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    hidden = tmp_path / ".hidden" / "x.txt"
    hidden.parent.mkdir()
    hidden.touch()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    patterns = (
        "a/**/*.txt",
        "**/**/x.txt",
        "**/*/**/x.txt",
        "*/*.txt",
        "a/*",
        "**",
        "a/[[]z]/*",
        "none/*",
        "*/none",
        "a//*",
        ".*/x.txt",
    )
    for pattern in patterns:
        whole = os.path.join(tmp_path, pattern)
        found, expected = files.matches(whole), glob.glob(whole, recursive=True)
        assert sorted(map(os.path.normpath, found)) == sorted(set(map(os.path.normpath, expected))), pattern
    monkeypatch.chdir(tmp_path)
    assert sorted(files.matches("**/x.txt")) == sorted(glob.glob("**/x.txt", recursive=True)) and files.matches("a/*")
    monkeypatch.setattr(files, "MAX_FOLDERS", 3)
    assert files.matches(str(tmp_path / "*" / "y.txt"))  # which looks into one folder
    with pytest.raises(files.TooManyFolders, match=r"more than 3 folders would be searched; start the pattern closer"):
        files.matches(str(tmp_path / "**" / "**" / "x.txt"))


def test_a_pattern_is_not_sought_where_it_cannot_lead_nor_behind_links_upwards(tmp_path, monkeypatch):
    for name in ("a/b/x.txt", "a/c/d/e/x.txt", ".hidden/f/x.txt", "g/h/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    most = {"**/x.txt": 8, "a/b/*.txt": 1, "*/b/x.txt": 1, "*/b/*.txt": 2, "[a]/c/**/x.txt": 4}  # folders to look into
    for pattern, count in most.items():
        monkeypatch.setattr(files, "MAX_FOLDERS", count)
        assert files.matches(str(tmp_path / pattern)), pattern
        monkeypatch.setattr(files, "MAX_FOLDERS", count - 1)
        with pytest.raises(files.TooManyFolders):
            files.matches(str(tmp_path / pattern))


def test_a_name_that_is_there_as_it_is_written_is_no_pattern(tmp_path):
    for name in ("[old] rows/x.txt", "o/x.txt", "x[1].txt", "x1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pattern, name in (("[old] rows/*.txt", "[old] rows/x.txt"), ("x[1].txt", "x[1].txt"), ("[o]/*", "o/x.txt")):
        assert files.matches(str(tmp_path / pattern)) == [str(tmp_path / name)]
        assert [str(path) for path in find_files(str(tmp_path / pattern))] == [str(tmp_path / name)]


@pytest.mark.timeout(20)
def test_a_recipe_s_pattern_over_the_whole_disk_is_refused_soon(tmp_path, command, monkeypatch):
    monkeypatch.setattr(files, "MAX_FOLDERS", 500)
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {train: '/**/**/**/*.nothing'}\n")
    code, _, err = command("recipes", "check", tmp_path / "r.yaml")
    assert code == 2 and "r.yaml:2: data.train = /**/**/**/*.nothing: more than" in err and "start the pattern" in err
    with pytest.raises(DataError, match="start the pattern closer to the files"):
        find_files("/**/**/**/*.nothing")


@pytest.mark.parametrize("name", ["night", "tensorboard"])
def test_a_tracker_s_folder_that_is_a_link_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    refused = pytest.raises(OutputError, match=f"cannot write .*{name}: it is a symbolic link")
    with refused, tracking(["tensorboard"], "night", tmp_path):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EDEADLK])
def test_a_lock_that_windows_waits_for_in_vain_is_another_process(number, tmp_path, monkeypatch):
    def locking(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(LK_LOCK=1, locking=locking), raising=False)
    with pytest.raises(OutputError, match="another process is writing"), files.locked(tmp_path, wait=True):
        pytest.fail("it is not locked")
