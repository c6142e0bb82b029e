"""What processes of tests are forked with, so that each need not import it (``rank_processes``)."""

import peft  # noqa: F401
import pytest  # noqa: F401
import tiny_trainer  # noqa: F401
import torch
import torch.distributed  # noqa: F401
