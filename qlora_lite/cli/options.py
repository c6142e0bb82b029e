"""Options that several commands have."""

import click

model_option = click.option("--model", "model_path", help="Base model, if it is not where the run or the adapter says.")
unfinished_option = click.option(
    "--unfinished",
    is_flag=True,
    help="Use a run that did not finish: its best adapter so far, else its last.",
)
context_option = click.option(
    "--context-tokens",
    type=click.IntRange(min=1),
    help="Longest conversation, answer included, that must fit on the GPU; weights that do not fit beside it are kept "
    "in host memory.  [default: the run's data.max_tokens]",
)
shots_option = click.option(
    "--shots",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Also measure the base model with K training examples, always the same, before each prompt.",
)


def of_a_run(command):
    """Add the options with which a run is opened."""
    return unfinished_option(model_option(command))
