"""Cut a weight into pieces that are dequantised one after the other, so that float32 is there of one piece alone."""

from collections.abc import Iterator

from qlora_lite.memory.marks import repeated


def pieces(length: int, at_once: int, is_meta: bool) -> Iterator[slice]:
    """Yield slices of ``at_once`` of a length; the last may be shorter.

    Args:
        is_meta: it is a plan, in which one piece counts for all of its size: large weights have dozens.
    """
    whole = length // at_once
    if is_meta and whole > 1:
        with repeated(whole):
            yield slice(0, at_once)
        starts = range(whole * at_once, length, at_once)
    else:
        starts = range(0, length, at_once)
    for start in starts:
        yield slice(start, min(start + at_once, length))
