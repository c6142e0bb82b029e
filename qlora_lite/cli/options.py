"""Options that several commands have."""

import click

model_option = click.option(
    "--model", "model_path", help="Where the base model lies, if not where the run or the adapter says."
)
unfinished_option = click.option(
    "--unfinished", is_flag=True,
    help="Take what a run that did not reach its end has: the best adapter so far, else the last.",
)  # fmt: skip
context_option = click.option(
    "--context-tokens", type=click.IntRange(min=1),
    help="Of the longest conversation, answer included, that a card must have room for; weights that it has no room "
    "for beside that lie in host memory.  [default: the run's data.max_tokens]",
)  # fmt: skip


def of_a_run(command):
    """Add the options with which a run is opened."""
    return unfinished_option(model_option(command))
