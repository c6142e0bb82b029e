"""Settings that are for tokens, and not for pictures."""

from qlora_lite.recipe.part import Found, Needs, Value
from qlora_lite.recipe.reference import written

ONLY_PICTURES: Needs = {  # what may be given; what else is auto
    ("data", "max_tokens"): (1024,),
    ("data", "overflow"): ("error",),
    ("data", "order"): ("shuffle", "as-is"),
    ("data", "streaming"): (False,),
    ("memory", "tile_tokens"): ("off",),
    ("memory", "embeddings"): ("device",),
    ("model", "quant"): ("none", "nf4", "fp4"),
}


def no_tokens(value: Value, needs: Needs = ONLY_PICTURES, example: str = "is a picture") -> Found:
    """Yield settings that do not go with pictures.

    Args:
        example: what an example is or has.
    """
    kind = value("task", "kind")
    for (section, name), allowed in needs.items():
        given = value(section, name)
        if given is None or given == "auto" or any(given == each for each in allowed):
            continue
        why = f"not possible with task.kind {kind}, where an example {example}"
        cure = "remove it" if name == "max_tokens" else f"write {' or '.join(map(written, allowed))}, or remove it"
        yield (section, name), f"{section}.{name} = {written(given)}: {why}; {cure}"
