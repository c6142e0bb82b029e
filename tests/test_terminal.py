"""Nothing that a row, a model or an adapter says is a command to the terminal, or to who reads log.txt there."""

import ast
import io
import json
import logging
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import byte_tokenizer, save_tiny, write_recipe
from tiny_heads import head_recipe, save_headless
from tiny_runs import make_run

from qlora_lite.cli import output
from qlora_lite.terminal import printable

CLI = Path(output.__file__).parent
CONTROLS = [*range(9), *range(11, 32), *range(0x7F, 0xA0)]
MARKS = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
HARMFUL = "".join(map(chr, [*CONTROLS, *MARKS]))
TITLE = "\x1b]0;pwn\x07\x1b[31mX\x9b31m\x08\u202e"  # a window title, a colour, both kinds of CSI, and letters turned
SHOWN = r"\x1b]0;pwn\x07\x1b[31mX\x9b31m\x08\u202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def is_harmless(text: str) -> bool:
    return not set(text) & set(HARMFUL)


def test_every_letter_that_a_terminal_obeys_is_shown_as_an_escape_and_no_other_is_changed():
    assert len(printable(HARMFUL).split("\\")) == len(HARMFUL) + 1 and is_harmless(printable(HARMFUL))
    assert printable(TITLE) == SHOWN and printable(SHOWN) == SHOWN
    kept = "line\n\ttab é שלום नमस्ते 👩\u200d🔬 \u00a0\u2003\ufffd"
    assert printable(kept) == kept


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    save_tiny(folder / "model")
    return make_run(folder / "work", folder / "model")


@pytest.fixture
def recipe(run, tmp_path):
    """Return a function that writes a recipe whose training rows are those given."""

    def write(rows, **sections):
        path = write_recipe(tmp_path, run.parent.parent / "model", **sections)
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_data_shows_rows_columns_notes_and_errors(recipe, command):
    talk = [{"role": "user", "content": TITLE}, {"role": "assistant", "content": HARMFUL[1:]}]  # no row may hold a NUL
    path = recipe([{"messages": talk, TITLE: 1}, GOOD, {"messages": [{"role": TITLE, "content": "x"}]}])
    code, out, err = command("data", path, "data.eval=null", "train.metrics_examples=0", "data.max_tokens=500")
    assert code == 2 and out.count(SHOWN) == 2 and SHOWN in err and is_harmless(out + err)
    code, out, _ = command("data", path, "data.eval=null", "train.metrics_examples=0", "data.max_tokens=500", "--json")
    assert code == 2 and TITLE in "".join(piece["text"] for piece in json.loads(out)["rows"][0]["pieces"])


def test_data_keeps_its_own_colours_on_a_terminal(recipe, command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    command("data", recipe([GOOD, {"messages": [{"role": "user", "content": TITLE}, GOOD["messages"][1]]}]))
    shown = terminal.getvalue()
    assert "\x1b[32m" in shown and SHOWN in shown and "\x1b]" not in shown and "\x1b[31m" not in shown


def test_data_leaves_out_the_middle_of_a_long_row_on_a_terminal_alone(recipe, command, monkeypatch):
    talk = [{"role": "user", "content": "begin " + "x" * 5_000}, {"role": "assistant", "content": "y" * 5_000 + " end"}]
    arguments = "data", recipe([{"messages": talk}, GOOD]), "data.max_tokens=20000"
    code, out, _ = command(*arguments)
    assert code == 0 and "x" * 5_000 in out and "y" * 5_000 in out
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    command(*arguments)
    shown = terminal.getvalue()
    assert "begin x" in shown and " end" in shown and "letters, shown in a pipe" in shown
    assert 800 < shown.count("x") + shown.count("y") < 1_200


def test_data_shows_what_a_template_raises_and_how_a_special_token_is_called(recipe, run, tmp_path, command):
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('" + TITLE + "') }}")
    code, out, err = command("data", recipe([GOOD]), f"data.template={tmp_path / 'bad.jinja'}")
    assert code == 2 and SHOWN in err and is_harmless(out + err)
    model = shutil.copytree(run.parent.parent / "model", tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TITLE]})
    tokenizer.save_pretrained(model)
    ended = "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}" + TITLE + "{% endif %}{% endfor %}"
    (tmp_path / "own.jinja").write_text(ended)
    path = recipe([GOOD], data={"template": str(tmp_path / "own.jinja"), "eval": None})
    code, out, err = command("data", path, f"model.path={model}", "train.metrics_examples=0")
    assert f"special token    {SHOWN} 1 times, 1 targets" in out and is_harmless(out + err), (code, out, err)


def test_an_adapter_s_tensor_names_are_shown(run, tmp_path, command):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {TITLE: torch.zeros(1)}, adapter / "adapter_model.safetensors")
    for name in ("generate", "merge"):
        options = ("--prompt", "a") if name == "generate" else ("--rows", 0, "--out", tmp_path / "out")
        code, out, err = command(name, adapter, *options)
        assert code == 2 and SHOWN in err and is_harmless(out + err), name


def test_an_answer_is_filtered_on_a_terminal_and_byte_exact_in_a_pipe(run, command, monkeypatch):
    arguments = ("--temperature", 2, "--max-new-tokens", 120)
    torch.manual_seed(0)
    code, raw, err = command("generate", run, "--prompt", "a", *arguments)
    assert code == 0 and not is_harmless(raw) and is_harmless(err)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    torch.manual_seed(0)
    command("generate", run, "--prompt", "a", *arguments)
    assert terminal.getvalue() == printable(raw)


def test_chat_filters_on_a_terminal_what_it_answers_and_what_it_refuses(run, command, monkeypatch):
    said = {}
    for kind, stream in (("pipe", io.StringIO()), ("terminal", Terminal())):
        torch.manual_seed(0)
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/use " + TITLE + "\n\n"))
        monkeypatch.setattr(sys, "stdout", stream)
        _, _, err = command("chat", run, "--temperature", 2, "--max-new-tokens", 120)
        said[kind] = stream.getvalue()
        assert SHOWN in err and is_harmless(err)
    assert not is_harmless(said["pipe"]) and said["terminal"] == printable(said["pipe"])


def test_compare_and_train_show_rows_answers_and_columns_and_log_them(recipe, run, tmp_path, command):
    talk = [{"role": "user", "content": TITLE}, {"role": "assistant", "content": TITLE}]
    path = recipe([{"messages": talk, TITLE: 1}] * 4, train={"max_steps": 1})
    (tmp_path / "eval.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": TITLE + "?"}, talk[1]]}))
    code, out, err = command("train", path)
    assert code == 0 and SHOWN in out and SHOWN in err and is_harmless(out + err)
    logged = (tmp_path / "out" / "log.txt").read_text()
    assert "columns not used: " + SHOWN in logged and is_harmless(logged)
    code, out, err = command("compare", tmp_path / "out", "--rows", 1)
    assert code == 0 and out.count(r"\x1b]0;pwn") >= 2 and is_harmless(out + err)


EVIL = TITLE + "\x1b[2J<script>alert(1)</script>\"'&"  # in rows, columns, labels, tokens and answers


@pytest.fixture
def hostile(tmp_path):
    """Write models, rows and recipes of a language model and of a head, hostile in all that they may hold."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"  # a recipe's text may hold no control characters
    folder.mkdir()
    save_tiny(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [EVIL + "token"]})
    tokenizer.save_pretrained(folder / "model")
    recipe = write_recipe(folder, folder / "model", data={"max_tokens": 600}, train={"max_steps": 1})
    for name in ("train", "eval"):
        talks = [
            [{"role": "user", "content": f"{n}{name}{EVIL}"}, {"role": "assistant", "content": f"{EVIL}{n}"}]
            for n in range(6)
        ]
        rows = ({"messages": talk, EVIL: 1} for talk in talks)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [[{"sentence": f"{n}{part}{EVIL}", "label": f"{EVIL}{n % 2}"} for n in range(8)] for part in ("t", "e")]
    data = {"max_tokens": 300}
    head_recipe(
        folder / "head",
        save_headless(folder / "bert", "bert"),
        "classification",
        *labelled,
        data=data,
        train={"max_steps": 1},
    )
    (folder / "sweep.yaml").write_text(json.dumps({"recipe": str(recipe), "axes": {"lora.rank": [2, 4]}}))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": EVIL}) + "\n")
    return folder


COMMANDS = """
data recipe.yaml --html data.html | data head/recipe.yaml --html data2.html | plan recipe.yaml --html plan.html
plan model | train recipe.yaml | train recipe.yaml --resume | train head/recipe.yaml | evaluate out
evaluate out --side-by-side | evaluate head/out | generate out --prompts prompts.jsonl --out answers.jsonl
compare out --base --out compare | report out | report head/out | merge out --out merged
export out --to peft --out peft | push out a/b --dry-run --base-model c/d | quantize model --out quantized
predict head/out --rows head/eval.jsonl --out labels.jsonl | damage recipe.yaml --rows 2 --out damage.html
profile recipe.yaml --steps 1 --out profile | sweep sweep.yaml --plan | sweep sweep.yaml --out sweep
recipes check recipe.yaml | recipes check recipe.yaml --full
"""
REFUSED = """
explain EVIL | recipes copy EVIL | recipes convert recipe.yaml | chat head/out | serve head/out | plan EVIL
generate head/out --prompt x | merge head/out --out no | train recipe.yaml data.train=EVIL | train EVIL | EVIL
train recipe.yaml EVIL=1 | train recipe.yaml model.path=EVIL | train recipe.yaml lora.targets=EVIL | sweep EVIL
train recipe.yaml data.template=EVIL | plan recipe.yaml --gpu EVIL | compare EVIL | push out EVIL --dry-run
train recipe.yaml --EVIL | chat EVIL | evaluate out --tasks EVIL | evaluate out data.eval=EVIL | report EVIL
"""


class _Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.slow
def test_no_command_prints_or_writes_to_a_page_what_a_terminal_or_a_browser_obeys(
    hostile, command, monkeypatch, capsys
):
    monkeypatch.chdir(hostile)
    capsys.readouterr()  # of the libraries that wrote the models
    for text, is_refused in ((COMMANDS, False), (REFUSED, True)):
        for line in text.strip().replace(" | ", "\n").splitlines():
            code, out, err = command(*(part.replace("EVIL", EVIL) for part in line.split()))
            assert is_harmless(out + err) and "Traceback" not in err, line
            assert (code != 0) == is_refused, (line, err)
    pages = [*hostile.rglob("*.html")]
    assert {page.name for page in pages} >= {"data.html", "report.html", "compare.html", "memory.html", "sweep.html"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        tags = _Tags(text).found
        assert is_harmless(text) and "<script>alert" not in text, page
        assert not any(name.startswith("on") for _, names in tags for name in names), page
        assert not any(tag in ("img", "a", "link", "iframe") for tag, _ in tags), page
    assert all(is_harmless(log.read_text(encoding="utf-8")) for log in hostile.rglob("log.txt"))


def test_arguments_and_traces_are_shown_too(tmp_path, command):
    (file := tmp_path / TITLE).touch()
    for name in (file.name, file):  # no such folder, and no folder
        for arguments in (["train", "r.yaml", "--resume", name], ["--debug", "train", "r.yaml", "--resume", name]):
            code, out, err = command(*arguments)
            assert code == 2 and r"\x9b31m\x08\u202e" in err and is_harmless(out + err), arguments


def test_what_transformers_logs_is_shown_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    output.prepare()
    handlers = logging.getLogger("transformers").handlers
    record = logging.LogRecord("transformers", logging.ERROR, "", 0, TITLE, (), None)
    assert handlers and all(handler.format(record) == SHOWN for handler in handlers) and not terminal.getvalue()


def prints_in(source: str) -> list[str]:
    """Return what a file prints by other ways than those of ``output``."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [ast.unparse(function) for function in calls]
    return [name for name in names if name == "print" or name.endswith((".echo", ".secho", ".write", ".print_exc"))]


def test_no_command_prints_by_another_way():
    found = {path.name: prints_in(path.read_text()) for path in CLI.glob("*.py") if path.name != "output.py"}
    assert {name: said for name, said in found.items() if said} == {}
    assert prints_in("click.echo(x); print(x); sys.stderr.write(x); traceback.print_exc()")
