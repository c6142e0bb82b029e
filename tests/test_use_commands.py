"""What ``merge``, ``export`` and ``compare`` print, and that their mistakes are one line."""

import errno
import json
import os
import re
import shlex
import shutil

import pytest
from tiny_files import MERGES, save_tiny
from tiny_runs import make_run, tiny_run

from qlora_lite.inference.compare import _side_by_side
from qlora_lite.inference.evaluate import SPARE_TOKENS
from qlora_lite.models import gguf_header


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model", merges=MERGES)
    return [make_run(folder / str(seed), folder / "model", seed=seed).rename(folder / f"run{seed}") for seed in (1, 2)]


def test_merge_prints_the_table_of_its_report(runs, command, tmp_path):
    code, out, _ = command("merge", runs[0], "--out", tmp_path / "out", "--dtype", "f32", "--rows", 4)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert code == 0 and "14 layers merged into the nf4 weights" in out
    for name, found in report["models"].items():
        figures = f"{found['loss']:.4f}", f"{found['kl']:.2e}", f"{found['agreement']:.2%}"
        assert re.search(" +".join([f"^{name}", *map(re.escape, figures)]) + "$", out, re.MULTILINE), name


@pytest.mark.parametrize("form", ["peft", "vllm", "gguf", "gguf-adapter", "ollama"])
def test_export_says_what_was_written_how_well_and_how_to_use_it(form, runs, command, tmp_path):
    code, out, _ = command("export", runs[0], "--to", form, "--out", tmp_path / "out")
    said = r"changes the base model's logits (as the adapter does, within \d|by (100|99)\.\d% of what the adapter)"
    assert code == 0 and re.search(rf"^loaded back +({said})", out, re.MULTILINE)
    assert re.search(r"^use +\S", out, re.MULTILINE)
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["form"] == form


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("vllm", ["--lora-modules", "my run=OUT"]),
        ("gguf", ["-m", "OUT/model.gguf"]),
        ("gguf-adapter", ["--lora", "OUT/adapter.gguf"]),
        ("ollama", ["create", "my-run", "-f", "OUT/Modelfile"]),
    ],
)
def test_the_command_that_export_prints_is_one_for_a_shell_where_names_have_a_space(
    form, words, runs, command, tmp_path
):
    out = tmp_path / "an export"
    printed = command("export", shutil.copytree(runs[0], tmp_path / "my run"), "--to", form, "--out", out)[1]
    (use,) = re.findall("^use +(.+)$", printed, re.MULTILINE)
    assert {word.replace("OUT", str(out)) for word in words} <= set(shlex.split(use))
    assert json.loads((out / "export_report.json").read_text())["use"] == use


def test_the_form_for_denoisers_is_refused(runs, command, tmp_path):
    for given in (runs[0], shutil.copytree(runs[0] / "adapter", tmp_path / "alone")):
        code, _, err = command("export", given, "--to", "kohya", "--out", tmp_path / "out")
        assert code and "draws no pictures" in err and not (tmp_path / "out").exists()


def test_a_gguf_header_is_read_once_and_by_the_fast_reader(runs, command, tmp_path, monkeypatch):
    assert command("export", runs[0], "--to", "gguf", "--out", tmp_path / "out")[0] == 0
    run = make_run(tmp_path, next((tmp_path / "out").glob("*.gguf")))
    generate = "generate", run, "--prompt", "0?", "--max-new-tokens", "2"
    first = command(*generate)[:2]  # after which all that transformers makes of it is in the cache
    walks, walk = [], gguf_header._Walk.whole
    monkeypatch.setattr(gguf_header._Walk, "whole", lambda self: walks.append(1) or walk(self))
    monkeypatch.setattr("gguf.GGUFReader.__init__", None)  # transformers' reader
    gguf_header._read.cache_clear()  # as in another process
    assert command(*generate)[:2] == first and (first[0], len(walks)) == (0, 1)


def test_compare_prints_a_table_or_one_object(runs, command, tmp_path):
    code, out, _ = command("compare", *runs, "--base", "--rows", 2, "--out", tmp_path / "page")
    names = "base", "run1", "run2"
    assert code == 0 and re.search(rf"^ +{' +'.join(names)}$", out, re.MULTILINE)
    for line in (r"examples( +6){3}", r"loss( +\d+\.\d{4}){3}", r"exact match( +\d+\.0% ± \d+\.\d% of 2){3}"):
        assert re.search(rf"^{line}$", out, re.MULTILINE), line
    assert (tmp_path / "page" / "compare.html").exists()
    code, out, _ = command("compare", *runs, "--json")
    assert code == 0 and out.count("\n") == 1 and [m["name"] for m in json.loads(out)["models"]] == ["run1", "run2"]


@pytest.mark.parametrize(
    ("arguments", "printed", "said"),
    [
        (("compare", "RUN", "--rows", 1, "--out", "OUT"), ["examples", "loss", "prompt"], "compare.json"),
        (("compare", "RUN", "--rows", 0, "--json", "--out", "OUT"), ['"models": '], "compare.json"),
        (("evaluate", "RUN", "--rows", 1, "--out", "OUT/answers"), ["perplexity", "exact match"], "answers"),
        (("evaluate", "RUN", "--rows", 1, "--json", "--out", "OUT/answers"), ['"perplexity": '], "answers"),
    ],
    ids=["compare", "compare --json", "evaluate", "evaluate --json"],
)
def test_a_disk_that_is_full_at_the_end_does_not_take_the_figures_with_it(
    arguments, printed, said, runs, command, tmp_path, monkeypatch
):
    def flush(path):
        if path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qlora_lite.files.flush_to_disk", flush)
    places = {"RUN": runs[0], "OUT": tmp_path, "OUT/answers": tmp_path / "answers"}
    code, out, err = command(*(places.get(argument, argument) for argument in arguments))
    assert all(words in out for words in printed) and "page" not in out
    assert code == 2 and f"error: cannot write {tmp_path / said}: the disk is full" in err and "Traceback" not in err


def test_a_page_is_written_where_its_figures_cannot_be_printed(runs, command, tmp_path, monkeypatch):
    def full(_text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qlora_lite.cli.compare.echo_exactly", full)
    code, _, err = command("compare", runs[0], "--rows", 0, "--json", "--out", tmp_path / "page")
    assert code == 2 and "No space left" in err and (tmp_path / "page" / "compare.html").exists()


@pytest.mark.parametrize("arguments", [("compare", "--rows", 0, "--out", "DIR"), ("evaluate", "--out", "DIR/answers")])
def test_a_place_that_takes_no_file_is_an_error_before_anything_is_measured(
    arguments, runs, command, tmp_path, monkeypatch
):
    measured = []
    for name in ("compare.compare_runs", "evaluate.build_to_use"):
        monkeypatch.setattr(f"qlora_lite.inference.{name}", lambda *_, **__: measured.append(1))

    def refuse(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("qlora_lite.files.tempfile.TemporaryFile", refuse)
    places = {"DIR": tmp_path, "DIR/answers": tmp_path / "answers"}
    name, *options = (places.get(argument, argument) for argument in arguments)
    code, _, err = command(name, runs[0], *options)
    assert code == 2 and f"error: cannot write {tmp_path}/" in err and not measured


def test_evaluate_refuses_another_base_and_is_told_where_the_right_one_lies(tmp_path, command):
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model")
    loss = json.loads(command("evaluate", run, "--json")[1])["eval_loss"]
    (tmp_path / "model").rename(tmp_path / "moved")
    assert "is not where it was" in command("evaluate", run)[2]
    save_tiny(tmp_path / "model", intermediate_size=72)
    code, out, err = command("evaluate", run)
    assert (code, out) == (2, "") and "is another model: give the right one with --model PATH" in err
    code, out, _ = command("evaluate", run, "--json", "--model", tmp_path / "moved")
    assert code == 0 and json.loads(out)["eval_loss"] == loss


def test_evaluate_measures_a_run_of_a_gpu_on_any_machine_and_a_failed_one_only_if_told_to(runs, command, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("device: cpu", "device: cuda"))
    assert command("evaluate", run)[0] == 0
    summary = json.loads((run / "summary.json").read_text()) | {"status": "failed"}
    (run / "summary.json").write_text(json.dumps(summary))
    code, out, err = command("evaluate", run)
    assert (code, out) == (2, "") and "did not finish (status failed)" in err
    for use in (("evaluate", run, "--unfinished"), ("generate", run, "--prompt", "hi", "--max-new-tokens", 1)):
        code, _, err = command(*use)
        assert code == 0 and f"the run {run} did not finish; using {run / 'adapter'}" in err


def test_evaluate_takes_settings_for_a_recipe_and_options_for_a_run(runs, command):
    recipe = runs[0].parent / "1" / "recipe.yaml"
    code, out, _ = command("evaluate", recipe, "--json", "train.metrics_examples=0", "data.max_tokens=64")
    assert code == 0 and "exact_match" not in json.loads(out)
    for arguments in ((runs[0], "data.max_tokens=64"), (recipe, "--base"), (recipe, "--model", "x")):
        code, out, err = command("evaluate", *arguments)
        assert (code, out) == (2, "") and "Usage:" in err


def answers_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_writes_prompt_reference_answer_and_match_of_each_example(runs, command, tmp_path):
    recipe, said = runs[0].parent / "1" / "recipe.yaml", []
    for arguments in ((runs[0],), (runs[0], "--base"), (recipe,)):
        out = tmp_path / "new" / "answers.jsonl"
        code, printed, _ = command("evaluate", *arguments, "--json", "--rows", 3, "--out", out)
        said.append(found := answers_in(out))
        assert code == 0 and [each["reference"] for each in found] == ["zero", "one", "two"]
        assert json.loads(printed)["exact_match"] == sum(each["match"] for each in found) / 3
        assert all(each["prompt"].startswith("<|im_start|>user\n") for each in found)
        assert all(each["match"] == (each["answer"] == each["reference"]) for each in found)
    assert said[0] != said[1] == said[2]
    code, _, err = command("evaluate", runs[0], "--rows", 0, "--out", out)
    assert code == 2 and "--out needs examples to answer" in err
    (tmp_path / "file").write_text("")
    code, _, err = command("evaluate", runs[0], "--out", tmp_path / "file" / "x.jsonl")
    assert code == 2 and "cannot write" in err


def test_a_run_is_measured_again_with_another_pattern_and_on_more_rows(runs, command, tmp_path):
    rules = "train.exact_match_pattern=(?s).", "train.metrics_new_tokens=30", "train.metrics_examples=4"
    out = tmp_path / "answers.jsonl"
    code, printed, _ = command("evaluate", runs[0], *rules, "--out", out)
    found = answers_in(out)
    assert code == 0 and "on 4 of 6 examples\n" in printed
    assert "scores are of the first 4 examples (train.metrics_examples); --rows N for more\n" in printed
    assert [each["compared_reference"] for each in found] == ["z", "o", "t", "t"]
    assert all(each["match"] == (each["compared_answer"] == each["compared_reference"]) for each in found)
    uncut = [each["answer"] for each in found if each["finish"] == "length"]
    assert uncut and all(len(answer) > len("three") + SPARE_TOKENS for answer in uncut)
    code, printed, _ = command("evaluate", runs[0], "--rows", 9)
    assert code == 0 and re.search(r"exact match +0\.0% ± 0\.0% on 6 of 6 examples$", printed, re.MULTILINE)


def test_evaluate_of_what_is_not_there_speaks_of_runs(command, tmp_path):
    code, _, err = command("evaluate", tmp_path / "runs" / "nosuch")
    assert code == 2 and "nosuch: no such run folder or recipe" in err
    assert "`qlora-lite recipes list`" in command("evaluate", tmp_path / "nosuch.yaml")[2]


def test_evaluate_shows_how_far_it_is_where_it_takes_long(runs, command, monkeypatch):
    for seconds, lines in ((1e9, []), (0, ["evaluation: 4 of 6", "evaluation: 6 of 6", "answers: 2 of 2"])):
        monkeypatch.setattr("qlora_lite.cli.output.WATCH_LINE_SECONDS", seconds)
        code, out, err = command("evaluate", runs[0], "--json")
        assert code == 0 and json.loads(out) and err.splitlines() == lines


def test_evaluate_measures_a_run_on_other_rows_also_one_that_has_none(tmp_path, command, monkeypatch):
    run = tiny_run(tmp_path, overrides=["data.eval=null", "train.metrics_examples=0"])
    code, _, err = command("evaluate", run)
    assert code == 2 and "no evaluation data; name some, as in data.eval=rows.jsonl" in err
    (tmp_path / "here").mkdir()
    (tmp_path / "eval.jsonl").rename(tmp_path / "here/others.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    measured = [
        json.loads(command("evaluate", run, "--json", "--rows", 2, f"data.eval={name}", *options)[1])
        for name, options in [("others.jsonl", []), ("others.jsonl", ["--base"]), (tmp_path / "train.jsonl", [])]
    ]
    assert len({figures["eval_loss"] for figures in measured}) == 3 and measured[0]["exact_match_rows"] == 2
    assert "no such file" in command("evaluate", run, "data.eval=nowhere.jsonl")[2]


def test_evaluate_reads_other_rows_with_the_columns_of_the_run_and_names_its_own_setting(tmp_path, command):
    table = {"path": str(tmp_path / "own.csv"), "prompt": "Describe: {mr}", "completion": "{ref}"}
    (tmp_path / "own.csv").write_text("mr,ref\nx,y\n")
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", data={"train": [table], "eval": None}, train={"metrics_examples": 0})
    (tmp_path / "other.csv").write_text("id,mr,ref\n1,a,b\n2,c,d\n")
    named = json.dumps([table | {"path": str(tmp_path / "other.csv")}])
    given, known = (
        command("evaluate", run, "--json", f"data.eval={value}") for value in (named, tmp_path / "other.csv")
    )
    assert json.loads(given[1]) == json.loads(known[1]) and json.loads(known[1])["rows"] == 2
    assert given[2] == "" and "other.csv is read as rows of the run are: prompt: 'Describe: {mr}'" in known[2]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    code, _, err = command("evaluate", run, f"data.eval={tmp_path / 'other.csv'}")
    assert code == 2 and "as in data.eval: [{path: " in err and "data.train" not in err


def test_evaluate_measures_a_run_that_held_rows_out_on_those_or_on_others(tmp_path, command):
    run = tiny_run(tmp_path, overrides=["data.eval=null", "data.eval_share=0.25"])
    own, given = (
        json.loads(command("evaluate", run, "--json", *options)[1])
        for options in ([], [f"data.eval={tmp_path / 'eval.jsonl'}"])
    )
    assert (own["rows"], given["rows"]) == (5, 6) and own["eval_loss"] != given["eval_loss"]
    rows, recipe = tmp_path / "train.jsonl", tmp_path / "recipe.yaml"
    for content, said in ((rows.read_text() + "{", "not JSON"), (rows.read_text().splitlines()[0], "held out")):
        (tmp_path / "bad.jsonl").write_text(content)
        settings = f"data.train={tmp_path / 'bad.jsonl'}", "data.eval=null", "data.eval_share=0.25"
        code, out, err = command("evaluate", recipe, *settings)
        assert (code, out) == (2, "") and said in err
    refused = "only data.eval=PATH, train.metrics..., train.exact_match_... can be replaced"
    assert refused in command("evaluate", run, "data.eval_share=0.5")[2]
    command("merge", run, "--out", tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["measured_on"] == "data.eval_share" and report["rows"] == 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("merge", "RUN", "--out", "RUN"), "is not an empty folder; choose another --out"),
        (("merge", "RUN", "--out", "NEW", "--base", "fp4"), "the run trained on nf4 weights"),
        (("merge", "NEW", "--out", "NEW"), "is not a run folder"),
        (("merge", "RUN", "--out", "NEW", "--model", "/nowhere"), "is not where it was"),
        (("export", "RUN", "--out", "RUN", "--to", "peft"), "is not an empty folder"),
        (("export", "RUN", "--out", "NEW", "--to", "peft", "--dtype", "q8_0"), "not for peft"),
        (("export", "RUN", "--out", "NEW", "--to", "vllm", "--base", "original"), "not for vllm"),
        (("compare", "RUN", "NEW"), "is not a run folder"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(arguments, text, runs, command, tmp_path):
    places = {"RUN": runs[0], "NEW": tmp_path / "new"}
    code, out, err = command(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and text in err and "Traceback" not in err and not (tmp_path / "new").exists()


USES = {
    "evaluate": ("evaluate", "RUN"),
    "generate": ("generate", "RUN", "--prompt", "hi"),
    "chat": ("chat", "RUN"),
    "serve": ("serve", "RUN"),
    "compare": ("compare", "RUN"),
    "merge": ("merge", "RUN", "--out", "OUT"),
    "export": ("export", "RUN", "--to", "peft", "--out", "OUT"),
    "a run to begin with": ("train", "RUN/recipe.yaml", "lora.init_from=RUN", "output.dir=OUT"),
    "an adapter to begin with": ("profile", "RUN/recipe.yaml", "lora.init_from=RUN/adapter"),
}


@pytest.mark.parametrize("arguments", USES.values(), ids=USES)
def test_a_damaged_adapter_is_one_error_wherever_it_is_read(arguments, runs, command, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    flip_a_bit(run / "adapter" / "adapter_model.safetensors")
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    code, out, err = command(*(re.sub("RUN|OUT", lambda name: places[name[0]], word) for word in arguments))
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert f"{run}/adapter/adapter_model.safetensors is damaged: its SHA-256 is not the one in {run}/summary" in line
    assert line.endswith("restore it from a copy, or train again")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("run/adapter", "is damaged: its SHA-256 is not the one in"),
        ("model", "is not the tokenizer that RUN was trained with: give the model with that one with --model PATH"),
    ],
)
def test_another_tokenizer_than_the_run_s_is_one_error(place, said, runs, command, tmp_path):
    shutil.copytree(runs[0].parent / "model", tmp_path / "model")
    run = shutil.copytree(runs[0], tmp_path / "run")
    path = tmp_path / place / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"?"').replace('"b"', '"a"').replace('"?"', '"b"'))
    code, out, err = command("generate", run, "--model", tmp_path / "model", "--prompt", "hi")
    assert (code, out) == (2, "") and f"error: {path} {said.replace('RUN', str(run))}" in err


def test_an_adapter_whose_sum_nobody_knows_is_used(runs, command, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    flip_a_bit(run / "adapter" / "adapter_model.safetensors")
    alone, rows = shutil.copytree(run / "adapter", tmp_path / "alone"), runs[0].parent / "1" / "eval.jsonl"
    assert command("evaluate", alone, "--model", runs[0].parent / "model", f"data.eval={rows}")[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    del summary["adapter_sha256"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert command("evaluate", run)[0] == 0


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_evaluate_does_not_write_over_the_rows_it_reads(runs, command, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "1?", "completion": "one"}\n' * 3)
    code, _, err = command("evaluate", runs[0], f"data.eval={rows}", "--rows", "2", "--out", rows)
    assert code != 0 and "mine.jsonl holds what is read" in err and rows.read_text().count("\n") == 3


def test_parts_of_a_conversation_that_was_split_are_compared_one_by_one():
    answers = {
        name: [
            {
                "where": "a.jsonl:1",
                "prompt": f"part {n}",
                "question": "",
                "reference": str(n),
                "answer": f"{name} {n}",
                "match": name == "b",
            }
            for n in (1, 2)
        ]
        for name in "ab"
    }
    rows = _side_by_side(answers)
    assert [(row["prompt"], row["answers"]) for row in rows] == [
        (f"part {n}", {"a": f"a {n}", "b": f"b {n}"}) for n in (1, 2)
    ]


def test_an_answer_is_as_long_as_the_positions_allow_and_a_longer_prompt_is_an_error(tmp_path, command):
    save_tiny(tmp_path / "model", "gpt2", max_position_embeddings=64)
    asked = "generate", str(tmp_path / "model"), "--template", "plain", "--max-new-tokens", "100"
    code, _, err = command(*asked, "--prompt", "hello " * 5)
    assert code == 0, err
    code, _, err = command(*asked, "--prompt", "hello " * 20)
    assert code == 2 and "the model has 64 position embeddings: shorten it" in err and "Traceback" not in err
