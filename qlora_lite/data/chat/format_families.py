"""How rows of each format are recognized, and what turns and tools they hold."""

from collections.abc import Mapping

from qlora_lite.data.readers.fields import fill, text_of
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError

from .conversation import Turn
from .preference_rows import join_instruction
from .tools import check_calls, tool_definitions
from .turns import has_lists, read_turns

Row = Mapping[str, object]
Content = tuple[tuple[Turn, ...], tuple[dict, ...]] | str  # turns and definitions of tools, or the text of a document
TURN_COLUMNS = frozenset({"messages", "conversations", "system", "tools"})
ALPACA_COLUMNS = frozenset({"instruction", "input", "output", "system", "tools"})
ANSWERED_COLUMNS = frozenset({"prompt", "completion", "system", "tools"})
TEXT_COLUMNS = frozenset({"text"})


def is_messages(row: Row) -> bool:
    """Return whether a row is a list of turns."""
    if isinstance(row.get("messages"), list):
        return True
    return isinstance(row.get("conversations"), list) and not is_sharegpt(row)


def is_sharegpt(row: Row) -> bool:
    """Return whether a row is a list of turns that name the speaker "from"."""
    turns = row.get("conversations")
    return isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)


def is_alpaca(row: Row) -> bool:
    """Return whether a row has an instruction and an output."""
    return row.keys() >= {"instruction", "output"}


def is_answered(row: Row) -> bool:
    """Return whether a row has a prompt and a completion."""
    return row.keys() >= {"prompt", "completion"}


def is_text(row: Row) -> bool:
    """Return whether a row has plain text."""
    return "text" in row


def is_never(row: Row) -> bool:
    """Return False: a source says of its rows that they have the format."""
    return False


def messages(row: Row, source: Source) -> Content:
    """Return the turns and tools of a row in the format messages."""
    return _lists(row, "messages")


def sharegpt(row: Row, source: Source) -> Content:
    """Return the turns and tools of a row in the format sharegpt."""
    return _lists(row, "sharegpt")


def alpaca(row: Row, source: Source) -> Content:
    """Return the turns of a row in the format alpaca."""
    _refuse_tools(row)
    return _pair(join_instruction(row), text_of(row, "output"), row.get("system")), ()


def prompt_completion(row: Row, source: Source) -> Content:
    """Return the turns and tools of a row of prompt and completion: two texts, or two lists of turns."""
    if has_lists(row):
        return _lists(row, "prompt-completion")
    _refuse_tools(row)
    return _pair(text_of(row, "prompt"), text_of(row, "completion"), row.get("system")), ()


def text(row: Row, source: Source) -> Content:
    """Return the text of a row."""
    return text_of(row, "text")


def table(row: Row, source: Source) -> Content:
    """Return the turns that the source's templates make of a row."""
    return _pair(fill(source.prompt, row), fill(source.completion, row), None), ()


def _lists(row: Row, format_name: str) -> Content:
    turns, tools = read_turns(row, format_name), tool_definitions(row.get("tools"))
    check_calls(turns, tools)
    return turns, tools


def _refuse_tools(row: Row) -> None:
    if tool_definitions(row.get("tools")):
        raise DataError("'tools' is not supported in rows of this format; write them in format messages")


def _pair(prompt: str, answer: str, system: object) -> tuple[Turn, ...]:
    turns = Turn("user", prompt), Turn("assistant", answer)
    return turns if system in (None, "") else (Turn("system", text_of({"system": system}, "system")), *turns)
