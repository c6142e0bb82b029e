"""A template that computes for ever, takes all memory or writes without end is an error, and never hangs a run."""

import os
import subprocess
import sys
import time

import pytest
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.chat import probe as probing
from qlora_lite.data.chat import render as rendering
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.probe import probe
from qlora_lite.data.chat.render import render_prompt, render_turns
from qlora_lite.data.chat.template import NAMED_TEMPLATES, choose_template
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.errors import DataError, ModelError

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 9**(9**8) }}", "more than 1 second of processor time"),
        (LOOPS, "more than 1 second of processor time"),
        ("{{ 'a' * 10**10 }}", "more than 512 MiB of memory"),
        ("{{ 'a'|center(3000000000) }}", "more than 512 MiB of memory"),
        ("{{ 'a' * 10**7 }}", "writes more than 1,000,000 characters"),
    ],
)
def test_a_template_that_takes_too_much_is_an_error_that_names_it(source, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"the chat template \(model\) .*{said}.*; set data\.template to another one"):
        choose_template(tokenizer)
    assert time.monotonic() - started < 30  # about 2 s on a quiet machine


def test_a_file_is_tried_out_as_well(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(LOOPS)
    with pytest.raises(DataError, match=r"t.jinja\) takes more than 1 second"):
        choose_template(tokenizer, str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ bos_token + m.content }}{% generation %}a{% endgeneration %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ ''.__class__.__mro__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_writes_or_refuses_is_no_concern_here(source):
    probe("t", source, {"bos_token": "<s>", "additional_special_tokens": ["<x>"]})


def test_a_template_is_tried_out_once_and_a_named_one_never(monkeypatch):
    calls = []
    render = probing.render_apart
    monkeypatch.setattr(probing, "render_apart", lambda *a, **k: calls.append(a[1]) or render(*a, **k))
    tokenizer = make_tokenizer()
    for name in (None, *NAMED_TEMPLATES):
        choose_template(tokenizer, name)
    assert calls == []
    tokenizer.chat_template = "{{ messages[0].content + 'tried out once' }}"
    for _ in range(2):
        choose_template(tokenizer)
    assert len(calls) == 6  # conversations


def test_a_template_that_cannot_be_tried_out_is_not_used(monkeypatch):
    probing.end_child()
    monkeypatch.setattr(probing, "__name__", "qlora_lite.no_such_module")
    with pytest.raises(DataError, match=r"cannot be tried out \(.*no_such_module"):
        probe("t", "{{ 'never tried out' }}", {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"cannot be tried out \(no reason given\)"):
        probe("t", "{{ 'never tried out either' }}", {})


OF_LENGTH, OF_COUNT = "messages[0].content|length > 10", "messages|length > 5"


@pytest.mark.parametrize(
    ("when", "harm", "said"),
    [
        (OF_COUNT, "9**(9**(messages|length+6))", "takes more than 1 second of processor time"),
        (OF_COUNT, "'a'*(messages|length*10**10)", "takes more than 512 MiB of memory"),
        (OF_LENGTH, "'a'*(messages|length*10**10)", "takes more than 512 MiB of memory"),
        (OF_LENGTH, "('a'*(messages|length*10**7))", "writes more than 1,000,000 characters"),
    ],
)
def test_a_template_that_harms_only_for_later_rows_is_one_error_at_the_first_of_them(when, harm, said, write):
    tokenizer = make_tokenizer()
    loop = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer.chat_template = loop + "{% if " + when + " %}{{ " + harm + " }}{% endif %}"
    talk = [{"role": role, "content": "a word and more"} for role in ("user", "assistant")]
    short = [turn | {"content": "a"} for turn in talk]
    path = write("rows.jsonl", [{"messages": short}, *[{"messages": talk * 3}] * 50])
    started = time.monotonic()
    with pytest.raises(
        ModelError, match=rf"the chat template \(model\) {said} for a conversation of \d turns and"
    ) as caught:
        read_examples([Source(path)], tokenizer)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 60  # two processes are started anew
    template = choose_template(tokenizer)
    with pytest.raises(ModelError, match=said):
        render_prompt(template, [Turn(turn["role"], turn["content"]) for turn in talk * 4][:-1])
    assert render_turns(template, [Turn("user", "a")], False) == "<|im_start|>usera<|im_end|>"  # by another process


def test_what_is_rendered_apart_is_what_transformers_renders(monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"] + "{{ tools|tojson if tools }}{{ messages[-1].content[:3] }}"
    template = choose_template(tokenizer)
    for words in ("plain", "é\u2028 \U0001f600 \"'\\\n", "\x1b\x00"):
        turns = [Turn("user", words), Turn("assistant", words)]
        tools = [{"type": "function", "function": {"name": words, "parameters": {"x": [1, None, 0.5]}}}]
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        for prompt in (False, True):
            expected = tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=prompt)
            assert render_turns(template, turns, prompt, tools) == template.begin + expected


@pytest.mark.parametrize("block", ["", "{% generation %}"])
@pytest.mark.parametrize("letters", [10, rendering._LETTERS_PER_MESSAGE])
def test_rows_that_are_rendered_go_in_few_messages_and_are_as_each_alone(write, monkeypatch, block, letters):
    monkeypatch.setattr(rendering, "_LETTERS_PER_MESSAGE", letters)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content|length == 3 %}"
        "{{ raise_exception('three letters') }}{% endif %}{% if m.role == 'assistant' %}" + block + "{{ m.content + "
        "'<|im_end|>' }}" + block.replace("gen", "endgen") + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = []
    for n in range(60):
        words = ["a", "ab", "abc", "abcd", "a", "ab", "abc", "abcd", "a"][n % 4 :] if n % 4 else ["word"] * 6
        pairs = zip(["user", "assistant"] * (1 + n % 3), words, strict=False)
        rows.append({"messages": [{"role": role, "content": word} for role, word in pairs]})
    path, asked, ask = write("rows.jsonl", rows), [], probing._ask
    monkeypatch.setattr(probing, "_ask", lambda *request: asked.append(request) or ask(*request))

    def read():
        asked.clear()
        data = read_examples([Source(path)], tokenizer)
        made = [(each.token_ids.tolist(), each.is_target.tolist(), each.where) for each in data.examples]
        return made, [str(problem) for problem in data.problems.found], len(asked)

    made, problems, messages = read()
    monkeypatch.setattr(rendering, "render_rows_apart", lambda source, special, rows: [None] * probing._count(rows))
    alone, problems_alone, messages_alone = read()
    assert (made, problems) == (alone, problems_alone) and made and problems
    if letters > 10:  # all good rows in one message, in place of at least two for each
        assert messages <= messages_alone - 2 * len(made) + 1


def test_a_signal_while_a_row_is_rendered_leaves_no_answer_to_be_taken_for_the_next(monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content|upper }}"
    template = choose_template(tokenizer)
    process = probing._child()

    class Interrupted:
        def __init__(self, stream):
            self.stream = stream

        def readline(self):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(process, "stdout", Interrupted(process.stdout))
    with pytest.raises(KeyboardInterrupt):
        render_turns(template, [Turn("user", "first")], False)
    assert process.returncode is not None and process.stdin.closed
    assert render_turns(template, [Turn("user", "second")], False) == "SECOND"


def test_no_module_of_the_folder_at_hand_is_imported(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("open('imported', 'w')\n")
    monkeypatch.chdir(tmp_path)
    probing.end_child()
    probe("t", "{{ 'in a folder from elsewhere' }}", {})
    assert [path.name for path in tmp_path.iterdir()] == ["jinja2.py"]


def test_a_forked_process_ends_and_leaves_the_process_that_renders_to_its_parent():
    render = "probe.render_apart('{{ 1 }}', [], {})"
    code = f"import os, sys\nfrom qlora_lite.data.chat import probe\n{render}\n"
    code += f"if os.fork() == 0: sys.exit()\nos.wait()\n{render}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, start_new_session=True)


@pytest.mark.skipif(os.name != "posix", reason="no limits of address space")
def test_a_limit_of_address_space_is_kept_and_templates_are_tried_out_under_it():
    code = (
        "from qlora_lite.data.chat.probe import probe\n"
        "for source in 'a', \"{{ 'a' * 10**10 }}\": probe('t', source, {})"
    )
    shell = 'ulimit -v 20000000 && exec "$0" -c "$1"'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, code], capture_output=True, text=True)
    assert "more than 512 MiB of memory" in ended.stderr  # of the second, so that the first was rendered
