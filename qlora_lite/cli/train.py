"""``qlora-lite train``: run a recipe and print its results."""

import json
import shlex
from pathlib import Path

import click

from qlora_lite.errors import CheckpointError
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.launch import launched, start
from qlora_lite.units import format_bytes, format_score, format_seconds

from .output import format_speed, importing, one_line, prepare, print_result, step_progress


@click.command()
@click.argument("recipe", required=False, metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Resume from the newest complete checkpoint of a run folder; without RUN, of the recipe's newest run.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train on N GPUs of this machine, each with its share of every step.",
)
@click.option("--force", is_flag=True, help="With --resume: resume even if settings or data have changed.")
def train(recipe: str | None, overrides: tuple[str, ...], resume: str | None, gpus: int | None, force: bool) -> None:
    """Fine-tune a model as RECIPE says; KEY=VALUE replaces a setting, such as lora.rank=32."""
    if resume and "=" in resume and not Path(resume).exists():  # the shell cannot tell an override from a RUN
        overrides, resume = (*overrides, resume), ""
    if resume and Path(resume).is_file():
        first = f"qlora-lite train {resume} --resume"
        raise click.UsageError(f"--resume takes a run folder, and {resume} is a file; if it is the recipe: {first}")
    if recipe is None:
        raise click.UsageError("name the recipe: qlora-lite train RECIPE" + (f" --resume {resume}" if resume else ""))
    if force and resume is None:
        raise click.UsageError("--force is for --resume: it resumes a run whose settings or data have changed")
    if resume and not Path(resume).is_dir():
        raise CheckpointError(f"--resume {resume}: no such run folder")
    is_first = (launched_as := launched()) is None or launched_as.rank == 0
    if is_first and resume and not Path(recipe).exists() and Path(recipe) == Path(resume) / "recipe.yaml":
        prepare()
        from qlora_lite.runs.resume import recover_recipe

        recover_recipe(Path(resume))
    settings = load_recipe(recipe, overrides)
    if gpus is not None and launched_as is not None:
        raise click.UsageError(
            f"--gpus starts processes, and {launched_as.world_size} were started already: leave it out"
        )
    if launched_as is None:  # else the ranks check it together
        from qlora_lite.prepare.early import check_run

        check_run(settings)
    if gpus is not None and gpus > 1:
        again = [recipe, *overrides, *([] if resume is None else ["--resume", *filter(None, [resume])])]
        again += ["--force"] if force else []
        raise click.exceptions.Exit(start(gpus, ["train", *again], settings))
    prepare()
    with importing():
        from qlora_lite.prepare.method import build_method
        from qlora_lite.runs import run

    with step_progress(counts_pictures=not find_task(settings).has_tokens) as progress:
        folder = run.run_recipe(settings, progress, resume, force, progress.watch)
    if not is_first:
        return
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    can_merge = not build_method(settings).why_not_merged
    print_result(_result(folder, summary, not find_task(settings).has_tokens, can_merge), folder)


def _result(folder, summary: dict, counts_pictures: bool = False, can_merge: bool = True) -> str:
    lines = []
    for sample in summary["samples"][:2]:
        question = sample.get("question", sample["prompt"])  # a run of an earlier version has the whole prompt alone
        lines += [
            "",
            f"prompt     {one_line(question)}",
            f"reference  {one_line(sample['reference'])}",
            f"before     {one_line(sample['before'])}",
            f"after      {one_line(sample['after'])}",
        ]
    lines.append("")
    lines += _change("evaluation loss", summary, "eval_loss", "{:.4f}")
    lines += _rewards(summary.get("eval_metrics", {})) + _metrics(summary.get("metrics", {}))
    draws = "picture_size" in summary
    skipped, kind = summary["skipped_steps"], "model" if "model_sha256" in summary else "adapter"
    merge = ("merge, " if kind == "adapter" else "") + "export, " if can_merge else ""
    without_effect = f", of which {skipped} were skipped: not finite" if skipped else ""
    lines += [
        f"{'time':24} {format_seconds(summary['seconds'])} for {summary['steps']} steps{without_effect}",
        f"{'speed':24} {format_speed(summary['tokens_per_second'], counts_pictures)}",
        f"{'peak memory':24} {format_bytes(summary['peak_bytes'])}",
        f"{kind:24} {folder / kind}{_of_step(summary)}",
        f"{'report':24} {folder / 'report.html'}",
        f"{'next':24} {_next(summary, shlex.quote(str(folder)), merge, draws)}",
    ]
    return "\n".join(lines)


def _next(summary: dict, folder: str, merge: str, draws: bool) -> str:
    if draws:
        return f"qlora-lite generate {folder} --prompt TEXT --out FILE.png"
    if "labels" in summary:
        return f"qlora-lite predict {folder} --rows FILE --out FILE (or evaluate)"
    return f"qlora-lite chat {folder} (or generate, evaluate, {merge}serve)"


def _of_step(summary: dict) -> str:
    """Return the step of the adapter's weights, if it is not the last, and whether they are worse than the base."""
    step, before, after = (summary.get(key) for key in ("adapter_step", "eval_loss_before", "eval_loss_after"))
    said = f" (step {step}, the best by evaluation loss)" if step not in (None, summary["steps"]) else ""
    worse = before is not None and after is not None and not after <= before
    return f"{said}: worse than the model before training" if worse else said


def _rewards(metrics: dict) -> list[str]:
    """Return lines of what an objective measured of preferences, or of the model's own answers."""
    before, after = (metrics.get(when, {}) for when in ("before", "after"))
    shown = {
        "rewards/accuracies": "{:.1%}",
        "rewards/margins": "{:.3f}",
        "reward": "{:.3f}",
        "completions/mean_length": "{:.1f}",
    }
    return [
        f"{name:24} {form.format(before[name])} -> {form.format(after[name])}"
        for name, form in shown.items()
        if name in before and name in after
    ]


def _metrics(metrics: dict) -> list[str]:
    """Return a line for each score that was measured before and after training."""
    before, after = (metrics.get(when, {}) for when in ("before", "after"))
    labels = {name: f"{name.replace('_', ' ')} of {score['examples']}" for name, score in after.items()}
    signatures = {name: f"  {score['signature']}" for name, score in after.items() if "signature" in score}
    return [
        f"{label:24} {format_score(name, before[name])} -> {format_score(name, after[name])}{signatures.get(name, '')}"
        for name, label in labels.items()
        if name in before
    ]


def _change(label: str, summary: dict, key: str, form: str) -> list[str]:
    """Return a line with a figure before and after training; a resumed run may have only one of them."""
    if not {f"{key}_before", f"{key}_after"} <= summary.keys():
        return []
    return [f"{label:24} {form.format(summary[key + '_before'])} -> {form.format(summary[key + '_after'])}"]
