"""What rows hold and training does not look at is counted in every row, and named."""

from collections import Counter
from functools import partial

import pytest

from qlora_lite.data.chat.row_formats import check_format, read_conversations, recognise, used_columns
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens import statistics
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import COLUMNS, KEYS, ReadSettings, count_unused, no_counts, unused_of

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALK = {"messages": [QUESTION, ANSWER]}


def counted(rows, **settings):
    """Return the counts of good rows, the columns in use and the problems."""
    source, problems, counts = Source("mine", rows=rows, **settings), Problems(), no_counts()
    list(read_conversations(source, problems, partial(count_unused, counts)))
    used = used_columns(check_format(source) or recognise(rows[0], "mine:1", source), source)
    return counts, used, problems


def said(rows, **settings):
    counts, used, _ = counted(rows, **settings)
    return dict(unused_of(counts, used))


@pytest.mark.parametrize(
    ("row", "settings", "columns"),
    [
        (TALK | {"system": "s", "tools": [], "id": 7, "prompt": "q"}, {}, ["id", "prompt"]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "score": 0},
            {},
            ["score"],
        ),
        (TALK | {"conversations": ["not looked at"]}, {}, ["conversations"]),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, {}, []),
        ({"prompt": "q", "completion": "a", "system": "s", "instruction": "x"}, {}, ["instruction"]),
        (
            {"prompt": [QUESTION], "completion": [ANSWER], "messages": ["x"]},
            {"format": "prompt-completion"},
            ["messages"],
        ),
        ({"text": "t", "label": 1, "empty": "", "none": None, "images": [], "more": {}}, {}, ["label"]),
        ({"messages": "x", "conversations": "y"}, {"prompt": "{messages}", "completion": "{conversations}"}, []),
        ({"messages": ["x"], "conversations": "y"}, {"prompt": "{conversations}", "completion": "a"}, ["messages"]),
        ({"q": "x", "a": "y", "b": "z"}, {"prompt": "{q} {q}", "completion": "{{b}} {a}"}, ["b"]),
    ],
)
def test_the_columns_that_a_format_does_not_look_at_are_counted_where_they_hold_something(row, settings, columns):
    counts, _, problems = counted([row, row], **settings)
    assert problems.count == 0 and counts == {COLUMNS: dict.fromkeys(columns, 2), KEYS: {}}


def test_columns_of_later_rows_are_counted_and_those_of_bad_rows_are_not():
    rows = [{"instruction": "q", "output": "a"}] * 12 + [
        {"instruction": "q", "output": "a", "context": "c", "id": 1}
    ] * 3
    counts, _, problems = counted([*rows, {"instruction": "q", "output": None, "context": "c"}])
    assert counts[COLUMNS] == {"context": 3, "id": 3} and problems.count == 1
    assert said([*rows, rows[-1] | {"note": "n"}]) == {COLUMNS: ["context (4 rows)", "id (4 rows)", "note (1 row)"]}


def test_a_name_that_differs_from_one_that_is_read_in_case_or_space_comes_first_and_with_it():
    rows = [
        {"instruction": "q", "output": "a", "id": 1},
        {"instruction": "q", "output": "a", "Input": "x", " input": "y"},
    ]
    likely = ["Input (1 row; what is read is input)", " input (1 row; what is read is input)"]
    assert said(rows) == {COLUMNS: [*likely, "id (1 row)"]}
    table = [{"Q": "x", "q": "y", "A": "z"}] * 2
    assert said(table, prompt="{Q}", completion="{A}") == {COLUMNS: ["q (2 rows; what is read is Q)"]}


def test_the_keys_of_turns_that_are_not_used_are_counted_once_a_row():
    talk = {"messages": [QUESTION | {"name": "bob", "id": 1}, ANSWER | {"id": 2, "refusal": None, "Weight": 0}]}
    assert said([talk, TALK]) == {KEYS: ["Weight (1 row; what is read is weight)", *said([talk])[KEYS][1:]]}
    assert sorted(said([talk])[KEYS][1:]) == ["id (1 row)", "name (1 row)"]
    pair = {"prompt": [QUESTION | {"x": 1}], "completion": [ANSWER | {"y": 1, "weight": 1, "train": True}]}
    assert counted([pair])[0] == {COLUMNS: {}, KEYS: {"x": 1, "y": 1}}


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
def test_a_turn_that_asks_to_be_learned_and_cannot_be_is_counted(key):
    def row(value, answered=True):
        system = {"from": "system", "value": "s", key: value}
        return {"messages": [system, QUESTION | {key: value}, ANSWER | {key: answered}]}

    asked = said([row(True), row(True, False), row(False), row(None), row(0), TALK])[KEYS]
    assert sorted(asked) == [f"{key} of system turns (2 rows)", f"{key} of user turns (2 rows)"]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}], key: True}
    counts, _, problems = counted([{"messages": [QUESTION, call, {"role": "tool", "content": "r", key: True}, ANSWER]}])
    assert counts[KEYS] == {f"{key} of tool turns": 1} and not problems.count


def test_a_key_of_a_turn_that_is_no_text_is_named_as_one():
    assert said([{"messages": [QUESTION | {5: "y"}, ANSWER]}]) == {KEYS: ["5 (1 row)"]}


def test_the_name_and_call_of_a_tool_s_result_are_used():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    result = {"role": "tool", "content": "r", "name": "f", "tool_call_id": "c"}
    row = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}, result, ANSWER | {"tool_call_id": "c"}]}
    counts, _, problems = counted([row])
    assert problems.shown == [] and counts[KEYS] == {"tool_call_id": 1}


def test_names_without_end_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_NAMES", 3)
    counts, _, _ = counted([{"text": "a", f"column {n % 9}": n + 1} for n in range(18)])
    assert counts[COLUMNS] == {"column 0": 2, "column 1": 2, "column 2": 2}


def test_each_source_has_its_counts_also_from_the_cache_and_where_it_cannot_be_read(write, tokenizer, tmp_path):
    paths = [write("a.jsonl", [{"text": "a b", "id": 1}, {"text": "c d"}]), write("b.jsonl", [{"x": 1}])]
    paths.append(write("c.jsonl", [TALK | {"id": 2, "messages": [QUESTION | {"name": "bob"}, ANSWER]}]))
    expected = ({COLUMNS: {"id": 1}, KEYS: {}}, no_counts(), {COLUMNS: {"id": 1}, KEYS: {"name": 1}})
    for _ in range(2):
        data = read_examples([Source(path) for path in paths], tokenizer, cache=tmp_path / "cache")
        assert data.unused == expected and all(isinstance(c, Counter) for part in data.unused for c in part.values())
    assert read_examples([Source(paths[0])], tokenizer, ReadSettings(max_rows=1)).unused == (expected[0],)
