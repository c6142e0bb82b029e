"""Hub data sets are fetched by `datasets` and read like Arrow files; without a network the error says so."""

import json

import datasets
import pytest

from qlora_lite.data import hub
from qlora_lite.data.opening import find_files
from qlora_lite.data.read import Source, read_rows
from qlora_lite.errors import DataError

TOOLS = [{"name": "f", "parameters": {"a": {"type": "string"}}}, {"name": "g", "parameters": {"b": {"type": "number"}}}]
ROWS = [{"messages": [{"role": "user", "content": "q"}], "tools": [tool]} for tool in TOOLS]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Let `datasets` build from a file of this disk, and return what it was asked for."""
    load, calls = datasets.load_dataset, []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def load_local(name, config, split):
        calls.append((name, config, split))
        return load("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    hub._fetch.cache_clear()
    yield calls
    hub._fetch.cache_clear()


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name/main", ("owner/name", "main", "train")),
        ("hub:owner/name/main:test", ("owner/name", "main", "test")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
    ],
)
def test_a_hub_data_set_is_read_with_its_nested_objects_as_they_were(asked, path, call):
    rows = list(read_rows(Source(path)))
    assert [row for _, row in rows] == ROWS
    assert asked == [call]
    assert [where for where, _ in rows] == [f"{find_files(path)[0]}:1", f"{find_files(path)[0]}:2"]


@pytest.mark.parametrize("path", ["hub:", "hub:name", "hub:a/b/c/d", "hub:a/b:train[:5]", "hub:a/b:"])
def test_a_path_of_another_form_is_an_error(asked, path):
    with pytest.raises(DataError, match="must be hub:OWNER/NAME"):
        find_files(path)
    assert asked == []


def test_without_a_network_the_error_says_so_and_comes_at_once_the_second_time(monkeypatch):
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    hub._fetch.cache_clear()
    for _ in range(2):
        with pytest.raises(DataError, match=r"the hub cannot be reached \(Couldn't reach .* give files"):
            find_files("hub:owner/name")
    assert len(calls) == 1
    hub._fetch.cache_clear()


def test_a_data_set_that_is_not_there_is_an_error(monkeypatch):
    def fail(*_, **__):
        raise ValueError("Unknown split 'tset'. Should be one of\n['train', 'test']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    hub._fetch.cache_clear()
    with pytest.raises(DataError, match=r"cannot be fetched \(Unknown split 'tset'. .* correct owner"):
        find_files("hub:owner/name:tset")
    hub._fetch.cache_clear()
