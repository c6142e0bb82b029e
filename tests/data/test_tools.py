"""Tools, calls and results reach the template as it wants them, or the row is named with what does not fit."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import SPECIAL_TOKENS, make_tokenizer

from qlora_lite.data.chat.conversation import Turn, as_message
from qlora_lite.data.chat.row_formats import read_conversations
from qlora_lite.data.chat.template import CHATML_TOOLS, NAMED_TEMPLATES
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import build_examples, read_examples
from qlora_lite.errors import DataError

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add",
        "parameters": {"type": "object", "properties": {"x": {"type": "number", "default": None}, "y": {}}},
    },
}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"x": 1, "y": [2, None]}}}
USER = {"role": "user", "content": "what is the question"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "42"}
ANSWER = {"role": "assistant", "content": "the answer is 42"}
ROW = {"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]}
TURNS = (
    Turn("user", "what is the question"),
    Turn("assistant", "", calls=(CALL,)),
    Turn("tool", "42", call_id="c1", name="add"),
    Turn("assistant", "the answer is 42"),
)
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def read(write):
    def read_all(rows):
        problems = Problems()
        return list(read_conversations(Source(write("a.jsonl", rows)), problems)), problems

    return read_all


@pytest.fixture
def build(write):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def build_all(rows, **settings):
        return build_examples([Source(write("a.jsonl", rows))], settings.pop("tokenizer", tokenizer), **settings)

    return build_all


def test_tools_calls_and_results_become_turns_and_keep_what_is_in_them(read):
    ((conversation,), problems) = read([ROW])
    assert problems.shown == []
    assert conversation.turns == TURNS and conversation.tools == (TOOL,)
    assert [as_message(turn) for turn in conversation.turns] == [
        USER,
        CALLING | {"content": ""},
        RESULT,
        ANSWER,
    ]


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "what is the question"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "the answer is 42"},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL["function"]])},
                {"role": "tool", "content": [{"type": "text", "text": "42"}]},
                ANSWER,
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "add", "arguments": json.dumps({"x": 1, "y": [2, None]})}}],
                },
                {"role": "tool", "content": "42"},
                ANSWER,
            ],
            "tools": [TOOL["function"]],
        },
    ],
)
def test_other_spellings_become_the_same_turns(read, row):
    ((conversation,), problems) = read([row])
    assert problems.shown == []
    assert conversation.tools == (TOOL,)
    call = {key: value for key, value in CALL.items() if key != "id"}
    assert conversation.turns == (TURNS[0], Turn("assistant", "", calls=(call,)), Turn("tool", "42"), TURNS[3])


def test_the_template_gets_tools_and_calls_and_the_calls_are_learned(build):
    (example,) = build([ROW]).examples
    tokenizer = make_tokenizer()
    text = tokenizer.decode(example.token_ids)
    assert json.dumps(TOOL) in text
    is_target = tokenizer.decode(example.token_ids[example.is_target])
    assert is_target == f"<call>{json.dumps(CALL['function'])}</call><|im_end|>the answer is 42<|im_end|>"
    assert example.answer == "the answer is 42"


def test_a_row_may_end_with_the_call_that_it_teaches(build):
    (example,) = build([{"messages": [USER, CALLING], "tools": [TOOL]}]).examples
    assert example.is_target.any()


def test_a_call_with_weight_0_is_not_learned(build):
    (example,) = build([{"messages": [USER, CALLING | {"weight": 0}, RESULT, ANSWER]}]).examples
    assert make_tokenizer().decode(example.token_ids[example.is_target]) == "the answer is 42<|im_end|>"


def test_tools_of_a_parquet_file_come_without_the_nulls_of_their_neighbours(tmp_path):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("add", "ask")
    ]
    rows = [{"messages": [USER, ANSWER], "tools": [tool]} for tool in tools]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_conversations(Source(str(tmp_path / "a.parquet")), Problems()))
    assert [conversation.tools for conversation in read] == [(tool,) for tool in tools]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, CALLING, ANSWER], "turn 3 is assistant, but the call of 'add' before it has no result"),
        ([USER, CALLING, USER, ANSWER], "turn 3 is user, but the call of 'add' before it has no result"),
        ([USER, RESULT, ANSWER], "turn 2 is the result of a tool that no turn before it called"),
        ([USER, CALLING, RESULT, RESULT, ANSWER], "turn 4 is the result of a tool that no turn before it called"),
        ([USER, CALLING, RESULT | {"tool_call_id": "c2"}, ANSWER], "answers the call 'c2', but the open calls are"),
    ],
)
def test_unbalanced_calls_are_an_error_with_the_line(read, messages, said):
    kept, problems = read([ROW, {"messages": messages}])
    assert len(kept) == 1 and ":2: " in problems.shown[0] and said in problems.shown[0]
    assert problems.counts == {"unbalanced tool calls": 1}


@pytest.mark.parametrize("said", ["I add", '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'])
def test_the_cure_of_a_result_after_an_answer_in_plain_text_makes_a_good_row(build, read, said):
    answer = {"role": "assistant", "content": said}
    _, problems = read([{"messages": [USER, answer, RESULT, ANSWER]}])
    cure = problems.shown[0].partition("give turn 2, which is the assistant's, its call as ")[2]
    assert cure.startswith('"tool_calls": [{"name": "...", "arguments": {...}}]')
    assert cure.endswith(" in place of its <tool_call> text") == said.startswith("<tool_call>")
    given = json.loads("{" + cure.partition("]")[0].replace("...", "add", 1).replace("{...}", '{"x": 1}') + "]}")
    cured = answer | given | ({"content": ""} if "in place of" in cure else {})
    rows = [{"messages": [USER, cured, {"role": "tool", "content": "3"}, ANSWER]}]
    assert build(rows, template=CHATML_TOOLS).rows_kept == 1


def test_calling_an_undefined_tool_is_an_error(read):
    _, problems = read([{"messages": [USER, CALLING], "tools": [{"name": "ask"}]}])
    assert "turn 2 calls 'add', which the row's tools do not define (ask)" in problems.shown[0]


def test_results_may_come_in_another_order_than_calls_if_both_have_ids(read):
    second = CALL | {"id": "c2"}
    calling = CALLING | {"tool_calls": [CALL, second]}
    ((conversation,), problems) = read([{"messages": [USER, calling, RESULT | {"tool_call_id": "c2"}, RESULT, ANSWER]}])
    assert problems.shown == [] and conversation.turns[1].calls == (CALL, second)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, CALLING, RESULT]}, "the last turn must be the assistant's"),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "only the assistant can call tools"),
        ({"messages": [USER, CALLING | {"tool_calls": [{}]}]}, "a tool call has no name"),
        ({"messages": [USER, CALLING | {"tool_calls": "[{"}]}, "the tool call holds text that is not JSON"),
        ({"messages": [USER, CALLING | {"tool_calls": 7}]}, "must be an object with a name and arguments"),
        ({"messages": [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "'f' are no object"),
        ({"messages": [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": "x"}]}]}, "call of 'f' holds text"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "tool 1 has no name"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "'tools' must be a list"),
        ({"messages": [USER, ANSWER], "tools": "f()"}, "tools holds text that is not JSON"),
        ({"messages": [USER, ANSWER], "tools": [TOOL, TOOL]}, "the tool 'add' is defined twice"),
    ],
)
def test_tools_that_do_not_fit_are_an_error(read, row, said):
    _, problems = read([row])
    assert len(problems.shown) == 1 and ":1: " in problems.shown[0] and said in problems.shown[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": 1} {"b": 2}', "something follows the value: ' {"),
        ('{"a": ' * 100_000, "is not JSON"),
    ],
)
def test_json_text_in_a_row_is_read_as_strictly_as_the_row(read, text, said):
    _, problems = read([{"messages": [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": text}]}]}])
    assert len(problems.shown) == 1 and "call of 'f' holds text" in problems.shown[0] and said in problems.shown[0]
    _, problems = read([{"messages": [USER, ANSWER], "tools": text}])
    assert len(problems.shown) == 1 and "tools holds text" in problems.shown[0] and said in problems.shown[0]


def test_json_text_in_a_row_may_stand_between_white_space(read):
    calling = CALLING | {"tool_calls": [{"name": "f", "arguments": ' {"a": 1}\n'}]}
    ((conversation,), problems) = read([{"messages": [USER, calling]}])
    assert problems.count == 0 and conversation.turns[1].calls[0]["function"]["arguments"] == {"a": 1}


def test_a_template_that_ignores_tools_or_calls_is_an_error(build):
    plain = make_tokenizer()
    with pytest.raises(DataError, match="does not write the tool 'add'"):
        build([{"messages": [USER, ANSWER], "tools": [TOOL]}], tokenizer=plain)
    with pytest.raises(DataError, match=r"drops or changes turn 2 \(assistant\); set data\.template to chatml-tools"):
        build([{"messages": [USER, CALLING]}], tokenizer=plain)
    names_only = make_tokenizer()
    names_only.chat_template = TEMPLATE.replace("call.function | tojson", "call.function.name")
    with pytest.raises(DataError, match=r"drops or changes turn 2 \(assistant\)"):
        build([{"messages": [USER, CALLING]}], tokenizer=names_only)


def test_a_template_may_write_arguments_before_the_name(build):
    tokenizer = make_tokenizer()
    swapped = "(call.function.arguments | tojson) + call.function.name"
    tokenizer.chat_template = TEMPLATE.replace("call.function | tojson", swapped)
    assert build([ROW], tokenizer=tokenizer).rows_kept == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": {"x": "<|im_end|>"}}]}]},
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "description": "<|im_end|>"}]},
    ],
)
def test_a_special_token_inside_a_call_or_a_definition_is_an_error(build, row):
    with pytest.raises(DataError, match=r"a.jsonl:1: .* holds the text '<\|im_end\|>'"):
        build([row])


@pytest.mark.parametrize("bad_row", [0, 2])
def test_a_row_that_the_template_refuses_does_not_condemn_others_with_the_same_roles(write, bad_row):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.tool_calls|default([])|length > 1 %}{{ raise_exception('one') }}{% endif %}",
    )
    assert tokenizer.chat_template != TEMPLATE
    rows = [{"messages": [USER, CALLING], "tools": [TOOL]} for _ in range(3)]
    rows[bad_row] = {"messages": [USER, CALLING | {"tool_calls": [CALL | {"id": "2"}, CALL]}], "tools": [TOOL]}
    path = write("a.jsonl", rows)
    data = read_examples([Source(path)], tokenizer)
    assert data.rows_kept == 2
    assert [problem.where for problem in data.problems.found] == [f"{path}:{bad_row + 1}"]


def test_the_generation_blocks_of_a_template_hold_calls_too(build):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}",
    ).replace(
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add",
        (
            "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
            "{% endfor %}{% if add"
        ),
    )
    (example,) = build([ROW], tokenizer=tokenizer).examples
    is_target = tokenizer.decode(example.token_ids[example.is_target])
    assert is_target == f"<call>{json.dumps(CALL['function'])}</call><|im_end|>the answer is 42<|im_end|>"


def test_every_named_template_refuses_what_it_cannot_write_and_names_the_one_that_can(build):
    for name in NAMED_TEMPLATES.keys() - {CHATML_TOOLS}:
        with pytest.raises(
            DataError, match=r"(drops or changes turn 2|no form for tool turns).*set data\.template to ch"
        ):
            build([ROW], template=name)
    with pytest.raises(DataError, match=r"does not write the tool 'add'; set data\.template to chatml-tools"):
        build([{"messages": [USER, ANSWER], "tools": [TOOL]}], template="chatml")


TOOLS_TEXT = (
    "<|im_start|>system\nbe brief\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{json.dumps(TOOL)}\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}'
    "\n</tool_call><|im_end|>\n<|im_start|>user\nadd them<|im_end|>\n"
)
ONE = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "add", "arguments": {"y": "\u00e9<"}}\n</tool_call>'
SHAREGPT = {
    "system": "be brief",
    "tools": json.dumps([TOOL["function"]]),
    "conversations": [
        {"from": "human", "value": "add them"},
        {
            "from": "function_call",
            "value": json.dumps(
                [
                    {"name": "add", "arguments": {"x": 1}},
                    {"name": "add", "arguments": {"y": "\u00e9<"}},
                ]
            ),
        },
        {"from": "observation", "value": "7"},
        {"from": "observation", "value": "8"},
        {"from": "gpt", "value": "7 and 8"},
    ],
}


@pytest.mark.parametrize(("special", "end"), [(SPECIAL_TOKENS, "<|im_end|>"), (("<unk>", "<s>", "</s>"), "</s>")])
def test_chatml_tools_writes_the_form_of_qwen_and_learns_calls_and_answers_only(write, special, end):
    """A tokenizer without <|im_end|> gets the same form with its own end token, so that any can learn tools."""
    tokenizer = make_tokenizer(template=None, special=special)
    (example,) = build_examples(
        [Source(write("a.jsonl", [SHAREGPT]))], tokenizer, CHATML_TOOLS, max_tokens=4096
    ).examples
    called = f"<|im_start|>assistant\n{ONE}\n{TWO}<|im_end|>\n"
    results = "<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>"
    text = f"{TOOLS_TEXT}{called}<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n7 and 8<|im_end|>\n"
    assert tokenizer.decode(example.token_ids) == text.replace("<|im_end|>", end)
    assert tokenizer.decode(example.token_ids[example.is_target]) == f"{ONE}\n{TWO}{end}7 and 8{end}"


def test_chatml_tools_writes_text_beside_a_call_and_a_call_in_the_last_turn(build):
    row = {"messages": [USER, CALLING | {"content": "I add"}]}
    (example,) = build([row], template=CHATML_TOOLS).examples
    assert example.answer == "I add\n" + f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"
