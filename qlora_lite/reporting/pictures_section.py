"""The part of a run's page that shows held-out pictures: what they were given, and what the encoder sees in them.

Everything comes from a file of the run's folder, so that whatever is not what it should be is left out.
"""

import re
from typing import Any

from .page import text

NOTE = (
    "Held-out pictures, the label that each was given with its probability, the training pictures nearest to it, "
    "and its patches coloured by their first three principal components."
)
_URI = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]+")
_WHEN = "before", "after"


def pictures_of(found: dict[str, Any]) -> str:
    """Return a box for each picture; nothing where there is none."""
    given = found.get("given")
    cards = ""
    for number, picture in enumerate(given if isinstance(given, list) else ()):
        if not isinstance(picture, dict) or not (image := _image(picture.get("picture"), "large")):
            continue
        whens = ((when, found.get(when)) for when in _WHEN)
        seen = [(when, all_of[number]) for when, all_of in whens if isinstance(all_of, list) and number < len(all_of)]
        rows = "".join(_seen(when, one, picture.get("label")) for when, one in seen if isinstance(one, dict))
        head = f'<h3>{text(picture.get("label"))}</h3><div class="seen">{image}</div>'
        cards += f'<div class="card" title="{text(picture.get("where"))}">{head}{rows}</div>'
    return f'<div class="columns">{cards}</div>' if cards else ""


SAMPLES_NOTE = "The same prompts and the same noise, by the pipeline's scheduler, before training and after."


def samples_of(found: dict[str, Any]) -> str:
    """Return a box for each prompt with what a denoiser drew of it; nothing where there is none."""
    prompts, cards = found.get("prompts"), ""
    for number, prompt in enumerate(prompts if isinstance(prompts, list) else ()):
        whens = ((when, found.get(when)) for when in _WHEN)
        drawn = [(when, uris[number]) for when, uris in whens if isinstance(uris, list) and number < len(uris)]
        figures = "".join(
            f"<figure>{_image(uri, 'large')}<figcaption>{when}</figcaption></figure>"
            for when, uri in drawn
            if _image(uri)
        )
        title = text(prompt) if prompt else "no prompt"
        cards += f'<div class="card"><h3>{title}</h3><div class="seen">{figures}</div></div>' if figures else ""
    return f'<div class="columns">{cards}</div>' if cards else ""


def _seen(when: str, one: dict[str, Any], label: object) -> str:
    share = one.get("share")
    style = "good" if one.get("label") == label else "bad"
    said = f'{when}: <b class="{style}">{text(one.get("label"))}</b>'
    said += f" {share:.0%}" if isinstance(share, float) else ""
    near = one.get("neighbours")
    figures = "".join(
        f"<figure>{_image(each.get('picture'))}<figcaption>{text(each.get('label'))}</figcaption></figure>"
        for each in (near if isinstance(near, list) else ())
        if isinstance(each, dict)
    )
    return f'<p class="facts">{said}</p><div class="seen">{figures}{_image(one.get("map"), "patches")}</div>'


def _image(uri: object, style: str = "") -> str:
    if not isinstance(uri, str) or not _URI.fullmatch(uri):
        return ""
    return f'<img alt="" class="{style}" src="{uri}">'
