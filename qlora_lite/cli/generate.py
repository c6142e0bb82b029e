"""``qlora-lite generate`` and ``chat``: use runs' adapters with the runs' own templates."""

import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches

import click

from qlora_lite.errors import DataError, DoesNotFitError, ModelError

from .options import context_option, model_option
from .output import echo, echo_exactly, prepare

_NO_COMMANDS = "/help", "/reset", "/clear", "/system", "/bye"  # as others have them
_COMMANDS = "/use NAME goes on with another adapter, /new forgets the conversation, /quit or an empty line ends it"


def _checked_temperature(_context, _option, value: float) -> float:
    if not 0 <= value <= 2:  # NaN is not
        raise click.BadParameter("must be a number from 0 to 2")
    return value


_conversation_options = [
    click.option("--system", help="System message."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True),
    click.option("--temperature", type=float, default=0.0, show_default=True, callback=_checked_temperature,
                 help="0 takes the most probable token each time."),
    context_option, model_option,
]  # fmt: skip


def _of_a_conversation(command):
    """Add the options of ``converse.open_session``."""
    for option in _conversation_options[::-1]:
        command = option(command)
    return command


@click.command()
@click.argument("run")
@click.option("--prompt", required=True, help="What the user says.")
@_of_a_conversation
def generate(run: str, prompt: str, **options) -> None:
    """Answer one prompt with the adapter of RUN, a run folder or an adapter's in the PEFT format."""
    session = _open([run], options)
    session.say(prompt)
    show = sys.stdout.isatty()  # where somebody watches, word by word as it comes
    answer = session.reply(show)
    if not show:
        echo_exactly(answer)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@_of_a_conversation
def chat(runs: tuple[str, ...], **options) -> None:
    """Talk with the adapters of one or more runs over one base model; a RUN may be an adapter's folder, as peft has it.

    /use NAME goes on with another adapter, /new forgets the conversation; /quit, an empty line or end of input ends it.
    """
    session = _open(runs, options)
    echo(f"{_COMMANDS} (adapters: {', '.join(session.tasks.names)})", err=True)
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:
            return
        if line.strip() in ("", "/quit", "/exit"):
            return
        if not _is_command(session, line):
            _answer(session, line)


def _answer(session, line: str) -> None:
    session.say(line)
    try:
        session.reply(show=True)
    except (DataError, DoesNotFitError) as error:  # a control token in what was typed, or too much of it
        echo(f"error: {error}", err=True)
        session.turns.pop()


def _is_command(session, line: str) -> bool:
    """Carry out a command, or name those that there are; any other line is for the model."""
    word, _, rest = line.strip().partition(" ")
    if word == "/new":
        session.turns[:] = [turn for turn in session.turns if turn.role == "system"]
        return True
    if word in _NO_COMMANDS or (word != "/use" and get_close_matches(word, ("/use", "/new", "/quit"), 1, 0.75)):
        echo(_COMMANDS, err=True)
        return True
    if word != "/use":  # as /think, which some models know
        return False
    started = time.perf_counter()
    try:
        session.use(rest.strip())
    except ModelError as error:
        echo(f"error: {error}", err=True)
        return True
    size = session.tasks.task(session.task).adapter_bytes
    echo(f"{session.task}: {size / 2**20:.1f} MiB, in {1000 * (time.perf_counter() - started):.3f} ms", err=True)
    return True


def _open(runs: Sequence[str], options: dict):
    prepare(verbose=False)
    from qlora_lite.converse import open_session

    return open_session(runs, **options)
