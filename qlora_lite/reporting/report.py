"""Write report.html, one offline page about a run, from what the run wrote to its folder.

It reads the files and takes no objects of the trainer, so that `qlora-lite report` can make it again later, or of a
run that was killed: whatever is missing or broken is said on the page, and only a folder that is not there is an
error. Figures that summary.json lacks are taken from metrics.jsonl where it has them.

Units: bytes and seconds as in the files; losses in nats per target token; exact match as a share, 0 to 1.
Layer L6: pyyaml besides the standard library.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qlora_lite.artifacts.run_files import (
    METRICS,
    RECIPE,
    SUMMARY,
    RunFiles,
    curve,
    figures_of_metrics,
    number,
    read_run,
)
from qlora_lite.errors import OutputError, RecipeError
from qlora_lite.files import write_text
from qlora_lite.prepare.task import Task, find_task
from qlora_lite.recipe.load import load_recipe
from qlora_lite.units import format_bytes, format_score, format_seconds

from .charts import Series, line_chart, short_number, smooth
from .page import figure, page, pairs, section, table, text

_WHEN = "before", "after"
STATUS_STYLE = {"complete": "good", "interrupted": "warn", "failed": "bad"}


def require_run_folder(run_dir: Path) -> None:
    """Check that a report may be written into a folder: a recipe alone may be the user's own, beside their own report.

    Raises:
        OutputError: it has neither summary, metrics nor checkpoints of a run.
    """
    if not any((run_dir / name).is_file() for name in (METRICS, SUMMARY)):
        from qlora_lite.artifacts.run_folder import is_begun  # with torch, which no other page has to wait for

        if not is_begun(run_dir):
            raise OutputError(f"{run_dir} is not a run folder; give the folder that train printed at its end")


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run folder.

    Args:
        run_dir: folder with recipe.yaml, metrics.jsonl and summary.json; each may be cut short, and two be missing;
            see ``require_run_folder``.

    Returns:
        Path of the page.

    Raises:
        OutputError: it is not a run folder, or cannot be written to.
    """
    require_run_folder(run_dir)
    path, run = run_dir / "report.html", read_run(run_dir)
    write_text(path, render(run, run_dir.resolve().name, _task_of(run_dir), run_dir))
    return path


def _task_of(run_dir: Path) -> Task:
    """Return the task of a run; a language model's where its recipe is not one that this version reads."""
    try:
        return find_task(load_recipe(run_dir / RECIPE, check_files=False))
    except RecipeError:
        return Task()


_CHARTED = "rewards/", "completions/", "frac_reward_zero_std"  # metrics of objectives


def render(run: RunFiles, folder_name: str, task: Task, folder: Path) -> str:
    """Return the page's HTML.

    Args:
        task: of the run, whose parts of the page stand behind the scores.
        folder: of the run.
    """
    known = {key: value for key, value in run.summary.items() if value is not None}
    summary = figures_of_metrics(run) | known
    name = str(summary.get("name") or folder_name)
    counted = "Tokens" if task.has_tokens else "Pictures"
    body = [
        _head(summary, name, folder_name),
        _notices(run, summary),
        _figures(summary, counted, answers=not task.draws),
        section("Scores", _scores(run), "Held-out examples; with standard errors."),
        *(section(*part) for part in task.report(folder, summary)),
        section(_followed(run).capitalize(), _loss_chart(run)),
        section("Over training", _small_charts(run, counted)),
        section(
            "What four bits cost", _damage(run), "Before training, on held-out examples; damage.html has the rest."
        ),
        section("Answers before and after", _samples(summary), "Held-out examples, greedy decoding."),
        section("Where the memory goes", _memory_table(summary)),
        section("Processes", _ranks(summary), "Means of a step; who computes longest lets the others wait."),
        section("Settings", _settings(run.recipe) + _chosen(summary), "The resolved recipe, defaults included."),
        section("Data and versions", _data_and_versions(summary)),
    ]
    return page(f"{name} - qlora-lite", "".join(body))


def _head(summary: dict[str, Any], name: str, folder_name: str) -> str:
    status = str(summary.get("status") or "unfinished")
    started = str(summary.get("started") or "").replace("T", " ", 1)
    started = re.sub(r"\+00:?00$", " UTC", started)
    ended = f"ended by {summary['ended_by']}" if summary.get("ended_by") else ""
    facts = [summary.get("model"), summary.get("device"), started, ended, f"folder {folder_name}"]
    style = STATUS_STYLE.get(status, "warn")
    title = f'<h1>{text(name)}</h1><span class="status {style}">{text(status)}</span>'
    line = " · ".join(text(fact) for fact in facts if fact)
    return f'<div class="head">{title}</div><p class="facts">{line}</p>'


def _notices(run: RunFiles, summary: dict[str, Any]) -> str:
    notices = [str(summary["error"])] if summary.get("error") else []
    other_results = summary.get("other_results")
    notices += map(str, other_results) if isinstance(other_results, list) else []
    for part in _dicts(summary.get("resumed")):
        if changes := part.get("forced_changes"):
            notices.append(f"Resumed after step {part.get('after_step')} with --force, despite changes: {changes}")
    losses = curve(run, "loss")
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad:
        notices.append(f"The loss was not finite at {len(bad)} of {len(losses)} steps, first at step {bad[0]}.")
    return "".join(f'<p class="notice">{text(notice)}</p>' for notice in notices + run.problems)


def _figures(summary: dict[str, Any], unit_of_speed: str, answers: bool) -> str:
    def shown(key: str, write: Callable[[float], str]) -> str:
        value = number(summary.get(key))
        return "" if value is None else write(value) if math.isfinite(value) else "not finite"

    def counted(key: str, unit: str) -> str:
        value = shown(key, lambda v: f"{v:,.0f}")
        return f"{value} {unit}" if value else ""

    name = "Accuracy" if "labels" in summary else "Exact match"
    exact = [shown(f"exact_match_{when}", _percent) for when in ("after", "before")]
    if "labels" in summary:
        known = [_scores_of(summary.get("metrics"), when).get("accuracy") for when in ("after", "before")]
        exact = [_percent(score["value"]) if score else "" for score in known]
    loss = [shown(f"eval_loss_{when}", lambda value: f"{value:.3g}") for when in ("after", "before")]
    speed = shown("tokens_per_second", short_number)
    preferred = [_of_objective(summary, when).get("rewards/accuracies") for when in _WHEN[::-1]]
    unit = "mean over examples" if any(_of_objective(summary, when) for when in _WHEN) else "nats per target token"
    figures = [
        figure(name, exact[0], exact[1], counted("exact_match_rows", "held-out examples")),
        figure("Evaluation loss", loss[0], loss[1], unit if any(loss) else ""),
        figure("Peak memory", shown("peak_bytes", lambda value: format_bytes(int(value)))),
        figure(f"{unit_of_speed} per second", speed, detail=counted("tokens", "in total")),
        figure("Time", shown("seconds", format_seconds), detail=counted("steps", "steps")),
    ]
    rewards = [_of_objective(summary, when).get("reward") for when in _WHEN[::-1]]
    if any(value is not None for value in rewards):
        reached, began = ("" if value is None else short_number(value) for value in rewards)
        figures[1] = figure("Reward", reached, began, "mean over held-out prompts")
    if any(share is not None for share in preferred):
        reached, began = ("" if share is None else _percent(share) for share in preferred)
        figures[0] = figure("Reward accuracy", reached, began, "held-out examples")
    return f'<div class="figures">{"".join(figures[0 if answers else 1 :])}</div>'


def _scores(run: RunFiles) -> str:
    """List the metrics before and after training, and those measured in between."""
    before, after = (_scores_of(run.summary.get("metrics"), when) for when in _WHEN)
    measured = replace(run, metrics=[row for row in run.metrics if "loss" not in row])  # and not those of a step's rows
    rows: list[list[object]] = []
    for name in {**before, **after}:
        ends = before.get(name), after.get(name)
        known = next(filter(None, ends[::-1]))
        between = ", ".join(f"{short_number(value)} (step {step})" for step, value in curve(measured, name))
        rows.append(
            [
                name.replace("_", " "),
                *(format_score(name, score) if score else "" for score in ends),
                between,
                known.get("examples"),
                known.get("signature", ""),
            ]
        )
    rows += _objective_scores(run)
    return table(["score", *_WHEN, "in training", "examples", "signature"], rows, numeric=4) if rows else ""


def _objective_scores(run: RunFiles) -> list[list[object]]:
    """Return a row of ``_scores`` for each metric of the objective itself."""
    before, after = (_of_objective(run.summary, when) for when in _WHEN)
    rows: list[list[object]] = []
    for name in {**before, **after}:
        ends = [short_number(values[name]) if name in values else "" for values in (before, after)]
        between = ", ".join(f"{short_number(value)} (step {step})" for step, value in curve(run, f"eval_{name}")[1:-1])
        rows.append([name, *ends, between, "", ""])
    return rows


def _scores_of(metrics: object, when: str) -> dict[str, dict[str, Any]]:
    """Return the scores of before or after training by name, as far as they are numbers."""
    scores, found = metrics.get(when) if isinstance(metrics, dict) else None, {}
    for name, score in scores.items() if isinstance(scores, dict) else ():
        if isinstance(score, dict) and number(score.get("value")) is not None:
            found[name] = score | {key: number(score.get(key)) for key in ("value", "standard_error")}
    return found


def _of_objective(summary: dict[str, Any], when: str) -> dict[str, float]:
    """Return what the objective measured of the evaluation rows before or after training, as far as it is numbers."""
    metrics = summary.get("eval_metrics")
    found = metrics.get(when) if isinstance(metrics, dict) else None
    known = {str(name): number(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {name: value for name, value in known.items() if value is not None and math.isfinite(value)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _followed(run: RunFiles) -> str:
    """Return what tells how training goes: of answers that are judged, not the loss, which is near 0 in every step."""
    return "reward" if curve(run, "reward") else "loss"


def _loss_chart(run: RunFiles) -> str:
    name = _followed(run)
    series = [
        *_noisy("training", curve(run, name)),
        Series("evaluation", curve(run, f"eval_{name}"), 3, dots=True),
    ]
    shown = [line for line in series if line.points]
    legend = "".join(f'<span><i class="key-{line.style}"></i>{line.label}</span>' for line in shown)
    title, log = f"{name.capitalize()} over training steps", name == "loss"
    wide = line_chart(series, title=title, width=1000, height=300, log=log)
    narrow = line_chart(series, title=title, width=350, height=230, log=log)
    plots = f'<div class="plot wide">{wide}</div><div class="plot narrow">{narrow}</div>'
    return f'<div class="card"><p class="legend">{legend}</p>{plots}</div>'


def _noisy(label: str, points: list[tuple[int, float]]) -> list[Series]:
    """Return the points as a pale line and their average as a strong one; few points as one strong line."""
    if len(points) < 10:
        return [Series(label, points, 2)]
    return [Series(label, points, 1), Series("smoothed", smooth(points, len(points) / 20), 2)]


def _small_charts(run: RunFiles, counted: str) -> str:
    peaks = curve(run, "peak_bytes")
    unit, unit_bytes = ("GiB", 2**30) if any(peak >= 2**30 for _, peak in peaks) else ("MiB", 2**20)
    charts = {
        "Learning rate": [Series("learning rate", curve(run, "learning_rate"), 2)],
        "Gradient norm, before clipping": _noisy("norm", curve(run, "grad_norm")),
        f"{counted} per second": _noisy(f"{counted.lower()} per second", curve(run, "tokens_per_second")),
        f"Peak memory, {unit}": [Series(unit, [(step, peak / unit_bytes) for step, peak in peaks], 2)],
    }
    names = {str(name) for line in run.metrics for name in line if str(name).startswith(_CHARTED)}
    charts |= {name: _noisy(name, curve(run, name)) for name in sorted(names)}
    cards = ""
    for title, series in charts.items():
        if series[0].points:
            drawing = line_chart(series, title=f"{title}, over training steps")
            cards += f'<div class="card"><h3>{text(title)}</h3><div class="plot">{drawing}</div></div>'
    return f'<div class="grid2">{cards}</div>' if cards else ""


def _damage(run: RunFiles) -> str:
    """List the whole models that `qlora-lite damage` measured, and the sets that it recommends to leave in 16 bit."""
    models = [row for row in _dicts(run.damage.get("models")) if row.get("group") == "type"]
    sets = [row | {"name": f"but for {_plain(row.get('keep_16bit'))}"} for row in _dicts(run.damage.get("sets"))]
    rows = []
    for row in (*models, *sets):
        loss, divergence, more = (number(row.get(key)) for key in ("loss", "kl", "more_bytes"))
        size = format_bytes(int(more)) if more and math.isfinite(more) else ""
        rows.append([row.get("name"), *("" if x is None else f"{x:.4f}" for x in (loss, divergence)), size])
    return table(["model", "loss", "KL to 16 bit", "more bytes"], rows, range(1, 4)) if rows else ""


def _samples(summary: dict[str, Any]) -> str:
    return "".join(map(_sample, _dicts(summary.get("samples"))))


def _sample(sample: dict[str, Any]) -> str:
    reference = str(sample.get("reference") or "")
    rows = f'<h3>Prompt</h3><pre class="prompt">{text(sample.get("prompt"))}</pre>'
    rows += f"<h3>Expected</h3><pre>{text(reference)}</pre>"
    for key in ("before", "after"):
        answer = sample.get(key)
        if answer is None:
            continue
        is_right = sample.get(f"{key}_matches")
        if str(answer).strip() == reference.strip() if is_right is None else is_right:
            mark = '<span class="good" title="the expected answer">✓</span>'
        else:
            mark = '<span class="bad" title="not the expected answer">✗</span>'
        rows += f"<h3>{key.capitalize()} {mark}</h3><pre>{text(answer)}</pre>"
    return f'<div class="card sample">{rows}</div>'


def _dicts(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _memory_table(summary: dict[str, Any]) -> str:
    totals: Counter[str] = Counter()
    rows = []
    for group in _dicts(summary.get("memory_table")):
        device, size = str(group.get("device")), number(group.get("bytes")) or 0.0
        size = int(size) if math.isfinite(size) else 0
        totals[device] += size
        rows.append([group.get("group"), group.get("dtype"), device, format_bytes(size), group.get("why")])
    rows += [["total", "", device, format_bytes(size), ""] for device, size in totals.items()]
    head = ["group", "type", "device", "size", "why"]
    return table(head, rows, numeric=3, totals=len(totals)) if rows else ""


def _ranks(summary: dict[str, Any]) -> str:
    """List what each of several processes held and how long it computed; runs of earlier versions have no seconds."""

    def shown(value: object, write: Callable[[float], str]) -> str:
        known = number(value)
        return write(known) if known is not None and 0 <= known < math.inf else ""

    rows = [
        [
            f"rank {rank}",
            shown(figures.get("peak_bytes"), lambda peak: format_bytes(int(peak))),
            *(shown(figures.get(f"{what}_seconds"), format_seconds) for what in ("computing", "waiting")),
        ]
        for rank, figures in enumerate(_dicts(summary.get("ranks")))
    ]
    return table(["process", "peak memory", "computing a step", "waiting a step"], rows, range(1, 4)) if rows else ""


def _settings(recipe: str) -> str:
    try:
        parsed = yaml.safe_load(recipe)
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, dict):
        return f'<div class="card"><pre>{text(recipe)}</pre></div>' if recipe.strip() else ""
    loose = {key: value for key, value in parsed.items() if not isinstance(value, dict)}
    sections = ({"recipe": loose} if loose else {}) | {k: v for k, v in parsed.items() if k not in loose}
    return f'<div class="columns">{"".join(_pairs_of(str(key), sections[key]) for key in sections)}</div>'


def _chosen(summary: dict[str, Any]) -> str:
    """List what the plan chose where the recipe says auto."""
    plan = summary.get("plan")
    cards = _pairs_of("as planned", plan.get("chosen")) if isinstance(plan, dict) else ""
    return f'<div class="columns">{cards}</div>' if cards else ""


def _data_and_versions(summary: dict[str, Any]) -> str:
    kind = "model" if "model_sha256" in summary else "adapter"
    trained = {"weights": summary.get("trainable_parameters"), "sha256": summary.get(f"{kind}_sha256")}
    cards = _counts("Training data", summary.get("data")) + _counts(kind.capitalize(), trained)
    cards += _pairs_of("Versions", summary.get("versions"))
    return f'<div class="columns">{cards}</div>' if cards else ""


def _counts(title: str, values: object) -> str:
    """Write what is known of a dict of counts, in words and with thousands separators."""
    if not isinstance(values, dict):
        return ""
    known = [(str(key).replace("_", " "), value) for key, value in values.items() if value is not None]
    return _pairs_of(title, {key: _counted(value) for key, value in known})


def _counted(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{_counted(count)} {reason}" for reason, count in value.items()) or "none"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _pairs_of(title: str, values: object) -> str:
    """Write a dict as a titled list, values as in a recipe; anything else, or an empty one, as nothing."""
    if not isinstance(values, dict) or not values:
        return ""
    return pairs(title, [(str(key), _plain(value)) for key, value in values.items()])


def _plain(value: object) -> str:
    """Write a setting as in a recipe; of a list of mappings, what is set."""
    if isinstance(value, str):
        return value
    rows = _dicts(value)
    if rows:
        return "; ".join(", ".join(f"{k}: {v}" for k, v in row.items() if v is not None) for row in rows)
    return json.dumps(value, default=str, ensure_ascii=False)
