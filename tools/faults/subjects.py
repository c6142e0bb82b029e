"""Tiny models of every family with what each can be trained for: what ``random_recipes`` and ``kinds`` run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faults.lab  # noqa: F401 - first: it sets how many threads torch may have

# isort: split
import tiny
import tiny_diffusion
import tiny_heads
import tiny_pictures
import tiny_published
import tiny_vision_language
import yaml
from tiny_files import save_nested, save_tiny, write_recipe
from tiny_gguf import write_tiny_gguf

from qlora_lite.prepare.objective import ObjectiveEntry
from qlora_lite.registry import find, names


@dataclass(frozen=True)
class Subject:
    """A model and what it is trained for; ``write(folder, model)`` returns the path of a recipe for its examples."""

    name: str
    save: Callable[[Path], object]
    write: Callable[[Path, Path], Path]


def with_settings(path: Path, settings: dict[str, object]) -> None:
    """Merge dotted settings into a recipe file; a section that is None is left out."""
    recipe = yaml.safe_load(path.read_text())
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe.pop(section, None)
    path.write_text(yaml.safe_dump(recipe))


def _preferences(objective: str, folder: Path, model: Path) -> Path:
    data = {"max_tokens": 192}
    for part, mark in (("train", "?"), ("eval", "!")):
        rows = _pairs(mark)
        if objective == "kto":
            rows = [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in rows
                for side in ("chosen", "rejected")
            ]
        data[part] = str(tiny_heads.write_jsonl(folder / f"{objective}-{part}.jsonl", rows))
    return write_recipe(folder, model, data=data, train={"objective": objective, "metrics_examples": 0})


def _pairs(mark: str) -> list[dict]:
    return [{"prompt": f"{n}{mark}", "chosen": "yes", "rejected": f"I think {n}"} for n in range(12)]


def _rewarded(folder: Path, model: Path) -> Path:
    (folder / "judge.py").write_text("def letters(completions):\n    return [float(len({*c})) for c in completions]\n")
    data = {"max_tokens": 200}
    for part, mark in (("train", "?"), ("eval", "!")):
        rows = [{"prompt": f"{n}{mark}", "completion": "one"} for n in range(8)]
        data[part] = str(tiny_heads.write_jsonl(folder / f"prompts-{part}.jsonl", rows))
    objective = {"rewards": "judge.py:letters", "group_size": 4, "max_completion_tokens": 6}
    train = {"objective": "grpo", "metrics_examples": 0}
    return write_recipe(folder, model, data=data, train=train, objective=objective)


def _labelled(kind: str, folder: Path, model: Path) -> Path:
    if kind == "reward":
        return tiny_heads.head_recipe(folder, model, kind, _pairs("?"), _pairs("!"))
    parts = tiny_heads.labelled_rows(24), tiny_heads.labelled_rows(8, "e")
    for row in (*parts[0], *parts[1]):
        if kind == "multi-label":
            row["label"] = [f"is{row['label']}", "any"]
        if kind == "regression":
            row["label"] += 0.5
    return tiny_heads.head_recipe(folder, model, kind, *parts)


def _pictured(kind: str, folder: Path, model: Path) -> Path:
    if kind == "image-segmentation":
        return tiny_pictures.mask_recipe(folder, model)
    return tiny_pictures.picture_recipe(folder, model, task={"kind": kind})


def _published(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    tiny_published.save_published(folder, name)


def _from_gguf(folder: Path, model: Path) -> Path:
    path = write_recipe(folder, model / "model.gguf")
    with_settings(path, {"model.quant": "keep"})
    return path


def _of_classes(folder: Path, model: Path) -> Path:
    task = {"kind": "image-generation", "labels": ["cool", "hot"]}
    return tiny_diffusion.diffusion_recipe(folder, model, task=task, data={"resolution": 8})


def subjects() -> dict[str, list[Subject]]:
    """Return every family with what it can be trained for, by kind of task."""
    text = {name: partial(save_tiny, model_type=name) for name in (*tiny.ARCHITECTURES, *tiny.UNUSUAL, *tiny.FURTHER)}
    encoders = {name: partial(tiny_pictures.save_encoder, name=name) for name in tiny_pictures.ENCODERS}
    headless = {name: partial(tiny_heads.save_headless, name=name) for name in tiny_heads.FAMILIES}
    pipelines = [
        Subject(name, save, tiny_diffusion.diffusion_recipe) for name, save in tiny_diffusion.PIPELINES.items()
    ]
    labels = "classification", "multi-label", "regression"
    labelled = [
        Subject(f"{name} {kind}", save, partial(_labelled, kind)) for name, save in headless.items() for kind in labels
    ]
    return {
        "text": [Subject(name, save, write_recipe) for name, save in text.items()],
        "nested": [Subject(f"{name} nested", partial(save_nested, name=name), write_recipe) for name in tiny.NESTED],
        "published codes": [
            Subject(f"{name} codes", partial(_published, name), write_recipe) for name in tiny_published.CASES
        ],
        "gguf": [
            Subject(f"{name} gguf", lambda to, name=name: write_tiny_gguf(to / "model.gguf", name), _from_gguf)
            for name in ("llama", "qwen2")
        ],
        "preferences": [
            Subject(f"{name} {objective}", save, partial(_preferences, objective))
            for name, save in text.items()
            for objective in names("objectives")
            if find("objectives", objective, ObjectiveEntry).preference
        ],
        "rewards": [Subject(f"{name} grpo", save, _rewarded) for name, save in text.items()],
        "heads": [*labelled, Subject("llama reward", text["llama"], partial(_labelled, "reward"))],
        "pictures": [
            Subject(f"{name} {kind}", save, partial(_pictured, kind))
            for name, save in encoders.items()
            for kind in ("image-classification", "image-segmentation", "image-embedding")
        ],
        "chats about pictures": [
            Subject(
                f"{name} chats",
                partial(tiny_vision_language.save_vision_language, name=name),
                tiny_vision_language.chat_recipe,
            )
            for name in tiny_vision_language.FAMILIES
        ],
        "denoisers": [*pipelines, Subject("dit", tiny_diffusion.save_dit_pipeline, _of_classes)],
    }
