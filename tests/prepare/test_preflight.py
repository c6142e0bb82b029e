"""One report for the command, the run folder and the page; every problem in it, and what is wrong stops the run."""

import json
import re

import pytest
import yaml
from tiny_files import byte_tokenizer, write_recipe

from qlora_lite.cli.data import _text
from qlora_lite.data.chat.row_formats import BAD_ANSWER
from qlora_lite.data.checks.held_out import HELD_OUT
from qlora_lite.data.tokens.batch import plan_epoch
from qlora_lite.errors import DataError
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.preflight import CAPACITY, first_places, line_of_problem, preflight
from qlora_lite.recipe.load import load_recipe
from qlora_lite.reporting.data_page import render
from qlora_lite.units import format_bytes, format_count

ALWAYS = {"rows_read", "rows_kept", "dropped", "tokens", "target_tokens", "packing_efficiency", "problems"}


@pytest.fixture
def look(tmp_path):
    """Look at rows (None: those of the tiny recipe) with settings of the data section."""

    def look_at(
        train=None, evaluation=None, tokenizer=None, source="train.jsonl", exact_rows=0, pattern=None, **settings
    ):
        matched = {"metrics_examples": exact_rows, "exact_match_pattern": pattern}
        more = {"data": {"train": source if isinstance(source, list) else str(source)}, "train": matched}
        recipe = write_recipe(tmp_path, "owner/name", **more)
        for name, rows in (("train", train), ("eval", evaluation)):
            if rows is not None:
                lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
                (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        overrides = [f"data.{key}={value}" for key, value in settings.items()]
        return preflight(load_recipe(recipe, overrides, check_files=False), tokenizer or byte_tokenizer(), 2)

    return look_at


def pair(prompt, completion="y"):
    return {"prompt": prompt, "completion": completion}


def places(found):
    return {(problem["line"], problem["rule"], problem["severity"]) for problem in found.report["problems"]}


def test_good_rows_give_a_report_without_problems(look):
    found = look()
    report = found.report
    found.raise_if_unusable()
    assert report.keys() >= ALWAYS and report["ok"] and report["problems"] == []
    assert (report["rows_read"], report["rows_kept"], report["dropped"]) == (24, 24, {})
    assert report["tokens"] == sum(len(e.token_ids) for e in found.data.examples)
    assert report["target_tokens"] == sum(int(e.is_target.sum()) for e in found.data.examples)
    assert report["packing_efficiency"] == report["tokens"] / (128 * report["packs"])
    assert sum(bar["rows"] for bar in report["lengths"]) == 24
    assert report["sources"][0]["format"] == "messages" and report["eval"]["rows_kept"] == 6
    assert report["template"]["name"] == "model" and report["template"]["end_tokens"] == ["<|im_end|>"]
    end = next(token for token in report["special_tokens"] if token["token"] == "<|im_end|>")
    assert (end["count"], end["targets"]) == (48, 24)
    json.dumps(report)


def test_a_template_that_writes_the_date_has_the_same_one_in_all_rows_and_it_is_said(look):
    dated = byte_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') + '\n' }}" + dated.chat_template
    found = look(tokenizer=dated)
    assert "".join(piece["text"] for piece in found.report["rows"][0]["pieces"]).startswith("26 Jul 2024\n")
    assert "today is 26 Jul 2024 in all rows" in render(found.report, "x")
    assert look().report["template"]["day"] is None and "today is" not in render(look().report, "x")


@pytest.mark.parametrize(("rank", "factor"), [(1, 4), (2, 2), (8, None)])
def test_more_target_tokens_than_lora_weights_warn_with_a_rank_that_suffices_and_its_cost(
    tmp_path, model_folder, monkeypatch, rank, factor
):
    monkeypatch.setattr("qlora_lite.prepare.preflight.FEW_TOKENS", 0)
    lora = {"rank": rank, "targets": ["q_proj"], "dtype": "bfloat16"}
    path = write_recipe(tmp_path, model_folder, 200, lora=lora, train={"optimizer": "adamw_8bit"})
    found = preflight(load_recipe(path), byte_tokenizer(), 0)
    tokens, weights = found.report["target_tokens"], rank * 2 * (64 + 64)  # of two layers
    assert (factor is None) == (tokens <= weights)
    lines = [line_of_problem(problem) for problem in found.report["problems"] if problem["rule"] == CAPACITY]
    found.raise_if_unusable()
    if factor:
        more = format_bytes((factor - 1) * weights * (2 + 2 + 2))
        assert lines == [
            f"lora.rank: {format_count(tokens)} target tokens are more than {format_count(weights)} LoRA "
            f"weights can learn; rank {factor * rank} suffices, and takes {more} more for weights, "
            "gradients and optimizer states"
        ]
        assert tokens <= factor * weights < 2 * tokens
    else:
        assert lines == []


@pytest.mark.parametrize(
    ("targets", "also", "warns"),
    [
        (["q_proj"], {}, True),
        (["q_proj"], {"train_also": ["embeddings"]}, True),
        ([], {"train_tokens": ["e"]}, False),
    ],
)
def test_what_is_trained_beside_lora_weights_is_none_of_them(tmp_path, model_folder, monkeypatch, targets, also, warns):
    monkeypatch.setattr("qlora_lite.prepare.preflight.FEW_TOKENS", 0)
    path = write_recipe(tmp_path, model_folder, 200, lora={"rank": 1, "targets": targets}, adapter=also)
    problems = preflight(load_recipe(path), byte_tokenizer(), 0).report["problems"]
    found = [line_of_problem(each) for each in problems if each["rule"] == CAPACITY]
    assert len(found) == warns and all("more than 256 LoRA weights" in line for line in found)


def test_packs_are_counted_with_virtual_tokens(tmp_path, model_folder):
    virtual = {"lora": None, "adapter": {"method": "prompt"}, "prompt": {"virtual_tokens": 40}}
    path = write_recipe(tmp_path, model_folder, train={"learning_rate": 0.1}, **virtual)
    recipe = load_recipe(path)
    lengths = build_workload(recipe).batches.lengths(build_data(recipe, byte_tokenizer()).examples)
    report = preflight(recipe, byte_tokenizer(), 0).report
    expected = plan_epoch(lengths, 128, True, 1, recipe.data.order, 0, 0)
    assert report["packs"] == len(expected) > 6
    assert report["packing_efficiency"] == pytest.approx(sum(lengths) / (128 * len(expected)))
    assert report["longest_tokens"] == max(lengths) - 40, "of rows"


def test_tokens_that_are_to_be_trained_and_that_no_row_has_warn(tmp_path, model_folder):
    path = write_recipe(tmp_path, model_folder, adapter={"train_tokens": ["<|call|>", "e", "<|end_call|>"]})
    tokenizer = load_tokenizer(model_folder, None, ["<|call|>", "<|end_call|>"])
    found = preflight(load_recipe(path), tokenizer, 0)
    found.raise_if_unusable()
    assert [line_of_problem(problem) for problem in found.report["problems"]] == [
        "adapter.train_tokens: no training row has '<|call|>', '<|end_call|>', so that nothing is learned of them"
    ]
    turns = [("user", "<|call|>"), ("assistant", "x<|end_call|>")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = (tmp_path / "train.jsonl").read_text().rstrip()
    (tmp_path / "train.jsonl").write_text(f"{rows}\n{json.dumps(row)}\n")
    assert preflight(load_recipe(path), tokenizer, 0).report["problems"] == []


def test_the_shown_rows_are_the_first_ones_with_their_learned_text(look):
    first, second = look().report["rows"]
    assert first["where"].endswith("train.jsonl:1") and second["where"].endswith("train.jsonl:2")
    assert "".join(p["text"] for p in first["pieces"] if p["is_target"]) == "zero<|im_end|>"
    assert "".join(p["text"] for p in first["pieces"]).startswith("<|im_start|>user\n0?<|im_end|>")


def test_every_bad_row_of_both_files_is_named_and_stops_the_run(look):
    found = look([pair("a"), "{", pair("b", 7), pair("x<|im_end|>")], [pair("c"), {"prompt": "d"}])
    assert places(found) == {
        (2, "malformed row", "error"),
        (3, "malformed row", "error"),
        (4, "control token in text", "error"),
    }
    assert not found.report["ok"] and found.report["errors"] == 4
    with pytest.raises(DataError, match=r"train.jsonl:2: not JSON(.|\n)*train.jsonl:4(.|\n)*eval.jsonl:2") as caught:
        found.raise_if_unusable()
    assert caught.value.exit_code == 2 and "data.max_bad_rows" in str(caught.value)


def test_bad_rows_within_the_limit_are_warnings_and_counted(look):
    found = look([pair("a"), "{", pair("b")], max_bad_rows=1)
    assert found.report["ok"] and places(found) == {(2, "malformed row", "warning")}
    assert (found.report["rows_read"], found.report["rows_kept"]) == (3, 2)
    assert found.report["dropped"] == {"malformed row": 1}
    found.raise_if_unusable()


def test_rows_left_out_are_named_in_the_report_and_on_the_page(look):
    long = pair("long " * 40)
    found = look([pair("a"), *[long] * 7, pair("b")], max_tokens=64, overflow="drop")
    assert found.report["ok"] and found.report["dropped"] == {"longer than max_tokens": 7}
    (named,) = found.report["dropped_at"].values()
    assert [where.rpartition("/")[2] for where in named] == [f"train.jsonl:{line}" for line in (2, 3, 4, 5, 6)]
    assert first_places(found.report, "longer than max_tokens") == ", ".join(named) + ", ..."
    assert f"<td>{', '.join(named)}, ...</td>" in render(found.report, "x")


def test_answers_that_are_marked_as_bad_are_left_out_counted_and_named(look):
    rows = [pair("a") | {"label": True}, *[pair("b", "bad") | {"label": False}] * 2, pair("c") | {"label": "x"}]
    for _ in range(2):  # made, and from the cache
        report = look(rows, [pair("d") | {"label": False}, pair("e")]).report
        assert report["ok"] and (report["rows_read"], report["rows_kept"]) == (4, 2)
        assert report["dropped"] == {BAD_ANSWER: 2} and report["eval"]["dropped"] == {BAD_ANSWER: 1}
        assert [where.rpartition(":")[2] for where in report["dropped_at"][BAD_ANSWER]] == ["2", "3"]
        assert report["sources"][0]["notes"] == ["columns not used: label (1 row)"]
    (problem,) = look(rows[1:3]).report["problems"]
    assert problem["message"] == f"no row is left to train on: 2 rows {BAD_ANSWER}"


def test_one_bad_row_among_many_is_found_and_named(look):
    found = look([pair(f"q{i}") if i != 4321 else pair(f"q{i}", None) for i in range(6000)])
    assert places(found) == {(4322, "malformed row", "error")}


def test_evaluation_rows_in_training_are_an_error_from_one_percent_on(look):
    many = [pair(f"q{i}") for i in range(150)]
    assert places(look(many[:1], many)) == {(1, "evaluation row in training", "warning")}
    found = look(many, many[:10])
    assert places(found) == {(1, "evaluation row in training", "error")}
    with pytest.raises(DataError, match="10 of 10 evaluation rows are training rows too"):
        found.raise_if_unusable()


def test_evaluation_prompts_that_are_training_prompts_with_other_answers_are_warned_of(look):
    train = [pair(f"q{i}") for i in range(9)]
    found = look(train, [pair("new"), pair("q3", "z"), pair("q3", "x"), pair("q4", "z")])
    found.raise_if_unusable()
    assert places(found) == {(2, "evaluation prompt in training", "warning")}
    message = found.report["problems"][0]["message"]
    assert message.startswith("2 of 3 evaluation prompts are also prompts of training rows, with other answers (")
    assert "train.jsonl:4)" in message and message.endswith(
        "keep all rows of a prompt in one of data.train and data.eval"
    )
    held = look([pair("one for all", f"y{i}") for i in range(20)], eval="null", eval_share=0.2)
    held.raise_if_unusable()
    message = held.report["problems"][0]["message"]
    assert message.startswith("1 of 1 evaluation prompts are also") and message.endswith(
        "; data.eval_share splits one with many rows; for new prompts, name rows with others in data.eval"
    )


def test_a_missing_file_and_a_bad_row_of_another_are_both_named(look, tmp_path):
    found = look([pair("a"), "{"], eval=str(tmp_path / "none.jsonl"))
    files = [problem["file"] for problem in found.report["problems"]]
    assert files == [str(tmp_path / "train.jsonl"), str(tmp_path / "none.jsonl")]
    assert found.report["problems"][1]["message"].startswith("no such file")
    assert found.report["rows_read"] == 2


def test_a_model_without_a_template_is_one_problem_with_the_choices(look):
    found = look(tokenizer=byte_tokenizer(template=None))
    assert {problem["rule"] for problem in found.report["problems"]} == {"source not usable"}
    assert "set data.template to one of" in found.report["problems"][0]["message"]


def test_a_million_bad_rows_are_counted_and_the_first_of_each_rule_listed(look):
    found = look(["{"] * 500 + [pair("a"), pair("x<s>")])
    rules = [problem["rule"] for problem in found.report["problems"]]
    assert rules == ["malformed row"] * 20 + ["control token in text"]
    assert found.report["errors"] == 501
    with pytest.raises(DataError, match="and 495 more problems; qlora-lite data --json lists them"):
        found.raise_if_unusable()


def notes_of(found):
    return [source["notes"] for source in found.report["sources"]]


def test_what_is_left_out_of_a_folder_is_counted_and_named_on_the_page_too(look, tmp_path):
    for name in ("rows.jsonl", "README.md", *(f"{letter}.xml" for letter in "abcdef")):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text(json.dumps(pair("a")))
    found = look(source=tmp_path / "set")
    note = "7 not read: README.md, a.xml, b.xml, c.xml, d.xml, ..."
    assert found.report["ok"] and notes_of(found) == [[note]]
    assert note in render(found.report, "x") and notes_of(look()) == [[]]


def test_a_label_beside_text_that_is_not_learned_is_a_warning_whose_cures_work(look, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na good one,positive\na bad one,negative\n")
    (problem,) = look(source=path).report["problems"]
    assert problem["severity"] == "warning" and line_of_problem(problem).startswith(f"{path}:2: the column 'label' is ")
    cure = re.search(
        r"with 'label', write data\.train: (\[.*\]); if the text alone is meant, add format: text$", problem["message"]
    )[1]
    found = look(source=yaml.safe_load(cure))
    assert found.report["problems"] == [] and found.data.examples[0].answer == "positive"
    found = look(source=[{"path": str(path), "format": "text"}])
    assert found.report["problems"] == [] and notes_of(found) == [["columns not used: label (2 rows)"]]


def test_columns_and_keys_that_are_not_used_are_counted_in_all_rows_and_spoil_nothing(look):
    report = look([{"text": "a b", "label": 1, "id": 2}, {"text": "e", "Text": "f"}], [{"text": "c d", "id": 3}]).report
    note = "columns not used: Text (1 row; what is read is text), label (1 row), id (1 row)"
    assert report["ok"] and report["sources"][0]["notes"] == [note]
    assert report["eval"]["sources"][0]["notes"] == ["columns not used: id (1 row)"]
    assert f"<td>{note}</td>" in render(report, "x")
    turns = [{"role": "user", "content": "q", "name": "bob"}, {"role": "assistant", "content": "a"}]
    for _ in range(2):  # made, and from the cache
        assert notes_of(look([{"messages": turns}] * 3)) == [["keys of turns not used: name (3 rows)"]]


def test_the_report_says_which_way_each_text_file_was_read(look, tmp_path):
    (tmp_path / "set").mkdir()
    for name, text in (("a.txt", "one\ntwo\n"), ("b.txt", "one\ntwo\n\nthree\n"), ("c.text", "one\n")):
        (tmp_path / "set" / name).write_text(text)
    notes = ["each line is a document: a.txt, c.text", "blank lines part documents: b.txt"]
    assert notes_of(look(source=tmp_path / "set")) == [notes]
    whole = {"train": [{"path": str(tmp_path / "set"), "documents": "file"}]}
    found = preflight(
        load_recipe(write_recipe(tmp_path, "owner/name", data=whole), check_files=False), byte_tokenizer()
    )
    assert notes_of(found) == [["each file is a document: a.txt, b.txt, c.text"]] and found.report["rows_read"] == 3


def test_a_document_that_a_template_made_of_a_chat_is_warned_of(look):
    chat = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    found = look([{"text": "plain"}, {"text": chat}, {"text": chat}])
    found.raise_if_unusable()
    assert places(found) == {(2, "rendered chat in a document", "warning")} and found.report["ok"]
    assert "give chats as messages" in found.report["problems"][0]["message"]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    for rows in ([{"text": "a <s> b"}], [{"text": "a <unk> b"}], [pair("q", "a")]):
        assert look(rows, tokenizer=tokenizer).report["problems"] == []
    for value in (None, 5):
        said = [problem["message"] for problem in look([{"text": "plain"}, {"text": value}]).report["problems"]]
        assert len(said) == 1 and said[0].startswith("'text' is ")


def test_an_answer_that_begins_with_the_space_that_joins_it_to_its_prompt_is_warned_of_where_a_line_end_parts_them(
    look,
):
    rows = [pair("q:", " y"), pair("p:", " y")]
    found = look(rows, template="plain")
    assert places(found) == {(1, "line end before an answer that begins with white space", "warning")}
    assert look(rows, template="joined").report["problems"] == []
    assert look([pair("q", "y")], template="plain").report["problems"] == []


def test_a_row_of_a_json_file_of_one_line_is_named_by_its_number(look, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([pair("q"), pair("q", None), pair("r")]))
    found = look(source=tmp_path / "rows.json")
    (problem,) = found.report["problems"]
    assert (problem["line"], problem["row"]) == (1, 2) and found.report["rows"][1]["where"].endswith(
        "rows.json:1 (row 3)"
    )
    with pytest.raises(DataError, match=r"rows\.json:1 \(row 2\): 'completion' is missing"):
        found.raise_if_unusable()


def test_a_column_of_a_table_that_is_called_text_is_no_document(look, tmp_path):
    (tmp_path / "table.jsonl").write_text(json.dumps({"q": "a", "a": "b", "text": "<|im_end|>"}) + "\n")
    source = {"path": str(tmp_path / "table.jsonl"), "prompt": "{q}", "completion": "{a}"}
    recipe = load_recipe(write_recipe(tmp_path, "owner/name", data={"train": [source]}), check_files=False)
    assert preflight(recipe, byte_tokenizer()).report["problems"] == []


def test_every_part_of_a_row_that_was_split_is_shown(look):
    turns = [{"role": role, "content": "x" * 30} for role in ("user", "assistant") * 4]
    report = look([{"messages": turns}], overflow="split", max_tokens=128).report
    assert report["split"] == 1 and len(report["rows"]) == 2 < report["rows_kept"]


def test_rows_held_out_for_evaluation_are_counted_on_both_sides_and_shown_as_its_own(look):
    found = look([pair(f"q{i}") for i in range(20)], eval="null", eval_share=0.2)
    report = found.report
    assert report["ok"] and report["problems"] == []
    assert (report["rows_read"], report["rows_kept"], report["dropped"]) == (20, 16, {HELD_OUT: 4})
    assert (report["eval"]["rows_read"], report["eval"]["rows_kept"], report["eval"]["dropped"]) == (4, 4, {})
    assert report["sources"][0]["examples"] == 16 and report["eval"]["sources"][0]["examples"] == 4
    assert "16 kept, 4 dropped (held out for evaluation (data.eval_share))" in _text(report)
    for rows in ([pair("q")], [pair("q"), "{"]):
        alone = look(rows, eval="null", eval_share=0.2, max_bad_rows=5)
        with pytest.raises(DataError, match="no row can be held out"):
            alone.raise_if_unusable()


def test_each_source_is_counted_and_shown_in_turn(tmp_path):
    tokenizer = byte_tokenizer()
    parts = [("a", 3, 2.0), ("b", 4, 0.5), ("c", 1, 1.0)]
    for name, count, _ in parts:
        lines = [json.dumps(pair(f"{name}{i}", "y" * (i + 1))) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, _, weight in parts]
    recipe = load_recipe(write_recipe(tmp_path, "owner/name", data={"train": sources}), check_files=False)
    for _ in range(2):  # made, and from the cache
        found = preflight(recipe, tokenizer, 4)
        report = found.report
        assert [source["examples"] for source in report["sources"]] == [6, 2, 1]
        for count in ("tokens", "target_tokens"):
            assert sum(source[count] for source in report["sources"]) == report[count]
        of_a = [example for example in found.data.examples if "a.jsonl" in example.where]
        assert report["sources"][0]["tokens"] == sum(len(example.token_ids) for example in of_a)
        assert [row["where"].rpartition("/")[2] for row in report["rows"]] == [
            "a.jsonl:1",
            "b.jsonl:2",
            "c.jsonl:1",
            "a.jsonl:2",
        ]
        assert '<td class="number">6</td>' in render(report, "x")
        said = r"a\.jsonl \(prompt-completion, weight 2\)\n +6 examples, [\d,]+ tokens, \d+ target tokens\n"
        assert re.search(said, _text(report))


def test_plain_documents_have_no_template(look):
    report = look([{"text": "one two"}, {"text": "three"}], [{"text": "four"}]).report
    assert report["template"] is None and report["sources"][0]["format"] == "text" and report["ok"]


def test_an_exact_match_on_plain_text_is_an_error_before_a_model_is_loaded(look):
    documents = [{"text": "four"}, {"text": "five"}]
    assert look(None, documents, exact_rows=0).report["ok"]
    found = look(None, documents, exact_rows=2)
    assert places(found) == {(1, "no answer to match", "error")} and found.report["errors"] == 1
    with pytest.raises(DataError, match=r"eval.jsonl:1: has no answer to match; set train.metrics_examples"):
        found.raise_if_unusable()


def test_references_in_which_the_pattern_finds_nothing_are_named_and_an_error_only_if_it_finds_none(look):
    rows = [pair("x", "4 - 1 = 3\n#### 3"), pair("y", "three"), pair("z", "3")]
    rule = {"exact_rows": 3, "pattern": "#### (.*)"}
    found = look(None, rows, **rule)
    found.raise_if_unusable()
    assert places(found) == {(2, "no answer to match", "warning")}
    assert "nothing to compare in the answers of 2 of 3 examples, this one's ending 'three'" in str(found.report)
    with pytest.raises(DataError, match=r"eval.jsonl:1: .* find nothing to compare in the answers of 2 of 2 examples"):
        look(None, rows[1:], **rule | {"exact_rows": 2}).raise_if_unusable()
    with pytest.raises(DataError, match="takes too long on an answer"):
        look(None, [pair("x", "a" * 90 + "b")], exact_rows=1, pattern="(a|aa)+$").raise_if_unusable()


def test_rows_whose_answer_is_cut_off_are_counted_and_an_error_only_if_they_are_all(look):
    cut = pair("x", "o" * 200)
    found = look(None, [cut, pair("z"), cut], exact_rows=3, overflow="truncate")
    found.raise_if_unusable()
    assert places(found) == {(1, "no answer to match", "warning")}
    assert "the answers of 2 of 3 rows were cut off" in found.report["problems"][0]["message"]
    found = look(None, [cut, pair("z"), cut], exact_rows=1, overflow="truncate")
    with pytest.raises(DataError, match=r"the answers of 1 of 1 rows were cut off at data\.max_tokens"):
        found.raise_if_unusable()


def test_without_packing_there_is_no_efficiency(look):
    report = look(packing="false").report
    assert report["packing_efficiency"] is None and report["packs"] is None


def test_a_look_at_streamed_rows_says_that_it_is_one_at_their_first_thousand(look):
    found = look([pair(f"q{i}") for i in range(1500)], streaming="true", order="as-is")
    sample = "the first 1,000 rows of each source; the rest is checked while training"
    assert found.report["ok"] and (found.report["rows_read"], found.report["sample_rows"]) == (1000, 1000)
    assert sample in render(found.report, "x")
    assert look().report["sample_rows"] is None and "Checked" not in render(look().report, "x")


HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


@pytest.mark.parametrize("settings", [{}, {"packing": "false"}, {"max_bad_rows": 5}])
def test_the_page_shows_rows_and_problems_and_escapes_both(look, settings):
    found = look([pair(HOSTILE, f"learned {HOSTILE}"), {"messages": [{"role": HOSTILE, "content": "a"}]}], **settings)
    html = render(found.report, HOSTILE)
    assert "<img" not in html and HOSTILE not in html
    assert re.search(r'<span class="learned">learned &lt;/script&gt;', html)
    assert '<span class="seen token">&lt;|im_start|&gt;</span>' in html
    assert ("cannot be trained on" in html) == ("max_bad_rows" not in settings) != (">can be trained on" in html)
    assert f'class="notice {"warning" if "max_bad_rows" in settings else "error"}"' in html
    assert "http:" not in html and "https:" not in html


def test_the_page_of_rows_that_could_not_be_read_has_the_reason(look, tmp_path):
    html = render(look([], []).report, "empty")
    assert "the file has no rows" in html and "cannot be trained on" in html
