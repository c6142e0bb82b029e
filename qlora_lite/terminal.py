"""Text from rows, models and adapters as a terminal and a log file may have it.

A terminal obeys control characters (it sets its title, writes to the clipboard, goes back over what it has shown), and
bidirectional marks show letters in another order than they are in. Here they are shown as escapes.
"""

import logging
import re

# C0 but for tab and line feed, DEL, C1; bidirectional marks, line and paragraph separators
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return text with an escape, such as ``\x1b``, for every letter that a terminal would obey."""
    return _COMMANDS.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)


class LogFormatter(logging.Formatter):
    """Format a log line for a terminal or a log file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
