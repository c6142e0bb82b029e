"""The entry point: finds the command, shows errors as plain lines, ends with their exit code.

Commands are imported on use, so that ``--help`` needs neither torch nor transformers.
"""

import io
import sys
import traceback
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module

import click

from qlora_lite import __version__
from qlora_lite.compilers import avoid_what_is_missing
from qlora_lite.errors import Interrupted, QloraLiteError
from qlora_lite.runs.launch import is_first, require_one_process
from qlora_lite.runs.signals import stop_signals
from qlora_lite.terminal import printable

from .group import ExtensibleGroup
from .output import drop_output, echo

ENDED_BY_SIGPIPE = 141  # as a shell tells it; Windows has no such signal
COMMANDS = {
    "plan": "Predict the memory of a recipe or a model and choose the fastest settings that fit.",
    "train": "Fine-tune a model as a recipe says.",
    "data": "Show a recipe's data as training sees it, and what is wrong with it.",
    "profile": "Run a few steps and show what used the memory and the time.",
    "damage": "Measure what four bits cost, and which layers to leave in 16 bit for it.",
    "evaluate": "Measure loss, perplexity and metrics of a run or a recipe's base model.",
    "predict": "Label or score the texts of a file with a run that has a head.",
    "generate": "Answer a prompt, or a file of prompts, with a run's adapter or a base model.",
    "chat": "Chat with the adapters of one or more runs, or with a base model.",
    "merge": "Merge a run's adapter into its base model, and measure the difference.",
    "export": "Export a run for peft, vLLM, llama.cpp or Ollama, and check the result.",
    "compare": "Measure several runs on one base model, side by side.",
    "report": "Write a run's report page again, also for a run that was killed.",
    "recipes": "List, show, copy and check recipes; convert those of other trainers.",
    "quantize": "Write a model as a 4-bit checkpoint.",
    "explain": "Explain a setting, a section of a recipe or a topic.",
    "doctor": "Show versions and devices, and what will be slow.",
}
_ASKS_NOTHING = "plan", "data", "report", "recipes", "explain", "doctor", "train"  # of a launcher; or on its own
_MODULES = {name: name for name in COMMANDS} | {"chat": "generate"}


class _Commands(ExtensibleGroup):
    """A group that imports a command's module only when the command is used."""

    def own(self):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name in COMMANDS:
            return getattr(import_module(f"qlora_lite.cli.{_MODULES[name]}"), name)
        return super().get_command(ctx, name)

    def list_commands(self, _ctx):
        return [*COMMANDS, *self.registered()]

    def help_line(self, ctx, name, limit):
        return COMMANDS.get(name) or super().help_line(ctx, name, limit)

    def resolve_command(self, ctx, args):
        known = COMMANDS if args[0] in COMMANDS else self.list_commands(ctx)
        if args[0] not in known and (close := get_close_matches(args[0], known, 1)):
            ctx.fail(f"No such command {args[0]!r}; did you mean {close[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx):
        """Run the command; whoever reads its output may leave, as head does: it ends then as SIGPIPE would end it.

        The signal itself is left ignored, as Python has it: a run goes on though nobody watches it.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            drop_output(sys.stdout, sys.stderr)
            raise click.exceptions.Exit(ENDED_BY_SIGPIPE) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qlora-lite")
@click.option("--debug", is_flag=True, help="Show the stack trace of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Fine-tune a 4-bit language model with LoRA in the memory you have."""
    ctx.obj = {"debug": debug}
    if ctx.invoked_subcommand not in _ASKS_NOTHING:
        require_one_process()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit.

    SIGTERM ends a command as SIGINT does, so that what it was writing is cleared away; train has its own way.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of an encoding that may lack some letters
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # a caller has begun to read it
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is said of the message that it is in
    avoid_what_is_missing()
    try:
        with stop_signals(None) as stop, stop.at_once():
            sys.exit(cli.main(arguments, prog_name="qlora-lite", standalone_mode=False))  # an Exit is returned
    except click.ClickException as error:
        error.show(said := io.StringIO())
        echo(said.getvalue(), err=True, nl=False)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if is_first():
            echo("interrupted", err=True)
        sys.exit(130)
    except QloraLiteError as error:
        if "--debug" in arguments:
            echo(traceback.format_exc(), err=True, nl=False)
        mark = "" if isinstance(error, Interrupted) else "error: "  # who stops a run has made no error
        echo("".join(f"{mark}{line}\n" for line in printable(str(error)).splitlines()), err=True, nl=False)
        sys.exit(error.exit_code)
    except OSError as error:  # of a path or a disk that no part of the package has looked at more closely
        if "--debug" in arguments:
            echo(traceback.format_exc(), err=True, nl=False)
        echo(f"error: {error} (qlora-lite --debug shows where)", err=True)
        sys.exit(2)
