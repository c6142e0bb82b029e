"""Count what rows hold and training does not look at: columns that their format does not have, and keys of turns.

Every row is counted while it is read: what the first one lacks may be the content of later ones.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from .row_formats import ROLES, WITH_TURNS

COLUMNS, KEYS = "columns", "keys of turns"
MOST_NAMES = 1000  # counted of each; rows may name their columns as they like
_WEIGHTS = "weight", "loss_weight", "train"
_PLAIN_KEYS = frozenset({"role", "content", "from", "value", "tool_calls"})
_TURN_KEYS = _PLAIN_KEYS.union(_WEIGHTS)
_RESULT_KEYS = _TURN_KEYS | {"tool_call_id", "name"}


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
            if name in counts[what] or len(counts[what]) < MOST_NAMES:
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
