"""Say how rows become tokens, and keep statistics of what became of them, so that no row is left out in silence.

What rows hold and training does not look at (columns that their format does not have, keys of turns) is counted while
every row is read: what the first one lacks may be the content of later ones.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qlora_lite.data.chat.conversation import ROLES
from qlora_lite.data.chat.template import Template
from qlora_lite.data.chat.turns import WITH_TURNS
from qlora_lite.data.readers.problems import Problems, RowProblem
from qlora_lite.data.readers.sources import Source

from .storage import Example

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

TOO_LONG = "longer than max_tokens"
KIND_LOST = "a whole kind of row left out"
_KIND_ROWS = 2  # fewer are odd rows, not a kind
SHOWN_ROWS = 5
COLUMNS, KEYS = "columns", "keys of turns"
MAX_NAMES = 1000  # counted of each; rows may name their columns as they like
_WEIGHTS = "weight", "loss_weight", "train"
_PLAIN_KEYS = frozenset({"role", "content", "from", "value", "tool_calls"})
_TURN_KEYS = _PLAIN_KEYS.union(_WEIGHTS)
_RESULT_KEYS = _TURN_KEYS | {"tool_call_id", "name"}


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """Hold how rows become tokens.

    Args:
        template: None for the tokenizer's own chat template, or see ``choose_template``.
        train_on: "assistant" learns every answer; "completion" the one answer of rows that have just one;
            "last" the last answer; "all" every token but those of answers with weight 0 or train false. Plain
            documents are always learned whole.
        max_tokens: longest row, at least 2 tokens; of both sequences of an example where answers are compared.
        overflow: for longer rows: "error", "drop", "truncate" (keep the first max_tokens tokens; a row
            that loses all it had to learn is dropped and counted), or "split" (see ``encode``).
        train_on_end: whether the tokens that end answers and documents are learned.
        max_rows: read only the first good rows of each source; None for all.
    """

    template: str | None = None
    train_on: str = "assistant"
    max_tokens: int = 1024
    overflow: str = "error"
    train_on_end: bool = True
    max_rows: int | None = None


DEFAULT_SETTINGS = ReadSettings()


class RowReader(Protocol):
    """What reads the rows of one kind: a frozen dataclass, whose fields are a part of the key of cached tokens."""

    @property
    def needs_tokenizer(self) -> bool:
        """Whether rows become tokens of a tokenizer."""

    @property
    def ends_answers(self) -> bool:
        """Whether examples end with a token that is to be learned, if settings.train_on_end."""

    def read(
        self,
        source: Source,
        tokenizer: "PreTrainedTokenizerFast | None",
        settings: ReadSettings,
        statistics: "Statistics",
    ) -> Iterator[list[Example]]:
        """Yield the examples of a source, some at a time, in the order of the rows.

        Raises:
            DataError: a file cannot be read, or its rows are of another kind.
        """

    def cure_of_long_rows(self, settings: ReadSettings) -> str:
        """Return what to do, other than raise data.max_tokens, where rows are too long."""


@dataclass(slots=True)
class Statistics:
    """What became of the rows so far.

    Args:
        problems: what is wrong with rows.
        rows_read: rows seen, good or not.
        dropped: reason -> rows left out for it, problems apart.
        dropped_at: reason -> the places of the first of them.
        truncated: rows cut to max_tokens.
        split: rows cut into parts.
        examples_of: examples of each source, one after the other in the set.
        unused: what the rows of each source hold that is not looked at, see ``no_counts``.
        longest: the longest of the rows that are an error for their length, (tokens, where).
        end_token_ids: the tokens that end answers and documents.
        template: the chat template, once a conversation needed it.
        seen_kinds: rows read of each kind (see ``turns.kinds_of``), good or not.
        kept_kinds: examples of each kind.
        seen_files: rows of each file that became tokens.
        kept_files: files with at least one example.
        dropped_long: rows of each kind, and of each file, that data.overflow drop leaves out.
        shapes: sequences of roles that the template writes whole, as a row of each has shown.
    """

    problems: Problems = field(default_factory=Problems)
    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_at: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    examples_of: list[int] = field(default_factory=list)
    unused: list[dict[str, Counter[str]]] = field(default_factory=list)
    longest: list[tuple[int, str]] = field(default_factory=list)
    end_token_ids: set[int] = field(default_factory=set)
    template: Template | None = None
    seen_kinds: Counter[str] = field(default_factory=Counter)
    kept_kinds: Counter[str] = field(default_factory=Counter)
    seen_files: Counter[str] = field(default_factory=Counter)
    kept_files: set[str] = field(default_factory=set)
    dropped_long: Counter[str] = field(default_factory=Counter)
    shapes: set[tuple] = field(default_factory=set)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        self.note_dropped(reason, where)

    def note_dropped(self, reason: str, where: str) -> None:
        """Note the place of a row that is left out, if it is among the first."""
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < SHOWN_ROWS:
            places.append(where)


def note_too_long(statistics: Statistics, settings: ReadSettings, reader: RowReader) -> None:
    """Add the problem that rows are too long, if there are any, with the longest of them."""
    if not statistics.longest:
        return
    places = ", ".join(f"{where} ({length} tokens)" for length, where in sorted(statistics.longest, reverse=True))
    count = f"{statistics.dropped[TOO_LONG]} of {statistics.rows_read} rows"
    fault = (
        f"{count} are longer than data.max_tokens {settings.max_tokens}; the longest: {places}; raise data.max_tokens, "
        f"{reader.cure_of_long_rows(settings)}"
    )
    statistics.problems.add("", fault, TOO_LONG, fatal=True)


def note_lost_kinds(statistics: Statistics) -> None:
    """Add a problem for each kind of row, and each file, of which no row is kept while others are.

    Such a set trains something else than was meant, and the counts of its rows do not show it. Where data.overflow drop
    left them out for their length, that was asked for, and is a warning.
    """
    if statistics.problems.fatal or not statistics.kept_files:
        return
    files, long = statistics.problems.files + statistics.seen_files, statistics.dropped_long
    lost = [
        (f"none of the {count:,} rows {kind} is kept", count, long[kind])
        for kind, count in statistics.seen_kinds.items()
        if not statistics.kept_kinds[kind]
    ]
    lost += [
        (f"none of the rows of {file} is kept", count, long[file])
        for file, count in files.items()
        if file not in statistics.kept_files
    ]
    for fault, count, too_long in lost:
        cure = "correct them (or data.template, or data.max_tokens), or take them out of the files on purpose"
        if count - too_long >= _KIND_ROWS:
            fault = f"{fault}, so a whole kind of row would be missing; {cure}"
            statistics.problems.add("", fault, KIND_LOST, fatal=True)
        elif count >= _KIND_ROWS:
            fault = f"{fault}: data.overflow drop leaves out {too_long:,} for their length"
            statistics.problems.warnings.append(RowProblem("", KIND_LOST, fault))


def no_counts() -> dict[str, Counter[str]]:
    """Return counts of nothing yet: COLUMNS and KEYS -> name -> rows in which it holds something."""
    return {COLUMNS: Counter(), KEYS: Counter()}


def count_unused(counts: dict[str, Counter[str]], row: Mapping[str, object], used: frozenset[str]) -> None:
    """Count the columns and keys of a good row that hold something that is not looked at.

    Args:
        counts: those of the rows before, as ``no_counts`` makes them.
        row: column to value.
        used: the columns that its format looks at.
    """
    if "messages" in used and isinstance(row.get("messages"), list):  # of two lists of turns, this one is looked at
        used = used - {"conversations"}
    keys = set()
    for turns in (row.get(column) for column in WITH_TURNS if column in used):
        for turn in turns if isinstance(turns, list) else ():
            if turn.keys() <= _PLAIN_KEYS:  # as nearly all
                continue
            role = ROLES[turn.get("role", turn.get("from"))]
            known = _RESULT_KEYS if role == "tool" else _TURN_KEYS
            if role != "assistant":  # one that says it is to be learned is not, one that says it is not is right
                keys.update(f"{key} of {role} turns" for key in _WEIGHTS if turn.get(key))
            keys.update(str(key) for key in turn.keys() - known if _holds(turn[key]))
    for what, names in ((COLUMNS, [name for name in row if name not in used and _holds(row[name])]), (KEYS, keys)):
        for name in names:
            if name in counts[what] or len(counts[what]) < MAX_NAMES:
                counts[what][name] += 1


def _holds(value: object) -> bool:
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def unused_of(counts: Mapping[str, Counter[str]], used: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Say what is not used, as (COLUMNS, ["id (12 rows)", ...]).

    A name that differs from one that is read in case or space only comes first, and with that one.

    Args:
        counts: as ``count_unused`` fills them.
        used: the columns that the format looks at.
    """
    for what, known in ((COLUMNS, used), (KEYS, _RESULT_KEYS)):
        meant_of = {name.lower(): name for name in known}
        likely, others = [], []
        for name, count in counts[what].items():
            said, meant = f"{count:,} row{'s' * (count > 1)}", meant_of.get(name.strip().lower(), name)
            if meant == name:
                others.append(f"{name} ({said})")
            else:
                likely.append(f"{name} ({said}; what is read is {meant})")
        if likely or others:
            yield what, likely + others
