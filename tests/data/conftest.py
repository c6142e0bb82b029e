"""Fixtures of the data tests: a tokenizer and a writer of files."""

import json

import pytest
from tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _trusted_templates(request, monkeypatch):
    """Spare the templates of these tests the second that trying each one out in a process of its own takes."""
    if request.module.__name__ != "test_probe":
        monkeypatch.setattr("qlora_lite.data.chat.template.probe", lambda *_: None)


@pytest.fixture
def write(tmp_path):
    """Write a file (bytes as they are, text as UTF-8, a list as JSONL) and return its path."""

    def write_file(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file
