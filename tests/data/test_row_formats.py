"""Formats are recognised by their keys, and a row that does not fit is named with what is wrong."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from qlora_lite.data.chat.conversation import Conversation, Document, Turn
from qlora_lite.data.chat.prompts import read_prompts
from qlora_lite.data.chat.row_formats import BAD_ANSWER, read_conversations, recognise, used_columns
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError

PAIR = (Turn("user", "q"), Turn("assistant", "a"))
WITH_SYSTEM = (Turn("system", "s"), *PAIR)
UNLEARNED = (PAIR[0], Turn("assistant", "a", is_target=False))
LEFT_OUT = (PAIR[0], Turn("assistant", "a", is_target=False, left_out=True))
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def part(text):
    return {"type": "text", "value": text}


@pytest.fixture
def read(write):
    """Read rows through the formats; returns what was read and the problems."""

    def read_all(rows, **settings):
        problems = Problems()
        read = list(read_conversations(Source(write("a.jsonl", rows), **settings), problems))
        return read, problems.shown

    return read_all


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [user("q"), assistant("a")]}, PAIR),
        ({"messages": [user("q"), assistant("a")], "text": "rendered already"}, PAIR),
        ({"conversations": [user("q"), assistant("a")]}, PAIR),
        ({"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("a")]}, WITH_SYSTEM),
        ({"messages": [user([{"type": "text", "text": "q"}]), assistant([part("a")])]}, PAIR),
        ({"messages": [user("q"), assistant("a", weight=0, tool_calls=None)]}, LEFT_OUT),
        ({"messages": [user("q"), assistant("a", loss_weight=1.0)]}, PAIR),
        ({"messages": [user("q"), assistant("a", train=False)]}, LEFT_OUT),
        ({"messages": [user("q"), assistant("a", train=True, weight=1)]}, PAIR),
        ({"messages": [user("q"), assistant("a", weight=1, train=False)]}, LEFT_OUT),
        ({"messages": [user("q"), assistant("a", loss_weight=0, train=True)]}, LEFT_OUT),
        ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"train": False}]}, LEFT_OUT),
        ({"conversations": SHAREGPT, "system": ""}, PAIR),
        ({"conversations": [{"from": "user", "content": "q"}, {"from": "chatgpt", "content": "a"}]}, PAIR),
        ({"conversations": [{"role": "human", "value": "q"}, {"role": "bing", "value": "a"}]}, PAIR),
        ({"conversations": [SHAREGPT[0] | {"content": "x"}, {"from": "bard", "value": "a", "content": None}]}, PAIR),
        ({"messages": [user("q") | {"value": "x"}, assistant("a", value=None)]}, PAIR),
        ({"conversations": SHAREGPT, "system": "s"}, WITH_SYSTEM),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a", "system": None}, PAIR),
        ({"instruction": "q", "input": " \n", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "x", "output": "a"}, (Turn("user", "q\n\nx"), PAIR[1])),
        ({"prompt": "q", "completion": "a", "id": 7}, PAIR),
        ({"prompt": "q", "completion": "a", "system": ""}, PAIR),
        ({"prompt": "q", "completion": "a", "system": "s"}, WITH_SYSTEM),
        ({"prompt": "q", "completion": "a", "tools": "[]"}, PAIR),
        ({"prompt": "q", "completion": "a", "tools": []}, PAIR),
        ({"instruction": "q", "output": "a", "tools": " [ ]"}, PAIR),
    ],
)
def test_a_row_becomes_turns(read, row, turns):
    (conversation,), problems = read([row])
    assert problems == []
    assert isinstance(conversation, Conversation) and conversation.turns == turns
    assert conversation.where.endswith("a.jsonl:1")


JUDGED = (
    {"prompt": "q", "completion": "a"},
    {"instruction": "q", "output": "a"},
    {"messages": [user("q"), assistant("a")]},
    {"conversations": SHAREGPT},
    {"prompt": [user("q")], "completion": [assistant("a")]},
)


@pytest.mark.parametrize("row", JUDGED)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_a_row_that_says_its_answer_is_a_bad_one_is_left_out_whatever_else_is_wrong_with_it(write, row, column):
    rows = [row | {column: False}, row | {column: True}, row | {"prompt": None, "output": 7, column: False}, row]
    path, dropped, seen = write("a.jsonl", rows), [], []
    more = (lambda _row, used: seen.append(column in used)), lambda *what: dropped.append(what)
    kept = list(read_conversations(Source(path), problems := Problems(), *more))
    assert [each.where.rpartition(":")[2] for each in kept] == ["2", "4"] and problems.shown == []
    assert dropped == [(BAD_ANSWER, f"{path}:1"), (BAD_ANSWER, f"{path}:3")] and seen == [True, False]


@pytest.mark.parametrize("label", [0, 1, 0.0, "false", "False", "bad", "", None, []])
@pytest.mark.parametrize("row", JUDGED)
def test_a_label_that_names_a_class_leaves_no_row_out(read, row, label):
    kept, problems = read([row | {"label": label}] * 2)
    assert len(kept) == 2 and problems == []


def test_of_documents_and_tables_a_label_is_a_column_as_any(read):
    assert len(read([{"text": "t", "label": False}])[0]) == 1
    rows = [{"prompt": "q", "completion": "a", "label": False, "kto_tag": False}]
    assert len(read(rows, prompt="{prompt}", completion="{completion}")[0]) == 1


def test_text_stays_as_it_is(read):
    (document,), _ = read([{"text": " a\n"}])
    assert isinstance(document, Document) and document.text == " a\n"


def test_a_table_fills_its_templates_and_nothing_else_in_them(read):
    rows = [{"question": "2+{x}?", "label": 4}]
    (conversation,), _ = read(rows, prompt="Q: {question} {{json}}", completion="{label}")
    assert [turn.content for turn in conversation.turns] == ["Q: 2+{x}? {json}", "4"]


def test_an_explicit_format_wins_over_recognition(read):
    (document,), _ = read([{"text": "t", "prompt": "q", "completion": "a"}], format="text")
    assert isinstance(document, Document)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "no list of turns"),
        ({"messages": [user("q")]}, "a row with no answer"),
        ({"messages": [{"role": "system", "content": "s"}]}, "a row with no answer"),
        ({"messages": [user("q"), user("q")]}, "turn 2 is user where assistant must stand"),
        ({"messages": [assistant("a"), user("q")]}, "turn 1 is assistant where user must stand"),
        ({"messages": [user("q"), {"role": "system", "content": "s"}]}, "turn 2 is system"),
        ({"messages": [user("q"), {"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        (
            {"messages": [user("q"), {"role": None, "content": "a"}]},
            "unknown role None; the roles are system, developer",
        ),
        (
            {"messages": [{"speaker": "x", "text": "q"}]},
            "turn 1 does not say whose it is (its keys: 'speaker', 'text')",
        ),
        ({"conversations": [{}]}, '(its keys: none); write it as {"role": "user", "content": ...}'),
        ({"messages": [user("q"), {"role": "assistant"}]}, "turn 2 (assistant): 'content' is missing or null"),
        ({"conversations": [SHAREGPT[0], {"from": "gpt"}]}, "turn 2 (gpt): 'value' is missing or null"),
        ({"messages": [user("q"), "a"]}, "turn 2 is a str"),
        ({"messages": [user("q"), assistant(None)]}, "turn 2 (assistant): 'content' is missing or null"),
        ({"messages": [user("q"), assistant(True)]}, "is a boolean, not text"),
        ({"messages": [user("q"), assistant(7)]}, "is a number, not text"),
        ({"messages": [user("q"), assistant({"a": 1})]}, "is an object, not text"),
        ({"messages": [user("q"), assistant(" \n")]}, "'content' is empty"),
        ({"messages": [user("q"), assistant([])]}, "'content' is empty"),
        ({"messages": [user("q"), assistant(["a"])]}, "has a part that is not"),
        ({"messages": [user([{"type": "image"}]), assistant("a")]}, "a part of type 'image': a model of text reads no"),
        ({"messages": [user("q") | {"images": ["a.png"]}, assistant("a")]}, "'images' is not supported: a model of"),
        ({"messages": [user("q"), assistant("a")], "image": "a.png"}, "'image' is not supported: a model of text"),
        ({"messages": [user("<image>q"), assistant("a")]}, "turn 1 holds the placeholder '<image>': a model of text"),
        ({"messages": [user("q"), assistant("a", weight=0.5)]}, "weight 0.5"),
        ({"messages": [user("q"), assistant("a", train="no")]}, "turn 2 has train 'no'; a turn is learned (true)"),
        ({"messages": [user("q"), assistant("a", train=0)]}, "turn 2 has train 0; a turn is learned (true) or not"),
        ({"messages": [user("q"), assistant("a", function_call={"name": "f"})]}, "'function_call' is not supported"),
        ({"prompt": "q", "completion": "a"}, "of the format prompt-completion in a file of the format messages"),
    ],
)
def test_a_conversation_that_does_not_fit_is_named(read, row, said):
    good = {"messages": [user("q"), assistant("a")]}
    kept, problems = read([good, row, good])
    assert len(kept) == 2
    assert len(problems) == 1 and ":2: " in problems[0] and said in problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "<image>Who are they?",
        "<image>\nWhat is it?",
        "What is it?\n<image>",
        "Which of\n<image><image>\nis it?",
        " <video> What happens?",
        "Describe <audio>",
        "<|vision_start|><|image_pad|><|vision_end|>What?",
        "<|image_1|>\nq",
        "One [IMG]q",
        "Q: <image>Who?",
        "See `<image>`\n<image>",
    ],
)
def test_a_placeholder_of_a_picture_in_a_prompt_is_an_error_of_its_row_in_every_format(read, text):
    for row, settings in (
        ({"conversations": [{"from": "human", "value": text}, SHAREGPT[1]]}, {}),
        ({"instruction": text, "output": "a"}, {}),
        ({"prompt": text, "completion": "a"}, {}),
        ({"q": text, "a": "a"}, {"prompt": "{q}", "completion": "{a}"}),
    ):
        kept, problems = read([row], **settings)
        assert kept == [] and "a model of text reads no pictures, sounds or videos; remove such rows" in problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "What does the <video> element do?",
        "<video>\n<source src='a.mp4'>\n</video>",
        "Mend\n<audio>\n</audio>\nplease",
        "`<image>` is no tag",
        'x = "<|image_pad|>"\ny = 1',
        "[IMG]http://a/b.png[/IMG]",
        "<video controls>",
        "<images>",
    ],
)
def test_tags_of_code_and_talk_about_them_are_text_as_any(read, text):
    kept, problems = read([{"prompt": text, "completion": "<video>"}])
    assert len(kept) == 1 and problems == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "q"}, "'output' is missing or null"),
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"instruction": None, "output": "a"}, "'instruction' is missing"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "'input' is a list, not text"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "'history' is not supported"),
        ({"instruction": "q", "output": "a", "tools": [{"name": "f"}]}, "'tools' is not supported"),
    ],
)
def test_an_alpaca_row_that_does_not_fit_is_named(read, row, said):
    kept, problems = read([{"instruction": "q", "output": "a"}, row])
    assert len(kept) == 1 and ":2: " in problems[0] and said in problems[0]


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "missing"), (True, "a boolean"), ([1], "a list"), ("", "is empty")],
)
def test_a_table_column_that_is_no_text_is_named(read, value, said):
    _, problems = read([{"q": "x", "a": value}], prompt="{q}", completion="{a}")
    assert said in problems[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_of_a_table_that_is_none_is_named_and_not_learned_as_its_name(tmp_path, value):
    path, problems = tmp_path / "a.parquet", Problems()
    pyarrow.parquet.write_table(pyarrow.table({"q": ["x", "y"], "a": [1.5, value]}), path)
    (conversation,) = read_conversations(Source(str(path), prompt="{q}", completion="{a}"), problems)
    assert conversation.turns[-1].content == "1.5"
    assert [problem.where for problem in problems.found] == [f"{path}:2"]
    assert f"'a' is {value}, not a finite number" in problems.shown[0]


@pytest.mark.parametrize("template", ["{nothing}", "{q.__class__}", "{q!r}", "{q:>9}", "{q", "{}"])
def test_a_table_template_can_only_name_columns(read, template):
    _, problems = read([{"q": "x", "a": "y"}], prompt=template, completion="{a}")
    assert "template" in problems[0]


@pytest.mark.parametrize("column", ["a!b", "a:b", "a {b}", "a{", "}"])
def test_a_column_that_no_template_can_name_is_to_be_renamed(read, column):
    row = {"q": "x", "b:c": "z", column: "y"}
    _, problems = read([row], prompt="{q}", completion="{" + column + "}")
    assert f"rename the column {column!r}" in problems[0]
    _, problems = read([row], prompt="{q}", completion="{a}")
    assert "the columns are q, b:c" in problems[0] and "rename" not in problems[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "csv"}, "'csv' is not a format"),
        ({"format": "table"}, "needs both prompt and completion"),
        ({"prompt": "{q}"}, "needs both prompt and completion"),
        ({"format": "alpaca", "prompt": "{q}", "completion": "{a}"}, "belong to format table"),
    ],
)
def test_settings_that_do_not_go_together_are_an_error(read, settings, said):
    with pytest.raises(DataError, match=said):
        read([{"q": "x", "a": "y"}], **settings)


def test_columns_that_no_format_has_are_an_error_that_shows_the_cure(write):
    path = write("a.csv", "question,answer,id\nx,y,1\n")
    cure = f'data.train: [{{path: "{path}", prompt: "{{question}}", completion: "{{answer}}"}}]'
    message = f"{path}:2: no format has the columns 'question', 'answer', 'id'; say which ones to use, as in {cure}"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(read_conversations(Source(path), Problems()))
    item = yaml.safe_load(cure)["data.train"][0]
    (conversation,) = read_conversations(Source(**item), Problems())
    assert [turn.content for turn in conversation.turns] == ["x", "y"]


def cure_of(row, path="a.jsonl"):
    """Return what is said of a row that no format has, behind its columns."""
    with pytest.raises(DataError) as caught:
        recognise(row, f"{path}:2", Source(path))
    return str(caught.value).partition("; ")[2]


def table(prompt, completion, path="a.jsonl"):
    return f'data.train: [{{path: "{path}", prompt: "{{{prompt}}}", completion: "{{{completion}}}"}}]'


@pytest.mark.parametrize(
    ("columns", "pair"),
    [
        (["instruction", "context", "response", "category"], ("instruction", "response")),
        (["id", "Answers", "query"], ("query", "Answers")),
        (["prompt", "chosen"], ("prompt", "chosen")),
        (["response", "meta"], ("...", "response")),
        (["a", "question"], ("question", "...")),
        (["a", "b"], ("...", "...")),
        (["custom_id", "method", "url", "body"], ("...", "...")),
        (["Prompt", "Completion"], ("Prompt", "Completion")),
    ],
)
def test_columns_named_like_a_question_and_an_answer_are_shown_and_no_others_are_guessed(columns, pair):
    how = " in place of the dots" if "..." in pair else ""
    assert cure_of(dict.fromkeys(columns, "x")) == f"say which ones to use{how}, as in {table(*pair)}"


def test_a_column_that_is_no_text_is_not_shown_as_an_answer():
    for value in ({"text": ["a"]}, ["a"], None, True):
        assert cure_of({"question": "q", "answers": value}).endswith(table("question", "..."))
    assert cure_of({"question": "q", "answers": 4}).endswith(table("question", "answers"))


REJECTED = assistant("worse")
TALK = [user("p"), assistant("o"), user("q")]
LEARNED_LAST = (Turn("user", "p"), Turn("assistant", "o", is_target=False), *PAIR)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [REJECTED]}, PAIR),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b", "system": "s"}, WITH_SYSTEM),
        ({"prompt": TALK, "chosen": [assistant("a")], "rejected": []}, LEARNED_LAST),
        ({"chosen": [*TALK, assistant("a")], "rejected": [*TALK, REJECTED]}, LEARNED_LAST),
        ({"prompt": "p", "chosen": [*TALK, assistant("a")], "rejected": "b"}, LEARNED_LAST),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]}, PAIR),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "b"}}, PAIR),
        ({"messages": [user("q")], "chosen": assistant("a"), "rejected": REJECTED}, PAIR),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
    ],
)
def test_preference_rows_are_named_as_such_and_their_chosen_answers_are_learned_as_the_message_says(write, row, turns):
    """The last shape but two has no answer in its conversation, which must not be what is said of it."""
    path = write("a.jsonl", [row])
    for settings in ({}, {"format": "sharegpt"}, {"format": "prompt-completion"}):
        problems = Problems()
        with pytest.raises(DataError) as caught:
            list(read_conversations(Source(path, setting="data.eval", **settings), problems))
            problems.raise_if_any()
        assert "a preference row (it has a chosen and a rejected answer)" in str(caught.value)
    cure = str(caught.value).rpartition("to learn the chosen answers alone, write ")[2]
    (item,) = yaml.safe_load(cure)["data.eval"]
    (conversation,) = read_conversations(Source(**item), problems := Problems())
    assert conversation.turns == turns and problems.count == 0


@pytest.mark.parametrize(
    ("row", "cure"),
    [
        ({"rejected": "b", "chosen": "a", "question": "q"}, f"write {table('question', 'chosen')}"),
        ({"chosen": "a", "rejected": "b", "id": 1}, "write the prompt into a column of its own"),
    ],
)
def test_of_preference_rows_of_other_shapes_the_columns_are_named(row, cure):
    assert cure_of(row).endswith(f"to learn the chosen answers alone, {cure}")


def test_a_whole_conversation_beside_chosen_and_rejected_is_what_is_trained_on(read):
    row = {"prompt": "q", "messages": [user("q"), assistant("a")], "chosen": [], "rejected": []}
    (conversation,), problems = read([row])
    assert conversation.turns == PAIR and problems == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": None, "rejected": "b", "prompt": "q"}, "'chosen' is missing or empty"),
        ({"chosen": "a", "rejected": "b"}, "a preference row without a prompt"),
        ({"prompt": "q", "completion": "a"}, "'chosen' is missing or empty"),
    ],
)
def test_a_row_of_format_chosen_without_what_it_needs_is_a_problem_of_that_row(read, row, said):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (conversation,), problems = read([row, good], format="chosen")
    assert conversation.turns == PAIR and len(problems) == 1 and said in problems[0]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
def test_a_table_whose_first_line_is_content_is_asked_for_the_names_of_its_columns(name):
    said = "is the line that names the columns missing? then write it, such as prompt and completion"
    assert cure_of({"What is 1 plus 3?": "x", "It is 4.": "y"}, name) == said
    assert cure_of({"a": "x", "so many words that this is content": "y"}, name) == said
    for columns in (("ID No.", "Really?"), ("name of the best answer", "b")):
        assert cure_of(dict.fromkeys(columns, "x"), name).endswith(table("...", "...", name))
    assert "dots" in cure_of({"What is 1 plus 3?": "x", "It is 4.": "y"}, "a.jsonl")


def test_a_table_of_several_columns_that_another_sign_parts_into_more_is_asked_for_it():
    assert cure_of({"id;prompt;answer": "x", "short": "y"}, "a.csv").startswith("are the columns parted by semicolons?")
    for row, name in (({"a;b": "x", "c": "y"}, "a.csv"), ({"id;prompt;answer": "x", "short": "y"}, "a.jsonl")):
        assert "in place of the dots" in cure_of(row, name)


def test_a_prompt_and_a_completion_that_are_lists_of_turns_are_one_conversation_with_its_last_part_learned(read):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows = [
        {"prompt": [user("q")], "completion": [assistant("a")], "system": "s"},
        {"prompt": [user("q"), assistant("a"), user("q")], "completion": [assistant("a")], "tools": [tool]},
        {"prompt": [user("q")], "completion": "a"},
        {"prompt": [], "completion": [assistant("a")]},
    ]
    (one, two), problems = read(rows)
    assert "turn 1 is assistant where user must stand" in problems[1]
    assert one.turns == WITH_SYSTEM and two.turns == (*UNLEARNED, *PAIR) and len(two.tools) == 1
    assert len(problems) == 2 and rows[1].keys() <= used_columns("prompt-completion", Source("a"))


@pytest.mark.parametrize(
    ("row", "turns", "reference"),
    [
        ({"prompt": "q"}, PAIR[:1], None),
        ({"prompt": "q", "completion": "a", "system": "s"}, WITH_SYSTEM[:2], "a"),
        ({"prompt": [user("q"), assistant("a"), user("q")]}, (*UNLEARNED, PAIR[0]), None),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, PAIR[:1], "a"),
        ({"messages": [user("q")]}, PAIR[:1], None),
        ({"messages": [user("q"), assistant("a"), user("q"), assistant("b")]}, (*PAIR, PAIR[0]), "b"),
        ({"conversations": SHAREGPT}, PAIR[:1], "a"),
        ({"conversations": SHAREGPT[:1]}, PAIR[:1], None),
        ({"instruction": "q", "input": "x"}, (Turn("user", "q\n\nx"),), None),
        ({"instruction": "q", "output": "a"}, PAIR[:1], "a"),
        ({"text": "q"}, PAIR[:1], None),
    ],
)
def test_a_row_of_any_format_is_a_prompt_with_its_answer_or_without(write, row, turns, reference):
    (prompt,) = read_prompts(Source(write("a.json", json.dumps([row]))))
    assert (prompt.turns, prompt.reference) == (turns, reference) and prompt.where.endswith("a.json:1")


def test_prompts_take_the_templates_of_the_first_known_source_that_has_their_columns(write):
    known = [Source("x", prompt="{q} {z}", completion="{r}"), Source("y", prompt="{q}!", completion="{r}")]
    source = write("a.csv", "q,r\n1,2\n")
    (prompt,) = read_prompts(Source(source), known)
    assert (prompt.turns, prompt.reference) == ((Turn("user", "1!"),), "2")
    (prompt,) = read_prompts(Source(source, prompt="{r}"), known)
    assert (prompt.turns, prompt.reference) == ((Turn("user", "2"),), None)


def test_every_bad_prompt_is_named(write):
    rows = [{"prompt": ""}, {"prompt": "q"}, {"prompt": 3}, {"prompt": [assistant("a")]}]
    with pytest.raises(DataError) as caught:
        read_prompts(Source(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))))
    places = [re.search(r"a.jsonl:(\d)", line)[1] for line in str(caught.value).splitlines()]
    assert places == ["1", "3", "4"]


def test_one_column_that_no_format_has_may_be_plain_text(write):
    with pytest.raises(DataError, match="to train on plain text, rename the column to text"):
        list(read_conversations(Source(write("a.csv", "q\nx\n")), Problems()))


def test_the_prompts_of_preference_rows_have_the_chosen_answer_as_their_reference(write):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": [user("p")], "chosen": "c", "rejected": "d"}]
    found = read_prompts(Source(write("p.jsonl", rows)))
    assert [(prompt.turns, prompt.reference) for prompt in found] == [
        ((Turn("user", "q"),), "a"),
        ((Turn("user", "p"),), "c"),
    ]
