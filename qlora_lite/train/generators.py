"""The random generators as tensors, so that a run continues with the numbers that it would have drawn.

Dropout draws from torch's generator of the device. Python's and numpy's are kept too, because a model's code may
use them. As tensors and not pickled, which is what `torch.save` of `random.getstate()` would be: whoever can change a
checkpoint could then run code.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch

from qlora_lite.errors import CheckpointError

_PYTHON_VERSION = 3  # of random.getstate's tuple, since Python 3.2


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of every generator that a step on a device can draw from.

    Keys: "torch" uint8, "python" int64 [625], "python_gauss" float64 [0 or 1], "numpy" int64 [624],
    "numpy_rest" float64 [3] (position, whether a normal value waits, that value), and "cuda" uint8 on a GPU.
    """
    _, words, gauss = random.getstate()
    drawn = np.random.get_state(legacy=False)
    rest = drawn["state"]["pos"], drawn["has_gauss"], drawn["gauss"]
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(drawn["state"]["key"].astype(np.int64)),
        "numpy_rest": torch.tensor(rest, dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put every generator back into a state from ``generator_states``.

    Raises:
        CheckpointError: a state is missing or invalid.
    """
    try:
        gauss = states["python_gauss"].tolist()
        position, has_gauss, waiting = states["numpy_rest"].tolist()
        random.setstate((_PYTHON_VERSION, tuple(states["python"].tolist()), gauss[0] if gauss else None))
        np.random.set_state(("MT19937", states["numpy"].numpy(), int(position), int(has_gauss), waiting))
        torch.set_rng_state(states["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's random generators cannot be used: {error!r}") from None
