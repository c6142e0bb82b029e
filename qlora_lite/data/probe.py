"""Render a chat template once in a process of its own, under limits of time, memory and output.

Chat templates are programs that come with downloaded models. transformers' sandbox keeps them from files and from
Python's insides, but not from computing: `{{ 9**(9**9) }}` (it hangs while it is compiled, before any row is there),
nested loops and strings of gigabytes stop other trainers for good. A thread or a signal cannot end such a
computation, since Python sees neither inside one operation on a large number; limits of the operating system can.

A template that does its harm for particular words only is not found by this; it is as bad as a model that does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import lru_cache

from qlora_lite.errors import DataError

CPU_SECONDS = 1  # an honest template takes milliseconds
MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 1_000_000
_WAIT_SECONDS = 120  # for a machine so busy that that little processor time take this long
_TOO_MUCH = {
    71: f"takes more than {CPU_SECONDS} second of processor time",
    72: f"takes more than {MEMORY_BYTES >> 20} MiB of memory",
    73: f"writes more than {OUTPUT_CHARACTERS:,} characters",
}  # exit code -> what was too much
_TIME, _MEMORY, _TEXT = _TOO_MUCH
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # beside TemplateError
_SHORT_TALK = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
]  # fmt: skip


def probe(name: str, source: str, special_tokens: Mapping[str, object]) -> None:
    """Check that a template renders a short conversation within the limits; what it writes does not matter.

    Args:
        name: of the template, for the error.
        source: the Jinja text.
        special_tokens: what templates are given by name, such as bos_token.

    Raises:
        DataError: it takes too much time or memory, or writes too much.
    """
    strings = {name: token for name, token in special_tokens.items() if isinstance(token, str)}
    if reason := _verdict(json.dumps({"source": source, "special_tokens": strings})):
        cure = "set data.template to another one"
        raise DataError(f"the chat template ({name}) {reason} for a conversation of four words; {cure}")


@lru_cache(maxsize=32)
def _verdict(task: str) -> str | None:
    """Run the child; return what was too much, or None."""
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=task, text=True, capture_output=True, timeout=_WAIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {_WAIT_SECONDS} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:  # ended by the operating system
        return _TOO_MUCH[_TIME]
    last_line = next(reversed(done.stderr.strip().splitlines()), "no reason given")
    return _TOO_MUCH.get(done.returncode, f"cannot be tried out ({last_line})")


def _child() -> int:
    """Render what standard input says; errors of the template are no concern here, only what it takes."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    task = json.load(sys.stdin)
    _limit()
    started, written = time.process_time(), 0
    talks = (_SHORT_TALK, [{"role": "system", "content": "zero"}, *_SHORT_TALK], _SHORT_TALK[:1])
    for talk, prompts in [(talk, prompts) for talk in talks for prompts in (False, True)]:
        try:
            (text,), _ = render_jinja_template(
                conversations=[talk], chat_template=task["source"], add_generation_prompt=prompts,
                **task["special_tokens"],
            )  # fmt: skip
        except MemoryError:
            return _MEMORY
        except (TemplateError, *FAULTS):
            continue
        written = max(written, len(text))
    if time.process_time() - started > CPU_SECONDS:
        return _TIME
    return _TEXT if written > OUTPUT_CHARACTERS else 0


def _limit() -> None:
    """Let the operating system end this process soon after CPU_SECONDS, and refuse it more than MEMORY_BYTES more."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            size_bytes = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return  # no Linux: the time limit alone
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + MEMORY_BYTES, size_bytes + MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(_child())
