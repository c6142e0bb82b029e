"""A template that computes for ever, takes all memory or writes without end is an error, and never hangs a run."""

import subprocess
import sys
import time

import pytest
from tiny_tokenizer import make_tokenizer

from qlora_lite.data import probe as probing
from qlora_lite.data.named_templates import NAMED_TEMPLATES
from qlora_lite.data.probe import probe
from qlora_lite.data.template import choose_template
from qlora_lite.errors import DataError

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
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    tokenizer = make_tokenizer()
    for name in (None, *NAMED_TEMPLATES):
        choose_template(tokenizer, name)
    assert calls == []
    tokenizer.chat_template = "{{ messages[0].content + 'tried out once' }}"
    for _ in range(2):
        choose_template(tokenizer)
    assert len(calls) == 1


def test_a_template_that_cannot_be_tried_out_is_not_used(monkeypatch):
    monkeypatch.setattr(probing, "__name__", "qlora_lite.no_such_module")
    with pytest.raises(DataError, match=r"cannot be tried out \(.*no_such_module"):
        probe("t", "{{ 'never tried out' }}", {})
    monkeypatch.setattr(probing, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(sys, "executable", "/bin/cat")
    with pytest.raises(DataError, match=r"takes more than|cannot be tried out"):
        probe("t", "{{ 'never tried out either' }}", {})
