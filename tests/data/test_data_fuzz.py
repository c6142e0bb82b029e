"""Whatever a data file of any format holds, its rows are read, or named as bad, or the file is refused."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hostile import TIMES, clean, fuzz, spoiled, spoiled_bytes

from qlora_lite.data.chat.row_formats import read_conversations
from qlora_lite.data.readers import sources
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": 'a, "b"'},
    {"role": "assistant", "content": "c"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ROWS = {  # a good row of each format
    "messages": {"messages": TURNS, "tools": TOOLS},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "b", "output": "c"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a\n\nb"},
}
LINES = "".join(json.dumps({"prompt": f"{n}é", "completion": "b"}) + "\n" for n in range(3)).encode()
TABLE = b'prompt,completion\n"a, ""b""",c\nd,"e\nf"\n'


def columns(write):
    """Return the bytes that pyarrow writes of a small table with nested columns."""
    table = pyarrow.table({"messages": [TURNS, TURNS[1:]], "n": [1, None]})
    features = {
        "messages": [{"role": {"dtype": "string", "_type": "Value"}, "content": {"dtype": "string", "_type": "Value"}}],
        "n": {"dtype": "int64", "_type": "Value"},
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pyarrow.BufferOutputStream()
    write(table, sink)
    return sink.getvalue().to_pybytes()


def write_stream(table, sink):
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_file(table, sink):
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "rows.jsonl": LINES,
    "rows.json": b"[" + LINES.strip().replace(b"\n", b",") + b"]",
    "rows.csv": TABLE,
    "rows.tsv": TABLE.replace(b",", b"\t"),
    "rows.txt": "one\n\ntwo é\nthree\n".encode(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.csv.zst": pyarrow.compress(TABLE, codec="zstd", asbytes=True),
    "rows.parquet": columns(pyarrow.parquet.write_table),
    "file.arrow": columns(write_file),
    "stream.arrow": columns(write_stream),
}


def outcome(path) -> str:
    """Read a file; return "" where every row is good, else what is said."""
    problems = Problems()

    def read():
        for row in read_conversations(Source(str(path)), problems):
            assert row.where
        problems.raise_if_any()

    return clean(read)


@pytest.mark.parametrize(
    "kind",
    [
        '{"_type": "Image"}',
        '{"\\u005ftype": "Image"}',
        '{"x": [{"_type": ["Image"]}]}',
        '{"_type": "Value"',
    ],
)
def test_columns_whose_values_would_be_read_from_paths_are_refused(tmp_path, kind):
    table = pyarrow.table({"prompt": ['"a"'], "completion": [json.dumps("/etc/hostname")]})
    features = '{"prompt": {"a": {"_type": "Json"}, "b": KIND}}'.replace("KIND", kind)
    table = table.replace_schema_metadata({"huggingface": '{"info": {"features": ' + features + "}}"})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    said = outcome(tmp_path / "rows.parquet")
    assert "are not read; leave them out" in said or "what it says of its columns cannot be read" in said


def test_a_column_of_paths_beside_one_of_json_is_not_opened(tmp_path):
    table = pyarrow.table({"prompt": ['"a"'], "completion": ["/etc/hostname"]})
    features = {"prompt": {"_type": "Json"}, "completion": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = sources.read_rows(Source(str(tmp_path / "rows.parquet")))
    assert row == {"prompt": "a", "completion": "/etc/hostname"}


def test_a_file_that_asks_for_more_memory_than_there_is_is_an_error(tmp_path, monkeypatch):
    def run_out(*_):
        raise MemoryError

    (tmp_path / "rows.arrow").write_bytes(FILES["file.arrow"])
    monkeypatch.setattr(sources, "_record_batches", run_out)
    assert "not a whole arrow file (MemoryError)" in outcome(tmp_path / "rows.arrow")


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_good_before_they_are_spoiled(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert outcome(tmp_path / name) == ""


@TIMES
@pytest.mark.parametrize("name", FILES)
def test_a_data_file_may_hold_anything(tmp_path, name, times):
    path = tmp_path / name

    def check(content):
        path.write_bytes(content)
        return outcome(path)

    fuzz("data file", spoiled_bytes(FILES[name]), 60 * times, check)


@TIMES
@pytest.mark.parametrize("row_format", ROWS)
def test_a_row_of_any_format_may_hold_anything(tmp_path, row_format, times):
    path = tmp_path / "rows.jsonl"

    def check(row):
        path.write_bytes(json.dumps(row).encode("utf-8", "surrogatepass") + b"\n")
        return outcome(path)

    assert check(ROWS[row_format]) == ""
    fuzz("row of data", spoiled(ROWS[row_format]), 120 * times, check)
