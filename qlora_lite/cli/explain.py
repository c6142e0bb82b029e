"""``qlora-lite explain``: the settings reference and the long texts, without torch."""

import click

from qlora_lite import explain as texts

from .output import echo, echo_markdown


@click.command()
@click.argument("name", required=False)
def explain(name: str | None) -> None:
    """Explain NAME: a setting (lora.rank), a section of a recipe (lora) or a topic.

    Without NAME: list the topics.
    """
    if name is not None:
        echo_markdown(texts.explain(name))
        return
    for topic, title in texts.topics().items():
        echo(f"{topic:16} {title}")
    echo("\nqlora-lite explain TOPIC, or a setting (lora.rank), or a section of a recipe (lora)")
