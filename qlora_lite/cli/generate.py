"""``qlora-lite generate`` and ``chat``: use runs' adapters with the runs' own templates, or bare base models."""

import os
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import click
from click.core import ParameterSource

from qlora_lite.artifacts.run_files import RECIPE
from qlora_lite.errors import DataError, DoesNotFitError, ModelError, RecipeError
from qlora_lite.files import explain_write_errors, require_writable
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.load import load_recipe

from .options import context_option, model_option
from .output import echo, echo_exactly, importing, prepare, step_progress

_NO_COMMANDS = "/help", "/reset", "/clear", "/system", "/bye"  # as others have them
_COMMANDS = (
    "/use NAME switches the adapter, /image FILE adds a picture to your next message, /new starts a new "
    "conversation, /quit or an empty line ends the chat"
)


def _checked_temperature(_context, _option, value: float) -> float:
    if not 0 <= value <= 2:  # NaN is not
        raise click.BadParameter("must be a number from 0 to 2")
    return value


def _checked_top_p(_context, _option, value: float) -> float:
    if not 0 < value <= 1:
        raise click.BadParameter("must be a number above 0 and at most 1")
    return value


_conversation_options = [
    click.option("--system", help="System message."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        callback=_checked_temperature,
        help="0 takes the most probable token each time.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        callback=_checked_top_p,
        help="Sample from the most probable tokens that together have this probability.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Sample from this many of the most probable tokens; 0 is all.",
    ),
    click.option("--template", help="Chat template of a RECIPE's or MODEL's base model, as in data.template."),
    context_option,
    model_option,
]


def _of_a_conversation(command):
    """Add the options of ``inference.chat.open_session``."""
    for option in _conversation_options[::-1]:
        command = option(command)
    return command


@click.command()
@click.argument("run", metavar="RUN|RECIPE|MODEL")
@click.option("--prompt", help="The user's message.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="File of prompts to answer: text (one per line), JSONL, CSV or Parquet.",
)
@click.option(
    "--image",
    "pictures",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="A picture that --prompt is about; may be repeated. Of a run or a recipe of task.kind "
    "image-text-to-text, or of a MODEL that reads pictures.",
)
@click.option(
    "--out",
    type=click.Path(),
    metavar="FILE",
    help="JSONL file for the answers to --prompts; of a run that draws pictures a .png file for --prompt, or a folder "
    "for those of --prompts.",
)
@click.option("--column", help="Column of --prompts with the prompt, if its name does not say so.")
@click.option(
    "--overwrite", is_flag=True, help="Start over if --out exists; otherwise answers are continued, and pictures kept."
)
@click.option("--base", is_flag=True, help="Leave out the run's adapter.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Random seed, for a temperature above 0.  [default: 0 with --prompts, else random]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps for a picture.  [default: the run's]")
@click.option("--guidance", type=click.FloatRange(min=1), help="Scale of guidance for a picture.  [default: the run's]")
@_of_a_conversation
def generate(
    run: str,
    prompt: str | None,
    prompts: str | None,
    pictures: tuple[str, ...],
    out: str | None,
    column: str | None,
    overwrite: bool,
    base: bool,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    **options,
) -> None:
    """Answer one prompt, or a file of prompts.

    RUN is a run folder, or an adapter folder in the PEFT format. For a RECIPE, or a MODEL (a name, a folder or a .gguf
    file), the base model answers without an adapter. A RUN of task.kind image-generation draws a picture.
    """
    if _draws_pictures(Path(run)):
        if pictures:
            raise click.UsageError("--image is for a run that answers about pictures (task.kind image-text-to-text)")
        changed = {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}
        given, place = click.get_current_context().get_parameter_source, options.pop("model_path")
        if other := next((name for name in options if given(name) != ParameterSource.DEFAULT), None):
            raise click.UsageError(f"--{other.replace('_', '-')} is for a run that answers, and {run} draws pictures")
        _draw(run, prompt, prompts, column, out, overwrite, base, 0 if seed is None else seed, changed, place)
        return
    if _is_denoiser(Path(run)):
        raise click.UsageError(
            f"{run} is no run, and pictures are drawn by one: train it first (`generate RUN --base` "
            "leaves out what it learned)"
        )
    if steps is not None or guidance is not None:
        raise click.UsageError("--steps and --guidance are for a run that draws pictures (task.kind image-generation)")
    if out is not None and Path(out).is_dir():
        raise click.UsageError(f"--out {out} is a folder; name a JSONL file")
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give --prompt TEXT, or --prompts FILE with --out FILE")
    if (prompts is None) != (out is None):
        raise click.UsageError("--prompts FILE and --out FILE go together")
    if prompts is None and (column or overwrite):
        raise click.UsageError("--column and --overwrite are for --prompts FILE")
    if prompts is not None and pictures:
        raise click.UsageError("--image is for --prompt")
    if prompts is not None and out is not None:
        _answer_file(run, prompts, out, column, overwrite, base, 0 if seed is None else seed, options)
        return
    session = _open([run], options, base, seed, with_pictures=bool(pictures))
    for picture in pictures:
        session.attach(picture)
    session.say(prompt)
    show = sys.stdout.isatty()  # where somebody watches, word by word as it comes
    answer = session.reply(show)
    if not show:
        echo_exactly(answer)


def _draws_pictures(folder: Path) -> bool:
    """Return whether a folder is that of a run of a denoiser."""
    try:
        return find_task(load_recipe(folder / RECIPE, check_files=False)).draws
    except RecipeError:
        return False


def _is_denoiser(path: Path) -> bool:
    """Return whether a path is that of a diffusion pipeline, or of a recipe that trains a denoiser."""
    if path.is_dir():
        return (path / "model_index.json").is_file()
    try:
        return path.is_file() and find_task(load_recipe(path, check_files=False)).draws
    except RecipeError:
        return False


def _draw(
    run: str,
    prompt: str | None,
    prompts: str | None,
    column: str | None,
    out: str | None,
    overwrite: bool,
    base: bool,
    seed: int,
    changed: dict,
    model_path: str | None,
) -> None:
    """Draw a picture of each prompt."""
    if (prompt is None) == (prompts is None) or out is None:
        raise click.UsageError(
            f"{run} draws pictures: give --prompt TEXT and --out FILE.png, or --prompts FILE and --out FOLDER"
        )
    if prompts is None and Path(out).suffix.lower() != ".png":
        raise click.UsageError(f"--out {out}: the picture of --prompt is a .png file")
    if prompts is None and Path(out).is_dir():
        raise click.UsageError(f"--out {out} is a folder; name a .png file in it")
    if prompts is None and column:
        raise click.UsageError("--column is for --prompts FILE")
    from qlora_lite.data.captions import captions_in

    texts = captions_in(prompts, column) if prompts is not None else [prompt or ""]
    names = [f"{number:04}.png" for number in range(1, len(texts) + 1)] if prompts else [Path(out).name]
    folder = Path(out).parent if prompts is None else Path(out)
    if not overwrite and (there := next((folder / name for name in names if (folder / name).exists()), None)):
        raise click.UsageError(f"{there} is there already; add --overwrite to draw it again, or choose another --out")
    require_writable(folder / names[0])
    prepare(verbose=False)
    with importing():
        from qlora_lite.inference.draw import draw_prompts, write_pictures

    with step_progress("loading"):
        pictures = draw_prompts(run, texts, seed, changed, base, model_path, unfinished=True)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_pictures(pictures, [folder / name for name in names])
    echo(f"{len(pictures):,} picture{'s' if len(pictures) > 1 else ''} drawn in {out}")


def _answer_file(
    run: str, prompts: str, out: str, column: str | None, overwrite: bool, base: bool, seed: int, options: dict
) -> None:
    if options.pop("context_tokens"):
        raise click.UsageError("--context-tokens is for --prompt; with --prompts the longest prompt is known")
    prepare(verbose=False)
    from qlora_lite.inference.predict import PredictSettings, predict_file

    settings = PredictSettings(
        sampling=_sampling(options, seed), column=column, overwrite=overwrite, base=base, **options
    )
    with step_progress("loading") as progress:
        done = predict_file(run, prompts, out, settings, progress.watch)
    earlier = f" ({done.prompts - done.answered:,} of them before)" if done.answered < done.prompts else ""
    cut = f"; cut off at --max-new-tokens {settings.max_new_tokens}: {done.cut:,}" if done.cut else ""
    echo(f"{done.prompts:,} prompts answered in {out}{earlier}{cut}")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN|RECIPE|MODEL...")
@_of_a_conversation
def chat(runs: tuple[str, ...], **options) -> None:
    """Chat with the adapters of one or more runs on one base model.

    RUN is a run folder, or an adapter folder in the PEFT format. For a RECIPE, or a MODEL (a name, a folder or a .gguf
    file), the base model answers without an adapter.

    /use NAME switches to another adapter, /image FILE adds a picture to the next message (of a run of task.kind
    image-text-to-text), /new starts a new conversation; /quit, an empty line or end of input ends the chat.
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
        session.take_back()


def _is_command(session, line: str) -> bool:
    """Carry out a command, or name those that there are; any other line is for the model."""
    word, _, rest = line.strip().partition(" ")
    if word == "/new":
        session.begin_again()
        return True
    if word == "/image":
        try:
            session.attach(os.path.expanduser(rest.strip()))
        except DataError as error:
            echo(f"error: {error}", err=True)
        return True
    known = ("/use", "/image", "/new", "/quit")
    if word in _NO_COMMANDS or (word not in known and get_close_matches(word, known, 1, 0.75)):
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


def _open(runs: Sequence[str], options: dict, base: bool = False, seed: int | None = None, with_pictures: bool = False):
    prepare(verbose=False)
    with importing():
        from qlora_lite.inference.chat import open_session

    return open_session(runs, sampling=_sampling(options, seed), base=base, with_pictures=with_pictures, **options)


def _sampling(options: dict, seed: int | None):
    """Take the options of sampling out of those of a conversation."""
    from qlora_lite.inference.generate import Sampling

    if not options["temperature"] and (options["top_p"] < 1 or options["top_k"]):
        raise click.UsageError("--top-p and --top-k are for a --temperature above 0")
    return Sampling(options.pop("temperature"), options.pop("top_p"), options.pop("top_k"), seed)
