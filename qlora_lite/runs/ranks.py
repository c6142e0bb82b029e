"""How many processes a launcher started: torchrun, accelerate launch and mpirun say it in the environment.

Here one process uses one device. Several would each be a whole training, and accelerate's trackers would wait for ever
for those that never join them. SLURM's variables are not looked at: its tasks may well be runs of their own.
"""

import os
import time

from qlora_lite.errors import LaunchError

_SIZES = {"WORLD_SIZE": "RANK", "PMI_SIZE": "PMI_RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
          "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK"}  # fmt: skip
_HEARD_SECONDS = 1  # torchrun ends all ranks as soon as one has ended


def require_one_process() -> None:
    """Check that this process is the only one; of several, rank 0 says so and the others end without a word.

    Raises:
        LaunchError: a launcher started several.
    """
    for size, rank in _SIZES.items():
        count, number = os.environ.get(size, ""), os.environ.get(rank, "0")
        if not count.isdecimal() or int(count) < 2:
            continue
        if number != "0":
            time.sleep(_HEARD_SECONDS)
            raise LaunchError("")
        raise LaunchError(f"{count} processes were started ({size}), and one process on one device is supported: start "
                          f"qlora-lite without torchrun, accelerate launch or mpirun, or unset {size}")  # fmt: skip
