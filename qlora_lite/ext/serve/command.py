"""Try runs with OpenAI-compatible clients, on this machine only."""

import click

from qlora_lite.cli.options import context_option, of_a_run
from qlora_lite.cli.output import prepare
from qlora_lite.errors import ModelError, how_to_install


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; on one that others can reach, any Host header is answered.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free port.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Maximum number of waiting requests; more are refused.",
)
@context_option
@of_a_run
def serve(
    runs: tuple[str, ...],
    host: str,
    port: int,
    max_new_tokens: int,
    max_waiting: int,
    context_tokens: int | None,
    model_path: str | None,
    unfinished: bool,
) -> None:
    """Answer /v1/chat/completions with the adapters of RUNs; the request's model selects one, "base" the base model.

    A RUN is a run folder, or an adapter folder in the PEFT format. This is for trying adapters on this machine; for
    production use vLLM or Ollama (see qlora-lite export).
    """
    prepare()
    from qlora_lite.inference.chat import tell_of_system
    from qlora_lite.inference.multi_adapter import open_tasks

    try:
        from .app import BODY_BYTES, BODY_BYTES_WITH_PICTURES, Limits, run_server
    except ModuleNotFoundError as error:
        raise ModelError(f"serve needs {error.name}: {how_to_install('serve')}") from error

    tasks = open_tasks(runs, model_path, unfinished, context_tokens)
    runs_by_name = {name: tasks.task(name).run for name in tasks.names}
    tell_of_system(runs_by_name, "requests may have none; to add it, as their first message:")
    from qlora_lite.prepare.task import find_task

    with_pictures = any(find_task(run.recipe).multimodal for run in runs_by_name.values())
    body_bytes = BODY_BYTES_WITH_PICTURES if with_pictures else BODY_BYTES
    run_server(tasks, Limits(body_bytes, max_waiting, max_new_tokens), host, port)
