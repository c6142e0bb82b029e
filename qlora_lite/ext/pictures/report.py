"""The part of a run's page that shows held-out pictures: what they were given, and what the encoder sees in them.

Everything comes from a file of the run's folder, so that whatever is not what it should be is left out.
"""

from collections.abc import Mapping
from typing import Any

from qlora_lite.reporting.page import image, text

NOTE = (
    "Held-out pictures, the label that each was given with its probability, the training pictures nearest to it, "
    "and its patches coloured by their first three principal components."
)
_WHEN = "before", "after"


def pictures(found: Mapping[str, Any]) -> str:
    """Return a box for each picture; nothing where there is none."""
    given = found.get("given")
    cards = ""
    for number, picture in enumerate(given if isinstance(given, list) else ()):
        if not isinstance(picture, dict) or not (shown := image(picture.get("picture"), "large")):
            continue
        whens = ((when, found.get(when)) for when in _WHEN)
        seen = [(when, all_of[number]) for when, all_of in whens if isinstance(all_of, list) and number < len(all_of)]
        rows = "".join(_seen(when, one, picture.get("label")) for when, one in seen if isinstance(one, dict))
        head = f'<h3>{text(picture.get("label"))}</h3><div class="seen">{shown}</div>'
        cards += f'<div class="card" title="{text(picture.get("where"))}">{head}{rows}</div>'
    return f'<div class="columns">{cards}</div>' if cards else ""


def _seen(when: str, one: dict[str, Any], label: object) -> str:
    share = one.get("share")
    style = "good" if one.get("label") == label else "bad"
    said = f'{when}: <b class="{style}">{text(one.get("label"))}</b>'
    said += f" {share:.0%}" if isinstance(share, float) else ""
    near = one.get("neighbours")
    figures = "".join(
        f"<figure>{image(each.get('picture'))}<figcaption>{text(each.get('label'))}</figcaption></figure>"
        for each in (near if isinstance(near, list) else ())
        if isinstance(each, dict)
    )
    return f'<p class="facts">{said}</p><div class="seen">{figures}{image(one.get("map"), "patches")}</div>'
