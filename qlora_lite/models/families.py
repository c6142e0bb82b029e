"""Configurations of well-known models, so that a plan for them needs no network.

`families.json` maps a hub id to what the model's `config.json` says about shapes and arithmetic, or to the id of
a model of the same shape (an instruct variant, which may differ in special tokens and in the longest context,
not in memory). A file and not a download at first use, because a plan is made before anything is fetched, and
gated models cannot be fetched without an account. The shipped copy is only for planning: a run reads the
`config.json` beside the weights.

Each entry carries the published number of parameters and where it was published; tests build every model
without memory and compare. Of Gemma 3 from 4B on and Gemma 4 it is the language model alone, of SmolVLM, Qwen2.5-VL,
Qwen3-VL and Qwen3.5 the whole.

`known_pipelines.json` has the same of diffusion models: what the files of their pipelines say.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

CONFIG_IS_ENOUGH = "A folder with just the model's config.json is enough for a plan"


def known_config(hub_id: str) -> dict[str, Any] | None:
    """Return what the model's config.json says, or None for a model that is not in the table.

    Args:
        hub_id: "owner/model"; upper and lower case do not matter, as on the hub.
    """
    entry = _entry(hub_id)
    return deepcopy(entry["config"]) if entry else None


def known_models() -> list[str]:
    """Return every hub id of the table, in its order."""
    return list(_table())


@cache
def known_pipelines() -> Mapping[str, Mapping[str, Any]]:
    """Return the content of each configuration of a diffusion model's pipeline by file, by the model's hub id."""
    return json.loads(Path(__file__).with_name("known_pipelines.json").read_text(encoding="utf-8"))


def nearest(hub_id: str) -> list[str]:
    """Return at most three ids like a given one, best first; by the model's name alone, since copies change owners."""
    names: dict[str, str] = {}
    for known in known_models():
        names.setdefault(_name(known), known)
    return [names[name] for name in get_close_matches(_name(hub_id), names, 3)]


def namesake(hub_id: str) -> str | None:
    """Return the known model of the same name, whoever owns the copy; None where there is none.

    A copy under the same name (unsloth/Llama-3.2-1B) has the same shapes; one that was changed has a name of its own.
    """
    return next((known for known in known_models() if _name(known) == _name(hub_id)), None)


def _name(hub_id: str) -> str:
    return hub_id.rpartition("/")[2].lower()


def _entry(hub_id: str) -> dict[str, Any] | None:
    ids = {known.lower(): known for known in known_models()}
    entry = _table().get(ids.get(hub_id.lower(), ""))
    return _table()[entry] if isinstance(entry, str) else entry


@cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
