"""Turn rows of the formats found in the wild into conversations, or into plain documents.

The format is recognised from the keys of a source's first row, and every later row must have it too: guessing
row by row would let a mixed file train on half of each row without a word. Nothing is repaired: a missing
answer, an unknown role or a number where text should be is an error of that row.

| format            | a row                                                                                |
|-------------------|--------------------------------------------------------------------------------------|
| messages          | {"messages": [{"role", "content", "tool_calls"?, "weight"?, "train"?}], "tools"?}    |
| sharegpt          | {"conversations": [{"from", "value"}], "system"?, "tools"?}                          |
| alpaca            | {"instruction", "input"?, "output", "system"?}                                       |
| prompt-completion | {"prompt", "completion", "system"?}, both text, or both lists of turns as in messages |
| chosen            | {prompt, "chosen", "rejected"}: preference rows, of which the chosen answer is learned |
| text              | {"text"}                                                                             |
| table             | any columns; the prompt and completion templates of the source name them             |

content is text or a list of text parts; it may stand beside "from", and "value" beside "role". Tools, calls and
results: see ``tools``; in sharegpt a call is a turn of its own, {"from": "function_call", "value": JSON text}, and a
result {"from": "observation", "value": text}. An answer with "weight" (or "loss_weight") 0 or "train" false is not
learned, nor (unless all tokens are) is one in a prompt that is a list of turns; a turn of another role is not,
whatever it says.
In a preference row, the prompt stands in "prompt", "messages" or "conversation(s)", in "instruction" and "input", or at
the beginning of "chosen"; an answer is text, a turn or a list of turns; a text may also be a whole transcript that
begins with "Human:", as Anthropic's are. What "chosen" does not share with "rejected" is learned. No preference row is
taken for another format, since the answer would be lost: see ``is_preference``. Where answers are compared (PAIRS), a
row becomes two conversations, and a table needs the template of the rejected answer too.
Rows with pictures (but for a model that reads some, see ``picture_turns``), sounds or videos are errors, and so are
placeholders such as <image> in a user's turn: at its beginning or end, alone on a line, or right before a word, and not
closed (</video>), as tags in HTML code are.
Rows with "label" (or "kto_tag") false, as KTO marks bad answers, are left out; a label of another kind has no meaning.
Where answers are judged one by one (LABELS), all rows need one: true or false, 1 or 0.

source: trl documentation, "Dataset formats: unpaired preference"; LLaMA-Factory, data/README.md.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_lite.data import picture_turns
from qlora_lite.data.picture_files import file_of
from qlora_lite.data.readers.data_files import data_suffix
from qlora_lite.data.readers.fields import columns_of, fill
from qlora_lite.data.readers.json_rows import ask_for_columns, ask_for_list
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, ask_for_sign, read_rows
from qlora_lite.errors import DataError

from .conversation import Conversation, Document
from .format_families import (
    ALPACA_COLUMNS,
    ANSWERED_COLUMNS,
    TEXT_COLUMNS,
    TURN_COLUMNS,
    Content,
    alpaca,
    is_alpaca,
    is_answered,
    is_messages,
    is_never,
    is_sharegpt,
    is_text,
    messages,
    prompt_completion,
    sharegpt,
    table,
    text,
)
from .preference_rows import ANSWERED, CHOSEN, chosen_alone, is_preference
from .turns import check_order, check_text_only, kinds_of, refuse_lost_keys

TABLE = "table"
JUDGEMENTS = "label", "kto_tag"
PAIRS, LABELS = "pairs", "labels"  # formats of preferences: two answers that are compared, or one that is judged
_LABELS = {"true": True, "1": True, "false": False, "0": False}
BAD_ANSWER = "marked as a bad answer (label false)"
_ANSWERS = "completion", "response", "output", "answer", "answers", "chosen", "target", "solution", "summary", "label"
_QUESTIONS = "prompt", "question", "instruction", "query", "input", "problem"


@dataclass(frozen=True, slots=True)
class Format:
    """A format of rows.

    Args:
        recognize: whether a row has it, where its source does not say so; of two that do, the first in FORMATS counts.
        normalize: gives the turns of a row and the definitions of its tools; of a document the text.
        columns: those that are looked at; None are those of the source's templates.
        can_be_judged: whether true or false in a column of JUDGEMENTS judges the answer.
    """

    recognize: Callable[[Mapping[str, object]], bool]
    normalize: Callable[[Mapping[str, object], Source], Content]
    columns: frozenset[str] | None
    can_be_judged: bool = False


FORMATS = {
    "messages": Format(is_messages, messages, TURN_COLUMNS, can_be_judged=True),
    "sharegpt": Format(is_sharegpt, sharegpt, TURN_COLUMNS, can_be_judged=True),
    "alpaca": Format(is_alpaca, alpaca, ALPACA_COLUMNS, can_be_judged=True),
    ANSWERED: Format(is_answered, prompt_completion, ANSWERED_COLUMNS, can_be_judged=True),
    # two answers are not recognized: whether one is learned or both, the recipe says (and ``chosen_alone`` rewrites it)
    CHOSEN: Format(is_never, prompt_completion, ANSWERED_COLUMNS),
    "text": Format(is_text, text, TEXT_COLUMNS),
    TABLE: Format(is_never, table, None),
}


def read_conversations(
    source: Source,
    problems: Problems,
    look: Callable[[Mapping[str, object], frozenset[str]], None] | None = None,
    drop: Callable[[str, str], None] | None = None,
    seen: Counter[str] | None = None,
    preference: str | None = None,
) -> Iterator[Conversation | Document]:
    """Read a source and normalise its rows; rows that cannot be used go to ``problems``, bad answers nowhere.

    Args:
        source: where to read and how.
        problems: collects malformed rows, each with its place.
        look: is given each good row, and the columns that its format looks at.
        drop: is given the reason and the place of each row that says of itself that its answer is a bad one.
        seen: counts the kinds of all other rows, see ``kinds_of``.
        preference: PAIRS to give each row's two conversations, that with the chosen answer first; LABELS to keep bad
            answers and say which they are; None for answers to imitate alone.

    Returns:
        An iterator over the good rows, in order.

    Raises:
        DataError: the format is unknown or not recognised, or a file cannot be read.
    """
    format_name, used = check_format(source, preference), None
    for where, row in read_rows(source, problems):
        if format_name is None:
            format_name = recognise(row, where, source, preference)
        if preference == LABELS and format_name == "text":
            raise DataError(
                f"{where}: rows of plain text have no prompt that an answer with a label belongs to; write "
                "prompt, completion and label"
            )
        try:
            rows = _answered_rows(row, format_name, preference)
            row, judged = rows[0], _judgements(rows[0], format_name, preference)
        except DataError as error:
            problems.add(where, _of_another_format(row, format_name, source, preference) or error)
            continue
        if not all(judged.values()) and preference != LABELS:
            if drop is not None:
                drop(BAD_ANSWER, where)
            continue
        kinds = () if format_name in (TABLE, "text") else kinds_of(row)
        if seen is not None:
            seen.update(kinds)
        sources = source, replace(source, completion=source.rejected) if format_name == TABLE else source
        try:
            made = [normalise(each, where, format_name, by) for each, by in zip(rows, sources, strict=False)]
        except DataError as error:
            problems.add(where, _of_another_format(row, format_name, source, preference) or error)
            continue
        if look is not None:
            used = used_columns(format_name, source) if used is None else used
            look(row, used.union(judged, picture_turns.COLUMNS if source.with_pictures else ()))
        for normal in made:
            if preference == LABELS:
                normal = replace(normal, desirable=all(judged.values()))
            yield replace(normal, kinds=kinds) if kinds else normal


def _of_another_format(row: Mapping[str, object], expected: str, source: Source, preference: str | None) -> str | None:
    """Return what to say of a row that is wrong because it is of another format than its source's first row."""
    with suppress(DataError):
        found = expected if source.format or source.prompt else recognise(row, "", source, preference)
        if found != expected and {found, expected} != {"messages", "sharegpt"}:  # which are read alike
            return f"a row of the format {found} in a file of the format {expected}; give it a file of its own"
    return None


def _answered_rows(row: Mapping[str, object], format_name: str, preference: str | None) -> list[Mapping[str, object]]:
    """Return a row with the answer that is learned, and where answers are compared with the rejected one too."""
    if format_name != CHOSEN:
        return [row, row] if preference == PAIRS else [row]
    if preference != PAIRS:
        return [chosen_alone(row)]
    swapped = {**row, CHOSEN: row.get("rejected"), "rejected": row.get(CHOSEN)}
    try:
        return [chosen_alone(row), chosen_alone(swapped)]
    except DataError as error:
        if row.get("rejected"):
            raise
        raise DataError("'rejected' is missing or empty; every row needs it") from error


def _judgements(row: Mapping[str, object], format_name: str, preference: str | None = None) -> dict[str, bool]:
    """Return the columns that say whether the answer of a row is a good one; a text or number there is a class.

    Raises:
        DataError: answers are judged one by one, and this one is not.
    """
    if preference == LABELS:
        found = {name: row[name] for name in JUDGEMENTS if row.get(name) is not None}
        labels = {name: _LABELS.get(str(value).lower()) for name, value in found.items()}
        if not labels or None in labels.values():
            said = ", ".join(f"{name!r} is {value!r}" for name, value in found.items()) or "there is none"
            raise DataError(f"'label' must be true for a good answer and false for a bad one; {said}")
        return labels
    if not FORMATS[format_name].can_be_judged or row.keys().isdisjoint(JUDGEMENTS):
        return {}
    return {name: row[name] for name in JUDGEMENTS if isinstance(row.get(name), bool)}


def check_format(source: Source, preference: str | None = None) -> str | None:
    """Return the format that the source itself decides, or None if its rows must be looked at.

    Args:
        preference: see ``read_conversations``.

    Raises:
        DataError: the format has no such name, or the prompt and completion templates do not fit it.
    """
    templates = [text for text in (source.prompt, source.completion) if text is not None]
    if source.format is not None and source.format not in FORMATS:
        raise DataError(f"{source.path}: {source.format!r} is not a format; choose one of {', '.join(FORMATS)}")
    if len(templates) == 1 or (source.format == TABLE and not templates):
        raise DataError(
            f"{source.path}: a table needs both prompt and completion, for example prompt: '{{question}}' "
            "and completion: '{answer}'"
        )
    if templates and source.format not in (None, TABLE):
        raise DataError(f"{source.path}: prompt and completion belong to format table, not {source.format}")
    if bool(source.rejected) != bool(templates) and (source.rejected or preference == PAIRS):
        has, needs = ("prompt and completion", "rejected") if templates else ("rejected", "prompt and completion")
        raise DataError(f"{source.path}: the template {has} needs {needs} too, of the answer that is compared")
    if preference == PAIRS and source.format not in (None, TABLE, CHOSEN):
        raise DataError(
            f"{source.path}: rows of format {source.format} have one answer, and two are compared; take "
            f"rows with a chosen and a rejected one (format {CHOSEN})"
        )
    return TABLE if templates else source.format


def check_first_row(source: Source, preference: str | None = None) -> str:
    """Read the first row of a source and return its format.

    Args:
        preference: see ``read_conversations``.

    Raises:
        DataError: a file cannot be read, its format is not known, or the row does not fit it.
    """
    where, row = next(read_rows(source, problems := Problems()), ("", {}))
    problems.raise_if_any()
    format_name = check_format(source, preference) or recognise(row, where, source, preference)
    try:
        _judgements(row, format_name, preference)
        for answered in _answered_rows(row, format_name, preference):
            normalise(answered, where, format_name, source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return format_name


def recognise(row: Mapping[str, object], where: str, source: Source, preference: str | None = None) -> str:
    """Name the format of a row from its keys.

    Args:
        row: column to value.
        where: the row's place.
        source: where it comes from.
        preference: see ``read_conversations``.

    Raises:
        DataError: no format has these keys; the message shows how to name the columns.
    """
    if asked := ask_for_columns(row):
        raise DataError(f"{where}: {asked}")
    if preference == PAIRS:
        if {CHOSEN, "rejected"} <= row.keys():
            return CHOSEN
        named = 'prompt: "{...}", completion: "{...}", rejected: "{...}"'
        raise DataError(
            f"{where}: the columns {', '.join(map(repr, row))} name no chosen and rejected answer; say "
            f'which are, as in {source.setting}: [{{path: "{source.path}", {named}}}]'
        )
    if is_preference(row):
        raise DataError(f"{where}: {_fault_of_preference(row, source)}")
    for name, each in FORMATS.items():
        if each.recognize(row):
            return name
    raise DataError(f"{where}: no format has the columns {', '.join(map(repr, row))}; {_cure(row, where, source)}")


def _cure(row: Mapping[str, object], where: str, source: Source) -> str:
    """Say what to do about columns that no format has."""
    columns = list(row)
    file = Path(where.rpartition(":")[0])
    suffix = data_suffix(file)
    if suffix in (".csv", ".tsv"):
        if any(map(_is_sentence, columns)):
            return "is the line that names the columns missing? then write it, such as prompt and completion"
        if asked := ask_for_sign(columns, "\t" if suffix == ".tsv" else ","):
            return asked
    prompt, completion = _likely(row)
    asked = None if prompt and completion else ask_for_list(row, file)
    if asked and sum(isinstance(value, str | int | float) for value in row.values()) < 2:
        return asked
    if len(columns) < 2:
        return "an example needs a prompt and an answer; to train on plain text, rename the column to text"
    how = "" if prompt and completion else " in place of the dots"
    which = f"say which ones to use{how}, as in {_as_table(source, prompt, completion)}"
    return f"{asked}; if not, {which}" if asked else which


def _is_sentence(name: str) -> bool:
    """Return whether the name of a column looks like the content of one."""
    words = name.split()
    return len(words) > 6 or (len(words) > 2 and name.rstrip().endswith((".", "?", "!")))


def _fault_of_preference(row: Mapping[str, object], source: Source) -> str:
    try:
        chosen_alone(row)
    except DataError:
        question, _ = _likely(row)
        cure = (
            f"write {_as_table(source, question, CHOSEN)}" if question else "write the prompt into a column of its own"
        )
    else:
        cure = f'write {source.setting}: [{{path: "{source.path}", format: {CHOSEN}}}]'
    return (
        "a preference row (it has a chosen and a rejected answer): to learn from both, set train.objective to dpo or "
        f"another that compares answers; to learn the chosen answers alone, {cure}"
    )


def _as_table(source: Source, prompt: str | None, completion: str | None) -> str:
    pair = f'prompt: "{{{prompt or "..."}}}", completion: "{{{completion or "..."}}}"'
    return f'{source.setting}: [{{path: "{source.path}", {pair}}}]'


def _likely(row: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return the columns of text or numbers that are named like a question and an answer."""
    columns = [name for name, value in row.items() if type(value) in (str, int, float)]
    answer = next((name for name in columns if name.lower() in _ANSWERS), None)
    question = next((name for name in columns if name != answer and name.lower() in _QUESTIONS), None)
    return question, answer


def answer_beside_text(row: Mapping[str, object], source: Source) -> str | None:
    """Say what to do about a row of plain text with a column that is named like an answer; None if it has none."""
    _, answer = _likely(row)
    if answer is None:
        return None
    return (
        f"the column {answer!r} is not used: rows with a column text are plain text, learned whole; to learn to answer "
        f"with {answer!r}, write {_as_table(source, 'text', answer)}; if the text alone is meant, add format: text"
    )


def used_columns(format_name: str, source: Source) -> frozenset[str]:
    """Return the columns that a format looks at.

    Args:
        format_name: one of FORMATS.
        source: gives the templates of a table.

    Raises:
        DataError: a template is not balanced.
    """
    columns = FORMATS[format_name].columns
    if columns is not None:
        return columns
    return frozenset(columns_of(source.prompt) + columns_of(source.completion) + columns_of(source.rejected or ""))


def normalise(row: Mapping[str, object], where: str, format_name: str, source: Source) -> Conversation | Document:
    """Turn one row into a conversation or a document.

    Args:
        row: column to value.
        where: the row's place.
        format_name: one of FORMATS.
        source: gives the templates of a table.

    Raises:
        DataError: the row does not fit; the message names the field and the cure, without the place.
    """
    shown: list[object] = []
    if source.with_pictures:
        if format_name == TABLE:
            pair = {"prompt": fill(source.prompt, row), "completion": fill(source.completion, row)}
            row, format_name = pair | {name: row[name] for name in picture_turns.COLUMNS if name in row}, ANSWERED
        row, shown = picture_turns.take_out(row)
    if format_name != TABLE:
        refuse_lost_keys(row)
        if is_preference(row):
            raise DataError(_fault_of_preference(row, source))
    content = FORMATS[format_name].normalize(row, source)
    if isinstance(content, str):
        return Document(content, where)
    turns, tools = content
    check_order(turns)
    check_text_only(turns)
    files = tuple(str(file_of(said, where)) for said in shown)
    return Conversation(turns, where, tools, pictures=files)
