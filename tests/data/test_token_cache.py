"""Cached tokens are found by everything they depend on, and only when they are whole."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import Trap
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens import token_cache
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.errors import DataError
from qlora_lite.files import sha256

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(5)]


@pytest.fixture
def build(write, tokenizer, tmp_path):
    """Build the set of ROWS with a cache of this test alone."""

    def build_set(rows=ROWS, source=None, tokenizer=tokenizer, **settings):
        source = source or {}
        return read_examples(
            [Source(write("a.jsonl", rows), **source)], tokenizer, ReadSettings(**settings), cache=tmp_path / "cache"
        )

    return build_set


@pytest.fixture
def entries(tmp_path):
    return lambda: sorted(path.name for path in (tmp_path / "cache").glob("*"))


@pytest.fixture
def no_reading(monkeypatch):
    """Call the result to fail the test when rows are read again."""

    def forbid():
        def fail(*_):
            raise AssertionError("the cache missed")

        monkeypatch.setattr(TextReader, "read", fail)

    return forbid


def plain(data):
    rows = [(e.token_ids.tolist(), e.is_target.tolist(), e.prompt, e.answer, e.where) for e in data.examples]
    template = data.template and (data.template.name, data.template.source)
    return (
        rows,
        data.rows_read,
        data.dropped,
        data.dropped_at,
        data.truncated,
        data.split,
        data.tokens,
        data.target_tokens,
        data.end_token_ids,
        template,
        data.problems.found,
        data.problems.counts,
        data.problems.fatal,
    )


def test_a_second_build_comes_from_the_cache_and_is_equal_to_one_without(
    build, entries, no_reading, tmp_path, tokenizer
):
    first = build(source={"weight": 1.5})
    bare = read_examples([Source(str(tmp_path / "a.jsonl"), weight=1.5)], tokenizer)
    no_reading()
    assert plain(build(source={"weight": 1.5})) == plain(first) == plain(bare)
    assert len(entries()) == 1 and not entries()[0].startswith(".")


def test_problems_are_kept_with_the_set(build, no_reading):
    first = build([*ROWS, {"prompt": "x"}, {"prompt": "x " * 90, "completion": "y"}], max_tokens=60)
    assert first.problems.count == 2 and first.problems.fatal
    no_reading()
    again = build([*ROWS, {"prompt": "x"}, {"prompt": "x " * 90, "completion": "y"}], max_tokens=60)
    assert plain(again) == plain(first)


def test_documents_of_a_tokenizer_without_a_template_are_cached(build, no_reading):
    tokenizer = make_tokenizer(template=None)
    first = build([{"text": "what is the question"}], tokenizer=tokenizer)
    no_reading()
    assert plain(build([{"text": "what is the question"}], tokenizer=tokenizer)) == plain(first)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*ROWS[:-1], {"prompt": "question 4", "completion": "answer 5"}]},
        {"template": "plain"},
        {"train_on": "all"},
        {"max_tokens": 500},
        {"overflow": "drop"},
        {"train_on_end": False},
        {"source": {"weight": 2.0}},
        {"source": {"prompt": "{completion}", "completion": "{prompt}"}},
        {"tokenizer": make_tokenizer(adds_begin=True)},
        {"tokenizer": make_tokenizer(template="plain")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_anything_that_tokens_depend_on_builds_another_set(build, entries, change):
    build()
    changed = build(**change)
    assert len(entries()) == 2
    shutil.rmtree(Path(changed.examples.files[0]).parent / "cache")
    assert plain(build(**change)) == plain(changed)


def test_a_template_file_that_changes_under_its_name_builds_another_set(build, entries, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(NAMED_TEMPLATES["chatml"])
    build(template=str(path))
    path.write_text(NAMED_TEMPLATES["plain"])
    assert build(template=str(path)).template.source == NAMED_TEMPLATES["plain"]
    assert len(entries()) == 2


def test_other_code_builds_another_set(build, entries, monkeypatch):
    build()
    assert len(token_cache._code()) > 10
    monkeypatch.setattr(token_cache, "_code", lambda: ["other"])
    build()
    assert len(entries()) == 2


@pytest.mark.parametrize("name", ["token_ids", "is_target", "text", "rows", "set.json", "order.npy"])
@pytest.mark.parametrize("damage", ["cut short", "missing", "empty", "one bit"])
def test_a_damaged_set_is_made_again(build, entries, tmp_path, name, damage):
    first = build()
    (entry,) = (tmp_path / "cache").iterdir()
    whole = (entry / name).read_bytes()
    (entry / name).unlink()
    if damage != "missing":
        flipped = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
        (entry / name).write_bytes({"cut short": whole[:-1], "empty": b"", "one bit": flipped}[damage])
    assert plain(build()) == plain(first)
    assert (entry / name).read_bytes() == whole and len(entries()) == 1


def test_a_pickle_in_place_of_an_array_is_never_run(build, tmp_path):
    rows = ROWS * 60
    expected = plain(build(rows))
    (entry,) = (tmp_path / "cache").iterdir()
    np.save(tmp_path / "trap.npy", np.array([Trap(tmp_path / "ran")], dtype=object), allow_pickle=True)
    trap, size = (tmp_path / "trap.npy").read_bytes(), (entry / "order.npy").stat().st_size
    assert len(trap) < size, "of another size it would not even be opened"
    written = sha256(entry / "order.npy")
    (entry / "order.npy").write_bytes(trap.ljust(size, b"\0"))
    text = (entry / "set.json").read_text().partition("\n")[2].replace(written, sha256(entry / "order.npy"))
    (entry / "set.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")  # sealed again
    assert plain(build(rows)) == expected and not (tmp_path / "ran").exists()
    np.load(tmp_path / "trap.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists(), "a reader of pickles would have run it"


def test_a_cache_that_cannot_be_written_costs_one_line_and_no_more(write, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    source = Source(write("a.jsonl", ROWS))
    data = read_examples([source], tokenizer, cache=tmp_path / "file" / "cache")
    assert plain(data) == plain(read_examples([source], tokenizer))
    assert "the tokens are not cached: cannot write" in caplog.text


def test_a_source_that_is_not_there_is_a_problem_and_nothing_is_cached(tokenizer, tmp_path, entries):
    data = read_examples([Source(str(tmp_path / "nothing.jsonl"))], tokenizer, cache=tmp_path / "cache")
    assert "no such file" in str(data.problems.found[0]) and entries() == []


CHILD = """
import os, signal, sys
from pathlib import Path
from tiny_tokenizer import make_tokenizer
from qlora_lite import files
from qlora_lite.data.tokens import examples, storage, token_cache
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError
def kill(*arguments):
    if sys.argv[2] != "flush_to_disk" or sys.argv[4] in str(arguments[0]):  # not the flush of a noted digest
        os.kill(os.getpid(), signal.SIGKILL)
holders = {"storage": storage.ExampleWriter, "examples": examples, "token_cache": token_cache, "files": files}
setattr(holders[sys.argv[1]], sys.argv[2], kill)
examples.read_examples([Source(sys.argv[3])], make_tokenizer(), cache=Path(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [("storage", "finish"), ("examples", "save_set"), ("token_cache", "write_sealed"), ("files", "flush_to_disk")],
)
def test_a_process_killed_half_way_leaves_nothing_that_looks_whole(
    module, function, write, tokenizer, tmp_path, no_reading
):
    path, cache = write("a.jsonl", ROWS), tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", CHILD, module, function, path, str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [entry for entry in cache.iterdir() if not entry.name.startswith(".")] == []
    first = read_examples([Source(path)], tokenizer, cache=cache)
    no_reading()
    assert plain(read_examples([Source(path)], tokenizer, cache=cache)) == plain(first)


def test_what_a_killed_process_left_is_removed_after_a_day(build, tmp_path, entries):
    for name, hours in ((".old.1.partial", 25), (".new.1.partial", 23)):
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        np.save(folder / "rows.npy", np.zeros(1))
        for path in (folder / "rows.npy", folder):
            os.utime(path, times=(path.stat().st_mtime - hours * 3600,) * 2)
    build()
    assert ".old.1.partial" not in entries() and ".new.1.partial" in entries()


@pytest.fixture
def small(build, monkeypatch, tmp_path):
    """Build three sets, the first used last, and return the entry of each; the cache then holds two and a half."""
    entries, cache = [], tmp_path / "cache"
    for number in range(3):
        build([{"prompt": f"question {number}", "completion": "answer"}])
        (new,) = set(cache.iterdir()) - set(entries)
        os.utime(new / "set.json", (number, number))
        entries.append(new)
    build([{"prompt": "question 0", "completion": "answer"}])
    size_bytes = sum(file.stat().st_size for file in entries[0].iterdir())
    monkeypatch.setenv("QLORA_LITE_TOKEN_CACHE_GIB", str(2.5 * size_bytes / 2**30))
    return entries


def test_what_was_not_used_for_longest_makes_room_for_a_new_set(small, build, entries):
    build([{"prompt": "question 3", "completion": "answer"}])
    assert small[0].name in entries() and len(entries()) == 2
    assert {small[1].name, small[2].name}.isdisjoint(entries())


def test_a_set_that_is_open_can_still_be_read_after_its_removal(small, build, tmp_path, entries, monkeypatch):
    rows = [{"prompt": "question 1", "completion": "answer"}]
    opened, expected = build(rows), plain(build(rows))
    monkeypatch.setenv("QLORA_LITE_TOKEN_CACHE_GIB", "0")
    build([{"prompt": "question 3", "completion": "answer"}])
    assert small[1].name not in entries() and len(entries()) == 1
    assert plain(opened) == expected


def test_the_new_set_stays_whatever_its_size(small, build, entries, monkeypatch, no_reading):
    monkeypatch.setenv("QLORA_LITE_TOKEN_CACHE_GIB", "0")
    first = build(ROWS)
    assert len(entries()) == 1
    no_reading()
    assert plain(build(ROWS)) == plain(first)


def test_a_removal_cut_short_is_finished_first(small, build, entries):
    (small[0] / "set.json").unlink()
    build([{"prompt": "question 3", "completion": "answer"}])
    assert small[0].name not in entries() and small[2].name in entries()


def test_a_use_is_noted_and_a_cache_that_cannot_be_written_can_still_be_read(small, build, no_reading, monkeypatch):
    assert (small[0] / "set.json").stat().st_mtime > 1000 > (small[1] / "set.json").stat().st_mtime

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(token_cache.os, "utime", refuse)
    no_reading()
    assert build([{"prompt": "question 2", "completion": "answer"}]).rows_kept == 1


@pytest.mark.parametrize("given", ["-1", "many", "nan", "inf"])
def test_a_bound_that_is_no_number_is_an_error(build, monkeypatch, given):
    monkeypatch.setenv("QLORA_LITE_TOKEN_CACHE_GIB", given)
    with pytest.raises(DataError, match=rf"QLORA_LITE_TOKEN_CACHE_GIB is '{given}'; set it to a number of GiB"):
        build()


def test_without_the_variable_the_bound_is_the_documented_one(monkeypatch):
    monkeypatch.delenv("QLORA_LITE_TOKEN_CACHE_GIB", raising=False)
    assert token_cache.most_bytes() == 20 * 2**30


def test_the_key_is_made_of_every_module_of_the_room():
    room = Path(token_cache.__file__).parents[1]
    assert {sha256(path) for path in room.rglob("*.py")} <= {*token_cache._code()}
