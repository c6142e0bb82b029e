"""A Modelfile's template gives the tokens that training saw, or there is no Modelfile."""

import random
import re

import pytest
from gguf import GGUFReader
from tiny_files import MERGES, byte_tokenizer, save_tiny
from tiny_runs import make_run, tiny_run
from transformers import AutoTokenizer

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import NAMED_TEMPLATES, choose_template
from qlora_lite.errors import ModelError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.ext.gguf.go_template import render_go
from qlora_lite.ext.gguf.ollama import CONVERSATIONS, check_template, go_template, modelfile, pieces_of

# As models ship them: a default system message, turns checked and trimmed, a system message inside the user's turn.
SHIPPED = {
    "default system": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "system refused": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{{ '<start>' + message['role'] + '\n' + message['content'] | trim "
        "+ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start>model\n'}}{% endif %}"
    ),
}


def written(template_name, tmp_path, source=None):
    """Return Go template, Jinja template, tokenizer, and whether a system message is taken."""
    tokenizer = byte_tokenizer()
    if source:
        (tmp_path / "t.jinja").write_text(source)
    template = choose_template(tokenizer, str(tmp_path / "t.jinja") if source else template_name)
    pieces = pieces_of(template)
    return go_template(pieces), template, tokenizer, pieces.before_system is not None


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_give_the_same_tokens_in_go(name, tmp_path):
    go, template, tokenizer, takes_system = written(name, tmp_path)
    assert takes_system
    assert check_template(go, template, tokenizer, takes_system, False) == CONVERSATIONS


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_as_models_ship_them_give_the_same_tokens_in_go(name, tmp_path):
    go, template, tokenizer, takes_system = written(None, tmp_path, SHIPPED[name])
    assert takes_system == (name == "default system")
    assert check_template(go, template, tokenizer, takes_system, False) == CONVERSATIONS


def test_a_begin_of_text_that_llama_cpp_adds_is_left_out_of_the_template(tmp_path):
    _, template, tokenizer, _ = written(None, tmp_path, SHIPPED["system refused"])
    go = go_template(pieces_of(template).without_begin("<s>"))
    assert "<s>" not in go
    assert check_template(go, template, tokenizer, False, adds_begin=True) == CONVERSATIONS
    with pytest.raises(ModelError):
        check_template(go, template, tokenizer, False, adds_begin=False)


DIFFERENT = {
    "turns change when others follow": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last or m.role == 'user' "
        "else m.content[:3]) + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    ),
    "upper case": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content|replace('price', 'PRICE') + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "counts turns": (
        "{% for m in messages %}{{ loop.index|string + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "no Modelfile text": (
        "{% for m in messages %}{{ '{{' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_template_that_does_more_is_refused_with_the_difference(name, tmp_path):
    with pytest.raises(ModelError, match=r"cannot be written for Ollama|a Modelfile cannot hold"):
        go, template, tokenizer, takes_system = written(None, tmp_path, DIFFERENT[name])
        check_template(go, template, tokenizer, takes_system, False)


def test_the_exported_folder_prompts_with_the_tokens_of_training(tmp_path):
    run = tiny_run(tmp_path, merges=MERGES)
    report = export_run(run, tmp_path / "out", ExportSettings("ollama"))
    assert report["conversations_compared"] == CONVERSATIONS and report["distance"] < 0.01
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and (tmp_path / "out" / "model.gguf").exists()
    go = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == ["</s>", "<|im_end|>"]
    turns = [Turn("system", "Be brief."), Turn("user", "3?"), Turn("assistant", "three"), Turn("user", "4?")]
    expected = render_prompt(choose_template(byte_tokenizer(), str(run / "template.jinja")), turns)
    assert render_go(go, "Be brief.", [{"Role": t.role, "Content": t.content} for t in turns]) == expected


def test_a_run_with_tools_is_exported_with_a_note_that_ollama_gets_none(tmp_path):
    save_tiny(tmp_path / "model", merges=MERGES)
    run = make_run(tmp_path, tmp_path / "model", template="chatml-tools", data={"template": "chatml-tools"})
    run = run.rename(run.with_name("\N{HIRAGANA LETTER A}"))
    report = export_run(run, tmp_path / "out", ExportSettings("ollama"))
    assert report["conversations_compared"] == CONVERSATIONS
    assert report["use"].startswith("ollama create model -f "), "Ollama takes no such name"
    assert any("writes no tools, tool calls or results" in note for note in report["notes"])


def test_a_begin_token_that_only_begins_a_turn_stays_in_the_template(tmp_path):
    """SmolLM's begin-of-text is <|im_start|>, which its tokenizer does not put before a text."""
    run = tiny_run(tmp_path, merges=MERGES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "model")
    export_run(run, tmp_path / "out", ExportSettings("ollama"))
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert "{{ else }}<|im_start|>user" in (tmp_path / "out" / "Modelfile").read_text()


def test_a_system_message_that_all_training_rows_share_is_the_modelfile_s(tmp_path):
    run = tiny_run(tmp_path, merges=MERGES)
    rows = (
        '{"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n'
    )
    for systems, expected in ((("Be brief.",) * 3, ['SYSTEM """Be brief."""']), (("Be brief.", "Be long."), [])):
        (tmp_path / "train.jsonl").write_text("".join(rows % system for system in systems))
        report = export_run(run, tmp_path / str(len(systems)), ExportSettings("ollama"))
        assert any("the SYSTEM line is" in note for note in report["notes"]) == bool(expected)
        lines = (tmp_path / str(len(systems)) / "Modelfile").read_text().splitlines()
        assert [line for line in lines if line.startswith("SYSTEM")] == expected


def test_a_run_whose_training_rows_are_gone_is_exported_without_a_system_message(tmp_path):
    run = tiny_run(tmp_path, merges=MERGES)
    (tmp_path / "train.jsonl").unlink()
    (note,) = export_run(run, tmp_path / "out", ExportSettings("ollama"))["notes"]
    assert note.startswith("no SYSTEM line: the training data") and str(tmp_path / "train.jsonl") in note
    assert "SYSTEM" not in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("go", "expected"),
    [
        ("a{{ .System }}b", "aSb"),
        ("{{ if .System }}1{{ else }}2{{ end }}", "1"),
        (
            '{{ range .Messages }}{{ if eq .Role "user" }}U{{ .Content }}{{ else if eq .Role "assistant" }}A{{ else }}-'
            "{{ end }}{{ end }}!",
            "-UqA!",
        ),
        ("{{ range .Messages }}{{ if .Content }}{{ .Content }},{{ end }}{{ end }}", "S,q,q,"),
    ],
)
def test_go_templates_are_rendered_as_go_does(go, expected):
    messages = [
        {"Role": role, "Content": content} for role, content in (("system", "S"), ("user", "q"), ("assistant", "q"))
    ]
    assert render_go(go, "S", messages) == expected


@pytest.mark.parametrize(
    "go",
    [
        "{{ .Tools }}",
        "{{ if .System }}x",
        "{{ end }}",
        "{{ len .Messages }}",
        "{{ $x := 1 }}",
        "a {{- .System }}",
        "{{ .System -}} b",
        '{{ "quoted" }}',
        "{{{ .System }}",
        "{{ range .System.Content }}x{{ end }}",
        "{{ template }}",
    ],
)
def test_what_is_not_read_of_go_is_an_error(go):
    with pytest.raises(ModelError):
        render_go(go, "S", [])


def test_a_modelfile_cannot_be_left_through_its_quotes():
    with pytest.raises(ModelError, match="cannot hold"):
        modelfile("t", [], 'a"""\nFROM evil')
    with pytest.raises(ModelError, match="cannot be written into a Modelfile"):
        modelfile("t", ['"'], None)
    draw = random.Random(1)
    assert modelfile("t", ["</s>"], "".join(draw.choices("ab\n", k=20)) or None).count('"""') == 4
