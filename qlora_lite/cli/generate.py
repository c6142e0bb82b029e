"""``qlora-lite generate`` and ``chat``: use a run's adapter with the run's own template."""

import click

from qlora_lite.errors import DataError

from .output import prepare

_tokens = click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
_temperature = click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                            help="0 takes the most probable token each time.")  # fmt: skip


@click.command()
@click.argument("run")
@click.option("--prompt", required=True, help="What the user says.")
@click.option("--system", help="System message.")
@_tokens
@_temperature
def generate(run: str, prompt: str, system: str | None, max_new_tokens: int, temperature: float) -> None:
    """Answer one prompt with the adapter of RUN (a run folder)."""
    session = _open(run, system, max_new_tokens, temperature)
    session.say(prompt)
    click.echo(session.reply())


@click.command()
@click.argument("run")
@click.option("--system", help="System message.")
@_tokens
@_temperature
def chat(run: str, system: str | None, max_new_tokens: int, temperature: float) -> None:
    """Talk with the adapter of RUN; an empty line or end of input ends it."""
    session = _open(run, system, max_new_tokens, temperature)
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:
            return
        if not line.strip():
            return
        session.say(line)
        try:
            session.reply(show=True)
        except DataError as error:  # a control token in what was typed, say
            click.echo(f"error: {error}", err=True)
            session.turns.pop()


def _open(run, system, max_new_tokens, temperature):
    prepare(verbose=False)
    from qlora_lite.converse import open_session

    return open_session(run, system, max_new_tokens, temperature)
