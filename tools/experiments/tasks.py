"""Tasks that the tools compare trained models on, as rows of a prompt and a completion, and the sweeps that do it.

GSM8K: loss on worked answers. The E2E challenge: a sentence for a meaning representation, split by those. SST-2: is a
sentence of a film review positive? None of their rows is in this repository.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.models import path_of

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
TRAINED, HELD_OUT = 400, 32  # rows; no run of the tools trains on all of them
TOKENS = {"gsm8k": 384, "e2e": 192, "sst2": 256}  # of a step, two or more rows; the few that are longer are left out
TEMPLATES = {"gemma3-270m": "plain"}  # a base model


def gsm8k(data: Path) -> Iterator[tuple[str, str]]:
    """Yield questions and their worked answers."""
    with (data / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield row["question"], row["answer"]


def e2e(data: Path) -> Iterator[tuple[str, str]]:
    """Yield meaning representations and sentences."""
    with (data / "e2e_devset.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["mr"], row["ref"]


def sst2(data: Path) -> Iterator[tuple[str, str]]:
    """Yield sentences and "positive" or "negative"."""
    with (data / "sst2.train").open(encoding="utf-8") as file:
        for line in file:
            label, _, sentence = line.rstrip("\n").partition(" ")
            yield f"{sentence}\nIs this positive or negative?", "positive" if label == "1" else "negative"


TASKS = {"e2e": e2e, "gsm8k": gsm8k, "sst2": sst2}


def write_rows(folder: Path, data: Path, task: str, held_out: int = HELD_OUT, trained_rows: int = TRAINED) -> None:
    """Write a task's rows to train on, and one row of each of some other prompts to evaluate on.

    Args:
        data: holds gsm8k_train.jsonl, e2e_devset.csv and sst2.train.
    """
    answers: dict[str, list[str]] = {}
    for prompt, answer in TASKS[task](data):
        answers.setdefault(prompt, []).append(answer)
    prompts = sorted(answers)
    random.Random(0).shuffle(prompts)
    evaluated = [(prompt, answers[prompt][0]) for prompt in prompts[:held_out]]
    trained = [(prompt, answer) for prompt in prompts[held_out:] for answer in answers[prompt]]
    random.Random(0).shuffle(trained)
    for name, rows in (("train", trained[:trained_rows]), ("eval", evaluated)):
        path = folder / f"{task}-{name}.jsonl"
        text = "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # else a sweep warns of its runs' rows
            path.write_text(text, encoding="utf-8")


def command(*arguments: str) -> None:
    """Run one of the package's commands."""
    subprocess.run([sys.executable, "-m", "qlora_lite", *arguments], check=True)


def recipe_of(model: str, task: str, folder: Path, steps: int) -> dict:
    """Return the recipe of a task whose rows lie in a folder, or of the quickstart."""
    if task == "quickstart":
        recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
        rows = {name: str(QUICKSTART.parent / recipe["data"][name]) for name in ("train", "eval")}
        recipe = {"model": {}, "data": recipe["data"] | rows, "train": {"learning_rate": 1.5e-3}}
    else:
        rows = {name: str(folder / f"{task}-{name}.jsonl") for name in ("train", "eval")}
        recipe = {
            "model": {},
            "data": rows | {"max_tokens": TOKENS[task], "overflow": "drop"},
            "train": {"max_steps": steps},
        }
    recipe["model"]["path"], recipe["data"]["template"] = path_of(model), TEMPLATES.get(model)
    return recipe


def trained(model: str, task: str, aware: str, folder: Path, steps: int) -> Path:
    """Return the run of a task, which is trained if it is not complete.

    Args:
        aware: of train.merge_aware.
    """
    run = folder / f"{model}-{task}-{aware}"
    if (run / "recipe.yaml").exists():
        summary = run / "summary.json"
        status = json.loads(summary.read_text(encoding="utf-8"))["status"] if summary.exists() else None
        if status != "complete":
            shutil.rmtree(run)  # of minutes
    if not run.exists():
        recipe = recipe_of(model, task, folder, steps)
        recipe["train"]["merge_aware"], recipe["output"] = aware, {"dir": str(run)}
        file = folder / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command("train", str(file))
    return run


def sweep(
    folder: Path,
    name: str,
    model: str,
    task: str,
    train: Mapping[str, Any],
    axes: Mapping[str, Iterable | Mapping],
    goal: str = "eval_loss",
) -> list[dict]:
    """Run a sweep of a model on a task in a folder that has its rows, as far as it is not run; return its points.

    Args:
        train: settings of the recipe's section.

    Raises:
        RuntimeError: another process has written what this sweep found: two may share a sweep's runs, not its page.
    """
    recipe = {
        "model": {"path": path_of(model)},
        "data": {
            "train": f"{task}-train.jsonl",
            "eval": f"{task}-eval.jsonl",
            "max_tokens": TOKENS[task],
            "overflow": "drop",
            "template": TEMPLATES.get(model),
        },
        "train": train,
    }
    wanted = {"recipe": f"{name}-recipe.yaml", "axes": axes, "goal": goal}
    for file, values in ((f"{name}-recipe", recipe), (name, wanted)):
        (folder / f"{file}.yaml").write_text(json.dumps(values, indent=1), encoding="utf-8")  # JSON is YAML
    subprocess.run([sys.executable, "-m", "qlora_lite", "sweep", f"{name}.yaml"], cwd=folder, check=True)
    points = json.loads((folder / "sweeps" / name / "sweep.json").read_text(encoding="utf-8"))["points"]
    for axis, choices in axes.items():
        if isinstance(choices, Mapping) and {point["choice"][axis] for point in points} != choices.keys():
            raise RuntimeError(
                f"{folder / 'sweeps' / name} has another sweep's points: give each process a part of its own"
            )
    return points


def best_rates(points: list[dict], axis: str) -> set[str]:
    """Return the choices whose learning rate gave the smallest loss of all that differ in it alone."""
    best: dict[str, tuple[float, str]] = {}
    for point in points:
        if point["status"] == "complete":
            choice = point["choice"][axis]
            found = point["mean"]["eval_loss_after"], choice
            best[choice.rpartition(", ")[0]] = min(found, best.get(choice.rpartition(", ")[0], found))
    return {choice for _, choice in best.values()}
