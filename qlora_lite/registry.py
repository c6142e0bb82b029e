"""Find what distributions bring, the package's own features included, by name.

A distribution names what it brings in its metadata, as entry points (packaging.python.org, "Entry points
specification"): the group says the kind of thing, the name is what a recipe or a command calls it, and the value says
where it stands. So names are listed without importing anything, and a thing is imported when it is used.

    [project.entry-points."qlora_lite.forms"]
    onnx = "my_package.export:ONNX"
"""

from importlib.metadata import EntryPoint, distributions

from .errors import ExtensionError, require_one_of

KINDS = {"forms": "export form"}  # -> what one is called
DISTRIBUTION = "qlora-lite"


def names(kind: str) -> list[str]:
    """Return the names of all things of a kind, sorted.

    Args:
        kind: of ``KINDS``.

    Raises:
        ExtensionError: two have one name, or the package's own are missing.
    """
    return sorted(_registered(kind))


def find(kind: str, name: str) -> object:
    """Import a thing and return it.

    Raises:
        ExtensionError: it cannot be imported; see ``names``.
        ModelError: there is none of that name.
    """
    known = _registered(kind)
    require_one_of(KINDS[kind], name, sorted(known))
    try:
        return known[name].load()
    except Exception as error:  # the code of others, which may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExtensionError(
            f"the {KINDS[kind]} {name} of {_owner(known[name])} cannot be loaded ({known[name].value}: {what}); update "
            f"or uninstall {_owner(known[name])}"
        ) from error


def _registered(kind: str) -> dict[str, EntryPoint]:
    found: dict[str, tuple[EntryPoint, str]] = {}
    # not entry_points(), which reads the first distribution of each name alone: in a clone that may be an old build's
    for distribution in distributions():
        for each in distribution.entry_points.select(group=f"qlora_lite.{kind}"):
            other, owner = found.setdefault(each.name, (each, distribution.name))
            if owner != distribution.name:
                raise ExtensionError(
                    f"the {KINDS[kind]} {each.name} is registered twice, by {owner} ({other.value}) and by "
                    f"{distribution.name} ({each.value}); uninstall one of them"
                )
    if DISTRIBUTION not in (owner for _, owner in found.values()):
        raise ExtensionError(
            f"the package's own {KINDS[kind]}s are not registered: it is run from a clone, or was installed by an "
            "earlier version; install it again (pip install -e . in a clone)"
        )
    return {name: each for name, (each, _) in found.items()}


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"
