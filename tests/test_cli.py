"""The commands: what they print and where, their exit codes, and one line instead of a stack trace."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_files import save_tiny, write_recipe
from transformers import AutoModelForCausalLM

from qlora_lite import doctor
from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.cli.generate import _is_command
from qlora_lite.cli.main import cli as group
from qlora_lite.cli.output import one_line, prepare, step_progress
from qlora_lite.cli.train import _result
from qlora_lite.compilers import NO_TRITON, ROCM_ATTENTION
from qlora_lite.ext.hub.card import CardFacts, model_card

COMMAND = [sys.executable, "-m", "qlora_lite"]
pytestmark = pytest.mark.usefixtures("simulations")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run trained by the command in a process of its own: its folder, recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    recipe = write_recipe(folder, folder / "model")
    done = subprocess.run([*COMMAND, "train", recipe, "lora.rank=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out", recipe, done


def test_help_names_every_command_without_importing_torch():
    code = (
        "import sys, qlora_lite.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in group.list_commands(None))
    assert time.monotonic() - started < 2  # measured: 0.06 to 0.10 s; loose, for a busy machine


@pytest.mark.parametrize("compiler", [None, "gcc"])
def test_torch_takes_its_own_kernels_where_triton_could_build_none(compiler, monkeypatch, command, tmp_path):
    name, value = NO_TRITON
    monkeypatch.setenv(name, "")  # for its old state to be put back
    monkeypatch.delenv(name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda _name: compiler)
    monkeypatch.setattr("sysconfig.get_path", lambda _name, _scheme: tmp_path)
    (tmp_path / "Python.h").touch()
    command("recipes", "list")
    assert os.environ.get(name) == (None if compiler else value)


@pytest.mark.parametrize(
    ("hip", "set_by_user", "expected"),
    [
        ("'6.4.43482'", None, "1"),
        ("None", None, None),
        ("'7.0.1'", "0", "0"),
    ],
)
def test_torch_for_rocm_has_fused_attention_on_experimental_gpus_unless_the_user_has_set_it(
    hip, set_by_user, expected, monkeypatch, command, tmp_path
):
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = None\nhip: Optional[str] = {hip}\nxpu = 'no'\n")
    monkeypatch.setattr(
        "qlora_lite.compilers.find_spec", lambda _name: SimpleNamespace(origin=tmp_path / "__init__.py")
    )
    monkeypatch.setenv(ROCM_ATTENTION[0], set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv(ROCM_ATTENTION[0])
    command("recipes", "list")
    assert os.environ.get(ROCM_ATTENTION[0]) == expected


def test_every_command_has_help_without_importing_torch():
    code = """
import sys, qlora_lite.cli.main as m
for name in m.cli.list_commands(None):
    try:
        m.main([name, "--help"])
    except SystemExit as end:
        assert not end.code, name
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^Usage: qlora-lite ([a-z]+) ", done.stdout, re.MULTILINE) == group.list_commands(None)


def test_train_prints_the_result_to_standard_output_and_the_progress_to_standard_error(finished):
    folder, _, done = finished
    for label in ("evaluation loss", "exact match of 2", "speed", "peak memory", "adapter", "report"):
        assert re.search(rf"^{re.escape(label)}  ", done.stdout, re.MULTILINE), label
    assert str(folder / "adapter") in done.stdout and str(folder / "report.html") in done.stdout
    assert re.search(rf"^next +qlora-lite chat {re.escape(str(folder))} ", done.stdout, re.MULTILINE)
    assert "step 1/6  loss" in done.stderr and "step 6/6  loss" in done.stderr
    assert "memory: base weights" in done.stderr
    assert "Loading weights" not in done.stderr and "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_result_of_a_run_of_an_earlier_version_is_shown(finished):
    folder, *_ = finished
    summary = json.loads((folder / "summary.json").read_text())
    for sample in summary["samples"]:
        del sample["question"]
    assert f"prompt     {one_line(summary['samples'][0]['prompt'])}" in _result(folder, summary)


def test_speed_is_in_pictures_where_these_are_counted(finished, capsys):
    step = SimpleNamespace(step=1, loss=0.5, metrics={}, tokens_per_second=12.34, peak_bytes=2**20, seconds=1.0)
    for of_pictures, said in ((False, "loss 0.500  12 tokens/s"), (True, "loss 0.500  12.3 pictures/s")):
        with step_progress(counts_pictures=of_pictures) as show:
            show(step, 2)
        assert said in capsys.readouterr().err
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert f"{'speed':24} 12.3 pictures/s" in _result(finished[0], summary | {"tokens_per_second": 12.34}, True)


def test_a_result_that_nobody_reads_any_more_is_no_failure_of_the_work():
    code = "from qlora_lite.cli.output import print_result\nprint_result('done')\nprint_result('and said')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")


def test_a_plan_that_nobody_reads_any_more_has_written_its_page(finished, tmp_path):
    command = [*COMMAND, "plan", finished[1], "--html", tmp_path / "plan.html"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.close()
    assert (tmp_path / "plan.html").exists()


def test_letters_that_the_output_s_encoding_lacks_are_replaced(finished, command, monkeypatch):
    written = io.BytesIO()
    latin = io.TextIOWrapper(written, "latin-1")  # which has no letter for the end of the bar
    monkeypatch.setattr(sys, "stdout", latin)
    code, _, err = command("plan", finished[1])
    latin.flush()
    assert code == 0 and b"\xb7?\n" in written.getvalue(), err


def test_a_run_records_what_its_model_gpu_says(finished):
    opened = open_run(finished[0])
    card = model_card(CardFacts("me/x", "a/b", {}, opened.recipe, opened.summary, None, True))
    labels = "evaluation loss (nats per target token)", "exact match of 2 answers", "examples", "target tokens", "steps"
    assert all(f"\n| {label} | " in card for label in labels) and "Versions: qlora-lite " in card


def test_an_override_is_in_the_written_recipe(finished):
    assert "rank: 2" in (finished[0] / "recipe.yaml").read_text()


def test_data_prints_what_the_run_wrote_and_the_rows_with_their_learned_text(finished, command, tmp_path):
    folder, recipe, _ = finished
    code, out, _ = command("data", recipe, "--json", "--rows", 4, "--html", tmp_path / "data.html")
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert report == json.loads((folder / "data.json").read_text())
    assert (tmp_path / "data.html").read_text() == (folder / "data.html").read_text()
    code, out, err = command("data", recipe, "--rows", 1)
    assert (code, err) == (0, "")
    assert re.search(r"^rows +24 read, 24 kept$", out, re.MULTILINE) and "«zero<|im_end|>»" in out
    assert "no errors" in out


def test_data_fails_on_bad_rows_and_names_them(finished, command, tmp_path):
    recipe = write_recipe(tmp_path, finished[1].parent / "model")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "wizard", "content": "\\u001b[31m"}]}\n')
    code, out, err = command("data", recipe)
    assert code == 2 and "1 dropped (unknown role)" in out and "no errors" not in out
    assert err.startswith(f"error: {tmp_path / 'train.jsonl'}:25: turn 1 has the unknown role 'wizard'")
    code, out, err = command("data", recipe, "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, err) == (2, "")
    assert (problem["file"], problem["line"]) == (str(tmp_path / "train.jsonl"), 25)
    assert (problem["rule"], problem["severity"]) == ("unknown role", "error")
    code, out, err = command("data", recipe, "data.max_bad_rows=1")
    assert (code, err) == (0, "") and "warning: " in out


def test_commands_import_what_they_use(finished):
    run, recipe, _ = finished
    code = f"""
import sys
from qlora_lite.cli.main import main

def absent(names, *arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        assert not end.code, end.code
    assert not (found := set(names.split()) & set(sys.modules)), (arguments[0], found)

never = "datasets pyarrow pandas torchvision networkx wandb torch._inductor.compile_fx "
absent(never + "bitsandbytes", "data", {str(recipe)!r})
absent(never + "starlette", "plan", {str(recipe)!r}, "--vram", "1GiB")
absent(never + "starlette", "generate", {str(run)!r}, "--prompt", "0?", "--max-new-tokens", "2")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_data_says_of_streamed_rows_that_it_looked_at_the_first_ones_only(finished, command):
    code, out, _ = command("data", finished[1], "data.streaming=true", "data.order=as-is")
    sample = "the first 1,000 rows of each source; the rest is checked while training"
    assert code == 0 and f"checked          {sample}\nrows" in out and f"no errors in {sample}" in out


def test_data_says_which_columns_are_not_used(finished, command, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"text": "a b", "label": 1}\n')
    recipe = write_recipe(tmp_path, finished[1].parent / "model", data={"train": "notes.jsonl"})
    code, out, _ = command("data", recipe, "train.metrics_examples=0")
    assert code == 0 and re.search(r"notes.jsonl \(text\)\n +columns not used: label \(1 row\)\nrows +1 read", out)


def test_data_with_json_names_a_mistake_in_the_recipe_too(finished, command, tmp_path):
    recipe = write_recipe(tmp_path, finished[1].parent / "model")
    code, out, err = command("data", recipe, "data.max_token=9", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, err) == (2, "") and "did you mean data.max_tokens" in problem["message"]


def test_evaluate_prints_one_json_object_equal_to_the_run_s_own_measure(finished, command):
    folder, _, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    for arguments, when in (((), "after"), (("--base",), "before")):
        code, out, _ = command("evaluate", folder, "--json", *arguments)
        result = json.loads(out)
        assert code == 0 and out.count("\n") == 1
        assert result["eval_loss"] == pytest.approx(summary[f"eval_loss_{when}"], rel=1e-4)
        assert result["exact_match"] == summary[f"exact_match_{when}"]
        assert (result["adapter"] is None) == (when == "before")


def test_evaluate_writes_the_answers_of_a_run_and_its_base_side_by_side(finished, command, tmp_path):
    out = tmp_path / "answers.jsonl"
    code, shown, _ = command(
        "evaluate", finished[0], "--side-by-side", "--shots", 2, "--out", out, "train.metrics=bleu"
    )
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and len(written) == 2 and "bleu" in shown
    assert list(written[0]["answers"]) == ["base", "base, 2-shot", "out"] == list(written[0]["matches"])
    assert written[0]["reference"] == "zero"
    code, _, err = command("evaluate", finished[0], "--side-by-side", "--rows", 0, "--out", out)
    assert code == 2 and "--out needs examples to answer" in err


def test_evaluate_takes_a_recipe_and_measures_its_base_model(finished, command):
    code, out, _ = command("evaluate", finished[1], "--rows", 0)
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert code == 0 and "exact match" not in out
    assert re.search(rf"eval loss +{summary['eval_loss_before']:.4f}", out)


def test_evaluate_says_how_many_rows_it_left_out_of_exact_match_because_their_answer_is_cut_off(
    finished, command, tmp_path
):
    recipe = write_recipe(tmp_path, finished[1].parent / "model")
    rows = [{"prompt": "x", "completion": "o" * 200}, {"prompt": "y", "completion": "z"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("evaluate", recipe, "--json", "--rows", 2, "data.overflow=truncate")
    assert (code, json.loads(out)["exact_match_rows"]) == (0, 1)
    assert "eval.jsonl:1: the answers of 1 of 2 rows were cut off at data.max_tokens" in err


def test_evaluate_without_evaluation_rows_is_an_error(finished, command, tmp_path):
    recipe = write_recipe(tmp_path, finished[1].parent / "model", data={"eval": None}, train={"metrics_examples": 0})
    code, out, err = command("evaluate", recipe, "--json")
    assert (code, out, err) == (2, "", "error: there is no evaluation data; name some, as in data.eval=rows.jsonl\n")


def test_generate_answers_from_the_run_folder_alone_and_the_same_each_time(finished, command):
    answers = [command("generate", finished[0], "--prompt", "3?", "--max-new-tokens", 8) for _ in range(2)]
    assert answers[0][0] == 0
    assert answers[0][1] == answers[1][1]
    assert "<|im_" not in answers[0][1]


def test_settings_of_sampling_are_refused_where_nothing_is_sampled(finished, command):
    for option in (("--top-p", "0.5"), ("--top-k", "5")):
        code, _, err = command("generate", finished[0], "--prompt", "1?", *option)
        assert code == 2 and "--top-p and --top-k are for a --temperature above 0" in err


@pytest.mark.parametrize("temperature", ["nan", "-1", "2.5", "inf"])
def test_a_temperature_that_is_none_is_refused(finished, command, temperature):
    code, _, err = command("generate", finished[0], "--prompt", "1?", "--temperature", temperature)
    assert code == 2 and "must be a number from 0 to 2" in err


def test_a_prompt_that_is_not_text_is_one_line_with_exit_code_2(finished, command):
    code, out, err = command("generate", finished[0], "--prompt", b"a\xffb".decode(errors="surrogateescape"))
    assert (code, out, err) == (
        2,
        "",
        "error: a turn holds half of a surrogate pair, or a byte that is not UTF-8; remove it\n",
    )


def test_an_answer_is_shown_in_one_line_without_what_a_terminal_would_obey():
    assert one_line("two\n lines \x1b[31mred\x07") == r"two lines \x1b[31mred\x07"
    assert len(one_line("x" * 1000)) == 120 and one_line("x" * 120) == "x" * 120


@pytest.mark.parametrize(
    ("line", "is_command"),
    [("/help", True), ("/system you are", True), ("/ues b", True), ("/think why?", False), ("/etc is where?", False)],
)
def test_chat_takes_no_misspelt_command_for_talk_and_no_talk_for_a_command(line, is_command):
    session = SimpleNamespace(turns=[])
    assert _is_command(session, line) is is_command and session.turns == []


def test_chat_answers_until_an_empty_line(finished):
    typed = "3?\nx<|im_end|>\n4?\n/help\n/exit\n5?\n"
    done = subprocess.run(
        [*COMMAND, "chat", finished[0], "--max-new-tokens", "4"], input=typed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: turn 3 holds the text '<|im_end|>'") == 1
    assert done.stderr.count("/use NAME switches") == 2 and done.stderr.count("you> ") == 5
    assert "Traceback" not in done.stderr


def test_chat_goes_on_after_a_byte_that_is_no_text(finished):
    done = subprocess.run(
        [*COMMAND, "chat", finished[0], "--max-new-tokens", "4"],
        input=b"3?\nna\xefve\n/use \xef\n4?\n",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert done.stderr.count(b", or a byte that is not UTF-8; remove it\n") == 1
    assert done.stdout.count(b"\n") == 2 and done.stderr.count(b"you> ") == 5


def test_quantize_writes_what_plain_transformers_loads(finished, command, tmp_path):
    model = finished[1].parent / "model"
    code, out, err = command("quantize", model, "--out", tmp_path / "q")
    assert (code, out) == (0, f"wrote {tmp_path / 'q'}\n") and "loses much" not in err
    merged = shutil.copytree(model, tmp_path / "merged")
    (merged / "merge_report.json").write_text("{}")
    assert "loses much or all of the update" in command("quantize", merged, "--out", tmp_path / "again")[2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert any(type(m).__name__ == "Linear4bit" for m in loaded.modules())
    assert loaded.dtype == torch.bfloat16
    assert (tmp_path / "q" / "tokenizer.json").exists()
    code, out, err = command("quantize", model, "--out", tmp_path / "q")
    assert (code, out) == (2, "") and "is not an empty folder; choose another --out" in err


def test_quantize_refuses_experts_before_it_reads_them(command, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "qwen3_moe")
    monkeypatch.setattr("qlora_lite.models.load.load_model", None)
    code, _, err = command("quantize", tmp_path / "model", "--out", tmp_path / "q")
    assert code == 2 and "transformers does not load experts in 4 bit" in err


def test_recipes_are_listed_shown_copied_and_checked(command, tmp_path):
    code, out, _ = command("recipes", "list")
    assert code == 0 and re.search(r"^quickstart +\S", out, re.MULTILINE)
    assert "model:" in command("recipes", "show", "quickstart")[1]
    code, out, _ = command("recipes", "copy", "quickstart", tmp_path)
    assert code == 0 and (tmp_path / "quickstart.yaml").exists() and str(tmp_path) in out


def test_recipes_convert_writes_a_recipe_and_names_what_is_not_taken_over(command, tmp_path):
    theirs, ours = tmp_path / "theirs.yml", tmp_path / "ours.yaml"
    theirs.write_text(
        "base_model: a/b\nadapter: qlora\nload_in_4bit: true\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"
        "learning_rate: 1e-4\nflash_attention: true\nneftune_noise_alpha: 5\n"
    )
    code, out, err = command("recipes", "convert", theirs, "--out", ours)
    assert (code, out, ours.exists()) == (2, "", False) and "neftune_noise_alpha = 5" in err and "--partial" in err
    code, out, err = command("recipes", "convert", theirs, "--partial", "--out", ours)
    assert code == 0 and out == f"wrote {ours}; next: qlora-lite data {ours}\n"
    assert (
        f"lost: {theirs}:7: neftune_noise_alpha = 5: " in err and f"unused: {theirs}:6: flash_attention = true" in err
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert command("recipes", "check", ours)[0] == 0
    code, out, err = command("recipes", "convert", theirs, "--partial", "lora.rank=4")
    assert code == 0 and yaml.safe_load(out)["lora"]["rank"] == 4
    assert command("recipes", "convert", theirs, "--partial", "--out", ours)[2].endswith("name another file\n")
    code, out, _ = command("recipes", "convert", theirs, "--partial", "--out", tmp_path / "my own.yaml")
    assert code == 0 and out.endswith(f"; next: qlora-lite data '{tmp_path}/my own.yaml'\n")
    for override in ("lora.rnk=4", "model.path=3", "lora.rank=x"):
        code, _, err = command("recipes", "convert", theirs, override, "--partial")
        assert code == 2 and err.startswith(f"error: override 1: {override[:8]}")


def test_recipes_check_prints_one_json_object_whether_the_recipe_is_good_or_bad(finished, command):
    code, out, _ = command("recipes", "check", finished[1], "--json")
    assert code == 0 and json.loads(out)["ok"] and out.count("\n") == 1
    code, out, err = command("recipes", "check", finished[1], "lora.rnk=3", "train.seed=-1", "--json")
    result = json.loads(out)
    assert code == 2 and err == "" and not result["ok"]
    assert {problem["key"] for problem in result["problems"]} == {"lora.rnk", "train.seed"}
    code, out, err = command("recipes", "check", finished[1], "lora.rnk=3", "train.seed=-1")
    assert code == 2 and out == "" and [line[:7] for line in err.splitlines()] == ["error: "] * 2


def test_recipes_check_reads_the_first_row_of_each_file_without_torch_and_says_little_of_good_ones(command, tmp_path):
    recipe = write_recipe(tmp_path, "owner/name")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qlora_lite", "recipes", "check", recipe],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 and lines[1].endswith("train.jsonl (messages)")
    assert not re.search(r"\| +(torch|transformers|datasets)$", done.stderr, re.MULTILINE)
    assert "lora:" in command("recipes", "check", recipe, "--full")[1]
    (tmp_path / "a.csv").write_text("mr,ref\nx,y\n")
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    settings = [f"data.{part}={tmp_path / name}" for part, name in (("train", "a.csv"), ("eval", "b.jsonl"))]
    code, out, err = command("recipes", "check", recipe, *settings)
    assert (code, out) == (2, "") and "a.csv:2: no format has the columns" in err and "b.jsonl:1: a row with no" in err
    problems = json.loads(command("recipes", "check", recipe, *settings, "--json")[1])["problems"]
    assert [problem["key"] for problem in problems] == ["data.train", "data.eval"]


def test_recipes_check_reads_first_rows_as_the_task_does(command, tmp_path):
    shown = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what"}]
    turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "it"}]
    rows = {
        "image-text-to-text": {"messages": turns},
        "classification": {"sentence": "a", "label": 1},
        "image-classification": {"image": "a.png", "label": 1},
        "image-generation": {"image": "a.png", "text": "b"},
        "image-segmentation": {"image": "a.png", "mask": "b.png"},
    }
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "bad.jsonl").write_text('{"mr": "a", "ref": "b"}\n')
    for kind, row in rows.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"model": {"path": "owner/name"}, "task": {"kind": kind}}))
        code, out, err = command("recipes", "check", recipe, f"data.train={tmp_path / 'rows.jsonl'}")
        assert code == 0 and "no problems" in out, err
        code, _, err = command("recipes", "check", recipe, f"data.train={tmp_path / 'bad.jsonl'}")
        assert code == 2 and "bad.jsonl:1" in err
    code, out, _ = command("recipes", "check", recipe, f"data.train={tmp_path / 'pictures'}")
    assert code == 0 and "pictures (pictures)" in out


def test_data_prints_no_counts_of_a_source_that_cannot_be_read(command, tmp_path, model_folder):
    recipe = write_recipe(tmp_path, model_folder)
    (tmp_path / "a.csv").write_text("mr,ref\nx,y\n")
    code, out, err = command("data", recipe, f"data.train={tmp_path / 'a.csv'}")
    assert (code, out) == (2, "") and "no format has the columns 'mr', 'ref'" in err
    code, out, _ = command("data", recipe, f"data.eval={tmp_path / 'a.csv'}")
    assert code == 2 and "rows             24 read" in out and "0 read" not in out


def test_doctor_prints_one_json_object_or_lines(command):
    code, out, _ = command("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert found.keys() == {"versions", "machine", "notes"} and found["versions"]["torch"] == torch.__version__
    assert (found["machine"]["cuda"] is None) == (torch.version.cuda is None) and "driver" not in found["machine"]
    code, out, _ = command("doctor")
    assert code == 0 and torch.__version__ in out and "bitsandbytes backend" in out
    facts = [line.rpartition("  ")[2].strip() for line in out.splitlines()]
    assert not {"None", "True", "False"} & set(facts) and found["machine"]["attention"]


@pytest.mark.parametrize(
    ("device", "compiler", "header", "missing"),
    [
        ("cuda", None, True, "a C compiler (gcc)"),
        ("cuda", "gcc", False, "Python.h (python3-dev)"),
        ("cuda", "gcc", True, None),
        ("cpu", None, False, None),
    ],
)
def test_doctor_notes_what_triton_misses_beside_a_gpu(device, compiler, header, missing, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: tmp_path)
    if header:
        (tmp_path / "Python.h").touch()
    for name, value in (
        ("fast_dtype", torch.bfloat16),
        ("segments_grow", True),
        ("can_page", True),
        ("_backend", "a native library"),
    ):
        monkeypatch.setattr(doctor, name, lambda *_, value=value: value)
    notes = [note for note in doctor._notes(torch.device(device)) if "triton needs" in note]
    assert [note.partition(" for train.compile")[0] for note in notes] == [f"triton needs {missing}"] * bool(missing)


def test_doctor_notes_a_gpu_without_kernels_and_looks_at_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor, "_gpu", lambda: "an old GPU")
    monkeypatch.setattr(doctor, "missing_kernels", lambda _device: "no kernels for it")
    found = doctor.examine()
    assert found["notes"][0] == "no kernels for it" and found["machine"]["bitsandbytes_backend"].startswith("cpu")


@pytest.mark.parametrize("pages", [True, False])
def test_doctor_notes_a_gpu_that_cannot_page(pages, monkeypatch):
    for name, value in (
        ("fast_dtype", torch.bfloat16),
        ("segments_grow", True),
        ("can_page", pages),
        ("_backend", "a native library"),
    ):
        monkeypatch.setattr(doctor, name, lambda *_, value=value: value)
    noted = any("paged optimizers are ordinary ones" in note for note in doctor._notes(torch.device("cuda")))
    assert noted is not pages


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"data": {"overflow": "drop", "max_tokens": 8}}, "no row is left to train on"),
        ({"lora": {"targets": ["q_porj"]}}, "'q_porj' matches no linear layer"),
        ({"data": {"max_tokens": 8}}, "longer than data.max_tokens"),
        ({"data": {"template": "no-such"}}, "template"),
        ({"output": {"dir": "/dev/null/x"}}, "cannot write /dev/null/x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_is_one_line_with_exit_code_2(finished, command, tmp_path, sections, text):
    code, out, err = command("train", write_recipe(tmp_path, finished[1].parent / "model", **sections))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == ""
    assert 1 <= len(errors) <= 2 and all(text in line for line in errors)  # training and evaluation rows
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("", "no rows|empty"),
        ("{", "rows.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "rows.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}\n', "rows.jsonl:1"),
    ],
)
def test_unusable_rows_are_an_error_with_their_place(finished, command, tmp_path, rows, text):
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = write_recipe(tmp_path, finished[1].parent / "model", data={"train": str(tmp_path / "rows.jsonl")})
    code, _, err = command("train", recipe)
    assert code == 2 and re.search(text, err) and "Traceback" not in err
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_hub_model_without_a_network_is_one_line_with_exit_code_2(command, tmp_path):
    code, out, err = command("train", write_recipe(tmp_path, "nobody-here/no-such-model"))
    assert (code, out) == (2, "") and "the hub cannot be reached" in err and err.count("\n") == 1


def test_a_tokenizer_without_a_template_is_an_error_that_names_the_cure(command, tmp_path):
    save_tiny(tmp_path / "model", template=None)
    code, _, err = command("train", write_recipe(tmp_path, tmp_path / "model"))
    assert code == 2 and "the tokenizer has no chat template; set data.template" in err


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_a_run_folder_that_is_none_is_an_error(command, tmp_path, name):
    code, out, err = command(name, tmp_path, *(["--prompt", "x"] if name == "generate" else []))
    assert (code, out) == (2, "") and "is not a run folder" in err


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-here/x", "a\nb/" + "y" * 5000])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["plan"],
        ["evaluate"],
        ["generate", "--prompt", "a"],
        ["export", "--to", "peft", "--out", "o"],
        ["merge", "--out", "o"],
        ["compare"],
        ["data"],
        ["quantize", "--out", "o"],
        ["recipes", "check"],
        ["profile"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_cannot_be_is_an_error_without_a_stack_trace(command, arguments, path):
    name, *options = arguments
    first = [name, options.pop(0)] if name == "recipes" else [name]
    code, _, err = command(*first, path, *options)
    assert code == 2 and "Traceback" not in err
    assert err.startswith("error: ") or "Usage:" in err


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.template", "output.dir"])
def test_a_setting_that_no_path_can_be_is_an_error_without_a_stack_trace(finished, command, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where part of the path may be made
    for value in ("x" * 300, "~nobody-here/x/" + "z" * 300):
        code, _, err = command("train", finished[1], f"{key}={value}")
        assert code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_train_says_what_to_type_where_an_option_took_the_recipe_or_has_no_effect(finished, command):
    folder, recipe, _ = finished
    assert f"if it is the recipe: qlora-lite train {recipe} --resume" in command("train", "--resume", recipe)[2]
    assert f"name the recipe: qlora-lite train RECIPE --resume {folder}" in command("train", "--resume", folder)[2]
    code, out, err = command("train", recipe, "--force")
    assert (code, out) == (2, "") and "--force is for --resume" in err


def test_debug_shows_the_stack_trace_and_its_absence_does_not(command, tmp_path):
    assert "Traceback" in command("--debug", "generate", tmp_path, "--prompt", "x")[2]
    assert "Traceback" not in command("generate", tmp_path, "--prompt", "x")[2]


def test_a_misspelt_command_is_answered_with_the_one_that_is_meant(command):
    assert "did you mean train?" in command("trian")[2]


@pytest.mark.parametrize("arguments", [["no-such-command"], ["train"], ["evaluate", "x", "--rows", "-1"], ["--no"]])
def test_wrong_arguments_end_with_exit_code_2(command, arguments):
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_130_and_keeps_the_adapter_so_far(finished, tmp_path, number):
    recipe = write_recipe(tmp_path, finished[1].parent / "model", train={"max_steps": 100_000})
    process = subprocess.Popen([*COMMAND, "train", recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and '"loss"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert f"\nstopped by {number.name} after step" in err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (tmp_path / "out" / "adapter-last" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / "report.html").exists()
    how = re.search(r"To resume: qlora-lite train (\S+) --resume (\S+)$", err, re.MULTILINE)
    assert how.groups() == (str(tmp_path / "out" / "recipe.yaml"), str(tmp_path / "out"))


def test_a_stopped_run_goes_on_with_every_spelling_of_resume(finished, command, tmp_path):
    recipe = write_recipe(tmp_path, finished[1].parent / "model", train={"max_hours": 1e-9, "metrics_examples": 0})
    code, out, err = command("train", recipe)
    assert code == 130 and out == "" and "\nstopped by train.max_hours" in err
    folder, stopped = tmp_path / "out", shutil.copytree(tmp_path / "out", tmp_path / "stopped")
    for spelling in (f"--resume {folder}", "--resume", "--resume train.save_every_steps=1", f"--resume={folder}"):
        shutil.rmtree(folder)
        shutil.copytree(stopped, folder)
        code, out, err = command("train", recipe, "train.max_hours=null", *spelling.split())
        assert code == 0, (spelling, err)
        assert "resume: accepted: train.max_hours: 1e-09 -> None" in err and "adapter" in out, spelling
        assert json.loads((folder / "summary.json").read_text())["status"] == "complete", spelling


def test_resume_names_a_folder_that_is_not_there_and_settings_that_changed(finished, command, tmp_path):
    code, out, err = command("train", finished[1], "--resume", tmp_path / "none")
    assert (code, out) == (2, "") and err == f"error: --resume {tmp_path / 'none'}: no such run folder\n"
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    code, out, err = command("train", finished[1], "lora.rank=2", "train.seed=5", "--resume", folder)
    assert (code, out) == (2, "") and "\nerror: train.seed: 0 -> 5\n" in err and "--force" in err


def test_an_interrupted_run_can_be_used(finished, command, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(folder / "adapter")
    code, out, _ = command("evaluate", folder, "--json", "--rows", 0)
    assert code == 0 and json.loads(out)["adapter"].endswith("adapter-last")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("redirects", ["1", "0"])  # as rich takes it from the environment
def test_log_lines_stand_above_the_bar_which_says_no_step_before_the_first(redirects, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", redirects)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    prepare()
    log, handler = logging.getLogger("qlora_lite"), logging.getLogger("qlora_lite").handlers[0]
    with step_progress() as show:
        log.info("a line of the log")
        show(SimpleNamespace(step=3, loss=0.5, metrics={}, tokens_per_second=100.0, peak_bytes=2**20), 4)
    log.info("a last line")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]", terminal.getvalue())]
    assert {"a line of the log", "a last line"} <= set(lines) and handler.stream is terminal
    if redirects == "0":  # and no bar is drawn
        return
    bars = [line for line in lines if "━" in line]
    assert bars[0].startswith("before the first step") and bars[-1].startswith("step 3/4  loss 0.500")


def test_a_bar_shows_what_is_between_steps_below_them(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    step = SimpleNamespace(step=3, loss=0.5, metrics={}, tokens_per_second=100.0, peak_bytes=2**20)
    with step_progress() as show:
        show.watch("evaluation", 5, 6)
        show(step, 4)
        show.watch("micro-batches of step 4", 1, 8)
    *_, steps, within = [line for line in re.split(r"[\r\n]+", terminal.getvalue()) if "━" in line]
    assert "step 3/4  loss 0.500" in steps and "micro-batches of step 4: 1 of 8" in within


def test_lines_where_there_is_no_terminal_name_each_step_of_a_short_run_and_what_takes_long(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("qlora_lite.cli.output.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(number):
        return SimpleNamespace(step=number, loss=1.0, metrics={}, tokens_per_second=1.0, peak_bytes=1, seconds=1.0)

    def lines(total):
        with step_progress() as show:
            show(step(1), total)
            for done in range(1, 8):
                now[0] += 12
                show.watch("micro-batches of step 2", done, 8)
            for number in (2, 3, 4):
                show(step(number), total)
        return [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()]

    slow = ["micro-batches of step 2: 3 of 8", "micro-batches of step 2: 6 of 8"]
    assert lines(50) == ["step 1/50", *slow, "step 2/50", "step 3/50", "step 4/50"]
    assert lines(51) == ["step 1/51", *slow, "step 2/51"]


def test_a_handler_of_the_log_without_a_stream_does_not_mind_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log, own = logging.getLogger("qlora_lite"), logging.NullHandler()
    monkeypatch.setattr(log, "handlers", [own])
    with step_progress():
        assert log.handlers == [own]


def test_what_a_bar_says_of_a_run_is_no_command_to_rich_or_to_the_terminal(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with step_progress("loading") as show:
        show.watch("run [/x] \x1b]0;title\x07", 0, 2)
    assert "run [/x] \\x1b]0;title\\x07: 0 of 2" in terminal.getvalue()


def test_a_result_that_cannot_be_printed_is_no_failure_where_a_folder_has_it_too(monkeypatch, capsys):
    from qlora_lite.cli.output import print_result

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            print_result("all")
        print_result("all", "runs/x")
    assert capsys.readouterr().err == "the result cannot be printed (No space left on device); it is in runs/x\n"


@pytest.mark.parametrize("shared", [False, True], ids=["output", "output-and-errors"])
@pytest.mark.parametrize("arguments", [["recipes", "list"], ["recipes", "--help"], ["plan", "--gpus"]])
def test_a_command_whose_reader_has_left_ends_as_sigpipe_would_end_it(arguments, shared):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": writing, "stderr": writing if shared else subprocess.PIPE}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*COMMAND, *arguments], env=buffered, **streams)
    os.close(writing)
    assert (done.returncode, done.stderr or b"") == (128 + signal.SIGPIPE, b"")


def test_a_reader_of_doctor_that_has_left_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "qlora_lite", "doctor"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
