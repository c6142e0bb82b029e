"""The run folder: what a run writes while it goes, and what the other commands read of it.

``summary.json`` exists from the start with status "running"; only a run that reached its end says
"complete", so nothing half-written looks finished.
"""

import importlib.metadata
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from .errors import OutputError, RecipeError
from .files import explain_write_errors, write_text
from .recipe.load import load_recipe, resolve_to_yaml
from .recipe.schema import Recipe

ADAPTER, ADAPTER_LAST = "adapter", "adapter-last"
TEMPLATE = "template.jinja"
VERSIONED = ("qlora-lite", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


def package_versions() -> dict[str, str]:
    """Return the versions that a run's result can depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


@dataclass(slots=True)
class RunFolder:
    """A run's folder and the summary that grows in it."""

    path: Path
    summary: dict = field(default_factory=dict)

    def log_metrics(self, values: dict) -> None:
        """Append one line to ``metrics.jsonl``."""
        file = self.path / "metrics.jsonl"
        with explain_write_errors(file), file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def update(self, **values) -> None:
        """Put values into ``summary.json``."""
        self.summary.update(values)
        write_text(self.path / "summary.json", json.dumps(self.summary, indent=2) + "\n")


def create_run(recipe: Recipe) -> RunFolder:
    """Make the folder of a new run, with its resolved recipe.

    Raises:
        OutputError: the folder cannot be written, or holds something already.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = recipe.output.name or "run"
    path = Path(recipe.output.dir) if recipe.output.dir else Path("runs") / f"{name}-{stamp}"
    with explain_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise OutputError(f"{path} is not empty; choose another output.dir or remove it")
    run = RunFolder(path)
    write_text(path / "recipe.yaml", resolve_to_yaml(recipe))
    run.update(status="running", name=name, model=recipe.model.path, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return run


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What another command needs of a run: its recipe, its best adapter, and the tokens that end an answer.

    The recipe's template is the one that the run recorded.
    """

    recipe: Recipe
    adapter: Path
    end_token_ids: tuple[int, ...]


def open_run(path: str | Path) -> OpenedRun:
    """Open a run folder for use.

    Raises:
        RecipeError: it is not a run folder, or has no adapter yet.
    """
    folder = Path(path)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no recipe.yaml")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        end_token_ids = tuple(int(token) for token in summary["data"]["end_token_ids"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"{folder / 'summary.json'} is missing or broken; is this a whole run folder?") from None
    for name in (ADAPTER, ADAPTER_LAST):
        if (folder / name / "adapter_config.json").is_file():
            recipe = load_recipe(folder / "recipe.yaml", check_files=False)
            if (folder / TEMPLATE).is_file():
                data = recipe.data.model_copy(update={"template": str(folder / TEMPLATE)})
                recipe = recipe.model_copy(update={"data": data})
            return OpenedRun(recipe, folder / name, end_token_ids)
    raise RecipeError(f"{folder} has no adapter; the run ended before one was saved (see {folder / 'log.txt'})")
