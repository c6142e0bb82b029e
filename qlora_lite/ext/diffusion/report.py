"""The part of a run's page that shows what a denoiser drew before training and after."""

from collections.abc import Mapping
from typing import Any

from qlora_lite.reporting.page import image, text

NOTE = "The same prompts and the same noise, by the pipeline's scheduler, before training and after."


def samples(found: Mapping[str, Any]) -> str:
    """Return a box for each prompt with what a denoiser drew of it; nothing where there is none."""
    prompts, cards = found.get("prompts"), ""
    for number, prompt in enumerate(prompts if isinstance(prompts, list) else ()):
        whens = ((when, found.get(when)) for when in ("before", "after"))
        drawn = [(when, uris[number]) for when, uris in whens if isinstance(uris, list) and number < len(uris)]
        figures = "".join(
            f"<figure>{image(uri, 'large')}<figcaption>{when}</figcaption></figure>"
            for when, uri in drawn
            if image(uri)
        )
        title = text(prompt) if prompt else "no prompt"
        cards += f'<div class="card"><h3>{title}</h3><div class="seen">{figures}</div></div>' if figures else ""
    return f'<div class="columns">{cards}</div>' if cards else ""
