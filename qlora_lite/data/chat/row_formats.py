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

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from qlora_lite.data import picture_turns
from qlora_lite.data.picture_files import file_of
from qlora_lite.data.readers.data_files import data_suffix
from qlora_lite.data.readers.fields import columns_of, fill, kind_of, text_of
from qlora_lite.data.readers.json_rows import ask_for_columns, ask_for_list
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, ask_for_sign, read_rows
from qlora_lite.errors import DataError

from .tools import check_calls, tool_calls, tool_definitions

CHOSEN, ANSWERED = "chosen", "prompt-completion"
FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", CHOSEN, "text", "table")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
}
ROW_DAY = datetime(2024, 7, 26)  # of rows that templates date (``render``): what Llama 3.1's writes without a clock
_NOT_SUPPORTED = {
    "functions": "write it as 'tools'",
    "function_call": "write it as 'tool_calls'",
    "reasoning_content": "remove it",
    "thinking": "remove it",
    "history": 'write all turns of the row as one list, {"messages": [...]}',
}
_MEDIA = "image", "images", "video", "videos", "audio", "audios"
_REFUSED = *_MEDIA, *_NOT_SUPPORTED
_TEXT_ONLY = (
    "a model of text reads no pictures, sounds or videos; remove such rows, or train a vision-language model on "
    "pictures (task.kind image-text-to-text)"
)
MEDIA = "picture, sound or video"
_PLACEHOLDER = (
    r"(?:<(?:image|video|audio)>|<\|(?:vision_start|(?:image|video|audio)(?:_pad|_[0-9]+)?)\|>|<image_soft_token>|"
    r"<start_of_image>|<image_placeholder>|<ImageHere>|<IMG_CONTEXT>|\[IMG\])"
)
_PLACEHOLDERS = re.compile(_PLACEHOLDER)
_PLACED = re.compile(  # at the turn's beginning or end, alone on a line, or right before a word
    rf"\A\s*{_PLACEHOLDER}|{_PLACEHOLDER}(?:\s*\Z|(?=\w))|^[ \t]*{_PLACEHOLDER}+[ \t]*$", re.MULTILINE
)
_NEEDED = {"alpaca": {"instruction", "output"}, "prompt-completion": {"prompt", "completion"}, "text": {"text"}}
JUDGEMENTS = "label", "kto_tag"
PAIRS, LABELS = "pairs", "labels"  # what a preference is told by
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
BAD_ANSWER = "marked as a bad answer (label false)"
WITH_TURNS = "messages", "conversations", "prompt", "completion"
_OF_TURNS = {"messages", "conversations", "system", "tools"}
_TAKEN = {
    "messages": _OF_TURNS,
    "sharegpt": _OF_TURNS,
    "alpaca": {"input", "system", "tools"},
    "prompt-completion": {"system", "tools"},
}
_PROMPT_COLUMNS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "prompt-completion": "prompt",
    "alpaca": "instruction",
    "text": "text",
}
_ANSWERS = "completion", "response", "output", "answer", "answers", "chosen", "target", "solution", "summary", "label"
_QUESTIONS = "prompt", "question", "instruction", "query", "input", "problem"
_PROMPTS = "messages", "conversations", "conversation", "prompt"  # of preference rows
_AFTER = {"user": ("assistant",), "assistant": ("user",), "tool": ("tool", "assistant")}


@dataclass(frozen=True, slots=True)
class Turn:
    """Hold one message.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: its text; empty only where there are calls.
        learned: False where the row gives this turn the weight 0, or says train: false, and of answers in a prompt.
        calls: the tool calls of an assistant turn, as ``tools.tool_calls`` makes them.
        call_id: of a tool turn, the call that it answers, if the row says so.
        name: of a tool turn, the tool, if the row says so.
        left_out: of an assistant turn, whether the row says that it is not learned (weight 0, train: false); then it is
            not, even where all tokens are.
    """

    role: str
    content: str
    learned: bool = True
    calls: tuple[dict, ...] = ()
    call_id: str | None = None
    name: str | None = None
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Hold a row as turns: at most one system turn, then user and assistant alternating, an answer last.

    An assistant turn with calls is followed by one tool turn per call and the next assistant turn, or is the last.

    Args:
        turns: the messages.
        where: the row's place.
        tools: definitions of the tools, as ``tools.tool_definitions`` makes them.
        kinds: see ``kinds_of``.
        desirable: whether its answer is one to imitate.
        pictures: the files of those that ``picture_turns.MARK`` stands for in the turns, in order.
    """

    turns: tuple[Turn, ...]
    where: str
    tools: tuple[dict, ...] = ()
    kinds: tuple[str, ...] = ()
    desirable: bool = True
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Hold a row of plain text, all of it to be learned."""

    text: str
    where: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Hold a row that is to be answered.

    Args:
        turns: what the model is given, the assistant's turn not begun.
        reference: the answer that the row has; None where it has none.
        where: the row's place.
        tools, pictures: see ``Conversation``.
    """

    turns: tuple[Turn, ...]
    reference: str | None
    where: str
    tools: tuple[dict, ...] = ()
    pictures: tuple[str, ...] = ()


def as_message(turn: Turn) -> dict[str, object]:
    """Return a turn as the object that chat templates take."""
    more = {"tool_calls": list(turn.calls), "tool_call_id": turn.call_id, "name": turn.name}
    return {"role": turn.role, "content": turn.content} | {key: value for key, value in more.items() if value}


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
        kinds = () if format_name in ("table", "text") else kinds_of(row)
        if seen is not None:
            seen.update(kinds)
        sources = source, replace(source, completion=source.rejected) if format_name == "table" else source
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


def kinds_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return what sets a row apart, good or not, in words that follow "rows"."""
    turns = [turn for name in WITH_TURNS if isinstance(row.get(name), list) for turn in row[name]]
    roles = [_role_of(turn) for turn in turns]
    calls = any(
        isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("from") == "function_call") for turn in turns
    )
    return tuple(
        kind
        for kind, is_so in (
            ("with tool calls or results", calls or "tool" in roles),
            ("with definitions of tools", row.get("tools") not in (None, "", "[]", [])),
            ("with a system turn", row.get("system") not in (None, "") or "system" in roles),
            ("with several user turns", roles.count("user") > 1),
        )
        if is_so
    )


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
    if format_name not in _TAKEN or row.keys().isdisjoint(JUDGEMENTS):
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
    if len(templates) == 1 or (source.format == "table" and not templates):
        raise DataError(
            f"{source.path}: a table needs both prompt and completion, for example prompt: '{{question}}' "
            "and completion: '{answer}'"
        )
    if templates and source.format not in (None, "table"):
        raise DataError(f"{source.path}: prompt and completion belong to format table, not {source.format}")
    if bool(source.rejected) != bool(templates) and (source.rejected or preference == PAIRS):
        has, needs = ("prompt and completion", "rejected") if templates else ("rejected", "prompt and completion")
        raise DataError(f"{source.path}: the template {has} needs {needs} too, of the answer that is compared")
    if preference == PAIRS and source.format not in (None, "table", CHOSEN):
        raise DataError(
            f"{source.path}: rows of format {source.format} have one answer, and two are compared; take "
            f"rows with a chosen and a rejected one (format {CHOSEN})"
        )
    return "table" if templates else source.format


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
    if isinstance(row.get("messages"), list):
        return "messages"
    turns = row.get("conversations")
    if isinstance(turns, list):
        return "sharegpt" if any(isinstance(turn, dict) and "from" in turn for turn in turns) else "messages"
    for name, needed in _NEEDED.items():
        if needed <= row.keys():
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


def is_preference(row: Mapping[str, object]) -> bool:
    """Return whether a row is a prompt with a chosen and a rejected answer, and not a whole conversation beside
    them."""
    if not {"chosen", "rejected"} <= row.keys():
        return False
    turns = next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), [])
    return not (turns and _role_of(turns[-1]) == "assistant")


def chosen_alone(row: Mapping[str, object]) -> dict[str, object]:
    """Return a preference row as a row of prompt and completion, the chosen answer; other columns stay as they are.

    Raises:
        DataError: it has no chosen answer, or no prompt.
    """
    prompt = next((row[name] for name in _PROMPTS if row.get(name)), None)
    if prompt is None and row.get("instruction"):
        prompt = _instruction(row)
    chosen, rejected = ([turns] if isinstance(turns, dict) else turns for turns in map(row.get, ("chosen", "rejected")))
    if prompt is None:
        chosen, rejected = map(_of_transcript, (chosen, rejected))
    if not chosen:
        raise DataError("'chosen' is missing or empty; every row needs it")
    if isinstance(chosen, list) and _role_of(chosen[0]) != "assistant":
        other = rejected if isinstance(rejected, list) else chosen
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], other, strict=False)))
        prompt, chosen = chosen[:shared], chosen[shared:]
    elif prompt is None:
        raise DataError("a preference row without a prompt; write it into a column of its own")
    elif isinstance(chosen, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(chosen, str):
        chosen = [{"role": "assistant", "content": chosen}]
    taken = {CHOSEN, "rejected", "instruction", "input", *_PROMPTS}
    return {name: value for name, value in row.items() if name not in taken} | {"prompt": prompt, "completion": chosen}


def _of_transcript(text: object) -> object:
    """Return the turns of a text that begins with "Human:" on a paragraph of its own; others as they are."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return text
    _, *parts = _TRANSCRIPT.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns]


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


def _role_of(turn: object) -> str | None:
    named = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(named) if isinstance(named, str) else None


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
    if format_name == "table":
        return frozenset(columns_of(source.prompt) + columns_of(source.completion) + columns_of(source.rejected or ""))
    format_name = "prompt-completion" if format_name == CHOSEN else format_name
    return frozenset(_NEEDED.get(format_name, set()) | _TAKEN.get(format_name, set()))


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
    if format_name == CHOSEN:  # and rewritten by ``chosen_alone``
        format_name = "prompt-completion"
    shown: list[object] = []
    if source.with_pictures:
        if format_name == "table":
            pair = {"prompt": fill(source.prompt, row), "completion": fill(source.completion, row)}
            row, format_name = pair | {name: row[name] for name in picture_turns.COLUMNS if name in row}, ANSWERED
        row, shown = picture_turns.take_out(row)
    if format_name != "table":
        _refuse(row)
        if is_preference(row):
            raise DataError(_fault_of_preference(row, source))
    tools = ()
    if format_name == "text":
        return Document(text_of(row, "text"), where)
    if format_name == "table":
        pair = fill(source.prompt, row), fill(source.completion, row)
        turns = _pair(*pair, None)
    elif format_name in ("messages", "sharegpt") or _has_lists(row, format_name):
        turns, tools = _turns(row, format_name), tool_definitions(row.get("tools"))
        check_calls(turns, tools)
    else:
        if tool_definitions(row.get("tools")):
            raise DataError("'tools' is not supported in rows of this format; write them in format messages")
        turns = _pair_of(row, format_name)
    _check_order(turns)
    _check_text_only(turns)
    files = tuple(str(file_of(said, where)) for said in shown)
    return Conversation(turns, where, tools, pictures=files)


def _pair_of(row: Mapping[str, object], format_name: str) -> tuple[Turn, ...]:
    if format_name == "alpaca":
        return _pair(_instruction(row), text_of(row, "output"), row.get("system"))
    return _pair(text_of(row, "prompt"), text_of(row, "completion"), row.get("system"))


def _instruction(row: Mapping[str, object]) -> str:
    context = row.get("input")
    is_blank = context is None or (isinstance(context, str) and not context.strip())
    return text_of(row, "instruction") + ("" if is_blank else f"\n\n{text_of(row, 'input')}")


def _has_lists(row: Mapping[str, object], format_name: str) -> bool:
    """Return whether prompt and completion are lists of turns."""
    return format_name == "prompt-completion" and all(
        isinstance(row.get(key), list) for key in ("prompt", "completion")
    )


def _refuse(holder: Mapping[str, object]) -> None:
    """Check that a row or turn holds nothing that would be lost."""
    if holder.keys().isdisjoint(_REFUSED):
        return
    for key in _REFUSED:
        if holder.get(key) and key in _MEDIA:
            raise DataError(f"{key!r} is not supported: {_TEXT_ONLY}", MEDIA)
        if holder.get(key):
            raise DataError(f"{key!r} is not supported in rows of this format; {_NOT_SUPPORTED[key]}")


def _check_text_only(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns, start=1):
        if turn.role != "user" or not _PLACEHOLDERS.search(turn.content):
            continue
        for placed in _PLACED.finditer(turn.content):
            written = _PLACEHOLDERS.search(placed[0])[0]
            if f"{written[0]}/{written[1:]}" not in turn.content:
                cure = "or write it in backticks where it is meant as text"
                raise DataError(f"turn {number} holds the placeholder {written!r}: {_TEXT_ONLY}, {cure}", MEDIA)


def _pair(prompt: str, answer: str, system: object) -> tuple[Turn, ...]:
    turns = Turn("user", prompt), Turn("assistant", answer)
    return turns if system in (None, "") else (Turn("system", text_of({"system": system}, "system")), *turns)


def _turns(row: Mapping[str, object], format_name: str) -> tuple[Turn, ...]:
    has_lists = _has_lists(row, format_name)
    prompt = row["prompt"] if has_lists else []
    messages = [*prompt, *row["completion"]] if has_lists else row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise DataError(f"no list of turns, as format {format_name} needs; are two formats mixed in this source?")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    asked = turns[: len(prompt)]
    turns[: len(prompt)] = [replace(turn, learned=False) if turn.role == "assistant" else turn for turn in asked]
    if row.get("system"):
        turns.insert(0, Turn("system", text_of(row, "system")))
    return tuple(turns)


def _turn(message: object, number: int) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f'turn {number} is {kind_of(message)}, not an object with "role" and "content"')
    _refuse(message)
    if message.keys().isdisjoint(("role", "from")):
        keys = ", ".join(map(repr, message)) or "none"
        raise DataError(
            f"turn {number} does not say whose it is (its keys: {keys}); write it as "
            '{"role": "user", "content": ...}',
            "unknown role",
        )
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    if content_key not in message:
        content_key = next((key for key in ("content", "value") if key in message), content_key)
    named = message.get(role_key)
    if not isinstance(named, str) or named not in ROLES:
        known = f"the roles are {', '.join(ROLES)}"
        raise DataError(f"turn {number} has the unknown role {named!r}; {known}", "unknown role")
    role = ROLES[named]
    content = message.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    try:
        if named == "function_call":
            calls, content = tool_calls(text_of({content_key: content}, content_key)), ""
        else:
            calls = tool_calls(message.get("tool_calls"))
        if calls and role != "assistant":
            raise DataError("only the assistant can call tools; remove 'tool_calls'")
        if role == "system" and isinstance(content, str) and not content.strip():
            # not left out here: templates with a system text of their own write it where there is no such turn
            raise DataError(f"{content_key!r} is empty; fill it in, or remove the turn (not the row)")
        text = "" if calls and content in (None, "") else text_of({content_key: content}, content_key)
    except DataError as error:
        raise DataError(f"turn {number} ({named}): {error}") from None
    learned = _learned(message, number)
    if role != "tool":
        return Turn(role, text, learned, calls, left_out=role == "assistant" and not learned)
    call_id, name = (value if isinstance(value := message.get(key), str) else None for key in ("tool_call_id", "name"))
    return Turn(role, text, learned, (), call_id, name)


def _part(part: object, number: int) -> str:
    text = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        if isinstance(part, dict) and any(name in str(part.get("type")) for name in ("image", "video", "audio")):
            raise DataError(f"turn {number} has a part of type {part['type']!r}: {_TEXT_ONLY}", MEDIA)
        raise DataError(f'turn {number} has a part that is not {{"type": "text", "text": "..."}}; only text can train')
    return text


def _learned(message: Mapping[str, object], number: int) -> bool:
    """Return whether nothing in a turn says that it is not to be learned."""
    is_target = True
    for key in ("weight", "loss_weight", "train"):
        given = message.get(key)
        if given is None:
            continue
        if key == "train" and not isinstance(given, bool):
            raise DataError(f"turn {number} has train {given!r}; a turn is learned (true) or not (false)")
        if given not in (0, 1):
            raise DataError(f"turn {number} has {key} {given!r}; a turn is learned (1) or not (0)")
        is_target = is_target and bool(given)
    return is_target


def _check_order(turns: tuple[Turn, ...]) -> None:
    expected = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in expected:
            raise DataError(
                f"turn {number} is {turn.role} where {expected[-1]} must stand; turns alternate, user first, one "
                "system turn at most before them"
            )
        after = _AFTER.get(turn.role, ("user",))
        expected = ("tool",) if turn.calls else after
    if turns[-1].role != "assistant":
        raise DataError("a row with no answer: the last turn must be the assistant's")
