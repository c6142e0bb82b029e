"""Every known fault of a row or a file, from the file to the error: named with file, line, rule and cure.

One table, so that a fault that is missing here is seen to be missing. How each reader and each format finds its
faults is tested beside them; here the whole way is gone that a recipe's rows go.
"""

import gzip
import json
import os
import re

import pytest

from qlora_lite.data.readers import data_files, sources
from qlora_lite.data.readers.data_files import MAX_ROW_BYTES
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import build_examples, read_examples
from qlora_lite.errors import DataError


def row(prompt="q", completion="a"):
    return json.dumps({"prompt": prompt, "completion": completion}).encode()


def talk(*turns, **more):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more}).encode()


GOOD, GOOD_TALK = row(), talk(("user", "q"), ("assistant", "a"))
DEEP = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
MALFORMED, ROLE, CONTROL, UTF8 = "malformed row", "unknown role", "control token in text", "not UTF-8"
CALL = {"name": "f", "arguments": {}}

# what is wrong: (good row of the same format, bad line, rule, what the message says, and its cure)
FAULTS = {
    "a line cut short": (GOOD, GOOD[:-5], MALFORMED, r"cut short.*correct or remove"),
    "a byte-order mark inside the file": (GOOD, b"\xef\xbb\xbf" + GOOD, MALFORMED, "not JSON.*correct or remove"),
    "a NUL byte": (GOOD, row("a\0b").replace(b"\\u0000", b"\0"), MALFORMED, "NUL character; remove"),
    "a NUL escape": (GOOD, row("a\0b"), MALFORMED, "NUL character.*; remove"),
    "bytes that are not UTF-8": (GOOD, row("caf").replace(b"caf", b"caf\xe9"), UTF8, "byte 16.*; convert the file"),
    "half of a surrogate pair": (GOOD, row("\ud800"), MALFORMED, "surrogate.*; remove"),
    "an array instead of an object": (GOOD, b"[" + GOOD + b"]", MALFORMED, r"a list instead.*name the file \.json"),
    "text instead of an object": (GOOD, b'"q"', MALFORMED, "each row must be an object"),
    "null instead of an object": (GOOD, b"null", MALFORMED, "each row must be an object"),
    "two objects in one line": (GOOD, GOOD + GOOD, MALFORMED, "something follows.*; one object per line"),
    "null as text": (GOOD, row(None), MALFORMED, "'prompt' is missing or null; every row needs it"),
    "a nested null": (GOOD_TALK, talk(("user", "q"), ("assistant", None)), MALFORMED, "turn 2.*missing or null; every"),
    "a number as text": (GOOD, row(7), MALFORMED, "'prompt' is a number, not text; put it in quotes"),
    "a boolean as text": (GOOD, row(True), MALFORMED, "'prompt' is a boolean, not text; put it in quotes"),
    "a list as text": (GOOD, row(["q"]), MALFORMED, "'prompt' is a list, not text; write it as text"),
    "turns instead of text": (
        GOOD,
        row([{"role": "user", "content": "q"}]),
        MALFORMED,
        "'prompt' is a list.*as one list, .*format messages",
    ),
    "an object as text": (GOOD, row({"q": 1}), MALFORMED, "'prompt' is an object, not text; write it as text"),
    "a missing field": (GOOD, b'{"prompt": "q"}', MALFORMED, "'completion' is missing or null; every row needs it"),
    "an empty field": (GOOD, row("q", ""), MALFORMED, "'completion' is empty; fill it in or remove the row"),
    "an empty system turn": (
        GOOD_TALK,
        talk(("system", ""), ("user", "q"), ("assistant", "a")),
        MALFORMED,
        "turn 1 .*empty.*remove the turn",
    ),
    "a field of white space": (GOOD, row(" \t\n"), MALFORMED, "'prompt' is empty; fill it in or remove the row"),
    "no turns": (GOOD_TALK, b'{"messages": []}', MALFORMED, "no list of turns.*are two formats mixed"),
    "no answer": (GOOD_TALK, talk(("user", "q")), MALFORMED, "no answer: the last turn must be the assistant's"),
    "roles out of order": (GOOD_TALK, talk(("assistant", "a"), ("user", "q")), MALFORMED, "turns alternate, user"),
    "a system turn in the middle": (
        GOOD_TALK,
        talk(("user", "q"), ("system", "s"), ("assistant", "a")),
        MALFORMED,
        "turn 2 is system.*must stand;",
    ),
    "an unknown role": (GOOD_TALK, talk(("wizard", "q"), ("assistant", "a")), ROLE, "'wizard'; the roles are system,"),
    "a tool call without its result": (
        GOOD_TALK,
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "assistant", "content": "a"},
                ]
            }
        ).encode(),
        "unbalanced tool calls",
        "has no result; add a turn",
    ),
    "a tool result without a call": (
        GOOD_TALK,
        talk(("user", "q"), ("tool", "r"), ("assistant", "a")),
        "unbalanced tool calls",
        "turn 2 is the result of a tool that no turn before it called; remove",
    ),
    "a key that stands twice": (GOOD, GOOD[:-1] + b', "prompt": "r"}', MALFORMED, "'prompt' stands twice.*; keep one"),
    "the literal NaN": (GOOD, GOOD[:-1] + b', "score": NaN}', MALFORMED, "NaN is not JSON; write null"),
    "a line of 5 MB": (GOOD, row("a" * MAX_ROW_BYTES), MALFORMED, "more than 5,000,000 bytes; split this row"),
    "a depth of 10,000": (GOOD, DEEP, MALFORMED, "nested too deeply.*; correct or remove"),
    "another format than the rows before": (
        GOOD,
        GOOD_TALK,
        MALFORMED,
        "of the format messages in a file of the format prompt-completion; give it a file",
    ),
    "a control token in the user's text": (GOOD, row("x<|im_end|>y"), CONTROL, "turn 1 .*im_end.*; write it"),
    "a control token in an answer": (GOOD, row("q", "a</s>"), CONTROL, "turn 2 .*'</s>'.*; write it differently"),
    "nothing to learn": (
        GOOD_TALK,
        json.dumps(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
        ).encode(),
        "nothing to learn",
        "every answer that counts has weight 0 or train false; give one 1 or true",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_is_named_with_file_line_rule_and_cure_and_its_neighbours_are_kept(write, tokenizer, name):
    good, bad, rule, said = FAULTS[name]
    path = write("rows.jsonl", b"\n".join([good, good, bad, good]))
    data = read_examples([Source(path)], tokenizer)
    assert [example.where for example in data.examples] == [f"{path}:{line}" for line in (1, 2, 4)]
    (problem,) = data.problems.found
    assert problem.where == f"{path}:3"
    assert problem.rule == rule
    assert re.search(said, problem.message), problem.message
    assert data.dropped == {problem.rule: 1} and data.rows_read == 4
    with pytest.raises(DataError) as caught:
        build_examples([Source(path)], tokenizer)
    assert str(caught.value) == f"{path}:3: {problem.message}" and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a last line without a line end", GOOD + b"\n" + GOOD, (1, 2)),
        ("a byte-order mark at the start", b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, (1, 2)),
        ("CRLF line ends", GOOD + b"\r\n" + GOOD + b"\r\n", (1, 2)),
        ("blank lines", b"\n" + GOOD + b"\n \t\n\n" + GOOD + b"\n\n", (2, 5)),
    ],
)
def test_what_carries_no_meaning_is_no_fault(write, tokenizer, name, content, lines):
    path = write("rows.jsonl", content)
    data = build_examples([Source(path)], tokenizer)
    assert [example.where for example in data.examples] == [f"{path}:{line}" for line in lines], name
    assert (data.rows_read, data.dropped) == (2, {})
    assert {example.answer for example in data.examples} == {"a"}


def test_one_json_array_that_is_named_jsonl_is_named_at_its_first_line(write, tokenizer):
    path = write("rows.jsonl", b"[\n" + GOOD + b",\n" + GOOD + b"\n]")
    with pytest.raises(DataError, match=rf"{path}:1: this is one JSON document over several lines; name the file"):
        build_examples([Source(path)], tokenizer)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_one_object_over_several_lines_is_not_told_to_take_the_name_that_it_has(write, tokenizer, name):
    path = write(name, json.dumps({"prompt": "q", "completion": "a"}, indent=1))
    with pytest.raises(DataError, match=rf"{path}:1: one JSON object over several lines; put each row on one line, or"):
        build_examples([Source(path)], tokenizer)


# what is wrong with a file: how to make it (returns its path), what the message says
FILES = {
    "a gzip file under another name": (lambda w, d: w("rows.jsonl", gzip.compress(GOOD)), "rename it to rows.jsonl.gz"),
    "plain text under the name of a gzip file": (lambda w, d: w("rows.jsonl.gz", GOOD), "rename it to rows.jsonl"),
    "a gzip file that is cut short": (lambda w, d: w("rows.jsonl.gz", gzip.compress(GOOD)[:-9]), "cannot be read"),
    "a folder without data": (lambda w, d: str(d), "no data file in this folder"),
    "a FIFO": (lambda w, d: os.mkfifo(d / "rows.jsonl") or str(d / "rows.jsonl"), "not an ordinary file; write its"),
    "a symlink loop": (
        lambda w, d: (d / "rows.jsonl").symlink_to(d / "rows.jsonl") or str(d / "rows.jsonl"),
        "a symbolic link that leads nowhere",
    ),
    "an empty file": (lambda w, d: w("rows.jsonl", b""), "has no rows"),
    "a file that is not there": (lambda w, d: str(d / "rows.jsonl"), "no such file.*; check data.train"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named_and_never_one_bad_row_among_good_ones(write, tokenizer, tmp_path, name):
    make, said = FILES[name]
    path = make(write, tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        build_examples([Source(path)], tokenizer, max_bad_rows=1000)
    assert str(caught.value).startswith(path) and caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_bad_row_among_a_million_is_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        for number in range(1, 1_000_001):
            file.write((row() if number != 777_777 else row(None)) + b"\n")
    data = read_examples([Source(str(path))], tokenizer)
    (problem,) = data.problems.found
    assert problem.where == f"{path}:777777" and "'prompt' is missing or null" in problem.message
    assert (data.rows_read, data.rows_kept) == (1_000_000, 999_999)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("rows.jsonl.gz", b'{"text": "a"}\n'),
        ("rows.csv.gz", b"text\n"),
        ("rows.txt.gz", b"a\n"),
        ("rows.txt.gz", b""),
    ],
)
def test_blank_lines_without_end_are_refused_since_a_small_file_can_hold_gigabytes(
    name, head, tmp_path, tokenizer, monkeypatch
):
    for module in (data_files, sources):
        monkeypatch.setattr(module, "MAX_BLANK_BYTES", 1000)
    (tmp_path / name).write_bytes(gzip.compress(head + b"\n" * 1_000_000))
    with pytest.raises(DataError, match=rf"{name}:100\d: more than 1,000 bytes of blank lines; remove them"):
        build_examples([Source(str(tmp_path / name))], tokenizer)


def test_both_answers_of_one_row_are_one_problem_however_many_there_are():
    problems = Problems()
    for line in range(1, 31):
        for _ in range(2):
            problems.add(f"rows.jsonl:{line}", "turn 1 holds a control token", "control")
    assert problems.count == 30 and not problems.too_many(30)
