"""What a person sees: our own log lines and a progress bar, without the libraries' chatter.

Log lines go to standard error, so that ``--json`` leaves exactly one object on standard output.
"""

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from qlora_lite.terminal import LogFormatter, printable
from qlora_lite.units import format_bytes, format_seconds

LINE_LETTERS = 120  # of an answer
PLAIN_LINE_SECONDS = 10  # between progress lines where there is no terminal
SHORT_RUN_STEPS = 50  # of a run that has a line for every step there
WATCH_LINE_SECONDS = 30  # between those of what has no steps


def prepare(verbose: bool = True) -> None:
    """Send our log to standard error and silence the libraries; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(message)s"))
    log = logging.getLogger("qlora_lite")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for other in logging.getLogger("transformers").handlers:  # its errors quote what models' files say
        other.setFormatter(LogFormatter())


@contextmanager
def importing() -> Iterator[None]:
    """Import the libraries without the search for cycles, a sixth of that time, and leave them out of later ones."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def step_progress(first: str = "before the first step", counts_pictures: bool = False) -> Iterator:
    """Give a function that shows one step's metrics: a live bar on a terminal, else a line now and then.

    Its ``watch`` shows how far anything else is, in the same place.

    Args:
        first: what the bar says before it is told anything.
        counts_pictures: whether pictures are counted, and not tokens.
    """
    if not sys.stderr.isatty():
        yield _PlainLines(counts_pictures)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = _Bar(bar, first, counts_pictures)
        with _log_to(sys.stderr):  # which is the bar's now, and writes above it
            yield shown


@contextmanager
def _log_to(stream) -> Iterator[None]:
    handlers = [h for h in logging.getLogger("qlora_lite").handlers if isinstance(h, logging.StreamHandler)]
    earlier = {handler: handler.stream for handler in handlers}
    try:
        for handler in earlier:
            handler.setStream(stream)
        yield
    finally:
        for handler, before in earlier.items():
            handler.setStream(before)


class _Bar:
    def __init__(self, bar, first, counts_pictures):
        self.bar, self.counts_pictures = bar, counts_pictures
        self.steps = self.watched = bar.add_task(first, total=None)

    def __call__(self, metrics, total: int) -> None:
        description = _describe(metrics, total, self.counts_pictures)
        if self.watched == self.steps:  # from now on what is between steps has a line of its own
            self.watched = self.bar.add_task("", visible=False)
        self.bar.update(self.watched, visible=False)
        self.bar.update(self.steps, completed=metrics.step, total=total, description=description)

    def watch(self, what: str, done: int, total: int) -> None:
        description = printable(f"{what}: {done:,} of {total:,}")  # a run's name may be in it
        self.bar.update(self.watched, completed=done, total=total, description=description, visible=True)


class _PlainLines:
    def __init__(self, counts_pictures):
        self.counts_pictures = counts_pictures
        self.spent, self.count, self.shown = 0.0, 0, time.monotonic()
        self.watched = self.shown

    def watch(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.watched = now
        elif now - self.watched >= WATCH_LINE_SECONDS:
            self.watched = now
            echo(f"{what}: {done:,} of {total:,}", err=True)

    def __call__(self, metrics, total: int) -> None:
        now = time.monotonic()
        self.spent, self.count = self.spent + metrics.seconds, self.count + 1
        is_due = total <= SHORT_RUN_STEPS or now - self.shown >= PLAIN_LINE_SECONDS
        if self.count > 1 and metrics.step < total and not is_due:
            return
        self.shown = self.watched = now
        left = self.spent / self.count * (total - metrics.step)
        left_text = f", {format_seconds(left)} left" if metrics.step < total else ""
        echo(_describe(metrics, total, self.counts_pictures) + left_text, err=True)


def format_speed(tokens_per_second: float, counts_pictures: bool) -> str:
    """Write a speed, of pictures in pictures, each of which is a token to what trains."""
    return f"{tokens_per_second:.1f} pictures/s" if counts_pictures else f"{tokens_per_second:.0f} tokens/s"


def _describe(metrics, total: int, counts_pictures: bool) -> str:
    shown = "reward" if "reward" in metrics.metrics else "loss"  # of answers to prompts that differ from step to step
    value = metrics.metrics.get(shown, metrics.loss)
    speed, memory = format_speed(metrics.tokens_per_second, counts_pictures), format_bytes(metrics.peak_bytes)
    return f"step {metrics.step}/{total}  {shown} {value:.3f}  {speed}  {memory}"


def echo(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print text for a person, without what a terminal would obey; every command prints by this and the next two."""
    click.echo(printable(text), err=err, nl=nl)


def echo_exactly(text: str, nl: bool = True) -> None:
    """Print what a program may read (JSON, YAML, a model's answer): into a pipe or a file, as it is."""
    click.echo(printable(text) if sys.stdout.isatty() else text, nl=nl, color=True)


def echo_styled(text: str, nl: bool = True) -> None:
    """Print text with our own colours, into which foreign text came by way of ``shown``."""
    click.echo(text, nl=nl)


def echo_markdown(text: str) -> None:
    """Print Markdown of our own: formatted on a terminal, and as it is in a pipe or a file."""
    if not sys.stdout.isatty():
        echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def shown(report):
    """Return a report, or a part of it, with every text in it as a terminal may have it."""
    if isinstance(report, str):
        return printable(report)
    if isinstance(report, dict):
        return {shown(key): shown(value) for key, value in report.items()}
    return [shown(value) for value in report] if isinstance(report, list | tuple) else report


def echo_agreement(report) -> None:
    """Print how alike models are to the one that was trained, if a report of a merge or an export has it."""
    if "models" not in report:
        return
    echo(f"\n{report['rows']} examples of {report['measured_on']}:")
    echo(f"{'':24}{'loss':>10}{'KL to trained':>16}{'same first token':>19}")
    for name, found in report["models"].items():
        echo(f"{name:24}{found['loss']:>10.4f}{found['kl']:>16.2e}{found['agreement']:>19.2%}")


def print_result(text: str, kept_in: Path | None = None) -> None:
    """Print what came of a command's work; if whoever read has left, that is no failure of the work.

    Args:
        kept_in: the folder that has it too, so that a disk too full to print it is no failure either.

    Raises:
        OSError: it cannot be printed, and is nowhere else.
    """
    try:
        echo(text)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            if kept_in is None:
                raise
            echo(f"the result cannot be printed ({error.strerror}); it is in {kept_in}", err=True)
        drop_output(sys.stdout)


def drop_output(*streams) -> None:
    """Send what streams still hold nowhere: Python flushes them at its end, and would complain there."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text: str) -> str:
    """Return the start of a text that a model wrote, on one line."""
    flat = shown(" ".join(text.split()))
    return flat if len(flat) <= LINE_LETTERS else flat[: LINE_LETTERS - 3] + "..."
