"""Hub data sets are fetched by `datasets` and read like Arrow files; without a network the error says so."""

import json
from types import SimpleNamespace

import datasets
import pytest
from tiny_files import byte_tokenizer
from tiny_trainer import examples

from qlora_lite.data.readers import hub
from qlora_lite.data.readers.data_files import find_files
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.storage import stored
from qlora_lite.errors import DataError
from qlora_lite.recipe.schema import Recipe
from qlora_lite.runs.resume import data_identity

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


@pytest.fixture
def streamed(monkeypatch, write):
    """Let `datasets` stream from files of this disk, and return what it was asked for."""
    load, calls = datasets.load_dataset, []

    def load_local(name, config, split, streaming=False):
        calls.append((name, config, split, streaming))
        return load("json", data_files=write("hub/rows.jsonl", ROWS), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return calls


def test_a_streamed_hub_data_set_gives_the_same_rows_and_is_not_downloaded(streamed, monkeypatch):
    monkeypatch.setattr(hub, "hub_files", None)
    rows = list(read_rows(Source("hub:owner/name/main:test", streaming=True)))
    assert rows == [(f"hub:owner/name/main:test:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert streamed == [("owner/name", "main", "test", True)]


def test_a_streamed_hub_data_set_is_opened_when_its_first_row_is_asked_for(streamed):
    rows = read_rows(Source("hub:owner/name", streaming=True))
    assert streamed == []
    assert next(rows)[0] == "hub:owner/name:1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Server Disconnected"), r"hub:a/b: the hub cannot be reached \(Server Disconnected\)"),
        (FileNotFoundError("no\nsuch file"), r"hub:a/b: cannot be fetched \(no such file\); correct owner"),
        (datasets.exceptions.DatasetsError("gated"), r"hub:a/b: cannot be fetched \(gated\)"),
    ],
)
def test_a_stream_that_breaks_off_says_so(monkeypatch, error, said):
    def rows():
        yield ROWS[0]
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    rows_read = read_rows(Source("hub:a/b", streaming=True))
    assert next(rows_read) == ("hub:a/b:1", ROWS[0])
    with pytest.raises(DataError, match=said):
        next(rows_read)


def test_a_stream_of_no_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([]))
    with pytest.raises(DataError, match="hub:a/b: the file has no rows"):
        list(read_rows(Source("hub:a/b", streaming=True)))


def test_keys_that_arrow_filled_with_nulls_are_taken_out_of_a_stream_too(monkeypatch):
    stored = {"text": None, "tools": [{"name": "f", "parameters": {"a": {"type": "string"}, "b": None}}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([stored]))
    ((_, row),) = read_rows(Source("hub:a/b", streaming=True))
    assert row == {"text": None, "tools": [{"name": "f", "parameters": {"a": {"type": "string"}}}]}


def test_a_run_of_a_stream_is_recognised_without_a_download(streamed, monkeypatch, write):
    monkeypatch.setattr(hub, "hub_files", None)
    rows = SimpleNamespace(examples=stored(examples(2)))

    def identity(*paths):
        sources = [{"path": path} for path in paths]
        data = {"train": sources, "streaming": True, "order": "as-is"}
        recipe = Recipe(model={"path": "m"}, data=data, train={"max_steps": 1})
        return data_identity(recipe, byte_tokenizer(), rows, None)["training rows"]

    local = [str(write(f"{name}/rows.jsonl", ROWS[:count])) for name, count in (("one", 1), ("two", 2))]
    assert len({identity("hub:owner/name", *files) for files in ((), local[:1], local[1:])}) == 3
    assert streamed == []
