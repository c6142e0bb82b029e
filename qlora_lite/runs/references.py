"""What the reference model gives the examples of a preference: computed once before the first step, kept in a file.

The reference is the model as training begins with it: the base, or the base with the adapter of lora.init_from. Its
log-probabilities never change, two numbers an example. So they are computed once, without gradients and by the plan
that training has, and found again by all that they depend on: the checksum of the weights, the model's configuration,
weights and settings of the adapter, what it is trained to be merged into, the tokens, the compute type, fused kernels,
and the versions of this package and its libraries. (How rows are packed changes no more than rounding, and is not
among them.) Only examples that the run's steps will see are computed. A run that is stopped meanwhile keeps what is in
the file; one that resumes finds them whole, and so does another run that begins alike. (Keeping a second model, the
other known way, takes its memory in every step.)
"""

import hashlib
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qlora_lite.artifacts.run_folder import package_versions
from qlora_lite.data.tokens.storage import Examples
from qlora_lite.errors import OutputError
from qlora_lite.files import cache_root, explain_write_errors, read_sealed, write_sealed
from qlora_lite.inference.evaluate import Watch, watching
from qlora_lite.models.kernels import kernels_of
from qlora_lite.models.memory_options import divided_weights
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.train.divided_weights import tensors_here
from qlora_lite.train.loop import Trainer

log = logging.getLogger("qlora_lite")
EXAMPLES_AT_ONCE = 256  # between looks at the clock
SECONDS_BETWEEN_SAVES = 20.0


def with_references(
    examples: Examples, trainer: Trainer, checksum: str, watch: Watch | None = None, used: np.ndarray | None = None
) -> Examples:
    """Return examples with what the trainer's model gives them now.

    Args:
        examples: each of two sequences.
        checksum: of the frozen weights.
        watch: told how far this is.
        used: int64 [U], which examples are asked for; the others get NaN. None is all.
    """
    rows = np.unique(examples.order)
    distinct = replace(examples, order=rows, references=None)
    asked = examples.order if used is None else examples.order[used]
    wanted = np.flatnonzero(np.isin(rows, asked))
    path = cache_root() / "references" / f"{_key(distinct, trainer, checksum)}.json"
    processes, device = trainer.processes, trainer.device
    found = _read(path, len(rows)) if processes.is_first else np.zeros((len(rows), 2), np.float32)
    missing = wanted[np.isnan(found[wanted, 0])]
    missing = np.array(json.loads(processes.tell(json.dumps(missing.tolist()))), np.int64)
    started = saved = time.monotonic()
    done = watching(watch, "reference model", len(wanted))
    for first in range(0, len(missing), EXAMPLES_AT_ONCE):
        part = missing[first : first + EXAMPLES_AT_ONCE]
        found[part] = trainer.reference_log_probabilities(replace(distinct, order=rows[part]))
        is_last = first + EXAMPLES_AT_ONCE >= len(missing)
        if processes.is_first and (is_last or time.monotonic() - saved > SECONDS_BETWEEN_SAVES):
            _write(path, found)
            saved = time.monotonic()
        if done:
            done(len(wanted) - len(missing) + first + len(part))
    if processes.world_size > 1:  # the others have what the first one did not find in its file
        whole = torch.zeros(len(rows), 2, device=device)
        if processes.is_first:
            whole += torch.from_numpy(found).to(device)
        processes.add_up([whole])
        found = whole.cpu().numpy()
    how = f"in {time.monotonic() - started:.0f} s" if len(missing) else "from the cache"
    log.info("preferences: the reference model's log-probabilities of %d examples, %s", len(wanted), how)
    references: np.ndarray = np.full((len(examples.rows) - 1, 2), np.nan, np.float32)
    references[rows] = found
    return replace(examples, references=references)


def _key(examples: Examples, trainer: Trainer, checksum: str) -> str:
    """Return what names the log-probabilities: 32 hexadecimal digits."""
    model, method, processes = trainer.model, trainer.workload.method, trainer.processes
    adapter = {name: str(bit_sums(tensor)) for name, tensor in tensors_here(method, model).items()}
    if divided_weights(model):
        adapter = {str(rank): processes.tell(json.dumps(adapter), rank) for rank in range(processes.world_size)}
    parts = [
        checksum,
        adapter,
        method.config(model, ""),
        method.merge_aware,
        _placeless(model.config.to_diff_dict()),
        examples.digest(),
        str(model.dtype),
        trainer.device.type,
        sorted(kernels_of(model)),
        package_versions(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _placeless(config: dict) -> dict:
    """Return a model's configuration without where the model lies."""
    return {
        name: _placeless(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "_name_or_path"
    }


def _read(path: Path, count: int) -> np.ndarray:
    """Return the log-probabilities of examples that a file holds, float32 [count, 2]; NaN for the others."""
    found: np.ndarray = np.full((count, 2), np.nan, np.float32)
    try:
        known = json.loads(read_sealed(path))
        read = np.array([(math.nan, math.nan) if each is None else each for each in known], np.float32)
    except (OSError, ValueError, TypeError, RecursionError):
        return found
    if read.shape[1:] == (2,) and len(read) <= count and not np.isinf(read).any():
        found[: len(read)] = read
    return found


def _write(path: Path, found: np.ndarray) -> None:
    """Write log-probabilities for the next run; where that is not possible, this one still has them."""
    known = [None if math.isnan(first) else [first, second] for first, second in found.tolist()]
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, json.dumps(known))
    except OutputError as error:
        log.warning("the reference model's log-probabilities are not cached: %s", error)
