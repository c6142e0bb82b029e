"""What `qlora-lite explain` prints: the Markdown files of this folder, one per topic, and the settings reference."""

from difflib import get_close_matches
from pathlib import Path

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.foreign_names import cure
from qlora_lite.recipe.part import find_section
from qlora_lite.recipe.reference import field_at, known_keys, section_markdown, setting_markdown
from qlora_lite.recipe.schema import FORMER_NAMES, Recipe

_FOLDER = Path(__file__).parent
SETTINGS = "settings"  # the topic without a file: it is made from the schema
_ALSO_EXTENDING = "api", "callback", "callbacks", "custom", "extend", "library", "plugin", "plugins", "python"


def topics() -> dict[str, str]:
    """Return the title of each topic, by name."""
    titles = {path.stem: _read(path.stem).partition("\n")[0].lstrip("# ") for path in _FOLDER.glob("*.md")}
    return dict(sorted((titles | {SETTINGS: "Every setting of a recipe, with its default"}).items()))


def explain(name: str) -> str:
    """Return Markdown about a topic, a section of a recipe or a setting; a name that is a topic and a section is both.

    Raises:
        RecipeError: the name is none of these; the message names the nearest one.
    """
    name = "extending" if name.lower() in _ALSO_EXTENDING else FORMER_NAMES.get(name, name)
    if name == SETTINGS:
        return "\n\n".join(map(section_markdown, Recipe.model_fields))
    parts = [_read(name)] if name in topics() else []
    if name in Recipe.model_fields or find_section(name):
        parts.append(section_markdown(name))
    elif field_at(tuple(name.split("."))) is not None:
        parts.append(setting_markdown(name))
    if not parts:
        near = get_close_matches(name, topics(), 1)
        meant = f"did you mean {near[0]}?" if near else cure(name, known_keys())[0]
        raise RecipeError(f"{name!r} is not a topic or a setting (`qlora-lite explain` lists the topics); {meant}")
    return "\n\n".join(parts)


def _read(topic: str) -> str:
    return (_FOLDER / f"{topic}.md").read_text(encoding="utf-8").strip()
