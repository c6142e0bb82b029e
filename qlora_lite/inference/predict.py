"""Answer a file of prompts into a file of answers, which goes on where it was stopped.

The answers stand in the order of the prompts, one JSON object a line, and are written some batches at a time: what is
on the disk is whole lines, and a line that a killed process left torn is cut off. FILE.settings.json beside it says
what made the answers: another run, template or sampling would make a file of two kinds of answers, and is refused.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.artifacts.trained_run import TrainedRun, open_model
from qlora_lite.data.chat.conversation import Prompt, Turn, as_message
from qlora_lite.data.chat.prompts import read_prompts
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import Template
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.picture_turns import MARK, PLACEHOLDER
from qlora_lite.data.readers.data_files import reader_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError, Interrupted, ModelError, OutputError, tokenizer_faults
from qlora_lite.files import explain_write_errors, flush_to_disk, locked, require_another, sha256, write_text
from qlora_lite.models.anatomy import position_limit, text_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.datasets import build_sources
from qlora_lite.prepare.task import find_task

from .chat import tell_of_system
from .evaluate import Watch, answered_at_once, watching
from .generate import Answer, Sampling, Shown, answers, shown_prompt, text_of_prompt
from .multi_adapter import open_tasks

log = logging.getLogger("qlora_lite")
_ANEW = "choose another --out, or start over with --overwrite"
BATCHES_PER_WRITE = 4  # what a stop loses at most; prompts of similar length are batched among so many


GREEDY = Sampling(seed=0)


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """How a file of prompts is answered.

    Args:
        max_new_tokens: of an answer.
        sampling: with a seed, unless it is greedy.
        column: column of the prompts; None knows it by its name, or by the run's recipe.
        system: system message for prompts without one.
        base: leave the run's adapter out.
        overwrite: begin anew where the file of answers is there.
        model_path, template: see ``artifacts.trained_run.open_model``.
    """

    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    column: str | None = None
    system: str | None = None
    base: bool = False
    overwrite: bool = False
    model_path: str | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was done: prompts in all, those answered by this call, and of them those cut at the most tokens."""

    prompts: int
    answered: int
    cut: int


def predict_file(
    name: str | Path,
    prompts: str | Path,
    out: str | Path,
    settings: PredictSettings | None = None,
    watch: Watch | None = None,
) -> Predicted:
    """Answer a file of prompts with a run, an adapter, or the bare base of a recipe or of a model's name.

    Args:
        name: see ``artifacts.trained_run.open_model``.
        prompts: a data file; of plain text, each line is a prompt.
        out: JSONL file, an object for each prompt: prompt (or messages), reference (where the row has one), answer,
            finish (stop or length), tokens.
        watch: told of the answers so far.

    Raises:
        QloraLiteError: a prompt cannot be read or rendered, ``out`` holds other answers, or the model is not there.
        Interrupted: it was stopped; the same call goes on.
    """
    settings, out = settings or PredictSettings(), Path(out)
    require_another(out, Path(prompts))
    trained = open_model(name, settings.model_path, unfinished=True, template=settings.template)
    if settings.base:
        trained.require_base()
    read = _read_prompts(Path(prompts), trained, settings)
    if not settings.base and any(prompt.turns[0].role != "system" for prompt in read):
        tell_of_system({trained.name: trained}, "prompts here have none; to add it: --system")
    m = trained.recipe.model
    tokenizer = load_tokenizer(m.path, m.revision, trained.recipe.adapter.train_tokens)
    template = trained.template(tokenizer)
    texts = _rendered(read, template, find_task(trained.recipe).picture_reader(trained.recipe))
    with tokenizer_faults():
        longest = max(map(len, tokenizer(list(map(text_of_prompt, texts)), add_special_tokens=False).input_ids))
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
    with locked(out):
        start = _begin(out, read, _about(trained, template, settings), settings.overwrite)
        if start == len(read):
            return Predicted(len(read), 0, 0)
        if start:
            log.warning("%s has %s of %s answers; continuing after them", out, f"{start:,}", f"{len(read):,}")
        return _answer(trained, read, texts, out, start, longest + settings.max_new_tokens, settings, watch)


def _read_prompts(path: Path, trained: TrainedRun, settings: PredictSettings) -> list[Prompt]:
    is_text = reader_of(path) == "text"
    column = settings.column and "{" + settings.column + "}"
    recipe, lines = trained.recipe, "lines" if is_text else None
    source = Source(str(path), prompt=column, documents=lines, with_pictures=find_task(recipe).multimodal)
    known = (
        []
        if trained.is_alone
        else [
            each
            for part in ("train", "eval")
            if getattr(recipe.data, part) is not None
            for each in build_sources(recipe, part)
        ]
    )
    prompts = read_prompts(source, [replace(each, with_pictures=find_task(recipe).multimodal) for each in known])
    if settings.system is None:
        return prompts
    return [_with_system(prompt, settings.system) for prompt in prompts]


def _with_system(prompt: Prompt, text: str) -> Prompt:
    has_one = prompt.turns[0].role == "system"
    return prompt if has_one else replace(prompt, turns=(Turn("system", text), *prompt.turns))


def _rendered(prompts: Sequence[Prompt], template: Template, reader: PictureReader | None) -> list[str | Shown]:
    """Return what the model is given for each prompt.

    Raises:
        DataError: naming each that the template refuses, or whose pictures cannot be read.
    """
    texts: list[str | Shown] = []
    problems = Problems()
    for prompt in prompts:
        try:
            text = render_prompt(template, prompt.turns, prompt.tools)
            texts.append(shown_prompt(text, prompt.pictures, template, reader))
        except DataError as error:
            problems.add(prompt.where, error)
    problems.raise_if_any()
    return texts


def _about(trained: TrainedRun, template: Template, settings: PredictSettings) -> dict:
    """Return what decides the answers, for comparison with what decided those that are there."""
    m = trained.recipe.model
    weights = None if settings.base or not trained.adapter else trained.adapter / WEIGHTS_NAME
    about = {
        "model": trained.name,
        "base_fingerprint": trained.fingerprint,
        "adapter_sha256": sha256(weights) if weights and weights.is_file() else None,
        "template_sha256": hashlib.sha256((template.begin + template.source).encode()).hexdigest(),
        "quant": list(trained.quantization),
        "quant_head": m.quant_head,
        "keep_16bit": list(m.keep_16bit),
        "compute_dtype": str(trained.compute_dtype).removeprefix("torch."),
    }
    return about | {"max_new_tokens": settings.max_new_tokens, **asdict(settings.sampling)}


def _begin(out: Path, prompts: Sequence[Prompt], about: dict, overwrite: bool) -> int:
    """Make the file ready to be appended to; return how many prompts are answered in it.

    Raises:
        OutputError: it holds something else than answers to these prompts by these settings.
    """
    beside = out.with_name(f"{out.name}.settings.json")
    with explain_write_errors(out):
        content = b"" if overwrite else out.read_bytes()
    lines = content.split(b"\n")[:-1]
    if content:
        _compare_settings(out, beside, about)
        _compare_prompts(out, lines, prompts)
    else:
        write_text(beside, json.dumps(about, indent=2) + "\n")
    with explain_write_errors(out), out.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _compare_settings(out: Path, beside: Path, about: dict) -> None:
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in about.items() if before.get(key) != value]
    except (OSError, ValueError, AttributeError):
        cannot = f"{out} exists, but {beside.name}, which says how its answers were made, cannot be read"
        raise OutputError(f"{cannot}; {_ANEW}") from None
    if changed:
        raise OutputError(f"{out} holds answers from other settings ({', '.join(changed)}); {_ANEW}")


def _compare_prompts(out: Path, lines: Sequence[bytes], prompts: Sequence[Prompt]) -> None:
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            given = _given(prompts[number - 1]) if number <= len(prompts) else {"prompt": None}
            is_same = given.items() <= found.items() and found.get("reference") == given.get("reference")
        except (ValueError, AttributeError):
            is_same = False
        if not is_same:
            raise OutputError(f"{out}:{number}: no answer to prompt {number} of the {len(prompts)}; {_ANEW}")


def _given(prompt: Prompt) -> dict:
    """Return a prompt as the file of answers has it: its text, or its turns where there are others than the user's, and
    the row's own answer where it has one."""
    turns = prompt.turns
    if prompt.pictures:
        turns = tuple(replace(turn, content=turn.content.replace(MARK, PLACEHOLDER)) for turn in turns)
    shown = {"images": list(prompt.pictures)} if prompt.pictures else {}
    reference = {} if prompt.reference is None else {"reference": prompt.reference}
    (*before, last) = turns
    if not before and last.role == "user" and not prompt.tools:
        return {"prompt": last.content} | shown | reference
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {"messages": [as_message(turn) for turn in turns]} | shown | tools | reference


def _answer(
    trained: TrainedRun,
    prompts: Sequence[Prompt],
    texts: Sequence[str | Shown],
    out: Path,
    start: int,
    context_tokens: int,
    settings: PredictSettings,
    watch: Watch | None,
) -> Predicted:
    """Answer the prompts from one on, and append the answers to the file.

    Args:
        texts: the rendered prompts.
        start: number of the first.
        context_tokens: of the longest prompt with its answer.
    """
    tasks = open_tasks([trained], context_tokens=context_tokens)
    name = None if settings.base else tasks.names[0]
    context_tokens += tasks.virtual_tokens(name)
    _check_length(tasks.model, context_tokens)
    at_once = answered_at_once(trained.recipe, tasks.model, trained.recipe.memory.budget_bytes, context_tokens)
    show, cut, next_one = watching(watch, "answers", len(prompts)), 0, start
    try:
        with tasks.using(name) as task:
            while next_one < len(prompts):
                part = slice(next_one, next_one + BATCHES_PER_WRITE * at_once)
                found = answers(
                    tasks.model,
                    tasks.tokenizer,
                    texts[part],
                    settings.max_new_tokens,
                    task.stop,
                    at_once,
                    settings.sampling,
                    first=next_one,
                    done=show and (lambda n, first=next_one: show(first + n)),
                )
                _append(out, "".join(map(_line, prompts[part], found)))
                next_one += len(found)
                cut += sum(each.finish == "length" for each in found)
    except KeyboardInterrupt:
        kept = f"{next_one:,} of {len(prompts):,} prompts answered in {out}"
        raise Interrupted(f"stopped; {kept}, and the same command continues after them") from None
    flush_to_disk(out)
    return Predicted(len(prompts), len(prompts) - start, cut)


def _check_length(model, tokens: int) -> None:
    """Compare the longest prompt and its answer with the positions that the model has, or was made for."""
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"the longest prompt and its answer have {tokens:,} tokens, and the model has "
            f"{limit:,} position embeddings; shorten prompts, or lower --max-new-tokens"
        )
    made_for = getattr(text_config(model), "max_position_embeddings", None)
    if made_for and tokens > made_for:
        log.warning(
            "the longest prompt and its answer may have %s tokens, and the model supports %s (max_position_embeddings)",
            f"{tokens:,}",
            f"{made_for:,}",
        )


def _line(prompt: Prompt, answer: Answer) -> str:
    said = {"answer": answer.text.strip(), "finish": answer.finish, "tokens": answer.tokens}
    return json.dumps(_given(prompt) | said, ensure_ascii=False) + "\n"


def _append(out: Path, lines: str) -> None:
    """Append whole lines, or nothing.

    Raises:
        OutputError: the disk does not take them.
    """
    with explain_write_errors(out), out.open("ab", buffering=0) as file:
        size, left = file.tell(), memoryview(lines.encode())
        try:
            while left:
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(size)
            raise
