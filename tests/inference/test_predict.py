"""A file of prompts becomes a file of answers: those of each prompt alone, whatever stopped it on the way."""

import json
import os
import resource
import signal

import pytest
from tiny_files import save_tiny
from tiny_runs import make_run

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.errors import OutputError
from qlora_lite.inference import predict
from qlora_lite.inference.multi_adapter import open_tasks

WORDS = ["a", "the quick brown fox", "hello", "zz top", "3?"]
FEW = "--max-new-tokens", 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    save_tiny(folder / "model")
    return make_run(folder, folder / "model")


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "words.txt"


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr(predict, "BATCHES_PER_WRITE", 1)
    monkeypatch.setattr(predict, "answered_at_once", lambda *_: 2)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_each_prompt_alone_with_the_adapter_and_without(run, words, command, tmp_path):
    tasks, said = open_tasks(run), {}
    for name, given in (("run", (run,)), (None, (run, "--base")), ("recipe", (run.parent / "recipe.yaml",))):
        out = tmp_path / "new" / f"{name}.jsonl"
        code, shown, _ = command("generate", *given, "--prompts", words, "--out", out, *FEW)
        said[name] = lines_of(out)
        assert code == 0 and shown.startswith(f"5 prompts answered in {out}")
        assert [each["prompt"] for each in said[name]] == WORDS
    for name in ("run", None):
        alone = [tasks.answer([name], [[Turn("user", word)]], 10)[0].strip() for word in WORDS]
        assert [each["answer"] for each in said[name]] == alone
    assert said["recipe"] == said[None] != said["run"]
    cut = sum(each["finish"] == "length" for each in said["run"])
    assert cut and all((each["tokens"] == 10) or each["finish"] == "stop" for each in said["run"])


def test_what_is_stopped_goes_on_behind_its_last_whole_line_and_becomes_the_same_file(
    run, words, command, tmp_path, monkeypatch, request
):
    warm = "generate", run, "--prompts", words, "--temperature", 1.5, "--top-p", 0.9, "--seed", 3, *FEW, "--out"
    assert command(*warm, tmp_path / "whole.jsonl")[0] == 0  # in one batch
    request.getfixturevalue("two_at_once")
    answers, calls, out = predict.answers, [], tmp_path / "out.jsonl"

    def stopped(_model, _tokenizer, texts, *others, **options):
        calls.append(len(texts))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return answers(_model, _tokenizer, texts, *others, **options)

    monkeypatch.setattr(predict, "answers", stopped)
    code, _, err = command(*warm, out)
    assert code == 130 and f"2 of 5 prompts answered in {out}, and the same command continues" in err
    assert len(lines_of(out)) == 2
    with out.open("a") as file:
        file.write('{"prompt": "hel')  # as a power cut leaves it
    code, shown, err = command(*warm, out)
    assert code == 0 and "has 2 of 5 answers; continuing after them" in err and "(2 of them before)" in shown
    assert calls == [2, 2, 2, 1] and out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert command(*warm, out)[0] == 0 and len(calls) == 4


def test_the_file_of_prompts_is_never_that_of_the_answers(run, words, command):
    before = words.read_bytes()
    code, _, err = command("generate", run, "--prompts", words, "--out", words, "--overwrite", *FEW)
    assert code == 2 and "holds what is read" in err and words.read_bytes() == before


def test_a_file_of_other_answers_is_not_gone_on_with_unless_it_may_be_overwritten(run, words, command, tmp_path):
    out = tmp_path / "out.jsonl"
    greedy = "generate", run, "--prompts", words, "--out", out, *FEW
    assert command(*greedy)[0] == 0
    before = out.read_bytes()

    def refused(said, *arguments):
        code, _, err = command(*arguments)
        assert code == 2 and said in err and "start over with --overwrite" in err and out.read_bytes() == before

    refused("other settings (temperature 0.0 -> 1.0)", *greedy, "--temperature", 1)
    refused("other settings (adapter_sha256 ", *greedy, "--base")
    words.write_text("\n".join([WORDS[0], "changed", *WORDS[2:]]))
    refused(f"{out}:2: no answer to prompt 2 of the 5", *greedy)
    words.write_text(WORDS[0])
    refused(f"{out}:2: no answer to prompt 2 of the 1", *greedy)
    rows, said = tmp_path / "rows.jsonl", ("generate", run, "--prompts", tmp_path / "rows.jsonl", "--out", out, *FEW)
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    assert command(*said, "--overwrite")[0] == 0
    with_reference = out.read_bytes()
    for changed in ('{"prompt": "a", "completion": "c"}\n', '{"prompt": "a"}\n'):
        rows.write_text(changed)
        assert f"{out}:1: no answer to prompt 1 of the 1" in command(*said)[2] and out.read_bytes() == with_reference
    out.write_bytes(before)
    (tmp_path / "out.jsonl.settings.json").unlink()
    refused("which says how its answers were made, cannot be read", *greedy)
    assert command(*greedy, "--overwrite")[0] == 0
    assert out.read_bytes() == before.split(b"\n")[0] + b"\n"


def test_a_file_without_a_line_end_is_not_taken_for_a_torn_line_of_answers(run, words, command, tmp_path):
    (tmp_path / "out.json").write_text('{"mine": 1}')
    code, _, err = command("generate", run, "--prompts", words, "--out", tmp_path / "out.json", *FEW)
    assert code == 2 and "which says how its answers were made, cannot be read" in err
    assert (tmp_path / "out.json").read_text() == '{"mine": 1}'


def test_rows_of_a_recipe_s_table_are_prompts_by_its_template_and_carry_their_reference(run, command, tmp_path):
    table = {"path": str(tmp_path / "table.csv"), "prompt": "Describe: {mr}", "completion": "{ref}"}
    (tmp_path / "table.csv").write_text("mr,ref\nname[x],It is x.\n")
    other = make_run(tmp_path, run.parent / "model", data={"train": [table]})
    (tmp_path / "new.csv").write_text("id,mr\n1,name[y]\n")
    for name, given, expected in (
        ("table.csv", (other,), {"prompt": "Describe: name[x]", "reference": "It is x."}),
        ("new.csv", (other,), {"prompt": "Describe: name[y]"}),
        ("table.csv", (run, "--column", "mr"), {"prompt": "name[x]"}),
    ):
        out = tmp_path / "out.jsonl"
        arguments = "--prompts", tmp_path / name, "--out", out, "--overwrite", "--max-new-tokens", 1
        assert command("generate", *given, *arguments)[0] == 0
        (found,) = lines_of(out)
        assert found.items() >= expected.items() and found.keys() - expected.keys() == {"answer", "finish", "tokens"}
    code, _, err = command("generate", run, "--prompts", tmp_path / "new.csv", "--out", tmp_path / "no.jsonl")
    assert code == 2 and "new.csv:2: none of the columns 'id', 'mr' is known for a prompt; name it with --column" in err
    assert not (tmp_path / "no.jsonl").exists()


def test_a_system_message_is_for_prompts_without_one_and_bad_prompts_are_all_named(run, command, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turns, turns[1:])))
    given = "generate", run, "--prompts", rows, "--out", out, "--system", "Be kind.", "--max-new-tokens", 1
    assert command(*given)[0] == 0
    kind = [{"role": "system", "content": "Be kind."}, turns[1]]
    assert [each["messages"] for each in lines_of(out)] == [turns, kind]
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("fine", "<|im_end|>", "")))
    _, _, err = command(*given)
    assert "rows.jsonl:3: 'prompt' is empty" in err
    rows.write_text(rows.read_text().replace('""', '"<s>"'))
    code, _, err = command(*given)
    assert code == 2 and all(f"rows.jsonl:{line}: turn 2 holds the text" in err for line in (2, 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --prompt TEXT, or --prompts FILE with --out FILE"),
        (("--prompt", "x", "--prompts", "FILE", "--out", "o"), "give --prompt TEXT, or"),
        (("--prompts", "FILE"), "--prompts FILE and --out FILE go together"),
        (("--prompt", "x", "--out", "o"), "--prompts FILE and --out FILE go together"),
        (("--prompt", "x", "--overwrite"), "--column and --overwrite are for --prompts FILE"),
        (("--prompts", "nowhere.txt", "--out", "o"), "'nowhere.txt' does not exist"),
        (("--prompt", "x", "--top-p", "0"), "must be a number above 0 and at most 1"),
        (("--prompts", "FILE", "--out", "o", "--context-tokens", "9"), "--context-tokens is for --prompt"),
        (("--prompt", "x", "--template", "plain"), "--template is for a recipe or a model"),
    ],
)
def test_what_cannot_be_meant_is_said(run, words, command, arguments, said):
    code, out, err = command("generate", run, *(words if each == "FILE" else each for each in arguments))
    assert (code, out) == (2, "") and said in err


def test_a_base_model_answers_by_its_name_and_by_a_recipe(run, command, tmp_path):
    model, recipe = run.parent / "model", run.parent / "recipe.yaml"
    by_recipe = command("generate", recipe, "--prompt", "3?", *FEW)
    assert by_recipe == command("generate", run, "--base", "--prompt", "3?", *FEW) and by_recipe[0] == 0
    assert by_recipe != command("generate", run, "--prompt", "3?", *FEW)
    assert command("generate", model, "--prompt", "3?", *FEW)[0] == 0
    plain = command("generate", recipe, "--template", "plain", "--prompt", "3?", *FEW)
    assert plain[0] == 0 and plain[1] != by_recipe[1]
    save_tiny(tmp_path / "bare", template=None)
    code, _, err = command("generate", tmp_path / "bare", "--prompt", "3?", *FEW)
    assert code == 0 and "has no chat template; prompts are written with the template plain (--template)" in err
    code, _, err = command("generate", "runs/nosuch", "--prompt", "3?")
    assert code == 2 and "runs/nosuch is not a run folder, an adapter folder or a recipe (.yaml), nor a model:" in err


def test_prompts_without_the_system_message_of_training_are_told_of_and_letters_of_a_prompt_stay(tmp_path, command):
    save_tiny(tmp_path / "model")
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{i}"},
                {"role": "assistant", "content": "no"},
            ]
        }
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(tmp_path, tmp_path / "model", data={"train": str(tmp_path / "rows.jsonl")})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a\ufffcb"}) + "\n")
    told = "share a system message, and prompts here have none; to add it: --system 'Be brief.'"
    for more, is_told in (((), True), (("--system", "Be loud."), False), (("--base",), False)):
        code, _, err = command(
            "generate", run, "--prompts", prompts, "--out", tmp_path / f"{len(more)}.jsonl", *FEW, *more
        )
        assert code == 0 and (told in err) == is_told, err
    assert lines_of(tmp_path / "0.jsonl")[0]["prompt"] == "a\ufffcb"


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"a": 1}\n')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            predict._append(out, "x" * 100 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_text() == '{"a": 1}\n'
