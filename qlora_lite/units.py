"""Sizes, durations, counts and scores: from text to ints and back.

Bytes are ints inside and binary units when shown. Reading takes both families: KiB, MiB, GiB, TiB are powers
of 1024 and KB, MB, GB, TB powers of 1000. A bare number is refused and not read as bytes or GiB, because both
guesses are common and they differ by 2**30.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SHARES = "exact_match", "number_match", "accuracy"  # metrics whose scores are shares begin so
_OF_CORPORA = "bleu", "chrf"
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_UNIT_BYTES = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)}
_UNIT_BYTES |= {unit.lower(): 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Read a size such as "8GiB", "7.5 GiB" or "500MB".

    Args:
        text: a number of at least 0 and a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB; case does not matter).

    Returns:
        The size in bytes, rounded down.

    Raises:
        ValueError: if there is no number, no unit or an unknown unit; the message says what to write.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as 8GiB")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit; write {number}GiB or {number}MiB")
    factor = _UNIT_BYTES.get(unit.lower())
    if factor is None:
        raise ValueError(f"{unit!r} is not a unit of size; use KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    whole, _, fraction = number.partition(".")
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def format_bytes(size_bytes: int) -> str:
    """Write a size in the largest binary unit that keeps the number at 1 or more.

    Args:
        size_bytes: size in bytes; negative for a difference.

    Returns:
        Text such as "512 B", "107.0 MiB" or "7.4 GiB".
    """
    size = abs(size_bytes)
    sign = "-" if size_bytes < 0 else ""
    if size < 1024:
        return f"{sign}{size} B"
    power = 1
    while power < len(_BINARY_UNITS) - 1 and round(size / 1024**power, 1) >= 1024:
        power += 1
    return f"{sign}{size / 1024**power:.1f} {_BINARY_UNITS[power]}"


def format_seconds(seconds: float) -> str:
    """Write a duration in at most two units.

    Args:
        seconds: duration in seconds, at least 0.

    Returns:
        Text such as "35ms", "0.4s", "12.3s", "3m 05s" or "2h 07m".
    """
    if 0 < round(seconds, 3) < 0.1:
        return f"{1000 * seconds:.0f}ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(whole / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m"


def format_score(name: str, score: Mapping[str, Any]) -> str:
    """Write a score with its standard error.

    Args:
        name: of the score; shares are written in percent, BLEU and chrF as sacrebleu does.
        score: value, and standard_error, which may be None.

    Returns:
        Text such as "62.5% ± 7.8%", "31.4 ± 2.2" or "0.4512 ± 0.0310".
    """
    form = "{:.1%}" if name.startswith(_SHARES) else "{:.1f}" if name in _OF_CORPORA else "{:.4f}"
    error = score.get("standard_error")
    return form.format(score["value"]) + ("" if error is None else f" ± {form.format(error)}")


def counted(count: int, noun: str) -> str:
    """Write how many things there are, such as "1 layer" or "2,048 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_count(count: int) -> str:
    """Write a count with a factor of 1000 per step (K, M, B, T).

    Args:
        count: how many; at least 0.

    Returns:
        Text such as "512", "8.2 K", "134.5 M" or "7.0 B".
    """
    if count < 1000:
        return str(count)
    power, units = 1, "KMBT"
    while power < len(units) and round(count / 1000**power, 1) >= 1000:
        power += 1
    return f"{count / 1000**power:.1f} {units[power - 1]}"
