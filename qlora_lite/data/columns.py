"""Read rows from Parquet and Arrow files.

Both store nested objects as structs with one set of keys per column: an object without a key comes back with a
null there, so the tool schemas of a file all get each other's keys. A null inside an object cannot be told from
an absent key; it is read as absent, which is what the rows had before they were written. (Where a null is meant,
keep the schema as JSON text: a column "tools" of text is parsed.) A null in a list stays, and so does one that
is the value of a whole column.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_lite.errors import DataError

_ROWS_PER_BATCH = 1000
_PLAIN_KINDS = {"Value", "List", "LargeList", "Sequence", "ClassLabel", "Json"}


def read_columns(path: Path, kind: str) -> Iterator[tuple[str, dict]]:
    """Read a Parquet or Arrow file row by row.

    Args:
        path: the file.
        kind: "parquet" or "arrow" (of the file or the stream format).

    Returns:
        An iterator of ("file.parquet:12", row), rows counted from 1.

    Raises:
        DataError: the file is not whole.
    """
    import pyarrow

    try:
        row = 0
        for batch in _record_batches(path, kind):
            batch.validate(full=True)  # Arrow trusts a file's offsets: a damaged one would end this process
            decode = _decoder(batch.schema)
            for values in map(decode, batch.to_pylist()):
                row += 1
                yield f"{path}:{row}", {column: without_absent(value) for column, value in values.items()}
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise DataError(f"{path}: not a whole {kind} file ({reason})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def without_absent(value: object) -> object:
    """Return a value without the keys of nested objects whose value is null."""
    if isinstance(value, dict):
        return {key: without_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_absent(item) for item in value]
    return value


def _decoder(schema) -> Callable[[dict], dict]:
    """Return what turns a stored row into the row; ``datasets`` stores objects of mixed kinds as JSON text.

    Raises:
        DataError: what the file says of its columns is damaged, or has files or addresses opened.
    """
    described = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        kinds = set(_kinds(json.loads(described))) if described else set()
    except (ValueError, RecursionError) as error:
        raise DataError(f"what it says of its columns cannot be read ({str(error)[:200]!r})") from error
    if "Json" not in kinds:
        return dict
    if not kinds <= _PLAIN_KINDS:  # images, sounds and the like are read from paths and addresses that rows name
        raise DataError(f"columns of {', '.join(sorted(kinds - _PLAIN_KINDS))[:200]} are not read; leave them out")
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema).decode_example
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"what it says of its columns cannot be used ({str(error)[:200]!r})") from error


def _kinds(described: object) -> Iterator[str]:
    """Yield the names of all types in a description of columns."""
    if isinstance(described, dict):
        if "_type" in described:
            yield str(described["_type"])
        described = list(described.values())
    for part in described if isinstance(described, list) else ():
        yield from _kinds(part)


def _record_batches(path: Path, kind: str) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_PER_BATCH)
        return
    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)
