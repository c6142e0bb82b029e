"""``qlora-lite explain``: the settings reference and the long texts, without torch."""

import click

from qlora_lite import explain as texts
from qlora_lite.errors import RecipeError

from .output import echo, echo_markdown


@click.command()
@click.argument("name", required=False)
def explain(name: str | None) -> None:
    """Explain NAME: a setting (lora.rank), a section of a recipe (lora) or a topic.

    Without NAME: list the topics.
    """
    if name is not None:
        try:
            echo_markdown(texts.explain(name))
        except RecipeError as error:
            root = click.get_current_context().find_root()
            if not isinstance(root.command, click.Group) or name not in root.command.list_commands(root):
                raise
            raise RecipeError(f"{name} is a command: qlora-lite {name} --help explains it") from error
        return
    for topic, title in texts.topics().items():
        echo(f"{topic:16} {title}")
    echo("\nqlora-lite explain TOPIC, or a setting (lora.rank), or a section of a recipe (lora)")
