"""Configurations of well-known diffusion models, so that a plan for them needs no network.

``known_pipelines.json`` maps a hub id to what the files of its pipeline say, as far as shapes, arithmetic and the
objective depend on it; see ``families`` for why. A run reads the files beside the weights.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def known_pipelines() -> Mapping[str, Mapping[str, Any]]:
    """Return the content of each configuration by file, of each model by its name on the hub."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
