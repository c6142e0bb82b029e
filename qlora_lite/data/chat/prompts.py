"""Read rows of any format as prompts, whose answer may be missing."""

from collections.abc import Mapping, Sequence

from qlora_lite.data import picture_turns
from qlora_lite.data.readers.fields import columns_of, fill, text_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.errors import DataError

from .conversation import ROLES, Prompt, Turn
from .preference_rows import ANSWERED, CHOSEN, chosen_alone, is_preference
from .row_formats import normalise

_PROMPT_COLUMNS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "prompt-completion": "prompt",
    "alpaca": "instruction",
    "text": "text",
}


def read_prompts(source: Source, known: Sequence[Source] = ()) -> list[Prompt]:
    """Read a source as prompts: rows of any format, whose answer may be missing.

    Args:
        source: where to read; of a table, ``prompt`` names the columns.
        known: sources of a recipe, whose templates are used for rows that have their columns.

    Raises:
        DataError: a file cannot be read, has no prompts, or rows are malformed.
    """
    problems, prompts, chosen = Problems(), [], None
    for where, row in read_rows(source, problems):
        chosen = chosen or _format_of_prompts(row, where, source, known)
        try:
            prompts.append(_prompt(row, where, *chosen))
        except DataError as error:
            problems.add(where, error)
    problems.raise_if_any()
    return prompts


def _format_of_prompts(row: Mapping[str, object], where: str, source: Source, known: Sequence[Source]):
    """Return the format of a row whose answer may be missing, and the source that has its templates."""
    for each in (source, *known):
        if each.prompt and (each is source or row.keys() >= set(columns_of(each.prompt))):
            return "table", each
    for name, column in _PROMPT_COLUMNS.items():
        if column in row:
            return name, source
    columns = ", ".join(map(repr, row))
    raise DataError(f"{where}: none of the columns {columns} is known for a prompt; name it with --column")


def _prompt(row: Mapping[str, object], where: str, format_name: str, source: Source) -> Prompt:
    """Turn one row into a prompt; an answer that is missing is put there so that the row is checked as all are."""
    if format_name == "text":
        return Prompt((Turn("user", text_of(row, "text")),), None, where)
    if format_name == "table":
        has_answer = bool(source.completion) and row.keys() >= set(columns_of(source.completion))
        reference = fill(source.completion, row) if has_answer else None
        if not source.with_pictures:
            return Prompt((Turn("user", fill(source.prompt, row)),), reference, where)
        shown = {name: row[name] for name in picture_turns.COLUMNS if name in row}
        row, format_name = {"prompt": fill(source.prompt, row), "completion": reference} | shown, ANSWERED
    if is_preference(row):
        row, format_name = chosen_alone(row), CHOSEN
    row, has_answer = _answered(row, format_name)
    conversation = normalise(row, where, format_name, source)
    *turns, answer = conversation.turns
    reference = (answer.content or None) if has_answer else None
    return Prompt(tuple(turns), reference, where, conversation.tools, conversation.pictures)


def _answered(row: Mapping[str, object], format_name: str) -> tuple[Mapping[str, object], bool]:
    """Return a row with an answer, and whether it is the row's own."""
    nothing = {"role": "assistant", "content": "-"}
    if format_name in ("messages", "sharegpt"):
        key = _PROMPT_COLUMNS[format_name]
        turns = row.get(key)
        last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
        if not last or ROLES.get(str(last.get("role", last.get("from")))) == "assistant":
            return row, True
        return {**row, key: [*turns, nothing]}, False
    answer = "output" if format_name == "alpaca" else "completion"
    if row.get(answer):
        return row, True
    return {**row, answer: [nothing] if isinstance(row.get("prompt"), list) else "-"}, False
