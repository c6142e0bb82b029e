"""Render chat templates in a process of its own, under limits of time, memory and output.

Chat templates are programs that come with downloaded models. transformers' sandbox keeps them from files and from
Python's insides, but not from computing: ``{{ 9**(9**9) }}`` (it hangs while it is compiled, before any row is there),
nested loops and strings of gigabytes stop other trainers for good. A thread or a signal cannot end such a
computation, since Python sees neither inside one operation on a large number; limits of the operating system can.
Windows has none that a process sets for itself: there a thread that is no Python's ends it by the clock (the one of
``faulthandler``), and its memory is not limited.

A template is tried out on a short conversation before anything is read, and every rendering of a template that is none
of the named ones is made there too: it may do its harm for particular words only. The process lives as long as this
one; a row costs it a line of JSON each way. Many rows go there in one message, since changing between processes takes
longer than rendering a short row.
"""

import atexit
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache

from qlora_lite.errors import DataError, ModelError

CPU_SECONDS = 1  # an honest template takes milliseconds; and as much more for a million letters of a row
CLOCK_SECONDS = 10  # where no processor time is counted: other processes may have the cores
MEMORY_BYTES = 512 << 20  # and 20 times the row
OUTPUT_CHARACTERS = 1_000_000  # and 10 times the row
_TIME = f"takes more than {CPU_SECONDS} second of processor time"
_CLOCK = f"takes more than {CLOCK_SECONDS} seconds"
_MEMORY = f"takes more than {MEMORY_BYTES >> 20} MiB of memory"
_TEXT = f"writes more than {OUTPUT_CHARACTERS:,} characters"
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # beside TemplateError
_SHORT_TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
_one_at_a_time = threading.Lock()
# messages, options, and for each rendering how many of the messages it has, and options of its own
Row = tuple[Sequence[dict], dict, Sequence[tuple[int, dict]]]


class TakesTooMuchError(ModelError):
    """Report a template that takes too much: no fault of a row, so that no other row is tried."""


def probe(name: str, source: str, special_tokens: Mapping[str, object]) -> None:
    """Check that a template renders a short conversation within the limits; what it writes does not matter.

    Args:
        name: of the template, for the error.
        source: the Jinja text.
        special_tokens: what templates are given by name, such as bos_token.

    Raises:
        DataError: it takes too much time or memory, or writes too much.
    """
    if reason := _verdict(source, json.dumps(special_tokens, default=str)):
        cure = "set data.template to another one"
        raise DataError(f"the chat template ({name}) {reason} for a conversation of four words; {cure}")


@lru_cache(maxsize=32)
def _verdict(source: str, special_tokens: str) -> str | None:
    """Return what was too much, or None; errors of the template are no concern here."""
    from jinja2 import TemplateError

    talks = (_SHORT_TALK, [{"role": "system", "content": "zero"}, *_SHORT_TALK], _SHORT_TALK[:1])
    for talk, prompts in [(talk, prompts) for talk in talks for prompts in (False, True)]:
        try:
            render_apart(source, talk, json.loads(special_tokens), add_generation_prompt=prompts)
        except TakesTooMuchError as error:
            return str(error)
        except TemplateError:
            continue
    return None


def render_apart(
    source: str, messages: Sequence[dict], special_tokens: Mapping[str, object], **options: object
) -> tuple[str, list]:
    """Return what transformers' ``render_jinja_template`` makes of one conversation: its text and its answers' places.

    Args:
        source: the Jinja text.
        messages: of the conversation.
        special_tokens: what templates are given by name, such as bos_token.
        options: of ``render_jinja_template``.

    Raises:
        TakesTooMuchError: it takes too much time or memory, or writes too much; the text says which.
        jinja2.TemplateError: the template fails on the conversation.
    """
    from jinja2 import TemplateError

    replies, why_ended = _ask(source, special_tokens, [(messages, options, [(len(messages), {})])])
    if why_ended:
        raise TakesTooMuchError(why_ended)
    (answer,) = replies
    if "too_much" in answer:
        raise TakesTooMuchError(answer["too_much"])
    if "refused" in answer:
        raise TemplateError(answer["refused"])
    return answer["text"], answer["blocks"]


def render_rows_apart(
    source: str, special_tokens: Mapping[str, object], rows: Sequence[Row]
) -> list[tuple[str, list] | None]:
    """Return what ``render_apart`` does for all renderings of many rows, and None for each that fails.

    Args:
        source: the Jinja text.
        special_tokens: what templates are given by name.
        rows: what to render, see ``Row``.
    """
    replies, _ = _ask(source, special_tokens, rows)
    made = [(reply["text"], reply["blocks"]) if "text" in reply else None for reply in replies]
    return made + [None] * (_count(rows) - len(made))


def _count(rows: Sequence[Row]) -> int:
    return sum(len(wanted) for _, _, wanted in rows)


def _ask(source: str, special_tokens: Mapping[str, object], rows: Sequence[Row]) -> tuple[list[dict], str | None]:
    """Return the replies, one for each rendering, and why the process ended if it did, before it gave all."""
    lines = [json.dumps([source, special_tokens, len(rows)]), *map(json.dumps, rows), ""]
    replies, why_ended, count = [], None, _count(rows)
    with _one_at_a_time:
        process = _child()
        try:
            process.stdin.write("\n".join(lines))
            process.stdin.flush()
            while len(replies) < count and (reply := process.stdout.readline()).endswith("\n"):
                replies.append(reply)
        except OSError:  # its pipe is closed, which is BrokenPipeError, or EINVAL on Windows
            pass
        except BaseException:  # a signal: its answer is still to come, and would be taken for the next one's
            end_child()
            raise
        if len(replies) < count:
            why_ended = _why_it_ended(process)
    return [json.loads(reply) for reply in replies], why_ended


@lru_cache(maxsize=1)
def _child() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where modules come from here, so not the folder
    alone = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0), "start_new_session": True}
    process = subprocess.Popen(  # that it starts in (-P); in a session or group of its own, where no Ctrl-C reaches it
        [sys.executable, "-P", "-m", __name__], text=True, env=path, **alone, **pipes
    )
    atexit.register(end_child)
    if hasattr(os, "register_at_fork"):  # it is the parent's, and would be waited for at the exit
        os.register_at_fork(after_in_child=_child.cache_clear)
    return process


def end_child() -> None:
    """End the process that renders, if there is one; the next rendering starts another."""
    if _child.cache_info().currsize:
        process = _child()
        _child.cache_clear()
        process.kill()
        process.communicate()


def _why_it_ended(process: subprocess.Popen) -> str:
    _, said = process.communicate()
    _child.cache_clear()
    if hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF:
        return _TIME
    if said.startswith("Timeout ("):  # of faulthandler's
        return _CLOCK
    return f"cannot be tried out ({next(reversed(said.strip().splitlines()), 'no reason given')})"


def _address_space() -> int:
    """Return how many bytes this process has mapped; 0 where that is not known (no Linux: the time limit alone)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE
    except OSError:
        return 0


def _serve() -> None:
    """Answer messages on standard input; the operating system ends this process where a rendering takes too long.

    A message is a line with the template and the number of rows, and one for each row. All are read before the first
    rendering is answered, by a line as well: the other side writes all of them before it reads.
    """
    import transformers.utils.chat_template_utils  # noqa: F401 (before time and memory are counted)

    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        resource = None
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most_bytes, hard_bytes = resource.getrlimit(resource.RLIMIT_AS)  # of ulimit -v
        most_bytes = sys.maxsize if most_bytes == resource.RLIM_INFINITY else most_bytes
    used_bytes = _address_space() if resource else 0
    for head in sys.stdin:
        source, special_tokens, count = json.loads(head)
        lines = [sys.stdin.readline() for _ in range(count)]
        if used_bytes:
            limit_bytes = used_bytes + MEMORY_BYTES + 20 * (len(head) + sum(map(len, lines)))
            resource.setrlimit(resource.RLIMIT_AS, (min(limit_bytes, most_bytes), hard_bytes))
        ended = None  # by one that took too much: the others of the message are not tried
        for line in lines:
            messages, common, wanted = json.loads(line)
            letters = len(head) + len(line)
            for turns, options in wanted:
                reply = ended or _reply(source, messages[:turns], special_tokens, common | options, letters)
                ended = reply if "too_much" in reply else None
                print(json.dumps(reply))
        sys.stdout.flush()


def _reply(source: str, messages: list[dict], special_tokens: dict, options: dict, letters: int) -> dict:
    """Render once, within the limits for a row of so many letters."""
    from jinja2 import TemplateError

    _limit_seconds(letters / 1e6)
    try:
        text, blocks = _render(source, messages, special_tokens, **options)
        too_much = _TEXT if len(text) > OUTPUT_CHARACTERS + 10 * letters else None
        return {"too_much": too_much} if too_much else {"text": text, "blocks": blocks}
    except MemoryError:
        return {"too_much": _MEMORY}
    except (TemplateError, *FAULTS) as error:
        return {"refused": str(error) or type(error).__name__}
    finally:
        _limit_seconds(None)


def _render(source: str, messages: list[dict], special_tokens: dict, **options: object) -> tuple[str, list]:
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), blocks = render_jinja_template([messages], chat_template=source, **special_tokens, **options)
    return text, blocks[0] if blocks else []


def _limit_seconds(more: float | None) -> None:
    """End this process after the limit and some seconds more, unless it is called again; None is no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0 if more is None else CPU_SECONDS + more)
    elif more is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(CLOCK_SECONDS + more, exit=True)


if __name__ == "__main__":
    _serve()
