"""Every row has its place, and every row that is not whole is named."""

import csv
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_lite.data.readers import sources
from qlora_lite.data.readers.data_files import MAX_ROW_BYTES, left_out
from qlora_lite.data.readers.problems import Problems, read_place, write_place
from qlora_lite.data.readers.sources import Source, read_rows, text_files
from qlora_lite.errors import DataError

GOOD = '{"text": "a"}'


def rows_of(path, **settings):
    return list(read_rows(Source(str(path), **settings)))


def compressed(content, suffix):
    return gzip.compress(content) if suffix == ".gz" else pyarrow.compress(content, codec="zstd", asbytes=True)


def failure(path):
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return str(caught.value)


def test_a_jsonl_row_is_named_by_its_line_and_blank_lines_are_skipped(write):
    path = write("a.jsonl", f"{GOOD}\r\n\n  \n{GOOD}")
    assert rows_of(path) == [(f"{path}:1", {"text": "a"}), (f"{path}:4", {"text": "a"})]


def test_a_byte_order_mark_at_the_start_of_a_file_is_accepted(write):
    assert rows_of(write("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode()))[0][1] == {"text": "a"}
    assert rows_of(write("a.json", b"\xef\xbb\xbf[" + GOOD.encode() + b"]"))[0][1] == {"text": "a"}
    assert rows_of(write("a.csv", b"\xef\xbb\xbftext\r\na\r\n"))[0][1] == {"text": "a"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a', "cut short"),
        (b'{"text": ', "cut short"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "not JSON"),
        (b'{"text": "a\x00"}', "NUL"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "caf\xe9"}', "byte 14 of the line is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\\udc00\\ud800"}', "surrogate"),
        (b'[{"text": "a"}]', "a list instead of an object"),
        (b'"a"', "str instead of an object"),
        (b"null", "NoneType instead of an object"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "a", "text": "b"}', "'text' stands twice"),
        (b'{"a": {"k": 1, "k": 1}}', "'k' stands twice"),
        (b'{"text": "a"} {"text": "b"}', "something follows the object"),
        (b"{'text': 'a'}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "' + b"a" * MAX_ROW_BYTES + b'"}', "more than 5,000,000 bytes"),
    ],
)
def test_a_malformed_jsonl_line_is_named_and_its_neighbours_are_read(write, line, said):
    path = write("a.jsonl", GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode() + b"\n")
    problems = Problems()
    good = list(read_rows(Source(path), problems))
    assert [where for where, _ in good] == [f"{path}:1", f"{path}:3"]
    assert problems.count == 1
    assert problems.shown[0].startswith(f"{path}:2: ") and said in problems.shown[0]


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"a\\\\u0000b"', '"\\\\ud800"'])
def test_escapes_that_are_text_are_not_faults(write, text):
    path = write("a.jsonl", f'{{"text": {text}}}')
    assert rows_of(path)[0][1] == {"text": json.loads(text)}


def test_up_to_twenty_problems_are_listed_at_once_and_the_rest_counted(write):
    message = failure(write("a.jsonl", "{\n" * 25 + GOOD))
    assert len(message.splitlines()) == 21
    assert "and 5 more problems" in message


def test_a_json_array_names_each_row_by_its_line(write):
    path = write("a.json", '[\n  {"text": "a"},\n\n  {"text":\n "b"}, {"text": "c"}\n]\n')
    assert [where.rpartition(":")[2] for where, _ in rows_of(path)] == ["2", "4", "5"]


def test_a_json_array_with_several_rows_on_a_line_names_them_by_their_number_too(write):
    path = write("a.json", f"[{GOOD}, {GOOD},\n{GOOD}, {GOOD}]")
    assert [where for where, _ in rows_of(path)] == [f"{path}:{line} (row {row})" for row, line in enumerate("1122", 1)]
    for where, _ in rows_of(path):
        assert write_place(*read_place(where)) == where
    path = write("a.json", f"[{GOOD},\n7, {GOOD}\n]")
    assert failure(path).startswith(f"{path}:2 (row 2): int instead of an object")
    path = write("a.json", f"[{GOOD}, {GOOD}, {{]")
    assert failure(path).startswith(f"{path}:1 (row 3): not JSON")


def test_a_json_file_with_one_object_per_line_is_read_too(write):
    assert len(rows_of(write("a.json", f"{GOOD}\n{GOOD}\n"))) == 2


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (f"[\n{GOOD},\n{GOOD}\n", 4, "cut short"),
        (f"[\n{GOOD},\n{GOOD[:-4]}", 3, "not JSON"),
        (f"[\n{GOOD},\n", 3, "not JSON"),
        (f"[\n{GOOD}\n{GOOD}]", 3, "a comma is missing"),
        (f"[\n{GOOD},\n]", 2, "too many"),
        (f"[\n{GOOD}]\n{GOOD}", 2, "something follows"),
        (f'[\n{GOOD},\n{{"a": 1,\n "a": NaN}}]', 3, "'a' stands twice"),
        (f'[\n{GOOD},\n{{"a": "\\ud800"}}]', 3, "surrogate"),
        (f"[\n{GOOD},\n7]", 3, "int instead of an object"),
        (f"[\n{GOOD},\n" + '{"a":' * 100_000, 3, "nested too deeply"),
    ],
)
def test_a_malformed_json_array_names_the_line(write, text, line, said):
    path = write("a.json", text)
    message = failure(path)
    assert message.startswith(f"{path}:{line}: ") and said in message


def test_json_that_is_not_utf8_names_the_line(write):
    path = write("a.json", b'[\n{"text": "caf\xe9"}]')
    assert failure(path).startswith(f"{path}:2: not UTF-8")


def test_csv_rows_may_span_lines_and_keep_the_line_they_begin_on(write):
    path = write("a.csv", 'q,a\r\n"one\r\nline",1\r\n\r\n"say ""hi""",2\r\n')
    assert rows_of(path) == [
        (f"{path}:2", {"q": "one\nline", "a": "1"}),
        (f"{path}:5", {"q": 'say "hi"', "a": "2"}),
    ]


def test_tsv_is_split_at_tabs(write):
    assert rows_of(write("a.tsv", "q\ta\n1,5\tb\n"))[0][1] == {"q": "1,5", "a": "b"}


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        ("1,2\n1,2,3\n", 3, "3 fields, but the header names 2"),
        ("1\n", 2, "1 fields"),
        ('1,2\n"1,2\n', 3, "not CSV"),
        ('"a"b,2\n', 2, "not CSV"),
        ("1,2\n\0,2\n3\n", 3, "NUL"),
    ],
)
def test_a_malformed_csv_row_is_named(write, body, line, said):
    path = write("a.csv", "q,a\n" + body)
    message = failure(path).splitlines()[0]
    assert message.startswith(f"{path}:{line}: ") and said in message


def read_with_problems(path):
    problems = Problems()
    return [row for _, row in read_rows(Source(path), problems)], problems


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('"q2,a2\n' + "q,a\n" * 1000, r"lines 3 to 1,003 were read as one row"),
        ('"q2,a2\n' + "q,a\n" * 9 + 'q,"a"\n', r"lines 3 to 13 were read as one row"),
        ('"q2,a2\n' + "q,a\n" * 9 + 'q"\n', r"1 fields, but .* lines 3 to 13 were read as one row"),
    ],
)
def test_a_quote_left_open_is_fatal_since_good_rows_are_lost_with_it(write, body, said):
    path = write("a.csv", "q,a\nq1,a1\n" + body)
    rows, problems = read_with_problems(path)
    assert rows == [{"q": "q1", "a": "a1"}] and problems.count == 1
    assert problems.too_many(1000) and re.search(rf"^{path}:3: .*{said}", problems.shown[0])


def test_a_bad_csv_row_of_one_line_is_not_fatal(write):
    rows, problems = read_with_problems(write("a.csv", 'q,a\n"1"x,2\n1\n3,4\n'))
    assert rows == [{"q": "3", "a": "4"}] and problems.count == 2 and not problems.too_many(2)


@pytest.mark.parametrize(
    "lines",
    [(b'"caf\xe9', b'more",2'), (b'"one', b"caf\xe9", b'more",2'), (b'"one', b'caf\xe9",2'), (b'"one', b'caf\0",2')],
)
def test_a_csv_row_with_a_bad_line_in_it_is_left_out_whole_and_named_once(write, lines):
    path = write("a.csv", b"\n".join([b"q,a", *lines, b"good,3", b""]))
    rows, problems = read_with_problems(path)
    bad_line = 2 + next(index for index, line in enumerate(lines) if b"caf" in line)
    assert rows == [{"q": "good", "a": "3"}]
    assert problems.count == 1 and problems.shown[0].startswith(f"{path}:{bad_line}: ") and not problems.fatal


def test_a_csv_line_that_is_too_long_to_be_read_is_fatal_since_its_quotes_are_not_known(write):
    path = write("a.csv", b'q,a\n"' + b"a" * MAX_ROW_BYTES + b'\nrest",2\n')
    _, problems = read_with_problems(path)
    assert problems.fatal and problems.shown[0].startswith(f"{path}:2: a line of more than 5,000,000 bytes")


@pytest.mark.parametrize(
    ("header", "said"), [(b"caf\xe9,a", "not UTF-8"), (b'"q"x,a', "not CSV"), (b'"q,a', "not CSV")]
)
def test_a_csv_header_that_cannot_be_read_is_an_error_and_the_next_row_takes_not_its_place(write, header, said):
    path = write("a.csv", header + b"\n1,2\n3,4\n")
    with pytest.raises(DataError, match=rf"^{path}:1: .*{said}"):
        read_with_problems(path)


def test_a_csv_field_may_be_as_long_as_a_row_and_the_limit_of_the_process_stays(write):
    default, long = 131_072, "a" * 1_000_000
    path = write("a.csv", f"q,a\n{long},1\nb,2\n")
    rows = read_rows(Source(path))
    assert next(rows)[1] == {"q": long, "a": "1"} and csv.field_size_limit() == default
    assert len(list(rows)) == 1


@pytest.mark.parametrize(("header", "said"), [("q,q", "names the column 'q' twice"), (" ,", "must name the columns")])
def test_a_csv_header_must_name_columns_and_each_once(write, header, said):
    assert said in failure(write("a.csv", f"{header}\n1,2\n"))


def test_a_csv_column_without_a_name_is_called_by_its_place(write):
    rows = read_rows(Source(write("a.csv", ",prompt,completion\n0,a,b\n")))
    assert [row for _, row in rows] == [{"column 1": "0", "prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("row", ["x;y", "x, then;y", "x", "x\ty"])
@pytest.mark.parametrize(
    ("name", "header", "asked"),
    [
        ("a.csv", "q;a", "semicolons? then save it with commas, or write sep=; as its first line"),
        ("a.csv", "q\ta", "tabs? then name it .tsv"),
        ("a.tsv", "q,a", "commas? then name it .csv"),
    ],
)
def test_a_header_of_one_column_with_another_sign_in_it_is_an_error_whatever_the_rows_hold(
    write, name, header, asked, row
):
    path = write(name, f"{header}\n{row}\n")
    message = f"{path}:1: the first line names one column, {header!r}; are the columns parted by {asked}"
    assert failure(path) == message


def test_a_header_of_one_column_may_hold_the_sign_that_parts_columns(write):
    assert rows_of(write("a.csv", '"one, text"\nx\n'))[0][1] == {"one, text": "x"}


@pytest.mark.parametrize(
    ("name", "header"), [("a.tsv", "text, cleaned"), ("a.csv", "text; cleaned"), ("a.tsv", "one, two; three")]
)
def test_a_header_of_one_column_may_hold_signs_as_prose_does(write, name, header):
    assert rows_of(write(name, f"{header}\nx\n"))[0][1] == {header: "x"}


def test_a_row_of_another_length_is_asked_for_a_sign_that_parts_the_header_into_more(write):
    message = failure(write("a.csv", "id;prompt;answer, short\n1;a;b\n"))
    assert "1 fields, but the header names 2 columns; are the columns parted by semicolons? then save" in message
    assert "parted" not in failure(write("a.csv", "prompt;x,answer\n1;a;b\n"))


@pytest.mark.parametrize(
    ("name", "first", "sign"),
    [
        ("a.csv", "sep=,", ","),
        ("a.csv", "\ufeffsep=;\r", ";"),
        ("a.csv", "sep=\t", "\t"),
        ("a.tsv", '"sep=|"', "|"),
        ("a.csv", "Sep=;", ";"),
        ("a.csv", "sep=;;", ";"),
        ("a.csv", "SEP=,,,", ","),
        ("a.tsv", "sep=\t\t", "\t"),
    ],
)
def test_a_first_line_that_names_the_sign_between_columns_is_believed(write, name, first, sign):
    path = write(name, f'{first}\nq{sign}a\nx, y{sign}"1{sign}2"\n')
    if sign == ",":
        path = write(name, f'{first}\nq,a\n"x, y","1,2"\n')
    assert rows_of(path) == [(f"{path}:3", {"q": "x, y", "a": f"1{sign}2"})]


def test_only_the_first_line_names_a_sign(write):
    assert rows_of(write("a.csv", "q,a\nsep=;,b\n"))[0][1] == {"q": "sep=;", "a": "b"}
    assert "names one column, 'sep=;'" in failure(write("a.csv", "\nsep=;\nq;a\n"))


def test_a_table_whose_lines_end_as_on_old_macs_is_an_error_that_says_so(write):
    path = write("a.csv", b"q,a\rx,y\rz,w\r")
    assert failure(path).startswith(
        f"{path}:1: the lines end with a carriage return alone, as on old Macs; save it with"
    )
    assert "as on old Macs" in failure(write("a.csv", b'"q",a\r"x",y\r'))
    assert "as on old Macs" in failure(write("a.csv", b"sep=;\rq;a\rx;y\r"))
    assert rows_of(write("a.csv", b'q,a\r\n"x\ry",z\r\n'))[0][1] == {"q": "x\ry", "a": "z"}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
def test_a_file_of_many_megabytes_whose_lines_end_as_on_old_macs_is_asked_for_them(write, name):
    line = GOOD if "json" in name else "x\ty" if name.endswith("tsv") else "x,y"
    message = failure(write(name, f"{line}\r" * (MAX_ROW_BYTES // len(line))))
    assert "more than 5,000,000 bytes; do the lines end with a carriage return alone" in message
    assert message.endswith("; if not, split this row")
    ends = [b"a" * MAX_ROW_BYTES + b"\r", b"a" * (MAX_ROW_BYTES - 1) + b"\r\n"]
    assert [("old Macs" in failure(write(name, end + b"\n"))) for end in ends] == [False, False]


def test_json_rows_of_one_line_whose_lines_end_as_on_old_macs_are_asked_for_them(write):
    assert "do the lines end with a carriage return alone" in failure(write("a.jsonl", f"{GOOD}\r{GOOD}\r"))
    assert "Macs" not in failure(write("a.jsonl", GOOD + GOOD))


def test_a_quoted_name_of_a_column_may_hold_a_carriage_return(write):
    assert rows_of(write("a.csv", b'q,"a\rb"\r\nx,y\r\n'))[0][1] == {"q": "x", "a\rb": "y"}
    assert rows_of(write("a.csv", b'q,"a\r\nb\rc"\nx,y\n'))[0][1] == {"q": "x", "a\nb\rc": "y"}


def test_text_is_split_at_blank_lines_and_named_by_the_first_line(write):
    path = write("a.txt", "\n\none\ntwo\n \n\nthree\n")
    assert rows_of(path) == [(f"{path}:3", {"text": "one\ntwo"}), (f"{path}:7", {"text": "three"})]


def test_text_without_blank_lines_has_one_document_per_line(write):
    path = write("sst2.txt", "1 good\n0 bad\n")
    assert rows_of(path) == [(f"{path}:1", {"text": "1 good"}), (f"{path}:2", {"text": "0 bad"})]
    path = write("sst2.txt", "\n \n1 good\n0 bad\n\n\n")
    assert [where.rpartition(":")[2] for where, _ in rows_of(path)] == ["3", "4"]


@pytest.mark.parametrize(
    ("documents", "rows"),
    [
        ("lines", [(2, "one"), (3, " two"), (6, "three")]),
        ("blank-lines", [(2, "one\n two"), (6, "three")]),
        ("file", [(2, "one\n two\n \n\nthree")]),
    ],
)
def test_a_source_may_say_what_a_document_of_its_text_files_is(write, tmp_path, documents, rows):
    path = write("set/a.txt", "\none\n two\n \n\nthree\n\n")
    assert rows_of(path, documents=documents) == [(f"{path}:{line}", {"text": text}) for line, text in rows]
    other = write("set/b.txt.gz", gzip.compress(b"four\nfive\n\n"))
    texts = ["four", "five"] if documents == "lines" else ["four\nfive"]
    assert [row["text"] for _, row in rows_of(tmp_path / "set", documents=documents)][-len(texts) :] == texts
    assert dict(text_files(Source(str(tmp_path / "set"), documents=documents))) == {
        Path(path): documents,
        Path(other): documents,
    }


def test_what_a_document_is_cannot_be_said_of_rows(write):
    for source, said in (
        (Source(write("a.jsonl", GOOD), documents="file"), "is for files of plain text, not for jsonl; remove it"),
        (Source("mine", rows=[{"text": "a"}], documents="file"), "is for files of plain text; remove it"),
        (Source("hub:a/b", streaming=True, documents="file"), "is for files of plain text; remove it"),
        (Source("a.txt", documents="page"), "documents is 'page'; choose one of lines, blank-lines, file"),
    ):
        with pytest.raises(DataError, match=f"^{source.path}: .*{said}$"):
            list(read_rows(source))
    with pytest.raises(DataError, match="the file has no rows"):
        list(read_rows(Source(write("a.txt", "\n \n"), documents="file")))


def test_parquet_and_arrow_rows_are_named_by_number(tmp_path):
    table = pyarrow.table({"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "s.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "s.arrow", "f.arrow"):
        rows = rows_of(tmp_path / name)
        assert rows[1] == (f"{tmp_path / name}:2", {"messages": [{"role": "user", "content": "b"}]})


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {"enum": ["x", None]}}}}},
]


def test_nested_tool_schemas_come_out_as_they_went_in(write, tmp_path):
    rows = [{"tools": [tool], "id": None} for tool in TOOLS]
    assert [row for _, row in rows_of(write("a.jsonl", rows))] == rows
    assert [row for _, row in rows_of(write("a.json", json.dumps(rows)))] == rows
    table = pyarrow.Table.from_pylist(rows)
    assert None in table.to_pylist()[0]["tools"][0]["function"]["parameters"]["properties"].values()
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert [row for _, row in rows_of(tmp_path / name)] == rows


def test_a_parquet_file_cut_short_is_an_error(tmp_path, write):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    assert "not a whole parquet file" in failure(write("a.parquet", whole[:-20]))
    assert "not a whole arrow file" in failure(write("a.arrow", b"ARROW1rubbish"))


def test_a_damaged_footer_of_a_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    content = bytearray(path.read_bytes())
    content[-int.from_bytes(content[-8:-4], "little") - 8] ^= 0x41
    path.write_bytes(content)
    assert re.fullmatch(r".*a\.parquet: cannot be read \(Couldn't deserialize thrift: .*\)", failure(path))


def test_a_row_too_large_to_hold_is_refused_before_python_copies_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_STORED_ROW_BYTES", 1000)
    monkeypatch.setattr(sources, "_BATCH_BYTES", 100)
    for texts, said in ((["a" * 3000, "b"], "a row, on average, has"), (["b"] * 9 + ["a" * 3000], "row 10 has")):
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none")
        assert f"a.parquet: {said}" in failure(tmp_path / "a.parquet")
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        assert f"row {len(texts) if len(texts) > 2 else 1} has" in failure(tmp_path / "a.arrow")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 90] * 20}), tmp_path / "a.parquet")
    assert [place for place, _ in rows_of(tmp_path / "a.parquet")][-1].endswith("a.parquet:20")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_an_error(write, name, content):
    assert "has no rows" in failure(write(name, content))


def test_a_json_list_without_rows_is_an_error(write):
    assert "has no rows" in failure(write("a.json", "[ ]"))


def test_a_folder_gives_its_data_files_in_order_of_name(write, tmp_path):
    write("set/b.jsonl", '{"text": "b"}')
    write("set/deep/a.jsonl", '{"text": "deep"}')
    write("set/a.ndjson", '{"text": "a"}')
    write("set/README", "no data")
    assert [row["text"] for _, row in rows_of(tmp_path / "set")] == ["a", "b", "deep"]
    assert [row["text"] for _, row in rows_of(tmp_path / "set" / "*.jsonl")] == ["b"]


def test_a_folder_without_data_and_a_missing_file_are_errors(write, tmp_path):
    write("set/notes", "x")
    write("set/README.md", "x")
    write("set/.hidden.jsonl", GOOD)
    assert "no data file in this folder" in failure(tmp_path / "set")
    assert "no such file" in failure(tmp_path / "nothing.jsonl")
    assert "no such file" in failure(tmp_path / "nothing*.jsonl")


def test_what_a_folder_holds_besides_its_data_is_not_read_and_listed(write, tmp_path):
    write("set/b.jsonl", GOOD)
    for name in ("README.md", "card.md.gz", "notes", "a.xml", "deep/rows"):
        write(f"set/{name}", f"{GOOD}\n")
    for name in ("set/.hidden.xml", "other/c.jsonl"):
        write(name, GOOD)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    assert [where for where, _ in rows_of(tmp_path / "set")] == [f"{tmp_path}/set/b.jsonl:1"]
    found = [str(path.relative_to(tmp_path / "set")) for path in left_out(str(tmp_path / "set"))]
    assert found == ["README.md", "a.xml", "card.md.gz", "deep/rows", "link", "notes"]
    assert left_out(str(tmp_path / "set" / "*")) == left_out(str(tmp_path / "set" / "b.jsonl")) == []


def test_a_folder_of_md_files_alone_gives_them_without_its_readme(write, tmp_path):
    (tmp_path / "set" / "old.md").mkdir(parents=True)
    for name in ("b.md", "deep/a.md.gz", "README.md", "deep/readme-first.md", "notes.rst"):
        write(f"set/{name}", gzip.compress(b"in a") if name.endswith(".gz") else f"in {name}")
    assert [row["text"] for _, row in rows_of(tmp_path / "set")] == ["in b.md", "in a"]
    found = [str(path.relative_to(tmp_path / "set")) for path in left_out(str(tmp_path / "set"))]
    assert found == ["README.md", "deep/readme-first.md", "notes.rst"]
    write("set/deep/c.text", "in c")
    assert [row["text"] for _, row in rows_of(tmp_path / "set")] == ["in c"] and len(
        left_out(str(tmp_path / "set"))
    ) == 5


@pytest.mark.parametrize("data", ["a.jsonl", "README.jsonl", "readme.txt.jsonl", "a.txt", "a.md", "licensed.text"])
def test_what_is_written_about_a_folder_of_data_is_none_of_it(write, tmp_path, data):
    about = ["CHANGELOG.md", "LICENSE.md", "README.TXT", "contributing.Text", "licence-of-data.txt", "readme.md.gz"]
    for name in about:
        write(f"set/deep/{name}", "about")
    assert "no data file in this folder" in failure(tmp_path / "set")
    write(f"set/{data}", GOOD)
    assert [where for where, _ in rows_of(tmp_path / "set")] == [f"{tmp_path}/set/{data}:1"]
    assert [path.name for path in left_out(str(tmp_path / "set"))] == about
    assert [row for _, row in rows_of(tmp_path / "set" / "deep" / "README.TXT")] == [{"text": "about"}]


def test_files_of_several_kinds_are_not_one_source(write, tmp_path):
    for name in ("a.jsonl", "deep/b.jsonl.gz", "notes.txt"):
        write(f"set/{name}", GOOD)
    assert failure(tmp_path / "set").startswith(f"{tmp_path}/set: files of several kinds (2 jsonl, 1 text); name those")
    assert "several kinds (1 jsonl, 1 text)" in failure(tmp_path / "set" / "*.*")


def test_a_folder_with_the_files_of_several_splits_is_not_one_source(write, tmp_path):
    row = json.dumps({"text": "a"})
    for name in ("data/train-00000-of-00001.jsonl", "data/Test-00000-of-00001.jsonl"):
        write(f"set/{name}", row)
    message = failure(tmp_path / "set")
    assert message.startswith(
        f"{tmp_path}/set: files of several splits (test, train); name those to read, each by itself"
    )
    assert message.endswith(f"such as {tmp_path}/set/data/train-00000-of-00001.jsonl")
    assert len(rows_of(tmp_path / "set" / "**" / "*train*")) == 1
    assert len(rows_of(tmp_path / "set" / "**" / "*.jsonl")) == 2
    for name in ("train/0.jsonl", "train/1.jsonl", "test/0.jsonl"):
        write(f"folders/{name}", row)
    message = failure(tmp_path / "folders")
    assert message.endswith(f"such as {tmp_path}/folders/train") and len(rows_of(tmp_path / "folders" / "train")) == 2
    for name in ("training-1.jsonl", "contest.jsonl", "train-a.jsonl", "train-b.jsonl"):
        write(f"other/{name}", row)
    assert len(rows_of(tmp_path / "other")) == 4


def test_a_saved_data_set_is_read_without_what_describes_it_and_what_was_made_of_it(tmp_path):
    from datasets import Dataset, DatasetDict, load_from_disk

    saved = Dataset.from_list([{"text": str(number)} for number in range(5)])
    splits = DatasetDict({"train": saved, "test": saved.select([3, 1])})
    splits.save_to_disk(tmp_path / "set", num_shards={"train": 2, "test": 1})
    assert "several splits (test, train)" in failure(tmp_path / "set")
    load_from_disk(tmp_path / "set" / "train").map(lambda row: {"text": row["text"] * 2})
    (made,) = (tmp_path / "set" / "train").glob("cache-*.arrow")
    for name, texts in (("train", "01234"), ("test", "31")):
        assert [row["text"] for _, row in rows_of(tmp_path / "set" / name)] == list(texts)
    assert [path.name for path in left_out(str(made.parent))] == [made.name, "dataset_info.json", "state.json"]
    (tmp_path / "set" / "train").rename(tmp_path / "set" / "rows")
    shutil.rmtree(tmp_path / "set" / "test")
    assert len(rows_of(tmp_path / "set")) == 5


def test_files_of_these_names_are_rows_where_no_saved_data_set_is(write, tmp_path):
    for name in ("state.json", "dataset_dict.json"):
        write(f"set/{name}", GOOD)
    assert len(rows_of(tmp_path / "set")) == 2


@pytest.mark.parametrize("name", ["rows", "rows.jsonlines", "rows.xml", "rows.train.gz"])
def test_a_name_that_does_not_say_what_is_in_it_is_an_error_unless_the_format_is_text(write, name):
    content = f"{GOOD}\n".encode()
    path = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    message = failure(path)
    assert message.startswith(f"{path}: the name does not say what is in it; name it like rows.jsonl")
    assert ".ndjson" in message and "format: text" in message
    assert rows_of(path, format="text") == [(f"{path}:1", {"text": GOOD})]
    assert len(rows_of(write("rows.jsonl", GOOD), format="text")[0][1]["text"]) == 1  # a known name is still believed


def test_a_fifo_and_a_symlink_loop_are_errors_and_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "not an ordinary file" in failure(tmp_path / "pipe.jsonl")
    assert "leads nowhere" in failure(tmp_path / "loop.jsonl")
    for pattern in (tmp_path, tmp_path / "*.jsonl"):
        assert "leads nowhere" in failure(pattern)
    (tmp_path / "loop.jsonl").unlink()
    for pattern in (tmp_path, tmp_path / "*.jsonl"):
        assert "not an ordinary file" in failure(pattern)


def test_a_file_that_links_give_two_names_is_an_error_and_not_read_twice(write, tmp_path):
    write("set/a.jsonl", GOOD)
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "set" / "a.jsonl")
    assert "b.jsonl: the same file as" in failure(tmp_path / "set")
    (tmp_path / "set" / "b.jsonl").unlink()
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")  # which is not followed: it lies in it
    assert len(rows_of(tmp_path / "set" / "**" / "*.jsonl")) == 1
    (tmp_path / "set" / "again").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jsonl").symlink_to(tmp_path / "set" / "a.jsonl")
    assert "the same file as" in failure(tmp_path / "set" / "**" / "*.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\x1f\x8b\x08", "the content is gzip; rename it to a.jsonl.gz"),
        ("a.csv", b"\x28\xb5\x2f\xfd", "the content is zstd; rename it to a.csv.zst"),
        ("a.jsonl", b"PAR1", "the content is Parquet; rename it to a.parquet"),
        ("a.parquet", b"ARROW1", "the content is Arrow; rename it to a.arrow"),
        ("a.parquet", b"\x1f\x8b\x08", "the content is gzip"),
        ("a.jsonl", b"\xff\xfe{\x00", "the content is UTF-16; unpack it or convert it"),
        ("a.txt", b"BZh9", "the content is bzip2; unpack it"),
        ("a.jsonl.gz", GOOD.encode(), "the name says gzip, the content does not; rename it to a.jsonl"),
        ("a.jsonl.zst", b"\x1f\x8b\x08", "the name says zstd, the content does not"),
        (
            "a.gz",
            gzip.compress(GOOD.encode(), mtime=0),
            "the name does not say what is in it; name it like rows.jsonl.gz",
        ),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "parquet files are compressed inside; unpack this one first"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_an_error_with_the_cure(write, name, content, said):
    path = write(name, content)
    message = failure(path)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f"{GOOD}\n\n{GOOD}"),
        ("a.json", f"[\n{GOOD},\n{GOOD}]"),
        ("a.csv", 'text\n"a\nb"\nc\n'),
        ("a.tsv", "text\tn\na\t1\n"),
        ("a.txt", "one\ntwo\n\nthree\n"),
    ],
)
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_has_the_rows_and_lines_of_the_plain_one(write, name, content, suffix):
    plain = rows_of(write(name, content))
    path = write(name + suffix, compressed(content.encode(), suffix))
    assert [(where.replace(suffix, ""), row) for where, row in rows_of(path)] == plain
    broken = write(name + suffix, compressed(content.encode(), suffix)[:-6])
    assert failure(broken) == f"{broken}: cannot be read (Truncated compressed stream)"
    empty = write(name + suffix, compressed(b"", suffix))
    assert failure(empty) == f"{empty}: the file has no rows"


def test_a_gzip_of_several_parts_is_read_whole_and_rubbish_behind_it_is_an_error(write):
    part = gzip.compress(f"{GOOD}\n".encode())
    assert len(rows_of(write("a.jsonl.gz", part + part))) == 2
    assert "cannot be read (zlib inflate failed" in failure(write("a.jsonl.gz", part + b"rubbish"))


def test_a_folder_gives_its_compressed_files_too(write, tmp_path):
    write("set/b.jsonl.gz", gzip.compress(b'{"text": "b"}'))
    write("set/a.jsonl.zst", compressed(b'{"text": "a"}', ".zst"))
    write("set/model.bin.gz", gzip.compress(b"no data"))
    assert [row["text"] for _, row in rows_of(tmp_path / "set")] == ["a", "b"]


def test_a_file_without_permission_is_an_error(write, monkeypatch):
    path = write("a.jsonl", GOOD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert failure(path) == f"{path}: cannot be read (Permission denied)"
