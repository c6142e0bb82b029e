"""JSON whose rows lie in a list inside an object, or by columns, is not read; the error says where they may be."""

import json
import subprocess
import sys

import pytest

from qlora_lite.data.chat.row_formats import read_conversations
from qlora_lite.data.readers.data_files import MAX_ROW_BYTES
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError

ROWS = [{"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "w"}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ONE = "are the rows in the list 'data'? then make that list the file"
SEVERAL = "are the rows in one of the lists 'train' (2), 'test' (1)? then make that list the file"
COLUMNS = "is it a table written column by column? then write it row by row, in pandas with to_json("


def said(source):
    """Return what is said of a source, all of it one problem."""
    problems = Problems()
    try:
        assert list(read_conversations(source, problems)) == []
    except DataError as error:
        return str(error)
    assert problems.count == 1 and problems.fatal  # not one for each line of it
    return problems.shown[0]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "asked"),
    [
        ({"data": ROWS}, ONE),
        ({"version": "1.1", "data": ROWS, "ids": [1, 2], "none": []}, ONE),
        ({"version": 1, "license": "x", "by": None, "data": ROWS}, ONE),
        ({"train": ROWS, "test": ROWS[:1]}, SEVERAL),
        ({"dialogue": TURNS, "id": 1}, "are the turns in the list 'dialogue'? then rename it messages"),
        ({"prompt": ["x", "z"], "completion": ["y", "w"]}, COLUMNS),
        ({"prompt": {"0": "x", "1": "z"}, "completion": {"0": "y", "1": "w"}}, COLUMNS),
        ({"text": {"3": "x"}}, COLUMNS),
    ],
)
def test_an_object_is_asked_where_its_rows_are(write, content, asked, indent):
    path = write("a.json", json.dumps(content, indent=indent))
    message = said(Source(path))
    assert message.startswith(f"{path}:1: ") and asked in message


def test_the_command_that_it_gives_makes_the_file(write, tmp_path):
    path = write("a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1))
    command = said(Source(path)).partition("python -c ")[2].strip('"')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    kept = list(read_conversations(Source(str(tmp_path / "rows.json")), problems := Problems()))
    assert [row.turns[0].content for row in kept] == ["x", "z"] and not problems.count


def test_an_object_in_one_line_longer_than_any_row_is_asked_too(write):
    content = {"version": "1", "data": [{"prompt": "x" * (MAX_ROW_BYTES // 4), "completion": "y"}] * 5}
    assert ONE in said(Source(write("a.json", json.dumps(content))))


def test_lists_and_turns_beside_columns_of_text_may_be_none_of_the_rows():
    rows = [{"topic": "t", "id": 1, "facts": [{"a": 1}]}]
    message = said(Source("mine", rows=rows))
    assert "in the list 'facts'? then make that list the file; if not, say which ones to use in place of" in message
    rows = [{"question": "q", "answer": "a", "facts": [{"a": 1}]}]
    assert "facts'?" not in said(Source("mine", rows=rows)) and "python -c" not in message


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "x", "completion": "y"}, {}),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, {}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}),
        ({"a": "x", "b": "y", "c": [1, 2], "d": {"0": 1}}, {"prompt": "{a}", "completion": "{b}"}),
    ],
)
def test_a_row_is_none_of_these(write, row, settings):
    for number in (1, 2):
        path = write("a.json", [row] * number)
        assert len(list(read_conversations(Source(path, **settings), problems := Problems()))) == number
        assert not problems.count


def test_empty_lines_before_rows_are_none_of_them(write):
    for rows in (ROWS[:1], ROWS):
        path = write("a.json", b"\n\n" + b"\n".join(json.dumps(row).encode() for row in rows))
        assert len(list(read_conversations(Source(path), problems := Problems()))) == len(rows)
        assert not problems.count


@pytest.mark.parametrize(
    "bad",
    [b'{"prompt": "x", ', b'{"prompt": "\xff", ', b'{"prompt": "\xff", "completion": "y"}', b"x" * (MAX_ROW_BYTES + 1)],
)
def test_rows_behind_lines_that_are_none_are_still_read_line_by_line(write, bad):
    for number in (1, 2):
        path = write("a.json", b"\n".join([bad] * number + [json.dumps(ROWS[0]).encode(), bad]))
        kept = list(read_conversations(Source(path), problems := Problems()))
        assert [row.where for row in kept] == [f"{path}:{number + 1}"]
        assert problems.count == number + 1 and not problems.fatal
